"""The difference from a commit is kept so that it can be applied again, and holds the project's own code alone."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from pipeline.preparation import code_state as module
from pipeline.preparation.code_state import code_state


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "clone"
    (folder / "models").mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "models" / "a.py").write_text("one\n")
    (folder / "models" / "b.bin").write_bytes(bytes(range(256)))
    (folder / "notes.txt").write_text("mine\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "one")
    git(folder, "config", "diff.noprefix", "true")  # a person's own taste
    git(folder, "config", "color.diff", "always")
    return folder


def test_a_clean_clone_has_a_commit_and_no_difference(clone):
    (clone / "notes.txt").write_text("changed, and no code\n")
    state, difference = code_state(clone)
    assert state["commit"] == git(clone, "rev-parse", "HEAD").strip() and not state["dirty"] and difference is None


def test_the_difference_can_be_applied_to_the_commit_and_gives_the_same_files(clone, tmp_path):
    (clone / "models" / "a.py").write_text("two\n\n")
    (clone / "models" / "b.bin").write_bytes(bytes(reversed(range(256))))
    (clone / "models" / "new.py").write_text("new\n")
    (clone / ".env").write_text("TOKEN=secret\n")
    (clone / "notes.txt").write_text("secret\n")
    state, difference = code_state(clone)
    assert state["dirty"] and state["diff_sha256"] == hashlib.sha256(difference).hexdigest()
    assert state["untracked"] == ["models/new.py"] and b"secret" not in difference
    other = tmp_path / "other"
    subprocess.run(["git", "clone", "-q", str(clone), str(other)], check=True)
    (tmp_path / "code.diff").write_bytes(difference)
    git(other, "apply", str(tmp_path / "code.diff"))
    for name in ("a.py", "b.bin"):
        assert (other / "models" / name).read_bytes() == (clone / "models" / name).read_bytes()


def test_a_difference_that_is_too_large_is_named_by_its_hash_alone(clone, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    (clone / "models" / "a.py").write_text("two\n")
    state, difference = code_state(clone)
    assert difference is None and state["diff_sha256"] and state["diff_bytes"] > 10


def test_without_a_repository_there_is_a_version(tmp_path):
    state, difference = code_state(tmp_path)
    assert list(state) == ["version"] and difference is None
