"""How much of what was hidden a model explains, from sums that add up over batches and ranks.

Of numbers (pixels): 1 - sum |predicted - target|^2 / sum |target - mean target|^2, the mean being that of each place
in a patch over all hidden patches. Of classes (colours): 1 - cross-entropy / entropy of the classes' own frequencies,
the share of the entropy that is explained (McFadden's R^2). Both are 0 for a model that says the same of every patch,
and says it as well as that can be said; 1 for one that knows.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

ERROR, PATCHES, TOTAL, SQUARES = "error", "patches", "total", "squares"


def explained_sums(predicted: Tensor, target: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """float64 sums over the hidden patches of the images that are `counted`, (B,) bool.

    Shape:
        predicted, target: what an objective's `hidden_predictions` gives
    """
    if target.is_floating_point():
        predicted, target = (part[counted].double().flatten(0, -2) for part in (predicted, target))  # (n, X)
        return {
            ERROR: (predicted - target).square().sum().view(1),
            PATCHES: target.new_full((1,), len(target)),
            TOTAL: target.sum(dim=0),
            SQUARES: target.square().sum().view(1),
        }
    scores, classes = predicted[counted].flatten(0, -2), target[counted].flatten()
    return {
        ERROR: F.cross_entropy(scores.double(), classes, reduction="sum").view(1),
        PATCHES: scores.new_full((1,), len(classes), dtype=torch.float64),
        TOTAL: torch.bincount(classes, minlength=scores.shape[-1]).double(),
    }


def explained_share(sums: Mapping[str, Tensor]) -> float:
    """From the sums over all images; NaN where the targets do not vary, or none was counted."""
    error, count, total = sums[ERROR].item(), sums[PATCHES].item(), sums[TOTAL]
    if not count:
        return math.nan
    if SQUARES in sums:
        spread = sums[SQUARES].item() - total.square().sum().item() / count
        return 1 - error / spread if spread > 1e-9 * max(sums[SQUARES].item(), count) else math.nan
    entropy = torch.special.entr(total / count).sum().item()  # of one target, in nats
    return 1 - error / (count * entropy) if entropy > 0 else math.nan
