"""The inspection of a model: every picture that its kind allows, one page that shows them, and what was not drawn."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.encoders.config import EncoderConfig
from models.inspection.attention import (
    attention_distance_picture,
    attention_rollout,
    has_class_token,
    heads_picture,
    mean_attention_distance,
    readout_attention,
    rollout_picture,
)
from models.inspection.display import NothingToDraw, display_pixels
from models.inspection.features import feature_components, features_picture, patch_features
from models.inspection.filters import filters_picture
from models.inspection.positions import positions_picture
from models.inspection.reconstructions import fill_in, image_table, patches_touched, reconstruction_sheet
from models.objectives.mae import MaskedAutoencoder
from pipeline.config.stages import InspectConfig, read_run_config
from pipeline.errors import InputError
from pipeline.evaluation.single_images import file_samples
from pipeline.inspection.artifacts import log_pictures
from pipeline.inspection.images import covered_pixels, dataset_samples, model_views, read_mask
from pipeline.inspection.page import PAGE, WORDS, NotShown, Shown, page
from pipeline.rank import Rank
from pipeline.registry.locate import ModelSource, source_from_dict
from pipeline.registry.weights import load_masked_autoencoder, load_model
from pipeline.run_directory import write_atomic, write_json
from pipeline.shards.index import read_index
from pipeline.shards.reader import Sample

NO_DECODER = "the model is an encoder alone; a run of objective mae has the decoder that fills in"


class Picture(NamedTuple):
    """A picture that may be drawn; `draw` raises NothingToDraw where the model has no such thing."""

    file: str
    title: str
    sentence: str
    draw: Callable[[], Image.Image]


class Subject(NamedTuple):
    """What is inspected: a model and the images that it is shown."""

    encoder: VisionTransformer
    objective: MaskedAutoencoder | None  # with the decoder, where there is one
    source: ModelSource
    samples: Sequence[Sample]
    images: Tensor  # (B, C, H, W) float, normalised

    @property
    def names(self) -> list[str]:
        """The samples' keys, without the hash that ingestion puts behind a name."""
        return [re.sub(r"-[0-9a-f]{16}$", "", sample.key) for sample in self.samples]


def inspect(me: Rank) -> None:
    """Draw what can be drawn into the destination, log it beside the model in MLflow, and write `result.json`."""
    config, plan = read_run_config(me.run.path), me.run.plan()
    me.phase = "load the model"
    subject = _subject(config, plan)
    heading, facts = f"What a ViT learned: {_name(subject.source)}", _facts(subject)
    destination = Path(config.destination)
    destination.mkdir(parents=True, exist_ok=True)
    write_atomic(destination / PAGE, page(heading, facts, [], []))  # from now on the folder is known as ours
    shown, missing = _draw(me, pictures_of(subject, config.mask), destination)
    write_atomic(destination / PAGE, page(heading, facts, shown, missing))
    me.phase = "log to MLflow"
    files = [destination / name for name in (*(one.file for one in shown), PAGE)]
    tracking = log_pictures(files, subject.source, config.tracking_uri)
    write_json(me.run.result_file, {
        "format_version": 1, "stage": "inspect", "page": str(destination / PAGE),
        "pictures": [one.file for one in shown], "not_drawn": {one.title: one.reason for one in missing},
        "images": subject.names, "tracking": tracking,
    })  # fmt: skip


def _draw(me: Rank, pictures: Sequence[Picture], destination: Path) -> tuple[list[Shown], list[NotShown]]:
    """Draw one after the other, and say so; pictures of an earlier inspection of the folder are gone."""
    shown, missing = [], []
    for file in WORDS:
        (destination / file).unlink(missing_ok=True)
    for number, picture in enumerate(pictures):
        me.phase = f"draw {picture.file}"
        with open(me.attempt.events, "a") as events:
            events.write(f"{number + 1} of {len(pictures)}: {picture.file}\n")
        try:
            picture.draw().save(destination / picture.file)
        except NothingToDraw as reason:
            missing.append(NotShown(picture.title, str(reason)))
        else:
            shown.append(Shown(picture.file, picture.title, picture.sentence))
    return shown, missing


def _subject(config: InspectConfig, plan: dict) -> Subject:
    source = source_from_dict(plan["source"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = load_masked_autoencoder(source)
    encoder = (load_model(source) if objective is None else objective.encoder).to(device)
    if "data" in plan:
        samples = dataset_samples(read_index(plan["data"]["path"]), plan["split"], config.images)
    else:
        samples = file_samples(plan["images"], EncoderConfig.model_validate(source.encoder).channels, named="IMAGES")
    objective = None if objective is None else objective.to(device)
    return Subject(encoder, objective, source, samples, model_views(samples, source).to(device))


def pictures_of(subject: Subject, mask: str | None) -> list[Picture]:
    """Every picture there is, whether it can be drawn of this model or not."""
    encoder, images, names = subject.encoder, subject.images, subject.names
    shown = [display_pixels(image, subject.source.mean, subject.source.std) for image in images]
    token = has_class_token(encoder)
    draw = {
        "filters.png": lambda: filters_picture(encoder),
        "position-similarity.png": lambda: positions_picture(encoder),
        "attention-distance.png": lambda: attention_distance_picture(mean_attention_distance(encoder, images), encoder),
        "attention-heads.png": lambda: heads_picture(
            readout_attention(encoder, images), shown, names, class_token=token
        ),
        "attention-rollout.png": lambda: rollout_picture(
            attention_rollout(encoder, images), shown, names, class_token=token
        ),
        "features.png": lambda: features_picture(feature_components(patch_features(encoder, images)), shown, names),
        "reconstructions.png": lambda: _reconstructions(subject),
        "filled-in.png": lambda: _filled_in(subject, mask),
    }
    if mask is None:
        del draw["filled-in.png"]
    return [Picture(file, *WORDS[file], function) for file, function in draw.items()]


def _reconstructions(subject: Subject) -> Image.Image:
    if subject.objective is None:
        raise NothingToDraw(NO_DECODER)
    return reconstruction_sheet(subject.objective, subject.images, subject.source.mean, subject.source.std)


def _filled_in(subject: Subject, mask: str) -> Image.Image:
    """A mask covers other patches of each image, so they go through the model one by one."""
    if subject.objective is None:
        raise NothingToDraw(NO_DECODER)
    stretched, filled, seen = read_mask(mask), [], []
    for sample, image in zip(subject.samples, subject.images, strict=True):
        covered = covered_pixels(stretched, sample, subject.source)
        masked = patches_touched(covered, subject.objective.patch_size).to(image.device)
        try:
            both = fill_in(subject.objective, image[None], masked)
        except NothingToDraw as reason:
            raise InputError(f"mask `{mask}`: of `{sample.key}`, as the model sees it, {reason}") from None
        filled.append(both[0])
        seen.append(both[1])
    columns = [subject.images, torch.cat(seen), torch.cat(filled)]
    return image_table(columns, subject.source.mean, subject.source.std)


def _name(source: ModelSource) -> str:
    registered = source.lineage.get("registered")
    return registered or Path(source.lineage.get("run") or source.path).name


def _facts(subject: Subject) -> list[str]:
    source, encoder = subject.source, EncoderConfig.model_validate(subject.source.encoder)
    height, width = encoder.input_size
    step = f", step {source.lineage['step']}" if source.lineage.get("step") is not None else ""
    objective = f" Learned by {source.objective}{step}." if source.objective else ""
    names = ", ".join(subject.names[:8]) + (", …" if len(subject.names) > 8 else "")
    return [
        f"Model: {source.reference}. {encoder.name}: {encoder.depth} blocks of {encoder.num_heads} heads, width "
        f"{encoder.embed_dim}, patches of {encoder.patch_size} pixels, input {height} × {width}.{objective}",
        f"Images: {names}.",
    ]
