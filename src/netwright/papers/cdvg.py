"""Does a translator between classes change the bias and keep the signal, and do its views make a classifier unbiased?

Jung, Shim, Yang and Yang, "Fighting Fire with Fire: Contrastive Debiasing without Bias-free Data via Generative
Bias-transformation", ICML 2023, arXiv:2112.01021. No code of it is public; the coefficients of its second stage are
this library's reading.

MNIST-5000, 3,600 training images of 28 x 28, coloured: in each class 100 %, 99.5 % or 98 % wear the colour of the
class, the others any other one; in the test part colours are uniform, so that its accuracy is the unbiased one. One
translator a share (width 16, one down-sampling, two residual blocks, 2,400 steps of the critic at batch 16), judged by
the nearest colour and by a classifier of grey digits. Arms, with one convolutional network, Adam, batch 64 and 8
epochs: plain training (ERM); LfF; translated views without contrast; CDvG. Learning rates and the weight of the
contrast are chosen by accuracy on the biased validation part at 99.5 % after 4 epochs, with a seed of their own. At 100
% also: CDvG with noise on its views, which covers what the translator hides in them; and two that know the bias, as
ceilings: ERM on images in random colours, and CDvG whose translator is the exact recolouring. As a control, plain
training and CDvG where colours tell nothing of the class; at 98 % no views without contrast. Seeds differ in
initialisation, order and views; all share images and translator. Not tested: BFFHQ, Corrupted CIFAR-10, 128 x 128.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright.papers import classification
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from netwright.data import BiasedDataset

CARD = Paper(
    slug="cdvg",
    title="Fighting Fire with Fire: Contrastive Debiasing without Bias-free Data via Generative Bias-transformation",
    authors=("Yeonsung Jung", "Hajin Shim", "June Yong Yang", "Eunho Yang"),
    year=2023,
    venue="International Conference on Machine Learning",
    kind="inproceedings",
    arxiv="2112.01021",
    summary=(
        "An image translator between the classes of a biased data set changes the bias and keeps the rest; a "
        "classifier that has to answer alike for such views of an image no longer goes by the bias."
    ),
    method="netwright.train.debias:CDvG",
    covers=(
        "netwright.train.debias.translator:BiasTranslator",
        "netwright.train.callbacks.debias:CDvGCallback",
    ),
    claims=(
        Claim("translation", "Translated, at least 60 % have the target's colour and 60 % their own shape."),
        Claim("gain", "At 100 % and 99.5 % bias CDvG is right 10 points more often than plain training."),
        Claim("scarce", "With no image against the bias CDvG is right more often than LfF."),
        Claim("control", "Where colours tell nothing they are not transferred, and CDvG does not beat plain training."),
        Claim("contrast", "At 100 % the contrast adds to translated views.", gated=False),
        Claim("malignancy", "Its lead over LfF is larger at 100 % than at 98 %.", gated=False),
    ),
    metric="unbiased",
    seeds=3,
    fast_seeds=1,
)

SHARES = {"100 %": 1.0, "99.5 %": 0.995, "98 %": 0.98, "no bias": 0.1}
RATES, CONTRASTS = (3e-4, 1e-3, 3e-3), (0.1, 0.5, 1.0)
TUNED_AT, WORST = "99.5 %", "100 %"
ARMS = {"98 %": ("ERM", "LfF", "CDvG"), "no bias": ("ERM", "CDvG")}  # all of them elsewhere
NOISES = (0.2, 0.4)
CLASSES, BATCH, TEMPERATURE, CHANCE = 10, 64, 0.1, 0.1


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    absent = decide(None, reason="it was not run")

    def unbiased(share: str, arm: str) -> list[Any]:
        return arms[f"{share}, {arm}"]["unbiased"]

    def ran(share: str) -> bool:
        return f"{share}, CDvG" in arms

    biased = [share for share in (WORST, TUNED_AT) if ran(share)]
    found = {
        "translation": all_of(*(_translates(arms[f"{share}, translator"]) for share in biased)),
        "gain": all_of(
            *(compare(unbiased(share, "CDvG"), unbiased(share, "ERM"), margin=0.1, errors=2) for share in biased)
        ),
        "scarce": compare(unbiased(WORST, "CDvG"), unbiased(WORST, "LfF"), errors=2),
        "contrast": compare(unbiased(WORST, "CDvG"), unbiased(WORST, "views")),
    }
    if TUNED_AT not in biased:
        found |= {"translation": absent, "gain": absent}
    found["control"] = found["malignancy"] = absent
    if ran("no bias"):
        transfer = mean(arms["no bias, translator"]["bias transfer"])
        better = compare(unbiased("no bias", "CDvG"), unbiased("no bias", "ERM"), errors=2)
        told = f"colours of targets {transfer:.3g}, chance {CHANCE:g}, claimed < {2 * CHANCE:g}; CDvG over ERM: "
        passed = transfer < 2 * CHANCE and better.verdict != "supported"
        found["control"] = decide(passed if better.interval else None, transfer, told + better.reason)
    if ran("98 %"):
        leads = [
            [ours - theirs for ours, theirs in zip(unbiased(share, "CDvG"), unbiased(share, "LfF"), strict=True)]
            for share in (WORST, "98 %")
        ]
        found["malignancy"] = compare(*leads)
    return found


def _translates(arm: dict[str, list[Any]]) -> Verdict:
    transfer, kept = (min(arm[name]) for name in ("bias transfer", "signal kept"))
    told = f"target's colour {transfer:.3g}, own shape {kept:.3g}, claimed >= 0.6 for both"
    return decide(transfer >= 0.6 and kept >= 0.6, min(transfer, kept), told)


def reproduce(run: Run) -> Evidence:
    """Trains a translator for each share, chooses what is to be chosen on biased validation images, trains the arms."""
    images = [
        run.size("training images", full=3600, fast=300, scaled=False),
        run.size("validation images", full=400, fast=100, scaled=False),
        run.size("test images", full=1000, fast=200, scaled=False),
    ]
    side = run.size("pixels a side", full=28, fast=16, specified=32, scaled=False)
    steps = run.size("steps of the translator", full=2400, fast=20, specified=3000)
    epochs = run.size("epochs", full=8, fast=1)
    trial = run.size("epochs of a trial", full=4, fast=1)
    shares = {WORST: SHARES[WORST]} if run.fast else SHARES
    files = {share: str(run.out.resolve() / f"views-{ratio:g}.safetensors") for share, ratio in shares.items()}
    common = {share: [ratio, side, images, steps, files[share]] for share, ratio in shares.items()}
    arms = run.arms({f"{share}, translator": common[share] for share in shares}, _translate, seeds=[0])
    chosen: dict[str, list[float]] = {}
    tuned = common[TUNED_AT if TUNED_AT in common else WORST]
    for arm in ("ERM", "LfF", "views", "CDvG"):
        trials = {lr: [*tuned, arm, lr, CONTRASTS[-1], 0.0, trial, True] for lr in RATES}
        lr, tried = best(run, f"{arm}, lr", trials, _train)
        arms |= tried
        chosen[arm] = [lr, CONTRASTS[-1], 0.0]
    lr = chosen["CDvG"][0]
    trials = {weight: [*tuned, "CDvG", lr, weight, 0.0, trial, True] for weight in CONTRASTS}
    chosen["CDvG"][1], tried = best(run, "CDvG, contrast", trials, _train)
    arms |= tried
    wanted = {
        f"{share}, {arm}": [*common[share], arm, *chosen[arm], epochs, False]
        for share in shares
        for arm in ARMS.get(share, tuple(chosen))
    }
    if not run.fast:
        for noise in NOISES:
            setting = [*chosen["CDvG"][:2], noise]
            wanted[f"{WORST}, CDvG, noise {noise:g}"] = [*common[WORST], "CDvG", *setting, epochs, False]
        known = {"random colours": chosen["ERM"], "CDvG, exact": chosen["CDvG"]}
        wanted |= {f"{WORST}, {arm}": [*common[WORST], arm, *known[arm], epochs, False] for arm in known}
    arms |= run.arms(wanted, _train)
    return run.evidence(arms, judge(arms))


def parts(ratio: float, side: int, images: Sequence[int]) -> dict[str, BiasedDataset]:
    """Training and validation part of one share, test part with uniform colours; 14 x 14 in a frame for 16 pixels."""
    return _parts(ratio, side, tuple(images))


@functools.lru_cache(maxsize=2)
def _parts(ratio: float, side: int, images: tuple[int, ...]) -> dict[str, BiasedDataset]:
    from torch.nn import functional

    from netwright.data.biased import colored_mnist
    from netwright.seeding import stream

    found, _ = classification.parts("mnist-5000", 0, *images)
    made = {}
    for name, part in found.items():
        grey = part.images
        if side < grey.shape[-1]:
            grey = functional.pad(functional.avg_pool2d(grey.float(), 2).round().byte(), (1, 1, 1, 1))
        share = 1 / CLASSES if name == "test" else ratio
        made[name] = colored_mnist(grey, part.labels, share, generator=stream(0, "colours", name))
    return made


def _translate(seed: int, ratio: float, side: int, images: Sequence[int], steps: int, file: str) -> dict[str, Any]:
    """Trains a translator, keeps all its views in a file, and measures what it changes on 500 training images."""
    import torch

    from netwright import storage
    from netwright.data import Batches, TensorImages
    from netwright.data.biased import nearest_color
    from netwright.seeding import seeded, stream
    from netwright.train import Classifier, fit
    from netwright.train.debias import BiasTranslator, ViewCache, signed_range, translation_rates

    data = parts(ratio, side, images)["train"]
    small = {"width": 8, "n_res": 1} if steps < 100 else {}
    with seeded(seed, "translator"):
        translator = BiasTranslator.sized(CLASSES, data.shape, n_critic=2, lr=4e-4, seed=seed, **small)
    signed = signed_range(3)
    each = min(steps, 200)
    batches = Batches(data, 16, seed=seed, normalise=signed, steps=each, name="translator")
    history = fit(translator, batches, epochs=-(-steps // each), seed=seed)
    cache = ViewCache(data, translator)
    storage.write_tensors(file, {"views": cache.views})
    grey = TensorImages(data.images.amax(1, keepdim=True), data.labels)
    with seeded(seed, "judge"):
        judge_of_shape = _features(1, side).append(torch.nn.Linear(576, CLASSES))
    gray_range = signed_range(1)
    fit(
        Classifier(judge_of_shape),
        Batches(grey, BATCH, seed=seed, normalise=gray_range, name="judge"),
        epochs=min(5, max(1, steps // 100)),
        optimizer=lambda params: torch.optim.Adam(params, 1e-3),
        seed=seed,
    )
    rows = torch.arange(min(500, len(data)))
    y = data.labels[rows]
    targets = (y + torch.randint(1, CLASSES, y.shape, generator=stream(seed, "targets"))) % CLASSES
    made = cache.pick(rows, targets)
    with torch.inference_mode():
        shape = judge_of_shape.eval()(gray_range(made.amax(1, keepdim=True))).argmax(1)
    last = history.last
    return {
        **translation_rates(nearest_color(made), shape, y, targets),
        "reconstruction": last["generator_reconstruction"],
        "seconds a step": history.seconds / (each * len(history.epochs)),
    }


def _features(channels: int, side: int) -> nn.Sequential:
    """Three convolutions, 576 features."""
    from netwright.nn.convnet import SmallConvNet

    return SmallConvNet((16, 32, 64), hidden=0, in_channels=channels, grid=3).features


class _Recolouring:
    """The translator that knows: an image in the colour of another class."""

    num_classes = CLASSES

    def __init__(self, shape: tuple[int, int, int]):
        self.shape = shape

    def translate(self, x: Tensor, y_target: Tensor) -> Tensor:
        import torch

        from netwright.data.biased import PALETTE, recolored
        from netwright.train.debias import signed_range
        from netwright.train.debias.views import as_bytes

        return signed_range(3)(recolored(as_bytes(x), torch.tensor(PALETTE)[y_target]))


class _Kept:
    """All views of a translator, read from its file."""

    classes = CLASSES

    def __init__(self, file: str):
        from netwright import storage

        self.views: Tensor = storage.read_tensors(file)["views"]

    def __len__(self) -> int:
        return len(self.views)

    def pick(self, index: Tensor, targets: Tensor) -> Tensor:
        return self.views[index, targets]


def _random_colours(images: Tensor, generator: Generator) -> Tensor:
    """Images in [0, 1] in colours drawn anew, each with a full channel: who does this knows the bias."""
    import torch

    colours = torch.rand(len(images), 3, generator=generator)
    return images.amax(1, keepdim=True) * (colours / colours.amax(1, keepdim=True))[:, :, None, None]


def _module(
    seed: int, arm: str, data: BiasedDataset, setting: Sequence[float], views: tuple[Any, Any] | None
) -> nn.Module:
    """What is trained; every arm starts with the same features."""
    from torch import nn

    from netwright.seeding import derive, seeded
    from netwright.train import Classifier
    from netwright.train.debias import CDvG, LfF

    _, weight, noise = setting
    side = data.shape[1]
    with seeded(seed, "init"):
        features = _features(3, side)
        if views is not None:
            translator, cache = views
            return CDvG(
                features, CLASSES, translator, weight, TEMPERATURE, cache=cache, view_noise=noise,
                seed=derive(seed, "views"),
            )  # fmt: skip
        network = nn.Sequential(features, nn.Linear(576, CLASSES))
    if arm == "LfF":
        with seeded(seed, "biased"):
            return LfF(network, nn.Sequential(_features(3, side), nn.Linear(576, CLASSES)), num_examples=len(data))
    return Classifier(network, clip=None)


def _train(
    seed: int,
    ratio: float,
    side: int,
    images: Sequence[int],
    steps: int,
    file: str,
    arm: str,
    lr: float,
    weight: float,
    noise: float,
    epochs: int,
    tuning: bool,
) -> dict[str, Any]:
    """One arm: accuracies by bias on the test part, or accuracy on the biased validation part."""
    import torch

    from netwright.data import Batches
    from netwright.train import evaluate, fit
    from netwright.train.debias import ViewCache, bias_metrics, signed_range

    found = parts(ratio, side, images)
    data, signed = found["train"], signed_range(3)
    views: tuple[Any, Any] | None = None
    if arm == "CDvG, exact":
        exact = _Recolouring(data.shape)
        views = exact, ViewCache(data, exact)
    elif arm in ("views", "CDvG"):
        if not Path(file).exists():  # on another machine, or deleted
            _translate(0, ratio, side, images, steps, file)
        views = _Recolouring(data.shape), _Kept(file)
    module = _module(seed, arm, data, (lr, 0.0 if arm == "views" else weight, noise), views)
    history = fit(
        module,
        Batches(
            data, BATCH, seed=seed, normalise=signed, indexed=True,
            augment=_random_colours if arm == "random colours" else None,
        ),
        epochs=epochs,
        optimizer=lambda params: torch.optim.Adam(params, lr),
        seed=seed,
    )  # fmt: skip
    part = found["validation" if tuning else "test"]
    pred = evaluate(module, Batches(part, 500, shuffle=False, drop_last=False, normalise=signed))[0].argmax(1)
    if tuning:
        return {"validation accuracy": float((pred == part.labels).double().mean())}
    return {
        **bias_metrics(pred, part.labels, part.bias),
        "training loss": history.last["train_loss"],
        "learning rate": lr,
        "weight of the contrast": weight,
        "seconds an epoch": history.seconds / epochs,
    }
