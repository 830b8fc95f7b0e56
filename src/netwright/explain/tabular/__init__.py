"""Black boxes on tables of many features, explained by the few features they go by and by simpler models of them.

Karim et al., "Interpreting Black-box Machine Learning Models for High Dimensional Datasets", IEEE DSAA 2023,
arXiv:2208.13405, in four steps: a black box (:func:`tabular_classifier`, :func:`fit_tabular`, or any of one's own), the
importance of its features (:func:`permutation_importance`, :func:`sensitivity_importance`, attention), a surrogate on
the first k (:class:`SurrogateExplainer`), and from it rules, effects of features and counterfactuals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netwright.lazy import exports

_NAMES = {
    "ConvHead": "embedding",
    "Counterfactual": "counterfactuals",
    "EmbeddingClassifier": "embedding",
    "Explanation": "explanation",
    "MinMax": "embedding",
    "PermutationImportance": "importance",
    "Rule": "rules",
    "RuleList": "rules",
    "SelfAttentionNetwork": "attention",
    "Standardise": "embedding",
    "SurrogateExplainer": "surrogate",
    "TabularCAE": "embedding",
    "agreement": "faithfulness",
    "combine_ranks": "ranks",
    "comprehensiveness": "faithfulness",
    "correlated_groups": "ranks",
    "fit_tabular": "training",
    "permutation_importance": "importance",
    "r_squared": "faithfulness",
    "sensitivity_importance": "importance",
    "sufficiency": "faithfulness",
    "tabular_classifier": "embedding",
}

if TYPE_CHECKING:
    from netwright.explain.tabular.attention import SelfAttentionNetwork
    from netwright.explain.tabular.counterfactuals import Counterfactual
    from netwright.explain.tabular.embedding import (
        ConvHead,
        EmbeddingClassifier,
        MinMax,
        Standardise,
        TabularCAE,
        tabular_classifier,
    )
    from netwright.explain.tabular.explanation import Explanation
    from netwright.explain.tabular.faithfulness import agreement, comprehensiveness, r_squared, sufficiency
    from netwright.explain.tabular.importance import (
        PermutationImportance,
        permutation_importance,
        sensitivity_importance,
    )
    from netwright.explain.tabular.ranks import combine_ranks, correlated_groups
    from netwright.explain.tabular.rules import Rule, RuleList
    from netwright.explain.tabular.surrogate import SurrogateExplainer
    from netwright.explain.tabular.training import fit_tabular

__all__ = [
    "ConvHead",
    "Counterfactual",
    "EmbeddingClassifier",
    "Explanation",
    "MinMax",
    "PermutationImportance",
    "Rule",
    "RuleList",
    "SelfAttentionNetwork",
    "Standardise",
    "SurrogateExplainer",
    "TabularCAE",
    "agreement",
    "combine_ranks",
    "comprehensiveness",
    "correlated_groups",
    "fit_tabular",
    "permutation_importance",
    "r_squared",
    "sensitivity_importance",
    "sufficiency",
    "tabular_classifier",
]

__getattr__, __dir__ = exports(
    __name__,
    _NAMES,
    __all__,
    (
        "attention", "boxes", "contributions", "counterfactuals", "embedding", "explanation", "faithfulness",
        "importance", "inputs", "models", "probe", "ranks", "rules", "scoring", "surrogate", "training",
    ),
)  # fmt: skip
