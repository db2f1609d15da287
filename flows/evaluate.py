"""The evaluation flow: `prefect deployment run evaluate/model --param model=models:/NAME@champion --param data=DIR`."""

from prefect import flow
from prefect.states import State

from flows.orchestration.reporting import concluded, stop_job
from flows.requests.evaluation import evaluation_run


@flow(name="evaluate", on_cancellation=[stop_job])
def evaluate(
    model: str,
    data: str | None = None,
    protocols: list[str] = [],
    profile: str = "local",
    set: list[str] = [],
    run_dir: str | None = None,
) -> State:
    """Score a model on a labelled dataset under named protocols.

    Args:
        model: a run or checkpoint directory, or models:/NAME@ALIAS.
        data: the dataset directory, absolute; by default the one given to `vit up --data`.
        protocols: what to measure, for example linear-cached-v1; by default all that the model allows.
        profile: where to run.
        set: settings of the evaluation or the profile, as key=value.
        run_dir: the run directory; by default a new one in the home.
    """
    return concluded(
        lambda home: evaluation_run(
            {"model": model}, data=data, protocols=protocols, profile=profile, overrides=set, run_dir=run_dir, home=home
        )
    )
