"""The protocol: who takes part, which process measures whom, in what order, and what becomes of the times.

With one thread all runtimes live in one process on one pinned core. With several, those on PyTorch's pool get a process
of their own, because its threads spin for a while after each use. In each round every runtime makes one untimed call
and then four timed ones; the order is rotated from round to round.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright.console import UserError, nearest, note, task, warn
from netwright.cost import alternate, cpu_name
from netwright.deploy.bench.facts import Facts, describe
from netwright.deploy.bench.onnx_file import write
from netwright.deploy.bench.peers import COMPETITORS, Competitor
from netwright.deploy.bench.process import Worker, WorkerLostError, measuring
from netwright.deploy.bench.result import TOLERANCE, Benchmark, Runtime, plural
from netwright.deploy.bench.roofline import Peaks, Roofline, roofline
from netwright.deploy.bench.subject import Recipe, Subject, Work, resolve
from netwright.deploy.bench.worker import core_choice

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

CALLS = 4  # timed calls of a turn
FEWEST_ROUNDS = 10
PEAK_SECONDS = 0.5


def bench(
    recipe: Recipe,
    *,
    threads: int = 1,
    rounds: int = 100,
    seconds: float = 5.0,
    runtimes: Sequence[str] = (),
    competitors: Mapping[str, str] = COMPETITORS,
    memory: bool = True,
    command: str = "",
) -> Benchmark:
    """Measures one network in every runtime that is installed.

    Args:
        recipe: Makes the network, here and in the processes that measure.
        threads: Threads of every runtime, each with a core to itself, at least 1.
        rounds: Most rounds, at least 1.
        seconds: No round begins after so many seconds, but ten are made (``rounds``, if that is fewer).
        runtimes: Names of ``competitors`` to be measured; all when empty.
        competitors: ``"module:class"`` by name; the sparse one that comes first is compared with the dense ones.
        memory: Whether resident memory is measured too, in one more process for each runtime.
        command: What was typed, for the record.

    Raises:
        UserError: If a number is below its bound, there are fewer cores than ``threads``, a name is unknown, or no
            runtime can run the network.
    """
    if rounds < 1:
        raise UserError(f"rounds must be >= 1, got {rounds}")
    if not seconds > 0:
        raise UserError(f"seconds must be > 0, got {seconds}")
    cores, load = core_choice(threads), _load()
    for name in runtimes:
        if name not in competitors:
            raise UserError(f"unknown runtime {name!r}", cure=nearest(name, competitors))
    chosen = {name: path for name, path in competitors.items() if not runtimes or name in runtimes}
    here: dict[str, Competitor] = {name: resolve(path)() for name, path in chosen.items()}
    absent = {name: why for name, who in here.items() if (why := who.absent()) is not None}
    with tempfile.TemporaryDirectory(prefix="netwright-bench-") as folder, ExitStack() as stack:
        subject = recipe.make()
        work = Work(Path(folder))
        reference = work.write(recipe, subject)
        absent |= _without_file(work, subject, {name: who for name, who in here.items() if name not in absent})
        present = {name: path for name, path in chosen.items() if name not in absent}
        found = None if subject.module is None else describe(subject.module, subject.example, subject.pruned)
        ready, owners = _prepare(stack, work, present, threads, cores, absent)
        if not ready:
            reasons = "; ".join(f"{name}: {why}" for name, why in absent.items())
            raise UserError(f"no runtime can run {subject.name}: {reasons}")
        peaks = _answer(next(iter(owners.values())), "peaks", seconds=PEAK_SECONDS)
        times = _rounds(subject.name, owners, rounds, seconds)
        stack.close()
        resident = {name: _memory(work, name, chosen[name], threads, cores) if memory else None for name in ready}
    dense = [name for name in ready if here[name].dense]
    measured = [
        Runtime.of(name, prepared=ready[name], times=times, dense=dense, resident_bytes=resident[name])
        for name in ready
    ]
    bound, no_bound = _bound(found, peaks, [runtime.best_ms for runtime in measured if runtime.dense], threads)
    return Benchmark(
        network=subject.name,
        origin=subject.origin,
        shape=tuple(subject.example.shape),
        seed=subject.seed,
        threads=threads,
        cores=cores,
        load=load,
        facts=found,
        reference=reference,
        runtimes=tuple(measured),
        absent=absent,
        rounds=len(next(iter(times.values()))),
        calls=CALLS,
        roofline=bound,
        no_roofline=no_bound,
        cpu=cpu_name(),
        versions=_versions(),
        command=command,
    )


def _answer(worker: Worker, do: str, **arguments: Any) -> dict[str, Any]:
    """The answer of a process, which may be that it has ended."""
    try:
        return worker.ask(do, **arguments)
    except WorkerLostError as error:
        return {"failed": str(error)}


def _load() -> float | None:
    """Programs that wanted a core during the last minute, with a warning if there were more than cores."""
    if not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores + 0.5:
        warn(f"this machine is busy (load {load:.1f} on {plural(cores, 'core')}): so are its times")
    return load


def _rounds(
    network: str, owners: Mapping[str, Worker], rounds: int, seconds: float
) -> dict[str, Float[np.ndarray, "rounds calls"]]:
    with task(f"timing {network}", total=rounds * len(owners)) as bar:

        def take(name: str) -> list[float]:
            answer = _answer(owners[name], "turn", name=name, calls=CALLS)
            if "failed" in answer:
                raise UserError(f"{name} failed while it was timed: {answer['failed']}")
            bar.advance()
            return answer["seconds"]

        turns = {name: partial(take, name) for name in owners}
        return alternate(turns, rounds=rounds, seconds=seconds, fewest=FEWEST_ROUNDS)


def _bound(
    found: Facts | None, peaks: dict[str, Any], dense_ms: Sequence[float], threads: int
) -> tuple[Roofline | None, str]:
    if found is None:
        return None, "nothing is known of the layers of an ONNX file"
    if "failed" in peaks:
        return None, peaks["failed"]
    return roofline(found, Peaks(**peaks["peaks"]), min(dense_ms, default=None), threads), ""


def _without_file(work: Work, subject: Subject, present: Mapping[str, Competitor]) -> dict[str, str]:
    """Makes the ONNX file if somebody wants it; why those that cannot be given anything are absent."""
    if subject.module is None:
        return {name: "an ONNX file is all there is" for name, who in present.items() if who.reads != "onnx"}
    readers = [name for name, who in present.items() if who.reads == "onnx"]
    if not readers:
        return {}
    try:
        with task(f"exporting {subject.name} to ONNX", total=1) as bar:
            write(subject.module, subject.example, work.onnx)
            bar.advance()
    except UserError as error:
        return dict.fromkeys(readers, str(error))
    return {}


def _prepare(
    stack: ExitStack,
    work: Work,
    present: Mapping[str, str],
    threads: int,
    cores: Sequence[int] | None,
    absent: dict[str, str],
) -> tuple[dict[str, dict[str, Any]], dict[str, Worker]]:
    """Starts the processes and lets each runtime load the network; who fails goes to ``absent``."""
    on_torch = {name: path for name, path in present.items() if threads > 1 and resolve(path).pool == "torch"}
    others = {name: path for name, path in present.items() if name not in on_torch}
    ready: dict[str, dict[str, Any]] = {}
    owners: dict[str, Worker] = {}
    with task("preparing runtimes", total=len(present)) as bar:
        for group, torch_threads in ((others, 1), (on_torch, threads)):
            members = dict(group)
            while members:
                worker = stack.enter_context(measuring(work, members, threads, cores, torch_threads))
                answers, lost = _introduce(worker, members, bar)
                absent |= {name: answer["failed"] for name, answer in answers.items() if "failed" in answer}
                members = {name: path for name, path in members.items() if name not in absent}
                if lost is None:
                    ready |= {name: answers[name] for name in members}
                    owners |= dict.fromkeys(members, worker)
                    break
    order = [name for name in present if name in ready]
    return {name: ready[name] for name in order}, {name: owners[name] for name in order}


def _introduce(worker: Worker, members: Mapping[str, str], bar: Any) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Answers of all runtimes of one process, and the one that took the process down with it, if any."""
    answers: dict[str, dict[str, Any]] = {}
    for name in members:
        bar.update(bar.done, message=name)
        try:
            answer = worker.ask("prepare", name=name)
        except WorkerLostError as error:
            answers[name] = {"failed": str(error)}
            return answers, name
        if "failed" not in answer and not answer["deviation"] <= TOLERANCE:  # NaN too
            answer = {"failed": f"wrong output: {answer['deviation']:.2g} of the largest is off, {TOLERANCE:g} allowed"}
        answers[name] = answer
        bar.advance()
    return answers, None


def _memory(work: Work, name: str, path: str, threads: int, cores: Sequence[int] | None) -> int | None:
    torch_threads = threads if resolve(path).pool == "torch" else 1
    with measuring(work, {name: path}, threads, cores, torch_threads) as worker:
        answer = _answer(worker, "memory", name=name)
    if "failed" in answer:
        note(f"memory of {name}: {answer['failed']}")
        return None
    return answer["bytes"]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("netwright", "torch", "torchvision", "timm", "onnxruntime", "openvino", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
