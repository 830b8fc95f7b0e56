"""The searcher of a run."""

from __future__ import annotations

import pytest

from netwright.console import UserError
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
    with pytest.raises(UserError, match=r"a space of blocks, such as 'micro-chain', got 'micro-darts'"):
        Options(data="digits", search="single-path")
    with pytest.raises(
        UserError, match=r"choice 'layer_0' must offer all pairs(.|\n)*add --space with one of micro-chain"
    ):
        Options(data="digits", search="single-path", space="fbnet")
    for name in ("sample", "perturbation"):
        with pytest.raises(UserError, match=f"select '{name}' has no meaning after single-path"):
            Options(data="digits", search="single-path", space="micro-chain", select=name)
    Options(data="digits", search="single-path", space="proxylessnas-cpu", select="argmax")
