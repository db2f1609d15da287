"""Stochastic depth whose coin is tossed by the sample's position, so that world size and restarts change nothing."""

from timm.layers import DropPath
from torch import Tensor, nn

from models.randomness import position_uniform


class PositionDropPath(nn.Module):
    """Drops a residual branch per sample with probability `rate` (arXiv:1603.09382), scaled to keep its mean.

    The coins lie in `scale`, a tensor and not a number of this layer, so that every block compiles to the same graph.
    """

    def __init__(self, rate: float, layer: int):
        super().__init__()
        self.rate, self.layer = rate, layer
        self.scale: Tensor | None = None  # (B, 1) float32: 0 where dropped, else 1 / (1 - rate)

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.scale is None:
            return branch
        return branch * self.scale.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))


class Coins:
    """Tosses the coins of all drop paths of a model, before each training forward."""

    def __init__(self, seed: int, paths: list[PositionDropPath]):
        self.seed, self.paths = seed, paths

    def toss(self, positions: Tensor) -> None:
        """`positions`: (B,) int64, those of the samples in the micro-batch."""
        for path in self.paths:
            draws = position_uniform(self.seed, f"drop_path {path.layer}", positions, 1)
            path.scale = (draws >= path.rate).float() / (1 - path.rate)


def place_drop_path(module: nn.Module, seed: int) -> Coins:
    """Replace every timm DropPath inside `module`; returns the coins to toss before each training forward."""
    paths: list[PositionDropPath] = []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DropPath):
                paths.append(PositionDropPath(float(child.drop_prob), len(paths) + 1))
                setattr(parent, name, paths[-1])
    return Coins(seed, paths)
