"""An export from the request to the folder: what it asks before it begins, and what it leaves where it does not end."""

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.command_line.exports import export_lines
from flows.requests.exporting import export_run
from models.encoders.merging import MergingEncoder
from pipeline.config.export import ExportConfig
from pipeline.errors import FaultError, InputError, RefusedError
from pipeline.exporting.expressible import inexpressible_export, instead_of_tracing
from pipeline.exporting.folder import LOCK, partial_folder, publish
from pipeline.exporting.formats import write_format
from pipeline.exporting.job import export
from pipeline.exporting.sample import fixed_sample
from pipeline.rank import Rank
from pipeline.registry.export import export_timm_directory
from pipeline.run_directory import read_json, write_json
from pipeline.shards.index import read_index
from tests.pipeline.exporting.networks import SMALL, network_of, source_of
from tests.pipeline.test_label_sets import SETS, several

DIGITS = tuple(str(number) for number in range(10))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model in timm's layout, which does not name one class for every image."""
    folder = tmp_path_factory.mktemp("models") / "model"
    source = source_of(SMALL)
    network, sample = network_of(source), fixed_sample(source, None, asked=False, count=64)
    with torch.no_grad():
        network.head.bias -= network(torch.from_numpy(sample.images)).mean(dim=0)
    export_timm_directory(network, source, folder, {})
    return folder


def request(model, destination, home, *settings, format="safetensors", data=None):
    return export_run(str(model), str(destination), format=format, data=data, overrides=settings, home=home)


def exported(model, destination, home, *settings, format="safetensors", data=None) -> dict:
    """The result of the stage in this process; its measurements are made in others."""
    run = request(model, destination, home, *settings, format=format, data=data)
    export(Rank(run, run.attempt(1).make(), 0, 0, 1))
    return read_json(run.result_file)


@pytest.mark.slow
def test_an_export_appears_whole_with_its_table_and_hashes(model, home, tmp_path, digits):
    destination = tmp_path / "exports" / "onnx"
    result = exported(model, destination, home, "images=16", "repeats=3", format="onnx", data=str(digits))
    report = json.loads((destination / "export.json").read_text())
    assert {path.name for path in destination.iterdir()} == {"model.onnx", "export.json"}
    assert [path.name for path in destination.parent.iterdir()] == ["onnx"]
    content = (destination / "model.onnx").read_bytes()
    assert report["files"] == {
        "model.onnx": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    }  # fmt: skip
    source, ours = report["table"]
    assert ours["agreement"] == 1.0 and 0 < ours["max_difference"] < 1e-4 * ours["largest_output"]
    assert source["format"] == "source" and source["bytes"] > 100_000
    for row in report["table"]:
        assert row["latency_seconds"].keys() == {"1", "32"} and min(row["latency_seconds"].values()) > 0
        assert row["repeats"] == {"1": 3, "32": 3} and 20e6 < row["peak_memory_bytes"] < 4e9
        assert row["accuracy"] is None  # ants and bees are no digits
    assert "its head does not know" in report["sample"]["words"] and report["sample"]["images"] == 16
    assert report["classes"] == ["ant", "bee", "cat", "dog", "eel"] and report["versions"]["onnxruntime"]
    assert result["files"] == report["files"] and report["source"]["model"] == str(model)
    lines = export_lines(report)
    assert "max |difference|" in lines[0] and "100.00%" in lines[2] and "threads of" in lines[3]
    with pytest.raises(InputError, match="is not empty; name a new folder"):
        request(model, destination, home, format="onnx")


@pytest.mark.slow
def test_merging_too_many_tokens_is_refused_and_nothing_is_left(model, home, tmp_path):
    asked = "token_reduction.keep=0.1", "bounds.max_difference=1e-3", "images=16", "repeats=1"
    run = request(model, tmp_path / "few", home, *asked, format="pt2")
    with pytest.raises(RefusedError, match=r"pt2 export refused: .* bounds\.m\w+ is .*; nothing was written"):
        export(Rank(run, run.attempt(1).make(), 0, 0, 1))
    assert not list(tmp_path.glob("few*"))
    kept = read_json(run.path / "parity.json")  # what it would have been
    assert kept["refused"] and kept["table"][1]["max_difference"] > 1e-3 and kept["token_reduction"] == {"keep": 0.1}
    assert not run.result_file.exists()


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_refused_by_the_command(model, home, tmp_path):
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    (spoilt / "config.json").write_text((model / "config.json").read_text())
    weights = load_file(model / "model.safetensors")
    weights["head.weight"][0, 0] = float("nan")
    save_file(weights, spoilt / "model.safetensors")
    command = [sys.executable, "-m", "flows", "export", str(spoilt), str(tmp_path / "out"), "--format", "safetensors"]
    done = subprocess.run([*command, "--set", "repeats=1"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 1 and "its weights are damaged" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


REFUSED = [
    ({"format": "tflite"}, (), "--format tflite: no such format; there are: safetensors, hf, onnx, pt2, int8"),
    ({"format": "onx"}, (), "--format onx: no such format; did you mean `onnx`?"),
    ({}, ("precision=fp16",), "--set precision: no setting of an export; there are: images, repeats, "),
    ({}, ("bounds.min_agreement=2",), "--set bounds.min_agreement: "),
    ({}, ("bounds.agreement=1",), "--set bounds.agreement: no such key; did you mean `min_agreement`?"),
    ({}, ("images=1",), "--set images: expected a whole number from 2 to 100,000 (got 1)"),
    ({}, ("token_reduction.keep=0.5",), "format safetensors is weights for a network that merges no tokens"),
    ({"data": "/nowhere"}, (), "/nowhere"),
]


def test_what_cannot_be_written_or_is_being_written_is_refused_before_a_job_begins(model, home, tmp_path):
    with pytest.raises(InputError, match="DEST `/proc/x`: its parent /proc cannot be written"):
        request(model, "/proc/x", home)
    destination = tmp_path / "out"
    with partial_folder(destination, 0), pytest.raises(InputError, match="another export writes there"):
        request(model, destination, home)
    assert not (home / "runs").exists() and list(tmp_path.glob("*out*")) == []


def test_an_export_whose_watcher_died_is_followed_and_another_to_the_same_place_is_refused(model, home, tmp_path):
    run = request(model, tmp_path / "out", home)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(run.path)])
    try:
        started = psutil.Process(sleeper.pid).create_time()
        job = {"kind": "local", "id": f"{sleeper.pid}:{started:.2f}", "key": run.key, "attempt": 1}
        run.attempt(1).make()
        write_json(run.job_file, job)
        assert request(model, tmp_path / "out", home).path == run.path
        with pytest.raises(InputError, match=f"{run.path.name} writes another export there .format safetensors.; wait"):
            request(model, tmp_path / "out", home, "images=16")
    finally:
        sleeper.kill()
        sleeper.wait()
    assert request(model, tmp_path / "out", home).path != run.path


@pytest.mark.parametrize(("asked", "settings", "words"), REFUSED)
def test_a_wrong_request_is_one_line_and_writes_nothing(model, home, tmp_path, asked, settings, words):
    with pytest.raises(InputError) as error:
        request(model, tmp_path / "out", home, *settings, **asked)
    assert words in str(error.value), error.value
    assert not (home / "runs").exists() and not (tmp_path / "out").exists()


def test_a_missing_library_is_named_with_its_extra(model, home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(InputError, match="onnxruntime is not installed; .*`uv sync --extra export`"):
        request(model, tmp_path / "out", home, format="onnx")


def test_destinations_that_hold_something_or_lie_in_a_run_are_refused(model, home, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file; name a new folder"):
        request(model, tmp_path / "file", home)
    with pytest.raises(InputError, match="file is a file; name a new folder elsewhere"):
        request(model, tmp_path / "file" / "out", home)
    with pytest.raises(InputError, match="DEST is empty"):
        request(model, "", home)
    with pytest.raises(InputError, match="MODEL is empty"):
        request("", tmp_path / "out", home)
    run = request(model, tmp_path / "out", home)
    with pytest.raises(InputError, match="lies in the run directory"):
        request(model, run.path / "exports" / "out", home)


@pytest.mark.parametrize(
    ("encoder", "facts", "format", "words"),
    [
        ({"register_tokens": 4}, {}, "hf", "encoder.register_tokens is 4, and .*; take safetensors, onnx or pt2"),
        ({"positions": "rotary"}, {}, "hf", "encoder.positions is rotary"),
        ({"class_token": False, "pooling": "mean"}, {}, "hf", "encoder.class_token is False"),
        ({"image_size": (32, 48), "pooling": "mean"}, {}, "hf", "32 x 48, and transformers' BEiT"),
        ({}, {"tuning": {"kind": "adapter"}}, "hf", "no place for what tuning.kind adapter added"),
        ({}, {"tuning": {"kind": "adapter"}}, "safetensors", "timm's networks have no adapters.*; take onnx or pt2"),
        ({"representation": True}, {}, "safetensors", "no tanh representation head.*; take onnx or pt2"),
    ],
)
def test_what_a_format_cannot_express_is_refused_with_one_that_can(encoder, facts, format, words):
    import re

    source = replace(source_of(SMALL | encoder), **facts)
    reason = inexpressible_export(source, ExportConfig(model="m", destination="/d", format=format))
    assert re.search(words, reason), reason
    assert inexpressible_export(source, ExportConfig(model="m", destination="/d", format="onnx")) is None


def test_the_sample_is_the_same_every_time_and_knows_the_labels(digits):
    source = replace(source_of(SMALL), classes=DIGITS[::-1], num_classes=10)  # its numbers are others
    first, second = (fixed_sample(source, str(digits), asked=True, count=50) for _ in range(2))
    assert np.array_equal(first.images, second.images) and first.images.shape == (50, 3, 32, 32)
    index = read_index(digits)
    assert first.dataset == {"path": str(digits), "fingerprint": index.fingerprint, "split": "test"}
    unknown = fixed_sample(replace(source, classes=index.classes), str(digits), asked=True, count=50)
    assert np.array_equal(9 - unknown.labels, first.labels) and len(set(first.labels)) == 10


def test_images_with_several_classes_are_labelled_by_the_outputs_of_their_head(tmp_path):
    data = several(tmp_path)
    source = replace(source_of(SMALL), classes=("cat", "bee", "dog", "ant"), num_classes=4, outputs="sigmoid")
    sample = fixed_sample(source, str(data), asked=True, count=9)
    names = {frozenset(name for name, there in zip(source.classes, row, strict=True) if there) for row in sample.labels}
    assert names <= {frozenset(one) for one in SETS} and len(names) > 2 and not sample.labels[:, 2].any()
    assert sample.labels.shape[1] == 4 and sample.measure == "mean average precision"
    single = fixed_sample(replace(source, classes=("ant",), num_classes=1), str(data), asked=True, count=9)
    assert single.labels is None and "its head does not know" in single.words


def test_images_are_built_in_where_the_dataset_is_gone_and_a_dataset_asked_for_is_never_replaced(digits, tmp_path):
    source = source_of(SMALL | {"channels": 4})
    sample = fixed_sample(source, str(tmp_path / "gone"), asked=False, count=8)
    assert sample.images.shape == (8, 4, 32, 32) and sample.labels is None
    assert "built-in images (scikit-learn's digits)" in sample.words and "cannot be read" in sample.words
    assert np.isfinite(sample.images).all() and np.ptp(sample.images, axis=0).max() > 1
    with pytest.raises(InputError, match="--data .*gone"):
        fixed_sample(source, str(tmp_path / "gone"), asked=True, count=8)


def test_what_a_killed_export_left_is_replaced_and_a_living_one_is_left_alone(tmp_path):
    destination = tmp_path / "out"
    code = (
        "import sys, time; from pathlib import Path; from pipeline.exporting.folder import partial_folder\n"
        "with partial_folder(Path(sys.argv[1]), 0) as folder:\n"
        "    (folder / 'model.onnx').write_text('half'); print('there', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(destination)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    with pytest.raises(InputError, match="another export writes there"), partial_folder(destination, 0):
        pass
    assert (tmp_path / "out.partial" / "model.onnx").read_text() == "half"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not destination.exists()
    with partial_folder(destination, 0) as folder:
        assert [path.name for path in folder.iterdir()] == [LOCK]
        (folder / "model.onnx").write_text("whole")
        publish(folder, destination)
    assert [path.name for path in destination.iterdir()] == ["model.onnx"] and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_is_somebody_elses_stays_and_a_full_disk_is_a_fault(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="no unfinished export"), partial_folder(tmp_path / "out", 0):
        pass
    assert (tmp_path / "out.partial" / "thesis.tex").exists()
    with pytest.raises(FaultError, match="the export needs"), partial_folder(tmp_path / "other", 2**60):
        pass
    assert not (tmp_path / "other.partial").exists()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of fewer bytes than any export has."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield small
    subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    "format", ["safetensors", "hf", "pt2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("onnx", "int8"))]
)
def test_a_disk_that_fills_while_it_is_written_is_one_line_and_nothing_is_left(format, small_disk):
    source = source_of(SMALL)
    config = ExportConfig(model="m", destination=str(small_disk / "out"), format=format)
    words = f"^{small_disk}: the disk is full; make room, and run it again$"
    with pytest.raises(FaultError, match=words) as error, partial_folder(small_disk / "out", 0) as partial:
        write_format(network_of(source), source, config, partial)
    del error
    gc.collect()  # torch's writer of archives ended the process here
    assert not list(small_disk.iterdir())


def test_what_is_refused_on_a_nearly_full_disk_stays_refused(small_disk):
    with pytest.raises(RefusedError, match="agrees"), partial_folder(small_disk / "out", 0):
        raise RefusedError("it agrees with the source on 0 % of the images")


def test_merged_tokens_that_cannot_be_traced_are_to_be_left_out(model, home, tmp_path, monkeypatch):
    monkeypatch.setattr(MergingEncoder, "forward", lambda self, images: images if images.sum() > 0 else -images)
    run = request(model, tmp_path / "out", home, "token_reduction.keep=0.5", format="pt2")
    words = "cannot follow this network with merged tokens: .*; leave token_reduction out"
    with pytest.raises(RefusedError, match=words):
        export(Rank(run, run.attempt(1).make(), 0, 0, 1))
    assert not list(tmp_path.glob("out*"))


def test_instead_of_a_network_that_cannot_be_traced_a_format_that_can_express_it_is_named():
    def said(format, encoder=None, **facts):
        config = ExportConfig(model="m", destination="/d", format=format)
        return instead_of_tracing(replace(source_of(SMALL | (encoder or {})), **facts), config)

    assert said("pt2") == "take safetensors or hf" and said("onnx") == "take safetensors or hf or pt2"
    assert said("onnx", {"register_tokens": 4}) == "take safetensors or pt2"
    assert said("pt2", tuning={"kind": "adapter"}) == "no other format can express it either"


@pytest.mark.parametrize(
    ("destination", "name"),
    [("out", "export-onnx-out"), ("onnx", "export-onnx"), ("a-ONNX", "export-a-ONNX"), ("shelf", "export-onnx-shelf")],
)
def test_a_run_is_named_after_format_and_destination_once(model, home, tmp_path, destination, name):
    assert request(model, tmp_path / destination, home, format="onnx").path.name == f"{name}-001"
