"""``netwright train --method simclr|moco|simsiam`` end to end on tiny data: folder, probe, resumption, bad input."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from netwright import cli, storage
from netwright.console import UserError
from netwright.data import load
from netwright.design.model import Architecture, load_run
from netwright.design.options import Options
from netwright.design.pretraining import prepare, told
from netwright.design.run import RunFolder
from netwright.design.train import TrainOptions, train
from netwright.design.train_page import _doubts, kept, page, verdict
from netwright.train import PRETRAINING
from netwright.train.methods import callbacks, host, pretraining


@pytest.fixture(scope="module")
def data(halves: str) -> str:
    return halves


def options(data: str, out: Path, **settings) -> TrainOptions:
    usual = {"methods": ("moco:dim=8,momentum=0.9",), "hallucinate": True, "epochs": 3, "lr": 0.05}
    return TrainOptions(data=data, out=str(out), **{**usual, **settings})


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "moco"
    train(options(data, folder), command="netwright train it")
    return folder


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def test_the_folder(finished: Path, data: str):
    assert {p.name for p in finished.iterdir() if not p.name.startswith(".")} == {
        "architecture.json", "data.json", "encoder.safetensors", "model.safetensors", "report.html", "report.json",
        "report.md", "result.json", "run.json", "training.json", "work",
    }  # fmt: skip
    assert list((finished / "work").iterdir()) == []
    encoder = storage.read_tensors(finished / "encoder.safetensors")
    whole = storage.read_tensors(finished / "model.safetensors")
    assert set(whole) - set(encoder) == {"head.2.weight", "head.2.bias"}
    assert all(torch.equal(value, whole[name]) for name, value in encoder.items())
    epochs = storage.read_json(finished / "training.json")["epochs"]
    assert len(epochs) == 3
    assert "val_accuracy" not in epochs[0]


def test_the_encoder_has_learned_and_the_probe_alone_saw_labels(finished: Path, data: str):
    result = storage.read_json(finished / "result.json")
    assert result["accuracy"] > 0.9
    assert 0 <= result["before"] <= 1
    assert 0 <= result["neighbours"] <= 1
    fresh = Architecture.read(finished / "architecture.json")
    with torch.random.fork_rng():
        changed = fresh.build().state_dict()
    encoder = storage.read_tensors(finished / "encoder.safetensors")
    assert all(not torch.equal(value, changed[name]) for name, value in encoder.items() if name.endswith("0.weight"))


def test_labels_change_the_probe_alone(finished: Path, data: str, tmp_path: Path):
    found = np.load(data)
    for name, labels in (("as", found["y"]), ("turned", 1 - found["y"])):
        np.savez(tmp_path / f"{name}.npz", x=found["x"], y=labels)
        train(options(str(tmp_path / f"{name}.npz"), tmp_path / name, epochs=1))
    first, second = (storage.read_tensors(tmp_path / name / "model.safetensors") for name in ("as", "turned"))
    assert torch.equal(first["features.0.weight"], second["features.0.weight"])
    assert not torch.equal(first["head.2.weight"], second["head.2.weight"])


def test_the_page(finished: Path):
    text = (finished / "report.md").read_text()
    assert "small_convnet, pre-trained without labels with moco, is right on" in text
    assert "by a linear probe" in text
    assert "accuracy of the linear probe before pre-training" in text
    assert "moco (dim = 8, momentum = 0.9): Queries are contrasted" in text
    assert "Hallucinator: adds a positive" in text
    assert "86 keys in the queue" in text
    assert "anywhere in the image, then colour jitter." in text
    assert "A loss that still falls" in text
    result = storage.read_json(finished / "result.json")
    assert ("was as good before pre-training" in text) == (result["accuracy"] <= result["before"])
    before = (finished / "report.html").read_bytes()
    page(finished).write(finished)
    assert (finished / "report.html").read_bytes() == before


def test_pre_training_in_vain_is_said(finished: Path):
    run = RunFolder(finished, "training")
    result = dataclasses.replace(kept(run), accuracy=0.8, before=0.9)
    assert "was as good before" in str(_doubts(result, run.read("data.json"), 0)[0])
    assert "was as good before" not in str(_doubts(dataclasses.replace(result, before=None), run.read("data.json"), 0))
    assert verdict(result).endswith("; 90.0 % before).")


def test_the_other_verbs_take_it(finished: Path, data: str, tmp_path: Path):
    accuracy = storage.read_json(finished / "result.json")["accuracy"]
    evaluated = json.loads(invoke("evaluate", str(finished), "--json").stdout)
    assert evaluated["accuracy"] == pytest.approx(accuracy)
    tuned = train(
        TrainOptions(data=data, model=str(finished), epochs=1, lr=1e-6, augment=False, out=str(tmp_path / "t"))
    )
    assert tuned.accuracy == pytest.approx(accuracy, abs=0.05)


def test_the_same_command_tells_the_same_again(finished: Path, data: str):
    before = (finished / "result.json").read_bytes()
    train(options(data, finished))
    assert (finished / "result.json").read_bytes() == before
    with pytest.raises(UserError, match="hallucinate True there, None here"):
        train(options(data, finished, hallucinate=False))


def test_a_stopped_run_goes_on_bit_for_bit(finished: Path, data: str, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patched:

        def stop(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

        patched.setattr("netwright.train.schedules.CosineProgress.on_train_epoch_end", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(options(data, tmp_path / "run"))
    assert (tmp_path / "run" / "work" / "train.ckpt").is_file()
    train(options(data, tmp_path / "run"))
    a, b = (storage.read_tensors(folder / "model.safetensors") for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_command(data: str, tmp_path: Path):
    words = (
        "--method",
        "simsiam:dim=16,pred_dim=4",
        "--crop",
        "center",
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "run"),
    )
    found = invoke("train", data, *words, "--json")
    assert found.exit_code == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["methods"] == ["simsiam:dim=16,pred_dim=4"]
    assert told["accuracy"] == pytest.approx(storage.read_json(tmp_path / "run" / "result.json")["accuracy"])
    assert "near the middle of the image" in " ".join(told["told"])
    assert load_run(tmp_path / "run").classes == ("0", "1")


def test_names():
    assert pretraining(["plain"]) is None
    for name in PRETRAINING:
        assert pretraining([name]) == name
        assert host(name, nn.Flatten(), features=9).features == 9
    with pytest.raises(UserError, match="simclr trains without labels"):
        callbacks(["simclr"])
    assert "hallucinate" not in TrainOptions(data="digits", methods=("simclr",)).identity()
    assert TrainOptions(data="digits", methods=("simclr",), hallucinate=True).identity()["hallucinate"] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("simclr", "tract")}, "simclr trains without labels, alone, got it together with tract"),
        ({"methods": ("moco", "moco")}, "got it together with itself"),
        ({"methods": ("simclear",)}, "did you mean simclr"),
        ({"methods": ("simclr",), "augment": False}, "simclr compares augmented views, and --no-augment leaves none"),
        ({"methods": ("simclr",), "crop": "centre"}, "did you mean center"),
        ({"hallucinate": True}, "--hallucinate has a meaning in pre-training without labels only"),
        ({"methods": ("tract",), "crop": "center"}, "--crop center has a meaning in pre-training"),
    ],
)
def test_bad_options(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        TrainOptions(data="digits", **settings)


def test_design_takes_none():
    with pytest.raises(UserError, match="moco trains without labels"):
        Options(data="digits", train_method=("moco",))


NETWORK = """
import torch
from torch import nn

def no_linear():
    return nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten())

def scaled():
    return Scaled()

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(30, 4), nn.ReLU(), nn.Linear(4, 2))

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.late = nn.Linear(64, 2), nn.Linear(64, 5)

    def forward(self, x):
        x = x.flatten(1)
        return self.first(x) + 0 * self.late(x)[:, :2]

"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "moco:queue_size=10"), "queue_size must be >= the keys of a batch, 64, got 10"),
        (("--method", "moco:queue_size=70,enqueue_once=false", "--hallucinate"), "keys of a batch, 128, got 70"),
        (("--method", "moco:bn_splits=40"), "bn_splits must leave >= 2 images in a group, got 40 for 64"),
        (("--method", "moco:momentum=2"), r"moco: momentum must lie in \[0, 1\], got 2"),
        (("--method", "moco:queue_size=1000000000000000"), "moco: "),
        (("--method", "simclr:temperature=0"), "simclr: temperature must be > 0"),
        (("--method", "simclr:dim=0", "--hallucinate"), "simclr: dim must be >= 1, got 0"),
        (("--method", "simclr:dim=wide", "--hallucinate"), "simclr: "),
        (("--method", "simclr:features=3"), "simclr has no argument 'features'"),
        (("--method", "simclr:hallucinator=3"), "no argument 'hallucinator'"),
        (("--method", "simsiam:pred_dm=3"), "did you mean pred_dim"),
        (("--method", "simclr", "--model", "nets.py:no_linear"), "must hold a linear layer"),
        (("--method", "simclr", "--model", "nets.py:scaled"), "must end in its last linear layer"),
        (("--method", "simclr", "--hallucinate=3"), "does not take a value"),
    ],
)
def test_nothing_is_written_for_bad_input(data: str, tmp_path: Path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETWORK)
    found = invoke("train", data, *words, "--out", "run")
    assert found.exit_code == 2, found.stdout
    assert "Traceback" not in found.stderr
    assert re.search(message, " ".join(found.stderr.split())), found.stderr
    assert not Path("run").exists()


def test_data_without_views(tmp_path: Path):
    draws, labels = np.random.default_rng(0), np.arange(60) % 2
    np.savez(tmp_path / "floats.npz", x=draws.normal(size=(60, 8, 8)).astype(np.float32), y=labels)
    np.savez(tmp_path / "flat.npz", x=draws.integers(0, 255, (60, 1, 30)).astype(np.uint8), y=labels)
    (tmp_path / "nets.py").write_text(NETWORK)
    for name, model, message in (
        ("floats", "small_convnet", "views are made of pictures"),
        ("flat", f"{tmp_path / 'nets.py'}:flat", "at least 4 x 4 pixels"),
    ):
        out, file = tmp_path / "run", str(tmp_path / f"{name}.npz")
        with pytest.raises(UserError, match=message):
            train(TrainOptions(data=file, model=model, methods=("simclr",), out=str(out)))
        assert not out.exists()


def _prepared(data: str, shape: tuple[int, int, int], method: str, **settings):
    found = dataclasses.replace(load(data))
    network = Architecture("named", shape, ("0", "1"), (0.0,), (1.0,), name="small_convnet").build()
    return prepare(options(data, Path("unused"), methods=(method,), batch_size=16, **settings), found, network, method)


def test_version_1_of_moco_has_its_views_and_its_schedule(data: str, tmp_path: Path):
    assert _prepared(data, (1, 8, 8), "moco:dim=8").version == 2
    made = _prepared(data, (1, 8, 8), "moco:mlp=false,temperature=0.07")
    assert made.version == 1
    assert [type(step).__name__ for step in made.views.first.steps] == ["RandomResizedCrop", "ColourJitter"]
    found = train(options(data, tmp_path / "run", methods=("moco:dim=8,mlp=false",), epochs=5))
    told = " ".join(found.told)
    assert "As version 1 of MoCo" in told


def test_crops_about_the_middle_wait_for_a_fifth_of_a_short_run(data: str):
    assert not hasattr(
        _prepared(data, (1, 8, 8), "moco:dim=8", crop="center", epochs=10).views.first.steps[0], "epochs"
    )
    draws = np.random.default_rng(0)
    file = Path(data).with_name("large.npz")
    np.savez(file, x=draws.integers(0, 255, (60, 68, 68)).astype(np.uint8), y=np.arange(60) % 2)
    made = _prepared(str(file), (1, 68, 68), "moco:dim=8", crop="center", epochs=10)
    assert made.views.first.steps[0].epochs == 2
    lines = told(options(str(file), Path("unused"), methods=("moco:dim=8",), crop="center", epochs=10), made)
    assert "near the middle of the image (anywhere in the first 2 epochs)" in " ".join(lines)


def test_the_queue_is_no_larger_than_half_of_the_images(data: str):
    given = options(data, Path("unused"), methods=("moco",), batch_size=16)
    found = load(data)
    made = prepare(
        given, found, Architecture("named", (1, 8, 8), ("0", "1"), (0.0,), (1.0,), name="small_convnet").build(), "moco"
    )
    assert made.host.queue.shape == (128, len(found.train) // 2)
