"""Tensors of a located model, and the module they make. No pickle is opened that could run code."""

from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor, nn

from models.build import build_network, build_objective
from models.encoders.config import EncoderConfig
from models.encoders.head_config import read_head
from models.encoders.timm_config import read_encoder
from models.encoders.vit import build_encoder
from models.objectives.config import MaskedAutoencoderConfig
from models.objectives.mae import MaskedAutoencoder
from models.objectives.teacher import Teacher
from models.tuning.config import TuningConfig
from models.tuning.place import place_parts
from models.weights.loading import WeightsError, load_encoder_weights
from pipeline.checkpoints.files import read_model, read_weights
from pipeline.errors import InputError
from pipeline.registry.foreign import hugging_face_weights
from pipeline.registry.locate import ModelSource, source_from_dict
from pipeline.run_directory import Checkpoint, RunDirectory, verified_manifest


def source_weights(source: ModelSource | dict) -> dict[str, Tensor]:
    """The model's tensors by name, float32, on the host."""
    if isinstance(source, dict):
        source = source_from_dict(source)
    path = Path(source.path)
    match source.kind:
        case "checkpoint":
            return read_model(_checkpoint(path))
        case "timm_directory":
            return _file_weights(path / "model.safetensors")
        case "timm":
            return _timm_weights(source.path)
        case "hf":
            return _file_weights(hugging_face_weights(path))
        case "random":
            return random_weights(source)
        case "npz":
            return _google_weights(path, EncoderConfig.model_validate(source.encoder), source.num_classes)
        case _:
            return _file_weights(path)


def random_weights(source: ModelSource) -> dict[str, Tensor]:
    """The weights that training of the located network begins with, by seed 0."""
    torch.manual_seed(0)
    return build_network(read_encoder(source.encoder), source.num_classes).state_dict()


def _checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest of the run at `path`."""
    if (path / "config.yaml").is_file():
        newest = RunDirectory(path).newest_checkpoint()
        if newest is None:
            raise InputError(f"{path}: the run has no complete checkpoint yet")
        return newest
    manifest = verified_manifest(path)
    if manifest is None:
        raise InputError(f"{path}: the checkpoint's files do not agree with its manifest.json")
    return Checkpoint(path, manifest)


def _timm_weights(name: str) -> dict[str, Tensor]:
    import timm

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the hub's client raises whatever its HTTP library does
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"timm:{name}: pretrained weights could not be loaded: {first_line}") from error


@torch.no_grad()
def _google_weights(path: Path, config: EncoderConfig, num_classes: int) -> dict[str, Tensor]:
    """By timm's own loader, which knows all but the representation head of Google's files."""
    encoder = build_encoder(config, num_classes)
    encoder.load_pretrained(str(path))
    if config.representation:
        with np.load(path, allow_pickle=False) as arrays:
            prefix = next(name for name in arrays.files if name.endswith("pre_logits/kernel")).removesuffix("kernel")
            encoder.head_drop.fc.weight.copy_(torch.from_numpy(arrays[f"{prefix}kernel"].T))
            encoder.head_drop.fc.bias.copy_(torch.from_numpy(arrays[f"{prefix}bias"]))
    return encoder.state_dict()


def _file_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: not readable as weights: {str(error).splitlines()[0]}") from error
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}


def load_model(source: ModelSource) -> nn.Module:
    """The encoder with its head, where it has one, in evaluation mode."""
    if source.encoder is None:
        raise InputError(f"MODEL `{source.reference}`: weights alone do not say which encoder they fit")
    encoder = build_network(read_encoder(source.encoder), source.num_classes, read_head(source.head))
    if source.tuning is not None:
        place_parts(encoder, TypeAdapter(TuningConfig).validate_python(source.tuning))
    try:
        report = load_encoder_weights(encoder, source_weights(source), head=source.num_classes > 0)
    except WeightsError as error:
        raise InputError(f"MODEL `{source.reference}`: {error}") from error
    if report.missing:
        raise InputError(f"MODEL `{source.reference}`: {report}")
    return encoder.eval()


def load_masked_autoencoder(source: ModelSource) -> MaskedAutoencoder | None:
    """The whole network of a run of objective mae, in evaluation mode; None for a model without a decoder."""
    if source.kind != "checkpoint" or source.objective != "mae":
        return None
    checkpoint = _checkpoint(Path(source.path))
    config = MaskedAutoencoderConfig.model_validate(checkpoint.manifest["objective"])
    encoder = EncoderConfig.model_validate(checkpoint.manifest["encoder"])
    objective = build_objective(config, encoder, num_classes=0, seed=0)
    objective.load_state_dict(read_weights(checkpoint))
    return objective.eval()


def load_teacher(source: ModelSource | dict, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Teacher:
    """A located model to learn from, of any architecture of timm; `mean` and `std` are the student's.

    InputError where it has no head, where its weights are not to be had, or where weights alone are given.
    """
    if isinstance(source, dict):
        source = source_from_dict(source)
    if source.kind in ("timm", "timm_directory"):
        network = _timm_network(source)
        data = network.pretrained_cfg
        own = {"mean": tuple(data["mean"]), "std": tuple(data["std"])}
        size = tuple(data["input_size"][-2:])
    else:
        network = load_model(source)
        own = {"mean": source.mean or mean, "std": source.std or std}
        size = read_encoder(source.encoder).input_size
    if not network.num_classes or isinstance(network.get_classifier(), torch.nn.Identity):
        raise InputError(f"MODEL `{source.reference}`: has no head to learn from; fine-tune it first, or take another")
    return Teacher(network, network.num_classes, size, **own, student_mean=mean, student_std=std)


def _timm_network(source: ModelSource) -> torch.nn.Module:
    import timm

    try:
        name = source.path if source.kind == "timm" else f"local-dir:{source.path}"
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises whatever its HTTP library does
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"MODEL `{source.reference}`: could not be loaded: {first_line}") from error
