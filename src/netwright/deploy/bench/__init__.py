"""One network in every runtime that is installed: time, agreement, memory, and what the machine allows at best.

    netwright bench resnet18 --sparsity 0.95

All runtimes get the same weights, zeros included, the same input, as many threads as pinned cores, and take turns.
Names are resolved when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netwright.lazy import exports

_NAMES = {
    "COMPETITORS": "peers",
    "Benchmark": "result",
    "Competitor": "peers",
    "Facts": "facts",
    "Layer": "facts",
    "Peaks": "roofline",
    "Prepared": "peers",
    "Recipe": "subject",
    "Roofline": "roofline",
    "Runtime": "result",
    "Subject": "subject",
    "bench": "protocol",
    "describe": "facts",
    "markdown": "result",
    "measure_peaks": "roofline",
    "pinned": "worker",
    "summary": "result",
}

if TYPE_CHECKING:
    from netwright.deploy.bench.facts import Facts, Layer, describe
    from netwright.deploy.bench.peers import COMPETITORS, Competitor, Prepared
    from netwright.deploy.bench.protocol import bench
    from netwright.deploy.bench.result import Benchmark, Runtime, markdown, summary
    from netwright.deploy.bench.roofline import Peaks, Roofline, measure_peaks
    from netwright.deploy.bench.subject import Recipe, Subject
    from netwright.deploy.bench.worker import pinned

__all__ = [
    "COMPETITORS",
    "Benchmark",
    "Competitor",
    "Facts",
    "Layer",
    "Peaks",
    "Prepared",
    "Recipe",
    "Roofline",
    "Runtime",
    "Subject",
    "bench",
    "describe",
    "markdown",
    "measure_peaks",
    "pinned",
    "summary",
]

__getattr__, __dir__ = exports(__name__, _NAMES, __all__)
