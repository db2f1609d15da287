"""A study from its cells to its table: pretrain, fine-tune where it is asked for, score, compare.

Every cell is an ordinary run; what is done stays done, whoever did it. On this machine the runs of a study share one
set of processes, so that start-up is paid once; where one of them fails, those that are left run each by itself.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import evaluating
from flows.bringing import Bring, Report, bring_each, bring_one
from flows.command_line.runs import run_state
from flows.control.forwarding import Forwarder
from flows.control.jobs import Conclusion, introduce, result_of
from flows.control.submission import launcher_of, runs_here
from flows.requests.evaluation import requested_evaluation
from flows.requests.study import Cell, Study, as_overrides
from flows.requests.training import sequence_run, training_run, written
from pipeline.config.recipe import read_yaml
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, InputError
from pipeline.run_directory import RunDirectory, read_json
from pipeline.studies.points import points_of
from pipeline.studies.table import number_of, planned_lines, table_lines, write_study
from pipeline.words import duration_in_words


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


def carry_out(study: Study, report: Report, bring: Bring) -> tuple[int, str]:
    """Bring every cell to its score and write the table; the worst exit code, and one line. `bring` controls a run."""
    for line in impossible_lines(study):
        report(line)
    cells = [cell for cell in study.cells if cell.prepared]
    progress = Progress()
    progress.pretrained = {
        cell.name: written(cell.prepared, study.profile, str(study.path_of(cell)), study.home) for cell in cells
    }  # fmt: skip
    runs = list(progress.pretrained.values())
    done = sum(run.result_file.is_file() for run in runs)
    report(f"study {study.config.name}: {len(runs)} runs to pretrain, {done} of them done")
    goes_on = progress.add(_trained(study, runs, report, bring))
    if goes_on and study.config.downstream.recipe:
        goes_on = progress.add(_trained(study, _finetunings(study, progress), report, bring))
    progress.scored = progress.scored if study.config.downstream.recipe else dict(progress.pretrained)
    if goes_on:
        progress.add(_scored(study, progress, report, bring))
    return _concluded(study, progress, report)


def impossible_lines(study: Study) -> Iterator[str]:
    """A line for each network and objective that make no cell, and why."""
    for (network, objective), reason in {
        (cell.network, cell.objective): cell.reason for cell in study.cells if cell.reason
    }.items():
        yield f"not possible: {network} by {objective}: {reason}"


def _trained(study: Study, runs: Sequence[RunDirectory], report: Report, bring: Bring) -> list[Conclusion]:
    """Bring runs that are not done to their ends, on this machine in one set of processes as far as that goes."""
    todo = [run for run in runs if not run.result_file.is_file()]
    if not todo:
        return []
    report(f"{todo[0].path.name}, and the others but for what cells differ in:")
    introduce(todo[0], report)
    if not runs_here(todo[0]) or len(todo) == 1:
        return bring_each(todo, report, bring)
    together = _together(study, runs, todo, report, bring)
    if together is not None and together.code == EXIT_STOPPED:
        return [together]
    left = [run for run in todo if not run.result_file.is_file()]
    if left and together is not None:
        report(f"{together.reason}; the {len(left)} runs that are left go each by itself")
    return bring_each(left, report, bring)


def _together(
    study: Study, runs: Sequence[RunDirectory], todo: Sequence[RunDirectory], report: Report, bring: Bring
) -> Conclusion | None:
    """All runs in one set of processes, which passes over those that are done; None where one of them lives already."""
    key = hashlib.sha256("\n".join(str(run.path) for run in runs).encode()).hexdigest()[:8]
    path = study.home / "runs" / f"sequence-{study.config.name}-{key}"
    begun = RunDirectory(path).job_file.is_file()
    if not begun and any(run_state(run, launcher_of(run)) == "running" for run in todo):
        return None
    sequence = sequence_run(
        runs, profile=study.config.profile, overrides=study.of_profile, home=study.home, run_dir=str(path)
    )
    conclusion = bring_one(sequence, report, bring)
    for run in todo:
        if run.result_file.is_file():
            Forwarder(run, study.home, report).finish(EXIT_DONE, result_of(run))
    return conclusion


def _finetunings(study: Study, progress: Progress) -> list[RunDirectory]:
    """The fine-tuning of every pretrained cell on disk."""
    asked = study.config.downstream
    for cell in study.cells:
        run = progress.pretrained.get(cell.name)
        if run is None or not run.result_file.is_file():
            continue
        settings = [f"seed={cell.seed}", *as_overrides(asked.set), *study.of_profile]
        progress.scored[cell.name] = training_run(
            "finetune", asked.recipe, data=str(study.downstream.directory), profile=study.config.profile,
            overrides=settings, run_dir=None, home=study.home, rehearse="never", model=str(run.path),
        )  # fmt: skip
    return list(progress.scored.values())


def _scored(study: Study, progress: Progress, report: Report, bring: Bring) -> list[Conclusion]:
    """Score what is trained and was not: all in one evaluation, and where that fails each in its own."""
    known = _known_scores(study)
    models = {
        name: str(run.path) for name, run in progress.scored.items()
        if run.result_file.is_file() and str(run.path) not in known
    }  # fmt: skip
    if not models:
        return []
    ends = [_evaluated(study, models, report, bring)]
    if ends[0].code not in (EXIT_DONE, EXIT_STOPPED) and not ends[0].left and len(models) > 1:
        report(f"{ends[0].reason}; each is scored by itself")
        ends = [_evaluated(study, {name: path}, report, bring) for name, path in models.items()]
    return ends


def _evaluated(study: Study, models: dict[str, str], report: Report, bring: Bring) -> Conclusion:
    asked = [sorted(models.items()), study.config.downstream.scored_by, study.downstream.fingerprint]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    path = _evaluations(study) / f"evaluate-{study.config.name}-{key}"
    try:
        evaluation = requested_evaluation(
            models, data=str(study.downstream.directory), protocols=[study.config.downstream.scored_by],
            profile=study.config.profile, overrides=[*study.of_profile, "worst_images=0"], run_dir=str(path),
            home=study.home,
        )  # fmt: skip
        return evaluating.carry_out(evaluation, report, bring)
    except InputError as error:
        return Conclusion(EXIT_FAILED, "; ".join(error.problems), RunDirectory(path), {})


def _evaluations(study: Study) -> Path:
    return study.home / "runs"


def _known_scores(study: Study) -> dict[str, dict[str, Any]]:
    """What evaluations of this study found: by run, {validation, test, interval, evaluation}."""
    column = f"eval/{study.config.downstream.scored_by}/{study.downstream.directory.name}"
    known: dict[str, dict[str, Any]] = {}
    for file in sorted(_evaluations(study).glob(f"evaluate-{study.config.name}-*/result.json")):
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
    known = _known_scores(study)
    return [_row(study, cell, progress, known) for cell in study.cells]


def _row(study: Study, cell: Cell, progress: Progress, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    row = {"network": cell.network, "objective": cell.objective, "fraction": cell.fraction, "seed": cell.seed,
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
        for line in ledger.read_text().splitlines() if ledger.is_file() else ():
            entry = json.loads(line)
            if "perf/last_step_seconds" in entry:
                steps[entry["step"]] = entry["perf/last_step_seconds"]
    return round(sum(steps.values()), 1) if steps else None


def _concluded(study: Study, progress: Progress, report: Report) -> tuple[int, str]:
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
    for row in [row for row in possible if row["state"] not in ("done", "new")]:
        why = f": {row['reason']}" if row["reason"] else ""
        report(f"{row['state']}: {row['network']} by {row['objective']}, {row['images']:,} images, seed {row['seed']}"
               f"{why}; {row['run']}")  # fmt: skip
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
    rows = [
        {"network": cell.network, "objective": cell.objective, "seed": cell.seed, "run": str(study.path_of(cell)),
         "planned_seconds": study.planned_seconds(cell), **planned(study, cell)}
        for cell in cells
    ]  # fmt: skip
    yield from planned_lines(rows)
    seconds, compute = sum(row["planned_seconds"] for row in rows), sum(row["petaflop"] for row in rows)
    then = f", then as many by {study.config.downstream.recipe}" if study.config.downstream.recipe else ""
    yield (f"{len(rows)} runs{then}: {number_of(compute)} petaFLOP of pretraining, about {duration_in_words(seconds)} "
           "one after the other at an assumed speed; `vit plan` measures one")  # fmt: skip
