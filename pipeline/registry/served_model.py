"""What `mlflow.pyfunc.load_model(uri)` runs: a models-from-code file that imports nothing of this project.

MLflow copies this file beside the weights and executes it wherever the model is loaded.
"""

import io
import os

import mlflow
import numpy as np
import timm
import torch
from mlflow.pyfunc import PythonModel
from PIL import Image
from timm.data import create_transform, resolve_data_config


class VisionTransformerModel(PythonModel):
    """Images in, class probabilities out; pooled features where the model has no head. `module` is trainable."""

    def load_context(self, context):
        self.module = timm.create_model("local-dir:" + context.artifacts["hf"], pretrained=True).eval()
        self.transform = create_transform(**resolve_data_config({}, model=self.module), is_training=False)

    def predict(self, context, model_input, params=None):
        """(S, V) float32 probabilities, or (S, D) features.

        `model_input` is a list of PIL images, (H, W, C) uint8 arrays, encoded bytes or paths, an (S, H, W, C) uint8
        array, or a data frame whose first column holds any of these.
        """
        if hasattr(model_input, "iloc"):
            model_input = model_input.iloc[:, 0].tolist()
        images = [self._open(item) for item in model_input]
        if not images:
            return np.zeros((0, self.module.num_classes or self.module.num_features), np.float32)
        device = next(self.module.parameters()).device
        training = self.module.training
        self.module.eval()
        rows = []
        with torch.inference_mode():
            for start in range(0, len(images), 32):
                batch = torch.stack([self.transform(image) for image in images[start : start + 32]]).to(device)
                out = self.module(batch).float()
                rows.append((out.softmax(dim=1) if self.module.num_classes else out).cpu().numpy())
        self.module.train(training)
        return np.concatenate(rows)

    def _open(self, item):
        if isinstance(item, Image.Image):
            image = item
        elif isinstance(item, np.ndarray):
            image = Image.fromarray(item.squeeze(-1) if item.ndim == 3 and item.shape[-1] == 1 else item)
        elif isinstance(item, bytes):
            image = Image.open(io.BytesIO(item))
        elif isinstance(item, (str, os.PathLike)):
            image = Image.open(item)
        else:
            raise TypeError(f"an image is a PIL image, an array, bytes or a path, not {type(item).__name__}")
        return image.convert("L" if self.module.in_chans == 1 else "RGB")


mlflow.models.set_model(VisionTransformerModel())
