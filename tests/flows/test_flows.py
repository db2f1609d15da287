"""The flows on a real Prefect server: the command line's errors, a rehearsal, states that say what happened."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.command_line.commands import plan_command
from flows.control.jobs import rehearsal_message
from flows.requests.training import recipe_of, training_run
from pipeline.config.ingest import IngestConfig
from pipeline.config.recipe import read_yaml
from pipeline.errors import InputError
from pipeline.ingestion.build import ingest
from pipeline.run_directory import RunDirectory, write_json

ROOT = Path(__file__).parents[2]


def test_every_deployment_gives_parameters_that_its_flow_has():
    from importlib import import_module

    for deployment in yaml.safe_load((ROOT / "flows/prefect.yaml").read_text())["deployments"]:
        module, _, name = deployment["entrypoint"].rpartition(".")
        flow = getattr(import_module(module), name)
        assert set(deployment.get("parameters") or {}) <= set(inspect.signature(flow.fn).parameters)
        if name == "pretrain":
            recipe_of(deployment["parameters"]["encoder"], "mae")
            recipe_of(deployment["parameters"]["encoder"], "supervised")


def test_the_form_of_every_deployment_describes_every_parameter_and_gives_its_default():
    from importlib import import_module

    from prefect.utilities.callables import parameter_schema

    for deployment in yaml.safe_load((ROOT / "flows/prefect.yaml").read_text())["deployments"]:
        module, _, name = deployment["entrypoint"].rpartition(".")
        schema = parameter_schema(getattr(import_module(module), name)).model_dump()
        for parameter, shown in schema["properties"].items():
            assert shown.get("description"), f"{deployment['entrypoint']}: {parameter} has no words"
            assert "default" in shown or parameter in schema["required"], f"{deployment['entrypoint']}: {parameter}"


def test_an_objective_without_a_recipe_gets_the_near_ones():
    with pytest.raises(InputError, match="did you mean `pretrain_mae_vit_l16`"):
        recipe_of("vit_l16", "mea")


def prepared(home, digits, *overrides, recipe="pretrain_mae_debug", **options):
    choice = {"data": str(digits), "profile": "local", "run_dir": None, "home": home} | options
    return training_run("pretrain", recipe, overrides=list(overrides), **choice)


def test_the_same_request_is_the_same_run_and_another_config_in_its_place_is_refused(home, digits):
    run = prepared(home, digits)
    assert prepared(home, digits).path == run.path
    assert prepared(home, digits, "seed=1").path != run.path
    prepared(home, digits, "seed=2", run_dir=str(run.path))  # nothing of it has begun: tried again by a dry run
    assert yaml.safe_load(run.config_file.read_text())["seed"] == 2
    run.attempt(1).make()
    with pytest.raises(InputError, match="holds another run; go on with it by `vit resume"):
        prepared(home, digits, "seed=1", run_dir=str(run.path))


def test_a_run_whose_dataset_was_moved_goes_on_where_it_lies_now(home, digits, tmp_path):
    run = prepared(home, digits)
    run.attempt(1).make()
    moved = shutil.copytree(digits, tmp_path / "moved")
    assert prepared(home, moved, run_dir=str(run.path)).path == run.path
    assert yaml.safe_load(run.config_file.read_text())["data"]["sources"][0]["path"] == str(moved)
    assert run.plan()["data"]["path"] == str(moved)
    with pytest.raises(InputError, match="holds another run"):
        prepared(home, moved, "seed=1", run_dir=str(run.path))
    plan = run.plan()
    plan["data"]["shards_sha256"] = "others"
    write_json(run.plan_file, plan)
    with pytest.raises(InputError, match="in other shards; restore"):
        prepared(home, digits, run_dir=str(run.path))


def test_a_dataset_whose_pixels_nobody_looked_at_asks_for_their_statistics_in_a_line(home, tmp_path):
    ingest("sklearn:digits", tmp_path / "digits", IngestConfig(examine="header"))
    with pytest.raises(InputError, match="data.mean: .*: ingested with examine=header, so there are no statistics"):
        prepared(home, tmp_path / "digits")
    given = prepared(home, tmp_path / "digits", "data.mean=[0.3,0.3,0.3]", "data.std=[0.4,0.4,0.4]")
    assert yaml.safe_load(given.config_file.read_text())["data"]["mean"] == [0.3, 0.3, 0.3]


def test_a_length_set_by_hand_shortens_the_warm_up_and_says_so(home, digits):
    plan = prepared(home, digits, "steps=10", recipe="pretrain_mae_vit_s16").plan()
    assert plan["steps"]["warmup_samples"] == 4096 and not plan.get("rehearsal")
    assert any("warm-up shortened" in note for note in plan["notes"])


def test_a_kind_set_by_hand_says_what_it_left_out(home, digits):
    run = prepared(home, digits, "steps=10", "optimizer.kind=sgd", recipe="pretrain_mae_vit_s16")
    assert any("--set optimizer.kind=sgd: left out" in note for note in run.plan()["notes"])


def test_a_rehearsal_is_not_held_to_ramps_and_traces_of_the_full_run(home, digits):
    settings = ["optimizer.warmup=30", "profiling.steps=[100, 102]"]
    assert prepared(home, digits, *settings, recipe="pretrain_mae_vit_s16", rehearse="always").plan()["rehearsal"]


def test_a_run_of_years_on_a_processor_is_rehearsed_and_one_of_minutes_is_not(home, digits, monkeypatch):
    monkeypatch.setattr("cluster.profile.accelerators_here", lambda: 0)
    assert prepared(home, digits, recipe="pretrain_mae_vit_s16").plan()["rehearsal"]
    assert not prepared(home, digits).plan().get("rehearsal")
    monkeypatch.setattr("cluster.profile.accelerators_here", lambda: 8)
    assert not prepared(home, digits, recipe="pretrain_mae_vit_s16").plan().get("rehearsal")


def test_too_little_memory_is_said_with_the_nearest_encoder_that_fits(home, digits, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=6 * 2**30))
    with pytest.raises(InputError, match="GiB are free for each; the nearest that fits is encoder.name=vit_"):
        prepared(home, None, recipe="pretrain_supervised_vit_l16", data=None)
    assert not list((home / "runs").glob("*")) if (home / "runs").exists() else True


def test_supervised_pretraining_without_labels_names_the_option(home, tmp_path):
    from PIL import Image

    from pipeline.config.ingest import IngestConfig
    from pipeline.ingestion.build import ingest

    for i in range(20):
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
    ingest(str(tmp_path / "images"), tmp_path / "flat", IngestConfig())
    with pytest.raises(InputError, match="objective=mae"):
        prepared(home, tmp_path / "flat", recipe="pretrain_supervised_debug")


def resume(home, run, *overrides: str) -> None:
    from flows.command_line.runs import resume_command

    resume_command(str(run.path), list(overrides), str(home), lambda *_, **__: None)


def test_a_refused_resume_changes_nothing(home, digits):
    run = prepared(home, digits)
    files = {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    for override in (
        "profile.ranks_per_node=3",
        "seed=1",
        "validation.best=accuracy",
        "micro_batch_size=7",
        "zero.stage=9",
        "epochs=3",
    ):
        with pytest.raises(InputError):
            resume(home, run, override)
    assert {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == files


def test_a_resume_changes_config_plan_profile_and_the_deepspeed_file_together(home, digits):
    from flows.profiles import changed_profile
    from pipeline.preparation.resume import change_run

    run = prepared(home, digits)
    text, placement = changed_profile(run.profile_file, ["ranks_per_node=1"])
    change_run(run, ["zero.stage=3"], text, placement)
    assert json.loads((run.path / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 3
    assert (
        run.plan()["batches"]["gradient_accumulation_steps"] == 2
        and "ranks_per_node: 1" in run.profile_file.read_text()
    )
    change_run(run, ["zero.stage=0"], text, placement)
    assert not (run.path / "deepspeed.json").exists()
    assert prepared(home, digits, "profile.ranks_per_node=1", run_dir=str(run.path)).path == run.path  # still its own


def test_only_a_run_at_a_constant_rate_is_made_longer(home, digits):
    from flows.profiles import changed_profile
    from pipeline.preparation.resume import change_run

    falling, constant = prepared(home, digits), prepared(home, digits, "optimizer.schedule=constant")
    text, placement = changed_profile(constant.profile_file, [])
    with pytest.raises(InputError, match="`cosine` falls to its end over the length it began with"):
        change_run(falling, ["steps=30"], text, placement)
    with pytest.raises(InputError, match="--set epochs: the length of this run was given in steps"):
        change_run(constant, ["epochs=3"], text, placement)
    with pytest.raises(InputError, match="--set steps: 10 steps, and this run was planned for 20"):
        change_run(constant, ["steps=10"], text, placement)
    constant.result_file.write_text("{}")
    change_run(constant, ["steps=30", "optimizer.cooldown=5"], text, placement)
    assert constant.plan()["steps"] == {
        "samples": 480, "steps": 30, "warmup_samples": 32, "cooldown_samples": 80
    }  # fmt: skip
    assert not constant.result_file.exists()


def test_a_run_that_has_ended_is_left_as_it_is_by_changes_that_make_it_no_longer(home, digits):
    run = prepared(home, digits)
    run.result_file.write_text("{}")
    files = {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    resume(home, run, "zero.stage=2", "profile.ranks_per_node=1")
    assert {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == files


def test_a_change_that_cannot_be_written_or_names_the_mirror_of_another_run_changes_nothing(
    home, digits, tmp_path, monkeypatch
):
    from pipeline.preparation.preflight import require_ready

    mirror = f"checkpoint.mirror=file://{tmp_path / 'mirror'}"
    require_ready(prepared(home, digits, mirror, run_dir=str(tmp_path / "one" / "run")), accelerators=0)
    run = prepared(home, digits, "seed=2", run_dir=str(tmp_path / "other" / "run"))
    files = {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with pytest.raises(
        InputError, match=r"checkpoint.mirror: file://.* belongs to another run than .*\(its seed differs"
    ):
        resume(home, run, mirror)

    def refuses(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pipeline.preparation.preflight.tempfile.TemporaryFile", refuses)
    with pytest.raises(InputError, match="the run directory cannot be written: Read-only file system"):
        resume(home, run, "zero.stage=2")
    assert {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == files


def test_a_run_that_has_begun_to_cool_down_goes_on_from_before(home, digits, caplog):
    from flows.profiles import changed_profile
    from pipeline.preparation.resume import change_run

    run = prepared(home, digits, "optimizer.schedule=constant", "optimizer.cooldown=5")  # of 20 steps
    text, placement = changed_profile(run.profile_file, [])
    for step in (16, 20):
        committed(run, step)
    with pytest.raises(InputError, match="begins to fall after step 15, and the oldest checkpoint is of step 16"):
        change_run(run, ["steps=40"], text, placement)
    for step in (12, 15):
        committed(run, step)
    change_run(run, ["checkpoint.keep=3"], text, placement)
    assert run.newest_checkpoint().step == 20 and run.plan()["steps"]["steps"] == 20
    change_run(run, ["steps=40"], text, placement)
    assert [one.step for one in run.committed_checkpoints()] == [15, 12] and run.plan()["steps"]["steps"] == 40
    assert "made longer from step 15" in caplog.text
    assert {path.name for path in run.checkpoints.glob("*.cooled")} == {"step-00000016.cooled", "step-00000020.cooled"}
    change_run(run, ["optimizer.cooldown=27"], text, placement)  # falls after step 13
    assert run.newest_checkpoint().step == 12
    with pytest.raises(InputError, match=r"profiling.steps \[3, 5\]: the run goes on from step 12 and ends at step 40"):
        change_run(run, ["profiling.steps=[3, 5]"], text, placement)
    change_run(run, ["steps=50", "profiling.steps=[45, 46]"], text, placement)


def committed(run: RunDirectory, step: int) -> None:
    directory = run.checkpoints / f"step-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text(json.dumps({"step": step, "files": {}}))


def test_another_profile_before_the_first_start_is_taken_and_after_it_refused(home, digits):
    run = prepared(home, digits)
    assert prepared(home, digits, "profile.ranks_per_node=1").plan()["world_size"] == 1
    run.attempt(1).make()
    with pytest.raises(InputError, match="began under another profile"):
        prepared(home, digits, "profile.ranks_per_node=2")


def test_a_run_outside_the_home_is_known_in_it(home, digits, tmp_path):
    run = prepared(home, digits, run_dir=str(tmp_path / "elsewhere"))
    assert [path.resolve() for path in (home / "runs").iterdir()] == [run.path]


def test_a_model_is_named_once(home, digits):
    with pytest.raises(InputError, match="the model is already named"):
        training_run(
            "finetune", "finetune_vit", data=str(digits), profile="local", overrides=["initialise_from=timm:x"],
            run_dir=None, home=home, model="timm:vit_base_patch16_224",
        )  # fmt: skip
    with pytest.raises(InputError, match="does not exist"):
        prepared(home, digits, "initialise_from=nowhere")


def test_a_mask_that_hides_nothing_is_refused(home, digits):
    with pytest.raises(InputError, match="hides none of 16 patches"):
        prepared(home, digits, "objective.mask_ratio=0.001")


def test_a_run_directory_that_cannot_be_written_is_one_line(home, digits):
    with pytest.raises(InputError, match="cannot be written"):
        prepared(home, digits, run_dir="/proc/nowhere/run")
    home.mkdir()
    (home / "file").write_text("a letter")
    with pytest.raises(InputError, match="file: is a file; name a new or an empty directory by --run-dir"):
        prepared(home, digits, run_dir=str(home / "file"))


FLOWS = """
import sys
from pathlib import Path
from flows.services.temporary_server import prefect_server
home, data = Path(sys.argv[1]), sys.argv[2]
with prefect_server(home):
    from flows.pretrain import pretrain
    from flows.register import register
    from flows.sweep import sweep
    refused = pretrain(encoder="vit_l16", objective="mae", data=str(home / "nowhere"), return_state=True)
    assert refused.is_failed() and "no such dataset" in refused.message, refused
    rehearsed = pretrain(encoder="debug", objective="mae", return_state=True)
    assert rehearsed.is_completed() and "rehearsal ok: stopped and resumed" in rehearsed.message, rehearsed
    path = rehearsed.result()
    denied = register(path, "x", return_state=True)
    assert denied.is_failed() and "is a rehearsal" in denied.message, denied
    short = {"set": ["steps=3"], "learning_rate": 0.01}
    trained = pretrain(encoder="debug", objective="supervised", data=data, **short, return_state=True)
    assert trained.is_completed(), trained
    values = ["optimizer.learning_rate=[1e-3,3e-4]", "steps=2", "profile.ranks_per_node=1"]
    swept = sweep("pretrain_mae_debug", set=values, data=data, return_state=True)
    assert swept.is_completed() and swept.message.endswith("2 of 2 runs done"), swept
    print(path, trained.result())
"""


def test_a_rehearsal_says_in_words_what_the_full_run_costs():
    said = rehearsal_message({
        "images_per_second": 0.0123, "peak_memory_bytes_per_rank": 3 * 2**30, "planned_memory_bytes_per_rank": 2**29,
        "full_run_samples": 1_281_167, "full_run_steps": 313, "full_run_on": "this dataset",
        "full_run_hours": 28_933.3, "full_run_device_hours": 57_866.6,
    })  # fmt: skip
    assert said == (
        "rehearsal ok: stopped and resumed, 0.0123 images/s, 3.00 GiB per process (planned 512.0 MiB); the full run of "
        "1,281,167 images (313 steps, on this dataset) would take 3 y 109 d here, 57,867 device-hours"
    )


@pytest.mark.slow
def test_flows_refuse_rehearse_and_train_on_a_real_server(home, digits):
    environment = os.environ | {"VIT_HOME": str(home), "PREFECT_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", FLOWS, str(home), str(digits)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    rehearsal, trained = (RunDirectory(path) for path in done.stdout.split()[-2:])
    result = json.loads(rehearsal.result_file.read_text())
    assert result["rehearsal"] is True and result["attempts"] == 2 and result["full_run_hours"] >= 0
    assert RunDirectory(trained.path).plan()["steps"]["steps"] == 3


def test_a_plan_says_in_words_whether_the_run_would_be_input_bound(home, digits):
    lines: list[str] = []
    settings = ["profile.loader_workers=1"]
    code = plan_command("pretrain_mae_debug", [str(digits)], "local", settings, str(home), lines.append)
    (said,) = [line for line in lines if line.startswith("data ")]
    assert code == 0
    assert re.search(r"the loader gives [\d,.]+ images/s here with 1 worker per rank, the model can take roughly", said)
    assert ": not input-bound" in said or ": input-bound; raise profile.loader_workers" in said


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (["A=0", "B=1"], "--data .*=0: the weight 0 is not above 0"),
        (["A=2", "B"], "--data .*: it has no weight and others do; write --data .*=WEIGHT"),
        (["A=1,5"], "--data .*=1,5: the weight `1,5` is not a number"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_is_refused(home, digits, data, words):
    with pytest.raises(InputError, match=words):
        prepared(home, digits, data=[re.sub("^[AB]", str(digits), one) for one in data])


def test_weights_of_a_mixture_are_by_size_where_none_is_given(home, digits):
    run = prepared(home, digits, data=[str(digits), str(digits)])
    weights = [source["weight"] for source in read_yaml(run.config_file)["data"]["sources"]]
    assert weights == [1442.0, 1442.0] and run.plan()["samples_per_epoch"] == 2884
    assert prepared(home, digits, data=f"{digits}=5").plan()["data"].get("sources") is None


def test_sources_are_named_by_data_alone(home, digits):
    with pytest.raises(InputError, match="--set data.sources: filled in by --data; say --data PATH"):
        prepared(home, digits, "data.sources=[{path: /nowhere}]")
    with pytest.raises(InputError, match=r"data.skipped: expected ranges of positions, \[\[from, to\], ...\]"):
        prepared(home, digits, "data.skipped=5")
