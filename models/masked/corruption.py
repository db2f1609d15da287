"""How patches are spoiled before an encoder reads them all, as BERT does with words (arXiv:1810.04805, section 3.1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.randomness import position_bits, position_uniform

MASKED_SHARE, SWAPPED_SHARE = 0.8, 0.1  # of the corrupted patches; what is left is kept as it is


class Corruption(NamedTuple):
    corrupted: Tensor  # (B, M) int64, ascending: the patches to be predicted, as many in every image
    masked: Tensor  # (B, N) bool: True where a mask token stands in for the patch
    source: Tensor  # (B, N) int64: whose embedding stands at each patch; its own, but where it was swapped


def corrupt_patches(positions: Tensor, num_patches: int, num_corrupted: int, seed: int) -> Corruption:
    """Choose patches to corrupt from (seed, position), uniformly, and independently for each what becomes of it.

    8 of 10 get the mask token, 1 of 10 the embedding of another patch of its image, any as likely, 1 of 10 stays.

    Shape:
        positions: (B,) int64, the samples' positions in the run
    """
    order = position_bits(seed, "corrupt", positions, num_patches).argsort(dim=1)
    corrupted = order[:, :num_corrupted].sort(dim=1).values  # (B, M)
    chosen = torch.zeros(len(positions), num_patches, dtype=torch.bool, device=positions.device)
    chosen = chosen.scatter(1, corrupted, True)  # (B, N)
    fate = position_uniform(seed, "corrupt how", positions, num_patches)
    masked = chosen & (fate < MASKED_SHARE)
    swapped = chosen & (fate >= MASKED_SHARE) & (fate < MASKED_SHARE + SWAPPED_SHARE)
    steps = position_uniform(seed, "corrupt by", positions, num_patches) * (num_patches - 1)
    own = torch.arange(num_patches, device=positions.device).expand(len(positions), -1)
    other = (own + 1 + steps.long()) % num_patches  # 1 to N - 1 patches on: never its own
    return Corruption(corrupted, masked, torch.where(swapped, other, own))
