"""What a report says of a training: what was asked, how it learned, whether it was healthy, how fast it was."""

from collections.abc import Sequence
from typing import Any

from pipeline.health.log import FILE as HEALTH_LOG
from pipeline.health.verdicts import Verdict
from pipeline.pages.parts import Html, bullets, facts_table, folded, joined, paragraph, table, word
from pipeline.report.charts import Line, line_chart
from pipeline.report.health import TITLES, Health
from pipeline.report.ledger import Curve
from pipeline.report.run_facts import RunFacts, price_of, unit_of_hours
from pipeline.training.start_table import off_in_words, start_table
from pipeline.words import bytes_in_words, duration_in_words, number_in_words

NOT_MEASURED = "not measured"
PLAIN = ("train/loss", "train/accuracy", "train/learning_rate", "train/gradient_norm", "train/skipped")
LISTED = 400  # verdicts at most
FIRST_COLUMN = 12  # of the start table's lines


def asked(facts: RunFacts) -> Html:
    """What was trained on what, for how long and how, as the run began."""
    rows: list[tuple[str, object]] = []
    if command := facts.provenance.get("command"):
        rows.append(("command", word(" ".join(["vit", *command[1:]]))))
    if facts.config is not None and facts.plan.get("batches"):
        for line in start_table(facts.config, facts.plan):
            rows.append((line[:FIRST_COLUMN].strip(), line[FIRST_COLUMN:]))
    rows.append(("seed", facts.raw.get("seed", "not recorded")))
    if parent := facts.plan.get("initialise_from"):
        rows.append(("began from", word(str(parent.get("reference", "a model that is not named")))))
    rows.append(("where", _placement(facts)))
    notes = [note for note in facts.plan.get("notes") or ()]
    return joined(facts_table(rows), bullets(notes) if notes else "")


def _placement(facts: RunFacts) -> str:
    plan = facts.plan
    devices = "an accelerator each" if plan.get("accelerators_per_node") else "no accelerator"
    host = f", on {facts.provenance['host']}" if facts.provenance.get("host") else ""
    nodes, ranks = plan.get("nodes", 1), plan.get("ranks_per_node", 1)
    return (
        f"profile {facts.profile.get('kind', 'not recorded')}: {nodes} node{'s' * (nodes != 1)} of {ranks} "
        f"rank{'s' * (ranks != 1)}, {devices}{host}"
    )


def curves(facts: RunFacts) -> Html:
    """Loss, accuracy, what else the objective tells, and rates, over the steps."""
    found = facts.story.curves
    if not found:
        return paragraph(f"{NOT_MEASURED}: the run has no ledger", "quiet")
    charts = [
        _chart(facts, "Loss", ("training", "train/loss"), ("validation", "validation/loss"), logarithmic=True),
        _chart(facts, "Accuracy, 0 to 1", ("training", "train/accuracy"), ("validation", "validation/accuracy")),
    ]
    own = [key for key in sorted(found) if key.startswith("train/") and key not in PLAIN]
    own += [
        key
        for key in sorted(found)
        if key.startswith("validation/") and key.partition("/")[2] not in ("loss", "accuracy")
    ]
    for name in dict.fromkeys(key.partition("/")[2] for key in own):
        title = name.replace("_", " ").capitalize()
        charts.append(_chart(facts, title, ("training", f"train/{name}"), ("validation", f"validation/{name}")))
    charts += [
        _chart(facts, "Learning rate", ("last", "train/learning_rate")),
        _chart(facts, "Gradient norm before clipping", ("last", "train/gradient_norm"), logarithmic=True),
        _chart(facts, "Images per second", ("last", "perf/images_per_second")),
    ]
    thinned = "Of a ledger this long one line in several is drawn; validations all. " if facts.story.thinned else ""
    spread = "Where steps share a point: their mean, and around it the least and greatest."
    return joined(Html(f'<div class="curves">{"".join(charts)}</div>'), paragraph(thinned + spread, "quiet"))


def _chart(facts: RunFacts, title: str, *wanted: tuple[str, str], logarithmic: bool = False) -> Html:
    kinds = ("one", "two")
    lines = [
        Line(name, facts.story.curves[key], kind)
        for (name, key), kind in zip(wanted, kinds, strict=False)
        if key in facts.story.curves
    ]
    return line_chart(title, lines, last_step=facts.steps_planned, logarithmic=logarithmic)


def health(facts: RunFacts) -> Html:
    """Each measurement's newest verdict, its curve before the band it was held against, and what was outside."""
    told = facts.health
    if not told.measured:
        is_off = (facts.raw.get("health") or {}).get("every_steps") == 0
        why = f"the run kept no {HEALTH_LOG}"
        if is_off:
            why = off_in_words(facts.plan, facts.steps_planned)
        return paragraph(f"{NOT_MEASURED}: {why}", "quiet")
    charts = [_health_chart(facts, told, metric) for metric in told.metrics]
    judged = [one for one in told.measured if one.verdict != "no band"]
    if judged:
        words = f"{len(judged) - len(told.outside):,} of {len(judged):,} measurements with a band were inside it."
        newest = joined(bullets(told.of(metric)[-1].words or metric for metric in told.metrics), _verdicts(told))
    else:
        words = "There was no band to hold the measurements against: they are shown, not judged."
        rows = [(TITLES.get(metric, metric), _figure(told.of(metric)[-1].value)) for metric in told.metrics]
        newest = table(("measured", "newest value"), rows, numbers=(1,))
    basis = f" Bands: {told.basis}." if told.basis else ""
    lines = [one.words or one.metric for one in told.measured]
    more = f" (the newest {LISTED} of {len(lines):,})" if len(lines) > LISTED else ""
    return joined(
        paragraph(words + basis),
        newest,
        Html(f'<div class="curves">{"".join(charts)}</div>'),
        folded(f"Every verdict in words{more}", bullets(lines[-LISTED:])),
    )


def _verdicts(told: Health) -> Html:
    rows = [_health_row(metric, told.of(metric)) for metric in told.metrics]
    return table(("measured", "newest value", "expected", "verdict", "outside"), rows, numbers=(1, 2))


def _health_row(metric: str, measured: Sequence[Verdict]) -> tuple[object, ...]:
    newest, outside = measured[-1], sum(one.verdict in ("low", "high") for one in measured)
    low, high = newest.low, newest.high
    match low is not None, high is not None:
        case True, True:
            expected = f"{low:.4g} – {high:.4g}"
        case True, False:
            expected = f"at least {low:.4g}"
        case False, True:
            expected = f"at most {high:.4g}"
        case _:
            expected = "no band"
    kind = {"ok": "good", "low": "bad", "high": "bad"}.get(newest.verdict)
    mark = Html(f'<span class="mark {kind}">{newest.verdict}</span>') if kind else ""
    judged = sum(one.verdict != "no band" for one in measured)
    times = f"{outside} of {judged} times" if judged else ""
    return TITLES.get(metric, metric), _figure(newest.value), expected, mark, times


def _health_chart(facts: RunFacts, told: Health, metric: str) -> Html:
    measured = [one for one in told.of(metric) if one.value is not None]
    if not measured:
        return paragraph(f"{TITLES.get(metric, metric)}: never a finite number", "quiet")
    steps, values = [float(one.step) for one in measured], [float(one.value) for one in measured]
    last = max(facts.steps_planned, *steps)
    band = [(progress * last, low, high) for progress, low, high in told.bands.get(metric, ())]
    if not band:
        band = [(one.step, one.low, one.high) for one in measured if None not in (one.low, one.high)]
    line = Line("measured", Curve(steps, values, values, values, values[-1]))
    return line_chart(TITLES.get(metric, metric), [line], band=band, last_step=last)


def speed(facts: RunFacts) -> Html:
    """Where the time went at the end, and what it came to."""
    found = {key: curve.last for key, curve in facts.story.curves.items()}
    rows: list[tuple[str, object]] = []
    if "perf/images_per_second" in found:
        rows.append(
            ("images per second", f"{number_in_words(found['perf/images_per_second'])}, mean of the last steps")
        )
    if "perf/mfu" in found:
        rows.append(("share of the devices' peak (MFU)", f"{100 * found['perf/mfu']:.1f} %"))
    if "perf/data_wait_share" in found:
        rows.append(("waiting for data", f"{100 * found['perf/data_wait_share']:.0f} % of the time"))
    if "perf/step_seconds" in found:
        parts = ("data", "forward", "backward", "update")
        each = [
            f"{part} {1000 * found[f'perf/{part}_seconds']:.3g} ms" for part in parts if f"perf/{part}_seconds" in found
        ]
        rows.append(("a step", f"{1000 * found['perf/step_seconds']:.3g} ms: {', '.join(each)}"))
    if "perf/peak_memory_bytes" in found:
        planned = (facts.plan.get("memory_bytes_per_rank") or {}).get(
            f"stage {(facts.raw.get('zero') or {}).get('stage')}"
        )
        plan = f"; planned for the model and its optimizer: {bytes_in_words(planned)}" if planned else ""
        rows.append(("memory of a rank at most", bytes_in_words(found["perf/peak_memory_bytes"]) + plan))
    return joined(facts_table([*rows, *ended(facts)]))


def ended(facts: RunFacts) -> list[tuple[str, object]]:
    """How far it came, by how many attempts, and at what cost."""
    reached = f"{facts.story.last_step:,} of {facts.steps_planned:,}"
    rows: list[tuple[str, object]] = [("steps", reached), ("attempts", facts.run.last_attempt())]
    if facts.story.skipped:
        rows.append(("steps that left the weights alone", f"{facts.story.skipped:,}: loss or gradient was not finite"))
    if rolled := facts.run.rolled_back():
        rows.append(("gone back over", f"{len(rolled)} times, {sum(one.end - one.start for one in rolled):,} images"))
    rows.append((unit_of_hours(facts), NOT_MEASURED if facts.hours is None else _hours(facts.hours)))
    if (price := price_of(facts)) is not None:
        rows.append(("price by the profile", f"{price:,.2f}"))
    return rows


def _hours(value: float) -> str:
    return f"{hours_in_words(value)} ({duration_in_words(3600 * value)})"


def hours_in_words(value: float) -> str:
    """To a hundredth, which is half a minute; of less than an hour three digits that count."""
    return number_in_words(value) if value < 0.995 else f"{value:,.2f}"


def forecast(facts: RunFacts) -> Html:
    """What was said before the run, beside what came of it."""
    graded, said = facts.result.get("forecast") or {}, facts.forecast.get("forecasts") or {}
    names = list(dict.fromkeys([*said, *graded]))
    if not names:
        hint = "<code>vit ladder</code> on the same data gives the next run one."
        return paragraph(Html(f"{NOT_MEASURED}: nothing was forecast. {hint}"), "quiet")
    rows = []
    for name in names:
        one = said.get(name, {}) | graded.get(name, {})
        named = f"{name} ({one['metric']})" if one.get("metric") else name
        value, low, high, outcome = (
            _amount(one.get(key), one.get("unit")) for key in ("value", "low", "high", "outcome")
        )
        rows.append((named, value, f"{low} – {high}", outcome, _grade(one.get("inside"))))
    basis = f"Rests on: {facts.forecast['basis']}." if facts.forecast.get("basis") else ""
    return joined(
        table(("forecast", "said", "80 % interval", "outcome", ""), rows, numbers=(1, 2, 3)), paragraph(basis, "quiet")
    )


def _grade(inside: bool | None) -> object:
    if inside is None:
        return "not graded"
    return Html('<span class="mark good">inside</span>' if inside else '<span class="mark bad">outside</span>')


def _amount(value: Any, unit: str | None) -> str:
    """A duration, a share in percent, or a number with its unit."""
    if not isinstance(value, int | float):
        return "not known"
    match unit:
        case "hours":
            return duration_in_words(3600 * value)
        case "share":
            return f"{100 * value:.1f} %"
        case "price":
            return f"{value:,.2f}"
    return _figure(value) + (f" {unit}" if unit else "")


def _figure(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, int | float) else "not known"


def is_healthy(facts: RunFacts) -> bool:
    """Whether nothing in the newest measurement is bad; k-NN below its band alone is not."""
    return not facts.health.bad


def best(facts: RunFacts) -> str:
    """The best state by its validation, in words; empty where none was scored."""
    found = facts.result.get("best") or {}
    return f"{found['metric']} {found['value']:.4f} at step {found['step']:,}" if found else ""
