import json

import numpy as np
import pytest
import torch

from netwright.console import UserError
from netwright.data import TensorImages, load, write_folder
from netwright.data.condense import DatasetQuantizer
from netwright.design.condense import condense
from netwright.seeding import stream


@pytest.fixture
def folder(tmp_path):
    """40 pictures of two classes, in class folders with names of their own."""
    images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=stream(0, "x"))
    write_folder(tmp_path / "mine", TensorImages(images, torch.arange(60) % 2), ["cat", "dog"])
    return tmp_path / "mine"


def test_a_folder_is_copied_file_by_file(folder, tmp_path):
    found = condense(str(folder), tmp_path / "out", keep=0.5, features="pixels", n_bins=3)
    whole, small = load(folder), load(tmp_path / "out")
    assert found.kept == len(small.train) == round(0.5 * len(whole.train))
    assert small.classes == whole.classes
    assert len(small.test) == len(whole.test)
    assert not small.split_off
    kept = json.loads((tmp_path / "out" / "condensed.json").read_text())["indices"]
    expected = {p.read_bytes() for i in kept for p in [type(folder)(whole.train.files[i])]}
    assert {p.read_bytes() for p in (tmp_path / "out" / "train").rglob("*.png")} == expected
    assert found.counts == small.counts()["train"]


def test_named_data_become_a_folder_or_arrays(tmp_path):
    for out in ("digits", "digits.npz"):
        condense("digits", tmp_path / out, keep=0.1, features="pixels")
    first, second, whole = load(tmp_path / "digits"), load(tmp_path / "digits.npz"), load("digits")
    assert (
        first.train.digests().tolist()
        == second.train.subset(second.train.labels.argsort(stable=True)).digests().tolist()
    )
    for small in (first, second):
        assert (len(small.train), len(small.test)) == (129, len(whole.test))
        assert sorted(small.test.digests().tolist()) == sorted(whole.test.digests().tolist())


def test_features_of_the_user(tmp_path):
    whole = load("digits")
    rows = whole.train.images.flatten(1).float().numpy() ** 2
    np.save(tmp_path / "rows.npy", rows)
    condense("digits", tmp_path / "out.npz", keep=0.2, features=str(tmp_path / "rows.npy"))
    kept = json.loads((tmp_path / "out.json").read_text())["indices"]
    assert kept == DatasetQuantizer(ratio=0.2).fit(rows, whole.train.labels).indices().tolist()


def test_trained_features_are_the_default_and_repeatable(tmp_path):
    for out in ("a.npz", "b.npz"):
        assert condense("digits", tmp_path / out, keep=0.05).features == "trained"
    a, b = (json.loads((tmp_path / f"{name}.json").read_text())["indices"] for name in "ab")
    assert a == b
    assert len(a) == 65


def test_a_large_folder_stays_on_disk(folder, tmp_path, monkeypatch):
    import netwright.design.condense as module

    monkeypatch.setattr(module, "load", lambda data, **given: load(data, memory_limit=0, **given))
    condense(str(folder), tmp_path / "out", keep=0.5, features="pixels", n_bins=3)
    assert len(load(tmp_path / "out").train) == round(0.5 * len(load(folder).train))
    with pytest.raises(UserError, match="do not fit into memory"):
        condense(str(folder), tmp_path / "out.npz", keep=0.5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keep": 0}, r"keep must lie in \(0, 1\], got 0"),
        ({"keep": float("nan")}, "keep must lie"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"n_bins": 0}, "bins must be >= 1"),
        ({"n_bins": 5000}, "n_bins must lie in 1..1294"),
        ({"keep": 0.001}, "every class"),
        ({"features": "trainde"}, "did you mean trained"),
        ({"features": "absent.npy"}, "not a NumPy file"),
    ],
)
def test_bad_input(tmp_path, options, told):
    with pytest.raises(UserError, match=told):
        condense("digits", tmp_path / "out", **{"keep": 0.5, "features": "pixels"} | options)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_touched(folder):
    with pytest.raises(UserError, match="there already"):
        condense("digits", folder, keep=0.5)


def test_floats_need_arrays(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 1, 4, 9)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(40) % 2)
    with pytest.raises(UserError, match="no pictures"):
        condense(str(tmp_path / "x.npz"), tmp_path / "out", keep=0.5)
    condense(str(tmp_path / "x.npz"), tmp_path / "out.npz", keep=0.5, features="pixels", n_bins=2)
    assert load(tmp_path / "out.npz").train.images.dtype == torch.float32
