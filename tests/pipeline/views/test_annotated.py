"""Masks and boxes go where the pixels of their image go."""

import numpy as np
import pytest
from PIL import Image

from pipeline.views.annotated import boxes_view, mask_view
from pipeline.views.evaluation import EvaluationInput
from tests.pipeline.photographs import encoded


def inputs(size, crop, crop_mode):
    return EvaluationInput(size, 3, crop, crop_mode, (0.0, 0.0, 0.0))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop", [0.875, 1.0])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
@pytest.mark.parametrize("sides", [(160, 100), (64, 64), (33, 97), (90, 7000)])
def test_a_painted_rectangle_is_where_its_mask_and_its_box_say(size, crop, crop_mode, sides):
    width, height = sides
    pixels, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    left, top, right, bottom = width // 4, height * 3 // 8, width * 3 // 4, height * 5 // 8
    pixels[top:bottom, left:right] = 255
    mask[top:bottom, left:right] = 1
    how = inputs(size, crop, crop_mode)
    view = np.empty((*size, 3), np.uint8)
    how.write(encoded(Image.fromarray(pixels), "PNG"), "png", view)
    moved = mask_view(mask, how)
    bright = view[:, :, 0] > 127
    assert (bright == (moved == 1)).mean() > 0.96  # up to the rim, which bicubic resizing blurs
    box = np.array([[left, top, right - left, bottom - top]], float)
    (cut,), (inside,) = boxes_view(box, (height, width), how)
    assert inside
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert np.abs(cut - seen).max() <= 1.0


def test_padding_is_ignored_and_a_box_whose_centre_is_cut_off_is_left_out():
    how = inputs((32, 32), 1.0, "border")
    moved = mask_view(np.ones((10, 40), np.uint8), how)
    assert set(np.unique(moved)) == {1, 255} and (moved == 1).sum() == 32 * 8
    boxes = np.array([[0.0, 10, 20, 20], [70, 10, 20, 20]])
    cut, inside = boxes_view(boxes, (40, 120), inputs((40, 40), 1.0, "center"))
    assert inside.tolist() == [False, False]
    cut, inside = boxes_view(np.array([[30.0, 10, 30, 20]]), (40, 120), inputs((40, 40), 1.0, "center"))
    assert inside.all() and cut[0].tolist() == [0, 10, 20, 30]
