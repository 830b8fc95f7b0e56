import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from netwright import compress
from netwright.compress import METHODS, prune
from netwright.compress.exact import _shares, exact_masks
from netwright.nn.sparse import FixedMask, sparsify
from netwright.seeding import seeded, stream
from netwright.storage import read_tensors, write_tensors


def network(seed=0):
    with seeded(seed, "init"):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),  # 216
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),  # depthwise, 72
            nn.ReLU(),
            nn.Conv2d(8, 12, 1),  # 96
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 5),  # 60
        )


NAMES, SIZES = ["0", "3", "5", "8"], [216, 72, 96, 60]
TOTAL = sum(SIZES)


def kept(net):
    return {name: layer.kept for name, layer in prune.sparsity(net).layers.items()}


def train(net, optimiser, steps=6):
    for step in range(steps):
        x = torch.randn(8, 3, 6, 6, generator=stream(0, "x", step))
        y = torch.randint(5, (8,), generator=stream(0, "y", step))
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()


@pytest.mark.parametrize("scope", ["layer", "global", "lamp"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.77, 0.9, 0.95, 0.99])
def test_the_ratio_is_exact(scope, sparsity):
    net = prune.magnitude(network(), sparsity, scope)
    report = prune.sparsity(net)
    assert report.total == TOTAL
    assert report.kept == round((1 - sparsity) * TOTAL)
    assert min(kept(net).values()) >= 1
    if scope == "layer":
        for name, size in zip(NAMES, SIZES, strict=True):
            assert abs(kept(net)[name] - (1 - sparsity) * size) < 1 or kept(net)[name] == 1


def test_the_largest_weights_of_each_layer_are_kept_unchanged():
    net = network()
    before = copy.deepcopy(net)
    prune.magnitude(net, 0.75)
    for name in NAMES:
        weight, old = net.get_submodule(name).weight, before.get_submodule(name).weight
        alive = weight != 0
        assert torch.equal(weight[alive], old[alive])
        assert old[alive].abs().min() > old[~alive].abs().max()
        oracle = torch_prune.l1_unstructured(copy.deepcopy(before).get_submodule(name), "weight", 0.75)
        assert torch.equal(weight, oracle.weight)


def test_global_scope_keeps_the_largest_of_the_whole_network():
    net = network()
    sizes = torch.cat([net.get_submodule(n).weight.detach().abs().flatten() for n in NAMES])
    prune.magnitude(net, 0.8, "global", keep_at_least=0)
    now = torch.cat([net.get_submodule(n).weight.detach().abs().flatten() for n in NAMES])
    count = round(0.2 * TOTAL)
    assert torch.equal(now[now > 0].sort().values, sizes.topk(count).values.sort().values)


def test_global_scope_lets_no_layer_die_unless_told_so():
    def lopsided():
        net = network()
        net[0].weight.data *= 1e-3
        return net

    net = prune.magnitude(lopsided(), 0.9, "global")
    assert kept(net)["0"] == 1
    assert prune.sparsity(net).kept == round(0.1 * TOTAL)
    largest = lopsided()[0].weight.abs().flatten().argmax()
    assert net[0].weight.flatten()[largest] != 0
    net = prune.magnitude(lopsided(), 0.9, "global", keep_at_least=5)
    assert kept(net)["0"] == 5
    assert prune.sparsity(net).kept == round(0.1 * TOTAL)
    net = prune.magnitude(lopsided(), 0.9, "global", keep_at_least=0)
    assert kept(net)["0"] == 0
    assert prune.sparsity(net).layers["0"].dead_filters == 8


def test_skip_leaves_layers_dense_and_out_of_the_count():
    net = prune.magnitude(network(), 0.9, skip=["0", "3"])
    assert kept(net) == {"0": 216, "3": 72, "5": 10, "8": 6}
    assert prune.sparsity(net).sparsity == pytest.approx(1 - 304 / TOTAL)


@pytest.mark.parametrize("ties", [0.0, 1.0])
def test_equal_weights_are_chosen_exactly_too(ties):
    net = network()
    for name in NAMES:
        net.get_submodule(name).weight.data.fill_(ties)
    prune.magnitude(net, 0.9, "global")
    masks = [parametrize_mask(net.get_submodule(n)) for n in NAMES]
    assert sum(int(m.sum()) for m in masks) == round(0.1 * TOTAL)


def parametrize_mask(layer):
    return layer.parametrizations.weight[0].keep


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_zeros_survive_training_even_with_momentum_from_before(name):
    net = network()
    optimiser = OPTIMISERS[name](net.parameters())
    train(net, optimiser)  # momentum of the dense weights is not zero when they are pruned
    prune.magnitude(net, 0.9)
    zeros = {n: net.get_submodule(n).weight == 0 for n in NAMES}
    before = [net.get_submodule(n).weight.detach().clone() for n in NAMES]
    train(net, optimiser)
    for n, old in zip(NAMES, before, strict=True):
        weight = net.get_submodule(n).weight
        assert torch.equal(weight == 0, zeros[n])
        assert not torch.equal(weight, old)  # the same optimiser goes on training what is left


def test_masks_survive_copies_and_files(tmp_path):
    net = prune.magnitude(network(), 0.9, "global")
    x = torch.randn(2, 3, 6, 6, generator=stream(0, "x"))
    twin = copy.deepcopy(net)
    train(twin, torch.optim.SGD(twin.parameters(), 0.1))
    assert kept(twin) == kept(net)
    assert not torch.equal(twin[8].weight, net[8].weight)

    write_tensors(tmp_path / "net.safetensors", net.state_dict())
    fresh = prune.place_masks(network(1))
    assert prune.sparsity(fresh).sparsity == 0
    fresh.load_state_dict(read_tensors(tmp_path / "net.safetensors"))
    assert torch.equal(fresh.eval()(x), net.eval()(x))
    assert kept(fresh) == kept(net)

    torch.save(net.state_dict(), tmp_path / "net.pt")
    fresh = prune.place_masks(network(2))
    fresh.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.equal(fresh.eval()(x), net(x))


def test_remove_leaves_a_plain_network_with_the_same_output():
    net = prune.magnitude(network(), 0.9).eval()
    x = torch.randn(2, 3, 6, 6, generator=stream(0, "x"))
    expected, counts, parameters = net(x), kept(net), list(map(id, net.parameters()))
    assert prune.remove(net) is net
    assert torch.equal(net(x), expected)
    assert [type(m) for m in net] == [type(m) for m in network()]
    assert list(net.state_dict()) == list(network().state_dict())
    assert sorted(map(id, net.parameters())) == sorted(parameters)
    assert not any(isinstance(m, FixedMask) for m in net.modules())
    assert kept(net) == counts
    with pytest.raises(ValueError, match="module must hold a mask to remove, got Sequential without one"):
        prune.remove(net)


def test_hold_keeps_zeros_that_are_there():
    net = prune.remove(prune.magnitude(network(), 0.8))
    dense, counts = copy.deepcopy(net), kept(net)
    train(dense, torch.optim.SGD(dense.parameters(), 0.1))
    assert prune.sparsity(dense).sparsity < 0.4  # without it they fill
    prune.hold(net)
    train(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.01))
    assert kept(net) == counts


def test_update_prunes_what_is_left_and_zeros_stay():
    net = prune.magnitude(network(), 0.5)
    first = {n: net.get_submodule(n).weight != 0 for n in NAMES}
    for sparsity in (0.61, 0.7, 0.83, 0.95):
        prune.update(net, sparsity)
        assert prune.sparsity(net).kept == round((1 - sparsity) * TOTAL)
        for n in NAMES:
            assert not ((net.get_submodule(n).weight != 0) & ~first[n]).any()
    with pytest.raises(ValueError, match=r"sparsity must be >= 0\.95.*, which the module has already.*; got 0\.5"):
        prune.update(net, 0.5)


@pytest.mark.parametrize("scope", ["layer", "global", "lamp"])
def test_update_regrows_when_allowed(scope):
    def change(net):
        with torch.no_grad():  # what was largest becomes smallest
            for n in NAMES:
                weight = net.get_submodule(n).parametrizations.weight.original
                weight.copy_(1 / (weight + weight.sign() * 1e-3))

    net = prune.magnitude(network(), 0.5, scope)
    old = [parametrize_mask(net.get_submodule(n)).clone() for n in NAMES]
    stays = copy.deepcopy(net)
    change(net)
    change(stays)
    prune.update(net, 0.6, scope, regrow=True)
    prune.update(stays, 0.6, scope)
    new = [parametrize_mask(net.get_submodule(n)) for n in NAMES]
    assert any(bool((n > o).any()) for n, o in zip(new, old, strict=True))
    assert not any(bool((parametrize_mask(stays.get_submodule(n)) > o).any()) for n, o in zip(NAMES, old, strict=True))
    assert prune.sparsity(net).kept == prune.sparsity(stays).kept == round(0.4 * TOTAL)
    prune.update(net, 0.2, scope, regrow=True)
    assert prune.sparsity(net).kept == round(0.8 * TOTAL)


def test_update_by_layer_after_global_pruning_redistributes_what_a_layer_has_no_more():
    net = network()
    net[8].weight.data *= 1e-4
    prune.magnitude(net, 0.5, "global")
    assert kept(net)["8"] == 1
    prune.update(net, 0.6, "layer")
    assert kept(net)["8"] == 1
    assert prune.sparsity(net).kept == round(0.4 * TOTAL)


def test_update_is_only_for_masked_layers():
    net = prune.magnitude(network(), 0.5, skip=["0"])
    prune.update(net, 0.75)
    assert kept(net)["0"] == 216
    assert sum(list(kept(net).values())[1:]) == round(0.25 * (TOTAL - 216))
    with pytest.raises(ValueError, match="module must be pruned already, got Linear without a mask"):
        prune.update(nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(4, 6, 3), nn.Conv3d(2, 3, 3), nn.ConvTranspose2d(4, 6, 3), nn.Linear(7, 9), nn.Linear(7, 9).double()],
)
def test_any_kind_of_layer_even_alone(layer):
    n = layer.weight.numel()
    dtype = layer.weight.dtype
    prune.magnitude(layer, 0.7)
    assert int((layer.weight != 0).sum()) == round(0.3 * n)
    assert layer.weight.dtype == dtype


def test_torchvision_and_attention():
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    prune.magnitude(attention, 0.5)
    with torch.no_grad():
        assert attention(torch.randn(1, 3, 8)).isfinite().all()
    prune.remove(attention)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    prune.magnitude(normed, 0.5)
    expected = normed.weight.detach().clone()
    assert int((expected != 0).sum()) == 12
    assert torch.equal(prune.remove(normed).weight, expected)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_bounds(sparsity):
    for call in (lambda: prune.magnitude(network(), sparsity), lambda: compress.HydraPruner(sparsity)):
        with pytest.raises(ValueError, match=rf"sparsity must lie in \[0, 1\), got {sparsity}"):
            call()


def test_other_bad_arguments_leave_the_network_alone():
    net = network()
    for call, message in (
        (lambda: prune.magnitude(nn.ReLU(), 0.5), "module must hold a convolution or linear layer, got ReLU"),
        (lambda: prune.magnitude(net, 0.5, "channel"), "scope must be one of layer, global, lamp, got 'channel'"),
        (lambda: prune.magnitude(net, 0.5, skip=["head*"]), "skip must name .* got 'head\\*'; there are 0, 3, 5, 8"),
        (lambda: prune.magnitude(net, 0.5, skip=["*"]), "skip must leave a layer to prune"),
        (lambda: prune.magnitude(net, 0.5, skip="0"), "skip must be a sequence of patterns"),
        (lambda: prune.magnitude(net, 0.5, keep_at_least=-1), "keep_at_least must be >= 0, got -1"),
        (
            lambda: prune.magnitude(net, 0.995),
            r"sparsity must leave 1 or more weights in each of 4 layers: at most 0.990991, got 0.995",
        ),
        (lambda: prune.magnitude(net, 0.9, keep_at_least=20), "sparsity must leave 20 or more weights"),
        (lambda: prune.magnitude(sparsify(net, 0.5), 0.5), "module must hold no learned scores, got some in layer '0'"),
        (lambda: prune.remove(sparsify(net, 0.5)), "use nn.sparse.to_dense"),
        (lambda: prune.cubic_sparsity(0, 5, 5), "begin must be >= 0 and below end = 5, got 5"),
        (lambda: prune.cubic_sparsity(0, 0, 5, 0.5, 0.4), r"final must be >= initial = 0\.5, got 0\.4"),
        (lambda: prune.cubic_sparsity(0, 0, 5, 0.5, 1.0), r"final must lie in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not any(parametrize.is_parametrized(m) for m in net.modules())
    assert prune.sparsity(prune.magnitude(net, 0.995, keep_at_least=0)).kept == 2


def test_cubic_sparsity_is_the_papers_curve():
    steps = np.arange(100, 301)
    ours = [prune.cubic_sparsity(int(t), 100, 300, 0.2, 0.9) for t in steps]
    np.testing.assert_allclose(ours, 0.9 + (0.2 - 0.9) * (1 - (steps - 100) / 200) ** 3, atol=1e-12)
    assert prune.cubic_sparsity(0, 100, 300, 0.2, 0.9) == 0.2
    assert prune.cubic_sparsity(300, 100, 300, 0.2, 0.9) == prune.cubic_sparsity(10**9, 100, 300, 0.2, 0.9) == 0.9
    assert np.all(np.diff(ours) > 0)
    assert np.all(np.diff(ours, 2) < 0)


def test_dense_sparse_dense_frees_the_zeros_in_its_last_stage():
    net, seen = network(), []

    def loop(net, stage):
        train(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9))
        seen.append((stage, prune.sparsity(net).kept))

    assert prune.dense_sparse_dense(net, 0.5, loop) is net
    assert [stage for stage, _ in seen] == ["sparse", "dense"]
    assert seen[0][1] == TOTAL // 2
    assert seen[1][1] > 0.8 * TOTAL
    assert not any(parametrize.is_parametrized(m) for m in net.modules())


def test_report():
    report = prune.sparsity(prune.magnitude(network(), 0.9))
    assert report.to_dict()["layers"]["0"]["total"] == 216
    text = str(report)
    assert text.splitlines()[0].split() == ["layer", "kept", "of", "sparsity", "dead", "filters"]
    assert text.splitlines()[-1].split()[:3] == ["all", "44", "444"]
    heights = [bar.get_height() for bar in report.plot().patches]
    assert heights == [layer.kept / layer.total for layer in report.layers.values()]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_shares_fill_the_total_within_bounds_and_in_proportion(data):
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=8))
    most = [data.draw(st.integers(0, n)) for n in sizes]
    least = [data.draw(st.integers(0, m)) for m in most]
    total = data.draw(st.integers(sum(least), sum(most)))
    shares = _shares(total, sizes, least, most)
    assert sum(shares) == total
    assert all(lo <= s <= hi for lo, s, hi in zip(least, shares, most, strict=True))
    # nobody could give to another without leaving its bounds or making the ratios more unequal by over one weight
    for i, (a, n) in enumerate(zip(shares, sizes, strict=True)):
        for j, (b, m) in enumerate(zip(shares, sizes, strict=True)):
            if i != j and a > least[i] and b < most[j]:
                assert (a - 1) / n <= (b + 1) / m + 1e-12


def test_shares_round_to_the_nearest():
    assert _shares(10, [10, 10, 10], [0] * 3, [10] * 3) == [4, 3, 3]
    assert _shares(2, [1000, 1], [0, 1], [1000, 1]) == [1, 1]


def test_masks_of_a_large_network_are_exact_in_float32():
    layers = [nn.Linear(3000, 700, bias=False), nn.Linear(701, 13, bias=False)]
    n = 3000 * 700 + 701 * 13
    for scope in ("layer", "global", "lamp"):
        masks = exact_masks(layers, 0.987654, scope, 1)
        assert sum(int(m.sum()) for m in masks) == round((1 - 0.987654) * n)


def language():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.middle, self.out = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50)
            self.out.weight = self.embedding.weight

    return Language()


@pytest.mark.parametrize("scope", ["layer", "global", "lamp"])
def test_a_shared_weight_is_masked_for_all_who_use_it(scope):
    net = prune.magnitude(language(), 0.5, scope)
    weights = [net.embedding.weight, net.middle.weight]
    assert torch.equal(net.out.weight, weights[0])
    assert sum(int(w.count_nonzero()) for w in weights) == (800 + 256) // 2
    prune.update(net, 0.75, scope)
    assert sum(int(w.count_nonzero()) for w in (net.embedding.weight, net.middle.weight)) == (800 + 256) // 4
    expected = net.out.weight.detach().clone()
    plain = prune.remove(net)
    assert plain.embedding.weight is plain.out.weight
    assert torch.equal(plain.out.weight, expected)
    assert list(plain.state_dict()) == list(language().state_dict())


def test_who_shares_with_a_skipped_layer_is_left_alone():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    prune.magnitude(net, 0.5, skip=["2"])
    assert [int(layer.weight.count_nonzero()) for layer in net] == [64, 32, 64]


def test_methods_and_lazy_names():
    import importlib

    for name, where in METHODS.items():
        module, function = where.split(":")
        assert callable(getattr(importlib.import_module(module), function)), name
    for name in compress.__all__:
        assert getattr(compress, name) is not None
    assert prune.HydraPruner is compress.HydraPruner
    assert set(compress.__all__) < set(dir(compress))
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        compress.prnue  # noqa: B018
    assert math.isclose(compress.cubic_sparsity(1, 0, 2, 0, 0.8), 0.7)
