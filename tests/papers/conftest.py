from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import netwright.data
from netwright.papers import index


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_load_data = netwright.data.load


@functools.cache
def _fashion_mnist():
    return _load_data("fashion-mnist")


@pytest.fixture(autouse=True)
def fashion_mnist_is_read_once(monkeypatch) -> None:
    """A second each time, and an experiment asks for it several times."""

    def load(name, **options):
        return _fashion_mnist() if name == "fashion-mnist" and not options else _load_data(name, **options)

    monkeypatch.setattr(netwright.data, "load", load, raising=False)


@pytest.fixture
def experiment(monkeypatch, tmp_path) -> ModuleType:
    """The paper ``coin-toss`` as if it were netwright's, with a folder of its own for published evidence."""
    path = tmp_path / "package" / "coin_toss.py"
    path.parent.mkdir()
    path.write_text((Path(__file__).parent / "experiment.py").read_text())
    module = _load("coin_toss", path)
    known = {**index.modules(), "coin-toss": module}
    monkeypatch.setattr(index, "modules", lambda: known)
    return module


@pytest.fixture
def pages() -> ModuleType:
    """The script that writes the pages."""
    return _load("method_pages", Path(__file__).parents[2] / "scripts" / "method_pages.py")
