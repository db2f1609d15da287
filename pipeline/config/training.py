"""Typed configs of pretraining and fine-tuning: what to train. Where it runs stands in a profile, never here."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from models.encoders.config import EncoderConfig
from models.encoders.timm_config import AnyEncoderConfig, TimmEncoderConfig
from models.objectives.config import FinetuneObjective, ObjectiveConfig, SupervisedConfig
from models.schema import NOT_A_SWITCH, Config, Count, CountOrZero, Positive, Rate, Size, Text
from models.tuning.config import FullTuning, TuningConfig
from pipeline.config.augmentation import AugmentationConfig
from pipeline.config.checkpoint import CheckpointConfig
from pipeline.config.data import DataConfig
from pipeline.config.engine import ZeroConfig
from pipeline.config.guard import GuardConfig
from pipeline.config.health import HealthConfig
from pipeline.config.optimizer import WHOLE_TENSORS, OptimizerConfig
from pipeline.config.profiling import ProfilingConfig
from pipeline.config.validation import ValidationConfig

LENGTH_UNITS = ("epochs", "steps", "samples")


def learns_by(objective: ObjectiveConfig | type[ObjectiveConfig], encoder: EncoderConfig | TimmEncoderConfig) -> bool:
    """Whether there is a way to train such a network by the objective, whatever the settings of both."""
    others = objective.other_networks
    return not isinstance(encoder, TimmEncoderConfig) or others == "any" or (others == "swin" and encoder.is_swin)


class TrainingConfig(Config):
    """What pretraining and fine-tuning share: one loop runs both."""

    encoder: AnyEncoderConfig
    """The network."""
    data: DataConfig = DataConfig()
    """The samples."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """From image to input."""
    optimizer: OptimizerConfig
    """What changes the weights, and its schedule; AdamW unless `kind` says otherwise."""
    zero: ZeroConfig
    """How the training state is spread over ranks."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the state is saved."""
    guard: GuardConfig = GuardConfig()
    """What happens when the loss or the gradient goes bad."""
    validation: ValidationConfig = ValidationConfig()
    """When the model is scored on images that it does not learn from."""
    health: HealthConfig = HealthConfig()
    """When it is measured whether the model learns as it should, with labels or without."""
    profiling: ProfilingConfig = ProfilingConfig()
    """Which steps are traced."""
    global_batch_size: Size
    """Images per optimizer step, over all ranks."""
    micro_batch_size: Size
    """Images per rank per forward; accumulation is derived from it and the world size."""
    epochs: Annotated[float, Field(gt=0, le=1_000_000), NOT_A_SWITCH] | None = None
    """Length of the run in passes over the training samples; exactly one of epochs, steps, samples."""
    steps: Count | None = None
    """Length of the run in optimizer steps."""
    samples: Count | None = None
    """Length of the run in images seen."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Compute precision on an accelerator, over fp32 master weights; a processor without one computes in fp32. fp16
    scales its loss, and is for accelerators that are slow at bf16."""
    compile: bool = True
    """Compile the network (torch.compile) on an accelerator; a processor without one runs it as it is."""
    activation_checkpointing: bool = False
    """Keep only the blocks' inputs for backward and compute the rest again: a third more arithmetic, less memory."""
    deterministic: bool = False
    """Only kernels that give the same bits on every run, on the same accelerators, versions and world size. Costs
    speed on accelerators, most in the backward pass of attention; a processor's runs are the same either way."""
    ema_decay: Rate = 0.0
    """Exponential moving average of the weights, per step; what is evaluated and registered. 0 is off."""
    seed: CountOrZero = 0
    """Of initial weights, sample order, augmentation and masks."""
    writers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the ledger is shown beside MLflow: event files in RUN/tensorboard, or Weights & Biases; each is an extra of
    the project that must be installed."""
    log_every_steps: Count = 10
    """Steps between progress lines, at most one a second; the ledger holds every step."""
    budget_gpu_hours: Positive | None = None
    """Hours of all ranks together, over all attempts, after which the run stops with a checkpoint. None: no limit."""

    @property
    def length(self) -> tuple[str, float]:
        """(unit, amount) of the run's length."""
        return next((unit, getattr(self, unit)) for unit in LENGTH_UNITS if getattr(self, unit) is not None)

    @property
    def keeps_average(self) -> bool:
        """Whether there is a moving average of the weights: asked for, or as the objective's teacher."""
        return self.ema_decay > 0 or self.objective.averages_teacher

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        given = [unit for unit in LENGTH_UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of epochs, steps, samples sets the length; given: {', '.join(given) or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_sees_what_it_needs(self) -> "TrainingConfig":
        if self.optimizer.kind in WHOLE_TENSORS and self.zero.stage:
            raise ValueError(
                f"optimizer.kind {self.optimizer.kind} needs the norm of every whole tensor, and zero.stage "
                f"{self.zero.stage} cuts tensors into parts; set zero.stage to 0, or optimizer.kind to adamw or sgd"
            )
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
    def _statistics_are_of_the_channels(self) -> "TrainingConfig":
        for key in ("mean", "std"):
            given = getattr(self.data, key)
            if given is not None and len(given) != self.encoder.channels:
                raise ValueError(
                    f"data.{key} has {len(given)} values, encoder.channels is {self.encoder.channels}; they must "
                    "agree, and images must have as many channels"
                )
        return self

    @model_validator(mode="after")
    def _colours_are_there(self) -> "TrainingConfig":
        if self.encoder.channels != 3 and (keys := self.augmentation.colour_keys):
            raise ValueError(
                f"augmentation.{', '.join(keys)}: needs red, green and blue, and encoder.channels is "
                f"{self.encoder.channels}; turn it off"
            )
        return self

    @model_validator(mode="after")
    def _objective_can_train_the_encoder(self) -> "TrainingConfig":
        objective, encoder = self.objective, self.encoder
        if isinstance(encoder, TimmEncoderConfig):
            if not learns_by(objective, encoder):
                raise ValueError(
                    f"objective.kind {objective.kind} trains plain ViTs alone, and encoder.name {encoder.name} is "
                    "another network; that learns with labels, objective.kind supervised, or, a Swin but swinv2_cr, by "
                    "simmim"
                )
        elif not objective.reads_labels and encoder.representation:
            raise ValueError(
                f"encoder.representation is a layer before the head, and {objective.kind} has none; turn it off"
            )
        elif objective.shows_some_patches and encoder.positions == "relative":
            raise ValueError(
                f"encoder.positions relative: a block's own biases are those of all patches, and {objective.kind} "
                "shows the encoder some; take relative_shared"
            )
        if (problem := objective.problem(encoder, self.zero.stage)) is not None:
            raise ValueError(problem)
        if self.ema_decay and self.objective.averages_teacher:
            raise ValueError(
                f"ema_decay {self.ema_decay:g}: the moving average is the teacher of objective.kind "
                f"{self.objective.kind}, at a momentum of its own; leave ema_decay out"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_there_to_be_mixed(self) -> "TrainingConfig":
        keys = [key for key in ("mixup_alpha", "cutmix_alpha") if getattr(self.augmentation, key)]
        if keys and not (self.objective.reads_labels or self.objective.kind == "distill"):
            raise ValueError(
                f"augmentation.{', '.join(keys)}: mixes images with their labels, and objective.kind "
                f"{self.objective.kind} reads none; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _a_batch_has_a_variance(self) -> "TrainingConfig":
        head = getattr(self.objective, "head", None)
        if head is not None and head.kind == "linear_batchnorm" and self.micro_batch_size == 1:
            raise ValueError("micro_batch_size 1: a BatchNorm (objective.head) needs at least 2 images per rank")
        return self


class PretrainConfig(TrainingConfig):
    """Pretraining: an encoder learns from images, with labels or without."""

    tuning: ClassVar[TuningConfig] = FullTuning()
    """All parameters train."""
    stage: Literal["pretrain"] = "pretrain"
    objective: ObjectiveConfig
    """What the encoder learns from."""
    initialise_from: Text | None = None
    """A MODEL whose weights the encoder starts from. None: random weights."""


class FinetuneConfig(TrainingConfig):
    """Fine-tuning: a pretrained encoder with a fresh head learns the labels of a downstream dataset."""

    stage: Literal["finetune"] = "finetune"
    objective: FinetuneObjective = SupervisedConfig()
    """Supervised, or from labels and a teacher (`kind: distill`)."""
    tuning: TuningConfig = FullTuning()
    """Which parameters train."""
    initialise_from: Text
    """The MODEL that is fine-tuned."""

    @model_validator(mode="after")
    def _learns_labels(self) -> "FinetuneConfig":
        if not self.objective.reads_labels:
            raise ValueError(
                "objective.label_weight 0: fine-tuning learns the labels of a dataset; learn from a teacher alone by "
                "a recipe pretrain_distill_<encoder>"
            )
        return self

    @model_validator(mode="after")
    def _can_be_tuned(self) -> "FinetuneConfig":
        tuning, encoder = self.tuning, self.encoder
        if isinstance(encoder, TimmEncoderConfig):
            if tuning.plain_only:
                raise ValueError(
                    f"tuning.kind {tuning.kind} knows the layers of plain ViTs alone, and encoder.name {encoder.name} "
                    "is another network; set tuning.kind to full or head"
                )
        elif (problem := tuning.problem(encoder)) is not None:
            raise ValueError(problem)
        if tuning.whole_tensors and self.zero.stage:
            raise ValueError(
                f"tuning.kind {tuning.kind} weighs whole gradients, and zero.stage {self.zero.stage} cuts them into "
                "parts; set zero.stage to 0 (what trains is small), or tuning.kind to lora"
            )
        if tuning.kind == "head" and self.activation_checkpointing:
            raise ValueError(
                "activation_checkpointing: tuning.kind head keeps no activations that could be computed again; set it "
                "to false"
            )
        return self
