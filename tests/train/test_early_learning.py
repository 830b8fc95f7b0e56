"""ELR and ELR+ against cases by hand, the gradient's formula, cross-entropy, loops written out, and each other."""

from __future__ import annotations

import math

import lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from netwright.data.augment import mixup
from netwright.data.indexed import IndexedDataset
from netwright.data.tensors import Batches, TensorImages
from netwright.seeding import seeded, stream
from netwright.train import Classifier, ELRLoss, ELRPlus, early_learning_step, fit, label_doubts
from netwright.train.callbacks import ELRCallback, ELRPlusCallback, MemorizationTracker, PSKDCallback
from netwright.train.early_learning import ema_decay, sigmoid_ramp
from netwright.train.ema import WeightAverage
from netwright.train.memory import PredictionMemory

CLASSES = 3


def images(count: int = 48) -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return TensorImages(pixels, torch.randint(CLASSES, (count,), generator=generator))


def network(seed: int = 0) -> nn.Module:
    with seeded(seed, "init"):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def sgd(lr: float):
    return lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9)


def trained(*callbacks, epochs: int = 3, lr: float = 0.1, net: nn.Module | None = None, data=None, **options):
    net = network() if net is None else net
    batches = Batches(images(), 16, seed=1, indexed=True) if data is None else data
    module = net if isinstance(net, lightning.LightningModule) else Classifier(net, clip=None)
    fit(module, batches, epochs=epochs, callbacks=callbacks, optimizer=sgd(lr), **options)
    return net


def same(a: nn.Module, b: nn.Module, atol: float = 0.0) -> bool:
    return all(torch.allclose(x, y, rtol=0, atol=atol) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# What the loss is


def test_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    z = p.log().requires_grad_()
    elr = ELRLoss(4, 3, lam=3.0, beta=0.7).double()
    loss = elr(z, torch.tensor([0]), torch.tensor([2]))
    assert torch.allclose(elr.target[2], torch.tensor([0.15, 0.09, 0.06], dtype=torch.float64))
    assert loss.item() == pytest.approx(0.33003219, abs=1e-8)
    loss.backward()
    expected = torch.tensor([-0.56094808, 0.32437923, 0.23656885], dtype=torch.float64)
    assert torch.allclose(z.grad[0], expected, atol=1e-8)
    elr.eval()
    z.grad = None
    elr.pull(z, torch.tensor([2])).div(3).backward()
    term = torch.tensor([-0.02031603, 0.00812641, 0.01218962], dtype=torch.float64)
    assert torch.allclose(z.grad[0], term, atol=1e-8)
    assert float(z.grad.sum()) == pytest.approx(0, abs=1e-12)


def test_gradient_is_the_formula():
    draws = torch.Generator().manual_seed(0)
    z = torch.randn(40, 6, generator=draws, dtype=torch.float64).requires_grad_()
    elr = ELRLoss(40, 6, lam=2.0, beta=0.6).double()
    for _ in range(3):
        past = torch.randn(40, 6, generator=draws, dtype=torch.float64)
        elr.pull(past, torch.arange(40))
    elr.pull(z, torch.arange(40)).backward()
    p, t = z.detach().softmax(1), elr.target
    agreement = (p * t).sum(1, keepdim=True)
    expected = 2.0 * p * (agreement - t) / (1 - agreement) / 40
    assert torch.allclose(z.grad, expected, atol=1e-6)
    clean, false = t.argmax(1), t.argmin(1)
    assert bool((z.grad.gather(1, clean[:, None]) < 0).all())
    assert bool((z.grad.gather(1, false[:, None]) > 0).all())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-50, 50))
def test_invariances(seed, shift):
    draws = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(8, 5, generator=draws, dtype=torch.float64)
    labels, order = torch.randint(5, (8,), generator=draws), torch.randperm(5, generator=draws)
    losses = [ELRLoss(8, 5).double() for _ in range(3)]
    plain = losses[0](z, labels, torch.arange(8))
    assert torch.allclose(plain, losses[1](z + shift, labels, torch.arange(8)), atol=1e-9)
    place = torch.argsort(order)  # class c becomes column place[c]
    assert torch.allclose(plain, losses[2](z[:, order], place[labels], torch.arange(8)), atol=1e-9)
    assert torch.allclose(losses[2].target, losses[0].target[:, order], atol=1e-12)


def test_no_weight_is_cross_entropy():
    draws = torch.Generator().manual_seed(0)
    z, labels = torch.randn(32, 7, generator=draws), torch.randint(7, (32,), generator=draws)
    assert torch.equal(ELRLoss(32, 7, lam=0.0)(z, labels, torch.arange(32)), functional.cross_entropy(z, labels))
    soft = torch.rand(32, 7, generator=draws).softmax(1)
    found = ELRLoss(32, 7, lam=0.0)(z, soft, torch.arange(32))
    assert torch.allclose(found, functional.cross_entropy(z, soft))


def test_averages():
    p = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    elr, index = ELRLoss(5, 3, beta=0.7).double(), torch.tensor([4])
    for _ in range(6):
        elr.pull(p.log(), index)
    assert torch.allclose(elr.target[4], (1 - 0.7**6) * p[0])
    assert not elr.target[:4].any()
    at_once = ELRLoss(5, 3, lam=1.0, beta=0.0).double()
    assert float(at_once.pull(p.log(), index)) == pytest.approx(math.log(1 - float(p.square().sum())))


def test_certain_and_agreed_stays_finite():
    z = torch.tensor([[100.0, 0.0, 0.0]], requires_grad=True)
    elr, index = ELRLoss(1, 3, lam=1.0), torch.tensor([0])
    for _ in range(80):
        value = elr.pull(z, index)
    assert value.item() == pytest.approx(-8.1119283, abs=2e-3)  # float32 resolves 1 - <p, t> = 3e-4 to 6e-8
    value.backward()
    assert not z.grad.any()
    exact = ELRLoss(1, 3, lam=1.0).double()
    for _ in range(80):
        value = exact.pull(z.detach().double(), index)
    assert value.item() == pytest.approx(-8.1119283, abs=1e-6)


def test_half_precision_is_lifted():
    z = torch.tensor([[9.0, 0.0, 0.0]])
    found = [
        ELRLoss(1, 3)(z.to(kind), torch.tensor([0]), torch.tensor([0])) for kind in (torch.float32, torch.bfloat16)
    ]
    assert found[1].dtype == torch.float32
    assert torch.allclose(found[0], found[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(ELRLoss(1, 3)(z, torch.tensor([0]), torch.tensor([0])), found[0])


def test_evaluation_leaves_the_averages_and_a_state_keeps_them():
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    elr, index = ELRLoss(6, 3), torch.tensor([5, 1, 0, 3])
    elr(z, torch.zeros(4, dtype=torch.int64), index)
    before = elr.target.clone()
    elr.eval()(z + torch.eye(4, 3), torch.zeros(4, dtype=torch.int64), index)
    assert torch.equal(elr.target, before)
    again = ELRLoss(6, 3)
    again.load_state_dict(elr.state_dict())
    assert torch.equal(again.target, before)
    assert again.memory.seen.tolist() == [True, True, False, True, False, True]


def test_order_of_the_batches_does_not_matter():
    net, data = network().eval(), images(40)
    tables = []
    for shuffle in (False, True):
        elr = ELRLoss(40, CLASSES)
        loader = DataLoader(IndexedDataset(data), 16, shuffle=shuffle, generator=torch.Generator().manual_seed(3))
        for _ in range(2):
            for x, y, index in loader:
                elr(net(x).detach(), y, index)
        tables.append(elr.target)
    assert torch.allclose(*tables, atol=1e-6)
    assert bool((tables[0].sum(1) - (1 - 0.7**2)).abs().max() < 1e-6)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("classes", "scale"), [(3, 1.0), (100, 3.0), (17, 60.0)])
def test_the_compiled_step_is_that_of_torch(classes, scale, labelled, monkeypatch):
    if early_learning_step._compiled() is None:
        pytest.skip("there is no C compiler")
    draws, found = torch.Generator().manual_seed(0), []
    steps = [
        (scale * torch.randn(12, classes, generator=draws), torch.randint(classes, (12,), generator=draws), ids)
        for ids in (torch.randperm(20, generator=draws)[:12] for _ in range(3))
    ]
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(early_learning_step, "_compiled", lambda: None)
        elr = ELRLoss(20, classes, lam=3.0, beta=0.7)
        for z, y, ids in steps:
            logits = z.clone().requires_grad_()
            value = elr(logits, y, ids) if labelled else elr.pull(logits, ids)
            (2 * value).backward()
            found.append((value.detach(), logits.grad, elr.target.clone(), elr.memory.seen.clone()))
    for ours, torchs in zip(found[:3], found[3:], strict=True):
        assert torch.allclose(ours[0], torchs[0], rtol=1e-6, atol=1e-6)
        assert torch.allclose(ours[1], torchs[1], rtol=1e-4, atol=1e-6)
        assert torch.allclose(ours[2], torchs[2], atol=1e-6)
        assert torch.equal(ours[3], torchs[3])


def test_the_compiled_step_stands_aside(monkeypatch):
    """For other types and layouts, for large batches, and where something is wrong, when it writes nothing."""
    if early_learning_step._compiled() is None:
        pytest.skip("there is no C compiler")
    z, y, ids = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([3, 1, 0, 2])
    memory, seen = torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool)

    def step(z=z, y=y, ids=ids):
        return early_learning_step.elr_step(z, y, ids, memory, seen, 0.7, 3.0, 1e-4)

    for changed in (
        {"z": z.double()}, {"z": z.T.contiguous().T}, {"y": y.int()}, {"ids": ids.int()}, {"ids": ids + 1},
        {"ids": ids - 1}, {"ids": torch.tensor([0, 1, 2, 0])}, {"y": y + 1}, {"y": y - 100}, {"z": z / 0},
        {"z": z * math.nan}, {"z": z[:0], "y": y[:0], "ids": ids[:0]},
    ):  # fmt: skip
        assert step(**changed) is None
        assert not memory.any()
        assert not seen.any()
    monkeypatch.setattr(early_learning_step, "LARGEST", 11)
    assert step() is None
    monkeypatch.undo()
    assert step() is not None
    assert bool(seen.all())


def test_ramps():
    assert [sigmoid_ramp(step, 100) for step in (0, 50, 100, 200)] == pytest.approx(
        [math.exp(-5), math.exp(-1.25), 1.0, 1.0]
    )
    assert ema_decay(99, 0.997, 100) == pytest.approx(0.997)
    assert ema_decay(49, 0.997, 100) == pytest.approx(0.997 * math.exp(-1.25))
    assert [ema_decay(step, 0.997, 0) for step in (0, 3, 10_000)] == [0.0, 0.75, 0.997]


def test_doubts():
    target = torch.tensor([[0.9, 0.05, 0.0], [0.1, 0.2, 0.6], [0.0, 0.9, 0.05], [0.0, 0.0, 0.0], [0.05, 0.95, 0.0]])
    elr = ELRLoss(5, 3)
    elr.memory.predictions.copy_(target)
    labels = torch.tensor([0, 1, 0, 2, 0])
    assert elr.suspicious(labels).tolist() == [False, True, True, False, True]
    assert torch.allclose(elr.score(labels), torch.tensor([0.1, 0.8, 1.0, 1.0, 0.95]))
    found = label_doubts(target, labels)
    assert (found.examples, found.index, found.given, found.suggested) == (4, (2, 4, 1), (0, 0, 1), (1, 1, 2))
    assert found.score == pytest.approx((1.0, 0.95, 0.8))
    assert found.support == pytest.approx((0.9, 0.95, 0.6))
    found.plot()


def test_labels_of_any_whole_type():
    logits, index = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([2])
    found = [ELRLoss(4, 3)(logits, torch.tensor([0], dtype=kind), index) for kind in (torch.int32, torch.int64)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: ELRLoss(4, 3, beta=1.0), r"beta must lie in \[0, 1\), got 1.0"),
        (lambda e: ELRLoss(4, 3, lam=-1), "lam must be >= 0 and finite, got -1"),
        (lambda e: ELRLoss(4, 3, clamp=0.5), r"clamp must lie in \(0, 0.5\), got 0.5"),
        (lambda e: ELRLoss(0, 3), "num_examples must be >= 1"),
        (lambda e: e(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([4])), "index must lie in 0..3, got 4..4"),
        (lambda e: e(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([-1])), "index must lie in 0..3, got -1..-1"),
        (
            lambda e: e(torch.zeros(2, 3), torch.tensor([0, 0]), torch.tensor([1, 1])),
            "index must be different within a batch",
        ),
        (lambda e: e(torch.zeros(1, 3), torch.tensor([3]), torch.tensor([0])), "labels must lie in 0..2, got 3..3"),
        (lambda e: e(torch.zeros(1, 3), torch.tensor([[0]]), torch.tensor([0])), r"labels must have shape \(1,\)"),
        (lambda e: e(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0])), r"shape \(1, 3\), got \(1, 4\)"),
        (lambda e: e(torch.full((1, 3), math.nan), torch.tensor([0]), torch.tensor([0])), "logits must be finite"),
        (lambda e: e.suspicious(torch.zeros(3, dtype=torch.int64)), "labels must be 4 whole numbers"),
        (lambda e: e.score(torch.tensor([0, 1, 2, 3])), "labels must lie in 0..2, got 0..3"),
        (lambda e: ELRCallback(beta=2), "beta must lie"),
        (lambda e: ELRCallback().target, "no averages before the first batch"),
        (lambda e: ELRPlusCallback(mixup_alpha=-1), "mixup_alpha must be >= 0"),
        (lambda e: ELRPlusCallback(ema_decay=1.5), r"ema_decay must lie in \[0, 1\], got 1.5"),
        (lambda e: ELRPlusCallback(ema_ramp=-1), "ema_ramp must be >= 0, got -1"),
        (lambda e: ELRPlusCallback(coef_ramp="long"), "coef_ramp must be a whole number >= 0, got 'long'"),
        (lambda e: ELRLoss(4.5, 3), "num_examples must be a whole number >= 1, got 4.5"),
        (lambda e: ELRLoss(4, 3, lam="much"), "lam must be a number >= 0, got 'much'"),
        (lambda e: e(torch.zeros(1, 3), torch.tensor([-100]), torch.tensor([0])), "labels must lie in 0..2, got -100"),
        (lambda e: e(torch.zeros(1, 3), torch.tensor([-1]), torch.tensor([0])), "labels must lie in 0..2, got -1"),
        (
            lambda e: e(torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([0]), torch.tensor([0])),
            "logits must be finite",
        ),
        (lambda e: ELRPlusCallback(networks=3), "networks must be 1 or 2, got 3"),
        (lambda e: ELRPlusCallback(partner="other"), "partner must be 'shuffled' or 'copy'"),
        (lambda e: ELRPlusCallback().target, "no averages before the first batch"),
        (lambda e: ELRPlus(network, 4, 1), "num_classes must be >= 2, got 1"),
        (lambda e: ema_decay(0, 1.5), r"decay must lie in \[0, 1\]"),
        (lambda e: ema_decay(-1, 0.9, 0), "step must be >= 0, got -1"),
        (lambda e: e(torch.zeros(1, 3), torch.ones(1, 2), torch.tensor([0])), r"rows of 3 probabilities, got \(1, 2\)"),
        (lambda e: e(torch.zeros(1, 3), torch.ones(1), torch.tensor([0])), r"rows of 3 probabilities, got \(1,\)"),
        (lambda e: e(torch.zeros(1, 3), torch.ones(2, 3), torch.tensor([0])), "labels must have 1 rows, got 2"),
        (lambda e: trained(ELRPlusCallback(), epochs=1), "epochs must be >= 2 for ELR"),
        (lambda e: sigmoid_ramp(-1, 5), "must be >= 0, got -1 and 5"),
        (lambda e: PredictionMemory(4, 5, topk=2).average(torch.tensor([0]), torch.ones(1, 5), 0.5), "topk=2 cannot"),
    ],
)
def test_bad_input(call, message):
    elr = ELRLoss(4, 3)
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(elr)
    assert not elr.memory.seen.any()


# What the callbacks do


def test_the_callback_is_the_loop_of_the_paper():
    """The method once more, by hand, in a plain loop."""
    callback = ELRCallback(lam=3.0, beta=0.7)
    ours, by_hand, batches = trained(callback), network(), Batches(images(), 16, seed=1, indexed=True)
    target, optimizer = torch.zeros(48, CLASSES), sgd(0.1)(by_hand.parameters())
    for epoch in range(3):
        batches.set_epoch(epoch)
        for x, y, index in batches:
            z = by_hand(x)
            p = z.softmax(1).clamp(1e-4, 1 - 1e-4)
            target[index] = 0.7 * target[index] + 0.3 * (p.detach() / p.detach().sum(1, keepdim=True))
            loss = functional.cross_entropy(z, y) + 3.0 * (1 - (target[index] * p).sum(1)).log().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert same(ours, by_hand, 1e-6)
    assert torch.allclose(callback.target, target, atol=1e-6)
    assert not same(ours, trained(ELRCallback(lam=0.0)), 1e-3)


def test_no_weight_is_plain_training_bit_for_bit():
    assert same(trained(ELRCallback(lam=0.0)), trained(data=Batches(images(), 16, seed=1)))


def test_elr_plus_with_one_network_and_nothing_else_is_elr():
    """Its targets are predicted by the weights that the last step left, which are those of the next forward pass."""
    plus = ELRPlusCallback(mixup_alpha=0.0, ema_decay=0.0, networks=1)
    assert same(trained(plus), trained(callback := ELRCallback()), 1e-6)
    assert torch.allclose(plus.target, callback.target, atol=2e-4)  # the teacher's predictions are not clamped
    still, again = ELRPlusCallback(mixup_alpha=0.0, ema_decay=0.0, networks=1), ELRCallback()
    trained(still, lr=0.0), trained(again, lr=0.0)
    assert torch.allclose(still.target, again.target, atol=2e-4)


def test_elr_plus_is_the_loop_of_the_paper():
    """Two networks, averaged weights, mixed examples and a ramp, by hand."""
    settings = {"lam": 2.0, "beta": 0.6, "mixup_alpha": 1.0, "ema_decay": 0.9, "ema_ramp": 7, "coef_ramp": 5}
    data = images()
    made = iter([network(0), network(1)])
    module = ELRPlus(lambda: next(made), 48, CLASSES, **settings, optimizer_fn=sgd(0.1), seed=4)
    fit(module, Batches(data, 16, seed=1, indexed=True), epochs=4)
    nets, batches = [network(0), network(1)], Batches(data, 16, seed=1, indexed=True)
    means, optimizers = [network(0), network(1)], [sgd(0.1)(net.parameters()) for net in nets]
    tables, steps = [torch.zeros(48, CLASSES) for _ in nets], [0, 0]
    for epoch in range(4):
        a = epoch % 2
        batches.set_epoch(epoch)
        for number, (x, y, index) in enumerate(batches):
            tables[a][index] = 0.6 * tables[a][index] + 0.4 * means[1 - a](x).detach().softmax(1)
            both = torch.cat([functional.one_hot(y, CLASSES).float(), tables[a][index]], 1)
            x, both = mixup(x, both, 1.0, stream(4, "mixup", epoch, number, 0))
            z = nets[a](x)
            agreement = (both[:, CLASSES:] * z.softmax(1).clamp(1e-4, 1 - 1e-4)).sum(1)
            strength = 2.0 * math.exp(-5 * (1 - min(steps[a], 5) / 5) ** 2)
            loss = -(both[:, :CLASSES] * z.log_softmax(1)).sum(1).mean() + strength * (1 - agreement).log().mean()
            optimizers[a].zero_grad()
            loss.backward()
            optimizers[a].step()
            keep = 0.9 * math.exp(-5 * (1 - min(steps[a] + 1, 7) / 7) ** 2)
            for mean, own in zip(means[a].parameters(), nets[a].parameters(), strict=True):
                mean.data = keep * mean.data + (1 - keep) * own.data
            steps[a] += 1
    pair = module.pair()
    for ours, by_hand in zip(pair.networks, nets, strict=True):
        assert same(ours, by_hand, 1e-5)
    assert torch.allclose(module.method.target, (tables[0] + tables[1]) / 2, atol=1e-5)
    x = torch.rand(3, 1, 4, 4)
    assert torch.allclose(module.eval()(x), (nets[0](x) + nets[1](x)) / 2, atol=1e-5)
    assert torch.equal(pair.eval()(x), module(x))


def plus(*seeds: int) -> ELRPlus:
    made = iter([network(seed) for seed in seeds])
    return ELRPlus(lambda: next(made), 48, CLASSES, optimizer_fn=sgd(0.1))


class Stop(lightning.Callback):
    """Ends a training in the middle of its epoch 3, which is the second network's."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 3 and batch_idx == 1:
            raise InterruptedError


@pytest.mark.parametrize("whole", [True, False])
def test_elr_plus_is_all_in_its_state(whole):
    module, batches, x = plus(0, 1), Batches(images(), 16, seed=1, indexed=True), torch.rand(5, 1, 4, 4)
    if whole:
        fit(module, batches, epochs=4)
    else:
        with pytest.raises(InterruptedError):
            fit(module, batches, epochs=4, callbacks=[Stop()])
    assert module.method.active == (0 if whole else 1)
    again = plus(2, 3)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.eval()(x), module.eval()(x))
    assert torch.equal(again.pair().eval()(x), module(x))
    assert torch.equal(again.method.target, module.method.target)
    assert not torch.equal(plus(2, 3).eval()(x), module(x))
    assert again.method.active == module.method.active
    assert again.method.updates == module.method.updates
    assert min(module.method.updates) > 3
    if whole:  # and further training is the same
        for each in (module, again):
            fit(each, batches, epochs=2)
        assert torch.equal(again.eval()(x), module.eval()(x))
        assert torch.equal(again.method.target, module.method.target)
    untrained = plus(4, 5)
    untrained.load_state_dict(plus(6, 7).state_dict())
    assert torch.equal(untrained.eval()(x), plus(6, 7).eval()(x))


@pytest.mark.parametrize("before", [False, True])
def test_checkpoints_of_elr_plus(before, tmp_path):
    """Those too that were written before the module's state had the second network."""

    class Kill(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:  # after an epoch of the second network
                raise InterruptedError

    def run(*callbacks, checkpoint=None):
        module, batches = plus(0, 1), Batches(images(), 16, seed=1, indexed=True)
        fit(module, batches, epochs=4, callbacks=callbacks, checkpoint=checkpoint)
        return module.eval()

    path, x = tmp_path / "a.ckpt", torch.rand(5, 1, 4, 4)
    straight = run()
    with pytest.raises(InterruptedError):
        run(Kill(), checkpoint=path)
    kept = torch.load(path, weights_only=True)
    assert kept["callbacks"]["ELRPlusCallback"]["active"] == 1
    if before:
        del kept["state_dict"]["_extra_state"]
        torch.save(kept, path)
    made = iter([network(2), network(3)])
    loaded = ELRPlus.load_from_checkpoint(path, model_fn=lambda: next(made), num_examples=48, num_classes=CLASSES)
    second = {name.removeprefix("network."): v for name, v in kept["state_dict"].items() if name.startswith("network.")}
    both = [network(), network()]
    both[0].load_state_dict(second)
    other = kept["callbacks"]["ELRPlusCallback"]["other"]
    both[1].load_state_dict({name.removeprefix("network."): value for name, value in other.items()})
    assert torch.equal(loaded.eval()(x), (both[0](x) + both[1](x)) / 2)
    assert bool(loaded.method.target.any())
    resumed = run(checkpoint=path)
    assert torch.equal(resumed(x), straight(x))
    for one, same_one in zip(resumed.pair().networks, straight.pair().networks, strict=True):
        assert same(one, same_one)
    assert torch.equal(resumed.method.target, straight.method.target)


def test_the_optimiser_of_elr_plus_is_that_of_the_paper():
    module = ELRPlus(network, 48, CLASSES)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.02, 0.9, False, 5e-4)
    trained = [id(param) for group in optimizer.param_groups for param in group["params"]]
    assert sorted(trained) == sorted(id(param) for param in module.parameters())
    optimizer.load_state_dict(Classifier.configure_optimizers(module).state_dict())  # as earlier checkpoints have it
    assert [group["nesterov"] for group in optimizer.param_groups] == [True, True]


def test_the_ramp_of_averaged_weights_fits_the_run():
    short = ELRPlusCallback()
    trained(short, epochs=4)  # three steps an epoch, two epochs a network
    assert (short.ema_ramp, short.ramp) == (None, 3)
    again = ELRPlusCallback()
    again.load_state_dict(short.state_dict())
    assert again.ramp == 3
    trained(given := ELRPlusCallback(ema_ramp=40_000), epochs=2)
    assert given.ramp == 40_000


def test_the_partner():
    for partner, moved in (("shuffled", True), ("copy", False)):
        callback = ELRPlusCallback(partner=partner)
        trained(callback, epochs=2, lr=0.0)
        own, other = network().state_dict(), callback.other
        for name, value in own.items():
            there = other[f"network.{name}"]
            assert torch.equal(value.flatten().sort()[0], there.flatten().sort()[0])
            assert torch.equal(value, there) == (not moved or value.ndim < 2), name


def test_relabelling_uses_the_averages():
    seen = []

    class Watching(Classifier):
        def loss(self, logits, labels):
            seen.append(labels)
            return super().loss(logits, labels)

    callback = ELRPlusCallback(mixup_alpha=0.0, relabel=True, networks=1)
    data = images()
    fit(Watching(network(), clip=None), Batches(data, 48, seed=1, indexed=True), epochs=2, callbacks=[callback])
    hard = functional.one_hot(data.labels, CLASSES).float()
    for labels in seen:  # a one-hot label times anything positive is the label again
        assert torch.allclose(labels.sum(0), hard.sum(0), atol=1e-4)
    seen.clear()
    mixed = ELRPlusCallback(relabel=True, networks=1)
    fit(Watching(network(), clip=None), Batches(data, 48, seed=1, indexed=True), epochs=1, callbacks=[mixed])
    without = ELRPlusCallback(networks=1)
    fit(Watching(network(), clip=None), Batches(data, 48, seed=1, indexed=True), epochs=1, callbacks=[without])
    assert torch.allclose(seen[0].sum(1), torch.ones(48), atol=1e-6)
    two = (seen[1] > 0).sum(1) == 2
    assert bool(two.any())
    assert torch.equal((seen[0] > 0)[two], (seen[1] > 0)[two])
    assert not torch.allclose(seen[0][two], seen[1][two], atol=1e-3)
    # Of one batch in one epoch the averages are those that were mixed.
    x, y, index = next(iter(Batches(data, 48, seed=1, indexed=True)))
    both = torch.cat([functional.one_hot(y, CLASSES).float(), mixed.memories[0].predictions[index]], 1)
    labels, rows = mixup(x, both, 1.0, stream(mixed.seed, "mixup", 0, 0, 0))[1].chunk(2, 1)
    product = labels * rows
    assert torch.allclose(seen[0], product / product.sum(1, keepdim=True), atol=1e-6)


def test_buffers_come_along():
    with seeded(0, "init"):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES))
    callback = ELRPlusCallback(logits="network")
    trained(callback, net=net, epochs=2)
    first, second = callback.averages
    # The module ends with the first network; the second one's buffers were copied in the last epoch.
    assert torch.equal(first.buffers["1.running_mean"], net[1].running_mean)
    assert torch.equal(second.buffers["1.running_mean"], callback.other["network.1.running_mean"])
    assert not torch.allclose(second.buffers["1.running_mean"], net[1].running_mean)
    assert callback.updates == [3, 3]


def test_averaged_weights_are_a_sum_of_powers():
    net, draws = nn.Linear(3, 2), torch.Generator().manual_seed(0)
    average, expected = WeightAverage(net), net.weight.detach().double().clone()
    for _ in range(5):
        with torch.no_grad():
            net.weight.copy_(torch.randn(2, 3, generator=draws))
        average.update(net, 0.9)
        expected = 0.9 * expected + 0.1 * net.weight.detach().double()
    assert torch.allclose(average.parameters["weight"].double(), expected, atol=1e-6)
    x = torch.randn(4, 3, generator=draws)
    assert torch.allclose(average.predict(net, x), functional.linear(x, expected.float(), net.bias), atol=1e-5)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\]"):
        average.update(net, 1.1)
    with pytest.raises(ValueError, match="the 2 parameters that are averaged, got 0"):
        average.update(nn.ReLU(), 0.5)


def test_wrong_labels_are_found_and_not_memorised():
    """Three blobs and a network large enough to learn a third of the labels wrong."""
    draws = torch.Generator().manual_seed(0)
    true = torch.arange(240) % CLASSES
    pixels = torch.randint(0, 90, (240, 1, 4, 4), generator=draws)
    for label in range(CLASSES):
        pixels[true == label, :, label] += 100
    wrong = torch.rand(240, generator=draws) < 0.3
    labels = torch.where(wrong, (true + torch.randint(1, 3, (240,), generator=draws)) % CLASSES, true)
    data = TensorImages(pixels.byte(), labels)
    tracked = {}
    for name, callbacks in (("plain", []), ("elr", [ELRCallback(lam=5.0)])):
        with seeded(0, "init"):
            net = nn.Sequential(nn.Flatten(), nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, CLASSES))
        tracker = MemorizationTracker(Batches(data, 240, shuffle=False, indexed=True), true)
        module = Classifier(net, clip=None)
        batches = Batches(data, 40, indexed=True) if callbacks else Batches(data, 40)
        optimizer = lambda params: torch.optim.Adam(params, lr=0.01)  # noqa: E731
        fit(module, batches, epochs=30, callbacks=[*callbacks, tracker], optimizer=optimizer)
        tracked[name] = tracker
    plain, ours = (tracked[name].epochs[-1] for name in ("plain", "elr"))
    assert plain.false_memorised > 3 * ours.false_memorised
    assert ours.false_correct > 0.8
    for found in (plain, ours):
        assert found.false_correct + found.false_memorised + found.false_other == pytest.approx(1)
    doubts = callbacks[0].doubts(labels)
    assert set(doubts.index) >= set(wrong.nonzero()[:, 0].tolist()) or len(doubts) > 0.8 * int(wrong.sum())
    assert float(wrong[list(doubts.index)].double().mean()) > 0.9
    assert float((true[list(doubts.index)] == torch.tensor(doubts.suggested)).double().mean()) > 0.9
    tracked["elr"].plot()


# What they refuse, and how they leave a module


class Manual(Classifier):
    """Does its own backward pass."""

    def __init__(self, *args, backward: bool, **options):
        super().__init__(*args, **options)
        self.automatic_optimization, self.calls = False, backward

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if self.calls:
            self.manual_backward(loss)
        else:
            loss.backward()
        optimizer.step()

    def configure_optimizers(self):
        return sgd(0.1)(self.parameters())


def test_manual_optimisation_is_the_same():
    manual = Manual(network(), clip=None, backward=True)
    fit(manual, Batches(images(), 16, seed=1, indexed=True), epochs=3, callbacks=[ELRCallback()])
    assert same(manual.network, trained(ELRCallback()), 1e-6)
    assert "manual_backward" not in manual.__dict__
    with pytest.raises(RuntimeError, match=r"needs a step that calls self.manual_backward\(loss\)"):
        fit(Manual(network(), backward=False), Batches(images(), 16, indexed=True), epochs=1, callbacks=[ELRCallback()])


def test_a_step_may_return_a_mapping_or_nothing():
    class Steps(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "more": 1} if batch_idx else None

    callback = ELRCallback()
    trained(callback, net=Steps(network(), clip=None), epochs=1)
    assert int(callback.loss.memory.seen.sum()) == 32  # the batch that was left out is not remembered


def test_no_indices_and_no_logits():
    with pytest.raises(ValueError, match=r"ELR needs batches \(x, labels, indices\)"):
        trained(ELRCallback(), data=Batches(images(), 16))

    class Direct(Classifier):
        def training_step(self, batch, batch_idx):
            return self.loss(self.network(batch[0]), batch[1])

    with pytest.raises(RuntimeError, match="ELR saw no logits"):
        trained(ELRCallback(), net=Direct(network()))
    trained(callback := ELRCallback(logits="network"), net=Direct(network()))
    assert callback.loss.memory.seen.all()


def test_what_stands_around_a_step_comes_off_in_any_order():
    module, order = Classifier(network(), clip=None), []

    class Undoing(lightning.Callback):
        def teardown(self, trainer, pl_module, stage):
            order.append(getattr(pl_module.training_step, "around", None) is None)

    for callbacks in ([PSKDCallback(), ELRCallback()], [ELRCallback(), PSKDCallback()]):
        fit(module, Batches(images(), 16, indexed=True), epochs=2, callbacks=[*callbacks, Undoing()])
        assert "training_step" not in module.__dict__
        assert not module._forward_hooks
        assert callbacks[0]._arounds == callbacks[1]._arounds == []
    assert order == [True, True]


def test_mixing_and_memories_within_are_refused():
    for inner in (ELRCallback(), PSKDCallback()):
        with pytest.raises(ValueError, match="no method within may remember something of each"):
            trained(inner, ELRPlusCallback())
    trained(PSKDCallback(teacher="snapshot"), ELRPlusCallback(), epochs=2)


def test_wrong_number_of_classes():
    with pytest.raises(ValueError, match=r"model_fn must make networks of 4 classes, got \(16, 3\)"):
        trained(net=ELRPlus(network, 48, 4), epochs=2)
