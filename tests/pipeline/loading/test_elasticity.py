"""Grids of shards, ranks, lanes and workers: the global batches are always those of the order itself.

The stream writes places instead of pictures, so that hundreds of loaders with real worker processes run in seconds.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.plan import plan_batches
from pipeline.loading.loader import Loader
from pipeline.loading.mixture import Mixture
from pipeline.loading.staging import Stager


class PlaceStream:
    """A stream whose images are the bytes of (shard, sample)."""

    image_shape, dtype = (1, 2, 8), np.dtype(np.uint8)

    def __init__(self, sizes, global_batch_size, lanes, window_shards):
        self.mixture = Mixture(
            [np.array(sizes)], [1.0], global_batch_size=global_batch_size, lanes=lanes, window_shards=[window_shards],
            seed=11,
        )  # fmt: skip

    def stager(self, positions_of_step, steps, world_size, ranks_per_node):
        return Stager([], None, positions_of_step, steps.stop, 0, first_step=steps.start)

    def fill(self, positions, images, labels):
        _, _, shards, samples = self.mixture.locate(positions)
        images[:, 0] = np.stack([shards, samples], axis=1)[:, :, None].view(np.uint8).reshape(len(positions), 2, 8)
        labels[:] = positions
        return [f"{shard}-{sample}" for shard, sample in zip(shards, samples, strict=True)], []


def check(sizes, ranks, lanes, per_lane, accumulated, workers, window_shards, first_step=0, steps=3):
    batch = lanes * per_lane * ranks * accumulated
    expected = PlaceStream(sizes, batch, lanes, window_shards).mixture.locate(
        np.arange(first_step * batch, (first_step + steps) * batch)
    )
    found = {}
    for rank in range(ranks):
        stream = PlaceStream(sizes, batch, lanes, window_shards)
        plan = plan_batches(batch, batch // ranks // accumulated, ranks)
        with Loader(
            stream, plan, rank=rank, first_step=first_step, last_step=first_step + steps, workers=workers
        ) as loader:
            for raw in loader:
                places = raw.images.numpy().copy().view(np.int64).reshape(-1, 2).tolist()
                assert raw.labels.tolist() == raw.positions.tolist()
                assert raw.keys == [f"{shard}-{sample}" for shard, sample in places]
                found |= dict(zip(raw.positions.tolist(), places, strict=True))
    columns = zip(expected.shards.tolist(), expected.samples.tolist(), strict=True)
    assert found == dict(enumerate(map(list, columns), start=first_step * batch))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any), st.integers(1, 16),
    st.sampled_from([1, 2, 3, 5, 8, 16]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 45), st.integers(0, 500),
)  # fmt: skip
def test_any_shape_without_workers(sizes, ranks, lanes, per_lane, accumulated, window_shards, first_step):
    check(sizes, ranks, lanes, per_lane, accumulated, 0, window_shards, first_step)


@pytest.mark.parametrize("workers", range(1, 9))
@pytest.mark.parametrize(
    ("shards", "ranks", "lanes"), [(1, 3, 8), (2, 5, 4), (7, 2, 16), (40, 1, 8), (40, 4, 3)]
)  # fewer shards than ranks or lanes among them
def test_shapes_with_workers(workers, shards, ranks, lanes):
    sizes = np.random.default_rng(shards).integers(1, 20, shards).tolist()
    check(sizes, ranks, lanes, 3, 2, workers, 2, first_step=5)
