"""Sweeps: every combination of the values of some settings, each a run of its own, and one table of them all.

A value in brackets is swept, `optimizer.learning_rate=[1e-3,3e-4]`. A key that takes a list itself keeps it, and is
swept by a list of lists: `encoder.image_size=[[192,256],[224,224]]`.
"""

import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from cluster.profile import LocalProfile
from flows.command_line.runs import run_state
from flows.control.jobs import introduce
from flows.control.submission import launcher_of
from flows.grids.bringing import Bring, Report, bring_each
from flows.profiles import load_profile
from flows.requests.named import Data
from flows.requests.training import checked_training, written
from pipeline.config.problems import config_classes
from pipeline.config.recipe import parse_overrides, read_yaml, recipe_path
from pipeline.config.stages import STAGES
from pipeline.errors import EXIT_DONE, EXIT_STOPPED, InputError
from pipeline.run_directory import RunDirectory, read_json, write_atomic, write_json
from pipeline.words import in_columns

MOST_RUNS = 1000
PROFILE = "profile."


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in some settings. `settings` are those of each run, by their keys as they were given."""

    directory: Path
    runs: tuple[RunDirectory, ...]
    settings: tuple[dict[str, Any], ...]


def prepared_sweep(
    recipe: str, *, data: Data, profile: str, overrides: Sequence[str], home: Path
) -> Sweep:  # fmt: skip
    """Every run of the sweep on disk, ready to submit. InputError where one is wrong, before any is written."""
    stage = read_yaml(recipe_path(recipe)).get("stage")
    of_profile = type(load_profile(profile)[0])
    fixed, swept = split_settings(overrides, STAGES.get(stage), of_profile)
    if not swept:
        raise InputError("nothing to sweep: give a setting several values, --set 'optimizer.learning_rate=[1e-3,3e-4]'")
    if of_profile is not LocalProfile and (placed := [key for key in swept if key.startswith(PROFILE)]):
        raise InputError(f"--set {placed[0]}: the runs of an array share what they ask of a cluster; give one value")
    combinations = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    if len(combinations) > MOST_RUNS:
        raise InputError(f"--set: {len(combinations):,} combinations, a sweep has {MOST_RUNS:,} at most; give fewer")
    directory = home / "runs" / f"{Path(recipe).stem}-sweep-{_key(recipe, data, fixed, swept)}"
    ask = [[*fixed, *(f"{key}={json.dumps(value)}" for key, value in one.items())] for one in combinations]
    checked = [
        checked_training(stage, recipe, data=data, profile=profile, overrides=settings, home=home, rehearse="never")
        for settings in ask
    ]
    paths = [str(directory / name) for name in run_names(combinations)]
    runs = [written(*one, path, home) for one, path in zip(checked, paths, strict=True)]
    return Sweep(directory, tuple(runs), tuple(combinations))


def split_settings(
    overrides: Sequence[str], of_recipe: Any, of_profile: Any = LocalProfile
) -> tuple[list[str], dict[str, list[Any]]]:
    """Settings that every run has, and the values of those that are swept, by key; the classes are the configs'."""
    fixed, swept = [], {}
    for override in overrides:
        ((key, value),) = parse_overrides([override]).items()
        is_swept = isinstance(value, list) and len(value) > 0
        config_class, name = (of_profile, key.removeprefix(PROFILE)) if key.startswith(PROFILE) else (of_recipe, key)
        if is_swept and takes_list(config_class, name):
            is_swept = all(isinstance(one, list) for one in value) and not takes_list(config_class, name, depth=2)
        if is_swept:
            swept[key] = value
        else:
            fixed.append(override)
    return fixed, swept


def takes_list(config_class: Any, key: str, depth: int = 1) -> bool:
    """Whether a setting's own value may be a list, or a list of lists at `depth` 2. Unknown keys do not."""
    classes = [config_class]
    *parents, last = key.split(".")
    for parent in parents:
        fields = [one.model_fields[parent] for one in classes if one and parent in one.model_fields]
        classes = [found for field in fields for found in config_classes(field.annotation)]
    annotations = [one.model_fields[last].annotation for one in classes if one and last in one.model_fields]
    return any(_list_depth(annotation) >= depth for annotation in annotations)


def _list_depth(annotation: Any) -> int:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (tuple, list):
        return 1 + max((_list_depth(argument) for argument in arguments), default=0)
    if origin in (Union, UnionType):
        return max(map(_list_depth, arguments))
    return _list_depth(arguments[0]) if origin is Annotated else 0


def _key(recipe: str, data: Data, fixed: Sequence[str], swept: dict[str, list[Any]]) -> str:
    """The same sweep is the same directory, so that asking for it again goes on with it."""
    text = json.dumps([recipe, data, sorted(fixed), swept], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_names(combinations: Sequence[dict[str, Any]]) -> list[str]:
    """`learning_rate=0.001,mask_ratio=0.5`: the differing values, by the shortest ends of their keys that tell."""
    keys = list(combinations[0])
    ends = [key.rpartition(".")[2] for key in keys]
    short = {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}
    return [",".join(f"{short[key]}={_in_a_name(value)}" for key, value in one.items()) for one in combinations]


def _in_a_name(value: Any) -> str:
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(letter if letter.isalnum() or letter in "._+-" else "_" for letter in text)


def carry_out(sweep: Sweep, report: Report, bring: Bring) -> tuple[int, str]:
    """Bring every run of the sweep to its end and write the table; the worst exit code, and one line.

    On this machine one after the other, and a run that fails does not keep the others back; on a cluster as one array,
    whose runs are followed side by side. Runs that are done are left as they are. `bring` controls one run. Only the
    first is introduced.
    """
    todo = [run for run in sweep.runs if not run.result_file.is_file()]
    report(f"{sweep.directory}: {len(sweep.runs)} runs, {len(sweep.runs) - len(todo)} done")
    if todo:
        report(f"{todo[0].path.name}, and the others but for what is swept:")
        introduce(todo[0], report)
    ends = bring_each(todo, report, bring)
    rows = write_table(sweep, report)
    codes = [end.code for end in ends]
    done = sum(row["state"] == "done" for row in rows)
    failed = [code for code in codes if code not in (EXIT_DONE, EXIT_STOPPED)]
    return (failed or [max(codes, default=EXIT_DONE)])[0], f"{sweep.directory.name}: {done} of {len(rows)} runs done"


def write_table(sweep: Sweep, report: Report) -> list[dict[str, Any]]:
    """One row per run: its settings, how far it is, how well it does; shown, and as sweep.json and sweep.csv."""
    rows = [_row(run, settings) for run, settings in zip(sweep.runs, sweep.settings, strict=True)]
    write_json(sweep.directory / "sweep.json", {"format_version": 1, "rows": rows})
    text = io.StringIO()
    flat = [row["settings"] | {key: row[key] for key in row if key != "settings"} for row in rows]
    writer = csv.DictWriter(text, flat[0].keys())
    writer.writeheader()
    writer.writerows(flat)
    write_atomic(sweep.directory / "sweep.csv", text.getvalue())
    for line in table_lines(rows):
        report(line)
    report(f"the same as {sweep.directory / 'sweep.json'} and sweep.csv")
    return rows


def _row(run: RunDirectory, settings: dict[str, Any]) -> dict[str, Any]:
    newest, resolved = newest_entry(run), {PROFILE[:-1]: read_yaml(run.profile_file)} | read_yaml(run.config_file)
    settings = {key: _value_at(resolved, key, given) for key, given in settings.items()}
    result = read_json(run.result_file) or {}
    best = result.get("best") or {}
    return {
        "settings": settings, "state": run_state(run, launcher_of(run)), "step": newest.get("step"),
        "steps": run.plan()["steps"]["steps"], "loss": newest.get("train/loss"),
        "validation": best.get("value"), "validation_metric": best.get("metric"), "run": str(run.path),
    }  # fmt: skip


def _value_at(config: dict[str, Any], key: str, given: Any) -> Any:
    """What became of a setting: `1e-3` is text to YAML and a number to a config."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return given
        config = config[part]
    return config


def newest_entry(run: RunDirectory) -> dict[str, Any]:
    """The newest ledger line of a run that has a loss, {} where there is none."""
    for number in range(run.last_attempt(), 0, -1):
        ledger = run.attempt(number).ledger
        lines = ledger.read_text().splitlines() if ledger.is_file() else []
        for line in reversed(lines):
            if "train/loss" in (entry := json.loads(line)):
                return entry
    return {}


def table_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table in columns, for people."""
    header = [*rows[0]["settings"], "step", "loss", "validation", "state", "run"]
    cells = [
        [
            *(str(value) for value in row["settings"].values()),
            f"{row['step'] or 0}/{row['steps']}",
            "" if row["loss"] is None else f"{row['loss']:.4f}",
            ""
            if row["validation"] is None
            else f"{row['validation_metric'].rpartition('/')[2]} {row['validation']:.4f}",
            row["state"],
            Path(row["run"]).name,
        ]
        for row in rows
    ]
    yield from in_columns([header, *cells])
