"""Does training with transformations that a generator has learned from unlabelled images withstand natural variation?

Wang, Lyu, Nepal, Rudolph, Grobler and Moore, "Robust Training Using Natural Transformation", 2021, arXiv:2105.04070.
Only the abstract was at hand; formulas, constants and schedules are this library's reading.

Fashion-MNIST under a rendered nuisance: light from a side, contrast, slant, thickness. A pool of unlabelled images
varies widely in it; 1,000 labelled images lie in a narrow range; test images in the wide one, and in the narrow one.
That is the paper's premise: the generator has seen natural variation, the labels have not. No pretrained generator is
at hand, so a small one is trained on the pool as an auto-encoder. Arms with the same classifier, initialisation, steps
and grid of three learning rates: plain training (ERM); crops, flips, brightness and contrast (by 0.4 or 0.8); mixup
(alpha 0.4 or 1); adversarial training (PGD, 0.05 or 0.1, five steps); directions at random of the same spread, one
transformation and the worst of eight, as a control for "any generated image helps"; NaTra with one random
transformation and with the worst of eight; and the true rendering over the wide range, an oracle that no method has.
Generated steps reach to 2 standard deviations, as published, or to 5: along one direction of a small generator two
change an image far less than the wide rendering does. Learning rate and strength of each arm are chosen on held-out
images of the narrow range, with a seed of their own. Not tested: faces, StyleGAN, hair style. The small generator
limits the gain.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import TUNING_SEED

if TYPE_CHECKING:
    from torch import Tensor, nn

    from netwright.data import Normalise, TensorImages
    from netwright.train.natra import NaturalTransform, Prepared, StyleAutoEncoder
    from netwright.train.natra.search import Search

CARD = Paper(
    slug="natra",
    title="Robust Training Using Natural Transformation",
    authors=(
        "Shuo Wang",
        "Lingjuan Lyu",
        "Surya Nepal",
        "Carsten Rudolph",
        "Marthie Grobler",
        "Kristen Moore",
    ),
    year=2021,
    arxiv="2105.04070",
    summary=(
        "A classifier is trained on images whose codes in a generator have been moved along directions that are found "
        "without labels and leave the class alone: light, contrast, pose."
    ),
    method="netwright.train.natra.transform:NaturalTransform",
    covers=(
        "netwright.train.callbacks.natural_transform:NaTraTraining",
        "netwright.train.natra.inversion:BatchInverter",
        "netwright.train.natra.directions:filter_directions",
    ),
    claims=(
        Claim("gain", "Under wide variation it is right three points more often than ERM, mixup and PGD training."),
        Claim("control", "It is more accurate there than with random directions, whether one or the worst of eight."),
        Claim("narrow", "It loses at most a point within the narrow range."),
        Claim("codes", "Four codes reconstruct with at most 0.85 of one code's squared error."),
        Claim("directions", "A direction that is kept follows a rendered number with a correlation of at least 0.6."),
        Claim("jitter", "It loses at most a point to brightness, contrast, crops and flips.", gated=False),
        Claim("search", "The worst of eight is more accurate there than one at random.", gated=False),
    ),
    metric="accuracy",
    seeds=3,
    fast_seeds=1,
)

OURS, RANDOM = "NaTra, worst of 8", "NaTra, random"
NOISE, NOISE_WORST = "random directions", "random directions, worst of 8"
PLAIN = ("ERM", "jitter", "mixup", "PGD", "oracle")
GENERATED = (OURS, RANDOM, NOISE, NOISE_WORST)
RATES = (0.02, 0.05, 0.1)
# How far brightness and contrast change, alpha, the attack's radius, the largest step in standard deviations.
STRENGTHS: dict[str, tuple[float, ...]] = {"jitter": (0.4, 0.8), "mixup": (0.4, 1.0), "PGD": (0.05, 0.1)}
STRENGTHS |= dict.fromkeys(GENERATED, (2.0, 5.0))
BATCH, ATTACK_STEPS = 64, 5
UNFILTERED = {"max_flip": 1.0, "min_change": 0.0, "candidates": 3}
CODES = 200  # images whose codes are compared


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    ours = arms[OURS]["accuracy"]
    gaps = [compare(ours, arms[name]["accuracy"], margin=0.03, errors=2) for name in ("ERM", "mixup", "PGD")]
    four, one = (mean(arms["generator"][f"error of {name}"]) for name in ("four codes", "one code"))
    largest = mean(arms["generator"]["correlation"])
    return {
        "gain": all_of(*gaps),
        "control": all_of(*(compare(ours, arms[name]["accuracy"]) for name in (NOISE, NOISE_WORST))),
        "narrow": compare(arms[OURS]["narrow accuracy"], arms["ERM"]["narrow accuracy"], margin=-0.01),
        "codes": decide(
            four / one <= 0.85, four / one, "squared error of four codes over that of one, claimed <= 0.85"
        ),
        "directions": decide(largest >= 0.6, largest, "largest |correlation| of a kept direction, claimed >= 0.6"),
        "jitter": compare(ours, arms["jitter"]["accuracy"], margin=-0.01),
        "search": compare(ours, arms[RANDOM]["accuracy"]),
    }


def reproduce(run: Run) -> Evidence:
    """Tunes every arm on held-out images of the narrow range, then trains it for every seed."""
    sizes = [
        run.size("labelled images", full=1000, fast=128),
        run.size("validation images", full=500, fast=50, scaled=False),
        run.size("unlabelled images", full=10_000, fast=256),
        run.size("test images", full=2000, fast=100, scaled=False),
        run.size("epochs of the generator", full=5, fast=1),
        run.size("steps of the inversion", full=30, fast=2),
        run.size("epochs", full=30, fast=1),
        int(run.fast),
    ]
    groups = {"plain": PLAIN, "generated": GENERATED}
    settings = {
        name: [(lr, strength) for strength in STRENGTHS.get(name, (0.0,)) for lr in RATES]
        for names in groups.values()
        for name in names
    }
    chosen = {name: each[1] for name, each in settings.items()}  # the middle rate, the lesser strength
    tried: Arms = {}
    if not run.fast:
        trials = {
            f"tuning: {group}": [[[name, *each] for name in names for each in settings[name]], sizes, True]
            for group, names in groups.items()
        }
        found = run.arms(trials, _trial, seeds=[TUNING_SEED])
        for group, names in groups.items():
            held = found[f"tuning: {group}"]
            for name in names:
                tried[f"tuning: {name}"] = {_told(*each): held[f"{name}: {_told(*each)}"] for each in settings[name]}
                chosen[name] = max(settings[name], key=lambda each: (held[f"{name}: {_told(*each)}"][0], each))
    wanted = {group: [[[name, *chosen[name]] for name in names], sizes, False] for group, names in groups.items()}
    figures = run.arms(wanted, _trial)
    arms = {name: arm for group in groups for name, arm in _by_arm(figures[group]).items()}
    return run.evidence(arms | tried, judge(arms))


def _told(lr: float, strength: float) -> str:
    """A setting by name."""
    return f"lr {lr:g}" + (f", strength {strength:g}" if strength else "")


def _by_arm(figures: dict[str, list[Any]]) -> Arms:
    """Figures called "arm: figure" as arms."""
    arms: Arms = {}
    for name, values in figures.items():
        arm, _, figure = name.partition(": ")
        arms.setdefault(arm, {})[figure] = values
    return arms


def _trial(seed: int, wanted: Sequence[Sequence[Any]], sizes: Sequence[int], tuning: bool) -> dict[str, Any]:
    """Trains the wanted arms, each a name, a learning rate and a strength; figures are called "arm: figure"."""
    labelled, held_out, pool, test, generator_epochs, inversion, epochs, small = sizes
    data = _parts(seed, labelled, held_out, pool, test, bool(small))
    steps = sorted({strength for name, _, strength in wanted if name in GENERATED})
    grids: dict[tuple[str, float], Any] = {}
    figures: dict[str, Any] = {}
    if steps:
        grids, found = _grids(seed, data, generator_epochs, inversion, steps, bool(small), not tuning)
        figures |= {f"generator: {name}": value for name, value in found.items()}
    for name, lr, strength in wanted:
        network = _train(seed, name, lr, strength, data, grids.get((name, strength)), epochs)
        if tuning:
            figures[f"{name}: {_told(lr, strength)}"] = _measured(network, data, "validation")["accuracy"]
            continue
        wide = _measured(network, data, "wide")
        figures |= {f"{name}: {figure}": value for figure, value in wide.items()}
        figures[f"{name}: narrow accuracy"] = _measured(network, data, "narrow")["accuracy"]
        figures[f"{name}: corrupted accuracy"] = _corrupted(network, data)
        figures[f"{name}: learning rate"] = lr
        if strength:
            figures[f"{name}: strength"] = strength
    return figures


@functools.lru_cache(maxsize=1)
def _parts(seed: int, labelled: int, held_out: int, pool: int, test: int, small: bool) -> dict[str, Any]:
    """Parts under their nuisance by name, the pool's numbers, the clean training part, and the standardisation."""
    import torch

    from netwright.data import Normalise, subset
    from netwright.data.nuisance import NARROW, WIDE, with_nuisance
    from netwright.data.tensors import scaled
    from netwright.papers import classification, small_images

    if small:
        found, _ = small_images.parts(seed, labelled + pool, held_out, test)
    else:
        found, _ = classification.parts("fashion-mnist", seed, labelled + pool, held_out, test)
    chosen = subset(found["train"], labelled, seed=seed)
    other = torch.ones(len(found["train"]), dtype=torch.bool)
    other[chosen] = False
    clean = found["train"].subset(chosen)
    rest = found["train"].subset(other.nonzero().flatten())
    train, _ = with_nuisance(clean, NARROW, seed, name="train")
    unlabelled, numbers = with_nuisance(rest, WIDE, seed, name="pool")
    pixels = scaled(train.images)
    return {
        "clean": clean,
        "train": train,
        "pool": unlabelled,
        "numbers": numbers,
        "validation": with_nuisance(found["validation"], NARROW, seed, name="validation")[0],
        "wide": with_nuisance(found["test"], WIDE, seed, name="wide")[0],
        "narrow": with_nuisance(found["test"], NARROW, seed, name="narrow")[0],
        "normalise": Normalise((float(pixels.mean()),), (float(pixels.std()),)),
    }


def _grids(
    seed: int, data: dict[str, Any], epochs: int, inversion: int, steps: Sequence[float], fast: bool, compared: bool
) -> tuple[dict[tuple[str, float], Any], dict[str, Any]]:
    """The transformed images of each arm that has them, by its largest step, and figures of the generator."""
    import dataclasses

    import torch

    from netwright.data.tensors import scaled
    from netwright.seeding import stream
    from netwright.train.natra import (
        NaturalTransform,
        Recipe,
        fit_style_autoencoder,
        prepared_from,
        reference_classifier,
    )

    train: TensorImages = data["train"]
    network, history = fit_style_autoencoder(data["pool"].images, epochs=epochs, seed=seed)
    reference = reference_classifier(train.images, train.labels, epochs=1 if fast else 20, seed=seed)
    # After one epoch of a fast run the generator draws nothing yet that a rule could keep.
    recipe = Recipe(inversion_steps=inversion, **(UNFILTERED if fast else {}))  # type: ignore[arg-type]
    prepared = prepared_from(network, reference, train.images, train.labels, recipe=recipe, seed=seed)
    transform = prepared.transform
    kept = transform.directions
    vectors = torch.linalg.qr(torch.randn(kept.vectors.T.shape, generator=stream(seed, "noise"))).Q.T.contiguous()
    noise = NaturalTransform(
        network.generator, transform.codes, dataclasses.replace(kept, vectors=vectors), scaled(train.images)
    )
    grids: dict[tuple[str, float], Any] = {}
    for step in steps:
        grids |= dict.fromkeys([(OURS, step), (RANDOM, step)], transform.grid(step))
        grids |= dict.fromkeys([(NOISE, step), (NOISE_WORST, step)], noise.grid(step))
    figures: dict[str, Any] = {
        "loss": history.last["train_loss"],
        "directions": len(kept),
        "reconstruction": prepared.reconstruction,
        "reference accuracy": prepared.reference,
        "identity": _identity(transform),
    }
    if compared:
        figures |= _correlation(network, prepared, data) | _codes(network, train, inversion, seed)
    return grids, figures


def _identity(transform: NaturalTransform) -> bool:
    """Whether a step of 0 leaves every bit of an image."""
    import torch

    index = torch.arange(min(64, len(transform)))
    assert transform.images is not None
    still = transform(index, torch.zeros(len(index), transform.num_directions))
    return torch.equal(still, transform.images[index])


def _correlation(network: StyleAutoEncoder, prepared: Prepared, data: dict[str, Any]) -> dict[str, Any]:
    """The largest correlation of the codes along a kept direction with a number of the rendering."""
    import torch

    from netwright.data.tensors import scaled

    images, numbers = data["pool"].images[:2000], data["numbers"][:2000]
    with torch.no_grad():
        codes = torch.cat([network.encode(scaled(part))[:, 0] for part in images.split(500)])
    along = codes @ prepared.transform.directions.vectors.T
    angle, strength, contrast, slant, thickness = numbers.unbind(1)
    rendered = {
        "light to the right": strength * angle.cos(), "light upwards": strength * angle.sin(),
        "contrast": contrast, "slant": slant, "thickness": thickness,
    }  # fmt: skip
    both = torch.cat([along, torch.stack(list(rendered.values()), 1)], 1)
    table = torch.corrcoef(both.T)[: along.shape[1], along.shape[1] :].abs().nan_to_num()
    best = table.max(0).values
    found = {f"correlation with {name}": float(value) for name, value in zip(rendered, best, strict=True)}
    return {"correlation": float(best.max()), **found}


def _codes(network: StyleAutoEncoder, train: TensorImages, steps: int, seed: int) -> dict[str, float]:
    """Squared error of a pixel with one code and with four, after as many steps."""
    from netwright.data.tensors import scaled
    from netwright.train.natra import BatchInverter

    x = scaled(train.images[:CODES])
    found = {}
    for name, count in (("one code", 1), ("four codes", 4)):
        inverter = BatchInverter(network.generator, network.encode, steps=steps, num_codes=count, seed=seed)
        made = inverter.invert(x).decode(network.generator)
        found[f"error of {name}"] = float((made - x).square().mean())
    return found


def _train(seed: int, name: str, lr: float, strength: float, data: dict[str, Any], grid: Any, epochs: int) -> nn.Module:
    from netwright.data import Batches
    from netwright.data.augment import Compose, HorizontalFlip, Jitter, RandomCrop
    from netwright.data.nuisance import WIDE, render
    from netwright.nn.convnet import SmallConvNet
    from netwright.seeding import seeded
    from netwright.train import fit
    from netwright.train.callbacks import NaTraTraining
    from netwright.train.schedules import CosineProgress

    part, normalise = data["clean" if name == "oracle" else "train"], data["normalise"]
    with seeded(seed, "init"):
        network = SmallConvNet(in_channels=1, grid=4)
    augment: Any = None
    if name == "jitter":
        augment = Compose([RandomCrop(2), HorizontalFlip(), Jitter(strength, strength)])
    elif name == "oracle":
        augment = lambda images, generator: render(images, WIDE.draw(len(images), generator))  # noqa: E731
    methods = []
    if name in GENERATED:
        search: Search = "random" if name in (RANDOM, NOISE) else "worst_of_k"
        methods = [NaTraTraining(grid, search, eps_max=strength, normalise=normalise, seed=seed)]
    batches = Batches(part, BATCH, seed=seed, normalise=normalise, augment=augment, indexed=bool(methods))
    module = _module(name)(network, normalise, seed, lr, strength)
    fit(module, batches, epochs=epochs, callbacks=[*methods, CosineProgress()], seed=seed)
    return network


@functools.cache
def _module(name: str) -> Any:
    """The class that trains an arm's network."""
    import torch

    from netwright.data.augment import mixup
    from netwright.seeding import stream
    from netwright.train import Classifier
    from netwright.train.attacks import input_gradient

    class Arm(Classifier):
        def __init__(self, network: nn.Module, normalise: Normalise, seed: int, lr: float, strength: float):
            super().__init__(network, lr=lr)
            self.normalise, self.seed, self.strength = normalise, seed, strength

        def changed(self, x: Tensor, labels: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
            return x, labels

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(self.changed(batch[0], batch[1], batch_idx), batch_idx)

    class Mixed(Arm):
        def changed(self, x: Tensor, labels: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
            rows = torch.nn.functional.one_hot(labels, 10).float()
            return mixup(x, rows, self.strength, stream(self.seed, "mixup", self.current_epoch, batch_idx))

    class Attacked(Arm):
        def changed(self, x: Tensor, labels: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
            mean, std = (float(value) for value in (self.normalise.mean, self.normalise.std))
            black, white, reach = -mean / std, (1 - mean) / std, self.strength / std
            draws = torch.rand(x.shape, generator=stream(self.seed, "attack", self.current_epoch, batch_idx))
            worst = (x + reach * (2 * draws - 1)).clamp(black, white)
            for _ in range(ATTACK_STEPS):
                worst = worst + reach / 2 * input_gradient(self.network, worst, labels).sign()
                worst = torch.minimum(torch.maximum(worst, x - reach), x + reach).clamp(black, white)
            return worst, labels

    return {"mixup": Mixed, "PGD": Attacked}.get(name, Arm)


def _measured(network: nn.Module, data: dict[str, Any], part: str) -> dict[str, float]:
    from netwright.papers import classification

    found = classification.measured(network, ({part: data[part]}, data["normalise"]), part)
    return {name: found[name] for name in ("accuracy", "NLL", "ECE")}


def _corrupted(network: nn.Module, data: dict[str, Any]) -> float:
    """Mean accuracy under common corruptions of narrow images, which no arm was trained for."""
    from torch import nn

    from netwright.data import Batches
    from netwright.train.natra import common_corruptions, distortion_report

    batches = Batches(data["narrow"], 500, shuffle=False, drop_last=False)
    report = distortion_report(nn.Sequential(data["normalise"], network), common_corruptions(), batches)
    return mean([value for name, value in report.items() if name != "clean"])
