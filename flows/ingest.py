"""The ingestion flow: `prefect deployment run ingest/images --param source=DIR --param dest=DIR`.

Where its task runner is prefect-dask's, shards are made by the workers of a Dask cluster, in groups: a group is a task.
"""

import pickle
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.context import FlowRunContext
from prefect.states import Completed, Failed, State

from flows.control.progress import certificate_words, ingest_progress, ingest_words
from flows.orchestration.reporting import refused, reporter
from pipeline.config.ingest import IngestConfig
from pipeline.config.recipe import apply_overrides, parse_overrides, validate
from pipeline.errors import InputError
from pipeline.ingestion.build import ingest as build_dataset
from pipeline.ingestion.isolation import TooManyFaults
from pipeline.ingestion.machines.dask_cluster import require_distributed, run_by_client, started_cluster
from pipeline.ingestion.machines.shard_groups import NotWanted, RunGroups, WantedGroups
from pipeline.ingestion.making import IngestError
from pipeline.ingestion.shard_contract import ShardSummary

GROUP_RETRIES = 2  # beside those that Dask makes when a worker is lost


@flow(name="ingest")
def ingest(
    source: str, dest: str, set: list[str] = [], dask_cluster: str | None = None, dask_options: dict[str, Any] = {}
) -> State:
    """Raw images to a checked dataset directory.

    Args:
        source: a folder, zips or tars, absolute; a URL of those; or sklearn:digits.
        dest: the dataset directory to make, absolute.
        set: settings of the ingestion, as key=value; workers=tcp://host:8786 is a running Dask cluster.
        dask_cluster: a class of Dask clusters to start for this run, such as dask_jobqueue.SLURMCluster.
        dask_options: its arguments, such as n_workers, cores and memory.
    """
    try:
        config = validate(IngestConfig, apply_overrides({}, parse_overrides(set)), "set")
        engine = _engine_of_this_run()
        if engine is None and (dask_cluster or isinstance(config.workers, str)):
            with ExitStack() as stack:
                runner = _dask_runner(config, dask_cluster, dask_options, stack)
                ended = ingest.with_options(task_runner=runner)(source, dest, set, return_state=True)
            return State(type=ended.type, name=ended.name, message=ended.message, data=dest)
        report = build_dataset(source, dest, config, progress=ingest_progress(reporter()), engine=engine)
    except InputError as error:
        return refused(error)
    except IngestError as error:
        return Failed(message=str(error))
    create_link_artifact(report.certificate.absolute().as_uri(), link_text="certificate", description=report.verdict)
    return Completed(message=f"{ingest_words(report)}; {certificate_words(report)}", data=dest)


def _dask_runner(config: IngestConfig, cluster: str | None, options: dict[str, Any], stack: ExitStack) -> Any:
    """The task runner for what was asked; a cluster that it needs ends with `stack`. InputError where prefect-dask is
    not installed, or there is no such cluster."""
    address = config.workers if isinstance(config.workers, str) else None
    if address is not None and cluster is not None:
        raise InputError(f"dask_cluster: {cluster}: and workers is {address}; give one of them")
    require_distributed()
    try:
        from prefect_dask import DaskTaskRunner
    except ModuleNotFoundError as error:
        extra = "pip install 'vit-pretraining[dask]'"
        raise InputError(f"dask_cluster: {cluster or address}: needs {error.name}; {extra}") from None
    if cluster is None:
        return DaskTaskRunner(address=address)
    # Not by the task runner, whose end waits for the cluster's without a bound.
    started = stack.enter_context(started_cluster(cluster, options))
    return DaskTaskRunner(address=started.scheduler_address, client_kwargs={"security": started.security})


def _engine_of_this_run() -> RunGroups | None:
    """Prefect tasks, where this flow run has a Dask task runner; else None."""
    prefect_dask, context = sys.modules.get("prefect_dask"), FlowRunContext.get()
    if prefect_dask is None or context is None or not isinstance(context.task_runner, prefect_dask.DaskTaskRunner):
        return None
    client = context.task_runner.client

    def run(groups: WantedGroups) -> Iterator[list[ShardSummary]]:
        states = run_by_client(client, lambda group: make_shards.submit(pickle.dumps(group)).wrapped_future, groups)
        try:
            for state in states:
                yield state.result()
        finally:
            states.close()

    return run


def _may_pass(_: Any, run: TaskRun, state: State) -> bool:
    """Wrong input and bad images stay what they are; what a machine did may go better on another."""
    return not isinstance(state.result(raise_on_failure=False), (InputError, TooManyFaults, NotWanted))


@task(name="make shards", retries=GROUP_RETRIES, retry_delay_seconds=5, retry_condition_fn=_may_pass,
      cache_policy=NO_CACHE, persist_result=False)  # fmt: skip
def make_shards(group: bytes) -> list[ShardSummary]:
    """A pickled group, so that Prefect does not look for futures among its files."""
    return pickle.loads(group).run()
