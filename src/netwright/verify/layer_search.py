"""The search of the paper: grid after grid, each mapped from the layer before."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from netwright.console import task
from netwright.verify.greedy import greedy_search
from netwright.verify.grid import grid_search, other_class
from netwright.verify.layerwise import Selector, map_region, ranking
from netwright.verify.network import Network, network_of
from netwright.verify.point import Point
from netwright.verify.region import Region
from netwright.verify.result import VerificationResult


class DLV:
    """The layer-by-layer search of the paper for one model.

    Args:
        model: Gives (batch, classes).
        start_layer: Where the first region lies; 0 is the input.
        end_layer: The last layer that is searched; ``start_layer`` by default.
        n_dims: Numbers that vary at each layer.
        selector: Which: ``"activation"``, ``"gradient"``, ``"random"``, or the numbers themselves, which then all vary
            at the first layer.
        refine: How often the spans of a layer are halved after a counterexample that no input leads to.
        span: Length of a step at the first layer; the bounds' whole width at the input, else the activation's range.
        steps: Steps to each side at the first layer.
        bounds: Range of inputs; None for any.
        mode: ``"exhaustive"``; or ``"blocks"``: exhaustive for ``n_dims`` numbers, then for the next ones, up to
            ``features`` times, which takes the sum of the grids instead of their product and says nothing of changes in
            two blocks at once; or ``"features"``: the corners of ``n_dims`` numbers, of which the one with the least
            margin is kept, then of the next numbers, up to ``features`` times. That is greedy and never says safe.
        features: How many times.
        max_steps: Most steps to one side of a region that was mapped, whose spans grow where more are needed; None for
            any number.
        max_points: Most points of a grid.
        timeout: Seconds for one input.
        seed: Of a random choice.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> DLV(net, n_dims=2, span=0.01).verify(torch.full((4,), 0.5)).status
        'safe'
    """

    def __init__(
        self,
        model: nn.Module | Network,
        start_layer: int = 0,
        end_layer: int | None = None,
        n_dims: int = 5,
        selector: Selector | Sequence[int] = "activation",
        refine: int = 2,
        *,
        span: float | None = None,
        steps: int = 1,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        mode: Literal["exhaustive", "blocks", "features"] = "exhaustive",
        features: int = 150,
        max_steps: int | None = 2,
        max_points: int = 200_000,
        timeout: float = 60.0,
        seed: int = 0,
    ):
        end = start_layer if end_layer is None else end_layer
        least = {"start_layer": (start_layer, 0), "end_layer": (end, start_layer), "n_dims": (n_dims, 1)}
        least |= {"refine": (refine, 0), "steps": (steps, 1), "features": (features, 1)}
        least |= {} if max_steps is None else {"max_steps": (max_steps, 1)}
        for name, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"{name} must be >= {bound}, got {value}")
        if not timeout > 0:
            raise ValueError(f"timeout must be > 0 seconds, got {timeout}")
        if mode not in ("exhaustive", "blocks", "features"):
            raise ValueError(f'mode must be "exhaustive", "blocks" or "features", got {mode!r}')
        if span is not None and not (span > 0 and math.isfinite(span)):
            raise ValueError(f"span must be > 0 and finite, got {span}")
        self.model, self.start_layer, self.end_layer, self.n_dims = model, start_layer, end, n_dims
        self.selector, self.refine, self.span, self.steps, self.bounds = selector, refine, span, steps, bounds
        self.mode, self.features, self.max_steps = mode, features, max_steps
        self.max_points, self.timeout, self.seed = max_points, timeout, seed

    def verify(self, x: Float[Tensor, " *shape"], label: int | None = None) -> VerificationResult:
        """Searches the regions around one input.

        Args:
            x: One input, without a batch.
            label: Its class; what the network says by default.

        Returns:
            The verdict. Safe means that the grid of ``start_layer`` has one class (``covers_input`` says whether that
            is the input), and that the grids mapped from it have too; ``stats["layers"]`` has a line for each. Of
            blocks it means that each of them is safe by itself, and ``covers_input`` is false.

        Raises:
            ValueError: If ``x`` is not finite or outside the bounds, a layer or a class is none, or there are too many
                points.
        """
        begin = time.monotonic()
        if not bool(x.isfinite().all()):
            raise ValueError("x must be finite, got a number that is not")
        network = network_of(self.model, x.shape)
        network.layer(self.end_layer)
        logits = network.logits(x[None])
        label = int(logits.argmax()) if label is None else label
        if not 0 <= label < network.classes:
            raise ValueError(f"label must lie in 0..{network.classes - 1}, got {label}")
        alpha = x.double().flatten() if self.start_layer == 0 else network.activation(x, self.start_layer)
        order = self._order(network, alpha, label)
        if self.mode != "exhaustive":
            order = order[: self.n_dims * self.features]
        elif isinstance(self.selector, str):
            order = order[: self.n_dims]
        region = self._region(order, alpha)
        point = Point(network, x.detach().double(), label, region, alpha, self.bounds, begin + self.timeout, begin)
        if bool(other_class(logits, label)[0]):
            return point.unsafe(x.double().flatten(), "grid", "the input itself has another class", 0.0)
        point.check()
        blocks = [order[i : i + self.n_dims] for i in range(0, len(order), self.n_dims)]
        if self.mode == "features":
            return greedy_search(point, blocks)
        return self._in_blocks(point, blocks) if self.mode == "blocks" else self._exhaustive(point)

    def _in_blocks(self, point: Point, blocks: list[list[int]]) -> VerificationResult:
        """Block after block, each around the input itself."""
        lines: list[dict[str, Any]] = []
        points, unknown = 0, ""
        for number, block in enumerate(blocks):
            if time.monotonic() > point.deadline:
                unknown = unknown or "the time was over"
                break
            found = self._exhaustive(dataclasses.replace(point, region=self._region(block, point.alpha)))
            points += found.n_points
            lines += [{"block": number, **line} for line in found.stats["layers"]]
            if found.status == "unsafe":
                return dataclasses.replace(found, n_points=points, stats={"layers": lines, "blocks": number + 1})
            unknown = unknown or (found.reason if found.status == "unknown" else "")
        more: dict[str, Any] = {"layer": self.start_layer, "covers_input": False, "n_points": points}
        more["stats"] = {"layers": lines, "blocks": len(blocks)}
        if unknown:
            return point.result("unknown", "grid", reason=unknown, **more)
        reason = f"each of {len(blocks)} blocks has this class by itself; nothing is proved of two of them together"
        return point.result("safe", "grid", reason=reason, **more)

    def _order(self, network: Network, alpha: Tensor, label: int) -> list[int]:
        if isinstance(self.selector, str):
            return ranking(network, alpha, self.start_layer, self.selector, label, self.seed)
        return [int(i) for i in self.selector]

    def _region(self, dims: Sequence[int], alpha: Tensor) -> Region:
        bounds = self.bounds if self.start_layer == 0 else None
        return Region(tuple(dims), self._span(alpha), self.steps, layer=self.start_layer, bounds=bounds)

    def _span(self, alpha: Tensor) -> float:
        if self.span is not None:
            return self.span
        if self.start_layer == 0 and self.bounds is not None:
            return self.bounds[1] - self.bounds[0]
        return float(alpha.max() - alpha.min()) or 1.0

    def _exhaustive(self, point: Point) -> VerificationResult:
        network, start, alpha = point.network, self.start_layer, point.alpha
        region: Region = point.region
        lines: list[dict[str, Any]] = []
        covers, points = True, 0
        with task("layers", total=self.end_layer - start + 1) as bar:
            for layer in range(start, self.end_layer + 1):
                line: dict[str, Any] = {"layer": layer, "dims": len(region.dims), "covers": covers, "spurious": 0}
                lines.append(line)
                found = self._search(point, alpha, region, line)
                points += line["points"]
                more: dict[str, Any] = {"n_points": points, "layer": start, "stats": {"layers": lines}}
                if isinstance(found, Tensor):
                    return point.unsafe(found, "grid", f"found at layer {layer}", covers_input=start == 0, **more)
                if found:
                    return point.result("unknown", "grid", reason=found, covers_input=False, **more)
                bar.advance()
                if layer == self.end_layer:
                    break
                try:
                    mapped = map_region(
                        network, alpha, region, self.n_dims, self._selector, point.label, max_steps=self.max_steps,
                        seed=self.seed, deadline=point.deadline,
                    )  # fmt: skip
                except TimeoutError:
                    return point.result("unknown", "grid", reason="the time was over", covers_input=False, **more)
                alpha = network.forward(alpha[None], layer, layer + 1)[0]
                covers = covers and mapped.covers
                if mapped.region is None:
                    break
                region = mapped.region
        stats = {"layers": lines}
        return point.result(
            "safe", "grid", layer=start, covers_input=start == 0, n_points=points, stats=stats,
            reason="every point of every layer searched has this class",
        )  # fmt: skip

    @property
    def _selector(self) -> Selector:
        return self.selector if isinstance(self.selector, str) else "activation"

    def _search(self, point: Point, alpha: Tensor, region: Region, line: dict[str, Any]) -> Tensor | str:
        """An input of another class, why nothing is known, or nothing."""
        line["points"] = 0
        for attempt in range(self.refine + 1):
            found = grid_search(
                point.network, alpha, region, label=point.label, max_points=self.max_points, timeout=point.left
            )
            line["points"] += found.n_points
            if not found.finished:
                return "the time was over"
            if found.witness is None:
                return ""
            if region.layer == 0:
                return found.witness
            witness = point.taken_back(region.layer, found.witness, region.dims)
            if witness is not None:
                return witness
            line["spurious"] += 1
            if time.monotonic() > point.deadline:
                return "the time was over"
            spans, steps = (region.spans / 2).tolist(), (2 * region.limits).tolist()
            finer = Region(region.dims, tuple(spans), tuple(steps), layer=region.layer, bounds=region.bounds)
            if attempt == self.refine or finer.count > self.max_points:
                break
            region = finer
        return f"counterexamples at layer {region.layer} were found, but no input that leads to one"
