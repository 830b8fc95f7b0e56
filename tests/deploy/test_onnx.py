import json
import logging
import os
import subprocess
import sys
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import parametrize

import netwright.deploy
from netwright.console import UserError
from netwright.deploy.onnx import check, export
from netwright.deploy.session import Session, file_sizes, latency
from netwright.nn.sparse import sparsify
from netwright.seeding import numpy_stream, seeded, stream

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)


def normalise(x, mean=MEAN, std=STD):
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def pictures(n, height, width, channels=3):
    return numpy_stream(0, "pictures").integers(0, 256, (n, height, width, channels), dtype=np.uint8)


class Reduce(nn.Module):
    """The slicing of a factorised reduction."""

    def __init__(self, channels):
        super().__init__()
        self.a = nn.Conv2d(channels, 4, 1, stride=2, bias=False)
        self.b = nn.Conv2d(channels, 4, 1, stride=2, bias=False)

    def forward(self, x):
        x = nn.functional.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        return torch.cat([self.a(x), self.b(x[:, :, 1:, 1:])], 1)


def block(inputs, outputs, **options):
    return nn.Sequential(nn.Conv2d(inputs, outputs, **options, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def head(channels, classes=5):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class TwoOutputs(nn.Module):
    """Logits first, then something else; and a parameter called like an output of the file."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.ones(5))
        self.image = nn.Parameter(torch.ones(1))
        self.body = nn.Sequential(block(3, 4, kernel_size=3), head(4))

    def forward(self, x):
        return self.body(x * self.image) * self.logits, x.mean()


NETWORKS = {
    "depthwise": lambda: nn.Sequential(
        block(3, 8, kernel_size=3, padding=1),
        block(8, 8, kernel_size=5, padding=2, groups=8, stride=2),
        block(8, 6, kernel_size=1),
        head(6),
    ),
    "groups": lambda: nn.Sequential(
        block(3, 8, kernel_size=3), block(8, 8, kernel_size=3, groups=4, dilation=2), head(8)
    ),
    "pooling": lambda: nn.Sequential(
        nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
        nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        head(4),
    ),
    "reduce": lambda: nn.Sequential(Reduce(3), nn.BatchNorm2d(8), nn.Hardswish(), Reduce(8), head(8)),
    "two outputs": TwoOutputs,
}


def network(name="depthwise"):
    with seeded(0, name):
        net = NETWORKS[name]()
        for layer in net.modules():  # statistics that folding cannot ignore
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean, 0, 0.3)
                nn.init.uniform_(layer.running_var, 0.5, 2)
                nn.init.normal_(layer.weight, 0, 1)
                nn.init.normal_(layer.bias, 0, 0.3)
    return net


def write(net, path, height=15, width=13, **options):
    options = {"mean": MEAN, "std": STD, "classes": "abcde", **options}
    return export(net, path, shape=(len(options["mean"]), height, width), **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    net = network()
    return net, write(net, tmp_path_factory.mktemp("onnx") / "net.onnx")


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_the_network_for_every_batch_size(name, tmp_path):
    net = network(name).train()
    path = write(net, tmp_path / "net.onnx")
    assert net.training
    images = pictures(7, 15, 13)
    for batch in (images[:1], images):
        agreement = check(path, net, normalise, batch, tolerance=1e-5)
        assert agreement.images == len(batch)
        assert agreement.same_class == 1
        with torch.no_grad():
            output = net.eval()(normalise(torch.from_numpy(batch).permute(0, 3, 1, 2)))
        expected = (output[0] if isinstance(output, tuple) else output).numpy()
        np.testing.assert_allclose(Session(path).logits(batch), expected, atol=1e-5)
        assert expected.std() > 1e-3  # or any file would agree


@pytest.fixture(scope="module", params=[1, 3])
def bare(request, tmp_path_factory):
    """A file whose logits are its standardised input, so that the preprocessing itself can be seen."""
    channels = request.param
    path = tmp_path_factory.mktemp("bare") / "net.onnx"
    classes = [str(i) for i in range(channels * 11 * 9)]
    write(nn.Flatten(), path, 11, 9, mean=MEAN[:channels], std=STD[:channels], classes=classes)
    return channels, Session(path)


@pytest.mark.parametrize("size", [(11, 9), (23, 31), (5, 6), (11, 40), (90, 4), (1, 1)])
def test_preprocessing_is_that_of_pillow(bare, size):
    channels, session = bare
    images = pictures(3, *size, channels)
    given = session.logits(images).reshape(3, channels, 11, 9)
    resized = [
        [np.asarray(Image.fromarray(plane).resize((9, 11), Image.Resampling.BILINEAR)) for plane in x]
        for x in images.transpose(0, 3, 1, 2)
    ]
    mean, std = (np.array(v[:channels], np.float32)[:, None, None] for v in (MEAN, STD))
    expected = (np.array(resized, np.float32) / np.float32(255) - mean) / std
    if size == (11, 9):
        np.testing.assert_allclose(given, expected, rtol=0, atol=3e-7)
    else:
        assert np.abs((given - expected) * std).max() <= 2 / 255


def test_a_picture_of_another_size_agrees_with_torch(exported):
    net, path = exported
    assert check(path, net, normalise, pictures(3, 40, 29)).largest < 1e-5


def test_without_resizing_another_size_is_refused(tmp_path):
    path = write(head(3), tmp_path / "net.onnx", resize=False)
    session = Session(path)
    assert session.logits(pictures(2, 15, 13)).shape == (2, 5)
    assert session.metadata["resize"] is False
    with pytest.raises(ValueError, match=r"images must have the shape .*15, 13, 3.*\[2, 16, 13, 3\]"):
        session.logits(pictures(2, 16, 13))


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 4, 5, stride=2), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 3))
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.body(x.squeeze(2)).mean(-1))


def test_sequences_are_only_standardised(tmp_path):
    with seeded(0):
        net = Sequence()
    path = export(net, tmp_path / "a.onnx", shape=(1, 1, 40), mean=[2.0], std=[3.0], classes="xyz", scale=None)
    x = torch.randn(7, 1, 1, 40, generator=stream(0, "x")) * 3 + 2
    agreement = check(path, net, lambda v: (v - 2) / 3, x)
    assert agreement.images == 7
    assert agreement.largest < 1e-5
    session = Session(path)
    assert session.logits(x.numpy()[:1]).shape == (1, 3)
    assert session.metadata["scale"] is None
    assert session.metadata["resize"] is False
    with pytest.raises(ValueError, match="images must be float32, got uint8"):
        session.logits(np.zeros((1, 1, 1, 40), np.uint8))


def test_zeros_stay_exact_zeros_and_masks_are_baked_in(tmp_path):
    net = sparsify(network(), 0.1)
    parametrize.register_parametrization(net[0][0], "weight", nn.Identity())
    path = write(net, tmp_path / "net.onnx")
    check(path, net, normalise, pictures(2, 15, 13))
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    kept = {}
    for name, layer in net.named_modules():
        if hasattr(layer, "mask"):
            weight, mask = weights[f"network.{name}.weight"], layer.mask().numpy()
            kept[name] = int(mask.sum())
            assert np.array_equal(weight != 0, mask != 0)
            assert not np.signbit(weight[weight == 0]).any()
    assert kept == {"0.0": 22, "1.0": 20, "2.0": 5, "3.2": 3}
    assert not any("scores" in name for name in weights)
    assert parametrize.is_parametrized(net[0][0])


def test_same_module_gives_the_same_bytes_without_traces_of_this_machine(exported, tmp_path):
    _net, path = exported
    again = write(network().to(memory_format=torch.channels_last), tmp_path / "other name.onnx")
    assert again.read_bytes() == path.read_bytes()
    code = "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_onnx as t;t.write(t.network(), sys.argv[2])"
    third = tmp_path / "third.onnx"
    subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__), str(third)],
        check=True, env={**os.environ, "PYTHONHASHSEED": "7"}, cwd=tmp_path,
    )  # fmt: skip
    assert third.read_bytes() == path.read_bytes()
    data = path.read_bytes()
    for trace in (b"stack_trace", b"/work", b"/home", b".py", b"site-packages", b"fx_node"):
        assert trace not in data
    assert sorted(f.name for f in path.parent.iterdir()) == ["net.onnx"]


def test_facts_are_in_the_file(tmp_path):
    path = write(
        head(3), tmp_path / "net.onnx", classes=["T-shirt", "é", "3", "d", "e"], metadata={"run": "a", "n": {"b": 1}}
    )
    session = Session(path)
    assert session.classes == ("T-shirt", "é", "3", "d", "e")
    assert session.metadata["n"] == {"b": 1}
    assert session.metadata["run"] == "a"
    assert (session.metadata["shape"], session.metadata["scale"]) == ([3, 15, 13], 255.0)
    assert session.metadata["netwright"] == netwright.__version__
    assert (session.metadata["mean"], session.metadata["std"]) == (list(MEAN), list(STD))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [v.name for v in model.graph.input] == ["image"]
    assert [v.name for v in model.graph.output] == ["logits", "probabilities"]


def test_probabilities_are_the_softmax(exported):
    session = Session(exported[1])
    images = pictures(4, 20, 20)
    expected = torch.softmax(torch.from_numpy(session.logits(images)), 1).numpy()
    np.testing.assert_allclose(session.probabilities(images), expected, atol=1e-6)


def test_a_tensor_is_taken_in_the_layout_of_torch_and_long_inputs_in_parts(exported):
    session = Session(exported[1])
    images = pictures(600, 15, 13)
    whole = session.logits(images)
    assert whole.shape == (600, 5)
    np.testing.assert_allclose(session.logits(torch.from_numpy(images).permute(0, 3, 1, 2)), whole, atol=1e-6)
    np.testing.assert_allclose(session.logits(images[590:]), whole[590:], atol=1e-5)
    assert session.logits(images[:0]).shape == (0, 5)


def test_check_refuses_another_network(exported):
    net, path = exported
    other = network()
    with torch.no_grad():
        other[3][2].bias += 0.01
    with pytest.raises(UserError, match=r"differ from the network's by 0\.01.*; 0\.0001 is allowed"):
        check(path, other, normalise, pictures(2, 15, 13))
    assert check(path, other, normalise, pictures(2, 15, 13), tolerance=0.02).largest == pytest.approx(0.01, rel=1e-3)
    with torch.no_grad():
        other[3][2].bias.fill_(float("nan"))
    with pytest.raises(UserError, match="by nan"):
        check(path, other, normalise, pictures(2, 15, 13))
    with pytest.raises(ValueError, match="at least 1 image"):
        check(path, net, normalise, pictures(0, 15, 13))


def test_latency_states_its_terms(exported, monkeypatch):
    session = Session(exported[1], threads=2)
    fed = []
    call = session.call
    monkeypatch.setattr(session, "call", lambda x: (fed.append(x.copy()), call(x)))
    images = pictures(5, 20, 21)
    result = latency(session, images, batch=2, rounds=11, warmup=3)
    assert (result.batch, result.threads, result.rounds) == (2, 2, 11)
    assert result.runtime == f"ONNX Runtime {onnxruntime.__version__}"
    assert 0 < result.p10_ms <= result.median_ms <= result.p90_ms
    assert len(fed) == 14
    assert {x.shape for x in fed} == {(2, 20, 21, 3)}
    options = session._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    for wrong in ({"batch": 0}, {"rounds": 0}, {"warmup": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be >="):
            latency(session, images, **wrong)


def test_gzip_shows_sparsity(exported, tmp_path):
    wide = lambda: nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Conv2d(32, 32, 5), head(32))  # noqa: E731
    with seeded(0):
        dense = wide()
    a, b = write(dense, tmp_path / "a.onnx"), write(sparsify(dense, 0.05), tmp_path / "b.onnx")
    assert file_sizes(a).raw == a.stat().st_size
    assert abs(file_sizes(a).raw - file_sizes(b).raw) < 2000
    assert file_sizes(b).gzipped < 0.2 * file_sizes(a).gzipped
    with pytest.raises(UserError, match="no such file"):
        file_sizes(tmp_path / "none")


def test_bad_files_are_refused_in_one_line(exported, tmp_path):
    with pytest.raises(UserError, match="no such file") as error:
        Session(tmp_path / "none.onnx")
    assert error.value.where == tmp_path / "none.onnx"
    for data in (b"", b"not onnx", exported[1].read_bytes()[:1500]):
        (tmp_path / "bad.onnx").write_bytes(data)
        with pytest.raises(UserError) as error:
            Session(tmp_path / "bad.onnx")
        assert "\n" not in error.value.what
    with pytest.raises(ValueError, match="threads must be an integer >= 1, got 0"):
        Session(exported[1], threads=0)


def test_a_foreign_file_runs(tmp_path):
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", float32, [None, 1, 2, 2])],
        [helper.make_tensor_value_info("y", float32, [None, 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "a.onnx")
    session = Session(tmp_path / "a.onnx")
    assert session.classes == ()
    np.testing.assert_array_equal(session.logits(np.ones((3, 1, 2, 2), np.float32)), np.ones((3, 4)))
    with pytest.raises(ValueError, match="no output called probabilities"):
        session.probabilities(np.ones((3, 1, 2, 2), np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.1, 0.2)}, "mean must hold one number for each of 3 channels, got 2"),
        ({"std": (0.1, 0.2, 0.0)}, "std must be > 0, got 0.0"),
        ({"std": (0.1, 0.2, float("nan"))}, "std must be finite"),
        ({"classes": "abcd"}, "classes must name every logit of the network: 4 names"),
        ({"scale": 0.0}, "scale must be > 0 or None, got 0.0"),
        ({"metadata": {"classes": "x"}}, "metadata must not set classes"),
        ({"shape": (3, 15)}, "shape must be"),
        ({"shape": (2, 15, 13), "mean": (0.1, 0.2), "std": (1, 1)}, r"shape \(2, 15, 13\) does not fit the network"),
    ],
)
def test_contradicting_facts_are_refused_and_nothing_is_written(options, message, tmp_path):
    options = {"shape": (3, 15, 13), "mean": MEAN, "std": STD, "classes": "abcde", **options}
    with pytest.raises(ValueError, match=message):
        export(network(), tmp_path / "net.onnx", **options)
    assert list(tmp_path.iterdir()) == []


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)[:, :5]


class Specialised(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :5] + torch.zeros(2, 5)


class Branching(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :5] if x.sum() > 0 else x.flatten(1)[:, 5:10]


@pytest.mark.parametrize("kind", [Fixed, Specialised, Branching])
def test_what_torch_cannot_export_is_said_in_one_line(kind, tmp_path, capfd):
    with pytest.raises(UserError, match="torch cannot export this network to ONNX: ") as error:
        write(kind(), tmp_path / "net.onnx")
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_exporting_is_silent_and_leaves_no_setting_changed(tmp_path, capfd):
    before = logging.root.manager.disable
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(network("groups"), tmp_path / "net.onnx")
    assert caught == []
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == before


def test_numpy_and_onnxruntime_are_all_a_user_needs(exported, tmp_path):
    _, path = exported
    images = pictures(6, 21, 18)
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "moved.onnx").write_bytes(path.read_bytes())
    script = f"""
import sys
source = {os.path.dirname(os.path.dirname(netwright.__file__))!r}
sys.path[:] = [p for p in sys.path if "netwright" not in p and source not in p]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
try:
    import netwright
    raise SystemExit("netwright can be imported")
except ModuleNotFoundError:
    pass
import json
import numpy, onnxruntime
session = onnxruntime.InferenceSession("moved.onnx", providers=["CPUExecutionProvider"])
names = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
(probabilities,) = session.run(["probabilities"], {{"image": numpy.load("images.npy")}})
assert "torch" not in sys.modules and "netwright" not in sys.modules
print(json.dumps([names[i] for i in probabilities.argmax(1)]))
"""
    out = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    expected = ["abcde"[i] for i in Session(path).logits(images).argmax(1)]
    assert json.loads(out.stdout) == expected


def test_using_a_file_loads_neither_torch_nor_lightning(exported):
    code = (
        "import sys, numpy; from netwright.deploy import Session, file_sizes, latency;"
        "s = Session(sys.argv[1]); x = numpy.zeros((2, 9, 9, 3), numpy.uint8);"
        "s.logits(x); latency(s, x, rounds=2); file_sizes(sys.argv[1]);"
        "print([m for m in ('torch', 'lightning', 'onnx') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, str(exported[1])], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_names_are_lazy():
    assert set(netwright.deploy.__all__) < set(dir(netwright.deploy))
    for name in netwright.deploy.__all__:
        assert callable(getattr(netwright.deploy, name))
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        netwright.deploy.exprot  # noqa: B018
