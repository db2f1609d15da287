"""A run that tunes a few parameters: stopped and gone on with, located, merged, evaluated, refused where it must be."""

import shutil

import pytest
import torch

from flows.planning import plan_lines
from flows.profiles import changed_profile
from flows.requests.registration import registration_run
from flows.requests.training import checked_training, training_run
from pipeline.checkpoints.checkpoint import write_weights
from pipeline.checkpoints.files import read_weights
from pipeline.config.stages import read_run_config
from pipeline.errors import InputError
from pipeline.preparation.resume import change_run
from pipeline.registry.locate import locate_model, undrawable, unregistrable
from pipeline.registry.weights import load_model
from pipeline.run_directory import RunDirectory
from pipeline.training.loop import initial_module
from tests.pipeline.pictures import small_dataset
from tests.pipeline.training.runs import train_until
from tests.pipeline.training.test_distillation import exported
from tests.ranks import run_on_ranks

STEPS = 8
LORA = ("tuning.kind=lora", "tuning.rank=4", "tuning.dropout=0.1", "optimizer.learning_rate=0.01")
ADALORA = (
    "tuning.kind=adalora", "tuning.initial_rank=6", "tuning.rank=3", "tuning.every_steps=1", "tuning.warmup_share=0.2",
    "optimizer.learning_rate=0.01", "zero.stage=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(small_dataset(tmp_path_factory.mktemp("pictures")).directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("models") / "model", ("a", "b", "c"))


def asked(data: str, model: str, folder, *settings: str) -> dict:
    overrides = [
        f"steps={STEPS}", "global_batch_size=12", "micro_batch_size=6", "data.lanes=6", "encoder.pooling=token",
        "profile.ranks_per_node=2", "profile.loader_workers=1", "checkpoint.every_steps=100", *settings,
    ]  # fmt: skip
    return {"data": data, "profile": "local", "model": model, "overrides": overrides, "home": folder / "home"}


def tuned_run(data: str, model: str, folder, *settings: str) -> RunDirectory:
    return training_run(
        "finetune", "finetune_vit", run_dir=str(folder / "run"), **asked(data, model, folder, *settings)
    )


def train(run: RunDirectory, ranks: int, attempt: int = 1, stop_at: int = 99) -> None:
    said = run_on_ranks(train_until, ranks, str(run.path), attempt, stop_at)
    assert said[0] == "done" or stop_at < STEPS, said


def located(reference: object, folder):
    return locate_model(str(reference), tracking_uri=f"sqlite:///{folder}/m.db", home=folder)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(*LORA, "zero.stage=1"), (*LORA, "zero.stage=3"), ADALORA])
def test_a_stopped_run_goes_on_to_the_last_bit(settings, data, model, tmp_path):
    whole, stopped = (tuned_run(data, model, tmp_path / name, *settings) for name in ("whole", "stopped"))
    train(whole, 2)
    train(stopped, 2, stop_at=5)
    assert stopped.newest_checkpoint().step == 5
    train(stopped, 2, attempt=2)
    ours, theirs = (read_weights(run.newest_checkpoint()) for run in (stopped, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if "adalora" in settings[0]:
        assert ours["ranks.steps"] == STEPS and ours["ranks.sensitivity"].any()
        assert sum((ours[name] != 0).sum() for name in ours if "lora_E" in name) == 3 * 4


@pytest.mark.slow
def test_a_lora_run_goes_on_in_another_world_and_ends_in_a_plain_model(data, model, tmp_path):
    run = tuned_run(data, model, tmp_path / "one", *LORA, "zero.stage=1")
    train(run, 2, stop_at=4)
    profile, placement = changed_profile(run.profile_file, ["ranks_per_node=1"])
    change_run(run, ["zero.stage=3"], profile, placement)
    with pytest.raises(InputError, match="tuning.rank: would change the training"):
        change_run(run, ["tuning.rank=2"], profile, placement)
    train(run, 1, attempt=2)
    source = located(run.path, tmp_path)
    assert source.tuning is None and source.lineage["tuning"] == "lora" and unregistrable(source) is None

    # The network with its low-rank layers, against the plain one with merged weights.
    config, plan = read_run_config(run.path), run.plan()
    unmerged = initial_module(config, plan, resumes=True)
    unmerged.load_state_dict(read_weights(run.newest_checkpoint()))
    plain, images = load_model(source), torch.randn(4, 3, 16, 16)
    ours = unmerged.eval().encoder(images)
    torch.testing.assert_close(plain(images), ours, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    begun = load_model(located(model, tmp_path)).state_dict()
    changed = {name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, begun.get(name, tensor))}
    assert {name.rsplit(".", 1)[0].split(".", 2)[-1] for name in changed if "blocks" in name} == {
        "attn.qkv",
        "attn.proj",
    }

    # Weights alone are merged too, and another fine-tuning begins from them.
    write_weights(run.newest_checkpoint(), tmp_path / "weights")
    again = tuned_run(data, str(run.path), tmp_path / "again", "tuning.kind=head", "zero.stage=0")
    module = initial_module(read_run_config(again.path), again.plan())
    merged = plain.state_dict()["blocks.0.attn.qkv.weight"]
    assert torch.equal(module.encoder.blocks[0].attn.qkv.weight, merged)
    file = tuned_run(
        data, str(tmp_path / "weights" / "model.safetensors"), tmp_path / "file", "tuning.kind=head", "zero.stage=0",
        "encoder.name=vit_ti16", "encoder.image_size=16", "encoder.patch_size=4", "encoder.embed_dim=48",
        "encoder.depth=2", "encoder.num_heads=3",
    )  # fmt: skip
    module = initial_module(read_run_config(file.path), file.plan())
    assert torch.equal(module.encoder.blocks[0].attn.qkv.weight, merged)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"), [("adapter", "no adapters"), ("visual_prompt", "no prompts")], ids=["adapter", "prompts"]
)
def test_what_timm_cannot_express_is_evaluated_and_neither_registered_nor_lost(kind, words, data, model, tmp_path):
    run = tuned_run(data, model, tmp_path, f"tuning.kind={kind}", "zero.stage=2", "optimizer.learning_rate=0.01")
    train(run, 2)
    source, images = located(run.path, tmp_path), torch.randn(4, 3, 16, 16)
    trained = initial_module(read_run_config(run.path), run.plan(), resumes=True)
    trained.load_state_dict(read_weights(run.newest_checkpoint()))
    assert torch.equal(load_model(source)(images), trained.eval().encoder(images))
    assert words in unregistrable(source) and bool(undrawable(source)) == (kind == "visual_prompt")
    with pytest.raises(InputError, match=words):
        registration_run(str(run.path), "x", home=tmp_path / "home")
    with pytest.raises(InputError, match=f"what tuning.kind {kind} added, which would be lost; start from .*{model}"):
        tuned_run(data, str(run.path), tmp_path / "again", "zero.stage=0")
    alone = tmp_path / "alone" / "step"  # a checkpoint without its run
    shutil.copytree(run.newest_checkpoint().directory, alone)
    assert torch.equal(load_model(located(alone, tmp_path))(images), trained.encoder(images))
    write_weights(run.newest_checkpoint(), tmp_path / "weights")
    size = ("encoder.name=vit_ti16", "encoder.image_size=16", "encoder.patch_size=4", "encoder.embed_dim=48",
            "encoder.depth=2", "encoder.num_heads=3", "zero.stage=0")  # fmt: skip
    file = tuned_run(data, str(tmp_path / "weights" / "model.safetensors"), tmp_path / "file", *size)
    with pytest.raises(InputError, match="network with adapters, prompts or unmerged low-rank layers"):
        initial_module(read_run_config(file.path), file.plan())


def test_the_plan_counts_what_trains(data, model, tmp_path):
    plans = {}
    for name, settings in {"full": (), "lora": LORA, "head": ("tuning.kind=head",)}.items():
        prepared, _ = checked_training("finetune", "finetune_vit", **asked(data, model, tmp_path, *settings))
        plans[name] = prepared.plan
        lines = [line for line in plan_lines(prepared, "local", 0) if line.startswith("trained")]
        trained, total = prepared.plan["trained_parameters"], prepared.plan["parameters"]
        assert lines[0].startswith(
            f"trained     trained parameters {trained:,} of {total:,} ({100 * trained / total:.3g}"
        )
    parts = initial_module(prepared.config, prepared.plan).named_parameters()
    assert plans["head"]["trained_parameters"] == sum(p.numel() for _, p in parts if p.requires_grad) == 2 * 49
    for key in ("checkpoint_bytes", "training_flops_per_image"):
        assert plans["head"][key] < plans["lora"][key] < plans["full"][key]
    memory = [plan["memory_bytes_per_rank"] for plan in plans.values()]
    assert all(full > lora > head for full, lora, head in zip(*(m.values() for m in memory), strict=True))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("tuning.kind=prefix",), "visual_prompt with depth deep"),
        (("tuning.kind=lorra",), "did you mean `lora`|expected full, head, lora"),
        (("tuning.rank=4",), "tuning.kind: expected full, head, lora, adalora, adapter or visual_prompt"),
        (("tuning.kind=head", "tuning.rank=4"), "tuning.rank: no such key of kind head"),
        (("tuning.kind=lora", "tuning.rank=48"), "tuning.rank 48 is not low: the encoder's matrices are 48 wide"),
        (("tuning.kind=lora", "tuning.targets=[q]"), "tuning.targets.*qkv, proj, fc1 or fc2"),
        (("tuning.kind=adalora", "zero.stage=2"), "weighs whole gradients, and zero.stage 2 cuts them"),
        (("tuning.kind=head", "activation_checkpointing=true"), "keeps no activations"),
        (("tuning.kind=visual_prompt", "encoder.positions=rotary"), "prompts are nowhere"),
    ],
)
def test_wrong_settings_are_a_line_that_names_the_key(settings, said, data, model, tmp_path):
    with pytest.raises(InputError, match=said) as raised:
        tuned_run(data, model, tmp_path, *settings)
    assert len(raised.value.problems) == 1


def test_a_frozen_encoder_keeps_nothing_that_the_seed_drew(data, tmp_path):
    other = exported(tmp_path / "other", ("a", "b", "c"), class_token=False, pooling="mean")
    run = tuned_run(data, other, tmp_path, "tuning.kind=lora", "encoder.class_token=true", "zero.stage=0")
    with pytest.raises(InputError, match=r"tuning.kind lora: initialise_from .* lacks 1 tensors of the enc.*cls_token"):
        initial_module(read_run_config(run.path), run.plan())
    full = tuned_run(data, other, tmp_path / "full", "encoder.class_token=true", "zero.stage=0")
    initial_module(read_run_config(full.path), full.plan())
    mean = tuned_run(data, other, tmp_path / "mean", "tuning.kind=head", "encoder.pooling=mean", "zero.stage=0")
    initial_module(read_run_config(mean.path), mean.plan())


def test_a_rate_that_falls_from_block_to_block_is_noted(data, model, tmp_path):
    def noted(*settings: str) -> bool:
        prepared, _ = checked_training("finetune", "finetune_vit", **asked(data, model, tmp_path, *settings))
        return any("layer_decay 0.65 slows what tuning.kind" in note for note in prepared.notes)

    assert noted(*LORA) and not noted("tuning.kind=head") and not noted()
    assert not noted(*LORA, "optimizer.layer_decay=1")


def test_pretraining_has_no_tuning(data, tmp_path):
    with pytest.raises(InputError, match="tuning.*no such key"):
        training_run(
            "pretrain", "pretrain_supervised_debug", data=data, profile="local", overrides=["tuning.kind=lora"],
            run_dir=str(tmp_path / "run"), home=tmp_path,
        )  # fmt: skip
