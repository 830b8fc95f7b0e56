"""netwright designs, trains, compresses, explains, verifies and studies neural networks.

Names are resolved when they are first used, so that ``import netwright`` loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "cite": "netwright.papers.index",
    "load": "netwright.design.model",
}
_PACKAGES = (
    "compress",
    "console",
    "cost",
    "data",
    "deploy",
    "design",
    "diagnose",
    "explain",
    "metrics",
    "nn",
    "page",
    "papers",
    "parallel",
    "results",
    "search",
    "seeding",
    "storage",
    "train",
    "verify",
)

if TYPE_CHECKING:
    from netwright.design.model import load
    from netwright.papers.index import cite

__all__ = ["__version__", "cite", "load"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"netwright.{name}")
    raise AttributeError(f"module 'netwright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
