"""What becomes of an image's bytes: kept wherever a plain decoder shows the right pixels, else re-encoded.

Original bytes of a JPEG, PNG, WebP or TIFF stay as they are. Re-encoded are: what is not upright (so that no reader has
to know about EXIF), animations and multi-page files (first frame), other formats, and, under `channels: rgb`,
transparency (put on white) and 16-bit grey (made 8 bit). A JPEG becomes a JPEG of quality 95 without chroma
subsampling, anything else a PNG. `changes` says what was done.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.shards.decoding import FORMATS, ImageFault, open_all_channels, open_array, open_image, tiff_orientation

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif"}
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
ORIENTATION_TAG = 0x0112
UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodedImage(NamedTuple):
    """An image that may be taken. `pixels` are upright, and RGB or as `channels: keep` leaves them."""

    pixels: Image.Image | np.ndarray
    format: str  # of the file, Pillow's name, or NPY
    mode: str  # of the file, Pillow's name; of an array its dtype and channels, as in `uint16 x 5`
    changes: tuple[str, ...]  # empty where the original bytes already decode to `pixels`


class PreparedImage(NamedTuple):
    """What goes into the shard. Pixel moments are per channel, values 0..1 (float arrays: as they are).

    `format`, `mode` and `pixels` are those of `DecodedImage`: what the file was, and what was decoded from it. Of an
    image that was not decoded (headers.py), pixels and moments are None.
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


def prepare_image(content: bytes, channels: str) -> PreparedImage:
    """The image to store for these bytes of a file; ImageFault where there is none."""
    decoded = decode_image(content, channels)
    width, height = image_size(decoded.pixels)
    if decoded.format == "NPY":
        extension = "npy"
    elif decoded.format in KEPT_FORMATS and not decoded.changes:
        extension = KEPT_FORMATS[decoded.format]
    else:
        content, extension = _encode(decoded.pixels, lossy=decoded.format in ("JPEG", "MPO"))
    moments = pixel_moments(decoded.pixels)
    return PreparedImage(
        content, extension, width, height, decoded.changes, *moments, decoded.format, decoded.mode, decoded.pixels
    )


def decode_image(content: bytes, channels: str) -> DecodedImage:
    if content.startswith(b"\x93NUMPY"):
        if channels == "rgb":
            raise ImageFault("unsupported_mode", "a .npy array; take it with channels=keep")
        array = open_array(content)
        return DecodedImage(array, "NPY", _array_mode(array), ())
    image = open_all_channels(content) if channels == "keep" else open_image(content)
    if isinstance(image, np.ndarray):
        return DecodedImage(image, "TIFF", _array_mode(image), ())
    changes = []
    # An MPO's further frames are previews or the other eye, and every JPEG decoder shows the first.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        changes.append("first frame")
    pixels = image
    if channels == "rgb":
        pixels, rgb_changes = _to_rgb(image)
        changes += rgb_changes
    if (orientation := _orientation(image)) in UPRIGHT:
        pixels = pixels.transpose(UPRIGHT[orientation])
        changes.append("upright")
    if image.format not in KEPT_FORMATS:
        changes.append(f"from {image.format}")
    return DecodedImage(pixels, image.format, image.mode, tuple(changes))


def _array_mode(array: np.ndarray) -> str:
    return f"{array.dtype} x {array.shape[2] if array.ndim == 3 else 1}"


def rgb_pixels(pixels: Image.Image | np.ndarray) -> Image.Image | np.ndarray:
    """Upright pixels as `channels: rgb` has them; as they are where their mode has no agreed meaning as RGB."""
    if isinstance(pixels, np.ndarray) or pixels.mode == "RGB":
        return pixels
    try:
        return _to_rgb(pixels)[0]
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


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """RGB pixels, and what `.convert("RGB")` alone would have got wrong."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _eight_bit(image).convert("RGB"), ["8 bit"]
    if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"):
        raise ImageFault("unsupported_mode", f"mode {image.mode} has no agreed meaning as RGB; try channels=keep")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getextrema()[3][0] < 255:
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), ["on white"]
    return image.convert("RGB"), []


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageFault("unsupported_mode", f"mode {image.mode} with values beyond 16 bit; try channels=keep")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _encode(pixels: Image.Image, *, lossy: bool) -> tuple[bytes, str]:
    if not lossy and pixels.mode not in PNG_MODES:
        raise ImageFault("unsupported_mode", f"mode {pixels.mode} does not fit into a .png")
    bare = pixels.copy()
    # The old orientation, profile and text must not follow; a palette's transparency is part of its pixels.
    bare.info = {key: value for key, value in pixels.info.items() if key == "transparency" and pixels.mode == "P"}
    buffer = io.BytesIO()
    if lossy:
        bare.save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue(), "jpg"
    bare.save(buffer, "PNG")
    return buffer.getvalue(), "png"


def pixel_moments(pixels: Image.Image | np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, mean square) per channel."""
    if isinstance(pixels, Image.Image) and pixels.mode == "RGB":
        return _moments_of_histogram(np.array(pixels.histogram(), dtype=np.int64).reshape(3, 256))
    if isinstance(pixels, Image.Image) and pixels.mode == "P":
        return pixel_moments(pixels.convert("RGB"))  # the colours, not their numbers in the palette
    values = np.asarray(pixels)
    scale = 1.0 if values.dtype.kind in "fb" else float(np.iinfo(values.dtype).max if values.itemsize < 4 else 65535)
    values = values.reshape(values.shape[0] * values.shape[1], -1).astype(np.float64) / scale
    mean, mean_square = values.mean(axis=0), (values**2).mean(axis=0)
    if not np.isfinite(mean_square).all():
        raise ImageFault("broken_image", "holds values that are not finite")
    return tuple(mean.tolist()), tuple(mean_square.tolist())


def _moments_of_histogram(counts: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    levels = np.arange(256)
    total = int(counts[0].sum())
    mean = (counts @ levels) / (total * 255)
    mean_square = (counts @ levels**2) / (total * 255**2)
    return tuple(mean.tolist()), tuple(mean_square.tolist())
