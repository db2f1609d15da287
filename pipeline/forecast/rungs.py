"""What makes a run a rung of a ladder: a smaller encoder, a slice of the data. Torch-free."""

from typing import Any

from models.encoders.config import SIZES, EncoderConfig
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError


def sizes(config: TrainingConfig, goes_on: bool, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """The sizes `asked` for, or those that suit a run's encoder; InputError for one that is no smaller network of its
    kind. A run that `goes_on` from a model has that model's size alone."""
    encoder = config.encoder
    fixed = "timm's networks have no sizes here" if not isinstance(encoder, EncoderConfig) else None
    if goes_on:
        fixed = "the run goes on from a model, which has one size"
    if fixed is not None:
        if asked not in (None, ("own",)):
            raise InputError(f"--set ladder.sizes: {fixed}; leave it out, or say [own]")
        return ("own",)
    larger = [size for size in asked or () if size in SIZES and not _is_smaller(size, encoder)]
    if larger:
        raise InputError(
            f"--set ladder.sizes: {larger[0]} is no smaller than the recipe's encoder; say own for its own size"
        )
    return asked or (("ti", "s") if _is_smaller("s", encoder) else ("half", "own"))


def _is_smaller(size: str, encoder: EncoderConfig) -> bool:
    _, embed_dim, depth, _, _ = SIZES[size]
    return embed_dim * embed_dim * depth < encoder.embed_dim * encoder.embed_dim * encoder.depth


def size_settings(size: str, encoder: Any) -> list[str]:
    """What makes the encoder that size: its patches, input and all else stay."""
    if size == "own":
        return []
    if size == "half":
        heads = encoder.num_heads // 2
        if not heads:
            return [f"encoder.depth={max(1, encoder.depth // 2)}"]
        width = encoder.embed_dim // encoder.num_heads * heads
        return [f"encoder.embed_dim={width}", f"encoder.num_heads={heads}"]
    _, embed_dim, depth, num_heads, mlp_ratio = SIZES[size]
    image = list(encoder.image_size) if isinstance(encoder.image_size, tuple) else encoder.image_size
    return [
        f"encoder.name=vit_{size}{encoder.patch_size}", f"encoder.image_size={image}", f"encoder.embed_dim={embed_dim}",
        f"encoder.depth={depth}", f"encoder.num_heads={num_heads}", f"encoder.mlp_ratio={mlp_ratio}",
    ]  # fmt: skip


def slice_settings(fraction: float, config: TrainingConfig) -> list[str]:
    """A slice of the data, and as many passes over it as the full run makes over all."""
    unit, amount = config.length
    settings = [f"data.label_fraction={fraction * config.data.label_fraction:.12g}", "checkpoint.keep=1"]
    if unit != "epochs":
        settings.append(f"{unit}={max(1, round(amount * fraction))}")
    return settings
