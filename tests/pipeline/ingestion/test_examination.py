"""Shards made again without copies: nothing is lost, whatever happens to the source between the first and the second
time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.build import IngestReport, ingest
from pipeline.ingestion.making import IngestError, ShardMaker
from pipeline.shards.check import check_dataset
from tests.pipeline.lineage.test_likeness import scene

COPIED, COPY = 1, 6  # the same picture
PHOTOS = 10


@pytest.fixture
def photos(tmp_path) -> Path:
    for number in range(PHOTOS):
        path = tmp_path / f"photos/train/{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(COPIED if number == COPY else number, 80).save(path)
    return tmp_path / "photos"


def before_each_make(monkeypatch: pytest.MonkeyPatch, event: Callable[[int], None]) -> None:
    """`event` is called with 1 before the first time that shards are made, with 2 before the second ..."""
    real, calls = ShardMaker.make, []

    def make(self: ShardMaker, *arguments: object) -> object:
        calls.append(None)
        event(len(calls))
        return real(self, *arguments)

    monkeypatch.setattr(ShardMaker, "make", make)


def without_copies(photos: Path, destination: Path, **config: object) -> tuple[IngestReport, dict[str, str]]:
    """And the reason of each file that is not in the dataset."""
    report = ingest(str(photos), destination, IngestConfig(duplicates="remove", **config))
    rejected = map(json.loads, open(destination / "rejected.jsonl"))
    return report, {entry["path"]: entry["reason"] for entry in rejected}


def removed(photos: Path, tmp_path: Path) -> str:
    """The one of the two that leaves."""
    _, rejected = without_copies(photos, tmp_path / "undisturbed")
    (path,) = rejected
    return path


def test_too_many_images_lost_when_shards_are_made_again_stop_it(photos, tmp_path, monkeypatch):
    path = removed(photos, tmp_path)
    lost = [one for one in sorted(photos.rglob("*.png")) if not path.endswith(one.name)]
    before_each_make(monkeypatch, lambda time: [one.unlink() for one in lost] if time == 2 else None)
    with pytest.raises(IngestError, match="max_rejected_fraction"):
        without_copies(photos, tmp_path / "dataset")
    assert not (tmp_path / "dataset/index.json").exists()


@pytest.mark.parametrize("which", ["another", "the kept one", "the copy"])
def test_an_image_lost_when_shards_are_made_again_changes_what_is_a_copy(photos, tmp_path, monkeypatch, which):
    copy = removed(photos, tmp_path)
    kept = "train/01.png" if copy.endswith("06.png") else "train/06.png"
    lost = {"the kept one": [kept], "the copy": [copy]}.get(which, [])
    if which == "another":  # several, so that the copies move up
        lost = [f"train/{number:02d}.png" for number in range(PHOTOS) if number not in (COPIED, COPY)][:6]

    def lose(time: int) -> None:
        if time == 2:
            for path in lost:
                (photos / path).unlink()

    before_each_make(monkeypatch, lose)
    report, rejected = without_copies(photos, tmp_path / "dataset", max_rejected_fraction=0.7)
    expected = dict.fromkeys(lost, "unreadable_file") | ({copy: "duplicate"} if which == "another" else {})
    assert rejected == expected and report.samples == {"train": PHOTOS - len(expected)}
    assert check_dataset(tmp_path / "dataset", full=True) == []


def test_a_source_that_never_holds_still_is_refused(photos, tmp_path, monkeypatch):
    def turn(time: int) -> None:  # 2 and 3 are copies, then 4 and 5, then 2 and 3 again
        for number in (2, 4):
            copied = number + 1 if time % 2 == (number == 2) else number
            scene(copied, 80).save(photos / f"train/{number:02d}.png")

    before_each_make(monkeypatch, turn)
    with pytest.raises(IngestError, match="change while they are read"):
        without_copies(photos, tmp_path / "dataset")


def test_images_that_are_all_copies_of_judged_ones_are_refused_in_words(photos, tmp_path):
    ingest(str(photos), tmp_path / "judged", IngestConfig())
    (tmp_path / "same/train").mkdir(parents=True)
    for number in range(4):
        scene(number, 80).save(tmp_path / f"same/train/{number}.webp", lossless=True)
    with pytest.raises(IngestError, match="nothing is left: all 4 images are copies"):
        without_copies(tmp_path / "same", tmp_path / "dataset", leakage_against=(tmp_path / "judged",))
    assert not (tmp_path / "dataset/index.json").exists()
    assert len(open(tmp_path / "dataset/rejected.jsonl").readlines()) == 4
