"""Networks of equal structure share one export of torch: what is equal, and that it leaves no trace in the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from netwright.compress import prune
from netwright.deploy import onnx_graph
from netwright.deploy.exporters import structure
from netwright.deploy.onnx import Session, export
from netwright.nn.sparse import to_dense
from netwright.seeding import seeded


class Twice(nn.Module):
    """Two layers that may be one."""

    def __init__(self, tied: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a if tied else nn.Linear(4, 4)
        self.register_buffer("shift", torch.rand(4), persistent=False)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.b(self.a(x.flatten(1))) + self.shift


def network(seed: int, padding: int = 1) -> nn.Module:
    with seeded(seed, "onnx graph"):
        made = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=padding), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        nn.init.normal_(made[1].running_mean)
    return made.eval()


def written(module: nn.Module, path: Path) -> bytes:
    facts = {"shape": (1, 2, 2), "mean": [0.5], "std": [0.25], "scale": None}
    return export(module, path, classes="abcd"[: 4 if isinstance(module, Twice) else 3], **facts).read_bytes()


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The networks that torch has exported, beginning with no template."""
    seen: list[nn.Module] = []
    made = onnx_graph._exported

    def noting(module: nn.Module, example: torch.Tensor):
        seen.append(module)
        return made(module, example)

    monkeypatch.setattr(onnx_graph, "_exported", noting)
    onnx_graph._templates.clear()
    return seen


@pytest.mark.parametrize("make", [network, lambda seed: Twice(True), lambda seed: Twice(False)])
def test_the_file_is_the_one_that_it_would_be_without_a_template(tmp_path, exports, make: Callable[[int], nn.Module]):
    first, second = make(0), make(1)
    written(first, tmp_path / "first.onnx")
    shared = written(second, tmp_path / "second.onnx")
    assert len(exports) == 1
    onnx_graph._templates.clear()
    assert written(second, tmp_path / "again.onnx") == shared
    assert len(exports) == 2
    x = np.random.default_rng(0).normal(size=(3, 1, 2, 2)).astype(np.float32)
    expected = second((torch.from_numpy(x) - 0.5) / 0.25).detach().numpy()
    assert Session(tmp_path / "second.onnx").logits(x) == pytest.approx(expected, abs=1e-5)
    assert Session(tmp_path / "first.onnx").logits(x) != pytest.approx(expected, abs=1e-3)


def test_pruning_and_training_leave_the_structure(tmp_path, exports):
    module = network(0)
    written(module, tmp_path / "a.onnx")
    for parameter in module.parameters():
        parameter.requires_grad_(False).mul_(torch.rand_like(parameter) < 0.5)
    plain = written(module.train(), tmp_path / "b.onnx")
    for layer in module[:2]:
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert written(module, tmp_path / "c.onnx") == plain
    assert len(exports) == 1


def test_masks_leave_the_structure_of_layers_without_bias(tmp_path, exports):
    module = network(0)
    module[0].register_parameter("bias", None)
    written(module, tmp_path / "a.onnx")
    prune.magnitude(module, 0.5)
    written(module, tmp_path / "b.onnx")
    written(to_dense(module), tmp_path / "c.onnx")
    assert len(exports) == 1


def test_what_would_be_traced_to_another_graph_is_not_shared(tmp_path, exports, monkeypatch):
    others = [network(0), network(0, padding=2), Twice(True), Twice(False), Twice(True, scale=2.0)]
    for module in others:
        written(module, tmp_path / "a.onnx")
    assert len(exports) == len(others)
    monkeypatch.setattr(Twice, "forward", lambda self, x: self.a(x.flatten(1)))
    written(Twice(False), tmp_path / "a.onnx")
    assert len(exports) == len(others) + 1


def test_a_constant_that_is_no_buffer_belongs_to_the_structure():
    one, two = network(0), network(0)
    one.constant, two.constant = torch.zeros(2), torch.zeros(2)
    assert structure(one) == structure(two)
    two.constant = torch.ones(2)
    assert structure(one) != structure(two)


def test_what_cannot_be_told_apart_is_exported_every_time(tmp_path, exports):
    module = network(0)
    module.rule = lambda x: x
    assert structure(module) is None
    assert written(module, tmp_path / "a.onnx") == written(module, tmp_path / "b.onnx")
    assert len(exports) == 2


def test_templates_hold_no_weights_and_are_few(tmp_path, exports, monkeypatch):
    monkeypatch.setattr(onnx_graph, "KEPT", 2)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(4, 5000), nn.Linear(5000, 3)).eval()
    written(wide, tmp_path / "a.onnx")
    (template,) = onnx_graph._templates.values()
    assert len(template) < 4 * 5000
    for padding in (2, 1, 2):
        written(network(0, padding), tmp_path / "a.onnx")
    assert len(onnx_graph._templates) == 2
    assert len(exports) == 3
