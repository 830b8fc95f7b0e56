"""A network with the four methods of the protocol and no more is searched by all that needs no gates."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.support.searches import equal, images
from torch import nn

from netwright.data.tensors import Batches
from netwright.results import plain
from netwright.search import (
    DARTS,
    DASS,
    RARTS,
    SDDARTS,
    Alternating,
    ArgmaxSelector,
    CostPenalty,
    DASSStages,
    ExpectedLatency,
    FBNet,
    FirstOrder,
    Limit,
    Limits,
    PerturbationSelector,
    Phased,
    PricedSearch,
    ProxylessNAS,
    RelaxedSplit,
    SampleSelector,
    Searcher,
    SearchModule,
    SecondOrder,
    SelfDistillation,
    SharpnessAware,
    SingleLevel,
    SinglePathNAS,
    Stage,
    TaskLoss,
    ThresholdSelector,
    WithinLimits,
    alpha_hessian_eig,
    discretisation_gap,
    inherited_accuracy,
    rho_sharpness,
    sample_genotypes,
)
from netwright.search.priced import Watched
from netwright.search.protocol import alphas_of, weights_of
from netwright.search.proxyless import GateGradient, Reinforce
from netwright.seeding import seeded, stream

SIDES = (1, 3, 5)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.ops = nn.ModuleList(nn.Conv2d(1, 4, side, padding=side // 2) for side in SIDES)

    def forward(self, x, alpha):
        return sum(m * op(x) for m, op in zip(alpha.softmax(0), self.ops, strict=True))


class Own(nn.Module):
    """One convolution whose side is searched: the four methods, on nothing of netwright's."""

    def __init__(self):
        super().__init__()
        with seeded(0, "own"):
            self.first, self.norm, self.head = Mixed(), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.side_alpha = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.head(self.norm(self.first(x, self.side_alpha)).relu().mean((2, 3)))

    def named_choices(self):
        yield "first", self.first

    def arch_parameters(self):
        return [self.side_alpha]

    def expected_cost(self, table):
        return self.side_alpha.softmax(0) @ torch.tensor([table[side] for side in SIDES])

    def derive(self):
        return SIDES[int(self.side_alpha.argmax())]


def loaders():
    return Batches(images(16, 0), 8, seed=0), Batches(images(16, 1), 8, seed=1)


STEPS = {
    "first order": FirstOrder,
    "second order": SecondOrder,
    "relaxed split": RelaxedSplit,
    "single level": SingleLevel,
    "sharpness-aware": SharpnessAware,
    "phased": Phased,
    "alternating": lambda: Alternating(FirstOrder(), 1),
    "watched": Watched,
}


@pytest.mark.parametrize("step", STEPS)
def test_every_step_searches_it(step):
    search = Searcher(Own(), method=STEPS[step](), stages=[Stage(epochs=2, lr=0.05)], alpha_lr=0.1)
    result = search.search(*loaders(), seed=0)
    assert result.genotype in SIDES
    assert (result.skip_share, result.cost) == ((), {})
    assert [list(alphas) for alphas in result.alpha_history] == [["side_alpha"]] * 3
    assert result.alpha_history[-1]["side_alpha"].any()
    assert "skip_share" not in result.epochs[0]
    assert str(result.genotype) in str(result)
    assert plain(result.to_dict())["genotype"] == result.genotype
    result.plot()


SEARCHERS = {
    "DARTS": lambda net: DARTS(net, epochs=2),
    "DARTS, second order": lambda net: DARTS(net, order=2, epochs=2),
    "RARTS": lambda net: RARTS(net, epochs=2),
    "SD-DARTS": lambda net: SDDARTS(net, SelfDistillation(ramp=0.0), epochs=2),
    "DASS": lambda net: DASS(net, 0.5, DASSStages(1, 1, 1)),
    "priced, without a price": lambda net: PricedSearch(net, epochs=2, warmup=0.5, lr=0.01),
}


@pytest.mark.parametrize("name", SEARCHERS)
def test_searchers_that_need_no_gates_take_it(name):
    search = SEARCHERS[name](Own())
    result = search.search(*loaders(), seed=0)
    assert result.genotype in SIDES
    assert not torch.equal(*(result.alpha_history[i]["side_alpha"] for i in (0, -1)))


def test_weights_are_all_other_parameters():
    net = Own()
    search = Searcher(net)
    assert list(alphas_of(net)) == ["side_alpha"]
    weights = {id(p) for group in search.w_opt.param_groups for p in group["params"]}
    assert weights == {id(p) for p in weights_of(net)} == {id(p) for p in net.parameters()} - {id(net.side_alpha)}
    net.arch_parameters = lambda: []
    with pytest.raises(ValueError, match="must have architecture parameters, got none"):
        Searcher(net)


def test_a_table_prices_it():
    table, small = {1: 1.0, 3: 9.0, 5: 25.0}, {"genotypes": []}
    for alpha in (0.0, 10.0):
        penalty = CostPenalty("add_linear", table, ref=9.0, alpha=alpha)
        search = Searcher(Own(), objective=TaskLoss() + penalty, stages=[Stage(epochs=4, lr=0.05)], alpha_lr=0.3)
        search.search(*loaders(), seed=0)
        small["genotypes"].append(float(search.supernet.expected_cost(table)))
    assert small["genotypes"][1] < small["genotypes"][0]


def test_a_search_of_it_resumes_to_the_bit():
    states, whole = [], DARTS(Own(), epochs=3)
    result = whole.search(*loaders(), seed=0, on_epoch=lambda end: states.append(end.searcher.state_dict()))
    resumed = DARTS(Own(), epochs=3)
    resumed.load_state_dict(states[0])
    again = resumed.search(*loaders(), seed=0)
    assert equal(result.alpha_history, again.alpha_history)
    assert equal(whole.state_dict(), resumed.state_dict())


def test_lightning_runs_a_search_of_it(tmp_path):
    import lightning

    module = SearchModule(DARTS(Own(), epochs=1), *loaders(), seed=0)
    trainer = lightning.Trainer(
        max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module)
    wanted = DARTS(Own(), epochs=1).search(*loaders(), seed=0)
    assert equal(module.result().alpha_history, wanted.alpha_history)


def test_its_sharpness_is_measured():
    net, batches = Own(), list(loaders()[1])
    assert rho_sharpness(net, batches, rho=0.5, wrt="both") > 0
    assert alpha_hessian_eig(net, batches).isfinite().all()


def step(method):
    net = Own()
    batch = next(iter(loaders()[0]))
    w_opt = torch.optim.SGD(weights_of(net), lr=0.1)
    method.step(net, TaskLoss(), w_opt, torch.optim.Adam(net.arch_parameters()), batch, batch)


def select(selector):
    return selector.select(Own(), *(list(loader) for loader in loaders()))


def priced():
    return CostPenalty("add_linear", ExpectedLatency({}), ref=1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select(PerturbationSelector(tune_epochs=0)), "keyed_choices"),
        (lambda: select(SampleSelector(2, lambda genotype: 0.0, Limits(Limit(ExpectedLatency({}), 1.0)))),
         "a selection by mixing weights needs a supernet with keyed_choices, mixing_weights, which Own has not"),
        (lambda: sample_genotypes(Own(), 1, generator=stream(0, "x")), "keyed_choices, set_gate, which Own has not"),
        (lambda: inherited_accuracy(Own(), 1, [0], [0]), "inherited_accuracy needs a supernet with adopt, which Own"),
        (lambda: discretisation_gap(Own(), 1, [0]), "discretised needs a supernet with adopt, which Own has not"),
        (lambda: select(ArgmaxSelector()), "needs a supernet with keyed_choices, mixing_weights, which Own has not"),
        (lambda: select(ThresholdSelector()), "ThresholdSelector needs a supernet with keyed_choices, which Own has"),
        (lambda: select(WithinLimits(Limits(Limit(ExpectedLatency({}), 1.0)))), "keyed_choices, mixing_weights, which"),
        (lambda: step(GateGradient()), "a gate's gradient needs a supernet with keyed_choices, set_gate, which Own"),
        (lambda: step(Reinforce(2)), "REINFORCE needs a supernet with keyed_choices, set_gate, which Own has not"),
        (lambda: FBNet(Own()), "FBNet needs a supernet with keyed_choices, set_gate, which Own has not"),
        (lambda: ProxylessNAS(Own()), "ProxylessNAS needs a supernet with keyed_choices, set_gate, which Own has not"),
        (lambda: SinglePathNAS(Own()), "supernet must be a SuperKernelSupernet, got a Own"),
        (lambda: PricedSearch(Own(), {}), "ExpectedLatency needs a supernet with priced, which Own has not"),
        (lambda: Searcher(Own(), objective=TaskLoss() + priced()), "ExpectedLatency needs a supernet with priced"),
    ],
)  # fmt: skip
def test_what_needs_more_names_what_is_missing(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_copy_is_searched_as_well():
    """Methods that copy the supernet find the parameters of the copy."""
    net = Own()
    copied = copy.deepcopy(net)
    DARTS(copied, epochs=1).search(*loaders(), seed=0)
    assert not net.side_alpha.any()
    assert copied.side_alpha.any()
