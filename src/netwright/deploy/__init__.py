"""Taking a network out of Python, or making it fast inside: ONNX files with preprocessing, and the sparse runtime.

Names are resolved when they are first used: importing this package loads neither torch nor ONNX Runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netwright.lazy import exports

_NAMES = {
    "Agreement": "onnx",
    "ArtifactError": "stored",
    "BuildError": "native.build",
    "FileSize": "session",
    "Latency": "session",
    "Profile": "profile",
    "Session": "session",
    "SparseModel": "model",
    "UnsupportedOperator": "graph",
    "check": "onnx",
    "compile": "model",
    "export": "onnx",
    "file_sizes": "session",
    "latency": "session",
    "load": "model",
}
_MODULES = ("onnx", "session")

if TYPE_CHECKING:
    from netwright.deploy.graph import UnsupportedOperator
    from netwright.deploy.model import SparseModel, compile, load
    from netwright.deploy.native.build import BuildError
    from netwright.deploy.onnx import Agreement, check, export
    from netwright.deploy.profile import Profile
    from netwright.deploy.session import FileSize, Latency, Session, file_sizes, latency
    from netwright.deploy.stored import ArtifactError

__all__ = [
    "Agreement", "ArtifactError", "BuildError", "FileSize", "Latency", "Profile", "Session", "SparseModel",
    "UnsupportedOperator", "check", "compile", "export", "file_sizes", "latency", "load",
]  # fmt: skip

__getattr__, __dir__ = exports(__name__, _NAMES, __all__, _MODULES)
