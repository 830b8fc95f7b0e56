"""A run or a model's name as a network that can be measured and exported.

A run brings its weights and its zeros. A name brings neither: its weights are drawn at random, and so is the pattern of
zeros, in all convolutions and linear layers but the depthwise ones and the first. How fast a network runs depends on
where its zeros are, hardly on what the other numbers are, as long as activations stay of ordinary size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from netwright.console import UserError
from netwright.deploy.bench.facts import is_depthwise
from netwright.deploy.bench.subject import Recipe, Subject
from netwright.design.model import SMALL_IMAGE, Architecture, baseline_network, input_channels, is_named, load, load_run
from netwright.nn.batchnorm import recalibrate
from netwright.nn.sparse import layers, sparsity_report, to_dense, top_k_mask
from netwright.seeding import seeded, stream

SPARSITY = 0.95
SIZE = 224
SMALL_SIZE = 32
SMALL_NAMES = ("mobilenet_v2", "resnet18")  # those that have a form of their own for small images
SMALL_CLASSES = 10
CALIBRATION = 8  # inputs from which batch norms take their statistics
SMALLEST_VARIANCE = 0.1  # of a channel, over the mean of its layer


@dataclasses.dataclass(frozen=True)
class Opened:
    """A network found by a run or a name.

    Attributes:
        name: What tables call it.
        module: In evaluation mode, masks and other parametrizations baked in.
        shape: Of one input: channels, height, width.
        pruned: Layers that hold zeros on purpose.
        origin: Where weights and zeros come from, in words.
        seed: Of random weights and zeros; None where there are none.
        architecture: How to build it again; None for a function in a Python file.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int, int]
    pruned: tuple[str, ...]
    origin: str
    seed: int | None
    architecture: Architecture | None


def subject(
    model: str,
    *,
    sparsity: float | None = None,
    keep_at_least: int = 0,
    size: int | None = None,
    batch: int = 1,
    seed: int = 0,
) -> Subject:
    """What ``netwright bench`` measures: the network of :func:`open_model`, or an ONNX file, with a random input.

    Args:
        model: A run, a name, ``FILE.py:FUNCTION``, or an ONNX file.
        sparsity: As in :func:`open_model`.
        keep_at_least: Likewise.
        size: As in :func:`open_model`; for an ONNX file the sides that it leaves open.
        batch: Inputs of one call, at least 1.
        seed: Of everything random.

    Raises:
        UserError: As :func:`open_model`; if ``batch`` is below 1; for an ONNX file that cannot be fed.
    """
    _check([], size, seed, batch)
    if model.endswith(".onnx"):
        if sparsity is not None:
            raise UserError("an ONNX file is measured as it is", where=model, cure="leave --sparsity out")
        return _onnx_subject(Path(model), size, batch, seed)
    found = open_model(model, sparsity=sparsity, keep_at_least=keep_at_least, size=size, seed=seed)
    example = torch.randn(batch, *found.shape, generator=stream(seed, "bench", "input")).numpy()
    return Subject(found.name, found.module, example, found.pruned, origin=found.origin, seed=found.seed)


def recipes(
    models: Sequence[str],
    sparsities: Sequence[float] = (),
    *,
    keep_at_least: int = 0,
    size: int | None = None,
    batch: int = 1,
    seed: int = 0,
) -> list[Recipe]:
    """Recipes of every model at every sparsity, for :func:`netwright.deploy.bench.bench`.

    Args:
        models: As in :func:`subject`.
        sparsities: Likewise; empty for each model's own.
        keep_at_least: Likewise.
        size: Likewise.
        batch: Likewise.
        seed: Likewise.

    Raises:
        UserError: If there is no model, or a number is out of bounds.

    Example:
        >>> [recipe.arguments["sparsity"] for recipe in recipes(["resnet18"], [0.9, 0.95], size=32)]
        [0.9, 0.95]
    """
    if not models:
        raise UserError("MODEL is missing", cure="name a run, a network (resnet18) or an ONNX file")
    _check(sparsities, size, seed, batch)
    if keep_at_least < 0:
        raise UserError(f"keep_at_least must be >= 0, got {keep_at_least}")
    wanted: Sequence[float | None] = sparsities or [None]
    common = {"keep_at_least": keep_at_least, "size": size, "batch": batch, "seed": seed}
    return [
        Recipe("netwright.design.benchmark:subject", {"model": model, "sparsity": sparsity, **common})
        for model in models
        for sparsity in wanted
    ]


def _check(sparsities: Sequence[float], size: int | None, seed: int, batch: int = 1) -> None:
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise UserError(f"sparsity must lie in [0, 1), got {sparsity}", cure=f"ask for {SPARSITY}")
    for name, value, least in (("size", size, 1), ("batch", batch, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise UserError(f"{name} must be >= {least}, got {value}")


def open_model(
    model: str, *, sparsity: float | None = None, keep_at_least: int = 0, size: int | None = None, seed: int = 0
) -> Opened:
    """A run's network with its own weights, or a named one with random weights and zeros.

    Args:
        model: A run; ``torchvision:NAME``, ``timm:NAME`` or a bare name, where ``mobilenet_v2`` and ``resnet18`` stand
            for their forms for small images when ``size`` is at most 64, as do ``NAME_32``; or ``FILE.py:FUNCTION``.
        sparsity: Share of zeros in each pruned layer, in [0, 1); 0.95 for a name when None, and what there is for a
            function. A run keeps its own.
        keep_at_least: As in :func:`prune_at_random`; without effect on zeros that are there.
        size: Height and width of the input; what the network was made for when None.
        seed: Of everything random.

    Raises:
        UserError: If there is no such model, a run is given a sparsity or another size, or a number is out of bounds.

    Example:
        >>> found = open_model("resnet18", sparsity=0.9, size=32)
        >>> found.shape, len(found.pruned), found.architecture.build().fc.out_features
        ((3, 32, 32), 20, 10)
    """
    _check([] if sparsity is None else [sparsity], size, seed)
    if (Path(model) / "architecture.json").is_file():
        return _opened_run(model, sparsity, size)
    architecture: Architecture | None = None
    with seeded(seed, "bench", "init"):
        if not is_named(model):
            network = load(model)
            shape = (input_channels(network), size or SIZE, size or SIZE)
        else:
            network, architecture = _named(model, size)
            shape, sparsity = architecture.shape, SPARSITY if sparsity is None else sparsity
    network = to_dense(network).eval()
    given = architecture is None and sparsity is None
    if given:
        pruned = _with_zeros(network)
    else:
        pruned = prune_at_random(network, sparsity or 0.0, shape, keep_at_least=keep_at_least, seed=seed)
    if given:
        origin = "weights and zeros of the function"
    else:
        origin = f"{'random weights' if architecture else 'weights of the function'}, random zeros, seed {seed}"
    return Opened(model, network, shape, pruned, origin, None if given else seed, architecture)


def _opened_run(run: str, sparsity: float | None, size: int | None) -> Opened:
    if sparsity is not None:
        raise UserError("a run is taken as it was pruned", where=run, cure="leave --sparsity out")
    model = load_run(run)
    shape = model.architecture.shape
    if size is not None and (size, size) != shape[1:]:
        raise UserError(f"the network takes {shape[1]} x {shape[2]}, not {size}", where=run, cure="leave --size out")
    network = to_dense(model.network).eval()
    origin = "trained weights, zeros of its pruning"
    return Opened(Path(run).name or run, network, shape, _with_zeros(network), origin, None, model.architecture)


def _named(model: str, size: int | None) -> tuple[nn.Module, Architecture]:
    name, _, number = model.rpartition("_")
    small = name in SMALL_NAMES and number == str(SMALL_SIZE)
    if small:
        size = SMALL_SIZE if size is None else size
        if size > SMALL_IMAGE:
            raise UserError(f"{model} takes images of at most {SMALL_IMAGE} pixels, got {size}", cure=f"name {name}")
    else:
        name = model
        small = name in SMALL_NAMES and size is not None and size <= SMALL_IMAGE
    if small:
        assert size is not None
        network: nn.Module = baseline_network(name, (3, size, size), SMALL_CLASSES)
    else:
        network = load(name)
    side = size or _own_size(network)
    classes = SMALL_CLASSES if small else _outputs(network, side)
    shape = (3, side, side)
    facts: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return network, Architecture("named", shape, tuple(map(str, range(classes))), **facts, name=name)


def _own_size(network: nn.Module) -> int:
    """timm's networks tell what they were made for."""
    config = getattr(network, "default_cfg", None) or {}
    return int(config.get("input_size", (3, SIZE, SIZE))[-1])


@torch.inference_mode()
def _outputs(network: nn.Module, side: int) -> int:
    try:
        return int(network.eval()(torch.zeros(1, 3, side, side)).shape[-1])
    except (RuntimeError, ValueError, AssertionError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the network does not take images of {side} x {side}: {told}", cure="set --size") from error


def _with_zeros(network: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, layer in sparsity_report(network).items() if layer.kept < layer.total)


@torch.no_grad()
def prune_at_random(
    network: nn.Module, sparsity: float, shape: tuple[int, int, int], *, keep_at_least: int = 0, seed: int = 0
) -> tuple[str, ...]:
    """Zeros at random places, the same share in every layer but the depthwise ones and the first that runs.

    The weights that are left are scaled up, so that activations keep their size, and batch norms get statistics of
    random input and random weights around them, as a trained network would have: folding them is not the identity.

    Args:
        network: In evaluation mode; changed in place.
        sparsity: Share of zeros, in [0, 1).
        shape: Of one input.
        keep_at_least: Weights that every row of a weight (an output channel) keeps, even if fewer zeros fit. With 0
            a narrow network may fall apart: of 24 weights 99 % leave most channels without any.
        seed: Of zeros and statistics.

    Returns:
        Names of the layers that were pruned.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
        >>> prune_at_random(net.eval(), 0.75, (3, 8, 8)), int(net[3].weight.count_nonzero())
        (('3',), 8)
    """
    stem = _first_to_run(network, shape)
    chosen = [(name, layer) for name, layer in layers(network) if layer is not stem and not is_depthwise(layer)]
    for name, parameter in network.named_parameters():
        _wake(parameter, stream(seed, "bench", "wake", name))
    for name, layer in chosen:
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        scores = torch.rand(len(weight), weight[0].numel(), generator=stream(seed, "bench", "zeros", name))
        fewest = min(keep_at_least, scores.shape[1])
        scores.scatter_add_(1, scores.topk(fewest).indices, torch.ones(len(scores), fewest))
        density = max(1 - sparsity, fewest / scores.shape[1])
        weight.mul_(top_k_mask(scores, density).view_as(weight) / math.sqrt(density))
    norms = {name: part for name, part in network.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}
    for name, norm in norms.items():
        if norm.affine:
            draw = stream(seed, "bench", "norm", name)
            norm.weight.uniform_(0.5, 1.5, generator=draw)
            norm.bias.normal_(0.0, 0.1, generator=draw)
    recalibrate(network, [torch.randn(CALIBRATION, *shape, generator=stream(seed, "bench", "calibration"))])
    for norm in norms.values():
        if norm.running_var is not None:
            # A channel that hardly varies would be blown up, rounding errors and all.
            norm.running_var.clamp_min_(SMALLEST_VARIANCE * float(norm.running_var.mean()) or 1.0)
    return tuple(name for name, _ in chosen)


def _wake(parameter: torch.Tensor, draw: torch.Generator) -> None:
    """Parameters that start so near 0 that what stands before them would not be seen: heads, scales of residuals."""
    if parameter.numel() > 1 and float(parameter.abs().max()) < 1e-2 and float(parameter.std()) == 0:
        if parameter.ndim == 2:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=draw)
        elif bool(parameter.any()):
            parameter.uniform_(0.05, 0.15, generator=draw)


def _first_to_run(network: nn.Module, shape: tuple[int, int, int]) -> nn.Module | None:
    ran: list[nn.Module] = []
    hooks = [layer.register_forward_pre_hook(lambda part, _: ran.append(part)) for _, layer in layers(network)]
    try:
        network(torch.zeros(1, *shape))
    except RuntimeError as error:
        raise UserError(
            f"the network does not take an input of shape {shape}: {str(error).splitlines()[0]}", cure="set --size"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return ran[0] if ran else None


def _onnx_subject(path: Path, size: int | None, batch: int, seed: int) -> Subject:
    import onnx

    from netwright.deploy.session import Session

    Session(path)  # refuses what is missing or damaged
    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    fed = next((value for value in graph.input if value.name not in weights), None)
    if fed is None:
        raise UserError("the file takes no input", where=path)
    tensor = fed.type.tensor_type
    dims = [dim.dim_value for dim in tensor.shape.dim]
    if not dims:
        raise UserError("the file does not tell the shape of its input", where=path)
    picture = tensor.elem_type == onnx.TensorProto.UINT8
    if not picture and tensor.elem_type != onnx.TensorProto.FLOAT:
        raise UserError("the file takes neither float32 nor uint8", where=path)
    if dims[0] and dims[0] != batch:
        raise UserError(f"the file takes batches of {dims[0]}, got {batch}", where=path, cure=f"--batch {dims[0]}")
    shape = [batch, *(n or size or SIZE for n in dims[1:])]
    draw = np.random.default_rng(seed)
    example: np.ndarray = (
        draw.integers(0, 256, shape, dtype=np.uint8) if picture else draw.standard_normal(shape, np.float32)
    )
    return Subject(path.name, None, example, onnx=path, origin="weights of the file")
