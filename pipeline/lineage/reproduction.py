"""A trail as a shell script that trains the model again, from a clone of the project and nothing else.

Recipes, profiles and what differed from a commit stand in the script itself. Each run's resolved config is its recipe,
so no default that changed since matters. Where something is not recorded, there is no script.
"""

import base64
import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.evaluation import EvaluateConfig
from pipeline.config.ingest import IngestConfig
from pipeline.config.recipe import validate
from pipeline.errors import InputError
from pipeline.lineage.trail import Node

FOLDER = "reproduced"
HEAD = """#!/bin/sh
# Trains {model} again. In a clone of the project without changes of its own: sh THIS_FILE
# Equal versions of packages, equal devices and as many ranks give equal bits, on accelerators with deterministic=true.
set -eu
git diff --quiet HEAD || {{ echo "the clone has changes; commit or undo them first" >&2; exit 1; }}
mkdir -p {folder}
"""


class _Script:
    """Lines, and what they have made so far: datasets by fingerprint, models by run and step, the code checked out."""

    def __init__(self, model: str):
        self.lines = [HEAD.format(model=model, folder=FOLDER)]
        self.datasets: dict[str, str] = {}
        self.models: dict[tuple, str] = {}
        self.code: tuple | None = None
        self.applied: str | None = None

    def say(self, *lines: str) -> None:
        self.lines += lines

    def write(self, path: str, content: str) -> None:
        """A text file of this content, whatever is in it; it ends with the newline that a text has."""
        end = "VIT_END"
        while end in content:
            end += "_"
        try:
            content.encode()
            self.say(f"cat > {path} <<'{end}'", content.removesuffix("\n"), end)
        except UnicodeEncodeError:  # bytes that are no text, which a person's terminal must not see
            coded = base64.encodebytes(content.encode("utf-8", "surrogateescape")).decode()
            self.say(f"base64 -d > {path} <<'{end}'", coded.removesuffix("\n"), end)


def reproduction(node: Node) -> str:
    """The script; InputError names what is not recorded."""
    if node["run"] is None:
        raise InputError(f"--reproduce: MODEL `{node['model']}`: {'; '.join(node['notes'])}")
    script = _Script(node["registered"] or node["model"])
    model = _train(script, node)
    for one in node.get("evaluations", []):
        _evaluate(script, one, model)
    return "\n".join([*script.lines, f'echo "trained again: {model}"', ""])


def _train(script: _Script, node: Node) -> str:
    """Commands that make the model of this node; where it then is, as a MODEL."""
    if node["run"] is None:  # foreign weights
        return node["model"]
    key = (node["run"].get("path"), node["weights"]["step"])
    if key in script.models:
        return script.models[key]
    parents = {parent["role"]: _train(script, parent) for parent in node["parents"]}
    _require_recorded(node)
    config, number = node["config"]["content"], len(script.models) + 1
    name = f"{FOLDER}/{number}-{config['stage']}"
    script.say("", f"# {number}: {node['role']}, {config['stage']} of {node['run']['path']}")
    _check_out(script, node["code"], f"{name}.diff")
    data = [_dataset(script, one) for one in node["data"]]
    if node["reading"]["tombstones"]:
        script.say("# The run left out samples that were taken down; with another tombstone list it reads others.")
    script.write(f"{name}.yaml", yaml.safe_dump(_as_recipe(config), sort_keys=False))
    script.write(f"{name}-profile.yaml", yaml.safe_dump(node["profile"] or {"kind": "local"}, sort_keys=False))
    script.say(" ".join(_command(node, config, name, data, parents)))
    script.models[key] = _made(node, name)
    return script.models[key]


def _require_recorded(node: Node) -> None:
    missing = [what for what in ("config", "code", "reading") if not node[what]]
    if node["config"] and not node["config"]["content"]:
        missing.append("config")
    if missing:
        notes = "; ".join(node["notes"])
        raise InputError(
            f"--reproduce: {node['role']} {node['model']}: its {' and '.join(sorted(set(missing)))} "
            f"{'is' if len(set(missing)) == 1 else 'are'} not recorded ({notes})"
        )
    if "commit" not in node["code"]:
        raise InputError(f"--reproduce: {node['model']}: made by code without a repository: {node['code']}")
    if node["code"].get("diff_sha256") and not node["code"].get("diff"):
        raise InputError(
            f"--reproduce: {node['model']}: the code differed from commit {node['code']['commit']} and the difference "
            f"(sha256 {node['code']['diff_sha256']}) was not kept"
        )


def _check_out(script: _Script, code: dict[str, Any], diff_path: str) -> None:
    state = (code["commit"], code.get("diff_sha256"))
    if state == script.code:
        return
    if script.applied:
        script.say(f"git apply -R {script.applied}")
    script.code, script.applied = state, None
    script.say(f"git checkout --quiet {code['commit']}")
    if code.get("untracked"):
        script.say(f"# New files that no commit had, and that are missing here: {' '.join(code['untracked'])}")
    if code.get("diff"):
        script.write(diff_path, code["diff"])
        script.say(f"git apply {diff_path}")
        script.applied = diff_path
    script.say("uv sync --quiet")


def _dataset(script: _Script, data: dict[str, Any]) -> str:
    """A shell variable that holds the dataset's directory; commands that make it where it is not there."""
    if (known := script.datasets.get(data["fingerprint"])) is not None:
        return known
    number = len(script.datasets) + 1
    variable = script.datasets[data["fingerprint"]] = f"$DATA_{number}"
    script.say(f'DATA_{number}="${{DATA_{number}:-{data.get("found_at") or data["path"]}}}"  # {data.get("name")}')
    if data.get("made_from"):
        script.say(f'[ -f "{variable}/index.json" ] || {_ingest(data["made_from"], variable)}')
    script.say(
        f'grep -q \'"fingerprint": "{data["fingerprint"]}"\' "{variable}/index.json" || '
        f'{{ echo "{variable} is another dataset" >&2; exit 1; }}'
    )
    return variable


def _ingest(made_from: dict[str, Any], variable: str) -> str:
    default = IngestConfig().model_dump(mode="json")
    settings = [f"{key}={json.dumps(value)}" for key, value in made_from.items()
                if key in default and value != default[key]]  # fmt: skip
    words = ["uv run vit ingest", shlex.quote(made_from["source"]), f'"{variable}"']
    return " ".join([*words, *(f"--set {shlex.quote(setting)}" for setting in settings)])


def _as_recipe(config: dict[str, Any]) -> dict[str, Any]:
    """The resolved config without what the command says: datasets and the model that it starts from.

    Windows of a mixture's sources that differ were found for each, and so are they again.
    """
    recipe = {key: value for key, value in config.items() if key != "initialise_from"}
    data = {key: value for key, value in config["data"].items() if key != "sources"}
    windows = {source.get("window_shards") for source in config["data"]["sources"]} - {None}
    if len(config["data"]["sources"]) > 1 and windows != {data.get("window_shards")}:
        data.pop("window_shards", None)
    return recipe | {"data": data}


def _command(node: Node, config: dict[str, Any], name: str, data: list[str], parents: dict[str, str]) -> list[str]:
    weights = [source.get("weight", 1.0) for source in config["data"]["sources"]]
    named = data if len(data) == 1 else [f"{path}={weight!r}" for path, weight in zip(data, weights, strict=True)]
    settings = []
    if config["stage"] == "finetune":
        words = ["uv run vit finetune", _quoted(parents["parent"]), f"--recipe {name}.yaml"]
    else:
        words = [f"uv run vit pretrain {name}.yaml"]
        settings += [f"initialise_from={parents['parent']}"] if "parent" in parents else []
    settings += [f"objective.teacher={parents['teacher']}"] if "teacher" in parents else []
    step = node["weights"]["step"]
    if step != node["run"]["steps_planned"]:
        settings.append(f"checkpoint.keep_every_steps={step}")
        settings.append(f"checkpoint.every_steps={step}")
    return [
        *words, *(f'--data "{one}"' for one in named), f"--profile {name}-profile.yaml",
        *(f"--set {_quoted(setting)}" for setting in settings), f'--no-rehearse --run-dir "$PWD/{name}"',
    ]  # fmt: skip


def _made(node: Node, name: str) -> str:
    step = node["weights"]["step"]
    here = f"$PWD/{name}"
    return here if step == node["run"]["steps_planned"] else f"{here}/checkpoints/step-{step:08d}"


def _quoted(word: str) -> str:
    """For the shell, which is to fill in $PWD."""
    return f'"{word}"' if word.startswith("$PWD") or "=$PWD" in word else shlex.quote(word)


def _evaluate(script: _Script, evaluation: dict[str, Any], model: str) -> None:
    """The evaluation again, one command for each of its datasets."""
    path = Path(evaluation["run"]) / "config.yaml"
    try:
        config = validate(EvaluateConfig, yaml.safe_load(path.read_text()), str(path))
    except (OSError, InputError):
        script.say("", f"# Scored by {evaluation['run']}, which is not here any more.")
        return
    for name, one in config.datasets.items():
        fingerprint = ((evaluation["datasets"] or {}).get(name) or {}).get(
            "fingerprint", evaluation["data_fingerprint"]
        )
        where = script.datasets.get(fingerprint, one.path)
        chosen = " ".join(f"--protocol {protocol}" for protocol in one.protocols)
        script.say("", f'uv run vit evaluate {_quoted(model)} --data "{where}" {chosen}')
