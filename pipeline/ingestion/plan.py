"""What an ingestion will do, decided before anything is written: files, splits, labels, shards.

Everything wrong with the input is found here.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.adopt import AdoptTar
from pipeline.ingestion.annotations import FoundAnnotations, find_annotations
from pipeline.ingestion.images import ImageRule
from pipeline.ingestion.labels import Labels, number_classes, number_folders, read_labels, read_split_lists
from pipeline.ingestion.rejected import Rejected, num_counted
from pipeline.ingestion.shard_jobs import CandidateColumns, CandidateRange, ClassNames, ShardJob, WriteShard, order_keys
from pipeline.ingestion.sources.digits import DIGITS
from pipeline.ingestion.sources.listing import Listing, Source, SourceFiles
from pipeline.ingestion.sources.opening import open_source
from pipeline.ingestion.splits import class_folders, folder_splits, hash_splits, root_folder
from pipeline.ingestion.tars import expand_tars, label_rule, names_tars, split_of_tar, survey_tar
from pipeline.shards.index import SPLITS
from pipeline.shards.label_sets import LabelSets, names_of
from pipeline.shards.parallel import POOL_FROM_BYTES, available_cores, in_processes
from pipeline.shards.table import NO_LABEL

UNIDENTIFYING_KEYS = ("workers", "max_rejected_fraction")  # they change no byte of the shards
LATER_KEYS = (
    *("masks", "mask_classes", "boxes"),
    *("colour", "max_side", "quality", "format", "max_pixels", "max_image_seconds", "examine"),
)  # older datasets lack them: they count where they are not the default

REWRITING_KEYS = ("colour", "max_side", "quality", "format")  # what they ask for makes new images


@dataclass(frozen=True)
class IngestPlan:
    """`identity`, in JSON's types, is what makes it this dataset: the source, and the config that shapes it."""

    identity: Mapping[str, Any]
    jobs: Sequence[ShardJob]
    rejected: Sequence[Rejected]
    classes: tuple[str, ...] | None
    label_sets: LabelSets | None = None
    annotations: FoundAnnotations = FoundAnnotations()

    @cached_property
    def num_files(self) -> int:
        return len(self.rejected) + sum(job.num_files for job in self.jobs)

    @cached_property
    def num_images(self) -> int:
        """What `max_rejected_fraction` is a fraction of; at least 1."""
        return num_counted(self.rejected) + sum(job.num_files for job in self.jobs)


def plan_ingest(source: str, config: IngestConfig) -> IngestPlan:
    """InputError for everything wrong with the source or what the config says about it."""
    if names_tars(source):
        return _plan_tars(source, config)
    opened = open_source(source)
    listing = opened.list_files()
    if not listing.images:
        raise InputError(f"{source}: {_why_no_images(listing)}")
    keys = order_keys(config.seed, listing.images.paths)
    listing.images = listing.images.reordered(np.lexsort((keys[:, 1], keys[:, 0])))
    paths = listing.images.paths
    root = root_folder(paths)
    others = [entry.path for entry in listing.rejected]
    labels = _labels(config, listing, paths, root)
    if config.masks and config.masks.resolve().is_relative_to(os.path.realpath(source)):
        raise InputError(f"{config.masks}: masks: lies in the source {source}, which would take its masks for images")
    annotations = find_annotations(config, paths, others)
    if isinstance(config.splits, dict):
        splits = read_split_lists(config.splits, paths, others)
    else:
        splits = _splits_without_lists(opened, listing, root, config)
    outside = [Rejected(path, "outside_splits", "in no split folder or list") for path in paths if path not in splits]
    if not splits:
        raise InputError(f"{source}: splits: not one of its {len(paths)} images is in a list")
    ranges = _ranges_of_shards(listing.images, splits, labels, annotations, config.samples_per_shard)
    jobs = [
        WriteShard(name, split, opened, candidates, config.channels, annotations.rule, image_rule(config))
        for name, split, candidates in ranges
    ]
    identity = _identity(source if source == DIGITS else os.path.abspath(source), config)
    return IngestPlan(identity, jobs, [*listing.rejected, *outside], labels.classes, labels.label_sets, annotations)


def image_rule(config: IngestConfig) -> ImageRule:
    return ImageRule(config.colour, config.max_side, config.quality, config.format, config.max_pixels, config.examine)


def num_workers(jobs: Sequence[ShardJob], config: IngestConfig) -> int:
    """One where starting more would not pay."""
    if len(jobs) < 2 or sum(job.num_bytes for job in jobs) < POOL_FROM_BYTES:
        return 1
    return _processes(config)


def _processes(config: IngestConfig) -> int:
    """Of this machine, whose own work is not that of a cluster."""
    return config.workers if isinstance(config.workers, int) else available_cores()


def _labels(config: IngestConfig, listing: Listing, paths: Sequence[str], root: str) -> Labels:
    """From the labels file, else as the source itself says, else from folders."""
    if config.labels:
        return read_labels(config.labels, paths, [entry.path for entry in listing.rejected])
    if not listing.labels:
        return number_folders(class_folders(paths, root))
    return number_classes(listing.labels) if listing.classes is None else Labels(listing.labels, listing.classes)


def _splits_without_lists(source: Source, listing: Listing, root: str, config: IngestConfig) -> Mapping[str, str]:
    """Path -> split; an image outside all splits is missing."""
    said: Mapping[str, str] = {}
    if config.splits == "folders":
        said = listing.splits or folder_splits(listing.images.paths, root)
    return said or hash_splits(source, listing.images, config.split_fractions, config.seed)


def _ranges_of_shards(
    files: SourceFiles, splits: Mapping[str, str], labels: Labels, annotations: FoundAnnotations,
    samples_per_shard: int,
) -> Iterator[tuple[str, str, CandidateRange]]:  # fmt: skip
    """(name, split, candidates) of every shard: the files of each split in the order of the dataset, cut up."""
    numbers = {split: number for number, split in enumerate(SPLITS)}
    codes = np.fromiter((numbers.get(splits.get(path), len(SPLITS)) for path in files.paths), np.int8, len(files))
    counts = np.bincount(codes, minlength=len(SPLITS))
    files = files.reordered(np.argsort(codes, kind="stable")[: counts[: len(SPLITS)].sum()])
    by_path = (labels.by_path.get(path, NO_LABEL) for path in files.paths)
    columns = CandidateColumns(files, np.fromiter(by_path, np.int32, len(files)), _class_names(labels), annotations)
    start = 0
    for split, count in zip(SPLITS, counts.tolist(), strict=False):
        stop = start + count
        for number, first in enumerate(range(start, stop, samples_per_shard)):
            last = min(first + samples_per_shard, stop)
            yield f"{split}-{number:06d}.tar", split, CandidateRange(columns, first, last)
        start = stop


def _class_names(labels: Labels) -> ClassNames:
    """By label: the name of its class, or the names where it stands for a set of them."""
    if not labels.classes:
        return {}
    if labels.label_sets is None:
        return dict(enumerate(labels.classes))
    sets = range(len(labels.label_sets))
    return {label: tuple(names_of(label, labels.label_sets, labels.classes)) for label in sets}


def _plan_tars(source: str, config: IngestConfig) -> IngestPlan:
    if config.labels:
        raise InputError(
            f"{config.labels}: labels: a labels file is for folders; tars carry .cls, .json or .txt members"
        )
    if config.masks or config.boxes:
        key = "masks" if config.masks else "boxes"
        raise InputError(f"{config.masks or config.boxes}: {key}: for folders; unpack the tars and ingest the folder")
    for key in REWRITING_KEYS:
        if (value := getattr(config, key)) != getattr(IngestConfig(), key):
            raise InputError(
                f"{source}: {key}: {value}: tars are not rewritten; leave it out, or unpack them and ingest the folder"
            )
    if config.splits == "hash":
        raise InputError(f"{source}: splits: hash: a tar belongs to one split; use folders (names), or lists of tars")
    tars = expand_tars(source)
    if isinstance(config.splits, dict):
        splits = read_split_lists(config.splits, list(map(str, tars)))
    else:
        splits = {str(tar): split_of_tar(tar) for tar in tars}
    outside = [Rejected(str(tar), "outside_splits", "in no list") for tar in tars if str(tar) not in splits]
    tars = [tar for tar in tars if str(tar) in splits]
    workers = _processes(config)
    pool = len(tars) > 1 and sum(tar.stat().st_size for tar in tars) >= POOL_FROM_BYTES
    surveys = {survey.path: survey for survey in in_processes(survey_tar, tars, workers if pool else 1)}
    rule = label_rule([surveys[tar] for tar in tars])
    if not any(survey.num_samples for survey in surveys.values()):
        raise InputError(f"{source}: holds no samples; a sample is an image and its labels under one name")
    numbers: Counter[str] = Counter()
    jobs = []
    for tar in sorted(tars, key=lambda tar: (SPLITS.index(splits[str(tar)]), tar)):
        split = splits[str(tar)]
        name = f"{split}-{numbers[split]:06d}.tar"
        numbers[split] += 1
        jobs.append(AdoptTar(name, split, tar, surveys[tar].num_samples, rule, config.channels, image_rule(config)))
    return IngestPlan(_identity(os.path.abspath(source), config), jobs, outside, rule.classes)


def _identity(source: str, config: IngestConfig) -> dict[str, Any]:
    said, default = config.model_dump(mode="json"), IngestConfig().model_dump(mode="json")
    unsaid = [*UNIDENTIFYING_KEYS, *(key for key in LATER_KEYS if said[key] == default[key])]
    return {"source": source, **{key: value for key, value in said.items() if key not in unsaid}}


def _why_no_images(listing: Listing) -> str:
    if not listing.rejected:
        return "is empty; a source holds images"
    suffixes = Counter(os.path.splitext(entry.path)[1].lower() or "no extension" for entry in listing.rejected)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(4))
    hint = "; adopt tars with 'FOLDER/*.tar'" if ".tar" in suffixes else ""
    return f"holds no images among its {len(listing.rejected)} files ({kinds}){hint}"
