import copy
import io
import math

import pytest
import torch
from searches import equal, images
from torch import nn

from netwright.data.tensors import Batches
from netwright.search import spaces
from netwright.search.bilevel import FirstOrder, SecondOrder
from netwright.search.darts import DARTS
from netwright.search.objective import TaskLoss
from netwright.search.searcher import Pairs, Searcher, Stage
from netwright.search.selection import MagnitudeSelector
from netwright.search.supernet import Choice, SoftmaxGate, Supernet


def loaders(steps=3):
    return (
        Batches(images(24, 0), 8, seed=0, steps=steps),
        Batches(images(16, 1), 8, seed=0, name="validation"),
    )


def supernet(seed=0):
    return spaces.get("micro-darts-2").supernet(1, 3, channels=2, seed=seed)


def darts(order=1, epochs=3, **options):
    return DARTS(supernet(), order=order, epochs=epochs, **options)


def through_a_file(state):
    """As a checkpoint travels: only plain values and tensors pass ``weights_only``."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("order", [1, 2])
def test_a_search_resumed_after_any_epoch_is_bit_equal(order):
    states = []
    whole = darts(order)
    result = whole.search(*loaders(), seed=0, on_epoch=lambda end: states.append(end.searcher.state_dict()))
    assert len(states) == 3
    for state in states:
        torch.manual_seed(state["epoch"])  # what the global generator holds must not matter
        resumed = darts(order)
        resumed.load_state_dict(through_a_file(state))
        again = resumed.search(*loaders(), seed=0)
        assert equal(whole.state_dict(), resumed.state_dict())
        assert equal(result.alpha_history, again.alpha_history)
        assert result.genotype == again.genotype
        assert result.epochs == again.epochs


def test_the_same_seed_gives_the_same_search_and_another_another():
    first, second = darts(), darts()
    first.search(*loaders(), seed=0)
    second.search(*loaders(), seed=0)
    assert equal(first.state_dict(), second.state_dict())
    third = DARTS(supernet(1), epochs=3)
    third.search(*loaders(), seed=0)
    assert not equal(first.state_dict()["alphas"], third.state_dict()["alphas"])


def test_random_layers_are_part_of_the_seed_not_of_the_global_generator():
    def noisy():
        net = supernet()
        net.arch["normal_0_2"].data.zero_()
        net.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, 0.5, module.training))
        return DARTS(net, epochs=2)

    results = []
    for start, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(start)
        before = torch.get_rng_state()
        results.append(noisy().search(*loaders(), seed=seed).alpha_history)
        assert torch.equal(before, torch.get_rng_state())
    assert equal(results[0], results[1])
    assert not equal(results[1], results[2])


def test_every_step_draws_numbers_of_its_own():
    searcher, drawn = darts(epochs=2), []
    searcher.supernet.register_forward_hook(
        lambda module, inputs, output: drawn.append(torch.rand(()).item()) if module.training else None
    )
    searcher.search(*loaders(), seed=0)
    assert len(drawn) == len(set(drawn)) == 2 * 3 * 2  # epochs, steps, passes


def test_a_loop_of_ones_own_gives_the_same_bits():
    train, val = loaders()
    searcher, reference = darts(2), darts(2)
    searcher.prepare(seed=0, steps_per_epoch=len(train))
    while not searcher.finished:
        for train_batch, val_batch in Pairs(train, val, searcher):
            searcher.step(train_batch, val_batch)
        searcher.end_epoch()
    reference.search(*loaders(), seed=0)
    assert equal(searcher.state_dict(), reference.state_dict())


def test_the_bare_step_is_the_searchers():
    train, val = loaders()
    searcher, net = darts(epochs=1), supernet().train()
    searcher.prepare(seed=0, steps_per_epoch=2)
    (x, v) = next(iter(train)), next(iter(val))
    searcher.step(x, v)
    w_opt = torch.optim.SGD(net.weight_parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4)
    a_opt = torch.optim.Adam(net.arch_parameters(), lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    FirstOrder().step(net, TaskLoss(), w_opt, a_opt, x, v)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), searcher.supernet.parameters(), strict=True))


def test_weights_and_architecture_have_an_optimiser_each():
    searcher = darts()
    ids = [{id(p) for g in o.param_groups for p in g["params"]} for o in (searcher.w_opt, searcher.a_opt)]
    assert ids[1] == {id(p) for p in searcher.supernet.arch.values()}
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {id(p) for p in searcher.supernet.parameters()}


class Edge(Supernet):
    """One choice between an operation that passes the picture on and one that puts out noise."""

    def __init__(self):
        class OneChoice:
            def genotype(self, decisions):
                return Found(decisions["edge"])

            def selector(self):
                return Best()

        super().__init__(OneChoice(), 3)
        self.choice = Choice({"noise": Noise(), "skip_connect": nn.Identity()}, key="edge", gate=SoftmaxGate())
        self.head = nn.Linear(64, 3)
        self.arch["edge"] = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.head(self.choice(x, self.arch["edge"]).flatten(1))


class Noise(nn.Module):
    def forward(self, x):
        return torch.randn_like(x)


class Found(str):
    @property
    def skip_share(self):
        return float(self == "skip_connect")


class Best:
    def select(self, net, train=None, val=None, *, seed=0):
        return net.space.genotype({"edge": net.choice.names[int(net.arch["edge"].argmax())]})


def test_the_search_prefers_what_helps():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Edge()
    net.arch["edge"].data.copy_(torch.tensor([0.2, -0.2]))
    result = Searcher(net, stages=[Stage("search", 6, lr=0.2)], alpha_lr=0.1).search(*loaders(steps=10), seed=0)
    assert result.genotype == "skip_connect"
    assert result.skip_share[-1] == 1.0
    assert result.alpha_history[0]["edge"].tolist() == pytest.approx([0.2, -0.2])
    assert len(result.alpha_history) == 7
    assert result.epochs[-1]["val_loss"] < result.epochs[0]["val_loss"]


def test_the_architecture_waits_for_its_share_of_the_search():
    """Half of four epochs of three steps: the first six leave alphas as they were, the seventh moves them."""
    searcher = darts(epochs=4, wait=0.5)
    train, val = loaders()
    searcher.prepare(seed=0, steps_per_epoch=len(train))
    seen, start = [], {name: alpha.detach().clone() for name, alpha in searcher.supernet.arch.items()}
    while not searcher.finished:
        for batches in Pairs(train, val, searcher):
            figures = searcher.step(*batches)
            still = all(torch.equal(alpha, start[name]) for name, alpha in searcher.supernet.arch.items())
            seen.append((still, "val_loss" in figures))
        searcher.end_epoch()
    assert seen == [(True, False)] * 6 + [(False, True)] * 6
    assert ["val_loss" in epoch for epoch in searcher.result().epochs] == [False, False, True, True]


def test_weights_that_wait_are_those_of_a_search_without_architecture_steps():
    train, val = loaders()
    waiting = darts(epochs=3, wait=0.99)
    frozen = Searcher(supernet(), stages=[Stage("search", 3, alpha_step=False)])
    for searcher in (waiting, frozen):
        searcher.search(train, val, seed=0)
        assert [a["train_loss"] for a in searcher.result().epochs]
    losses = [[epoch["train_loss"] for epoch in searcher.result().epochs] for searcher in (waiting, frozen)]
    assert losses[0] == losses[1]


def test_short_searches_wait_and_published_ones_do_not():
    from netwright.search import DASS, RARTS, SDDARTS, Brief

    for kind, parts in ((DARTS, 1), (RARTS, 1), (SDDARTS, 1), (DASS, 3)):
        assert kind(supernet()).stages[0].wait == 0
        assert kind.short(supernet(), Brief([2] * parts)).stages[0].wait == 0.5
        assert kind.short(supernet(), Brief([2] * parts, wait=0.0)).stages[0].wait == 0


@pytest.mark.parametrize("wait", [-0.1, 1.0, math.nan])
def test_a_wait_outside_its_range(wait):
    with pytest.raises(ValueError, match=r"wait of stage 'search' must lie in \[0, 1\)"):
        darts(wait=wait)


def test_the_learning_rate_is_a_cosine_of_progress():
    searcher = darts(epochs=2)
    seen = []
    searcher.search(*loaders(4), seed=0, on_epoch=lambda end: seen.append(end.figures["lr"]))
    expected = [0.001 + 0.024 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert seen == pytest.approx([sum(expected[:4]) / 4, sum(expected[4:]) / 4])
    assert searcher.progress == pytest.approx(1.0)


@pytest.mark.parametrize("change", [1, 4])
def test_epochs_may_be_changed_on_the_way(change):
    searcher, rates = darts(epochs=3), []

    def on_epoch(end):
        rates.append(end.searcher.w_opt.param_groups[0]["lr"])
        if end.epoch == 1:
            end.searcher.set_epochs(change)

    result = searcher.search(*loaders(), seed=0, on_epoch=on_epoch)
    assert len(result.epochs) == change == searcher.epochs
    assert result.config["stages"][0]["epochs"] == change
    assert rates == sorted(rates, reverse=True)
    if change > 1:
        assert searcher.progress == pytest.approx(1.0)
        assert rates[-1] < 0.0025  # the last step comes close to the end of the cosine, not a quarter short of it


def test_a_change_of_epochs_survives_resumption():
    whole, states = darts(epochs=4), []

    def on_epoch(end):
        if end.epoch == 1:
            end.searcher.set_epochs(3)
        states.append(end.searcher.state_dict())

    whole.search(*loaders(), seed=0, on_epoch=on_epoch)
    resumed = darts(epochs=4)
    resumed.load_state_dict(states[0])
    resumed.search(*loaders(), seed=0)
    assert equal(whole.state_dict(), resumed.state_dict())


def test_validation_batches_start_again_in_a_new_order():
    train, val = loaders(steps=5)  # validation has 2
    pairs = Pairs(train, val, darts())
    orders = [tuple(v[1].tolist()) for _, v in pairs]
    assert len(pairs) == len(orders) == 5
    assert len(set(orders)) > 2


def test_seconds_add_up_over_sittings(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("netwright.search.searcher.time.perf_counter", lambda: now[0])
    searcher, (train, val) = darts(epochs=2), loaders(steps=1)
    assert searcher.seconds == 0
    searcher.prepare(seed=0, steps_per_epoch=1)
    searcher.step(next(iter(train)), next(iter(val)))
    now[0] += 3
    assert searcher.seconds == 3
    searcher.end_epoch()
    state = searcher.state_dict()
    now[0] += 1000
    assert searcher.seconds == 3
    again = darts(epochs=2)
    again.load_state_dict(state)
    again.prepare(seed=0, steps_per_epoch=1)
    again.step(next(iter(train)), next(iter(val)))
    now[0] += 2
    again.end_epoch()
    assert again.seconds == again.result().wall_time == 5


def test_result_says_what_was_done():
    result = darts(2).search(*loaders(), seed=3)
    assert (result.seed, len(result.skip_share), len(result.epochs)) == (3, 3, 3)
    assert result.genotype.space == "micro-darts-2"
    assert {"train_loss", "val_loss", "skip_share", "lr", "weight_grad_norm"} <= set(result.epochs[0])
    assert result.skip_share[-1] == result.genotype.skip_share
    assert result.config["method"] == {"name": "SecondOrder", "xi": None, "eps": 1e-2}
    assert result.config["stages"][0]["lr"] == 0.025
    assert result.wall_time > 0
    assert result.cost["expected_macs"] > 0
    import json

    assert json.loads(json.dumps(result.to_dict()))["config"]["clip"] == 5.0
    assert "skip_share" in str(result)
    axes = result.plot()
    keys = len(result.alpha_history[0])
    assert len(axes.lines) == keys + 1
    assert list(axes.lines[-1].get_ydata()) == list(result.skip_share)


def test_selector_and_order():
    class Fixed(MagnitudeSelector):
        def select(self, net, train=None, val=None, *, seed=0):
            self.got = train, val, seed
            return super().select(net)

    selector, (train, val) = Fixed(), loaders()
    DARTS(supernet(), selector=selector, epochs=1).search(train, val, seed=5)
    assert selector.got == (train, val, 5)
    assert isinstance(darts(1).method, FirstOrder)
    assert isinstance(darts(2).method, SecondOrder)
    assert not isinstance(darts(1).method, SecondOrder)


def test_losses_that_are_not_finite_are_no_genotype():
    searcher = darts(epochs=1)
    train, val = loaders()
    train.dataset.images[:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"loss must be finite.*stage 'search', epoch 1, step 1"):
        searcher.search(train, val, seed=0)
    spoilt = darts(epochs=1)
    next(iter(spoilt.supernet.arch.values())).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        spoilt.search(*loaders(), seed=0)


def test_state_is_a_copy_and_belongs_to_its_search():
    searcher = darts()
    searcher.prepare(seed=0, steps_per_epoch=3)
    state = searcher.state_dict()
    frozen = copy.deepcopy(state)
    searcher.search(*loaders(), seed=0)
    assert equal(state, frozen)
    other = Searcher(supernet(), stages=[Stage("search", 3)])
    with pytest.raises(ValueError, match="state must be of a Searcher"):
        other.load_state_dict(state)


def test_order_of_calls():
    searcher = darts(epochs=1)
    batch = next(iter(loaders()[0]))
    with pytest.raises(RuntimeError, match="prepare"):
        searcher.step(batch, batch)
    with pytest.raises(RuntimeError, match="prepare"):
        searcher.enter("search")
    searcher.prepare(seed=0, steps_per_epoch=1)
    with pytest.raises(RuntimeError, match="at least 1 step"):
        searcher.end_epoch()
    searcher.step(batch, batch)
    for call in (searcher.state_dict, lambda: searcher.set_epochs(3)):
        with pytest.raises(RuntimeError, match="between two epochs"):
            call()
    searcher.end_epoch()
    assert searcher.finished
    with pytest.raises(RuntimeError, match="finished"):
        searcher.step(batch, batch)
    with pytest.raises(ValueError, match="seed must be 0"):
        searcher.prepare(seed=1, steps_per_epoch=1)
    with pytest.raises(ValueError, match="steps_per_epoch"):
        searcher.prepare(seed=0, steps_per_epoch=0)


@pytest.mark.parametrize("order", [1, 2])
def test_the_published_defaults(order):
    config = DARTS(supernet(), order).config()
    wanted = {"epochs": 50, "lr": 0.025, "lr_min": 0.001, "weight_decay": 3e-4, "alpha_step": True, "wait": 0.0}
    assert config["stages"] == [{"name": "search", **wanted}]
    assert (config["momentum"], config["clip"]) == (0.9, 5.0)
    assert (config["alpha_lr"], config["alpha_betas"], config["alpha_weight_decay"]) == (3e-4, [0.5, 0.999], 1e-3)
    steps = {1: {"name": "FirstOrder"}, 2: {"name": "SecondOrder", "xi": None, "eps": 1e-2}}
    assert config["method"] == steps[order]
    assert config["objective"] == ["TaskLoss"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: darts(order=3), "order must be 1 or 2, got 3"),
        (lambda: darts(epochs=0), "at least 1 epoch"),
        (lambda: darts(lr=0.0), "lr of stage 'search' must be > 0"),
        (lambda: darts(lr_min=0.1), "lr_min"),
        (lambda: darts(weight_decay=-1.0), "weight_decay"),
        (lambda: darts(momentum=1.0), "momentum"),
        (lambda: darts(clip=0.0), "clip"),
        (lambda: Stage(epochs=-1), "epochs of stage"),
        (lambda: Searcher(supernet(), stages=[Stage(), Stage()]), "name of its own"),
        (lambda: Searcher(supernet(), stages=[]), "at least one"),
        (lambda: darts().search([], loaders()[1], seed=0), "train must hold at least 1 batch, got 0"),
        (lambda: darts().search(loaders()[0], None, seed=0), "val must hold at least 1 batch, got 0"),
        (lambda: darts().search(iter([1]), loaders()[1], seed=0), "train must have a length"),
        (lambda: darts().search(*loaders(), seed=-1), "seed must be"),
        (lambda: darts().set_epochs({"prune": 3}), "stage must be one of"),
        (lambda: darts().set_epochs(-1), "must be >= 0"),
        (lambda: darts().set_epochs(0), "at least 1 epoch"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_supernet_without_architecture_is_refused():
    net = supernet()
    net.arch.clear()
    with pytest.raises(ValueError, match="architecture parameters"):
        DARTS(net)
