"""Does a discrete key-value bottleneck learn one class after the other without forgetting, behind a frozen encoder?

Träuble et al., "Discrete Key-Value Bottleneck", ICML 2023, arXiv:2207.11240.

MNIST-5000 as a stream: ten classes of 400 images, one at a time, no replay, batch 32, tested on 1,000 images. Two
frozen encoders of 64 numbers that saw Fashion-MNIST alone, 10,000 images of it: a small convolutional network trained
to tell by how many quarter turns an image was rotated, and principal components. Embeddings are standardised by the
statistics of Fashion-MNIST, to which the keys are fitted too. Every arm sees the same batches, once for 5 passes over
each class and once for 100, and has five learning rates to choose from, and up to three more while the best is at an
end of them, by its accuracy after a stream of another order, on 800 of the training images that the other 3,200 were
trained without.

Arms: a linear head, a perceptron with 128 hidden units and one with as many trained parameters as the bottleneck, all
under SGD; the bottleneck with 64 codebooks of 256 pairs and keys of 8 numbers; with keys fitted to unlabelled images of
the stream; with values trained by Adam; with fewer codebooks and pairs; with long keys; the nearest class mean; and
heads trained on all classes at once, as ceilings. Seeds change the order of classes, the encoder, keys and heads; the
test images are always the same. Not tested: CIFAR-10 with large pretrained encoders.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best_inside

if TYPE_CHECKING:
    from torch import Tensor, nn

    from netwright.data import TensorImages

CARD = Paper(
    slug="kv-bottleneck",
    title="Discrete Key-Value Bottleneck",
    authors=(
        "Frederik Träuble",
        "Anirudh Goyal",
        "Nasim Rahaman",
        "Michael Curtis Mozer",
        "Kenji Kawaguchi",
        "Yoshua Bengio",
        "Bernhard Schölkopf",
    ),
    year=2023,
    venue="International Conference on Machine Learning",
    kind="inproceedings",
    arxiv="2207.11240",
    summary=(
        "The embedding of a frozen encoder is snapped to the nearest of many fixed keys, each with a value of its own. "
        "Only fetched values are trained, so that new classes change the model where their data lie and nowhere else."
    ),
    method="netwright.nn.kv_bottleneck:KeyValueBottleneck",
    covers=("netwright.train.kv_bottleneck:KeyInitCallback",),
    claims=(
        Claim("ahead", "After a stream it is 30 points above a perceptron and 10 above a linear head."),
        Claim("retained", "After a stream it has at least 0.95 of the accuracy of training on all classes at once."),
        Claim("forgetting", "It forgets at most a third of what a linear head forgets."),
        Claim("size", "It is the more accurate the more codebooks and the more pairs it has."),
        Claim(
            "own keys",
            "With keys fitted to the stream, unlabelled, it is ahead, retains and forgets so, too.",
            gated=False,
        ),
        Claim("brief", "After 5 passes over each class, too, it is 30 and 10 points ahead.", gated=False),
        Claim("wide", "It is ahead of a perceptron with as many trained parameters.", gated=False),
        Claim("locality", "Adam, which moves values that were not fetched, makes it forget more.", gated=False),
        Claim("long keys", "Keys of 64 numbers make it less accurate than keys of 8.", gated=False),
        Claim("means", "It is ahead of the nearest class mean.", gated=False),
    ),
    metric="accuracy",
    seeds=5,
    fast_seeds=1,
)

ENCODERS = ("CNN", "PCA")
MAIN: dict[str, Any] = {"codebooks": 64, "pairs": 256, "key_dim": 8, "keys": "pretraining", "optimizer": "SGD"}
SMALL = MAIN | {"codebooks": 16, "pairs": 64}
SIZES = [(c, k) for c in (8, 64) for k in (32, 256)]
# Down to where heads that share their weights hardly learn: in a long stream they forget the least there.
RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
SHARES = (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0)  # learning rates of values for each codebook
MORE = 3  # rates that are added at an end while the best one lies there
BATCH = 32
DIM = {"mnist-5000": 64, "digits": 16}
ROTATIONS = 4
OWN_KEYS = "DKVB with keys of the stream"


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    encoders = [e for e in ENCODERS if f"{e}, DKVB, long" in arms]

    def each(rule: Any, *names: str) -> Verdict:
        whole = [e for e in encoders if all(f"{e}, {name}" in arms for name in names)]
        if not whole:
            return decide(None, reason=f"{' or '.join(names)} was not run")
        return all_of(*(_named(e, rule(*(arms[f"{e}, {name}"] for name in names))) for e in whole))

    def above(margin: float) -> Any:
        return lambda a, b: compare(a["accuracy"], b["accuracy"], margin=margin)

    def ahead(ours: str, length: str) -> Verdict:
        ours = f"{ours}, {length}"
        return all_of(each(above(0.3), ours, f"MLP, {length}"), each(above(0.1), ours, f"linear, {length}"))

    def retained(ours: str) -> Verdict:
        def rule(a: Any, b: Any) -> Verdict:
            return compare(a["accuracy"], [0.95 * v for v in b["accuracy"]])

        return each(rule, f"{ours}, long", f"{ours}, i.i.d., long")

    def forgetting(ours: str) -> Verdict:
        def rule(a: Any, b: Any) -> Verdict:
            return compare(a["forgetting"], [v / 3 for v in b["forgetting"]], direction="less")

        return each(rule, f"{ours}, long", "linear, long")

    sizes = [((8, k), (64, k)) for k in (32, 256)] + [((c, 32), (c, 256)) for c in (8, 64)]
    return {
        "ahead": ahead("DKVB", "long"),
        "retained": retained("DKVB"),
        "forgetting": forgetting("DKVB"),
        "size": all_of(*(each(above(0.0), _sized(*more), _sized(*fewer)) for fewer, more in sizes)),
        "own keys": all_of(retained(OWN_KEYS), ahead(OWN_KEYS, "long"), forgetting(OWN_KEYS)),
        "brief": ahead("DKVB", "brief"),
        "wide": each(above(0.0), "DKVB, long", "wide MLP, long"),
        "locality": each(
            lambda a, b: compare(a["forgetting"], b["forgetting"], direction="less"), "DKVB, long", "DKVB by Adam, long"
        ),
        "long keys": each(above(0.0), _sized(64, 256), "DKVB with long keys, brief"),
        "means": each(above(0.0), "DKVB, long", "nearest class mean"),
    }


def _named(encoder: str, verdict: Verdict) -> Verdict:
    return dataclasses.replace(verdict, reason=f"{encoder}: {verdict.reason}")


def _sized(codebooks: int, pairs: int) -> str:
    return "DKVB, brief" if (codebooks, pairs) == SIZES[-1] else f"DKVB {codebooks} x {pairs}, brief"


def reproduce(run: Run) -> Evidence:
    """Chooses each arm's learning rate on a stream of another order, then runs every arm for every seed."""
    data = "digits" if run.fast else "mnist-5000"
    images = [
        run.size("images for the encoder and the keys", full=10_000, fast=898),
        run.size("images of the stream", full=4000, fast=700, scaled=False),
        run.size("test images", full=1000, fast=199, scaled=False),
    ]
    passes = {
        "brief": run.size("passes over a class, brief", full=5, fast=2),
        "long": run.size("passes over a class, long", full=100, fast=2),
    }
    arms: Arms = {}
    for encoder in ENCODERS[1 if run.fast else 0 :]:
        setting = [data, encoder, images]
        heads = _few_heads() if run.fast else _heads()
        chosen: dict[str, list[Any]] = {f"{encoder}, nearest class mean": [*setting, "means", {}, 0.0, 0, False]}
        rates: dict[str, float] = {}
        for name, head in heads.items():
            # Sizes, and keys of another kind, go by the rate of the bottleneck itself.
            base = ", ".join(["DKVB", *name.split(", ")[1:]]) if name in _followers() else name
            epochs = passes[name.split(", ")[-1]]
            way = "all at once" if "i.i.d." in name else "stream"
            if base not in rates:
                grid = SHARES if head.get("optimizer") == "SGD" else RATES
                trial = functools.partial(_trial, setting, way, head, epochs)
                rates[base], _, tried = best_inside(run, f"{encoder}, {base}", grid, trial, _trained, more=MORE)
                arms |= tried
            chosen[f"{encoder}, {name}"] = [*setting, way, head, rates[base], epochs, False]
        arms |= run.arms(chosen, _trained)
    return run.evidence(arms, judge(arms))


def _trial(setting: list[Any], way: str, head: dict[str, Any], epochs: int, rate: float) -> list[Any]:
    """The arguments of a trial of a learning rate."""
    return [*setting, way, head, rate, epochs, True]


def _heads() -> dict[str, dict[str, Any]]:
    """Every arm but the nearest class mean, by name; what a name ends with is the length of training."""
    wide = 64 * 256 * 10 // (DIM["mnist-5000"] + 11)  # hidden units for as many trained parameters
    found: dict[str, dict[str, Any]] = {}
    for length in ("brief", "long"):
        found |= {f"linear, {length}": {}, f"MLP, {length}": {"hidden": 128}, f"DKVB, {length}": MAIN}
    found |= {
        "wide MLP, long": {"hidden": wide},
        "DKVB by Adam, long": MAIN | {"optimizer": "Adam"},
        "linear, i.i.d., long": {},
        "MLP, i.i.d., long": {"hidden": 128},
        "DKVB, i.i.d., long": MAIN,
    }
    return found | _followers()


def _few_heads() -> dict[str, dict[str, Any]]:
    return {"linear, long": {}, "MLP, long": {"hidden": 128}, "DKVB, long": SMALL, "DKVB, i.i.d., long": SMALL}


def _followers() -> dict[str, dict[str, Any]]:
    sizes = {_sized(c, k): MAIN | {"codebooks": c, "pairs": k} for c, k in SIZES[:-1]}
    keys = {f"{OWN_KEYS}, {way}": MAIN | {"keys": "stream"} for way in ("long", "i.i.d., long")}
    return sizes | keys | {"DKVB with long keys, brief": MAIN | {"key_dim": 64}}


def _trained(
    seed: int,
    data: str,
    encoder: str,
    images: Sequence[int],
    way: str,
    head: dict[str, Any],
    rate: float,
    epochs: int,
    tuning: bool,
) -> dict[str, float]:
    """One head behind one encoder, trained on a stream or on all classes at once; its figures on the held-out part."""
    import torch

    from netwright.data.streams import class_incremental_stream, continual_metrics
    from netwright.seeding import seeded, stream

    parts = _parts(data, seed, tuple(images), tuning)
    z = _embedded(data, encoder, seed, tuple(images), tuning)
    labels, unseen = parts["stream"].labels, parts["held out"].labels
    if way == "means":
        means = torch.stack([z["stream"][labels == c].mean(0) for c in range(10)])
        answers = torch.cdist(z["held out"], means).argmin(1)
        return {"accuracy": float((answers == unseen).float().mean())}
    figures: dict[str, float] = {"learning rate": rate}
    inputs = z
    if "codebooks" in head:
        plain = head["optimizer"] == "SGD"
        sizes = (head["codebooks"], head["pairs"], head["key_dim"])
        inputs, figures["perplexity"] = _codes(data, encoder, seed, tuple(images), tuning, sizes, head["keys"])
        model = _values(head["codebooks"], head["pairs"], sparse=plain)
        figures["learning rate"] = rate * head["codebooks"] if plain else rate
    else:
        with seeded(seed, "init"):
            model = _plain(z["stream"].shape[1], head.get("hidden", 0))
    make = torch.optim.Adam if head.get("optimizer") == "Adam" else torch.optim.SGD
    optimizer = make(model.parameters(), lr=figures["learning rate"])
    order = torch.randperm(10, generator=stream(seed, "classes")).tolist()
    at_once = len(order) if way == "all at once" else 1
    steps = class_incremental_stream(parts["stream"], order, at_once, epochs, BATCH, generator=stream(seed, "order"))
    matrix = []
    for step in steps:
        _fit(model, optimizer, inputs["stream"], labels, step.index_batches())
        with torch.no_grad():
            right = model(inputs["held out"]).argmax(1) == unseen
        matrix.append([float(right[unseen == c].float().mean()) for c in order])
    accuracy = float(right.float().mean())
    if tuning:
        return {"validation accuracy": accuracy}
    if at_once == 1:
        found = continual_metrics(matrix)
        figures |= {"forgetting": found["forgetting"], "learning accuracy": found["learning_accuracy"]}
    return {"accuracy": accuracy} | figures


def _fit(model: nn.Module, optimizer: Any, inputs: Tensor, labels: Tensor, batches: Iterable[Tensor]) -> None:
    from torch.nn import functional

    # A loop of its own: steps of kept codes and embeddings are so small that the training engine would dominate them.
    for index in batches:
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs[index]), labels[index]).backward()
        optimizer.step()


def _plain(dim: int, hidden: int) -> nn.Module:
    from torch import nn

    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 10)) if hidden else nn.Linear(dim, 10)


def _values(codebooks: int, pairs: int, *, sparse: bool) -> nn.Module:
    """The trained part of a bottleneck, which reads codes."""
    from torch import nn

    from netwright.nn.kv_bottleneck import KeyValueBottleneck

    class Values(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bottleneck = KeyValueBottleneck(1, pairs, codebooks, projection="none", sparse=sparse)

        def forward(self, codes: Tensor) -> Tensor:
            return self.bottleneck.fetch(codes)

    return Values()


@functools.lru_cache(maxsize=32)
def _codes(
    data: str, encoder: str, seed: int, images: tuple[int, ...], tuning: bool, sizes: tuple[int, int, int], keys: str
) -> tuple[dict[str, Tensor], float]:
    """Codes of the stream and of what is held out, by keys fitted to the part ``keys``; perplexity on the latter."""
    import torch
    from torch import nn

    from netwright.nn.kv_bottleneck import KeyValueBottleneck, fit_keys
    from netwright.seeding import stream

    z = _embedded(data, encoder, seed, images, tuning)
    (codebooks, pairs, key_dim), seen, generator = sizes, z[keys], stream(seed, "keys")
    layer = KeyValueBottleneck(seen.shape[1], pairs, codebooks, key_dim, generator=stream(seed, "init"))
    batches = seen[torch.randperm(len(seen), generator=generator)].split(500)
    fit_keys(layer, nn.Identity(), batches, generator=generator)
    layer.freeze_keys()
    codes = {name: layer.encode(z[name]).to(layer.code_dtype) for name in ("stream", "held out")}
    return codes, float(layer.perplexity(codes["held out"]).mean())


@functools.lru_cache(maxsize=12)
def _parts(data: str, seed: int, images: tuple[int, ...], tuning: bool) -> dict[str, TensorImages]:
    """What the encoder and the keys see, the stream, and what is held out of it: test images, or others in tuning."""
    import torch

    from netwright.data import TensorImages, load, split_train, subset

    before, count, test = images
    loaded = load(data)
    whole: list[Any] = [loaded.train, loaded.validation, loaded.test]  # small data lie in memory
    pool = TensorImages(torch.cat([p.images for p in whole]), torch.cat([p.labels for p in whole]))
    if data == "digits":
        chosen = subset(pool, before, seed=0)
        pretraining, pool = pool.subset(chosen), pool.subset(_others(chosen, len(pool)))
    else:
        fashion = load("fashion-mnist").train
        pretraining = fashion.subset(subset(fashion, before, seed=seed))  # type: ignore[assignment]
    held = subset(pool, test, seed=0)
    rest = pool.subset(_others(held, len(pool)))
    shown = rest.subset(subset(rest, min(count, len(rest)), seed=0))
    found = {"pretraining": pretraining, "stream": shown, "held out": pool.subset(held)}
    if tuning:
        kept, other = split_train(shown.labels, 0.2, seed=seed)
        found |= {"stream": shown.subset(kept), "held out": shown.subset(other)}
    return found


def _others(chosen: Tensor, count: int) -> Tensor:
    import torch

    left = torch.ones(count, dtype=torch.bool)
    left[chosen] = False
    return left.nonzero().flatten()


@functools.lru_cache(maxsize=12)
def _encoder(data: str, encoder: str, seed: int, images: tuple[int, ...]) -> nn.Module:
    """Trained on the images for the encoder alone, without their labels."""
    import torch
    from torch import nn

    from netwright.data import Batches, Normalise, TensorImages
    from netwright.nn.convnet import SmallConvNet
    from netwright.seeding import seeded
    from netwright.train import Classifier, fit
    from netwright.train.schedules import CosineProgress

    unlabelled = _parts(data, seed, images, False)["pretraining"].images
    if encoder == "PCA":
        flat = (unlabelled.float() / 255).flatten(1)
        mean = flat.mean(0)
        _, _, directions = torch.linalg.svd(flat - mean, full_matrices=False)
        linear = nn.Linear(flat.shape[1], DIM[data])
        with torch.no_grad():
            linear.weight.copy_(directions[: DIM[data]])
            linear.bias.copy_(-linear.weight @ mean)
        return nn.Sequential(nn.Flatten(), linear)
    turned = torch.cat([unlabelled.rot90(turns, (2, 3)) for turns in range(ROTATIONS)])
    turns = torch.arange(ROTATIONS).repeat_interleave(len(unlabelled))
    pixels = unlabelled.float() / 255
    normalise = Normalise((float(pixels.mean()),), (float(pixels.std()),))
    with seeded(seed, "encoder"):
        network = SmallConvNet((16, 32), DIM[data], ROTATIONS, 1, grid=4)
    batches = Batches(TensorImages(turned, turns), 128, seed=seed, normalise=normalise, name="rotations")
    fit(Classifier(network, lr=0.05), batches, epochs=1, callbacks=[CosineProgress()], seed=seed)
    return nn.Sequential(normalise, network.features, network.head[:1])


@functools.lru_cache(maxsize=24)
def _embedded(data: str, encoder: str, seed: int, images: tuple[int, ...], tuning: bool) -> dict[str, Tensor]:
    """Embeddings of every part, standardised by those of the images for the encoder."""
    import torch

    from netwright.data.tensors import scaled
    from netwright.nn.kv_bottleneck import embeddings

    network = _encoder(data, encoder, seed, images)
    z = {
        name: torch.cat([embeddings(network, scaled(block)) for block in part.images.split(1000)])
        for name, part in _parts(data, seed, images, tuning).items()
    }
    mean, std = z["pretraining"].mean(0), z["pretraining"].std(0).clamp(min=1e-6)
    return {name: (each - mean) / std for name, each in z.items()}
