"""``netwright compress`` on a run that was made in no time."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from netwright import cli, storage
from netwright.compress.chain import unpacked
from netwright.console import UserError
from netwright.data import Batches, load
from netwright.deploy import Session
from netwright.deploy import load as load_sparse
from netwright.design.compression import Wish, compress_model
from netwright.design.model import Architecture, load_run
from netwright.design.options import Options
from netwright.design.run import RunFolder
from netwright.design.students import student_for
from netwright.design.subject import Reading, open_subject
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
    assert set(told["files"]) >= {"packed.safetensors", "model.onnx", "sparse/model.json"}
    assert all((out / name).stat().st_size == size for name, size in told["files"].items())
    assert told["files"]["packed.safetensors"] == result.files["packed.safetensors"]
    assert not (out / "work").exists()


def test_the_same_command_tells_the_same_again(run, compressed, monkeypatch):
    out, result = compressed
    monkeypatch.setattr("netwright.design.compression.compress", None)
    again = compress_model(str(run), None, out, Wish(("prune", "quantize"), sparsity=0.5, bits=6, epochs=1))
    assert again == result


def test_the_report_verb_writes_the_page_again(compressed):
    out, _ = compressed
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    found = CliRunner().invoke(cli.app, ["report", str(out)])
    assert found.exit_code == 0, found.stderr
    assert "After prune and quantize" in found.stdout
    assert (out / "report.html").read_bytes() == before


def test_what_is_there_is_not_touched(run, compressed, tmp_path):
    out, _ = compressed
    with pytest.raises(UserError, match=r"holds another compression .*methods"):
        compress_model(str(run), None, out, Wish(("prune",)))
    with pytest.raises(UserError, match="no compression of netwright"):
        compress_model(str(run), None, run, Wish(("prune",)), force=True)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not empty and holds no compression"):
        compress_model(str(run), None, tmp_path, Wish(("prune",)))


WISH = Wish(("low-rank", "prune", "quantize"), sparsity=0.5, epochs=1)


@pytest.fixture
def bare(monkeypatch):
    """Nothing but the packed weights is written, and nothing is built for the sparse runtime: that takes seconds."""

    def refused(*given, **options):
        raise UserError("left out")

    for name in ("deploy.onnx.export", "deploy.compile", "compress.chain.measured.capture"):
        monkeypatch.setattr(f"netwright.{name}", refused)


@pytest.mark.usefixtures("bare")
def test_a_stopped_compression_goes_on_bit_for_bit(run, tmp_path, monkeypatch):
    compress_model(str(run), None, tmp_path / "whole", WISH)
    with monkeypatch.context() as patched:

        def killed(self, network, teacher, how):
            raise KeyboardInterrupt

        patched.setattr("netwright.compress.chain.steps.Quantize.apply", killed)
        with pytest.raises(KeyboardInterrupt):
            compress_model(str(run), None, tmp_path / "stopped", WISH)
    kept = sorted(path.name for path in (tmp_path / "stopped" / "work").glob("*.safetensors"))
    assert kept == ["1-low-rank.safetensors", "2-prune.safetensors"]
    assert not (tmp_path / "stopped" / "compression.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr("netwright.compress.chain.steps.Prune.apply", None)  # it is read back, not made again
        compress_model(str(run), None, tmp_path / "stopped", WISH)
    first, second = ((tmp_path / name / "packed.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert first == second


@pytest.mark.usefixtures("bare")
def test_force_begins_anew_and_leaves_what_is_not_its_own(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    compress_model(str(run), None, out, Wish(("quantize",), epochs=1), force=True)
    compress_model(str(run), None, out, Wish(("quantize",), bits=2, epochs=1), force=True)
    assert json.loads((out / "run.json").read_text())["options"]["bits"] == 2
    assert (out / "letter.txt").read_text() == "dear"


def test_a_step_that_cannot_be_done_leaves_nothing(run, tmp_path):
    with pytest.raises(UserError, match="params must be >="):
        compress_model(str(run), None, tmp_path / "out", Wish(("low-rank",), share=0.001, epochs=1))
    assert not list(tmp_path.iterdir())


def test_augmentation_is_another_compression(run, tmp_path, monkeypatch):
    seen = []

    def stop(network, steps, *, training, **options):
        seen.append(training.data.augment)
        raise KeyboardInterrupt

    monkeypatch.setattr("netwright.design.compression.compress", stop)
    for augment in (False, True):
        with pytest.raises(KeyboardInterrupt):
            compress_model(str(run), None, tmp_path / str(augment), Wish(("quantize",), augment=augment))
    assert [str(augment) for augment in seen] == ["None", str(load("digits").augmentation())]
    with pytest.raises(UserError, match="augment False there, True here"):
        compress_model(str(run), None, tmp_path / "False", Wish(("quantize",), augment=True))


@pytest.mark.usefixtures("bare")
def test_random_weights_of_a_function_are_the_same_every_time(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))\n"
    )
    for name in "ab":
        compress_model(f"{tmp_path}/mine.py:net", None, tmp_path / name, Wish(("quantize",)), size=8)
    first, second = ((tmp_path / name / "packed.safetensors").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.usefixtures("bare")
def test_a_function_in_a_file_without_data(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))\n"
    )
    model, out = f"{tmp_path}/mine.py:net", tmp_path / "out"
    result = compress_model(model, None, out, Wish(("quantize",)), size=8)
    assert result.report.ratio > 5
    assert result.missing == ("no model.onnx: left out", "no file of the sparse runtime: left out")
    assert list(result.files) == ["packed.safetensors"]
    assert result.report.steps[0].accuracy is None
    with pytest.raises(UserError, match="does not take inputs"):
        compress_model(model, None, tmp_path / "other", Wish(("quantize",)), size=9)
    with pytest.raises(UserError, match="distill needs data"):
        compress_model(model, None, tmp_path / "other", Wish(("distill",)), size=8)


@pytest.mark.usefixtures("bare")
def test_students_of_every_form(run, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef small():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "def big():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 999), nn.Linear(999, 10))\n"
        "def other():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9))\n"
    )
    opened = open_subject(str(run), None, None, 0, Reading())
    count = sum(p.numel() for p in opened.network.parameters())

    def made(name):
        found, student = student_for(opened, name, 0)
        return found, sum(p.numel() for p in student.parameters())

    assert made(f"{tmp_path}/mine.py:small") == (f"{tmp_path}/mine.py:small", 650)
    name, size = made("")
    assert name == "small_convnet/2"
    assert size <= count / 2 < made("small_convnet")[1]
    assert made(str(run))[1] == count
    capsys.readouterr()
    made(f"{tmp_path}/mine.py:big")
    assert "is not smaller than the network: 74,935 parameters against" in capsys.readouterr().err
    with pytest.raises(UserError, match="the student has 9 outputs, the network 10"):
        made(f"{tmp_path}/mine.py:other")
    tiny = dataclasses.replace(opened, network=torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="no default student needs half"):
        student_for(tiny, "", 0)
    result = compress_model(str(run), None, tmp_path / "out", Wish(("distill", "quantize"), epochs=1))
    assert result.student == "small_convnet/2"
    assert result.report.steps[1].parameters == size
    assert "the student, small_convnet/2" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("method", ["maestro", "differentiable-quantization", "alternating-quantization"])
def test_methods_of_the_papers_by_name(run, tmp_path, method):
    result = compress_model(str(run), None, tmp_path / "out", Wish((method,), epochs=1))
    assert [step.step for step in result.report.steps] == ["as given", method]
    assert result.report.ratio > 1.3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"methods": ()}, "no method is given"),
        ({"methods": ("prun",)}, "did you mean prune"),
        ({"methods": ("quantize", "prune")}, "must come in the order"),
        ({"methods": ("prune", "prune")}, "each once"),
        ({"methods": ("prune",), "sparsity": 1.0}, "must lie in"),
        ({"methods": ("low-rank",), "share": 2.0}, r"--params must lie in \(0, 1\), got 2"),
        ({"methods": ("maestro",), "share": 0.0}, r"--params must lie in \(0, 1\), got 0"),
        ({"methods": ("low-rank", "maestro")}, "low-rank or maestro, prune, quantize or"),
        ({"methods": ("quantise",)}, "did you mean quantize"),
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
