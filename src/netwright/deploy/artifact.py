"""A saved network: a folder with its graph as JSON and its weights as safetensors.

What is read is checked in full before anything is made of it: the size and SHA-256 of the tensors, the digest, version
and types of the JSON, then the sense of the graph. Compiled code is never saved; it is made from the graph, on the
machine that loads it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from netwright import __version__, storage
from netwright.console import UserError
from netwright.deploy.graph.ir import OPS, Activation, Array
from netwright.deploy.stored import ENCODINGS, ArtifactError, Stored

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT, VERSION = "netwright sparse network", 1
STRUCTURE, TENSORS = "model.json", "model.safetensors"
MOST_STRUCTURE_BYTES = 2**26
LARGEST_INTEGER = 2**31 - 1
LARGEST_FLOAT = 3.4028234663852886e38  # of float32
PATH = r"[A-Za-z0-9_.+\- ]*"  # module paths stand in comments of C
CLOSED: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class _Reference:
    """What stands for an array in a node."""

    __pydantic_config__: ClassVar[dict[str, Any]] = CLOSED
    array: str


@dataclass(frozen=True)
class _Form:
    """What stands for an array in the list of all."""

    __pydantic_config__: ClassVar[dict[str, Any]] = CLOSED
    shape: list[int]
    encoding: str


@dataclass(frozen=True)
class _Tensors:
    __pydantic_config__: ClassVar[dict[str, Any]] = CLOSED
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Graph:
    __pydantic_config__: ClassVar[dict[str, Any]] = CLOSED
    shapes: dict[str, list[int]]
    nodes: list[dict[str, Any]]
    inputs: list[int]
    outputs: list[int]
    views: dict[str, list[int]]


@dataclass(frozen=True)
class _Content:
    """The JSON file."""

    __pydantic_config__: ClassVar[dict[str, Any]] = CLOSED
    format: str
    version: int
    netwright: str
    tensors: _Tensors
    arrays: dict[str, _Form]
    graph: _Graph
    digest: str


@dataclass(frozen=True)
class _Place:
    """What every node has beside the fields of its operation."""

    op: str
    inputs: list[int]
    output: int
    path: str


# the form of those fields of an operation that are no plain values
IN_JSON: dict[Any, Any] = {
    Array: _Reference,
    Array | None: _Reference | None,
    Activation: tuple[str, float | None, float | None],
}


def write(path: str | os.PathLike[str], stored: Stored) -> Path:
    """Writes a folder with the two files; one that holds a saved network is replaced.

    Raises:
        UserError: If something else is there, or the folder cannot be written.
    """
    from safetensors.numpy import save

    target = Path(path)
    if os.path.lexists(target) and not (target / STRUCTURE).is_file():
        raise UserError("there is something else already", where=target, cure="choose another name")
    tensors = save(stored.tensors)
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "netwright": __version__,
        "tensors": {"bytes": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()},
        "arrays": stored.arrays,
        "graph": stored.structure,
    }
    content["digest"] = storage.digest(content)
    text = json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # renamed as a whole, so that whoever reads finds two files that belong together
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as made:
            storage.write_bytes(Path(made, "new", TENSORS), tensors)
            storage.write_text(Path(made, "new", STRUCTURE), text)
            if os.path.lexists(target):
                os.rename(target, Path(made, "old"))
            os.rename(Path(made, "new"), target)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", where=target, cure="choose another folder") from error
    return target


def read(path: str | os.PathLike[str]) -> Stored:
    """Reads what :func:`write` wrote, as far as files go; :func:`netwright.deploy.stored.unpack` judges the network.

    Raises:
        ArtifactError: If a file is missing, damaged or of another version, or the two do not belong together.
    """
    structure, tensors = Path(path, STRUCTURE), Path(path, TENSORS)
    content = _parsed(_content(structure, MOST_STRUCTURE_BYTES), structure)
    size, digest = content["tensors"]["bytes"], content["tensors"]["sha256"]
    raw = _content(tensors, size)
    if len(raw) != size:
        raise ArtifactError(f"truncated: {len(raw)} bytes of {size}", where=tensors, cure="copy it again")
    if hashlib.sha256(raw).hexdigest() != digest:
        raise ArtifactError("not the weights of this network, or damaged", where=tensors, cure="copy both files again")
    return Stored(content["graph"], content["arrays"], _tensors(raw, tensors))


def _content(file: Path, most: int) -> bytes:
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise ArtifactError("not a file", where=file)
        if size > most:
            raise ArtifactError(f"too long: {size} bytes where at most {most} may be", where=file)
        return file.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        told = "no such file" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else f"cannot read: {error}"
        raise ArtifactError(told, where=file, cure="give the folder that was saved") from error


def _tensors(raw: bytes, file: Path) -> dict[str, Array]:
    from safetensors.numpy import load

    try:
        return load(raw)
    except Exception as error:  # the parser's own errors, and those of NumPy about types that it does not know
        raise ArtifactError(f"damaged weights: {error}", where=file) from error


def _parsed(raw: bytes, file: Path) -> dict[str, Any]:
    """The content of the JSON file: magic, version, digest, then types."""
    from pydantic import TypeAdapter

    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"not a JSON file: {error}", where=file) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError("not a saved network", where=file)
    if content.get("version") != VERSION:
        told = f"saved in version {content.get('version')!r} of the format, this netwright reads {VERSION}"
        raise ArtifactError(told, where=file, cure="save it again with this netwright, or use the one that saved it")
    rest = {key: value for key, value in content.items() if key != "digest"}
    if content.get("digest") != storage.digest(rest):
        raise ArtifactError("damaged: the digest is another", where=file, cure="copy it again")
    try:
        _check_numbers(content)
        _check_type(TypeAdapter(_Content), content, "the file")
        for number, entry in enumerate(content["graph"]["nodes"]):
            _check_node(entry, f"node {number}")
        for name, form in content["arrays"].items():
            if form["encoding"] not in ENCODINGS:
                raise ValueError(f"{name}: encoding must be one of {', '.join(ENCODINGS)}, got {form['encoding']!r}")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"not a saved network: {error}", where=file) from error
    return content


def _check_numbers(value: Any) -> None:
    """Numbers become those of C: int32 and float32."""
    if isinstance(value, (int, float)):
        most = LARGEST_INTEGER if isinstance(value, int) else LARGEST_FLOAT
        if not -most <= value <= most:  # false for NaN
            raise ValueError(f"numbers must lie in [-{most}, {most}], got {value}")
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_numbers(part)


def _check_node(entry: dict[str, Any], name: str) -> None:
    op = str(entry.get("op"))
    if op not in OPS:
        raise ValueError(f"{name}: op must be one of {', '.join(OPS)}, got {op!r}")
    checks = _checks(op)
    if set(entry) != set(checks):
        raise ValueError(f"{name}: fields must be {', '.join(checks)}, got {', '.join(entry)}")
    for field, check in checks.items():
        _check_type(check, entry[field], f"{name}.{field}")
    if not re.fullmatch(PATH, entry["path"]):
        raise ValueError(f"{name}: path must be letters, digits and any of '_.+- ', got {entry['path']!r}")


@functools.cache
def _checks(op: str) -> dict[str, TypeAdapter[Any]]:
    """Of every field of a node with this operation, what it must be."""
    from pydantic import TypeAdapter

    hints = typing.get_type_hints(OPS[op])
    wanted = typing.get_type_hints(_Place) | {part.name: hints[part.name] for part in fields(OPS[op])}
    return {name: TypeAdapter(IN_JSON.get(hint, hint)) for name, hint in wanted.items()}


def _check_type(check: TypeAdapter[Any], value: Any, name: str) -> None:
    from pydantic import ValidationError

    try:
        # through JSON, where a list may stand for a tuple although nothing else is converted
        check.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise ValueError(f"{name}: {faults}") from error
