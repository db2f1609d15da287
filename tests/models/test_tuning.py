"""What every tuning trains, what it leaves alone, what it costs, and that a merged network computes the same."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.utils.flop_counter import FlopCounterMode

from models.build import build_objective
from models.encoders.config import EncoderConfig
from models.encoders.timm_config import read_encoder
from models.encoders.vit import build_encoder
from models.objectives.batch import Batch
from models.objectives.config import SupervisedConfig
from models.tuning.config import AdaLoRATuning, LoRATuning, TuningConfig
from models.tuning.low_rank import merged
from models.tuning.place import tune
from models.tuning.ranks import RankAllocation
from pipeline.config.optimizer import AdamWConfig
from pipeline.config.plan import count_parameters, count_trained, training_flops
from pipeline.training.optimizer import parameter_groups

SMALL = {"name": "vit_ti16", "image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
CLASSES, EVERY_TARGET = 5, ("qkv", "proj", "fc1", "fc2")
TUNINGS = {
    "head": {"kind": "head"},
    "lora": {"kind": "lora", "targets": EVERY_TARGET, "rank": 4},
    "adalora": {"kind": "adalora", "targets": EVERY_TARGET, "initial_rank": 6, "rank": 4},
    "adapter": {"kind": "adapter", "width": 8},
    "parallel adapter": {"kind": "adapter", "width": 8, "placement": "parallel", "scale": 0.1},
    "deep prompts": {"kind": "visual_prompt", "tokens": 3},
    "shallow prompts": {"kind": "visual_prompt", "tokens": 3, "depth": "shallow"},
}
POSITIONS = {"learned": {}, "rotary": {"positions": "rotary", "pooling": "mean"},
             "relative": {"positions": "relative", "pooling": "mean"}, "fixed": {"positions": "sincos2d"},
             "two tokens": {"distillation_token": True}}  # fmt: skip


def tuning_of(raw: dict) -> TuningConfig:
    return TypeAdapter(TuningConfig).validate_python(raw)


def tuned(tuning: dict, **encoder) -> torch.nn.Module:
    """An objective whose encoder is tuned, its new parts no longer at their start, and its head not at zero."""
    module = build_objective(SupervisedConfig(), EncoderConfig(**SMALL | encoder), num_classes=CLASSES, seed=0)
    tune(module, tuning_of(tuning), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return module


def batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return Batch(images, torch.arange(size) % CLASSES, torch.arange(size))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", TUNINGS)
def test_gradients_reach_what_trains_alone_and_the_plan_counts_it(name, positions):
    encoder, tuning = EncoderConfig(**SMALL | POSITIONS[positions]), tuning_of(TUNINGS[name])
    if tuning.problem(encoder):
        assert "prompts" in name and positions in ("rotary", "relative")
        return
    module = tuned(TUNINGS[name], **POSITIONS[positions]).train()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module(batch()).loss.backward()
    optimizer.step()
    new = ("lora_", "adapter", "prompts", "head")
    trains = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trains == {n for n in before if any(word in n for word in new)}
    assert {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()} == trains
    assert {n for n, p in module.named_parameters() if not torch.equal(p, before[n])} == trains
    size = (encoder, SupervisedConfig(), CLASSES, tuning)
    assert count_parameters(*size) == sum(p.numel() for p in module.parameters())
    assert count_trained(*size) == sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", TUNINGS)
def test_counted_arithmetic_agrees_with_the_built_module(name):
    encoder, tuning = EncoderConfig(name="vit_ti16", image_size=64, patch_size=8), tuning_of(TUNINGS[name])
    module = build_objective(SupervisedConfig(), encoder, num_classes=10, seed=0)
    tune(module, tuning, seed=0)
    with FlopCounterMode(display=False) as counter:
        module.train()(Batch(torch.randn(1, 3, 64, 64), torch.zeros(1).long(), torch.arange(1))).loss.backward()
    counted = counter.get_total_flops()
    assert training_flops(encoder, SupervisedConfig(), 10, tuning) == pytest.approx(counted, rel=0.04)


@pytest.mark.parametrize("name", ["lora", "adalora", "adapter", "parallel adapter"])
def test_what_is_new_changes_no_output_in_the_beginning(name):
    module = build_objective(SupervisedConfig(), EncoderConfig(**SMALL), num_classes=CLASSES, seed=0).eval()
    torch.nn.init.normal_(module.encoder.head.weight)
    images = batch().images
    before = module.encoder(images)
    tune(module, tuning_of(TUNINGS[name]), seed=0)
    assert torch.equal(module.eval().encoder(images), before)


@pytest.mark.parametrize("positions", ["learned", "rotary", "relative"])
@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_merged_weights_are_of_a_plain_network_that_says_the_same(name, positions):
    module = tuned(TUNINGS[name], **POSITIONS[positions]).eval()
    plain = build_encoder(EncoderConfig(**SMALL | POSITIONS[positions]), CLASSES).eval()
    images = batch().images
    untouched = {n.replace(".base_layer", ""): t for n, t in module.encoder.state_dict().items()}
    plain.load_state_dict(untouched, strict=False)
    assert (plain(images) - module.encoder(images)).abs().max() > 1e-2  # the product matters
    plain.load_state_dict(merged(module.encoder.state_dict(), tuning_of(TUNINGS[name])))
    torch.testing.assert_close(plain(images), module.encoder(images), atol=1e-5, rtol=1e-5)


def test_prompts_are_further_keys_and_values_of_every_block():
    """Two blocks by hand, with the prompts put in and taken out by slices."""
    module = tuned(TUNINGS["deep prompts"]).eval()
    encoder, images = module.encoder, batch().images
    tokens = encoder._pos_embed(encoder.patch_embed(images))
    for block, prompts in zip(encoder.blocks, encoder.prompts, strict=True):
        own = prompts.tokens.expand(len(images), -1, -1)
        joined = torch.cat([tokens[:, :1], own, tokens[:, 1:]], dim=1)
        joined = joined + block.attn(block.norm1(joined))
        joined = joined + block.mlp(block.norm2(joined))
        tokens = torch.cat([joined[:, :1], joined[:, 4:]], dim=1)
    torch.testing.assert_close(encoder.forward_head(encoder.norm(tokens)), encoder(images), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["lora", "adapter", "deep prompts"])
def test_dropout_in_what_is_new_follows_the_positions_of_the_samples(name):
    module = tuned(TUNINGS[name] | {"dropout": 0.5}).train()
    whole = batch(8)
    losses = module(whole).losses
    halves = [
        module(Batch(*(None if t is None else t[part] for t in whole))).losses for part in (slice(4), slice(4, 8))
    ]
    torch.testing.assert_close(torch.cat(halves), losses)
    assert not torch.allclose(module(whole._replace(positions=whole.positions + 100)).losses, losses)
    assert torch.equal(module.eval()(whole).losses, module(whole).losses)


def test_layers_and_decay_of_what_is_new_are_those_of_its_block():
    config = AdamWConfig(learning_rate=1.0, layer_decay=0.5)
    for name in ("lora", "adapter", "deep prompts"):
        module = tuned(TUNINGS[name])
        names = {id(p): n for n, p in module.named_parameters()}
        for group in parameter_groups(module, config, depth=2):
            for parameter in group["params"]:
                of = names[id(parameter)]
                scale = next((s for part, s in ((".0.", 0.25), (".1.", 0.5)) if part in of), 1.0)
                assert group["learning_rate_scale"] == scale, of
                decays = parameter.ndim == 2  # matrices, not biases and prompts
                assert (group["weight_decay"] > 0) == decays, of


@pytest.mark.slow
def test_a_frozen_batch_norm_keeps_its_statistics():
    encoder = read_encoder({"name": "timm:resnet10t", "image_size": 32})
    module = build_objective(SupervisedConfig(), encoder, num_classes=CLASSES, seed=0)
    tune(module, tuning_of({"kind": "head"}), seed=0)
    before = {n: b.clone() for n, b in module.named_buffers()}
    module.train()(batch()).loss.backward()
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    size = (encoder, SupervisedConfig(), CLASSES, tuning_of({"kind": "head"}))
    assert trained == count_trained(*size) == 5 * 513 and count_parameters(*size) > 10 * trained
    assert training_flops(*size) < training_flops(*size[:3]) / 2.9


def test_a_frozen_encoder_keeps_nothing_for_a_backward():
    kept = {}
    for name in ("head", "lora"):
        module, sizes = tuned(TUNINGS[name]).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
            module(batch())
        kept[name] = sum(sizes)
    assert kept["head"] < kept["lora"] / 50


def test_ranks_go_where_peft_sends_them():
    """Our allocation, step by step beside the library's own, which forgets what it knows at a restart."""
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    raw = TUNINGS["adalora"] | {"warmup_share": 0.1, "settled_share": 0.3, "every_steps": 2, "rank": 2}
    steps, ours, theirs = 20, tuned(raw).train(), tuned(raw).train()
    own = AdaLoraConfig(init_r=6, target_r=2, tinit=2, tfinal=6, deltaT=2, total_step=steps)
    allocator = RankAllocator(theirs.encoder, own, "default")
    for step in range(1, steps + 1):
        for module in (ours, theirs):
            module.zero_grad()
            module(batch()).loss.backward()
        ours.ranks.observe(step / steps)
        ours.ranks.allocate(step / steps)
        allocator.update_and_allocate(theirs.encoder, step)
        for name, parameter in ours.named_parameters():
            if "lora_E" in name:
                assert torch.equal(parameter, theirs.get_parameter(name)), (step, name)
        with torch.no_grad():  # both learn alike
            for module in (ours, theirs):
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=0.01)
    ours.ranks.allocate(1.0)
    assert sum(ours.ranks.ranks()) == 2 * 8 and len(set(ours.ranks.ranks())) > 1  # 8 layers; some got more than others


def test_adalora_draws_singular_vectors_towards_orthogonal_ones():
    module = tuned(TUNINGS["adalora"] | {"orthogonality": 1.0})
    assert isinstance(module.ranks, RankAllocation)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    before = module.ranks.departure().item()
    for _ in range(60):
        optimizer.zero_grad()
        module.train()(batch()).loss.backward()
        optimizer.step()
    assert module.ranks.departure().item() < before / 5
    plain = tuned(TUNINGS["adalora"] | {"orthogonality": 0.0})
    module = tuned(TUNINGS["adalora"] | {"orthogonality": 1.0})
    added = module.train()(batch()).loss - plain.train()(batch()).loss
    torch.testing.assert_close(added, module.ranks.departure())
    assert torch.equal(module.eval()(batch()).loss, plain.eval()(batch()).loss)


@pytest.mark.parametrize("name", TUNINGS)
def test_a_tuned_network_compiles_to_one_graph_that_gives_the_same_loss(name):
    dropout = {} if name == "head" or "adalora" in name else {"dropout": 0.2}
    module = tuned(TUNINGS[name] | dropout, drop_path_rate=0.2).train()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=False)
    for first in (0, 4):
        one = batch()._replace(positions=torch.arange(first, first + 4))
        with torch.compiler.set_stance("fail_on_recompile" if first else "default"):
            assert compiled(one).loss.item() == pytest.approx(module(one).loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", TUNINGS)
def test_a_batch_is_learned_by_heart(name):
    module = tuned(TUNINGS[name]).train()
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        (outcome := module(batch())).loss.backward()
        optimizer.step()
    assert outcome.losses.max() < 0.1 and outcome.sums["accuracy"] == 4


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"kind": "prefix"}, "visual_prompt with depth deep gives every block further keys and values"),
        ({"kind": "lora", "targets": ["qkv", "qkv"]}, "name each once"),
        ({"kind": "lora", "targets": []}, "at least 1"),
        ({"kind": "lora", "width": 3}, "Extra inputs"),
        ({"kind": "adalora", "initial_rank": 4, "rank": 8}, "ranks only fall"),
        ({"kind": "adalora", "warmup_share": 0.6, "settled_share": 0.4}, "leave no step"),
        ({"kind": "adapter", "width": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_keys_are_refused(raw, said):
    with pytest.raises(ValidationError, match=said):
        tuning_of(raw)


def test_a_rank_that_is_not_low_is_refused():
    assert "48 wide" in LoRATuning(rank=48).problem(EncoderConfig(**SMALL))
    assert "48 wide" in AdaLoRATuning(initial_rank=50).problem(EncoderConfig(**SMALL))
    assert LoRATuning(rank=47).problem(EncoderConfig(**SMALL)) is None
