"""Loading foreign or older weights into an encoder, with an account of every tensor."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.positions import resample_position_embedding

HEAD = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")


class WeightsError(ValueError):
    """Weights that do not fit the encoder."""


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor: of the encoder's, loaded, resized or missing; of the source's, unexpected."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for word, names in (("resized", self.resized), ("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
                parts.append(f"{len(names)} {word} ({shown})")
        return "; ".join(parts)


def _best_prefix(names: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The prefix of the source's names under which most of the encoder's names are found."""
    candidates = {""}
    for name in names:
        for anchor in ("patch_embed.", "blocks.0."):
            place = name.find(anchor)
            if place > 0:
                candidates.add(name[:place])
    return max(sorted(candidates), key=lambda prefix: sum(prefix + name in names for name in wanted))


@torch.no_grad()
def load_encoder_weights(
    encoder: VisionTransformer, weights: Mapping[str, Tensor], *, head: bool, grid: tuple[int, int] | None = None
) -> LoadReport:
    """Copy what fits; resample the position embedding to the encoder's grid; leave the head alone unless `head`.

    `grid` is the source's (rows, columns) of patches, needed only where they are not a square. Raises WeightsError
    where a tensor has another shape for another reason, or where no block was found.
    """
    wanted, our_grid = dict(encoder.state_dict()), encoder.patch_embed.grid_size
    prefix = _best_prefix(weights, wanted)
    source = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    loaded, resized, missing = [], [], []
    for name, target in wanted.items():
        if name in HEAD and not head:
            continue
        found = source.get(name)
        if found is None:
            missing.append(name)
            continue
        resize = found.shape != target.shape or grid not in (None, our_grid)
        if name == "pos_embed" and resize and found.shape[-1] == target.shape[-1]:
            found = resample_position_embedding(found, our_grid, encoder.num_prefix_tokens, grid)
            resized.append(name)
        if found.shape != target.shape:
            raise WeightsError(f"{name}: shape {tuple(found.shape)}, the encoder needs {tuple(target.shape)}")
        target.copy_(found)
        if name not in resized:
            loaded.append(name)
    if not any(name.startswith("blocks.") for name in loaded):
        raise WeightsError(f"no block of the encoder is in these weights ({len(weights)} tensors, none loaded)")
    unexpected = tuple(sorted(source.keys() - wanted.keys()))
    return LoadReport(tuple(loaded), tuple(resized), tuple(missing), unexpected)
