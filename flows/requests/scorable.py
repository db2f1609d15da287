"""What protocols need of datasets and models, asked before anything is submitted."""

from collections.abc import Mapping, Sequence

from pipeline.config.protocols import NEEDS
from pipeline.errors import InputError
from pipeline.registry.locate import ModelSource, unknown_classes
from pipeline.shards.index import DatasetIndex

LEARNED_FROM = "train"


def require_heads(protocols: Sequence[str], sources: Mapping[str, ModelSource], index: DatasetIndex) -> None:
    asked = [protocol for protocol in protocols if NEEDS[protocol].head]
    if not asked:
        return
    instead = "score it without its head: --protocol knn-20-v1 --protocol linear-cached-v1"
    with_heads = {name: source for name, source in sources.items() if source.num_classes}
    for name, source in (with_heads or sources).items():  # of several models those without one are left out
        if not source.num_classes:
            raise InputError(f"protocol {asked[0]} scores a model's own head, and {name} has none; {instead}")
        if reason := unknown_classes(source, index.classes if source.classes else ()):
            raise InputError(f"MODEL `{source.reference}`: {reason}; {instead}")
        if not source.classes and source.num_classes != index.num_classes:
            raise InputError(
                f"MODEL `{source.reference}`: its head is for {source.num_classes:,} classes without names, the "
                f"dataset has {index.num_classes:,}; {instead}"
            )


def require_scorable(
    index: DatasetIndex, protocols: Sequence[str], splits: Sequence[str], sources: Mapping[str, ModelSource]
) -> None:  # fmt: skip
    """InputError where the protocols cannot score these splits of a dataset: none of them is there, they are learned
    from, or their samples have no labels, masks or boxes."""
    if index.label_sets is not None and (others := [one for one in protocols if one != "classify-v1"]):
        raise InputError(
            f"{index.directory}: its images may be of several classes, and protocol {others[0]} is of one class an "
            "image; score it by --protocol classify-v1"
        )
    scored = [split for split in splits if split in index.splits and index.num_samples(split)]
    if not scored:
        raise InputError(
            f"{index.directory}: none of its splits ({', '.join(index.splits)}) is scored; hold images back when it is "
            "ingested (--set splits=hash), or score a model's own head on one: --protocol classify-v1 --set "
            f"splits=[{next(iter(index.splits))}]"
        )
    learned = [one for one in protocols if not NEEDS[one].head]
    if learned and LEARNED_FROM in scored:
        raise InputError(f"--set splits: protocol {learned[0]} learns from `{LEARNED_FROM}`, and is scored on others")
    if learned and not (LEARNED_FROM in index.splits and index.num_samples(LEARNED_FROM)):
        raise InputError(
            f"{index.directory}: protocol {learned[0]} learns from `{LEARNED_FROM}`, and there are: "
            f"{', '.join(index.splits)}"
        )
    if not all(NEEDS[protocol].dense for protocol in protocols):
        _require_labels(index, [*scored, *([LEARNED_FROM] if learned else [])])
    _require_annotations(protocols, index)
    _require_patches(protocols, sources)


def _require_annotations(protocols: Sequence[str], index: DatasetIndex) -> None:
    """InputError where a dense protocol is asked of a dataset without its masks or boxes, or without a train split."""
    for protocol in [protocol for protocol in protocols if NEEDS[protocol].dense]:
        what, classes = ("masks", index.mask_classes) if NEEDS[protocol].masks else ("boxes", index.box_classes)
        if not classes:
            hint = f"ingest the images again with --set {what}={'FOLDER' if what == 'masks' else 'FILE'}"
            raise InputError(f"{index.directory}: {protocol} needs {what}, and the dataset has none; {hint}")
        if LEARNED_FROM not in index.splits or not index.num_samples(LEARNED_FROM):
            raise InputError(f"{index.directory}: {protocol} learns from `train`, and there are: "
                             f"{', '.join(index.splits)}")  # fmt: skip


def _require_patches(protocols: Sequence[str], sources: Mapping[str, ModelSource]) -> None:
    asked = [protocol for protocol in protocols if NEEDS[protocol].dense]
    for source in sources.values() if asked else ():
        if not source.is_plain_vit:
            raise InputError(
                f"MODEL `{source.reference}`: {asked[0]} reads patch tokens of a plain ViT, and this is "
                f"{source.encoder['name']}"
            )


def _require_labels(index: DatasetIndex, splits: Sequence[str]) -> None:
    for split in [split for split in splits if split in index.splits]:
        if missing := index.num_unlabelled(split):
            raise InputError(
                f"{index.directory}: evaluation needs labels, and {missing:,} of {index.num_samples(split):,} samples "
                f"of `{split}` have none"
            )
