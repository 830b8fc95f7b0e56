"""Boxes of maps against masks that are known, and the two measures on them."""

from __future__ import annotations

import pytest
import torch

from netwright.explain import largest_component_box, localization_error, pointing_game
from netwright.explain.localization import overlap
from netwright.seeding import stream


def test_the_largest_part_counts_and_diagonals_join_it():
    cam = torch.zeros(8, 8)
    cam[0, 0] = 1.0
    cam[2, 2] = cam[3, 3] = cam[4, 4] = 0.5
    cam[6, 6:8] = 0.9
    assert largest_component_box(cam) == (2, 2, 5, 5)
    assert largest_component_box(cam, connectivity=4) == (6, 6, 8, 7)
    assert largest_component_box(cam, threshold=0.6) == (6, 6, 8, 7)
    assert largest_component_box(torch.zeros(4, 6)) == (0, 0, 6, 4)


def test_a_filled_box_is_found_again():
    generator = stream(0, "boxes")
    for _ in range(50):
        x0, y0 = torch.randint(0, 20, (2,), generator=generator).tolist()
        x1, y1 = (
            x0 + int(torch.randint(1, 12, (), generator=generator)),
            y0 + int(torch.randint(1, 12, (), generator=generator)),
        )
        cam = torch.zeros(32, 32)
        cam[y0:y1, x0:x1] = 1.0
        assert largest_component_box(cam) == (x0, y0, x1, y1)
        assert not localization_error(cam[None], [[(x0, y0, x1, y1)]]).any()


def test_the_overlap_is_that_of_counted_pixels():
    generator = stream(1, "overlap")
    for _ in range(50):
        boxes = []
        for _ in range(2):
            x0, y0, w, h = torch.randint(1, 9, (4,), generator=generator).tolist()
            boxes.append((x0, y0, x0 + w, y0 + h))
        masks = torch.zeros(2, 20, 20, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
            mask[y0:y1, x0:x1] = True
        expected = (masks[0] & masks[1]).sum().item() / (masks[0] | masks[1]).sum().item()
        assert overlap(*boxes) == pytest.approx(expected)


def test_any_of_several_boxes_will_do():
    cam = torch.zeros(2, 8, 8)
    cam[:, 1:4, 1:4] = 1.0
    boxes = [[(5, 5, 8, 8), (1, 1, 4, 4)], [(5, 5, 8, 8)]]
    assert localization_error(cam, boxes).tolist() == [False, True]
    assert localization_error(cam, [[(1, 1, 4, 6)]] * 2, iou=0.7).tolist() == [True, True]
    assert pointing_game(cam, boxes, tolerance=0).tolist() == [True, False]
    # The peak lies at (1, 1): four pixels from the box in both directions.
    assert pointing_game(cam[1:], boxes[1:], tolerance=5.6).tolist() == [False]
    assert pointing_game(cam[1:], boxes[1:], tolerance=5.7).tolist() == [True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: largest_component_box(torch.zeros(1, 2, 2)), r"cam must be \(height, width\)"),
        (lambda: largest_component_box(torch.zeros(2, 2), threshold=1.0), r"threshold must lie in \[0, 1\), got 1.0"),
        (lambda: largest_component_box(torch.zeros(2, 2), connectivity=6), "connectivity must be 4 or 8, got 6"),
        (lambda: localization_error(torch.zeros(2, 2), []), "cams must be"),
        (lambda: localization_error(torch.full((1, 2, 2), torch.nan), [[(0, 0, 1, 1)]]), "cams must be finite"),
        (lambda: localization_error(torch.zeros(1, 2, 2), []), "one list for each of 1 maps, got 0"),
        (lambda: localization_error(torch.zeros(1, 2, 2), [[]]), "at least 1 box, got 0"),
        (lambda: localization_error(torch.zeros(1, 2, 2), [[(1, 0, 1, 2)]]), "x0 < x1 and y0 < y1"),
        (lambda: localization_error(torch.zeros(1, 2, 2), [[(0, 0, 1, 1)]], iou=0), "iou must lie"),
        (lambda: pointing_game(torch.zeros(1, 2, 2), [[(0, 0, 1, 1)]], -1), "tolerance must be >= 0, got -1"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
