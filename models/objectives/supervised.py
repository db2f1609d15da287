"""Supervised pretraining and fine-tuning: cross-entropy on the label, hard or mixed, of a softmax or of sigmoids.

Both are linear in the target, so mixed and smoothed targets are weighted sums and no (B, V) target is ever made, also
where an image has several classes.
"""

from collections.abc import Sequence

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

    Mixed images (Mixup, CutMix) carry a second label and the weight of the first; the loss is the weighted sum. With
    `label_sets` a label is the number of a set of classes, each of which is to be said yes to; its accuracy is the
    share of images whose first choice is one of theirs, or that say yes to none where there are none.
    """

    def __init__(
        self, config: SupervisedConfig, encoder: VisionTransformer, seed: int,
        label_sets: Sequence[Sequence[int]] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.config, self.encoder = config, encoder
        self.register_buffer("members", _members(label_sets, encoder.num_classes), persistent=False)
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
        correct = self._is_correct(logits, batch.labels).sum()
        return Outcome(losses.mean(), {"accuracy": correct}, losses.detach())

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,): of each sample, 0 where it has no label."""
        smoothing = self.config.label_smoothing
        if self.config.loss == "softmax":
            return F.cross_entropy(
                logits, labels, ignore_index=NO_LABEL, label_smoothing=smoothing, reduction="none"
            )  # fmt: skip
        # Of scores z and targets t it is the sum of log(1 + exp(z)) - t z, and of t a part is spread over all classes.
        places = self._classes_of(labels)
        of_label = F.pad(logits, (0, 1)).gather(1, places).sum(dim=1)
        count = (places < logits.shape[1]).sum(dim=1)
        expected = (1 - smoothing) * of_label + smoothing * count * logits.mean(dim=1)
        losses = F.softplus(logits).sum(dim=1) - expected
        return torch.where(labels == NO_LABEL, 0.0, losses)

    def _classes_of(self, labels: Tensor) -> Tensor:
        """(B, M) int64: the classes that each label stands for, then their number where there are fewer than M."""
        known = labels.clamp(min=0)
        return known.unsqueeze(1) if self.members is None else self.members[known]

    def _is_correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        best, choice = logits.max(dim=1)
        if self.members is None:
            return choice == labels
        places = self._classes_of(labels)
        none = (places == logits.shape[1]).all(dim=1) & (best < 0)
        return ((places == choice.unsqueeze(1)).any(dim=1) | none) & (labels != NO_LABEL)


def _members(label_sets: Sequence[Sequence[int]] | None, num_classes: int) -> Tensor | None:
    """(labels, M) int64: each set's classes, filled up with `num_classes` to the length of the longest."""
    if label_sets is None:
        return None
    longest = max(1, *map(len, label_sets))
    return torch.tensor([[*numbers, *[num_classes] * (longest - len(numbers))] for numbers in label_sets])
