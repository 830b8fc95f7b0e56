"""Linear and nearest-neighbour probes against scikit-learn, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from netwright.train.contrastive import extract, fit_probe, knn_accuracy, knn_probe, linear_probe


def clouds(count: int, seed: int, classes: int = 4, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds, of features on very different scales and far from zero."""
    draws = np.random.default_rng(seed)
    centres = 2 * np.random.default_rng(99).normal(size=(classes, width))
    labels = draws.integers(0, classes, count)
    points = (centres[labels] + 1.5 * draws.normal(size=(count, width))) * 10.0 ** np.arange(-2, width - 2) + 30
    return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)


def batches(part, size: int = 100):
    return list(zip(part[0].split(size), part[1].split(size), strict=True))


def test_linear_probe_is_logistic_regression():
    train, test = clouds(600, 0), clouds(2000, 1)
    mean, std = train[0].mean(0), train[0].std(0)
    reference = LogisticRegression(C=1e4, max_iter=2000).fit(((train[0] - mean) / std).numpy(), train[1].numpy())
    expected = reference.score(((test[0] - mean) / std).numpy(), test[1].numpy())
    found = linear_probe(nn.Identity(), batches(train), batches(test))
    assert 0.6 < expected < 0.99
    assert found == pytest.approx(expected, abs=0.01)


def test_the_layer_takes_features_as_they_are():
    train, test = clouds(400, 0), clouds(300, 1)
    probe = fit_probe(*train, 4, epochs=20)
    accuracy = (probe(test[0]).argmax(1) == test[1]).double().mean().item()
    assert accuracy == linear_probe(nn.Identity(), batches(train), batches(test), 20)
    assert not any(p.requires_grad for p in probe.parameters())
    scaled = fit_probe(train[0] * 7 - 3, train[1], 4, epochs=20)
    assert torch.allclose(probe(test[0]), scaled(test[0] * 7 - 3), atol=2e-2)
    assert torch.equal(fit_probe(*train, 4, epochs=2).weight, fit_probe(*train, 4, epochs=2).weight)


def test_a_constant_feature_does_no_harm():
    x, y = clouds(200, 0)
    x[:, 2] = 5.0
    probe = fit_probe(x, y, 4, epochs=5)
    assert probe.weight.isfinite().all()
    assert not probe.weight[:, 2].any()


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0)])
def test_neighbours_vote_as_in_scikit_learn(k, temperature):
    (x, y), (tested, truth) = clouds(300, 0), clouds(1500, 1)
    x, tested = x - 30, tested - 30

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance**2 / 2) / temperature)  # of unit vectors

    def unit(z):
        return nn.functional.normalize(z).double().numpy()

    reference = KNeighborsClassifier(k, weights=weights).fit(unit(x), y.numpy())
    expected = reference.score(unit(tested), truth.numpy())
    assert knn_accuracy(x, y, tested, truth, k=k, T=temperature) == pytest.approx(expected, abs=0.002)
    assert knn_probe(nn.Identity(), batches((x, y)), batches((tested, truth)), k, temperature) == pytest.approx(
        expected, abs=0.002
    )


def test_features_are_those_of_evaluation_and_in_order():
    backbone = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Flatten())
    images, labels = torch.rand(5, 1, 2, 3), torch.arange(5)
    before = backbone[0].running_mean.clone()
    features, found = extract(backbone, [(images[:3], labels[:3], labels[:3]), (images[3:], labels[3:], labels[3:])])
    assert torch.equal(found, labels)
    assert torch.allclose(features, images.flatten(1) / (1 + 1e-5) ** 0.5)
    assert torch.equal(backbone[0].running_mean, before)
    assert backbone.training
    assert not features.requires_grad


X, Y = torch.ones(3, 2), torch.zeros(3).long()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_probe(X, Y, 2, epochs=0), "epochs must be >= 1, got 0"),
        (lambda: fit_probe(X, Y, 2, batch_size=0), "batch_size must be >= 1, got 0"),
        (lambda: fit_probe(X, Y, 2, lr=0), "lr must be > 0 and finite, got 0"),
        (lambda: fit_probe(X, Y[:2], 2), r"with a label each, got \(3, 2\) and \(2,\)"),
        (lambda: fit_probe(X, Y + 2, 2), r"labels must lie in 0..1, got 2..2"),
        (lambda: fit_probe(X[:0], Y[:0], 2), "features must have shape"),
        (lambda: linear_probe(nn.Identity(), [], [(X, Y)]), "data must hold at least 1 example, got 0"),
        (lambda: knn_accuracy(X, Y, X, Y, k=4), "k must lie in 1..3, the training examples, got 4"),
        (lambda: knn_accuracy(X, Y, X, Y, k=1, T=0), "T must be > 0 and finite, got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
