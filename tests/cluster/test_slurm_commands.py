"""What is made of the answers of SLURM's commands, and of silence; stand-ins on PATH."""

import os

import pytest

from cluster.slurm import commands
from cluster.slurm.commands import NoAnswer, queue
from tests.cluster.slurm_jobs import commands_that_say


def test_what_has_just_not_answered_is_not_asked_again_for_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "_silences", {})
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    commands_that_say(tmp_path, squeue="echo squeue: error: Unable to contact slurm controller >&2; exit 1")
    for name in ("first", "second", "third"):
        with pytest.raises(NoAnswer, match="Unable to contact slurm controller"):
            queue(names=[name])
    assert (tmp_path / "asked").read_text().split() == ["squeue"]
    monkeypatch.setattr(commands, "SILENT_SECONDS", 0.0)
    commands_that_say(tmp_path, squeue="echo '7|RUNNING|None|0:01|n1|now|vit-a|run /a'")
    assert [record.id for record in queue(names=["vit-a"])] == ["7"]
