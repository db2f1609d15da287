"""Rehearsal ladders: small encoders on slices of the data, so that the large run is known before it is paid for.

A rung is an ordinary run under `HOME/ladders/NAME/`: the recipe with a smaller encoder, on a slice of the data, for as
many epochs. The same command again does what is missing. `ladder.json` has what came of it (`pipeline.forecast`), and a
later run of the recipe in the same home is told its forecast and the bands of its health from it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.profile import Profile
from flows.control.jobs import Conclusion
from flows.evaluating import carry_out as carry_out_evaluation
from flows.grids.bringing import Bring, Report, bring_each
from flows.profiles import load_profile
from flows.requests.evaluation import requested_evaluation
from flows.requests.named import Data
from flows.requests.training import checked_training, prepared_training, written
from pipeline.config.ladder import LadderConfig
from pipeline.config.recipe import (
    apply_overrides,
    parse_overrides,
    read_yaml,
    recipe_path,
    split_profile_overrides,
    validate,
)
from pipeline.config.validation import SPLIT
from pipeline.errors import EXIT_DONE, EXIT_STOPPED, InputError
from pipeline.forecast.bands import as_file, bands, health_curves
from pipeline.forecast.grading import interval_in_words, scored
from pipeline.forecast.ladder import FILE, FOLDER, Ladder, Rung, Score, compared, epochs_of, size_of
from pipeline.forecast.law import LEAST_POINTS, NoForecast
from pipeline.forecast.outlook import outlook
from pipeline.forecast.pace import LEAST_RUNS, expectation
from pipeline.forecast.past import past_runs, place_of, seconds_taken
from pipeline.forecast.rungs import health_settings, size_settings, sizes, slice_settings
from pipeline.preparation.training import PreparedRun
from pipeline.preparation.write import run_path
from pipeline.run_directory import RunDirectory, read_json
from pipeline.shards.index import DatasetIndex, read_index
from pipeline.words import duration_in_words, in_columns, number_in_words

PREFIX = "ladder."
LEAST_BUDGET_HOURS = 1.0
NO_MEASURE = ("capi",)  # objectives whose loss is against targets of their own, and says nothing from run to run


@dataclass(frozen=True)
class Plan:
    """A ladder that is valid, of which nothing is on disk yet. `hours` are those of each rung, by the plan."""

    directory: Path
    full: PreparedRun
    profile: Profile
    score: Score
    rungs: dict[str, PreparedRun]
    hours: dict[str, float]
    lines: list[str]
    ask: dict[str, Any]  # data, profile, overrides of the profile, home: what the scoring is asked with


def planned_ladder(recipe: str, *, data: Data, profile: str, overrides: Sequence[str], home: Path) -> Plan:
    """InputError where anything is wrong, before anything is written."""
    fixed, of_ladder = _split(overrides)
    config = _config(of_ladder)
    of_recipe, of_profile = split_profile_overrides(fixed)
    chosen, placement = load_profile(profile, of_profile)
    stage = read_yaml(recipe_path(recipe)).get("stage")
    if stage != "pretrain":
        raise InputError(f"{recipe}: stage: a ladder is of recipes of stage pretrain, and this one is of {stage!r}")
    full = prepared_training(
        stage, recipe, data=data, placement=placement, overrides=of_recipe, home=home, rehearse="never", model=None
    )
    score, chosen_sizes = _score(full, config), sizes(full.config, bool(full.plan["initialise_from"]), config.sizes)
    rungs = {
        f"{size}-{fraction:g}": checked_training(
            stage, recipe, data=data, profile=profile, home=home, rehearse="never",
            overrides=[*fixed, *size_settings(size, full.config.encoder), *slice_settings(fraction, full.config),
                       *health_settings(fraction, full.config, full.plan["steps"]["steps"])],
        )[0]
        for size in chosen_sizes for fraction in sorted(config.fractions)
    }  # fmt: skip
    expected = expectation(past_runs(home), place_of(full.plan, chosen.model_dump(mode="json")), [full.plan])
    hours = {name: expected.hours(rung.plan) for name, rung in rungs.items()}
    kept, lines = _within(hours, config, expected.hours(full.plan), 2 if len(chosen_sizes) > 1 else 1)
    return Plan(
        home / FOLDER / run_path(full, home, None).name, full, chosen, score,
        {name: rungs[name] for name in kept}, {name: hours[name] for name in kept},
        [*lines, f"hours are {expected.in_words}"],
        {"data": data, "profile": profile, "of_profile": [one for one in fixed if one.startswith("profile.")],
         "home": home},
    )  # fmt: skip


def _split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of the runs, and those of the ladder without their prefix."""
    of_ladder = [one.removeprefix(PREFIX) for one in overrides if one.startswith(PREFIX)]
    return [one for one in overrides if not one.startswith(PREFIX)], of_ladder


def _config(of_ladder: Sequence[str]) -> LadderConfig:
    settings = parse_overrides(of_ladder)
    try:
        return validate(LadderConfig, apply_overrides({}, settings), "ladder", settings.keys())
    except InputError as error:
        lines = (f"--set {PREFIX}{line[6:]}" if line.startswith("--set ") else line for line in error.problems)
        raise InputError(*lines) from None


def _within(
    hours: Mapping[str, float], config: LadderConfig, full: float, predictors: int
) -> tuple[list[str], list[str]]:
    """The names of the rungs that the budget allows, and what was left out, in words."""
    least = LEAST_POINTS + predictors - 1
    budget = config.budget_hours or max(LEAST_BUDGET_HOURS, full / 10)
    kept = list(hours)
    while len(kept) > least and sum(hours[name] for name in kept) > budget:
        kept.remove(max(kept, key=lambda name: hours[name]))
    total = sum(hours[name] for name in kept)
    if config.budget_hours is not None and total > budget:
        raise InputError(
            f"--set ladder.budget_hours={config.budget_hours:g}: the {least} cheapest rungs, which a fit needs, take "
            f"about {number_in_words(total)} hours by their plan; raise it, or give smaller ladder.fractions"
        )
    if len(hours) < least:
        raise InputError(
            f"--set ladder: {len(hours)} rungs, and a fit needs {least}; give more ladder.fractions or ladder.sizes"
        )
    left_out = [name for name in hours if name not in kept]
    why = f"; left out for ladder.budget_hours {number_in_words(budget)}: {', '.join(left_out)}" if left_out else ""
    return kept, [
        f"{len(kept)} rungs, about {duration_in_words(3600 * total)} together by their plan; the full run "
        f"{duration_in_words(3600 * full)}{why}"
    ]


def _score(full: PreparedRun, config: LadderConfig) -> Score:
    """How the rungs are scored; InputError where nothing could tell how good one is."""
    sources = [read_index(one.path) for one in full.config.data.sources]
    name = ", ".join(str(index.directory) for index in sources)
    if full.config.validation.best_metric is None:
        raise InputError(_why_unscored(full, sources))
    if full.config.objective.reads_labels:
        classes = max(2, full.plan["num_classes"])
        return Score("accuracy", "validation/accuracy", f"its own head on `{SPLIT}`", 1 - 1 / classes)
    if len(sources) == 1 and _has_labels(sources[0]):
        metric = f"eval/{config.protocol}/{sources[0].directory.name}.{SPLIT}/top1"
        words = f"{config.protocol} on frozen features, `{SPLIT}`"
        return Score("accuracy", metric, words, 1 - 1 / max(2, sources[0].num_classes), config.protocol)
    if full.config.objective.kind in NO_MEASURE:
        raise InputError(
            f"{name}: no labels, and the loss of {full.config.objective.kind} is against targets of its own: nothing "
            "says how good a rung is; a ladder needs labels on train and validation here, or another objective"
        )
    return Score("loss", "validation/loss", f"the loss on `{SPLIT}`: without labels nothing is said of accuracy", 0.0)


def _why_unscored(full: PreparedRun, sources: Sequence[DatasetIndex]) -> str:
    """Why no validation scores the rungs, and what to do about it."""
    if lacking := [one.directory for one in sources if not one.splits.get(SPLIT) or not one.num_samples(SPLIT)]:
        return (
            f"{lacking[0]}: has no split `{SPLIT}`, on which rungs are scored; ingest it with one, for example "
            "`vit ingest SOURCE DEST --set splits=hash`"
        )
    steps, labels = full.plan["steps"]["steps"], full.config.objective.reads_labels
    if labels and (unlabelled := [one.directory for one in sources if one.num_unlabelled(SPLIT)]):
        return f"{unlabelled[0]}: samples of the split `{SPLIT}`, on which rungs are scored, have no labels"
    return (
        f"validation.every_steps: rungs are scored by validation, and it is off: it was set to 0, or the run of "
        f"{steps:,} steps is shorter than an epoch; --set validation.every_steps={steps}"
    )


def _has_labels(index: DatasetIndex) -> bool:
    splits = ("train", SPLIT)
    return bool(
        index.num_classes
        and index.label_sets is None
        and all(split in index.splits and index.num_samples(split) for split in splits)
        and not any(index.num_unlabelled(split) for split in splits)
    )


def plan_lines(plan: Plan) -> Iterator[str]:
    """What will be trained, and what it takes by its plan."""
    yield f"{plan.directory}: scored by {plan.score.words}"
    rows = [["rung", "images", "epochs", "images seen", "encoder", "planned", "so far"]]
    for name, rung in plan.rungs.items():
        done = (plan.directory / name / "result.json").is_file()
        samples = rung.plan["steps"]["samples"]
        rows.append([
            name, f"{rung.plan['samples_per_epoch']:,}", f"{epochs_of(rung.plan):.3g}", f"{samples:,}",
            f"{number_in_words(size_of(rung.config, rung.plan) / 1e6)} M",
            duration_in_words(3600 * plan.hours[name]), "done" if done else "to do",
        ])  # fmt: skip
    yield from in_columns(rows)
    yield from plan.lines


def carry_out(plan: Plan, report: Report, bring: Bring) -> tuple[int, str]:
    """Bring every rung to its end, score those that are done, and write `ladder.json`: the exit code, and one line.

    A rung that fails does not keep the others back, and the fit says that it is missing. `bring` controls one run.
    """
    for line in plan_lines(plan):
        report(line)
    home = plan.ask["home"]
    runs = {name: written(rung, plan.profile, str(plan.directory / name), home) for name, rung in plan.rungs.items()}
    todo = [run for run in runs.values() if not run.result_file.is_file()]
    ends = bring_each(todo, report, bring)
    reasons = {end.run.path.name: end.reason for end in ends if end.code != EXIT_DONE}
    codes = [end.code for end in ends]
    done = {name: run for name, run in runs.items() if run.result_file.is_file()}
    if EXIT_STOPPED in codes or any(end.left for end in ends):
        words = f"{len(done)} of {len(runs)} rungs are done; the same command goes on"
        return max(codes), f"{plan.directory.name}: {words}"
    scores, count, conclusion = _scored(plan, done, report, bring) if done else ({}, 0, None)
    if conclusion is not None:
        codes.append(conclusion.code)
        if conclusion.code != EXIT_DONE:
            reasons = dict.fromkeys(done, f"not scored: {conclusion.reason}") | reasons
    rungs = [_rung(plan, name, run, scores.get(name), count, reasons) for name, run in runs.items()]
    words = _write(plan, rungs, report)
    failed = [code for code in codes if code not in (EXIT_DONE, EXIT_STOPPED)]
    return (failed or [max(codes, default=EXIT_DONE)])[0], f"{plan.directory.name}: {words}"


def _scored(
    plan: Plan, done: Mapping[str, RunDirectory], report: Report, bring: Bring
) -> tuple[dict[str, float], int, Conclusion | None]:
    """Scores by rung, the number of images behind each, and how the evaluation ended, if there had to be one."""
    if plan.score.protocol is None:
        results = {name: read_json(run.result_file) or {} for name, run in done.items()}
        values = {name: scored(result, plan.score.metric) for name, result in results.items()}
        count = sum(read_index(one.path).num_samples(SPLIT) for one in plan.full.config.data.sources)
        return {name: value for name, value in values.items() if value is not None}, count, None
    names = "\n".join(f"{name} {run.path}" for name, run in done.items()) + plan.score.protocol
    key = hashlib.sha256(names.encode()).hexdigest()[:6]
    ask = plan.ask
    evaluation = requested_evaluation(
        {name: str(run.path) for name, run in done.items()}, data=str(plan.full.config.data.sources[0].path),
        protocols=[plan.score.protocol], profile=ask["profile"], home=ask["home"],
        overrides=[f"splits=[{SPLIT}]", *ask["of_profile"]],
        run_dir=str(ask["home"] / "runs" / f"{plan.directory.name}-scores-{key}"),
    )  # fmt: skip
    conclusion = carry_out_evaluation(evaluation, report, bring)
    metrics, datasets = conclusion.result.get("metrics", {}), conclusion.result.get("datasets", {})
    values = {name: of_rung[plan.score.metric] for name, of_rung in metrics.items() if plan.score.metric in of_rung}
    return values, datasets.get(plan.score.metric.split("/")[2], {}).get("count") or 0, conclusion


def _rung(
    plan: Plan, name: str, run: RunDirectory, value: float | None, count: int, reasons: Mapping[str, str]
) -> Rung:  # fmt: skip
    prepared = plan.rungs[name]
    rung = Rung(name, str(run.path), prepared.plan["steps"]["samples"], size_of(prepared.config, prepared.plan))
    if value is None:
        return replace(rung, why=reasons.get(name, "not done yet"))
    return replace(rung, value=value, count=count, curves=health_curves(run))


def _write(plan: Plan, rungs: Sequence[Rung], report: Report) -> str:
    """Write and show what came of it; one line of what it says of the recipe's own run."""
    full = plan.full
    ladder = Ladder(
        plan.directory, full.name, {key: full.plan["data"][key] for key in ("name", "path", "fingerprint")},
        compared(full.config), epochs_of(full.plan), plan.score, tuple(rungs),
    )  # fmt: skip
    target = full.plan["steps"]["samples"], size_of(full.config, full.plan)
    missing = [f"{rung.name} ({rung.why})" for rung in rungs if rung.value is None]
    words = f"{len(ladder.done)} of {len(rungs)} rungs" + (f", without {'; '.join(missing)}" if missing else "")
    more: dict[str, Any] = {"target": {"samples": target[0], "parameters": target[1]}, "fit": words}
    try:
        more["forecast"] = {ladder.score.name: ladder.forecast(*target)._asdict()}
        words = f"{words}; the full run: {_forecast_in_words(plan, more['forecast'])}"
    except NoForecast as error:
        more["fit"] = words = f"{words}; no forecast of the full run: {error}"
    if band := bands(ladder.done, *target):
        more["bands"] = as_file(band, f"{len(ladder.done)} rungs")
    try:
        ladder.write(more)
    except OSError as error:
        raise InputError(f"{plan.directory / FILE}: cannot be written: {error.strerror}") from None
    for line in in_columns(list(_result_rows(ladder))):
        report(line)
    report(f"the same as {plan.directory / FILE}")
    return words


def _forecast_in_words(plan: Plan, scored: Mapping[str, Any]) -> str:
    """The score, and what the full run takes and costs as far as past runs say, as it will be told itself."""
    full, home = plan.full, plan.ask["home"]
    said = outlook(full.config, full.plan, home, plan.profile.model_dump(mode="json"), run_path(full, home, None))
    forecasts = scored | {name: one for name, one in said.forecasts.items() if name in ("hours", "cost")}
    words = "; ".join(interval_in_words(name, one) for name, one in forecasts.items())
    unknown = ""
    if "hours" not in forecasts:
        unknown = f"; time not known: {LEAST_RUNS} past runs of this profile, not too unlike it, make a forecast"
    elif "cost" not in forecasts:
        unknown = "; cost not known: profile.price_per_device_hour is not set"
    return f"{words}: 80 % intervals{unknown}"


def _result_rows(ladder: Ladder) -> Iterator[list[str]]:
    yield ["rung", "images seen", "encoder", ladder.score.name, "took"]
    for rung in ladder.rungs:
        taken = seconds_taken(RunDirectory(rung.run))
        yield [
            rung.name, f"{rung.samples:,}", f"{number_in_words(rung.parameters / 1e6)} M",
            "-" if rung.value is None else f"{rung.value:.4f}",
            "-" if taken is None else duration_in_words(taken.whole),
        ]  # fmt: skip
