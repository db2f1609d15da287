"""Masks and boxes of a sample: what says which pixels, and which rectangles, belong to which class.

A mask is the member KEY.mask.png right behind KEY.json: grey of 8 bits, as large as the image, a pixel is the number of
its class, 255 says that it counts for nothing. Boxes stand in KEY.json as `boxes`: [x, y, width, height, class] each,
in pixels of the stored image, from its upper left corner. The table of a shard knows nothing of either.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipeline.shards.decoding import ImageFault, open_image

MASK_EXTENSION = "mask.png"
IGNORED = 255  # of a mask's pixels
SLACK = 1.0  # pixels that a box may lie outside of its image, by rounding

Box = tuple[float, float, float, float, int]  # x, y, width, height, class

_PNG, _GREY, _PALETTE = b"\x89PNG\r\n\x1a\n", 0, 3


def decode_mask(content: bytes) -> np.ndarray:
    """(H, W) uint8 of a .png of grey or palette of 8 bits; ImageFault `bad_mask` where it is something else."""
    depth, colour = content[24:26] if len(content) > 26 and content.startswith(_PNG) else (0, 0)
    if (depth, colour) != (8, _GREY) and colour != _PALETTE:
        found = f"colour type {colour} of {depth} bits" if depth else "no .png"
        raise ImageFault("bad_mask", f"{found}; a mask is a .png of grey or palette of 8 bits, a pixel is its class")
    try:
        return np.asarray(open_image(content))
    except ImageFault as fault:
        raise ImageFault("bad_mask", fault.detail) from None


def grey_mask(content: bytes, values: np.ndarray) -> bytes:
    """The .png to store for a mask that decodes to `values`: its own bytes, or grey for a palette, whose colours
    readers would take for the pixels."""
    return content if content[25] == _GREY else encoded_mask(values)


def encoded_mask(values: np.ndarray) -> bytes:
    """The .png of (H, W) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def mask_fault(values: np.ndarray, size: tuple[int, int], num_classes: int | None) -> str | None:
    """Why a mask is not that of an image of (width, height) and, if it is said, so many classes; None if it is."""
    if values.shape[::-1] != size:
        sizes = f"{values.shape[1]} x {values.shape[0]} pixels"
        return f"its mask is {sizes}, the image {size[0]} x {size[1]} as it is stored, upright"
    greatest = greatest_class(values)
    if num_classes is not None and greatest >= num_classes:
        return f"its mask has class {greatest}, and there are {num_classes}: 0 to {num_classes - 1}, or {IGNORED}"
    return None


def greatest_class(values: np.ndarray) -> int:
    """The greatest number of a class in a mask; -1 where no pixel counts."""
    return int(np.where(values == IGNORED, -1, values.astype(np.int16)).max())


def boxes_fault(boxes: Any, size: tuple[int, int], num_classes: int) -> str | None:
    """Why `boxes` are not rectangles of known classes in an image of (width, height); None if they are."""
    if not isinstance(boxes, (list, tuple)):
        return "its boxes are no list"
    for box in boxes:
        numbers = isinstance(box, (list, tuple)) and all(isinstance(value, (int, float)) for value in box)
        if not numbers or len(box) != 5 or not isinstance(box[4], int):
            return f"box {box}: not five numbers: x, y, width, height, class"
        x, y, width, height, number = box
        if not (width > 0 and height > 0):
            return f"box {list(box[:4])}: its width and height are not above 0"
        within = all(
            -SLACK <= start and start + length <= side + SLACK and min(start + length, side) > max(start, 0)
            for start, length, side in ((x, width, size[0]), (y, height, size[1]))
        )
        if not within:
            return f"box {list(box[:4])}: outside of the image of {size[0]} x {size[1]}"
        if not 0 <= number < num_classes:
            return f"box {list(box[:4])}: class {number}, and there are {num_classes}"
    return None


def cut_to(boxes: Sequence[Box], size: tuple[int, int]) -> list[list[float]]:
    """Boxes without what lies outside of an image of (width, height) by a pixel at most; whole numbers as integers."""
    cut = []
    for x, y, width, height, number in boxes:
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, size[0]), min(y + height, size[1])
        sides = (left, top, right - left, bottom - top)
        cut.append([*(int(value) if value == int(value) else value for value in sides), number])
    return cut


def scaled(boxes: Sequence[Sequence[float]], size: tuple[int, int], to: tuple[int, int]) -> list[Box]:
    """Boxes in an image of (width, height) `size`, in the same image made `to`."""
    across, down = to[0] / size[0], to[1] / size[1]
    return [(x * across, y * down, width * across, height * down, number) for x, y, width, height, number in boxes]


def annotation_bytes(mask: np.ndarray | None, boxes: Sequence[Sequence[float]] | None) -> bytes:
    """What a fingerprint takes of masks, as they decode, and boxes; nothing where there are none."""
    parts = [] if mask is None else [f"mask {mask.shape}".encode(), hashlib.sha256(mask.tobytes()).digest()]
    return b"".join([*parts, *([] if boxes is None else [b"boxes", json.dumps(boxes).encode()])])
