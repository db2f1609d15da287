"""Every format opens with its own library, where this project cannot be imported, and says what the model says."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.config.export import ExportConfig
from pipeline.evaluation.single_images import file_samples, normalised_views
from pipeline.exporting.formats import how_to_open, preprocessing, write_format
from tests.pipeline.exporting.networks import CLASSES, SMALL, network_of, source_of

SWIN = {"name": "timm:swin_tiny_patch4_window7_224", "image_size": 32,
        "arguments": {"depths": [1, 1], "embed_dim": 24, "num_heads": [2, 2], "window_size": 4}}  # fmt: skip
BEIT = {"pooling": "mean", "layer_scale": 0.1}
CASES = {  # name: (encoder, its head, formats)
    "plain": (SMALL, True, ("safetensors", "hf", "onnx", "pt2", "int8")),
    "mean of patches and factors": (SMALL | BEIT, True, ("hf", "onnx")),
    "registers, no head": (SMALL | {"register_tokens": 3, "pooling": "mean"}, False, ("safetensors", "onnx")),
    "no head": (SMALL, False, ("hf",)),
    "no head, mean": (SMALL | {"pooling": "mean", "qkv_bias": False}, False, ("hf",)),
    "factors alone": (SMALL | {"layer_scale": 0.1}, True, ("hf",)),
    "no bias, tanh, no positions": (
        SMALL | {"qkv_bias": False, "activation": "gelu_tanh", "positions": "none", "norm_eps": 1e-5}, True, ("hf",)),
    "oblong, two learned axes": (
        SMALL | {"image_size": (32, 48), "positions": "learned2d"}, True, ("safetensors", "hf")),
    "four channels": (SMALL | {"channels": 4}, True, ("safetensors", "hf", "int8")),
    "grey": (SMALL | {"channels": 1}, False, ("safetensors", "hf")),
    "rotary": (SMALL | {"positions": "rotary"}, True, ("onnx",)),
    "relative": (SMALL | {"positions": "relative"}, True, ("onnx",)),
    "distilled": (SMALL | {"distillation_token": True}, True, ("safetensors", "pt2")),
    "tanh layer": (SMALL | {"representation": True}, True, ("pt2",)),
    "swin": (SWIN, True, ("safetensors", "onnx")),
}  # fmt: skip
WANTED = [(name, format) for name, (_, _, formats) in CASES.items() for format in formats]
ELSEWHERE = """
import json, sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("models", "pipeline", "flows", "cluster"):
            raise ImportError(name + " is of this project")
sys.meta_path.insert(0, Wall())
import numpy as np, onnxruntime, timm, torch, transformers
from PIL import Image
from timm.data import create_transform

def inputs(job, facts):
    if "array" in job:
        return torch.from_numpy(np.load(job["array"]))
    pictures = [Image.open(file).convert("L" if facts["input_size"][0] == 1 else "RGB") for file in job["files"]]
    if job["processor"]:
        return transformers.AutoImageProcessor.from_pretrained(job["folder"], backend="pil")(
            pictures, return_tensors="pt")["pixel_values"]
    words = facts.pop("words")
    transform = create_transform(is_training=False, **facts)
    return torch.stack([transform(picture) for picture in pictures])

def outputs(job, images):
    folder, kind = job["folder"], job["format"]
    if kind == "safetensors":
        return timm.create_model("local-dir:" + folder, pretrained=True).eval()(images)
    if kind == "pt2":
        return torch.export.load(folder + "/model.pt2").module()(images)
    if kind != "hf":
        return torch.from_numpy(
            onnxruntime.InferenceSession(folder + "/model.onnx").run(None, {"images": images.numpy()})[0])
    word = json.load(open(folder + "/config.json"))["architectures"][0]
    if word.endswith("Classification"):
        return transformers.AutoModelForImageClassification.from_pretrained(folder)(images).logits
    out = transformers.AutoModel.from_pretrained(folder, **({"add_pooling_layer": False} if word == "ViTModel" else {}))
    return out(images).last_hidden_state[:, 0] if word == "ViTModel" else out(images).pooler_output

with torch.no_grad():
    for job in json.load(open(sys.argv[1])):
        images = inputs(job, json.load(open(job["facts"])))
        everything = outputs(job, images)
        alone = torch.cat([outputs(job, one[None]) for one in images[:1]])
        if job["format"] == "hf":  # by the very line that people are told
            pictures = [Image.open(file).convert("RGB") for file in job.get("files", [])]
            torch.testing.assert_close(eval(job["open"]), everything)
        np.savez(job["to"], images=images.numpy(), outputs=everything.numpy(), alone=alone.numpy())
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """Real digits, as pictures that are no squares."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, digit in enumerate(load_digits().images[:5]):
        picture = Image.fromarray((digit * 15).astype(np.uint8)).resize((61, 47), Image.Resampling.BICUBIC)
        Image.merge("RGB", [picture, picture.rotate(90), picture.rotate(180)]).save(folder / f"{number}.png")
    return sorted(str(path) for path in folder.iterdir())


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, pictures) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Of each export the images and outputs of a process without this project, and what the model says of them."""
    root, jobs, expected = tmp_path_factory.mktemp("exports"), [], {}
    for number, (name, format) in enumerate(WANTED):
        encoder, head, _ = CASES[name]
        source = source_of(encoder, head=head)
        network, folder = network_of(source), root / str(number)
        folder.mkdir()
        if source.encoder["channels"] in (1, 3):
            rule = {"files": pictures}
            views = normalised_views(file_samples(pictures, source.encoder["channels"], named="x"), source)
        else:
            views = torch.randn(5, 4, 32, 32, generator=torch.Generator().manual_seed(number))
            np.save(root / f"{number}.npy", views.numpy())
            rule = {"array": str(root / f"{number}.npy")}
        with torch.no_grad():
            expected[name, format] = {"views": views.numpy(), "said": network(views).numpy()}
        config = ExportConfig(model="x", destination="x", format=format)
        notes = write_format(network, source, config, folder)
        (root / f"{number}.json").write_text(json.dumps(preprocessing(source)))
        has_processor = (folder / "preprocessor_config.json").is_file()
        assert has_processor or format != "hf" or "preprocessor_config" in notes[0]
        jobs.append({"folder": str(folder), "format": format, "processor": has_processor,
                     "open": how_to_open(format, folder).replace("DEST", str(folder)), "to": f"{folder}.npz",
                     "facts": str(root / f"{number}.json"), **rule})  # fmt: skip
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(root / "jobs.json")], cwd=root,
                          capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        which: expected[which] | dict(np.load(job["to"])) | {"folder": job["folder"]}
        for which, job in zip(WANTED, jobs, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "format"), WANTED)
def test_an_export_says_elsewhere_what_the_model_says_here(elsewhere, name, format):
    found = elsewhere[name, format]
    np.testing.assert_allclose(found["images"], found["views"], atol=1e-6)  # the very pixels
    largest = np.abs(found["said"]).max()
    tolerance = (0.2 if format == "int8" else 1e-5) * largest
    np.testing.assert_allclose(found["outputs"], found["said"], atol=tolerance)
    np.testing.assert_allclose(found["alone"], found["said"][:1], atol=tolerance)  # another batch size
    assert np.ptp(found["said"], axis=0).max() > 0.01 * largest  # or nothing was compared


@pytest.mark.slow
def test_hugging_face_says_the_class_names_and_the_kind_of_its_outputs(elsewhere):
    config = json.loads(Path(elsewhere["plain", "hf"]["folder"], "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]
    assert [config["id2label"][str(number)] for number in range(5)] == list(CLASSES)
    assert config["problem_type"] == "single_label_classification"
    beit = json.loads(Path(elsewhere["mean of patches and factors", "hf"]["folder"], "config.json").read_text())
    assert beit["architectures"] == ["BeitForImageClassification"] and beit["use_mean_pooling"]


@pytest.mark.slow
def test_no_export_holds_a_pickle(elsewhere):
    for found in elsewhere.values():
        for file in Path(found["folder"]).rglob("*"):
            assert file.suffix in (".json", ".safetensors", ".onnx", ".pt2", ".md"), file
            if file.suffix == ".pt2":
                with zipfile.ZipFile(file) as archive:
                    contents = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
                tensors = json.loads(contents["data/weights/model_weights_config.json"])["config"].values()
                assert tensors and not any(one["use_pickle"] for one in tensors)
                assert not json.loads(contents["data/constants/model_constants_config.json"])["config"]
                assert contents["data/sample_inputs/model.pt"] == b""
                assert not [name for name in contents if name.endswith((".pkl", ".pickle"))]
                assert json.loads(contents["extra/preprocessing"])["crop_pct"] == 0.875


@pytest.mark.slow
def test_eight_bits_take_less_room_and_the_graph_says_classes_and_preprocessing(elsewhere):
    import onnx

    sizes = {kind: Path(elsewhere["plain", kind]["folder"], "model.onnx").stat().st_size for kind in ("onnx", "int8")}
    assert sizes["int8"] < 0.6 * sizes["onnx"]
    for kind in ("onnx", "int8"):
        graph = onnx.load(Path(elsewhere["plain", kind]["folder"], "model.onnx"))
        facts = {
            one.key: json.loads(one.value) for one in graph.metadata_props if one.key in ("classes", "preprocessing")
        }
        assert facts["classes"] == list(CLASSES) and facts["preprocessing"]["crop_pct"] == 0.875, kind
        assert [one.name for one in graph.graph.output] == ["logits"]
