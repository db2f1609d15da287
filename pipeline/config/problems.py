"""What is wrong with a config, one line per key: who said it, the key as a person writes it, what is right, the value.

pydantic finds the problems; its own words, which speak of tags and constrained types, are used nowhere.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from models.encoders.timm_config import TAGS
from models.schema import MOST
from pipeline.errors import near_matches

LONGEST_VALUE = 60  # characters of a value that a line shows
BY_HAND = "--set"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$"  # of what becomes the name of a file
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


class Place(NamedTuple):
    """Where pydantic found a problem."""

    key: tuple[str | int, ...]  # as a person writes it: without the kinds of a union's members
    field: FieldInfo | None  # of the last key; None for the whole config, and for a key that does not exist
    classes: list[type[BaseModel]]  # which the last key's value may be; of an unknown key, which it should be a key of
    whole: bool  # whether it is about all of the last key's value, and not about a part of it


def problem_lines(
    config_class: type[BaseModel], error: ValidationError, raw: Mapping[str, Any], source: str, by_hand: Collection[str]
) -> list[str]:
    """One line per key. `source` names the file, or is --set; `by_hand` are the dotted keys that --set gave."""
    found: dict[str, str] = {}
    for problem in error.errors():
        place = _place(config_class, problem["loc"])
        key, what = _what_is_wrong(place, problem, _value_at(raw, place.key))
        found.setdefault(key, f"{_blamed(key, what, place, source, by_hand)}: {what}")
    return list(found.values())


def kind_of(config_class: type[BaseModel]) -> str | None:
    field = config_class.model_fields.get("kind")
    return field.default if field is not None and isinstance(field.default, str) else None


def config_classes(annotation: Any) -> list[type[BaseModel]]:
    """The configs that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated, tuple, dict):
        return [found for argument in get_args(annotation) for found in config_classes(argument)]
    return []


def expected(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a value of this type is, for people: `a whole number of at least 1, or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [one for item in arguments[1:] for one in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return expected(arguments[0], [*inner, *metadata])
    if origin in (Union, UnionType):
        said = dict.fromkeys(expected(argument) for argument in arguments if argument is not NoneType)
        return " or ".join(said) + (", or null" if NoneType in arguments else "")
    if origin is Literal:
        *most, last = map(str, arguments)
        return f"{', '.join(most)} or {last}" if most else last
    if origin is tuple:
        each = f"each {expected(arguments[0])}"
        return f"a list, {each}" if arguments[-1] is ... else f"a list of {len(arguments)}, {each}"
    return NAMES.get(annotation, "keys and values") + _bounds(metadata)


def _bounds(metadata: Sequence[Any]) -> str:
    bounds = {name: value for item in metadata for name in ("gt", "ge", "lt", "le", "min_length")
              if (value := getattr(item, name, None)) is not None}  # fmt: skip
    if "ge" in bounds and "le" in bounds:
        return f" from {_number(bounds['ge'])} to {_number(bounds['le'])}"
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}
    said = [f"{word} {_number(bounds[name])}" for name, word in words.items() if name in bounds]
    return (" " + " and ".join(said) if said else "") + (" that is not empty" if "min_length" in bounds else "")


def _number(bound: float) -> str:
    return ("-" if bound < 0 else "") + "10^12" if abs(bound) == MOST else f"{bound:,}"


def _place(config_class: type[BaseModel], location: Sequence[str | int]) -> Place:
    classes, field, key, by_name = [config_class], None, [], False
    for number, part in enumerate(location):
        if by_name:  # of configs by their names
            if location[-1] == "[key]":
                return Place((*key, part), field, [], whole=False)
            key.append(part)
            by_name = False
            continue
        if not classes:
            return Place(tuple(key), field, classes, whole=False)
        if len(classes) > 1 and (tagged := [one for one in classes if part in (kind_of(one), TAGS.get(one))]):
            classes = tagged
        elif isinstance(part, int):
            key.append(part)
        elif known := [one.model_fields[part] for one in classes if part in one.model_fields]:
            key.append(part)
            field = known[0]
            classes = config_classes(field.annotation)
            by_name = bool(classes) and get_origin(field.annotation) is dict
        else:
            return Place((*key, *location[number:]), None, classes, whole=True)
    return Place(tuple(key), field, classes, whole=True)


def _what_is_wrong(place: Place, problem: Mapping[str, Any], value: Any) -> tuple[str, str]:
    """The key that it is about, and what is wrong."""
    key = ".".join(map(str, place.key))
    if problem["type"] == "string_pattern_mismatch":
        shown = "" if problem["loc"][-1:] == ("[key]",) else _shown(value)
        if shown == "" or problem["ctx"]["pattern"] == NAME_PATTERN:
            return key, f"not a name that can be used{shown}; take letters, digits, spaces and . _ -"
    match problem["type"]:
        case "value_error":
            return key, problem["msg"].removeprefix("Value error, ")
        case "extra_forbidden":
            hint = _inner_keys(str(place.key[-1]), place.classes) or near_matches(
                str(place.key[-1]), {name for one in place.classes for name in one.model_fields}
            )
            kind = None if hint.startswith("did you mean") else kind_of(place.classes[0])
            return key, "no such key" + (f" of kind {kind}" if kind else "") + (f"; {hint}" if hint else "")
        case "missing" if place.whole and place.field:
            return key, f"missing, and it has no default; expected {_expected_at(place)}"
        case "union_tag_invalid" | "union_tag_not_found" if isinstance(value, Mapping):
            kinds, kind = [kind_of(one) for one in place.classes], value.get("kind")
            return f"{key}.kind", f"expected {expected(Literal[tuple(kinds)])}" + _shown(kind) + _nearest(kind, kinds)
    if isinstance(value, Mapping) and place.field and (wrong := _wrong_keys(value, place.field.annotation)):
        return key, wrong
    if isinstance(value, str) and "text" in _expected_at(place) and (meaning := _meaning(place)):
        return key, f"not understood{_shown(value)}; expected: {meaning}"  # text it is, but not such text
    return key, f"expected {_expected_at(place)}" + _shown(value) + _how_to_write(place, value)


def _inner_keys(key: str, classes: Sequence[type[BaseModel]]) -> str:
    """A hint for `split_group` and `group`, where `split.group` is meant; empty where nothing inside is called so."""
    inside = (
        (name, inner)
        for one in classes
        for name, field in one.model_fields.items()
        for config_class in config_classes(field.annotation)
        for inner in config_class.model_fields
        if inner != "kind"
    )
    meant = dict.fromkeys(f"`{name}.{inner}`" for name, inner in inside if key in (inner, f"{name}_{inner}"))
    return f"did you mean {' or '.join(meant)}?" if meant else ""


def _wrong_keys(value: Mapping[str, Any], annotation: Any) -> str:
    """What is wrong with the keys of a mapping whose keys are chosen among words; empty where they are right."""
    if get_origin(annotation) is not dict:
        return next((wrong for inner in get_args(annotation) if (wrong := _wrong_keys(value, inner))), "")
    known = _choices(get_args(annotation)[0])
    wrong = [str(name) for name in value if known and name not in known]
    return f"no such key `{wrong[0]}`; expected {expected(Literal[tuple(known)])}" if wrong else ""


def _meaning(place: Place) -> str:
    """What a field says of itself, in its first sentence; empty where it says nothing."""
    said = (place.field.description or "") if place.field else ""
    return " ".join(said.split()).partition(". ")[0].removesuffix(".")


def _expected_at(place: Place) -> str:
    if place.field is None:
        return "keys and values"
    return expected(place.field.annotation, place.field.metadata)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f" (got {text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + '...'})"


def _how_to_write(place: Place, value: Any) -> str:
    annotation = place.field.annotation if place.field else None
    if get_origin(annotation) is tuple and isinstance(value, str):
        return f"; write [{value}]"
    given, choices = value if isinstance(value, list) else [value], _choices(annotation)
    return next((hint for one in given if one not in choices and (hint := _nearest(one, choices))), "")


def _choices(annotation: Any) -> list[str]:
    """The words among which a value of this type is chosen."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [choice for argument in get_args(annotation) for choice in _choices(argument)]


def _nearest(value: Any, known: Sequence[Any]) -> str:
    hint = near_matches(str(value), known)
    return f"; {hint}" if hint.startswith("did you mean") else ""


def _value_at(raw: Any, key: Sequence[str | int]) -> Any:
    for part in key:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _blamed(key: str, what: str, place: Place, source: str, by_hand: Collection[str]) -> str:
    """Who said it: the file, or --set for its own keys and for a rule that names one of them."""
    if key and (source == BY_HAND or any(key == given or key.startswith(f"{given}.") for given in by_hand)):
        return f"{BY_HAND} {key}"
    if place.classes:  # a rule about several keys of a config
        named = [one for one in by_hand if one.startswith(f"{key}." if key else "") and one.rpartition(".")[2] in what]
        if named:
            return f"{BY_HAND} {', '.join(named)}"
    return f"{source}: {key}" if key else source
