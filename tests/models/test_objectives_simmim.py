"""SimMIM: squares hidden whole, mask tokens in the encoder, and the error of hidden pixels alone."""

import pytest
import torch

from models.encoders.config import EncoderConfig
from models.encoders.patches import patchify
from models.masked.masking import square_mask
from models.objectives.config import SimMIMConfig
from tests.models.objective_cases import SMALL, batch_of, build, shake


@pytest.mark.parametrize(("grid", "side", "hidden"), [((14, 14), 2, 30), ((4, 6), 2, 4), ((6, 4), 1, 15)])
def test_squares_are_hidden_whole_and_as_many_in_every_image(grid, side, hidden):
    masked = square_mask(torch.arange(64), grid, side, hidden, seed=3)
    assert masked.shape == (64, grid[0] * grid[1]) and (masked.sum(1) == hidden * side**2).all()
    squares = masked.view(64, grid[0] // side, side, grid[1] // side, side).transpose(2, 3).flatten(3)
    assert torch.equal(squares.all(dim=3), squares.any(dim=3))
    assert len({tuple(row) for row in masked.tolist()}) > 10
    parts = [square_mask(torch.arange(start, start + 16), grid, side, hidden, seed=3) for start in range(0, 64, 16)]
    assert torch.equal(masked, torch.cat(parts))


@pytest.mark.parametrize(("ratio", "squares", "hidden"), [(0.6, 49, 30), (0.55, 100, 55), (0.1, 4, 1)])
def test_the_share_hidden_is_rounded_up(ratio, squares, hidden):
    assert SimMIMConfig(mask_ratio=ratio).num_hidden(squares) == hidden


def test_the_loss_is_the_mean_absolute_error_of_hidden_pixels():
    module, batch = shake(build(SimMIMConfig(mask_size=8))).eval(), batch_of(3)
    masked = module.mask(batch.positions)
    wrong = (module.predict(batch.images, masked) - patchify(batch.images, 4))[masked].abs()
    assert module(batch).loss.item() == pytest.approx(wrong.mean().item(), rel=1e-5)


def test_nothing_is_learned_from_patches_that_were_seen():
    module, batch, predicted = shake(build(SimMIMConfig(mask_size=8))), batch_of(3), []
    module.head.register_forward_hook(lambda layer, inputs, output: predicted.append(output))
    (gradient,) = torch.autograd.grad(module(batch).loss, predicted)
    assert torch.equal(gradient.any(dim=2), module.mask(batch.positions))


def test_a_reconstruction_keeps_what_was_visible():
    module, batch = shake(build(SimMIMConfig(mask_size=8), image_size=[16, 24])), batch_of(3, size=(16, 24))
    filled, seen = module.reconstruct(batch.images, batch.positions)
    hidden = module.mask(batch.positions)
    assert torch.equal(patchify(filled, 4)[~hidden], patchify(batch.images, 4)[~hidden])
    assert not patchify(seen, 4)[hidden].any()


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"mask_size": 6}, "mask_size 6 must be a multiple of encoder.patch_size 4"),
        ({"mask_size": 12}, "a divisor of both sides of encoder.image_size 16"),
        ({"mask_size": 8, "mask_ratio": 0.9}, "hides all of 4 squares"),
    ],
)
def test_squares_that_do_not_fit_are_refused_by_the_key(objective, said):
    assert said in SimMIMConfig(**objective).problem(EncoderConfig(**SMALL), 1)
    assert SimMIMConfig().problem(EncoderConfig(name="vit_b16"), 1) is None
