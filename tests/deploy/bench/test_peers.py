"""The runtimes themselves, in this process: what they answer, and that nobody is given a network without its zeros."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import stand_in
import torch
from onnx import numpy_helper
from torch import nn

from netwright import deploy
from netwright.console import UserError
from netwright.deploy.bench import COMPETITORS, Recipe
from netwright.deploy.bench.onnx_file import write
from netwright.deploy.bench.peers import Competitor, Compiled, Eager, Native, OnTorch, OpenVino
from netwright.deploy.bench.subject import Work, resolve

TINY = Recipe("stand_in:tiny", {"batch": 2})


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    subject, made = TINY.make(), Work(tmp_path_factory.mktemp("work"))
    made.write(TINY, subject)
    write(subject.module, subject.example, made.onnx)
    return made


def test_every_competitor_answers_the_three_questions():
    for path in COMPETITORS.values():
        competitor = resolve(path)()
        assert isinstance(competitor, Competitor)
        assert competitor.absent() is None or ":" in competitor.absent()
    assert [name for name, path in COMPETITORS.items() if not resolve(path).dense] == [
        "netwright-native", "netwright-torch",
    ]  # fmt: skip
    assert next(iter(COMPETITORS)) == "netwright-native"  # the one that is compared


@pytest.mark.parametrize("name", ["pytorch", "onnxruntime", "openvino"])
def test_dense_runtimes_agree_with_double_precision(work, name):
    competitor = resolve(COMPETITORS[name])()
    if competitor.absent() is not None:
        pytest.skip(competitor.absent())
    competitor.load()
    prepared = competitor.prepare(work, 1)
    assert work.deviation(prepared.call()) < 1e-6
    assert work.deviation(prepared.call()) < 1e-6
    assert prepared.file_bytes == (None if competitor.reads == "module" else work.onnx.stat().st_size)
    assert competitor.version()


@pytest.mark.slow
def test_a_compiled_network_agrees_with_double_precision(work):
    if Compiled().absent() is not None:
        pytest.skip(Compiled().absent())
    assert work.deviation(Compiled().prepare(work, 1).call()) < 1e-6


def test_eager_says_which_layout_it_took(work):
    assert Eager().prepare(work, 1).note in {"contiguous", "channels-last"}


def test_zeros_stay_zeros_in_the_onnx_file(work):
    weights = {
        tensor.name.removeprefix("network."): numpy_helper.to_array(tensor)
        for tensor in onnx.load(work.onnx).graph.initializer
    }
    for name, value in stand_in.network().state_dict().items():
        assert np.array_equal(weights[name], value.numpy()), name
    assert np.count_nonzero(weights["5.weight"]) == weights["5.weight"].size // 4


def test_zeros_stay_zeros_behind_a_batch_norm(tmp_path):
    norm = nn.BatchNorm2d(8)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), norm, nn.ReLU()).eval()
    with torch.no_grad():
        net[0].weight.flatten()[::3] = 0
    write(net, np.zeros((1, 4, 6, 6), np.float32), tmp_path / "net.onnx")
    conv = next(t for t in onnx.load(tmp_path / "net.onnx").graph.initializer if list(t.dims) == [8, 4, 3, 3])
    kept = net[0].weight.detach().numpy() != 0
    assert np.array_equal(numpy_helper.to_array(conv) != 0, kept)


def test_the_onnx_file_has_one_shape_and_no_preprocessing(work):
    graph = onnx.load(work.onnx).graph
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [2, 3, 8, 8]
    assert {node.op_type for node in graph.node} <= {"Conv", "Relu", "Reshape", "Flatten", "Gemm"}


def test_a_network_that_torch_cannot_export_is_refused_in_a_line(tmp_path):
    class Wild(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match="torch cannot export it to ONNX") as caught:
        write(Wild(), np.ones((1, 2), np.float32), tmp_path / "net.onnx")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("competitor", [Native, OnTorch])
def test_ours_is_compiled_saved_and_loaded(work, monkeypatch, competitor):
    if competitor().absent() is not None:
        pytest.skip(competitor().absent())
    competitor().load()
    prepared = competitor().prepare(work, 1)
    assert work.deviation(prepared.call()) < 1e-5
    (folder,) = work.folder.glob(f"netwright-{competitor.backend}")
    assert prepared.file_bytes == sum(file.stat().st_size for file in folder.iterdir()) > 0
    assert prepared.table_bytes > 0
    monkeypatch.delattr(deploy.model, "compile")  # what is loaded for the measurement of memory was compiled before
    assert work.deviation(competitor().deploy(work, 1).call()) < 1e-5


def test_a_native_model_that_falls_back_to_torch_is_not_taken_for_native(work, monkeypatch):
    compile = deploy.compile

    def on_torch(module, example, backend, threads):
        return compile(module, example, "torch", threads)

    monkeypatch.setattr(deploy.model, "compile", on_torch)
    with pytest.raises(RuntimeError, match="torch runs it, not native"):
        Native().prepare(work, 1)


def test_what_is_not_there_says_so(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert Native().absent().startswith("no C compiler was found: looked for no-such-compiler")
    assert Compiled().absent() == "no C++ compiler: looked for no-such-compiler"
    assert OnTorch().absent() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert OpenVino().absent() == "not installed: pip install openvino"


def test_openvino_is_held_to_float32_and_to_its_threads(work, monkeypatch):
    openvino = pytest.importorskip("openvino")
    asked = SimpleNamespace(settings=None)
    compile_model = openvino.compile_model

    def spy(model, device, settings):
        asked.settings = settings
        return compile_model(model, device, settings)

    monkeypatch.setattr(openvino, "compile_model", spy)
    OpenVino().prepare(work, 1)
    assert asked.settings["INFERENCE_PRECISION_HINT"] == "f32"
    assert asked.settings["INFERENCE_NUM_THREADS"] == 1
