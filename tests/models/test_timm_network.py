"""Any image model of timm learns with labels; what timm or the config does not have is refused in one line."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.build import build_objective, checkpoint_activations
from models.encoders.timm_config import TimmEncoderConfig, encoder_of_timm, read_encoder
from models.encoders.timm_network import build_timm_network, head_names, layers_of
from models.measured_size import measured_size
from models.objectives.batch import Batch
from models.objectives.config import SupervisedConfig
from models.weights.loading import load_encoder_weights
from pipeline.config.optimizer import AdamWConfig
from pipeline.config.plan import count_parameters, training_flops
from pipeline.errors import InputError
from pipeline.training.optimizer import parameter_groups

CLASSES = 5
TINY = [
    {"name": "timm:swin_tiny_patch4_window7_224", "image_size": 32, "arguments": {"patch_size": 2, "window_size": 4,
     "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}},
    {"name": "timm:convnext_atto", "image_size": 32, "arguments": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}},
    {"name": "timm:mobilevit_xxs", "image_size": 32},
    {"name": "timm:pvt_v2_b0", "image_size": 32, "arguments": {"depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16],
     "num_heads": [1, 1, 2, 2]}},
    {"name": "timm:twins_svt_small", "image_size": 64, "arguments": {"depths": [1, 1, 1, 1], "wss": [2, 2, 2, 2],
     "embed_dims": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2], "mlp_ratios": [2, 2, 2, 2]}},
    {"name": "timm:coatnet_pico_rw_224", "image_size": 64, "arguments": {"depths": [1, 1, 1, 1], "stem_width": [8, 8],
     "embed_dim": [32, 32, 32, 32]}},
    {"name": "timm:convit_tiny", "image_size": 32, "arguments": {"depth": 2, "local_up_to_layer": 1, "embed_dim": 12,
     "num_heads": 2}},
    {"name": "timm:vit_tiny_r_s16_p8_224", "image_size": 64, "arguments": {"depth": 2, "embed_dim": 24,
     "num_heads": 2}},
    {"name": "timm:resnet10t", "image_size": 32, "arguments": {"channels": [8, 8, 16, 16], "output_stride": 8}},
]  # fmt: skip
BY_NAME = {raw["name"].removeprefix("timm:").partition("_")[0]: raw for raw in TINY}


def batch_of(config: TimmEncoderConfig, count: int = 4) -> Batch:
    images = torch.randn(count, config.channels, *config.input_size, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(count) % CLASSES, torch.arange(count))


@pytest.mark.parametrize("raw", TINY, ids=BY_NAME)
def test_a_network_of_timms_makes_a_supervised_step(raw):
    config = read_encoder(raw | {"drop_path_rate": 0.1})
    module = build_objective(SupervisedConfig(), config, num_classes=CLASSES, seed=0).train()
    groups = parameter_groups(module, AdamWConfig(learning_rate=1e-3, layer_decay=0.9, weight_decay=0.1), config.depth)
    torch.nn.init.normal_(module.encoder.get_classifier().weight, std=0.1)
    outcome = module(batch_of(config))
    outcome.loss.backward()
    assert outcome.loss.isfinite() and outcome.losses.shape == (4,)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained.values())
    assert sum(len(group["params"]) for group in groups) == len(trained)
    scales = {id(p): group["learning_rate_scale"] for group in groups for p in group["params"]}
    assert scales[id(module.encoder.get_classifier().weight)] == 1.0 and min(scales.values()) < 0.9


@pytest.mark.parametrize("name", ["swin", "convnext", "coatnet"])
def test_the_size_of_a_network_is_that_of_the_built_one(name):
    config, classes = read_encoder(BY_NAME[name]), 7
    size, network = measured_size(config, SupervisedConfig()), build_timm_network(config, classes)
    assert size["parameters"] + classes * size["parameters_per_class"] == sum(p.numel() for p in network.parameters())
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(3, 3, *config.input_size)).sum().backward()
    counted = size["flops"] + classes * size["flops_per_class"]
    assert counted == pytest.approx(counter.get_total_flops() / 3, rel=1e-3) and size["kept"] > 0


def test_a_plan_is_told_the_size_by_another_process_and_what_timm_does_not_have():
    config = read_encoder(BY_NAME["convnext"])
    size = measured_size(config, SupervisedConfig())
    assert count_parameters(config, SupervisedConfig(), 3) == size["parameters"] + 3 * size["parameters_per_class"]
    assert training_flops(config, SupervisedConfig(), 3) == size["flops"] + 3 * size["flops_per_class"]
    with pytest.raises(InputError, match="timm has no such network; near: .*convnext_atto"):
        count_parameters(read_encoder({"name": "timm:convnext_ato"}), SupervisedConfig(), 3)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"name": "timm:densenet121", "drop_path_rate": 0.1}, "has no drop path; set 0"),
        (BY_NAME["convnext"] | {"arguments": {"depth": 3}}, "does not take them.*'depth'"),
        (BY_NAME["vit"] | {"arguments": {"embed_dim": 25, "num_heads": 2}}, "of 64 pixels"),
    ],
)
def test_what_a_network_does_not_take_is_refused_in_one_line(raw, words):
    with pytest.raises(ValueError, match=words):
        build_timm_network(read_encoder(raw), CLASSES)


@pytest.mark.parametrize(
    ("name", "word", "nearest"),
    [
        ("timm:cvt_13", "CvT", "coat_lite_tiny"),
        ("timm:cmt_ti", "CMT", "coatnet_0_rw_224"),
        ("timm:shuffle_transformer_tiny", "Shuffle Transformer", "swin_tiny"),
        ("timm:naflexvit_base_patch16_gap", "several sizes", "vit_base_patch16_224"),
    ],
)
def test_a_network_that_timm_lacks_is_refused_with_the_nearest(name, word, nearest):
    with pytest.raises(ValueError, match=f"timm has no .*{word}.*nearest that it has: .*{nearest}"):
        read_encoder({"name": name})


def test_the_nearest_networks_that_are_named_exist():
    import timm

    from models.encoders.timm_config import ABSENT

    assert all(timm.is_model(name) for _, nearest in ABSENT.values() for name in nearest.split(", "))


def test_a_name_of_timms_is_a_plain_vit_where_it_is_one_and_says_its_size():
    assert encoder_of_timm("vit_base_patch16_384.augreg_in1k") == {"name": "vit_base_patch16_384"}
    assert encoder_of_timm("swin_base_patch4_window12_384.ms") == {"name": "timm:swin_base_patch4_window12_384"}
    assert read_encoder({"name": "timm:swin_base_patch4_window12_384"}).input_size == (384, 384)
    assert read_encoder({"name": "timm:convnext_tiny"}).input_size == (224, 224)
    config = read_encoder(BY_NAME["swin"])
    assert read_encoder(config.model_dump()) == config == read_encoder(config)


def test_weights_of_a_network_with_another_head_are_loaded_and_the_head_is_left_out():
    config = read_encoder(BY_NAME["swin"])
    torch.manual_seed(1)
    source, target = build_timm_network(config, 3), build_timm_network(config, CLASSES)
    weights = {f"encoder.{name}": tensor for name, tensor in source.state_dict().items()}
    report = load_encoder_weights(target, weights, head=False)
    assert head_names(target) == {"head.fc.weight", "head.fc.bias"} == set(report.left_out)
    assert not report.missing and not report.unexpected and len(report.loaded) == len(source.state_dict()) - 2
    name = "layers.1.blocks.0.attn.qkv.weight"
    assert torch.equal(target.get_parameter(name), source.get_parameter(name))


def test_dropout_of_attention_derives_from_the_samples_positions():
    raw = BY_NAME["vit"] | {"arguments": BY_NAME["vit"]["arguments"] | {"attn_drop_rate": 0.5}}
    module = build_objective(SupervisedConfig(), read_encoder(raw), num_classes=CLASSES, seed=0).train()
    torch.nn.init.normal_(module.encoder.head.weight)
    batch = batch_of(read_encoder(raw))
    losses = module(batch).losses
    assert torch.equal(module(batch).losses, losses)
    assert not torch.equal(module(batch._replace(positions=batch.positions + len(losses))).losses, losses)


def test_activations_of_a_network_whose_blocks_timm_does_not_compute_again_are_kept():
    module = build_objective(SupervisedConfig(), read_encoder(BY_NAME["twins"]), num_classes=CLASSES, seed=0)
    with pytest.raises(ValueError, match="timm's Twins has no blocks that are computed again"):
        checkpoint_activations(module)


def test_layers_go_from_the_stem_to_the_head():
    network = build_timm_network(read_encoder(BY_NAME["convnext"]), CLASSES)
    layers = layers_of(network)
    assert layers.keys() == dict(network.named_parameters()).keys()
    assert layers["stem.0.weight"] == 0 and layers["head.fc.weight"] == max(layers.values())


def test_norms_of_a_resnet_do_not_decay_and_learn_at_the_rate_of_their_layer():
    config = read_encoder(BY_NAME["resnet10t"])
    module = build_objective(SupervisedConfig(), config, num_classes=CLASSES, seed=0)
    groups = parameter_groups(module, AdamWConfig(learning_rate=1e-3, layer_decay=0.5, weight_decay=0.1), config.depth)
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    named = dict(module.named_parameters())
    assert all(of[id(p)]["weight_decay"] == (0.1 if p.ndim > 1 else 0) for p in named.values())
    rates = [of[id(named[f"encoder.{name}"])]["learning_rate_scale"] for name in
             ("conv1.0.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight", "fc.weight")]  # fmt: skip
    assert rates == sorted(set(rates)) and rates[-1] == 1.0
    assert of[id(named["encoder.layer4.0.bn1.weight"])]["learning_rate_scale"] == rates[2]


def test_operations_that_are_counted_and_those_of_the_formula_are_the_same_so_that_networks_compare():
    counted = measured_size(
        read_encoder({"name": "timm:vit_tiny_patch16_224", "image_size": 32, "arguments": {
            "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}}), SupervisedConfig()
    )  # fmt: skip
    formula = {"name": "vit_ti16", "image_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    assert counted["flops"] == pytest.approx(training_flops(read_encoder(formula), SupervisedConfig(), 0), rel=0.01)
