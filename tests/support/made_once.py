"""Folders that are costly to make, made once for all workers of pytest-xdist."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A copy, for this worker, of the folder that ``make`` fills for whichever worker asks first."""
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"made-{name}"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            fresh = shared.with_suffix(".new")
            shutil.rmtree(fresh, ignore_errors=True)  # of a worker that failed
            make(fresh)
            fresh.rename(shared)
    own = factory.mktemp(name) / "run"
    shutil.copytree(shared, own)
    return own
