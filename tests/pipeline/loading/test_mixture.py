"""Mixtures: exact shares, each sample of a source once per its own epoch, and a seek that equals reading up to it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.randomness import position_uniform as torch_uniform
from pipeline.loading.mixture import Mixture
from pipeline.loading.selection import Selection
from pipeline.loading.uniform import position_uniform
from pipeline.shards.order import SampleOrder


def mixture(sizes, weights, *, global_batch_size=24, lanes=4, seed=0):
    return Mixture(
        [np.array(of_source) for of_source in sizes], weights, global_batch_size=global_batch_size, lanes=lanes,
        window_shards=[2] * len(sizes), seed=seed,
    )  # fmt: skip


def located(of, start, stop):
    return list(zip(*(column.tolist() for column in of.locate(np.arange(start, stop))), strict=True))


def test_a_mixture_of_one_is_the_plain_order():
    order = SampleOrder([5, 9, 3], 24, 4, 2, 7)
    assert located(mixture([[5, 9, 3]], [0.3], seed=7), 0, 60) == [(0, *order.locate(p)) for p in range(60)]


@pytest.mark.parametrize("weights", [[3, 1], [1, 1, 1], [5, 2, 1e-3], [14_000_000, 1000], [1, 1e-12]])
def test_after_any_number_of_draws_a_lane_has_each_source_as_often_as_its_weight_says(weights):
    of = mixture([[7]] * len(weights), weights)
    sources, _ = of.draw(np.arange(24 * 600))
    for lane in range(4):
        drawn = sources[np.arange(len(sources)) % 24 // 6 == lane]
        for source, weight in enumerate(weights):
            due = np.arange(1, len(drawn) + 1) * weight / sum(weights)
            assert np.abs(np.cumsum(drawn == source) - due).max() <= len(weights)
    assert min(weights) < sum(weights) / 10 or (sources[:200] != sources[200:400]).any()  # and yet at random


def test_shares_are_mixed_and_differ_by_lane():
    sources, _ = mixture([[7], [11]], [3, 1]).draw(np.arange(24 * 300))
    lanes = sources.reshape(-1, 4, 6).swapaxes(0, 1).reshape(4, -1)
    assert (lanes[0] != lanes[1]).any() and 0.15 < (np.diff(np.flatnonzero(lanes[0])) == 4).mean() < 0.6


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=2, max_size=4),
    st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 5), st.integers(0, 2**40), st.integers(0, 10**10),
)  # fmt: skip
def test_draws_count_each_source_without_a_gap_and_seek_anywhere(sizes, lanes, per_lane, seed, start):
    batch = lanes * per_lane
    of = mixture(sizes, list(range(1, len(sizes) + 1)), global_batch_size=batch, lanes=lanes, seed=seed)
    sources, positions = of.draw(np.arange(5 * batch))
    for source in range(len(sizes)):
        for lane in range(lanes):
            mine = positions[(sources == source) & (np.arange(5 * batch) % batch // per_lane == lane)]
            assert mine.tolist() == [nth * lanes + lane for nth in range(len(mine))]
    whole = located(of, start, start + 2 * batch)
    fresh = mixture(sizes, list(range(1, len(sizes) + 1)), global_batch_size=batch, lanes=lanes, seed=seed)
    assert [located(fresh, start + i, start + i + 1)[0] for i in range(2 * batch)] == whole
    assert all(sample < sizes[source][shard] for source, _, shard, sample in whole)


@pytest.mark.parametrize(("sizes", "lanes"), [([100, 300], 4), ([1442, 200], 64), ([100, 100], 64)])
def test_a_source_begins_its_next_epoch_when_all_but_about_one_sample_per_lane_have_come(sizes, lanes):
    of = mixture([[size // 2, size - size // 2] for size in sizes], sizes, global_batch_size=lanes, lanes=lanes)
    seen: dict[tuple, int] = {}
    for position, (source, epoch, shard, sample) in enumerate(located(of, 0, 3 * sum(sizes))):
        assert (source, epoch, shard, sample) not in seen
        seen[source, epoch, shard, sample] = position
    for source, size in enumerate(sizes):
        for epoch in range(2):
            ended = (epoch + 1) * sum(sizes)  # weights by size: all sources end their epochs together
            late = sum(1 for key, at in seen.items() if key[:2] == (source, epoch) and at >= ended)
            missing = size - sum(1 for key in seen if key[:2] == (source, epoch))
            assert late + missing <= min(lanes, size // 5)


def test_sources_of_equal_shape_are_not_permuted_alike():
    places = located(mixture([[50], [50]], [1, 1]), 0, 96)
    first, second = ([sample for source, _, _, sample in places if source == number] for number in (0, 1))
    assert first[:20] != second[:20]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=8), min_size=1, max_size=3),
    st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(0, 2**40), st.integers(0, 500),
    st.sampled_from([1.0, 7.0, 1e-3]),
)  # fmt: skip
def test_the_positions_of_every_sample_are_where_a_whole_reading_meets_it(sizes, lanes, per_lane, seed, end, weight):
    weights = [weight, 1.0, 2.5][: len(sizes)]
    of = mixture(sizes, weights, global_batch_size=lanes * per_lane, lanes=lanes, seed=seed)
    met = {}
    for position, (source, _, shard, sample) in enumerate(located(of, 0, end)):
        met.setdefault((source, shard, sample), []).append(position)
    for source, shards in enumerate(sizes):
        for shard, size in enumerate(shards):
            for sample in range(size):
                assert of.positions_of(source, shard, sample, end).tolist() == met.get((source, shard, sample), [])


def test_a_draw_far_into_a_mixture_is_found_where_it_takes_place():
    of = mixture([[5, 9], [7], [3]], [3, 1, 1e-6])
    for position in (10**6, 10**9 + 7):
        source, _, shard, sample = located(of, position, position + 1)[0]
        nth, lane = divmod(int(of.draw(np.array([position]))[1][0]), of.lanes)
        assert of._position_of_draw(source, nth, lane) == position


@given(st.integers(0, 2**63), st.text(st.characters(codec="ascii"), max_size=9), st.integers(0, 2**62))
def test_numpy_draws_the_numbers_that_torch_draws(seed, purpose, first):
    positions = np.arange(first, first + 5)
    expected = torch_uniform(seed, purpose, torch.from_numpy(positions), 1).squeeze(1).numpy()
    assert position_uniform(seed, purpose, positions).tolist() == expected.tolist()


def test_a_selection_knows_the_places_of_its_samples_and_of_no_others():
    some = Selection(np.array([2, 0]), (np.array([1, 4]), np.array([], np.int64)))
    assert [some.place(0, sample) for sample in range(6)] == [None, 0, None, None, 1, None]
    assert some.place(1, 0) is None and Selection(np.array([3])).place(0, 2) == 2
