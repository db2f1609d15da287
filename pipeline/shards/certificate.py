"""What an index vouches for beside its shards: the certificate and rejected.jsonl, and that nothing else lies there.

A dataset that was made before there were certificates has none, and is sound.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pipeline.errors import FaultError
from pipeline.shards.index import INDEX_NAME, SPLITS, DatasetIndex
from pipeline.storage.location import Url, exists, read_bytes, sizes_in

CERTIFICATE_NAME = "certificate.json"
PAGE_NAME = "certificate.html"
REJECTED_NAME = "rejected.jsonl"
REJECTED_SHA256 = "rejected_sha256"  # the key in the index's provenance
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-[0-9]{{6,}}\.tar")


def certificate_faults(index: DatasetIndex) -> list[str]:
    """One line per file of the certificate, and rejected.jsonl, that is missing or is not the one of this dataset."""
    certificate = index.provenance.get("certificate")
    if not isinstance(certificate, dict):
        path = index.directory / CERTIFICATE_NAME
        edited = f"{index.directory / INDEX_NAME}: names no certificate, and {path} is there; ingest the dataset again"
        return [edited] if exists(path) else []
    said = {name: certificate.get(name) for name in (CERTIFICATE_NAME, PAGE_NAME)}
    if REJECTED_SHA256 in index.provenance:
        said[REJECTED_NAME] = index.provenance[REJECTED_SHA256]
    faults = []
    for name, sha256 in said.items():
        path = index.directory / name
        try:
            content = read_bytes(path)
        except (OSError, FaultError):
            faults.append(f"{path}: missing; the ingestion that made the dataset writes it again")
            continue
        if hashlib.sha256(content).hexdigest() != sha256:
            faults.append(f"{path}: edited since the ingestion wrote it, which writes it again")
        elif name == CERTIFICATE_NAME:
            faults += _disagreements(index, json.loads(content))
    return faults


def _disagreements(index: DatasetIndex, certificate: dict[str, Any]) -> Iterator[str]:
    """One line per fact that the index says otherwise than its certificate, as after an edit by somebody who knows."""
    classes, statistics = certificate["classes"], certificate["statistics"]
    theirs = {
        "fingerprint": certificate["fingerprint"],
        "splits": {split: said["images"] for split, said in certificate["splits"].items()},
        "classes": None if classes is None else [one["name"] for one in classes],
        "statistics": statistics,
    }
    ours = {
        "fingerprint": index.fingerprint,
        "splits": {split: index.num_samples(split) for split in index.splits},
        "classes": list(index.classes) if index.classes else None,
        "statistics": None,
    }
    if index.statistics is not None:
        said = json.loads(json.dumps(asdict(index.statistics)))
        ours["statistics"] = {**said, **{key: value for key, value in (statistics or {}).items() if key not in said}}
    for key, value in theirs.items():
        if ours[key] != value:
            yield (f"{index.directory / INDEX_NAME}: {key}: not what {CERTIFICATE_NAME} says; ingest the dataset again")


def surplus_shards(index: DatasetIndex) -> list[str]:
    """One line per tar with a shard's name that the index does not have: readers by pattern would take it."""
    directory = index.directory
    names = sizes_in(directory) if isinstance(directory, Url) else os.listdir(directory)
    known = {shard.name for shards in index.splits.values() for shard in shards if shard.location is None}
    surplus = sorted(name for name in names if SHARD_NAME.fullmatch(name) and name not in known)
    return [f"{directory / name}: lies here, and the index does not have it; remove it" for name in surplus]
