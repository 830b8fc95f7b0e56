"""Whether a translator is ready: the exact change of the bias is, one that does nothing or too much is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from netwright.data import colored_mnist, load
from netwright.data.biased import PALETTE, recolored
from netwright.train.debias import TranslationQuality, signed_range, translation_quality
from netwright.train.debias.views import as_bytes


@pytest.fixture(scope="module")
def data():
    whole = load("digits")
    parts = {name: colored_mnist(part.images, part.labels, 1.0) for name, part in whole.parts.items()}
    return dataclasses.replace(whole, **parts, shape=(3, 8, 8), mean=(0.2,) * 3, std=(0.3,) * 3)


class Exact:
    num_classes = 10

    def translate(self, x, y_target):
        return signed_range(3)(recolored(as_bytes(x), torch.tensor(PALETTE)[y_target]))


class Nothing(Exact):
    def translate(self, x, y_target):
        return x


class Everything(Exact):
    """Of the new colour, and of the figure nothing."""

    def translate(self, x, y_target):
        return super().translate(torch.ones_like(x), y_target)


def test_exact_recolouring_is_ready(data):
    found = translation_quality(Exact(), data)
    assert found.transfer > 0.9
    assert found.kept > 0.8
    assert found.change > 0.05
    assert found.images == len(data.validation)
    assert found.faults() == ()


def test_doing_nothing_is_not(data):
    found = translation_quality(Nothing(), data)
    assert found.transfer < 0.1
    assert found.change == 0
    assert found.kept > 0.8
    (fault,) = found.faults()
    assert "the bias hardly changes" in fault


def test_changing_the_figure_is_not(data):
    found = translation_quality(Everything(), data)
    assert found.kept < 0.2
    assert any("the figure itself changes" in fault for fault in found.faults())


def test_grey_pictures_have_no_reader_without_colour():
    found = translation_quality(Nothing(), load("digits"), most=40)
    assert found.kept is None
    assert found.images == 40


@pytest.mark.parametrize(("classes", "enough"), [(2, 0.75), (3, 2 / 3), (10, 0.2)])
def test_enough_lies_above_chance(classes, enough):
    assert TranslationQuality(1, 1 / classes, 1.0, 1.0, 0.0).enough == pytest.approx(enough)
