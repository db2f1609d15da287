"""How a training image becomes a training input."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.schema import NOT_A_SWITCH, Config, Fraction, NonNegative, Rate

Ratio = Annotated[float, Field(ge=0.01, le=100), NOT_A_SWITCH]


class AugmentationConfig(Config):
    """How a training image becomes a training input, in the order of the keys.

    Every draw derives from (seed, position). All of it happens on the processor but erasing, Mixup and CutMix, which
    work on normalised batches on the device.
    """

    crop: Literal["inception", "simple", "whole", "letterbox"] = "inception"
    """`inception`: a random box of random area and ratio, resized (arXiv:1409.4842). `simple`: the image resized to
    cover the input, padded by 4 pixels in reflection, cropped at random (DeiT III, arXiv:2204.07118). `whole`: all of
    the image, its ratio lost. `letterbox`: all of the image, its ratio kept, centred on the mean colour."""
    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Area of the `inception` crop as a share of the image."""
    crop_ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    """Aspect ratio of the `inception` crop, width by height."""
    region_decode: bool = False
    """Decode no more of a JPEG than its `inception` crop; needs TurboJPEG 3, found by the system or at
    $VIT_TURBOJPEG."""
    flip: bool = True
    """Mirror left and right with probability one half."""
    affine_degrees: NonNegative = 0.0
    """Largest rotation, degrees either way. 0 is off."""
    affine_shift: Fraction = 0.0
    """Largest shift, as a share of the side. 0 is off."""
    affine_scale: Rate = 0.0
    """Largest change of size: 0.1 draws from 0.9 to 1.1. 0 is off."""
    three_augment: bool = False
    """One of grey, solarised or blurred, each as likely (DeiT III, arXiv:2204.07118)."""
    rand_augment_layers: Annotated[int, Field(strict=True, ge=0, le=100)] = 0
    """Operations per image of RandAugment (arXiv:1909.13719), timm's increasing set. 0 is off."""
    rand_augment_magnitude: Annotated[float, Field(ge=0, le=10), NOT_A_SWITCH] = 0.0
    """Strength of each operation, on timm's scale of 0 to 10."""
    rand_augment_deviation: NonNegative = 0.0
    """Standard deviation of the strength, drawn per operation."""
    jitter_brightness: NonNegative = 0.0
    """Colour jitter: 0.3 multiplies the brightness by a factor from 0.7 to 1.3. 0 is off."""
    jitter_contrast: NonNegative = 0.0
    """The same of the contrast. 0 is off."""
    jitter_saturation: NonNegative = 0.0
    """The same of the saturation. 0 is off."""
    jitter_hue: Annotated[float, Field(ge=0, le=0.5), NOT_A_SWITCH] = 0.0
    """Largest turn of the hue, as a share of the colour circle. 0 is off."""
    erase_probability: Fraction = 0.0
    """Share of the images that get a rectangle of noise in place of pixels (random erasing, arXiv:1708.04896)."""
    erase_area: tuple[Fraction, Fraction] = (0.02, 1 / 3)
    """Area of the erased rectangle as a share of the input."""
    erase_ratio: tuple[Ratio, Ratio] = (0.3, 10 / 3)
    """Aspect ratio of the erased rectangle, height by width."""
    mixup_alpha: NonNegative = 0.0
    """Beta(alpha, alpha) of Mixup (arXiv:1710.09412), drawn per pair of neighbouring positions. 0 is off."""
    cutmix_alpha: NonNegative = 0.0
    """Beta(alpha, alpha) of CutMix (arXiv:1905.04899); with Mixup on too, each pair tosses a coin. 0 is off."""

    @property
    def moves(self) -> bool:
        return self.affine_degrees > 0 or self.affine_shift > 0 or self.affine_scale > 0

    @property
    def jitters(self) -> bool:
        return max(self.jitter_brightness, self.jitter_contrast, self.jitter_saturation, self.jitter_hue) > 0

    @property
    def recolours(self) -> bool:
        return self.three_augment or self.rand_augment_layers > 0 or self.jitters

    @property
    def mixes(self) -> bool:
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def colour_keys(self) -> list[str]:
        """The keys in use that only make sense for red, green and blue."""
        used = [key for key in ("three_augment", "rand_augment_layers") if getattr(self, key)]
        return used + [key for key in type(self).model_fields if key.startswith("jitter_") and getattr(self, key)]

    @model_validator(mode="after")
    def _possible(self) -> "AugmentationConfig":
        for key in ("crop_scale", "crop_ratio", "erase_area", "erase_ratio"):
            least, most = getattr(self, key)
            if least > most:
                raise ValueError(f"{key} is [least, most], and {least} is more than {most}")
        if self.crop == "inception" and self.crop_scale[0] == 1.0:
            raise ValueError("crop_scale [1, 1] leaves no box to draw; `crop: whole` takes the whole image")
        if self.region_decode and self.crop != "inception":
            raise ValueError(f"region_decode decodes the box of an inception crop, and crop is {self.crop}")
        return self
