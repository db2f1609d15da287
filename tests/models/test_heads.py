"""Heads of probes: what they compute, against literal forms of it, and which encoders they read."""

import pytest
import torch
from torch import Tensor, nn

from models.encoders.config import EncoderConfig
from models.encoders.head_config import AttentiveHeadConfig, LinearBatchNormHeadConfig
from models.encoders.heads import AttentiveHead, BatchNorm
from models.encoders.timm_config import read_encoder
from models.objectives.config import SupervisedConfig
from models.weights.loading import load_encoder_weights
from tests.models.objective_cases import CLASSES, SMALL, batch_of, build, shake

HEADS = {
    "batchnorm": LinearBatchNormHeadConfig(), "attentive": AttentiveHeadConfig(),
    "without MLP": AttentiveHeadConfig(mlp_ratio=0),
}  # fmt: skip
ENCODERS = (
    {}, {"pooling": "mean"}, {"class_token": False, "pooling": "mean"}, {"register_tokens": 2},
    {"positions": "rotary"}, {"positions": "relative_shared", "pooling": "mean"},
)  # fmt: skip


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("encoder", ENCODERS, ids=str)
def test_a_head_reads_any_plain_encoder_is_as_large_as_the_plan_says_and_learns_all_of_it(head, encoder):
    config, encoder = SupervisedConfig(head=head), EncoderConfig(**SMALL | encoder)
    assert config.problem(encoder, 0) is None
    module = build(config, encoder)
    assert sum(parameter.numel() for parameter in module.parameters()) == config.size(encoder, CLASSES).parameters
    shake(module).train()(batch_of(6)).loss.backward()
    assert all(parameter.grad.any() for parameter in module.encoder.head.parameters())


def test_batch_normalisation_is_torchs_own_without_scale_and_shift():
    torch.manual_seed(0)
    ours, theirs = BatchNorm(5), nn.BatchNorm1d(5, affine=False, eps=1e-6)
    for count in (4, 9, 2):
        features = torch.randn(count, 5) * 3 + 1
        torch.testing.assert_close(ours(features), theirs(features))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(features), theirs.eval()(features))


def test_a_cast_of_the_module_leaves_running_statistics_in_float32():
    norm = BatchNorm(5)
    norm(torch.randn(64, 5))
    before = norm.running_mean.clone()
    half = norm.to(torch.bfloat16)
    assert half.running_mean.dtype == torch.float32 and torch.equal(half.running_mean, before)
    assert half(torch.randn(4, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def literal_attentive(head: AttentiveHead, patches: Tensor) -> Tensor:
    """One image's scores: a softmax per attention head, written out."""
    normed, width = head.norm_tokens(patches), patches.shape[1] // head.num_heads
    query, keys, values = head.to_query(head.query[0, 0]), head.to_keys(normed), head.to_values(normed)
    parts = []
    for start in range(0, patches.shape[1], width):
        part = slice(start, start + width)
        weights = (keys[:, part] @ query[part] / width**0.5).softmax(dim=0)
        parts.append(weights @ values[:, part])
    pooled = head.query[0, 0] + head.project(torch.cat(parts))
    return head.linear(pooled + head.mlp(pooled))


def test_the_attentive_head_is_cross_attention_of_a_learned_query_over_the_patches_alone():
    module = shake(build(SupervisedConfig(head=AttentiveHeadConfig()), register_tokens=1)).eval()
    tokens = torch.randn(2, 2 + 16, 48)
    expected = torch.stack([literal_attentive(module.encoder.head, one[2:]) for one in tokens])
    torch.testing.assert_close(module.encoder.forward_head(tokens), expected, rtol=1e-4, atol=1e-4)
    changed = tokens.clone()
    changed[:, :2] = 0  # class and register tokens
    assert torch.equal(module.encoder.forward_head(changed), module.encoder.forward_head(tokens))


def test_a_head_of_a_probe_reads_no_other_network_and_no_representation():
    swin = read_encoder({"name": "timm:swin_tiny_patch4_window7_224"})
    for head in HEADS.values():
        assert "reads a plain ViT" in SupervisedConfig(head=head).problem(swin, 0)
        representation = EncoderConfig(**SMALL | {"representation": True})
        assert "encoder.representation" in SupervisedConfig(head=head).problem(representation, 0)
    distilled = EncoderConfig(**SMALL | {"distillation_token": True})
    assert "set encoder.distillation_token to false" in SupervisedConfig(head=AttentiveHeadConfig()).problem(
        distilled, 0
    )
    assert SupervisedConfig().problem(swin, 0) is None


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_model_with_a_probes_head_is_started_from_without_it(head):
    probe = build(SupervisedConfig(head=head))
    fresh = build(SupervisedConfig()).encoder
    report = load_encoder_weights(fresh, probe.state_dict(), head=False)
    assert not report.missing and not report.unexpected
    assert {name.removeprefix("encoder.") for name in report.left_out} == {
        f"head.{name}" for name in probe.encoder.head.state_dict()
    }
    assert not fresh.head.weight.any() and torch.equal(fresh.norm.weight, probe.encoder.norm.weight)
