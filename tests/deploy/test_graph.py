"""The package as a whole: its names, and the two networks of the benchmark from module to graph."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from networks import assert_captured, fill

from netwright.deploy import graph
from netwright.nn.mbconv import mobilenet_v2_32
from netwright.nn.resnet import resnet18_cifar


@pytest.mark.parametrize(("make", "convolutions"), [(resnet18_cifar, 20), (mobilenet_v2_32, 52)])
def test_batch_norms_activations_and_sums_are_all_part_of_convolutions(make, convolutions: int) -> None:
    torch.manual_seed(0)
    module = fill(make(), 0)
    found = [node.op.name for node in assert_captured(module, torch.randn(2, 3, 32, 32))]
    assert found.count("conv") <= convolutions
    assert set(found) <= {"conv", "adaptive_pool", "reshape", "linear"}


def test_names_are_resolved_when_they_are_used() -> None:
    for name in graph.__all__:
        assert getattr(graph, name).__name__ == name
    assert dir(graph) == sorted(graph.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        graph.nothing  # noqa: B018


def test_checking_a_graph_needs_no_torch() -> None:
    code = "import sys; from netwright.deploy.graph import Graph, check; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
