"""The exact engine: is there a point of a box that another class wins? Bounds and an attack first, then Z3.

Every activation is an affine form in inputs and units of open sign (:mod:`netwright.verify.basis`); the solver sees a
variable for each of these, and a class j rivals the class c where

    o_c - o_j <= slack,    slack = rounding of the network in float32 + rounding of the factors given to the solver

has a solution. Without one the class is certain, in whatever order float32 adds up. A solution counts once the network
itself, in float64, gives another class there; a tie counts, since its order is nobody's promise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.console import Task, task
from netwright.seeding import stream
from netwright.train.attacks import pgd
from netwright.verify.bounds import Analysis, analyse, flat_margin
from netwright.verify.encoding import Encoding, z3_module
from netwright.verify.forms import TooLargeError
from netwright.verify.network import Network, network_of
from netwright.verify.relaxation import ALL, Relaxation

STARTS, STEPS = 2, 20  # of the attack
TIGHT, TIGHT_SHARE = 512, 1 / 3  # activations of a layer with better ranges before the solver is asked; of the time
Status = Literal["safe", "unsafe", "unknown"]
Verdict = tuple[Status, str, Tensor | None]
PROVED: Verdict = ("safe", "bounds", None)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What became of one box.

    Attributes:
        status: ``"safe"``: no point of the box has another class. ``"unsafe"``: ``witness`` has. Else ``"unknown"``.
        witness: A point of the box, flat, in float64.
        reason: What decided, or why nothing did.
        stats: ``variables`` and ``units`` of the forms, ``rivals`` after the bounds, ``seconds``, ``solver_seconds``.
    """

    status: Status
    witness: Tensor | None
    reason: str
    stats: dict[str, Any]


def smt_verify(
    model: nn.Module | Network,
    lower: Float[Tensor, " *shape"],
    upper: Float[Tensor, " *shape"],
    label: int,
    timeout: float = 60.0,
    *,
    layer: int = 0,
    attack: bool = True,
    solver: bool = True,
) -> Decision:
    """Whether every point of a box has one class: the exact engine.

    Args:
        model: Piecewise linear: convolutions, linear layers, batch norms, (leaky) ReLUs and clamps, poolings, sums and
            concatenations of these.
        lower: Least value of each number of the layer; for a module, of the shape of one input.
        upper: Largest.
        label: The class, in 0..classes - 1.
        timeout: Seconds, > 0.
        layer: Where the box lies; 0 is the input.
        attack: Whether to look for a counterexample along the gradient before asking the solver (at the input).
        solver: Whether to ask Z3 what bounds and attack leave open; without it, that is unknown.

    Raises:
        ImportError: If Z3 is asked for and not installed.
        TypeError: If a layer is unknown, or is not piecewise linear and the box is left to the solver; it is named.
        ValueError: If a bound, the label or the timeout is out of its range.

    Example:
        >>> net = nn.Linear(1, 2)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0], [-1.0]])), net.bias.data.copy_(torch.tensor([0.0, 1.0]))
        >>> smt_verify(net, torch.tensor([0.6]), torch.tensor([1.0]), 0, solver=False).status  # x against 1 - x
        'safe'
    """
    begin = time.monotonic()
    if not timeout > 0:
        raise ValueError(f"timeout must be > 0 seconds, got {timeout}")
    if solver:
        z3_module()
    network = network_of(model, lower.shape)
    if not 0 <= label < network.classes:
        raise ValueError(f"label must lie in 0..{network.classes - 1}, got {label}")
    deadline = begin + timeout
    stats: dict[str, Any] = {}

    def done(status: Status, reason: str, witness: Tensor | None = None) -> Decision:
        return Decision(status, witness, reason, stats | {"seconds": time.monotonic() - begin})

    try:
        with task("bounds", total=3 * len(network.between(layer, len(network.layers) - 1))) as bar:
            bounding = _Bounding(network, lower, upper, layer, label, deadline, stats, bar)
            verdict = bounding.run(attack=attack and layer == 0, solver=solver)
    except TimeoutError:
        verdict = "unknown", "the time was over before the bounds were known", None
    if verdict is not None:
        return done(*verdict)
    assert bounding.open is not None
    analysis, (least, error, rivals) = bounding.open
    assert analysis.basis is not None
    stats |= {"variables": len(analysis.dims), "units": analysis.basis.units}
    open_ = ~(least > error)
    order = least[open_].argsort()
    search = _Search(network, analysis, lower, upper, layer, label, deadline)
    status, reason, witness = search.run(rivals[open_][order], error[open_][order])
    stats |= {"rivals": len(order), "solver_seconds": search.seconds}
    return done(status, reason, witness)


@dataclasses.dataclass
class _Bounding:
    """What can be said of a box without the solver; ``open`` is what is left for it, with the margins."""

    network: Network
    lower: Tensor
    upper: Tensor
    layer: int
    label: int
    deadline: float
    stats: dict[str, Any]
    bar: Task
    open: tuple[Analysis, tuple[Tensor, Tensor, Tensor]] | None = None

    def run(self, *, attack: bool, solver: bool) -> Verdict | None:
        """A verdict; None where the solver is to be asked.

        Raises:
            TimeoutError: If the time is over.
        """
        # Ranges by intervals prove small boxes, and take a hundredth of the time.
        if self._prove(0, self.deadline):
            return PROVED
        found = _attacked(self.network, self.lower, self.upper, self.label, self.deadline) if attack else None
        if found is not None:
            return "unsafe", "attack", found
        if not solver:
            doubt: Verdict = "unknown", "bounds do not decide, and the solver was not asked", None
            return PROVED if self._prove(ALL, self.deadline) else doubt
        # Better ranges may prove it too; where they take long, the solver can do with those that there are.
        with contextlib.suppress(TimeoutError):
            now = time.monotonic()
            if self._prove(TIGHT, now + TIGHT_SHARE * (self.deadline - now)):
                return PROVED
        return self._forms()

    def _forms(self) -> Verdict | None:
        """Makes what the solver is asked about; where that is too large for it, what better bounds say."""
        try:
            found = analyse(
                self.network, self.lower, self.upper, first=self.layer, deadline=self.deadline, tick=self._tick
            )
            self.open = found, found.margins(self.label)
            return None
        except TooLargeError as refusal:
            with contextlib.suppress(TimeoutError):
                if self._prove(ALL, self.deadline):
                    return PROVED
            return "unknown", f"the network is too large for the exact engine: {refusal}", None

    def _tick(self) -> None:
        self.bar.update(min(self.bar.total, self.bar.done + 1))

    def _prove(self, most: int, deadline: float) -> bool:
        """Whether lines prove the class, with better ranges for ``most`` open activations of each layer."""
        bounds = Relaxation(
            self.network, self.lower, self.upper, first=self.layer, most=most, deadline=deadline, tick=self._tick
        )
        certain = bounds.margins(self.label)[0] > 0
        self.stats |= {"rivals": int((~certain).sum()), "variables": len(bounds.dims), "units": bounds.open}
        return bool(certain.all())


def _attacked(network: Network, lower: Tensor, upper: Tensor, label: int, deadline: float) -> Tensor | None:
    low, high = (bound.detach().double().reshape(1, *network.shape) for bound in (lower, upper))
    labels = torch.tensor([label])
    for start in range(STARTS):
        if time.monotonic() > deadline:
            break
        draw = stream(0, "attack", start) if start else None
        x = pgd(network.single, (low + high) / 2, labels, low, high, steps=STEPS, generator=draw)
        if float(flat_margin(network.logits(x), label)) <= 0:
            return x.flatten()
    return None


def _tick(bar: Task, begin: float, message: str) -> None:
    bar.update(min(bar.total, time.monotonic() - begin), message=message)


class _Search:
    """Goes through the rivals of a class."""

    def __init__(
        self, network: Network, analysis: Analysis, lower: Tensor, upper: Tensor, layer: int, label: int, end: float
    ):
        assert analysis.basis is not None
        self.network, self.analysis, self.layer, self.label, self.deadline = network, analysis, layer, label, end
        self.low, self.high = (bound.detach().double().flatten() for bound in (lower, upper))
        self.encoding = Encoding(analysis.basis)
        self.seconds = 0.0

    def run(self, rivals: Tensor, errors: Tensor) -> tuple[Status, str, Tensor | None]:
        """The verdict over all rivals, the reason and a witness."""
        doubts: list[str] = []
        begin = time.monotonic()
        forms = self.analysis.differences(self.label, rivals)
        slack = errors + self.encoding.shortened_by(forms)
        total = max(1e-3, self.deadline - begin)
        try:
            with task("exact engine", total=total) as bar:
                for number, (form, room, rival) in enumerate(
                    zip(forms, slack.tolist(), rivals.tolist(), strict=True), start=1
                ):
                    told = f"class {rival}, {number} of {len(rivals)}"
                    tick = functools.partial(_tick, bar, begin, told)
                    found, witness = self._ask(form, room, tick)
                    if witness is not None:
                        return "unsafe", "solver", witness
                    if found == "unknown":
                        return "unknown", f"the time was over at class {rival}, {number} of {len(rivals)}", None
                    doubts += [str(rival)] * (found == "numerical")
        finally:
            self.seconds = time.monotonic() - begin
        if doubts:
            return "unknown", f"numerical: rounding decides about class {', '.join(doubts)}", None
        return "safe", "solver", None

    def _ask(self, form: Tensor, slack: float, tick: Callable[[], None]) -> tuple[str, Tensor | None]:
        """``"unsat"``, ``"unknown"`` or ``"numerical"`` about one rival; or a witness."""
        encoding = self.encoding
        if not encoding.require(form[None], self.deadline):
            return "unknown", None
        margin = encoding.linear(form)
        # The solver likes corners, where the margin is the bound: no rounding undoes the second bound.
        for bound in (slack, -slack):
            found = encoding.check(self.deadline, tick, margin <= encoding.number(bound))
            if found == "unknown":
                return found, None
            if found == "unsat":
                return ("unsat" if bound == slack else "numerical"), None
            witness = self._confirmed(encoding.inputs())
            if witness is not None:
                return "sat", witness
        return "numerical", None

    def _confirmed(self, inputs: Tensor) -> Tensor | None:
        """The point of the box, if the network itself gives another class there."""
        point = torch.where(self.low < self.high, 0, self.low)
        point[self.analysis.dims] = inputs
        point = torch.minimum(torch.maximum(point, self.low), self.high)
        logits = self.network.forward(point[None], self.layer) if self.layer else self.network.logits(point[None])
        return point if float(flat_margin(logits, self.label)) <= 0 else None
