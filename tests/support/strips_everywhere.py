"""Networks of tests fit any cache: here their layers run in strips all the same."""

from __future__ import annotations

import pytest

from netwright.deploy.native.chains import Chains
from netwright.deploy.native.strips import Strips


def force(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """From now on all layers that can do so run in strips of ``rows`` rows, in chains as long as they can be."""

    def cut(self: Chains, begin: int, end: int) -> Strips:
        chain = [layer for layer in self.layers[begin:end] if layer is not None]
        return Strips(tuple(chain), self.shapes, rows, self.threads)

    monkeypatch.setattr(Chains, "_cut", cut)
    monkeypatch.setattr(Chains, "_saved", lambda self, begin, end, strips: float((end - begin) ** 2))
