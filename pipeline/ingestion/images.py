"""What becomes of an image's bytes: kept wherever a plain decoder shows the right pixels, else re-encoded.

Original bytes of a JPEG, PNG, WebP or TIFF stay as they are. Re-encoded are: what is not upright (so that no reader has
to know about EXIF), animations and multi-page files (first frame), other formats, what `ImageRule` asks for, and, under
`channels: rgb`, transparency (put on white), 16-bit grey (made 8 bit) and CMYK, about which decoders disagree. 16-bit
colour stays: every decoder takes the upper eight bits, which are right to a level. A JPEG becomes a JPEG of quality 95
without chroma subsampling, anything else a PNG, an array of channels a .npy. `changes` says what was done.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from pipeline.ingestion.headers import ORIENTATION_TAG, plain_header
from pipeline.ingestion.pixels.colour import UNCHANGED, to_rgb
from pipeline.ingestion.pixels.encoding import encode, fit
from pipeline.ingestion.pixels.moments import pixel_moments
from pipeline.ingestion.pixels.profiles import profile_name
from pipeline.shards.decoding import (
    FORMATS,
    READABLE_PIXELS,
    ImageFault,
    open_all_channels,
    open_array,
    open_image,
    tiff_orientation,
)

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif"}
FORMAT_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
ARRAY_MODES = ("F", "CMYK")  # of a TIFF under `channels: keep`, which no .png can hold
BITS_TAG = 258
UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageRule:
    """What a config asks of every image beyond its channels: small, and part of the shard jobs."""

    colour: Literal["keep", "srgb"] = "keep"
    max_side: int | None = None  # pixels
    quality: int = 95
    format: Literal["jpeg", "png", "webp"] | None = None
    max_pixels: int = READABLE_PIXELS
    examine: Literal["pixels", "header"] = "pixels"


class DecodedImage(NamedTuple):
    """An image that may be taken. `pixels` are upright, and RGB or as `channels: keep` leaves them."""

    pixels: Image.Image | np.ndarray
    format: str  # of the file, Pillow's name, or NPY
    mode: str  # of the file, Pillow's name, with `;16` where it is colour of 16 bits; of an array as in `uint16 x 5`
    profile: str | None  # the name of its colour profile, `sRGB` where it is that
    changes: tuple[str, ...]  # empty where the original bytes already decode to `pixels`

    @property
    def keeps_bytes(self) -> bool:
        """Whether the original bytes decode to `pixels`."""
        return all(change in UNCHANGED for change in self.changes)


class PreparedImage(NamedTuple):
    """What goes into the shard. Pixel moments are per channel, values 0..1 (float arrays: as they are).

    `format`, `mode` and `profile` say what the file was, as in `DecodedImage`; `pixels` is what was decoded from it and
    is stored, but for lossy encoding. Of an image that was not decoded (headers.py), pixels and moments are None.
    """

    content: bytes
    extension: str
    width: int
    height: int
    changes: tuple[str, ...]
    mean: tuple[float, ...] | None
    mean_square: tuple[float, ...] | None
    format: str
    mode: str
    pixels: Image.Image | np.ndarray | None
    profile: str | None = None
    upright_size: tuple[int, int] | None = None  # (width, height) before `max_side`, where that made it smaller


def prepare_image(content: bytes, channels: str, rule: ImageRule = ImageRule()) -> PreparedImage:
    """The image to store for these bytes of a file; ImageFault where there is none."""
    if image := prepare_by_header(content, rule):
        return image
    decoded = decode_image(content, channels, rule)
    pixels, changes, upright_size = decoded.pixels, decoded.changes, None
    keeps_bytes = decoded.keeps_bytes
    if rule.max_side is not None and max(image_size(pixels)) > rule.max_side:
        upright_size, pixels = image_size(pixels), fit(pixels, rule.max_side)
        changes, keeps_bytes = (*changes, "resized"), False
    moments = pixel_moments(pixels)
    if keeps_bytes:
        extension = KEPT_FORMATS.get(decoded.format, "npy")
    else:
        content, extension = _encode(pixels, decoded.format, rule)
    return PreparedImage(
        content, extension, *image_size(pixels), changes, *moments, decoded.format, decoded.mode, pixels,
        decoded.profile, upright_size,
    )  # fmt: skip


def prepare_by_header(content: bytes, rule: ImageRule) -> PreparedImage | None:
    """The image with its own bytes, its pixels not looked at; None where they have to be."""
    header = plain_header(content) if rule.examine == "header" else None
    if header is None or header.width * header.height > rule.max_pixels:
        return None
    extension = _extension(header.format, rule)
    if extension is None or (rule.max_side is not None and max(header.width, header.height) > rule.max_side):
        return None
    return PreparedImage(
        content, extension, header.width, header.height, (), None, None, header.format, header.mode, None
    )


def decode_image(content: bytes, channels: str, rule: ImageRule = ImageRule()) -> DecodedImage:
    """The pixels of a file as they are to be stored but for `max_side`; ImageFault where there are none."""
    if content.startswith(b"\x93NUMPY"):
        if channels == "rgb":
            raise ImageFault("unsupported_mode", "a .npy array; take it with channels=keep")
        array = open_array(content, rule.max_pixels)
        return DecodedImage(array, "NPY", _array_mode(array), None, ())
    image = (open_all_channels if channels == "keep" else open_image)(content, rule.max_pixels)
    if isinstance(image, np.ndarray):
        orientation, mode = tiff_orientation(content), _array_mode(image)
        upright = _upright_array(image, orientation)
        return DecodedImage(upright, "TIFF", mode, None, ("upright",) if orientation in UPRIGHT else ())
    changes = []
    # An MPO's further frames are previews or the other eye, and every JPEG decoder shows the first.
    if image.format != "MPO" and _has_more_frames(image):
        changes.append("first frame")
    pixels = image
    if channels == "rgb":
        pixels, rgb_changes = to_rgb(image, rule.colour)
        changes += rgb_changes
    if (orientation := _orientation(image)) in UPRIGHT:
        pixels = pixels.transpose(UPRIGHT[orientation])
        changes.append("upright")
    elif image.format == "TIFF" and file_orientation(content) in UPRIGHT:
        changes.append("upright")  # Pillow has turned it; others would not
    if _extension(image.format, rule) is None:
        changes.append(f"from {image.format}")
    return DecodedImage(pixels, image.format, _file_mode(image, content), profile_name(image), tuple(changes))


def rgb_pixels(pixels: Image.Image | np.ndarray) -> Image.Image | np.ndarray:
    """Upright pixels as `channels: rgb` has them; as they are where their mode has no agreed meaning as RGB."""
    if isinstance(pixels, np.ndarray) or pixels.mode == "RGB":
        return pixels
    try:
        return to_rgb(pixels, "keep")[0]
    except ImageFault:
        return pixels


def image_size(pixels: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height)"""
    return (pixels.shape[1], pixels.shape[0]) if isinstance(pixels, np.ndarray) else pixels.size


def file_orientation(content: bytes) -> int:
    """EXIF's orientation of an image file, 1 for upright or unknown. Not decoded: Pillow turns a TIFF as it loads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception:  # as below; and a TIFF of more channels than Pillow knows
        return tiff_orientation(content)
    return _orientation(image)


def _orientation(image: Image.Image) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(image.getexif().get(ORIENTATION_TAG, 1))
        except Exception:  # damaged metadata; decoders ignore it too
            return 1


def _has_more_frames(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # damaged behind its first frame, which is there
        return False


def _extension(format: str, rule: ImageRule) -> str | None:
    """The extension under which a file of this format may stay; None where it must become another."""
    extension = KEPT_FORMATS.get(format)
    return extension if rule.format is None or FORMAT_EXTENSIONS[rule.format] == extension else None


def _array_mode(array: np.ndarray) -> str:
    return f"{array.dtype} x {array.shape[2] if array.ndim == 3 else 1}"


def _file_mode(image: Image.Image, content: bytes) -> str:
    depth = content[24] if image.format == "PNG" else max(getattr(image, "tag_v2", {}).get(BITS_TAG, (8,)))
    return f"{image.mode};16" if depth == 16 and image.mode in ("LA", "RGB", "RGBA") else image.mode


def _upright_array(array: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W[, C]) turned as `UPRIGHT` turns an image."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return np.ascontiguousarray(array)


def _encode(pixels: Image.Image | np.ndarray, format: str, rule: ImageRule) -> tuple[bytes, str]:
    """(the bytes to store for pixels of a file of this format, their extension)"""
    if isinstance(pixels, np.ndarray) or (pixels.mode in ARRAY_MODES and format == "TIFF"):
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(pixels), allow_pickle=False)
        return buffer.getvalue(), "npy"
    lossy = "jpg" if format in ("JPEG", "MPO") else "png"
    extension = lossy if rule.format is None else FORMAT_EXTENSIONS[rule.format]
    return encode(pixels, extension, rule.quality), extension
