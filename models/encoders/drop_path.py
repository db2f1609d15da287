"""Stochastic depth and dropout whose coins are tossed by the sample's position, so that world size and restarts change
nothing."""

from timm.layers import DropPath
from torch import Tensor, nn

from models.randomness import keyed_uniform, position_keys, position_uniform


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
        scale = self.scale.to(branch.dtype)
        if len(branch) != len(scale):  # an image's windows, one behind the other
            scale = scale.repeat_interleave(len(branch) // len(scale), dim=0)
        return branch * scale.view(-1, *[1] * (branch.ndim - 1))


class PositionDropout(nn.Module):
    """Drops single activations with probability `rate` (arXiv:1207.0580), scaled to keep their mean.

    What is drawn derives from `keys`, a tensor, as with `PositionDropPath`. Activations recomputed in backward drop
    the same.
    """

    def __init__(self, rate: float, layer: int):
        super().__init__()
        self.rate, self.layer = rate, layer
        self.keys: Tensor | None = None  # (B, 1) int64

    def forward(self, activations: Tensor) -> Tensor:
        if not self.training or self.keys is None:
            return activations
        draws = keyed_uniform(self.keys, activations.numel() // len(self.keys)).view(activations.shape)
        return activations * ((draws >= self.rate) / (1 - self.rate)).to(activations.dtype)


class Coins:
    """Tosses the coins of all drop paths and dropouts of a model, before each training forward."""

    def __init__(self, seed: int, paths: list[PositionDropPath], dropouts: list[PositionDropout]):
        self.seed, self.paths, self.dropouts = seed, paths, dropouts

    def toss(self, positions: Tensor) -> None:
        """`positions`: (B,) int64, those of the samples in the micro-batch."""
        for path in self.paths:
            draws = position_uniform(self.seed, f"drop_path {path.layer}", positions, 1)
            path.scale = (draws >= path.rate).float() / (1 - path.rate)
        for dropout in self.dropouts:
            dropout.keys = position_keys(self.seed, f"dropout {dropout.layer}", positions)

    def place(self, module: nn.Module) -> None:
        """Replace every DropPath and Dropout inside `module` by one that these coins are tossed for."""
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, DropPath):
                    self.paths.append(PositionDropPath(float(child.drop_prob), len(self.paths) + 1))
                    setattr(parent, name, self.paths[-1])
                elif isinstance(child, nn.Dropout) and child.p:
                    self.dropouts.append(PositionDropout(child.p, len(self.dropouts) + 1))
                    setattr(parent, name, self.dropouts[-1])
                    if name == "attn_drop" and getattr(parent, "fused_attn", False):
                        parent.fused_attn = False  # the fused kernel tosses coins of its own


def place_drop_path(module: nn.Module, seed: int) -> Coins:
    """Replace every DropPath and Dropout of timm inside `module`; returns the coins to toss before each forward."""
    coins = Coins(seed, [], [])
    coins.place(module)
    return coins
