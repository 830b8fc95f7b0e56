"""From an activation back to an input that leads there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.verify.bounds import analyse
from netwright.verify.encoding import Encoding
from netwright.verify.forms import TooLargeError
from netwright.verify.network import Network, network_of
from netwright.verify.region import Region

NEAR = 0.05  # of the distance: where halving it ends


@dataclasses.dataclass(frozen=True)
class BackMapped:
    """An activation taken back to an earlier layer.

    Attributes:
        status: ``"found"``, ``"unreachable"`` (no point of the region is mapped there) or ``"unknown"``.
        point: The point, flat, in float64.
        distance: Its L1 distance from the middle of the region.
    """

    status: Literal["found", "unreachable", "unknown"]
    point: Tensor | None = None
    distance: float | None = None


def back_map(
    model: nn.Module | Network,
    layer: int,
    target: Float[Tensor, " numbers"],
    x: Float[Tensor, " *shape"],
    region: Region,
    tol: float = 1e-4,
    *,
    dims: Sequence[int] | None = None,
    timeout: float = 10.0,
) -> BackMapped:
    """A point of a region that a network maps to a given activation of a deeper layer.

    All layers in between are encoded as they are, in one question; then the L1 distance is halved as long as there are
    points and time.

    Args:
        model: Piecewise linear up to the layer.
        layer: Of the activation, above ``region.layer``.
        target: The activation, flat.
        x: The middle of the region: the activation of one input at ``region.layer``.
        region: Where to look; its norm is not heeded, only its box.
        tol: How far each number may be off.
        dims: Which numbers of the activation count; all by default.
        timeout: Seconds.

    Raises:
        ImportError: If Z3 is not installed.
        ValueError: If the layer does not lie behind the region's, or ``tol`` is not positive.
        TypeError: If a layer on the way is not piecewise linear.
    """
    if not tol > 0:
        raise ValueError(f"tol must be > 0, got {tol}")
    network = network_of(model, x.shape)
    if not region.layer < layer < len(network.layers):
        raise ValueError(f"layer must lie in {region.layer + 1}..{len(network.layers) - 1}, got {layer}")
    deadline = time.monotonic() + timeout
    centre = x.detach().double().flatten()
    low, high = region.box(centre)
    try:
        analysis = analyse(network, low, high, first=region.layer, last=layer)
    except TooLargeError:
        return BackMapped("unknown")
    assert analysis.basis is not None
    chosen = torch.arange(len(target)) if dims is None else torch.as_tensor(dims)
    goal = target.detach().double().flatten()[chosen]
    forms = analysis.layers[-1].matrix(analysis.basis)[chosen]
    reached = analysis.layers[-1]
    if bool(((reached.low.flatten()[chosen] > goal + tol) | (reached.high.flatten()[chosen] < goal - tol)).any()):
        return BackMapped("unreachable")
    encoding = Encoding(analysis.basis)
    room = tol + encoding.shortened_by(forms)
    if not encoding.require(forms, deadline):
        return BackMapped("unknown")
    for form, value, each in zip(forms, goal.tolist(), room.tolist(), strict=True):
        term, near = encoding.linear(form), encoding.number(value)
        encoding.solver.add(term >= near - encoding.number(each), term <= near + encoding.number(each))
    best = _nearest(encoding, centre[analysis.dims], deadline)
    if not isinstance(best, Tensor):
        return BackMapped(best)
    point = centre.clone()
    point[analysis.dims] = torch.minimum(torch.maximum(best, low[analysis.dims]), high[analysis.dims])
    return BackMapped("found", point, float((point - centre).abs().sum()))


def _nearest(encoding: Encoding, centre: Tensor, deadline: float) -> Tensor | Literal["unreachable", "unknown"]:
    """A solution as near to the centre in L1 as halving finds."""
    found = encoding.check(deadline, lambda: None)
    if found != "sat":
        return "unreachable" if found == "unsat" else "unknown"
    best = encoding.inputs(centre)
    z3, distances = encoding.z3, []
    for place, variable in encoding.variables.items():
        if place <= encoding.basis.inputs:
            d = z3.Real(f"d{place}", ctx=encoding.context)
            i = place - 1
            away = variable * encoding.number(float(encoding.width[i])) - encoding.number(
                float(centre[i] - encoding.low[i])
            )
            encoding.solver.add(d >= away, d >= -away)
            distances.append(d)
    below = 0.0
    while distances:
        far = float((best - centre).abs().sum())
        if far - below <= NEAR * far:
            break
        half = (far + below) / 2
        encoding.solver.push()
        encoding.solver.add(z3.Sum(distances) <= encoding.number(half))
        found = encoding.check(deadline, lambda: None)
        if found == "sat":
            best = encoding.inputs(centre)
        elif found == "unsat":
            below = half
        else:
            break
        encoding.solver.pop()
    return best
