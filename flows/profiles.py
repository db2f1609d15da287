"""From a profile's name and settings to where a run goes: one face for this machine and for clusters. Torch-free."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml

from cluster.profile import LocalProfile, Profile, nodes_range, profile_class, profile_names, profile_path
from cluster.profile import resolved_profile as resolved
from pipeline.config.recipe import apply_overrides, parse_overrides, read_yaml, validate
from pipeline.errors import InputError, near_matches
from pipeline.preparation.placement import Placement
from pipeline.secret_forms import is_secret


def load_profile(profile: str, overrides: Sequence[str] = ()) -> tuple[Profile, Placement]:
    """The profile of this name or path with `profile.*` settings; what it leaves open is decided here."""
    path = profile_path(profile)
    if not path.is_file():
        raise InputError(f"profile `{profile}` does not exist; {near_matches(profile, profile_names())}")
    chosen = _validated(read_yaml(path), overrides, path.name)
    return chosen, _placement(profile, chosen)


def changed_profile(path: Path, overrides: Sequence[str]) -> tuple[str, Placement]:
    """The text of a run's own profile with settings changed, and its placement."""
    chosen = _validated(read_yaml(path), overrides, str(path))
    return profile_text(chosen), _placement(path.stem, chosen)


def profile_text(profile: Profile) -> str:
    """What `profile.yaml` of a run directory holds."""
    return yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False)


def _validated(raw: dict[str, Any], overrides: Sequence[str], source: str) -> Profile:
    settings = parse_overrides(overrides)
    try:
        of_kind = profile_class(settings.get("kind", raw.get("kind")))
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    for override in overrides:
        key, _, value = override.partition("=")
        if isinstance(settings[key.strip()], int | float) and _is_text(of_kind, key.strip()):
            settings[key.strip()] = value.strip()
    try:
        chosen = validate(of_kind, apply_overrides(raw, settings), source, settings.keys())
    except InputError as error:
        lines = (f"--set profile.{line[6:]}" if line.startswith("--set ") else line for line in error.problems)
        raise InputError(*lines) from None
    if named := [name for name, value in chosen.env.items() if is_secret(name, value)]:
        raise InputError(
            *(f"{source}: env: {name}: a secret would stand in profile.yaml and in scripts; export it where the job "
              "starts, or keep it in the file that its library reads" for name in named)
        )  # fmt: skip
    return resolved(chosen)


def _is_text(of_kind: Any, key: str) -> bool:
    """Whether a field holds text alone: YAML reads 24:00:00 as 86400 and 0007 as 7, and a time or a umask is meant."""
    field = of_kind.model_fields.get(key)
    kinds = set(_types(field.annotation)) if field is not None else set()
    return str in kinds and not kinds & {int, float, bool}


def _types(annotation: Any) -> Iterator[Any]:
    """The plain types that a value may have."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        yield from _types(arguments[0])
    elif get_origin(annotation) in (Union, UnionType):
        for argument in arguments:
            yield from _types(argument)
    else:
        yield annotation


def _placement(name: str, profile: Profile) -> Placement:
    """Of a cluster's nodes nobody here knows what they have: nothing is taken from this machine."""
    gibibytes = None if isinstance(profile, LocalProfile) else profile.accelerator_gib
    least, most = nodes_range(profile)
    asked = (least, most) if least < most else None
    return Placement(
        name, most, profile.ranks_per_node, profile.loader_workers, profile.accelerators_per_node,
        nodes_range=asked, here=isinstance(profile, LocalProfile),
        accelerator_bytes=None if gibibytes is None else int(gibibytes * 2**30),
    )  # fmt: skip
