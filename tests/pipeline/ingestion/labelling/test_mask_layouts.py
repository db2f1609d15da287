"""Images and masks where people keep them: beside each other, by split, and as in PASCAL VOC."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.build import ingest
from pipeline.ingestion.labelling.annotations import _masks_beside
from pipeline.shards.annotations import decode_mask
from pipeline.shards.check import check_dataset
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from tests.pipeline.pictures import write_pictures

VOC_CLASSES = ("background", "aeroplane", "bicycle", "bird")


def write_masks(folder, names: list[str], palette: bool = False) -> None:
    for number, name in enumerate(names):
        values = np.full((16, 24), number % 4, np.uint8)
        values[:2] = 255  # the void border
        image = Image.fromarray(values)
        if palette:
            image = image.convert("P")
            image.putdata(values.ravel().tolist())
            image.putpalette([number * 7 % 256 for number in range(768)])
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def masks_of(directory) -> dict[str, tuple[str, np.ndarray]]:
    index, found = read_index(directory), {}
    for split in index.splits:
        reader = ShardReader(index, split)
        for shard, size in enumerate(reader.shard_sizes):
            for number in range(size):
                source = reader.record(shard, number)["source"]
                found[source] = (split, decode_mask(reader.mask(shard, number)))
    return found


@pytest.mark.parametrize("image, mask", [
    ("{number}.jpg", "{number}.png"),
    ("train/{number}.png", "train/{number}.png"),
])  # fmt: skip
def test_images_and_masks_in_folders_beside_each_other(tmp_path, image, mask):
    write_pictures(tmp_path / "images", [image.format(number=number) for number in range(8)])
    write_masks(tmp_path / "masks", [mask.format(number=number) for number in range(8)])
    ingest(str(tmp_path / "images"), tmp_path / "dataset", IngestConfig(masks=tmp_path / "masks"))
    found = masks_of(tmp_path / "dataset")
    assert len(found) == 8
    for source, (_, values) in found.items():
        assert values[5, 5] == int(source[-5]) % 4 and values[0, 0] == 255
    assert check_dataset(tmp_path / "dataset", full=True) == []


@pytest.mark.parametrize("images, masks", [
    ("images", "masks"), ("JPEGImages", "SegmentationClass"), ("train/images", "train/labels"), ("img", "annotations"),
])  # fmt: skip
def test_a_folder_of_both_is_refused_with_what_to_type(tmp_path, images, masks):
    root = tmp_path / "set"
    write_pictures(root / images, [f"{number}.jpg" for number in range(6)])
    write_masks(root / masks, [f"{number}.png" for number in range(4)])
    typed = f"vit ingest {root / images} DEST --set masks={root / masks}"
    with pytest.raises(InputError) as caught:
        ingest(str(root), tmp_path / "dataset", IngestConfig())
    assert typed in str(caught.value) and "seems to hold masks" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        ingest(str(root), tmp_path / "dataset", IngestConfig(masks=root / masks))
    assert typed in str(caught.value) and "masks: lies in the source" in str(caught.value)
    assert not (tmp_path / "dataset").exists()
    done = typed.replace("DEST", str(tmp_path / "dataset")).split()[1:]
    command = [sys.executable, "-m", "flows", *done, "--set", "max_rejected_fraction=0.5"]
    subprocess.run(command, check=True, capture_output=True)
    assert len(masks_of(tmp_path / "dataset")) == 4


@pytest.mark.parametrize("names", [
    ["labels/1.jpg", "images/1.jpg"],  # no .png
    ["labels/7.png", "images/1.png"],  # of no image there
    ["ants/1.png", "bees/1.png"],  # names that only look alike
])  # fmt: skip
def test_classes_are_not_taken_for_masks(tmp_path, names):
    ingest(str(write_pictures(tmp_path / "set", names)), tmp_path / "dataset", IngestConfig())
    assert read_index(tmp_path / "dataset").num_classes == 2


def test_masks_beside_are_looked_for_in_one_pass():
    """It was (folders with such names) x (files): a minute for these."""
    files = [f"{number}/{folder}/{name}" for number in range(10_000) for folder, name in (
        ("images", "a.jpg"), ("labels", "b.png"))]  # fmt: skip
    start = time.process_time()
    assert _masks_beside(files) is None
    assert _masks_beside([*files, "9/images/b.jpg"]) == ("9/images", "9/labels")
    assert time.process_time() - start < 5


def test_pascal_voc_as_it_unpacks(tmp_path):
    voc = tmp_path / "VOCdevkit/VOC2012"
    names = [f"2007_{number:06d}" for number in range(12)]
    write_pictures(voc / "JPEGImages", [f"{name}.jpg" for name in names])
    segmented = names[2:10]
    for folder in ("SegmentationClass", "SegmentationObject"):
        write_masks(voc / folder, [f"{name}.png" for name in segmented], palette=True)
    lists = voc / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(segmented[:5]) + "\n")
    (lists / "val.txt").write_text("\n".join(segmented[5:]) + "\n")
    (voc / "Annotations").mkdir()
    (voc / "Annotations/2007_000000.xml").write_text("<annotation/>")
    config = IngestConfig(
        masks=voc / "SegmentationClass",
        mask_classes=VOC_CLASSES,
        splits={"train": lists / "train.txt", "validation": lists / "val.txt"},
    )
    report = ingest(str(voc / "JPEGImages"), tmp_path / "dataset", config)
    assert report.samples == {"train": 5, "validation": 3} and report.rejected == {"outside_splits": 4}
    index = read_index(tmp_path / "dataset")
    assert index.mask_classes == VOC_CLASSES and index.classes is None
    for source, (split, values) in masks_of(tmp_path / "dataset").items():
        number = segmented.index(source.removesuffix(".jpg"))
        assert split == ("train" if number < 5 else "validation")
        assert values[5, 5] == number % 4 and values[0, 0] == 255
    for line in (tmp_path / "dataset/rejected.jsonl").read_text().splitlines():
        assert json.loads(line)["reason"] == "outside_splits"
    with pytest.raises(InputError, match=f"vit ingest {voc}/JPEGImages DEST --set masks={voc}/SegmentationClass"):
        ingest(str(voc), tmp_path / "whole", IngestConfig())
    shutil.rmtree(voc / "SegmentationClass")
    with pytest.raises(InputError, match="masks: no such folder"):
        ingest(str(voc / "JPEGImages"), tmp_path / "other", config)


def test_images_without_labels_are_a_dataset(tmp_path):
    write_pictures(tmp_path / "set", [f"{number:03d}.jpg" for number in range(10)])
    report = ingest(str(tmp_path / "set"), tmp_path / "dataset", IngestConfig(split_fractions={"train": 1.0}))
    assert report.samples == {"train": 10} and report.num_classes == 0
    assert read_index(tmp_path / "dataset").classes is None
