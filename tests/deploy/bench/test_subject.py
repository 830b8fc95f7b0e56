"""The folder that measuring processes share: the same weights, input and expected output for everybody."""

from __future__ import annotations

import numpy as np
import pytest
import stand_in
import torch
from torch import nn

from netwright.console import UserError
from netwright.deploy.bench import Recipe, Subject
from netwright.deploy.bench.subject import Work, first

TINY = Recipe("stand_in:tiny", {"batch": 2})


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    made = Work(tmp_path_factory.mktemp("work"))
    assert made.write(TINY, TINY.make()) == "PyTorch eager in float64"
    return made


def test_the_network_comes_back_with_the_weights_that_were_written(tmp_path):
    recipe = Recipe("stand_in:unseeded")
    subject, work = recipe.make(), Work(tmp_path)
    work.write(recipe, subject)
    again = work.module()
    assert torch.equal(again.weight, subject.module.weight)
    assert not torch.equal(recipe.make().module.weight, subject.module.weight)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())


def test_deviation_is_relative_to_the_largest_output_in_double(work):
    x = work.input()
    expected = stand_in.network().double()(torch.from_numpy(x).double()).detach().numpy()
    assert work.deviation(expected) == 0
    moved = expected.copy()
    moved[1, 3] += 0.25 * np.abs(expected).max()
    assert work.deviation((moved, "more")) == pytest.approx(0.25)
    assert work.deviation(torch.from_numpy(expected).float()) < 1e-6
    assert np.isnan(work.deviation(expected[:1]))
    moved[0, 0] = np.nan
    assert np.isnan(work.deviation(moved))


def test_an_input_that_does_not_fit_is_told_with_its_shape(tmp_path):
    subject = Subject("narrow", nn.Linear(4, 3), np.ones((1, 5), np.float32))
    with pytest.raises(UserError, match=r"does not take an input of shape \(1, 5\)"):
        Work(tmp_path).write(Recipe("stand_in:unseeded"), subject)


def test_an_onnx_file_is_its_own_reference(work, tmp_path):
    from netwright.deploy.bench.onnx_file import write

    x, file = work.input(), tmp_path / "net.onnx"
    write(stand_in.network(), x, file)
    other = Work(tmp_path / "work")
    other.folder.mkdir()
    assert other.write(TINY, Subject("file", None, x, onnx=file)) == "ONNX Runtime without optimisations"
    assert other.onnx.read_bytes() == file.read_bytes()
    assert other.deviation(stand_in.network()(torch.from_numpy(x)).detach()) < 1e-6


def test_first_output():
    assert first([{"a": (3, 4)}, 5]) == 3
