"""Make the work pool, the automation and every deployment of `flows/prefect.yaml`.

`python -m flows.services.deployments POOL SUFFIX PROFILE` is a program of its own, because Prefect reads
PREFECT_API_URL once, when it is first used in a process. It imports Prefect and the flows first and then waits for the
API, so it can be started together with the server.
"""

import asyncio
import contextlib
import importlib
import inspect
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from flows.services.servers import DEADLINE_SECONDS

PREFECT_FILE = Path(__file__).parent.parent / "prefect.yaml"


def main() -> None:
    pool, suffix, profile = sys.argv[1:]
    content = for_pool(yaml.safe_load(PREFECT_FILE.read_text()), pool, suffix)
    for deployment in content["deployments"]:
        module, _, flow = deployment["entrypoint"].rpartition(".")
        give_profile(deployment, getattr(importlib.import_module(module), flow), profile)
    from prefect.cli import app

    ours = {(each["entrypoint"], each["name"]) for each in content["deployments"]}
    asyncio.run(make_pool_and_automation(pool, ours))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(content, file)
        file.flush()
        sys.argv = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", file.name]
        app()


def for_pool(content: dict[str, Any], pool: str, suffix: str) -> dict[str, Any]:
    """What prefect.yaml says, for another pool and with a suffix to every deployment's name."""
    deployments = [
        each | {"name": each["name"] + suffix, "work_pool": each["work_pool"] | {"name": pool}}
        for each in content["deployments"]
    ]
    return {key: value for key, value in content.items() if key != "definitions"} | {"deployments": deployments}


def give_profile(deployment: dict[str, Any], flow: Any, profile: str) -> None:
    """Have a deployment's runs train where `profile` says by default, if its flow asks where; empty changes nothing."""
    if profile and "profile" in inspect.signature(flow.fn).parameters:
        deployment["parameters"] = {"profile": profile} | (deployment.get("parameters") or {})


async def make_pool_and_automation(pool: str, ours: set[tuple[str, str]]) -> None:
    """Wait for the API; create the pool unless it exists, and the automation that finds dead flow runs.

    SystemExit where one of `ours` (entrypoint, name) is another pool's: its worker would get no more runs.
    """
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
            await client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template=template))
        for each in await client.read_deployments():
            if (each.entrypoint, each.name) in ours and each.work_pool_name not in (pool, None):
                raise SystemExit(
                    f"the deployment {each.name} is of the work pool {each.work_pool_name}; give those of {pool} names "
                    "of their own by deployment_suffix in the team's profile"
                )
        try:
            await make_automation(client)
        except Exception as error:  # a team's server may allow no automations: the flows run without
            sys.stderr.write(f"the automation `{NAME}` could not be made: {error}\n")


if __name__ == "__main__":
    main()
