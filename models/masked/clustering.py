"""Online clustering with balanced assignments: what CAPI's targets come from (arXiv:2502.08769, section 3).

Assignments are balanced by Sinkhorn-Knopp, apart for every patch position, over the images that all ranks hold in this
forward. So a run's targets depend on micro_batch_size x ranks, and on nothing else of how a batch is split: under
accumulation each forward is balanced by itself.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def balanced_assignments(scores: Tensor, iterations: int) -> Tensor:
    """Sinkhorn-Knopp over images and prototypes, apart for each position (arXiv:2006.09882; positions: CAPI).

    An iteration gives each prototype the same total over all images, then each image the total 1. All in logarithms, so
    no score is too low. Collective where a process group is initialised: every rank gives as many images.

    Shape:
        scores: (B, N, P) float32, already divided by the temperature
        returns: (B, N, P) float32, each row of P sums to 1; with enough iterations, columns over images to B / P
    """
    of_images = scores.new_zeros(*scores.shape[:2], 1)  # logarithms of factors
    for _ in range(iterations):
        of_prototypes = -_logsumexp_over_images(scores + of_images)  # (N, P)
        of_images = -(scores + of_prototypes).logsumexp(dim=2, keepdim=True)  # (B, N, 1)
    return (scores + of_prototypes + of_images).exp()


def _logsumexp_over_images(values: Tensor) -> Tensor:
    """(B, N, P) to (N, P), over the images of all ranks."""
    own = values.logsumexp(dim=0)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    largest = own.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    total = (own - largest).exp()
    dist.all_reduce(total)
    return total.log() + largest


class ClusteringHead(nn.Linear):
    """Scores of latents against prototypes: normalised latents, prototypes of any length, and a bias.

    Shape: (B, N, D) to (B, N, P)
    """

    def __init__(self, width: int, prototypes: int):
        super().__init__(width, prototypes)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, latents: Tensor) -> Tensor:
        return super().forward(F.normalize(latents, dim=-1, eps=1e-6))


class PrototypeHead(nn.Module):
    """Scores of predictions: the cosine to each prototype, times a trained scale of the prototype that begins at 1.

    Shape: (B, M, D) to (B, M, P)
    """

    def __init__(self, width: int, prototypes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(prototypes, width))
        self.scale = nn.Parameter(torch.ones(prototypes, 1))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, predictions: Tensor) -> Tensor:
        weight = F.normalize(self.weight, dim=-1, eps=1e-6) * self.scale
        return F.linear(F.normalize(predictions, dim=-1, eps=1e-6), weight.to(predictions.dtype))


def soft_cross_entropy(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """(B, M, P) scores and target probabilities to (B, M): cross-entropy in float32."""
    return -(targets * F.log_softmax(scores.float() / temperature, dim=-1)).sum(dim=-1)
