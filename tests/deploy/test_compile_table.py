"""The table of networks that the sparse runtime runs, row by row: what docs/assets/compiles.md says must be so."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from netwright.deploy.native.build import COMPILERS

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_table.py"
spec = importlib.util.spec_from_file_location("compile_table", SCRIPT)
assert spec is not None
assert spec.loader is not None
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)
ROWS = table.TABLE.read_text().splitlines()[2:]


def test_the_table_lists_every_network_once():
    assert [tuple(part.strip() for part in row.split("|")[1:3]) for row in ROWS] == [
        tuple(name.split(":")) for name in table.NETWORKS
    ]


@pytest.mark.slow
@pytest.mark.skipif(not any(shutil.which(name) for name in COMPILERS), reason="no C compiler is installed")
@pytest.mark.parametrize("name", table.NETWORKS)
def test_row(name):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    assert table.row(name) in ROWS
