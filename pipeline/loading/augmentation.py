"""From the bytes of an image to a uint8 array, every random draw from the sample's own generator.

Pillow throughout: any format it opens, and the reference for quicker decoders.
"""

import io
import math
import random

import numpy as np
from PIL import Image

from pipeline.config.training import AugmentationConfig

_FILL = (124, 116, 104)  # what rotations and shifts uncover: ImageNet's mean colour


def decode_image(image_bytes: bytes, channels: int) -> Image.Image:
    """The image upright in its stored order, as RGB for three channels, grey for one."""
    image = Image.open(io.BytesIO(image_bytes))
    mode = {1: "L", 3: "RGB"}[channels]
    return image if image.mode == mode else image.convert(mode)


def crop_box(generator: np.random.Generator, size: tuple[int, int], config: AugmentationConfig) -> tuple[float, ...]:
    """Left, top, right, bottom of an Inception crop (arXiv:1409.4842, section 6): area and log-ratio uniform.

    After ten misses the largest centred box within the ratio bounds is taken.
    """
    width, height = size
    low, high = (math.log(bound) for bound in config.crop_ratio)
    for _ in range(10):
        area = width * height * generator.uniform(*config.crop_scale)
        ratio = math.exp(generator.uniform(low, high))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(generator.integers(0, width - crop_width + 1))
            top = int(generator.integers(0, height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    ratio = min(max(width / height, config.crop_ratio[0]), config.crop_ratio[1])
    crop_width, crop_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def augment(image: Image.Image, size: int, config: AugmentationConfig, generator: np.random.Generator) -> np.ndarray:
    """A training input: (size, size, C) uint8."""
    box = (0, 0, *image.size) if config.crop_scale == (1.0, 1.0) else crop_box(generator, image.size, config)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if config.flip and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.affine_degrees or config.affine_shift or config.affine_scale:
        image = _affine(image, config, generator)
    if config.rand_augment_layers:
        image = _rand_augment(image, config, generator)
    return to_array(image)


def evaluation_view(image: Image.Image, size: int, crop: float) -> np.ndarray:
    """An evaluation input: the shorter side resized to size / crop, then the centre, (size, size, C) uint8.

    Rounded as timm's evaluation transform rounds, so that a registered model serves the pixels it was scored on.
    """
    shorter, least = math.floor(size / crop), min(image.size)
    resized = tuple(shorter if side == least else int(shorter * side / least) for side in image.size)
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (int(round((side - size) / 2)) for side in resized)
    return to_array(image.crop((left, top, left + size, top + size)))


def to_array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image, dtype=np.uint8)
    return array if array.ndim == 3 else array[:, :, None]


def _affine(image: Image.Image, config: AugmentationConfig, generator: np.random.Generator) -> Image.Image:
    """Rotation, scale and shift about the centre; what they uncover takes the colour of the image's corner."""
    width, height = image.size
    angle = math.radians(generator.uniform(-1, 1) * config.affine_degrees)
    scale = 1 + generator.uniform(-1, 1) * config.affine_scale
    shift_x, shift_y = (generator.uniform(-1, 1) * config.affine_shift * side for side in (width, height))
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    centre_x, centre_y = width / 2, height / 2
    matrix = (
        cosine, sine, centre_x - cosine * (centre_x + shift_x) - sine * (centre_y + shift_y),
        -sine, cosine, centre_y + sine * (centre_x + shift_x) - cosine * (centre_y + shift_y),
    )  # fmt: skip
    corner = image.getpixel((0, 0))
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=corner)


def _rand_augment(image: Image.Image, config: AugmentationConfig, generator: np.random.Generator) -> Image.Image:
    """timm's RandAugment; it draws from the global generators, which are seeded from ours and put back."""
    from timm.data.auto_augment import rand_augment_transform

    policy = f"rand-m{config.rand_augment_magnitude:g}-n{config.rand_augment_layers}-inc1"
    if config.rand_augment_deviation:
        policy += f"-mstd{config.rand_augment_deviation:g}"
    transform = rand_augment_transform(policy, {"img_mean": _FILL, "translate_const": int(min(image.size) * 0.45)})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        random.seed(int(generator.integers(1 << 62)))
        np.random.seed(int(generator.integers(1 << 32)))
        return transform(image)
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def training_view(
    content: bytes, extension: str, out: np.ndarray, config: AugmentationConfig, generator: np.random.Generator
) -> None:
    out[:] = augment(decode_image(content, out.shape[-1]), out.shape[0], config, generator)
