"""Augmentation, mixing and selection: pure functions of images and seeds."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.objectives.batch import Batch
from pipeline.config.training import AugmentationConfig
from pipeline.loading.augmentation import augment, crop_box, evaluation_view
from pipeline.loading.mixing import mix_batch
from pipeline.loading.selection import Selection
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_crops_stay_inside_and_keep_their_bounds():
    config = AugmentationConfig(crop_scale=(0.2, 0.9))
    for seed in range(300):
        left, top, right, bottom = crop_box(generator(seed), (80, 50), config)
        assert 0 <= left < right <= 80 and 0 <= top < bottom <= 50
        assert 0.7 < (right - left) / (bottom - top) < 1.42
    assert crop_box(generator(), (1000, 2), AugmentationConfig())[3] == 2  # no crop of that area fits: the fallback


@pytest.mark.parametrize(
    "config",
    [
        AugmentationConfig(),
        AugmentationConfig(affine_degrees=10, affine_shift=0.1, affine_scale=0.1),
        AugmentationConfig(rand_augment_layers=2, rand_augment_magnitude=9, rand_augment_deviation=0.5),
    ],
)
def test_an_augmented_image_depends_on_its_own_generator_alone(config):
    state = np.random.get_state()[1].copy()
    first, again, other = (augment(PHOTO, 32, config, generator(seed)) for seed in (1, 1, 2))
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert (first == again).all() and (first != other).any()
    assert (np.random.get_state()[1] == state).all()


def test_no_augmentation_is_a_plain_resize():
    config = AugmentationConfig(crop_scale=(1.0, 1.0), flip=False)
    assert (
        augment(PHOTO, 32, config, generator()) == np.asarray(PHOTO.resize((32, 32), Image.Resampling.BICUBIC))
    ).all()


@pytest.mark.parametrize(("size", "crop"), [(32, 0.875), (96, 0.875), (224, 0.875), (384, 0.95), (48, 1.0)])
@pytest.mark.parametrize("sides", [(80, 50), (300, 221), (64, 64), (33, 97)])
def test_a_model_is_evaluated_on_the_very_pixels_that_timm_serves_it(size, crop, sides):
    from timm.data import create_transform

    photo = PHOTO.resize(sides)
    transform = create_transform((3, size, size), interpolation="bicubic", crop_pct=crop, mean=(0, 0, 0), std=(1, 1, 1))
    served = (transform(photo).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    assert (evaluation_view(photo, size, crop) == served).all()


def test_evaluation_takes_the_centre_of_the_resized_image():
    assert evaluation_view(PHOTO, 32, 0.875).shape == (32, 32, 3)
    centre = evaluation_view(PHOTO, 50, 1.0)
    assert (centre == np.asarray(PHOTO)[:, 15:65]).all()


@pytest.mark.parametrize("config", [AugmentationConfig(mixup_alpha=0.8), AugmentationConfig(cutmix_alpha=1.0),
                                    AugmentationConfig(mixup_alpha=0.8, cutmix_alpha=1.0)])  # fmt: skip
def test_mixing_pairs_neighbours_whatever_the_micro_batch(config):
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = Batch(images, torch.arange(8), torch.arange(40, 48))
    parts = [Batch(*(tensor[s] for tensor in whole[:3])) for s in (slice(0, 2), slice(2, 6), slice(6, 8))]
    mixed = mix_batch(whole, config, seed=1)
    assert torch.equal(mixed.images, torch.cat([mix_batch(part, config, seed=1).images for part in parts]))
    assert mixed.mixed_labels.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert ((0 <= mixed.mix_weights) & (mixed.mix_weights <= 1)).all()


def test_cutmix_weights_are_the_share_of_pixels_kept():
    images = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    for position in range(0, 60, 2):
        batch = Batch(images, torch.arange(2), torch.arange(position, position + 2))
        mixed = mix_batch(batch, AugmentationConfig(cutmix_alpha=1.0), seed=0)
        assert 1 - mixed.images[0].mean().item() == pytest.approx(mixed.mix_weights[0].item(), abs=1e-6)


def test_a_tenth_of_the_labels_is_a_tenth_of_every_class_and_always_the_same(digits):
    reader = ShardReader(read_index(digits), "train")
    selection, again = Selection.of(reader, 0.1), Selection.of(reader, 0.1)
    chosen = [(s, selection.sample(s, p)) for s, size in enumerate(selection.shard_sizes) for p in range(size)]
    labels = [reader.read(*place).label for place in chosen]
    everything = np.concatenate([reader.labels(shard) for shard in range(len(reader.shard_sizes))])
    assert len(set(chosen)) == len(chosen)
    for label in range(10):
        assert labels.count(label) == round(0.1 * (everything == label).sum())
    assert all((a == b).all() for a, b in zip(selection.chosen, again.chosen, strict=True))
