"""What an optimizer keeps beside the weights, whichever it is."""

import torch
from timm.optim import Lamb
from torch import Tensor


def moment_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The tensors that the optimizer keeps beside each weight, in its shape."""
    return ("momentum_buffer",) if "momentum" in optimizer.defaults else ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def reset_moments(optimizer: torch.optim.Optimizer, weights: list[Tensor], step: int, *, zero: bool) -> None:
    """Make the optimizer's state as it is after `step` updates, its moments at `zero` or yet to be read."""
    for weight in weights:
        state = optimizer.state[weight]
        for name in moment_names(optimizer):
            if name not in state:
                state[name] = torch.zeros_like(weight)
            elif zero:
                state[name].zero_()
        if isinstance(optimizer, torch.optim.AdamW):  # the others count no steps, or count them by group
            device = weight.device if optimizer.defaults["fused"] else "cpu"
            optimizer.state[weight]["step"] = torch.tensor(float(step), device=device)
    if isinstance(optimizer, Lamb):
        for group in optimizer.param_groups:
            group["step"] = torch.tensor(float(step))


def updates_of(optimizer: torch.optim.Optimizer) -> int:
    """Steps that the optimizer has taken, which a bias correction counts; 0 where it counts none."""
    of_weights = (state["step"] for state in optimizer.state.values() if "step" in state)
    of_groups = (group["step"] for group in optimizer.param_groups if "step" in group)
    return int(next(of_weights, next(of_groups, 0)))
