"""SLURM's own commands, asked and read. Only the standard library, so that it also runs on a bare compute node.

Text formats are parsed, never --json: its shapes change between SLURM's releases, and some commands do not have it.
slurmctld (squeue) is the truth about what lives; slurmdbd (sacct) tells of the past, late, and many sites have none.
"""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.job import JobState, SubmitError

POLL_SECONDS = 20.0  # a controller that is down is given up by squeue itself after some 10 s
SUBMIT_SECONDS = 90.0
SILENT_SECONDS = 5.0  # so long a question is not asked again of what has just not answered
UNKNOWN_ID = "Invalid job id"
NO_ACCOUNTS = "accounting storage is disabled"
SILENCES = ("Unable to contact slurm controller", "imed out", "Zero Bytes were transmitted", "Connection refused")

# Every state of `man squeue`. What SLURM will start again by itself lives on under the same id, so it is not ENDED;
# CONFIGURING holds nodes that still boot: no supervisor runs yet. A state that is not here is UNKNOWN, never ENDED: a
# newer SLURM may say it of a job that lives.
STATES = {
    JobState.PENDING: (
        "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT",
        "POWER_UP_NODE",
    ),
    JobState.RUNNING: (
        "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "UPDATE_DB",
    ),
    JobState.ENDED: (
        "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED",
        "PREEMPTED", "LAUNCH_FAILED", "RECONFIG_FAIL", "EXPIRED",
    ),
}  # fmt: skip
_STATE_OF = {name: state for state, names in STATES.items() for name in names}


def state_of(text: str) -> JobState:
    """The state of squeue's or sacct's word: `CANCELLED by 1000` and `COMPLETED+` are read by their first word."""
    words = text.split()
    return _STATE_OF.get(words[0].rstrip("+").upper(), JobState.UNKNOWN) if words else JobState.UNKNOWN


class NoAnswer(Exception):
    """SLURM did not answer, or not in time; nothing is known."""


class NotHere(NoAnswer):
    """There is no such command on this machine."""


_silences: dict[str, tuple[float, str]] = {}  # by command: when it did not answer, and what was said of it


@dataclass(frozen=True)
class Record:
    """What SLURM knows of one job."""

    id: str
    state_text: str
    reason: str
    elapsed: str
    nodes: str
    exit_code: str
    submitted: str
    name: str
    comment: str

    @property
    def state(self) -> JobState:
        return state_of(self.state_text)


def answer(*command: str, seconds: float = POLL_SECONDS) -> subprocess.CompletedProcess:
    """Run one of SLURM's commands; NoAnswer where it is not there or takes too long."""
    environment = {name: value for name, value in os.environ.items() if not _adds_options(name)}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, env=environment,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]} did not answer within {seconds:.0f} s") from None
    except OSError as error:
        raise NotHere(f"{command[0]} cannot be run here: {error.strerror}; is this a login node?") from None


def _adds_options(name: str) -> bool:
    """Whether a variable of a shell, or of the job that this runs in, would change what a command does, unseen."""
    if name.startswith("SLURM_"):
        return name not in ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
    return name.startswith(("SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_"))


_QUEUE_FORMAT = "%i|%T|%r|%M|%N|%V|%j|%k"  # the comment is last: it may hold the separator
_ACCOUNT_FIELDS = "JobID,State,ExitCode,Elapsed,NodeList,Submit,JobName,Comment"


def queue(*, names: Sequence[str] = (), job: str | None = None) -> list[Record]:
    """Jobs that slurmctld knows, by names or id: all that live, and those that ended some minutes ago. Or NoAnswer."""
    chosen = f"--jobs={job}" if job is not None else f"--name={','.join(names)}"
    rows = _asked("squeue", "-h", "-a", "-r", "-t", "all", chosen, "-o", _QUEUE_FORMAT, nothing=UNKNOWN_ID)
    return [
        Record(id, state, reason, elapsed, nodes, "", submitted, name, comment)
        for id, state, reason, elapsed, nodes, submitted, name, comment in rows
    ]


def accounted(*, names: Sequence[str] = (), job: str | None = None, since: float = 0.0) -> list[Record]:
    """Jobs that slurmdbd remembers, by names or id; empty where a site keeps no accounts. Or NoAnswer."""
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(max(since - 3600.0, 0.0)))
    chosen = (
        [f"--jobs={job}"] if job is not None else ["--allusers", f"--name={','.join(names)}", f"--starttime={start}"]
    )
    rows = _asked("sacct", "-X", "-n", "--parsable2", *chosen, "-o", _ACCOUNT_FIELDS, nothing=NO_ACCOUNTS)
    return [
        Record(id, state, "", elapsed, nodes, exit_code, submitted, name, comment)
        for id, state, exit_code, elapsed, nodes, submitted, name, comment in rows
    ]


def _asked(*command: str, nothing: str) -> list[list[str]]:
    """The rows of an answer; none where it fails with the words of `nothing`. Or NoAnswer.

    Whoever looks at many runs would wait for every one: what has just not answered is not asked again at once.
    """
    fell_silent, words = _silences.get(command[0], (-SILENT_SECONDS, ""))
    if time.monotonic() - fell_silent < SILENT_SECONDS:
        raise NoAnswer(words)
    try:
        done = answer(*command)
        if done.returncode != 0 and nothing in done.stderr:
            return []
        if done.returncode != 0:
            raise NoAnswer(_one_line(done.stderr) or f"{command[0]} ended with {done.returncode}")
    except NotHere:
        raise
    except NoAnswer as silence:
        _silences[command[0]] = (time.monotonic(), str(silence))
        raise
    return _rows(done.stdout)


def _rows(text: str) -> list[list[str]]:
    """The eight fields of each line; of the last, the comment, separators are part."""
    return [line.split("|", 7) for line in text.splitlines() if line.count("|") >= 7]


def sbatch(script: Path, *options: str) -> str:
    """Submit a script and return the job's id. SubmitError with sbatch's own reason in one line.

    Or NoAnswer: then it may have been submitted.
    """
    done = answer("sbatch", "--parsable", *options, str(script), seconds=SUBMIT_SECONDS)
    if done.returncode != 0 and any(words in done.stderr for words in SILENCES):
        raise NoAnswer(_one_line(done.stderr))
    if done.returncode != 0:
        raise SubmitError(f"sbatch refused {script}: {_one_line(done.stderr) or f'it ended with {done.returncode}'}")
    return done.stdout.strip().splitlines()[-1].partition(";")[0]


def scancel(job: str, *options: str) -> None:
    """Signal or cancel. A job that has ended is no error. PermissionError where it is somebody else's, or NoAnswer."""
    done = answer("scancel", *options, job)
    if "permission denied" in done.stderr:
        raise PermissionError(_one_line(done.stderr))
    if done.returncode != 0 and UNKNOWN_ID not in done.stderr:
        raise NoAnswer(_one_line(done.stderr) or f"scancel ended with {done.returncode}")


def _one_line(text: str) -> str:
    """What a command said, without its own name before each line, and each thing once."""
    said = [re.sub(r"^\w+: (error|fatal|info): ", "", line.strip()) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in said if line))
