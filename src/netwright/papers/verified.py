"""What the experiment of safety verification does with one network for one seed."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import classification
from netwright.papers.evidence import mean

if TYPE_CHECKING:
    from torch import Tensor

    from netwright.verify import Network, Region

SPANS = (1 / 16, 1 / 8, 1 / 4)
REACH, STEPS = 0.3, 2
RADIUS = 0.05
SAMPLES = 10_000  # random points of a box that is called safe
NETS = {
    "guarantee": ("digits", (24, 12)), "MLP": ("mnist-5000", (64, 32)), "CNN": ("mnist-5000", ()),
    "solver": ("digits", (128, 64)),
}  # fmt: skip
Sizes = Sequence[int]


@functools.lru_cache(maxsize=6)
def _trained(name: str, seed: int, epochs: int, images: tuple[int, ...], sparsity: float = 0.0) -> tuple[Any, float]:
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


def _right(networks: Sequence[Network], name: str, seed: int, images: Sizes, count: int) -> tuple[Tensor, Tensor]:
    """The first test images that all of some networks get right, in [0, 1], and their classes."""
    import torch

    data = classification.parts(NETS[name][0], seed, *images)[0]["test"]
    pixels, labels = data.images.float() / 255, data.labels
    each = torch.stack([network.logits(pixels).argmax(1) == labels for network in networks])
    right = each.all(0).nonzero().flatten()[:count]
    return pixels[right], labels[right]


def agree(seed: int, count: int, timeout: float, epochs: int, images: Sizes) -> dict[str, Any]:
    """The grid engine against the ladder and plain evaluation, and the exact engine beside them."""
    import torch

    from netwright.seeding import stream
    from netwright.verify import Region, grid_search, smt_verify
    from netwright.verify.grid import other_class
    from netwright.verify.layerwise import ranking

    network, accuracy = _trained("guarantee", seed, epochs, tuple(images))
    draws = stream(seed, "inside")
    counts = dict.fromkeys(("regions", "disagreements", "contradictions", "gaps", "undecided"), 0)
    tally = {f"{status} at span {span:g}": 0 for span in SPANS for status in ("grid unsafe", "box unsafe", "gap")}
    for x, label in zip(*_right([network], "guarantee", seed, images, count), strict=True):
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
            inside = low + (high - low) * torch.rand(SAMPLES, len(low), generator=draws, dtype=torch.float64)
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


def falsify(
    seed: int, model: str, kind: str, strength: float, count: int, epochs: int, images: Sizes
) -> dict[str, Any]:
    """One way of looking for counterexamples, on the first images that the network gets right."""
    import torch

    network, accuracy = _trained(model, seed, epochs, tuple(images))
    pixels, labels = _right([network], model, seed, images, count)
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
    return {
        "success": len(broken) / len(found),
        # As the paper measures: the root of the mean square, and the mean absolute change.
        "L2": mean([float(torch.linalg.vector_norm(c)) / size**0.5 for c in broken]) if broken else None,
        "L1": mean([float(c.abs().mean()) for c in broken]) if broken else None,
        "numbers changed": mean([float((c != 0).sum()) for c in broken]) if broken else None,
        "each L1": [None if c is None else float(c.abs().mean()) for c in changes],
        "validated": _validated(network, found, labels),
        "forward passes": tried / len(found),
        "seconds": seconds / len(found),
        "accuracy": accuracy,
    }


def _validated(network: Network, witnesses: Sequence[Tensor | None], labels: Tensor) -> float | None:
    """The share of the counterexamples that are some for the network as it runs, in float32, too."""
    single = copy.deepcopy(network.double).float()
    held = [
        float(single(w.float()[None]).argmax() != label)
        for w, label in zip(witnesses, labels, strict=True)
        if w is not None
    ]
    return mean(held) if held else None


def _witness(
    network: Network, x: Tensor, label: int, kind: str, strength: float, draw: int
) -> tuple[Tensor | None, float]:
    """A counterexample or nothing, and how many points the network was evaluated at."""
    import torch

    from netwright.seeding import stream
    from netwright.train.attacks import fgsm, jsma
    from netwright.verify import DLV, Region, grid_search
    from netwright.verify.grid import other_class
    from netwright.verify.layerwise import ranking

    flat = x.double().flatten()
    if kind in ("FGSM", "JSMA"):
        passes: list[Any] = []
        with network.double.register_forward_pre_hook(lambda *_: passes.append(None)):
            if kind == "FGSM":
                made = fgsm(network.double, x.double()[None], torch.tensor([label]), strength)[0]
            else:
                made = jsma(network.double, x.double(), label, strength)
        wrong = bool(other_class(network.logits(made[None]), label)[0])
        return (made if wrong else None), len(passes)
    if kind == "points":
        count = (2 * STEPS + 1) ** int(strength)  # as many as a grid of so many numbers has
        generator = stream(draw, "points")
        for part in range(0, count, 1024):
            change = (2 * torch.rand(min(1024, count - part), len(flat), generator=generator) - 1) * REACH
            points = (flat.float() + change).clamp(0, 1).double()
            # In float32 first, at half the cost; what is found counts in float64.
            likely = other_class(network.single(points.reshape(-1, *x.shape)), label).nonzero().flatten()
            changed = likely[other_class(network.logits(points[likely]), label)] if len(likely) else likely
            if len(changed):
                return points[changed[0]].reshape(x.shape), part + int(changed[0]) + 1
        return None, count
    if kind == "layerwise":
        # The authors' tool: five numbers at a time, each over its whole range, of which the best corner is kept.
        found = DLV(network, mode="features", features=int(strength)).verify(x, label)
        return found.witness, found.n_points
    selectors: dict[str, Any] = {"tool's": "activation", "random": "random", "gradient's": "gradient"}
    dims = ranking(network, flat, 0, selectors[kind], label, draw)[: int(strength)]
    region = Region(tuple(dims), REACH / STEPS, STEPS, bounds=(0.0, 1.0))
    grid = grid_search(network, flat, region, label=label)
    return (None if grid.witness is None else grid.witness.reshape(x.shape)), grid.n_points


def layer_search(seed: int, start: int, count: int, timeout: float, epochs: int, images: Sizes) -> dict[str, Any]:
    """The search of the paper from the input, or from the first hidden layer with counterexamples taken back."""
    from netwright.verify import DLV

    network, accuracy = _trained("MLP", seed, epochs, tuple(images))
    search = DLV(network, start, n_dims=5, selector="activation", timeout=timeout, steps=1)
    pixels, labels = _right([network], "MLP", seed, images, count)
    results = [search.verify(x, int(y)) for x, y in zip(pixels, labels, strict=True)]
    broken = [result for result in results if result.status == "unsafe"]
    spurious = [line["spurious"] for result in results for line in result.stats.get("layers", [])]
    return {
        "success": len(broken) / len(results),
        "each": [result.status == "unsafe" for result in results],
        "validated": _validated(network, [result.witness for result in results], labels),
        "L2": mean([float(r.distance or 0.0) / 28 for r in broken]) if broken else None,
        "spurious": sum(spurious),
        "seconds": mean([result.seconds for result in results]),
        "accuracy": accuracy,
    }


def solve(
    seed: int, sparsity: float, others: Sequence[float], count: int, timeout: float, epochs: int, images: Sizes
) -> dict[str, Any]:
    """What the exact engine needs for a network with zeros, on images that those of other sparsities get right too."""
    from netwright.verify import smt_verify

    networks = {each: _trained("solver", seed, epochs, tuple(images), each) for each in sorted({sparsity, *others})}
    network, accuracy = networks[sparsity]
    pixels, labels = _right([found for found, _ in networks.values()], "solver", seed, images, count)
    found = [
        smt_verify(network, (x - RADIUS).clamp(0, 1), (x + RADIUS).clamp(0, 1), int(y), timeout, attack=False)
        for x, y in zip(pixels, labels, strict=True)
    ]

    def decided(status: str) -> float:
        return mean([float(each.status == status) for each in found])

    # None where bounds decide and the solver is never asked.
    asked = [each.stats.get("solver_seconds") for each in found]
    spent = [None if seconds is None else min(timeout, seconds) for seconds in asked]
    known = [seconds for seconds in spent if seconds is not None]
    return {
        "solver seconds": mean([seconds or 0.0 for seconds in spent]),
        "asked": float(len(known)),
        "solver seconds where asked": mean(known) if known else None,
        "each": spent,
        "seconds": mean([each.stats["seconds"] for each in found]),
        "units": mean([float(each.stats.get("units", 0)) for each in found]),
        "rivals": mean([float(each.stats["rivals"]) for each in found]),
        "safe": decided("safe"),
        "unsafe": decided("unsafe"),
        "unknown": decided("unknown"),
        "accuracy": accuracy,
        "success": decided("unsafe"),
    }
