"""Unknown arguments of searchers are refused in the name of the class that is called."""

from __future__ import annotations

import copy

import pytest

from netwright.nn.convnet import SmallConvNet
from netwright.search import (
    DARTS,
    DASS,
    RARTS,
    SDDARTS,
    FBNet,
    PricedSearch,
    ProxylessNAS,
    Searcher,
    SinglePathNAS,
    SuperKernelSupernet,
    WidthSearch,
    spaces,
)

CHAIN = spaces.get("micro-chain")


def network(kind):
    if kind is WidthSearch:
        return SmallConvNet((4, 8), 0, 3, 1)
    return SuperKernelSupernet(CHAIN, 1, 3, channels=4) if kind is SinglePathNAS else CHAIN.supernet(1, 3, channels=4)


@pytest.mark.parametrize(
    "kind", [Searcher, DARTS, RARTS, DASS, SDDARTS, FBNet, ProxylessNAS, PricedSearch, SinglePathNAS, WidthSearch]
)
def test_the_class_and_the_nearest_argument_are_named(kind):
    with pytest.raises(TypeError, match=rf"^{kind.__name__} has no argument 'clipp'; did you mean clip\?$"):
        kind(network(kind), clipp=1.0)
    with pytest.raises(TypeError, match=rf"^{kind.__name__} has no argument 'penalty'; choose one of "):
        kind(network(kind), penalty=1.0)


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        (RARTS, "arch_lr", r"did you mean .*lr\?"),
        (RARTS, "method", "the step is the method itself; Searcher takes any"),
        (SDDARTS, "stages", "Searcher takes any"),
        (DASS, "momentum", "it is a part of stages"),
        (WidthSearch, "selector", "widths are read off the gates"),
    ],
)
def test_an_argument_that_a_method_has_settled_says_why(kind, name, why):
    with pytest.raises(TypeError, match=f"^{kind.__name__} has no argument '{name}'; {why}"):
        kind(network(kind), **{name: None})


def test_arguments_go_through_several_classes():
    search = SDDARTS(network(SDDARTS), epochs=2, alpha_lr=0.5, momentum=0.5)
    assert (search.epochs, search.config()["alpha_lr"], search.config()["momentum"]) == (2, 0.5, 0.5)
    assert SinglePathNAS(network(SinglePathNAS), epochs=2, ema=None).ema is None
    assert copy.deepcopy(search).epochs == 2


def test_a_class_of_ones_own_answers_for_its_options():
    class Own(DARTS):
        def __init__(self, supernet, **options):
            self.own = options.pop("own")
            super().__init__(supernet, **options)

    class Strict(DARTS):
        def __init__(self, supernet, own):
            super().__init__(supernet, epochs=own)

    made = Own(network(DARTS), own=3, epochs=2)
    assert (made.own, made.epochs) == (3, 2)
    with pytest.raises(TypeError, match=r"^Strict has no argument 'owm'; did you mean own\?$"):
        Strict(network(DARTS), owm=1)
