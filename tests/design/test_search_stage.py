"""The searcher of a run."""

from __future__ import annotations

import pytest

from netwright.design.options import Options
from netwright.design.search_stage import make_searcher
from netwright.search import METHODS, method, spaces


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
def test_the_searcher_is_the_one_that_was_asked_for(name):
    supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
    epochs = [1] * len(method(name).shares)
    searcher = make_searcher(Options(data="digits", search=name), supernet, epochs)
    assert type(searcher) is method(name)
    assert searcher.epochs == sum(epochs)
