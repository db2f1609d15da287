"""`RUN/report.html` of a pretraining or fine-tuning: what a person reads, however it ended. Torch-free."""

from pathlib import Path

from pipeline.errors import EXIT_STOPPED
from pipeline.pages.parts import Html, bullets, facts_table, folded, joined, paragraph, tiles, word
from pipeline.report.data_sections import dataset_summary
from pipeline.report.lineage_sections import run_lineage
from pipeline.report.page import Section, Verdict, report_page
from pipeline.report.pictures import Album
from pipeline.report.run_facts import RunFacts, read_run
from pipeline.report.training_sections import asked, best, curves, forecast, health, hours_in_words, is_healthy, speed
from pipeline.run_directory import RunDirectory, write_atomic
from pipeline.words import number_in_words

REPORT = "report.html"
TRAININGS = ("pretrain", "finetune")
RECONSTRUCTIONS = (
    "Reconstructions of held-out images",
    "The image, what the encoder saw of it, and what was filled in.",
)


def write_run_report(run: RunDirectory) -> Path:
    """Write the report anew from what is on disk; returns where it is. InputError where there is no run."""
    path = run.path / REPORT
    write_atomic(path, run_page(read_run(run)))
    return path


def run_page(facts: RunFacts) -> str:
    return report_page(
        f"Report of a {'rehearsal' if facts.plan.get('rehearsal') else _stage(facts)}", facts.name, run_verdict(facts),
        run_tiles(facts), run_sections(facts, Album()),
    )  # fmt: skip


def _stage(facts: RunFacts) -> str:
    return {"pretrain": "pretraining", "finetune": "fine-tuning"}.get(facts.stage, facts.stage)


def run_verdict(facts: RunFacts) -> Verdict:
    lines: list[object] = []
    if not facts.is_done:
        verdict = facts.verdict or {}
        reason = verdict.get("reason") or "its supervisor left no verdict"
        lines.append(f"It came to step {facts.story.last_step:,} of {facts.steps_planned:,}: {reason}")
        lines.append(joined("Go on with: ", word(f"vit resume {facts.run.path}")))
        return Verdict(verdict.get("code") == EXIT_STOPPED, facts.ending, lines)
    if facts.result.get("rehearsal"):
        lines.append("A rehearsal: a few steps at full model size, stopped and resumed; it is no trained model.")
    if said := best(facts):
        lines.append(f"Best by validation: {said}")
    if not is_healthy(facts):
        lines += [f"Health, {one.words or one.metric}" for one in facts.health.bad]
    words = facts.ending if is_healthy(facts) else f"{facts.ending}, with a look at its health"
    return Verdict(is_healthy(facts), words, lines)


def run_tiles(facts: RunFacts) -> Html:
    found: list[tuple[object, str]] = [(f"{facts.story.last_step:,}", f"of {facts.steps_planned:,} steps")]
    for key, words in (("train/loss", "training loss"), ("validation/loss", "validation loss"),
                       ("validation/accuracy", "validation accuracy")):  # fmt: skip
        if key in facts.story.curves:
            found.append((f"{facts.story.curves[key].last:.4g}", words))
    if facts.plan.get("parameters"):
        found.append((f"{number_in_words(facts.plan['parameters'] / 1e6)} M", "parameters"))
    if facts.hours is not None:
        unit = "GPU-hours" if facts.plan.get("accelerators_per_node") else "rank-hours"
        found.append((hours_in_words(facts.hours), unit))
    return tiles(found)


def run_sections(facts: RunFacts, album: Album) -> list[Section]:
    sections = [
        Section("What was asked", lambda: asked(facts)),
        Section("Data", lambda: _data(facts)),
        Section("How it learned", lambda: curves(facts)),
        Section("Health", lambda: health(facts)),
        Section("Forecast and outcome", lambda: forecast(facts)),
        Section("Speed and cost", lambda: speed(facts)),
    ]
    if (picture := facts.run.path / "reconstructions.png").is_file():
        sections.append(Section("Reconstructions", lambda: album.figure(picture, *RECONSTRUCTIONS)))
    sections += [
        Section("Lineage", lambda: run_lineage(facts)),
        Section("What next", lambda: _next(facts)),
    ]
    return sections


def _data(facts: RunFacts) -> Html:
    data = facts.plan.get("data") or {}
    return joined(*(dataset_summary(one["path"], one["fingerprint"]) for one in data.get("sources") or [data] if one))


def _next(facts: RunFacts) -> Html:
    """Commands that go on from here and what each makes, and the attempts that were made."""
    run = facts.run.path
    if not facts.is_done:
        commands = {"go on with it": f"vit resume {run}", "what it said": f"vit logs {run}"}
    elif facts.result.get("rehearsal"):
        commands = {}
    else:
        commands = {
            "scores on labelled images: not part of a training": f"vit evaluate {run} --data DATASET",
            "pictures of what it learned: nor are these": f"vit inspect {run} IMAGES DEST",
            "learn the labels of a dataset": f"vit finetune {run} --data DATASET",
            "into MLflow, for anybody to load": f"vit register {run} --name NAME",
        }
    ends = []
    for number in range(1, facts.run.last_attempt() + 1):
        verdict = facts.run.attempt(number).verdict()
        ended = f"exit code {verdict['code']}, {verdict['reason']}" if verdict else "no verdict: it runs, or was killed"
        ends.append(f"attempt {number}: {ended}")
    rows = [(words, word(command)) for words, command in commands.items()]
    listed = facts_table(rows) if rows else paragraph("Nothing: it was a rehearsal.")
    return joined(listed, folded("Attempts", bullets(ends)) if ends else "")
