"""Verbs about papers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from netwright.cli.common import Debug, Family, Jobs, Json, Quiet, guarded, show


def papers(family: Family = None, as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """All published methods, with what their reproductions found here."""
    with guarded(quiet, debug):
        from netwright.console import table
        from netwright.papers import list_papers

        rows = list_papers(family)

        def text() -> str:
            names = ("slug", "verdict", "budget", "seeds", "seconds", "title")
            return table([[_cell(row[name]) for name in names] for row in rows], names)

        show(rows, as_json, text)


def _cell(value: Any) -> object:
    if value is None:
        return "-"
    return f"{value:.0f}" if isinstance(value, float) else value if isinstance(value, (int, str)) else len(value)


def reproduce(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="SLUG...", help="Papers, as netwright papers lists them, or all.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="Compare all methods of a family (search); no SLUG then.")] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="A few seconds in place of minutes; no verdict to publish.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds.")] = None,
    scale: Annotated[float, typer.Option(help="Multiplies data and epochs, for larger machines.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Folder of the evidence.  [reproduce/SLUG]")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep full evidence in the package itself.")] = False,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, or local.")] = None,
    jobs: Jobs = 1,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run the experiments that test papers' claims, or compare a family. Exit 0 whatever is found; a rerun goes on."""
    with guarded(quiet, debug):
        from netwright.papers import reproduce as run_papers

        found = run_papers(
            slugs or (),
            fast=fast,
            seeds=seeds,
            scale=scale,
            jobs=jobs,
            ray=ray,
            out=out,
            record=record,
            family=family,
        )
        show([evidence.to_dict() for evidence in found], as_json, lambda: "\n\n".join(map(str, found)))


def cite(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A paper's slug, or a public name of netwright.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """BibTeX for a method."""
    with guarded(quiet, debug):
        from netwright.papers.index import cite as bibtex

        entry = bibtex(name)
        show({"name": name, "bibtex": entry}, as_json, lambda: entry)
