"""Parts of files into the memory where they belong, by few calls and several threads."""

import os

import pytest
import torch

from pipeline.checkpoints import reading
from pipeline.checkpoints.reading import Part, read_parts


@pytest.fixture
def stored(tmp_path):
    """A file of 10,000 numbers behind eight bytes."""
    numbers = torch.randn(10_000)
    path = tmp_path / "numbers"
    path.write_bytes(b"8 bytes." + numbers.numpy().tobytes())
    with open(path, "rb", buffering=0) as file:
        yield file, numbers


def parts_of(file, counts, targets, start=0):
    for count, target in zip(counts, targets, strict=True):
        yield Part(file, 8 + 4 * start, target)
        start += count


def test_targets_are_filled_wherever_they_lie_and_calls_are_few(stored, monkeypatch):
    (file, numbers), calls, read = stored, [], os.preadv
    monkeypatch.setattr(reading, "RUN_BYTES", 8_000)

    def few_at_once(descriptor, buffers, offset):
        calls.append(offset)
        return read(descriptor, [memoryview(buffers[0])[:3_000]], offset)  # as a file server answers

    counts = [3, 500, 1, 4_000, 1_200, 96, 4_200]  # three of them larger than a call, or not within it
    targets = [torch.zeros(count) for count in counts]
    read_parts(parts_of(file, counts, targets))
    assert torch.equal(torch.cat(targets), numbers)
    monkeypatch.setattr(reading.os, "preadv", few_at_once)
    again = [torch.zeros(count) for count in counts]
    read_parts(parts_of(file, counts, again))
    assert torch.equal(torch.cat(again), numbers)
    calls.clear()
    monkeypatch.setattr(reading.os, "preadv", lambda descriptor, buffers, offset: calls.append(offset) or read(
        descriptor, buffers, offset))  # fmt: skip
    small = [torch.zeros(100) for _ in range(100)]
    read_parts(parts_of(file, [100] * 100, small))
    assert torch.equal(torch.cat(small), numbers) and len(calls) == 5


def test_a_copy_is_filled_along_with_its_target_in_its_own_precision(stored, monkeypatch):
    file, numbers = stored
    monkeypatch.setattr(reading, "RUN_BYTES", 4_096)
    target, same, half = torch.zeros(10_000), torch.zeros(10_000), torch.zeros(10_000, dtype=torch.bfloat16)
    for copy in (same, half):
        read_parts([Part(file, 8, target, copy)])
    assert torch.equal(target, numbers) and torch.equal(same, numbers) and torch.equal(half, numbers.bfloat16())


def test_parts_out_of_order_and_twice_are_read_too(stored):
    file, numbers = stored
    targets = [torch.zeros(10) for _ in range(4)]
    starts = (50, 0, 50, 60)
    read_parts(Part(file, 8 + 4 * start, target) for start, target in zip(starts, targets, strict=True))
    for start, target in zip(starts, targets, strict=True):
        assert torch.equal(target, numbers[start : start + 10])


def test_a_file_that_is_too_short_is_named(stored):
    file, _ = stored
    with pytest.raises(AssertionError, match="numbers: ends at byte 40008"):
        read_parts([Part(file, 8, torch.zeros(10_001))])


def test_what_cannot_be_found_among_the_parts_is_raised(stored):
    file, _ = stored

    def parts():
        yield Part(file, 8, torch.zeros(10))
        raise ValueError("no such parameter")

    with pytest.raises(ValueError, match="no such parameter"):
        read_parts(parts())
