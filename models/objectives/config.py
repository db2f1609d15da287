"""What an encoder can learn from, as typed configs without torch, and what each costs.

A new objective is a config class here, a module in `models/objectives`, and its `case` in `models/build`.
"""

import math
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, model_validator

from models.encoders.config import EncoderConfig
from models.encoders.head_config import HeadConfig, LinearHeadConfig
from models.encoders.size import encoder_macs, encoder_parameters, encoder_tokens
from models.encoders.timm_config import TimmEncoderConfig
from models.masked.counts import patches_of_share
from models.masked.decoder_config import DecoderConfig
from models.masked.predictor_size import predictor_macs, predictor_parameters
from models.schema import (
    NOT_A_SWITCH,
    Config,
    CountOrZero,
    Fraction,
    Number,
    Positive,
    Rate,
    Share,
    Size,
    Text,
)

BALANCED_IMAGES = 1024  # fewer in one forward of capi are few
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
    fixed: int = 0  # parameters beside the encoder that nobody trains: tables of positions


class _Objective(Config):
    """What the stages ask of every objective's config."""

    reads_labels: ClassVar[bool] = False
    """Whether every sample must have a label, and whether there is an accuracy."""
    other_networks: ClassVar[Literal["none", "swin", "any"]] = "none"
    """Which networks of timm that are no plain ViT can learn by it."""
    shows_some_patches: ClassVar[bool] = False
    """Whether the encoder sees some patches of each image alone."""
    averages_teacher: ClassVar[bool] = False
    """Whether its teacher is the moving average of the weights, which the run then keeps at the module's momentum."""

    def problem(self, encoder: EncoderConfig, zero_stage: int) -> str | None:
        """Why it cannot train this encoder at this stage, in one line that names the key; None where it can."""
        return None

    def caution(self, images_per_forward: int) -> str | None:
        """What a person should know of so many images at a time on all ranks, in one line; None where nothing."""
        return None

    def size(self, encoder: EncoderConfig, num_classes: int) -> ObjectiveSize:
        raise NotImplementedError


class SupervisedConfig(_Objective):
    """Predict the label of an image by cross-entropy."""

    reads_labels: ClassVar[bool] = True
    other_networks: ClassVar[Literal["none", "swin", "any"]] = "any"
    kind: Literal["supervised"] = "supervised"
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax`: one class against all others. `sigmoid`: each class yes or no, summed over classes, as the ViT paper
    learns ImageNet-21k (arXiv:2010.11929, appendix B.1)."""
    head_bias: Number = 0.0
    """Start of the head's biases, of a sigmoid alone: about -log(classes), so that all classes begin as unlikely. -10
    for ImageNet-21k, -6.9 for ImageNet-1k (AugReg, arXiv:2106.10270)."""
    label_smoothing: Rate = 0.0
    """Share of the target spread evenly over all classes."""
    head: HeadConfig = LinearHeadConfig()
    """What says the classes: `linear`, or a probe's, `linear_batchnorm` or `attentive`, which is not registered."""

    @model_validator(mode="after")
    def _only_a_sigmoid_needs_a_bias(self) -> "SupervisedConfig":
        if self.head_bias and self.loss != "sigmoid":
            raise ValueError(f"head_bias {self.head_bias:g} needs loss: sigmoid; a softmax is blind to it")
        return self

    def problem(self, encoder: EncoderConfig | TimmEncoderConfig, zero_stage: int) -> str | None:
        return self.head.problem(encoder)

    def size(self, encoder: EncoderConfig, num_classes: int) -> ObjectiveSize:
        heads = 1 + encoder.distillation_token
        return ObjectiveSize(
            encoder_parameters(encoder) + heads * num_classes * (encoder.embed_dim + 1) + self.head.parameters(encoder),
            encoder_macs(encoder) + heads * num_classes * encoder.embed_dim + self.head.macs(encoder),
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
        if patches_of_share(encoder.num_patches, self.mask_ratio) < 1:
            return f"objective.mask_ratio {self.mask_ratio} hides none of {encoder.num_patches} patches; raise it"
        return None

    def size(self, encoder: EncoderConfig, num_classes: int) -> ObjectiveSize:
        patches = encoder.num_patches
        visible = patches - patches_of_share(patches, self.mask_ratio)
        entering = encoder_tokens(encoder, visible)
        return ObjectiveSize(
            encoder_parameters(encoder) + self.decoder.parameters(encoder),
            encoder_macs(encoder, visible) + self.decoder.macs(encoder, entering),
            (
                Stack(entering, encoder.embed_dim, encoder.depth),
                Stack(encoder_tokens(encoder), self.decoder.embed_dim, self.decoder.depth),
            ),
            loss_bytes=8 * patches * encoder.patch_size**2 * encoder.channels,  # error and its weight, in fp32
            fixed=(patches + encoder.num_prefix_tokens) * self.decoder.embed_dim,
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
            return (
                f"objective.corrupted_ratio {self.corrupted_ratio} corrupts none of {encoder.num_patches} patches; "
                "raise it"
            )
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
        return patches_of_share(num_patches, self.corrupted_ratio)

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

    other_networks: ClassVar[Literal["none", "swin", "any"]] = "swin"
    kind: Literal["simmim"] = "simmim"
    mask_ratio: Annotated[float, Field(gt=0, lt=1), NOT_A_SWITCH] = 0.6
    """Share of the squares hidden from the encoder, rounded up to whole squares."""
    mask_size: Size = 32
    """Side of a square that is hidden whole, pixels: a multiple of the patch, of a Swin of what a token of its last
    stage stands for, 32; a divisor of the sides of the input."""

    def problem(self, encoder: EncoderConfig | TimmEncoderConfig, zero_stage: int) -> str | None:
        if isinstance(encoder, TimmEncoderConfig):
            cell = encoder.swin_cell_size
            said = f"the {cell} pixels that are a side of a token of {encoder.name}'s last stage"
        else:
            cell, said = encoder.patch_size, f"encoder.patch_size {encoder.patch_size}"
        if self.mask_size % cell or any(side % self.mask_size for side in encoder.input_size):
            return (
                f"objective.mask_size {self.mask_size} must be a multiple of {said} and a divisor of both sides "
                f"of encoder.image_size {encoder.image_size}"
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


class CapiConfig(_Objective):
    """CAPI (arXiv:2502.08769): predict the clusters that a teacher's latents of hidden patches belong to."""

    averages_teacher: ClassVar[bool] = True
    shows_some_patches: ClassVar[bool] = True
    kind: Literal["capi"] = "capi"
    mask_ratio: Annotated[float, Field(gt=0, lt=1), NOT_A_SWITCH] = 0.65
    """Share of the patches hidden from the student: all but one rectangle."""
    predicted_share: Share = 0.05
    """Share of the hidden patches that are predicted, at least one."""
    num_prototypes: Size = 16384
    """Clusters."""
    predictor_depth: Size = 12
    """Blocks of the predictor, as wide as the encoder's."""
    predictor_drop_path: Rate = 0.0
    """Stochastic depth of every block of the predictor. 0 is off."""
    sinkhorn_iterations: Annotated[int, Field(strict=True, ge=1, le=1000)] = 3
    """Rounds of balancing the assignments."""
    target_temperature: Positive = 0.06
    """Of the scores that become assignments."""
    clustering_temperature: Positive = 0.12
    """Of the scores that the clustering head learns by."""
    student_temperature: Positive = 0.12
    """Of the student's scores."""
    teacher_momentum: Fraction = 0.999
    """What the teacher keeps of itself in a step at the end of warm-up; it begins at 1 and goes back to it after."""
    momentum_cosine_share: Share = 0.8
    """How much of its cosine the momentum goes through: 1 ends at a momentum of 1."""
    clustering_learning_rate: Positive = 0.5
    """Of the clustering head, as a multiple of the learning rate."""
    clustering_weight_decay: Fraction = 0.1
    """Of the clustering head with its bias, as a multiple of the weight decay: AdamW's own 0.01 where that is 0.1."""
    patch_embedding_learning_rate: Positive = 0.2
    """Of the patch embedding, as a multiple of the learning rate."""
    norm_weight_decay: Fraction = 0.1
    """Of the norms' weights, as a multiple of the weight decay."""

    def num_predicted(self, num_patches: int) -> int:
        return max(1, patches_of_share(patches_of_share(num_patches, self.mask_ratio), self.predicted_share))

    def problem(self, encoder: EncoderConfig, zero_stage: int) -> str | None:
        if zero_stage == 3:
            return "zero.stage 3 cuts the average that is capi's teacher into parts; set zero.stage to 0, 1 or 2"
        if patches_of_share(encoder.num_patches, self.mask_ratio) < 1:
            return f"objective.mask_ratio {self.mask_ratio} hides none of {encoder.num_patches} patches; raise it"
        if encoder.embed_dim % 4:
            return f"objective.kind capi has sine-cosine positions: 4 must divide embed_dim {encoder.embed_dim}"
        return None

    def caution(self, images_per_forward: int) -> str | None:
        if images_per_forward >= BALANCED_IMAGES:
            return None
        return (
            f"capi balances its clusters over the images of one forward on all ranks; {images_per_forward:,} are few "
            "(published: 16,384): raise micro_batch_size, with activation_checkpointing where memory is short. Results "
            "depend on micro_batch_size x ranks: keep it when the number of ranks changes"
        )

    def size(self, encoder: EncoderConfig, num_classes: int) -> ObjectiveSize:
        patches, width = encoder.num_patches, encoder.embed_dim
        visible, predicted = patches - patches_of_share(patches, self.mask_ratio), self.num_predicted(patches)
        context, of_head = encoder_tokens(encoder, visible), width * self.num_prototypes
        # Nothing flows back through the clustering head, so its backward is half as much as others'.
        clustering = patches * of_head
        return ObjectiveSize(
            encoder_parameters(encoder)
            + predictor_parameters(self.predictor_depth, encoder)
            + 2 * (of_head + self.num_prototypes),
            encoder_macs(encoder, visible)
            + predictor_macs(self.predictor_depth, encoder, context, predicted)
            + predicted * of_head
            + clustering / 2,
            (
                Stack(context, width, encoder.depth),
                Stack(predicted + -(-context // 8), width, self.predictor_depth),  # of the context, keys and values
            ),
            loss_bytes=16 * (patches + predicted) * self.num_prototypes,  # scores, assignments and logarithms, in fp32
            teacher_parameters=encoder_parameters(encoder),
            teacher_macs=encoder_macs(encoder) + clustering / 2,
            fixed=patches * width,
        )


class DistillConfig(_Objective):
    """Distillation: learn from what a trained network says of an image, and from its label (arXiv:2012.12877)."""

    kind: Literal["distill"] = "distill"
    teacher: Text
    """A MODEL with a head: a run, `models:/...`, `timm:NAME` of any architecture, or a directory in timm's layout."""
    distillation: Literal["hard", "soft"] = "hard"
    """`hard`: the teacher's first choice is the label. `soft`: its probabilities at a temperature are."""
    temperature: Positive = 3.0
    """Of soft distillation, of both networks; its loss is scaled by the square."""
    label_weight: Rate = 0.5
    """Weight of the labels' loss; the teacher's has the rest. DeiT: 0.5 of hard, 0.9 of soft. At 0 no labels are read,
    the head learns the teacher's classes, and what is registered has none."""
    label_smoothing: Rate = 0.0
    """Share of a label's target spread evenly over all classes."""
    teacher_encoder: EncoderConfig | None = None
    """The teacher's network, for the plan's arithmetic; filled in where it is one of these."""
    teacher_classes: CountOrZero = 0
    """How many classes the teacher knows; filled in where its files say so."""

    @property
    def reads_labels(self) -> bool:
        return self.label_weight > 0

    def problem(self, encoder: EncoderConfig, zero_stage: int) -> str | None:
        if encoder.distillation_token and not self.reads_labels:
            return (
                "objective.label_weight 0 leaves the class token's head nothing to learn beside "
                "encoder.distillation_token; leave the token out"
            )
        return None

    def size(self, encoder: EncoderConfig, num_classes: int) -> ObjectiveSize:
        classes = num_classes if self.reads_labels else self.teacher_classes
        student, teacher = SupervisedConfig().size(encoder, classes), self.teacher_encoder
        if teacher is None:
            return student
        of_teacher = SupervisedConfig().size(teacher, self.teacher_classes)
        return student._replace(teacher_parameters=of_teacher.parameters, teacher_macs=of_teacher.macs)


ObjectiveConfig = Annotated[
    SupervisedConfig | MaskedAutoencoderConfig | PatchColourConfig | SimMIMConfig | CapiConfig | DistillConfig,
    Field(discriminator="kind"),
]


def _learned_by(raw: Any) -> Any:
    return raw.get("kind", "supervised") if isinstance(raw, dict) else getattr(raw, "kind", None)


FinetuneObjective = Annotated[
    Annotated[SupervisedConfig, Tag("supervised")] | Annotated[DistillConfig, Tag("distill")],
    Discriminator(_learned_by),
]
"""What fine-tuning learns by: labels, with a teacher or without."""
