"""One home for a group without a team's servers: two people write one MLflow store, and start the stack by turns."""

import shutil
import sqlite3
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.flows.people import GROUP, Person, two_people

pytestmark = pytest.mark.slow
SMALL = (
    "--set", "encoder.embed_dim=12", "--set", "encoder.depth=1", "--set", "encoder.drop_path_rate=0",
    "--set", "steps=1", "--set", "profile.ranks_per_node=1", "--set", "profile.loader_workers=0",
)  # fmt: skip


@dataclass
class Group:
    ada: Person
    bob: Person
    home: Path
    data: Path

    def train(self, who: Person, seed: int) -> str:
        """The name of a run that somebody trained."""
        before = set(self.home.glob("runs/pretrain_*"))
        command = ("vit", "pretrain", "pretrain_supervised_debug", "--data", str(self.data), "--set", f"seed={seed}")
        done = who.run(*command, *SMALL)
        assert "could not be written" not in done.stdout + done.stderr, done.stdout + done.stderr
        (run,) = set(self.home.glob("runs/pretrain_*")) - before
        return run.name

    def mirrored(self) -> set[tuple[str, str]]:
        """Name and status of each run that MLflow knows."""
        with sqlite3.connect(self.home / "mlflow.db") as database:
            return set(database.execute("SELECT name, status FROM runs"))


@pytest.fixture(scope="module")
def group(digits) -> Iterator[Group]:
    folder = Path(tempfile.mkdtemp(prefix="group-"))  # pytest's own folders are closed to others
    folder.chmod(0o755)
    with two_people(folder) as (ada, bob):
        if ada.user is None:
            pytest.skip("one user cannot be two; run as root")
        home, data = folder / "home", folder / "digits"
        home.mkdir()
        shutil.chown(home, ada.user, GROUP)
        home.chmod(0o2770)  # what README has a group do
        shutil.copytree(digits, data)
        subprocess.run(["chmod", "-R", "a+rX", str(data)], check=True)
        ada.environment = bob.environment = {"VIT_HOME": str(home)}
        try:
            yield Group(ada, bob, home, data)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def test_what_both_train_is_in_one_store_and_either_registers_it(group):
    first, second = group.train(group.ada, 1), group.train(group.bob, 2)
    store = group.home / "mlflow.db"
    assert (store.owner(), store.group(), stat.S_IMODE(store.stat().st_mode)) == ("vit-ada", GROUP, 0o660)
    assert {(first, "FINISHED"), (second, "FINISHED")} <= group.mirrored()
    group.bob.run("vit", "register", first, "--name", "digits")
    assert "models:/digits/1" in group.ada.run("vit", "models").stdout
    assert "Traceback" not in group.bob.run("vit", "reconcile").stderr


def test_a_store_that_is_anothers_alone_is_said_in_a_line_and_mended_by_its_owner(group):
    store = group.home / "mlflow.db"
    if not store.exists():
        group.train(group.ada, 1)
    store.chmod(0o640)  # as it was made before
    run = next(group.home.glob("runs/pretrain_*")).name
    refused = group.bob.run("vit", "register", run, "--name", "others", fails=True)
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 2 and line.startswith(f"MLflow store {store}: it is vit-ada's and not yours to write")
    (group.home / "runs" / run / "forwarded.json").unlink()
    said = group.bob.run("vit", "reconcile", fails=True)
    lines = [line for line in (said.stdout + said.stderr).splitlines() if "MLflow" in line]
    assert len(lines) == 1 and f"chmod g+rw {store}" in lines[0] and "Traceback" not in said.stdout + said.stderr
    group.ada.run("vit", "reconcile")
    assert stat.S_IMODE(store.stat().st_mode) == 0o660


def test_the_stack_that_one_person_ended_the_other_starts(group):
    for who in (group.ada, group.bob):
        try:
            assert "ready in" in who.run("vit", "up").stdout
            answering = [line.split()[3:5] for line in who.run("vit", "status").stdout.splitlines()]
            assert answering == [["True", "True"]] * 3
        finally:
            who.run("vit", "down")
    database = group.home / "prefect" / "prefect.db"
    assert (database.owner(), stat.S_IMODE(database.stat().st_mode)) == ("vit-ada", 0o660)
