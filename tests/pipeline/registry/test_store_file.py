"""An sqlite store in a folder of a group's: everybody of it may write, or is told in a line who has to let them."""

import contextlib
import os
import sqlite3
import stat

import pytest

from pipeline.errors import InputError
from pipeline.registry.store_file import require_writable_store, share_database, share_store


def rights(path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


@pytest.fixture
def group(tmp_path):
    """A folder as README has a group make it, for a person whose umask closes everything."""
    folder = tmp_path / "group"
    folder.mkdir()
    folder.chmod(0o2770)
    before = os.umask(0o077)
    yield folder
    os.umask(before)


def test_what_sqlite_writes_in_a_folder_of_a_group_is_the_groups(group):
    file = group / "mlflow.db"
    share_store(f"sqlite:///{file}")
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE t (a)")
        assert {path.name for path in group.iterdir()} == {"mlflow.db", "mlflow.db-wal", "mlflow.db-shm"}
        assert {rights(path) for path in group.iterdir()} == {"0o660"}


def test_a_store_that_was_made_before_is_mended_by_its_owner(group):
    for name in ("mlflow.db", "mlflow.db-wal"):
        (group / name).touch(0o640)
        (group / name).chmod(0o640)
    require_writable_store(f"sqlite:///{group / 'mlflow.db'}")
    assert {rights(path) for path in group.iterdir()} == {"0o660"}


def test_nothing_is_made_where_a_folder_is_one_persons_or_everybodys(tmp_path):
    tmp_path.chmod(0o700)
    share_database(tmp_path / "mlflow.db")
    tmp_path.chmod(0o1777)
    share_database(tmp_path / "mlflow.db")
    share_database(tmp_path / "none" / "mlflow.db")
    share_store("http://127.0.0.1:1")
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_somebody_else_is_refused_in_a_line_that_names_the_fix(group, monkeypatch):
    file = group / "mlflow.db"
    file.touch(0o600)
    monkeypatch.setattr("pipeline.registry.store_file.share_database", lambda file: None)  # it is not ours to mend
    monkeypatch.setattr("os.access", lambda path, mode: path != file)  # root may always
    with pytest.raises(InputError) as refused:
        require_writable_store(f"sqlite:///{file}")
    (line,) = refused.value.problems
    assert line.startswith(f"MLflow store {file}: ") and f"chmod g+rw {file}" in line
    require_writable_store(f"sqlite:///{group / 'none.db'}")
    require_writable_store("postgresql://db/x")
