"""Where benchmarks keep what one run makes for the next: images, the peers' formats of them, the peers' environments.

A workspace is a directory with the images of one benchmark as class folders, `files/train/CLASS/NAME.jpg`, and with
whatever the contestants make of them. This module imports nothing that a peer's environment may lack.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

SAMPLES_PER_SHARD = 1000  # of what the benchmark of ingestion writes


def kept_directory() -> Path:
    """Where the images, the peers' formats and their environments stay from one run to the next."""
    directory = Path(tempfile.gettempdir()) / f"vit-benchmarks-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def made_once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by `make` under another name and renamed, unless an earlier run made it."""
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(partial)
        partial.rename(path)
    return path


def image_paths(workspace: Path) -> list[tuple[Path, int]]:
    """(file, label) of every image of a workspace, labels by the sorted names of the folders."""
    folders = sorted((workspace / "files" / "train").iterdir())
    return [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]


def written(workspace: Path, name: str) -> Iterator[Path]:
    """One directory after the other that is not there yet, in a folder that is: what a contestant writes."""
    (workspace / "written").mkdir(exist_ok=True)
    return (workspace / "written" / f"{name}-{number}" for number in count())


def remove_written(workspace: Path) -> None:
    shutil.rmtree(workspace / "written", ignore_errors=True)
    (workspace / "written").mkdir()
