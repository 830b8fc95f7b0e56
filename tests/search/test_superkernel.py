"""Superkernels: nested kernels and channels, indicators, the runtime model, gradients by hand."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.search.superkernel import SuperKernelDepthwise, draw_scales, indicator_ste
from netwright.seeding import seeded, stream

ROW = {(3, 0.5): 4.4905, (3, 1.0): 9.2015, (5, 0.5): 5.9248, (5, 1.0): 11.5892}  # the paper's first layer, ms
ON, OFF = 0.0, 99.0


def layer(channels=6, seed=0, **options):
    with seeded(seed, "layer"):
        return SuperKernelDepthwise(channels, **options)


def decided(thresholds, **options):
    made = layer(**options)
    made.thresholds.data.copy_(torch.tensor(thresholds))
    return made


def image(channels=6, size=9):
    return torch.randn(2, channels, size, size, generator=stream(0, "image"))


def by_definition(weight, thresholds, channels, *, squared=False, skippable=True):
    """The formulas of the paper on whole tensors, for kernels 3 and 5 and halves of the channels."""
    half = torch.zeros_like(weight)
    half[:channels] = 1
    inner = torch.zeros_like(weight)
    inner[..., 1:4, 1:4] = 1

    def norm(part):
        return part.square().sum() if squared else part.norm()

    t5, t50, t100 = thresholds
    w3, rim = weight * inner, weight * (1 - inner)
    d5 = indicator_ste(norm(rim) - t5)
    wk = w3 + d5 * rim
    d100 = indicator_ste(norm(wk * (1 - half)) - t100)
    d50 = indicator_ste(norm(wk * half) - t50) if skippable else torch.ones(()).to(weight)
    return d50 * (wk * half + d100 * wk * (1 - half)), d5, d50, d100


def paper_runtime(d5, d50, d100, row=ROW):
    rho = row[3, 1.0] / row[5, 1.0]
    rc = d50 * (row[5, 0.5] + d100 * (row[5, 1.0] - row[5, 0.5]))
    return rho * rc + (1 - rho) * rc * d5


# Indicators -----------------------------------------------------------------------------------------------------------


def test_the_indicator_is_a_step_with_the_derivative_of_the_sigmoid():
    z = torch.tensor([-3.0, -1e-6, 0.0, 2.0, 50.0], dtype=torch.float64, requires_grad=True)
    d = indicator_ste(z)
    assert d.tolist() == [0, 0, 1, 1, 1]
    (grad,) = torch.autograd.grad(d.sum(), z)
    assert grad[2].item() == pytest.approx(0.25, abs=1e-12)
    assert grad[3].item() == pytest.approx(0.104994, abs=1e-6)
    torch.testing.assert_close(grad, torch.sigmoid(z) * (1 - torch.sigmoid(z)))


@pytest.mark.parametrize("d", [0.0, 1.0])
def test_dropout_keeps_the_mean_of_an_indicator(d):
    with seeded(0, "draws"):
        scales = draw_scales((100_000,), 0.4, torch.zeros(()))
    assert sorted(set(scales.tolist())) == pytest.approx([0.0, 1 / 0.6])
    assert (scales > 0).float().mean().item() == pytest.approx(0.6, abs=0.01)
    assert (d * scales).mean().item() == pytest.approx(d, abs=0.01)


# Kernels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 9])
def test_everything_on_is_a_depthwise_convolution_with_the_largest_kernel(stride, size):
    made = layer(stride=stride)
    plain = nn.Conv2d(6, 6, 5, stride, padding=2, groups=6, bias=False)
    plain.weight = nn.Parameter(made.weight.detach())
    torch.testing.assert_close(made(image(size=size)), plain(image(size=size)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 9])
def test_without_its_rim_it_is_a_smaller_convolution(stride, size):
    made = decided([OFF, ON, ON], stride=stride)
    expected = functional.conv2d(image(size=size), made.weight[..., 1:4, 1:4], None, stride, 1, 1, 6)
    torch.testing.assert_close(made(image(size=size)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("thresholds", "decision"),
    [
        ([ON, ON, ON], (5, 1.0)),
        ([OFF, ON, ON], (3, 1.0)),
        ([ON, ON, OFF], (5, 0.5)),
        ([OFF, ON, OFF], (3, 0.5)),
        ([ON, OFF, ON], None),
        ([OFF, OFF, ON], None),
        ([ON, OFF, OFF], None),
        ([OFF, OFF, OFF], None),
    ],
)
def test_decisions_by_the_table_of_indicators(thresholds, decision):
    made = decided(thresholds)
    assert made.decision() == decision
    assert [d.item() for d in made.indicators().values()] == [float(t == ON) for t in thresholds]
    kernel, ratio = decision or (1, 0.0)
    y, margin = made(image()), (5 - kernel) // 2
    left = torch.zeros_like(made.weight)
    left[: round(6 * ratio), :, margin : 5 - margin, margin : 5 - margin] = 1
    torch.testing.assert_close(y, functional.conv2d(image(), made.weight * left, None, 1, 2, 1, 6), atol=1e-6, rtol=0)
    assert y[:, round(6 * ratio) :].abs().max() == 0 if ratio < 1 else y.abs().min() > 0


def test_a_layer_that_may_not_go_keeps_its_first_channels():
    made = decided([ON, OFF, OFF], skippable=False)
    assert made.decision() == (5, 0.5)
    assert made.indicators()["d50c"] == 1
    (grad,) = torch.autograd.grad(made.expected_runtime(ROW), made.thresholds)
    assert grad[1] == 0


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("skippable", [False, True])
@pytest.mark.parametrize("channels", [6, 7])
def test_weights_and_gradients_are_those_of_the_definition(squared, skippable, channels):
    made = layer(channels, squared=squared, skippable=skippable).double()
    half = round(channels / 2)
    with torch.no_grad():
        norms = [made.weight.norm() ** (1 + squared) * share for share in (0.75, 0.55, 0.75)]
        made.thresholds.copy_(torch.stack(norms))  # near the norms, where derivatives are large
    target = torch.randn(made.weight.shape, generator=stream(0, "target"), dtype=torch.float64)
    weight, thresholds = made.weight, made.thresholds
    expected, *_ = by_definition(weight, thresholds, half, squared=squared, skippable=skippable)
    found = made.decide()
    torch.testing.assert_close(made.masked(found), expected, atol=1e-12, rtol=0)
    for objective in (lambda w, *d: (w * target).sum(), lambda w, *d: paper_runtime(*d)):
        ours = torch.autograd.grad(
            objective(made.masked(made.decide()), *made.decide().indicators), [weight, thresholds], allow_unused=True
        )
        theirs = torch.autograd.grad(
            objective(*by_definition(weight, thresholds, half, squared=squared, skippable=skippable)),
            [weight, thresholds],
        )
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-11, rtol=0)
            assert other.abs().max() > 1e-3


def test_three_kernels_and_three_ratios_are_nested():
    def rank(thresholds):
        return decided(thresholds, channels=9, kernels=(3, 5, 7), ratios=(1 / 3, 2 / 3, 1.0))

    made = rank([ON] * 5)
    assert made.decision() == (7, 1.0)
    assert list(made.indicators()) == ["d5x5", "d7x7", "d33.3333c", "d66.6667c", "d100c"]
    assert rank([ON, OFF, ON, ON, OFF]).decision() == (5, 2 / 3)
    # a ring outside of one that is off is off, and so is a group of channels
    made = rank([OFF, ON, ON, OFF, ON])
    assert made.decision() == (3, 1 / 3)
    x = image(9, 11)
    left = functional.conv2d(x[:, :3], made.weight[:3, :, 2:5, 2:5], None, 1, 1, 1, 3)
    torch.testing.assert_close(made(x), torch.cat([left, torch.zeros(2, 6, 11, 11)], 1), atol=1e-6, rtol=0)
    cells = made.cells()
    assert cells.shape == (3, 3)
    torch.testing.assert_close(
        cells[1, 2], (made.weight[3:6].square().sum() - made.weight[3:6, :, 1:6, 1:6].square().sum())
    )


def test_a_single_kernel_and_a_single_ratio():
    made = layer(kernels=(3,), ratios=(1.0,))
    assert made.thresholds.shape == (1,)
    assert made.decision() == (3, 1.0)
    assert made.expected_runtime({(3, 1.0): 2.0}).item() == 2.0


def test_norms_divided_by_the_root_of_their_size_do_not_grow_with_the_layer():
    for squared in (False, True):
        found = []
        for channels in (8, 800):
            made = layer(channels, squared=squared, scale="sqrt_numel").double()
            (grad,) = torch.autograd.grad(made.decide().indicators[0], made.thresholds)
            found.append(grad)
            w = made.weight.detach()
            rim = w.square().sum() - w[..., 1:4, 1:4].square().sum()
            mean = rim / (16 * channels)
            s = torch.sigmoid(mean if squared else mean.sqrt())
            assert grad.tolist() == pytest.approx([-float(s * (1 - s)), 0.0, 0.0], abs=1e-7)
        torch.testing.assert_close(*found, atol=0.01, rtol=0)
    wide = layer(800)
    assert torch.autograd.grad(wide.decide().indicators.sum(), wide.thresholds)[0].abs().max() < 1e-3


def test_zero_weights_are_on_and_have_finite_gradients():
    made = layer(weight=torch.zeros(6, 1, 5, 5))
    assert made.decision() == (5, 1.0)  # a norm of 0 is at least a threshold of 0
    grads = torch.autograd.grad(made.expected_runtime(ROW), [made.weight, made.thresholds])
    assert all(grad.isfinite().all() for grad in grads)


def test_factors_of_indicators_hold_in_training_only():
    made = layer()
    made.scales = torch.tensor([0.0, 1.0, 2.0])
    x, small = image(), functional.conv2d(image(), made.weight[..., 1:4, 1:4], None, 1, 1, 1, 6)
    torch.testing.assert_close(made(x)[:, :3], small[:, :3], atol=1e-6, rtol=0)
    torch.testing.assert_close(made(x)[:, 3:], 2 * small[:, 3:], atol=1e-6, rtol=0)
    made.eval()
    torch.testing.assert_close(made(x), functional.conv2d(x, made.weight, None, 1, 2, 1, 6), atol=1e-6, rtol=0)


def test_a_copy_is_a_layer_of_its_own():
    thresholds = nn.Parameter(torch.zeros(3))
    made = layer(thresholds=thresholds)
    assert [name for name, _ in made.named_parameters()] == ["weight"]
    other = copy.deepcopy(made)
    thresholds.data.fill_(OFF)
    assert made.decision() is None
    assert other.decision() == (5, 1.0)


# Runtime --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        ([ON, ON, ON], ROW[5, 1.0]),
        ([ON, ON, OFF], ROW[5, 0.5]),
        ([OFF, ON, ON], ROW[3, 1.0]),
        ([OFF, ON, OFF], 4.7041),  # the table has 4.4905
        ([ON, OFF, ON], 0.0),
    ],
)
def test_the_runtime_model_on_the_published_row(thresholds, expected):
    assert decided(thresholds).double().expected_runtime(ROW).item() == pytest.approx(expected, abs=1e-4)


def test_the_runtime_model_is_exact_on_both_outer_rows_of_any_table():
    kernels, ratios = (3, 5, 7), (0.25, 0.5, 1.0)
    row = {(k, r): 1.0 + k * r + 0.1 * k for k in kernels for r in ratios}
    for i, kernel in enumerate(kernels):
        for j, ratio in enumerate(ratios):
            thresholds = [ON if n <= i else OFF for n in (1, 2)] + [ON if n <= j else OFF for n in range(3)]
            made = decided(thresholds, channels=8, kernels=kernels, ratios=ratios).double()
            assert made.decision() == (kernel, ratio)
            modelled = row[7, ratio] * row[kernel, 1.0] / row[7, 1.0]
            assert made.expected_runtime(row).item() == pytest.approx(modelled, abs=1e-12)
            if kernel == 7 or ratio == 1.0:
                assert modelled == pytest.approx(row[kernel, ratio], abs=1e-12)


@pytest.mark.parametrize("on", [(True, True, True), (False, True, True), (True, True, False), (False, True, False)])
def test_gradients_of_thresholds_by_the_chain_rule(on):
    """R_l of one layer in float64: the direct term of t5, and the indirect ones through n100 and n50."""
    made = layer(8).double()
    w = made.weight.detach()
    rim, inner = w.clone(), torch.zeros_like(w)
    rim[..., 1:4, 1:4] = 0
    inner[..., 1:4, 1:4] = w[..., 1:4, 1:4]
    d5, d50, d100 = (float(value) for value in on)
    n5 = rim.norm()
    upper, lower = (inner[4:] + d5 * rim[4:]).norm(), (inner[:4] + d5 * rim[:4]).norm()
    shift = [-0.3 if value else 0.3 for value in on]
    with torch.no_grad():
        made.thresholds.copy_(torch.stack([n5 + shift[0], lower + shift[1], upper + shift[2]]))
    (grad,) = torch.autograd.grad(made.expected_runtime(ROW), made.thresholds)

    rho, gap = ROW[3, 1.0] / ROW[5, 1.0], ROW[5, 1.0] - ROW[5, 0.5]
    slope = [s * (1 - s) for s in (1 / (1 + math.exp(v)) for v in shift)]
    rc, mix = d50 * (ROW[5, 0.5] + d100 * gap), rho + (1 - rho) * d5
    by_d100, by_d50 = mix * d50 * gap, mix * (ROW[5, 0.5] + d100 * gap)
    assert grad[2].item() == pytest.approx(-by_d100 * slope[2], abs=1e-9)
    assert grad[1].item() == pytest.approx(-by_d50 * slope[1], abs=1e-9)
    # dn / dd5 = d5 ||rim on the group||^2 / n
    through = by_d100 * slope[2] * d5 * rim[4:].square().sum() / upper
    through += by_d50 * slope[1] * d5 * rim[:4].square().sum() / lower
    by_d5 = (1 - rho) * rc + float(through)
    assert grad[0].item() == pytest.approx(-by_d5 * slope[0], abs=1e-9)
    assert d5 == 0 or abs(float(through)) > 0.1


@pytest.mark.parametrize("scale", ["none", "sqrt_numel"])
def test_ratios_that_end_below_1_are_those_of_a_narrower_layer(scale):
    """Channels beyond the largest ratio say nothing and decide nothing."""
    wide = layer(8, ratios=(0.25, 0.5), scale=scale)
    narrow = SuperKernelDepthwise(4, ratios=(0.5, 1.0), scale=scale, weight=wide.weight.data[:4].clone())
    x = image(8)
    for thresholds in ([ON, ON, ON], [OFF, ON, ON], [ON, ON, OFF], [ON, OFF, ON]):
        for made in (wide, narrow):
            made.thresholds.data.copy_(torch.tensor(thresholds))
        torch.testing.assert_close(wide(x)[:, :4], narrow(x[:, :4]))
        assert not wide(x)[:, 4:].any()
        assert list(wide.indicators().values()) == list(narrow.indicators().values())
        assert (wide.decision() is None) == (narrow.decision() is None)
    wide.thresholds.data.zero_()
    assert wide.decision() == (5, 0.5)
    assert list(wide.indicators()) == ["d5x5", "d25c", "d50c"]
    row = {(3, 0.5): 2.0, (5, 0.25): 3.0, (5, 0.5): 4.0}
    assert wide.expected_runtime(row).item() == pytest.approx(4.0)
    wide(x).square().sum().backward()
    assert not wide.weight.grad[4:].any()


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SuperKernelDepthwise(0), r"channels must be >= 1, got 0"),
        (lambda: SuperKernelDepthwise(8, stride=1.5), r"stride must be a whole number >= 1, got 1.5"),
        (lambda: SuperKernelDepthwise(8, kernels=(3, 4)), r"kernels must be odd.*got \(3, 4\)"),
        (lambda: SuperKernelDepthwise(8, kernels=(5, 3)), r"kernels must be odd, >= 1 and ascending, got \(5, 3\)"),
        (lambda: SuperKernelDepthwise(8, kernels=()), r"kernels must be"),
        (lambda: SuperKernelDepthwise(8, ratios=(0.5, 1.5)), r"ratios must lie in \(0, 1\], got 1.5"),
        (lambda: SuperKernelDepthwise(8, ratios=(0.0, 1.0)), r"ratios must lie in \(0, 1\]"),
        (lambda: SuperKernelDepthwise(8, ratios=(1.0, 0.5)), r"ascend"),
        (lambda: SuperKernelDepthwise(8, ratios=()), r"ratios must be at least one and ascend, got \(\)"),
        (lambda: SuperKernelDepthwise(2, ratios=(0.5, 0.6, 1.0)), r"different numbers of 2 channels"),
        (lambda: SuperKernelDepthwise(8, scale="root"), r"scale must be 'none' or 'sqrt_numel', got 'root'"),
        (lambda: SuperKernelDepthwise(8, weight=torch.zeros(8, 1, 3, 3)), r"weight must have shape \(8, 1, 5, 5\)"),
        (
            lambda: SuperKernelDepthwise(8, thresholds=nn.Parameter(torch.zeros(2))),
            r"thresholds must have shape \(3,\)",
        ),
        (lambda: draw_scales((1,), 1.0, torch.zeros(())), r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: layer().expected_runtime({**ROW, (5, 0.5): 0.0}), r"times must be > 0 and finite, got 0"),
        (lambda: layer().expected_runtime({**ROW, (3, 1.0): float("nan")}), r"times must be > 0 and finite, got nan"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_missing_rows_are_listed_and_needless_ones_may_miss():
    short = {key: ROW[key] for key in ((3, 1.0), (5, 0.5), (5, 1.0))}
    assert layer().expected_runtime(short).item() == pytest.approx(ROW[5, 1.0])
    with pytest.raises(KeyError, match=r"\(5, 0.5\)"):
        layer().expected_runtime({(3, 1.0): 1.0, (5, 1.0): 2.0})


def test_a_threshold_that_is_not_finite_is_no_decision():
    with pytest.raises(FloatingPointError, match="thresholds and weights must be finite"):
        decided([float("nan"), ON, ON]).decision()
