"""Does ordered dropout find the ranks that a network needs, and in linear maps the singular value decomposition?

Horvath, Laskaridis, Rajput and Wang, "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024,
arXiv:2308.14929.

Exact claims first: a linear target, and an autoencoder against principal components. Then LeNet on Fashion-MNIST:
Maestro at four penalties, cut to a half, a quarter and a tenth of the parameters, against the trained dense network
cut by its singular values, without and with three epochs of fine-tuning, which the dense training has less. The dense
learning rate is chosen on the validation part, and Maestro takes the same. Which penalty a size is cut from, and
whether terms are ordered as in the paper or one by one, is chosen on the validation part too, one of eight; both orders
are published. Fine-tuning has eight to choose from as well: four learning rates, and singular values ordered as they
are or by what a parameter brings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netwright.papers import classification
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

if TYPE_CHECKING:
    from torch import nn

    from netwright.data import Batches

CARD = Paper(
    slug="maestro",
    title="Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
    authors=("Samuel Horvath", "Stefanos Laskaridis", "Shashank Rajput", "Hongyi Wang"),
    year=2024,
    venue="International Conference on Machine Learning",
    kind="inproceedings",
    arxiv="2308.14929",
    summary=(
        "Every layer is trained as a product of two factors, one layer at a time cut to a random number of leading "
        "terms. The terms become ordered by importance, a penalty empties the last ones, and the network can be cut "
        "further without training."
    ),
    method="netwright.compress.low_rank:fit_maestro",
    covers=("netwright.compress.low_rank", "netwright.compress.callbacks.maestro"),
    claims=(
        Claim("svd", "For a linear target, every prefix is the best approximation of its rank."),
        Claim("pca", "In a linear autoencoder, prefixes explain what principal components explain."),
        Claim("curve", "At a half, a quarter and a tenth of the parameters it beats truncated singular values."),
        Claim("dense", "With 25 to 35 % of the parameters it is within a point of the dense network."),
        Claim("deploy", "Cut without training, it loses less when the leading terms stay than when random ones do."),
        Claim("deploy-single", "So it does when terms are compared one by one, not in the paper's order.", gated=False),
        Claim("fine-tuned", "It also beats singular values with fine-tuning, at all three sizes.", gated=False),
    ),
    metric="accuracy",
    seeds=3,
)

DATA = "fashion-mnist"
PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3)
LEARNING_RATES = (0.02, 0.05)
SHARES = (0.5, 0.25, 0.1)
CUTS = (0.75, 0.5, 0.25)
EPS = 1e-2
BATCH, FINE_TUNING = 64, 3
FINE_TUNING_RATES = (1.0, 0.5, 0.2, 0.1)  # times the learning rate of the dense network
ORDERS = {"the paper's order": True, "one by one": False}
COMPONENTS, BOTTLENECK = 8, 16


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    linear, control = arms["linear target"], arms["linear target, not truncated"]
    worst, missed = max(linear["error"]), max(linear["singular value error"])
    rest, free = max(linear["superfluous terms"]), min(control["error at rank 1"])
    bound = linear["tolerance"][0]
    exact = worst <= bound and missed <= 2 * bound and rest < 10 * bound and free > 0.1
    found = {
        "svd": decide(
            exact,
            worst,
            f"largest error {worst:.2g} of at most {bound:g}, singular values off by {100 * missed:.2g} %, further "
            f"terms {rest:.2g}; without truncation the error at rank 1 is {free:.2g}",
        ),
        "pca": decide(None, reason="was not run"),
    }
    if "autoencoder" in arms:
        gap = max(arms["autoencoder"]["gap"])
        found["pca"] = decide(gap <= 0.01, gap, f"explained variance is at most {100 * gap:.2g} % away, claimed 1 %")
    shares = [s for s in SHARES if f"Maestro at {s:g}" in arms]

    def against(other: str) -> Verdict:
        pairs = [(arms[f"Maestro at {s:g}"]["accuracy"], arms[f"{other} at {s:g}"]["accuracy"]) for s in shares]
        return all_of(*(compare(a, b, errors=2) for a, b in pairs))

    found["curve"] = against("singular values")
    found["fine-tuned"] = against("singular values, fine-tuned")
    found["dense"] = compare(arms["Maestro at 0.3"]["accuracy"], arms["dense"]["accuracy"], margin=-0.01)

    def deployed(order: str) -> Verdict:
        names = [f"{order} at {c:g}" for c in CUTS if f"leading terms, {order} at {c:g}" in arms]
        return all_of(
            *(
                compare(arms[f"leading terms, {name}"]["accuracy"], arms[f"random terms, {name}"]["accuracy"])
                for name in names
            )
        )

    found["deploy"], found["deploy-single"] = map(deployed, ORDERS)
    return found


def reproduce(run: Run) -> Evidence:
    """The exact claims, then the curves of accuracy against size."""
    steps = run.size("steps of the linear target", full=6000, fast=2000, scaled=False)
    arms = run.arms({"linear target": [steps, True], "linear target, not truncated": [steps, False]}, _linear)
    tolerance = 0.02 if run.fast else 0.005
    arms["linear target"]["tolerance"] = [tolerance] * len(run.seeds)
    if not run.fast:
        passes = run.size("steps of the autoencoder", full=8000, fast=1, scaled=False)
        arms |= run.arms({"autoencoder": [passes]}, _autoencoder)
    images = [
        run.size("training images", full=10_000, fast=1000),
        run.size("validation images", full=2000, fast=200),
        run.size("test images", full=10_000, fast=500, scaled=False),
    ]
    epochs = run.size("epochs", full=15, fast=2)
    rate = LEARNING_RATES[1]
    if not run.fast:
        scores = run.arms({f"dense, lr {lr:g}": [images, epochs, lr] for lr in LEARNING_RATES}, _dense, seeds=[0])
        rate = max(LEARNING_RATES, key=lambda lr: scores[f"dense, lr {lr:g}"]["validation accuracy"][0])
    penalties = list(PENALTIES[2:3] if run.fast else PENALTIES)
    tuning = list(FINE_TUNING_RATES[2:3] if run.fast else FINE_TUNING_RATES)
    found = run.arms({"networks": [images, epochs, rate, penalties, tuning]}, _networks)["networks"]
    for name, values in found.items():
        arm, _, metric = name.partition(": ")
        arms.setdefault(arm, {})[metric] = values
    return run.evidence(arms, judge(arms))


def _linear(seed: int, steps: int, truncate: bool) -> dict[str, float]:
    """U V^T trained on y = C x over all unit vectors, against the singular value decomposition of C."""
    import torch
    from torch import nn

    from netwright.compress.low_rank import LowRankLinear, ordered_rank_sampler, truncated
    from netwright.seeding import seeded

    generator = torch.Generator().manual_seed(123)
    target = torch.randn(9, 3, generator=generator) @ torch.randn(3, 6, generator=generator)
    with seeded(seed, "init"):
        low = LowRankLinear(6, 9, bias=False)
    x, optimiser = torch.eye(6), torch.optim.SGD(low.parameters(), 0.5)
    sampler = ordered_rank_sampler(low, seed=seed)
    for _ in range(steps):
        with truncated(low, next(sampler) if truncate else {}):
            optimiser.zero_grad()
            nn.functional.mse_loss(low(x), x @ target.T).backward()
            optimiser.step()
    left, size, right = torch.linalg.svd(target, full_matrices=False)
    errors = []
    for k in range(1, low.rank + 1):
        with low.truncate(k), torch.no_grad():
            errors.append(float((low.weight - (left[:, :k] * size[:k]) @ right[:k]).norm() / target.norm()))
    terms = low.importance(hierarchical=False)
    return {
        "error": max(errors),
        "error at rank 1": errors[0],
        "singular value error": float((terms[:3] / size[:3] - 1).abs().max()),
        "superfluous terms": float(terms[3:].max()),
    }


def _autoencoder(seed: int, steps: int) -> dict[str, float]:
    """A linear autoencoder of the digits: what its prefixes explain of the variance, beside principal components."""
    import torch
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA

    from netwright.compress.low_rank import LowRankLinear, ordered_rank_sampler, truncated
    from netwright.seeding import seeded

    raw = torch.from_numpy(load_digits().data).float()
    x = raw - raw.mean(0)
    x = x / torch.linalg.eigvalsh(x.T @ x / len(x))[-1].sqrt()
    with seeded(seed, "init"):
        low = LowRankLinear(64, 64, bias=False, rank=BOTTLENECK)
    optimiser = torch.optim.SGD(low.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    sampler = ordered_rank_sampler(low, seed=seed)
    for _ in range(steps):
        with truncated(low, next(sampler)):
            optimiser.zero_grad()
            (low(x) - x).square().sum(1).mean().backward()
            optimiser.step()
            schedule.step()
    principal = PCA(COMPONENTS, svd_solver="full").fit(x.numpy()).explained_variance_ratio_.cumsum()
    explained = []
    for k in range(1, COMPONENTS + 1):
        with low.truncate(k), torch.no_grad():
            explained.append(1 - float((low(x) - x).square().sum() / x.square().sum()))
    figures = {f"explained by {k + 1}": value for k, value in enumerate(explained)}
    return figures | {"gap": max(abs(a / b - 1) for a, b in zip(explained, principal, strict=True))}


def _networks(
    seed: int, images: list[int], epochs: int, lr: float, penalties: list[float], tuning: list[float]
) -> dict[str, float]:
    """All networks of one seed: ``"arm: figure"`` to its value."""
    from netwright.compress.low_rank import (
        decompose,
        finalize,
        fit_maestro,
        low_rank_cost,
        prune_to_budget,
        svd_truncate,
    )

    bench = _Bench(seed, images)
    figures: dict[str, float] = {}

    def keep(arm: str, network: nn.Module, **more: float) -> None:
        figures[f"{arm}: accuracy"] = bench.accuracy(network, "test")
        figures[f"{arm}: parameters"] = sum(p.numel() for p in network.parameters())
        figures.update({f"{arm}: {name}": value for name, value in more.items()})

    dense = bench.trained(bench.network(), epochs, lr)
    keep("dense", dense)
    full = sum(p.numel() for p in dense.parameters())
    svd = decompose(bench.trained(bench.network(), max(1, epochs - FINE_TUNING), lr))
    for share in SHARES:
        keep(f"singular values at {share:g}", svd_truncate(dense, int(share * full)))
        tuned = {
            (factor, priced): bench.trained(
                finalize(prune_to_budget(svd, params=int(share * full), hierarchical=False, per_parameter=priced)),
                min(FINE_TUNING, epochs),
                factor * lr,
            )
            for factor in tuning
            for priced in (False, True)
        }
        score = {key: bench.accuracy(network, "validation") for key, network in tuned.items()}
        best = max(score, key=lambda key: score[key])
        more = {"lr": best[0] * lr, "by parameter": float(best[1])}
        keep(f"singular values, fine-tuned at {share:g}", tuned[best], **more)
    lows = {}
    for lam in penalties:
        low = decompose(bench.network())
        fit_maestro(low, bench.batches(), lam=lam, eps=EPS, epochs=epochs, lr=lr, seed=seed)
        lows[lam] = low
        keep(f"Maestro, lam {lam:g}", finalize(low))
    for share in (*SHARES, 0.3):
        cuts = {
            (lam, paper): prune_to_budget(low, params=int(share * full), hierarchical=paper)
            for lam, low in lows.items()
            for paper in (True, False)
        }
        scores = {key: bench.accuracy(cut, "validation") for key, cut in cuts.items()}
        chosen = max(scores, key=lambda key: scores[key])
        own = max((key for key in scores if key[1]), key=lambda key: scores[key])
        keep(f"Maestro at {share:g}", finalize(cuts[chosen]), lam=chosen[0], **{"order of the paper": float(chosen[1])})
        keep(f"Maestro, the paper's order at {share:g}", finalize(cuts[own]), lam=own[0])
    one = lows[penalties[0]]
    whole = low_rank_cost(one).params
    for order, paper in ORDERS.items():
        for share in CUTS:
            cut = prune_to_budget(one, params=int(share * whole), hierarchical=paper)
            keep(f"leading terms, {order} at {share:g}", finalize(cut))
            draws = [bench.accuracy(_random_terms(one, cut, 10 * seed + i), "test") for i in range(3)]
            figures[f"random terms, {order} at {share:g}: accuracy"] = sum(draws) / len(draws)
    return figures


def _random_terms(whole: nn.Module, cut: nn.Module, seed: int) -> nn.Module:
    """A network with as many terms in each layer as another, drawn at random from those of the whole one."""
    import torch

    from netwright.compress.low_rank import low_rank_layers
    from netwright.nn.sparse import clone
    from netwright.seeding import stream

    drawn, wanted = clone(whole), low_rank_layers(cut)
    for name, layer in low_rank_layers(drawn).items():
        order = torch.randperm(layer.rank, generator=stream(seed, "terms", name))
        with torch.no_grad():
            for factor in (layer.U, layer.V):
                factor[: layer.rank] = factor[: layer.rank][order]
        layer.rank = wanted[name].rank
    return drawn


def _dense(seed: int, images: list[int], epochs: int, lr: float) -> dict[str, float]:
    bench = _Bench(seed, images)
    return {"validation accuracy": bench.accuracy(bench.trained(bench.network(), epochs, lr), "validation")}


class _Bench:
    """The data and the dense network of one seed."""

    def __init__(self, seed: int, images: list[int]):
        self.seed, self.images = seed, tuple(images)

    def batches(self) -> Batches:
        """Training batches, in the same order whenever they are asked for."""
        return classification.batches(DATA, self.seed, self.images, BATCH)

    def network(self) -> nn.Module:
        """LeNet, untrained, the same every time."""
        from netwright.nn.convnet import LeNet
        from netwright.seeding import seeded

        with seeded(self.seed, "init"):
            return LeNet()

    def trained(self, network: nn.Module, epochs: int, lr: float) -> nn.Module:
        """The network after training from where it is."""
        from netwright.train import Classifier, fit
        from netwright.train.schedules import CosineProgress

        module = Classifier(network, lr=lr, weight_decay=0.0)
        fit(module, self.batches(), epochs=epochs, callbacks=[CosineProgress()], seed=self.seed)
        return network

    def accuracy(self, network: nn.Module, part: str) -> float:
        """Share of right answers."""
        found = classification.parts(DATA, self.seed, *self.images)
        return classification.measured(network, found, part)["accuracy"]
