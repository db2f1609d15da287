"""What Prefect is told of a run's health: the newest verdicts on the flow run's page, and a call for help.

`health.policy: escalate` asks for the call, after `health.patience` bad measurements in a row: the event `vit.health`,
for automations to follow, and the message of the flow run's state. The run goes on. Told once for each such row.
"""

import contextlib
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events import emit_event
from prefect.states import Running

from pipeline.config.health import HealthConfig
from pipeline.config.stages import read_run_config
from pipeline.health.log import FILE, bad_in_a_row, read_verdicts
from pipeline.health.verdicts import Verdict, bad_in_words
from pipeline.run_directory import RunDirectory, read_json, write_json

EVENT = "vit.health"


class HealthWatch:
    """Reads a run's verdicts when there are new ones. Not thread-safe: one thread looks."""

    def __init__(self, run: RunDirectory):
        self.run = run
        self._size = self._seen = 0  # bytes of all verdicts
        config = getattr(read_run_config(run.path), "health", None)
        self.config: HealthConfig = config or HealthConfig(every_steps=0)
        self.file = run.path / "escalated.json"
        self._escalated_at = self._told_before()  # step of the newest measurement that was

    def fresh(self) -> list[list[Verdict]]:
        """All measurements of the run, where there are some that were not `shown`; else []."""
        self._seen = sum(path.stat().st_size for path in self.run.attempts.glob(f"*/{FILE}"))
        return read_verdicts(self.run) if self._seen != self._size else []

    def shown(self) -> None:
        """What was read last was told to whom it may concern."""
        self._size = self._seen

    def call_for_help(self, measurements: list[list[Verdict]]) -> str | None:
        """What is wrong, where that is to be escalated and was not yet `called`; None otherwise."""
        count = bad_in_a_row(measurements)
        if self.config.policy != "escalate" or count < self.config.patience:
            return None
        first, newest = measurements[-count][0].step, measurements[-1][0].step
        if first <= self._escalated_at <= newest:  # behind the newest lies what a run that was resumed does anew
            return None
        return f"health was bad {count} times in a row: {bad_in_words(measurements[-1])}"

    def called(self, measurements: list[list[Verdict]]) -> None:
        """Help was called for; not again before a good measurement has come between, by another controller either."""
        self._escalated_at = measurements[-1][0].step
        with contextlib.suppress(OSError):  # then another controller calls again
            write_json(self.file, {"format_version": 1, "step": self._escalated_at})

    def _told_before(self) -> int:
        try:
            return int(read_json(self.file)["step"])
        except (ValueError, TypeError, KeyError):  # no such file, or a damaged one
            return -1


def emit_call(run: RunDirectory, flow_run_id: UUID, words: str, newest: list[Verdict]) -> None:
    related = [{"prefect.resource.id": f"prefect.flow-run.{flow_run_id}", "prefect.resource.role": "flow-run"}]
    emit_event(
        EVENT, resource={"prefect.resource.id": f"vit.run.{run.key}", "prefect.resource.name": run.path.name},
        related=related, payload={"words": words, "run": str(run.path), "verdicts": [one.as_line() for one in newest]},
    )  # fmt: skip


def say_in_state(client: SyncPrefectClient, flow_run_id: UUID, words: str) -> None:
    """As the message of the flow run's state, if it is running: one that is being cancelled stays so."""
    state = client.read_flow_run(flow_run_id).state
    if state is not None and state.type == StateType.RUNNING:
        client.set_flow_run_state(flow_run_id, Running(message=words), force=True)


def health_table(verdicts: list[Verdict]) -> str:
    """The newest measurement, in Markdown."""
    rows = [f"| {one.metric} | {one.said} | {one.basis or 'none'} |" for one in verdicts]
    head = f"Step {verdicts[0].step:,}, epoch {verdicts[0].epoch:.2f}"
    return "\n".join([head, "", "| metric | verdict | reference |", "|---|---|---|", *rows])
