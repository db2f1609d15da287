"""A file of which parts are read here and there, at a path or a URL, as tarfile and zlib want it.

Behind a URL, blocks of 8 MiB are fetched and a few kept: whoever goes through a tar from header to header reads it in
large pieces, once, and finds what lies a little behind without asking again.
"""

import io
import os
from collections import OrderedDict
from pathlib import Path

from pipeline.storage.location import Location, Url, read_range, size_of

BLOCK_BYTES = 8 << 20
KEPT_BLOCKS = 4


class PathFile(io.FileIO):
    """A file on a disk."""

    def __init__(self, path: Path):
        super().__init__(path, "rb")
        self.size = os.fstat(self.fileno()).st_size

    def pread(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`, fewer only where the file ends before."""
        return os.pread(self.fileno(), size, offset)


class UrlFile(io.RawIOBase):
    """An object behind a URL. FileNotFoundError, FaultError."""

    def __init__(self, url: Url):
        self.url, self.size = url, size_of(url)
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def pread(self, size: int, offset: int) -> bytes:
        """As `PathFile.pread`."""
        end = min(offset + size, self.size)
        if end - offset > BLOCK_BYTES:
            return read_range(self.url, offset, end - offset)
        pieces = []
        while offset < end:
            number, start = divmod(offset, BLOCK_BYTES)
            piece = self._block(number)[start : start + end - offset]
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
        return b"".join(pieces)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        content = self.pread(len(buffer), self._position)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            self._blocks[number] = read_range(self.url, number * BLOCK_BYTES, BLOCK_BYTES)
            if len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]


def open_random(where: Location) -> PathFile | UrlFile:
    """The file, to be closed by the caller; OSError where it is not there."""
    return UrlFile(where) if isinstance(where, Url) else PathFile(where)
