"""Files that name images of a source: labels (.csv, .tsv, .jsonl) and split lists. Classes become numbers here."""

import csv
import io
import json
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from pipeline.errors import InputError
from pipeline.shards.index import shortened
from pipeline.shards.label_sets import LabelSets

FILE_COLUMNS = ("path", "file", "filename", "file_name", "image", "id", "key")
LABEL_COLUMNS = ("class", "label")
SET_COLUMNS = ("classes", "labels")
SET_SEPARATOR = ";"  # of a cell; a .jsonl has lists
MAX_INTEGER_LABEL = 100_000  # a larger integer is an identifier that serves as a name
NO_CLASS = re.compile(r"-\d+|-?\d+\.\d*")  # a mark for "none", or what a spreadsheet makes of integers and empty cells
ABSOLUTE = re.compile(r"/|\\|[A-Za-z]:[\\/]")

Value = TypeVar("Value")
Table = Sequence[tuple[int, Mapping[str, object]]]  # (line, row), as `table_rows` reads it


class Labels(NamedTuple):
    """`by_path` gives a label per image; those that have none are missing there."""

    by_path: Mapping[str, int]
    classes: tuple[str, ...] | None
    label_sets: LabelSets | None = None  # where images have several classes: those that each label stands for


def number_classes(names: Mapping[str, str]) -> Labels:
    """Path -> class name as numbers: small integers are their own label, any other names are sorted and numbered."""
    distinct = set(names.values())
    if not distinct:
        return Labels({}, None)
    if all(name.isascii() and name.isdigit() and int(name) < MAX_INTEGER_LABEL for name in distinct):
        by_path = {path: int(name) for path, name in names.items()}
        return Labels(by_path, tuple(map(str, range(max(by_path.values()) + 1))))
    return Labels(*_sorted_classes(names))


def number_sets(names: Mapping[str, tuple[str, ...]]) -> Labels:
    """Path -> class names as numbers of sets, which are sorted by their classes' numbers; classes as in
    `number_classes`."""
    known = number_classes({name: name for several in names.values() for name in several})
    by_path = {path: tuple(sorted({known.by_path[name] for name in several})) for path, several in names.items()}
    sets = tuple(sorted(set(by_path.values())))
    numbers = {numbered: number for number, numbered in enumerate(sets)}
    return Labels({path: numbers[numbered] for path, numbered in by_path.items()}, known.classes, sets)


def number_folders(folders: Mapping[str, str]) -> Labels:
    """Path -> class folder as numbers; always the sorted names, as torchvision's ImageFolder numbers them."""
    return Labels(*_sorted_classes(folders)) if folders else Labels({}, None)


def _sorted_classes(names: Mapping[str, str]) -> tuple[dict[str, int], tuple[str, ...]]:
    classes = tuple(sorted(set(names.values())))
    numbers = {name: number for number, name in enumerate(classes)}
    return {path: numbers[name] for path, name in names.items()}, classes


def name_classes(labels: Labels, path: Path) -> Labels:
    """`labels`, their numbers named by the lines of `path`; InputError unless it names every class that is there."""
    names = tuple(line.strip() for line in _read_text(path, "class_names").rstrip().splitlines())
    classes = labels.classes
    if classes is None:
        raise InputError(f"{path}: class_names: the source has no labels to name; leave the key out")
    if classes != tuple(map(str, range(len(classes)))):
        raise InputError(f"{path}: class_names: the classes have names, such as {classes[0]}; leave the key out")
    if len(names) < len(classes):
        fix = "write the name of class 0 in the first line, and one for each"
        raise InputError(f"{path}: class_names: {len(names)} names, but labels go up to {len(classes) - 1}; {fix}")
    seen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name or seen.setdefault(name, number) != number:
            what = f"{name!r} is also in line {seen[name]}" if name else "an empty line"
            raise InputError(f"{path}:{number}: class_names: {what}; a line is the name of one class")
    return labels._replace(classes=names)


def read_labels(
    path: Path, table: Table, files: Sequence[str], others: Sequence[str] = (), source: str = ""
) -> Labels:  # fmt: skip
    """The labels that the rows of `path` give to `files`; InputError for one that names none of them or of `others`."""
    if any(column in row for _, row in table for column in SET_COLUMNS):
        sets = match_files(sets_of_rows(path, table), files, path, others, source=source)
        if not any(sets.values()):
            raise InputError(f"{path}: {' or '.join(SET_COLUMNS)}: no row of a file in the source names a class")
        return number_sets({file: names for file, names in sets.items() if names is not None})
    rows = _labels_of_rows(path, table)
    matched = match_files(rows, files, path, others, source=source)
    return number_classes({file: name for file, name in matched.items() if name})


def read_split_lists(
    lists: Mapping[str, Path], files: Sequence[str], others: Sequence[str] = (), source: str = ""
) -> dict[str, str]:
    """File -> split, from one list of files per split; a file in two lists is an InputError."""
    splits: dict[str, str] = {}
    problems = []
    for split, path in lists.items():
        names = {line.strip(): split for line in _read_text(path, "splits").splitlines() if line.strip()}
        for file in match_files(names, files, path, others, source=source):
            if splits.setdefault(file, split) != split:
                problems.append(f"{path}: {file}: also in the list of `{splits[file]}`; a file belongs to one split")
    if problems:
        raise InputError(*shortened(problems))
    return splits


def match_files(
    rows: Mapping[str, Value], files: Sequence[str], listed_in: Path, others: Sequence[str] = (),
    hint: str = "rows name a path, a name or an id", source: str = "",
) -> dict[str, Value]:  # fmt: skip
    """File -> value, where a row names a file by its path, the end of its path, or its name.

    Extensions may be left out; the most exact name wins. A name that is no file's is read once more as a path of
    Windows, an absolute one below `source` (or below one folder of another machine, the same for all such names, where
    the rest is a whole path), or one relative to the folder of `listed_in`. A row may also name one of
    `others`, files of the source that are no images. A row that names no file, or several, is an InputError.
    """
    named = _files_by_name(rows, files)
    if unknown := [name for name in rows if name not in named]:
        named |= _files_by_other_names(unknown, files, listed_in, source)
        named |= _files_of_another_machine([name for name in unknown if name not in named], files)
        known = {name for file in others for name in possible_names(file)}
        unknown = [name for name in unknown if name not in named and name not in known]
    here = "; absolute paths are below the source, or all below one folder of another machine; else write them relative"
    hints = {name: hint + here * bool(ABSOLUTE.match(name)) for name in unknown}
    problems = [f"{listed_in}: {name}: no such file in the source; {hints[name]}" for name in unknown]
    found: dict[str, Value] = {}
    for name, same in named.items():
        if len(same) > 1:
            problems.append(f"{listed_in}: {name}: names {len(same)} files, {same[0]} and {same[1]}; write the path")
        elif found.setdefault(same[0], rows[name]) != rows[name]:
            problems.append(f"{listed_in}: {name}: {same[0]} has another row that says otherwise; a file has one row")
    if problems:
        raise InputError(*shortened(problems))
    return found


def _files_by_name(names: Container[str], files: Iterable[str]) -> dict[str, list[str]]:
    named: dict[str, list[str]] = {}
    for file in files:
        name = next((name for name in possible_names(file) if name in names), None)
        if name is not None:
            named.setdefault(name, []).append(file)
    return named


def _files_by_other_names(
    names: Sequence[str], files: Iterable[str], listed_in: Path, source: str
) -> dict[str, list[str]]:
    """Name -> its files, where a name is a path of another system or does not begin in the source."""
    roots = {f"{root.rstrip('/')}/" for root in (os.path.abspath(source), os.path.realpath(source))}
    folder = os.path.abspath(listed_in.parent)
    meant: dict[str, str] = {}  # what the name may mean -> the name
    for name in names:
        slashed = name.replace("\\", "/")
        absolute = os.path.normpath(os.path.join(folder, slashed))
        below = [absolute.removeprefix(root) for root in roots if absolute.startswith(root)] if source else []
        for candidate in {slashed, *below} - {name}:
            meant.setdefault(candidate, name)
    found: dict[str, list[str]] = {}
    for candidate, same in (_files_by_name(meant, files) if meant else {}).items():
        found.setdefault(meant[candidate], []).extend(same)
    return found


def _files_of_another_machine(names: Sequence[str], files: Iterable[str]) -> dict[str, list[str]]:
    """Name -> its file, for absolute paths that end in a file's whole path, all below the same folder.

    Some of these must have a folder in them: by names alone, a row of train could label an image of val.
    """
    absolute = {name: name.replace("\\", "/") for name in names if ABSOLUTE.match(name)}
    if not absolute:
        return {}
    whole = {known: file for file in files for known in (os.path.splitext(file)[0], file)}
    found: dict[str, list[str]] = {}
    above = set()
    for name, slashed in absolute.items():
        starts = (at for at, character in enumerate(slashed, 1) if character == "/")
        start = next((start for start in starts if slashed[start:] in whole), None)
        if start is not None:
            found[name] = [whole[slashed[start:]]]
            above.add(slashed[:start])
    in_folders = any("/" in file for files in found.values() for file in files)
    return found if len(above) == 1 and in_folders else {}


def possible_names(file: str) -> Iterable[str]:
    parts = file.split("/")
    for start in range(len(parts)):
        tail = "/".join(parts[start:])
        yield tail
        yield os.path.splitext(tail)[0]


def file_of_row(row: Mapping[str, object]) -> str | None:
    """What names a row's file, "" where that is empty; None where it has no such column."""
    column = next((column for column in FILE_COLUMNS if column in row), None)
    return None if column is None else str(row[column] or "").strip().removeprefix("./")


def _labels_of_rows(path: Path, rows: Iterable[tuple[int, Mapping[str, object]]]) -> dict[str, str]:
    labels: dict[str, str] = {}
    problems = []
    for line, row in rows:
        name = file_of_row(row)
        label_column = next((column for column in LABEL_COLUMNS if column in row), None)
        if name is None or label_column is None:
            wanted = FILE_COLUMNS if name is None else LABEL_COLUMNS
            columns = ", ".join(map(str, row))
            raise InputError(f"{path}:{line}: none of the columns {', '.join(wanted)}; it has: {columns}")
        value = row[label_column]
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


def sets_of_rows(
    path: Path, rows: Iterable[tuple[int, Mapping[str, object]]]
) -> dict[str, tuple[str, ...] | None]:  # fmt: skip
    """File -> the names of its classes, sorted; () for none of them, None where it has no label."""
    sets: dict[str, tuple[str, ...] | None] = {}
    problems = []
    for line, row in rows:
        name = file_of_row(row)
        columns = [column for column in (*SET_COLUMNS, *LABEL_COLUMNS) if column in row]
        if name is None or len(columns) != 1 or columns[0] not in SET_COLUMNS:
            rule = f"a row has one of {', '.join(FILE_COLUMNS)}, and one of {' and '.join(SET_COLUMNS)} alone"
            raise InputError(f"{path}:{line}: {rule}; it has: {', '.join(map(str, row))}")
        value = row[columns[0]]
        names, rule = _names_of_set(value)
        if not name or rule:
            problems.append(f"{path}:{line}: {columns[0]} {value!r}: {rule or 'the row names no file'}")
        elif sets.setdefault(name, names) != names:
            problems.append(f"{path}:{line}: {name}: {columns[0]} {value!r}, but {sets[name]!r} in an earlier row")
    if problems:
        raise InputError(*shortened(problems))
    return sets


def _names_of_set(value: object) -> tuple[tuple[str, ...] | None, str | None]:
    """(names, what is wrong with the value)."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None, None
    parts = value.split(SET_SEPARATOR) if isinstance(value, str) else value
    rule = f"expected integers from 0 or class names, in a list or joined by `{SET_SEPARATOR}`, each once"
    if not isinstance(parts, list) or any(isinstance(part, bool) or not isinstance(part, str | int) for part in parts):
        return None, rule
    names = [str(part).strip() for part in parts]
    wrong = any(not name or NO_CLASS.fullmatch(name) for name in names) or len(set(names)) < len(names)
    return (None, rule) if wrong else (tuple(sorted(names)), None)


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
