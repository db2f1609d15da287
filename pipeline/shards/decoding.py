"""Opens an image from bytes that may be hostile: few formats, a pixel limit, one kind of exception."""

import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image, UnidentifiedImageError

# No EPS, WMF or the like: they start other programs or need them. JPEG stands for MPO too, the JPEG of many cameras.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM")

READABLE_PIXELS = 89_478_485  # Pillow's limit, above which it warns; nothing larger is stored
MOST_ARRAY_BYTES = 1 << 30  # of a TIFF whose channels Pillow does not read

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it says of a damaged file, its exception says too


class ImageFault(Exception):
    """An image that is not taken: `reason` is one of a closed list, `detail` is for a person."""

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)


def memory_fault() -> ImageFault:
    """The same whoever was the first to notice: the decoder, or the process that watches it."""
    return ImageFault("too_much_memory", "decoding it takes more memory than one image may")


def open_image(content: bytes, max_pixels: int = READABLE_PIXELS) -> Image.Image:
    """The image, first frame, decoded to its last byte; ImageFault where that fails.

    Its header is held to `max_pixels` before anything is decoded; Pillow itself has a limit of twice READABLE_PIXELS.
    Not for threads: it sets warning filters, which belong to the process.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata does not matter here
        try:
            _require_few(webp_size(content), max_pixels)
            with _silenced_libtiff() if content.startswith(TIFF_SIGNATURES) else nullcontext():
                image = Image.open(io.BytesIO(content), formats=FORMATS)
                _require_few(image.size, max_pixels)
                image.load()
            return image
        except ImageFault:
            raise
        except Image.DecompressionBombError as fault:
            raise ImageFault("too_many_pixels", _one_line(fault)) from None
        except UnidentifiedImageError:
            raise ImageFault("unknown_format", _unknown_format(content)) from None
        except Exception as fault:
            raise _fault(fault) from None


def _unknown_format(content: bytes) -> str:
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return "HEIC; convert it to JPEG or PNG"
    if content.startswith(b"\0\0\1\0"):
        return "an icon; convert it to PNG if it is meant"
    if content.lstrip().startswith((b"<svg", b"<?xml")) or content.startswith(b"\x1f\x8b"):
        return "SVG or packed text, a drawing without pixels; convert it to PNG if it is meant"
    return f"not one of {', '.join(FORMATS)}, a camera's raw file, or damaged in its header; convert it to JPEG or PNG"


def webp_size(content: bytes) -> tuple[int, int]:
    """(width, height) that a WebP claims, (0, 0) of other files: Pillow takes memory for all of it as it opens one."""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or len(content) < 30:
        return 0, 0
    kind = content[12:16]
    if kind == b"VP8X":
        return int.from_bytes(content[24:27], "little") + 1, int.from_bytes(content[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(content[26:28], "little") & 0x3FFF, int.from_bytes(content[28:30], "little") & 0x3FFF


def open_array(content: bytes, max_pixels: int = READABLE_PIXELS) -> np.ndarray:
    """The array of a .npy file, (height, width[, channels]) of uint8, uint16 or float32; pickles are refused."""
    try:
        _require_few(_array_size(content), max_pixels)
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except ImageFault:
        raise
    except Exception as fault:
        raise _fault(fault) from None
    return _require_pixels(array)


def _array_size(content: bytes) -> tuple[int, ...]:
    """(width, height) of a .npy file's header."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)[0][1::-1]


def open_all_channels(content: bytes, max_pixels: int = READABLE_PIXELS) -> Image.Image | np.ndarray:
    """As `open_image`, but a TIFF of whose channels or bits Pillow keeps only a part becomes a whole array."""
    if not content.startswith(TIFF_SIGNATURES):
        return open_image(content, max_pixels)
    try:
        image = open_image(content, max_pixels)
    except ImageFault as fault:
        if fault.reason == "too_many_pixels":
            raise
        return open_tiff_array(content, max_pixels)
    samples, bits = image.tag_v2.get(277, 1), image.tag_v2.get(258, (8,))
    bands = len(image.getbands())
    whole = bands == samples and (bands == 1 or max(bits) <= 8)
    return image if whole or getattr(image, "is_animated", False) else open_tiff_array(content, max_pixels)


def open_tiff_array(content: bytes, max_pixels: int = READABLE_PIXELS) -> np.ndarray:
    """The first page of a TIFF with any number of channels, as `open_array`; ImageFault where tifffile cannot."""
    import tifffile  # a quarter of a second, and few sources hold such files

    try:
        with tifffile.TiffFile(io.BytesIO(content)) as tiff:
            page = tiff.pages.first
            _require_few((page.imagewidth, page.imagelength), max_pixels)
            if page.nbytes > MOST_ARRAY_BYTES:
                raise ImageFault("too_much_memory", f"claims to be an array of {page.nbytes} bytes")
            array, planes_first = page.asarray(), page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    except ImageFault:
        raise
    except Exception as fault:
        raise _fault(fault) from None
    planes_first &= array.ndim == 3
    return _require_pixels(np.ascontiguousarray(np.moveaxis(array, 0, -1)) if planes_first else array)


def tiff_orientation(content: bytes) -> int:
    """The orientation tag of a TIFF's first page, 1 where it has none or is no TIFF."""
    import tifffile  # as above

    try:
        with tifffile.TiffFile(io.BytesIO(content)) as tiff:
            return int(tiff.pages.first.tags.valueof("Orientation", 1))
    except Exception:  # damaged, or no TIFF
        return 1


def _require_pixels(array: np.ndarray) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or 0 in array.shape:
        shape = getattr(array, "shape", "?")
        raise ImageFault("unsupported_mode", f"array of shape {shape}, not (height, width[, channels])")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype not in (np.uint8, np.uint16, np.float32):
        raise ImageFault("unsupported_mode", f"array of {array.dtype}, not uint8, uint16 or float32")
    return array


def _require_few(size: tuple[int, ...], max_pixels: int) -> None:
    if math.prod(size) > max_pixels:
        raise ImageFault("too_many_pixels", f"{' x '.join(map(str, size))} is more than {max_pixels} pixels")


@contextmanager
def _silenced_libtiff() -> Iterator[None]:
    """libtiff writes hundreds of lines about one damaged file straight to the process's standard error."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _fault(error: Exception) -> ImageFault:
    """Decoders raise whatever a damaged file leads them to."""
    if isinstance(error, MemoryError):
        return memory_fault()
    return ImageFault("broken_image", _one_line(error))


def _one_line(fault: Exception) -> str:
    return " ".join(str(fault).split())[:200] or type(fault).__name__
