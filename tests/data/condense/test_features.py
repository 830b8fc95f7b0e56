import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.data.condense import last_layer_gradient_features, penultimate_features
from netwright.seeding import seeded, stream


def network():
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(16, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 3)
        )


X = torch.randn(12, 1, 4, 4, generator=stream(0, "x"))
Y = torch.randint(3, (12,), generator=stream(0, "y"))
LOADER = [(X[:5], Y[:5]), (X[5:], Y[5:])]


def test_penultimate_features_are_the_classifiers_input():
    net = network().train()
    found = penultimate_features(net, LOADER)
    assert net.training
    assert torch.allclose(found, net.eval()[:5](X))
    assert torch.allclose(penultimate_features(net, [X], layer=net[1]), X.flatten(1))


@pytest.mark.parametrize("double", [False, True])
def test_factors_are_the_gradient_of_the_last_layer(double):
    net = network().eval()
    g, h = last_layer_gradient_features(net, LOADER, double_softmax=double)
    for i in range(12):
        net.zero_grad()
        logits = net(X[i : i + 1])
        functional.cross_entropy(logits.softmax(1) if double else logits, Y[i : i + 1]).backward()
        assert torch.allclose(net[5].bias.grad, g[i], atol=1e-6)
        assert torch.allclose(net[5].weight.grad, g[i][:, None] * h[i], atol=1e-6)


def test_factorised_similarity_is_that_of_the_explicit_vectors():
    g, h = (t.double() for t in last_layer_gradient_features(network(), LOADER))
    explicit = torch.cat([g, (g[:, :, None] * h[:, None]).flatten(1)], 1)
    assert torch.allclose((g @ g.T) * (1 + h @ h.T), explicit @ explicit.T, atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="at least 1 batch"):
        penultimate_features(network(), [])
    with pytest.raises(ValueError, match="0 labels for 12 inputs"):
        last_layer_gradient_features(network(), [X])
