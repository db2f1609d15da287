"""The run directory: the one truth about a run. Everything else (Prefect, MLflow, the cluster) mirrors it.

    RUN/config.yaml  profile.yaml  plan.json  deepspeed.json  provenance.json   written before submission
    RUN/bands.json                                              what is to be expected of its health, where known
    RUN/escalated.json                                          which bad health Prefect was told of, if any
    RUN/code.diff                                               what differed from the commit in provenance.json, if any
    RUN/job.json                                                where it runs: kind, id, key, attempt; start, host
    RUN/attempts/01/{log, metrics.jsonl, health.jsonl, heartbeat, samples, rolled-back, exit}; meeting.json on a cluster
    RUN/checkpoints/step-00000100/{manifest.json, ...}          complete when and only when manifest.json verifies
    RUN/weights/step-00000100/model.safetensors                 weights alone, at a cadence of their own
    RUN/result.json  report.html                                what the next stage reads; what a person reads

Every start is a new attempt and writes only under its own number. Torch-free.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.progress import progress_file
from pipeline.supervision.judgement import ExitRecord, NodeVerdict, merged_verdict, verdict_of

FORMAT_VERSION = 1
RESERVE_BYTES = 256 << 10  # for what ranks and supervisor say last: a disk that fills up is a thing to be told of
_STEP = re.compile(r"step-(\d{8,})")


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file or nothing: temporary name, fsync, rename. An OSError names the file."""
    # Every container's first process is number 1, and containers may share a host's name: chance tells them apart.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None where there is none. A JSONDecodeError, a ValueError, names the file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"{path}: damaged: {error.msg}", error.doc, error.pos) from None
    except UnicodeDecodeError:
        raise json.JSONDecodeError(f"{path}: damaged: no UTF-8", "", 0) from None


def look_afresh(directory: Path) -> None:
    """Make a network file system show what other machines have written to `directory` by now.

    A name that was not there, its client may go on not to find for a minute; a change of its own makes it ask again.
    """
    probe = directory / f".look-{socket.gethostname()}-{os.getpid()}"
    with contextlib.suppress(OSError):
        probe.touch()
        probe.unlink()


@dataclass(frozen=True, order=True)
class RolledBack:
    """Positions [start, end), which steps [first_step, last_step] had read before the run went back."""

    start: int
    end: int
    first_step: int
    last_step: int

    @property
    def positions(self) -> tuple[int, int]:
        return self.start, self.end


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint and its manifest."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]


class RunDirectory:
    """Paths and small files of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.profile_file = self.path / "profile.yaml"
        self.plan_file = self.path / "plan.json"
        self.job_file = self.path / "job.json"
        self.result_file = self.path / "result.json"
        self.provenance_file = self.path / "provenance.json"
        self.difference_file = self.path / "code.diff"
        self.attempts = self.path / "attempts"
        self.checkpoints = self.path / "checkpoints"
        self.weights = self.path / "weights"

    @property
    def key(self) -> str:
        """Deterministic name of the run for the cluster and the registry: derived from its absolute path."""
        path = self.path.resolve()
        return f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"

    def require(self) -> "RunDirectory":
        if not self.config_file.is_file():
            raise InputError(f"{self.path}: not a run directory: it has no config.yaml")
        return self

    def plan(self) -> dict[str, Any]:
        plan = read_json(self.plan_file)
        if plan is None:
            raise InputError(f"{self.path}: it has no plan.json; make the run with `vit pretrain` or `vit finetune`")
        return plan

    def last_attempt(self) -> int:
        """Number of the newest attempt, 0 when none was made."""
        if not self.attempts.is_dir():
            return 0
        return max((int(entry.name) for entry in self.attempts.iterdir() if entry.name.isdigit()), default=0)

    def current_attempt(self) -> int:
        """The attempt that may commit checkpoints: the one job.json names."""
        return int((read_json(self.job_file) or {}).get("attempt", 0))

    def attempt(self, number: int) -> "Attempt":
        return Attempt(self.attempts / f"{number:02d}")

    def node_checks(self, start: str) -> Path:
        """What the nodes of a start found of themselves before it; see `node_check`."""
        return self.path / "preflight" / start

    def checkpoint_directories(self) -> list[Path]:
        """Directories that a commit has named, newest first, whatever became of their files since."""
        named = {directory: _STEP.fullmatch(directory.name) for directory in self.checkpoints.glob("step-*")}
        steps = {directory: int(match[1]) for directory, match in named.items() if match}
        return sorted(steps, key=lambda directory: -steps[directory])

    def committed_checkpoints(self) -> list[Checkpoint]:
        """Checkpoints whose manifest agrees with the files' sizes, newest first."""
        manifests = {directory: verified_manifest(directory) for directory in self.checkpoint_directories()}
        return [Checkpoint(directory, manifest) for directory, manifest in manifests.items() if manifest]

    def rolled_back(self) -> list["RolledBack"]:
        """What each roll-back of this run passed over, in the order of positions."""
        return sorted(RolledBack(**read_json(path)) for path in self.attempts.glob("*/rolled-back/*.json"))

    def newest_checkpoint(self) -> Checkpoint | None:
        return next(iter(self.committed_checkpoints()), None)


class Attempt:
    """One start of a run: its logs, ledger, heartbeats and exit records."""

    def __init__(self, path: Path):
        self.path = path
        self.ledger = path / "metrics.jsonl"
        self.rolled_back = path / "rolled-back"

    @property
    def number(self) -> int:
        return int(self.path.name)

    def make(self) -> "Attempt":
        for folder in ("log", "heartbeat", "samples", "exit"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        if not self._reserve.exists():
            self._reserve.write_bytes(os.urandom(RESERVE_BYTES))  # zeros may take no room
        return self

    @property
    def _reserve(self) -> Path:
        return self.path / "exit" / "reserve"

    def log(self, rank: int) -> Path:
        return self.path / "log" / f"rank-{rank:05d}.log"

    @property
    def events(self) -> Path:
        """What happened beside progress, a line each, for whoever watches."""
        return self.path / "log" / "events.log"

    def stacks(self, rank: int) -> Path:
        return self.path / "log" / f"stacks-rank-{rank:05d}.txt"

    def progress(self, rank: int) -> Path:
        """Of a rank whose node is the only one; else it lies on the node's own disk, and heartbeats tell of it."""
        return progress_file(self.path / "heartbeat", rank)

    def samples(self, rank: int) -> Path:
        return self.path / "samples" / f"rank-{rank:05d}.tsv"

    def exit_file(self, rank: int) -> Path:
        return self.path / "exit" / f"rank-{rank:05d}.json"

    def write_exit(self, record: ExitRecord) -> None:
        self._write_last(self.exit_file(record.rank), asdict(record))

    def write_verdict(self, code: int, reason: str, *, node: str | None = None) -> None:
        """What the attempt came to, `node` being the host to avoid; also the step of the newest checkpoint, else -1."""
        newest = RunDirectory(self.path.parents[1]).newest_checkpoint()
        step = newest.step if newest else -1
        content = {"code": code, "reason": reason, "time": time.time(), "node": node, "step": step}
        self._write_last(self.path / "exit" / "verdict.json", content)
        self._reserve.unlink(missing_ok=True)

    def write_node_verdict(self, seen: NodeVerdict, code: int, reason: str) -> None:
        """What one of several supervisors saw; `merged` makes one verdict of all."""
        content = {"code": code, "reason": reason} | asdict(seen)
        self._write_last(self.node_verdict(seen.node), content)

    def node_verdict(self, node: int) -> Path:
        return self.path / "exit" / f"verdict-node-{node:03d}.json"

    def node_verdicts(self) -> list[dict[str, Any]]:
        """What the supervisors wrote that have ended."""
        return [read_json(path) for path in sorted((self.path / "exit").glob("verdict-node-*.json"))]

    def silent_nodes(self) -> list[int]:
        """Nodes of the meeting that have written no verdict."""
        meeting = read_json(self.meeting_file) or {"nodes": 0}
        return [node for node in range(meeting["nodes"]) if not self.node_verdict(node).exists()]

    def heartbeat(self, node: int) -> Path:
        return self.path / "heartbeat" / f"node-{node:03d}"

    @property
    def meeting_file(self) -> Path:
        """Where the nodes of this attempt meet; there is none where one supervisor needs no other."""
        return self.path / "meeting.json"

    def merged(self) -> tuple[int, str, str | None]:
        """Code, reason and host to avoid, of all nodes that were to meet, whether they left a verdict or not."""
        meeting, seen = read_json(self.meeting_file), [NodeVerdict.of(said) for said in self.node_verdicts()]
        named = dict(enumerate(meeting.get("hosts") or ()))
        beats = {node: read_json(self.heartbeat(node)) or {} for node in range(meeting["nodes"])}
        hosts = {node: beat.get("host") or named.get(node) for node, beat in beats.items()}
        return merged_verdict(self.exit_records(), seen, hosts, meeting["ranks_per_node"])

    def _write_last(self, path: Path, content: Any) -> None:
        try:
            write_json(path, content)
        except OSError:
            self._reserve.unlink(missing_ok=True)
            write_json(path, content)

    def exit_records(self) -> list[ExitRecord]:
        return [ExitRecord(**read_json(path)) for path in sorted((self.path / "exit").glob("rank-*.json"))]

    def verdict(self) -> dict[str, Any] | None:
        """What the attempt came to: {code, reason}; None while it runs or after its supervisor was killed.

        Where several supervisors ended and nobody put their verdicts together, or where another launcher started the
        ranks: what follows from those that have ended.
        """
        verdict = read_json(self.path / "exit" / "verdict.json")
        if verdict is not None:
            return verdict
        if self.node_verdicts():
            code, reason, node = self.merged()
            return {"code": code, "reason": reason, "node": node}
        if records := self.exit_records():
            code, reason = verdict_of(records, {})
            return {"code": code, "reason": reason}
        return None


def verified_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint directory whose files all have the sizes it states; None otherwise."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        for name, facts in manifest["files"].items():
            if os.path.getsize(directory / name) != facts["bytes"]:
                return None
    except (OSError, ValueError, KeyError):
        return None
    return manifest
