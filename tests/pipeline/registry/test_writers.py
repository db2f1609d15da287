"""TensorBoard and Weights & Biases show every step of the ledger once, whoever was killed in between."""

import importlib.util
import json

import pytest

from pipeline.errors import InputError
from pipeline.registry.writers import require_packages, writers_of
from pipeline.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    append(run, 1, range(1, 6))
    return run


def append(run: RunDirectory, attempt: int, steps: range) -> None:
    with open(run.attempt(attempt).make().ledger, "a") as file:
        file.writelines(json.dumps({"step": s, "time": 1000.0 + s, "train/loss": 1 / s}) + "\n" for s in steps)


def written_to(run: RunDirectory, name: str):
    run.config_file.write_text(f"writers: [{name}]")
    (writer,) = writers_of(run)
    return writer


def test_tensorboard_has_every_step_once_through_restarts(run):
    writer = written_to(run, "tensorboard")
    writer.forward()
    writer.finish()
    append(run, 2, range(4, 9))  # resumed from step 3: steps 4 and 5 are done again
    writer = written_to(run, "tensorboard")
    writer.finish()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run.path / "tensorboard"))
    shown.Reload()
    tensors = shown.Tensors("train/loss")
    assert [event.step for event in tensors] == list(range(1, 9))
    assert [event.tensor_proto.float_val[0] for event in tensors] == pytest.approx([1 / s for s in range(1, 9)])


def test_wandb_keeps_a_run_offline(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = written_to(run, "wandb")
    writer.finish()
    (offline,) = (run.path / "wandb").glob("offline-run-*")
    (file,) = offline.glob("*.wandb")
    assert run.key in file.name and b"train/loss" in file.read_bytes()
    assert json.loads((run.path / "wandb.json").read_text())["last_step"] == 5


def test_a_writer_whose_package_is_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="writers: wandb is not installed; install it with `uv sync --extra wandb`"):
        require_packages(("wandb",))
