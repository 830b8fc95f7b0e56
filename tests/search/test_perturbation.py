"""Selection by perturbation (DARTS-PT) against hand-made networks, counted evaluations and the published recipe."""

import copy
import hashlib
import math

import pytest
import torch
from tests.support.supernets import Columns, OneEdge, batches
from torch import nn

from netwright.search import perturbation, spaces
from netwright.search.darts import DARTS
from netwright.search.perturbation import PerturbationSelector
from netwright.search.selection import TuningSelector
from netwright.search.spaces import Space, edge_key
from netwright.search.strengths import discretisation_accuracy, edge_strengths, op_strengths

MICRO = spaces.get("micro-darts-2")
SMALL = Space("small", ("skip_connect", "sep_conv_3x3"), nodes=4, channels=2, cells=3)


def digest(supernet):
    parts = [value.detach().numpy().tobytes() for value in supernet.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


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


@pytest.fixture
def rows(monkeypatch):
    """Scores are drawn instead of measured; the factors of every variant that would have been."""
    asked = []

    def drawn(supernet, val, factors, **_):
        asked.extend(torch.cat(list(factors.values()), 1))
        number = len(next(iter(factors.values())))
        return torch.rand(number, dtype=torch.float64), torch.rand(number, dtype=torch.float64)

    monkeypatch.setattr(perturbation, "measure", drawn)
    return asked


def test_the_darts_space_is_measured_as_often_as_the_paper_counts_and_never_intact(rows):
    """14 edges of 7 operations, and 3 + (4+3) + (5+4+3) edges, for each of two cell types."""
    supernet = spaces.get("darts-pt").supernet(1, 3, channels=2, cells=3)
    made = PerturbationSelector(tune_epochs=0).discretise(supernet, None, batches(1, 4))
    assert made.evaluations == len(rows) == 2 * 120
    assert all(row.eq(0).any() for row in rows)


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


def test_defaults_are_the_published_ones():
    selector = PerturbationSelector()
    assert (selector.tune_epochs, selector.topology, selector.criterion) == (5, "greedy", "accuracy")
    assert (selector.lr_scale, selector.max_val_batches, selector.renormalise) == (0.1, None, False)


@pytest.mark.parametrize(
    ("lr_scale", "first", "last"), [(0.1, 0.0025, 0.001), (1.0, 0.025, 0.001), (0.01, 2.5e-4, 2.5e-4)]
)
def test_the_tuning_is_the_published_recipe(monkeypatch, rows, lr_scale, first, last):
    """81 epochs for 17 projections, five between two and one behind the last, one cosine over all of them."""
    rates, groups, epochs = [], [], []

    class Counted(perturbation._Tuner):
        def train(self, number):
            epochs.append(number)
            searcher = self.searcher
            for _ in range(number):
                searcher.schedule()
                rates.append(searcher.w_opt.param_groups[0]["lr"])
                searcher._progress += 1 / searcher.epochs
            groups[:] = [searcher]

    monkeypatch.setattr(perturbation, "_Tuner", Counted)
    supernet = SMALL.supernet(1, 3)
    PerturbationSelector(lr_scale=lr_scale).discretise(supernet, batches(1, 4), batches(1, 4))
    (searcher,) = groups
    assert epochs == [5] * 16 + [1]
    assert searcher.epochs == sum(epochs) == 81
    cosine = [last + (first - last) * (1 + math.cos(math.pi * epoch / 81)) / 2 for epoch in range(81)]
    assert rates == pytest.approx(cosine)
    assert searcher.stage.lr_at(1.0) == pytest.approx(last)
    group = searcher.w_opt.param_groups[0]
    assert isinstance(searcher.w_opt, torch.optim.SGD)
    assert (group["momentum"], group["weight_decay"], searcher.clip) == (0.9, 3e-4, 5.0)


def tuned_with(monkeypatch):
    """The optimisers of the architecture at the first step of every tuning, copied."""
    found = []
    train = perturbation._Tuner.train

    def watched(self, epochs):
        if not found or found[-1][0] is not self:
            found.append((self, copy.deepcopy(self.searcher.a_opt.state_dict()), self.searcher))
        train(self, epochs)

    monkeypatch.setattr(perturbation._Tuner, "train", watched)
    return found


def same(state, other):
    """Whether two states of an optimiser hold equal settings and numbers."""
    numbers = [[tensor for values in each["state"].values() for tensor in values.values()] for each in (state, other)]
    return state["param_groups"] == other["param_groups"] and all(map(torch.equal, *numbers)) and len(numbers[0]) > 0


def searching(**options):
    supernet = MICRO.supernet(1, 3, channels=2)
    selector = PerturbationSelector(tune_epochs=1)
    return DARTS(supernet, selector=selector, epochs=2, alpha_lr=3e-2, alpha_weight_decay=0.0, **options)


def test_the_optimiser_of_the_architecture_goes_on_where_the_search_left_it(monkeypatch):
    found, searcher = tuned_with(monkeypatch), searching()
    searcher.search(batches(), batches(seed=1), seed=0)
    ((_, state, tuner),) = found
    kept = searcher.a_opt.state_dict()
    assert same(state, kept)
    assert (kept["param_groups"][0]["lr"], kept["param_groups"][0]["weight_decay"]) == (3e-2, 0.0)
    # it moves the copy: the search's own optimiser and alphas are where they were
    assert not same(tuner.a_opt.state_dict(), kept)
    held = {id(parameter) for parameter in tuner.a_opt.param_groups[0]["params"]}
    assert held == {id(alpha) for alpha in tuner.supernet.arch_parameters()}
    assert not held & {id(alpha) for alpha in searcher.supernet.arch_parameters()}


def test_so_it_does_in_a_search_resumed_from_a_checkpoint(monkeypatch):
    found, whole, part = tuned_with(monkeypatch), searching(), searching()
    wanted = whole.search(batches(), batches(seed=1), seed=0)
    states = []
    part.search(batches(), batches(seed=1), seed=0, on_epoch=lambda ended: states.append(ended.searcher.state_dict()))
    for state in states:  # after the first epoch, and when only the selection is left
        resumed = searching()
        resumed.load_state_dict(state)
        assert resumed.search(batches(), batches(seed=1), seed=0).genotype == wanted.genotype
        assert same(found[-1][1], found[0][1])


def test_alone_the_tuning_has_the_optimiser_of_darts_or_the_one_it_is_given(monkeypatch):
    found, supernet = tuned_with(monkeypatch), MICRO.supernet(1, 3, channels=2)
    selector = PerturbationSelector(tune_epochs=1)
    selector.select(supernet, batches(), batches(seed=1))
    given = torch.optim.Adam(supernet.arch_parameters(), lr=0.5, betas=(0.1, 0.2))
    selector.select(supernet, batches(), batches(seed=1), a_opt=given)
    groups = [state["param_groups"][0] for _, state, _ in found]
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in groups] == [
        (3e-4, (0.5, 0.999), 1e-3),
        (0.5, (0.1, 0.2), 0.0),
    ]
    assert not given.state
    weights = torch.optim.SGD(supernet.classifier.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="a_opt must hold architecture parameters of the supernet alone, got 2 others"):
        selector.select(supernet, batches(), batches(seed=1), a_opt=weights)


def test_a_search_calls_what_its_selector_has():
    class Plain:
        def select(self, supernet, train=None, val=None, *, seed=0):
            return supernet.derive()

    assert isinstance(PerturbationSelector(), TuningSelector)
    assert not isinstance(Plain(), TuningSelector)
    searcher = DARTS(MICRO.supernet(1, 3, channels=2), selector=Plain(), epochs=1)
    assert searcher.search(batches(), batches(), seed=0).genotype == searcher.supernet.derive()


def test_fixed_alphas_stay_zero_in_search_and_tuning():
    """blank-pt: the same as alphas zeroed by hand, weights trained alone, and a selector that leaves alphas alone."""
    supernet = MICRO.supernet(1, 3, channels=2)
    by_hand = copy.deepcopy(supernet)
    selector = PerturbationSelector(tune_epochs=1)
    result = DARTS(supernet, selector=selector, epochs=2, fixed_alpha=True).search(batches(), batches(seed=1), seed=3)
    assert all(alpha.eq(0).all() for alphas in result.alpha_history for alpha in alphas.values())
    assert selector.alpha_step

    for alpha in by_hand.arch_parameters():
        alpha.data.zero_()
    searcher = perturbation.Searcher(by_hand, stages=[perturbation.Stage(epochs=2, alpha_step=False)])
    searcher.search(batches(), batches(seed=1), seed=3)
    assert digest(by_hand) == digest(supernet)
    made = PerturbationSelector(tune_epochs=1, alpha_step=False).discretise(by_hand, batches(), batches(seed=1), seed=3)
    assert made.genotype == result.genotype
    assert all(alpha.eq(0).all() for alpha in made.supernet.arch_parameters())
    with pytest.raises(ValueError, match="order must be 1 with fixed_alpha"):
        DARTS(by_hand, order=2, fixed_alpha=True)


def test_ties_in_accuracy_are_broken_by_loss():
    x, labels = torch.tensor([[2.0, 0.0]]).view(1, 2, 1, 1), torch.tensor([0])
    halves = {"small": Columns([0.1, 0.0]), "large": Columns([1.0, 0.0])}
    supernet = OneEdge(halves, torch.eye(2))
    assert PerturbationSelector(tune_epochs=0).select(supernet, None, [(x, labels)]) == {"edge": "large"}


def test_none_is_measured_but_never_chosen():
    supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2)
    made = PerturbationSelector(tune_epochs=0).discretise(supernet, None, batches())
    assert all("none" not in decision.accuracies for decision in made.decisions)
    assert op_strengths(supernet, batches(), (1, 2))[0] == 0.0


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
    with pytest.raises(ValueError, match="val must be batches"):
        PerturbationSelector().select(supernet, batches(), None)
    with pytest.raises(ValueError, match="train must be batches"):
        PerturbationSelector().select(supernet, None, batches())
    with pytest.raises(RuntimeError, match="val must hold at least 1 batch"):
        PerturbationSelector(tune_epochs=0).select(supernet, None, [])


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
