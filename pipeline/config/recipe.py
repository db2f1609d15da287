"""YAML recipes and dotted overrides become validated configs; every problem is reported at once, one line each.

A recipe is a difference from the defaults of its config class. There is no inheritance between recipes and no third
way in: recipe plus `--set key=value`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import InputError, near_matches

RECIPES = Path(__file__).parent.parent / "recipes"
ConfigT = TypeVar("ConfigT", bound=BaseModel)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str) -> Path:
    """The file of a shipped recipe's name, or of a path that ends in .yaml."""
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise InputError(f"recipe `{recipe}` does not exist; {near_matches(recipe, recipe_names())}")
    return path


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values, this file holds a {type(raw).__name__}")
    return raw


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", "c=[2, 3]"]` as `{"a.b": 1, "c": [2, 3]}`; values are YAML."""
    parsed = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {override}: expected key=value, for example --set optimizer.learning_rate=1e-3")
        try:
            parsed[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--set {override}: the value is not valid YAML: {' '.join(str(error).split())}") from None
    return parsed


def apply_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `raw` with each dotted key set."""
    result = {key: apply_overrides(value, {}) if isinstance(value, dict) else value for key, value in raw.items()}
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        place = result
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = value
    return result


def validate(config_class: type[ConfigT], raw: Mapping[str, Any], source: str) -> ConfigT:
    """`raw` as a config, or one InputError that lists every problem with file, key, value, rule and hint."""
    try:
        return config_class.model_validate(raw)
    except ValidationError as error:
        raise InputError(*(_problem_line(config_class, source, problem) for problem in error.errors())) from None


def _problem_line(config_class: type[BaseModel], source: str, problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(_without_tags(config_class, location)) or "(whole file)"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        siblings = _fields_at(config_class, location[:-1])
        hint = near_matches(location[-1], siblings)
        return f"{source}: {key}: no such key{'; ' + hint if hint else ''}"
    if problem["type"] == "missing":
        return f"{source}: {key}: missing, and it has no default"
    value = repr(problem.get("input"))
    shown = f" (got {value})" if len(value) <= 60 and location else ""
    return f"{source}: {key}: {message}{shown}"


def _without_tags(config_class: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The key as a person writes it: pydantic puts the kind of a union's member between."""
    return [
        part
        for number, part in enumerate(location)
        if part not in map(_kind_of, _classes_at(config_class, location[:number]))
    ]


def _fields_at(config_class: type[BaseModel], location: Sequence[str]) -> list[str]:
    return sorted({name for found in _classes_at(config_class, location) for name in found.model_fields})


def _classes_at(config_class: type[BaseModel], location: Sequence[str]) -> list[type[BaseModel]]:
    """The configs found by walking `location` from `config_class`, through unions by `kind`."""
    candidates: list[type[BaseModel]] = [config_class]
    for part in location:
        following: list[type[BaseModel]] = []
        for candidate in candidates:
            field = candidate.model_fields.get(part)
            if field is not None:
                following += _config_classes(field.annotation)
        if following:
            by_kind = [c for c in candidates + following if _kind_of(c) == part]
            candidates = by_kind or following
        else:  # the tag of a union stands in the location
            candidates = [c for c in candidates if _kind_of(c) == part] or candidates
    return candidates


def _kind_of(config_class: type[BaseModel]) -> str | None:
    field = config_class.model_fields.get("kind")
    return field.default if field is not None else None


def _config_classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is not None or isinstance(annotation, Union.__class__):
        return [found for argument in get_args(annotation) for found in _config_classes(argument)]
    return []


def load_recipe(config_class: type[ConfigT], recipe: str, overrides: Sequence[str] = ()) -> ConfigT:
    """The recipe of this name or path, with `key=value` overrides applied, validated."""
    path = recipe_path(recipe)
    return validate(config_class, apply_overrides(read_yaml(path), parse_overrides(overrides)), path.name)


def split_profile_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the recipe, and those of the profile (keys that begin with `profile.`) without that prefix."""
    prefix = "profile."
    of_profile = [override.removeprefix(prefix) for override in overrides if override.startswith(prefix)]
    return [override for override in overrides if not override.startswith(prefix)], of_profile
