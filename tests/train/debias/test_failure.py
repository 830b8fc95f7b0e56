"""LfF: the loss and its gradient in closed form, the weights, that it finds the examples against the bias."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.data.tensors import Batches, TensorImages
from netwright.seeding import seeded, stream
from netwright.train import fit
from netwright.train.debias import BiasedClassifier, LfF, generalized_cross_entropy, relative_difficulty


def logits(count=7, classes=4):
    return torch.randn(count, classes, dtype=torch.float64, generator=stream(0, "logits")).requires_grad_()


def test_limits():
    z, y = logits(), torch.arange(7) % 4
    near = generalized_cross_entropy(z, y, 1e-8)
    assert near.item() == pytest.approx(functional.cross_entropy(z, y).item(), abs=1e-6)
    one = generalized_cross_entropy(z, y, 1.0, reduction="none")
    assert torch.allclose(one, 1 - z.softmax(1).gather(1, y[:, None])[:, 0])


@pytest.mark.parametrize("q", [0.3, 0.7, 1.0])
def test_gradient_is_that_of_cross_entropy_times_the_probability_to_the_q(q):
    z, y = logits(), torch.arange(7) % 4
    (ours,) = torch.autograd.grad(generalized_cross_entropy(z, y, q, reduction="none").sum(), z)
    (plain,) = torch.autograd.grad(functional.cross_entropy(z, y, reduction="sum"), z)
    p = z.softmax(1).gather(1, y[:, None])
    assert torch.allclose(ours, plain * p**q)
    assert torch.autograd.gradcheck(lambda z: generalized_cross_entropy(z, y, q), z)


def test_a_hopeless_example_gives_no_infinity():
    z = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss = generalized_cross_entropy(z, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(1 / 0.7)
    assert bool(z.grad.isfinite().all())


def test_difficulty():
    found = relative_difficulty(torch.tensor([0.0, 1.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert found.tolist() == [0.0, 0.5, 1.0, 0.5]


def halves(conflicting: int = 8, count: int = 256) -> tuple[TensorImages, torch.Tensor]:
    """The label is in noisy small patches; the first pixel gives it away, but for a few images."""
    draws = stream(0, "halves")
    y = torch.arange(count) % 2
    against = torch.zeros(count, dtype=torch.bool)
    against[torch.randperm(count, generator=draws)[:conflicting]] = True
    x = torch.randint(0, 100, (count, 1, 4, 4), dtype=torch.uint8, generator=draws)
    x[:, 0, 2:] += (60 * y)[:, None, None].byte()
    x[:, 0, 0] = (255 * (y ^ against.long()))[:, None].byte()
    return TensorImages(x, y), against


def networks():
    with seeded(0, "init"):
        return [nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)) for _ in range(2)]


@pytest.mark.parametrize("averaged", [True, False])
def test_what_goes_against_the_bias_weighs_more(averaged):
    data, against = halves()
    module = LfF(*networks(), num_examples=len(data) if averaged else None, lr=3e-3)
    fit(module, Batches(data, 32, indexed=True), epochs=12)
    x, y = data.images.float() / 255, data.labels
    weights = module.weights(x, y)
    assert float(weights[against].mean()) > 2 * float(weights[~against].mean())
    assert bool(((weights >= 0) & (weights <= 1)).all())
    assert module(x).shape == (256, 2)


def test_one_step_by_hand():
    data, _ = halves()
    first, second = networks()
    module = LfF(first, second)
    x, y = data.images[:8].float() / 255, data.labels[:8]
    module.log = lambda *args, **kwargs: None
    loss = module.training_step((x, y), 0)
    ce = [functional.cross_entropy(net(x), y, reduction="none") for net in (second, first)]
    weight = ce[0] / (ce[0] + ce[1])
    p = second(x).softmax(1).gather(1, y[:, None])[:, 0]
    assert loss.item() == pytest.approx(
        ((weight.detach() * ce[1]).mean() + ((1 - p**0.7) / 0.7).mean()).item(), rel=1e-5
    )
    loss.backward()
    (expected,) = torch.autograd.grad((weight.detach() * ce[1]).mean(), first[1].weight)
    assert torch.allclose(first[1].weight.grad, expected, atol=1e-7)  # W itself is not differentiated


def test_averages():
    module = LfF(*networks(), num_examples=4, beta=0.5)
    y, index = torch.tensor([0, 1]), torch.tensor([2, 0])
    x = torch.zeros(2, 1, 4, 4)
    found = module._compared([torch.tensor([4.0, 1.0]), torch.tensor([2.0, 1.0])], (x, y, index))
    assert found.tolist() == [0.5, 0.5]  # each is the largest of its class
    found = module._compared([torch.tensor([0.0]), torch.tensor([2.0])], (x[:1], y[:1], torch.tensor([3])))
    assert module.averages[:, 3].tolist() == [0.0, 2.0]
    assert found.tolist() == [0.0]  # 0 / 4 against 2 / 2
    module._compared([torch.tensor([0.0]), torch.tensor([0.0])], (x[:1], y[:1], torch.tensor([2])))
    assert module.averages[:, 2].tolist() == [2.0, 1.0]


def test_a_biased_classifier_reads_the_bias():
    data, against = halves(count=256, conflicting=24)
    net = networks()[0]
    fit(BiasedClassifier(net), Batches(data, 32), epochs=5)
    right = net.eval()(data.images.float() / 255).argmax(1) == data.labels
    assert float(right[~against].double().mean()) > 0.98
    assert float(right[against].double().mean()) < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LfF(*networks(), q=0.0), r"q must lie in \(0, 1\], got 0.0"),
        (lambda: LfF(*networks(), beta=1.0), r"beta must lie in \[0, 1\)"),
        (lambda: LfF(*networks(), lr=float("nan")), "lr must be > 0"),
        (lambda: LfF(*networks(), num_examples=0), "num_examples must be >= 1"),
        (lambda: BiasedClassifier(networks()[0], q=2.0), "q must lie"),
        (lambda: generalized_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), reduction="sum"), "reduction must be"),
        (lambda: fit(LfF(*networks(), num_examples=256), Batches(halves()[0], 32), epochs=1), "indexed=True"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
