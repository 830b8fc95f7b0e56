"""All importances that a black box allows, and the order of the features that follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from netwright.explain.tabular.attention import SelfAttentionNetwork
from netwright.explain.tabular.embedding import EmbeddingClassifier
from netwright.explain.tabular.importance import permutation_importance, sensitivity_importance
from netwright.explain.tabular.inputs import Table, as_input
from netwright.explain.tabular.probe import first_affine
from netwright.explain.tabular.ranks import combine_ranks, correlated_groups, first
from netwright.nn.modes import in_mode

Importance = Literal["attention", "permutation", "sensitivity"]
ATTENTION_ROWS = 256


def rank_features(
    black_box: Any,
    table: Table,
    importances: Sequence[Importance] | Literal["auto"],
    n_repeats: int,
    seed: int,
    wanted: Callable[[Float[np.ndarray, " features"]], int],
    groups: Any = None,
) -> tuple[dict[str, Float[np.ndarray, " features"]], Float[np.ndarray, " features"]]:
    """Scores of the features by name, and their mean ranks.

    Permutations are measured against the black box's own predictions. Where a module does not begin with an affine
    layer, ``wanted`` is asked how many features are enough, being given the ranks by sensitivity; only these first are
    permuted, and all others rank behind them.

    Raises:
        ValueError: If an importance is unknown, or none is asked for.
        TypeError: If the black box has no attention, or no gradient, that was asked for.
    """
    module = isinstance(black_box, nn.Module)
    if isinstance(importances, str) and importances == "auto":
        chosen: list[str] = ["permutation"]
        chosen += ["sensitivity"] if module else []
        chosen += ["attention"] if attending(black_box) is not None else []
    else:
        chosen = list(importances)
    unknown = [name for name in chosen if name not in get_args(Importance)]
    if unknown or not chosen:
        told = ", ".join(map(repr, get_args(Importance)))
        raise ValueError(f"importances must be 'auto' or some of {told}, got {importances!r}")
    found: dict[str, np.ndarray] = {}
    screen = module and "permutation" in chosen and first_affine(black_box) is None
    given = table.give(table.values) if not module else table.values
    if "sensitivity" in chosen or screen:
        method: Literal["gradient", "finite"] = "gradient" if module else "finite"
        found["sensitivity"] = sensitivity_importance(black_box, given, method)
    if "permutation" in chosen:
        columns = None
        if screen:
            by_gradient = combine_ranks(found["sensitivity"])
            columns = first(by_gradient, min(wanted(by_gradient), table.shape[1])).tolist()
        if isinstance(groups, str):
            if groups != "correlated":
                raise ValueError(f"groups must be one number a feature or 'correlated', got {groups!r}")
            groups = correlated_groups(given)
        drops = permutation_importance(
            black_box, given, n_repeats=n_repeats, groups=groups, random_state=seed, columns=columns
        )
        mean = drops.importances_mean
        found["permutation"] = np.where(np.isnan(mean), np.nanmin(mean) - 1, mean)
    if "attention" in chosen:
        found["attention"] = attention(black_box, table)
    scores = {name: found[name] for name in chosen}
    return scores, combine_ranks(*scores.values())


def attending(black_box: Any) -> tuple[nn.Sequential, SelfAttentionNetwork | EmbeddingClassifier] | None:
    """The part of a black box that has attention, and what acts on each column by itself in front of it."""
    parts = list(black_box) if isinstance(black_box, nn.Sequential) else [black_box]
    last = parts[-1]
    if not all(getattr(part, "columnwise", False) for part in parts[:-1]):
        return None
    if isinstance(last, SelfAttentionNetwork) or (
        isinstance(last, EmbeddingClassifier) and isinstance(last.head, SelfAttentionNetwork)
    ):
        return nn.Sequential(*parts[:-1]), last
    return None


def attention(black_box: Any, table: Table) -> Float[np.ndarray, " features"]:
    """The mean attention that each feature gets, over a few hundred rows.

    Raises:
        TypeError: If the black box has none.
    """
    parts = attending(black_box)
    if parts is None:
        raise TypeError(f"black_box must be a self-attention network for its attention, got {type(black_box).__name__}")
    before, network = parts
    with in_mode(before, training=False), torch.no_grad():
        x = before(as_input(black_box, table.values[:ATTENTION_ROWS]))
    if isinstance(network, EmbeddingClassifier):
        return network.feature_attention(x).double().cpu().numpy()
    with in_mode(network, training=False), torch.no_grad():
        return network.mean_attention(x, network(x).argmax(1)).double().cpu().numpy()
