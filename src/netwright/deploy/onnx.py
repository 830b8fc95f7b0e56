"""One ONNX file that takes pictures as they are and gives logits, checked against the network it came from.

The file holds resizing, scaling and standardising, so that numpy and onnxruntime are all its user needs:

    image: uint8 [batch, height, width, channels]  ->  logits, probabilities: float32 [batch, classes]

Data that is no picture enters as float32 [batch, channels, height, width] and is only standardised.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netwright.console import UserError
from netwright.deploy.exporters import first_line
from netwright.deploy.onnx_graph import first, graph_of
from netwright.deploy.session import CHUNK, FileSize, Latency, Session, file_sizes, latency
from netwright.results import Result
from netwright.storage import atomic_path

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

__all__ = ["Agreement", "FileSize", "Latency", "Session", "check", "export", "file_sizes", "latency"]

IR_VERSION = 8
LARGEST_FILE_BYTES = 2**31 - 2**20  # protobuf ends at 2 GB
FACTS = ("classes", "shape", "mean", "std", "scale", "resize", "netwright")


@dataclass(frozen=True)
class Agreement(Result):
    """How far an exported file is from its network.

    Attributes:
        largest: Largest absolute difference of a logit.
        tolerance: What was allowed.
        images: How many images were compared.
        same_class: Share of them, in [0, 1], whose class is the same.
    """

    largest: float
    tolerance: float
    images: int
    same_class: float


def export(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str],
    resize: bool = True,
    scale: float | None = 255.0,
    metadata: Mapping[str, object] | None = None,
) -> Path:
    """Writes ``module`` in evaluation mode, with its preprocessing, as one ONNX file for batches of any size.

    The module itself is not changed: masks and other parametrizations are baked into a copy. Weights of the
    file bear their names in the module behind ``network.``. The same module gives the same bytes.
    torch takes about a second for a dozen layers, 5 to 10 s for a network of 50 convolutions; a network of the same
    structure as an earlier one, such as the same one after pruning, takes a tenth of that.

    Args:
        module: Takes standardised float32 (batch, channels, height, width), gives logits (batch, classes); of
            a tuple the first entry counts.
        path: The file to write; folders are created.
        shape: (channels, height, width) of what the network was trained on.
        mean: One number a channel, of values divided by ``scale``.
        std: One positive number a channel, likewise.
        classes: Names, in the order of the logits.
        resize: Accept pictures of any height and width and bring them to ``shape`` as Pillow's bilinear
            filter does.
        scale: What a pixel is divided by; ``None`` for data that is no picture (float input, no resizing).
        metadata: More facts to keep in the file: text as it is, anything else as JSON.

    Returns:
        ``path``.

    Raises:
        ValueError: If an argument contradicts another or the network.
        UserError: If torch cannot export the network, or it is larger than the 2 GB of an ONNX file.

    Example:
        >>> import tempfile, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 3))
        >>> facts = {"shape": (1, 4, 4), "mean": [0.5], "std": [0.2], "classes": "abc"}
        >>> path = export(net, tempfile.mkdtemp() + "/net.onnx", **facts)
        >>> session = Session(path)
        >>> session.classes, session.logits(np.zeros((7, 9, 8, 1), np.uint8)).shape
        (('a', 'b', 'c'), (7, 3))
    """
    import onnx
    import torch

    from netwright.deploy.graph import plain_copy

    mean, std, names = [float(m) for m in mean], [float(s) for s in std], [str(c) for c in classes]
    _refuse_bad_facts(shape, mean, std, scale)
    extra = dict(metadata or {})
    if taken := sorted(set(extra) & set(FACTS)):
        raise ValueError(f"metadata must not set {', '.join(taken)}: the file already tells")
    network = plain_copy(module)
    if (size := sum(p.numel() * p.element_size() for p in network.parameters())) > LARGEST_FILE_BYTES:
        raise UserError(f"the network holds {size} bytes of weights; an ONNX file ends at {LARGEST_FILE_BYTES}")
    example = torch.zeros(2, *shape)
    try:
        with torch.no_grad():
            logits = first(network(example))
    except RuntimeError as error:
        raise ValueError(f"shape {tuple(shape)} does not fit the network: {first_line(error)}") from error
    if tuple(logits.shape) != (2, len(names)):
        raise ValueError(
            f"classes must name every logit of the network: {len(names)} names, logits {tuple(logits.shape)}"
        )
    resize = resize and scale is not None
    facts: dict[str, object] = {
        "classes": names, "shape": list(shape), "mean": mean, "std": std, "scale": scale, "resize": resize,
    }  # fmt: skip
    model = _with_preprocessing(graph_of(network, example), tuple(shape), mean, std, scale, resize, len(names))
    model.producer_version = version("netwright")
    for key, value in [*facts.items(), ("netwright", version("netwright")), *sorted(extra.items())]:
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value, allow_nan=False))
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise UserError(f"torch wrote an invalid ONNX graph: {first_line(error)}") from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    return Path(path)


def _refuse_bad_facts(shape: Sequence[int], mean: list[float], std: list[float], scale: float | None) -> None:
    if len(shape) != 3 or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise ValueError(f"shape must be (channels, height, width), each an integer >= 1, got {shape!r}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != shape[0]:
            raise ValueError(f"{name} must hold one number for each of {shape[0]} channels, got {len(values)}")
        if not all(math.isfinite(v) for v in values):
            raise ValueError(f"{name} must be finite, got {values}")
    if min(std) <= 0:
        raise ValueError(f"std must be > 0, got {min(std)}")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be > 0 or None, got {scale}")


def _with_preprocessing(
    network: onnx.ModelProto,
    shape: tuple[int, ...],
    mean: list[float],
    std: list[float],
    scale: float | None,
    resize: bool,
    num_classes: int,
) -> onnx.ModelProto:
    from onnx import TensorProto, helper, numpy_helper

    channels, height, width = shape
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, value: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value), f"preprocess/{name}"))
        return f"preprocess/{name}"

    def apply(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=f"preprocess/{op}", **attributes))
        return output

    if scale is None:
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *shape])
        x = "image"
    else:
        size = ["height", "width"] if resize else [height, width]
        image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", *size, channels])
        x = apply("Cast", ["image"], "preprocess/float", to=TensorProto.FLOAT)
        x = apply("Transpose", [x], "preprocess/channels_first", perm=[0, 3, 1, 2])
        if resize:
            x = apply(
                "Resize",
                [x, "", "", constant("size", np.array([height, width], np.int64))],
                "preprocess/resized",
                axes=[2, 3],
                mode="linear",
                antialias=1,
                coordinate_transformation_mode="half_pixel",
                exclude_outside=1,  # else border pixels also get the weights beyond the border, unlike Pillow
            )
        x = apply("Div", [x, constant("scale", np.float32(scale))], "preprocess/scaled")
    column = (channels, 1, 1)
    x = apply("Sub", [x, constant("mean", np.array(mean, np.float32).reshape(column))], "preprocess/centred")
    nodes.append(
        helper.make_node(
            "Div",
            [x, constant("std", np.array(std, np.float32).reshape(column))],
            ["standardised"],
            name="preprocess/standardise",
        )
    )
    softmax = helper.make_node("Softmax", ["logits"], ["probabilities"], name="Softmax_probabilities", axis=1)
    outputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", num_classes]) for n in ("logits", "probabilities")
    ]
    graph = helper.make_graph(
        [*nodes, *network.graph.node, softmax],
        "netwright",
        [image],
        outputs,
        initializer=[*constants, *network.graph.initializer],
    )
    return helper.make_model(
        graph,
        opset_imports=list(network.opset_import),
        functions=list(network.functions),
        ir_version=IR_VERSION,
        producer_name="netwright",
    )


def check(
    path: str | os.PathLike[str],
    module: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    images: np.ndarray | Tensor,
    tolerance: float = 1e-4,
) -> Agreement:
    """Compares a file with the network it was exported from, image by image.

    Args:
        path: The file.
        module: The network; it is not changed.
        normalise: What stood before the network in training, as :class:`netwright.data.tensors.Normalise`:
            takes (batch, channels, height, width), uint8 or float.
        images: As :class:`Session` takes them. Pictures of another size are resized by torch for the network.
        tolerance: Largest absolute difference of a logit that is allowed.

    Raises:
        ValueError: If there is no image or the images do not fit the file.
        UserError: If the difference is above ``tolerance``.
    """
    import torch

    session = Session(path)
    feed = session.feed(images)
    if len(feed) == 0:
        raise ValueError("images must hold at least 1 image, got 0")
    network = copy.deepcopy(module).eval().cpu().float()
    ours = []
    for i in range(0, len(feed), CHUNK):
        x = torch.from_numpy(feed[i : i + CHUNK])
        if session.picture:
            x = x.permute(0, 3, 1, 2)
            size = session.metadata.get("shape", [None, *x.shape[2:]])[1:]
            if list(x.shape[2:]) != size:
                x = torch.nn.functional.interpolate(x.float(), size, mode="bilinear", antialias=True)
                x = x / session.metadata["scale"]
        with torch.no_grad():
            ours.append(first(network(normalise(x))).numpy())
    network_logits, file_logits = np.concatenate(ours), session.logits(feed)
    largest = float(np.abs(network_logits - file_logits).max())
    if not largest <= tolerance:  # also when it is NaN
        raise UserError(
            f"the file's logits differ from the network's by {largest:.3g}; {tolerance:.3g} is allowed",
            where=path,
            cure="export it again from this network",
        )
    same = float(np.mean(network_logits.argmax(1) == file_logits.argmax(1)))
    return Agreement(largest, tolerance, len(feed), same)
