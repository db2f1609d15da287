"""Erasing and mixing of normalised batches: functions of positions, whatever the micro-batch, rank or device."""

import numpy as np
import pytest
import torch

from models.objectives.batch import Batch
from pipeline.config.augmentation import AugmentationConfig
from pipeline.views.erasing import erase
from pipeline.views.mixing import mix_batch

MIXES = [AugmentationConfig(mixup_alpha=0.8), AugmentationConfig(cutmix_alpha=1.0),
         AugmentationConfig(mixup_alpha=0.8, cutmix_alpha=1.0)]  # fmt: skip
ERASES = AugmentationConfig(erase_probability=0.5)


def batch_of(count: int, first: int = 40, size: tuple[int, int] = (12, 8), channels: int = 3) -> Batch:
    images = torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(count), torch.arange(first, first + count))


def part_of(batch: Batch, rows: slice) -> Batch:
    return Batch(*(tensor[rows].clone() for tensor in batch[:3]))


def erased(batch: Batch, config: AugmentationConfig = ERASES, seed: int = 1) -> torch.Tensor:
    return erase(batch._replace(images=batch.images.clone()), batch.positions.numpy(), config, seed).images


@pytest.mark.parametrize("config", MIXES)
def test_mixing_pairs_neighbours_whatever_the_micro_batch(config):
    whole = batch_of(8)
    parts = [part_of(whole, rows) for rows in (slice(0, 2), slice(2, 6), slice(6, 8))]
    mixed = mix_batch(whole, whole.positions.numpy(), config, seed=1)
    mixed_parts = [mix_batch(part, part.positions.numpy(), config, seed=1).images for part in parts]
    assert torch.equal(mixed.images, torch.cat(mixed_parts))
    assert mixed.mixed_labels.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert ((0 <= mixed.mix_weights) & (mixed.mix_weights <= 1)).all()
    assert not torch.equal(mix_batch(whole, whole.positions.numpy(), config, seed=2).images, mixed.images)


def test_mixup_is_the_weighted_sum_of_neighbours():
    batch = batch_of(6)
    mixed = mix_batch(batch, batch.positions.numpy(), MIXES[0], seed=0)
    weight = mixed.mix_weights.view(-1, 1, 1, 1)
    expected = weight * batch.images + (1 - weight) * batch.images[[1, 0, 3, 2, 5, 4]]
    torch.testing.assert_close(mixed.images, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cutmix_takes_a_box_of_the_partner_and_its_weight_is_the_share_of_pixels_kept(dtype):
    for position in range(0, 60, 2):
        images = torch.stack([torch.zeros(1, 16, 24), torch.ones(1, 16, 24)]).to(dtype)
        batch = batch_of(2, position)._replace(images=images)
        mixed = mix_batch(batch, batch.positions.numpy(), MIXES[1], seed=0)
        own, partners = mixed.images == batch.images, mixed.images == batch.images.flip(0)
        assert mixed.images.dtype == dtype and (own | partners).all()
        assert own[0].float().mean().item() == pytest.approx(mixed.mix_weights[0].item(), abs=1e-6)
        rows, columns = (~own[0, 0]).any(1).nonzero(), (~own[0, 0]).any(0).nonzero()
        if len(rows):
            assert (~own[0, 0])[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()


def test_with_both_on_each_pair_tosses_a_coin():
    batch = batch_of(200)
    mixed = mix_batch(batch, batch.positions.numpy(), MIXES[2], seed=0)
    untouched = (mixed.images == batch.images).flatten(1).any(1)
    cut = ((mixed.images == batch.images) | (mixed.images == batch.images[torch.arange(200) ^ 1])).flatten(1).all(1)
    assert untouched.any() and 70 < cut.sum() < 130


def test_an_erased_batch_belongs_to_its_positions_and_not_to_the_batch():
    whole = batch_of(40)
    parts = [erased(part_of(whole, rows)) for rows in (slice(0, 1), slice(1, 30), slice(30, 40))]
    assert torch.equal(erased(whole), torch.cat(parts))
    assert torch.equal(erased(whole), erased(whole)) and not torch.equal(erased(whole), erased(whole, seed=2))


def test_erasing_changes_a_rectangle_of_all_channels_of_the_share_of_images_that_was_asked_for():
    config = AugmentationConfig(erase_probability=0.25)
    batch = batch_of(2000, size=(24, 16))
    changed = erased(batch, config) != batch.images  # noise never equals a pixel
    hit = changed.flatten(1).any(1)
    assert 0.21 < hit.float().mean() < 0.29
    areas, ratios = [], []
    for mask in changed[hit]:
        rows, columns = mask[0].any(1).nonzero(), mask[0].any(0).nonzero()
        assert mask[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        areas.append(mask[0].sum().item() / (24 * 16))
        ratios.append((rows.max() - rows.min() + 1).item() / (columns.max() - columns.min() + 1).item())
    assert min(areas) < 0.05 and max(areas) > 0.28 and max(areas) < 0.36
    assert min(ratios) < 0.5 and max(ratios) > 2


def test_rectangles_are_distributed_as_timms():
    from timm.data.random_erasing import RandomErasing

    config = AugmentationConfig(erase_probability=1.0)
    ours = erased(Batch(torch.zeros(600, 1, 32, 32), torch.zeros(600), torch.arange(600)), config) != 0
    import random

    random.seed(0)
    theirs = RandomErasing(1.0, mode="pixel", device="cpu")(torch.zeros(600, 1, 32, 32)) != 0
    for shares in (lambda masks: masks.float().mean((1, 2, 3)), lambda masks: masks[:, 0].any(2).float().mean(1)):
        quartiles = [np.quantile(shares(masks).numpy(), (0.25, 0.5, 0.75)) for masks in (ours, theirs)]
        assert np.abs(quartiles[0] - quartiles[1]).max() < 0.05


def test_noise_is_standard_normal_and_differs_between_images():
    config = AugmentationConfig(erase_probability=1.0, erase_area=(0.5, 0.6), erase_ratio=(0.9, 1.1))
    batch = Batch(torch.zeros(20, 3, 64, 64), torch.zeros(20), torch.arange(20))
    images = erased(batch, config)
    noise = images[images != 0]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((noise > 1.96).float().mean() - 0.025) < 0.003 and abs((noise < -1.96).float().mean() - 0.025) < 0.003
    both = (images[0] != 0) & (images[1] != 0)
    correlation = np.corrcoef(images[0][both].numpy(), images[1][both].numpy())[0, 1]
    assert abs(correlation) < 0.06


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_erases_and_mixes_as_a_processor_does(dtype):
    batch = batch_of(32, size=(32, 24))
    batch = batch._replace(images=batch.images.to(dtype))
    there = Batch(*(tensor.cuda() for tensor in batch[:3]))
    positions = batch.positions.numpy()
    torch.testing.assert_close(erased(batch), erase(there, positions, ERASES, 1).images.cpu(), rtol=1e-2, atol=1e-3)
    there = Batch(*(tensor.cuda() for tensor in batch[:3]))
    mixed, mixed_there = (mix_batch(one, positions, MIXES[2], seed=1) for one in (batch, there))
    torch.testing.assert_close(mixed.images, mixed_there.images.cpu(), rtol=1e-2, atol=1e-3)
    assert torch.equal(mixed.mix_weights, mixed_there.mix_weights.cpu())
