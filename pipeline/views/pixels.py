"""From the bytes of a sample to its pixels, (H, W, C), and from pixels to an input's size.

A JPEG goes through simplejpeg into a buffer that the thread keeps: 0.73 ms for 500 x 375 pixels of 65 kB, and up to
1.03 ms into fresh memory, whose pages the kernel must clear. It is bit for bit what Pillow decodes. Pillow takes all
other formats, and every JPEG that is not plain; tifffile a TIFF whose channels are neither grey nor RGB.

What a batch holds: uint8 where the samples are uint8; float32 where they are uint16 (scaled to 0..1) or float32 (as
they are, like the dataset's statistics). A uint8 image in a float32 batch is scaled to 0..1.
"""

import io
import threading

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from pipeline.shards.decoding import FORMATS, TIFF_SIGNATURES, ImageFault, open_array, open_tiff_array

JPEG_SIGNATURE = b"\xff\xd8"
KEPT_BYTES = 32 << 20  # a larger decoded image gets memory of its own

# What `torch.nn.functional.interpolate` calls; only the operator itself writes into memory that is already there.
_resize_bicubic = torch.ops.aten._upsample_bicubic2d_aa.out


class _Kept(threading.local):
    buffer = np.empty(0, np.uint8)


_kept = _Kept()


def decode_pixels(content: bytes, extension: str, channels: int) -> np.ndarray:
    """(H, W, channels) of uint8, uint16 or float32; good until the thread's next call.

    Raises ImageFault where the bytes cannot be decoded, or hold another number of channels. Three channels are red,
    green and blue and one is grey, converted if need be; any other number is taken as it lies in the file.
    """
    if extension == "npy":
        return _require_channels(open_array(content), channels)
    if channels == 3 and content.startswith(JPEG_SIGNATURE):
        try:
            height, width = jpeg_size(content)
            return simplejpeg.decode_jpeg(content, buffer=scratch(height, width, 3))
        except ValueError:  # CMYK, twelve bits, damage: Pillow knows more, or says what is wrong
            pass
    if channels not in (1, 3) and content.startswith(TIFF_SIGNATURES):
        try:
            return _require_channels(open_tiff_array(content), channels)
        except ImageFault:  # a compression that tifffile lacks: Pillow may have it, or says what is wrong
            pass
    return _require_channels(_pillow_pixels(content, channels), channels)


def jpeg_size(content: bytes) -> tuple[int, int]:
    """(height, width) of a JPEG; ValueError where it is not plain, ImageFault where it is far too large."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    if colours in ("CMYK", "YCCK"):
        raise ValueError(f"{colours} becomes RGB by guesswork; Pillow's is the reference")
    if height * width > Image.MAX_IMAGE_PIXELS:
        raise ImageFault("too_many_pixels", f"{width} x {height}")
    return height, width


def scratch(height: int, width: int, channels: int) -> np.ndarray:
    """(height, width, channels) uint8 of the thread's buffer, overwritten by its next decode."""
    size = height * width * channels
    if size > KEPT_BYTES:
        return np.empty((height, width, channels), np.uint8)
    if size > len(_kept.buffer):
        _kept.buffer = np.empty(size, np.uint8)
    return _kept.buffer[:size].reshape(height, width, channels)


def view_dtype(content: bytes, extension: str, channels: int) -> np.dtype:
    """What a batch holds whose samples are like this one, uint8 or float32; the module says when which."""
    return np.dtype(np.uint8 if decode_pixels(content, extension, channels).dtype == np.uint8 else np.float32)


def resize_into(pixels: np.ndarray, out: np.ndarray) -> None:
    """Resize bicubically with antialias, Pillow's filter, and write the result into `out`.

    Raises ImageFault where `out` is uint8 and the pixels are deeper.

    Shape:
        pixels: (h, w, C) uint8, uint16 or float32
        out: (H, W, C) uint8 or float32, contiguous
    """
    if pixels.dtype == out.dtype == np.uint8:
        if pixels.shape == out.shape:
            out[...] = pixels
            return
        _resize_bicubic(_channels_first(pixels), list(out.shape[:2]), False, None, None, out=_channels_first(out))
        return
    values = unit_values(pixels, out.dtype)
    if values.shape != out.shape:
        resized = torch.nn.functional.interpolate(
            _channels_first(values), size=out.shape[:2], mode="bicubic", antialias=True
        )
        if pixels.dtype.kind == "u":
            resized.clamp_(0, 1)  # the filter overshoots at edges; integers are cut there too
        values = resized[0].permute(1, 2, 0).numpy()
    out[...] = values


def unit_values(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The pixels as a float32 batch holds them; ImageFault where the batch is not float32."""
    if dtype != np.float32:
        raise ImageFault(
            "unsupported_mode",
            f"holds {pixels.dtype} in a dataset whose first sample is 8 bit; keep images of one depth in a dataset",
        )
    if pixels.dtype.kind == "f":
        return pixels
    return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)


def flip(out: np.ndarray) -> None:
    """Mirror an (H, W, C) array left and right, in place."""
    view = _channels_first(out)
    view.copy_(view.flip(-1))  # 18 us at 224 pixels; numpy needs 170, three bytes at a time


def _channels_first(array: np.ndarray) -> Tensor:
    """(1, C, H, W) over the memory of an (H, W, C) array."""
    return torch.from_numpy(array).permute(2, 0, 1).unsqueeze(0)


def _pillow_pixels(content: bytes, channels: int) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        image.load()
        if image.mode == "F":
            return np.array(image)
        if image.mode == "I" or image.mode.startswith("I;16"):
            return _sixteen_bit(np.array(image), channels)
        mode = {1: "L", 3: "RGB"}.get(channels)
        if mode is None and image.mode in ("P", "PA", "1"):
            mode = "RGBA" if channels == 4 else "RGB"
        return np.array(image if mode in (None, image.mode) else image.convert(mode))
    except ImageFault:
        raise
    except Exception as fault:  # decoders raise whatever a damaged file leads them to
        raise ImageFault("broken_image", " ".join(str(fault).split())[:200] or type(fault).__name__) from None


def _sixteen_bit(values: np.ndarray, channels: int) -> np.ndarray:
    """Grey of 16 bits as it is; as 8-bit red, green and blue where those are asked for, rounded as in ingestion."""
    if values.min() < 0 or values.max() > 65535:
        raise ImageFault("unsupported_mode", "grey values beyond 16 bit")
    if channels != 3:
        return values.astype(np.uint16)
    grey = ((values.astype(np.int64) + 128) // 257).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _require_channels(array: np.ndarray, channels: int) -> np.ndarray:
    array = array if array.ndim == 3 else array[:, :, None]
    if array.shape[2] != channels:
        raise ImageFault("unsupported_mode", f"holds {array.shape[2]} channels, and encoder.channels is {channels}")
    return array
