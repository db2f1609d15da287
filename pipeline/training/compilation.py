"""torch.compile in place, without a graph break at any stage, and without a name changed in the module.

Stages 0 to 2 compile the whole module, loss included, as one graph. ZeRO-3 gathers weights in hooks around each module,
which no graph can hold: there a block is gathered whole, as a leaf, and its inside is one graph; all blocks of a shape
share it.
"""

from typing import Any

import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from timm.models.vision_transformer_relpos import RelPosBlock
from torch import nn

BLOCKS = (Block, RelPosBlock, EvaBlock)


def make_leaves(module: nn.Module) -> None:
    """Let ZeRO-3 gather and release each transformer block whole. Before DeepSpeed takes the module."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(module, list(BLOCKS), raise_if_not_found=False)
    blocks = [block for block in module.modules() if isinstance(block, BLOCKS)]
    if first := [block for block in blocks if any(parameter.requires_grad for parameter in block.parameters())][:1]:
        first[0].register_forward_pre_hook(_ask_for_gradient)


def _ask_for_gradient(block: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Of a block's input, where all before it is frozen: else torch calls a leaf's backward hook, which reduces and
    releases its weights, before its gradients are made."""
    if torch.is_grad_enabled() and not arguments[0].requires_grad:
        arguments[0].requires_grad_()


def as_if_not_compiled() -> Any:
    """A context in which what was compiled runs as it is: hooks that were set since are called, and shapes are free."""
    return torch.compiler.set_stance("force_eager")


def compile_in_place(module: nn.Module, stage: int, backend: str) -> None:
    """`backend`: as torch.compile names it, e.g. `inductor`. Shapes are static: a training has one."""
    if stage < 3:
        module.compile(backend=backend, dynamic=False)
        return
    for block in module.modules():
        if isinstance(block, BLOCKS):  # the forward alone: ZeRO's hooks run around it
            block.forward = torch.compile(block.forward, backend=backend, dynamic=False)
