"""One small finished run, shared by the tests that look at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from made_once import made_once
from tiny_run import TINY, brief

from netwright.design import timing


@pytest.fixture(scope="session", autouse=True)
def _brief() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SOLVER_SECONDS", timing.SOLVER_SECONDS)  # to be as it was in tests elsewhere
        brief()
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from netwright.design.pipeline import design

    return made_once(tmp_path_factory, "finished-run", lambda folder: design("digits", out=str(folder), **TINY))


@pytest.fixture(scope="session")
def halves(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of two classes that a brighter upper half tells apart, 240 images of 8 x 8."""
    draws = np.random.default_rng(0)
    labels = np.arange(240) % 2
    images = draws.integers(0, 120, (240, 8, 8))
    images[:, :4] += 120 * labels[:, None, None]
    path = tmp_path_factory.mktemp("data") / "halves.npz"
    np.savez(path, x=images.astype(np.uint8), y=labels)
    return str(path)
