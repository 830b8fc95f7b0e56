"""One small finished run, shared by the tests that look at it."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_once import made_once
from tiny_run import TINY


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from netwright.design.pipeline import design

    return made_once(tmp_path_factory, "finished-run", lambda folder: design("digits", out=str(folder), **TINY))
