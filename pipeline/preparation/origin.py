"""What a run takes over from a model: from the one that it starts from, and from the one that teaches it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.encoders.config import EncoderConfig
from models.encoders.timm_config import PREFIX, TimmEncoderConfig, encoder_of_timm, read_encoder
from pipeline.config.recipe import apply_overrides, validate
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError
from pipeline.loading.sources import Sources
from pipeline.registry.locate import ModelSource, different_classes


def start_from(
    raw: dict[str, Any], model: ModelSource, settings: Mapping[str, Any], path: Path, notes: list[str]
) -> dict[str, Any]:  # fmt: skip
    """The recipe with the model's encoder under its own, and the model as where weights come from.

    Fine-tuning takes the pretraining's representation layer out (ViT, section 3.2), and reads a distilled model's two
    tokens whatever the recipe pools (DeiT, arXiv:2012.12877, section 4).
    """
    if model.tuning is not None:
        raise InputError(
            f"MODEL `{model.reference}`: has what tuning.kind {model.tuning['kind']} added, which would be lost; start "
            f"from the model that it was tuned from: {model.lineage.get('parent')}"
        )
    encoder = model.settings | (model.encoder or {}) | (raw.get("encoder") or {})
    if raw["stage"] == "finetune" and encoder.get("representation"):
        encoder["representation"] = False
    distilled = encoder.get("distillation_token") and settings.get("encoder.distillation_token", True)
    if raw["stage"] == "finetune" and distilled and encoder.get("pooling") != "token":
        encoder["pooling"] = "token"
        notes.append("encoder.pooling token, not the recipe's: the model has a class and a distillation token to read")
    if model.kind == "timm" and "name" not in encoder:
        encoder |= encoder_of_timm(model.path)
    if "name" not in encoder and "encoder.name" not in settings:
        raise InputError(
            f"{path.name}: encoder.name: `{model.reference}` holds weights alone; "
            "say which encoder they fit, for example --set encoder.name=vit_b16"
        )
    theirs, ours = (model.encoder or {}).get("name", ""), str(settings.get("encoder.name", encoder.get("name")))
    if theirs.startswith(PREFIX) and not ours.startswith(PREFIX):
        raise InputError(f"{path.name}: encoder.name {ours}: the weights of `{model.reference}` are of {theirs}")
    return raw | {"encoder": encoder, "initialise_from": model.reference}


def without_keys_of_a_plain_vit(
    raw: dict[str, Any], settings: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:  # fmt: skip
    """The recipe without what another network of timm's has no key for; a line says what was left out."""
    encoder = raw.get("encoder") or {}
    name = settings.get("encoder.name", encoder.get("name"))
    if not isinstance(name, str) or not name.startswith(PREFIX):
        return raw
    left_out = [key for key in encoder if key not in TimmEncoderConfig.model_fields]
    if encoder.get("name") != name:  # the size of another network's images
        left_out += [key for key in ("image_size",) if key in encoder]
    if left_out:
        said = ", ".join(f"encoder.{key}" for key in left_out)
        notes.append(f"encoder.name={name}: left out what the recipe says for a plain ViT: {said}")
    return raw | {"encoder": {key: value for key, value in encoder.items() if key not in left_out}}


def taught_by(
    teacher: ModelSource, config: TrainingConfig, sources: Sources, path: Path, notes: list[str]
) -> TrainingConfig:
    """The config with the teacher as it is found from anywhere, and its network; InputError where it cannot teach."""
    ours = sources.classes or ()
    if reason := _cannot_teach(teacher, config.encoder.channels):
        raise InputError(f"{path.name}: objective.teacher {teacher.reference}: {reason}")
    if config.objective.reads_labels and teacher.num_classes and tuple(teacher.classes or ours) != tuple(ours):
        raise InputError(f"{path.name}: {different_classes(teacher.reference, teacher.num_classes, len(ours))}")
    is_plain = teacher.encoder is not None and isinstance(read_encoder(teacher.encoder), EncoderConfig)
    if not is_plain:
        notes.append(f"objective.teacher {teacher.reference}: its memory and arithmetic are not counted in the plan")
    return changed(
        config, path.name, objective__teacher=teacher.reference,
        objective__teacher_encoder=teacher.encoder if is_plain else None,
        objective__teacher_classes=teacher.num_classes,
    )  # fmt: skip


def _cannot_teach(teacher: ModelSource, channels: int) -> str | None:
    """Why a model has nothing to say of such images, as far as its files tell; None where it may."""
    if teacher.kind == "file":
        return "weights alone do not say which network they are of; take a run, a registered model or timm:NAME"
    if teacher.kind != "timm" and not teacher.num_classes:
        return "has no head to learn from; fine-tune it first, or take another"
    theirs = read_encoder(teacher.encoder).channels if teacher.encoder else channels
    if channels not in (1, theirs):  # a grey image is shown as equal channels
        return f"sees images of {theirs} channels, and encoder.channels is {channels}; take a teacher of as many"
    return None


def changed(config: TrainingConfig, source: str, **changes: Any) -> Any:
    """A validated copy with dotted keys changed, `__` for the dot; pydantic's own copy would skip validation."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return validate(type(config), apply_overrides(config.model_dump(), dotted), source)
