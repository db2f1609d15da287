"""Inks and colour profiles: what a file means by its values, or what training libraries read."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms

from pipeline.ingestion.images import ImageRule, prepare_image
from tests.pipeline.ingestion.test_image_rules import off, shown
from tests.pipeline.pictures import encoded, picture

INKS = Image.merge("CMYK", [picture(number, 64, 32, "L") for number in range(10, 14)])


def without_adobe(content):
    """A JPEG without its APP14 segment."""
    at = content.index(b"\xff\xee")
    return content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4], "big") :]


def ycck(inks):
    """The JPEG of Adobe's YCCK: inks inverted, three of them as luminance and chroma; Pillow writes CMYK only."""
    cyan, magenta, yellow, black = inks.split()
    luminance = Image.merge("RGB", [cyan, magenta, yellow]).convert("YCbCr").split()
    stored = Image.merge("CMYK", [*luminance, ImageChops.invert(black)])
    content = bytearray(encoded(ImageChops.invert(stored), "JPEG", quality=100, subsampling=0))
    at = content.index(b"Adobe") + 11
    content[at] = 2
    return bytes(content)


@pytest.mark.parametrize("kind", ["Adobe", "plain", "YCCK", "TIFF"])
def test_inks_become_colours_whether_the_file_holds_them_inverted_or_not(kind):
    content = {
        "Adobe": lambda: encoded(INKS, "JPEG", quality=100, subsampling=0),
        "plain": lambda: without_adobe(encoded(ImageChops.invert(INKS), "JPEG", quality=100, subsampling=0)),
        "YCCK": lambda: ycck(INKS),
        "TIFF": lambda: encoded(INKS, "TIFF"),
    }[kind]()
    prepared = prepare_image(content, "rgb")
    assert prepared.changes == ("CMYK as RGB",) and prepared.mode == "CMYK"
    assert prepared.extension == ("png" if kind == "TIFF" else "jpg")
    assert off(prepared, INKS.convert("RGB")) < 1.5
    kept = prepare_image(content, "keep")
    assert kept.content == content and kept.changes == ()


# Colour profiles


def profile_of(space, tags):
    """A colour profile (ICC) of version 2 with these tags and a description."""
    name = b"test " + space + b"\0"
    described = b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(12 + 67)
    tags = {b"desc": described, b"wtpt": xyz(0.9642, 1.0, 0.8249), **tags}
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    connection = b"Lab " if space == b"CMYK" else b"XYZ "
    header = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02100000, kind, space, connection) + bytes(12)
    header += b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def xyz(*values):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256)) + bytes(2)


def rgb_profile(colorants, power):
    curves = {name: gamma(power) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return profile_of(b"RGB ", {**{name: xyz(*value) for name, value in colorants.items()}, **curves})


ADOBE_RGB = rgb_profile(  # the colours of Adobe RGB (1998), adapted to D50
    {b"rXYZ": (0.6097, 0.3111, 0.0195), b"gXYZ": (0.2053, 0.6257, 0.0609), b"bXYZ": (0.1492, 0.0632, 0.7446)}, 563 / 256
)
GREY_LINEAR = profile_of(b"GRAY", {b"kTRC": gamma(1.0)})
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_by_default_a_profile_changes_nothing_and_its_name_is_known():
    for profile, name in ((ADOBE_RGB, "test RGB"), (SRGB, "sRGB"), (b"no profile", "unreadable"), (None, None)):
        content = encoded(picture(6), "PNG", icc_profile=profile)
        prepared = prepare_image(content, "rgb")
        assert (prepared.content, prepared.changes, prepared.profile) == (content, (), name)


@pytest.mark.parametrize(
    "form, mode", [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("WEBP", "RGB")]
)
def test_colours_are_converted_to_srgb_where_that_is_asked_for(form, mode):
    image = Image.new("RGB", (32, 16), (200, 100, 50))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    prepared = prepare_image(encoded(image, form, icc_profile=ADOBE_RGB), "rgb", ImageRule(colour="srgb"))
    # Adobe RGB's published matrix and gamma, and sRGB's: a colour within both
    linear = np.array([200, 100, 50]) / 255
    tristimulus = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]]) @ linear ** (
        563 / 256
    )
    to_srgb = [[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]]  # from D50
    srgb = np.clip(np.array(to_srgb) @ tristimulus, 0, 1)
    expected = np.where(srgb <= 0.0031308, 12.92 * srgb, 1.055 * srgb ** (1 / 2.4) - 0.055) * 255
    assert prepared.changes == ("to sRGB",)
    assert np.abs(shown(prepared)[8, 16] - expected).max() < 4 and abs(expected[0] - 200) > 15
    assert not Image.open(io.BytesIO(prepared.content)).info.get("icc_profile")


def test_a_profile_that_is_srgb_by_its_numbers_keeps_the_bytes():
    content = encoded(picture(6), "JPEG", icc_profile=SRGB)
    assert prepare_image(content, "rgb", ImageRule(colour="srgb")).content == content


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_grey_profile_is_followed(mode):
    image = (
        Image.new("L", (8, 8), 128).convert("LA")
        if mode == "LA"
        else Image.new(mode, (8, 8), 128 if mode == "L" else 32896)
    )
    prepared = prepare_image(encoded(image, "PNG", icc_profile=GREY_LINEAR), "rgb", ImageRule(colour="srgb"))
    assert prepared.changes[-1] == "to sRGB" and np.abs(shown(prepared) - 188).max() <= 1  # half of the light


@pytest.mark.parametrize("profile", [b"no profile", GREY_LINEAR, ADOBE_RGB[:200]])
def test_a_profile_that_cannot_be_used_is_ignored_and_that_is_said(profile):
    content = encoded(picture(6), "JPEG", icc_profile=profile)
    prepared = prepare_image(content, "rgb", ImageRule(colour="srgb"))
    assert prepared.changes == ("profile ignored",) and prepared.content == content


def cmyk_profile():
    """Inks of an invented press: Lab at the 16 corners of the inks, each of which dyes as its name says."""
    corners = []
    for number in range(16):
        cyan, magenta, yellow, black = (number >> bit & 1 for bit in (3, 2, 1, 0))
        lightness = 100 - 20 * (cyan + magenta + yellow) - 40 * black
        corners += [round(max(lightness, 0) * 2.55), 128 - 30 * cyan + 50 * magenta, 128 - 30 * cyan + 60 * yellow]
    identity = struct.pack(">9i", *(65536 if number % 4 == 0 else 0 for number in range(9)))
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + bytes(corners) + ramp * 3
    return profile_of(b"CMYK", {b"A2B0": table})


def test_inks_go_through_their_profile_where_that_is_asked_for():
    image = Image.new("CMYK", (16, 16), (0, 255, 0, 0))
    for content in (
        encoded(image, "JPEG", icc_profile=cmyk_profile()),
        encoded(image, "TIFF", icc_profile=cmyk_profile()),
    ):
        plain = prepare_image(content, "rgb")
        asked = prepare_image(content, "rgb", ImageRule(colour="srgb"))
        assert plain.changes == ("CMYK as RGB",) and asked.changes == ("CMYK as RGB", "to sRGB")
        assert plain.profile == asked.profile == "test CMYK"
        assert np.abs(shown(plain)[8, 8] - (255, 0, 255)).max() < 3
        assert 240 <= shown(asked)[8, 8][0] and shown(asked)[8, 8][1] > 100  # Lab 80, 50, 0: a pink


# Frames
