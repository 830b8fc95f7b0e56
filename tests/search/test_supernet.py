import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.search import CostPenalty, ExpectedCost, SuperKernelSupernet, spaces
from netwright.search.spaces.operations import FactorizedReduce, Zero, operation
from netwright.search.supernet import Choice, Gate, MaskedGate, SoftmaxGate, Supernet
from netwright.seeding import seeded, stream

PRIMITIVES = spaces.DARTS_PRIMITIVES


def _choice(stride=1, channels=4, gate=None):
    with seeded(0, "choice"):
        candidates = {name: operation(name, channels, stride, search=True) for name in PRIMITIVES}
        return Choice(candidates, key="edge", gate=gate or SoftmaxGate(), stride=stride)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_the_fast_mixture_is_the_plain_sum(stride, training):
    choice = _choice(stride).train(training)
    plain = copy.deepcopy(choice)
    x = torch.randn(3, 4, 7, 6, generator=stream(0, "x"))
    alpha = torch.randn(8, generator=stream(0, "alpha")).requires_grad_()
    expected = sum(m * o(x) for m, o in zip(alpha.softmax(0), plain.candidates.values(), strict=True))
    y = choice(x, alpha)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(y.shape, generator=stream(0, "w"))
    (fast,) = torch.autograd.grad((y * weights).sum(), alpha)
    (slow,) = torch.autograd.grad((expected * weights).sum(), alpha)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    for a, b in zip(choice.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_masked_weights_are_not_renormalised_and_masked_operations_do_not_run():
    alpha = torch.tensor([0.2, 0.3, 0.5]).log()
    weights = MaskedGate(SoftmaxGate(), [True, True, False]).weights(alpha, training=True)
    torch.testing.assert_close(weights, torch.tensor([0.2, 0.3, 0.0]))

    class Refuses(nn.Module):
        def forward(self, x):
            raise AssertionError

    gate = MaskedGate(SoftmaxGate(), [True, True, False])
    choice = Choice({"a": nn.Identity(), "none": Zero(), "b": Refuses()}, key="edge", gate=gate)
    torch.testing.assert_close(choice(torch.ones(1, 1, 1, 1), alpha), torch.full((1, 1, 1, 1), 0.2))
    choice.gate = MaskedGate(SoftmaxGate(), [False] * 3)
    assert torch.equal(choice(torch.ones(2, 1, 3, 3), alpha), torch.zeros(2, 1, 3, 3))
    with pytest.raises(ValueError, match="one entry for each of 3"):
        MaskedGate(SoftmaxGate(), [True]).weights(alpha, training=True)


def test_an_empty_edge_of_stride_2_has_the_right_shape():
    choice = _choice(2, gate=MaskedGate(SoftmaxGate(), [False] * 8))
    assert torch.equal(choice(torch.ones(2, 4, 7, 1), torch.zeros(8)), torch.zeros(2, 4, 4, 1))


def test_faulty_choices_are_refused():
    with pytest.raises(ValueError, match="'edge' must have at least 1 candidate, got 0"):
        Choice({}, key="edge", gate=SoftmaxGate())
    with pytest.raises(ValueError, match="without a dot"):
        Choice({"a": nn.Identity()}, key="a.b", gate=SoftmaxGate())
    choice = Choice({"a": nn.Identity(), "b": nn.Conv2d(2, 1, 1)}, key="edge", gate=SoftmaxGate())
    with pytest.raises(ValueError, match="choice 'edge': candidate 'b' gives shape"):
        choice(torch.ones(1, 2, 3, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="has 2 candidates, got 3 weights"):
        choice(torch.ones(1, 2, 3, 3), torch.zeros(3))


class Chain(Supernet):
    """The smallest supernet of a user: two choices in a row."""

    def __init__(self, first, second, keys=("a", "b")):
        super().__init__(ChainSpace(), 2)
        self.layers = nn.ModuleList(
            Choice(candidates, key=key, gate=SoftmaxGate())
            for candidates, key in zip((first, second), keys, strict=True)
        )
        self.initialise_arch(0, (2, 4, 4))

    def forward(self, x):
        self.input_shape = tuple(x.shape[1:])
        for layer in self.layers:
            x = layer(x, self.arch[layer.key])
        return x.mean((2, 3))


class ChainSpace:
    def genotype(self, decisions):
        return tuple(decisions.items())


def _pair():
    return {"conv": nn.Conv2d(2, 2, 3, padding=1, bias=False), "skip": nn.Identity()}


def test_a_users_supernet_refuses_candidates_that_disagree():
    with pytest.raises(ValueError, match="choice 'b': candidate 'wide'"):
        Chain(_pair(), {"skip": nn.Identity(), "wide": nn.Conv2d(2, 3, 1)})
    with pytest.raises(ValueError, match="key 'a' must have the same candidates"):
        Chain(_pair(), {"skip": nn.Identity()}, keys=("a", "a"))


def test_choices_of_one_key_share_alpha():
    supernet = Chain(_pair(), _pair(), keys=("a", "a"))
    assert list(supernet.arch) == ["a"]
    loss = supernet(torch.randn(2, 2, 4, 4, generator=stream(0, "x"))).square().sum()
    (gradient,) = torch.autograd.grad(loss, supernet.arch_parameters())
    assert gradient.abs().min() > 0


def test_parameters_are_split_without_rest():
    supernet = spaces.get("micro-darts").supernet(1, 10)
    alphas, weights = supernet.arch_parameters(), supernet.weight_parameters()
    assert not {id(p) for p in alphas} & {id(p) for p in weights}
    assert {id(p) for p in supernet.parameters()} == {id(p) for p in [*alphas, *weights]}
    supernet.tied = next(iter(supernet.arch.values()))
    with pytest.raises(ValueError, match="'tied' must be registered in arch alone"):
        supernet.weight_parameters()


def test_a_supernet_without_alphas_is_refused():
    class Plain(Supernet):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="no architecture parameters"):
        Plain(ChainSpace(), 2).weight_parameters()
    with pytest.raises(ValueError, match="num_classes must be >= 1, got 0"):
        Plain(ChainSpace(), 0)


def test_sizes_of_the_darts_supernet():
    supernet = spaces.get("darts").supernet()
    assert sum(p.numel() for p in supernet.weight_parameters()) == 1_930_618
    alphas = torch.cat([p.detach() for p in supernet.arch_parameters()])
    assert alphas.shape == (224,)
    assert 0.8e-3 < alphas.std() < 1.2e-3
    assert {len(p) for p in supernet.arch_parameters()} == {8}
    norms = [m for m in supernet.cells.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m.affine for m in norms)


def test_seeds():
    first, again, other = (spaces.get("micro-darts-2").supernet(1, 4, seed=seed) for seed in (0, 0, 1))
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c) or name.startswith("stem.layers.1")


def _argmax_everywhere(supernet, generator):
    """Sets alpha to +1e4 on one random operation of every edge; returns the operation by key."""
    chosen = {}
    for key, alpha in supernet.arch.items():
        index = int(torch.randint(len(alpha), (), generator=generator))
        with torch.no_grad():
            alpha.zero_()[index] = 1e4
        chosen[key] = index
    return chosen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["darts", "micro-darts", "micro-darts-2-shared"])
def test_one_hot_alphas_leave_the_network_of_those_operations(name, training):
    supernet = spaces.get(name).supernet(2, 5, channels=4, seed=3).train(training)
    chosen = _argmax_everywhere(supernet, stream(0, "ops"))
    plain = copy.deepcopy(supernet)
    x = torch.randn(3, 2, 9, 8, generator=stream(0, "x"))
    s0, s1 = plain.stem(x)
    for cell in plain.cells:
        edges = iter(cell.edges)
        states = [cell.inputs.before(s0), cell.inputs.previous(s1)]
        for _ in range(cell.nodes):
            incoming = [(state, next(edges)) for state in states]
            states.append(sum(list(e.candidates.values())[chosen[e.key]](state) for state, e in incoming))
        s0, s1 = s1, torch.cat(states[2:], dim=1)
    expected = plain.classifier(s1.mean((2, 3)))
    torch.testing.assert_close(supernet(x), expected, atol=1e-5, rtol=1e-5)


def test_a_supernet_that_keeps_two_edges_a_node_is_the_derived_network():
    """Weights copied into the evaluation network: same logits with the batch's statistics."""
    supernet = spaces.get("micro-darts").supernet(1, 4, seed=1)
    generator = stream(5, "keep")
    genotype = supernet.space.random(generator)
    kept = {
        spaces.edge_key(cell, predecessor, state): name
        for cell, found in genotype.cells().items()
        for name, predecessor, state in found.edges()
    }
    for key, alpha in supernet.arch.items():
        name = kept.get(key, "none")
        with torch.no_grad():
            alpha.zero_()[supernet.space.primitives.index(name)] = 1e4
    network = genotype.build(1, 4, channels=8, cells=3)
    network.stem.load_state_dict(supernet.stem.state_dict())
    network.classifier.load_state_dict(supernet.classifier.state_dict())
    for mixed, cell, place in zip(supernet.cells, network.cells, ("normal", "reduce", "normal"), strict=True):
        cell.inputs.load_state_dict(mixed.inputs.state_dict(), strict=False)
        edges = {choice.key: choice for choice in mixed.edges}
        for module, (name, predecessor, state) in zip(cell.operations, genotype.cells()[place].edges(), strict=True):
            candidate = edges[spaces.edge_key(place, predecessor, state)].candidates[name]
            if name == "max_pool_3x3":
                module.register_forward_hook(lambda m, x, y: functional.batch_norm(y, None, None, training=True))
            else:
                module.load_state_dict(candidate.state_dict(), strict=False)
    x = torch.randn(4, 1, 12, 12, generator=stream(0, "x"))
    torch.testing.assert_close(supernet(x), network(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 40), (1, 1, 1), (1, 7, 9), (1, 14, 14), (1, 3, 2)])
@pytest.mark.parametrize("name", ["darts", "micro-darts", "micro-darts-2-shared"])
def test_any_size_goes_through(name, shape):
    supernet = spaces.get(name).supernet(1, 3, channels=2, cells=3)
    logits = supernet(torch.randn(2, *shape, generator=stream(0, "x")))
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    logits.sum().backward()


def test_copies_functional_calls_and_state_dicts_carry_alpha():
    supernet = spaces.get("micro-darts-2").supernet(1, 3, channels=2).eval()
    x = torch.randn(2, 1, 6, 6, generator=stream(0, "x"))
    other = copy.deepcopy(supernet)
    for alpha in other.arch_parameters():
        alpha.data.normal_(generator=stream(0, "alpha"))
    assert not torch.allclose(supernet(x), other(x))
    torch.testing.assert_close(torch.func.functional_call(supernet, dict(other.named_parameters()), x), other(x))
    stacked, buffers = torch.func.stack_module_state([supernet, other])
    both = torch.func.vmap(lambda p, b: torch.func.functional_call(supernet, (p, b), x))(stacked, buffers)
    torch.testing.assert_close(both, torch.stack([supernet(x), other(x)]), atol=1e-5, rtol=1e-4)
    supernet.load_state_dict(other.state_dict())
    torch.testing.assert_close(supernet(x), other(x))


def test_second_derivatives_in_alpha():
    supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2).double().eval()
    x = torch.randn(2, 1, 6, 6, generator=stream(0, "x"), dtype=torch.float64)
    key = next(iter(supernet.arch))

    def loss(alpha):
        return torch.func.functional_call(supernet, {f"arch.{key}": alpha}, x).square().sum()

    alpha = supernet.arch[key].detach()
    v = torch.randn(len(alpha), generator=stream(0, "v"), dtype=torch.float64)
    gradient = torch.func.grad(loss)
    product = torch.func.jvp(gradient, (alpha,), (v,))[1]
    step = 1e-5
    torch.testing.assert_close(
        product, (gradient(alpha + step * v) - gradient(alpha - step * v)) / (2 * step), atol=1e-7, rtol=1e-5
    )


def test_gates_are_replaced_by_key():
    supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2)
    supernet.set_gate(MaskedGate(SoftmaxGate(), [False, True, True, True, True]), "normal_0_2")
    weights = supernet.mixing_weights()
    assert weights["normal_0_2"][0] == 0
    assert weights["normal_1_2"][0] > 0
    assert sum(choice.key == "normal_0_2" for _, choice in supernet.named_choices()) == 3

    class Half(Gate):
        def weights(self, alpha, training, drawn=None):
            return torch.full_like(alpha, 0.5)

    supernet.set_gate(Half())
    assert all((m == 0.5).all() for m in supernet.mixing_weights().values())
    with pytest.raises(ValueError, match="key must be one of"):
        supernet.set_gate(Half(), "normal_9_9")


def test_expected_cost_is_the_mean_over_all_paths():
    supernet = Chain(_pair(), {"wide": nn.Conv2d(2, 2, 5, padding=2), **_pair()})
    table = {("conv", 2, 2, 4, 4, 1, ""): 3.0, ("wide", 2, 2, 4, 4, 1, ""): 7.0}
    with torch.no_grad():
        supernet.arch["a"].copy_(torch.tensor([0.3, -0.2]))
        supernet.arch["b"].copy_(torch.tensor([0.1, 0.5, -1.0]))
    p, q = supernet.arch["a"].softmax(0), supernet.arch["b"].softmax(0)
    expected = sum(p[i] * q[j] * (a + b) for i, a in enumerate((3.0, 0.0)) for j, b in enumerate((7.0, 3.0, 0.0)))
    cost = supernet.expected_cost(table, (2, 4, 4))
    torch.testing.assert_close(cost, expected)
    for found, wanted in zip(
        torch.autograd.grad(cost, supernet.arch_parameters()),
        torch.autograd.grad(expected, supernet.arch_parameters()),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_expected_cost_probes_a_shape_once_until_the_choices_change():
    supernet = Chain(_pair(), _pair())
    runs = []
    supernet.register_forward_pre_hook(lambda module, inputs: runs.append(tuple(inputs[0].shape[1:])))
    table = {("conv", 2, 2, s, s, 1, ""): float(s) for s in (4, 6)} | {("conv", 2, 2, 4, 4, 2, ""): 1.0}
    small = supernet.expected_cost(table, (2, 4, 4))
    assert torch.equal(supernet.expected_cost(table, (2, 4, 4)), small)
    torch.testing.assert_close(supernet.expected_cost(table, (2, 6, 6)), small * 6 / 4)
    supernet.set_gate(SoftmaxGate())
    supernet.expected_cost(table, (2, 6, 6))
    assert runs == [(2, 6, 6)]  # (2, 4, 4) was probed when the supernet was built
    _, choice = next(supernet.named_choices())
    choice.candidates["conv"] = nn.Conv2d(2, 2, 1)
    supernet.expected_cost(table, (2, 4, 4))
    twin = copy.deepcopy(supernet)
    twin.expected_cost(table, (2, 4, 4))
    assert runs == [(2, 6, 6), (2, 4, 4)]


def test_expected_cost_needs_a_whole_table_and_a_shape():
    supernet = spaces.get("micro-darts-2").supernet(1, 3, channels=2)
    operations = supernet.operations((1, 8, 8))
    assert ("sep_conv_3x3", 2, 2, 8, 8, 1, "") in operations
    assert ("skip_connect", 4, 4, 8, 8, 2, "") in operations
    assert not any(key[0] == "none" or key[:1] + key[5:6] == ("skip_connect", 1) for key in operations)
    module, shape = operations["skip_connect", 4, 4, 8, 8, 2, ""]
    assert isinstance(module, FactorizedReduce)
    assert shape == (4, 8, 8)
    with pytest.raises(ValueError, match="before the first forward"):
        supernet.expected_cost({})
    before = {k: v.clone() for k, v in supernet.state_dict().items()}
    with pytest.raises(KeyError, match="sep_conv_3x3"):
        supernet.expected_cost({}, (1, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in supernet.state_dict().items())
    assert supernet.training
    supernet(torch.zeros(2, 1, 8, 8))
    assert supernet.expected_cost(dict.fromkeys(operations, 1.0)).item() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda costs: costs["layer_0"].pop(), "costs of choice 'layer_0' must be one for each of k3_e2, .*, got 3"),
        (lambda costs: costs.pop("layer_3"), "costs must hold every choice, got none for 'layer_3'"),
        (lambda costs: costs.update(extra=[1.0]), "costs must hold choices of the supernet alone, got 'extra'"),
        # together they are as many as there are candidates, each beside the wrong one
        (lambda costs: (costs["layer_0"].pop(), costs["layer_1"].append(1.0)), "costs of choice 'layer_0'"),
    ],
    ids=["short row", "missing", "extra", "lengths that cancel"],
)
@pytest.mark.parametrize("kind", ["paths", "superkernels"])
def test_costs_that_are_not_one_for_every_candidate_are_refused(change, message, kind):
    space = spaces.get("micro-chain")
    net = space.supernet(1, 3, channels=4) if kind == "paths" else SuperKernelSupernet(space, 1, 3, channels=4)
    costs = {key: [1.0 + i for i in range(len(names))] for key, names in space.choices().items()}
    assert net.priced(costs).isfinite()

    class Own(ExpectedCost):
        def candidates(self, supernet):
            return costs

    penalty = CostPenalty("add_power", Own())
    batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    assert penalty(net, batch, "alpha").isfinite()
    genotype = net.derive()
    assert Own().of(net, genotype) > 0
    change(costs)
    with pytest.raises(ValueError, match=message):
        penalty(net, batch, "alpha")
    with pytest.raises(ValueError, match=message):
        Own().of(net, genotype)
