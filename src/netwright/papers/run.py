"""Running reproductions: budgets, arms kept as they finish, and the facts that go beside the figures.

An experiment is a module with ``CARD`` and ``reproduce(run) -> Evidence``::

    def reproduce(run: Run) -> Evidence:
        epochs = run.size("epochs", full=25, fast=2, specified=300)
        arms = run.arms({"plain": (epochs, 0.0), "noise": (epochs, 0.01)}, _train)
        return run.evidence(arms, {"gain": compare(arms["noise"]["accuracy"], arms["plain"]["accuracy"])})
"""

from __future__ import annotations

import datetime
import inspect
import math
import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from netwright.console import UserError, nearest, note
from netwright.papers.evidence import Evidence, Setting, Verdict
from netwright.papers.index import Comparison, Paper, comparison, get, module_of, papers
from netwright.papers.provenance import commit, machine, sources, versions
from netwright.parallel import run_all
from netwright.results import plain
from netwright.storage import digest, file_digest, lock, read_json, write_json

PUBLISHED_SEEDS = 3
Arms = dict[str, dict[str, list[Any]]]


class Run:
    """One reproduction under way: its budget, and the arms that are finished.

    Args:
        slug: The paper, or the comparison of a family (``family-search``).
        fast: The budget of seconds on one thread instead of minutes on two cores.
        seeds: How many seeds; the card's number by default.
        scale: Multiplies the sizes of :meth:`size`, for a larger machine.
        jobs: Arms and seeds trained at once, in processes; -1 uses every core.
        ray: Address of a Ray cluster to spread them over.
        out: Folder that keeps finished arms and the evidence; ``reproduce/SLUG`` by default.

    Attributes:
        seeds: The seeds as a tuple, ``(0, 1, ...)``.
        settings: What :meth:`size` has been asked for.

    Raises:
        UserError: If the slug is unknown, or a number is out of its range.
    """

    def __init__(
        self,
        slug: str,
        *,
        fast: bool = False,
        seeds: int | None = None,
        scale: float = 1.0,
        jobs: int = 1,
        ray: str | None = None,
        out: str | os.PathLike[str] | None = None,
    ):
        self.card: Paper | Comparison = module_of(slug).CARD
        count = (self.card.fast_seeds if fast else self.card.seeds) if seeds is None else seeds
        if count < 1:
            raise UserError(f"seeds must be >= 1, got {count}", cure="give a whole number of seeds with --seeds")
        if jobs == 0 or jobs < -1:
            raise UserError(f"jobs must be >= 1, or -1 for every core, got {jobs}")
        if not 0 < scale < math.inf:
            raise UserError(
                f"scale must be > 0 and finite, got {scale}", cure="give --scale 1, or 4 on a larger machine"
            )
        self.slug, self.fast, self.scale, self.jobs, self.ray = slug, fast, float(scale), jobs, ray
        self.seeds = tuple(range(count))
        self.out = Path("reproduce") / slug if out is None else Path(out)
        self.settings: dict[str, Setting] = {}
        self._asked_seeds = seeds
        self._start, self._earlier = time.monotonic(), 0.0
        self._owner = digest(sources(), _module_digest(slug))

    def size(self, name: str, *, full: float, fast: float, specified: float | None = None, scaled: bool = True) -> int:
        """A whole number that depends on the budget, noted in the evidence beside the specification's.

        Args:
            name: What is counted: ``"training images"``.
            full: Its value in a full run of scale 1.
            fast: Its value in a fast run.
            specified: What the specification or the paper uses, where a larger scale stops; else ``full``.
            scaled: Whether ``scale`` multiplies it.

        Raises:
            ValueError: If the value is below 1.
        """
        wanted = full if specified is None else specified
        value = fast if self.fast else full
        if scaled and self.scale != 1:
            # A scale above 1 buys back what was shrunk, never more than the specification's size.
            value = min(value * self.scale, max(wanted, value)) if self.scale > 1 else max(1, value * self.scale)
        if round(value) < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
        self.settings[name] = Setting(used=round(value), specified=wanted)
        return round(value)

    def arm(self, name: str, seed: int, function: Callable[..., Mapping[str, Any]], *args: Any) -> dict[str, Any]:
        """One arm for one seed: ``function(seed, *args)``, or what an earlier sitting kept of it.

        The figures are kept when seed, arguments, budget and netwright's source are the same.

        Raises:
            TypeError: If an argument or a figure is no plain JSON value.
        """
        return self._figures([(name, seed, args)], function)[0]

    def arms(
        self,
        arms: Mapping[str, Sequence[Any]],
        function: Callable[..., Mapping[str, Any]],
        *,
        seeds: Sequence[int] | None = None,
    ) -> Arms:
        """Every arm for every seed, ``jobs`` at once; finished ones are kept on disk as they finish.

        Args:
            arms: Name to the arguments after the seed, plain JSON values.
            function: ``function(seed, *arguments)`` of module level, which returns figures by name.
            seeds: Other seeds than the run's; fewer for an arm that is costly or does not depend on them.

        Returns:
            ``figures[arm][metric]``, a list with one value a seed (None where a seed lacks the metric).

        Raises:
            TypeError: If an argument or a figure is no plain JSON value.
        """
        chosen = self.seeds if seeds is None else tuple(seeds)
        found = iter(self._figures([(name, seed, args) for name, args in arms.items() for seed in chosen], function))
        rows = {name: [next(found) for _ in chosen] for name in arms}
        return {
            name: {
                metric: [row.get(metric) for row in each] for metric in dict.fromkeys(k for row in each for k in row)
            }
            for name, each in rows.items()
        }

    def arms_by_seed(
        self, arms: Mapping[str, Sequence[Sequence[Any]]], function: Callable[..., Mapping[str, Any]]
    ) -> Arms:
        """Arms whose arguments differ from seed to seed: what was found with it, say.

        Args:
            arms: Name to the arguments for each of the run's seeds.
            function: As for :meth:`arms`.

        Raises:
            ValueError: If an arm has not one list of arguments a seed.
            TypeError: If an argument or a figure is no plain JSON value.
        """
        for name, each in arms.items():
            if len(each) != len(self.seeds):
                raise ValueError(f"arm {name!r} must have arguments for {len(self.seeds)} seeds, got {len(each)}")
        found: Arms = {}
        for place, seed in enumerate(self.seeds):
            one = self.arms({name: each[place] for name, each in arms.items()}, function, seeds=[seed])
            for name, metrics in one.items():
                for metric, values in metrics.items():
                    found.setdefault(name, {}).setdefault(metric, []).extend(values)
        return found

    def _figures(
        self, wanted: list[tuple[str, int, Sequence[Any]]], function: Callable[..., Any]
    ) -> list[dict[str, Any]]:
        calls = []
        for name, seed, args in wanted:
            key = digest(self._owner, self.slug, name, seed, function.__qualname__, _json(name, list(args)), self.fast)
            calls.append((str(self._path(name, seed)), key, function, seed, tuple(args)))
        kept = [_kept(path, key) for path, key, *_ in calls]
        missing = [call for call, found in zip(calls, kept, strict=True) if found is None]
        self._earlier += sum(found["seconds"] for found in kept if found) / max(1, self.jobs)
        if missing and len(missing) < len(calls):
            note(f"{self.slug}: {len(calls) - len(missing)} of {len(calls)} trials are there already")
        done = iter(run_all(_one, missing, jobs=self.jobs, ray=self.ray, description=self.slug))
        records = [next(done) if found is None else found for found in kept]
        for (path, key, *_), record in zip(calls, records, strict=True):
            # A worker on another machine cannot see the folder.
            if _kept(path, key) is None:
                write_json(path, record)
        return [record["figures"] for record in records]

    def evidence(self, arms: Arms, verdicts: Mapping[str, Verdict]) -> Evidence:
        """The record of this run, with the card's claims beside their verdicts and the facts of the machine.

        Raises:
            ValueError: If the verdicts are not exactly those of the card's claims.
        """
        claims = {claim.key: claim for claim in self.card.claims}
        if set(verdicts) != set(claims):
            raise ValueError(f"verdicts must be those of {sorted(claims)}, got {sorted(verdicts)}")
        numeric = {arm: {k: v for k, v in metrics.items() if _is_figure(v)} for arm, metrics in arms.items()}
        other = {arm: {k: v for k, v in metrics.items() if not _is_figure(v)} for arm, metrics in arms.items()}
        return Evidence(
            slug=self.slug,
            title=self.card.title,
            budget="fast" if self.fast else "full",
            seeds=self.seeds,
            figures=numeric,
            claims={key: _with_claim(verdicts[key], claim.text, claim.gated) for key, claim in claims.items()},
            metric=self.card.metric,
            details={arm: values for arm, values in other.items() if values},
            settings=dict(self.settings),
            machine=machine(),
            versions=versions(),
            seconds=round(time.monotonic() - self._start + self._earlier, 1),
            command=self.command(),
            commit=commit(),
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        )

    def command(self) -> str:
        """What to type for the same run; without ``--out``, which names a private folder."""
        named = ["--family", self.card.family] if isinstance(self.card, Comparison) else [self.slug]
        words = ["netwright", "reproduce", *named, *(["--fast"] if self.fast else [])]
        words += ["--seeds", str(self._asked_seeds)] if self._asked_seeds is not None else []
        words += ["--scale", f"{self.scale:g}"] if self.scale != 1 else []
        words += ["--jobs", str(self.jobs)] if self.jobs != 1 else []
        return shlex.join(words)

    @property
    def file(self) -> Path:
        """Where the evidence goes: a fast run never replaces a full one's."""
        return self.out / ("evidence-fast.json" if self.fast else "evidence.json")

    def _path(self, name: str, seed: int) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        budget = "fast" if self.fast else "full"
        return self.out / "arms" / f"{safe}-{digest(name)[:6]}.{budget}.{seed}.json"


def _one(path: str, key: str, function: Callable[..., Any], seed: int, args: tuple[Any, ...]) -> dict[str, Any]:
    start = time.monotonic()
    figures = plain(dict(function(seed, *args)))
    _json(path, figures)
    record = {"key": key, "seconds": round(time.monotonic() - start, 2), "figures": figures}
    if Path(path).parent.is_dir():
        write_json(path, record)
    return record


def _kept(path: str, key: str) -> dict[str, Any] | None:
    try:
        record = read_json(path)
    except UserError:
        return None
    whole = isinstance(record, dict) and record.get("key") == key and isinstance(record.get("figures"), dict)
    return record if whole and isinstance(record.get("seconds"), (int, float)) else None


def _json(name: str, value: Any) -> Any:
    """The value, when it is plain JSON: a digest of anything else would not tell two values apart."""
    if isinstance(value, (list, tuple)):
        return [_json(name, item) for item in value]
    if isinstance(value, dict):
        return {str(k): _json(name, item) for k, item in value.items()}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"arm {name!r} must be given and return plain JSON values, got a {type(value).__name__}")


def _is_figure(values: list[Any]) -> bool:
    return all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in values)


def _with_claim(verdict: Verdict, text: str, gated: bool) -> Verdict:
    return Verdict(verdict.verdict, verdict.statistic, verdict.interval, verdict.reason, text, gated)


def _module_digest(slug: str) -> str:
    file = inspect.getsourcefile(module_of(slug))
    return file_digest(file) if file is not None and Path(file).is_file() else ""


def published_path(slug: str) -> Path:
    """Where the evidence of a full run is published: in ``results/`` beside the module of the card."""
    return Path(inspect.getsourcefile(module_of(slug)) or __file__).parent / "results" / f"{slug}.json"


def published(slug: str) -> Evidence | None:
    """The published evidence of a paper, or None while there is none.

    Raises:
        UserError: If the slug is unknown or the file is damaged.
    """
    path = published_path(slug)
    return Evidence.load(path) if path.is_file() else None


def list_papers(family: str | None = None) -> list[dict[str, Any]]:
    """One dictionary a paper for tables and ``--json``, with the published verdict or None.

    Args:
        family: Only papers whose method lives in this package: ``"search"``.

    Raises:
        UserError: If no paper is of that family, or a published file is damaged.

    Example:
        >>> [row["method"] for row in list_papers() if row["slug"] == "dass"]
        ['netwright.search.dass:DASS']
    """
    rows: list[dict[str, Any]] = []
    for card in papers():
        if family is not None and card.family != family:
            continue
        found = published(card.slug)
        rows.append(
            {
                "slug": card.slug,
                "title": card.title,
                "year": card.year,
                "arxiv": card.arxiv,
                "doi": card.doi,
                "family": card.family,
                "method": card.method,
                "summary": card.summary,
                "verdict": found.verdict if found else None,
                "claims": {key: claim.verdict for key, claim in found.claims.items()} if found else {},
                "budget": found.budget if found else None,
                "seeds": len(found.seeds) if found else None,
                "seconds": found.seconds if found else None,
            }
        )
    if family is not None and not rows:
        raise UserError(f"no paper is of the family {family!r}", cure=nearest(family, {p.family for p in papers()}))
    return rows


def reproduce(
    slugs: Iterable[str] = (),
    *,
    fast: bool = False,
    seeds: int | None = None,
    jobs: int = 1,
    ray: str | None = None,
    out: str | os.PathLike[str] | None = None,
    scale: float = 1.0,
    record: bool = False,
    family: str | None = None,
) -> list[Evidence]:
    """Reproduces papers one after another, or compares the methods of a family, and writes the evidence.

    An interrupted reproduction goes on when it is started again with the same budget and folder.

    Args:
        slugs: The papers, or ``"all"``.
        fast: Seconds on one thread instead of minutes on two cores.
        seeds: How many seeds; each card's number by default.
        jobs: Arms and seeds at once.
        ray: Address of a Ray cluster.
        out: Folder of one paper, or of several, each in a folder of its own; ``reproduce/SLUG`` by default.
        scale: Multiplies data and epochs, for a larger machine.
        record: Also publish the evidence with the package; only for full runs of at least three seeds.
        family: The family whose methods are compared, ``"search"``, instead of papers.

    Returns:
        The evidence of each paper, in order, or of the comparison; a claim that fails is a result, not an error.

    Raises:
        UserError: If a name is unknown, nothing is asked for, papers and a family are, the folder is in use or another
            paper's, or a run that is not full is to be recorded.
    """
    chosen = _chosen(slugs, family)
    if record and (fast or scale < 1 or (seeds is not None and seeds < PUBLISHED_SEEDS)):
        raise UserError(
            f"only a full run of at least {PUBLISHED_SEEDS} seeds is recorded",
            cure="leave --record away, or run without --fast and --scale below 1, with --seeds 3 or more",
        )
    found = []
    for slug in chosen:
        folder = None if out is None else Path(out) if len(chosen) == 1 else Path(out) / slug
        found.append(_reproduce(Run(slug, fast=fast, seeds=seeds, scale=scale, jobs=jobs, ray=ray, out=folder), record))
    return found


def _chosen(slugs: Iterable[str], family: str | None) -> list[str]:
    asked = [slugs] if isinstance(slugs, str) else list(slugs)
    if family is not None:
        if asked:
            raise UserError(
                f"a family is compared as a whole, got {', '.join(asked)} beside it",
                cure="leave out either the papers or --family",
            )
        return [comparison(family).slug]
    if asked == ["all"]:
        asked = [card.slug for card in papers()]
    if not asked:
        raise UserError(
            "no paper was named",
            cure="name one of `netwright papers`, all of them with: all, or a family with --family",
        )
    return [get(slug).slug for slug in dict.fromkeys(asked)]


def _reproduce(run: Run, record: bool) -> Evidence:
    owner = run.out / "paper.json"
    try:
        (run.out / "arms").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder: {error.strerror}", where=run.out, cure="choose another --out"
        ) from error
    with lock(run.out):
        if owner.exists() and (other := read_json(owner)) != {"paper": run.slug}:
            raise UserError(f"the folder belongs to {other}", where=run.out, cure="choose another folder with --out")
        write_json(owner, {"paper": run.slug})
        evidence = module_of(run.slug).reproduce(run)
        evidence.save(run.file)
        if record:
            evidence.save(published_path(run.slug))
    return evidence
