"""``netwright search``: a search alone, with what there is to see of it; what it finds can be built or designed on."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright import storage
from netwright.console import UserError, note, overall
from netwright.design.budget import RunClock
from netwright.design.pipeline import load_data
from netwright.design.plan import search_plan
from netwright.design.run import RunFolder, find_folder
from netwright.design.search_stage import run_search
from netwright.design.training_stage import Stage
from netwright.design.user_code import SPACE_COPY, keep_space
from netwright.search.result import SearchResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from netwright.design.options import Options

KIND = "search"


def search(options: Options, command: str = "") -> SearchResult:
    """Searches an architecture for a data set and leaves a folder; the same call goes on with it.

    ``genotype.json`` is the architecture, ``search.json`` everything, ``epochs.csv`` the figures of every epoch with
    the skip share, ``alphas.png`` the history of the architecture parameters and ``epochs.png`` losses and skip share.

    Args:
        options: As for a design; those about training are not looked at.
        command: The command line, for the record.

    Raises:
        UserError: For bad input, or a folder of something else.
        FloatingPointError: When a loss or an architecture parameter is no longer finite.
    """
    if options.search == "random" or options.search.endswith(".json"):
        raise UserError(f"there is nothing to search with {options.search}", cure="give it to netwright design")
    run = RunFolder(find_folder(options, KIND), KIND)
    with run.locked():
        run.refuse_strangers(options)
        if run.has("genotype.json"):
            return SearchResult.from_dict(run.read("search.json"))
        clock = RunClock(run)
        data, report = load_data(run, options)
        if not run.has("plan.json"):
            plan = search_plan(options, data)
            note(str(plan))
            run.describe(options, command or f"netwright search {options.data}")
            run.write("data.json", {**report, "counts": data.counts(), "fingerprint": data.fingerprint()})
            run.write("plan.json", plan.to_dict())
            keep_space(options.space, run / SPACE_COPY)
        else:
            plan = run.plan()
        stage = Stage(run, options, data, plan, clock)
        with overall("search", {"search": plan.search["seconds"]}) as total, total.stage("search"):
            try:
                genotype = run_search(stage)
            finally:
                clock.save()
        result = SearchResult.from_dict(run.read("search.json"))
        _leave(run, result)
        genotype.save(run / "genotype.json")  # the last: it says that all is there
    return result


def _leave(run: RunFolder, result: SearchResult) -> None:
    from netwright.search.history import paint_alphas, paint_epochs, size_of

    storage.write_text(run / "epochs.csv", table_of(result))
    _picture(run / "alphas.png", size_of(result), lambda figure: paint_alphas(result, figure))
    _picture(run / "epochs.png", (6.0, 4.5), lambda figure: paint_epochs(result, figure))


def table_of(result: SearchResult) -> str:
    """The figures of every epoch as CSV: ``epoch``, ``skip_share``, and whatever the method told.

    Example:
        >>> from netwright.search import DARTS_V1
        >>> print(table_of(SearchResult(DARTS_V1, skip_share=(0.25,), epochs=({"skip_share": 0.25, "lr": 0.1},))))
        epoch,skip_share,lr
        1,0.25,0.1
        <BLANKLINE>
    """
    names = list(dict.fromkeys(["skip_share", *(name for epoch in result.epochs for name in epoch)]))
    out = io.StringIO()
    writer = csv.DictWriter(out, ["epoch", *names], lineterminator="\n")
    writer.writeheader()
    for number, figures in enumerate(result.epochs, 1):
        writer.writerow({"epoch": number, **figures})
    return out.getvalue()


def _picture(path: Path, size: tuple[float, float], paint: Callable[[Figure], Any]) -> None:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=size, layout="constrained", dpi=150)
    paint(figure)
    with storage.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
