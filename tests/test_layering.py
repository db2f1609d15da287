"""Imports only go down, and flows load without torch."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {"models": set(), "pipeline": {"models"}, "cluster": set(), "flows": {"pipeline", "cluster"}}
BANNED = {
    "models": {"mlflow", "prefect"},
    "pipeline": {"prefect"},
    "cluster": {"mlflow", "prefect", "torch"},
    "flows": {"torch", "deepspeed", "timm", "webdataset"},
}

ROOMS = {  # the way of the data, from bytes to batches: what each room of pipeline may import of the others
    "storage": {"errors"},
    "shards": {"errors", "storage", "words"},
    "views": {"errors", "config", "shards"},
    "loading": {"errors", "config", "parenthood", "shards", "storage", "views", "words"},
    # what is answered about models afterwards; of the trainer's rooms it needs none
    "lineage": {
        "errors",
        "budget",
        "config",
        "forecast",
        "ingestion",
        "loading",
        "registry",
        "run_directory",
        "shards",
        "storage",
        "words",
    },
    # what is said of a run before it, and how that is held against what came; it needs no trainer either
    "forecast": {"config", "errors", "health", "run_directory", "words"},
    "evaluation": {"config", "errors", "ingestion", "loading", "rank", "registry", "run_directory", "shards", "views"},
    # torch-free but for its measures: flows read verdicts too
    "health": {"config", "errors", "evaluation", "run_directory", "words"},
    "pages": set(),
    "report": {  # reads what all others wrote; the trainer's own it needs for the words of a run's start alone
        "budget",
        "config",
        "errors",
        "health",
        "inspection",
        "lineage",
        "pages",
        "redaction",
        "registry",
        "run_directory",
        "shards",
        "storage",
        "training",
        "words",
    },
    "embedding": {"config", "errors", "evaluation", "loading", "rank", "registry", "run_directory", "shards"},
    "exporting": {
        "config",
        "errors",
        "evaluation",
        "ingestion",
        "loading",
        "rank",
        "registry",
        "run_directory",
        "shards",
        "words",
    },
    # and what training leans on
    "telemetry": {"config", "rank", "run_directory"},
    "registration": {"budget", "config", "errors", "forecast", "rank", "registry", "run_directory", "shards", "words"},
    "studies": {"run_directory", "words"},
    "checkpoints": {"errors", "config", "meeting", "rank", "run_directory", "shards", "storage", "words"},
}


MODEL_ROOMS = {  # what each room of models may import of the others; objectives are built by `build`, above them all
    "encoders": {"randomness", "schema"},
    "weights": {"encoders"},
    "masked": {"encoders", "randomness", "schema"},
    "objectives": {"encoders", "masked", "schema"},
    "inspection": {"encoders", "masked", "objectives"},
    "tuning": {"encoders", "schema"},
}


INGESTION_ROOMS = {  # what each room of ingestion may import of the rest of it, from files to shards
    "pixels": set(),
    "sources": {"rejected"},
    "labelling": {"images", "rejected", "sources"},
    "duplicates": {"images", "pixels", "progress", "rejected", "shard_contract"},
    "archives": {
        *("labelling", "locks", "rejected", "sources"),
        *("counts", "duplicates", "images", "isolation", "shard_contract", "statistics"),  # to adopt tars as shards
    },
    "tables": {"archives", "progress", "rejected", "sources"},
    "machines": {"isolation", "shard_contract"},
    "certificate": {"counts", "duplicates", "labelling", "rejected", "shard_contract"},
}


FLOW_ROOMS = {  # what each room of flows may import of the others; flows themselves and the command line use them all
    "control": {"home", "planning"},
    "services": {"home", "credentials"},
    "requests": {"home", "control", "profiles"},
    "orchestration": {"home", "control", "services", "requests", "profiles"},
    # several runs at once: what becomes of one is asked as a person would ask it
    "grids": {"command_line", "control", "evaluating", "planning", "profiles", "requests"},
}


def imported_top_levels(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_imports_only_go_down():
    for package, allowed in ALLOWED.items():
        for path in (ROOT / package).rglob("*.py"):
            imported = imported_top_levels(path.read_text())
            upward = imported & ALLOWED.keys() - allowed - {package}
            assert not upward, f"{path} imports {upward}"
            assert not imported & BANNED[package], f"{path} imports {imported & BANNED[package]}"


@pytest.mark.parametrize(("package", "rooms"), [("pipeline", ROOMS), ("models", MODEL_ROOMS)])
def test_rooms_know_nothing_of_those_behind_them(package, rooms):
    for room, allowed in rooms.items():
        for path in (ROOT / package / room).rglob("*.py"):
            modules = {
                node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
            }
            imported = {module.split(".")[1] for module in modules if module and module.startswith(f"{package}.")}
            assert imported <= allowed | {room}, f"{path} imports {imported - allowed - {room}}"


def test_rooms_of_ingestion_import_only_what_lies_below_and_nothing_goes_round():
    below: dict[str, set[str]] = {}
    start = ("pipeline", "ingestion")
    for path in ROOT.joinpath(*start).rglob("*.py"):
        room = path.relative_to(ROOT.joinpath(*start)).parts[0].removesuffix(".py")
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = [f"{node.module}.{alias.name}".split(".") for node in nodes for alias in node.names]
        imported = {name[2] for name in names if tuple(name[:2]) == start} - {room}
        surplus = imported - INGESTION_ROOMS.get(room, imported)
        assert not surplus, f"{path} imports {surplus}"
        below.setdefault(room, set()).update(imported)
    assert INGESTION_ROOMS.keys() <= below.keys()
    tuple(TopologicalSorter(below).static_order())  # CycleError where a ring is


def test_rooms_of_flows_import_only_what_lies_below():
    for room, allowed in FLOW_ROOMS.items():
        for path in (ROOT / "flows" / room).rglob("*.py"):
            nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            modules = [f"{node.module}.{node.names[0].name}" for node in nodes if node.module]
            imported = {module.split(".")[1] for module in modules if module.startswith("flows.")}
            assert imported <= allowed | {room}, f"{path} imports {imported - allowed - {room}}"


def test_every_module_of_flows_loads_without_torch():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "flows").rglob("*.py")]
    code = f"""
import importlib, sys
for name in {sorted(modules)!r}:
    importlib.import_module(name.removesuffix('.__init__'))
heavy = [name for name in ('torch', 'deepspeed', 'timm', 'webdataset') if name in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_help_of_the_command_line_imports_neither_prefect_nor_mlflow_nor_torch():
    code = "import sys, flows.cli; assert not {'torch', 'prefect', 'mlflow', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
