"""The automation that finds flow runs whose process is gone: Prefect itself lets them read Running for ever.

A flow's engine says every 30 s that it lives (PREFECT_FLOWS_HEARTBEAT_FREQUENCY, which the worker of `vit up` sets).
Where that falls silent for `SILENT` and no end was told, the server writes Crashed; a flow that lives after all takes
it back (own_state), and a crashed flow whose job lives is taken up again by `vit reconcile`. `vit up` makes it.
"""

from datetime import timedelta

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture, ResourceSpecification

NAME = "vit: flow runs that fell silent"
HEARTBEAT = "prefect.flow-run.heartbeat"
SILENT = timedelta(seconds=90)
ENDED = ("Completed", "Failed", "Crashed", "Cancelled", "Cancelling", "Paused", "Suspended", "Late", "AwaitingRetry")
FLOWS = (
    "ingest",
    "pretrain",
    "finetune",
    "evaluate",
    "register",
    "lifecycle",
    "sweep",
    "ladder",
    "study",
    "reconcile",
    "vit *",
)


def silent_flow_runs() -> AutomationCore:
    """A flow run of ours with a heartbeat, and then for `SILENT` neither another nor a state that ends it."""
    trigger = EventTrigger(
        posture=Posture.Proactive,
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        match_related=ResourceSpecification(
            {"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)}
        ),
        for_each={"prefect.resource.id"},
        after={HEARTBEAT},
        expect={HEARTBEAT, *(f"prefect.flow-run.{state}" for state in ENDED)},
        threshold=1,
        within=SILENT,
    )  # fmt: skip
    crash = ChangeFlowRunState(
        state=StateType.CRASHED,
        message=f"not heard of for {SILENT.seconds} s: its process is gone or cut off. Its job may well live on: "
        "`vit runs` says so, and `vit reconcile` takes it up again",
    )
    return AutomationCore(
        name=NAME,
        description="Made by `vit up`; see flows/services/automations.py.",
        trigger=trigger,
        actions=[crash],
    )


async def make_automation(client: PrefectClient) -> None:
    """Create the automation, or bring the one of its name up to date; done twice it is as done once."""
    wanted = silent_flow_runs()
    existing = await client.read_automations_by_name(NAME)
    if not existing:
        await client.create_automation(wanted)
    elif existing[0].model_dump(include=set(type(wanted).model_fields)) != wanted.model_dump():
        await client.update_automation(existing[0].id, wanted)
