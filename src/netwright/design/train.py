"""``netwright train``: a network of the user's choice, trained with any of the training methods, in a run folder.

The folder holds what a run of ``netwright design`` holds of its network, so that ``evaluate``, ``predict``, ``export``
and ``bench`` take it. The same command goes on where an earlier one stopped, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from netwright import metrics, storage
from netwright.compress.prune import sparsity
from netwright.console import UserError, nearest, note, warn
from netwright.design import distributed, preparation, remarks
from netwright.design import pretraining as unlabelled
from netwright.design.measure import wilson
from netwright.design.model import Architecture, is_named, load, load_run
from netwright.design.options import MOVABLE
from netwright.design.run import RunFolder, find_folder
from netwright.design.train_page import FINISHED, KIND, TrainResult, kept, page
from netwright.design.verdict import percent
from netwright.results import History, Result

if TYPE_CHECKING:
    from netwright.data import Data
    from netwright.data.label_noise import NoiseKind

CHECKPOINT = "work/train.ckpt"
NOTABLE_ZEROS = 0.01  # share of a run's weights from which on it counts as pruned
CROPS = ("random", "center")
# What runs of earlier versions did not have, with what they did.
LATER = {"label_noise": None, "hallucinate": False, "crop": "random"}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")


@dataclasses.dataclass(frozen=True)
class TrainOptions(Result):
    """The options of ``netwright train``; see ``netwright train --help`` for each.

    Raises:
        UserError: If a value is out of its range, naming the option, the bound and the value.

    Example:
        >>> TrainOptions(data="digits", methods=("tract", "ps-kd:alpha_T=0.5")).epochs
        20
    """

    data: str
    model: str = "small_convnet"
    methods: tuple[str, ...] = ()
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.1
    weight_decay: float = 5e-4
    augment: bool = True
    hallucinate: bool = False
    crop: str = "random"
    label_noise: str | None = None
    precision: str = "32-true"
    size: int | None = None
    seed: int = 0
    skip_broken: bool = False
    drop_unknown: bool = False
    download: bool = False
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"
    out: str | None = None

    def __post_init__(self) -> None:
        self._check_pretraining()
        least = {"epochs": 1, "batch_size": 2, "devices": 1, "nodes": 1, "seed": 0, "size": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UserError(f"{name.replace('_', '-')} must be >= {bound}, got {value}")
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr must be > 0 and finite, got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight-decay must be >= 0 and finite, got {self.weight_decay}")
        if self.batch_size % (self.devices * self.nodes):
            processes = self.devices * self.nodes
            raise UserError(f"batch-size must be a multiple of all processes ({processes}), got {self.batch_size}")
        if self.label_noise is not None:
            parse_noise(self.label_noise)
        for name, known in (("precision", PRECISIONS), ("strategy", ("auto", "ddp", "fsdp"))):
            if getattr(self, name) not in known:
                raise UserError(f"unknown --{name} {getattr(self, name)!r}", cure=nearest(getattr(self, name), known))
        if self.model.endswith(".onnx"):
            raise UserError("an ONNX file cannot be trained", where=self.model, cure="give a name, a run or FILE.py:F")

    def _check_pretraining(self) -> None:
        from netwright.train import PRETRAINING
        from netwright.train.methods import pretraining

        method = pretraining(self.methods)
        if self.crop not in CROPS:
            raise UserError(f"unknown --crop {self.crop!r}", cure=nearest(self.crop, CROPS))
        if method is None:
            cure = f"add --method {' or '.join(PRETRAINING)}"
            if self.hallucinate:
                raise UserError("--hallucinate has a meaning in pre-training without labels only", cure=cure)
            if self.crop != CROPS[0]:
                raise UserError(f"--crop {self.crop} has a meaning in pre-training without labels only", cure=cure)
        elif not self.augment:
            raise UserError(f"{method.partition(':')[0]} compares augmented views, and --no-augment leaves none")

    def fitting(self, run: RunFolder) -> dict[str, Any]:
        """What :func:`netwright.train.fit` is told of seed, machine and checkpoint."""
        same = {name: getattr(self, name) for name in ("seed", "devices", "nodes", "strategy", "precision")}
        return {**same, "checkpoint": run / CHECKPOINT}

    def identity(self) -> dict[str, Any]:
        """What decides the outcome: two runs with equal identity are the same run."""
        found = {name: value for name, value in self.to_dict().items() if name not in MOVABLE}
        for name, usual in LATER.items():
            if getattr(self, name) == usual:
                del found[name]
        return found


def parse_noise(text: str) -> tuple[NoiseKind, float]:
    """Kind and rate of ``--label-noise KIND:RATE``.

    Raises:
        UserError: If the kind is unknown or the rate is outside [0, 1].

    Example:
        >>> parse_noise("symmetric:0.4")
        ('symmetric', 0.4)
    """
    from netwright.data.label_noise import NOISE_KINDS

    name, _, rate = text.partition(":")
    for kind in NOISE_KINDS:
        if kind == name:
            try:
                if 0 <= float(rate) <= 1:
                    return kind, float(rate)
            except ValueError:
                pass
            raise UserError(f"label-noise must have a rate in [0, 1], got {text!r}", cure=f"write it like {kind}:0.4")
    raise UserError(f"unknown --label-noise {name!r}", cure=nearest(name, NOISE_KINDS))


def train(options: TrainOptions, *, command: str = "") -> TrainResult:
    """Trains a network on a data set with any of the training methods, in a run folder.

    Args:
        options: What to train, on what, and how.
        command: The command line, for the record.

    Raises:
        UserError: For bad input, a folder of another run, or a network that does not fit the data.
        FloatingPointError: When the loss is no longer finite.
        KeyboardInterrupt: On Ctrl-C; the same call goes on.
    """
    distributed.join()
    run = RunFolder(distributed.agree(str(find_folder(options, KIND))), KIND)
    if not distributed.is_main():
        return _trained(run, options, command)
    with run.locked():
        run.refuse_strangers(options)
        return _trained(run, options, command or f"netwright train {options.data}")


def _trained(run: RunFolder, options: TrainOptions, command: str) -> TrainResult:
    from netwright.data.tensors import Batches
    from netwright.train import evaluate
    from netwright.train.methods import callbacks, check_data, check_epochs, check_network, described, pretraining

    if distributed.agree(run.has(FINISHED)):
        return kept(run)
    method = pretraining(options.methods)
    methods = callbacks(options.methods) if method is None else []
    check_epochs(methods, options.epochs)
    data, changed = _load(options)
    check_data(methods, data)
    network, architecture = _network(options, data)
    if architecture is not None and architecture.members > 1 and _pairing(methods) is not None:
        raise UserError(
            "the run's network is a pair already, and elr+ makes one of a single network", where=options.model
        )
    check_network(methods, network, torch.zeros(2, *data.shape))
    prepared = None if method is None else unlabelled.prepare(options, data, network, method)
    if distributed.is_main() and not run.has("run.json"):
        note(data.summary())
        run.describe(options, command)
        run.write("data.json", {**data.to_dict(), "fingerprint": data.fingerprint()})
    distributed.barrier()
    if run.read("data.json")["fingerprint"] != data.fingerprint():
        raise UserError("the data have changed since this run began", where=options.data, cure="choose another --out")
    probes = None
    with run.taken_back(unless=(CHECKPOINT, preparation.FILE)):
        preparation.prepare(methods, data, run.path, augment=options.augment)
        if prepared is not None:
            history, probes = unlabelled.pretrain(run, options, data, network, prepared)
        else:
            history, network = _with_labels(run, options, data, network, methods)
    if architecture is not None and _pairing(methods) is not None:
        architecture = dataclasses.replace(architecture, members=2)
    if distributed.is_main():
        whole = Batches(data.test, 256, shuffle=False, drop_last=False, normalise=data.normalise())
        probs, labels = evaluate(network, whole)
        accuracy = metrics.accuracy(probs, labels)
        low, high = wilson(accuracy, len(labels))
        pairs = labels * len(data.classes) + probs.argmax(1)
        counts = pairs.bincount(minlength=len(data.classes) ** 2).view(len(data.classes), -1)
        remarks.write(run, methods, network, data, changed)
        doubts = remarks.figures(run).get("doubts")
        result = TrainResult(
            folder=str(run.path),
            model=options.model,
            methods=options.methods,
            told=described(options.methods) + (() if prepared is None else unlabelled.told(options, prepared)),
            accuracy=accuracy,
            low=low,
            high=high,
            nll=metrics.nll(probs, labels),
            ece=metrics.expected_calibration_error(probs, labels),
            aurc=metrics.aurc(probs, labels),
            examples=len(labels),
            parameters=sum(p.numel() for p in network.parameters()),
            seconds=round(history.seconds, 1),
            preparation=preparation.seconds(run.path),
            confusion=tuple(map(tuple, counts.tolist())),
            doubted=None if doubts is None else doubts["doubtful"],
            before=None if probes is None else probes.before,
            neighbours=None if probes is None else probes.neighbours,
        )
        storage.write_tensors(run / "model.safetensors", network.state_dict())
        if architecture is not None:
            run.write("architecture.json", architecture.to_dict())
        run.write("training.json", history.to_dict())
        run.write(FINISHED, {name: value for name, value in result.to_dict().items() if name != "folder"})
        page(run.path).write(run.path)
        (run / CHECKPOINT).unlink(missing_ok=True)
    distributed.barrier()
    return kept(run)


def _with_labels(
    run: RunFolder, options: TrainOptions, data: Data, network: nn.Module, methods: Sequence[Any]
) -> tuple[History, nn.Module]:
    """The history, and the network that is kept: a pair where a method trains two."""
    from netwright.nn.batchnorm import synchronise
    from netwright.train.tract import remove_tract
    from netwright.train.weight_compander import remove_weight_compander

    if options.devices * options.nodes > 1:
        network = synchronise(network)
    history, module = _fit(run, options, data, network, methods)
    pairing = _pairing(methods)
    if pairing is not None:
        network = pairing.pair(module, network)
    # What was trained in another precision is kept in that of every other network.
    return history, remove_tract(remove_weight_compander(network)).float()


def _pairing(methods: Sequence[Any]) -> Any:
    """The method that trains two networks, if any does."""
    return next((method for method in methods if getattr(method, "networks", 1) == 2), None)


def _load(options: TrainOptions) -> tuple[Data, Tensor | None]:
    """The data, and which training labels were made wrong on purpose if any were."""
    from netwright.data import load as load_data
    from netwright.data import with_noisy_labels

    data = load_data(
        options.data,
        seed=options.seed,
        size=None if options.size is None else (options.size, options.size),
        skip_broken=options.skip_broken,
        drop_unknown=options.drop_unknown,
        download=options.download,
    )
    if options.label_noise is None:
        return data, None
    kind, rate = parse_noise(options.label_noise)
    noisy, changed = with_noisy_labels(data, kind, rate, seed=options.seed)
    return noisy, changed["train"]


def _network(options: TrainOptions, data: Data) -> tuple[nn.Module, Architecture | None]:
    """The network with fresh weights (a run's with its own), and how to build it again if that is known."""
    from netwright.seeding import seeded

    architecture: Architecture | None = None
    with seeded(options.seed, "init"):
        if (Path(options.model) / "architecture.json").is_file():
            found = load_run(options.model)
            network, architecture = found.network.train(), found.architecture
            if (architecture.shape, architecture.classes) != (data.shape, data.classes):
                raise UserError(
                    f"the run's network takes {_sides(architecture.shape)} and knows {len(architecture.classes)} "
                    f"classes; the data have {_sides(data.shape)} and {len(data.classes)}",
                    where=options.model,
                    cure="give the data of that run, or others with the same classes and size",
                )
            architecture = dataclasses.replace(architecture, mean=data.mean, std=data.std)
            zeros = sparsity(network).sparsity
            if zeros > NOTABLE_ZEROS and distributed.is_main():
                warn(f"{percent(zeros)} of the run's weights are zero; training fills them: prune again afterwards")
        elif not is_named(options.model):
            network = load(options.model).train()
        else:
            images = getattr(data.test, "images", None)
            architecture = Architecture(
                kind="named",
                shape=data.shape,
                classes=data.classes,
                mean=data.mean,
                std=data.std,
                picture=images is None or images.dtype == torch.uint8,
                name=options.model,
            )
            network = architecture.build()
    _try(network, data, options.model)
    return network, architecture


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _try(network: nn.Module, data: Data, name: str) -> None:
    """Refuses a network that cannot read the data or has another number of outputs."""
    from netwright.nn.modes import in_mode

    try:
        with in_mode(network, False), torch.no_grad():
            answer = network(torch.zeros(2, *data.shape))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        told = str(error).strip().splitlines()
        raise UserError(
            f"the network cannot take inputs of {_sides(data.shape)}: {told[0] if told else type(error).__name__}",
            where=name,
            cure="choose another --model, or another --size",
        ) from error
    if not isinstance(answer, torch.Tensor) or tuple(answer.shape) != (2, len(data.classes)):
        shape = _sides(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise UserError(
            f"the network must give logits of {len(data.classes)} classes, got {shape} for two inputs", where=name
        )


def _fit(
    run: RunFolder, options: TrainOptions, data: Data, network: nn.Module, methods: Sequence[Any]
) -> tuple[History, Any]:
    """The history, and the module that was trained."""
    import lightning

    from netwright.data.tensors import Batches
    from netwright.design.plan import augmentation
    from netwright.train import Classifier, fit
    from netwright.train.schedules import CosineProgress

    module = (
        network
        if isinstance(network, lightning.LightningModule)
        else Classifier(network, lr=options.lr, weight_decay=options.weight_decay)
    )
    if module.example_input_array is None:
        module.example_input_array = torch.zeros(2, *data.shape)  # tells which layer is computed first
    normalise = data.normalise()
    batches = Batches(
        data.train,
        options.batch_size,
        seed=options.seed,
        augment=augmentation(data, options.epochs) if options.augment else None,
        normalise=normalise,
        indexed=any(getattr(method, "indexed", False) for method in methods),
    )
    history = fit(
        module,
        batches,
        epochs=options.epochs,
        validation=Batches(data.validation, 256, shuffle=False, normalise=normalise),
        callbacks=[*methods, CosineProgress()],
        **options.fitting(run),
        description=f"train: {Path(options.model).name}",
    )
    return history, module
