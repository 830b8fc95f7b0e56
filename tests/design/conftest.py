"""One small finished run, shared by the tests that look at it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import TINY


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from netwright.design.pipeline import design

    folder = tmp_path_factory.mktemp("design") / "run"
    design("digits", out=str(folder), **TINY)
    return folder
