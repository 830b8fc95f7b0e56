import pytest
import torch
from torch import nn

from netwright.search import spaces
from netwright.search.selection import ArgmaxSelector, MagnitudeSelector
from netwright.search.supernet import Choice, SoftmaxGate, Supernet

SPACE = spaces.get("micro-darts-2-shared")  # none, skip_connect, max_pool_3x3, sep_conv_3x3, dil_conv_3x3


def _supernet(**alphas):
    supernet = SPACE.supernet(1, 3, channels=2)
    for key, alpha in supernet.arch.items():
        alpha.data.copy_(torch.tensor(alphas.get(key, [0.0] * 5)))
    return supernet


def test_the_two_strongest_edges_and_their_best_operations():
    supernet = _supernet(
        normal_0_2=[0, 0, 2, 0, 0],
        normal_1_2=[0, 0, 0, 3, 0],
        normal_0_3=[0, 0, 0, 0, 5],
        normal_1_3=[0, 1, 0, 0, 0],
        normal_2_3=[0, 2, 0, 0, 0],
    )
    genotype = MagnitudeSelector().select(supernet)
    assert genotype.normal.ops == (("max_pool_3x3", 0), ("sep_conv_3x3", 1), ("dil_conv_3x3", 0), ("skip_connect", 2))
    assert genotype == supernet.derive()


def test_ties_go_to_the_lowest_index():
    ops = MagnitudeSelector().select(_supernet()).normal.ops
    assert ops == (("skip_connect", 0), ("skip_connect", 1)) * 2


def test_none_weakens_an_edge_but_is_never_chosen():
    """Edge 0 has the largest alpha besides none, but none takes the softmax's mass: edges 1 and 2 win."""
    ops = MagnitudeSelector().select(
        _supernet(normal_0_3=[9, 4, 0, 0, 0], normal_1_3=[0, 0, 1, 0, 0], normal_2_3=[0, 0, 0, 1, 0])
    )
    assert ops.normal.ops[2:] == (("max_pool_3x3", 1), ("sep_conv_3x3", 2))


def test_predecessors_differ_even_when_one_edge_holds_the_two_strongest_operations():
    ops = MagnitudeSelector().select(_supernet(normal_1_3=[-9, 5, 5, -9, -9])).normal.ops[2:]
    assert ops == (("skip_connect", 0), ("skip_connect", 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_alphas_that_are_not_finite_are_refused(value):
    supernet = _supernet(normal_1_3=[value, 0, 0, 0, 0])
    with pytest.raises(FloatingPointError, match="normal_1_3"):
        MagnitudeSelector().select(supernet)


def test_each_cell_type_is_read_from_its_own_alphas():
    supernet = spaces.get("micro-darts-2").supernet(1, 3, channels=2)
    for key, alpha in supernet.arch.items():
        alpha.data.zero_()[4 if key.startswith("reduce") else 3] = 1.0
    genotype = supernet.derive()
    assert {name for name, _ in genotype.normal.ops} == {"sep_conv_3x3"}
    assert {name for name, _ in genotype.reduce.ops} == {"dil_conv_3x3"}


def test_argmax_reads_every_choice_of_a_chain():
    class Space:
        def genotype(self, decisions):
            return tuple(sorted(decisions.items()))

        def selector(self):
            return ArgmaxSelector()

    class Chain(Supernet):
        def __init__(self):
            super().__init__(Space(), 2)
            self.layers = nn.ModuleList(
                Choice({"a": nn.Identity(), "b": nn.Identity()}, key=key, gate=SoftmaxGate()) for key in ("x", "y")
            )
            self.classifier = nn.Linear(1, 2)
            self.initialise_arch(0, (1, 2, 2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x, self.arch[layer.key])
            return self.classifier(x.mean((2, 3)))

    supernet = Chain()
    supernet.arch["x"].data.copy_(torch.tensor([0.0, 1.0]))
    supernet.arch["y"].data.zero_()
    assert supernet.derive() == (("x", "b"), ("y", "a"))
