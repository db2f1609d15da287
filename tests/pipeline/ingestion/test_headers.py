"""An image whose header is plain keeps its bytes unseen; whatever needs a rule is decoded, and is as with `pixels`."""

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.build import ingest
from pipeline.ingestion.headers import plain_header
from pipeline.ingestion.images import ImageRule, prepare_by_header, prepare_image
from pipeline.shards.check import check_dataset
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import read_index
from tests.pipeline.pictures import class_folders, files_of

HEADER = ImageRule(examine="header")


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x0112] = orientation
    return exif


def photo(mode="RGB", size=(37, 23)):
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (*size[::-1], 3), np.uint8))
    return image.convert(mode)


PLAIN = {
    "baseline": saved(photo(), "JPEG"),
    "progressive": saved(photo(), "JPEG", progressive=True),
    "grey": saved(photo("L"), "JPEG"),
    "comment": saved(photo(), "JPEG", comment=b"\xff\xda of a person"),
    "upright exif": saved(photo(), "JPEG", exif=turned(1)),
    "exif without orientation": saved(photo(), "JPEG", exif=Image.Exif()),
    "png": saved(photo(), "PNG"),
    "palette": saved(photo("P"), "PNG"),
    "bitmap": saved(photo("1"), "PNG"),
    "webp": saved(photo(), "WEBP"),
    "tiff": saved(photo(), "TIFF"),
    "tiff, deflated": saved(photo("L"), "TIFF", compression="tiff_deflate"),
}
NOT_PLAIN = {
    "turned": saved(photo(), "JPEG", exif=turned(6)),
    "turned png": saved(photo(), "PNG", exif=turned(3)),
    "turned tiff": saved(photo(), "TIFF", exif=turned(8)),
    "turned webp": saved(photo(), "WEBP", exif=turned(5)),
    "cmyk": saved(photo("CMYK"), "JPEG"),
    "profile": saved(photo(), "JPEG", icc_profile=b"colours" * 20),
    "alpha": saved(photo("RGBA"), "PNG"),
    "transparent colour": saved(photo(), "PNG", transparency=(0, 0, 0)),
    "16 bit": saved(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "PNG"),
    "animation": saved(photo("P"), "GIF", save_all=True, append_images=[photo("P", (37, 23))]),
    "bmp": saved(photo(), "BMP"),
    "two pages": saved(photo(), "TIFF", save_all=True, append_images=[photo()]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_image_keeps_its_bytes_and_says_what_the_decoder_says(name):
    by_header, decoded = prepare_by_header(PLAIN[name], HEADER), prepare_image(PLAIN[name], "rgb")
    assert by_header is not None and by_header[:5] == decoded[:5]
    assert (by_header.format, by_header.mode, by_header.pixels, by_header.mean) == (
        decoded.format, decoded.mode, None, None,
    )  # fmt: skip


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_needs_a_rule_is_decoded_after_all(name):
    assert prepare_by_header(NOT_PLAIN[name], HEADER) is None
    for channels in ("rgb", "keep"):
        assert prepare_image(NOT_PLAIN[name], channels, HEADER)[:5] == prepare_image(NOT_PLAIN[name], channels)[:5]


@pytest.mark.parametrize("name", PLAIN)
def test_an_image_that_is_cut_or_not_named_by_its_header_is_never_plain(name):
    content = PLAIN[name]
    for size in {1, 5, 20, len(content) // 2, len(content) - 13, len(content) - 1}:
        assert plain_header(content[:size]) is None or name.startswith("tiff")  # its directory lies before the end
    with pytest.raises(ImageFault):
        prepare_image(content[: len(content) // 2], "rgb", HEADER)


def test_a_wrong_checksum_of_a_png_is_found():
    content = bytearray(PLAIN["png"])
    content[len(content) // 2] ^= 1
    assert plain_header(bytes(content)) is None


@pytest.mark.parametrize("rule", [
    ImageRule(examine="header", max_side=36), ImageRule(examine="header", format="png"),
    ImageRule(examine="header", max_pixels=37 * 23 - 1),
])  # fmt: skip
def test_what_a_rule_changes_is_decoded(rule):
    assert prepare_by_header(PLAIN["baseline"], rule) is None


def test_shards_are_those_of_a_full_look_and_the_index_says_that_there_was_none(tmp_path):
    source = class_folders(tmp_path / "source")
    (source / "ant/turned.jpg").write_bytes(NOT_PLAIN["turned"])
    (source / "bee/palette.png").write_bytes(PLAIN["palette"])
    (source / "bee/text.jpg").write_text("not a picture")
    for examine in ("header", "pixels"):
        config = IngestConfig(samples_per_shard=7, examine=examine, max_rejected_fraction=0.1)
        ingest(str(source), tmp_path / examine, config)
    header, pixels = files_of(tmp_path / "header"), files_of(tmp_path / "pixels")
    assert {name for name in header if header[name] != pixels[name]} == {
        "index.json",
        "certificate.json",
        "certificate.html",
    }
    index, full = read_index(tmp_path / "header"), read_index(tmp_path / "pixels")
    assert not index.examined and full.examined and index.fingerprint == full.fingerprint
    assert index.statistics.mean is None and index.statistics.std is None
    assert index.statistics.width == full.statistics.width
    assert json.loads(header["index.json"])["provenance"]["made_from"]["examine"] == "header"
    assert check_dataset(tmp_path / "header", full=True) == []


def test_what_a_header_cannot_tell_a_full_check_finds(tmp_path):
    source = class_folders(tmp_path / "source")
    content = bytearray(PLAIN["png"])
    start = content.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", content[start - 8 : start - 4])
    content[start : start + 40] = bytes(40)  # no compressed data, under the right checksum
    content[start + length : start + length + 4] = struct.pack(">I", zlib.crc32(content[start - 4 : start + length]))
    (source / "ant/broken.png").write_bytes(content)
    report = ingest(str(source), tmp_path / "dataset", IngestConfig(examine="header"))
    assert report.rejected == {} and any("broken" in fault for fault in check_dataset(tmp_path / "dataset", full=True))


@pytest.mark.data
@pytest.mark.skipif("VIT_TEST_DATA" not in os.environ, reason="VIT_TEST_DATA is not set")
def test_no_odd_image_has_a_plain_header_that_its_pixels_gainsay():
    plain = 0
    with zipfile.ZipFile(Path(os.environ["VIT_TEST_DATA"]) / "odd_images/odd_images.zip") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            for rule in ({}, {"colour": "srgb"}, {"max_side": 64}, {"format": "png"}):
                if (found := prepare_by_header(content, ImageRule(examine="header", **rule))) is None:
                    continue
                plain += 1
                for channels in ("rgb", "keep"):
                    assert found[:5] == prepare_image(content, channels, ImageRule(**rule))[:5], name
    assert plain > 60
