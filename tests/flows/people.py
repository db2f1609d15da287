"""Two people of one group on one machine, for tests: Unix users where the tester is root, else the tester twice."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

GROUP = "vit-testers"
NAMES = ("vit-ada", "vit-bob")
ROOT = Path(__file__).parents[2]


@dataclass
class Person:
    """Runs commands as a user, with an environment that is theirs alone."""

    user: str | None  # None: the tester
    directory: Path  # their own, closed to others
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, fails: bool = False, **more: str) -> subprocess.CompletedProcess:
        """`vit ...` and `prefect ...` are this environment's. What is said is checked for nothing but the exit code."""
        program = str(Path(sys.executable).parent / command[0]) if command[0] in ("vit", "prefect") else command[0]
        done = subprocess.run(
            as_user(self.user, [program, *command[1:]]), env=self._environment(more), cwd=self.directory,
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert (done.returncode != 0) is fails, f"{shlex.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        own = {
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.directory),
            "USER": self.user or "", "PREFECT_HOME": str(self.directory / ".prefect"), "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu", "LANG": "C.UTF-8",
        }  # fmt: skip
        if sys.dont_write_bytecode:  # else every program compiles torch, Prefect and MLflow anew
            own["PYTHONPYCACHEPREFIX"] = str(self.directory.with_name(f"{self.directory.name}-bytecode"))
        return own | self.environment | more


@contextlib.contextmanager
def two_people(directory: Path) -> Iterator[tuple[Person, Person]]:
    """Ada and Bob, whose users are made for the length of the block."""
    if os.getuid() != 0:
        yield tuple(Person(None, _own(directory, name, None)) for name in NAMES)  # type: ignore[misc]
        return
    subprocess.run(["groupadd", "-f", GROUP], check=True)
    try:
        for name in NAMES:
            subprocess.run(["useradd", "-M", "-N", "-g", "nogroup", "-G", GROUP, "-d", str(directory / name), name])
        yield tuple(Person(name, _own(directory, name, name)) for name in NAMES)  # type: ignore[misc]
    finally:
        for name in NAMES:
            subprocess.run(["userdel", name], check=False)
        subprocess.run(["groupdel", GROUP], check=False)


def _own(directory: Path, name: str, user: str | None) -> Path:
    own = directory / name
    own.mkdir(mode=0o700)
    bytecode = own.with_name(f"{name}-bytecode")
    bytecode.mkdir()
    if user is not None:
        shutil.chown(own, user)
        shutil.chown(bytecode, user)
    return own


def as_user(user: str | None, command: list[str]) -> list[str]:
    """`command` as a user who may read Python and this project, wherever they are.

    Where a folder on the way to them is closed (root's own), the command sees one in its place that holds no more.
    """
    if user is None:
        return command
    needed = [Path(sys.base_prefix), Path(sys.prefix), ROOT]
    closed = {each: _first_closed(each) for each in needed}
    lines = ["hidden=$(mktemp -d); mount -t tmpfs -o mode=755 none $hidden; mkdir $hidden/{0,1,2}"]
    hide = [(number, each) for number, each in enumerate(needed) if closed[each] is not None]
    lines += [f"mount --bind {shlex.quote(str(each))} $hidden/{number}" for number, each in hide]
    lines += [
        f"mount -t tmpfs -o mode=755 none {shlex.quote(str(each))}" for each in {closed[path] for _, path in hide}
    ]
    for number, each in hide:
        lines.append(f"mkdir -p {shlex.quote(str(each))}; mount --bind $hidden/{number} {shlex.quote(str(each))}")
    lines.append("umount --lazy $hidden; rmdir $hidden")
    become = f"exec setpriv --reuid={user} --regid=nogroup --init-groups -- {shlex.join(command)}"
    if not hide:
        return ["bash", "-c", become]
    return ["unshare", "--mount", "--propagation", "private", "bash", "-ec", "\n".join([*lines, become])]


def _first_closed(path: Path) -> Path | None:
    """The highest folder above `path` that others may not enter."""
    return next((each for each in reversed(path.parents) if not each.stat().st_mode & 0o001), None)
