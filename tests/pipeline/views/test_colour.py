"""Colour operations, each against the implementation that the papers' code calls."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import functional

from pipeline.config.recipe import read_yaml, recipe_names, recipe_path
from pipeline.config.training import AugmentationConfig, PretrainConfig
from pipeline.errors import InputError
from pipeline.shards.decoding import ImageFault
from pipeline.views.colour import (
    colour_jitter,
    posterize,
    rand_augment,
    rand_augment_transform,
    recolour,
    three_augment,
    turn_hue,
)
from tests.pipeline.photographs import photographs
from tests.recipes import load_recipe

PHOTO = photographs()[1].resize((96, 64))


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def equal(one: Image.Image, other: Image.Image) -> bool:
    return bool((np.asarray(one) == np.asarray(other)).all())


@pytest.mark.parametrize("turn", [-0.5, -0.21, -0.004, 0.0, 0.1, 0.5])
def test_a_hue_is_turned_as_torchvision_turns_it(turn):
    assert equal(turn_hue(PHOTO, turn), functional.adjust_hue(PHOTO, turn))


@pytest.mark.parametrize("key", ["brightness", "contrast", "saturation"])
def test_a_jitter_is_torchvisions_adjustment_by_a_factor_drawn_evenly_about_one(key):
    """Each result is found again by searching the factor: the drawn factors must fill the range and no more."""
    config = AugmentationConfig(**{f"jitter_{key}": 0.3})
    adjust = getattr(functional, f"adjust_{key}")
    grid = np.linspace(0.7, 1.3, 121)
    candidates = np.stack([np.asarray(adjust(PHOTO, factor), np.float32) for factor in grid])
    found = []
    for seed in range(40):
        jittered = np.asarray(colour_jitter(PHOTO, config, generator(seed)), np.float32)
        distance = np.abs(candidates - jittered).mean(axis=(1, 2, 3))
        assert distance.min() < 0.5
        found.append(grid[distance.argmin()])
    assert min(found) < 0.78 and max(found) > 1.22 and abs(np.mean(found) - 1) < 0.1


def test_jitters_come_in_every_order():
    config = AugmentationConfig(jitter_brightness=0.9, jitter_contrast=0.9)
    assert len({colour_jitter(PHOTO, config, generator(seed)).tobytes() for seed in range(20)}) == 20


def test_three_augment_is_one_of_grey_solarised_and_blurred_each_as_often():
    grey, solarised = functional.to_grayscale(PHOTO, 3), functional.solarize(PHOTO, 128)
    kinds = []
    for seed in range(300):
        image = three_augment(PHOTO, generator(seed))
        kinds.append("grey" if equal(image, grey) else "solarised" if equal(image, solarised) else "blurred")
        if kinds[-1] == "blurred":  # a blur keeps the mean and takes detail away
            before, after = (np.asarray(one, np.float64) for one in (PHOTO, image))
            assert abs(before.mean() - after.mean()) < 1 and after.std() <= before.std()
    assert all(70 < kinds.count(kind) < 130 for kind in ("grey", "solarised", "blurred"))


def test_rand_augment_is_timms_under_the_same_seeds():
    import random

    from timm.data.auto_augment import rand_augment_transform

    config = AugmentationConfig(rand_augment_layers=2, rand_augment_magnitude=9, rand_augment_deviation=0.5)
    theirs = rand_augment_transform("rand-m9-n2-inc1-mstd0.5", {"img_mean": (124, 116, 104), "translate_const": 28})
    for seed in range(5):
        drawn = generator(seed)
        random.seed(int(drawn.integers(1 << 62)))
        np.random.seed(int(drawn.integers(1 << 32)))
        assert equal(rand_augment(PHOTO, config, generator(seed)), theirs(PHOTO))


def test_colours_of_deep_images_are_left_to_nobody():
    with pytest.raises(ImageFault, match="three_augment need 8-bit images"):
        recolour(np.zeros((4, 4, 3), np.float32), AugmentationConfig(three_augment=True), generator(0))


@pytest.mark.parametrize("override", ["three_augment=true", "rand_augment_layers=2", "jitter_hue=0.1"])
def test_colours_need_three_channels(override):
    with pytest.raises(InputError, match=override.partition("=")[0] + ".*encoder.channels is 4"):
        load_recipe(PretrainConfig, "pretrain_mae_debug", [f"augmentation.{override}", "encoder.channels=4"])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"crop_scale": (1.0, 1.0)}, "`crop: whole` takes the whole image"),
        ({"crop_scale": (0.9, 0.2)}, "crop_scale is .least, most., and 0.9 is more than 0.2"),
        ({"crop": "whole", "region_decode": True}, "region_decode decodes the box of an inception crop"),
    ],
)
def test_augmentations_that_cannot_be_are_refused(keys, words):
    with pytest.raises(ValidationError, match=words):
        AugmentationConfig(**keys)


def rand_augments_of_recipes() -> list[tuple[float, float]]:
    augmentations = [read_yaml(recipe_path(name)).get("augmentation", {}) for name in recipe_names()]
    used = [found for found in augmentations if found.get("rand_augment_layers")]
    return sorted({(found["rand_augment_magnitude"], found.get("rand_augment_deviation", 0)) for found in used})


@pytest.mark.parametrize(("magnitude", "deviation"), [*rand_augments_of_recipes(), (9.5, 0), (0, 1e-5), (10, 300)])
def test_rand_augment_takes_whatever_it_draws(magnitude, deviation):
    """At magnitude 10 one draw in 15 keeps no bits at all."""
    config = AugmentationConfig(
        rand_augment_layers=2, rand_augment_magnitude=magnitude, rand_augment_deviation=deviation
    )
    image = PHOTO.resize((32, 32))
    assert all(rand_augment(image, config, generator(seed)).size == (32, 32) for seed in range(1500))


@pytest.mark.parametrize("magnitude", [0, 5, 9.9, 10])
def test_every_operation_takes_the_ends_of_the_scale(magnitude):
    for operation in rand_augment_transform(1, magnitude, 0.0, 14).ops:
        operation.prob = 1.0
        assert operation(PHOTO).size == PHOTO.size


def test_no_bits_kept_are_black_and_others_are_pillows():
    assert not np.asarray(posterize(PHOTO, 0)).any()
    for bits in range(1, 9):
        assert (np.asarray(posterize(PHOTO, bits)) == np.asarray(PHOTO) & (256 - (1 << 8 - bits))).all()
