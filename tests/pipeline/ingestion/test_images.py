"""What a plain decoder would get wrong is put right; everything else keeps its bytes."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.ingestion.images import UPRIGHT, prepare_image
from pipeline.shards.decoding import ImageFault, open_image
from tests.pipeline.pictures import encoded, picture


def opened(prepared):
    return Image.open(io.BytesIO(prepared.content))


@pytest.mark.parametrize("form, extension", [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_image_keeps_its_bytes(form, extension, mode):
    content = encoded(picture(1, mode=mode), form)
    prepared = prepare_image(content, "rgb")
    assert (prepared.content, prepared.extension, prepared.changes) == (content, extension, ())
    assert (prepared.width, prepared.height) == (24, 16)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
def test_a_rotated_photo_is_stored_upright_and_says_so(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(2, 64, 32), form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    for channels in ("rgb", "keep"):
        prepared = prepare_image(content, channels)
        assert prepared.changes == ("upright",)
        assert (prepared.width, prepared.height) == expected.size == opened(prepared).size
        assert opened(prepared).getexif().get(0x0112, 1) == 1
        assert np.abs(np.asarray(opened(prepared).convert("RGB"), int) - np.asarray(expected, int)).mean() < 2


def test_transparency_is_put_on_white_and_an_opaque_alpha_changes_nothing():
    image = picture(3).convert("RGBA")
    opaque = encoded(image, "PNG")
    assert prepare_image(opaque, "rgb").content == opaque
    image.putalpha(Image.new("L", image.size, 0))
    prepared = prepare_image(encoded(image, "PNG"), "rgb")
    assert prepared.changes == ("on white",) and opened(prepared).mode == "RGB"
    assert np.asarray(opened(prepared)).min() == 255
    assert prepare_image(encoded(image, "PNG"), "keep").changes == ()


def test_sixteen_bit_grey_becomes_eight_bit_instead_of_white():
    values = np.linspace(0, 65535, 24 * 16).astype(np.uint16).reshape(16, 24)
    content = encoded(Image.fromarray(values), "PNG")
    prepared = prepare_image(content, "rgb")
    assert prepared.changes == ("8 bit",)
    assert np.abs(np.asarray(opened(prepared).convert("L"), int) - values / 257).max() <= 0.5
    kept = prepare_image(content, "keep")
    assert kept.content == content and kept.mean == pytest.approx((0.5,), abs=0.01)


def test_the_first_frame_of_an_animation_is_taken():
    first, second = picture(4), picture(5)
    content = encoded(first, "PNG", save_all=True, append_images=[second])
    prepared = prepare_image(content, "rgb")
    assert prepared.changes == ("first frame",)
    assert np.array_equal(np.asarray(opened(prepared)), np.asarray(first))


@pytest.mark.parametrize("form", ["GIF", "BMP", "PPM"])
def test_other_formats_become_png_of_the_same_pixels(form):
    content = encoded(picture(6), form)
    prepared = prepare_image(content, "rgb")
    assert (prepared.extension, prepared.changes) == ("png", (f"from {form}",))
    assert np.array_equal(np.asarray(opened(prepared)), np.asarray(open_image(content).convert("RGB")))


def test_arrays_are_taken_with_their_channels_under_keep_only():
    array = np.random.default_rng(0).integers(0, 65536, (10, 12, 5)).astype(np.uint16)
    buffer = io.BytesIO()
    np.save(buffer, array)
    prepared = prepare_image(buffer.getvalue(), "keep")
    assert (prepared.extension, prepared.width, prepared.height, len(prepared.mean)) == ("npy", 12, 10, 5)
    with pytest.raises(ImageFault, match="channels=keep"):
        prepare_image(buffer.getvalue(), "rgb")


@pytest.mark.parametrize("dtype", [">u2", ">f4"])
def test_arrays_of_the_other_byte_order_are_taken(dtype):
    buffer = io.BytesIO()
    np.save(buffer, np.ones((4, 5, 3), dtype))
    assert prepare_image(buffer.getvalue(), "keep").mean == pytest.approx((1 / 65535 if "u" in dtype else 1.0,) * 3)


def test_a_pickle_in_an_array_file_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    buffer = io.BytesIO()
    np.save(buffer, np.array([[Evil()]], dtype=object), allow_pickle=True)
    with pytest.raises(ImageFault):
        prepare_image(buffer.getvalue(), "keep")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_an_image_cut_anywhere_in_its_pixels_is_rejected(form):
    content = encoded(picture(7), form)
    end_of_pixels = len(content) - {"JPEG": 2, "PNG": 20}[form]
    for size in range(1, end_of_pixels, 7):
        with pytest.raises(ImageFault) as caught:
            prepare_image(content[:size], "rgb")
        assert caught.value.reason in ("broken_image", "unknown_format")


def test_an_image_bomb_is_rejected_before_it_is_decoded():
    content = encoded(Image.new("1", (12_000, 10_000)), "PNG")
    with pytest.raises(ImageFault) as caught:
        prepare_image(content, "rgb")
    assert caught.value.reason == "too_many_pixels"


def test_pixels_without_a_meaning_as_rgb_are_rejected():
    content = encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(ImageFault) as caught:
        prepare_image(content, "rgb")
    assert caught.value.reason == "unsupported_mode"


def test_statistics_are_those_of_the_pixels():
    image = picture(8)
    prepared = prepare_image(encoded(image, "PNG"), "rgb")
    pixels = np.asarray(image).reshape(-1, 3) / 255
    assert prepared.mean == pytest.approx(tuple(pixels.mean(0))) and prepared.mean_square == pytest.approx(
        tuple((pixels**2).mean(0))
    )


def test_what_was_decoded_is_handed_on_with_the_format_and_mode_of_its_file():
    image = picture(9).convert("P")
    prepared = prepare_image(encoded(image, "GIF"), "rgb")
    assert (prepared.format, prepared.mode) == ("GIF", "P")
    assert np.array_equal(np.asarray(prepared.pixels), np.asarray(opened(prepared)))
