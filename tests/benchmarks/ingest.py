"""Images/s per CPU second from image files to a checked dataset, against `tar cf` and against every peer's writer.

Each contestant reads the same files and writes them into a new directory, one process that stays and one thread, in an
order that moves on by one each round; CPU time of the process and of the programs it runs. Ratios are paired by round.
On photographs of ImageNet's size, and on Caltech-101 where VIT_TEST_DATA has it.

`ours` is a whole ingestion at `examine: header`: it lists and numbers the classes, reads size, format, mode and
orientation from each header, hashes every sample and every shard (SHA-256, and CRC-32 for readers), writes shards,
tables and the index, each fsynced and renamed. Peers write the same files as their documentation shows, at their
defaults: without hashes and fsync; MDSWriter opens an image, save_to_disk embeds the files of its image folder.
Beside the goal: the two told to copy bytes without a look at them; our default, which also decodes every image, hashes
its pixels, exactly and perceptually, and looks for copies; and what of that is decoding. Half of a photograph's time is
two SHA-256, so a writer that only copies may be quicker. Of Caltech-101 (13 kB a file) the goal is the peers alone:
its files cost `tar` little more than opening them.
About 5 minutes, and the environments of two peers on the first run:

    uv run python -m tests.benchmarks.ingest
"""

import importlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.benchmarks.contestant import Contestant, ContestantError, Round
from tests.benchmarks.environments import interpreter
from tests.benchmarks.photographs import caltech_files, photograph_files
from tests.benchmarks.report import Figure, Goal, main, table, verdict
from tests.benchmarks.workspace import remove_written

LIMIT = "tar cf"
NEEDED = {LIMIT: "tar", "ours": "ours"}  # without them there is nothing to compare
PEERS = {
    "webdataset ShardWriter": "web_dataset",
    "MosaicML MDSWriter": "mosaic_streaming",
    "Hugging Face save_to_disk": "hugging_face",
}
BESIDE_THE_GOAL = {
    "MosaicML MDSWriter, bytes": "mosaic_bytes",
    "Hugging Face, table of paths": "hugging_face_paths",
    "ours, every pixel": "ours_pixels",
    "of which decoding": "decoding",
}
OF_TAR = 0.40
PACKAGES = ("pillow", "numpy", "webdataset")

Rounds = dict[str, list[Round]]


def ingest(rounds: int = 7, files: int = 3000, distinct: int = 300) -> tuple[str, dict[str, Any]]:
    """The table and the verdict; `files` images of which `distinct` differ."""
    workspaces = {"photographs": photograph_files(distinct, files), "Caltech-101": caltech_files(files)}
    tables, goals, rows, reasons = [], {}, {}, {}
    for images, workspace in workspaces.items():
        if workspace is None:
            tables.append(f"{images}: not measured, VIT_TEST_DATA does not have it\n\n")
            continue
        measured, missing = measure(workspace, NEEDED | PEERS | BESIDE_THE_GOAL, rounds)
        tables.append(ingest_table(images, measured, missing))
        goals |= goals_of(images, measured, of_tar=images == "photographs")
        rows[images] = {name: round(1 / cpu(measured, name).median, 1) for name in measured}
        reasons |= missing
    lines = "\n".join(goal.line(name) for name, goal in goals.items())
    result = verdict(
        "ingest", goals, ratio=round(goals["photographs, by tar cf"].value, 3),
        best_peer=best_peer(rows["photographs"]), goal=OF_TAR, images_per_cpu_second=rows, missing=reasons,
    )  # fmt: skip
    return "".join(tables) + lines, result


def measure(workspace: Path, modules: dict[str, str], rounds: int) -> tuple[Rounds, dict[str, str]]:
    """What every contestant that runs took in every round, and why the others do not run."""
    measured: Rounds = {}
    missing, running = {}, {}
    with ExitStack() as stack:
        for name, module in modules.items():
            path = f"tests.benchmarks.writers.{module}"
            try:
                python = interpreter(importlib.import_module(path).REQUIREMENTS)
                running[name] = stack.enter_context(Contestant(python, path, workspace, 0, 0, 0))
            except ContestantError as error:
                missing[name] = str(error)
        for number in range(-1, rounds):  # the first is to be warm
            names = list(running)
            start = number % len(names)
            for name in names[start:] + names[:start]:
                remove_written(workspace)
                try:
                    cost = running[name].run(1)
                except ContestantError as error:
                    missing[name] = str(error)
                    running.pop(name)
                    measured.pop(name, None)
                    continue
                if number >= 0:
                    measured.setdefault(name, []).append(cost)
        remove_written(workspace)
    if lost := [f"{name}: {missing[name]}" for name in NEEDED if name in missing]:
        raise ContestantError("; ".join(lost))
    return measured, missing


def goals_of(images: str, measured: Rounds, of_tar: bool) -> dict[str, Goal]:
    goals = {f"{images}, by {LIMIT}": Goal(ratio(measured, LIMIT).median, OF_TAR)} if of_tar else {}
    return goals | {f"{images}, by {name}": Goal(ratio(measured, name).median, 1) for name in PEERS if name in measured}


def best_peer(images_per_second: dict[str, float]) -> str | None:
    return max((name for name in PEERS if name in images_per_second), key=images_per_second.__getitem__, default=None)


def cpu(measured: Rounds, name: str) -> Figure:
    """CPU seconds per image."""
    return Figure.of([one.cpu_seconds for one in measured[name]])


def ratio(measured: Rounds, other: str, ours: str = "ours") -> Figure:
    """Images per CPU second of `ours` by those of `other`, paired by round."""
    pairs = zip(measured[other], measured[ours], strict=True)
    return Figure.of([theirs.cpu_seconds / own.cpu_seconds for theirs, own in pairs])


def ingest_table(title: str, measured: Rounds, missing: dict[str, str]) -> str:
    rows = []
    for name, costs in measured.items():
        microseconds = Figure.of([1e6 * cost.cpu_seconds for cost in costs])
        wall = Figure.of([1e6 * cost.wall_seconds for cost in costs])
        of_tar = ratio(measured, LIMIT, name)
        rows.append([name, microseconds.text(0), wall.text(0), of_tar.text(2), ratio(measured, name).text(2)])
    columns = ["writer", "us CPU per image", "us on the clock", "of tar cf", "ours is faster by"]
    reasons = [f"{name}: not measured: {reason}" for name, reason in missing.items()]
    return table(title, columns, rows) + "".join(f"{reason}\n" for reason in [*reasons, ""] if reasons)


if __name__ == "__main__":
    main(ingest, "ingest", PACKAGES)
