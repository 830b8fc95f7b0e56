"""Black boxes, their surrogates on every choice of features, and their rivals: one trial of the experiment."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

HIDDEN = 128
GRID = (10, 20, 50, 100, 200)
# Rows that every ranking is made from, and permutations of each feature; fewer where every altered row is convolved.
ROWS, CONVOLVED_ROWS = 1000, 300
REPEATS = 3
FAITHFUL_ROWS = 500
TABNET_STEPS, TABNET_BATCH = 1000, 256  # steps at most
DRAWS = 3  # of random features
KINDS = {"dense": (None, "dense"), "SAN": (None, "san"), "CAE": ("conv", "conv"), "CAE + SAN": ("conv", "san")}


@functools.lru_cache(maxsize=1)
def data_of(name: str, seed: int, sizes: tuple[int, ...]) -> tuple[Any, np.ndarray, Any, np.ndarray]:
    """Training and test rows in [0, 1], dense or sparse, with their classes."""
    import numpy as np
    from sklearn.datasets import make_classification
    from sklearn.model_selection import train_test_split

    if name == "planted":
        X, y = make_classification(
            sizes[0], sizes[1], n_informative=15, n_redundant=0, class_sep=2.0, shuffle=False, random_state=seed
        )
        X = X.astype(np.float32)
    elif name == "Debian":
        X, y = _packages(seed, *sizes)
    elif name == "Fashion-MNIST":
        return _images("fashion-mnist", seed, *sizes)
    else:
        return _images("mnist-5000", seed, round(0.7 * sizes[0]), round(0.3 * sizes[0]))
    train, test = train_test_split(np.arange(len(y)), test_size=0.3, stratify=y, random_state=seed)
    return X[train], y[train], X[test], y[test]


def _images(name: str, seed: int, train: int, test: int) -> tuple[Any, np.ndarray, Any, np.ndarray]:
    from netwright.papers import classification

    parts, _ = classification.parts(name, seed, train, 0, test)
    found: list[Any] = []
    for part in (parts["train"], parts["test"]):
        found += [part.images.flatten(1).float().div(255).numpy(), part.labels.numpy()]
    return found[0], found[1], found[2], found[3]


def _packages(seed: int, count: int, words: int) -> tuple[Any, np.ndarray]:
    import numpy as np

    from netwright.data.debian import bag_of_words, load_packages
    from netwright.seeding import numpy_stream

    index = load_packages()
    sections = index.sections(8)
    known = [package for package in index.packages if package.section in sections]
    drawn = numpy_stream(seed, "packages").permutation(len(known))[:count]
    X, _ = bag_of_words([known[i].description for i in drawn], words, least_count=1)
    return X, np.array([sections.index(known[i].section) for i in drawn])


def trial(seed: int, name: str, kind: str, sizes: Sequence[int], epochs: int, fast: bool) -> dict[str, Any]:
    """A black box, its surrogates on every choice of features, and the rivals."""
    import numpy as np

    from netwright.explain.tabular import SurrogateExplainer
    from netwright.explain.tabular.faithfulness import agreement, comprehensiveness, sufficiency
    from netwright.explain.tabular.inputs import answers, as_table

    X, y, X_test, y_test = data_of(name, seed, tuple(sizes))
    network = black_box(kind, X, y, epochs, seed)
    found: dict[str, Any] = {"black box: accuracy": agreement(answers(network, as_table(X_test)).argmax(1), y_test)}
    if len(np.unique(answers(network, as_table(X)).argmax(1))) < 2:
        return found | {"black box: learned": 0.0}  # one class for all rows: there is nothing to explain
    rows, repeats = (CONVOLVED_ROWS, 1) if fast or KINDS[kind][0] == "conv" else (ROWS, REPEATS)
    options: dict[str, Any] = {"importance_rows": rows, "n_repeats": repeats, "random_state": seed}
    kinds = ["tree"] if fast else ["tree", "forest"]
    chosen = SurrogateExplainer(network, "tree", "auto", k_grid=GRID[: 2 if fast else None], **options).fit(X)
    k = chosen.k_
    found |= {"black box: k": k} | {f"black box: agreement with k = {i}": v for i, v in chosen.k_agreements_.items()}
    if name == "planted":
        found["top: recall"] = float((np.argsort(chosen.ranks_, kind="stable")[:15] < 15).mean())
    draws = DRAWS if kind == "dense" and not fast else 1
    selections = {"top": [chosen.ranks_], "random": random_ranks(X.shape[1], seed, draws)}
    selections |= alone(chosen.importances_)
    if not fast:
        looked_into = X[chosen.ranked_on_], y[chosen.ranked_on_]
        selections |= rules(*looked_into, seed) | (by_forest(*looked_into, seed) if kind == "dense" else {})
    looked_at = X_test[:FAITHFUL_ROWS]
    for label, orders in selections.items():
        figures: dict[str, list[float]] = {}
        for order in orders:
            for model in kinds:
                if label == "top" and model == "tree":
                    fitted = chosen
                else:
                    fitted = SurrogateExplainer(network, model, k, ranks=order, **options).fit(X)  # type: ignore[arg-type]
                told = fitted.fidelity(X_test, y_test)
                for metric, value in (("agreement", "agreement"), ("R2", "r2"), ("accuracy", "accuracy")):
                    figures.setdefault(f"{model} {metric}", []).append(told[value])
            top = np.argsort(order, kind="stable")[:k]
            both = {"comprehensiveness": comprehensiveness, "sufficiency": sufficiency}
            for metric, function in both.items():
                each = function(network, looked_at, top, background=X)
                figures.setdefault(metric, []).append(float(each.mean()))
        found |= {f"{label}: {metric}": float(np.mean(values)) for metric, values in figures.items()}
    if kind == "dense" and not fast:
        own = {"": selections["top"][0], ", own features": selections["information"][0]}
        places = {label: np.argsort(order, kind="stable")[:k] for label, order in own.items()}
        found |= rivals(X, y, X_test, y_test, seed, {**places, ", all features": np.arange(X.shape[1])})
    return found


def random_ranks(features: int, seed: int, draws: int) -> list[np.ndarray]:
    """Orders that are drawn."""
    from netwright.seeding import numpy_stream

    random = numpy_stream(seed, "random features")
    return [random.permutation(features).astype(float) for _ in range(draws)]


def alone(importances: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """The ranks by attention alone and by perturbing alone, of a black box that has attention."""
    from netwright.explain.tabular import combine_ranks

    if "attention" not in importances:
        return {}
    perturbed = combine_ranks(*(score for name, score in importances.items() if name != "attention"))
    return {"attention": [combine_ranks(importances["attention"])], "perturbation": [perturbed]}


def black_box(kind: str, X: Any, y: np.ndarray, epochs: int, seed: int) -> nn.Module:
    """A trained network of one of the kinds."""
    from netwright.explain.tabular import fit_tabular, tabular_classifier
    from netwright.seeding import seeded

    encoder, head = KINDS[kind]
    with seeded(seed, "init"):
        network = tabular_classifier(X.shape[1], int(y.max()) + 1, encoder, head, hidden=HIDDEN)  # type: ignore[arg-type]
    lr = 1e-2 if head == "san" else 1e-3
    fit_tabular(
        network,
        X,
        y,
        epochs=epochs,
        autoencoder_epochs=10,
        end_to_end=encoder == "conv",
        lr=lr,
        weight_decay=1e-4,
        seed=seed,
    )
    return network


def rules(X: Any, y: np.ndarray, seed: int) -> dict[str, list[np.ndarray]]:
    """Ranks of the features by rules that do not look at the black box, from the rows that its own are made from."""
    from sklearn.feature_selection import mutual_info_classif

    from netwright.explain.tabular import combine_ranks
    from netwright.explain.tabular.inputs import as_table, moments

    table = as_table(X)
    information = mutual_info_classif(X, y, discrete_features=table.sparse, random_state=seed)
    return {"variance": [combine_ranks(moments(table)[1])], "information": [combine_ranks(information)]}


def by_forest(X: Any, y: np.ndarray, seed: int) -> dict[str, list[np.ndarray]]:
    """Ranks of the features by TreeSHAP of a forest on the labels, where the package is installed."""
    if importlib.util.find_spec("shap") is None:
        return {}
    import numpy as np
    from sklearn.ensemble import RandomForestClassifier

    from netwright.explain.tabular import combine_ranks
    from netwright.explain.tabular.contributions import tree_shap
    from netwright.explain.tabular.inputs import as_table

    forest = RandomForestClassifier(50, random_state=seed, max_depth=12).fit(X, y)
    _, parts = tree_shap(forest, as_table(X).dense())
    return {"forest, TreeSHAP": [combine_ranks(np.abs(parts).mean((0, 2)))]}


def rivals(
    X: Any, y: np.ndarray, X_test: Any, y_test: np.ndarray, seed: int, features: dict[str, np.ndarray]
) -> dict[str, float]:
    """Trees on the labels, each on its features; gradient boosting, and TabNet if it is there, on all features."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.tree import DecisionTreeClassifier

    from netwright.explain.tabular.inputs import as_table
    from netwright.explain.tabular.models import tuned

    table, tested = as_table(X), as_table(X_test)
    found: dict[str, float] = {}
    for label, columns in features.items():
        seen = table.single(columns)
        tree = DecisionTreeClassifier(random_state=seed, **tuned("tree", seen, y, seed, False, 3)).fit(seen, y)
        found[f"tree on labels{label}: accuracy"] = tree.score(tested.single(columns), y_test)
    full, test = table.dense(), tested.dense()
    boosting = HistGradientBoostingClassifier(random_state=seed, early_stopping=True).fit(full, y)
    found["boosting: accuracy"] = boosting.score(test, y_test)
    if importlib.util.find_spec("pytorch_tabnet") is not None:
        found["TabNet: accuracy"] = float((_tabnet(full, y, seed).predict(test) == y_test).mean())
    return found


def _tabnet(X: np.ndarray, y: np.ndarray, seed: int) -> Any:
    """TabNet with its package's settings but for smaller batches, for as long as held-out rows gain by it."""
    import contextlib
    import io
    import warnings

    import numpy as np
    from pytorch_tabnet.tab_model import TabNetClassifier
    from sklearn.model_selection import train_test_split

    train, held_out = train_test_split(np.arange(len(y)), test_size=0.1, stratify=y, random_state=seed)
    model = TabNetClassifier(seed=seed, verbose=0, device_name="cpu")
    # It prints when it stopped, whatever its verbosity: standard output is for the result.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore", UserWarning)  # which device, and which epoch was best
        epochs = math.ceil(TABNET_STEPS / max(1, len(train) // TABNET_BATCH))
        watched = {"eval_set": [(X[held_out], y[held_out])], "eval_metric": ["accuracy"], "patience": 15}
        model.fit(X[train], y[train], max_epochs=epochs, batch_size=TABNET_BATCH, virtual_batch_size=128, **watched)
    return model
