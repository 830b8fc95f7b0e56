"""Latency of architectures from tables: measured on the machine at hand, operation by operation, inside networks.

A table prices every operation that a space may choose, and what no choice changes (stem, sums, classifier) by a
constant; the latency of an architecture is their sum,

    LAT(g) = c + sum_{o in g} t_o,    E[LAT] = c + sum_l sum_i m_li t_li,

as in Cai et al., "ProxylessNAS", ICLR 2019, arXiv:1812.00332, and Wu et al., "FBNet", CVPR 2019, arXiv:1812.03443.
Operations are not timed alone: networks of the space that hold them all are run, and the time of each operation is read
inside them, where its input is in cache and its neighbours are fused as they will be; whole calls of other networks may
then correct the table (:mod:`netwright.search.calibration`). Two runtimes: PyTorch, and the sparse runtime
(:mod:`netwright.deploy`) with a random pattern of zeros, for a search for what is fast when sparse.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from netwright.console import task
from netwright.cost.timing import alternate, cpu_name, threads
from netwright.nn.sparse import top_k_mask
from netwright.search.calibration import calibrate
from netwright.search.latency_table import CONSTANT, Shape, SpaceLatencyTable, operations_of, predict
from netwright.search.pricing import ExpectedCost
from netwright.search.turns import QUIET, rounds_of, turn_inside, turns_of, usual
from netwright.seeding import stream

if TYPE_CHECKING:
    from netwright.search.genotype import Genotype
    from netwright.search.pricing import Costs
    from netwright.search.spaces import AnySpace
    from netwright.search.supernet import OperationKey, Supernet

__all__ = [
    "CONSTANT",
    "ExpectedLatency",
    "Setup",
    "SpaceLatencyTable",
    "measure",
    "measured",
    "measured_all",
    "operations_of",
    "predict",
]

Runtime = Literal["torch", "native"]
MOST_NETWORKS = 60
# Where the zeros lie moves the time of a small operation: one pattern does not tell what it takes.
SPARSE_READINGS = 3


@dataclass(frozen=True)
class Setup:
    """How latencies are measured.

    Attributes:
        runtime: ``torch`` runs the network as it is, ``native`` compiles it for the sparse runtime.
        sparsity: Share of zeros, in [0, 1), at random places of every convolution and linear layer but depthwise ones.
        threads: Threads of the runtime.
        batch: Inputs at once.
        repeats: Timed calls of each network, spread over rounds in which all networks have their turns.
        calibration: Random networks whose whole calls correct the table; 0 for none, otherwise at least 2.
        options: Handed to ``space.build``: ``channels``, ``cells``, ``stem``.

    Raises:
        ValueError: If a value is out of range.
    """

    runtime: Runtime = "torch"
    sparsity: float = 0.0
    threads: int = 1
    batch: int = 1
    repeats: int = 30
    calibration: int = 0
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.runtime not in ("torch", "native"):
            raise ValueError(f"runtime must be 'torch' or 'native', got {self.runtime!r}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), got {self.sparsity}")
        for name in ("threads", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.calibration < 0 or self.calibration == 1:
            raise ValueError(f"calibration must be 0 or >= 2, got {self.calibration}")

    def network(self, space: AnySpace, genotype: Genotype, shape: Shape, num_classes: int, seed: int = 0) -> nn.Module:
        """The network of a genotype, with its zeros, in evaluation mode and channels last."""
        network: nn.Module = space.build(genotype, shape[0], num_classes, seed=seed, **(self.options or {}))
        draws = stream(seed, "latency", "zeros")
        for module in network.modules():
            dense = isinstance(module, nn.Conv2d) and not 1 < module.groups == module.in_channels
            if self.sparsity and (dense or isinstance(module, nn.Linear)):
                weight = cast(Tensor, module.weight).data
                weight *= top_k_mask(torch.rand(weight.shape, generator=draws), 1 - self.sparsity)
        return network.eval().to(memory_format=torch.channels_last)

    def input(self, shape: Shape) -> Tensor:
        """Random images."""
        return torch.rand(self.batch, *shape, generator=stream(0, "latency", "input"))


def measure(space: AnySpace, shape: Shape, num_classes: int = 10, setup: Setup | None = None) -> SpaceLatencyTable:
    """Times every operation of a space inside networks of it.

    Args:
        space: A cell space or a space of choices.
        shape: (C, H, W) of one input.
        num_classes: Number of classes.
        setup: Runtime, zeros, threads, batch; PyTorch on one thread, one image at a time, by default.

    Returns:
        Milliseconds by operation key, and by ``"constant"`` what no choice changes.

    Raises:
        ValueError: If an operation of the space occurs in none of the networks tried.
    """
    setup = setup or Setup()
    covering = _networks(space, shape, num_classes, setup)
    draws = stream(0, "latency", "calibration")
    drawn = [space.random(draws) for _ in range(setup.calibration)]
    x, (rounds, calls) = setup.input(shape), rounds_of(setup)
    with threads(setup.threads):
        # All in the same rounds: a table that is made while the machine is slow cannot be corrected when it is not.
        inside = {
            f"covering {number}": turn_inside(network, list(keys), x, setup, calls)
            for number, (network, keys) in enumerate(covering)
        }
        whole_turns = turns_of(space, drawn, x, num_classes, setup, 1, calls)
        turns = inside | whole_turns
        with task("latencies", total=rounds * len(turns)) as bar:

            def taken(call: Callable[[], list[float]]) -> list[float]:
                bar.advance()
                return call()

            spent = alternate({name: partial(taken, call) for name, call in turns.items()}, rounds=rounds)
    times: defaultdict[OperationKey, list[float]] = defaultdict(list)
    rest: list[float] = []
    for (_, keys), name in zip(covering, inside, strict=True):
        whole, *parts = np.quantile(spent[name], QUIET, axis=0).tolist()
        priced = [(key, part) for key, part in zip(keys.values(), parts, strict=True) if key is not None]
        for key, milliseconds in priced:
            times[key].append(milliseconds)
        rest.append(whole - sum(milliseconds for _, milliseconds in priced))
    found: dict[Any, float] = {key: float(np.median(each)) for key, each in times.items()}
    constant = max(0.0, float(np.median(rest)))
    if drawn:
        options = setup.options or {}
        built = (space.build(each, shape[0], num_classes, **options) for each in drawn)
        held = [[key for key in operations_of(each, shape).values() if key is not None] for each in built]
        found, constant = calibrate(found, constant, held, [usual(spent[name]) for name in whole_turns])
    return SpaceLatencyTable(
        milliseconds={**found, CONSTANT: constant},
        cpu=cpu_name(),
        threads=setup.threads,
        batch=setup.batch,
        dtype="float32",
        torch_version=torch.__version__,
        runtime=setup.runtime,
        sparsity=setup.sparsity,
        space=space.name,
        shape=shape,
        num_classes=num_classes,
        options=dict(setup.options or {}),
    )


def _networks(
    space: AnySpace, shape: Shape, num_classes: int, setup: Setup
) -> list[tuple[nn.Module, dict[str, OperationKey | None]]]:
    """Networks that hold every operation as often as it is to be read, with the key of the one at each path."""
    readings = SPARSE_READINGS if setup.sparsity else 1
    wanted = space.supernet(shape[0], num_classes, **(setup.options or {})).operations(shape)
    short = Counter(dict.fromkeys(wanted, readings))
    found: list[tuple[nn.Module, dict[str, OperationKey | None]]] = []
    for number, genotype in enumerate(_covering(space, readings)):
        network = setup.network(space, genotype, shape, num_classes, seed=number)
        keys = operations_of(network, shape)
        own = Counter(key for key in keys.values() if key is not None)
        if not found or short & own:
            found.append((network, keys))
            short -= own
        if not short:
            return found
    if unread := sorted(str(key) for key, left in short.items() if left == readings):
        raise ValueError(f"no network of {space.name!r} held {', '.join(unread)}")
    return found


def _covering(space: AnySpace, times: int) -> Iterator[Genotype]:
    """Genotypes that together hold every operation at every place so many times, few of them first."""
    if (choices := getattr(space, "choices", None)) is not None:
        known = choices()
        for number in range(times * max(map(len, known.values()))):
            yield space.genotype(
                {key: names[(number + i) % len(names)] for i, (key, names) in enumerate(known.items())}
            )
    draws = stream(0, "latency", "genotypes")
    for _ in range(MOST_NETWORKS):
        yield space.random(draws)


def measured(
    space: AnySpace, genotype: Genotype, shape: Shape, num_classes: int = 10, setup: Setup | None = None, seed: int = 0
) -> float:
    """Milliseconds of a whole call of an architecture by the clock; see :func:`measured_all`.

    Args:
        space: The space of the genotype.
        genotype: The architecture.
        shape: (C, H, W) of one input.
        num_classes: Number of classes.
        setup: As for :func:`measure`.
        seed: Of the pattern of zeros.
    """
    return measured_all(space, [genotype], shape, num_classes, setup, seed)[0]


def measured_all(
    space: AnySpace,
    genotypes: Sequence[Genotype],
    shape: Shape,
    num_classes: int = 10,
    setup: Setup | None = None,
    seed: int = 0,
) -> list[float]:
    """Milliseconds of several architectures by the clock, in rounds in which each has its turn.

    A change of the machine's speed then meets all of them, so that they can be compared. Of each round the median
    counts, of the rounds the lower quartile: what else the machine does meanwhile only adds. Times are those of the
    processor's best pace (:class:`netwright.cost.Pace`).

    Args:
        space: The space of the genotypes.
        genotypes: The architectures.
        shape: (C, H, W) of one input.
        num_classes: Number of classes.
        setup: As for :func:`measure`.
        seed: Of the pattern of zeros.
    """
    setup = setup or Setup()
    x, (rounds, calls) = setup.input(shape), rounds_of(setup)
    with threads(setup.threads):
        turns = turns_of(space, genotypes, x, num_classes, setup, seed, calls)
        return [usual(seconds) for seconds in alternate(turns, rounds=rounds).values()]


class ExpectedLatency(ExpectedCost):
    """Expected latency of a supernet, differentiable: the ``cost`` of a penalty
    (:class:`~netwright.search.objective.CostPenalty`).

    Args:
        table: What :func:`measure` gave.
        unit: Milliseconds in one unit of the result: 1.0 gives milliseconds, 1e-3 microseconds, which penalties with a
            logarithm need for small networks.

    Raises:
        ValueError: If ``unit`` is not positive, or a latency is negative.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-chain").supernet(1, 10)
        >>> table = dict.fromkeys(supernet.operations((1, 16, 16)), 0.5) | {"constant": 1.0}
        >>> _ = supernet(torch.zeros(1, 1, 16, 16))
        >>> round(ExpectedLatency(table)(supernet).item(), 2)     # three of six layers may be skipped
        3.7
    """

    def __init__(self, table: Mapping[Any, float], unit: float = 1.0):
        if not unit > 0:
            raise ValueError(f"unit must be > 0, got {unit}")
        if bad := [key for key, ms in table.items() if not ms >= 0]:
            raise ValueError(f"latencies must be >= 0, got {table[bad[0]]} for {bad[0]}")
        self.table, self.unit = table, unit
        self.constant = float(table.get(CONSTANT, 0.0))

    def candidates(self, supernet: Supernet) -> Costs:
        """The cost of every candidate by key, for inputs of the supernet's last shape."""
        return supernet.candidate_costs(self.table)
