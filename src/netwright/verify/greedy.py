"""The search of the authors' tool: a few numbers at a time, to their outermost steps, of which the best is kept.

It follows one branch of the ladder tree and therefore never proves anything.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from netwright.console import task
from netwright.verify.bounds import flat_margin
from netwright.verify.grid import other_class
from netwright.verify.point import Point
from netwright.verify.region import size_of
from netwright.verify.result import VerificationResult

FEATURE = 5  # numbers that are changed together, as the tool does


def greedy_search(point: Point, blocks: Sequence[Sequence[int]]) -> VerificationResult:
    """Looks for another class among the corners of block after block, each from the corner of the least margin so far.

    Every corner lies in the point's region: a change that leaves its ball is shortened to it.

    Args:
        point: The input and its region.
        blocks: Numbers of the region that change together, in turn.

    Returns:
        Unsafe, or unknown.
    """
    region, layer = point.region, point.region.layer
    low, high = region.box(point.alpha)
    current, evaluated = point.alpha.clone(), 0
    more: dict[str, Any] = {"layer": layer, "covers_input": layer == 0, "stats": {"features": 0}}
    with task("features", total=len(blocks)) as bar:
        for number, block in enumerate(blocks, start=1):
            if time.monotonic() > point.deadline:
                return point.result("unknown", "grid", reason="the time was over", n_points=evaluated, **more)
            corners = _corners(current, low, high, block)
            if region.radius is not None:
                moved = corners - point.alpha
                size = size_of(moved, region.norm)[:, None].clamp(min=region.radius)
                corners = point.alpha + moved * (region.radius / size)
            logits = point.network.logits(corners) if layer == 0 else point.network.forward(corners, layer)
            evaluated += len(corners)
            more["stats"] = {"features": number}
            changed = other_class(logits, point.label).nonzero().flatten()
            if len(changed):
                witness = point.taken_back(layer, corners[int(changed[0])])
                if witness is not None:
                    return point.unsafe(witness, "grid", "a greedy search", n_points=evaluated, **more)
                reason = f"an activation of layer {layer} has another class, but no input was found that leads there"
                return point.result("unknown", "grid", reason=reason, n_points=evaluated, **more)
            current = corners[int(flat_margin(logits, point.label).argmin())]
            bar.advance()
    reason = f"no counterexample in {len(blocks)} features, which is no proof"
    return point.result("unknown", "grid", reason=reason, n_points=evaluated, **more)


def _corners(current: Tensor, low: Tensor, high: Tensor, block: Sequence[int]) -> Tensor:
    """``current`` with the numbers of a block at either end of the region, in all 2^n ways."""
    ends = torch.stack([low[list(block)], high[list(block)]])
    choice = torch.tensor(list(itertools.product((0, 1), repeat=len(block))))
    corners = current.repeat(len(choice), 1)
    corners[:, list(block)] = ends[choice, torch.arange(len(block))]
    return corners
