"""Where files of a dataset lie: a path, or a URL of any protocol that fsspec knows; read alike.

Network file systems count as remote like URLs: a job should read them in large pieces and not sample by sample.
Credentials and end points come from the environment alone, never from a location. Nothing here writes.
"""

import ctypes
import glob
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError
from pipeline.storage import remote
from pipeline.storage.remote import Attempts

# f_type of statfs(2), from Linux's magic.h and the list of GNU coreutils' `stat`.
NETWORK_FILE_SYSTEMS = {
    0x6969: "nfs",
    0x517B: "smb",
    0xFE534D42: "smb2",
    0xFF534D42: "cifs",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x00C36400: "ceph",
    0x19830326: "beegfs",
    0x65735546: "fuse",  # sshfs, gcsfuse, JuiceFS, virtiofs ...
    0x01021997: "9p",
    0x5346414F: "afs",
    0x6B414653: "k-afs",
    0x73757245: "coda",
    0x01161970: "gfs2",
    0x7461636F: "ocfs2",
    0xAAD7AAEA: "panfs",
    0x20030528: "orangefs",
    0xBEEFDEAD: "snfs",
    0x61636673: "acfs",
    0x564C: "novell",
    0x786F4256: "vboxsf",
    0xBACBACBC: "vmhgfs",
}
MEMORY_FILE_SYSTEMS = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}
CHUNK_BYTES = 8 << 20  # one request to a network file system

_URL = re.compile(r"([a-z][a-z0-9+.:-]*)://", re.IGNORECASE)
_LOCAL_URL = re.compile(r"(file|local)://", re.IGNORECASE)
_WHO = re.compile(r"([a-z][a-z0-9+.-]*)://([^/]*)@", re.IGNORECASE)  # before a host, also in a chain of URLs
_WEB = ("http", "https")  # where a name alone, without a password, is a token


@dataclass(frozen=True)
class Url:
    """A remote file or directory. Of a path it has what readers of a dataset need: `/`, `name`, `str()`."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.text}/{name}")

    @property
    def name(self) -> str:
        return self.text.rpartition("/")[2]


Location = Path | Url


def is_url(text: str) -> bool:
    return _URL.match(text) is not None and _LOCAL_URL.match(text) is None


def is_web(text: str) -> bool:
    """Whether a URL, or what a chain of them ends in, is of a web server, where what follows `?` is a query."""
    return is_url(text) and any(f"{web}://" in text.lower() for web in _WEB)


def location(text: str | Path | Url) -> Location:
    """The location that a person wrote; InputError for a URL that carries a password or a token."""
    if isinstance(text, Path | Url):
        return text
    if not is_url(text):
        return Path(_LOCAL_URL.sub("", text))
    if any(":" in who[2] or who[1].lower() in _WEB for who in _WHO.finditer(text)):
        shown = _WHO.sub(r"\1://***@", text)
        raise InputError(f"{shown}: a URL must not carry credentials, which end up in plans; give them by environment")
    return Url(text.rstrip("/"))


def joined(directory: Location, name: str) -> Location:
    """`name` inside `directory`, or where `name` itself says when it is absolute or a URL."""
    if is_url(name) or isinstance(directory, Path) or not os.path.isabs(name):
        return location(name) if is_url(name) else directory / name
    return Path(name)


def file_system_type(path: Path) -> int | None:
    """f_type of the file system that holds `path`; None where it cannot be told."""
    if sys.platform != "linux":
        return None
    buffer = ctypes.create_string_buffer(512)  # struct statfs has 120 bytes on 64-bit Linux, f_type first
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), buffer) != 0:
        return None
    return ctypes.cast(buffer, ctypes.POINTER(ctypes.c_long))[0] & 0xFFFFFFFF


def is_remote(where: Location, network: Mapping[int, str] = NETWORK_FILE_SYSTEMS) -> bool:
    """Whether reading goes over a network: a URL, or a path on a file system whose type is in `network`."""
    return isinstance(where, Url) or file_system_type(where) in network


def exists(where: Location) -> bool:
    """Whether there is a file or a directory; for a URL that may be a prefix."""
    return where.exists() if isinstance(where, Path) else remote.exists(where.text)


def read_bytes(where: Location) -> bytes:
    """A whole small file; OSError for a path, FileNotFoundError or FaultError for a URL."""
    return where.read_bytes() if isinstance(where, Path) else remote.read_range(where.text, 0, None)


def size_of(where: Location) -> int:
    return os.stat(where).st_size if isinstance(where, Path) else remote.size_of(where.text)


def sizes_in(directory: Url) -> dict[str, int]:
    """Bytes of every file directly under `directory`, by name, from one listing."""
    return remote.sizes_in(directory.text)


def files_below(directory: Url) -> list[tuple[str, int, int]]:
    """(path below it, bytes, stamp that changes with the content) of every file below a URL; see remote."""
    return remote.files_below(directory.text)


def matching(pattern: str) -> list[str]:
    """The paths or URLs of the files that a glob matches, sorted."""
    return remote.matching(pattern) if is_url(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))


def is_file(where: Location) -> bool:
    return where.is_file() if isinstance(where, Path) else remote.is_file(where.text)


def stamp_of(where: Location) -> int:
    """A number that changes with the content: of a path, its time of change."""
    return os.stat(where).st_mtime_ns if isinstance(where, Path) else remote.stamp_of(where.text)


def read_range(where: Location, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer only where the file ends before."""
    if isinstance(where, Url):
        return remote.read_range(where.text, offset, size)
    with open(where, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


def stream(where: Location, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file in large pieces, fewer only where it ends before.

    An interrupted stream goes on at the byte it had reached. FileNotFoundError, or FaultError when patience ends.
    """
    return remote.stream(where.text, size) if isinstance(where, Url) else _stream_of_path(where, size)


def _stream_of_path(path: Path, size: int) -> Iterator[bytes]:
    reached, attempts = 0, Attempts(str(path))
    while reached < size:
        try:
            content = read_range(path, reached, min(CHUNK_BYTES, size - reached))
        except OSError as error:
            attempts.failed(error)
            continue
        if not content:
            return
        reached += len(content)
        attempts.progressed()
        yield content
