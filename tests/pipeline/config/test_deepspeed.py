"""The DeepSpeed dictionary: nothing left to its defaults that trains something else."""

import json
import os
from pathlib import Path

import pytest

from pipeline.config.deepspeed import REDUCE_BUCKET_ELEMENTS, deepspeed_config, reduces_to_owners
from pipeline.config.plan import count_parameters, plan_batches
from pipeline.config.training import PretrainConfig
from pipeline.errors import InputError
from tests.recipes import load_recipe

GOLDEN = Path(__file__).parents[2] / "golden" / "deepspeed"
PARAMETERS, WORLD_SIZE = 304_000_000, 8  # about ViT-L


def dictionary(stage: int, precision: str, offload: str, parameters: int = PARAMETERS) -> dict:
    settings = [f"zero.stage={stage}", f"zero.offload_optimizer={offload}", "optimizer.max_grad_norm=0"]
    config = load_recipe(PretrainConfig, "pretrain_mae_vit_l16", settings)
    plan = plan_batches(config.global_batch_size, config.micro_batch_size, WORLD_SIZE)
    return deepspeed_config(config, plan, precision=precision, parameters=parameters, cuda=True)


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_dictionary_is_its_golden_file(stage, precision, offload):
    """Accept a change with VIT_ACCEPT_GOLDEN=1."""
    found = dictionary(stage, precision, offload)
    path = GOLDEN / f"stage-{stage}-{precision}-offload-{offload}.json"
    text = json.dumps(found, indent=1) + "\n"
    if os.environ.get("VIT_ACCEPT_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text
    assert found["gradient_clipping"] == 0.0 and "auto" not in text


def test_vit_l_has_at_least_four_gradient_buckets():
    config = load_recipe(PretrainConfig, "pretrain_supervised_vit_l16")
    assert count_parameters(config.encoder, config.objective, 1000) / REDUCE_BUCKET_ELEMENTS > 4


def test_gradients_go_to_their_owners_unless_the_parts_are_tiny():
    assert reduces_to_owners(PARAMETERS, 8) and reduces_to_owners(PARAMETERS, 1024)
    assert reduces_to_owners(22_000_000, 64) and not reduces_to_owners(22_000_000, 128)
    assert dictionary(2, "bf16", "none")["zero_optimization"]["use_multi_rank_bucket_allreduce"] is False
    assert dictionary(2, "bf16", "none", 100_000)["zero_optimization"]["use_multi_rank_bucket_allreduce"] is True


@pytest.mark.parametrize("kind", ["lamb", "lars"])
def test_optimizers_that_need_whole_tensors_are_refused_under_zero(kind):
    with pytest.raises(InputError, match=f"{kind} needs the norm of every whole tensor.*set zero.stage to 0") as caught:
        load_recipe(PretrainConfig, "pretrain_mae_debug", [f"optimizer.kind={kind}", "zero.stage=1"])
    assert len(str(caught.value).splitlines()) == 1
    load_recipe(PretrainConfig, "pretrain_mae_debug", [f"optimizer.kind={kind}", "zero.stage=0"])


def test_offload_without_zero_is_refused():
    with pytest.raises(
        InputError,
        match="--set zero.stage, zero.offload_optimizer: offload_optimizer cpu: plain data parallel has no offload",
    ):
        load_recipe(PretrainConfig, "pretrain_mae_debug", ["zero.stage=0", "zero.offload_optimizer=cpu"])
