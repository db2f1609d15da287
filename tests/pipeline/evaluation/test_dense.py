"""Dense protocols: counts that can be made by hand, COCO's own numbers, and the same scores at any number of ranks."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.encoders.config import EncoderConfig
from models.encoders.vit import build_encoder
from pipeline.errors import DataError
from pipeline.evaluation.dense.average_precision import detection_scores
from pipeline.evaluation.dense.detection import (
    Detections,
    decoded_boxes,
    detection_loss,
    image_detections,
    outputs_of,
    targets_of,
)
from pipeline.evaluation.dense.patches import Layout, emptied, extract_patches, patch_tokens
from pipeline.evaluation.dense.scoring import dense_scores
from pipeline.evaluation.dense.segmentation import Upsampling, class_areas, segmentation_scores
from pipeline.evaluation.features import Extraction, pooled_features
from pipeline.registry.locate import ModelSource
from pipeline.shards.index import read_index
from tests.pipeline.scenes import scene_dataset
from tests.ranks import run_on_ranks

CONFIG = EncoderConfig(name="vit_ti16", image_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=3)
SOURCE = ModelSource(
    "x", "checkpoint", "x", encoder=CONFIG.model_dump(), mean=(0.1,) * 3, std=(0.3,) * 3, evaluation_crop=1.0
)
LAYOUT = Layout((4, 6), 8, (32, 48), True)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scene_dataset(tmp_path_factory.mktemp("scenes"), {"train": 96, "test": 33}, kinds=2).directory


def extraction(folder, rank=0, ranks=1, batch=8):
    return Extraction(rank, ranks, torch.device("cpu"), batch, 0, "fp32", Path(folder))


def encoder():
    torch.manual_seed(0)
    return build_encoder(CONFIG, 0).eval()


def test_mean_iou_is_that_of_a_hand():
    mask = torch.tensor([[0, 0, 1, 1], [0, 2, 2, 255]])
    predicted = torch.tensor([[0, 1, 1, 1], [0, 2, 0, 2]])
    areas = class_areas(predicted, mask, 4)
    assert areas.tolist() == [[2, 2, 1, 0], [3, 3, 1, 0], [3, 2, 2, 0]]
    scored = segmentation_scores(areas[None], ["a", "b", "c", "d"], bootstrap_samples=50)
    assert scored.metrics["mean_iou"] == pytest.approx((2 / 4 + 2 / 3 + 1 / 2) / 3)  # class d occurs nowhere
    assert scored.metrics["pixel_accuracy"] == pytest.approx(5 / 7)
    assert scored.per_class[1:] == [("a", 3, "0.5000"), ("b", 2, "0.6667"), ("c", 2, "0.5000"), ("d", 0, "")]
    assert scored.intervals["mean_iou"] == pytest.approx((scored.metrics["mean_iou"],) * 2)  # one image, redrawn


def test_counts_of_images_are_summed_before_they_are_divided():
    first = class_areas(torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 0, 0, 1]]), 2)
    second = class_areas(torch.tensor([[1]]), torch.tensor([[1]]), 2)
    scored = segmentation_scores(torch.stack([first, second]), ["a", "b"], bootstrap_samples=200)
    assert scored.metrics["mean_iou"] == pytest.approx((3 / 4 + 1 / 2) / 2)  # and not the mean of images
    low, high = scored.intervals["mean_iou"]
    assert low == pytest.approx((3 / 4 + 0) / 2) and high == 1.0  # the first image twice, the second twice


def test_a_perfect_segmentation_scores_one_and_a_constant_one_the_share_of_its_class():
    masks = torch.randint(0, 5, (6, 16, 16), generator=torch.Generator().manual_seed(0))
    masks[0, :4] = 255
    perfect = torch.stack([class_areas(mask.where(mask != 255, 0), mask, 5) for mask in masks])
    assert segmentation_scores(perfect, list("abcde"), bootstrap_samples=20).metrics["mean_iou"] == 1.0
    constant = torch.stack([class_areas(torch.full_like(mask, 3), mask, 5) for mask in masks])
    share = float((masks == 3).sum() / (masks != 255).sum())
    scored = segmentation_scores(constant, list("abcde"), bootstrap_samples=20).metrics
    assert scored["pixel_accuracy"] == pytest.approx(share) and scored["mean_iou"] == pytest.approx(share / 5)


def test_upsampling_is_that_of_torch():
    logits = torch.randn(2, 24, 3, generator=torch.Generator().manual_seed(0))
    upsampled = Upsampling((4, 6), (32, 51), torch.device("cpu"))(logits)
    planes = logits.unflatten(1, (4, 6)).permute(0, 3, 1, 2)
    expected = F.interpolate(planes, size=(32, 51), mode="bilinear", align_corners=False)
    assert torch.allclose(upsampled, expected, atol=1e-5)


BOXES = np.array([[2.0, 3, 20, 17, 1], [30, 8, 46, 30, 0], [1, 1, 9, 9, 1]])


def test_boxes_come_back_from_what_their_patches_should_say():
    wanted = targets_of([BOXES], 2, LAYOUT)
    there = wanted.classes[0] != 2
    assert there.sum() == 3
    boxes = decoded_boxes(wanted.boxes[0], LAYOUT)[there]
    found = {(int(number), *box) for number, box in zip(wanted.classes[0][there], boxes.round().tolist(), strict=True)}
    assert found == {(int(box[4]), *box[:4]) for box in BOXES.tolist()}


def test_of_two_centres_in_a_patch_the_smaller_object_counts():
    boxes = np.array([[10.0, 10, 12, 12, 0], [0, 0, 22, 22, 1]])
    for order in ([0, 1], [1, 0]):
        wanted = targets_of([boxes[order]], 2, LAYOUT)
        assert (wanted.classes[0] != 2).sum() == 1 and int(wanted.classes[0].min()) == 0


def test_a_layer_that_says_what_it_should_detects_every_object_and_no_other():
    wanted = targets_of([BOXES], 2, LAYOUT)
    logits = F.one_hot(wanted.classes[0], 3).float() * 20
    numbers, scores, boxes = image_detections(torch.cat([logits, wanted.boxes[0]], dim=1), 2, LAYOUT)
    assert len(numbers) == 3 and (scores > 0.99).all()
    found = Detections(torch.zeros(3, dtype=torch.int64), numbers, scores, boxes)
    scored = detection_scores(found, [BOXES], ["a", "b"], bootstrap_samples=20)
    assert scored.metrics == {"count": 1.0, "ap50": 1.0, "ap": 1.0}


def test_the_loss_of_no_object_at_all_is_finite_and_falls_to_the_background():
    class Empty:
        layout = LAYOUT

        def boxes(self, rows):
            return [np.zeros((0, 5)) for _ in rows]

    loss = detection_loss(Empty(), 2, torch.device("cpu"))
    outputs = torch.zeros(2, 24, outputs_of(2))
    background = outputs.clone()
    background[..., 2] = 20
    assert loss(outputs, [0, 1]) == pytest.approx(48 * np.log(3), rel=1e-5) and loss(background, [0, 1]) < 1e-4


def test_average_precision_is_that_of_a_hand():
    boxes = [np.array([[0.0, 0, 10, 10, 0], [20, 0, 30, 10, 0]]), np.array([[0.0, 0, 10, 10, 0]])]
    found = Detections(
        torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]), torch.tensor([0.9, 0.8, 0.7]),
        torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 6]]),
    )  # fmt: skip
    scored = detection_scores(found, boxes, ["a"], bootstrap_samples=20)
    # right, wrong, right at an IoU up to 0.6: precision 1 up to a recall of 1/3, then 2/3 up to 2/3, of 101 recalls
    half = (34 * 1 + 33 * 2 / 3) / 101
    assert scored.metrics["ap50"] == pytest.approx(half)
    assert scored.metrics["ap"] == pytest.approx((3 * half + 7 * 34 / 101) / 10)
    assert scored.per_class[1] == ("a", 3, f"{half:.4f}", f"{scored.metrics['ap']:.4f}")


def random_detections(images: int, classes: int, seed: int):
    drawn = np.random.default_rng(seed)
    boxes, rows = [], []
    for image in range(images):
        corner, size = drawn.uniform(0, 60, (4, 2)), drawn.uniform(5, 40, (4, 2))
        numbers = drawn.integers(0, classes, (4, 1))
        boxes.append(np.concatenate([corner, corner + size, numbers], axis=1)[: drawn.integers(0, 5)])
        for box in np.repeat(boxes[-1], 4, axis=0):
            moved = box[:4] + drawn.normal(0, 3, 4)
            moved[2:] = np.maximum(moved[2:], moved[:2] + 1)
            wrong = drawn.random() < 0.2
            rows.append((image, drawn.integers(0, classes) if wrong else int(box[4]), drawn.random(), *moved))
    rows.sort(key=lambda row: (row[0], -row[2]))
    table = torch.tensor(np.array(rows))
    return Detections(table[:, 0].long(), table[:, 1].long(), table[:, 2].float(), table[:, 3:].float()), boxes


def cocos_scores(found: Detections, boxes, classes: int) -> tuple[float, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def sides(box):
        return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]

    truth, objects = COCO(), [(image, box) for image, of_image in enumerate(boxes) for box in of_image]
    truth.dataset = {
        "info": {}, "images": [{"id": image} for image in range(len(boxes))],
        "categories": [{"id": number} for number in range(classes)],
        "annotations": [
            {"id": number + 1, "image_id": image, "category_id": int(box[4]), "bbox": sides(box), "iscrowd": 0,
             "area": float((box[2] - box[0]) * (box[3] - box[1]))}
            for number, (image, box) in enumerate(objects)
        ],
    }  # fmt: skip
    truth.createIndex()
    predictions = truth.loadRes([
        {"image_id": int(image), "category_id": int(number), "score": float(score), "bbox": sides(box)}
        for image, number, score, box in zip(*found, strict=True)
    ])  # fmt: skip
    evaluation = COCOeval(truth, predictions, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[1], evaluation.stats[0]


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_cocos_own(seed):
    pytest.importorskip("pycocotools")
    found, boxes = random_detections(30, 3, seed)
    scored = detection_scores(found, boxes, ["a", "b", "c"], bootstrap_samples=100)
    ap50, ap = cocos_scores(found, boxes, 3)
    assert 0.2 < ap50 < 0.95
    assert (scored.metrics["ap50"], scored.metrics["ap"]) == pytest.approx((ap50, ap), abs=1e-9)
    low, high = scored.intervals["ap"]
    assert low < high and high - low < 0.4


def test_drawing_every_image_once_is_the_score_itself_and_nothing_found_scores_nothing():
    found, boxes = random_detections(12, 2, 9)
    nothing = Detections(*(column[:0] for column in found))
    scored = detection_scores(nothing, boxes, ["a", "b"], bootstrap_samples=10)
    assert scored.metrics["ap50"] == 0.0 and scored.intervals["ap50"] == (0.0, 0.0)
    empty = [np.zeros((0, 5))] * 12
    assert detection_scores(found, empty, ["a", "b"], bootstrap_samples=10).metrics["ap"] == 0.0


def test_patch_tokens_are_what_pooled_features_are_the_mean_of():
    model, images = encoder(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (tokens,), (pooled, _) = patch_tokens(model, images), pooled_features(model, images)
    assert tokens.shape == (2, 64, 48) and torch.allclose(tokens.mean(dim=1), pooled, atol=1e-5)


def test_extracted_rows_are_those_of_the_split_in_its_order_and_leave_nothing(scenes, tmp_path):
    index, how, place = read_index(scenes), extraction(tmp_path / "features"), tmp_path / "patches"
    (place / "train").mkdir(parents=True)
    (place / "train/left").write_text("by a killed attempt")
    with emptied(place, how):
        extracted = extract_patches(encoder(), SOURCE, index, "test", how, place)
        assert [path.name for path in place.iterdir()] == ["test"]
        _require_rows(extracted)
    assert not place.exists()


def _require_rows(extracted):
    rows = extracted.everyone()
    assert rows.positions() == list(range(33))
    masks, boxes = rows.masks(range(33)), rows.boxes(range(33))
    assert set(masks.unique().tolist()) == {0, 1, 2}
    for mask, of_image in zip(masks, boxes, strict=True):
        for left, top, right, bottom, number in of_image.astype(int):
            inside = mask[top:bottom, left:right]
            assert (inside[inside > 0] == 1 + number).all() and (inside > 0).any()


def test_a_sample_that_lacks_its_mask_is_named(scenes, tmp_path):
    from dataclasses import replace

    from pipeline.ingestion.build import ingest
    from tests.pipeline.scenes import IngestConfig

    plain = ingest(str(scenes.parent / "scenes/images"), tmp_path / "plain", IngestConfig()).directory
    index = replace(read_index(plain), mask_classes=("ground", "digit 0"))
    with pytest.raises(DataError, match="sample `test-.*`: has no mask"):
        extract_patches(encoder(), SOURCE, index, "test", extraction(tmp_path / "features"), tmp_path / "patches")


def scores_of_ranks(data: str, folder: str) -> dict | None:
    import torch.distributed as dist

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    protocols = {name: name for name in ("segment-linear-v1", "detect-linear-v1")}
    answer = {}
    for name, scored in dense_scores(
        encoder(), SOURCE, read_index(data), protocols, ["test"], extraction(folder, rank, ranks),
        Path(folder) / "patches", bootstrap_samples=50, steps=120,
    ):  # fmt: skip
        if rank == 0:
            answer[name] = (scored[0].metrics, scored[0].intervals)
        else:
            assert scored == [None]
    return answer


@pytest.mark.slow
def test_probes_beat_constant_answers_and_score_alike_at_any_number_of_ranks(scenes, tmp_path):
    alone = scores_of_ranks(str(scenes), str(tmp_path / "alone"))
    assert alone == run_on_ranks(scores_of_ranks, 2, str(scenes), str(tmp_path / "two"))[0]
    segmentation, detection = alone["segment-linear-v1"][0], alone["detect-linear-v1"][0]
    index = read_index(scenes)
    extracted = extract_patches(
        encoder(), SOURCE, index, "test", extraction(tmp_path / "constant"), tmp_path / "patches"
    )
    masks = extracted.everyone().masks(range(33))
    ground = torch.stack([class_areas(torch.zeros_like(mask), mask, 3) for mask in masks])
    constant = segmentation_scores(ground, list(index.mask_classes), bootstrap_samples=10).metrics
    assert segmentation["count"] == 33 and segmentation["mean_iou"] > constant["mean_iou"] + 0.1
    assert detection["count"] == 33 and detection["ap50"] > 0.3 > detection["ap"] > 0.05
