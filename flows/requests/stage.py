"""A stage that is no training, as a run on disk."""

from pathlib import Path

from cluster.profile import Profile
from flows.profiles import profile_text
from pipeline.preparation.training import PreparedRun
from pipeline.preparation.write import write_run
from pipeline.run_directory import RunDirectory


def write_stage(config, plan: dict, name: str, run_dir: str | None, home: Path, profile: Profile) -> RunDirectory:
    prepared = PreparedRun(name, config, plan)
    return write_run(prepared, _fresh_path(prepared, home, run_dir), profile_text(profile))


def _fresh_path(prepared: PreparedRun, home: Path, run_dir: str | None) -> Path:
    """A stage that measures or publishes is done anew each time: the first free number behind its name."""
    if run_dir is not None:
        return Path(run_dir).absolute()
    folder, number = home / "runs", 1
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        path = folder / f"{prepared.name}-{number:03d}"
        try:
            path.mkdir()  # taken at once, so that two commands never share one
            return path
        except FileExistsError:
            number += 1
