"""What watching for opposing signals costs a training, and sharpness against a peer.

    python benchmarks/opposing_signals.py [NAME ...] [--rounds 5]

`callback`: a training of a convolutional network with 84,000 parameters with and without `OpposingSignalCallback` at
its default cadence, in turns. `full-batch`: full-batch descent with and without a tracker that takes over its losses.
`sharpness`: the largest eigenvalue of the Hessian of 1,000 examples, cold, and warm after a step of descent, against
pyhessian (cold each time, at the same tolerance) where it is installed, else against the same power iteration in its
place.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from netwright.cost import compare_times
from netwright.diagnose import OpposingSignalCallback, OpposingSignalTracker, full_batch_descent, sharpness
from netwright.nn.curvature import hessian_products
from netwright.seeding import seeded, stream

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


def callback(rounds: int) -> None:
    from netwright.data import Batches, TensorImages
    from netwright.train import Classifier, fit

    images, labels = data(2750)
    train = TensorImages((images * 127).byte(), labels)
    probe = images[:250], labels[:250]

    def run(with_it: bool) -> None:
        callbacks = [OpposingSignalCallback(probe)] if with_it else []
        # 275 steps, which is from the start of a burst to the next
        fit(Classifier(network(), lr=0.01), Batches(train, 50), epochs=5, callbacks=callbacks)

    print(compare_times({"plain": lambda: run(False), "with OpposingSignalCallback": lambda: run(True)}, rounds=rounds))


def full_batch(rounds: int) -> None:
    x, y = data(2000)

    def run(with_it: bool) -> None:
        net = perceptron()
        tracker = OpposingSignalTracker(net, LOSS, (x, y)) if with_it else None
        full_batch_descent(net, LOSS, (x, y), torch.optim.SGD(net.parameters(), 0.1), 50, tracker=tracker)

    print(compare_times({"plain": lambda: run(False), "with a tracker": lambda: run(True)}, rounds=rounds))


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


def peer(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[str, float]:
    try:
        from pyhessian import hessian
    except ImportError:
        return "power iteration, as pyhessian", power_iteration(net, x, y)
    found = hessian(net, nn.CrossEntropyLoss(), data=(x, y), cuda=False).eigenvalues(maxIter=100, tol=TOLERANCE)
    return "pyhessian", found[0][0]


def sharpest(rounds: int) -> None:
    x, y = data(1000)
    net = perceptron().eval()
    full_batch_descent(net, LOSS, (x, y), torch.optim.SGD(net.parameters(), 0.1), 50)
    _, last = sharpness(net, LOSS, (x, y), tolerance=TOLERANCE)
    full_batch_descent(net, LOSS, (x, y), torch.optim.SGD(net.parameters(), 0.1), 1)
    name, theirs = peer(net, x, y)
    cold, _ = sharpness(net, LOSS, (x, y), tolerance=TOLERANCE)
    warm, _ = sharpness(net, LOSS, (x, y), v0=last, tolerance=TOLERANCE)
    print(f"sharpness: {name} {theirs:.5g}, cold {cold:.5g}, warm {warm:.5g}")
    calls = {
        "warm": lambda: sharpness(net, LOSS, (x, y), v0=last, tolerance=TOLERANCE),
        "cold": lambda: sharpness(net, LOSS, (x, y), tolerance=TOLERANCE),
        name: lambda: peer(net, x, y),
    }
    print(compare_times(calls, rounds=rounds))


NAMES = {"callback": callback, "full-batch": full_batch, "sharpness": sharpest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"NAME must be one of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    for name in options.names or NAMES:
        print(f"== {name}")
        NAMES[name](options.rounds)


if __name__ == "__main__":
    main()
