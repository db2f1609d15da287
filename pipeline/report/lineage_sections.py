"""What a report says of where a model comes from, how to make it again, and how to load it."""

from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.lineage.records import evaluations_of, registrations_of
from pipeline.lineage.reproduction import reproduction
from pipeline.lineage.trail import Node, Trail, ancestors
from pipeline.lineage.tree import tree_lines
from pipeline.pages.parts import Html, bullets, code, facts_table, folded, joined, paragraph, word
from pipeline.registry.locate import locate_model
from pipeline.report.run_facts import RunFacts

MOST_SCRIPT = 200_000  # characters of a script that the page holds


def trail_of(model: str, tracking_uri: str, home: Path) -> Node:
    """Everything that the home knows of a model; MLflow is not asked."""
    source = locate_model(model, tracking_uri=tracking_uri, home=home)
    records: dict[str, Any] = {
        "evaluations": evaluations_of(source.lineage, home), "registrations": registrations_of(source.lineage, home),
    }  # fmt: skip
    return Trail(home).of(source) | records


def lineage(node: Node, uri: str | None) -> Html:
    """Data with what was taken down, code, versions, parents; the tree of `vit explain`; how to make it again."""
    told = node["registered"] or uri or node["model"]
    rows: list[tuple[str, object]] = [("model", word(uri or node["model"]))]
    for one in ancestors(node):
        rows += [(_role(one, "data"), _data(data)) for data in one["data"]]
    for one in ancestors(node):
        if one["code"]:
            rows.append((_role(one, "code"), _code(one["code"])))
        rows.append((_role(one, "seed"), _seed(one)))
    rows.append(("software", ", ".join(_versions(node)) or "not recorded"))
    return joined(
        facts_table(rows),
        folded("The whole trail, as vit explain tells it", code("\n".join(tree_lines(node)))),
        paragraph(Html(f"Commands that train it again: {word(f'vit explain {told} --reproduce')}")),
        folded("The script", _script(node)),
    )


def _role(node: Node, what: str) -> str:
    return what if node["role"] == "model" else f"{what} of its {node['role']}"


def _data(data: dict[str, Any]) -> Html:
    """A dataset of the trail: fingerprint, where it is, and how many of its samples were taken down since."""
    taken = data.get("tombstones")
    state = "not known, the dataset is not here" if taken is None else f"{taken:,} samples" if taken else "nothing"
    return joined(
        f"{data.get('name') or 'a dataset'}, fingerprint ", word(str(data["fingerprint"])),
        f", at {data['path']} ({data['found']}); taken down since: {state}",
    )  # fmt: skip


def _code(facts: dict[str, Any]) -> str:
    if "commit" not in facts:
        return f"version {facts.get('version')}, no repository"
    return f"commit {facts['commit']}" + (
        ", with changes of its own, kept beside the run" if facts.get("dirty") else ""
    )


def _seed(node: Node) -> str:
    content = (node["config"] or {}).get("content") or {}
    return str(content.get("seed", "not recorded"))


def _versions(node: Node) -> list[str]:
    run = node["run"] or {}
    python = [f"Python {run['python']}"] if run.get("python") else []
    return python + [f"{name} {version}" for name, version in (run.get("packages") or {}).items()]


def _script(node: Node) -> Html:
    try:
        script = reproduction(node)
    except InputError as error:
        return bullets(error.problems)
    if len(script) > MOST_SCRIPT:
        return paragraph(f"of {len(script):,} characters, which is more than this page holds: the command prints it")
    return code(script)


def run_lineage(facts: RunFacts) -> Html:
    """The same of a run by itself, from its own records."""
    recorded, plan = facts.provenance, facts.plan
    rows: list[tuple[str, object]] = []
    for one in (plan.get("data") or {}).get("sources") or [plan.get("data") or {}]:
        if one.get("fingerprint"):
            rows.append(("data", joined(f"{one.get('name') or Path(one['path']).name}, fingerprint ",
                                        word(one["fingerprint"]), f", at {one['path']}")))  # fmt: skip
    rows.append(("parent", word(str(recorded["parent"])) if recorded.get("parent") else "none: from random weights"))
    if recorded.get("teacher"):
        rows.append(("teacher", word(str(recorded["teacher"]))))
    rows.append(("code", _code(recorded["code"]) if recorded.get("code") else "not recorded"))
    packages = ", ".join(f"{name} {version}" for name, version in (recorded.get("packages") or {}).items())
    rows.append(
        ("software", f"Python {recorded.get('python', 'not recorded')}" + (f", {packages}" if packages else ""))
    )
    rows.append(("made", f"{recorded.get('made', 'not recorded')} on {recorded.get('host', 'a host not recorded')}"))
    rows.append(("config", joined("sha256 ", word(str(plan.get("config_sha256") or "not recorded")))))
    return facts_table(rows)


def loading(uri: str, tracking_uri: str, num_classes: int) -> Html:
    """Three ways to load a registered model, each complete."""
    gives = "probabilities" if num_classes else "features"
    where = f'import mlflow\n\nmlflow.set_tracking_uri("{tracking_uri}")\n'
    snippets = {
        "To predict: arrays, PIL images, bytes, paths or data frames": (
            f'{where}model = mlflow.pyfunc.load_model("{uri}")\n{gives} = model.predict(["photo.jpg"])'
        ),
        "To go on training: a module of timm's": (
            f'{where}module = mlflow.pyfunc.load_model("{uri}").unwrap_python_model().module'
        ),
        "With timm alone, from the downloaded files": (
            f'import timm\n{where}path = mlflow.artifacts.download_artifacts("{uri}")\n'
            'module = timm.create_model("local-dir:" + path + "/artifacts/hf", pretrained=True)'
        ),
    }
    needs = "Needs torch, timm and mlflow; none of the code that trained it, and nothing is unpickled."
    return joined(
        paragraph(needs), *(joined(Html(f"<h3>{title}</h3>"), code(text)) for title, text in snippets.items())
    )
