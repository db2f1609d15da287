"""The certificate says what is in a dataset: counts, copies, leaks, contradictions; and stays the same bytes."""

import hashlib
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion import build, examination
from pipeline.ingestion.archives import adopting
from pipeline.ingestion.build import ingest
from pipeline.ingestion.duplicates.likeness import hashes_of_prepared, likeness
from pipeline.ingestion.duplicates.sample_hashes import hashed_shards
from pipeline.ingestion.images import prepare_image
from pipeline.shards.check import check_dataset
from pipeline.shards.index import read_index
from tests.pipeline.lineage.test_likeness import scene
from tests.pipeline.pictures import encoded, files_of, write_tar


def write(path: Path, image: Image.Image, form: str = "PNG", **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(image, form, **options))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes, three splits, and known copies: see the test of the report."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(24):
        write(folder / f"train/{'ant' if number % 2 else 'bee'}/{number:02d}.png", scene(number))
    for number in range(6):
        write(folder / f"validation/ant/v{number}.png", scene(100 + number))
        write(folder / f"test/bee/t{number}.png", scene(200 + number))
    write(folder / "test/bee/leak-exact.webp", scene(0), "WEBP", lossless=True)
    write(folder / "test/ant/leak-near.jpg", ImageEnhance.Brightness(scene(1)).enhance(1.05), "JPEG", quality=70)
    write(folder / "test/ant/of-validation.png", scene(100))
    write(folder / "train/bee/again.png", scene(2), compress_level=1)
    write(folder / "train/ant/other-label.png", scene(4))
    write(folder / "train/bee/near.jpg", scene(6).resize((120, 120)), "JPEG", quality=80)
    return folder


def made(
    source: Path, destination: Path, told: list[tuple] | None = None, **config: object
) -> tuple[build.IngestReport, dict]:
    """`told` takes what is told of the progress."""
    told = [] if told is None else told
    config = IngestConfig(**{"samples_per_shard": 6, **config})
    report = ingest(str(source), destination, config, progress=lambda *counts: told.append(counts))
    return report, json.loads((destination / "certificate.json").read_text())


def sources(pairs: list[dict]) -> set[frozenset[str]]:
    return {frozenset(image["source"].rpartition("/")[2] for image in pair["images"]) for pair in pairs}


def test_copies_leaks_and_contradictions_are_found_and_counted(photos, tmp_path):
    report, said = made(photos, tmp_path / "dataset")
    copies = said["copies"]
    leaks = {
        (leak["from"], leak["to"]): (leak["exact"], leak["near"], leak["images_there"]) for leak in copies["leaks"]
    }
    assert leaks == {("train", "test"): (1, 1, 2), ("validation", "test"): (1, 0, 1)}
    assert report.num_leaking == copies["leaking_images"] == 3
    pairs = [("00.png", "leak-exact.webp"), ("01.png", "leak-near.jpg"), ("v0.png", "of-validation.png")]
    assert sources(copies["examples"]["leaks"]) == set(map(frozenset, pairs))
    assert copies["exact_copies"] == {"train": 2} and copies["near_copies"] == {"train": 1}
    assert sources(copies["examples"]["near_copies"]) == {frozenset(("06.png", "near.jpg"))}
    assert sources(copies["examples"]["contradictory_labels"]) == {frozenset(("04.png", "other-label.png"))}
    assert (
        not said["verdict"]["sound"] and "2 images in 1 group of equal pixels have different labels" in report.verdict
    )
    assert said["splits"]["test"]["images"] == 9
    assert said["classes"] == [
        {"name": "ant", "train": 13, "validation": 6, "test": 2},
        {"name": "bee", "train": 14, "validation": 0, "test": 7},
    ]
    assert said["images"]["formats"] == {"PNG": 39, "JPEG": 2, "WEBP": 1}
    assert sum(bar["count"] for bar in said["images"]["width"]) == said["images"]["counted"] == 42
    assert check_dataset(tmp_path / "dataset", full=True) == []


def test_what_leaves_is_the_image_that_leaks_and_the_second_of_equal_ones(photos, tmp_path):
    report, said = made(photos, tmp_path / "dataset", duplicates="remove", max_rejected_fraction=0.0)
    left = {json.loads(line)["path"]: json.loads(line) for line in open(tmp_path / "dataset/rejected.jsonl")}
    again = {"train/bee/again.png", "train/bee/02.png"} & left.keys()
    assert len(again) == 1
    assert left.keys() - again == {"train/bee/00.png", "train/ant/01.png", "validation/ant/v0.png"}
    assert {entry["reason"] for entry in left.values()} == {"duplicate"}
    assert left["train/bee/00.png"]["detail"] == "has the pixels of test: test/bee/leak-exact.webp"
    assert "a near copy, " in left["train/ant/01.png"]["detail"]
    assert report.samples == {"train": 24, "validation": 5, "test": 9} and report.num_leaking == 0
    assert said["copies"]["leaks"] == [] and said["copies"]["removed"]["images"] == 4
    assert said["copies"]["contradictory_labels"] == {
        "images": 2,
        "groups": 1,
    }  # which label is right is not ours to say
    assert check_dataset(tmp_path / "dataset", full=True) == []
    before = files_of(tmp_path / "dataset")
    again, _ = made(photos, tmp_path / "dataset", duplicates="remove", max_rejected_fraction=0.0)
    assert again.shards_written == 0 and files_of(tmp_path / "dataset") == before


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory) -> dict[str, bytes]:
    """The files of the dataset without copies, made in one go."""
    folder = tmp_path_factory.mktemp("whole") / "dataset"
    made(photos, folder, duplicates="remove")
    return files_of(folder)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("module", "moment"),
    [(examination, "search_copies"), (examination, "_index"), (build, "certify"), (build, "write_index")],
)
def test_what_dies_on_the_way_is_finished_by_the_next_run_with_the_same_bytes(
    photos, whole, tmp_path, monkeypatch, module, moment
):
    real, calls = getattr(module, moment), []

    def dies(*arguments: object, **options: object) -> object:
        calls.append(moment)
        if moment != "_index" or len(calls) == 2:  # the second is made of shards without copies
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(module, moment, dies)
    with pytest.raises(Killed):
        made(photos, tmp_path / "dataset", duplicates="remove")
    assert not (tmp_path / "dataset/index.json").exists()
    monkeypatch.undo()
    made(photos, tmp_path / "dataset", duplicates="remove")
    assert files_of(tmp_path / "dataset") == whole


def test_a_lost_hash_file_and_a_changed_source_lead_to_the_same_as_from_scratch(photos, tmp_path):
    source = shutil.copytree(photos, tmp_path / "photos")
    made(source, tmp_path / "dataset", duplicates="remove")
    (tmp_path / "dataset/.hashes/train-000001.hashes").unlink()
    write(source / "test/bee/t1.png", scene(10))  # one of train leaks now
    (source / "test/bee/leak-exact.webp").unlink()  # another does not any more
    report, said = made(source, tmp_path / "dataset", duplicates="remove")
    _, fresh = made(source, tmp_path / "fresh", duplicates="remove")
    assert files_of(tmp_path / "dataset") == files_of(tmp_path / "fresh") and said == fresh
    assert report.shards_kept > 0
    assert sorted(path.name for path in (tmp_path / "dataset/.hashes").iterdir()) == sorted(
        path.name for path in (tmp_path / "fresh/.hashes").iterdir()
    )


def test_images_of_a_named_evaluation_dataset_are_leaks_of_train_and_never_leave_it(photos, tmp_path):
    write(tmp_path / "judged/test/x/a.jpg", scene(8), "JPEG", quality=90)
    write(tmp_path / "judged/test/y/b.png", scene(300))
    write(tmp_path / "judged/train/x/c.png", scene(9))  # what is trained on there judges nobody
    write(tmp_path / "judged/train/y/d.png", scene(301))
    made(tmp_path / "judged", tmp_path / "evaluation")
    train = tmp_path / "images"
    shutil.copytree(photos / "train", train)
    one_split = {"splits": "hash", "split_fractions": {"train": 1.0}, "leakage_against": [tmp_path / "evaluation"]}
    report, said = made(train, tmp_path / "dataset", **one_split)
    (leak,) = said["copies"]["leaks"]
    assert leak["to"] == str(tmp_path / "evaluation") and (leak["exact"], leak["near"], leak["of_images_there"]) == (
        0,
        1,
        2,
    )
    assert report.num_leaking == 1 and str(tmp_path / "evaluation") in report.verdict
    theirs = said["copies"]["examples"]["leaks"][0]["images"][1]
    assert (theirs["source"], theirs["class"]) == ("test/x/a.jpg", "x")
    without, _ = made(train, tmp_path / "without", duplicates="remove", **one_split)
    left = [json.loads(line)["path"] for line in open(tmp_path / "without/rejected.jsonl")]
    assert "bee/08.png" in left and without.num_leaking == 0
    with pytest.raises(InputError, match="the dataset itself"):
        made(train, tmp_path / "dataset", **{**one_split, "leakage_against": [tmp_path / "dataset"]})
    with pytest.raises(InputError, match="leakage_against: .*nowhere"):
        made(train, tmp_path / "other", leakage_against=[tmp_path / "nowhere"])


def test_a_dataset_held_against_another_one_later_keeps_its_shards(photos, tmp_path):
    write(tmp_path / "judged/test/x/a.png", scene(8))
    made(tmp_path / "judged", tmp_path / "evaluation", splits="folders")
    made(photos, tmp_path / "dataset")
    report, said = made(photos, tmp_path / "dataset", leakage_against=[tmp_path / "evaluation"])
    assert report.shards_written == 0 and str(tmp_path / "evaluation") in {
        leak["to"] for leak in said["copies"]["leaks"]
    }
    assert check_dataset(tmp_path / "dataset", full=False) == []


def test_copies_in_adopted_tars_leave_the_table_and_not_the_tar(tmp_path):
    samples = [(f"s{number}", scene(number)) for number in range(6)]
    write_tar(tmp_path / "train.tar", [(f"{key}.png", encoded(image, "PNG")) for key, image in samples])
    write_tar(tmp_path / "test.tar", [("x.png", encoded(scene(3), "PNG")), ("y.png", encoded(scene(50), "PNG"))])
    before = (tmp_path / "train.tar").read_bytes()
    pattern = str(tmp_path / "{train,test}.tar")
    for _ in range(2):
        report = ingest(pattern, tmp_path / "dataset", IngestConfig(duplicates="remove"))
        assert report.samples == {"train": 5, "test": 2}
    assert report.shards_written == 0 and (tmp_path / "train.tar").read_bytes() == before
    (entry,) = map(json.loads, open(tmp_path / "dataset/rejected.jsonl"))
    assert entry["path"] == "train.tar/s3" and entry["detail"] == "has the pixels of test: test.tar/x"
    assert check_dataset(tmp_path / "dataset", full=True) == []


def test_each_adopted_tar_is_read_through_once_however_many_copies_leave_it(tmp_path, monkeypatch):
    copied = [scene(number, 80) for number in range(3)]
    for tar in range(6):
        members = [(f"t{tar}-{number}.png", encoded(image, "PNG")) for number, image in enumerate(copied)]
        write_tar(tmp_path / f"train-{tar}.tar", [*members, (f"own-{tar}.png", encoded(scene(50 + tar, 80), "PNG"))])
    real, read = adopting.tar_samples, []

    def counted(file: object, shown: str) -> object:
        read.append(shown)
        return real(file, shown)

    monkeypatch.setattr(adopting, "tar_samples", counted)
    config = IngestConfig(duplicates="remove", workers=1)
    report = ingest(str(tmp_path / "train-{0..5}.tar"), tmp_path / "dataset", config)
    assert report.samples == {"train": 9} and report.rejected == {"duplicate": 15}
    left = [json.loads(line) for line in open(tmp_path / "dataset/rejected.jsonl")]
    assert left[0]["path"] == "train-1.tar/t1-0" and left[0]["detail"] == "has the pixels of train: train-0.tar/t0-0"
    assert Counter(read).most_common(1)[0][1] <= 3  # made, made again, and asked for


def test_workers_and_places_change_no_byte(photos, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        made(photos, tmp_path / name, workers=workers)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_hashes_kept_by_the_ingestion_are_those_of_the_stored_images(photos, tmp_path, monkeypatch):
    report, _ = made(photos, tmp_path / "dataset", duplicates="remove")
    index = read_index(report.directory)
    kept = [shard.hashes.copy() for shard in hashed_shards(index, tmp_path / "cache")]
    assert not list((tmp_path / "cache").rglob("*.npy"))
    shutil.rmtree(tmp_path / "dataset/.hashes")
    computed = [shard.hashes for shard in hashed_shards(index, tmp_path / "cache")]
    assert all((one == other).all() for one, other in zip(kept, computed, strict=True))


@pytest.mark.parametrize("channels", ["rgb", "keep"])
@pytest.mark.parametrize("kind", ["turned", "transparent", "palette", "sixteen", "grey", "animated"])
def test_hashes_of_what_was_decoded_are_those_of_what_is_stored(kind, channels):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = scene(5)
    sixteen = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    content = {
        "turned": lambda: encoded(image, "JPEG", exif=exif),
        "transparent": lambda: encoded(image.convert("RGBA").rotate(30), "PNG"),
        "palette": lambda: encoded(image.quantize(16), "PNG"),
        "sixteen": lambda: encoded(sixteen, "PNG"),
        "grey": lambda: encoded(image.convert("L"), "PNG"),
        "animated": lambda: encoded(image, "GIF", save_all=True, append_images=[scene(6)]),
    }[kind]()
    prepared = prepare_image(content, channels)
    hashes = hashes_of_prepared(prepared, hashlib.sha256(prepared.content).digest())
    assert hashes == likeness(prepared.content).hashes


def test_lost_hashes_are_computed_again_and_name_the_right_files(tmp_path):
    for number in range(6):
        write(tmp_path / f"images/train/{number}.png", scene(0 if number == 4 else number, 80))
        (tmp_path / f"images/train/broken-{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    _, said = made(tmp_path / "images", tmp_path / "dataset", max_rejected_fraction=0.6)
    shutil.rmtree(tmp_path / "dataset/.hashes")
    told = []
    report, again = made(tmp_path / "images", tmp_path / "dataset", told, max_rejected_fraction=0.6)
    assert [counts for counts in told if counts[3:]] == [(done, 2, 0, "restoring lost hashes") for done in (1, 2)]
    assert report.shards_written == 0 and again == said
    assert sources(again["copies"]["examples"]["exact_copies"]) == {frozenset(("0.png", "4.png"))}


def test_small_images_are_searched_for_equal_pixels_alone_and_that_is_said(tmp_path):
    for number in range(4):
        write(tmp_path / f"images/train/{number}.png", scene(number, 32))
    write(tmp_path / "images/test/equal.png", scene(0, 32), compress_level=1)
    write(tmp_path / "images/test/near.jpg", scene(1, 32), "JPEG", quality=90)
    _, said = made(tmp_path / "images", tmp_path / "dataset")
    assert [(leak["exact"], leak["near"]) for leak in said["copies"]["leaks"]] == [(1, 0)]
    assert any("6 images with a side below 64 pixels" in note for note in said["not_examined"])
    (tmp_path / "images/test/equal.png").unlink()
    report, said = made(tmp_path / "images", tmp_path / "without")
    assert said["verdict"]["sound"] and "as far as it was examined: near copies of 5 images" in report.verdict


def test_memory_and_page_do_not_grow_with_the_square_of_the_classes(tmp_path):
    rows = ["path,label"]
    for number in range(4):
        write(tmp_path / f"images/train/{number}.png", scene(number, 80))
        rows.append(f"train/{number}.png,{number * 9_999}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    tracemalloc.start()
    try:
        _, said = made(tmp_path / "images", tmp_path / "dataset", labels=tmp_path / "labels.csv")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150 << 20  # a matrix of all classes by all is 900 MB, in bytes
    counted = {number: one["train"] for number, one in enumerate(said["classes"]) if one["train"]}
    assert len(said["classes"]) == 29_998 and counted == {0: 1, 9_999: 1, 19_998: 1, 29_997: 1}
    page = tmp_path / "dataset/certificate.html"
    assert page.stat().st_size < 2 << 20 and "29998 classes" in page.read_text()


def test_images_of_one_colour_are_nobodys_near_copies(tmp_path):
    for number in range(6):
        write(tmp_path / f"images/train/{number}.png", Image.new("RGB", (80, 80 + number), (40 * number,) * 3))
    _, said = made(tmp_path / "images", tmp_path / "dataset")
    assert said["copies"]["near_copies"] == {} and said["verdict"]["sound"]
    assert any("6 images of one colour" in note for note in said["not_examined"])


def test_headers_alone_are_certified_as_such_and_remove_nothing(photos, tmp_path):
    report, said = made(photos, tmp_path / "dataset", examine="header")
    assert said["copies"] is None and "pixels were not looked at" in report.verdict
    with pytest.raises(ValueError, match="examine: header"):
        IngestConfig(examine="header", duplicates="remove")


def test_check_names_a_certificate_that_is_missing_or_edited(photos, tmp_path):
    made(photos, tmp_path / "dataset")
    page = tmp_path / "dataset/certificate.html"
    page.write_text(page.read_text().replace("finding", "nothing"))
    (tmp_path / "dataset/certificate.json").unlink()
    missing, edited = check_dataset(tmp_path / "dataset", full=False)
    assert "certificate.json: missing" in missing and "certificate.html: edited" in edited
    report, _ = made(photos, tmp_path / "dataset")
    assert report.shards_written == 0 and check_dataset(tmp_path / "dataset", full=False) == []


def test_an_edited_index_is_found_whatever_becomes_of_its_checksum(photos, tmp_path):
    made(photos, tmp_path / "dataset")
    path = tmp_path / "dataset/index.json"
    written = path.read_text()
    edits = {
        "statistics: not what": lambda index: index["statistics"].update(mean=[0.1, 0.2, 0.3]),
        "classes: not what": lambda index: index["classes"].reverse(),
        "fingerprint: not what": lambda index: index.update(fingerprint="0" * 64),
        "names no certificate": lambda index: index["provenance"].pop("certificate"),
    }
    for said, edit in edits.items():
        content = json.loads(written)
        edit(content)
        del content["checksum"]
        path.write_text(json.dumps(content))
        assert check_dataset(tmp_path / "dataset", full=False)
        content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(content))
        assert said in check_dataset(tmp_path / "dataset", full=False)[0]
    content = json.loads(written)
    del content["checksum"]
    path.write_text(json.dumps(content))
    assert "not its checksum" in check_dataset(tmp_path / "dataset", full=False)[0]


def test_check_names_a_list_of_rejected_files_that_was_touched_and_a_tar_that_is_not_of_the_dataset(photos, tmp_path):
    made(photos, tmp_path / "dataset")
    rejected = tmp_path / "dataset/rejected.jsonl"
    rejected.write_text('{"path": "x.png", "reason": "broken_image", "detail": ""}\n')
    shutil.copy(tmp_path / "dataset/train-000000.tar", tmp_path / "dataset/train-000009.tar")
    edited, surplus = check_dataset(tmp_path / "dataset", full=False)
    assert "rejected.jsonl: edited" in edited and "train-000009.tar: lies here" in surplus
    rejected.unlink()
    (tmp_path / "dataset/train-000009.tar").unlink()
    (missing,) = check_dataset(tmp_path / "dataset", full=False)
    assert "rejected.jsonl: missing" in missing
    report, _ = made(photos, tmp_path / "dataset")
    assert report.shards_written == 0 and check_dataset(tmp_path / "dataset", full=True) == []


def test_a_dataset_of_before_there_were_certificates_is_sound_and_gets_one_without_being_rewritten(photos, tmp_path):
    made(photos, tmp_path / "dataset")
    journal = tmp_path / "dataset/.ingest.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines[1:]:
        del line["summary"]["counts"], line["summary"]["job"]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = json.loads((tmp_path / "dataset/index.json").read_text())
    del index["provenance"]["certificate"], index["checksum"]
    (tmp_path / "dataset/index.json").write_text(json.dumps(index))
    shutil.rmtree(tmp_path / "dataset/.hashes")
    for name in ("certificate.json", "certificate.html"):
        (tmp_path / "dataset" / name).unlink()
    assert check_dataset(tmp_path / "dataset", full=True) == []
    report, said = made(photos, tmp_path / "dataset")
    assert report.shards_written == 0 and report.num_leaking == 3
    assert any("an earlier version" in note for note in said["not_examined"])


@pytest.mark.slow
def test_a_removal_that_is_killed_at_any_moment_ends_in_the_same_bytes(photos, whole, tmp_path):
    """SIGKILL of the whole process, later and later, until one run comes through."""
    command = [str(Path(sys.executable).with_name("vit")), "ingest", str(photos), str(tmp_path / "dataset")]
    command += ["--set", "duplicates=remove", "--set", "samples_per_shard=6"]
    killed = 0
    for seconds in np.arange(0.5, 60.0, 0.2):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                assert process.wait(timeout=seconds) == 0
                break
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
    assert killed > 2 and files_of(tmp_path / "dataset") == whole
    assert not [path for path in tmp_path.rglob(".tmp-*")]
