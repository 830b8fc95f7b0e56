"""What capture accepts and refuses, and how it says so."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from networks import Call, assert_captured
from torch import Tensor, nn
from torch.nn.utils import parametrize

from netwright.console import UserError
from netwright.deploy.graph import UnsupportedOperator, capture, plain_copy
from netwright.deploy.graph.ir import Conv
from netwright.nn.sparse import sparsify

X = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))


def test_masks_and_parametrizations_are_baked_in() -> None:
    torch.manual_seed(0)
    network = sparsify(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), 0.25, skip=["2"]).eval()
    parametrize.register_parametrization(network[2], "bias", nn.ReLU())
    graph = assert_captured(network, X)
    op = graph.nodes[0].op
    assert isinstance(op, Conv)
    assert np.count_nonzero(op.weight) == 54
    assert parametrize.is_parametrized(network[2], "bias")


def test_plain_copy_leaves_the_module_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()).double().to(memory_format=torch.channels_last)
    copied = plain_copy(network)
    assert network.training
    assert not copied.training
    assert copied[0].weight.dtype == torch.float32
    assert copied[0].weight.is_contiguous()
    assert network[0].weight.dtype == torch.float64


def test_a_module_in_training_mode_is_warned_of(capfd: pytest.CaptureFixture[str]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5))
    graph = capture(network, X)
    assert [node.op.name for node in graph] == ["conv"]
    assert "warning: the network is in training mode; it is compiled as in evaluation mode" in capfd.readouterr().err
    assert network.training
    capture(network.eval(), X)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("example", "fault"),
    [
        (X.double(), r"example 0 must be a float32 tensor on the cpu, got torch\.float64 on cpu"),
        (X.to("meta"), "got torch.float32 on meta"),
        ((X, 3), "example 1 must be a float32 tensor on the cpu, got int"),
        (X[:0], "example 0 must have at least 1 axis, each of size >= 1"),
        (torch.tensor(1.0), "at least 1 axis"),
    ],
)
def test_bad_examples(example: Tensor, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        capture(nn.ReLU().eval(), example)


def test_inputs_and_outputs_of_any_structure() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Linear(5, 4)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
            return {"a": [self.a(x), x], "b": (self.b(y), None, 7), "constant": torch.ones(2, 3)}

    torch.manual_seed(0)
    graph = capture(Heads().eval(), (X, torch.randn(2, 5)))
    assert [graph.shapes[value] for value in graph.inputs] == [(2, 3, 8, 6), (2, 5)]
    assert [graph.shapes[value] for value in graph.outputs] == [(2, 2, 8, 6), (2, 3, 8, 6), (2, 4), (2, 3)]


def test_all_unsupported_operators_are_named_at_once() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.odd = nn.Conv2d(3, 4, 1), nn.ModuleList([nn.Softplus(), nn.LocalResponseNorm(2), nn.Mish()])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in self.odd:
                x = layer(x)
            return x.cumsum(2)

    with pytest.raises(UnsupportedOperator) as caught:
        capture(Odd().eval(), X)
    error = caught.value
    found = {(node.operator, node.path) for node in error.nodes}
    assert ("aten.softplus.default", "odd.0") in found
    assert ("aten.mish.default", "odd.2") in found
    assert ("aten.cumsum.default", "") in found
    assert any(path == "odd.1" for _, path in found)
    assert error.nodes[0].shapes == ((2, 4, 8, 6),)
    assert isinstance(error, UserError)
    assert (
        f"the sparse runtime lacks {len(error.nodes)} operators: aten.softplus.default in odd.0 on (2, 4, 8, 6)"
        in str(error)
    )
    assert 'do compile with fallback="torch"' in str(error)
    assert pickle.loads(pickle.dumps(error)).nodes == error.nodes


def test_operators_that_consist_of_known_ones_are_taken_apart() -> None:
    # no handler knows it, torch's own rule makes a product and sums of it
    assert_captured(Call(lambda x: torch.addcmul(x, x, x, value=0.5)), X)


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (lambda x: x[x > 0].sum(), "unsupported|lacks|trace"),
        (lambda x: x if x.sum() > 0 else -x, "trace"),
        (lambda x: (x > 0).float(), "lacks"),
        (lambda x: x.argmax(1), "lacks"),
    ],
)
def test_what_depends_on_data_is_refused(function: object, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        capture(Call(function), X)  # type: ignore[arg-type]


def test_a_network_that_does_not_take_the_example() -> None:
    with pytest.raises(UserError, match=r"torch cannot trace this network: .*channels"):
        capture(nn.Conv2d(5, 2, 1).eval(), X)


def test_module_paths_are_kept() -> None:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.ReLU()).eval()
    assert [node.path for node in capture(network, X)] == ["0.0", "1"]
