"""`lifecycle.json`: what a lifecycle was asked and which runs it made, so that its report can be written again."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pipeline.redaction import without_secrets
from pipeline.run_directory import read_json, write_json

RECORD = "lifecycle.json"
FORMAT_VERSION = 1
PLACES = ("home", "data", "downstream", "pretrained", "finetuned", "evaluation", "registration", "pictures", "runs")


@dataclass
class Record:
    """Paths are absolute. `stages` are (stage, seconds, result), `runs` all run directories that were followed."""

    name: str
    source: str
    home: str
    tracking_uri: str
    asked: dict[str, Any] = field(default_factory=dict)
    stages: list[tuple[str, float, str]] = field(default_factory=list)
    data: str | None = None
    downstream: str | None = None  # what was fine-tuned and scored on, where that is another dataset
    pretrained: str | None = None
    finetuned: str | None = None
    models: dict[str, str] = field(default_factory=dict)  # those that are scored by name, in words
    evaluation: str | None = None
    registration: str | None = None
    pictures: str | None = None  # the folder of an inspection
    runs: list[str] = field(default_factory=list)
    baselines: list[dict[str, Any]] = field(default_factory=list)  # {method, labels, accuracy, low?, high?}
    notes: list[str] = field(default_factory=list)
    failure: dict[str, str] | None = None  # {stage, reason, ended: stopped or failed}

    def write(self, folder: Path) -> None:
        """Write it, without secrets but for what stands in its paths."""
        folder.mkdir(parents=True, exist_ok=True)
        told = {key: value if key in PLACES else _cleaned(value) for key, value in asdict(self).items()}
        write_json(folder / RECORD, {"format_version": FORMAT_VERSION} | told)


def _cleaned(value: Any) -> Any:
    """The same without secrets, however deep they lie."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: _cleaned(one) for key, one in value.items()}
    return [_cleaned(one) for one in value] if isinstance(value, list | tuple) else value


def read_record(folder: Path) -> Record | None:
    """The record in a folder; None where there is none."""
    found = read_json(folder / RECORD)
    known = {one.name for one in fields(Record)}
    return None if found is None else Record(**{key: value for key, value in found.items() if key in known})
