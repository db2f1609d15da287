"""Make the work pool and every deployment of `flows/prefect.yaml`: `python -m flows.services.deployments`.

A program of its own, because Prefect reads PREFECT_API_URL once, when it is first used in a process. It imports Prefect
and the flows first and then waits for the API, so it can be started together with the server.
"""

import asyncio
import contextlib
import importlib
import sys
import time
from pathlib import Path

import yaml

from flows.services.servers import DEADLINE_SECONDS, POOL

PREFECT_FILE = Path(__file__).parent.parent / "prefect.yaml"


def main() -> None:
    for deployment in yaml.safe_load(PREFECT_FILE.read_text())["deployments"]:
        importlib.import_module(deployment["entrypoint"].rpartition(".")[0])
    from prefect.cli import app

    asyncio.run(make_work_pool())
    sys.argv = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE)]
    app()


async def make_work_pool() -> None:
    """Wait for the API and create the pool, unless it exists."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    deadline = time.monotonic() + DEADLINE_SECONDS
    async with get_client() as client:
        while (fault := await client.api_healthcheck()) is not None:
            if time.monotonic() > deadline:
                raise SystemExit(f"{client.api_url} does not answer: {fault}")
            await asyncio.sleep(0.1)
        with contextlib.suppress(ObjectAlreadyExists):
            await client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))


if __name__ == "__main__":
    main()
