"""Selection by perturbation (DARTS-PT) against hand-made networks, separate passes and counted evaluations."""

import hashlib

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.nn.batchnorm import frozen_statistics
from netwright.search import perturbation, spaces
from netwright.search.perturbation import (
    PerturbationSelector,
    discretisation_accuracy,
    edge_strengths,
    op_strengths,
)
from netwright.search.selection import MagnitudeSelector
from netwright.search.spaces import Space, edge_key
from netwright.search.supernet import Choice, FixedGate, MaskedGate, SoftmaxGate, Supernet

MICRO = spaces.get("micro-darts-2")
SMALL = Space("small", ("skip_connect", "sep_conv_3x3"), nodes=4, channels=2, cells=3)


def batches(number=2, size=16, classes=3, side=8, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, side, side, generator=source), torch.randint(classes, (size,), generator=source))
        for _ in range(number)
    ]


class ChainSpace:
    def genotype(self, decisions):
        return dict(decisions)

    def selector(self):
        return MagnitudeSelector()


class OneEdge(Supernet):
    """One choice between features and a head that is given."""

    def __init__(self, candidates, head):
        super().__init__(ChainSpace(), head.shape[0])
        self.edge = Choice(candidates, key="edge", gate=SoftmaxGate())
        self.register_buffer("head", head)
        self.anchor = nn.Parameter(torch.zeros(()))
        self.initialise_arch(0, (head.shape[1], 1, 1))

    def forward(self, x):
        return self.edge(x, self.arch["edge"]).flatten(1) @ self.head.T + self.anchor


class Columns(nn.Module):
    """Features where ``kept`` is 1, zeros elsewhere."""

    def __init__(self, kept):
        super().__init__()
        self.register_buffer("kept", torch.tensor(kept).view(1, -1, 1, 1))

    def forward(self, x):
        return x * self.kept


def digest(supernet):
    parts = [value.detach().numpy().tobytes() for value in supernet.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def separate_scores(supernet, val, key):
    """Accuracy and loss without each candidate of an edge, one pass for each, nothing shared."""
    choices = [choice for _, choice in supernet.named_choices() if choice.key == key]
    inner, found = choices[0].gate, []
    for gone in range(len(choices[0])):
        supernet.set_gate(MaskedGate(inner, [number != gone for number in range(len(choices[0]))]), key)
        right = loss = 0.0
        with torch.no_grad(), frozen_statistics(supernet):
            for x, labels in val:
                logits = supernet(x)
                right += (logits.argmax(1) == labels).sum().item()
                loss += functional.cross_entropy(logits, labels, reduction="sum").item()
        supernet.set_gate(inner, key)
        found.append((right / sum(len(y) for _, y in val), loss / sum(len(y) for _, y in val)))
    return torch.tensor(found, dtype=torch.float64).T


@pytest.mark.parametrize("favour", [-10.0, 0.0, 10.0])
def test_the_operation_that_carries_the_signal_wins_whatever_alpha_says(favour):
    zero = nn.Conv2d(3, 3, 1)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    supernet = OneEdge({"conv": zero, "skip_connect": nn.Identity()}, torch.eye(3))
    supernet.arch["edge"].data.copy_(torch.tensor([favour, 0.0]))
    labels = torch.arange(3).repeat(5)
    val = [(torch.eye(3)[labels].view(-1, 3, 1, 1), labels)]
    strengths = op_strengths(supernet, val, "edge")
    assert strengths.tolist() == pytest.approx([0.0, 2 / 3])  # all logits equal: the first class of three
    assert PerturbationSelector(tune_epochs=0).select(supernet, None, val) == {"edge": "skip_connect"}


def test_scores_are_those_of_hand_masked_features():
    source = torch.Generator().manual_seed(1)
    head = torch.randn(4, 6, generator=source)
    parts = {"a": [1.0, 1, 0, 0, 0, 0], "b": [0.0, 0, 1, 1, 0, 0], "c": [0.0, 0, 0, 0, 1, 1]}
    supernet = OneEdge({name: Columns(kept) for name, kept in parts.items()}, head)
    supernet.arch["edge"].data.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    x, labels = torch.randn(64, 6, 1, 1, generator=source), torch.randint(4, (64,), generator=source)
    weights = torch.tensor([0.2, 0.3, 0.5])

    def accuracy(kept):
        columns = sum(w * torch.tensor(parts[name]) for w, name in zip(weights, parts, strict=True) if name in kept)
        return ((x.flatten(1) * columns) @ head.T).argmax(1).eq(labels).double().mean()

    wanted = [accuracy("abc") - accuracy(set("abc") - {gone}) for gone in "abc"]
    assert op_strengths(supernet, [(x, labels)], "edge").tolist() == [value.item() for value in wanted]


def test_what_is_left_is_renormalised_on_request_only():
    supernet = OneEdge({name: nn.Identity() for name in "abc"}, torch.eye(2))
    alpha = torch.tensor([0.2, 0.3, 0.5]).log()
    factors = torch.tensor([1.0, 1.0, 0.0])
    plain = perturbation._Scaled(SoftmaxGate(), factors, False).weights(alpha, True)
    again = perturbation._Scaled(SoftmaxGate(), factors, True).weights(alpha, True)
    assert torch.allclose(plain, torch.tensor([0.2, 0.3, 0.0]))
    assert torch.allclose(again, torch.tensor([0.4, 0.6, 0.0]))
    # An edge of identities: without one of three the sum shrinks, and not when renormalised.
    x, labels = torch.tensor([[3.0, 1.0]]).view(1, 2, 1, 1), torch.tensor([0])
    supernet.arch["edge"].data.zero_()
    scales = {"edge": torch.tensor([[1.0, 1, 1], [0.0, 1, 1]])}
    _, loss = perturbation._measure(supernet, [(x, labels)], scales)
    _, kept = perturbation._measure(supernet, [(x, labels)], scales, renormalise=True)
    assert loss.tolist() == pytest.approx([functional.softplus(torch.tensor(-2.0 * s)).item() for s in (1, 2 / 3)])
    assert kept[0] == pytest.approx(kept[1])


@pytest.mark.parametrize("key", ["normal_0_2", "normal_1_3", "reduce_0_2", "reduce_2_3"])
def test_removals_that_share_what_lies_before_equal_separate_passes(key):
    supernet = MICRO.supernet(1, 3, channels=4, seed=3)
    val = batches()
    supernet.train()
    choice = supernet.keyed_choices()[key]
    accuracy, loss = perturbation._measure(supernet, val, {key: 1 - torch.eye(len(choice))})
    apart = separate_scores(supernet, val, key)
    assert torch.allclose(loss, apart[1], atol=1e-6)
    assert torch.equal(accuracy, apart[0])


def test_scoring_leaves_everything_as_it_was():
    supernet = MICRO.supernet(1, 3, channels=2)
    supernet.eval()
    before, gates = digest(supernet), [choice.gate for _, choice in supernet.named_choices()]
    op_strengths(supernet, batches(), (0, 2), "reduce")
    edge_strengths(supernet, batches(), 1, "normal")
    discretisation_accuracy(supernet, batches(), "normal_0_2", "skip_connect")
    PerturbationSelector(tune_epochs=1).select(supernet, batches(), batches(seed=1))
    assert digest(supernet) == before
    assert [choice.gate for _, choice in supernet.named_choices()] == gates
    assert not any(module.training for module in supernet.modules())


def test_a_batch_that_fails_leaves_everything_as_it_was():
    supernet = MICRO.supernet(1, 3, channels=2)
    gates = [choice.gate for _, choice in supernet.named_choices()]
    with pytest.raises(RuntimeError):
        op_strengths(supernet, [(torch.zeros(2, 5, 8, 8), torch.tensor([0, 1]))], (0, 2))
    assert [choice.gate for _, choice in supernet.named_choices()] == gates


def test_the_discretised_supernet_is_the_network_of_its_genotype():
    supernet = MICRO.supernet(1, 3, channels=4, seed=1)
    made = PerturbationSelector(tune_epochs=1).discretise(supernet, batches(), batches(seed=1), seed=5)
    genotype = made.genotype
    for cell in genotype.cells().values():
        assert [len({predecessor for _, predecessor in cell.ops[i : i + 2]}) for i in (0, 2)] == [2, 2]
    (x, _), *_ = batches(1, seed=7)
    net = made.supernet.eval()
    with torch.no_grad():
        s0, s1 = net.stem(x)
        for number, cell in enumerate(net.cells):
            kind = "reduce" if number in MICRO.reduction_cells(len(net.cells)) else "normal"
            edges = {choice.key: choice for choice in cell.edges}
            states = cell.inputs(s0, s1)
            ops = getattr(genotype, kind).ops
            for node in range(MICRO.nodes):
                pairs = ops[2 * node : 2 * node + 2]
                states.append(sum(edges[edge_key(kind, p, node + 2)].candidates[op](states[p]) for op, p in pairs))
            s0, s1 = s1, torch.cat(states[2:], 1)
        wanted = net.classifier(s1.mean((2, 3)))
        assert torch.allclose(net(x), wanted, atol=1e-6)


@pytest.mark.parametrize(("topology", "each"), [("greedy", 14 * 2 + 3 + 4 + 3 + 5 + 4 + 3), ("single", 14 * 2 + 12)])
def test_evaluations_are_as_many_as_the_paper_counts(topology, each):
    supernet = SMALL.supernet(1, 3)
    made = PerturbationSelector(tune_epochs=0, topology=topology).discretise(supernet, None, batches(1, 4))
    assert made.evaluations == 2 * each
    assert len(made.decisions) == 2 * (14 + 6)


def test_decisions_come_in_random_order_by_seed_and_cell_types_in_turn():
    supernet = SMALL.supernet(1, 3)

    def keys(seed, order="random"):
        made = PerturbationSelector(tune_epochs=0, order=order).discretise(supernet, None, batches(1, 4), seed=seed)
        return [decision.key for decision in made.decisions[:28]]

    found = keys(0)
    assert found == keys(0) != keys(1)
    assert sorted(found) == sorted(supernet.arch)
    assert [key.split("_")[0] for key in found] == ["normal", "reduce"] * 14
    assert keys(0, "fixed")[::2] == [key for key in supernet.arch if key.startswith("normal")]


def test_tuning_moves_weights_and_open_alphas_but_no_fixed_one():
    supernet = MICRO.supernet(1, 3, channels=2)
    made = PerturbationSelector(tune_epochs=1, order="fixed").discretise(supernet, batches(), batches(seed=1))
    assert not torch.equal(made.supernet.classifier.weight, supernet.classifier.weight)
    first = made.decisions[0].key  # fixed before any tuning
    assert torch.equal(made.supernet.arch[first], supernet.arch[first])
    assert not torch.equal(made.supernet.arch["normal_2_3"], supernet.arch["normal_2_3"])
    kept = PerturbationSelector(tune_epochs=1, alpha_step=False).discretise(supernet, batches(), batches(seed=1))
    assert all(torch.equal(kept.supernet.arch[key], alpha) for key, alpha in supernet.arch.items())


def test_ties_in_accuracy_are_broken_by_loss():
    x, labels = torch.tensor([[2.0, 0.0]]).view(1, 2, 1, 1), torch.tensor([0])
    halves = {"small": Columns([0.1, 0.0]), "large": Columns([1.0, 0.0])}
    supernet = OneEdge(halves, torch.eye(2))
    assert PerturbationSelector(tune_epochs=0).select(supernet, None, [(x, labels)]) == {"edge": "large"}


def test_none_is_measured_but_never_chosen():
    supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2)
    made = PerturbationSelector(tune_epochs=0).discretise(supernet, None, batches())
    assert all("none" not in decision.strengths for decision in made.decisions)
    assert op_strengths(supernet, batches(), (1, 2))[0] == 0.0


def test_strength_of_edges_and_accuracy_of_a_decision_agree_with_gates_set_by_hand():
    supernet = MICRO.supernet(1, 3, channels=4, seed=2)
    val = batches()
    strengths = edge_strengths(supernet, val, 1, "normal")
    assert strengths.shape == (3,)
    choice = supernet.keyed_choices()["normal_2_3"]
    full, _ = perturbation._measure(supernet, val, {"normal_0_2": torch.ones(1, len(choice))})
    inner = choice.gate
    supernet.set_gate(FixedGate(None, len(choice)), "normal_2_3")
    without, _ = perturbation._measure(supernet, val, {"normal_0_2": torch.ones(1, len(choice))})
    supernet.set_gate(FixedGate(2, len(choice)), "normal_2_3")
    fixed, _ = perturbation._measure(supernet, val, {"normal_0_2": torch.ones(1, len(choice))})
    supernet.set_gate(inner, "normal_2_3")
    assert strengths[2] == full - without
    assert discretisation_accuracy(supernet, val, (2, 3), choice.names[2], cell="normal") == fixed


def test_the_best_mixture_of_two_uncorrelated_errors_favours_the_smaller_in_inverse_proportion():
    """Minimising Var(a o + (1 - a) x - m) over softmax weights gives a = v_x / (v_x + v_o): the paper's proposition."""
    source = torch.Generator().manual_seed(0)
    errors = torch.randn(2, 200_000, generator=source)
    errors = (errors - errors.mean(1, keepdim=True)) * torch.tensor([[1.0], [2.0]])
    covariance = errors @ errors.T / errors.shape[1]
    alpha = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([alpha], lr=0.5)
    for _ in range(300):
        weights = alpha.softmax(0)
        loss = weights @ covariance @ weights
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert alpha.softmax(0).tolist() == pytest.approx([0.8, 0.2], abs=0.01)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"criterion": "f1"}, "criterion must be one of accuracy, loss, got 'f1'"),
        ({"topology": "all"}, "topology must be one of"),
        ({"order": "best"}, "order must be one of"),
        ({"tune_epochs": -1}, "tune_epochs must be >= 0, got -1"),
        ({"lr_scale": 0.0}, "lr_scale must be > 0"),
        ({"max_val_batches": 0}, "max_val_batches must be >= 1 or None, got 0"),
    ],
)
def test_bad_settings(settings, told):
    with pytest.raises(ValueError, match=told):
        PerturbationSelector(**settings)


def test_bad_input():
    supernet = MICRO.supernet(1, 3, channels=2)
    with pytest.raises(ValueError, match="validation must be batches"):
        PerturbationSelector().select(supernet, batches(), None)
    with pytest.raises(ValueError, match="train must be batches"):
        PerturbationSelector().select(supernet, None, batches())
    with pytest.raises(RuntimeError, match="validation must hold at least 1 batch"):
        PerturbationSelector(tune_epochs=0).select(supernet, None, [])
    with pytest.raises(ValueError, match=r"edge must be one of .* got 'normal_9_9'"):
        op_strengths(supernet, batches(), "normal_9_9")
    with pytest.raises(ValueError, match="op must be one of"):
        discretisation_accuracy(supernet, batches(), (0, 2), "skip")
    supernet.set_gate(FixedGate(1, 5), "normal_0_2")
    with pytest.raises(ValueError, match="edge must be open, got 'normal_0_2'"):
        op_strengths(supernet, batches(), (0, 2), "normal")
    for name, parameter in supernet.named_parameters():
        if name.startswith("classifier"):
            parameter.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="loss must be finite"):
        op_strengths(supernet, batches(), (1, 2), "normal")


def test_noise_costs_accuracy_and_scores_repeat():
    space = spaces.get("micro-darts-s4")
    supernet = space.supernet(1, 3, channels=2, seed=4)
    torch.manual_seed(0)
    first = op_strengths(supernet, batches(), (0, 2))
    after = torch.rand(3)
    assert torch.equal(first, op_strengths(supernet, batches(), (0, 2)))
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))  # the caller's generator is where it was
    made = PerturbationSelector(tune_epochs=1).select(supernet, batches(), batches(seed=1))
    assert made.space == "micro-darts-s4"
