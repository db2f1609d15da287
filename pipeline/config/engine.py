"""How the training state lies over ranks, and how it is computed."""

from typing import Annotated

from pydantic import Field

from pipeline.config.base import Config


class ZeroConfig(Config):
    """DeepSpeed ZeRO (arXiv:1910.02054)."""

    stage: Annotated[int, Field(strict=True, ge=0, le=3)]
    """0: plain data parallel without DeepSpeed. 1: optimizer states sharded. 2: gradients too. 3: parameters too."""
