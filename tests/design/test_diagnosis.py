"""``netwright diagnose`` on a small network: its figures against the library's, and a label that is wrong."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from netwright import storage
from netwright.console import UserError
from netwright.data import Batches, load
from netwright.design.compression import Wish, compress_model
from netwright.design.diagnosis import DIAGNOSES, diagnose_model
from netwright.design.diagnosis.coherence import diagnose
from netwright.design.diagnosis.findings import Sample, cross_entropy
from netwright.design.model import Architecture, load_run
from netwright.design.options import Options
from netwright.design.run import RunFolder
from netwright.diagnose import m_coherence, per_example_alignment
from netwright.seeding import seeded, stream
from netwright.train import Classifier, fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a small network trained on the digits."""
    folder = RunFolder(tmp_path_factory.mktemp("diagnose") / "run")
    data = load("digits")
    architecture = Architecture("named", (1, 8, 8), data.classes, data.mean, data.std, name="small_convnet")
    with seeded(0, "init"):
        network = architecture.build()
    fit(Classifier(network, lr=0.1), Batches(data.train, 64, normalise=data.normalise()), epochs=2)
    folder.write("architecture.json", architecture.to_dict())
    folder.describe(Options(data="digits"), "netwright design digits")
    storage.write_tensors(folder / "model.safetensors", network.state_dict())
    return folder.path


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("diagnosed") / "page"
    return out, diagnose_model(str(run), None, out, examples=200)


def test_the_figures_are_those_of_the_library(run, found):
    _, result = found
    figures = result.findings["coherence"]
    data = load("digits")
    from netwright.data import subset

    train = data.train.subset(subset(data.train.labels, 200, 0))
    whole = data.normalise()(train.images), train.labels
    network = load_run(run).network
    expected = m_coherence(network, cross_entropy, whole)
    assert figures["m_coherence"] == pytest.approx(expected.m_coherence, rel=1e-4)
    assert figures["m"] == result.examples == 200
    rest = per_example_alignment(network, cross_entropy, whole, "coherence", leave_one_out=True)
    assert figures["against"] == int((rest < 0).sum())
    for row in figures["classes"]:
        own = train.labels == data.classes.index(row["class"])
        alone = m_coherence(network, cross_entropy, (whole[0][own], whole[1][own]))
        assert row["pairwise"] == pytest.approx(alone.pairwise, rel=1e-3)
        assert row["with the rest"] == pytest.approx(float(rest[own].mean()), rel=1e-3)
        assert row["examples"] == int(own.sum())


def test_the_page_tells_what_the_figures_tell(found):
    out, result = found
    assert sorted(path.name for path in out.iterdir()) == ["diagnosis.html", "diagnosis.json", "diagnosis.md"]
    written = json.loads((out / "diagnosis.json").read_text())
    assert written["figures"]["findings"] == result.to_dict()["findings"]
    assert written["verdict"] == " ".join(result.verdicts)
    assert "helps" in result.verdicts[0]
    assert "largest stable step" in result.verdicts[1]
    assert list(result.left_out) == ["memorising-neurons"]
    page = (out / "diagnosis.html").read_text()
    assert page.count("<svg") == 2
    assert 'src="http' not in page
    assert str(result).endswith(f"page: {out}/diagnosis.html")
    figures = [block for s in written["sections"] for block in s["blocks"] if block["kind"] == "figure"]
    assert [figure["reading"].count(". ") for figure in figures] == [1, 1]  # two sentences each


def test_a_run_has_its_coherence_over_training_on_record(run, found, tmp_path):
    out, result = found
    assert result.findings["coherence"]["over_training"] is None
    assert "not on record" in (out / "diagnosis.md").read_text()
    recorded = tmp_path / "run"
    shutil.copytree(run, recorded)
    epochs = [{"m_coherence": value, "coherence_examples": 50.0} for value in (12.0, None, 3.5)]
    storage.write_json(recorded / "training.json", {"model": {"pretrain": epochs}, "baseline": {}})
    again = diagnose_model(str(recorded), None, tmp_path / "page", parts=["coherence"], examples=100)
    assert again.findings["coherence"]["over_training"] == [[1, 12.0], [3, 3.5]]
    assert (tmp_path / "page" / "diagnosis.html").read_text().count("<svg") == 2
    written = json.loads((tmp_path / "page" / "diagnosis.json").read_text())
    figures = [block for s in written["sections"] for block in s["blocks"] if block["kind"] == "figure"]
    assert figures[1]["title"] == "While it learned"
    assert figures[1]["reading"].count(". ") == 1  # two sentences
    assert "not on record" not in (tmp_path / "page" / "diagnosis.md").read_text()


def test_the_same_again_to_the_byte(run, found, tmp_path):
    out, _ = found
    diagnose_model(str(run), "digits", tmp_path / "again", examples=200)
    assert (tmp_path / "again" / "diagnosis.html").read_bytes() == (out / "diagnosis.html").read_bytes()


def test_wrong_labels_pull_against_the_rest(run):
    data = load("digits")
    labels = data.train.labels[:300].clone()
    wrong = torch.arange(0, 300, 60)
    labels[wrong] = (labels[wrong] + 5) % 10
    sample = Sample(
        load_run(run).network, data.train.images[:300], labels, data.classes, data.normalise(), picture=True
    )
    finding = diagnose(sample)
    whole = data.normalise()(sample.images), labels
    rest = per_example_alignment(sample.network, cross_entropy, whole, "coherence", leave_one_out=True)
    shown = set(rest.argsort()[:12].tolist())
    assert len(shown & set(wrong.tolist())) >= 3  # 5 of 300 are wrong: a fifth of one by chance
    (pictures,) = [block for block in finding.blocks if block.kind == "images"]
    assert len(pictures.items) <= 12
    assert finding.figures["against"] == int((rest < 0).sum()) > 0


def test_a_class_of_one_example_and_a_network_that_has_learned_all(run):
    data = load("digits")
    labels = data.train.labels
    chosen = torch.cat([(labels == 0).nonzero().flatten()[:4], (labels == 1).nonzero().flatten()[:1]])
    network = load_run(run).network
    finding = diagnose(Sample(network, data.train.images[chosen], labels[chosen], data.classes, data.normalise(), True))
    assert [row["pairwise"] is None for row in finding.figures["classes"]] == [False, True]

    class Sure(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self, x):
            return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 10) * 1e4 + 0 * self.scale

    sure = diagnose(
        Sample(Sure(), data.train.images[chosen[:4]], labels[chosen[:4]], data.classes, data.normalise(), True)
    )
    assert "is zero" in sure.verdict
    assert all(block.kind != "images" for block in sure.blocks)


def test_a_function_in_a_file_and_data_of_floats(tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch\ndef make():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2))\n"
    )
    x = torch.randn(60, 4, 9, 1, generator=stream(0, "x")).numpy()
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(60) % 2)
    result = diagnose_model(f"{tmp_path}/nets.py:make", str(tmp_path / "x.npz"), tmp_path / "out", parts=["coherence"])
    assert result.examples < 60  # the training part
    assert list(result.findings) == ["coherence"]
    assert "coherence" in DIAGNOSES
    with pytest.raises(UserError, match="DATA is missing"):
        diagnose_model(f"{tmp_path}/nets.py:make", None, tmp_path / "none")


def test_of_a_network_that_gives_more_the_logits_are_diagnosed(tmp_path):
    """A prototype classifier, whose answer holds reconstructions too, like the network of its logits alone."""
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\nfrom netwright.explain.prototypes import PrototypeClassifier\n"
        "def cases():\n    torch.manual_seed(0)\n"
        "    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Sigmoid())\n"
        "    decoder = nn.Sequential(nn.Linear(8, 64), nn.Unflatten(1, (1, 8, 8)))\n"
        "    return PrototypeClassifier(encoder, decoder, 12, 10, input_shape=(1, 8, 8))\n"
        "class Alone(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.cases = cases()\n"
        "        self.cases.decoder = None\n"
        "    def forward(self, x):\n        return self.cases.logits(x)\n"
        "class Named(nn.Module):\n    def forward(self, x):\n        return {'logits': x}\n"
    )
    parts = ["coherence", "opposing-signals"]
    found, alone = (
        diagnose_model(f"{tmp_path}/nets.py:{name}", "digits", tmp_path / name, parts=parts, examples=40)
        for name in ("cases", "Alone")
    )
    for part, figure in (("coherence", "m_coherence"), ("opposing-signals", "sharpness")):
        assert found.findings[part][figure] == pytest.approx(alone.findings[part][figure], rel=1e-3)
    with pytest.raises(UserError, match=r"model must give logits, or .* its attribute logits, got a dict"):
        diagnose_model(f"{tmp_path}/nets.py:Named", "digits", tmp_path / "named")
    with pytest.raises(UserError, match="gives more than logits"):
        compress_model(f"{tmp_path}/nets.py:cases", "digits", tmp_path / "small", Wish(("prune",)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"parts": ["coherense"]}, "did you mean coherence"),
        ({"parts": ["memorising-neurons"]}, "memorising neurons are those of a network from two one-hot"),
        ({"parts": ["opposing-signals"], "examples": 9}, "need at least 10 examples, got 9"),
        ({"examples": 1}, "examples must be >= 2, got 1"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"size": 0}, "size must be >= 1, got 0"),
        ({"data": "mnist1d"}, "give the run's own data"),
        ({"model": "resnt18", "data": "digits"}, "did you mean resnet18"),
        ({"model": "nothing.onnx", "data": "digits"}, "can only be measured"),
    ],
)
def test_bad_input(run, tmp_path, options, told):
    arguments = {"model": str(run), "data": None, "out": tmp_path / "out"} | options
    with pytest.raises(UserError, match=told):
        diagnose_model(**arguments)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_touched(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="something is there already"):
        diagnose_model(str(run), None, tmp_path)


def test_a_broken_network_is_one_error(run, tmp_path):
    architecture = json.loads((run / "architecture.json").read_text())
    folder = RunFolder(tmp_path / "broken")
    folder.write("architecture.json", architecture)
    folder.describe(Options(data="digits"), "netwright design digits")
    tensors = storage.read_tensors(run / "model.safetensors")
    name = next(name for name, value in tensors.items() if value.is_floating_point())
    storage.write_tensors(folder / "model.safetensors", tensors | {name: tensors[name] * float("nan")})
    for parts in ([], ["opposing-signals"]):
        with pytest.raises(UserError, match="must be finite, got NaN"):
            diagnose_model(str(folder.path), None, tmp_path / "out", parts=parts)
    assert not (tmp_path / "out").exists()
