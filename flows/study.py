"""The study flow: `prefect deployment run study/file --param file=/studies/mine.yaml`."""

from prefect import flow
from prefect.states import Cancelled, Completed, Failed, State

from flows.grids.studying import carry_out
from flows.home import home_directory
from flows.orchestration.own_state import own_state
from flows.orchestration.reporting import controlled, refused, reporter, settled, stop_job
from flows.requests.study import requested_study
from pipeline.errors import EXIT_DONE, InputError


@flow(name="study", flow_run_name="study-{file}", on_cancellation=[stop_job])
def study(file: str, set: list[str] = []) -> State:
    """Pretrain a grid of networks on shares of a dataset, score each, and compare them in one table and one plot.

    Args:
        file: the study's file, absolute, or the name of a shipped one.
        set: keys of the file as key=value, for example data=/data/birds.
    """
    report, home = reporter(), home_directory()
    with own_state(home, single=False) as watch:
        try:
            asked = requested_study(file, overrides=set, home=home)
            code, message = carry_out(
                asked, report, lambda run, told: controlled(run, home, told, introduced=True)
            )  # fmt: skip
        except InputError as error:
            return settled(watch, refused(error))
        ended = Completed if code == EXIT_DONE else Cancelled if watch.cancelled.is_set() else Failed
        return settled(watch, ended(message=message, data=str(asked.directory)))
