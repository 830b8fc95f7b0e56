"""Scores of architectures by a training from scratch."""

import pytest
import torch
from torch.nn import functional

from netwright.data import Batches, TensorImages
from netwright.search import RandomSearch, SampleSelector, ScratchAccuracy, spaces
from netwright.seeding import stream
from netwright.train import classifier

CHAIN = spaces.get("micro-chain")


def batches(name, count=32, **options):
    """Bright and dark images, which any network learns to tell apart."""
    draw = stream(0, name)
    labels = torch.arange(count) % 2
    pixels = torch.randint(0, 100, (count, 1, 8, 8), generator=draw) + 150 * labels.view(-1, 1, 1, 1)
    return Batches(TensorImages(pixels.to(torch.uint8), labels), 8, seed=0, name=name, **options)


def test_the_score_is_the_accuracy_of_the_network_that_was_trained(monkeypatch):
    trained, evaluate = [], classifier.evaluate

    def look(network, data):
        trained.append(network)
        return evaluate(network, data)

    monkeypatch.setattr(classifier, "evaluate", look)
    genotype = CHAIN.random(stream(0, "genotype"))
    train, held = batches("train"), batches("held", shuffle=False)
    score = ScratchAccuracy(train, held, 2, epochs=4, seed=3)
    found = score(genotype)
    assert score(genotype) == found  # a function of the genotype alone
    network = trained[0]
    with torch.no_grad():
        losses = [
            sum(float(functional.cross_entropy(each.train()(x), y)) for x, y in train)
            for each in (network, CHAIN.build(genotype, 1, 2, seed=3))
        ]
    assert losses[0] < losses[1]
    again = trained[1].eval()
    with torch.no_grad():
        right = sum(int((again(x).argmax(1) == y).sum()) for x, y in held)
    assert found == right / 32


def test_one_step_is_that_of_plain_gradient_descent(monkeypatch):
    trained, evaluate = [], classifier.evaluate

    def look(network, data):
        trained.append([p.detach().clone() for p in network.parameters()])
        return evaluate(network, data)

    monkeypatch.setattr(classifier, "evaluate", look)
    genotype = CHAIN.genotype(dict.fromkeys(CHAIN.choices(), "k3_e2"))
    train = batches("train", count=8)
    ScratchAccuracy(train, train, 2, epochs=1, lr=0.05, channels=16)(genotype)
    network = CHAIN.build(genotype, 1, 2, seed=0, channels=16)
    ((x, y),) = train
    weights = list(network.parameters())
    grads = torch.autograd.grad(functional.cross_entropy(network(x), y), weights)
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    for found, weight, grad in zip(trained[0], weights, grads, strict=True):
        decay = 5e-4 * weight.detach() if weight.ndim > 1 else 0.0
        step = grad * min(1.0, float(5.0 / norm)) + decay
        # The first step of Nesterov's momentum of 0.9, in the middle of the cosine, which has this one step.
        torch.testing.assert_close(found, weight.detach() - 0.5 * 0.05 * 1.9 * step, atol=1e-5, rtol=1e-4)


def test_the_best_of_the_draws_is_the_one_that_trains_best():
    train, held = batches("train", count=16), batches("held", shuffle=False)
    score = ScratchAccuracy(train, held, 2, epochs=1)
    supernet = CHAIN.supernet(1, 2, seed=0)
    selector = SampleSelector(samples=2, evaluate=score)
    chosen = selector.select(supernet, seed=0)
    scores = [score(genotype) for genotype in selector.candidates(supernet, seed=0)]
    assert score(chosen) == max(scores)
    assert RandomSearch(CHAIN, score, trials=2).search(seed=0).scores == pytest.approx(
        [score(g) for g in RandomSearch(CHAIN, score, trials=2).search(seed=0).genotypes]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"epochs": 0}, "epochs must be >= 1, got 0"), ({"lr": 0.0}, "lr must be > 0, got 0.0")],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        ScratchAccuracy(batches("a"), batches("b"), 2, **options)
