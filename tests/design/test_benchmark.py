"""What a name or a run becomes before it is measured: which zeros, which statistics, which input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from netwright.compress import prune
from netwright.console import UserError
from netwright.cost import count
from netwright.deploy.bench.facts import is_depthwise
from netwright.design.benchmark import open_model, prune_at_random, recipes, subject
from netwright.design.model import Architecture
from netwright.nn.sparse import layers, sparsity_report, to_dense
from netwright.storage import write_json, write_tensors

PLAIN = "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 8, 1))\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose network is pruned to 80 %."""
    folder = tmp_path_factory.mktemp("bench") / "run"
    described = Architecture("named", (1, 8, 8), tuple("0123456789"), (0.3,), (0.4,), name="small_convnet")
    torch.manual_seed(0)
    network = prune.magnitude(described.build(), 0.8)
    write_json(folder / "architecture.json", described.to_dict())
    write_tensors(folder / "model.safetensors", to_dense(network).state_dict())
    return folder


@pytest.mark.parametrize(
    ("name", "size", "macs", "shape", "classes"),
    [
        ("resnet18", 32, 555_422_720, (3, 32, 32), 10),
        ("resnet18_32", None, 555_422_720, (3, 32, 32), 10),
        ("mobilenet_v2", 32, 88_000_000, (3, 32, 32), 10),
        ("mobilenet_v2_32", None, 88_000_000, (3, 32, 32), 10),
        ("torchvision:mobilenet_v2", 64, None, (3, 64, 64), 1000),
        ("squeezenet1_1", 96, None, (3, 96, 96), 1000),
    ],
)
def test_names_stand_for_networks_of_a_size(name, size, macs, shape, classes):
    found = open_model(name, size=size)
    assert found.shape == shape
    assert macs is None or count(found.module, shape).macs == pytest.approx(macs, rel=1e-3)
    assert len(found.architecture.classes) == classes
    again = found.architecture.build()
    again.load_state_dict(found.module.state_dict())
    x = torch.randn(1, *shape)
    assert torch.equal(again.eval()(x), found.module(x))


def test_timm_tells_the_size_it_was_made_for():
    timm = pytest.importorskip("timm")
    found = open_model("timm:test_resnet")
    assert found.shape == timm.get_pretrained_cfg("test_resnet").input_size


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_zeros_are_where_they_are_promised(sparsity):
    found = open_model("mobilenet_v2", size=32, sparsity=sparsity)
    report = sparsity_report(found.module)
    kinds = {name: layer for name, layer in layers(found.module)}
    spared = set(report) - set(found.pruned)
    assert spared == {"features.0.0", *(name for name, layer in kinds.items() if is_depthwise(layer))}
    assert all(report[name].kept == report[name].total for name in spared)
    for name in found.pruned:
        total = report[name].total
        # torch's normal numbers come in pairs, of which one in millions is zero by itself
        assert round((1 - sparsity) * total) - 2 <= report[name].kept <= max(1, round((1 - sparsity) * total)), name
    if sparsity:
        # at random: no channel is favoured, so the share of zeros of halves of a layer is that of the whole
        weight = kinds["features.17.conv.2"].weight
        half = (weight[: len(weight) // 2] == 0).double().mean()
        assert float(half) == pytest.approx(sparsity, abs=0.01)
    assert found.seed == 0


def test_rows_keep_what_they_are_promised():
    found = open_model("mobilenet_v2", size=32, sparsity=0.99, keep_at_least=2)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        one, two = found.module(x)
        assert not torch.equal(one, two)
        alone = open_model("mobilenet_v2", size=32, sparsity=0.99).module(x)
        assert torch.equal(*alone)  # cut apart
    for name, layer in layers(found.module):
        if name in found.pruned:
            rows = layer.weight.flatten(1).count_nonzero(1)
            assert int(rows.min()) >= 2
            assert int(rows.sum()) == max(2 * len(rows), round(0.01 * layer.weight.numel()))


def test_the_first_layer_is_the_first_that_runs():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Conv2d(4, 8, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.second(self.first(x))

    assert prune_at_random(Backwards().eval(), 0.5, (3, 4, 4)) == ("second",)


def test_the_seed_decides_everything():
    one, same, other = (subject("mobilenet_v2", size=32, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.example, same.example)
    assert not np.array_equal(one.example, other.example)
    states = [s.module.state_dict() for s in (one, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    name = "features.3.conv.0.0.weight"
    assert not torch.equal(states[0][name] != 0, states[2][name] != 0)


def test_activations_keep_their_size_and_folding_is_not_the_identity():
    found = open_model("resnet18", size=32, sparsity=0.99)
    sizes = []
    for part in found.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_forward_hook(lambda part, inputs, output: sizes.append(float(output.std())))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert bool(found.module(x).isfinite().all())
    assert 0.3 < min(sizes) <= max(sizes) < 3  # a trained network's, not 1e-30 after 18 layers
    norm = found.module.layer3[0].bn1
    for value, plain in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
        assert float((value.detach() - plain).abs().max()) > 0.01
    assert float(norm.running_var.min()) > 0


@pytest.mark.parametrize(
    ("name", "size", "inner"),
    [
        ("convnext_tiny", 32, "features.1.0.block.3"),  # behind a scale that starts at 1e-6
        ("mobilenet_v3_small", 64, "features.4.block.0.0"),
        ("vit_b_16", 224, "encoder.layers.encoder_layer_0.mlp.0"),  # its head starts at 0
    ],
)
def test_every_layer_matters_and_none_is_blown_up(name, size, inner):
    made = subject(name, size=size)
    x = torch.from_numpy(made.example)
    with torch.inference_mode():
        single, double = made.module(x), made.module.double()(x.double())
        assert float(double.std()) > 1e-3
        assert float((single - double).abs().max() / double.abs().max()) < 1e-5
        made.module.get_submodule(inner).weight.neg_()
        assert float((made.module(x.double()) - double).abs().max() / double.abs().max()) > 1e-3


def test_a_run_is_taken_as_it_was_pruned(run):
    found = open_model(str(run))
    assert (found.shape, found.seed, found.name) == ((1, 8, 8), None, "run")
    report = sparsity_report(found.module)
    assert 1 - sum(r.kept for r in report.values()) / sum(r.total for r in report.values()) == pytest.approx(
        0.8, abs=1e-3
    )
    assert set(found.pruned) == {name for name, r in report.items() if r.kept < r.total}
    assert subject(str(run), batch=3).example.shape == (3, 1, 8, 8)
    with pytest.raises(UserError, match="a run is taken as it was pruned"):
        subject(str(run), sparsity=0.9)
    with pytest.raises(UserError, match="the network takes 8 x 8, not 32"):
        subject(str(run), size=32)
    assert subject(str(run), size=8).module is not None


def test_a_function_is_taken_as_it_is_or_pruned_at_random(tmp_path):
    (tmp_path / "nets.py").write_text(PLAIN)
    found = open_model(f"{tmp_path / 'nets.py'}:net", size=12)
    assert (found.shape, found.pruned, found.architecture, found.seed) == ((4, 12, 12), (), None, None)
    found = open_model(f"{tmp_path / 'nets.py'}:net", size=12, sparsity=0.5)
    assert found.pruned == ("1",)
    assert int(found.module[1].weight.count_nonzero()) == 24
    assert found.origin == "weights of the function, random zeros, seed 0"


class TestOnnx:
    def test_open_sides_are_filled_and_the_type_is_the_file_s(self, run, tmp_path):
        from netwright.design.use import export_model

        file = tmp_path / "net.onnx"
        export_model(str(run), "onnx", file)
        found = subject(str(file), size=20, batch=2)
        assert (found.example.shape, found.example.dtype) == ((2, 20, 20, 1), np.uint8)
        assert (found.module, found.onnx, found.name) == (None, file, "net.onnx")

    def test_fixed_sides_stay(self, tmp_path):
        from netwright.deploy.bench.onnx_file import write

        file = tmp_path / "net.onnx"
        write(nn.Conv2d(2, 3, 1).eval(), np.zeros((1, 2, 5, 6), np.float32), file)
        found = subject(str(file), size=20)
        assert (found.example.shape, found.example.dtype) == ((1, 2, 5, 6), np.float32)
        with pytest.raises(UserError, match="the file takes batches of 1, got 4"):
            subject(str(file), batch=4)
        with pytest.raises(UserError, match="an ONNX file is measured as it is"):
            subject(str(file), sparsity=0.5)

    def test_what_is_no_onnx_file_is_refused(self, tmp_path):
        (tmp_path / "noise.onnx").write_bytes(b"noise")
        for name in ("noise.onnx", "absent.onnx"):
            with pytest.raises(UserError):
                subject(str(tmp_path / name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet18", "sparsity": 1.0}, r"sparsity must lie in \[0, 1\), got 1.0"),
        ({"model": "resnet18", "sparsity": float("nan")}, r"sparsity must lie in \[0, 1\), got nan"),
        ({"model": "resnet18", "size": 0}, "size must be >= 1, got 0"),
        ({"model": "resnet18", "batch": 0}, "batch must be >= 1, got 0"),
        ({"model": "resnet81"}, "unknown network 'resnet81'"),
        ({"model": "resnet18_32", "size": 224}, "resnet18_32 takes images of at most 64 pixels, got 224"),
        ({"model": "inception_v3", "size": 32}, "the network does not take images of 32 x 32"),
        ({"model": "."}, "the folder holds no finished network"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        subject(**arguments)


def test_recipes_are_every_model_at_every_sparsity():
    made = recipes(["a", "b"], [0.5, 0.9], size=8, batch=2, seed=3)
    assert [(r.arguments["model"], r.arguments["sparsity"]) for r in made] == [
        ("a", 0.5), ("a", 0.9), ("b", 0.5), ("b", 0.9),
    ]  # fmt: skip
    assert all(r.arguments["seed"] == 3 and r.arguments["batch"] == 2 for r in made)
    made = recipes(["mobilenet_v2_32"])[0].make()
    assert (made.name, made.example.shape) == ("mobilenet_v2_32", (1, 3, 32, 32))
    assert Path(recipes(["x.onnx"])[0].arguments["model"]).suffix == ".onnx"
    with pytest.raises(UserError, match="MODEL is missing"):
        recipes([])
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got -1"):
        recipes(["a"], [0.5, -1])
