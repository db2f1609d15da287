"""The sweep flow: `prefect deployment run sweep/recipe`."""

from prefect import flow
from prefect.states import Cancelled, Completed, Failed, State

from flows.grids.sweeping import carry_out, prepared_sweep
from flows.home import home_directory
from flows.orchestration.own_state import own_state
from flows.orchestration.reporting import controlled, refused, reporter, settled, stop_job
from pipeline.errors import EXIT_DONE, InputError


@flow(name="sweep", flow_run_name="sweep-{recipe}", on_cancellation=[stop_job])
def sweep(
    recipe: str,
    set: list[str] = [],
    data: str | list[str] | None = None,
    profile: str = "local",
) -> State:
    """Train every combination of some settings' values; a table at the end, in the log and as sweep.json and sweep.csv.

    Args:
        recipe: what to train, for example pretrain_mae_vit_s16.
        set: settings as key=value; those whose value is a list in brackets are swept.
        data: the dataset directory, absolute, or a list of PATH=WEIGHT; by default the one given to `vit up --data`.
        profile: where to train: one run after the other on this machine, as an array on a cluster.
    """
    report, home = reporter(), home_directory()
    with own_state(home, single=False) as watch:
        try:
            prepared = prepared_sweep(recipe, data=data, profile=profile, overrides=set, home=home)
            code, message = carry_out(
                prepared, report, lambda run, told: controlled(run, home, told, introduced=True)
            )  # fmt: skip
        except InputError as error:
            return settled(watch, refused(error))
        ended = Completed if code == EXIT_DONE else Cancelled if watch.cancelled.is_set() else Failed
        return settled(watch, ended(message=message, data=str(prepared.directory)))
