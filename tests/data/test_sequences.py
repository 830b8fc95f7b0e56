"""Pixel sequences by hand; time series through aeon, and from files of its format that are made here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from netwright.console import UserError
from netwright.data import Batches, as_sequences, check, load, sequences, series_names
from netwright.data.sequences import pixel_rows
from netwright.data.tensors import TensorImages
from netwright.papers import classification

needs_aeon = pytest.mark.skipif(importlib.util.find_spec("aeon") is None, reason="aeon is not installed")


def test_pixels_row_after_row():
    digits = load("digits")
    found = as_sequences(digits)
    assert found.shape == (1, 1, 64)
    assert [len(part) for part in found.parts.values()] == [len(part) for part in digits.parts.values()]
    image, label = digits.test[7]
    sequence, same = found.test[7]
    assert label == same
    assert torch.equal(sequence.flatten(), torch.cat([image[0, row] for row in range(8)]))
    assert found.mean == pytest.approx(digits.mean, abs=1e-12)
    assert found.augmentation().steps == ()  # no crop and no flip of a sequence
    x, _ = next(iter(Batches(found.train, 16, normalise=found.normalise())))
    assert x.shape == (16, 1, 1, 64)


def test_pooled():
    part = TensorImages(torch.arange(2 * 5 * 4, dtype=torch.uint8).view(1, 2, 5, 4), torch.tensor([0]))
    found = pixel_rows(part, pool=2).images
    by_hand = part.images[0, :, :4].float().view(2, 2, 2, 2, 2).mean((2, 4)).round().byte()
    assert found.dtype == torch.uint8
    assert torch.equal(found[0, :, 0], by_hand.flatten(1))
    floats = pixel_rows(TensorImages(part.images.float(), part.labels), pool=2).images
    assert torch.equal(floats.round().byte(), found)


def test_one_permutation_for_all():
    digits = load("digits")
    plain, mixed, other = (as_sequences(digits, permutation_seed=seed) for seed in (None, 1, 2))
    order = [int(place) for place in torch.arange(64)[mixed.train.images[0].flatten().argsort(stable=True)]]
    assert sorted(order) == list(range(64))
    for name, part in mixed.parts.items():
        before = plain.parts[name].images
        assert torch.equal(part.images.sort(-1).values, before.sort(-1).values)
        assert not torch.equal(part.images, before)
    # Columns of the pixel matrix are the same columns, elsewhere; by the same way in every part.
    columns = plain.train.images.flatten(1).T.tolist()
    places = [columns.index(column) for column in mixed.train.images.flatten(1).T.tolist()]
    moved = plain.test.images.flatten(1)[:, places]
    alike = [len(set(column)) > 1 for column in columns]  # constant pixels cannot be told apart
    kept = [alike[place] for place in places]
    assert torch.equal(moved[:, kept], mixed.test.images.flatten(1)[:, kept])
    assert not torch.equal(mixed.train.images, other.train.images)


def test_bad_sequences(tmp_path):
    digits = load("digits")
    for pool in (0, 9):
        with pytest.raises(ValueError, match=rf"pool must lie in 1..8, got {pool}"):
            as_sequences(digits, pool=pool)


def test_experiments_standardise_floats_as_they_are():
    pytest.importorskip("mnist1d")
    parts, normalise = classification.parts("mnist1d", 0, 500, 100, 100)
    values = normalise(parts["train"].images)
    assert float(values.mean()) == pytest.approx(0, abs=1e-4)
    assert float(values.std()) == pytest.approx(1, abs=1e-3)


@needs_aeon
def test_series_of_the_package():
    """Motions of six sensors, against the package's own loader."""
    assert {"ArrowHead", "BasicMotions", "GunPoint", "ItalyPowerDemand", "OSULeaf"} <= set(series_names())
    assert not {"JapaneseVowels", "CardanoSentiment", "Airline"} & set(series_names())
    data = load("aeon:BasicMotions")
    assert (data.name, data.shape) == ("aeon:BasicMotions", (6, 1, 100))
    assert data.classes == ("badminton", "running", "standing", "walking")
    assert [len(part) for part in data.parts.values()] == [36, 4, 40]
    from aeon.datasets import load_basic_motions

    values, labels = load_basic_motions(split="test")
    assert np.allclose(data.test.images[:, :, 0], values, atol=1e-5)
    assert [data.classes[i] for i in data.test.labels] == [label.lower() for label in labels]
    assert not check("aeon:GunPoint").spoiled


@needs_aeon
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("JapaneseVowels", "of different lengths, 7 to 26"),
        ("Covid3Month", "numbers to predict, and no classes"),
        ("Nothing", "are not on this machine"),
        ("../Nothing", "no series can be called '../Nothing'"),
    ],
)
def test_series_that_are_refused(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(f"aeon:{name}", root=tmp_path)


def write(folder: Path, name: str, head: str, **parts: list[str]) -> None:
    (folder / "aeon" / name).mkdir(parents=True)
    for part, lines in parts.items():
        text = "\n".join([f"@problemName {name}", "@timeStamps false", head, "@data", *lines, ""])
        (folder / "aeon" / name / f"{name}_{part}.ts").write_text(text)


HEAD = "@missing false\n@univariate true\n@equalLength true\n@seriesLength 3\n@classLabel true b a c"


@needs_aeon
def test_series_of_the_data_folder(tmp_path):
    rows = ["1,2,3:b", "4,5,6:a", "7,8,9:b", "1,1,2:a"]
    write(tmp_path, "Mine", HEAD, TRAIN=rows, TEST=["0,1,0:a", "2,2,1:b"])
    data = load("aeon:Mine", root=tmp_path)
    assert data.classes == ("a", "b")
    assert data.test.images[:, 0, 0].tolist() == [[0, 1, 0], [2, 2, 1]]
    assert data.test.labels.tolist() == [0, 1]
    write(tmp_path, "Further", HEAD, TRAIN=rows, TEST=["0,1,0:c", "2,2,1:b"])
    with pytest.raises(UserError, match='class "c" is in test but not in train'):
        load("aeon:Further", root=tmp_path)
    assert load("aeon:Further", root=tmp_path, drop_unknown=True).classes == ("a", "b")
    write(tmp_path, "Gaps", HEAD.replace("missing false", "missing true"), TRAIN=["1,?,3:b", *rows], TEST=rows)
    with pytest.raises(UserError, match="1 series have gaps"):
        load("aeon:Gaps", root=tmp_path)
    write(tmp_path, "Damaged", HEAD, TRAIN=["1,x,3:b", *rows], TEST=rows)
    with pytest.raises(UserError, match="damaged file of series"):
        load("aeon:Damaged", root=tmp_path)


def test_without_aeon(monkeypatch):
    monkeypatch.setattr(sequences, "_bundled", lambda: None)
    assert series_names() == ()
    with pytest.raises(UserError, match="needs aeon, which is not installed") as refused:
        load("aeon:GunPoint")
    assert "netwright[series]" in str(refused.value)


def test_no_size_for_series():
    with pytest.raises(UserError, match="fixed length"):
        load("aeon:GunPoint", size=(2, 2))
