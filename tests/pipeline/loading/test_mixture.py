"""Mixtures: exact shares, each sample of a source once per its own epoch, and a seek that equals reading up to it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.loading.mixture import BLOCK, Mixture, quotas
from pipeline.shards.order import SampleOrder


def mixture(sizes, weights, *, global_batch_size=24, lanes=4, seed=0):
    return Mixture(
        [np.array(of_source) for of_source in sizes], weights, global_batch_size=global_batch_size, lanes=lanes,
        window_shards=[2] * len(sizes), seed=seed,
    )  # fmt: skip


def located(of, start, stop):
    return list(zip(*(column.tolist() for column in of.locate(np.arange(start, stop))), strict=True))


@pytest.mark.parametrize(("weights", "expected"), [([1, 1], [5000, 5000]), ([1, 2], [3333, 6667]), ([7], [10_000])])
def test_quotas_add_up_and_follow_the_weights(weights, expected):
    assert quotas(weights).tolist() == expected
    with pytest.raises(ValueError, match="less than one sample in 10,000"):
        quotas([1, 1e-9])


def test_a_mixture_of_one_is_the_plain_order():
    order = SampleOrder([5, 9, 3], 24, 4, 2, 7)
    assert located(mixture([[5, 9, 3]], [0.3], seed=7), 0, 60) == [(0, *order.locate(p)) for p in range(60)]


def test_every_block_of_a_lane_holds_each_source_as_often_as_its_weight_says():
    lanes, of = 4, mixture([[7], [11]], [3, 1])
    sources, _ = of.draw(np.arange(lanes * (2 * BLOCK + 6)))
    lane = np.arange(len(sources)) % 24 // 6
    for number in range(lanes):
        draws = sources[lane == number]
        assert (draws[:BLOCK] == 0).sum() == (draws[BLOCK : 2 * BLOCK] == 0).sum() == 7500
        assert 0.6 < (draws[:500] == 0).mean() < 0.9  # mixed, not one after the other
    assert (sources[lane == 0][:500] != sources[lane == 1][:500]).any()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=2, max_size=4),
    st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 5), st.integers(0, 2**40), st.integers(0, 50_000),
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


def test_each_source_has_its_own_epochs_in_which_no_sample_repeats():
    sizes = [[40, 60], [300]]
    seen: dict[tuple, int] = {}
    for source, epoch, shard, sample in located(mixture(sizes, [1, 1]), 0, 4 * BLOCK):
        seen[source, epoch, shard, sample] = seen.get((source, epoch, shard, sample), 0) + 1
    assert set(seen.values()) == {1}
    for source, total in ((0, 100), (1, 300)):
        whole = [epoch for epoch in range(10) if sum(key[:2] == (source, epoch) for key in seen) == total]
        assert whole == list(range(10))


def test_sources_of_equal_shape_are_not_permuted_alike():
    places = located(mixture([[50], [50]], [1, 1]), 0, 96)
    first, second = ([sample for source, _, _, sample in places if source == number] for number in (0, 1))
    assert first[:20] != second[:20]
