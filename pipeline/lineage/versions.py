"""What is registered: every name, its versions and aliases, what each learned from, and its headline metric."""

from typing import Any, NamedTuple

from pipeline.registry.versions import connected, every, require_tracking_server, sqlite_file, versions_named
from pipeline.run_directory import RunDirectory, read_json


class Version(NamedTuple):
    """One registered version, and its tags that are ours."""

    name: str
    number: int
    aliases: tuple[str, ...]
    tags: dict[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"

    def in_words(self) -> str:
        aliases = ",".join(self.aliases) or "-"
        parent = self.tags.get("vit.parent")
        return "  ".join(
            [self.uri, aliases, _trained_on(self.tags), _headline(self.tags), *([f"from {parent}"] if parent else [])]
        )


def registered_versions(tracking_uri: str) -> list[Version]:
    """All of a store, by name and number. InputError where its server does not answer; none where there is no store."""
    require_tracking_server(tracking_uri)
    if (file := sqlite_file(tracking_uri)) is not None and not file.is_file():
        return []
    client = connected(tracking_uri)
    found = [
        version
        for model in every(client.search_registered_models, max_results=200)
        for version in _versions_of(client, model)
    ]
    return sorted(found, key=lambda version: (version.name, version.number))


def _versions_of(client: Any, model: Any) -> list[Version]:
    by_number: dict[str, list[str]] = {}
    for alias, number in client.get_registered_model(model.name).aliases.items():
        by_number.setdefault(str(number), []).append(alias)
    versions = []
    for one in versions_named(client, model.name):
        tags = {key: value for key, value in one.tags.items() if key.startswith("vit.")}
        aliases = tuple(sorted(by_number.get(str(one.version), [])))
        versions.append(Version(model.name, int(one.version), aliases, tags))
    return versions


def _trained_on(tags: dict[str, str]) -> str:
    """The dataset's name where the run is here to say it, and its fingerprint."""
    fingerprint = tags.get("vit.data_fingerprint", "")[:12] or "unknown data"
    name = None
    if run := tags.get("vit.run"):
        try:
            name = ((read_json(RunDirectory(run).plan_file) or {}).get("data") or {}).get("name")
        except (OSError, ValueError):
            name = None
    return f"trained on {name} ({fingerprint})" if name else f"trained on {fingerprint}"


def _headline(tags: dict[str, str]) -> str:
    metric, value = tags.get("vit.gate_metric"), tags.get("vit.gate_value")
    if metric is None or value is None:
        return "not evaluated"
    return f"{metric} {float(value):.4f}"
