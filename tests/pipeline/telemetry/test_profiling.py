"""Traces of chosen steps of a real run, and the bytes that its ranks exchange in them."""

import csv
import gzip
import json
import subprocess
import sys

import pytest
import torch

from pipeline.errors import InputError
from pipeline.run_directory import RunDirectory
from tests.pipeline.pictures import small_dataset
from tests.pipeline.training.test_validation import new_run, train_whole
from tests.ranks import run_on_ranks


@pytest.mark.slow
def test_chosen_steps_are_traced_on_every_rank_with_what_they_exchange(tmp_path):
    small_dataset(tmp_path, per_class=15, splits="hash", split_fractions={"train": 1.0})
    run = new_run(
        tmp_path, str(tmp_path / "dataset"), "mae", "zero.stage=0", "steps=6", "profiling.steps=[3, 4]", ranks=2
    )  # fmt: skip
    run_on_ranks(train_whole, 2, str(run.path))
    parameters = run.plan()["parameters"]
    for rank in range(2):
        folder = RunDirectory(run.path).attempt(1).path / "profile"
        with gzip.open(folder / f"rank-{rank:05d}.json.gz") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        assert names.count("Optimizer.step#AdamW.step") == 2
        with open(folder / f"rank-{rank:05d}.communication.tsv") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        gradients = [row for row in rows if row["operation"] == "all_reduce" and row["element"] == "float"]
        assert sum(float(row["bytes_per_step"]) for row in gradients) == pytest.approx(4 * parameters, rel=0.05)
        assert all(float(row["calls_per_step"]) == int(float(row["calls_per_step"])) for row in rows)


TRACED = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from pipeline.config.profiling import ProfilingConfig
from pipeline.telemetry.profiling import StepTrace
me = SimpleNamespace(attempt=SimpleNamespace(path=Path(sys.argv[1])), rank=0, is_first=True)
with StepTrace(me, ProfilingConfig(steps=(1, int(sys.argv[2])))) as trace:
    trace.before(1)
    torch.ones(3) + 1
    trace.after(1, 5)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the profiler's own words may matter")
@pytest.mark.parametrize("last", [1, 3])  # the run may end before the last step to trace
def test_the_profiler_has_nothing_to_say_on_a_processor(last, tmp_path):
    command = [sys.executable, "-c", TRACED, str(tmp_path), str(last)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "profile" / "rank-00000.json.gz").exists()


def test_a_range_that_ends_before_it_begins_or_that_no_memory_holds_is_refused(tmp_path):
    small_dataset(tmp_path, per_class=5, splits="hash", split_fractions={"train": 1.0})
    with pytest.raises(InputError, match=r"--set profiling.steps: steps is \[first, last\], and 5 is after 4"):
        new_run(tmp_path, str(tmp_path / "dataset"), "mae", "profiling.steps=[5, 4]")
    with pytest.raises(InputError, match=r"profiling.steps: steps \[1, 101\] are more than 100"):
        new_run(tmp_path, str(tmp_path / "dataset"), "mae", "profiling.steps=[1, 101]")
