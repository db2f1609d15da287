"""What models of other libraries say of themselves, read without torch: networks, classes, statistics of the input."""

import json
import math
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.encoders.config import mlp_ratio_of
from models.weights.layouts import hugging_face_encoder, layout_of
from pipeline.errors import InputError

HALF = (0.5, 0.5, 0.5)  # mean and deviation of inputs in -1..1: Google's, and the default of ViTImageProcessor
GOOGLE_PREFIXES = ("", "opt/target/", "params/", "params/img/")


def hugging_face_facts(path: Path) -> dict[str, Any]:
    """What a directory that transformers' `save_pretrained` wrote is, as fields of a ModelSource."""
    config = _json_of(path / "config.json")
    weights = hugging_face_weights(path)
    names = tensor_names(weights)
    try:
        encoder = hugging_face_encoder(config, names)
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: config.json: {error}") from None
    labels = config.get("id2label") or {}
    classifier = any(name.endswith("classifier.weight") for name in names)
    count = len(labels) or 2 if classifier else 0  # transformers writes no labels where there are two, its default
    classes = tuple(labels[key] for key in sorted(labels, key=int)) if classifier else ()
    if all(name.startswith("LABEL_") for name in classes):  # transformers' word for a class without a name
        classes = ()
    input_of = _json_of(path / "preprocessor_config.json") if (path / "preprocessor_config.json").is_file() else {}
    return {
        "encoder": encoder,
        "num_classes": count,
        "classes": classes,
        "mean": tuple(input_of.get("image_mean", HALF)),
        "std": tuple(input_of.get("image_std", HALF)),
        "objective": "mae" if config["model_type"] == "vit_mae" else None,
    }


def hugging_face_weights(path: Path) -> Path:
    """The file of the weights in a directory of transformers'."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path}: neither model.safetensors nor pytorch_model.bin; weights in several files are not read")


def google_facts(path: Path) -> dict[str, Any]:
    """What an .npz of google-research/vision_transformer is, by the shapes of its arrays."""
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        names = set(arrays.files)
        prefix = next((prefix for prefix in GOOGLE_PREFIXES if f"{prefix}embedding/kernel" in names), None)
        if prefix is None:
            raise InputError(f"{path}: no array `embedding/kernel`; only ViTs of google-research/vision_transformer")
        for array, what in (("conv_root/kernel", "a convolutional stem"), ("Transformer/encoderblock/LayerNorm_0/scale",
                            "its blocks in one array"), ("MAPHead_0/probe", "attention pooling")):  # fmt: skip
            if prefix + array in names:
                raise InputError(f"{path}: a network with {what} is not read")
        if f"{prefix}cls" not in names:
            raise InputError(f"{path}: a network without class token is not read")
        return _google_encoder(arrays, prefix, names)


def _google_encoder(arrays: Mapping[str, Any], prefix: str, names: set[str]) -> dict[str, Any]:
    patch, _, channels, width = arrays[f"{prefix}embedding/kernel"].shape
    block = f"{prefix}Transformer/encoderblock_"
    first = {name.removeprefix(f"{block}0/"): name for name in names if name.startswith(f"{block}0/")}
    heads = next(arrays[name].shape[1] for name in first.values() if name.endswith("query/kernel"))
    hidden = next(arrays[name].shape[1] for name in first.values() if name.endswith("Dense_0/kernel"))
    table = next(name for name in (f"{prefix}Transformer/posembed_input/pos_embedding", f"{prefix}pos_embedding")
                 if name in names)  # fmt: skip
    side = math.isqrt(arrays[table].shape[1] - 1)
    head = f"{prefix}head/bias"
    return {
        "encoder": {
            "name": f"vit_b{patch}", "image_size": side * patch, "patch_size": patch, "embed_dim": width,
            "depth": len({name.removeprefix(block).split("/")[0] for name in names if name.startswith(block)}),
            "num_heads": heads, "mlp_ratio": mlp_ratio_of(hidden, width), "channels": channels, "norm_eps": 1e-6,
            "representation": f"{prefix}pre_logits/kernel" in names,
        },
        "num_classes": arrays[head].shape[0] if head in names else 0,
        "mean": HALF, "std": HALF, "objective": "supervised",
    }  # fmt: skip


def layout_settings(path: Path) -> dict[str, Any]:
    """What the layout of a weights file says of an encoder that its file does not describe: LayerNorm's eps, biases."""
    layout, _ = layout_of(tensor_names(path))
    return dict(layout.settings) if layout else {}


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a weights file, without its tensors and without running what a pickle says."""
    try:
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > path.stat().st_size:
                    return []
                return [name for name in json.loads(file.read(length)) if name != "__metadata__"]
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            operations = pickletools.genops(archive.read(pickled))
            return [argument for _, argument, _ in operations if isinstance(argument, str)]
    except (OSError, ValueError, struct.error, zipfile.BadZipFile, StopIteration):
        return []  # whoever reads the tensors says what is wrong with the file


def _json_of(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
