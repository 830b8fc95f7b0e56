"""Training methods alone and all together, in whatever else a Trainer does."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.console import UserError
from netwright.data import load
from netwright.data.augment import HorizontalFlip
from netwright.data.tensors import Batches, TensorImages
from netwright.seeding import seeded, stream
from netwright.train import METHODS, Classifier, evaluate, fit
from netwright.train.callbacks import (
    CDvGCallback,
    ELRCallback,
    ELRPlusCallback,
    GradientNoiseCallback,
    NaTraTraining,
    PSKDCallback,
    TrActCallback,
    WeightCompanderCallback,
)
from netwright.train.contrastive import ContrastiveModule, MoCo, SimCLR, TwoViews, nt_xent
from netwright.train.debias import BiasTranslator
from netwright.train.debias.debiasing import projection_head
from netwright.train.groups import separate_
from netwright.train.methods import callbacks as by_name
from netwright.train.methods import check_network, parse
from netwright.train.natra import TransformGrid
from netwright.train.tract import TrActConv2d, traced
from netwright.train.weight_compander import companded, latents

EXAMPLES, BATCH, CLASSES, EPOCHS = 64, 16, 3, 3
MAKE = {
    "tract": lambda: [TrActCallback()],
    "weight-compander": lambda: [WeightCompanderCallback(learnable=True)],
    "gradient-noise": lambda: [GradientNoiseCallback(eta=0.01, seed=4)],
    "ps-kd": lambda: [PSKDCallback(0.9)],
    "elr": lambda: [ELRCallback(lam=3.0)],
    "elr+": lambda: [ELRPlusCallback(lam=3.0, ema_ramp=0)],
}
MAKE["all"] = lambda: [callback for name in list(MAKE)[:5] for callback in MAKE[name]()]
MAKE["all, elr+"] = lambda: [
    *(callback for name in list(MAKE)[:3] for callback in MAKE[name]()),
    PSKDCallback(0.9, teacher="snapshot"),
    *MAKE["elr+"](),
]
MAKE["natra"] = lambda: [NaTraTraining(transformed(), k=2)]
MAKE["natra, ps-kd, elr"] = lambda: [*MAKE["natra"](), *MAKE["ps-kd"](), *MAKE["elr"]()]
ALL = ("all", "all, elr+")
INDEXED = ("ps-kd", "elr", "elr+", "natra", "natra, ps-kd, elr", *ALL)


def transformed() -> TransformGrid:
    """Images of :func:`data`, darker and brighter."""
    images = data(True).dataset.images.float()
    made = torch.stack([(images * (1 + eps / 4)).clamp(0, 255).byte() for eps in (-2, 0, 2)], 1)
    return TransformGrid(made[:, None], torch.tensor([-2.0, 0.0, 2.0]))


def network() -> nn.Sequential:
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
        )


class Plain(lightning.LightningModule):
    """What a user's own module looks like."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class TwoOptimizers(Plain):
    """Manual optimisation of features and head, each by its own optimiser."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2 == 0:
            second.step()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[:4].parameters(), lr=0.05), torch.optim.Adam(self.net[4:].parameters())


def data(indexed: bool, **share) -> Batches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (EXAMPLES, 1, 6, 6), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    return Batches(TensorImages(images, labels), BATCH, seed=1, indexed=indexed, **share)


def train(name: str | None, module=None, compiled=False, **options):
    """Trains with the methods called ``name``, or none; the module and the callbacks."""
    module = Plain() if module is None else module
    callbacks = MAKE[name]() if name else []
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **options,
    )  # fmt: skip
    with seeded(3, "dropout"):
        # The whole of what Inductor gets to see for all methods together, what Dynamo makes of it for each alone.
        backend = "aot_eager" if name in ALL else "eager"
        trainer.fit(torch.compile(module, backend=backend) if compiled else module, data(name in INDEXED))
    return module, {type(callback).__name__: callback for callback in callbacks}


def check(name: str, module: nn.Module, callbacks: dict, updates: list[int]) -> None:
    """Each method did what it is there for."""
    if name in ("tract", *ALL):
        assert traced(module) == ["net.0"]
        assert isinstance(module.net[0], TrActConv2d)
    if name in ("weight-compander", *ALL):
        assert sorted(companded(module)) == ["net.0", "net.4", "net.6"]
        for (latent, weight), step in zip(latents(module), companded(module).values(), strict=True):
            assert not torch.allclose(latent, weight, atol=1e-3)
            assert float(weight.detach().abs().max()) < step.bound
            assert float(step.alpha.detach()) != 0
    if name in ("gradient-noise", *ALL):
        assert [noise.t for noise in callbacks["GradientNoiseCallback"].noises] == updates
    if name in ("ps-kd", "natra, ps-kd, elr", "all"):
        memory = callbacks["PSKDCallback"].targets
        assert bool(memory.seen.all())
        assert torch.allclose(memory.predictions.sum(1), torch.ones(EXAMPLES), atol=1e-5)
        assert float(memory.predictions.std()) > 0
    if name in ("elr", "natra, ps-kd, elr", "all"):
        target = callbacks["ELRCallback"].target
        assert torch.allclose(target.sum(1), torch.full((EXAMPLES,), 1 - 0.7**EPOCHS), atol=1e-5)
    if name in ("elr+", "all, elr+"):
        pair = callbacks["ELRPlusCallback"]
        rows = [memory.predictions.sum(1) for memory in pair.memories]
        for found, visits in zip(rows, (2, 1), strict=True):  # of three epochs
            assert torch.allclose(found, torch.full((EXAMPLES,), 1 - 0.7**visits), atol=1e-5)
        first, second = pair.pair(module, module.net).networks
        assert not torch.allclose(output(module), output(Holder(second)), atol=1e-3)
        assert torch.allclose(output(module), output(Holder(first)))
    assert all(bool(p.isfinite().all()) for p in module.parameters())


class Holder(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net


def output(module: nn.Module) -> torch.Tensor:
    x = torch.linspace(0, 1, 3 * 36).view(3, 1, 6, 6)
    with torch.no_grad():
        return module.eval().net(x)


STEPS = EPOCHS * EXAMPLES // BATCH
SETTINGS = {
    "alone": ({}, [STEPS]),
    "accumulation": ({"accumulate_grad_batches": 2}, [STEPS // 2]),
    "clipping": ({"gradient_clip_val": 0.5}, [STEPS]),
    "bf16": ({"precision": "bf16-mixed"}, [STEPS]),
    "two optimisers": ({"module": TwoOptimizers}, [STEPS, STEPS // 2]),
    "compile": ({"compiled": True}, [STEPS]),
}


@pytest.fixture(scope="module")
def without():
    """What a network answers that was trained without any method, by setting."""
    kept = {}

    def of(setting: str) -> torch.Tensor:
        if setting not in kept:
            options, _ = SETTINGS[setting if setting != "compile" else "alone"]
            kept[setting] = output(train(None, **_built(options))[0])
        return kept[setting]

    return of


def _built(options: dict) -> dict:
    return {key: value() if key == "module" else value for key, value in options.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MAKE)
def test_matrix(name, setting, without):
    options, updates = SETTINGS[setting]
    module, callbacks = train(name, **_built(options))
    check(name, module, callbacks, updates)
    assert not torch.allclose(output(module), without(setting), atol=1e-3)
    if setting == "compile":
        assert torch.allclose(output(module), output(train(name)[0]), atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("name", MAKE)
def test_resumed_run_is_bit_equal(name, tmp_path: Path):
    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (2, 1):
                raise RuntimeError("killed")

    def run(*more, checkpoint=None):
        callbacks, module = MAKE[name](), Classifier(network(), lr=0.05)
        fit(module, data(True), epochs=4, callbacks=[Unindexed(name), *callbacks, *more], seed=5, checkpoint=checkpoint)
        return module, callbacks

    whole, first = run()
    with pytest.raises(RuntimeError, match="killed"):
        run(Stop(), checkpoint=tmp_path / "a.ckpt")
    again, second = run(checkpoint=tmp_path / "a.ckpt")
    assert whole.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())
    for a, b in zip(first, second, strict=True):
        states = (a.state_dict(), b.state_dict())
        assert str(states[0]) == str(states[1])


class Unindexed(lightning.Callback):
    """Hands on batches of three as pairs, to methods that ask for no index."""

    def __init__(self, name: str):
        self.name = name

    def on_fit_start(self, trainer, pl_module):
        if self.name not in INDEXED:
            step = pl_module.training_step
            pl_module.training_step = lambda batch, batch_idx: step(batch[:2], batch_idx)


class Watch(lightning.Callback):
    """Norms of the gradient when the optimiser steps."""

    def __init__(self):
        self.norms = []

    def on_fit_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        optimizer.register_step_post_hook(self.see)

    def see(self, optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.norms.append(float(torch.stack([g.norm() for g in grads]).norm()))


@pytest.mark.parametrize("clip", ["trainer", "module"])
def test_noise_comes_after_clipping_whoever_clips(clip):
    class Own(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    norms = {}
    for order in ("clip_then_noise", "noise_then_clip"):
        watch = Watch()
        module = Own(network(), clip=1e-3) if clip == "module" else Plain()
        trainer = lightning.Trainer(
            max_epochs=1, callbacks=[GradientNoiseCallback(eta=0.04, order=order), watch], logger=False,
            enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
            gradient_clip_val=1e-3 if clip == "trainer" else None,
        )  # fmt: skip
        trainer.fit(module, data(False))
        norms[order] = watch.norms
    count = sum(p.numel() for p in network().parameters())
    assert max(norms["noise_then_clip"]) < 1.01e-3
    assert norms["clip_then_noise"][0] == pytest.approx(0.2 * count**0.5, rel=0.15)


def test_noise_after_manual_clipping_cannot_be_clipped(capsys):
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[GradientNoiseCallback(order="noise_then_clip")], logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(TwoOptimizers(), data(False))
    assert "the noise comes after the clipping" in capsys.readouterr().err


def test_a_module_is_left_as_it_was_when_training_fails():
    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("killed")

    module, noise = Classifier(network()), GradientNoiseCallback()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            fit(module, data(True), epochs=1, callbacks=[PSKDCallback(), noise, Stop()])
        assert "training_step" not in module.__dict__
        assert not module._forward_hooks
        assert noise._handles == []


def test_tract_after_the_compander_is_refused():
    with pytest.raises(ValueError, match="apply TrAct first"):
        fit(Classifier(network()), data(False), epochs=1, callbacks=[WeightCompanderCallback(), TrActCallback()])


class ByHand(lightning.Callback):
    """The penalty on the effective weights as a term of the loss, where the latent ones are not decayed."""

    def __init__(self, decay: float):
        self.decay = decay

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        hidden = {id(latent) for latent, _ in latents(pl_module)}
        for group in optimizer.param_groups:
            assert not any(id(param) in hidden for param in group["params"]) or group["weight_decay"] == 0

    def on_before_backward(self, trainer, pl_module, loss):
        (self.decay / 2 * sum(weight.square().sum() for _, weight in latents(pl_module))).backward()


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("options", [{"decay_on": "effective"}, {"effective_decay": 0.3}])
def test_effective_decay_takes_the_place_of_the_optimisers(options, schedule):
    """Against the penalty by autograd in a module that decays nothing itself; what is not companded decays as ever."""

    class Own(Plain):
        def __init__(self, decay: float):
            super().__init__()
            self.decay = decay

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=self.decay)
            if not schedule:
                return optimizer
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def run(decay: float, *callbacks):
        module = Own(decay)
        trainer = lightning.Trainer(
            max_epochs=2, callbacks=list(callbacks), logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, data(False))
        return module

    usual, strength = (0.3, 0.3) if "decay_on" in options else (0.01, 0.3)
    ours = run(usual, WeightCompanderCallback(exclude="net.6", **options))
    by_hand = WeightCompanderCallback(exclude="net.6")
    by_hand.on_fit_start = lambda trainer, module: separate_(
        trainer.optimizers[0],
        [latent for latent, _ in latents(module)],
        schedulers=[config.scheduler for config in trainer.lr_scheduler_configs],
        weight_decay=0.0,
    )
    theirs = run(usual, by_hand, ByHand(strength))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    plain = run(usual, WeightCompanderCallback(exclude="net.6"))
    assert not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("name", ["weight-compander", "all"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_what_companders_learn_has_a_hundredth_of_the_rate(name, kind):
    class Own(Plain):
        def configure_optimizers(self):
            optimizer = kind(self.parameters(), lr=0.02, weight_decay=1e-3)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    module, _ = train(name, Own())
    groups = {id(p): group for group in module.optimizers().param_groups for p in group["params"]}
    own = {id(param) for step in companded(module).values() for param in (step.alpha, step.beta)}
    assert len(own) == 6
    for param in module.parameters():
        told = groups[id(param)]["lr"], groups[id(param)]["weight_decay"]
        rate = 0.02 * 0.5**EPOCHS
        assert told == ((pytest.approx(0.01 * rate), 0.0) if id(param) in own else (pytest.approx(rate), 1e-3))


@pytest.mark.parametrize("name", [*(name for name in METHODS if name not in ("plain", "cdvg", "natra"))])
def test_double_precision(name):
    (callback,) = by_name([name])
    module = Classifier(network(), lr=0.01)
    history = fit(module, data(callback.indexed if hasattr(callback, "indexed") else False), epochs=2,
                  validation=data(False), callbacks=[callback], precision="64-true")  # fmt: skip
    assert module.dtype == torch.float64
    assert all(param.dtype == torch.float64 for param in module.parameters() if param.ndim)
    probs, _ = evaluate(module.network, data(False))
    assert bool(probs.isfinite().all())
    assert "val_loss" in history.last


def test_names():
    assert parse("tract") == ("tract", {})
    assert parse("ps-kd:alpha_T=0.5,teacher=snapshot")[1] == {"alpha_T": 0.5, "teacher": "snapshot"}
    assert parse("weight-compander:learnable=true")[1] == {"learnable": True}
    apart = ("elr+", "cdvg")  # they refuse others
    found = by_name([name for name in reversed(METHODS) if name not in ("plain", *apart)])
    found += [by_name([name])[0] for name in apart]
    kinds = [
        TrActCallback,
        WeightCompanderCallback,
        GradientNoiseCallback,
        NaTraTraining,
        PSKDCallback,
        ELRCallback,
        ELRPlusCallback,
        CDvGCallback,
    ]
    assert [type(callback) for callback in found] == kinds
    assert by_name(["gradient-noise:eta=0.3"])[0].eta == 0.3
    assert by_name(["plain"]) == []
    for pair in (["natra", "elr+"], ["cdvg", "natra"], ["ps-kd", "cdvg"]):
        with pytest.raises(UserError, match="cannot be trained with together"):
            by_name(pair)
    assert by_name(["elr:lam=7,beta=0.9"])[0].lam == 7
    assert by_name(["elr+:relabel=true"])[0].relabel is True


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["trat"], "did you mean tract?"),
        (["tract", "tract:lambda_=1"], "comes twice"),
        (["tract:lambda=1"], "did you mean lambda_?"),
        (["tract:lambda_"], "no value in 'lambda_'"),
        (["tract:lambda_=-1"], "tract: lambda_ must be > 0"),
        (["tract:lambda_=big"], "tract: "),
        (["gradient-noise:eta=0.1,eta=0.2"], "eta comes twice"),
        (["elr:lamb=3"], "did you mean lam?"),
        (["elr+", "natra"], r"natra and elr\+ cannot be trained with together"),
        (["elr:beta=1"], "elr: beta must lie in"),
        (["elr+:networks=0"], r"elr\+: networks must be 1 or 2, got 0"),
        (["weight-compander:effective_decay=-1"], "effective_decay must be >= 0"),
        (["weight-compander:function=sine"], "function must be one of arctan"),
        (["weight-compander:init=both"], "init must be one of latent, match"),
        (["weight-compander:a=0"], "a must be > 0 and finite, got 0"),
        (["weight-compander:lr_scale=-1"], "lr_scale must be > 0"),
        (["weight-compander:learnable=perhaps"], "learnable must be true or false, got 'perhaps'"),
        (["weight-compander:decay_on=w"], "decay_on must be one of latent, effective, got 'w'"),
        (["weight-compander:decay_on=latent,effective_decay=1"], "effective_decay must be 0 when decay_on"),
        (["weight-compander:exclude=0.10"], "in quotes if it looks like a number, got 0.1"),
        (["tract:sync_gram=perhaps"], "sync_gram must be true or false"),
        (["tract:layer=0.10"], "layer must be the name of a layer, in quotes"),
        (["ps-kd:dtype=floaty"], "dtype must be one of float16"),
        (["ps-kd:topk=0"], "topk must be >= 1, got 0"),
        (["ps-kd:device=nowhere"], "device must be cpu"),
        (["ps-kd:logits=3"], "logits must be the name of a submodule, got 3"),
    ],
)
def test_bad_names(texts, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        by_name(texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tract:layer=nosuch", "layer must name layers of the network, got 'nosuch'"),
        ("tract:layer=1", "layer must be one of Linear, Conv1d, Conv2d, got BatchNorm2d"),
        ("weight-compander:exclude=6 nosuch", "exclude must name layers of the network, got 'nosuch'"),
        ("weight-compander:exclude=0 4 6", "must have a layer of the types"),
        ("ps-kd:logits=nosuch", "logits must name a submodule, got 'nosuch'"),
    ],
)
def test_networks_that_do_not_suit_a_method(text, message):
    net = network()
    with pytest.raises(UserError, match=message):
        check_network(by_name([text]), net, torch.zeros(2, 1, 6, 6))
    assert [type(part) for part in net] == [type(part) for part in network()]


@pytest.mark.parametrize("prefix", ["", "network."])
def test_layers_are_named_with_or_without_the_classifier(prefix):
    callbacks = by_name([f"tract:layer={prefix}4", f"weight-compander:exclude={prefix}0 {prefix}6"])
    net = network()
    check_network(callbacks, net)
    assert not traced(net)
    fit(Classifier(net), data(False), epochs=1, callbacks=callbacks)
    assert (traced(net), sorted(companded(net))) == (["4"], ["4"])


SCRIPT = """
import importlib.util, sys, torch, lightning
spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
torch.set_num_threads(1)
folder, found = sys.argv[2], {}
for name in shared.MAKE:
    module, callbacks = shared.distributed(name)
    found[name] = dict(module.state_dict())
    for callback in callbacks:
        if isinstance(callback, shared.PSKDCallback) and callback.targets is not None:
            found[name] |= callback.targets.state_dict()
        if isinstance(callback, (shared.ELRCallback, shared.ELRPlusCallback)):
            found[name]["target"] = callback.target
        if isinstance(callback, shared.GradientNoiseCallback):
            found[name]["t"] = torch.tensor(callback.noises[0].t)
rank = torch.distributed.get_rank()
for kind in ("moco", "simclr"):
    found[kind] = dict(shared.contrastive(kind).state_dict())
module, _ = shared.debiased(f"{folder}/{rank}.safetensors", 2)
found["cdvg"] = dict(module.state_dict())
torch.save(found, f"{folder}/{rank}.pt")
"""


def distributed(name: str, devices: int = 2):
    """A network without batch norm, whose gradients of a batch are the means of its halves'."""
    with seeded(0, "init"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    callbacks = MAKE[name]()
    for callback in callbacks:
        if isinstance(callback, TrActCallback):
            callback.sync_gram = True
        if isinstance(callback, ELRPlusCallback):
            callback.mixup_alpha = 0.0  # each process mixes what it has
    module = Classifier(net, lr=0.05)
    options = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    fit(module, data(True), epochs=EPOCHS, callbacks=[Unindexed(name), *callbacks], **options)
    return module, callbacks


def contrastive(kind: str, devices: int = 2) -> nn.Module:
    """A host without batch norm; the views of a batch do not depend on how many processes share it."""
    with seeded(0, "init"):
        host = {"moco": lambda make: MoCo(make, 4, 2 * BATCH, 0.9), "simclr": lambda make: SimCLR(make, 4)}[kind](
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh())
        )
    options = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    batches = Batches(data(False).dataset, BATCH, seed=1, augment=TwoViews(HorizontalFlip()))
    fit(ContrastiveModule(host, lr=0.05), batches, epochs=EPOCHS, **options)
    return host


def debiased(file: str, devices: int = 1) -> tuple[Classifier, CDvGCallback]:
    """One step of CDvG on digits, with a translator that is there; with devices 0 everything but the step."""
    digits = load("digits")
    digits = dataclasses.replace(digits, train=digits.train.subset(range(EXAMPLES)))
    with seeded(0, "translator"):
        BiasTranslator(10, 8, channels=1, width=2, n_down=1, n_res=0, n_layers=1).save(file)
    with seeded(0, "init"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    method, module = CDvGCallback(generator=file, seed=2), Classifier(net, clip=None)
    method.prepare(digits, augment=False)
    if devices:
        options = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
        batches = Batches(digits.train, BATCH, seed=1, normalise=digits.normalise(), indexed=True, steps=1)
        fit(module, batches, epochs=1, callbacks=[method], optimizer=sgd, **options)
    return module, method


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def debiased_by_hand(file: str) -> nn.Module:
    """The same step by hand: the mean of the gradients of two processes, each with half of the batch."""
    module, method = debiased(file, 0)
    digits = load("digits")
    with seeded(method.seed, "projection"):
        projection = projection_head(8, 128)
    losses = []
    for rank in range(2):
        share = Batches(digits.train.subset(range(EXAMPLES)), BATCH, seed=1, indexed=True, rank=rank, world=2)
        _, y, ids = next(iter(share))
        views = [digits.normalise()(view) for view in method._views.kept(ids, stream(method.seed, "views", 0, 0, rank))]
        features = [module.network[:-1](view) for view in views]
        logits = module.network[-1](torch.cat(features))
        z = [projection(each) for each in features]
        losses.append(functional.cross_entropy(logits, y.repeat(2)) + nt_xent(*z, method.temperature))
    optimizer = sgd(module.parameters())
    (sum(losses) / 2).backward()
    optimizer.step()
    return module


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        environment = {
            **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank),
            "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2",
        }  # fmt: skip
        command = [sys.executable, "-c", SCRIPT, __file__, str(tmp_path)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-2000:]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in found[0]:
        assert all(torch.equal(value, found[1][name][key]) for key, value in found[0][name].items()), name
    alone, both = contrastive("moco", 1).state_dict(), found[0]["moco"]
    # Keys of a batch enter the queue in turns of the two processes.
    both["queue"] = both["queue"].view(4, -1, BATCH // 2, 2).transpose(2, 3).flatten(1)
    for key, value in alone.items():
        assert torch.allclose(value, both[key], atol=1e-5), key
    for key, value in debiased_by_hand(str(tmp_path / "by-hand.safetensors")).state_dict().items():
        assert torch.allclose(value, found[0]["cdvg"][key], atol=1e-6), key
    for name in MAKE:
        alone, callbacks = distributed(name, 1)
        for key, value in alone.state_dict().items():
            assert torch.allclose(value, found[0][name][key], atol=1e-5), (name, key)
        for callback in callbacks:
            if isinstance(callback, PSKDCallback) and callback.targets is not None:
                assert torch.allclose(callback.targets.predictions, found[0][name]["predictions"], atol=1e-5)
                assert bool(found[0][name]["seen"].all())
            if isinstance(callback, (ELRCallback, ELRPlusCallback)):
                assert torch.allclose(callback.target, found[0][name]["target"], atol=1e-5), name
                assert bool((callback.target.sum(1) > 0).all())
