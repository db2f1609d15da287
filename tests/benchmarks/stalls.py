"""What reading costs beside bytes: opens and stats, bytes per node, and waiting behind a slow reader.

Opens, stats and reads are those of one process that loads 10,000 samples without workers: `open` by Python's audit
hook, for paths of the dataset; `stat` by wrapping os.stat, os.lstat and os.fstat, which pathlib calls too; reads and
bytes as the kernel counts them in /proc/self/io.
Bytes per node come from the order: which shards the ranks of a node touch in an epoch, each counted whole, as a cache
or a staging disk takes it. An order that shuffles over all shards makes every node touch every shard.
Behind a slow reader every os.pread sleeps, and a training step is a sleep of 1.5 times what the most workers need for
its batch, measured before, so they are enough by half.
About 2 minutes:

    uv run python -m tests.benchmarks.stalls
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from pipeline.shards.index import DatasetIndex, read_index
from tests.benchmarks.contestant import ROOT
from tests.benchmarks.our_loader import our_batches, our_config, our_dataset, our_order
from tests.benchmarks.photographs import photograph_files
from tests.benchmarks.report import Figure, Goal, main, table, verdict
from tests.benchmarks.synthetic import synthetic_index

BATCH_SIZE, IMAGE_SIZE = 50, 64
ORDER_BATCH_SIZE, RANKS_PER_NODE = 4096, 4
NODES = (1, 2, 4, 8, 16)
WORKERS = (0, 1, 2, 4)
SLOW_BATCH_SIZE, DELAY_SECONDS = 32, 0.010
ROOM = 1.5  # capacity of the most workers by what the training needs


def stalls(
    samples: int = 10_000, files: int = 3000, distinct: int = 300, shards: int = 1200, samples_per_shard: int = 1000,
    rounds: int = 3, steps: int = 12,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    torch.set_num_threads(1)
    workspace = photograph_files(distinct, files)
    index = our_dataset(workspace)
    counts = count_in_fresh_process(index.directory, samples)
    num_shards = len(index.shards("train"))
    shares = bytes_per_node(shards, samples_per_shard)
    waits = wait_shares(index, rounds, steps)
    goals = {
        "opens, by 2 per shard and 1 for the index": Goal(counts["open"], 2 * num_shards + 1, at_least=False),
        "stats, by 2 per shard and 2": Goal(counts["stat"], 2 * num_shards + 2, at_least=False),
        "read calls per sample": Goal(counts["reads"] / samples, 1.1, at_least=False),
        f"bytes per node at {NODES[-1]} nodes, by its share": Goal(shares[NODES[-1]], 1.2, at_least=False),
        f"share of time waiting with {WORKERS[-1]} workers": Goal(waits[WORKERS[-1]].median, 0.05, at_least=False),
    }
    rows = [
        ["opens of files of the dataset", f"{counts['open']:,.0f}", f"{counts['open'] * 10_000 / samples:,.1f}"],
        ["stats by Python code", f"{counts['stat']:,.0f}", f"{counts['stat'] * 10_000 / samples:,.1f}"],
        ["read calls (kernel)", f"{counts['reads']:,.0f}", f"{counts['reads'] * 10_000 / samples:,.1f}"],
        ["megabytes read (kernel)", f"{counts['bytes'] / 1e6:,.1f}", f"{counts['bytes'] / samples / 100:,.1f}"],
    ]
    title = f"{samples:,} samples of {num_shards} shards, one process"
    text = table(title, ["what", "count", "per 10,000 samples"], rows)
    text += table(
        f"Bytes that a node reads in an epoch of {shards:,} shards, by its share of the dataset",
        ["nodes", "ours", "shuffled over all shards"],
        [[str(nodes), f"{share:.3f}", f"{nodes:.3f}"] for nodes, share in shares.items()],
    )
    text += table(
        f"Share of time a training waits for data: {1000 * DELAY_SECONDS:g} ms per read, {SLOW_BATCH_SIZE} a batch",
        ["workers", "share waiting"],
        [[str(workers), figure.text(3)] for workers, figure in waits.items()],
    )
    text += "\n".join(goal.line(name) for name, goal in goals.items())
    result = verdict(
        "stalls", goals, ratio=round(shares[NODES[-1]], 3), best_peer="shuffled over all shards", goal=1.2,
        bytes_by_share=shares, waiting={workers: round(figure.median, 4) for workers, figure in waits.items()},
    )  # fmt: skip
    return text, result


def count_in_fresh_process(directory: Path, samples: int) -> dict[str, float]:
    code = f"from tests.benchmarks.stalls import count; count({str(directory)!r}, {samples})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def count(directory: str, samples: int) -> None:
    """Print what loading `samples` samples of the dataset in `directory` asks of the file system, as JSON."""
    torch.set_num_threads(1)
    list(one_pass(read_index(directory), BATCH_SIZE))  # whatever is imported or opened once in a process's life
    counts: Counter[str] = Counter()
    counting = True

    def hook(event: str, arguments: tuple) -> None:
        if counting and event == "open" and os.fsdecode(str(arguments[0])).startswith(directory):
            counts["open"] += 1

    def counted(function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            counts["stat"] += 1
            return function(*arguments, **options)

        return call

    sys.addaudithook(hook)
    with mock.patch.multiple(os, stat=counted(os.stat), lstat=counted(os.lstat), fstat=counted(os.fstat)):
        before = kernel_counts()
        loaded = sum(len(batch.keys) for batch in one_pass(read_index(directory), samples))
        after = kernel_counts()
    counting = False
    assert loaded == samples, f"{loaded} samples came of {samples}"
    kernel = {"reads": after["syscr"] - before["syscr"], "bytes": after["rchar"] - before["rchar"]}
    sys.stdout.write(json.dumps({"open": counts["open"], "stat": counts["stat"], **kernel}))


def one_pass(index: DatasetIndex, samples: int) -> Iterator[Any]:
    config = our_config(index, BATCH_SIZE, IMAGE_SIZE)
    return our_batches(config, index, first_step=0, last_step=samples // BATCH_SIZE)


def kernel_counts() -> dict[str, int]:
    """Read calls (`syscr`) and bytes read (`rchar`) of this process, page cache included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def bytes_per_node(shards: int, samples_per_shard: int) -> dict[int, float]:
    """By number of nodes: bytes of the shards that a node's ranks touch in epoch 1, by its share; the worst node."""
    with tempfile.TemporaryDirectory() as directory:
        index = synthetic_index(Path(directory), shards, samples_per_shard)
    order = our_order(our_config(index, ORDER_BATCH_SIZE, IMAGE_SIZE), index)
    shard_bytes = np.array([shard.bytes for shard in index.shards("train")])
    first_step, last_step = (-(-epoch * order.num_samples // ORDER_BATCH_SIZE) for epoch in (1, 2))
    starts = np.arange(first_step, last_step - 1) * ORDER_BATCH_SIZE
    per_slice = ORDER_BATCH_SIZE // (NODES[-1] * RANKS_PER_NODE)
    touched = []  # by the smallest slice of a batch that a rank takes
    for number in range(NODES[-1] * RANKS_PER_NODE):
        positions = (starts[:, None] + number * per_slice + np.arange(per_slice)).ravel()
        touched.append(set(np.unique(order.locate_many(positions)[1]).tolist()))
    return {nodes: _worst_share(touched, nodes, shard_bytes) for nodes in NODES}


def _worst_share(touched: list[set[int]], nodes: int, shard_bytes: np.ndarray) -> float:
    slices = len(touched) // nodes
    of_nodes = [sorted(set.union(*touched[node * slices : (node + 1) * slices])) for node in range(nodes)]
    return max(float(shard_bytes[shards].sum()) for shards in of_nodes) / float(shard_bytes.sum()) * nodes


def wait_shares(index: DatasetIndex, rounds: int, steps: int) -> dict[int, Figure]:
    """Share of a training's time that it waits for its next batch, by number of workers."""
    with slow_reads(DELAY_SECONDS):
        most = Figure.of([_batch_seconds(index, WORKERS[-1], steps) for _ in range(rounds)]).median
        alone = _batch_seconds(index, 0, 1)
        if alone < SLOW_BATCH_SIZE * DELAY_SECONDS:
            raise RuntimeError("samples are not read by os.pread any more: the reader is not slow, nothing is measured")
        shares: dict[int, list[float]] = {workers: [] for workers in WORKERS}
        for number in range(rounds):
            for workers in WORKERS[number % len(WORKERS) :] + WORKERS[: number % len(WORKERS)]:
                shares[workers].append(_wait_share(index, workers, steps, ROOM * most))
    return {workers: Figure.of(of_workers) for workers, of_workers in shares.items()}


@contextmanager
def slow_reads(seconds: float) -> Iterator[None]:
    """Every os.pread of this process, and of those it forks, first sleeps."""
    pread = os.pread

    def slow(*arguments: Any) -> bytes:
        time.sleep(seconds)
        return pread(*arguments)

    with mock.patch.object(os, "pread", slow):
        yield


def _slow_batches(index: DatasetIndex, workers: int, steps: int) -> Any:
    config = our_config(index, SLOW_BATCH_SIZE, IMAGE_SIZE)
    return closing(our_batches(config, index, first_step=0, last_step=steps, workers=workers))


def _batch_seconds(index: DatasetIndex, workers: int, steps: int) -> float:
    """Seconds per batch when nothing but loading is done, after the first one of every worker."""
    with _slow_batches(index, workers, workers + steps) as batches:
        for _ in range(workers):
            next(batches)
        began = time.perf_counter()
        for _ in range(steps):
            next(batches)
        return (time.perf_counter() - began) / steps


def _wait_share(index: DatasetIndex, workers: int, steps: int, step_seconds: float) -> float:
    """The first batch is not counted: nothing can be ahead of it."""
    with _slow_batches(index, workers, steps + 1) as batches:
        next(batches)
        began, waited = time.perf_counter(), 0.0
        for _ in range(steps):
            time.sleep(step_seconds)
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
        return waited / (time.perf_counter() - began)


if __name__ == "__main__":
    main(stalls, "stalls", ("torch", "numpy"))
