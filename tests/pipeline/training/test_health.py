"""Health of a model in training: the same at any world size and stage, changing nothing, and a stop where it is bad.

Real DeepSpeed ranks over gloo, real shards, real images.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flows.requests.training import training_run
from pipeline.config.ingest import IngestConfig
from pipeline.errors import HealthError
from pipeline.health.log import bad_in_a_row, read_verdicts
from pipeline.ingestion.build import ingest
from pipeline.rank import Rank
from pipeline.run_directory import RunDirectory, write_json
from tests.pipeline.pictures import small_dataset
from tests.pipeline.training.runs import train_until
from tests.ranks import run_on_ranks


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """50 pictures, some of them to validate on: a number that no batch of the tests divides."""
    folder = tmp_path_factory.mktemp("pictures")
    small_dataset(folder, per_class=25, splits="hash", split_fractions={"train": 0.6, "validation": 0.4})
    return str(folder / "dataset")


@pytest.fixture(scope="module")
def one_colour(tmp_path_factory) -> str:
    """40 images that are all the same grey: there is nothing to learn."""
    folder = tmp_path_factory.mktemp("grey")
    for label in ("a", "b"):
        (folder / "images" / label).mkdir(parents=True)
        for number in range(20):
            Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(folder / "images" / label / f"{number}.png")
    ingest(str(folder / "images"), folder / "dataset", IngestConfig(split_fractions={"train": 1.0}))
    return str(folder / "dataset")


def new_run(folder: Path, data: str, objective: str, *settings: str, ranks: int = 1) -> RunDirectory:
    settings = [
        "encoder.image_size=16", "encoder.patch_size=4", "global_batch_size=12", "micro_batch_size=2",
        "data.lanes=6", f"profile.ranks_per_node={ranks}", "profile.loader_workers=1", *settings,
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


def all_measured(run_paths: list[str]) -> list[tuple]:
    return [measured(path) for path in run_paths]


def measured(run_path: str) -> tuple[dict[str, float], dict[str, float], bool]:
    """On every rank: scores of two measurements, and whether the weights or the generator changed meanwhile."""
    from models.build import build_objective
    from pipeline.config import deepspeed
    from pipeline.config.plan import BatchPlan
    from pipeline.config.stages import read_run_config
    from pipeline.loading.sources import open_sources
    from pipeline.training.engine import Engine
    from pipeline.training.health import Health

    deepspeed.STAGE_3_RESIDENT_ELEMENTS = 0  # or a network this small would never be partitioned
    me = this_rank(RunDirectory(run_path))
    config, plan = read_run_config(me.run.path), me.run.plan()
    with Health(me, config, plan, open_sources(config.data), 0, 2) as health:
        module = build_objective(config.objective, config.encoder, num_classes=plan["num_classes"], seed=0)
        torch.manual_seed(1)
        for parameter in module.parameters():  # as training would leave them: features that differ
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        engine = Engine(module, config, BatchPlan(**plan["batches"]), precision="fp32")
        before, generator = kept(engine), torch.random.get_rng_state()
        first, second = health.measure(engine, 1).scores, health.measure(engine, 2).scores
        same = all(torch.equal(a, b) for a, b in zip(before, kept(engine), strict=True))
        same = same and torch.equal(generator, torch.random.get_rng_state())
    return (*({key: value for key, value in one.items() if "seconds" not in key} for one in (first, second)), same)


def kept(engine) -> list[torch.Tensor]:
    held = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in engine.module.parameters()]
    return [tensor.detach().clone() for tensor in [*held, *engine.state._flats(), *engine.state.average]]


OBJECTIVES = ("supervised", "mae", "simmim", "patch_colour", "capi")


@pytest.mark.slow
def test_the_numbers_are_the_same_at_any_world_size_and_stage_and_measuring_changes_nothing(pictures, tmp_path):
    reference: dict[str, dict[str, float]] = {}
    for stage, ranks, objectives in [
        (0, 1, OBJECTIVES), (1, 2, OBJECTIVES), (0, 2, ["mae"]), (2, 2, ["mae"]), (3, 3, ["mae", "supervised"]),
    ]:  # fmt: skip
        runs = [
            new_run(
                tmp_path / f"{name}-{stage}-{ranks}", pictures, name, f"zero.stage={stage}", "health.every_steps=1",
                "health.images=20", "ema_decay=0.5" if name != "capi" else "seed=0", ranks=ranks,
            )
            for name in objectives
        ]  # fmt: skip
        of_ranks = run_on_ranks(all_measured, ranks, [str(run.path) for run in runs], timeout_seconds=400)
        for name, answers in zip(objectives, zip(*of_ranks, strict=True), strict=True):
            for first, second, same in answers:
                assert same and first == second == answers[0][0], name
            has_targets = name in ("mae", "simmim", "patch_colour")
            expected = {"rankme", "feature_spread", "attention_entropy", "knn_top1", "ridge_top1"}
            expected |= {"explained_variance"} if has_targets else set()
            assert {key.removeprefix("health/") for key in answers[0][0]} == expected
            assert answers[0][0] == pytest.approx(reference.setdefault(name, answers[0][0]), rel=1e-5, abs=1e-5), name


def train_whole(run_path: str) -> None:
    from pipeline.training.loop import train

    train(this_rank(RunDirectory(run_path)))


def ledger_of(run: RunDirectory) -> list[dict]:
    return [json.loads(line) for line in run.attempt(1).ledger.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_is_measured_at_its_cadence_and_at_its_end_and_trains_as_without(pictures, tmp_path):
    ledgers, runs = [], []
    for name, every in (("with", 3), ("without", 0)):
        run = new_run(
            tmp_path / name, pictures, "mae", "steps=7", f"health.every_steps={every}", "encoder.dropout=0.1", ranks=2
        )  # fmt: skip
        run_on_ranks(train_whole, 2, str(run.path), timeout_seconds=400)
        ledgers.append(ledger_of(run))
        runs.append(run)
    for key in ("train/loss", "train/gradient_norm"):
        assert [line[key] for line in ledgers[0]] == [line[key] for line in ledgers[1]]
    assert [line["step"] for line in ledgers[0] if "health/rankme" in line] == [3, 6, 7]
    assert not any("health/rankme" in line for line in ledgers[1]) and not read_verdicts(runs[1])
    measurements = read_verdicts(runs[0])
    assert [one[0].step for one in measurements] == [3, 6, 7]
    for verdict in measurements[-1]:
        assert verdict.progress == 1.0 and verdict.samples == 84
        assert verdict.value == ledgers[0][-1][f"health/{verdict.metric}"]
        assert verdict.words.startswith("epoch ")
    assert {verdict.metric: verdict.verdict for verdict in measurements[-1]}["knn_top1"] == "no band"
    events = runs[0].attempt(1).events.read_text()
    assert "explained variance" in events and "no reference" in events


def stopped_by_health(run_path: str) -> str:
    try:
        train_whole(run_path)
    except HealthError as error:
        return str(error)
    return "trained to its end"


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "report"])
def test_a_collapsed_run_is_stopped_with_a_checkpoint_where_that_is_the_policy(policy, one_colour, tmp_path):
    run = new_run(
        tmp_path, one_colour, "supervised", "steps=12", "health.every_steps=2", f"health.policy={policy}",
        "health.patience=2", ranks=2,
    )  # fmt: skip
    said = run_on_ranks(stopped_by_health, 2, str(run.path), timeout_seconds=400)
    assert len(set(said)) == 1
    if policy == "report":
        assert said[0] == "trained to its end" and run.result_file.exists()
        return
    assert "health was bad 2 times in a row" in said[0] and "feature spread" in said[0]
    assert "features of all images are alike" in said[0] and "health.policy=report" in said[0]
    newest = run.newest_checkpoint()
    assert newest is not None and newest.step == read_verdicts(run)[-1][0].step == 4
    assert not run.result_file.exists()


@pytest.mark.parametrize("stage", [0, 3])
def test_attention_is_seen_in_a_network_that_was_compiled_before_it_was_looked_at(stage):
    from models.build import build_objective
    from models.encoders.config import EncoderConfig
    from models.inspection.attention_weights import attention_by_block, relative_entropy
    from models.objectives.batch import Batch
    from models.objectives.config import MaskedAutoencoderConfig
    from pipeline.training.compilation import as_if_not_compiled, compile_in_place

    encoder = EncoderConfig(name="vit_ti16", image_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2)
    module = build_objective(MaskedAutoencoderConfig(), encoder, num_classes=0, seed=0)
    images = torch.rand(4, 3, 16, 16)
    expected = attention_by_block(module.encoder, images, relative_entropy)
    compile_in_place(module, stage, "eager")
    for _ in range(2):
        module(Batch(images, torch.zeros(4, dtype=torch.int64), torch.arange(4)))
    with as_if_not_compiled():
        found = attention_by_block(module.encoder, images, relative_entropy)
    assert len(found) == 2 and all(map(torch.equal, found, expected))


@pytest.mark.slow
def test_a_resumed_run_measures_what_the_uninterrupted_one_does_and_remembers_bad_measurements(pictures, tmp_path):
    """Resumed at two ranks and another stage; a spread of 2 is reached by none, so every measurement is bad."""
    settings = ["steps=7", "health.every_steps=2", "health.least_spread=2", "health.settling=0"]
    whole = new_run(tmp_path / "whole", pictures, "mae", *settings, "zero.stage=0")
    run_on_ranks(train_until, 1, str(whole.path), 1, 99, timeout_seconds=400)
    stopped = new_run(tmp_path / "stopped", pictures, "mae", *settings, ranks=2)
    run_on_ranks(train_until, 2, str(stopped.path), 1, 5, timeout_seconds=400)
    assert [one[0].step for one in read_verdicts(stopped)] == [2, 4]
    run_on_ranks(train_until, 2, str(stopped.path), 2, 99, timeout_seconds=400)
    expected, found = read_verdicts(whole), read_verdicts(stopped)
    assert [one[0].step for one in found] == [2, 4, 6, 7]
    for measurements in zip(expected, found, strict=True):
        values = [{verdict.metric: verdict.value for verdict in one} for one in measurements]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-5)
    assert bad_in_a_row(found) == 4


def stopped_among_bad_steps(run_paths: list[str]) -> list[str]:
    """What each run says in the end, when the samples of its steps 5 and 6 are no numbers."""
    from tests.pipeline.training.test_guard import poison

    poison(list(range(48, 72)))
    return [stopped_by_health(path) for path in run_paths]


@pytest.mark.slow
def test_a_measurement_on_the_step_of_a_roll_back_counts_and_counts_once(pictures, tmp_path):
    """A spread of 2 is reached by none, so every measurement is bad; steps 5 and 6 are gone back over to step 4."""
    settings = [
        "steps=10", "health.every_steps=2", "health.least_spread=2", "health.settling=0", "health.policy=stop",
        "guard.max_skipped=2", "checkpoint.every_steps=2", "checkpoint.keep=9", "zero.stage=0",
    ]  # fmt: skip
    runs = [new_run(tmp_path / f"{n}", pictures, "mae", *settings, f"health.patience={n}") for n in (3, 5)]
    at_roll_back, behind = run_on_ranks(stopped_among_bad_steps, 1, [str(run.path) for run in runs])[0]
    assert "health was bad 3 times in a row" in at_roll_back and "the checkpoint of step 4 stands" in at_roll_back
    assert runs[0].newest_checkpoint().step == 4 and len(runs[0].rolled_back()) == 1
    assert "health was bad 5 times in a row" in behind and "the checkpoint of step 10 stands" in behind
    assert [one[0].step for one in read_verdicts(runs[1])] == [2, 4, 6, 8, 10] and len(runs[1].rolled_back()) == 1


def train_with_faults(run_path: str) -> str:
    """Rank 1 cannot read its images at first, and has no memory the next time."""
    from pipeline.loading.fixed_sample import FixedSample
    from pipeline.training.health import _Look

    fill, look = FixedSample.fill, _Look.__call__
    met = [Path(run_path) / name for name in ("no-image", "no-memory")]

    def failing_fill(self, *arguments):  # in a worker, which is forked anew
        if not met[0].exists():
            met[0].touch()
            raise OSError("the disk is gone")
        return fill(self, *arguments)

    def failing_look(self, batch):
        if not met[1].exists():
            met[1].touch()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nTry less.")
        return look(self, batch)

    if os.environ["RANK"] == "1":
        FixedSample.fill, _Look.__call__ = failing_fill, failing_look
    return stopped_by_health(run_path)


@pytest.mark.slow
def test_a_measurement_that_fails_on_one_rank_is_a_warning_and_all_go_on(pictures, tmp_path):
    run = new_run(tmp_path, pictures, "mae", "steps=8", "health.every_steps=2", "ema_decay=0.5", ranks=2)
    (run.attempt(1).path / "health.jsonl").mkdir(parents=True)  # that cannot be written to
    said = run_on_ranks(train_with_faults, 2, str(run.path), timeout_seconds=200)
    assert said == ["trained to its end"] * 2 and run.result_file.exists()
    assert [line["step"] for line in ledger_of(run) if "health/rankme" in line] == [6, 8]
    events = run.attempt(1).events.read_text()
    for words in (
        "health of step 2 could not be measured, and training goes on: rank 1: RuntimeError: in a loader worker: "
        "OSError: the disk is gone (workers.py:",
        "health of step 4 could not be measured, and training goes on: rank 1: OutOfMemoryError: CUDA out of memory. "
        "Tried to allocate 2 GiB. (test_health.py:",
        "verdicts on the health of step 8 could not be written: [Errno 21] Is a directory",
    ):
        assert events.count(words) == 1, events


@pytest.mark.slow
def test_a_log_that_is_damaged_stops_no_resume(pictures, tmp_path):
    run = new_run(tmp_path, pictures, "mae", "steps=4", "health.every_steps=1", "zero.stage=0")
    run_on_ranks(train_until, 1, str(run.path), 1, 2, timeout_seconds=200)
    with open(run.attempt(1).path / "health.jsonl", "ab") as file:
        file.write(bytes(100) + b"\n" + b'{"step": 3}\n')
    assert run_on_ranks(train_until, 1, str(run.path), 2, 99, timeout_seconds=200) == ["done"]
    assert [one[0].step for one in read_verdicts(run)] == [1, 2, 3, 4]
    assert "lines that cannot be read are passed over" in run.attempt(2).events.read_text()
