"""YAML recipes and dotted overrides become validated configs; every problem is reported at once, one line each.

A recipe is a difference from the defaults of its config class. There is no inheritance between recipes and no third
way in: recipe plus `--set key=value`.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.problems import config_classes, kind_of, problem_lines
from pipeline.errors import InputError, near_matches

RECIPES = Path(__file__).parent.parent / "recipes"
ConfigT = TypeVar("ConfigT", bound=BaseModel)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str) -> Path:
    """The file of a shipped recipe's name, or of a path that ends in .yaml."""
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise InputError(f"recipe `{recipe}` does not exist; {_nearest_recipes(recipe)}")
    return path


def _nearest_recipes(recipe: str) -> str:
    """The three that are most like it, and where all of them lie."""
    hint = near_matches(recipe, recipe_names())
    if hint.startswith("did you mean"):
        return hint
    near = difflib.get_close_matches(recipe, recipe_names(), n=3, cutoff=0.0)
    return f"nearest are {', '.join(f'`{name}`' for name in near)}; all {len(recipe_names())} lie in {RECIPES}"


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a mapping of keys to values is expected, this file holds a {type(raw).__name__}")
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
            raise InputError(f"--set {override}: {_how_to_quote(key.strip(), value, error)}") from None
    return parsed


def _how_to_quote(key: str, value: str, error: yaml.YAMLError) -> str:
    """What is wrong, and how the value is given where it is meant as text: a pattern, a path in brackets."""
    why = f"the value is not valid YAML: {' '.join(str(error).split())}"
    if "'" in value:
        return why
    quoted = f"\"{key}='{value}'\"" if "\\" in value or '"' in value else f"'{key}=\"{value}\"'"
    return f"{why}; if it is text, quote it: --set {quoted}"


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


def validate(
    config_class: type[ConfigT], raw: Mapping[str, Any], source: str, by_hand: Collection[str] = ()
) -> ConfigT:
    """`raw` as a config, or one InputError that lists every problem. `by_hand` are the keys that --set gave."""
    try:
        return config_class.model_validate(raw)
    except ValidationError as error:
        raise InputError(*problem_lines(config_class, error, raw, source, by_hand)) from None


def resolve(
    config_class: type[ConfigT], raw: Mapping[str, Any], settings: Mapping[str, Any], source: str
) -> tuple[ConfigT, list[str]]:
    """A recipe with each dotted key of --set set, validated; and a line for each kind that left keys out."""
    raw, notes = _without_keys_of_other_kinds(config_class, raw, settings)
    return validate(config_class, apply_overrides(raw, settings), source, settings.keys()), notes


def _without_keys_of_other_kinds(
    config_class: type[BaseModel], raw: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[Mapping[str, Any], list[str]]:
    """The recipe without what the `kind` that --set chose does not have: nobody asked for these keys."""
    notes = []
    for setting, kind in settings.items():
        place, _, last = setting.rpartition(".")
        if last != "kind" or place not in config_class.model_fields or not isinstance(raw.get(place), Mapping):
            continue
        chosen = [c for c in config_classes(config_class.model_fields[place].annotation) if kind_of(c) == kind]
        without = [key for key in raw[place] if chosen and key not in chosen[0].model_fields]
        if without:
            raw = {**raw, place: {key: value for key, value in raw[place].items() if key not in without}}
            left_out = ", ".join(f"{place}.{key}" for key in without)
            notes.append(f"--set {setting}={kind}: left out what the recipe says for another kind: {left_out}")
    return raw, notes


def split_profile_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the recipe, and those of the profile (keys that begin with `profile.`) without that prefix."""
    prefix = "profile."
    of_profile = [override.removeprefix(prefix) for override in overrides if override.startswith(prefix)]
    return [override for override in overrides if not override.startswith(prefix)], of_profile
