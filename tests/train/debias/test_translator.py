"""StarGAN with classes as domains: the penalty in closed form, conditioning, whose parameters a step moves, files."""

from __future__ import annotations

import copy
import math

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from netwright import storage
from netwright.console import UserError
from netwright.data.tensors import Batches, TensorImages
from netwright.seeding import seeded, stream
from netwright.train import fit
from netwright.train.debias import (
    BiasTranslator,
    StarGANDiscriminator,
    StarGANGenerator,
    gradient_penalty,
    signed_range,
)

SMALL = {"width": 4, "n_down": 1, "n_res": 1, "n_layers": 2, "kernel": 3}


def translator(**options) -> BiasTranslator:
    with seeded(0, "init"):
        return BiasTranslator(3, 8, **(SMALL | options))


def batch(count: int = 6):
    draws = stream(0, "batch")
    return 2 * torch.rand(count, 3, 8, 8, generator=draws) - 1, torch.randint(3, (count,), generator=draws)


def data(count: int = 48, indexed: bool = False, size: int = 8) -> Batches:
    draws = stream(0, "data")
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=draws)
    labels = torch.arange(count) % 3
    return Batches(TensorImages(images, labels), 8, normalise=signed_range(3), indexed=indexed)


@pytest.mark.parametrize(("norm", "expected"), [(3.0, 4.0), (1.0, 0.0), (0.0, 1.0)])
def test_penalty_of_a_linear_critic(norm, expected):
    w = torch.randn(3, 8, 8, dtype=torch.float64, generator=stream(0, "w"))
    w = norm * w / w.norm()
    real, fake = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64, generator=stream(0, "x"))
    found = gradient_penalty(lambda x: (x * w).sum((1, 2, 3)), real, fake, stream(0, "a"))
    assert found.item() == pytest.approx(expected, abs=1e-10)


def test_penalty_is_that_of_the_sum_over_patches():
    real, fake = torch.zeros(2, 4, 2, dtype=torch.float64)
    found = gradient_penalty(lambda x: torch.stack([x[:, 0], x[:, 0], x[:, 1]], 1), real, fake)
    assert found.item() == pytest.approx((5**0.5 - 1) ** 2)  # the gradient of 2 x0 + x1


def test_penalty_of_a_curved_critic_by_hand():
    real, fake = torch.randn(2, 6, 4, dtype=torch.float64, generator=stream(0, "x"))
    place = torch.rand(6, 1, generator=stream(0, "a"), dtype=torch.float64)
    between = place * real + (1 - place) * fake
    by_hand = ((2 * between).norm(dim=1) - 1).square().mean()  # of |x|^2
    found = gradient_penalty(lambda x: x.square().sum(1), real, fake, stream(0, "a"))
    assert found.item() == pytest.approx(by_hand.item())


def test_penalty_has_a_gradient_for_the_critic():
    w = torch.full((4,), 1.0, dtype=torch.float64, requires_grad=True)  # norm 2
    real, fake = torch.randn(2, 3, 4, dtype=torch.float64, generator=stream(0, "x"))
    gradient_penalty(lambda x: x @ w, real, fake).backward()
    assert torch.allclose(w.grad, 2 * (2 - 1) * w.detach() / 2)


def test_conditioning_needs_zero_padding():
    with seeded(0, "init"):
        net = StarGANGenerator(10, width=8, n_down=1, n_res=1).double()
    x = 2 * torch.rand(2, 3, 16, 16, dtype=torch.float64, generator=stream(0, "x")) - 1
    targets = torch.tensor([1, 1]), torch.tensor([7, 7])
    with torch.no_grad():
        changed = (net(x, targets[0]) - net(x, targets[1])).abs().max()
        for part in net.modules():
            if isinstance(part, nn.Conv2d):
                part.padding_mode = "reflect"
                part._reversed_padding_repeated_twice = [part.padding[0]] * 4
        mirrored = (net(x, targets[0]) - net(x, targets[1])).abs().max()
    assert float(changed) > 1e-3
    assert float(mirrored) < 1e-12


def test_the_generator_is_the_same_function_in_both_modes():
    net = StarGANGenerator(3, width=4, n_down=2, n_res=2)
    x, y = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        trained, evaluated = net.train()(x, y), net.eval()(x, y)
        alone = net(x[:1], y[:1])
    assert torch.equal(trained, evaluated)
    assert torch.allclose(alone, evaluated[:1], atol=1e-5)  # an image's own statistics, not the batch's
    assert float(evaluated.abs().max()) < 1


def test_the_published_sizes():
    with torch.device("meta"):
        net = BiasTranslator(5, 128)
    counts = [sum(p.numel() for p in part.parameters()) for part in (net.generator, net.critic)]
    assert counts == [8_430_528, 44_762_048]  # by hand from the layers of yunjey/stargan at 128 x 128, five domains
    convs = [m for m in net.generator.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(convs) == 1 + 2 + 12 + 2 + 1
    assert all(conv.bias is None for conv in convs)
    assert [m.out_channels for m in net.critic.layers if isinstance(m, nn.Conv2d)] == [64, 128, 256, 512, 1024, 2048]
    assert net.critic.source.bias is None
    assert net.critic.classes.kernel_size == (2, 2)
    source, classes = net.critic(torch.zeros(1, 3, 128, 128, device="meta"))
    assert (source.shape, classes.shape) == ((1, 1, 2, 2), (1, 5))


def test_losses_of_an_identity_and_of_a_constant(monkeypatch):
    net, (x, y) = translator(), batch()
    targets = (y + 1) % 3
    monkeypatch.setattr(net.generator, "forward", lambda x, c: x)
    found = net.generator_losses(x, y, targets)
    source, classes = net.critic(x)
    assert found["reconstruction"].item() == 0
    assert found["classes"].item() == pytest.approx(functional.cross_entropy(classes, targets).item())
    assert found["source"].item() == pytest.approx(-source.mean().item())
    monkeypatch.setattr(net.generator, "forward", lambda x, c: torch.full_like(x, 0.25))
    assert float(net.generator_losses(x, y, targets)["reconstruction"]) == pytest.approx(float((x - 0.25).abs().mean()))
    terms = net.critic_losses(x, y, targets)
    made = net.critic(torch.full_like(x, 0.25))[0].mean()
    assert terms["source"].item() == pytest.approx((made - source.mean()).item(), abs=1e-6)
    assert terms["classes"].item() == pytest.approx(functional.cross_entropy(classes, y).item(), abs=1e-6)


class Watch(lightning.Callback):
    """What each step changed."""

    def __init__(self):
        self.changed = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.grads = [None if p.grad is None else p.grad.clone() for p in pl_module.generator.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        moved = {n for n, value in pl_module.state_dict().items() if not torch.equal(value, self.before[n])}
        self.changed.append({name.partition(".")[0] for name in moved})
        if self.changed[-1] == {"critic"}:
            after = [p.grad for p in pl_module.generator.parameters()]
            assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(self.grads, after, strict=True))
        assert all(p.requires_grad for p in pl_module.parameters())


def test_steps_of_the_critic_leave_the_generator_alone_and_the_other_way_round():
    net, watch = translator(n_critic=3), Watch()
    fit(net, data(), epochs=2, callbacks=[watch])
    assert watch.changed == [{"critic"}, {"critic"}, {"critic", "generator"}] * 4
    x, y = batch()
    net.zero_grad(set_to_none=True)
    net.critic_losses(x, y, y)["penalty"].backward()
    assert all(p.grad is None for p in net.generator.parameters())


def test_a_generators_step_puts_no_gradient_on_the_critic(monkeypatch):
    net = translator(n_critic=1, lambda_gp=0.0)
    seen = []
    own = net._update

    def update(optimizer, loss):
        before = [None if p.grad is None else p.grad.clone() for p in net.critic.parameters()]
        own(optimizer, loss)
        after = [p.grad for p in net.critic.parameters()]
        same = all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(before, after, strict=True)
        )
        seen.append(same)

    monkeypatch.setattr(net, "_update", update)
    fit(net, data(16), epochs=1)
    assert seen == [False, True] * 2


class Rates(lightning.Callback):
    def __init__(self, most=None):
        self.factors, self.most = [], most

    def on_train_batch_end(self, trainer, pl_module, *rest):
        generator, critic = (o.param_groups[0]["lr"] / pl_module.lr for o in trainer.optimizers)
        assert generator == critic
        self.factors.append(generator)
        trainer.should_stop = len(self.factors) == self.most


def test_learning_rates_fall_in_the_second_half():
    rates = Rates()
    fit(translator(lr=1e-3, n_critic=1), data(64), epochs=1, callbacks=[rates])
    assert rates.factors == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


class Unlimited(IterableDataset):
    """Batches that tell no length."""

    def __iter__(self):
        while True:
            yield batch()


def rates_under(loader, n_critic, most=None, **limits):
    """The learning rates under a Trainer of one's own, over the first."""
    rates = Rates(most)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(callbacks=[rates], enable_checkpointing=False, **quiet, **limits)
    trainer.fit(translator(n_critic=n_critic), loader)
    return rates.factors


@pytest.mark.parametrize("n_critic", [1, 2, 3])
@pytest.mark.parametrize("max_steps", [1, 7, 8, 9, 24])
@pytest.mark.parametrize("endless", [True, False])
def test_learning_rates_fall_over_the_steps_of_a_trainer(endless, max_steps, n_critic):
    loader = DataLoader(Unlimited(), batch_size=None) if endless else DataLoader([batch()] * 3, batch_size=None)
    found = rates_under(loader, n_critic, max_steps=max_steps)
    count = len(found)
    assert count + count // n_critic >= max_steps  # which counts the steps of both optimisers
    assert found == pytest.approx([min(1, 2 * (1 - step / count)) for step in range(count)])


def test_learning_rates_under_other_limits():
    loader = DataLoader([batch()] * 3, batch_size=None)
    by_epochs = [1, 1, 1, 1, 2 / 3, 1 / 3]
    assert rates_under(loader, 1, max_epochs=2, max_steps=100) == pytest.approx(by_epochs)
    assert rates_under(loader, 1, max_epochs=9, max_steps=12) == pytest.approx(by_epochs)
    assert rates_under(loader, 1, max_time="00:01:00:00", most=6) == [1] * 6  # nobody knows how many there will be


@pytest.mark.parametrize("options", [{}, {"penalty_every": 2, "penalty_share": 0.5, "targets": "uniform"}])
def test_a_stopped_training_goes_on_bit_for_bit(options, tmp_path):
    whole, first, second = (translator(**options) for _ in range(3))
    fit(whole, data(), epochs=2, seed=5)

    class Stop(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(first, data(), epochs=2, seed=5, checkpoint=tmp_path / "c.ckpt", callbacks=[Stop()])
    fit(second, data(), epochs=2, seed=5, checkpoint=tmp_path / "c.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_lazy_penalty_weighs_as_much():
    x, y = batch()
    net = translator(penalty_every=2)
    assert float(net.critic_losses(x, y, y, penalised=False)["penalty"]) == 0
    assert float(net.critic_losses(x, y, y)["penalty"]) > 0
    half = translator(penalty_share=0.5)
    calls = []
    own = half.critic.forward
    half.critic.forward = lambda images: calls.append(len(images)) or own(images)
    half.critic_losses(x, y, y, stream(0, "share"))
    assert calls == [12, 3]


def test_targets():
    _, y = batch(60)
    permuted = translator().draw_targets(y, stream(0, "t"))
    assert torch.equal(permuted.sort().values, y.sort().values)
    assert not torch.equal(permuted, y)
    drawn = translator(targets="uniform").draw_targets(torch.zeros(600, dtype=torch.int64), stream(0, "t"))
    assert drawn.bincount(minlength=3).min() > 150


def test_translating_is_frozen():
    net, (x, y) = translator(), batch()
    before = copy.deepcopy(net.state_dict())
    net.train()
    made = net.translate(x.requires_grad_(), y)
    assert not made.requires_grad
    assert net.generator.training
    assert torch.equal(made, net.eval()(x, y).detach())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_sizes_that_fit_any_image():
    for shape in [(1, 8, 8), (3, 9, 13), (1, 28, 28), (3, 5, 4), (3, 64, 48), (3, 66, 65)]:
        net = BiasTranslator.sized(4, shape, width=4)
        x, y = torch.zeros(2, *shape), torch.tensor([0, 3])
        assert net.translate(x, y).shape == x.shape
        assert net.critic(x)[1].shape == (2, 4)


def test_files(tmp_path):
    net, (x, y) = translator(), batch()
    net.save(tmp_path / "g.safetensors")
    assert torch.equal(BiasTranslator.load(tmp_path / "g.safetensors").translate(x, y), net.translate(x, y))
    with pytest.raises(UserError, match="no such file"):
        BiasTranslator.load(tmp_path / "none")
    storage.write_tensors(tmp_path / "other", {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="no translator"):
        BiasTranslator.load(tmp_path / "other")
    storage.write_tensors(tmp_path / "other", net.generator.state_dict(), {"translator": '{"num_classes": 3}'})
    with pytest.raises(UserError, match="no translator"):
        BiasTranslator.load(tmp_path / "other")
    (tmp_path / "rest").write_bytes(b"rubbish")
    with pytest.raises(UserError):
        BiasTranslator.load(tmp_path / "rest")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: translator(lambda_rec=-1.0), "lambda_rec must be >= 0 and finite, got -1.0"),
        (lambda: translator(lambda_gp=float("inf")), "lambda_gp must be >= 0 and finite"),
        (lambda: translator(n_critic=0), "n_critic must be >= 1, got 0"),
        (lambda: translator(lr=0.0), "lr must be > 0"),
        (lambda: translator(targets="random"), "targets must be 'permute' or 'uniform'"),
        (lambda: translator(penalty_share=0.0), r"penalty_share must lie in \(0, 1\]"),
        (lambda: translator(penalty_every=0), "penalty_every must be >= 1"),
        (lambda: translator(n_down=4), r"image_size must be divisible by 2\^n_down = 16, got 8"),
        (lambda: translator(n_layers=4), "image_size must be >= 16 for 4 layers"),
        (lambda: BiasTranslator(1, 8, **SMALL), "num_classes must be >= 2, got 1"),
        (lambda: StarGANGenerator(1), "num_domains must be >= 2, got 1"),
        (lambda: translator(n_critic=2.5), "n_critic must be a whole number >= 1, got 2.5"),
        (lambda: translator(penalty_every=1.5), "penalty_every must be a whole number >= 1, got 1.5"),
        (lambda: translator(lambda_rec="much"), "lambda_rec must be a number >= 0, got 'much'"),
        (lambda: BiasTranslator(3, (8, 8, 8), **SMALL), "image_size must be one side"),
        (lambda: StarGANGenerator(3, kernel=4), "kernel must be odd, got 4"),
        (lambda: StarGANGenerator(3, width=0), "width must be >= 1"),
        (lambda: StarGANDiscriminator(3, 8, n_layers=0), "n_layers must be >= 1"),
        (lambda: StarGANGenerator(3)(torch.zeros(1, 3, 6, 6), torch.tensor([0])), "sides divisible by 4"),
        (lambda: StarGANGenerator(3)(torch.zeros(1, 3, 8, 8), torch.tensor([3])), r"c must lie in 0..2, got 3..3"),
        (lambda: StarGANGenerator(3)(torch.zeros(1, 3, 8, 8), torch.tensor([0.0])), "c must be 1 integers"),
        (lambda: translator().translate(torch.full((1, 3, 8, 8), 1.01), torch.tensor([0])), r"lie in \[-1, 1\]"),
        (lambda: translator().translate(torch.full((1, 3, 8, 8), math.nan), torch.tensor([0])), "images must lie"),
        (lambda: gradient_penalty(lambda x: x, torch.zeros(2, 1), torch.zeros(3, 1)), "must have one shape"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_batches():
    with pytest.raises(ValueError, match=r"images must have shape \(batch, 3, 8, 8\)"):
        fit(translator(), data(size=10), epochs=1)
    images = TensorImages(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 4)
    with pytest.raises(ValueError, match=r"labels must lie in 0..2, got 0..3"):
        fit(translator(), Batches(images, 8, normalise=signed_range(3)), epochs=1)
    with pytest.raises(ValueError, match=r"images must lie in \[-1, 1\], got 2"):
        fit(translator(), Batches(TensorImages(torch.full((8, 3, 8, 8), 2.0), torch.arange(8) % 3), 8), epochs=1)
