"""The masked autoencoder: what is its own beside what holds for every objective."""

import pytest
import torch

from models.build import build_objective
from models.encoders.config import EncoderConfig
from models.encoders.patches import patchify
from models.masked.decoder_config import DecoderConfig
from models.masked.masking import block_patch_mask, num_visible_patches, random_patch_mask
from models.objectives.batch import Batch
from models.objectives.config import MaskedAutoencoderConfig
from pipeline.config.plan import count_parameters
from tests.models.objective_cases import SMALL

TINY = MaskedAutoencoderConfig(decoder=DecoderConfig(embed_dim=32, depth=1, num_heads=2))


def test_constant_patches_keep_the_normalised_target_finite():
    module = build_objective(TINY, EncoderConfig(**SMALL), num_classes=0, seed=0)
    black = Batch(torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    outcome = module(black)
    outcome.loss.backward()
    assert torch.isfinite(outcome.loss) and all(
        torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None
    )


def test_a_reconstruction_keeps_what_was_visible():
    module = build_objective(TINY, EncoderConfig(**SMALL), num_classes=0, seed=0)
    images, positions = torch.randn(2, 3, 16, 16), torch.arange(2)
    filled, seen = module.reconstruct(images, positions)
    hidden = module.mask(positions).masked
    assert torch.equal(patchify(filled, 4)[~hidden], patchify(images, 4)[~hidden])
    assert not patchify(seen, 4)[hidden].any()


def test_a_masked_autoencoder_learns_from_images_that_are_not_square():
    config = EncoderConfig(**SMALL | {"image_size": (16, 24), "channels": 4})
    objective = build_objective(TINY, config, num_classes=0, seed=0)
    images = torch.randn(2, 4, 16, 24)
    assert objective(Batch(images, torch.zeros(2), torch.arange(2))).loss.isfinite()
    filled, seen = objective.reconstruct(images, torch.arange(2))
    assert filled.shape == seen.shape == images.shape
    assert count_parameters(config, TINY, 0) == sum(p.numel() for p in objective.parameters())


@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.5), ((14, 14), 0.75), ((4, 6), 0.5), ((1, 12), 0.3)])
def test_blocks_hide_as_many_patches_in_every_image_as_single_ones_would(grid, ratio):
    patches = grid[0] * grid[1]
    mask = block_patch_mask(torch.arange(100, 164), grid, ratio, seed=3)
    visible = num_visible_patches(patches, ratio)
    assert mask.visible.shape == (64, visible) and (mask.visible.diff(dim=1) > 0).all()
    assert (mask.masked.sum(1) == patches - visible).all() and not mask.masked.gather(1, mask.visible).any()
    parts = [block_patch_mask(torch.arange(start, start + 16), grid, ratio, seed=3) for start in range(100, 164, 16)]
    assert torch.equal(mask.masked, torch.cat([part.masked for part in parts]))


def test_patches_hidden_in_blocks_have_neighbours_hidden_with_them():
    def neighbours(masked: torch.Tensor) -> float:
        """Share of the hidden patches whose right neighbour is hidden too."""
        grid = masked.view(-1, 14, 14)
        return (grid[:, :, :-1] & grid[:, :, 1:]).sum().item() / grid[:, :, :-1].sum().item()

    positions = torch.arange(500)
    blocks = block_patch_mask(positions, (14, 14), 0.5, seed=1).masked
    assert neighbours(blocks) > 0.75 > 0.55 > neighbours(random_patch_mask(positions, 196, 0.5, seed=1).masked)
    assert 0.02 < blocks.double().mean(0).min() and blocks.double().mean(0).max() < 0.9  # corners seldom
