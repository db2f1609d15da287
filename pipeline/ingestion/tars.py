"""What existing WebDataset tars hold: their names, their samples, their labels. Adopting them is adopt.py's.

Members form samples as webdataset groups them: neighbours whose path is equal up to the first dot of the file's name.
Labels come from `.cls`, from `.json` (`label`, or `class` for a name) or from `.txt`, which holds labels only if no
text in any tar has more than one word: otherwise they are captions.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.errors import InputError
from pipeline.ingestion.labels import MAX_INTEGER_LABEL
from pipeline.ingestion.sources.listing import IMAGE_SUFFIXES
from pipeline.ingestion.splits import SPLIT_FOLDERS
from pipeline.shards.index import shortened
from pipeline.shards.table import NO_LABEL, split_member

META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset skips these


class TarMember(NamedTuple):
    name: str
    offset: int
    bytes: int

    def read(self, tar: BinaryIO) -> bytes:
        return os.pread(tar.fileno(), self.bytes, self.offset)


class TarSample(NamedTuple):
    """Neighbouring members with the same key; `members` by extension, which is all after the first dot."""

    key: str
    members: dict[str, TarMember]

    def images(self) -> list[TarMember]:
        """The image members; one with a bare extension stands for the sample, whatever `x.mask.png` lies beside it."""
        found = [extension for extension in self.members if f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES]
        bare = [extension for extension in found if "." not in extension]
        return [self.members[extension] for extension in bare or found]


class TarFault(Exception):
    """A tar that cannot be adopted; one line."""


def names_tars(source: str) -> bool:
    return source.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def expand_tars(source: str) -> list[Path]:
    """The tars of a path with braces (`{000..012}`, `{a,b}`) and globs, sorted; InputError if one is missing."""
    if not source.endswith(".tar"):
        raise InputError(f"{source}: a compressed tar has no offsets to read at; decompress it, or give the images")
    paths, problems = [], []
    for pattern in _expand_braces(source):
        found = glob.glob(pattern) if glob.has_magic(pattern) else [pattern] if os.path.isfile(pattern) else []
        paths += found
        if not found:
            problems.append(f"{pattern}: no such tar")
    if problems:
        raise InputError(*shortened(problems))
    return sorted(Path(os.path.abspath(path)) for path in set(paths))


def _expand_braces(pattern: str) -> Iterator[str]:
    if not (match := re.search(r"\{([^{}]*)\}", pattern)):
        yield pattern
        return
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = numbers.groups()
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def split_of_tar(path: Path) -> str:
    """The split in the file's name, else its folder: `imagenet-val-0003.tar`, `test/00.tar`; else train."""
    words = [*re.split(r"[^a-z]+", path.stem.lower()), path.parent.name.lower()]
    return next((SPLIT_FOLDERS[word] for word in words if word in SPLIT_FOLDERS), "train")


def read_samples(path: Path) -> tuple[list[TarSample], list[TarMember]]:
    """(samples, members that belong to none) of a tar; TarFault if it is cut, compressed or no tar."""
    samples: list[TarSample] = []
    others: list[TarMember] = []
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                end = info.offset_data
                if info.isreg():
                    end += info.size + -info.size % tarfile.BLOCKSIZE
                    _add_member(TarMember(info.name, info.offset_data, info.size), samples, others)
    except (tarfile.TarError, OSError) as error:
        last = f" after `{samples[-1].key}`" if samples else ""
        raise TarFault(f"{path}: not a whole, uncompressed tar ({error}){last}; fetch it again") from None
    # A tar that was cut between members, or is damaged in a header, ends like a whole one but for its end marker.
    with open(path, "rb") as file:
        marker = os.pread(file.fileno(), tarfile.BLOCKSIZE, end)
    if marker.strip(b"\0") or len(marker) < tarfile.BLOCKSIZE:
        last = f" after `{samples[-1].key}`" if samples else ""
        raise TarFault(f"{path}: cut or damaged at byte {end}{last}: no end-of-archive marker; fetch it again")
    return samples, others


def _add_member(member: TarMember, samples: list[TarSample], others: list[TarMember]) -> None:
    key, extension = split_member(member.name)
    if not key or META_MEMBER.match(member.name):
        others.append(member)
        return
    if not samples or samples[-1].key != key:
        samples.append(TarSample(key, {}))
    if extension in samples[-1].members:
        raise tarfile.ReadError(f"`{member.name}` is in it twice")
    samples[-1].members[extension] = member


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

    path: Path
    num_samples: int = 0
    labels: FoundLabels = field(default_factory=FoundLabels)
    texts: FoundLabels = field(default_factory=FoundLabels)
    captions: bool = False
    fault: str | None = None


def survey_tar(path: Path) -> TarSurvey:
    survey = TarSurvey(path)
    try:
        samples, _ = read_samples(path)
    except TarFault as fault:
        survey.fault = str(fault)
        return survey
    survey.num_samples = len(samples)
    with open(path, "rb") as tar:
        for sample in samples:
            survey.labels.add(*stated_label(sample, tar))
            if survey.fault is None and _states_several(sample, tar):
                survey.fault = (
                    f"{path}: sample `{sample.key}`: its .json lists `classes`, and tars whose images have several "
                    "are not adopted; ingest the images with a labels file"
                )
            text = _text(sample.members.get("txt"), tar)
            survey.captions |= len(text.split()) > 1
            survey.texts.add(*_integer_or_name(text))
    return survey


@dataclass(frozen=True)
class LabelRule:
    """How the labels of all tars become numbers."""

    classes: tuple[str, ...] | None
    numbers: Mapping[str, int] = field(default_factory=dict)  # by name, where tars give names alone
    from_text: bool = False

    def label(self, sample: TarSample, tar: BinaryIO) -> int:
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


def stated_label(sample: TarSample, tar: BinaryIO) -> tuple[int | None, str | None]:
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


def _states_several(sample: TarSample, tar: BinaryIO) -> bool:
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


def _text(member: TarMember | None, tar: BinaryIO) -> str:
    return member.read(tar).decode("utf-8", "replace").strip() if member else ""
