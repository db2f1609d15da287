"""How the training state lies over ranks, and how it is computed."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.schema import Config


class ZeroConfig(Config):
    """DeepSpeed ZeRO (arXiv:1910.02054)."""

    stage: Annotated[int, Field(strict=True, ge=0, le=3)]
    """0: plain data parallel without DeepSpeed. 1: optimizer states sharded. 2: gradients too. 3: parameters too."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: fp32 weights and moments lie in the host's memory and are updated there: slow, the last way to make a model
    fit. NVMe is not offered."""

    @model_validator(mode="after")
    def _offload_needs_deepspeed(self) -> "ZeroConfig":
        if self.stage == 0 and self.offload_optimizer != "none":
            raise ValueError(
                f"offload_optimizer {self.offload_optimizer}: plain data parallel has no offload; "
                "set stage to 1, 2 or 3, or offload_optimizer to none"
            )
        return self
