"""CAPI: masks, balanced clusters, what learns from what, and its arithmetic."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.build import build_objective, checkpoint_activations
from models.encoders.config import EncoderConfig
from models.encoders.patches import patchify, unpatchify
from models.masked.clustering import balanced_assignments
from models.masked.masking import choose_masked, inverse_block_mask, num_visible_patches
from models.objectives.batch import Batch, Progress
from models.objectives.capi import Capi
from models.objectives.config import CapiConfig
from pipeline.config.plan import count_parameters, training_flops

SMALL = {"name": "vit_ti16", "image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
TINY = {"num_prototypes": 32, "predictor_depth": 2}


def capi(seed: int = 0, encoder: dict = {}, **settings) -> Capi:
    return build_objective(CapiConfig(**TINY | settings), EncoderConfig(**SMALL | encoder), num_classes=0, seed=seed)


def batch_of(count: int, size: int = 32) -> Batch:
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.full((count,), -1), torch.arange(count))


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (6, 10), (1, 16)])
@pytest.mark.parametrize("ratio", [0.25, 0.65, 0.9])
def test_an_inverse_block_leaves_one_rectangle_of_as_many_patches_in_every_image(grid, ratio):
    mask = inverse_block_mask(torch.arange(200), grid, ratio, seed=1)
    visible = num_visible_patches(grid[0] * grid[1], ratio)
    assert mask.visible.shape == (200, visible) and (mask.visible.diff(dim=1) > 0).all()
    assert (~mask.masked).sum(1).tolist() == [visible] * 200 and not mask.masked.gather(1, mask.visible).any()
    shown = (~mask.masked).view(200, *grid)
    height, width = (shown.any(dim=d).sum(1) for d in (2, 1))
    assert (height * width - visible < width).all()  # its last row alone may have holes
    ratios = height / width
    assert ((ratios > 0.4) & (ratios < 2.6)).all() or grid[0] == 1
    if grid == (14, 14) and ratio == 0.65:
        assert ratios.min() < 0.6 and ratios.max() > 1.7


def test_an_inverse_block_hides_every_patch_as_often_and_belongs_to_the_position():
    whole = inverse_block_mask(torch.arange(20_000), (4, 6), 0.65, seed=5)
    share = whole.masked.double().mean(0)
    assert (share - int(24 * 0.65) / 24).abs().max() < 5 * math.sqrt(0.65 * 0.35 / 20_000)
    assert torch.equal(inverse_block_mask(torch.arange(7, 9), (4, 6), 0.65, seed=5).masked, whole.masked[7:9])
    assert not torch.equal(inverse_block_mask(torch.arange(99), (4, 6), 0.65, seed=6).masked, whole.masked[:99])


def test_the_predicted_patches_are_hidden_ones_and_each_as_often():
    positions = torch.arange(5_000)
    mask = inverse_block_mask(positions, (4, 6), 0.65, seed=5)
    chosen = choose_masked(mask, 4, positions, seed=5)
    assert chosen.shape == (5_000, 4) and (chosen.diff(dim=1) > 0).all() and mask.masked.gather(1, chosen).all()
    counts = torch.bincount(chosen.flatten(), minlength=24) / 5_000
    assert (counts - 4 / 24).abs().max() < 0.03
    assert CapiConfig().num_predicted(16) == 1 and CapiConfig().num_predicted(256) == 8


def test_assignments_are_those_of_a_literal_sinkhorn_at_each_position_by_itself():
    scores = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(1)) / 0.06
    ours = balanced_assignments(scores, 3)
    for position in range(3):
        matrix = scores[:, position].double().exp()  # (B, P)
        for _ in range(3):
            matrix = matrix / matrix.sum(dim=0, keepdim=True)
            matrix = matrix / matrix.sum(dim=1, keepdim=True)
        torch.testing.assert_close(ours[:, position], matrix.float(), atol=1e-6, rtol=1e-4)


def test_balanced_assignments_have_the_marginals_of_sinkhorn_at_every_position():
    positions = torch.arange(4.0).view(1, 4, 1) * torch.randn(8, generator=torch.Generator().manual_seed(3))
    scores = torch.randn(64, 4, 8, generator=torch.Generator().manual_seed(2)) + 3 * positions  # a collapse by position
    assignments = balanced_assignments(scores, 100)
    torch.testing.assert_close(assignments.sum(dim=2), torch.ones(64, 4))
    torch.testing.assert_close(assignments.sum(dim=0), torch.full((4, 8), 64 / 8), atol=1e-3, rtol=0)
    assert scores.softmax(dim=2).sum(dim=0).max() > 30  # which a softmax would not mend


def test_scores_far_below_the_others_leave_no_assignment_empty():
    scores = torch.zeros(4, 1, 3)
    scores[0] = -500.0  # exp(-500) is nothing in float32
    torch.testing.assert_close(balanced_assignments(scores, 3), torch.full((4, 1, 3), 1 / 3), atol=1e-4, rtol=0)


def test_the_student_never_sees_hidden_pixels_and_the_teacher_sees_them_all():
    module, batch = capi().eval(), batch_of(3)
    mask, predicted = module.mask(batch.positions)
    noise = patchify(torch.randn(3, 3, 32, 32), 8) * mask.masked.unsqueeze(-1)
    changed = batch.images + unpatchify(noise, 8, (4, 4))
    assert torch.equal(module.predict(batch.images, mask, predicted), module.predict(changed, mask, predicted))
    assert not torch.equal(module.cluster(batch.images)[0], module.cluster(changed)[0])


def test_the_clustering_head_alone_learns_from_its_loss_and_all_else_from_the_predictions():
    module, batch = capi(), batch_of(8)
    scores, assignments = module.cluster(batch.images)
    assert not assignments.requires_grad
    scores.sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == {
        "clustering.weight", "clustering.bias",
    }  # fmt: skip
    module.zero_grad()
    module.predict(batch.images, *module.mask(batch.positions)).square().sum().backward()
    without = {name for name, p in module.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {"clustering.weight", "clustering.bias"}


def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none():
    module = capi(encoder={"positions": "sincos2d", "drop_path_rate": 0.2}, predictor_drop_path=0.2)
    module(batch_of(16)).loss.backward()
    assert not [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
    assert not any("teacher" in name for name in [*module.state_dict(), *dict(module.named_modules())])


def test_a_first_prediction_loss_is_about_the_logarithm_of_the_number_of_prototypes():
    module = capi(num_prototypes=512)
    outcome = module(batch_of(8))
    assert outcome.sums["prediction_loss"].item() / 8 == pytest.approx(math.log(512), abs=1.0)
    assert outcome.loss.item() == pytest.approx(sum(outcome.sums.values()).item() / 8, rel=1e-6)
    assert outcome.losses.mean().item() == pytest.approx(outcome.loss.item(), rel=1e-6)


def test_it_overfits_a_batch_of_eight_with_its_teacher_following():
    module, batch, losses = capi(num_prototypes=16), batch_of(8), []
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=0)
    for _ in range(120):
        outcome = module(batch)
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in module.teacher.named_parameters():
                parameter.lerp_(module.encoder.get_parameter(name), 0.01)
        losses.append(outcome.loss.item())
    assert losses[-1] < 0.55 * losses[0]


def test_placing_the_teacher_makes_it_what_the_encoder_is_in_its_own_precision():
    module = capi(encoder={"positions": "sincos2d"})
    with torch.no_grad():
        for parameter in module.encoder.parameters():
            parameter.add_(1.0)
    placed = module.place_teacher(torch.device("cpu"), torch.bfloat16)
    for name, parameter in module.encoder.named_parameters():
        assert torch.equal(placed[f"encoder.{name}"], parameter.bfloat16())
    module.train()
    assert not module.teacher.training


def test_the_momentum_goes_from_one_to_its_least_over_the_warm_up_and_back_by_a_cosine():
    momentum = capi().teacher_momentum
    assert momentum(Progress(0.0, 0.1)) == 1.0
    assert momentum(Progress(0.05, 0.1)) == pytest.approx(0.9995)
    assert momentum(Progress(0.1, 0.1)) == pytest.approx(0.999)
    middle, end = 0.5 * (1 + math.cos(0.4 * math.pi)), 0.5 * (1 + math.cos(0.8 * math.pi))
    assert momentum(Progress(0.55, 0.1)) == pytest.approx(1 - 0.001 * middle)
    assert momentum(Progress(1.0, 0.1)) == pytest.approx(1 - 0.001 * end)
    assert momentum(Progress(0.0, 0.0)) == pytest.approx(0.999)
    assert capi(momentum_cosine_share=1.0).teacher_momentum(Progress(1.0, 0.1)) == pytest.approx(1.0)


def test_it_compiles_to_one_graph_and_computes_the_same_with_activations_computed_again():
    batch, plain, other = batch_of(4), capi(predictor_drop_path=0.3), capi(predictor_drop_path=0.3)
    checkpoint_activations(other)
    losses = [torch.compile(plain, backend="eager", fullgraph=True)(batch).loss, other(batch).loss]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for (name, one), two in zip(plain.named_parameters(), other.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, two.grad, msg=name)


@pytest.mark.parametrize(
    ("settings", "encoder"),
    [
        (TINY, SMALL | {"image_size": 16, "patch_size": 4, "positions": "sincos2d"}),
        ({"num_prototypes": 1024}, {"name": "vit_s16"}),
        (TINY, {"name": "vit_b14", "depth": 2, "image_size": (112, 224)}),
    ],
    ids=str,
)
def test_counted_parameters_and_arithmetic_agree_with_the_built_module(settings, encoder):
    objective, config = CapiConfig(**settings), EncoderConfig(**encoder)
    module = build_objective(objective, config, num_classes=0, seed=0)
    assert count_parameters(config, objective, 0) == sum(p.numel() for p in module.parameters())
    size = objective.size(config, 0)
    assert size.teacher_parameters == sum(p.numel() for p in module.teacher.parameters())
    images = torch.randn(1, 3, *config.input_size)
    with FlopCounterMode(display=False) as counter:
        module(Batch(images, torch.tensor([-1]), torch.arange(1))).loss.backward()
    assert training_flops(config, objective, 0) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize(
    ("settings", "encoder", "stage", "named"),
    [
        ({}, SMALL, 3, "zero.stage 3"),
        ({"mask_ratio": 0.01}, SMALL, 1, "objective.mask_ratio 0.01 hides none of 16"),
        ({}, SMALL | {"embed_dim": 54}, 1, "embed_dim 54"),
        ({}, SMALL, 2, None),
    ],
)
def test_what_it_cannot_train_is_refused_in_one_line(settings, encoder, stage, named):
    problem = CapiConfig(**settings).problem(EncoderConfig(**encoder), stage)
    assert (problem is None) if named is None else (named in problem and "\n" not in problem)


def test_few_images_to_balance_clusters_over_are_said_to_be_few():
    assert "8 are few" in CapiConfig().caution(8) and CapiConfig().caution(16_384) is None
