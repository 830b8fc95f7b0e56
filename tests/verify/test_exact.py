"""The exact engine: boundaries by hand, enumeration, a plain encoding as second opinion, many points, time."""

from __future__ import annotations

import functools
import itertools
import sys
import time

import pytest
import torch
from torch import nn
from verified import NETS, captured, drawn, inputs_of, net, network, perceptron, points_of

from netwright.compress.prune import magnitude, remove
from netwright.verify import Network, Region, smt_verify, verify_point
from netwright.verify.bounds import analyse, flat_margin
from netwright.verify.forms import TooLargeError
from netwright.verify.relaxation import Relaxation


@functools.cache
def line() -> Network:
    """o = (x, 1 - x): the boundary is at 0.5."""
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model.bias.copy_(torch.tensor([0.0, 1.0]))
    return Network(model, (1,))


@functools.cache
def tent() -> Network:
    """o_0 = 0.1, o_1 a tent of height 0.2 at 0.5 over [0.4, 0.6]."""
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.copy_(-torch.tensor([0.4, 0.5, 0.6]))
        model[2].weight.copy_(torch.tensor([[0.0, 0, 0], [2, -4, 2]]))
        model[2].bias.copy_(torch.tensor([0.1, 0.0]))
    return Network(model, (1,))


def with_weights(made: Network, draw) -> None:
    """Other weights in a network of linear layers, which is quicker than another network."""
    linear = [part for part in made.double.modules() if isinstance(part, nn.Linear)]
    nodes = [node for node in made.graph if node.op.name == "linear"]
    for part, node in zip(linear, nodes, strict=True):
        with torch.no_grad():
            part.weight.copy_(draw(part.weight.shape))
            part.bias.copy_(draw(part.bias.shape))
        node.op.weight, node.op.bias = part.weight.detach().numpy().copy(), part.bias.detach().numpy().copy()


@pytest.mark.parametrize("attack", [True, False])
def test_a_boundary_by_hand(attack):
    def verdict(radius):
        low, high = torch.tensor([0.8 - radius], dtype=torch.float64), torch.tensor([0.8 + radius], dtype=torch.float64)
        return smt_verify(line(), low, high, 0, attack=attack)

    assert verdict(0.2).status == "safe"
    # A tie may go either way, so it counts.
    assert verdict(0.8 - 0.5).status == "unsafe"
    found = verdict(0.31)
    assert found.status == "unsafe"
    assert 0.49 - 1e-9 <= float(found.witness) <= 0.5


def test_between_the_points_of_a_grid():
    x, region = torch.tensor([0.0]), Region(dims=(0,), span=1.0, bounds=(0.0, 1.0))
    grid, box = (verify_point(tent(), x, region, engine) for engine in ("grid", "smt"))
    assert (grid.status, grid.scope) == ("safe", "grid")
    assert box.status == "unsafe"
    assert 0.45 - 1e-6 <= float(box.witness) <= 0.55 + 1e-6
    assert box.witness_class == 1


def crossings(made: Network) -> torch.Tensor:
    """The corners of the unit square, and where the lines of two units at most meet each other or its edges.

    A network of one hidden layer is affine between these, so that its least margin is that of one of them.
    """
    first = made.double[0]
    edges = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
    lines = torch.cat([torch.cat([first.weight, first.bias[:, None]], 1), edges])
    found = []
    for a, b in itertools.combinations(lines, 2):
        crossing = torch.linalg.cross(a, b)  # whole numbers, so that parallel lines are told exactly
        if crossing[2] != 0:
            found.append(crossing[:2] / crossing[2])
    points = torch.stack(found)
    return points[((points >= 0) & (points <= 1)).all(1)]


def test_two_hundred_small_networks_by_enumeration():
    axis = torch.linspace(0, 1, 400, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    generator = torch.Generator().manual_seed(0)
    counts = {"safe": 0, "unsafe": 0}
    made = Network(drawn(0, lambda: perceptron(2, 2, 2)), (2,))
    for _ in range(200):
        with_weights(made, lambda shape: torch.randint(-3, 4, shape, generator=generator).double())
        logits = made.logits(points)
        label = int(logits[80200].argmax())
        margin = float(flat_margin(logits, label).min())
        # Between the points the margin is least where lines of the units and edges of the square cross.
        least = float(flat_margin(made.logits(crossings(made)), label).min())
        assert least <= margin + 1e-9
        if abs(least) < 1e-3:
            continue
        found = smt_verify(made, torch.zeros(2), torch.ones(2), label, 10.0, attack=False)
        assert found.status == ("unsafe" if least < 0 else "safe")
        if found.status == "unsafe":
            assert float(flat_margin(made.logits(found.witness[None]), label)) <= 0
        counts[found.status] += 1
    assert min(counts.values()) > 20


def plainly(model: nn.Module, low: torch.Tensor, high: torch.Tensor, label: int) -> bool:
    """Whether Z3 finds another class, every layer of a perceptron written down as it is, without bounds."""
    import z3

    def number(value):
        return z3.RealVal("{}/{}".format(*float(value).as_integer_ratio()))

    x = [z3.Real(f"x{i}") for i in range(len(low))]
    solver = z3.SolverFor("QF_LRA")
    solver.set("timeout", 20_000)
    for v, a, b in zip(x, low.tolist(), high.tolist(), strict=True):
        solver.add(v >= number(a), v <= number(b))
    for part in model:
        if isinstance(part, nn.Linear):
            rows = zip(part.weight.tolist(), part.bias.tolist(), strict=True)
            x = [z3.Sum([number(w) * v for w, v in zip(row, x, strict=True)]) + number(b) for row, b in rows]
        else:
            x = [z3.If(v > 0, v, z3.RealVal(0)) for v in x]
    solver.add(z3.Or([other >= x[label] for j, other in enumerate(x) if j != label]))
    found = solver.check()
    assert found != z3.unknown
    return found == z3.sat


def test_a_plain_encoding_agrees():
    seen = set()
    made = captured(1, 3, 6, 4, 3)
    for centre in inputs_of(made, 6)[1::2]:
        label = int(made.logits(centre[None]).argmax())
        for radius in (0.02, 0.05, 0.08, 0.11, 0.15, 0.2, 0.25, 0.3, 0.35):
            low, high = centre - radius, centre + radius
            found = smt_verify(made, low, high, label, 20.0, attack=False)
            assert found.status == ("unsafe" if plainly(made.double, low, high, label) else "safe")
            seen.add((found.status, found.reason))
    assert {("safe", "bounds"), ("safe", "solver"), ("unsafe", "solver")} <= seen


@pytest.mark.parametrize("name", NETS)
def test_safe_is_never_contradicted(name):
    """Many points of every box that is called safe, in float64 and in float32; every witness is one."""
    counts = {"safe": 0, "unsafe": 0, "unknown": 0}
    model, made = net(name)[0], network(name)
    shape = made.shape
    for seed in range(4):
        centre = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        label = int(made.logits(centre[None]).argmax())
        for radius in (0.01, 0.03, 0.08, 0.2):
            low, high = centre - radius, centre + radius
            found = smt_verify(made, low, high, label, 0.5)
            counts[found.status] += 1
            if found.status == "safe":
                points = points_of(low, high, 4000, seed)
                assert float(flat_margin(made.logits(points), label).min()) > 0
                assert bool((model(points.float()).argmax(1) == label).all())
            elif found.status == "unsafe":
                witness = found.witness.reshape(shape)
                assert float(flat_margin(made.logits(witness[None]), label)) <= 0
                assert bool(((witness >= low) & (witness <= high)).all())
    assert counts["safe"] > 0


@pytest.mark.parametrize("name", NETS)
def test_a_hundred_thousand_points_do_not_contradict_safe(name):
    """Of the largest box around one input that is proved."""
    model, made = net(name)[0], network(name)
    centre = torch.rand(made.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = int(made.logits(centre[None]).argmax())
    for radius in (0.2, 0.08, 0.03, 0.01, 0.001):
        low, high = centre - radius, centre + radius
        if smt_verify(made, low, high, label, 0.5).status == "safe":
            break
    else:
        pytest.fail("no box is safe")
    for points in points_of(low, high, 100_000).split(20_000):
        assert float(flat_margin(made.logits(points), label).min()) > 0
        assert bool((model(points.float()).argmax(1) == label).all())


def test_the_solver_is_asked_where_better_ranges_take_too_long(monkeypatch):
    """They get a share of the time; the verdict is the same without them."""
    made = captured(1, 3, 6, 4, 3)
    boxes = [
        (x - r, x + r, int(made.logits(x[None]).argmax())) for x in inputs_of(made, 6)[1::2] for r in (0.08, 0.2, 0.35)
    ]
    expected = [smt_verify(made, *box, 20.0, attack=False).status for box in boxes]

    def slow(*args, most, **options):
        if most:
            raise TimeoutError
        return Relaxation(*args, most=most, **options)

    monkeypatch.setattr("netwright.verify.exact.Relaxation", slow)
    found = [smt_verify(made, *box, 20.0, attack=False) for box in boxes]
    assert [each.status for each in found] == expected
    assert any(each.reason == "solver" for each in found)


def test_what_the_solver_cannot_take_is_left_to_bounds(monkeypatch):
    made = captured(1, 3, 6, 4, 3)
    x = inputs_of(made, 2)[1]
    label = int(made.logits(x[None]).argmax())

    def refuse(*_, **__):
        raise TooLargeError("many numbers")

    monkeypatch.setattr("netwright.verify.exact.analyse", refuse)
    assert smt_verify(made, x - 1e-4, x + 1e-4, label, 5.0).status == "safe"
    large = smt_verify(made, x - 1.0, x + 1.0, label, 5.0, attack=False)
    assert (large.status, large.reason) == ("unknown", "the network is too large for the exact engine: many numbers")


def test_the_nearest_box_that_is_safe_touches_the_boundary():
    """The largest safe radius, by halving, is that of the nearest of many points that have another class."""
    made = captured(5, 2, 8, 8, 3)
    centre = torch.tensor([0.4, 0.6], dtype=torch.float64)
    label = int(made.logits(centre[None]).argmax())
    axis = torch.linspace(-3, 4, 1500, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    changed = flat_margin(made.logits(points), label) <= 0
    nearest = float((points - centre).abs().amax(1)[changed].min())
    low, high = 0.0, 3.0
    for _ in range(14):
        middle = (low + high) / 2
        found = smt_verify(made, centre - middle, centre + middle, label, 60.0)
        # At the boundary itself only rounding may decide.
        assert found.status != "unknown" or (found.reason.startswith("numerical") and abs(middle - nearest) < 0.02)
        low, high = (middle, high) if found.status == "safe" else (low, middle)
    assert high <= nearest + 1e-3
    assert low >= nearest - 0.02


def test_enlarging_a_box_never_makes_it_safe():
    made = captured(7, 5, 10, 8, 3)
    centre = torch.full((5,), 0.5, dtype=torch.float64)
    label = int(made.logits(centre[None]).argmax())
    verdicts = [smt_verify(made, centre - r, centre + r, label, 10.0).status for r in (0.001, 0.01, 0.05, 0.2, 0.8)]
    assert "unknown" not in verdicts
    assert verdicts == sorted(verdicts)
    assert set(verdicts) == {"safe", "unsafe"}


def test_rounding_that_decides_is_not_hidden():
    """A margin of 1e-9 is above 0, but float32 may lose it: neither verdict is honest."""
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [1.0]]))
        model.bias.copy_(torch.tensor([1e-9, 0.0]))
    found = smt_verify(model, torch.tensor([0.0]), torch.tensor([1.0]), 0)
    assert found.status == "unknown"
    assert found.reason == "numerical: rounding decides about class 1"


@pytest.mark.parametrize("limit", [0.3, 1.5])
def test_the_time_is_kept(limit):
    made = captured(0, 30, 60, 60, 40, 5)
    low, high = torch.zeros(30), torch.ones(30)
    label = int(made.logits((low + high)[None] / 2).argmax())
    start = time.monotonic()
    found = smt_verify(made, low, high, label, limit, attack=False)
    spent = time.monotonic() - start
    assert found.status == "unknown"
    assert "the time was over at class" in found.reason
    assert spent < limit + 1.0


def test_zeros_make_the_question_smaller():
    dense = drawn(1, lambda: perceptron(12, 40, 30, 4))
    sparse = remove(magnitude(drawn(1, lambda: perceptron(12, 40, 30, 4)), 0.9))
    centre = torch.full((12,), 0.5, dtype=torch.float64)
    analyses = [analyse(Network(model, (12,)), centre - 0.3, centre + 0.3) for model in (dense, sparse)]
    units, terms = (
        [a.basis.units for a in analyses],
        [sum(int(g.candidates.count_nonzero()) for g in a.basis.groups) for a in analyses],
    )
    assert units[1] < units[0] / 2
    assert terms[1] < terms[0] / 8


def test_without_a_solver(monkeypatch):
    low, high = torch.tensor([0.6]), torch.tensor([1.0])
    monkeypatch.setitem(sys.modules, "z3", None)
    with pytest.raises(ImportError, match=r"netwright\[verify\]"):
        smt_verify(line(), low, high, 0)
    assert smt_verify(line(), low, high, 0, solver=False).status == "safe"
    assert smt_verify(line(), torch.tensor([0.1]), high, 0, solver=False).status == "unsafe"
    x = torch.tensor([0.8])
    assert verify_point(line(), x, Region(dims=(0,), span=0.1)).status == "safe"
    with pytest.raises(ImportError, match="z3-solver"):
        verify_point(line(), x, Region(dims=(0,), span=0.1), "smt")


def test_what_is_not_piecewise_linear_is_named():
    model = drawn(0, lambda: perceptron(3, 4, 2, act=nn.Sigmoid))
    x = torch.full((3,), 0.5)
    label = int(model(x[None]).argmax())
    with pytest.raises(TypeError, match='sigmoid in 0: use engine="grid"'):
        smt_verify(model, x, x + 1, 1 - label, attack=False)
    assert smt_verify(model, x - 1e-4, x + 1e-4, label, solver=False).status == "safe"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"timeout": 0.0}, "timeout must be > 0 seconds, got 0.0"),
        ({"timeout": float("nan")}, "timeout must be > 0"),
        ({"label": 2}, r"label must lie in 0\.\.1, got 2"),
        ({"label": -1}, r"label must lie in 0\.\.1, got -1"),
        ({"layer": 2}, r"layer must lie in 0\.\.1, got 2"),
        ({"lower": torch.tensor([2.0])}, "lower must not be above upper"),
        ({"upper": torch.tensor([float("inf")])}, "upper must be finite"),
    ],
)
def test_bad_input(change, told):
    given = {"lower": torch.tensor([0.0]), "upper": torch.tensor([1.0]), "label": 0, **change}
    with pytest.raises(ValueError, match=told):
        smt_verify(line(), **given)


def test_the_solver_stops_when_interrupted(monkeypatch):
    """Ctrl-C reaches the caller at once, whatever the solver is at."""
    from netwright.console import Task

    made = captured(0, 30, 60, 60, 40, 5)
    low, high = torch.zeros(30), torch.ones(30)

    def stop(self, *_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Task, "update", stop)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        smt_verify(made, low, high, int(made.logits((low + high)[None] / 2).argmax()), 30.0, attack=False)
    assert time.monotonic() - start < 20
