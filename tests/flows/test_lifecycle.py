"""`vit lifecycle`: the whole path on a person's own images, refused early, stopped in order, and gone on with."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from flows.requests.lifecycle import (
    LifecycleRequest,
    companion_settings,
    pretraining_run,
    require_downstream,
    require_valid,
)
from pipeline.config.ingest import IngestConfig
from pipeline.errors import EXIT_DONE, EXIT_INPUT, EXIT_STOPPED, InputError
from pipeline.ingestion.build import ingest
from pipeline.registry.tracking import connect
from pipeline.report.record import read_record
from pipeline.shards.index import read_index
from tests.pipeline.pages import Page

ASKED = LifecycleRequest("sklearn:digits", "birds", "pretrain_mae_digits", "finetune_digits")


def photos(folder: Path, count: int) -> Path:
    """Pictures without labels."""
    folder.mkdir()
    for number in range(count):
        Image.effect_noise((16, 16), 20 + number).convert("L").save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"name": "my birds"}, "lifecycle: name: "),
        ({"pretrain_recipe": "pretrain_mae_digit"}, "did you mean `pretrain_mae_digits`"),
        ({"pretrain_recipe": "finetune_digits"}, "this is a recipe of stage 'finetune', not pretrain"),
        ({"finetune_recipe": "pretrain_mae_digits"}, "this is a recipe of stage 'pretrain', not finetune"),
        ({"scratch_recipe": "finetune_digits"}, "this is a recipe of stage 'finetune', not pretrain"),
        ({"set": ["optimizer.lerning_rate=1"]}, "lerning_rate: no such key; did you mean `learning_rate`"),
        (
            {"finetune_set": ["optimizer.lerning_rate=1"]},
            "--finetune-set optimizer.lerning_rate: no such key; did you mean `learning_rate`",
        ),
        ({"set": ["profile.rank=1"]}, "profile.rank: no such key"),
        ({"ingest_set": ["label=x.csv"]}, "label: no such key; did you mean `labels`"),
        ({"profile": "lokal"}, "did you mean `local`"),
        ({"source": "/nowhere"}, "/nowhere: no such folder"),
        ({"finetune_set": ["global_batch_size=100"]}, "finetune_digits: global_batch_size 100 is not a multiple of"),
        ({"finetune_set": ["profile.ranks_per_node=3"]}, "finetune_digits: global_batch_size 64 is not a multiple of"),
        ({"finetune_set": ["initialise_from=/x"]}, "--finetune-set initialise_from: what was pretrained is fine-tuned"),
        ({"scratch_recipe": "pretrain_mae_digits"}, "learns no labels, so there is nothing to compare"),
        ({"scratch_recipe": "pretrain_supervised_vit_s16"}, "take a recipe of the same network"),
        ({"downstream": " "}, "--downstream is empty"),
        ({"downstream": "/nowhere"}, "/nowhere: no such dataset"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(home, changes, line):
    with pytest.raises(InputError) as refused:
        require_valid(replace(ASKED, **changes), home)
    assert len(refused.value.problems) == 1 and line in refused.value.problems[0], refused.value.problems
    assert not home.exists()


def test_settings_of_an_ingestion_are_refused_where_nothing_is_ingested(home, digits):
    require_valid(replace(ASKED, source=str(digits)), home)
    with pytest.raises(InputError, match="is a dataset, of which nothing is ingested"):
        require_valid(replace(ASKED, source=str(digits), ingest_set=["seed=1"]), home)


def test_images_without_labels_are_refused_before_the_pretraining(tmp_path, home, digits):
    require_downstream(read_index(digits), ASKED)
    ingest(str(photos(tmp_path / "photos", 12)), tmp_path / "plain", IngestConfig(splits="hash"))
    with pytest.raises(InputError, match="of `train` have none; give them .* or name a labelled dataset to"):
        require_downstream(read_index(tmp_path / "plain"), ASKED)
    with pytest.raises(InputError, match="have none"):
        require_valid(replace(ASKED, downstream=str(tmp_path / "plain")), home)


def test_images_of_several_classes_want_a_loss_of_them(tmp_path):
    rows = [f"{number}.png,{'a' if number % 2 else 'a;b'}" for number in range(12)]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(["path,labels", *rows]) + "\n")
    source = str(photos(tmp_path / "photos", 12))
    ingest(source, tmp_path / "several", IngestConfig(splits="hash", labels=str(labels)))
    index = read_index(tmp_path / "several")
    assert index.label_sets is not None
    with pytest.raises(InputError, match="have several classes each, and a softmax learns one"):
        require_downstream(index, ASKED)
    sigmoid = ["objective.loss=sigmoid", "objective.label_smoothing=0"]
    require_downstream(index, replace(ASKED, finetune_set=sigmoid))


def test_companions_share_the_processors_of_this_machine_and_elsewhere_have_the_profile(tmp_path):
    scratch = replace(ASKED, scratch_recipe="pretrain_supervised_digits", set=["profile.ranks_per_node=2", "steps=3"])
    settings, side_by_side = companion_settings(replace(scratch, set=["steps=3"]))
    assert side_by_side and {"profile.ranks_per_node=1", "micro_batch_size=64"} <= set(settings)
    assert "steps=3" not in settings
    on_slurm = replace(scratch, profile="slurm", set=["profile.nodes=2", "steps=3"])
    assert companion_settings(on_slurm) == (["profile.nodes=2"], False)
    settings, _ = companion_settings(replace(scratch, finetune_set=["global_batch_size=48"]))
    assert "micro_batch_size=16" in settings  # both batches are multiples of it


def test_years_on_processors_are_not_begun_unless_a_length_says_so(home, digits):
    years = replace(ASKED, pretrain_recipe="pretrain_mae_vit_b16", set=["micro_batch_size=2"])
    with pytest.raises(InputError, match="would take some .* here, without an accelerator; say how long"):
        pretraining_run(years, digits, home)
    assert not home.exists()
    assert pretraining_run(replace(years, set=["steps=1", "micro_batch_size=2"]), digits, home).config_file.is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_command_takes_images_to_a_registered_model_and_is_stopped_on_the_way(home, tmp_path, digits):
    command = [
        sys.executable, "-m", "flows", "lifecycle", str(photos(tmp_path / "photos", 40)), "--name", "scans",
        "--dir", str(home), "--pretrain-recipe", "pretrain_mae_digits", "--set", "steps=60", "--set",
        "optimizer.warmup=6", "--finetune-recipe", "finetune_digits", "--finetune-set", "steps=4",
        "--ingest-set", "splits=hash", "--ingest-set", "max_side=8",
    ]  # fmt: skip
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert refused.returncode == EXIT_INPUT and "name a labelled dataset" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr and not list((home / "runs").glob("*"))

    command += ["--downstream", str(digits)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as first:
        said = []
        for line in first.stdout:
            said.append(line)
            if line.startswith("step "):
                os.kill(first.pid, signal.SIGINT)
                break
        rest, _ = first.communicate(timeout=300)
    assert first.returncode == EXIT_STOPPED, "".join(said) + rest
    assert "the same command goes on" in rest and "Traceback" not in rest

    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == EXIT_DONE, done.stdout + done.stderr
    assert "registered: models:/scans/1" in done.stdout and ": attempt 2 runs as " in done.stdout
    record = read_record(home / "lifecycles" / "scans")
    assert record.downstream == str(digits) and record.data == str(home / "data" / "scans")
    text = Page((home / "lifecycles" / "scans" / "report.html").read_text()).text
    assert str(digits) in text and record.data in text and "Registered as models:/scans/1" in text
    assert connect(f"sqlite:///{home / 'mlflow.db'}").get_model_version("scans", "1").run_id
