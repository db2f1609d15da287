"""From what a file holds to red, green and blue of 8 bits, where a plain `.convert("RGB")` would get it wrong.

16 bit (12 in some TIFFs) are scaled, not cut off. What is transparent is put on white. CMYK in a JPEG is inverted where
Adobe's marker stands in the file, and Pillow inverts all of them; without it 0 means no ink. Large images go through in
bands of rows, so that no step takes more memory than its result.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageChops

from pipeline.ingestion.pixels.profiles import to_srgb
from pipeline.shards.decoding import ImageFault

BAND_PIXELS = 1 << 22
CONVERTIBLE_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
BITS_TAG, PHOTOMETRIC_TAG, WHITE_IS_ZERO = 258, 262, 0
UNCHANGED = ("profile ignored",)  # of the changes, those after which the original bytes still show the pixels


def to_rgb(image: Image.Image, colour: str) -> tuple[Image.Image, list[str]]:
    """RGB pixels, and what was done to them that a plain decoder would not do; ImageFault `unsupported_mode`.

    `colour` is `keep`, or `srgb` for a conversion by the image's profile, if it has one.
    """
    if image.mode == "CMYK":
        return _cmyk_to_rgb(image, colour)
    rgb, changes = _plain_rgb(image)
    profile = image.info.get("icc_profile")
    if colour == "srgb" and profile:
        grey = image.mode in ("1", "L", "LA", "La", "I") or image.mode.startswith("I;16")
        rgb, profile_changes = to_srgb(rgb, profile, grey=grey)
        changes += profile_changes
    return rgb, changes


def _plain_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image, []
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _sixteen_bit_to_rgb(image)
    if image.mode not in CONVERTIBLE_MODES:
        raise ImageFault("unsupported_mode", f"mode {image.mode} has no agreed meaning as RGB; try channels=keep")
    if image.has_transparency_data and (opaque := _on_white(image)) is not None:
        return opaque, ["on white"]
    return image.convert("RGB"), []


def _cmyk_to_rgb(image: Image.Image, colour: str) -> tuple[Image.Image, list[str]]:
    if image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        image = _with_info(ImageChops.invert(image), image)
    profile = image.info.get("icc_profile")
    if colour == "srgb" and profile:
        rgb, changes = to_srgb(image, profile, grey=False)
        if rgb is not image:
            return rgb, ["CMYK as RGB", *changes]
        return image.convert("RGB"), ["CMYK as RGB", *changes]
    return image.convert("RGB"), ["CMYK as RGB"]


def _with_info(image: Image.Image, of: Image.Image) -> Image.Image:
    image.info = dict(of.info)
    return image


def _on_white(image: Image.Image) -> Image.Image | None:
    """RGB pixels of an image with transparency; None where all of it is opaque."""
    result, seen_transparency = Image.new("RGB", image.size), False
    for box in _bands(image.size):
        band = image.crop(box).convert("RGBA")
        if band.getchannel("A").getextrema()[0] < 255:
            seen_transparency = True
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        result.paste(band.convert("RGB"), box)
    return result if seen_transparency else None


def _sixteen_bit_to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Scaled by the depth of the file and rounded; one value of a PNG may be transparent."""
    tags = getattr(image, "tag_v2", {})
    most = 4095 if tags.get(BITS_TAG) == (12,) else 65535
    negative = image.mode != "I" and tags.get(PHOTOMETRIC_TAG) == WHITE_IS_ZERO
    transparent, on_white = image.info.get("transparency"), False
    grey = np.empty(image.size[::-1], np.uint8)
    for box in _bands(image.size):
        values = np.asarray(image.crop(box)).astype(np.int64)
        if values.min() < 0 or values.max() > most:
            raise ImageFault("unsupported_mode", f"mode {image.mode} with values beyond 16 bit; try channels=keep")
        rows = grey[box[1] : box[3]]
        rows[...] = (510 * values + most) // (2 * most)
        if negative:
            rows[...] = 255 - rows
        if isinstance(transparent, int) and (where := values == transparent).any():
            rows[where], on_white = 255, True
    return Image.fromarray(grey).convert("RGB"), ["8 bit", *(["on white"] if on_white else [])]


def _bands(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    width, height = size
    rows = max(1, BAND_PIXELS // max(width, 1))
    return ((0, top, width, min(top + rows, height)) for top in range(0, height, rows))
