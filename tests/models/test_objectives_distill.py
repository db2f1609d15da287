"""Distillation: its losses are DeiT's, its teacher is frozen and sees images as it was trained on."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from models.build import build_objective
from models.encoders.config import EncoderConfig
from models.encoders.vit import build_encoder, encode_visible, timm_architecture
from models.objectives.batch import Batch
from models.objectives.config import DistillConfig, SupervisedConfig
from models.objectives.distill import Distillation
from models.objectives.teacher import Teacher
from models.weights.loading import load_encoder_weights
from pipeline.config.plan import count_parameters, training_flops

SMALL = {"name": "vit_ti16", "image_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
PLAIN = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "student_mean": (0.5, 0.4, 0.3), "student_std": (0.2,) * 3}


def teacher_of(classes: int = 5, **normalised) -> Teacher:
    torch.manual_seed(3)
    network = build_encoder(EncoderConfig(**SMALL, drop_path_rate=0.3), classes)
    torch.nn.init.normal_(network.head.weight, std=0.5)
    return Teacher(network, classes, (16, 16), **PLAIN | normalised)


def distillation(teacher: Teacher | None = None, encoder: dict = {}, **settings) -> Distillation:
    config = DistillConfig(teacher="timm:any", **settings)
    return build_objective(
        config, EncoderConfig(**SMALL | encoder), num_classes=5, seed=0, teacher=teacher or teacher_of()
    )  # fmt: skip


def batch_of(count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(count, 3, 16, 16, generator=generator), torch.arange(count) % 5
    return Batch(images, labels, torch.arange(count))


def spread_out(module: Distillation) -> Distillation:
    torch.manual_seed(1)
    torch.nn.init.normal_(module.encoder.head.weight, std=0.5)
    return module


def test_soft_distillation_is_the_divergence_at_a_temperature_times_its_square():
    module, batch = spread_out(distillation(distillation="soft", label_weight=0.0, temperature=2.0)).eval(), batch_of()
    ours, theirs = module.encoder(batch.images).double() / 2, module.teacher(batch.images).double() / 2
    literal = (theirs.softmax(1) * (theirs.softmax(1).log() - ours.softmax(1).log())).sum(1) * 4
    torch.testing.assert_close(module(batch).losses, literal.float().detach())
    assert not module(batch).sums


def test_hard_distillation_and_labels_are_weighted_as_in_equation_3():
    module, batch = spread_out(distillation(label_smoothing=0.1)).eval(), batch_of()
    logits = module.encoder(batch.images)
    label = F.cross_entropy(logits, batch.labels, label_smoothing=0.1)
    teacher = F.cross_entropy(logits, module.teacher(batch.images).argmax(1))
    outcome = module(batch)
    assert outcome.loss.item() == pytest.approx((0.5 * label + 0.5 * teacher).item(), rel=1e-6)
    assert outcome.sums["accuracy"] == (logits.argmax(1) == batch.labels).sum()


def test_mixed_images_have_both_labels_and_one_word_of_the_teacher():
    module, batch = spread_out(distillation()).eval(), batch_of()
    weights = torch.linspace(0, 1, 8)
    mixed = batch._replace(mixed_labels=batch.labels.flip(0), mix_weights=weights)
    logits = module.encoder(batch.images)
    first, second = (F.cross_entropy(logits, one, reduction="none") for one in (batch.labels, batch.labels.flip(0)))
    teacher = F.cross_entropy(logits, module.teacher(batch.images).argmax(1), reduction="none")
    torch.testing.assert_close(
        module(mixed).losses, (0.5 * (weights * first + (1 - weights) * second) + 0.5 * teacher).detach()
    )


def test_without_labels_none_is_read_and_the_head_has_the_teachers_classes():
    module = distillation(teacher_of(9), label_weight=0.0)
    assert not module.config.reads_labels and distillation().config.reads_labels
    assert module.encoder.num_classes == 9
    unlabelled = batch_of()._replace(labels=torch.full((8,), -1))
    assert module(unlabelled).loss.item() == pytest.approx(math.log(9), abs=1e-5)  # a head at zero, whatever is said


def test_a_teacher_sees_images_normalised_and_sized_as_it_was_trained_on():
    pixels = torch.rand(2, 3, 24, 24)
    here, there = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.25, 0.3]]), torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    as_here, as_there = ((pixels - mean) / std for mean, std in (one.view(2, 3, 1, 1) for one in (here, there)))
    names = ("mean", "std", "student_mean", "student_std")
    teacher = teacher_of(**dict(zip(names, map(tuple, (*there.tolist(), *here.tolist())), strict=True)))
    seen = F.interpolate(as_there, (16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher(as_here), teacher.network(seen), atol=1e-4, rtol=1e-4)


def test_a_teacher_is_frozen_whatever_it_is_and_no_part_of_the_module():
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=5)  # with batch norms
    module, batch = distillation(Teacher(network, 5, (32, 32), **PLAIN)), batch_of()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    module.train()
    module(batch).loss.backward()
    assert not network.training and all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any("teacher" in name or "network" in name for name in module.state_dict())
    assert module.place_teacher(torch.device("cpu"), torch.bfloat16) == {}
    assert next(network.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{}, {"distillation": "soft", "label_weight": 0.0}], ids=str)
def test_every_parameter_learns_it_overfits_and_a_batch_is_its_halves(settings):
    module, batch = spread_out(distillation(encoder={"drop_path_rate": 0.2}, **settings)).train(), batch_of()
    halves = [Batch(*(part[s] for part in batch[:3])) for s in (slice(0, 4), slice(4, 8))]
    assert module(batch).loss.item() == pytest.approx(sum(module(half).loss.item() for half in halves) / 2, rel=1e-5)
    optimizer, losses = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0), []
    for _ in range(120):
        outcome = module(batch)
        optimizer.zero_grad()
        outcome.loss.backward()
        assert all(parameter.grad.any() for parameter in module.parameters())
        optimizer.step()
        losses.append(outcome.loss.item())
    agree = 0.7 if not settings else 0.55  # two targets that differ cannot both be met
    assert losses[-1] < agree * losses[0]


def test_it_compiles_to_one_graph():
    module, batch = spread_out(distillation()), batch_of()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert compiled(batch).loss.item() == pytest.approx(module(batch).loss.item(), rel=1e-6)


def test_the_plan_counts_a_teacher_that_is_a_plain_vit_and_the_head_that_it_gives():
    encoder, teacher = EncoderConfig(**SMALL), EncoderConfig(**SMALL | {"depth": 4})
    config = DistillConfig(teacher="x", teacher_encoder=teacher, teacher_classes=9, label_weight=0.0)
    built = build_encoder(teacher, 9)
    size = config.size(encoder, 0)
    assert size.teacher_parameters == sum(p.numel() for p in built.parameters())
    module = build_objective(
        config, encoder, num_classes=0, seed=0, teacher=Teacher(built, 9, (16, 16), **PLAIN)
    )  # fmt: skip
    assert count_parameters(encoder, config, 0) == sum(p.numel() for p in module.parameters())
    assert training_flops(encoder, config, 0) == 6 * size.macs + 2 * size.teacher_macs > 0


def test_a_distillation_token_learns_from_the_teacher_and_the_class_token_from_labels():
    module, batch = distillation(encoder={"distillation_token": True}), batch_of()
    torch.nn.init.normal_(module.encoder.head.weight, std=0.5)
    torch.nn.init.normal_(module.encoder.head_dist.weight, std=0.5)
    tokens = module.encoder.forward_features(batch.images)
    label = F.cross_entropy(module.encoder.head(tokens[:, 0]), batch.labels)
    teacher = F.cross_entropy(module.encoder.head_dist(tokens[:, 1]), module.teacher(batch.images).argmax(1))
    outcome = module(batch)
    assert outcome.loss.item() == pytest.approx((0.5 * label + 0.5 * teacher).item(), rel=1e-6)
    assert outcome.sums["accuracy"] == (module.encoder.eval()(batch.images).argmax(1) == batch.labels).sum()
    outcome.loss.backward()
    assert all(parameter.grad.any() for parameter in module.parameters())
    assert (
        DistillConfig(teacher="x", label_weight=0.0).problem(token_config(), 0).startswith("objective.label_weight 0")
    )


def token_config() -> EncoderConfig:
    return EncoderConfig(**SMALL, distillation_token=True)


def test_an_encoder_with_a_distillation_token_is_timms_own_and_counted():
    config = token_config()
    name, arguments = timm_architecture(config)
    ours, theirs = build_encoder(config, 5).eval(), timm.create_model(name, num_classes=5, **arguments).eval()
    assert type(theirs).__name__ == "VisionTransformerDistilled"
    for head in (ours.head, ours.head_dist):
        assert not head.weight.any()
        torch.nn.init.normal_(head.weight)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(ours(images), theirs(images))
    seen = encode_visible(ours, images, torch.arange(16).expand(2, -1))
    torch.testing.assert_close(seen, theirs.forward_features(images))
    assert count_parameters(config, SupervisedConfig(), 5) == sum(p.numel() for p in ours.parameters())
    fresh = build_encoder(config, 7)
    report = load_encoder_weights(fresh, ours.state_dict(), head=False)
    assert not report.missing and torch.equal(fresh.dist_token, ours.dist_token) and not fresh.head_dist.weight.any()
