"""What the folders of a source say of splits beyond doubt, what they leave in doubt, and what lies beside them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pipeline.errors import InputError
from pipeline.ingestion.labelling.splits import SPLIT_FOLDERS, split_of_folder, splits_below_classes

NAMED = 5  # folders, in a message


class Layout(NamedTuple):
    """For the certificate: `findings` are to be looked at before training, `notes` are good to know."""

    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def require_no_hidden_splits(source: str, paths: Sequence[str], root: str) -> None:
    """InputError where folders look like splits and would be classes: `train2017/` beside `val2017/`, or `ant/train/`
    where not every class has them. Hashing would mix what the publisher kept apart."""
    fix = (
        "name folders train, validation, test, give lists (--set 'splits={train: a.txt, test: b.txt}'), or say "
        "--set splits=hash where they are none"
    )
    tops, seconds = Counter(), Counter()
    for path in paths:
        top, slash, rest = path[len(root) :].partition("/")
        second, deeper, _ = rest.partition("/")
        tops[top] += bool(slash)
        seconds[(top, second)] += bool(deeper)
    looks = {top: split for top, count in sorted(tops.items()) if count and (split := _like_split(top))}
    if "train" in looks.values() and len(set(looks.values())) > 1:
        raise InputError(f"{source}: splits: {_named(looks)} look like splits, not classes; {fix}")
    below = {f"{top}/{second}": split for (top, second), count in sorted(seconds.items())
             if count and (split := split_of_folder(second))}  # fmt: skip
    if "train" in below.values() and len(set(below.values())) > 1:
        beside = next(path for path in paths if not _below_split(path[len(root) :]))
        raise InputError(f"{source}: splits: {_named(below)} look like splits, but {beside} is in none; {fix}")


def read_layout(paths: Sequence[str], root: str, splits: Mapping[str, str]) -> Layout:
    """Of a source whose folders say the splits: `splits`, path -> split, of all images that are in one."""
    findings, notes = [], []
    outside = Counter(path[len(root) :].rpartition("/")[0].partition("/")[0] for path in paths if path not in splits)
    for folder, count in sorted(outside.items()):
        what = f"the folder {folder}" if folder else "no folder"
        findings.append(f"{count:,} image{'s' * (count > 1)} in {what} beside the split folders left out")
    on_top = any(split_of_folder(path[len(root) :].split("/")[0]) for path in paths)
    if not on_top and splits_below_classes(paths, root):
        notes.append("the splits are the folders below the classes, such as " + paths[0].rpartition("/")[0])
    return Layout(tuple(findings), tuple(notes))


def _like_split(name: str) -> str | None:
    """The split that a word of the name is: `train2017`, `Test_Images`."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_FOLDERS[word] for word in words if word in SPLIT_FOLDERS), None)


def _below_split(path: str) -> bool:
    _, *below = path.split("/")
    return len(below) > 1 and split_of_folder(below[0]) is not None


def _named(folders: Iterable[str]) -> str:
    names = list(folders)
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
