"""The parts that benchmarks stand on, at sizes that take seconds; the figures themselves are never tested."""

import tempfile

import numpy as np
import pytest

from tests.benchmarks.contestant import Contestant, ContestantError, Round
from tests.benchmarks.environments import interpreter
from tests.benchmarks.limits import bare_loop
from tests.benchmarks.loader import psnr_goal, ratio
from tests.benchmarks.our_loader import drawn_views, our_batches, our_config, our_dataset
from tests.benchmarks.photographs import SIZES, encoded_photograph, photograph_files
from tests.benchmarks.report import Goal, verdict, write_section
from tests.benchmarks.resume import differences_after_seek
from tests.benchmarks.stalls import bytes_per_node


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Sixteen photographs as 320 files, kept where the benchmarks' own are not touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("kept")))
        yield photograph_files(16, 320)


def test_a_photograph_is_always_the_same_and_as_large_as_imagenets():
    contents = [encoded_photograph(number) for number in range(len(SIZES))]
    assert contents[3] == encoded_photograph(3)
    assert len(set(contents)) == len(contents)
    assert 50_000 < np.mean([len(content) for content in contents]) < 80_000


def test_the_bare_loop_makes_the_same_views_of_the_same_boxes_as_the_loader(photographs):
    index = our_dataset(photographs)
    config = our_config(index, 64, 224)
    limit = bare_loop.batch(drawn_views(config, index, 64), 224).permute(0, 2, 3, 1).numpy()
    ours = next(our_batches(config, index, first_step=0, last_step=1)).images.numpy()
    error = np.square(limit.astype(np.float32) - ours).mean(axis=(1, 2, 3))
    assert error.max() < 255**2 / 10**4  # 40 dB; another box or mirror gives less than 25
    assert all(goal.met for goal in psnr_goal("photographs", photographs).values())


def test_the_batches_after_a_seek_are_those_of_the_whole_pass(photographs):
    assert differences_after_seek(our_dataset(photographs), far=4, last_step=5) == 0


def test_a_node_reads_little_more_than_its_share():
    shares = bytes_per_node(shards=40 * 64, samples_per_shard=8)
    assert shares[1] == pytest.approx(1.0, abs=0.01)
    assert shares[16] < 1.2


def test_a_contestant_that_cannot_run_is_named_with_its_reason(tmp_path):
    with Contestant(interpreter(()), "tests.benchmarks.peers.none", tmp_path, 8, 32, 8) as contestant:
        with pytest.raises(ContestantError, match="ModuleNotFoundError.*peers.none"):
            contestant.run(8)


def test_ratios_are_paired_by_round():
    measured = {"ours": [Round(1, 1), Round(2, 2)], "peer": [Round(2, 2), Round(4, 4)]}
    assert ratio(measured, "peer") == (2, 2, 2)


def test_one_missed_goal_is_a_missed_benchmark():
    assert verdict("b", {"fast": Goal(2, 1), "small": Goal(1, 1, at_least=False)})["ok"]
    assert not verdict("b", {"fast": Goal(2, 1), "small": Goal(1.1, 1, at_least=False)})["ok"]


def test_figures_replace_those_of_their_own_section_alone(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Benchmarks\n\nWords.\n")
    for name, content in (("resume", "one"), ("loader", "two"), ("resume", "three")):
        write_section(path, name, content)
    assert path.read_text() == "# Benchmarks\n\nWords.\n\n## loader\n\ntwo\n\n## resume\n\nthree\n"
