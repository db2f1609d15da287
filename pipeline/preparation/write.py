"""Writing a prepared run to its directory, before submission; and where that directory is."""

import hashlib
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.plan import BatchPlan
from pipeline.config.stages import read_run_config
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError
from pipeline.lineage.trail import ancestors_of_plan
from pipeline.preparation.bands import write_bands
from pipeline.preparation.code_state import code_state
from pipeline.preparation.training import PreparedRun, dump_config
from pipeline.redaction import require_no_secret, without_secrets
from pipeline.registry.locate import lasting_reference
from pipeline.run_directory import RunDirectory, write_atomic, write_json
from pipeline.shards.atomic import write_file

PACKAGES = ("torch", "deepspeed", "accelerate", "timm", "webdataset", "mlflow", "prefect", "numpy", "pillow")


def run_path(prepared: PreparedRun, home: Path, run_dir: str | None) -> Path:
    """`run_dir` where given, else `home/runs/RECIPE-KEY`: the same config on the same data is the same run.

    Data from which a sample was taken down since is not the same: a run from before goes on by `vit resume`.
    """
    if run_dir is not None:
        return Path(run_dir).absolute()
    data = prepared.plan.get("data", {})
    fingerprint = data.get("fingerprint", "") + (json.dumps(data["tombstones"]) if "tombstones" in data else "")
    key = hashlib.sha256((prepared.config_text + fingerprint).encode()).hexdigest()[:8]
    if prepared.plan.get("rehearsal"):  # rehearsed anew each time it is asked for
        key = f"rehearsal-{time.strftime('%Y%m%d-%H%M%S')}-{key[:4]}"
    return home / "runs" / f"{prepared.name}-{key}"


def write_run(prepared: PreparedRun, path: Path, profile_text: str) -> RunDirectory:
    """Make the run directory, or accept one that holds this very run. InputError where it holds another."""
    for name, text in (("config.yaml", prepared.config_text), ("profile.yaml", profile_text)):
        require_no_secret(f"{path / name}", text)
    run = RunDirectory(path)
    if run.config_file.is_file() and has_begun(run):
        if run.plan().get("request_sha256") not in (_request(prepared), _request_with_paths(prepared)):
            raise InputError(
                f"{path}: holds another run; go on with it by `vit resume {path}`, or choose another --run-dir"
            )
        if run.last_attempt() and not is_same_profile(run.profile_file.read_text(), profile_text):
            raise InputError(
                f"{path}: this run began under another profile; change it by `vit resume {path} --set profile.K=V`"
            )
        _follow_moved_data(run, prepared)
        if run.last_attempt():
            return run
    elif path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; name a new or an empty directory by --run-dir")
    elif not run.config_file.is_file() and path.exists() and any(path.iterdir()):
        raise InputError(f"{path}: is not empty and is no run directory; choose another --run-dir")
    try:
        path.mkdir(parents=True, exist_ok=True)
        run.checkpoints.mkdir(exist_ok=True)
        write_json(run.plan_file, prepared.plan | {"notes": prepared.notes, "request_sha256": _request(prepared)})
        write_deepspeed(run, prepared.config, prepared.plan)
        if isinstance(prepared.config, TrainingConfig):
            write_bands(run, prepared)
        code, difference = code_state()
        if difference:
            write_file(run.difference_file, difference)
        write_json(run.provenance_file, provenance(prepared.plan, code))
        write_atomic(run.profile_file, profile_text)
        write_atomic(run.config_file, prepared.config_text)  # last: what has a config is a run
    except OSError as error:
        raise InputError(f"{path}: the run directory cannot be written: {error.strerror}") from None
    return run


def is_same_profile(one: str, other: str) -> bool:
    """Whether two profiles say the same: a field that says nothing may be left out, as before it existed."""
    first, second = (
        {key: value for key, value in (yaml.safe_load(text) or {}).items() if value is not None}
        for text in (one, other)
    )
    return first == second


def has_begun(run: RunDirectory) -> bool:
    """Whether more than a dry run was made of it: a job was submitted, or there is a checkpoint, if an imported one."""
    return bool(run.last_attempt() or run.job_file.exists() or run.checkpoint_directories())


def _request(prepared: PreparedRun) -> str:
    """What tells a run from another: its config as it was asked for, before `vit resume --set` changed any of it.

    For the paths of its datasets their fingerprint stands.
    """
    if not isinstance(prepared.config, TrainingConfig):
        return _request_with_paths(prepared)
    text = dump_config(_with_paths(prepared.config, ["" for _ in prepared.config.data.sources]))
    return hashlib.sha256((text + prepared.plan["data"]["fingerprint"]).encode()).hexdigest()


def _request_with_paths(prepared: PreparedRun) -> str:
    """The same of runs that were made before paths were left out."""
    return hashlib.sha256(prepared.config_text.encode()).hexdigest()


def _with_paths(config: TrainingConfig, paths: Sequence[str]) -> TrainingConfig:
    """A copy whose datasets lie elsewhere."""
    sources = tuple(one.model_copy(update={"path": path}) for one, path in zip(config.data.sources, paths, strict=True))
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})


def _follow_moved_data(run: RunDirectory, prepared: PreparedRun) -> None:
    """Where the same datasets were named at other paths, the run reads them there from its next attempt on.

    InputError where the images are the same and their shards are not: positions would mean other images.
    """
    if not isinstance(prepared.config, TrainingConfig):
        return
    config, plan, asked = read_run_config(run.path), run.plan(), prepared.plan["data"]
    paths = [one.path for one in prepared.config.data.sources]
    if [one.path for one in config.data.sources] == paths:
        return
    if plan["data"].get("shards_sha256", asked["shards_sha256"]) != asked["shards_sha256"]:
        raise InputError(
            f"{asked['path']}: holds the images of {run.path} in other shards; restore the dataset of that run, or "
            "choose another --run-dir"
        )
    write_json(run.plan_file, plan | {"data": plan["data"] | {"path": asked["path"]}})
    write_atomic(run.config_file, dump_config(_with_paths(config, paths)))


def write_deepspeed(run: RunDirectory, config: Any, plan: dict[str, Any]) -> None:
    """`deepspeed.json`, for a person to read: the engine makes the same dictionary from the config. None at stage 0."""
    path = run.path / "deepspeed.json"
    if "batches" not in plan or config.zero.stage == 0:
        path.unlink(missing_ok=True)
        return
    dictionary = deepspeed_config(
        config,
        BatchPlan(**plan["batches"]),
        precision=plan["precision"],
        parameters=plan.get("trained_parameters", plan["parameters"]),
        cuda=plan["accelerators_per_node"] > 0,
    )
    write_json(path, dictionary)


def provenance(plan: dict[str, Any], code: dict[str, Any]) -> dict[str, Any]:
    """Where a run comes from: `code` as `code_state` has it, packages, machine, data, parent."""
    return {
        "format_version": 1,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [without_secrets(word) for word in sys.argv],
        "code": code,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "host": platform.node(),
        "data": plan.get("data"),
        "parent": lasting_reference(plan.get("initialise_from")),
        "teacher": lasting_reference(plan.get("teacher")),
        "config_sha256": plan.get("config_sha256"),
        "ancestors": ancestors_of_plan(plan),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
