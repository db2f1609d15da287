"""Every option of a plain ViT: counted, exported, masked and dropped as it should be, whatever the combination."""

import pytest
import torch
from timm.models import create_model
from torch.utils.flop_counter import FlopCounterMode

from models.build import build_objective, checkpoint_activations
from models.encoders.config import EncoderConfig, inexpressible
from models.encoders.positions import sinusoidal_position_embedding, write_out_axes
from models.encoders.vit import encode_tokens, encode_visible, timm_architecture
from models.masked.decoder_config import DecoderConfig
from models.objectives.batch import Batch
from models.objectives.config import MaskedAutoencoderConfig, SupervisedConfig
from pipeline.config.plan import count_parameters, count_trained, training_flops
from pipeline.training.optimizer import decays, layer_of
from tests.models.encoders import OPTIONS, SMALL, encoder_of, images_of

CLASSES = 5
MAE = MaskedAutoencoderConfig(decoder=DecoderConfig(embed_dim=32, depth=1, num_heads=2))


def batch_of(config: EncoderConfig, count: int) -> Batch:
    return Batch(images_of(config, count), torch.arange(count) % CLASSES, torch.arange(count))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parameters_and_arithmetic_of_every_option_are_those_of_the_built_module(options):
    config = EncoderConfig(**SMALL | options)
    for objective in [SupervisedConfig()] if config.positions == "relative" or config.representation else [MAE]:
        module = build_objective(objective, config, num_classes=CLASSES, seed=0)
        assert count_parameters(config, objective, CLASSES) == sum(p.numel() for p in module.parameters())
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        assert count_trained(config, objective, CLASSES) == trained
        with FlopCounterMode(display=False) as counter:
            module(batch_of(config, 2)).loss.backward()
        assert 2 * training_flops(config, objective, CLASSES) == pytest.approx(counter.get_total_flops(), rel=0.06)


@pytest.mark.parametrize("options", [o for o in OPTIONS if not inexpressible(EncoderConfig(**SMALL | o))], ids=str)
def test_timm_alone_builds_the_same_network_from_the_exported_arguments(options):
    ours = encoder_of(options, CLASSES)
    name, arguments = timm_architecture(EncoderConfig(**SMALL | options))
    images, theirs = images_of(EncoderConfig(**SMALL | options)), create_model(name, num_classes=CLASSES, **arguments)
    expected = ours(images)
    write_out_axes(ours)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.eval()(images), expected)


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("positions") != "relative"], ids=str)
def test_patches_in_another_order_give_the_same_tokens_in_that_order(options):
    """So rotary angles, relative biases and tables follow the patch, and all patches together are timm's forward, with
    the norm that timm leaves to the head where the tokens are averaged."""
    config, encoder = EncoderConfig(**SMALL | options), encoder_of(options)
    images, prefix = images_of(config), config.num_prefix_tokens
    whole = encoder.fc_norm(encoder.forward_features(images))
    order = torch.stack([torch.randperm(config.num_patches) for _ in images])
    shuffled = encode_visible(encoder, images, order)
    again = shuffled[:, prefix:].gather(1, order.argsort(1).unsqueeze(-1).expand(-1, -1, config.embed_dim))
    assert torch.allclose(torch.cat([shuffled[:, :prefix], again], 1), whole, atol=2e-6)


def test_a_block_with_relative_positions_of_its_own_is_not_shown_some_patches():
    encoder = encoder_of({"positions": "relative"})
    with pytest.raises(ValueError, match="take relative_shared"):
        encode_tokens(encoder, torch.zeros(1, 3, 48), torch.tensor([[0, 5]]))


def test_recomputing_activations_changes_no_gradient_also_with_dropout():
    config = EncoderConfig(**SMALL, positions="rotary", dropout=0.2, drop_path_rate=0.2)
    gradients = []
    for recompute in (False, True):
        module = build_objective(MAE, config, num_classes=0, seed=0).train()
        if recompute:
            checkpoint_activations(module)
        module(batch_of(config, 4)).loss.backward()
        gradients.append(module.encoder.patch_embed.proj.weight.grad)
    assert torch.allclose(*gradients, atol=1e-7)


@pytest.mark.parametrize("positions", ["learned", "relative", "rotary"])
def test_dropout_belongs_to_the_position_and_not_to_the_batch(positions):
    config = EncoderConfig(**SMALL, dropout=0.3, positions=positions)
    module = build_objective(SupervisedConfig(), config, num_classes=CLASSES, seed=0).train()
    torch.nn.init.normal_(module.encoder.head.weight)
    whole = batch_of(config, 8)
    halves = [Batch(whole.images[s], whole.labels[s], whole.positions[s]) for s in (slice(0, 4), slice(4, 8))]
    parts = [module(half).loss.item() for half in halves]
    assert module(whole).loss.item() == pytest.approx(sum(parts) / 2, rel=1e-5)
    later = whole._replace(positions=whole.positions + 8)
    assert module(later).loss.item() != pytest.approx(module(whole).loss.item(), rel=1e-4)
    assert module.eval()(later).loss.item() == module(whole).loss.item()


def test_dropout_drops_its_share_and_keeps_the_mean():
    config = EncoderConfig(**SMALL, dropout=0.25)
    module = build_objective(SupervisedConfig(), config, num_classes=CLASSES, seed=0).train()
    module.coins.toss(torch.arange(64))
    layers = module.coins.dropouts
    assert len(layers) == 1 + 3 * config.depth  # positions; attention's projection, and both layers of the MLP
    dropped = [layer(torch.ones(64, 24, 48)) for layer in layers]
    for kept in dropped:
        assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
        assert kept.mean().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(dropped[1], dropped[2])


def test_learned_axes_give_each_patch_its_rows_and_its_columns_vector():
    encoder = encoder_of({"positions": "learned2d"})
    table = encoder.pos_embed[0, 1:].unflatten(0, (4, 6))
    assert not encoder.pos_embed[0, 0].any()
    assert (table[1, :, :24] == table[1, :1, :24]).all() and (table[:, 2, 24:] == table[:1, 2, 24:]).all()
    assert len({tuple(row) for row in table.flatten(0, 1).tolist()}) == 24


def test_sinusoidal_positions_are_those_of_the_transformer():
    table = sinusoidal_position_embedding(8, 5, 1)[0]
    assert not table[0].any() and table.shape == (6, 8)
    for position in range(5):
        for i in range(4):
            angle = torch.tensor(position / 10000 ** (2 * i / 8))
            assert table[1 + position, i].item() == pytest.approx(angle.sin().item(), abs=1e-6)
            assert table[1 + position, 4 + i].item() == pytest.approx(angle.cos().item(), abs=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_positions_biases_and_factors_are_not_decayed_and_lie_in_the_first_layer_or_their_block(options):
    module = build_objective(SupervisedConfig(), EncoderConfig(**SMALL | options), num_classes=CLASSES, seed=0)
    for name, parameter in module.named_parameters():
        matrix = parameter.ndim > 1 and name.endswith((".weight",)) and "norm" not in name
        assert decays(name, parameter) == matrix, name
        expected = 0 if any(w in name for w in ("pos_embed", "_token", "patch_embed", "shared_rel_pos")) else None
        expected = int(name.split(".")[2]) + 1 if ".blocks." in name else expected
        assert layer_of(name, 2) == (3 if expected is None else expected), name


def test_a_representation_is_a_tanh_before_the_head():
    encoder = encoder_of({"representation": True}, CLASSES)
    tokens = encoder.forward_features(images_of(EncoderConfig(**SMALL)))
    hidden = encoder.forward_head(tokens, pre_logits=True)
    dense = encoder.head_drop.fc
    assert torch.allclose(hidden, torch.tanh(tokens[:, 0] @ dense.weight.T + dense.bias), atol=1e-6)
    assert torch.allclose(encoder.forward_head(tokens), encoder.head(hidden))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_token": False}, "set pooling to mean"),
        ({"positions": "relative", "register_tokens": 1}, "has none; set 0"),
        ({"positions": "rotary", "activation": "gelu_tanh"}, "has gelu alone"),
        ({"positions": "rotary", "num_heads": 24}, "heads of a width that 4 divides, not 2"),
        ({"positions": "sincos2d", "embed_dim": 6}, "an embed_dim that 4 divides"),
    ],
)
def test_what_timms_classes_lack_is_refused_in_one_line(options, words):
    with pytest.raises(ValueError, match=words):
        EncoderConfig(**SMALL | options)


def test_two_thousand_million_parameters_are_planned():
    assert count_parameters(EncoderConfig(name="vit_2b14"), SupervisedConfig(), 1000) == pytest.approx(2.02e9, rel=0.01)
