"""Distillation: learn from a trained network's logits, soft (arXiv:1503.02531) or hard (DeiT, arXiv:2012.12877)."""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.encoders.drop_path import place_drop_path
from models.encoders.vit import logits_by_head
from models.objectives.batch import NO_LABEL, Batch, Outcome
from models.objectives.config import DistillConfig
from models.objectives.teacher import Teacher


class Distillation(nn.Module):
    """Maps a batch to the weighted sum of two losses: towards its labels, and towards what the teacher says.

    The teacher sees the very images that the student sees, mixed ones too (DeiT, section 5.1). An encoder with a
    distillation token learns from the teacher by that token's head, and from labels by the other (section 4); what is
    scored is the mean of both, as such an encoder predicts.
    """

    def __init__(self, config: DistillConfig, encoder: VisionTransformer, teacher: Teacher, seed: int):
        super().__init__()
        self.config, self.encoder = config, encoder
        self._teacher = (teacher,)  # in a tuple it is no part of this module: nobody trains it, saves it or casts it
        self.coins = place_drop_path(encoder, seed)

    @property
    def teacher(self) -> Teacher:
        return self._teacher[0]

    def place_teacher(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The teacher on `device`; it follows none of the parameters."""
        self.teacher.to(device, dtype)
        return {}

    def forward(self, batch: Batch) -> Outcome:
        self.coins.toss(batch.positions)
        logits = [one.float() for one in logits_by_head(self.encoder, batch.images)]  # (B, V) each
        losses = (1 - self.config.label_weight) * self.teacher_losses(logits[-1], self.teacher(batch.images))
        if not self.config.label_weight:
            return Outcome(losses.mean(), {}, losses.detach())
        losses = losses + self.config.label_weight * self.label_losses(logits[0], batch)
        correct = (sum(logits).argmax(dim=1) == batch.labels).sum()
        return Outcome(losses.mean(), {"accuracy": correct}, losses.detach())

    def teacher_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B, V) logits of student and teacher to (B,): equations 2 and 3 of DeiT, without their weights."""
        if self.config.distillation == "hard":
            return F.cross_entropy(logits, target.argmax(dim=1), reduction="none")
        temperature = self.config.temperature
        ours, theirs = (one.div(temperature).log_softmax(dim=1) for one in (logits, target))
        return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(dim=1) * temperature**2

    def label_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """(B,): cross-entropy of the label, or of both labels of a mixed image by their weights."""
        losses = self._cross_entropy(logits, batch.labels)
        if batch.mixed_labels is None:
            return losses
        return torch.lerp(self._cross_entropy(logits, batch.mixed_labels), losses, batch.mix_weights)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        return F.cross_entropy(logits, labels, ignore_index=NO_LABEL, label_smoothing=smoothing, reduction="none")
