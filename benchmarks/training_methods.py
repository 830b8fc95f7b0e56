"""What the training methods cost, beside the code that one would write or install instead.

    python benchmarks/training_methods.py [--rounds 20]
    python benchmarks/training_methods.py --quick

One thread, alternating rounds, medians and quartiles. Peers: a Python loop with ``torch.randn_like`` for each
parameter; ``a * torch.atan(v / b)`` under autograd; the package ``torch-tract``; rows of ``torch.eye`` found through
numpy, as the published loop of PS-KD has it; plain cross-entropy, beside ELR's loss; a Python loop over parameters,
beside averaged weights. Then the step of a small convolutional network at batch 64 with each method over that without
any, and for gradient noise the step of a small perceptron. The figures go to benchmarks/results/, --quick runs three
rounds and writes nothing. Exit 1 if an aim is missed. Where ``cleanlab`` is installed, how far ELR's doubted labels and
its agree is printed, without an aim.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from netwright.console import table
from netwright.cost import compare_times
from netwright.data.augment import mixup
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded, stream
from netwright.train.early_learning import ELRLoss, agreement_loss
from netwright.train.ema import WeightAverage
from netwright.train.gradient_noise import GradientNoise, register_gradient_noise
from netwright.train.self_distillation import PSKDTargets
from netwright.train.tract import apply_tract, tract
from netwright.train.weight_compander import apply_weight_compander, compand
from support.record import Figure, over, record

Calls = dict[str, Callable[[], Any]]
PLUS = "ELR+, one of its two networks"


def noise() -> Calls:
    """Noise for 120 tensors of a deep perceptron."""
    net = nn.Sequential(*(nn.Linear(50, 50) for _ in range(60)))
    params = list(net.parameters())
    for param in params:
        param.grad = torch.zeros_like(param)
    ours = GradientNoise(params)

    def loop() -> None:
        for param in params:
            param.grad.add_(torch.randn_like(param), alpha=0.1)

    return {"ours": ours.step, "peer": loop}


def compander() -> Calls:
    """Ten million weights, forward and backward."""
    v = torch.randn(10**7, generator=stream(0, "weights")).requires_grad_()
    grad = torch.ones_like(v)

    def run(function: Callable[[Any], Any]) -> Callable[[], None]:
        def once() -> None:
            v.grad = None
            function(v).backward(grad)

        return once

    a, b = torch.tensor(0.3), torch.tensor(0.2)
    return {"ours": run(lambda v: compand(v, a, b)), "peer": run(lambda v: a * torch.atan(v / b))}


def first_layer() -> Calls | None:
    """Forward and backward of a 5x5 convolution of a batch of 128 colour images."""
    if importlib.util.find_spec("torch_tract") is None:
        return None
    import torch_tract

    plain = nn.Conv2d(3, 16, 5, 2, 2)
    x = torch.randn(128, 3, 32, 32, generator=stream(0, "images"))

    def run(layer: nn.Module) -> Callable[[], None]:
        return lambda: layer(x).square().sum().backward()

    return {"ours": run(tract(copy.deepcopy(plain))), "peer": run(torch_tract.TrAct(copy.deepcopy(plain), l=0.1))}


def targets() -> Calls:
    """Targets of a batch of 128 examples in 100 classes."""
    count, classes, alpha = 50_000, 100, 0.4
    memory = PSKDTargets(count, classes, alpha_T=alpha, max_epochs=2)
    memory.remember(torch.arange(count), torch.full((count, classes), 1 / classes))
    rows = torch.full((count, classes), 1 / classes)
    ids = torch.randperm(count, generator=stream(0, "ids"))[:128]
    labels = torch.randint(classes, (128,), generator=stream(0, "labels"))

    def published() -> None:
        hard = torch.eye(classes)[labels.cpu().numpy()]
        (1 - alpha) * hard + alpha * rows[ids]

    def ours() -> None:
        memory.soften(ids, labels, 1)

    return {"ours": ours, "peer": published}


def early_learning() -> Calls:
    """Loss and gradient of a batch of 128 examples in 100 classes, beside those of cross-entropy alone."""
    loss_of = ELRLoss(50_000, 100)
    logits = torch.randn(128, 100, generator=stream(0, "logits")).requires_grad_()
    labels = torch.randint(100, (128,), generator=stream(0, "labels"))
    index = torch.randperm(50_000, generator=stream(0, "ids"))[:128]

    def plain() -> None:
        torch.autograd.grad(functional.cross_entropy(logits, labels), logits)

    def ours() -> None:
        torch.autograd.grad(loss_of(logits, labels, index), logits)

    return {"ours": ours, "peer": plain}


def averages() -> Calls:
    """Averaged weights of a perceptron of 120 tensors."""
    net = nn.Sequential(*(nn.Linear(50, 50) for _ in range(60)))
    average = WeightAverage(net)
    kept = [param.detach().clone() for param in net.parameters()]

    @torch.no_grad()
    def loop() -> None:
        for mean, param in zip(kept, net.parameters(), strict=True):
            mean.mul_(0.997).add_(param, alpha=0.003)

    return {"ours": lambda: average.update(net, 0.997), "peer": loop}


def steps() -> Calls:
    """Steps of a small convolutional network at batch 64: without any method, and with each."""
    x = torch.randn(64, 1, 28, 28, generator=stream(0, "images"))
    y = torch.randint(10, (64,), generator=stream(0, "labels"))
    ids = torch.arange(64)

    def step(
        attach: Callable[[nn.Module], Any] | None = None,
        *,
        noisy: bool = False,
        softened: bool = False,
        held: bool = False,
        taught: bool = False,
    ) -> Any:
        with seeded(0, "init"):
            net = SmallConvNet(in_channels=1, grid=7)
        if attach is not None:
            attach(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        if noisy:
            register_gradient_noise(optimizer)
        memory = PSKDTargets(64, 10, max_epochs=2)
        elr, average = ELRLoss(64, 10), WeightAverage(net)

        def once() -> None:
            inputs, labels, rows = x, y, None
            if taught:
                rows = elr.memory.average(ids, average.predict(net, x).softmax(1), 0.7)
                both = torch.cat([functional.one_hot(y, 10).float(), rows], 1)
                inputs, both = mixup(x, both, 1.0, stream(0, "mixup"))
                labels, rows = both.chunk(2, 1)
            logits = net(inputs)
            target = memory.mixed(ids, y, 0.4) if softened else labels
            optimizer.zero_grad()
            loss = elr(logits, target, ids) if held else functional.cross_entropy(logits, target)
            if rows is not None:
                loss = loss + 3 * agreement_loss(logits, rows)
            loss.backward()
            optimizer.step()
            if taught:
                average.update(net, 0.997)
            if softened:
                memory.update(ids, logits.detach())

        return once

    return {
        "plain": step(),
        "TrAct": step(apply_tract),
        "Weight Compander": step(apply_weight_compander),
        "gradient noise": step(noisy=True),
        "PS-KD": step(softened=True),
        "ELR": step(held=True),
        PLUS: step(taught=True),
    }


def perceptron() -> Calls:
    """Steps of a perceptron 64-128-128-10 at batch 64, without noise and with it."""
    x = torch.randn(64, 64, generator=stream(0, "images"))
    y = torch.randint(10, (64,), generator=stream(0, "labels"))

    def step(*, noisy: bool) -> Callable[[], None]:
        with seeded(0, "init"):
            net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        if noisy:
            register_gradient_noise(optimizer)

        def once() -> None:
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()

        return once

    return {"plain": step(noisy=False), "gradient noise": step(noisy=True)}


def doubted_by_both() -> str:
    """Labels of the digits that ELR doubts, and those that cleanlab finds from out-of-fold predictions."""
    if importlib.util.find_spec("cleanlab") is None:
        return "cleanlab is not installed: its label issues are not compared"
    import numpy as np
    from cleanlab.filter import find_label_issues
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    from netwright.data import Batches, load, with_noisy_labels
    from netwright.train import fit
    from netwright.train.callbacks import ELRCallback

    data, changed = with_noisy_labels(load("digits"), "symmetric", 0.3)
    labels, wrong = data.train.labels, changed["train"].numpy()
    flat = data.train.images.flatten(1).numpy() / 255
    probs = cross_val_predict(LogisticRegression(max_iter=500), flat, labels.numpy(), cv=5, method="predict_proba")
    theirs = find_label_issues(labels.numpy(), probs, n_jobs=1)
    method = ELRCallback(lam=3.0)
    with seeded(0, "init"):
        net = SmallConvNet((16, 32), in_channels=1, grid=2)
    fit(net, Batches(data.train, 64, normalise=data.normalise(), indexed=True), epochs=15, callbacks=[method])
    ours = np.zeros(len(labels), bool)
    ours[list(method.doubts(labels).index)] = True
    rows = [
        [name, int(found.sum()), f"{wrong[found].mean():.3f}", f"{found[wrong].mean():.3f}"]
        for name, found in (("ELR", ours), ("cleanlab", theirs), ("both", ours & theirs))
    ]
    return table(rows, ["digits, 30 % wrong labels", "doubted", "of them wrong", "of the wrong doubted"])


# What each is beside its peer, and how many times as fast it is to be at least.
SUBJECTS: dict[str, tuple[Callable[[], Calls | None], float]] = {
    "gradient noise for 120 tensors, against a loop": (noise, 1.5),
    "Weight Compander of 10^7 weights, against the expression under autograd": (compander, 1.2),
    "TrAct, forward and backward of a first layer, against torch-tract": (first_layer, 1.3),
    "PS-KD, targets of 128 examples in 100 classes, against the published loop": (targets, 2.0),
    "ELR, loss and gradient, against cross-entropy": (early_learning, 0.5),
    "averaged weights of 120 tensors, against a loop": (averages, 3.0),
}
# How much longer than plain a step of the small convolutional network may take with each; None: nothing is aimed at.
STEPS: dict[str, float | None] = {
    "TrAct": 1.15,
    "Weight Compander": 1.05,
    "gradient noise": 1.02,
    "PS-KD": 1.03,
    "ELR": 1.03,
    PLUS: None,
}


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="three rounds; nothing is written")
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    figures: list[Figure] = []
    for name, (make, least) in SUBJECTS.items():
        what, calls = f"{name}: times as fast", make()
        if calls is None:
            figures.append(Figure(what, None, least=least, note="the peer is not installed"))
            continue
        found = compare_times(calls, rounds=rounds, threads=1)
        ours, peer = found["ours"], found["peer"]
        note = f"{ours.median_ms:.3g} ms, the peer {peer.median_ms:.3g}"
        figures.append(over(peer, what, least=least, note=note))
    for network, calls, aims in (
        ("perceptron", perceptron(), {"gradient noise": 1.1}),
        ("convolutional network", steps(), STEPS),
    ):
        found = compare_times(calls, rounds=rounds, threads=1)
        for name, most in aims.items():
            note = f"{found[name].median_ms:.3g} ms, plain {found['plain'].median_ms:.3g}"
            figures.append(
                over(found[name], f"step of a small {network} with {name}, over plain", most=most, note=note)
            )
    both = 2 * found[PLUS].median_ms / found["ELR"].median_ms
    figures.append(Figure("both networks' steps of ELR+, over one of ELR", both, note="2.7 by counting passes"))
    print(doubted_by_both())
    return record("training_methods", figures, {"threads": 1, "rounds": rounds}, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
