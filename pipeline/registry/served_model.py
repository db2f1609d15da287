"""What `mlflow.pyfunc.load_model(uri)` runs: a models-from-code file that imports nothing of this project.

MLflow copies this file beside the weights and executes it wherever the model is loaded. Every file of the model is held
to SHA256SUMS first. `model_config={"device": "cuda"}`, or MLFLOW_DEFAULT_PREDICTION_DEVICE, chooses where it computes.
"""

import base64
import binascii
import hashlib
import io
import json
import os
import sys
from pathlib import Path

import mlflow
import numpy as np
import timm
import torch
from mlflow.pyfunc import PythonModel
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config

SUMS = "SHA256SUMS"
KNOWN_MODES = ("1", "I", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
BASE64_SHOWN = 40  # characters of a string that is no image, in the error


class VisionTransformerModel(PythonModel):
    """Images in; out come probabilities (softmax, or a sigmoid each where config.json says that it learned so), or
    pooled features where the model has no head. `module` is trainable, `classes` are the names of its outputs."""

    # What `predict` takes has many types, so none is named; without this, MLflow warns of that wherever it is loaded.
    _skip_type_hint_validation = True

    def load_context(self, context):
        directory, settings = Path(context.artifacts["hf"]), context.model_config or {}
        _require_whole(directory)
        config = json.loads((directory / "config.json").read_text())
        self.classes = config.get("label_names", [])
        self.outputs = config.get("vit", {}).get("outputs", "softmax")
        device = settings.get("device") or os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE") or "cpu"
        self.batch_size = int(settings.get("batch_size") or 32)
        self.module = timm.create_model(f"local-dir:{directory}", pretrained=True).eval().to(device)
        self.transform = create_transform(**resolve_data_config({}, model=self.module), is_training=False)

    def predict(self, context, model_input, params=None):
        """(S, V) float32 probabilities, or (S, D) features.

        `model_input` is one image or a list of them: PIL images, (H, W, C) or (H, W) uint8 arrays, encoded bytes,
        paths, base64 of an encoded file (also behind `data:image/...;base64,`); or an (S, H, W, C) uint8 array; or a
        data frame or a dictionary with such a column, its only one or the one named `image`.
        """
        return self._rows(model_input, lambda batch: self._activated(self.module(batch).float()), self._width)

    def features(self, model_input):
        """(S, D) float32: what the head reads, pooled as the model was trained. Images as `predict` takes them."""
        return self._rows(model_input, self._pooled, self.module.num_features)

    @property
    def _width(self):
        return self.module.num_classes or self.module.num_features

    def _pooled(self, batch):
        return self.module.forward_head(self.module.forward_features(batch), pre_logits=True).float()

    def _rows(self, model_input, compute, width):
        images = [self._open(item) for item in _items(model_input)]
        if not images:
            return np.zeros((0, width), np.float32)
        device = next(self.module.parameters()).device
        training = self.module.training
        self.module.eval()
        rows = []
        try:
            with torch.inference_mode():
                for start in range(0, len(images), self.batch_size):
                    chosen = images[start : start + self.batch_size]
                    batch = torch.stack([self.transform(image) for image in chosen]).to(device)
                    rows.append(compute(batch).cpu().numpy())
        finally:
            self.module.train(training)
        return np.concatenate(rows)

    def _activated(self, out):
        if not self.module.num_classes:
            return out
        return out.sigmoid() if self.outputs == "sigmoid" else out.softmax(dim=1)

    def _open(self, item):
        if isinstance(item, Image.Image):
            image = item
        elif isinstance(item, np.ndarray):
            if item.dtype != np.uint8 or item.ndim not in (2, 3):
                raise TypeError(f"an array is (H, W, C) or (H, W) uint8, not {item.shape} {item.dtype}")
            image = Image.fromarray(item.squeeze(-1) if item.ndim == 3 and item.shape[-1] == 1 else item)
        elif isinstance(item, (bytes, bytearray, memoryview)):
            image = Image.open(io.BytesIO(item))
        elif isinstance(item, str):
            image = Image.open(_file_or_base64(item))
        elif isinstance(item, os.PathLike):
            image = Image.open(item)
        else:
            raise TypeError(f"an image is a PIL image, an array, bytes, a path or base64, not {type(item).__name__}")
        return _upright(image).convert("L") if self.module.in_chans == 1 else _rgb(_upright(image))


def _upright(image):
    """Turned as its EXIF says, and 8 bits deep: what a dataset holds of such a file, and the model was scored on."""
    if image.mode not in KNOWN_MODES and not image.mode.startswith("I;16"):
        raise ValueError(f"an image of mode {image.mode} has no agreed meaning as RGB; convert it first")
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata; `vit ingest` passes it over, too
        upright = image
    if not upright.mode.startswith("I"):
        return upright
    values = np.asarray(upright).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"an image of mode {image.mode} with values beyond 16 bit; scale it first")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _rgb(image):
    """On white where it is transparent."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _items(model_input):
    """The images of what `predict` was given, as a list or an array of them."""
    if hasattr(model_input, "iloc"):
        model_input = {str(name): model_input[name].tolist() for name in model_input.columns}
    if isinstance(model_input, dict):
        if len(model_input) != 1 and "image" not in model_input:
            raise ValueError(f"columns {', '.join(map(str, model_input))}: give one column of images, or name it image")
        model_input = model_input["image"] if "image" in model_input else next(iter(model_input.values()))
    alone = isinstance(model_input, (str, bytes, os.PathLike, Image.Image))
    if isinstance(model_input, np.ndarray) and model_input.dtype == np.uint8:
        alone = model_input.ndim < 4
    elif isinstance(model_input, np.ndarray):  # of strings or objects, as a server parses a request
        model_input = model_input.reshape(-1).tolist()
    return [model_input] if alone else model_input


def _file_or_base64(text):
    """A path that exists, or the decoded bytes of a file in base64 as a JSON request carries it.

    Who asks a server (`mlflow models serve`) sends images: the files of its machine are none of theirs.
    """
    served = "mlflow.pyfunc.scoring_server" in sys.modules
    try:
        if not served and os.path.isfile(text):
            return text
        return io.BytesIO(base64.b64decode(text.partition(";base64,")[2] or text, validate=True))
    except (ValueError, binascii.Error):
        shown = text if len(text) <= BASE64_SHOWN else f"{text[:BASE64_SHOWN]}..."
        what = "not base64" if served else "neither a file on this machine nor base64"
        raise ValueError(f"{shown!r} is {what} of an image file") from None


def _require_whole(directory):
    """ValueError naming the first file of the model that is not what SHA256SUMS says, or that it does not list."""
    try:
        lines = (directory / SUMS).read_text().splitlines()
    except FileNotFoundError:
        raise ValueError(f"{directory}: {SUMS} is missing; the model is not whole, take it from the registry") from None
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()} - {SUMS}
    for name in sorted(found | expected.keys()):
        path = directory / name
        if name not in found:
            raise ValueError(f"{path}: is missing; the model is not whole, take it from the registry")
        if name not in expected:
            raise ValueError(f"{path}: is not listed in {SUMS}; somebody put it there, take it from the registry")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected[name]:
                raise ValueError(f"{path}: its bytes are not those registered (sha256 differs); it was damaged or "
                                 "changed, take it from the registry")  # fmt: skip


mlflow.models.set_model(VisionTransformerModel())
