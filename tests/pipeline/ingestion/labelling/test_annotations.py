"""Masks and boxes come with their images: round trip, the same bytes however made, and a line for whatever is wrong."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import tifffile
import webdataset as wds
from PIL import Image

from pipeline.config.ingest import IngestConfig
from pipeline.errors import DataError, InputError
from pipeline.ingestion import plan
from pipeline.ingestion.build import ingest
from pipeline.ingestion.images import file_orientation
from pipeline.ingestion.labelling.annotations import AnnotationRule, MaskFile, prepare_annotations
from pipeline.ingestion.making import IngestError
from pipeline.shards.annotations import boxes_fault, decode_mask
from pipeline.shards.check import check_dataset
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from tests.pipeline.pictures import encoded, files_of, picture, small_dataset, write_pictures
from tests.pipeline.scenes import CLASSES, scene, scene_dataset, write_scenes

COUNT = {"train": 40, "test": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return folder, scene_dataset(folder, COUNT).directory


def samples_of(directory):
    index = read_index(directory)
    for split in index.splits:
        reader = ShardReader(index, split)
        for shard, size in enumerate(reader.shard_sizes):
            yield from ((reader, shard, number, reader.record(shard, number)) for number in range(size))


def settings(folder, **config):
    own = {"masks": folder / "scenes/masks", "boxes": folder / "scenes/boxes.csv", "samples_per_shard": 16}
    return IngestConfig(**(own | config))


def test_masks_and_boxes_come_back_as_they_were(made):
    _, directory = made
    index = read_index(directory)
    assert index.mask_classes == CLASSES and set(index.box_classes) == set(CLASSES[1:]) and index.classes is None
    seen = 0
    for reader, shard, number, record in samples_of(directory):
        image, mask, boxes = scene(int(record["source"].split("/")[1].removesuffix(".png")))
        assert (decode_mask(reader.mask(shard, number)) == mask).all()
        found = [(*box[:4], index.box_classes[box[4]]) for box in record["boxes"]]
        assert found == boxes
        seen += 1
    assert seen == 48 and check_dataset(directory, full=True) == [] == check_dataset(directory, full=False)


def test_webdataset_reads_masks_and_boxes_beside_their_images(made):
    _, directory = made
    samples = list(wds.WebDataset(str(directory / "test-000000.tar"), shardshuffle=False))
    assert len(samples) == 8
    for sample in samples:
        assert {"png", "json", "mask.png"} <= sample.keys()
        record = json.loads(sample["json"])
        _, mask, boxes = scene(int(record["source"].split("/")[1].removesuffix(".png")))
        assert (np.asarray(Image.open(io.BytesIO(sample["mask.png"]))) == mask).all()
        assert len(record["boxes"]) == len(boxes)


def test_the_same_bytes_for_any_number_of_workers_and_after_a_damaged_shard(made, tmp_path, monkeypatch):
    folder, directory = made
    monkeypatch.setattr(plan, "POOL_FROM_BYTES", 0)
    config = settings(folder, mask_classes=CLASSES, workers=2)
    again = ingest(str(folder / "scenes/images"), tmp_path / "again", config).directory
    assert files_of(again) == files_of(directory)
    (again / "train-000001.tar").unlink()
    report = ingest(str(folder / "scenes/images"), again, config)
    assert (report.shards_written, files_of(again)) == (1, files_of(directory))


def test_the_fingerprint_covers_masks_and_boxes_and_is_as_before_without(made, tmp_path):
    folder, directory = made
    source = shutil.copytree(folder / "scenes", tmp_path / "scenes")
    images = str(source / "images")
    prints = [read_index(directory).fingerprint]
    prints.append(ingest(images, tmp_path / "plain", IngestConfig()).fingerprint)
    assert "masks" not in json.loads((tmp_path / "plain/index.json").read_text())["provenance"]["made_from"]
    assert not {"mask_classes", "box_classes"} & json.loads((tmp_path / "plain/index.json").read_text()).keys()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(source / "masks/train/0003.png")
    prints.append(ingest(images, tmp_path / "mask", settings(tmp_path, mask_classes=CLASSES)).fingerprint)
    shutil.copy(folder / "scenes/masks/train/0003.png", source / "masks/train/0003.png")
    rows = (source / "boxes.csv").read_text().splitlines()
    (source / "boxes.csv").write_text("\n".join(rows[:-1]))
    prints.append(ingest(images, tmp_path / "box", settings(tmp_path, mask_classes=CLASSES)).fingerprint)
    assert len(set(prints)) == 4


def test_a_changed_mask_rewrites_its_shard_alone(tmp_path):
    scene_dataset(tmp_path, COUNT)
    Image.fromarray(np.ones((64, 64), np.uint8)).save(tmp_path / "scenes/masks/train/0003.png")
    report = ingest(str(tmp_path / "scenes/images"), tmp_path / "dataset", settings(tmp_path, mask_classes=CLASSES))
    assert report.shards_written == 1 and check_dataset(report.directory, full=True) == []


def test_a_dataset_of_before_goes_on_without_being_written_again(tmp_path):
    first = small_dataset(tmp_path)
    before = files_of(first.directory)
    journal = first.directory / ".ingest.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines[1:]:
        del line["summary"]["mask_classes"]  # as written before there were masks
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ingest(str(tmp_path / "source"), first.directory, IngestConfig(samples_per_shard=7)).shards_written == 0
    assert files_of(first.directory) == before


def test_numbers_stand_for_classes_without_names_and_images_without_rows_hold_nothing(tmp_path):
    write_scenes(tmp_path / "scenes", {"train": 4})
    (tmp_path / "scenes/boxes.csv").write_text("path,x,y,width,height,class\n0001,1.5,2,10,62.5,7\n")
    directory = ingest(str(tmp_path / "scenes/images"), tmp_path / "dataset", settings(tmp_path)).directory
    index = read_index(directory)
    assert index.mask_classes == tuple(map(str, range(len(index.mask_classes)))) and index.box_classes[-1] == "7"
    boxes = {record["source"][-8:-4]: record["boxes"] for *_, record in samples_of(directory)}
    assert boxes == {"0000": [], "0001": [[1.5, 2, 10, 62, 7]], "0002": [], "0003": []}  # cut at the border
    assert check_dataset(directory, full=True) == []


def test_a_palette_becomes_grey_of_the_same_numbers():
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.new("P", (4, 3))
    palette.putdata(values.ravel().tolist())
    palette.putpalette([0, 0, 0] * 256)
    assert (decode_mask(encoded(palette, "PNG")) == values).all()
    few = Image.new("P", (4, 3))
    few.putdata([1, 2, 3, 0] * 3)
    few.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 0, 0, 128])
    content = encoded(few, "PNG", bits=2)
    assert content[24] == 2 and (decode_mask(content)[0] == [1, 2, 3, 0]).all()


def test_a_palette_is_stored_as_grey_and_is_the_same_dataset(made, tmp_path):
    folder, directory = made
    source = shutil.copytree(folder / "scenes", tmp_path / "scenes")
    for path in (source / "masks").rglob("*.png"):
        values = np.asarray(Image.open(path))
        palette = Image.fromarray(values, mode=None).convert("P")
        palette.putdata(values.ravel().tolist())
        palette.putpalette(list(range(255, -1, -1)) * 3)
        palette.save(path)
    coloured = ingest(str(source / "images"), tmp_path / "dataset", settings(tmp_path, mask_classes=CLASSES))
    assert coloured.fingerprint == read_index(directory).fingerprint
    reader, shard, number, _ = next(samples_of(coloured.directory))
    assert Image.open(io.BytesIO(reader.mask(shard, number))).mode == "L"
    assert check_dataset(coloured.directory, full=True) == []


@pytest.mark.parametrize("boxes", [None, [3], [[1, 2, 3, 4]], [[1, 2, 3, 4, 0.5]], [["1", 2, 3, 4, 0]]])
def test_boxes_of_a_damaged_record_are_a_fault_and_no_crash(boxes):
    assert boxes_fault(boxes, (10, 10), 1) is not None
    assert boxes_fault([[1, 2, 3, 4, 0]], (10, 10), 1) is None


@pytest.mark.parametrize("image, form", [
    (picture(0), "PNG"), (picture(0).convert("L"), "JPEG"), (picture(0).convert("1"), "PNG"),
    (Image.new("I;16", (4, 4)), "PNG"),
])  # fmt: skip
def test_what_is_no_mask_is_refused(image, form):
    with pytest.raises(ImageFault) as caught:
        decode_mask(encoded(image, form))
    assert caught.value.reason == "bad_mask"


def test_wrong_masks_and_boxes_are_rejected_with_a_reason(tmp_path):
    source = write_scenes(tmp_path / "scenes", {"train": 12})
    (source / "masks/train/0000.png").unlink()
    Image.new("L", (64, 63)).save(source / "masks/train/0001.png")
    Image.new("L", (64, 64), 11).save(source / "masks/train/0002.png")
    (source / "masks/train/0003.png").write_bytes(encoded(Image.new("L", (64, 64)), "PNG")[:60])
    with open(source / "boxes.csv", "a") as file:
        for row in ("0004,60,0,10,10", "0005,1,1,0,5", "0006,-3,0,10,10", "0007,64.5,1,0.4,5"):
            file.write(f"train/{row},digit 1\n")
    config = settings(tmp_path, mask_classes=CLASSES, max_rejected_fraction=0.9)
    directory = ingest(str(source / "images"), tmp_path / "dataset", config).directory
    lines = [json.loads(line) for line in (directory / "rejected.jsonl").read_text().splitlines()]
    reasons = [(line["path"][-8:-4], line["reason"], line["detail"]) for line in lines]
    assert [reason[:2] for reason in reasons] == [
        ("0000", "no_mask"), ("0001", "bad_mask"), ("0002", "bad_mask"), ("0003", "bad_mask"), ("0004", "bad_box"),
        ("0005", "bad_box"), ("0006", "bad_box"), ("0007", "bad_box"),
    ]  # fmt: skip
    assert "64 x 63 pixels, the image 64 x 64" in reasons[1][2] and "class 11, and there are 11" in reasons[2][2]
    assert sum(1 for _ in samples_of(directory)) == 4 and check_dataset(directory, full=True) == []
    with pytest.raises(IngestError, match="no_mask"):
        ingest(str(source / "images"), tmp_path / "other", settings(tmp_path, mask_classes=CLASSES))


@pytest.mark.parametrize("form, orientation", [("JPEG", 2), ("JPEG", 3), ("PNG", 4), ("TIFF", 3), ("WEBP", 6)])
@pytest.mark.parametrize("turned", ["image", "mask"])
def test_a_mask_is_refused_where_image_or_mask_is_turned_by_its_exif(turned, form, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    square, mask = picture(0, 16, 16), Image.new("L", (16, 16))
    if turned == "mask":
        image, content = encoded(square, form), encoded(mask, "PNG", exif=exif)
    else:
        image, content = encoded(square, form, exif=exif), encoded(mask, "PNG")
    (tmp_path / "a.png").write_bytes(content)
    row = MaskFile("a.png", len(content), 0)
    with pytest.raises(ImageFault, match=f"EXIF orientation {orientation}, so whether mask and image lie alike"):
        prepare_annotations(AnnotationRule(tmp_path), row, (), image, (16, 16))
    (tmp_path / "a.png").write_bytes(encoded(mask, "PNG"))
    upright = prepare_annotations(AnnotationRule(tmp_path), row, (), encoded(square, form), (16, 16))
    assert upright.classes == 1


def test_the_orientation_of_a_tiff_of_many_channels_is_read_too():
    buffer = io.BytesIO()
    pixels, tags = np.zeros((8, 8, 7), np.uint16), [(274, "H", 1, 3, True)]
    tifffile.imwrite(buffer, pixels, extratags=tags, photometric="minisblack", planarconfig="contig")
    assert file_orientation(buffer.getvalue()) == 3 and file_orientation(b"no image") == 1


BOXES = "path,x,y,width,height,class\n"


@pytest.mark.parametrize("write, config, words", [
    (lambda source: None, {"masks": "nowhere"}, "nowhere: masks: no such folder"),
    (lambda source: write_pictures(source / "masks", ["train/0000.jpg"]), {}, "0000.jpg: no .png"),
    (lambda source: shutil.move(source / "masks/train", source / "masks/lost") and [
        file.rename(file.with_stem("lost" + file.stem)) for file in (source / "masks/lost").iterdir()
     ], {}, "lost.*png: a mask without an image, as are all"),
    (lambda source: (source / "boxes.csv").write_text(BOXES + "lost,1,1,2,2,a\n"), {}, "lost: no such file"),
    (lambda source: (source / "boxes.csv").write_text("path,class\n0000,a\n"), {}, "rows have path, x, y, width"),
    (lambda source: (source / "boxes.csv").write_text(BOXES + "0000,1,one,2,2,a\n"), {}, "boxes.csv:2: .*not four"),
    (lambda source: (source / "boxes.csv").write_text(BOXES + "0000,1,1,2,2,\n"), {}, "boxes.csv:2: class ''"),
    (lambda source: (source / "boxes.csv").write_text(BOXES + "0000,1,nan,2,2,a\n"), {}, "not four numbers"),
    (lambda source: (source / "boxes.csv").write_text(BOXES + "0000,,,,,\n"), {}, "holds no box"),
])  # fmt: skip
def test_a_config_that_cannot_be_meant_is_one_line(tmp_path, monkeypatch, write, config, words):
    source = write_scenes(tmp_path / "scenes", {"train": 3})
    write(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        ingest(str(source / "images"), tmp_path / "dataset", settings(tmp_path, **config))
    assert len(caught.value.problems) == 1 and not (tmp_path / "dataset").exists()


def test_a_mask_without_an_image_counts_as_one_that_was_lost(tmp_path):
    source = write_scenes(tmp_path / "scenes", {"train": 4})
    shutil.copy(source / "masks/train/0000.png", source / "masks/lost.png")
    with pytest.raises(IngestError, match="1 mask_without_image"):
        ingest(str(source / "images"), tmp_path / "dataset", settings(tmp_path))
    report = ingest(str(source / "images"), tmp_path / "dataset", settings(tmp_path, max_rejected_fraction=0.2))
    assert sum(report.samples.values()) == 4 and report.rejected == {"mask_without_image": 1}


def test_masks_within_the_source_are_refused(tmp_path):
    source = write_scenes(tmp_path / "scenes", {"train": 3})
    with pytest.raises(InputError, match="masks: lies in the source"):
        ingest(str(source), tmp_path / "dataset", settings(tmp_path))


@pytest.mark.parametrize("what", ["mask", "boxes"])
def test_a_shard_whose_annotations_were_changed_is_found(made, tmp_path, what):
    directory = shutil.copytree(made[1], tmp_path / "dataset")
    path = directory / "test-000000.tar"
    with tarfile.open(path) as tar:
        member = next(m for m in tar if m.name.endswith(".mask.png" if what == "mask" else ".json"))
    content = bytearray(path.read_bytes())
    content[member.offset_data + 60] ^= 1
    path.write_bytes(content)
    assert "bytes have changed" in check_dataset(directory, full=True)[0]
    if what == "mask":
        with pytest.raises(DataError, match="its mask has changed"):
            ShardReader(read_index(directory), "test").mask(0, 0)


def test_an_index_that_promises_other_classes_than_its_masks_and_boxes_have_is_faulty(made, tmp_path):
    directory = shutil.copytree(made[1], tmp_path / "dataset")
    content = json.loads((directory / "index.json").read_text())
    del content["checksum"], content["provenance"]["certificate"]  # as before there were any
    for name in ("certificate.json", "certificate.html"):
        (directory / name).unlink()
    (directory / "index.json").write_text(json.dumps(content | {"mask_classes": ["ground", "digit 0"]}))
    assert "its mask has class" in check_dataset(directory, full=True)[0]
    (directory / "index.json").write_text(json.dumps(content | {"box_classes": content["box_classes"][:2]}))
    assert "class" in check_dataset(directory, full=True)[0]
    (directory / "index.json").write_text(json.dumps(content | {"mask_classes": [*CLASSES[:-1], "nine"]}))
    assert "fingerprint" in check_dataset(directory, full=True)[0]


def test_masks_and_boxes_follow_an_image_that_is_made_smaller(made, tmp_path):
    folder, _ = made
    config = settings(folder, mask_classes=CLASSES, max_side=32)
    directory = ingest(str(folder / "scenes/images"), tmp_path / "dataset", config).directory
    index, seen = read_index(directory), 0
    for reader, shard, number, record in samples_of(directory):
        _, mask, boxes = scene(int(record["source"].split("/")[1].removesuffix(".png")))
        assert (record["width"], record["height"], record["changes"]) == (32, 32, ["resized"])
        nearest = np.asarray(Image.fromarray(mask).resize((32, 32), Image.Resampling.NEAREST))
        assert (decode_mask(reader.mask(shard, number)) == nearest).all()
        halves = [(*(side / 2 for side in box[:4]), box[4]) for box in boxes]
        assert [(*box[:4], index.box_classes[box[4]]) for box in record["boxes"]] == halves
        seen += bool(boxes)
    assert seen and check_dataset(directory, full=True) == []


def test_a_box_outside_of_a_large_image_is_refused_before_it_is_made_smaller():
    rule = AnnotationRule(box_classes=1)
    with pytest.raises(ImageFault, match="outside of the image of 64 x 64"):
        prepare_annotations(rule, None, [(60, 60, 10, 10, 0)], b"", (64, 64), (8, 8))
    assert prepare_annotations(rule, None, [(63, 0, 2, 64, 0)], b"", (64, 64), (8, 8)).boxes == [
        [7.875, 0, 0.125, 8, 0]
    ]
