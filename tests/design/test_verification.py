"""``netwright verify``: verdicts, files, exit codes and bad input."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from netwright import cli
from netwright.data import load as load_data
from netwright.design.examples import UNFINISHED, radii, radius_blocks
from netwright.design.model import Architecture, load_run
from netwright.design.verification import verify_model
from netwright.page import Page, Section
from netwright.storage import write_tensors

NET = '''
import torch
from torch import nn

def brightness():
    """Class 1 where the mean of the pixels is above 0.5."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    net[1].weight.data.copy_(torch.stack([torch.zeros(16), torch.full((16,), 1 / 16)]))
    net[1].bias.data.copy_(torch.tensor([0.5, 0.0]))
    return net

def bent():
    """The same, the mean going through two ReLUs."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.ReLU(), nn.Linear(2, 2))
    net[1].weight.data.fill_(1 / 16), net[1].bias.data.zero_()
    net[3].weight.data.copy_(torch.tensor([[0.0, 0.0], [0.5, 0.5]]))
    net[3].bias.data.copy_(torch.tensor([0.5, 0.0]))
    return net

def cases():
    """A prototype classifier, whose answer holds distances and a reconstruction too."""
    from netwright.explain.prototypes import PrototypeClassifier
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    decoder = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))
    return PrototypeClassifier(encoder, decoder, 4, 2, input_shape=(1, 4, 4))

def large():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 2))

class Named(nn.Module):
    def forward(self, x):
        return {"logits": x.flatten(1)}

def smooth():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Sigmoid(), nn.Linear(4, 2))
'''

LAYERS = ["nets.py:brightness", "light.png", "--radius", "0.1", "--engine", "layers", "--layers"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NET)
    Image.fromarray(np.full((4, 4), 153, np.uint8)).save(tmp_path / "light.png")  # 0.6
    return tmp_path


def verify(*words: object):
    return CliRunner().invoke(cli.app, ["verify", *map(str, words)])


def test_safe(here: Path):
    found = verify("nets.py:brightness", "light.png", "--radius", "0.09")
    assert found.exit_code == 0, found.output
    assert found.stdout.startswith("safe: no change of all within 0.09 (16 numbers vary) takes it from class 1\n")
    assert sorted(p.name for p in here.iterdir() if p.name != "__pycache__") == ["light.png", "nets.py"]


def test_unsafe_is_a_pair_with_its_difference(here: Path):
    found = verify("nets.py:brightness", "light.png", "--radius", "0.2", "--json")
    assert found.exit_code == 1, found.output
    told = json.loads(found.stdout)
    assert (told["status"], told["predicted"], told["changed_to"], told["numbers"]) == ("unsafe", "1", "0", 16)
    folder = here / "counterexample-light"
    assert {Path(f).name for f in told["files"]} == {p.name for p in folder.iterdir()}
    pair = np.load(folder / "pair.npz")
    change = pair["counterexample"] - pair["image"]
    assert change.dtype == np.float64
    assert np.abs(change).max() <= 0.2 + 1e-9
    assert np.abs(change).max() == pytest.approx(told["distance"])
    assert pair["counterexample"].mean() <= 0.5
    for name in ("image", "counterexample"):
        pixels = np.asarray(Image.open(folder / f"{name}.png"))
        assert np.abs(pixels / 255 - pair[name][0]).max() <= 0.5 / 255 + 1e-9
    grey = np.asarray(Image.open(folder / "difference.png")) / 255
    assert np.abs(grey - (0.5 + change[0] / (2 * np.abs(change).max()))).max() < 0.01
    page = json.loads((folder / "report.json").read_text())
    assert page["figures"]["class of the counterexample"] == "0"
    assert "makes 1 a 0" in (folder / "report.html").read_text()


def test_fractions_patches_and_pixels(here: Path):
    # A patch of 4 of 16 pixels may move the mean by a quarter of the radius.
    safe, unsafe = "0.39", "0.45"
    for radius, code in ((safe, 0), (unsafe, 1)):
        words = ["--radius", radius, "--manipulation", "patch:1,1,2,2", "--out", f"patch-{radius}"]
        found = verify("nets.py:brightness", "light.png", *words)
        assert found.exit_code == code, found.output
    changed = np.load(here / f"patch-{unsafe}" / "pair.npz")
    moved = (changed["image"] != changed["counterexample"])[0]
    assert moved[1:3, 1:3].any()
    moved[1:3, 1:3] = False
    assert not moved.any()
    for number, code in ((3, 0), (8, 1)):
        words = ["--radius", "51/255", "--manipulation", f"pixels:{number}", "--out", f"pixels-{number}", "--json"]
        found = verify("nets.py:brightness", "light.png", *words)
        assert found.exit_code == code, found.output
        told = json.loads(found.stdout)
        assert (told["numbers"], told["radius"]) == (number, pytest.approx(0.2))


@pytest.mark.parametrize(("engine", "scope"), [("smt", "box"), ("bounds", "box"), ("grid", "box")])
def test_engines(here: Path, engine: str, scope: str):
    words = ["--engine", engine, "--manipulation", "pixels:4", "--radius", "0.05", "--json"]
    told = json.loads(verify("nets.py:brightness", "light.png", *words).stdout)
    assert (told["status"], told["scope"], told["engine"]) == ("safe", scope, engine)


def test_the_greedy_search_ends_with_unknown(here: Path):
    found = verify("nets.py:brightness", "light.png", "--engine", "layerwise", "--radius", "0.01")
    assert found.exit_code == 1
    assert "which is no proof" in found.stdout


def test_layer_by_layer(here: Path):
    """The grid of the input, then what it is mapped to; the text and the JSON have a line for each."""
    words = ["--engine", "layers", "--manipulation", "pixels:4", "--layers", "0:1"]
    found = verify("nets.py:bent", "light.png", *words, "--radius", "0.05")
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0].startswith(
        "safe: no change of pixels:4 within 0.05 (4 numbers vary) takes it from class 1; between"
    )
    assert lines[2] == "layer 0: 4 numbers vary, 0 points, 0 counterexamples that no input leads to"
    assert lines[3].startswith("layer 1: ")
    told = json.loads(verify("nets.py:bent", "light.png", *words, "--radius", "0.05", "--json").stdout)
    assert (told["layer"], told["numbers"], told["scope"]) == (0, 4, "grid")
    assert [line["layer"] for line in told["stats"]["layers"]] == [0, 1]
    words = ["--engine", "layers", "--manipulation", "pixels:8", "--radius", "0.3", "--json"]
    told = json.loads(verify("nets.py:bent", "light.png", *words).stdout)
    assert (told["status"], told["predicted"], told["changed_to"]) == ("unsafe", "1", "0")
    assert told["distance"] <= 0.3 + 1e-9


def test_from_a_hidden_layer(here: Path):
    words = ["--engine", "layers", "--layers", "1:1", "--dims", "2"]
    found = verify("nets.py:bent", "light.png", *words, "--radius", "0.01")
    assert found.exit_code == 0, found.output
    assert found.stdout.startswith("safe: no change of 2 numbers of layer 1 within 0.01 takes it from class 1; between")
    assert "that says nothing of other images" in found.stdout
    told = json.loads(verify("nets.py:bent", "light.png", *words, "--radius", "0.24", "--json").stdout)
    assert (told["status"], told["layer"], told["numbers"]) == ("unsafe", 1, 2)
    after = np.load(here / "counterexample-light" / "pair.npz")["counterexample"]
    assert after.mean() <= 0.5 + 1e-6
    assert abs(after.mean() - 0.6) <= 0.24 + 1e-6  # the activation is the mean, and within 0.24 of what it was


def test_what_the_exact_engine_does_not_know(here: Path):
    small = verify("nets.py:smooth", "light.png", "--radius", "0.01", "--engine", "smt")
    assert small.exit_code == 0, small.output  # the bounds see to it, and the solver is not asked
    found = verify("nets.py:smooth", "light.png", "--radius", "0.1")
    assert "only bounds decide" in found.stderr
    refused = verify("nets.py:smooth", "light.png", "--radius", "0.1", "--engine", "smt")
    assert refused.exit_code == 2
    assert "sigmoid" in refused.stderr


def test_a_network_that_gives_more_than_logits(here: Path):
    words = ["light.png", "--radius", "0.02", "--manipulation", "pixels:2", "--engine", "grid", "--json"]
    found = verify("nets.py:cases", *words)
    assert found.exit_code in (0, 1), found.output
    assert json.loads(found.stdout)["status"] in ("safe", "unsafe")


def test_without_z3(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("netwright.design.verification.has_z3", lambda: False)
    found = verify("nets.py:brightness", "light.png", "--radius", "0.09")
    assert found.exit_code == 0
    assert "Z3 is not installed" in found.stderr
    refused = verify("nets.py:brightness", "light.png", "--radius", "0.09", "--engine", "smt")
    assert refused.exit_code == 2
    assert 'pip install "netwright[verify]"' in refused.stderr
    searched = verify(*LAYERS, "0:1")
    assert searched.exit_code == 2
    assert "the search layer by layer needs Z3" in searched.stderr


@pytest.fixture(scope="module")
def sparse_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run leaves of its network: cells, trained for a moment, four of five weights zero."""
    from netwright.compress.prune import magnitude, remove
    from netwright.data.tensors import scaled
    from netwright.design.options import Options
    from netwright.design.run import RunFolder
    from netwright.search import spaces
    from netwright.seeding import stream

    data = load_data("digits", seed=1)
    genotype = spaces.get("micro-darts-2-shared").random(stream(0, "random"))
    made = Architecture(
        kind="genotype", shape=(1, 8, 8), classes=data.classes, mean=data.mean, std=data.std, channels=4, cells=2,
        genotype=genotype.to_dict(),
    )  # fmt: skip
    torch.manual_seed(0)
    network = made.build()
    x, y = data.normalise()(scaled(data.train.images)), data.train.labels
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for step in range(16):
        if step == 10:
            magnitude(network, 0.8)
        chosen = slice(100 * (step % 10), 100 * (step % 10) + 100)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x[chosen]), y[chosen]).backward()
        optimizer.step()
    folder = RunFolder(tmp_path_factory.mktemp("verify") / "run")
    folder.write("architecture.json", made.to_dict())
    folder.describe(Options(data="digits", seed=1), "netwright design digits")
    write_tensors(folder / "model.safetensors", remove(network).state_dict())
    return folder.path


def test_a_designed_sparse_network(sparse_run: Path, tmp_path: Path):
    """Every verdict about test images of a run is borne out by the run's own network."""
    model = load_run(sparse_run)
    test = load_data("digits", seed=1).test
    generator = torch.Generator().manual_seed(0)
    statuses = set()
    for number, radius in ((0, 1e-4), (2, 0.3)):
        found = verify_model(
            str(sparse_run), f"digits:{number}", radius=str(radius), timeout=20.0, out=tmp_path / f"ce-{number}"
        )
        statuses.add(found.status)
        x, _ = test[number]
        own = int(model(x[None]).argmax())
        assert found.predicted == model.classes[own]
        if found.status == "safe":
            points = x + radius * (2 * torch.rand(500, *x.shape, generator=generator) - 1)
            assert bool((model(points.clamp(0, 1)).argmax(1) == own).all())
        elif found.status == "unsafe":
            after = torch.from_numpy(np.load(tmp_path / f"ce-{number}" / "pair.npz")["counterexample"])
            assert float((after - x).abs().max()) <= radius + 1e-6
            assert int(copy.deepcopy(model).double()(after[None]).argmax()) != own
    assert statuses == {"safe", "unsafe"}


def test_radii_stand_in_the_report(sparse_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bounds, and between them and the attack the exact engine; the page says which it was."""
    monkeypatch.setattr("netwright.design.timing.SOLVER_SECONDS", 2.0)
    model, data = load_run(sparse_run), load_data("digits", seed=1)
    probs = model(data.test.images).softmax(1).detach()
    arrays = radii(model.network, data, probs, limit=3)
    assert len(arrays["true"]) == 3
    assert np.isnan(arrays["few"]).all()
    assert (arrays["broken"] > arrays["proved"]).any()
    first = next(i for i, p in enumerate(probs) if p.argmax() == data.test.labels[i])
    bounded = verify_model(str(sparse_run), f"digits:{first}", radius=str(arrays["proved"][0]), timeout=20.0)
    assert bounded.status == "safe"
    page = shown(arrays, data, tmp_path)
    assert page.count("data:image/png") == 3
    assert f"certain up to {255 * arrays['proved'][0]:.3g}" in page
    assert f"the exact engine (Z3) decided further for {int(arrays['exact'].sum())} of 3" in page
    del arrays["exact"], arrays["few"], arrays["solver"]  # as runs of earlier versions have it
    assert "exact engine (Z3)" not in shown(arrays, data, tmp_path)
    assert radius_blocks(tmp_path / "none.npz", data.classes) == []


def test_radii_without_z3(sparse_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("netwright.verify.encoding.has_z3", lambda: False)
    monkeypatch.setattr("netwright.design.timing.SOLVER_SECONDS", 60.0)
    model, data = load_run(sparse_run), load_data("digits", seed=1)
    arrays = radii(model.network, data, model(data.test.images).softmax(1).detach(), limit=3)
    assert not arrays["exact"].any()
    page = shown(arrays, data, tmp_path)
    assert "the grid engine looked at the 4 values of pixels" in page
    outcomes = ["no other class" if np.isnan(x) else f"another class at {255 * x:.3g}" for x in arrays["few"]]
    assert all(f"by 4 values alone: {outcome}" in page for outcome in outcomes)
    monkeypatch.setattr("netwright.design.timing.SOLVER_SECONDS", 1e-6)
    late = radii(model.network, data, model(data.test.images).softmax(1).detach(), limit=3)
    assert (late["few"] == UNFINISHED).all()
    assert "by 4 values alone: search not finished" in shown(late, data, tmp_path)


def shown(arrays: dict[str, np.ndarray], data, folder: Path) -> str:
    np.savez(folder / "radii.npz", **arrays)
    return (
        Page("A page", "Told.", [Section("Radii", radius_blocks(folder / "radii.npz", data.classes))], {})
        .html()
        .replace("\xa0", " ")
    )


def test_arrays(sparse_run: Path, tmp_path: Path):
    np.save(tmp_path / "one.npy", np.full((1, 8, 8), 100, np.uint8))
    np.save(tmp_path / "two.npy", np.full((2, 8, 8), 100, np.uint8))
    found = verify_model(str(sparse_run), str(tmp_path / "one.npy"), radius="1e-5", out=tmp_path / "x")
    assert found.status == "safe"
    refused = verify(sparse_run, tmp_path / "two.npy", "--radius", "0.1")
    assert "one image is verified at a time, got 2" in refused.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nets.py:brightness", "light.png", "--radius", "0"], "radius must be a number > 0"),
        (["nets.py:brightness", "light.png", "--radius", "-1"], "radius must be a number > 0"),
        (["nets.py:brightness", "light.png", "--radius", "nan"], "radius must be a number > 0"),
        (["nets.py:brightness", "light.png", "--radius", "8/0"], "radius must be a number > 0"),
        (["nets.py:brightness", "light.png", "--radius", "much"], "got 'much'"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--engine", "z4"], "unknown engine 'z4'"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--engine", "gird"], "did you mean grid?"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--timeout", "0"], "timeout must be > 0 seconds"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--timeout", "inf"], "timeout must be > 0 seconds"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--steps", "0"], "steps must be >= 1, got 0"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--engine", "grid"], "the grid has 4.3e+07 points"),
        ([*LAYERS, "1"], "layers must have the form FIRST:LAST"),
        ([*LAYERS, "1:0"], "FIRST at most LAST, got '1:0'"),
        ([*LAYERS, "0:9", "--manipulation", "pixels:2"], "layer must lie in 0..1, got 9"),
        ([*LAYERS, "0:1", "--dims", "0"], "dims must be >= 1, got 0"),
        ([*LAYERS, "0:1"], "the grid has 4.3e+07 points"),
        ([*LAYERS, "1:1", "--manipulation", "pixels:2"], "a manipulation names pixels, and layer 1 has none"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--dims", "3"], "only the search layer by layer"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--manipulation", "blur"], "unknown manipulation"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--manipulation", "pixels:0"], "at least 1 pixel"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--manipulation", "pixels:17"], "pixels must be <= 16"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--manipulation", "pixels:x"], "the form pixels:N"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--manipulation", "patch:1,1,2"], "the form patch:"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--manipulation", "patch:3,3,2,2"], "lie within"),
        (["nets.py:brightness", "dark.png", "--radius", "0.1"], "no such file"),
        (["nets.py:brightness", "nets.py", "--radius", "0.1"], "not a readable image"),
        (["nets.py:brightness", "digits:5", "--radius", "0.1"], "the network does not take this image"),
        (["nets.py:brightness", "digits:999", "--radius", "0.1"], "the test part has images 0..358, got 999"),
        (["nets.py:brightness", "digist:1", "--radius", "0.1"], "did you mean digits?"),
        (["nets.py:nothing", "light.png", "--radius", "0.1"], "no function 'nothing'"),
        (["nets.py:Named", "light.png", "--radius", "0.1"], "model must give logits"),
        (["absent", "light.png", "--radius", "0.1"], "no run, no function and no network by name: 'absent'"),
        (["nets.py:brightness", "light.png", "--radius", "0.1", "--out", "nets.py"], "there is something already"),
        (["nets.py:brightness", "light.png"], "--radius"),
    ],
)
def test_bad_input(here: Path, words: list[str], told: str):
    found = verify(*words)
    assert found.exit_code == 2, found.output
    assert told in found.stderr
    assert "Traceback" not in found.stderr
    assert found.stdout == ""
    assert {p.name for p in here.iterdir()} - {"__pycache__"} == {"light.png", "nets.py"}


@pytest.mark.parametrize("engine", ["grid", "layers"])
def test_a_grid_of_more_points_than_a_float_holds_is_refused(here: Path, engine: str):
    Image.fromarray(np.full((28, 28), 153, np.uint8)).save(here / "large.png")
    found = verify("nets.py:large", "large.png", "--radius", "0.1", "--engine", engine)
    assert found.exit_code == 2, found.output
    assert "the grid has 1.16e+374 points, more than 10000000" in found.stderr


def test_a_network_by_name(here: Path, monkeypatch: pytest.MonkeyPatch):
    """It sees the central square, standardised as its source says, and brings the names of its classes."""

    def create(name, num_classes, in_channels, pretrained, download):
        assert (name, pretrained, download) == ("resnet18", True, False)
        net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3, 1000))
        net[2].weight.data.zero_(), net[2].bias.data.zero_()
        net[2].bias.data[285] = 1.0
        net[2].weight.data[0, 0] = 1.0  # wins where the standardised red is above 1
        return net

    monkeypatch.setattr("netwright.nn.pretrained.create", create)
    picture = np.zeros((16, 48, 3), np.uint8)
    picture[:, 16:32] = (162, 0, 0)  # (162 / 255 - 0.485) / 0.229 = 0.656; the sides are not seen
    Image.fromarray(picture).save(here / "wide.png")
    words = ["resnet18", "wide.png", "--size", "8", "--json"]
    told = json.loads(verify(*words, "--radius", "0.07").stdout)
    assert (told["status"], told["predicted"], told["numbers"]) == ("safe", "Egyptian cat", 192)
    told = json.loads(verify(*words, "--radius", "0.09").stdout)
    assert (told["status"], told["changed_to"]) == ("unsafe", "tench")


def test_weights_that_are_not_here_are_not_fetched(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(here / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(here / "torch"))
    found = verify("resnet18", "light.png", "--radius", "0.1")
    assert found.exit_code == 2
    assert "the trained weights of torchvision:resnet18 are not on this machine" in found.stderr


def test_what_is_there_is_not_replaced(here: Path):
    words = ["nets.py:brightness", "light.png", "--radius", "0.2"]
    assert verify(*words).exit_code == 1
    again = verify(*words)
    assert again.exit_code == 2
    assert "there is something already" in again.stderr
    assert verify(*words, "--force").exit_code == 1
