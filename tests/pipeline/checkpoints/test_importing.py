"""What DeepSpeed and accelerate wrote becomes a checkpoint of ours, with its moments, and a run goes on from it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoints.files import StoredFragments, read_weights
from pipeline.errors import EXIT_DONE, EXIT_INPUT
from pipeline.run_directory import RunDirectory
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
        stored.read(name, "exp_avg", 0, ours)
        assert np.array_equal(ours, moment.ravel()), name
    assert run_on_ranks(train_until, 2, str(run.path), 1, 9) == ["done"] * 2


def test_what_is_no_checkpoint_of_deepspeeds_is_one_line(pictures, tmp_path):
    run = new_run(tmp_path, str(pictures))
    process = imported(tmp_path, run)
    assert process.returncode == EXIT_INPUT
    assert process.stderr == (
        f"{tmp_path}: holds no *_optim_states.pt of DeepSpeed; give the directory that `save_checkpoint` or "
        "accelerate's `save_state` wrote; for weights alone say initialise_from=FILE\n"
    )
