"""What the activations of a network are written in: inputs that vary, and units whose sign is open.

A ReLU that is on or off over the whole region is an affine map or nothing. Only those that may be either become
*units*, variables of their own beside the inputs, so that every activation of the network is an affine form

    a = c + sum_i a_i v_i,    v = (inputs that vary, units in the order in which they were met)

exactly. The range of a form follows by putting in for each unit, last first, a line above and a line below it
(Singh et al., "An Abstract Domain for Certifying Neural Networks", POPL 2019, doi:10.1145/3290354), until only inputs
are left.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from netwright.verify.deadline import check_deadline

# Far above the rounding errors of any sum here in float64, far below those of the network in float32.
WIDEN = 2.0**-40


@dataclasses.dataclass
class Units:
    """Units that do not depend on each other.

    Attributes:
        start: Column of the first one in a form.
        kind: ``"relu"``, or ``"max"`` over candidates.
        candidates: Forms over the columns before ``start``: of a ReLU its argument, (units, start); of a maximum
            (units, candidates, start).
        alive: Which candidates of a maximum there are, (units, candidates).
        low, high: Range of the argument of a ReLU, of a maximum itself; (units,).
    """

    start: int
    kind: str
    candidates: Tensor
    low: Float[Tensor, " units"]
    high: Float[Tensor, " units"]
    alive: Tensor | None = None

    @property
    def stop(self) -> int:
        """Column after the last one."""
        return self.start + len(self.low)

    def lines(self) -> tuple[Tensor, Tensor]:
        """A form that is nowhere below the units and one that is nowhere above them, (units, start) each."""
        if self.kind == "relu":
            slope = self.high / (self.high - self.low)
            above = self.candidates * slope[:, None]
            above[:, 0] -= slope * self.low
            # Of all lines below, the one that leaves the smaller triangle.
            return above, self.candidates * (self.high > -self.low)[:, None]
        above = torch.zeros_like(self.candidates[:, 0])
        above[:, 0] = self.high
        return above, self.candidates[:, 0]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Least and largest value of the units."""
        return (self.low.clamp(min=0), self.high) if self.kind == "relu" else (self.low, self.high)


class Basis:
    """The variables: column 0 of a form is its constant, then the inputs that vary, then the units.

    Args:
        low, high: Range of each input that varies, (inputs,).
        deadline: Of ``time.monotonic()``; what is computed with it later raises TimeoutError.

    Example:
        >>> basis = Basis(torch.tensor([-1.0]).double(), torch.tensor([2.0]).double())
        >>> [round(float(bound), 6) for bound in basis.range(torch.tensor([[1.0, -2.0]]).double())]  # 1 - 2 x
        [-3.0, 3.0]
    """

    def __init__(self, low: Float[Tensor, " inputs"], high: Float[Tensor, " inputs"], deadline: float = math.inf):
        self.inputs, self.deadline = len(low), deadline
        self.groups: list[Units] = []
        one = torch.ones(1, dtype=torch.float64)
        # The constant is a variable that is 1.
        self.low, self.high = torch.cat([one, low.double()]), torch.cat([one, high.double()])

    def __len__(self) -> int:
        return len(self.low)

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self) - 1 - self.inputs

    def check_time(self) -> None:
        """Raises TimeoutError if the deadline is over."""
        check_deadline(self.deadline)

    def append(self, units: Units) -> None:
        """New units."""
        low, high = units.bounds()
        self.groups.append(units)
        self.low, self.high = torch.cat([self.low, low]), torch.cat([self.high, high])

    def range(self, forms: Float[Tensor, "forms columns"]) -> tuple[Tensor, Tensor]:
        """Least and largest value of each form over the variables' own ranges, rounded outwards."""
        low, high = self.low[: forms.shape[1]], self.high[: forms.shape[1]]
        up, down = forms.clamp(min=0), forms.clamp(max=0)
        slack = WIDEN * (forms.abs() @ torch.maximum(low.abs(), high.abs()))
        slack = torch.where((forms[:, 1:] == 0).all(1), 0, slack)
        return up @ low + down @ high - slack, up @ high + down @ low + slack

    def tight_range(self, forms: Float[Tensor, "forms columns"]) -> tuple[Tensor, Tensor]:
        """Likewise, and tighter: what units depend on is put in for them."""
        low, high = self.range(forms)
        return torch.maximum(low, -self._highest(-forms)), torch.minimum(high, self._highest(forms))

    def _highest(self, forms: Tensor) -> Tensor:
        forms = forms.clone()
        size = torch.maximum(self.low.abs(), self.high.abs())
        scale = forms.abs() @ size[: forms.shape[1]]
        for group in reversed(self.groups):
            if group.start >= forms.shape[1]:
                continue
            part = forms[:, group.start : group.stop].clone()
            if not bool(part.any()):
                continue
            self.check_time()
            above, below = group.lines()
            forms[:, group.start : group.stop] = 0
            forms[:, : group.start] += part.clamp(min=0) @ above + part.clamp(max=0) @ below
            terms = part.clamp(min=0) @ (above.abs() @ size[: group.start])
            terms -= part.clamp(max=0) @ (below.abs() @ size[: group.start])
            scale = torch.maximum(scale, forms.abs() @ size[: forms.shape[1]] + terms)
        inputs = forms[:, : 1 + self.inputs]
        low, high = self.low[: 1 + self.inputs], self.high[: 1 + self.inputs]
        return inputs.clamp(min=0) @ high + inputs.clamp(max=0) @ low + WIDEN * scale
