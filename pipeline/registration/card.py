"""The model card: what a person must know of a registered model before using it, as far as it is known. Torch-free."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from models.encoders.config import EncoderConfig
from models.encoders.timm_config import read_encoder
from pipeline.registry.locate import ModelSource
from pipeline.words import number_in_words

CLASSES_NAMED = 20


class Facts(NamedTuple):
    """What is known beside the model itself; what is not known is left empty."""

    metrics: Mapping[str, float] = {}  # eval/PROTOCOL/DATASET/METRIC
    intervals: Mapping[str, tuple[float, float]] = {}
    scored: Mapping[str, Mapping[str, Any]] = {}  # by dataset: fingerprint, split, count
    test_reads: Mapping[str, int] = {}  # by "PROTOCOL/DATASET FINGERPRINT"
    training: Mapping[str, Any] | None = None  # of the run: data, recipe, compute, as `trained.training_facts` has them
    licence: str | None = None
    forecast: Mapping[str, Mapping[str, Any]] = {}  # value, low, high; outcome, inside where known
    uri: str = "models:/NAME/VERSION"


def model_card(source: ModelSource, facts: Facts) -> str:
    """The README.md of a registered model, as Markdown."""
    training = facts.training or {}
    sections = {
        "Data": _data(source, training.get("data", ())),
        "How it learned": _recipe(source, training.get("recipe", {})),
        "Compute": _rows(training.get("compute", {})) or "Not recorded.",
        "Results": _results(facts),
        **({"Forecast": _forecast(facts.forecast)} if facts.forecast else {}),
        "Limits": _limits(source, facts),
        "Licence": facts.licence or "Not stated by whoever registered it.",
        "How to load": _loading(source, facts.uri),
    }
    return f"{_title(source)}\n" + "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items())


def _title(source: ModelSource) -> str:
    encoder = read_encoder(source.encoder)
    kind, size = "Image model", ""
    if isinstance(encoder, EncoderConfig):
        kind = "Vision Transformer"
        size = f"{encoder.depth} blocks, width {encoder.embed_dim}, patch {encoder.patch_size}; "
    head = f"{source.num_classes:,} classes" if source.num_classes else "no head: it gives pooled features"
    return f"# {kind} {encoder.name}\n\n{size}{_pixels(source)} pixels, {encoder.channels} channels; {head}.\n"


def _pixels(source: ModelSource) -> str:
    height, width = read_encoder(source.encoder).input_size
    return f"{height}" if height == width else f"{height} x {width} (height x width)"


def _data(source: ModelSource, datasets: Any) -> str:
    lines = []
    for one in datasets:
        counts = ", ".join(f"{split} {count:,}" for split, count in one.get("splits", {}).items()) or "counts not known"
        share = f", drawn with weight {one['weight']:g}" if "weight" in one else ""
        lines.append(f"- `{one['name']}`: images per split: {counts}; fingerprint `{one['fingerprint']}`{share}")
        if one.get("certificate_sha256"):
            lines.append(f"  - certificate: sha256 `{one['certificate_sha256']}`")
        if one.get("trained_on"):
            lines.append(f"  - trained on: {one['trained_on']}")
    lines = lines or [f"- fingerprint `{source.lineage.get('data_fingerprint') or 'not known'}`"]
    if source.classes:
        more = len(source.classes) - CLASSES_NAMED
        named = ", ".join(source.classes[:CLASSES_NAMED]) + (f" and {more:,} more" if more > 0 else "")
        lines.append(f"- classes: {named}")
    return "\n".join(lines)


def _recipe(source: ModelSource, recipe: Mapping[str, Any]) -> str:
    facts = {"objective": source.objective or "not known"} | dict(recipe)
    facts["parent"] = source.lineage.get("parent") or "none, from random weights"
    if (tuning := source.lineage.get("tuning") or "full") != "full":
        of_encoder = "the head alone" if tuning == "head" else "a few, merged into the weights here"
        facts["trained parameters"] = f"{of_encoder} (tuning.kind {tuning})"
    if source.lineage.get("teacher"):
        facts["teacher"] = source.lineage["teacher"]
    if source.lineage.get("config_sha256"):
        facts["config"] = f"sha256 `{source.lineage['config_sha256']}`"
    return _rows(facts)


def _rows(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items())


def _cell(value: Any) -> str:
    text = number_in_words(value) if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _results(facts: Facts) -> str:
    if not facts.metrics:
        return "None recorded: it was not evaluated before it was registered."
    lines = ["| metric | value | 95 % interval |", "|---|---|---|"]
    for key, value in sorted(facts.metrics.items()):
        low_high = facts.intervals.get(key)
        lines.append(f"| {key} | {value:.4f} | {'{:.4f} – {:.4f}'.format(*low_high) if low_high else ''} |")
    if facts.test_reads:
        reads = ", ".join(f"{key.split()[0]} {count}x" for key, count in sorted(facts.test_reads.items()))
        lines += ["", f"How often a test split was read to score these weights, by then: {reads}."]
    return "\n".join(lines)


def _forecast(forecasts: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["Said before the run was submitted, beside what came of it.", "",
             "| | forecast | 80 % interval | outcome | |", "|---|---|---|---|---|"]  # fmt: skip
    for name, one in forecasts.items():
        came, verdict = "not known", ""
        if "outcome" in one:
            came, verdict = f"{one['outcome']:.4g}", "inside" if one["inside"] else "outside"
        lines.append(f"| {name} | {one['value']:.4g} | {one['low']:.4g} – {one['high']:.4g} | {came} | {verdict} |")
    return "\n".join(lines)


def _limits(source: ModelSource, facts: Facts) -> str:
    protocols = {key.split("/")[1] for key in facts.metrics if key.count("/") > 1}
    lines = []
    if facts.scored:
        lines.append(
            f"Scored on {', '.join(f'`{name}`' for name in facts.scored)} alone; of other data nothing is known."
        )
    else:
        lines.append("Not scored on any data: how good it is, is not known.")
    lines.append(f"Every image is brought to {_pixels(source)} pixels: smaller ones are enlarged, and what is lost of "
                 "larger ones it does not see.")  # fmt: skip
    if source.num_classes:
        forced = "each class gets a probability of its own" if source.outputs == "sigmoid" else (
            "the probabilities are of these classes alone and sum to one, also for an image of none of them"
        )  # fmt: skip
        lines.append(f"It knows the classes above and no others; {forced}.")
    else:
        lines.append("It has no head: its features are for fine-tuning, a probe or a search, and name nothing.")
    untested = [words for word, words in (("calibration", "calibration of its probabilities"),
                                          ("robust", "damaged or corrupted images"))
                if not any(word in protocol for protocol in protocols)]  # fmt: skip
    if untested:
        lines.append(f"Not tested: {', '.join(untested)}.")
    return "\n".join(f"- {line}" for line in lines)


def _loading(source: ModelSource, uri: str) -> str:
    gives = "probabilities" if source.num_classes else "features"
    return f"""Needs torch, timm and mlflow; none of the code that trained it, and nothing is unpickled.

```python
import mlflow, timm

model = mlflow.pyfunc.load_model("{uri}")  # arrays, PIL images, bytes, paths, data frames
{gives} = model.predict(["photo.jpg"])

module = model.unwrap_python_model().module  # a trainable timm module

path = mlflow.artifacts.download_artifacts("{uri}")
module = timm.create_model("local-dir:" + path + "/artifacts/hf", pretrained=True)
```"""
