"""Latency tables: which operations they price, how they are added up, and the expectation over a supernet."""

import time
from collections import Counter

import pytest
import torch
from torch import nn

from netwright.console import UserError
from netwright.cost import LatencyTable
from netwright.search import latency, spaces
from netwright.search.latency import (
    CONSTANT,
    ExpectedLatency,
    Setup,
    SpaceLatencyTable,
    measure,
    measured,
    measured_all,
    operations_of,
    predict,
)
from netwright.search.objective import CostPenalty, TaskLoss
from netwright.search.spaces.choices import ChoiceSpace
from netwright.seeding import stream

CHAIN, CELLS = spaces.get("micro-chain"), spaces.get("micro-darts-2")
SHAPE = (1, 8, 8)


class Wait(nn.Module):
    """Takes a time that is known."""

    def __init__(self, milliseconds):
        super().__init__()
        self.milliseconds = milliseconds

    def forward(self, x):
        time.sleep(self.milliseconds / 1e3)
        return x


def waiting(choose, in_channels, num_classes):
    return nn.Sequential(
        choose("a", {"2 ms": lambda: Wait(2), "8 ms": lambda: Wait(8)}),
        Wait(3),
        choose("b", {"skip": nn.Identity, "5 ms": lambda: Wait(5)}),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(in_channels, num_classes),
    )


@pytest.mark.parametrize("space", [CHAIN, CELLS], ids=lambda space: space.name)
def test_operations_of_networks_are_those_of_the_supernet(space):
    priced = space.supernet(1, 3).operations(SHAPE)
    for seed in range(4):
        genotype = space.random(stream(seed, "random"))
        network = space.build(genotype, 1, 3)
        keys = [key for key in operations_of(network, SHAPE).values() if key is not None]
        assert set(keys) <= set(priced)
        if space is CHAIN:
            assert len(keys) == sum(name != "skip" for _, name in genotype.decisions)
        else:
            assert len(operations_of(network, SHAPE)) == 3 * 4
        assert network.training


@pytest.mark.usefixtures("even")
def test_times_of_known_length_are_found_again():
    space = ChoiceSpace("waiting", waiting, shape=(4, 4))
    table = measure(space, (1, 4, 4), 3, Setup(repeats=5))
    by_name = {key[0]: ms for key, ms in table.items() if key != CONSTANT}
    assert set(by_name) == {"2 ms", "8 ms", "5 ms"}
    # sleeping never ends early, and late only when the machine is busy
    for name, ms in by_name.items():
        assert float(name.split()[0]) <= ms
    assert table[CONSTANT] >= 3 - 1


@pytest.mark.usefixtures("even")
def test_whole_calls_correct_a_table():
    """What the clock adds to an operation, or what nobody timed, is found from whole networks."""
    space = ChoiceSpace("waiting", waiting, shape=(4, 4))
    table = measure(space, (1, 4, 4), 3, Setup(repeats=5, calibration=6))
    for number in range(4):
        genotype = space.random(stream(number, "random"))
        whole = 3 + sum(float(name.split()[0]) for _, name in genotype.decisions if name != "skip")
        assert predict(space, genotype, table, (1, 4, 4)) >= 0.95 * whole


@pytest.mark.usefixtures("even")
def test_architectures_take_turns_and_keep_their_own_times(monkeypatch):
    space = ChoiceSpace("waiting", waiting, shape=(4, 4))
    slow, fast = (space.genotype({"a": a, "b": b}) for a, b in (("8 ms", "5 ms"), ("2 ms", "skip")))
    order, waited = [], Wait.forward
    monkeypatch.setattr(Wait, "forward", lambda self, x: (order.append(self.milliseconds), waited(self, x))[1])
    times = measured_all(space, [slow, fast], (1, 4, 4), 3, Setup(repeats=4))
    assert times[0] >= 16
    assert 5 <= times[1] < times[0]
    # a turn is five untimed calls and a timed one; the second round begins with the other network
    first = [place for place, ms in enumerate(order) if ms == 8]
    assert len(first) == 4 * 6
    assert first[:6] == [3 * i for i in range(6)]
    assert first[6] - first[5] == 3 + 2 * 12


def test_a_prediction_is_a_constant_and_the_sum_of_operations():
    genotype = CHAIN.genotype(dict.fromkeys(CHAIN.choices(), "k3_e2") | {"layer_1": "skip", "layer_5": "k5_e4"})
    table = {key: 10.0**number for number, key in enumerate(CHAIN.supernet(1, 3).operations(SHAPE))}
    keys = [key for key in operations_of(genotype.build(1, 3), SHAPE).values() if key is not None]
    assert len(keys) == 5
    assert predict(CHAIN, genotype, table | {CONSTANT: 0.5}, SHAPE) == 0.5 + sum(table[key] for key in keys)
    with pytest.raises(KeyError):
        predict(CHAIN, genotype, {CONSTANT: 0.0}, SHAPE)


def test_expected_latency_of_a_decided_supernet_is_the_prediction():
    supernet = CHAIN.supernet(1, 3)
    table = {key: 1.0 + number for number, key in enumerate(supernet.operations(SHAPE))} | {CONSTANT: 7.0}
    genotype = CHAIN.random(stream(1, "random"))
    for key, name in genotype.decisions:
        names = supernet.keyed_choices()[key].names
        supernet.arch[key].data = torch.where(torch.arange(len(names)) == names.index(name), 1e4, 0.0)
    supernet(torch.zeros(2, *SHAPE))
    whole = predict(CHAIN, genotype, table, SHAPE)
    assert ExpectedLatency(table)(supernet).item() == pytest.approx(whole)
    assert ExpectedLatency(table, unit=1e-3)(supernet).item() == pytest.approx(1e3 * whole)


def test_the_penalty_pushes_towards_what_is_fast():
    supernet = CHAIN.supernet(1, 3)
    slow = {key: 9.0 if key[0] == "k5_e4" else 1.0 for key in supernet.operations(SHAPE)} | {CONSTANT: 2.0}
    loss = TaskLoss() + CostPenalty("add_linear", ExpectedLatency(slow), ref=5.0)
    batch = torch.rand(4, *SHAPE), torch.tensor([0, 1, 2, 0])
    plain = torch.autograd.grad(TaskLoss()(supernet, batch, "alpha"), supernet.arch_parameters())
    priced = torch.autograd.grad(loss(supernet, batch, "alpha"), supernet.arch_parameters())
    for choice, before, after in zip(supernet.keyed_choices().values(), plain, priced, strict=True):
        change = after - before
        assert change.argmax() == choice.names.index("k5_e4")


@pytest.mark.parametrize("space", [CHAIN, CELLS], ids=lambda space: space.name)
def test_a_table_prices_everything_and_says_where_it_was_measured(space, tmp_path):
    table = measure(space, SHAPE, 3, Setup(repeats=2))
    assert set(table) == {*space.supernet(1, 3).operations(SHAPE), CONSTANT}
    assert all(ms > 0 for key, ms in table.items() if key != CONSTANT)
    assert (table.runtime, table.sparsity, table.threads, table.batch) == ("torch", 0.0, 1, 1)
    table.save(tmp_path / "table.json")
    assert SpaceLatencyTable.load(tmp_path / "table.json") == table
    assert dict(LatencyTable.load(tmp_path / "table.json")) == dict(table)
    assert (table.space, table.shape, table.num_classes, table.options) == (space.name, SHAPE, 3, {})
    genotype = space.random(stream(0, "random"))
    keys = operations_of(space.build(genotype, 1, 3), SHAPE).values()
    by_hand = table[CONSTANT] + sum(table[key] for key in keys if key is not None)
    assert table.of(genotype) == predict(space, genotype, table, SHAPE) == pytest.approx(by_hand)
    other = CELLS if space is CHAIN else CHAIN
    with pytest.raises(ValueError, match="space"):
        table.of(other.random(stream(0, "random")))
    assert measured(space, genotype, SHAPE, 3, Setup(repeats=2)) > 0


def test_a_table_that_does_not_say_of_what_it_is_is_refused(tmp_path):
    old = LatencyTable({CONSTANT: 1.0}, "a processor", 1, 1, "float32", "2.9")
    old.save(tmp_path / "old.json")
    with pytest.raises(UserError, match=r"does not say its space, shape, num_classes, options: an older version"):
        SpaceLatencyTable.load(tmp_path / "old.json")
    content = old.to_dict() | {"space": "micro-chain", "shape": [1, 8], "num_classes": 3, "options": {}}
    with pytest.raises(ValueError, match="not a latency table"):
        SpaceLatencyTable.from_dict(content)


def test_the_sparse_runtime_is_measured_in_the_same_way():
    tiny = ChoiceSpace("tiny", _tiny, shape=(8, 8))
    setup = Setup("native", sparsity=0.75, repeats=3, calibration=2)
    table = measure(tiny, SHAPE, 3, setup)
    assert len(table) == 3
    assert (table.runtime, table.sparsity) == ("native", 0.75)
    assert measured(tiny, tiny.random(stream(0, "random")), SHAPE, 3, setup) > 0


def _tiny(choose, in_channels, num_classes):
    sizes = {f"{k}x{k}": lambda k=k: nn.Conv2d(in_channels, 8, k, padding=k // 2) for k in (1, 3)}
    return nn.Sequential(
        choose("a", sizes), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
    )


def test_zeros_are_as_many_as_asked_and_not_in_depthwise_layers():
    genotype = CHAIN.genotype(dict.fromkeys(CHAIN.choices(), "k3_e4"))
    network = Setup(sparsity=0.75).network(CHAIN, genotype, SHAPE, 3)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            assert (module.weight != 0).all()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            assert (module.weight != 0).sum() == max(1, round(module.weight.numel() / 4))


def test_networks_that_are_measured_have_patterns_of_zeros_of_their_own(monkeypatch):
    seeds = []
    network = Setup.network
    monkeypatch.setattr(Setup, "network", lambda *args, seed: seeds.append(seed) or network(*args, seed=seed))
    measured_all(CHAIN, [CHAIN.random(stream(0, "random"))] * 3, SHAPE, 3, Setup(sparsity=0.5, repeats=1))
    assert len(set(seeds)) == 3


@pytest.mark.parametrize(("sparsity", "least"), [(0.0, 1), (0.9, latency.SPARSE_READINGS)])
@pytest.mark.parametrize("space", [CHAIN, CELLS], ids=lambda space: space.name)
def test_operations_are_read_in_several_patterns_of_zeros(space, sparsity, least):
    networks = latency._networks(space, SHAPE, 3, Setup(sparsity=sparsity))
    read = Counter(key for _, keys in networks for key in keys.values())
    assert min(read[key] for key in space.supernet(1, 3).operations(SHAPE)) >= least


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Setup("onnx"), "runtime must be 'torch' or 'native', got 'onnx'"),
        (lambda: Setup(sparsity=1.0), r"sparsity must lie in \[0, 1\), got 1.0"),
        (lambda: Setup(threads=0), "threads must be >= 1, got 0"),
        (lambda: Setup(repeats=0), "repeats must be >= 1, got 0"),
        (lambda: Setup(calibration=1), "calibration must be 0 or >= 2, got 1"),
        (lambda: ExpectedLatency({}, unit=0), "unit must be > 0, got 0"),
        (lambda: ExpectedLatency({"a": -1.0}), "got -1.0 for a"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_operation_that_no_network_holds_is_named(monkeypatch):
    monkeypatch.setattr(latency, "_covering", lambda space, times: iter([space.random(stream(0, "random"))]))
    with pytest.raises(ValueError, match="no network of 'micro-chain' held"):
        measure(CHAIN, SHAPE, 3, Setup(repeats=1))
