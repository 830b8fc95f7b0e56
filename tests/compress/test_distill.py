import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.compress import magnitude
from netwright.compress.callbacks import Distiller, QuantizedDistillationCallback
from netwright.compress.distill import DistillationLoss, distill
from netwright.compress.quantize import baked, pack, uniform_quantize, unpack
from netwright.compress.quantize.placing import quantizers
from netwright.data import Batches, Normalise, TensorImages
from netwright.data.augment import HorizontalFlip
from netwright.seeding import seeded, stream
from netwright.train import Classifier, fit

IMAGES = torch.randint(0, 256, (96, 1, 4, 4), dtype=torch.uint8, generator=stream(0, "images"))
DATA = TensorImages(IMAGES, (IMAGES.float().mean((1, 2, 3)) / 86).long())


def batches(**options):
    return Batches(DATA, 16, normalise=Normalise((0.5,), (0.3,)), **options)


def network(seed, classes=3):
    with seeded(seed, "init"):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, classes))


def logits(seed, dtype=torch.float32):
    return torch.randn(7, 5, generator=stream(seed, "z"), dtype=dtype)


LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1])


@pytest.mark.parametrize(
    ("T", "w", "reduction"), [(2.0, 0.7, "batchmean"), (5.0, 0.2, "official"), (1.0, 0.0, "batchmean")]
)
def test_the_loss_is_its_definition(T, w, reduction):
    z, t = logits(0, torch.float64), logits(1, torch.float64)
    p, q = (t / T).softmax(1), (z / T).softmax(1)
    divergence = sum(float((p[i] * (p[i] / q[i]).log()).sum()) for i in range(7)) / 7
    divergence /= 5 if reduction == "official" else 1
    expected = w * T**2 * divergence + (1 - w) * float(functional.cross_entropy(z, LABELS))
    assert float(DistillationLoss(T, w, reduction)(z, t, LABELS)) == pytest.approx(expected, rel=1e-10)


def test_limits():
    z, t = logits(0, torch.float64), logits(1, torch.float64)
    assert float(DistillationLoss(3.0, 1.0)(z, z, LABELS)) == pytest.approx(0, abs=1e-12)
    centred = (z - z.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    limit = float(centred.square().sum(1).mean()) / (2 * 5)
    assert float(DistillationLoss(1e3, 1.0)(z, t, LABELS)) == pytest.approx(limit, rel=1e-3)


def test_the_teacher_learns_nothing():
    z, t = logits(0).requires_grad_(), logits(1).requires_grad_()
    DistillationLoss()(z, t, LABELS).backward()
    assert t.grad is None
    assert z.grad is not None


@pytest.mark.parametrize("augment", [None, HorizontalFlip()])
def test_answers_that_are_kept_are_those_that_would_be_given(augment):
    """The whole training, with and without keeping what the teacher says."""
    teacher, trained = network(5).train(), []
    for keep in (True, False):
        student = network(1)
        module = Distiller(student, teacher, DistillationLoss(), lr=0.1)
        data = batches(augment=augment)
        fit(module, module.prepared(data) if keep else data, epochs=3, seed=0)
        assert (module._answers is not None) == (keep and augment is None)
        trained.append(student)
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())


def test_a_student_comes_nearer_to_its_teacher():
    teacher, student = network(5).eval(), network(1)
    x = batches().normalise(IMAGES)

    def gap():
        return DistillationLoss(1.0, 1.0)(student.eval()(x), teacher(x), DATA.labels).item()

    before = gap()
    distill(student.train(), teacher, batches(), epochs=15, loss=DistillationLoss(2.0, 1.0))
    assert gap() < before / 3


def test_quantised_training_moves_the_weights_behind():
    net = network(0)
    callback = QuantizedDistillationCallback(2, 32)
    fit(Classifier(net, lr=0.1), batches(), epochs=2, callbacks=[callback])
    names = [name for name, *_ in quantizers(net)]
    assert names == ["1.weight", "4.weight"]
    shadow = net[1].parametrizations.weight.original
    assert len(shadow.unique()) > 150
    assert torch.equal(net[1].weight, uniform_quantize(shadow, 2, 32))
    assert not torch.equal(shadow, network(0)[1].weight)
    assert torch.equal(baked(net)[1].weight, net[1].weight)


def test_a_masked_network_keeps_its_zeros():
    net = magnitude(network(0), 0.5)
    fit(Classifier(net, lr=0.1), batches(), epochs=1, callbacks=[QuantizedDistillationCallback(2, 32)])
    zero = net[1].parametrizations.weight[0].keep == 0
    assert not net[1].weight[zero].any()
    assert len(net[1].weight.unique()) < 20
    again = unpack(pack(net), network(0))
    assert torch.equal(again[1].weight, net[1].weight)


def test_a_step_is_the_algorithm():
    """Forward and backward with Q(w), then plain SGD on w."""
    net, data = network(0), batches(steps=1)
    net[3].p = 0.0
    callback = QuantizedDistillationCallback(2, 32)
    teacher = network(5)
    module = Distiller(net, teacher, DistillationLoss(), lr=0.1, weight_decay=0.0)
    fit(module, data, epochs=1, callbacks=[callback], optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    by_hand = network(0)
    by_hand[3].p = 0.0
    x, y = next(iter(batches(steps=1)))
    w = {i: by_hand[i].weight.detach().clone() for i in (1, 4)}
    for i, weight in w.items():
        by_hand[i].weight.data = uniform_quantize(weight, 2, 32)
    DistillationLoss()(by_hand(x), teacher.eval()(x), y).backward()
    for i, weight in w.items():
        stepped = weight - 0.1 * by_hand[i].weight.grad
        assert torch.allclose(net[i].parametrizations.weight.original, stepped, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: DistillationLoss(0.0), "temperature must be > 0"),
        (lambda: DistillationLoss(math.nan), "temperature must be > 0"),
        (lambda: DistillationLoss(math.inf), "temperature must be > 0 and finite, got inf"),
        (lambda: DistillationLoss(1.0, 1.2), r"weight must lie in \[0, 1\], got 1.2"),
        (lambda: DistillationLoss(reduction="mean"), "reduction must be one of"),
        (lambda: DistillationLoss()(logits(0), logits(0)[:, :3], LABELS), r"shape \(7, 5\) of the student's"),
        (lambda: distill(network(0), network(1, 4), batches(), epochs=1), "of the student's"),
        (lambda: QuantizedDistillationCallback(0), "bits must lie in"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()
