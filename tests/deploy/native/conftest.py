"""Networks of tests are small: here threads share every step all the same."""

import pytest

from netwright.deploy.native import choose


@pytest.fixture(autouse=True)
def shared_always(monkeypatch):
    monkeypatch.setattr(choose, "SHARED_CYCLES", 0.0)
    monkeypatch.setattr(choose, "SHARED_PIXELS", 0)
