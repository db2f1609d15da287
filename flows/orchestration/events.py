"""What Prefect is told of a registration, so that automations can follow: `vit.model.registered`, `vit.model.promoted`.

Prefect's client keeps an event that it cannot send, and drops it where nobody ever answers: nothing waits for it.
"""

from typing import Any


def announce_registration(result: dict[str, Any]) -> None:
    """Emit the events of a finished registration's result; of any other stage's, none."""
    if result.get("stage") != "register":
        return
    from prefect.events import emit_event

    resource = {"prefect.resource.id": f"vit.model.{result['name']}", "prefect.resource.name": result["name"]}
    payload = {key: result.get(key) for key in ("uri", "reason", "previous", "tracking_uri")}
    if result.get("registered", True):
        emit_event("vit.model.registered", resource=resource, payload=payload | {"promoted": result["promoted"]})
    if result["promoted"] and result.get("moved", True):
        emit_event("vit.model.promoted", resource=resource, payload=payload)
