"""A sparse network as plain C files: C99, libm and nothing else, in memory that the caller provides.

Steps and kernels of the network become one C file for any processor, written for blocks of eight floats whatever its
vectors are. Weights lie in a file beside it, which the C code accepts only bit by bit as it was written: no kernel
reads from a place that was not computed here.

    header (64 bytes): magic, byte order, version, size, SHA-256 of the rest
    directory: an int64 a table, its place behind the header; then the tables, each at a multiple of 64 bytes
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright import __version__, storage
from netwright.console import UserError
from netwright.deploy.graph import Graph, capture, check, optimise
from netwright.deploy.graph.ir import Pool, Reshape, Softmax
from netwright.deploy.native.emit import Compiled, compile_graph
from netwright.deploy.native.machine import PORTABLE, Machine
from netwright.deploy.native.program import number

if TYPE_CHECKING:
    import jinja2
    from torch import Tensor, nn

    from netwright.deploy.model import SparseModel

__all__ = ["Preprocessing", "export"]

MAGIC = b"NWSPARSE"
FORMAT = 1
STACK_BYTES = 8192  # of any kernel and what calls it, pools with large windows apart; tests measure it
HEADER_BYTES = 64
# On a core with a second-level cache of 2 MiB, ResNet-18 takes 1.6 ms with kernels for 512 KiB, 1.1 ms with these.
GENERIC = dataclasses.replace(PORTABLE, l2_bytes=1024 * 1024)
LARGEST_NAME = 1000  # bytes of a class; C99 promises string literals of 4095
MODES = {1: ("L", "gray"), 3: ("RGB", "rgb"), 4: ("RGBA", "rgba")}  # of images, for Pillow and ImageMagick


@dataclass(frozen=True)
class Preprocessing:
    """What stands between an image and the network: (image / scale - mean) / std, channel by channel.

    Attributes:
        mean: One number a channel.
        std: One positive number a channel.
        scale: What a uint8 pixel is divided by; None for data that is no picture, and enters as float32.

    Raises:
        ValueError: If a number is not finite, ``scale`` or a ``std`` is not positive, or the lengths differ.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float | None = 255.0

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if len(self.mean) != len(self.std):
            raise ValueError(f"std must hold one number a channel like mean: {len(self.mean)}, got {len(self.std)}")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)):
            raise ValueError(f"mean and std must be finite, got {self.mean} and {self.std}")
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std must be > 0, got {min(self.std)}")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be > 0 or None, got {self.scale}")


def export(
    network: nn.Module | Graph | SparseModel,
    folder: str | os.PathLike[str],
    *,
    example_input: Tensor | Sequence[Tensor] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    name: str = "model",
    machine: Machine = GENERIC,
) -> list[Path]:
    """Writes a network as C: its code, its weights, a program that uses both, and what builds it.

    A network with one input and scores of classes gets a program that classifies raw images, any other one a program
    that runs it on files of floats. The batch size is fixed.

    Args:
        network: A module, captured in evaluation mode, a graph, or a compiled network.
        folder: Is made by this function, all at once when everything has been written.
        example_input: One float32 tensor for each input of a module.
        classes: Names in the order of the scores; numbers when not given.
        preprocessing: What precedes the network, for the program; nothing when not given.
        name: Of the C files, and the beginning of every name that they export.
        machine: The processor whose vectors and caches kernels are chosen for; others run them too. Blocks of 16 floats
            suit one with AVX-512.

    Returns:
        The files.

    Raises:
        ValueError: If an argument contradicts another or the network.
        UserError: If the folder has something in it, or the network has operators that the runtime lacks.

    Example:
        >>> import tempfile, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2)).eval()
        >>> files = export(net, tempfile.mkdtemp(), example_input=torch.zeros(1, 3, 8, 8))
        >>> [file.name for file in files]
        ['CMakeLists.txt', 'Makefile', 'README.txt', 'main.c', 'model.c', 'model.h', 'model.weights']
    """
    if not re.fullmatch("(?!main$|nw$|nw_)[a-z][a-z0-9_]{0,47}", name):
        raise ValueError(f"name must be a C name in lower case other than main, nw and nw_..., got {name!r}")
    if sys.byteorder != "little":
        raise UserError("weights of C are written on little-endian processors only")
    graph = _graph(network, example_input)
    compiled = compile_graph(graph, machine)
    weights = _weights(compiled.tables)
    facts = _facts(graph, compiled, weights, classes, preprocessing, name) | {"unit": machine.unit}
    texts = {
        f"{name}.h": _render("model.h.in", facts),
        f"{name}.c": _render("front.c.in", facts) + compiled.text + _render("entry.c.in", facts),
        "main.c": _render("classify.c.in" if facts["classes"] else "apply.c.in", facts),
        "Makefile": _render("Makefile.in", facts),
        "CMakeLists.txt": _render("CMakeLists.txt.in", facts),
        "README.txt": _render("README.txt.in", facts),
    }
    files: dict[str, bytes] = {file: text.encode() for file, text in texts.items()}
    files[f"{name}.weights"] = weights
    return _write(Path(folder), dict(sorted(files.items())))


def _graph(network: nn.Module | Graph | SparseModel, example_input: Tensor | Sequence[Tensor] | None) -> Graph:
    from torch import nn

    if isinstance(network, nn.Module):
        if example_input is None:
            raise ValueError("example_input must be given for a module: sizes of a C program are fixed")
        graph = capture(network, example_input)
    elif example_input is not None:
        raise ValueError("example_input must be None for a graph, which has its sizes")
    else:
        graph = network if isinstance(network, Graph) else network.graph
    check(graph)
    if not graph.inputs:
        raise ValueError("network must have at least 1 input, got 0")
    graph = optimise(graph)
    for node in graph:
        # paths stand in comments, and a module may have any name
        node.path = re.sub(r"[^\w.+ ]", "_", node.path, flags=re.ASCII)
    return graph


def _weights(tables: bytes) -> bytes:
    head = MAGIC + (0x01020304).to_bytes(4, "little") + FORMAT.to_bytes(4, "little")
    head += (HEADER_BYTES + len(tables)).to_bytes(8, "little") + bytes(8)
    return head + hashlib.sha256(tables).digest() + tables


def _facts(
    graph: Graph,
    compiled: Compiled,
    weights: bytes,
    classes: Sequence[str] | None,
    preprocessing: Preprocessing | None,
    name: str,
) -> dict[str, Any]:
    """What the templates tell."""
    inputs, outputs = _arrays("input", graph.inputs, graph), _arrays("output", graph.outputs, graph)
    parameters = [f"const float *{each['name']}" for each in inputs] + [f"float *{each['name']}" for each in outputs]
    facts: dict[str, Any] = {
        "name": name,
        "NAME": name.upper(),
        "version": __version__,
        "inputs": inputs,
        "outputs": outputs,
        "parameters": ", ".join(parameters),
        "arguments": ", ".join(each["name"] for each in inputs + outputs),
        "weights_bytes": len(weights),
        "arena_bytes": 4 * compiled.arena_floats,
        "stack_bytes": _stack_bytes(graph),
        "magic": MAGIC.decode(),
        "format": FORMAT,
        "digest": _lines([str(byte) for byte in weights[32:64]]),
        "classes": [],
        "preparation": None,
        "program": "apply",
    }
    shape, scores = _shape(graph.inputs[0], graph), _shape(graph.outputs[0], graph)
    is_classifier = len(inputs) == len(outputs) == 1 and scores[2:] in {(), (1, 1)}
    if not is_classifier:
        for argument, value in (("classes", classes), ("preprocessing", preprocessing)):
            if value is not None:
                raise ValueError(f"{argument} must be None for a network without one input and one row of scores")
        return facts
    names = [str(c) for c in classes] if classes is not None else [str(i) for i in range(scores[1])]
    if len(names) != scores[1]:
        raise ValueError(f"classes must name every score of the network: {scores[1]}, got {len(names)}")
    return facts | {
        "program": "classify",
        "classes": [_literal(name) for name in names],
        "images": scores[0],
        "scores": _scores(graph),
        "preparation": _preparation(shape, preprocessing),
    }


def _stack_bytes(graph: Graph) -> int:
    """Pools keep a row and a column of their window, each in registers or on the stack, beside what was there."""
    windows = (sum(node.op.kernel) for node in graph if isinstance(node.op, Pool))
    return STACK_BYTES + 80 * max(windows, default=0)


def _shape(value: int, graph: Graph) -> tuple[int, ...]:
    return graph.views.get(value, graph.shapes[value])


def _arrays(kind: str, values: Sequence[int], graph: Graph) -> list[dict[str, Any]]:
    found = []
    for place, value in enumerate(values):
        shape = _shape(value, graph)
        label = kind if len(values) == 1 else f"{kind}{place}"
        found.append({"name": label, "floats": math.prod(shape), "shape": " x ".join(map(str, shape))})
    return found


def _scores(graph: Graph) -> str:
    """What a network's output is: logits, probabilities, or their logarithms."""
    producers = graph.producers()
    node = producers.get(graph.outputs[0])
    while node is not None and isinstance(node.op, Reshape):
        node = producers.get(node.inputs[0])
    if node is None or not isinstance(node.op, Softmax):
        return "logits"
    return "logarithms" if node.op.log else "probabilities"


def _preparation(shape: tuple[int, ...], preprocessing: Preprocessing | None) -> dict[str, Any]:
    """How an image of a file becomes an input."""
    sizes = " x ".join(map(str, shape[1:]))
    floats = math.prod(shape[1:])
    plain = {"type": "float", "bytes": 4 * floats, "picture": False, "mean": ""}
    if preprocessing is None:
        return plain | {"told": f"float32, {sizes}, as this processor stores them, standardised already"}
    if len(shape) != 4:
        raise ValueError(f"preprocessing must be None for an input without channels, rows and columns, got {shape}")
    _, channels, height, width = shape
    if len(preprocessing.mean) != channels:
        raise ValueError(f"mean must hold one number for each of {channels} channels, got {len(preprocessing.mean)}")
    told = plain | {
        "told": f"float32, {sizes} (channels, rows, columns), as this processor stores them",
        "mean": ", ".join(map(number, preprocessing.mean)),
        "std": ", ".join(map(number, preprocessing.std)),
        "channels": channels,
        "height": height,
        "width": width,
        "pixels": height * width,
    }
    if preprocessing.scale is None:
        return told
    return told | {
        "type": "unsigned char",
        "bytes": floats,
        "picture": True,
        "scale": number(preprocessing.scale),
        "told": f"one byte a number, {height} x {width} x {channels} (rows, columns, channels)",
        "modes": MODES.get(channels),
    }


def _literal(text: str) -> str:
    """A C string literal of UTF-8 bytes, without trigraphs.

    Example:
        >>> print(_literal('a "b"?'), _literal("é"))
        "a \\042b\\042\\077" "\\303\\251"
    """
    data = text.encode()
    if len(data) > LARGEST_NAME:
        raise ValueError(f"a name in classes must have at most {LARGEST_NAME} bytes, got {len(data)}")
    return '"' + "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}" for b in data) + '"'


def _lines(words: Sequence[str], per_line: int = 16, indent: str = "    ") -> str:
    rows = [", ".join(words[at : at + per_line]) for at in range(0, len(words), per_line)]
    return ",\n".join(indent + row for row in rows)


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("netwright.deploy.native", "package"),
        variable_start_string="@(",
        variable_end_string=")@",
        block_start_string="@%",
        block_end_string="%@",
        comment_start_string="@#",
        comment_end_string="#@",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )


def _render(template: str, facts: Mapping[str, Any]) -> str:
    return _environment().get_template(template).render(facts)


def _write(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Makes a folder with all files, or none: written beside it, then renamed."""
    target = folder.resolve()
    made = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError("there is something already", where=folder, cure="choose another folder")
        made.mkdir(parents=True)
        for file, content in files.items():
            storage.write_bytes(made / file, content)
        made.rename(target)  # fails if something came into the folder meanwhile
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", where=folder, cure="choose another folder") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return [folder / file for file in files]
