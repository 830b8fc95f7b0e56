"""The searcher of a run."""

from __future__ import annotations

import pytest

from netwright.design.options import Options
from netwright.design.search_stage import make_searcher, make_supernet
from netwright.search import METHODS, method


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
def test_the_searcher_is_the_one_that_was_asked_for(name):
    space = "micro-chain" if name == "single-path" else "micro-darts-2-shared"
    options = Options(data="digits", search=name, space=space)
    supernet = make_supernet(options, (1, 8, 8), 3, 4, "cifar")
    epochs = [1] * len(method(name).shares)
    searcher = make_searcher(options, supernet, epochs)
    assert type(searcher) is method(name)
    assert searcher.epochs == sum(epochs)


def test_superkernels_need_a_chain_and_decide_by_thresholds():
    options = Options(data="digits", search="single-path")
    with pytest.raises(ValueError, match=r"a space of blocks, such as 'micro-chain', got 'micro-darts'"):
        make_supernet(options, (1, 8, 8), 3, 4, "cifar")
    options = Options(data="digits", search="single-path", space="micro-chain", select="sample")
    supernet = make_supernet(options, (1, 8, 8), 3, 4, "cifar")
    with pytest.raises(ValueError, match="select must be argmax, got SampleSelector"):
        make_searcher(options, supernet, [1, 1])
