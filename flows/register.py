"""The registration flow: `prefect deployment run register/model --param model=RUN --param name=NAME`."""

from prefect import flow
from prefect.states import State

from flows.orchestration.reporting import concluded, stop_job
from flows.requests.registration import registration_run


@flow(name="register", flow_run_name="register-{name}", on_cancellation=[stop_job])
def register(model: str, name: str, set: list[str] = []) -> State:
    """Register a trained run or checkpoint in MLflow.

    Args:
        model: a run or checkpoint directory.
        name: the registered model's name.
        set: settings of the registration, as key=value, for example licence=Apache-2.0.
    """
    return concluded(lambda home: registration_run(model, name, home=home, overrides=set))
