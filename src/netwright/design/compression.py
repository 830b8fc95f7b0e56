"""``netwright compress``: a run's network or one's own through a chain of methods, written for use elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netwright import storage
from netwright.compress.chain import (
    Compression,
    Distill,
    LowRank,
    Prune,
    Quantize,
    Step,
    Training,
    compress,
    packed,
)
from netwright.console import UserError, nearest, note
from netwright.data.tensors import Batches, Normalise
from netwright.design.model import baseline_network
from netwright.design.subject import Reading, Subject, open_subject
from netwright.results import Result
from netwright.seeding import seeded, stream

METHODS = ("distill", "low-rank", "prune", "quantize")
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a chain shall do; every method reads its own fields.

    Attributes:
        methods: Of ``METHODS``, in that order.
        student: Network that ``distill`` trains: a name of ``netwright.nn.pretrained``, or ``small_convnet``.
        share: Share of the parameters that ``low-rank`` leaves at most, in (0, 1).
        sparsity: Share of zeros after ``prune``, in [0, 1).
        bits: Of a weight after ``quantize``, 1..16.
        bucket_size: Weights that share a scale; 0 for one scale a tensor.
        epochs: Of training, for every step that trains.
        lr: Learning rate.
        seed: Of everything random.
    """

    methods: tuple[str, ...]
    student: str = "small_convnet"
    share: float = 0.5
    sparsity: float = 0.9
    bits: int = 4
    bucket_size: int = 256
    epochs: int = 3
    lr: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("no method is given", cure=f"add --method {', --method '.join(METHODS[1:])}")
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"unknown method {method!r}", cure=nearest(method, METHODS))
        if list(self.methods) != [method for method in METHODS if method in self.methods]:
            raise UserError(
                f"methods must come in the order {', '.join(METHODS)}, each once, got {', '.join(self.methods)}",
                cure="put --method in this order: what comes later would undo what was done before",
            )
        if self.seed < 0:
            raise UserError(f"seed must be >= 0, got {self.seed}")
        try:
            Training(None, self.epochs, self.lr)
            for method in self.methods:
                if method != "distill":
                    self.step(method, (1, 8, 8), 2)
        except ValueError as error:
            raise UserError(str(error)) from error

    def step(self, method: str, shape: tuple[int, int, int], classes: int) -> Step:
        """One step of the chain, for a network with inputs of this shape."""
        if method == "distill":
            with seeded(self.seed, "init", "student"):
                return Distill(baseline_network(self.student, shape, classes))
        if method == "low-rank":
            return LowRank(self.share)
        return Prune(self.sparsity) if method == "prune" else Quantize(self.bits, self.bucket_size or None)


@dataclasses.dataclass(frozen=True)
class Compressed(Result):
    """A compressed network.

    Attributes:
        model: Which one.
        data: What it was trained and measured on; None when there were none.
        files: What was written.
        report: Accuracy, size and speed after each step.
        missing: Forms that could not be written, and why.
    """

    model: str
    data: str | None
    files: tuple[str, ...]
    report: Compression
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([str(self.report), *self.files, *self.missing])


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
) -> Compressed:
    """Compresses a network and writes it.

    ``packed.safetensors`` holds the weights in as few bits as there are (:func:`netwright.compress.chain.unpacked`
    reads it), ``model.onnx`` and ``sparse`` run in ONNX Runtime and in netwright's own, ``compression.json`` is the
    report.

    Args:
        model: A run; a name of ``netwright.nn.pretrained``, which comes with trained weights; or ``FILE.py:FUNCTION``.
        data: As for :func:`netwright.data.load`; a run brings its own. Without data nothing is trained.
        out: A folder.
        wish: What to do.
        size: Height and width of the input, where neither run nor data tell.
        skip_broken: As for :func:`netwright.data.load`.
        drop_unknown: Likewise.
        download: Allow the network, for data and trained weights.
        force: Whether what is in the folder may be replaced.

    Raises:
        UserError: If something is missing, does not fit, or is there already.
    """
    target = Path(out)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not force):
        raise UserError("something is there already", where=target, cure="choose another --out, or add --force")
    opened = open_subject(model, data, size, wish.seed, Reading(skip_broken, drop_unknown, download))
    if "distill" in wish.methods and opened.data is None:
        raise UserError("distill needs data to train on", where=model, cure="name DATA, or leave out --method distill")
    steps = [wish.step(method, opened.shape, len(opened.classes)) for method in wish.methods]
    train = test = None
    if opened.data is not None:
        normalise = Normalise(opened.mean, opened.std)
        train = Batches(opened.data.train, BATCH, seed=wish.seed, normalise=normalise, name="compress")
        test = Batches(opened.data.test, 256, shuffle=False, drop_last=False, normalise=normalise)
    try:
        network, report = compress(
            opened.network,
            steps,
            example=torch.randn(1, *opened.shape, generator=stream(wish.seed, "example")),
            training=Training(train, wish.epochs, wish.lr, wish.seed),
            test=test,
            progress=lambda name: note(f"  {name}"),
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error), where=model) from error
    missing = _write(target, network, report, opened)
    result = Compressed(model, data, (), report, missing)
    storage.write_json(target / "compression.json", {**result.to_dict(), "wish": dataclasses.asdict(wish)})
    files = tuple(str(file) for file in sorted(target.rglob("*")) if file.is_file())
    return dataclasses.replace(result, files=files)


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
