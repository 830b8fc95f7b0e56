"""What watching for opposing signals costs a training, and sharpness against a peer.

    python benchmarks/opposing_signals.py [NAME ...] [--rounds 5] [--quick]

`callback`: a training of a convolutional network with 84,000 parameters with and without `OpposingSignalCallback` at
its default cadence, in turns. `full-batch`: full-batch descent with and without a tracker that takes over its losses.
`sharpness`: the largest eigenvalue of the Hessian of 1,000 examples, cold, and warm after a step of descent, against
the package ``pyhessian`` (cold each time, at the same tolerance) and the power iteration that it makes. One thread.
When all have run, the figures go beside their aims to benchmarks/results/; --quick writes nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import torch
from torch import nn

from netwright.cost import compare_times
from netwright.diagnose import OpposingSignalCallback, OpposingSignalTracker, full_batch_descent, sharpness
from netwright.nn.curvature import hessian_products
from netwright.seeding import seeded, stream
from support.record import Figure, over
from support.whole import recorded

LOSS = nn.CrossEntropyLoss(reduction="none")
TOLERANCE = 1e-3


def network() -> nn.Module:
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(32 * 49, 50), nn.ReLU(), nn.Linear(50, 10),
        )  # fmt: skip


def perceptron() -> nn.Module:
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10)
        )


def data(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright row that tells the class, so that something is learned."""
    images, labels = torch.rand(count, 1, 28, 28, generator=stream(0, "x")), torch.arange(count) % 10
    images[torch.arange(count), 0, 2 * labels] += 1
    return images, labels


def callback(rounds: int, quick: bool) -> list[Figure]:
    from netwright.data import Batches, TensorImages
    from netwright.train import Classifier, fit

    images, labels = data(500 if quick else 2750)
    train = TensorImages((images * 127).byte(), labels)
    probe = images[:250], labels[:250]

    def run(with_it: bool) -> None:
        callbacks = [OpposingSignalCallback(probe)] if with_it else []
        # 275 steps, which is from the start of a burst to the next
        epochs = 1 if quick else 5
        fit(Classifier(network(), lr=0.01), Batches(train, 50), epochs=epochs, callbacks=callbacks)

    calls = {"plain": lambda: run(False), "with OpposingSignalCallback": lambda: run(True)}
    print(found := compare_times(calls, rounds=rounds, threads=1))
    return [over(found["with OpposingSignalCallback"], "a training with OpposingSignalCallback, over plain", most=1.15)]


def full_batch(rounds: int, quick: bool) -> list[Figure]:
    x, y = data(100 if quick else 2000)
    steps = 3 if quick else 50

    def run(with_it: bool) -> None:
        net = perceptron()
        tracker = OpposingSignalTracker(net, LOSS, (x, y)) if with_it else None
        full_batch_descent(net, LOSS, (x, y), torch.optim.SGD(net.parameters(), 0.1), steps, tracker=tracker)

    calls = {"plain": lambda: run(False), "with a tracker": lambda: run(True)}
    print(found := compare_times(calls, rounds=rounds, threads=1))
    return [over(found["with a tracker"], "full-batch descent with a tracker, over plain", most=1.03)]


def power_iteration(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """As pyhessian does it: from a random direction until the eigenvalue changes by less than the tolerance."""
    params = list(net.parameters())
    product = hessian_products(LOSS(net(x), y).mean(), params)
    draws = stream(0, "power")
    vector = [torch.randn(p.shape, generator=draws) for p in params]
    value = None
    for _ in range(100):
        length = sum(part.square().sum() for part in vector).sqrt()
        vector = [part / length for part in vector]
        image = product(vector)
        found = float(sum((a * b).sum() for a, b in zip(image, vector, strict=True)))
        if value is not None and abs(found - value) / (abs(value) + 1e-6) < TOLERANCE:
            return found
        vector, value = image, found
    return found


def by_pyhessian(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    from pyhessian import hessian

    found = hessian(net, nn.CrossEntropyLoss(), data=(x, y), cuda=False).eigenvalues(maxIter=100, tol=TOLERANCE)
    return float(found[0][0])


def sharpest(rounds: int, quick: bool) -> list[Figure]:
    x, y = data(50 if quick else 1000)
    net = perceptron().eval()
    full_batch_descent(net, LOSS, (x, y), torch.optim.SGD(net.parameters(), 0.1), 5 if quick else 50)
    _, last = sharpness(net, LOSS, (x, y), tolerance=TOLERANCE)
    full_batch_descent(net, LOSS, (x, y), torch.optim.SGD(net.parameters(), 0.1), 1)
    calls: dict[str, Callable[[], float]] = {
        "warm": lambda: sharpness(net, LOSS, (x, y), v0=last, tolerance=TOLERANCE)[0],
        "cold": lambda: sharpness(net, LOSS, (x, y), tolerance=TOLERANCE)[0],
        "power iteration": lambda: power_iteration(net, x, y),
    }
    installed = importlib.util.find_spec("pyhessian") is not None
    if installed:
        calls["pyhessian"] = lambda: by_pyhessian(net, x, y)
    values = {name: call() for name, call in calls.items()}
    print(found := compare_times(calls, rounds=rounds, threads=1))
    figures = [
        over(
            found[name],
            f"sharpness, {name}, over a warm start",
            least=3 if name == "pyhessian" else None,
            note=f"{found[name].median_ms:.3g} ms, warm {found['warm'].median_ms:.3g}; "
            f"eigenvalues {values[name]:.5g} and {values['warm']:.5g}",
        )
        for name in calls
        if name != "warm"
    ]
    if not installed:
        figures.append(Figure("sharpness, pyhessian, over a warm start", None, least=3, note="not installed"))
    return figures


if __name__ == "__main__":
    subjects = {"callback": callback, "full-batch": full_batch, "sharpness": sharpest}
    sys.exit(recorded("opposing_signals", __doc__, subjects, rounds=5))
