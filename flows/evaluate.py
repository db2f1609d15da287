"""The evaluation flow: `prefect deployment run evaluate/model --param model=models:/NAME@champion --param data=DIR`."""

from prefect import flow
from prefect.states import State

from flows.evaluating import carry_out, count_test_reads
from flows.home import home_directory
from flows.orchestration.own_state import own_state
from flows.orchestration.reporting import concluded, controlled, refused, reporter, settled, state_of, stop_job
from flows.requests.evaluation import model_name, requested_evaluation
from pipeline.errors import InputError
from pipeline.run_directory import RunDirectory


@flow(name="evaluate", on_cancellation=[stop_job])
def evaluate(
    model: str,
    data: str | None = None,
    protocols: list[str] = [],
    suite: str | None = None,
    profile: str = "local",
    set: list[str] = [],
    run_dir: str | None = None,
) -> State:
    """Score a model on a labelled dataset, or on those of a suite, under named protocols.

    Args:
        model: a run or checkpoint directory, or models:/NAME@ALIAS.
        data: the dataset directory, absolute; by default the one given to `vit up --data`.
        protocols: what to measure, for example linear-cached-v1; by default all that the model allows.
        suite: a file of datasets and protocols, absolute, instead of data and protocols.
        profile: where to run.
        set: settings of the evaluation or the profile, as key=value.
        run_dir: the run directory; by default a new one in the home.
    """
    report, home = reporter(), home_directory()
    try:
        evaluation = requested_evaluation(
            {model_name(model): model}, data=data, protocols=protocols, suite=suite, profile=profile, overrides=set,
            run_dir=run_dir, home=home,
        )  # fmt: skip
    except InputError as error:
        return refused(error)
    if not evaluation.trainings:
        state = concluded(lambda _: evaluation.write())
        if state.is_completed():
            count_test_reads(RunDirectory(state.data), home, report)
        return state
    with own_state(home, single=False) as watch:
        try:
            conclusion = carry_out(evaluation, report, lambda run, told: controlled(run, home, told))
        except InputError as error:
            return settled(watch, refused(error))
        report(conclusion.message)
        return settled(watch, state_of(conclusion))
