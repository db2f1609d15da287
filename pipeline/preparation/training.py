"""From a recipe, a dataset and a profile to a run that can be written and submitted: config, plan and notes.

Everything is validated here, with one error text for the command line and the flows, before anything is written.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from models.encoders.config import EncoderConfig, inexpressible
from pipeline.config.memory import checkpoint_bytes, rank_memory
from pipeline.config.plan import count_parameters, count_trained, plan_batches, plan_steps, training_flops
from pipeline.config.recipe import apply_overrides, parse_overrides, read_yaml, recipe_path, resolve
from pipeline.config.training import LENGTH_UNITS, FinetuneConfig, PretrainConfig, TrainingConfig
from pipeline.config.validation import SPLIT
from pipeline.errors import InputError
from pipeline.loading.selection import Selection
from pipeline.loading.sources import Sources
from pipeline.preparation.health import bytes_of_images, with_health
from pipeline.preparation.origin import changed, start_from, taught_by, without_keys_of_a_plain_vit
from pipeline.preparation.placement import Placement
from pipeline.registry.locate import ModelSource, probe_head
from pipeline.registry.timm_facts import with_timm_facts
from pipeline.registry.writers import require_packages
from pipeline.shards.index import Shard
from pipeline.shards.order import default_lanes, default_window_shards
from pipeline.shards.reader import cache_shortage, node_readers
from pipeline.storage.location import Location, is_remote
from pipeline.views.turbojpeg import require_turbojpeg

WINDOW_BYTES = 1 << 30
REMOTE_WINDOWS = 4  # as many times smaller
ADOPTED_WINDOWS = 4  # as many times larger for tars that nobody says were shuffled
MOST_VALIDATIONS = 100  # in a run that does not say
LEAST_STD = 1 / 255  # of a channel that does not vary: one grey level
PROCESS_BYTES = 1_000_000_000  # torch, DeepSpeed and timm, resident in each rank before the model
CONFIGS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


@dataclass(frozen=True)
class PreparedRun:
    """A validated run, not yet written. `notes` are lines that a person should read."""

    name: str
    config: Any
    plan: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def config_text(self) -> str:
        return dump_config(self.config)


def dump_config(config: Any) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def prepare_training(
    stage: str,
    recipe: str,
    overrides: Sequence[str],
    sources: Sources,
    placement: Placement,
    model: ModelSource | None = None,
    teacher: ModelSource | None = None,
) -> PreparedRun:
    """The run that `recipe` with `overrides` makes on datasets, under a placement.

    Of `model` where one is given, and learning from `teacher` where the objective has one.
    """
    path = recipe_path(recipe)
    raw, settings = read_yaml(path), parse_overrides(overrides)
    _require_stage(raw, stage, path)
    notes: list[str] = []
    if model is not None:
        model = with_timm_facts(model)
        raw = start_from(raw, model, settings, path, notes)
    raw, by_hand = _replace_length(raw, settings)
    if given := [key for key in settings if key.startswith("data.sources")]:
        raise InputError(f"--set {given[0]}: filled in by --data; say --data PATH, or --data PATH=WEIGHT several times")
    raw = apply_overrides(raw, {"data.sources": [{"path": str(index.directory)} for index in sources.indexes]})
    raw = without_keys_of_a_plain_vit(raw, settings, notes)
    config, left_out = resolve(CONFIGS[stage], raw, settings, path.name)
    notes += left_out
    sources.require_split(config.data.split, path.name)
    sources = sources.weighted(config.data.split)
    config = _filled_in(config, sources, model, path)
    if teacher is not None:
        config = taught_by(teacher, config, sources, path, notes)
    require_loss_of_label_sets(config, sources, path)
    samples_per_epoch = _samples_per_epoch(config, sources)
    if by_hand:
        recipe_unit = next((unit for unit in LENGTH_UNITS if unit in read_yaml(path)), config.length[0])
        config = _shortened_ramps(config, settings, recipe_unit, samples_per_epoch, notes)
    config = with_validation(config, sources, samples_per_epoch, path.name)
    health_asked = config.health.every_steps
    config = with_health(config, sources, samples_per_epoch, path.name)
    _note_unshuffled(config, sources, notes)
    _note_small_cache(config, sources, placement, notes)
    plan = training_plan(config, sources, placement, samples_per_epoch, model)
    if reason := _trains_but_is_not_registered(config):
        notes.append(f"what is trained cannot be registered: {reason}")
    if config.tuning.freezes and config.tuning.kind != "head" and config.optimizer.layer_decay < 1:
        notes.append(
            f"optimizer.layer_decay {config.optimizer.layer_decay:g} slows what tuning.kind {config.tuning.kind} adds "
            "to lower blocks too, which knows nothing yet; try 1"
        )
    if not config.tuning.expressible:
        notes.append(
            f"what is trained can be evaluated and not registered: timm has no network with what tuning.kind "
            f"{config.tuning.kind} adds; lora and adalora are merged into the weights"
        )
    plan["health_asked"] = health_asked  # None: it follows from the length
    plan["teacher"] = teacher.as_dict() if teacher else None
    if caution := config.objective.caution(config.micro_batch_size * placement.world_size):
        notes.append(caution)
    if config.precision == "bf16" and plan["precision"] == "fp32":
        where = "here" if placement.here else "on the nodes of this profile"
        notes.append(f"no accelerator {where}: computing in fp32")
    return PreparedRun(path.stem, config, plan, notes)


def recipe_config(
    stage: str, recipe: str, overrides: Sequence[str] = (), encoder: Mapping[str, Any] | None = None
) -> TrainingConfig:
    """A recipe before there are datasets: InputError where it is wrong as far as can be said without them.

    `encoder` is that of the MODEL to come where it is one of fine-tuning; what the recipe says of it goes before.
    """
    path = recipe_path(recipe)
    raw, settings = read_yaml(path), parse_overrides(overrides)
    _require_stage(raw, stage, path)
    raw, _ = _replace_length(raw, settings)
    if encoder is not None:
        of_recipe = {key: value for key, value in (raw.get("encoder") or {}).items() if key in encoder}
        raw = raw | {"encoder": {**encoder, **of_recipe}, "initialise_from": "a run to come"}
    return resolve(CONFIGS[stage], without_keys_of_a_plain_vit(raw, settings, []), settings, path.name)[0]


def _require_stage(raw: Mapping[str, Any], stage: str, path: Path) -> None:
    found = raw.get("stage")
    if found != stage:
        raise InputError(f"{path.name}: stage: this is a recipe of stage {found!r}, not {stage}")


def _trains_but_is_not_registered(config: TrainingConfig) -> str | None:
    """Why somebody may learn too late that the model is not one of timm's: of a representation it is no news."""
    head = getattr(config.objective, "head", None)
    if head is not None and not head.registrable:
        return probe_head(head.kind)
    plain = isinstance(config.encoder, EncoderConfig) and not config.encoder.representation
    return inexpressible(config.encoder) if plain else None


def _replace_length(raw: dict[str, Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Setting one length by hand replaces the recipe's; whether that happened."""
    given = [unit for unit in LENGTH_UNITS if unit in settings]
    if given:
        raw = {key: value for key, value in raw.items() if key not in LENGTH_UNITS}
    return raw, bool(given)


def _filled_in(config: TrainingConfig, sources: Sources, model: ModelSource | None, path: Path) -> TrainingConfig:
    """Every None that the datasets or the model decide, decided and written down."""
    data = config.data
    if config.augmentation.region_decode:
        require_turbojpeg()
    require_packages(config.writers)
    of_model = model if model and len(model.mean or ()) == config.encoder.channels else None  # of others: none
    mean, std = (
        getattr(data, what) or getattr(of_model, what, None) or sources.pixel_statistics(what)
        for what in ("mean", "std")
    )
    crop, crop_mode = data.evaluation_crop, data.evaluation_crop_mode
    if model and model.evaluation_crop and "evaluation_crop" not in data.model_fields_set:
        crop = model.evaluation_crop
    if model and "evaluation_crop_mode" not in data.model_fields_set:
        crop_mode = model.evaluation_crop_mode
    if mean is None or std is None:
        why = "the images differ in their channels" if sources.examined else "ingested with examine=header"
        raise InputError(
            f"{path.name}: data.mean: {sources.path}: {why}, so there are no statistics of pixels; give data.mean and "
            "data.std"
        )
    return changed(
        config, path.name,
        data__lanes=data.lanes or default_lanes(config.global_batch_size),
        data__sources=_filled_in_sources(config, sources),
        data__window_shards=data.window_shards
        or _window(sources.indexes[0].directory, sources.shards(data.split)[0]),
        data__mean=list(mean), data__std=[max(one, LEAST_STD) for one in std], data__evaluation_crop=crop,
        data__evaluation_crop_mode=crop_mode,
    )  # fmt: skip


def _filled_in_sources(config: TrainingConfig, sources: Sources) -> list[dict[str, Any]]:
    """A single source needs no more than its path; those of a mixture have weights and windows of their own."""
    if len(sources.indexes) == 1:
        return [{"path": str(sources.indexes[0].directory)}]
    return [
        {
            "path": str(index.directory),
            "weight": weight,
            "window_shards": config.data.window_shards or _window(index.directory, shards),
        }
        for index, weight, shards in zip(
            sources.indexes, sources.weights, sources.shards(config.data.split), strict=True
        )
    ]


def _window(directory: Location, shards: Sequence[Shard]) -> int:
    """Shards per window; more of adopted ones, whose samples may lie in the order of their classes.

    Fewer of remote ones: a node's cache holds the windows of all its lanes.
    """
    window_bytes = WINDOW_BYTES * (ADOPTED_WINDOWS if shards and shards[0].location else 1)
    window_bytes //= REMOTE_WINDOWS if is_remote(directory) else 1
    return default_window_shards([shard.bytes for shard in shards], window_bytes)


def _note_unshuffled(config: TrainingConfig, sources: Sources, notes: list[str]) -> None:
    for source, shards in zip(config.data.sources, sources.shards(config.data.split), strict=True):
        window = source.window_shards or config.data.window_shards
        if shards and shards[0].location and window < len(shards):
            notes.append(
                f"{source.path}: adopted tars keep the order they were written in; samples are shuffled within windows "
                f"of {window} of {len(shards)} shards: where they are sorted by class, raise data.window_shards or "
                "ingest the images anew"
            )


def _note_small_cache(config: TrainingConfig, sources: Sources, placement: Placement, notes: list[str]) -> None:
    """Of a run on this machine; InputError where the cache's own settings are wrong."""
    if placement.profile != "local":
        return
    readers, cache = node_readers(sources.indexes, config.data.split)
    windows = [source.window_shards or config.data.window_shards for source in config.data.sources]
    if (shortage := cache_shortage(readers, windows, config.data.lanes, cache)) is not None:
        notes.append(shortage)


def require_loss_of_label_sets(config: TrainingConfig, sources: Sources, path: Path) -> None:
    """InputError where images have several classes each and the loss is of one."""
    objective = config.objective
    if not objective.reads_labels or sources.label_sets is None:
        return
    if objective.kind != "supervised" or objective.loss != "sigmoid":
        raise InputError(
            f"{path.name}: objective: the images of {sources.path} have several classes each, and "
            f"{'a softmax' if objective.kind == 'supervised' else objective.kind} learns one; set "
            f"{'' if objective.kind == 'supervised' else 'objective.kind=supervised and '}objective.loss=sigmoid"
        )


def _samples_per_epoch(config: TrainingConfig, sources: Sources) -> int:
    """Samples of all sources together: an epoch of a mixture is as many draws."""
    split = config.data.split
    for index in sources.indexes:
        if config.objective.reads_labels and (missing := index.num_unlabelled(split)):
            raise InputError(
                f"{index.directory}: objective.kind: `{config.objective.kind}` needs labels, and {missing:,} of "
                f"{index.num_samples(split):,} samples of `{split}` have none; learn without labels by a recipe "
                "pretrain_mae_<encoder> (objective=mae of the pretrain flow)"
            )
    fraction, most = config.data.label_fraction, config.data.max_samples
    if fraction == 1.0 and most is None:
        return sources.num_samples(split)
    readers, _ = node_readers(sources.indexes, split)
    return sum(int(Selection.of(reader, fraction, most).shard_sizes.sum()) for reader in readers)


def _shortened_ramps(
    config: TrainingConfig, settings: Mapping[str, Any], recipe_unit: str, samples_per_epoch: int, notes: list[str]
) -> Any:
    """The recipe's warm-up and cool-down in the new unit, each at most a tenth of a length that was set by hand."""
    unit, amount = config.length
    in_samples = {"epochs": samples_per_epoch, "steps": config.global_batch_size, "samples": 1}
    allowed = {}
    for ramp, name in (("warmup", "warm-up"), ("cooldown", "cool-down")):
        if f"optimizer.{ramp}" in settings:
            continue
        wanted = getattr(config.optimizer, ramp) * in_samples[recipe_unit] / in_samples[unit]
        allowed[f"optimizer__{ramp}"] = min(wanted, amount / 10)
        if wanted > amount / 10:
            notes.append(
                f"{name} shortened from {wanted:g} to {amount / 10:g} {unit}: a tenth of the length set by hand"
            )
    return changed(config, "--set", **allowed)


def with_validation(config: TrainingConfig, sources: Sources, samples_per_epoch: int, asked_in: str) -> Any:
    """When the run is scored, and by what; InputError where it cannot be as it was asked."""
    every, best = config.validation.every_steps, config.validation.best
    supervised = config.objective.reads_labels
    lacking = [index for index in sources.indexes if not (SPLIT in index.splits and index.num_samples(SPLIT))]
    having = [index for index in sources.indexes if index not in lacking]
    unlabelled = [index for index in having if supervised and index.num_unlabelled(SPLIT)]
    if every and (lacking or unlabelled):
        where, what = (lacking[0], f"no split `{SPLIT}`") if lacking else (unlabelled[0], "samples without labels")
        raise InputError(
            f"{asked_in}: validation.every_steps is {every} and {where.directory} has {what}; ingest it with one, "
            "or set validation.every_steps=0"
        )
    if best == "accuracy" and not supervised:
        raise InputError(f"{asked_in}: validation.best: {config.objective.kind} has no accuracy; say loss")
    if every is None:
        steps, epoch = plan_steps(config, samples_per_epoch).steps, -(-samples_per_epoch // config.global_batch_size)
        every = 0 if lacking or unlabelled or steps < epoch else max(epoch, -(-steps // MOST_VALIDATIONS))
    best = best or ("accuracy" if supervised else "loss")
    return changed(config, asked_in, validation__every_steps=every, validation__best=best)


def training_plan(
    config: TrainingConfig, sources: Sources, placement: Placement, samples_per_epoch: int, model: ModelSource | None
) -> dict[str, Any]:
    """What `plan.json` holds: everything that follows from the config, the datasets and the placement."""
    batches = plan_batches(config.global_batch_size, config.micro_batch_size, placement.world_size)
    steps = plan_steps(config, samples_per_epoch)
    num_classes = len(sources.classes or ()) if config.objective.reads_labels else 0
    precision = placement.precision(config.precision)
    network = (config.encoder, config.objective, num_classes, config.tuning)
    parameters, trained = count_parameters(*network), count_trained(*network)
    frozen = parameters - trained
    memory = [
        rank_memory(config, batches, trained, stage=stage, precision=precision, frozen=frozen) for stage in range(4)
    ]
    checkpoint = checkpoint_bytes(config, trained, frozen)
    kept = checkpoint + bytes_of_images(config, sources)  # by all ranks together
    return {
        "format_version": 1,
        "stage": config.stage,
        **placement.as_plan(),
        "precision": precision,
        "compile_backend": placement.compile_backend(config.compile),
        "batches": batches._asdict(),
        "steps": steps._asdict(),
        "samples_per_epoch": samples_per_epoch,
        "num_classes": num_classes,
        "data": sources.as_plan(),
        "initialise_from": model.as_dict() if model else None,
        "config_sha256": hashlib.sha256(dump_config(config).encode()).hexdigest(),
        "parameters": parameters,
        "trained_parameters": trained,
        "training_flops_per_image": training_flops(*network),
        "memory_bytes_per_rank": {f"stage {stage}": one.device for stage, one in enumerate(memory)},
        "host_bytes_per_rank": PROCESS_BYTES + kept // placement.world_size + memory[config.zero.stage].host,
        "checkpoint_bytes": checkpoint,
    }
