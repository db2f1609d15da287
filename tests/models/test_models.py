"""Encoder, masks, patches and objectives: what must hold whatever the size."""

import math

import pytest
import torch
from timm.models import create_model

from models.encoders.config import EncoderConfig
from models.encoders.patches import patchify, unpatchify
from models.encoders.positions import resample_position_embedding, sincos_position_embedding
from models.encoders.vit import build_encoder, encode_visible, timm_architecture
from models.masked.counts import patches_of_share
from models.masked.masking import num_visible_patches, random_patch_mask
from models.objectives.config import SupervisedConfig
from models.randomness import position_bits, position_uniform
from models.weights.loading import WeightsError, load_encoder_weights
from pipeline.config.plan import count_parameters

SMALL = {"name": "vit_ti16", "image_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.mark.parametrize(("height", "width", "patch"), [(8, 8, 2), (8, 12, 4), (6, 4, 2)])
def test_unpatchify_undoes_patchify_also_on_images_that_are_not_square(height, width, patch):
    images = torch.randn(2, 3, height, width)
    patches = patchify(images, patch)
    assert patches.shape == (2, height * width // patch**2, patch * patch * 3)
    assert torch.equal(unpatchify(patches, patch, (height // patch, width // patch)), images)
    assert torch.equal(patches[0, 1], images[0, :, :patch, patch : 2 * patch].permute(1, 2, 0).flatten())


def test_a_share_of_patches_is_what_its_digits_say():
    for patches in range(1, 300):
        for hundredths in range(1, 100):
            assert patches_of_share(patches, hundredths / 100) == patches * hundredths // 100


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
def test_a_mask_hides_the_same_number_of_patches_in_every_image(ratio):
    mask = random_patch_mask(torch.arange(64), 49, ratio, seed=3)
    visible = num_visible_patches(49, ratio)
    assert visible == 49 - int(49 * ratio)
    assert (mask.masked.sum(1) == 49 - visible).all() and mask.visible.shape == (64, visible)
    assert not mask.masked.gather(1, mask.visible).any()
    assert (mask.visible.diff(dim=1) > 0).all()


def test_a_mask_belongs_to_the_position_and_not_to_the_batch():
    whole = random_patch_mask(torch.arange(100, 116), 36, 0.75, seed=1)
    parts = [random_patch_mask(torch.arange(start, start + 4), 36, 0.75, seed=1) for start in (100, 104, 108, 112)]
    assert torch.equal(whole.masked, torch.cat([part.masked for part in parts]))
    other = random_patch_mask(torch.arange(100, 116), 36, 0.75, seed=2)
    assert not torch.equal(whole.masked, other.masked)
    assert len({tuple(row) for row in whole.masked.tolist()}) == 16


def test_every_patch_is_hidden_about_as_often_as_the_ratio_says():
    share = random_patch_mask(torch.arange(20_000), 16, 0.75, seed=5).masked.double().mean(0)
    assert (share - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 20_000)


def test_position_bits_are_uniform_and_differ_by_purpose():
    draws = position_uniform(0, "a", torch.arange(10_000), 8)
    assert 0 <= draws.min() and draws.max() < 1
    assert abs(draws.mean().item() - 0.5) < 0.005 and abs(draws.var().item() - 1 / 12) < 0.002
    assert not torch.equal(position_bits(0, "a", torch.arange(8), 2), position_bits(0, "b", torch.arange(8), 2))
    assert len(position_bits(0, "a", torch.arange(1000), 16).unique()) == 16_000


def test_the_encoder_never_sees_hidden_pixels():
    encoder = build_encoder(EncoderConfig(**SMALL)).eval()
    images, mask = torch.randn(3, 3, 16, 16), random_patch_mask(torch.arange(3), 16, 0.75, seed=0)
    noise = patchify(torch.randn(3, 3, 16, 16), 4) * mask.masked.unsqueeze(-1)
    changed = images + unpatchify(noise, 4, (4, 4))
    assert torch.equal(encode_visible(encoder, images, mask.visible), encode_visible(encoder, changed, mask.visible))


def test_encoding_all_patches_as_visible_is_timms_own_forward():
    encoder = build_encoder(EncoderConfig(**SMALL)).eval()
    images = torch.randn(2, 3, 16, 16)
    tokens = encode_visible(encoder, images, torch.arange(16).expand(2, -1))
    assert torch.allclose(tokens, encoder.forward_features(images), atol=1e-6)


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_timm_alone_builds_the_same_network_from_the_exported_arguments(pooling):
    config = EncoderConfig(**SMALL, pooling=pooling)
    name, arguments = timm_architecture(config)
    ours, theirs = build_encoder(config, 5).eval(), create_model(name, num_classes=5, **arguments).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(ours(images), theirs(images))


def test_sincos_positions_are_fixed_distinct_and_zero_for_the_prefix():
    table = sincos_position_embedding(48, (4, 5), 1)
    assert table.shape == (1, 21, 48) and not table[0, 0].any()
    assert len({tuple(row) for row in table[0, 1:].tolist()}) == 20
    assert not build_encoder(EncoderConfig(**SMALL, positions="sincos2d")).pos_embed.requires_grad


def test_resampling_positions_to_the_same_grid_changes_nothing():
    table = torch.randn(1, 17, 48)
    assert torch.equal(resample_position_embedding(table, (4, 4), 1), table)
    larger = resample_position_embedding(table, (7, 21), 1)
    assert larger.shape == (1, 1 + 7 * 21, 48) and torch.equal(larger[:, :1], table[:, :1])


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.model.", "_orig_mod.encoder."])
def test_weights_load_whatever_their_prefix_and_every_tensor_is_accounted_for(prefix):
    source, target = build_encoder(EncoderConfig(**SMALL), 3), build_encoder(EncoderConfig(**SMALL), 5)
    torch.nn.init.normal_(source.cls_token)
    report = load_encoder_weights(target, {prefix + n: t for n, t in source.state_dict().items()}, head=False)
    assert torch.equal(source.cls_token, target.cls_token)
    assert not report.missing and not report.resized and not report.unexpected
    assert len(report.loaded) == len(target.state_dict()) - 2


def test_positions_are_resampled_for_a_larger_image():
    source = build_encoder(EncoderConfig(**SMALL))
    target = build_encoder(EncoderConfig(**SMALL | {"image_size": 24}))
    assert load_encoder_weights(target, source.state_dict(), head=False).resized == ("pos_embed",)


@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
def test_an_input_that_is_not_square_has_rows_and_columns_of_its_own(positions):
    config = EncoderConfig(**SMALL | {"image_size": [16, 24], "positions": positions, "channels": 13})
    assert (config.input_size, config.grid, config.num_patches) == ((16, 24), (4, 6), 24)
    assert EncoderConfig.model_validate_json(config.model_dump_json()) == config
    encoder = build_encoder(config, 3)
    assert encoder.pos_embed.shape == (1, 25, 48) and encoder(torch.zeros(2, 13, 16, 24)).shape == (2, 3)
    if positions == "sincos2d":
        assert torch.equal(encoder.pos_embed, sincos_position_embedding(48, (4, 6), 1))
    assert count_parameters(config, SupervisedConfig(), 3) == sum(p.numel() for p in encoder.parameters())


def test_positions_of_another_shape_of_grid_are_resampled_even_where_the_patches_are_as_many():
    tall = build_encoder(EncoderConfig(**SMALL | {"image_size": [32, 8], "positions": "sincos2d"}))
    wide = build_encoder(EncoderConfig(**SMALL | {"image_size": [8, 32]}))
    assert load_encoder_weights(wide, tall.state_dict(), head=False, grid=(8, 2)).resized == ("pos_embed",)
    again = build_encoder(EncoderConfig(**SMALL | {"image_size": [32, 8]}))
    assert load_encoder_weights(again, tall.state_dict(), head=False, grid=(8, 2)).resized == ()
    square = build_encoder(EncoderConfig(**SMALL | {"image_size": 16}))
    assert load_encoder_weights(square, tall.state_dict(), head=False, grid=(8, 2)).resized == ("pos_embed",)


def test_weights_that_do_not_fit_are_refused():
    encoder = build_encoder(EncoderConfig(**SMALL))
    with pytest.raises(WeightsError, match="no block"):
        load_encoder_weights(encoder, {"conv1.weight": torch.zeros(3)}, head=False)
    wider = build_encoder(EncoderConfig(**SMALL | {"embed_dim": 96}))
    with pytest.raises(WeightsError, match="shape"):
        load_encoder_weights(encoder, wider.state_dict(), head=False)


def test_an_encoder_is_named_our_way_or_timms():
    assert EncoderConfig(name="vit_l16").model_dump(exclude={"name"}) == EncoderConfig(
        name="vit_large_patch16_224"
    ).model_dump(exclude={"name"})
    with pytest.raises(ValueError, match="name `vit_x16` is no encoder's; there are: vit_ti16"):
        EncoderConfig(name="vit_x16")
    with pytest.raises(ValueError, match="image_size 30 is not a multiple"):
        EncoderConfig(name="vit_s16", image_size=30)
