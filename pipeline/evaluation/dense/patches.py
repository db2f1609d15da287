"""Patch tokens of a split, in files of the run: more than memory holds, and read by any row.

Each rank writes the rows that it extracts, tokens in half precision; a probe is fitted to the rows of all ranks, and
scored by each rank on its own.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.encoders.timm_config import read_encoder
from pipeline.evaluation.dense.annotations import SplitAnnotations
from pipeline.evaluation.features import Extraction, each_batch, evaluation_input_of
from pipeline.registry.locate import ModelSource
from pipeline.shards.index import DatasetIndex

HALF_MAX = 65504.0


def patch_tokens(model: nn.Module, images: Tensor) -> tuple[Tensor]:
    """Patch tokens of a plain ViT's last block after the final norm, without its prefix tokens.

    Shape:
        images: (B, C, H, W) float, normalised
        returns: (B, N, D)
    """
    return (model.fc_norm(model.forward_features(images)[:, model.num_prefix_tokens :]),)


@dataclass(frozen=True)
class Layout:
    """The sizes of what lies in the files."""

    grid: tuple[int, int]  # patches down, across
    width: int  # D
    input_size: tuple[int, int]  # (H, W), pixels
    masks: bool


class RankRows:
    """The rows of one rank; memory-mapped, so that only what is read is in memory."""

    def __init__(self, folder: Path, layout: Layout):
        facts = json.loads((folder / "rows.json").read_text())
        self.positions: list[int] = facts["positions"]
        self.boxes = [np.array(boxes, np.float64).reshape(-1, 5) for boxes in facts["boxes"]]
        count, (down, across) = len(self.positions), layout.grid
        self.tokens = _mapped(folder / "tokens", np.float16, (count, down * across, layout.width))
        self.masks = _mapped(folder / "masks", np.uint8, (count if layout.masks else 0, *layout.input_size))


class SplitPatches:
    """The rows of a split by their positions, of all ranks (`everyone`) or one."""

    def __init__(self, folders: Sequence[Path], layout: Layout):
        self.layout, self.parts = layout, [RankRows(folder, layout) for folder in folders]
        places = [(position, part, row) for part, rows in enumerate(self.parts)
                  for row, position in enumerate(rows.positions)]  # fmt: skip
        self.places = sorted(places)

    def __len__(self) -> int:
        return len(self.places)

    def positions(self) -> list[int]:
        return [position for position, _, _ in self.places]

    def tokens(self, rows: Sequence[int]) -> Tensor:
        """(B, N, D) float32"""
        return torch.from_numpy(self._stacked("tokens", rows).astype(np.float32))

    def masks(self, rows: Sequence[int]) -> Tensor:
        """(B, H, W) int64"""
        return torch.from_numpy(self._stacked("masks", rows).astype(np.int64))

    def boxes(self, rows: Sequence[int]) -> list[np.ndarray]:
        """(M, 5) each: left, top, right, bottom, class"""
        return [self.parts[part].boxes[row] for _, part, row in (self.places[row] for row in rows)]

    def chunks(self, size: int) -> Iterator[range]:
        """All rows in order, some at a time."""
        return (range(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def _stacked(self, what: str, rows: Sequence[int]) -> np.ndarray:
        return np.stack([getattr(self.parts[part], what)[row] for _, part, row in (self.places[row] for row in rows)])


def extract_patches(
    model: nn.Module, source: ModelSource, index: DatasetIndex, split: str, how: Extraction, place: Path
) -> "ExtractedSplit":
    """Patch tokens, masks and boxes of a split, in `place` on a file system of all ranks, which `emptied` has made.
    Collective: every rank must call it."""
    inputs, encoder = evaluation_input_of(source), read_encoder(source.encoder)
    annotations = SplitAnnotations(index, split, inputs)
    layout = Layout(encoder.grid, encoder.embed_dim, inputs.size, masks=bool(index.mask_classes))
    extracted = ExtractedSplit(place / split, layout, how)
    folder = extracted.folder_of(how.rank)
    folder.mkdir(parents=True)
    positions, boxes = [], []
    with open(folder / "tokens", "wb") as tokens_file, open(folder / "masks", "wb") as masks_file:
        for batch, _, (tokens,) in each_batch(model, source, index, split, how, make=patch_tokens):
            tokens_file.write(tokens.clamp(-HALF_MAX, HALF_MAX).half().numpy().tobytes())
            for position in batch.tolist():
                positions.append(position)
                boxes.append(annotations.boxes(position).tolist() if index.box_classes else [])
                if layout.masks:
                    masks_file.write(annotations.mask(position).tobytes())
    (folder / "rows.json").write_text(json.dumps({"positions": positions, "boxes": boxes}))
    if how.world_size > 1:
        dist.barrier()
    return extracted


@contextmanager
def emptied(place: Path, how: Extraction) -> Iterator[None]:
    """Without what a killed attempt left in `place`, and without anything afterwards. Collective."""
    if how.rank == 0:
        shutil.rmtree(place, ignore_errors=True)
    if how.world_size > 1:
        dist.barrier()
    try:
        yield
        if how.world_size > 1:
            dist.barrier()  # nobody reads any more; where a rank fails nobody waits for it
    finally:
        if how.rank == 0:
            shutil.rmtree(place, ignore_errors=True)


@dataclass(frozen=True)
class ExtractedSplit:
    """Where the rows of a split lie, rank by rank."""

    folder: Path
    layout: Layout
    how: Extraction

    def folder_of(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}"

    def everyone(self) -> SplitPatches:
        return SplitPatches([self.folder_of(rank) for rank in range(self.how.world_size)], self.layout)

    def own(self) -> SplitPatches:
        return SplitPatches([self.folder_of(self.how.rank)], self.layout)


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """The array in a file; an empty one, which cannot be mapped, is made."""
    return np.memmap(path, dtype, mode="r", shape=shape) if np.prod(shape) else np.empty(shape, dtype)
