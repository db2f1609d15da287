"""From a profile's name and settings to where a run goes: one face for this machine and for clusters. Torch-free."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.profile import LocalProfile, Profile, nodes_range, profile_class, profile_names, profile_path
from cluster.profile import resolved_profile as resolved
from pipeline.config.recipe import apply_overrides, parse_overrides, read_yaml, validate
from pipeline.errors import InputError, near_matches
from pipeline.preparation.placement import Placement


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
    raw = apply_overrides(raw, parse_overrides(overrides))
    try:
        of_kind = profile_class(raw.get("kind"))
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    return resolved(validate(of_kind, raw, source))


def _placement(name: str, profile: Profile) -> Placement:
    """Of a cluster's nodes nobody here knows what they have: nothing is taken from this machine."""
    least, most = nodes_range(profile)
    asked = (least, most) if least < most else None
    return Placement(
        name, most, profile.ranks_per_node, profile.loader_workers, profile.accelerators_per_node,
        nodes_range=asked, here=isinstance(profile, LocalProfile),
    )  # fmt: skip
