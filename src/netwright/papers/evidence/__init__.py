"""Evidence for a paper's claims: every arm's figures for every seed, and verdicts computed from them."""

from netwright.papers.evidence.record import Evidence, Setting
from netwright.papers.evidence.statistics import (
    Difference,
    Outcome,
    Values,
    Verdict,
    all_of,
    bootstrap,
    compare,
    decide,
    fisher_exact,
    independent_difference,
    mean,
    paired_difference,
    sign_test,
    spearman,
    standard_error,
)

__all__ = [
    "Difference",
    "Evidence",
    "Outcome",
    "Setting",
    "Values",
    "Verdict",
    "all_of",
    "bootstrap",
    "compare",
    "decide",
    "fisher_exact",
    "independent_difference",
    "mean",
    "paired_difference",
    "sign_test",
    "spearman",
    "standard_error",
]
