"""Who started the stack of a home, on which machine, and what of it lives, as far as that can be seen from here.

A home may be shared: by people of one group, and by machines that mount it. Processes of another person are seen and
not signalled; those of another machine are not even seen.
"""

import contextlib
import os
import pwd
import socket
from pathlib import Path

import psutil

from flows.services import servers
from flows.services.processes import MARK
from pipeline.errors import InputError


def owner() -> dict[str, str]:
    """What a record says of who starts a stack now: {user, host}."""
    return {"user": _user(), "host": socket.gethostname()}


def require_ours(home: Path, stack: dict | None, what: str) -> None:
    """InputError where this person, on this machine, cannot end what runs of the stack, to `what` (a verb) it."""
    stack = stack or {}
    if stack.get("host", socket.gethostname()) != socket.gethostname() and _answers(stack):
        raise InputError(f"the stack in {home} runs on {stack['host']}; {what} it there, or take another --dir")
    if stack.get("user", _user()) != _user() and os.getuid() != 0 and living_parts(home, stack):
        raise InputError(f"the stack in {home} was started by {stack['user']}, who alone can {what} it")


def by_whom(stack: dict) -> str:
    """Words for a message, where it is not this person on this machine."""
    other = {"user": stack.get("user", _user()), "host": stack.get("host", socket.gethostname())} != owner()
    return f", by {stack.get('user')} on {stack.get('host')}" if other else ""


def is_whole(home: Path, stack: dict) -> bool:
    """Whether nothing of a stack is missing; of one on another machine, whether it answers."""
    living = living_parts(home, stack)
    return _answers(stack) if living is None else living == set(stack["pids"])


def living_parts(home: Path, stack: dict) -> set[str] | None:
    """The parts whose process still is the one that was started: same number, same start, same home.

    None where they run on another machine. Of another person's process the home is not shown, and taken on trust.
    """
    if stack.get("host", socket.gethostname()) != socket.gethostname():
        return None
    return {part for part, pid in stack["pids"].items() if _lives(pid, stack["started"][part], home)}


def _lives(pid: int, started: float, home: Path) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - started) >= 1.0 or process.status() == psutil.STATUS_ZOMBIE:
            return False
        with contextlib.suppress(psutil.AccessDenied):
            return process.environ().get(MARK) == str(home)
        return True
    return False


def _answers(stack: dict) -> bool:
    """Whether anything of a stack on another machine is heard of."""
    api, pool = stack["prefect_api_url"], stack.get("pool", servers.POOL)
    if stack["pids"].keys() == {"worker"}:
        return servers.worker_heartbeat(api, stack["worker"], pool) is not None
    return servers.answers(f"{api}/health")


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user without a name
        return str(os.getuid())
