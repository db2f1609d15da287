"""The `.idx` file: where each sample of one shard lies, so that training reads only image bytes, by offset.

Layout, little-endian: `HEADER` (magic, version, samples, bytes of names, size and sha256 of the tar, checksum of the
rest), then one `RECORD` per sample, then the image members' names, concatenated. numpy reads the records in place;
1,000 samples are about 80 kB and open in about 0.1 ms. The tar's sha256 ties a table to its shard.
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from pipeline.errors import DataError
from pipeline.shards.atomic import write_file
from pipeline.storage.location import Location, read_bytes

MAGIC = b"VITSHARD"
VERSION = 1
HEADER = struct.Struct("<8s I I Q Q 32s I")
NO_LABEL = -1
MEMBER_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's, so that both agree on every odd name
RECORD = np.dtype(
    [
        ("image_offset", "<u8"),
        ("json_offset", "<u8"),
        ("image_bytes", "<u4"),
        ("json_bytes", "<u4"),  # 0: an adopted sample without a .json
        ("image_crc32", "<u4"),
        ("label", "<i4"),
        ("name_end", "<u4"),  # where the name of the image member ends among the names
    ]
)


@dataclass(frozen=True)
class ShardTable:
    """The samples of one shard, in the order of the tar. `records` is a numpy array of `RECORD`."""

    records: np.ndarray
    names: bytes
    shard_bytes: int
    shard_sha256: str

    def __len__(self) -> int:
        return len(self.records)

    def member(self, sample: int) -> str:
        """The name of the image in the tar."""
        start = int(self.records["name_end"][sample - 1]) if sample else 0
        return self.names[start : int(self.records["name_end"][sample])].decode("utf-8", "surrogateescape")

    def key(self, sample: int) -> str:
        key, _ = split_member(self.member(sample))
        return key

    def samples_of_key(self, key: str) -> list[int]:
        """The samples with this key: one or none, in a shard of ours."""
        if key.encode("utf-8", "surrogateescape") not in self.names:
            return []
        return [sample for sample in range(len(self)) if self.key(sample) == key]


def split_member(name: str) -> tuple[str, str]:
    """Key and extensions of a tar member, as webdataset splits them: at the first dot of the file's name.

    Both are empty for a name that webdataset skips.
    """
    match = MEMBER_NAME.match(name)
    return (match[1], match[2].lower()) if match else ("", "")


def table_bytes(table: ShardTable) -> bytes:
    body = table.records.tobytes() + table.names
    header = HEADER.pack(
        MAGIC,
        VERSION,
        len(table.records),
        len(table.names),
        table.shard_bytes,
        bytes.fromhex(table.shard_sha256),
        crc32(body),
    )
    return header + body


def write_table(path: Path, table: ShardTable) -> None:
    write_file(path, table_bytes(table))


def read_table(path: Location) -> ShardTable:
    """The table in `path`; DataError where it is missing, cut or changed."""
    try:
        content = read_bytes(path)
    except OSError as error:
        what = error.strerror or "no such file"
        raise DataError(f"{path}: cannot be read ({what}); ingest the dataset again", cause="missing") from None
    return parse_table(content, path)


def parse_table(content: bytes, path: Location) -> ShardTable:
    """The table that `content` holds; `path` is for the message of a DataError."""
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        raise DataError(f"{path}: not a sample table; ingest the dataset again", cause="changed")
    _, version, samples, names_bytes, shard_bytes, sha256, checksum = HEADER.unpack_from(content)
    if version != VERSION:
        versions = f"table version {version}, this program reads {VERSION}"
        raise DataError(f"{path}: {versions}; ingest the dataset again", cause="changed")
    body = memoryview(content)[HEADER.size :]
    names_start = samples * RECORD.itemsize
    if len(body) != names_start + names_bytes or crc32(body) != checksum:
        cause = "cut" if len(body) < names_start + names_bytes else "changed"
        raise DataError(f"{path}: cut or changed since it was written; ingest the dataset again", cause=cause)
    records = np.frombuffer(body[:names_start], dtype=RECORD)
    return ShardTable(records, bytes(body[names_start:]), shard_bytes, sha256.hex())
