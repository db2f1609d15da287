"""Dense protocols of one model on one dataset: extract patches once, fit on rank 0, score on every rank."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import assert_never

import torch
from torch import nn

from pipeline.evaluation.dense.average_precision import detection_scores
from pipeline.evaluation.dense.detection import Detections, detect, detection_loss, outputs_of
from pipeline.evaluation.dense.fitting import STEPS, PatchProbe, fit_probe, shared_probe
from pipeline.evaluation.dense.patches import ExtractedSplit, emptied, extract_patches
from pipeline.evaluation.dense.segmentation import Upsampling, areas_of, segmentation_loss, segmentation_scores
from pipeline.evaluation.features import Extraction, gathered
from pipeline.evaluation.scores import Scored
from pipeline.registry.locate import ModelSource
from pipeline.shards.index import DatasetIndex

TRAIN = "train"


def dense_scores(
    model: nn.Module, source: ModelSource, index: DatasetIndex, protocols: Mapping[str, str], splits: Sequence[str],
    how: Extraction, place: Path, *, bootstrap_samples: int, begin: Callable[[str], None] = lambda what: None,
    steps: int = STEPS,
) -> Iterator[tuple[str, list[Scored | None]]]:  # fmt: skip
    """(name, scores split by split) of each of `protocols`, kinds by name; None on ranks other than 0. Collective.

    Patch tokens lie in `place` meanwhile, on a file system of all ranks. `begin` is told what comes next.
    """
    with emptied(place, how):
        extracted: dict[str, ExtractedSplit] = {}
        for split in dict.fromkeys([TRAIN, *splits]):
            begin(f"patches of {split}")
            extracted[split] = extract_patches(model, source, index, split, how, place)
        for name, kind in protocols.items():
            begin(name)
            match kind:
                case "segment-linear-v1":
                    score = _segment
                case "detect-linear-v1":
                    score = _detect
                case _:
                    assert_never(kind)
            yield name, score(extracted, index, splits, how, bootstrap_samples, steps)


def _segment(
    extracted: Mapping[str, ExtractedSplit], index: DatasetIndex, splits: Sequence[str], how: Extraction,
    bootstrap_samples: int, steps: int,
) -> list[Scored | None]:  # fmt: skip
    names, layout = list(index.mask_classes), extracted[TRAIN].layout
    upsample = Upsampling(layout.grid, layout.input_size, how.device)
    probe = None
    if how.rank == 0:
        rows = extracted[TRAIN].everyone()
        probe = fit_probe(rows, len(names), segmentation_loss(rows, upsample, how.device), how.device, steps)
    probe = shared_probe(probe, layout.width, len(names), how.device)
    scored: list[Scored | None] = []
    for split in splits:
        own = extracted[split].own()
        columns = {
            "positions": torch.tensor(own.positions(), dtype=torch.int64),
            "areas": areas_of(probe, own, upsample, len(names), how.device),
        }
        merged = gathered(columns, f"areas-{split}", how)
        scored.append(merged and segmentation_scores(merged["areas"], names, bootstrap_samples=bootstrap_samples))
    return scored


def _detect(
    extracted: Mapping[str, ExtractedSplit], index: DatasetIndex, splits: Sequence[str], how: Extraction,
    bootstrap_samples: int, steps: int,
) -> list[Scored | None]:  # fmt: skip
    names, layout = list(index.box_classes), extracted[TRAIN].layout
    probe: PatchProbe | None = None
    if how.rank == 0:
        rows = extracted[TRAIN].everyone()
        loss = detection_loss(rows, len(names), how.device)
        probe = fit_probe(rows, outputs_of(len(names)), loss, how.device, steps)
    probe = shared_probe(probe, layout.width, outputs_of(len(names)), how.device)
    scored: list[Scored | None] = []
    for split in splits:
        found = detect(probe, extracted[split].own(), len(names), how.device)
        merged = gathered(found._asdict(), f"detections-{split}", how)
        if merged is None:
            scored.append(None)
            continue
        every = extracted[split].everyone()
        boxes = every.boxes(range(len(every)))
        scored.append(detection_scores(Detections(**merged), boxes, names, bootstrap_samples=bootstrap_samples))
    return scored
