"""Why a network answers as it does: where its features are, which cases it goes by, how well maps find things.

Names are resolved when they are first used, so that importing this package loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netwright.lazy import exports

_NAMES = {
    "EigenCAM": "eigen",
    "EigenMap": "eigen",
    "EmbeddingClassifier": "tabular",
    "GradCAM": "gradient",
    "LitPrototypeClassifier": "prototypes",
    "NearestCases": "prototypes",
    "PrototypeClassifier": "prototypes",
    "PrototypeLayer": "prototypes",
    "PrototypeLoss": "prototypes",
    "PrototypeOutput": "prototypes",
    "RuleList": "tabular",
    "SelfAttentionNetwork": "tabular",
    "SurrogateExplainer": "tabular",
    "TabularCAE": "tabular",
    "combine_ranks": "tabular",
    "comprehensiveness": "tabular",
    "eigen_cam": "eigen",
    "elastic_deform": "prototypes",
    "explain_by_prototypes": "prototypes",
    "find_prototypes": "prototypes",
    "grid_of_tokens": "layers",
    "largest_component_box": "localization",
    "last_conv": "layers",
    "last_places": "layers",
    "localization_error": "localization",
    "mnist_conv_decoder": "prototypes",
    "mnist_conv_encoder": "prototypes",
    "permutation_importance": "tabular",
    "pointing_game": "localization",
    "sensitivity_importance": "tabular",
    "sufficiency": "tabular",
    "with_places": "layers",
}
_MODULES = tuple(sorted({*_NAMES.values(), "maps"}))

if TYPE_CHECKING:
    from netwright.explain.eigen import EigenCAM, EigenMap, eigen_cam
    from netwright.explain.gradient import GradCAM
    from netwright.explain.layers import grid_of_tokens, last_conv, last_places, with_places
    from netwright.explain.localization import largest_component_box, localization_error, pointing_game
    from netwright.explain.prototypes import (
        LitPrototypeClassifier,
        NearestCases,
        PrototypeClassifier,
        PrototypeLayer,
        PrototypeLoss,
        PrototypeOutput,
        elastic_deform,
        explain_by_prototypes,
        find_prototypes,
        mnist_conv_decoder,
        mnist_conv_encoder,
    )
    from netwright.explain.tabular import (
        EmbeddingClassifier,
        RuleList,
        SelfAttentionNetwork,
        SurrogateExplainer,
        TabularCAE,
        combine_ranks,
        comprehensiveness,
        permutation_importance,
        sensitivity_importance,
        sufficiency,
    )

__all__ = [
    "EigenCAM",
    "EigenMap",
    "EmbeddingClassifier",
    "GradCAM",
    "LitPrototypeClassifier",
    "NearestCases",
    "PrototypeClassifier",
    "PrototypeLayer",
    "PrototypeLoss",
    "PrototypeOutput",
    "RuleList",
    "SelfAttentionNetwork",
    "SurrogateExplainer",
    "TabularCAE",
    "combine_ranks",
    "comprehensiveness",
    "eigen_cam",
    "elastic_deform",
    "explain_by_prototypes",
    "find_prototypes",
    "grid_of_tokens",
    "largest_component_box",
    "last_conv",
    "last_places",
    "localization_error",
    "mnist_conv_decoder",
    "mnist_conv_encoder",
    "permutation_importance",
    "pointing_game",
    "sensitivity_importance",
    "sufficiency",
    "with_places",
]

__getattr__, __dir__ = exports(__name__, _NAMES, __all__, _MODULES)
