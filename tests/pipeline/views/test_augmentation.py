"""Training views and selection: pure functions of images, configs and seeds."""

import numpy as np
import pytest
from PIL import Image

from pipeline.config.augmentation import AugmentationConfig
from pipeline.loading.selection import Selection
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import read_index
from pipeline.shards.order import sample_seed
from pipeline.shards.reader import ShardReader
from pipeline.views.augmentation import training_view
from pipeline.views.geometry import inception_box
from pipeline.views.sample_generator import sample_generator
from tests.pipeline.photographs import encoded, noise_ratio, photographs, saved_array

RANDOM = np.random.default_rng(0)
EVERYTHING = AugmentationConfig(
    affine_degrees=10, affine_shift=0.1, affine_scale=0.1, three_augment=True, rand_augment_layers=2,
    rand_augment_magnitude=9, rand_augment_deviation=0.5, jitter_brightness=0.3, jitter_contrast=0.3,
    jitter_saturation=0.3, jitter_hue=0.1,
)  # fmt: skip


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def view(content: bytes, config: AugmentationConfig, seed: int = 0, *, extension: str = "jpg",
         shape: tuple[int, int, int] = (64, 64, 3), dtype: type = np.uint8, fill=None) -> np.ndarray:  # fmt: skip
    out = np.full(shape, 77, dtype)
    training_view(content, extension, out, config, generator(seed), fill=fill)
    return out


def test_a_sample_generator_is_the_start_of_the_samples_own_stream():
    for position in (0, 1, 2**40):
        fresh = np.random.Generator(np.random.Philox(key=sample_seed(3, position, "augment")))
        kept = sample_generator(3, position, "augment")
        assert [kept.random(), kept.integers(9), kept.normal()] == [fresh.random(), fresh.integers(9), fresh.normal()]
        kept.integers(3, dtype=np.int32)  # leaves half a word behind, which the next sample must not see


def test_crops_stay_inside_and_keep_their_bounds():
    config = AugmentationConfig(crop_scale=(0.2, 0.9))
    for seed in range(300):
        top, left, height, width = inception_box((50, 80), config, generator(seed))
        assert 0 <= top < top + height <= 50 and 0 <= left < left + width <= 80
        assert 0.7 < width / height < 1.42
        assert 0.19 < height * width / 4000 < 0.92


def test_crops_are_distributed_as_torchvisions():
    import torch
    from torchvision.transforms import RandomResizedCrop

    ours = np.array([inception_box((375, 500), AugmentationConfig(), generator(seed)) for seed in range(800)])
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(800)])
    for part in (0.25, 0.5, 0.75):
        assert np.abs(np.quantile(ours, part, axis=0) - np.quantile(theirs, part, axis=0)).max() < 30
    areas = [np.prod(boxes[:, 2:], axis=1).mean() / (375 * 500) for boxes in (ours, theirs)]
    assert abs(areas[0] - areas[1]) < 0.02


@pytest.mark.parametrize("size", [(2, 1000), (1000, 2), (100, 30)])
def test_where_no_crop_fits_the_largest_centred_one_is_taken_as_torchvision_does(size):
    import torch
    from torchvision.transforms import RandomResizedCrop

    config = AugmentationConfig(crop_scale=(0.999, 1.0))
    expected = RandomResizedCrop.get_params(torch.empty(3, *size), (0.999, 1.0), (3 / 4, 4 / 3))
    assert inception_box(size, config, generator()) == expected


def test_an_inception_view_is_pillows_crop_and_resize_to_50_db():
    config = AugmentationConfig(flip=False)
    for seed in range(12):
        photo = photographs()[seed % 3]
        content = encoded(photo, quality=90)
        decoded = decode(content)
        top, left, height, width = inception_box(photo.size[::-1], config, generator(seed))
        crop = decoded.crop((left, top, left + width, top + height))
        reference = np.asarray(crop.resize((224, 224), Image.Resampling.BICUBIC))
        assert noise_ratio(view(content, config, seed, shape=(224, 224, 3)), reference) >= 50


def decode(content: bytes) -> Image.Image:
    import io

    return Image.open(io.BytesIO(content)).convert("RGB")


@pytest.mark.parametrize("config", [AugmentationConfig(), EVERYTHING, EVERYTHING.model_copy(update={"crop": "simple"}),
                                    AugmentationConfig(crop="letterbox", three_augment=True)])  # fmt: skip
def test_a_view_depends_on_its_own_generator_alone(config):
    content = encoded(photographs()[0])
    state = np.random.get_state()[1].copy()
    first, again, others = (
        view(content, config, 1),
        view(content, config, 1),
        [view(content, config, s) for s in (2, 3)],
    )
    assert (first == again).all() and any((first != other).any() for other in others)
    assert (np.random.get_state()[1] == state).all()


def test_flips_are_half_of_the_views():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    config = AugmentationConfig(crop="whole")
    content = encoded(Image.fromarray(pixels), "PNG")
    flipped = [view(content, config, seed, shape=(8, 8, 3), extension="png")[0, 0, 0] == 255 for seed in range(400)]
    assert 160 < sum(flipped) < 240


def test_the_whole_image_is_a_plain_resize():
    photo = photographs()[0]
    config = AugmentationConfig(crop="whole", flip=False)
    reference = np.asarray(photo.resize((96, 64), Image.Resampling.BICUBIC))
    assert noise_ratio(view(encoded(photo, "PNG"), config, shape=(64, 96, 3)), reference) >= 50


def test_a_letterbox_holds_the_whole_image_on_the_mean_colour():
    photo = photographs()[0]  # 640 x 427
    config = AugmentationConfig(crop="letterbox", flip=False)
    boxed = view(encoded(photo, "PNG"), config, shape=(64, 64, 3), fill=(0.2, 0.4, 0.6))
    rows = round(427 / 10)
    top = (64 - rows) // 2
    assert (boxed[:top] == (51, 102, 153)).all() and (boxed[top + rows :] == (51, 102, 153)).all()
    reference = np.asarray(photo.resize((64, rows), Image.Resampling.BICUBIC))
    assert noise_ratio(boxed[top : top + rows], reference) >= 50
    wide = view(encoded(photo, "PNG"), config, shape=(32, 640, 3), fill=(0.2, 0.4, 0.6))
    assert (wide[:, 0] == (51, 102, 153)).all() and (wide[:, -1] == (51, 102, 153)).all()


@pytest.mark.parametrize("photo", photographs())
def test_a_simple_crop_is_a_window_of_torchvisions_resized_and_reflected_image(photo):
    from torchvision.transforms import InterpolationMode, Resize
    from torchvision.transforms.functional import pad

    config = AugmentationConfig(crop="simple", flip=False)
    resized = Resize(48, interpolation=InterpolationMode.BICUBIC)(photo)
    padded = np.asarray(pad(resized, 4, padding_mode="reflect")).astype(int)
    places = set()
    for seed in range(8):
        got = view(encoded(photo, "PNG"), config, seed, shape=(48, 48, 3))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (48, 48, 3))[:, :, 0]
        distance = np.abs(windows - got.astype(int)).max(axis=(2, 3, 4))
        assert distance.min() <= 1  # resizes differ by rounding
        places.add(int(distance.argmin()))
    assert len(places) > 4


@pytest.mark.parametrize("crop", ["inception", "simple", "whole", "letterbox"])
@pytest.mark.parametrize("channels", [4, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_many_channels_make_views_that_are_not_square(crop, channels, dtype):
    config = AugmentationConfig(crop=crop, affine_degrees=5, affine_shift=0.05)
    top = 1.0 if dtype is np.float32 else np.iinfo(dtype).max
    ramp = np.linspace(0, top, 40 * 60 * channels).reshape(40, 60, channels).astype(dtype)
    batch_dtype = np.uint8 if dtype is np.uint8 else np.float32
    out = view(saved_array(ramp), config, extension="npy", shape=(32, 48, channels), dtype=batch_dtype)
    assert out.shape == (32, 48, channels) and 0.3 < out.mean() / (255 if dtype is np.uint8 else 1) < 0.7
    again = view(saved_array(ramp), config, extension="npy", shape=(32, 48, channels), dtype=batch_dtype)
    assert (out == again).all()


def test_an_affine_view_of_many_channels_moves_each_as_grey_is_moved():
    config = AugmentationConfig(crop="whole", flip=False, affine_degrees=20, affine_shift=0.1, affine_scale=0.2)
    array = RANDOM.integers(0, 256, (32, 32, 13), dtype=np.uint8)
    together = view(saved_array(array), config, extension="npy", shape=(32, 32, 13))
    for channel in (0, 12):
        alone = view(saved_array(array[:, :, channel]), config, extension="npy", shape=(32, 32, 1))
        assert (together[:, :, channel] == alone[:, :, 0]).all()
    assert (together != array).any()


def test_bytes_that_are_no_image_are_a_fault():
    with pytest.raises(ImageFault):
        view(b"\xff\xd8\xff nothing", AugmentationConfig())


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


@pytest.mark.parametrize(
    "extreme",
    [
        {"jitter_brightness": 1e12, "jitter_contrast": 1e12, "jitter_saturation": 1e12, "jitter_hue": 0.5},
        {"affine_degrees": 1e12, "affine_scale": 1 - 1e-12, "affine_shift": 1},
        {"crop_scale": (0, 0)},
        {"crop_ratio": (0.01, 0.01)},
        {"crop_ratio": (0.01, 100)},
        {"rand_augment_layers": 20, "rand_augment_magnitude": 10, "rand_augment_deviation": 1e12},
        {"three_augment": True},
    ],
)
@pytest.mark.parametrize("shape", [(16, 48, 3), (1, 1, 3)])
def test_settings_at_the_ends_of_what_is_accepted_make_views(extreme, shape):
    content = encoded(photographs()[0].resize((90, 60)), "JPEG")
    for seed in range(10):
        view(content, AugmentationConfig(**extreme), seed, shape=shape)
