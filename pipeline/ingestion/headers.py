"""What an image's header says, for `examine: header`: enough to keep its bytes, where no rule changes them.

JPEG and PNG are read here, in some microseconds; WebP and TIFF through Pillow, which decodes nothing until it is asked
to. Whatever needs a rule or is out of the ordinary has no plain header and is decoded after all: what is not upright,
transparency, CMYK, 16 bit, animations, two images in one file, colour profiles, other formats, and a file whose end is
not where its format says. What is damaged between header and end goes unseen.
"""

import io
import struct
import warnings
from typing import NamedTuple

from PIL import Image
from zlib_ng.zlib_ng import crc32

ORIENTATION_TAG = 0x0112
TURNED = range(2, 9)  # EXIF's orientations that are not upright

_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_TWO_BYTES = struct.Struct(">H").unpack_from
_CHUNK = struct.Struct(">I4s").unpack_from
_JPEG_SIZE = struct.Struct(">BHHB").unpack_from  # precision, height, width, components
_PNG_START = struct.Struct(">8sI4sIIBB").unpack_from  # signature, length, IHDR, width, height, depth, colour type
_JPEG_MODES = {1: "L", 3: "RGB"}  # by components
_PNG_MODES = {(1, 0): "1", (2, 0): "L", (4, 0): "L", (8, 0): "L", (8, 2): "RGB"}  # by depth and colour type
_PNG_MODES |= {(depth, 3): "P" for depth in (1, 2, 4, 8)}
# Neither do they change how a pixel is shown, nor can they hold an orientation.
_PLAIN_CHUNKS = frozenset(
    (b"IHDR", b"PLTE", b"IDAT", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"hIST", b"pHYs", b"tIME")
)
_TIFF_PLACES = ((273, 279), (324, 325))  # tags of the offsets and sizes of strips, and of tiles


class Header(NamedTuple):
    """Format and mode as Pillow names them, width and height in pixels."""

    format: str
    mode: str
    width: int
    height: int


def plain_header(content: bytes) -> Header | None:
    """The header of an image whose bytes are fine as they are, whatever its pixels; else None."""
    try:
        if content.startswith(b"\xff\xd8\xff"):
            header = _jpeg_header(content)
        elif content.startswith(b"\x89PNG\r\n\x1a\n"):
            header = _png_header(content)
        else:
            header = _opened_header(content)
    except Exception:  # of a damaged header; the decoder will say what it is
        return None
    return None if header is None or not header.width * header.height else header


def _jpeg_header(content: bytes) -> Header | None:
    if not content.endswith(b"\xff\xd9"):
        return None
    position, header = 2, None
    while content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xDA:  # the pixels begin
            return header
        (length,) = _TWO_BYTES(content, position + 2)
        start = position + 4
        position += 2 + length
        if marker in (0xC0, 0xC1, 0xC2):
            precision, height, width, components = _JPEG_SIZE(content, start)
            if header is not None or precision != 8 or components not in _JPEG_MODES:
                return None
            header = Header("JPEG", _JPEG_MODES[components], width, height)
        elif marker == 0xE1:
            if not _is_upright(content[start:position]):
                return None
        elif marker == 0xE2:  # a colour profile, or further images
            return None
        elif not (marker in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF):
            return None
    return None


def _is_upright(segment: bytes) -> bool:
    """Of an APP1 segment: whether it surely holds no orientation but the upright one."""
    if segment.startswith(_XMP):
        return b"Orientation" not in segment
    if not segment.startswith(_EXIF):
        return b"Orientation" not in segment and b"Exif" not in segment
    tiff = segment[len(_EXIF) :]
    order = {b"II*\0": "<", b"MM\0*": ">"}[tiff[:4]]
    (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
    (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
    wanted = struct.pack(f"{order}H", ORIENTATION_TAG)
    for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
        if tiff[entry : entry + 2] == wanted:
            kind, count, value = struct.unpack_from(f"{order}HIH", tiff, entry + 2)
            return (kind, count) == (3, 1) and value not in TURNED
    return directory + 2 + 12 * entries <= len(tiff)


def _png_header(content: bytes) -> Header | None:
    _, length, kind, width, height, *pixel = _PNG_START(content)
    mode = _PNG_MODES.get(tuple(pixel))
    if (length, kind) != (13, b"IHDR") or mode is None:
        return None
    position, end, view = 8, len(content) - 12, memoryview(content)
    while position < end:
        length, kind = _CHUNK(content, position)
        if kind not in _PLAIN_CHUNKS and not (kind == b"tEXt" and _is_comment(content[position + 8 : position + 24])):
            return None
        after = position + 8 + length
        if crc32(view[position + 4 : after]) != int.from_bytes(view[after : after + 4], "big"):
            return None
        position = after + 4
    whole = position == end and content.endswith(b"\0\0\0\0IEND\xae\x42\x60\x82")
    return Header("PNG", mode, width, height) if whole else None


def _is_comment(text: bytes) -> bool:
    """Not one of the keywords under which programs hide EXIF or XMP."""
    return not text.startswith((b"Raw profile", b"XML", b"exif", b"xmp"))


def _opened_header(content: bytes) -> Header | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # metadata that Pillow stumbles over; and too many pixels
        image = Image.open(io.BytesIO(content), formats=("WEBP", "TIFF"))
        plain = image.mode in ("L", "RGB") and getattr(image, "n_frames", 1) == 1 and not image.has_transparency_data
        if not plain or "icc_profile" in image.info or image.getexif().get(ORIENTATION_TAG, 1) in TURNED:
            return None
        whole = _is_plain_tiff(image, content) if image.format == "TIFF" else _is_whole_webp(content)
        return Header(image.format, image.mode, *image.size) if whole else None


def _is_whole_webp(content: bytes) -> bool:
    return int.from_bytes(content[4:8], "little") + 8 == len(content)


def _is_plain_tiff(image: Image.Image, content: bytes) -> bool:
    """8 bits a channel, grey or RGB, no channel that Pillow leaves out, and all pixels inside the file."""
    tags = image.tag_v2
    bands = len(image.getbands())
    plain = tags.get(262) == (2 if bands == 3 else 1) and tags.get(277, 1) == bands and set(tags[258]) == {8}
    places = [(tags[offsets], tags[sizes]) for offsets, sizes in _TIFF_PLACES if offsets in tags and sizes in tags]
    ends = [start + size for starts, sizes in places for start, size in zip(starts, sizes, strict=True)]
    return plain and bool(ends) and max(ends) <= len(content)
