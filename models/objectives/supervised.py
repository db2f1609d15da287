"""Supervised pretraining and fine-tuning: softmax cross-entropy on the label, hard or mixed."""

import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.drop_path import place_drop_path
from models.objective_config import SupervisedConfig
from models.objectives.batch import NO_LABEL, Batch, Outcome


class SupervisedObjective(nn.Module):
    """Maps a batch to the mean cross-entropy of its labels.

    Mixed images (Mixup, CutMix) carry a second label and the weight of the first; the loss is the weighted sum.
    """

    def __init__(self, config: SupervisedConfig, encoder: VisionTransformer, seed: int):
        super().__init__()
        self.config, self.encoder = config, encoder
        self.coins = place_drop_path(encoder, seed)

    def forward(self, batch: Batch) -> Outcome:
        self.coins.toss(batch.positions)
        logits = self.encoder(batch.images).float()  # (B, V); the loss is computed in float32
        losses = self._cross_entropy(logits, batch.labels)
        if batch.mixed_labels is not None:
            weight = batch.mix_weights
            losses = weight * losses + (1 - weight) * self._cross_entropy(logits, batch.mixed_labels)
        correct = (logits.argmax(dim=1) == batch.labels).sum()
        return Outcome(losses.mean(), {"accuracy": correct}, losses.detach())

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, labels, ignore_index=NO_LABEL, label_smoothing=self.config.label_smoothing, reduction="none"
        )
