"""Colour profiles (ICC): what an image's is called, and its conversion to sRGB by LittleCMS.

A profile is sRGB when it changes no colour of a grid by more than one level, whatever it is called. Profiles are few
and files many, so what is known of one is kept.
"""

import io
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SRGB = "sRGB"
UNREADABLE = "unreadable"
GRID = np.stack(np.meshgrid(*[np.linspace(0, 255, 9)] * 3), axis=-1).reshape(27, 27, 3).astype(np.uint8)


class _Profile(NamedTuple):
    """`mode` is that of the images it is for, None where it is of no use."""

    name: str
    mode: str | None
    transform: Any


def profile_name(image: Image.Image) -> str | None:
    """What an image's profile calls itself; `sRGB` where it is that, `unreadable`, or None where there is none."""
    content = image.info.get("icc_profile")
    return _read_profile(content).name if content else None


def to_srgb(image: Image.Image, content: bytes, *, grey: bool) -> tuple[Image.Image, list[str]]:
    """An RGB image (`grey`: whose file was grey) or a CMYK image as sRGB, relative colorimetric with black point.

    Where the profile cannot be read, or is for other colours, the image itself and `profile ignored`.
    """
    profile = _read_profile(content)
    if profile.name == SRGB and image.mode == "RGB":
        return image, []
    if profile.mode != image.mode and not (profile.mode == "L" and grey):
        return image, ["profile ignored"]
    from PIL import ImageCms

    source = image.getchannel(0) if profile.mode == "L" else image
    return ImageCms.applyTransform(source, profile.transform), ["to sRGB"]


@lru_cache(maxsize=32)
def _read_profile(content: bytes) -> _Profile:
    from PIL import ImageCms  # most sources need it never

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        name = " ".join(ImageCms.getProfileDescription(profile).split())[:60] or "unnamed"
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(profile.profile.xcolor_space)
        transform = mode and ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except Exception:  # LittleCMS says little more than that it could not
        return _Profile(UNREADABLE, None, None)
    if mode == "RGB":
        converted = np.asarray(ImageCms.applyTransform(Image.fromarray(GRID), transform))
        if np.abs(converted.astype(int) - GRID).max() <= 1:
            name = SRGB
    return _Profile(name, mode, transform)
