"""`report.html` of trainings, written by whoever follows them to their end, and never at its cost."""

from collections.abc import Callable
from pathlib import Path

from pipeline.config.stages import SequenceConfig, read_run_config
from pipeline.report.run_report import TRAININGS, write_run_report
from pipeline.run_directory import RunDirectory


def write_run_reports(run: RunDirectory, report: Callable[[str], None]) -> list[Path]:
    """Of a training, or of each training of a sequence; other stages have none. What went wrong is said in one line."""
    written = []
    try:
        for one in _trainings_of(run):
            written.append(write_run_report(one))
    except Exception as error:  # whatever a damaged file or a full disk makes of it
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        report(f"{run.path.name}: its report.html was not written: {first[:200]}")
    return written


def _trainings_of(run: RunDirectory) -> list[RunDirectory]:
    stage = run.plan()["stage"]
    if stage in TRAININGS:
        return [run]
    config = read_run_config(run.path) if stage == "sequence" else None
    return [RunDirectory(path) for path in config.runs] if isinstance(config, SequenceConfig) else []
