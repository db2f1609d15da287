"""The arithmetic of a study: points with intervals, sentences that claim no more than they show, files, the plot."""

import csv
import json
import math
import xml.etree.ElementTree as ElementTree

import pytest

from pipeline.studies.findings import findings
from pipeline.studies.plot import draw
from pipeline.studies.points import Point, interval_over_seeds, points_of
from pipeline.studies.table import planned_lines, table_lines, write_study

NONE = "no crossing of ViT and ResNet seen up to 1,000 images: "


def row(network="ViT", fraction=1.0, seed=0, accuracy=0.5, *, length=1.0, interval=(0.4, 0.6), state="done"):
    return {
        "network": network, "objective": "supervised", "fraction": fraction, "length": length, "seed": seed,
        "images": round(1000 * fraction), "petaflop": 0.25 * length, "accuracy": accuracy, "interval": interval,
        "state": state, "run": f"/home/runs/{network}-{fraction}-{seed}",
    }  # fmt: skip


def point(network, fraction, low, high, *, length=1.0, objective="supervised"):
    return Point(network, objective, fraction, length, round(1000 * fraction), 1.0, 3, (low + high) / 2, low, high, "")


def test_the_interval_over_seeds_is_students():
    low, high = interval_over_seeds([0.5, 0.6, 0.7])  # deviation 0.1, t of two degrees of freedom 4.302653
    assert (low, high) == pytest.approx((0.6 - 4.302653 * 0.1 / 3**0.5, 0.6 + 4.302653 * 0.1 / 3**0.5), abs=1e-6)
    assert interval_over_seeds([0.0, 1.0]) == (0.0, 1.0)  # never beyond what an accuracy may be


def test_seeds_of_a_cell_become_one_point_and_a_single_one_keeps_the_interval_of_its_images():
    rows = [row(seed=0, accuracy=0.5, interval=(0.47, 0.53)), row(seed=1, accuracy=0.52, interval=(0.49, 0.54)),
            row(fraction=0.1, interval=(0.45, 0.55)),
            row(seed=2, accuracy=None, interval=None, state="failed")]  # fmt: skip
    several, single = points_of(rows)
    assert several.accuracy == pytest.approx(0.51) and several.seeds == 2
    assert several.basis == "Student's t over 2 seeds, and bootstrap over images"
    half = 0.51 - interval_over_seeds([0.5, 0.52])[0]
    assert (0.51 - several.low, several.high - 0.51) == pytest.approx((math.hypot(half, 0.03), math.hypot(half, 0.025)))
    assert (single.low, single.high, single.seeds, single.images) == (0.45, 0.55, 1, 100)
    assert single.basis == "bootstrap over images, one seed"


def test_seeds_that_score_the_same_part_no_two_networks_by_less_than_their_images_do():
    rows = [row(name, fraction, seed, accuracy, interval=(accuracy - 0.03, accuracy + 0.03)) for seed in (0, 1)
            for name, fraction, accuracy in (("ResNet", 0.1, 0.901), ("ViT", 0.1, 0.9), ("ResNet", 1.0, 0.95),
                                             ("ViT", 1.0, 0.951))]  # fmt: skip
    points = points_of(rows)
    assert all(one.high - one.low == pytest.approx(0.06) for one in points)
    assert findings(points) == [
        "supervised: no crossing of ResNet and ViT seen up to 1,000 images: they cannot be told apart from 100 to 1,000"
    ]


@pytest.mark.parametrize(
    ("vit", "said"),
    [
        # ResNet: 0.50 to 0.52 everywhere
        ([(0.3, 0.4), (0.5, 0.6), (0.6, 0.7)], "ViT overtakes ResNet at 1,000 images"),
        ([(0.3, 0.4), (0.53, 0.6), (0.6, 0.7)], "ViT overtakes ResNet at 100 images and stays ahead up to 1,000"),
        ([(0.6, 0.7), (0.5, 0.6), (0.3, 0.4)], "ResNet overtakes ViT at 1,000 images"),
        ([(0.3, 0.4), (0.5, 0.6), (0.51, 0.7)],
         NONE + "ResNet is ahead at 10; they cannot be told apart from 100 to 1,000"),
        ([(0.5, 0.6), (0.5, 0.6), (0.6, 0.7)],  # never behind, so it overtook nobody
         NONE + "they cannot be told apart from 10 to 100; ViT is ahead at 1,000"),
        ([(0.3, 0.4), (0.3, 0.4), (0.3, 0.4)], NONE + "ResNet is ahead from 10 to 1,000"),
        ([(0.3, 0.4), (0.6, 0.7), (0.5, 0.7)],
         "no crossing of ViT and ResNet that lasts seen up to 1,000 images: ResNet is ahead at 10; ViT is ahead at "
         "100; they cannot be told apart at 1,000"),
    ],
)  # fmt: skip
def test_a_crossing_is_named_only_where_the_intervals_part_on_both_sides(vit, said):
    fractions = [0.01, 0.1, 1.0]
    points = [point("ViT", fraction, *interval) for fraction, interval in zip(fractions, vit, strict=True)]
    points += [point("ResNet", fraction, 0.5, 0.52) for fraction in fractions]
    assert findings(points) == [f"supervised: {said}"]


def test_networks_are_compared_at_the_amounts_of_data_that_both_have_and_at_the_longest_runs():
    points = [point("ViT", 0.1, 0.6, 0.7), point("ViT", 1.0, 0.6, 0.7), point("ResNet", 1.0, 0.1, 0.2),
              point("ResNet", 1.0, 0.8, 0.9, length=0.1), point("ViT", 1.0, 0.1, 0.2, objective="mae")]  # fmt: skip
    assert findings(points) == [
        "supervised: no crossing of ViT and ResNet seen up to 1,000 images: ViT is ahead at 1,000"
    ]
    assert findings(points[:2]) == []
    (one_seed,) = findings([*points[:2], points[2]._replace(seeds=1)])
    assert one_seed.endswith("ViT is ahead at 1,000; of one seed: what chance does to a training is not in it")


def test_the_files_hold_every_row_and_the_same_points_are_the_same_picture(tmp_path):
    rows = [row("ViT", 0.1), row("ViT", 1.0, length=0.1), row("ViT"), row("Res_Net", 0.1, accuracy=0.7), row("Res_Net"),
            row("Res_Net", 0.1, accuracy=None, interval=None, state="failed")]  # fmt: skip
    facts = {"title": "birds", "scored": "birds test"}
    for folder in ("one", "two"):
        study = write_study(tmp_path / folder, {"name": "birds"}, facts, rows)
    assert json.loads((tmp_path / "one/study.json").read_text()) == json.loads(json.dumps(study))
    with open(tmp_path / "one/study.csv") as file:
        table = list(csv.DictReader(file))
    assert [line["accuracy"] for line in table] == ["0.5", "0.5", "0.5", "0.7", "0.5", ""]
    assert table[0]["low"] == "0.4" and table[-1]["state"] == "failed" and table[-1]["high"] == ""
    picture = (tmp_path / "one/study.svg").read_text()
    assert picture == (tmp_path / "two/study.svg").read_text() and len(picture) < 60_000
    words = " ".join(ElementTree.fromstring(picture).itertext())
    for expected in ("Res_Net", "images pretrained on", "petaFLOP, of all images", "top-1, birds test, %"):
        assert expected in words, expected
    assert "Res_Net" in "\n".join(table_lines(points_of(rows)))


def test_a_study_of_which_nothing_is_scored_has_a_table_and_no_plot(tmp_path):
    study = write_study(tmp_path, {}, {"title": "x", "scored": "y"}, [row(accuracy=None, interval=None, state="new")])
    assert study["points"] == study["findings"] == [] and not (tmp_path / "study.svg").exists()


def test_many_networks_and_objectives_are_drawn_apart():
    points = [Point(f"n{number}", objective, fraction, 1.0, 10, 1.0 + number, 1, 0.5, 0.4, 0.6, "")
              for number in range(9) for objective in ("a", "b") for fraction in (0.1, 1.0)]  # fmt: skip
    assert "n8, b" in draw(points, "many", "x test")


def test_what_is_planned_is_told_by_run():
    (header, line) = planned_lines([row() | {"parameters": 5_500_000, "images_seen": 12_800, "planned_seconds": 90}])
    assert header.split()[:3] == ["network", "objective", "images"] and "5.5 M" in line and "1 min 30 s" in line
