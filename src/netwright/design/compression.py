"""``netwright compress``: a run's network or one's own through a chain of methods, written for use elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netwright import storage
from netwright.compress import METHODS
from netwright.compress.chain import (
    Compression,
    Distill,
    LowRank,
    Prune,
    Step,
    Training,
    compress,
    packed,
)
from netwright.console import UserError, nearest, note
from netwright.data.tensors import Batches, Normalise
from netwright.design.compress_page import FINISHED, KIND, Compressed, build, kept
from netwright.design.options import MOVABLE
from netwright.design.run import RunFolder
from netwright.design.students import student_for
from netwright.design.subject import Reading, Subject, open_subject
from netwright.nn.activations import LogitsOnly
from netwright.results import Result, plain
from netwright.seeding import stream

BATCH = 64
PRODUCTS = ("packed.safetensors", "model.onnx", "sparse")
WRITTEN = (*PRODUCTS, FINISHED, "run.json", "data.json", "report.html", "report.md", "report.json", "work")
OTHER = "choose another --out, or add --force to begin anew"


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a chain shall do; every method reads its own fields.

    Attributes:
        methods: Of ``netwright.compress.METHODS``, in that order, one of those that take the same place.
        student: Network that ``distill`` trains, as for :func:`netwright.design.students.student_for`; empty for a
            small one with at most half the parameters.
        share: Share of the parameters that ``low-rank`` and ``maestro`` leave at most, in (0, 1).
        sparsity: Share of zeros after ``prune``, in [0, 1).
        bits: Of a weight after ``quantize`` and the other two that round, 1..16.
        bucket_size: Weights that share a scale; 0 for one scale a tensor.
        augment: Train on the data's own augmentation; the teacher then answers every batch, not once an example.
        epochs: Of training, for every step that trains.
        lr: Learning rate.
        seed: Of everything random.
    """

    methods: tuple[str, ...]
    student: str = ""
    share: float = 0.5
    sparsity: float = 0.9
    bits: int = 4
    bucket_size: int = 256
    augment: bool = False
    epochs: int = 3
    lr: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("no method is given", cure=f"add --method of {', '.join(METHODS)}")
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"unknown method {method!r}", cure=nearest(method, METHODS))
        places = [step_of(method).place for method in self.methods]
        if any(b <= a for a, b in itertools.pairwise(places)):
            raise UserError(
                f"methods must come in the order {_order()}, each once, got {', '.join(self.methods)}",
                cure="put --method in this order: what comes later would undo what was done before",
            )
        if self.seed < 0:
            raise UserError(f"seed must be >= 0, got {self.seed}")
        if not 0 < self.share < 1:
            raise UserError(f"--params must lie in (0, 1), got {self.share:g}")
        try:
            Training(None, self.epochs, self.lr)
            for method in self.methods:
                if step_of(method) is not Distill:
                    self.step(method)
        except ValueError as error:
            raise UserError(str(error)) from error

    def step(self, method: str, student: nn.Module | None = None) -> Step:
        """One step of the chain; ``distill`` needs the student."""
        kind: Any = step_of(method)
        if kind is Distill:
            return Distill(student)  # type: ignore[arg-type]
        if issubclass(kind, LowRank):
            return kind(self.share)
        return kind(self.sparsity) if kind is Prune else kind(self.bits, self.bucket_size or None)


def step_of(method: str) -> type[Step]:
    """The kind of step that a name of ``netwright.compress.METHODS`` stands for.

    Example:
        >>> step_of("maestro").__name__
        'Maestro'
    """
    return pkgutil.resolve_name(METHODS[method])


def _order() -> str:
    by_place: dict[int, list[str]] = {}
    for method in METHODS:
        by_place.setdefault(step_of(method).place, []).append(method)
    return ", ".join(" or ".join(names) for names in by_place.values())


@dataclasses.dataclass(frozen=True)
class Asked(Result):
    """All that decides the outcome of a compression, and where it goes: what ``run.json`` keeps as options.

    Attributes:
        model: As for :func:`compress_model`.
        data: Likewise; empty without data.
        out: Likewise.
        wish: What to do.
        size: As for :func:`compress_model`.
        skip_broken: Likewise.
        drop_unknown: Likewise.
        download: Likewise.
    """

    model: str
    data: str
    out: str
    wish: Wish
    size: int | None
    skip_broken: bool
    drop_unknown: bool
    download: bool

    def to_dict(self) -> dict[str, Any]:
        """All of them, the wish among them."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "wish"}
        return plain({**own, **dataclasses.asdict(self.wish)})

    def identity(self) -> dict[str, Any]:
        """What decides the outcome: two compressions with equal identity are the same."""
        return {name: value for name, value in self.to_dict().items() if name not in MOVABLE}


def compress_model(
    model: str,
    data: str | None,
    out: str | Path,
    wish: Wish,
    *,
    size: int | None = None,
    skip_broken: bool = False,
    drop_unknown: bool = False,
    download: bool = False,
    force: bool = False,
    command: str = "",
) -> Compressed:
    """Compresses a network and writes it into a folder; the same call goes on after the last finished step.

    ``packed.safetensors`` holds the weights in as few bits as there are (:func:`netwright.compress.chain.unpacked`
    reads it), ``model.onnx`` and ``sparse`` run in ONNX Runtime and in netwright's own; ``report.html`` tells what each
    step did, ``compression.json`` the same as data.

    Args:
        model: A run; a name of ``netwright.nn.pretrained``, which comes with trained weights; or ``FILE.py:FUNCTION``.
        data: As for :func:`netwright.data.load`; a run brings its own. Without data nothing is trained.
        out: A folder: a new one, or that of the same compression, which then goes on, bit for bit.
        wish: What to do.
        size: Height and width of the input, where neither run nor data tell.
        skip_broken: As for :func:`netwright.data.load`.
        drop_unknown: Likewise.
        download: Allow the network, for data and trained weights.
        force: Begin anew, in place of what is in the folder.
        command: The command line, for the record.

    Raises:
        UserError: If something is missing or does not fit, or the folder holds something else.
        KeyboardInterrupt: On Ctrl-C; the same call goes on.
    """
    asked = Asked(str(model), data or "", str(out), wish, size, skip_broken, drop_unknown, download)
    run = RunFolder(out, KIND)
    with run.locked():
        if force and (run.written_by() == KIND or not run.has("run.json")):
            _clear(run)
        else:
            run.refuse_strangers(asked)
            if run.has(FINISHED):
                return kept(run)
        return _compressed(run, asked, command or f"netwright compress {model}")


def _clear(run: RunFolder) -> None:
    for name in WRITTEN:
        if (run / name).is_dir():
            shutil.rmtree(run / name)
        else:
            (run / name).unlink(missing_ok=True)


def _compressed(run: RunFolder, asked: Asked, command: str) -> Compressed:
    wish = asked.wish
    reading = Reading(asked.skip_broken, asked.drop_unknown, asked.download)
    opened = open_subject(asked.model, asked.data or None, asked.size, wish.seed, reading)
    if isinstance(opened.network, LogitsOnly):
        cure = "give a network of the logits alone, without what else it computes"
        raise UserError("the network gives more than logits, which would be lost", where=asked.model, cure=cure)
    found = opened.data
    for method in wish.methods:
        if found is None and step_of(method).needs_data:
            cure = f"name DATA, or leave out --method {method}"
            raise UserError(f"{method} needs data to train on", where=asked.model, cure=cure)
    name = student = None
    if "distill" in wish.methods:
        name, student = student_for(opened, wish.student, wish.seed)
    steps = [wish.step(method, student) for method in wish.methods]
    began = not run.has("run.json")
    if began:
        run.describe(asked, command)
        if found is not None:
            run.write("data.json", {**found.to_dict(), "fingerprint": found.fingerprint()})
    elif found is not None and run.read("data.json")["fingerprint"] != found.fingerprint():
        raise UserError("the data have changed since this compression began", where=asked.data, cure=OTHER)
    train = test = None
    if found is not None:
        normalise = Normalise(opened.mean, opened.std)
        augment = found.augmentation() if wish.augment else None
        train = Batches(found.train, BATCH, seed=wish.seed, normalise=normalise, augment=augment, name="compress")
        test = Batches(found.test, 256, shuffle=False, drop_last=False, normalise=normalise)
    try:
        network, report = compress(
            opened.network,
            steps,
            example=torch.randn(1, *opened.shape, generator=stream(wish.seed, "example")),
            training=Training(train, wish.epochs, wish.lr, wish.seed),
            test=test,
            progress=lambda name: note(f"  {name}"),
            folder=run / "work",
        )
    except UserError:
        raise
    except ValueError as error:
        if began:
            _clear(run)
        raise UserError(str(error), where=asked.model) from error
    missing = _write(run.path, network, report, opened)
    result = Compressed(
        folder=str(run.path),
        model=asked.model,
        data=None if found is None else found.name,
        methods=wish.methods,
        trained=found is not None,
        examples=None if found is None else len(found.test),
        files=_sizes(run.path),
        report=report,
        missing=missing,
        student=name,
    )
    told = run.read("data.json") if found is not None else None
    build(result, run.described(), told).write(run.path)
    content = {name: value for name, value in result.to_dict().items() if name != "folder"}
    run.write(FINISHED, {**content, "wish": dataclasses.asdict(wish)})
    shutil.rmtree(run / "work", ignore_errors=True)
    return kept(run)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file that holds the network."""
    parts = [folder / name for name in PRODUCTS]
    files = [file for part in parts for file in (sorted(part.rglob("*")) if part.is_dir() else [part])]
    return {str(file.relative_to(folder)): file.stat().st_size for file in files if file.is_file()}


def _write(target: Path, network: nn.Module, report: Compression, opened: Subject) -> tuple[str, ...]:
    from netwright import deploy
    from netwright.deploy import onnx

    storage.write_bytes(target / "packed.safetensors", packed(network, report))
    facts: dict[str, Any] = {"shape": opened.shape, "mean": opened.mean, "std": opened.std, "classes": opened.classes}
    missing = []
    try:
        onnx.export(network, target / "model.onnx", **facts, scale=255.0 if opened.picture else None)
    except UserError as error:
        missing.append(f"no model.onnx: {error.what}")
    try:
        deploy.compile(network, torch.zeros(1, *opened.shape)).save(target / "sparse")
    except UserError as error:
        missing.append(f"no file of the sparse runtime: {error.what}")
    return tuple(missing)
