"""Images/s per core from files to augmented uint8 batches at 224 px, against the limits and against every peer.

Inception crop (bicubic) and flip, one thread, no worker processes, batches of 64; CPU time per image of processes that
stay, told in turn to make some images, in an order that moves on by one each round. Ratios are paired by round. On
photographs of ImageNet's size, and on Caltech-101 (limits alone) where VIT_TEST_DATA has it.

Limits: `raw decode` only decodes the same bytes, `bare loop` also crops, resizes and flips at the same boxes, both from
memory. Peers read what they write of the same files and run as their documentation shows, through Pillow: timm gives
uint8 as we do, the others normalised float32. litdata has a second row, as its own ImageNet script runs it, where
torchvision decodes to tensors: a transform that any loader could use, so it is shown, and stands beside the goal.
FFCV and DALI have no row: the one needs a compiler and OpenCV, the other a GPU to shine.
About 8 minutes, and the environments of three peers on the first run:

    uv run python -m tests.benchmarks.loader
"""

import importlib
import io
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks.contestant import Contestant, ContestantError, Round
from tests.benchmarks.environments import interpreter
from tests.benchmarks.our_loader import View, drawn_views, our_batches, our_config, our_dataset
from tests.benchmarks.photographs import caltech_files, photograph_files
from tests.benchmarks.report import Figure, Goal, main, table, verdict

LIMITS = {
    "raw decode": "limits.raw_decode",
    "bare loop": "limits.bare_loop",
    "ours": "ours",
    "ours, region decode": "ours_region",
}
NEEDED = ("raw decode", "bare loop", "ours")  # without them there is nothing to compare
PEERS = {
    "timm": "peers.timm_loader",
    "ImageFolder": "peers.image_folder",
    "webdataset": "peers.web_dataset",
    "Hugging Face datasets": "peers.hugging_face",
    "MosaicML streaming": "peers.mosaic_streaming",
    "litdata": "peers.lit_data",
}
BESIDE_THE_GOAL = {"litdata, tensors": "peers.lit_data_tensors"}
BATCH_SIZE, IMAGE_SIZE = 64, 224
PSNR_IMAGES = 256
PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "timm", "webdataset")

Rounds = dict[str, list[Round]]


def loader(
    rounds: int = 7, files: int = 3000, distinct: int = 300, images_per_round: int = 1472
) -> tuple[str, dict[str, Any]]:
    """The table and the verdict; `files` images of which `distinct` differ."""
    photographs = photograph_files(distinct, files)
    measured, missing = measure(photographs, LIMITS | PEERS | BESIDE_THE_GOAL, rounds, images_per_round)
    tables = [loader_table("Photographs of 0.19 megapixels", measured, missing)]
    goals = limit_goals("photographs", measured, decode=True) | psnr_goal("photographs", photographs)
    best = min((peer for peer in PEERS if peer in measured), key=lambda peer: cpu(measured, peer).median, default=None)
    ahead = ratio(measured, best).median if best else 0.0
    goals["photographs, best peer"] = Goal(ahead, 1.85)
    if caltech := caltech_files(files):
        measured_there, missing_there = measure(caltech, LIMITS, rounds, images_per_round)
        tables.append(loader_table("Caltech-101", measured_there, missing_there))
        goals |= limit_goals("Caltech-101", measured_there, decode=False) | psnr_goal("Caltech-101", caltech)
    else:
        tables.append("Caltech-101: not measured, VIT_TEST_DATA does not have it\n\n")
    lines = "\n".join(goal.line(name) for name, goal in goals.items())
    rows = {name: round(1 / cpu(measured, name).median, 1) for name in measured}
    beside = {name: round(ratio(measured, name).median, 3) for name in BESIDE_THE_GOAL if name in measured}
    result = verdict(
        "loader", goals, ratio=round(ahead, 3), best_peer=best, goal=1.85,
        beside_the_goal=beside, images_per_second=rows, missing=missing,
    )  # fmt: skip
    return "".join(tables) + lines, result


def measure(
    workspace: Path, modules: dict[str, str], rounds: int, images_per_round: int
) -> tuple[Rounds, dict[str, str]]:
    """What every contestant that runs took in every round, and why the others do not run."""
    our_dataset(workspace)
    num_images = len(list(workspace.glob("files/train/*/*"))) // BATCH_SIZE * BATCH_SIZE
    measured, missing = {}, {}
    with ExitStack() as stack:
        running = {}
        for name, module in modules.items():
            try:
                running[name] = stack.enter_context(started(f"tests.benchmarks.{module}", workspace, num_images))
            except ContestantError as error:
                missing[name] = str(error)
        for number in range(rounds):
            names = list(running)
            start = number % len(names)
            for name in names[start:] + names[:start]:
                try:
                    measured.setdefault(name, []).append(running[name].run(images_per_round))
                except ContestantError as error:
                    missing[name] = str(error)
                    running.pop(name)
                    measured.pop(name, None)
    if lost := [f"{name}: {missing[name]}" for name in NEEDED if name in missing]:
        raise ContestantError("; ".join(lost))
    return measured, missing


def started(module: str, workspace: Path, num_images: int) -> Contestant:
    """A contestant that has made its data and its first batch."""
    requirements = importlib.import_module(module).REQUIREMENTS
    contestant = Contestant(interpreter(requirements), module, workspace, BATCH_SIZE, IMAGE_SIZE, num_images)
    try:
        contestant.run(BATCH_SIZE)
    except ContestantError:
        contestant.close()
        raise
    return contestant


def cpu(measured: Rounds, name: str) -> Figure:
    """CPU seconds per image."""
    return Figure.of([one.cpu_seconds for one in measured[name]])


def ratio(measured: Rounds, other: str, ours: str = "ours") -> Figure:
    """Images/s of `ours` by those of `other`, paired by round."""
    pairs = zip(measured[other], measured[ours], strict=True)
    return Figure.of([theirs.cpu_seconds / own.cpu_seconds for theirs, own in pairs])


def limit_goals(images: str, measured: Rounds, decode: bool) -> dict[str, Goal]:
    goals = {f"{images}, bare loop": Goal(ratio(measured, "bare loop").median, 0.90)}
    if decode:
        goals[f"{images}, raw decode"] = Goal(ratio(measured, "raw decode").median, 0.60)
        if "ours, region decode" in measured:
            value = ratio(measured, "raw decode", "ours, region decode").median
            goals[f"{images}, raw decode with region decode"] = Goal(value, 0.70)
    return goals


def psnr_goal(images: str, workspace: Path) -> dict[str, Goal]:
    """PSNR of our views against Pillow's at the same boxes, over all pixels of the first images, decibels."""
    index = our_dataset(workspace)
    config = our_config(index, BATCH_SIZE, IMAGE_SIZE)
    squares, count = 0.0, 0
    views = iter(drawn_views(config, index, PSNR_IMAGES))
    for batch in our_batches(config, index, first_step=0, last_step=PSNR_IMAGES // BATCH_SIZE):
        for image in batch.images.numpy():
            squares += float(np.square(image - reference(next(views)).astype(np.float32)).sum())
            count += image.size
    decibels = 10 * math.log10(255**2 * count / squares) if squares else math.inf
    return {f"{images}, PSNR in dB": Goal(decibels, 50)}


def reference(view: View) -> np.ndarray:
    """(H, W, C) uint8: Pillow decodes the whole image, crops, and resizes by its bicubic filter."""
    image = Image.open(io.BytesIO(view.content)).convert("RGB").crop(view.box)
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else image)


def loader_table(title: str, measured: Rounds, missing: dict[str, str]) -> str:
    rows = []
    for name, costs in measured.items():
        milliseconds = Figure.of([1000 * cost.cpu_seconds for cost in costs])
        per_second = Figure.of([1 / cost.cpu_seconds for cost in costs])
        of_decode = ratio(measured, "raw decode", name)
        rows.append([name, milliseconds.text(3), per_second.text(0), of_decode.text(2), ratio(measured, name).text(2)])
    columns = ["loader", "ms CPU per image", "images/s per core", "of raw decode", "ours is faster by"]
    reasons = [f"{name}: not measured: {reason}" for name, reason in missing.items()]
    return table(title, columns, rows) + "".join(f"{reason}\n" for reason in [*reasons, ""] if reasons)


if __name__ == "__main__":
    main(loader, "loader", PACKAGES)
