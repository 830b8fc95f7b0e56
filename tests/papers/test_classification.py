"""The small problems of the training methods' experiments."""

from __future__ import annotations

import pytest
import torch

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
