"""Coherence against closed forms and the mean of all products, in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netwright.diagnose import (
    RunningCoherence,
    coherence_from_gradients,
    m_coherence,
    per_example_alignment,
    stability_gap_bound,
)
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded, stream

LOSS = nn.CrossEntropyLoss(reduction="none")
CORNER = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)


class Row(nn.Module):
    """f(x) = w . x, so that with ``first`` as loss the gradient of an example is its input."""

    def __init__(self, size: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x):
        return x @ self.w


def first(output, target):
    return output


def of(G: torch.Tensor, **options):
    return m_coherence(Row(G.shape[1]), first, (G, torch.zeros(len(G))), **options)


def shares(G: torch.Tensor, kind: str = "share", **options) -> torch.Tensor:
    return per_example_alignment(Row(G.shape[1]), first, (G, torch.zeros(len(G))), kind, **options)


@pytest.mark.parametrize("how", [of, coherence_from_gradients])
def test_closed_forms(how):
    eye = how(torch.eye(8, dtype=torch.float64))
    assert (eye.alpha, eye.m_coherence, eye.pairwise, eye.m) == pytest.approx((1 / 8, 1, 0, 8))
    equal = how(torch.full((5, 3), 2.0, dtype=torch.float64))
    assert (equal.alpha, equal.m_coherence, equal.pairwise) == pytest.approx((1, 5, 1))
    opposed = how(torch.tensor([[1.0, 2.0]] * 3 + [[-1.0, -2.0]] * 3, dtype=torch.float64))
    assert (opposed.alpha, opposed.m_coherence) == (0, 0)
    assert opposed.pairwise == pytest.approx(-1 / 5)
    corner = how(CORNER)
    assert (corner.mean_grad_norm2, corner.grad_norm2_mean) == pytest.approx((8 / 9, 4 / 3))
    assert (corner.alpha, corner.m_coherence, corner.pairwise) == pytest.approx((2 / 3, 2, 1 / 2))


def test_unbiased_is_the_mean_over_other_pairs():
    assert of(CORNER, unbiased=True).alpha == pytest.approx(0.5)
    assert of(CORNER, unbiased=True).m_coherence == pytest.approx(2)


def random(m: int, p: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, p, dtype=torch.float64, generator=stream(seed, "G")) + 0.3


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 100))
def test_all_products(m, p, seed):
    G = random(m, p, seed)
    products = G @ G.T
    square = products.diagonal().mean()
    found = coherence_from_gradients(G)
    assert found.alpha == pytest.approx(float(products.mean() / square), rel=1e-12, abs=1e-12)
    others = (products.sum() - products.diagonal().sum()) / (m * (m - 1))
    assert found.pairwise == pytest.approx(float(others / square), rel=1e-10, abs=1e-12)
    assert 0 <= found.alpha <= 1
    rotation = torch.linalg.qr(random(p, p, seed + 1)).Q
    assert coherence_from_gradients(3.7 * G @ rotation).alpha == pytest.approx(found.alpha, rel=1e-9, abs=1e-12)
    doubled = coherence_from_gradients(torch.cat([G, G]))
    assert doubled.alpha == pytest.approx(found.alpha, rel=1e-12, abs=1e-12)
    assert doubled.m_coherence == pytest.approx(2 * found.m_coherence, rel=1e-12, abs=1e-12)
    assert coherence_from_gradients(G.T, dim=1).alpha == pytest.approx(found.alpha)


def test_linear_regression():
    x, y = random(20, 4), random(20, 1, 1)[:, 0]
    net = nn.Linear(4, 1, bias=False).double()
    found = m_coherence(net, lambda output, target: 0.5 * (output[:, 0] - target) ** 2, (x, y))
    r = (net(x)[:, 0] - y).detach()
    expected = (x.T @ r).square().sum() / (20 * (r.square() * x.square().sum(1)).sum())
    assert found.alpha == pytest.approx(float(expected), rel=1e-12)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    with seeded(0, "net"):
        net = SmallConvNet((4, 6), 8, 3, 1).double().eval()
    return net, torch.randn(30, 1, 8, 8, dtype=torch.float64, generator=stream(0, "x")), torch.arange(30) % 3


def test_layers_recombine(trained):
    net, x, y = trained
    found = m_coherence(net, LOSS, (x, y), per_layer=True)
    assert set(found.per_layer) == {"features.0", "features.1", "features.4", "features.5", "head.0", "head.2"}
    each = found.per_layer.values()
    assert sum(one.grad_norm2_mean for one in each) == pytest.approx(found.grad_norm2_mean)
    assert sum(one.alpha * one.grad_norm2_mean for one in each) / found.grad_norm2_mean == pytest.approx(found.alpha)
    alone = m_coherence(net, LOSS, (x, y), params=["features.4"])
    assert alone.alpha == pytest.approx(found.per_layer["features.4"].alpha)
    assert alone.grad_norm2_mean == pytest.approx(found.per_layer["features.4"].grad_norm2_mean)


def test_batches_and_scale_change_nothing(trained):
    net, x, y = trained
    whole = m_coherence(net, LOSS, (x, y))
    pieces = m_coherence(net, lambda out, target: 5 * LOSS(out, target), list(zip(x.split(7), y.split(7), strict=True)))
    assert pieces.alpha == pytest.approx(whole.alpha, rel=1e-10)
    assert pieces.loss == pytest.approx(5 * whole.loss)
    assert whole.loss == pytest.approx(float(LOSS(net(x), y).mean().detach()))


def test_alignments_have_their_means(trained):
    net, x, y = trained
    alpha = m_coherence(net, LOSS, (x, y))
    share, cosine, part = (per_example_alignment(net, LOSS, (x, y), kind) for kind in ("share", "cosine", "coherence"))
    assert float(share.mean()) == pytest.approx(1)
    assert float(part.mean()) == pytest.approx(alpha.alpha)
    assert torch.allclose(part, share * alpha.alpha)
    assert bool((cosine.abs() <= 1 + 1e-9).all())
    alone = per_example_alignment(net, LOSS, (x, y), "coherence", leave_one_out=True)
    assert float(alone.mean()) == pytest.approx(alpha.pairwise)
    batched = per_example_alignment(net, LOSS, list(zip(x.split(11), y.split(11), strict=True)))
    assert torch.allclose(batched, share)


def test_alignments_need_the_same_examples_twice():
    """Norms of one reading and products of another would not belong to one another; losses cannot tell: all are 0."""
    data = torch.utils.data.TensorDataset(torch.randn(12, 4, generator=stream(0, "x")).double(), torch.zeros(12))
    loaders = {
        shuffle: torch.utils.data.DataLoader(data, 5, shuffle=shuffle, generator=stream(0, "order"))
        for shuffle in (False, True)
    }
    expected = shares(data.tensors[0], "cosine")
    assert torch.allclose(per_example_alignment(Row(4), first, loaders[False], "cosine"), expected)
    with pytest.raises(ValueError, match="the same examples in the same order again, got others"):
        per_example_alignment(Row(4), first, loaders[True], "cosine")


def test_alignments_by_their_definition():
    assert shares(CORNER).tolist() == pytest.approx([0.75, 1.5, 0.75])
    G, m = random(6, 4), 6
    mean, others = G.mean(0), (G.sum(0) - G) / (m - 1)
    assert torch.allclose(shares(G), G @ mean / mean.square().sum())
    assert torch.allclose(shares(G, "cosine"), torch.cosine_similarity(G, mean[None], dim=1))
    dot, square = (G * others).sum(1), G.square().sum(1).mean()
    assert torch.allclose(shares(G, "coherence", leave_one_out=True), dot / square)
    assert torch.allclose(shares(G, "cosine", leave_one_out=True), torch.cosine_similarity(G, others, dim=1))
    assert torch.allclose(shares(G, leave_one_out=True), dot / others.square().sum(1))


def test_corrupted_labels_are_less_aligned():
    """A linear model after a few steps on two separated groups, a tenth of whose labels are wrong."""
    x = torch.randn(200, 5, generator=stream(0, "x"))
    y = torch.arange(200) % 2
    x[:, 0] += 4 * (2 * y - 1)
    wrong = torch.arange(200) < 20
    noisy = torch.where(wrong, 1 - y, y)
    with seeded(0, "net"):
        net = nn.Linear(5, 2)
    found = per_example_alignment(net, LOSS, (x, noisy))
    assert float(found[~wrong].min()) > float(found[wrong].max())


def test_the_metric_is_the_same_and_takes_sums():
    G = random(9, 4)
    metric = RunningCoherence(4)
    metric.update(G[:5])
    metric.update(G[5:].sum(0), G[5:].square().sum(1))
    expected = coherence_from_gradients(G)
    assert (metric.result().m, metric.result().grad_norm2_mean) == pytest.approx((9, expected.grad_norm2_mean))
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx({name: getattr(expected, name) for name in ("alpha", "m_coherence", "pairwise")})
    metric.reset()
    with pytest.raises(ValueError, match=r"gradients must be \(batch, 4\), got \(2, 5\)"):
        metric.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"must be a sum \(4,\) and squared_norms \(batch,\), got \(2, 4\)"):
        metric.update(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="numbers must be >= 1, got 0"):
        RunningCoherence(0)


def test_zero_gradients_have_no_coherence(capsys):
    found = of(torch.zeros(4, 2, dtype=torch.float64))
    assert math.isnan(found.alpha)
    assert math.isnan(found.m_coherence)
    assert "every gradient is zero" in capsys.readouterr().err
    assert shares(torch.zeros(4, 2, dtype=torch.float64)).isnan().all()
    opposed = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert shares(opposed).isnan().all()
    assert shares(opposed, "coherence").tolist() == [0, 0]


def test_a_data_set_is_put_together(monkeypatch):
    monkeypatch.setattr("netwright.diagnose.gradients.COLLATED", 4)
    net = nn.Linear(3, 2)
    x, y = torch.randn(10, 3, generator=stream(0, "x")), torch.arange(10) % 2
    loss = nn.CrossEntropyLoss(reduction="none")
    expected = m_coherence(net, loss, (x, y))
    assert m_coherence(net, loss, torch.utils.data.TensorDataset(x, y)).alpha == pytest.approx(expected.alpha, rel=1e-5)
    with pytest.raises(ValueError, match="at least 1 batch, got 0"):
        m_coherence(net, loss, torch.utils.data.TensorDataset(x[:0], y[:0]))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: coherence_from_gradients(torch.ones(1, 3)), "at least 2 examples, got 1"),
        (lambda: coherence_from_gradients(torch.ones(2, 3, dtype=torch.int64)), "G must be floats"),
        (lambda: coherence_from_gradients(torch.tensor([[1.0], [math.nan]])), "finite, got NaN"),
        (lambda: of(torch.ones(1, 3, dtype=torch.float64)), "must be >= 2, got 1"),
        (lambda: of(torch.tensor([[1.0], [math.inf]], dtype=torch.float64)), "finite, got NaN or infinity for 1 of 2"),
        (lambda: m_coherence(Row(1), first, []), "at least 1 batch, got 0"),
        (lambda: m_coherence(Row(1), first, [torch.ones(2, 1)]), "batches .inputs, targets., got a Tensor"),
        (lambda: shares(CORNER, "angle"), "kind must be one of share, cosine, coherence, got 'angle'"),
        (lambda: per_example_alignment(Row(1), first, iter([])), "read twice, got an iterator"),
    ],
)
def test_what_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


class TestBound:
    def test_closed_forms(self):
        assert float(stability_gap_bound([1.0, 1.0], 0.1, 1.0, 1.0, 10)) == 0
        one = stability_gap_bound([0.3], 0.2, lipschitz=3.0, smoothness=7.0, m=50)
        assert float(one) == pytest.approx(9 / 50 * 0.2 * math.sqrt(1.4))

    def test_the_sum_by_hand(self):
        alphas, lrs, beta = [0.2, 0.9, 0.5], [0.1, 0.3, 0.2], 2.0
        by_hand = sum(
            math.prod(1 + lrs[k] * beta for k in range(t + 1, 3)) * lrs[t] * math.sqrt(2 * (1 - alphas[t]))
            for t in range(3)
        )
        assert float(stability_gap_bound(alphas, lrs, 1.5, beta, 40)) == pytest.approx(2.25 / 40 * by_hand)

    def test_coherence_counts_most_early(self):
        early = stability_gap_bound([0.9, 0.1], 0.5, 1.0, 1.0, 10)
        late = stability_gap_bound([0.1, 0.9], 0.5, 1.0, 1.0, 10)
        assert early < late

    def test_many_steps_do_not_overflow(self):
        found = stability_gap_bound([0.5] * 20_000, 0.1, 1.0, 1.0, 10, log=True)
        # A geometric series: eta (q^T - 1) / (q - 1) with q = 1.1.
        assert float(found) == pytest.approx(20_000 * math.log(1.1) + math.log(0.1 / 0.1 / 10))

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"alphas": []}, "at least 1 number"),
            ({"alphas": [1.5]}, r"alphas must lie in \[0, 1\], got 1.5"),
            ({"alphas": [math.nan]}, "alphas must lie"),
            ({"lrs": [0.1, 0.2]}, "lrs must be one number or 1, got 2"),
            ({"lrs": -0.1}, "lrs must be >= 0"),
            ({"lipschitz": 0.0}, "lipschitz must be > 0 and finite, got 0.0"),
            ({"smoothness": math.inf}, "smoothness must be >= 0 and finite, got inf"),
            ({"m": 0}, "m must be >= 1, got 0"),
        ],
    )
    def test_what_is_refused(self, change, told):
        with pytest.raises(ValueError, match=told):
            stability_gap_bound(**{"alphas": [0.5], "lrs": 0.1, "lipschitz": 1.0, "smoothness": 1.0, "m": 5} | change)
