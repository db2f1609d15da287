"""What `vit plan` says of time, cost and budget, from figures of a probe that is not run."""

import json
import os
from subprocess import CompletedProcess

import pytest

from flows import planning
from flows.command_line.commands import plan_command
from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.build import ingest
from pipeline.shards.index import read_index
from tests.pipeline.forecast.homes import done


class Probe:
    """Answers with `figures` in place of the probe's process, and keeps the environment it was given."""

    def __init__(self, monkeypatch):
        self.figures, self.notes, self.environment = (16_000.0, 1_600.0), [], {}
        monkeypatch.setattr(planning.subprocess, "run", self.run)

    def run(self, command, *, input, env, **_):
        self.environment = env
        names = ("loader_images_per_second", "model_images_per_second")
        answer = dict(zip(names, self.figures, strict=True)) | {"notes": self.notes}
        return CompletedProcess(command, 0, json.dumps(answer), "")


@pytest.fixture
def probe(monkeypatch):
    monkeypatch.setattr("cluster.profile.accelerators_here", lambda: 0)
    return Probe(monkeypatch)


@pytest.fixture
def plan(home, digits, probe):
    def plan(*settings: str) -> dict[str, str]:
        """What is said behind each label."""
        lines: list[str] = []
        assert plan_command("pretrain_mae_debug", [str(digits)], "local", list(settings), str(home), lines.append) == 0
        labels = {line[:12].strip(): [] for line in lines}
        for line in lines:
            labels[line[:12].strip()].append(line[12:])
        return {label: "\n".join(said) for label, said in labels.items()}

    return plan


def test_the_loader_is_measured_in_the_environment_that_the_ranks_will_have(plan, probe, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    plan("profile.ranks_per_node=2", "profile.env={TORCH_CPP_LOG_LEVEL: INFO}")
    given = {name: probe.environment[name] for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL")}
    assert given == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "6", "TORCH_CPP_LOG_LEVEL": "INFO"}
    assert probe.environment["PATH"] == os.environ["PATH"]
    plan("profile.env={OMP_NUM_THREADS: '1'}")
    assert probe.environment["OMP_NUM_THREADS"] == "1"


def test_a_model_of_one_image_in_hours_has_a_plan_too(plan, probe):
    probe.figures = (85.3, 1e-4)
    said = plan("steps=100", "profile.loader_workers=1")
    assert "the model can take roughly less than 0.01: not input-bound" in said["data"]
    assert said["time"].startswith("about 185 d ") and "cost" not in said
    probe.figures = (85.3, 1.1e-4)
    assert said["time"] != plan("steps=100", "profile.loader_workers=1")["time"]


def test_without_workers_loading_and_computing_take_turns(plan, probe):
    probe.figures = (1_600.0, 1_600.0)
    assert plan("samples=160000", "profile.loader_workers=1")["time"] == "about 1 min 40 s"
    said = plan("samples=160000", "profile.loader_workers=0")
    assert said["time"] == "about 3 min 20 s" and "input-bound; set profile.loader_workers to 1" in said["data"]


def test_gpu_hours_and_their_price_follow_from_the_time(plan):
    settings = ["samples=16000000", "profile.loader_workers=1", "profile.price_per_device_hour=2.5"]
    assert plan(*settings)["cost"] == "price 6.94"  # of the machine
    assert plan(*settings, "profile.accelerators_per_node=2")["cost"] == "5.56 GPU-hours, price 13.89"


def test_a_processor_is_not_timed_for_accelerators_and_what_is_assumed_is_said(plan, probe):
    probe.figures = (16_000.0, None)
    said = plan("profile.accelerators_per_node=2", "budget_gpu_hours=1")
    assert said["data"] == "the loader gives 16,000 images/s here with no workers (profile.loader_workers=0)"
    assert said["time"] == (
        "not measured: profile.accelerators_per_node is 2 and there is no accelerator here; run `vit plan` where they "
        "are"
    )
    assert said["cost"].startswith("not measured; 100 TFLOP/s from each would make it ") and "budget" not in said


def test_a_budget_that_ends_the_run_early_says_at_which_step(plan):
    settings = ["steps=1000", "global_batch_size=1600", "profile.ranks_per_node=2", "profile.loader_workers=1"]
    assert "budget" not in plan(*settings, "budget_gpu_hours=0.6")  # two ranks for 1,000 s: 0.556 hours
    assert plan(*settings, "budget_gpu_hours=0.25")["budget"] == (
        "all of it takes about 0.556 rank-hours and budget_gpu_hours is 0.25: the run will stop with a checkpoint at "
        "about step 450 of 1,000"
    )


def test_what_a_person_should_know_is_said_once(plan, probe):
    probe.notes = ["no accelerator here: computing in fp32", "a shard is slow"]
    said = plan("precision=bf16", "steps=20")
    assert said["note"] == "no accelerator here: computing in fp32"
    assert said["data"].splitlines()[0] == "a shard is slow" and len(said["data"].splitlines()) == 2
    assert said["recipe"].startswith("pretrain_mae_debug on digits; profile local: 1 node x 2 ranks, no accelerator, ")
    assert said["length"] == "20 steps = 0.222 epochs of 1,442 images: 320 images seen"


def test_a_plan_says_what_past_runs_of_the_home_took_and_scored(plan, home, digits):
    assert plan("profile.ranks_per_node=2")["learned"] == "no past runs to learn from"
    index = read_index(str(digits))
    data = {"name": "digits", "fingerprint": index.fingerprint}
    for number, inside in enumerate((True, True, False)):
        best = {"metric": "validation/loss", "value": 0.5 + number / 10}
        graded = {"hours": {"inside": inside}}
        run = done(home / "runs", f"run-{number}", seconds=6.0, best=best, forecast=graded, data=data)
        run.config_file.write_text("stage: pretrain\nobjective: {kind: mae}\n")
    said = plan("profile.ranks_per_node=2")["learned"].splitlines()
    took = "past runs here took 1.20 (1.20–1.20) times their plan: 3 runs of this profile, and 12 s to start and end"
    assert said[0] == took


def test_scores_and_kept_forecasts_of_past_runs_are_said(home, probe, tmp_path):
    shares = {"train": 0.6, "validation": 0.2, "test": 0.2}
    ingest("sklearn:digits", tmp_path / "digits", IngestConfig(splits="hash", split_fractions=shares))
    data = {"name": "digits", "fingerprint": read_index(str(tmp_path / "digits")).fingerprint}
    for number, inside in enumerate((True, True, False)):
        best = {"metric": "validation/loss", "value": 0.5 + number / 10}
        run = done(home / "runs", f"run-{number}", seconds=6.0, best=best, forecast={"hours": {"inside": inside}},
                   data=data)  # fmt: skip
        run.config_file.write_text("stage: pretrain\nobjective: {kind: mae}\n")
    lines: list[str] = []
    settings = ["epochs=2", "profile.ranks_per_node=2"]
    assert (
        plan_command("pretrain_mae_debug", [str(tmp_path / "digits")], "local", settings, str(home), lines.append) == 0
    )
    text = "\n".join(lines)
    assert "mae on these images so far: validation/loss 0.7000 to 0.5000 in 3 past runs, the best run-0" in text
    assert "forecasts of past runs held what came (80 of 100 should): time 2 of 3" in text
    assert "forecast: time " in text and "80 % intervals by 3 past runs of this profile (time)" in text
