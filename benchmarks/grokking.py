"""What neuron diagnoses on modular arithmetic cost beside the code that one would write.

    python benchmarks/grokking.py [--rounds 10] [--p 97] [--width 500] [--counts 51] [--epochs 100]

One thread, alternating rounds, medians and quartiles of the ratio peer / ours. Peers: numpy's rfft in a loop over the
neurons' three vectors; a forward pass of a pruned copy for each count; a training step with a one-hot input, a one-hot
target and ``nn.MSELoss``. Beside them what `IPRCallback` costs at its default cadence, with the pairs and without: one
training of some epochs with it and one without, in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from netwright.console import table
from netwright.cost import compare_times
from netwright.diagnose.grokking import (
    IPRCallback,
    ModularConfig,
    ModularRegressor,
    PairBatches,
    accuracies,
    neuron_ipr,
    one_hot_mse,
    one_hot_pairs,
    prune_neurons,
    pruning_curve,
)
from netwright.train import fit

Calls = dict[str, Callable[[], Any]]


def spectra(config: ModularConfig) -> Calls:
    """The IPR of every neuron."""
    model = config.model()

    def loop() -> list[float]:
        first, second = model.fc1.weight.detach().numpy(), model.fc2.weight.detach().numpy()
        found = []
        for k in range(config.width):
            each = []
            for v in (first[k, : config.p], first[k, config.p :], second[:, k]):
                power = np.abs(np.fft.rfft(v)) ** 2
                each.append(float(((power / power.sum()) ** 2).sum()))
            found.append(sum(each) / 3)
        return found

    assert np.allclose(loop(), neuron_ipr(model).numpy(), rtol=1e-4)
    return {"ours": lambda: neuron_ipr(model), "peer": loop}


def curve(config: ModularConfig, counts: list[int]) -> Calls:
    """Accuracies after each number of pruned neurons, on all pairs."""
    model, data = config.model().eval(), config.data()
    one_hot = one_hot_pairs(data.pairs, config.p)
    order = neuron_ipr(model).argsort()

    @torch.inference_mode()
    def loop() -> list[dict[str, torch.Tensor]]:
        return [accuracies(prune_neurons(model, order[:c])(one_hot).argmax(1), data) for c in counts]

    return {"ours": lambda: pruning_curve(model, data, "low", counts), "peer": loop}


def step(config: ModularConfig) -> Calls:
    """One update with the full batch."""
    data = config.data("train")
    one_hot, targets = one_hot_pairs(data.pairs, config.p), nn.functional.one_hot(data.targets, config.p).float()

    def run(loss: Callable[[nn.Module], torch.Tensor]) -> Callable[[], None]:
        model = config.model()
        optimizer = config.optimizer(model.parameters())

        def once() -> None:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

        return once

    return {
        "ours": run(lambda model: one_hot_mse(model(data.pairs), data.targets)),
        "peer": run(lambda model: nn.functional.mse_loss(model(one_hot), targets)),
    }


def callback(config: ModularConfig, epochs: int) -> Calls:
    """A training of some epochs, alone and watched."""

    def run(*callbacks: IPRCallback) -> Callable[[], None]:
        return lambda: fit(
            ModularRegressor(config), PairBatches(config.data("train")), epochs=epochs, callbacks=list(callbacks)
        )

    return {"alone": run(), "watched": run(IPRCallback()), "watched, with pairs": run(IPRCallback(config.data()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--p", type=int, default=97)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--counts", type=int, default=51)
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    config = ModularConfig(p=args.p, width=args.width, corruption=0.35)
    counts = torch.linspace(0, args.width, args.counts).round().long().tolist()
    rows = []
    for name, calls in {
        "IPR of all neurons": spectra(config),
        f"pruning curve, {args.counts} counts": curve(config, counts),
        "training step": step(config),
    }.items():
        found = compare_times(calls, rounds=args.rounds, threads=1)
        ours, peer = found["ours"], found["peer"]
        ratio = f"{peer.ratio:.1f} [{peer.ratio_low:.1f}, {peer.ratio_high:.1f}]"
        rows.append([name, f"{ours.median_ms:.2f}", f"{peer.median_ms:.2f}", ratio])
    print(f"p = {args.p}, {args.width} neurons, one thread, {found.cpu}")
    print(table(rows, ["what", "ours, ms", "peer, ms", "ratio"]))
    print(compare_times(callback(config, args.epochs), rounds=args.rounds, threads=1))


if __name__ == "__main__":
    main()
