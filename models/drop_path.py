"""Stochastic depth whose coin is tossed by the sample's position, so that world size and restarts change nothing."""

from timm.layers import DropPath
from torch import Tensor, nn

from models.randomness import position_uniform


class PositionDropPath(nn.Module):
    """Drops a residual branch per sample with probability `rate` (arXiv:1603.09382), scaled to keep its mean.

    `coins` is shared by all layers of a model: its `positions` are set before each training forward.
    """

    def __init__(self, rate: float, layer: int, coins: "Coins"):
        super().__init__()
        self.rate, self.layer, self.coins = rate, layer, coins

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.coins.positions is None:
            return branch
        toss = position_uniform(self.coins.seed, f"drop_path {self.layer}", self.coins.positions, 1)
        keep = (toss >= self.rate).to(branch.dtype) / (1 - self.rate)  # (B, 1)
        return branch * keep.view(-1, *[1] * (branch.ndim - 1))


class Coins:
    """The positions of the samples in the current micro-batch, (B,) int64, and the run's seed."""

    def __init__(self, seed: int):
        self.seed = seed
        self.positions: Tensor | None = None


def place_drop_path(module: nn.Module, seed: int) -> Coins:
    """Replace every timm DropPath inside `module`; returns the coins to set before each training forward."""
    coins = Coins(seed)
    layer = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DropPath):
                layer += 1
                setattr(parent, name, PositionDropPath(float(child.drop_prob), layer, coins))
    return coins
