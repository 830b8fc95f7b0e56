"""The grid engine against the literal ladder walk and brute force; regions by counting."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn
from verified import captured, drawn, inputs_of, network, points_of

from netwright.nn.convnet import MLP
from netwright.verify import DLV, Network, Region, grid_search, ladder_search, verify_point
from netwright.verify.grid import other_class
from netwright.verify.region import axis_moves, diagonal_moves


def region_of(seed: int, size: int) -> Region:
    """A small random region."""
    dice = torch.Generator().manual_seed(seed)

    def whole(low, high):
        return int(torch.randint(low, high, (1,), generator=dice))

    count = whole(1, 4)
    dims = tuple(torch.randperm(size, generator=dice)[:count].tolist())
    spans = tuple((0.05 + torch.rand(count, generator=dice) * 0.3).tolist())
    steps = tuple(whole(1, 4) for _ in range(count))
    norm = [None, 1, 2, "inf"][whole(0, 4)]
    radius = None if norm is None else float(0.1 + torch.rand(1, generator=dice))
    return Region(dims, spans, steps, norm=norm, radius=radius, bounds=None if whole(0, 2) else (0.0, 1.0))


def brute(made, x, region, label):
    """Every point one by one, in float64: whether one has another class, and the distance of the nearest."""
    best = math.inf
    flat = x.double().flatten()
    for node in itertools.product(*(range(-m, m + 1) for m in region.steps)):
        moved = torch.tensor([j * s for j, s in zip(node, region.span, strict=True)], dtype=torch.float64)
        point = flat.clone()
        for p, change in zip(region.dims, moved.tolist(), strict=True):
            point[p] += change
        order = {1: 1, 2: 2, "inf": torch.inf, None: 2}[region.norm]
        length = float(torch.linalg.vector_norm(moved, ord=order))
        if region.radius is not None and length > region.radius + 1e-9:
            continue
        if region.bounds is not None and not bool(((point >= -1e-9) & (point <= 1 + 1e-9)).all()):
            continue
        if int(made.double(point.reshape(1, *made.shape)).argmax()) != label:
            best = min(best, length)
    return best


@pytest.mark.parametrize("name", ["perceptron", "convolutional", "branches"])
def test_grid_ladder_and_brute_force_agree(name):
    made = network(name)
    seen = set()
    for seed, x in enumerate(inputs_of(made, 12)):
        label = int(made.logits(x[None]).argmax())
        region = region_of(seed, x.numel())
        nearest = brute(made, x, region, label)
        for prune in (True, False):
            found = grid_search(made, x, region, prune=prune)
            assert (found.witness is not None) == math.isfinite(nearest)
            if found.witness is not None:
                assert found.distance == pytest.approx(nearest, abs=1e-9)
                assert bool(other_class(made.logits(found.witness[None]), label)[0])
        start = (0,) * len(region.dims)

        def inside(node, region=region, x=x):
            return bool(region.kept(torch.tensor([node]), x.flatten())[0])

        steps = region.grid()
        kept = {tuple(node) for node in steps[region.kept(steps, x.flatten())].tolist()}
        for moves in (axis_moves, diagonal_moves):
            walked = dict(ladder_search(lambda node: node, start, moves(len(start)), inside))
            assert set(walked) == kept
        seen.add(math.isfinite(nearest))
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["perceptron", "convolutional", "adaptive"])
def test_a_larger_region_is_not_safer(name):
    """More steps and a larger radius only add points: what was unsafe stays so, at no larger a distance."""
    made = network(name)
    seen = set()
    for seed, x in enumerate(inputs_of(made, 16)):
        region = region_of(seed, x.numel())
        more = {"steps": tuple(m + 1 + seed % 2 for m in region.steps)}
        more |= {} if region.radius is None else {"radius": 1.5 * region.radius}
        found = grid_search(made, x, region)
        for change in [more, *({name: value} for name, value in more.items())]:
            larger = grid_search(made, x, dataclasses.replace(region, **change))
            seen.add((found.witness is not None, larger.witness is not None))
            if found.distance is not None:
                assert larger.distance is not None
                assert larger.distance <= found.distance + 1e-9
    assert {(False, False), (True, True)} <= seen


@pytest.mark.parametrize("name", ["perceptron", "convolutional"])
def test_batches_order_and_dimensions_change_no_verdict(name):
    made = network(name)
    x = torch.full(made.shape, 0.5, dtype=torch.float64)
    region = Region(dims=(0, 3, 5, 1), span=(0.3, 0.2, 0.25, 0.4), steps=(2, 3, 1, 2))
    turned = Region(dims=(5, 0, 1, 3), span=(0.25, 0.3, 0.4, 0.2), steps=(1, 2, 2, 3))
    first = grid_search(made, x, region)
    for batch, other, tail in ((1, region, made), (7, turned, made), (64, region, made.logits)):
        found = grid_search(tail, x, other, batch)
        assert (found.witness is None) == (first.witness is None)
        if first.witness is not None:
            assert found.distance == pytest.approx(first.distance, abs=1e-9)
    found = grid_search(made, x, region, order="natural")
    assert (found.witness is None) == (first.witness is None)


@pytest.mark.parametrize("name", ["perceptron", "convolutional", "branches"])
def test_pruning_decides_most_points(name):
    made = network(name)
    x = torch.full(made.shape, 0.5, dtype=torch.float64)
    region = Region(dims=(0, 1, 2, 3), span=1e-3, steps=4)
    found = grid_search(made, x, region)
    assert (found.witness, found.n_points, found.n_pruned, found.whole_box) == (None, 0, 9**4, True)
    assert verify_point(made, x, region).scope == "box"
    label = int(made.logits(x[None]).argmax())
    for points in points_of(*region.box(x), 100_000).split(20_000):
        assert not bool(other_class(made.logits(points), label).any())
    plain = grid_search(made, x, region, prune=False)
    assert (plain.witness, plain.n_points, plain.whole_box) == (None, 9**4, False)


def test_pruned_parts_and_evaluated_ones_make_the_whole():
    made = captured(2, 6, 24, 12, 3)
    for x in inputs_of(made, 6):
        region = Region(dims=(0, 1, 2, 3, 4), span=0.04, steps=3)
        found, plain = (grid_search(made, x, region, prune=prune) for prune in (True, False))
        assert (found.witness is None) == (plain.witness is None)
        if plain.witness is None:
            assert found.n_points + found.n_pruned == 7**5
        else:
            assert found.distance == pytest.approx(plain.distance)


def test_rounding_is_that_of_the_worst_number_that_a_maximum_is_taken_of():
    """(2^20 + 1) a - 2^20 a is off by up to 1/16 in float32 beside a number that is not: the network decides."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False), nn.Hardtanh(0.0, 1.0),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(1, 2),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0**20 + 1, 2.0**20]).reshape(2, 1, 1, 1))
        model[2].weight.copy_(torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1))
        model[6].weight.copy_(torch.tensor([[0.0], [1.0]]))
        model[6].bias.copy_(torch.tensor([0.51, 0.0]))
    made, x = Network(model, (1, 1, 2)), torch.tensor([0.4, 0.0], dtype=torch.float64)
    for step in range(20):
        span = 0.1005 + 0.001 * step
        found = grid_search(made, x, Region((0,), span))
        assert (found.witness is not None) == (0.4 + span > 0.51)


def test_points_are_counted():
    assert Region((0, 1, 2), 0.1, (1, 2, 3)).count == 3 * 5 * 7
    x = torch.tensor([0.5, 0.9], dtype=torch.float64)
    for r in (1, 2, 3, 4):
        region = Region((0, 1), 0.1, r, norm=1, radius=r * 0.1)
        assert int(region.kept(region.grid(), x).sum()) == 2 * r * r + 2 * r + 1
    # Of 0.9 only one step up stays within the bounds.
    region = Region((1,), 0.1, 3, bounds=(0.0, 1.0))
    assert int(region.kept(region.grid(), x).sum()) == 5
    low, high = region.box(x)
    assert (low.tolist(), high.tolist()) == ([0.5, pytest.approx(0.6)], [0.5, 1.0])
    assert len(list(axis_moves(4))) == 8
    assert len(list(diagonal_moves(4))) == 3**4 - 1


def test_a_boundary_by_hand():
    x = torch.tensor([0.8])

    def tail(x):
        return torch.cat([x, 1 - x], dim=1)

    assert grid_search(tail, x, Region(dims=(0,), span=0.2)).witness is None
    found = grid_search(tail, x, Region(dims=(0,), span=0.2, steps=2))
    assert found.distance == pytest.approx(0.4)
    assert float(found.witness) == pytest.approx(0.4)


def test_of_equal_logits_the_first_wins():
    tie = torch.tensor([[1.0, 1.0, 0.0]])
    assert [bool(other_class(tie, label)[0]) for label in range(3)] == [False, True, True]


def test_the_published_networks():
    mnist = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * 12 * 12, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    cifar = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * 6 * 6, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip
    assert [sum(p.numel() for p in m.parameters()) for m in (mnist, cifar)] == [600_810, 1_250_858]
    sizes = [layer.size for layer in Network(mnist, (1, 28, 28)).layers]
    assert sizes == [784, 32 * 26 * 26, 32 * 24 * 24, 32 * 12 * 12, 128, 10]


def test_unknown_layers_have_a_grid_at_the_input():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 2)

        def forward(self, x):
            return self.last(torch.nn.functional.softplus(x))

    model = drawn(1, Odd)
    x = torch.full((3,), 0.5)
    region = Region(dims=(0, 1), span=0.5, steps=2)
    made = Network(model, (3,))
    assert "softplus" in made.refused
    expected = brute(made, x, region, int(model(x[None]).argmax()))
    found = verify_point(made, x, region)
    assert found.scope == "grid"
    assert (found.status == "unsafe") == math.isfinite(expected)
    with pytest.raises(TypeError, match="softplus"):
        verify_point(made, x, region, "smt")
    with pytest.raises(ValueError, match=r"layer must lie in 0\.\.0, got 1"):
        DLV(made, 1).verify(x)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dims": ()}, "dims must name at least 1 number"),
        ({"dims": (0, 0)}, "different numbers"),
        ({"dims": (-1,)}, "different numbers >= 0"),
        ({"span": 0.0}, "span must be > 0 and finite, got 0"),
        ({"span": -0.1}, "span must be > 0"),
        ({"span": math.nan}, "span must be > 0 and finite, got nan"),
        ({"span": (0.1, 0.2)}, "span must be 1 number or 1, as dims are, got 2"),
        ({"steps": 0}, "steps must be >= 1 and finite, got 0"),
        ({"steps": 1.5}, "steps must be whole numbers, got 1.5"),
        ({"layer": -1}, "layer must be >= 0"),
        ({"norm": 3, "radius": 1.0}, "norm must be None, 1, 2"),
        ({"norm": 1}, "norm and radius must be given together"),
        ({"norm": 1, "radius": 0.0}, "radius must be > 0"),
        ({"bounds": (1.0, 0.0)}, "low < high"),
    ],
)
def test_bad_regions(change, told):
    with pytest.raises(ValueError, match=told):
        Region(**{"dims": (0,), "span": 0.1, **change})


@pytest.mark.parametrize(
    ("x", "region", "more", "told"),
    [
        ([0.5, 0.5], Region((2,), 0.1), {}, r"dims must lie in 0\.\.1, got 2"),
        ([0.5, math.nan], Region((0,), 0.1), {}, "x must be finite"),
        (
            [0.5, 1.5],
            Region((0,), 0.1, bounds=(0.0, 1.0)),
            {},
            r"x must lie within bounds \(0.0, 1.0\), got 0.5\.\.1.5",
        ),
        ([0.5, 0.5], Region((0, 1), 0.1, 4), {"max_points": 80}, r"points must be <= 80 \(max_points\), got 81"),
        ([0.5, 0.5], Region((0,), 0.1), {"timeout": 0.0}, "timeout must be > 0"),
        ([0.5, 0.5], Region((0,), 0.1), {"engine": "z3"}, "engine must be one of"),
        ([0.5, 0.5], Region((0,), 0.1), {"label": 7}, r"label must lie in 0\.\.1, got 7"),
        ([0.5, 0.5], Region((0,), 0.1, norm=1, radius=1.0), {"engine": "smt"}, "an exact engine takes boxes"),
        ([0.5, 0.5], Region((0,), 0.1, layer=3), {}, r"layer must lie in 0\.\.1, got 3"),
    ],
)
def test_bad_input(x, region, more, told):
    with pytest.raises(ValueError, match=told):
        verify_point(captured(0, 2, 2), torch.tensor(x), region, **more)


def test_a_grid_of_more_points_than_python_prints_is_refused():
    with pytest.raises(
        ValueError, match=r"points must be <= 10000000 .max_points., got 1.63e.4771: fewer dims or steps"
    ):
        grid_search(lambda x: x[:, :2], torch.zeros(5000), Region(tuple(range(5000)), 0.1, 4))


def test_a_time_limit_ends_a_grid():
    made = Network(drawn(0, lambda: MLP(20, [64, 64, 5])), (20,))
    x = torch.full((20,), 0.5)
    slow = grid_search(lambda a: made.logits(a), x, Region((0, 1, 2), 1e-9, 5), batch=1, timeout=0.05, prune=False)
    assert not slow.finished
    assert 0 < slow.n_points < 11**3
