"""`vit lifecycle` and `vit quickstart`: the lifecycle flow in this process, on a server of its own where none is."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.home import home_directory
from flows.requests.lifecycle import LifecycleRequest, require_valid
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from pipeline.ingestion.making import IngestError
from pipeline.ingestion.opening import source_name
from pipeline.run_directory import write_json
from pipeline.words import duration_in_words

Say = Callable[..., None]


def lifecycle_command(source: str, directory: str | None, say: Say, **named: Any) -> int:
    home = home_directory(directory)
    named["source"] = source_name(source)
    require_valid(LifecycleRequest(**named), home)  # before a server is started

    def work() -> int:
        from flows.lifecycle import lifecycle_here

        summary = lifecycle_here(home, say, **named)
        for stage, seconds, result in summary["stages"]:
            say(f"{stage:<12} {duration_in_words(seconds):>12}  {result}")
        say(f"registered: {summary['uri']}")
        say(f"load it: mlflow.set_tracking_uri({summary['tracking_uri']!r}); "
            f"mlflow.pyfunc.load_model({summary['uri']!r})")  # fmt: skip
        say(f"what was made of what: vit explain {summary['uri']}")
        if summary["report"]:
            say(f"report, to open in a browser: {summary['report']}")
        return EXIT_DONE

    return _on_a_server(work, home, say)


def quickstart_command(directory: str | None, say: Say) -> int:
    home, started = home_directory(directory), time.monotonic()

    def work() -> int:
        from flows.quickstart import quickstart

        write_json(home / "quickstart.json", quickstart(home, say, started))
        return EXIT_DONE

    return _on_a_server(work, home, say)


def _on_a_server(work: Callable[[], int], home: Path, say: Say) -> int:
    """The exit code of `work`, or of the stage that it failed at. Prefect is imported within alone."""
    from flows.services.temporary_server import prefect_server

    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    with prefect_server(home, say):
        from flows.lifecycle import StageFailed

        try:
            return work()
        except StageFailed as error:
            stopped = error.code == EXIT_STOPPED
            say(f"{error}{'; the same command goes on' if stopped else ''}", error=not stopped)
            return error.code
        except IngestError as error:
            say(str(error), error=True)
            return EXIT_FAILED
