"""The ladder flow: `prefect deployment run ladder/recipe`."""

from prefect import flow
from prefect.states import Cancelled, Completed, Failed, State

from flows.grids.laddering import carry_out, planned_ladder
from flows.home import home_directory
from flows.orchestration.own_state import own_state
from flows.orchestration.reporting import controlled, refused, reporter, settled, stop_job
from pipeline.errors import EXIT_DONE, InputError


@flow(name="ladder", flow_run_name="ladder-{recipe}", on_cancellation=[stop_job])
def ladder(
    recipe: str,
    set: list[str] = [],
    data: str | list[str] | None = None,
    profile: str = "local",
) -> State:
    """Train small encoders on slices of the data, and forecast what the recipe's own run will score, take and cost.

    Args:
        recipe: the full run's, for example pretrain_mae_vit_l16.
        set: settings as key=value, of the recipe, the profile, and the ladder: ladder.sizes, ladder.fractions,
            ladder.budget_hours.
        data: the dataset directory, absolute, or a list of PATH=WEIGHT; by default the one given to `vit up --data`.
        profile: where to train: one rung after the other on this machine, as an array on a cluster.
    """
    report, home = reporter(), home_directory()
    with own_state(home, single=False) as watch:
        try:
            plan = planned_ladder(recipe, data=data, profile=profile, overrides=set, home=home)
            code, message = carry_out(
                plan, report, lambda run, told: controlled(run, home, told, introduced=True)
            )  # fmt: skip
        except InputError as error:
            return settled(watch, refused(error))
        ended = Completed if code == EXIT_DONE else Cancelled if watch.cancelled.is_set() else Failed
        return settled(watch, ended(message=message, data=str(plan.directory)))
