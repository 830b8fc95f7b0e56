"""ProxylessNAS: what a step moves and what it leaves, REINFORCE against enumeration, resuming, published networks."""

import copy
import itertools
import json

import pytest
import torch
from torch import nn

from netwright.cost import count
from netwright.data.tensors import Batches, TensorImages
from netwright.search import ProxylessCPU, ProxylessGPU, ProxylessMobile, ProxylessMobile14, spaces
from netwright.search.alternating import Alternating
from netwright.search.bilevel import FirstOrder
from netwright.search.binary_gate import BinaryGate
from netwright.search.genotype import Genotype
from netwright.search.latency import predict
from netwright.search.objective import CostPenalty, Evaluation, TaskLoss
from netwright.search.perturbation import PerturbationSelector
from netwright.search.proxyless import GateGradient, ProxylessNAS, Reinforce
from netwright.search.searcher import Searcher
from netwright.search.self_distill import SelfDistillation, SnapshotTeachers
from netwright.search.spaces.choices import ChoiceSpace
from netwright.search.stages import Stage
from netwright.search.strengths import op_strengths
from netwright.search.supernet import FixedGate
from netwright.seeding import seeded, stream

CHAIN = spaces.get("micro-chain")


def images(number=24, classes=3, side=12, seed=0):
    draw = stream(seed, "images")
    return torch.rand(number, 1, side, side, generator=draw), torch.randint(classes, (number,), generator=draw)


def loaders(**options):
    return [Batches(TensorImages(*images(seed=i)), 8, seed=3, name=n, **options) for i, n in enumerate("ab")]


def short(supernet, **options):
    return ProxylessNAS(supernet, **{"warmup_epochs": 1, "epochs": 2, "settle_epochs": 0, "arch_every": 2} | options)


def table_of(supernet, value=2.0):
    return dict.fromkeys(supernet.operations((1, 12, 12)), value)


def used(name, supernet):
    """Whether a parameter belongs to the path that was drawn, or to no choice."""
    for path, choice in supernet.named_choices():
        if name.startswith(f"{path}.candidates."):
            return name.removeprefix(f"{path}.candidates.").split(".")[0] == choice.names[int(choice.drawn[0])]
    return True


def test_a_step_of_the_weights_leaves_unsampled_operations_as_they_were_to_the_bit():
    supernet = CHAIN.supernet(1, 3, seed=0, gate=BinaryGate()).train()
    named = {name: p for name, p in supernet.named_parameters() if not name.startswith("arch.")}
    w_opt = torch.optim.SGD(named.values(), lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
    step, moved, rested = GateGradient(), 0, 0
    for number in range(12):
        values = {name: p.detach().clone() for name, p in named.items()}
        buffers = {n: b.clone() for n, p in named.items() if (b := w_opt.state[p].get("momentum_buffer")) is not None}
        statistics = {name: value.clone() for name, value in supernet.named_buffers()}
        with seeded(number, "step"):
            step.step(supernet, TaskLoss(), w_opt, None, images(8), None, clip=None)
        for name, p in named.items():
            buffer = w_opt.state[p].get("momentum_buffer")
            assert p.grad is None
            if used(name, supernet):
                assert not torch.equal(p, values[name]), name
                moved += 1
            else:
                assert torch.equal(p, values[name]), name
                assert buffer is None if name not in buffers else torch.equal(buffer, buffers[name]), name
                rested += name in buffers  # it has been on a path before, so momentum would move it
        for name, value in supernet.named_buffers():
            assert torch.equal(value, statistics[name]) != used(name, supernet), name
    assert moved > 100
    assert rested > 100


@pytest.mark.parametrize("penalised", [False, True])
def test_a_step_of_the_architecture_moves_the_pair_alone_and_keeps_its_probability(penalised):
    supernet = CHAIN.supernet(1, 3, seed=0, gate=BinaryGate("two")).train()
    objective = TaskLoss() + CostPenalty("add_linear", table_of(supernet), ref=4.0) if penalised else TaskLoss()
    a_opt = torch.optim.Adam(supernet.arch_parameters(), lr=0.05, betas=(0.0, 0.999))
    step, moved = GateGradient(), 0
    for number in range(15):
        before = {key: alpha.detach().clone() for key, alpha in supernet.arch.items()}
        weights = [p.detach().clone() for p in supernet.weight_parameters()]
        buffers = [b.clone() for b in supernet.buffers()]
        with seeded(number, "step"):
            step.step(supernet, objective, None, a_opt, None, images(8))
        for key, choice in supernet.keyed_choices().items():
            alpha, drawn = supernet.arch[key].detach(), choice.drawn
            rest = [i for i in range(len(alpha)) if i not in drawn.tolist()]
            assert len(drawn) == 2
            assert torch.equal(alpha[rest], before[key][rest])
            after, wanted = alpha.double().softmax(0), before[key].double().softmax(0)
            torch.testing.assert_close(after[rest], wanted[rest], atol=1e-7, rtol=0)
            moved += int(not torch.equal(alpha[drawn], before[key][drawn]))
        assert all(torch.equal(a, b) for a, b in zip(weights, supernet.weight_parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(buffers, supernet.buffers(), strict=True))
    assert moved > 50


@pytest.mark.parametrize("cost", [False, True])
def test_a_choice_that_is_left_out_does_not_move_not_even_by_its_cost(cost):
    gate = BinaryGate("full", skip_zero_grad=True)
    supernet = CHAIN.supernet(1, 3, seed=0, gate=gate).train()
    objective = TaskLoss() + CostPenalty("add_linear", table_of(supernet), ref=4.0) if cost else TaskLoss()
    a_opt = torch.optim.Adam(supernet.arch_parameters(), lr=0.05, betas=(0.0, 0.999))
    skipped = 0
    for number in range(20):
        before = {key: alpha.detach().clone() for key, alpha in supernet.arch.items()}
        with seeded(number, "step"):
            GateGradient().step(supernet, objective, None, a_opt, None, images(8))
        for key, choice in supernet.keyed_choices().items():
            left_out = choice.names[int(choice.drawn[0])] == "skip"
            assert torch.equal(supernet.arch[key], before[key]) == left_out
            skipped += left_out
    assert skipped


class Blind(nn.Module):
    """Zeros, whatever the input."""

    def forward(self, x):
        return torch.zeros_like(x)


class Halves(nn.Module):
    """A module for each of two channels."""

    def __init__(self, first, second, num_classes):
        super().__init__()
        self.first, self.second, self.classifier = first, second, nn.Linear(2, num_classes)

    def forward(self, x):
        return self.classifier(torch.cat([self.first(x[:, :1]), self.second(x[:, 1:])], 1).mean((2, 3)))


def halves(gate=None):
    """Of three operations for each half one lets its signal through."""

    def network(choose, in_channels, num_classes):
        made = [
            choose(name, {"blind": Blind, "scale": lambda: nn.Conv2d(1, 1, 1, bias=False), "too": Blind}, kind=name)
            for name in "ab"
        ]
        return Halves(*made, num_classes)

    return ChoiceSpace("halves", network, shape=(4, 4)).supernet(2, 4, seed=0, gate=gate)


@pytest.mark.parametrize(
    ("algo", "mode"), [("grad", "two"), ("grad", "full"), ("grad", "full_recompute"), ("reinforce", "two")]
)
def test_the_operation_that_carries_the_signal_is_found(algo, mode):
    draw = stream(0, "signal")
    bits = torch.randint(2, (64, 2), generator=draw)
    x = torch.randn(64, 2, 4, 4, generator=draw) + 3 * (2 * bits - 1).view(64, 2, 1, 1)
    y = bits @ torch.tensor([2, 1])
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    supernet = halves()
    for alpha in supernet.arch.values():
        alpha.data.copy_(torch.tensor([0.3, 0.0, 0.3]))
    options = {"warmup_epochs": 10, "epochs": 12, "arch_every": 1, "alpha_lr": 0.05, "lr": 0.1, "samples": 8}
    result = short(supernet, algo=algo, gate=BinaryGate(mode), **options).search(batches, batches, seed=0)
    assert dict(result.genotype.decisions) == {"a": "scale", "b": "scale"}


class Rewarded(Reinforce):
    """Paths and their rewards by a table."""

    def __init__(self, table, **options):
        super().__init__(samples=len(table), **options)
        self.table, self.next = table, 0

    def reward(self, supernet, batch):
        path, reward = self.table[self.next % len(self.table)]
        self.next += 1
        assert tuple(int(c.drawn[0]) for c in supernet.keyed_choices().values()) == path
        return torch.tensor(reward)


def forced(supernet, paths, monkeypatch):
    turn = itertools.cycle(paths)

    def redraw(part, batch=1):
        assert part == "weights"
        for choice, number in zip(supernet.keyed_choices().values(), next(turn), strict=True):
            choice.drawn = torch.tensor([number])

    monkeypatch.setattr(supernet, "redraw", redraw)


def test_reinforce_is_the_gradient_of_rewards_times_log_probabilities(monkeypatch):
    supernet = halves(BinaryGate())
    draw = stream(0, "rewards")
    for alpha in supernet.arch.values():
        alpha.data.copy_(torch.randn(3, generator=draw))
    table = [(p, float(torch.rand((), generator=draw))) for p in [(0, 1), (2, 2), (1, 1), (0, 0), (2, 1)]]
    forced(supernet, [path for path, _ in table], monkeypatch)
    step, alphas = Rewarded(table, decay=0.5), supernet.arch_parameters()
    mean = sum(reward for _, reward in table) / len(table)
    baseline = None
    for shift in (0.0, 1.0):  # rewards that are better later show how the baseline follows
        step.table = [(path, reward + shift) for path, reward in table]
        grads, loss = step.architecture_gradient(supernet, None, None, alphas, None, images(4))
        baseline = mean if baseline is None else baseline + 0.5 * (mean + shift - baseline)
        logs = [alpha.log_softmax(0) for alpha in alphas]
        surrogate = -sum(
            (reward - baseline) * sum(row[i] for row, i in zip(logs, path, strict=True)) for path, reward in step.table
        ) / len(table)
        assert loss == pytest.approx(-(mean + shift))
        for found, wanted in zip(grads, torch.autograd.grad(surrogate, alphas), strict=True):
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert step.state_dict() == {"baseline": pytest.approx(mean + 0.5)}


def test_reinforce_is_unbiased_for_any_baseline(monkeypatch):
    supernet = halves(BinaryGate())
    draw = stream(0, "rewards")
    for alpha in supernet.arch.values():
        alpha.data.copy_(torch.randn(3, generator=draw))
    alphas = supernet.arch_parameters()
    rewards = torch.rand(3, 3, generator=draw)
    probabilities = [alpha.softmax(0) for alpha in alphas]
    value = -(probabilities[0] @ rewards @ probabilities[1])
    exact = torch.autograd.grad(value, alphas)
    means = [torch.zeros(3) for _ in alphas]
    for path in itertools.product(range(3), repeat=2):
        forced(supernet, [path], monkeypatch)
        step = Rewarded([(path, float(rewards[path]))], decay=1e-12)
        step.load_state_dict({"baseline": 0.7})
        grads, _ = step.architecture_gradient(supernet, None, None, alphas, None, images(4))
        for total, grad in zip(means, grads, strict=True):
            total += (probabilities[0][path[0]] * probabilities[1][path[1]]).detach() * grad
    for found, wanted in zip(means, exact, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_a_reward_is_accuracy_by_relative_latency_of_the_path():
    supernet = CHAIN.supernet(1, 3, seed=0, gate=BinaryGate()).train()
    table = {key: float(n) for n, key in enumerate(supernet.operations((1, 12, 12)), start=1)} | {"constant": 5.0}
    search = short(supernet, algo="reinforce", latency=table, ref=20.0)
    step, batch = search.method.inner, images(8)
    with seeded(0, "path"):
        supernet.redraw("weights", 8)
    accuracy = (supernet(batch[0]).argmax(1) == batch[1]).float().mean()
    latency = supernet.expected_cost(table, (1, 12, 12)) + 5.0
    assert accuracy > 0
    assert latency > 5.0
    torch.testing.assert_close(step.reward(supernet, batch), accuracy * (20.0 / latency) ** 0.1)
    torch.testing.assert_close(Reinforce().reward(supernet, batch), accuracy)
    with pytest.raises(ValueError, match="the cost of a path must be > 0, got 0"):
        Reinforce(cost=lambda _: torch.zeros(()), ref=1.0).reward(supernet, batch)


def test_alternating_counts_steps_that_have_an_architecture_and_asks_for_a_batch_only_then():
    class Inner:
        def __init__(self):
            self.calls = []

        def step(self, supernet, objective, w_opt, a_opt, train_batch, val_batch, *, clip):
            self.calls.append((a_opt, val_batch, train_batch, clip))
            return {}

    inner = Inner()
    step = Alternating(inner, every=3, wait=2)
    for a_opt in [None, "a", "a", None, "a", "a", "a", "a", "a", "a"]:
        step.step(None, None, "w", a_opt, "train", "val", clip=7.0)
    due = [number for number, call in enumerate(inner.calls) if call[0]]
    assert due == [6, 9]
    assert all(call[1] == ("val" if call[0] else None) and call[2:] == ("train", 7.0) for call in inner.calls)
    again = Alternating(inner, every=3)
    again.load_state_dict(step.state_dict())
    assert again.state_dict() == step.state_dict() == {"seen": 8, "wait": 2, "every": 3, "times": 1}
    always = Alternating(every=1)
    assert isinstance(always.inner, FirstOrder)


@pytest.mark.parametrize("options", [{}, {"gate": BinaryGate("full_recompute")}, {"algo": "reinforce", "samples": 6}])
def test_a_search_goes_on_bit_equal_from_the_end_of_any_epoch(options):
    def made(**more):
        options_ = {"settle_epochs": 1, "arch_every": 2, "epochs": 3, "alpha_lr": 0.05} | options | more
        return short(CHAIN.supernet(1, 3, seed=0), **options_)

    whole, states = made(), []
    result = whole.search(*loaders(), seed=1, on_epoch=lambda ended: states.append(ended.searcher.state_dict()))
    history = result.alpha_history
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(history)]
    assert same == [True, True, False, False]  # warm-up, one epoch to settle, then the architecture moves
    for state in states[:3]:
        other = made()
        other.load_state_dict(state)
        again = other.search(*loaders(), seed=1)
        assert again.genotype == result.genotype
        for name, value in whole.supernet.state_dict().items():
            assert torch.equal(value, other.supernet.state_dict()[name]), name


def test_the_published_defaults():
    search = ProxylessNAS(CHAIN.supernet(1, 3))
    config = search.config()
    assert json.loads(json.dumps(config)) == config
    spread = {"every": 5, "wait": 0, "times": 1}
    assert config["method"] == {"name": "Alternating", "inner": {"name": "GateGradient"}, **spread}
    assert [(s["epochs"], s["lr"], s["lr_min"], s["alpha_step"]) for s in config["stages"]] == [
        (40, 0.05, 0.0, False),
        (120, 0.025, 0.0, True),
    ]
    assert (config["alpha_lr"], config["alpha_betas"], config["alpha_weight_decay"]) == (1e-3, [0.0, 0.999], 0.0)
    assert (config["gate"], config["skip_zero_grad"], config["clip"]) == (["two"], False, None)
    (weights,) = search.w_opt.param_groups
    assert (weights["nesterov"], weights["momentum"]) == (True, 0.9)
    assert search.objective.label_smoothing == 0.1
    reinforce = ProxylessNAS(CHAIN.supernet(1, 3), algo="reinforce").config()["method"]["inner"]
    assert reinforce == {"name": "Reinforce", "samples": 10, "decay": 0.99, "ref": None, "power": 0.1}


def test_latency_is_multiplied_into_the_loss_of_the_architecture_alone():
    supernet = CHAIN.supernet(1, 3, seed=0)
    table = table_of(supernet, 3.0) | {"constant": 10.0}
    search = short(supernet, latency=table, ref=20.0, gate=BinaryGate("full"))
    batch = images(8)
    with seeded(0, "draw"):
        loss = search.objective(supernet, batch, "alpha")
    task = TaskLoss(0.1).term(torch.zeros(()), _seen(supernet, batch))
    cost = supernet.expected_cost(table) + 10.0
    torch.testing.assert_close(loss, 0.2 * task * (cost.log() / torch.tensor(20.0).log()) ** 0.3)
    losses = []
    for objective in (search.objective, TaskLoss(0.1)):
        with seeded(0, "draw"):
            losses.append(objective(supernet, batch, "weights"))
    assert torch.equal(*losses)


def _seen(supernet, batch):
    return Evaluation(supernet, batch, supernet(batch[0]), "alpha")


def losses_of(search, supernet, batch):
    found = []
    for part in ("alpha", "weights"):
        with seeded(0, "draw"):
            found.append(search.objective(supernet, batch, part))
    return found


def test_a_penalty_without_a_cost_takes_the_latency_of_the_searcher():
    supernet, batch = CHAIN.supernet(1, 3, seed=0), images(8)
    table = table_of(supernet, 3.0) | {"constant": 10.0}
    wanted = losses_of(short(supernet, latency=table, ref=20.0), supernet, batch)
    for objective in (TaskLoss(0.1) + CostPenalty("mul_log", ref=20.0), TaskLoss(0.1)):
        ref = {} if len(objective.terms) == 2 else {"ref": 20.0}
        found = losses_of(short(supernet, objective=objective, latency=table, **ref), supernet, batch)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    alone = CostPenalty("add_linear", ref=20.0)
    found = losses_of(short(supernet, objective=alone, latency=table), supernet, batch)
    assert alone.cost is None  # the searcher filled in a copy
    costed = TaskLoss() + CostPenalty("add_linear", table_of(supernet, 3.0), ref=20.0)
    wanted = losses_of(short(supernet, objective=costed), supernet, batch)
    assert found[0].item() == pytest.approx(wanted[0].item() + 0.1 * 10.0 / 20.0, rel=1e-6)
    assert torch.equal(found[1], wanted[1])


def test_self_distillation_goes_with_the_latency():
    supernet, batch = CHAIN.supernet(1, 3, seed=0), images(8)
    table = table_of(supernet, 3.0) | {"constant": 10.0}
    term = SelfDistillation(ramp=0.0, teachers=SnapshotTeachers(k=1))
    search = short(supernet, objective=TaskLoss(0.1) + term, latency=table, ref=20.0, epochs=3)
    result = search.search(*loaders(), seed=0)
    assert result.config["objective"] == ["TaskLoss", "SelfDistillation", "CostPenalty"]
    assert term.teachers.voting == 1
    with torch.no_grad():
        for parameter in supernet.weight_parameters():
            parameter.mul_(1.3)  # away from its teacher
    with_term, _ = losses_of(search, supernet, batch)
    plain, _ = losses_of(short(supernet, latency=table, ref=20.0), supernet, batch)
    term.lam = 0.0
    without, _ = losses_of(search, supernet, batch)
    assert torch.equal(without, plain)
    assert abs(with_term.item() - without.item()) > 1e-6


def test_a_strong_penalty_finds_skips():
    supernet = CHAIN.supernet(1, 3, seed=0)
    penalty = CostPenalty("add_linear", table_of(supernet), ref=1.0, alpha=50.0)
    options = {"arch_every": 1, "alpha_lr": 0.1, "epochs": 8, "objective": TaskLoss() + penalty}
    result = short(supernet, **options).search(*loaders(), seed=0)
    assert result.genotype.skip_share == 0.5  # of six layers three can be left out


@pytest.mark.parametrize("space", ["micro-darts-2", "micro-chain"])
@pytest.mark.parametrize("mode", ["two", "full", "full_recompute"])
@pytest.mark.parametrize("form", ["fbnet", "mul_log", "add_linear", "add_power", "log"])
def test_every_space_and_form_of_cost(space, mode, form):
    options = {"channels": 2} if space == "micro-darts-2" else {}
    supernet = spaces.get(space).supernet(1, 3, seed=0, **options)
    table = table_of(supernet)
    penalty = CostPenalty(form, lambda s: s.expected_cost(table) + 5.0, ref=8.0, apply_to="alpha")
    search = short(supernet, objective=TaskLoss() + penalty, gate=BinaryGate(mode), arch_every=1, epochs=1)
    before = {key: alpha.detach().clone() for key, alpha in supernet.arch.items()}
    batch = images(8)
    result = search.search([batch], [batch], seed=0)
    moved = [not torch.equal(before[key], alpha) for key, alpha in supernet.arch.items()]
    assert all(moved)
    assert result.genotype.build(1, 3)(batch[0]).shape == (8, 3)


@pytest.mark.parametrize("space", ["micro-darts-2-shared", "micro-chain"])
def test_selection_by_perturbation_sees_what_the_gates_expect(space):
    options = {"channels": 2} if space != "micro-chain" else {}
    supernet = spaces.get(space).supernet(1, 3, seed=0, **options)
    search = short(supernet, epochs=1, selector=PerturbationSelector(tune_epochs=1))
    result = search.search(*loaders(), seed=0)
    assert result.genotype.build(1, 3)(images()[0]).shape == (24, 3)
    soft = spaces.get(space).supernet(1, 3, seed=0, **options)
    soft.load_state_dict(supernet.state_dict())
    key = next(iter(supernet.arch))
    strengths = op_strengths(supernet, loaders()[1], key)
    assert torch.equal(strengths, op_strengths(soft, loaders()[1], key))
    with seeded(5, "another draw"):
        supernet.redraw("alpha", 1)
    assert torch.equal(strengths, op_strengths(supernet, loaders()[1], key))


def test_decided_choices_stay_as_they_are():
    supernet = CHAIN.supernet(1, 3, seed=0, gate=BinaryGate())
    supernet.set_gate(FixedGate(0, 4), "layer_0")
    before = supernet.arch["layer_0"].detach().clone()
    for step in (GateGradient(), Reinforce(samples=2)):
        searcher = Searcher(supernet, method=step, stages=[Stage(epochs=1)], alpha_weight_decay=0.0)
        searcher.search(*loaders(), seed=0)
    assert torch.equal(supernet.arch["layer_0"], before)


def test_gates_that_are_there_are_kept():
    own = BinaryGate("full")
    supernet = CHAIN.supernet(1, 3, gate=own)
    assert short(supernet).supernet.keyed_choices()["layer_0"].gate is own
    other = BinaryGate("two")
    short(supernet, gate=other)
    assert all(choice.gate is other for choice in supernet.keyed_choices().values())


def one_candidate():
    def network(choose, in_channels, num_classes):
        return nn.Sequential(choose("only", {"one": nn.Identity}), nn.Flatten(), nn.LazyLinear(num_classes))

    return ChoiceSpace("one-candidate", network, shape=(4, 4)).supernet(1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProxylessNAS(CHAIN.supernet(), algo="evolution"), "algo must be 'grad' or 'reinforce'"),
        (lambda: ProxylessNAS(CHAIN.supernet(), epochs=3, settle_epochs=3), r"settle_epochs must lie in \[0, 3\)"),
        (lambda: ProxylessNAS(CHAIN.supernet(), latency={}), "ref must be given with latency"),
        (lambda: ProxylessNAS(CHAIN.supernet(), latency={}, ref=1.0), "ref must be > 1 and finite, got 1.0"),
        (lambda: ProxylessNAS(CHAIN.supernet(), TaskLoss(), {}), "ref must be given with latency, got None"),
        (
            lambda: ProxylessNAS(CHAIN.supernet(), TaskLoss() + CostPenalty("log", {}), {}),
            r"latency must be None where a penalty .* CostPenalty\('log', ref=...\) takes the latency of the searcher",
        ),
        (
            lambda: ProxylessNAS(CHAIN.supernet(), CostPenalty("mul_log", ref=2.0), {}, ref=2.0),
            "ref must be None where the penalty of the objective has one, got 2.0",
        ),
        (
            lambda: ProxylessNAS(CHAIN.supernet(), CostPenalty("mul_log", ref=2.0)),
            r"the cost of CostPenalty\('mul_log'\) must be a table or a function of the supernet, got None",
        ),
        (lambda: ProxylessNAS(CHAIN.supernet(), epochs=2.5), "epochs must be a whole number >= 1, got 2.5"),
        (lambda: ProxylessNAS(one_candidate()), "'only' must have at least 2 candidates in mode 'two', got 1"),
        (lambda: ProxylessNAS(CHAIN.supernet(), arch_every=0), "every must be >= 1, got 0"),
        (lambda: Alternating(wait=-1), "wait must be >= 0, got -1"),
        (lambda: Reinforce(samples=0), "samples must be >= 1, got 0"),
        (lambda: Reinforce(decay=0.0), r"decay must lie in \(0, 1\], got 0.0"),
        (lambda: Reinforce(cost=lambda s: 1.0), "ref must be > 0 where there is a cost, got None"),
        (lambda: Reinforce(power=-1.0), "power must be >= 0 and finite, got -1.0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_reinforce_needs_gates():
    supernet = CHAIN.supernet(1, 3)
    a_opt = torch.optim.Adam(supernet.arch_parameters())
    with pytest.raises(ValueError, match="must have a supernet with binary gates"):
        Reinforce().step(supernet, TaskLoss(), None, a_opt, None, images(8))


@pytest.mark.parametrize("algo", ["grad", "reinforce"])
def test_a_gap_in_a_table_is_told_before_the_warm_up(algo):
    supernet = CHAIN.supernet(1, 3)
    table = table_of(supernet) | {"constant": 4.0}
    gap = next(iter(table))
    del table[gap]
    search = short(supernet, latency=table, ref=5.0, algo=algo)
    with pytest.raises(KeyError, match=str(gap[0])):
        search.search(*loaders(), seed=0)


def test_a_cost_below_its_logarithm_is_told_before_the_warm_up():
    supernet = CHAIN.supernet(1, 3)
    search = short(supernet, latency=table_of(supernet, 1e-3), ref=5.0)
    with pytest.raises(ValueError, match="cost must be > 1 for 'mul_log' in its unit"):
        search.search(*loaders(), seed=0)


PUBLISHED = [
    ("cpu", ProxylessCPU, 4_361_648, 437.8),
    ("gpu", ProxylessGPU, 7_119_848, 463.5),
    ("mobile", ProxylessMobile, 4_080_512, 319.1),
    ("mobile14", ProxylessMobile14, 6_857_568, 579.1),
]


@pytest.mark.parametrize(("name", "genotype", "parameters", "macs"), PUBLISHED)
def test_published_networks(name, genotype, parameters, macs):
    assert Genotype.from_json(genotype.to_json()) == genotype
    network = genotype.build(3, 1000)
    cost = count(network, (3, 224, 224))
    assert cost.parameters == parameters
    convolutions = sum(layer.macs for layer in cost.per_layer if layer.kind == "Conv2d")
    assert round(convolutions / 1e6, 1) == pytest.approx(macs, abs=0.051)
    assert len(genotype.decisions) == 21


@pytest.mark.parametrize(("name", "genotype"), [(name, genotype) for name, genotype, *_ in PUBLISHED])
def test_published_networks_compute_what_another_implementation_does(name, genotype):
    models = pytest.importorskip("pytorchcv.models.proxylessnas")
    theirs = getattr(models, f"proxylessnas_{name}")().eval()
    ours = genotype.build(3, 1000).eval()
    draws = stream(0, "values")
    values = list(theirs.state_dict().values())
    for value in values:
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=draws) * (value.numel() ** -0.3) + (value.ndim == 1) * 0.5)
    state = dict(zip(ours.state_dict(), values, strict=True))
    ours.load_state_dict(state)
    x = torch.rand(1, 3, 224, 224, generator=draws)
    with torch.no_grad():
        wanted = theirs(x)
        assert wanted.std() > 0
        torch.testing.assert_close(ours(x), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)


def test_the_space_of_the_paper():
    space = spaces.get("proxylessnas")
    choices = space.choices()
    assert len(choices) == 21
    assert choices["layer_1"] == ("k3_e3", "k3_e6", "k5_e3", "k5_e6", "k7_e3", "k7_e6")
    assert sum("skip" in names for names in choices.values()) == 15
    assert space.size == 6**6 * 7**15


@pytest.mark.parametrize("mode", ["two", "full"])
def test_an_epoch_tells_loss_and_accuracy_of_the_most_probable_path_and_its_latency(mode):
    supernet, (train, val) = CHAIN.supernet(1, 3, seed=0), loaders()
    table = {key: 1.0 + n for n, key in enumerate(supernet.operations((1, 12, 12)))} | {"constant": 7.0}
    ended, search = [], short(supernet, latency=table, ref=20.0, gate=BinaryGate(mode))

    def look(end):
        genotype = end.genotype
        network = copy.deepcopy(supernet).train()
        for key, name in genotype.decisions:
            choice = network.keyed_choices()[key]
            network.set_gate(FixedGate(choice.names.index(name), len(choice)), key)
        with torch.no_grad():
            outputs = [(network(x), y) for x, y in val]
        total = sum(len(y) for _, y in outputs)
        loss = sum(float(nn.functional.cross_entropy(z, y, reduction="sum")) for z, y in outputs) / total
        right = sum(int((z.argmax(1) == y).sum()) for z, y in outputs) / total
        assert end.figures["argmax_loss"] == pytest.approx(loss, rel=1e-5)
        assert end.figures["argmax_accuracy"] == pytest.approx(right)
        assert end.figures["argmax_latency"] == pytest.approx(predict(CHAIN, genotype, table, (1, 12, 12)))
        expected = supernet.expected_cost(table, (1, 12, 12), drawn=False) + 7.0
        assert end.figures["expected_latency"] == pytest.approx(float(expected))
        ended.append(end.epoch)

    search.search(train, val, seed=0, on_epoch=look)
    assert ended == [1, 2, 3]


def test_measuring_the_most_probable_path_changes_nothing():
    results = []
    for quiet in (False, True):
        supernet, (train, val) = CHAIN.supernet(1, 3, seed=0), loaders()
        search = short(supernet)
        if quiet:
            search.validate = lambda validation: {}
        results.append((search.search(train, val, seed=0), dict(supernet.state_dict())))
    (measured, state), (plain, other) = results
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert [e["train_loss"] for e in measured.epochs] == [e["train_loss"] for e in plain.epochs]


@pytest.mark.parametrize(("every", "times"), [(5, 1), (5, 2), (7, 3), (4, 4)])
def test_updates_of_the_architecture_are_spread_evenly(every, times):
    step, net = Alternating(every=every, times=times), nn.Module()
    a, w = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-2.0))

    def objective(supernet, batch, part):
        return a * w if part == "alpha" else (w - a) ** 2

    w_opt, a_opt = torch.optim.SGD([w], lr=1e-3), torch.optim.SGD([a], lr=1e-3)
    moved = ["val_loss" in step.step(net, objective, w_opt, a_opt, None, None, clip=None) for _ in range(3 * every)]
    for start in range(0, 3 * every, every):
        assert sum(moved[start : start + every]) == times
    waits = [b - a for a, b in itertools.pairwise(i for i, each in enumerate(moved) if each)]
    assert max(waits) - min(waits) <= 1


def test_updates_an_epoch_are_made_and_refused_beyond_the_steps(tmp_path):
    supernet, (train, val) = CHAIN.supernet(1, 3, seed=0), loaders()
    search = short(supernet, algo="reinforce", arch_updates=2, epochs=2)
    moves = []
    step = search.step

    def counted(*batches, **options):
        figures = step(*batches, **options)
        moves.append("val_loss" in figures)
        return figures

    search.step = counted
    result = search.search(train, val, seed=0)
    assert len(train) == 3
    assert [sum(moves[i : i + 3]) for i in (0, 3, 6)] == [0, 2, 2]  # the first epoch is the warm-up
    assert result.config["arch_updates"] == 2
    json.dumps(result.config)
    with pytest.raises(ValueError, match="arch_updates must be <= 3, the steps of an epoch, got 4"):
        short(CHAIN.supernet(1, 3, seed=0), arch_updates=4).search(train, val, seed=0)
    with pytest.raises(ValueError, match="arch_updates must be >= 1, got 0"):
        short(CHAIN.supernet(1, 3, seed=0), arch_updates=0)
    with pytest.raises(ValueError, match=r"times must lie in \[1, 5\], the steps of the weights, got 6"):
        Alternating(every=5, times=6)
