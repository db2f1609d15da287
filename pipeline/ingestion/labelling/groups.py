"""Images that belong together, by a column of the labels file or a pattern of their path, are in one split."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.labelling.labels import Table, file_of_row, match_files
from pipeline.ingestion.labelling.splits import hash_number, split_at
from pipeline.shards.index import shortened


def read_groups(
    config: IngestConfig, table: Table, files: Sequence[str], others: Sequence[str] = (), source: str = ""
) -> dict[str, str]:
    """File -> its group, of every file, by the rows of the labels file or by its path.

    InputError where a file has none, or two rows say otherwise, or the key means nothing.
    """
    asked = config.split.group
    columns = {column: None for _, row in table for column in row}
    if asked in columns:
        groups = match_files(_groups_of_rows(config.labels, table, asked), files, config.labels, others, source=source)
        found = f"{config.labels}: its column `{asked}` says"
    else:
        pattern = _pattern(asked, columns)
        matches = {file: pattern.search(file) for file in files}
        groups = {file: match[1] for file, match in matches.items() if match}
        found = f"the pattern {asked} finds"
    if lost := [file for file in files if not groups.get(file)]:
        raise InputError(
            f"split.group: {found} no group of {len(lost)} images, such as {lost[0]}; every image belongs to one"
        )
    return groups


def hash_group_splits(groups: Mapping[str, str], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """File -> split, by a hash of its group's name."""
    numbers = {
        group: hash_number(f"{seed}:group:{group}".encode(errors="surrogateescape")) for group in set(groups.values())
    }
    return {file: split_at(numbers[group], fractions) for file, group in groups.items()}


def require_whole_groups(groups: Mapping[str, str], splits: Mapping[str, str]) -> None:
    """InputError where two images of a group are in different splits; what is in no split does not count."""
    first: dict[str, str] = {}
    torn: dict[str, str] = {}
    for file, split in splits.items():
        kept = first.setdefault(groups[file], file)
        if splits[kept] != split:
            torn.setdefault(
                groups[file],
                f"split.group: `{groups[file]}` is in two splits: {kept} in {splits[kept]}, {file} in {split}",
            )
    if torn:
        raise InputError(*shortened([torn[group] for group in sorted(torn)]))


def _groups_of_rows(path: Path, table: Table, column: str) -> dict[str, str]:
    groups: dict[str, str] = {}
    problems = []
    for line, row in table:
        name, value = file_of_row(row) or "", row.get(column)
        group = "" if value is None else str(value).strip()
        if groups.setdefault(name, group) != group:
            problems.append(f"{path}:{line}: {name}: {column} {group!r}, but {groups[name]!r} in an earlier row")
    if problems:
        raise InputError(*shortened(problems))
    return groups


def _pattern(asked: str, columns: Mapping[str, None]) -> re.Pattern[str]:
    known = f"; the labels file has the columns {', '.join(columns)}" if columns else ""
    hint = f"write one with a group in parentheses, as 'split.group=patient([0-9]+)'{known}"
    try:
        pattern = re.compile(asked)
    except re.error as error:
        raise InputError(f"split.group: {asked}: not a regular expression ({error}); {hint}") from None
    if not pattern.groups:
        raise InputError(f"split.group: {asked}: neither a column of a labels file nor a pattern; {hint}")
    return pattern
