"""Which columns of an Arrow schema hold images and labels, by Hugging Face's features where they are written."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError, near_matches
from pipeline.ingestion.tables.names import SaidColumns

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")  # of one column of bytes among several
LABEL_NAMES = ("class", "label")


class Columns(NamedTuple):
    """`class_names` are those of a ClassLabel; `text_labels` where labels are names themselves."""

    image: str
    label: str | None
    class_names: tuple[str, ...] = ()
    text_labels: bool = False

    @property
    def read(self) -> list[str]:
        return [self.image] if self.label is None else [self.image, self.label]


def choose_columns(schema: pa.Schema, said: SaidColumns, table: object) -> Columns:
    """InputError, in one line with the columns that there are, where image or label cannot be told."""
    features = _features(schema)
    image = _image_column(schema, features, said.image, table)
    label = _label_column(schema, features, said.label, table)
    if label is None:
        return Columns(image, None)
    kind, names = schema.field(label).type, features.get(label, {}).get("names") or ()
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if _is_text(kind):
        return Columns(image, label, text_labels=True)
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise InputError(f"{table}: label_column: {label}: its type is {kind}; labels are integers or class names")
    return Columns(image, label, tuple(map(str, names)))


def unread_columns(schema: pa.Schema, columns: Columns) -> list[str]:
    """A note on the columns that nothing is read of, [] where there are none."""
    unread = [name for name in schema.names if name not in columns.read]
    hint = "" if columns.label else "; no column is the label: label_column=NAME says which"
    return [f"columns that were not read: {_listed(unread)}{hint}"] if unread else []


def image_bytes(column: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """(bytes, names) of an image column: null where an image has no bytes; names are None where there are none."""
    names = None
    if pa.types.is_struct(column.type):
        fields = [field.name for field in column.type]
        names = pc.struct_field(column, "path") if "path" in fields else None
        if names is not None and not _is_text(names.type):
            names = None
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        column = column.cast(pa.large_binary())
    return column, names


def _features(schema: pa.Schema) -> Mapping[str, Mapping[str, Any]]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):  # not written by Hugging Face
        return {}


def _image_column(schema: pa.Schema, features: Mapping[str, Mapping[str, Any]], said: str | None, table: object) -> str:
    able = [field.name for field in schema if _holds_bytes(field.type)]
    if said is not None:
        return _said_column(schema, said, able, "image_column", "bytes of images", table)
    images = [name for name, feature in features.items() if feature.get("_type") == "Image" and name in schema.names]
    if not images:
        named = [name for name in able if name.lower() in IMAGE_NAMES]
        images = named if len(able) > 1 and named else able
    if len(images) > 1:
        raise InputError(f"{table}: image_column: {_listed(images)} all hold images; say which by image_column")
    if not images:
        raise InputError(f"{table}: no column of image bytes among {_columns(schema)}; a column holds one image a row")
    if images[0] not in able:
        kind = schema.field(images[0]).type
        raise InputError(f"{table}: {images[0]}: holds {kind}, no bytes of images; embed them before saving")
    return images[0]


def _label_column(
    schema: pa.Schema, features: Mapping[str, Mapping[str, Any]], said: str | None, table: object
) -> str | None:
    if said is not None:
        return _said_column(schema, said, schema.names, "label_column", "labels", table)
    labels = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    labels = [name for name in labels if name in schema.names] or [name for name in LABEL_NAMES if name in schema.names]
    if len(labels) > 1:
        raise InputError(f"{table}: label_column: {_listed(labels)} all hold labels; say which by label_column")
    return labels[0] if labels else None


def _said_column(schema: pa.Schema, said: str, able: Sequence[str], key: str, what: str, table: object) -> str:
    if said not in schema.names:
        raise InputError(f"{table}: {key}: no column {said}; {near_matches(said, schema.names)}")
    if said not in able:
        raise InputError(f"{table}: {key}: {said} is {schema.field(said).type}, no {what}; it has: {_columns(schema)}")
    return said


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _columns(schema: pa.Schema) -> str:
    kinds = {field.name: "bytes" if _holds_bytes(field.type) else str(field.type) for field in schema}
    return ", ".join(f"{name} ({kind[:60]})" for name, kind in kinds.items())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
