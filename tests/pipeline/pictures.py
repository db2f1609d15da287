"""Small pictures and datasets for tests, made from numbers and so always the same."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.build import IngestReport, ingest


def picture(number: int, width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(number).integers(
        0, 256, (4, 6, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8
    )
    return Image.fromarray(pixels.squeeze(), mode=None).convert(mode).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_pictures(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number), "PNG" if name.endswith(".png") else "JPEG"))
    return folder


def class_folders(folder: Path, per_class: int = 20) -> Path:
    """Two classes, every fourth picture a PNG."""
    names = [
        f"{name}/{number:03d}.{'png' if number % 4 == 0 else 'jpg'}"
        for name in ("ant", "bee")
        for number in range(per_class)
    ]
    return write_pictures(folder, names)


def small_dataset(tmp_path: Path, per_class: int = 20, **config: object) -> IngestReport:
    source = class_folders(tmp_path / "source", per_class)
    return ingest(str(source), tmp_path / "dataset", IngestConfig(**{"samples_per_shard": 7, **config}))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def shards_of(directory: Path) -> dict[str, bytes]:
    """What does not say where the source lies: everything but the index and the certificate."""
    files = files_of(directory)
    return {name: content for name, content in files.items() if not name.startswith(("index", "certificate"))}


def files_of(directory: Path) -> dict[str, bytes]:
    """Every published file of a dataset, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith(".")}
