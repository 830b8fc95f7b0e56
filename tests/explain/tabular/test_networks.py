"""The self-attention network, the autoencoders, and their training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from netwright.explain.tabular import (
    EmbeddingClassifier,
    MinMax,
    SelfAttentionNetwork,
    Standardise,
    TabularCAE,
    fit_tabular,
    tabular_classifier,
)
from netwright.explain.tabular.embedding import pushed_back
from netwright.seeding import numpy_stream, seeded


def san(**options):
    with seeded(0, "init"):
        return SelfAttentionNetwork(**{"n_features": 5, "n_classes": 3} | options).eval()


def zeroed(network, bias=0.0):
    with torch.no_grad():
        for head in network.heads:
            head.weight.zero_()
            head.bias.fill_(bias)
    return network


def test_published_count_of_parameters():
    network = SelfAttentionNetwork(968, 33, n_heads=2, hidden=32)
    assert sum(p.numel() for p in network.parameters()) == 1_908_081 == 2_846_073 - (968**2 + 968)
    assert TabularCAE(7091).embedding == 968
    assert TabularCAE(7091).grid == (8, 11, 11)


def test_gates_in_closed_form():
    x = torch.randn(4, 5)
    torch.testing.assert_close(zeroed(san()).attend(x), x / 5)
    torch.testing.assert_close(zeroed(san(gate="linear"), 1.0).attend(x), x)
    torch.testing.assert_close(zeroed(san()).global_attention(), torch.full((5,), 0.2))


def test_attention_by_hand():
    network, x = san(), torch.randn(6, 5)
    weights = torch.stack([(x @ head.weight.T + head.bias).softmax(1) for head in network.heads]).mean(0)
    torch.testing.assert_close(network.instance_attention(x), weights)
    torch.testing.assert_close(network.attend(x), x * weights)
    hidden = nn.functional.selu(network.fc1(x * weights))
    torch.testing.assert_close(network(x), network.fc2(hidden))
    diagonal = torch.stack([head.weight.diag().softmax(0) for head in network.heads]).mean(0)
    torch.testing.assert_close(network.global_attention(), diagonal)
    torch.testing.assert_close(network.global_attention().sum(), torch.tensor(1.0))


def test_low_rank_is_the_product_of_its_factors():
    low, x = san(rank=2), torch.randn(4, 5)
    full = san()
    with torch.no_grad():
        for whole, (inner, outer) in zip(full.heads, low.heads, strict=True):
            whole.weight.copy_(outer.weight @ inner.weight)
            whole.bias.copy_(outer.bias)
        full.fc1.load_state_dict(low.fc1.state_dict())
        full.fc2.load_state_dict(low.fc2.state_dict())
    torch.testing.assert_close(low(x), full(x))
    torch.testing.assert_close(low.global_attention(), full.global_attention())
    assert "rank 64" in repr(SelfAttentionNetwork(2001, 2, n_heads=1))
    assert "full rank" in repr(san())


def test_attention_follows_a_permutation_of_the_features():
    network, x = san(), torch.randn(6, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = san()
    with torch.no_grad():
        for old, new in zip(network.heads, moved.heads, strict=True):
            new.weight.copy_(old.weight[order][:, order])
            new.bias.copy_(old.bias[order])
        moved.fc1.weight.copy_(network.fc1.weight[:, order])
    torch.testing.assert_close(moved(x[:, order]), network(x))
    torch.testing.assert_close(moved.instance_attention(x[:, order]), network.instance_attention(x)[:, order])
    torch.testing.assert_close(moved.global_attention(), network.global_attention()[order])


def test_mean_attention_counts_what_is_classified_rightly():
    network, x = san(), torch.randn(40, 5)
    predicted = network(x).argmax(1)
    y = predicted.clone()
    y[:10] = (y[:10] + 1) % 3
    weights = network.instance_attention(x)
    torch.testing.assert_close(network.mean_attention(x, y), weights[10:].mean(0))
    each = network.mean_attention(x, y, per_class=True)
    for c in predicted[10:].unique().tolist():
        torch.testing.assert_close(each[c], weights[10:][y[10:] == c].mean(0))
    with pytest.raises(ValueError, match="classified rightly"):
        network.mean_attention(x, (predicted + 1) % 3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_features": 0}, "n_features must be >= 1"),
        ({"n_classes": 1}, "n_classes must be >= 2"),
        ({"n_heads": 0}, "n_heads"),
        ({"hidden": 0}, "hidden"),
        ({"rank": 0}, "rank"),
        ({"dropout": 1.0}, "dropout must lie"),
        ({"gate": "relu"}, "gate must be"),
    ],
)
def test_bad_arguments_of_the_attention_network(change, told):
    with pytest.raises(ValueError, match=told):
        san(**change)
    with pytest.raises(ValueError, match=r"\(batch, 5\), got \(2, 4\)"):
        san()(torch.rand(2, 4))


@pytest.mark.parametrize("features", [1, 2, 9, 10, 65, 784])
def test_the_convolutional_autoencoder_gives_rows_back(features):
    model = TabularCAE(features)
    x = torch.rand(3, features)
    assert model.encoder(x).shape == (3, model.embedding)
    assert model(x).shape == x.shape
    assert ((model(x) > 0) & (model(x) < 1)).all()
    with pytest.raises(ValueError, match="must have shape"):
        model(torch.rand(3, features + 1))


def test_attention_is_brought_back_through_an_encoder_as_the_jacobian_says():
    with seeded(0, "init"):
        cae = TabularCAE(10, (4, 2)).eval().double()
    x = torch.rand(5, 10, dtype=torch.float64)
    jacobian = torch.stack([torch.autograd.functional.jacobian(cae.encoder, row[None])[0, :, 0] for row in x])
    weights = torch.rand(cae.embedding, dtype=torch.float64)
    expected = torch.einsum("e,nei->i", weights, jacobian.abs()) / 5
    torch.testing.assert_close(pushed_back(cae.encoder, x, weights), expected)
    with pytest.raises(ValueError, match="one a coordinate"):
        pushed_back(cae.encoder, x, weights[1:])


def test_attention_of_features_without_an_encoder_is_attention():
    model = tabular_classifier(5, 3, None, "san").eval()
    x = torch.rand(6, 5)
    torch.testing.assert_close(model.feature_attention(x), model.head.instance_attention(x).mean(0))
    with pytest.raises(TypeError, match="SelfAttentionNetwork"):
        tabular_classifier(5, 3, None, "dense").feature_attention(x)


def test_scaling_by_column():
    X = numpy_stream(0, "scale").normal(size=(50, 3)) * [1, 5, 0] + [0, 2, 3]
    x = torch.tensor(X, dtype=torch.float32)
    scaled = MinMax(X)(x)
    torch.testing.assert_close(scaled.amin(0), torch.zeros(3))
    torch.testing.assert_close(scaled.amax(0), torch.tensor([1.0, 1, 0]))
    torch.testing.assert_close(Standardise(X)(x).std(0, correction=0), torch.tensor([1.0, 1, 0]))


@pytest.mark.parametrize(("encoder", "head"), [(None, "dense"), (None, "san"), ("dense", "san"), ("conv", "conv")])
def test_every_black_box_learns(encoder, head):
    random = numpy_stream(0, "learns")
    X = random.random((160, 9)).astype(np.float32) * 0.2
    X[:, 0] = np.round(X[:, 0] / 0.2)
    y = X[:, 0].astype(int)
    with seeded(0, "init"):
        model = tabular_classifier(9, 2, encoder, head, embedding=6)
    epochs = 20 if head == "conv" else 8
    before, history = fit_tabular(
        model, X, y, epochs=epochs, autoencoder_epochs=4, patience=None, batch=16, lr=1e-2, end_to_end=head == "conv"
    )
    assert len(history.epochs) == epochs
    with torch.no_grad():
        model.eval()
        right = float((model(torch.from_numpy(X)).argmax(1).numpy() == y).mean())
    assert right > 0.75
    assert (before is None) == (encoder is None)
    if before is not None:
        assert before.epochs[-1]["train_loss"] < before.epochs[0]["train_loss"]


def test_training_is_a_function_of_the_seed_and_stops():
    X = numpy_stream(0, "stop").random((60, 4))
    y = (X[:, 0] > 0.5).astype(int)
    found = []
    for _ in range(2):
        with seeded(1, "init"):
            model = tabular_classifier(4, 2, "dense", "san", embedding=3)
        fit_tabular(model, X, y, epochs=2, autoencoder_epochs=1, seed=5)
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*found)
    model = tabular_classifier(4, 2, None, "dense")
    _, history = fit_tabular(model, X, y, epochs=50, patience=1, lr=1e6)
    assert len(history.epochs) < 50


def test_the_encoder_stays_as_the_autoencoder_left_it():
    X = numpy_stream(0, "encoder").random((60, 4))
    y = (X[:, 0] > 0.5).astype(int)
    weights = []
    for end_to_end in (False, True):
        with seeded(1, "init"):
            model = tabular_classifier(4, 2, "dense", "dense", embedding=3)
        alone = EmbeddingClassifier(model.encoder, model.decoder, nn.Linear(3, 2))
        fit_tabular(alone, X, y, epochs=1, autoencoder_epochs=2, seed=0, end_to_end=end_to_end)
        weights.append(model.encoder[0].weight.detach().clone())
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"encoder": "deep"}, "encoder must be"),
        ({"head": "cnn"}, "head must be one of"),
        ({"encoder": "dense", "head": "conv"}, "needs encoder='conv'"),
        ({"n_classes": 1}, "n_classes must be >= 2"),
        ({"embedding": 0}, "embedding must be >= 1"),
    ],
)
def test_bad_arguments_of_the_classifier(change, told):
    with pytest.raises(ValueError, match=told):
        tabular_classifier(**{"n_features": 4, "n_classes": 2} | change)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"epochs": 0}, "epochs"), ({"lr": 0}, "lr must be > 0"), ({"y": [0]}, "y must be 8 classes")],
)
def test_bad_arguments_of_training(change, told):
    good = {"X": np.zeros((8, 3)), "y": np.arange(8) % 2}
    with pytest.raises(ValueError, match=told):
        fit_tabular(nn.Linear(3, 2), **good | change)
