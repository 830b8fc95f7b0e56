"""One input and the region around it, and what a verdict about them needs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from netwright.verify.back import back_map
from netwright.verify.grid import other_class
from netwright.verify.network import Network
from netwright.verify.region import Region, check_within, size_of
from netwright.verify.result import VerificationResult

TOLERANCE = 1e-6  # of the largest activation: how far an input may miss an activation that it is to lead to


@dataclasses.dataclass
class Point:
    """One input under verification.

    Attributes:
        network: The network.
        x: The input, float64.
        label: Its class.
        region: What is asked about. No witness lies outside it.
        alpha: The activation in its middle, flat, float64.
        inputs: Range of inputs to which activations of a hidden layer may be taken back.
        deadline: When the time is over.
        begin: When it began.
    """

    network: Network
    x: Tensor
    label: int
    region: Region
    alpha: Tensor
    inputs: tuple[float, float] | None
    deadline: float
    begin: float

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(1e-3, self.deadline - time.monotonic())

    def check(self) -> None:
        """Refuses an input or a region that does not fit.

        Raises:
            ValueError: If a dimension lies outside its layer, or a number outside its bounds.
        """
        self.region.check(self.alpha)
        if self.region.layer and self.inputs is not None:
            check_within(self.x, self.inputs)

    def result(self, status: str, scope: str, **more: Any) -> VerificationResult:
        """A verdict without a witness."""
        seconds = time.monotonic() - self.begin
        return VerificationResult(status, scope, self.label, seconds=seconds, **more)  # type: ignore[arg-type]

    def unsafe(
        self, witness: Tensor, scope: str, reason: str, distance: float | None = None, **more: Any
    ) -> VerificationResult:
        """A verdict with a witness that the network itself confirms."""
        logits = self.network.logits(witness[None])[0]
        rivals = logits.clone()
        rivals[self.label] = -math.inf
        if distance is None:
            distance = float(size_of((witness - self.x.flatten())[None], self.region.norm))
        found = {"witness": witness.reshape(self.x.shape), "witness_class": int(rivals.argmax()), "distance": distance}
        return self.result("unsafe", scope, reason=reason, **found, **more)

    def taken_back(self, layer: int, activation: Tensor, dims: Sequence[int] | None = None) -> Tensor | None:
        """An input of another class that lies in the region, or leads into it, and on towards an activation.

        An activation behind the region's layer is first taken back to a point of the region; of a hidden region, that
        point is then taken back to an input with all its numbers, not only those that vary, since an input that changes
        the others has an activation outside the region.

        Args:
            layer: Of the activation, the region's or a later one.
            activation: Flat.
            dims: Which of its numbers count, where it lies behind the region; all by default.

        Returns:
            The input, flat; None if none was found.
        """
        if layer > self.region.layer:
            tol = TOLERANCE * max(1.0, float(activation.abs().max()))
            found = back_map(
                self.network, layer, activation, self.alpha, self.region, tol, dims=dims, timeout=self.left
            )
            if found.point is None or not self.has_other_class(found.point):
                return None
            activation = found.point
        if self.region.layer == 0:
            return activation if self.region.holds(activation, self.alpha) else None
        tol = TOLERANCE * max(1.0, float(activation.abs().max()))
        low, high = self.inputs or self._window()
        everywhere = Region(tuple(range(self.x.numel())), span=high - low, bounds=(low, high))
        found = back_map(self.network, self.region.layer, activation, self.x, everywhere, tol, timeout=self.left)
        if found.point is None:
            return None
        reached = self.network.activation(found.point, self.region.layer)
        led_there = self.region.holds(reached, self.alpha, slack=2 * tol)
        return found.point if led_there and self.has_other_class(found.point, 0) else None

    def _window(self) -> tuple[float, float]:
        """Where to look for inputs that have no range of their own: three times as wide as what there is."""
        low, high = float(self.x.min()), float(self.x.max())
        width = (high - low) or 1.0
        return low - width, high + width

    def has_other_class(self, activation: Tensor, layer: int | None = None) -> bool:
        """Whether an activation of a layer, the region's by default, has another class."""
        layer = self.region.layer if layer is None else layer
        found = self.network.forward(activation[None], layer) if layer else self.network.logits(activation[None])
        return bool(other_class(found, self.label)[0])
