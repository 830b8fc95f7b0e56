"""``netwright train`` end to end on tiny data: its folder, resumption, what the other verbs make of it, bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from netwright import cli, storage
from netwright.console import UserError
from netwright.data import load
from netwright.design.model import load_run
from netwright.design.train import TrainOptions, train
from netwright.design.train_page import curves, page

ALL = ("weight-compander", "ps-kd:alpha_T=0.5", "tract", "gradient-noise:eta=0.0001")


@pytest.fixture(scope="module")
def data(halves: str) -> str:
    return halves


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "all"
    train(TrainOptions(data=data, methods=ALL, epochs=4, lr=0.05, out=str(folder)), command="netwright train it")
    return folder


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def test_the_folder(finished: Path):
    assert {p.name for p in finished.iterdir() if not p.name.startswith(".")} == {
        "architecture.json", "data.json", "model.safetensors", "report.html", "report.json", "report.md", "result.json",
        "run.json", "training.json", "work",
    }  # fmt: skip
    assert list((finished / "work").iterdir()) == []
    result = storage.read_json(finished / "result.json")
    assert result["accuracy"] > 0.9
    assert sum(map(sum, result["confusion"])) == result["examples"] == 48
    epochs = storage.read_json(finished / "training.json")["epochs"]
    assert len(epochs) == 4
    assert epochs[-1]["grad_noise/sigma"] < epochs[0]["grad_noise/sigma"]


def test_weights_are_plain(finished: Path):
    names = set(storage.read_tensors(finished / "model.safetensors"))
    assert names == set(load_run(finished).network.state_dict())
    assert not any("parametrizations" in name for name in names)


def test_the_page(finished: Path):
    text = (finished / "report.md").read_text()
    assert "trained with weight-compander, ps-kd, tract, gradient-noise, is right on" in text
    assert "gradient-noise (eta = 0.0001): Adds annealed Gaussian noise" in text
    assert "netwright train it" in text
    before = (finished / "report.html").read_bytes()
    assert "<svg" in before.decode()
    page(finished).write(finished)
    assert (finished / "report.html").read_bytes() == before


def test_the_other_verbs_take_it(finished: Path, data: str, tmp_path: Path):
    accuracy = storage.read_json(finished / "result.json")["accuracy"]
    evaluated = json.loads(invoke("evaluate", str(finished), "--json").stdout)
    assert evaluated["accuracy"] == pytest.approx(accuracy)
    reported = invoke("report", str(finished))
    assert "small_convnet, trained with" in reported.stdout
    exported = invoke("export", str(finished), "--format", "safetensors", "--out", str(tmp_path / "a.safetensors"))
    assert exported.exit_code == 0, exported.stderr


def test_the_same_command_tells_the_same_again(finished: Path, data: str):
    before = (finished / "result.json").read_bytes()
    again = train(TrainOptions(data=data, methods=ALL, epochs=4, lr=0.05, out=str(finished)))
    assert again.folder == str(finished)
    assert (finished / "result.json").read_bytes() == before
    with pytest.raises(UserError, match="the folder holds another training"):
        train(TrainOptions(data=data, epochs=4, lr=0.05, out=str(finished)))


def test_a_stopped_run_goes_on_bit_for_bit(finished: Path, data: str, tmp_path: Path, monkeypatch):
    options = TrainOptions(data=data, methods=ALL, epochs=4, lr=0.05, out=str(tmp_path / "run"))
    ends = lightning.Callback.on_train_epoch_end
    with monkeypatch.context() as patched:

        def stop(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt
            return ends(self, trainer, pl_module)

        patched.setattr("netwright.train.schedules.CosineProgress.on_train_epoch_end", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(options)
    assert (tmp_path / "run" / "work" / "train.ckpt").is_file()
    train(options)
    a, b = (storage.read_tensors(folder / "model.safetensors") for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_is_trained_further(finished: Path, data: str, tmp_path: Path, capsys):
    out = tmp_path / "further"
    result = train(TrainOptions(data=data, model=str(finished), epochs=1, lr=1e-6, out=str(out), augment=False))
    assert result.accuracy == pytest.approx(storage.read_json(finished / "result.json")["accuracy"], abs=0.05)
    tensors = storage.read_tensors(finished / "model.safetensors")
    tensors["head.0.weight"][:32] = 0
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    storage.write_tensors(sparse / "model.safetensors", tensors)
    storage.write_json(sparse / "architecture.json", storage.read_json(finished / "architecture.json"))
    capsys.readouterr()
    train(TrainOptions(data=data, model=str(sparse), epochs=1, out=str(tmp_path / "filled")))
    assert "of the run's weights are zero; training fills them" in capsys.readouterr().err
    with pytest.raises(UserError, match="knows 2 classes"):
        train(TrainOptions(data="digits", model=str(finished), out=str(tmp_path / "other")))


NETWORK = """
import torch
from torch import nn

def good():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def blind():
    return nn.Linear(5, 2)
"""


def test_a_function_in_a_file(data: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETWORK)
    found = invoke("train", data, "--model", "nets.py:good", "--epochs", "2", "--out", "run", "--json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["methods"] == []
    assert Path("run/model.safetensors").is_file()
    assert not Path("run/architecture.json").exists()
    for name, message in (
        ("wide", "must give logits of 2 classes, got 2 x 3"),
        ("blind", "cannot take inputs of 1 x 8"),
    ):
        found = invoke("train", data, "--model", f"nets.py:{name}", "--out", name)
        assert found.exit_code == 2
        assert message in found.stderr
        assert not Path(name).exists()


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--method", "weight-compander:function=sine"], "function must be one of"),
        (["--method", "weight-compander:exclude=features"], "exclude must name layers of the network, got 'features'"),
        (["--method", "tract:layer=nosuch"], "layer must name layers of the network, got 'nosuch'"),
        (["--method", "ps-kd:topk=2"], "topk must lie in 1..1 for 2 classes, got 2"),
        (["--method", "ps-kd:num_examples=3"], "num_examples must be >= "),
        (["--lr", "1e38"], "the loss became"),
    ],
)
def test_what_fails_at_once_can_be_corrected_in_the_same_folder(arguments, cause, data: str, tmp_path: Path):
    Path(tmp_path / "nets.py").write_text(NETWORK)
    command = ["train", data, "--model", f"{tmp_path}/nets.py:good", "--epochs", "1", "--out", str(tmp_path / "run")]
    found = invoke(*command, *arguments)
    assert found.exit_code == 2
    assert cause in found.stderr
    assert not (tmp_path / "run").exists()
    assert invoke(*command).exit_code == 0


def test_double_precision(data: str, tmp_path: Path):
    """All methods that the network suits, to figures of the network that is kept, in single precision."""
    out = tmp_path / "run"
    options = TrainOptions(data=data, methods=ALL, epochs=2, lr=0.05, precision="64-true", out=str(out))
    result = train(options)
    assert {value.dtype for value in storage.read_tensors(out / "model.safetensors").values()} <= {
        torch.float32,
        torch.int64,
    }
    evaluated = json.loads(invoke("evaluate", str(out), "--json").stdout)
    assert evaluated["accuracy"] == pytest.approx(result.accuracy)


def test_methods_with_arguments_of_the_command_line(data: str, tmp_path: Path):
    for number, text in enumerate(("ps-kd:dtype=float16,topk=1", "weight-compander:effective_decay=1e-3")):
        out = str(tmp_path / str(number))
        found = invoke("train", data, "--epochs", "2", "--method", text, "--out", out)
        assert found.exit_code == 0, found.stderr


def test_the_first_line_names_the_folder(data: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = invoke("train", data, "--epochs", "1", "--method", "tract")
    assert found.exit_code == 0, found.stderr
    assert found.stderr.startswith("run folder: runs/halves-training-")
    assert found.stdout.startswith("small_convnet, trained with tract, is right on")


@pytest.mark.parametrize("verb", ["train", "design"])
def test_no_folder_is_named_for_data_that_are_not_there(verb, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = invoke(verb, "digit")
    assert found.exit_code == 2
    assert found.stderr.startswith('error: there is no data set or folder "digit"')
    assert "digits" in found.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"batch_size": 1}, "batch-size must be >= 2"),
        ({"lr": float("nan")}, "lr must be > 0 and finite, got nan"),
        ({"weight_decay": -1.0}, "weight-decay must be >= 0"),
        ({"precision": "bf16-mxed"}, "did you mean bf16-mixed"),
        ({"methods": ("ps-dk",)}, "did you mean ps-kd"),
        ({"model": "net.onnx"}, "an ONNX file cannot be trained"),
        ({"devices": 3}, "multiple of all processes"),
        ({"label_noise": "symetric:0.4"}, "did you mean symmetric"),
        ({"label_noise": "symmetric:1.5"}, r"a rate in \[0, 1\], got 'symmetric:1.5'"),
        ({"label_noise": "instance"}, "a rate in"),
        ({"methods": ("elr+:mixup",)}, "no value in 'mixup'"),
    ],
)
def test_bad_input(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        TrainOptions(data="digits", **settings)


def test_unfinished_and_empty(tmp_path: Path):
    with pytest.raises(UserError, match="no training of netwright"):
        page(tmp_path)
    assert curves([]) is None


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes that a bright half tells apart, three of each in the other's folder."""
    from PIL import Image

    draws, root = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    for part, count in (("train", 60), ("test", 20)):
        for i in range(count):
            label = i % 2
            image = draws.integers(0, 120, (8, 8))
            image[:4] += 120 * label
            swapped = part == "train" and i < 6
            folder = root / part / ("dark", "bright")[1 - label if swapped else label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(folder / f"{'wrong' if swapped else 'right'}, {i}.png")
    return root


def test_labels_that_are_doubted_are_listed_with_their_files(pictures: Path, tmp_path: Path):
    common = ("--epochs", "12", "--batch-size", "16", "--lr", "0.05", "--no-augment")
    found = invoke("train", str(pictures), "--method", "elr:lam=4", *common, "--out", str(tmp_path / "run"))
    assert found.exit_code == 0, found.stderr
    with (tmp_path / "run/doubts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [Path(row["file"]).name for row in rows]
    assert sum(name.startswith("wrong") for name in names[:6]) >= 4
    assert all(Path(row["file"]).is_file() for row in rows)
    for row in rows:
        assert {row["label"], row["suggested"]} == {"dark", "bright"}
        assert Path(row["file"]).parent.name == row["label"]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert f"{len(rows)} of 54 training labels are doubted" in found.stdout
    assert rows[0]["file"] in found.stdout
    text = (tmp_path / "run/report.html").read_text()
    assert "Labels to check" in text
    assert names[0] in text
    assert text.count("data:image/png;base64") == min(24, len(rows))
    before = (tmp_path / "run/report.html").read_bytes()
    page(tmp_path / "run").write(tmp_path / "run")
    assert (tmp_path / "run/report.html").read_bytes() == before
    assert storage.read_json(tmp_path / "run/result.json")["doubted"] == len(rows)
    assert storage.read_json(tmp_path / "run/report.json")["figures"]["doubts"]["doubtful"] == len(rows)
    assert rows[0]["file"] in invoke("report", str(tmp_path / "run")).stdout


def test_labels_of_an_array_that_are_doubted_are_listed_with_their_rows(tmp_path: Path):
    draws = np.random.default_rng(0)
    y = np.arange(120) % 2
    x = draws.integers(0, 120, (120, 8, 8))
    x[:, :4] += 120 * y[:, None, None]
    wrong = np.array([3, 7, 18, 30, 45, 61, 76, 88, 101, 110])
    y[wrong] = 1 - y[wrong]
    np.savez(tmp_path / "mine.npz", x=x.astype(np.uint8), y=y)  # test and validation part are split off
    common = ("--epochs", "12", "--batch-size", "16", "--lr", "0.05", "--no-augment")
    found = invoke("train", str(tmp_path / "mine.npz"), "--method", "elr:lam=4", *common, "--out", str(tmp_path / "a"))
    assert found.exit_code == 0, found.stderr
    with (tmp_path / "a/doubts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    data = load(tmp_path / "mine.npz")
    trained_on = set(data.train.rows.tolist()) & set(wrong.tolist())
    assert len(trained_on) >= 3
    assert len({int(row["row"]) for row in rows[: len(trained_on)]} & trained_on) >= len(trained_on) - 1
    for row in rows:
        assert row["array"] == "y"
        assert not row["file"]
        assert torch.equal(data.train.images[int(row["index"]), 0], torch.from_numpy(x[int(row["row"])]).byte())
        assert row["label"] == str(y[int(row["row"])])
    assert f"y[{rows[0]['row']}]: labelled" in found.stdout
    assert f"y[{rows[0]['row']}]" in (tmp_path / "a/report.html").read_text()


def test_labels_made_wrong_on_purpose_are_counted(data: str, tmp_path: Path):
    options = TrainOptions(
        data=data, methods=("elr:lam=4",), epochs=8, lr=0.05, batch_size=16, augment=False, label_noise="symmetric:0.2",
        out=str(tmp_path / "run"),
    )  # fmt: skip
    result = train(options)
    figures = storage.read_json(tmp_path / "run/doubts.json")
    assert figures["made_wrong"] == 35  # a fifth of 172, rounded up
    assert figures["made_wrong_found"] > 25
    assert result.doubted == figures["doubtful"] < 50
    assert (
        f"among them {figures['made_wrong_found']} of the 35 that were made wrong"
        in (tmp_path / "run/report.md").read_text()
    )
    header, first, *_ = (tmp_path / "run/doubts.csv").read_text().splitlines()
    assert header == "rank,file,array,row,index,label,suggested,score,support,made_wrong"
    assert first.startswith("1,,y,")
    assert result.accuracy > 0.9  # on right labels
    assert "label_noise" not in TrainOptions(data=data).identity()


def test_elr_plus_leaves_a_pair(data: str, tmp_path: Path):
    out, methods = tmp_path / "run", ("tract", "weight-compander", "elr+:ema_ramp=0")
    result = train(TrainOptions(data=data, methods=methods, epochs=4, lr=0.05, out=str(out)))
    loaded = load_run(out)
    assert loaded.architecture.members == 2
    assert result.parameters == sum(p.numel() for p in loaded.network.parameters())
    assert not any("parametrizations" in name for name in storage.read_tensors(out / "model.safetensors"))
    first, second = loaded.network.networks
    x = torch.rand(3, 1, 8, 8)
    assert not torch.allclose(first(x), second(x), atol=1e-3)
    assert torch.allclose(loaded.network(x), (first(x) + second(x)) / 2, atol=1e-6)
    evaluated = json.loads(invoke("evaluate", str(out), "--json").stdout)
    assert evaluated["accuracy"] == pytest.approx(result.accuracy)
    exported = invoke("export", str(out), "--format", "onnx", "--out", str(tmp_path / "pair.onnx"))
    assert exported.exit_code == 0, exported.stderr
    with pytest.raises(UserError, match="is a pair already"):
        train(TrainOptions(data=data, model=str(out), methods=("elr+",), epochs=2, out=str(tmp_path / "more")))
