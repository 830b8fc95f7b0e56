"""What neuron diagnoses on modular arithmetic cost beside the code that one would write.

    python benchmarks/grokking.py [NAME ...] [--rounds 10] [--quick]

Modulus 97, 500 neurons, one thread, alternating rounds, medians and quartiles of the ratio peer / ours. `spectra`: the
IPR of all neurons, against numpy's rfft in a loop over the neurons' three vectors. `curve`: accuracies at 51 counts of
pruned neurons and at all 501, against a forward pass of a pruned copy for each count (three rounds at most of the
501). `step`: a training step, against one with a one-hot input, a one-hot target and ``nn.MSELoss``. `callback`: what
`IPRCallback` costs at its default cadence, with the pairs and without: a training of 100 epochs with it over one
without, in turns. When all have run, the figures go beside their aims to benchmarks/results/; --quick writes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

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
from support.record import Figure, over
from support.whole import recorded

Calls = dict[str, Callable[[], Any]]
SLOW_ROUNDS = 3  # of the peer with a forward pass for each of 501 counts


def config_of(quick: bool) -> ModularConfig:
    return ModularConfig(p=11 if quick else 97, width=20 if quick else 500, corruption=0.35)


def beside(calls: Calls, rounds: int, what: str, **aim: float) -> Figure:
    """The peer's time over ours."""
    found = compare_times(calls, rounds=rounds, threads=1)
    note = f"{found['ours'].median_ms:.3g} ms, the peer {found['peer'].median_ms:.3g}"
    return over(found["peer"], f"{what}, times as long", note=note, **aim)


def spectra(rounds: int, quick: bool) -> list[Figure]:
    config = config_of(quick)
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
    calls: Calls = {"ours": lambda: neuron_ipr(model), "peer": loop}
    return [beside(calls, rounds, f"IPR of {config.width} neurons: a loop over them", least=50)]


def curve(rounds: int, quick: bool) -> list[Figure]:
    config = config_of(quick)
    model, data = config.model().eval(), config.data()
    one_hot = one_hot_pairs(data.pairs, config.p)
    order = neuron_ipr(model).argsort()

    figures = []
    for count in (5, config.width + 1) if quick else (51, config.width + 1):
        counts = torch.linspace(0, config.width, count).round().long().tolist()

        @torch.inference_mode()
        def loop(counts: list[int] = counts) -> torch.Tensor:
            each = [accuracies(prune_neurons(model, order[:c])(one_hot).argmax(1), data)["test"] for c in counts]
            return torch.stack([torch.as_tensor(value) for value in each])

        def ours(counts: list[int] = counts) -> torch.Tensor:
            return pruning_curve(model, data, "low", counts)["test"]

        if count <= 51:  # float32 sums in another order: an example between two classes may change sides
            assert (loop().double() - ours().double()).abs().max() < 0.01
        own = rounds if count <= 51 else min(rounds, SLOW_ROUNDS)
        what = f"pruning curve, {count} counts: a forward pass for each"
        figures.append(beside({"ours": ours, "peer": loop}, own, what, least=20))
    return figures


def step(rounds: int, quick: bool) -> list[Figure]:
    config = config_of(quick)
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

    calls: Calls = {
        "ours": run(lambda model: one_hot_mse(model(data.pairs), data.targets)),
        "peer": run(lambda model: nn.functional.mse_loss(model(one_hot), targets)),
    }
    return [beside(calls, rounds, "a training step: one-hot inputs and targets")]


def callback(rounds: int, quick: bool) -> list[Figure]:
    config = config_of(quick)

    def run(*callbacks: IPRCallback) -> Callable[[], object]:
        return lambda: fit(
            ModularRegressor(config),
            PairBatches(config.data("train")),
            epochs=3 if quick else 100,
            callbacks=list(callbacks),
        )

    watched = {"IPRCallback": IPRCallback(), "IPRCallback, with pairs": IPRCallback(config.data())}
    calls: Calls = {"plain": run(), **{name: run(one) for name, one in watched.items()}}
    print(found := compare_times(calls, rounds=rounds, threads=1))
    return [over(found[name], f"a training with {name}, over plain", most=1.15) for name in watched]


if __name__ == "__main__":
    subjects = {"spectra": spectra, "curve": curve, "step": step, "callback": callback}
    sys.exit(recorded("grokking", __doc__ or "", subjects, rounds=10))
