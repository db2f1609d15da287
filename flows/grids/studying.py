"""A study from its cells to its table: pretrain, fine-tune where it is asked for, score, compare.

Every cell is an ordinary run; what is done stays done, whoever did it. On this machine the runs of a study share one
set of processes, so that start-up is paid once; where one of them fails, those that are left run each by itself.
"""

import hashlib
import json
from collections.abc import Sequence

from flows import evaluating
from flows.command_line.runs import run_state
from flows.control.forwarding import Forwarder
from flows.control.jobs import Conclusion, introduce, result_of
from flows.control.submission import launcher_of, runs_here
from flows.grids.bringing import Bring, Report, bring_each, bring_one
from flows.grids.study_table import Progress, concluded, evaluations_of, impossible_lines, known_scores
from flows.requests.evaluation import requested_evaluation
from flows.requests.study import Study, as_overrides
from flows.requests.training import sequence_run, training_run, written
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, InputError
from pipeline.run_directory import RunDirectory


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
    return concluded(study, progress, report)


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
    if begun and run_state(sequence, launcher_of(sequence)) == "running":
        report(f"following {path.name}, which trains already")
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
    known = known_scores(study)
    models = {
        name: str(run.path) for name, run in progress.scored.items()
        if run.result_file.is_file() and str(run.path) not in known
    }  # fmt: skip
    if not models:
        return []
    ends = [_evaluated(study, models, report, bring)]
    if ends[0].code not in (EXIT_DONE, EXIT_STOPPED) and not ends[0].left and len(models) > 1:
        report(f"{ends[0].reason}; each is scored by itself")
        ends = []
        for name, path in models.items():
            ends.append(_evaluated(study, {name: path}, report, bring))
            if ends[-1].code != EXIT_DONE:
                progress.reasons[progress.scored[name].path] = ends[-1].reason
            if ends[-1].code == EXIT_STOPPED or ends[-1].left:
                break
    return ends


def _evaluated(study: Study, models: dict[str, str], report: Report, bring: Bring) -> Conclusion:
    asked = [sorted(models.items()), study.config.downstream.scored_by, study.downstream.fingerprint]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    path = evaluations_of(study) / f"evaluate-{study.config.name}-{key}"
    try:
        evaluation = requested_evaluation(
            models, data=str(study.downstream.directory), protocols=[study.config.downstream.scored_by],
            profile=study.config.profile, overrides=[*study.of_profile, "worst_images=0"], run_dir=str(path),
            home=study.home,
        )  # fmt: skip
        return evaluating.carry_out(evaluation, report, bring)
    except InputError as error:
        return Conclusion(EXIT_FAILED, "; ".join(error.problems), RunDirectory(path), {})
