"""What one run's directory says of it, as it is on disk: what is not there is empty. Torch-free."""

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.budget import hours_of
from pipeline.config.stages import read_run_config
from pipeline.config.training import TrainingConfig
from pipeline.errors import EXIT_DONE, EXIT_STOPPED, InputError
from pipeline.report.health import Health, read_health
from pipeline.report.ledger import Story, read_story
from pipeline.run_directory import RunDirectory, read_json


@dataclass(frozen=True)
class RunFacts:
    """The files of a run. `hours` are of all ranks over all attempts; None where nothing tells."""

    run: RunDirectory
    raw: dict[str, Any]  # config.yaml
    config: TrainingConfig | None  # the same, where it is a training's that this version reads
    plan: dict[str, Any]
    profile: dict[str, Any]
    provenance: dict[str, Any]
    result: dict[str, Any]
    hours: float | None
    verdict: dict[str, Any] | None  # of the newest attempt

    @functools.cached_property
    def story(self) -> Story:
        return read_story(self.run)

    @functools.cached_property
    def health(self) -> Health:
        return read_health(self.run)

    @functools.cached_property
    def forecast(self) -> dict[str, Any]:
        return read_json(self.run.path / "forecast.json") or {}

    @property
    def name(self) -> str:
        return self.run.path.name

    @property
    def stage(self) -> str:
        return str(self.plan.get("stage") or self.raw.get("stage") or "run")

    @property
    def is_done(self) -> bool:
        return bool(self.result)

    @property
    def steps_planned(self) -> int:
        return int((self.plan.get("steps") or {}).get("steps") or 0)

    @property
    def ending(self) -> str:
        """How it stands, in a sentence."""
        if self.is_done:
            return "Rehearsed" if self.result.get("rehearsal") else "Done"
        if self.verdict is None:
            return "Not finished" if self.run.last_attempt() else "Not begun"
        return {EXIT_DONE: "Not finished", EXIT_STOPPED: "Stopped on request"}.get(self.verdict["code"], "Failed")


def read_run(run: RunDirectory) -> RunFacts:
    """All of it. InputError where there is no run; a damaged file is a ValueError that names it."""
    run.require()
    return RunFacts(
        run, _yaml(run.config_file), _training_config(run.path), read_json(run.plan_file) or {},
        _yaml(run.profile_file), read_json(run.provenance_file) or {}, read_json(run.result_file) or {},
        _hours(run), _verdict(run),
    )  # fmt: skip


def _training_config(path: Path) -> TrainingConfig | None:
    with contextlib.suppress(InputError):
        config = read_run_config(path)
        return config if isinstance(config, TrainingConfig) else None
    return None


def _yaml(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text()) if path.is_file() else None
    return found if isinstance(found, dict) else {}


def _hours(run: RunDirectory) -> float | None:
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a heartbeat of a killed supervisor, or of old
        return hours_of(run) or None
    return None


def _verdict(run: RunDirectory) -> dict[str, Any] | None:
    return run.attempt(run.last_attempt()).verdict() if run.last_attempt() else None


def price_of(facts: RunFacts) -> float | None:
    """What the hours cost by the profile; None without one. Without accelerators it is a machine's."""
    price = facts.profile.get("price_per_device_hour") or 0
    if not price or facts.hours is None:
        return None
    shared = 1 if facts.plan.get("accelerators_per_node") else facts.plan.get("ranks_per_node") or 1
    return price * facts.hours / shared


def unit_of_hours(facts: RunFacts) -> str:
    return "GPU-hours" if facts.plan.get("accelerators_per_node") else "hours of ranks (processes without accelerator)"
