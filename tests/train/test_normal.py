"""Normal numbers against their distribution, of single numbers and of pairs, and against their own state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from netwright.train.normal import AT_ONCE, NormalStream


def test_distribution():
    numbers = NormalStream(0).fill_(torch.empty(10**6), 1.0).double().numpy()
    assert stats.kstest(numbers, "norm").pvalue > 0.01
    assert abs(stats.skew(numbers)) < 4 * math.sqrt(6 / 10**6)
    assert abs(stats.kurtosis(numbers)) < 4 * math.sqrt(24 / 10**6)
    # As many beyond each of these as there should be, within four standard errors.
    for level in (3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(level) * 10**6
        assert abs((abs(numbers) > level).sum() - expected) < 4 * math.sqrt(expected) + 1


def test_no_number_tells_of_another():
    numbers = NormalStream(1).fill_(torch.empty(2 * AT_ONCE), 1.0).double()
    half = AT_ONCE // 2  # the two of a pair are so far apart
    for shift in (1, 2, half - 1, half, half + 1, AT_ONCE):
        for power in (1, 2):
            pair = torch.stack([numbers[:-shift] ** power, numbers[shift:] ** power])
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / math.sqrt(pair.shape[1]), (shift, power)


@pytest.mark.parametrize("count", [1, 2, 7, AT_ONCE - 1, AT_ONCE + 1])
def test_any_length_is_filled(count):
    numbers = NormalStream(2).fill_(torch.full((count,), float("nan")), 0.5)
    assert bool(numbers.isfinite().all())
    assert torch.equal(numbers, NormalStream(2).fill_(torch.empty(count), 0.5))
    assert torch.allclose(numbers, 0.5 * NormalStream(2).fill_(torch.empty(count), 1.0))


def test_goes_on_from_its_state():
    stream, again = NormalStream(3), NormalStream(4)
    first = stream.fill_(torch.empty(100), 1.0).clone()
    again.set_state(stream.get_state())
    second = stream.fill_(torch.empty(100), 1.0)
    assert torch.equal(again.fill_(torch.empty(100), 1.0), second)
    assert not torch.equal(first, second)


def test_the_ends_of_the_uniform_numbers():
    """No bits and all bits: the largest number there is, and zero."""

    class Bits:
        def __init__(self, words):
            self.words = np.array(words, dtype=np.uint64)

        def random_raw(self, count):
            return self.words[:count].copy()

    for word, u in ((0, 0.5 * 2**-31), (2**64 - 1, 1.0)):
        stream = NormalStream(0)
        stream._bits = Bits([word, word, 0, 0])  # u of four pairs, then v
        numbers = stream.fill_(torch.empty(8), 1.0)
        expected = [math.sqrt(-2 * math.log(u))] * 4 + [0.0] * 4
        assert numbers.abs().tolist() == pytest.approx(expected, rel=1e-5)
    assert math.sqrt(-2 * math.log(0.5 * 2**-31)) == pytest.approx(6.66, abs=0.01)
