"""From an activation back to an input that leads there.

Around any input a piecewise-linear network is affine, a(x') = a(x) + J (x' - x), and the nearest input that such a map
takes to the target is a linear program. A few of these, each at the solution of the one before, mostly end at an input
that the network itself maps there. Where they do not, Z3 is asked about all pieces at once, which also proves that
there is no such input.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.seeding import stream
from netwright.verify.bounds import analyse
from netwright.verify.encoding import Encoding
from netwright.verify.forms import TooLargeError
from netwright.verify.network import Network, network_of
from netwright.verify.region import Region

PROGRAMS, STARTS = 12, 4  # linear programs from one place, and places to begin at
ROWS = 256  # activations whose derivatives are taken at once
MOST = 2**22  # numbers in a matrix of derivatives
OUTWEIGHS = 1e4  # how much more an activation that is missed counts than distance


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

    Linear programs look for one near the middle of the region. Where they find none, all layers in between are encoded
    as they are, in one question to Z3, and linear programs go on from its answer. The distance is the least one nearby;
    another point may be nearer.

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
        ImportError: If Z3 is needed and not installed.
        ValueError: If the layer does not lie behind the region's, the region does not fit ``x``, the target is not
            flat, finite and as long as the layer, ``dims`` name numbers that it has not, or ``tol`` is not positive.
        TypeError: If a layer on the way is not piecewise linear.
    """
    if not tol > 0:
        raise ValueError(f"tol must be > 0, got {tol}")
    network = network_of(model, x.shape)
    if not region.layer < layer < len(network.layers):
        raise ValueError(f"layer must lie in {region.layer + 1}..{len(network.layers) - 1}, got {layer}")
    deadline = time.monotonic() + timeout
    centre = x.detach().double().flatten()
    region.check(centre)
    size = network.layer(layer).size
    if target.shape != (size,):
        raise ValueError(f"target must hold {size} numbers, as layer {layer} does, got shape {tuple(target.shape)}")
    if not bool(target.isfinite().all()):
        raise ValueError("target must be finite, got a number that is not")
    chosen = torch.arange(size) if dims is None else torch.as_tensor(dims)
    if not bool(((chosen >= 0) & (chosen < size)).all()):
        raise ValueError(f"dims must lie in 0..{size - 1}, got {chosen.tolist()}")
    low, high = region.box(centre)
    try:
        analysis = analyse(network, low, high, first=region.layer, last=layer, deadline=deadline)
    except (TooLargeError, TimeoutError):
        return BackMapped("unknown")
    assert analysis.basis is not None
    goal = target.detach().double().flatten()[chosen]
    forms = analysis.layers[-1].matrix(analysis.basis)[chosen]
    reached = analysis.layers[-1]
    if bool(((reached.low.flatten()[chosen] > goal + tol) | (reached.high.flatten()[chosen] < goal - tol)).any()):
        return BackMapped("unreachable")
    programs = _Programs(network, region.layer, layer, chosen, goal, (low, centre, high), tol, deadline)
    point = programs.run()
    if point is not None:
        return BackMapped("found", point, float((point - centre).abs().sum()))
    encoding = Encoding(analysis.basis)
    room = tol + encoding.shortened_by(forms)
    if not encoding.require(forms, deadline):
        return BackMapped("unknown")
    for form, value, each in zip(forms, goal.tolist(), room.tolist(), strict=True):
        term, near = encoding.linear(form), encoding.number(value)
        encoding.constraints += [term >= near - encoding.number(each), term <= near + encoding.number(each)]
    answer = encoding.check(deadline, lambda: None)
    if answer != "sat":
        return BackMapped("unreachable" if answer == "unsat" else "unknown")
    point = centre.clone()
    point[analysis.dims] = encoding.inputs(centre[analysis.dims])
    point = torch.minimum(torch.maximum(point, low), high)
    nearer = programs.from_(point)
    point = point if nearer is None else nearer
    return BackMapped("found", point, float((point - centre).abs().sum()))


@dataclasses.dataclass
class _Programs:
    """Linear programs, each where the one before ended."""

    network: Network
    first: int
    layer: int
    chosen: Tensor
    goal: Tensor
    box: tuple[Tensor, Tensor, Tensor]  # low, centre, high
    tol: float
    deadline: float

    def run(self) -> Tensor | None:
        """A point that the network maps to the goal, if one is found."""
        low, centre, high = self.box
        if len(self.chosen) * int((low < high).sum()) > MOST:
            return None
        for start in range(STARTS):
            share = torch.rand(len(low), generator=stream(start, "back"), dtype=torch.float64)
            point = self.from_(centre if start == 0 else low + (high - low) * share)
            if point is not None:
                return point
        return None

    def from_(self, x: Tensor) -> Tensor | None:
        """Likewise, from one place on."""
        best = None
        for _ in range(PROGRAMS):
            missed = self._missed(x)
            wanted = self._solve(x)
            if wanted is None:
                break
            for share in (1.0, 0.5, 0.25, 0.125):
                moved = x + share * (wanted - x)
                left = self._missed(moved)
                hit = float(left.max()) <= self.tol
                if hit or (best is None and float(left.sum()) < 0.99 * float(missed.sum())):
                    break
            else:
                break
            if hit and best is not None and self._away(moved) > 0.99 * self._away(best):
                break
            x, best = moved, moved if hit else best
        return best

    def _away(self, x: Tensor) -> float:
        return float((x - self.box[1]).abs().sum())

    def _missed(self, x: Tensor) -> Tensor:
        return (self._values(x) - self.goal).abs()

    def _values(self, x: Tensor) -> Tensor:
        return self.network.forward(x[None], self.first, self.layer)[0, self.chosen]

    def _jacobian(self, x: Tensor) -> Tensor:
        rows = []
        for part in self.chosen.split(ROWS):
            inputs = x.repeat(len(part), 1).requires_grad_()
            out = self.network.forward(inputs, self.first, self.layer)
            rows.append(torch.autograd.grad(out[torch.arange(len(part)), part].sum(), inputs)[0])
        return torch.cat(rows)

    def _solve(self, x: Tensor) -> Tensor | None:
        """Nearest point to the centre that the map around ``x`` takes to the goal, or as near to it as possible."""
        from scipy.optimize import linprog

        low, centre, high = self.box
        free = (low < high).nonzero().flatten()
        slope = self._jacobian(x)[:, free].numpy()
        # x' = centre + p - n with p, n >= 0; each activation may be missed by a slack of its own.
        there = (self._values(x) - self.goal).numpy() + slope @ (centre - x)[free].numpy()
        missed = -np.eye(len(slope))
        matrix = np.block([[slope, -slope, missed], [-slope, slope, missed]])
        room = 0.9 * self.tol
        most = [(high - centre)[free].tolist(), (centre - low)[free].tolist(), [None] * len(slope)]
        left = self.deadline - time.monotonic()
        if left <= 0:
            return None
        found = linprog(
            [1.0] * (2 * len(free)) + [OUTWEIGHS] * len(slope),
            A_ub=matrix,
            b_ub=np.concatenate([room - there, room + there]),
            bounds=[(0.0, each) for each in itertools.chain(*most)],
            options={"time_limit": left},
        )
        if found.x is None:
            return None
        up, down = torch.from_numpy(found.x[: 2 * len(free)]).reshape(2, -1)
        point = centre.clone()
        point[free] += up - down
        return torch.minimum(torch.maximum(point, low), high)
