"""``netwright train --method cdvg`` end to end on tiny data: the page of translated samples, resumption, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from netwright import cli, storage
from netwright.console import UserError
from netwright.data import load
from netwright.data.biased import BiasedDataset
from netwright.design import debiasing
from netwright.design.options import Options
from netwright.design.run import RunFolder
from netwright.design.train import TrainOptions, train
from netwright.design.train_page import KIND, page

METHOD = "cdvg:steps=6,translator_batch=4"


@pytest.fixture(scope="module", autouse=True)
def the_reader_reads_little():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("netwright.train.debias.quality.READER_STEPS", 10)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two classes that a bright half tells apart, and a colour even more so."""
    draws = np.random.default_rng(0)
    labels = np.arange(160) % 2
    images = draws.integers(0, 60, (160, 8, 8, 3))
    images[:, :4] += 60 * labels[:, None, None, None]
    images[..., 0] += (100 * labels)[:, None, None]
    path = tmp_path_factory.mktemp("data") / "tinted.npz"
    np.savez(path, x=images.astype(np.uint8), y=labels, classes=np.array(["<b>low</b>", "high"]))
    return str(path)


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(TrainOptions(data=data, methods=(METHOD,), epochs=3, lr=0.05, batch_size=16, out=str(folder)))
    return folder


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def test_the_folder(finished: Path):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert {"generator.safetensors", "views.html", "views.md", "views.json", "views.npz", "bias.json"} <= names
    assert "translator.ckpt" not in names
    assert list((finished / "work").iterdir()) == []
    assert not any("debias" in name for name in storage.read_tensors(finished / "model.safetensors"))
    epochs = storage.read_json(finished / "training.json")["epochs"]
    assert all(np.isfinite(epoch["contrast"]) for epoch in epochs)


def test_the_pages(finished: Path):
    figures = storage.read_json(finished / "bias.json")["translations"]
    assert figures["images"] == 13
    assert figures["classes"] == ["<b>low</b>", "high"]
    assert {"bias transfer", "signal kept", "signal flip", "figure kept", "change"} <= set(figures)
    views, report = ((finished / f"{name}.html").read_text() for name in ("views", "report"))
    assert views.count("data:image/png;base64") == 6
    assert report.count("data:image/png;base64") == 2
    assert "<b>low</b>" not in views
    told = (finished / "report.md").read_text()
    assert "Of 13 validation images that were translated into another class" in told
    assert "One that sees no colour takes" in told
    assert ("Do not trust the network yet" in told) == bool(figures["faults"])
    before = (finished / "report.html").read_bytes()
    page(finished).write(finished)
    assert (finished / "report.html").read_bytes() == before
    assert storage.read_json(finished / "report.json")["figures"]["bias"]["translations"] == figures
    strips = np.load(finished / "views.npz", allow_pickle=False)["strips"]
    assert strips.shape == (6, 3, 8, 8, 3)


def test_the_terminal_tells(data: str, finished: Path, tmp_path: Path):
    common = ("--epochs", "1", "--batch-size", "16", "--out", str(tmp_path / "run"))
    text = f"cdvg:generator={finished / 'generator.safetensors'}"
    found = invoke("train", data, "--method", text, *common)
    assert found.exit_code == 0, found.stderr
    assert "Of 13 validation images" in found.stdout
    assert f"translated samples: {tmp_path / 'run'}/views.html" in found.stdout.replace("\n", "")
    assert not (tmp_path / "run/generator.safetensors").exists()
    evaluated = json.loads(invoke("evaluate", str(tmp_path / "run"), "--json").stdout)
    assert 0 <= evaluated["accuracy"] <= 1


@pytest.mark.parametrize("where", ["translator", "classifier"])
def test_a_stopped_run_goes_on_bit_for_bit(where: str, data: str, finished: Path, tmp_path: Path, monkeypatch):
    options = TrainOptions(
        data=data, methods=(METHOD,), epochs=3, lr=0.05, batch_size=16, out=str(tmp_path / "run")
    )  # fmt: skip
    target = {
        "translator": "netwright.train.debias.BiasTranslator.on_train_end",
        "classifier": "netwright.train.schedules.CosineProgress.on_train_epoch_end",
    }[where]
    with monkeypatch.context() as patched:

        def stop(*args):
            raise KeyboardInterrupt

        patched.setattr(target, stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(options)
    assert (tmp_path / "run/generator.safetensors").exists() == (where == "classifier")
    train(options)
    for name in ("generator.safetensors", "model.safetensors", "bias.json"):
        a, b = ((folder / name).read_bytes() for folder in (finished, tmp_path / "run"))
        assert a == b, name


def test_data_that_tell_their_bias_have_accuracies_by_it(tmp_path: Path):
    whole = load("digits")
    bias = (whole.test.labels + 1) % 10
    bias[:100] = whole.test.labels[:100]

    class Known:
        name, classes, normalise = whole.name, whole.classes, whole.normalise
        test = BiasedDataset(whole.test.images, whole.test.labels, bias)

    run = RunFolder(tmp_path, KIND)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    debiasing.write(run, [], network, Known())  # type: ignore[arg-type]  # what it reads of a data set
    found = debiasing.read(run)["accuracies"]
    pred = network(whole.normalise()(whole.test.images)).argmax(1)
    right = (pred == whole.test.labels).double()
    assert found["aligned"] == pytest.approx(float(right[:100].mean()))
    assert found["conflicting"] == pytest.approx(float(right[100:].mean()))
    (line,) = debiasing.lines(run)
    assert line.startswith("accuracy by bias: unbiased ")
    (table,) = debiasing.blocks(run)
    assert len(table.rows) == 4


def test_nothing_to_say(tmp_path: Path):
    whole = load("digits")
    run = RunFolder(tmp_path, KIND)
    debiasing.write(run, [object()], nn.Identity(), whole)
    assert list(tmp_path.iterdir()) == []
    assert debiasing.read(run) is None
    assert debiasing.lines(run) == debiasing.blocks(run) == []


def test_a_damaged_file_is_one_error(finished: Path, tmp_path: Path):
    run = RunFolder(tmp_path, KIND)
    run.write("bias.json", storage.read_json(finished / "bias.json"))
    (tmp_path / "views.npz").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="damaged file"):
        debiasing.blocks(run)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("cdvg:steps=0", "steps must be a whole number >= 1"),
        ("cdvg:generator=nowhere.safetensors", "no such file"),
        ("cdvg:stesp=3", "did you mean steps"),
        ("cdvg:views=all", "views must be"),
    ],
)
def test_bad_input_writes_nothing(method: str, message: str, data: str, tmp_path: Path):
    found = invoke("train", data, "--method", method, "--out", str(tmp_path / "run"))
    assert found.exit_code == 2
    assert message in found.stderr
    assert len(found.stderr.strip().splitlines()) <= 3
    assert not (tmp_path / "run").exists()


def test_what_is_no_picture_is_refused(tmp_path: Path):
    draws = np.random.default_rng(0)
    np.savez(tmp_path / "f.npz", x=draws.random((60, 8, 8)).astype(np.float32), y=np.arange(60) % 2)
    np.savez(tmp_path / "s.npz", x=draws.integers(0, 256, (60, 1, 1, 40)).astype(np.uint8), y=np.arange(60) % 2)
    for name, message in (("f", "pictures of 8 bits"), ("s", "at least 4 pixels a side")):
        found = invoke("train", str(tmp_path / f"{name}.npz"), "--method", "cdvg", "--out", str(tmp_path / "run"))
        assert found.exit_code == 2
        assert message in found.stderr
        assert not (tmp_path / "run").exists()


def test_design_promises_no_budget_with_it():
    assert Options(data="digits", train_method=("cdvg",)).train_method == ("cdvg",)
    with pytest.raises(UserError, match="no time budget holds with it"):
        Options(data="digits", train_method=("elr", "cdvg"), time_budget=600.0)


def test_a_strip_is_large_enough_to_see():
    found = debiasing._strip(torch.zeros(3, 8, 8, 1, dtype=torch.uint8).numpy())
    assert found.shape == (32, 4 * (3 * 8 + 3 * 2), 1)
    assert debiasing._strip(np.zeros((2, 64, 64, 3), np.uint8)).shape[0] == 64
