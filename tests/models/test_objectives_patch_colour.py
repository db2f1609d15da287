"""The ViT paper's masked patch prediction: what is corrupted, by what, and which colour is asked for."""

import math
import re

import pytest
import torch

from models.encoders.config import EncoderConfig
from models.encoders.patches import patchify, unpatchify
from models.masked.corruption import corrupt_patches
from models.objectives.config import PatchColourConfig
from pipeline.config.training import PretrainConfig
from pipeline.training.loop import initial_module
from tests.models.objective_cases import MEAN, SMALL, STD, batch_of, build, shake
from tests.recipes import load_recipe

PATCHES, IMAGES = 196, 2000


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 98), (0.15, 29), (1.0, 196)])
def test_exactly_the_said_share_of_every_image_is_corrupted(ratio, count):
    assert PatchColourConfig(corrupted_ratio=ratio).num_corrupted(PATCHES) == count
    corruption = corrupt_patches(torch.arange(64), PATCHES, count, seed=3)
    assert corruption.corrupted.shape == (64, count) and (corruption.corrupted.diff(dim=1) > 0).all()
    own = torch.arange(PATCHES).expand(64, -1)
    touched = corruption.masked | (corruption.source != own)
    outside = torch.ones(64, PATCHES, dtype=torch.bool).scatter(1, corruption.corrupted, False)
    assert not touched[outside].any()


def test_eight_of_ten_are_masked_one_is_another_patch_and_one_is_kept():
    corruption = corrupt_patches(torch.arange(IMAGES), PATCHES, 98, seed=5)
    swapped = corruption.source != torch.arange(PATCHES)
    assert not (corruption.masked & swapped).any()
    masked, swapped = corruption.masked.sum().item(), swapped.sum().item()
    corrupted = IMAGES * 98
    for number, share in ((masked, 0.8), (swapped, 0.1), (corrupted - masked - swapped, 0.1)):
        assert abs(number - corrupted * share) < 4 * math.sqrt(corrupted * share * (1 - share))


def test_every_other_patch_of_the_image_is_as_likely_to_stand_in():
    corruption = corrupt_patches(torch.arange(200_000), 4, 2, seed=1)
    counts = torch.zeros(4, 4)
    for patch in range(4):
        counts[patch] = torch.bincount(corruption.source[:, patch], minlength=4)
        counts[patch, patch] = 0
    expected = counts.sum() / 12
    others = counts[~torch.eye(4, dtype=torch.bool)]
    assert ((others - expected).abs() < 5 * expected.sqrt()).all()


def test_a_corruption_belongs_to_the_position_and_not_to_the_batch():
    whole = corrupt_patches(torch.arange(100, 116), 36, 18, seed=1)
    parts = [corrupt_patches(torch.arange(start, start + 4), 36, 18, seed=1) for start in (100, 104, 108, 112)]
    for number, tensor in enumerate(whole):
        assert torch.equal(tensor, torch.cat([part[number] for part in parts]))
    assert len({tuple(row) for row in whole.corrupted.tolist()}) == 16


def _literal_classes(image: torch.Tensor, patch: int, cells: int) -> list[list[int]]:
    """Pixel by pixel, of an image in 0..1."""
    classes = []
    for top in range(0, image.shape[1], patch):
        for left in range(0, image.shape[2], patch):
            of_patch, side = [], patch // cells
            for down in range(cells):
                for across in range(cells):
                    number = 0
                    for channel in range(image.shape[0]):
                        total = 0.0
                        for y in range(top + down * side, top + (down + 1) * side):
                            for x in range(left + across * side, left + (across + 1) * side):
                                total += image[channel, y, x].item()
                        number = number * 8 + min(7, int(total / side**2 * 8))
                    of_patch.append(number)
            classes.append(of_patch)
    return classes


@pytest.mark.parametrize(("target", "cells"), [("mean_colour", 1), ("colours_4x4", 4)])
def test_targets_are_those_of_a_literal_reading(target, cells):
    module = build(PatchColourConfig(target=target), image_size=[16, 24], patch_size=8)
    flat = torch.rand(2, 3, 1, 1, generator=torch.Generator().manual_seed(0))  # patches of every colour, not all grey
    pixels = (flat + 0.3 * torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    pixels[0, :, :8, :8], pixels[0, :, 8:, :8] = 0, 1  # black and white are the first class and the last
    normalised = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    classes = module.target(normalised)
    assert classes.tolist() == [_literal_classes(image, 8, cells) for image in pixels]
    assert classes[0, 0].unique().tolist() == [0] and classes[0, 3].unique().tolist() == [511]


def test_the_target_of_pixels_is_the_patch_as_it_is_normalised():
    module, batch = build(PatchColourConfig(target="pixels")), batch_of(2)
    assert torch.equal(module.target(batch.images), patchify(batch.images, 4))


@pytest.mark.parametrize("target", ["mean_colour", "colours_4x4", "pixels"])
def test_no_gradient_comes_from_patches_that_were_not_corrupted(target):
    module, outputs = shake(build(PatchColourConfig(target=target))), []
    module.encoder.norm.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    batch = batch_of(8)
    (gradient,) = torch.autograd.grad(module(batch).loss, outputs)
    reached = gradient[:, 1:].any(dim=2)
    corrupted = torch.zeros(8, 16, dtype=torch.bool).scatter(1, module.corruption(batch.positions).corrupted, True)
    assert torch.equal(reached, corrupted)
    assert not gradient[:, 0].any()


def test_a_masked_patch_is_seen_only_where_it_stands_in_for_another():
    module, batch = shake(build(PatchColourConfig())).eval(), batch_of(16)
    corruption = module.corruption(batch.positions)
    lent = torch.zeros(16, 16, dtype=torch.bool).scatter(1, corruption.source.masked_fill(corruption.masked, 0), True)
    hidden = corruption.masked & ~lent
    assert hidden.any()
    noise = torch.randn(16, 16, 48) * hidden.unsqueeze(-1)
    changed = batch.images + unpatchify(noise, 4, (4, 4))
    assert torch.equal(module.predict(batch.images, corruption), module.predict(changed, corruption))


def test_positions_are_not_corrupted_with_the_patches():
    """With every patch masked the tokens differ by their positions alone, and the predictions with them."""
    module = shake(build(PatchColourConfig(corrupted_ratio=1.0))).eval()
    positions = torch.arange(4)
    corruption = module.corruption(positions)
    corruption = corruption._replace(masked=torch.ones_like(corruption.masked))
    predicted = module.predict(torch.randn(4, 3, 16, 16), corruption)
    assert torch.equal(predicted[0], predicted[3])
    assert len({tuple(row) for row in predicted[0, :, 0].tolist()}) == 16


@pytest.mark.parametrize("target", ["mean_colour", "colours_4x4", "pixels"])
def test_a_reconstruction_paints_corrupted_patches_and_no_others(target):
    module, batch = shake(build(PatchColourConfig(target=target))), batch_of(4)
    filled, seen = module.reconstruct(batch.images, batch.positions)
    corrupted = torch.zeros(4, 16, dtype=torch.bool).scatter(1, module.corruption(batch.positions).corrupted, True)
    assert torch.equal(patchify(filled, 4)[~corrupted], patchify(batch.images, 4)[~corrupted])
    assert not patchify(seen, 4)[corrupted].any()
    if target == "pixels":
        return
    predicted = module.predict(batch.images, module.corruption(batch.positions)).argmax(dim=-1)
    assert torch.equal(module.target(filled)[corrupted], predicted.flatten(0, 1))


@pytest.mark.parametrize(
    ("encoder", "objective", "said"),
    [
        ({"channels": 4}, {}, "objective.target mean_colour .* encoder.channels is 4, at most 3; say pixels"),
        ({"patch_size": 2}, {"target": "colours_4x4"}, "needs an encoder.patch_size that 4 divides, not 2"),
        ({}, {"corrupted_ratio": 0.01}, "corrupts none of 16 patches"),
        ({"patch_size": 16}, {"corrupted_ratio": 1.0}, "the image is one patch"),
    ],
)
def test_an_encoder_that_cannot_learn_colours_is_refused_by_the_key(encoder, objective, said):
    config, problem = PatchColourConfig(**objective), EncoderConfig(**SMALL | encoder)
    assert re.search(said, config.problem(problem, 1))
    assert PatchColourConfig(target="pixels").problem(EncoderConfig(**SMALL, channels=4), 1) is None


def test_a_training_tells_it_what_the_images_were_normalised_by():
    config = load_recipe(PretrainConfig, "pretrain_patch_colour_debug", ["data.mean=[0.1,0.2,0.3]", "data.std=[1,2,3]"])
    module = initial_module(config, {"num_classes": 0})
    assert (module.mean, module.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
