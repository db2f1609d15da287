"""The small parts of the local stack: the person's Prefect profiles, and how processes are ended."""

import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest

from flows.home import home_directory, read_stack, tracking_uri, write_stack
from flows.services import processes as services_processes
from flows.services.processes import MARK, PART, end_processes, jobs_and_below, last_lines, stack_processes
from flows.services.profile import activate_profile, remember_profile, restore_profile, with_profile
from flows.services.stack import status, up
from pipeline.errors import InputError

OURS = "http://127.0.0.1:4711/api"
THEIRS = """# my servers
active = "team"

[profiles.team]
PREFECT_API_URL = "https://prefect.example.org/api"  # ask Ada for the key
PREFECT_API_KEY = "secret"
"""
IGNORES_SIGTERM = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
)


def nobody(url):
    return False


@pytest.fixture
def profiles_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_PROFILES_PATH", raising=False)
    return tmp_path / "profiles.toml"


def marked(home, code, part="worker", **options):
    """A process like those that `vit up` starts, once it has said that it is ready."""
    environment = os.environ | {MARK: str(home), PART: part}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, **options)
    process.stdout.readline()
    return process


# ---- home


def test_the_home_is_the_option_else_the_environment_else_in_the_persons_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_HOME", str(tmp_path / "named"))
    assert home_directory(str(tmp_path)) == tmp_path
    assert home_directory() == tmp_path / "named"
    monkeypatch.delenv("VIT_HOME")
    assert home_directory() == Path.home().resolve() / ".vit"
    monkeypatch.chdir(tmp_path)
    assert home_directory("here") == tmp_path / "here"


def test_a_teams_tracking_store_is_used_and_the_home_has_one_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://team:5000")
    assert tracking_uri(tmp_path) == "http://team:5000"


def test_a_record_that_is_missing_or_damaged_reads_as_none(tmp_path):
    assert read_stack(tmp_path) is None and status(tmp_path) == []
    write_stack(tmp_path, {"data": "x"})
    assert read_stack(tmp_path) == {"data": "x"}
    (tmp_path / "stack.json").write_text("{")
    assert read_stack(tmp_path) is None


# ---- logs


def test_the_last_lines_of_a_log_become_one_line(tmp_path):
    (tmp_path / "log").write_text("a\nb\n\n  c\nd\n\n")
    assert last_lines(tmp_path / "log") == "b | c | d"
    assert last_lines(tmp_path / "none") == ""


# ---- the Prefect profile


@pytest.mark.parametrize("before", ["", THEIRS, THEIRS.rstrip("\n"), '[profiles.a]\nX = "1"\n', "# only a comment\n"])
def test_the_profile_comes_and_goes_without_a_trace(profiles_file, before):
    profiles_file.write_text(before)
    previous = remember_profile()
    activate_profile(previous, OURS)
    now = tomllib.loads(profiles_file.read_text())
    assert now["active"] == "vit" and now["profiles"]["vit"] == {"PREFECT_API_URL": OURS}
    restore_profile(previous, OURS, nobody)
    after = profiles_file.read_text() if profiles_file.exists() else ""
    assert tomllib.loads(after) == tomllib.loads(before)
    assert [line for line in before.splitlines() if "#" in line] == [line for line in after.splitlines() if "#" in line]


def test_a_new_profiles_file_is_private_and_goes_away_again(profiles_file):
    previous = remember_profile()
    activate_profile(previous, OURS)
    assert profiles_file.stat().st_mode & 0o777 == 0o600
    restore_profile(previous, OURS, nobody)
    assert list(profiles_file.parent.iterdir()) == []


def test_a_profile_that_the_person_chose_meanwhile_stays_active(profiles_file):
    profiles_file.write_text(THEIRS)
    previous = remember_profile()
    activate_profile(previous, OURS)
    profiles_file.write_text(profiles_file.read_text().replace('active = "vit"', 'active = "local"'))
    restore_profile(previous, OURS, nobody)
    now = tomllib.loads(profiles_file.read_text())
    assert now["active"] == "local" and "vit" not in now["profiles"]


def test_two_stacks_give_the_profile_back_in_any_order(profiles_file):
    profiles_file.write_text(THEIRS)
    first = remember_profile()
    activate_profile(first, OURS)
    second = remember_profile()
    activate_profile(second, "http://127.0.0.1:4712/api")
    with_two = profiles_file.read_text()

    restore_profile(second, "http://127.0.0.1:4712/api", lambda url: url == OURS)
    assert tomllib.loads(profiles_file.read_text())["profiles"]["vit"] == {"PREFECT_API_URL": OURS}
    restore_profile(first, OURS, nobody)
    assert profiles_file.read_text() == THEIRS

    profiles_file.write_text(with_two)
    restore_profile(first, OURS, nobody)  # `vit` is the second's now
    assert profiles_file.read_text() == with_two
    restore_profile(second, "http://127.0.0.1:4712/api", nobody)  # the first is gone
    assert "vit" not in profiles_file.read_text()


def test_a_profile_vit_of_the_persons_own_is_refused(profiles_file):
    profiles_file.write_text('[profiles.vit]\nPREFECT_API_KEY = "mine"\n')
    with pytest.raises(InputError, match="rename it"):
        remember_profile()


@pytest.mark.parametrize("text", ['profiles.vit = {X = "1"}\n', 'profiles = {a = {X = "1"}}\n', "active = "])
def test_a_profiles_file_that_cannot_be_edited_safely_is_refused(profiles_file, text):
    with pytest.raises(InputError, match="profiles.toml"):
        with_profile(text, {"PREFECT_API_URL": OURS}, active="vit")


# ---- processes


def test_only_processes_with_the_mark_of_this_home_belong_to_its_stack(tmp_path):
    with marked(tmp_path, IGNORES_SIGTERM) as ours, marked(tmp_path / "other", IGNORES_SIGTERM) as other:
        try:
            assert {each.pid: part for each, part in stack_processes(tmp_path).items()} == {ours.pid: "worker"}
        finally:
            ours.kill()
            other.kill()


def test_what_ignores_sigterm_is_killed_with_its_children_in_their_own_sessions(tmp_path, monkeypatch):
    monkeypatch.setattr(services_processes, "GRACE_SECONDS", 0.5)
    child = f"subprocess.Popen([sys.executable, '-c', {IGNORES_SIGTERM!r}], env={{}}, start_new_session=True)"
    with marked(tmp_path, f"import subprocess, sys; {child}; {IGNORES_SIGTERM}", start_new_session=True) as parent:
        deadline = time.monotonic() + 20
        while len(stack_processes(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        family = list(stack_processes(tmp_path))
        assert len(family) == 2
        assert end_processes(lambda: stack_processes(tmp_path)) == 2
        assert parent.wait() == -9
    assert all(not each.is_running() or each.status() == psutil.STATUS_ZOMBIE for each in family)


def test_a_job_is_asked_to_stop_and_its_ranks_are_left_to_it(tmp_path):
    rank = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True)); time.sleep(60)"
    stops_in_order = (
        "import signal, subprocess, sys, time\n"
        f"rank = subprocess.Popen([sys.executable, '-c', {rank!r}], stdout=subprocess.PIPE)\n"
        "def stop(*_):\n"
        "    time.sleep(0.5); rank.kill(); sys.exit(75 if rank.stdout.read() == b'' else 1)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "time.sleep(1); print(1, flush=True); time.sleep(60)"
    )
    environment = os.environ | {MARK: str(tmp_path), PART: "worker"}
    command = [sys.executable, "-c", stops_in_order, "pipeline.launch"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as job:
        job.stdout.readline()
        assert sorted(jobs_and_below(set(stack_processes(tmp_path))).values()) == [False, True]
        end_processes(lambda: stack_processes(tmp_path))
        assert job.wait() == 75


def test_data_that_is_no_dataset_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(InputError, match="no dataset"):
        up(tmp_path / "home", str(tmp_path))
    assert not (tmp_path / "home").exists()


def test_a_record_whose_process_numbers_now_belong_to_others_is_dead(tmp_path):
    with marked(tmp_path, IGNORES_SIGTERM) as again:  # same home, same number, but started later than the record says
        pids = {"prefect": os.getpid(), "mlflow": 2**22 + 1, "worker": again.pid}
        urls = {"prefect_api_url": "http://127.0.0.1:9/api", "prefect_ui_url": "", "mlflow_url": "http://127.0.0.1:9"}
        write_stack(tmp_path, urls | {"pids": pids, "started": dict.fromkeys(pids, 1.0e9), "worker": "vit"})
        rows = status(tmp_path)
        again.kill()
    assert [row["alive"] for row in rows] == [False, False, False]
    assert [row["answering"] for row in rows] == [False, False, False]
