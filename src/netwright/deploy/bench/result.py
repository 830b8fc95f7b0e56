"""What a benchmark found, as data, as one table, and as a verdict in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from netwright.console import table
from netwright.deploy.bench.facts import Facts
from netwright.deploy.bench.roofline import Roofline
from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes

TOLERANCE = 1e-3  # of the largest output; what float32 rounds off is a hundredth of it, a wrong network far more
NOISY = 0.25


@dataclass(frozen=True)
class Runtime(Result):
    """One runtime.

    Attributes:
        name: Its name.
        version: Of its package.
        dense: Whether it multiplies zeros like any other number.
        best_ms: Shortest call, milliseconds.
        median_ms: Median call.
        low_ms: Lower quartile of the calls.
        high_ms: Upper quartile of the calls.
        ratio: Median over rounds of (best call of the fastest dense runtime in the round) / (its own best in the
            round): how many times as fast it is; None if no dense runtime was measured.
        ratio_low: Lower quartile of that.
        ratio_high: Upper quartile of that.
        deviation: max|output - expected| / max|expected|.
        resident_bytes: Most memory while it runs, beyond that of the imported packages; None where not measured.
        file_bytes: What it loads from disk, where it has a file.
        table_bytes: What it keeps in memory for the weights, where it tells.
        prepare_seconds: Loading, converting, compiling.
        note: What was chosen on the way.
    """

    name: str
    version: str
    dense: bool
    best_ms: float
    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    deviation: float
    resident_bytes: int | None
    file_bytes: int | None
    table_bytes: int | None
    prepare_seconds: float
    note: str

    @classmethod
    def of(
        cls,
        name: str,
        *,
        prepared: Mapping[str, Any],
        times: Mapping[str, Float[np.ndarray, "rounds calls"]],
        dense: Sequence[str],
        resident_bytes: int | None,
    ) -> Runtime:
        """Figures from times.

        Args:
            name: Its name.
            prepared: What the measuring process told when it loaded the network.
            times: Seconds of every runtime.
            dense: Names of the dense ones.
            resident_bytes: As above.

        Example:
            >>> told = {"version": "1", "deviation": 0.0, "file_bytes": None, "table_bytes": None, "seconds": 0.1}
            >>> times = {"ours": np.array([[1.0, 2.0]]), "a": np.array([[6.0, 4.0]]), "b": np.array([[9.0, 3.0]])}
            >>> made = Runtime.of("ours", prepared=told | {"note": ""}, times=times, dense="ab", resident_bytes=None)
            >>> made.ratio, made.best_ms
            (3.0, 1000.0)
        """
        ms = 1e3 * times[name]
        low, middle, high = (float(q) for q in np.quantile(ms, [0.25, 0.5, 0.75]))
        ratios: list[float] | list[None] = [None] * 3
        if dense:
            fastest = np.min([times[peer].min(axis=1) for peer in dense], axis=0)
            ratios = [float(q) for q in np.quantile(fastest / times[name].min(axis=1), [0.25, 0.5, 0.75])]
        return cls(
            name=name,
            version=prepared["version"],
            dense=name in dense,
            best_ms=float(ms.min()),
            median_ms=middle,
            low_ms=low,
            high_ms=high,
            ratio=ratios[1],
            ratio_low=ratios[0],
            ratio_high=ratios[2],
            deviation=prepared["deviation"],
            resident_bytes=resident_bytes,
            file_bytes=prepared["file_bytes"],
            table_bytes=prepared["table_bytes"],
            prepare_seconds=prepared["seconds"],
            note=prepared["note"],
        )

    @property
    def noisy(self) -> bool:
        """Whether the quartiles of the ratio lie more than a quarter of it apart."""
        if self.ratio is None or self.ratio_low is None or self.ratio_high is None:
            return False
        return self.ratio_high - self.ratio_low > NOISY * self.ratio


@dataclass(frozen=True)
class Benchmark(Result):
    """One network in every runtime that could run it.

    Attributes:
        network: Its name.
        origin: Where weights and zeros come from.
        shape: Of the input, batch first.
        seed: Of weights, zeros and input, where they are random.
        threads: Threads of every runtime, each with a core to itself.
        cores: What the measuring processes were pinned to; None where the system cannot.
        load: Programs that wanted a core in the minute before; None where the system does not tell.
        facts: Weights, zeros, multiply-adds; None for an ONNX file.
        reference: What made the output that the others were compared with.
        runtimes: Those that ran, in the order of the competitors.
        absent: Why the others did not.
        rounds: How many were made.
        calls: Timed calls of a runtime in a round.
        roofline: What the machine allows at best; None where that is not known.
        no_roofline: Why not, then.
        cpu: Name of the processor.
        versions: Of the packages.
        command: What was typed.
    """

    network: str
    origin: str
    shape: tuple[int, ...]
    seed: int | None
    threads: int
    cores: tuple[int, ...] | None
    load: float | None
    facts: Facts | None
    reference: str
    runtimes: tuple[Runtime, ...]
    absent: Mapping[str, str]
    rounds: int
    calls: int
    roofline: Roofline | None
    no_roofline: str
    cpu: str
    versions: Mapping[str, str]
    command: str

    def __getitem__(self, name: str) -> Runtime:
        for runtime in self.runtimes:
            if runtime.name == name:
                return runtime
        raise KeyError(f"{name!r} was not measured; there are {', '.join(r.name for r in self.runtimes)}")

    @property
    def ours(self) -> Runtime | None:
        """The sparse runtime that is compared: the first one that ran."""
        return next((runtime for runtime in self.runtimes if not runtime.dense), None)

    @property
    def best_dense_peer(self) -> Runtime | None:
        """The dense runtime with the shortest median."""
        return min((r for r in self.runtimes if r.dense), key=lambda r: r.median_ms, default=None)

    @property
    def best_over_best(self) -> float | None:
        """Shortest call of any dense runtime over our shortest."""
        dense = [runtime.best_ms for runtime in self.runtimes if runtime.dense]
        return min(dense) / self.ours.best_ms if dense and self.ours is not None else None

    @property
    def verdict(self) -> str:
        """Whether sparsity paid, in a sentence; faster means that three quarters of the rounds say so."""
        ours, peer = self.ours, self.best_dense_peer
        if ours is None:
            return "no sparse runtime was measured"
        if peer is None or ours.ratio is None or ours.ratio_low is None:
            return "no dense runtime was measured"
        spread = f"quartiles {ours.ratio_low:.2f} to {ours.ratio_high:.2f}{', noisy' if ours.noisy else ''}"
        told = f"not faster: {ours.name} has {ours.ratio:.2f} times the speed of {peer.name} ({spread})"
        if ours.ratio_low > 1:
            fastest = f"the fastest dense runtime, {peer.name}"
            told = f"{ours.name} is {ours.ratio:.2f} times as fast as {fastest} ({spread})"
        if self.facts is not None and self.facts.constant:
            told += "; but the output does not depend on the input: the zeros have cut the network apart"
        return told

    def to_dict(self) -> dict[str, Any]:
        """The fields, and what follows from them."""
        ours, peer = self.ours, self.best_dense_peer
        return {
            "verdict": self.verdict,
            "ratio_to_best_dense_peer": ours.ratio if ours else None,
            "ratio_low": ours.ratio_low if ours else None,
            "ratio_high": ours.ratio_high if ours else None,
            "noisy": ours.noisy if ours else None,
            "runtime": ours.name if ours else None,
            "best_dense_peer": peer.name if peer else None,
            "best_over_best": self.best_over_best,
            **super().to_dict(),
        }

    def __str__(self) -> str:
        return "\n".join(
            [
                *self._described(),
                "",
                table([_row(runtime) for runtime in self.runtimes], _HEADER),
                *([""] if self.absent else []),
                *(f"{name}: {why}" for name, why in self.absent.items()),
                "",
                *(str(self.roofline).splitlines() if self.roofline else [f"no roofline: {self.no_roofline}"]),
                "",
                self.verdict,
            ]
        )

    def _described(self) -> list[str]:
        where = f" on core{'s' * (len(self.cores) > 1)} {', '.join(map(str, self.cores))}" if self.cores else ""
        lines = [
            f"{self.network}: input {by(self.shape)}, {plural(self.threads, 'thread')}{where}, {self.cpu}",
            f"{self.origin}; {plural(self.rounds, 'round')} of {self.calls} calls; agreement with {self.reference}",
        ]
        if self.facts is not None:
            f = self.facts
            apart = f", {f.live_macs / 1e6:.4g} M of them see the input" if f.live_macs < f.sparse_macs else ""
            lines.append(
                f"zeros: {f.pruned_sparsity:.2%} of {f.pruned_weights / 1e6:.3g} M weights in pruned layers, "
                f"{f.sparsity:.2%} of all {f.weights / 1e6:.3g} M; multiply-adds left: "
                f"{f.sparse_macs / 1e6:.4g} M of {f.macs / 1e6:.4g} M{apart}"
            )
        return lines

    def plot(self, ax: Axes | None = None) -> Axes:
        """Median time of each runtime, with its quartiles."""
        ax = new_axes(ax)
        ends = np.array([[r.median_ms - r.low_ms, r.high_ms - r.median_ms] for r in self.runtimes]).T
        ax.barh([r.name for r in self.runtimes], [r.median_ms for r in self.runtimes], xerr=ends)
        ax.set_xlabel("milliseconds")
        return ax


_HEADER = ["runtime", "best ms", "median ms", "quartiles", "x fastest dense", "deviation", "resident MB", "note"]


def _row(runtime: Runtime) -> list[str]:
    return [
        f"{runtime.name} {runtime.version}",
        f"{runtime.best_ms:.3f}",
        f"{runtime.median_ms:.3f}",
        f"{runtime.low_ms:.3f}-{runtime.high_ms:.3f}",
        ratio(runtime),
        f"{runtime.deviation:.1e}",
        "-" if runtime.resident_bytes is None else f"{runtime.resident_bytes / 1e6:.1f}",
        runtime.note,
    ]


def ratio(runtime: Runtime | None) -> str:
    """A runtime's ratio with its quartiles, as tables show it."""
    if runtime is None or runtime.ratio is None:
        return "-"
    told = f"{runtime.ratio:.2f} [{runtime.ratio_low:.2f}-{runtime.ratio_high:.2f}]"
    return f"{told} noisy" if runtime.noisy else told


def by(shape: Sequence[int]) -> str:
    """A shape as people write it.

    Example:
        >>> by((1, 3, 32, 32))
        '1x3x32x32'
    """
    return "x".join(map(str, shape))


def plural(number: int, what: str) -> str:
    """A number with its noun.

    Example:
        >>> plural(1, "thread"), plural(2, "thread")
        ('1 thread', '2 threads')
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def summary(benchmarks: Sequence[Benchmark]) -> str:
    """Several benchmarks as one text table, a row each, with the verdicts below."""
    header, rows = _overview(benchmarks)
    told = [f"{b.network} {by(b.shape)} {_zeros(b)}: {b.verdict}" for b in benchmarks]
    missing = {f"{name}: {why}" for b in benchmarks for name, why in b.absent.items()}
    return "\n".join([table(rows, header), "", *sorted(missing), *told])


def markdown(benchmarks: Sequence[Benchmark]) -> str:
    """Several benchmarks as one Markdown table, a row each."""
    header, rows = _overview(benchmarks)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _overview(benchmarks: Sequence[Benchmark]) -> tuple[list[str], list[list[str]]]:
    dense = list(dict.fromkeys(r.name for b in benchmarks for r in b.runtimes if r.dense))
    rows = []
    for b in benchmarks:
        ours, best = b.ours, b.best_over_best
        peers = [next((r for r in b.runtimes if r.name == name), None) for name in dense]
        rows.append(
            [
                b.network,
                by(b.shape),
                f"{_zeros(b)}{', constant output' if b.facts is not None and b.facts.constant else ''}",
                _kept(b),
                *(_times(runtime) for runtime in (ours, *peers)),
                ratio(ours),
                "-" if best is None else f"{best:.2f}",
                "-"
                if b.roofline is None or b.roofline.ratio is None
                else f"{b.roofline.ratio:.1f}, {b.roofline.binds}",
                "-" if ours is None else f"{ours.deviation:.0e}",
            ]
        )
    header = ["network", "input", "zeros", "kept weights", "ours, best / median ms", *dense]
    return [*header, "x fastest dense", "best / best", "bound", "deviation"], rows


def _zeros(b: Benchmark) -> str:
    return "-" if b.facts is None else f"{100 * b.facts.pruned_sparsity:.4g} %"


def _kept(b: Benchmark) -> str:
    if b.facts is None:
        return "-"
    return f"{(1 - b.facts.pruned_sparsity) * b.facts.pruned_weights / 1e3:.0f} k"


def _times(runtime: Runtime | None) -> str:
    return "-" if runtime is None else f"{runtime.best_ms:.2f} / {runtime.median_ms:.2f}"
