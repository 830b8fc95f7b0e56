"""PS-KD against cases by hand, the identities of its gradient, cross-entropy, and the age of what it remembers."""

from __future__ import annotations

import copy
import functools

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from netwright.data.indexed import IndexedDataset
from netwright.data.tensors import Batches, TensorImages
from netwright.metrics import aurc, eaurc, expected_calibration_error
from netwright.seeding import seeded
from netwright.train import Classifier, fit
from netwright.train.callbacks import PSKDCallback
from netwright.train.memory import gather_rows
from netwright.train.self_distillation import (
    PSKDLoss,
    PSKDTargets,
    fit_pskd,
    pskd_alpha,
)

CLASSES = 3


def images(count: int = 48) -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return TensorImages(pixels, torch.randint(CLASSES, (count,), generator=generator))


def network() -> nn.Module:
    with seeded(0, "init"):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES))


def trained(*callbacks, epochs: int = 4, indexed: bool = True, **options) -> tuple[dict, list[float]]:
    net = network()
    batches = Batches(images(), 16, seed=1, indexed=indexed)
    history = fit(Classifier(net, lr=0.1), batches, epochs=epochs, callbacks=callbacks, seed=2, **options)
    return net.state_dict(), history.column("train_loss")


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def remembering(rows: torch.Tensor, alpha_T: float = 0.8, max_epochs: int = 2, **options) -> PSKDTargets:
    memory = PSKDTargets(len(rows), rows.shape[1], alpha_T, max_epochs, **options)
    memory.remember(torch.arange(len(rows)), rows)
    return memory


def test_by_hand():
    z = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    memory = remembering(torch.tensor([[0.6, 0.3, 0.1]]), alpha_T=0.4)
    target = memory.soften(torch.tensor([0]), torch.tensor([0]), epoch=1)
    assert target[0].tolist() == pytest.approx([0.84, 0.12, 0.04])
    loss = PSKDLoss()(z, target)
    loss.backward()
    assert loss.item() == pytest.approx(0.5298460, abs=1e-6)
    assert z.grad[0].tolist() == pytest.approx([0.00379, -0.00580, 0.00201], abs=1e-5)
    assert torch.allclose(z.grad, z.detach().softmax(1) - target, atol=1e-7)


def test_alpha():
    assert [pskd_alpha(e, 300, 0.8) for e in (0, 149, 299)] == pytest.approx([0.8 / 300, 0.4, 0.8])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_is_torchs(reduction):
    draws = torch.Generator().manual_seed(0)
    z, target = torch.randn(7, 5, generator=draws), torch.rand(7, 5, generator=draws)
    target /= target.sum(1, keepdim=True)
    each = -(target * z.log_softmax(1)).sum(1)
    expected = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    assert torch.allclose(PSKDLoss(reduction)(z, target), expected, atol=1e-6)
    assert torch.allclose(PSKDLoss(reduction)(z, target), functional.cross_entropy(z, target, reduction=reduction))


def test_ratio_of_gradients():
    draws = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(400, 6, generator=draws, dtype=torch.float64)
    past = (z + 0.3 * torch.randn(400, 6, generator=draws, dtype=torch.float64)).softmax(1)
    y, alpha = torch.randint(6, (400,), generator=draws), 0.4
    p, hard = z.softmax(1), functional.one_hot(y, 6).double()
    usual = ((p >= alpha * past) | hard.bool()).all(1)
    assert usual.sum() > 100
    z.requires_grad_()
    target = torch.lerp(hard, past, alpha)
    (soft,) = torch.autograd.grad(PSKDLoss("sum")(z, target), z)
    (plain,) = torch.autograd.grad(functional.cross_entropy(z, y, reduction="sum"), z)
    ratio = soft.abs().sum(1) / plain.abs().sum(1)
    own = lambda rows: rows.gather(1, y[:, None])[:, 0]  # noqa: E731
    expected = 1 - alpha * (1 - own(past)) / (1 - own(p))
    assert torch.allclose(ratio[usual], expected[usual], atol=1e-6)
    assert not torch.allclose(ratio[~usual], expected[~usual], atol=1e-6)


def test_rows_never_seen_count_as_labels():
    memory = PSKDTargets(5, 3, 0.8, 2)
    memory.update(torch.tensor([3]), torch.zeros(1, 3))
    found = memory.soften(torch.tensor([3, 1]), torch.tensor([0, 2]), 1)
    assert torch.allclose(found, torch.tensor([[0.2 + 0.8 / 3, 0.8 / 3, 0.8 / 3], [0.0, 0.0, 1.0]]))
    assert torch.allclose(found.sum(1), torch.ones(2))


def test_a_state_with_fewer_rows_is_taken_up():
    memory = remembering(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), alpha_T=1.0)
    ids, labels = torch.tensor([0, 1]), torch.tensor([1, 1])
    assert memory.soften(ids, labels, 1).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    memory.load_state_dict(PSKDTargets(2, 2).state_dict())
    assert memory.soften(ids, labels, 1).tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_soft_labels_are_mixed_in():
    memory = remembering(torch.tensor([[0.0, 1.0]]), alpha_T=0.5)
    assert memory.soften(torch.tensor([0]), torch.tensor([[0.5, 0.5]]), 1).tolist() == [[0.25, 0.75]]


def test_half_and_topk_memories():
    draws = torch.Generator().manual_seed(0)
    rows = (3 * torch.randn(20, 50, generator=draws)).softmax(1)
    ids, labels = torch.arange(20), torch.randint(50, (20,), generator=draws)
    exact = remembering(rows).soften(ids, labels, 1)
    half = remembering(rows, dtype=torch.float16)
    assert half.predictions.element_size() == 2
    assert float((half.soften(ids, labels, 1) - exact).abs().max()) < 5e-4
    small = remembering(rows, topk=10)
    assert small.predictions.shape == (20, 10)
    found = small.recall(ids)[0]
    assert torch.allclose(found.sum(1), torch.ones(20), atol=1e-6)
    top = rows.topk(10).indices
    assert torch.equal(found.gather(1, top), rows.gather(1, top))
    rest = found.scatter(1, top, 0.0)
    assert torch.allclose(rest.sum(1), 1 - rows.gather(1, top).sum(1), atol=1e-6)
    assert len(rest[0].unique()) == 2


class Constant(lightning.LightningModule):
    """Answers with the number of the epoch, and writes down the targets that its loss was given."""

    def __init__(self):
        super().__init__()
        self.weight, self.targets = nn.Parameter(torch.zeros(CLASSES)), {}

    def logits(self, epoch: int) -> torch.Tensor:
        return torch.arange(CLASSES) * 0.1 * (epoch + 1)

    def forward(self, x):
        return self.logits(self.current_epoch).expand(len(x), -1) + 0 * self.weight

    def training_step(self, batch, batch_idx):
        x, targets = batch
        self.targets.setdefault(self.current_epoch, []).append(targets)
        return functional.cross_entropy(self(x), targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_memory_is_one_epoch_old():
    module, data = Constant(), images(40)
    loader = DataLoader(IndexedDataset(data), batch_size=16, shuffle=True)
    callback = PSKDCallback(alpha_T=0.9)
    trainer = lightning.Trainer(
        max_epochs=3, callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    assert all(not t.is_floating_point() for t in module.targets[0])
    for epoch in (1, 2):
        alpha, past = 0.9 * (epoch + 1) / 3, module.logits(epoch - 1).softmax(0)
        found = torch.cat(module.targets[epoch])
        hard = functional.one_hot(((found - alpha * past) / (1 - alpha)).argmax(1), CLASSES)
        assert torch.allclose(found, (1 - alpha) * hard + alpha * past, atol=1e-6)
        assert hard.sum(0).tolist() == data.labels.bincount().tolist()
    assert torch.allclose(callback.targets.predictions, module.logits(2).softmax(0).expand(40, -1))
    assert "training_step" not in module.__dict__
    assert not module._forward_hooks


def test_no_weight_is_cross_entropy_bit_for_bit():
    plain, losses = trained(indexed=False)
    softened, again = trained(PSKDCallback(alpha_T=0.0))
    assert same(plain, softened)
    assert losses == again


def test_first_epoch_is_cross_entropy_whatever_the_weight():
    plain, _ = trained(epochs=1, indexed=False)
    first, _ = trained(PSKDCallback(alpha_T=1.0), epochs=1)
    assert same(plain, first)
    later, _ = trained(PSKDCallback(alpha_T=1.0), epochs=2)
    assert not same(later, trained(epochs=2, indexed=False)[0])


def test_the_callback_is_the_loop_of_the_paper():
    """The method once more, by hand, in a plain loop."""
    net, data = network(), images()
    for part in net:
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    by_hand, labels = network(), data.labels
    by_hand[3].p = 0.0
    batches = Batches(data, 16, seed=1, indexed=True)
    fit(
        Classifier(net, clip=None), batches, epochs=3, callbacks=[PSKDCallback(0.8)], seed=2,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )  # fmt: skip
    memory, optimizer = functional.one_hot(labels, CLASSES).float(), torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for epoch in range(3):
        batches.set_epoch(epoch)
        alpha = 0.8 * (epoch + 1) / 3 if epoch else 0.0
        for x, y, ids in batches:
            target = (1 - alpha) * functional.one_hot(y, CLASSES) + alpha * memory[ids]
            z = by_hand(x)
            optimizer.zero_grad()
            (-(target * z.log_softmax(1)).sum(1).mean()).backward()
            optimizer.step()
            memory[ids] = z.detach().softmax(1)
    for a, b in zip(net.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_snapshot_is_the_network_of_the_last_epoch():
    """Every target against what the network, saved at the end of the last epoch, makes of the same images."""
    alpha_T, epochs, saved = 0.9, 3, {}
    callback = PSKDCallback(alpha_T, teacher="snapshot")
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    class Watching(Classifier):
        def training_step(self, batch, batch_idx):
            seen.setdefault(self.current_epoch, []).append(batch)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self):
            saved[self.current_epoch] = copy.deepcopy(self.network).eval()

    data = images(32)
    fit(Watching(network(), lr=0.5, clip=None), Batches(data, 16, indexed=True), epochs=epochs, callbacks=[callback])
    assert all(not labels.is_floating_point() for _, labels in seen[0])
    for epoch in (1, 2):
        alpha, found = alpha_T * (epoch + 1) / epochs, []
        for x, target in seen[epoch]:
            with torch.no_grad():
                past = saved[epoch - 1](x).softmax(1)
            hard = functional.one_hot(((target - alpha * past) / (1 - alpha)).argmax(1), CLASSES).float()
            assert torch.allclose(target, torch.lerp(hard, past, alpha), atol=1e-6)
            found.append(hard)
        assert torch.cat(found).sum(0).tolist() == data.labels.bincount(minlength=CLASSES).tolist()


def test_fit_pskd_resumes_bit_for_bit(tmp_path):
    whole, stopped = network(), network()
    fit_pskd(whole, images(), epochs=4, batch_size=16)

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (2, 1):
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fit_pskd(stopped, images(), epochs=4, batch_size=16, scheduler=Stop(), checkpoint=tmp_path / "a.ckpt")
    again = network()
    history = fit_pskd(again, images(), epochs=4, batch_size=16, checkpoint=tmp_path / "a.ckpt")
    assert len(history.epochs) == 4
    assert same(whole.state_dict(), again.state_dict())


@pytest.mark.parametrize(
    ("changed", "epochs", "message"),
    [
        ({"alpha_T": 0.5}, 4, "with the alpha_T it was begun with, got 0.5 instead of 0.8"),
        ({"topk": 2}, 4, "with the topk it was begun with, got 2 instead of None"),
        ({}, 6, "max_epochs it has, since the weight of the predictions grows with them, got 6 instead of 4"),
    ],
)
def test_a_run_is_resumed_as_it_was_begun(changed, epochs, message, tmp_path):
    class Stop(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        trained(PSKDCallback(0.8), Stop(), checkpoint=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        trained(PSKDCallback(**{"alpha_T": 0.8} | changed), epochs=epochs, checkpoint=tmp_path / "a.ckpt")


@pytest.mark.parametrize("resumed", [False, True])
def test_topk_and_type_of_the_memory_through_the_callback(resumed, tmp_path):
    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError("killed")

    if resumed:
        with pytest.raises(RuntimeError, match="killed"):
            trained(PSKDCallback(topk=1, dtype="float16"), Stop(), checkpoint=tmp_path / "a.ckpt")
    callback = PSKDCallback(topk=1, dtype="float16")
    state, _ = trained(callback, checkpoint=tmp_path / "a.ckpt")
    memory = callback.targets
    assert (memory.num_classes, memory.predictions.shape, memory.predictions.dtype) == (3, (48, 1), torch.float16)
    assert same(state, trained(PSKDCallback(topk=1, dtype=torch.float16))[0])
    assert not same(state, trained(PSKDCallback())[0])


class Rates(lightning.Callback):
    """The learning rate of each epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("kind", ["made of a made one", "made of the module's own", "of an optimiser", "with it"])
def test_schedulers_of_torch(kind):
    net, rates = network(), Rates()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    module = Classifier(net, lr=0.1)
    module.on_train_epoch_start = lambda: rates.on_train_epoch_start(module.trainer, module)
    options = {
        "made of a made one": {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1), "scheduler": schedule},
        "made of the module's own": {"scheduler": schedule},
        "of an optimiser": {"scheduler": schedule(sgd)},
        "with it": {"optimizer": sgd, "scheduler": schedule},
    }[kind]
    fit_pskd(module, images(), epochs=4, batch_size=16, **options)
    assert rates.seen == pytest.approx([0.1, 0.1, 0.05, 0.05])


def test_a_scheduler_of_another_optimiser_is_refused():
    net = network()
    one, other = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2))
    schedule = torch.optim.lr_scheduler.StepLR(one, 2)
    with pytest.raises(ValueError, match="scheduler must be that of the optimizer"):
        fit_pskd(net, images(), epochs=1, optimizer=other, scheduler=schedule)


def test_metrics_by_hand_and_by_an_independent_package():
    confidence, correct = torch.tensor([0.95, 0.85, 0.65, 0.55]), torch.tensor([1, 1, 0, 1])
    probs = torch.stack([confidence, 1 - confidence], 1)
    assert expected_calibration_error(probs, 1 - correct) == pytest.approx(32.5, abs=1e-4)
    assert aurc(probs, 1 - correct) == pytest.approx(145.833, abs=1e-3)
    assert eaurc(probs, 1 - correct) == pytest.approx(83.333, abs=1e-3)
    from torchmetrics.classification import MulticlassCalibrationError

    draws = torch.Generator().manual_seed(0)
    probs, labels = torch.randn(500, 4, generator=draws).softmax(1), torch.randint(4, (500,), generator=draws)
    theirs = MulticlassCalibrationError(4, n_bins=10, norm="l1")(probs, labels)
    assert expected_calibration_error(probs, labels) == pytest.approx(100 * float(theirs), abs=1e-4)


def test_indexed_data():
    data = IndexedDataset(images())
    assert data[5][2] == 5
    assert data[-1][2] == len(data) - 1
    with pytest.raises(IndexError, match="index must lie in"):
        _ = data[len(data)]

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(TypeError, match="must be map-style"):
        IndexedDataset(Stream())
    with pytest.raises(TypeError, match="must be map-style"):
        fit_pskd(network(), Stream(), epochs=1)


def test_gathering_in_one_process_changes_nothing():
    ids, rows = torch.tensor([3, 1]), torch.rand(2, 4)
    assert all(a is b for a, b in zip(gather_rows(ids, rows), (ids, rows), strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: pskd_alpha(0, 3, 1.5), r"alpha_T must lie in \[0, 1\], got 1.5"),
        (lambda m: pskd_alpha(3, 3), r"epoch must lie in 0..max_epochs - 1 = 2, got 3"),
        (lambda m: pskd_alpha(-1, 3), "got -1"),
        (lambda m: PSKDTargets(4, 1), "num_classes must be >= 2, got 1"),
        (lambda m: PSKDTargets(4, 3, topk=3), "topk must lie in"),
        (lambda m: PSKDLoss("max"), "reduction must be"),
        (lambda m: PSKDLoss()(torch.zeros(2, 3), torch.zeros(2, 2)), "targets must have shape"),
        (lambda m: PSKDCallback(teacher="friend"), "teacher must be"),
        (lambda m: PSKDCallback(alpha_T=-1), "alpha_T"),
        (lambda m: m.soften(torch.tensor([4]), torch.tensor([0]), 1), "ids must lie in 0..3, got 4..4"),
        (lambda m: m.update(torch.tensor([1, 1]), torch.zeros(2, 3)), "different within a batch"),
        (lambda m: m.update(torch.tensor([-1]), torch.zeros(1, 3)), "ids must lie in 0..3, got -1..-1"),
        (lambda m: m.soften(torch.tensor([-1]), torch.tensor([0]), 1), "ids must lie in 0..3, got -1..-1"),
        (lambda m: m.soften(torch.tensor([0.0]), torch.tensor([0]), 1), "ids must be whole numbers"),
        (lambda m: m.soften(torch.tensor([1]), torch.tensor([3]), 1), "labels must lie in 0..2, got 3..3"),
        (lambda m: m.soften(torch.tensor([1]), torch.tensor([0]), 2), "epoch must lie in"),
        (lambda m: m.soften(torch.tensor([1]), torch.ones(1, 2), 1), "rows of 3 probabilities"),
        (lambda m: m.soften(torch.tensor([0, 1, 2]), torch.tensor([0]), 1), "as many as ids, got 1 for 3"),
        (lambda m: m.soften(torch.tensor([0]), torch.tensor([0, 1]), 1), "as many as ids, got 2 for 1"),
        (lambda m: m.soften(torch.tensor([2, 2]), torch.tensor([0, 1]), 1), "different within a batch"),
        (lambda m: PSKDCallback(dtype="float"), "dtype must be one of float16, .*, got 'float'"),
        (lambda m: PSKDCallback(dtype=torch.int64), "dtype must be one of"),
        (lambda m: PSKDCallback(topk=0), "topk must be >= 1, got 0"),
        (lambda m: PSKDCallback(device="nowhere"), "device must be cpu, cuda or the like, got 'nowhere'"),
        (lambda m: m.update(torch.tensor([1]), torch.zeros(1, 4)), r"logits must have shape \(1, 3\), got \(1, 4\)"),
        (lambda m: m.update(torch.tensor([1]), torch.full((1, 3), float("nan"))), "logits must be finite"),
    ],
)
def test_bad_input(call, message):
    memory = PSKDTargets(4, 3, max_epochs=2)
    with pytest.raises(ValueError, match=message):
        call(memory)
    assert not memory.seen.any()


def test_batches_without_indices_and_steps_without_logits():
    with pytest.raises(ValueError, match=r"needs batches \(x, labels, indices\)"):
        trained(PSKDCallback(), indexed=False)

    class Direct(Classifier):
        def training_step(self, batch, batch_idx):
            return self.loss(self.network(batch[0]), batch[1])

    batches = Batches(images(), 16, indexed=True)
    with pytest.raises(RuntimeError, match="saw no logits"):
        fit(Direct(network()), batches, epochs=2, callbacks=[PSKDCallback()])
    callback = PSKDCallback(logits="network")
    fit(Direct(network()), batches, epochs=2, callbacks=[callback])
    assert callback.targets.seen.all()
