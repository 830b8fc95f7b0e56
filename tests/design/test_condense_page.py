"""The page about a condensed data set."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from netwright.data import TensorImages, load
from netwright.design.condense import condense
from netwright.design.condense_page import landscape, sheet, typicality


def test_the_page_lies_beside_the_data_and_does_no_harm(tmp_path):
    found = condense("digits", tmp_path / "small", keep=0.2, features="pixels", n_bins=5)
    assert found.report == str(tmp_path / "small" / "report.html")
    text = (tmp_path / "small" / "report.md").read_text()
    assert f"{found.kept:,} of {found.examples:,} training examples were kept (20.0 %)" in text
    assert f"netwright design {tmp_path / 'small'}" in text
    told = json.loads((tmp_path / "small" / "report.json").read_text())
    assert len(told["figures"]["indices"]) == found.kept
    again = load(tmp_path / "small")
    assert not again.problems
    assert len(again.train) == found.kept
    arrays = condense("digits", tmp_path / "small.npz", keep=0.2, features="pixels", n_bins=5)
    assert arrays.report == str(tmp_path / "small-report.html")
    assert json.loads((tmp_path / "small.json").read_text())["kept"] == found.kept


def test_typicality_is_the_cosine_to_the_mean_of_the_class():
    angle = torch.deg2rad(torch.tensor([10.0, -10.0, 60.0, -60.0, 180.0, 180.0]))
    rows = torch.stack([angle.cos(), angle.sin()], 1)
    labels = np.array([0, 0, 0, 0, 1, 1])
    bins = [np.array([0, 1, 4]), np.array([2, 3, 5]), np.array([], np.int64)]
    found = typicality(rows, labels, bins).data["quartiles"]
    cos = np.cos(np.deg2rad([10, 60]))
    assert found[0][1] == pytest.approx(cos[0], abs=1e-6)  # of cos 10, cos 10 and 1
    assert found[1][1] == pytest.approx(cos[1], abs=1e-6)
    assert found[2] == [None] * 3


def test_the_map_is_that_of_principal_components():
    rows = torch.randn(60, 7, generator=torch.Generator().manual_seed(0))
    rows = rows / rows.norm(dim=1, keepdim=True)
    figure = landscape(rows, np.array([3, 5]), 0)
    places = torch.tensor(figure.data["place"])
    centred = rows - rows.mean(0)
    left, size, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = left[:, :2] * size[:2]
    assert torch.allclose(places.abs(), expected.abs(), atol=1e-3)
    assert [i for i, kept in zip(figure.data["index"], figure.data["kept"], strict=True) if kept] == [3, 5]


def test_the_sheet_shows_kept_examples_of_their_class_and_bin():
    data = load("digits")
    bins = np.array_split(np.arange(len(data.train)), 4)
    kept = np.arange(0, len(data.train), 3)
    figure = sheet(data, bins, kept)
    labels = data.train.labels.numpy()
    found = figure.data["index"]
    assert len(found) == len(data.classes)
    for label, row in enumerate(found):
        for column, index in enumerate(row):
            inside = [i for i in kept if labels[i] == label and i in bins[column]]
            assert index == (inside[0] if inside else None)
    assert "data:image/png;base64" in figure.image


def test_what_is_no_picture_has_no_sheet():
    data = load("digits")
    floats = TensorImages(data.train.images.float(), data.train.labels)
    assert sheet(dataclasses.replace(data, train=floats), [np.arange(len(floats))], np.arange(5)) is None
