"""What the training methods cost, beside the code that one would write or install instead.

    python benchmarks/training_methods.py [--rounds 20]

One thread, alternating rounds, medians and quartiles of the ratio peer / ours. Peers: a Python loop with
``torch.randn_like`` for each parameter; ``a * torch.atan(v / b)`` under autograd; the package ``torch-tract`` (left out
when it is not installed); rows of ``torch.eye`` found through numpy, as the published loop of PS-KD has it; plain
cross-entropy, beside ELR's loss (aim: at most 2 times as long; it reads and writes a row of the memory an example, and
looks at indices, labels and logits, where cross-entropy is one kernel); a Python loop over parameters, beside averaged
weights (aim: at least 3 times as fast); and where ``cleanlab`` is installed, how far ELR's doubted labels and its
agree. Beside them the step of a small convolutional network at batch 64 with each method over that without any.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
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
from support.aims import judged

Calls = dict[str, Callable[[], Any]]
LEAST = {"ELR, beside cross-entropy": 0.5, "averaged weights": 3.0}  # times as fast as its peer


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
    memory = PSKDTargets(count, classes, max_epochs=2)
    memory.remember(torch.arange(count), torch.full((count, classes), 1 / classes))
    rows = torch.full((count, classes), 1 / classes)
    ids = torch.randperm(count, generator=stream(0, "ids"))[:128]
    labels = torch.randint(classes, (128,), generator=stream(0, "labels"))

    def published() -> None:
        hard = torch.eye(classes)[labels.cpu().numpy()]
        (1 - alpha) * hard + alpha * rows[ids]

    def ours() -> None:
        memory.mixed(ids, labels, alpha)

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
        "ELR+, one of its two networks": step(taught=True),
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    rows: list[list[Any]] = []
    subjects = {"gradient noise": noise, "Weight Compander": compander, "TrAct": first_layer, "PS-KD": targets}
    subjects |= {"ELR, beside cross-entropy": early_learning, "averaged weights": averages}
    for name, make in subjects.items():
        calls = make()
        if calls is None:
            rows.append([name, "not installed", "", "", "", ""])
            continue
        found = compare_times(calls, rounds=rounds, threads=1)
        ours, peer = found["ours"], found["peer"]
        spread = f"{peer.ratio_low:.2f}..{peer.ratio_high:.2f}"
        aim = judged(peer.ratio, least=LEAST[name]) if name in LEAST else ""
        rows.append([name, f"{ours.median_ms:.3f}", f"{peer.median_ms:.3f}", f"{peer.ratio:.2f}", spread, aim])
    print(table(rows, ["method", "ours, ms", "peer, ms", "times as fast", "quartiles", "aim"]))
    print()
    found = compare_times(steps(), rounds=rounds, threads=1)
    rows = [[t.name, f"{t.median_ms:.2f}", f"{t.ratio:.3f}"] for t in found.timings]
    print(table(rows, ["step of a small network", "ms", "over plain"]))
    print()
    print(doubted_by_both())


if __name__ == "__main__":
    main()
