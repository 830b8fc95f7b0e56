"""RARTS and its step: the solvable model in closed form, hand-written updates, resumption, refusals."""

import copy
import io
import itertools
import json
import math

import pytest
import torch
from searches import equal, images
from torch import nn

from netwright.data.tensors import Batches
from netwright.search import spaces
from netwright.search.bilevel import FirstOrder, SecondOrder
from netwright.search.objective import CostPenalty, TaskLoss
from netwright.search.perturbation import PerturbationSelector
from netwright.search.rarts import RARTS
from netwright.search.relaxed_split import RelaxedSplit
from netwright.search.searcher import Searcher
from netwright.search.single_level import SingleLevel
from netwright.search.stages import Stage
from netwright.search.supernet import FixedGate, MaskedGate, SoftmaxGate
from netwright.seeding import stream

DOUBLE = torch.float64


class Scalars(nn.Module):
    """The solvable model: L_val = a y - 2 a + 1, L_train = w^2 - 2 a w + a^2; the bilevel solution is a = w = 1."""

    def __init__(self, a=2.0, w=-2.0):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=DOUBLE))
        self.w = nn.Parameter(torch.tensor(w, dtype=DOUBLE))


def solvable(net, batch, part):
    return net.a * net.w - 2 * net.a + 1 if part == "alpha" else net.w**2 - 2 * net.a * net.w + net.a**2


def sgd(*parameters, lr=0.01, **options):
    return torch.optim.SGD(parameters, lr=lr, **options)


def run(step, lr, steps, net=None):
    """The module after plain steps, and L before each of them."""
    net = net or Scalars()
    w_opt, a_opt = sgd(net.w, lr=lr), sgd(net.a, lr=lr)
    path = []
    for _ in range(steps):
        path.append(step.step(net, solvable, w_opt, a_opt, None, None, clip=None)["objective"])
    return net, path


def limit(lam, beta):
    a = 1 / (1 - 1 / (4 * lam) - 1 / (2 * beta))
    return a, a * (1 - 1 / (2 * lam)), a * (1 - 1 / (2 * lam) - 1 / beta)


def hessian(lam, beta):
    """Of L in (w, y, a)."""
    return torch.tensor([[2 * lam + beta, -beta, -2 * lam], [-beta, beta, 1.0], [-2 * lam, 1.0, 2 * lam]], dtype=DOUBLE)


def iteration(lam, beta, lr, fused):
    """What a step does to the distance of (w, y, a) from the limit; in the exact order each sees the one before."""
    gradient, whole = hessian(lam, beta), torch.eye(3, dtype=DOUBLE)
    if fused:
        return whole - lr * gradient
    w, y, a = (whole - lr * torch.outer(unit, row) for unit, row in zip(whole, gradient, strict=True))
    return a @ y @ w


class TestSolvableModel:
    def test_the_first_step_by_hand(self):
        step = RelaxedSplit(10, 10, fused=False)
        net, _ = run(step, 0.01, 1)
        assert net.w.item() == pytest.approx(-1.2, abs=1e-12)
        assert step.second["w"].item() == pytest.approx(-1.94, abs=1e-12)
        assert net.a.item() == pytest.approx(1.3994, abs=1e-12)

    def test_the_first_fused_step_by_hand(self):
        step = RelaxedSplit(10, 10)
        net, _ = run(step, 0.01, 1)
        assert net.w.item() == pytest.approx(-2 + 0.01 * 80, abs=1e-12)
        assert step.second["w"].item() == pytest.approx(-2 - 0.01 * 2, abs=1e-12)
        assert net.a.item() == pytest.approx(2 - 0.01 * (80 - 4), abs=1e-12)

    @pytest.mark.parametrize(
        ("lam", "beta", "fused", "lr", "a"),
        [
            (10, 10, False, 0.01, 1.081081),
            (10, 10, True, 0.01, 1.081081),
            (1, 5, False, 0.01, 1.538462),
            (1, 5, True, 0.01, 1.538462),
            (100, 100, False, 0.005, 1.007557),
            (100, 100, True, 0.003, 1.007557),
        ],
    )
    def test_every_step_is_that_of_the_closed_form_and_l_never_rises(self, lam, beta, fused, lr, a):
        """L is quadratic, so that n steps are the n-th power of a matrix, whose fixed point is the limit."""
        step, steps = RelaxedSplit(lam, beta, fused=fused), 200
        net, path = run(step, lr, steps)
        end = torch.tensor(limit(lam, beta), dtype=DOUBLE)[[1, 2, 0]]
        moved = iteration(lam, beta, lr, fused)
        wanted = end + torch.linalg.matrix_power(moved, steps) @ (torch.tensor([-2.0, -2, 2], dtype=DOUBLE) - end)
        assert [net.w.item(), step.second["w"].item(), net.a.item()] == pytest.approx(wanted.tolist(), abs=1e-9)
        assert torch.linalg.eigvals(moved).abs().max() < 1
        assert end[2].item() == pytest.approx(a, abs=1e-6)
        assert end[1].item() == pytest.approx(2 - a, abs=1e-6)
        assert all(after <= before + 1e-12 for before, after in itertools.pairwise(path))
        assert path[0] > path[-1] + 0.1

    @pytest.mark.parametrize("fused", [False, True])
    def test_it_ends_at_the_limit(self, fused):
        step = RelaxedSplit(10, 10, fused=fused)
        net, _ = run(step, 0.04, 600)
        assert [net.a.item(), net.w.item(), step.second["w"].item()] == pytest.approx(limit(10, 10), abs=1e-6)

    def test_limits_tend_to_the_true_solution(self):
        gaps = [max(abs(v - 1) for v in limit(k, k)) for k in (10, 100, 1000)]
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[-1] < 1.3e-3

    @pytest.mark.parametrize("fused", [False, True])
    def test_the_limit_is_stationary(self, fused):
        a, w, y = limit(10, 10)
        net, step = Scalars(a, w), RelaxedSplit(10, 10, fused=fused)
        run(step, 1e-9, 1, net)
        step._weights["w"].data.fill_(y)
        run(step, 0.01, 50, net)
        assert [net.a.item(), net.w.item(), step.second["w"].item()] == pytest.approx([a, w, y], abs=1e-9)

    @pytest.mark.parametrize(("lam", "beta", "bound"), [(10, 10, 0.0420), (100, 100, 0.00422), (1, 5, 0.172)])
    def test_the_bound_of_the_fused_step_is_that_of_gradient_descent(self, lam, beta, bound):
        exact = 2 / float(torch.linalg.eigvalsh(hessian(lam, beta)).max())
        assert exact == pytest.approx(bound, rel=5e-3)
        _, path = run(RelaxedSplit(lam, beta), 0.99 * exact, 300)
        assert all(after <= before + 1e-9 for before, after in itertools.pairwise(path))
        _, path = run(RelaxedSplit(lam, beta), 1.01 * exact, 500)
        assert path[-1] > path[250]

    @pytest.mark.parametrize(("lam", "beta"), [(10, 10), (100, 100), (1, 5)])
    def test_the_exact_order_descends_up_to_its_larger_bound(self, lam, beta):
        bound = 2 / (2 * lam + beta)
        _, path = run(RelaxedSplit(lam, beta, fused=False), 0.99 * bound, 300)
        assert all(after <= before + 1e-9 for before, after in itertools.pairwise(path))
        assert bound > 2 / float(torch.linalg.eigvalsh(hessian(lam, beta)).max())

    @pytest.mark.parametrize("fused", [False, True])
    def test_steps_beyond_the_bound_end_in_an_error(self, fused):
        """In the exact order 0.01 is only just too long, 1 % a step, so the start is already far out."""
        step, net = RelaxedSplit(100, 100, fused=fused), Scalars(a=2e150, w=-2e150)
        with pytest.raises(FloatingPointError, match="must be finite"):
            run(step, 0.01, 5000, net)
        assert abs(net.w.item()) > 1e152

    def test_l_is_convex_where_the_formula_says(self):
        for lam, beta in ((10, 10), (1, 5), (0.3, 2), (0.25, 100), (1, 0.6)):
            convex = bool((torch.linalg.eigvalsh(hessian(lam, beta)) > 0).all())
            assert convex == (1 / (4 * lam) + 1 / (2 * beta) < 1)
            determinant = float(torch.linalg.det(hessian(lam, beta)))
            assert determinant == pytest.approx(4 * lam * beta - 2 * lam - beta)

    @pytest.mark.parametrize(("step", "end"), [(FirstOrder(), 2.0), (SecondOrder(0.1), 2 / 1.2), (SecondOrder(0.5), 1)])
    def test_darts_ends_elsewhere_from_the_same_start(self, step, end):
        net = Scalars()
        w_opt, a_opt = sgd(net.w, lr=0.1), sgd(net.a, lr=0.1)
        for _ in range(800):
            step.step(net, solvable, w_opt, a_opt, None, None, clip=None)
        assert [net.a.item(), net.w.item()] == pytest.approx([end, end], abs=1e-6)

    def test_without_tie_and_training_loss_it_alternates_on_the_validation_loss(self):
        step = RelaxedSplit(0.0, 0.0, fused=False)
        net, _ = run(step, 0.1, 5)
        a, y = 2.0, -2.0
        for _ in range(5):
            y -= 0.1 * a
            a -= 0.1 * (y - 2)
        assert (net.w.item(), step.second["w"].item(), net.a.item()) == pytest.approx((-2.0, y, a), abs=1e-12)

    def test_a_rise_of_l_is_reported_when_asked(self, monkeypatch):
        said = []
        monkeypatch.setattr("netwright.search.relaxed_split.warn", said.append)
        run(RelaxedSplit(10, 10, monotone_check=True), 0.03, 100)
        assert not said
        run(RelaxedSplit(10, 10, monotone_check=False), 0.1, 10)
        assert not said
        run(RelaxedSplit(10, 10, monotone_check=True), 0.1, 10)
        assert said
        assert "objective rose from" in said[0]


class Mixed(nn.Module):
    """Two layers whose activation is a mixture weighted by softmax(alpha)."""

    def __init__(self, seed=0, norm=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
            self.arch = nn.ParameterDict({"edge": nn.Parameter(0.3 * torch.randn(3))})
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.double()

    def forward(self, x):
        return self.head(x, dict(self.named_parameters()), self.arch["edge"])

    def head(self, x, weights, alpha):
        z = self.norm(nn.functional.linear(x, weights["first.weight"], weights["first.bias"]))
        m = alpha.softmax(-1)
        z = m[0] * torch.tanh(z) + m[1] * torch.sin(z) + m[2] * torch.sigmoid(z)
        return nn.functional.linear(z, weights["last.weight"], weights["last.bias"])

    def weight_parameters(self):
        return [p for n, p in self.named_parameters() if not n.startswith("arch")]


def cross_entropy(net, batch, part):
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def draws(seed=1, n=16, count=2):
    generator = stream(seed, "draws")
    return [
        (torch.randn(n, 5, generator=generator, dtype=DOUBLE), torch.randint(3, (n,), generator=generator))
        for _ in range(count)
    ]


def by_hand(batches, lam, beta, lrs, fused):
    """The three updates written out, on plain tensors, with no code of the package."""
    net = Mixed()
    start = {n: p.detach().clone() for n, p in net.named_parameters() if not n.startswith("arch")}
    w, y = ({n: p.clone().requires_grad_() for n, p in start.items()} for _ in range(2))
    alpha = net.arch["edge"].detach().clone().requires_grad_()

    def loss(weights, batch):
        return nn.functional.cross_entropy(net.head(batch[0], weights, alpha), batch[1])

    def slope(weights, batch):
        return dict(zip(weights, torch.autograd.grad(loss(weights, batch), list(weights.values())), strict=True))

    def along(weights, batch):
        return torch.autograd.grad(loss(weights, batch), alpha)[0]

    for train, val in batches:
        old_w = {n: p.detach().clone() for n, p in w.items()}
        at_old = lam * along(w, train) + along(y, val)
        gw, gy = slope(w, train), slope(y, val)
        with torch.no_grad():
            for n in w:
                w[n] -= lrs[0] * (lam * gw[n] + beta * (w[n] - y[n]))
            for n in y:
                y[n] -= lrs[1] * (gy[n] + beta * (y[n] - (old_w if fused else w)[n]))
        ga = at_old if fused else lam * along(w, train) + along(y, val)
        with torch.no_grad():
            alpha -= lrs[2] * ga
    return w, y, alpha


class TestStep:
    @pytest.mark.parametrize("fused", [False, True])
    def test_it_equals_updates_written_by_hand(self, fused):
        batches = [tuple(draws(seed)) for seed in range(4)]
        net, step = Mixed(), RelaxedSplit(0.7, 0.3, fused=fused, y_scale=0.5)
        w_opt, a_opt = sgd(*net.weight_parameters(), lr=0.2), sgd(net.arch["edge"], lr=0.3)
        for train, val in batches:
            step.step(net, cross_entropy, w_opt, a_opt, train, val, clip=None)
        w, y, alpha = by_hand(batches, 0.7, 0.3, (0.2, 0.1, 0.3), fused)
        for name in w:
            assert float((w[name] - net.get_parameter(name)).detach().abs().max()) < 1e-12
            assert float((y[name] - step.second[name]).detach().abs().max()) < 1e-12
        assert float((alpha - net.arch["edge"]).detach().abs().max()) < 1e-12
        assert float((w["first.weight"] - y["first.weight"]).detach().abs().max()) > 1e-4

    def test_symmetric_halves_keep_the_fused_sets_equal_and_the_exact_ones_nearly(self):
        (batch,) = draws(count=1)
        gaps = {}
        for fused, lr in ((True, 0.1), (False, 0.1), (False, 0.05)):
            net, step = Mixed(), RelaxedSplit(1.0, 0.5, fused=fused)
            w_opt, a_opt = sgd(*net.weight_parameters(), lr=lr), sgd(net.arch["edge"], lr=lr)
            for _ in range(20 if fused else 1):
                step.step(net, cross_entropy, w_opt, a_opt, batch, batch, clip=None)
            gaps[fused, lr] = max(
                float((net.get_parameter(n) - y).detach().abs().max()) for n, y in step.second.items()
            )
        assert gaps[True, 0.1] < 1e-12
        assert gaps[False, 0.1] > 1e-6
        assert gaps[False, 0.1] / gaps[False, 0.05] == pytest.approx(4, rel=1e-6)  # O(beta eta^2)

    def test_a_strong_tie_is_single_level_training(self):
        train, val = draws()
        tied, free = Mixed(), Mixed()
        step = RelaxedSplit(1.0, 90.0)
        w_opt, a_opt = sgd(*tied.weight_parameters(), lr=0.01), sgd(tied.arch["edge"], lr=0.01)
        w_ref, a_ref = sgd(*free.weight_parameters(), lr=0.01), sgd(free.arch["edge"], lr=0.02)
        for _ in range(100):
            step.step(tied, cross_entropy, w_opt, a_opt, train, val, clip=None)
            SingleLevel().step(free, cross_entropy, w_ref, a_ref, train, val, clip=None)
        # w and y both move by half of the sum: the mean of the two losses, as the single level has it.
        moved = float((free.last.weight - Mixed().last.weight).abs().max())
        assert moved > 0.05
        middle = (tied.last.weight + step.second["last.weight"]) / 2
        assert float((middle - free.last.weight).abs().max()) < 0.02 * moved
        assert float((tied.arch["edge"] - free.arch["edge"]).abs().max()) < 1e-3

    def test_the_penalty_comes_before_clipping_and_momentum(self):
        train, val = draws()
        net, step = Mixed(), RelaxedSplit(1.0, 2.0)
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
        w_opt, a_opt = sgd(*net.weight_parameters(), **options), sgd(net.arch["edge"])
        for _ in range(3):
            step.step(net, cross_entropy, w_opt, a_opt, train, val, clip=0.2)
        w, y = net.weight_parameters(), list(step.second.values())
        before = [p.detach().clone() for p in w]
        buffers = [w_opt.state[p]["momentum_buffer"].clone() for p in w]
        own = torch.autograd.grad(cross_entropy(net, train, "weights"), w)
        grads = [g + 2.0 * (p - q).detach() for g, p, q in zip(own, w, y, strict=True)]
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        figures = step.step(net, cross_entropy, w_opt, a_opt, train, val, clip=0.2)
        assert norm > 0.2
        assert figures["weight_grad_norm"] == pytest.approx(norm, rel=1e-12)
        for p, was, grad, buffer in zip(w, before, grads, buffers, strict=True):
            wanted = was - 0.1 * (0.9 * buffer + grad * 0.2 / norm + 0.01 * was)
            assert torch.allclose(p, wanted, rtol=0, atol=1e-12)

    def test_each_set_has_memory_and_momentum_of_its_own(self):
        net, step = Mixed(), RelaxedSplit()
        w_opt, a_opt = sgd(*net.weight_parameters(), momentum=0.9), sgd(net.arch["edge"])
        for _ in range(2):
            step.step(net, cross_entropy, w_opt, a_opt, *draws())
        for name, y in step.second.items():
            w = net.get_parameter(name)
            assert w.data_ptr() != y.data_ptr()
            assert not torch.equal(w, y)
            buffers = [o.state[p]["momentum_buffer"] for o, p in ((w_opt, w), (step._optimizer, y))]
            assert buffers[0].data_ptr() != buffers[1].data_ptr()
        assert set(step.second) == {"first.weight", "first.bias", "last.weight", "last.bias"}

    @pytest.mark.parametrize("fused", [False, True])
    def test_running_statistics_follow_each_sets_own_batches(self, fused):
        net, step = Mixed(norm=True), RelaxedSplit(fused=fused)
        (train, val), fresh = draws(), copy.deepcopy(net.norm)
        other = copy.deepcopy(fresh)
        w_opt, a_opt = sgd(*net.weight_parameters()), sgd(net.arch["edge"])
        fresh(nn.functional.linear(train[0], net.first.weight, net.first.bias))
        other(nn.functional.linear(val[0], net.first.weight, net.first.bias))
        step.step(net, cross_entropy, w_opt, a_opt, train, val)
        assert torch.allclose(net.norm.running_mean, fresh.running_mean, atol=1e-12)
        assert torch.allclose(step._buffers["norm.running_mean"], other.running_mean, atol=1e-12)
        assert int(net.norm.num_batches_tracked) == int(step._buffers["norm.num_batches_tracked"]) == 1

    def test_the_number_of_passes(self):
        for fused, passes in ((True, ["weights", "alpha"]), (False, ["weights", "alpha", "weights", "alpha"])):
            net, seen = Mixed(), []

            def recording(supernet, batch, part, seen=seen):
                seen.append(part)
                return cross_entropy(supernet, batch, part)

            step = RelaxedSplit(fused=fused)
            step.step(net, recording, sgd(*net.weight_parameters()), sgd(net.arch["edge"]), *draws())
            assert seen == passes

    def test_the_first_figures_are_those_of_the_start(self):
        net, (train, val) = Mixed(), draws()
        losses = cross_entropy(net, train, "weights").item(), cross_entropy(net, val, "alpha").item()
        step = RelaxedSplit(2.0, 1.0, fused=False)
        w_opt, a_opt = sgd(*net.weight_parameters(), lr=0.1), sgd(net.arch["edge"])
        figures = step.step(net, cross_entropy, w_opt, a_opt, train, val)
        assert (figures["train_loss"], figures["val_loss"]) == pytest.approx(losses)
        assert figures["objective"] == pytest.approx(losses[1] + 2 * losses[0])
        gap = sum(float((net.get_parameter(n) - y).square().sum()) for n, y in step.second.items())
        again = step.step(net, cross_entropy, w_opt, a_opt, train, val)
        assert again["gap"] == pytest.approx(gap, rel=1e-9)
        assert gap > 0
        wanted = again["val_loss"] + 2 * again["train_loss"] + gap / 2
        assert again["objective"] == pytest.approx(wanted)

    def test_weights_that_no_loss_uses_are_left_alone_and_those_of_one_loss_are_tied(self):
        net = Mixed()
        net.spare, net.one = nn.Linear(2, 2).double(), nn.Linear(3, 1, bias=False).double()
        spare = net.spare.weight.detach().clone()

        def objective(supernet, batch, part):
            loss = cross_entropy(supernet, batch, part)
            return loss + supernet.one.weight.sum() if part == "alpha" else loss

        step = RelaxedSplit(1.0, 0.5)
        w_opt, a_opt = sgd(*net.weight_parameters(), lr=0.1), sgd(net.arch["edge"])
        one = net.one.weight.detach().clone()
        for number in range(3):
            step.step(net, objective, w_opt, a_opt, *draws(), clip=None)
            if number == 0:
                assert torch.equal(net.one.weight, one)
                assert torch.allclose(step.second["one.weight"], one - 0.1, atol=1e-12)
        assert torch.equal(net.spare.weight, spare)
        assert float((net.one.weight - one).max()) < 0  # drawn after the second set, by the tie alone

    def test_frozen_weights_stay_in_both_sets(self):
        net, step = Mixed(), RelaxedSplit()
        net.first.requires_grad_(False)
        first = net.first.weight.detach().clone()
        step.step(net, cross_entropy, sgd(*net.weight_parameters()), sgd(net.arch["edge"]), *draws())
        assert torch.equal(net.first.weight, first)
        assert torch.equal(step.second["first.weight"], first)
        assert not torch.equal(step.second["last.weight"], net.last.weight)

    def test_where_the_architecture_rests_the_weights_train_alone(self):
        ours, theirs, step = Mixed(), Mixed(), RelaxedSplit()
        w_opt, w_ref = sgd(*ours.weight_parameters(), lr=0.1), sgd(*theirs.weight_parameters(), lr=0.1)
        a_opt, (train, val) = sgd(ours.arch["edge"]), draws()
        step.step(ours, cross_entropy, w_opt, a_opt, train, val)
        theirs.load_state_dict(ours.state_dict())
        figures = step.step(ours, cross_entropy, w_opt, None, train, None)
        FirstOrder().step(theirs, cross_entropy, w_ref, None, train, None)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert step.second == {}
        assert "val_loss" not in figures
        assert step.step(ours, cross_entropy, w_opt, a_opt, train, val)["gap"] == 0.0

    def test_gradients_that_share_memory(self):
        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.w = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(3))
                self.v = nn.Parameter(torch.ones(3))

        net, step = Sum(), RelaxedSplit(1.0, 1.0)
        w_opt, a_opt = sgd(net.w, net.v, lr=0.1), sgd(net.a)

        def objective(net, batch, part):
            return net.a * (net.w + net.v).sum() * (2.0 if part == "alpha" else 1.0)

        for _ in range(2):
            step.step(net, objective, w_opt, a_opt, None, None, clip=None)
        a, w, y = 1.0, 1.0, 1.0
        for _ in range(2):
            a, w, y = a - 0.01 * (6 * w + 12 * y), w - 0.1 * (a + w - y), y - 0.1 * (2 * a + y - w)
        assert torch.allclose(net.w, torch.full((3,), w))
        assert torch.allclose(net.v, torch.full((3,), w))
        assert torch.allclose(step.second["v"], torch.full((3,), y))

    def test_the_optimiser_of_the_second_set_is_of_the_same_kind(self):
        net, step = Mixed(), RelaxedSplit(y_scale=2.0)
        w_opt = torch.optim.Adam(net.weight_parameters(), lr=1e-3, betas=(0.5, 0.9))
        step.step(net, cross_entropy, w_opt, sgd(net.arch["edge"]), *draws())
        w_opt.param_groups[0]["lr"] = 5e-4
        step.step(net, cross_entropy, w_opt, sgd(net.arch["edge"]), *draws())
        assert type(step._optimizer) is torch.optim.Adam
        group = step._optimizer.param_groups[0]
        assert (group["lr"], group["betas"]) == (1e-3, (0.5, 0.9))

    @pytest.mark.parametrize("part", ["weights", "alpha"])
    @pytest.mark.parametrize("fused", [False, True])
    def test_a_loss_that_is_not_finite_stops(self, part, fused):
        net = Mixed()

        def spoilt(supernet, batch, part_now):
            return cross_entropy(supernet, batch, part_now) * (float("nan") if part_now == part else 1.0)

        before = copy.deepcopy(net.state_dict())
        with pytest.raises(FloatingPointError, match="loss must be finite"):
            RelaxedSplit(fused=fused).step(
                net,
                lambda s, b, part: spoilt(s, b, part),
                sgd(*net.weight_parameters()),
                sgd(net.arch["edge"]),
                *draws(),
            )
        if fused or part == "weights":
            assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

    def test_refusals(self):
        net, other = Mixed(), Mixed()
        a_opt, batches = sgd(net.arch["edge"]), draws()
        for w_opt, message in (
            (None, "w_opt must be an optimiser"),
            (sgd(*net.parameters()), "w_opt must hold no architecture parameter"),
            (sgd(*other.weight_parameters()), "w_opt must hold parameters of the supernet"),
        ):
            with pytest.raises(ValueError, match=message):
                RelaxedSplit().step(net, cross_entropy, w_opt, a_opt, *batches)
        step = RelaxedSplit()
        step.step(net, cross_entropy, sgd(net.first.weight), a_opt, *batches)
        with pytest.raises(ValueError, match=r"weights that were split.*last.weight"):
            step.step(net, cross_entropy, sgd(net.last.weight), a_opt, *batches)
        with pytest.raises(ValueError, match="must depend on the architecture"):
            RelaxedSplit().step(
                net, lambda n, b, part: n.last.weight.square().sum(), sgd(*net.weight_parameters()), a_opt, *batches
            )

    def test_a_loaded_second_set_must_fit(self):
        net, wide, step = Mixed(), Mixed(), RelaxedSplit()
        wide.last = nn.Linear(8, 4).double()
        step.step(net, cross_entropy, sgd(*net.weight_parameters()), sgd(net.arch["edge"]), *draws())
        again = RelaxedSplit()
        again.load_state_dict(step.state_dict())
        with pytest.raises(ValueError, match=r"shapes of the weights.*last.weight, last.bias"):
            again.step(wide, cross_entropy, sgd(*wide.weight_parameters()), sgd(wide.arch["edge"]), *draws())

    @pytest.mark.parametrize(
        ("options", "name"),
        [({"lam": -1.0}, "lam"), ({"beta": -1.0}, "beta"), ({"beta": math.nan}, "beta"), ({"y_scale": 0.0}, "y_scale")],
    )
    def test_arguments_out_of_range(self, options, name):
        with pytest.raises(ValueError, match=f"{name} must be"):
            RelaxedSplit(**options)


def test_the_single_level_moves_both_along_the_mean_loss():
    net, (train, val) = Mixed(), draws()
    both = [*net.weight_parameters(), net.arch["edge"]]
    before = [p.detach().clone() for p in both]
    loss = (cross_entropy(net, train, "both") + cross_entropy(net, val, "both")) / 2
    grads = torch.autograd.grad(loss, both)
    w_opt, a_opt = sgd(*net.weight_parameters(), lr=0.1), sgd(net.arch["edge"], lr=0.1)
    figures = SingleLevel().step(net, cross_entropy, w_opt, a_opt, train, val, clip=None)
    for p, was, grad in zip(both, before, grads, strict=True):
        assert torch.allclose(p, was - 0.1 * grad, atol=1e-12)
    assert (figures["train_loss"] + figures["val_loss"]) / 2 == pytest.approx(loss.item())
    assert set(SingleLevel().step(net, cross_entropy, w_opt, None, train, None)) == {
        "train_loss",
        "weight_grad_norm",
        "weight_skipped",
    }
    with pytest.raises(ValueError, match="must depend on the architecture"):
        SingleLevel().step(net, lambda n, b, part: n.last.weight.sum(), w_opt, a_opt, train, val)
    nan = val[0] * math.nan, val[1]
    with pytest.raises(FloatingPointError, match="validation loss must be finite"):
        SingleLevel().step(net, cross_entropy, w_opt, a_opt, train, nan)


def loaders(steps=3):
    return Batches(images(24, 0), 8, seed=0, steps=steps), Batches(images(16, 1), 8, seed=0, name="validation")


def supernet(seed=0):
    return spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=seed)


def rarts(epochs=3, **options):
    return RARTS(supernet(), epochs=epochs, **options)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class TestSearch:
    @pytest.mark.parametrize("fused", [False, True])
    def test_a_search_resumed_after_any_epoch_is_bit_equal(self, fused):
        states, whole = [], rarts(fused=fused)
        result = whole.search(*loaders(), seed=0, on_epoch=lambda end: states.append(end.searcher.state_dict()))
        assert len(states) == 3
        assert states[0]["method"]["weights"]
        for state in [rarts(fused=fused).state_dict(), *states]:
            resumed = rarts(fused=fused)
            resumed.load_state_dict(through_a_file(state))
            assert equal(resumed.state_dict(), state)  # before the step that makes the optimiser of the second set
            again = resumed.search(*loaders(), seed=0)
            assert equal(whole.state_dict(), resumed.state_dict())
            assert equal(result.alpha_history, again.alpha_history)
            assert result.epochs == again.epochs

    def test_the_second_set_is_another_one_at_the_end(self):
        searcher = rarts(epochs=2, lr=0.1)
        searcher.search(*loaders(), seed=0)
        second = searcher.method.second
        assert set(second) == {n for n, _ in searcher.supernet.named_parameters() if not n.startswith("arch")}
        assert any(not torch.equal(y, searcher.supernet.get_parameter(n)) for n, y in second.items())

    def test_the_architecture_learns_from_both_halves(self):
        """Each half alone teaches it: with the other half's loss constant in alpha, alpha still moves."""

        class Half(TaskLoss):
            def __init__(self, part):
                super().__init__()
                self.only = part

            def term(self, total, seen):
                return super().term(total, seen) * (1.0 if seen.part == self.only else 0.0)

        for part in ("weights", "alpha"):
            searcher = RARTS(supernet(), objective=Half(part), epochs=1, alpha_weight_decay=0.0)
            history = searcher.search(*loaders(), seed=0).alpha_history
            assert any(not torch.equal(history[0][k], history[1][k]) for k in history[0])

    def test_any_gate_objective_and_selector(self):
        net = supernet()
        choices = net.keyed_choices()
        keys = list(choices)
        size = len(choices[keys[0]])
        net.set_gate(FixedGate(1, size), keys[0])
        net.set_gate(MaskedGate(SoftmaxGate(), [True, False, *[True] * (size - 2)]), keys[1])
        shape = (1, 8, 8)
        table = {key: 1.0 for key in net.operations(shape)}
        objective = TaskLoss(0.1) + CostPenalty("add_linear", table, ref=4.0, alpha=1.0)
        selector = PerturbationSelector(tune_epochs=1, max_val_batches=1)
        plain = RARTS(copy.deepcopy(net), epochs=1).search(*loaders(), seed=0)
        searcher = RARTS(net, objective=objective, selector=selector, epochs=1)
        result = searcher.search(*loaders(), seed=0)
        assert result.config["objective"] == ["TaskLoss", "CostPenalty"]
        assert not equal(plain.alpha_history[-1], result.alpha_history[-1])
        assert result.genotype.space == "micro-darts-2-shared"

    def test_the_record_of_a_search_is_plain_data(self):
        result = rarts(epochs=1, lam=0.5, beta=0.02, y_lr=0.05).search(*loaders(), seed=0)
        assert result.config["method"] == {
            "name": "RelaxedSplit",
            "lam": 0.5,
            "beta": 0.02,
            "fused": True,
            "y_scale": 2.0,
            "monotone_check": False,
        }
        assert {"gap", "objective", "second_grad_norm", "second_skipped"} <= set(result.epochs[0])
        json.dumps(result.to_dict())

    def test_momentum_of_both_sets_is_forgotten_with_a_new_stage(self):
        searcher = Searcher(supernet(), method=RelaxedSplit(), stages=[Stage("one", 1), Stage("two", 1)])
        train, val = next(iter(loaders()[0])), next(iter(loaders()[1]))
        searcher.prepare(seed=0, steps_per_epoch=3)
        for _ in range(3):
            searcher.step(train, val)
        searcher.end_epoch()
        second = searcher.method.second
        before = {name: y.detach().clone() for name, y in second.items()}
        figures = searcher.step(train, val)
        # A first step of SGD goes along the clipped gradient (and the weight decay) alone.
        moved = math.sqrt(sum(float((y - before[n]).detach().square().sum()) for n, y in second.items()))
        assert moved == pytest.approx(0.025 * min(5.0, figures["second_grad_norm"]), rel=1e-2)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lam": "a"}, "lam must be a number > 0, got 'a'"),
            ({"lam": 0.0}, "lam must be > 0 and finite, got 0.0"),
            ({"beta": -1.0}, "beta must be >= 0"),
            ({"y_lr": 0.0}, "y_lr must be > 0 and finite, got 0.0"),
            ({"beta": 40.0}, "beta must be < 40 with these learning rates, got 40.0"),
            ({"beta": 80.0, "fused": False}, "beta must be < 80"),
            ({"lr": 0.0}, "lr of stage 'search' must be > 0"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(ValueError, match=message):
            rarts(**options)

    def test_a_second_set_without_finite_gradients_ends_the_search(self):
        searcher = rarts(epochs=1)
        searcher.prepare(seed=0, steps_per_epoch=1)
        searcher.step(next(iter(loaders()[0])), next(iter(loaders()[1])))
        searcher._sums["second_skipped"] = searcher._counts["second_skipped"] = 1
        with pytest.raises(FloatingPointError, match="finite second gradient"):
            searcher.end_epoch()
