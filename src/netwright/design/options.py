"""Everything that a design run can be told, in one frozen object that is saved with the run and replays it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from netwright.console import UserError, nearest
from netwright.results import Result

PRUNING = ("magnitude", "hydra")  # those of netwright.compress whose phases a run knows
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

# What changes where or how fast a run is computed, not what it computes: free to differ when a run is taken up again.
MOVABLE = ("out", "devices", "nodes", "strategy", "jobs", "download")
# What runs of earlier versions did not have: left out where it is not given, so that they can be taken up again.
LATER = ("select", "latency_ms", "latency_table", "sample_epochs", "flops", "train_method")


@dataclasses.dataclass(frozen=True)
class Options(Result):
    """The options of ``netwright design``; see ``netwright design --help`` for each.

    Raises:
        UserError: If a value is out of its range, naming the option, the bound and the value.

    Example:
        >>> Options(data="digits").sparsity
        0.95
        >>> Options(data="digits", sparsity=1.0)
        Traceback (most recent call last):
        ...
        netwright.console.UserError: sparsity must lie in [0, 1), got 1.0
          do 0.95 keeps one weight in twenty
    """

    data: str
    sparsity: float = 0.95
    time_budget: float | None = None
    accuracy_goal: float | None = None
    search: str = "dass"
    space: str = "micro-darts"
    select: str | None = None
    sample_epochs: int | None = None
    latency_ms: float | None = None
    latency_table: str | None = None
    flops: float | None = None
    train_method: tuple[str, ...] = ()
    pruning: str = "magnitude"
    baseline: str = "mobilenet_v2"
    seed: int = 0
    size: int | None = None
    channels: int | None = None
    cells: int | None = None
    search_channels: int | None = None
    search_epochs: int | None = None
    epochs: int | None = None
    batch_size: int = 64
    lr: float = 0.1
    skip_broken: bool = False
    drop_unknown: bool = False
    download: bool = False
    logger: str = "csv"
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"
    jobs: int = 1
    out: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UserError(f"sparsity must lie in [0, 1), got {self.sparsity}", cure="0.95 keeps one weight in twenty")
        if self.time_budget is not None and not self.time_budget > 0:
            raise UserError(f"time budget must be > 0 s, got {self.time_budget}", cure="for example --time-budget 10m")
        if self.accuracy_goal is not None and not 0 < self.accuracy_goal <= 1:
            raise UserError(f"accuracy must lie in (0, 1], got {self.accuracy_goal}", cure="for example --accuracy 0.9")
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr must be {'finite' if self.lr == math.inf else '> 0'}, got {self.lr}")
        if self.seed < 0:
            raise UserError(f"seed must be >= 0, got {self.seed}")
        for name in ("latency_ms", "flops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name.replace('_', '-')} must be > 0 and finite, got {value}")
        for name in ("size", "channels", "cells", "search_channels", "search_epochs", "epochs", "sample_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {value}")
        if self.batch_size < 2:
            raise UserError(f"batch-size must be >= 2 (batch norm needs two examples), got {self.batch_size}")
        self._check_table()
        self._check_processes()
        self._check_names()

    def _check_table(self) -> None:
        if self.latency_table is None:
            return
        if self.latency_ms is None:
            raise UserError("latency-table has no meaning without a limit", cure="add --latency-ms")
        if not Path(self.latency_table).is_file():
            raise UserError("no such file", where=self.latency_table, cure="write it with netwright latency-table")

    def _check_processes(self) -> None:
        if self.devices < 1 or self.nodes < 1:
            raise UserError(f"devices and nodes must be >= 1, got {self.devices} and {self.nodes}")
        if self.jobs == 0 or self.jobs < -1:
            raise UserError(f"jobs must be >= 1, or -1 for every core, got {self.jobs}")
        if self.batch_size % (self.devices * self.nodes):
            raise UserError(
                f"batch-size must be a multiple of all processes ({self.devices * self.nodes}), got {self.batch_size}"
            )

    def _check_names(self) -> None:
        from netwright.search import METHODS as SEARCH
        from netwright.search import SELECTORS

        choices: dict[str, Collection[str]] = {
            "search": SEARCH,
            "pruning": PRUNING,
            "strategy": ("auto", "ddp", "fsdp"),
            "logger": ("csv", "tensorboard", "none"),
        }
        if self.select is not None:
            choices["select"] = SELECTORS
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"unknown --{name} {value!r}", cure=nearest(value, known))
        self._check_space()
        self._check_fit()
        self._check_samples()
        if self.select is not None:
            self._check_selector(self.select)
        from netwright.train import PRETRAINING
        from netwright.train.methods import parse, prepares

        for text in self.train_method:
            if parse(text)[0] in PRETRAINING:
                raise UserError(f"{text} trains without labels", cure="use it with netwright train, alone")
        if self.time_budget is not None and (found := prepares(self.train_method)):
            raise UserError(
                f"{found[0]} learns something of the data first, for as long as it takes: no time budget holds with it",
                cure="leave out one of the two",
            )

    def _check_fit(self) -> None:
        from netwright.design.user_code import open_space
        from netwright.search import method, spaces

        searcher = method(self.search)

        def refusal(space: str) -> str:
            try:
                searcher.fits(open_space(space))
            except ValueError as error:
                return str(error)
            return ""

        if self.search != "random" and (why := refusal(self.space)):
            fitting = [name for name in spaces.SPACES if not refusal(name)]
            raise UserError(
                f"{self.search} cannot search the space {self.space}: {why}",
                cure=f"add --space with one of {', '.join(fitting)}",
            )

    def _check_space(self) -> None:
        from netwright.design.user_code import open_space, sizes_of

        space = open_space(self.space)
        for name, size in (("channels", "channels"), ("search_channels", "channels"), ("cells", "cells")):
            if getattr(self, name) is not None and not sizes_of(space, **{size: 1}):
                raise UserError(f"{name.replace('_', '-')} has no meaning: the networks of {space.name} have no {size}")

    def _check_samples(self) -> None:
        if self.sample_epochs is None:
            return
        if (self.select or ("sample" if self.search == "fbnet" else None)) != "sample":
            raise UserError("sample-epochs has no meaning without samples", cure="add --select sample")
        if self.time_budget is not None:
            raise UserError(
                "samples are trained for as long as it takes: no time budget holds", cure="leave out one of the two"
            )
        if self.devices * self.nodes > 1:
            raise UserError("sample-epochs works with one process", cure="leave out --devices and --nodes")

    def _check_selector(self, name: str) -> None:
        if self.search == "random":
            raise UserError("select has no meaning with --search random, which draws its architecture")
        from netwright.design.user_code import open_space
        from netwright.search import method
        from netwright.search.brief import refuse

        if name not in (useful := method(self.search).selectors):
            raise UserError(
                f"select {name!r} has no meaning after {self.search}, which leaves no mixing weights to select by",
                cure=f"leave it out, or take {' or '.join(useful)}",
            )
        try:
            refuse(name, open_space(self.space), limited=self.latency_ms is not None or self.flops is not None)
        except ValueError as error:
            raise UserError(str(error)) from None

    def identity(self) -> dict[str, Any]:
        """What decides the outcome: two runs with equal identity are the same run."""
        from netwright.design.user_code import space_digest
        from netwright.storage import file_digest

        left_out = {*MOVABLE, *(name for name in LATER if getattr(self, name) in (None, ()))}
        found = {name: value for name, value in self.to_dict().items() if name not in left_out}
        # Of a file it is the content that decides.
        if self.latency_table is not None:
            found["latency_table"] = file_digest(self.latency_table)
        if (digest := space_digest(self.space)) is not None:
            found |= {"space": Path(self.space).name, "space_digest": digest}
        return found


def duration(text: str | float) -> float:
    """Seconds of ``"90"``, ``"90s"``, ``"15m"`` or ``"1h30m"``.

    Raises:
        UserError: If the text is no duration.

    Example:
        >>> duration("15m"), duration("1h30m"), duration("90")
        (900.0, 5400.0, 90.0)
    """
    if isinstance(text, (int, float)):
        return float(text)
    compact = text.strip().lower().replace(" ", "")
    if re.fullmatch(r"\d+(\.\d+)?", compact):
        return float(compact)
    parts = re.findall(r"(\d+(?:\.\d+)?)(s|m|h|d)(?:in|ec)?", compact)
    if not parts or not re.fullmatch(r"(\d+(\.\d+)?(s|sec|m|min|h|d))+", compact):
        raise UserError(f"not a duration: {text!r}", cure="write it like 90s, 15m or 1h30m")
    return float(sum(float(number) * _UNITS[unit] for number, unit in parts))


def quantity(text: str | float) -> float:
    """The number of ``"5000000"``, ``"5e6"``, ``"5M"`` or ``"1.2G"``.

    Raises:
        UserError: If the text is no number.

    Example:
        >>> quantity("5M"), quantity("1.2G"), quantity("300k"), quantity("5e6")
        (5000000.0, 1200000000.0, 300000.0, 5000000.0)
    """
    parts = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)([kmgt]?)", str(text).strip().lower())
    try:
        number = float(parts[1]) if parts else math.nan
    except ValueError:
        number = math.nan
    if parts is None or math.isnan(number):
        raise UserError(f"not a number: {text!r}", cure="write it like 5000000, 5e6, 5M or 1.2G")
    return number * 1000.0 ** " kmgt".index(parts[2] or " ")


def from_config(path: str | Path) -> dict[str, Any]:
    """The options of a saved ``run.json`` (or of a plain JSON object of options).

    Raises:
        UserError: If the file is not JSON or names an option that does not exist, telling every fault.
    """
    from netwright.storage import read_json

    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError("a configuration is a JSON object of options", where=path)
    options = content.get("options", content)
    known = {f.name for f in dataclasses.fields(Options)}
    for name in options:
        if name not in known:
            raise UserError(f"unknown option {name!r}", where=path, cure=nearest(name, known))
    return _typed(options, path)


def _typed(options: dict[str, Any], path: str | Path) -> dict[str, Any]:
    import typing

    from pydantic import TypeAdapter, ValidationError

    hints = typing.get_type_hints(Options)
    checked, faults = {}, []
    for name, value in options.items():
        try:
            checked[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            faults.append(f"{name}: {error.errors()[-1]['msg']} (got {value!r})")
    if faults:
        raise UserError("; ".join(faults), where=path)
    return checked
