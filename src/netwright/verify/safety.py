"""Whether any of a family of manipulations of one input can change its class, decided layer by layer.

Huang, Kwiatkowska, Wang and Wu, "Safety Verification of Deep Neural Networks", CAV 2017, arXiv:1610.06940. A region
eta_k around the activation alpha_{x,k} of an input is made of discrete moves; the network is safe there,

    N, eta_k, Delta_k |= x    iff    every point of eta_k that ladders of moves reach has the class of x,

which an exhaustive search decides. Region and moves are mapped from layer to layer, and a counterexample found deep is
taken back to an input by Z3 and counts only if the network itself, in float64, gives it another class. An exact engine
decides the whole box instead of its grid.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from netwright.checks import one_of
from netwright.verify.exact import smt_verify
from netwright.verify.greedy import FEATURE, greedy_search
from netwright.verify.grid import grid_search, other_class
from netwright.verify.layer_search import DLV
from netwright.verify.network import Network, network_of
from netwright.verify.point import Point
from netwright.verify.region import Region
from netwright.verify.result import VerificationResult

__all__ = ["DLV", "verify_point"]

Engine = Literal["grid", "smt", "bounds", "layerwise"]
ENGINES = ("grid", "smt", "bounds", "layerwise")


def verify_point(
    model: nn.Module | Network,
    x: Float[Tensor, " *shape"],
    region: Region,
    engine: Engine = "grid",
    max_points: int = 10**7,
    timeout: float = 60.0,
    *,
    label: int | None = None,
    inputs: tuple[float, float] | None = (0.0, 1.0),
) -> VerificationResult:
    """Whether a region around one input has one class.

    Args:
        model: Gives (batch, classes).
        x: One input, without a batch.
        region: Around the activation of ``x`` at ``region.layer``.
        engine: ``"grid"`` evaluates every point of the grid; ``"smt"`` decides the whole box, between the points too;
            ``"bounds"`` is the part of it that needs no solver; ``"layerwise"`` is the tool's greedy search, which
            never says safe.
        max_points: Most points of a grid.
        timeout: Seconds, > 0.
        label: The class; that of ``x`` by default.
        inputs: Range of inputs to which counterexamples of a hidden layer may be taken back, ``x`` among them; None for
            any.

    Raises:
        ValueError: If the region does not fit, ``x`` is not finite or outside the bounds, there are too many points, or
            an exact engine is given a norm that is no box.
        TypeError: If the exact engine, or a hidden layer, meets an operation that it does not know.
        ImportError: If ``"smt"`` is asked for without Z3.

    Example:
        >>> import torch
        >>> net = nn.Linear(1, 2)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0], [-1.0]])), net.bias.data.copy_(torch.tensor([0.0, 1.0]))
        >>> x = torch.tensor([0.8])  # x against 1 - x
        >>> print(verify_point(net, x, Region(dims=(0,), span=0.2)))
        safe: every point of the box has class 0
        >>> print(verify_point(net, x, Region(dims=(0,), span=0.2, steps=2)))
        unsafe: an input at distance 0.4 has class 1, not 0
    """
    begin = time.monotonic()
    one_of("engine", engine, ENGINES)
    if not timeout > 0:
        raise ValueError(f"timeout must be > 0 seconds, got {timeout}")
    if not bool(x.isfinite().all()):
        raise ValueError("x must be finite, got a number that is not")
    network = network_of(model, x.shape)
    network.layer(region.layer)
    logits = network.logits(x[None])
    label = int(logits.argmax()) if label is None else label
    if not 0 <= label < network.classes:
        raise ValueError(f"label must lie in 0..{network.classes - 1}, got {label}")
    alpha = x.double().flatten() if region.layer == 0 else network.activation(x, region.layer)
    point = Point(network, x.detach().double(), label, region, alpha, inputs, begin + timeout, begin)
    if bool(other_class(logits, label)[0]):
        return point.unsafe(x.double().flatten(), "grid", "the input itself has another class", 0.0)
    point.check()
    if engine == "layerwise":
        return greedy_search(point, [region.dims[i : i + FEATURE] for i in range(0, len(region.dims), FEATURE)])
    if engine == "grid":
        return _by_grid(point, max_points)
    return _by_box(point, engine == "smt")


def _by_grid(point: Point, max_points: int) -> VerificationResult:
    alpha, region = point.alpha, point.region
    found = grid_search(point.network, alpha, region, label=point.label, max_points=max_points, timeout=point.left)
    more: dict[str, Any] = {
        "n_points": found.n_points, "stats": {"pruned": found.n_pruned}, "layer": region.layer,
        "covers_input": region.layer == 0,
    }  # fmt: skip
    if found.witness is None:
        if not found.finished:
            return point.result("unknown", "grid", reason="the time was over", **more)
        reason = "bounds" if found.whole_box else "every point was evaluated"
        return point.result("safe", "box" if found.whole_box else "grid", reason=reason, **more)
    if region.layer == 0:
        return point.unsafe(found.witness, "grid", "a point of the grid", found.distance, **more)
    return _deep(point, found.witness, "grid", more)


def _deep(point: Point, activation: Tensor, scope: str, more: dict[str, Any]) -> VerificationResult:
    layer = point.region.layer
    witness = point.taken_back(layer, activation)
    if witness is None:
        reason = f"an activation of layer {layer} has another class, but no input was found that leads there"
        return point.result("unknown", scope, reason=reason, **more)
    return point.unsafe(witness, scope, f"taken back from layer {layer}", **more)


def _by_box(point: Point, solver: bool) -> VerificationResult:
    alpha, region = point.alpha, point.region
    if region.norm not in (None, "inf"):
        raise ValueError(f'an exact engine takes boxes: norm must be None or "inf", got {region.norm}')
    low, high = region.box(alpha)
    if region.layer == 0:
        low, high = low.reshape(point.x.shape), high.reshape(point.x.shape)
    found = smt_verify(point.network, low, high, point.label, point.left, layer=region.layer, solver=solver)
    more: dict[str, Any] = {"stats": found.stats, "layer": region.layer, "covers_input": region.layer == 0}
    if found.status != "unsafe":
        return point.result(found.status, "box", reason=found.reason, **more)
    assert found.witness is not None
    if region.layer == 0:
        return point.unsafe(found.witness, "box", found.reason, **more)
    return _deep(point, found.witness, "box", more)
