"""`vit up`, `vit down`, `vit status`: the bodies of the commands that start and end servers and a worker."""

import time
from collections.abc import Callable

from flows.home import home_directory
from flows.services import stack
from flows.services.team import load_team
from pipeline.errors import EXIT_DONE

Say = Callable[..., None]


def up_command(directory: str | None, data: str | None, profile: str, say: Say) -> int:
    team = load_team(profile)
    home = home_directory(directory)
    started = time.monotonic()
    parts = stack.up(home, data, say, team)
    say(f"ready in {time.monotonic() - started:.0f} s")
    say(f"Prefect: {parts['prefect_ui_url']}   MLflow: {parts['mlflow_url']}")
    if team is None:
        say("try: prefect deployment run pretrain/vit-l16 --watch")
    else:
        say(f"others: export PREFECT_API_URL={parts['prefect_api_url']} MLFLOW_TRACKING_URI={parts['mlflow_url']}")
        say("and each their PREFECT_API_AUTH_STRING, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
    return EXIT_DONE


def down_command(directory: str | None, say: Say) -> int:
    stack.down(home_directory(directory), say)
    return EXIT_DONE


def status_command(directory: str | None, say: Say) -> int:
    for row in stack.status(home_directory(directory)):
        fault = row.pop("fault")
        say("  ".join(str(value) for value in row.values()) + (f"  {fault}" if fault else ""))
    return EXIT_DONE
