"""Operators that change what they read: replaced where nothing else sees the change, else left to torch."""

from __future__ import annotations

import pytest
import torch
from networks import Call, assert_captured
from torch import Tensor, nn
from torch.nn import functional

from netwright.deploy.graph import tracing
from netwright.deploy.graph.functional import make_functional

X = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))


def relu_after_convolution(x: Tensor) -> Tensor:
    return functional.conv2d(x, torch.ones(3, 3, 1, 1, dtype=x.dtype) / 4).relu_() + 1


def one_change_after_another(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(x)
    y.clamp_(0, 1)
    return y + y.sigmoid_()


def read_before_and_after(x: Tensor) -> Tensor:
    y = x - 1
    before = y * 3
    y.relu_()
    return before + y


def added_to_itself(x: Tensor) -> Tensor:
    y = x - 1
    return y.add_(y)


def a_view_made_before_sees_the_change(x: Tensor) -> Tensor:
    y = x - 1
    flat = y.flatten(1)
    y.relu_()
    return flat * 2


def a_view_made_between_two_changes_sees_the_second(x: Tensor) -> Tensor:
    y = x - 1
    y.add_(x)
    flat = y.flatten(1)
    y.relu_()
    return flat * 2


def a_change_through_a_view(x: Tensor) -> Tensor:
    y = x - 1
    y[:, :1].mul_(2)
    return y + 1


def no_copy_is_a_view(x: Tensor) -> Tensor:
    y = x - 1
    same = functional.dropout(y, 0.5, training=False)
    y.relu_()
    return same + 1


def the_output_is_changed_afterwards(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x - 1
    return y, y.relu_() * 2


def a_slice_is_filled(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:2] = 5.0
    return y + 1


def dropout_at_rest(x: Tensor) -> Tensor:
    y = x.flatten(1)
    return functional.dropout(y, 0.5, training=False, inplace=True) + y


PLAIN = [
    relu_after_convolution, one_change_after_another, read_before_and_after, added_to_itself,
    the_output_is_changed_afterwards, dropout_at_rest,
]  # fmt: skip
SHARED = [
    a_view_made_before_sees_the_change, a_view_made_between_two_changes_sees_the_second, a_change_through_a_view,
    no_copy_is_a_view, a_slice_is_filled,
]  # fmt: skip


def changing(program: torch.export.ExportedProgram) -> list[str]:
    calls = (node.target for node in program.graph.nodes if node.op == "call_function")
    return [str(call) for call in calls if hasattr(call, "_schema") and call._schema.is_mutable]


@pytest.mark.parametrize("function", [*PLAIN, *SHARED])
def test_every_program_computes_what_it_did(function) -> None:
    network = Call(function).eval()
    expected = network(X.clone())
    with torch.no_grad():
        program = torch.export.export(network, (X.clone(),))
    assert changing(program)
    assert make_functional(program) == (function in PLAIN) == (not changing(program))
    found = program.module()(X.clone())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(program.run_decompositions({}).module()(X.clone()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("function", PLAIN)
def test_graphs_of_them_agree_with_torch(function) -> None:
    assert_captured(Call(function).eval(), X)


def test_a_known_network_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)).eval()

    def again(*_: object) -> None:
        raise AssertionError("traced twice")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", again)
    _, translation = tracing.translate(network, X)
    assert not translation.unsupported
    assert [node.op.name for node in translation.builder.graph][-1] == "pool"


def test_a_region_under_autocast_is_taken_apart() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.flatten(1) * 2
        with torch.autocast("cpu", enabled=False):
            z = functional.linear(y, torch.ones(4, 144, dtype=x.dtype))
        return z.relu_()

    assert_captured(Call(function).eval(), X)
