"""The sample order as a property: every sample once per epoch, one stream for any number of ranks, local reading."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shards.order import (
    SampleOrder,
    count_before,
    default_lanes,
    default_window_shards,
    merged_ranges,
    pass_over,
    positions_of_rank,
    sample_seed,
)


@st.composite
def orders(draw):
    sizes = draw(st.lists(st.integers(0, 30), min_size=1, max_size=45).filter(any))
    lanes = draw(st.sampled_from([1, 2, 3, 4, 8]))
    global_batch_size = lanes * draw(st.integers(1, 9))
    return SampleOrder(sizes, global_batch_size, lanes, draw(st.integers(1, 50)), draw(st.integers(0, 2**40)))


def stream(order, start, stop):
    return list(zip(*(column.tolist() for column in order.locate_many(np.arange(start, stop))), strict=True))


@settings(max_examples=150, deadline=None)
@given(orders())
def test_every_sample_is_seen_exactly_once_in_every_epoch(order):
    total = order.num_samples
    sizes = order.shard_sizes
    for epoch in (0, 1, 3):
        seen = stream(order, epoch * total, (epoch + 1) * total)
        assert len(set(seen)) == total
        assert all(at == epoch and 0 <= sample < sizes[shard] for at, shard, sample in seen)


@settings(max_examples=50, deadline=None)
@given(orders(), st.integers(0, 400))
def test_seeking_to_a_position_gives_what_reading_up_to_it_gives(order, position):
    assert order.locate(position) == stream(order, 0, position + 1)[-1]


@settings(max_examples=100, deadline=None)
@given(orders(), st.integers(0, 3), st.integers(0, 40))
def test_the_positions_of_every_sample_are_where_a_whole_reading_meets_it(order, epochs, more):
    end = epochs * order.num_samples + more
    met = {}
    for position, (_, shard, sample) in enumerate(stream(order, 0, end)):
        met.setdefault((shard, sample), []).append(position)
    for shard, size in enumerate(order.shard_sizes.tolist()):
        for sample in range(size):
            assert order.positions_of(shard, sample, end).tolist() == met.get((shard, sample), [])


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=5))
def test_counting_what_is_read_before_a_position_undoes_passing_over(ranges):
    skipped = [(start, start + length) for start, length in ranges]
    positions = pass_over(np.arange(100), skipped).tolist()
    assert [count_before(position, skipped) for position in positions] == list(range(100))
    assert all(count_before(p, skipped) is None for start, end in skipped for p in range(start, end))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 5), st.integers(0, 50))
def test_the_global_batches_do_not_depend_on_the_number_of_ranks(sizes, times, window_shards, step):
    global_batch_size = 24 * times
    order = SampleOrder(sizes, global_batch_size, default_lanes(global_batch_size), window_shards, seed=1)
    whole = stream(order, step * global_batch_size, (step + 1) * global_batch_size)
    for world_size in (1, 2, 3, 4, 8):
        parts = [
            order.locate_many(positions_of_rank(global_batch_size, step, rank, world_size))
            for rank in range(world_size)
        ]
        assert list(zip(*np.concatenate(parts, axis=1).tolist(), strict=True)) == whole


@pytest.mark.parametrize("nodes", [1, 2, 4, 16])
def test_a_node_reads_about_its_share_of_the_bytes_of_an_epoch(nodes):
    sizes = np.random.default_rng(0).integers(900, 1100, 1200)
    order = SampleOrder(sizes, 4096, 64, 4, seed=1)
    touched = set()
    for step in range(-(-order.num_samples // 4096)):
        epochs, shards, _ = order.locate_many(positions_of_rank(4096, step, nodes - 1, nodes)[::16])
        touched.update(shards[epochs == 0].tolist())
    assert sizes[list(touched)].sum() <= 1.1 / nodes * sizes.sum()  # whole shards: what a node reads is less


def test_epochs_differ_and_a_seed_repeats_itself():
    def epoch(number, seed):
        order = SampleOrder([50] * 20, 64, 16, 2, seed)
        return [entry[1:] for entry in stream(order, number * 1000, (number + 1) * 1000)]

    assert epoch(0, seed=1) == epoch(0, seed=1)
    assert epoch(0, seed=1) != epoch(1, seed=1) != epoch(2, seed=1)
    assert epoch(0, seed=1) != epoch(0, seed=2)


def test_a_set_smaller_than_one_window_is_shuffled_whole():
    order = SampleOrder([500, 500], 100, 50, 2, seed=0)
    first_batch = [shard for _, shard, _ in stream(order, 0, 100)]
    assert 30 < sum(first_batch) < 70  # both shards, though a lane's own range lies in one
    together = {
        tuple(sorted(entry[1:] for entry in stream(order, start, start + 2))) for start in range(0, 10_000, 100)
    }
    assert len(together) > 95  # neighbours in a batch change from epoch to epoch


def test_a_lane_mixes_samples_of_neighbouring_shards():
    order = SampleOrder([100] * 64, 64, 4, 4, seed=0)
    of_one_lane = [order.locate(step * 64)[1] for step in range(20)]
    assert len(set(of_one_lane)) == 4


@pytest.mark.parametrize("sizes, global_batch_size", [([1], 1), ([1], 64), ([3], 64), ([1, 0, 2], 8)])
def test_tiny_sets_repeat_inside_one_batch(sizes, global_batch_size):
    order = SampleOrder(sizes, global_batch_size, default_lanes(global_batch_size), 1, seed=0)
    epochs, shards, samples = order.locate_many(np.arange(5 * global_batch_size))
    for epoch in range(5 * global_batch_size // order.num_samples):
        assert len(set(zip(shards[epochs == epoch], samples[epochs == epoch], strict=True))) == order.num_samples


def test_the_order_never_changes_between_versions():
    order = SampleOrder([5, 6, 7, 8], 8, 4, 2, seed=42)
    assert stream(order, 1_000_000, 1_000_004) == [(38461, 2, 2), (38461, 2, 3), (38461, 0, 4), (38461, 2, 6)]
    assert sample_seed(42, 1_000_000, "mask") == 1457848655004226006


def test_sample_seeds_differ_by_seed_position_and_purpose():
    seeds = {
        sample_seed(seed, position, purpose)
        for seed in (0, 1)
        for position in range(100)
        for purpose in ("crop", "mask")
    }
    assert len(seeds) == 400 and all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(
    "global_batch_size, lanes", [(4096, 64), (12, 12), (7, 7), (134, 2), (127, 1), (96, 48), (1, 1)]
)
def test_default_lanes_are_the_largest_divisor_up_to_64(global_batch_size, lanes):
    assert default_lanes(global_batch_size) == lanes


def test_the_default_window_holds_a_small_set_whole_and_about_the_asked_bytes_of_a_large_one():
    assert default_window_shards([10, 10, 10], 30) == 3
    assert default_window_shards([100] * 1000, 450) == 4
    assert default_window_shards([1000] * 10, 5) == 1


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 15)).map(lambda r: (r[0], r[0] + r[1])), max_size=6),
)
def test_what_is_passed_over_is_never_read_and_all_else_is_read_in_order(ranges):
    left_out = {position for start, end in ranges for position in range(start, end)}
    expected = [position for position in range(200) if position not in left_out][:60]
    assert pass_over(np.arange(60), ranges).tolist() == expected
    assert {p for start, end in merged_ranges(ranges) for p in range(start, end)} == left_out
    parts = [positions_of_rank(12, step, rank, 3, ranges) for step in range(5) for rank in range(3)]
    assert np.concatenate(parts).tolist() == expected
    for start, end in ([5, 5], [-1, 3]):
        with pytest.raises(ValueError, match="is not a range"):
            merged_ranges([(start, end)])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (([], 8, 4, 1, 0), "at least one"),
        (([0], 8, 4, 1, 0), "at least one"),
        (([5], 8, 3, 1, 0), "must divide"),
        (([5], 8, 4, 0, 0), "window_shards"),
    ],
)
def test_an_impossible_order_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        SampleOrder(*arguments)


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="3 ranks"):
        positions_of_rank(8, 0, 0, 3)
