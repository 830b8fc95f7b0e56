"""Does an exhaustive search of a discretised region keep its guarantee, and does it find counterexamples that cost less?

Huang, Kwiatkowska, Wang and Wu, "Safety Verification of Deep Neural Networks", CAV 2017, arXiv:1610.06940.

Guarantee: a perceptron 64-24-12-10 on the 8x8 digits, test images it gets right, grids of four numbers with two steps of
1/16, 1/8 and 1/4 to each side; the grid engine against a literal walk of the ladder tree and against plain evaluation in
float64, and the exact engine on the box between the same points. Falsification: a perceptron 784-64-32-10 and a small
convolutional network on MNIST-5000, pixels within 0.3: the search with 3, 5 and 7 numbers, chosen as the authors' tool
does (furthest from the mean activation) or by the gradient; the same grids of random numbers; as many random points as
the grid of 5 numbers has; FGSM and the saliency map attack. Layers: the search from layer 1, its counterexamples taken
back to inputs. Sparsity, which is not in the paper: a perceptron 64-128-64-10 on the digits, dense and with 90, 95 and
99 % zeros, all trained for the same number of epochs (half before pruning, half after), all pixels within 0.05; seconds
of Z3 without an attack, a time-out counting as its limit. Not tested: ImageNet, GTSRB, the tool's greedy runs.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import classification
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

if TYPE_CHECKING:
    from torch import Tensor

    from netwright.verify import Network, Region

CARD = Paper(
    slug="safety-verification",
    title="Safety Verification of Deep Neural Networks",
    authors=("Xiaowei Huang", "Marta Kwiatkowska", "Sen Wang", "Min Wu"),
    year=2017,
    venue="Computer Aided Verification",
    kind="inproceedings",
    arxiv="1610.06940",
    summary=(
        "Around one input a discretised region is searched exhaustively, layer by layer, so that a counterexample in it "
        "is found if there is one, and an SMT solver takes those of hidden layers back to inputs."
    ),
    method="netwright.verify.safety:verify_point",
    covers=(
        "netwright.verify", "netwright.verify.layer_search:DLV", "netwright.verify.exact:smt_verify",
        "netwright.verify.grid:grid_search",
    ),  # fmt: skip
    claims=(
        Claim("guarantee", "Grid engine, ladder walk and plain evaluation agree, and no exact verdict contradicts them."),
        Claim("dims", "Varying more numbers finds more counterexamples: 5 than 3, and 7 than 5."),
        Claim("chosen", "The numbers that the tool chooses succeed 15 points more often than random ones."),
        Claim("distance", "Where FGSM succeeds too, the counterexamples are no further in L1."),
        Claim("validated", "Every counterexample is one for the network itself, in float32 too."),
        Claim("layer", "From layer 1, half as many counterexamples are found as from the input, or more."),
        Claim("gradient", "Numbers chosen by the gradient succeed more often than those of the tool.", gated=False),
        Claim("gap", "Between the points of a safe grid there is a counterexample somewhere.", gated=False),
        Claim("sparsity", "The solver needs less than half the time with 95 % zeros than without.", gated=False),
    ),
    metric="success",
    seeds=3,
)  # fmt: skip

SPANS = (1 / 16, 1 / 8, 1 / 4)
REACH, STEPS = 0.3, 2
DIMS = (3, 5, 7)
EPS, THETA = (0.1, 0.2, 0.4), (0.1, 0.4)
SPARSITIES = {"dense": 0.0, "90 %": 0.9, "95 %": 0.95, "99 %": 0.99}
RADIUS = 0.05
NETS = {
    "guarantee": ("digits", (24, 12)), "MLP": ("mnist-5000", (64, 32)), "CNN": ("mnist-5000", ()),
    "solver": ("digits", (128, 64)),
}  # fmt: skip


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    models = [model for model in ("MLP", "CNN") if f"{model}, tool's 3" in arms]

    def success(model: str, name: str) -> list[float]:
        return arms[f"{model}, {name}"]["success"]

    dims = {model: [n for n in DIMS if f"{model}, tool's {n}" in arms] for model in models}
    more = [
        compare(success(m, f"tool's {b}"), success(m, f"tool's {a}"))
        for m in models
        for a, b in itertools.pairwise(dims[m])
    ]
    gaps = {
        kind: [
            _average([success(m, f"{kind} {n}") for m in models for n in dims[m]], i)
            for i in range(len(success(models[0], "tool's 3")))
        ]
        for kind in ("tool's", "random", "gradient's")
    }
    found = {
        "guarantee": _guarantee(arms["guarantee"]),
        "dims": all_of(*more),
        "chosen": compare(gaps["tool's"], gaps["random"], margin=0.15),
        "gradient": compare(gaps["gradient's"], gaps["tool's"]),
        "distance": _distance(arms, models),
        "validated": _validated(arms, models),
        "layer": _layer(arms),
        "gap": decide(sum(arms["guarantee"]["gaps"]) > 0, sum(arms["guarantee"]["gaps"]), "safe grids in unsafe boxes"),
        "sparsity": decide(None, reason="not run"),
    }
    if "solver, 95 %" in arms:
        ours, dense = (arms[f"solver, {name}"]["solver seconds"] for name in ("95 %", "dense"))
        found["sparsity"] = compare(ours, [value / 2 for value in dense], direction="less")
    return found


def _average(columns: list[list[float]], place: int) -> float:
    return mean([column[place] for column in columns])


def _guarantee(figures: dict[str, list[Any]]) -> Verdict:
    faults = sum(figures["disagreements"]) + sum(figures["contradictions"])
    told = f"{sum(figures['disagreements'])} disagreements, {sum(figures['contradictions'])} contradictions"
    return decide(faults == 0, faults, f"{told} in {sum(figures['regions'])} regions")


def _distance(arms: Arms, models: Sequence[str]) -> Verdict:
    pairs = [
        (arms[f"{m}, tool's 5"]["common L1"], arms[f"{m}, FGSM 0.4"]["common L1"])
        for m in models
        if "common L1" in arms[f"{m}, tool's 5"]
    ]
    known = [(a, b) for a, b in pairs if all(value is not None for value in (*a, *b))]
    if not known:
        return decide(None, reason="no image on which both succeed, for some seed")
    return all_of(*(compare(a, b, direction="less") for a, b in known))


def _validated(arms: Arms, models: Sequence[str]) -> Verdict:
    shares = [
        value
        for name, figures in arms.items()
        if "validated" in figures and name.partition(",")[0] in (*models, "layer")
        for value in figures["validated"]
        if value is not None
    ]
    return decide(
        min(shares) == 1.0 if shares else None, min(shares, default=math.nan), "least share over arms and seeds"
    )


def _layer(arms: Arms) -> Verdict:
    deep, input_ = (arms[f"layer, from {start}"]["success"] for start in (1, 0))
    if not all(input_):
        return decide(None, reason="no counterexample from the input, for some seed")
    return compare([a / b for a, b in zip(deep, input_, strict=True)], 0.5)


def reproduce(run: Run) -> Evidence:
    """Runs the four parts."""
    sizes = {
        "digits": [
            run.size("digits training images", full=1000, fast=1000, scaled=False),
            0,
            run.size("digits test images", full=597, fast=300, scaled=False),
        ],
        "mnist-5000": [
            run.size("MNIST training images", full=3500, fast=1000),
            0,
            run.size("MNIST test images", full=1000, fast=200, scaled=False),
        ],
    }
    epochs = run.size("epochs", full=20, fast=6)
    regions = run.size("images of the guarantee", full=40, fast=4)
    images = run.size("images attacked", full=100, fast=6)
    conv = run.size("images attacked, convolutional network", full=30, fast=1, specified=100)
    timeout = run.size("seconds of the solver", full=10, fast=1)
    arms = run.arms({"guarantee": [regions, timeout, epochs, sizes["digits"]]}, _agree)
    models = {"MLP": (images, DIMS[:2] if run.fast else DIMS)}
    if not run.fast:
        models["CNN"] = (conv, DIMS[:2])
    for model, (count, dims) in models.items():
        methods: dict[str, tuple[str, float]] = {}
        for kind in ("tool's", "random", "gradient's"):
            methods |= {f"{kind} {n}": (kind, n) for n in dims}
        methods |= {f"FGSM {eps:g}": ("FGSM", eps) for eps in EPS}
        methods |= {f"saliency map {theta:g}": ("JSMA", theta) for theta in THETA}
        methods["random points"] = ("points", 5)
        chosen = {
            f"{model}, {name}": [model, *how, count, epochs, sizes[NETS[model][0]]] for name, how in methods.items()
        }
        arms |= _with_common(model, run.arms(chosen, _falsify))
    deep = run.size("images searched from layer 1", full=25, fast=3)
    arms |= run.arms(
        {f"layer, from {start}": [start, deep, timeout, epochs, sizes["mnist-5000"]] for start in (0, 1)}, _layers
    )
    solved = run.size("images of the solver", full=25, fast=2)
    names = ("dense", "95 %") if run.fast else SPARSITIES
    arms |= run.arms(
        {f"solver, {name}": [SPARSITIES[name], solved, timeout, epochs, sizes["digits"]] for name in names}, _solve
    )
    return run.evidence(arms, judge(arms))


def _with_common(model: str, arms: Arms) -> Arms:
    """With the mean L1 of FGSM's and of the search's counterexamples for images that both break; None if there are none."""
    pair = [arms[f"{model}, {name}"] for name in ("tool's 5", "FGSM 0.4")]
    for figures in pair:
        figures["common L1"] = []
    for first, second in zip(*(figures["each L1"] for figures in pair), strict=True):
        both = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a is not None and b is not None]
        for figures, each in zip(pair, (first, second), strict=True):
            figures["common L1"].append(mean([each[i] for i in both]) if both else None)
    for figures in arms.values():
        del figures["each L1"]
    return arms


@functools.lru_cache(maxsize=4)
def _trained(
    name: str, seed: int, epochs: int, images: tuple[int, int, int], sparsity: float = 0.0
) -> tuple[Any, float]:
    """A network on pixels in [0, 1] as the verifier sees it, and its test accuracy."""
    from torch import nn

    from netwright.compress.prune import magnitude, remove
    from netwright.nn.convnet import MLP, SmallConvNet
    from netwright.seeding import seeded
    from netwright.verify import Network

    source, hidden = NETS[name]
    data = classification.parts(source, seed, *images)
    shape = tuple(data[0]["test"].images.shape[1:])
    with seeded(seed, "init"):
        network: nn.Module = (
            nn.Sequential(nn.Flatten(), MLP(math.prod(shape), [*hidden, 10]))
            if hidden
            else SmallConvNet((8, 16), hidden=32, in_channels=1, grid=7)
        )
    halves = (epochs // 2, epochs - epochs // 2) if name == "solver" else (epochs,)
    for part, count in enumerate(halves):
        if part and sparsity:
            magnitude(network, sparsity, "global")
        classification.train(network, data, epochs=count, batch=64, lr=0.05, seed=seed, weight_decay=5e-4)
    accuracy = classification.measured(network, data, "test")["accuracy"]
    if sparsity:
        remove(network)
    return Network(nn.Sequential(data[1], network).eval(), shape), accuracy


def _right(network: Network, name: str, seed: int, images: tuple[int, int, int], count: int) -> tuple[Tensor, Tensor]:
    """The first test images that a network gets right, in [0, 1], and their classes."""
    data = classification.parts(NETS[name][0], seed, *images)[0]["test"]
    pixels, labels = data.images.float() / 255, data.labels
    right = (network.logits(pixels).argmax(1) == labels).nonzero().flatten()[:count]
    return pixels[right], labels[right]


def _agree(seed: int, count: int, timeout: float, epochs: int, images: Sequence[int]) -> dict[str, Any]:
    """The grid engine against the ladder and plain evaluation, and the exact engine beside them."""
    import torch

    from netwright.verify import Region, grid_search, smt_verify
    from netwright.verify.grid import other_class
    from netwright.verify.layerwise import ranking

    sizes = (images[0], images[1], images[2])
    network, accuracy = _trained("guarantee", seed, epochs, sizes)
    counts = dict.fromkeys(("regions", "disagreements", "contradictions", "gaps", "undecided"), 0)
    tally = {f"{status} at span {span:g}": 0 for span in SPANS for status in ("grid unsafe", "box unsafe", "gap")}
    for x, label in zip(*_right(network, "guarantee", seed, sizes, count), strict=True):
        flat, own = x.double().flatten(), int(label)
        dims = tuple(ranking(network, flat, 0, "gradient", own)[:4])
        for span in SPANS:
            region = Region(dims, span, STEPS, bounds=(0.0, 1.0))
            grid = grid_search(network, flat, region, label=own)
            steps = region.grid()
            plain = other_class(network.logits(region.points(steps[region.kept(steps, flat)], flat)), own)
            unsafe = grid.witness is not None
            walked = _walk(network, flat, region, own)
            low, high = region.box(flat)
            box = smt_verify(network, low, high, own, timeout)
            counts["regions"] += 1
            counts["disagreements"] += int(unsafe != bool(plain.any())) + int(unsafe != walked)
            # Random points of a box that is called safe as well.
            inside = low + (high - low) * torch.rand(200, len(low), dtype=torch.float64)
            wrong = bool(other_class(network.logits(inside), own).any())
            counts["contradictions"] += int(box.status == "safe" and (unsafe or wrong))
            counts["gaps"] += int(box.status == "unsafe" and not unsafe)
            counts["undecided"] += int(box.status == "unknown")
            tally[f"grid unsafe at span {span:g}"] += int(unsafe)
            tally[f"box unsafe at span {span:g}"] += int(box.status == "unsafe")
            tally[f"gap at span {span:g}"] += int(box.status == "unsafe" and not unsafe)
    return counts | tally | {"accuracy": accuracy}


def _walk(network: Network, alpha: Tensor, region: Region, label: int) -> bool:
    """Whether the ladder tree, walked node by node, meets another class."""
    import torch

    from netwright.verify import ladder_search
    from netwright.verify.grid import other_class
    from netwright.verify.region import axis_moves

    def changed(node: tuple[int, ...]) -> bool:
        return bool(other_class(network.logits(region.points(torch.tensor([node]), alpha)), label)[0])

    def inside(node: tuple[int, ...]) -> bool:
        return bool(region.kept(torch.tensor([node]), alpha)[0])

    start = (0,) * len(region.dims)
    return any(found for _, found in ladder_search(changed, start, axis_moves(len(start)), inside))


def _falsify(
    seed: int, model: str, kind: str, strength: float, count: int, epochs: int, images: Sequence[int]
) -> dict[str, Any]:
    """One way of looking for counterexamples, on the first images that the network gets right."""
    import torch

    sizes = (images[0], images[1], images[2])
    network, accuracy = _trained(model, seed, epochs, sizes)
    pixels, labels = _right(network, model, seed, sizes, count)
    begin = time.monotonic()
    found: list[Tensor | None] = []
    tried = 0.0
    for place, (x, label) in enumerate(zip(pixels, labels, strict=True)):
        witness, points = _witness(network, x, int(label), kind, strength, seed * 10_000 + place)
        found.append(witness)
        tried += points
    seconds = time.monotonic() - begin
    changes = [None if w is None else (w.flatten() - x.double().flatten()) for w, x in zip(found, pixels, strict=True)]
    broken = [change for change in changes if change is not None]
    size = float(pixels[0].numel())
    single = network.double.float()
    held = [
        float(single(w.float()[None]).argmax() != label)
        for w, label in zip(found, labels, strict=True)
        if w is not None
    ]
    network.double.double()
    return {
        "success": len(broken) / len(found),
        # As the paper measures: the root of the mean square, and the mean absolute change.
        "L2": mean([float(torch.linalg.vector_norm(c)) / size**0.5 for c in broken]) if broken else None,
        "L1": mean([float(c.abs().mean()) for c in broken]) if broken else None,
        "numbers changed": mean([float((c != 0).sum()) for c in broken]) if broken else None,
        "each L1": [None if c is None else float(c.abs().mean()) for c in changes],
        "validated": mean(held) if held else None,
        "forward passes": tried / len(found),
        "seconds": seconds / len(found),
        "accuracy": accuracy,
    }


def _witness(
    network: Network, x: Tensor, label: int, kind: str, strength: float, draw: int
) -> tuple[Tensor | None, float]:
    """A counterexample or nothing, and how many points were evaluated."""
    import torch

    from netwright.seeding import stream
    from netwright.train.attacks import fgsm, jsma
    from netwright.verify import Region, grid_search
    from netwright.verify.grid import other_class
    from netwright.verify.layerwise import ranking

    flat = x.double().flatten()
    if kind in ("FGSM", "JSMA"):
        if kind == "FGSM":
            made = fgsm(network.double, x.double()[None], torch.tensor([label]), strength)[0]
        else:
            made = jsma(network.double, x.double(), label, strength)
        wrong = bool(other_class(network.logits(made[None]), label)[0])
        return (made if wrong else None), 1
    if kind == "points":
        count = (2 * STEPS + 1) ** int(strength)
        generator = stream(draw, "points")
        for part in range(0, count, 1024):
            change = (2 * torch.rand(min(1024, count - part), len(flat), generator=generator) - 1) * REACH
            points = (flat + change.double()).clamp(0, 1)
            wrong = other_class(network.logits(points), label).nonzero().flatten()
            if len(wrong):
                return points[wrong[0]].reshape(x.shape), part + int(wrong[0]) + 1
        return None, count
    selectors: dict[str, Any] = {"tool's": "activation", "random": "random", "gradient's": "gradient"}
    dims = ranking(network, flat, 0, selectors[kind], label, draw)[: int(strength)]
    region = Region(tuple(dims), REACH / STEPS, STEPS, bounds=(0.0, 1.0))
    found = grid_search(network, flat, region, label=label)
    return (None if found.witness is None else found.witness.reshape(x.shape)), found.n_points


def _layers(seed: int, start: int, count: int, timeout: float, epochs: int, images: Sequence[int]) -> dict[str, Any]:
    """The search of the paper from the input, or from the first hidden layer with counterexamples taken back."""
    from netwright.verify import DLV

    sizes = (images[0], images[1], images[2])
    network, accuracy = _trained("MLP", seed, epochs, sizes)
    search = DLV(network, start, n_dims=5, selector="activation", timeout=timeout, steps=1)
    results = [search.verify(x, int(y)) for x, y in zip(*_right(network, "MLP", seed, sizes, count), strict=True)]
    broken = [result for result in results if result.status == "unsafe"]
    checked = [float(network.logits(r.witness[None]).argmax() != r.label) for r in broken if r.witness is not None]
    spurious = [line["spurious"] for result in results for line in result.stats.get("layers", [])]
    return {
        "success": len(broken) / len(results),
        "validated": mean(checked) if checked else None,
        "L2": mean([float(r.distance or 0.0) / 28 for r in broken]) if broken else None,
        "spurious": sum(spurious),
        "seconds": mean([result.seconds for result in results]),
        "accuracy": accuracy,
    }


def _solve(
    seed: int, sparsity: float, count: int, timeout: float, epochs: int, images: Sequence[int]
) -> dict[str, Any]:
    """What the exact engine needs for a network with zeros."""
    from netwright.verify import smt_verify

    sizes = (images[0], images[1], images[2])
    network, accuracy = _trained("solver", seed, epochs, sizes, sparsity)
    pixels, labels = _right(network, "solver", seed, sizes, count)
    found = [
        smt_verify(network, (x - RADIUS).clamp(0, 1), (x + RADIUS).clamp(0, 1), int(y), timeout, attack=False)
        for x, y in zip(pixels, labels, strict=True)
    ]

    def decided(status: str) -> float:
        return mean([float(each.status == status) for each in found])

    spent = [min(timeout, each.stats.get("solver_seconds", 0.0)) for each in found]
    return {
        "solver seconds": mean(spent),
        "seconds": mean([each.stats["seconds"] for each in found]),
        "units": mean([float(each.stats.get("units", 0)) for each in found]),
        "rivals": mean([float(each.stats["rivals"]) for each in found]),
        "safe": decided("safe"),
        "unsafe": decided("unsafe"),
        "unknown": decided("unknown"),
        "accuracy": accuracy,
        "success": decided("unsafe"),
    }
