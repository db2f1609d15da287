"""What reads the encoder's tokens and says the classes, as typed configs without torch, and what each costs."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter

from models.encoders.config import EncoderConfig
from models.encoders.timm_config import TimmEncoderConfig
from models.schema import NOT_A_SWITCH, Config


class _Head(Config):
    """What the objectives and the plan ask of every head's config."""

    registrable: ClassVar[bool] = False
    """Whether timm's architectures have it."""

    def problem(self, encoder: EncoderConfig | TimmEncoderConfig) -> str | None:
        """Why it cannot read this encoder, in one line that names the key; None where it can."""
        if isinstance(encoder, TimmEncoderConfig):
            return f"objective.head.kind {self.kind} reads a plain ViT, and encoder.name is {encoder.name}; say linear"
        return None

    def parameters(self, encoder: EncoderConfig) -> int:
        """Without the linear layer that every head ends in."""
        return 0

    def macs(self, encoder: EncoderConfig) -> float:
        """Multiply-adds of one image, without that linear layer."""
        return 0.0


class LinearHeadConfig(_Head):
    """A linear layer, at zero in the beginning, on what the encoder pools."""

    registrable: ClassVar[bool] = True
    kind: Literal["linear"] = "linear"

    def problem(self, encoder: EncoderConfig | TimmEncoderConfig) -> str | None:
        return None


class LinearBatchNormHeadConfig(_Head):
    """A BatchNorm without scale and shift before the linear layer: MAE's linear probe (arXiv:2111.06377, A.1)."""

    kind: Literal["linear_batchnorm"] = "linear_batchnorm"

    def problem(self, encoder: EncoderConfig | TimmEncoderConfig) -> str | None:
        if isinstance(encoder, EncoderConfig) and encoder.representation:
            return "objective.head.kind linear_batchnorm has no place behind encoder.representation; turn one off"
        return super().problem(encoder)


class AttentiveHeadConfig(_Head):
    """A learned query that attends to the patch tokens, before the linear layer: V-JEPA's attentive probe
    (arXiv:2404.08471, section 4)."""

    kind: Literal["attentive"] = "attentive"
    mlp_ratio: Annotated[float, Field(ge=0, le=1000), NOT_A_SWITCH] = 4.0
    """Hidden width of the MLP behind the attention, as a multiple of embed_dim; V-JEPA's is 4. 0: no MLP."""

    def hidden(self, width: int) -> int:
        """Hidden width of the MLP."""
        return int(width * self.mlp_ratio)

    def problem(self, encoder: EncoderConfig | TimmEncoderConfig) -> str | None:
        if isinstance(encoder, EncoderConfig):
            for key in ("representation", "distillation_token"):
                if getattr(encoder, key):
                    return (
                        f"objective.head.kind attentive reads the patches in place of what encoder.{key} is for; set "
                        f"encoder.{key} to false"
                    )
        return super().problem(encoder)

    def parameters(self, encoder: EncoderConfig) -> int:
        width, hidden = encoder.embed_dim, self.hidden(encoder.embed_dim)
        attention = 4 * width * width + 4 * width + 3 * width  # four matrices with biases, the query, a norm
        mlp = 2 * width * hidden + hidden + 3 * width if hidden else 0
        return attention + mlp

    def macs(self, encoder: EncoderConfig) -> float:
        width, patches = encoder.embed_dim, encoder.num_patches
        return 2 * patches * width * (width + 1) + 2 * width * (width + self.hidden(width))


def _kind(raw: Any) -> Any:
    return raw.get("kind", "linear") if isinstance(raw, dict) else getattr(raw, "kind", None)


HeadConfig = Annotated[
    Annotated[LinearHeadConfig, Tag("linear")]
    | Annotated[LinearBatchNormHeadConfig, Tag("linear_batchnorm")]
    | Annotated[AttentiveHeadConfig, Tag("attentive")],
    Discriminator(_kind),
]
_ADAPTER = TypeAdapter(HeadConfig)


def read_head(raw: dict[str, Any] | None) -> HeadConfig:
    """A dumped config of any kind, validated; None is a linear head's."""
    return LinearHeadConfig() if raw is None else _ADAPTER.validate_python(raw)
