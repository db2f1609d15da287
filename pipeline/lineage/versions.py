"""What is registered: every name, its versions and aliases, what each learned from, and its headline metric."""

from pathlib import Path
from typing import NamedTuple

from pipeline.registry.versions import require_tracking_server
from pipeline.run_directory import RunDirectory, read_json

SQLITE = "sqlite:///"


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
    if tracking_uri.startswith(SQLITE) and not Path(tracking_uri.removeprefix(SQLITE)).is_file():
        return []
    require_tracking_server(tracking_uri)
    from pipeline.registry.tracking import connect

    client, found, token = connect(tracking_uri), [], None
    while True:
        page = client.search_registered_models(max_results=200, page_token=token)
        for model in page:
            found += _versions_of(client, model)
        if not (token := page.token):
            return sorted(found, key=lambda version: (version.name, version.number))


def _versions_of(client, model) -> list[Version]:
    by_number: dict[str, list[str]] = {}
    for alias, number in client.get_registered_model(model.name).aliases.items():
        by_number.setdefault(str(number), []).append(alias)
    quoted = model.name.replace("'", "''")
    versions, token = [], None
    while True:
        page = client.search_model_versions(f"name = '{quoted}'", max_results=200, page_token=token)
        for one in page:
            tags = {key: value for key, value in one.tags.items() if key.startswith("vit.")}
            aliases = tuple(sorted(by_number.get(str(one.version), [])))
            versions.append(Version(model.name, int(one.version), aliases, tags))
        if not (token := page.token):
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
