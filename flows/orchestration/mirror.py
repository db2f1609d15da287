"""Reporting a run started from the command line to Prefect, where an API answers; without one, nothing is imported."""

import contextlib
import os
import signal
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.control.following import Observation, ignore
from flows.control.jobs import Conclusion
from flows.home import read_stack, team_servers
from flows.services.servers import prefect_refusal
from pipeline.run_directory import RunDirectory

Work = Callable[[Callable[[Observation], None]], Conclusion]


def api_that_answers(home: Path) -> str | None:
    """PREFECT_API_URL, else the API of this home's stack or team; None where it does not answer within a second."""
    told = (read_stack(home) or {}).get("prefect_api_url") or team_servers(home).get("prefect_api_url")
    url = os.environ.get("PREFECT_API_URL") or told
    if not url:
        return None
    with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(f"{url}/health", timeout=1):
        return url
    return None


def use_api(url: str) -> None:
    """Have Prefect talk to this API, quietly; before it is imported."""
    os.environ["PREFECT_API_URL"] = url
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")


def mirrored(
    run: RunDirectory,
    home: Path,
    work: Work,
    cancelled: threading.Event,
    say: Callable[[str], None] = lambda line: None,
) -> Conclusion:
    """Do `work` as a flow run named after the run directory; its state says how the run ended.

    `cancelled` is set when the flow run is cancelled in Prefect. `work` takes what observes the run. A Prefect that
    fails, or goes away meanwhile, changes nothing of the work.
    """
    url = api_that_answers(home)
    if url is None:
        return work(ignore)
    if reason := prefect_refusal(url):
        say(f"this run is not shown in Prefect: {url} {reason}")
        return work(ignore)
    use_api(url)
    conclusions: list[Conclusion] = []
    raised: list[BaseException] = []

    def once(observe: Callable[[Observation], None]) -> Conclusion:
        try:
            conclusions.append(work(observe))
        except BaseException as error:
            raised.append(error)
            raise
        return conclusions[0]

    try:
        _as_flow_run(run, home, once, cancelled)
    except Exception:  # of Prefect, whatever it is; the work's own comes below
        pass
    if raised:
        raise raised[0]
    return conclusions[0] if conclusions else work(ignore)


def _as_flow_run(run: RunDirectory, home: Path, work: Work, cancelled: threading.Event) -> None:
    from prefect import flow
    from prefect.states import Cancelled, State

    from flows.orchestration.artifacts import run_artifacts
    from flows.orchestration.events import announce_registration
    from flows.orchestration.own_state import own_state
    from flows.orchestration.reporting import state_of

    stops_in_order: Any = signal.getsignal(signal.SIGTERM)  # Prefect puts its own in the place of it

    @flow(name=f"vit {run.plan()['stage']}", flow_run_name=run.path.name, validate_parameters=False)
    def command_line_run() -> State:
        with (
            own_state(home, single=True, cancelled=cancelled, on_sigterm=stops_in_order) as watch,
            run_artifacts(run, home, watch.flow_run_id) as artifacts,
        ):
            watch.note.add(run)
            conclusion = work(artifacts.observe)
            if not conclusion.left:
                announce_registration(conclusion.result)
                artifacts.finish(conclusion)
        watch.note.remove()
        if conclusion.left:
            return Cancelled(name="Detached", message=f"{conclusion.message}; nobody watches it here any more")
        return state_of(conclusion)

    command_line_run(return_state=True)
