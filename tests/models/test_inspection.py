"""What a ViT learned, in numbers that can be counted by hand, and pictures of every kind of plain ViT."""

import math

import numpy as np
import pytest
import torch
from timm.models import create_model
from timm.models.vision_transformer import VisionTransformer

from models.build import build_objective
from models.encoders.config import EncoderConfig
from models.inspection.attention import (
    attention_distance_picture,
    attention_rollout,
    heads_picture,
    mean_attention_distance,
    patch_distances,
    readout_attention,
    rollout_picture,
)
from models.inspection.attention_weights import attention_by_block
from models.inspection.display import NothingToDraw, display_pixels
from models.inspection.features import feature_components, features_picture, patch_features
from models.inspection.filters import filter_components, filters_picture, patch_filters
from models.inspection.panels import Panel, Scale, panel_sheet
from models.inspection.positions import position_similarity, positions_picture
from models.inspection.reconstructions import fill_in, patches_touched, reconstruction_sheet
from models.objectives.config import MaskedAutoencoderConfig

TINY = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}
KINDS = {
    "plain": {},
    "normalised queries and keys": {"qk_norm": True},
    "registers": {"reg_tokens": 4},
    "registers without positions": {"reg_tokens": 4, "no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "one channel": {"in_chans": 1},
    "five channels": {"in_chans": 5},
}


def vit(size=(16, 24), **arguments) -> VisionTransformer:
    """A small ViT with weights that are not all alike: attention is not uniform."""
    torch.manual_seed(0)
    encoder = create_model("vit_tiny_patch16_224", img_size=size, **TINY | arguments).eval()
    for block in encoder.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return encoder


def images_for(encoder: VisionTransformer, count: int = 2) -> torch.Tensor:
    size = [grid * patch for grid, patch in zip(encoder.patch_embed.grid_size, (4, 4), strict=True)]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, encoder.patch_embed.proj.in_channels, *size, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attention_is_the_softmax_of_scaled_products_of_queries_and_keys(kind):
    encoder = vit(**KINDS[kind])
    images = images_for(encoder)
    attention = attention_by_block(encoder, images)
    tokens = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images)))
    for block, weights in zip(encoder.blocks, attention, strict=True):
        qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 2, 12))  # (B, L, 3, heads, d)
        for image in range(2):
            for head in range(2):
                queries, keys = block.attn.q_norm(qkv[image, :, 0, head]), block.attn.k_norm(qkv[image, :, 1, head])
                literal = (queries @ keys.T / math.sqrt(12)).softmax(dim=-1)
                assert torch.allclose(weights[image, head], literal, atol=1e-6)
        tokens = block(tokens)
    assert max(weights.amax().item() for weights in attention) > 0.2, "the test would not see a transposition"


@torch.no_grad()
def test_relative_biases_are_in_the_attention():
    torch.manual_seed(0)
    encoder = create_model("vit_relpos_small_patch16_224", img_size=16, **TINY, global_pool="avg").eval()
    images = images_for(encoder)
    block = encoder.blocks[0]
    torch.nn.init.normal_(block.attn.rel_pos.mlp.fc2.weight)
    tokens = encoder.patch_embed(images)
    queries, keys, _ = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    literal = (queries @ keys.transpose(-2, -1) / math.sqrt(12) + block.attn.rel_pos.get_bias()).softmax(dim=-1)
    assert torch.allclose(attention_by_block(encoder, images)[0], literal, atol=1e-6)
    with pytest.raises(NothingToDraw, match="no position embedding"):
        position_similarity(encoder)


@torch.no_grad()
def test_looking_at_attention_leaves_the_encoder_as_it_was():
    encoder = vit()
    images, before = images_for(encoder), [block.attn.fused_attn for block in encoder.blocks]
    output = encoder(images)
    attention_by_block(encoder, images)
    assert [block.attn.fused_attn for block in encoder.blocks] == before
    assert not any(block.attn.attn_drop._forward_pre_hooks for block in encoder.blocks)
    assert torch.equal(encoder(images), output)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet10t"])
def test_an_encoder_that_is_no_plain_vit_is_refused_in_one_line(name):
    encoder = create_model(name, pretrained=False).eval()
    for look in (attention_rollout, mean_attention_distance, patch_features):
        with pytest.raises(NothingToDraw, match=rf"^{type(encoder).__name__} has no .*$"):
            look(encoder, torch.zeros(1, 3, 224, 224))
    for draw in (position_similarity, *([] if name.startswith("swin") else [patch_filters])):
        with pytest.raises(NothingToDraw, match=type(encoder).__name__):
            draw(encoder)


def test_differential_attention_is_refused_in_one_line():
    encoder = create_model("vit_tiny_patch16_224", img_size=16, **TINY, attn_layer="diff").eval()
    with pytest.raises(NothingToDraw, match="DiffAttention"):
        attention_by_block(encoder, images_for(encoder))


@pytest.mark.parametrize("kind", ["plain", "registers", "no class token"])
def test_attention_distance_equals_a_loop_over_pairs_of_patches(kind):
    encoder = vit(**KINDS[kind])
    images, prefix = images_for(encoder), encoder.num_prefix_tokens
    distances = mean_attention_distance(encoder, images)
    weights = attention_by_block(encoder, images)[1]
    total = 0.0
    for image in range(2):
        for query in range(24):
            row = weights[image, 1, prefix + query, prefix:]
            reach = [4 * math.dist(divmod(query, 6), divmod(key, 6)) for key in range(24)]
            total += sum(w * r for w, r in zip((row / row.sum()).tolist(), reach, strict=True))
    assert distances.shape == (3, 2) and distances[1, 1].item() == pytest.approx(total / 48, rel=1e-4)


def test_attention_that_is_spread_evenly_reaches_the_mean_distance_of_patches():
    encoder = vit()
    for block in encoder.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
    even = patch_distances(encoder).mean()
    assert torch.allclose(mean_attention_distance(encoder, images_for(encoder)), even.expand(3, 2), rtol=1e-4)


@pytest.mark.parametrize("kind", ["registers", "no class token"])
def test_rollout_multiplies_the_blocks_with_half_of_each_token_its_own(kind):
    encoder = vit(**KINDS[kind])
    images, prefix = images_for(encoder), encoder.num_prefix_tokens
    blocks = [weights.mean(1)[1].double() for weights in attention_by_block(encoder, images)]
    first, second, third = (0.5 * weights + 0.5 * torch.eye(len(weights)) for weights in blocks)
    flow = third @ second @ first
    assert torch.allclose(flow.sum(1), torch.ones(len(flow)).double())
    row = flow[0] if prefix else flow.mean(0)
    assert torch.allclose(attention_rollout(encoder, images)[1].flatten().double(), row[prefix:], atol=1e-6)


def test_the_read_out_is_the_class_tokens_row_or_the_patches_mean():
    encoder = vit(reg_tokens=2)
    weights = attention_by_block(encoder, images_for(encoder))[-1]
    assert torch.equal(readout_attention(encoder, images_for(encoder)).flatten(2), weights[:, :, 0, 3:])
    encoder = vit(class_token=False, global_pool="avg")
    weights = attention_by_block(encoder, images_for(encoder))[-1]
    assert torch.allclose(readout_attention(encoder, images_for(encoder)).flatten(2), weights.mean(2))


def test_filter_components_are_orthonormal_and_in_the_order_of_their_share():
    encoder = vit()
    filters, shares = filter_components(encoder, 48)
    flat = filters.flatten(1).double()[:23]
    assert torch.allclose(flat @ flat.T, torch.eye(23).double(), atol=1e-5)
    assert (shares.diff() <= 0).all() and shares.sum().item() == pytest.approx(1, abs=1e-5)
    centred = patch_filters(encoder).flatten(1).double()
    centred = centred - centred.mean(0)
    explained = (centred @ flat[0]).square().sum() / centred.square().sum()
    assert shares[0].item() == pytest.approx(explained.item(), rel=1e-5)
    assert patch_filters(encoder).shape == (24, 3, 4, 4)


@pytest.mark.parametrize("kind", ["plain", "registers", "registers without positions", "no class token"])
def test_position_similarity_compares_patches_and_no_prefix_token(kind):
    encoder = vit(**KINDS[kind])
    table = encoder.pos_embed[0, -24:].detach()
    similarity = position_similarity(encoder)
    expected = torch.cosine_similarity(table[9], table[17], dim=0)
    assert similarity.shape == (4, 6, 4, 6)
    assert similarity[1, 3, 2, 5].item() == pytest.approx(expected.item(), abs=1e-5)
    assert similarity[1, 3, 1, 3].item() == pytest.approx(1, abs=1e-5)


def test_sine_cosine_positions_are_the_more_alike_the_nearer():
    encoder = build_objective(
        MaskedAutoencoderConfig(), EncoderConfig(name="vit_ti16", positions="sincos2d"), num_classes=0, seed=0
    ).encoder
    similarity = position_similarity(encoder)
    assert (similarity[7, 7, 7, 7:].diff() < 0).all() and (similarity[7, 7, 7:, 7].diff() < 0).all()


def test_feature_colours_are_the_first_three_components_over_all_images():
    directions = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    amounts = torch.rand(2, 5, 6, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([9.0, 3.0, 1.0])
    values, shares = feature_components(amounts @ directions[:3])
    assert values.shape == (2, 5, 6, 3) and values.min() == 0 and values.max() == 1
    for component in range(3):
        correlation = np.corrcoef(amounts[..., component].flatten(), values[..., component].flatten())[0, 1]
        assert abs(correlation) > 0.98
    assert shares.sum().item() == pytest.approx(1, abs=1e-5) and (shares.diff() < 0).all()


def test_features_that_are_all_alike_are_grey():
    values, shares = feature_components(torch.ones(1, 2, 2, 2))
    assert (values == 0.5).all() and (shares == 0).all() and values.shape == (1, 2, 2, 3)


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_patch_features_are_normalised_wherever_timm_keeps_the_norm(pooling):
    encoder = vit(global_pool=pooling, reg_tokens=2)
    features = patch_features(encoder, images_for(encoder))
    assert features.shape == (2, 4, 6, 24)
    assert torch.allclose(features.mean(-1), torch.zeros(2, 4, 6), atol=1e-5)


@pytest.mark.parametrize("kind", [{}, {"reg_tokens": 2, "in_chans": 5}, {"class_token": False, "in_chans": 1}])
def test_every_picture_is_drawn_and_nothing_of_it_is_clipped(kind):
    encoder = vit(**kind, global_pool="token" if kind.get("class_token", True) else "avg")
    images = images_for(encoder)
    shown = [display_pixels(image, (0.5,) * len(image), (0.25,) * len(image)) for image in images]
    names, token = ["a.png", "a/very/long/path/of/an/image/b.png"], encoder.cls_token is not None
    pictures = [
        filters_picture(encoder),
        positions_picture(encoder),
        attention_distance_picture(mean_attention_distance(encoder, images), encoder),
        heads_picture(readout_attention(encoder, images), shown, names, class_token=token),
        rollout_picture(attention_rollout(encoder, images), shown, names, class_token=token),
        features_picture(feature_components(patch_features(encoder, images)), shown, names),
    ]
    for picture in pictures:
        pixels = np.asarray(picture)
        assert pixels.std() > 5 and picture.mode == "RGB"
        edges = [pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]]
        assert all((edge == 255).all() for edge in edges)


def test_a_sheet_keeps_the_ratio_of_its_panels_and_the_colours_of_its_images():
    red = np.zeros((10, 30, 3))
    red[:, :, 0] = 1
    sheet = np.asarray(panel_sheet([[Panel(red), Panel(np.eye(3))]], title="t", scale=Scale("s", 0, 1)))
    rows, columns = np.nonzero((sheet == (255, 0, 0)).all(axis=2))
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(3, rel=0.1)


def masked_autoencoder(normalise_target: bool = True):
    config = {"name": "vit_ti16", "image_size": (16, 24), "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    objective = {"normalise_target": normalise_target, "decoder": {"embed_dim": 16, "depth": 1, "num_heads": 2}}
    return build_objective(
        MaskedAutoencoderConfig.model_validate({"kind": "mae"} | objective), EncoderConfig(**config), num_classes=0,
        seed=0,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("normalise_target", [True, False])
def test_what_is_filled_in_owes_nothing_to_the_covered_pixels(normalise_target):
    objective = masked_autoencoder(normalise_target)
    covered = torch.zeros(16, 24, dtype=torch.bool)
    covered[5:9, 10:15] = True  # rows 1 and 2 of patches, columns 2 and 3
    masked = patches_touched(covered, 4)
    assert masked.nonzero().flatten().tolist() == [8, 9, 14, 15]
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    changed = images.clone()
    changed[:, :, 4:12, 8:16] = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    filled, seen = fill_in(objective, images, masked)
    again, _ = fill_in(objective, changed, masked)
    assert torch.equal(filled, again)
    hidden = torch.zeros(16, 24, dtype=torch.bool)
    hidden[4:12, 8:16] = True
    assert torch.equal(filled[:, :, ~hidden], images[:, :, ~hidden]) and not seen[:, :, hidden].any()
    assert filled[:, :, hidden].std() > 0


def test_brightness_that_training_normalised_away_comes_from_the_patches_around():
    objective = masked_autoencoder()
    images = torch.full((1, 3, 16, 24), 0.7)
    masked = torch.zeros(24, dtype=torch.bool)
    masked[8] = True
    filled, _ = fill_in(objective, images, masked)
    assert torch.allclose(filled, images, atol=0.01)


@pytest.mark.parametrize("hidden", [0, 24])
def test_a_mask_that_hides_all_or_nothing_is_refused(hidden):
    masked = torch.zeros(24, dtype=torch.bool)
    masked[:hidden] = True
    with pytest.raises(NothingToDraw, match=f"{hidden} of 24 patches are hidden"):
        fill_in(masked_autoencoder(), torch.zeros(1, 3, 16, 24), masked)


def test_a_reconstruction_sheet_keeps_the_ratio_of_the_images_and_the_mode_of_the_objective():
    objective = masked_autoencoder().train()
    sheet = reconstruction_sheet(objective, torch.randn(2, 3, 16, 24), (0.5,) * 3, (0.2,) * 3, cell_pixels=148)
    assert sheet.size == (3 * 148, 20 + 2 * 100) and objective.training
