"""The data, the network and pruning, against counts, closed forms, and networks with columns removed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from netwright.diagnose.grokking import (
    ModularArithmetic,
    PairBatches,
    QuadraticMLP,
    accuracies,
    memorising_neurons,
    neuron_ipr,
    one_hot_pairs,
    plot_pruning,
    prune_neurons,
    pruning_curve,
)
from netwright.seeding import stream


def everything(p=11, **options):
    return ModularArithmetic(p, split="all", **options)


@pytest.mark.parametrize("op", ["add", "mul"])
@pytest.mark.parametrize(("train_frac", "corruption"), [(0.5, 0.35), (0.7, 0.29), (0.1, 0.0)])
def test_counts_are_exact(op, train_frac, corruption):
    options = {"op": op, "train_frac": train_frac, "corruption": corruption, "seed": 3}
    train, test, both = (ModularArithmetic(23, split=split, **options) for split in ("train", "test", "all"))
    n_train = math.floor(train_frac * 529)
    changed = math.floor(corruption * n_train + 1e-9)
    assert (len(train), len(test)) == (n_train, 529 - n_train)
    assert int(train.is_corrupted.sum()) == changed
    assert torch.equal(train.targets != train.clean_targets, train.is_corrupted)
    m, n = test.pairs.unbind(1)
    assert torch.equal(test.targets, (m + n if op == "add" else m * n) % 23)
    assert not test.is_corrupted.any()
    # Together they are all pairs, once.
    assert torch.equal(both.pairs, torch.cat([train.pairs, test.pairs]))
    assert len(both.pairs.unique(dim=0)) == 529
    assert torch.equal(both.targets, torch.cat([train.targets, test.targets]))
    assert int(both.is_train.sum()) == n_train


def test_how_labels_are_replaced():
    wrong = ModularArithmetic(5, train_frac=0.9, corruption=0.9)
    shifts = (wrong.targets - wrong.clean_targets)[wrong.is_corrupted] % 5
    assert set(shifts.tolist()) == {1, 2, 3, 4}
    drawn = ModularArithmetic(61, train_frac=0.99, corruption=0.99, corrupt="uniform")
    kept = int((drawn.targets == drawn.clean_targets)[drawn.is_corrupted].sum())
    expected = int(drawn.is_corrupted.sum()) / 61
    assert abs(kept - expected) < 4 * expected**0.5


def test_the_seed_decides():
    one, same, other = (ModularArithmetic(11, corruption=0.3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.pairs, same.pairs)
    assert torch.equal(one.targets, same.targets)
    assert not torch.equal(one.pairs, other.pairs)
    x, y = ModularArithmetic(11, encoding="one-hot")[4]
    m, n = ModularArithmetic(11).pairs[4].tolist()
    assert (x.nonzero().flatten().tolist(), y) == ([m, 11 + n], (m + n) % 11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 2}, "p must be >= 3, got 2"),
        ({"p": 9, "op": "mul"}, "p must be a prime for products, got 9"),
        ({"train_frac": 0}, r"train_frac must lie in \(0, 1\), got 0"),
        ({"train_frac": 1.0}, r"train_frac must lie in \(0, 1\), got 1.0"),
        ({"train_frac": math.nan}, r"train_frac must lie in \(0, 1\), got nan"),
        ({"p": 3, "train_frac": 0.01}, "at least 1 pair on each side, got 0 of 9"),
        ({"corruption": 1}, r"corruption must lie in \[0, 1\), got 1"),
        ({"corruption": -0.1}, r"corruption must lie in \[0, 1\), got -0.1"),
        ({"op": "sub"}, "op must be one of add, mul, got 'sub'"),
        ({"corrupt": "x"}, "corrupt must be one of derangement, uniform, got 'x'"),
        ({"split": "validation"}, "split must be one of train, test, all, got 'validation'"),
        ({"encoding": "binary"}, "encoding must be one of index, one-hot, got 'binary'"),
    ],
)
def test_bad_data(options, message):
    with pytest.raises(ValueError, match=message):
        ModularArithmetic(**options)


def test_batches_are_every_pair_once_in_an_order_of_the_epoch():
    data = ModularArithmetic(7)
    (whole,) = PairBatches(data)
    assert torch.equal(whole[0], data.pairs)
    batches = PairBatches(data, 5, seed=1)
    seen = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        found = list(batches)
        assert [len(y) for _, y in found] == [5] * 4
        assert all(torch.equal(y, x.sum(1) % 7) for x, y in found)
        seen.append(torch.cat([x for x, _ in found]))
        assert len(seen[-1].unique(dim=0)) == 20
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    with pytest.raises(ValueError, match=r"batch_size must lie in 1..24, got 25"):
        PairBatches(data, 25)


@pytest.mark.parametrize("norm", [None, "bn", "ln"])
def test_look_up_and_product_agree(norm):
    net = QuadraticMLP(13, 40, norm=norm, generator=stream(0, "init")).eval()
    pairs = everything(13).pairs
    m, n = pairs.unbind(1)
    hidden = (net.U[:, m] + net.V[:, n]).square().T
    by_hand = net.norm(hidden) @ net.W.T
    for x in (pairs, one_hot_pairs(pairs, 13)):
        assert torch.allclose(net(x), by_hand, atol=1e-5)
    grads = []
    for x in (pairs, one_hot_pairs(pairs, 13)):
        net.zero_grad()
        net(x).square().sum().backward()
        grads.append(net.fc1.weight.grad.clone())
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)


def test_first_weights_dropout_and_place_of_the_norm():
    net = QuadraticMLP(97, 500, generator=stream(0, "init"))
    assert [name for name, _ in net.named_parameters()] == ["fc1.weight", "fc2.weight"]
    for weight in (net.fc1.weight, net.fc2.weight):
        assert float(weight.detach().std()) == pytest.approx(0.05, rel=0.02)
        assert abs(float(weight.detach().mean())) < 0.001
    # Dropout comes before the square: what is kept is doubled before it, so multiplied by 4 after.
    torch.manual_seed(0)
    net = QuadraticMLP(5, 1, dropout=0.5)
    x = torch.tensor([[1, 2]] * 64)
    ratios = (net(x) / net.eval()(x))[:, 0].tolist()
    assert {round(ratio, 4) for ratio in ratios} == {0.0, 4.0}
    # Batch norm comes after it: the second layer sees mean 0 and variance 1.
    net = QuadraticMLP(11, 8, norm="bn")
    seen = []
    net.fc2.register_forward_hook(lambda part, given, output: seen.append(given[0]))
    net(everything().pairs)
    assert torch.allclose(seen[0].mean(0), torch.zeros(8), atol=1e-5)
    assert torch.allclose(seen[0].var(0, unbiased=False), torch.ones(8), atol=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 2}, "p must be >= 3, got 2"),
        ({"p": 5, "width": 0}, "width must be >= 1, got 0"),
        ({"p": 5, "dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"p": 5, "norm": "gn"}, "norm must be one of bn, ln, got 'gn'"),
    ],
)
def test_bad_networks(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuadraticMLP(**arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 3, dtype=torch.long), r"x must have shape \(examples, 2\), got \(4, 3\)"),
        (torch.zeros(4, 2), r"x must have shape \(examples, 10\), got \(4, 2\)"),
        (torch.tensor([[0, 5]]), r"x must lie in 0..4, got 0..5"),
        (torch.tensor([[-1, 0]]), r"x must lie in 0..4, got -1..0"),
    ],
)
def test_bad_inputs(x, message):
    with pytest.raises(ValueError, match=message):
        QuadraticMLP(5, 3)(x)


@pytest.mark.parametrize("p", [23, 97])
def test_the_analytic_network_adds(p):
    net = QuadraticMLP.analytic(p, 500, stream(0, "phases"))
    data = everything(p)
    with torch.inference_mode():
        outputs = net(data.pairs)
    assert torch.equal(outputs.argmax(1), data.targets)
    right = outputs.gather(1, data.targets[:, None])
    assert float(right.mean()) == pytest.approx(1, abs=0.05)
    wrong = (outputs.sum() - right.sum()) / (len(data) * (p - 1))
    assert float(wrong) == pytest.approx(-1 / (p - 1), abs=0.01)
    assert torch.allclose(neuron_ipr(net), torch.ones(500), atol=1e-5)


def test_the_analytic_network_uses_frequencies_equally():
    net = QuadraticMLP.analytic(23, 30)
    peaks = torch.fft.rfft(net.U.detach()).abs().argmax(1)
    counts = peaks.bincount(minlength=12)
    assert int(counts[0]) == 0
    assert set(counts[1:].tolist()) == {2, 3}


def trained_like(norm=None, p=7, width=20):
    """Random weights, statistics and scales."""
    net = QuadraticMLP(p, width, norm=norm, generator=stream(1, "init")).double()
    generator = stream(1, "norm")
    if norm is not None:
        with torch.no_grad():
            net.norm.weight.copy_(torch.rand(width, generator=generator))
            net.norm.bias.copy_(torch.randn(width, generator=generator))
    if norm == "bn":
        net.train()
        net(everything(p).pairs)
    return net.eval()


@pytest.mark.parametrize("norm", [None, "bn"])
def test_pruned_is_a_network_without_these_columns(norm):
    net, gone = trained_like(norm), [3, 0, 17]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pruned = prune_neurons(net, gone)
    kept = [k for k in range(20) if k not in gone]
    smaller = QuadraticMLP(7, 17, norm=norm).double().eval()
    with torch.no_grad():
        smaller.fc1.weight.copy_(net.fc1.weight[kept])
        smaller.fc2.weight.copy_(net.fc2.weight[:, kept])
        for name, tensor in smaller.norm.state_dict().items():
            tensor.copy_(net.norm.state_dict()[name][kept] if tensor.ndim else tensor)
    pairs = everything(7).pairs
    assert torch.allclose(pruned(pairs), smaller(pairs), atol=1e-10)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    mask = torch.zeros(20, dtype=torch.bool)
    mask[gone] = True
    assert torch.equal(prune_neurons(net, mask)(pairs), pruned(pairs))
    assert neuron_ipr(pruned)[gone].tolist() == [0, 0, 0]


def test_biases_of_other_networks_are_pruned():
    net = nn.Sequential(nn.Linear(14, 6), nn.Sigmoid(), nn.Linear(6, 7)).double()
    x = one_hot_pairs(everything(7).pairs, 7).double()
    hidden = net[1](net[0](x))
    expected = hidden[:, 2:] @ net[2].weight[:, 2:].T + net[2].bias
    assert torch.allclose(prune_neurons(net, [0, 1])(x), expected)


@pytest.mark.parametrize(
    ("idx", "error", "message"),
    [
        ([20], ValueError, r"idx must lie in 0..19, got 20..20"),
        ([-1, 2], ValueError, r"idx must lie in 0..19, got -1..2"),
        (torch.ones(5, dtype=torch.bool), ValueError, "a mask of 20 neurons"),
        ([0.5], TypeError, "whole numbers or a mask"),
    ],
)
def test_bad_indices(idx, error, message):
    with pytest.raises(error, match=message):
        prune_neurons(trained_like(), idx)


@pytest.mark.parametrize("norm", [None, "bn", "ln"])
@pytest.mark.parametrize("order", ["low", "high", "random", "own"])
def test_the_curve_is_that_of_pruned_networks(norm, order, monkeypatch):
    monkeypatch.setattr("netwright.diagnose.grokking.pruning.CHUNK", 10)
    net, data = trained_like(norm), everything(7, corruption=0.3)
    ipr = neuron_ipr(net)
    going = {
        "low": ipr.argsort(),
        "high": ipr.argsort(descending=True),
        "random": torch.randperm(20, generator=stream(0, "order")),
        "own": torch.arange(20).flip(0),
    }[order]
    given_as = going if order == "own" else order
    counts = [5, 0, 20, 11, 11]
    curve = pruning_curve(net, data, given_as, counts, generator=stream(0, "order"))
    assert curve["count"].tolist() == counts
    for place, count in enumerate(counts):
        predicted = prune_neurons(net, going[:count])(data.pairs).argmax(1)
        for name, value in accuracies(predicted, data).items():
            assert float(curve[name][place]) == float(value), (count, name)
    assert net.training is False


def test_the_curve_of_another_network_with_biases():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(14, 12), nn.ReLU(), nn.Linear(12, 7))
    data = everything(7, encoding="one-hot")
    curve = pruning_curve(net, data, "high", range(13))
    going = neuron_ipr(net).argsort(descending=True)
    expected = [accuracies(prune_neurons(net, going[:c])(data.inputs).argmax(1), data)["train"] for c in range(13)]
    assert curve["train"].tolist() == [float(value) for value in expected]
    assert net.training


def test_groups_that_are_missing_are_nan():
    net = trained_like()
    curve = pruning_curve(net, ModularArithmetic(7, split="test"))
    assert len(curve["count"]) == 21
    assert curve["test"].isfinite().all()
    assert all(curve[name].isnan().all() for name in ("train", "corrupted", "corrupted_true", "uncorrupted"))
    axes = plot_pruning(curve)
    assert [line.get_label() for line in axes.lines] == ["test"]
    with pytest.raises(ValueError, match="predicted must be 25 classes"):
        accuracies(torch.zeros(7, dtype=torch.long), ModularArithmetic(7, split="test"))


@pytest.mark.parametrize(
    ("order", "counts", "message"),
    [
        ("lowest", None, "order must be a tensor or one of 'low', 'high', 'random', got 'lowest'"),
        (torch.zeros(20, dtype=torch.long), None, r"order must be a permutation of 0..19"),
        (torch.arange(19), None, r"order must be a permutation of 0..19, got shape \(19,\)"),
        ("low", [0, 21], r"counts must lie in 0..20, got \[0, 21\]"),
        ("low", [-1], r"counts must lie in 0..20"),
        ("low", [], r"counts must lie in 0..20, got \[\]"),
    ],
)
def test_bad_curves(order, counts, message):
    with pytest.raises(ValueError, match=message):
        pruning_curve(trained_like(), everything(7), order, counts)


def test_without_the_memorising_neurons_a_network_that_adds_is_right_again():
    """Waves that add, and for each wrong label a neuron of noise that shouts it."""
    p, waves = 23, 400
    data = everything(p, corruption=0.2)
    adding = QuadraticMLP.analytic(p, waves, stream(0, "phases"))
    wrong = data.is_corrupted.nonzero().flatten()[:40]
    net = QuadraticMLP(p, waves + len(wrong))
    with torch.no_grad():
        net.fc1.weight.zero_()
        net.fc2.weight.zero_()
        net.fc1.weight[:waves], net.fc2.weight[:, :waves] = adding.fc1.weight, adding.fc2.weight
        for k, example in enumerate(wrong.tolist(), start=waves):
            (m, n), label = data.pairs[example].tolist(), int(data.targets[example])
            net.fc1.weight[k, m], net.fc1.weight[k, p + n], net.fc2.weight[label, k] = 1, 1, 1
    found = memorising_neurons(net, data)
    assert sorted(found.memorising) == list(range(waves, waves + 40))
    assert found.before["corrupted"] >= 40 / int(data.is_corrupted.sum())
    assert found.without == {"train": pytest.approx(1 - int(data.is_corrupted.sum()) / int(data.is_train.sum())),
                             "test": 1, "corrupted": 0, "corrupted_true": 1, "uncorrupted": 1}  # fmt: skip
    assert f"phase: {found.phase}" in str(found)
