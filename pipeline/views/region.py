"""Decoding no more of a JPEG than a box of it.

Pixels equal those of a full decode, because one block more is decoded on each side: at the edge of a region the decoder
has no neighbours to interpolate colour from.
"""

import numpy as np

from pipeline.views.geometry import Box
from pipeline.views.pixels import decode_pixels, jpeg_size, scratch
from pipeline.views.turbojpeg import (
    CMYK_COLOURS,
    COLOURS,
    HEIGHT,
    RGB,
    SUBSAMPLING,
    WIDTH,
    Decompressor,
    Region,
)

_BLOCK_WIDTHS = (8, 16, 16, 8, 8, 32, 8)  # by subsampling: 444, 422, 420, grey, 440, 411, 441
_BLOCK_HEIGHT = 16  # at least as high as any but 441's, whose 32 rows its own upsampling never looks across

_decompressor = Decompressor()


def region_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG from its header, None where only a decoder can tell."""
    try:
        return jpeg_size(content)
    except ValueError:
        return None


def decode_region(content: bytes, box: Box) -> np.ndarray:
    """(box.height, box.width, 3) uint8 of a JPEG, the pixels of `decode_pixels`; good until the thread's next call.

    What TurboJPEG refuses is decoded whole. Raises ImageFault as `decode_pixels` does.
    """
    library, handle = _decompressor.opened()
    if library.tj3DecompressHeader(handle, content, len(content)) == 0:
        subsampling = library.tj3Get(handle, SUBSAMPLING)
        if 0 <= subsampling < len(_BLOCK_WIDTHS) and library.tj3Get(handle, COLOURS) not in CMYK_COLOURS:
            size = library.tj3Get(handle, HEIGHT), library.tj3Get(handle, WIDTH)
            outer = _with_margin(box, size, _BLOCK_WIDTHS[subsampling])
            pixels = scratch(outer.height, outer.width, 3)
            region = Region(outer.left, outer.top, outer.width, outer.height)
            if (
                library.tj3SetCroppingRegion(handle, region) == 0
                and library.tj3Decompress8(handle, content, len(content), pixels.ctypes.data, 0, RGB) == 0
            ):
                return Box(box.top - outer.top, box.left - outer.left, box.height, box.width).of(pixels)
    return box.of(decode_pixels(content, "jpg", 3))


def _with_margin(box: Box, size: tuple[int, int], block_width: int) -> Box:
    """The box and a block around it, begun where blocks begin, inside the image."""
    top = max(0, box.top // _BLOCK_HEIGHT - 1) * _BLOCK_HEIGHT
    left = max(0, box.left // block_width - 1) * block_width
    bottom = min(size[0], box.top + box.height + _BLOCK_HEIGHT)
    right = min(size[1], box.left + box.width + block_width)
    return Box(top, left, bottom - top, right - left)
