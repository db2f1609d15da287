"""Seconds of a checkpoint against a raw write and read of as many bytes, and how long training waits for one.

One process holds a ViT and AdamW's moments behind the real engine at ZeRO stage 1 (0.5 GB of fp32).
In turn, round by round: raw bytes, ours with its checksums, and the peers with the same tensors or their own engine,
every file fsynced. Then ours and raw again in memory (/dev/shm), where no disk hides what they compute. `stall` is what
training waits for an asynchronous save, with steps of a small batch around it; `copy` what the same bytes take a
processor, all of which would be waited for if the copy did not run beside the next forward and backward. Reads come
from the page cache, for all alike, into tensors that are there. About 4 minutes:

    uv run python -m tests.benchmarks.checkpoint
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541",
    "DS_ACCELERATOR": "cpu",
}  # fmt: skip

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from models.build import build_objective
from models.objectives.batch import Batch
from pipeline.checkpoints.checkpoint import commit, load_checkpoint, partial_directory, write_share
from pipeline.checkpoints.resuming import faults_of_share
from pipeline.checkpoints.snapshot import Snapshot
from pipeline.config.plan import plan_batches
from pipeline.config.training import PretrainConfig
from pipeline.run_directory import RunDirectory, write_json
from pipeline.training.engine import Engine
from tests.benchmarks.report import Figure, Goal, main, table, verdict

MEMORY = Path("/dev/shm")
PIECE_BYTES = 8 << 20
READS = 9


def checkpoint(rounds: int = 3, memory_rounds: int = 5, width: int = 512, depth: int = 14) -> tuple[str, dict]:
    torch.set_num_threads(1)
    engine = stepped_engine(width, depth)
    with tempfile.TemporaryDirectory(prefix="vit-checkpoint-") as disk:
        contestants = peers(engine)
        ours = Ours(engine, Path(disk) / "run")
        on_disk = measured(ours, contestants, Path(disk), rounds)
        waiting = [ours.stall() for _ in range(rounds)]
        on_disk |= {name: [waited[name] for waited in waiting] for name in waiting[0]}
        reads = {"raw": ours.raw_read, "ours": ours.restore, "ours, verifying alone": ours.verify}
        reading = {name: [seconds(read) for _ in range(READS)] for name, read in reads.items()}
    in_memory: dict[str, list[float]] = {}
    if MEMORY.is_dir():
        with tempfile.TemporaryDirectory(prefix="vit-checkpoint-", dir=MEMORY) as memory:
            in_memory = measured(Ours(engine, Path(memory) / "run"), {}, Path(memory), memory_rounds)
    goals = {
        "disk, synchronous save by raw": Goal(by_round(on_disk, "ours", "raw").median, 1.2, at_least=False),
        "disk, stall by synchronous save": Goal(by_round(on_disk, "stall", "ours").median, 0.06, at_least=False),
        "restore by raw read": Goal(by_round(reading, "ours", "raw").median, 1.2, at_least=False),
    }
    if in_memory:
        goals["memory, synchronous save by raw"] = Goal(by_round(in_memory, "ours", "raw").median, 1.1, at_least=False)
    text = f"{ours.num_bytes / 1e9:.2f} GB\n\n"
    for title, times in (("Disk", on_disk), ("Memory", in_memory), ("Reading", reading)):
        rows = [[name, Figure.of(of).text(3), by_round(times, name, "raw").text(2)] for name, of in times.items()]
        text += table(title, ["what", "seconds", "by raw"], rows)
    text += "\n".join(goal.line(name) for name, goal in goals.items())
    ratio = goals["disk, synchronous save by raw"].value
    best = min(contestants, key=lambda name: statistics.median(on_disk[name]))
    ratios = {name: round(by_round(on_disk, name, "raw").median, 3) for name in on_disk}
    return text, verdict("checkpoint", goals, ratio=round(ratio, 3), best_peer=best, goal=1.2, ratios=ratios)


def stepped_engine(width: int, depth: int) -> Engine:
    """The real engine after one step, so that the moments are there."""
    config = PretrainConfig.model_validate({
        "encoder": {"name": "vit_b16", "image_size": 32, "patch_size": 8, "embed_dim": width, "depth": depth,
                    "num_heads": 8},
        "objective": {"kind": "supervised"}, "optimizer": {"learning_rate": 1e-3}, "zero": {"stage": 1},
        "global_batch_size": 2, "micro_batch_size": 2, "steps": 1, "precision": "fp32",
    })  # fmt: skip
    module = build_objective(config.objective, config.encoder, num_classes=10, seed=0)
    engine = Engine(module, config, plan_batches(2, 2, 1), precision="fp32")
    take_step(engine)
    return engine


def take_step(engine: Engine) -> None:
    batch = Batch(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]), torch.arange(2))
    engine.step([batch], 1e-3, stop=False)


class Ours:
    """Saving and loading as a run does, in a run directory."""

    def __init__(self, engine: Engine, directory: Path):
        self.state, self.frozen, self.run = engine.state, engine.frozen, RunDirectory(directory)
        directory.mkdir()
        write_json(self.run.job_file, {"attempt": 1})
        self.snapshot = Snapshot(engine.state, 0, 1)
        self.checkpoint = None
        self.engine = engine
        flats = [flat for kind in engine.state.tensors().values() for flat in kind]
        self.num_bytes = 4 * sum(flat.numel() for flat in flats)
        self.content = memoryview(torch.rand(self.num_bytes // 4).numpy()).cast("B")

    def save(self) -> None:
        attempt = self.run.attempt(1)
        self.snapshot.lend()
        write_share(self.snapshot, self.frozen, partial_directory(self.run, attempt, 1))
        self.checkpoint = commit(self.run, attempt, self.state, 1, {"step": 1})

    def stall(self) -> dict[str, float]:
        """Seconds that training waits for the copy, and that the copy takes when nothing is beside it."""
        self.engine.before_change = self.snapshot.hold
        waited = seconds(self.snapshot.take)
        take_step(self.engine)
        waited += self.snapshot.seconds_waited()
        return {"stall": waited, "copy": seconds(self.snapshot._copy_on_host)}

    def clear(self) -> None:
        """Remove what the last save left, as the others' directories are: a run replaces none."""
        if self.checkpoint is not None:
            shutil.rmtree(self.checkpoint.directory)

    def raw_write(self, directory: Path) -> None:
        with open(directory / "raw", "wb", buffering=0) as file:
            for start in range(0, self.num_bytes, PIECE_BYTES):
                file.write(self.content[start : start + PIECE_BYTES])
            os.fsync(file.fileno())

    def raw_read(self) -> None:
        """The bytes of our own file, into memory that is there already."""
        (file,) = self.checkpoint.directory.glob("rank-*.safetensors")
        with open(file, "rb", buffering=0) as stream:
            target = memoryview(self.snapshot._buffer.numpy()).cast("B")
            while stream.readinto(target[:PIECE_BYTES]):
                target = target[PIECE_BYTES:] or target

    def restore(self) -> None:
        load_checkpoint(self.state, self.checkpoint)

    def verify(self) -> None:
        assert not faults_of_share(self.checkpoint.directory, 0, 1)


def peers(engine: Engine) -> dict[str, Callable[[Path], Any]]:
    """What each peer does with the same tensors, or with the engine, into a directory."""
    tensors = {f"{kind}{i}": flat for kind, flats in engine.state.tensors().items() for i, flat in enumerate(flats)}
    return {
        "torch.save": lambda to: torch.save(tensors, to / "state.pt"),
        "safetensors": lambda to: safetensors.torch.save_file(tensors, to / "state.safetensors"),
        "torch DCP": lambda to: dcp.save(tensors, checkpoint_id=to, no_dist=True),
        "DeepSpeed save_checkpoint": lambda to: engine.wrapped.save_checkpoint(str(to)),
        "accelerate save_state, by DeepSpeed": lambda to: engine.accelerator.save_state(str(to)),
    }


def measured(ours: Ours, contestants: dict[str, Callable], place: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round by what was written; one round before is not counted.

    Each round begins one further on: a disk is faster for who comes first.
    """
    works = {"raw": ours.raw_write, "ours": lambda to: ours.save()} | contestants
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            directory = place / "round"
            directory.mkdir()
            if name == "ours":
                ours.clear()
            taken = seconds(saved_and_synced, works[name], directory)
            shutil.rmtree(directory)
            if number:
                times[name].append(taken)
    return times


def saved_and_synced(save: Callable[[Path], Any], directory: Path) -> None:
    save(directory)
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())


def seconds(work: Callable, *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def by_round(times: dict[str, list[float]], one: str, other: str) -> Figure:
    """The ratio of two, paired by round."""
    return Figure.of([a / b for a, b in zip(times[one], times[other], strict=True)])


if __name__ == "__main__":
    main(checkpoint, "checkpoint", ("torch", "safetensors", "deepspeed", "accelerate"))
