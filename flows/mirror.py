"""Reporting a run started from the command line to Prefect, where an API answers; without one, nothing is imported."""

import contextlib
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path

from flows.home import read_stack
from flows.jobs import Conclusion
from pipeline.errors import EXIT_DONE
from pipeline.run_directory import RunDirectory


def api_that_answers(home: Path) -> str | None:
    """PREFECT_API_URL, else the API of this home's stack; None where it does not answer within a second."""
    url = os.environ.get("PREFECT_API_URL") or (read_stack(home) or {}).get("prefect_api_url")
    if not url:
        return None
    with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(f"{url}/health", timeout=1):
        return url
    return None


def mirrored(run: RunDirectory, home: Path, work: Callable[[], Conclusion]) -> Conclusion:
    """Do `work` as a flow run named after the run directory; its state says how the run ended."""
    url = api_that_answers(home)
    if url is None:
        return work()
    os.environ["PREFECT_API_URL"] = url
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    from prefect import flow
    from prefect.states import Completed, Failed

    conclusions: list[Conclusion] = []

    @flow(name=f"vit {run.plan()['stage']}", flow_run_name=run.path.name, validate_parameters=False)
    def command_line_run():
        conclusion = work()
        conclusions.append(conclusion)
        state = Completed if conclusion.code == EXIT_DONE else Failed
        return state(message=conclusion.message)

    state = command_line_run(return_state=True)
    if not conclusions:  # the work itself raised: show its own error
        state.result()
    return conclusions[0]
