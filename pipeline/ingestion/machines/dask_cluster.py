"""Groups of shards on the workers of a Dask cluster, whoever started it: SLURM, Kubernetes, or `dask scheduler`.

Dask gives the tasks of a lost worker to another. A few groups more than there are threads wait in the cluster, the rest
here, however many there are.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.ingestion.machines.shard_groups import EngineLost, ShardGroup, WantedGroups
from pipeline.ingestion.shard_contract import ShardSummary

if TYPE_CHECKING:
    from distributed import Client, Future
    from distributed.deploy import Cluster

CONNECT_SECONDS = 10
LOOK_SECONDS = 5.0
ALONE_SECONDS = 600.0  # without a single worker; a cluster may start them when it has something to do
END_SECONDS = 120.0  # for the shard that each worker is at when the ingestion ends early
CLOSE_SECONDS = 60.0  # for a cluster to end; its close may wait for a worker that never answers
LEAST_UNDER_WAY = 16  # what a cluster without workers sees, so that it starts some


def run_in_dask(address: str, groups: WantedGroups) -> Iterator[list[ShardSummary]]:
    """InputError where nobody answers at `address`; EngineLost."""
    distributed = require_distributed()
    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"workers: {address}: no Dask scheduler answers there ({why}); start `dask scheduler`"
        ) from None
    with client:
        yield from run_by_client(client, lambda group: client.submit(ShardGroup.run, group, pure=False), groups)


def run_by_client(client: "Client", submit: "Callable[[ShardGroup], Future]", groups: WantedGroups) -> Iterator[Any]:
    """The result of every future that `submit` gives, as they are ready. Ended early, it withdraws the groups and
    waits for the shard that each worker is at."""
    distributed = require_distributed()
    under_way: set[Future] = set()
    seen_at = time.monotonic()
    try:
        while True:
            threads = sum(client.nthreads().values())
            seen_at = time.monotonic() if threads else seen_at
            if time.monotonic() - seen_at > ALONE_SECONDS:
                raise EngineLost(f"{client.scheduler.address}: no Dask worker for {ALONE_SECONDS:.0f} seconds")
            room = max(LEAST_UNDER_WAY, 2 * threads) - len(under_way)
            under_way |= {submit(group) for group in islice(groups, max(0, room))}
            if not under_way:
                return
            try:
                with client.as_current():
                    ready, under_way = distributed.wait(under_way, LOOK_SECONDS, "FIRST_COMPLETED")
            except TimeoutError:
                continue
            for future in ready:
                yield _result(client, future)
    finally:
        if under_way:
            groups.withdraw()
            _end(client, under_way)


@contextmanager
def started_cluster(name: str, options: Mapping[str, Any]) -> "Iterator[Cluster]":
    """A cluster of the class of this name, for a while; InputError where there is none, or it cannot be made so."""
    require_distributed()
    module, _, class_name = name.rpartition(".")
    try:
        cluster = getattr(import_module(module), class_name)(**options)
    except ModuleNotFoundError as error:
        raise InputError(f"dask_cluster: {name}: needs {error.name}; install {error.name}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"dask_cluster: {name}: no class of Dask clusters with these options ({error})") from None
    try:
        yield cluster
    finally:
        _close(cluster)


def _close(cluster: "Cluster") -> None:
    closed = threading.Event()

    def close() -> None:
        try:
            cluster.close()
        except Exception:
            logging.getLogger(__name__).warning("the Dask cluster ended with an error", exc_info=True)
        closed.set()

    threading.Thread(target=close, daemon=True).start()
    if not closed.wait(CLOSE_SECONDS):
        logging.getLogger(__name__).warning("the Dask cluster has not ended within %g seconds; left", CLOSE_SECONDS)


def require_distributed() -> Any:
    """The library; InputError where it is not installed."""
    try:
        import distributed
    except ModuleNotFoundError as error:
        raise InputError(
            f"workers: a Dask cluster needs the package {error.name}; install it: pip install 'vit-pretraining[dask]'"
        ) from None
    return distributed


def _result(client: "Client", future: "Future") -> Any:
    distributed = require_distributed()
    try:
        return future.result()
    except distributed.KilledWorker:
        raise EngineLost(
            "Dask workers died of one group of shards again and again, perhaps for lack of memory"
        ) from None
    except (distributed.CancelledError, distributed.comm.CommClosedError, TimeoutError):
        raise EngineLost(f"{client.scheduler.address}: the Dask scheduler is gone; run the ingestion again") from None


def _end(client: "Client", under_way: "set[Future]") -> None:
    """Wait for futures that are withdrawn while there is somebody to end them."""
    distributed = require_distributed()
    deadline = time.monotonic() + END_SECONDS
    try:
        while client.status == "running" and client.nthreads() and time.monotonic() < deadline:
            with suppress(TimeoutError), client.as_current():
                distributed.wait(under_way, LOOK_SECONDS)
                break
        if client.status == "running":
            client.cancel(list(under_way))
    except (OSError, distributed.CancelledError):  # the scheduler is gone
        pass
