"""Token merging: lossless where patches are alike, nothing lost where they are not, and the paper's matching."""

import pytest
import torch

from models.encoders.config import EncoderConfig
from models.encoders.merging import MergingEncoder, merge_similar, merged_per_block
from models.encoders.vit import build_encoder

SMALL = {"name": "vit_ti16", "image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


def encoder_of(**settings):
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(**SMALL | settings), 5).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder


@pytest.mark.parametrize("settings", [{}, {"pooling": "mean"}, {"pooling": "mean", "register_tokens": 2}])
@torch.no_grad()
def test_patches_that_are_all_alike_lose_nothing_by_merging(settings):
    encoder = encoder_of(positions="none", **settings)
    images = torch.rand(2, 3, 1, 1).expand(-1, -1, 32, 32)
    merged = MergingEncoder(encoder, keep=0.25)(images)
    torch.testing.assert_close(merged, encoder(images), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_other_patches_change_the_outputs_and_where_none_is_merged_nothing_does():
    encoder, images = encoder_of(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(MergingEncoder(encoder, keep=0.99)(images), encoder(images), atol=1e-5, rtol=1e-5)
    assert (MergingEncoder(encoder, keep=0.25)(images) - encoder(images)).abs().max() > 1e-3


def test_as_many_tokens_are_left_as_were_asked_for():
    for patches, depth, keep in ((196, 12, 0.5), (16, 3, 0.25), (16, 2, 0.99), (9, 1, 0.6), (196, 12, 0.01)):
        merged = merged_per_block(patches, depth, keep)
        left = patches
        for count in merged:
            assert 0 <= count <= left // 2
            left -= count
        assert len(merged) == depth
        if keep > 0.2:  # of less, late blocks would have to merge more than half
            assert left == max(1, round(keep * patches)), (patches, depth, keep)


def test_the_most_alike_become_one_by_their_weights_and_the_class_token_stays():
    tokens = torch.arange(5.0).view(1, 5, 1).expand(1, 5, 2).clone()  # class token, then four patches
    size = torch.tensor([1.0, 1, 3, 1, 1]).view(1, 5, 1)
    metric = torch.tensor([[9.0, 9], [1, 0.1], [1, 0], [0, 1], [-1, 0]]).unsqueeze(0)  # patch 0 is most like patch 1
    found, counts = merge_similar(tokens, size, metric, 1, 1)
    assert found[0, :, 0].tolist() == [0.0, 3.0, (1 * 1 + 3 * 2) / 4, 4.0]
    assert counts[0, :, 0].tolist() == [1.0, 1.0, 4.0, 1.0]


@torch.no_grad()
def test_merging_keeps_the_weighted_sum_of_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens, metric = torch.randn(3, 18, 8, generator=generator), torch.randn(3, 18, 4, generator=generator)
    size = torch.randint(1, 5, (3, 18, 1), generator=generator).float()
    found, counts = merge_similar(tokens, size, metric, 6, 2)
    assert found.shape == (3, 12, 8)
    torch.testing.assert_close((found * counts).sum(1), (tokens * size).sum(1))
    torch.testing.assert_close(found[:, :2], tokens[:, :2])


def test_tokens_tied_to_their_places_are_not_merged():
    with pytest.raises(ValueError, match="relative or rotary"):
        MergingEncoder(encoder_of(positions="rotary"), keep=0.5)
