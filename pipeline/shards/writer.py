"""Writes one shard: a plain tar of KEY.EXTENSION + KEY.json (+ KEY.mask.png), and its table.

The same samples give the same bytes: no times, no owners, sorted json keys. Readers may use any tar program or
webdataset; keys hold no dots, because webdataset ends a key at the first one.
"""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline.shards.annotations import MASK_EXTENSION
from pipeline.shards.atomic import replaced_file
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


class _TarWriter:
    def __init__(self, file: BinaryIO):
        self._file = file
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._records: list[tuple[int, ...]] = []
        self._names = bytearray()

    def add(self, sample: NewSample) -> None:
        key, image = sample.key, sample.image
        assert key and "." not in key and "/" not in key, f"`{key}` is not a key"
        content = json.dumps(sample.record, sort_keys=True).encode()
        member = f"{key}.{sample.extension}"
        image_offset = self._append(member, image)
        json_offset = self._append(f"{key}.json", content)
        if sample.mask is not None:
            self._append(f"{key}.{MASK_EXTENSION}", sample.mask)
        self._names += member.encode()
        self._records.append(
            (image_offset, json_offset, len(image), len(content), zlib.crc32(image), sample.label, len(self._names))
        )

    def finish(self) -> ShardTable:
        """End the archive; its table."""
        end = 2 * tarfile.BLOCKSIZE  # the marker that an uncut archive ends with
        self._write(bytes(end + -(self._position + end) % tarfile.RECORDSIZE))
        records = np.array(self._records, dtype=RECORD)
        return ShardTable(records, bytes(self._names), self._position, self._sha256.hexdigest())

    def _append(self, name: str, content: bytes) -> int:
        member = tarfile.TarInfo(name)  # its defaults: mtime 0, uid and gid 0, mode 0644
        member.size = len(content)
        self._write(member.tobuf(tarfile.PAX_FORMAT))  # plain ustar wherever that can say it
        offset = self._position
        self._write(content)
        self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self._position += len(content)


def write_shard(path: Path, samples: Iterable[NewSample]) -> ShardTable | None:
    """Write the tar `path`, then the table beside it; each appears whole or not at all. No samples: None, no files."""
    samples = iter(samples)
    first = next(samples, None)
    if first is None:
        return None
    with replaced_file(path) as file:
        tar = _TarWriter(file)
        for sample in chain([first], samples):
            tar.add(sample)
        table = tar.finish()
    write_table(path.with_name(table_name(path.name)), table)
    return table
