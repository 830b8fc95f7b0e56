"""Are weights of two and four bits good weights, if they are trained with a teacher, or if their levels are?

Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv:1802.05668.

Fashion-MNIST: a teacher of 0.8 million weights and a student of 40,000. All networks are trained by Adam along a
cosine, with the same batches; every student starts from the same weights. Differentiable quantization starts from the
distilled student, and its learning rate is chosen on the validation part. Rounding afterwards has buckets and has none,
with levels from the least to the largest weight of a bucket as in the paper; a third rival, not the paper's, places
their ends for the least squared error. The size is that of the packed file, beside the formula of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from netwright.papers import classification
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, mean, paired_difference
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

if TYPE_CHECKING:
    import torch
    from torch import nn

    from netwright.data import Batches

CARD = Paper(
    slug="distill-quantize",
    title="Model compression via distillation and quantization",
    authors=("Antonio Polino", "Razvan Pascanu", "Dan Alistarh"),
    year=2018,
    venue="International Conference on Learning Representations",
    kind="inproceedings",
    arxiv="1802.05668",
    summary=(
        "A small student computes with weights of a few bits while a teacher trains the full weights behind them; or "
        "the weights of a trained student stay, and gradient descent moves the levels they are rounded to."
    ),
    method="netwright.compress.quantize:quantized_distillation",
    covers=(
        "netwright.compress.quantize",
        "netwright.compress.distill",
        "netwright.compress.callbacks.distillation",
    ),
    claims=(
        Claim("trained", "At 2 bits quantised distillation is 10 points or more better than rounding afterwards."),
        Claim("points", "At 2 bits learned levels are better than rounding afterwards."),
        Claim("order", "At 2 bits quantised distillation is no worse than learned levels."),
        Claim("four-bits", "At 4 bits both are within a point of the distilled student in full precision."),
        Claim("ends", "At 2 bits quantised distillation beats rounding between ends of least error.", gated=False),
        Claim("buckets", "Rounding in buckets of 256 is better than with one scale, at 2 bits.", gated=False),
        Claim("teacher", "At 2 bits training with the teacher beats training on the labels.", gated=False),
        Claim("student", "The distilled student beats the one that is trained on the labels.", gated=False),
        Claim("size", "But for their header, packed files are as small as the formula says, within 1 %.", gated=False),
    ),
    metric="accuracy",
    seeds=3,
)

BITS = (2, 4)
ROUNDED = (1, 2, 3, 4)
POINT_RATES = (1e-4, 3e-4, 1e-3)
BATCH, BUCKET = 64, 256
LR = 1e-3


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""

    def figures(name: str) -> list[Any]:
        return arms[name]["accuracy"]

    two = {kind: f"{kind}, 2 bits" for kind in ("rounded in buckets", "rounded", "distilled", "learned", "labels")}
    trained, rounded, learned = (figures(two[k]) for k in ("distilled", "rounded in buckets", "learned"))
    gain = paired_difference(trained, rounded)
    found = {
        "trained": all_of(
            decide(gain.mean >= 0.1, gain.mean, f"{gain.mean:.4g}, claimed 0.1 or more"),
            compare(trained, rounded, errors=2),
        ),
        "points": compare(learned, rounded, errors=2),
    }
    gap = paired_difference(trained, learned)
    error = gap.standard_error
    held = None if math.isnan(error) else gap.mean >= -error
    found["order"] = decide(held, gap.mean, f"{gap.mean:.4g}, claimed at least minus a standard error of {error:.4g}")
    found["four-bits"] = decide(None, reason="4 bits were not run")
    if "distilled, 4 bits" in arms:
        reference = figures("student, distilled")
        four = {k: mean(figures(f"{k}, 4 bits")) - mean(reference) for k in ("distilled", "learned")}
        told = ", ".join(f"{kind} {value:+.4f}" for kind, value in four.items())
        found["four-bits"] = decide(min(four.values()) >= -0.01, min(four.values()), f"{told}; claimed above -0.01")
    found["ends"] = compare(trained, figures("rounded, least error, 2 bits"))
    found["buckets"] = compare(rounded, figures(two["rounded"]))
    found["teacher"] = compare(trained, figures(two["labels"]))
    found["student"] = compare(figures("student, distilled"), figures("student, labels"))
    sizes = {
        bits: tuple(arms[f"distilled, {bits} bits"][name][0] for name in ("bytes", "header bytes", "formula bytes"))
        for bits in BITS
        if f"distilled, {bits} bits" in arms
    }
    off = max(abs((whole - header) / formula - 1) for whole, header, formula in sizes.values())
    told = ", ".join(f"{a:.0f} - {b:.0f} bytes for {c:.0f} at {bits} bits" for bits, (a, b, c) in sizes.items())
    found["size"] = decide(off <= 0.01, off, told)
    return found


def reproduce(run: Run) -> Evidence:
    """Trains the teacher and every student for each seed."""
    images = [
        run.size("training images", full=12_000, fast=1200),
        run.size("validation images", full=2000, fast=200),
        run.size("test images", full=10_000, fast=359, scaled=False),
    ]
    epochs = [
        run.size("teacher epochs", full=8, fast=12),
        run.size("student epochs", full=6, fast=12),
        run.size("epochs of learned levels", full=2, fast=4),
    ]
    bits = list(BITS[:1] if run.fast else BITS)
    rounded = bits if run.fast else list(ROUNDED)
    rates = list(POINT_RATES[2:] if run.fast else POINT_RATES)
    data = "digits" if run.fast else "fashion-mnist"
    found = run.arms({"all": [data, images, epochs, bits, rounded, rates]}, _everything)["all"]
    arms: Arms = {}
    for name, values in found.items():
        arm, _, metric = name.partition(": ")
        arms.setdefault(arm, {})[metric] = values
    return run.evidence(arms, judge(arms))


def _everything(
    seed: int,
    data: str,
    images: list[int],
    epochs: list[int],
    bits: list[int],
    rounded: list[int],
    rates: list[float],
) -> dict[str, Any]:
    """All arms of one seed, which share teacher, distilled student and batches: ``"arm: figure"`` to its value."""
    from netwright.compress.distill import distill
    from netwright.compress.quantize import (
        differentiable_quantization,
        post_training_quantize,
        quantized_distillation,
    )
    from netwright.train import Classifier, fit
    from netwright.train.schedules import CosineProgress

    bench = _Bench(seed, data, images)
    figures: dict[str, Any] = {}

    def labelled(network: nn.Module, number: int, callbacks: Iterable[Any] = ()) -> nn.Module:
        schedule = [*callbacks, CosineProgress()]
        fit(Classifier(network), bench.batches(), epochs=number, optimizer=_adam(LR), callbacks=schedule, seed=seed)
        return network

    def keep(arm: str, network: nn.Module, **more: float) -> None:
        figures[f"{arm}: accuracy"] = bench.accuracy(network, "test")
        figures.update({f"{arm}: {name}": value for name, value in more.items()})

    teacher = labelled(bench.network("teacher"), epochs[0]).eval()
    keep("teacher", teacher, parameters=_count(teacher))
    keep("student, labels", labelled(bench.network("student"), epochs[1]))
    student = bench.network("student")
    distill(student, teacher, bench.batches(), epochs=epochs[1], optimizer=_adam(LR), seed=seed)
    keep("student, distilled", student.eval(), parameters=_count(student))
    for number in rounded:
        keep(f"rounded, {number} bits", post_training_quantize(student, number, None))
        keep(f"rounded in buckets, {number} bits", post_training_quantize(student, number, BUCKET))
        keep(f"rounded, least error, {number} bits", post_training_quantize(student, number, BUCKET, ranges="mse"))
    for number in bits:
        trained = quantized_distillation(
            bench.network("student"),
            teacher,
            bench.batches(),
            bits=number,
            bucket_size=BUCKET,
            epochs=epochs[1],
            optimizer=_adam(LR),
            seed=seed,
        )
        keep(f"distilled, {number} bits", trained, **_sizes(trained))
        keep(f"labels, {number} bits", labelled(_rounding(bench.network("student"), number), epochs[1]))
        learned = {
            lr: differentiable_quantization(
                student,
                bench.batches(),
                bits=number,
                bucket_size=BUCKET,
                epochs=epochs[2],
                optimizer=_adam(lr),
                seed=seed,
            )
            for lr in rates
        }
        best = max(rates, key=lambda lr: bench.accuracy(learned[lr], "validation"))
        keep(f"learned, {number} bits", learned[best], **{"learning rate": best}, **_sizes(learned[best]))
    return figures


def _rounding(network: nn.Module, bits: int) -> nn.Module:
    from netwright.compress.quantize import post_training_quantize

    return post_training_quantize(network, bits, BUCKET).train()


def _adam(lr: float) -> Callable[[Iterable[Any]], torch.optim.Optimizer]:
    import torch

    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _sizes(network: nn.Module) -> dict[str, float]:
    """Bytes of the packed file without its header, and those of the formula."""
    from netwright.compress.quantize import compressed_size, pack

    blob = pack(network)
    header = 8 + int.from_bytes(blob[:8], "little")
    formula = compressed_size(network, huffman=False)
    coded = compressed_size(network)
    return {
        "bytes": len(blob),
        "header bytes": header,
        "formula bytes": formula.bits / 8,
        "ratio": formula.full_bits / 8 / len(blob),
        "ratio with Huffman codes": coded.ratio,
    }


class _Bench:
    """The data and the networks of one seed."""

    def __init__(self, seed: int, data: str, images: list[int]):
        self.seed, self.data, self.images = seed, data, tuple(images)

    def batches(self) -> Batches:
        """Training batches, in the same order whenever they are asked for."""
        return classification.batches(self.data, self.seed, self.images, BATCH)

    def accuracy(self, network: nn.Module, part: str) -> float:
        """Share of right answers."""
        found = classification.parts(self.data, self.seed, *self.images)
        return classification.measured(network, found, part)["accuracy"]

    def network(self, name: str) -> nn.Module:
        """A teacher or a student, untrained, the same every time."""
        from torch import nn
        from torchvision.ops import MLP

        from netwright.nn.convnet import SmallConvNet
        from netwright.seeding import seeded

        with seeded(self.seed, "init", name):
            if self.data == "digits":
                return nn.Sequential(nn.Flatten(), MLP(64, [256, 256, 10] if name == "teacher" else [64, 64, 10]))
            channels, hidden = ((32, 64), 256) if name == "teacher" else ((8, 16), 48)
            return SmallConvNet(channels, hidden, 10, 1, grid=7)
