"""Dense protocols as a person asks for them: a whole evaluation on two ranks, and one line for what cannot be meant."""

import csv
import json
import os
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

from flows.evaluating import table_lines
from flows.requests.evaluation import requested_evaluation
from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.build import ingest
from pipeline.run_directory import RunDirectory
from tests.pipeline.scenes import scene_dataset
from tests.ranks import run_on_ranks

BOTH = ("segment-linear-v1", "detect-linear-v1")
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": 3}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    count = {"train": 64, "validation": 12, "test": 21}
    return scene_dataset(tmp_path_factory.mktemp("scenes"), count, kinds=2).directory


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A timm directory with random weights and no head."""
    return timm_directory(tmp_path_factory.mktemp("network"), "vit_tiny_patch16_224", **SIZE)


def timm_directory(directory: Path, name: str, **arguments) -> Path:
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=0, **arguments)
    data = {"input_size": (3, 32, 32), "mean": (0.1,) * 3, "std": (0.3,) * 3, "interpolation": "bicubic",
            "crop_pct": 1.0, "crop_mode": "center", "fixed_input_size": True}  # fmt: skip
    model.pretrained_cfg |= data
    config = {"architecture": name, "pretrained_cfg": data, "model_args": arguments, "num_classes": 0}
    save_for_hf(model, str(directory), model_config=config, safe_serialization=True)
    return directory


def requested(network: Path, data: Path | None, home: Path, *protocols: str, settings=(), suite: str | None = None):
    return requested_evaluation({"model": str(network)}, data=data and str(data), protocols=protocols, suite=suite,
                                profile="local", overrides=settings, run_dir=None, home=home)  # fmt: skip


def rank_of(folder: str) -> None:
    from pipeline.evaluation import job
    from pipeline.rank import Rank

    job.dense_scores = partial(job.dense_scores, steps=200)  # a fifth of the protocol's, to be done sooner
    run = RunDirectory(folder)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    job.evaluate(Rank(run, run.attempt(1).make(), *(int(os.environ[name]) for name in names)))


@pytest.mark.slow
def test_a_dataset_of_masks_and_boxes_alone_is_scored_by_both_on_both_splits(network, scenes, home):
    settings = ["profile.ranks_per_node=2", "bootstrap_samples=100", "batch_size=8"]
    run = requested(network, scenes, home, settings=settings).write()  # no protocol named, and no labels
    run_on_ranks(rank_of, 2, str(run.path))
    result = json.loads(run.result_file.read_text())
    metrics, intervals = result["metrics"]["model"], result["intervals"]["model"]
    assert {key.split("/")[1] for key in metrics} == set(BOTH)
    assert metrics["eval/segment-linear-v1/dataset/count"] == 21 == result["datasets"]["dataset"]["count"]
    assert metrics["eval/detect-linear-v1/dataset.validation/count"] == 12
    for key in ("segment-linear-v1/dataset/mean_iou", "detect-linear-v1/dataset/ap50", "detect-linear-v1/dataset/ap"):
        low, high = intervals[f"eval/{key}"]
        assert 0 < low < high < 1 and 0.03 < metrics[f"eval/{key}"] < 1, key
    words = "\n".join(table_lines(result))
    assert "mean_iou" in words and "ap50" in words
    with open(run.path / "scores/model/segment-linear-v1--dataset/per_class.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["ground", "digit 0", "digit 1"] and float(rows[0]["iou"]) > 0.5
    assert (run.path / "scores/model/detect-linear-v1--dataset/per_class.csv").is_file()
    assert not (run.path / "patches").exists(), "patch tokens do not stay"


def test_what_a_dense_protocol_lacks_is_one_line(network, scenes, digits, home, tmp_path):
    for protocol, what in (("segment-linear-v1", "masks"), ("detect-linear-v1", "boxes")):
        with pytest.raises(InputError, match=f"digits: {protocol} needs {what}, and the dataset has none") as caught:
            requested(network, digits, home, protocol)
        assert len(caught.value.problems) == 1
    with pytest.raises(InputError, match="evaluation needs labels"):
        requested(network, scenes, home, "segment-linear-v1", "knn-20-v1")
    swin = timm_directory(tmp_path / "swin", "swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=24,
                          depths=(1, 1), num_heads=(1, 1))  # fmt: skip
    with pytest.raises(InputError, match="reads patch tokens of a plain ViT, and this is timm:swin"):
        requested(swin, scenes, home, "segment-linear-v1")


def test_without_a_train_split_there_is_nothing_to_learn_from(network, scenes, home, tmp_path):
    source = scenes.parent / "scenes"
    config = IngestConfig(masks=source / "masks", splits={"test": _listed(tmp_path, source)})
    data = ingest(str(source / "images"), tmp_path / "untrained", config).directory
    with pytest.raises(InputError, match="segment-linear-v1 learns from `train`, and there are: test"):
        requested(network, data, home, "segment-linear-v1")


def test_a_suite_leaves_out_what_has_no_masks_and_takes_unlabelled_scenes(network, scenes, digits, home, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"""
datasets:
  scenes: {{data: {scenes}}}
  digits: {{data: {digits}}}
protocols: [segment-linear-v1]
""")
    evaluation = requested(network, None, home, suite=str(suite))
    assert list(evaluation.indexes) == ["scenes"] and "needs masks" in evaluation.raw["unavailable"]["digits"]


def _listed(folder: Path, source: Path) -> Path:
    path = folder / "test.txt"
    path.write_text("\n".join(f"test/{file.name}" for file in sorted((source / "images/test").iterdir())))
    return path
