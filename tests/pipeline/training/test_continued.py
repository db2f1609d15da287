"""Pretraining that goes on from another model: what it takes over, and what it says of where it comes from."""

import json

import pytest
import torch

from flows.requests.registration import registration_run
from pipeline.checkpoints.files import read_weights
from pipeline.config.stages import read_run_config
from pipeline.rank import Rank
from pipeline.registry.locate import locate_model
from pipeline.run_directory import RunDirectory, read_json
from pipeline.shards.index import read_index
from pipeline.training.loop import initial_module
from tests.pipeline.pictures import small_dataset
from tests.pipeline.training.runs import new_run, train_until
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow
SMALL = ("encoder.image_size=16", "encoder.patch_size=4", "encoder.depth=2", "steps=2")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    return [small_dataset(folder / name, per_class).directory for name, per_class in (("first", 20), ("second", 15))]


@pytest.fixture(scope="module")
def parent(tmp_path_factory, datasets) -> RunDirectory:
    run = new_run(tmp_path_factory.mktemp("parent"), str(datasets[0]), *SMALL, "optimizer.learning_rate=0.01", ranks=1)
    assert run_on_ranks(train_until, 1, str(run.path), 1, 99) == ["done"]
    return run


def child_of(folder, model: str, data, *settings: str) -> RunDirectory:
    return new_run(folder, str(data), *SMALL, f"initialise_from={model}", *settings, ranks=1)


def started(run: RunDirectory) -> dict[str, torch.Tensor]:
    return initial_module(read_run_config(run.path), run.plan()).state_dict()


def test_the_encoder_and_the_decoder_of_a_run_of_the_same_objective_go_on(tmp_path, parent, datasets):
    weights, fresh = read_weights(parent.newest_checkpoint()), started(new_run(tmp_path, str(datasets[1]), *SMALL))
    begun = started(child_of(tmp_path / "child", str(parent.path), datasets[1]))
    learned = [name for name, tensor in weights.items() if not torch.equal(tensor, fresh[name])]
    assert any(name.startswith("decoder.") for name in learned) and "mask_token" in " ".join(learned)
    assert all(torch.equal(begun[name], tensor) for name, tensor in weights.items())


def test_at_another_resolution_the_decoder_goes_on_with_positions_of_its_own_grid(tmp_path, parent, datasets):
    weights = read_weights(parent.newest_checkpoint())
    begun = started(child_of(tmp_path, str(parent.path), datasets[1], "encoder.image_size=32"))
    assert begun["decoder.pos_embed"].shape != weights["decoder.pos_embed"].shape
    trained = [name for name in weights if name.startswith("decoder.") and name != "decoder.pos_embed"]
    assert trained and all(torch.equal(begun[name], weights[name]) for name in trained)


def test_another_decoder_begins_anew_as_a_whole(tmp_path, parent, datasets):
    weights = read_weights(parent.newest_checkpoint())
    depth = read_run_config(parent.path).objective.decoder.depth
    begun = started(child_of(tmp_path, str(parent.path), datasets[1], f"objective.decoder.depth={depth + 1}"))
    assert torch.equal(begun["encoder.blocks.1.mlp.fc2.weight"], weights["encoder.blocks.1.mlp.fc2.weight"])
    assert not torch.equal(begun["decoder.predict.weight"], weights["decoder.predict.weight"])


def test_plan_provenance_and_model_of_a_child_name_its_parent_and_the_parents_data(tmp_path, parent, datasets):
    child = child_of(tmp_path, str(parent.path), datasets[1])
    first, second = (read_index(path) for path in datasets)
    source = child.plan()["initialise_from"]
    assert source["lineage"]["datasets"] == [{"path": str(datasets[0]), "fingerprint": first.fingerprint}]
    assert json.loads(child.provenance_file.read_text())["parent"] == str(parent.newest_checkpoint().directory)
    assert run_on_ranks(train_until, 1, str(child.path), 1, 99) == ["done"]
    lineage = locate_model(str(child.path), tracking_uri="", home=tmp_path).lineage
    assert lineage["parent"] == str(parent.newest_checkpoint().directory)  # the run itself may train on
    assert lineage["datasets"] == [{"path": str(datasets[1]), "fingerprint": second.fingerprint}]


def register_on_rank(run_path: str) -> None:
    from pipeline.registration.publish import register

    run = RunDirectory(run_path)
    register(Rank(run, run.attempt(1).make(), 0, 0, 1))


def test_a_registered_version_is_continued_and_its_child_names_it_and_its_data(tmp_path, home, parent, datasets):
    asked = registration_run(str(parent.path), "parent", home=home)
    run_on_ranks(register_on_rank, 1, str(asked.path))
    version, reference = read_json(asked.result_file)["uri"], "models:/parent@champion"
    uri = f"sqlite:///{home}/mlflow.db"
    child = new_run(home.parent, str(datasets[1]), *SMALL, f"initialise_from={reference}", ranks=1)
    source = child.plan()["initialise_from"]
    assert source["reference"] == reference and source["lineage"]["run"] == str(parent.path)
    assert source["lineage"]["datasets"][0]["path"] == str(datasets[0])
    weights, begun = read_weights(parent.newest_checkpoint()), started(child)
    assert torch.equal(begun["encoder.blocks.0.mlp.fc1.weight"], weights["encoder.blocks.0.mlp.fc1.weight"])
    assert not torch.equal(begun["decoder.predict.weight"], weights["decoder.predict.weight"])  # it has no decoder
    assert run_on_ranks(train_until, 1, str(child.path), 1, 99) == ["done"]
    asked = registration_run(str(child.path), "child", home=home)
    run_on_ranks(register_on_rank, 1, str(asked.path))
    registered = locate_model(read_json(asked.result_file)["uri"], tracking_uri=uri, home=home)
    assert registered.lineage["parent"] == version == "models:/parent/1"  # the alias may move
