"""How many runs may use a place at once: a global concurrency limit of Prefect named after the kind of the profile.

`vit-local`, `vit-slurm`, `vit-kubernetes`; none of them exists until somebody wants it, and then nothing waits:

    prefect global-concurrency-limit create vit-slurm --limit 8

A flow that finds its job alive (after a crash, say) does not ask for a slot: the job has its place already.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

from prefect.concurrency.sync import concurrency

from cluster.job import JobState
from flows.control.submission import launcher_of
from flows.services.api import impatient_client
from pipeline.config.recipe import read_yaml
from pipeline.run_directory import RunDirectory

ASK_AGAIN_SECONDS = 10.0


@contextlib.contextmanager
def slot_of(run: RunDirectory, report: Callable[[str], None], cancelled: threading.Event) -> Iterator[None]:
    """Hold a slot of the place where the run goes, if there is a limit; wait for it until `cancelled` is set."""
    name = f"vit-{read_yaml(run.profile_file).get('kind', 'local')}"
    with contextlib.ExitStack() as held:
        if _is_limited(name) and not _lives(run):
            _enter(name, held, report, cancelled)
        try:
            yield
        finally:
            with contextlib.suppress(Exception):  # a slot that cannot be given back ends by its lease
                held.close()


def _enter(
    name: str, held: contextlib.ExitStack, report: Callable[[str], None], cancelled: threading.Event
) -> None:  # fmt: skip
    told = False
    while not cancelled.is_set():
        slot = concurrency(name, timeout_seconds=ASK_AGAIN_SECONDS, raise_on_lease_renewal_failure=False)
        try:
            held.enter_context(slot)
            return
        except TimeoutError:
            if not told:
                report(f"waiting for a free slot of the limit `{name}`")
            told = True
        except Exception as error:  # Prefect is away: a limit that nobody can ask for holds nobody up
            report(f"the limit `{name}` could not be asked for, going on: {error or type(error).__name__}")
            return


def _is_limited(name: str) -> bool:
    with contextlib.suppress(Exception), impatient_client() as client:  # not there, or Prefect is away: no limit
        client.read_global_concurrency_limit_by_name(name)
        return True
    return False


def _lives(run: RunDirectory) -> bool:
    launcher = launcher_of(run)
    job = launcher.find(run.path)
    return job is not None and launcher.state(job) is not JobState.ENDED
