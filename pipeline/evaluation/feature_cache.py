"""Features that were extracted before, kept in the home: found by the weights, the images and the preprocessing.

A file is whole or not there. The folder is held to `$VIT_FEATURE_CACHE_BYTES` (20 GB unless set); what was used least
recently goes first.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import PIL
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.errors import InputError
from pipeline.evaluation.features import SplitFeatures, evaluation_input_of
from pipeline.registry.locate import ModelSource
from pipeline.shards.atomic import give_usual_rights
from pipeline.shards.index import DatasetIndex

VERSION = 1  # of how features are made: a change of pooled_features or of the views makes others
LIMIT_BYTES = 20_000_000_000
DAY = 86_400  # seconds


def feature_key(
    model: nn.Module, source: ModelSource, index: DatasetIndex, split: str, precision: str, head: bool
) -> str:
    """Equal for equal weights, network, preprocessing, samples and their order; SHA-256 in hexadecimal."""
    said = {
        "version": VERSION, "weights": weights_hash(model), "encoder": source.encoder, "classes": source.num_classes,
        "input": asdict(evaluation_input_of(source)), "std": source.std, "fingerprint": index.remaining_fingerprint,
        "split": split, "shards": [[shard.sha256, shard.samples] for shard in index.shards(split)],
        "precision": precision, "logits": head, "torch": torch.__version__, "pillow": PIL.__version__,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """XXH3 over names and values of all tensors."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_features(folder: Path, key: str) -> SplitFeatures | None:
    """Those kept under `key`; None where there are none, or where the file is damaged. InputError as `limit_bytes`."""
    limit_bytes()  # before hours of extraction
    path = _path(folder, key)
    try:
        found = load_file(path)
        os.utime(path)
        return SplitFeatures(found["features"], found["logits"], found["labels"])
    except (OSError, SafetensorError, KeyError):
        return None


def keep_features(folder: Path, key: str, rows: SplitFeatures) -> None:
    """Write them under `key`, and drop what was used least recently beyond the limit. A full disk keeps nothing."""
    path = _path(folder, key)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in rows._asdict().items()}, partial)
        give_usual_rights(partial)
        os.replace(partial, path)
        _drop_oldest(folder, limit_bytes(), path)
    except (OSError, SafetensorError):
        partial.unlink(missing_ok=True)


def limit_bytes() -> int:
    """Of the folder; InputError where `$VIT_FEATURE_CACHE_BYTES` is no number."""
    text = os.environ.get("VIT_FEATURE_CACHE_BYTES") or str(LIMIT_BYTES)
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"VIT_FEATURE_CACHE_BYTES={text}: not a number of bytes, 0 or above; correct or unset it")
    return int(text)


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def _drop_oldest(folder: Path, limit: int, newest: Path) -> None:
    for path in folder.glob("*.partial-*"):  # of a writer that was killed
        if time.time() - path.stat().st_mtime > DAY:
            path.unlink(missing_ok=True)
    facts = {path: path.stat() for path in folder.glob("*.safetensors")}
    total = sum(fact.st_size for fact in facts.values())
    for path in sorted(facts, key=lambda path: facts[path].st_mtime):
        if total <= limit or path == newest:
            return
        total -= facts[path].st_size
        path.unlink(missing_ok=True)
