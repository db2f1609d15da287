"""Any other image model of timm as an encoder, without torch: `encoder.name: timm:NAME`, spelt as MODEL spells it.

Such a network learns with labels: its patches, if it has any, are no sequence from which some can be left out. A Swin
also learns with some of them replaced (SimMIM). What its name stands for only timm knows, so nothing of it can be
counted here; `models.measured_size` counts it.
"""

import re
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from models.encoders.config import EncoderConfig
from models.schema import Config, Rate, Size

PREFIX = "timm:"
ABSENT = {  # beginnings of names that people look for: (the paper's word, the nearest that timm has)
    "cmt": ("CMT", "coatnet_0_rw_224, efficientformerv2_s0, mobilevitv2_100"),
    "cvt": ("CvT", "coat_lite_tiny, pvt_v2_b1, twins_svt_small"),
    "shuffle_transformer": ("Shuffle Transformer", "swin_tiny_patch4_window7_224, twins_svt_small, nest_tiny"),
    "shuffle": ("Shuffle Transformer", "swin_tiny_patch4_window7_224, twins_svt_small, nest_tiny"),
    "naflexvit": ("a batch of images of several sizes (NaFlexViT)", "vit_base_patch16_224"),
}
_IMAGE_SIZE = re.compile(r"_(\d{2,4})(?:\.|$)")
_SWIN = re.compile(r"swin(v2)?_(?!cr_)")  # swinv2_cr is built otherwise


class TimmEncoderConfig(Config):
    """An image model by timm's name for it."""

    name: Annotated[str, Field(pattern=r"^timm:.+")]
    """`timm:` and timm's name, `timm:swin_tiny_patch4_window7_224`, with its weights' tag or without."""
    image_size: Size | tuple[Size, Size]
    """Side of the square input, pixels, or [height, width]; the number that ends the name, else 224."""
    channels: Size = 3
    """Channels of the input image."""
    drop_path_rate: Rate = 0.0
    """Stochastic depth of the last block; earlier blocks linearly less. 0 is off."""
    arguments: dict[str, Any] = {}
    """What else timm's function of that name takes, for example {depths: [2, 2, 2, 2]}."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_from_name(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
            return raw
        found = _IMAGE_SIZE.search(raw["name"])
        return {"image_size": int(found[1]) if found else 224} | raw

    @model_validator(mode="after")
    def _check(self) -> "TimmEncoderConfig":
        for beginning, (word, nearest) in ABSENT.items():
            if self.architecture.startswith(beginning):
                raise ValueError(f"name `{self.name}`: timm has no {word}; the nearest that it has: {nearest}")
        return self

    @property
    def architecture(self) -> str:
        """timm's name, without the tag of weights."""
        return self.name.removeprefix(PREFIX).partition(".")[0]

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width), pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def is_swin(self) -> bool:
        """Whether it is a Swin (arXiv:2103.14030) or a Swin V2 (arXiv:2111.09883)."""
        return _SWIN.match(self.architecture) is not None

    @property
    def swin_cell_size(self) -> int:
        """Side of the square that a token of a Swin's last stage stands for, pixels: stages but the first halve a side.

        ValueError where its patch_size or depths are not what timm takes.
        """
        patch, depths = self.arguments.get("patch_size", 4), self.arguments.get("depths", (2, 2, 6, 2))
        if type(patch) is not int or patch < 1 or not isinstance(depths, (list, tuple)) or not depths:
            raise ValueError(
                f"encoder.arguments patch_size {patch}, depths {depths}: a Swin takes a whole number, and a list of "
                "the blocks of each stage"
            )
        return patch * 2 ** (len(depths) - 1)

    @property
    def depth(self) -> int:
        """0: how many layers there are, only the built network says."""
        return 0


def _which(raw: Any) -> str:
    name = raw.get("name") if isinstance(raw, dict) else getattr(raw, "name", None)
    return "timm" if isinstance(name, str) and name.startswith(PREFIX) else "vit"


AnyEncoderConfig = Annotated[
    Annotated[EncoderConfig, Tag("vit")] | Annotated[TimmEncoderConfig, Tag("timm")], Discriminator(_which)
]
"""A plain ViT, or by a name that begins with `timm:` any other network."""
_ADAPTER = TypeAdapter(AnyEncoderConfig)
TAGS = {EncoderConfig: "vit", TimmEncoderConfig: "timm"}


def read_encoder(raw: Any) -> EncoderConfig | TimmEncoderConfig:
    """A dumped config of either kind, validated."""
    return _ADAPTER.validate_python(raw)


def encoder_of_timm(name: str) -> dict[str, Any]:
    """What a name of timm's stands for, as keys of an encoder: a plain ViT's where it is one."""
    architecture = name.partition(".")[0]
    try:
        EncoderConfig(name=architecture)
    except ValueError:
        return {"name": PREFIX + architecture}
    return {"name": architecture}
