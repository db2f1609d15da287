"""What an encoder is, as a typed config without torch.

It is named by its size and patch (`vit_l16`) or by timm's name for it (`vit_large_patch16_224`); after validation every
number that builds it stands in the config, so a plan can count its parameters without building it. Every combination
that validates is one of timm's classes: VisionTransformer, with relative positions VisionTransformerRelPos, with rotary
ones Eva. What those lack is refused here, in one line.
"""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from models.schema import NOT_A_SWITCH, Config, Positive, Rate, Size

# letter: (timm's word, embed_dim, depth, num_heads, mlp_ratio); widths as in arXiv:2010.11929 table 1, arXiv:2012.12877
# table 1 (Ti, S) and arXiv:2106.04560 table 2 (g, G). 2b is nobody's: a round number of parameters to plan with.
SIZES: dict[str, tuple[str, int, int, int, float]] = {
    "ti": ("tiny", 192, 12, 3, 4.0),
    "s": ("small", 384, 12, 6, 4.0),
    "b": ("base", 768, 12, 12, 4.0),
    "l": ("large", 1024, 24, 16, 4.0),
    "h": ("huge", 1280, 32, 16, 4.0),
    "g": ("giant", 1408, 40, 16, 48 / 11),
    "gg": ("gigantic", 1664, 48, 16, 64 / 13),
    "2b": ("2b", 2048, 40, 16, 4.0),
}
_OUR_NAME = re.compile(r"vit_([a-z]+|2b)(\d+)")
_TIMM_NAME = re.compile(r"vit_([a-z]+)_patch(\d+)_(\d+)")

Positions = Literal[
    "none", "learned", "learned2d", "sinusoidal1d", "sincos2d", "relative", "relative_shared", "rotary"
]  # fmt: skip
TABLES = ("learned", "learned2d", "sinusoidal1d", "sincos2d")  # added to the patches before the first block
RELATIVE = ("relative", "relative_shared")


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
        known = ", ".join(f"vit_{size}{'14' if size in ('h', 'g', 'gg', '2b') else '16'}" for size in SIZES)
        raise ValueError(f"name `{name}` is no encoder's; there are: {known}, with any patch size")
    _, embed_dim, depth, num_heads, mlp_ratio = SIZES[letter]
    return {
        "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio,
        "patch_size": patch, "image_size": image,
    }  # fmt: skip


class EncoderConfig(Config):
    """A plain Vision Transformer."""

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
    class_token: bool = True
    """A learned token in front of the patches; without it `pooling` is the mean."""
    register_tokens: Annotated[int, Field(strict=True, ge=0, le=1000)] = 0
    """Further learned tokens behind the class token, whose output nobody reads (arXiv:2309.16588)."""
    distillation_token: bool = False
    """A learned token behind the class token with a head of its own, which a teacher's word is learned by (DeiT,
    arXiv:2012.12877, section 4). Without a teacher at hand the two heads are averaged."""
    pooling: Literal["token", "mean"] = "token"
    """What the head reads: the class token, or the mean of the patch tokens."""
    positions: Positions = "learned"
    """Added to the patches: learned 1-D (ViT); learned2d, a row's and a column's vector side by side (ViT, appendix
    D.4); fixed sinusoidal1d, or sincos2d (MAE, MoCo v3). In attention: relative, a learned bias per offset and head
    in each block, or relative_shared, one for all blocks (SimMIM); rotary (arXiv:2403.13298, axial). Or none."""
    dropout: Rate = 0.0
    """Share of activations dropped behind the positions and each dense layer but that of queries, keys and values
    (ViT, appendix B.1). 0 is off."""
    drop_path_rate: Rate = 0.0
    """Stochastic depth of the last block; earlier blocks linearly less. 0 is off."""
    layer_scale: Positive | None = None
    """Initial factor of each residual branch, learned per channel (arXiv:2103.17239). None: no factor."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """The exact GELU, or its approximation by tanh that JAX has."""
    qkv_bias: bool = True
    """Whether queries, keys and values have a bias."""
    norm_eps: Positive = 1e-6
    """What LayerNorm adds to the variance: 1e-6 in timm, torchvision and JAX, 1e-12 in Hugging Face, 1e-5 in
    vit-pytorch. Part of the network: weights learned with another give other outputs."""
    representation: bool = False
    """A dense layer and tanh before the linear head, as the ViT paper pretrains (section 3.1). Fine-tuning leaves it
    out, and timm has none: a model with it is not registered."""

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
        if self.pooling == "token" and not self.class_token:
            raise ValueError("pooling token reads the class token, and class_token is false; set pooling to mean")
        return self

    @model_validator(mode="after")
    def _distillation_token_fits(self) -> "EncoderConfig":
        if not self.distillation_token:
            return self
        if self.pooling != "token":
            raise ValueError(
                f"distillation_token: its head stands beside the class token's, and pooling is {self.pooling}; set it "
                "to token, or distillation_token to false"
            )
        if self.positions not in TABLES or self.register_tokens or self.representation or self.norm_eps != 1e-6:
            raise ValueError(
                f"distillation_token: timm's ViT with one has positions {', '.join(TABLES)}, norm_eps 1e-6, and "
                "neither register_tokens nor representation"
            )
        return self

    @model_validator(mode="after")
    def _positions_fit(self) -> "EncoderConfig":
        parts = {"sincos2d": 4, "sinusoidal1d": 2, "learned2d": 2}.get(self.positions, 1)
        if self.embed_dim % parts:
            raise ValueError(f"{self.positions} positions need an embed_dim that {parts} divides, not {self.embed_dim}")
        if self.positions == "rotary" and (self.embed_dim // self.num_heads) % 4:
            raise ValueError(
                f"rotary positions need heads of a width that 4 divides, not {self.embed_dim // self.num_heads}"
            )
        if self.positions in ("rotary", *RELATIVE) and self.activation != "gelu":
            raise ValueError(f"activation {self.activation}: timm's ViT with {self.positions} positions has gelu alone")
        if self.positions in RELATIVE and self.register_tokens:
            raise ValueError(f"register_tokens: timm's ViT with {self.positions} positions has none; set 0")
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
        """Class, distillation and register tokens."""
        return self.class_token + self.distillation_token + self.register_tokens

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)


def mlp_ratio_of(hidden: int, embed_dim: int) -> float:
    """The mlp_ratio of an MLP that is `hidden` wide: timm cuts the product with it, and the quotient may fall short."""
    ratio = hidden / embed_dim
    return ratio if int(embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def inexpressible(config: EncoderConfig) -> str | None:
    """Why timm's architectures do not express this encoder, so that it cannot be registered; None where they do."""
    if config.representation:
        return (
            "encoder.representation: timm has no tanh representation head; fine-tune the model, which leaves it out, "
            "and register that"
        )
    known = (1e-6,) if config.positions in ("rotary", *RELATIVE) else (1e-6, 1e-5)
    if config.norm_eps not in known:
        return (
            f"encoder.norm_eps {config.norm_eps:g}: timm has an architecture with LayerNorm eps "
            f"{' and '.join(f'{eps:g}' for eps in known)} alone; fine-tune with --set encoder.norm_eps=1e-6, which "
            "changes outputs little"
        )
    return None
