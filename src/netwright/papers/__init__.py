"""The published methods: a card for each, an experiment that tests its claim, and the evidence found so far.

One file is one paper, named by its slug with underscores; it holds ``CARD`` and ``reproduce(run)``. Another
package adds its own through the entry point group ``netwright.papers``, each entry naming such a module.
"""

from netwright.papers.evidence import (
    Evidence,
    Verdict,
    all_of,
    compare,
    decide,
    paired_difference,
    spearman,
)
from netwright.papers.index import Claim, Paper, Reference, cite, get, papers
from netwright.papers.run import Run, list_papers, reproduce

__all__ = [
    "Claim",
    "Evidence",
    "Paper",
    "Reference",
    "Run",
    "Verdict",
    "all_of",
    "cite",
    "compare",
    "decide",
    "get",
    "list_papers",
    "paired_difference",
    "papers",
    "reproduce",
    "spearman",
]
