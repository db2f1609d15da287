"""The only place where a format's name becomes files."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.encoders.merging import MergingEncoder
from models.encoders.positions import write_out_axes
from pipeline.config.export import ExportConfig
from pipeline.evaluation.features import evaluation_input_of
from pipeline.exporting.graphs import write_int8, write_onnx, write_program
from pipeline.exporting.hugging_face import write_hugging_face
from pipeline.registry.export import export_timm_directory
from pipeline.registry.integrity import SUMS
from pipeline.registry.locate import ModelSource

HOW = {  # to open each, with its own library alone; hf: `_of_transformers`
    "safetensors": 'timm.create_model("local-dir:DEST", pretrained=True).eval()(images)',
    "onnx": 'onnxruntime.InferenceSession("DEST/model.onnx").run(None, {"images": images})[0]',
    "pt2": 'torch.export.load("DEST/model.pt2").module()(images)',
    "int8": 'onnxruntime.InferenceSession("DEST/model.onnx").run(None, {"images": images})[0]',
}


def write_format(network: nn.Module, source: ModelSource, config: ExportConfig, folder: Path) -> list[str]:
    """Write the format's own files; notes on what they do not say or do. The network may be changed on the way."""
    write_out_axes(network)
    if config.token_reduction is not None:
        network = MergingEncoder(network, config.token_reduction.keep).eval()
    inputs = evaluation_input_of(source)
    example = torch.zeros(2, inputs.channels, *inputs.size)
    output = "logits" if source.num_classes else "features"
    facts = {"preprocessing": json.dumps(preprocessing(source)), "classes": json.dumps(list(source.classes))}
    match config.format:
        case "safetensors":
            export_timm_directory(network, source, folder, {})
            (folder / "evaluation.json").unlink()  # none was asked for
            (folder / SUMS).unlink()  # export.json has the hashes, of all files
            return []
        case "hf":
            lacking = write_hugging_face(network, source, folder)
            return [lacking] if lacking else []
        case "onnx":
            write_onnx(network, example, folder, output, facts)
        case "pt2":
            write_program(network, example, folder, facts)
        case "int8":
            write_int8(network, example, folder, output, facts)
    return []


def how_to_open(format: str, folder: Path) -> str:
    """The line that computes this very export, DEST being its folder, with the format's own library alone."""
    return _of_transformers(folder) if format == "hf" else HOW[format]


def _of_transformers(folder: Path) -> str:
    (kind,) = json.loads((folder / "config.json").read_text())["architectures"]
    if kind.endswith("ForImageClassification"):
        line = 'transformers.AutoModelForImageClassification.from_pretrained("DEST")(images).logits'
    elif kind == "ViTModel":
        line = 'transformers.AutoModel.from_pretrained("DEST", add_pooling_layer=False)(images).last_hidden_state[:, 0]'
    else:
        line = 'transformers.AutoModel.from_pretrained("DEST")(images).pooler_output'
    if not (folder / "preprocessor_config.json").is_file():
        return line
    inputs = 'transformers.AutoImageProcessor.from_pretrained("DEST", backend="pil")(pictures, return_tensors="pt")'
    return line.replace("(images)", f"(**{inputs})")


def preprocessing(source: ModelSource) -> dict[str, Any]:
    """How an image becomes an input, as keys of timm's `create_transform`, and in words."""
    inputs = evaluation_input_of(source)
    height, width = inputs.size
    return {
        "input_size": [inputs.channels, height, width], "interpolation": "bicubic", "crop_pct": inputs.crop,
        "crop_mode": inputs.crop_mode, "mean": list(source.mean), "std": list(source.std),
        "words": f"timm.data.create_transform(is_training=False) with these; images are (batch, {inputs.channels}, "
        f"{height}, {width}) float32, (value in 0..1 - mean) / std for each channel",
    }  # fmt: skip
