"""AdaLoRA's allocation of ranks (arXiv:2303.10512, section 3): the least important singular values are set to zero.

What it remembers are buffers, and so part of every checkpoint: a resumed run takes the same values away.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.tuning.config import AdaLoRATuning


class RankAllocation(nn.Module):
    """Importance of every triplet: a singular value with its two vectors, in all layers together.

    All methods see whole weights and gradients, equal on every rank.
    """

    sensitivity: Tensor  # (elements,) float32, of all triplets' numbers, layer by layer
    uncertainty: Tensor  # (elements,) float32
    steps: Tensor  # () int64, those that changed the weights

    def __init__(self, encoder: nn.Module, config: AdaLoRATuning):
        super().__init__()
        self.config = config
        self.layers = tuple(module for module in encoder.modules() if hasattr(module, "lora_E"))  # not ours to own
        elements = sum(parameter.numel() for triplets in self._triplets() for parameter in triplets)
        self.register_buffer("sensitivity", torch.zeros(elements))
        self.register_buffer("uncertainty", torch.zeros(elements))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def _triplets(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(r, in), (out, r) and (r, 1) of each layer: right vectors, left vectors, values."""
        for layer in self.layers:
            yield layer.lora_A["default"], layer.lora_B["default"], layer.lora_E["default"]

    def budget(self, seen: float) -> int:
        """Singular values left when that share of the run has been seen (equation 12)."""
        config, count = self.config, len(self.layers)
        first, last = count * config.initial_rank, count * config.rank
        falling = 1 - config.warmup_share - config.settled_share
        left = 1 - min(max(seen - config.warmup_share, 0.0) / falling, 1.0)
        return last + int((first - last) * left**3)

    @torch.no_grad()
    def observe(self, seen: float) -> None:
        """Add what the gradient at hand says of importance (equations 8 to 10), before it changes the weights."""
        if seen >= 1 - self.config.settled_share:
            return
        now = torch.cat([(p * p.grad).abs().flatten() for triplets in self._triplets() for p in triplets])
        self.sensitivity.lerp_(now, 1 - self.config.sensitivity_decay)
        self.uncertainty.lerp_((now - self.sensitivity).abs(), 1 - self.config.uncertainty_decay)

    @torch.no_grad()
    def allocate(self, seen: float) -> None:
        """Set the values beyond the budget to zero, behind the update of the weights."""
        self.steps += 1
        settled = seen > 1 - self.config.settled_share
        if seen <= self.config.warmup_share or not (settled or self.steps.item() % self.config.every_steps == 0):
            return
        importance = torch.cat(self._importance())
        taken = torch.ones_like(importance)
        taken[importance.argsort(descending=True, stable=True)[: self.budget(seen)]] = 0
        for (*_, values), mask in zip(self._triplets(), taken.bool().split(self.config.initial_rank), strict=True):
            values.masked_fill_(mask.unsqueeze(1), 0.0)

    def _importance(self) -> list[Tensor]:
        """(r,) of each layer: of its value, and the mean over each vector's numbers (equations 7 and 11)."""
        scores = iter((self.sensitivity * self.uncertainty).split([p.numel() for t in self._triplets() for p in t]))
        return [
            next(scores).view_as(right).mean(dim=1) + next(scores).view_as(left).mean(dim=0) + next(scores)
            for right, left, _ in self._triplets()
        ]

    def ranks(self) -> list[int]:
        """Singular values of each layer that are not zero."""
        return [int((values != 0).sum()) for *_, values in self._triplets()]

    def departure(self) -> Tensor:
        """() float32: how far the singular vectors are from orthogonal, the mean over all matrices of the norm."""
        norms = []
        for right, left, _ in self._triplets():
            for products in (right.float() @ right.float().T, left.float().T @ left.float()):
                identity = torch.eye(len(products), device=products.device)
                norms.append(torch.linalg.matrix_norm(products - identity))
        return torch.stack(norms).mean()


def regularise(module: nn.Module, arguments: tuple[Any, ...], outcome: Any) -> Any:
    """A forward hook of an objective with `ranks`: its loss pulls the singular vectors towards orthogonal ones."""
    if not module.training:
        return outcome
    return outcome._replace(loss=outcome.loss + module.ranks.config.orthogonality * module.ranks.departure())
