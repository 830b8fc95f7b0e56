"""Gradient noise against moments, closed forms of random walks and quadratics, and bits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from netwright.seeding import seeded
from netwright.train.gradient_noise import (
    GradientNoise,
    NoisyOptimizer,
    add_gradient_noise_,
    attach,
    noise_variance,
    register_gradient_noise,
)


def parameter(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    found = torch.zeros(count, dtype=dtype, requires_grad=True)
    found.grad = torch.zeros(count, dtype=dtype)
    return found


def trained(optimizer_of, steps: int = 20, after=lambda step: None) -> tuple[nn.Module, object]:
    with seeded(0, "net"):
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        x, y = torch.randn(16, 4), torch.arange(16) % 2
    optimizer = optimizer_of(net)
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        after(step)
    return net, optimizer


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_the_schedule():
    assert noise_variance(0, 0.37) == 0.37
    assert noise_variance(99, 1.0, 0.55) == pytest.approx(0.0794328, abs=1e-7)
    assert {noise_variance(t, 0.3, 0.0) for t in range(5)} == {0.3}


def test_moments():
    param = parameter(10**6)
    noise = GradientNoise([param], eta=0.3, seed=0)
    noise.t = 9
    noise.step()
    grad = param.grad.double()
    variance = 0.3 / 10**0.55
    assert variance == pytest.approx(0.0845515, abs=1e-7)
    assert grad.var() == pytest.approx(variance, rel=0.01)
    assert abs(grad.mean()) < 4 * math.sqrt(variance) / 1000
    assert (grad**4).mean() / variance**2 == pytest.approx(3, abs=0.03)


def test_parts_of_a_step_are_independent():
    first, second = parameter(50_000), parameter(50_000)
    noise = GradientNoise([first, second], eta=1.0, gamma=0.0, seed=0)
    noise.step()
    before = first.grad.clone()
    first.grad.zero_()
    noise.step()
    for a, b in ((before, second.grad), (before, first.grad), (before[:-1], before[1:])):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.02


@pytest.mark.parametrize("eta", [0.0, 0.1])
def test_global_generator_is_untouched_and_no_noise_is_the_bare_optimiser(eta):
    plain, _ = trained(sgd)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    noisy, optimizer = trained(lambda net: NoisyOptimizer(sgd(net), eta=eta))
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(plain, noisy) == (eta == 0.0)
    assert optimizer.noise.t == 20
    fresh = GradientNoise(noisy.parameters(), seed=0)
    assert torch.equal(optimizer.noise.state_dict()["stream"], fresh.state_dict()["stream"]) == (eta == 0.0)


@pytest.mark.parametrize("gamma", [0.0, 0.55])
def test_variance_of_a_random_walk(gamma):
    param = parameter(100_000)
    noise, optimizer = GradientNoise([param], eta=0.04, gamma=gamma, seed=0), torch.optim.SGD([param], lr=1.0)
    for _ in range(30):
        param.grad.zero_()
        noise.step()
        optimizer.step()
    expected = sum(noise_variance(t, 0.04, gamma) for t in range(30))
    # The sample variance of n Gaussians has the relative standard error sqrt(2 / n).
    assert param.detach().double().var() == pytest.approx(expected, rel=4 * math.sqrt(2 / 100_000))


def test_stationary_variance_of_a_quadratic():
    a = 0.1
    param = parameter(100_000)
    noise, optimizer = GradientNoise([param], eta=1.0, gamma=0.0, seed=0), torch.optim.SGD([param], lr=a)
    for _ in range(200):
        param.grad = param.detach().clone()
        noise.step()
        optimizer.step()
    assert a / (2 - a) == pytest.approx(0.0526316, abs=1e-7)
    assert param.detach().double().var() == pytest.approx(a / (2 - a), rel=0.03)


@pytest.mark.parametrize("order", ["clip_then_noise", "noise_then_clip"])
def test_order_of_clipping_and_noise(order):
    param = parameter(400)
    param.grad.fill_(5.0)  # norm 100
    optimizer = NoisyOptimizer(torch.optim.SGD([param], lr=1.0), eta=0.3, seed=3, clip_norm=10.0, order=order)
    optimizer.step()
    other = parameter(400)
    GradientNoise([other], eta=0.3, seed=3).step()
    drawn = other.grad
    if order == "clip_then_noise":
        assert (param.grad.double() - drawn.double()).norm() == pytest.approx(10.0, abs=1e-6)
        assert param.grad.norm() > 10.5
    else:
        assert param.grad.norm() == pytest.approx(10.0, abs=1e-4)
        assert torch.allclose(param.grad, (5.0 + drawn) * 10 / (5.0 + drawn).norm(), atol=1e-5)


def test_without_a_seed_every_noise_is_another():
    torch.manual_seed(7)
    before, drawn = torch.get_rng_state(), []
    for _ in range(2):
        param = parameter(100)
        GradientNoise([param]).step()
        drawn.append(param.grad)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(*drawn)


def test_noise_without_a_seed_goes_on_from_its_state():
    one, other = parameter(100), parameter(100)
    noise, again = GradientNoise([one]), GradientNoise([other])
    again.load_state_dict(noise.state_dict())
    assert again.seed == noise.seed
    for _ in range(2):
        noise.step(), again.step()
    assert torch.equal(one.grad, other.grad)


def test_none_and_frozen_stay():
    used, unused, frozen = parameter(3), parameter(3), parameter(3)
    unused.grad = None
    frozen.requires_grad_(False)
    GradientNoise([used, unused, frozen]).step()
    assert unused.grad is None
    assert not frozen.grad.any()
    assert used.grad.all()


def test_no_gradient_is_no_update():
    param = parameter(3)
    param.grad = None
    noise = GradientNoise([param])
    noise.step()
    assert noise.t == 0


def test_sparse_gradients_get_noise_in_their_rows_only():
    table = nn.Embedding(10, 3, sparse=True)
    table(torch.tensor([2, 5, 2])).sum().backward()
    add_gradient_noise_(table.parameters(), 1.0, torch.Generator().manual_seed(0))
    assert table.weight.grad.is_sparse
    dense = table.weight.grad.to_dense()
    assert sorted(dense.abs().sum(1).nonzero().flatten().tolist()) == [2, 5]
    assert len(set(dense[[2, 5]].flatten().tolist())) == 6


def test_low_precision_is_drawn_in_float32():
    half, full = parameter(100, torch.bfloat16), parameter(100)
    for param in (half, full):
        add_gradient_noise_([param], 0.5, torch.Generator().manual_seed(1))
    assert torch.equal(half.grad, full.grad.bfloat16())


def test_accumulation_makes_one_draw():
    with seeded(0, "net"):
        net = nn.Linear(4, 2)
    optimizer = NoisyOptimizer(sgd(net), eta=0.1)
    for _ in range(3):
        for _ in range(4):
            net(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.noise.t == 3


def test_state_goes_on_bit_for_bit():
    whole, _ = trained(lambda net: NoisyOptimizer(sgd(net), eta=0.1), 12)
    kept = {}
    with seeded(0, "net"):
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        x, y = torch.randn(16, 4), torch.arange(16) % 2
    optimizer = NoisyOptimizer(sgd(net), eta=0.1)
    for step in range(12):
        if step == 5:
            kept = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
            optimizer = NoisyOptimizer(sgd(net), eta=0.1, seed=99)
            net.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert equal(whole, net)


def test_all_ways_to_attach_do_the_same():
    wrapped, _ = trained(lambda net: NoisyOptimizer(sgd(net), eta=0.1, seed=2))

    def hooked(net):
        optimizer = sgd(net)
        register_gradient_noise(optimizer, eta=0.1, seed=2)
        return optimizer

    class Closing:
        """Gives the gradients by a closure, as Lightning does."""

        def __init__(self, net):
            self.optimizer = sgd(net)
            attach(self.optimizer, GradientNoise(net.parameters(), 0.1, seed=2))
            self.zero_grad = self.optimizer.zero_grad

        def step(self):
            self.optimizer.step(lambda: None)

    assert equal(wrapped, trained(hooked)[0])
    assert equal(wrapped, trained(Closing)[0])


def test_removing_the_hook_ends_it():
    def once(net):
        optimizer = sgd(net)
        register_gradient_noise(optimizer, eta=0.1).remove()
        return optimizer

    assert equal(trained(sgd)[0], trained(once)[0])


def test_a_scaler_that_skips_does_not_count():
    param = parameter(4)
    optimizer = NoisyOptimizer(torch.optim.SGD([param], lr=0.1), eta=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for value in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((param * value).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.noise.t == 1


def test_schedulers_and_groups_act_on_the_inner_optimiser():
    net = nn.Linear(4, 2)
    inner = torch.optim.SGD([net.weight], lr=1.0)
    optimizer = NoisyOptimizer(inner)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    schedule.step()
    assert inner.param_groups[0]["lr"] == 0.5
    optimizer.add_param_group({"params": [net.bias]})
    assert len(inner.param_groups) == 2
    before = net.bias.detach().clone()
    optimizer.step()
    assert not torch.equal(before, net.bias)


@pytest.mark.parametrize("batch", [8, 64])
def test_a_relu_net_of_zeros_learns_class_priors_only(batch):
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 3))
    for param in net.parameters():
        nn.init.zeros_(param)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    draws = torch.Generator().manual_seed(0)
    for _ in range(10):
        optimizer.zero_grad()
        x, y = torch.randn(batch, 5, generator=draws), torch.randint(3, (batch,), generator=draws)
        nn.functional.cross_entropy(net(x), y).backward()
        *others, last = net.parameters()
        assert all(not param.grad.any() for param in others)
        assert last.grad.any()
        optimizer.step()
    register_gradient_noise(optimizer, eta=0.1)
    optimizer.step()
    assert all(param.any() for param in others)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: GradientNoise([p], eta=-1), ValueError, "eta must be >= 0"),
        (lambda p: GradientNoise([p], gamma=-0.1), ValueError, "gamma must be >= 0"),
        (lambda p: GradientNoise([p], eta=float("nan")), ValueError, "eta must be >= 0 and finite, got nan"),
        (lambda p: GradientNoise([p], seed=-1), ValueError, "seed must be an integer >= 0"),
        (lambda p: GradientNoise([]), ValueError, "at least 1 parameter"),
        (lambda p: GradientNoise([torch.zeros(2, dtype=torch.int64)]), TypeError, "got torch.int64"),
        (lambda p: GradientNoise([torch.zeros(2, dtype=torch.bool)]), TypeError, "got torch.bool"),
        (lambda p: GradientNoise([p], schedule=lambda t: -1.0).step(), ValueError, "schedule must give"),
        (lambda p: noise_variance(-1), ValueError, "step must be >= 0"),
        (lambda p: add_gradient_noise_([p], float("inf")), ValueError, "variance must be >= 0 and finite"),
        (lambda p: NoisyOptimizer(torch.optim.SGD([p], lr=1), clip_norm=0), ValueError, "clip_norm must be > 0"),
        (lambda p: NoisyOptimizer(torch.optim.SGD([p], lr=1), order="both"), ValueError, "order must be one of"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(parameter(2))
