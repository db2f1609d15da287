"""Supervised pretraining and fine-tuning: cross-entropy on the label, hard or mixed, of a softmax or of sigmoids.

Both are linear in the target, so mixed and smoothed targets are weighted sums and no (B, V) target is ever made.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.encoders.drop_path import place_drop_path
from models.encoders.timm_network import linear_heads
from models.objectives.batch import NO_LABEL, Batch, Outcome
from models.objectives.config import SupervisedConfig


class SupervisedObjective(nn.Module):
    """Maps a batch to the mean cross-entropy of its labels.

    Mixed images (Mixup, CutMix) carry a second label and the weight of the first; the loss is the weighted sum.
    """

    def __init__(self, config: SupervisedConfig, encoder: VisionTransformer, seed: int):
        super().__init__()
        self.config, self.encoder = config, encoder
        if config.head_bias:
            for head in linear_heads(encoder):
                nn.init.constant_(head.bias, config.head_bias)
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
        """(B,): of each sample, 0 where it has no label."""
        smoothing = self.config.label_smoothing
        if self.config.loss == "softmax":
            return F.cross_entropy(
                logits, labels, ignore_index=NO_LABEL, label_smoothing=smoothing, reduction="none"
            )  # fmt: skip
        # Of scores z and targets t it is the sum of log(1 + exp(z)) - t z, and of t all but the label's part is spread.
        of_label = logits.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        expected = (1 - smoothing) * of_label + smoothing * logits.mean(dim=1)
        losses = F.softplus(logits).sum(dim=1) - expected
        return torch.where(labels == NO_LABEL, 0.0, losses)
