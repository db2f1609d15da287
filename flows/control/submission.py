"""What is submitted for a run, and where: the same request whether it is shown (`--dry-run`) or submitted.

The job is the durable unit: it is looked for by the run's key before it is submitted, on this machine or a cluster.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.job import Job, JobRequest, Launcher, SubmitError
from cluster.launchers import launcher_for
from flows.planning import seconds_per_step
from pipeline.config.recipe import read_yaml
from pipeline.errors import InputError
from pipeline.preparation.preflight import SHARED_MEMORY_PER_RANK
from pipeline.run_directory import RunDirectory, read_json

LEAST_LEAD_SECONDS = 120.0
MOST_LEAD_SECONDS = 3600.0
WRITE_BYTES_PER_SECOND = 5e8  # of one node to a shared file system, where no checkpoint was timed yet: a slow one
BYTES_PER_VALUE = 4  # of an image in float32
LOCAL = "local"
TAIL_BYTES = 1 << 18  # of a ledger, in which its newest figures are looked for: some hundred lines
_SAVED = re.compile(r"saved step-\d+: training waited [\d.]+ s, complete in ([\d.]+) s")


def launcher_of(run: RunDirectory) -> Launcher:
    """The place where the run's profile says it runs."""
    profile = _profile(run)
    return launcher_for(profile["kind"], profile)


def runs_here(run: RunDirectory) -> bool:
    """Whether its profile is one of this machine, which everybody waits for; any other is a cluster's."""
    return _profile(run)["kind"] == LOCAL


def _profile(run: RunDirectory) -> dict[str, Any]:
    """The run's profile; this machine's, where a directory has none."""
    return {"kind": LOCAL} | (read_yaml(run.profile_file) if run.profile_file.is_file() else {})


def submit(run: RunDirectory, launcher: Launcher | None = None) -> Job:
    """The run's living job, or a new one; the launcher looks before it starts. InputError where it is refused."""
    request = request_of(run)
    try:
        return (launcher or launcher_of(run)).submit(request)
    except SubmitError as error:
        raise InputError(f"{run.path}: not submitted: {error}") from None


def request_of(run: RunDirectory) -> JobRequest:
    """What is to be run. On this machine the attempt is numbered now, on a cluster when it starts."""
    profile, here = _profile(run), runs_here(run)
    number = run.last_attempt() + 1 if here else run.current_attempt()
    module = (sys.executable, "-m")
    return JobRequest(
        key=run.key,
        command=(*module, "pipeline.launch", str(run.path)),
        directory=run.path,
        attempt=number,
        # A cluster's script exports the profile's own variables.
        environment={**profile.get("env", {}), "VIT_ATTEMPT": str(number)} if here else {},
        log=run.attempt(number).path / "log" / "supervisor.log" if here else run.path / "submit" / "unused",
        verdict_command=() if here else (*module, "pipeline.verdict", str(run.path)),
        preflight_command=(*module, "pipeline.node_check", str(run.path)) if profile.get("preflight") else (),
        stop_lead_seconds=stop_lead_seconds(run),
        shared_memory_bytes=shared_memory_bytes(run),
        reads=datasets_of(run),
    )


def datasets_of(run: RunDirectory) -> tuple[str, ...]:
    """Datasets that lie on a file system, by their paths."""
    config = read_yaml(run.config_file)
    data, planned = config.get("data") or {}, run.plan().get("data")
    if isinstance(data, str):  # of an embedding
        paths = [data]
    else:
        scored = (config.get("datasets") or {}).values()  # of an evaluation
        paths = [source.get("path") for source in [*(data.get("sources") or []), *scored]]
    if not paths and isinstance(planned, dict):
        paths = [planned.get("path")]
    return tuple(path for path in paths if path and "://" not in path)


def shared_memory_bytes(run: RunDirectory) -> int:
    """What the processes of one node may share: NCCL's buffers, and a decoded micro-batch for each loader worker.

    The loader's own ring is mapped anonymously and needs none of it; libraries of an image may hand batches through it.
    """
    plan, encoder, batch = run.plan(), read_yaml(run.config_file).get("encoder") or {}, 0
    if "batches" in plan and "image_size" in encoder:
        size = encoder["image_size"]
        height, width = size if isinstance(size, list) else (size, size)
        images = plan["batches"]["micro_batch_size"]
        batch = BYTES_PER_VALUE * images * height * width * encoder.get("channels", 3)
    return plan.get("ranks_per_node", 1) * (SHARED_MEMORY_PER_RANK + batch * (1 + plan.get("loader_workers", 0)))


def stop_lead_seconds(run: RunDirectory) -> float:
    """How long before a time limit a run is to be asked to stop: for two steps and two checkpoints, twice the need.

    From what earlier attempts took, else from the plan; at least two minutes and at most an hour.
    """
    plan = run.plan()
    if "steps" not in plan:
        return LEAST_LEAD_SECONDS
    step = _measured_step(run) or seconds_per_step(plan)
    checkpoint = _measured_checkpoint(run) or plan["checkpoint_bytes"] / (WRITE_BYTES_PER_SECOND * plan["nodes"])
    return min(MOST_LEAD_SECONDS, max(LEAST_LEAD_SECONDS, round(2 * (step + checkpoint))))


def _measured_step(run: RunDirectory) -> float | None:
    """Seconds of a step, with what comes between, in the newest attempt that made any."""
    for number in range(run.last_attempt(), 0, -1):
        line = last_figures(run.attempt(number).ledger)
        if line:
            return line["perf/step_seconds"] + line.get("perf/between_steps_seconds", 0.0)
    return None


def last_figures(ledger: Path) -> Mapping[str, Any]:
    """The newest line of a ledger that has figures of speed; {} where there is none."""
    if not ledger.is_file():
        return {}
    with open(ledger, "rb") as file:
        file.seek(max(0, ledger.stat().st_size - TAIL_BYTES))
        whole = file.read().splitlines(keepends=True)
    lines = (json.loads(line) for line in reversed(whole) if line.startswith(b"{") and line.endswith(b"\n"))
    return next((line for line in lines if "perf/step_seconds" in line), {})


def _measured_checkpoint(run: RunDirectory) -> float | None:
    """The most seconds that a checkpoint of the newest attempt that wrote any took, as rank 0 has logged."""
    for number in range(run.last_attempt(), 0, -1):
        log = run.attempt(number).log(0)
        if log.is_file() and (found := _SAVED.findall(log.read_text(errors="replace"))):
            return max(map(float, found))
    return None


def attempt_of(run: RunDirectory, job: Job) -> int | None:
    """The newest attempt that this job made; None before its first one began.

    On this machine the submitter numbered it; on a cluster the job says so in job.json, when it starts.
    """
    said = read_json(run.job_file) or {}
    if job.kind in (LOCAL, "by hand"):
        return job.attempt
    return said["attempt"] if str(said.get("id")) == job.id and said.get("start") else None
