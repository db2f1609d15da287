"""Seconds to the first batch at 90 % of an epoch against 0 %, and an order over 100 million samples opened.

In one warm process a fresh stream is made again and again, in turn at both places and with 0 and 2 workers, each time
with another seed, so that no place has the easier images. Beside it, what `skip_first_batches` of accelerate costs
there over a folder of images and over webdataset, which has to read through. The keys, positions and pixels after
the seek are compared with an uninterrupted pass. The large order is an index.json of 10,000 shards, read back in a
fresh process: seconds to the positions' places of the first batch, and the greatest resident memory.
About 2 minutes:

    uv run python -m tests.benchmarks.resume
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.shards.index import DatasetIndex, read_index
from tests.benchmarks.contestant import ROOT
from tests.benchmarks.our_loader import our_batches, our_config, our_dataset, our_order
from tests.benchmarks.photographs import photograph_files
from tests.benchmarks.report import Figure, Goal, main, table, verdict
from tests.benchmarks.synthetic import synthetic_index

BATCH_SIZE, IMAGE_SIZE = 64, 224
LARGE_BATCH_SIZE = 4096
PLACE = 0.9  # of an epoch
GIB = 1 << 30

Start = Callable[[int, int], Iterator[Any]]  # (first step, number of the repeat) -> batches


def resume(
    repeats: int = 9, peer_repeats: int = 3, files: int = 3000, distinct: int = 300, shards: int = 10_000,
    samples_per_shard: int = 10_000,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    torch.set_num_threads(1)
    workspace = photograph_files(distinct, files)
    index = our_dataset(workspace)
    last_step = index.num_samples("train") // BATCH_SIZE
    far = int(PLACE * last_step)
    starts = {f"ours, {workers} workers": partial(our_start, index, last_step, workers) for workers in (0, 2)}
    peers = peer_starts(workspace)
    times = first_batch_seconds(starts, far, repeats) | first_batch_seconds(peers, far, peer_repeats)
    ratios = {name: Figure.of([b / a for a, b in zip(*pair, strict=True)]) for name, pair in times.items()}
    differences = differences_after_seek(index, far, last_step)
    opened = [open_in_fresh_process(shards, samples_per_shard) for _ in range(3)]
    figures = {key: Figure.of([one[key] for one in opened]) for key in opened[0]}
    goals = {f"{name}, first batch at 90 % by 0 %": Goal(ratios[name].median, 1.1, at_least=False) for name in starts}
    goals |= {
        "batches that differ after the seek": Goal(differences, 0, at_least=False),
        "large order, seconds to its first batch": Goal(figures["seconds"].greatest, 5.0, at_least=False),
        "large order, GiB of the whole process": Goal(figures["peak_bytes"].greatest / GIB, 1.0, at_least=False),
    }
    rows = [
        [name, Figure.of(times[name][0]).text(3), Figure.of(times[name][1]).text(3), ratios[name].text(2)]
        for name in times
    ]
    text = table("Seconds to the first batch", ["loader", "at 0 %", "at 90 %", "ratio"], rows)
    text += large_order_text(shards * samples_per_shard, shards, figures)
    text += "\n".join(goal.line(name) for name, goal in goals.items())
    best = min(peers, key=lambda name: ratios[name].median)
    worst = max(ratios[name].median for name in starts)
    result = verdict(
        "resume", goals, ratio=round(worst, 3), best_peer=best, goal=1.1,
        ratios={name: round(figure.median, 3) for name, figure in ratios.items()},
    )  # fmt: skip
    return text, result


def our_start(index: DatasetIndex, last_step: int, workers: int, first_step: int, repeat: int) -> Iterator[Any]:
    config = our_config(index, BATCH_SIZE, IMAGE_SIZE).model_copy(update={"seed": repeat})
    return our_batches(config, index, first_step=first_step, last_step=last_step, workers=workers)


def peer_starts(workspace: Path) -> dict[str, Start]:
    """Peers that go on by `skip_first_batches`: over a map of files, where it skips indices, and over a stream."""
    import webdataset as wds
    from accelerate import skip_first_batches
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    from tests.benchmarks.peers.transforms import training_transform

    transform = training_transform(IMAGE_SIZE)

    def folder(first_step: int, repeat: int) -> Iterator[Any]:
        dataset = ImageFolder(workspace / "files" / "train", transform)
        shuffle = torch.Generator().manual_seed(repeat)
        return iter(skip_first_batches(DataLoader(dataset, BATCH_SIZE, shuffle=True, generator=shuffle), first_step))

    def stream(first_step: int, repeat: int) -> Iterator[Any]:
        shards = sorted(map(str, (workspace / "shards").glob("train-*.tar")))
        dataset = wds.WebDataset(shards, shardshuffle=100, seed=repeat).shuffle(1000, seed=repeat).decode("pil")
        dataset = dataset.to_tuple("jpg").map_tuple(transform)
        return iter(skip_first_batches(DataLoader(dataset, BATCH_SIZE), first_step))

    return {"accelerate, ImageFolder": folder, "accelerate, webdataset": stream}


def first_batch_seconds(starts: dict[str, Start], far: int, repeats: int) -> dict[str, tuple[list[float], list[float]]]:
    """For each start the seconds at step 0 and at step `far`, one pair a repeat, after one that is not counted."""
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in starts}
    for repeat in range(repeats + 1):
        for name, start in starts.items():
            for place in (0, 1) if repeat % 2 else (1, 0):
                began = time.perf_counter()
                batches = start(far * place, repeat)
                next(batches)
                if repeat:
                    seconds[name][place].append(time.perf_counter() - began)
                del batches
    return seconds


def differences_after_seek(index: DatasetIndex, far: int, last_step: int) -> int:
    """How many of the batches after a seek are not those of an uninterrupted pass, at 0 and 2 workers."""
    whole = [as_told(batch) for batch in our_start(index, last_step, 0, 0, 0)]
    differences = 0
    for workers in (0, 2):
        resumed = [as_told(batch) for batch in our_start(index, last_step, workers, far, 0)]
        differences += abs(len(whole) - far - len(resumed))
        differences += sum(a != b for a, b in zip(whole[far:], resumed, strict=False))
    return differences


def as_told(batch: Any) -> tuple[list[str], bytes, bytes]:
    """Keys, positions and pixels of a batch."""
    return list(batch.keys), batch.positions.numpy().tobytes(), batch.images.numpy().tobytes()


def open_in_fresh_process(shards: int, samples_per_shard: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        synthetic_index(Path(directory), shards, samples_per_shard)
        code = f"from tests.benchmarks.resume import open_order; open_order({directory!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def open_order(directory: str) -> None:
    """Print what the first batch, and one at 90 % of the epoch, of the dataset in `directory` take, as JSON."""
    before, began = peak_bytes(), time.perf_counter()
    index = read_index(directory)
    order = our_order(our_config(index, LARGE_BATCH_SIZE, IMAGE_SIZE), index)
    order.locate_many(np.arange(LARGE_BATCH_SIZE))
    seconds, began = time.perf_counter() - began, time.perf_counter()
    order.locate_many(int(PLACE * order.num_samples) + np.arange(LARGE_BATCH_SIZE))
    later = time.perf_counter() - began
    sys.stdout.write(
        json.dumps({"seconds": seconds, "later": later, "imports_bytes": before, "peak_bytes": peak_bytes()})
    )


def peak_bytes() -> int:
    """The greatest resident memory of this process; getrusage would begin with that of the process it came from."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line; this benchmark needs Linux")


def large_order_text(samples: int, shards: int, figures: dict[str, Figure]) -> str:
    mebibytes = {key: Figure.of([value / 2**20 for value in figures[key]]) for key in ("imports_bytes", "peak_bytes")}
    return (
        f"An order over {samples:,} samples in {shards:,} shards, batches of {LARGE_BATCH_SIZE:,}: "
        f"index read and first batch located in {figures['seconds'].text(2)} s,\n"
        f"then one at 90 % of the epoch in {figures['later'].text(3)} s; "
        f"resident {mebibytes['peak_bytes'].text(0)} MiB, of which imports {mebibytes['imports_bytes'].text(0)} MiB\n\n"
    )


if __name__ == "__main__":
    main(resume, "resume", ("torch", "torchvision", "accelerate", "webdataset"))
