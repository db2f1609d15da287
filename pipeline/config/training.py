"""Typed configs of pretraining and fine-tuning: what to train. Where it runs stands in a profile, never here."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from models.config import EncoderConfig, ObjectiveConfig, SupervisedConfig
from pipeline.config.base import Config, Count, CountOrZero, Fraction

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
LENGTH_UNITS = ("epochs", "steps", "samples")


class Source(Config):
    """One dataset directory of the training data."""

    path: str
    """The dataset directory, absolute."""
    weight: Positive = 1.0
    """How often its samples are drawn, relative to the other sources' weights."""
    window_shards: Count | None = None
    """As `data.window_shards`, for this source. None: `data.window_shards`."""


class DataConfig(Config):
    """Which samples are read, and in which order."""

    sources: tuple[Source, ...] = ()
    """Dataset directories; `--data` fills this in. Several are mixed by weight."""
    split: str = "train"
    """The split that is trained on."""
    label_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each class's samples that is used, chosen by the samples' keys: 0.1 trains on a tenth. 1 is all."""
    lanes: Count | None = None
    """Parallel reading lanes, a divisor of global_batch_size, fixed per run. None: the largest divisor up to 64."""
    window_shards: Count | None = None
    """Samples are shuffled within windows of this many consecutive shards of a lane. None: about 1 GiB of shards."""
    mean: tuple[float, ...] | None = None
    """Per channel, subtracted from pixels in 0..1. None: the started-from model's if it says, or the dataset's."""
    std: tuple[float, ...] | None = None
    """Per channel, what pixels are divided by. None: as for `mean`."""
    evaluation_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Side of the centre crop as a share of the resized image in evaluation (timm's crop_pct); kept with the model."""
    evaluation_crop_mode: Literal["center", "squash", "border"] = "center"
    """How an image becomes that square (timm's crop_mode): `center` fits the shorter side and cuts the longer, `squash`
    fits both sides and distorts, `border` fits the longer side and pads with the mean colour; kept with the model."""
    verify: Literal["sampled", "full"] = "sampled"
    """Which samples' bytes are held against their checksum: one in 16, or all. Their sizes always are."""
    max_damaged: CountOrZero = 0
    """Samples that may prove damaged in the whole run; the next of the shard stands in for each. One more stops it."""
    skipped: tuple[tuple[CountOrZero, Count], ...] = ()
    """Ranges [from, to) of positions that are passed over, whole global batches to keep reading local."""
    record: bool = False
    """Write the step, position and key of every sample consumed to `samples/rank-*.tsv`."""

    @field_validator("skipped", mode="before")
    @classmethod
    def _looks_like_ranges(cls, ranges: Any) -> Any:
        pairs = isinstance(ranges, list | tuple) and all(isinstance(r, list | tuple) and len(r) == 2 for r in ranges)
        if not pairs:
            raise ValueError("expected ranges of positions, [[from, to], ...]")
        return ranges

    @field_validator("skipped")
    @classmethod
    def _are_ranges(cls, ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        for start, end in ranges:
            if start >= end:
                raise ValueError(f"[{start}, {end}) is no range of positions")
        return ranges


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
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
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
    affine_scale: Fraction = 0.0
    """Largest change of size: 0.1 draws from 0.9 to 1.1. 0 is off."""
    three_augment: bool = False
    """One of grey, solarised or blurred, each as likely (DeiT III, arXiv:2204.07118)."""
    rand_augment_layers: CountOrZero = 0
    """Operations per image of RandAugment (arXiv:1909.13719), timm's increasing set. 0 is off."""
    rand_augment_magnitude: Annotated[float, Field(ge=0, le=30)] = 0.0
    """Strength of each operation, on RandAugment's scale of 0 to 10 (30 at most)."""
    rand_augment_deviation: NonNegative = 0.0
    """Standard deviation of the strength, drawn per operation."""
    jitter_brightness: NonNegative = 0.0
    """Colour jitter: 0.3 multiplies the brightness by a factor from 0.7 to 1.3. 0 is off."""
    jitter_contrast: NonNegative = 0.0
    """The same of the contrast. 0 is off."""
    jitter_saturation: NonNegative = 0.0
    """The same of the saturation. 0 is off."""
    jitter_hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest turn of the hue, as a share of the colour circle. 0 is off."""
    erase_probability: Fraction = 0.0
    """Share of the images that get a rectangle of noise in place of pixels (random erasing, arXiv:1708.04896)."""
    erase_area: tuple[Fraction, Fraction] = (0.02, 1 / 3)
    """Area of the erased rectangle as a share of the input."""
    erase_ratio: tuple[Positive, Positive] = (0.3, 10 / 3)
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


class OptimizerConfig(Config):
    """AdamW (arXiv:1711.05101) with its learning-rate schedule, a pure function of samples seen."""

    learning_rate: Positive
    """At the end of warm-up; absolute, never scaled by the batch."""
    end_learning_rate: NonNegative = 0.0
    """At the last step."""
    warmup: NonNegative = 0.0
    """Linear warm-up from zero, in the unit of the run's length (epochs, steps or samples)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.05
    """Decoupled, on matrices only: norms, biases, tokens and positions are left alone."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning-rate factor from each block to the one below it. 1 is off."""
    max_grad_norm: NonNegative = 0.0
    """Clip the gradient's global norm to this. 0 is off, written as such (DeepSpeed's own default clips at 1)."""


class ZeroConfig(Config):
    """DeepSpeed ZeRO (arXiv:1910.02054)."""

    stage: Annotated[int, Field(strict=True, ge=0, le=3)]
    """0: plain data parallel without DeepSpeed. 1: optimizer states sharded. 2: gradients too. 3: parameters too."""


class CheckpointConfig(Config):
    """When the training state is saved. The last step is always saved, and a stop on request."""

    every_steps: Count = 1000
    """Steps between checkpoints."""
    keep: Count = 2
    """Newest checkpoints that stay on disk."""


class TrainingConfig(Config):
    """What pretraining and fine-tuning share: one loop runs both."""

    encoder: EncoderConfig
    """The network."""
    data: DataConfig = DataConfig()
    """The samples."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """From image to input."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    zero: ZeroConfig
    """How the training state is spread over ranks."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the state is saved."""
    global_batch_size: Count
    """Images per optimizer step, over all ranks."""
    micro_batch_size: Count
    """Images per rank per forward; accumulation is derived from it and the world size."""
    epochs: Positive | None = None
    """Length of the run in passes over the training samples; exactly one of epochs, steps, samples."""
    steps: Count | None = None
    """Length of the run in optimizer steps."""
    samples: Count | None = None
    """Length of the run in images seen."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute precision on an accelerator, over fp32 master weights; a processor without one computes in fp32."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Exponential moving average of the weights, per step; what is evaluated and registered. 0 is off."""
    seed: CountOrZero = 0
    """Of initial weights, sample order, augmentation and masks."""
    log_every_steps: Count = 10
    """Steps between progress lines; the ledger holds every step."""

    @property
    def length(self) -> tuple[str, float]:
        """(unit, amount) of the run's length."""
        return next((unit, getattr(self, unit)) for unit in LENGTH_UNITS if getattr(self, unit) is not None)

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        given = [unit for unit in LENGTH_UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of epochs, steps, samples sets the length; given: {given or 'none'}")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "TrainingConfig":
        lanes = self.data.lanes
        if lanes and self.global_batch_size % lanes:
            raise ValueError(f"data.lanes {lanes} does not divide global_batch_size {self.global_batch_size}")
        if self.augmentation.mixes and self.micro_batch_size % 2:
            raise ValueError(f"Mixup and CutMix mix pairs: micro_batch_size {self.micro_batch_size} must be even")
        return self

    @model_validator(mode="after")
    def _colours_are_there(self) -> "TrainingConfig":
        if self.encoder.channels != 3 and (keys := self.augmentation.colour_keys):
            raise ValueError(
                f"augmentation.{', '.join(keys)}: needs red, green and blue, and encoder.channels is "
                f"{self.encoder.channels}; turn it off"
            )
        return self


class PretrainConfig(TrainingConfig):
    """Pretraining: an encoder learns from images, with labels or without."""

    stage: Literal["pretrain"] = "pretrain"
    objective: ObjectiveConfig
    """What the encoder learns from."""
    initialise_from: str | None = None
    """A MODEL whose weights the encoder starts from. None: random weights."""

    @model_validator(mode="after")
    def _something_is_hidden(self) -> "PretrainConfig":
        patches = self.encoder.num_patches
        if self.objective.kind == "mae" and int(patches * self.objective.mask_ratio) < 1:
            raise ValueError(f"objective.mask_ratio {self.objective.mask_ratio} hides none of {patches} patches")
        return self


class FinetuneConfig(TrainingConfig):
    """Fine-tuning: a pretrained encoder with a fresh head learns the labels of a downstream dataset."""

    stage: Literal["finetune"] = "finetune"
    objective: SupervisedConfig = SupervisedConfig()
    """Always supervised."""
    initialise_from: str
    """The MODEL that is fine-tuned."""
