"""168 odd, corrupt and hostile files: what becomes of each is written down, and none takes much memory.

`tests/golden/odd_images.tsv` states every outcome; VIT_ACCEPT_GOLDEN=1 writes it anew, for a person to read.
"""

import hashlib
import io
import json
import os
import tarfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.build import ingest
from pipeline.ingestion.images import prepare_image
from pipeline.ingestion.isolation import Limits, held, in_isolation
from pipeline.ingestion.sources.folder import FolderSource
from pipeline.shards.check import check_dataset
from pipeline.shards.decoding import ImageFault
from tests.pipeline.pictures import files_of

pytestmark = pytest.mark.data

GOLDEN = Path(__file__).parents[2] / "golden/odd_images.tsv"
NUM_FILES = 168
GIBIBYTE = 1 << 30
# Shown by a rule of ours, and not as Pillow's own `.convert("RGB")` shows it
BY_RULE = {
    "tiff/12bit.cropped.tif": lambda image: np.asarray(image) / 4095 * 255,
    "tiff/16bit.cropped.tif": lambda image: np.asarray(image) / 257,
    "other/hopper_16bit.pgm": lambda image: np.asarray(image) / 257,
    "derived/grey16.png": lambda image: np.asarray(image) / 257,
    "webp_avif_jp2/issue_6194.j2k": lambda image: np.asarray(image) / 257,
    "png/i_trns.png": lambda image: np.where(
        np.asarray(image) == image.info["transparency"], 255, np.asarray(image) / 257
    ),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """The files, unpacked."""
    if not (data := os.environ.get("VIT_TEST_DATA")):
        pytest.skip("VIT_TEST_DATA is not set")
    folder = tmp_path_factory.mktemp("odd")
    with zipfile.ZipFile(Path(data) / "odd_images/odd_images.zip") as archive:
        archive.extractall(folder)
    (folder / "odd/manifest.csv").unlink()
    return folder / "odd"


@pytest.fixture(scope="module")
def dataset(odd, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("datasets") / "odd"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a person would see on the terminal
        ingest(str(odd), directory, IngestConfig(max_rejected_fraction=1.0, samples_per_shard=30))
    return directory


def taken(directory):
    """(record, extension, stored bytes) of every sample."""
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, content in members.items():
            if name.endswith(".json"):
                (image,) = (other for other in members if other != name and other.split(".")[0] == name.split(".")[0])
                yield json.loads(content), image.rpartition(".")[2], members[image]


def outcomes(directory) -> dict[str, str]:
    rejected = [json.loads(line) for line in (directory / "rejected.jsonl").read_text().splitlines()]
    told = {entry["path"]: f"rejected\t{entry['reason']}" for entry in rejected}
    for record, extension, _ in taken(directory):
        assert record["source"] not in told
        size = f"{record['width']}x{record['height']}"
        told[record["source"]] = "\t".join(["taken", extension, size, ", ".join(record.get("changes", ["as it is"]))])
    return told


def test_every_file_ends_as_it_is_written_down(odd, dataset):
    files = {str(path.relative_to(odd)) for path in odd.rglob("*") if path.is_file()}
    found = outcomes(dataset)
    assert found.keys() == files and len(files) == NUM_FILES
    lines = "".join(f"{path}\t{outcome}\n" for path, outcome in sorted(found.items()))
    if os.environ.get("VIT_ACCEPT_GOLDEN"):
        GOLDEN.write_text(lines)
    assert lines == GOLDEN.read_text()
    assert check_dataset(dataset, full=True) == []


def test_hostile_names_are_safe_keys(odd, dataset):
    for path in dataset.glob("*.tar"):
        with tarfile.open(path) as tar:
            names = tar.getnames()
        assert all(name.isascii() and "/" not in name and name.count(".") == 1 and " " not in name for name in names)
    sources = [record["source"] for record, _, _ in taken(dataset)]
    assert len(sources) == len(set(sources)) and "derived/n\u00e4me-\u6771\u4eac-\U0001f600.jpg" in sources


def reference(content: bytes, path: str) -> np.ndarray:
    """(H, W, 3): how Pillow itself shows a file, upright, on white; by its rule where that is another."""
    image = Image.open(io.BytesIO(content))
    image.load()
    if path in BY_RULE:
        return np.repeat(np.round(BY_RULE[path](image))[:, :, None], 3, axis=2)
    image = ImageOps.exif_transpose(image)
    rgba = image.convert("RGBA") if image.has_transparency_data else None
    if rgba is not None and rgba.getextrema()[3][0] < 255:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def test_what_is_taken_shows_what_pillow_shows(odd, dataset):
    compared = 0
    for record, extension, content in taken(dataset):
        file = (odd / record["source"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == record["sha256"]
        if "changes" not in record:
            assert content == file
        if record["width"] * record["height"] > 10**7:
            continue  # decoding it twice over takes long, and its bytes are the file's
        shown = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int) if "changes" in record else None
        expected = reference(file, record["source"])
        if shown is None:
            assert expected.shape[:2] == (record["height"], record["width"])
            continue
        difference = np.abs(shown - expected).mean()
        assert difference <= (2 if extension == "jpg" else 0), record
        compared += 1
    assert compared > 30


@dataclass(frozen=True)
class Probe:
    """Prepares files one after the other, and tells how much its process grew to on each."""

    folder: Path
    paths: tuple[str, ...]

    def run(self) -> dict[str, int]:
        peaks = {}
        for number, path in enumerate(self.paths):
            content = (self.folder / path).read_bytes()
            Path("/proc/self/clear_refs").write_text("5")  # forget the greatest size so far
            for channels in ("rgb", "keep"):
                try:
                    with held(number) as start_clock:
                        start_clock()
                        prepare_image(content, channels)
                except ImageFault as fault:
                    assert fault.reason not in ("decoder_crashed", "too_slow"), (path, fault)
                    # 65,535 channels, which nobody asks for as RGB
                    claims = fault.reason == "too_much_memory"
                    assert not claims or (path, channels) == ("tiff/libtiff_segfault.tif", "keep"), (path, fault)
            status = Path("/proc/self/status").read_text()
            peaks[path] = int(status.partition("VmHWM:")[2].split()[0]) << 10
        return peaks


def test_no_file_takes_a_gibibyte_or_half_a_minute(odd):
    paths = sorted(file.path for file in FolderSource(odd).list_files().images)
    tasks = [Probe(odd, tuple(paths[start::3])) for start in range(3)]
    peaks = {}
    for told in in_isolation(Probe.run, tasks, 1, Limits(30, GIBIBYTE), 0):
        peaks |= told
    assert len(peaks) == len(paths) > 120
    worst = max(peaks, key=peaks.get)
    print(f"{worst}: {peaks[worst] >> 20} MiB")
    assert peaks[worst] < GIBIBYTE


def test_any_number_of_processes_makes_the_same_dataset(odd, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.ingestion.plan.POOL_FROM_BYTES", 0)
    config = IngestConfig(max_rejected_fraction=1.0, samples_per_shard=30, workers=2)
    assert files_of(ingest(str(odd), tmp_path / "again", config).directory) == files_of(dataset)
