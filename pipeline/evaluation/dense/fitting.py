"""One linear layer on standardised patch tokens, fitted in a fixed number of steps: what dense protocols share.

The tokens are standardised by their mean and deviation over the train split, what a BatchNorm without affine becomes
in the end. AdamW at 3e-3 with decay 1e-4, a cosine to zero, 1,000 steps of 16 images: far fewer than protocols that
augment their images have, because these features are fixed.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.evaluation.dense.patches import SplitPatches

STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, SEED = 1000, 16, 3e-3, 1e-4, 0
ROWS_AT_A_TIME = 32

Loss = Callable[[Tensor, range | list[int]], Tensor]  # of the layer's outputs (B, N, K) for these rows


class PatchProbe(nn.Module):
    """`linear((tokens - mean) / deviation)`.

    Shape:
        tokens: (B, N, D) float32
        returns: (B, N, outputs)
    """

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.linear = nn.Linear(width, outputs)
        nn.init.zeros_(self.linear.weight)  # every class alike; the outputs learn apart, as one layer is convex
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear((tokens - self.mean) / self.deviation)


def fit_probe(patches: SplitPatches, outputs: int, loss: Loss, device: torch.device, steps: int = STEPS) -> PatchProbe:
    """A probe fitted to all rows of a train split; the same for the same rows, whoever extracted them."""
    probe = PatchProbe(patches.layout.width, outputs).to(device)
    mean, deviation = token_statistics(patches)
    probe.mean.copy_(mean)
    probe.deviation.copy_(deviation)
    optimizer = torch.optim.AdamW(probe.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for rows in _batches(len(patches), steps):
        optimizer.zero_grad()
        loss(probe(patches.tokens(rows).to(device)), rows).backward()
        optimizer.step()
        schedule.step()
    return probe.requires_grad_(False)


def shared_probe(probe: PatchProbe | None, width: int, outputs: int, device: torch.device) -> PatchProbe:
    """Rank 0's probe on every rank. Collective where there are several."""
    if not dist.is_initialized():
        return probe
    probe = probe or PatchProbe(width, outputs).to(device).requires_grad_(False)
    for tensor in probe.state_dict().values():
        shared = tensor.cpu()  # the ranks of an evaluation talk through the host
        dist.broadcast(shared, 0)
        tensor.copy_(shared)
    return probe


def token_statistics(patches: SplitPatches) -> tuple[Tensor, Tensor]:
    """(D,) mean and deviation of all tokens, summed in float64."""
    count, total, square = 0, 0.0, 0.0
    for rows in patches.chunks(ROWS_AT_A_TIME):
        tokens = patches.tokens(rows).flatten(0, 1).double()
        count, total, square = count + len(tokens), total + tokens.sum(dim=0), square + tokens.square().sum(dim=0)
    mean = total / count
    return mean.float(), (square / count - mean.square()).clamp_min(0).add(1e-5).sqrt().float()


def _batches(count: int, steps: int):
    """Rows in shuffled passes, one after the other."""
    generator = torch.Generator().manual_seed(SEED)
    size = min(BATCH, count)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
