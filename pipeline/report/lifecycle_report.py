"""The report of a lifecycle: from what was asked to how to load the model; also of one that failed. Torch-free."""

import functools
from pathlib import Path
from typing import Any

from pipeline.inspection.page import WORDS
from pipeline.lineage.trail import Node
from pipeline.pages.parts import Html, facts_table, folded, joined, paragraph, table, tiles, word
from pipeline.redaction import without_secrets
from pipeline.report.data_sections import dataset_summary
from pipeline.report.lineage_sections import lineage, loading, trail_of
from pipeline.report.page import Section, Verdict, report_page
from pipeline.report.pictures import Album
from pipeline.report.record import Record
from pipeline.report.run_facts import RunFacts, price_of, read_run
from pipeline.report.run_report import RECONSTRUCTIONS, REPORT
from pipeline.report.score_sections import headline, scores
from pipeline.report.training_sections import NOT_MEASURED, asked, curves, forecast, health, hours_in_words, speed
from pipeline.run_directory import RunDirectory, read_json, write_atomic
from pipeline.words import duration_in_words, number_in_words

NOT_REACHED = "the lifecycle did not come so far"


def write_lifecycle_report(record: Record, folder: Path) -> list[Path]:
    """Write the record and its report into `folder`, and the report into the registration's run where there is one."""
    record.write(folder)
    html = lifecycle_page(record)
    places = [folder / REPORT]
    if record.registration:
        places.append(Path(record.registration) / REPORT)
    for place in places:
        write_atomic(place, html)
    return places


def lifecycle_page(record: Record) -> str:
    story = _Story(record)
    return report_page("Report of a lifecycle", record.name, story.verdict(), story.tiles(), story.sections())


class _Story:
    """The record, and what its runs say, each read once."""

    def __init__(self, record: Record):
        self.record, self.album = record, Album()
        self.trainings = {
            name: facts
            for name, path in (("Pretraining", record.pretrained), ("Fine-tuning", record.finetuned))
            if path and (facts := _facts_of(path)) is not None
        }
        registered = read_json(RunDirectory(record.registration).result_file) if record.registration else None
        self.registered: dict[str, Any] = registered or {}

    @property
    def uri(self) -> str | None:
        return self.registered.get("uri")

    @functools.cached_property
    def trail(self) -> Node:
        return trail_of(
            self.record.finetuned or self.record.pretrained, self.record.tracking_uri, Path(self.record.home)
        )

    @functools.cached_property
    def costs(self) -> list[tuple[str, RunFacts]]:
        found = [(Path(path).name, _facts_of(path)) for path in self.record.runs]
        return [(name, facts) for name, facts in found if facts is not None]

    def verdict(self) -> Verdict:
        if failure := self.record.failure:
            done = ", ".join(stage for stage, _, _ in self.record.stages)
            lines = [failure["reason"], f"Done before: {done or 'nothing'}. What there is stands below."]
            ended = failure.get("ended", "failed")
            lines += ["The same command goes on."] if ended == "stopped" else []
            return Verdict(False, f"{ended.capitalize()} at stage {failure['stage']}", lines)
        lines = [str(self.registered["summary"])] if self.registered.get("summary") else []
        unhealthy = [(name, one) for name, facts in self.trainings.items() for one in facts.health.bad]
        lines += [f"{name}, health, {one.words or one.metric}" for name, one in unhealthy]
        return Verdict(not unhealthy, f"Registered as {self.uri}" if self.uri else "Done", lines + self.record.notes)

    def tiles(self) -> Html:
        found: list[tuple[object, str]] = []
        if self.record.evaluation and (first := headline(Path(self.record.evaluation))):
            key, value, interval = first
            between = f", 95 % {100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
            found.append(
                (
                    f"{100 * value:.2f} %",
                    f"{key.rpartition('/')[2].replace('top1', 'top-1')} by {key.split('/')[1]}{between}",
                )
            )
        if plan := next(
            (facts.plan for facts in reversed(self.trainings.values()) if facts.plan.get("parameters")), None
        ):
            found.append((f"{number_in_words(plan['parameters'] / 1e6)} M", "parameters"))
        if self.record.stages:
            found.append((duration_in_words(sum(one[1] for one in self.record.stages)), "for what its last run did"))
        known = [facts.hours for _, facts in self.costs if facts.hours is not None]
        if known:
            unit = (
                "GPU-hours" if any(facts.plan.get("accelerators_per_node") for _, facts in self.costs) else "rank-hours"
            )
            found.append((hours_in_words(sum(known)), unit))
        return tiles(found)

    def sections(self) -> list[Section]:
        record = self.record
        sections = [Section("What was asked", self._asked), Section("Data", self._data)]
        for name, facts in self.trainings.items():
            sections.append(Section(name, functools.partial(_training, facts)))
        sections += [
            Section("Health", self._health),
            Section("What it fills in", self._reconstructions),
            Section("What it learned", self._pictures),
            Section("Evaluation", self._scores),
            Section("Forecast and outcome", self._forecast),
            Section("Cost", self._cost),
        ]
        if record.pretrained or record.finetuned:
            sections.append(Section("Lineage", lambda: lineage(self.trail, self.uri)))
        return [*sections, Section("How to load it", self._loading)]

    def _asked(self) -> Html:
        rows = [("source", word(without_secrets(self.record.source)))]
        rows += [(key.replace("_", " "), _said(value)) for key, value in self.record.asked.items() if value]
        stages = [(stage, duration_in_words(seconds), words) for stage, seconds, words in self.record.stages]
        if self.record.failure:
            stages.append((self.record.failure["stage"], "", self.record.failure.get("ended", "failed")))
        made = [(stage, time, Html(f'<span class="wrap">{joined(words)}</span>')) for stage, time, words in stages]
        return joined(facts_table(rows), table(("stage", "time", "result"), made, numbers=(1,)))

    def _data(self) -> Html:
        paths = [path for path in (self.record.data, self.record.downstream) if path]
        return joined(*map(dataset_summary, paths)) if paths else paragraph(NOT_REACHED, "quiet")

    def _health(self) -> Html:
        if not self.trainings:
            return paragraph(NOT_REACHED, "quiet")
        told = ((name, facts) for name, facts in self.trainings.items())
        return joined(*(joined(Html(f"<h3>{name}</h3>"), health(facts)) for name, facts in told))

    def _reconstructions(self) -> Html:
        if not self.record.pretrained:
            return paragraph(NOT_REACHED, "quiet")
        figure = self.album.figure(Path(self.record.pretrained) / "reconstructions.png", *RECONSTRUCTIONS)
        return figure or paragraph("Not drawn: this pretraining fills in no hidden patches that can be shown.", "quiet")

    def _pictures(self) -> Html:
        folder = self.record.pictures
        if not folder:
            return paragraph(f"Not drawn: {NOT_REACHED}, or the model cannot be looked into.", "quiet")
        figures = [self.album.figure(Path(folder) / file, *words) for file, words in WORDS.items()]
        if not any(figures):
            return paragraph("Not drawn.", "quiet")
        return joined(Html('<div class="pictures">'), *figures, Html("</div>"))

    def _scores(self) -> Html:
        if not self.record.evaluation:
            return paragraph(f"{NOT_MEASURED}: {NOT_REACHED}", "quiet")
        models = facts_table(self.record.models.items()) if self.record.models else ""
        return joined(models, scores(Path(self.record.evaluation), self.record.baselines, self.album))

    def _forecast(self) -> Html:
        told = [facts for facts in self.trainings.values() if facts.forecast or facts.result.get("forecast")]
        if not told:
            return forecast(next(iter(self.trainings.values()))) if self.trainings else paragraph(NOT_REACHED, "quiet")
        return joined(*(joined(Html(f"<h3>{joined(facts.name)}</h3>"), forecast(facts)) for facts in told))

    def _cost(self) -> Html:
        rows, hours, price = [], 0.0, 0.0
        for name, facts in self.costs:
            cost = price_of(facts)
            hours, price = hours + (facts.hours or 0), price + (cost or 0)
            told = "in its sequence" if facts.hours is None else hours_in_words(facts.hours)
            rows.append((name, facts.stage, told, "" if cost is None else f"{cost:,.2f}"))
        rows.append(("all", "", hours_in_words(hours), f"{price:,.2f}" if price else ""))
        gpus = any(facts.plan.get("accelerators_per_node") for _, facts in self.costs)
        unit = "GPU-hours" if gpus else "hours of ranks (processes without accelerator)"
        words = f"In {unit}, measured by heartbeats, over all attempts."
        words += "" if price else " The profile names no price."
        columns = 4 if price else 3
        head = ("run", "stage", "hours", "price")[:columns]
        return joined(paragraph(words), table(head, [row[:columns] for row in rows], numbers=(2, 3)))

    def _loading(self) -> Html:
        if self.uri is None:
            return paragraph("Nothing was registered.", "quiet")
        source = RunDirectory(self.record.registration).plan()["source"]
        tracking_uri = str(self.registered.get("tracking_uri", self.record.tracking_uri))
        return loading(self.uri, tracking_uri, source.get("num_classes") or 0)


def _facts_of(path: str) -> RunFacts | None:
    """Of a run that can be read; one that cannot is told of elsewhere by its absence."""
    try:
        return read_run(RunDirectory(path))
    except Exception:  # of any version, half written or damaged: the others are still told of
        return None


def _training(facts: RunFacts) -> Html:
    return joined(folded("What was asked of it", asked(facts)), curves(facts), speed(facts))


def _said(value: Any) -> Html:
    values = value if isinstance(value, list) else [value]
    return joined(*(joined(word(without_secrets(str(one))), " ") for one in values))
