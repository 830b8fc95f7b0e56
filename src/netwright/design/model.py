"""Networks by name: a run of netwright, a torchvision or timm name, a function in a Python file.

An architecture is plain JSON from which the network is rebuilt; weights lie beside it as safetensors. Nothing is
unpickled.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from netwright import storage
from netwright.console import UserError
from netwright.design.user_code import in_file, open_space, run_file, sizes_of, space_digest
from netwright.results import Result
from netwright.search.spaces.network import Stem

SMALL_IMAGE = 64


@dataclasses.dataclass(frozen=True)
class Architecture(Result):
    """All that is needed to rebuild a network and to feed it.

    Attributes:
        kind: ``"genotype"`` for a designed network, ``"named"`` for one of ``netwright.nn.pretrained.names()``.
        shape: Channels, height and width of the input.
        classes: Names of the outputs, in order.
        mean: Per channel, of values scaled to [0, 1] (of the values themselves when ``picture`` is False).
        std: Likewise.
        picture: Whether inputs are images of 0..255, rather than floats.
        name: The name of a named network.
        genotype: The genotype of a designed one, as in ``Genotype.to_dict()``.
        channels: Channels of its first cells.
        cells: Its number of cells.
        stem: Its stem, as in ``Space.build``.
        space: ``FILE.py:NAME`` of the search space of a designed network, where it is the user's own.
        space_digest: SHA-256 of that file.
        members: Networks of this kind whose logits are averaged, >= 1.
    """

    kind: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    picture: bool = True
    name: str = ""
    genotype: dict[str, Any] | None = None
    channels: int = 0
    cells: int | None = 0
    stem: Stem = "cifar"
    space: str = ""
    space_digest: str = ""
    members: int = 1

    def build(self, *, auxiliary: bool = False) -> nn.Module:
        """The network with fresh weights, drawn from torch's global generator.

        Raises:
            ValueError: If the genotype or the name is unknown.
            UserError: If the file of the user's own space is missing, or is not what it was.
        """
        if self.members > 1:
            from netwright.nn.ensemble import LogitMean

            single = dataclasses.replace(self, members=1)
            return LogitMean(single.build(auxiliary=auxiliary) for _ in range(self.members))
        if self.kind == "named":
            return baseline_network(self.name, self.shape, len(self.classes))
        from netwright.search import spaces
        from netwright.search.genotype import Genotype

        self.open_space()
        genotype = Genotype.from_dict(self.genotype or {})
        space = spaces.get(genotype.space)
        sizes = sizes_of(space, channels=self.channels, cells=self.cells, stem=self.stem)
        if auxiliary:
            sizes["auxiliary"] = True
        return space.build(genotype, in_channels=self.shape[0], num_classes=len(self.classes), **sizes)

    def open_space(self) -> None:
        """Makes the user's own space known, from its file, so that the genotype can be read.

        Raises:
            UserError: If the file is missing, or is not what it was.
        """
        if self.space:
            file = self.space.rpartition(":")[0]
            cure = "put it back: the run folder holds a copy, space.py"
            if not Path(file).is_file():
                raise UserError("the file of the run's search space is missing", where=file, cure=cure)
            if space_digest(self.space) != self.space_digest:
                raise UserError("the run's search space has changed", where=file, cure=cure)
            open_space(self.space)

    @classmethod
    def read(cls, path: str | Path) -> Architecture:
        """Reads and checks an architecture file.

        Raises:
            UserError: If the file is missing, no JSON, or misses a field; every fault is named.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_python(storage.read_json(path))
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UserError(f"not an architecture: {faults}", where=path) from error


def baseline_network(name: str, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """A named network for inputs of ``shape``; MobileNet-v2 and ResNet-18 in their forms for small images."""
    from netwright.nn.convnet import SmallConvNet
    from netwright.nn.mbconv import mobilenet_v2_32
    from netwright.nn.pretrained import create
    from netwright.nn.resnet import resnet18_cifar

    if name == "small_convnet":
        return SmallConvNet(num_classes=num_classes, in_channels=shape[0], grid=2)
    small = {"mobilenet_v2": mobilenet_v2_32, "resnet18": resnet18_cifar}
    if max(shape[1:]) <= SMALL_IMAGE and name in small:
        return small[name](num_classes=num_classes, in_channels=shape[0])
    return create(name, num_classes=num_classes, in_channels=shape[0])


class RunModel(nn.Module):
    """A finished network with what belongs to it: takes images as they are and gives logits.

    Attributes:
        network: The network itself, on normalised input.
        architecture: Shape, class names and how it was built.
    """

    def __init__(self, network: nn.Module, architecture: Architecture):
        super().__init__()
        from netwright.data.tensors import Normalise

        self.network, self.architecture = network, architecture
        self.normalise = Normalise(architecture.mean, architecture.std)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return self.architecture.classes

    def forward(
        self,
        images: UInt8[Tensor, "batch channels height width"] | Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, "batch classes"]:
        """Logits of images of 0..255 (uint8), or of floats in [0, 1]."""
        expected = self.architecture.shape
        if images.ndim != 4 or tuple(images.shape[1:]) != tuple(expected):
            raise ValueError(
                f"images must have shape (batch, {', '.join(map(str, expected))}), got {tuple(images.shape)}"
            )
        return self.network(self.normalise(images))

    @torch.inference_mode()
    def predict(self, images: Tensor) -> list[str]:
        """The most probable class of each image, by name."""
        return [self.classes[i] for i in self(images).argmax(1).tolist()]


def load(
    model: str | Path,
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    pretrained: bool = False,
    download: bool = False,
) -> nn.Module:
    """A network by name, in evaluation mode.

    Args:
        model: A run folder of ``netwright design``; ``torchvision:NAME``, ``timm:NAME`` or a bare name (torchvision
            first); or ``FILE.py:FUNCTION``, whose function is called without arguments and returns a module.
        num_classes: Outputs of a named network; its own number when None.
        in_channels: Input channels of a named network.
        pretrained: Whether a named network comes with trained weights.
        download: Whether they may be fetched when they are not on this machine.

    Returns:
        A :class:`RunModel` for a run, the plain module otherwise.

    Raises:
        UserError: If nothing is found under the name, or what is found is damaged.

    Example:
        >>> load("resnet18", num_classes=10).fc.out_features
        10
    """
    text = str(model)
    path = Path(text)
    if (path / "architecture.json").is_file():
        return load_run(path)
    if path.is_dir():
        raise UserError("the folder holds no finished network", where=path, cure="run netwright design with this --out")
    if (found := in_file(text)) is not None:
        return _from_file(*found)
    if path.suffix == ".onnx":
        raise UserError("an ONNX file can only be measured, not changed", where=path, cure="give the run or the module")
    from netwright.nn.pretrained import create

    return create(text, num_classes, in_channels, pretrained, download).eval()


def is_named(model: str) -> bool:
    """Whether a model is meant by a name of :mod:`netwright.nn.pretrained`, not by a folder or a file.

    Example:
        >>> is_named("timm:resnet18"), is_named("mine.py:net"), is_named("model.onnx")
        (True, False, False)
    """
    return not (Path(model).is_dir() or ".py:" in model or model.endswith(".onnx"))


def input_channels(network: nn.Module) -> int:
    """Channels that the first convolution takes; 3 without one.

    Example:
        >>> input_channels(nn.Sequential(nn.ReLU(), nn.Conv2d(1, 8, 3)))
        1
    """
    return next((part.in_channels for part in network.modules() if isinstance(part, nn.Conv2d)), 3)


def load_run(
    path: str | Path, *, weights: str = "model.safetensors", architecture: str = "architecture.json"
) -> RunModel:
    """The network of a run folder, or its baseline.

    Raises:
        UserError: If a file is missing or damaged, or the weights do not fit the architecture.
    """
    folder = Path(path)
    if not (folder / architecture).is_file():
        what = "the folder holds no finished network" if folder.is_dir() else "no such run"
        raise UserError(what, where=folder, cure="give a folder written by netwright design, finished")
    described = Architecture.read(folder / architecture)
    network = described.build()
    tensors = storage.read_tensors(folder / weights)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"the weights do not fit {architecture}: {str(error).splitlines()[-1].strip()}",
            where=folder / weights,
        ) from error
    return RunModel(network, described).eval()


def _from_file(path: Path, function: str) -> nn.Module:
    cure = "name a function that returns a torch.nn.Module"
    found = getattr(run_file(path), function, None)
    if not callable(found):
        raise UserError(f"no function {function!r}", where=path, cure=cure)
    made = found()
    if not isinstance(made, nn.Module):
        raise UserError(f"{function}() returned {type(made).__name__}, not a torch.nn.Module", where=path)
    return made.eval()
