"""``netwright train --method simclr|moco|simsiam``: a network learns from images without labels, then a linear probe.

The network's last linear layer is taken away and what remains is trained to recognise images by their views. A linear
layer is then trained on the frozen features, with labels, and put in the place of the first: the folder holds a whole
classifier, and the encoder by itself.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from netwright import storage
from netwright.console import UserError, note
from netwright.design import distributed
from netwright.results import History

if TYPE_CHECKING:
    from netwright.data import Data
    from netwright.design.run import RunFolder
    from netwright.design.train import TrainOptions
    from netwright.train.contrastive import Host
    from netwright.train.contrastive.views import TwoViews

ENCODER = "encoder.safetensors"
NEIGHBOURS = 20
QUEUE = 65536
WHOLE = 256  # images in a batch where nothing is trained


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """All that is needed, made and tried before anything is written.

    Attributes:
        host: What is trained.
        head: Name of the layer that was taken away.
        views: How two views of an image are made.
        version: Of MoCo, whose views and schedule others have from version 2.
    """

    host: Host
    head: str
    views: TwoViews
    version: int = 2


@dataclasses.dataclass(frozen=True)
class Probes:
    """What the features are worth, on the test part.

    Attributes:
        before: Accuracy of a linear probe on the features before pre-training, in [0, 1].
        neighbours: Accuracy of the nearest neighbours' vote afterwards, in [0, 1].
    """

    before: float
    neighbours: float


def prepare(options: TrainOptions, data: Data, network: nn.Module, method: str) -> Pretraining:
    """Makes host and views, and tries them; the network loses its last layer.

    Raises:
        UserError: If the network ends in no linear layer, no views can be made of the data, or the host does not take
            what it is given.
    """
    from netwright.nn.activations import without_head
    from netwright.seeding import seeded
    from netwright.train.contrastive import MoCo, policy
    from netwright.train.contrastive.views import SMALL, WARMUP
    from netwright.train.methods import host as made
    from netwright.train.methods import parse

    images = getattr(data.test, "images", None)
    if images is not None and images.dtype != torch.uint8:
        raise UserError(
            "views are made of pictures, and these data are other numbers",
            where=options.data,
            cure="give images of 0..255, or train with labels",
        )
    version = 1 if parse(method)[1].get("mlp") is False else 2
    # A fifth of a short run, as it is of a run of the paper.
    warmup = min(WARMUP, options.epochs // 5) if max(data.shape[1:]) > SMALL else 0
    try:
        views = policy(
            data.shape,
            data.name,
            classes=data.classes,
            crop=options.crop,  # type: ignore[arg-type]
            warmup=warmup,
            version=version,
        )
    except ValueError as error:
        raise UserError(f"no views can be made of these data: {error}", where=options.data) from error
    try:
        head, layer = without_head(network)
        features = _features(network, data)
    except ValueError as error:
        raise UserError(str(error), where=options.model, cure="choose another --model") from error
    if features != layer.in_features:
        raise UserError(
            f"the network must end in its last linear layer, got {features} numbers before it instead of "
            f"{layer.in_features}",
            where=options.model,
            cure="choose another --model",
        )
    count = min(options.batch_size, len(data.train))
    # More keys than images would only be older keys of the same ones.
    queue = min(QUEUE, max(count, len(data.train) // 2))
    with seeded(options.seed, "head"):
        host = made(method, network, features=features, hallucinate=options.hallucinate, queue_size=queue)
    if isinstance(host, MoCo):
        needed = count * (1 if host.enqueue_once or host.hallucinator is None else 2)
        if host.queue.shape[1] < needed:
            raise UserError(f"moco: queue_size must be >= the keys of a batch, {needed}, got {host.queue.shape[1]}")
        if count < 2 * host.bn_splits:
            raise UserError(f"moco: bn_splits must leave >= 2 images in a group, got {host.bn_splits} for {count}")
    return Pretraining(host, head, views, version)


def pretrain(
    run: RunFolder, options: TrainOptions, data: Data, network: nn.Module, prepared: Pretraining
) -> tuple[History, Probes | None]:
    """Trains the host, leaves the encoder in the folder, and puts the probe's layer into the network.

    Returns:
        What each epoch recorded, and the probes; None in a process that does not write.

    Raises:
        FloatingPointError: When the loss is no longer finite.
        KeyboardInterrupt: On Ctrl-C; the same call goes on.
    """
    from netwright.data.tensors import Batches
    from netwright.nn.batchnorm import synchronise
    from netwright.nn.modes import in_mode
    from netwright.train import fit
    from netwright.train.contrastive import ContrastiveModule, extract, fit_probe, knn_accuracy

    normalise, main = data.normalise(), distributed.is_main()
    classes = len(data.classes)

    def features(part: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return extract(network, Batches(part, WHOLE, shuffle=False, drop_last=False, normalise=normalise))

    def accuracy(probe: nn.Linear, x: torch.Tensor, labels: torch.Tensor) -> float:
        return (probe(x).argmax(1) == labels).double().mean().item()

    before = 0.0
    if main:
        before = accuracy(fit_probe(*features(data.train), classes, seed=options.seed), *features(data.test))
    if options.devices * options.nodes > 1:
        synchronise(prepared.host)
    with in_mode(prepared.host, training=True):
        history = fit(
            ContrastiveModule(
                prepared.host,
                lr=options.lr,
                weight_decay=options.weight_decay,
                schedule="step" if prepared.version == 1 else "cosine",
            ),
            Batches(data.train, options.batch_size, seed=options.seed, augment=prepared.views, normalise=normalise),
            epochs=options.epochs,
            **options.fitting(run),
            description=f"pre-train: {options.methods[0].partition(':')[0]}",
        )
    if not main:
        return history, None
    network.to("cpu", torch.float32)
    storage.write_tensors(run / ENCODER, network.state_dict())
    note("linear probe on frozen features")
    train, test = features(data.train), features(data.test)
    probe = fit_probe(*train, classes, seed=options.seed)
    found = Probes(before, knn_accuracy(*train, *test, k=min(NEIGHBOURS, len(data.train))))
    network.set_submodule(prepared.head, probe)
    return history, found


def told(options: TrainOptions, prepared: Pretraining) -> tuple[str, ...]:
    """Sentences on what was done, besides the method's own."""
    crop = "near the middle of the image" if options.crop == "center" else "anywhere in the image"
    first = getattr(prepared.views.first, "steps", ())[:1]
    if first and (wait := getattr(first[0], "epochs", 0)):
        crop += f" (anywhere in the first {wait} epoch{'s' if wait > 1 else ''})"
    lines = [f"Two views of each image: crops {crop}, then {_steps(prepared.views)}."]
    if prepared.version == 1:
        lines.append("As version 1 of MoCo: no blur, hue turned further, learning rate in steps.")
    if options.hallucinate:
        lines.insert(0, "Hallucinator: adds a positive for each image, extrapolated in feature space.")
    queue = getattr(prepared.host, "queue", None)
    if queue is not None:
        lines.append(f"{queue.shape[1]} keys in the queue; the loss rises while it fills.")
    lines.append("Linear probe: one linear layer, trained on the labels of the training part with the rest frozen.")
    return tuple(lines)


def _steps(views: TwoViews) -> str:
    names = {"HorizontalFlip": "flips", "Greyscale": "grey", "ColourJitter": "colour jitter", "GaussianBlur": "blur"}
    steps = [getattr(step, "step", step) for step in getattr(views.first, "steps", ())[1:]]
    return ", ".join(names[type(step).__name__] for step in steps)


def _features(network: nn.Module, data: Data) -> int:
    """Width of what the network gives without its last layer, 0 where that is no matrix."""
    from netwright.nn.modes import in_mode

    with in_mode(network, False), torch.no_grad():
        found = network(torch.zeros(2, *data.shape))
    return int(found.shape[1]) if isinstance(found, torch.Tensor) and found.ndim == 2 and len(found) == 2 else 0
