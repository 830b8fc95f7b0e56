"""Binary gates against enumerated paths, closed forms, and a mixture that keeps every output."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.cost import saved_bytes
from netwright.nn.batchnorm import frozen_statistics
from netwright.search import spaces
from netwright.search.bilevel import SecondOrder
from netwright.search.binary_gate import BinaryGate
from netwright.search.objective import TaskLoss
from netwright.search.result import expected_macs
from netwright.search.spaces.choices import ChoiceSpace
from netwright.search.spaces.operations import Zero
from netwright.search.supernet import Choice, MaskedGate, SoftmaxGate
from netwright.seeding import seeded, stream

CHAIN = spaces.get("micro-chain")
DOUBLE = torch.float64


class Scaled(nn.Module):
    """A linear operation: a matrix on the channels."""

    def __init__(self, seed, channels=3):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(channels, channels, generator=stream(seed, "matrix"), dtype=DOUBLE))

    def forward(self, x):
        return torch.einsum("oc,bchw->bohw", self.matrix, x)


def linear_choice(key, gate, candidates=3, seed=0):
    return Choice({f"o{i}": Scaled(10 * seed + i) for i in range(candidates)}, key=key, gate=gate)


def block(kernel, channels=4):
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )


def convolutions(gate, seed=0):
    with seeded(seed, "candidates"):
        made = {"1x1": block(1), "3x3": block(3), "skip": nn.Identity(), "none": Zero(), "5x5": block(5)}
    return Choice(made, key="edge", gate=gate)


def image(shape=(5, 4, 6, 6), dtype=torch.float32):
    return torch.randn(*shape, generator=stream(0, "x"), dtype=dtype)


def normal(size, *name, dtype=DOUBLE):
    return torch.randn(size, generator=stream(0, *name), dtype=dtype)


@pytest.mark.parametrize(
    ("alpha", "grad"), [((0.0, 0.0), (-0.5, 0.5)), ((math.log(3), 0.0), (-0.375, 0.375))], ids=["even", "three to one"]
)
@pytest.mark.parametrize("mode", ["two", "full", "full_recompute"])
@pytest.mark.parametrize("active", [0, 1])
def test_worked_gradients(alpha, grad, mode, active):
    gate = BinaryGate(mode)
    choice = Choice({"one": nn.Identity(), "three": Triple()}, key="a", gate=gate)
    choice.drawn = torch.tensor([active, 1 - active])
    alpha = torch.tensor(alpha, dtype=DOUBLE, requires_grad=True)
    y = choice(torch.ones(1, 1, 1, 1, dtype=DOUBLE), alpha)
    assert y.item() == (1.0, 3.0)[active]
    (found,) = torch.autograd.grad(y.sum(), alpha)
    torch.testing.assert_close(found, torch.tensor(grad, dtype=DOUBLE), atol=1e-15, rtol=0)


class Triple(nn.Module):
    def forward(self, x):
        return 3 * x


@pytest.mark.parametrize("mode", ["full", "full_recompute"])
def test_the_mean_over_all_paths_is_the_gradient_of_the_expected_loss_where_it_is_linear(mode):
    first, second = (linear_choice(key, BinaryGate(mode), seed=i) for i, key in enumerate("ab"))
    x, v = image((2, 3, 2, 2), DOUBLE), normal((2, 3, 2, 2), "v")
    alphas = [normal(3, "alpha", i).requires_grad_() for i in range(2)]
    probabilities = [alpha.softmax(0) for alpha in alphas]

    expected = sum(
        probabilities[0][i] * probabilities[1][j] * (second.candidates[f"o{j}"](first.candidates[f"o{i}"](x)) * v).sum()
        for i, j in itertools.product(range(3), repeat=2)
    )
    exact = torch.autograd.grad(expected, alphas)

    estimates = [torch.zeros(3, dtype=DOUBLE) for _ in range(2)]
    for i, j in itertools.product(range(3), repeat=2):
        first.drawn, second.drawn = (torch.tensor([k, *({0, 1, 2} - {k})]) for k in (i, j))
        loss = (second(first(x, alphas[0]), alphas[1]) * v).sum()
        weight = (probabilities[0][i] * probabilities[1][j]).detach()
        for total, grad in zip(estimates, torch.autograd.grad(loss, alphas), strict=True):
            total += weight * grad
    for found, wanted in zip(estimates, exact, strict=True):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("mode", ["two", "full", "full_recompute"])
def test_gradients_have_the_closed_form_and_sum_to_zero(mode):
    choice = linear_choice("a", BinaryGate(mode), candidates=5)
    x, v = image((2, 3, 2, 2), DOUBLE), normal((2, 3, 2, 2), "v")
    alpha = normal(5, "alpha").requires_grad_()
    for number in range(4):
        with seeded(number, "draw"):
            choice.drawn = choice.gate.draw(alpha.detach(), "alpha", 2)
        (grad,) = torch.autograd.grad((choice(x, alpha) * v).sum(), alpha)
        d = torch.stack([(operation(x) * v).sum() for operation in choice.candidates.values()]).detach()
        taking_part = torch.zeros(5, dtype=torch.bool).index_fill(0, choice.drawn, True)
        q = alpha.detach().masked_fill(~taking_part, -torch.inf).softmax(0)
        torch.testing.assert_close(grad, q * (d - q @ d), atol=1e-12, rtol=1e-12)
        assert abs(grad.sum().item()) < 1e-12
        assert torch.equal(grad[~taking_part], torch.zeros_like(grad[~taking_part]))
        assert grad.abs().max() > 0.01


@pytest.mark.parametrize("training", [False, True], ids=["running statistics", "batch statistics"])
@pytest.mark.parametrize("active", range(5))
def test_kept_and_recomputed_outputs_agree_with_a_mixture_of_all(training, active):
    drawn = torch.tensor([active, *({0, 1, 2, 3, 4} - {active})])
    x, v = image(dtype=DOUBLE), normal((5, 4, 6, 6), "v")
    results = {}
    for mode in ("full", "full_recompute", "naive"):
        choice = convolutions(BinaryGate("full" if mode == "naive" else mode)).double()
        for norm in (m for m in choice.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.copy_(torch.arange(4) / 4)
            norm.train(training)
        choice.drawn = drawn
        alpha = normal(5, "alpha").requires_grad_()
        given = x.clone().requires_grad_()
        before = {name: value.clone() for name, value in choice.named_buffers()}
        y = choice.mix(given, choice.gate.weights(alpha, True, drawn)) if mode == "naive" else choice(given, alpha)
        weights = [p for p in choice.parameters()]
        grads = torch.autograd.grad((y * v).sum(), [alpha, given, *weights], allow_unused=True)
        results[mode] = y, grads
        if mode != "naive":
            names = list(choice.candidates)
            for name, value in choice.named_buffers():
                moved = training and name.split(".")[1] == names[active]
                assert torch.equal(value, before[name]) != moved, name
                if moved and name.endswith("num_batches_tracked"):
                    assert value.item() == 1
            for (name, _), grad in zip(choice.named_parameters(), grads[2:], strict=True):
                assert (grad is not None) == (name.split(".")[1] == names[active]), name
    for mode in ("full", "full_recompute"):
        torch.testing.assert_close(results[mode][0], results["naive"][0], atol=1e-6, rtol=1e-6)
        for found, wanted in zip(results[mode][1], results["naive"][1], strict=True):
            if found is not None:
                torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert results["full"][1][0].abs().max() > 0.1


@pytest.mark.parametrize(("part", "mode", "ran"), [("weights", "two", 1), ("weights", "full", 1), ("alpha", "two", 2)])
def test_only_what_was_drawn_runs(part, mode, ran):
    choice, runs = convolutions(BinaryGate(mode)), []
    for name, operation in choice.candidates.items():
        operation.register_forward_hook(lambda *_, name=name: runs.append(name))
    alpha = torch.zeros(5, requires_grad=True)
    choice.drawn = choice.gate.draw(alpha.detach(), part, 5)
    choice(image(), alpha)
    assert len(runs) == ran
    assert runs[0] == choice.names[int(choice.drawn[0])]
    runs.clear()
    with torch.no_grad():
        choice(image(), alpha)
    assert len(runs) == 1


def test_recomputed_candidates_run_in_the_backward_pass():
    choice, runs = convolutions(BinaryGate("full_recompute")), []
    for name, operation in choice.candidates.items():
        operation.register_forward_hook(lambda *_, name=name: runs.append(name))
    alpha = torch.zeros(5, requires_grad=True)
    choice.drawn = torch.arange(5)
    y = choice(image(), alpha)
    assert runs == ["1x1"]
    y.sum().backward()
    assert runs == list(choice.names)


def share(count, of):
    return count / of, 4 * math.sqrt(0.25 / of)


def test_paths_are_drawn_by_the_softmax():
    alpha = torch.tensor([1.0, 0.0, -1.0])
    for part, mode in (("weights", "two"), ("alpha", "full")):
        with seeded(0, "draws", part):
            first = [int(BinaryGate(mode).draw(alpha, part, 1)[0]) for _ in range(3000)]
        for number, p in enumerate(alpha.softmax(0).tolist()):
            found, error = share(first.count(number), 3000)
            assert found == pytest.approx(p, abs=error)


def test_pairs_are_drawn_without_replacement_and_run_by_their_own_softmax():
    alpha = torch.tensor([1.0, 0.0, -1.0])
    p = alpha.softmax(0).tolist()
    with seeded(0, "pairs"):
        drawn = [tuple(BinaryGate("two").draw(alpha, "alpha", 1).tolist()) for _ in range(4000)]
    for i, j in itertools.permutations(range(3), 2):
        pair = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        found, error = share(drawn.count((i, j)), 4000)
        assert found == pytest.approx(pair * p[i] / (p[i] + p[j]), abs=error)


@pytest.mark.parametrize(("part", "mode"), [("weights", "two"), ("alpha", "two"), ("alpha", "full")])
def test_choices_of_different_sizes_are_drawn_together_each_by_its_own_softmax(part, mode):
    alphas = [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0, -1.0, 0.5, 0.0]), torch.tensor([-1.0, 0.0, 2.0])]
    with seeded(0, "together", part, mode):
        draws = [BinaryGate(mode).draw_all(alphas, part, 1) for _ in range(2500)]
    for place, alpha in enumerate(alphas):
        rows = torch.stack([draw[place] for draw in draws])
        size = {"weights": 1}.get(part, 2 if mode == "two" else len(alpha))
        assert rows.shape == (2500, size)
        assert 0 <= rows.min() <= rows.max() < len(alpha)
        assert all(len(set(row)) == size for row in rows.tolist())
        if part == "weights" or mode == "full":
            for number, p in enumerate(alpha.softmax(0).tolist()):
                found, error = share(int((rows[:, 0] == number).sum()), 2500)
                assert found == pytest.approx(p, abs=error)
    # independent of each other: the joint share is the product
    both = sum(int(draw[0][0]) == 1 and int(draw[2][0]) == 2 for draw in draws)
    singles = [sum(int(draw[i][0]) == number for draw in draws) for i, number in ((0, 1), (2, 2))]
    found, error = share(both, 2500)
    assert found == pytest.approx(math.prod(singles) / 2500**2, abs=error)


def test_decided_alphas_still_give_two_different_candidates():
    alpha = torch.tensor([500.0, -500.0, 0.0, 0.0])
    for number in range(20):
        with seeded(number, "draw"):
            first, second = BinaryGate("two").draw(alpha, "alpha", 1).tolist()
        assert (first, second) in ((0, 2), (0, 3))


def test_a_pair_keeps_its_probability_and_so_do_all_others():
    gate = BinaryGate("two")
    before = normal(6, "alpha", dtype=torch.float32)
    alpha, drawn = before.clone(), torch.tensor([4, 1])
    alpha[drawn] += torch.tensor([0.3, -0.1])
    moved = alpha.softmax(0)
    assert (moved - before.softmax(0)).abs().max() > 0.01
    gate.rescale(alpha, before, drawn)
    after, wanted = alpha.double().softmax(0), before.double().softmax(0)
    rest = [0, 2, 3, 5]
    assert torch.equal(alpha[rest], before[rest])
    torch.testing.assert_close(after[rest], wanted[rest], atol=1e-7, rtol=0)
    torch.testing.assert_close(after[drawn].sum(), wanted[drawn].sum(), atol=1e-7, rtol=0)
    ratio = (alpha[4] - alpha[1]) - (before[4] - before[1])
    assert ratio.item() == pytest.approx(0.4, abs=1e-6)
    for same, passed in ((BinaryGate("full"), drawn), (gate, torch.tensor([4])), (gate, None)):
        kept = alpha.clone()
        same.rescale(kept, before, passed)
        assert torch.equal(kept, alpha)


@pytest.mark.parametrize("mode", ["two", "full"])
def test_an_identity_beside_blocks_with_shortcuts_is_a_zero_under_one_shortcut(mode):
    """The paper's block adds one shortcut to a mixture with a zero; here each candidate has it, and the zero is it."""

    class Shortcut(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return x + self.inner(x)

    inner = {f"o{i}": Scaled(i) for i in range(2)}
    ours = Choice({k: Shortcut(o) for k, o in inner.items()} | {"skip": nn.Identity()}, key="a", gate=BinaryGate(mode))
    paper = Choice({**inner, "skip": Zero()}, key="a", gate=BinaryGate(mode))
    x, v = image((2, 3, 2, 2), DOUBLE), normal((2, 3, 2, 2), "v")
    alpha = normal(3, "alpha").requires_grad_()
    for number in range(6):
        with seeded(number, "draw"):
            drawn = BinaryGate(mode).draw(alpha.detach(), "alpha", 2)
        ours.drawn = paper.drawn = drawn
        outputs = ours(x, alpha), x + paper(x, alpha)
        torch.testing.assert_close(outputs[0], outputs[1], atol=1e-12, rtol=1e-12)
        grads = [torch.autograd.grad((y * v).sum(), alpha)[0] for y in outputs]
        assert grads[0].abs().max() > 1e-3
        torch.testing.assert_close(grads[0], grads[1], atol=1e-12, rtol=1e-12)


def test_the_gradient_of_a_running_zero_is_left_out_on_request():
    for operation, silent in (("none", True), ("skip", True), ("3x3", False)):
        for mode in ("full", "full_recompute"):
            for flag in (False, True):
                choice = convolutions(BinaryGate(mode, skip_zero_grad=flag))
                active = choice.names.index(operation)
                choice.drawn = torch.tensor([active, *({0, 1, 2, 3, 4} - {active})])
                alpha, x = torch.zeros(5, requires_grad=True), image().requires_grad_()
                loss = (choice(x, alpha) + x).square().sum()
                (grad,) = torch.autograd.grad(loss, alpha, allow_unused=True)
                assert (grad is None) == (flag and silent)
                assert choice.gate.leaves_out(choice) == (flag and silent)


def test_evaluation_runs_the_network_that_would_be_derived():
    supernet = CHAIN.supernet(1, 3, seed=0, gate=BinaryGate()).eval()
    soft = copy.deepcopy(supernet)
    for alpha, sharp in zip(supernet.arch.values(), soft.arch.values(), strict=True):
        alpha.data.copy_(normal(len(alpha), "alpha", len(alpha), dtype=torch.float32))
        sharp.data.copy_(torch.where(alpha == alpha.max(), 1e4, 0.0))
    soft.set_gate(SoftmaxGate())
    supernet.redraw("alpha", 4)
    x = image((4, 1, 16, 16))
    torch.testing.assert_close(supernet(x), soft(x), atol=1e-6, rtol=1e-6)
    assert all(m.max() == 1.0 == m.sum() for m in supernet.arch.values() for m in [BinaryGate().weights(m, False)])
    assert not torch.allclose(supernet.train()(x), soft.train()(x))


def small_space():
    def network(choose, in_channels, num_classes):
        def conv(kernel):
            return lambda: nn.Conv2d(2, 2, kernel, padding=kernel // 2)

        layers = [choose(name, {f"k{k}": conv(k) for k in (1, 3, 5)}, kind=name) for name in "abc"]
        return nn.Sequential(nn.Conv2d(in_channels, 2, 1), *layers, nn.Flatten(), nn.LazyLinear(num_classes))

    return ChoiceSpace("three-by-three", network, shape=(4, 4))


@pytest.mark.parametrize("mode", ["full", "two"])
def test_expected_cost_is_the_mean_over_all_paths_and_its_gradient_a_difference(mode):
    supernet = small_space().supernet(1, 2, gate=BinaryGate(mode)).double().train()
    table = {key: float(normal(1, str(key)).abs()) for key in supernet.operations((1, 4, 4))}
    costs = [
        [table[f"k{k}", 2, 2, 4, 4, 1, name] for k in (1, 3, 5)] for name in "abc"
    ]  # the kind of a candidate is its layer
    for name, alpha in supernet.arch.items():
        alpha.data.copy_(normal(3, name))
    with seeded(0, "draw"):
        supernet.redraw("alpha", 1)
    choices = supernet.keyed_choices()

    def by_enumeration():
        rows = []
        for name, alpha in supernet.arch.items():
            drawn = set(choices[name].drawn.tolist())
            kept = torch.tensor([i in drawn for i in range(3)])
            rows.append(alpha.detach().masked_fill(~kept, -torch.inf).softmax(0).tolist())
        return sum(
            math.prod(row[i] for row, i in zip(rows, path, strict=True))
            * sum(cost[i] for cost, i in zip(costs, path, strict=True))
            for path in itertools.product(range(3), repeat=3)
        )

    cost = supernet.expected_cost(table, (1, 4, 4))
    assert cost.item() == pytest.approx(by_enumeration(), abs=1e-9)
    grads = torch.autograd.grad(cost, supernet.arch_parameters())
    for alpha, grad in zip(supernet.arch_parameters(), grads, strict=True):
        for i in range(3):
            found = []
            for sign in (1, -1):
                alpha.data[i] += sign * 1e-5
                found.append(by_enumeration())
                alpha.data[i] -= sign * 1e-5
            assert grad[i].item() == pytest.approx((found[0] - found[1]) / 2e-5, abs=1e-8)


def test_a_pass_of_the_weights_costs_what_its_path_costs_and_a_result_what_is_expected():
    supernet = CHAIN.supernet(1, 3, gate=BinaryGate()).train()
    table = {key: float(number) for number, key in enumerate(supernet.operations((1, 16, 16)), start=1)}
    before = expected_macs(supernet, (1, 16, 16))
    supernet.redraw("weights", 1)
    path = {key: choice.names[int(choice.drawn[0])] for key, choice in supernet.keyed_choices().items()}
    total = 0.0
    for key, choice in supernet.keyed_choices().items():
        if path[key] != "skip":
            c_in, c_out = (choice.candidates[path[key]].conv[i] for i in (0, -2))
            side = {0: 16, 1: 16, 2: 16, 3: 8, 4: 8, 5: 4}[int(key[-1])]
            total += table[path[key], c_in.in_channels, c_out.out_channels, side, side, choice.stride, choice.kind]
    assert supernet.expected_cost(table, (1, 16, 16)).item() == pytest.approx(total)
    assert expected_macs(supernet, (1, 16, 16)) == before


def derived(supernet, genotype):
    """A path's own network with the weights that the supernet has for it."""
    network = supernet.space.build(genotype, 1, 10)
    chosen = dict(genotype.decisions)
    state = {}
    for name, value in supernet.network.state_dict().items():
        for path, choice in supernet.network.named_modules():
            if isinstance(choice, Choice) and name.startswith(f"{path}.candidates."):
                inside = name.removeprefix(f"{path}.candidates.")
                if inside.split(".")[0] == chosen[choice.key]:
                    state[f"{path}.{inside.partition('.')[2]}"] = value
                break
        else:
            state[name] = value
    network.load_state_dict(state)
    return network.train()


@pytest.mark.parametrize("mode", ["two", "full_recompute"])
def test_memory_is_that_of_one_path(mode):
    supernet = CHAIN.supernet(1, 10, gate=BinaryGate(mode)).train()
    mixture = CHAIN.supernet(1, 10).train()
    x = image((16, 1, 16, 16))
    with frozen_statistics(mixture):
        whole = saved_bytes(lambda: mixture(x))
    for number in range(6):
        with seeded(number, "draw"):
            supernet.redraw("alpha", 16)
        choices = supernet.keyed_choices()
        path = {key: choice.names[int(choice.drawn[0])] for key, choice in choices.items()}
        network = derived(supernet, CHAIN.genotype(path))
        with frozen_statistics(supernet), frozen_statistics(network):
            torch.testing.assert_close(supernet(x), network(x), atol=1e-5, rtol=1e-5)
            alone, gated = (saved_bytes(lambda net=net: net(x)) for net in (network, supernet))
            for choice in choices.values():
                choice.drawn = choice.drawn[:1]
            weights = saved_bytes(lambda: supernet(x))
        assert weights == alone
        assert alone < gated <= 1.3 * alone
        assert gated <= 0.5 * whole


def test_second_order_is_refused_and_says_why():
    supernet = CHAIN.supernet(1, 3, gate=MaskedGate(BinaryGate(), [True] * 4))
    batch = image((4, 1, 16, 16)), torch.tensor([0, 1, 2, 0])
    w_opt = torch.optim.SGD(supernet.weight_parameters(), lr=0.1)
    a_opt = torch.optim.Adam(supernet.arch_parameters())
    with pytest.raises(ValueError, match=r"second order must have derivatives .* use FirstOrder"):
        SecondOrder().step(supernet, TaskLoss(), w_opt, a_opt, batch, batch)


def test_candidates_that_change_shape_are_refused_when_the_supernet_is_built():
    def network(choose, in_channels, num_classes):
        wrong = {"a": lambda: nn.Conv2d(in_channels, 4, 1), "b": lambda: nn.Conv2d(in_channels, 4, 1, stride=2)}
        return nn.Sequential(choose("place", wrong), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

    with pytest.raises(ValueError, match=r"'place'.*'b' gives shape"):
        ChoiceSpace("wrong", network).supernet(1, 2, gate=BinaryGate())


class Fixed(nn.Module):
    """Equal shapes at a side of 6 alone."""

    def forward(self, x):
        return functional.adaptive_avg_pool2d(x, 6)


@pytest.mark.parametrize("mode", ["two", "full", "full_recompute"])
def test_candidates_that_differ_at_another_size_are_refused(mode):
    choice = Choice({"a": nn.Identity(), "b": Fixed()}, key="edge", gate=BinaryGate(mode))
    choice.drawn = torch.tensor([0, 1])
    alpha = torch.zeros(2, requires_grad=True)
    choice(image(), alpha).sum().backward()
    with pytest.raises(ValueError, match="'edge': candidate 'b' gives shape"):
        choice(image((2, 4, 8, 8)).requires_grad_(), alpha).sum().backward()


def test_bad_modes_and_single_candidates():
    with pytest.raises(ValueError, match="mode must be one of two, full, full_recompute, got 'three'"):
        BinaryGate("three")
    with pytest.raises(ValueError, match="mode 'two' must have at least 2 candidates, got 1"):
        BinaryGate("two").draw_all([torch.zeros(3), torch.zeros(1)], "alpha", 1)
    assert BinaryGate("two").draw(torch.zeros(1), "weights", 1).tolist() == [0]
    assert BinaryGate("full").draw(torch.zeros(1), "alpha", 1).tolist() == [0]
