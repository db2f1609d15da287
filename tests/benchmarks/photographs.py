"""Images that benchmarks read, as class folders of JPEG files: photographs of ImageNet's size, and Caltech-101.

The photographs are mirror-tiled crops of the two that scikit-learn ships, turned by up to 12 degrees, with other light,
colour and sharpness and with a sensor's noise: 500x375 and the like (0.19 megapixels), quality 90, 4:2:0, about 65 kB
or 2.7 bits a pixel. Always the same pixels, made once and kept under the system's temporary directory.
"""

import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from tests.benchmarks.workspace import kept_directory, made_once

SIZES = ((500, 375),) * 4 + ((375, 500),) * 2 + ((500, 333),) * 3 + ((640, 480),)  # width, height; their shares
QUALITY = 90
NOISE = 5.3  # standard deviation of 0..255: what makes the files about 65 kB
CLASSES = 10
CALTECH = Path("caltech101/caltech101_99.zip")


def photograph_files(num_distinct: int, num_files: int) -> Path:
    """A workspace with `files/train/CLASS/*.jpg`: `num_distinct` photographs, repeated to `num_files` files."""

    def make(folder: Path) -> None:
        contents = [encoded_photograph(number) for number in range(num_distinct)]
        for number in range(num_files):
            name = f"files/train/class-{number % CLASSES}/{number:05d}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(contents[number % num_distinct])

    recipe = hashlib.sha256(encoded_photograph(0)).hexdigest()[:8]  # other pixels go to another place
    return made_once(kept_directory() / f"photographs-{num_distinct}-{num_files}-{recipe}", make)


def caltech_files(num_files: int) -> Path | None:
    """A workspace with files of Caltech-101, evenly spread over its list; None where VIT_TEST_DATA does not have it."""
    archive = Path(os.environ.get("VIT_TEST_DATA", "")) / CALTECH
    if not archive.is_file():
        return None

    def make(folder: Path) -> None:
        with zipfile.ZipFile(archive) as images:
            names = sorted(name for name in images.namelist() if name.endswith(".jpg"))
            for number in np.linspace(0, len(names) - 1, min(num_files, len(names))).astype(int):
                path = folder / "files" / "train" / Path(names[number]).parent.name / Path(names[number]).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(images.read(names[number]))

    return made_once(kept_directory() / f"caltech-{num_files}", make)


def encoded_photograph(number: int) -> bytes:
    """The `number`-th photograph as a JPEG file."""
    generator = np.random.Generator(np.random.Philox(number))
    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    width, height = SIZES[number % len(SIZES)]
    image = _turned_crop(_mirror_tiled(sources[number % 2]), width, height, generator)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, ImageEnhance.Sharpness):
        image = enhance(image).enhance(generator.uniform(0.8, 1.2))
    pixels = np.asarray(image) + generator.normal(0, NOISE, (height, width, 3))
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


def _mirror_tiled(image: Image.Image) -> Image.Image:
    """Three by three of the image, each neighbour mirrored, so that a crop never leaves it."""
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    return Image.fromarray(np.pad(pixels, ((height, height), (width, width), (0, 0)), mode="symmetric"))


def _turned_crop(image: Image.Image, width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """A crop about a random point of the middle tile, turned by up to 12 degrees, 0.8 to 1.25 times its size."""
    angle, scale = np.deg2rad(generator.uniform(-12, 12)), np.exp(generator.uniform(np.log(0.8), np.log(1.25)))
    centre_x, centre_y = (generator.uniform(side / 3, side * 2 / 3) for side in image.size)
    cosine, sine = np.cos(angle) * scale, np.sin(angle) * scale
    matrix = (
        cosine, sine, centre_x - cosine * width / 2 - sine * height / 2,
        -sine, cosine, centre_y + sine * width / 2 - cosine * height / 2,
    )  # fmt: skip
    return image.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
