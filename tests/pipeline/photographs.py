"""The two photographs that scikit-learn ships, as files of the formats that datasets hold."""

import io
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


@cache
def photographs() -> tuple[Image.Image, ...]:
    """Two RGB photographs of 640 x 427 pixels, and one of them upright."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return *photos, photos[1].rotate(90, expand=True)


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def saved_array(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def noise_ratio(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images, dB."""
    error = np.square(one.astype(np.float64) - other).mean()
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)
