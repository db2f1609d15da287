"""The fixed sample of health: the same few images, evenly over a split, of what the run may see."""

import numpy as np
import pytest

from pipeline.loading.fixed_sample import FixedSample, Part, training_selection
from pipeline.loading.left_out import all_but_left_out
from pipeline.shards.index import read_index
from pipeline.views.evaluation import EvaluationInput
from tests.pipeline.pictures import small_dataset

INPUTS = EvaluationInput((16, 16), 3, 1.0, "squash", (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    small_dataset(folder, per_class=25, splits="hash", split_fractions={"train": 0.6, "validation": 0.4})
    return folder / "dataset"


def sample_of(dataset, most, *, fraction=1.0, rows=4) -> FixedSample:
    indexes = [read_index(dataset)]
    parts = [
        Part("train", indexes, training_selection(fraction, None)), Part("validation", indexes, all_but_left_out)
    ]  # fmt: skip
    return FixedSample(parts, most, rows, INPUTS, indexes[0].classes)


def read(sample: FixedSample) -> tuple[list[str], np.ndarray, list]:
    rows = int(sample.starts[-1])
    images, labels = np.empty((rows, *sample.image_shape), sample.dtype), np.empty(rows, np.int64)
    keys, damaged = sample.fill(np.arange(rows), images, labels)
    return keys, labels, damaged


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_each_image_comes_once_and_parts_are_padded_to_whole_batches(dataset, most):
    sample, index = sample_of(dataset, most), read_index(dataset)
    sizes = [min(most, index.num_samples(split)) for split in ("train", "validation")]
    keys, labels, damaged = read(sample)
    assert [stream.num_samples for stream in sample.streams] == sizes and not damaged
    assert all(start % 4 == 0 for start in sample.starts)
    real = [key for key in keys if key]
    assert len(set(real)) == len(real) == sum(sizes) and (labels >= 0).sum() == len(real)
    assert [sample.place(int(start)) for start in sample.starts[:2]] == [(0, 0), (1, 0)]


def test_a_run_on_a_tenth_of_the_labels_is_measured_on_that_tenth(dataset):
    everything, _, _ = read(sample_of(dataset, 1000))
    few, _, _ = read(sample_of(dataset, 1000, fraction=0.1))
    of_train = [key for key in few[:4] if key]
    assert 2 <= len(of_train) <= 4 and set(of_train) <= set(everything)


def test_a_damaged_image_is_left_out(dataset, tmp_path):
    small_dataset(tmp_path, per_class=4, splits="hash", split_fractions={"train": 0.6, "validation": 0.4})
    tar = next((tmp_path / "dataset").glob("train-*.tar"))
    content = bytearray(tar.read_bytes())
    start = content.find(b"\xff\xd8") if b"\xff\xd8" in content else content.find(b"\x89PNG")
    content[start : start + 64] = bytes(64)
    tar.write_bytes(content)
    keys, labels, damaged = read(sample_of(tmp_path / "dataset", 100))
    assert len(damaged) == 1 and keys[damaged[0].position] == "" and labels[damaged[0].position] == -1
