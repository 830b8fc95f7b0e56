"""Where the time of a compiled network goes: one row for each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from netwright.console import table
from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS = 30


@dataclass(frozen=True)
class StepTime(Result):
    """One step.

    Attributes:
        path: Module path in the source network.
        kernel: What ran it.
        microseconds: The shortest of the repetitions.
        share: Of the sum over all steps, in [0, 1].
        gflops: Billions of operations that were done a second, two for each multiply-add; 0 for a step without any.
    """

    path: str
    kernel: str
    microseconds: float
    share: float
    gflops: float


@dataclass(frozen=True)
class Profile(Result):
    """Time of every step of a compiled network.

    Steps are timed one by one, each with the threads of the network; a call also brings inputs in and outputs out.

    Attributes:
        steps: In the order in which they run.
        step_microseconds: Sum over the steps.
        call_microseconds: The shortest whole call.
        backend: ``"native"`` or ``"torch"``.
        threads: Of the network.
        repeats: How often each step and the call were timed.
    """

    steps: tuple[StepTime, ...]
    step_microseconds: float
    call_microseconds: float
    backend: str
    threads: int
    repeats: int

    @classmethod
    def of(
        cls, steps: list[tuple[str, str, int, float]], call_seconds: float, backend: str, threads: int, repeats: int
    ) -> Profile:
        """From (path, kernel, multiply-adds, seconds) of every step.

        Example:
            >>> found = Profile.of([("0", "conv", 500, 1e-6), ("1", "relu", 0, 3e-6)], 5e-6, "native", 1, 20)
            >>> [(step.path, step.share, round(step.gflops, 6)) for step in found.steps]
            [('0', 0.25, 1.0), ('1', 0.75, 0.0)]
        """
        total = sum(seconds for *_, seconds in steps)
        rows = tuple(
            StepTime(path, kernel, 1e6 * seconds, seconds / total if total else 0.0, 2e-9 * macs / seconds)
            if seconds
            else StepTime(path, kernel, 0.0, 0.0, 0.0)
            for path, kernel, macs, seconds in steps
        )
        return cls(rows, 1e6 * total, 1e6 * call_seconds, backend, threads, repeats)

    def __str__(self) -> str:
        rows = [
            [
                step.path or "-",
                step.kernel,
                f"{step.microseconds:.1f}",
                f"{100 * step.share:.1f}",
                f"{step.gflops:.1f}" if step.gflops else "-",
            ]
            for step in self.steps
        ]
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        total = f"{self.step_microseconds:.1f} us in {len(self.steps)} steps, {self.call_microseconds:.1f} us a call"
        return f"{table(rows, ['layer', 'kernel', 'us', '%', 'GFLOP/s'])}\n{total}, {self.backend}, {threads}"

    def plot(self, ax: Axes | None = None) -> Axes:
        """A bar for each of the longest steps, in the order of the network."""
        longest = sorted(range(len(self.steps)), key=lambda i: -self.steps[i].microseconds)[:MOST_BARS]
        shown = [self.steps[i] for i in sorted(longest)]
        ax = new_axes(ax, size=(6.0, 1.2 + 0.18 * len(shown)))
        ax.barh(range(len(shown)), [step.microseconds for step in shown])
        ax.set_yticks(range(len(shown)), [f"{step.path or '-'} ({step.kernel})" for step in shown], fontsize=7)
        ax.invert_yaxis()
        ax.set_xlabel("microseconds")
        return ax
