"""The hashes of one shard's images, computed while each was decoded anyway, in a hidden folder of the dataset.

They also hold the images that were examined and left out as copies, so that the next run need not decode them to
know. A file ties itself to its shard and to the version of Pillow that decoded; one that is missing, damaged or of
another shard is no error: hashes can be computed again.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from zlib_ng.zlib_ng import crc32

from pipeline.errors import DataError
from pipeline.ingestion.duplicates.likeness import HASHES, hashes_of_prepared
from pipeline.ingestion.images import PreparedImage
from pipeline.shards.atomic import write_file
from pipeline.shards.index import Shard
from pipeline.storage.location import Location, read_bytes

FOLDER = ".hashes"
VERSION = 3  # raise it when the same image would have other hashes
MAGIC = b"VITHASH"
HEADER = struct.Struct("<8s I I 32s 32s 16s I 28x")  # 128 bytes
EXAMINED = np.dtype([("hashes", HASHES), ("number", "<u4"), ("label", "<i4"), ("kept", "?")])
_CHUNK = 256  # images whose hashes lie in one array while a shard is made


@dataclass(frozen=True)
class HashFile:
    """(images,) `EXAMINED` in the order of the job: `number` says which of its files, `kept` whether it is in the
    shard. `job` is the key of the job that examined them, b"" where they were hashed from the shard itself."""

    job: bytes
    rows: np.ndarray

    def of_shard(self) -> np.ndarray:
        """(samples,) `HASHES` in the order of the shard."""
        return self.rows["hashes"][self.rows["kept"]]


class ExaminedImages:
    """Collects the hashes of one shard job that examines pixels."""

    def __init__(self) -> None:
        self._full: list[np.ndarray] = []
        self._rows, self._used = np.zeros(_CHUNK, EXAMINED), 0

    def add(self, number: int, label: int, image: PreparedImage, sha256: bytes, *, kept: bool) -> None:
        if self._used == _CHUNK:
            self._full.append(self._rows)
            self._rows, self._used = np.zeros(_CHUNK, EXAMINED), 0
        self._rows[self._used] = (hashes_of_prepared(image, sha256), number, label, kept)
        self._used += 1

    def write(self, destination: Path, shard_name: str, shard: Shard | None, job: str) -> None:
        rows = np.concatenate([*self._full, self._rows[: self._used]])
        write_hashes(hash_path(destination, shard_name), HashFile(bytes.fromhex(job), rows), shard)


def hash_path(directory: Location, shard_name: str) -> Location:
    return directory / FOLDER / f"{shard_name.removesuffix('.tar')}.hashes"


def write_hashes(path: Path, hashes: HashFile, shard: Shard | None) -> None:
    """`shard`: to which they belong; None where not one image was kept."""
    path.parent.mkdir(exist_ok=True)
    body = hashes.rows.tobytes()
    sha256 = bytes(32) if shard is None else bytes.fromhex(shard.sha256)
    version = PIL.__version__.encode()[:16]
    header = HEADER.pack(MAGIC, VERSION, len(hashes.rows), sha256, hashes.job, version, crc32(body))
    write_file(path, header + body)


def read_hashes(path: Location, shard: Shard | None) -> HashFile | None:
    """The hashes in `path` if they are whole, of this shard, and of this version and Pillow; else None."""
    try:
        content = read_bytes(path)
    except (OSError, DataError):
        return None
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        return None
    _, version, images, sha256, job, pillow, checksum = HEADER.unpack_from(content)
    wanted = bytes(32) if shard is None else bytes.fromhex(shard.sha256)
    if (version, pillow.rstrip(b"\0"), sha256) != (VERSION, PIL.__version__.encode()[:16], wanted):
        return None
    body = memoryview(content)[HEADER.size :]
    if len(body) != images * EXAMINED.itemsize or crc32(body) != checksum:
        return None
    rows = np.frombuffer(body, EXAMINED)
    if shard is not None and int(rows["kept"].sum()) != shard.samples:
        return None
    return HashFile(job.rstrip(b"\0") and job, rows)
