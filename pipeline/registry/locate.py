"""What a MODEL reference stands for, found without torch: where its weights are and what network they fit.

MODEL is one of: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, a run directory, a checkpoint directory, a
`.safetensors`/`.pth` file, Google's `.npz`, `timm:NAME`, `hf:DIR` (as transformers writes it), a directory in timm's
own layout (config.json + model.safetensors), or `random:MODEL`, the same network with weights that learned nothing:
what a pretrained model is held against.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from models.encoders.config import EncoderConfig, inexpressible
from models.encoders.timm_config import PREFIX, encoder_of_timm, read_encoder
from models.tuning.config import TuningConfig
from pipeline.config.stages import read_run_config
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError, near_matches
from pipeline.registry.foreign import google_facts, hugging_face_facts, layout_settings
from pipeline.registry.versions import connected, registered_version, whole_directory
from pipeline.run_directory import Checkpoint, RunDirectory, verified_manifest

RANDOM = "random:"
_NOT_TIMM = {"adapter": "adapters", "visual_prompt": "prompts"}
LINEAGE = ("run", "step", "data_fingerprint", "config_sha256", "parent", "teacher")  # tags of a version, after `vit.`
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class ModelSource:
    """A located model. `encoder` is None where the weights do not say what network they fit."""

    reference: str
    kind: str  # checkpoint | timm_directory | file | timm | hf | npz | random
    path: str
    encoder: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # of an encoder, which the layout of bare weights says
    num_classes: int = 0
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    evaluation_crop: float | None = None
    evaluation_crop_mode: str = "center"
    objective: str | None = None
    tuning: dict[str, Any] | None = None  # what else is in the network, of what cannot be merged: adapters, prompts
    outputs: str = "softmax"  # what makes probabilities of logits: softmax, or a sigmoid for each class
    lineage: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] | None = None  # of a run whose head is a probe's; None: linear, or none

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def is_plain_vit(self) -> bool:
        """Whether its patches are a sequence of tokens, one each; not of an encoder that is not said."""
        return self.encoder is not None and isinstance(read_encoder(self.encoder), EncoderConfig)


def same_checkpoint(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two lineages name the same step of the same run."""
    return ours.get("run") is not None and (ours["run"], ours.get("step")) == (theirs.get("run"), theirs.get("step"))


def lasting_reference(source: dict[str, Any] | None) -> str | None:
    """A MODEL that means the very weights of a source in a plan tomorrow, too: its version, its checkpoint's directory.

    An alias may have moved by then, and a run may have trained on. None where there is no source.
    """
    if source is None:
        return None
    if registered := source.get("lineage", {}).get("registered"):
        return registered
    return source["path"] if source["kind"] == "checkpoint" else source["reference"]


def different_classes(teacher: str, theirs: int, ours: int) -> str:
    """What to say of a teacher that knows other classes than the labels are of."""
    return (
        f"objective.teacher {teacher}: knows {theirs:,} classes, and the labels are of {ours:,}; take a teacher of the "
        "same classes, or learn from the teacher alone with objective.label_weight=0"
    )


def source_from_dict(raw: dict[str, Any]) -> ModelSource:
    """The inverse of `ModelSource.as_dict` after a trip through JSON."""
    lists = {key: tuple(value) for key, value in raw.items() if isinstance(value, list)}
    return ModelSource(**(raw | lists))


def locate_model(reference: str, *, tracking_uri: str, home: Path) -> ModelSource:
    """The model that `reference` stands for; InputError names what is missing and what there is instead."""
    if not reference.strip():
        raise InputError("MODEL is empty; name a run, a checkpoint, a registered model or a file of weights")
    if reference.startswith("models:/"):
        return _registered(reference, tracking_uri, home)
    if reference.startswith("timm:"):
        return ModelSource(reference, "timm", reference.removeprefix("timm:"))
    if reference.startswith(RANDOM):
        return _random_weights(reference, tracking_uri=tracking_uri, home=home)
    path = Path(reference.removeprefix("hf:")).expanduser()
    if not path.exists() and (home / "runs" / reference).is_dir():
        path = home / "runs" / reference
    path = path.absolute()
    reference = f"hf:{path}" if reference.startswith("hf:") else str(path)  # as typed it would mean nothing elsewhere
    if path.suffix == ".npz" and path.is_file():
        return ModelSource(reference, "npz", str(path), **google_facts(path))
    if path.is_file() and path.suffix in WEIGHT_FILES:
        return ModelSource(reference, "file", str(path), settings=layout_settings(path))
    if reference.startswith("hf:") and (path / "config.json").is_file():
        return ModelSource(reference, "hf", str(path), **hugging_face_facts(path))
    if (path / "config.yaml").is_file():
        return _of_run(reference, RunDirectory(path))
    if (path / "manifest.json").is_file():
        return _of_checkpoint_directory(reference, path)
    if (path / "config.json").is_file():
        return _of_timm_directory(reference, path)
    if path.exists():
        raise InputError(f"MODEL `{reference}`: neither a run, a checkpoint, a timm directory nor a weights file")
    models = {path.parent.parent.name for path in (home / "runs").glob("*/checkpoints/step-*")}
    hint = near_matches(Path(reference).name, models)
    raise InputError(f"MODEL `{reference}` does not exist{'; ' + hint if hint else ''}")


def _random_weights(reference: str, *, tracking_uri: str, home: Path) -> ModelSource:
    """The network of another model, without its head, its weights and its past."""
    model = reference.removeprefix(RANDOM)
    if not model or model.startswith(RANDOM):
        raise InputError(f"MODEL `{reference}`: say whose network it is, for example random:RUN")
    same = locate_model(model, tracking_uri=tracking_uri, home=home)
    if same.encoder is None:
        raise InputError(f"MODEL `{reference}`: weights alone do not say which network they fit; name a run")
    return replace(
        same, reference=RANDOM + same.reference, kind="random", path="", num_classes=0, classes=(), objective=None,
        tuning=None, head=None, lineage={},
    )  # fmt: skip


def _of_run(reference: str, run: RunDirectory) -> ModelSource:
    if (parent := run.result_file).is_file() and json.loads(parent.read_text()).get("rehearsal"):
        raise InputError(f"MODEL `{reference}` is a rehearsal, not a trained model; train it with --rehearse never")
    config = read_run_config(run.path)
    if not isinstance(config, TrainingConfig):
        raise InputError(f"MODEL `{reference}`: a run of stage {config.stage} makes no model; name the run that did")
    checkpoint = run.newest_checkpoint()
    if checkpoint is None:
        raise InputError(f"MODEL `{reference}`: the run has no complete checkpoint yet; `vit resume {run.path}`")
    return _of_checkpoint(reference, run, config, checkpoint)


def _of_checkpoint(reference: str, run: RunDirectory, config: TrainingConfig, checkpoint: Checkpoint) -> ModelSource:
    plan = run.plan()
    return ModelSource(
        reference,
        "checkpoint",
        str(checkpoint.directory),
        encoder=config.encoder.model_dump(),
        num_classes=plan["num_classes"] if config.objective.reads_labels else 0,
        classes=tuple(plan["data"]["classes"] or ()) if config.objective.reads_labels else (),
        mean=config.data.mean,
        std=config.data.std,
        evaluation_crop=config.data.evaluation_crop,
        evaluation_crop_mode=config.data.evaluation_crop_mode,
        objective=config.objective.kind,
        head=_head(config.objective.model_dump()),
        tuning=None if config.tuning.expressible else config.tuning.model_dump(mode="json"),
        outputs=outputs_of(config.objective.model_dump()),
        lineage={
            "run": str(run.path),
            "step": checkpoint.step,
            "data_fingerprint": plan["data"]["fingerprint"],
            "data_tombstones": _tombstones(checkpoint.manifest),
            "datasets": _datasets(plan["data"]),
            "config_sha256": plan["config_sha256"],
            "parent": lasting_reference(plan.get("initialise_from")),
            "teacher": lasting_reference(plan.get("teacher")),
            "tuning": config.tuning.kind,
        },
    )


def _tombstones(manifest: dict[str, Any]) -> str | None:
    """Hashes of the tombstone lists that held last: what tells apart runs on one fingerprint before and after."""
    lists = (manifest.get("tombstones") or [{"sources": []}])[-1]["sources"]
    return "+".join(one["sha256"] or "none" for one in lists) if any(one["count"] for one in lists) else None


def _datasets(data: dict[str, Any]) -> list[dict[str, str]]:
    """Of a plan's data: path and fingerprint of every dataset."""
    return [{key: source[key] for key in ("path", "fingerprint")} for source in data.get("sources", [data])]


def _head(objective: dict[str, Any]) -> dict[str, Any] | None:
    head = objective.get("head")
    return head if head and head["kind"] != "linear" else None


def outputs_of(objective: dict[str, Any]) -> str:
    """What makes probabilities of the logits of a head that learned by this objective."""
    return "sigmoid" if objective.get("loss") == "sigmoid" else "softmax"


def _of_checkpoint_directory(reference: str, path: Path) -> ModelSource:
    manifest = verified_manifest(path)
    if manifest is None:
        raise InputError(f"MODEL `{reference}`: the checkpoint's files do not agree with its manifest.json")
    run = RunDirectory(path.parent.parent)
    if run.config_file.is_file() and isinstance(config := read_run_config(run.path), TrainingConfig):
        return _of_checkpoint(reference, run, config, Checkpoint(path, manifest))
    return ModelSource(
        reference, "checkpoint", str(path), encoder=manifest["encoder"], objective=manifest["objective"]["kind"],
        num_classes=manifest["num_classes"], tuning=_tuning_of(manifest), head=_head(manifest["objective"]),
        outputs=outputs_of(manifest["objective"]),
        lineage={"data_fingerprint": manifest["data_fingerprint"], "step": manifest["step"]},
    )  # fmt: skip


def _tuning_of(manifest: dict[str, Any]) -> dict[str, Any] | None:
    raw = manifest.get("config", {}).get("tuning")
    return raw if raw and not TypeAdapter(TuningConfig).validate_python(raw).expressible else None


def _of_timm_directory(
    reference: str, path: Path, lineage: dict[str, Any] | None = None, uri: str | None = None
) -> ModelSource:
    """timm's own layout; ours adds a `vit` block that says what timm has no key for. `uri` is of a version, if any."""
    raw = json.loads((path / "config.json").read_text())
    if "architecture" not in raw:
        raise InputError(f"MODEL `{reference}`: its config.json is not timm's; say hf:{path} if transformers wrote it")
    if not (path / "model.safetensors").is_file():
        raise InputError(f"MODEL `{reference}`: {path} has a config.json but no model.safetensors")
    data, ours = raw.get("pretrained_cfg", {}), raw.get("vit", {})
    encoder = ours.get("encoder") or _encoder_of_timm_directory(raw)
    return ModelSource(
        reference, "timm_directory", str(path), encoder=encoder, num_classes=raw.get("num_classes", 0),
        classes=tuple(raw.get("label_names", ())), mean=tuple(data["mean"]) if "mean" in data else None,
        std=tuple(data["std"]) if "std" in data else None, evaluation_crop=data.get("crop_pct"),
        evaluation_crop_mode=data.get("crop_mode") or "center",
        objective=ours.get("objective"), outputs=ours.get("outputs", "softmax"),
        lineage=(lineage or {}) | ours.get("lineage", {}) | ({"registered": uri} if uri else {}),
    )  # fmt: skip


def _encoder_of_timm_directory(raw: dict[str, Any]) -> dict[str, Any]:
    """What a config.json of timm's says of its network: a plain ViT where our words are enough for it."""
    of_training = ("num_classes", "weight_init", "drop_rate", "pos_drop_rate", "proj_drop_rate")
    arguments = {key: value for key, value in raw.get("model_args", {}).items() if key not in of_training}
    renamed = {"img_size": "image_size", "in_chans": "channels", "reg_tokens": "register_tokens",
               "init_values": "layer_scale", "act_layer": "activation", "global_pool": "pooling"}  # fmt: skip
    found = encoder_of_timm(raw["architecture"]) | {renamed.get(key, key): value for key, value in arguments.items()}
    found["pooling"] = {"token": "token", "avg": "mean"}.get(raw.get("global_pool", "token"))
    try:
        return EncoderConfig.model_validate(found).model_dump()
    except ValueError:
        channels, *size = raw.get("pretrained_cfg", {}).get("input_size", (3, 224, 224))
        own = {"name": PREFIX + raw["architecture"], "image_size": arguments.pop("img_size", tuple(size)),
               "channels": arguments.pop("in_chans", channels), "arguments": arguments}  # fmt: skip
        return read_encoder(own | {"drop_path_rate": arguments.pop("drop_path_rate", 0.0)}).model_dump()


def unregistrable(source: ModelSource) -> str | None:
    """Why a located model cannot be registered, which needs timm alone to load; None where it can."""
    if source.head is not None:
        return probe_head(source.head["kind"])
    if source.tuning is not None:
        return (
            f"tuning.kind {source.tuning['kind']}: timm's networks have no {_NOT_TIMM[source.tuning['kind']]}; tune by "
            "lora or adalora, which are merged into the weights"
        )
    encoder = read_encoder(source.encoder)
    return inexpressible(encoder) if isinstance(encoder, EncoderConfig) else None


def unknown_classes(source: ModelSource, classes: Sequence[str] | None) -> str | None:
    """Which of a dataset's classes a model's head does not know; None where it knows all."""
    theirs = set(source.classes)
    missing = [name for name in classes or () if name not in theirs]
    if not missing:
        return None
    said, known = (
        f"{len(names):,} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for names in (missing, list(source.classes))
    )
    return f"its head does not know {said} of the dataset's {len(classes):,} classes; it knows {known}"


def probe_head(kind: str) -> str:
    """Why a model with a probe's head cannot be registered."""
    return (
        f"objective.head.kind {kind} is a probe's: timm's architectures have a linear head or none; evaluate the run, "
        "and register a model fine-tuned with objective.head.kind linear"
    )


def undrawable(source: ModelSource) -> str | None:
    """Why there are no pictures of what a located model learned; None where there are."""
    if (source.tuning or {}).get("kind") == "visual_prompt":
        return "the pictures are of a sequence of patches, and prompts stand among them (tuning.kind visual_prompt)"
    encoder = read_encoder(source.encoder)
    if isinstance(encoder, EncoderConfig):
        return None
    return (
        f"the pictures are of a plain ViT's patches and their attention, and its network is {encoder.name}; inspect a "
        "plain ViT"
    )


def _registered(reference: str, tracking_uri: str, home: Path) -> ModelSource:
    """A registered version, its artifacts on this machine and held to the hashes that the registry has of them."""
    client = connected(tracking_uri)
    version = registered_version(client, reference, tracking_uri)
    uri = f"models:/{version.name}/{version.version}"
    directory = whole_directory(client, version, home)
    lineage = {key: version.tags[f"vit.{key}"] for key in LINEAGE if f"vit.{key}" in version.tags}
    return _of_timm_directory(reference, directory, lineage, uri)
