"""Images made smaller, and written anew."""

import io
from typing import Literal

from PIL import Image

from pipeline.shards.decoding import ImageFault

Extension = Literal["jpg", "png", "webp"]
FORMS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}  # Pillow's names
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def fit(image: Image.Image, max_side: int) -> Image.Image:
    """The image with a longer side of `max_side` pixels at most, by the filter that training resizes with: bicubic,
    with antialias."""
    longer = max(image.size)
    if longer <= max_side:
        return image
    width, height = (max(1, round(side * max_side / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, extension: Extension, quality: int) -> bytes:
    """The bytes of a file; a JPEG without chroma subsampling. ImageFault `unsupported_mode` where it does not fit.

    The image's `info` is emptied: the old orientation, profile and text must not follow. A palette's transparency is
    part of its pixels and stays.
    """
    if extension == "png" and image.mode not in PNG_MODES:
        raise ImageFault("unsupported_mode", f"mode {image.mode} does not fit into a .png")
    image.info = {key: value for key, value in image.info.items() if key == "transparency" and image.mode == "P"}
    options = {"jpg": {"quality": quality, "subsampling": 0}, "png": {}, "webp": {"quality": quality}}[extension]
    buffer = io.BytesIO()
    try:
        image.save(buffer, FORMS[extension], **options)
    except (OSError, ValueError) as error:  # WebP ends at 16,383 pixels a side, JPEG at 65,500
        size = f"{image.width} x {image.height} pixels of mode {image.mode}"
        raise ImageFault("unsupported_mode", f"{size} do not fit into a .{extension} ({error})") from None
    return buffer.getvalue()
