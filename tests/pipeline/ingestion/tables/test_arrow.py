"""Parquet files and saved datasets, as Hugging Face's `datasets` and others write them."""

import json
import os
import pickle
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion import plan
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.ingestion.build import ingest
from pipeline.ingestion.making import IngestError
from pipeline.ingestion.opening import list_source
from pipeline.shards.check import check_dataset
from pipeline.shards.index import read_index
from tests.pipeline.ingestion.tables.idx_files import samples
from tests.pipeline.ingestion.test_build import records_of, rejected_of
from tests.pipeline.pictures import encoded, files_of, picture, write_pictures

NAMES = ["ant", "bee", "cat"]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def contents(count: int, begin: int = 0) -> list[bytes]:
    return [encoded(picture(begin + number), "PNG") for number in range(count)]


def saved(count: int, begin: int = 0, **more: list) -> datasets.Dataset:
    images = [{"bytes": content, "path": f"p{begin + n}.png"} for n, content in enumerate(contents(count, begin))]
    columns = {"image": images, "label": [number % 3 for number in range(count)], **more}
    features = datasets.Features(FEATURES | {name: datasets.Value("string") for name in more})
    return datasets.Dataset.from_dict(columns, features=features)


def write_parquet(path, columns: dict, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)


def ingested(tmp_path, source="set", **config):
    ingest(str(tmp_path / source), tmp_path / "dataset", IngestConfig(**config))
    return read_index(tmp_path / "dataset")


def images_of(index) -> dict[str, tuple[str, int]]:
    return {source: (split, label) for source, (split, label, _) in samples(index).items()}


def test_parquet_as_on_the_hub(tmp_path):
    for shard in range(2):
        path = tmp_path / f"set/data/train-0000{shard}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        saved(20, 20 * shard).to_parquet(path, batch_size=7)
    saved(6, 100).to_parquet(tmp_path / "set/data/validation-00000-of-00001.parquet")
    (tmp_path / "set/README.md").write_text("card")
    index = ingested(tmp_path)
    assert index.classes == tuple(NAMES) and index.labelled
    assert {split: index.num_samples(split) for split in index.splits} == {"train": 40, "validation": 6}
    found = samples(index)
    for number in range(20):
        split, label, image = found[f"data/train-00001-of-00002.parquet/{number:06d}/p{20 + number}.png"]
        assert (split, label) == ("train", number % 3)
        assert np.array_equal(image, np.asarray(picture(20 + number)))
    assert {record["class"] for record in records_of(tmp_path / "dataset")} == set(NAMES)
    assert rejected_of(tmp_path / "dataset") == [
        {"path": "README.md", "reason": "not_an_image", "detail": "holds no images"}
    ]
    assert check_dataset(tmp_path / "dataset", full=True) == []
    assert not list((tmp_path / "dataset").glob(".unpacked*"))


def test_a_dataset_saved_on_disk_with_its_splits(tmp_path):
    parts = {"train": saved(30), "validation": saved(4, 50), "test": saved(5, 70)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set", num_shards={"train": 2, "validation": 1, "test": 1})
    index = ingested(tmp_path)
    assert index.classes == tuple(NAMES)
    assert {split: index.num_samples(split) for split in index.splits} == {"train": 30, "validation": 4, "test": 5}
    assert sorted(source for source in images_of(index) if source.startswith("test/"))[0] == (
        "test/data-00000-of-00001.arrow/000000/p70.png"
    )
    for source, (_, label, image) in samples(index).items():
        number = int(source.rsplit("/p")[-1].removesuffix(".png"))
        begin = {"train": 0, "validation": 50, "test": 70}[source.split("/")[0]]
        assert label == (number - begin) % 3 and np.array_equal(image, np.asarray(picture(number)))
    names = {entry["path"].rsplit("/")[-1] for entry in rejected_of(tmp_path / "dataset")}
    assert names == {"dataset_dict.json", "dataset_info.json", "state.json"}


def test_a_single_saved_dataset_is_split_by_content_where_it_has_no_name(tmp_path):
    saved(60).save_to_disk(tmp_path / "set")
    index = ingested(tmp_path, split_fractions={"train": 0.5, "test": 0.5})
    assert index.splits.keys() == {"train", "test"} and len(images_of(index)) == 60


def test_a_saved_selection_holds_its_rows_alone(tmp_path):
    saved(30).select(range(3, 30, 9)).save_to_disk(tmp_path / "set")
    assert sorted(source.rsplit("/")[-1] for source in images_of(ingested(tmp_path))) == [
        "p12.png",
        "p21.png",
        "p3.png",
    ]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_columns_of_bytes_and_names_of_classes(tmp_path, compression, kind):
    names = ["bee", "ant", "bee", None, "ant"] * 4
    columns = {"jpg": pa.array(contents(20), kind), "label": names, "embedding": [[0.5]] * 20}
    write_parquet(tmp_path / "set.parquet", columns, compression=compression, row_group_size=3)
    index = ingested(tmp_path, "set.parquet", split_fractions={"train": 1.0})
    assert index.classes == ("ant", "bee")
    labels = {source: label for source, (_, label) in images_of(index).items()}
    assert labels == {
        f"set.parquet/{number:06d}": {"ant": 0, "bee": 1, None: -1}[name] for number, name in enumerate(names)
    }


def test_a_pattern_names_parquet_files_wherever_they_lie(tmp_path):
    for number in range(4):
        write_parquet(tmp_path / f"set/{'ab'[number % 2]}/train-{number}.parquet", {"image": contents(3, 10 * number)})
    index = ingested(tmp_path, "set/*/train-{0..2}.parquet")
    assert {source.rsplit("/", 1)[0] for source in images_of(index)} == {
        "a/train-0.parquet", "b/train-1.parquet", "a/train-2.parquet",
    }  # fmt: skip
    for wrong in ("set/*/x.parquet", "set/a/train-{0,2,4}.parquet"):
        with pytest.raises(InputError, match="no such parquet file") as caught:
            ingest(str(tmp_path / wrong), tmp_path / "other", IngestConfig())
        assert len(caught.value.problems) == 1


def test_equal_images_in_many_rows_stay_equal_however_parquet_packs_them(tmp_path):
    write_parquet(tmp_path / "set.parquet", {"image": contents(2) * 50}, row_group_size=10, use_dictionary=True)
    index = ingested(tmp_path, "set.parquet", splits="hash", split_fractions={"train": 0.5, "test": 0.5})
    found = samples(index)
    for source, (split, _, image) in found.items():
        first = found[f"set.parquet/{int(source[-2:]) % 2:06d}"]
        assert split == first[0] and np.array_equal(image, first[2])


def test_captions_without_labels_make_an_unlabelled_dataset(tmp_path):
    for number in range(2):
        columns = {"image": contents(4, 10 * number), "text": ["a bird"] * 4, "url": ["http://x"] * 4}
        write_parquet(tmp_path / f"set/part-{number}/0000.parquet", columns)
    index = ingested(tmp_path, split_fractions={"train": 1.0})
    assert index.classes is None and {label for _, label in images_of(index).values()} == {-1}


def test_numbers_without_names_stay_and_may_be_named(tmp_path):
    write_parquet(tmp_path / "set.parquet", {"image": contents(3), "label": pa.array([4, -1, 0], pa.int8())})
    index = ingested(tmp_path, "set.parquet", split_fractions={"train": 1.0})
    assert index.classes == tuple("01234")
    assert sorted(label for _, label in images_of(index).values()) == [-1, 0, 4]
    (tmp_path / "names.txt").write_text("\n".join("abcde"))
    ingest(str(tmp_path / "set.parquet"), tmp_path / "named", IngestConfig(class_names=tmp_path / "names.txt"))
    assert read_index(tmp_path / "named").classes == tuple("abcde")


def test_rows_without_bytes_are_rejected_and_traceable(tmp_path):
    images = [{"bytes": content, "path": None} for content in contents(5)]
    images[1], images[3] = None, {"bytes": None, "path": "elsewhere/x.jpg"}
    images.append({"bytes": b"", "path": "../../etc/empty"})
    images.append({"bytes": b"no image", "path": ".."})
    write_parquet(tmp_path / "set.parquet", {"image": images}, row_group_size=2)
    index = ingested(tmp_path, "set.parquet", max_rejected_fraction=0.9, split_fractions={"train": 1.0})
    assert sorted(images_of(index)) == [f"set.parquet/{number:06d}" for number in (0, 2, 4)]
    assert [(entry["path"], entry["reason"]) for entry in rejected_of(tmp_path / "dataset")] == [
        ("set.parquet/000001", "no_image"),
        ("set.parquet/000003/x.jpg", "no_image"),
        ("set.parquet/000005/empty", "empty_file"),
        ("set.parquet/000006", "unknown_format"),
    ]
    with pytest.raises(IngestError, match="2 no_image"):
        ingest(str(tmp_path / "set.parquet"), tmp_path / "strict", IngestConfig())


IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize("columns, config, words", [
    ({"image": 2, "mask": 2}, {}, None),  # of two columns of bytes the one called image is meant
    ({"left": 2, "right": 2}, {}, "image_column: left, right all hold images; say which by image_column"),
    ({"left": 2, "right": 2}, {"image_column": "right"}, None),
    ({"left": 2, "right": 2}, {"image_column": "rihgt"}, "image_column: no column rihgt; did you mean `right`"),
    ({"image": 2, "text": ["a", "b"]}, {"image_column": "text"}, "image_column: text is string, no bytes of images"),
    ({"url": ["a", "b"], "n": [1, 2]}, {}, r"no column of image bytes among url \(string\), n \(int64\); a column"),
    ({"images": [[b"1"], [b"2", b"3"]]}, {}, r"no column of image bytes among images \(list<"),
    ({"image": 2, "label": [0.5, 0.2]}, {}, "label_column: label: its type is double; labels are integers or"),
    ({"image": 2, "label": [3, -7]}, {}, "row 1: label -7: labels are numbers from 0"),
    ({"image": 2, "class": ["a", "b"], "label": [0, 1]}, {}, "label_column: class, label all hold labels; say which"),
    ({"image": 2, "class": ["a", "b"], "label": [0, 1]}, {"label_column": "class"}, None),
    ({"image": 2, "species": ["a", "b"]}, {"label_column": "specie"}, "no column specie; did you mean `species`"),
    ({"image": 2, "species": ["a", "b"]}, {"label_column": "species"}, None),
])  # fmt: skip
def test_columns_that_cannot_be_told_are_named_with_the_key_to_set(tmp_path, columns, config, words):
    columns = {name: contents(2) if values == 2 else values for name, values in columns.items()}
    write_parquet(tmp_path / "set/x.parquet", columns)
    if words is None:
        assert len(images_of(ingested(tmp_path, **config, split_fractions={"train": 1.0}))) == 2
        return
    with pytest.raises(InputError, match=f"set/x.parquet: .*{words}") as caught:
        ingested(tmp_path, **config)
    assert len(caught.value.problems) == 1 and not (tmp_path / "dataset").exists()


def test_two_labels_of_hugging_face_need_a_choice(tmp_path):
    features = FEATURES | {"coarse": datasets.ClassLabel(names=["insect", "mammal"])}
    rows = {"image": [{"bytes": c, "path": None} for c in contents(3)], "label": [0, 1, 2], "coarse": [0, 0, 1]}
    path = tmp_path / "set/train.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    with pytest.raises(InputError, match="label_column: label, coarse all hold labels"):
        ingested(tmp_path)
    assert ingested(tmp_path, label_column="coarse").classes == ("insect", "mammal")


def test_images_that_are_only_paths_are_said_to_be_absent(tmp_path):
    write_pictures(tmp_path, ["a.png"])
    datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(
        InputError, match="no column of image bytes among image .string.; a column holds one image a row"
    ):
        ingested(tmp_path, "x.parquet")


def test_files_of_several_sets_are_not_mixed(tmp_path):
    write_parquet(tmp_path / "set/a.parquet", {"image": contents(2), "label": [0, 1]})
    write_parquet(tmp_path / "set/b.parquet", {"image": contents(2)})
    with pytest.raises(InputError, match="b.parquet: columns image and no label, but image and label in a.parquet"):
        ingested(tmp_path)


@pytest.mark.parametrize("cut", [0, 3, 100, -1])
def test_a_cut_parquet_file_is_an_input_error(tmp_path, cut):
    write_parquet(tmp_path / "set/a.parquet", {"image": contents(20)})
    content = (tmp_path / "set/a.parquet").read_bytes()
    (tmp_path / "set/a.parquet").write_bytes(content[:cut])
    with pytest.raises(InputError, match="a.parquet: cut or damaged") as caught:
        ingested(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_pages_of_parquet_are_an_input_error(tmp_path):
    write_parquet(tmp_path / "set/a.parquet", {"image": contents(50)}, write_page_checksum=True)
    content = bytearray((tmp_path / "set/a.parquet").read_bytes())
    content[2000] ^= 1
    (tmp_path / "set/a.parquet").write_bytes(content)
    with pytest.raises(InputError, match="a.parquet: cut or damaged"):
        ingested(tmp_path)


@pytest.mark.parametrize("change, words", [
    (lambda folder: (folder / "data-00000-of-00001.arrow").unlink(), "state.json: names data-00000-of-00001.arrow,"),
    (lambda folder: cut_last_batch(folder / "data-00000-of-00001.arrow"), "does not end as an Arrow stream does; save"),
    (lambda folder: cut(folder / "data-00000-of-00001.arrow", 5000), "arrow: cut"),
    (lambda folder: (folder / "state.json").write_text("{"), "state.json: not the state.json of a saved dataset"),
])  # fmt: skip
def test_a_damaged_saved_dataset_is_an_input_error(tmp_path, change, words):
    saved(30).save_to_disk(tmp_path / "set")
    change(tmp_path / "set")
    with pytest.raises(InputError, match=words):
        ingested(tmp_path)


def cut(path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def cut_last_batch(path) -> None:
    """At the border of two messages, where a reader sees nothing amiss."""
    cut(path, path.stat().st_size - 8)
    with pa.ipc.open_stream(path.read_bytes()) as stream:
        assert stream.read_all().num_rows == 30


def test_a_state_cannot_name_files_elsewhere(tmp_path):
    saved(3).save_to_disk(tmp_path / "set")
    saved(3).save_to_disk(tmp_path / "other")
    state = json.loads((tmp_path / "set/state.json").read_text())
    state["_data_files"] = [{"filename": "../other/data-00000-of-00001.arrow"}]
    (tmp_path / "set/state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="names ../other/data-00000-of-00001.arrow, which is not there"):
        ingested(tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(plan, "POOL_FROM_BYTES", 0)
    if kind == "parquet":
        (tmp_path / "set").mkdir()
        saved(90).to_parquet(tmp_path / "set/train.parquet", batch_size=7)
    else:
        saved(90).save_to_disk(tmp_path / "set", num_shards=3)
    for workers in (1, 2):
        ingest(str(tmp_path / "set"), tmp_path / str(workers), IngestConfig(workers=workers, samples_per_shard=20))
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_a_changed_row_rewrites_its_shard_alone(tmp_path):
    images = contents(40)
    write_parquet(tmp_path / "set/train.parquet", {"image": images}, row_group_size=5)
    config = IngestConfig(samples_per_shard=10)
    ingest(str(tmp_path / "set"), tmp_path / "dataset", config)
    images[7] = encoded(picture(999), "PNG")
    write_parquet(tmp_path / "set/train.parquet", {"image": images}, row_group_size=5)
    os.utime(tmp_path / "set/train.parquet", ns=(time.time_ns(), time.time_ns() + 10**9))
    report = ingest(str(tmp_path / "set"), tmp_path / "dataset", config)
    assert (report.shards_written, report.shards_kept) == (1, 3)
    assert np.array_equal(
        samples(read_index(tmp_path / "dataset"))["train.parquet/000007"][2], np.asarray(picture(999))
    )


@pytest.mark.parametrize("name", ["train.parquet", "data-00000-of-00001.arrow"])
def test_an_unpickled_source_reads_any_row_alone(tmp_path, name):
    if name.endswith("parquet"):
        write_parquet(tmp_path / "set" / name, {"image": contents(25)}, row_group_size=4)
    else:
        saved(25).save_to_disk(tmp_path / "set")
    with Scratch(tmp_path / "dataset") as scratch:
        source, listing = list_source(str(tmp_path / "set"), IngestConfig(), scratch)
        assert [path.name for path in scratch.folder().iterdir()] == ["lock"] and len(pickle.dumps(source)) < 1000
        source = pickle.loads(pickle.dumps(source))
        for number, file in reversed(list(enumerate(listing.images))):
            (content,) = contents(1, number)
            assert source.read(file.path) == content and source.read(file.path, 8) == content[:8]
        spooled = [path for path in scratch.folder().iterdir() if path.suffix == "" and path.name != "lock"]
        assert len(spooled) == (1 if name.endswith("parquet") else 0)  # a saved dataset is read where it lies


def test_each_table_that_is_listed_is_told(tmp_path):
    for number in range(3):
        write_parquet(tmp_path / f"set/train-{number}.parquet", {"image": contents(2, number)})
    told = []
    with Scratch(tmp_path / "dataset") as scratch:
        list_source(str(tmp_path / "set"), IngestConfig(), scratch, lambda *counts: told.append(counts))
    assert told == [(number, 3, 0, "listing tables") for number in range(3)]


def test_compressed_arrow_files_are_read_too(tmp_path):
    saved(25).save_to_disk(tmp_path / "set")
    path = tmp_path / "set/data-00000-of-00001.arrow"
    with pa.ipc.open_stream(path.read_bytes()) as stream:
        table = stream.read_all()
    with pa.ipc.new_stream(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as out:
        out.write_table(table, max_chunksize=6)
    assert sorted(label for _, label in images_of(ingested(tmp_path)).values()) == sorted(n % 3 for n in range(25))


def test_images_about_which_a_parquet_file_says_something_are_a_folder(tmp_path):
    write_pictures(tmp_path / "set", ["ant/1.png", "bee/2.png"])
    write_parquet(tmp_path / "set/metadata.parquet", {"file_name": ["ant/1.png"], "text": ["an ant"]})
    assert len(images_of(ingested(tmp_path))) == 2
    assert [entry["path"] for entry in rejected_of(tmp_path / "dataset")] == ["metadata.parquet"]


def test_a_labels_file_overrules_the_table(tmp_path):
    saved(4).save_to_disk(tmp_path / "set")
    (tmp_path / "labels.csv").write_text("id,class\np0,x\np1,y\np2,x\np3,y\n")
    index = ingested(tmp_path, labels=tmp_path / "labels.csv", split_fractions={"train": 1.0})
    assert index.classes == ("x", "y") and index.labelled


def test_columns_that_were_not_read_are_noted(tmp_path):
    write_parquet(tmp_path / "set/train.parquet", {"image": contents(4), "species": list("abab"), "taken": [1] * 4})
    ingested(tmp_path)
    notes = json.loads((tmp_path / "dataset/certificate.json").read_text())["verdict"]["notes"]
    assert any("not read: species, taken" in note and "label_column=NAME" in note for note in notes)
