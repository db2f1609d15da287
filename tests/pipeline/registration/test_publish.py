"""A version is whole or is not there, is made once, and becomes champion only through the gate."""

import mlflow
import numpy as np
import pytest

from pipeline.errors import FaultError, InputError
from pipeline.registration import promotion, upload
from pipeline.registry.locate import locate_model
from pipeline.registry.test_reads import read_key, record_test_read, recorded_reads
from pipeline.registry.weights import load_model
from pipeline.run_directory import read_json, write_json
from tests.pipeline.registration.stores import FINGERPRINT, evaluated, exported, forget, hf_of, registered, right


def champion(home) -> str:
    return str(client(home).get_registered_model("ants").aliases["champion"])


def client(home):
    return mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")


def tags(home, number) -> dict:
    return client(home).get_model_version("ants", str(number)).tags


def test_a_later_version_is_champion_when_a_paired_test_on_the_selection_split_says_so(store, tmp_path):
    models = [exported(tmp_path / f"m{seed}", seed) for seed in range(3)]
    scores = [right(300), right(303, start=1), right(330)]
    first, second, third = (
        evaluated(tmp_path / f"e{number}", model, correct)
        for number, (model, correct) in enumerate(zip(models, scores, strict=True))
    )
    assert registered(store, models[0], "ants", first)["reason"] == "first version"
    forget(models[0], first)
    result = registered(store, models[1], "ants", second)
    assert not result["promoted"] and champion(store) == "1"
    assert (
        "4 are right in this version alone, 1 in the champion alone: exact McNemar test p = 0.375" in result["reason"]
    )
    result = registered(store, models[2], "ants", third)
    assert result["promoted"] and champion(store) == "3" and result["previous"] == "models:/ants/1"
    assert "better by a paired test: of 400 images 30 are right in this version alone, 0 in" in result["reason"]
    assert "eval/classify-v1/ants.validation/top1 0.8250 against the champion's 0.7500" in result["reason"]
    assert tags(store, 3)["vit.gate_decision"] == result["reason"]
    assert tags(store, 3)["vit.gate_metric"] == "eval/classify-v1/ants.validation/top1"


def test_where_there_is_no_selection_split_or_no_prediction_the_reason_says_so(store, tmp_path):
    models = [exported(tmp_path / f"m{seed}", seed) for seed in range(3)]
    first = evaluated(tmp_path / "e0", models[0], right(300), splits=("test",))
    second = evaluated(tmp_path / "e1", models[1], right(340), splits=("test",))
    third = evaluated(tmp_path / "e2", models[2], right(341), splits=("test",), predictions=False)
    registered(store, models[0], "ants", first)
    result = registered(store, models[1], "ants", second)
    assert result["promoted"] and result["reason"].endswith("on the test split, as there is no selection split")
    result = registered(store, models[2], "ants", third)
    assert not result["promoted"]
    assert "gain 0.0025 is below the margin 0.005" in result["reason"] and "no predictions of both" in result["reason"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fingerprint": "0" * 64}, "not compared: evaluated on other data"),
        ({"protocol": "knn-20-v1"}, "not compared: evaluated by another protocol"),
        (None, "not compared: this version is a version without an evaluation"),
    ],
)
def test_what_was_not_evaluated_alike_is_not_promoted(store, tmp_path, change, words):
    old, new = exported(tmp_path / "old", 0), exported(tmp_path / "new", 1)
    registered(store, old, "ants", evaluated(tmp_path / "e0", old, right(100)))
    scored = [] if change is None else [evaluated(tmp_path / "e1", new, right(400), **change)]
    result = registered(store, new, "ants", *scored)
    assert not result["promoted"] and words in result["reason"] and champion(store) == "1"


def test_the_same_weights_are_registered_once_and_compared_again_when_there_is_a_new_evaluation(store, tmp_path):
    old, new = exported(tmp_path / "old", 0), exported(tmp_path / "new", 1)
    registered(store, old, "ants", evaluated(tmp_path / "e0", old, right(200)))
    assert registered(store, new)["version"] == 2 and champion(store) == "1"
    again = registered(store, new)
    assert "models:/ants/2 already is this checkpoint with these weights" in again["summary"]
    assert (again["version"], again["registered"], again["moved"]) == (2, False, False)
    later = evaluated(tmp_path / "e1", new, right(400))
    result = registered(store, new, "ants", later)
    assert (result["version"], result["promoted"], result["registered"]) == (2, True, False) and champion(store) == "2"
    assert len(client(store).search_model_versions("name='ants'")) == 2
    assert "| eval/classify-v1/ants.validation/top1 | 1.0000 | 0.9900 – 1.0100 |" in (
        client(store).get_model_version("ants", "2").description
    )


def test_a_version_that_a_newer_evaluation_speaks_of_still_loads_as_it_was_registered(store, tmp_path):
    model, uri = exported(tmp_path / "m"), f"sqlite:///{store / 'mlflow.db'}"
    registered(store, model, "ants", evaluated(tmp_path / "e0", model, right(200)))
    before = tags(store, 1)
    newer = evaluated(tmp_path / "e1", model, right(201))
    assert not registered(store, model, "ants", newer)["registered"]
    source = locate_model("models:/ants/1", tracking_uri=uri, home=store)
    assert load_model(source).num_classes == 3
    assert mlflow.pyfunc.load_model("models:/ants/1").predict([np.zeros((32, 32, 3), np.uint8)]).shape == (1, 3)
    after = tags(store, 1)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"vit.gate_evidence_sha256", "vit.gate_value"}


def test_where_newer_evidence_cannot_be_stored_the_version_is_said_to_stay(store, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "FIRST_WAIT_SECONDS", 0.0)
    model = exported(tmp_path / "m")
    registered(store, model, "ants", evaluated(tmp_path / "e0", model, right(200)))
    before, folder = tags(store, 1), hf_of(store).parents[1] / "gate"
    forget(folder)
    folder.write_text("in the way")
    with pytest.raises(FaultError, match=r"failed 6 times: .*; models:/ants/1 stays as it was$"):
        registered(store, model, "ants", evaluated(tmp_path / "e1", model, right(201)))
    assert tags(store, 1) == before and champion(store) == "1"


def test_a_newer_evaluation_of_other_data_of_that_name_hides_nothing_that_the_champion_was_scored_by(store, tmp_path):
    old, new = exported(tmp_path / "old", 0), exported(tmp_path / "new", 1)
    registered(store, old, "ants", evaluated(tmp_path / "e0", old, right(200)))
    other = evaluated(tmp_path / "e1", new, right(100), fingerprint="0" * 64)
    result = registered(store, new, "ants", other, evaluated(tmp_path / "e2", new, right(300)))
    assert result["promoted"] and "0.7500 against the champion's 0.5000" in result["reason"]


def test_a_protocol_without_top_1_is_compared_by_what_it_has(store, tmp_path):
    for seed, value in enumerate((0.5, 0.504, 0.506)):
        model = exported(tmp_path / f"m{seed}", seed)
        run = evaluated(tmp_path / f"e{seed}", model, right(200), splits=("validation",))
        result = read_json(run / "result.json")
        result["metrics"]["model"] = {"eval/classify-v1/ants.validation/map": value}
        write_json(run / "result.json", result)
        assert registered(store, model, "ants", run)["promoted"] is (seed != 1)
    assert "better by 0.0060, margin 0.005: eval/classify-v1/ants.validation/map" in tags(store, 3)["vit.gate_decision"]


def test_a_registration_that_was_killed_before_the_gate_is_finished_by_the_next(store, tmp_path, monkeypatch):
    model = exported(tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr(promotion.Promotion, "decide", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            registered(store, model)
    assert "champion" not in client(store).get_registered_model("ants").aliases
    result = registered(store, model)
    assert (result["version"], result["promoted"]) == (1, True) and champion(store) == "1"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
def test_a_flipped_byte_is_noticed_by_us_and_by_mlflow_and_makes_a_new_version(store, tmp_path, name):
    model = exported(tmp_path / "m")
    registered(store, model)
    path = hf_of(store) / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    uri = f"sqlite:///{store / 'mlflow.db'}"
    with pytest.raises(InputError, match=f"{name}: (its bytes are not|is not the list)") as error:
        locate_model("models:/ants@champion", tracking_uri=uri, home=store)
    assert len(error.value.problems) == 1
    with pytest.raises(Exception, match="its bytes are not those registered|is missing"):
        mlflow.pyfunc.load_model("models:/ants@champion")
    assert registered(store, model)["version"] == 2


def test_files_that_are_missing_or_were_put_there_are_noticed(store, tmp_path):
    registered(store, exported(tmp_path / "m"))
    uri, folder = f"sqlite:///{store / 'mlflow.db'}", hf_of(store)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="pytorch_model.bin: its bytes are not those registered"):
        locate_model("models:/ants/1", tracking_uri=uri, home=store)
    with pytest.raises(Exception, match="pytorch_model.bin: is not listed in SHA256SUMS"):
        mlflow.pyfunc.load_model("models:/ants/1")
    (folder / "pytorch_model.bin").unlink()
    for gone in ("evaluation.json", "SHA256SUMS"):
        (folder / gone).unlink()
        with pytest.raises(InputError, match=f"{gone} is missing"):
            locate_model("models:/ants/1", tracking_uri=uri, home=store)


def test_evidence_that_was_changed_in_the_store_decides_nothing(store, tmp_path):
    old, new = exported(tmp_path / "old", 0), exported(tmp_path / "new", 1)
    registered(store, old, "ants", evaluated(tmp_path / "e0", old, right(399)))
    (evidence,) = hf_of(store).parents[1].glob("gate/*/evidence.json")
    evidence.write_text(evidence.read_text().replace("0.9975", "0.0001"))
    result = registered(store, new, "ants", evaluated(tmp_path / "e1", new, right(350)))
    assert not result["promoted"] and "not the one registered" in result["reason"]


def test_reads_of_a_test_split_are_counted_on_the_version(store, tmp_path):
    model, uri = exported(tmp_path / "m"), f"sqlite:///{store / 'mlflow.db'}"
    key = read_key("classify-v1", "ants", FINGERPRINT)
    twice = [evaluated(tmp_path / f"e{number}", model, right(200)) for number in range(2)]
    registered(store, model, "ants", *twice)
    assert recorded_reads("models:/ants/1", tracking_uri=uri) == {key: 2}
    assert record_test_read("models:/ants@champion", key, tracking_uri=uri) == 3
    assert record_test_read("models:/ants/1", "knn-20-v1/ants x", tracking_uri=uri) == 1
    registered(store, model, "ants", evaluated(tmp_path / "e2", model, right(201)), *twice)
    assert recorded_reads("models:/ants/1", tracking_uri=uri) == {key: 3, "knn-20-v1/ants x": 1}


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("models:/ants@champoin", "no alias `champoin`; did you mean `champion`?"),
        ("models:/ants@1", "no alias `1`; there are: candidate, champion; say models:/ants/1"),
        ("models:/ants/champion", "no version `champion`; say models:/ants@champion"),
        ("models:/ants/7", "no version `7`; there are: 1"),
        ("models:/ant@champion", "did you mean `ants`?"),
        ("models:/ants", "say models:/NAME@ALIAS or models:/NAME/VERSION"),
    ],
)
def test_a_version_that_is_not_there_is_said_with_what_is(store, tmp_path, reference, words):
    registered(store, exported(tmp_path / "m"))
    with pytest.raises(InputError) as error:
        locate_model(reference, tracking_uri=f"sqlite:///{store / 'mlflow.db'}", home=store)
    assert words in str(error.value) and len(error.value.problems) == 1 and "\n" not in str(error.value)


class Interrupted:
    """A client that lets somebody else act just before its `at`-th call."""

    def __init__(self, inner, at, other):
        self.inner, self.left, self.other = inner, at, other

    def __getattr__(self, name):
        method = getattr(self.inner, name)

        def call(*arguments, **keys):
            self.left -= 1
            if self.left == 0:
                self.other()
            return method(*arguments, **keys)

        return call


@pytest.mark.slow
@pytest.mark.parametrize("better", ["2", "3"])
def test_of_two_registrations_at_once_the_better_is_champion_whenever_the_other_comes(store, tmp_path, better):
    correct = {"1": right(100), "2": right(200), "3": right(300)} if better == "3" else {
        "1": right(100), "2": right(300), "3": right(200)}  # fmt: skip
    models = {number: exported(tmp_path / number, int(number)) for number in correct}
    for number, model in models.items():
        registered(store, model, "ants", evaluated(tmp_path / f"e{number}", model, np.asarray(correct[number])))
    evidence = {number: standings(store, number, tmp_path) for number in correct}
    registry = client(store)
    for at in range(1, 40):
        registry.set_registered_model_alias("ants", "champion", "1")
        late = promotion.Promotion(registry, "ants", "3", evidence.__getitem__, 0.005)
        asked = Interrupted(registry, at, late.decide)
        promotion.Promotion(asked, "ants", "2", evidence.__getitem__, 0.005).decide()
        if asked.left > 0:
            late.decide()
        assert champion(store) == better, at
    assert asked.left > 0  # every call was interrupted once


def standings(home, number, scratch):
    from pipeline.registration.publish import version_standings

    return version_standings(client(home).get_model_version("ants", number), scratch / f"evidence-{number}")


def test_a_champion_that_was_moved_back_by_hand_stays_until_somebody_beats_it(store, tmp_path):
    models = [exported(tmp_path / f"m{seed}", seed) for seed in range(3)]
    for number, (model, correct) in enumerate(zip(models, (right(100), right(300), right(90)), strict=True)):
        if number == 2:
            client(store).set_registered_model_alias("ants", "champion", "1")
        registered(store, model, "ants", evaluated(tmp_path / f"e{number}", model, correct))
    assert champion(store) == "1"
    fourth = exported(tmp_path / "m3", 3)
    registered(store, fourth, "ants", evaluated(tmp_path / "e3", fourth, right(200)))
    assert champion(store) == "4"  # not 2, which a person has taken back


def test_prediction_and_outcome_are_tags_of_the_version_and_follow_newer_evaluations(store, tmp_path, monkeypatch):
    accuracy, facts = {"value": 0.75, "low": 0.7, "high": 0.8}, {}
    monkeypatch.setattr("pipeline.registration.publish.forecast_facts", lambda *_: facts)
    model = exported(tmp_path / "m")
    facts["accuracy"] = accuracy
    registered(store, model, "ants")
    assert tags(store, 1)["forecast.accuracy"] == "0.75 [0.7, 0.8]" and "outcome.accuracy" not in tags(store, 1)
    facts["accuracy"] = accuracy | {"outcome": 0.825, "inside": False}
    registered(store, model, "ants", evaluated(tmp_path / "e", model, right(330)))
    assert tags(store, 1)["outcome.accuracy"] == "0.825"
    assert (
        "| accuracy | 0.75 | 0.7 – 0.8 | 0.825 | outside |" in client(store).get_model_version("ants", "1").description
    )
