"""How the pods of a Kubernetes Job agree on one attempt, though each of them is started again alone. Torch-free.

SLURM starts all nodes of a job together and counts their starts; a Job makes single pods again, minutes apart, and
tells nobody. So the first pod (index 0), whenever it starts, takes the next attempt, names it in job.json, and calls;
the others answer by taking the seat of their index in that attempt, once and for all:

    attempts/NN/seats/001/pod       the pod that sits there (its uid) and its machine
    attempts/NN/seats/001/again     a later pod of this index came: the one that sat there is gone

A pod that finds its seat taken says so and waits for the next call. Whoever takes part in that attempt sees it, ends
with code 76 and comes again, where a time-out of a collective would have taken half an hour. When all seats are taken
(or, of a range of nodes, enough of them in time), the first pod writes meeting.json with the pods that are in.
A call is JOB.ATTEMPT: of two first pods the later has the higher attempt, and the other leaves the run alone.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import EXIT_FAULT, EXIT_STOPPED, FaultError
from pipeline.parenthood import STOP_SIGNALS, ignore_stops
from pipeline.ports import free_port
from pipeline.run_directory import Attempt, RunDirectory, look_afresh, read_json, write_json
from pipeline.supervision.nodes import (
    STOPPED_PATIENCE_SECONDS,
    Meeting,
    Node,
    StoppedBeforeMeeting,
    claimed_attempt,
    name_attempt,
)

LOOK_SECONDS = 0.5  # between two looks, times more where there are many pods
CALL_SECONDS = 60.0  # that one waits longer who answered: the first pod gives up first, and says why
AFRESH_SECONDS = 5.0  # between two that a network file system must not answer from memory
GATHER_SECONDS = 3600.0


class _NotOurs(Exception):
    """An attempt in which this pod has no part."""


class Finished(Exception):
    """The run has its result: a pod that starts now has nothing to do."""


@dataclass(frozen=True)
class Pod:
    """This pod among those of its job. `least` to `most` of them make an attempt; `uid` differs with every start."""

    index: int
    uid: str
    job: str
    generation: str
    least: int
    most: int
    address: str
    port: int
    gather_seconds: float

    @classmethod
    def here(cls, environment: Mapping[str, str], nodes: int) -> "Pod | None":
        """From the variables of the manifest; None where this is no pod of ours."""
        uid, index = environment.get("VIT_POD"), environment.get("JOB_COMPLETION_INDEX")
        if not uid or index is None or environment.get("VIT_ATTEMPT"):
            return None
        least, _, most = environment.get("VIT_NODES", str(nodes)).partition("-")
        return cls(
            int(index), uid, environment.get("VIT_JOB", ""), environment.get("VIT_START", "1"), int(least),
            int(most or least), environment.get("MASTER_ADDR", ""), int(environment.get("MASTER_PORT") or 0),
            float(environment.get("VIT_GATHER_SECONDS", GATHER_SECONDS)),
        )  # fmt: skip


def meet(
    run: RunDirectory, pod: Pod, host: str, ranks_per_node: int, prepare: Callable[[int], None]
) -> tuple[Meeting, Node]:  # fmt: skip
    """Where the ranks of this start meet, and this pod's place among them. Stops must be held (`stops_held`).

    The first pod calls `prepare` with the number of nodes that came, before the others go on.
    Raises Finished; StoppedBeforeMeeting where a stop was asked for meanwhile; FaultError where too few came in time,
    or a newer job has the run.
    """
    patience = _Patience(run, pod)
    if pod.index == 0:
        return _lead(run, pod, host, ranks_per_node, patience, prepare)
    return _join(run, pod, host, patience)


class _Patience:
    """What ends the waiting for other pods."""

    def __init__(self, run: RunDirectory, pod: Pod):
        self.run, self.pod, self.began = run, pod, time.monotonic()
        self._asked_at: float | None = None
        self._afresh_at = self.began

    @property
    def passed(self) -> float:
        return time.monotonic() - self.began

    def pause(self, folder: Path, *, stop_at_once: bool) -> None:
        """Wait a little, or raise what ends it."""
        if self.run.result_file.is_file():
            raise Finished(f"{self.run.path}: the run is done")
        if signal.sigpending() & set(STOP_SIGNALS) and self._asked_at is None:
            self._asked_at = time.monotonic()
        patience = 0.0 if stop_at_once else STOPPED_PATIENCE_SECONDS
        if self._asked_at is not None and time.monotonic() - self._asked_at >= patience:
            ignore_stops()
            raise StoppedBeforeMeeting(f"pod {self.pod.index} was stopped on request before all pods had met")
        newer = str((read_json(self.run.job_file) or {}).get("start", "")).partition(".")[0]
        if newer.isdigit() and self.pod.generation.isdigit() and int(newer) > int(self.pod.generation):
            raise FaultError(f"{self.run.path}: job {newer} took over from job {self.pod.generation}")
        if time.monotonic() - self._afresh_at > AFRESH_SECONDS:
            self._afresh_at = time.monotonic()
            look_afresh(folder)
            if folder != self.run.path:
                look_afresh(self.run.path)  # job.json may name another attempt by now
        time.sleep(max(LOOK_SECONDS, 0.01 * self.pod.most))


def _lead(
    run: RunDirectory, pod: Pod, host: str, ranks_per_node: int, patience: _Patience, prepare: Callable[[int], None]
) -> tuple[Meeting, Node]:  # fmt: skip
    while True:
        attempt = claimed_attempt(run)
        node = Node(0, pod.most, f"{pod.generation}.{attempt.number}", host)
        name_attempt(run, node, attempt, job=pod.job)
        _take(attempt, pod, host)
        try:
            seated = _gathered(run, attempt, pod, patience)
        except (FaultError, StoppedBeforeMeeting) as error:
            code = EXIT_FAULT if isinstance(error, FaultError) else EXIT_STOPPED
            attempt.write_verdict(code, str(error))
            raise
        if seated is None:
            attempt.write_verdict(EXIT_FAULT, "a pod was started again before all had met; all meet anew")
            continue
        prepare(len(seated))
        port = pod.port if pod.port and len(seated) > 1 else free_port("")
        meeting = Meeting(attempt, pod.address if len(seated) > 1 else "127.0.0.1", port)
        write_json(
            attempt.meeting_file,
            {"start": node.start, "address": meeting.address, "port": meeting.port, "nodes": len(seated),
             "ranks_per_node": ranks_per_node, "hosts": [said["host"] for said in seated.values()],
             "pods": {str(index): said["uid"] for index, said in seated.items()}},
        )  # fmt: skip
        return meeting, replace(node, count=len(seated), hosts=tuple(said["host"] for said in seated.values()))


def _gathered(run: RunDirectory, attempt: Attempt, pod: Pod, patience: _Patience) -> dict[int, dict] | None:
    """Who sits where, when enough do; None where one of them has been started again."""
    began, told = time.monotonic(), time.monotonic()
    while True:
        seated = _seated(attempt)
        if started_again(attempt) is not None:
            return None
        waited = time.monotonic() - began
        if len(seated) >= pod.most or (len(seated) >= pod.least and waited > pod.gather_seconds):
            return dict(sorted(seated.items()))
        if (read_json(run.job_file) or {}).get("attempt") != attempt.number:
            raise FaultError(f"{run.path}: attempt {attempt.number} was replaced by another first pod's")
        if waited > pod.gather_seconds:
            raise FaultError(
                f"{len(seated)} of {pod.most} pods came within {waited:.0f} s, and {pod.least} are needed; see why the "
                "others wait: vit runs"
            )
        if time.monotonic() - told > 60:
            told = time.monotonic()
            sys.stderr.write(f"attempt {attempt.number}: {len(seated)} of {pod.most} pods are here, waiting\n")
        patience.pause(attempt.path / "seats", stop_at_once=True)


def _join(run: RunDirectory, pod: Pod, host: str, patience: _Patience) -> tuple[Meeting, Node]:
    not_ours: set[int] = set()
    number = None
    while True:
        before, number = number, _called(run, pod)
        if number != before:
            sat = before is not None and before not in not_ours
            if sat and (_seat(run.attempt(before), pod.index) / "again").exists():
                raise FaultError(f"{run.path}: pod {pod.index} was started again, and this one leaves its seat to it")
            patience.began = time.monotonic()
        if number is not None and number not in not_ours:
            try:
                if (place := _place(run.attempt(number), pod, host)) is not None:
                    return place
            except _NotOurs:
                not_ours.add(number)
                sys.stderr.write(f"pod {pod.index}: attempt {number} is without this pod, which waits for the next\n")
        if number in not_ours and run.attempt(number).meeting_file.exists():
            patience.began = time.monotonic()  # others train: what comes later is for the next attempt
        if patience.passed > pod.gather_seconds + (0.0 if number is None else CALL_SECONDS):
            raise FaultError(f"{run.path}: no first pod called within {patience.passed:.0f} s")
        waiting_here = number is not None and number not in not_ours
        patience.pause(run.attempt(number).path if waiting_here else run.path, stop_at_once=not waiting_here)


def _called(run: RunDirectory, pod: Pod) -> int | None:
    """The attempt to which the first pod of this very job calls."""
    job = read_json(run.job_file) or {}
    return job["attempt"] if str(job.get("start", "")).partition(".")[0] == pod.generation else None


def _place(attempt: Attempt, pod: Pod, host: str) -> tuple[Meeting, Node] | None:
    """Where the attempt meets, and which of its nodes this pod is; None while that is not known. Or _NotOurs."""
    meeting = read_json(attempt.meeting_file)
    taken = _take(attempt, pod, host) if meeting is None else _sits(attempt, pod)
    if not taken:
        if (seat := _seat(attempt, pod.index)).is_dir():
            with contextlib.suppress(OSError):
                (seat / "again").touch()
        raise _NotOurs
    if meeting is None:
        return None
    if meeting.get("pods", {}).get(str(pod.index)) != pod.uid:  # it sat down a moment too late
        raise _NotOurs
    number = sorted(map(int, meeting["pods"])).index(pod.index)
    node = Node(number, meeting["nodes"], meeting["start"], host, tuple(meeting["hosts"]))
    return Meeting(attempt, meeting["address"], meeting["port"]), node


def _seat(attempt: Attempt, index: int) -> Path:
    return attempt.path / "seats" / f"{index:03d}"


def _take(attempt: Attempt, pod: Pod, host: str) -> bool:
    """Sit down, unless somebody does or did: a directory is made by one alone. Whether the seat is this pod's."""
    seat = _seat(attempt, pod.index)
    seat.parent.mkdir(parents=True, exist_ok=True)
    try:
        seat.mkdir()
    except FileExistsError:
        return _sits(attempt, pod)
    write_json(seat / "pod", {"uid": pod.uid, "host": host})
    return True


def _sits(attempt: Attempt, pod: Pod) -> bool:
    return (read_json(_seat(attempt, pod.index) / "pod") or {}).get("uid") == pod.uid


def _seated(attempt: Attempt) -> dict[int, dict]:
    found = {}
    for path in (attempt.path / "seats").glob("*/pod"):
        if (said := read_json(path)) is not None:
            found[int(path.parent.name)] = said
    return found


def started_again(attempt: Attempt) -> int | None:
    """The index of a pod that came again though it takes part; None where none did."""
    pods = (read_json(attempt.meeting_file) or {}).get("pods")
    again = sorted(int(path.parent.name) for path in (attempt.path / "seats").glob("*/again"))
    return next((index for index in again if pods is None or str(index) in pods), None)


def why_over(attempt: Attempt) -> str | None:
    """Why an attempt cannot go on, seen from any of its pods before its ranks notice; None where it can."""
    look_afresh(attempt.path / "seats")
    if (index := started_again(attempt)) is not None:
        return f"pod {index} was started again: the one that took part is gone"
    job = read_json(RunDirectory(attempt.path.parents[1]).job_file) or {}
    if (newest := job.get("attempt", attempt.number)) != attempt.number:
        return f"attempt {attempt.number} was replaced by attempt {newest}: the first pod was started again"
    return None


def code_of_all(attempt: Attempt, fresh_seconds: float) -> tuple[int, str]:
    """Code and reason of all pods of the attempt, once they have ended or their heartbeats have.

    All pods of a start end with one code: a pod that is done is never made again, and would be missed.
    """
    beats: dict[int, tuple[str, float]] = {}
    while True:
        look_afresh(attempt.path / "exit")
        silent = attempt.silent_nodes()
        for node in silent:
            said = _text(attempt.heartbeat(node))
            if node not in beats or beats[node][0] != said:
                beats[node] = (said, time.monotonic())
        if all(time.monotonic() - beats[node][1] > fresh_seconds for node in silent):
            code, reason, _ = attempt.merged()
            return code, reason
        time.sleep(LOOK_SECONDS)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
