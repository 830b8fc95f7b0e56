"""Engines one by one: the same numbers from each, whatever lies between the graphs of a network."""

import numpy as np
import pytest
import torch
from kernels import compiler
from torch import nn

from netwright.deploy.engines import MixedEngine, NativeEngine, TorchEngine, make_engine, shortest, tensor, views
from netwright.deploy.graph import capture, optimise, split


@pytest.fixture(autouse=True)
def _needs_a_compiler():
    compiler()


def layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Softplus(), nn.Conv2d(4, 3, 1), nn.Flatten()).eval()
        return net, torch.randn(1, 2, 6, 5)


def graph():
    net, x = layers()
    return optimise(capture(net[:2], x)), x, net[:2](x).detach()


def made(kind):
    net, x = layers()
    if kind is MixedEngine:
        return make_engine(split(net, x), "native", 1, False)[1], x, net(x).detach()
    source, x, wanted = graph()
    engine = NativeEngine(source, 1, False) if kind is NativeEngine else TorchEngine(source, 1)
    return engine, x, wanted


KINDS = [NativeEngine, TorchEngine, MixedEngine]


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_and_arrays_are_filled(kind):
    engine, x, wanted = made(kind)
    assert isinstance(engine, kind)
    for target in (engine, engine.clone()):
        out = torch.full_like(wanted, torch.nan)
        target.fill([x], [out])
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        array = np.full(wanted.shape, np.nan, np.float32)
        target.fill([x.numpy()], [array])
        np.testing.assert_array_equal(array, out.numpy())
        assert (target.nbytes, target.arena_bytes) == (engine.nbytes, engine.arena_bytes)


def test_steps_are_those_of_the_network():
    source, x, _ = graph()
    for engine in (NativeEngine(source, 1, False), TorchEngine(source, 1)):
        ((path, _, macs, seconds),) = engine.steps([source], [x], 3)
        assert (path, macs) == ("0", 4 * 18 * 12)
        assert 0 < seconds < 1


def test_steps_of_parts_end_with_what_lies_between():
    net, x = layers()
    network = split(net, x)
    engine = make_engine(network, "torch", 1, False)[1]
    steps = engine.steps(network.graphs, [x], 3)
    assert [step[0] for step in steps if step[1] == "conv"] == ["0", "3"]
    assert steps[-1][:3] == ("", "PyTorch", 0)


def test_what_is_wanted_is_made():
    source, *_ = graph()
    assert make_engine(source, "native", 1, False)[0] == "native"
    assert make_engine(source, "torch", 1, False)[0] == "torch"


def test_a_failing_compiler_gives_torch_and_a_reason(monkeypatch, capsys):
    source, *_ = graph()
    monkeypatch.setenv("CC", "false")
    backend, engine = make_engine(source, "native", 1, False)
    assert backend == "torch"
    assert isinstance(engine, TorchEngine)
    assert "the C compiler does not work" in capsys.readouterr().err


def test_arrays_become_tensors_in_place_where_they_may_be_written():
    array = np.zeros(3, np.float32)
    assert tensor(array).data_ptr() == array.ctypes.data
    array.flags.writeable = False
    assert tensor(array).data_ptr() != array.ctypes.data


def test_shapes_are_those_that_a_caller_knows():
    source = capture(nn.Flatten(0).eval(), torch.zeros(1, 2, 3, 3))
    assert views(source, source.outputs) == ((18,),)


def test_the_shortest_call_counts():
    calls = []
    assert 0 <= shortest(lambda: calls.append(1), 5) < 1
    assert len(calls) == 5
