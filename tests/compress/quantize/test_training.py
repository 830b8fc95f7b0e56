import lightning
import pytest
import torch
from torch import nn

from netwright.compress.distill import DistillationLoss, distill
from netwright.compress.quantize import (
    allocate_points,
    alternating_quantization,
    baked,
    differentiable_quantization,
    pack,
    post_training_quantize,
    quantized_distillation,
    unpack,
)
from netwright.compress.quantize.placing import quantizers
from netwright.compress.quantize.training import gradient_norms
from netwright.data import Batches, load
from netwright.metrics import accuracy
from netwright.seeding import seeded
from netwright.train import Classifier, evaluate, fit

EPOCHS = 4


@pytest.fixture(scope="module")
def trained():
    """Digits, and a small network that reads them."""
    data = load("digits")
    batches = Batches(data.train, 32, normalise=data.normalise())
    with seeded(0, "init"):
        net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Linear(32, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
    fit(Classifier(net, lr=0.05), batches, epochs=EPOCHS)
    whole = Batches(data.test, 500, shuffle=False, drop_last=False, normalise=data.normalise())
    return net.eval(), batches, lambda network: accuracy(*evaluate(network, whole))


def test_training_with_rounded_weights_beats_rounding_afterwards(trained):
    net, batches, score = trained
    rounded = score(post_training_quantize(net, 2))
    found = quantized_distillation(net, net, batches, bits=2, epochs=EPOCHS, lr=0.02)
    again = quantized_distillation(net, net, batches, bits=2, epochs=EPOCHS, lr=0.02)
    assert score(found) > rounded + 0.05
    assert score(post_training_quantize(net, 2, ranges="mse")) > rounded
    assert torch.equal(found[1].weight, again[1].weight)
    shadow = found[1].parametrizations.weight.original
    assert len(shadow.unique()) > 1000
    assert len(baked(found)[6].weight.unique()) <= 4 * 2
    assert score(net) > 0.9


def test_learned_points_beat_even_ones_and_leave_the_weights(trained):
    net, batches, score = trained
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = differentiable_quantization(net, batches, bits=2, epochs=EPOCHS, lr=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(found[1].parametrizations.weight.original, net[1].weight)
    start = differentiable_quantization(net, batches, bits=2, epochs=1, lr=1e-12)
    loss = DistillationLoss(2.0, 1.0)

    def gap(network):
        return sum(float(loss(network.eval()(x).detach(), net.eval()(x).detach(), y)) for x, y in batches)

    assert gap(found) < gap(start)
    for *_, quantizer in quantizers(found):
        assert bool((quantizer.points[1:] >= quantizer.points[:-1]).all())
    assert not torch.equal(found[2].running_mean, before["2.running_mean"])
    assert score(found) > score(post_training_quantize(net, 2))


class Watch(lightning.Callback):
    """What moved in each epoch: points, weights."""

    def __init__(self):
        self.moved = []

    def state(self, module):
        return {name: value.detach().clone() for name, value in module.network.named_parameters()}

    def on_train_epoch_start(self, trainer, pl_module):
        self.before = self.state(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        now = self.state(pl_module)
        changed = {name for name, value in now.items() if not torch.equal(value, self.before[name])}
        points = {name for name in now if name.endswith("points")}
        self.moved.append((bool(changed & points), bool(changed - points), changed))


@pytest.mark.parametrize("epochs", [1, 4])
def test_points_and_weights_take_turns(trained, monkeypatch, epochs):
    net, batches, score = trained
    watch = Watch()

    def watched(*given, callbacks=(), **options):
        return distill(*given, callbacks=[*callbacks, watch], **options)

    monkeypatch.setattr("netwright.compress.quantize.training.distill", watched)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = alternating_quantization(net, net, batches, bits=2, epochs=epochs, lr=0.02, points_lr=1e-4)
    turns = [(points, weights) for points, weights, _ in watch.moved]
    assert turns == [(True, False), (False, True)] * (epochs // 2) if epochs > 1 else turns == [(False, True)]
    assert {"1.bias", "2.weight", "1.parametrizations.weight.original"} <= watch.moved[-1][2]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in found.parameters())
    assert len(found[1].weight.unique()) > 4  # in buckets
    if epochs > 1:
        assert score(found) > score(post_training_quantize(net, 2)) + 0.05
        assert torch.equal(unpack(pack(found), net)[1].weight, found[1].weight)


def test_points_go_where_gradients_are_large(trained):
    net, batches, _ = trained
    norms = gradient_norms(net, batches)
    found = differentiable_quantization(net, batches, bits=3, epochs=1, lr=1e-5, allocate_bits=True)
    counts = [len(quantizer.points) for *_, quantizer in quantizers(found)]
    assert counts == allocate_points(norms, 8)
    assert sum(counts) == 24
    assert counts.index(max(counts)) == norms.index(max(norms))


def test_gradient_norms_are_those_of_backward(trained):
    net, batches, _ = trained
    totals = [0.0] * 3
    copy = nn.Sequential(*net).train()
    statistics = {k: v.clone() for k, v in net.state_dict().items()}
    for i, (x, y) in enumerate(batches):
        if i == 5:
            break
        copy.zero_grad()
        nn.functional.cross_entropy(copy(x), y).backward()
        totals = [t + float(copy[j].weight.grad.norm()) / 5 for t, j in zip(totals, (1, 4, 6), strict=True)]
    net.load_state_dict(statistics)
    net.eval()
    assert gradient_norms(net, batches) == pytest.approx(totals, rel=1e-4)


@pytest.mark.parametrize(
    ("norms", "points", "expected"),
    [
        ([1.0, 1.0], 4, [4, 4]),
        ([3.0, 1.0], 8, [10, 6]),
        ([1.0, 0.0, 0.0], 2, [2, 2, 2]),
        ([0.0, 0.0], 16, [16, 16]),
        ([1.0, 1.0, 1.0], 5, [5, 5, 5]),
    ],
)
def test_points_by_hand(norms, points, expected):
    assert allocate_points(norms, points) == expected


def test_points_add_up():
    generator = torch.Generator().manual_seed(0)
    for points in (2, 3, 4, 16):
        for number in (1, 2, 7, 30):
            counts = allocate_points(torch.rand(number, generator=generator).pow(6).tolist(), points)
            assert sum(counts) == points * number
            assert min(counts) >= 2


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: allocate_points([], 4), "at least one"),
        (lambda: allocate_points([-1.0], 4), "grad_norms must be finite"),
        (lambda: allocate_points([1.0], 1), "points_per_tensor must be >= 2"),
        (lambda: differentiable_quantization(nn.Linear(2, 2), [], lr=0), "lr must be > 0"),
        (lambda: differentiable_quantization(nn.Linear(2, 2), [], bits=0), "bits must lie in"),
        (lambda: alternating_quantization(nn.Linear(2, 2), nn.Linear(2, 2), [], bits=17), "bits must lie in"),
        (lambda: alternating_quantization(nn.Linear(2, 2), nn.Linear(2, 2), [], lr=0), "lr must be > 0, got 0"),
        (lambda: alternating_quantization(nn.Linear(2, 2), nn.Linear(2, 2), [], points_lr=-1), "points_lr must be > 0"),
        (lambda: gradient_norms(nn.Linear(2, 2), []), "at least 1 batch"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()
