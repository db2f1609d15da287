"""Where a model comes from: what is here, what is gone and who tells of it, and what cannot be made again."""

import json
import shutil
import subprocess

import pytest

from pipeline.errors import InputError
from pipeline.lineage.containment import Asker, answer_lines
from pipeline.lineage.matches import read_query
from pipeline.lineage.reproduction import _Script, reproduction
from pipeline.lineage.takedown import Descendants, Place, places_in, places_of
from pipeline.lineage.trail import Trail, ancestors
from pipeline.lineage.tree import tree_lines
from pipeline.registry.locate import ModelSource
from pipeline.run_directory import read_json, write_json
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from tests.pipeline.training.runs import new_run

STEP = 24


def source_of(run, **lineage) -> ModelSource:
    """As `locate_model` gives it, of a run whose checkpoint is not looked at here."""
    plan = run.plan()
    known = {"run": str(run.path), "step": STEP, "data_fingerprint": plan["data"]["fingerprint"]}
    known |= {"config_sha256": plan["config_sha256"]}
    return ModelSource(str(run.path), "checkpoint", str(run.path / "checkpoints"), lineage=known | lineage)


@pytest.fixture
def family(pictures, tmp_path):
    """A run that began from another, as its plan and provenance say."""
    parent = new_run(tmp_path / "one", str(pictures))
    child = new_run(tmp_path / "two", str(pictures), "seed=7")
    from pipeline.lineage.trail import ancestors_of_plan

    plan = child.plan() | {"initialise_from": source_of(parent).as_dict()}
    write_json(child.plan_file, plan)
    write_json(child.provenance_file, read_json(child.provenance_file) | {"ancestors": ancestors_of_plan(plan)})
    return parent, child


@pytest.fixture
def image(pictures, tmp_path):
    reader = ShardReader(read_index(pictures), "train")
    sample = reader.read(4, 2)
    path = tmp_path / f"photo.{sample.extension}"
    path.write_bytes(sample.image)
    return path, sample.key


def test_everything_is_found_by_the_run_directories(family, tmp_path):
    parent, child = family
    node = Trail(tmp_path).of(source_of(child))
    above = node["parents"][0]
    assert [one["role"] for one in ancestors(node)] == ["model", "parent"]
    assert above["run"]["path"] == str(parent.path) and above["run"]["here"] and not above["notes"]
    assert node["data"][0]["here"] and node["data"][0]["certificate"].endswith("/certificate.json")
    assert above["config"]["content"]["seed"] == 0 and node["config"]["content"]["seed"] == 7
    assert json.loads(json.dumps(node)) == node
    text = "\n".join(tree_lines(node))
    for word in (node["data"][0]["fingerprint"], node["code"]["commit"], "certificate", "parent", str(parent.path)):
        assert word in text


def test_a_parent_that_is_gone_is_named_and_what_came_of_it_tells_the_rest(family, image, tmp_path):
    parent, child = family
    before = Trail(tmp_path).of(source_of(child))
    shutil.rmtree(parent.path)
    node = Trail(tmp_path).of(source_of(child))
    above = node["parents"][0]
    assert f"run directory {parent.path} is gone; what came of it recorded" in above["notes"][0]
    for key in ("config", "code", "data", "reading", "profile"):
        assert above[key] == before["parents"][0][key]
    path, key = image
    answers = Asker(read_query(str(path)), tmp_path).answers(node)
    assert [answer["answer"] for answer in answers] == ["yes", "yes"]
    assert answers[0]["matches"][0]["key"] == key and answers[0]["matches"][0]["how"] == "bytes"
    assert answers[0]["matches"][0]["steps"] != answers[1]["matches"][0]["steps"]  # other seeds
    assert reproduction(node).count("uv run vit pretrain") == 2


def test_where_nobody_recorded_the_parent_that_is_said_and_nothing_is_made_up(family, image, tmp_path):
    parent, child = family
    write_json(child.provenance_file, read_json(child.provenance_file) | {"ancestors": {}})  # as older runs are
    shutil.rmtree(parent.path)
    node = Trail(tmp_path).of(source_of(child))
    text = "\n".join(tree_lines(node))
    assert f"{parent.path}, which is gone" in text and "little of it is recorded" in text and "random" not in text
    answer = Asker(read_query(str(image[0])), tmp_path).answer(node["parents"][0])
    assert answer["answer"] == "unknown" and "cannot be answered" in answer_lines(answer)[0]
    with pytest.raises(InputError, match="not recorded"):
        reproduction(node)


def test_another_run_at_the_same_path_is_not_taken_for_it(family, tmp_path):
    parent, child = family
    write_json(parent.plan_file, parent.plan() | {"data": parent.plan()["data"] | {"fingerprint": "f" * 64}})
    above = Trail(tmp_path).of(source_of(child))["parents"][0]
    assert "holds another run now" in above["notes"][0] and above["data"][0]["here"]


def test_a_dataset_that_moved_into_the_home_is_found_and_one_that_is_gone_is_said(pictures, image, tmp_path):
    data, home = tmp_path / "set", tmp_path / "home"
    shutil.copytree(pictures, data)
    run = new_run(tmp_path, str(data))
    node = Trail(home).of(source_of(run))
    shutil.move(data, home / "data" / "elsewhere")
    assert Trail(home).of(source_of(run))["data"][0]["found"] == f"moved to {home / 'data' / 'elsewhere'}"
    assert Asker(read_query(str(image[0])), home).answer(node)["answer"] == "yes"
    shutil.rmtree(home / "data")
    answer = Asker(read_query(str(image[0])), home).answer(node)
    assert answer["answer"] == "unknown" and "not reachable" in answer["reason"]


def test_an_image_that_is_nowhere_and_one_of_a_split_that_is_not_trained_on(image, tmp_path):
    from tests.pipeline.lineage.test_likeness import scene
    from tests.pipeline.pictures import encoded, small_dataset

    directory = small_dataset(tmp_path, splits="hash", split_fractions={"train": 0.6, "test": 0.4}).directory
    run = new_run(tmp_path, str(directory), "validation.every_steps=0")
    node = Trail(tmp_path).of(source_of(run))
    foreign, test = tmp_path / "foreign.png", tmp_path / "test.jpg"
    foreign.write_bytes(encoded(scene(1), "PNG"))
    test.write_bytes(ShardReader(read_index(directory), "test").read(0, 0).image)
    lines = answer_lines(Asker(read_query(str(foreign)), tmp_path).answer(node))
    assert len(lines) == 1 and ": no: none of the " in lines[0]
    no = Asker(read_query(str(test)), tmp_path).answer(node)
    assert no["answer"] == "no" and "split test: not trained on" in no["matches"][0]["words"]


def test_a_script_has_no_holes_where_code_was_changed_and_the_change_was_not_kept(family, tmp_path):
    _, child = family
    node = Trail(tmp_path).of(source_of(child))
    node["code"] = {"commit": "c" * 40, "dirty": True, "diff_sha256": "d" * 64, "diff": None, "untracked": []}
    with pytest.raises(InputError, match="the difference .* was not kept"):
        reproduction(node)


def test_weights_that_were_not_trained_here_have_a_trail_that_ends_and_no_script(image, tmp_path):
    node = Trail(tmp_path).of(ModelSource("timm:vit_tiny_patch16_224", "timm", "vit_tiny_patch16_224"))
    assert "its history ends" in node["notes"][0] and not node["parents"]
    assert Asker(read_query(str(image[0])), tmp_path).answer(node)["answer"] == "unknown"
    with pytest.raises(InputError, match="its history ends"):
        reproduction(node)


def test_a_copy_in_other_shards_is_asked_and_taken_down_by_its_own_places(tmp_path):
    from tests.pipeline.pictures import small_dataset

    whole = small_dataset(tmp_path / "a", samples_per_shard=10_000).directory
    cut = small_dataset(tmp_path / "b", samples_per_shard=9).directory
    one, many = read_index(whole), read_index(cut)
    assert one.fingerprint == many.fingerprint and len(one.shards("train")) == 1 < len(many.shards("train"))
    parent, child = new_run(tmp_path / "one", str(whole)), new_run(tmp_path / "two", str(cut), "seed=7")
    write_json(child.plan_file, child.plan() | {"initialise_from": source_of(parent).as_dict()})
    reader, photo = ShardReader(many, "train"), tmp_path / "photo.png"
    sample = reader.read(2, 1)
    photo.write_bytes(sample.image)
    node = Trail(tmp_path).of(source_of(child))
    answers = Asker(read_query(str(photo)), tmp_path).answers(node)
    alone = Asker(read_query(str(photo)), tmp_path).answer(node["parents"][0])
    assert answers[1] == alone and alone["answer"] == "yes" and alone["matches"][0]["key"] == sample.key
    found = places_in(one, many, [Place("train", 2, 1)])
    assert found == places_of(one, sample.key) and found != [Place("train", 2, 1)]
    descendants = Descendants(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    words, certain = descendants._read_by(node["parents"][0], many, [Place("train", 2, 1)])
    assert certain and alone["matches"][0]["words"].endswith(words[0])


def test_a_registered_model_tells_of_its_run_and_of_foreign_parents_when_the_run_is_gone(pictures, tmp_path):
    run = new_run(tmp_path, str(pictures))
    foreign = ModelSource("timm:vit_tiny_patch16_224", "timm", "vit_tiny_patch16_224")
    write_json(run.plan_file, run.plan() | {"initialise_from": foreign.as_dict()})
    before = Trail(tmp_path).of(source_of(run))
    artifact = tmp_path / "hf"
    artifact.mkdir()
    write_json(artifact / "provenance.json", {"trail": Trail().of(source_of(run))})
    lineage = source_of(run).lineage | {"registered": "models:/birds/3"}
    shutil.rmtree(run.path)
    node = Trail(tmp_path).of(ModelSource("models:/birds@champion", "timm_directory", str(artifact), lineage=lineage))
    assert "the registry says what follows" in node["notes"][0] and node["registered"] == "models:/birds/3"
    assert node["parents"] == before["parents"] and "its history ends" in node["parents"][0]["notes"][0]
    assert node["run"] == before["run"] | {"here": False} and node["reading"] == before["reading"]
    assert "--set initialise_from=timm:vit_tiny_patch16_224" in reproduction(node)


@pytest.mark.parametrize("odd", ["text with VIT_END in it\n\n", "bytes \udcff\udcfe\n", "$HOME `date` \\ 'quoted'\n"])
def test_a_file_in_the_script_comes_out_as_it_went_in(odd, tmp_path):
    script = _Script("a model")
    script.lines = []
    script.write(str(tmp_path / "out"), odd)
    subprocess.run(["sh"], input="\n".join(script.lines).encode(), check=True, cwd=tmp_path)
    assert (tmp_path / "out").read_bytes() == odd.encode("utf-8", "surrogateescape")


def test_a_key_that_is_not_there_is_answered_with_the_near_ones(pictures, image):
    index, (_, key) = read_index(pictures), image
    assert [(place.split, place.shard, place.sample) for place in places_of(index, key)] == [("train", 4, 2)]
    with pytest.raises(InputError, match=f"did you mean .*{key}"):
        places_of(index, key + "x")
