"""Time: of one operation, for tables, and of several ways to do the same thing, against each other."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from netwright import storage
from netwright.console import UserError, table, task
from netwright.cost.allocator import memory_kept
from netwright.nn.modes import in_mode
from netwright.results import Result, new_axes
from netwright.seeding import stream

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Key = str | tuple[Any, ...]


def cpu_name() -> str:
    """The processor's name, as its maker writes it where the system tells.

    Example:
        >>> len(cpu_name()) > 0
        True
    """
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


@contextmanager
def threads(number: int | None) -> Iterator[int]:
    """Lets torch use ``number`` threads inside the block; ``None`` leaves them as they are.

    Raises:
        ValueError: If ``number`` is below 1.

    Example:
        >>> with threads(1):
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    if number is not None and number < 1:
        raise ValueError(f"threads must be >= 1, got {number}")
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class LatencyTable(Result, Mapping[Key, float]):
    """Measured milliseconds by operation, with where and how they were measured.

    Attributes:
        milliseconds: Median time of each operation; keys are names or tuples such as
            (op, C_in, C_out, H, W, stride, extra).
        cpu: Name of the processor.
        threads: Threads torch had.
        batch: Inputs at once.
        dtype: Type of the inputs.
        torch_version: Version of torch.
        runtime: What ran the operations.
        sparsity: Share of zeros in the weights while they were measured, in [0, 1).

    Example:
        >>> times = LatencyTable.measure({("relu", 8): (nn.ReLU(), (8, 4, 4))}, repeats=3)
        >>> times["relu", 8] > 0
        True
        >>> times["tanh", 8]
        Traceback (most recent call last):
        KeyError: "no latency was measured for ('tanh', 8)"
    """

    milliseconds: Mapping[Key, float]
    cpu: str
    threads: int
    batch: int
    dtype: str
    torch_version: str
    runtime: str = "torch"
    sparsity: float = 0.0

    @classmethod
    def measure(
        cls,
        ops: Mapping[Key, tuple[Callable[[torch.Tensor], Any], Sequence[int]]],
        *,
        warmup: int = 5,
        repeats: int = 30,
        threads: int = 1,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> LatencyTable:
        """Times each operation on random input: the median of single calls under ``inference_mode``.

        Args:
            ops: What runs each operation (a module, in evaluation mode meanwhile, or a compiled function),
                with the shape of one input without the batch.
            warmup: Untimed calls before, at least 0.
            repeats: Timed calls, at least 1.
            threads: Threads of torch.
            batch: Inputs at once.
            dtype: Type of the input.

        Raises:
            ValueError: If ``ops`` is empty or a number is below its bound.
        """
        _at_least(warmup=(warmup, 0), repeats=(repeats, 1), threads=(threads, 1), batch=(batch, 1))
        if not ops:
            raise ValueError("ops must hold at least 1 operation, got 0")
        found: dict[Key, float] = {}
        fixed, bars = _fixed_threads(threads), task("latencies", total=len(ops))
        with fixed, memory_kept(), torch.inference_mode(), bars as bar:
            for key, (op, shape) in ops.items():
                x = torch.rand(batch, *shape, generator=stream(0, "latency")).to(dtype)
                with in_mode(op, training=False) if isinstance(op, nn.Module) else nullcontext():
                    times = [_seconds(partial(op, x)) for _ in range(warmup + repeats)]
                found[key] = 1e3 * float(np.median(times[warmup:]))
                bar.advance()
        return cls(found, cpu_name(), threads, batch, str(dtype).removeprefix("torch."), torch.__version__)

    def __getitem__(self, key: Key) -> float:
        try:
            return self.milliseconds[key]
        except KeyError:
            raise KeyError(f"no latency was measured for {key!r}") from None

    def __iter__(self) -> Iterator[Key]:
        return iter(self.milliseconds)

    def __len__(self) -> int:
        return len(self.milliseconds)

    def total(self, keys: Iterable[Key]) -> float:
        """Milliseconds of a chain of operations.

        Raises:
            KeyError: If some were not measured; it lists them all.
        """
        keys = list(keys)
        missing = sorted({repr(key) for key in keys if key not in self.milliseconds})
        if missing:
            raise KeyError(f"no latency was measured for {', '.join(missing)}")
        return sum(self.milliseconds[key] for key in keys)

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the times as a list of key and milliseconds."""
        times = [{"key": key, "ms": ms} for key, ms in self.milliseconds.items()]
        return {"milliseconds": times, **{name: getattr(self, name) for name in _CONDITIONS}}

    def __str__(self) -> str:
        rows = [[_label(key), round(ms, 4)] for key, ms in self.milliseconds.items()]
        where = f"{self.cpu}, threads {self.threads}, batch {self.batch}, {self.runtime}"
        zeros = f", {100 * self.sparsity:g} % zeros" if self.sparsity else ""
        return f"{where}{zeros}\n{table(rows, ['operation', 'ms'])}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON."""
        storage.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what :meth:`save` wrote.

        Raises:
            UserError: If the file is missing, is not JSON, or is no such table.
        """
        try:
            return cls.from_dict(storage.read_json(path))
        except ValueError as error:
            raise UserError(str(error), where=path, cure="measure it again") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The table that :meth:`to_dict` gave, also after a way through JSON.

        Raises:
            ValueError: If the data are no such table.

        Example:
            >>> times = LatencyTable.measure({("relu", 8): (nn.ReLU(), (8, 4, 4))}, repeats=3)
            >>> LatencyTable.from_dict(times.to_dict()) == times
            True
        """
        try:
            times = {_key(entry["key"]): float(entry["ms"]) for entry in data["milliseconds"]}
            conditions = {
                name: kind(data[name]) for name, kind in _CONDITIONS.items() if name in data or name in _NEEDED
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a latency table: {error!r}") from error
        if not all(math.isfinite(ms) and ms >= 0 for ms in times.values()):
            raise ValueError("a latency must be a number >= 0")
        return cls(times, **conditions)

    def plot(self, ax: Axes | None = None) -> Axes:
        """A bar for each operation."""
        ax = new_axes(ax, size=(5.0, 1.0 + 0.25 * len(self)))
        ax.barh([_label(key) for key in self], list(self.milliseconds.values()))
        ax.set_xlabel("milliseconds")
        return ax


_CONDITIONS: dict[str, Callable[[Any], Any]] = {
    "cpu": str,
    "threads": int,
    "batch": int,
    "dtype": str,
    "torch_version": str,
    "runtime": str,
    "sparsity": float,
}
_NEEDED = ("cpu", "threads", "batch", "dtype", "torch_version")
_fixed_threads = threads


def _key(value: Any) -> Key:
    """Tuples come back from JSON as lists."""
    return tuple(_key(item) for item in value) if isinstance(value, list) else value


def _label(key: Key) -> str:
    return key if isinstance(key, str) else " ".join(map(str, key))


def _at_least(**bounds: tuple[int, int]) -> None:
    for name, (value, least) in bounds.items():
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Timing(Result):
    """One competitor.

    Attributes:
        name: Its name.
        best_ms: Shortest time, milliseconds.
        median_ms: Median time, milliseconds.
        ratio: Median over rounds of its time over the first competitor's in the same round; below 1 is faster.
        ratio_low: Lower quartile of that.
        ratio_high: Upper quartile of that.
    """

    name: str
    best_ms: float
    median_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class Comparison(Result):
    """Times of several ways to do the same thing.

    Attributes:
        timings: One for each, in the order given; ratios are to the first.
        rounds: How often each was timed.
        threads: Threads torch had.
        cpu: Name of the processor.
    """

    timings: tuple[Timing, ...]
    rounds: int
    threads: int
    cpu: str

    def __getitem__(self, name: str) -> Timing:
        for timing in self.timings:
            if timing.name == name:
                return timing
        raise KeyError(f"no timing of {name!r}; there are {', '.join(t.name for t in self.timings)}")

    def __str__(self) -> str:
        rows = [
            [t.name, f"{t.best_ms:.4g}", f"{t.median_ms:.4g}", f"{t.ratio:.3f} [{t.ratio_low:.3f}, {t.ratio_high:.3f}]"]
            for t in self.timings
        ]
        header = ["", "best ms", "median ms", f"time / {self.timings[0].name}"]
        return f"{self.cpu}, threads {self.threads}, {self.rounds} rounds\n{table(rows, header)}"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Ratios with their quartiles."""
        ax = new_axes(ax)
        middle = np.array([t.ratio for t in self.timings])
        ends = np.array([[t.ratio - t.ratio_low, t.ratio_high - t.ratio] for t in self.timings]).T
        ax.barh([t.name for t in self.timings], middle, xerr=ends)
        ax.set_xlabel(f"time / {self.timings[0].name}")
        return ax


def turn(call: Callable[[], Any], calls: int = 1, untimed: int = 0) -> list[float]:
    """Seconds of each of ``calls`` calls, after ``untimed`` ones that bring caches and clock rates back.

    Raises:
        ValueError: If ``calls`` is below 1 or ``untimed`` below 0.

    Example:
        >>> len(turn(lambda: sum(range(10)), calls=4, untimed=1))
        4
    """
    _at_least(calls=(calls, 1), untimed=(untimed, 0))
    for _ in range(untimed):
        call()
    return [_seconds(call) for _ in range(calls)]


def alternate(
    turns: Mapping[str, Callable[[], Sequence[float]]],
    *,
    rounds: int = 30,
    seconds: float | None = None,
    fewest: int = 1,
) -> dict[str, Float[np.ndarray, "rounds calls"]]:
    """Lets competitors take turns, so that a change of the machine's speed meets all of them.

    In each round every competitor has one turn, and the order is rotated from round to round. What is freed stays with
    the process meanwhile (:func:`netwright.cost.memory_kept`).

    Args:
        turns: By name, what takes one turn and gives the seconds of its calls, equally many each time.
        rounds: Most rounds, at least 1.
        seconds: No round begins after so many seconds; ``None`` for no limit.
        fewest: Rounds that are made however long they take (``rounds``, if that is fewer), at least 1.

    Returns:
        Seconds by name: one row a round, one column a call.

    Raises:
        ValueError: If ``turns`` is empty, or a number is below its bound.

    Example:
        >>> times = alternate({"one": lambda: [1.0, 2.0], "two": lambda: [3.0]}, rounds=3)
        >>> times["one"].shape, times["two"].shape
        ((3, 2), (3, 1))
    """
    if not turns:
        raise ValueError("turns must hold at least 1 entry, got 0")
    _at_least(rounds=(rounds, 1), fewest=(fewest, 1))
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be > 0, got {seconds}")
    names = list(turns)
    times: dict[str, list[Sequence[float]]] = {name: [] for name in names}
    begin = time.perf_counter()
    with memory_kept():
        for number in range(rounds):
            if seconds is not None and number >= fewest and time.perf_counter() - begin >= seconds:
                break
            start = number % len(names)
            for name in names[start:] + names[:start]:
                times[name].append(turns[name]())
    return {name: np.array(taken) for name, taken in times.items()}


def compare_times(
    callables: Mapping[str, Callable[[], Any]], *, rounds: int = 30, threads: int | None = None
) -> Comparison:
    """Times several callables against the first, in alternating rounds.

    In each round every callable runs once, and the order is rotated from round to round, so that a change of
    the machine's speed meets all of them. Each runs once untimed beforehand.

    Args:
        callables: What to time, by name; the first is what the others are compared with.
        rounds: Timed calls of each, at least 1.
        threads: Threads of torch; ``None`` leaves them as they are. A callable that uses another runtime sets
        its own.

    Raises:
        ValueError: If ``callables`` is empty, or a number is below 1.

    Example:
        >>> result = compare_times({"one": lambda: sum(range(10)), "two": lambda: sum(range(10))}, rounds=5)
        >>> result["one"].ratio, result["two"].median_ms >= result["two"].best_ms
        (1.0, True)
    """
    if not callables:
        raise ValueError("callables must hold at least 1 entry, got 0")
    _at_least(rounds=(rounds, 1))
    with _fixed_threads(threads) as used:
        for call in callables.values():
            call()
        times = alternate({name: partial(turn, call) for name, call in callables.items()}, rounds=rounds)
    first = times[next(iter(callables))]
    timings = []
    for name, taken in times.items():
        ms, ratios = 1e3 * taken, taken / first
        low, middle, high = (float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75]))
        timings.append(Timing(name, float(ms.min()), float(np.median(ms)), middle, low, high))
    return Comparison(tuple(timings), rounds, used, cpu_name())
