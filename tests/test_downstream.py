"""What pretraining is worth here: the table of README, from images to numbers, by the commands of README.

One network of half a million weights learns for some minutes from the training images of three datasets together, once
by masked patches without labels, once from the labels; a third never learns. Then a suite scores all three. Run it:

    VIT_TEST_DATA=DIR uv run pytest -m soak tests/test_downstream.py -s
"""

import gzip
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [
    pytest.mark.soak,
    pytest.mark.data,
    pytest.mark.timeout(4 * 3600),
    pytest.mark.skipif("VIT_TEST_DATA" not in os.environ, reason="VIT_TEST_DATA is not set"),
]
FASHION_TRAINED = 20_000
STEPS = int(os.environ.get("VIT_SOAK_STEPS", "1800"))
TRANSFER_STEPS = int(os.environ.get("VIT_SOAK_TRANSFER_STEPS", "100"))
NETWORK = [
    "encoder.name=vit_ti16", "encoder.image_size=32", "encoder.patch_size=4", "encoder.embed_dim=96", "encoder.depth=5",
    "encoder.num_heads=3", "encoder.pooling=mean", "global_batch_size=64", "micro_batch_size=32",
    "optimizer.learning_rate=1e-3", "augmentation.crop_scale=[0.4,1.0]", f"steps={STEPS}",
]  # fmt: skip
MASKED = ["objective.decoder.embed_dim=64", "objective.decoder.depth=2", "objective.decoder.num_heads=4"]
PLAIN = ["augmentation.rand_augment_layers=0", "augmentation.mixup_alpha=0"]  # of few epochs
SUITE = """
datasets:
  fashion: {{data: {home}/data/fashion}}
  cifar: {{data: {home}/data/cifar}}
  caltech: {{data: {home}/data/caltech}}
protocols: [linear-cached-v1, knn-20-v1, fewshot-lsr-v1, finetune-transfer-v1]
models: {{supervised: {home}/runs/supervised, random weights: "random:{home}/runs/masked"}}
training: {{finetune-transfer-v1: {{steps: {transfer}, global_batch_size: 64}}}}
settings: {{worst_images: 0}}
"""


def vit(home: Path, *arguments: str) -> str:
    """Run a command to its end; its output, which is also shown."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "flows", *arguments], env=os.environ | {"VIT_HOME": str(home)},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    sys.stdout.write(f"{time.monotonic() - started:.0f} s  vit {' '.join(arguments)[:100]}\n")
    return done.stdout


def unpack_fashion(folder: Path) -> None:
    source = Path(os.environ["VIT_TEST_DATA"]) / "fashion_mnist"
    classes = [name.replace("/", "-") for name in (source / "classes.txt").read_text().split("\n") if name]
    for name, split, count in (("train", "train", FASHION_TRAINED), ("t10k", "test", 10_000)):
        pixels = gzip.decompress((source / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((source / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:]
        images = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)
        for number in range(count):
            target = folder / split / classes[labels[number]]
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number]).save(target / f"{number:05d}.png", compress_level=1)


def unpack_cifar(folder: Path) -> None:
    with zipfile.ZipFile(Path(os.environ["VIT_TEST_DATA"]) / "cifar10/cifar10_png_15k.zip") as archive:
        archive.extractall(folder)


def unpack_caltech(folder: Path) -> None:
    source = Path(os.environ["VIT_TEST_DATA"]) / "caltech101"
    with zipfile.ZipFile(source / "caltech101_99.zip") as archive:
        for split in ("train", "test"):
            for path in (source / f"{split}.txt").read_text().split():
                target = folder / split / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(f"101_ObjectCategories/{path}"))


def test_what_pretraining_is_worth_on_three_datasets(tmp_path_factory):
    home = Path(os.environ.get("VIT_SOAK_HOME") or tmp_path_factory.mktemp("downstream"))
    datasets = []
    for name, unpack in (("fashion", unpack_fashion), ("cifar", unpack_cifar), ("caltech", unpack_caltech)):
        if not (home / "data" / name).exists():
            unpack(home / "photos" / name)
            vit(home, "ingest", str(home / "photos" / name), str(home / "data" / name))
        datasets += ["--data", f"{home / 'data' / name}=1"]
    for name, recipe, own in (
        ("masked", "pretrain_mae_vit_s16", MASKED),
        ("supervised", "pretrain_supervised_vit_s16", PLAIN),
    ):
        vit(home, "pretrain", recipe, *datasets, *settings([*NETWORK, *own]), "--run-dir", str(home / "runs" / name),
            "--no-rehearse")  # fmt: skip
    suite = home / "downstream.yaml"
    suite.write_text(SUITE.format(home=home, transfer=TRANSFER_STEPS))
    output = vit(home, "evaluate", str(home / "runs/masked"), "--suite", str(suite))
    table = output[output.index("protocol ") :]
    sys.stdout.write(table)
    result = json.loads(max((home / "runs").glob("evaluate-downstream-*/result.json")).read_text())
    for name in ("fashion", "cifar", "caltech"):
        scores = {model: metrics[f"eval/linear-cached-v1/{name}/top1"] for model, metrics in result["metrics"].items()}
        assert scores["model"] > scores["random weights"] and scores["supervised"] > scores["random weights"], name


def settings(values: list[str]) -> list[str]:
    return [word for value in values for word in ("--set", value)]
