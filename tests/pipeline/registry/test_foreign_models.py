"""What strangers' checkpoints may do here: nothing is run, and nothing is written outside."""

import contextlib
import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from models.encoders.config import EncoderConfig
from models.encoders.vit import build_encoder
from pipeline.checkpoints.foreign_pickles import require_harmless
from pipeline.errors import InputError
from pipeline.registry.locate import locate_model
from pipeline.registry.weights import load_model, source_weights
from tests.pipeline.registration.stores import SMALL, exported

OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


class Evil:
    """A pickle that makes a file when it is opened."""

    def __init__(self, canary: Path):
        self.canary = str(canary)

    def __reduce__(self):
        return (open, (self.canary, "w"))


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "outside" / "canary"
    path.parent.mkdir()
    yield path
    assert not path.exists(), "it was run, or written outside"


def everything_in(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.bin"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_among_weights_is_not_run(tmp_path, canary, name, protocol):
    torch.save({"state_dict": {"a": Evil(canary)}}, tmp_path / name, pickle_protocol=protocol)
    with pytest.raises(InputError, match="not readable as weights"):
        source_weights(locate_model(str(tmp_path / name), tracking_uri="", home=tmp_path))


def test_a_bare_pickle_and_one_in_an_old_tar_are_not_run(tmp_path, canary):
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Evil(canary)))
    torch.save(Evil(canary), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("bare.pth", "old.pth"):
        with pytest.raises(InputError, match="not readable as weights"):
            source_weights(locate_model(str(tmp_path / name), tracking_uri="", home=tmp_path))


def test_the_pickle_of_a_directory_of_transformers_is_not_run(tmp_path, canary):
    config = {"model_type": "vit", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
              "intermediate_size": 192, "image_size": 32, "patch_size": 8, "num_channels": 3}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"vit.embeddings.cls_token": Evil(canary)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError):
        source_weights(locate_model(f"hf:{tmp_path}", tracking_uri="", home=tmp_path))


def test_an_array_of_objects_in_an_npz_is_not_run(tmp_path, canary):
    names = ("embedding/kernel", "cls", "Transformer/posembed_input/pos_embedding")
    np.savez(tmp_path / "g.npz", **{name: np.array([Evil(canary)], dtype=object) for name in names})
    with pytest.raises((InputError, ValueError), match="allow_pickle|not readable|pickled"):
        source_weights(locate_model(str(tmp_path / "g.npz"), tracking_uri="", home=tmp_path))


@pytest.mark.parametrize("name", ["../outside/canary", "/outside/canary", "w/../../outside/canary"])
def test_names_in_a_zip_that_lead_out_of_it_are_not_written(tmp_path, canary, name):
    path = tmp_path / "w.pth"
    torch.save(build_encoder(EncoderConfig(**SMALL)).state_dict(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "x")
    before = everything_in(tmp_path)
    with contextlib.suppress(InputError):
        source_weights(locate_model(str(path), tracking_uri="", home=tmp_path))
    assert everything_in(tmp_path) == before


def test_a_directory_of_symbolic_links_is_read_and_what_they_name_is_left_alone(tmp_path, canary):
    """As Hugging Face's cache lays its files out; and one that names a file which is none of it."""
    store = exported(tmp_path / "store")
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in store.iterdir():
        (linked / path.name).symlink_to(path)
    secret = canary.with_name("secret")
    secret.write_text("not for you")
    (linked / "pytorch_model.bin").symlink_to(secret)
    (linked / "to-be-made").symlink_to(canary)
    before = everything_in(tmp_path)
    load_model(locate_model(str(linked), tracking_uri="", home=tmp_path))
    assert everything_in(tmp_path) == before
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(secret)
    with pytest.raises(InputError) as error:
        load_model(locate_model(str(linked), tracking_uri="", home=tmp_path))
    assert "not for you" not in str(error.value)


def test_a_registered_model_of_somebody_elses_is_refused_without_running_it(tmp_path, canary):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    before = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(uri)
        experiment = mlflow.create_experiment("theirs", artifact_location=f"file://{tmp_path / 'artifacts'}")
        with mlflow.start_run(experiment_id=experiment):
            folder = tmp_path / "model"
            folder.mkdir()
            (folder / "python_model.pkl").write_bytes(pickle.dumps(Evil(canary)))
            (folder / "MLmodel").write_text("flavors: {python_function: {loader_module: mlflow.pyfunc.model}}")
            mlflow.log_artifacts(str(folder), "model")
            client = mlflow.MlflowClient()
            client.create_registered_model("theirs")
            client.create_model_version("theirs", mlflow.get_artifact_uri("model"))
        with pytest.raises(InputError, match="was not registered by `vit register`: it has no artifacts/hf"):
            locate_model("models:/theirs/1", tracking_uri=uri, home=tmp_path)
    finally:
        mlflow.set_tracking_uri(before)


def deepspeed_folder(tmp_path: Path, **states) -> Path:
    folder = tmp_path / "theirs" / "step"
    folder.mkdir(parents=True)
    torch.save({"optimizer_state_dict": {}} | states, folder / OPTIMIZER)
    torch.save({"module": {}, "param_shapes": [], "global_steps": 1}, folder / "mp_rank_00_model_states.pt")
    (folder.parent / "latest").write_text("step")
    return folder


@pytest.mark.parametrize("name", ["../../../outside/canary", "/outside/canary", "..", "blocks/../../../outside/canary"])
def test_a_parameter_of_deepspeeds_with_a_way_out_as_its_name_is_refused(tmp_path, canary, name):
    folder = deepspeed_folder(tmp_path)
    shapes = [{name: torch.Size([1])}]
    torch.save({"module": {}, "param_shapes": shapes, "global_steps": 1}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(InputError, match="a way out of its folder; not imported"):
        require_harmless(folder)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_among_deepspeeds_files_is_not_run_by_the_import(tmp_path, canary, protocol):
    folder = deepspeed_folder(tmp_path)
    torch.save({"client_state": Evil(canary)}, folder / OPTIMIZER, pickle_protocol=protocol)
    with pytest.raises(InputError, match="a pickle that would run .*open; not imported|without running what it says"):
        require_harmless(folder)


@pytest.mark.slow
def test_the_import_command_refuses_it_in_a_line_before_anything_is_converted(tmp_path, canary, digits):
    environment = os.environ | {"VIT_HOME": str(tmp_path / "home"), "DS_ACCELERATOR": "cpu"}
    run, vit = str(tmp_path / "run"), [sys.executable, "-m", "flows", "pretrain", "pretrain_supervised_debug"]
    subprocess.run([*vit, "--data", str(digits), "--run-dir", run, "--dry-run"], env=environment, check=True,
                   capture_output=True)  # fmt: skip
    folder = deepspeed_folder(tmp_path, client_state=Evil(canary))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.import_checkpoint", str(folder.parent), run],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"{folder / OPTIMIZER}: " in done.stderr and "not imported" in done.stderr


def test_a_file_that_only_says_that_it_is_safetensors_is_one_line(tmp_path):
    for name, content in {"a": b"", "b": b"\xff" * 16, "c": (1 << 60).to_bytes(8, "little") + b"{}"}.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            source_weights(locate_model(str(path), tracking_uri="", home=tmp_path))
        assert len(error.value.problems) == 1 and "\n" not in str(error.value)
