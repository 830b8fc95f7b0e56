"""Does accuracy survive many hops once transformation and propagation are apart, where stacked convolutions lose it?

Liu, Gao and Ji, "Towards Deeper Graph Neural Networks", KDD 2020, arXiv:2007.09296.

Two graphs that need no network. Debian's packages of eight sections: dependencies taken both ways, largest component,
words of the short descriptions, the section as class. The digits of scikit-learn, each joined with its ten nearest.
20 nodes of each class train, 30 choose the epoch by their loss, all others test; five random splits (three for GCN
deeper than 5), Adam at 0.01, at most 150 epochs with patience 40. Weight decay and dropout of each model are those
with the lowest validation loss on a split of its own, at two layers (GCN) or ten hops, and then fixed for all depths;
GCN has 64 hidden units, 32 beyond depth 5. Which depth is a model's best is asked of validation nodes. Beside them: a
perceptron on each node, SGC and APPNP with ten hops, label propagation, and DAGNN with the mean of its hops in place of
the gate.
Not tested: Cora, CiteSeer, PubMed (``netwright.data.planetoid`` reads them), co-author and Amazon graphs, ogbn-arxiv.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best

if TYPE_CHECKING:
    from torch import nn

    from netwright.data.graphs import Graph

CARD = Paper(
    slug="dagnn",
    title="Towards Deeper Graph Neural Networks",
    authors=("Meng Liu", "Hongyang Gao", "Shuiwang Ji"),
    year=2020,
    venue="ACM SIGKDD International Conference on Knowledge Discovery and Data Mining",
    kind="inproceedings",
    arxiv="2007.09296",
    summary=(
        "A perceptron transforms each node first, its logits travel many hops over the graph afterwards, and each node "
        "weighs its own hops with a learned gate."
    ),
    method="netwright.nn.dagnn:DAGNN",
    covers=("netwright.nn.dagnn.adjacency", "netwright.nn.dagnn.propagation", "netwright.train.dagnn"),
    claims=(
        Claim("depth", "GCN with 20 layers loses at least 10 points against its own best depth."),
        Claim("hops", "DAGNN with 20 hops loses at most 1.5 points against its own best number of hops."),
        Claim("gain", "DAGNN is at most half a point below GCN at its best, and 3 points above the perceptron."),
        Claim("gate", "With 40 hops the gate is more accurate than the mean of hops on at least one graph."),
        Claim("APPNP", "DAGNN is more accurate than APPNP with ten hops.", gated=False),
        Claim("smoothness", "The outputs of GCN grow alike with its depth: from 2 layers on, to below 0.1 at 20."),
    ),
    metric="accuracy",
    seeds=5,
)

LAYERS, HOPS = (1, 2, 5, 10, 20), (1, 2, 5, 10, 20, 40)
DECAYS, DROPOUTS = (0.0, 5e-4, 5e-3), (0.5, 0.8)
TUNED_AT = {"GCN": 2, "DAGNN": 10, "mean": 10, "APPNP": 10, "SGC": 10, "perceptron": 0}
DEEP_SEEDS = 3
GRAPHS = ("debian", "digits")
PAIRS = 100_000  # of the smoothness metric
RISE = 0.05  # of the smoothness from one depth to the next that still counts as falling


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    absent = decide(None, reason="the graph of Debian's packages was not run")
    found = dict.fromkeys((claim.key for claim in CARD.claims), absent)
    found["gate"] = _gate(arms)
    if "debian, GCN 20" not in arms:
        return found

    def figures(name: str, metric: str = "accuracy") -> list[Any]:
        return arms[f"debian, {name}"][metric]

    gcn, ours = (_best_depth(arms, "debian", model) for model in ("GCN", "DAGNN"))
    found["depth"] = _told(f"best depth {gcn}", _paired(figures(f"GCN {gcn}"), figures("GCN 20"), margin=0.1))
    found["hops"] = _told(
        f"best number of hops {ours}", _paired(figures("DAGNN 20"), figures(f"DAGNN {ours}"), margin=-0.015)
    )
    top = figures(f"DAGNN {ours}")
    found["gain"] = all_of(
        _told("over GCN", _paired(top, figures(f"GCN {gcn}"), margin=-0.005)),
        _told("over the perceptron", _paired(top, figures("perceptron"), margin=0.03)),
    )
    found["APPNP"] = _paired(top, figures("APPNP 10"))
    alike = {layers: figures(f"GCN {layers}", "smoothness") for layers in LAYERS if layers >= 2}
    deep = alike[LAYERS[-1]]
    found["smoothness"] = all_of(
        _told(f"{LAYERS[-1]} layers", _paired(deep, [0.1] * len(deep), direction="less")),
        _told(f"{LAYERS[-1]} layers less 2", _paired(deep, alike[2], direction="less")),
        *(
            _told(f"{more} layers less {less}", _paired(alike[more], alike[less], direction="less", margin=RISE))
            for less, more in itertools.pairwise(alike)
        ),
    )
    return found


def _paired(a: Sequence[Any], b: Sequence[Any], **claim: Any) -> Verdict:
    """Two standard errors over the splits that both have."""
    count = min(len(a), len(b))
    return compare(a[:count], b[:count], errors=2, **claim)


def _told(what: str, verdict: Verdict) -> Verdict:
    return Verdict(verdict.verdict, verdict.statistic, verdict.interval, f"{what}: {verdict.reason}")


def _best_depth(arms: Arms, graph: str, model: str) -> int:
    """The depth with the highest accuracy on validation nodes; of equal ones the smallest."""
    depths = [depth for depth in (LAYERS if model == "GCN" else HOPS) if f"{graph}, {model} {depth}" in arms]
    return max(depths, key=lambda depth: mean(arms[f"{graph}, {model} {depth}"]["validation accuracy"]))


def _gate(arms: Arms) -> Verdict:
    """Supported if it is on one graph, not supported if it is on none."""
    each = {
        name: _told(name, _paired(arms[f"{name}, DAGNN 40"]["accuracy"], arms[f"{name}, mean 40"]["accuracy"]))
        for name in GRAPHS
        if f"{name}, mean 40" in arms and f"{name}, DAGNN 40" in arms
    }
    if not each:
        return decide(None, reason="40 hops were not run")
    reason = "; ".join(verdict.reason for verdict in each.values())
    outcomes = [verdict.verdict for verdict in each.values()]
    strongest = max(each.values(), key=lambda verdict: verdict.statistic or 0.0)
    if "supported" in outcomes:
        return decide(True, strongest.statistic, reason)
    refuted = len(each) == len(GRAPHS) and set(outcomes) == {"not supported"}
    return decide(False if refuted else None, strongest.statistic, reason)


def reproduce(run: Run) -> Evidence:
    """Tunes each model on a split of its own, then trains it at every depth on every split."""
    from netwright.console import note
    from netwright.data import debian

    epochs = run.size("epochs", full=150, fast=60, specified=1000, scaled=False)
    patience = run.size("patience", full=40, fast=40, specified=100, scaled=False)
    budget = [epochs, patience]
    reason = debian.absent()
    if reason is not None and not run.fast:
        note(f"dagnn: only the digits are run, {reason}")
    arms: Arms = {}
    wanted: dict[tuple[int, ...], dict[str, list[Any]]] = {run.seeds: {}, run.seeds[:DEEP_SEEDS]: {}}
    graphs = ("digits",) if run.fast or reason is not None else GRAPHS
    for graph in graphs:
        for model, depths in _plan(run.fast).items():
            trials = {
                f"wd {decay:g} dropout {drop:g}": [graph, model, TUNED_AT[model], decay, drop, budget]
                for decay in DECAYS
                for drop in DROPOUTS
            }
            setting, tried = best(run, f"{graph}, {model},", trials, _train, figure="validation loss", lowest=True)
            arms |= tried
            _, _, _, decay, drop, _ = trials[setting]
            for depth in depths:
                seeds = run.seeds[:DEEP_SEEDS] if model == "GCN" and depth > 5 else run.seeds
                name = f"{graph}, {model} {depth}" if depth else f"{graph}, {model}"
                wanted[seeds][name] = [graph, model, depth, decay, drop, budget]
    for seeds, each in wanted.items():
        arms |= run.arms(each, _train, seeds=seeds)
    if not run.fast:
        arms |= run.arms({f"{graph}, label propagation": [graph] for graph in graphs}, _labels)
    return run.evidence(arms, judge(arms))


def _plan(fast: bool) -> dict[str, Sequence[int]]:
    if fast:
        return {"DAGNN": (2, 10), "GCN": (2,), "mean": (10,)}
    return {"GCN": LAYERS, "DAGNN": HOPS, "mean": (10, 40), "APPNP": (10,), "SGC": (10,), "perceptron": (0,)}


@functools.lru_cache(maxsize=2)
def _graph(name: str) -> Graph:
    from netwright.data.graphs import debian_graph, digits_graph

    return debian_graph() if name == "debian" else digits_graph()


def _split(name: str, seed: int) -> Graph:
    from netwright.data.graphs import per_class_split
    from netwright.seeding import stream

    graph = _graph(name)
    return graph.split(per_class_split(graph.y, 20, 30, stream(seed, "split")))


def _train(
    seed: int, name: str, model: str, depth: int, weight_decay: float, dropout: float, budget: Sequence[int]
) -> dict[str, Any]:
    import torch

    from netwright.nn.dagnn import smoothness
    from netwright.nn.modes import in_mode
    from netwright.seeding import seeded, stream
    from netwright.train.dagnn import fit_node_classifier, node_accuracy

    graph = _split(name, seed)
    epochs, patience = budget
    with seeded(seed, "init"):
        network = _network(model, depth, graph.num_features, graph.num_classes, dropout)
    history = fit_node_classifier(
        network, graph, epochs=epochs, weight_decay=weight_decay, patience=patience, seed=seed
    )
    losses = history.column("val_loss")
    chosen = losses.index(min(losses))
    assert graph.test_mask is not None
    with in_mode(network, training=False), torch.no_grad():
        outputs = network(graph.x, graph.edge_index)
    return {
        "accuracy": node_accuracy(network, graph, graph.test_mask),
        "validation accuracy": history.column("val_accuracy")[chosen],
        "validation loss": losses[chosen],
        "smoothness": float(smoothness(outputs, PAIRS, stream(seed, "pairs"))),
        "epoch": chosen + 1,
        "weight decay": weight_decay,
        "dropout": dropout,
        "nodes": graph.num_nodes,
        "edges": graph.edge_index.shape[1] // 2,
        **graph.source,
    }


def _labels(seed: int, name: str) -> dict[str, Any]:
    from netwright.nn.dagnn import label_propagation

    graph = _split(name, seed)
    assert graph.train_mask is not None
    assert graph.test_mask is not None
    scores = label_propagation(graph.edge_index, graph.y, graph.train_mask, graph.num_classes)
    return {"accuracy": float((scores.argmax(1) == graph.y)[graph.test_mask].float().mean())}


def _network(model: str, depth: int, features: int, classes: int, dropout: float) -> nn.Module:
    from netwright.nn.dagnn import APPNP, DAGNN, GCN, SGC, NodeMLP

    if model == "GCN":
        return GCN(features, classes, hidden=64 if depth <= 5 else 32, num_layers=depth, dropout=dropout)
    if model == "SGC":
        return SGC(features, classes, K=depth, dropout=dropout)
    if model == "APPNP":
        return APPNP(features, classes, K=depth, dropout=dropout)
    if model == "perceptron":
        return NodeMLP(features, classes, dropout=dropout)
    network = DAGNN(features, classes, K=depth, dropout=dropout)
    return _mean_of_hops(network) if model == "mean" else network


def _mean_of_hops(network: Any) -> nn.Module:
    """DAGNN without its gate: all hops count alike."""
    from torch import nn

    from netwright.nn.dagnn import AdjacencyCache, propagate

    class MeanOfHops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.K, self.cache = network.mlp, network.K, AdjacencyCache()

        def forward(self, x: Any, edge_index: Any, edge_weight: Any = None) -> Any:
            z = self.mlp(x)
            adj, transposed = self.cache(edge_index, len(z), edge_weight, z.dtype)
            return propagate(adj, z, self.K, transposed=transposed).mean(1)

    return MeanOfHops()
