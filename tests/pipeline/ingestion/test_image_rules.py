"""Each rule on real bytes: what is stored shows the right pixels in any plain decoder, and `changes` says what was
done."""

import io
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image, ImageOps

from pipeline.config.ingest import IngestConfig
from pipeline.config.recipe import validate
from pipeline.errors import InputError
from pipeline.ingestion.build import ingest
from pipeline.ingestion.images import UPRIGHT, ImageRule, prepare_image
from pipeline.ingestion.pixels import colour, moments
from pipeline.shards.check import check_dataset
from pipeline.shards.decoding import ImageFault, open_array
from tests.pipeline.pictures import encoded, picture, write_pictures, write_tar


def shown(prepared):
    """(H, W, 3) as a plain decoder shows what is stored: no orientation, no profile."""
    if prepared.extension == "jpg":
        return simplejpeg.decode_jpeg(prepared.content).astype(int)
    image = Image.open(io.BytesIO(prepared.content))
    assert image.mode in ("1", "L", "P", "RGB", "RGBA") and image.getexif().get(0x0112, 1) == 1
    return np.asarray(image.convert("RGB")).astype(int)


def off(prepared, expected):
    """Grey levels by which what is stored is off on average."""
    return np.abs(shown(prepared) - np.asarray(expected).astype(int)).mean()


# Orientation


@pytest.mark.parametrize("channels", ["rgb", "keep"])
@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
@pytest.mark.parametrize("form", ["PNG", "WEBP", "AVIF", "TIFF"])
def test_an_orientation_is_carried_out_in_every_format_that_has_one(form, orientation, channels):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {"quality": 100} if form == "AVIF" else {}
    content = encoded(picture(2, 64, 32), form, exif=exif, **options)
    plain = Image.open(io.BytesIO(encoded(picture(2, 64, 32), form, **options))).convert("RGB")
    prepared = prepare_image(content, channels)
    assert "upright" in prepared.changes and prepared.extension == "png"
    assert off(prepared, plain.transpose(UPRIGHT[orientation])) == 0


def test_an_orientation_in_a_png_text_or_in_xmp_counts_as_well():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for content in (encoded(picture(2), "JPEG", xmp=xmp), encoded(picture(2), "WEBP", xmp=xmp)):
        prepared = prepare_image(content, "rgb")
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert prepared.changes == ("upright",) and (prepared.width, prepared.height) == expected.size == (16, 24)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_array_of_a_tiff_is_turned_like_an_image(orientation):
    array = np.random.default_rng(0).integers(0, 65536, (6, 4, 5)).astype(np.uint16)
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, array, photometric="minisblack", planarconfig="contig", extratags=[(274, "H", 1, orientation, True)]
    )
    prepared = prepare_image(buffer.getvalue(), "keep")
    if orientation == 1:
        assert prepared.content == buffer.getvalue() and prepared.changes == () and prepared.mode == "uint16 x 5"
        return
    expected = [
        np.asarray(Image.fromarray(band >> 8).transpose(UPRIGHT[orientation])) for band in np.moveaxis(array, 2, 0)
    ]
    stored = open_array(prepared.content)
    assert prepared.changes == ("upright",) and prepared.extension == "npy" and stored.dtype == np.uint16
    assert np.array_equal(stored >> 8, np.stack(expected, axis=2))


@pytest.mark.parametrize("mode", ["F", "CMYK"])
def test_a_tiff_that_no_png_can_hold_is_turned_into_an_array(mode):
    image = picture(2, 64, 32, "CMYK") if mode == "CMYK" else picture(2, 64, 32, "L").convert("F")
    prepared = prepare_image(encoded(image, "TIFF", tiffinfo={274: 6}), "keep")
    assert (prepared.extension, prepared.changes, prepared.height) == ("npy", ("upright",), 64)
    assert np.array_equal(open_array(prepared.content), np.asarray(image.transpose(UPRIGHT[6])))


# Depth


def sixteen_bit(mode, form):
    values = np.linspace(0, 65535, 24 * 16).reshape(16, 24)
    image = Image.fromarray(values.astype(np.int32 if mode == "I" else np.uint16))
    return values.astype(np.uint16), encoded(image, form)


@pytest.mark.parametrize("mode, form", [("I;16", "PNG"), ("I", "PPM"), ("I;16", "TIFF"), ("I", "TIFF")])
def test_sixteen_bit_grey_is_scaled_and_rounded(mode, form):
    values, content = sixteen_bit(mode, form)
    prepared = prepare_image(content, "rgb")
    assert prepared.changes[0] == "8 bit" and prepared.mode in ("I", "I;16")
    assert np.array_equal(shown(prepared)[:, :, 0], np.round(values / 257).astype(int))


def test_big_endian_sixteen_bit_is_scaled_too():
    values = np.linspace(0, 65535, 96).reshape(8, 12).astype(np.uint16)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, byteorder=">", photometric="minisblack")
    prepared = prepare_image(buffer.getvalue(), "rgb")
    assert prepared.mode == "I;16B" and np.array_equal(shown(prepared)[:, :, 0], np.round(values / 257))


def test_white_is_zero_in_a_sixteen_bit_tiff():
    values = np.linspace(0, 65535, 96).reshape(8, 12).astype(np.uint16)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric="miniswhite")
    assert np.array_equal(shown(prepare_image(buffer.getvalue(), "rgb"))[:, :, 0], 255 - np.round(values / 257))


def test_twelve_bits_are_scaled_by_their_own_depth():
    """Tag 258 says 12: two values in three bytes."""
    values = np.linspace(0, 4095, 4 * 8).reshape(4, 8).astype(np.uint16)
    first, second = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8).tobytes()
    tags = [(256, 8), (257, 4), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4), (279, len(packed))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    content = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory + bytes(4)
    prepared = prepare_image(content, "rgb")
    assert prepared.changes == ("8 bit",) and np.array_equal(shown(prepared)[:, :, 0], np.round(values / 4095 * 255))


def png_of_sixteen_bits(values, colour_type):
    """A PNG of (H, W, C) uint16, which Pillow does not write."""
    import zlib

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour_is_within_a_level_of_its_value_and_keeps_its_bytes():
    values = np.random.default_rng(0).integers(0, 65536, (16, 24, 3)).astype(np.uint16)
    content = png_of_sixteen_bits(values, 2)
    prepared = prepare_image(content, "rgb")
    assert prepared.content == content and prepared.changes == () and prepared.mode == "RGB;16"
    assert np.abs(shown(prepared) - values / 257).max() < 1


def test_sixteen_bit_values_that_are_none_are_rejected():
    for values in (np.full((4, 4), 70_000, np.int32), np.full((4, 4), -1, np.int32)):
        with pytest.raises(ImageFault, match="beyond 16 bit"):
            prepare_image(encoded(Image.fromarray(values), "TIFF"), "rgb")


# Transparency and palettes


def transparent(mode):
    """An image whose left half is transparent, its bytes, and what is to be seen."""
    base = picture(3, 24, 16)
    alpha = Image.fromarray(np.repeat(np.where(np.arange(24) < 12, 0, 255)[None], 16, axis=0).astype(np.uint8))
    if mode in ("RGBA", "LA"):
        image = base.convert(mode[:-1])
        image.putalpha(alpha)
        seen = Image.composite(base.convert(mode[:-1]).convert("RGB"), Image.new("RGB", base.size, "white"), alpha)
        return image, {}, seen
    numbers = np.asarray(base.convert("L")) // 2 + 100
    numbers[:, :12] = 7
    image = Image.fromarray(numbers)
    if mode == "P":
        image.putpalette([value for number in range(256) for value in (number, 255 - number, number // 2)])
        seen = np.asarray(image.convert("RGB")).copy()
        option = 7
    else:
        image = image.convert(mode)
        seen = np.asarray(image.convert("RGB")).copy()
        option = {"L": 7, "RGB": (7, 7, 7), "1": 0}[mode]
        if mode == "1":
            seen[seen == 0] = 255
    if mode != "1":
        seen[:, :12] = 255
    return image, {"transparency": option}, Image.fromarray(seen)


@pytest.mark.parametrize("form, mode", [
    *[("PNG", mode) for mode in ("RGBA", "LA", "P", "L", "RGB", "1")],
    *[(form, mode) for form in ("WEBP", "AVIF", "TIFF", "JPEG2000") for mode in ("RGBA", "LA")],
    *[("GIF", "RGBA"), ("GIF", "P")],
])  # fmt: skip
def test_what_is_transparent_is_put_on_white(form, mode):
    image, options, seen = transparent(mode)
    options |= {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(form, {})
    prepared = prepare_image(encoded(image, form, **options), "rgb")
    assert "on white" in prepared.changes
    assert off(prepared, seen) < (4 if form in ("GIF", "AVIF") else 0.6)
    assert shown(prepared)[:, :11].min() == 255 or mode == "1"


def test_sixteen_bit_grey_with_a_transparent_value():
    values = np.linspace(0, 65535, 96).reshape(8, 12).astype(np.uint16)
    prepared = prepare_image(encoded(Image.fromarray(values), "PNG", transparency=int(values[3, 3])), "rgb")
    expected = np.round(values / 257)
    expected[3, 3] = 255
    assert prepared.changes == ("8 bit", "on white") and np.array_equal(shown(prepared)[:, :, 0], expected)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_palette_and_one_bit_keep_their_bytes_and_their_statistics_are_of_what_is_seen(mode):
    content = encoded(picture(5).convert(mode), "PNG")
    prepared = prepare_image(content, "rgb")
    assert prepared.content == content and prepared.changes == () and prepared.mode == mode
    assert prepared.mean == pytest.approx(tuple(shown(prepared).mean((0, 1)) / 255))


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "RGB"])
def test_bands_of_rows_change_nothing(mode, monkeypatch):
    image = Image.fromarray(np.linspace(0, 65535, 384).reshape(16, 24).astype(np.uint16))
    content = encoded(transparent("RGBA")[0] if mode == "RGBA" else picture(4) if mode == "RGB" else image, "PNG")
    whole = prepare_image(content, "rgb"), prepare_image(content, "keep")
    monkeypatch.setattr(colour, "BAND_PIXELS", 50)
    monkeypatch.setattr(moments, "BLOCK_VALUES", 50)
    banded = prepare_image(content, "rgb"), prepare_image(content, "keep")
    assert [image.content for image in banded] == [image.content for image in whole]
    assert [image.mean for image in banded] == [pytest.approx(image.mean) for image in whole]


# CMYK


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_the_first_frame_of_every_kind_of_animation_is_taken_and_that_is_said(form):
    first, second = picture(4, 64, 48), picture(5, 64, 48)
    options = {"lossless": True} if form == "WEBP" else {"quality": 100} if form == "AVIF" else {}
    prepared = prepare_image(encoded(first, form, save_all=True, append_images=[second], **options), "rgb")
    assert prepared.changes[0] == "first frame" and prepared.extension == "png"
    assert off(prepared, first) < (7 if form in ("GIF", "AVIF") else 0.1)


def test_damage_behind_the_first_frame_does_not_matter():
    first = picture(4, 64, 48).quantize(16)
    content = encoded(first, "GIF", save_all=True, append_images=[picture(5, 64, 48).quantize(16)])
    cut = content[: content.rindex(b"\x2c\0\0\0\0") + 2]  # within the second frame's own header
    for damaged in (cut, cut[:-1] + b"\xff", cut[:-2]):
        assert off(prepare_image(damaged, "rgb"), first.convert("RGB")) == 0


def test_of_an_mpo_the_first_picture_is_what_every_decoder_shows():
    content = encoded(picture(4, 64, 48), "MPO", save_all=True, append_images=[picture(5, 64, 48)])
    prepared = prepare_image(content, "rgb")
    assert (prepared.content, prepared.extension, prepared.format) == (content, "jpg", "MPO")
    assert np.array_equal(shown(prepared), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


# What is asked for


@pytest.mark.parametrize("form, extension", [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "png"), ("TIFF", "png")])
def test_a_large_image_is_made_smaller_and_a_small_one_keeps_its_bytes(form, extension):
    content = encoded(picture(6, 300, 200), form)
    prepared = prepare_image(content, "rgb", ImageRule(max_side=100))
    assert (prepared.width, prepared.height, prepared.changes) == (100, 67, ("resized",))
    assert prepared.extension == extension and prepared.upright_size == (300, 200)
    assert shown(prepared).shape == (67, 100, 3)
    assert (
        off(prepared, Image.open(io.BytesIO(content)).convert("RGB").resize((100, 67), Image.Resampling.BICUBIC)) < 1.5
    )
    assert prepare_image(content, "rgb", ImageRule(max_side=300)).content == content


def test_a_photo_on_its_side_is_measured_upright_and_resized_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    prepared = prepare_image(encoded(picture(6, 300, 200), exif=exif), "rgb", ImageRule(max_side=150))
    assert (prepared.width, prepared.height, prepared.changes) == (100, 150, ("upright", "resized"))
    assert prepared.upright_size == (200, 300)


def test_a_line_of_pixels_stays_one():
    assert prepare_image(encoded(picture(6, 3000, 4), "PNG"), "rgb", ImageRule(max_side=100)).height == 1


@pytest.mark.parametrize("format, form", [("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
@pytest.mark.parametrize("source", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_every_image_becomes_of_the_format_that_is_asked_for(source, format, form):
    content = encoded(picture(6, 64, 48), source)
    prepared = prepare_image(content, "rgb", ImageRule(format=format))
    assert Image.open(io.BytesIO(prepared.content)).format == form
    assert prepared.extension == {"jpeg": "jpg"}.get(format, format)
    if source == form:
        assert prepared.content == content and prepared.changes == ()
    else:
        assert prepared.changes == (f"from {source}",)
        assert off(prepared, Image.open(io.BytesIO(content)).convert("RGB")) < 6


def test_quality_is_of_what_is_written_anew():
    content = encoded(picture(6, 200, 200), "PNG")
    sizes = [
        len(prepare_image(content, "rgb", ImageRule(format="jpeg", quality=quality)).content)
        for quality in (100, 95, 40)
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[2]
    stored = prepare_image(content, "rgb", ImageRule(format="jpeg")).content
    assert simplejpeg.decode_jpeg_header(stored)[3] == "444"
    jpeg = encoded(picture(6))
    assert prepare_image(jpeg, "rgb", ImageRule(quality=10)).content == jpeg


def test_an_image_that_no_webp_can_hold_is_rejected():
    with pytest.raises(ImageFault, match="do not fit into a .webp"):
        prepare_image(encoded(Image.new("RGB", (17_000, 2)), "PNG"), "rgb", ImageRule(format="webp"))


# Bombs


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM"])
def test_a_header_that_claims_too_much_is_enough(form, monkeypatch):
    content = encoded(Image.new("RGB", (101, 100)), form)
    assert prepare_image(content, "rgb", ImageRule(max_pixels=10_100)).width == 101
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("was decoded"))
    with pytest.raises(ImageFault, match="101 x 100 is more than 10099 pixels") as caught:
        prepare_image(content, "rgb", ImageRule(max_pixels=10_099))
    assert caught.value.reason == "too_many_pixels"


@pytest.mark.parametrize(
    "options", [{"lossless": True}, {}, {"save_all": True, "append_images": [picture(1, 101, 100)]}]
)
def test_a_webp_is_measured_before_pillow_opens_it(options, monkeypatch):
    content = encoded(picture(0, 101, 100), "WEBP", **options)
    monkeypatch.setattr("PIL.Image.open", lambda *arguments, **keys: pytest.fail("was opened"))
    with pytest.raises(ImageFault, match="101 x 100 is more"):
        prepare_image(content, "rgb", ImageRule(max_pixels=10_099))


def test_arrays_are_measured_by_their_header():
    content = (
        b"\x93NUMPY\x01\x00v\x00"
        + repr({"descr": "|u1", "fortran_order": False, "shape": (10**5, 10**5)}).encode().ljust(117)
        + b"\n"
    )
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((100, 101, 5), np.uint8), photometric="minisblack", planarconfig="contig")
    for bomb, limit in ((content, 10**9), (buffer.getvalue(), 10_099)):
        with pytest.raises(ImageFault) as caught:
            prepare_image(bomb, "keep", ImageRule(max_pixels=limit))
        assert caught.value.reason == "too_many_pixels"


# Configs


@pytest.mark.parametrize("config, words", [
    ({"max_side": 0}, "max_side"),
    ({"quality": 101}, "quality"),
    ({"format": "gif"}, "format"),
    ({"colour": "rgb"}, "colour"),
    ({"max_image_seconds": 0}, "max_image_seconds"),
    ({"max_pixels": 10**9}, "max_pixels"),
    ({"max_side": 100, "channels": "keep"}, "max_side: 100 needs channels=rgb"),
    ({"format": "png", "channels": "keep"}, "format: png needs channels=rgb"),
    ({"colour": "srgb", "channels": "keep"}, "colour: srgb needs channels=rgb"),
    ({"quality": 90, "format": "png"}, "quality: 90 says nothing of a PNG"),
    ({"max_pixels": 100_000_000}, "say max_side as well, at most 9459"),
    ({"max_pixels": 100_000_000, "max_side": 9460}, "say max_side as well, at most 9459"),
])  # fmt: skip
def test_a_config_that_cannot_be_meant_is_one_line(config, words):
    with pytest.raises(InputError, match=words) as caught:
        validate(IngestConfig, config, "set")
    assert len(caught.value.problems) == 1
    IngestConfig(max_pixels=100_000_000, max_side=9459)


@pytest.mark.parametrize("config", [{"max_side": 100}, {"quality": 90}, {"format": "png"}, {"colour": "srgb"}])
def test_what_would_make_new_images_is_refused_of_tars_that_are_not_rewritten(config, tmp_path):
    path = write_tar(tmp_path / "a.tar", [("one.jpg", encoded(picture(1)))])
    (key,) = config
    with pytest.raises(InputError, match=f"{key}: .*: adopted tars stay as they are"):
        ingest(str(path), tmp_path / "dataset", IngestConfig(**config))


def test_what_is_asked_for_makes_another_dataset_and_the_defaults_do_not(tmp_path):
    source = write_pictures(tmp_path / "source", ["a.jpg", "b.png"])
    ingest(str(source), tmp_path / "dataset", IngestConfig())
    made_from = json.loads((tmp_path / "dataset/index.json").read_text())["provenance"]["made_from"]
    assert not {"colour", "max_side", "quality", "format", "max_pixels", "max_image_seconds"} & made_from.keys()
    with pytest.raises(InputError, match="another dataset: max_side is None there, 10 now"):
        ingest(str(source), tmp_path / "dataset", IngestConfig(max_side=10))
    report = ingest(str(source), tmp_path / "small", IngestConfig(max_side=10, format="webp"))
    assert check_dataset(report.directory, full=True) == [] and sum(report.samples.values()) == 2


@pytest.mark.slow
def test_the_largest_images_take_no_more_memory_than_is_said():
    """One process each: its greatest size, with what is decoded into."""
    script = """
import sys
from pathlib import Path
from pipeline.ingestion.images import prepare_image
prepare_image(Path(sys.argv[1]).read_bytes(), "rgb")
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10)
"""
    side = 9459
    kinds = {"I;16": "PNG", "RGBA": "PNG", "P": "GIF"}
    with tempfile.TemporaryDirectory() as folder:
        for mode, form in kinds.items():
            path = Path(folder) / "large"
            path.write_bytes(encoded(Image.new(mode, (side, side)), form))
            done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
            assert int(done.stdout) < 1024, (mode, done.stdout)
