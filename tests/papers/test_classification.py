"""The small problems of the training methods' experiments."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import fake_gpu

from netwright.papers import classification


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_parts_share_no_image_and_depend_on_the_seed(name):
    found, normalise = classification.parts(name, 0, 60, 20, 50)
    assert [len(part) for part in found.values()] == [60, 20, 50]
    digests = [{row.tobytes() for row in part.digests()} for part in found.values()]
    assert not digests[0] & digests[1]
    assert not digests[0] & digests[2]
    assert not digests[1] & digests[2]
    assert found["train"].labels.bincount().tolist() == [6] * 10
    standardised = normalise(found["train"].images)
    assert abs(float(standardised.mean())) < 1e-5
    assert float(standardised.std()) == pytest.approx(1.0, abs=1e-3)
    other, _ = classification.parts(name, 1, 60, 20, 50)
    assert not torch.equal(other["train"].images, found["train"].images)
    assert torch.equal(other["test"].images, found["test"].images) == (name == "fashion-mnist")


def test_without_held_out_images():
    found, _ = classification.parts("digits", 0, 100, 0, 10**6)
    assert set(found) == {"train", "test"}
    assert len(found["train"]) + len(found["test"]) == 1797


def test_what_is_right_is_told_on_the_processor():
    with fake_gpu() as device:
        found = classification.right(torch.nn.Linear(3, 2, device=device), torch.rand(1500, 3), torch.zeros(1500))
    assert (found.device.type, found.shape) == ("cpu", (1500,))
    plain = classification.right(torch.nn.Identity(), torch.eye(3), torch.tensor([0, 2, 2]))
    assert plain.tolist() == [True, False, True]
