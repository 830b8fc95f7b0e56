"""LAMP: scores against a loop over the paper's formula, and what the paper says follows from it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netwright.compress import prune
from netwright.compress.exact import exact_masks, lamp_scores
from netwright.seeding import seeded, stream


def brute_force(weight):
    """score(u) = W_u^2 / sum_{v >= u} W_v^2 for every weight, in memory order, one at a time."""
    sizes = weight.detach().abs().double().flatten().tolist()
    scores = []
    for i, w in enumerate(sizes):
        tail = sum(v * v for j, v in enumerate(sizes) if v > w or (v == w and j >= i))
        scores.append(w * w / tail if tail else 0.0)
    return scores


def network(seed=0):
    with seeded(seed, "init"):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),  # 216
            nn.Conv2d(8, 8, 3, groups=8),  # depthwise, 72
            nn.Flatten(),
            nn.Linear(32, 10),  # 320
        )


NAMES, TOTAL = ["0", "1", "3"], 608


def masks(net):
    return [net.get_submodule(name).weight != 0 for name in NAMES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_are_the_papers(dtype):
    weight = torch.randn(7, 3, 3, generator=stream(0, "w")).to(dtype)
    assert lamp_scores(weight).tolist() == pytest.approx(sorted(brute_force(weight)), rel=1e-12)


def test_a_worked_example():
    # ascending 1, 2, 4: 1 / 21, 4 / 20, 16 / 16
    assert lamp_scores(torch.tensor([2.0, -4.0, 1.0])).tolist() == pytest.approx([1 / 21, 4 / 20, 1.0])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), st.floats(1e-6, 1e6))
def test_scores_rise_end_at_one_and_ignore_the_layers_scale(values, scale):
    weight = torch.tensor(values, dtype=torch.float64)
    scores = lamp_scores(weight)
    assert bool((scores.diff() >= 0).all())
    if bool((weight != 0).any()):
        assert float(scores[-1]) == 1.0
        assert bool((scores[:-1] <= 0.5 + 1e-12).all())
        assert lamp_scores(scale * weight).tolist() == pytest.approx(scores.tolist(), rel=1e-9)
    assert int((scores == 0).sum()) == values.count(0.0)


def test_squares_do_not_underflow():
    weight = torch.tensor([3e-30, 1e-30, 0.0, 2e-30])
    assert lamp_scores(weight).tolist() == pytest.approx([0.0, 1 / 14, 4 / 13, 1.0])
    extreme = lamp_scores(torch.tensor([1e-300, 1.0], dtype=torch.float64))
    assert 0 < extreme[0] < 1e-300


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77, 0.95, 0.99])
@pytest.mark.parametrize("keep_at_least", [0, 1, 2])
def test_one_threshold_for_all_layers(sparsity, keep_at_least):
    net = network()
    with torch.no_grad():
        net[1].weight.mul_(1e-3)  # global magnitude would empty it
    scores = torch.tensor([score for name in NAMES for score in brute_force(net.get_submodule(name).weight)])
    keep = round((1 - sparsity) * TOTAL)
    chosen = torch.zeros(TOTAL, dtype=torch.bool)
    chosen[scores.argsort(descending=True)[:keep]] = True
    prune.magnitude(net, sparsity, "lamp", keep_at_least=keep_at_least)
    assert torch.equal(torch.cat([mask.flatten() for mask in masks(net)]), chosen)
    assert prune.sparsity(net).kept == keep


def test_every_layer_keeps_its_largest_weight_down_to_one_each():
    net = network()
    largest = [int(net.get_submodule(name).weight.abs().argmax()) for name in NAMES]
    prune.magnitude(net, 1 - 3 / TOTAL, "lamp", keep_at_least=0)
    assert [mask.flatten().nonzero().flatten().tolist() for mask in masks(net)] == [[place] for place in largest]


@pytest.mark.parametrize("factors", [(1e-6, 1.0, 1.0), (1.0, 1e4, 1e-4)])
def test_the_masks_ignore_the_scale_of_a_layer(factors):
    net = network()
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        for name, factor in zip(NAMES, factors, strict=True):
            scaled.get_submodule(name).weight.mul_(factor)
    found = [masks(prune.magnitude(n, 0.9, "lamp")) for n in (net, scaled)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_keep_at_least_is_taken_from_the_other_layers():
    net = network()
    with torch.no_grad():  # one weight outshines its layer: all others of it have a score near 0
        net[1].weight.flatten()[5] = 1e3
    alone = prune.magnitude(copy.deepcopy(net), 0.9, "lamp")
    fed = prune.magnitude(net, 0.9, "lamp", keep_at_least=7)
    assert prune.sparsity(alone).layers["1"].kept == 1
    assert prune.sparsity(fed).layers["1"].kept == 7
    assert prune.sparsity(alone).kept == prune.sparsity(fed).kept == round(0.1 * TOTAL)


def test_pruning_further_measures_what_is_left():
    """Masked weights are nothing: neither chosen again nor counted in the sum of those that are larger."""
    net = prune.magnitude(network(), 0.5, "lamp")
    before = masks(net)
    with torch.no_grad():
        for name in NAMES:
            net.get_submodule(name).parametrizations.weight.original.add_(0.05)
    left = [net.get_submodule(name).weight.detach().clone() for name in NAMES]
    prune.update(net, 0.8, "lamp")
    after = masks(net)
    assert not any(bool((new & ~old).any()) for new, old in zip(after, before, strict=True))
    scores = torch.tensor([score for weight in left for score in brute_force(weight)])
    keep = round(0.2 * TOTAL)
    chosen = torch.cat([mask.flatten() for mask in after])
    assert scores[chosen].min() > scores[~chosen].max()
    assert int(chosen.sum()) == keep


def test_masks_take_the_type_of_their_weights_and_nan_is_refused():
    layers = [nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False).bfloat16()]
    assert [mask.dtype for mask in exact_masks(layers, 0.5, "lamp", 1)] == [torch.float32, torch.bfloat16]
    with torch.no_grad():
        layers[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="scores must be numbers, got NaN"):
        exact_masks(layers, 0.5, "lamp", 1)


def test_a_layer_of_zeros_keeps_what_it_must():
    net = network()
    with torch.no_grad():
        net[1].weight.zero_()
    found = exact_masks([net.get_submodule(name) for name in NAMES], 0.9, "lamp", 3)
    assert int(found[1].sum()) == 3
    assert sum(int(mask.sum()) for mask in found) == round(0.1 * TOTAL)
