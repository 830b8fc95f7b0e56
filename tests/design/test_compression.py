"""``netwright compress`` on a run that was made in no time."""

import json

import numpy as np
import pytest
import torch

from netwright import storage
from netwright.compress.chain import unpacked
from netwright.console import UserError
from netwright.data import Batches, load
from netwright.deploy import Session
from netwright.deploy import load as load_sparse
from netwright.design.compression import Wish, compress_model
from netwright.design.model import Architecture, load_run
from netwright.design.options import Options
from netwright.design.run import RunFolder
from netwright.metrics import accuracy
from netwright.seeding import seeded
from netwright.train import Classifier, evaluate, fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a small network trained on the digits."""
    folder = RunFolder(tmp_path_factory.mktemp("compress") / "run")
    data = load("digits")
    architecture = Architecture("named", (1, 8, 8), data.classes, data.mean, data.std, name="small_convnet")
    with seeded(0, "init"):
        network = architecture.build()
    fit(Classifier(network, lr=0.1), Batches(data.train, 64, normalise=data.normalise()), epochs=4)
    folder.write("architecture.json", architecture.to_dict())
    folder.describe(Options(data="digits"), "netwright design digits")
    storage.write_tensors(folder / "model.safetensors", network.state_dict())
    return folder.path


@pytest.fixture(scope="module")
def compressed(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("compressed") / "small"
    wish = Wish(("prune", "quantize"), sparsity=0.5, bits=6, epochs=1)
    return out, compress_model(str(run), None, out, wish)


def test_the_folder_holds_the_network_in_every_form(run, compressed):
    out, result = compressed
    first, *_, last = result.report.steps
    assert last.accuracy > first.accuracy - 0.1
    assert not result.missing
    assert last.runtime_ms > 0
    assert (out / "packed.safetensors").stat().st_size == pytest.approx(last.bytes, abs=300)
    data = load("digits")
    images = data.test.images[:50]
    session = Session(out / "model.onnx")
    logits = session.logits(images.permute(0, 2, 3, 1).numpy())
    small = unpacked((out / "packed.safetensors").read_bytes(), load_run(run).network)
    x = data.normalise()(images)
    with torch.inference_mode():
        assert small(x).numpy() == pytest.approx(logits, abs=1e-3)
    sparse = load_sparse(out / "sparse")
    assert torch.as_tensor(sparse(x[:1])).numpy() == pytest.approx(logits[:1], abs=1e-3)
    whole = Batches(data.test, 500, shuffle=False, drop_last=False, normalise=data.normalise())
    assert accuracy(*evaluate(small, whole)) == last.accuracy


def test_the_report_is_data(compressed):
    out, result = compressed
    told = json.loads((out / "compression.json").read_text())
    assert [s["step"] for s in told["report"]["steps"]] == ["as given", "prune", "quantize"]
    assert told["wish"]["bits"] == 6
    assert "packed.safetensors" in str(result)


def test_what_is_there_is_not_touched(run, compressed):
    out, _ = compressed
    with pytest.raises(UserError, match="there already"):
        compress_model(str(run), None, out, Wish(("prune",)))


def test_a_function_in_a_file_without_data(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))\n"
    )
    model, out = f"{tmp_path}/mine.py:net", tmp_path / "out"
    result = compress_model(model, None, out, Wish(("quantize",)), size=8)
    assert result.report.ratio > 5
    assert result.report.steps[0].accuracy is None
    with pytest.raises(UserError, match="does not take inputs"):
        compress_model(model, None, tmp_path / "other", Wish(("quantize",)), size=9)
    with pytest.raises(UserError, match="distill needs data"):
        compress_model(model, None, tmp_path / "other", Wish(("distill",)), size=8)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"methods": ()}, "no method is given"),
        ({"methods": ("prun",)}, "did you mean prune"),
        ({"methods": ("quantize", "prune")}, "must come in the order"),
        ({"methods": ("prune", "prune")}, "each once"),
        ({"methods": ("prune",), "sparsity": 1.0}, "must lie in"),
        ({"methods": ("low-rank",), "share": 2.0}, "share must lie in"),
        ({"methods": ("quantize",), "bits": 40}, "bits must lie in"),
        ({"methods": ("quantize",), "bucket_size": -1}, "bucket_size"),
        ({"methods": ("quantize",), "epochs": 0}, "epochs must be >= 1"),
        ({"methods": ("quantize",), "lr": float("nan")}, "lr must be > 0"),
        ({"methods": ("quantize",), "seed": -1}, "seed must be >= 0"),
    ],
)
def test_bad_wishes(options, told):
    with pytest.raises(UserError, match=told):
        Wish(**options)


def test_data_that_do_not_fit(run, tmp_path):
    np.savez(
        tmp_path / "other.npz", x=np.random.default_rng(0).integers(0, 256, (60, 9, 9), np.uint8), y=np.arange(60) % 3
    )
    with pytest.raises(UserError, match="the network knows 10 of"):
        compress_model(str(run), str(tmp_path / "other.npz"), tmp_path / "out", Wish(("quantize",)))
