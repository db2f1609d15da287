"""What an encoder and a decoder are, as typed configs without torch.

An encoder is named by its size and patch (`vit_l16`) or by timm's name for it (`vit_large_patch16_224`); after
validation every number that builds it stands in the config, so a plan can count its parameters without building it.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from models.schema import NOT_A_SWITCH, Config, Rate, Size

# letter: (timm's word, embed_dim, depth, num_heads, mlp_ratio); widths as in arXiv:2010.11929 table 1, arXiv:2012.12877
# table 1 (Ti, S) and arXiv:2106.04560 table 2 (g, G).
SIZES: dict[str, tuple[str, int, int, int, float]] = {
    "ti": ("tiny", 192, 12, 3, 4.0),
    "s": ("small", 384, 12, 6, 4.0),
    "b": ("base", 768, 12, 12, 4.0),
    "l": ("large", 1024, 24, 16, 4.0),
    "h": ("huge", 1280, 32, 16, 4.0),
    "g": ("giant", 1408, 40, 16, 48 / 11),
    "gg": ("gigantic", 1664, 48, 16, 64 / 13),
}
_OUR_NAME = re.compile(r"vit_([a-z]+)(\d+)")
_TIMM_NAME = re.compile(r"vit_([a-z]+)_patch(\d+)_(\d+)")


def _encoder_defaults(name: str) -> dict[str, Any]:
    """The numbers that an encoder's name stands for; raises ValueError for a name that stands for none."""
    words = {word: letter for letter, (word, *_) in SIZES.items()}
    if match := _OUR_NAME.fullmatch(name):
        letter, patch, image = match[1], int(match[2]), 224
    elif (match := _TIMM_NAME.fullmatch(name)) and match[1] in words:
        letter, patch, image = words[match[1]], int(match[2]), int(match[3])
    else:
        letter, patch, image = "", 0, 0
    if letter not in SIZES or patch == 0:
        known = ", ".join(f"vit_{size}{'14' if size in ('h', 'g', 'gg') else '16'}" for size in SIZES)
        raise ValueError(f"name `{name}` is no encoder's; there are: {known}, with any patch size")
    _, embed_dim, depth, num_heads, mlp_ratio = SIZES[letter]
    return {
        "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio,
        "patch_size": patch, "image_size": image,
    }  # fmt: skip


class EncoderConfig(Config):
    """A plain Vision Transformer that timm's VisionTransformer expresses."""

    name: str
    """Size and patch, `vit_l16`, or timm's name, `vit_large_patch16_224`: the numbers below that are not set."""
    image_size: Size | tuple[Size, Size]
    """Side of the square input, pixels, or [height, width]."""
    patch_size: Size
    """Side of a patch, pixels; divides the sides of the input."""
    embed_dim: Size
    """Width of a token."""
    depth: Size
    """Number of transformer blocks."""
    num_heads: Size
    """Attention heads per block; divides embed_dim."""
    mlp_ratio: Annotated[float, Field(gt=0, le=1000), NOT_A_SWITCH]
    """Hidden width of a block's MLP, as a multiple of embed_dim."""
    channels: Size = 3
    """Channels of the input image."""
    pooling: Literal["token", "mean"] = "token"
    """What the head reads: the class token, or the mean of the patch tokens."""
    positions: Literal["learned", "sincos2d"] = "learned"
    """Position embedding: learned 1-D (ViT), or fixed 2-D sine-cosine (MAE, MoCo v3)."""
    distillation_token: bool = False
    """A second learned token with a head of its own, which a teacher's word is learned by (DeiT, arXiv:2012.12877,
    section 4). Without a teacher at hand the two heads are averaged."""
    drop_path_rate: Rate = 0.0
    """Stochastic depth of the last block; earlier blocks linearly less. 0 is off."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_from_name(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if not isinstance(name := raw.get("name"), str):
            raise ValueError("name: say which encoder it is, for example vit_b16")
        return _encoder_defaults(name) | raw

    @model_validator(mode="after")
    def _check(self) -> "EncoderConfig":
        if any(side % self.patch_size for side in self.input_size):
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.mlp_dim < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio:g} of embed_dim {self.embed_dim} leaves an MLP without width")
        if self.distillation_token and self.pooling != "token":
            raise ValueError(f"distillation_token: its head stands beside the class token's; pooling {self.pooling}")
        if self.positions == "sincos2d" and self.embed_dim % 4:
            raise ValueError(f"sincos2d positions need an embed_dim that 4 divides, not {self.embed_dim}")
        return self

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width), pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.input_size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Class and distillation tokens."""
        return 1 + self.distillation_token

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)


class DecoderConfig(Config):
    """The light transformer that a masked autoencoder throws away after pretraining."""

    embed_dim: Size = 512
    """Width of a decoder token."""
    depth: Size = 8
    """Number of blocks."""
    num_heads: Size = 16
    """Attention heads per block; divides embed_dim."""

    @model_validator(mode="after")
    def _check(self) -> "DecoderConfig":
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}, and of 4 for its "
                "sine-cosine positions"
            )
        return self
