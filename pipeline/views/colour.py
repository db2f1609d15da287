"""Changes of colour of an 8-bit RGB training input, in Pillow, each drawn from the sample's own generator."""

import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pipeline.config.augmentation import AugmentationConfig
from pipeline.shards.decoding import ImageFault

_FILL = (124, 116, 104)  # what RandAugment's rotations and shifts uncover: ImageNet's mean colour
_ENHANCERS = {
    "jitter_brightness": ImageEnhance.Brightness,
    "jitter_contrast": ImageEnhance.Contrast,
    "jitter_saturation": ImageEnhance.Color,
}


def recolour(out: np.ndarray, config: AugmentationConfig, generator: np.random.Generator) -> None:
    """Apply what the config asks for to an (H, W, 3) uint8 array, in place."""
    if out.dtype != np.uint8:
        raise ImageFault("unsupported_mode", f"{', '.join(config.colour_keys)} need 8-bit images; turn them off")
    image = Image.fromarray(out)
    if config.three_augment:
        image = three_augment(image, generator)
    if config.rand_augment_layers:
        image = rand_augment(image, config, generator)
    if config.jitters:
        image = colour_jitter(image, config, generator)
    out[...] = np.asarray(image)


def three_augment(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """One of grey, solarised and blurred by a radius from 0.1 to 2 pixels (DeiT III, arXiv:2204.07118, section 3)."""
    match int(generator.random() * 3):
        case 0:
            return image.convert("L").convert("RGB")
        case 1:
            return ImageOps.solarize(image, threshold=128)
        case _:
            return image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * generator.random()))


def colour_jitter(image: Image.Image, config: AugmentationConfig, generator: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue by factors drawn evenly about 1, in an order drawn too."""
    factors = [(key, getattr(config, key), 2 * generator.random() - 1) for key in (*_ENHANCERS, "jitter_hue")]
    for place in generator.permutation(len(factors)):
        key, strength, draw = factors[place]
        if strength and key == "jitter_hue":
            image = turn_hue(image, strength * draw)
        elif strength:
            image = _ENHANCERS[key](image).enhance(max(0.0, 1 + strength * draw))
    return image


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """The hue turned by a share of the colour circle, in steps of 1/256."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(turn * 255) % 256)  # uint8 wraps around, as hues do
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def rand_augment(image: Image.Image, config: AugmentationConfig, generator: np.random.Generator) -> Image.Image:
    """timm's RandAugment; it draws from the global generators, which are seeded from ours and put back."""
    transform = rand_augment_transform(
        config.rand_augment_layers,
        config.rand_augment_magnitude,
        config.rand_augment_deviation,
        int(min(image.size) * 0.45),
    )
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        random.seed(int(generator.integers(1 << 62)))
        np.random.seed(int(generator.integers(1 << 32)))
        return transform(image)
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@lru_cache(maxsize=8)
def rand_augment_transform(layers: int, magnitude: float, deviation: float, largest_shift: int):
    """timm's RandAugment of increasing operations, with our posterize."""
    from timm.data.auto_augment import RandAugment, rand_augment_choices, rand_augment_ops

    settings = {"img_mean": _FILL, "translate_const": largest_shift, "magnitude_std": deviation}
    operations = rand_augment_ops(magnitude, hparams=settings, transforms=rand_augment_choices("", increasing=True))
    for operation in operations:
        if operation.name == "PosterizeIncreasing":
            operation.aug_fn = posterize
    return RandAugment(operations, layers)


def posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """The highest bits of each channel; none is a black image, which RandAugment draws and Pillow 13 refuses."""
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)
