"""What existing WebDataset tars hold: their samples and their labels. Adopting them is adopting.py's.

Members form samples as webdataset groups them: neighbours whose path is equal up to the first dot of the file's name.
Labels come from `.cls`, from `.json` (`label`, or `class` for a name) or from `.txt`, which holds labels only if no
text in any tar has more than one word: otherwise they are captions.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from pipeline.errors import InputError
from pipeline.ingestion.archives.members import TarFault, tar_members
from pipeline.ingestion.archives.naming import stem
from pipeline.ingestion.labelling.labels import MAX_INTEGER_LABEL
from pipeline.ingestion.labelling.splits import SPLIT_FOLDERS
from pipeline.ingestion.rejected import Reason
from pipeline.ingestion.sources.listing import IMAGE_SUFFIXES
from pipeline.shards.index import shortened
from pipeline.shards.table import NO_LABEL, split_member
from pipeline.storage.location import Location
from pipeline.storage.random_access import PathFile, UrlFile, open_random

TarFile = PathFile | UrlFile

PARTNERS = ("cls", "json", "txt")  # members that say something of their sample's image
LOOKED_AT = 1000  # samples, to see what a tar is
META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset skips these


class TarMember(NamedTuple):
    name: str
    offset: int
    bytes: int

    def read(self, tar: TarFile) -> bytes:
        return tar.pread(self.bytes, self.offset)


class TarSample(NamedTuple):
    """Neighbouring members with the same key; `members` by extension, which is all after the first dot."""

    key: str
    members: dict[str, TarMember]

    def images(self) -> list[TarMember]:
        """The image members; one with a bare extension stands for the sample, whatever `x.mask.png` lies beside it."""
        found = [extension for extension in self.members if f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES]
        bare = [extension for extension in found if "." not in extension]
        return [self.members[extension] for extension in bare or found]

    def fault(self, seen: bool) -> tuple[Reason, str] | None:
        """Why this is no sample of one image; `seen`: whether its key was there before."""
        images = self.images()
        if seen:
            return "split_sample", "its key was there before, with other samples between"
        if not images:
            return "no_image", f"holds only {', '.join(self.members)}; a cut may have left its image elsewhere"
        if len(images) > 1:
            names = ", ".join(image.name for image in images[:3])
            return "several_images", f"{names}: a key ends at the first dot of the file's name"
        return None


def split_of_tar(tar: Location) -> str | None:
    """The split in the file's name, else its folder: `imagenet-val-0003.tar`, `test/00.tar`."""
    *_, folder, name = ("", *str(tar).split("/"))
    words = [*re.split(r"[^a-z]+", stem(name).lower()), folder.lower()]
    return next((SPLIT_FOLDERS[word] for word in words if word in SPLIT_FOLDERS), None)


def tar_samples(file: TarFile, shown: str) -> Iterator[TarSample | TarMember]:
    """The samples of a tar in their order, and members that belong to none; TarFault if it is cut or no tar."""
    sample: TarSample | None = None
    for info in tar_members(file, shown):
        if not info.isreg():
            continue
        member = TarMember(info.name, info.offset_data, info.size)
        key, extension = split_member(member.name)
        if not key or META_MEMBER.match(member.name):
            yield member
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = TarSample(key, {})
        if extension in sample.members:
            raise TarFault(f"{shown}: `{member.name}` is in it twice; mend the tar, or read it as --set tars=archive")
        sample.members[extension] = member
    if sample is not None:
        yield sample


@dataclass
class FoundLabels:
    """The labels of one kind of member: integers, names that stand alone, and names given beside an integer."""

    integers: set[int] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    integer_names: dict[int, str] = field(default_factory=dict)

    def add(self, integer: int | None, name: str | None) -> None:
        if integer is not None:
            self.integers.add(integer)
            if name is not None:
                self.integer_names[integer] = name
        elif name is not None:
            self.names.add(name)

    def merge(self, other: "FoundLabels") -> None:
        self.integers |= other.integers
        self.names |= other.names
        self.integer_names = other.integer_names | self.integer_names


@dataclass
class TarSurvey:
    """What one tar says about its samples before any image is decoded."""

    tar: Location
    num_samples: int = 0
    labels: FoundLabels = field(default_factory=FoundLabels)
    texts: FoundLabels = field(default_factory=FoundLabels)
    captions: bool = False
    fault: str | None = None


def survey_tar(tar: Location) -> TarSurvey:
    survey = TarSurvey(tar)
    try:
        with open_random(tar) as file:
            for sample in tar_samples(file, str(tar)):
                if isinstance(sample, TarSample):
                    _survey_sample(sample, file, survey)
    except TarFault as fault:
        survey.fault = str(fault)
    return survey


def _survey_sample(sample: TarSample, file: TarFile, survey: TarSurvey) -> None:
    survey.num_samples += 1
    survey.labels.add(*stated_label(sample, file))
    if survey.fault is None and _states_several(sample, file):
        survey.fault = (
            f"{survey.tar}: sample `{sample.key}`: its .json lists `classes`, and tars whose images have several are "
            "not taken; ingest the images with a labels file"
        )
    text = _text(sample.members.get("txt"), file)
    survey.captions |= len(text.split()) > 1
    survey.texts.add(*_integer_or_name(text))


def looks_like_samples(tar: Location) -> bool | None:
    """Whether a tar is WebDataset's, by its first members: an image has a partner of its key, with a label or caption.

    None where images lie in it alone, in no folder, which samples without labels do, and the files of one class.
    False where they lie in folders.
    """
    nested = False
    with open_random(tar) as file:
        for sample in islice(tar_samples(file, str(tar)), LOOKED_AT):
            if isinstance(sample, TarSample) and sample.images():
                if any(partner in sample.members for partner in PARTNERS):
                    return True
                nested |= "/" in sample.key.removeprefix("./")
    return False if nested else None


@dataclass(frozen=True)
class LabelRule:
    """How the labels of all tars become numbers."""

    classes: tuple[str, ...] | None
    numbers: Mapping[str, int] = field(default_factory=dict)  # by name, where tars give names alone
    from_text: bool = False

    def label(self, sample: TarSample, tar: TarFile) -> int:
        integer, name = stated_label(sample, tar)
        if integer is None and name is None and self.from_text:
            integer, name = _integer_or_name(_text(sample.members.get("txt"), tar))
        return integer if integer is not None else self.numbers.get(name or "", NO_LABEL)


def label_rule(surveys: Sequence[TarSurvey]) -> LabelRule:
    """InputError where tars cannot be adopted, or give integers here and names there."""
    if faults := [survey.fault for survey in surveys if survey.fault]:
        raise InputError(*shortened(faults))
    found = FoundLabels()
    from_text = not any(survey.captions for survey in surveys)
    for survey in surveys:
        found.merge(survey.labels)
        if from_text:
            found.merge(survey.texts)
    if found.integers and found.names:
        raise InputError(f"the tars give integer labels and also class names without one, such as `{min(found.names)}`")
    if found.integers and not 0 <= min(found.integers) <= max(found.integers) < MAX_INTEGER_LABEL:
        given = f"{min(found.integers)} to {max(found.integers)}"
        raise InputError(f"the tars hold labels from {given}; they must be 0..{MAX_INTEGER_LABEL - 1}")
    if found.integers:
        classes = tuple(found.integer_names.get(number, str(number)) for number in range(max(found.integers) + 1))
        return LabelRule(classes, from_text=from_text)
    classes = tuple(sorted(found.names))
    return LabelRule(classes or None, {name: number for number, name in enumerate(classes)}, from_text)


def stated_label(sample: TarSample, tar: TarFile) -> tuple[int | None, str | None]:
    """(integer, class name) from .cls, else from .json; None for what is not given."""
    if "cls" in sample.members:
        return _integer_or_name(_text(sample.members["cls"], tar))
    if "json" not in sample.members:
        return None, None
    try:
        record = json.loads(sample.members["json"].read(tar))
    except ValueError:
        return None, None
    if not isinstance(record, dict):
        return None, None
    label, name = record.get("label"), record.get("class")
    name = name if isinstance(name, str) and name else None
    if isinstance(label, int) and not isinstance(label, bool):
        return label, name
    return _integer_or_name(label) if isinstance(label, str) and label else (None, name)


def _states_several(sample: TarSample, tar: TarFile) -> bool:
    if "json" not in sample.members or "cls" in sample.members:  # which says the one label
        return False
    content = sample.members["json"].read(tar)
    if b'"classes"' not in content:
        return False
    try:
        record = json.loads(content)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("classes"), list)


def _integer_or_name(text: str) -> tuple[int | None, str | None]:
    return (int(text), None) if re.fullmatch(r"-?\d{1,18}", text) else (None, text or None)


def _text(member: TarMember | None, tar: TarFile) -> str:
    return member.read(tar).decode("utf-8", "replace").strip() if member else ""
