"""Shards made on other machines: in groups, so that an engine has few tasks, by processes that see the destination.

A group checks that its worker writes into the same directory and would make the same bytes. It runs only while the
ingestion that wants it has its sign, an empty file, in that directory: whoever outlives a stopped ingestion makes no
further shard.
"""

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import Self

import PIL

from pipeline.errors import InputError
from pipeline.ingestion.isolation import Limits, TooManyFaults, in_isolation
from pipeline.ingestion.shard_contract import JOB_VERSION, ShardJob, ShardSummary
from pipeline.shards.atomic import TEMPORARY_PREFIX

LEAST_GROUPS = 256  # so that many workers have something to do; a group costs the start of a process
MOST_SHARDS = 16  # per group
MOST_FILES = 16_000  # per group: what is sent of each is some 100 bytes
SIGHT_SECONDS = 10.0  # until what one machine wrote is seen by all, over NFS
BYTES_DEPEND_ON = {"vit-pretraining's shards": str(JOB_VERSION), "Pillow": PIL.__version__}


FAULTS = ("too_slow", "too_much_memory", "decoder_crashed")  # of images that end the process that decodes them


class EngineLost(Exception):
    """The machines or their scheduler are gone, or never came. The message is one line."""


class NotWanted(Exception):  # noqa: N818
    """The ingestion that a shard is for has ended."""


@dataclass(frozen=True)
class ShardGroup:
    """Some shard jobs of one ingestion: small, and picklable."""

    jobs: Sequence[ShardJob]
    sign: Path
    limits: Limits
    allowed_faults: int
    versions: tuple[tuple[str, str], ...]
    working_directory: str  # that relative paths of the source and its masks are of

    def run(self) -> list[ShardSummary]:
        """InputError where this machine does not see the destination or would make other bytes."""
        self._check_worker()
        run = partial(_run_while_wanted, self.sign, self.working_directory)
        return list(in_isolation(run, self.jobs, 1, self.limits, self.allowed_faults))

    def _check_worker(self) -> None:
        here = f"worker on {gethostname()}"
        for what, version in self.versions:
            if (found := BYTES_DEPEND_ON[what]) != version:
                raise InputError(f"{here}: {what} {found}, and {version} where `vit ingest` runs; install the same")
        deadline = time.monotonic() + SIGHT_SECONDS
        while not self.sign.exists():
            if time.monotonic() > deadline:
                raise InputError(
                    f"{self.sign.parent}: not seen by the {here}; DEST must lie on a file system that all workers share"
                )
            time.sleep(0.1)
        _require_wanted(self.sign)


class WantedGroups:
    """The groups of one ingestion, each made when it is asked for; and their sign, until it is left."""

    def __init__(self, destination: Path, jobs: Sequence[ShardJob], limits: Limits, allowed_faults: int):
        self._sign = destination.resolve() / f"{TEMPORARY_PREFIX}wanted-{uuid.uuid4().hex}"
        self._groups, self._limits = _grouped(jobs), limits
        self._faults: Counter[str] = Counter()
        self._allowed_faults = allowed_faults

    def __enter__(self) -> Self:
        self._sign.touch()
        return self

    def __exit__(self, *_: object) -> None:
        self._sign.unlink(missing_ok=True)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ShardGroup:
        left = self._allowed_faults - self._faults.total()
        versions = tuple(BYTES_DEPEND_ON.items())
        return ShardGroup(next(self._groups), self._sign, self._limits, left, versions, os.getcwd())

    def withdraw(self) -> None:
        """Who is at a shard ends with it, and no other begins: the sign says so, and can still be seen."""
        self._sign.write_text("ended")

    def count_faults(self, summaries: Sequence[ShardSummary]) -> None:
        """TooManyFaults where all groups together have more than allowed."""
        found = [entry for summary in summaries for entry in summary.rejected if entry.reason in FAULTS]
        self._faults.update(entry.reason for entry in found)
        if self._faults.total() > self._allowed_faults:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self._faults.items()))
            raise TooManyFaults(f"{counts}; the last: {found[-1].detail}")


RunGroups = Callable[[WantedGroups], Iterator[list[ShardSummary]]]  # an engine; results in any order


def in_groups(
    engine: RunGroups, destination: Path, jobs: Sequence[ShardJob], limits: Limits, allowed_faults: int
) -> Iterator[ShardSummary]:
    """The summaries as their groups are done, in any order. When it ends, nothing of it is at work any more."""
    with WantedGroups(destination, jobs, limits, allowed_faults) as groups, closing(engine(groups)) as results:
        for summaries in results:
            yield from summaries
            groups.count_faults(summaries)


def _grouped(jobs: Sequence[ShardJob]) -> Iterator[list[ShardJob]]:
    most = max(1, min(MOST_SHARDS, len(jobs) // LEAST_GROUPS))
    group: list[ShardJob] = []
    files = 0
    for job in jobs:
        if group and (len(group) >= most or files + job.num_files > MOST_FILES):
            yield group
            group, files = [], 0
        group.append(job)
        files += job.num_files
    if group:
        yield group


def _run_while_wanted(sign: Path, working_directory: str, job: ShardJob) -> ShardSummary:
    """In a child process, whose working directory is nobody else's."""
    _require_wanted(sign)
    with suppress(OSError):  # absolute paths do not need it
        os.chdir(working_directory)
    return job.run(sign.parent)


def _require_wanted(sign: Path) -> None:
    """Read, not looked for: over NFS a file that is opened is never an old one."""
    with suppress(FileNotFoundError):
        if not sign.read_bytes():
            return
    raise NotWanted(f"the ingestion into {sign.parent} has ended")
