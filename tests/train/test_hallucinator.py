"""The Hallucinator: where it extrapolates to, what its network is given, shapes, gradients, and a compiled graph."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from netwright.train.hallucinator import Hallucinator, extrapolate

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_by_hand():
    q, k = torch.tensor([[1.0, 0]], dtype=DOUBLE), torch.tensor([[0.0, 1]], dtype=DOUBLE)
    e = extrapolate(q, k, 0.1)
    assert e.flatten().tolist() == pytest.approx([1.1, -0.1], abs=1e-12)
    assert functional.cosine_similarity(e, k).item() == pytest.approx(-0.09053575, abs=1e-8)
    assert functional.cosine_similarity(e, k).item() == pytest.approx(-0.1 / math.sqrt(1.22), abs=1e-12)


@given(st.integers(0, 1000), st.integers(2, 16), st.floats(0, 3))
@settings(max_examples=25, deadline=None)
def test_extrapolation_leads_away_from_the_key(seed, dim, ratio):
    q, k = functional.normalize(drawn(8, dim, seed=seed)), functional.normalize(drawn(8, dim, seed=seed + 1))
    e = extrapolate(q, k, ratio)
    before, after = functional.cosine_similarity(q, k), functional.cosine_similarity(e, k)
    assert bool((after <= before + 1e-12).all())
    assert torch.allclose(e - k, (1 + ratio) * (q - k), atol=1e-12)


def test_the_network_is_the_formula():
    hallucinator = Hallucinator(5, hidden=7).double()
    q, k = drawn(4, 5), drawn(4, 5, seed=1)
    found, keys = hallucinator(q, k, ratio=0.07)
    first, _, second, _, third = hallucinator.smooth
    inner = torch.cat([q, (1 + 0.07) * q - 0.07 * k], 1) @ first.weight.T + first.bias
    inner = inner.clamp_min(0) @ second.weight.T + second.bias
    h = inner.clamp_min(0) @ third.weight.T + third.bias
    assert torch.equal(found[:4], q)
    assert torch.allclose(found[4:], h, atol=1e-12)
    assert torch.equal(keys, torch.cat([k, k]))


def test_widths():
    shapes = [tuple(p.shape) for p in Hallucinator(8).smooth.parameters() if p.ndim == 2]
    assert shapes == [(16, 16), (16, 16), (8, 16)]


def test_a_network_that_passes_its_second_half_on():
    hallucinator = Hallucinator(3).double()
    with torch.no_grad():
        for parameter in hallucinator.parameters():
            parameter.zero_()
        for place in (0, 2):
            hallucinator.smooth[place].weight.copy_(torch.eye(6))
        hallucinator.smooth[4].weight[:, 3:] = torch.eye(3)
    k = drawn(5, 3).abs()
    q = k + 0.5  # so that the extrapolation is positive as well
    found, _ = hallucinator(q, k, ratio=0.1)
    assert torch.equal(found[5:], extrapolate(q, k, 0.1))


def test_nothing_hallucinated_is_no_nan():
    from netwright.train.contrastive.losses import info_nce, nt_xent

    hallucinator = Hallucinator(4)
    torch.nn.init.zeros_(hallucinator.smooth[4].weight)
    torch.nn.init.zeros_(hallucinator.smooth[4].bias)
    q, k = drawn(3, 4, dtype=torch.float32).requires_grad_(), drawn(3, 4, seed=1, dtype=torch.float32)
    found, keys = hallucinator(q, k)
    assert not found[3:].any()
    queue = functional.normalize(drawn(4, 6, dtype=torch.float32), dim=0)
    loss = info_nce(found, keys, queue, 0.2) + nt_xent(found, keys, 0.2)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in hallucinator.parameters())


def test_ratios_are_drawn_anew_within_their_range():
    torch.manual_seed(0)
    q = drawn(2000, 4)
    shared = torch.stack([Hallucinator(4).drawn_ratio(q) for _ in range(200)])
    each = Hallucinator(4, ratio_max=0.3, per_sample=True).drawn_ratio(q)
    assert shared.shape == (200,)
    assert each.shape == (2000, 1)
    for ratios, most in ((shared, 0.1), (each, 0.3)):
        assert float(ratios.min()) >= 0
        assert float(ratios.max()) <= most
        assert float(ratios.mean()) == pytest.approx(most / 2, rel=0.15)
    assert not Hallucinator(4, ratio_max=0).drawn_ratio(q).any()
    hallucinator = Hallucinator(4).double()
    first, second = hallucinator(q, -q)[0], hallucinator(q, -q)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    again = hallucinator(q, -q)[0]
    torch.manual_seed(5)
    assert torch.equal(again, hallucinator(q, -q)[0])


def test_a_traced_graph_does_not_freeze_the_ratio():
    hallucinator = Hallucinator(4)
    q, k = drawn(3, 4, dtype=torch.float32), drawn(3, 4, seed=1, dtype=torch.float32)
    traced = make_fx(hallucinator)(q, k)
    assert not torch.equal(traced(q, k)[0], traced(q, k)[0])


def test_gradients_reach_the_key_unless_it_is_detached():
    q, k = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=1).requires_grad_()
    hallucinator = Hallucinator(4).double()
    hallucinator(q, k)[0][3:].sum().backward()
    assert k.grad.any()
    k.grad = None
    hallucinator(q, k.detach())[0].sum().backward()
    assert k.grad is None
    assert torch.autograd.gradcheck(lambda a, b: hallucinator(a, b, 0.05), (q, k))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Hallucinator(0), "dim must be >= 1, got 0"),
        (lambda: Hallucinator(4, hidden=0), "hidden must be >= 1, got 0"),
        (lambda: Hallucinator(4, ratio_max=-0.1), "ratio_max must be >= 0 and finite, got -0.1"),
        (lambda: Hallucinator(4, ratio_max=math.nan), "got nan"),
        (lambda: Hallucinator(4)(torch.ones(2, 4), torch.ones(3, 4)), r"one shape .* got \(2, 4\) and \(3, 4\)"),
        (lambda: Hallucinator(4)(torch.ones(4), torch.ones(4)), r"got \(4,\) and \(4,\)"),
        (lambda: Hallucinator(4)(torch.ones(2, 5), torch.ones(2, 5)), "must have 4 columns, got 5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
