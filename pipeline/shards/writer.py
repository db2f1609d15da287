"""Writes one shard: a plain tar of KEY.EXTENSION + KEY.json (+ KEY.mask.png), and its table.

The same samples give the same bytes: no times, no owners, sorted json keys. Readers may use any tar program or
webdataset; keys hold no dots, because webdataset ends a key at the first one.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from pipeline.shards.annotations import MASK_EXTENSION
from pipeline.shards.atomic import replaced_file, reserve
from pipeline.shards.index import table_name
from pipeline.shards.table import NO_LABEL, RECORD, ShardTable, write_table


class NewSample(NamedTuple):
    """One sample to be written; `record` becomes its .json."""

    key: str
    extension: str
    image: bytes
    record: Mapping[str, Any]
    label: int = NO_LABEL
    mask: bytes | None = None


class Expected(NamedTuple):
    """About what a shard will hold."""

    samples: int
    image_bytes: int


_JSON = json.JSONEncoder(sort_keys=True, check_circular=False)
_PADDING = bytes(tarfile.BLOCKSIZE)
_PLAIN_NAME_BYTES = 100  # of an ASCII name; longer ones take an extended header
_PLAIN_CONTENT_BYTES = 1 << 33
_WRITE_BYTES = 1 << 20  # that wait to be written together
_WRITE_PARTS = 1000  # the system takes 1,024
_SMALL_BYTES = 1 << 12  # a member of less is joined to its neighbours: hashing and writing want few parts
_JOINED_BYTES = 1 << 16  # of neighbours
_BYTES_BESIDE = 1 << 12  # what a sample takes beside its image, or less: two headers, its .json, padding


class _TarWriter:
    def __init__(self, file: BinaryIO):
        self._file = file
        self._sha256 = hashlib.sha256()
        self._position = 0  # of what was added
        self._small = bytearray()  # behind it: padding, headers and small members, not yet added
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._records: list[tuple[int, ...]] = []
        self._names = bytearray()

    def add(self, sample: NewSample) -> None:
        key, image = sample.key, sample.image
        assert key and "." not in key and "/" not in key, f"`{key}` is not a key"
        content = _JSON.encode(sample.record).encode()
        member = f"{key}.{sample.extension}"
        image_offset = self._append(member, image)
        json_offset = self._append(f"{key}.json", content)
        if sample.mask is not None:
            self._append(f"{key}.{MASK_EXTENSION}", sample.mask)
        self._names += member.encode()
        self._records.append(
            (image_offset, json_offset, len(image), len(content), crc32(image), sample.label, len(self._names))
        )

    def finish(self) -> ShardTable:
        """End the archive; its table."""
        self._small += bytes(2 * tarfile.BLOCKSIZE)  # the marker that an uncut archive ends with
        self._small += bytes(-(self._position + len(self._small)) % tarfile.RECORDSIZE)
        self._add_small()
        self._write_out()
        records = np.array(self._records, dtype=RECORD)
        return ShardTable(records, bytes(self._names), self._position, self._sha256.hexdigest())

    def _append(self, name: str, content: bytes) -> int:
        """The offset of the content."""
        self._small += member_header(name, len(content))
        offset = self._position + len(self._small)
        if len(content) < _SMALL_BYTES:
            self._small += content
        else:
            self._add_small()
            self._add(content)
        self._small += _PADDING[: -len(content) % tarfile.BLOCKSIZE]
        if len(self._small) >= _JOINED_BYTES:
            self._add_small()
        if self._waiting_bytes >= _WRITE_BYTES or len(self._waiting) >= _WRITE_PARTS:
            self._write_out()
        return offset

    def _add_small(self) -> None:
        self._add(bytes(self._small))
        self._small.clear()

    def _add(self, part: bytes) -> None:
        self._sha256.update(part)
        self._waiting.append(part)
        self._waiting_bytes += len(part)
        self._position += len(part)

    def _write_out(self) -> None:
        """In one call: half the time of a call per image."""
        written = os.writev(self._file.fileno(), self._waiting)
        if written < self._waiting_bytes:  # a disk that is filling up; the file writes on, or says so
            self._file.write(b"".join(self._waiting)[written:])
            self._file.flush()
        self._waiting, self._waiting_bytes = [], 0


def member_header(name: str, num_bytes: int) -> bytes:
    """What `tarfile` writes before a member: no times, no owners, mode 0644; plain ustar wherever that can say it."""
    if len(name) > _PLAIN_NAME_BYTES or not name.isascii() or num_bytes >= _PLAIN_CONTENT_BYTES:
        member = tarfile.TarInfo(name)
        member.size = num_bytes
        return member.tobuf(tarfile.PAX_FORMAT)
    start, size = name.encode(), b"%011o" % num_bytes
    checksum = _CHECKSUM_OF_REST + sum(start) + sum(size)
    return b"%b%b%b%b%06o%b" % (start.ljust(100, b"\0"), _AFTER_NAME, size, _AFTER_SIZE, checksum, _AFTER_CHECKSUM)


def _header_of_nothing() -> tuple[bytes, bytes, bytes, int]:
    """What is the same in every plain header, as `tarfile` writes it: after the name, after the size, after the
    checksum, and the sum of its bytes."""
    header = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
    rest = sum(header[100:124]) + sum(header[135:148]) + 8 * ord(" ") + sum(header[156:])  # a checksum counts as spaces
    return header[100:124], header[135:148], header[154:], rest


_AFTER_NAME, _AFTER_SIZE, _AFTER_CHECKSUM, _CHECKSUM_OF_REST = _header_of_nothing()


def write_shard(path: Path, samples: Iterable[NewSample], expected: Expected | None = None) -> ShardTable | None:
    """Write the tar `path`, then the table beside it; each appears whole or not at all. No samples: None, no files.

    Where it is known what to expect, that space is asked for at once, whether there is as much or not.
    """
    samples = iter(samples)
    first = next(samples, None)
    if first is None:
        return None
    with replaced_file(path) as file:
        if expected is not None:
            reserve(file, expected.image_bytes + expected.samples * _BYTES_BESIDE)
        tar = _TarWriter(file)
        for sample in chain([first], samples):
            tar.add(sample)
        table = tar.finish()
        file.truncate(table.shard_bytes)  # to what was written
    write_table(path.with_name(table_name(path.name)), table)
    return table
