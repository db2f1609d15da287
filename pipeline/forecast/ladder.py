"""What a rehearsal ladder found, `HOME/ladders/NAME/ladder.json`, and whether it speaks of a run. Torch-free."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.encoders.config import EncoderConfig
from models.encoders.size import encoder_parameters
from pipeline.config.training import TrainingConfig
from pipeline.forecast.law import Interval, Law, TooEarly, falls_faster, fit
from pipeline.run_directory import read_json, write_json

FOLDER = "ladders"
FILE = "ladder.json"
OF_SIZE = ("name", "embed_dim", "depth", "num_heads", "mlp_ratio")  # of an encoder: what rungs differ in
COMPARED = ("stage", "objective", "augmentation", "optimizer", "encoder", "tuning", "global_batch_size", "ema_decay")
BEGUN = 0.5  # of the error of guessing: above it intervals held 0 to 60 of a hundred outcomes of sigmoid curves
LARGER = "give larger ladder.fractions"
SAME_EPOCHS = 0.05  # lengths are whole steps, so those of slices differ a little


@dataclass(frozen=True)
class Score:
    """How rungs are scored: `name` of the forecast (accuracy, or loss where there are no labels), `metric` of the
    ledger or of an evaluation, how it was taken in `words`, and the worst error there is."""

    name: str
    metric: str
    words: str
    bound: float
    protocol: str | None = None

    def error(self, value: float) -> float:
        return 1.0 - value if self.name == "accuracy" else value

    def of_errors(self, interval: Interval) -> Interval:
        """An interval of errors as one of scores."""
        if self.name != "accuracy":
            return interval
        return Interval(1.0 - interval.value, 1.0 - interval.high, 1.0 - interval.low)

    def measured(self, error: float, count: int) -> float:
        """The standard error of an error rate over `count` images; of a loss it is part of the scatter."""
        return standard_error(error, count) if self.name == "accuracy" else 0.0


def standard_error(share: float, count: int) -> float:
    """Of a share of `count` images, also where it is none or all of them."""
    share = (share * count + 1) / (count + 2)
    return math.sqrt(share * (1 - share) / (count + 2))


@dataclass(frozen=True)
class Rung:
    """A small run: what it read and how large it was, and its score where it is done, else why not. `curves` are its
    health by metric: [progress of the run, value]."""

    name: str
    run: str
    samples: int
    parameters: int
    value: float | None = None
    count: int = 0  # images that it was scored on
    why: str | None = None
    curves: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ladder:
    """A finished or partly finished ladder."""

    directory: Path
    recipe: str
    data: Mapping[str, Any]  # name, fingerprint
    settings: Mapping[str, Any]  # that a run must share, see `compared`
    epochs: float
    score: Score
    rungs: tuple[Rung, ...]

    @property
    def done(self) -> list[Rung]:
        return [rung for rung in self.rungs if rung.value is not None]

    def law(self) -> Law:
        """NoForecast where the rungs that are done are not enough, or have learned too little."""
        errors = [self.score.error(rung.value) for rung in self.done]
        measured = [self.score.measured(error, rung.count) for error, rung in zip(errors, self.done, strict=True)]
        predictors = [(rung.samples, rung.parameters) for rung in self.done]
        bound = self.score.bound if self.score.name == "accuracy" else 10 * max(errors, default=1.0)
        law = fit(errors, predictors, measured, bound=bound)
        if self.score.name == "accuracy" and min(errors) > BEGUN * bound:
            raise TooEarly(f"the best errs in {min(errors):.3f} and guessing in {bound:.3f}; {LARGER}")
        if self.score.name != "accuracy" and falls_faster(errors, predictors, measured):
            raise TooEarly(f"the {self.score.name} falls faster from slice to slice, which no power law does; {LARGER}")
        return law

    def forecast(self, samples: int, parameters: int) -> Interval:
        """The score of a run that sees so many images with so many parameters; NoForecast where nobody can
        tell."""
        law, count = self.law(), max(rung.count for rung in self.done)
        middle = float(np.median(law.draws((samples, parameters))))
        return self.score.of_errors(law.predict((samples, parameters), self.score.measured(middle, count)))

    def write(self, more: Mapping[str, Any]) -> None:
        """`ladder.json`, with what was made of it for the recipe's own run."""
        content = {
            "format_version": 1, "recipe": self.recipe, "data": self.data, "settings": self.settings,
            "epochs": self.epochs, "score": asdict(self.score), "rungs": [asdict(rung) for rung in self.rungs],
        }  # fmt: skip
        write_json(self.directory / FILE, content | dict(more))


def read_ladder(directory: Path) -> Ladder | None:
    """None where there is none, or none that can be read."""
    try:
        said = read_json(directory / FILE)
        if said is None or said.get("format_version") != 1:
            return None
        rungs = tuple(Rung(**rung) for rung in said["rungs"])
        return Ladder(directory, said["recipe"], said["data"], said["settings"], said["epochs"], Score(**said["score"]),
                      rungs)  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def ladders(home: Path) -> Iterator[Ladder]:
    """Those of a home, the newest first."""
    files = [path for path in (home / FOLDER).glob(f"*/{FILE}") if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        if (ladder := read_ladder(path.parent)) is not None:
            yield ladder


def compared(config: TrainingConfig) -> dict[str, Any]:
    """The settings that a run must share with a ladder: what is learned, how, from what pixels. Not its size, its
    length, its seed, and nothing of where and how fast it runs."""
    raw = config.model_dump(mode="json")
    settings = {key: raw[key] for key in COMPARED if key in raw}
    settings["encoder"] = {key: value for key, value in raw["encoder"].items() if key not in OF_SIZE}
    settings["data"] = {key: raw["data"][key] for key in ("split", "evaluation_crop", "evaluation_crop_mode")}
    return settings


def epochs_of(plan: Mapping[str, Any]) -> float:
    """Passes over the images of a run."""
    return plan["steps"]["samples"] / plan["samples_per_epoch"]


def size_of(config: TrainingConfig, plan: Mapping[str, Any]) -> int:
    """Parameters of the encoder; of a network of timm's, with its head."""
    plain = isinstance(config.encoder, EncoderConfig)
    return int(encoder_parameters(config.encoder) if plain else plan["parameters"])


def differences(ours: Any, theirs: Any, key: str = "") -> Iterator[str]:
    """`optimizer.learning_rate is 0.001 there and 0.0003 here`, of what differs."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in dict.fromkeys([*ours, *theirs]):
            yield from differences(ours.get(name), theirs.get(name), f"{key}.{name}" if key else name)
    elif ours != theirs:
        yield f"{key} is {theirs!r} there and {ours!r} here"


def why_not(ladder: Ladder, config: TrainingConfig, plan: Mapping[str, Any]) -> str | None:
    """Why a ladder says nothing of a run; None where it does."""
    if ladder.data["fingerprint"] != plan["data"]["fingerprint"]:
        return f"it is of other data ({ladder.data['name']}, fingerprint {ladder.data['fingerprint'][:12]})"
    if different := list(differences(compared(config), ladder.settings)):
        more = f", and {len(different) - 1} more" if len(different) > 1 else ""
        return f"{different[0]}{more}"
    epochs = epochs_of(plan)
    if abs(math.log(epochs / ladder.epochs)) > SAME_EPOCHS:
        return f"its rungs see each image {ladder.epochs:.3g} times and this run {epochs:.3g} times"
    return None
