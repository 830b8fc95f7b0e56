"""The searcher of a run is the one that was asked for."""

import pytest

from netwright import search
from netwright.design.options import Options
from netwright.design.search_stage import STAGE_SHARES, make_searcher
from netwright.search import spaces


@pytest.mark.parametrize("name", [name for name in search.METHODS if name != "random"])
def test_the_searcher_is_the_one_that_was_asked_for(name):
    supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2)
    epochs = [2] * len(STAGE_SHARES.get(name, (1,)))
    searcher = make_searcher(Options(data="digits", search=name), supernet, epochs)
    assert type(searcher) is search.method(name)
    assert searcher.epochs == sum(epochs)
