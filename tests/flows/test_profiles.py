"""Profiles of this machine and of clusters: from a name and settings to where a run goes, and what is submitted."""

import json
import os

import pytest

from flows.command_line.commands import training_command
from flows.control.submission import request_of, stop_lead_seconds
from flows.profiles import load_profile
from flows.requests.training import training_run
from pipeline.errors import InputError
from pipeline.preparation.memory import available_bytes_per_rank
from pipeline.run_directory import RunDirectory, write_json
from tests.cluster.slurm_jobs import commands_that_say


def test_a_cluster_is_planned_without_a_look_at_the_machine_that_submits(monkeypatch):
    monkeypatch.setattr("cluster.profile.accelerators_here", lambda: pytest.fail("it was asked for its devices"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: pytest.fail("it was asked for its memory"))
    profile, placement = load_profile("slurm", ["nodes=2-4", "accelerators_per_node=8"])
    assert (placement.nodes, placement.nodes_range, placement.world_size) == (4, (2, 4), 32)
    assert not placement.here and available_bytes_per_rank(placement) is None
    assert load_profile("slurm", ["nodes=2"])[1].nodes_range is None


def test_what_a_clusters_accelerators_cannot_hold_is_refused_where_the_profile_says_how_much_they_have(home, digits):
    slurm_run(home, digits, "profile.accelerators_per_node=8", "encoder.name=vit_l16")  # nobody knows
    processors = slurm_run(home, digits, "profile.accelerators_per_node=0", "profile.ranks_per_node=8")
    assert "no accelerator on the nodes of this profile: computing in fp32" in processors.plan()["notes"]
    with pytest.raises(InputError, match=r"ranks need about .* of memory each, 460.8 MiB are free for each; "):
        settings = ["profile.accelerators_per_node=8", "encoder.name=vit_l16", "profile.accelerator_gib=0.5"]
        slurm_run(home, digits, *settings)
    assert available_bytes_per_rank(load_profile("slurm", ["accelerator_gib=80"])[1]) == int(0.9 * 80 * 2**30)


def test_what_yaml_takes_for_a_number_is_the_text_that_was_meant():
    settings = ["time=24:00:00", "umask=0007", "partition=123", "nodes=2", "memory=480G"]
    profile, _ = load_profile("slurm", settings)
    assert (profile.time, profile.umask, profile.partition, profile.nodes) == ("24:00:00", "0007", "123", 2)
    assert load_profile("slurm", ["time=90"])[0].time == "90"


def test_text_of_a_wrong_form_is_answered_with_what_is_meant():
    with pytest.raises(InputError) as wrong:
        load_profile("slurm", ["memory=lots of", "nodes=2-three"])
    assert wrong.value.problems == [
        '--set profile.nodes: not understood (got "2-three"); expected: Machines: a number, or a range such as `2-4`: '
        "begin with what is there; the global batch and the samples stay",
        '--set profile.memory: not understood (got "lots of"); expected: Memory per machine, such as `480G`',
    ]


@pytest.mark.parametrize(
    "setting",
    ["WANDB_KEY: " + "0a" * 20, "WANDB: " + "0a" * 20, "MY_AUTH: 'Token abc'"],
)
def test_a_secret_in_the_environment_of_a_job_is_refused_without_its_value(setting):
    name, _, value = setting.partition(": ")
    with pytest.raises(InputError, match=rf"env: {name}: a secret would stand in profile.yaml") as refused:
        load_profile("local", [f"env={{{setting}}}"])
    assert value.strip("'") not in str(refused.value)
    assert load_profile("local", ["env={GIT_COMMIT: " + "0a" * 20 + "}"])


def test_the_name_of_an_image_is_one_that_a_registry_may_have():
    for wrong in (
        "REGISTRY/vit:1",
        "vit pretraining",
        "bob:word@registry.example/vit",
        "vit:-",
        "x/Vit",
        "vit@sha256:12",
    ):
        with pytest.raises(InputError, match=r"profile.image: not understood .*in lower case"):
            load_profile("kubernetes", [f"image={wrong}"])
    for image in ("vit", "vit:0.1.0", "localhost/vit", "registry:5000/a/b_c:V1", "ghcr.io/me/vit@sha256:" + "12" * 32):
        assert load_profile("kubernetes", [f"image={image}"])[0].image == image


def test_a_profile_of_no_known_place_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("nodes: 2\n")
    with pytest.raises(InputError, match="mine.yaml: kind: missing; a profile says where it runs: `kind: local`"):
        load_profile(str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("kind: sge\n")
    with pytest.raises(InputError, match="mine.yaml: kind: `sge` is not a place that runs jobs; use local, slurm or"):
        load_profile(str(tmp_path / "mine.yaml"))


def slurm_run(home, digits, *settings: str, recipe: str = "pretrain_mae_vit_l16") -> RunDirectory:
    return training_run(
        "pretrain", recipe, data=str(digits), profile="slurm", overrides=settings, run_dir=None, home=home
    )


def test_every_number_of_nodes_of_a_range_must_be_able_to_share_the_batch(home, digits):
    assert slurm_run(home, digits, "profile.nodes=1-2").plan()["nodes_range"] == [1, 2]
    with pytest.raises(InputError, match="profile.nodes 2-4: global_batch_size 4096 does not divide over 3 nodes"):
        slurm_run(home, digits, "profile.nodes=2-4")
    rehearsal = training_run(
        "pretrain", "pretrain_mae_vit_l16", data=str(digits), profile="slurm", overrides=["profile.nodes=1-4",
        "global_batch_size=12288"], run_dir=None, home=home, rehearse="always",
    )  # fmt: skip
    assert rehearsal.plan()["batches"]["global_batch_size"] == 12 * 8  # its own fits all of them too


def test_the_time_to_stop_in_follows_from_the_plan_and_then_from_what_was_measured(home, digits):
    run = slurm_run(home, digits)
    assert stop_lead_seconds(run) == 120  # some seconds for a step, 4 GB at 0.5 GB/s
    run = slurm_run(home, digits, "profile.accelerators_per_node=0", "profile.ranks_per_node=1", "steps=9")
    assert stop_lead_seconds(run) == 3600  # a step of ViT-L on one processor takes longer than an hour
    attempt = run.attempt(1).make()
    attempt.log(0).write_text("12:00:00 saved step-00000100: training waited 0.40 s, complete in 150.0 s\n")
    line = {"step": 1, "perf/step_seconds": 20.0, "perf/between_steps_seconds": 1.0}
    attempt.ledger.write_text(json.dumps(line) + "\n" + json.dumps({"step": 2}) + "\n" + '{"step": 3, "perf/st')
    assert stop_lead_seconds(run) == 2 * (21 + 150)


def test_a_job_that_waits_keeps_the_plan_it_was_submitted_with(home, digits, tmp_path, monkeypatch):
    run = slurm_run(home, digits)
    write_json(run.job_file, {"kind": "slurm", "id": "7", "key": run.key, "attempt": 0})
    before = {path: path.read_bytes() for path in (run.profile_file, run.plan_file)}
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    commands_that_say(tmp_path, squeue="echo '7|PENDING|Priority|0:00||now|vit-a|run /a'")
    assert slurm_run(home, digits).path == run.path  # the same again is the same job
    with pytest.raises(InputError, match="its slurm job 7 is pending under another profile; stop it by `vit"):
        slurm_run(home, digits, "profile.memory=9G")
    assert before == {path: path.read_bytes() for path in before}
    commands_that_say(tmp_path, squeue="exit 0")  # it was cancelled before it began
    assert "memory: 9G" in slurm_run(home, digits, "profile.memory=9G").profile_file.read_text()
    run.attempt(1).make()  # and a field that came later, and says nothing, makes no other profile of it
    run.profile_file.write_text(run.profile_file.read_text().replace("accelerator_gib: null\n", ""))
    assert slurm_run(home, digits, "profile.memory=9G").path == run.path


def test_a_cluster_numbers_its_attempts_itself_and_this_machine_before(home, digits):
    request = request_of(slurm_run(home, digits, "profile.preflight=true", "profile.env={A: b}"))
    assert request.attempt == 0 and request.environment == {}
    assert [command[1:3] for command in (request.command, request.verdict_command, request.preflight_command)] == [
        ("-m", "pipeline.launch"), ("-m", "pipeline.verdict"), ("-m", "pipeline.node_check"),
    ]  # fmt: skip
    local = training_run(
        "pretrain", "pretrain_mae_debug", data=str(digits), profile="local", overrides=["profile.env={A: b}"],
        run_dir=None, home=home,
    )  # fmt: skip
    request = request_of(local)
    assert request.environment == {"A": "b", "VIT_ATTEMPT": "1"} and request.attempt == 1
    assert request.verdict_command == request.preflight_command == ()


def test_a_dry_run_shows_the_script_and_submits_nothing(home, digits, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    said: list[str] = []
    options = {"rehearse": None, "model": None, "watch": False, "say": said.append, "directory": str(home)}
    for profile, name in (("slurm", "job.sbatch"), ("local", "job.sh")):
        run = home / profile
        settings = ["profile.nodes=2"] if profile == "slurm" else []
        code = training_command(
            "pretrain", "pretrain_mae_debug", data=[str(digits)], profile=profile, overrides=[*settings, "steps=3",
            "global_batch_size=128"], dry_run=True, run_dir=str(run), **options,
        )  # fmt: skip
        script = (run / "submit" / name).read_text()
        assert code == 0 and "pipeline.launch" in script and any(script in line for line in said)
        assert not (run / "job.json").exists() and not (run / "attempts").exists()
    assert "#SBATCH --nodes=2" in (home / "slurm" / "submit" / "job.sbatch").read_text()


def test_variables_that_name_a_place_or_a_switch_are_no_secrets_and_those_that_hold_one_are_refused_by_name():
    settings = {
        "TOKENIZERS_PARALLELISM": "'false'", "GOOGLE_APPLICATION_CREDENTIALS": "/vit/key.json",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token", "HF_TOKEN_PATH": "/vit/token",
    }  # fmt: skip
    profile, _ = load_profile("kubernetes", [f"env.{name}={value}" for name, value in settings.items()])
    assert profile.env["TOKENIZERS_PARALLELISM"] == "false" and profile.env.keys() == settings.keys()
    for name, value in (("GH_PAT", "x1y2z3"), ("OPTS", "--password=hunter2hunter2")):
        with pytest.raises(InputError, match=f"env: {name}: a secret would stand in profile.yaml") as refused:
            load_profile("kubernetes", [f"env.{name}={value}"])
        assert value not in str(refused.value)
