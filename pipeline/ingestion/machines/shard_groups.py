"""Shards made on other machines: in groups, so that an engine has few tasks, by processes that see the destination.

A group checks that its worker writes into the same directory and would make the same bytes. It runs only while the
ingestion that wants it has its sign in that directory: whoever outlives a stopped ingestion makes no further shard.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import gethostname

import PIL

from pipeline.errors import InputError
from pipeline.ingestion.isolation import Limits, in_isolation
from pipeline.ingestion.shard_jobs import JOB_VERSION, ShardJob, ShardSummary
from pipeline.shards.atomic import TEMPORARY_PREFIX

LEAST_GROUPS = 256  # so that many workers have something to do; a group costs the start of a process
MOST_SHARDS = 16  # per group
MOST_FILES = 16_000  # per group: what is sent of each is some 100 bytes
SIGHT_SECONDS = 10.0  # until what one machine wrote is seen by all, over NFS
BYTES_DEPEND_ON = {"vit-pretraining's shards": str(JOB_VERSION), "Pillow": PIL.__version__}


class EngineLost(Exception):
    """The machines or their scheduler are gone, or never came. The message is one line."""


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


RunGroups = Callable[[Iterator[ShardGroup]], Iterator[list[ShardSummary]]]  # an engine; results in any order


def in_groups(
    engine: RunGroups, destination: Path, jobs: Sequence[ShardJob], limits: Limits, allowed_faults: int
) -> Iterator[ShardSummary]:
    """The summaries as their groups are done, in any order. When it ends, nothing of it is at work any more."""
    sign = destination.resolve() / f"{TEMPORARY_PREFIX}wanted-{uuid.uuid4().hex}"
    sign.touch()
    alike = (sign, limits, allowed_faults, tuple(BYTES_DEPEND_ON.items()), os.getcwd())
    results = engine(ShardGroup(group, *alike) for group in _grouped(jobs))
    try:
        for summaries in results:
            yield from summaries
    finally:
        sign.unlink(missing_ok=True)
        results.close()


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


class _NotWantedError(Exception):
    """The ingestion that this shard is for has ended."""


def _run_while_wanted(sign: Path, working_directory: str, job: ShardJob) -> ShardSummary:
    """In a child process, whose working directory is nobody else's."""
    if not sign.exists():
        raise _NotWantedError(f"the ingestion into {sign.parent} has ended")
    with suppress(OSError):  # absolute paths do not need it
        os.chdir(working_directory)
    return job.run(sign.parent)
