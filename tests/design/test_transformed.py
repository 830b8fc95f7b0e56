"""``netwright train --method natra``: its page of transformed samples, what it leaves, resumption, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import TINY
from typer.testing import CliRunner

from netwright import cli, storage
from netwright.console import UserError
from netwright.design import preparation, remarks, transformed
from netwright.design.run import RunFolder
from netwright.design.train import TrainOptions, train
from netwright.design.train_page import KIND, page

METHOD = (
    "natra:generator_steps=24,inversion_steps=1,reference_epochs=4,min_change=0.001,max_flip=0.5,max_directions=2,k=2"
)
COMMON = {"methods": (METHOD,), "epochs": 3, "lr": 0.05}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two classes, a bright half above or below, of varying brightness."""
    draws = np.random.default_rng(0)
    labels = np.arange(150) % 2
    images = draws.integers(0, 40, (150, 8, 8))
    rows = np.arange(8)
    inside = np.where(labels[:, None] == 0, rows < 4, rows >= 4)[:, :, None]
    images = np.where(inside, draws.integers(90, 250, (150, 1, 1)), images)
    path = tmp_path_factory.mktemp("data") / "halves.npz"
    np.savez(path, x=images.astype(np.uint8), y=labels)
    return str(path)


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "natra"
    train(TrainOptions(data=data, out=str(folder), **COMMON), command="netwright train it")
    return folder


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def test_what_it_leaves(finished: Path):
    names = {path.name for path in finished.iterdir()}
    assert {"natra.safetensors", "natra.json", "natra.npz", "transformed.html", "transformed.md"} <= names
    figures = storage.read_json(finished / "natra.json")
    directions = len(figures["flip"])
    assert 1 <= directions <= 2
    with np.load(finished / "natra.npz") as arrays:
        assert arrays["images"].shape == (directions, 2, 5, 8, 8, 1)
        moved = arrays["images"].astype(int)
    assert (np.abs(moved[:, :, 0] - moved[:, :, 4]).max((2, 3, 4)) > 0).all()
    text = (finished / "transformed.html").read_text()
    assert text.count("data:image/png;base64") == directions
    assert "leave the class alone" in text
    report = (finished / "report.html").read_text()
    assert "Natural transformations" in report
    result = storage.read_json(finished / "report.json")["figures"]["result"]
    assert result["accuracy"] > 0.9
    assert result["preparation"] > result["seconds"]  # the generator and the reference take longer than three epochs
    assert "time of what methods learn before, seconds" in (finished / "report.md").read_text()
    assert "trained with natra, is right on" in (finished / "report.md").read_text()


def test_the_middle_of_each_row_is_the_image_itself(finished: Path, data: str):
    from netwright.data import load

    part = load(data).train
    with np.load(finished / "natra.npz") as arrays:
        middle = arrays["images"][:, :, 2, :, :, 0]
    for label in (0, 1):
        first = part.images[int((part.labels == label).nonzero()[0]), 0].numpy()
        assert all(np.array_equal(each[label], first) for each in middle)


def test_the_page_is_the_same_again(finished: Path):
    before = (finished / "transformed.html").read_bytes()
    transformed.page(RunFolder(finished, KIND)).write(finished, "transformed")
    assert (finished / "transformed.html").read_bytes() == before
    report = (finished / "report.html").read_bytes()
    page(finished).write(finished)
    assert (finished / "report.html").read_bytes() == report


def test_a_stopped_run_goes_on_bit_for_bit(finished: Path, data: str, tmp_path: Path, monkeypatch):
    options = TrainOptions(data=data, out=str(tmp_path / "run"), **COMMON)
    with monkeypatch.context() as patched:

        def stop(self, trainer, pl_module):
            if trainer.current_epoch == 1 and trainer.max_epochs == 3:  # not that of the reference
                raise KeyboardInterrupt

        patched.setattr("netwright.train.schedules.CosineProgress.on_train_epoch_end", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(options)
    assert (tmp_path / "run" / "natra.safetensors").is_file()
    spent = preparation.seconds(tmp_path / "run")

    def never(*args, **kwargs):
        raise AssertionError("the generator is trained once")

    monkeypatch.setattr("netwright.train.callbacks.natural_transform.prepare_natural_transform", never)
    train(options)
    a, b = (storage.read_tensors(folder / "model.safetensors") for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert preparation.seconds(tmp_path / "run") >= spent > 0


def test_the_terminal_names_the_page(data: str, tmp_path: Path):
    found = invoke("train", data, "--method", METHOD, "--epochs", "1", "--no-augment", "--out", str(tmp_path / "run"))
    assert found.exit_code == 0, found.stderr
    assert f"transformed samples: {tmp_path / 'run'}/transformed.html" in found.stdout


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("natra:beta=-1", "natra: beta must be >= 0 and finite, got -1"),
        ("natra:k=0", "natra: k must be >= 1, got 0"),
        ("natra:k=many", "natra: k must be a whole number, got 'many'"),
        ("natra:search=best", "search must be one of random, worst_of_k, pgd, got 'best'"),
        ("natra:eps_max=0", "eps_max must be > 0"),
        ("natra:bta=1", "did you mean beta?"),
        ("natra:source=3", "source must be a NaturalTransform"),
        ("natra:generator_steps=0", "generator_steps must be a whole number >= 1, got 0"),
        ("natra:unlabelled=nowhere/at/all", "no such file or folder"),
        ("natra:num_codes=2.5", "num_codes must be a whole number >= 1, got 2.5"),
    ],
)
def test_bad_arguments(data: str, tmp_path: Path, method: str, message: str):
    found = invoke("train", data, "--method", method, "--out", str(tmp_path / "run"))
    assert found.exit_code == 2
    assert message in found.stderr
    assert found.stderr.count("error:") == 1
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("*.json"))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((60, 80, 70), np.uint8, "sides of 4 to 64 pixels for the generator of netwright, got 80 x 70"),
        ((60, 1, 12), np.uint8, "got 1 x 12"),
        ((60, 8, 8), np.float32, "natra needs pictures, got data of another kind"),
    ],
)
def test_data_that_do_not_suit(tmp_path: Path, shape, dtype, message):
    draws = np.random.default_rng(0)
    images = draws.normal(size=shape) * 3 if dtype == np.float32 else draws.integers(0, 256, shape)
    np.savez(tmp_path / "data.npz", x=images.astype(dtype), y=np.arange(60) % 2)
    found = invoke("train", str(tmp_path / "data.npz"), "--method", "natra", "--out", str(tmp_path / "run"))
    assert found.exit_code == 2
    assert message in found.stderr
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("*.json"))


def test_no_direction_is_told_as_what_it_is(data: str, tmp_path: Path):
    method = "natra:generator_steps=4,inversion_steps=0,reference_epochs=1,min_change=0.9"
    found = invoke("train", data, "--method", method, "--epochs", "1", "--out", str(tmp_path / "run"))
    assert found.exit_code == 2
    assert "no direction survives" in found.stderr
    assert "min_change 0.9" in found.stderr
    assert (tmp_path / "run" / "natra-generator.safetensors").is_file()
    told = " ".join(found.stderr.split())
    assert "natra-generator.safetensors" in told
    assert "more generator_steps" in told


def test_what_was_learned_before_no_direction_survived_serves_again(data: str, tmp_path: Path, monkeypatch):
    method = "natra:generator_steps=4,inversion_steps=0,reference_epochs=1"
    common = ("--epochs", "1", "--no-augment")
    found = invoke("train", data, "--method", f"{method},min_change=0.9", *common, "--out", str(tmp_path / "a"))
    assert found.exit_code == 2
    kept = tmp_path / "a" / "natra-generator.safetensors"
    assert not kept.with_name("natra-generator.ckpt").exists()

    def never(*args, **kwargs):
        raise AssertionError("it is there already")

    for name in ("fit_style_autoencoder", "BatchInverter", "reference_classifier"):
        monkeypatch.setattr(f"netwright.train.natra.groundwork.{name}", never)
    again = f"{method},min_change=0,max_flip=1,generator={kept}"
    found = invoke("train", data, "--method", again, *common, "--out", str(tmp_path / "b"))
    assert found.exit_code == 0, found.stderr
    found = invoke("train", "digits", "--method", f"natra:generator={data}", "--out", str(tmp_path / "c"))
    assert found.exit_code == 2
    assert not (tmp_path / "c").exists() or not any((tmp_path / "c").glob("*.json"))


def test_large_photos_are_told_the_size(tmp_path: Path):
    from PIL import Image

    for i in range(40):
        folder = tmp_path / "photos" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (128, 128, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    found = invoke("train", str(tmp_path / "photos"), "--method", "natra", "--out", str(tmp_path / "run"))
    assert found.exit_code == 2
    assert "sides of 4 to 64 pixels" in found.stderr
    assert "add --size 64" in found.stderr


def test_the_page_tells_at_which_step_directions_were_looked_at(finished: Path, tmp_path: Path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    figures = storage.read_json(folder / "natra.json")
    assert figures["step"] == 2
    without = {name: value for name, value in figures.items() if name != "step"}  # as earlier versions left it
    for found, step in ((figures, 2), (figures | {"step": 3.5}, 3.5), (without, 2)):
        storage.write_json(folder / "natra.json", found)
        text = transformed.page(RunFolder(folder, KIND)).markdown()
        assert f"At {step} standard deviations, both ways." in text


def test_damaged_pictures(finished: Path, tmp_path: Path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    whole = (folder / "natra.npz").read_bytes()
    for content in (b"nothing", b"", whole[: len(whole) // 2]):
        (folder / "natra.npz").write_bytes(content)
        found = invoke("report", str(folder))
        assert found.exit_code == 2
        assert "damaged file" in found.stderr
    (folder / "natra.json").unlink()
    assert "Natural transformations" not in page(folder).html()
    with pytest.raises(UserError, match="no method of this run transforms images"):
        transformed.page(RunFolder(folder, KIND))


@pytest.mark.slow
def test_a_design_is_trained_so_and_its_report_shows_it(data: str, tmp_path: Path):
    from netwright.design.pipeline import design
    from netwright.design.report import build

    folder = tmp_path / "run"
    design(data, out=str(folder), train_method=(METHOD,), **{**TINY, "search": "random", "batch_size": 16})
    assert (folder / "transformed.html").is_file()
    report = build(folder)
    assert "Natural transformations" in report.markdown()
    assert len(report.to_dict()["figures"]["natra"]["flip"]) >= 1
    assert f"transformed samples: {folder}/transformed.html" in remarks.lines(RunFolder(folder))
