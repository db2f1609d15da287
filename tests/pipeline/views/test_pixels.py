"""Decoding and resizing: the pixels that Pillow gives, of every kind of file a dataset may hold."""

import io
import threading

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.ingestion.images import prepare_image
from pipeline.shards.decoding import ImageFault
from pipeline.views.pixels import decode_pixels, flip, resize_into, view_dtype
from tests.pipeline.photographs import encoded, noise_ratio, photographs, saved_array

RANDOM = np.random.default_rng(0)


def as_rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("options", [{}, {"quality": 96, "subsampling": 0}, {"quality": 60, "subsampling": 1},
                                     {"progressive": True}, {"subsampling": "4:1:1"}, {"keep_rgb": True}])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_decodes_to_the_very_pixels_that_pillow_gives(mode, options, tmp_path):
    for number, photo in enumerate(photographs()):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(encoded(photo.convert(mode), **options))
        with Image.open(path) as image:
            assert (decode_pixels(path.read_bytes(), "jpg", 3) == as_rgb(image)).all()


@pytest.mark.parametrize(("form", "mode"), [("PNG", "RGB"), ("PNG", "P"), ("PNG", "L"), ("PNG", "1"), ("WEBP", "RGB"),
                                            ("TIFF", "RGB"), ("TIFF", "CMYK")])  # fmt: skip
def test_other_formats_are_pillows(form, mode):
    image = photographs()[0].convert(mode)
    options = {"lossless": True} if form == "WEBP" else {}
    assert (decode_pixels(encoded(image, form, **options), form.lower(), 3) == as_rgb(image)).all()


def test_grey_is_decoded_to_one_channel():
    photo = photographs()[1]
    for image in (photo.convert("L"), photo):
        content = encoded(image, "PNG")
        assert (decode_pixels(content, "png", 1)[:, :, 0] == np.asarray(photo.convert("L"))).all()


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_of_any_channels_and_depth_are_taken_as_they_are(dtype, channels):
    array = (RANDOM.random((9, 7, channels)) * 200).astype(dtype)
    content = saved_array(array if channels > 1 else array[:, :, 0])
    decoded = decode_pixels(content, "npy", channels)
    assert decoded.dtype == dtype and (decoded == array).all()
    assert view_dtype(content, "npy", channels) == (np.uint8 if dtype is np.uint8 else np.float32)


def test_a_tiff_of_four_channels_and_one_of_sixteen_bits_are_taken_as_they_are():
    four = RANDOM.integers(0, 256, (9, 7, 4), dtype=np.uint8)
    assert (decode_pixels(encoded(Image.fromarray(four, "CMYK"), "TIFF"), "tif", 4) == four).all()
    assert (decode_pixels(encoded(Image.fromarray(four, "RGBA"), "TIFF"), "tif", 4) == four).all()
    deep = RANDOM.integers(0, 65536, (9, 7), dtype=np.uint16)
    for form in ("TIFF", "PNG"):
        content = encoded(Image.fromarray(deep), form)
        decoded = decode_pixels(content, form.lower(), 1)
        assert decoded.dtype == np.uint16 and (decoded[:, :, 0] == deep).all()
        assert view_dtype(content, form.lower(), 1) == np.float32
        assert view_dtype(content, form.lower(), 3) == np.uint8  # as red, green and blue it is brought to 8 bits


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize(
    ("dtype", "channels"),
    [(np.uint8, 13), (np.uint16, 13), (np.float32, 13), (np.float32, 4), (np.uint16, 4), (np.uint8, 4), (np.uint8, 2)],
)
def test_a_tiff_of_many_channels_is_ingested_and_decoded_as_it_is(dtype, channels, planar, compression):
    array = (RANDOM.random((9, 7, channels)) * 200).astype(dtype)
    planes = array if planar == "contig" else np.moveaxis(array, -1, 0)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, planes, photometric="minisblack", planarconfig=planar, compression=compression)
    prepared = prepare_image(buffer.getvalue(), "keep")
    assert (prepared.content, prepared.extension, prepared.width, prepared.height) == (buffer.getvalue(), "tif", 7, 9)
    assert len(prepared.mean) == channels
    decoded = decode_pixels(prepared.content, prepared.extension, channels)
    assert decoded.dtype == dtype and (decoded == array).all()


def test_a_cut_tiff_of_many_channels_is_a_fault():
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.ones((40, 40, 13), np.uint16), photometric="minisblack", planarconfig="contig")
    with pytest.raises(ImageFault):
        decode_pixels(buffer.getvalue()[:3000], "tif", 13)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8 no image", encoded(photographs()[0])[:9000], b"GIF89a"])
def test_what_cannot_be_decoded_is_one_kind_of_fault(content):
    with pytest.raises(ImageFault):
        decode_pixels(content, "jpg", 3)


def test_another_number_of_channels_is_named():
    with pytest.raises(ImageFault, match="holds 4 channels, and encoder.channels is 13"):
        decode_pixels(saved_array(np.zeros((3, 3, 4), np.uint8)), "npy", 13)
    with pytest.raises(ImageFault, match="holds 3 channels, and encoder.channels is 4"):
        decode_pixels(encoded(photographs()[0]), "jpg", 4)


def test_threads_do_not_share_what_they_decode_into():
    contents = [encoded(photo) for photo in photographs()]
    expected, wrong = [as_rgb(decode(content)) for content in contents], []

    def decode_often(number: int) -> None:
        for turn in range(20):
            which = (number + turn) % len(contents)
            if (decode_pixels(contents[which], "jpg", 3) != expected[which]).any():
                wrong.append(which)

    threads = [threading.Thread(target=decode_often, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def decode(content: bytes) -> Image.Image:
    return Image.fromarray(np.array(decode_pixels(content, "jpg", 3)))


@pytest.mark.parametrize("size", [(224, 224), (64, 96), (500, 300), (427, 640)])
@pytest.mark.parametrize("box", [(0, 0, 640, 427), (100, 50, 333, 290), (3, 200, 603, 260), (310, 7, 330, 420)])
def test_a_resized_photograph_is_pillows_to_50_db(size, box):
    for photo in photographs()[:2]:
        crop = photo.crop(box)
        out = np.empty((*size, 3), np.uint8)
        resize_into(np.array(photo)[box[1] : box[3], box[0] : box[2]], out)
        reference = np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC))
        assert noise_ratio(out, reference) >= 50


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_every_channel_is_resized_alike_and_the_depth_is_kept(channels):
    deep = RANDOM.integers(0, 256, (40, 31, channels)).astype(np.uint16) * 257
    out, fine = np.empty((24, 16, channels), np.uint8), np.empty((24, 16, channels), np.float32)
    resize_into((deep // 257).astype(np.uint8), out)
    resize_into(deep, fine)
    for channel in range(channels):
        plane = Image.fromarray((deep[:, :, channel] // 257).astype(np.uint8))
        resized, exact = (
            np.asarray(image.resize((16, 24), Image.Resampling.BICUBIC)) for image in (plane, plane.convert("F"))
        )
        assert np.abs(out[:, :, channel].astype(int) - resized).max() <= 1
        assert np.abs(fine[:, :, channel] * 255 - exact.clip(0, 255)).max() < 0.01


def test_float_arrays_keep_their_range():
    array = RANDOM.normal(0, 50, (8, 8, 4)).astype(np.float32)
    out = np.empty((8, 8, 4), np.float32)
    resize_into(array, out)
    assert (out == array).all()


def test_a_deep_image_in_a_batch_of_bytes_is_refused_and_a_byte_image_in_a_deep_batch_is_scaled():
    with pytest.raises(ImageFault, match="holds uint16 in a dataset whose first sample is 8 bit"):
        resize_into(np.zeros((4, 4, 1), np.uint16), np.empty((2, 2, 1), np.uint8))
    out = np.empty((2, 2, 1), np.float32)
    resize_into(np.full((2, 2, 1), 51, np.uint8), out)
    assert np.allclose(out, 0.2)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(5, 8, 3), (4, 7, 1), (3, 6, 13)])
def test_a_flip_mirrors_left_and_right(shape, dtype):
    array = (RANDOM.random(shape) * 255).astype(dtype)
    mirrored = array.copy()
    flip(mirrored)
    assert (mirrored == array[:, ::-1]).all()
