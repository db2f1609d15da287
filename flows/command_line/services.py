"""`vit up`, `vit down`, `vit status`: the bodies of the commands that start and end servers and a worker."""

import time
from collections.abc import Callable

from flows.home import home_directory, team_servers
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
        if asked := _asked_for(set(parts["pids"])):
            say(f"and each their {asked}")
    return EXIT_DONE


def _asked_for(started: set[str]) -> str:
    """What the servers that were started here want of everybody; those of others have told their people."""
    names = ["PREFECT_API_AUTH_STRING"] if "prefect" in started else []
    names += ["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"] if "mlflow" in started else []
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def down_command(directory: str | None, say: Say) -> int:
    home = home_directory(directory)
    stack.down(home, say)
    if servers := team_servers(home):
        say(
            f"{home} stays a team's: its commands go on to use {servers['mlflow_url']}; to make it a home of its own: "
            f"rm {home / 'team.json'}"
        )
    return EXIT_DONE


def status_command(directory: str | None, say: Say) -> int:
    for row in stack.status(home_directory(directory)):
        fault = row.pop("fault")
        say("  ".join(str(value) for value in row.values()) + (f"  {fault}" if fault else ""))
    return EXIT_DONE
