import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from tests.support.searches import images
from torch import nn

from netwright.nn.batchnorm import frozen_statistics
from netwright.search import GumbelSoftmaxGate, SoftmaxGate, TaskLoss, bilevel, spaces
from netwright.search.bilevel import FirstOrder, SecondOrder, trained
from netwright.seeding import seeded

DOUBLE = torch.float64


class MixedMLP(nn.Module):
    """Three layers whose activations are mixtures weighted by softmax(alpha)."""

    def __init__(self, seed=0, norm=False, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)])
            self.arch = nn.ParameterDict({str(i): nn.Parameter(0.3 * torch.randn(3)) for i in range(2)})
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.double()

    def forward(self, x):
        for i in range(2):
            z = self.layers[i](x)
            m = self.arch[str(i)].softmax(-1)
            x = self.dropout(m[0] * torch.tanh(z) + m[1] * torch.sin(z) + m[2] * torch.sigmoid(z))
        return self.layers[2](self.norm(x))

    def arch_parameters(self):
        return list(self.arch.parameters())

    def weight_parameters(self):
        return [p for n, p in self.named_parameters() if not n.startswith("arch")]


def objective(supernet, batch, part):
    return nn.functional.cross_entropy(supernet(batch[0]), batch[1])


def batches(seed=1, n=16):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        x = torch.randn(n, 5, generator=generator, dtype=DOUBLE)
        return x, torch.randint(3, (n,), generator=generator)

    return draw(), draw()


def optimisers(net, **sgd):
    options = {"lr": 0.05} | sgd
    w_opt = torch.optim.SGD(net.weight_parameters(), **options)
    return w_opt, torch.optim.Adam(net.arch_parameters(), lr=3e-4)


def double_backward(net, w_opt, train, val, *, xi=None):
    """d L_val(w - xi (mu buf + grad L_train + wd w), alpha) / d alpha, by differentiating twice."""
    names = [n for n, _ in net.named_parameters() if not n.startswith("arch")]
    weights = dict(net.named_parameters())
    options = {id(p): g for g in w_opt.param_groups for p in g["params"]}
    loss = objective(net, train, "weights")
    grads = torch.autograd.grad(loss, [weights[n] for n in names], create_graph=True)
    ahead = {}
    for name, grad in zip(names, grads, strict=True):
        w, group = weights[name], options[id(weights[name])]
        step = grad + group["weight_decay"] * w
        buffer = w_opt.state.get(w, {}).get("momentum_buffer")
        if buffer is not None:
            step = step + group["momentum"] * buffer
        ahead[name] = w - (group["lr"] if xi is None else xi) * step
    alphas = {f"arch.{k}": v for k, v in net.arch.items()}
    logits = torch.func.functional_call(net, {**ahead, **alphas}, (val[0],))
    return torch.autograd.grad(nn.functional.cross_entropy(logits, val[1]), list(alphas.values()))


def relative(found, wanted):
    found, wanted = (torch.cat([g.flatten() for g in gs]) for gs in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


def gradient(step, net, w_opt, train, val):
    return step.architecture_gradient(net, objective, w_opt, net.arch_parameters(), train, val)[0]


@pytest.mark.parametrize(
    ("step", "fixed_point"),
    [(FirstOrder(), 2.0), (SecondOrder(0.0), 2.0), (SecondOrder(0.5), 1.0), (SecondOrder(0.1), 2 / 1.2)],
)
def test_fixed_points_of_the_analytic_problem(step, fixed_point):
    a, w = (nn.Parameter(torch.tensor(v, dtype=DOUBLE)) for v in (2.0, -2.0))

    def losses(supernet, batch, part):
        return a * w - 2 * a + 1 if part == "alpha" else w**2 - 2 * a * w + a**2

    w_opt, a_opt = torch.optim.SGD([w], lr=0.1), torch.optim.SGD([a], lr=0.1)
    for _ in range(800):
        step.step(nn.Module(), losses, w_opt, a_opt, None, None, clip=None)
    assert a.item() == pytest.approx(fixed_point, abs=1e-9)
    assert w.item() == pytest.approx(fixed_point, abs=1e-9)


def test_second_order_equals_double_backward():
    net = MixedMLP()
    w_opt, _ = optimisers(net)
    train, val = batches()
    wanted = double_backward(net, w_opt, train, val)
    assert relative(gradient(SecondOrder(), net, w_opt, train, val), wanted) < 1e-5
    assert relative(gradient(FirstOrder(), net, w_opt, train, val), wanted) > 1e-3  # the term that is tested matters


def test_second_order_equals_double_backward_under_the_same_dropout():
    net = MixedMLP(dropout=0.4)
    w_opt, _ = optimisers(net)
    train, val = batches()
    with seeded(0, "noise"):
        wanted = double_backward(net, w_opt, train, val)
    with seeded(0, "noise"):
        found = gradient(SecondOrder(), net, w_opt, train, val)
        after = torch.rand(3)
    assert relative(found, wanted) < 1e-5
    with seeded(0, "noise"):  # the draws go on behind those of both batches, so that the weights' step has its own
        objective(net, train, "weights")
        objective(net, val, "alpha")
        assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize(
    ("space", "gate"),
    [
        ("micro-darts-2-shared", lambda: GumbelSoftmaxGate(1.0)),
        ("micro-chain", lambda: GumbelSoftmaxGate(2.0, per_sample=True)),
        ("micro-darts-s4", SoftmaxGate),
        ("micro-darts-s4", lambda: GumbelSoftmaxGate(1.0)),
    ],
    ids=["Gumbel", "Gumbel per sample", "Noise", "both"],
)
def test_second_order_of_a_supernet_that_draws_equals_double_backward_under_the_same_draws(space, gate):
    net = spaces.get(space).supernet(1, 3, channels=4, seed=0, gate=gate()).double().train()
    train, val = ((data.images.double(), data.labels) for data in (images(6, 0), images(6, 1)))
    names = [name for name, _ in net.named_parameters() if not name.startswith("arch.")]
    weights, alphas, loss = dict(net.named_parameters()), net.arch_parameters(), TaskLoss()
    w_opt = torch.optim.SGD([weights[name] for name in names], lr=0.5)

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, batch):
            return loss(self.net, batch, "alpha")

    with seeded(0, "noise"), frozen_statistics(net):
        slopes = torch.autograd.grad(
            loss(net, train, "weights"), [weights[name] for name in names], create_graph=True, allow_unused=True
        )
        ahead = {
            f"net.{name}": weights[name] if slope is None else weights[name] - 0.5 * slope
            for name, slope in zip(names, slopes, strict=True)
        }
        wanted = torch.autograd.grad(torch.func.functional_call(Alone(), ahead, (val,)), alphas)

    def found(step):
        with seeded(0, "noise"):
            return step.architecture_gradient(net, loss, w_opt, alphas, train, val)[0]

    assert relative(found(SecondOrder(eps=1e-6)), wanted) < 1e-4
    assert relative(found(FirstOrder()), wanted) > 1e-3


def test_without_draws_second_order_is_what_it_was_to_the_bit(monkeypatch):
    net = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
    train, val = ((data.images, data.labels) for data in (images(6, 0), images(6, 1)))
    w_opt = torch.optim.SGD(net.weight_parameters(), lr=0.5)

    def found():
        return SecondOrder().architecture_gradient(net, TaskLoss(), w_opt, net.arch_parameters(), train, val)[0]

    state, paired = torch.get_rng_state(), found()
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setattr(bilevel, "replayed", lambda state: nullcontext())
    assert all(torch.equal(a, b) for a, b in zip(paired, found(), strict=True))


def test_second_order_with_momentum_weight_decay_and_two_groups():
    net = MixedMLP()
    weights = net.weight_parameters()
    w_opt = torch.optim.SGD(
        [{"params": weights[:3], "lr": 0.2}, {"params": weights[3:], "lr": 0.02, "weight_decay": 0.1}], momentum=0.9
    )
    train, val = batches()
    for _ in range(2):
        FirstOrder().step(net, objective, w_opt, None, train, None)
    assert all("momentum_buffer" in w_opt.state[p] for p in weights)
    wanted = double_backward(net, w_opt, train, val)
    without = SecondOrder(eps=1e-3)
    assert relative(gradient(without, net, w_opt, train, val), wanted) < 1e-5
    plain = torch.optim.SGD([{"params": weights[:3], "lr": 0.2}, {"params": weights[3:], "lr": 0.02}])
    assert relative(gradient(without, net, plain, train, val), wanted) > 1e-3


def test_second_order_equals_the_package_higher():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        higher = pytest.importorskip("higher")
    net = MixedMLP()
    w_opt, _ = optimisers(net)
    train, val = batches()
    mixed = torch.optim.SGD([*net.weight_parameters()], lr=0.05)
    with higher.innerloop_ctx(net, mixed, copy_initial_weights=False, track_higher_grads=True) as (copied, inner):
        # higher steps every fast parameter of the optimiser: the architecture is not one of them
        inner.step(nn.functional.cross_entropy(copied(train[0]), train[1]))
        wanted = torch.autograd.grad(
            nn.functional.cross_entropy(copied(val[0]), val[1]), net.arch_parameters(), allow_unused=True
        )
    assert relative(gradient(SecondOrder(), net, w_opt, train, val), wanted) < 1e-5


def test_weights_are_restored_to_the_bit_even_after_an_error():
    net = MixedMLP().float()
    w_opt, _ = optimisers(net)
    train, val = ((x.float(), y) for x, y in batches())
    train, val = tuple(train), tuple(val)
    before = [p.detach().clone() for p in net.weight_parameters()]
    gradient(SecondOrder(), net, w_opt, train, val)
    assert all(torch.equal(a, b) for a, b in zip(before, net.weight_parameters(), strict=True))
    calls = []

    def failing(supernet, batch, part):
        calls.append([p.detach().clone() for p in net.weight_parameters()])
        if len(calls) == 3:
            raise RuntimeError("in the middle")
        return objective(supernet, batch, part)

    with pytest.raises(RuntimeError, match="in the middle"):
        SecondOrder().architecture_gradient(net, failing, w_opt, net.arch_parameters(), train, val)
    assert not torch.equal(calls[1][0], before[0])
    assert not torch.equal(calls[2][0], calls[1][0])
    assert all(torch.equal(a, b) for a, b in zip(before, net.weight_parameters(), strict=True))


@pytest.mark.parametrize("step", [FirstOrder(), SecondOrder()])
def test_running_statistics_follow_the_training_batches_alone(step):
    net, train_val = MixedMLP(norm=True).train(), batches()
    w_opt, a_opt = optimisers(net)
    untouched = copy.deepcopy(net)
    gradient(step, net, w_opt, *train_val)
    for (name, a), b in zip(net.named_buffers(), untouched.buffers(), strict=True):
        assert torch.equal(a, b), name
    step.step(net, objective, w_opt, a_opt, *train_val)
    assert int(net.norm.num_batches_tracked) == 1
    assert net.norm.track_running_stats
    assert not torch.equal(net.norm.running_mean, untouched.norm.running_mean)


def test_weight_phase_leaves_alpha_and_the_reverse():
    net = MixedMLP()
    w_opt, a_opt = optimisers(net, weight_decay=0.1, momentum=0.9)
    train, val = batches()
    state = copy.deepcopy(net.state_dict())
    figures = FirstOrder().step(net, objective, w_opt, None, train, None)
    assert set(figures) == {"train_loss", "weight_grad_norm", "weight_skipped"}
    assert all(torch.equal(v, state[k]) == k.startswith("arch") for k, v in net.state_dict().items())
    state = copy.deepcopy(net.state_dict())
    figures = SecondOrder().step(net, objective, None, a_opt, train, val)
    assert set(figures) == {"val_loss", "alpha_grad_norm", "alpha_skipped"}
    assert all(torch.equal(v, state[k]) != k.startswith("arch") for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_alpha_comes_first():
    net, seen = MixedMLP(), []
    w_opt, a_opt = optimisers(net)

    def recording(supernet, batch, part):
        seen.append(part)
        return objective(supernet, batch, part)

    FirstOrder().step(net, recording, w_opt, a_opt, *batches())
    assert seen == ["alpha", "weights"]
    seen.clear()
    SecondOrder().step(net, recording, w_opt, a_opt, *batches())
    assert seen == ["weights", "alpha", "weights", "weights", "weights"]


def test_architecture_in_the_weight_optimiser_is_refused():
    net = MixedMLP()
    a_opt = torch.optim.Adam(net.arch_parameters())
    everything = torch.optim.SGD(net.parameters(), lr=0.1)
    for second in (a_opt, None):
        with pytest.raises(ValueError, match="w_opt must hold no architecture parameter"):
            FirstOrder().step(net, objective, everything, second, *batches())


def test_zero_gradient_ahead_skips_the_second_term():
    net, seen = MixedMLP(), []
    w_opt, a_opt = optimisers(net)

    def alpha_alone(supernet, batch, part):
        seen.append(part)
        return sum(a.square().sum() for a in net.arch_parameters()) if part == "alpha" else objective(net, batch, part)

    SecondOrder().step(net, alpha_alone, w_opt, a_opt, *batches())
    assert seen == ["weights", "alpha", "weights"]


def test_unused_parameters_are_left_alone():
    net = MixedMLP()
    net.spare = nn.Linear(2, 2).double()
    w_opt, a_opt = optimisers(net, weight_decay=0.5)
    before = net.spare.weight.detach().clone()
    SecondOrder().step(net, objective, w_opt, a_opt, *batches())
    assert torch.equal(net.spare.weight, before)
    found, wanted = (gradient(SecondOrder(), n, optimisers(n)[0], *batches()) for n in (net, without(net)))
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def without(net):
    bare = copy.deepcopy(net)
    del bare.spare
    return bare


def test_frozen_weights_are_no_weights():
    net = MixedMLP()
    w_opt, a_opt = optimisers(net)
    net.layers[0].requires_grad_(False)
    assert len(trained(w_opt)) == 4
    before = net.layers[0].weight.detach().clone()
    train, val = batches()
    alone = torch.optim.SGD([p for p in net.weight_parameters() if p.requires_grad], lr=0.05)
    found, wanted = gradient(SecondOrder(), net, w_opt, train, val), gradient(SecondOrder(), net, alone, train, val)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    SecondOrder().step(net, objective, w_opt, a_opt, train, val)
    assert torch.equal(net.layers[0].weight, before)


def test_clip_bounds_the_move_of_the_weights():
    net = MixedMLP()
    w_opt, _ = optimisers(net, lr=1.0)
    train, _ = batches()
    before = [p.detach().clone() for p in net.weight_parameters()]
    figures = FirstOrder().step(net, objective, w_opt, None, train, None, clip=1e-3)
    move = torch.cat([(a - b).flatten() for a, b in zip(before, net.weight_parameters(), strict=True)]).norm()
    assert figures["weight_grad_norm"] > 1e-2
    assert move.item() == pytest.approx(1e-3, rel=1e-5)


def test_the_step_is_that_of_the_optimisers():
    ours, theirs, (train, val) = MixedMLP(), MixedMLP(), batches()
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 3e-4}
    w_opt, a_opt = optimisers(ours, **options)
    w_ref, a_ref = optimisers(theirs, **options)
    for _ in range(3):
        FirstOrder().step(ours, objective, w_opt, a_opt, train, val, clip=None)
        a_ref.zero_grad()
        objective(theirs, val, "alpha").backward()
        a_ref.step()
        w_ref.zero_grad()
        objective(theirs, train, "weights").backward()
        w_ref.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("step", [FirstOrder(), SecondOrder()])
@pytest.mark.parametrize("bad", ["alpha", "weights"])
def test_a_loss_that_is_not_finite_stops_before_anything_is_spoilt(step, bad):
    net = MixedMLP()
    w_opt, a_opt = optimisers(net)

    def spoilt(supernet, batch, part):
        loss = objective(supernet, batch, part)
        return loss * float("nan") if part == bad else loss

    before = [p.detach().clone() for p in net.weight_parameters()]
    with pytest.raises(FloatingPointError, match="must be finite"):
        step.step(net, spoilt, w_opt, a_opt, *batches())
    assert all(torch.equal(a, b) for a, b in zip(before, net.weight_parameters(), strict=True))


def test_alpha_that_is_not_finite_is_reported():
    net = MixedMLP()
    w_opt, _ = optimisers(net)
    a_opt = torch.optim.SGD(net.arch_parameters(), lr=float("inf"))
    with pytest.raises(FloatingPointError, match="architecture parameters"):
        FirstOrder().step(net, objective, w_opt, a_opt, *batches())


def test_a_loss_without_architecture_is_refused():
    net = MixedMLP()
    w_opt, a_opt = optimisers(net)
    head = net.layers[-1].weight
    with pytest.raises(ValueError, match="must depend on the architecture"):
        FirstOrder().step(net, lambda *_, part: head.square().sum(), w_opt, a_opt, None, None)


@pytest.mark.parametrize(
    ("options", "name"), [({"xi": -1.0}, "xi"), ({"eps": 0.0}, "eps"), ({"xi": float("nan")}, "xi")]
)
def test_arguments_out_of_range(options, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        SecondOrder(**options)


class _Overflow(torch.autograd.Function):
    """The identity, whose gradient overflows as that of a long chain of batch norms may."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


def test_a_gradient_that_overflows_makes_no_update_and_is_counted():
    supernet = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1)
    before = [p.detach().clone() for p in supernet.parameters()]

    def objective(net, batch, part):
        return _Overflow.apply(net(batch)).sum()

    figures = FirstOrder().step(supernet, objective, optimizer, None, torch.ones(3, 2), None)
    assert figures["weight_skipped"] == 1.0
    assert "weight_grad_norm" not in figures
    assert all(torch.equal(p, b) for p, b in zip(supernet.parameters(), before, strict=True))


@pytest.mark.parametrize("clip", [None, 5.0])
def test_a_large_gradient_whose_squares_overflow_is_a_gradient(clip):
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)

    def objective(net, batch, part):
        return (parameter * torch.tensor([3e25, 4e25])).sum()

    figures = FirstOrder().step(nn.Module(), objective, optimizer, None, None, None, clip=clip)
    assert figures["weight_skipped"] == 0.0
    assert figures["weight_grad_norm"] == pytest.approx(5e25)
    wanted = [-3.0, -4.0] if clip else [-3e25, -4e25]
    assert parameter.tolist() == pytest.approx(wanted)
