"""Retrieval by cosine on frozen features: for each image of a split, the images of `train` that look most alike."""

import torch
from torch import Tensor

RANKS = (1, 5, 10)
PAIRS_AT_A_TIME = 1 << 25  # of a query and an image: each costs about 40 bytes


def retrieval_values(
    gallery: Tensor, gallery_labels: Tensor, queries: Tensor, labels: Tensor, *, chunk: int | None = None
) -> dict[str, Tensor]:
    """(S,) values of each query: `map`, the average precision over the whole gallery, and `recall_K`, whether one of
    the K nearest is of its class. Means of them are mAP and recall at K.

    The average precision of a query is the mean, over the images of its class, of the precision at their ranks; 0 where
    there are none.

    Shape:
        gallery: (M, D), queries: (S, D) float
    """
    chunk = chunk or max(1, PAIRS_AT_A_TIME // len(gallery))
    gallery = torch.nn.functional.normalize(gallery.float(), dim=1)
    places = torch.arange(1, len(gallery) + 1, dtype=torch.float64)
    values: dict[str, list[Tensor]] = {"map": [], **{f"recall_{rank}": [] for rank in RANKS}}
    for start in range(0, len(queries), chunk):
        part = torch.nn.functional.normalize(queries[start : start + chunk].float(), dim=1)
        order = (part @ gallery.T).argsort(dim=1, descending=True, stable=True)
        relevant = (gallery_labels[order] == labels[start : start + chunk].unsqueeze(1)).double()  # (B, M)
        precision = relevant.cumsum(dim=1) / places
        found = relevant.sum(dim=1)
        values["map"].append((precision * relevant).sum(dim=1) / found.clamp_min(1))
        for rank in RANKS:
            values[f"recall_{rank}"].append(relevant[:, :rank].amax(dim=1))
    return {name: torch.cat(parts) for name, parts in values.items()}
