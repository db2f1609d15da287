"""The whole path as one flow: ingest, pretrain, fine-tune, evaluate, register, look into, report.

With a `scratch_recipe` it keeps honest company: the same network from scratch, and both with a tenth of the labels.
"""

import contextlib
import contextvars
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Cancelled, Completed, Failed, State

from flows.control.jobs import on_interrupt
from flows.control.progress import certificate_lines, ingest_progress, ingest_words
from flows.home import home_directory, tracking_uri
from flows.lifecycle_report import lifecycle_folder, publish
from flows.orchestration.own_state import own_state, this_watch
from flows.orchestration.reporting import TERMINAL, Terminal, controlled, refused, reporter, settled, stop_job
from flows.requests.evaluation import evaluation_run
from flows.requests.inspection import inspection_run
from flows.requests.lifecycle import (
    LifecycleRequest,
    companion_settings,
    pretraining_run,
    protocols_for,
    require_downstream,
    require_valid,
)
from flows.requests.named import dataset
from flows.requests.registration import registration_run
from flows.requests.training import sequence_run, training_run
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, InputError
from pipeline.ingestion.build import ingest as build_dataset
from pipeline.ingestion.making import IngestError
from pipeline.redaction import first_line, without_secrets
from pipeline.report.record import Record, read_record
from pipeline.run_directory import RunDirectory, read_json
from pipeline.shards.index import DatasetIndex
from pipeline.storage.location import Location

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


class StageFailed(Exception):
    """A stage ended with another exit code than 0, which is `code`; the message says which and why."""

    def __init__(self, message: str, code: int = EXIT_FAILED):
        super().__init__(message)
        self.code = code


@dataclass
class Lifecycle:
    """What a lifecycle was asked, and what it has made so far, which its `record` says."""

    home: Path
    asked: LifecycleRequest
    report: Callable[[str], None]
    stage: str = ""  # the one that is at work

    @functools.cached_property
    def record(self) -> Record:
        source = without_secrets(self.asked.source)
        return Record(self.asked.name, source, str(self.home), tracking_uri(self.home), self.asked.told())

    def run(self) -> dict[str, Any]:
        """Every stage in order; returns {uri, tracking_uri, stages, metrics, pretrained, finetuned, report}.

        The report is written whatever becomes of the stages; it is None where it cannot be.
        """
        try:
            summary = self._run()
        except Exception as error:
            ended = "stopped" if getattr(error, "code", EXIT_FAILED) == EXIT_STOPPED else "failed"
            reason = without_secrets(str(error) or type(error).__name__)
            self.record.failure = {"stage": self.stage, "reason": reason, "ended": ended}
            if not (isinstance(error, InputError) and not self.record.runs and self._has_finished()):
                publish(self.record, self.report)
            raise
        started = time.monotonic()
        path = publish(self.record, self.report)
        self.record.stages.append(("report", time.monotonic() - started, str(path or "not written")))
        return summary | {"stages": self.record.stages, "report": str(path) if path else None}

    def _has_finished(self) -> bool:
        """Whether a lifecycle of this name came to a registered model: nothing refused takes its report's place."""
        before = read_record(lifecycle_folder(self.home, self.asked.name))
        return before is not None and before.registration is not None

    def _run(self) -> dict[str, Any]:
        data = self._timed("ingest", self._ingest)
        downstream = self._downstream(data)
        pretrained = self._timed("pretrain", lambda: self._pretrain(data))
        finetuned = self._timed("fine-tune", lambda: self._finetune(pretrained, downstream.directory))
        scored = {"fine-tuned": finetuned}
        if self.asked.scratch_recipe:
            scored |= self._timed("compare", lambda: self._companions(pretrained, downstream.directory))
        evaluation = self._timed("evaluate", lambda: self._evaluate(scored, pretrained, downstream))
        registered = self._timed("register", lambda: self._register(finetuned, evaluation))
        self._timed("inspect", lambda: self._inspect(finetuned, downstream.directory))
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
        """The dataset: of the source, or the source itself where it is one already."""
        if self.asked.is_dataset:
            self.record.data = self.asked.source
            return Path(self.asked.source)
        destination, show = self.home / "data" / self.asked.name, ingest_progress(self.report)
        cancelled, here = this_watch().cancelled, TERMINAL.get() is not None

        def progress(*told: Any) -> None:
            if cancelled.is_set():  # in Prefect
                raise KeyboardInterrupt
            show(*told)

        interrupted = on_interrupt(cancelled, signal.SIGINT, at_once=True) if here else contextlib.nullcontext()
        try:
            with interrupted:
                report = build_dataset(self.asked.source, destination, self.asked.ingest_config, progress=progress)
        except KeyboardInterrupt as stopped:
            if not cancelled.is_set():
                raise
            raise StageFailed(str(stopped) or "stopped", EXIT_STOPPED) from None
        for line in [ingest_words(report), *certificate_lines(report)]:
            self.report(line)
        self.record.data = str(destination)
        return destination

    def _downstream(self, data: Path) -> DatasetIndex:
        """What is fine-tuned and scored on. InputError where it cannot be, before anything is trained."""
        index = dataset(self.asked.downstream or str(data), self.home)
        require_downstream(index, self.asked)
        self.record.downstream = str(index.directory) if self.asked.downstream else None
        return index

    def _pretrain(self, data: Path) -> RunDirectory:
        run = pretraining_run(self.asked, data, self.home)
        self.record.pretrained = str(run.path)
        return self._done(run)

    def _finetune(self, pretrained: RunDirectory, data: Location) -> RunDirectory:
        run = self._finetuning(pretrained, data, [*self.asked.of_profile, *self.asked.finetune_set])
        self.record.finetuned = str(run.path)
        return self._done(run)

    def _companions(self, pretrained: RunDirectory, data: Location) -> dict[str, RunDirectory]:
        """Scratch with all labels, and both with a tenth."""
        settings, side_by_side = companion_settings(self.asked)
        scratch = self._training("pretrain", self.asked.scratch_recipe, data, settings)
        tenth = self._finetuning(pretrained, data, [*self.asked.finetune_set, TENTH, *settings])
        scratch_tenth = self._training("pretrain", self.asked.scratch_recipe, data, [TENTH, *settings])
        compared = {"fine-tuned, tenth": tenth, "scratch": scratch, "scratch, tenth": scratch_tenth}
        sequences = [
            sequence_run(runs, profile=self.asked.profile, overrides=settings, home=self.home)
            for runs in ([[scratch], [tenth, scratch_tenth]] if side_by_side else [[scratch, tenth, scratch_tenth]])
        ]
        context = contextvars.copy_context
        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(context().run, self._done, sequence) for sequence in sequences]:
                done.result()
        return compared

    def _evaluate(
        self, scored: dict[str, RunDirectory], pretrained: RunDirectory, index: DatasetIndex
    ) -> RunDirectory:  # fmt: skip
        models = {name: str(run.path) for name, run in scored.items()}
        models |= {FROZEN: str(pretrained.path), RANDOM_WEIGHTS: f"random:{pretrained.path}"}
        run = evaluation_run(
            models, data=str(index.directory), protocols=protocols_for(index), profile=self.asked.profile,
            overrides=self.asked.of_profile, run_dir=None, home=self.home,
        )  # fmt: skip
        self.record.evaluation, self.record.models = str(run.path), {name: IN_WORDS[name] for name in models}
        return self._done(run)

    def _register(self, finetuned: RunDirectory, evaluation: RunDirectory) -> RunDirectory:
        run = registration_run(str(finetuned.path), self.asked.name, home=self.home, evaluations=[str(evaluation.path)])
        self._done(run)
        self.record.registration = str(run.path)
        return run

    def _inspect(self, finetuned: RunDirectory, data: Location) -> str:
        """Pictures of what the model learned, on images that it was not trained on. What has none is registered all
        the same."""
        folder = lifecycle_folder(self.home, self.asked.name) / "pictures"
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
        self, stage: str, recipe: str, data: Location, settings: Sequence[str], model: str | None = None
    ) -> RunDirectory:
        return training_run(
            stage, recipe, data=str(data), profile=self.asked.profile, overrides=settings, run_dir=None, home=self.home,
            rehearse="never", model=model,
        )  # fmt: skip

    def _finetuning(self, pretrained: RunDirectory, data: Location, settings: list[str]) -> RunDirectory:
        return self._training("finetune", self.asked.finetune_recipe, data, settings, model=str(pretrained.path))

    def _done(self, run: RunDirectory) -> RunDirectory:
        self.record.runs.append(str(run.path))
        conclusion = controlled(run, self.home, self.report)
        if conclusion.code != EXIT_DONE:
            raise StageFailed(conclusion.message, conclusion.code)
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
            return ", ".join(_score(key, value) for key, value in first.items() if key.endswith("top1"))
        case "register":
            return result["summary"]
        case _:
            return f"loss {result['metrics']['train/loss']:.4f} after {result['steps']} steps"


def _score(key: str, value: float) -> str:
    """Of `eval/PROTOCOL/DATASET.validation/top1`: the scores of other splits than `test` say theirs."""
    _, protocol, scored, *_ = key.split("/")
    return f"{protocol}{' on validation' if scored.endswith('.validation') else ''} {value:.4f}"


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
    downstream: str | None = None,
    finetune_set: list[str] = [],
) -> State:
    """Images in, a registered and evaluated model out.

    Args:
        source: a folder of images, a glob of tars, a dataset directory, or sklearn:digits; absolute.
        name: of the registered model, and of the dataset made from the source.
        pretrain_recipe: how the encoder is pretrained.
        finetune_recipe: how it is fine-tuned.
        scratch_recipe: the same network from scratch; with it, both are also trained on a tenth of the labels.
        profile: where to train.
        set: settings of the pretraining recipe, as key=value; those of the profile are every stage's.
        ingest_set: settings of the ingestion, as key=value, for example labels=/data/labels.csv.
        downstream: the labelled dataset to fine-tune and evaluate on; by default the one made from the source.
        finetune_set: settings of the fine-tuning recipe, as key=value.
    """
    asked = LifecycleRequest(
        source=source, name=name, pretrain_recipe=pretrain_recipe, finetune_recipe=finetune_recipe,
        scratch_recipe=scratch_recipe, downstream=downstream, profile=profile, set=set, ingest_set=ingest_set,
        finetune_set=finetune_set,
    )  # fmt: skip
    work, terminal = Lifecycle(home_directory(), asked, reporter()), TERMINAL.get()
    of_command = {"cancelled": terminal.cancelled, "on_sigterm": terminal.on_sigterm} if terminal else {}
    with own_state(work.home, single=False, **of_command) as watch:
        try:
            require_valid(asked, work.home)
            summary = work.run()
        except (InputError, StageFailed, IngestError) as error:
            if terminal is not None:
                terminal.failure = error
            if isinstance(error, InputError):
                return settled(watch, refused(error))
            ended = Cancelled if watch.cancelled.is_set() else Failed
            return settled(watch, ended(message=without_secrets(str(error))))
        return settled(watch, Completed(message=summary["summary"], data=summary))


def lifecycle_here(home: Path, say: Callable[[str], None], **asked: Any) -> dict[str, Any]:
    """The flow in this process, for a command: what `Lifecycle.run` returns, or the error that it ended by.

    It speaks to the terminal, and Ctrl-C stops in order what runs.
    """
    os.environ["VIT_HOME"] = str(home)  # the flow asks the environment for its home
    terminal = Terminal(say, threading.Event())
    TERMINAL.set(terminal)
    with on_interrupt(terminal.cancelled, signal.SIGINT, signal.SIGTERM):
        state = lifecycle(**asked, return_state=True)
    if terminal.failure is not None:
        raise terminal.failure
    return state.result()
