"""``netwright explain --tabular``: a CSV file, a network that learns it, and what that network goes by."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netwright.console import UserError, nearest, note, table
from netwright.data.table import LabelledTable, read_table
from netwright.page import Bullets, Figure, KeyValues, Mono, Page, Paragraph, Section, Table, Value, svg
from netwright.page.blocks import Cell
from netwright.results import Result
from netwright.seeding import seeded
from netwright.storage import new_folder, refuse_taken

if TYPE_CHECKING:
    from torch import nn

    from netwright.explain.tabular import Counterfactual, SurrogateExplainer

ENCODERS = {"none": None, "dense": "dense", "conv": "conv"}
SURROGATES = ("tree", "forest")
TEST = 0.25
SHOWN_RULES, SHOWN_FEATURES = 20, 20
HIDDEN = 128


@dataclasses.dataclass(frozen=True)
class TableExplained(Result):
    """What a network that learned a table goes by.

    Attributes:
        table: The file.
        target: The column of the classes.
        classes: Their names.
        surrogate: ``"tree"`` or ``"forest"``.
        accuracy: Of the network on held-out rows, in [0, 1].
        agreement: Share of held-out rows for which the surrogate gives the network's class.
        r2: Of the surrogate's probabilities, at most 1.
        surrogate_accuracy: Of the surrogate on the held-out rows.
        features: The features of the surrogate, the most important first.
        importances: What permuting each of them costs, as a share of rows.
        rules: The rules in words, the most confident first.
        left_out: Columns that are not features.
        folder: Where the page is.
    """

    table: str
    target: str
    classes: tuple[str, ...]
    surrogate: str
    accuracy: float
    agreement: float
    r2: float
    surrogate_accuracy: float
    features: tuple[str, ...]
    importances: tuple[float, ...]
    rules: tuple[str, ...]
    left_out: tuple[str, ...]
    folder: str

    def __str__(self) -> str:
        head = (
            f"network: {100 * self.accuracy:.1f} % of held-out rows right; {self.surrogate}: agrees with it for "
            f"{100 * self.agreement:.1f} %, R2 {self.r2:.3f}"
        )
        rows = [[name, f"{score:.4f}"] for name, score in zip(self.features, self.importances, strict=True)]
        told = table(rows[:SHOWN_FEATURES], ["feature", "permuting it changes"])
        more = len(self.rules) - SHOWN_RULES
        rules = [*self.rules[:SHOWN_RULES], *([f"and {more} more"] if more > 0 else [])]
        return "\n".join([head, "", told, "", *rules, f"page: {self.folder}/explained.html"])


def explain_table(
    path: str | Path,
    target: str,
    out: str | Path,
    *,
    surrogate: str = "tree",
    k: int | None = None,
    encoder: str = "none",
    epochs: int = 32,
    seed: int = 0,
) -> TableExplained:
    """Trains a network on a table and a surrogate of it, and writes a page of what it goes by.

    Three quarters of the rows train the network, rank the features and train the surrogate; all figures are of the
    others.

    Args:
        path: A CSV file with a line of column names.
        target: The column of the classes.
        out: A folder that is not there yet, or is empty.
        surrogate: ``"tree"`` or ``"forest"``.
        k: Features of the surrogate; chosen on held-out training rows when None.
        encoder: What stands in front of the network: ``"none"``, or an autoencoder, ``"dense"`` or ``"conv"``, whose
            embedding a self-attention network reads.
        epochs: Of the network, at most.
        seed: Of everything random.

    Raises:
        UserError: If the table cannot be used, an argument is out of its range, or something is in ``out`` already.
            Nothing is written then.
    """
    for name, value, known in (("surrogate", surrogate, SURROGATES), ("encoder", encoder, tuple(ENCODERS))):
        if value not in known:
            raise UserError(f"unknown {name} {value!r}", cure=nearest(value, known))
    for name, number, least in (("epochs", epochs, 1), ("seed", seed, 0), ("k", k, 1)):
        if number is not None and number < least:
            raise UserError(f"{name} must be >= {least}, got {number}")
    refuse_taken(out)
    data = read_table(path, target)
    if k is not None and k > data.X.shape[1]:
        raise UserError(f"k must be <= {data.X.shape[1]}, the number of features, got {k}", where=path)
    if data.left_out:
        note(f"columns that are no features are left out: {', '.join(data.left_out)}")
    train, test = _split(data, seed)
    network = _trained(data, train, encoder, epochs, seed)
    explainer = _explainer(network, data, train, surrogate, k, seed)
    with new_folder(out) as folder:
        found = _found(str(path), data, explainer, test, surrogate, str(out))
        _page(found, data, explainer, test).write(folder, "explained")
    return found


def _split(data: LabelledTable, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(data.y))
    held = max(TEST, len(data.classes) / len(rows))
    train, test = train_test_split(rows, test_size=held, stratify=data.y, random_state=seed)
    return train, test


def _trained(data: LabelledTable, rows: np.ndarray, encoder: str, epochs: int, seed: int) -> nn.Module:
    from torch import nn

    from netwright.explain.tabular import MinMax, Standardise, fit_tabular, tabular_classifier

    X, y = data.X[rows], data.y[rows]
    scale = Standardise(X) if ENCODERS[encoder] is None else MinMax(X)
    with seeded(seed, "init"):
        kind: Any = ENCODERS[encoder]
        network = tabular_classifier(
            X.shape[1], len(data.classes), kind, "dense" if kind is None else "san", hidden=HIDDEN
        )
    batch = max(8, min(128, len(rows) // 16))
    fit_tabular(network, scale(_tensor(X)), y, epochs=epochs, batch=batch, weight_decay=1e-4, seed=seed)
    return nn.Sequential(scale, network)


def _tensor(X: np.ndarray) -> Any:
    import torch

    return torch.as_tensor(X, dtype=torch.float32)


def _explainer(
    network: nn.Module, data: LabelledTable, rows: np.ndarray, surrogate: Any, k: int | None, seed: int
) -> SurrogateExplainer:
    from netwright.explain.tabular import SurrogateExplainer

    explainer = SurrogateExplainer(
        network, surrogate, "auto" if k is None else k, groups=data.columns, class_names=data.classes, random_state=seed
    )
    try:
        explainer.fit(data.X[rows])
    except ValueError as error:
        cure = "train longer with --epochs, or see whether the columns tell the classes at all"
        raise UserError(f"no surrogate can be trained: {error}", cure=cure) from error
    explainer.feature_names_in_ = np.array(data.names, dtype=object)
    return explainer


def _found(
    path: str, data: LabelledTable, explainer: SurrogateExplainer, test: np.ndarray, surrogate: str, out: str
) -> TableExplained:
    told = explainer.fidelity(data.X[test], data.y[test])
    drops = explainer.importances_["permutation"]
    rules = explainer.rules(simplify=True)
    return TableExplained(
        table=path,
        target=data.target,
        classes=data.classes,
        surrogate=surrogate,
        accuracy=told["black_box_accuracy"],
        agreement=told["agreement"],
        r2=told["r2"],
        surrogate_accuracy=told["accuracy"],
        features=tuple(data.names[i] for i in explainer.columns_),
        importances=tuple(round(float(drops[i]), 6) for i in explainer.columns_),
        rules=tuple(
            f"{rule.text(data.names, data.classes)}  (support {rule.support:.3f}, confidence {rule.confidence:.3f})"
            for rule in rules
        ),
        left_out=data.left_out,
        folder=out,
    )


def _page(found: TableExplained, data: LabelledTable, explainer: SurrogateExplainer, test: np.ndarray) -> Page:
    verdict = (
        f"The network is right for {100 * found.accuracy:.1f} % of held-out rows; a {found.surrogate} on "
        f"{len(found.features)} of {len(data.names)} features agrees with it for {100 * found.agreement:.1f} %."
    )
    sections = [
        Section("", [_importances(found)]),
        Section("Rules", _rules(found)),
        Section("One row", _row(data, explainer, int(test[0]))),
    ]
    if explainer.k_agreements_:
        sections.append(Section("How many features", [_numbers(explainer)]))
    missing = [data.classes[i] for i in explainer.missing_classes_]
    facts: dict[str, Cell] = {
        "table": Mono(found.table),
        "target": found.target,
        "rows": len(data.y),
        "held-out rows": len(test),
        "accuracy of the surrogate": Value(found.surrogate_accuracy, f"{100 * found.surrogate_accuracy:.1f} %"),
        "R2 of its probabilities": Value(found.r2, f"{found.r2:.3f}"),
        "classes the network never gives": ", ".join(missing) or "none",
        "columns left out": ", ".join(found.left_out) or "none",
    }
    sections.append(Section("Settings", [KeyValues(facts)], folded=True))
    return Page(f"What decides {data.target}", verdict, sections, found.to_dict())


def _importances(found: TableExplained) -> Figure:
    from netwright.explain.tabular.importance import bars

    shown = min(SHOWN_FEATURES, len(found.features))
    scores = np.array(found.importances[:shown])
    reading = (
        "The longer a bar, the more rows get another answer of the network when the feature's values are shuffled."
    )

    def paint(figure: Any) -> None:
        bars(scores, found.features, "share of rows", figure.subplots())

    image = svg(paint, height=60 + 17 * shown)
    return Figure(image, reading, "Features", dict(zip(found.features, found.importances, strict=True)))


def _rules(found: TableExplained) -> list[Any]:
    more = len(found.rules) - SHOWN_RULES
    told = (
        "Of the surrogate without a quarter of its rows: conditions that do not raise the confidence on this quarter "
        "are left out, and support and confidence are shares of it. The first rule that holds decides."
    )
    listed: list[Any] = [Paragraph(told), Bullets([Mono(rule) for rule in found.rules[:SHOWN_RULES]])]
    return [*listed, *([Paragraph(f"{more} more rules are in the JSON file.")] if more > 0 else [])]


def _row(data: LabelledTable, explainer: SurrogateExplainer, row: int) -> list[Any]:
    why = explainer.explain(data.X[row])
    name = data.classes[why.prediction]
    image = svg(lambda figure: why.plot(figure.subplots()), height=80 + 17 * min(10, int((why.effects != 0).sum())))
    reading = (
        f"What the values of this row add to the surrogate's probability of {name}, {why.probabilities.max():.2f}."
    )
    told = f"Row {row + 2} of the file: the network says {data.classes[int(why.black_box.argmax())]}."
    blocks: list[Any] = [Paragraph(told), Figure(image, reading, "Effects")]
    nearest_others = [
        explainer.counterfactual(data.X[row], c) for c in explainer.surrogate_.classes_ if c != why.prediction
    ]
    known = sorted((other for other in nearest_others if other is not None), key=lambda other: other.distance)
    return [*blocks, *([_changes(data, known[0])] if known else [])]


def _changes(data: LabelledTable, other: Counterfactual) -> Table:
    agrees = "The network agrees." if other.valid_black_box else "The network does not agree."
    caption = f"The least that would make it {data.classes[other.target]} for the surrogate. {agrees}"
    rows: list[list[Cell]] = [[data.names[i], float(other.x[i]), float(other.changed[i])] for i in other.columns]
    return Table(["feature", "is", "would be"], rows, caption)


def _numbers(explainer: SurrogateExplainer) -> Figure:
    ks, values = list(explainer.k_agreements_), list(explainer.k_agreements_.values())

    def paint(figure: Any) -> None:
        ax = figure.subplots()
        ax.plot(ks, values, marker="o")
        ax.axvline(explainer.k_, color="#5d6673", linestyle=":")
        ax.set_xscale("log")
        ax.set_xticks(ks, [str(k) for k in ks])
        ax.set_xlabel("features")
        ax.set_ylabel("agreement")

    reading = "The dotted line is the fewest features whose agreement on held-out rows is within a point of the best."
    return Figure(svg(paint), reading, "Number of features", {str(k): v for k, v in explainer.k_agreements_.items()})
