"""Which parameters fine-tuning trains: all of them, the head alone, or a few new ones in a frozen encoder. Torch-free.

The head, whatever it is made of, always trains. What is new is placed by `place`; how large it is, says `size`.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from models.encoders.config import RELATIVE, EncoderConfig
from models.schema import Config, Count, Fraction, NonNegative, Positive, Rate

Target = Literal["qkv", "proj", "fc1", "fc2"]
Rank = Annotated[int, Field(strict=True, ge=1, le=4096)]


class _Tuning(Config):
    """What the stages ask of every kind."""

    freezes: ClassVar[bool] = True
    """Whether the weights that the encoder came with stay as they are."""
    expressible: ClassVar[bool] = True
    """Whether what is trained is one of timm's networks again, by itself or merged."""
    whole_tensors: ClassVar[bool] = False
    """Whether it needs whole gradients, which ZeRO cuts into parts."""
    plain_only: ClassVar[bool] = True
    """Whether it knows plain ViTs alone."""

    def problem(self, encoder: EncoderConfig) -> str | None:
        """Why it cannot tune this plain ViT, in one line that names the key; None where it can."""
        return None


class FullTuning(_Tuning):
    """All parameters train."""

    freezes: ClassVar[bool] = False
    plain_only: ClassVar[bool] = False
    kind: Literal["full"] = "full"


class HeadTuning(_Tuning):
    """The head alone trains; the encoder's forward keeps nothing for a backward."""

    plain_only: ClassVar[bool] = False
    kind: Literal["head"] = "head"


class _LowRank(_Tuning):
    """What is added to a dense layer's weight is a product of two thin matrices."""

    rank: Rank = 8
    """Columns of the two matrices; of adalora, as many on average at the end."""
    alpha: Positive = 16.0
    """What is added is multiplied by alpha / rank, so that a learning rate found at one rank serves another."""
    dropout: Rate = 0.0
    """Share of a layer's inputs that the product does not see; drawn by sample position. 0 is off."""
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = ("qkv", "proj")
    """Dense layers of every block: attention's `qkv` (queries, keys and values are one matrix) and `proj`, the MLP's
    `fc1` and `fc2`."""

    @model_validator(mode="after")
    def _named_once(self) -> "_LowRank":
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets {', '.join(self.targets)}: name each once")
        return self

    @property
    def first_rank(self) -> int:
        """Of the matrices as they are made."""
        return self.rank

    def problem(self, encoder: EncoderConfig) -> str | None:
        if self.first_rank >= encoder.embed_dim:
            return (
                f"tuning.rank {self.first_rank} is not low: the encoder's matrices are {encoder.embed_dim} wide; lower "
                "it, or set tuning.kind to full"
            )
        return None


class LoRATuning(_LowRank):
    """LoRA (arXiv:2106.09685): a learned product of low rank beside frozen dense layers, added to them at the end."""

    kind: Literal["lora"] = "lora"


class AdaLoRATuning(_LowRank):
    """AdaLoRA (arXiv:2303.10512): LoRA as a singular value decomposition, whose values go where they matter most.

    Begins at `initial_rank` in every layer, and takes the least important away until `rank` are left on average. By
    data parallelism alone: importance is of whole gradients.
    """

    whole_tensors: ClassVar[bool] = True
    kind: Literal["adalora"] = "adalora"
    initial_rank: Rank = 12
    """Columns of the matrices, and singular values of every layer at the start."""
    warmup_share: Fraction = 0.1
    """Share of the run before ranks are taken away."""
    settled_share: Fraction = 0.3
    """Share of the run, at its end, in which they stay as they are."""
    every_steps: Count = 10
    """Steps from one allocation to the next."""
    sensitivity_decay: Rate = 0.85
    """What a parameter's sensitivity keeps of itself in a step (equation 9)."""
    uncertainty_decay: Rate = 0.85
    """What a sensitivity's uncertainty keeps of itself in a step (equation 10)."""
    orthogonality: NonNegative = 0.1
    """Weight in the loss of how far the singular vectors are from orthogonal (equation 4, as the mean over matrices of
    the norm)."""

    @model_validator(mode="after")
    def _ranks_fall(self) -> "AdaLoRATuning":
        if self.initial_rank < self.rank:
            raise ValueError(f"initial_rank {self.initial_rank} is below rank {self.rank}, and ranks only fall")
        if self.warmup_share + self.settled_share >= 1:
            raise ValueError(
                f"warmup_share {self.warmup_share:g} and settled_share {self.settled_share:g} leave no step in "
                "which ranks fall; lower one"
            )
        return self

    @property
    def first_rank(self) -> int:
        return self.initial_rank


class AdapterTuning(_Tuning):
    """Bottleneck layers in every block, at zero in the beginning. timm has none: evaluated, and never registered."""

    expressible: ClassVar[bool] = False
    kind: Literal["adapter"] = "adapter"
    width: Rank = 64
    """Of the bottleneck: an adapter maps tokens down to it, through a GELU, and up again."""
    placement: Literal["sequential", "parallel"] = "sequential"
    """`sequential`: behind attention and behind the MLP, before each is added (arXiv:1902.00751, section 2.1).
    `parallel`: one beside the MLP, of the same inputs (AdaptFormer, arXiv:2205.13535, equation 3)."""
    scale: Positive = 1.0
    """What an adapter adds is multiplied by this; AdaptFormer: 0.1."""
    dropout: Rate = 0.0
    """Share of the bottleneck's activations dropped, drawn by sample position. 0 is off."""


class VisualPromptTuning(_Tuning):
    """Visual prompts (arXiv:2203.12119): learned tokens before the patches. timm has none: never registered."""

    expressible: ClassVar[bool] = False
    kind: Literal["visual_prompt"] = "visual_prompt"
    tokens: Annotated[int, Field(strict=True, ge=1, le=10_000)] = 10
    """Prompts of a block; each is one more token for attention to read."""
    depth: Literal["shallow", "deep"] = "deep"
    """`shallow`: before the first block alone, and they go through all. `deep`: every block has its own, and what a
    block makes of them is left behind. Patches then see what prefix tuning (arXiv:2101.00190) shows them: further keys
    and values in every attention, made of the prompts by the block's own matrices."""
    dropout: Rate = 0.0
    """Share of the prompts' activations dropped, drawn by sample position. 0 is off."""

    def problem(self, encoder: EncoderConfig) -> str | None:
        if encoder.positions in RELATIVE or encoder.positions == "rotary":
            return (
                f"tuning.kind visual_prompt: with encoder.positions {encoder.positions} attention itself knows where "
                "each token is, and prompts are nowhere; choose lora or adapter"
            )
        return None


def _no_prefix(raw: Any) -> Any:
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if kind == "prefix":
        raise ValueError(
            "kind prefix: timm's attention takes no keys and values from outside; visual_prompt with depth deep gives "
            "every block further keys and values"
        )
    return raw


TuningConfig = Annotated[
    Annotated[
        FullTuning | HeadTuning | LoRATuning | AdaLoRATuning | AdapterTuning | VisualPromptTuning,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_no_prefix),
]
