"""Tuning a few parameters on real ranks: every backend as plain PyTorch, and what is frozen to the last bit."""

import pytest
import torch

from pipeline.run_directory import RunDirectory
from tests.pipeline.training.engine_cases import module_of
from tests.pipeline.training.equivalence_cases import setting, train_plainly
from tests.pipeline.training.test_equivalence import assert_equal, trained

TUNINGS = {
    "head": ("tuning.kind=head",),
    "lora": ("tuning.kind=lora", "tuning.targets=[qkv, proj, fc1, fc2]", "tuning.dropout=0.1"),
    "adapter": ("tuning.kind=adapter", "tuning.width=8"),
    "prompts": ("tuning.kind=visual_prompt", "tuning.tokens=3"),
    "adalora": (
        "tuning.kind=adalora", "tuning.initial_rank=6", "tuning.rank=3", "tuning.every_steps=2",
        "tuning.warmup_share=0.1", "tuning.settled_share=0.5",
    ),
}  # fmt: skip
CASES = {
    **{f"stage {stage}": (stage,) for stage in range(4)},
    "computed again": (3, "activation_checkpointing=true"),
    "compiled 0": (0, "compile=true"),
    "compiled 3": (3, "compile=true"),
    "bf16 0": (0, "precision=bf16"),
    "bf16 3": (3, "precision=bf16"),
}
pytestmark = pytest.mark.slow


TRAINED = {  # lora under every backend, and of the others what treats them in another way
    "head": ("stage 0", "stage 1", "stage 2", "stage 3"),
    "lora": tuple(CASES),
    "adapter": ("stage 0", "stage 3", "compiled 3"),
    "prompts": ("stage 0", "stage 3", "computed again", "compiled 3"),
    "adalora": ("stage 0", "compiled 0", "bf16 0"),
}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """All of them in one world of two ranks, each with its folder."""
    folder = tmp_path_factory.mktemp("tuning")
    settings = {
        f"{name}, {case}": setting(*CASES[case], *TUNINGS[name])
        for name, cases in TRAINED.items() for case in cases
    }  # fmt: skip
    done = trained(2, settings, folder)
    return {name: (training, folder / name, settings[name]) for name, training in done.items()}


def assert_frozen(folder, training, config) -> None:
    """What does not train is in the checkpoint as it began, whole in fp32, and has no moments there."""
    begun = module_of(config)
    trains = {name for name, parameter in begun.named_parameters() if parameter.requires_grad}
    assert RunDirectory(folder).newest_checkpoint().manifest["shapes"].keys() == trains
    for name, parameter in begun.named_parameters():
        assert torch.equal(training.weights[name], parameter) == (name not in trains), name


@pytest.mark.parametrize("name", TUNINGS)
def test_every_backend_tunes_as_plain_pytorch_does_and_leaves_the_rest_alone(name, trainings):
    plain = train_plainly(setting(0, *TUNINGS[name]))
    for case in TRAINED[name]:
        training, folder, config = trainings[f"{name}, {case}"]
        assert_frozen(folder, training, config)
        if "bf16" in case:
            assert max(abs(a - b) for a, b in zip(training.losses, plain.losses, strict=True)) < 1e-2, case
            continue
        weights, average = ({n: w[n] for n in plain.weights} for w in (training.weights, training.average))
        assert_equal(f"{name}, {case}", training._replace(weights=weights, average=average), plain)


def test_adalora_ends_at_the_ranks_that_were_asked_for(trainings):
    for case in ("stage 0", "compiled 0", "bf16 0"):
        training, *_ = trainings[f"adalora, {case}"]
        values = torch.cat([tensor.flatten() for name, tensor in training.weights.items() if "lora_E" in name])
        assert len(values) == 4 * 6 and (values != 0).sum() == 4 * 3, case
