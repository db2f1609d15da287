"""Makes the shards of a plan: those that the journal does not know, on this machine's processes or an engine's."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline.config.ingest import IngestConfig
from pipeline.errors import FaultError
from pipeline.ingestion.duplicates.hash_file import FOLDER
from pipeline.ingestion.isolation import Limits, ReadingHangs, TooManyFaults, WorkerLost, in_isolation, memory_limit
from pipeline.ingestion.journal import Journal
from pipeline.ingestion.machines.dask_cluster import run_in_dask
from pipeline.ingestion.machines.shard_groups import EngineLost, RunGroups, in_groups
from pipeline.ingestion.plan import IngestPlan, num_workers
from pipeline.ingestion.progress import Progress
from pipeline.ingestion.rejected import UNCOUNTED, Rejected, num_counted, reasons
from pipeline.ingestion.shard_contract import ShardJob, ShardSummary
from pipeline.ingestion.sources.digits import DIGITS
from pipeline.shards.atomic import remove_temporaries, sync_directory
from pipeline.shards.certificate import REJECTED_NAME
from pipeline.shards.index import INDEX_NAME

FAULTS_BEYOND_BUDGET = 20


class IngestError(Exception):
    """The images themselves are the trouble: too many were rejected, or a worker died of one. Nothing was published.

    The message is one line."""


class IngestStopped(KeyboardInterrupt):
    """Ctrl-C, with one line on what stays."""


@dataclass
class ShardMaker:
    """One ingestion under way; `made` are the names of the shards that it made."""

    plan: IngestPlan
    destination: Path
    journal: Journal
    config: IngestConfig
    progress: Progress
    engine: RunGroups | None
    made: set[str] = field(default_factory=set)
    num_done: int = 0  # shards that are finished

    @contextmanager
    def telling_what_stays(self) -> Iterator[None]:
        """IngestError and Ctrl-C say what of it is published, and what the next run goes on from."""
        try:
            yield
        except IngestError as error:
            raise IngestError(f"{error}; {self._what_stays()}") from None
        except KeyboardInterrupt:
            raise IngestStopped(f"stopped: {self._what_stays()}") from None

    def _what_stays(self) -> str:
        if (self.destination / INDEX_NAME).exists():
            return "the dataset that was there stands as it was"
        shards = f"{self.num_done} of {len(self.plan.jobs)} shards are finished and stay for the next run"
        return f"nothing is published ({self.destination} has no {INDEX_NAME}); {shards}"

    def make(self, jobs: Sequence[ShardJob], known: Callable[[str, str], ShardSummary | None]) -> list[ShardSummary]:
        """The summary of every shard, in the order of the jobs; those that are not known, by name and key, are made.

        Fewer where too many images are rejected: `check_budget` says so.
        """
        keys = {job.name: job.key() for job in jobs}
        done = {job.name: kept for job in jobs if (kept := known(job.name, keys[job.name]))}
        todo = [job for job in jobs if job.name not in done]
        self.made |= {job.name for job in todo}
        self.num_done = len(done)
        if todo:
            if self.plan.lay_out is not None:
                self.plan.lay_out()
            (self.destination / INDEX_NAME).unlink(missing_ok=True)  # the shards under an old index will change
            sync_directory(self.destination)
        try:
            self._make(todo, keys, done)
        except WorkerLost as error:
            raise IngestError(
                f"{error}, perhaps for lack of memory; fewer workers need less: --set workers=1"
            ) from None
        except ReadingHangs as error:
            raise FaultError(f"{self.plan.identity['source']}: {error}; {self._what_stays()}") from None
        except EngineLost as error:
            raise IngestError(str(error)) from None
        except TooManyFaults as error:
            raise IngestError(
                f"images that end the process which decodes them ({error}) are more than max_rejected_fraction "
                f"{self.config.max_rejected_fraction:g} of {self.plan.num_images} allows; mend or remove them, or "
                "allow more"
            ) from None
        finally:
            remove_temporaries(self.destination)  # of workers that were ended
            remove_temporaries(self.destination / FOLDER)
        return [done[job.name] for job in jobs if job.name in done]

    def _make(self, todo: Sequence[ShardJob], keys: dict[str, str], done: dict[str, ShardSummary]) -> None:
        """Fill `done` and the journal, in any order."""
        num_files = len(self.plan.rejected) + sum(summary.files for summary in done.values())
        rejected = [self.plan.rejected, *(summary.rejected for summary in done.values())]
        num_rejected = sum(map(num_counted, rejected))
        self.progress(num_files, self.plan.num_files, num_rejected)
        with closing(self._summaries(todo)) as summaries:
            for summary in summaries:
                self.journal.add(keys[summary.name], summary)
                done[summary.name] = summary
                self.num_done = len(done)
                num_files += summary.files
                num_rejected += num_counted(summary.rejected)
                self.progress(num_files, self.plan.num_files, num_rejected)
                if num_rejected / self.plan.num_images > self.config.max_rejected_fraction:
                    break  # it can only grow

    def _summaries(self, jobs: Sequence[ShardJob]) -> Iterator[ShardSummary]:
        run = partial(_run_job, self.destination)
        if self.plan.identity["source"] == DIGITS:  # nobody's hostile files: they need no process of their own
            return (run(job) for job in jobs)
        # The usual way past the budget ends with a list of the rejected; this is for a decoder that fails on all.
        allowed = int(self.config.max_rejected_fraction * self.plan.num_images) + FAULTS_BEYOND_BUDGET
        memory = memory_limit(self.config.max_pixels)
        limits = Limits(self.config.max_image_seconds, memory, self.config.max_read_seconds)
        engine = self.engine
        if engine is None and isinstance(self.config.workers, str):
            engine = partial(run_in_dask, self.config.workers)
        if engine is not None:
            return in_groups(engine, self.destination, jobs, limits, allowed)
        return in_isolation(run, jobs, num_workers(jobs, self.config), limits, allowed)

    def check_budget(self, rejected: Sequence[Rejected]) -> None:
        """IngestError where there are too many."""
        num_images, where = self.plan.num_images, self.destination / REJECTED_NAME
        fraction, most = num_counted(rejected) / num_images, self.config.max_rejected_fraction
        why = ", ".join(f"{count} {reason}" for reason, count in reasons(rejected).items() if reason not in UNCOUNTED)
        if fraction > most:
            raise IngestError(
                f"{fraction:.2%} of the images were rejected ({why}), more than max_rejected_fraction {most:g} allows; "
                f"see {where}; mend or remove them, or allow more"
            )
        if num_counted(rejected) == num_images:
            raise IngestError(f"not one image could be taken ({why}); see {where}")


def _run_job(destination: Path, job: ShardJob) -> ShardSummary:
    return job.run(destination)
