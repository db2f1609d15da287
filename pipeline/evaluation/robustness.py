"""Top-1 of a model's own head on corrupted images (corruptions-v1)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.evaluation.scores import Scored, mean_of
from pipeline.loading.evaluation_stream import Alteration
from pipeline.views.corruptions import CORRUPTIONS, SEVERITIES, corrupt

Decide = Callable[[Alteration], Tensor | None]


def alteration(corruption: str, severity: int) -> Alteration:
    return partial(corrupt, corruption=corruption, severity=severity)


def robustness(decide: Decide, clean: Tensor | None, *, bootstrap_samples: int) -> Scored | None:
    """The mean over all corruptions and severities, of each corruption and of each severity; None where `decide` gives
    None, on ranks other than the first. Collective where `decide` is.

    `top1` is that mean, `top1_clean` without corruption, `top1_kept` their ratio.

    Shape:
        decide: from an alteration of the images to (S,) 0 or 1, whether each is classified right
        clean: (S,) the same of the images as they are
    """
    correct = {
        (name, severity): decide(alteration(name, severity)) for name in CORRUPTIONS for severity in SEVERITIES
    }  # fmt: skip
    if clean is None:
        return None
    every = torch.stack(list(correct.values())).double()  # (50, S)
    scored = mean_of("top1", every.mean(dim=0), bootstrap_samples=bootstrap_samples)
    whole, unspoiled = scored.metrics["top1"], float(clean.double().mean())
    scored.metrics |= {"top1_clean": unspoiled, "top1_kept": whole / unspoiled if unspoiled else 0.0}
    for name in CORRUPTIONS:
        scored.metrics[f"top1_{name}"] = _mean([correct[name, severity] for severity in SEVERITIES])
    for severity in SEVERITIES:
        scored.metrics[f"top1_severity_{severity}"] = _mean([correct[name, severity] for name in CORRUPTIONS])
    scored.metrics["count"] = float(len(clean))
    return scored


def _mean(parts: list[Tensor]) -> float:
    return float(torch.stack(parts).double().mean())
