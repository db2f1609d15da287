"""Parquet files with images, and datasets that Hugging Face's `datasets` saved on disk: Arrow's batches either way.

A saved dataset is not compressed, so its images are read where they lie. A row group of parquet has to be unpacked
whole, which a shuffled order would do once for every image; so each file's images go to a spool, once.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.errors import InputError
from pipeline.ingestion.progress import Counted
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.sources.listing import Listing
from pipeline.ingestion.tables.columns import Columns, choose_columns, image_bytes, unread_columns
from pipeline.ingestion.tables.listing import HASH_BITS, MOST_LABEL, add_row, numbered_classes, row_path
from pipeline.ingestion.tables.names import SaidColumns, saved_folders
from pipeline.ingestion.tables.rows import Rows, spooled

STREAM = ".arrow"
BATCH_BYTES, MAX_BATCH_ROWS = 16 << 20, 4096
BUFFER_BYTES = 1 << 20  # a column of a row group is read through it, not whole
SPLIT_WORDS = {
    "train": "train", "training": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}  # fmt: skip
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
NO_BYTES = -1  # in an index: the row holds no image


def find_saved(root: Path, names: Sequence[str]) -> list[str]:
    """The Arrow files of saved datasets, in the order that their state.json says."""
    return [folder + name for folder in saved_folders(names) for name in _saved_files(root / folder / "state.json")]


def list_arrow(
    root: Path, tables: Sequence[str], listing: Listing, said: SaidColumns, listed: Counted | None = None
) -> None:
    """Add every row to `listing`. InputError for a damaged table, and where columns are missing or do not agree."""
    chosen: tuple[str, Columns] | None = None
    for number, table in enumerate(tables):
        if listed is not None:
            listed(number, len(tables))
        with _opened(root / table) as opened:
            columns = choose_columns(opened.schema, said, root / table)
            if chosen is None:
                listing.notes += unread_columns(opened.schema, columns)
            first, agreed = chosen = chosen or (table, columns)
            if columns != agreed:
                difference = f"columns {_in_words(columns)}, but {_in_words(agreed)} in {first}"
                raise InputError(f"{root / table}: {difference}; name a folder with the tables of one set")
            _list_rows(root, table, opened.batches(columns.read), columns, _split_of(root, table), listing)
    if chosen is not None and not chosen[1].text_labels:
        listing.classes = numbered_classes(listing.labels.values(), chosen[1].class_names)


def locate_arrow(path: Path, scratch: Path, said: SaidColumns) -> Rows:
    if path.suffix.lower() == STREAM and (ranges := _ranges_in_stream(path, said)) is not None:
        return Rows(path, *ranges)
    spool = spooled(scratch, path, f"images {said.image}", lambda file: _spool(path, said, file))
    return Rows(spool, *np.load(spool.with_suffix(".npy")))


class _Opened(NamedTuple):
    schema: pa.Schema
    batches: Callable[[list[str]], Iterator[pa.RecordBatch]]  # of columns; of a stream they have the others, too


@contextmanager
def _opened(path: Path, mapped: pa.MemoryMappedFile | None = None) -> Iterator[_Opened]:
    """A table, read in batches, whatever the size of a row group. InputError where it is damaged."""
    try:
        if path.suffix.lower() == STREAM:
            _require_end(path)
            with pa.ipc.open_stream(mapped or pa.memory_map(str(path))) as stream:
                yield _Opened(stream.schema, lambda columns: stream)
        else:
            with pq.ParquetFile(
                path, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True
            ) as file:
                yield _Opened(file.schema_arrow, partial(_parquet_batches, file))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cut or damaged ({why}); fetch or save it again") from None


def _parquet_batches(file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
    mean_bytes = sum(group.total_byte_size for group in groups) / max(1, file.metadata.num_rows)
    rows = int(min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // max(1, mean_bytes))))
    return file.iter_batches(rows, columns=columns, use_threads=False)


def _require_end(path: Path) -> None:
    """A stream that is cut between two batches would pass for a shorter one."""
    with open(path, "rb") as file:
        file.seek(-min(len(STREAM_END), path.stat().st_size), os.SEEK_END)
        if file.read() != STREAM_END:
            raise InputError(f"{path}: cut: it does not end as an Arrow stream does; save the dataset again")


def _saved_files(state: Path) -> list[str]:
    """The names of a saved dataset's Arrow files."""
    try:
        content = json.loads(state.read_text())
        names = [str(file["filename"]) for file in content["_data_files"]]
        mapped = content.get("_indices_data_files")
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{state}: not the state.json of a saved dataset; save it again") from None
    wrong = [name for name in names if not name.endswith(STREAM) or "/" in name or not (state.parent / name).is_file()]
    if wrong:
        raise InputError(f"{state}: names {wrong[0]}, which is not there; copy the whole folder, or save it again")
    if mapped:
        raise InputError(f"{state}: the dataset is a selection of its rows; call flatten_indices() and save it again")
    return names


def _split_of(root: Path, table: str) -> str | None:
    """By the folders, then by the words of the file's name, then by what a saved dataset says of itself."""
    *folders, name = table.lower().split("/")
    for part in [*folders, *re.split(r"[^a-z]+", name)]:
        if part in SPLIT_WORDS:
            return SPLIT_WORDS[part]
    state = (root / table).with_name("state.json")
    if table.endswith(STREAM) and state.is_file():
        said = re.match(r"[a-z]+", str(json.loads(state.read_text()).get("_split") or ""))
        return SPLIT_WORDS.get(said[0]) if said else None
    return None


def _in_words(columns: Columns) -> str:
    classes = f" of {len(columns.class_names)} classes" if columns.class_names else ""
    return f"{columns.image} and {columns.label}{classes}" if columns.label else f"{columns.image} and no label"


def _list_rows(
    root: Path, table: str, batches: Iterator[pa.RecordBatch], columns: Columns, split: str | None, listing: Listing
) -> None:
    number = 0
    for batch in batches:
        contents, names = image_bytes(batch.column(columns.image))
        labels = _labels(batch, columns, root / table, number)
        names = [None] * len(contents) if names is None else names.to_pylist()
        starts, ends, data = _ranges(contents)
        for start, end, label, name in zip(starts.tolist(), ends.tolist(), labels, names, strict=True):
            if start == NO_BYTES:
                why = f"null; it names {name}, which is not in the table" if name else "null"
                listing.rejected.append(Rejected(row_path(table, number, name), "no_image", f"{columns.image}: {why}"))
            else:
                stamp = xxhash.xxh3_64_intdigest(data[start:end]) & HASH_BITS
                add_row(listing, table, number, end - start, stamp, label, split, name)
            number += 1


def _labels(batch: pa.RecordBatch, columns: Columns, path: Path, before: int) -> list[int | str | None]:
    """Null and -1 are no label."""
    if columns.label is None:
        return [None] * len(batch)
    values = batch.column(columns.label).to_pylist()
    if columns.text_labels:
        return [sys.intern(value.strip()) or None if value is not None else None for value in values]
    labels = [None if value is None or value == -1 else int(value) for value in values]
    most = len(columns.class_names) or MOST_LABEL + 1
    for row, label in enumerate(labels):
        if label is not None and not 0 <= label < most:
            rule = f"labels are numbers from 0 to {most - 1}"
            raise InputError(
                f"{path}: row {before + row}: {columns.label} {label}: {rule}; mend it, or say another label_column"
            )
    return labels


def _ranges(contents: pa.Array) -> tuple[np.ndarray, np.ndarray, memoryview]:
    """(starts, ends) in the data of a binary array, NO_BYTES where it is null, and the data."""
    _, offsets, data = contents.buffers()
    dtype = np.int64 if pa.types.is_large_binary(contents.type) else np.int32
    if offsets is None or len(contents) == 0:
        bounds = np.zeros(len(contents) + 1, np.int64)
    else:
        bounds = np.frombuffer(offsets, dtype)[contents.offset : contents.offset + len(contents) + 1].astype(np.int64)
    starts, ends = bounds[:-1].copy(), bounds[1:].copy()
    if contents.null_count:
        missing = contents.is_null().to_numpy(zero_copy_only=False)
        starts[missing], ends[missing] = NO_BYTES, NO_BYTES
    return starts, ends, memoryview(data if data is not None else b"")


def _spool(path: Path, said: SaidColumns, file: BinaryIO) -> np.ndarray:
    """Write the images of a table, one after the other; (starts, sizes), (2, N)."""
    starts, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for contents in _image_columns(path, said):
        begins, ends, data = _ranges(contents)
        held = begins != NO_BYTES
        if held.any():
            first, last = int(begins[held][0]), int(ends[held][-1])
            moved = file.tell() - first
            file.write(data[first:last])
            begins[held] += moved
            ends[held] += moved
        starts.append(begins)
        sizes.append(ends - begins)
    return np.stack([np.concatenate(starts), np.concatenate(sizes)])


def _ranges_in_stream(path: Path, said: SaidColumns) -> np.ndarray | None:
    """(starts, sizes), (2, N), of the images in the Arrow file itself; None where it is compressed."""
    starts, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    mapped = pa.memory_map(str(path))
    base, size = mapped.read_buffer().address, mapped.size()
    mapped.seek(0)
    for contents in _image_columns(path, said, mapped):
        begins, ends, _ = _ranges(contents)
        held = begins != NO_BYTES
        if held.any():
            place = contents.buffers()[2].address - base
            if not 0 <= place < size:
                return None
            begins[held] += place
            ends[held] += place
        starts.append(begins)
        sizes.append(ends - begins)
    return np.stack([np.concatenate(starts), np.concatenate(sizes)])


def _image_columns(path: Path, said: SaidColumns, mapped: pa.MemoryMappedFile | None = None) -> Iterator[pa.Array]:
    with _opened(path, mapped) as opened:
        image = choose_columns(opened.schema, said, path).image
        for batch in opened.batches([image]):
            yield image_bytes(batch.column(image))[0]
