"""Scores on held-out images: every sample once at any world size and stage, of the averaged weights, changing none.

Real DeepSpeed ranks over gloo, real shards; the reference scores one sample at a time in plain PyTorch.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from flows.requests.training import training_run
from pipeline.config.recipe import read_yaml
from pipeline.errors import InputError
from pipeline.rank import Rank
from pipeline.run_directory import RunDirectory, write_json
from pipeline.shards.index import read_index
from tests.pipeline.pictures import small_dataset
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """50 pictures, some of them to validate on: a number that no batch of the tests divides."""
    folder = tmp_path_factory.mktemp("pictures")
    small_dataset(folder, per_class=25, splits="hash", split_fractions={"train": 0.6, "validation": 0.4})
    assert read_index(folder / "dataset").num_samples("validation") % 2 == 1
    return str(folder / "dataset")


def new_run(folder: Path, data: str, objective: str, *settings: str, ranks: int = 1) -> RunDirectory:
    settings = [
        "encoder.image_size=16", "encoder.patch_size=4", "ema_decay=0.5", "global_batch_size=12",
        "micro_batch_size=2", "data.lanes=6", f"profile.ranks_per_node={ranks}", "profile.loader_workers=1", *settings,
    ]  # fmt: skip
    return training_run(
        "pretrain", f"pretrain_{objective}_debug", data=[data], profile="local", overrides=settings,
        run_dir=str(folder / "run"), home=folder / "home",
    )  # fmt: skip


def this_rank(run: RunDirectory) -> Rank:
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    if rank == 0:
        write_json(run.job_file, {"attempt": 1})
    return Rank(run, run.attempt(1).make(), rank, rank, world_size)


def all_scored(run_paths: list[str]) -> list[tuple]:
    return [scored(path) for path in run_paths]


def scored(run_path: str) -> tuple[dict[str, float], dict[str, float], dict[str, float], bool]:
    """On every rank: scores in two passes, plain scores where this rank has the whole weights, and if any changed."""
    from models.build import build_objective
    from pipeline.config import deepspeed
    from pipeline.config.plan import BatchPlan
    from pipeline.config.stages import read_run_config
    from pipeline.loading.sources import open_sources
    from pipeline.training.engine import Engine
    from pipeline.training.validation import Validation

    deepspeed.STAGE_3_RESIDENT_ELEMENTS = 0  # or a network this small would never be partitioned
    me = this_rank(RunDirectory(run_path))
    config, plan = read_run_config(me.run.path), me.run.plan()
    sources = open_sources(config.data)
    with Validation(me, config, plan, sources, 0, 2) as validation:
        module = build_objective(config.objective, config.encoder, num_classes=plan["num_classes"], seed=0)
        torch.manual_seed(1)
        if config.objective.kind == "supervised":
            torch.nn.init.normal_(module.encoder.head.weight, std=0.5)
        initial = {name: p.detach().clone() for name, p in module.named_parameters()}
        engine = Engine(module, config, BatchPlan(**plan["batches"]), precision="fp32")
        for flat in engine.state.average:
            flat.mul_(0.5)  # as no training would leave it, and the same at any world size
        before = kept(engine)
        first, second = validation.scores(engine, 1), validation.scores(engine, 2)
        same = all(torch.equal(a, b) for a, b in zip(before, kept(engine), strict=True))
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    plain = build_objective(config.objective, config.encoder, num_classes=plan["num_classes"], seed=0)
    averages = {name: tensor * (0.5 if name in trained else 1.0) for name, tensor in initial.items()}
    plain.load_state_dict(averages, strict=False)
    return first, second, one_at_a_time(plain.eval(), validation.stream, config), same


def kept(engine) -> list[torch.Tensor]:
    """All that training goes on from: what the network computes with, and the fp32 truth with its average."""
    state = engine.state
    held = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in engine.module.parameters()]
    return [tensor.detach().clone() for tensor in [*held, *state._flats(), *state.average]]


@torch.no_grad()
def one_at_a_time(module, stream, config) -> dict[str, float]:
    import numpy as np

    from pipeline.loading.loader import RawBatch, to_device

    sums: dict[str, float] = {}
    for position in range(stream.num_samples):
        image, label = np.empty((1, *stream.image_shape), stream.dtype), np.empty(1, np.int64)
        where = np.array([position])
        stream.fill(where, image, label)
        raw = RawBatch(*map(torch.from_numpy, (image, label, where)), [], [])
        batch = to_device(raw, torch.device("cpu"), config.data.mean, config.data.std, torch.float32)
        outcome = module(batch)
        sums["validation/loss"] = sums.get("validation/loss", 0.0) + outcome.loss.item()
        if "accuracy" in outcome.sums:
            sums["validation/accuracy"] = sums.get("validation/accuracy", 0.0) + outcome.sums["accuracy"].item()
    return {name: total / stream.num_samples for name, total in sums.items()}


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (0, 2), (1, 2), (2, 2), (3, 3)])
def test_scores_are_those_of_every_sample_once_and_leave_the_weights_as_they_were(stage, ranks, pictures, tmp_path):
    runs = [
        new_run(tmp_path / name, pictures, name, f"zero.stage={stage}", "validation.every_steps=1", ranks=ranks)
        for name in ("supervised", "mae")
    ]
    of_ranks = run_on_ranks(all_scored, ranks, [str(run.path) for run in runs])
    for answers in zip(*of_ranks, strict=True):
        for first, second, plain, same in answers:
            assert same
            assert first == second == answers[0][0]
            assert first == pytest.approx(plain, abs=1e-6)


def train_whole(run_path: str) -> None:
    from pipeline.training.loop import train

    train(this_rank(RunDirectory(run_path)))


def ledger_of(run: RunDirectory) -> list[dict]:
    return [json.loads(line) for line in run.attempt(1).ledger.read_text().splitlines()]


def test_a_run_is_scored_at_its_cadence_and_at_its_end_and_trains_as_without(pictures, tmp_path):
    ledgers = []
    for name, every in (("with", 3), ("without", 0)):
        run = new_run(
            tmp_path / name, pictures, "supervised", "steps=7", f"validation.every_steps={every}", ranks=2
        )  # fmt: skip
        run_on_ranks(train_whole, 2, str(run.path))
        ledgers.append(ledger_of(run))
        result = json.loads(run.result_file.read_text())["metrics"]
        assert ("validation/accuracy" in result) == bool(every) and "train/accuracy" in result
        best = json.loads(run.result_file.read_text())["best"]
        if every:
            scored = {line["step"]: line["validation/accuracy"] for line in ledgers[0] if "validation/accuracy" in line}
            step, value = max(scored.items(), key=lambda item: (item[1], item[0]))
            directory = str(run.checkpoints / f"step-{step:08d}")
            assert best == {"step": step, "directory": directory, "metric": "validation/accuracy", "value": value}
        else:
            assert best is None
    assert [line["step"] for line in ledgers[0] if "validation/loss" in line] == [3, 6, 7]
    losses = [[line["train/loss"] for line in lines] for lines in ledgers]
    assert losses[0] == losses[1]


def test_without_a_word_a_run_is_scored_once_an_epoch_if_it_lasts_one(pictures, tmp_path):
    def validation(name: str, *settings: str, objective: str = "supervised") -> dict:
        return read_yaml(new_run(tmp_path / name, pictures, objective, *settings).config_file)["validation"]

    assert validation("short", "steps=2") == {"every_steps": 0, "best": "accuracy"}
    assert validation("whole", "steps=20") == {"every_steps": 4, "best": "accuracy"}
    assert validation("long", "steps=1000", objective="mae") == {"every_steps": 10, "best": "loss"}


def test_what_cannot_be_scored_is_refused(pictures, tmp_path):
    small_dataset(tmp_path, per_class=6, split_fractions={"train": 1.0}, splits="hash")
    with pytest.raises(InputError, match="has no split `validation`; ingest it with one, or set validation.every_st"):
        new_run(tmp_path / "a", str(tmp_path / "dataset"), "mae", "validation.every_steps=5")
    with pytest.raises(InputError, match="validation.best: mae has no accuracy; say loss"):
        new_run(tmp_path / "b", pictures, "mae", "validation.best=accuracy")
