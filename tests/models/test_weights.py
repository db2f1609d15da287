"""What is loaded into an encoder, by which rule, and that every tensor is accounted for."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor
from transformers import ViTConfig, ViTModel

from models.build import build_network, build_objective
from models.encoders.config import EncoderConfig
from models.encoders.positions import resample_position_embedding
from models.encoders.timm_config import read_encoder
from models.encoders.vit import build_encoder
from models.masked.decoder_config import DecoderConfig
from models.objectives.config import MaskedAutoencoderConfig
from models.weights.foreign import from_timm
from models.weights.layouts import HUGGING_FACE, TORCHVISION, VIT_PYTORCH, hugging_face_encoder
from models.weights.loading import LoadReport, WeightsError, load_encoder_weights
from pipeline.errors import InputError
from pipeline.registry.locate import locate_model
from tests.models.encoders import SMALL

SQUARE = SMALL | {"image_size": 16}


def loaded(source: dict[str, Tensor], *, head: bool = False, num_classes: int = 0, grid=None, **options):
    encoder = build_encoder(EncoderConfig(**SQUARE | options), num_classes)
    return encoder, load_encoder_weights(encoder, source, head=head, grid=grid)


def weights_of(num_classes: int = 0, **options) -> dict[str, Tensor]:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(**SQUARE | options), num_classes)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter)
    return encoder.state_dict()


def accounted(report: LoadReport) -> list[str]:
    return sorted(report.loaded + report.resized + report.unexpected + report.left_out)


def test_every_tensor_of_a_masked_autoencoder_is_accounted_for():
    objective = MaskedAutoencoderConfig(decoder=DecoderConfig(embed_dim=32, depth=1, num_heads=2))
    source = build_objective(objective, EncoderConfig(**SQUARE), num_classes=0, seed=0).state_dict()
    encoder, report = loaded(source, num_classes=3)
    assert report.loaded and not report.missing and not report.resized
    assert accounted(report) == sorted(name.removeprefix("encoder.") for name in source)
    assert all(name.startswith("decoder.") for name in report.unexpected)


def test_a_head_and_a_representation_are_left_out_where_a_fresh_head_is_wanted():
    source = weights_of(3, representation=True)
    _, report = loaded(source, num_classes=5)
    assert report.left_out == ("head.bias", "head.weight", "head_drop.fc.bias", "head_drop.fc.weight")
    assert accounted(report) == sorted(source) and "4 left out (head.bias" in str(report)


@pytest.mark.parametrize(("channels", "words"), [(1, "summed to 1"), (4, "repeated in their order to 4, times 3/4")])
def test_a_patch_embedding_of_three_channels_fits_others_by_a_rule_that_the_report_says(channels, words):
    source = weights_of()
    encoder, report = loaded(source, channels=channels)
    kernel, ours = source["patch_embed.proj.weight"], encoder.patch_embed.proj.weight
    assert report.resized == ("patch_embed.proj.weight",) and words in str(report)
    for channel in range(channels):
        expected = kernel.sum(1) if channels == 1 else kernel[:, channel % 3] * 3 / channels
        assert torch.allclose(ours[:, channel], expected, atol=1e-6)


def test_a_patch_embedding_of_other_channels_than_three_has_no_rule():
    with pytest.raises(WeightsError, match="patch_embed.proj.weight: shape"):
        loaded(weights_of(channels=13), channels=4)


@pytest.mark.parametrize(("image_size", "grid"), [(24, (6, 6)), ([16, 24], (4, 6)), (8, (2, 2))])
def test_positions_are_interpolated_as_timm_does_it_and_as_hugging_face_does_without_antialias(image_size, grid):
    """Hugging Face's interpolate_pos_encoding has no antialias; with it, torch's bicubic kernel is another one."""
    source = weights_of()
    encoder, report = loaded(source, image_size=image_size)
    assert report.resized == ("pos_embed",) and f"4 x 4 resampled to {grid[0]} x {grid[1]}" in str(report)
    table = source["pos_embed"]
    assert torch.equal(encoder.pos_embed, resample_abs_pos_embed(table, list(grid), num_prefix_tokens=1))
    theirs = ViTModel(
        ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, image_size=16, patch_size=4)
    )
    with torch.no_grad():
        theirs.embeddings.position_embeddings.copy_(table)
        expected = theirs.embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + grid[0] * grid[1], 48),
                                                              grid[0] * 4, grid[1] * 4)  # fmt: skip
    plain = resample_position_embedding(table, grid, 1, antialias=False)
    assert (plain - expected).abs().max() < 1e-5
    own = F.interpolate(
        table[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2), size=grid, mode="bicubic", antialias=True
    )
    assert torch.allclose(encoder.pos_embed[0, 1:], own[0].flatten(1).T, atol=1e-6)


@pytest.mark.parametrize("old_prefix", [{}, {"class_token": False, "pooling": "mean"}], ids=str)
def test_positions_behind_other_tokens_keep_those_of_the_patches(old_prefix):
    source = weights_of(**old_prefix)
    count = EncoderConfig(**SQUARE | old_prefix).num_prefix_tokens
    encoder, report = loaded(source, register_tokens=1, grid=(4, 4))
    assert torch.allclose(encoder.pos_embed[:, 2:], source["pos_embed"][:, count:])
    assert "pos_embed" in report.resized and f"behind 2 tokens, not {count}" in str(report)


@pytest.mark.parametrize("tokens", [{"register_tokens": 2}, {"distillation_token": True}], ids=str)
@pytest.mark.parametrize("image_size", [16, [8, 32]])
def test_weights_alone_say_by_their_tokens_where_the_positions_of_patches_begin(tokens, image_size):
    source = weights_of(**tokens)
    encoder, report = loaded(source, image_size=image_size)
    count, grid = EncoderConfig(**SQUARE | tokens).num_prefix_tokens, encoder.patch_embed.grid_size
    assert torch.equal(encoder.pos_embed[:, :1], source["pos_embed"][:, :1]) and "pos_embed" in report.resized
    expected = resample_abs_pos_embed(source["pos_embed"][:, count:], list(grid), num_prefix_tokens=0)
    assert torch.allclose(encoder.pos_embed[:, 1:], expected, atol=1e-6)


def test_learned_axes_and_relative_biases_are_interpolated():
    source = weights_of(positions="learned2d")
    encoder, report = loaded(source, positions="learned2d", image_size=[16, 24])
    assert report.resized == ("parametrizations.pos_embed.original1",)
    assert torch.equal(encoder.parametrizations.pos_embed.original0, source["parametrizations.pos_embed.original0"])
    source = weights_of(positions="relative_shared")
    encoder, report = loaded(source, positions="relative_shared", image_size=24)
    name = "shared_rel_pos.relative_position_bias_table"
    expected = resize_rel_pos_bias_table(source[name], (6, 6), (11 * 11 + 3, 3))
    assert report.resized == (name,) and torch.equal(encoder.shared_rel_pos.relative_position_bias_table, expected)


@pytest.mark.parametrize("positions", ["relative", "relative_shared"])
@pytest.mark.parametrize(("image_size", "grid"), [(16, (4, 4)), (16, None), (24, (4, 4))])
def test_relative_biases_go_with_and_without_those_of_a_class_token(positions, image_size, grid):
    without = {"class_token": False, "pooling": "mean"}
    for old, new in ((without, {}), ({}, without)):
        source = weights_of(positions=positions, **old)
        encoder, report = loaded(source, positions=positions, image_size=image_size, grid=grid, **new)
        (name, *_) = report.resized
        table, side = encoder.get_parameter(name), image_size // 4
        of_patches = resize_rel_pos_bias_table(source[name][:49], (side, side), ((2 * side - 1) ** 2, 3))
        assert torch.equal(table[: len(of_patches)], of_patches) and not table[len(of_patches) :].any()
        assert ("those of the class token zero" in str(report)) == (new == {})


def test_a_window_of_another_size_is_the_attentions_own_and_not_the_grid_of_patches():
    small = {"name": "timm:swin_tiny_patch4_window7_224", "image_size": 32}
    shape = {"embed_dim": 16, "depths": [1], "num_heads": [1], "patch_size": 2}
    source, target = (
        build_network(read_encoder(small | {"arguments": shape | {"window_size": window}})) for window in (7, 4)
    )  # fmt: skip
    report = load_encoder_weights(target, source.state_dict(), head=False)
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert report.resized == (name,)
    expected = resize_rel_pos_bias_table(source.get_parameter(name), (4, 4), (49, 1))
    assert torch.equal(target.get_parameter(name), expected)


def test_an_eps_that_the_weights_were_not_learned_with_is_said():
    _, report = loaded(from_timm(weights_of(), HUGGING_FACE))
    assert report.notes == ("LayerNorm eps is 1e-06, and weights of Hugging Face were learned with 1e-12",)


def test_weights_in_parts_are_not_loaded_into():
    encoder = build_encoder(EncoderConfig(**SQUARE))
    encoder.pos_embed.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(WeightsError, match="load before the engine takes the module"):
        load_encoder_weights(encoder, weights_of(), head=False)


@pytest.mark.parametrize("layout", [HUGGING_FACE, TORCHVISION, VIT_PYTORCH], ids=lambda layout: layout.name)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_weights_says_by_its_names_what_its_layout_needs(tmp_path, layout, suffix):
    source = weights_of(qkv_bias=layout is not VIT_PYTORCH)
    weights = {name: tensor.contiguous() for name, tensor in from_timm(source, layout).items()}
    path = tmp_path / f"weights{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save({"model": weights}, path)
    assert locate_model(str(path), tracking_uri="", home=tmp_path).settings == layout.settings


def test_a_network_of_hugging_faces_keeps_the_width_of_its_mlp():
    """120 / 88 times 88 is less than 120 in floating point."""
    config = {"model_type": "vit", "num_hidden_layers": 1, "num_attention_heads": 2}
    for width, hidden in ((88, 120), (152, 424), (768, 3072)):
        described = hugging_face_encoder(config | {"hidden_size": width, "intermediate_size": hidden}, [])
        assert EncoderConfig(**described).mlp_dim == hidden


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "dinov2"}, "model_type 'dinov2' is not read"),
        ({"model_type": "vit", "hidden_act": "relu"}, "hidden_act 'relu': timm's ViT has gelu"),
        ({"model_type": "vit"}, "hidden_size"),
    ],
)
def test_a_directory_of_hugging_faces_that_is_no_plain_vit_is_refused(tmp_path, config, words):
    import json

    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=words):
        locate_model(f"hf:{tmp_path}", tracking_uri="", home=tmp_path)
    with pytest.raises(InputError, match="say hf:"):
        locate_model(str(tmp_path), tracking_uri="", home=tmp_path)
