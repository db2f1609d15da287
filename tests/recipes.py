"""Recipes as tests want them."""

from collections.abc import Sequence

from pipeline.config.recipe import ConfigT, parse_overrides, read_yaml, recipe_path, resolve


def load_recipe(config_class: type[ConfigT], recipe: str, overrides: Sequence[str] = ()) -> ConfigT:
    """The recipe of this name or path, with `key=value` overrides applied, validated."""
    path = recipe_path(recipe)
    return resolve(config_class, read_yaml(path), parse_overrides(overrides), path.name)[0]
