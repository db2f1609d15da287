"""The reconciliation flow: `prefect deployment run reconcile/home`, and every ten minutes by itself."""

from prefect import flow, get_run_logger
from prefect.states import Completed, Failed, State

from flows.home import home_directory
from flows.orchestration.reconciliation import reconcile_home


@flow(name="reconcile")
def reconcile() -> State:
    """Repair what disagrees between Prefect, MLflow, the cluster and the run directories of this home."""
    logger, lines = get_run_logger(), list[str]()

    def say(line: str) -> None:
        lines.append(line)
        logger.info(line)

    code = reconcile_home(home_directory(), say)
    message = f"{len(lines)} things were repaired or named" if lines else "nothing to repair"
    return Failed(message=lines[-1]) if code else Completed(message=message)
