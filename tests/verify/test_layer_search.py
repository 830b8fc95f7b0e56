"""Regions mapped from layer to layer, activations taken back, and the search of the paper."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from verified import captured, inputs_of, network, points_of

from netwright.verify import DLV, Network, Region, back_map, condense, map_region, stretch, verify_point
from netwright.verify.grid import other_class
from netwright.verify.layerwise import ranking


def test_spans_and_steps_behind_an_affine_layer():
    weight = torch.tensor([[2.0, -1.0]])
    assert [part.tolist() for part in condense(weight, (1, 1), (1, 1))] == [[1.0], [3.0]]
    assert stretch(weight, (1, 1), (1, 1), torch.tensor([1.0])).tolist() == [3.0]
    assert stretch(weight, (0.5, 1), (2, 3), torch.tensor([2.0])).tolist() == [3.0]  # (2 + 3) / 2
    still = condense(torch.zeros(1, 2), (1, 1), (1, 1))
    assert [part.tolist() for part in still] == [[0.0], [0.0]]
    with pytest.raises(ValueError, match="at most 12 columns, got 13"):
        condense(torch.zeros(1, 13), (1,) * 13, (1,) * 13)


def test_stretch_covers_exactly_what_is_reached():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    span, steps = (0.1, 0.3, 0.2), (2, 1, 3)
    new, most = condense(weight, span, steps)
    reach = torch.tensor([s * m for s, m in zip(span, steps, strict=True)], dtype=torch.float64)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3) * reach
    furthest = (corners @ weight.T).abs().amax(0)
    assert bool((new * most >= furthest - 1e-9).all())
    assert bool((new * (most - 1) < furthest).all())


@pytest.mark.parametrize("name", ["perceptron", "convolutional"])
@pytest.mark.parametrize("selector", ["activation", "gradient", "random"])
def test_a_mapped_region_covers_what_it_says(name, selector):
    made = network(name)
    x = torch.full(made.shape, 0.5, dtype=torch.float64).flatten()
    region = Region(dims=(0, 2, 3), span=0.2, steps=2)
    everything = map_region(made, x, region, 10_000, selector, 0, max_steps=3)
    assert everything.region.layer == 1
    low, high = everything.region.box(made.activation(x, 1))
    seen = made.forward(points_of(*region.box(x), 2000), 0, 1)
    steps = region.grid()
    grid = made.forward(region.points(steps, x), 0, 1)
    assert bool(((grid >= low - 1e-6) & (grid <= high + 1e-6)).all())
    if everything.covers:
        assert bool(((seen >= low - 1e-6) & (seen <= high + 1e-6)).all())
    few = map_region(made, x, region, 2, selector, 0)
    assert len(few.region.dims) == 2
    assert not few.covers
    assert max(few.region.steps) <= 2


def test_points_are_mapped_in_batches_until_the_time_is_over(monkeypatch):
    made = network("perceptron")  # whose first layer has 10 numbers
    x = torch.full(made.shape, 0.5, dtype=torch.float64).flatten()
    region = Region(tuple(range(6)), span=0.01, steps=2)
    whole = map_region(made, x, region, 4, "activation", 0)
    monkeypatch.setattr("netwright.verify.layerwise.AT_ONCE", 200)
    forward, seen = Network.forward, []
    monkeypatch.setattr(Network, "forward", lambda self, x, *a, **k: seen.append(len(x)) or forward(self, x, *a, **k))
    parts = map_region(made, x, region, 4, "activation", 0)
    assert max(seen) == 20
    assert sum(seen) >= 3**6 + 5**6
    assert (parts.region.dims, parts.region.steps, parts.covers) == (
        whole.region.dims,
        whole.region.steps,
        whole.covers,
    )
    assert parts.region.span == pytest.approx(whole.region.span)
    monkeypatch.setattr(Network, "forward", lambda *a, **k: time.sleep(0.1) or forward(*a, **k))
    begin = time.monotonic()
    found = DLV(made, 0, 1, n_dims=6, span=0.001, timeout=0.5).verify(x)
    assert time.monotonic() - begin < 4  # all 74 batches take 7 s
    assert (found.status, found.reason, found.covers_input) == ("unknown", "the time was over", False)
    assert found.stats["layers"][0]["layer"] == 0


def test_a_span_is_the_smallest_change_of_a_move():
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, -1.0]]))
        model[0].bias.fill_(10.0)
    made = Network(model, (2,))
    found = map_region(made, torch.zeros(2), Region((0, 1), 1.0), 1, "activation", 0, max_steps=5)
    assert (found.region.span, found.region.steps, found.covers) == ((1.0,), (3,), True)
    coarse = map_region(made, torch.zeros(2), Region((0, 1), 1.0), 1, "activation", 0, max_steps=2)
    assert (coarse.region.span, coarse.region.steps) == ((1.5,), (2,))
    # m = ceil(reach / span) without a limit, also where the moves of one number are much smaller than the reach.
    model[0].weight.data.copy_(torch.tensor([[2.0, -0.1]]))
    fine = map_region(Network(model, (2,)), torch.zeros(2), Region((0, 1), 1.0), 1, "activation", 0, max_steps=None)
    assert (fine.region.span, fine.region.steps) == ((pytest.approx(0.1),), (21,))


def test_which_numbers_come_first():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 3.0, 0.0, -1.0], [0.0, 0.0, 2.0, 0.0]]))
        model.bias.zero_()
    made = Network(model, (4,))
    alpha = torch.tensor([0.1, 0.9, 0.2, 0.0], dtype=torch.float64)
    assert ranking(made, alpha, 0, "gradient", 0)[:3] == [1, 2, 3]
    assert ranking(made, alpha, 0, "activation", 0)[0] == 1
    assert sorted(ranking(made, alpha, 0, "random", 0)) == [0, 1, 2, 3]
    assert ranking(made, alpha, 0, "random", 0, 1) == ranking(made, alpha, 0, "random", 0, 1)
    with pytest.raises(ValueError, match="did you mean gradient"):
        ranking(made, alpha, 0, "gradent", 0)


@pytest.mark.parametrize(("name", "layer"), [("perceptron", 1), ("perceptron", 2), ("convolutional", 2), ("leaky", 1)])
def test_an_activation_is_taken_back(name, layer):
    made = network(name)
    shape = made.shape
    x = torch.full(shape, 0.5, dtype=torch.float64)
    region = Region(tuple(range(x.numel())), span=0.3)
    for seed in range(2):
        y = points_of(*(bound.reshape(shape) for bound in region.box(x)), 2, seed)[1]
        target = made.activation(y, layer)
        found = back_map(made, layer, target, x, region, tol=1e-4, timeout=20.0)
        assert found.status == "found"
        reached = made.activation(found.point.reshape(shape), layer)
        assert float((reached - target).abs().max()) <= 1e-4 * 1.001
        assert float((found.point - x.flatten()).abs().max()) <= 0.3 + 1e-9
        assert found.distance == pytest.approx(float((found.point - x.flatten()).abs().sum()))
        if name != "convolutional":  # where max pooling makes many pieces, another one may be nearer
            assert found.distance <= float((y - x).abs().sum()) * 1.01


def test_what_no_input_leads_to():
    made = network("perceptron")
    x = torch.full(made.shape, 0.5, dtype=torch.float64)
    region = Region(tuple(range(6)), span=0.1)
    target = made.activation(x, 1) - 1.0  # no ReLU is below 0
    assert back_map(made, 1, target, x, region).status == "unreachable"
    with pytest.raises(ValueError, match=r"layer must lie in 1\.\.3, got 0"):
        back_map(made, 0, target, x, region)
    with pytest.raises(ValueError, match="tol must be > 0"):
        back_map(made, 1, target, x, region, tol=0.0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"target": torch.zeros(2)}, r"target must hold 10 numbers, as layer 1 does, got shape \(2,\)"),
        ({"target": torch.zeros(2, 5)}, r"got shape \(2, 5\)"),
        ({"target": torch.full((10,), torch.nan)}, "target must be finite"),
        ({"dims": (0, 10)}, r"dims must lie in 0\.\.9, got \[0, 10\]"),
        ({"dims": (-1,)}, r"dims must lie in 0\.\.9, got \[-1\]"),
        ({"region": Region((6,), 0.1)}, r"dims must lie in 0\.\.5, got 6"),
        ({"x": torch.full((6,), 2.0)}, r"x must lie within bounds \(0.0, 1.0\), got 2\.\.2"),
        ({"x": torch.full((6,), torch.inf)}, "x must be finite"),
    ],
)
def test_bad_targets(change, told):
    given = {"target": torch.zeros(10), "x": torch.full((6,), 0.5), "region": Region((0,), 0.1, bounds=(0.0, 1.0))}
    with pytest.raises(ValueError, match=told):
        back_map(network("perceptron"), 1, **given | change)


def test_inputs_of_hidden_regions_lie_within_their_bounds():
    made, x = network("perceptron"), torch.full((6,), 1.5)
    told = r"x must lie within bounds \(0.0, 1.0\), got 1.5\.\.1.5"
    for engine in ("grid", "layerwise", "bounds"):
        with pytest.raises(ValueError, match=told):
            verify_point(made, x, Region((0,), 1e-6, layer=1), engine)
        assert verify_point(made, x, Region((0,), 1e-6, layer=1), engine, inputs=None).layer == 1
    for mode in ("exhaustive", "blocks", "features"):
        with pytest.raises(ValueError, match=told):
            DLV(made, 1, mode=mode).verify(x)
    assert DLV(made, 1, span=1e-6, bounds=None).verify(x).layer == 1


def test_the_search_at_the_input_is_the_grid():
    made = captured(1, 6, 12, 8, 3)
    seen = set()
    for x, span in zip(inputs_of(made, 10), 5 * (0.3, 0.01), strict=True):
        dims = tuple(ranking(made, x.double(), 0, "gradient", int(made.logits(x[None]).argmax()))[:3])
        grid = verify_point(made, x, Region(dims, span, 2, bounds=(0.0, 1.0)))
        found = DLV(made, n_dims=3, selector="gradient", span=span, steps=2).verify(x)
        assert found.status == grid.status
        assert found.covers_input
        seen.add(found.status)
    assert seen == {"safe", "unsafe"}


def test_the_search_goes_deeper():
    """Counterexamples of deeper layers count only with an input that the network itself gets wrong."""
    made = captured(3, 6, 12, 8, 3)
    seen = set()
    for x in inputs_of(made, 4):
        label = int(made.logits(x[None]).argmax())
        for start, end in ((0, 2), (1, 1), (1, 2)):
            found = DLV(made, start, end, n_dims=3, span=0.1 if start == 0 else None, timeout=1.0).verify(x)
            lines = found.stats["layers"]
            assert [line["layer"] for line in lines] == list(range(start, start + len(lines)))
            if found.status == "unsafe":
                assert bool(other_class(made.logits(found.witness[None]), label)[0])
                assert bool(((found.witness >= 0) & (found.witness <= 1)).all())
                assert found.layer == start
            elif found.status == "safe":
                assert (found.layer, found.covers_input) == (start, start == 0)
            seen.add((start, found.status))
    assert {(0, "safe"), (1, "unknown")} <= seen


@pytest.mark.parametrize("seed", [3, 5])
def test_a_witness_found_deeper_lies_in_the_region_of_inputs(seed):
    """The search never calls unsafe what the exact engine proves safe."""
    made = captured(seed, 6, 12, 8, 3)
    for x in inputs_of(made, 4):
        label = int(made.logits(x[None]).argmax())
        dims = tuple(ranking(made, x, 0, "activation", label)[:3])
        for span in (0.05, 0.2):
            region = Region(dims, span, bounds=(0.0, 1.0))
            found = DLV(made, 0, 1, n_dims=3, span=span, timeout=0.5).verify(x)
            if found.status == "unsafe":
                assert region.holds(found.witness, x.flatten())
                assert bool(other_class(made.logits(found.witness[None]), label)[0])
                assert verify_point(made, x, region, "smt").status == "unsafe"


def test_a_counterexample_between_the_points_is_found_deeper():
    """The tent: a point of [0, 1] between those of the grid, which only layer 1 sees."""
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.copy_(torch.tensor([-0.4, -0.5, -0.6]))
        model[2].weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [2.0, -4.0, 2.0]]))
        model[2].bias.copy_(torch.tensor([0.1, 0.0]))
    x = torch.zeros(1)
    region = Region((0,), 1.0, bounds=(0.0, 1.0))
    assert verify_point(model, x, region).status == "safe"
    found = DLV(model, 0, 1, n_dims=1, span=1.0, refine=6, max_steps=4).verify(x, 0)
    assert found.status == "unsafe"
    assert found.reason == "found at layer 1"
    assert (found.layer, found.covers_input) == (0, True)
    assert 0.45 - 1e-5 <= float(found.witness) <= 0.55 + 1e-5


# Corners, which a solver and the greedy search like, are seldom reached with several numbers.
@pytest.mark.parametrize(("engine", "count"), [("grid", 3), ("smt", 1), ("layerwise", 1), ("search", 3)])
def test_a_witness_of_a_hidden_region_leads_into_it(engine, count):
    """All numbers of the layer count, not only those that vary."""
    networks = [captured(seed, 10, 4, 4, 3) for seed in range(3)]
    unsafe = 0
    for made, x in [(each, x) for each in networks for x in inputs_of(each, 4)]:
        alpha = made.activation(x, 1)
        region = Region(tuple(alpha.argsort(descending=True)[:count].tolist()), 0.4, 1, layer=1)
        if engine == "search":
            found = DLV(made, 1, 2, n_dims=3, selector=region.dims, span=0.4, timeout=0.5).verify(x)
        else:
            found = verify_point(made, x, region, engine, timeout=0.5)
        if found.status != "unsafe":
            continue
        reached = made.activation(found.witness, 1)
        assert region.holds(reached, alpha, slack=1e-5)
        assert bool(((found.witness >= 0) & (found.witness <= 1)).all())
        assert bool(other_class(made.logits(found.witness[None]), found.label)[0])
        assert not found.covers_input
        unsafe += 1
        if unsafe == 3:
            break
    assert unsafe


@pytest.mark.parametrize(
    "more",
    [{"span": (0.2, 0.001, 0.001)}, {"norm": 1, "radius": 0.2}, {"norm": 2, "radius": 0.2}, {"bounds": (0.4, 0.6)}],
)
def test_the_greedy_search_keeps_to_the_region(more):
    """A sum of 1.5 must fall to 1.2: three changes of 0.2 do that, and none of these regions has them but one."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1, 1], [0, 0, 0]]))
        model.bias.copy_(torch.tensor([-1.2, 0.0]))
    x = torch.full((3,), 0.5)
    region = Region((0, 1, 2), **{"span": 0.2} | more)
    found = verify_point(model, x, region, "layerwise")
    if more.get("norm") == 2:  # 3 x 0.2 / sqrt(3) = 0.346 does
        assert found.status == "unsafe"
        assert region.holds(found.witness, x)
    elif "bounds" in more:  # 3 x 0.1 is a tie
        assert found.status == "unknown" or region.holds(found.witness, x)
    else:
        assert found.status == "unknown"
    free = verify_point(model, x, Region((0, 1, 2), 0.2), "layerwise")
    assert free.status == "unsafe"
    assert free.distance == pytest.approx(0.2 * 3**0.5)


@pytest.mark.parametrize(("norm", "expected"), [(1, 0.6), (2, 0.2 * 3**0.5), ("inf", 0.2), (None, 0.2 * 3**0.5)])
def test_distances_are_in_the_norm_of_the_region(norm, expected):
    """A sum of 1.5 must fall to 1.0, for which every number changes by 0.2; also where the sum is a hidden number."""
    deep = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        deep[0].weight.copy_(torch.eye(3))
        deep[0].bias.zero_()
        deep[2].weight.copy_(torch.tensor([[1.0, 1, 1], [0, 0, 0]]))
        deep[2].bias.copy_(torch.tensor([-1.0, 0.0]))
    x, radius = torch.full((3,), 0.5), None if norm is None else 0.61
    for engine in ("grid", "layerwise", *(["smt"] if norm in (None, "inf") else [])):
        for layer in (0, 1):
            found = verify_point(deep, x, Region((0, 1, 2), 0.2, layer=layer, norm=norm, radius=radius), engine)
            assert (found.status, found.layer) == ("unsafe", layer)
            assert found.distance == pytest.approx(expected, abs=1e-5)


def test_blocks_are_searched_one_by_one():
    """Unsafe where a block by itself is; safe says that of blocks alone, for the sum of their grids."""
    found = []
    for seed in range(8):
        model, x, span = captured(seed, 6, 12, 8, 3), torch.full((6,), 0.5), (0.3, 0.02)[seed % 2]
        options = {"n_dims": 2, "selector": list(range(6)), "span": span, "steps": 1, "mode": "blocks", "features": 3}
        blocks = DLV(model, **options).verify(x)
        alone = [verify_point(model, x, Region((i, i + 1), span, bounds=(0.0, 1.0)), "grid") for i in (0, 2, 4)]
        assert (blocks.status == "unsafe") == any(each.status == "unsafe" for each in alone)
        assert not blocks.covers_input or blocks.status == "unsafe"
        assert blocks.n_points == sum(line["points"] for line in blocks.stats["layers"]) <= 27
        found.append(blocks.status)
    assert {"safe", "unsafe"} == set(found)
    # Two numbers of different blocks decide together what neither does alone.
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0] * 4, [1.0, 0.0, 1.0, 0.0]]))
        model.bias.copy_(torch.tensor([0.0, -0.3]))
    options = {"n_dims": 2, "selector": range(4), "span": 0.2}
    blocks = DLV(model, mode="blocks", features=2, **options).verify(torch.zeros(4))
    assert (blocks.status, blocks.covers_input) == ("safe", False)
    assert blocks.reason == "each of 2 blocks has this class by itself; nothing is proved of two of them together"
    assert str(blocks).endswith("of 2 blocks of numbers each was changed by itself")
    assert DLV(model, **options).verify(torch.zeros(4)).status == "unsafe"


def test_the_greedy_search_never_says_safe():
    model = captured(1, 6, 12, 8, 3)
    x = torch.full((6,), 0.5)
    label = int(model.logits(x[None]).argmax())
    small = DLV(model, n_dims=2, span=1e-4, mode="features").verify(x)
    assert (small.status, small.reason) == ("unknown", "no counterexample in 3 features, which is no proof")
    for start in (0, 1):
        large = DLV(model, start, n_dims=2, mode="features", span=1.0 if start == 0 else 4.0, timeout=1.0).verify(x)
        if large.status == "unsafe":
            assert int(model.logits(large.witness[None]).argmax()) != label
    assert verify_point(model, x, Region(tuple(range(6)), 1e-4), "layerwise").status == "unknown"
    found = verify_point(model, x, Region(tuple(range(6)), 0.5, bounds=(0.0, 1.0)), "layerwise")
    exact = verify_point(model, x, Region(tuple(range(6)), 0.5, bounds=(0.0, 1.0)), "smt")
    assert found.status in ("unsafe", "unknown")
    assert found.status != "unsafe" or exact.status == "unsafe"


def test_the_input_itself_may_be_wrong():
    model = captured(0, 3, 4, 2)
    x = torch.full((3,), 0.5)
    wrong = 1 - int(model.logits(x[None]).argmax())
    for found in (DLV(model, n_dims=2).verify(x, wrong), verify_point(model, x, Region((0,), 0.1), label=wrong)):
        assert (found.status, found.distance) == ("unsafe", 0.0)
        assert found.reason == "the input itself has another class"


def test_hidden_regions_say_that_they_are_hidden():
    model = captured(2, 6, 12, 8, 3)
    x = torch.full((6,), 0.5)
    for engine in ("grid", "smt"):
        small = verify_point(model, x, Region((0, 1), 1e-6, layer=1), engine)
        assert (small.status, small.layer, small.covers_input) == ("safe", 1, False)
        assert str(small).endswith("(layer 1, not the input)")
        large = verify_point(model, x, Region(tuple(range(6)), 3.0, layer=1, steps=1), engine, timeout=2.0)
        if large.status == "unsafe":
            assert int(model.logits(large.witness[None]).argmax()) != large.label
        else:
            assert large.status == "unknown"
            assert "no input was found" in large.reason


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_dims": 0}, "n_dims must be >= 1, got 0"),
        ({"start_layer": -1}, "start_layer must be >= 0, got -1"),
        ({"start_layer": 2, "end_layer": 1}, "end_layer must be >= 2, got 1"),
        ({"refine": -1}, "refine must be >= 0"),
        ({"mode": "greedy"}, 'mode must be "exhaustive", "blocks" or "features"'),
        ({"span": 0.0}, "span must be > 0"),
        ({"timeout": -1.0}, "timeout must be > 0 seconds, got -1"),
        ({"end_layer": 9}, r"layer must lie in 0\.\.1, got 9"),
    ],
)
def test_bad_settings(change, told):
    with pytest.raises(ValueError, match=told):
        DLV(captured(0, 2, 2), **change).verify(torch.full((2,), 0.5))


def test_a_class_that_is_none():
    with pytest.raises(ValueError, match=r"label must lie in 0\.\.1, got 7"):
        DLV(captured(0, 2, 2)).verify(torch.full((2,), 0.5), label=7)
