"""Affine forms as variables and constraints of Z3, and its answers within a time.

Factors are shortened to a few bits, since long fractions make the solver slow, and what that may change is added up
beside them: |v - v'| <= sum_i |a_i| (2^-BITS |v_i'| + |v_i - v_i'|) for a unit, since a ReLU and a maximum stretch
nothing.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from netwright.verify.basis import Basis, Units

BITS = 28  # of a factor given to the solver
GRACE = 2.0  # seconds after which a solver that does not stop is left behind


def has_z3() -> bool:
    """Whether the solver is installed."""
    return importlib.util.find_spec("z3") is not None


def z3_module() -> Any:
    """The solver.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import z3
    except ImportError as error:
        raise ImportError('the exact engine needs Z3: pip install "netwright[verify]" (z3-solver)') from error
    return z3


class Encoding:
    """Variables and constraints of Z3 for those units that something depends on.

    Inputs are t in [0, 1] with x = lower + t (upper - lower), so that their bounds are short numbers.
    """

    def __init__(self, basis: Basis):
        self.z3 = z3_module()
        self.context = self.z3.Context()
        self.basis = basis
        self.constraints: list[Any] = []
        self.model: Any = None
        self.variables: dict[int, Any] = {}
        size = torch.maximum(basis.low.abs(), basis.high.abs())
        inputs = slice(1, 1 + basis.inputs)
        self.low, self.width = basis.low[inputs], basis.high[inputs] - basis.low[inputs]
        size[inputs] = 1.0
        # How far a unit may be off because its factors are shortened: a ReLU and a maximum stretch nothing.
        self.size, self.error = size, torch.zeros(len(basis), dtype=torch.float64)
        for group in basis.groups:
            candidates = self.shifted(group.candidates).abs()
            error = candidates @ self._off(group.start)
            self.error[group.start : group.stop] = error if error.ndim == 1 else error.max(1).values

    def shifted(self, forms: Tensor) -> Tensor:
        """Forms in t instead of x."""
        forms = forms.clone()
        inputs = forms[..., 1 : 1 + self.basis.inputs]
        forms[..., 0] += inputs @ self.low
        forms[..., 1 : 1 + self.basis.inputs] = inputs * self.width
        return forms

    def _off(self, columns: int) -> Tensor:
        """How far a term a v may be off as the solver sees it, over |a|; its v is |v| + error at most."""
        return 2.0**-BITS * (self.size[:columns] + self.error[:columns]) + self.error[:columns]

    def shortened_by(self, forms: Tensor) -> Tensor:
        """How far forms, in x, are off as the solver sees them."""
        columns = forms.shape[-1]
        return self.shifted(forms).abs() @ self._off(columns)

    def number(self, value: float) -> Any:
        """A float as the solver's fraction."""
        exact = Fraction(value)
        return self.z3.RealVal(f"{exact.numerator}/{exact.denominator}", ctx=self.context)

    def linear(self, form: Tensor) -> Any:
        """A form, in x, as a term."""
        mantissa, exponent = torch.frexp(self.shifted(form))
        short = torch.ldexp((mantissa * 2.0**BITS).round() / 2.0**BITS, exponent)
        terms = [self.number(float(short[0]))]
        for place in short[1:].nonzero().flatten().tolist():
            terms.append(self.number(float(short[1 + place])) * self.variables[1 + place])
        return self.z3.Sum(terms) if len(terms) > 1 else terms[0]

    def require(self, forms: Tensor, deadline: float) -> bool:
        """Makes the variables of forms and of all that these depend on; False when the time is over."""
        basis, z3 = self.basis, self.z3
        wanted = torch.zeros(len(basis), dtype=torch.bool)
        wanted[: forms.shape[1]] |= (forms != 0).any(0)
        for group in reversed(basis.groups):
            used = wanted[group.start : group.stop]
            columns = group.candidates[used].reshape(-1, group.start)
            wanted[: group.start] |= (columns != 0).any(0)
        for place in (wanted[1 : 1 + basis.inputs].nonzero().flatten() + 1).tolist():
            if place not in self.variables:
                t = self.variables[place] = z3.Real(f"t{place}", ctx=self.context)
                self.constraints += [t >= 0, t <= 1]
        for group in basis.groups:
            above, _ = group.lines()
            for i in wanted[group.start : group.stop].nonzero().flatten().tolist():
                if time.monotonic() > deadline:
                    return False
                place = group.start + i
                if place not in self.variables:
                    h = self.variables[place] = z3.Real(f"h{place}", ctx=self.context)
                    self._define(h, group, i, above[i])
        return True

    def _define(self, h: Any, group: Units, i: int, above: Tensor) -> None:
        z3 = self.z3
        if group.kind == "relu":
            z = self.linear(group.candidates[i])
            self.constraints += [h >= 0, h >= z, z3.Or(h <= 0, h <= z)]
            # Not needed, but what the solver's linear part would not see: the line above.
            slack = float(self.shortened_by(above[None])[0]) + float(self.error[group.start + i])
            self.constraints.append(h <= self.linear(above) + self.number(slack))
            return
        assert group.alive is not None
        parts = [self.linear(form) for form, alive in zip(group.candidates[i], group.alive[i], strict=True) if alive]
        self.constraints += [*(h >= part for part in parts), z3.Or(*(h <= part for part in parts))]

    def check(self, deadline: float, tick: Callable[[], None], *more: Any) -> str:
        """``"sat"``, ``"unsat"`` or ``"unknown"`` by the deadline, with further constraints for this question only."""
        left = deadline - time.monotonic()
        if left <= 0:
            return "unknown"
        found: list[str] = []

        def ask() -> None:
            # A solver of its own: one that is asked again takes constraints in at once, which nothing interrupts.
            solver = self.z3.SolverFor("QF_LRA", ctx=self.context)
            solver.set("timeout", max(1, int(left * 1000)))
            solver.add(*self.constraints, *more)
            status = str(solver.check())
            self.model = solver.model() if status == "sat" else None
            found.append(status)

        worker = threading.Thread(target=ask, daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(0.05)
                tick()
                late = time.monotonic() - deadline
                if late > 0:
                    self.context.interrupt()
                if late > GRACE:
                    return "unknown"
        except BaseException:
            self.context.interrupt()
            worker.join(GRACE)
            raise
        return found[0] if found else "unknown"

    def inputs(self, centre: Tensor | None = None) -> Tensor:
        """The point that the solver found; inputs that matter to nothing are in the centre."""
        t = torch.full_like(self.width, 0.5) if centre is None else (centre - self.low) / self.width
        for place, variable in self.variables.items():
            if place <= self.basis.inputs:
                value = self.model.eval(variable, model_completion=True)
                t[place - 1] = float(Fraction(value.numerator_as_long(), value.denominator_as_long()))
        return self.low + t * self.width
