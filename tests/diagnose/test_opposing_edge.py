"""Sharpness against dense Hessians, limits of stability against the optimisers themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional

from netwright.diagnose.opposing_signals import (
    adam_preconditioner,
    edge,
    gradient_opposition,
    sharpness,
    stability_limit,
)
from netwright.diagnose.opposing_signals.opposition import agglomerate, clusters, mean_gradient
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded, stream

LOSS = nn.CrossEntropyLoss(reduction="none")


def symmetric(size: int) -> torch.Tensor:
    a = torch.randn(size, size, generator=stream(0, "a"), dtype=torch.float64)
    return (a + a.T) / 2


class Quadratic(nn.Module):
    """The loss x' A x / 2 whatever the input is."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.x = nn.Parameter(torch.ones(len(matrix), dtype=matrix.dtype))
        self.matrix = matrix

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (0.5 * self.x @ self.matrix @ self.x).expand(len(inputs))


def same(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return output


NOTHING = torch.zeros(3, 1), torch.zeros(3)


def dense(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    names = [name for name, _ in net.named_parameters()]
    shapes = [param.shape for param in net.parameters()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return functional.cross_entropy(functional_call(net, values, (x,)), y)

    return hessian(loss)(nn.utils.parameters_to_vector(net.parameters()).detach())


@pytest.mark.parametrize("shift", [0.0, -30.0])
def test_a_quadratic_has_the_largest_eigenvalue_of_its_matrix(shift):
    matrix = symmetric(20) + shift * torch.eye(20, dtype=torch.float64)  # with the shift all of them are negative
    value, vector = sharpness(Quadratic(matrix), same, NOTHING)
    values, vectors = torch.linalg.eigh(matrix)
    assert value == pytest.approx(float(values[-1]), rel=1e-4)
    assert abs(float(vector @ vectors[:, -1])) == pytest.approx(1, abs=1e-3)


def test_sharpness_is_what_pyhessian_gave():
    """A figure that is kept, since the package is not always there."""
    kept = json.loads((Path(__file__).parents[1] / "oracles" / "pyhessian.json").read_text())
    with seeded(0, "init"):
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)).double()
    value, _ = sharpness(net, LOSS, (x, torch.arange(60) % 3), iters=200, tolerance=1e-6)
    assert value == pytest.approx(kept["top"], rel=1e-4)


def test_an_indefinite_hessian_has_the_algebraically_largest_one():
    diagonal = torch.tensor([-9.0, -4.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    value, vector = sharpness(Quadratic(torch.diag(diagonal)), same, NOTHING)
    assert value == pytest.approx(2.0, rel=1e-4)
    assert vector.abs().argmax() == 3


def test_logistic_regression_has_that_of_the_dense_hessian():
    with seeded(0, "init"):
        net = nn.Linear(6, 3)
    x, y = torch.randn(50, 6, generator=stream(0, "x")), torch.arange(50) % 3
    wanted = float(torch.linalg.eigvalsh(dense(net, x, y))[-1])
    assert sharpness(net, LOSS, (x, y))[0] == pytest.approx(wanted, rel=1e-3)
    pieces = [(x[:7], y[:7]), (x[7:], y[7:])]
    assert sharpness(net, LOSS, pieces)[0] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("limits", [{}, {"KEPT_BYTES": 0}, {"CHUNK_BYTES": 1, "KEPT_BYTES": 0}, {"BASIS_BYTES": 1}])
def test_chunks_and_restarts_give_the_same(monkeypatch, limits):
    for name, value in limits.items():
        monkeypatch.setattr(edge, name, value)
    with seeded(0, "init"):
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 3)).eval()
    x, y = torch.randn(20, 6, generator=stream(0, "x")), torch.arange(20) % 3
    wanted = float(torch.linalg.eigvalsh(dense(net, x, y))[-1])
    net.train()
    assert sharpness(net, LOSS, (x, y), iters=60)[0] == pytest.approx(
        wanted, rel=1e-2 if "BASIS_BYTES" in limits else 1e-3
    )
    assert all(part.training for part in net.modules())


def test_a_warm_start_takes_few_products_and_leaves_a_wrong_direction(monkeypatch):
    matrix = symmetric(40)
    matrix[0, 0] += 20
    products = []
    build = edge._mean_hessian

    def counted(*arguments):
        product = build(*arguments)
        return lambda v: products.append(1) or product(v)

    monkeypatch.setattr(edge, "_mean_hessian", counted)
    values, vectors = torch.linalg.eigh(matrix)
    _, vector = sharpness(Quadratic(matrix), same, NOTHING)
    cold = len(products)
    products.clear()
    nearby = matrix + 0.05 * symmetric(40).roll(1, 0).roll(1, 1)
    value, _ = sharpness(Quadratic(nearby), same, NOTHING, v0=vector)
    assert len(products) <= min(5, cold - 1)
    assert value == pytest.approx(float(torch.linalg.eigvalsh(nearby)[-1]), rel=1e-4)
    # Exactly the direction of another eigenvalue: nothing but a little noise leads out of it.
    value, _ = sharpness(Quadratic(matrix), same, NOTHING, v0=vectors[:, 20])
    assert value == pytest.approx(float(values[-1]), rel=1e-4)


def test_a_preconditioner_is_that_of_the_scaled_matrix():
    matrix = symmetric(12) + 6 * torch.eye(12, dtype=torch.float64)
    scale = torch.rand(12, generator=stream(0, "p"), dtype=torch.float64) + 0.2
    value, vector = sharpness(Quadratic(matrix), same, NOTHING, preconditioner=scale)
    root = scale.rsqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * matrix * root)
    assert value == pytest.approx(float(values[-1]), rel=1e-4)
    wanted = root * vectors[:, -1]
    assert abs(float(vector @ wanted / wanted.norm())) == pytest.approx(1, abs=1e-3)


def test_nothing_of_the_model_changes():
    with seeded(0, "init"):
        net = SmallConvNet((4,), 0, 3, 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.random.get_rng_state()
    x, y = torch.randn(6, 1, 4, 4, generator=stream(0, "x")), torch.arange(6) % 3
    sharpness(net, LOSS, (x, y))
    mean_gradient(net, LOSS, x, y)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(param.grad is None for param in net.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"iters": 0}, "iters must be >= 1, got 0"),
        ({"tolerance": 0.0}, "tolerance must be > 0"),
        ({"v0": torch.ones(3)}, "v0 must hold 5 numbers"),
        ({"preconditioner": -torch.ones(5)}, "preconditioner must be > 0, got -1"),
    ],
)
def test_refusals(options, told):
    with pytest.raises(ValueError, match=told):
        sharpness(Quadratic(symmetric(5)), same, NOTHING, **options)
    frozen = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="at least 1 parameter that is trained"):
        sharpness(frozen, same, NOTHING)
    with pytest.raises(ValueError, match="at least 1 example, got 0"):
        sharpness(nn.Linear(2, 3), LOSS, (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)))


def by_steps(make, curvature: float, steps: int = 400) -> float:
    """|x| after many steps on curvature x^2 / 2, from 1."""
    x = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = make([x])
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * curvature * x.square()).sum().backward()
        optimizer.step()
    return abs(float(x.detach()))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.5, dampening=0.5),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    ],
    ids=["plain", "heavy ball", "dampened", "nesterov"],
)
def test_limits_are_where_steps_begin_to_grow(make):
    limit = stability_limit(make([nn.Parameter(torch.ones(1))]))
    assert by_steps(make, 0.98 * limit) < 1
    assert by_steps(make, 1.02 * limit) > 1e2


def test_adam_is_stable_below_its_limit_of_the_preconditioned_curvature():
    """At a fixed second moment Adam is dampened momentum on a scaled problem."""
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    adam = torch.optim.Adam([x], lr=0.1, betas=(0.9, 1 - 1e-12), eps=1e-12)
    slopes = torch.tensor([1.0, 100.0], dtype=torch.float64)
    for _ in range(3):
        adam.zero_grad()
        (x * slopes).sum().backward()
        adam.step()
    found = adam_preconditioner(adam)
    assert torch.allclose(found, (1 - 0.9**3) * slopes)
    before = x.detach().clone()
    adam.zero_grad()
    (x * slopes).sum().backward()
    adam.step()
    moved = before - x.detach()
    # The next step divides the mean gradient by P at one step more.
    mean = adam.state[x]["exp_avg"]
    assert torch.allclose(moved, 0.1 * mean / adam_preconditioner(adam))
    assert stability_limit(adam) == pytest.approx(380)
    assert stability_limit(torch.optim.AdamW([x], lr=0.2)) == pytest.approx(190)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_amsgrad_divides_by_the_largest_mean_square(kind):
    x = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    adam = kind([x], lr=0.1, betas=(0.9, 0.9), amsgrad=True, weight_decay=0.0)
    for size in (10.0, 1.0, 0.1, 0.1):
        before = x.detach().clone()
        adam.zero_grad()
        (x * torch.tensor([size, 1.0], dtype=torch.float64)).sum().backward()
        adam.step()
    assert torch.allclose(before - x.detach(), 0.1 * adam.state[x]["exp_avg"] / adam_preconditioner(adam))


def test_optimisers_without_a_limit():
    w = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="must be SGD, Adam or AdamW, got Adagrad"):
        stability_limit(torch.optim.Adagrad([w]))
    groups = [{"params": [w], "lr": 0.1}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.2}]
    with pytest.raises(ValueError, match="must share learning rate"):
        stability_limit(torch.optim.SGD(groups))
    with pytest.raises(ValueError, match="must have made a step"):
        adam_preconditioner(torch.optim.Adam([w]))


def test_opposition_of_a_linear_model():
    net = nn.Linear(3, 1, bias=False)
    loss = lambda output, target: target * output[:, 0]  # noqa: E731  # whose gradient is target * x
    a = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]), torch.tensor([1.0, 1.0])
    b = torch.tensor([[1.0, 5.0, 0.0]]), torch.tensor([-1.0])
    assert torch.allclose(mean_gradient(net, loss, *a), torch.tensor([2.0, 1.0, 0.0]))
    assert gradient_opposition(net, loss, a, b) == pytest.approx(
        float(functional.cosine_similarity(torch.tensor([2.0, 1, 0]), torch.tensor([-1.0, -5, 0]), dim=0))
    )
    assert gradient_opposition(net, loss, a, b, torch.tensor([0.0, 4.0, 0.0])) == pytest.approx(-5)
    assert gradient_opposition(net, loss, a, a) == pytest.approx(1)
    with pytest.raises(ValueError, match="direction must be 3 finite numbers"):
        gradient_opposition(net, loss, a, b, torch.zeros(3))
    with pytest.raises(ValueError, match="at least 1 example, got 0"):
        gradient_opposition(net, loss, a, (b[0][:0], b[1][:0]))


@pytest.mark.parametrize("by", ["features", "gradients"])
def test_clusters_are_those_that_share_a_direction(by):
    axes = torch.eye(4)
    x = torch.cat([axes[[0]] * torch.tensor([[1.0], [2.0]]), axes[[2]].expand(3, 4), axes[[1]]])
    x = x + 0.05 * torch.randn(6, 4, generator=stream(0, "x")).abs()
    found = clusters(nn.Sequential(nn.Identity(), nn.Linear(4, 2, bias=False)), LOSS, x, torch.zeros(6).long(), by=by)
    assert found.tolist() == [1, 1, 0, 0, 0, 2]


def test_clusters_do_not_depend_on_the_order():
    rows = torch.randn(12, 5, generator=stream(0, "rows"))
    order = torch.randperm(12, generator=stream(0, "order"))
    a, b = agglomerate(rows, 0.3), agglomerate(rows[order], 0.3)
    assert torch.equal(a[order][:, None] == a[order], b[:, None] == b)
    assert agglomerate(rows[:1], 0.3).tolist() == [0]


@pytest.mark.parametrize(
    ("options", "told"),
    [({"by": "pixels"}, "by must be one of features, gradients, got 'pixels'"), ({"threshold": 1.0}, r"\(0, 1\)")],
)
def test_clusters_that_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        clusters(nn.Linear(2, 2), LOSS, torch.ones(2, 2), torch.zeros(2).long(), **options)
