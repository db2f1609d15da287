"""What a study came to: a row for each cell from the run directories, the files, and what a person is told."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.command_line.runs import run_state
from flows.control.jobs import Conclusion
from flows.control.submission import launcher_of
from flows.requests.study import Cell, Study
from pipeline.config.recipe import read_yaml
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from pipeline.forecast.pace import expectation
from pipeline.forecast.past import past_runs, place_of
from pipeline.report.ledger import parsed_line
from pipeline.run_directory import RunDirectory, read_json
from pipeline.studies.points import points_of
from pipeline.studies.table import number_of, planned_lines, table_lines, write_study
from pipeline.words import duration_in_words

Report = Callable[[str], None]


@dataclass
class Progress:
    """What became of the runs of a study in this pass."""

    pretrained: dict[str, RunDirectory] = field(default_factory=dict)  # by the cell's name
    scored: dict[str, RunDirectory] = field(default_factory=dict)  # whose scores the cell has: fine-tuned, or the same
    reasons: dict[Path, str] = field(default_factory=dict)  # of runs that did not end well
    codes: list[int] = field(default_factory=list)
    left: bool = False  # some go on without being watched

    def add(self, ends: Sequence[Conclusion]) -> bool:
        """Take note of how runs ended; whether the study goes on."""
        for end in ends:
            self.left |= end.left
            self.codes.append(end.code)
            if end.code != EXIT_DONE:
                self.reasons[end.run.path] = end.reason
        return not self.left and EXIT_STOPPED not in self.codes


def impossible_lines(study: Study) -> Iterator[str]:
    """A line for each network and objective that make no cell, and why."""
    for (network, objective), reason in {
        (cell.network, cell.objective): cell.reason for cell in study.cells if cell.reason
    }.items():
        yield f"not possible: {network} by {objective}: {reason}"


def evaluations_of(study: Study) -> Path:
    return study.home / "runs"


def known_scores(study: Study) -> dict[str, dict[str, Any]]:
    """What evaluations of this study found: by run, {validation, test, interval, evaluation}."""
    column = f"eval/{study.config.downstream.scored_by}/{study.downstream.directory.name}"
    known: dict[str, dict[str, Any]] = {}
    for file in sorted(evaluations_of(study).glob(f"evaluate-{study.config.name}-*/result.json")):
        result, models = read_json(file), read_yaml(file.with_name("config.yaml"))["models"]
        if result["data_fingerprint"] != study.downstream.remaining_fingerprint:
            continue
        for name, metrics in result["metrics"].items():
            validation, test = (metrics.get(f"{column}{end}/top1") for end in (".validation", ""))
            shown = f"{column}{'' if test is not None else '.validation'}/top1"
            if shown in metrics:
                known[models[name]] = {
                    "validation": validation, "test": test, "accuracy": metrics[shown],
                    "interval": result["intervals"][name][shown], "evaluation": str(file.parent),
                }  # fmt: skip
    return known


def rows_of(study: Study, progress: Progress) -> list[dict[str, Any]]:
    """A row for each cell and seed, also for those that cannot be, failed or have not run."""
    known = known_scores(study)
    return [_row(study, cell, progress, known) for cell in study.cells]


def _row(study: Study, cell: Cell, progress: Progress, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    row = {"network": cell.network, "objective": cell.objective, "fraction": cell.fraction, "length": cell.length,
           "seed": cell.seed,
           "state": "not possible", "reason": cell.reason, "images": None, "images_seen": None, "parameters": None,
           "petaflop": None, "seconds": None, "validation": None, "test": None, "accuracy": None, "interval": None,
           "run": None, "scored_run": None, "evaluation": None}  # fmt: skip
    if cell.prepared is None:
        return row
    run = progress.pretrained.get(cell.name) or RunDirectory(study.path_of(cell))
    last = progress.scored.get(cell.name, run)
    scores = known.get(str(last.path), {})
    newest = last if run.result_file.is_file() else run
    state = "done" if scores else _state(newest)
    if state == "lost" and EXIT_STOPPED in progress.codes:  # one of several in a set of processes that was stopped
        state = "stopped"
    return row | planned(study, cell) | scores | {
        "state": state, "reason": progress.reasons.get(newest.path, ""), "seconds": step_seconds(run),
        "run": str(run.path), "scored_run": str(last.path),
    }  # fmt: skip


def planned(study: Study, cell: Cell) -> dict[str, Any]:
    """What is known of a cell's pretraining before it runs."""
    plan = cell.prepared.plan
    return {
        "images": plan["samples_per_epoch"], "images_seen": plan["steps"]["samples"], "parameters": plan["parameters"],
        "petaflop": plan["training_flops_per_image"] * plan["steps"]["samples"] / 1e15,
    }  # fmt: skip


def _state(run: RunDirectory) -> str:
    if not run.config_file.is_file():
        return "new"
    state = run_state(run, launcher_of(run))
    return "not scored" if state == "done" else state


def step_seconds(run: RunDirectory) -> float | None:
    """Seconds that a run's optimizer steps took, each counted once; None where it made none."""
    steps: dict[int, float] = {}
    for number in range(1, run.last_attempt() + 1):
        ledger = run.attempt(number).ledger
        for line in ledger.read_bytes().splitlines() if ledger.is_file() else ():
            entry = parsed_line(line) or {}  # a process that was killed leaves half a line
            if "perf/last_step_seconds" in entry:
                steps[entry["step"]] = entry["perf/last_step_seconds"]
    return round(sum(steps.values()), 1) if steps else None


def concluded(study: Study, progress: Progress, report: Report) -> tuple[int, str]:
    """Write and show the table; the exit code of the study, and one line."""
    rows = rows_of(study, progress)
    asked = study.config.downstream
    how = f"fine-tuned by {asked.recipe}" if asked.recipe else asked.scored_by
    facts = {
        "title": study.config.name, "scored": f"{study.downstream.directory.name} {study.split}",
        "scored_by": how, "split": study.split, "fingerprint": study.downstream.fingerprint,
    }  # fmt: skip
    written_study = write_study(study.directory, study.config.model_dump(mode="json"), facts, rows)
    points = points_of(rows)
    for line in [*table_lines(points), *written_study["findings"]] if points else ():
        report(line)
    possible = [row for row in rows if row["run"]]
    done = [row for row in possible if row["state"] == "done"]
    for row in [row for row in possible if row["state"] not in ("done", "new") or row["reason"]]:
        why = f": {row['reason']}" if row["reason"] else ""
        report(f"{row['state']}: {row['network']} by {row['objective']}, {row['images']:,} images, length "
               f"{row['length']:g}, seed {row['seed']}{why}; {row['run']}")  # fmt: skip
    report(f"the same as {study.directory}/study.json, study.csv{' and study.svg' if points else ''}")
    message = f"study {study.config.name}: {len(done)} of {len(possible)} cells scored"
    if progress.left:
        return EXIT_DONE, f"{message}; runs go on without being watched, and the same command goes on with the study"
    if EXIT_STOPPED in progress.codes:
        return EXIT_STOPPED, f"{message}; the same command goes on"
    failed = [code for code in progress.codes if code != EXIT_DONE]
    return (failed or [EXIT_DONE if len(done) == len(possible) else EXIT_FAILED])[0], message


def planned_study_lines(study: Study) -> Iterator[str]:
    """What would run, and what it would cost, before anything does."""
    yield from impossible_lines(study)
    cells = [cell for cell in study.cells if cell.prepared]
    plans = [cell.prepared.plan for cell in cells]
    expected = expectation(past_runs(study.home), place_of(plans[0], study.profile.model_dump(mode="json")), plans)
    rows = [
        {"network": cell.network, "objective": cell.objective, "seed": cell.seed, "run": str(study.path_of(cell)),
         "planned_seconds": 3600 * expected.hours(cell.prepared.plan), **planned(study, cell)}
        for cell in cells
    ]  # fmt: skip
    yield from planned_lines(rows)
    seconds, compute = sum(row["planned_seconds"] for row in rows), sum(row["petaflop"] for row in rows)
    then = f", then as many by {study.config.downstream.recipe}" if study.config.downstream.recipe else ""
    yield (f"{len(rows)} runs{then}: {number_of(compute)} petaFLOP of pretraining, about {duration_in_words(seconds)} "
           "one after the other; `vit plan` measures one")  # fmt: skip
    yield f"hours are {expected.in_words}"
