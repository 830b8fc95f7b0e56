"""What a person sees in the terminal: errors, progress bars and tables.

Results go to standard output; everything here goes to standard error. On a terminal there is one live display per
process, to which nested tasks add their bars; elsewhere a task prints a plain line at most every 30 seconds.
"""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

PLAIN_INTERVAL_SECONDS = 30.0


class UserError(ValueError):
    """A mistake in what the user gave, told in at most three lines: what, where, and what to do about it.

    Example:
        >>> print(UserError("sparsity must lie in [0, 1), got 1.5", cure="ask for --sparsity 0.95"))
        sparsity must lie in [0, 1), got 1.5
          do ask for --sparsity 0.95
    """

    def __init__(self, what: str, *, where: object = None, cure: str | None = None):
        self.what, self.where, self.cure = what, where, cure
        lines = [what]
        if where is not None:
            lines.append(f"  in {where}")
        if cure is not None:
            lines.append(f"  {cure}" if cure.endswith("?") else f"  do {cure}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_error, (type(self), self.what, self.where, self.cure)


def _rebuild_error(kind: type[UserError], what: str, where: object, cure: str | None) -> UserError:
    return kind(what, where=where, cure=cure)


def nearest(name: str, known: Iterable[str]) -> str:
    """The cure for an unknown name: the nearest known one, or the list of all.

    Example:
        >>> nearest("fashon-mnist", ["digits", "fashion-mnist"])
        'did you mean fashion-mnist?'
        >>> nearest("zebra", ["digits", "mnist1d"])
        'choose one of digits, mnist1d'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(names)}"


class _Settings:
    quiet = False


_settings = _Settings()


def configure(*, quiet: bool = False) -> None:
    """Sets whether progress and notes are shown in this process."""
    _settings.quiet = quiet


def note(message: str) -> None:
    """One line for the person at the terminal, on standard error, unless quiet."""
    if _settings.quiet:
        return
    if _display.live is not None:
        _display.live.console.print(message, markup=False, highlight=False)
    else:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


def warn(message: str) -> None:
    """A warning, on standard error; shown even when quiet."""
    quiet, _settings.quiet = _settings.quiet, False
    try:
        note(f"warning: {message}")
    finally:
        _settings.quiet = quiet


def clock(seconds: float) -> str:
    """A duration as people read it.

    Example:
        >>> clock(7.2), clock(192), clock(7300)
        ('7 s', '3 min 12 s', '2 h 1 min')
    """
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class _Display:
    live: Any = None
    overall: Overall | None = None
    open_tasks = 0


_display = _Display()


class Overall:
    """The one bar over all stages of a job; a task that is opened inside a stage moves it.

    Args:
        description: What the bar says.
        weights: Expected seconds of each stage, by name, in their order.
    """

    def __init__(self, description: str, weights: dict[str, float]):
        self.description, self.weights = description, weights
        self._base = self._share = 0.0
        self._bar: Task | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The named stage: its first-level tasks fill its part of the bar."""
        names = list(self.weights)
        self._base = sum(self.weights[n] for n in names[: names.index(name)])
        self._share = self.weights[name]
        note(f"[{names.index(name) + 1}/{len(names)}] {name}")
        yield
        self.inner(1.0, "")

    def inner(self, fraction: float, message: str) -> None:
        """Called by the running task with how much of the stage is done."""
        if self._bar is not None:
            self._bar.update(self._base + self._share * min(1.0, fraction), message=message or self._bar.message)


@contextmanager
def overall(description: str, weights: dict[str, float]) -> Iterator[Overall]:
    """Shows one total bar over stages while the block runs.

    Example:
        >>> configure(quiet=True)
        >>> with overall("design", {"search": 30.0, "train": 60.0}) as total:
        ...     with total.stage("search"), task("search", total=10) as bar:
        ...         bar.advance()
        >>> configure()
    """
    total = Overall(description, weights)
    with task(description, total=sum(weights.values())) as bar:
        total._bar, _display.overall, _display.open_tasks = bar, total, 0
        try:
            yield total
        finally:
            _display.overall, _display.open_tasks = None, 1


class Task:
    """One bar: how much is done of how much, with the time left."""

    def __init__(self, description: str, total: float):
        self.description, self.total, self.done, self.message = description, total, 0.0, ""
        self._start = self._last_line = time.monotonic()
        self._id: Any = None
        self.leads = False
        if _display.live is not None:
            self._id = _display.live.add_task(description, total=total, message="")

    def advance(self, amount: float = 1.0, message: str | None = None) -> None:
        """Adds to what is done; ``message`` (best so far, say) stands beside the bar until the next one."""
        self.update(self.done + amount, message=message)

    def update(self, done: float, *, total: float | None = None, message: str | None = None) -> None:
        """Sets what is done, and the total when it has changed."""
        self.done = done
        self.total = self.total if total is None else total
        self.message = self.message if message is None else message
        if self.leads and _display.overall is not None and self.total:
            _display.overall.inner(self.done / self.total, self.message)
            if self._id is None:
                return
        if _settings.quiet:
            return
        if self._id is not None and _display.live is not None:
            _display.live.update(self._id, completed=self.done, total=self.total, message=self.message)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_INTERVAL_SECONDS and self.done > 0:
            self._last_line = now
            left = (now - self._start) / self.done * max(0.0, self.total - self.done)
            share = 100 * self.done / self.total if self.total else 100.0
            note(f"{self.description}: {share:.0f} %, {clock(left)} left{'; ' if self.message else ''}{self.message}")

    def close(self) -> None:
        """Takes the bar away."""
        if self._id is not None and _display.live is not None:
            _display.live.remove_task(self._id)
            self._id = None


@contextmanager
def task(description: str, total: float) -> Iterator[Task]:
    """Shows a bar while the block runs; nested tasks share the one display of the process.

    Example:
        >>> with task("epochs", total=3) as bar:
        ...     bar.advance(message="accuracy 0.91")
    """
    owner = False
    if _display.live is None and not _settings.quiet and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        _display.live = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[message]}"),
            console=Console(stderr=True),
            transient=True,
        )
        _display.live.start()
        owner = True
    bar = Task(description, total)
    bar.leads = _display.overall is not None and _display.open_tasks == 0
    _display.open_tasks += 1
    try:
        yield bar
    finally:
        _display.open_tasks -= 1
        bar.close()
        if owner:
            _display.live.stop()
            _display.live = None


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """A plain text table: columns padded, numbers to the right.

    Example:
        >>> print(table([["ours", 0.91], ["baseline", 0.887]], ["network", "accuracy"]))
        network   accuracy
        ours          0.91
        baseline     0.887
    """
    cells = [[str(value) for value in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float)) and not isinstance(row[i], bool) for row in rows)
        for i in range(len(header))
    ]
    widths = [max(len(header[i]), *(len(row[i]) for row in cells), 0) for i in range(len(header))]
    lines = []
    for row in [list(header), *cells]:
        padded = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
