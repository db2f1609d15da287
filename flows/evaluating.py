"""Evaluations from what was asked to a table: what protocols train first, in one set of processes, then the scores."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.control.jobs import Conclusion
from flows.home import tracking_uri
from flows.requests.evaluation import Evaluation
from pipeline.errors import EXIT_DONE
from pipeline.registry.test_reads import read_key, record_test_read
from pipeline.run_directory import RunDirectory, read_json, write_json
from pipeline.words import in_columns

# What stands in the table, the first found.
HEADLINES = ("top1", "map", "ece", "top1_5shot", "top1_1shot", "mean_iou", "ap50")
Report = Callable[[str], None]
Bring = Callable[[RunDirectory, Report], Conclusion]


def carry_out(evaluation: Evaluation, report: Report, bring: Bring) -> Conclusion:
    """Bring the trainings and then the evaluation to their end; the first conclusion that is no success, else the last.

    The same request once more finds the trainings that are done. `bring` controls one run.
    """
    for name, reason in evaluation.raw["unavailable"].items():
        report(f"{name} is left out: {reason}")
    runs = evaluation.train()
    todo = [run for run in runs if not run.result_file.is_file()]
    for one in evaluation.trainings:
        report(f"{one.name} of {one.model} on {one.dataset}: {evaluation.path_of(one).name}")
    if todo:
        trained = bring(todo[0] if len(runs) == 1 else evaluation.sequence(runs), report)
        if trained.left or trained.code != EXIT_DONE:
            return trained
    conclusion = bring(evaluation.write(), report)
    if conclusion.code == EXIT_DONE and not conclusion.left:
        count_test_reads(conclusion.run, evaluation.home, report)
    return conclusion


def count_test_reads(run: RunDirectory, home: Path, report: Report) -> None:
    """Keep each reading of a test split with the registered versions that a finished evaluation scored, once a run.

    Told where it is not the first. The scores are there whatever the registry answers.
    """
    counted = run.path / "test-reads.json"
    if counted.is_file():
        return
    times = {}
    try:
        for version, key in _test_reads(run):
            times[f"{version} {key}"] = record_test_read(version, key, tracking_uri=tracking_uri(home))
    except Exception as error:  # whatever MLflow or its server says
        report(f"readings of test splits were not counted: {str(error).splitlines()[0]}")
        return
    write_json(counted, times)
    for what, count in times.items():
        if count > 1:
            report(f"{what}: the test split was now read {count} times; choose by validation, and report the first")


def _test_reads(run: RunDirectory) -> Iterator[tuple[str, str]]:
    """(registered version, what was read) of a finished evaluation."""
    result, sources = read_json(run.result_file) or {}, run.plan().get("sources", {})
    for model, metrics in result.get("metrics", {}).items():
        version = sources[model]["lineage"].get("registered")
        for column in sorted({key.rpartition("/")[0] for key in metrics}) if version else ():
            _, protocol, name = column.split("/")
            facts = result["datasets"][name]
            if facts["split"] == "test":
                yield version, read_key(protocol, name, facts["fingerprint"])


def score_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Every metric of the only model, with its interval where there is one."""
    ((model, metrics),) = result["metrics"].items()
    intervals, width = result["intervals"].get(model, {}), max(map(len, metrics))
    for key, value in metrics.items():
        number = f"{value:,.0f}" if key.endswith("/count") else f"{value:.4f}"
        interval = intervals.get(key)
        yield f"{key:<{width}}  {number}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def difference_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Of every model but the first, how far it is from the first on the same images, and whether that may be chance."""
    for model, columns in result.get("differences", {}).items():
        for column, one in columns.items():
            _, protocol, name = column.split("/")
            yield (f"{model} - {one['against']}, {protocol} on {name}: {one['difference']:+.4f} "
                   f"[{one['low']:+.4f}, {one['high']:+.4f}], McNemar p = {one['p']:.2g}")  # fmt: skip


def table_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """One line per protocol and dataset, one column per model, with the 95 % interval where there is one.

    The mean of a group is that of its datasets' test splits; the mean of groups weighs each group alike, as VTAB does.
    """
    models = list(result["metrics"])
    columns = list(dict.fromkeys(key.rpartition("/")[0] for metrics in result["metrics"].values() for key in metrics))
    lines = [["protocol", "dataset", "metric", *models]]
    for column in columns:
        _, protocol, name = column.split("/")
        headline = _headline(column, result["metrics"])
        cells = [
            _cell(f"{column}/{headline}", result["metrics"][one], result["intervals"].get(one, {})) for one in models
        ]  # fmt: skip
        lines.append([protocol, name, headline, *cells])
    means = group_means(result)
    for key in dict.fromkeys(key for one in means.values() for key in one):
        _, protocol, group, metric = key.split("/")
        lines.append([protocol, group, metric, *(f"{means[one][key]:.4f}" if key in means[one] else "-"
                                                 for one in models)])  # fmt: skip
    yield from in_columns(lines)
    for name, reason in result.get("unavailable", {}).items():
        yield f"{name}: left out: {reason}"


def group_means(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Model -> `eval/PROTOCOL/GROUP/mean`, and `eval/PROTOCOL/all groups/mean` where there are several."""
    means: dict[str, dict[str, float]] = {}
    for model, metrics in result["metrics"].items():
        found: dict[str, dict[str, list[float]]] = {}
        for key, value in metrics.items():
            column, _, metric = key.rpartition("/")
            _, protocol, name = column.split("/")
            facts = result["datasets"][name]
            if facts.get("group") and facts["split"] == "test" and metric == _headline(column, result["metrics"]):
                found.setdefault(protocol, {}).setdefault(facts["group"], []).append(value)
        of_model = means.setdefault(model, {})
        for protocol, groups in found.items():
            of_groups = {group: sum(values) / len(values) for group, values in groups.items()}
            of_model |= {f"eval/{protocol}/{group}/mean": value for group, value in of_groups.items()}
            if len(of_groups) > 1:
                of_model[f"eval/{protocol}/all groups/mean"] = sum(of_groups.values()) / len(of_groups)
    return means


def _headline(column: str, metrics: Mapping[str, Mapping[str, float]]) -> str:
    there = {key.rpartition("/")[2] for one in metrics.values() for key in one if key.rpartition("/")[0] == column}
    return next((name for name in HEADLINES if name in there), min(there))


def _cell(key: str, metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]]) -> str:
    if key not in metrics:
        return "-"
    words = f"{metrics[key]:.4f}"
    if interval := intervals.get(key):
        return f"{words} [{interval[0]:.4f}, {interval[1]:.4f}]"
    deviation = metrics.get(f"{key}_deviation")
    return words if deviation is None else f"{words} ± {deviation:.4f}"
