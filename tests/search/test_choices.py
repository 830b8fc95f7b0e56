"""Spaces of choices and chains: one function makes supernet and derived network."""

import copy
import math

import pytest
import torch
from torch import nn

from netwright.cost import count
from netwright.nn.mbconv import MBConv
from netwright.search import spaces
from netwright.search.bilevel import FirstOrder
from netwright.search.darts import DARTS
from netwright.search.dass import DASS, DASSStages
from netwright.search.genotype import ChoiceGenotype, Genotype
from netwright.search.objective import CostPenalty, TaskLoss
from netwright.search.perturbation import PerturbationSelector
from netwright.search.selection import ArgmaxSelector
from netwright.search.spaces.chain import Block, Chain, Stage, mbconv_space
from netwright.search.spaces.choices import ChoiceSpace
from netwright.search.supernet import FixedGate, Gate, MaskedGate, SoftmaxGate
from netwright.seeding import stream

CHAIN = spaces.get("micro-chain")


def batch(classes=3, size=12):
    draw = stream(0, "batch")
    return torch.rand(6, 1, size, size, generator=draw), torch.tensor([0, 1, 2, 0, 1, 2]) % classes


def two_convolutions(choose, in_channels, num_classes, width=4):
    def conv(kernel):
        return lambda: nn.Conv2d(width, width, kernel, padding=kernel // 2)

    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        choose("a", {"1x1": conv(1), "3x3": conv(3), "skip": nn.Identity}),
        nn.ReLU(),
        choose("b", {"3x3": conv(3), "5x5": conv(5)}),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


OWN = ChoiceSpace("two-convolutions", two_convolutions, shape=(8, 8))


def one_hot(supernet, genotype):
    for key, name in supernet.space.decisions(genotype).items():
        names = supernet.keyed_choices()[key].names
        supernet.arch[key].data = torch.where(torch.arange(len(names)) == names.index(name), 1e4, 0.0)


def test_choices_are_those_the_network_asks_for():
    assert OWN.choices() == {"a": ("1x1", "3x3", "skip"), "b": ("3x3", "5x5")}
    assert OWN.size == 6
    assert CHAIN.size == 4**3 * 5**3
    assert list(CHAIN.choices()) == [f"layer_{i}" for i in range(6)]


@pytest.mark.parametrize("space", [OWN, CHAIN], ids=lambda space: space.name)
def test_one_hot_supernet_equals_the_derived_network(space):
    supernet = space.supernet(1, 3, seed=0)
    supernet.train()
    genotype = space.random(stream(3, "random"))
    one_hot(supernet, genotype)
    derived = space.build(genotype, 1, 3, seed=1).train()
    candidates = {
        f"{name}.candidates.{dict(genotype.decisions)[c.key]}.": f"{name}." for name, c in supernet.named_choices()
    }
    state = {}
    for name, value in supernet.state_dict().items():
        for prefix, plain in candidates.items():
            if name.startswith(prefix):
                state[name.replace(prefix, plain).removeprefix("network.")] = value
        if name.startswith("network.") and ".candidates." not in name:
            state[name.removeprefix("network.")] = value
    derived.load_state_dict(state)
    x = batch(size=16)[0]
    torch.testing.assert_close(supernet(x), derived(x), rtol=1e-5, atol=1e-5)


def test_weights_lie_in_the_order_of_the_images():
    supernet = CHAIN.supernet(1, 3)
    for copied in (supernet, copy.deepcopy(supernet)):
        weights = [p for p in copied.weight_parameters() if p.ndim == 4]
        assert len(weights) > 20
        for weight in weights:
            assert weight.stride() == torch.empty_like(weight, memory_format=torch.channels_last).stride()


def test_the_same_seed_gives_the_same_network_and_json_keeps_a_genotype():
    genotype = CHAIN.random(stream(0, "random"))
    again = Genotype.from_json(genotype.to_json())
    assert again == genotype
    assert hash(again) == hash(genotype)
    first, second = (g.build(1, 3, seed=5).state_dict() for g in (genotype, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_parameters_and_multiply_adds_of_a_chain_by_hand():
    genotype = CHAIN.genotype(dict.fromkeys(CHAIN.choices(), "k3_e2"))
    cost = count(genotype.build(1, 10), (1, 16, 16))
    parameters, macs, width, side = 9 * 8 + 2 * 8, 9 * 8 * 256, 8, 16
    for c_out, stride in ((12, 1), (12, 1), (16, 2), (16, 1), (24, 2), (24, 1)):
        inside, out = 2 * width, side // stride
        parameters += width * inside + 9 * inside + inside * c_out + 2 * (2 * inside + c_out)
        macs += width * inside * side**2 + (9 * inside + inside * c_out) * out**2
        width, side = c_out, out
    assert cost.parameters == parameters + 24 * 10 + 10
    assert cost.macs == macs + 240


def test_a_chain_grows_in_width_and_takes_other_stems():
    genotype = CHAIN.random(stream(0, "random"))
    wide = genotype.build(3, 5, channels=16, stem="strided")
    assert wide(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert next(m for m in wide.modules() if isinstance(m, nn.Linear)).in_features == 48
    assert genotype.build(3, 5, stem="imagenet")(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_skips_stand_only_where_shapes_stay():
    space = mbconv_space("s", stem=8, width=(8, 12), depth=(2, 2), stride=(1, 1), kernels=(3,), expansions=(3,))
    assert ["skip" in names for names in space.choices().values()] == [True, True, False, True]
    later = mbconv_space(
        "s", stem=8, width=(8,), depth=(2,), stride=(1,), kernels=(3,), expansions=(3,), skip_first=False
    )
    assert ["skip" in names for names in later.choices().values()] == [False, True]


def test_fixed_stages_ask_nothing():
    chain = Chain(8, (Stage(8, 1, 1, "k3_e1"), Stage(12, 1, 2), Stage(16, 1, 1, "k3_e6")), ("k3_e3", "k5_e3"), head=20)
    space = ChoiceSpace("fixed", chain)
    assert space.choices() == {"layer_1": ("k3_e3", "k5_e3")}
    network = space.build(space.genotype({"layer_1": "k5_e3"}))
    assert [m.conv[0].out_channels for m in network if isinstance(m, MBConv)] == [8, 24, 72]
    assert network[-1].in_features == 20


def test_a_choice_of_one_is_a_choice():
    space = ChoiceSpace("one", lambda choose, i, n: nn.Sequential(choose("a", {"b": nn.Identity}), nn.Linear(1, n)))
    assert (space.choices(), space.size) == ({"a": ("b",)}, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChoiceSpace("x", lambda choose, i, n: nn.Linear(1, 1)).choices(), "at least 1 choice"),
        (lambda: ChoiceSpace("x", lambda choose, i, n: choose("a.b", {"c": nn.Identity})).choices(), "without a dot"),
        (lambda: ChoiceSpace("x", lambda choose, i, n: choose("a", {})).choices(), "at least 1 candidate"),
        (lambda: ChoiceSpace("", two_convolutions), "name must be a string that is not empty"),
        (lambda: ChoiceSpace("x", two_convolutions, shape=(0, 1)), r"shape must be .* got \(0, 1\)"),
        (lambda: OWN.genotype({"a": "1x1"}), "missing b"),
        (lambda: OWN.genotype({"a": "1x1", "b": "3x3", "c": "3x3"}), "got 'c'"),
        (lambda: OWN.genotype({"a": "1x1", "b": "4x4"}), "'b' must be one of 3x3, 5x5, got '4x4'"),
        (lambda: OWN.validate(CHAIN.random(stream(0, "random"))), "must be of space 'two-convolutions'"),
        (lambda: OWN.validate(ChoiceGenotype((("a", "1x1"),), "two-convolutions", 2)), "version 1"),
        (lambda: Block.of("k3"), "must be named like"),
        (lambda: CHAIN.build(CHAIN.random(stream(0, "random")), cells=3), "cells must be 6"),
        (lambda: CHAIN.build(CHAIN.random(stream(0, "random")), drop_path=0.1), "no drop path"),
        (lambda: mbconv_space("x", width=(8,)), "equally long, got 1, 6 and 6"),
        (lambda: ChoiceGenotype((), "x"), "at least one choice"),
        (lambda: Genotype.from_dict({"decisions": 3, "space": "micro-chain", "version": 1}), "not a genotype"),
        (lambda: Genotype.from_dict({"decisions": {}, "version": 1}), "must have the field 'space'"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_candidates_of_other_shapes_are_refused():
    def network(choose, in_channels, num_classes):
        wrong = {"a": lambda: nn.Conv2d(in_channels, 4, 1), "b": lambda: nn.Conv2d(in_channels, 5, 1)}
        return nn.Sequential(choose("place", wrong), nn.Flatten(), nn.LazyLinear(num_classes))

    with pytest.raises(ValueError, match=r"'place'.*'b' gives shape"):
        ChoiceSpace("wrong", network).supernet(1, 2)


def test_a_choice_outside_a_pass_has_no_alpha():
    supernet = OWN.supernet(1, 3)
    with pytest.raises(LookupError):
        supernet.network(torch.zeros(1, 1, 8, 8))


def test_copies_and_functional_calls_use_their_own_alpha():
    supernet = OWN.supernet(1, 3, seed=0).eval()
    x = batch(size=8)[0]
    other = copy.deepcopy(supernet)
    for alpha in other.arch_parameters():
        alpha.data.add_(torch.arange(len(alpha)))
    called = torch.func.functional_call(supernet, dict(other.named_parameters()), (x,))
    assert torch.equal(called, other(x))
    assert not torch.equal(called, supernet(x))


@pytest.mark.parametrize("space", [OWN, CHAIN], ids=lambda space: space.name)
@pytest.mark.parametrize("search", ["first", "second", "dass"])
def test_every_search_and_selection_works(space, search):
    supernet = space.supernet(1, 3, seed=0)
    table = dict.fromkeys(supernet.operations((1, 12, 12)), 2.0)
    objective = TaskLoss() + CostPenalty("add_linear", table, ref=4.0)
    if search == "dass":
        searcher = DASS(supernet, 0.5, DASSStages(1, 1, 1), objective=objective, unrolled=False)
    else:
        searcher = DARTS(supernet, 1 if search == "first" else 2, objective, ArgmaxSelector(), epochs=1)
    before = {key: alpha.detach().clone() for key, alpha in supernet.arch.items()}
    result = searcher.search([batch()], [batch()], seed=0)
    assert any(not torch.equal(before[key], alpha) for key, alpha in searcher.supernet.arch.items())
    chosen = PerturbationSelector(tune_epochs=1).select(supernet, [batch()], [batch()])
    for genotype in (result.genotype, chosen):
        assert space.build(genotype, 1, 3)(batch()[0]).shape == (6, 3)


def test_expected_cost_counts_skips_as_nothing_and_follows_alpha():
    supernet = CHAIN.supernet(1, 3)
    table = {key: float(count(op, shape).macs) for key, (op, shape) in supernet.operations((1, 16, 16)).items()}
    genotype = CHAIN.random(stream(7, "random"))
    one_hot(supernet, genotype)
    whole = count(genotype.build(1, 3), (1, 16, 16)).macs
    stem_and_classifier = 9 * 8 * 256 + 24 * 3
    assert supernet.expected_cost(table, (1, 16, 16)).item() == pytest.approx(whole - stem_and_classifier, rel=1e-6)


class Coin(Gate):
    """One candidate drawn by chance."""

    def draw(self, alpha, part, batch):
        return torch.multinomial(alpha.softmax(-1), 1)

    def weights(self, alpha, training, drawn=None):
        if not training or drawn is None:
            return alpha.softmax(-1)
        return torch.zeros_like(alpha).scatter(0, drawn, 1.0)


def test_gates_draw_once_a_pass_and_costs_see_the_same_draw():
    supernet = CHAIN.supernet(1, 3, gate=Coin()).train()
    table = {key: float(number) for number, key in enumerate(supernet.operations((1, 16, 16)), start=1)}
    seen = set()
    for number in range(5):
        torch.manual_seed(number)
        TaskLoss()(supernet, batch(), "weights")
        weights = supernet.mixing_weights(drawn=True)
        assert all(float(m.max()) == 1.0 == float(m.sum()) for m in weights.values())
        cost = float(supernet.expected_cost(table, (1, 16, 16)))
        assert math.isclose(cost, round(cost), abs_tol=1e-4)
        seen.add(cost)
    assert len(seen) > 1
    assert all(float(m.max()) < 0.3 for m in supernet.eval().mixing_weights().values())


def test_choices_of_one_key_share_a_draw():
    supernet = spaces.get("micro-darts-2").supernet(1, 3, channels=2, cells=5, gate=Coin())
    supernet.redraw("weights", 4)
    by_key = {}
    for _, choice in supernet.named_choices():
        assert by_key.setdefault(choice.key, choice.drawn) is choice.drawn


def test_wrapped_gates_pass_draws_on():
    alpha = torch.tensor([0.0, 5.0])
    masked = MaskedGate(Coin(), [True, False])
    assert masked.draw(alpha, "weights", 1).shape == (1,)
    assert masked.weights(alpha, True, torch.tensor([1])).tolist() == [0.0, 0.0]
    assert masked.expectation(alpha, torch.tensor([0])).tolist() == [1.0, 0.0]
    assert FixedGate(1, 2).draw(alpha, "alpha", 1) is None
    assert SoftmaxGate().expectation(alpha).tolist() == alpha.softmax(-1).tolist()


def test_one_set_of_weights_an_input():
    supernet = OWN.supernet(1, 3)
    choice = supernet.keyed_choices()["a"]
    x = torch.rand(3, 4, 5, 5)
    weights = torch.rand(3, 3)
    rows = torch.cat([choice.mix(x[i : i + 1], weights[i]) for i in range(3)])
    torch.testing.assert_close(choice.mix(x, weights), rows)


def test_an_unfit_step_leaves_weights_alone_without_an_optimiser():
    supernet = CHAIN.supernet(1, 3, seed=0)
    before = [p.detach().clone() for p in supernet.weight_parameters()]
    a_opt = torch.optim.Adam(supernet.arch_parameters(), lr=0.1)
    FirstOrder().step(supernet, TaskLoss(), None, a_opt, batch(), batch())
    assert all(torch.equal(a, b) for a, b in zip(before, supernet.weight_parameters(), strict=True))


class Counting(Coin):
    """Draws all its choices in one call."""

    def __init__(self):
        self.served = []

    def draw_all(self, alphas, part, batch):
        self.served.append(len(alphas))
        return super().draw_all(alphas, part, batch)


def test_a_gate_draws_for_all_choices_it_serves_at_once():
    first, second = Counting(), Counting()
    supernet = CHAIN.supernet(1, 3, gate=first).train()
    supernet.set_gate(second, "layer_2")
    supernet.redraw("weights", 2)
    assert (first.served, second.served) == ([5], [1])
    assert all(choice.drawn.shape == (1,) for _, choice in supernet.named_choices())


def test_costs_of_candidates_are_summed_over_the_choices_that_share_them():
    supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, cells=3)
    table = {key: float(number) for number, key in enumerate(supernet.operations((1, 8, 8)), start=1)}
    costs = supernet.candidate_costs(table, (1, 8, 8))
    expected = sum(m.detach() @ torch.tensor(costs[key]) for key, m in supernet.mixing_weights().items())
    assert supernet.expected_cost(table, (1, 8, 8)).item() == pytest.approx(expected.item(), rel=1e-5)
    rows = supernet.candidate_costs(dict.fromkeys(table, 1.0), (1, 8, 8))
    # Three cells share each edge; a skip connection costs only where it shrinks its input.
    assert all(row == [0.0, float(key in ("normal_0_2", "normal_1_2", "normal_0_3", "normal_1_3")), 3.0, 3.0, 3.0]
               for key, row in rows.items())  # fmt: skip
