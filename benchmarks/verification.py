"""What verification costs: grids beside a literal ladder walk, the exact engine beside a plain encoding, and zeros.

    python benchmarks/verification.py [NAME ...] [--rounds 5] [--quick]

One thread, a perceptron 64-24-12-10 with weights as they are drawn. `grid`: four and six numbers with two steps to
each side, by the ladder walked node by node and by the grid engine, in turns, which evaluates all points or first asks
its bounds (aim: 100 times as fast; the bounds cost some milliseconds, whatever the points); eight numbers, 390,625
points, all evaluated (aim: a million points a second); then as many around inputs near a boundary, 5 % narrower than
where another class begins, with bounds that leave points out (aim: a tenth of the points is evaluated, or fewer).
`presolve`: boxes of six numbers near a boundary, by the exact engine without its attack and by Z3 with every ReLU
written down as it is; a time-out, after 20 s, counts as its limit (aim: 5 times as fast). `sparsity`: a perceptron
64-128-64-10 with 90, 95 and 99 % of the smallest weights set to zero, all pixels within 0.05: seconds of Z3 where it
was asked. When all have run, the figures go beside their aims to benchmarks/results/; --quick writes nothing.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from netwright.compress.prune import magnitude, remove
from netwright.console import table
from netwright.cost import compare_times
from netwright.seeding import seeded, stream
from netwright.verify import Network, Region, grid_search, ladder_search, smt_verify
from netwright.verify.grid import other_class
from netwright.verify.region import axis_moves
from support.record import Figure, over
from support.whole import recorded

PIXELS = 64
TIMEOUT, SHORT = 20.0, 2.0  # seconds of a question; SHORT in a trial


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers and ReLUs from 64 inputs to 10 logits of mean 0 over [0, 1], so that every class wins somewhere."""
    sizes = (PIXELS, *widths, 10)
    with seeded(0, "init"):
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*layers[:-1]).eval()
    with torch.no_grad():
        net[-1].bias -= net(torch.rand(1024, PIXELS, generator=stream(0, "inputs"))).mean(0)
    return net


def points(network: Network, count: int) -> Iterator[tuple[Tensor, int]]:
    """Inputs of the smallest margins of many, and their classes."""
    x = torch.rand(50 * count, PIXELS, generator=stream(0, "points"), dtype=torch.float64)
    logits = network.logits(x)
    best = logits.topk(2, dim=1).values
    for place in (best[:, 0] - best[:, 1]).argsort()[:count].tolist():
        yield x[place], int(logits[place].argmax())


def walk(network: Network, x: Tensor, region: Region, label: int) -> bool:
    """The ladder tree, node by node, as the definition has it."""

    def changed(node: tuple[int, ...]) -> bool:
        return bool(other_class(network.logits(region.points(torch.tensor([node]), x)), label)[0])

    def inside(node: tuple[int, ...]) -> bool:
        return bool(region.kept(torch.tensor([node]), x)[0])

    start = (0,) * len(region.dims)
    return any(found for _, found in ladder_search(changed, start, axis_moves(len(start)), inside))


def near_boundary(network: Network, x: Tensor, label: int, count: int) -> Region:
    """Some numbers with two steps to each side, 5 % narrower than the widest such grid of one class."""
    low, high = 1e-5, 1.0
    for _ in range(10):
        span = (low * high) ** 0.5
        region = Region(tuple(range(count)), span, 2)
        low, high = (span, high) if grid_search(network, x, region, label=label).witness is None else (low, span)
    return Region(tuple(range(count)), 0.95 * low, 2)


def grid(rounds: int, quick: bool) -> list[Figure]:
    network = Network(perceptron(24, 12), (PIXELS,))
    x = torch.rand(PIXELS, generator=stream(0, "x"), dtype=torch.float64)
    label = int(network.logits(x[None]).argmax())
    few, more, many = (Region(tuple(range(count)), 1e-4, 2) for count in ((2, 2, 4) if quick else (4, 6, 8)))
    figures = []
    for region in dict.fromkeys((few, more)):
        calls = {
            "evaluated": lambda region=region: grid_search(network, x, region, prune=False),
            "with bounds": lambda region=region: grid_search(network, x, region),
            "walk": lambda region=region: walk(network, x, region, label),
        }
        for way in ("evaluated", "with bounds"):
            pair = {name: calls[name] for name in (way, "walk")}
            print(found := compare_times(pair, rounds=rounds, threads=1))
            times = f"{found['walk'].median_ms:.3g} ms, ours {found[way].median_ms:.3g}"
            what = f"{region.count:,} points, {way}: a walk, times as long"
            figures.append(over(found["walk"], what, least=100, note=times))
    begin = time.perf_counter()
    grid_search(network, x, many, prune=False)
    seconds = time.perf_counter() - begin
    rate = many.count / seconds
    figures.append(Figure(f"{many.count:,} points, all evaluated: points a second", rate, least=1e6))
    evaluated, spans = [], []
    for x, label in points(network, 1 if quick else 6):
        region = near_boundary(network, x, label, len(many.dims))
        evaluated.append(grid_search(network, x, region, label=label).n_points)
        spans.append(region.span[0])
    note = f"{', '.join(f'{count:,}' for count in evaluated)} at spans of {min(spans):.2g} to {max(spans):.2g}"
    # Where one bound proves the whole box there is no share to tell.
    share = len(evaluated) * many.count / sum(evaluated) if sum(evaluated) else None
    figures.append(Figure(f"{many.count:,} points over those evaluated with bounds", share, least=10, note=note))
    return figures


def plain(model: nn.Sequential, low: Tensor, high: Tensor, label: int, timeout: float) -> str:
    """Z3 without any bounds: every layer as it is."""
    import z3

    def number(value: float) -> z3.RatNumRef:
        return z3.RealVal("{}/{}".format(*value.as_integer_ratio()))

    x = [z3.Real(f"x{i}") for i in range(len(low))]
    solver = z3.SolverFor("QF_LRA")
    solver.set("timeout", int(1000 * timeout))
    for v, a, b in zip(x, low.tolist(), high.tolist(), strict=True):
        solver.add(v >= number(a), v <= number(b))
    for part in model:
        if isinstance(part, nn.Linear):
            rows = zip(part.weight.tolist(), part.bias.tolist(), strict=True)
            x = [z3.Sum([number(w) * v for w, v in zip(row, x, strict=True)]) + number(b) for row, b in rows]
        else:
            x = [z3.If(v > 0, v, z3.RealVal(0)) for v in x]
    solver.add(z3.Or([other >= x[label] for j, other in enumerate(x) if j != label]))
    return {"sat": "unsafe", "unsat": "safe", "unknown": "unknown"}[str(solver.check())]


def presolve(rounds: int, quick: bool) -> list[Figure]:
    timeout, count = (SHORT, 1) if quick else (TIMEOUT, 6)
    model = perceptron(24, 12)
    network = Network(model, (PIXELS,))
    rows, ours, theirs = [], 0.0, 0.0
    for number, (x, label) in enumerate(points(network, count)):
        low, high = x.clone(), x.clone()
        low[:6], high[:6] = low[:6] - 1 / 8, high[:6] + 1 / 8
        begin = time.perf_counter()
        exact = smt_verify(network, low, high, label, timeout, attack=False)
        middle = time.perf_counter()
        peer = plain(model, low, high, label, timeout)
        end = time.perf_counter()
        assert "unknown" in (exact.status, peer) or exact.status == peer, "another verdict"
        ours, theirs = ours + middle - begin, theirs + end - middle
        rows.append([number, exact.status, exact.reason, f"{middle - begin:.3f}", peer, f"{end - middle:.3f}"])
    print(table(rows, ["box", "exact engine", "by", "seconds", "plain encoding", "seconds"]))
    late = sum(row[4] == "unknown" for row in rows)
    note = f"{theirs:.3g} s, ours {ours:.3g}; {late} of them ended by the limit"
    return [Figure(f"{count} boxes: a plain encoding, times as long", theirs / ours, least=5, note=note)]


def sparsity(rounds: int, quick: bool) -> list[Figure]:
    timeout, count = (SHORT, 1) if quick else (TIMEOUT, 6)
    figures = []
    for share in (0.0, 0.99) if quick else (0.0, 0.9, 0.95, 0.99):
        model = perceptron(128, 64)
        if share:
            magnitude(model, share, "global")
            remove(model)
        network = Network(model, (PIXELS,))
        found = [
            smt_verify(network, (x - 0.05).clamp(0, 1), (x + 0.05).clamp(0, 1), label, timeout, attack=False)
            for x, label in points(network, count)
        ]
        asked = [each.stats["solver_seconds"] for each in found if "solver_seconds" in each.stats]
        counts = [
            f"{sum(each.status == status for each in found)} {status}" for status in ("safe", "unsafe", "unknown")
        ]
        note = f"asked about {len(asked)} of {count} boxes: {', '.join(counts)}"
        mean = sum(asked) / len(asked) if asked else None
        print(f"{100 * share:.0f} % zeros: {note}")
        figures.append(Figure(f"{100 * share:.0f} % zeros: seconds of Z3, each", mean, note=note))
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    subjects = {"grid": grid, "presolve": presolve, "sparsity": sparsity}
    sys.exit(recorded("verification", __doc__ or "", subjects, rounds=5))
