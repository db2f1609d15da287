"""Files that name images of a source: labels (.csv, .tsv, .jsonl) and split lists. Classes become numbers here."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from pipeline.errors import InputError
from pipeline.shards.index import shortened

FILE_COLUMNS = ("path", "file", "filename", "file_name", "image", "id", "key")
LABEL_COLUMNS = ("class", "label")
MAX_INTEGER_LABEL = 100_000  # a larger integer is an identifier that serves as a name
NO_CLASS = re.compile(r"-\d+|-?\d+\.\d*")  # a mark for "none", or what a spreadsheet makes of integers and empty cells

Value = TypeVar("Value")


class Labels(NamedTuple):
    """`by_path` gives a label per image; those that have none are missing there."""

    by_path: Mapping[str, int]
    classes: tuple[str, ...] | None


def number_classes(names: Mapping[str, str]) -> Labels:
    """Path -> class name as numbers: small integers are their own label, any other names are sorted and numbered."""
    distinct = set(names.values())
    if not distinct:
        return Labels({}, None)
    if all(name.isascii() and name.isdigit() and int(name) < MAX_INTEGER_LABEL for name in distinct):
        by_path = {path: int(name) for path, name in names.items()}
        return Labels(by_path, tuple(map(str, range(max(by_path.values()) + 1))))
    return Labels(*_sorted_classes(names))


def number_folders(folders: Mapping[str, str]) -> Labels:
    """Path -> class folder as numbers; always the sorted names, as torchvision's ImageFolder numbers them."""
    return Labels(*_sorted_classes(folders)) if folders else Labels({}, None)


def _sorted_classes(names: Mapping[str, str]) -> tuple[dict[str, int], tuple[str, ...]]:
    classes = tuple(sorted(set(names.values())))
    numbers = {name: number for number, name in enumerate(classes)}
    return {path: numbers[name] for path, name in names.items()}, classes


def read_labels(path: Path, files: Sequence[str], others: Sequence[str] = ()) -> Labels:
    """The labels that `path` gives to `files`; a row that names none of them, nor of `others`, is an InputError."""
    rows = _labels_of_rows(path, table_rows(path))
    return number_classes({file: name for file, name in match_files(rows, files, path, others).items() if name})


def read_split_lists(lists: Mapping[str, Path], files: Sequence[str], others: Sequence[str] = ()) -> dict[str, str]:
    """File -> split, from one list of files per split; a file in two lists is an InputError."""
    splits: dict[str, str] = {}
    problems = []
    for split, path in lists.items():
        names = {line.strip(): split for line in _read_text(path, "splits").splitlines() if line.strip()}
        for file in match_files(names, files, path, others):
            if splits.setdefault(file, split) != split:
                problems.append(f"{path}: {file}: also in the list of `{splits[file]}`; a file belongs to one split")
    if problems:
        raise InputError(*shortened(problems))
    return splits


def match_files(
    rows: Mapping[str, Value], files: Sequence[str], listed_in: Path, others: Sequence[str] = (),
    hint: str = "rows name a path, a name or an id",
) -> dict[str, Value]:  # fmt: skip
    """File -> value, where a row names a file by its path, the end of its path, or its name.

    Extensions may be left out; the most exact name wins. A row may also name one of `others`, files of the source that
    are no images. A row that names no file, or several, is an InputError.
    """
    found: dict[str, Value] = {}
    named: dict[str, list[str]] = {}
    for file in files:
        name = next((name for name in _possible_names(file) if name in rows), None)
        if name is not None:
            found[file] = rows[name]
            named.setdefault(name, []).append(file)
    unknown = [name for name in rows if name not in named]
    if unknown:
        known = {name for file in others for name in _possible_names(file)}
        unknown = [name for name in unknown if name not in known]
    problems = [f"{listed_in}: {name}: no such file in the source; {hint}" for name in unknown]
    problems += [
        f"{listed_in}: {name}: names {len(same)} files, {same[0]} and {same[1]}; write the path"
        for name, same in named.items()
        if len(same) > 1
    ]
    if problems:
        raise InputError(*shortened(problems))
    return found


def _possible_names(file: str) -> Iterable[str]:
    parts = file.split("/")
    for start in range(len(parts)):
        tail = "/".join(parts[start:])
        yield tail
        yield os.path.splitext(tail)[0]


def _labels_of_rows(path: Path, rows: Iterable[tuple[int, Mapping[str, object]]]) -> dict[str, str]:
    labels: dict[str, str] = {}
    problems = []
    for line, row in rows:
        file_column = next((column for column in FILE_COLUMNS if column in row), None)
        label_column = next((column for column in LABEL_COLUMNS if column in row), None)
        if file_column is None or label_column is None:
            wanted = FILE_COLUMNS if file_column is None else LABEL_COLUMNS
            columns = ", ".join(map(str, row))
            raise InputError(f"{path}:{line}: none of the columns {', '.join(wanted)}; it has: {columns}")
        value = row[label_column]
        name = str(row[file_column] or "").strip().removeprefix("./")
        label = "" if value is None else str(value).strip()  # an empty cell: no label
        if not name or isinstance(value, (bool, float, list, dict)) or NO_CLASS.fullmatch(label):
            rule = "a row holds a file and an integer from 0, a class name, or nothing where there is no label"
            problems.append(f"{path}:{line}: {label_column} {value!r}: {rule}")
        elif labels.setdefault(name, label) != label:
            problems.append(f"{path}:{line}: {name}: {label_column} {label!r}, but {labels[name]!r} in an earlier row")
    if problems:
        raise InputError(*shortened(problems))
    if not labels:
        raise InputError(f"{path}: holds no rows")
    return labels


def table_rows(path: Path, key: str = "labels") -> list[tuple[int, Mapping[str, object]]]:
    """(line, row) of a .csv, .tsv or .jsonl; InputError where it is none. `key` is what names it in the config."""
    text = _read_text(path, key)
    match path.suffix.lower():
        case ".csv" | ".tsv" as suffix:
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="," if suffix == ".csv" else "\t")
            return [(reader.line_num, {key.strip(): value for key, value in row.items() if key}) for row in reader]
        case ".jsonl":
            lines = enumerate(text.splitlines(), 1)
            return [(number, _json_row(path, number, line)) for number, line in lines if line.strip()]
        case suffix:
            raise InputError(f"{path}: {key}: `{suffix}` is not one of .csv, .tsv, .jsonl")


def _json_row(path: Path, number: int, line: str) -> Mapping[str, object]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}:{number}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{path}:{number}: a row is an object with a file and more, this is a {type(row).__name__}")
    return row


def _read_text(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        hint = "the path is relative to the working directory"
        raise InputError(f"{path}: {key}: cannot be read ({error.strerror}); {hint}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: {key}: not UTF-8 text") from None
