"""What CDvG costs: views kept or made afresh, an epoch beside one of plain training, a step of the translator.

    python benchmarks/cdvg.py [NAME...] [--rounds 5] [--quick]

One thread, alternating rounds, medians and quartiles of the ratio peer / ours.

``views``: two views of each of 4,000 coloured pictures of 32 x 32 in ten classes, in batches of 64: picked out of a
``ViewCache`` of 123 MB, or translated batch by batch as a direct implementation has it. Making the cache is told apart.
``epoch``: the second stage over 4,000 pictures with a small convolutional network, without batch norm (two views a
picture) and with it, beside an epoch of plain training of the same network (aim: at most 2.2 times as long), and with
views made afresh (aim: kept ones at least 3 times as fast). With batch norm a third image, the picture itself, passes
forward beside two views, so that statistics know it; ``real_images=False`` leaves it out.
``step``: two steps of the translator's critic with the gradient penalty on the whole batch, on half of it, and in every
second step. The figures of all three go to benchmarks/results/; --quick takes small sizes and writes nothing. Exit 1
if an aim is missed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from netwright.cost import Comparison, compare_times, threads
from netwright.data.biased import BiasedDataset, colored_mnist
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded, stream
from netwright.train.debias import BiasTranslator, CDvG, TwoViews, ViewCache, signed_range
from support.record import Figure, over
from support.whole import recorded

BATCH, CLASSES = 64, 10


def pictures(count: int) -> BiasedDataset:
    draws = stream(0, "pictures")
    grey = torch.randint(0, 256, (count, 32, 32), dtype=torch.uint8, generator=draws)
    return colored_mnist(grey, torch.arange(count) % CLASSES, 1.0)


def translator(**options: Any) -> BiasTranslator:
    with seeded(0, "init"):
        return BiasTranslator.sized(CLASSES, (3, 32, 32), n_critic=2, lr=4e-4, **options)


def told(calls: dict[str, Callable[[], Any]], rounds: int) -> Comparison:
    found = compare_times(calls, rounds=rounds, threads=1)
    print(found)
    return found


def views(rounds: int, quick: bool) -> list[Figure]:
    """Two views of every picture, kept and afresh."""
    data, net = pictures(128 if quick else 4000), translator()
    start = time.perf_counter()
    with threads(1):
        cache = ViewCache(data, net)
    took = time.perf_counter() - start
    kept, fresh = TwoViews(None, cache=cache), TwoViews(net)

    def epoch(views: TwoViews) -> Callable[[], None]:
        def once() -> None:
            for number, rows in enumerate(torch.arange(len(data)).split(BATCH)):
                views(data.images[rows].float() / 255, rows, stream(0, "views", number))

        return once

    found = told({"kept": epoch(kept), "afresh": epoch(fresh)}, rounds)
    return [
        Figure(f"seconds for all {CLASSES} views of {len(data)} pictures, once", took),
        over(found["afresh"], "two views of every picture made afresh, over kept ones"),
    ]


def network(norm: bool) -> nn.Module:
    with seeded(0, "init"):
        features = SmallConvNet((16, 32, 64), hidden=0, grid=4).features
    return features if norm else nn.Sequential(*(part for part in features if not isinstance(part, nn.BatchNorm2d)))


def epoch(rounds: int, quick: bool) -> list[Figure]:
    """An epoch of the second stage beside plain training."""
    data, net, signed = pictures(128 if quick else 4000), translator(), signed_range(3)
    cache = ViewCache(data, net)

    def stage(norm: bool, cached: bool, real: bool = True) -> Callable[[], None]:
        module = CDvG(network(norm), CLASSES, net, cache=cache if cached else None, features=1024, real_images=real)
        optimizer = module.configure_optimizers()

        def once() -> None:
            for number, rows in enumerate(torch.arange(len(data)).split(BATCH)):
                found = module.losses(signed(data.images[rows]), data.labels[rows], rows, stream(0, "views", number))
                optimizer.zero_grad()
                (found["cross-entropy"] + found["contrast"]).backward()
                optimizer.step()

        return once

    def plain(norm: bool) -> Callable[[], None]:
        module = nn.Sequential(network(norm), nn.Linear(1024, CLASSES)).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(module.parameters(), 1e-3)

        def once() -> None:
            for rows in torch.arange(len(data)).split(BATCH):
                x = signed(data.images[rows]).contiguous(memory_format=torch.channels_last)
                loss = functional.cross_entropy(module(x), data.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return once

    figures = []
    for norm in (False, True):
        what = "with batch norm" if norm else "without batch norm"
        arms = {"plain": plain(norm), "CDvG, kept": stage(norm, True), "CDvG, afresh": stage(norm, False)}
        if norm:
            arms["CDvG, kept, no real images"] = stage(norm, True, real=False)
        found = told(arms, rounds)
        kept, fresh = found["CDvG, kept"], found["CDvG, afresh"]
        figures += [
            over(kept, f"an epoch {what}, over plain training", most=2.2),
            Figure(f"an epoch {what}: views made afresh, over kept ones", fresh.median_ms / kept.median_ms, least=3),
        ]
        if norm:
            figures.append(
                over(found[list(arms)[-1]], f"an epoch {what}, no real images, over plain training", most=2.2)
            )
    return figures


def step(rounds: int, quick: bool) -> list[Figure]:
    """Two steps of the critic, penalised in three ways."""
    data, signed = pictures(16), signed_range(3)
    x, y = signed(data.images).contiguous(memory_format=torch.channels_last), data.labels

    def steps(**options: Any) -> Callable[[], None]:
        net = translator(**options)
        _, optimizer = net.configure_optimizers()

        def once() -> None:
            for number in range(2):
                penalised = number % net.penalty_every == 0
                terms = net.critic_losses(x, y, y.roll(1), stream(0, "step"), penalised)
                optimizer.zero_grad()
                (terms["source"] + terms["classes"] + 10 * net.penalty_every * terms["penalty"]).backward()
                optimizer.step()

        return once

    arms = {"whole batch": steps(), "half of it": steps(penalty_share=0.5), "every second step": steps(penalty_every=2)}
    found = told(arms, rounds)
    return [
        over(found[arm], f"two steps of the critic, penalty on {arm}, over whole batches") for arm in list(arms)[1:]
    ]


if __name__ == "__main__":
    sys.exit(recorded("cdvg", __doc__ or "", {"views": views, "epoch": epoch, "step": step}, rounds=5))
