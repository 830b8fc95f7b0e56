"""Taking a network out of Python: the ONNX file with its own preprocessing, and what it costs to run.

Names are resolved when they are first used: importing this package loads neither torch nor ONNX Runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "Agreement": "onnx",
    "FileSize": "session",
    "Latency": "session",
    "Session": "session",
    "check": "onnx",
    "export": "onnx",
    "file_sizes": "session",
    "latency": "session",
}
_MODULES = ("onnx", "session")

if TYPE_CHECKING:
    from netwright.deploy.onnx import Agreement, check, export
    from netwright.deploy.session import FileSize, Latency, Session, file_sizes, latency

__all__ = ["Agreement", "FileSize", "Latency", "Session", "check", "export", "file_sizes", "latency"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"netwright.deploy.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"netwright.deploy.{name}")
    raise AttributeError(f"module 'netwright.deploy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
