"""What is measured: a network, an input, and how another process makes the same again.

The measuring processes are started anew, so they cannot be handed a module. They get a recipe instead (a function by
its name, and plain arguments), make the network themselves, and load the one set of weights that lies in the
benchmark's folder beside the input, the expected output and the ONNX file.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netwright import storage
from netwright.console import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Subject:
    """A network to be measured.

    Attributes:
        name: What tables call it.
        module: In evaluation mode, without masks or other parametrizations; None if there is only an ONNX file.
        example: The input of every call, float32 (uint8 for an ONNX file that takes pictures).
        pruned: Layers that were pruned, as ``named_modules`` gives them.
        onnx: The file, if there is only that.
        origin: Where weights and zeros come from, in words.
        seed: Of what is random, if anything but the input is.
    """

    name: str
    module: nn.Module | None
    example: np.ndarray
    pruned: tuple[str, ...] = ()
    onnx: Path | None = None
    origin: str = ""
    seed: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How to make a subject, in this process or another.

    Attributes:
        maker: ``"module:function"``; the function returns a :class:`Subject`.
        arguments: Its keyword arguments, JSON-able.
    """

    maker: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Subject:
        """The subject, made here."""
        return resolve(self.maker)(**self.arguments)


def resolve(name: str) -> Any:
    """What ``"module:attribute"`` names.

    Example:
        >>> resolve("math:pi")
        3.141592653589793
    """
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def first(output: Any) -> Any:
    """The first tensor of what a network returns: itself, or the first entry of a tuple, list or dictionary.

    Example:
        >>> first({"logits": [1, 2], "features": 3})
        1
    """
    while isinstance(output, (tuple, list, dict)):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


class Work:
    """The folder that the processes of one benchmark share.

    Args:
        folder: Written by :meth:`write`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.onnx = folder / "model.onnx"
        self.artefact = folder / "netwright"
        self._recipe = folder / "recipe.json"
        self._input = folder / "input.npy"
        self._expected = folder / "expected.npy"
        self._weights = folder / "weights.safetensors"

    def write(self, recipe: Recipe, subject: Subject) -> str:
        """Fills the folder, the ONNX file of a network apart.

        Returns:
            What made the expected output.
        """
        storage.write_json(self._recipe, {"maker": recipe.maker, "arguments": dict(recipe.arguments)})
        np.save(self._input, subject.example)
        if subject.module is None:
            assert subject.onnx is not None
            self.onnx.write_bytes(subject.onnx.read_bytes())
            np.save(self._expected, _unoptimised(self.onnx, subject.example))
            return "ONNX Runtime without optimisations"
        storage.write_tensors(self._weights, _state(subject.module))
        np.save(self._expected, _in_double(subject.module, subject.example))
        return "PyTorch eager in float64"

    def module(self) -> nn.Module:
        """The network with the benchmark's weights, made anew at each call."""
        content = storage.read_json(self._recipe)
        module = Recipe(content["maker"], content["arguments"]).make().module
        assert module is not None
        module.load_state_dict({**module.state_dict(), **storage.read_tensors(self._weights)})
        return module.eval().requires_grad_(False)

    def input(self) -> np.ndarray:
        """The input of every call."""
        return np.load(self._input)

    def deviation(self, output: Any) -> float:
        """max|output - expected| / max|expected|; NaN where the output has another shape or is no number."""
        expected = np.load(self._expected)
        found = np.asarray(first(output), dtype=np.float64)
        if found.shape != expected.shape:
            return float("nan")
        return float(np.abs(found - expected).max() / max(np.abs(expected).max(), np.finfo(np.float64).tiny))


def _state(module: nn.Module) -> dict[str, Tensor]:
    import torch

    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def _in_double(module: nn.Module, example: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        try:
            return first(copy.deepcopy(module).double()(torch.from_numpy(example).double())).numpy()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the network does not take an input of shape {tuple(example.shape)}: {str(error).splitlines()[0]}",
                cure="choose another --size",
            ) from error


def _unoptimised(path: Path, example: np.ndarray) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: example})[0].astype(np.float64)
