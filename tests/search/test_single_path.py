"""The search of Single-Path NAS: one optimiser, schedule, warm-up, penalty, what resumes."""

import json
import math

import pytest
import torch
from tests.support.searches import equal, images
from torch import nn

from netwright.cost import count
from netwright.data.tensors import Batches
from netwright.results import plain
from netwright.search import spaces
from netwright.search.alternating import Alternating
from netwright.search.bilevel import FirstOrder
from netwright.search.brief import Brief
from netwright.search.history import paint_alphas
from netwright.search.latency import CONSTANT, operations_of, predict
from netwright.search.lightning import SearchModule
from netwright.search.priced import PricedSearch, Watched
from netwright.search.pricing import Limit, Limits, MultiplyAdds, NetworkCost, multiply_adds
from netwright.search.relaxed_split import RelaxedSplit
from netwright.search.result import SearchResult
from netwright.search.sampling import SampleSelector
from netwright.search.single_level import SingleLevel
from netwright.search.single_path import SinglePathNAS
from netwright.search.superkernel_supernet import SuperKernelSupernet
from netwright.train.rmsprop import RMSpropTF

CHAIN = spaces.get("micro-chain")
SHAPE = (1, 8, 8)


def loaders(steps=4):
    return Batches(images(24, 0), 6, steps=steps), Batches(images(24, 1), 6, name="validation")


def supernet(seed=0, **options):
    return SuperKernelSupernet(CHAIN, 1, 3, seed=seed, channels=4, **options)


def table(net):
    return {key: 0.5 + 0.1 * number for number, key in enumerate(net.operations(SHAPE))} | {CONSTANT: 0.25}


def single_path(net=None, **options):
    net = net or supernet()
    settings = {"epochs": 4, "warmup": 0.5, "lr": 0.01, "latency": table(net)} | options
    return SinglePathNAS(net, **settings)


def run(searcher, epochs=None, steps=4):
    """Steps by hand; figures of each."""
    train, val = loaders(steps)
    searcher.prepare(seed=0, steps_per_epoch=steps)
    figures = []
    for _ in range(epochs or searcher.epochs):
        train.set_epoch(searcher.epoch)
        batch = next(iter(val))
        figures += [searcher.step(each, batch) for each in train]
        searcher.end_epoch()
    return figures


def test_the_published_defaults():
    searcher = SinglePathNAS(supernet())
    assert [(stage.name, stage.epochs) for stage in searcher.stages] == [("warmup", 5), ("search", 3)]
    config = searcher.config()
    wanted = {"lam": 20.0, "indicator_dropout": 0.4, "optimizer": "RMSpropTF", "momentum": 0.9, "ema": 0.9999}
    assert {name: config[name] for name in wanted} == wanted
    for group in (*searcher.w_opt.param_groups, *searcher.a_opt.param_groups):
        assert (group["alpha"], group["momentum"], group["eps"]) == (0.9, 0.9, 1e-3)
    assert searcher.objective.terms[0].label_smoothing == 0.1


def test_all_but_batch_norms_decay_thresholds_too():
    searcher = single_path(weight_decay=0.5)
    searcher.prepare(seed=0, steps_per_epoch=1)
    norms = {p for m in searcher.supernet.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    decays = {
        p: group["weight_decay"]
        for opt in (searcher.w_opt, searcher.a_opt)
        for group in opt.param_groups
        for p in group["params"]
    }
    assert len(decays) == len(list(searcher.supernet.parameters()))
    assert all(decay == (0.0 if p in norms else 0.5) for p, decay in decays.items())
    assert len(norms) > 20


def test_the_learning_rate_falls_in_steps_across_the_stages_for_both_optimisers():
    searcher = single_path(epochs=5, warmup=0.4, lr=0.01, decay=0.5, decay_epochs=1.25)
    rates = []
    searcher.prepare(seed=0, steps_per_epoch=4)
    train, val = loaders()
    for _ in range(5):
        for batch in train:
            searcher.step(batch, next(iter(val)))
            rates.append(searcher.w_opt.param_groups[0]["lr"])
            assert {group["lr"] for group in (*searcher.w_opt.param_groups, *searcher.a_opt.param_groups)} == {
                rates[-1]
            }
        searcher.end_epoch()
    assert rates == pytest.approx([0.01 * 0.5 ** (step // 5) for step in range(20)])


def test_momentum_goes_on_from_the_warm_up():
    searcher = single_path()
    run(searcher, 2)
    assert searcher.stage.name == "search"
    assert all(searcher.w_opt.state[p]["momentum_buffer"].any() for p in searcher.supernet.weight_parameters()[:3])


def test_latency_counts_after_the_warm_up_and_indicators_are_dropped_in_it():
    searcher = single_path(lam=1000.0)
    figures = run(searcher)
    losses = [each["train_loss"] for each in figures]
    assert max(losses[:8]) < 10 < 500 < min(losses[8:])
    dropouts = []
    searcher = single_path()
    searcher.prepare(seed=0, steps_per_epoch=4)
    for _ in range(4):
        dropouts.append((searcher.stage.name, searcher.supernet.indicator_dropout, searcher.objective.terms[1].alpha))
        for batch in loaders()[0]:
            searcher.step(batch, None)
        searcher.end_epoch()
    assert dropouts == [("warmup", 0.4, 0.0)] * 2 + [("search", 0.0, 20.0)] * 2


def test_the_loss_is_cross_entropy_and_the_logarithm_of_the_latency():
    net = supernet()
    searcher = single_path(net, warmup=0.0, lam=3.0)
    searcher.prepare(seed=0, steps_per_epoch=4)
    batch = next(iter(loaders()[0]))
    net.train()
    plain = nn.functional.cross_entropy(net(batch[0]), batch[1], label_smoothing=0.1)
    latency = 0.25 + net.expected_cost(table(net)).item()
    loss = searcher.objective(net, batch, "both")
    assert loss.item() == pytest.approx(plain.item() + 3 * torch.tensor(latency).log().item(), rel=1e-6)
    free, priced = (torch.autograd.grad(value, net.arch["layer_1"], retain_graph=True)[0] for value in (plain, loss))
    (slope,) = torch.autograd.grad(net.expected_cost(table(net)), net.arch["layer_1"])
    torch.testing.assert_close(priced - free, 3 / latency * slope)


def test_the_validation_batch_teaches_nothing():
    one, other = single_path(), single_path()
    train, val = loaders()
    for searcher in (one, other):
        searcher.prepare(seed=0, steps_per_epoch=4)
    batch, wrong = next(iter(train)), (torch.rand(6, *SHAPE) * 50, torch.zeros(6, dtype=torch.long))
    seen = one.step(batch, next(iter(val)))
    unseen = other.step(batch, wrong)
    assert seen["val_loss"] != unseen["val_loss"]
    assert seen["gap"] == pytest.approx(seen["val_loss"] - seen["train_loss"])
    assert equal(dict(one.supernet.state_dict()), dict(other.supernet.state_dict()))


def test_a_look_at_every_so_many_steps():
    class Net(nn.Linear):
        pass

    net, watched = Net(1, 1), Watched(every=3)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def objective(supernet, batch, part):
        return (supernet(batch) ** 2).mean()

    seen = ["val_loss" in watched.step(net, objective, opt, None, torch.ones(2, 1), torch.ones(2, 1)) for _ in range(7)]
    assert seen == [True, False, False, True, False, False, True]
    assert "val_loss" not in Watched().step(net, objective, opt, None, torch.ones(2, 1), None)
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        Watched(every=0)
    for inner in (FirstOrder(), RelaxedSplit(), Alternating(FirstOrder())):
        with pytest.raises(ValueError, match=f"such as SingleLevel, got {type(inner).__name__}, which needs a valid"):
            Watched(inner)
    assert isinstance(Watched(Alternating(SingleLevel())).inner, Alternating)


def test_latency_steers_the_search():
    found = {}
    for lam in (0.0, 50.0):
        net = supernet()
        result = single_path(net, lam=lam, epochs=4, warmup=0.0, lr=0.05).search(*loaders(8), seed=0)
        found[lam] = predict(CHAIN, result.genotype, table(net), SHAPE, channels=4)
        assert result.cost["decided_cost"] == pytest.approx(found[lam], rel=1e-5)
        assert result.epochs[-1]["decided_cost"] == pytest.approx(found[lam], rel=1e-5)
        assert result.epochs[-1]["modelled_cost"] == pytest.approx(found[lam], rel=0.3)
    assert found[50.0] < 0.5 * found[0.0]


def test_multiply_adds_are_those_of_the_derived_layers():
    net = supernet()
    result = single_path(net, lam=50.0, epochs=3, warmup=0.0, lr=0.05).search(*loaders(8), seed=0)
    network = result.genotype.build(1, 3, channels=4)
    operations = net.operations(SHAPE)
    keys = [key for key in operations_of(network, SHAPE).values() if key is not None]
    assert result.cost["expected_macs"] == sum(count(*operations[key]).macs for key in keys)


def test_histories_of_thresholds_are_drawn_as_such(tmp_path):
    from matplotlib.figure import Figure

    result = single_path(lam=50.0, epochs=2, warmup=0.0, lr=0.05).search(*loaders(2), seed=0)
    assert result.by_thresholds
    assert len(result.plot().lines) == 6
    again = SearchResult.from_dict(json.loads(json.dumps(plain(result.to_dict()))))
    figure = Figure()
    paint_alphas(again, figure)
    charts = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in charts] == [f"layer_{i}" for i in range(6)]
    history = [float(thresholds["layer_1"][0]) for thresholds in result.alpha_history]
    assert charts[1].lines[0].get_ydata() == pytest.approx(history)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["kernel 5", "expansion 2", "expansion 4"]


def limited(most):
    big = dict.fromkeys(("channels",), 16)
    cost = NetworkCost(CHAIN, multiply_adds(CHAIN, SHAPE, 3, **big), SHAPE, 3, **big)
    return cost, Limits(Limit(cost, most, "multiply-adds"))


def test_a_short_search_keeps_to_its_limits():
    cost, _ = limited(1.0)
    net = supernet()
    whole = cost.of(net, net.derive())
    _, limits = limited(0.4 * whole)
    searcher = SinglePathNAS.short(net, Brief([1, 1], limits=limits))
    result = searcher.search(*loaders(), seed=0)
    assert cost.of(net, result.genotype) <= 0.4 * whole
    free = SinglePathNAS.short(supernet(), Brief([1, 2], lr=0.5))
    assert isinstance(free.latency, MultiplyAdds)
    assert [stage.epochs for stage in free.stages] == [1, 2]
    assert free.lam * math.log(2) < 0.5  # nats for half of the cost: more would remove what ten classes need
    with pytest.raises(ValueError, match="select must be argmax, got SampleSelector"):
        SinglePathNAS.short(supernet(), Brief([1, 1], chosen=SampleSelector(2)))


def test_the_same_training_over_all_paths():
    paths = CHAIN.supernet(1, 3, channels=4)
    searcher = PricedSearch(paths, table(supernet()), lam=50.0, epochs=2, warmup=0.5, lr=0.05)
    result = searcher.search(*loaders(8), seed=0)
    assert result.genotype.space == CHAIN.name
    first, _, last = result.alpha_history
    assert all(not torch.equal(first[key], last[key]) for key in first)
    assert not result.by_thresholds
    assert PricedSearch.short(CHAIN.supernet(1, 3, channels=4), Brief([1, 2])).latency is not None


def test_the_average_follows_the_weights():
    searcher = single_path(ema=0.5, epochs=1, warmup=0.0)
    states = []
    train, _ = loaders()
    searcher.prepare(seed=0, steps_per_epoch=4)
    assert searcher.averaged is None
    for batch in train:
        searcher.step(batch, None)
        states.append(searcher.supernet.network[0][0].weight.detach().clone())
    expected = states[0]
    for state in states[1:]:
        expected = 0.5 * expected + 0.5 * state
    torch.testing.assert_close(searcher.averaged.module.network[0][0].weight, expected)
    assert single_path(ema=None, epochs=1, warmup=0.0).search(*loaders(), seed=0).genotype.space == CHAIN.name


def test_a_resumed_search_has_the_same_bits():
    plain, states = single_path(), []
    expected = plain.search(*loaders(), seed=0, on_epoch=lambda end: states.append(end.searcher.state_dict()))
    for state in states[:3]:
        again = single_path(supernet(seed=5))
        again.load_state_dict(state)
        torch.manual_seed(9)
        found = again.search(*loaders(), seed=0)
        assert found.genotype == expected.genotype
        assert found.epochs == expected.epochs
        assert equal(plain.state_dict(), again.state_dict())


def test_lightning_gives_the_bits_of_search():
    import lightning

    plain = single_path()
    expected = plain.search(*loaders(), seed=0)
    module = SearchModule(single_path(), *loaders(), seed=0)
    lightning.Trainer(
        max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    ).fit(module)  # fmt: skip
    assert equal(dict(plain.supernet.state_dict()), dict(module.supernet.state_dict()))
    assert module.result().genotype == expected.genotype


def test_another_optimiser():
    searcher = single_path(optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9))
    searcher.search(*loaders(), seed=0)
    assert searcher.config()["optimizer"] == "SGD"
    assert not isinstance(searcher.a_opt, RMSpropTF)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "lam must be >= 0 and finite, got -1.0"),
        ({"warmup": 1.0}, r"warmup must lie in \[0, 1\), got 1.0"),
        ({"indicator_dropout": 1.0}, r"indicator_dropout must lie in \[0, 1\), got 1.0"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\), got 1.0"),
        ({"decay": 0.0}, r"decay must lie in \(0, 1\]"),
        ({"decay_epochs": 0.0}, "decay_epochs must be > 0 and finite, got 0.0"),
        ({"lam": "a"}, "lam must be a number >= 0, got 'a'"),
        ({"epochs": 1.5}, "epochs must be a whole number >= 1, got 1.5"),
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"latency": {"constant": -1.0}}, "latencies must be >= 0, got -1.0"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        single_path(**options)


def test_a_supernet_of_several_paths_is_refused():
    with pytest.raises(ValueError, match="supernet must be a SuperKernelSupernet, got a ChoiceSupernet"):
        SinglePathNAS(CHAIN.supernet(1, 3, channels=4))


def test_gaps_in_a_table_are_told_in_the_first_step():
    net = supernet()
    for change, error, message in (
        (lambda costs, key: costs.pop(key), KeyError, "the table has no cost for .*k5_e4"),
        (lambda costs, key: costs.update({key: 0.0}), ValueError, "times must be > 0"),
    ):
        costs = table(net)
        change(costs, next(key for key in costs if key[0] == "k5_e4"))
        searcher = single_path(net, latency=costs)
        searcher.prepare(seed=0, steps_per_epoch=1)
        with pytest.raises(error, match=message):
            searcher.step(next(iter(loaders()[0])), None)
