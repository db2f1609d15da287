"""A trail as lines that a person reads, and that other programs may cut: one fact a line, never wrapped."""

from typing import Any

from pipeline.forecast.grading import graded_in_words
from pipeline.lineage.trail import Node
from pipeline.words import duration_in_words, number_in_words

WIDTH = 13  # of the first column
PARENT = "  "


def tree_lines(node: Node, indent: str = "") -> list[str]:
    """The model, what it came from, and under it, indented, the same of its parents."""
    lines = [("model", _model(node)), *_records(node)]
    if node["run"]:
        lines.append(("run", _run(node["run"], node["weights"])))
        if forecast := node["run"].get("forecast"):
            lines.append(("forecast", graded_in_words(forecast).removeprefix("forecast: ")))
    if node["config"]:
        lines.append(("config", _config(node["config"])))
    if node["code"]:
        lines.append(("code", _code(node["code"])))
    for one in node["data"]:
        lines += [("data", _data(one)), ("certificate", _certificate(one))]
    lines += [("note", note) for note in node["notes"]]
    if not node["parents"] and node["run"]:
        known = node["config"] and node["config"]["content"]
        lines.append(("parent", "none: it began from random weights" if known else "not recorded"))
    text = [f"{indent}{name:<{WIDTH}}{said}" for name, said in lines]
    for parent in node["parents"]:
        text += [f"{indent}{parent['role']}", *tree_lines(parent, indent + PARENT)]
    return text


def _model(node: Node) -> str:
    weights = node["weights"]
    where = weights["path"] + ("" if weights["here"] else " (not here any more)")
    name = node["registered"] or node["model"]
    step = "" if weights["step"] is None else f", step {weights['step']:,}"
    return f"{name}{step}" + ("" if where == name else f"; weights {where}")


def _records(node: Node) -> list[tuple[str, str]]:
    """Of the model that was asked for: names and scores."""
    lines = []
    for one in node.get("registrations", []):
        lines.append(("registered", f"{one['uri']} at {one['tracking_uri']}: {one['reason']}"))
    if node.get("version"):
        aliases = ", ".join(node["version"]["aliases"]) or "none"
        lines.append(("aliases", aliases))
    newest = {}
    for one in node.get("evaluations", []):  # oldest first; the first metric of a protocol is what it is known by
        columns = dict.fromkeys(metric.rpartition("/")[0] for metric in one["metrics"])
        for column in columns:
            metric = next(metric for metric in one["metrics"] if metric.startswith(f"{column}/"))
            interval = one["intervals"].get(metric)
            between = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            newest[metric] = f"{metric} {one['metrics'][metric]:.4f}{between}  {one['run']}"
    return [*lines, *(("evaluation", line) for line in newest.values())]


def _run(run: dict[str, Any], weights: dict[str, Any]) -> str:
    if not run.get("stage"):
        return f"{run['path']}, which is gone"
    attempts = f"{run['attempts']} attempt{'s' if run['attempts'] != 1 else ''}"
    unit = "GPU-hours" if run["accelerators_per_node"] else "rank-hours"
    nodes = f"{run['nodes']} node{'s' if run['nodes'] != 1 else ''}, {run['ranks']} ranks"
    hours = f"{number_in_words(run['rank_hours'])} {unit} ({duration_in_words(3600 * run['rank_hours'])})"
    gone = "" if run["here"] else ", gone"
    return (
        f"{run['path']}{gone}: {run['stage']}, step {weights['step']:,} of {run['steps_planned']:,}, {attempts}, "
        f"{hours}, {nodes}, made {run['made']} on {run['host']}"
    )


def _config(config: dict[str, Any]) -> str:
    return f"sha256 {config['sha256']}" + (f"  {config['path']}" if config["path"] else "")


def _code(code: dict[str, Any]) -> str:
    if "commit" not in code:
        return f"version {code.get('version')}, no repository"
    if not code["dirty"]:
        return f"commit {code['commit']}, clean"
    where = code.get("diff_path") or ("kept in the record" if code.get("diff") else "not kept")
    new = f"; new files that are not in it: {', '.join(code['untracked'][:5])}" if code.get("untracked") else ""
    return f"commit {code['commit']}, dirty: diff sha256 {code['diff_sha256']}, {where}{new}"


def _data(data: dict[str, Any]) -> str:
    weight = f", weight {data['weight']:g}" if data.get("weight") else ""
    taken = f", {data['tombstones']} taken down" if data.get("tombstones") else ""
    return (
        f"{data.get('name') or '?'}  fingerprint {data['fingerprint']}{weight}  {data['path']} ({data['found']}){taken}"
    )


def _certificate(data: dict[str, Any]) -> str:
    return data["certificate"] or ("none was made" if data["here"] else "not known, as the dataset is not here")
