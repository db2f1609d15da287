"""How the supervisors of several nodes meet, and what they know of each other. Torch-free.

They share nothing but the run directory. Node 0 takes the next attempt, says in its meeting.json where the ranks meet,
and names the attempt in job.json; the others wait there for their own start. Job.json is the fence: only the attempt it
names may commit, and a start that is older than the one it names touches nothing.
"""

import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import EXIT_DONE, EXIT_STOPPED, FaultError, InputError
from pipeline.parenthood import STOP_SIGNALS, ignore_stops
from pipeline.ports import free_port
from pipeline.progress import Position
from pipeline.run_directory import Attempt, RunDirectory, look_afresh, read_json, write_json
from pipeline.supervision.judgement import Hang
from pipeline.supervision.liveness import BEAT_SECONDS, FRESH_SECONDS, host_name
from pipeline.supervision.watchdog import hang_seconds, long_hang_seconds

LOOK_SECONDS = (0.1, 2.0)  # between two looks at job.json, first and later: a thousand nodes may wait
STOPPED_PATIENCE_SECONDS = 30.0  # for the meeting, once a stop was asked for
_HOSTS = re.compile(r"([^,\[]+)(?:\[([^\]]+)\])?,?")


class StoppedBeforeMeeting(Exception):
    """A stop was asked for, and node 0 did not come."""


@dataclass(frozen=True)
class Node:
    """This machine's place among those of one start, which has an id of its own ("" where nobody gave one)."""

    number: int = 0
    count: int = 1
    start: str = ""
    host: str = ""
    hosts: tuple[str, ...] = ()

    @classmethod
    def here(cls, environment: Mapping[str, str], nodes: int) -> "Node":
        """From what SLURM or Kubernetes says, for a job that was planned for `nodes`."""
        # Of a controller of this machine inside an allocation the start is not.
        start = "" if environment.get("VIT_ATTEMPT") else environment.get("VIT_START", "")
        host = host_name()
        if not start:
            return cls(host=host)
        number = int(environment.get("SLURM_NODEID") or environment.get("JOB_COMPLETION_INDEX") or 0)
        count = int(environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or nodes)
        hosts = expanded_hosts(environment.get("SLURM_JOB_NODELIST", ""))
        return cls(number, count, start, host, hosts if len(hosts) == count else ())


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of an attempt meet."""

    attempt: Attempt
    address: str
    port: int


def lost_seconds() -> float:
    """How long a heartbeat may stay away before its node is taken for lost."""
    return max(1.5 * BEAT_SECONDS, min(60.0, hang_seconds()))


def expanded_hosts(words: str) -> tuple[str, ...]:
    """The names in a node list of SLURM, `a[01-03,7],b`, in its order."""
    names: list[str] = []
    for prefix, ranges in _HOSTS.findall(words):
        if not ranges:
            names.append(prefix)
        for part in filter(None, ranges.split(",")):
            first, _, last = part.partition("-")
            names += [f"{prefix}{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return tuple(names)


def lead(run: RunDirectory, node: Node, ranks_per_node: int) -> Meeting:
    """On node 0: take the next attempt, publish where its ranks meet, and make it the one that may commit.

    FaultError where a newer start has the run.
    """
    require_newest_start(run, node.start)
    attempt = claimed_attempt(run)
    meeting = Meeting(attempt, node.host if node.count > 1 else "127.0.0.1", free_port(""))
    write_json(
        attempt.meeting_file,
        {"start": node.start, "address": meeting.address, "port": meeting.port, "nodes": node.count,
         "ranks_per_node": ranks_per_node, "hosts": node.hosts or None},
    )  # fmt: skip
    name_attempt(run, node, attempt)
    return meeting


def claimed_attempt(run: RunDirectory) -> Attempt:
    """The next attempt: its directory is made by nobody else."""
    run.attempts.mkdir(exist_ok=True)
    while True:
        attempt = run.attempt(run.last_attempt() + 1)
        try:
            attempt.path.mkdir()
            return attempt.make()
        except FileExistsError:
            continue


def name_attempt(run: RunDirectory, node: Node, attempt: Attempt, *, job: str = "") -> None:
    """Make job.json name the attempt, and keep what else stands there. FaultError where a newer start has the run.

    `job` is the id of a job on Kubernetes, which its manifest knows before it is submitted.
    """
    require_newest_start(run, node.start)
    said = read_json(run.job_file) or {"kind": "by hand", "id": node.start.partition(".")[0], "key": run.key}
    if job:
        said |= {"kind": "kubernetes", "id": job}
    write_json(run.job_file, said | {"attempt": attempt.number, "start": node.start, "host": node.host})


def require_newest_start(run: RunDirectory, start: str) -> None:
    """FaultError where job.json names a newer start: this one was cut off, and must leave the run alone."""
    if newer := newer_start(read_json(run.job_file) or {}, start):
        raise FaultError(f"{run.path}: start {start} was replaced by {newer}; it leaves the run alone")


def newer_start(job: Mapping[str, Any], start: str) -> str | None:
    """What job.json names in place of `start`, where that is newer. A start is JOB.RESTARTS; jobs are counted up.

    Where job.json has this very job, only a later restart of it is newer: another cluster may have counted further.
    """
    ours, theirs, newest_job = _numbers(start), _numbers(str(job.get("start", ""))), _numbers(str(job.get("id", "")))
    if not ours:
        return None
    if newest_job == ours[:1]:
        return job["start"] if theirs[:1] == ours[:1] and theirs > ours else None
    if job.get("kind") == "slurm" and len(newest_job) == 1 and newest_job > ours[:1]:
        return f"job {job['id']}"
    return job["start"] if theirs > ours else None


def _numbers(words: str) -> tuple[int, ...]:
    parts = words.split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()


def join(run: RunDirectory, node: Node) -> Meeting:
    """On any other node: where the ranks meet, as soon as node 0 has said so. Stops must be held (`stops_held`).

    A stop that is asked for meanwhile waits, as node 0 hears it too, and its ranks leave together with ours:
    StoppedBeforeMeeting where it does not come. FaultError where it does not though nobody asked to stop, or where a
    newer start has the run.
    """
    began, asked_at, pause = time.monotonic(), None, LOOK_SECONDS[0]
    while (job := read_json(run.job_file) or {}).get("start") != node.start:
        require_newest_start(run, node.start)
        now = time.monotonic()
        if asked_at is None and signal.sigpending() & set(STOP_SIGNALS):
            asked_at = now
        if asked_at is not None and now - asked_at > STOPPED_PATIENCE_SECONDS:
            ignore_stops()
            raise StoppedBeforeMeeting(f"stopped on request; node 0 of start {node.start} began no attempt")
        if now - began > long_hang_seconds():
            raise FaultError(f"{run.job_file}: node 0 of start {node.start} did not come within {now - began:.0f} s")
        time.sleep(pause)
        pause = min(1.5 * pause, LOOK_SECONDS[1])
    attempt = run.attempt(job["attempt"])
    meeting = read_json(attempt.meeting_file)
    if meeting["nodes"] != node.count:
        raise InputError(
            f"{attempt.meeting_file}: node 0 counts {meeting['nodes']} nodes and node {node.number} {node.count}; "
            "start all supervisors in one job step"
        )
    return Meeting(attempt, meeting["address"], meeting["port"])


@dataclass(frozen=True)
class _Seen:
    """A node's heartbeat, and between which two looks at it it came; times of our own monotonic clock."""

    beat: dict[str, Any]
    changed_after: float
    changed_before: float
    looked_at: float

    def is_fresh(self, now: float) -> bool:
        return now - self.changed_before < FRESH_SECONDS


class Peers:
    """The other nodes of an attempt, as far as their heartbeats and verdicts tell.

    Read only while our own ranks stand still or were asked to stop, and while they do only of the next node: of a
    thousand nodes each that is lost is missed by the one before it. Clocks of machines differ, so the times that
    heartbeats state are never compared: what counts is when a heartbeat was seen to change, by this node's own clock.
    """

    def __init__(self, attempt: Attempt, node: Node, now: float):
        self.attempt, self.node, self._began = attempt, node, now
        self._seen: dict[int, _Seen] = {}

    def __bool__(self) -> bool:
        return self.node.count > 1

    @property
    def _next(self) -> int:
        return (self.node.number + 1) % self.node.count

    def watch_next(self, now: float) -> None:
        """Look at the next node's heartbeat before it may be missed: its silence is counted from the first look."""
        self._look(self._next, now)

    def _look(self, number: int, now: float) -> "_Seen | None":
        beat, before = read_json(self.attempt.heartbeat(number)), self._seen.get(number)
        if beat is None:
            return before
        if before is None:
            seen = _Seen(beat, float("-inf"), now, now)
        elif before.beat != beat:
            seen = _Seen(beat, before.looked_at, now, now)
        else:
            seen = replace(before, looked_at=now)
        self._seen[number] = seen
        return seen

    def next_is_lost(self, now: float) -> Hang | None:
        """What is to be said of the next node where it is lost."""
        number = self._next
        if self.attempt.node_verdict(number).exists():
            return None
        seen = self._look(number, now)
        beat = seen.beat if seen else None
        silence = now - (seen.changed_before if seen else self._began)
        if silence < (lost_seconds() if seen else long_hang_seconds()):
            return None
        host = beat["host"] if beat else dict(enumerate(self.node.hosts)).get(number)
        name = f"node {number} ({host})" if host else f"node {number}"
        return Hang(
            f"{name} was lost: {'not heard of for' if beat else 'it did not come within'} {silence:.0f} s", host
        )

    def furthest_behind(self, now: float, since: float) -> tuple[int | None, bool]:
        """The least `count` of all ranks elsewhere, and whether all that live were heard of after `since`.

        Both times are of this node's monotonic clock. Of a heartbeat that is seen first, nobody knows how old it is.
        """
        others = [number for number in range(self.node.count) if number != self.node.number]
        lively = [seen for number in others if (seen := self._look(number, now)) and seen.is_fresh(now)]
        counts = [place["count"] for seen in lively for place in seen.beat["positions"].values()]
        return min(counts, default=None), all(seen.changed_after >= since for seen in lively)

    def failure(self) -> str | None:
        """How another node ended, where it did so with neither its work done nor a stop."""
        look_afresh(self.attempt.path / "exit")
        for said in self.attempt.node_verdicts():
            if said["node"] != self.node.number and said["code"] not in (EXIT_DONE, EXIT_STOPPED):
                return f"node {said['node']}: {said['reason']}"
        return None


def positions_of(attempt: Attempt) -> list[Position]:
    """Where all ranks of an attempt were at their supervisors' last heartbeats."""
    beats = [read_json(path) or {} for path in sorted(attempt.path.glob("heartbeat/node-*"))]
    places = [place for beat in beats for place in beat.get("positions", {}).values()]
    return [Position(place["count"], place["step"], place["phase"]) for place in places]
