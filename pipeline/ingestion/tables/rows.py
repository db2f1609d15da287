"""Where the images of a table lie: ranges of bytes of one file, read by number.

Samples go into shards in a shuffled order, so a row must cost no more than itself. Where a table's own file does not
allow that (compressed, a pickle, row groups of parquet), its images are laid out in a spool file once, and every
process reads from there. Spools lie in a folder inside the dataset's directory: that has room, and all workers see it.
"""

import fcntl
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from pipeline.errors import DISK_FULL
from pipeline.shards.atomic import TEMPORARY_PREFIX
from pipeline.shards.decoding import ImageFault


class Rows(NamedTuple):
    """The images of one table. Each is a file's bytes, or, where `shape` is given, pixels of unsigned bytes.

    `shape` is (height, width), (height, width, channels) or, with `planes_first`, (channels, height, width).
    """

    path: Path
    starts: Sequence[int]
    sizes: Sequence[int] | int  # bytes; one number where all are equal
    shape: tuple[int, ...] | None = None
    planes_first: bool = False

    def read(self, number: int) -> bytes:
        """An image file; FileNotFoundError where the spool is gone, ImageFault where the table became shorter."""
        size = self.sizes if isinstance(self.sizes, int) else int(self.sizes[number])
        with open(self.path, "rb", buffering=0) as file:
            content = _read_at(file, int(self.starts[number]), size)
        if len(content) < size:
            raise ImageFault("unreadable_file", f"{self.path.name} ends before it")
        return content if self.shape is None else png_of_pixels(content, self.shape, self.planes_first)


def png_of_pixels(content: bytes, shape: tuple[int, ...], planes_first: bool) -> bytes:
    """A .png of the same pixels, always the same bytes."""
    pixels = np.frombuffer(content, np.uint8).reshape(shape)
    if planes_first:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def spooled(scratch: Path, table: Path, what: str, write: Callable[[BinaryIO], np.ndarray | None]) -> Path:
    """The spool file of `table`, made by `write` unless it is there. Arrays that `write` returns lie beside it as .npy.

    Processes wait for each other. `what` tells spools of one table apart. OSError of a full disk passes through.
    """
    status = table.stat()
    name = hashlib.blake2b(
        f"{what}:{table}:{status.st_size}:{status.st_mtime_ns}".encode(errors="surrogateescape"), digest_size=12
    ).hexdigest()
    spool = scratch / name
    if spool.exists():
        return spool
    scratch.mkdir(parents=True, exist_ok=True)
    with open(scratch / f"{name}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not spool.exists():
            unfinished = scratch / f"{TEMPORARY_PREFIX}{os.getpid()}-{name}"
            try:
                with open(unfinished, "wb") as file:
                    index = write(file)
                if index is not None:
                    np.save(spool.with_suffix(".npy"), index)  # whole before the spool has its name
                os.replace(unfinished, spool)
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise OSError(error.errno, error.strerror, str(unfinished)) from None
                raise
            finally:
                unfinished.unlink(missing_ok=True)
    return spool


def _read_at(file: BinaryIO, start: int, size: int) -> bytes:
    """Fewer bytes only at the file's end; one call of the system reads at most 2 GiB."""
    content = os.pread(file.fileno(), size, start)
    while len(content) < size and (more := os.pread(file.fileno(), size - len(content), start + len(content))):
        content += more
    return content
