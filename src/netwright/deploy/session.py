"""Running an ONNX file: logits, latency with the threads stated, and size on disk. Needs no torch."""

from __future__ import annotations

import gzip
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netwright.console import UserError
from netwright.results import Result

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

CHUNK = 256  # images for one run of a session


@dataclass(frozen=True)
class Latency(Result):
    """How long one call takes, preprocessing included, in milliseconds.

    Attributes:
        median_ms: Median over the rounds.
        p10_ms: 10th percentile.
        p90_ms: 90th percentile.
        batch: Images in one call.
        threads: Threads of the runtime.
        rounds: Calls that were timed.
        runtime: Its name and version.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    batch: int
    threads: int
    rounds: int
    runtime: str


@dataclass(frozen=True)
class FileSize(Result):
    """Bytes of a file as it is (``raw``) and compressed by gzip (``gzipped``)."""

    raw: int
    gzipped: int


class Session:
    """An ONNX file in ONNX Runtime, on the CPU, with a stated number of threads.

    A NumPy array is taken in the layout of the file (pictures: uint8 (batch, height, width, channels)); a
    torch tensor in torch's (batch, channels, height, width).

    Args:
        path: A file of :func:`export`, or any ONNX file whose first input is a batch of float32 images.
        threads: Threads of the runtime, for this session alone.

    Attributes:
        classes: Names in the order of the logits; empty for a file that tells none.
        metadata: Facts the file keeps, decoded where they are JSON.
        picture: Whether the file takes uint8 pictures.
        threads: As given.

    Raises:
        ValueError: If ``threads`` is below 1.
        UserError: If the file is missing or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1):
        import onnxruntime as ort

        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads must be an integer >= 1, got {threads!r}")
        self.path, self.threads = Path(path), threads
        if not self.path.is_file():
            raise UserError("no such file", where=self.path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's exceptions have no common class but this one
            raise UserError("not an ONNX file that ONNX Runtime can read", where=self.path) from error
        properties = self._session.get_modelmeta().custom_metadata_map
        self.metadata: dict[str, Any] = {key: _decoded(value) for key, value in properties.items()}
        self.classes: tuple[str, ...] = tuple(self.metadata.get("classes") or ())
        source = self._session.get_inputs()[0]
        self._input = source.name
        self._shape: list[int | str | None] = list(source.shape)
        self.picture: bool = source.type == "tensor(uint8)"
        names = [output.name for output in self._session.get_outputs()]
        self._outputs = {"logits": "logits" if "logits" in names else names[0]}
        if "probabilities" in names:
            self._outputs["probabilities"] = "probabilities"

    def logits(self, images: np.ndarray | Tensor) -> Float[np.ndarray, "batch classes"]:
        """Logits as float32.

        Raises:
            ValueError: If the images have another shape or type than the file takes.
        """
        return self._run("logits", self.feed(images))

    def probabilities(self, images: np.ndarray | Tensor) -> Float[np.ndarray, "batch classes"]:
        """Probabilities of the classes, each row summing to 1.

        Raises:
            ValueError: As :meth:`logits`, and for a file without this output.
        """
        if "probabilities" not in self._outputs:
            raise ValueError(f"{self.path} has no output called probabilities")
        return self._run("probabilities", self.feed(images))

    def feed(self, images: np.ndarray | Tensor) -> np.ndarray:
        """``images`` as the array the file takes."""
        if isinstance(images, np.ndarray):
            array = images
        else:
            array = images.detach().cpu().numpy()
            if self.picture and array.ndim == 4:
                array = array.transpose(0, 2, 3, 1)
        wanted = np.dtype(np.uint8 if self.picture else np.float32)
        if array.dtype != wanted:
            raise ValueError(f"images must be {wanted}, got {array.dtype}")
        fits = array.ndim == len(self._shape) and all(
            not isinstance(n, int) or n == m for n, m in zip(self._shape, array.shape, strict=True)
        )
        if not fits or 0 in array.shape[1:]:
            raise ValueError(f"images must have the shape {self._shape}, got {list(array.shape)}")
        return np.ascontiguousarray(array)

    def _run(self, output: str, feed: np.ndarray) -> np.ndarray:
        if len(feed) == 0:
            return np.zeros((0, len(self.classes)), np.float32)
        chunks = [feed[i : i + CHUNK] for i in range(0, len(feed), CHUNK)]
        return np.concatenate([self._session.run([self._outputs[output]], {self._input: c})[0] for c in chunks])

    def call(self, feed: np.ndarray) -> np.ndarray:
        """One bare call of the runtime on what :meth:`feed` gave: what :func:`latency` times."""
        return self._session.run([self._outputs["logits"]], {self._input: feed})[0]


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def latency(
    session: Session, images: np.ndarray | Tensor, batch: int = 1, rounds: int = 200, warmup: int = 10
) -> Latency:
    """Times calls of ``session`` on ``batch`` images each, taken from ``images`` in turn.

    Raises:
        ValueError: If ``batch`` or ``rounds`` is below 1, ``warmup`` below 0, or there is no image.
    """
    import onnxruntime

    for name, value, least in (("batch", batch, 1), ("rounds", rounds, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    feed = session.feed(images)
    if len(feed) == 0:
        raise ValueError("images must hold at least 1 image, got 0")
    distinct = math.lcm(len(feed), batch) // batch
    batches = [
        np.take(feed, range(i * batch, (i + 1) * batch), axis=0, mode="wrap") for i in range(min(distinct, rounds, 16))
    ]
    p10, median, p90 = time_calls(session.call, batches, rounds, warmup)
    runtime = f"ONNX Runtime {onnxruntime.__version__}"
    return Latency(median, p10, p90, batch, session.threads, rounds, runtime)


def time_calls(
    call: Callable[[np.ndarray], object], batches: Sequence[np.ndarray], rounds: int, warmup: int = 10
) -> tuple[float, float, float]:
    """10th percentile, median and 90th percentile of ``rounds`` calls on ``batches`` in turn, in milliseconds.

    Example:
        >>> low, middle, high = time_calls(np.sum, [np.ones(10)], rounds=20)
        >>> 0 < low <= middle <= high
        True
    """
    seconds = []
    for i in range(-warmup, rounds):
        x = batches[i % len(batches)]
        start = time.perf_counter()
        call(x)
        if i >= 0:
            seconds.append(time.perf_counter() - start)
    low, middle, high = np.percentile(1e3 * np.array(seconds), [10, 50, 90]).tolist()
    return low, middle, high


def file_sizes(path: str | os.PathLike[str]) -> FileSize:
    """Bytes of a file, raw and gzipped.

    Raises:
        UserError: If there is no such file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "zeros")
        >>> _ = path.write_bytes(bytes(1000))
        >>> size = file_sizes(path)
        >>> size.raw, size.gzipped < 50
        (1000, True)
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError("no such file", where=path) from error
    return FileSize(len(data), len(gzip.compress(data, mtime=0)))
