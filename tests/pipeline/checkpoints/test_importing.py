"""What DeepSpeed and accelerate wrote becomes a checkpoint of ours, with its moments, and a run goes on from it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoints.files import StoredFragments, read_weights
from pipeline.checkpoints.importing import import_state
from pipeline.checkpoints.reading import read_parts
from pipeline.config.stages import read_run_config
from pipeline.errors import EXIT_DONE, EXIT_INPUT, InputError
from pipeline.run_directory import RunDirectory
from pipeline.training.loop import initial_module
from tests.pipeline.training.runs import new_run, train_until
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow


def trained_by_deepspeed(run_path: str, folder: str, stage: int, through_accelerate: bool) -> dict:
    """Three steps of the run's network by DeepSpeed alone or through accelerate; its weights and first moments."""
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from models.objectives.batch import Batch
    from pipeline.config.stages import read_run_config
    from pipeline.training.loop import initial_module

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    run = RunDirectory(run_path)
    config = read_run_config(run.path)
    module = initial_module(config, run.plan())
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    dictionary = {
        "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    if through_accelerate:
        plugin = DeepSpeedPlugin(hf_ds_config=dictionary, zero3_init_flag=False)
        group = InitProcessGroupKwargs(backend="gloo")
        accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[group])
        engine, _ = accelerator.prepare(module, optimizer)
    else:
        deepspeed.init_distributed("gloo")
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dictionary)
    size = config.encoder.input_size
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        batch = Batch(torch.randn(2, 3, *size, generator=generator), None, torch.arange(2))
        engine.backward(engine(batch).loss)
        engine.step()
    accelerator.save_state(folder) if through_accelerate else engine.save_checkpoint(folder)
    return {
        name: (safe_get_full_fp32_param(p).numpy(), safe_get_full_optimizer_state(p, "exp_avg").numpy())
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def imported(source: Path, run: RunDirectory) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pipeline.import_checkpoint", str(source), str(run.path)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("stage", "through_accelerate"), [(2, True), (3, False)])
def test_a_state_of_deepspeeds_is_taken_over_to_the_last_bit(stage, through_accelerate, pictures, tmp_path):
    run, source = new_run(tmp_path, str(pictures), "steps=5"), tmp_path / "theirs"
    theirs = run_on_ranks(trained_by_deepspeed, 2, str(run.path), str(source), stage, through_accelerate)[0]
    process = imported(source, run)
    assert process.returncode == EXIT_DONE, process.stderr
    checkpoint = run.newest_checkpoint()
    assert checkpoint.step == 3
    weights, stored = read_weights(checkpoint), StoredFragments(checkpoint)
    for name, (weight, moment) in theirs.items():
        assert np.array_equal(weights[name], weight), name
        ours = torch.empty(moment.size)
        read_parts(stored.parts(name, "exp_avg", 0, ours))
        assert np.array_equal(ours, moment.ravel()), name
    assert run_on_ranks(train_until, 2, str(run.path), 1, 9) == ["done"] * 2


def timm_vit(config, num_classes: int):
    """The run's encoder as a person makes it, without a line of ours."""
    import timm

    encoder = config.encoder
    return timm.create_model(
        "vit_base_patch16_224", img_size=encoder.image_size, patch_size=encoder.patch_size, depth=encoder.depth,
        embed_dim=encoder.embed_dim, num_heads=encoder.num_heads, num_classes=num_classes,
    )  # fmt: skip


def steps_of(config, model, num_classes: int):
    """Losses of three steps of plain supervised training."""
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(2, 3, *config.encoder.input_size, generator=generator)
        labels = torch.randint(num_classes, (2,), generator=generator)
        yield torch.nn.functional.cross_entropy(model(images), labels)


def timm_trained_by_deepspeed(run_path: str, folder: str) -> dict:
    """Three steps of timm's own model by DeepSpeed's ZeRO-1; its weights and first moments."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from pipeline.config.stages import read_run_config

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    run = RunDirectory(run_path)
    config, num_classes = read_run_config(run.path), run.plan()["num_classes"]
    model = timm_vit(config, num_classes)
    dictionary = {
        "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=dictionary)
    for loss in steps_of(config, engine, num_classes):
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(folder)
    return {
        name: (safe_get_full_fp32_param(p).numpy(), safe_get_full_optimizer_state(p, "exp_avg").numpy())
        for name, p in model.named_parameters()
    }


GROUPS = ("one", "decay", "named", "alike")  # how the parameters are given to the optimizer


def timm_trained_by_accelerate(run_path: str, folder: str) -> dict:
    """Three steps of timm's own model by accelerate without DeepSpeed; its weights and first moments by GROUPS."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs
    from timm.optim import param_groups_weight_decay

    from pipeline.config.stages import read_run_config

    run, trained = RunDirectory(run_path), {}
    config, num_classes = read_run_config(run.path), run.plan()["num_classes"]
    for groups in GROUPS:
        model = timm_vit(config, num_classes)
        of_biases = [[p for name, p in model.named_parameters() if name.endswith("bias") is it] for it in (True, False)]
        parameters = {
            "one": model.parameters(),
            "decay": param_groups_weight_decay(model, 0.1),  # timm's: first those that do not decay
            "named": model.named_parameters(),
            "alike": [{"params": group} for group in of_biases],
        }[groups]
        accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
        optimizer = torch.optim.AdamW(parameters)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        for loss in steps_of(config, wrapped, num_classes):
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.save_state(f"{folder}/{groups}", safe_serialization=groups != "decay")
        state = optimizer.optimizer.state
        trained[groups] = {n: (p.detach().numpy(), state[p]["exp_avg"].numpy()) for n, p in model.named_parameters()}
    return trained


def require_taken_over(run: RunDirectory, theirs: dict) -> None:
    """The run's checkpoint has these weights and first moments of timm's model, at step 3."""
    checkpoint = run.newest_checkpoint()
    weights, stored = read_weights(checkpoint), StoredFragments(checkpoint)
    assert checkpoint.step == checkpoint.manifest["updates"] == 3
    assert {f"encoder.{name}" for name in theirs} == weights.keys()
    for name, (weight, moment) in theirs.items():
        assert np.array_equal(weights[f"encoder.{name}"], weight), name
        ours = torch.empty(moment.size)
        read_parts(stored.parts(f"encoder.{name}", "exp_avg", 0, ours))
        assert np.array_equal(ours, moment.ravel()), name


def supervised_run(folder: Path, pictures) -> RunDirectory:
    return new_run(folder, str(pictures), "steps=5", recipe="pretrain_supervised_debug")


def test_timms_own_model_trained_by_plain_deepspeed_is_taken_over(pictures, tmp_path):
    run, source = supervised_run(tmp_path, pictures), tmp_path / "theirs"
    theirs = run_on_ranks(timm_trained_by_deepspeed, 2, str(run.path), str(source))[0]
    process = imported(source, run)
    assert process.returncode == EXIT_DONE, process.stderr
    require_taken_over(run, theirs)
    assert run_on_ranks(train_until, 2, str(run.path), 1, 9) == ["done"] * 2


def refusal(source: Path, run: RunDirectory) -> str:
    with pytest.raises(InputError) as refused:
        imported_here(source, run)
    (line,) = refused.value.problems
    assert not run.checkpoint_directories()
    return line


def imported_here(source: Path, run: RunDirectory) -> None:
    config, plan = read_run_config(run.path), run.plan()
    import_state(source, run, config, plan, initial_module(config, plan, resumes=True))


def test_what_accelerate_saved_without_deepspeed_is_taken_over_or_refused_but_never_guessed(pictures, tmp_path):
    runs = {groups: supervised_run(tmp_path / groups, pictures) for groups in GROUPS}
    theirs = run_on_ranks(timm_trained_by_accelerate, 2, str(runs["one"].path), str(tmp_path))[0]
    for groups in ("one", "decay", "named"):
        imported_here(tmp_path / groups, runs[groups])
        require_taken_over(runs[groups], theirs[groups])
    assert "cannot be told apart by the order of the run's" in refusal(tmp_path / "alike", runs["alike"])

    source = tmp_path / "named"
    with pytest.raises(InputError, match="the run has a checkpoint of this step"):
        imported_here(source, runs["named"])
    short = new_run(tmp_path / "short", str(pictures), "steps=3", recipe="pretrain_supervised_debug")
    assert "is of step 3, and the run ends at step 3" in refusal(source, short)
    masked = new_run(tmp_path / "masked", str(pictures))
    assert "holds another network than the run: only in the run: decoder." in refusal(source, masked)
    thin = new_run(tmp_path / "thin", str(pictures), "encoder.mlp_ratio=2", recipe="pretrain_supervised_debug")
    assert "encoder.blocks.0.mlp.fc1.bias has the shape [192], in the run [96]" in refusal(source, thin)
    sgd = new_run(tmp_path / "sgd", str(pictures), "optimizer={kind: sgd, learning_rate: 0.1}")
    assert "optimizer.kind sgd: moments of AdamW alone are imported" in refusal(source, sgd)
    (source / "optimizer.bin").write_bytes(b"cut")
    assert f"{source / 'optimizer.bin'}: cannot be read" in refusal(source, supervised_run(tmp_path / "cut", pictures))


def test_what_is_no_checkpoint_of_deepspeeds_is_one_line(pictures, tmp_path):
    run = new_run(tmp_path, str(pictures))
    process = imported(tmp_path, run)
    assert process.returncode == EXIT_INPUT
    assert process.stderr == (
        f"{tmp_path}: holds neither *_optim_states.pt of DeepSpeed nor optimizer.bin and model.safetensors of "
        "accelerate; give the directory that `save_checkpoint` or `save_state` wrote; for weights alone say "
        "initialise_from=FILE\n"
    )
