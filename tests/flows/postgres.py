"""A real PostgreSQL on this machine, for tests: its own cluster on a free loopback port, with passwords, in a second.

initdb refuses root, so there it runs as the user `postgres` of Debian's package, or as nobody.
"""

import contextlib
import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.ports import free_port

PROGRAMS = ("initdb", "postgres", "pg_ctl", "psql", "createdb", "dropdb", "pg_dump", "pg_restore")
USER = "vit"


def folder() -> Path | None:
    """Where Debian, or the PATH, has PostgreSQL's programs; None where some are missing."""
    found = shutil.which("initdb")
    places = sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True) + ([str(Path(found).parent)] if found else [])
    return next((Path(each) for each in places if all((Path(each) / name).exists() for name in PROGRAMS)), None)


@dataclass
class Postgres:
    """A running server; `USER` may make databases."""

    programs: Path
    root: Path
    port: int
    password: str
    account: str | None  # whose processes they are; None: the tester's own

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    @property
    def environment(self) -> dict[str, str]:
        """In which PostgreSQL's client programs find the server."""
        path = f"{self.programs}:{os.environ['PATH']}"
        host = {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": USER, "PGPASSWORD": self.password}
        return os.environ | host | {"PATH": path}

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self) -> "Postgres":
        secret = self.root / "password"
        secret.write_text(self.password + "\n")
        if self.account:
            shutil.chown(self.root, self.account)
            shutil.chown(secret, self.account)
        data = self.root / "data"
        self._own(
            "initdb", "-D", str(data), "-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}", "-E", "UTF8", "-N"
        )
        settings = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c fsync=off -k {self.root}"
        self._own("pg_ctl", "-D", str(data), "-w", "-l", str(self.root / "log"), "-o", settings, "start")
        return self

    def stop(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self._own("pg_ctl", "-D", str(self.root / "data"), "-m", "immediate", "stop")

    def new_database(self, name: str) -> str:
        self.run("createdb", name)
        return self.url(name)

    def _own(self, program: str, *arguments: str) -> None:
        extra = {"user": self.account, "group": pwd.getpwnam(self.account).pw_gid} if self.account else {}
        extra |= {"extra_groups": []} if self.account else {}
        command = [str(self.programs / program), *arguments]
        with open(self.root / "programs.log", "a") as log:
            subprocess.run(command, cwd="/", stdout=log, stderr=log, check=True, timeout=60, **extra)


@contextlib.contextmanager
def running_postgres():
    """A server for the length of the block, and a second for its start."""
    programs = folder()
    assert programs is not None, "ask folder() first"
    account = None
    if os.getuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        account = "postgres" if "postgres" in names else "nobody"
    root = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own folders are closed to others
    password = f"pg-{os.urandom(8).hex()}"
    server = Postgres(programs, root, free_port(), password, account)
    try:
        yield server.start()
    finally:
        server.stop()
        shutil.rmtree(root, ignore_errors=True)
