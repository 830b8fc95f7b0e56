"""Writes what comes from cards and evidence: docs/methods/, docs/reproduced.md, and README.md's table.

A family's comparison becomes docs/methods/family-NAME.md, which a page of the guide includes.

    python scripts/method_pages.py            writes them
    python scripts/method_pages.py --check    writes nothing; exits 1 when README.md's table is stale

The table stands between the markers <!-- evidence --> and <!-- /evidence -->. It ends with a digest of every
figure, so that a figure changed anywhere in the evidence makes the table stale.
"""

from __future__ import annotations

import argparse
import html
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from netwright.console import clock
from netwright.papers.evidence import Evidence, Verdict, mean, standard_error
from netwright.papers.index import Paper, comparisons, module_of, papers
from netwright.papers.run import published
from netwright.results import save_figure
from netwright.storage import digest, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

START, END = "<!-- evidence -->", "<!-- /evidence -->"
ROOT = Path(__file__).resolve().parents[1]
RULE = (
    "A claim is supported when the 90 % bootstrap interval over paired seeds (or the rule named beside it) "
    "lies wholly on the claimed side, not supported when it lies wholly on the other, else inconclusive. "
    "Sizes are far below the papers': see each page."
)


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def figure(claim: Verdict) -> str:
    """The figure of a claim with its interval."""
    if claim.statistic is None:
        return "no figure"
    interval = f" [{claim.interval[0]:.4g}, {claim.interval[1]:.4g}]" if claim.interval else ""
    return f"{claim.statistic:.4g}{interval}"


def address(card: Paper) -> str:
    """Where the paper is on the web."""
    return f"https://arxiv.org/abs/{card.arxiv}" if card.arxiv else f"https://doi.org/{card.doi}"


def link(card: Paper) -> str:
    """The paper's number, linked."""
    return f"[{f'arXiv:{card.arxiv}' if card.arxiv else f'doi:{card.doi}'}]({address(card)})"


def readme_table(found: Sequence[tuple[Paper, Evidence | None]]) -> str:
    """The table of README.md: a row a paper, whatever its verdict."""
    rows = []
    for card, evidence in found:
        name = f"[{card.title}]({address(card)})"
        command = f"`netwright reproduce {card.slug}`"
        if evidence is None:
            rows.append([name, "no full run yet", "", "", command])
            continue
        gated = [claim for claim in evidence.claims.values() if claim.gated]
        held = sum(claim.verdict == "supported" for claim in gated)
        told = "<br>".join(
            f"{html.escape(claim.text, quote=False)} **{claim.verdict}**, {figure(claim)}" for claim in gated
        )
        measured = f"<details><summary>{held} of {len(gated)} hold</summary>{told}</details>"
        spent = f"{len(evidence.seeds)} seeds, {clock(evidence.seconds)}"
        rows.append([name, f"**{evidence.verdict}**", measured, spent, command])
    body = table(["paper", "verdict", "gated claims (open for figures)", "budget", "again"], rows)
    stamp = digest([evidence.to_dict() for _, evidence in found if evidence is not None])
    return f"{body}\n\n{RULE}\n<!-- digest of the evidence: {stamp} -->"


def reproduced_page(found: Sequence[tuple[Paper, Evidence | None]]) -> str:
    """docs/reproduced.md: every claim of every paper."""
    rows = []
    for card, evidence in found:
        name = f"[{card.slug}](methods/{card.slug}.md)"
        if evidence is None:
            rows += [[name, claim.text, "no full run yet", "", ""] for claim in card.claims]
            continue
        for claim in evidence.claims.values():
            gate = "gated" if claim.gated else "reported only"
            rows.append([name, claim.text, f"**{claim.verdict}**", figure(claim), gate])
    verdicts = [evidence.verdict for _, evidence in found if evidence is not None]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("supported", "not supported", "inconclusive"))
    head = f"{len(found)} papers: {counts}, {len(found) - len(verdicts)} without a full run."
    body = table(["paper", "claim", "verdict", "figure", "weight"], rows)
    return f"# Reproduced claims\n\n{head}\n\n{RULE}\n\n{body}\n"


def method_page(card: Paper, evidence: Evidence | None, own: Mapping[str, str]) -> str:
    """docs/methods/SLUG.md: what it is, how to use and cite it, and what was found; ``own`` pictures by file."""
    where = "; ".join(part for part in (", ".join(card.authors), card.venue, str(card.year), link(card)) if part)
    module, _, name = card.method.partition(":")
    parts = [
        f"# {card.title}",
        where + ".",
        card.summary,
        f"```python\nfrom {module} import {name}\n```",
        f"::: {module}.{name}",
        "## Reproduction",
        (inspect.getdoc(module_of(card.slug)) or "").strip(),
        f"```\nnetwright reproduce {card.slug} --fast\nnetwright reproduce {card.slug}\n```",
    ]
    if evidence is None:
        claims = [[claim.key, claim.text, "gated" if claim.gated else "reported only"] for claim in card.claims]
        parts += [table(["claim", "in words", "weight"], claims), "No full run is recorded yet."]
    else:
        parts += evidence_parts(evidence, [f"![{caption}]({name})\n\n{caption}" for name, caption in own.items()])
    return "\n\n".join([*parts, "## Citation", f"```bibtex\n{card.bibtex()}\n```"]) + "\n"


def pictures(card: Paper, evidence: Evidence) -> list[tuple[str, str, Figure]]:
    """Pictures that a paper's experiment has of its own: the file's name, the caption, the picture."""
    drawn = getattr(module_of(card.slug), "pictures", None)
    found = {} if drawn is None else drawn(evidence)
    return [(f"{card.slug}-{n}.svg", caption, picture) for n, (caption, picture) in enumerate(found.items(), 1)]


def values(figures: Sequence[float | None]) -> str:
    """Mean and standard error of one figure over the seeds."""
    error = standard_error(figures)
    return f"{mean(figures):.4g}" + (f" ± {error:.2g}" if math.isfinite(error) else "")


def claims_table(evidence: Evidence) -> str:
    """Every claim with its verdict."""
    rows = [
        [claim.text, f"**{claim.verdict}**", figure(claim), claim.reason, "gated" if claim.gated else "reported only"]
        for claim in evidence.claims.values()
    ]
    return table(["claim", "verdict", "figure", "rule", "weight"], rows)


def evidence_parts(evidence: Evidence, shown: Sequence[str] = ()) -> list[str]:
    """The evidence as Markdown, with more pictures after that of the arms."""
    metrics = list(dict.fromkeys(name for figures in evidence.figures.values() for name in figures))
    arms = [
        [arm, *(values(figures[name]) if name in figures else "" for name in metrics)]
        for arm, figures in evidence.figures.items()
    ]
    return [
        f"**{evidence.verdict}**",
        claims_table(evidence),
        f"![Every arm and seed]({evidence.slug}.svg)",
        "Every dot is a seed; the diamond is the mean, the bar its 90 % bootstrap interval.",
        *shown,
        table(["arm (mean ± standard error)", *metrics], arms),
        *provenance_parts(evidence),
    ]


def provenance_parts(evidence: Evidence) -> list[str]:
    """Sizes, and how the evidence was made."""
    sizes = [[name, f"{s.used:g}", f"{s.specified:g}"] for name, s in evidence.settings.items()]
    facts = evidence.machine | evidence.versions
    made = (
        f"Made on {evidence.date} with `{evidence.command}` at {evidence.commit} in "
        f"{clock(evidence.seconds)}, {len(evidence.seeds)} seeds. "
        + ", ".join(f"{name} {value}" for name, value in facts.items())
        + "."
    )
    return [*([table(["size", "used", "specified"], sizes)] if sizes else []), made]


def family_part(module: ModuleType, evidence: Evidence | None) -> str:
    """docs/methods/family-NAME.md: what is compared, and what was found."""
    card = module.CARD
    parts = [
        (inspect.getdoc(module) or "").strip(),
        f"```bash\nnetwright reproduce --family {card.family} --fast\n"
        f"netwright reproduce --family {card.family} --jobs 2\n```",
    ]
    if evidence is None:
        return "\n\n".join([*parts, "No full run is recorded yet."]) + "\n"
    parts += [
        f"![Percentiles of all methods](../methods/{card.slug}.svg)",
        "Every dot is a seed; the diamond is the mean, the bar its 90 % bootstrap interval, the line the median of the "
        "table.",
        table(module.COLUMNS, module.ranking(evidence)),
        claims_table(evidence),
        *provenance_parts(evidence),
    ]
    return "\n\n".join(parts) + "\n"


def with_table(readme: str, body: str) -> str:
    """README's text with the table between the markers replaced."""
    if readme.count(START) != 1 or readme.count(END) != 1 or readme.index(START) > readme.index(END):
        raise SystemExit(f"README.md must hold {START} and then {END}, each once")
    return readme.partition(START)[0] + f"{START}\n{body}\n{END}" + readme.partition(END)[2]


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    """Writes the pages, or checks the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when README.md's table is stale")
    check = parser.parse_args(arguments).check
    found = [(card, published(card.slug)) for card in papers()]
    readme = (root / "README.md").read_text(encoding="utf-8")
    fresh = with_table(readme, readme_table(found))
    if check:
        if fresh != readme:
            print(
                "README.md's table is not that of the evidence: run python scripts/method_pages.py",
                file=sys.stderr,
            )
        return int(fresh != readme)
    if fresh != readme:
        write_text(root / "README.md", fresh)
    write_text(root / "docs" / "reproduced.md", reproduced_page(found))
    for card, evidence in found:
        drawn = [] if evidence is None else pictures(card, evidence)
        own = {name: caption for name, caption, _ in drawn}
        write_text(root / "docs" / "methods" / f"{card.slug}.md", method_page(card, evidence, own))
        if evidence is not None:
            save_figure(evidence.plot().get_figure(root=True), root / "docs" / "methods" / f"{card.slug}.svg")
            for name, _, picture in drawn:
                save_figure(picture, root / "docs" / "methods" / name)
    for module in comparisons().values():
        evidence = published(module.CARD.slug)
        write_text(root / "docs" / "methods" / f"{module.CARD.slug}.md", family_part(module, evidence))
        if evidence is not None:
            save_figure(module.figure(evidence), root / "docs" / "methods" / f"{module.CARD.slug}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
