"""Contrastive losses against closed forms, a loop over pairs in double precision, and two independent packages."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from netwright.train.contrastive.losses import alignment, info_nce, negative_cosine, nt_xent, supcon, uniformity

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


def nt_xent_by_pairs(z1, z2, temperature, masked=lambda i, j: False):
    z, count = [*z1, *z2], len(z1)
    losses = []
    for i, anchor in enumerate(z):
        partner = (i + count) % (2 * count)
        others = [j for j in range(2 * count) if j != i and not masked(i, j)]
        below = sum(math.exp(cosine(anchor, z[j]) / temperature) for j in others)
        losses.append(math.log(below) - cosine(anchor, z[partner]) / temperature)
    return sum(losses) / len(losses)


def supcon_by_pairs(z, labels, temperature):
    losses = []
    for i, anchor in enumerate(z):
        positives = [j for j in range(len(z)) if j != i and labels[j] == labels[i]]
        if positives:
            below = sum(math.exp(cosine(anchor, z[j]) / temperature) for j in range(len(z)) if j != i)
            terms = [math.log(below) - cosine(anchor, z[j]) / temperature for j in positives]
            losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_nt_xent_is_the_sum_over_pairs(temperature):
    z1, z2 = drawn(5, 7), drawn(5, 7, seed=1)
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(nt_xent_by_pairs(z1, z2, temperature), rel=1e-12)


def test_nt_xent_closed_forms():
    assert nt_xent(drawn(1, 4), drawn(1, 4, seed=1), 0.1).item() == 0
    for count in (2, 9):
        same = torch.ones(count, 3, dtype=DOUBLE)
        assert nt_xent(same, same, 0.07).item() == pytest.approx(math.log(2 * count - 1), abs=1e-12)
    unit = torch.eye(3, dtype=DOUBLE)  # the positive at 1, 4 negatives at 0
    assert nt_xent(unit, unit, 1.0).item() == pytest.approx(-math.log(math.e / (math.e + 4)), abs=1e-12)


def test_nt_xent_invariances():
    z1, z2 = drawn(6, 5), drawn(6, 5, seed=1)
    loss = nt_xent(z1, z2, 0.2)
    order, turn = torch.randperm(6), torch.linalg.qr(drawn(5, 5, seed=2))[0]
    lengths = drawn(6, 1, seed=3).abs() + 0.1
    for other in (
        nt_xent(z2, z1, 0.2),
        nt_xent(z1[order], z2[order], 0.2),
        nt_xent(z1 @ turn, z2 @ turn, 0.2),
        nt_xent(z1 * lengths, z2 * 7, 0.2),
    ):
        assert other.item() == pytest.approx(loss.item(), abs=1e-12)
    assert abs(nt_xent(z1, z2[order.roll(1)], 0.2).item() - loss.item()) > 1e-3


def test_mask_leaves_pairs_out():
    z1, z2 = drawn(6, 5), drawn(6, 5, seed=1)

    def masked(i, j):  # images 0 and 1 are one
        return {i % 6, j % 6} == {0, 1}

    mask = torch.tensor([[masked(i, j) for j in range(12)] for i in range(12)])
    found = nt_xent(z1, z2, 0.3, mask)
    assert found.item() == pytest.approx(nt_xent_by_pairs(z1, z2, 0.3, masked), rel=1e-12)
    assert found < nt_xent(z1, z2, 0.3)
    assert torch.equal(nt_xent(z1, z2, 0.3, torch.zeros_like(mask)), nt_xent(z1, z2, 0.3))


def test_masked_pairs_have_no_gradient():
    z1, z2 = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=1)
    mask = ~torch.eye(6, dtype=torch.bool).roll(3, 1)  # only the positives are left
    loss = nt_xent(z1, z2, 0.3, mask)
    loss.backward()
    assert loss.item() == 0
    assert not z1.grad.any()


def test_gradients():
    z1, z2 = drawn(4, 3).requires_grad_(), drawn(4, 3, seed=1).requires_grad_()
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0, 1] = mask[5, 2] = True
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.5, mask), (z1, z2))
    assert torch.autograd.gradgradcheck(lambda a, b: nt_xent(a, b, 0.5), (z1, z2))
    labels = torch.tensor([0, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda a: supcon(a, labels, 0.5), (z1,))
    queue = functional.normalize(drawn(3, 6, seed=2), dim=0)
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, queue, 0.2), (z1, z2))


def test_nothing_breaks_at_zero_embeddings():
    z1 = torch.zeros(3, 4, requires_grad=True)
    queue = functional.normalize(drawn(4, 5, dtype=torch.float32), dim=0)
    for loss in (nt_xent(z1, z1, 0.1), info_nce(z1, z1, queue, 0.1), supcon(z1, torch.zeros(3).long(), 0.1)):
        (gradient,) = torch.autograd.grad(loss, z1)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_small_temperature_does_not_overflow():
    z1, z2 = drawn(8, 4, dtype=torch.float32), drawn(8, 4, seed=1, dtype=torch.float32)
    exact = nt_xent(z1.double(), z2.double(), 1e-3).item()
    assert nt_xent(z1, z2, 1e-3).item() == pytest.approx(exact, rel=1e-4)
    queue = functional.normalize(drawn(4, 5, seed=2), dim=0)
    exact = info_nce(z1.double(), z2.double(), queue, 1e-3).item()
    assert info_nce(z1, z2, queue.float(), 1e-3).item() == pytest.approx(exact, rel=1e-4)


def test_info_nce():
    unit = torch.eye(3, dtype=DOUBLE)
    assert info_nce(unit[:1], unit[:1], unit[:, 1:], 1.0).item() == pytest.approx(0.55144471, abs=1e-8)
    q, k, queue = drawn(6, 4), drawn(6, 4, seed=1), functional.normalize(drawn(4, 10, seed=2), dim=0)
    unit_q, unit_k = functional.normalize(q), functional.normalize(k)
    logits = torch.cat([(unit_q * unit_k).sum(1, keepdim=True), unit_q @ queue], 1) / 0.07
    expected = functional.cross_entropy(logits, torch.zeros(6, dtype=torch.long))
    assert info_nce(q, k, queue, 0.07).item() == pytest.approx(expected.item(), rel=1e-12)
    queue.requires_grad_()
    info_nce(q.requires_grad_(), k, queue, 0.07).backward()
    assert queue.grad is None


def test_supcon():
    z, labels = drawn(9, 4), torch.tensor([0, 1, 2, 0, 1, 0, 3, 1, 0])  # 2 and 3 have no positive
    assert supcon(z, labels, 0.3).item() == pytest.approx(supcon_by_pairs(z, labels.tolist(), 0.3), rel=1e-12)
    z1, z2 = drawn(5, 4), drawn(5, 4, seed=1)
    images = torch.arange(5).repeat(2)
    assert supcon(torch.cat([z1, z2]), images, 0.3).item() == pytest.approx(nt_xent(z1, z2, 0.3).item(), rel=1e-12)
    alone = drawn(4, 3).requires_grad_()
    loss = supcon(alone, torch.arange(4), 0.3)
    loss.backward()
    assert loss.item() == 0
    assert not alone.grad.any()


def test_negative_cosine():
    p, z = drawn(5, 4).requires_grad_(), drawn(5, 4, seed=1).requires_grad_()
    loss = negative_cosine(p, z)
    assert loss.item() == pytest.approx(-sum(cosine(a, b) for a, b in zip(p, z, strict=True)) / 5, abs=1e-12)
    loss.backward()
    assert z.grad is None
    assert p.grad.any()


def test_alignment_and_uniformity():
    x, y = drawn(6, 4), drawn(6, 4, seed=1)
    assert alignment(x, 3 * x).item() == pytest.approx(0, abs=1e-15)
    assert alignment(x, y).item() == pytest.approx(sum(2 - 2 * cosine(a, b) for a, b in zip(x, y, strict=True)) / 6)
    lengths = [math.sqrt(2 - 2 * cosine(a, b)) for a, b in zip(x, y, strict=True)]
    assert alignment(x, y, 1).item() == pytest.approx(sum(lengths) / 6)
    assert uniformity(torch.tensor([[1.0, 0], [-2, 0]])).item() == pytest.approx(-8)
    pairs = [math.exp(-3 * (2 - 2 * cosine(x[i], x[j]))) for i in range(6) for j in range(i)]
    assert uniformity(x, 3).item() == pytest.approx(math.log(sum(pairs) / 15))
    assert uniformity(torch.ones(4, 3)).item() == 0


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_as_pytorch_metric_learning(temperature):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z1, z2 = drawn(16, 8, dtype=torch.float32), drawn(16, 8, seed=1, dtype=torch.float32)
    z, images = torch.cat([z1, z2]), torch.arange(16).repeat(2)
    theirs = losses.NTXentLoss(temperature)(z, images).item()
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(theirs, abs=1e-5)
    labels = torch.arange(32) % 5
    theirs = losses.SupConLoss(temperature)(z, labels).item()
    assert supcon(z, labels, temperature).item() == pytest.approx(theirs, abs=1e-5)


def test_as_lightly():
    loss = pytest.importorskip("lightly.loss")
    z1, z2 = drawn(16, 8, dtype=torch.float32), drawn(16, 8, seed=1, dtype=torch.float32)
    assert nt_xent(z1, z2, 0.2).item() == pytest.approx(loss.NTXentLoss(0.2)(z1, z2).item(), abs=1e-5)
    assert negative_cosine(z1, z2).item() == pytest.approx(loss.NegativeCosineSimilarity()(z1, z2).item(), abs=1e-6)


Z = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nt_xent(Z, Z[:1], 0.1), r"z1 and z2 must have one shape .* got \(2, 3\) and \(1, 3\)"),
        (lambda: nt_xent(Z[0], Z[0], 0.1), r"got \(3,\) and \(3,\)"),
        (lambda: nt_xent(Z[:0], Z[:0], 0.1), "batch >= 1"),
        (lambda: nt_xent(Z, Z, 0.0), "temperature must be > 0 and finite, got 0.0"),
        (lambda: nt_xent(Z, Z, math.nan), "got nan"),
        (lambda: nt_xent(Z, Z, 0.1, torch.zeros(2, 2).bool()), r"mask must be boolean with shape \(4, 4\)"),
        (lambda: nt_xent(Z, Z, 0.1, torch.zeros(4, 4)), "got torch.float32"),
        (lambda: nt_xent(Z, Z, 0.1, torch.ones(4, 4).bool()), "mask must leave the positives"),
        (lambda: info_nce(Z, Z[:1], Z.T, 0.1), "q and k must have one shape"),
        (lambda: info_nce(Z, Z, Z, 0.1), r"queue must have shape \(3, keys\)"),
        (lambda: info_nce(Z, Z, Z.T[:, :0], 0.1), r"got \(3, 0\)"),
        (lambda: info_nce(Z, Z, Z.T, -1), "temperature must be > 0"),
        (lambda: supcon(Z[0], torch.zeros(3).long(), 0.1), r"z must have shape \(views, dim\), got \(3,\)"),
        (lambda: supcon(Z, torch.zeros(3).long(), 0.1), "labels must be 2 integers"),
        (lambda: supcon(Z, torch.zeros(2), 0.1), "got torch.float32"),
        (lambda: supcon(Z, torch.zeros(2).long(), math.inf), "temperature"),
        (lambda: negative_cosine(Z, Z[:1]), "p and z must have one shape"),
        (lambda: alignment(Z, Z[:1]), "x and y must have one shape"),
        (lambda: alignment(Z, Z, 0), "alpha must be > 0, got 0"),
        (lambda: uniformity(Z[:1]), r"batch >= 2, got \(1, 3\)"),
        (lambda: uniformity(Z, -1), "t must be > 0, got -1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
