"""Decoding a region: the pixels of a full decode, where TurboJPEG 3 is found."""

import numpy as np
import pytest

from pipeline.config.augmentation import AugmentationConfig
from pipeline.errors import InputError
from pipeline.shards.decoding import ImageFault
from pipeline.views.augmentation import training_view
from pipeline.views.geometry import Box
from pipeline.views.pixels import decode_pixels
from pipeline.views.region import decode_region
from pipeline.views.sample_generator import sample_generator
from pipeline.views.turbojpeg import require_turbojpeg
from tests.pipeline.photographs import encoded, photographs


@pytest.fixture
def turbojpeg():
    require_turbojpeg.cache_clear()
    try:
        return require_turbojpeg()
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"subsampling": "4:1:1"},
                                     {"progressive": True}])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_region_holds_the_pixels_of_the_full_decode(turbojpeg, mode, options):
    random = np.random.default_rng(0)
    for photo in photographs():
        content = encoded(photo.convert(mode), **options)
        full = np.array(decode_pixels(content, "jpg", 3))
        for _ in range(30):
            size = [int(random.integers(1, side + 1)) for side in full.shape[:2]]
            place = [int(random.integers(0, side - part + 1)) for side, part in zip(full.shape, size, strict=False)]
            box = Box(*place, *size)
            assert (decode_region(content, box) == box.of(full)).all()


def test_a_view_is_the_same_with_and_without(turbojpeg):
    for position, photo in enumerate(photographs()):
        views = np.empty((2, 64, 64, 3), np.uint8)
        for out, region_decode in zip(views, (False, True), strict=True):
            config = AugmentationConfig(region_decode=region_decode)
            training_view(encoded(photo), "jpg", out, config, sample_generator(0, position, "augment"))
        assert (views[0] == views[1]).all()


def test_a_cut_file_is_a_fault(turbojpeg):
    content = encoded(photographs()[0])[:9000]
    with pytest.raises(ImageFault):
        decode_region(content, Box(300, 0, 100, 100))


@pytest.mark.parametrize(("path", "words"), [("", "no TurboJPEG library found"), ("/none/such.so", "cannot be loaded"),
                                             ("libc.so.6", "is older than TurboJPEG 3")])  # fmt: skip
def test_without_the_library_one_line_says_what_to_do(monkeypatch, path, words):
    require_turbojpeg.cache_clear()
    monkeypatch.setenv("VIT_TURBOJPEG", path)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(InputError, match=words) as error:
        require_turbojpeg()
    assert len(error.value.problems) == 1 and "turn it off" in error.value.problems[0]
    require_turbojpeg.cache_clear()
