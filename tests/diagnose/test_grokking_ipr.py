"""The inverse participation ratio against closed forms and a loop, and neurons of networks that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netwright.diagnose.grokking import (
    QuadraticMLP,
    inverse_participation_ratio,
    memorising_neurons,
    neuron_ipr,
    power_order,
    random_ipr,
    scale_correlation,
)
from netwright.seeding import seeded

DOUBLE = torch.float64


def drawn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def wave(p, frequency, phase=0.0, dtype=DOUBLE):
    return torch.cos(2 * math.pi * frequency / p * torch.arange(p, dtype=dtype) + phase)


def by_definition(v, r=2):
    """The full spectrum by a sum over sines and cosines, its first half, in numpy."""
    places = np.arange(len(v))
    power = np.array([abs(np.sum(v * np.exp(-2j * np.pi * q * places / len(v)))) ** 2 for q in range(len(v) // 2 + 1)])
    return float(((power / power.sum()) ** r).sum())


@pytest.mark.parametrize("p", [3, 5, 23, 97])
def test_a_wave_has_one(p):
    for frequency in range(1, (p - 1) // 2 + 1):
        for dtype in (torch.float32, DOUBLE):
            found = inverse_participation_ratio(wave(p, frequency, 0.7, dtype))
            assert found.dtype == dtype
            assert float(found) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("p", [3, 5, 59, 97])
def test_impulse_and_constant(p):
    impulse = torch.eye(p, dtype=DOUBLE)
    assert torch.allclose(inverse_participation_ratio(impulse), torch.full((p,), 2 / (p + 1), dtype=DOUBLE))
    assert float(inverse_participation_ratio(torch.full((p,), -3.0))) == pytest.approx(1)


def test_by_hand():
    vectors = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    assert inverse_participation_ratio(vectors).tolist() == pytest.approx([1 / 3, 23 / 49], abs=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.0])
def test_two_waves(t):
    found = inverse_participation_ratio(wave(31, 3) + t * wave(31, 8, 1.1))
    assert float(found) == pytest.approx((1 + t**4) / (1 + t**2) ** 2, abs=1e-12)


@pytest.mark.parametrize("r", [2, 3, 5])
@pytest.mark.parametrize("p", [7, 8, 30])
def test_by_definition_and_for_even_lengths(p, r):
    v = drawn(p)
    assert float(inverse_participation_ratio(v, r)) == pytest.approx(by_definition(v.numpy(), r), rel=1e-12)
    assert float(inverse_participation_ratio(wave(8, 4), r)) == pytest.approx(1)  # the Nyquist frequency


def test_long_vectors_are_transformed_in_the_same_way(monkeypatch):
    v = drawn(5, 101)
    product = inverse_participation_ratio(v)
    monkeypatch.setattr("netwright.diagnose.grokking.periodicity.SHORT", 10)
    assert torch.allclose(inverse_participation_ratio(v), product, atol=1e-14)
    long = drawn(300)
    assert float(inverse_participation_ratio(long)) == pytest.approx(by_definition(long.numpy()), rel=1e-12)


@given(st.integers(0, 2**31), st.integers(0, 96), st.floats(1e-30, 1e30))
def test_shift_scale_and_range(seed, shift, scale):
    v = drawn(97, seed=seed)
    found = float(inverse_participation_ratio(v))
    assert 2 / 98 <= found <= 1
    assert float(inverse_participation_ratio(v.roll(shift))) == pytest.approx(found, abs=1e-12)
    assert float(inverse_participation_ratio(-scale * v)) == pytest.approx(found, abs=1e-12)


def test_decayed_weights_are_not_lost():
    v = drawn(97, dtype=torch.float32)
    assert float(inverse_participation_ratio(1e-30 * v)) == pytest.approx(
        float(inverse_participation_ratio(v)), rel=1e-5
    )
    assert inverse_participation_ratio(torch.zeros(2, 5)).tolist() == [0, 0]


def test_white_noise():
    found = float(inverse_participation_ratio(drawn(20_000, 97)).mean())
    assert found == pytest.approx(2 / 49, rel=0.2)
    assert found == pytest.approx(random_ipr(97), rel=0.03)
    assert float(inverse_participation_ratio(drawn(20_000, 7)).mean()) == pytest.approx(random_ipr(7), rel=0.1)


def test_dim_half_and_gradient():
    v = drawn(4, 11, 3)
    rows = inverse_participation_ratio(v.movedim(1, 2))
    assert torch.allclose(inverse_participation_ratio(v, dim=1), rows, atol=1e-14)
    assert inverse_participation_ratio(v.half(), dim=1).dtype == torch.float32
    assert torch.autograd.gradcheck(inverse_participation_ratio, (drawn(2, 7).requires_grad_(),))


@pytest.mark.parametrize(
    ("v", "r", "error", "message"),
    [
        (torch.ones(2), 2, ValueError, "at least 3 long in dim -1, got shape"),
        (torch.tensor(1.0), 2, ValueError, "at least 3 long"),
        (torch.ones(5), 1, ValueError, "r must be >= 2, got 1"),
        (torch.ones(5), math.nan, ValueError, "r must be >= 2, got nan"),
        (torch.tensor([1.0, math.nan, 0]), 2, ValueError, "v must be finite"),
        (torch.tensor([1.0, math.inf, 0]), 2, ValueError, "v must be finite"),
        (torch.ones(5, dtype=torch.complex64), 2, TypeError, "v must be real"),
    ],
)
def test_bad_vectors(v, r, error, message):
    with pytest.raises(error, match=message):
        inverse_participation_ratio(v, r)


def test_a_neuron_is_the_mean_of_its_rows_and_its_column():
    net = QuadraticMLP(11, 6, generator=torch.Generator().manual_seed(0)).double()
    found = neuron_ipr(net, 3)
    for k in range(6):
        rows = [part.detach().numpy() for part in (net.U[k], net.V[k], net.W[:, k])]
        assert float(found[k]) == pytest.approx(np.mean([by_definition(row, 3) for row in rows]), rel=1e-12)


def test_pairs_of_layers_and_of_weights():
    net = QuadraticMLP(11, 6)
    expected = neuron_ipr(net)
    for given_as in ((net.fc1, net.fc2), [net.fc1.weight, net.fc2], nn.Sequential(net.fc1, nn.ReLU(), net.fc2)):
        assert torch.equal(neuron_ipr(given_as), expected)
    # Three numbers, other classes than inputs.
    first, second = drawn(4, 21), drawn(9, 4, seed=1)
    each = [inverse_participation_ratio(part) for part in first.split(7, 1)]
    expected = (sum(each) + inverse_participation_ratio(second.T)) / 4
    assert torch.allclose(neuron_ipr((first, second), blocks=3), expected)


@pytest.mark.parametrize("p", [5, 23, 97])
def test_powers_go_through_all_numbers(p):
    order = power_order(p)
    assert sorted(order.tolist()) == list(range(1, p))
    assert torch.equal(order[1:], order[:-1] * order[1] % p)
    assert int(order[-1] * order[1]) % p == 1


def test_products_are_periodic_in_the_logarithm():
    p = 23
    logarithm = torch.empty(p, dtype=torch.long)
    logarithm[power_order(p)] = torch.arange(p - 1)
    waves = wave(p - 1, 4, 0.3)[logarithm[1:]]
    weights = torch.cat([torch.full((1,), 9.0, dtype=DOUBLE), waves])  # the weight of 0 must not matter
    pair = (weights.repeat(2)[None], weights[:, None])
    assert float(neuron_ipr(pair, op="mul")) == pytest.approx(1, abs=1e-9)
    assert float(neuron_ipr(pair)) < 0.9


@pytest.mark.parametrize(
    ("given_as", "options", "message"),
    [
        ((torch.ones(4, 10), torch.ones(5, 3)), {}, r"\(N, inputs\) and \(outputs, N\), got \(4, 10\) and \(5, 3\)"),
        ((torch.ones(4, 11), torch.ones(5, 4)), {}, "blocks must divide the 11 inputs, got 2"),
        ((torch.ones(4, 10), torch.ones(5, 4)), {"blocks": 0}, "blocks must divide the 10 inputs, got 0"),
        ((torch.ones(4, 4), torch.ones(5, 4)), {}, "at least 3 long"),
        ((torch.ones(4, 18), torch.ones(9, 4)), {"op": "mul"}, "one prime length, got 9 and 9"),
        ((torch.ones(4, 14), torch.ones(5, 4)), {"op": "mul"}, "one prime length, got 7 and 5"),
        ((torch.ones(4, 10), torch.ones(5, 4)), {"op": "div"}, "op must be one of add, mul, got 'div'"),
        ((torch.ones(4, 10), torch.ones(5, 4)), {"r": 1}, "r must be >= 2, got 1"),
        ((torch.full((4, 10), math.nan), torch.ones(5, 4)), {}, "must be finite"),
        ((torch.ones(4, 10), torch.full((5, 4), math.inf)), {}, "must be finite"),
        ((torch.ones(4, 10),), {}, "those of 2 layers, got 1"),
        (nn.Sequential(nn.Linear(6, 4)), {}, "must hold 2 linear layers, got 1 in Sequential"),
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(5, 3)), {}, "must take what the first gives, got 4 and 5"),
    ],
)
def test_bad_weights(given_as, options, message):
    with pytest.raises(ValueError, match=message):
        neuron_ipr(given_as, **options)


def mixed():
    """Thirty waves and ten neurons of noise."""
    net = QuadraticMLP.analytic(23, 40, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for k, layer in enumerate((net.fc1.weight, net.fc2.weight.T)):
            layer[::4] = drawn(10, layer.shape[1], seed=k, dtype=torch.float32)
    return net


def test_the_report_finds_the_noise():
    net = mixed()
    found = memorising_neurons(net)
    assert sorted(found.memorising) == list(range(0, 40, 4))
    ranked = [found.ipr[number] for number in found.memorising]
    assert ranked == sorted(ranked)
    assert found.threshold == pytest.approx((4 / 26) ** 0.5)
    assert found.before == found.without == {}
    with torch.no_grad():
        net.W[:, 3] = 0
    found = memorising_neurons(net, threshold=0.999)
    assert found.dead == (3,)
    assert 3 not in found.memorising
    assert "29 periodic, 10 memorising (IPR below 0.999), 1 dead" in str(found)
    assert found.to_dict()["scale_correlation"] is None
    bars = found.plot().patches
    assert sum(bar.get_height() for bar in bars) == 40
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\), got 1"):
        memorising_neurons(net, threshold=1)


def test_scale_of_the_norm_is_ranked_against_ipr():
    from scipy.stats import spearmanr

    net = QuadraticMLP(11, 30, norm="bn", generator=torch.Generator().manual_seed(0))
    assert math.isnan(scale_correlation(net))  # every scale is 1
    with torch.no_grad():
        net.norm.weight.copy_(drawn(30, dtype=torch.float32))
    expected = spearmanr(net.norm.weight.detach().numpy(), neuron_ipr(net).numpy()).statistic
    assert scale_correlation(net) == pytest.approx(expected)
    assert memorising_neurons(net).scale_correlation == pytest.approx(expected)
    assert f"with the IPR: {expected:.2f}" in str(memorising_neurons(net))
    with pytest.raises(ValueError, match="must have a norm with a scale"):
        scale_correlation(QuadraticMLP(11, 30))


@pytest.mark.parametrize(("inputs", "blocks"), [(21, 3), (28, 4)])
def test_scale_of_the_norm_is_ranked_against_ipr_of_any_number_of_blocks(inputs, blocks):
    from scipy.stats import spearmanr

    with seeded(0, "init"):
        net = nn.Sequential(nn.Linear(inputs, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 7))
    with torch.no_grad():
        net[1].weight.copy_(drawn(30, dtype=torch.float32))
    expected = spearmanr(net[1].weight.detach().numpy(), neuron_ipr(net, blocks=blocks).numpy()).statistic
    assert scale_correlation(net, blocks=blocks) == pytest.approx(expected)
    assert memorising_neurons(net, blocks=blocks).scale_correlation == pytest.approx(expected)
