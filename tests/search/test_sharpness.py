"""Sharpness against quadratics and dense Hessians; gaps of networks whose alphas have decided already."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.nn.batchnorm import recalibrate
from netwright.search import spaces
from netwright.search.sharpness import (
    SharpnessAware,
    alpha_hessian_eig,
    discretisation_gap,
    discretised,
    rho_sharpness,
)
from netwright.search.strengths import supernet_accuracy
from netwright.search.supernet import Choice, SoftmaxGate, Supernet

SPACE = spaces.get("micro-darts-2-shared")
BATCH = (torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))


class Bowl(nn.Module):
    """Parameters of a quadratic: alphas in two pieces, and weights."""

    def __init__(self, alpha, weights=(0.0,)):
        super().__init__()
        values = torch.tensor(alpha, dtype=torch.float64)
        self.arch = nn.ParameterList([nn.Parameter(values[:2]), nn.Parameter(values[2:])])
        self.w = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def arch_parameters(self):
        return list(self.arch)

    def weight_parameters(self):
        return [self.w]


def quadratic(matrix):
    """1/2 (a, w)^T A (a, w), or of a alone when the matrix is no larger."""

    def loss(module, batch, part):
        point = torch.cat([*module.arch, module.w])[: len(matrix)]
        return point @ matrix @ point / 2

    return loss


def batches(number=2, size=8):
    source = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 1, 8, 8, generator=source), torch.randint(3, (size,), generator=source))
        for _ in range(number)
    ]


def trained(seed=0):
    """A small supernet whose alphas are far apart, in float64."""
    net = SPACE.supernet(1, 3, channels=2, seed=seed).double()
    with torch.no_grad():
        for number, alpha in enumerate(net.arch_parameters()):
            alpha.copy_(torch.randn(len(alpha), generator=torch.Generator().manual_seed(number)))
    return net


def in_float64(found):
    return [(x.double(), y) for x, y in found]


@pytest.mark.parametrize("n", [4, 10])
def test_the_largest_curvature_of_a_quadratic(n):
    bowl = Bowl([1.0] * n)
    found = alpha_hessian_eig(bowl, [BATCH], 2, objective=quadratic(torch.arange(1.0, n + 1).diag().double()))
    assert found.tolist() == pytest.approx([n, n - 1], abs=1e-4)


class FiveAlphas(Supernet):
    """One choice of five operations in front of a classifier."""

    def __init__(self):
        super().__init__(SPACE, 3)
        torch.manual_seed(0)
        operations = {f"conv {i}": nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh()) for i in range(5)}
        self.edge = Choice(operations, key="edge", gate=SoftmaxGate())
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 3)
        self.initialise_arch(0, (1, 8, 8))

    def forward(self, x):
        return self.head(self.norm(self.edge(x, self.arch["edge"])).square().mean((2, 3)))


def test_curvature_equals_the_dense_hessian():
    net, val = FiveAlphas().double(), in_float64([*batches(2), *batches(1, 4)])
    (alpha,) = net.arch_parameters()

    def loss(value):
        total = 0.0
        for x, labels in val:
            logits = torch.func.functional_call(net, {"arch.edge": value}, (x,))
            total = total + functional.cross_entropy(logits, labels, reduction="sum")
        return total / sum(len(labels) for _, labels in val)

    wanted = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, alpha.detach())).flip(0)
    state = copy.deepcopy(net.state_dict())
    net.load_state_dict(state)
    net.eval()
    found = alpha_hessian_eig(net, val, 3)
    torch.testing.assert_close(found, wanted[:3], rtol=1e-3, atol=1e-7)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
    assert not any(part.training for part in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("wrt", "kept"), [("alpha", [1.0, 1, 1, 0, 0]), ("weights", [0.0, 0, 0, 1, 1]), ("both", [1.0] * 5)]
)
def test_the_first_step_of_a_quadratic(wrt, kept):
    source = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 5, dtype=torch.float64, generator=source)
    matrix = matrix @ matrix.T
    bowl = Bowl([0.3, -0.2, 0.5], weights=(1.0, -0.7))
    point = torch.tensor([0.3, -0.2, 0.5, 1.0, -0.7], dtype=torch.float64)
    slope = (matrix @ point) * torch.tensor(kept)
    u = slope / slope.norm()
    rho = 0.3
    found = rho_sharpness(bowl, [BATCH], rho, wrt, objective=quadratic(matrix))
    assert found == pytest.approx((rho * slope.norm() + rho**2 * u @ matrix @ u / 2).item(), rel=1e-12)
    more = rho_sharpness(bowl, [BATCH], rho, wrt, n_steps=20, objective=quadratic(matrix))
    assert more >= found - 1e-12
    assert torch.equal(torch.cat([*bowl.arch, bowl.w]), point)


def test_more_steps_find_the_worst_direction():
    matrix = torch.diag(torch.tensor([9.0, 1.0, 1.0])).double()
    bowl = Bowl([0.01, 0.0, 1.0])  # the gradient points along the third axis, the curvature along the first
    one, many = (rho_sharpness(bowl, [BATCH], 1.0, n_steps=n, objective=quadratic(matrix)) for n in (1, 30))
    circle = torch.linspace(0, 2 * torch.pi, 100_001, dtype=torch.float64)
    points = torch.stack([0.01 + circle.cos(), 0 * circle, 1 + circle.sin()])
    largest = ((matrix @ points * points).sum(0) / 2).max() - (matrix[0, 0] * 0.01**2 + 1) / 2
    assert one < 0.7 * largest.item()
    assert many == pytest.approx(largest.item(), rel=1e-6)


def test_a_flat_loss_has_no_sharpness():
    assert rho_sharpness(Bowl([0.0, 0.0, 0.0]), [BATCH], objective=quadratic(torch.eye(3).double())) == 0.0


def test_sharpness_of_a_supernet_is_the_rise_of_its_loss():
    net, val = trained(), in_float64(batches())
    alphas = net.arch_parameters()
    x, labels = torch.cat([b[0] for b in val]), torch.cat([b[1] for b in val])

    def loss():
        each = [functional.cross_entropy(net(x), labels) for x, labels in val]
        return sum(each) / len(each)

    start = loss()
    slopes = torch.autograd.grad(start, alphas)
    norm = torch.cat(slopes).norm()
    before = [a.detach().clone() for a in alphas]
    found = rho_sharpness(net, val, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(alphas, before, strict=True))
    with torch.no_grad():
        for alpha, slope in zip(alphas, slopes, strict=True):
            alpha.add_(0.1 * slope / norm)
    assert found == pytest.approx((loss() - start).item(), rel=1e-9)
    assert found > 0.05 * 0.1 * norm.item()
    assert len(x) == len(labels) == 16


def decided(genotype, size=1e4):
    """A supernet whose alphas are one-hot: the genotype's operation, or `none` on edges that it gives up."""
    net, decisions = SPACE.supernet(1, 3, channels=2, seed=0), SPACE.decisions(genotype)
    for key, choice in net.keyed_choices().items():
        net.arch[key].data.zero_()[choice.names.index(decisions.get(key, "none"))] = size
    return net


@pytest.mark.parametrize("options", [{}, {"statistics": "running"}, {"statistics": "running", "recalibrate_on": 1}])
def test_a_supernet_that_has_decided_has_no_gap(options):
    genotype = SPACE.random(torch.Generator().manual_seed(3))
    net = decided(genotype)
    net(batches()[0][0])
    if options.get("recalibrate_on"):
        options = {**options, "recalibrate_on": batches()}
    gap = discretisation_gap(net, genotype, batches(), **options)
    assert gap["loss gap"] == pytest.approx(0.0, abs=1e-6)
    assert gap["accuracy gap"] == 0.0
    other = SPACE.random(torch.Generator().manual_seed(4))
    assert abs(discretisation_gap(net, other, batches(), **options)["loss gap"]) > 1e-3


def test_a_chain_that_has_decided_has_no_gap():
    space = spaces.get("micro-chain")
    net, genotype = space.supernet(1, 3, seed=0), space.random(torch.Generator().manual_seed(0))
    decisions = space.decisions(genotype)
    for key, choice in net.keyed_choices().items():
        net.arch[key].data.zero_()[choice.names.index(decisions[key])] = 1e4
    assert discretisation_gap(net, genotype, batches())["loss gap"] == pytest.approx(0.0, abs=1e-6)
    assert abs(discretisation_gap(net, space.random(torch.Generator().manual_seed(1)), batches())["loss gap"]) > 1e-4


def test_gaps_are_those_of_separate_passes():
    net, val = trained().float(), batches()
    for x, _ in val:
        net(x)
    genotype, state = net.derive(), copy.deepcopy(net.state_dict())
    made = discretised(net, genotype)
    x, labels = torch.cat([b[0] for b in val]), torch.cat([b[1] for b in val])

    found = discretisation_gap(net, genotype, val)
    assert found["supernet accuracy"] == supernet_accuracy(net, val)
    assert found["discrete accuracy"] == supernet_accuracy(made, val)

    found = discretisation_gap(net, genotype, val, statistics="running", recalibrate_on=val)
    wanted = []
    for network in (net, made):
        other = recalibrate(copy.deepcopy(network), val).eval()
        with torch.no_grad():
            logits = other(x)
        wanted += [functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()]
    names = ("supernet loss", "supernet accuracy", "discrete loss", "discrete accuracy")
    assert [found[name] for name in names] == pytest.approx(wanted, abs=1e-6)
    assert found["loss gap"] == pytest.approx(wanted[2] - wanted[0], abs=1e-6)
    assert found["accuracy gap"] == pytest.approx(wanted[1] - wanted[3], abs=1e-6)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())


def test_a_sharpness_aware_step_takes_the_gradient_at_the_worst_place_nearby():
    matrix = torch.diag(torch.tensor([4.0, 1.0, 2.0])).double()
    bowl, rho, lr = Bowl([1.0, -1.0, 0.5]), 0.4, 0.1
    optimizer = torch.optim.SGD(bowl.arch_parameters(), lr=lr)
    figures = SharpnessAware(rho).step(bowl, quadratic(matrix), None, optimizer, None, None)
    a = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    slope = matrix @ a
    wanted = a - lr * matrix @ (a + rho * slope / slope.norm())
    assert torch.allclose(torch.cat([*bowl.arch]), wanted)
    assert figures["val_loss"] == pytest.approx((a @ matrix @ a / 2).item())  # at the place itself


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: alpha_hessian_eig(net, [BATCH], 0), "k must lie in"),
        (lambda net: rho_sharpness(net, [BATCH], 0.0), "rho must be > 0 and finite, got 0"),
        (lambda net: rho_sharpness(net, [BATCH], wrt="all"), "wrt must be one of alpha, weights, both, got 'all'"),
        (lambda net: rho_sharpness(net, [BATCH], n_steps=0), "n_steps must be >= 1, got 0"),
        (lambda net: SharpnessAware(0.0), "rho must be > 0"),
        (lambda net: discretisation_gap(net, net.derive(), [BATCH], statistics="mean"), "statistics must be one of"),
        (lambda net: discretisation_gap(net, net.derive(), [BATCH], recalibrate_on=[BATCH]), "must be 'running'"),
        (lambda net: discretised(net, spaces.get("micro-darts").random(torch.Generator())), "must be of space"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(SPACE.supernet(1, 3, channels=2))


def test_batches_must_be_there_each_time():
    net = SPACE.supernet(1, 3, channels=2)
    with pytest.raises(RuntimeError, match="val must hold at least 1 batch"):
        rho_sharpness(net, [])
    with pytest.raises(RuntimeError, match="give them again"):
        alpha_hessian_eig(net, iter(batches()))
