"""`report.html` of trainings, written by whoever follows them to their end, and never at its cost."""

from collections.abc import Callable
from pathlib import Path

from pipeline.config.stages import SequenceConfig, read_run_config
from pipeline.redaction import first_line
from pipeline.report.run_report import TRAININGS, write_run_report
from pipeline.run_directory import RunDirectory, read_json


def write_run_reports(run: RunDirectory, report: Callable[[str], None]) -> list[Path]:
    """Of a training, of each training of a sequence, and again of those that an evaluation has graded; other stages
    have none. What went wrong is said in one line."""
    written = []
    try:
        for one in _trainings_of(run):
            written.append(write_run_report(one))
    except Exception as error:  # whatever a damaged file or a full disk makes of it
        report(f"{run.path.name}: its report.html was not written: {first_line(error)}")
    return written


def _trainings_of(run: RunDirectory) -> list[RunDirectory]:
    stage = run.plan()["stage"]
    if stage in TRAININGS:
        return [run]
    if stage == "evaluate":
        named = (source["lineage"].get("run") for source in run.plan()["sources"].values())
        return [one for path in dict.fromkeys(named) if path and _is_graded(one := RunDirectory(path))]
    config = read_run_config(run.path) if stage == "sequence" else None
    return [RunDirectory(path) for path in config.runs] if isinstance(config, SequenceConfig) else []


def _is_graded(run: RunDirectory) -> bool:
    """Whether an evaluation may have said what a forecast of it came to, since its report was written."""
    return run.config_file.is_file() and bool((read_json(run.result_file) or {}).get("forecast"))
