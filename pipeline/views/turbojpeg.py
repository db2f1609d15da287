"""TurboJPEG 3 or newer by ctypes, as far as decoding a region needs it.

The library is optional: $VIT_TURBOJPEG, or what the system's linker finds.
"""

import ctypes
import ctypes.util
import os
import threading
from functools import cache

from pipeline.errors import InputError

# turbojpeg.h of version 3: what a handle is for, a pixel format, and parameters
DECOMPRESS, RGB = 1, 0
STOP_ON_WARNING, SUBSAMPLING, WIDTH, HEIGHT, COLOURS = 0, 4, 5, 6, 8
CMYK_COLOURS = (3, 4)


class Region(ctypes.Structure):
    """tjregion: left, top, width and height, pixels."""

    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


@cache
def require_turbojpeg() -> ctypes.CDLL:
    """The library; InputError where there is none of version 3."""
    path = os.environ.get("VIT_TURBOJPEG") or ctypes.util.find_library("turbojpeg")
    key = "augmentation.region_decode"
    if path is None:
        raise InputError(f"{key}: no TurboJPEG library found; install libturbojpeg 3, set VIT_TURBOJPEG or turn it off")
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise InputError(f"{key}: {path} cannot be loaded ({error}); correct VIT_TURBOJPEG or turn it off") from None
    if not hasattr(library, "tj3SetCroppingRegion"):
        raise InputError(f"{key}: {path} is older than TurboJPEG 3; install libturbojpeg 3 or turn it off")
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    library.tj3Init.argtypes, library.tj3Init.restype = [integer], pointer
    library.tj3DecompressHeader.argtypes = [pointer, ctypes.c_char_p, size]
    library.tj3Get.argtypes = [pointer, integer]
    library.tj3Set.argtypes = [pointer, integer, integer]
    library.tj3SetCroppingRegion.argtypes = [pointer, Region]
    library.tj3Decompress8.argtypes = [pointer, ctypes.c_char_p, size, pointer, integer, integer]
    return library


class Decompressor(threading.local):
    """A decompressor for each thread that asks, made on first use and kept as long as the process."""

    def __init__(self) -> None:
        self.library, self.handle = None, None

    def opened(self) -> tuple[ctypes.CDLL, int]:
        """The library and the calling thread's handle; InputError where there is no library."""
        if self.handle is None:
            self.library = require_turbojpeg()
            self.handle = self.library.tj3Init(DECOMPRESS)
            self.library.tj3Set(self.handle, STOP_ON_WARNING, 1)
        return self.library, self.handle
