"""A client of the Prefect API for what must never wait: short time-outs and no retries, the caller asks again.

Prefect's own client waits through an outage for more than a minute per request, and a job is watched meanwhile.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

TIMEOUT_SECONDS = 5.0


@contextlib.contextmanager
def impatient_client(timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[SyncPrefectClient]:
    """The client, in the settings of this context; every call raises within about `timeout_seconds`."""
    settings: dict[str, Any] = {"timeout": timeout_seconds}
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings=settings, sync_client=True) as client,
    ):
        yield client
