"""`.ingest.jsonl` in the dataset's directory: which shards are finished, so that a killed ingestion goes on.

The first line is the dataset's identity, each further line one finished shard, appended after its files are safely in
place. A line torn by a kill is cut off at the next start, and one that a fault of the disk damaged counts for nothing.
The open file is locked: one ingestion per directory.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import InputError
from pipeline.ingestion.archives.unpacking import UNPACKED_PREFIX, remove_unpacked
from pipeline.ingestion.counts import ImageCounts
from pipeline.ingestion.duplicates.hash_file import hash_path, read_hashes
from pipeline.ingestion.locks import locked
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.shard_contract import ShardSummary
from pipeline.ingestion.statistics import ImageTotals
from pipeline.shards.atomic import TEMPORARY_PREFIX, remove_temporaries, sync_directory
from pipeline.shards.index import Shard, shortened, table_name
from pipeline.storage.location import joined, size_of

JOURNAL_NAME = ".ingest.jsonl"


class Journal:
    """The finished shards of one dataset directory, by shard name. Use `open_journal`."""

    def __init__(self, directory: Path, file: BinaryIO):
        self._directory, self._file = directory, file
        self._finished: dict[str, tuple[str, ShardSummary]] = {}
        for line in file.read().splitlines()[1:]:
            if known := _finished_shard(line):
                self._finished[known[1].name] = known

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def finished(self, name: str, key: str) -> ShardSummary | None:
        """The summary of this shard if it was made from these inputs and its files still have their sizes."""
        known, summary = self._finished.get(name, (None, None))
        if known != key or summary is None:
            return None
        return summary if summary.shard is None or self._is_there(summary.shard) else None

    def examined(self, name: str, job: str) -> ShardSummary | None:
        """The same whatever copies it was left without, if the hashes of all its images are there."""
        known, summary = self._finished.get(name, ("", None))
        if summary is None or summary.job != job:
            return None
        hashes = read_hashes(hash_path(self._directory, name), summary.shard)
        return self.finished(name, known) if hashes is not None and hashes.job.hex() == job else None

    def add(self, key: str, summary: ShardSummary) -> None:
        line = json.dumps({"key": key, "summary": asdict(summary)}).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._finished[summary.name] = (key, summary)

    def names(self) -> set[str]:
        """Every shard that was ever finished here."""
        return set(self._finished)

    def _is_there(self, shard: Shard) -> bool:
        try:
            size = size_of(joined(self._directory, shard.location or shard.name))
            return size == shard.bytes and (self._directory / table_name(shard.name)).is_file()
        except OSError:
            return False


def check_destination(directory: Path, identity: Mapping[str, Any]) -> None:
    """InputError unless `directory` is absent, empty, or holds this dataset, finished or not."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InputError(f"{directory}: not a directory; name one that does not exist yet")
    names = {name for name in os.listdir(directory) if not name.startswith((TEMPORARY_PREFIX, UNPACKED_PREFIX))}
    if names and JOURNAL_NAME not in names:
        raise InputError(f"{directory}: holds other files, such as {min(names)}; name one that does not exist yet")
    if not names:
        return
    _check_header(directory, (directory / JOURNAL_NAME).read_bytes().partition(b"\n")[:2], identity)


def _check_header(directory: Path, header: tuple[bytes, bytes], identity: Mapping[str, Any]) -> None:
    """InputError unless the journal's (first line, its end) are of this identity, or not whole."""
    line, newline = header
    if not newline:
        return  # killed before its first line was whole
    try:
        known = dict(json.loads(line))
    except (ValueError, TypeError):
        raise InputError(f"{directory / JOURNAL_NAME}: not readable; remove {directory} or name another") from None
    problems = [
        f"{directory}: another dataset: {key} is {known.get(key)!r} there, {identity.get(key)!r} now; name another"
        for key in sorted(known.keys() | identity.keys())
        if known.get(key) != identity.get(key)
    ]
    if problems:
        raise InputError(*shortened(problems))


def open_journal(directory: Path, identity: Mapping[str, Any]) -> Journal:
    """The locked journal of `directory`, begun if there is none; InputError where it is of another dataset by now."""
    file = open(os.open(directory / JOURNAL_NAME, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        if not locked(file, directory):
            raise InputError(f"{directory}: another ingestion is writing here; wait for it, or stop it")
        content = file.read()
        _check_header(directory, content.partition(b"\n")[:2], identity)
        remove_temporaries(directory)
        remove_unpacked(directory)
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
        file.seek(0)
        if not whole:
            file.write(json.dumps(dict(identity)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            sync_directory(directory)
            file.seek(0)
        return Journal(directory, file)
    except BaseException:
        file.close()
        raise


def _finished_shard(line: bytes) -> tuple[str, ShardSummary] | None:
    """(its key, its summary); None where the line is damaged, so that the shard is made again."""
    try:
        content = json.loads(line)
        return content["key"], _summary(content["summary"])
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
        return None


def _summary(content: dict[str, Any]) -> ShardSummary:
    shard = None if content["shard"] is None else Shard(**content["shard"])
    rejected = [Rejected(**entry) for entry in content["rejected"]]
    counts = None if content.get("counts") is None else ImageCounts(**content["counts"])
    totals = ImageTotals(**content["totals"])
    return ShardSummary(**{**content, "shard": shard, "totals": totals, "rejected": rejected, "counts": counts})
