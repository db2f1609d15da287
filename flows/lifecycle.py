"""The whole path as one flow: ingest, pretrain, fine-tune, evaluate, register, look into, report.

With a `scratch_recipe` it keeps honest company: the same network from scratch, and both with a tenth of the labels.
"""

import contextvars
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Cancelled, Completed, Failed, State

from flows.control.progress import ingest_progress
from flows.home import home_directory, tracking_uri
from flows.lifecycle_report import lifecycle_folder, publish
from flows.orchestration.own_state import own_state, this_watch
from flows.orchestration.reporting import controlled, refused, reporter, settled, stop_job
from flows.requests.evaluation import evaluation_run
from flows.requests.inspection import inspection_run
from flows.requests.registration import registration_run
from flows.requests.training import sequence_run, training_run
from pipeline.config.ingest import IngestConfig
from pipeline.config.recipe import apply_overrides, parse_overrides, validate
from pipeline.errors import EXIT_DONE, InputError
from pipeline.ingestion.build import ingest as build_dataset
from pipeline.ingestion.making import IngestError
from pipeline.redaction import first_line, without_secrets
from pipeline.report.record import Record
from pipeline.run_directory import RunDirectory, read_json

TENTH = "data.label_fraction=0.1"
FROZEN, RANDOM_WEIGHTS = "pretrained, frozen", "random, frozen"  # encoders that the labels never reached
IN_WORDS = {
    "fine-tuned": "what is registered",
    "fine-tuned, tenth": "the same pretraining, fine-tuned on a tenth of the labels",
    "scratch": "the same network from random weights, on all labels",
    "scratch, tenth": "the same network from random weights, on a tenth of the labels",
    FROZEN: "the pretrained encoder as it is: no label has reached it",
    RANDOM_WEIGHTS: "the same encoder with random weights: what is left is the data's and the probe's",
}
PROTOCOLS = ("classify-v1", "calibration-v1", "knn-20-v1", "linear-cached-v1", "fewshot-lsr-v1")


class StageFailed(Exception):
    """A stage ended with another code than 0; the message says which and why."""


@dataclass
class Lifecycle:
    """What a lifecycle was asked, and what it has made so far, which its `record` says."""

    home: Path
    source: str
    name: str
    pretrain_recipe: str
    finetune_recipe: str
    scratch_recipe: str | None
    profile: str
    set: list[str]
    ingest_set: list[str]
    report: Callable[[str], None]
    stage: str = ""  # the one that is at work

    @functools.cached_property
    def record(self) -> Record:
        asked = {
            "pretrain_recipe": self.pretrain_recipe, "finetune_recipe": self.finetune_recipe,
            "scratch_recipe": self.scratch_recipe, "profile": self.profile,
            "set": [without_secrets(one) for one in self.set],
            "ingest_set": [without_secrets(one) for one in self.ingest_set],
        }  # fmt: skip
        source = without_secrets(self.source)
        return Record(self.name, source, str(self.home), tracking_uri(self.home), asked)

    def run(self) -> dict[str, Any]:
        """Every stage in order; returns {uri, tracking_uri, stages, metrics, pretrained, finetuned, report}.

        The report is written whatever becomes of the stages; it is None where it cannot be.
        """
        try:
            summary = self._run()
        except Exception as error:
            self.record.failure = {"stage": self.stage, "reason": without_secrets(str(error) or type(error).__name__)}
            publish(self.record, self.report)
            raise
        started = time.monotonic()
        path = publish(self.record, self.report)
        self.record.stages.append(("report", time.monotonic() - started, str(path or "not written")))
        return summary | {"stages": self.record.stages, "report": str(path) if path else None}

    def _run(self) -> dict[str, Any]:
        data = self._timed("ingest", self._ingest)
        pretrained = self._timed("pretrain", lambda: self._pretrain(data))
        finetuned = self._timed("fine-tune", lambda: self._finetune(pretrained, data, []))
        scored = {"fine-tuned": finetuned}
        if self.scratch_recipe:
            scored |= self._timed("compare", lambda: self._companions(pretrained, data))
        evaluation = self._timed("evaluate", lambda: self._evaluate(scored, pretrained, data))
        registered = self._timed("register", lambda: self._register(finetuned, evaluation))
        self._timed("inspect", lambda: self._inspect(finetuned, data))
        metrics = _result(evaluation)["metrics"]
        return _result(registered) | {
            "metrics": metrics, "pretrained": str(pretrained.path), "finetuned": str(finetuned.path), "data": str(data),
        }  # fmt: skip

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        self.stage = stage
        self.report(f"-- {stage}")
        started = time.monotonic()
        made = work()
        self.record.stages.append((stage, time.monotonic() - started, without_secrets(_words(made))))
        return made

    def _ingest(self) -> Path:
        destination = self.home / "data" / self.name
        config = validate(IngestConfig, apply_overrides({}, parse_overrides(self.ingest_set)), "ingest_set")
        build_dataset(self.source, destination, config, progress=ingest_progress(self.report))
        self.record.data = str(destination)
        return destination

    def _pretrain(self, data: Path) -> RunDirectory:
        run = self._training("pretrain", self.pretrain_recipe, data, self.set)
        self.record.pretrained = str(run.path)
        return self._done(run)

    def _finetune(self, pretrained: RunDirectory, data: Path, settings: list[str]) -> RunDirectory:
        run = self._finetuning(pretrained, data, settings)
        self.record.finetuned = str(run.path)
        return self._done(run)

    def _companions(self, pretrained: RunDirectory, data: Path) -> dict[str, RunDirectory]:
        """Scratch with all labels, and both with a tenth: two sets of one process each, side by side."""
        alone = ["micro_batch_size=64", "profile.ranks_per_node=1", "profile.env={OMP_NUM_THREADS: '1'}"]
        scratch = self._training("pretrain", self.scratch_recipe, data, alone)
        tenth = self._finetuning(pretrained, data, [TENTH, *alone])
        scratch_tenth = self._training("pretrain", self.scratch_recipe, data, [TENTH, *alone])
        compared = {"fine-tuned, tenth": tenth, "scratch": scratch, "scratch, tenth": scratch_tenth}
        sequences = [
            sequence_run(runs, profile=self.profile, overrides=alone, home=self.home)
            for runs in ([scratch], [tenth, scratch_tenth])
        ]
        context = contextvars.copy_context
        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(context().run, self._done, sequence) for sequence in sequences]:
                done.result()
        return compared

    def _evaluate(self, scored: dict[str, RunDirectory], pretrained: RunDirectory, data: Path) -> RunDirectory:
        models = {name: str(run.path) for name, run in scored.items()}
        models |= {FROZEN: str(pretrained.path), RANDOM_WEIGHTS: f"random:{pretrained.path}"}
        run = evaluation_run(
            models, data=str(data), protocols=PROTOCOLS, profile=self.profile, overrides=[], run_dir=None,
            home=self.home,
        )  # fmt: skip
        self.record.evaluation, self.record.models = str(run.path), {name: IN_WORDS[name] for name in models}
        return self._done(run)

    def _register(self, finetuned: RunDirectory, evaluation: RunDirectory) -> RunDirectory:
        run = registration_run(str(finetuned.path), self.name, home=self.home, evaluations=[str(evaluation.path)])
        self._done(run)
        self.record.registration = str(run.path)
        return run

    def _inspect(self, finetuned: RunDirectory, data: Path) -> str:
        """Pictures of what the model learned, on images that it was not trained on. What has none is registered all
        the same."""
        folder = lifecycle_folder(self.home, self.name) / "pictures"
        try:
            run = self._done(
                inspection_run(str(finetuned.path), [str(data)], str(folder), overrides=[], home=self.home)
            )
        except (InputError, StageFailed) as error:
            if this_watch().cancelled.is_set():
                raise
            self.record.notes.append(f"no pictures of what it learned: {without_secrets(str(error))}")
            return f"no pictures: {first_line(error)}"
        self.record.pictures = str(folder)
        return f"{len(_result(run)['pictures'])} pictures"

    def _training(
        self, stage: str, recipe: str, data: Path, settings: list[str], model: str | None = None
    ) -> RunDirectory:
        return training_run(
            stage, recipe, data=str(data), profile=self.profile, overrides=settings, run_dir=None, home=self.home,
            rehearse="never", model=model,
        )  # fmt: skip

    def _finetuning(self, pretrained: RunDirectory, data: Path, settings: list[str]) -> RunDirectory:
        return self._training("finetune", self.finetune_recipe, data, settings, model=str(pretrained.path))

    def _done(self, run: RunDirectory) -> RunDirectory:
        self.record.runs.append(str(run.path))
        conclusion = controlled(run, self.home, self.report)
        if conclusion.code != EXIT_DONE:
            raise StageFailed(conclusion.message)
        return run


def _result(run: RunDirectory) -> dict[str, Any]:
    return read_json(run.result_file)


def _words(made: Any) -> str:
    """A stage's result in a few words."""
    if isinstance(made, str | Path):
        return str(made)
    if isinstance(made, dict):
        return f"{len(made)} runs"
    result = _result(made)
    match result["stage"]:
        case "evaluate":
            first = next(iter(result["metrics"].values()))
            return ", ".join(f"{key.split('/')[1]} {value:.4f}" for key, value in first.items() if key.endswith("top1"))
        case "register":
            return result["summary"]
        case _:
            return f"loss {result['metrics']['train/loss']:.4f} after {result['steps']} steps"


@flow(name="lifecycle", flow_run_name="lifecycle-{name}", on_cancellation=[stop_job])
def lifecycle(
    source: str,
    name: str = "vit",
    pretrain_recipe: str = "pretrain_mae_vit_s16",
    finetune_recipe: str = "finetune_vit",
    scratch_recipe: str | None = None,
    profile: str = "local",
    set: list[str] = [],
    ingest_set: list[str] = [],
) -> State:
    """Images in, a registered and evaluated model out.

    Args:
        source: a folder of images, a glob of tars, or sklearn:digits; absolute.
        name: of the registered model, and of the dataset made from the source.
        pretrain_recipe: how the encoder is pretrained.
        finetune_recipe: how it is fine-tuned.
        scratch_recipe: the same network from scratch; with it, both are also trained on a tenth of the labels.
        profile: where to train.
        set: settings of the pretraining recipe, as key=value.
        ingest_set: settings of the ingestion, as key=value, for example labels=/data/labels.csv.
    """
    work = Lifecycle(
        home_directory(),
        source,
        name,
        pretrain_recipe,
        finetune_recipe,
        scratch_recipe,
        profile,
        set,
        ingest_set,
        reporter(),
    )
    with own_state(work.home, single=False) as watch:
        try:
            summary = work.run()
        except InputError as error:
            return settled(watch, refused(error))
        except (StageFailed, IngestError) as error:
            ended = Cancelled if watch.cancelled.is_set() else Failed
            return settled(watch, ended(message=without_secrets(str(error))))
        return settled(watch, Completed(message=summary["summary"], data=summary))
