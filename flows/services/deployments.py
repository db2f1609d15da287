"""Make the work pool, the automation and every deployment of `flows/prefect.yaml`: `python -m ...deployments`.

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

    asyncio.run(make_pool_and_automation())
    sys.argv = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE)]
    app()


async def make_pool_and_automation() -> None:
    """Wait for the API; create the pool unless it exists, and the automation that finds dead flow runs."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    from flows.services.automations import NAME, make_automation

    template = ProcessWorker.get_default_base_job_template()
    deadline = time.monotonic() + DEADLINE_SECONDS
    async with get_client() as client:
        while (fault := await client.api_healthcheck()) is not None:
            if time.monotonic() > deadline:
                raise SystemExit(f"{client.api_url} does not answer: {fault}")
            await asyncio.sleep(0.1)
        with contextlib.suppress(ObjectAlreadyExists):
            await client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
        try:
            await make_automation(client)
        except Exception as error:  # a team's server may allow no automations: the flows run without
            sys.stderr.write(f"the automation `{NAME}` could not be made: {error}\n")


if __name__ == "__main__":
    main()
