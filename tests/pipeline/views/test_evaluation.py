"""Evaluation views: the pixels that timm serves."""

import resource

import numpy as np
import pytest
from PIL import Image

from pipeline.config.augmentation import AugmentationConfig
from pipeline.views.augmentation import training_view
from pipeline.views.evaluation import evaluation_view
from tests.pipeline.photographs import encoded, saved_array

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8))
MEAN = (0.2, 0.4, 0.6)


def view(content: bytes, size: tuple[int, int], crop: float, crop_mode: str = "center", *, extension: str = "png",
         channels: int = 3, dtype: type = np.uint8) -> np.ndarray:  # fmt: skip
    out = np.full((*size, channels), 77, dtype)
    mean = MEAN if channels == 3 else (0.5,) * channels
    evaluation_view(content, extension, out, crop=crop, crop_mode=crop_mode, mean=mean)
    return out


def served(photo: Image.Image, size: tuple[int, int], crop: float, crop_mode: str) -> np.ndarray:
    from timm.data.transforms_factory import transforms_imagenet_eval

    transform = transforms_imagenet_eval(
        size if size[0] != size[1] else size[0], crop_pct=crop, crop_mode=crop_mode, interpolation="bicubic",
        mean=MEAN, std=(1, 1, 1), normalize=False,
    )  # fmt: skip
    return transform(photo).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("size", [(32, 32), (96, 96), (384, 384), (48, 96), (224, 160)])
@pytest.mark.parametrize("sides", [(80, 50), (300, 221), (64, 64), (33, 97)])
def test_a_model_is_evaluated_on_the_very_pixels_that_timm_serves_it(size, crop, crop_mode, sides):
    photo = NOISE.resize(sides)
    assert (view(encoded(photo, "PNG"), size, crop, crop_mode) == served(photo, size, crop, crop_mode)).all()


def test_a_jpeg_is_evaluated_on_timms_pixels_too():
    content = encoded(NOISE.resize((301, 222)))
    import io

    assert (view(content, (64, 64), 0.875, extension="jpg") == served(Image.open(io.BytesIO(content)), (64, 64), 0.875,
                                                                       "center")).all()  # fmt: skip


def test_evaluation_takes_the_centre_of_the_resized_image():
    assert (view(encoded(NOISE, "PNG"), (50, 50), 1.0) == np.asarray(NOISE)[:, 15:65]).all()


def test_grey_is_evaluated_as_timm_serves_grey():
    grey = NOISE.convert("L")
    reference = served(grey, (32, 32), 0.875, "center")
    assert (view(encoded(grey, "PNG"), (32, 32), 0.875, channels=1) == reference).all()


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [4, 13])
def test_many_channels_are_cut_where_three_are(channels, dtype, crop_mode):
    grey = np.asarray(NOISE.convert("L"))
    scale = {np.uint8: 1, np.uint16: 257, np.float32: np.float32(1 / 255)}[dtype]
    many = np.repeat((grey[:, :, None].astype(np.float64) * scale).astype(dtype), channels, axis=2)
    batch_dtype = np.uint8 if dtype is np.uint8 else np.float32
    got = view(saved_array(many), (24, 32), 0.875, crop_mode, extension="npy", channels=channels, dtype=batch_dtype)
    reference = view(encoded(NOISE.convert("L"), "PNG"), (24, 32), 0.875, crop_mode, channels=1)
    values = got.astype(np.float64) * (1 if dtype is np.uint8 else 255)
    assert np.abs(values - reference).max() <= (1 if dtype is np.uint8 else 2.5)  # bytes round between two passes


def test_a_byte_image_among_deep_ones_is_scaled():
    content = encoded(NOISE, "PNG")
    exact = view(content, (32, 32), 0.875)
    assert np.allclose(view(content, (32, 32), 0.875, dtype=np.float32), exact / 255, atol=1e-6)


def test_an_unknown_crop_mode_is_named():
    with pytest.raises(ValueError, match="crop mode 'middle' is none of"):
        view(encoded(NOISE, "PNG"), (32, 32), 0.875, "middle")


@pytest.mark.parametrize("size", [(1, 12_000), (12_000, 1)])
def test_an_endless_line_does_not_fill_the_memory(size):
    content, before = encoded(Image.new("RGB", size, "red"), "PNG"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (view(content, (224, 224), 0.875) == (255, 0, 0)).all()
    out = np.empty((224, 224, 3), np.uint8)
    training_view(content, "png", out, AugmentationConfig(crop="simple"), np.random.Generator(np.random.Philox(0)))
    assert (out == (255, 0, 0)).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB; the whole would be 1.8 GB
