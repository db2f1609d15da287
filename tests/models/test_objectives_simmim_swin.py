"""SimMIM on a Swin: what holds for every objective, of a network whose last tokens stand for several patches each."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.build import build_objective
from models.encoders.patches import patchify, unpatchify
from models.encoders.timm_config import read_encoder
from models.encoders.timm_network import build_timm_network
from models.measured_size import measured_size
from models.objectives.config import SimMIMConfig, SupervisedConfig
from models.objectives.simmim import SimMIM
from pipeline.config.plan import count_parameters, training_flops
from tests.models.objective_cases import batch_of, rows, shake

CELL = 4  # pixels: a patch of 2, and a stage that halves the grid
SWIN = {"name": "timm:swin_tiny_patch4_window7_224", "image_size": 16, "arguments": {
    "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [1, 2]}}  # fmt: skip
SWIN_V2 = SWIN | {"name": "timm:swinv2_tiny_window8_256"}

either_swin = pytest.mark.parametrize("raw", [SWIN, SWIN_V2], ids=["swin", "swinv2"])


def build(raw: dict, mask_size: int = 8, **options: object) -> SimMIM:
    return build_objective(SimMIMConfig(mask_size=mask_size), read_encoder(raw | options), num_classes=0, seed=0)


@either_swin
def test_it_begins_at_the_mean_colour_and_every_parameter_gets_a_gradient(raw):
    assert build(raw)(batch_of(64)).loss.item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.02)  # of normal noise
    module = shake(build(raw))
    module(batch_of(8)).loss.backward()
    assert not [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_loss_is_the_mean_absolute_error_of_hidden_pixels():
    module, batch = shake(build(SWIN)).eval(), batch_of(3)
    masked = module.mask(batch.positions)
    assert masked.shape == (3, 16) and (masked.sum(dim=1) == 3 * 4).all()  # three of four squares of 2 x 2 cells
    wrong = (module.predict(batch.images, masked) - patchify(batch.images, CELL))[masked].abs()
    assert module(batch).loss.item() == pytest.approx(wrong.mean().item(), rel=1e-5)


def test_it_overfits_a_batch_of_eight():
    module, batch, losses = build(SWIN, mask_size=CELL), batch_of(8), []
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0)
    for _ in range(200):
        loss = module(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.55 * losses[0]


def test_a_batch_of_32_is_two_of_16_in_loss_and_gradient():
    module, whole, losses = shake(build(SWIN, drop_path_rate=0.3)).train(), batch_of(32, first=1000), []
    for half in (rows(whole, 0, 16), rows(whole, 16, 32)):
        outcome = module(half)
        (outcome.loss / 2).backward()
        losses.append(outcome.losses)
    halves = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    outcome = module(whole)
    outcome.loss.backward()
    assert torch.allclose(torch.cat(losses), outcome.losses, rtol=1e-4, atol=1e-6)
    for (name, parameter), grad in zip(module.named_parameters(), halves, strict=True):
        assert (parameter.grad - grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-6, name


@either_swin
def test_the_encoder_never_sees_the_pixels_that_are_hidden(raw):
    module, batch, seen = shake(build(raw)).eval(), batch_of(4), []
    module.encoder.norm.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    hidden = module.mask(batch.positions)
    for changed in (hidden, ~hidden):
        noise = patchify(torch.randn(batch.images.shape), CELL) * changed.unsqueeze(-1)
        module(batch._replace(images=batch.images + unpatchify(noise, CELL, (4, 4))))
    module(batch)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[1], seen[2])


def test_the_encoder_sees_what_timms_own_forward_sees_where_nothing_is_hidden():
    module, batch, seen = shake(build(SWIN)).eval(), batch_of(2), []
    module.encoder.norm.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    module.predict(batch.images, torch.zeros(2, 16, dtype=torch.bool))
    assert torch.equal(seen[0], module.encoder.forward_features(batch.images))


def test_a_reconstruction_keeps_what_was_visible_and_fills_in_the_rest():
    module, batch = shake(build(SWIN, image_size=[16, 24])), batch_of(3, size=(16, 24))
    filled, seen = module.reconstruct(batch.images, batch.positions)
    hidden, true = module.mask(batch.positions), patchify(batch.images, CELL)
    assert torch.equal(patchify(filled, CELL)[~hidden], true[~hidden]) and not patchify(seen, CELL)[hidden].any()
    assert not (patchify(filled, CELL)[hidden] == true[hidden]).any()


def test_it_compiles_to_one_graph_that_gives_the_same_loss():
    module = shake(build(SWIN, drop_path_rate=0.2)).train()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=False)
    for batch in (batch_of(4), batch_of(4, first=4)):
        with torch.compiler.set_stance("fail_on_recompile" if batch.positions[0] else "default"):
            assert compiled(batch).loss.item() == pytest.approx(module(batch).loss.item(), rel=1e-5)


def test_its_size_is_that_of_the_built_module_and_a_plan_is_told_it():
    config, objective = read_encoder(SWIN), SimMIMConfig(mask_size=8)
    module, with_labels = build(SWIN), measured_size(config, SupervisedConfig())
    assert count_parameters(config, objective, 10) == sum(p.numel() for p in module.parameters())
    with FlopCounterMode(display=False) as counter:
        module(batch_of(1)).loss.backward()
    assert training_flops(config, objective, 10) == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert measured_size(config, objective)["kept"] > with_labels["kept"]  # every cell's pixels, not a class


@pytest.mark.parametrize("arguments", [{}, {"depths": [1, 1, 1], "num_heads": [1, 2, 4]}], ids=str)
def test_the_pixels_of_a_token_are_known_without_the_network(arguments):
    config = read_encoder(SWIN | {"arguments": SWIN["arguments"] | arguments, "image_size": 32})
    assert config.swin_cell_size == build_timm_network(config, 0).feature_info[-1]["reduction"]
    assert read_encoder({"name": "timm:swin_base_patch4_window7_224"}).swin_cell_size == 32


@pytest.mark.parametrize(
    ("objective", "encoder", "said"),
    [
        ({"mask_size": 16}, {}, "mask_size 16 must be a multiple of the 32 pixels .* last stage and a divisor"),
        ({}, {"image_size": 208}, "a divisor of both sides of encoder.image_size 208"),
        ({"mask_size": 64}, {"image_size": 64}, "hides all of 1 squares"),
        ({}, {"arguments": {"depths": 2}}, "arguments patch_size 4, depths 2: a Swin takes"),
    ],
)
def test_squares_that_do_not_fit_a_swin_are_refused_by_the_key(objective, encoder, said):
    raw = {"name": "timm:swin_base_patch4_window7_224"}
    assert SimMIMConfig().problem(read_encoder(raw), 1) is None
    with pytest.raises(ValueError, match=said):
        raise ValueError(SimMIMConfig(**objective).problem(read_encoder(raw | encoder), 1))
