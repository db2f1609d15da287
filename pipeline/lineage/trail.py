"""From a model to everything it came from, as plain JSON: run, config, code, data, and the same of its parents.

The run directory is the truth where it is still here. What is not is named as gone, and told by the nearest record that
has it: the trail that registration puts into provenance.json, else the plan of the run that began from it. Torch-free.
"""

import contextlib
from pathlib import Path
from typing import Any

import yaml

from pipeline.budget import hours_of
from pipeline.config.recipe import read_yaml
from pipeline.errors import InputError
from pipeline.lineage.datasets import Datasets, described
from pipeline.registry.locate import ModelSource, source_from_dict
from pipeline.run_directory import RunDirectory, read_json, verified_manifest

Node = dict[str, Any]  # see `Trail.of` for its keys
MOST_DIFFERENCE = 1 << 20  # bytes of a code.diff that is carried along


class Trail:
    """Makes nodes; one for each model and each ancestor. `home` is looked through for datasets that have moved."""

    def __init__(self, home: Path | None = None):
        self.datasets = Datasets(home)

    def of(self, source: ModelSource, role: str = "model", carried: Node | None = None) -> Node:
        """Everything about a located model. `carried` is what an older record says of it, where there is one.

        Keys: role (model, parent, teacher), model (a reference), kind, registered, weights {path, here, step}, run,
        config, profile, code, data (a list), reading (what `consumption` needs), parents (nodes), notes (lines). What
        is not known is null.
        """
        lineage = dict(source.lineage)
        carried = carried or carried_trail(source)
        node = _empty(role, source)
        run = _run_of(lineage)
        if run is not None:
            self._add_run(node, run, _step_of(lineage))
        elif lineage.get("run"):
            self._add_carried(node, lineage, carried)
        elif source.kind == "checkpoint" and Path(source.path).exists():
            self._add_lone_checkpoint(node, Path(source.path))
        elif carried is not None and (carried.get("run") or carried.get("reading")):
            self._add_carried(node, lineage, carried)
        else:
            node["notes"].append("not trained by a run that is known here: its history ends")
        return node

    def _add_run(self, node: Node, run: RunDirectory, step: int) -> None:
        plan, config = run.plan(), read_yaml(run.config_file)
        recorded = read_json(run.provenance_file) or {}
        node["run"] = _run_facts(run, plan, recorded)
        node["weights"]["step"] = step
        node["config"] = {"path": str(run.config_file), "sha256": plan.get("config_sha256"), "content": config}
        node["profile"] = read_yaml(run.profile_file) if run.profile_file.is_file() else None
        node["code"] = _code_facts(run, recorded)
        node["reading"] = _reading(run, plan, step)
        node["data"] = [described(self.datasets, one) for one in _recorded_data(plan)]
        for key, role in (("initialise_from", "parent"), ("teacher", "teacher")):
            if plan.get(key):
                carried = (recorded.get("ancestors") or {}).get(role)
                node["parents"].append(self.of(source_from_dict(plan[key]), role, carried))

    def _add_carried(self, node: Node, lineage: dict[str, Any], carried: Node | None) -> None:
        """What others recorded of a run that is not here."""
        path = lineage.get("run")
        if path:
            why = "is gone" if not Path(path).exists() else "holds another run now"
            teller = (
                "the registry says what follows" if node["role"] == "model" else "what came of it recorded what follows"
            )
            node["notes"].append(f"run directory {path} {why}; {teller if carried else 'little of it is recorded'}")
        if carried is None:
            node["run"] = {"path": path, "here": False}
            node["weights"]["step"] = _step_of(lineage)
            node["config"] = {"path": None, "sha256": lineage.get("config_sha256"), "content": None}
            node["data"] = self._data_of_lineage(lineage)
            if lineage.get("parent"):
                node["notes"].append(f"its parent was {lineage['parent']}, of which nothing else is recorded")
            return
        for key in ("config", "profile", "code", "reading"):
            node[key] = carried.get(key)
        node["run"] = (carried.get("run") or {}) | {"here": False} if path else None
        node["weights"]["step"] = (carried.get("weights") or {}).get("step")
        known = ("path", "name", "fingerprint", "weight", "made_from")
        recorded = [{key: one[key] for key in known if key in one} for one in carried.get("data", [])]
        node["data"] = [described(self.datasets, one) for one in recorded if one.get("path")]
        node["parents"] = [self._parent_carried(parent) for parent in carried.get("parents", [])]

    def _data_of_lineage(self, lineage: dict[str, Any]) -> list[dict[str, Any]]:
        datasets = lineage.get("datasets")
        if isinstance(datasets, list | tuple):
            return [described(self.datasets, dict(one) | {"name": Path(one["path"]).name}) for one in datasets]
        unknown = {"path": None, "here": False, "found": "its place is not recorded"}
        unknown |= {"certificate": None, "tombstones": None}
        return [unknown | {"fingerprint": lineage.get("data_fingerprint")}]

    def _parent_carried(self, carried: Node) -> Node:
        lineage = {"run": (carried.get("run") or {}).get("path"), "step": (carried.get("weights") or {}).get("step")}
        lineage["data_fingerprint"] = (carried.get("reading") or {}).get("fingerprint")
        lineage["registered"] = carried.get("registered")
        source = ModelSource(carried["model"], carried["kind"], carried["weights"]["path"], lineage=lineage)
        return self.of(source, carried["role"], carried)

    def _add_lone_checkpoint(self, node: Node, path: Path) -> None:
        """A checkpoint that was taken out of its run: its manifest is all there is."""
        manifest = verified_manifest(path) or {}
        node["notes"].append(f"{path}: lies in no run directory; its manifest says what follows")
        node["weights"]["step"] = manifest.get("step")
        config = manifest.get("config")
        node["config"] = {"path": None, "sha256": manifest.get("config_sha256"), "content": config}
        paths = [one["path"] for one in ((config or {}).get("data") or {}).get("sources", [])]
        if len(paths) == 1:
            one = {"path": paths[0], "name": Path(paths[0]).name, "fingerprint": manifest.get("data_fingerprint")}
            node["data"] = [described(self.datasets, one)]
        if config and len(paths) == 1:
            node["reading"] = _reading_of_manifest(manifest, manifest.get("step", 0)) | {
                "fingerprint": manifest.get("data_fingerprint"), "shards_sha256": None, "config": config,
            }  # fmt: skip


def carried_trail(source: ModelSource) -> Node | None:
    """What registration recorded beside the weights; None where nothing is there."""
    if source.kind != "timm_directory":
        return None
    with contextlib.suppress(ValueError):
        return (read_json(Path(source.path) / "provenance.json") or {}).get("trail")
    return None


def ancestors_of_plan(plan: Node) -> dict[str, Node]:
    """The trails of a new run's parent and teacher, for its provenance: they may be gone when somebody asks."""
    found = {}
    for key, role in (("initialise_from", "parent"), ("teacher", "teacher")):
        if plan.get(key):
            with contextlib.suppress(InputError, OSError, ValueError, KeyError):  # it is no reason not to train
                found[role] = Trail().of(source_from_dict(plan[key]), role)
    return found


def ancestors(node: Node) -> list[Node]:
    """The node, its parents and theirs, nearest first."""
    found, waiting = [], [node]
    while waiting:
        found.append(waiting.pop(0))
        waiting += found[-1]["parents"]
    return found


def _empty(role: str, source: ModelSource) -> Node:
    weights = {"path": source.path, "here": source.kind == "timm" or Path(source.path).exists(), "step": None}
    return {
        "role": role, "model": source.reference, "kind": source.kind, "registered": source.lineage.get("registered"),
        "weights": weights, "run": None, "config": None, "profile": None, "code": None, "data": [], "reading": None,
        "parents": [], "notes": [],
    }  # fmt: skip


def _run_of(lineage: dict[str, Any]) -> RunDirectory | None:
    """The run, where its directory is still here and is the same by its data."""
    if not lineage.get("run"):
        return None
    run = RunDirectory(lineage["run"])
    if not (run.config_file.is_file() and run.plan_file.is_file()):
        return None
    recorded = (run.plan().get("data") or {}).get("fingerprint")
    expected = lineage.get("data_fingerprint")
    return run if expected in (None, recorded) else None


def _step_of(lineage: dict[str, Any]) -> int | None:
    return None if lineage.get("step") is None else int(lineage["step"])


def _run_facts(run: RunDirectory, plan: dict, recorded: dict) -> dict[str, Any]:
    attempts = run.last_attempt()
    meetings = [read_json(run.attempt(number).meeting_file) or {} for number in range(1, attempts + 1)]
    nodes = [meeting.get("nodes", plan.get("nodes")) for meeting in meetings] or [plan.get("nodes")]
    return {
        "path": str(run.path),
        "here": True,
        "stage": plan.get("stage"),
        "made": recorded.get("made"),
        "host": recorded.get("host"),
        "command": recorded.get("command"),
        "attempts": attempts,
        "nodes": nodes[-1],
        "ranks": (plan.get("batches") or {}).get("world_size"),
        "accelerators_per_node": plan.get("accelerators_per_node"),
        "rank_hours": round(hours_of(run), 5),
        "steps_planned": (plan.get("steps") or {}).get("steps"),
        "packages": recorded.get("packages"),
        "python": recorded.get("python"),
        "rolled_back": [[one.start, one.end] for one in run.rolled_back()],
        "forecast": (read_json(run.result_file) or {}).get("forecast"),
    }


def _code_facts(run: RunDirectory, recorded: dict) -> dict[str, Any] | None:
    code = recorded.get("code")
    if code is None:
        return None
    facts = dict(code) | {"diff": None, "diff_path": None}
    path = run.difference_file
    if path.is_file() and path.stat().st_size <= MOST_DIFFERENCE:
        facts |= {"diff": path.read_bytes().decode("utf-8", "surrogateescape"), "diff_path": str(path)}
    return facts


def _recorded_data(plan: dict) -> list[dict[str, Any]]:
    data = plan.get("data") or {}
    if data.get("sources"):
        return [dict(one) | {"name": Path(one["path"]).name} for one in data["sources"]]
    return [{key: data[key] for key in ("path", "name", "fingerprint")}] if data else []


def _reading(run: RunDirectory, plan: dict, step: int | None) -> dict[str, Any] | None:
    """What says which samples the first `step` steps read: the config with the order, and the state of the data."""
    newest = run.newest_checkpoint()
    if step is None:
        step = newest.step if newest else 0
    exact = next((one for one in run.committed_checkpoints() if one.step == step), newest)
    # A later checkpoint's state holds for earlier steps too: what was passed over since lies behind them.
    return _reading_of_manifest(exact.manifest if exact else {}, step) | {
        "fingerprint": plan["data"]["fingerprint"],
        "shards_sha256": plan["data"].get("shards_sha256"),
        "config": yaml.safe_load(run.config_file.read_text()),
    }


def _reading_of_manifest(manifest: dict, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "skipped": manifest.get("skipped", []),
        "tombstones": [entry for entry in manifest.get("tombstones", []) if entry["step"] < step],
        "damaged": sum((manifest.get("damaged") or {}).values()),
    }
