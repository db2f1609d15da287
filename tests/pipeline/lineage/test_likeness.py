"""The same image is found by its bytes, its pixels, or its looks; another is not."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.build import ingest
from pipeline.ingestion.duplicates.hamming import num_bits
from pipeline.ingestion.duplicates.hash_file import FOLDER
from pipeline.ingestion.duplicates.likeness import (
    MOST_BITS,
    are_near_copies,
    candidates,
    likeness,
    perceptual_hash,
)
from pipeline.ingestion.duplicates.sample_hashes import hashed_shards
from pipeline.lineage.matches import find_image, read_query
from pipeline.shards.index import read_index
from tests.pipeline.pictures import encoded

EXIF_ORIENTATION = 0x0112


def scene(number: int, size: int = 160, side: int = 9) -> Image.Image:
    """A picture with as much going on as a photo has: random blobs at several scales."""
    random = np.random.default_rng(number)
    layers = [
        Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize((size, size), 3)
        for cells in (3, 6, side)
    ]
    return Image.fromarray(np.mean([np.asarray(layer, np.float32) for layer in layers], axis=0).astype(np.uint8))


@pytest.fixture(scope="module", params=[160, 32])
def size(request):
    return request.param


@pytest.fixture(scope="module")
def index(size, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"scenes-{size}")
    for number in range(40):
        path = folder / "images" / f"{number:02d}.{'jpg' if number % 2 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(scene(number, size), "JPEG" if number % 2 else "PNG"))
    report = ingest(str(folder / "images"), folder / "dataset", IngestConfig(samples_per_shard=7, splits="hash"))
    return read_index(report.directory)


def found(tmp_path: Path, index, content: bytes) -> list[tuple[str, str]]:
    """(how, key without its hash) of every match."""
    path = tmp_path / "asked"
    path.write_bytes(content)
    matches, unread = find_image(read_query(str(path)), index, tmp_path / "cache")
    assert unread == 0
    return [(match.how, match.key[:2]) for match in matches]


def test_the_same_file_the_same_pixels_and_near_copies_are_found_and_nothing_else(index, size, tmp_path):
    image = scene(8, size)
    assert found(tmp_path, index, encoded(image, "PNG")) == [("bytes", "08")]
    assert found(tmp_path, index, encoded(image, "PNG", compress_level=1)) == [("pixels", "08")]
    assert found(tmp_path, index, encoded(image, "WEBP", lossless=True)) == [("pixels", "08")]
    assert found(tmp_path, index, encoded(image, "JPEG", quality=80)) == [("near", "08")]
    brighter = image.point(lambda value: min(255, value + 12))
    assert found(tmp_path, index, encoded(brighter, "PNG")) == [("near", "08")]
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert found(tmp_path, index, encoded(mirrored, "PNG")) == [("mirrored", "08")]
    assert found(tmp_path, index, encoded(scene(99, size), "PNG")) == []
    assert found(tmp_path, index, encoded(Image.new("RGB", (size, size), "white"), "PNG")) == []
    if size >= 64:
        half = image.resize((size // 2, size // 2), Image.Resampling.LANCZOS)
        assert found(tmp_path, index, encoded(half, "JPEG")) == [("near", "08")]


def test_a_photo_that_ingestion_turned_upright_is_found_by_what_it_stored(tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    source = tmp_path / "photos"
    source.mkdir()
    buffer = io.BytesIO()
    scene(3).save(buffer, "JPEG", exif=exif)
    (source / "turned.jpg").write_bytes(buffer.getvalue())
    for number in range(3):
        (source / f"{number}.png").write_bytes(encoded(scene(10 + number), "PNG"))
    split = IngestConfig(splits="hash", split_fractions={"train": 1.0})
    index = read_index(ingest(str(source), tmp_path / "dataset", split).directory)
    assert found(tmp_path, index, buffer.getvalue()) == [("stored", "tu")]


def test_hashes_are_computed_once_and_what_was_finished_stays(index, tmp_path, monkeypatch):
    bare = shutil.copytree(index.directory, tmp_path / "bare", ignore=shutil.ignore_patterns(FOLDER))
    index, told = read_index(bare), []
    first = [shard.hashes.copy() for shard in hashed_shards(index, tmp_path, lambda *counts: told.append(counts))]
    assert told[0] == (0, 40) and told[-1] == (40, 40) and sum(map(len, first)) == 40
    files = sorted(tmp_path.rglob("*.npy"))
    stamps = {path: path.stat().st_mtime_ns for path in files}
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:100])  # as after a copy that was cut off
    again = [shard.hashes.copy() for shard in hashed_shards(index, tmp_path)]
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    assert {path for path in files if path.stat().st_mtime_ns == stamps[path]} == set(files[2:])


def test_what_is_no_image_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_query(str(tmp_path / "nowhere.jpg"))
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(InputError, match="no image that can be decoded"):
        read_query(str(tmp_path / "text.jpg"))


def test_the_bits_of_a_perceptual_hash_are_those_of_the_lowest_frequencies():
    places = (np.arange(32) + 0.5) / 32
    wave = np.cos(np.pi * 3 * places)[:, None] * np.cos(np.pi * 2 * places)[None, :]  # frequency (3, 2) alone
    bits = int(perceptual_hash((100 + 50 * wave).round().astype(np.uint8)))
    assert bits >> (63 - (8 * 3 + 2)) & 1 and not bits >> 63


def drawing(number: int) -> Image.Image:
    """One or two flat shapes on a flat ground."""
    random = np.random.default_rng(number)
    image = Image.new("RGB", tuple(random.integers(80, 400, 2).tolist()), tuple(random.integers(0, 256, 3).tolist()))
    for _ in range(1 + number % 2):
        left, upper = (random.integers(0, size // 2) for size in image.size)
        box = (left, upper, left + random.integers(20, 100), upper + random.integers(20, 100))
        shape = ImageDraw.Draw(image).ellipse if number % 3 else ImageDraw.Draw(image).rectangle
        shape([int(value) for value in box], fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


def test_a_compressed_drawing_has_nearly_the_hash_of_the_drawing():
    bits = []
    for number in range(60):
        plain = likeness(encoded(drawing(number), "PNG"))
        compressed = likeness(encoded(drawing(number), "JPEG", quality=90))
        bits.append(int(num_bits(plain.hashes["perceptual"] ^ compressed.hashes["perceptual"])))
    assert sum(count <= MOST_BITS for count in bits) >= 58


def test_hashes_are_the_same_on_every_processor():
    """Known values, from whole numbers: a library for matrices that adds up in another order has no say."""
    even = np.full((32, 32), 77, np.uint8)
    symmetric = np.minimum(np.arange(32), np.arange(32)[::-1])[:, None].repeat(32, 1).astype(np.uint8) * 9
    assert int(perceptual_hash(even)) == 0
    assert hex(int(perceptual_hash(symmetric))) == "0x0"  # most of its frequencies are nothing
    assert hex(int(perceptual_hash(np.asarray(scene(1, 32).convert("L"))))) == "0x4be841dba05cfc91"


@pytest.mark.data
@pytest.mark.skipif("VIT_TEST_DATA" not in os.environ, reason="needs VIT_TEST_DATA")
def test_of_400_photos_every_recompressed_copy_is_found_and_few_others_look_alike(tmp_path):
    import zipfile

    with zipfile.ZipFile(Path(os.environ["VIT_TEST_DATA"]) / "caltech101/caltech101_99.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[::20][:400]
        contents = [archive.read(name) for name in names]
    images = [likeness(content) for content in contents]
    hashes = np.array([image.hashes for image in images])
    wrong = 0
    for number in range(0, len(contents), 8):
        copy = likeness(encoded(Image.open(io.BytesIO(contents[number])).convert("RGB"), "JPEG", quality=60))
        alike = np.flatnonzero(candidates(hashes, copy.hashes)).tolist()
        near = [other for other in alike if are_near_copies(copy, images[other])]
        assert number in near
        wrong += len(near) - 1
    assert wrong <= 1
