"""A network as a list of operations: captured from torch, made smaller, checked, and executed as an oracle.

Names are resolved when they are first used: the intermediate form and its check need numpy only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netwright.lazy import exports

_NAMES = {
    "Graph": "ir",
    "Node": "ir",
    "Segments": "segments",
    "Unsupported": "tracing",
    "UnsupportedOperator": "tracing",
    "capture": "tracing",
    "check": "validation",
    "optimise": "passes",
    "plain_copy": "tracing",
    "run": "reference",
    "split": "segments",
}

if TYPE_CHECKING:
    from netwright.deploy.graph.ir import Graph, Node
    from netwright.deploy.graph.passes import optimise
    from netwright.deploy.graph.reference import run
    from netwright.deploy.graph.segments import Segments, split
    from netwright.deploy.graph.tracing import Unsupported, UnsupportedOperator, capture, plain_copy
    from netwright.deploy.graph.validation import check

__all__ = [
    "Graph", "Node", "Segments", "Unsupported", "UnsupportedOperator", "capture", "check", "optimise", "plain_copy",
    "run", "split",
]  # fmt: skip

__getattr__, __dir__ = exports(__name__, _NAMES, __all__)
