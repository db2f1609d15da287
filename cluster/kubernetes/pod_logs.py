"""What the pods of a job say, collected in one file that only grows and outlives them.

The ranks' logs are in the run directory; this is what a container says before there are any, and the supervisors'
verdicts. Each line begins with its pod. `.FILE.cursor` has how many bytes of each pod are in it already.
"""

import contextlib
import fcntl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.job import read_object, write_object
from cluster.kubernetes.client import Client, Refused

MOST_BYTES = 4 << 20  # of one pod: a supervisor says some lines


class PodLogs:
    """The file of one job, and the API's path of its pods."""

    def __init__(self, file: Path, path: str):
        self.file, self.path = file, path
        self._cursor = file.with_name(f".{file.name}.cursor")

    def fetch(self, client: Client, pods: Sequence[Mapping[str, Any]]) -> None:
        """Append what each pod has said since the last time, in whole lines. NoAnswer; one without a log is passed."""
        with self._alone():
            taken = read_object(self._cursor)
            for pod in sorted(pods, key=lambda pod: pod["metadata"].get("creationTimestamp", "")):
                name = pod["metadata"]["name"]
                try:
                    said = client.text(f"{self.path}/{name}/log", limitBytes=MOST_BYTES)
                except Refused:  # it has not begun, or is gone
                    continue
                ended = (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded")
                new = said[taken.get(name, 0) :]
                if not ended:
                    new = new[: new.rfind(b"\n") + 1]
                if new:
                    lines = new.decode(errors="replace").splitlines()
                    with open(self.file, "a") as file:
                        file.write("".join(f"[{name}] {line}\n" for line in lines))
                    taken[name] = taken.get(name, 0) + len(new)
                    write_object(self._cursor, taken)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Several commands may look at one run at once."""
        self.file.parent.mkdir(exist_ok=True)
        with open(self.file.with_name(f".{self.file.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
