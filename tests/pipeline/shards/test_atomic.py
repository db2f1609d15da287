"""Files that appear whole or not at all."""

import errno
import os
import shutil
import sys

import pytest

from pipeline.shards import atomic
from pipeline.shards.atomic import replaced_file, reserve, write_file


def test_a_file_that_finds_no_room_is_named_and_leaves_the_one_before(tmp_path):
    path = tmp_path / "index.json"
    write_file(path, b"before")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"), replaced_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == [(path, b"before")]


def test_a_reserved_file_lies_in_space_that_was_asked_for_and_is_cut_to_its_length(tmp_path):
    path = tmp_path / "a.tar"
    with replaced_file(path) as file:
        reserve(file, 1 << 20)
        reserved = os.fstat(file.fileno()).st_blocks * 512
        file.write(b"short")
        file.truncate(5)
    if sys.platform == "linux":  # and a file system that can, as any of its own
        assert reserved >= 1 << 20
    assert path.read_bytes() == b"short" and path.stat().st_blocks * 512 < 1 << 20


def test_more_space_than_there_is_is_a_wish_alone(tmp_path):
    path = tmp_path / "a.tar"
    with replaced_file(path) as file:
        reserve(file, shutil.disk_usage(tmp_path).total * 2)
        assert os.fstat(file.fileno()).st_blocks == 0  # and nobody else is left without meanwhile
        file.write(b"short")
        file.truncate(5)
    assert path.read_bytes() == b"short" and path.stat().st_blocks * 512 < 1 << 20


def test_space_that_was_given_in_part_is_given_back(tmp_path, monkeypatch):
    def in_part(descriptor: int, *_: object) -> int:
        os.posix_fallocate(descriptor, 0, 1 << 20)
        return -1  # as where a quota is less than the disk

    monkeypatch.setattr(atomic, "_fallocate", in_part)
    with replaced_file(tmp_path / "a.tar") as file:
        reserve(file, 8 << 20)
        assert os.fstat(file.fileno()).st_blocks == 0
        file.write(b"short")
    assert (tmp_path / "a.tar").read_bytes() == b"short"
