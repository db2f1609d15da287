"""What an encoder can learn from, as typed configs without torch, and what each costs.

A new objective is a config class here, a module in `models/objectives`, and its `case` in `models/build`.
"""

import math
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from models.decoder_config import DecoderConfig
from models.encoder_config import EncoderConfig
from models.encoder_size import encoder_macs, encoder_parameters, encoder_tokens
from models.schema import NOT_A_SWITCH, Config, Number, Rate, Size

COLOUR_LEVELS = 8  # of 3 bits


class Stack(NamedTuple):
    """Transformer blocks alike, whose activations are kept for backward."""

    tokens: int
    width: int
    depth: int


class ObjectiveSize(NamedTuple):
    """What a plan needs to know of an objective's module with its encoder. Arithmetic is of one image."""

    parameters: int  # trained and fixed; without a teacher's
    macs: float  # multiply-adds of the forward that gradients flow back through
    stacks: tuple[Stack, ...]
    loss_bytes: int = 0  # of what the loss keeps for backward
    teacher_parameters: int = 0  # of a network beside the one that learns
    teacher_macs: float = 0.0  # of its forward, which has no backward


class _Objective(Config):
    """What the stages ask of every objective's config."""

    reads_labels: ClassVar[bool] = False
    """Whether every sample must have a label, and whether there is an accuracy."""
    learns_with_any_network: ClassVar[bool] = False
    """Whether a network of timm that is no plain ViT can learn by it."""
    shows_some_patches: ClassVar[bool] = False
    """Whether the encoder sees some patches of each image alone."""
    averages_teacher: ClassVar[bool] = False
    """Whether its teacher is the moving average of the weights, which the run then keeps at the module's momentum."""

    def problem(self, encoder: EncoderConfig, zero_stage: int) -> str | None:
        """Why it cannot train this encoder at this stage, in one line that names the key; None where it can."""
        return None

    def size(self, encoder: EncoderConfig, num_classes: int) -> ObjectiveSize:
        raise NotImplementedError


class SupervisedConfig(_Objective):
    """Predict the label of an image by cross-entropy."""

    reads_labels: ClassVar[bool] = True
    learns_with_any_network: ClassVar[bool] = True
    kind: Literal["supervised"] = "supervised"
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax`: one class against all others. `sigmoid`: each class yes or no, summed over classes, as the ViT paper
    learns ImageNet-21k (arXiv:2010.11929, appendix B.1)."""
    head_bias: Number = 0.0
    """Start of the head's biases, of a sigmoid alone: about -log(classes), so that all classes begin as unlikely. -10
    for ImageNet-21k, -6.9 for ImageNet-1k (AugReg, arXiv:2106.10270)."""
    label_smoothing: Rate = 0.0
    """Share of the target spread evenly over all classes."""

    @model_validator(mode="after")
    def _only_a_sigmoid_needs_a_bias(self) -> "SupervisedConfig":
        if self.head_bias and self.loss != "sigmoid":
            raise ValueError(f"head_bias {self.head_bias:g} needs loss: sigmoid; a softmax is blind to it")
        return self

    def size(self, encoder: EncoderConfig, num_classes: int) -> ObjectiveSize:
        return ObjectiveSize(
            encoder_parameters(encoder) + num_classes * (encoder.embed_dim + 1),
            encoder_macs(encoder) + num_classes * encoder.embed_dim,
            (Stack(encoder_tokens(encoder), encoder.embed_dim, encoder.depth),),
        )


class MaskedAutoencoderConfig(_Objective):
    """Masked autoencoder (arXiv:2111.06377): the encoder sees a few patches, a decoder predicts the others' pixels."""

    shows_some_patches: ClassVar[bool] = True
    kind: Literal["mae"] = "mae"
    mask_ratio: Annotated[float, Field(gt=0, lt=1), NOT_A_SWITCH] = 0.75
    """Share of the patches hidden from the encoder."""
    sampling: Literal["random", "blocks"] = "random"
    """`random`: patches chosen one by one. `blocks`: in rectangles as BEiT does, which is worse, and wants a mask_ratio
    of 0.5 (table 1f of the paper)."""
    normalise_target: bool = True
    """Predict pixels normalised by the mean and deviation of their own patch (MAE's norm_pix_loss)."""
    decoder: DecoderConfig = DecoderConfig()
    """The decoder."""

    def problem(self, encoder: EncoderConfig, zero_stage: int) -> str | None:
        if int(encoder.num_patches * self.mask_ratio) < 1:
            return f"objective.mask_ratio {self.mask_ratio} hides none of {encoder.num_patches} patches"
        return None

    def size(self, encoder: EncoderConfig, num_classes: int) -> ObjectiveSize:
        patches = encoder.num_patches
        visible = patches - int(patches * self.mask_ratio)
        entering = encoder_tokens(encoder, visible)
        return ObjectiveSize(
            encoder_parameters(encoder) + self.decoder.parameters(encoder),
            encoder_macs(encoder, visible) + self.decoder.macs(encoder, entering),
            (
                Stack(entering, encoder.embed_dim, encoder.depth),
                Stack(encoder_tokens(encoder), self.decoder.embed_dim, self.decoder.depth),
            ),
            loss_bytes=8 * patches * encoder.patch_size**2 * encoder.channels,  # error and its weight, in fp32
        )


class PatchColourConfig(_Objective):
    """Masked patch prediction of the ViT paper (arXiv:2010.11929, appendix B.1.2): the colour of corrupted patches."""

    kind: Literal["patch_colour"] = "patch_colour"
    corrupted_ratio: Annotated[float, Field(gt=0, le=1), NOT_A_SWITCH] = 0.5
    """Share of each image's patches that is corrupted and predicted. The paper's ablation: 0.15, which is worse."""
    target: Literal["mean_colour", "colours_4x4", "pixels"] = "mean_colour"
    """`mean_colour`: the patch's mean, 3 bits per channel, one class of 512. `colours_4x4`: as many for each of the
    patch's 4 x 4 cells. `pixels`: all pixels by squared error; a little worse in the paper."""

    def problem(self, encoder: EncoderConfig, zero_stage: int) -> str | None:
        if self.num_corrupted(encoder.num_patches) < 1:
            return f"objective.corrupted_ratio {self.corrupted_ratio} corrupts none of {encoder.num_patches} patches"
        if encoder.num_patches < 2:
            return "objective.kind patch_colour puts other patches in the place of some, and the image is one patch"
        if self.target != "pixels" and encoder.channels > 3:
            return (
                f"objective.target {self.target} has 8 classes per channel multiplied, and encoder.channels is "
                f"{encoder.channels}, at most 3; say pixels"
            )
        if encoder.patch_size % self.cells:
            return (
                f"objective.target {self.target} needs an encoder.patch_size that 4 divides, not {encoder.patch_size}"
            )
        return None

    @property
    def cells(self) -> int:
        """Cells along a side of a patch whose mean colours are predicted."""
        return 4 if self.target == "colours_4x4" else 1

    def num_corrupted(self, num_patches: int) -> int:
        """Patches corrupted in every image."""
        return int(num_patches * self.corrupted_ratio)

    def outputs(self, channels: int, patch_size: int) -> int:
        """Numbers predicted for a patch."""
        return channels * patch_size**2 if self.target == "pixels" else self.cells**2 * COLOUR_LEVELS**channels

    def size(self, encoder: EncoderConfig, num_classes: int) -> ObjectiveSize:
        width, outputs = encoder.embed_dim, self.outputs(encoder.channels, encoder.patch_size)
        corrupted = self.num_corrupted(encoder.num_patches)
        return ObjectiveSize(
            encoder_parameters(encoder) + (width + 1) * outputs + width,
            encoder_macs(encoder) + corrupted * width * outputs,
            (Stack(encoder_tokens(encoder), width, encoder.depth),),
            loss_bytes=8 * corrupted * outputs,  # scores in fp32 and their log-softmax, or errors and targets
        )


class SimMIMConfig(_Objective):
    """SimMIM (arXiv:2111.09886): mask tokens enter the encoder, and one linear layer predicts the hidden pixels."""

    kind: Literal["simmim"] = "simmim"
    mask_ratio: Annotated[float, Field(gt=0, lt=1), NOT_A_SWITCH] = 0.6
    """Share of the squares hidden from the encoder, rounded up to whole squares."""
    mask_size: Size = 32
    """Side of a square that is hidden whole, pixels: a multiple of the patch, a divisor of the sides of the input."""

    def problem(self, encoder: EncoderConfig, zero_stage: int) -> str | None:
        if self.mask_size % encoder.patch_size or any(side % self.mask_size for side in encoder.input_size):
            return (
                f"objective.mask_size {self.mask_size} must be a multiple of encoder.patch_size {encoder.patch_size} "
                f"and a divisor of both sides of encoder.image_size {encoder.image_size}"
            )
        rows, columns = (side // self.mask_size for side in encoder.input_size)
        if self.num_hidden(rows * columns) == rows * columns:
            return (
                f"objective.mask_ratio {self.mask_ratio} hides all of {rows * columns} squares of {self.mask_size} "
                "pixels; lower it, or objective.mask_size"
            )
        return None

    def num_hidden(self, squares: int) -> int:
        """Squares hidden in every image."""
        return math.ceil(squares * self.mask_ratio - 1e-9)  # 0.55 of 100 is 55.000000000000007

    def size(self, encoder: EncoderConfig, num_classes: int) -> ObjectiveSize:
        width, pixels = encoder.embed_dim, encoder.patch_size**2 * encoder.channels
        return ObjectiveSize(
            encoder_parameters(encoder) + (width + 1) * pixels + width,
            encoder_macs(encoder) + encoder.num_patches * width * pixels,
            (Stack(encoder_tokens(encoder), width, encoder.depth),),
            loss_bytes=8 * encoder.num_patches * pixels,  # error and its weight, in fp32
        )


ObjectiveConfig = Annotated[
    SupervisedConfig | MaskedAutoencoderConfig | PatchColourConfig | SimMIMConfig,
    Field(discriminator="kind"),
]
