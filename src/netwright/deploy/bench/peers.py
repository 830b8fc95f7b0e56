"""The runtimes that are compared, each behind the same three questions: are you here, which version, what do I call.

A further runtime is a subclass of :class:`Competitor` and an entry ``name -> "module:class"``; it is a string because
the class is looked up in the process that measures it.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    from netwright.deploy.bench.subject import Work

COMPETITORS = {
    "netwright-native": "netwright.deploy.bench.peers:Native",
    "netwright-torch": "netwright.deploy.bench.peers:OnTorch",
    "pytorch": "netwright.deploy.bench.peers:Eager",
    "torch.compile": "netwright.deploy.bench.peers:Compiled",
    "onnxruntime": "netwright.deploy.bench.peers:OnnxRuntime",
    "openvino": "netwright.deploy.bench.peers:OpenVino",
}


@dataclass(frozen=True)
class Prepared:
    """A runtime with the network loaded.

    Attributes:
        call: Runs it once on the benchmark's input and gives its first output.
        note: What was chosen on the way, such as a memory layout.
        file_bytes: Size on disk, where the runtime has a file.
        table_bytes: What it keeps in memory for the weights, where it tells.
    """

    call: Callable[[], Any]
    note: str = ""
    file_bytes: int | None = None
    table_bytes: int | None = None


class Competitor:
    """One runtime.

    Attributes:
        package: The distribution whose version is stated, and that must be installed.
        reads: What it is given: the module, or the ONNX file that torch made of it.
        dense: Whether it multiplies zeros like any other number.
        pool: Whose threads it uses; runtimes on torch's get a process of their own when there are several.
    """

    package: ClassVar[str]
    reads: ClassVar[Literal["module", "onnx"]] = "module"
    dense: ClassVar[bool] = True
    pool: ClassVar[Literal["torch", "own"]] = "own"

    def absent(self) -> str | None:
        """Why it cannot run here, or None."""
        if importlib.util.find_spec(self.package) is None:
            return f"not installed: pip install {self.package}"
        return None

    def version(self) -> str:
        """Of its package."""
        return version(self.package)

    def load(self) -> None:
        """Imports it, with whatever it maps into memory before it knows a network."""
        importlib.import_module(self.package)

    def prepare(self, work: Work, threads: int) -> Prepared:
        """Loads the network, ready to be called.

        Args:
            work: The benchmark's files.
            threads: Of every pool.
        """
        raise NotImplementedError

    def deploy(self, work: Work, threads: int) -> Prepared:
        """Loads it as a program would that only runs it, for the measurement of memory."""
        return self.prepare(work, threads)


class Native(Competitor):
    """netwright's sparse kernels."""

    package = "netwright"
    dense = False
    backend: ClassVar[Literal["native", "torch"]] = "native"

    def absent(self) -> str | None:
        """The kernels are built by the system's compiler."""
        from netwright.deploy.native.build import BuildError, compiler

        try:
            compiler()
        except BuildError as error:
            return error.what
        return None

    def prepare(self, work: Work, threads: int) -> Prepared:
        """Compiles the network and keeps its artefact for :meth:`deploy`."""
        from netwright import deploy

        module, x = work.module(), _tensor(work)
        model = deploy.compile(module, x, backend=self.backend, threads=threads)
        if model.backend != self.backend:
            raise RuntimeError(f"{model.backend} runs it, not {self.backend}")
        files = model.save(self._artefact(work)).iterdir()
        note = f"arena {model.arena_bytes / 1e6:.1f} MB" if model.arena_bytes else ""
        return Prepared(lambda: model(x), note, sum(file.stat().st_size for file in files), model.nbytes)

    def deploy(self, work: Work, threads: int) -> Prepared:
        """Loads the artefact, so that what compiling needed is not counted."""
        from netwright import deploy

        x = _tensor(work)
        model = deploy.load(self._artefact(work), threads=threads, backend=self.backend)
        return Prepared(lambda: model(x))

    def _artefact(self, work: Work) -> Path:
        return work.artefact.with_name(f"{work.artefact.name}-{self.backend}")


class OnTorch(Native):
    """The same network, folded, on torch's sparse and dense kernels: what serves where there is no compiler."""

    backend = "torch"
    pool = "torch"

    def absent(self) -> str | None:
        """It comes with netwright."""
        return None


class Eager(Competitor):
    """PyTorch as it is, in the faster of its two memory layouts."""

    package = "torch"
    pool = "torch"

    def prepare(self, work: Work, threads: int) -> Prepared:
        """Tries contiguous and channels-last weights and inputs, five rounds each."""
        import torch

        from netwright.cost import compare_times

        module, x = work.module(), _tensor(work)
        calls = {"contiguous": _inference(module, x)}
        if x.ndim == 4:
            last = copy.deepcopy(module).to(memory_format=torch.channels_last)
            calls["channels-last"] = _inference(last, x.contiguous(memory_format=torch.channels_last))
        compared = compare_times(calls, rounds=5)
        best = min(compared.timings, key=lambda timing: timing.best_ms).name
        return Prepared(calls[best], best)


class Compiled(Competitor):
    """torch.compile with the weights frozen into the code."""

    package = "torch"
    pool = "torch"

    def absent(self) -> str | None:
        """Its kernels are built by the system's C++ compiler."""
        asked = os.environ.get("CXX")
        names = [asked] if asked else ["g++", "clang++"]
        return None if any(map(shutil.which, names)) else f"no C++ compiler: looked for {', '.join(names)}"

    def prepare(self, work: Work, threads: int) -> Prepared:
        """Compiles at the first call, which may take a minute."""
        import torch

        compiled = torch.compile(work.module(), options={"freezing": True})
        call = _inference(compiled, _tensor(work))
        call()
        return Prepared(call)


class OnnxRuntime(Competitor):
    """ONNX Runtime: sequential, all optimisations."""

    package = "onnxruntime"
    reads = "onnx"

    def prepare(self, work: Work, threads: int) -> Prepared:
        """Loads the file."""
        from netwright.deploy.session import Session

        session = Session(work.onnx, threads)
        feed = session.feed(work.input())
        return Prepared(lambda: session.call(feed), file_bytes=work.onnx.stat().st_size)


class OpenVino(Competitor):
    """OpenVINO in float32, for the shortest latency."""

    package = "openvino"
    reads = "onnx"

    def load(self) -> None:
        """Core and plug-in are libraries of their own."""
        import openvino

        openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")

    def prepare(self, work: Work, threads: int) -> Prepared:
        """Converts the ONNX file."""
        import openvino

        x = work.input()
        model = openvino.Core().read_model(work.onnx)
        model.reshape(list(x.shape))
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = openvino.compile_model(model, "CPU", settings).create_infer_request()
        request.set_input_tensor(openvino.Tensor(x))

        def call() -> np.ndarray:
            request.infer()
            return request.get_output_tensor(0).data

        return Prepared(call, file_bytes=work.onnx.stat().st_size)


def _tensor(work: Work) -> Any:
    import torch

    return torch.from_numpy(work.input())


def _inference(module: Any, x: Any) -> Callable[[], Any]:
    import torch

    def call() -> Any:
        with torch.inference_mode():
            return module(x)

    return call
