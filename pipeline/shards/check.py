"""Compares a dataset with its index, without changing anything.

The quick check reads one stat and one table per shard and a few member headers of each tar. The full one reads every
byte: sha256 of each shard, each table against the members of its tar, each image and mask decoded, each box held to its
image, the fingerprint. For that a shard behind a URL is copied to the temporary directory, one per process at a time.
"""

import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, InputError
from pipeline.shards.annotations import MASK_EXTENSION, annotation_bytes, boxes_fault, decode_mask, mask_fault
from pipeline.shards.certificate import certificate_faults, surplus_shards
from pipeline.shards.decoding import ImageFault, open_all_channels, open_array
from pipeline.shards.fingerprint import content_sum, dataset_fingerprint, sample_digest
from pipeline.shards.index import INDEX_NAME, DatasetIndex, Shard, read_index, size_problems, was_edited
from pipeline.shards.label_sets import names_of
from pipeline.shards.parallel import POOL_FROM_BYTES, available_cores, in_processes
from pipeline.shards.reader import ShardReader
from pipeline.shards.table import NO_LABEL, ShardTable, read_table
from pipeline.shards.tombstones import TOMBSTONES_NAME
from pipeline.storage.location import Location, Url, exists, location, read_range, stream

MAX_FAULTS_PER_SHARD = 20  # a shard with more is lost anyway


def check_dataset(directory: str | Path | Url, full: bool) -> list[str]:
    """One line per fault, each naming the file; empty for a sound dataset. InputError when there is no such path."""
    return checked_index(directory, full)[1]


def checked_index(directory: str | Path | Url, full: bool) -> tuple[DatasetIndex | None, list[str]]:
    """The index that was checked, and the faults, as `check_dataset` has them.

    A directory without a readable index is itself a fault.
    """
    directory = location(directory)
    if not exists(directory):
        raise InputError(f"{directory}: no such path; ingest a dataset with `vit ingest SOURCE DEST`")
    try:
        index = read_index(directory)
    except InputError as error:
        return None, error.problems
    return index, _faults(index, full)


def _faults(index: DatasetIndex, full: bool) -> list[str]:
    if was_edited(index.directory):
        edited = index.directory / INDEX_NAME
        return [f"{edited}: edited since it was written: not its checksum; ingest the dataset again"]
    if faults := size_problems(index):
        return faults
    if faults := [*_lost_tombstones(index), *certificate_faults(index), *surplus_shards(index)]:
        return faults
    if not full:
        return [fault for shards in index.splits.values() for shard in shards for fault in _quick_faults(index, shard)]
    return _full_check(index)


def _lost_tombstones(index: DatasetIndex) -> list[str]:
    """Tombstones of a split that is not there, or whose sample is in none of its shards."""
    readers = {split: ShardReader(index, split) for split in index.splits}
    faults = []
    for stone in index.tombstones:
        if stone.split not in readers or not readers[stone.split].places_of_tombstone(stone):
            faults.append(
                f"{index.directory / TOMBSTONES_NAME}: `{stone.key}` is not in split `{stone.split}`: the list is of "
                "another dataset, or the sample was removed; take its line out"
            )
    return faults


def _quick_faults(index: DatasetIndex, shard: Shard) -> list[str]:
    try:
        table = _matching_table(index, shard)
    except DataError as error:
        return [str(error)]
    path = index.shard_path(shard)
    spots = sorted({0, len(table) // 2, len(table) - 1})
    return [fault for sample in spots if (fault := _header_fault(path, table, sample))]


def _matching_table(index: DatasetIndex, shard: Shard) -> ShardTable:
    path = index.table_path(shard)
    table = read_table(path)
    if (table.shard_bytes, table.shard_sha256) != (shard.bytes, shard.sha256):
        raise DataError(f"{path}: belongs to another version of its shard; ingest the dataset again", cause="changed")
    if len(table) != shard.samples:
        samples = f"{len(table)} samples, the index says {shard.samples}"
        raise DataError(f"{path}: {samples}; ingest the dataset again", cause="changed")
    if (labelled := int((table.records["label"] != NO_LABEL).sum())) != shard.labelled:
        labels = f"{labelled} labels, the index says {shard.labelled}"
        raise DataError(f"{path}: {labels}; ingest the dataset again", cause="changed")
    if len(table) and (most := int(table.records["label"].max())) >= index.num_labels:
        what = "classes" if index.label_sets is None else "label sets"
        raise DataError(
            f"{path}: holds label {most}, the index has {index.num_labels} {what}; ingest the dataset again",
            cause="changed",
        )
    return table


def _header_fault(path: Location, table: ShardTable, sample: int) -> str | None:
    row, name = table.records[sample], table.member(sample)
    content = read_range(path, int(row["image_offset"]) - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
    try:
        member = tarfile.TarInfo.frombuf(content, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"{path}: sample `{name}`: no tar header where its table says ({error})"
    # A name over 100 characters stands in an extra header before this one.
    if member.size != row["image_bytes"] or (len(name.encode(errors="replace")) <= 100 and member.name != name):
        found = f"the tar has `{member.name}` of {member.size}"
        return f"{path}: sample `{name}`: its table says {row['image_bytes']} bytes, {found}"
    return None


def _full_check(index: DatasetIndex) -> list[str]:
    tasks = [(split, shard) for split, shards in index.splits.items() for shard in shards]
    faults: dict[str, list[str]] = {}
    contents = {split: 0 for split in index.splits}
    pool = len(tasks) > 1 and sum(shard.bytes for _, shard in tasks) > POOL_FROM_BYTES
    annotated = {"mask_classes": index.mask_classes, "box_classes": index.box_classes}
    check = partial(_full_shard_check, replace(index, splits={}, statistics=None, provenance={}))
    for split, shard, shard_faults, content in in_processes(check, tasks, available_cores() if pool else 1):
        faults[shard.name] = shard_faults
        contents[split] += content
    found = [fault for _, shard in tasks for fault in faults[shard.name]]
    splits = {split: (contents[split], index.num_samples(split)) for split in index.splits}
    fingerprint = dataset_fingerprint(splits, index.classes, index.label_sets, **annotated)
    if not found and fingerprint != index.fingerprint:
        found = [f"{index.directory}: the fingerprint in the index is not that of its samples and labels; ingest again"]
    return found


def _full_shard_check(index: DatasetIndex, task: tuple[str, Shard]) -> tuple[str, Shard, list[str], int]:
    """(split, shard, faults, content sum)"""
    split, shard = task
    path = index.shard_path(shard)
    try:
        table = _matching_table(index, shard)
        with _local_copy(path, shard) as copy:
            with open(copy, "rb") as tar:
                sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
            if sha256 != shard.sha256:
                fault = f"{path}: its bytes have changed: sha256 {sha256}, the index says {shard.sha256}"
                return split, shard, [fault], 0
            faults, digests = _member_faults(index, shard, copy, table)
    except (DataError, OSError, tarfile.TarError) as error:
        named = str(path) in str(error) or str(index.table_path(shard)) in str(error)
        return split, shard, [str(error) if named else f"{path}: {error}"], 0
    return split, shard, faults[:MAX_FAULTS_PER_SHARD], content_sum(digests)


@contextmanager
def _local_copy(path: Location, shard: Shard) -> Iterator[Path]:
    if isinstance(path, Path):
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        for piece in stream(path, shard.bytes):
            file.write(piece)
        file.flush()
        yield Path(file.name)


def _member_faults(index: DatasetIndex, shard: Shard, copy: Path, table: ShardTable) -> tuple[list[str], list[int]]:
    """Faults and sample digests of one shard, from the members that the tar itself lists, in its local copy."""
    path, ours = index.shard_path(shard), shard.location is None
    faults, digests = [], []
    with tarfile.open(copy, "r:") as tar, open(copy, "rb") as file:
        sizes = {member.offset_data: (member.name, member.size) for member in tar}
        for sample, row in enumerate(table.records):
            name = table.member(sample)
            if sizes.get(int(row["image_offset"])) != (name, int(row["image_bytes"])):
                faults.append(f"{path}: sample `{name}` is not where its table says")
                continue
            image = os.pread(file.fileno(), int(row["image_bytes"]), int(row["image_offset"]))
            sha256 = hashlib.sha256(image)
            content = os.pread(file.fileno(), int(row["json_bytes"]), int(row["json_offset"]))
            end = int(row["json_offset"]) + int(row["json_bytes"])
            behind = end + -end % tarfile.BLOCKSIZE + tarfile.BLOCKSIZE
            member, size = sizes.get(behind, ("", 0))
            has_mask = index.mask_classes is not None and member == f"{table.key(sample)}.{MASK_EXTENSION}"
            mask = os.pread(file.fileno(), size, behind) if has_mask else None
            record, fault = _read_record(content)
            annotations, wrong = _read_annotations(index, record, mask)
            label = int(row["label"])
            digests.append(sample_digest(sha256.digest(), label, annotations))
            fault = fault or _image_fault(name, image, sha256.hexdigest(), record)
            fault = fault or (_label_fault(index, record, label) if ours else None)
            if fault := fault or wrong:
                faults.append(f"{path}: sample `{name}`: {fault}")
    return faults, digests


def _read_record(content: bytes) -> tuple[dict[str, Any], str | None]:
    """The .json of a sample, and what is wrong with it."""
    try:
        record = json.loads(content) if content else {}
    except ValueError:
        record = None
    return (record, None) if isinstance(record, dict) else ({}, "its .json is not a valid record")


def _label_fault(index: DatasetIndex, record: Mapping[str, Any], label: int) -> str | None:
    """Of a record that we wrote: the .json of an adopted tar may say its label otherwise, or not at all."""
    if index.label_sets is not None and label != NO_LABEL:
        classes = names_of(label, index.label_sets, index.classes)
        if record.get("classes") != classes:
            return f"its .json says classes {record.get('classes')}, its label in the index {classes}"
    said = record.get("label", NO_LABEL)
    if said != label:
        words = ["no label" if number == NO_LABEL else f"label {number}" for number in (said, label)]
        return f"its .json says {words[0]}, the index {words[1]}"
    return None


def _image_fault(name: str, image: bytes, sha256: str, record: Mapping[str, Any]) -> str | None:
    try:
        open_array(image) if name.lower().endswith(".npy") else open_all_channels(image)
    except ImageFault as fault:
        return f"does not decode: {fault.detail}"
    expected = record.get("sha256", sha256)
    return None if expected == sha256 else f"sha256 {sha256}, its .json says {expected}"


def _read_annotations(index: DatasetIndex, record: Mapping[str, Any], mask: bytes | None) -> tuple[bytes, str | None]:
    """What the fingerprint takes of the mask and boxes that a sample should have, and what is wrong with them."""
    size, values, boxes = (record.get("width"), record.get("height")), None, None
    annotated = index.mask_classes is not None or index.box_classes is not None
    if annotated and not all(isinstance(side, int) for side in size):
        return b"", "its .json says neither width nor height"
    if index.mask_classes is not None:
        if mask is None:
            return b"", f"no .{MASK_EXTENSION} behind its .json"
        if hashlib.sha256(mask).hexdigest() != record.get("mask_sha256"):
            return b"", "its mask is not the one that its .json says"
        try:
            values = decode_mask(mask)
        except ImageFault as fault:
            return b"", f"its mask does not decode: {fault.detail}"
        if fault := mask_fault(values, size, len(index.mask_classes)):
            return b"", fault
    if index.box_classes is not None:
        boxes = record.get("boxes")
        if fault := boxes_fault(boxes, size, len(index.box_classes)):
            return b"", fault
    return annotation_bytes(values, boxes), None
