"""How the networks behind a latency table are timed: in turns, whole and by their operations, in either runtime."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.cost.pace import PACE
from netwright.cost.timing import turn
from netwright.seeding import derive

if TYPE_CHECKING:
    from netwright.deploy import SparseModel
    from netwright.search.genotype import Genotype
    from netwright.search.latency import Setup
    from netwright.search.spaces import AnySpace

# Of the rounds' times the lower quartile counts: what else the machine does meanwhile only adds.
ROUNDS, QUIET = 20, 0.25
# A turn lasts at least so many seconds, in at most so many calls: else all calls of a small network would fall into one
# of the machine's slower moments, which last for seconds.
LEAST_TURN, MOST_CALLS = 5e-3, 200


def rounds_of(setup: Setup) -> tuple[int, int]:
    """Rounds, and calls in each."""
    rounds = min(ROUNDS, setup.repeats)
    return rounds, math.ceil(setup.repeats / rounds)


def usual(medians: Float[np.ndarray, "rounds 1"]) -> float:
    """Milliseconds of a call: the lower quartile of the medians of the rounds."""
    return 1e3 * float(np.quantile(medians, QUIET))


def turns_of(
    space: AnySpace, genotypes: Sequence[Genotype], x: Tensor, num_classes: int, setup: Setup, seed: int, calls: int
) -> dict[str, Callable[[], list[float]]]:
    """What takes the turn of each genotype's network: the median of the seconds of its calls."""
    turns: dict[str, Callable[[], list[float]]] = {}
    for number, genotype in enumerate(genotypes):
        # Zeros of their own: in a pattern that all shared, its chances would be a stretch of every latency.
        own = derive(seed, "measured", number)
        network = setup.network(space, genotype, (x.shape[1], x.shape[2], x.shape[3]), num_classes, seed=own)
        if setup.runtime == "native":
            calling = partial(_calls, _compiled(network, x, setup.threads), x, calls)
        else:
            calling = partial(_plain_calls, network, x, calls)
        turns[str(number)] = partial(PACE.at_best, partial(_median, calling))
    return turns


def turn_inside(network: nn.Module, paths: list[str], x: Tensor, setup: Setup, calls: int) -> Callable[[], list[float]]:
    """What takes a turn: milliseconds of a whole call, then of the operation at every path inside it."""
    if setup.runtime == "native":
        inside = partial(_native_turn, _compiled(network, x, setup.threads), paths, x, calls)
    else:
        inside = partial(_torch_turn, network, paths, x, calls)
    return partial(PACE.at_best, inside)


def _median(seconds: Callable[[], list[float]]) -> list[float]:
    return [float(np.median(seconds()))]


def _lasting(call: Callable[[], Any], calls: int, untimed: int) -> list[float]:
    """Seconds of calls, after untimed ones: so many, or more of short ones."""
    warm = turn(call, untimed)
    wanted = math.ceil(LEAST_TURN / max(min(warm), 1e-9))
    return turn(call, max(calls, min(wanted, MOST_CALLS)))


def _plain_calls(network: nn.Module, x: Tensor, calls: int, untimed: int = 5) -> list[float]:
    """Seconds of calls in PyTorch."""
    with torch.inference_mode():
        return _lasting(lambda: network(x), calls, untimed)


def _torch_turn(network: nn.Module, paths: list[str], x: Tensor, calls: int) -> list[float]:
    spent: defaultdict[str, list[float]] = defaultdict(list)
    whole = _plain_calls(network, x, calls, untimed=3)
    with torch.inference_mode(), _clocked(network, paths, spent):
        for _ in range(calls):
            network(x)
    return [1e3 * float(np.median(seconds)) for seconds in (whole, *(spent[path] for path in paths))]


@contextmanager
def _clocked(network: nn.Module, paths: Iterable[str], spent: defaultdict[str, list[float]]) -> Iterator[None]:
    """Notes the seconds of every call of the modules at these paths."""
    handles, since = [], {}

    def before(path: str) -> Any:
        def hook(*_: Any) -> None:
            since[path] = time.perf_counter()

        return hook

    def after(path: str) -> Any:
        def hook(*_: Any) -> None:
            spent[path].append(time.perf_counter() - since[path])

        return hook

    for path in paths:
        module = network.get_submodule(path)
        handles += [module.register_forward_pre_hook(before(path)), module.register_forward_hook(after(path))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _native_turn(compiled: SparseModel, paths: list[str], x: Tensor, calls: int) -> list[float]:
    seconds = _calls(compiled, x, calls)
    whole = 1e3 * float(np.median(seconds))
    profile = compiled.profile(x, repeats=len(seconds))
    # Steps are timed one by one: what the clock adds to each is what their sum exceeds the whole call by. A profile
    # gives shortest times, so the steps are stretched to the median call.
    clock = max(0.0, profile.step_microseconds - profile.call_microseconds) / len(profile.steps)
    stretch = whole / profile.call_microseconds
    parts = dict.fromkeys(paths, 0.0)
    for step in profile.steps:
        for path in paths:
            if step.path == path or step.path.startswith(f"{path}."):
                parts[path] += stretch * max(0.0, step.microseconds - clock)
    return [whole, *parts.values()]


def _compiled(network: nn.Module, x: Tensor, threads: int) -> SparseModel:
    """Not by ``deploy.compile``, which would advise another runtime for networks with few zeros."""
    from netwright.deploy.graph import capture, optimise
    from netwright.deploy.model import SparseModel

    return SparseModel(optimise(capture(network, (x,))), threads=threads)


def _calls(compiled: SparseModel, x: Tensor, repeats: int) -> list[float]:
    """Seconds of calls."""
    given = x.numpy()
    out = compiled(given)
    return _lasting(lambda: compiled(given, out=out), repeats, 5)
