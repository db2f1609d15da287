"""Runs of the tests: a tiny masked autoencoder on 108 pictures, prepared as a person would, trained on ranks."""

import os
from pathlib import Path

from flows.requests.training import training_run
from pipeline.errors import DataError, InputError
from pipeline.rank import Rank, Stopped
from pipeline.run_directory import RunDirectory, write_json

STEPS, BATCH = 24, 12


class StoppedAt(Rank):
    """A rank that is asked to stop while it makes step `stop_at`."""

    stop_at: int

    @property
    def stop_requested(self) -> bool:
        return self.step >= self.stop_at - 1

    @stop_requested.setter
    def stop_requested(self, value: bool) -> None:
        pass


def train_until(run_path: str, attempt_number: int, stop_at: int) -> str:
    """On every rank: one attempt of the run, asked to stop at a step."""
    from pipeline.training.loop import train

    run, (rank, world_size) = RunDirectory(run_path), (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    attempt = run.attempt(attempt_number).make()
    if rank == 0:
        write_json(run.job_file, {"attempt": attempt_number})
    me = StoppedAt(run, attempt, rank, rank, world_size)
    me.stop_at = stop_at
    try:
        train(me)
    except (Stopped, InputError, DataError, RuntimeError) as ended:  # RuntimeError: the peer left
        return str(ended)
    return "done"


def new_run(folder: Path, data, *settings: str, ranks: int = 2, recipe: str = "pretrain_mae_debug") -> RunDirectory:
    settings = [
        f"steps={STEPS}", f"global_batch_size={BATCH}", "micro_batch_size=2", "data.record=true", "data.lanes=6",
        "data.window_shards=1", f"profile.ranks_per_node={ranks}", "profile.loader_workers=1", *settings,
    ]  # fmt: skip
    return training_run(
        "pretrain", recipe, data=data, profile="local", overrides=settings,
        run_dir=str(folder / "run"), home=folder / "home",
    )  # fmt: skip


def recorded(run: RunDirectory, *, repeats: bool = False) -> list[tuple[int, str]]:
    """(position, key) of all consumed samples in the order of steps; one consumed twice fails without `repeats`."""
    found = []
    for path in run.path.glob("attempts/*/samples/rank-*.tsv"):
        for line in path.read_text().splitlines():
            step, position, key = line.split("\t")
            found.append((int(step), int(position), key))
    assert repeats or len(set(found)) == len(found)
    return [(position, key) for _, position, key in sorted(set(found))]
