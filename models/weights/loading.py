"""Loading foreign or older weights into an encoder, with an account of every tensor.

Weights are loaded before the engine takes the module: ZeRO-3 leaves empty tensors in their place afterwards, and
loading into those is refused.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.encoders.timm_network import head_names
from models.weights.foreign import to_timm
from models.weights.layouts import Layout
from models.weights.resizing import resized

HEAD = {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias", "head_drop.fc.weight", "head_drop.fc.bias"}


_OF_TUNING = re.compile(r"\.adapter\.(down|up)\.|^prompts\.\d+\.|\.lora_[ABE]\.|\.base_layer\.")


class WeightsError(ValueError):
    """Weights that do not fit the encoder."""


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor: of the encoder's, loaded, resized or missing; of the source's, unexpected or, where
    a fresh head is wanted, left out. `notes` say by what rule a tensor was changed, and what else differs."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for word in ("resized", "missing", "unexpected", "left_out"):
            if names := getattr(self, word):
                shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
                parts.append(f"{len(names)} {word.replace('_', ' ')} ({shown})")
        return "; ".join([*parts, *self.notes])


def _best_prefix(names: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The prefix of the source's names under which most of the encoder's names are found."""
    anchors = [name for name in wanted if "patch_embed." in name or "blocks.0." in name] or list(wanted)[:20]
    candidates = {name.removesuffix(anchor) for name in names for anchor in anchors if name.endswith("." + anchor)}
    return max(sorted(candidates | {""}), key=lambda prefix: sum(prefix + name in names for name in wanted))


@torch.no_grad()
def load_encoder_weights(
    encoder: nn.Module, weights: Mapping[str, Tensor], *, head: bool, grid: tuple[int, int] | None = None
) -> LoadReport:
    """Copy what fits, of timm's layout or one of `layouts`; resize positions and the channels of the patch embedding;
    leave the head alone unless `head`.

    `grid` is the source's (rows, columns) of patches, needed only where they are not a square behind its own tokens.
    Raises WeightsError where a tensor has another shape for another reason, where timm does not express the network, or
    where no block was found.
    """
    wanted = dict(encoder.state_dict())
    if any(parameter.numel() == 0 for parameter in encoder.parameters()):
        raise WeightsError("the encoder's weights are in parts (ZeRO-3); load before the engine takes the module")
    try:
        weights, layout = to_timm(weights, getattr(encoder, "in_chans", 3))
    except ValueError as error:
        raise WeightsError(str(error)) from None
    prefix = _best_prefix(weights, wanted)
    inside = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    source = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)} | inside
    grid = grid or _square_grid(source)
    done: dict[str, list[str]] = {"loaded": [], "resized": [], "missing": []}
    notes, of_head = _differing_eps(encoder, layout), HEAD | head_names(encoder)
    for name, target in wanted.items():
        if name in of_head and not head:
            continue
        if (found := source.get(name)) is None:
            done["missing"].append(name)
            continue
        rule = _copy(name, found, target, encoder, grid)
        done["resized" if rule else "loaded"].append(name)
        notes += [f"{name}: {rule}"] if rule else []
    blocks = any(name.startswith("blocks.") for name in wanted)
    if not any(name.startswith("blocks.") for name in done["loaded"]) if blocks else not done["loaded"]:
        raise WeightsError(f"no block of the encoder is in these weights ({len(weights)} tensors, none loaded)")
    of_other_heads = tuple(f"{place}." for place in ("head", "head_dist"))  # a probe's
    left_out = {
        name for name in source
        if not head and (name in of_head or (name not in wanted and name.startswith(of_other_heads)))
    }  # fmt: skip
    unexpected = source.keys() - wanted.keys() - left_out
    if added := sorted(name for name in unexpected if _OF_TUNING.search(name)):
        raise WeightsError(
            f"{added[0]}: the weights are of a network with adapters, prompts or unmerged low-rank layers, which this "
            "one has not; name the run that trained them, or the model that it was tuned from"
        )
    of_encoder = {word: tuple(names) for word, names in done.items()}
    return LoadReport(
        **of_encoder, unexpected=tuple(sorted(unexpected)), left_out=tuple(sorted(left_out)), notes=tuple(notes)
    )


@torch.no_grad()
def load_beside_encoder(module: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Copy what an objective's `module` trains beside its encoder, a decoder for example, from weights of the same
    objective, where all of it has the same shapes; none of it elsewhere. What was done, in words.

    Fixed tables of positions are those of the module's own grid.
    """
    own = {n: p for n, p in module.named_parameters() if p.requires_grad and not n.startswith("encoder.")}
    other = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    if other:
        return f"what learns beside the encoder begins anew: {len(other)} of {len(own)} tensors are others ({other[0]})"
    for name, parameter in own.items():
        parameter.copy_(weights[name])
    return f"{len(own)} tensors beside the encoder loaded"


def _square_grid(source: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The (rows, columns) that a table of positions is of, where a square is left behind the source's own tokens."""
    if (table := source.get("pos_embed")) is None or table.ndim != 3:
        return None
    tokens = sum(source[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in source)
    side = math.isqrt(max(0, table.shape[1] - tokens))
    return (side, side) if side and side * side == table.shape[1] - tokens else None


def _copy(name: str, found: Tensor, target: Tensor, encoder: nn.Module, grid: tuple[int, int] | None) -> str | None:
    """Into `target`; the rule by which the tensor was changed to fit, if it was."""
    try:
        fitted, rule = resized(name, found, target, encoder, grid)
    except ValueError as error:
        raise WeightsError(str(error)) from None
    if fitted.shape != target.shape:
        raise WeightsError(f"{name}: shape {tuple(found.shape)}, the encoder needs {tuple(target.shape)}")
    target.copy_(fitted)
    return rule


def _differing_eps(encoder: nn.Module, layout: Layout | None) -> list[str]:
    """A line where the encoder's LayerNorms add another number to the variance than those of the source."""
    norms = [module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    if layout is None or not norms or norms[0] == layout.settings["norm_eps"]:
        return []
    return [
        f"LayerNorm eps is {norms[0]:g}, and weights of {layout.name} were learned with {layout.settings['norm_eps']:g}"
    ]
