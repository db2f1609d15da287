"""Fixtures shared by the tests of training."""

from pathlib import Path

import pytest

from tests.pipeline.pictures import small_dataset


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """108 pictures in 12 shards of 9: an epoch is 9 batches of 12."""
    directory = tmp_path_factory.mktemp("pictures")
    small_dataset(directory, per_class=54, samples_per_shard=9, splits="folders", split_fractions={"train": 1.0})
    return directory / "dataset"
