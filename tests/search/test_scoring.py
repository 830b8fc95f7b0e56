"""Variants of a supernet that are measured together, against each of them in passes of its own."""

import pytest
import torch
from tests.support.supernets import Columns, OneEdge, batches
from torch import nn
from torch.nn import functional

from netwright.nn.batchnorm import frozen_statistics
from netwright.search import scoring, spaces
from netwright.search.fused import mixture
from netwright.search.scoring import measure, removals, without
from netwright.search.spaces import ChoiceSpace, Space
from netwright.search.spaces.operations import Noise
from netwright.search.supernet import FixedGate, MaskedGate, SoftmaxGate
from netwright.seeding import derive, seeded

SEVEN = spaces.get("darts-pt")
MICRO = spaces.get("micro-darts-2")
TWO = Space("two", ("skip_connect", "sep_conv_3x3"), nodes=3, channels=4, cells=3, reductions="middle")


def apart(supernet, val, keys):
    """Accuracy and loss for every way to mask, by key, the candidates: one pass for each, nothing shared."""
    number = len(next(iter(keys.values())))
    inner = {key: choice.gate for key, choice in supernet.keyed_choices().items()}
    found = []
    supernet.train()
    for row in range(number):
        for key, factors in keys.items():
            supernet.set_gate(MaskedGate(inner[key], factors[row].tolist()), key)
        right = loss = 0.0
        with torch.no_grad(), frozen_statistics(supernet):
            for x, labels in val:
                logits = supernet(x)
                right += (logits.argmax(1) == labels).sum().item()
                loss += functional.cross_entropy(logits, labels, reduction="sum").item()
        for key in keys:
            supernet.set_gate(inner[key], key)
        seen = sum(len(labels) for _, labels in val)
        found.append((right / seen, loss / seen))
    return torch.tensor(found, dtype=torch.float64).T


def every(space, keys):
    return [(space, key) for key in keys]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("space", "key"),
    [
        *every(SEVEN, ("normal_3_5", "reduce_1_3")),
        *every(MICRO, ("normal_1_3", "reduce_0_2")),
        *every(TWO, ("normal_0_2", "normal_3_4", "reduce_1_2", "reduce_2_4")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_removals_that_share_what_they_can_equal_separate_passes(space, key, dtype):
    supernet = space.supernet(1, 3, channels=8, cells=3, seed=3).to(dtype)
    for alpha in supernet.arch_parameters():
        alpha.data.mul_(500)  # weights that differ
    val = [(x.to(dtype), labels) for x, labels in batches(2, 6)]
    size = len(supernet.keyed_choices()[key])
    factors = {key: removals(size, range(size), intact=True)}
    accuracy, loss = measure(supernet, val, factors)
    wanted = apart(supernet, val, factors)
    assert torch.allclose(loss, wanted[1], rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-5)
    assert torch.equal(accuracy, wanted[0])


@pytest.mark.parametrize("cell", ["normal", "reduce"])
def test_removals_of_edges_and_decisions_made_before_equal_separate_passes(cell):
    supernet = SEVEN.supernet(1, 3, channels=4, cells=3, seed=3).double()
    val = [(x.double(), labels) for x, labels in batches(1, 6)]
    supernet.set_gate(FixedGate(3, 7), f"{cell}_0_4")
    supernet.set_gate(FixedGate(None, 7), f"{cell}_1_3")
    factors = without(dict.fromkeys(SEVEN.incoming()[cell, 2], 7), intact=True)
    accuracy, loss = measure(supernet, val, factors)
    wanted = apart(supernet, val, factors)
    assert torch.allclose(loss, wanted[1], rtol=0, atol=1e-10)
    assert torch.equal(accuracy, wanted[0])


def test_what_variants_share_runs_once():
    """Of three cells, normal, reduction, normal: how often each edge's operation runs for two removals."""
    supernet, runs = TWO.supernet(1, 3), {}

    def counting(name):
        return lambda *_: runs.__setitem__(name, runs.get(name, 0) + 1)

    for number, cell in enumerate(supernet.cells):
        for choice in cell.choices():
            choice.candidates["sep_conv_3x3"].register_forward_hook(counting((number, *choice.key.split("_")[1:])))
    measure(supernet, batches(1), {"reduce_1_3": removals(2, range(2))})
    shared = {(0, *edge): 1 for edge in ("02", "12", "03", "13", "23", "04", "14", "24", "34")}
    changed = {(1, *edge): 1 for edge in ("02", "12", "03", "13", "23", "04", "14", "24")} | {(1, "3", "4"): 2}
    after = {(2, *edge): 1 if edge[0] == "0" else 2 for edge in ("02", "12", "03", "13", "23", "04", "14", "24", "34")}
    assert runs == shared | changed | after


class Layer(nn.Module):
    """Writes into what it is given, and drops features, so that what is kept must be a copy and draws must go on."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return nn.functional.dropout(self.norm(x.relu_()), 0.3, self.training)


def network(choose, in_channels, num_classes):
    options = {f"k{k}": lambda k=k: nn.Conv2d(4, 4, k, padding=k // 2) for k in (1, 3)} | {"noise": Noise}
    body = [part for i in range(4) for part in (choose(f"layer_{i}", options), Layer())]
    return nn.Sequential(nn.Conv2d(in_channels, 4, 1), *body, nn.Flatten(), nn.Linear(256, num_classes))


@pytest.mark.parametrize("key", ["layer_0", "layer_2", "layer_3"])
def test_choices_before_the_changed_one_of_any_network_run_once(key):
    supernet, runs = ChoiceSpace("chain-of-layers", network, shape=(8, 8)).supernet(1, 3, seed=2), []
    val, factors = batches(1, 8), {key: removals(3, range(3), intact=True)}
    supernet.keyed_choices()["layer_1"].candidates["k3"].register_forward_hook(lambda *_: runs.append(1))
    accuracy, loss = measure(supernet, val, factors)
    assert len(runs) == (1 if key > "layer_1" else 4)

    inner = supernet.keyed_choices()[key].gate
    for row, factor in enumerate(factors[key]):
        supernet.set_gate(MaskedGate(inner, factor.tolist()), key)
        with torch.no_grad(), frozen_statistics(supernet), seeded(0, "perturbation", 0):
            logits = supernet.train()(val[0][0])
        assert loss[row].item() == pytest.approx(functional.cross_entropy(logits, val[0][1]).item(), abs=1e-6)
        assert accuracy[row].item() == (logits.argmax(1) == val[0][1]).double().mean().item()
    supernet.set_gate(inner, key)


def test_the_intact_supernet_and_that_without_none_are_one_variant():
    supernet, passes = MICRO.supernet(1, 3, channels=2), []
    supernet.classifier.register_forward_hook(lambda *_: passes.append(1))
    accuracy, loss = measure(supernet, batches(1), {"normal_0_2": removals(5, range(5), intact=True)})
    assert len(passes) == 5
    assert (accuracy[0], loss[0]) == (accuracy[1], loss[1])
    assert len(loss.unique()) == 5


def test_noise_is_the_same_in_every_variant():
    """Every choice draws from a seed of its own, so separate passes that seed each choice see the same noise."""
    supernet, val = spaces.get("micro-darts-s4").supernet(1, 3, channels=2, seed=4), batches(1)
    factors = {"normal_0_3": removals(2, range(2), intact=True)}
    accuracy, loss = measure(supernet, val, factors)
    assert all(map(torch.equal, (accuracy, loss), measure(supernet, val, factors)))

    def seeding(number):
        return lambda *_: torch.manual_seed(derive(0, "perturbation", 0) + number) and None

    for number, (_, choice) in enumerate(supernet.named_choices()):
        choice.register_forward_pre_hook(seeding(number))
    state = torch.get_rng_state()
    wanted = apart(supernet, val, factors)
    torch.set_rng_state(state)
    assert torch.allclose(loss, wanted[1], rtol=0, atol=1e-5)
    assert torch.equal(accuracy, wanted[0])


def test_the_callers_generator_is_where_it_was():
    supernet = spaces.get("micro-darts-s4").supernet(1, 3, channels=2)
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    measure(supernet, batches(1), {"normal_0_2": removals(2, range(2))})
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("rows", [[[0.2, 0.3, 0.0], [0.0, 0.3, 0.5]], [[0.2, 0.3, 0.5]], [[0.0, 0.0, 0.0]]])
def test_kernels_and_plain_operations_give_the_same_sums(rows):
    space = Space("three", ("max_pool_3x3", "skip_connect", "sep_conv_3x3"), nodes=1, channels=8, cells=1)
    supernet, x = space.supernet(1, 3, seed=1), torch.randn(4, 1, 8, 8)
    weights = {"normal_0_2": torch.tensor(rows), "reduce_0_2": torch.tensor(rows)}
    with torch.no_grad(), frozen_statistics(supernet):
        found = supernet.variants(x, weights, 0)
        with mixture.plain():
            wanted = supernet.variants(x, weights, 0)
    assert len(found) == len(rows)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_what_is_left_is_renormalised_on_request_only():
    supernet = OneEdge({name: nn.Identity() for name in "abc"}, torch.eye(2))
    weights, factors = torch.tensor([0.2, 0.3, 0.5]), {"edge": torch.tensor([[1.0, 1.0, 0.0]])}
    for renormalise, wanted in ((False, [0.2, 0.3, 0.0]), (True, [0.4, 0.6, 0.0])):
        rows, _ = scoring._variants({supernet.edge: weights}, factors, renormalise)
        assert rows["edge"].tolist() == [pytest.approx(wanted)]
    # An edge of identities: without one of three the sum shrinks, and not when renormalised.
    x, labels = torch.tensor([[3.0, 1.0]]).view(1, 2, 1, 1), torch.tensor([0])
    supernet.arch["edge"].data.zero_()
    scales = {"edge": torch.tensor([[1.0, 1, 1], [0.0, 1, 1]])}
    _, loss = measure(supernet, [(x, labels)], scales)
    _, kept = measure(supernet, [(x, labels)], scales, renormalise=True)
    assert loss.tolist() == pytest.approx([functional.softplus(torch.tensor(-2.0 * s)).item() for s in (1, 2 / 3)])
    assert kept[0] == pytest.approx(kept[1])


def test_without_keys_the_supernet_itself_is_measured():
    supernet, val = MICRO.supernet(1, 3, channels=4), batches()
    accuracy, loss = measure(supernet, val, {})
    wanted = apart(supernet, val, {"normal_0_2": torch.ones(1, 5)})
    assert (accuracy.tolist(), loss.tolist()) == (wanted[0].tolist(), pytest.approx(wanted[1].tolist()))


def test_a_batch_that_fails_leaves_everything_as_it_was():
    supernet = MICRO.supernet(1, 3, channels=2).eval()
    gates = [choice.gate for _, choice in supernet.named_choices()]
    with pytest.raises(RuntimeError):
        measure(supernet, [(torch.zeros(2, 5, 8, 8), torch.tensor([0, 1]))], {"normal_0_2": removals(5, [0])})
    assert [choice.gate for _, choice in supernet.named_choices()] == gates
    assert not any(module.training for module in supernet.modules())


def test_bad_input():
    supernet = OneEdge({"a": Columns([1.0, 1.0]), "b": nn.Identity()}, torch.eye(2))
    with pytest.raises(ValueError, match="val must be batches"):
        measure(supernet, None, {})
    with pytest.raises(RuntimeError, match="val must hold at least 1 batch, got 0"):
        measure(supernet, [], {})
    supernet.head.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="loss must be finite"):
        measure(supernet, [(torch.ones(1, 2, 1, 1), torch.tensor([0]))], {})
    assert isinstance(supernet.edge.gate, SoftmaxGate)
