"""The masked autoencoder: what is its own beside what holds for every objective."""

import torch

from models.build import build_objective
from models.config import DecoderConfig, EncoderConfig
from models.objective_config import MaskedAutoencoderConfig
from models.objectives.batch import Batch
from models.patches import patchify
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
