"""Lines above and below every bend: against samples, against affine forms, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from verified import NETS, drawn, inputs_of, network, perceptron, points_of

from netwright.deploy.graph.ir import IDENTITY
from netwright.verify import Network, robustness_radii
from netwright.verify.bounds import analyse
from netwright.verify.forms import bare
from netwright.verify.relaxation import ALL, Lines, Relaxation


def box(made, radius, seed=1):
    centre = torch.rand(made.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return centre - radius, centre + radius


def least(made, low, high, label=0):
    """The least margin over each rival among many points, in float64 and in float32."""
    points = points_of(low, high, 10_000)
    found = []
    for dtype in (torch.float64, torch.float32):
        logits = made.forward(points.to(dtype), 0, dtype=dtype)
        margins = logits[:, label, None] - logits
        found.append(margins.double()[:, [j for j in range(made.classes) if j != label]].amin(0))
    return torch.minimum(*found)


@pytest.mark.parametrize("radius", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_margins_hold_ten_thousand_samples_and_tighten(name, radius):
    made = network(name)
    low, high = box(made, radius)
    true = least(made, low, high)
    intervals, *_ = analyse(made, low, high, forms=False).margins(0)
    loose, some, tight = (Relaxation(made, low, high, most=most).margins(0)[0] for most in (0, 2, ALL))
    assert bool((tight <= true).all())
    assert bool((some <= true).all())
    assert bool((loose <= true).all())
    room = 1e-3 * (1 + true.abs())  # of rounding in float32, which intervals leave to a number of its own
    assert bool((intervals - room <= loose).all())
    if radius < 1:  # where nearly every sign is open, intervals are as good
        assert tight.sum() > intervals.sum() + 0.1 * (true - intervals).sum()


@pytest.mark.parametrize("name", NETS)
def test_they_are_those_of_affine_forms(name):
    """Forms are cut by intersecting ranges at every step, lines are not: equal up to that and to rounding."""
    made = network(name)
    low, high = box(made, 0.02)
    forms, error, rivals = analyse(made, low, high).margins(0)
    lines, same = Relaxation(made, low, high).margins(0)
    assert rivals.tolist() == same.tolist()
    assert bool((lines <= forms + 1e-9).all())
    assert bool((forms - lines <= 2 * error + 2e-3 * (forms - least(made, low, high)) + 1e-9).all())


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish])
def test_smooth_activations_count_by_their_range(act):
    made = Network(drawn(2, lambda: perceptron(4, 12, 3, act=act)), (4,))
    low, high = box(made, 0.3)
    found = Relaxation(made, low, high).margins(0)[0]
    assert bool((found <= least(made, low, high)).all())
    # The last layer is affine: its rows are put together before the ranges of the units come in.
    assert bool((found >= analyse(made, low, high, forms=False).margins(0)[0] - 1e-4).all())


def test_products_and_gates_count_by_their_range():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.gate, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = self.body(x).relu()
            x = x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
            return self.head(x.amax((2, 3)))

    made = Network(drawn(1, Gated), (1, 6, 6))
    low, high = box(made, 0.05)
    assert bool((Relaxation(made, low, high).margins(0)[0] <= least(made, low, high)).all())


def test_one_unit_by_hand():
    """relu(x) - 0.25 x over [-1, 1]: below by relu(x) >= 0 or x, above by (x + 1) / 2."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [0.0]]))
        net[0].bias.copy_(torch.tensor([0.0, 1.0]))
        net[2].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        net[2].bias.copy_(torch.tensor([0.5, 0.0]))
    made = Network(net, (1,))
    found = Relaxation(made, torch.tensor([-1.0]), torch.tensor([1.0]))
    assert found.open == 1
    assert float(found.margins(0)[0]) == pytest.approx(0.5, abs=1e-5)  # 0.5 + relu(x) >= 0.5
    assert float(found.margins(1)[0]) == pytest.approx(-1.5, abs=1e-5)  # -(0.5 + (x + 1) / 2) at x = 1
    skewed = Relaxation(made, torch.tensor([-1.0]), torch.tensor([2.0]))
    assert float(skewed.margins(0)[0]) == pytest.approx(0.5, abs=1e-5)  # by its range; the line x gives -0.5


def test_a_margin_within_rounding_is_not_certain():
    """Sums of large numbers that cancel: float32 loses what is above 0 in exact arithmetic."""
    net = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1e7, -1e7, 1.0], [0.0, 0.0, 0.0]]))
        net[0].bias.copy_(torch.tensor([1e-3, 0.0]))
    made = Network(net, (3,))
    x = torch.tensor([1.0, 1.0, 0.0])
    assert float(made.logits(x)[0, 0]) > 0
    assert float(Relaxation(made, x, x).margins(0)[0]) < 0
    assert float(Relaxation(made, x * 0, x * 0).margins(0)[0]) > 0


def test_an_activation_that_rounds_is_part_of_it():
    """leaky_relu(x) of x = -3 is -3 s, which float32 rounds: no margin below that is certain, as one of a ReLU is."""
    slack = {}
    for act in (nn.ReLU(), nn.LeakyReLU(0.1)):
        made = Network(drawn(0, lambda act=act: nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2))), (2,))
        found = Relaxation(made, torch.full((2,), 0.5), torch.full((2,), 0.5))
        (lines,) = (step for step in found._steps if isinstance(step, Lines))
        z = found.ranges[lines.source].largest
        slack[type(act)] = float((lines.slack / z).max())
        if isinstance(act, nn.LeakyReLU):
            assert bool((lines.slack >= 2**-24 * (0.1 * z).clamp(max=1)).all())
    assert slack[nn.ReLU] < 2**-30 < slack[nn.LeakyReLU]


def test_from_a_hidden_layer():
    made = network("perceptron")
    x = torch.rand(made.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    alpha = made.activation(x, 1)
    found = Relaxation(made, alpha - 0.05, alpha + 0.05, first=1).margins(0)[0]
    logits = made.forward(points_of(alpha - 0.05, alpha + 0.05, 5000), 1)
    assert bool((found <= (logits[:, :1] - logits)[:, 1:].amin(0)).all())
    assert bool(found.isfinite().all())


def test_the_time_is_kept():
    with pytest.raises(TimeoutError):
        Relaxation(network("branches"), torch.zeros(1, 4, 4), torch.ones(1, 4, 4), deadline=-math.inf)


def test_an_operation_without_activation():
    for node in network("convolutional").graph.nodes:
        op, act = bare(node.op)
        assert getattr(op, "act", IDENTITY) == IDENTITY or op is node.op
        assert act == getattr(node.op, "act", IDENTITY)


def test_radii_of_a_deep_network():
    """Five convolutions: bounds from intervals alone prove half as much."""

    def deep():
        parts = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()]
        for _ in range(4):
            parts += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

    made = Network(drawn(0, deep), (1, 8, 8))
    x = torch.stack(inputs_of(made, 4)[1::2])
    labels = made.logits(x).argmax(1)
    found = robustness_radii(made, x, labels, timeout=60.0)
    quick = robustness_radii(made, x, labels, tight=False)
    assert all(0 < a <= b for a, b in zip(quick.proved, found.proved, strict=True))
    assert quick.broken == found.broken
    for one, label, proved, broken in zip(x, labels.tolist(), found.proved, found.broken, strict=True):
        assert 0 < proved < (broken or math.inf)
        points = points_of((one - proved).clamp(0, 1), (one + proved).clamp(0, 1), 2000)
        assert bool((made.logits(points).argmax(1) == label).all())
