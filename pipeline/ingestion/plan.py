"""What an ingestion will do, decided before anything is written: files, splits, labels, shards.

Everything wrong with the input is found here.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.archives.adopting import AdoptTar
from pipeline.ingestion.archives.naming import shown_names
from pipeline.ingestion.archives.opening import AdoptedTars, survey_tars
from pipeline.ingestion.archives.tars import label_rule, split_of_tar
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.ingestion.images import ImageRule
from pipeline.ingestion.labelling.annotations import FoundAnnotations, find_annotations, require_no_masks
from pipeline.ingestion.labelling.groups import hash_group_splits, read_groups, require_whole_groups
from pipeline.ingestion.labelling.labels import (
    Labels,
    Table,
    name_classes,
    number_classes,
    number_folders,
    read_labels,
    read_split_lists,
    table_rows,
)
from pipeline.ingestion.labelling.layout import Layout, read_layout, require_no_hidden_splits
from pipeline.ingestion.labelling.splits import class_folders, folder_splits, hash_splits, root_folder
from pipeline.ingestion.opening import Opened, list_source, source_name
from pipeline.ingestion.plan_notes import shares_of_splits, unread_labels
from pipeline.ingestion.progress import Progress, untold
from pipeline.ingestion.rejected import Rejected, num_counted
from pipeline.ingestion.shard_contract import ShardJob
from pipeline.ingestion.shard_jobs import CandidateColumns, CandidateRange, ClassNames, WriteShard, order_keys
from pipeline.ingestion.sources.listing import Listing, SourceFiles
from pipeline.shards.index import SPLITS
from pipeline.shards.label_sets import LabelSets, names_of
from pipeline.shards.parallel import POOL_FROM_BYTES, available_cores
from pipeline.shards.table import NO_LABEL
from pipeline.storage.location import Location

UNIDENTIFYING_KEYS = ("workers", "max_rejected_fraction", "max_read_seconds")  # they change no byte of the shards
# Datasets of before lack them: they count where they are not the default.
LATER_KEYS = (
    *("masks", "mask_classes", "boxes", "split", "examine", "duplicates", "leakage_against", "tars"),
    *("colour", "max_side", "quality", "format", "max_pixels", "max_image_seconds"),
    *("class_names", "image_column", "label_column"),
)
# What they ask for makes new images, or other shards of them.
REWRITING_KEYS = ("colour", "max_side", "quality", "format", "samples_per_shard", "split_fractions", "seed")


@dataclass(frozen=True)
class IngestPlan:
    """`identity`, in JSON's types, is what makes it this dataset: the source, and the config that shapes it."""

    identity: Mapping[str, Any]
    jobs: Sequence[ShardJob]
    rejected: Sequence[Rejected]
    classes: tuple[str, ...] | None
    label_sets: LabelSets | None = None
    annotations: FoundAnnotations = FoundAnnotations()
    tars: str | None = None  # adopt, rewrite or archive, where the source is tars
    layout: Layout = Layout()
    lay_out: Callable[[], None] | None = None  # what jobs read from is made by it, before the first of them runs
    notes: Sequence[str] = ()  # for the certificate

    @cached_property
    def num_files(self) -> int:
        return len(self.rejected) + sum(job.num_files for job in self.jobs)

    @cached_property
    def num_images(self) -> int:
        """What `max_rejected_fraction` is a fraction of; at least 1."""
        return num_counted(self.rejected) + sum(job.num_files for job in self.jobs)


def plan_ingest(source: str, config: IngestConfig, scratch: Scratch, progress: Progress = untold) -> IngestPlan:
    """InputError for everything wrong with the source or what the config says about it.

    `scratch` is for what must be unpacked to be read, and must stay until the jobs are done.
    """
    chosen = list_source(source, config, scratch, progress)
    if isinstance(chosen.source, AdoptedTars):
        return _plan_tars(source, chosen.source.tars, chosen.listing.rejected, config)
    return _plan_files(source, chosen, config)


def _plan_files(source: str, chosen: Opened, config: IngestConfig) -> IngestPlan:
    opened, listing = chosen.source, chosen.listing
    if not listing.images:
        raise InputError(f"{source}: {_why_no_images(listing)}")
    keys = order_keys(config.seed, listing.images.paths)
    listing.images = listing.images.reordered(np.lexsort((keys[:, 1], keys[:, 0])))
    paths = listing.images.paths
    root = root_folder(paths)
    others = [entry.path for entry in listing.rejected]
    table = table_rows(config.labels) if config.labels else []
    labels = _labels(config, table, listing, root, source)
    if listing.folders_are_classes:
        require_no_masks(source, paths, config.masks)
    annotations = find_annotations(config, paths, others, source)
    groups = read_groups(config, table, paths, others, source) if config.split.group else {}
    splits, hashed = _splits(source, chosen, root, groups, config)
    outside = [Rejected(path, "outside_splits", "in no split folder or list") for path in paths if path not in splits]
    ranges = _ranges_of_shards(listing.images, splits, labels, annotations, config.samples_per_shard)
    jobs = [
        WriteShard(name, split, opened, candidates, config.channels, annotations.rule, image_rule(config))
        for name, split, candidates in ranges
    ]
    return IngestPlan(
        identify(source, config),
        jobs,
        [*listing.rejected, *outside, *annotations.surplus],
        labels.classes,
        labels.label_sets,
        annotations,
        chosen.tars,
        _layout(config, listing, root, splits),
        getattr(opened, "lay_out", None),
        [
            *listing.notes,
            *unread_labels(listing.rejected, paths, chosen.tars),
            *(shares_of_splits(splits, config.split_fractions, len(set(groups.values()))) if hashed else ()),
        ],
    )


def _layout(config: IngestConfig, listing: Listing, root: str, splits: Mapping[str, str]) -> Layout:
    by_folders = config.splits == "folders" and not listing.splits and listing.folders_are_classes
    return read_layout(listing.images.paths, root, splits) if by_folders else Layout()


def image_rule(config: IngestConfig) -> ImageRule:
    return ImageRule(config.colour, config.max_side, config.quality, config.format, config.max_pixels, config.examine)


def num_workers(jobs: Sequence[ShardJob], config: IngestConfig) -> int:
    """As many as the config says, else one where starting more would not pay."""
    if config.processes is not None:
        return config.processes
    if len(jobs) < 2 or sum(job.num_bytes for job in jobs) < POOL_FROM_BYTES:
        return 1
    return available_cores()


def _labels(config: IngestConfig, table: Table, listing: Listing, root: str, source: str) -> Labels:
    """From the rows of the labels file, else as the source itself says, else from folders; with the names of
    `class_names`."""
    paths = listing.images.paths
    if config.labels:
        labels = read_labels(config.labels, table, paths, [entry.path for entry in listing.rejected], source)
        labels = _with_folders(labels, paths, root) if listing.folders_are_classes else labels
    elif listing.labels:
        known = listing.classes is not None
        labels = Labels(listing.labels, listing.classes) if known else number_classes(listing.labels)
    else:
        labels = number_folders(class_folders(paths, root) if listing.folders_are_classes else {})
    return name_classes(labels, config.class_names) if config.class_names else labels


def _with_folders(labels: Labels, paths: Sequence[str], root: str) -> Labels:
    """Splits of which the labels file names no image keep their class folders: ImageNet's train beside a flat val."""

    def split(path: str) -> str:
        return path[len(root) :].partition("/")[0]

    listed = {split(path) for path in labels.by_path}
    folders = class_folders([path for path in paths if split(path) not in listed], root)
    if labels.label_sets is not None or not folders or not set(labels.classes or ()) <= set(folders.values()):
        return labels
    return number_folders({path: labels.classes[number] for path, number in labels.by_path.items()} | folders)


def _splits(
    source: str, chosen: Opened, root: str, groups: Mapping[str, str], config: IngestConfig
) -> tuple[Mapping[str, str], bool]:
    """Path -> split, where an image outside all splits is missing; and whether they are by hash.

    InputError where a group is torn, or all are outside.
    """
    listing, hashed = chosen.listing, False
    paths = listing.images.paths
    if isinstance(config.splits, dict):
        splits = read_split_lists(config.splits, paths, [entry.path for entry in listing.rejected], source)
    else:
        splits = (listing.splits or folder_splits(paths, root)) if config.splits == "folders" else {}
        if hashed := not splits:
            splits = _hashed_splits(source, chosen, root, groups, config)
    if groups:
        require_whole_groups(groups, splits)
    if not splits:
        raise InputError(f"{source}: splits: not one of its {len(paths)} images is in a list")
    return splits, hashed


def _hashed_splits(
    source: str, chosen: Opened, root: str, groups: Mapping[str, str], config: IngestConfig
) -> Mapping[str, str]:
    listing = chosen.listing
    if config.splits == "folders" and listing.folders_are_classes:
        require_no_hidden_splits(source, listing.images.paths, root)
    if groups:
        return hash_group_splits(groups, config.split_fractions, config.seed)
    known = listing.stamps_are_hashes
    return hash_splits(chosen.source, listing.images, config.split_fractions, config.seed, stamps_are_hashes=known)


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


def _require_adoptable(source: str, config: IngestConfig) -> None:
    """InputError for a key that adopted tars cannot follow."""
    if config.labels:
        raise InputError(
            f"{config.labels}: labels: adopted tars carry .cls, .json or .txt members; with --set tars=rewrite (or "
            "archive) a labels file counts"
        )
    if config.masks or config.boxes:
        key = "masks" if config.masks else "boxes"
        raise InputError(f"{config.masks or config.boxes}: {key}: not of adopted tars; say --set tars=rewrite")
    if config.split.group:
        raise InputError(f"{source}: split.group: an adopted tar belongs to one split; say --set tars=rewrite")
    for key in REWRITING_KEYS:
        if (value := getattr(config, key)) != getattr(IngestConfig(), key):
            raise InputError(
                f"{source}: {key}: {value}: adopted tars stay as they are; leave it out, or say --set tars=rewrite"
            )
    if config.splits == "hash":
        raise InputError(
            f"{source}: splits: hash: an adopted tar belongs to one split; use folders (names), lists of tars, or say "
            "--set tars=rewrite"
        )


def _plan_tars(
    source: str, tars: Sequence[Location], beside: Sequence[Rejected], config: IngestConfig
) -> IngestPlan:  # fmt: skip
    _require_adoptable(source, config)
    if isinstance(config.splits, dict):
        splits = read_split_lists(config.splits, list(map(str, tars)))
    else:
        splits = {str(tar): split_of_tar(tar) or "train" for tar in tars}
    outside = [Rejected(str(tar), "outside_splits", "in no list") for tar in tars if str(tar) not in splits]
    tars = [tar for tar in tars if str(tar) in splits]
    surveys = {survey.tar: survey for survey in survey_tars(tars, config.processes)}
    rule = label_rule([surveys[tar] for tar in tars])
    if config.class_names:
        rule = replace(rule, classes=name_classes(Labels({}, rule.classes), config.class_names).classes)
    if not any(survey.num_samples for survey in surveys.values()):
        raise InputError(f"{source}: holds no samples; a sample is an image and its labels under one name")
    numbers: Counter[str] = Counter()
    shown = shown_names(tars)
    jobs = []
    for tar in sorted(tars, key=lambda tar: (SPLITS.index(splits[str(tar)]), str(tar))):
        split = splits[str(tar)]
        name = f"{split}-{numbers[split]:06d}.tar"
        numbers[split] += 1
        samples = surveys[tar].num_samples
        jobs.append(AdoptTar(name, split, tar, samples, rule, config.channels, image_rule(config), shown[tar]))
    return IngestPlan(identify(source, config), jobs, [*beside, *outside], rule.classes, tars="adopt")


def identify(source: str, config: IngestConfig) -> dict[str, Any]:
    """What makes it this dataset, in JSON's types: the source's name, and the config that shapes it."""
    said, default = config.model_dump(mode="json"), IngestConfig().model_dump(mode="json")
    reported = ["leakage_against"] if config.duplicates == "report" else []  # it changes the certificate alone
    unsaid = [*UNIDENTIFYING_KEYS, *reported, *(key for key in LATER_KEYS if said[key] == default[key])]
    return {"source": source_name(source), **{key: value for key, value in said.items() if key not in unsaid}}


def _why_no_images(listing: Listing) -> str:
    if not listing.rejected:
        return "is empty; a source holds images"
    suffixes = Counter(os.path.splitext(entry.path)[1].lower() or "no extension" for entry in listing.rejected)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(4))
    if hidden := sum(entry.reason == "hidden" for entry in listing.rejected):
        return f"holds no images but {hidden} in hidden folders, whose names begin with a dot; rename them"
    mixed = {".tar", ".zip"} <= suffixes.keys()
    hint = "; zips and tars are ingested one after the other: 'FOLDER/*.zip', 'FOLDER/*.tar'" if mixed else ""
    return f"holds no images among its {len(listing.rejected)} files ({kinds}){hint}"
