"""Whole evaluations and embeddings on real ranks: exact, comparable with timm's own loop, and never done twice."""

import json
import os
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from timm.models._hub import save_for_hf

from flows.evaluating import group_means, table_lines
from flows.requests.embedding import embedding_run
from flows.requests.evaluation import requested_evaluation
from flows.requests.named import described_model
from pipeline.config.evaluation import EvaluateConfig
from pipeline.embedding.store import begin_store, file_of, nearest, write_shard
from pipeline.errors import InputError
from pipeline.evaluation.feature_cache import feature_key, keep_features, read_features
from pipeline.evaluation.features import SplitFeatures
from pipeline.run_directory import RunDirectory
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from tests.pipeline.loading.test_left_out import take_down
from tests.ranks import run_on_ranks

ONE_RANK = ["profile.ranks_per_node=1"]
SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": 3}


def rank_of(folder: str, stage: str) -> None:
    """Carry out a stage that is on disk, in this process."""
    import importlib

    from pipeline.rank import Rank

    run = RunDirectory(folder)
    attempt = run.attempt(1).make()
    me = Rank(run, attempt, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]))
    module, _, function = stage.partition(":")
    getattr(importlib.import_module(module), function)(me)


def carried_out(run: RunDirectory, stage: str = "pipeline.evaluation.job:evaluate") -> dict:
    run_on_ranks(rank_of, run.plan()["world_size"], str(run.path), stage)
    return json.loads(run.result_file.read_text())


def timm_inputs(model: torch.nn.Module, digits: Path, split: str) -> torch.Tensor:
    """All images of a split as timm's own evaluation makes inputs of them."""
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    reader = ShardReader(read_index(digits), split)
    return torch.stack([
        transform(Image.open(BytesIO(reader.read(shard, sample).image)).convert("RGB"))
        for shard, size in enumerate(reader.shard_sizes) for sample in range(int(size))
    ])  # fmt: skip


@pytest.fixture(scope="module")
def network(tmp_path_factory, digits) -> Path:
    """A timm directory with random weights and a head for the digits, its bias such that all ten are decided for."""
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SIZE)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    data = {"input_size": (3, 16, 16), "mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic",
            "crop_pct": 0.9, "crop_mode": "center", "fixed_input_size": True}  # fmt: skip
    directory = tmp_path_factory.mktemp("network")
    model.pretrained_cfg |= data
    with torch.no_grad():
        model.head.bias -= model.eval()(timm_inputs(model, digits, "train")).mean(dim=0)
    config = {"pretrained_cfg": data, "model_args": SIZE, "label_names": [str(one) for one in range(10)]}
    save_for_hf(model, str(directory), model_config=config, safe_serialization=True)
    return directory


def requested(network: Path, data: Path, home: Path, *protocols: str, settings=ONE_RANK, **other):
    return requested_evaluation({"model": str(network)}, data=str(data), protocols=protocols, profile="local",
                                overrides=settings, run_dir=None, home=home, **other)  # fmt: skip


@pytest.mark.slow
def test_decisions_are_those_of_a_plain_timm_loop(network, digits, home):
    run = requested(network, digits, home, "classify-v1").write()
    result = carried_out(run)
    ours = load_file(run.path / result["predictions"]["model"]["eval/classify-v1/digits"])["predicted"]

    model = timm.create_model(f"local-dir:{network}", pretrained=True).eval()
    with torch.inference_mode():
        theirs = model(timm_inputs(model, digits, "test")).argmax(dim=1)
    assert len(set(theirs.tolist())) > 3, "the decisions say something"
    assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_every_protocol_of_a_frozen_model_has_a_score_and_files_a_person_reads(network, digits, home):
    protocols = ["classify-v1", "calibration-v1", "knn-20-v1", "linear-cached-v1", "fewshot-lsr-v1", "retrieval-v1"]
    run = requested(network, digits, home, *protocols, settings=["profile.ranks_per_node=2"]).write()
    result = carried_out(run)
    metrics, intervals = result["metrics"]["model"], result["intervals"]["model"]
    for protocol in protocols:
        assert metrics[f"eval/{protocol}/digits/count"] == 355
    low, high = intervals["eval/knn-20-v1/digits/top1"]
    assert low < metrics["eval/knn-20-v1/digits/top1"] < high
    folder = run.path / "scores/model/linear-cached-v1--digits"
    assert {path.name for path in folder.iterdir()} == {
        "per_class.csv", "confusion.csv", "confusion.png", "worst.csv", "worst.png", "predictions.safetensors"
    }  # fmt: skip
    assert (run.path / "table.csv").read_text().startswith("model,dataset,protocol,metric,value,low,high")
    assert result["datasets"]["digits"]["fingerprint"] == read_index(digits).fingerprint == result["data_fingerprint"]


@pytest.mark.slow
def test_features_are_made_once_for_the_same_weights_and_anew_for_others(network, digits, home):
    first = carried_out(requested(network, digits, home, "knn-20-v1").write())
    kept = {path: path.stat().st_mtime_ns for path in (home / "cache/features").iterdir()}
    assert len(kept) == 2  # train and test
    damaged, whole = sorted(kept)
    damaged.write_bytes(damaged.read_bytes()[:100])
    content = whole.read_bytes()
    again = carried_out(requested(network, digits, home, "knn-20-v1", "retrieval-v1").write())
    assert (
        again["metrics"]["model"]["eval/knn-20-v1/digits/top1"]
        == first["metrics"]["model"]["eval/knn-20-v1/digits/top1"]
    )
    assert whole.read_bytes() == content and damaged.stat().st_size > 100, "the damaged file was made again"
    random = requested_evaluation({"random": f"random:{network}"}, data=str(digits), protocols=["knn-20-v1"],
                                  profile="local", overrides=ONE_RANK, run_dir=None, home=home).write()  # fmt: skip
    carried_out(random)
    assert len(list((home / "cache/features").iterdir())) == 4


@pytest.mark.slow
def test_samples_that_were_taken_down_are_not_scored_and_nothing_pairs_with_scores_from_before(
    network, digits, home, tmp_path
):
    data = Path(shutil.copytree(digits, tmp_path / "digits"))
    before = carried_out(requested(network, data, home, "knn-20-v1", "classify-v1").write())
    take_down(data, (0, 3), (0, 9), split="test")
    take_down(data, (0, 1), split="train")
    run = requested(network, data, home, "knn-20-v1", "classify-v1").write()
    after = carried_out(run)
    name = "eval/classify-v1/digits"
    assert before["metrics"]["model"][f"{name}/count"] == 355 and after["metrics"]["model"][f"{name}/count"] == 353
    assert (after["datasets"]["digits"]["count"], after["datasets"]["digits"]["left_out"]) == (353, 2)
    assert before["data_fingerprint"] == read_index(digits).fingerprint != after["data_fingerprint"]
    labels = load_file(run.path / after["predictions"]["model"][name])["labels"].tolist()
    whole = ShardReader(read_index(digits), "test").labels(0).tolist()
    assert labels == [label for place, label in enumerate(whole) if place not in (3, 9)]


@pytest.mark.slow
def test_a_suite_is_one_table_and_names_what_it_could_not_read(network, digits, home, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"""
datasets:
  digits: {{data: {digits}, group: small}}
  gone: {{data: {tmp_path / "gone"}}}
protocols: [classify-v1, knn-20-v1]
models: {{random weights: "random:{network}"}}
""")
    evaluation = requested_evaluation({"model": str(network)}, data=None, protocols=[], suite=str(suite),
                                      profile="local", overrides=ONE_RANK, run_dir=None, home=home)  # fmt: skip
    result = carried_out(evaluation.write())
    assert "eval/classify-v1/digits/top1" not in result["metrics"]["random weights"]  # it has no head
    assert "no such dataset" in result["unavailable"]["gone"]
    assert (
        group_means(result)["model"]["eval/knn-20-v1/small/mean"]
        == result["metrics"]["model"]["eval/knn-20-v1/digits/top1"]
    )
    lines = list(table_lines(result))
    assert lines[0].split() == ["protocol", "dataset", "metric", "model", "random", "weights"]
    assert any(line.startswith("gone: left out") for line in lines)


@pytest.mark.parametrize(("protocols", "message"), [
    (["knn-10-v1"], "protocol `knn-10-v1` does not exist; did you mean `knn-20-v1`"),
    (["linear-cached-v2"], "protocol `linear-cached-v2` does not exist; did you mean `linear-cached-v1`"),
])  # fmt: skip
def test_a_protocol_that_does_not_exist_is_answered_with_the_near_ones(network, digits, home, protocols, message):
    with pytest.raises(InputError, match=message):
        requested(network, digits, home, *protocols)


def test_a_head_that_is_not_there_or_knows_other_classes_is_named(network, digits, home, tmp_path):
    with pytest.raises(InputError, match="scores a model's own head, and model has none"):
        requested_evaluation({"model": f"random:{network}"}, data=str(digits), protocols=["classify-v1"],
                             profile="local", overrides=[], run_dir=None, home=home)  # fmt: skip
    other = tmp_path / "other"
    other.mkdir()
    for file in network.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    config["label_names"] = ["cat", "dog", *config["label_names"][2:]]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"its head does not know 2 \(0, 1\) of the dataset's 10 classes"):
        requested(other, digits, home, "classify-v1")
    assert requested(other, digits, home).config().datasets["digits"].protocols == ("knn-20-v1", "linear-cached-v1")


def test_a_config_of_before_suites_still_loads():
    old = {"models": {"a": "b"}, "data": "/d", "dataset": "d", "protocols": ["knn-20-v1"], "split": "test"}
    config = EvaluateConfig.model_validate(old)
    assert config.datasets["d"].path == "/d" and config.splits == ("test",)


def embedding(network: Path, digits: Path, folder: Path, home: Path, *, ranks: int, queries=(), settings=()):
    overrides = [f"profile.ranks_per_node={ranks}", "splits=[test,train]", *settings]
    return embedding_run(str(network), str(folder), data=str(digits), queries=queries, profile="local",
                         overrides=overrides, home=home)  # fmt: skip


@pytest.mark.slow
def test_embeddings_go_on_where_they_were_at_any_number_of_ranks(network, digits, home, tmp_path):
    import pyarrow.parquet as pq

    folder, stage = tmp_path / "embeddings", "pipeline.embedding.job:embed"
    result = carried_out(embedding(network, digits, folder, home, ranks=2), stage)
    assert (result["images"], result["made"], result["dimensions"]) == (1797, 1797, 32)
    index = read_index(digits)
    first = file_of(folder, index.shards("train")[0].name)
    before = pq.read_table(first)
    assert before["key"].to_pylist() == ShardReader(index, "train").keys(0)
    others = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet") if path != first}
    first.unlink()
    (folder / ".tmp-1-train-000000.parquet").write_bytes(b"left by a killed rank")
    tar = ShardReader(index, "test").read(0, 5)
    query = tmp_path / "query.png"
    query.write_bytes(tar.image)
    result = carried_out(embedding(network, digits, folder, home, ranks=1, queries=[str(query)]), stage)
    assert result["made"] == before.num_rows
    assert {path: path.stat().st_mtime_ns for path in others} == others
    again = pq.read_table(first)
    assert again.drop(["embedding"]).equals(before.drop(["embedding"]))
    rows = [np.array(table["embedding"].to_pylist()) for table in (before, again)]
    assert np.allclose(*rows, atol=1e-5)
    nearest = result["nearest"][str(query)][0]
    assert nearest["key"] == tar.key and nearest["similarity"] == pytest.approx(1.0, abs=1e-5)


def test_embeddings_of_another_model_are_not_mixed_in(tmp_path):
    begin_store(tmp_path / "store", {"weights": "a"})
    begin_store(tmp_path / "store", {"weights": "a"})
    with pytest.raises(InputError, match="holds other embeddings .*choose another DEST"):
        begin_store(tmp_path / "store", {"weights": "b"})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="is not empty and holds no embeddings"):
        begin_store(tmp_path / "photos", {"weights": "a"})


def test_what_killed_writers_left_is_not_in_the_way_of_an_embedding_and_goes_after_a_day(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / ".embeddings.json.77.tmp").write_text("{")
    begin_store(folder, {"weights": "a"})
    old, new = folder / ".tmp-7-train-000000.parquet", folder / ".tmp-8-train-000000.parquet"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    begin_store(folder, {"weights": "a"})
    assert new.exists() and not old.exists()
    write_shard(folder, "train-000000.tar", "train", [], np.empty(0, np.int64), (), np.empty((0, 2), np.float32))
    write_shard(folder, "train-000001.tar", "train", ["a"], np.array([-1]), (), np.array([[1, 2]], np.float32))
    assert [[one.key for one in of_query] for of_query in nearest(folder, np.ones((1, 2)), 3)] == [["a"]]


def test_a_query_is_read_first_and_a_shard_that_is_all_taken_down_is_done(network, digits, home, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    folder, stage, text = tmp_path / "embeddings", "pipeline.embedding.job:embed", tmp_path / "query.txt"
    text.write_text("no image")
    data = Path(shutil.copytree(digits, tmp_path / "digits"))
    take_down(data, *((0, sample) for sample in range(read_index(data).shards("test")[0].samples)), split="test")
    with pytest.raises(InputError, match=r"--query `.*query.txt`: cannot be read as an image"):
        rank_of(str(embedding(network, data, folder, home, ranks=1, queries=[str(text)]).path), stage)
    assert not folder.exists()
    for made in (1442, 0):
        run = embedding(network, data, folder, home, ranks=1)
        rank_of(str(run.path), stage)
        result = json.loads(run.result_file.read_text())
        assert (result["images"], result["made"]) == (1442, made)
        run.result_file.unlink()


def described_as(network: Path, directory: Path, lineage: dict) -> Path:
    """A copy of a timm directory that says where it comes from."""
    directory.mkdir()
    for file in network.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vit": {"lineage": lineage}}))
    return directory


def test_forgetting_is_the_old_protocols_before_and_after_on_what_the_parent_learned_from(
    network, digits, home, tmp_path
):
    parent = described_as(network, tmp_path / "parent", {"datasets": [{"path": str(digits), "fingerprint": "f"}]})
    child = described_as(network, tmp_path / "child", {"parent": str(parent)})

    def forgetting(model: Path, **other):
        return requested_evaluation({"model": str(model)}, protocols=["forgetting-v1"], profile="local", overrides=[],
                                    run_dir=None, home=home, **({"data": None} | other))  # fmt: skip

    config = forgetting(child).config()
    assert config.models == {"before": str(parent), "after": str(child)}
    assert config.datasets["digits"].protocols == ("knn-20-v1", "linear-cached-v1")
    with pytest.raises(InputError, match="was initialised from no other model"):
        forgetting(parent)
    with pytest.raises(InputError, match="leave --data and others out"):
        forgetting(child, data=str(digits))
    orphan = described_as(network, tmp_path / "orphan", {"parent": str(network)})
    with pytest.raises(InputError, match="does not say what data it learned from"):
        forgetting(orphan)


def test_the_limit_of_the_features_is_read_before_they_are_made_and_old_halves_go(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_FEATURE_CACHE_BYTES", "20GB")
    with pytest.raises(InputError, match="VIT_FEATURE_CACHE_BYTES=20GB: not a number of bytes"):
        read_features(tmp_path, "key")
    monkeypatch.setenv("VIT_FEATURE_CACHE_BYTES", "0")  # the newest stays all the same
    old, new = tmp_path / "a.partial-7", tmp_path / "b.partial-8"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    rows = SplitFeatures(torch.ones(2, 3), torch.ones(2, 1), torch.zeros(2, dtype=torch.int64))
    keep_features(tmp_path, "key", rows)
    assert new.exists() and not old.exists() and torch.equal(read_features(tmp_path, "key").features, rows.features)


def test_features_of_another_pillow_are_others(network, digits, home, monkeypatch):
    source, index = described_model(str(network), home, instead=""), read_index(digits)
    model = torch.nn.Linear(2, 2)
    keys = [feature_key(model, source, index, "test", "fp32", True) for _ in range(2)]
    monkeypatch.setattr("PIL.__version__", "0.1")
    assert keys[0] == keys[1] != feature_key(model, source, index, "test", "fp32", True)
