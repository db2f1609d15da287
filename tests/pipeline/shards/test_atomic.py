"""Files that appear whole or not at all."""

import errno

import pytest

from pipeline.shards.atomic import replaced_file, write_file


def test_a_file_that_finds_no_room_is_named_and_leaves_the_one_before(tmp_path):
    path = tmp_path / "index.json"
    write_file(path, b"before")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"), replaced_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == [(path, b"before")]
