"""The face of the sparse runtime: a network goes in, and comes out several times faster and exact to rounding."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from netwright.console import UserError, warn
from netwright.deploy import artifact
from netwright.deploy.engines import Backend, MixedEngine, Numbers, make_engine, shortest, tensor, views
from netwright.deploy.graph import Graph, Segments, UnsupportedOperator, capture, check, optimise, split
from netwright.deploy.profile import Profile
from netwright.deploy.stored import ArtifactError, Stored, pack, unpack
from netwright.deploy.work import macs, weights

Shape = tuple[int, ...]

MOST_THREADS = 256
WORTH_FROM = 0.5  # share of zeros below which a dense runtime is the better choice


def compile(
    model: nn.Module | Graph,
    example_input: Numbers | Sequence[Numbers] | None = None,
    backend: Backend = "native",
    threads: int = 1,
    fallback: Literal["torch"] | None = None,
    *,
    tune: bool = False,
) -> SparseModel:
    """Makes a network that skips its zeros.

    The module is not changed. It is compiled as in evaluation mode, with masks and parametrizations baked in, for
    inputs of the example's shapes; without a C compiler PyTorch runs it, which is slower, and a warning says so.

    Args:
        model: A module that ``torch.export`` can trace, or a graph, which is optimised first.
        example_input: A float32 array or tensor, or a tuple of them; needed for a module. Only its shape matters.
        backend: ``"native"``, C kernels built by the system's compiler, or ``"torch"``.
        threads: Threads of each call, 1 to 256.
        fallback: ``"torch"`` leaves operators that the runtime does not have to PyTorch; by default they are refused.
        tune: Whether kernels are chosen by measuring them, which takes seconds once and is cached, and not by a cost
            model.

    Raises:
        UnsupportedOperator: If there are operators that the runtime does not have; it names all of them.
        UserError: If torch cannot trace the network.
        ValueError: If an argument is out of range, an example is no float32 array of the processor, or activations
            exceed 2 GiB.
        TypeError: If a module comes without an example.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
        >>> for layer in (net[0], net[3]):
        ...     layer.weight.data *= torch.rand_like(layer.weight) < 0.1
        >>> x = torch.rand(1, 3, 4, 4)
        >>> fast = compile(net, x)
        >>> torch.allclose(fast(x), net(x), atol=1e-6), fast(x.numpy()).dtype
        (True, dtype('float32'))
    """
    if fallback not in {None, "torch"}:
        raise ValueError(f"fallback must be None or 'torch', got {fallback!r}")
    if isinstance(model, Graph):
        check(model)
        return _told(SparseModel(optimise(model), backend=backend, threads=threads, tune=tune))
    if example_input is None:
        raise TypeError("example_input must be given for a module")
    examples = _examples(example_input)
    network: Graph | Segments
    try:
        network = optimise(capture(model, examples))
    except UnsupportedOperator:
        if fallback is None:
            raise
        network = _optimised(split(model, examples))
    made = SparseModel(network, [tuple(x.shape) for x in examples], backend=backend, threads=threads, tune=tune)
    return _told(made)


def load(
    path: str | os.PathLike[str], threads: int = 1, backend: Backend = "native", *, tune: bool = False
) -> SparseModel:
    """Reads a network that :meth:`SparseModel.save` wrote, and compiles it for this machine.

    Args:
        path: The folder.
        threads: As for :func:`compile`.
        backend: Likewise.
        tune: Likewise.

    Raises:
        ArtifactError: If files are missing, damaged, of another version, or do not describe a sound network.
        ValueError: If ``threads`` or ``backend`` is out of range.

    Example:
        >>> import tempfile
        >>> fast = compile(nn.Linear(4, 2), torch.rand(1, 4), backend="torch")
        >>> loaded = load(fast.save(Path(tempfile.mkdtemp(), "small")), backend="torch")
        >>> torch.equal(loaded(torch.ones(1, 4)), fast(torch.ones(1, 4)))
        True
    """
    _check_settings(backend, threads)
    stored = artifact.read(path)
    try:
        return SparseModel(stored, backend=backend, threads=threads, tune=tune)
    except ValueError as error:
        told = error.what if isinstance(error, UserError) else f"not a sound network: {error}"
        raise ArtifactError(told, where=path) from error


class SparseModel:
    """A compiled network, called like a function; made by :func:`compile` and :func:`load`.

    Tensors give tensors, NumPy arrays give arrays: one, or a tuple if the network has several outputs, flattened in the
    order of torch's trees. Contiguous inputs are read where they are, others are copied once. There are no gradients.

    Calls from several threads take turns; :meth:`clone` gives a network that can run beside this one. Copies are
    clones, and what is unpickled is compiled again, in the process where it arrives.

    A weight that is zero does not exist: what is not finite spreads along the weights that are kept, while PyTorch
    makes NaN of zero times infinity.

    What it tells of weights is about the compiled network: batch norms are folded, channels that are constant are gone.

    Attributes:
        backend: ``"native"`` or ``"torch"``: what really runs it.
        threads: Threads of each call.
        inputs: Shapes of its inputs; the first size is the batch, and fixed like the others.
        outputs: Shapes of its outputs.
        weights: (all, zeros) of its convolutions and linear layers, biases apart.
        macs: Multiply-adds of these layers: (dense, kept), with and without those of zeros.
        nbytes: Bytes of the weights as the backend keeps them.
        arena_bytes: Bytes of the memory that the backend keeps to work in.
    """

    def __init__(
        self,
        network: Graph | Stored | Segments,
        inputs: Sequence[Shape] = (),
        *,
        backend: Backend = "native",
        threads: int = 1,
        tune: bool = False,
    ) -> None:
        _check_settings(backend, threads)
        self.threads, self._settings = threads, {"backend": backend, "threads": threads, "tune": tune}
        whole = unpack(network) if isinstance(network, Stored) else network
        # of a graph only the stored form is kept: calls need no more than the engine, which has weights of its own
        self._network = pack(network) if isinstance(network, Graph) else network
        self.backend, self._engine = make_engine(whole, backend, threads, tune)
        graphs = whole.graphs if isinstance(whole, Segments) else [whole]
        self.weights, self.macs = weights(*graphs), macs(*graphs)
        self.nbytes, self.arena_bytes = self._engine.nbytes, self._engine.arena_bytes
        if isinstance(self._engine, MixedEngine):
            found = self._engine.run([torch.zeros(shape) for shape in inputs])
            self.inputs, self.outputs = tuple(inputs), tuple(tuple(y.shape) for y in found)
            types = [y.dtype for y in found]
        else:
            (graph,) = graphs
            self.inputs, self.outputs = views(graph, graph.inputs), views(graph, graph.outputs)
            types = [torch.float32] * len(self.outputs)
        self._results = list(zip(self.outputs, types, strict=True))

    def __call__(self, *inputs: Numbers, out: Numbers | Sequence[Numbers] | None = None) -> Any:
        """Runs the network.

        Args:
            inputs: All tensors, or all NumPy arrays, float32 on the processor, of the shapes in ``inputs``.
            out: Where results go, in place of new memory: contiguous, of the shapes in ``outputs``.

        Raises:
            TypeError: If an input is something else, or of another type.
            ValueError: If the number of inputs, a shape or a device is another.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"inputs must be {len(self.inputs)}, got {len(inputs)}")
        given = [_contiguous(_checked(f"input {i}", x, self.inputs[i])) for i, x in enumerate(inputs)]
        arrays = bool(given) and not isinstance(given[0], Tensor)
        if any(isinstance(x, Tensor) == arrays for x in given):
            raise TypeError("inputs must be all tensors or all arrays, got both")
        if out is None:
            made = [torch.empty(shape, dtype=kind) for shape, kind in self._results]
            results: Sequence[Numbers] = [y.numpy() for y in made] if arrays else made
        else:
            results = self._targets(out)
        self._engine.fill(given, results)
        return results[0] if len(results) == 1 else tuple(results)

    def _targets(self, out: Numbers | Sequence[Numbers]) -> list[Numbers]:
        targets = [out] if isinstance(out, (Tensor, np.ndarray)) else list(out)
        if len(targets) != len(self.outputs):
            raise ValueError(f"out must be {len(self.outputs)} arrays, got {len(targets)}")
        for i, (y, (shape, kind)) in enumerate(zip(targets, self._results, strict=True)):
            _checked(f"out {i}", y, shape, kind)
            if _contiguous(y) is not y or (isinstance(y, np.ndarray) and not y.flags.writeable):
                raise ValueError(f"out {i} must be contiguous and writable")
        return targets

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights of convolutions and linear layers; 0 for a network without any."""
        return self.weights.zeros / self.weights.all if self.weights.all else 0.0

    @property
    def graphs(self) -> list[Graph]:
        """The graphs that are compiled: one, unless operators were left to PyTorch; made anew from the stored form."""
        return self._network.graphs if isinstance(self._network, Segments) else [unpack(self._network)]

    @property
    def graph(self) -> Graph:
        """The one graph.

        Raises:
            ValueError: If operators were left to PyTorch.
        """
        if isinstance(self._network, Segments):
            raise ValueError(f"the network is no single graph: {_left(self._network)}")
        return unpack(self._network)

    def clone(self) -> SparseModel:
        """A network that shares code and weights, and can run at the same time.

        With several threads the two still take turns: they share these.
        """
        twin = object.__new__(SparseModel)
        vars(twin).update(vars(self), _engine=self._engine.clone())
        return twin

    def save(self, path: str | os.PathLike[str], quantize: Literal["int8"] | None = None) -> Path:
        """Writes a folder with ``model.json`` and ``model.safetensors``, in which zeros take no room.

        Args:
            path: The folder; a saved network that is there is replaced.
            quantize: ``"int8"`` keeps each weight as a multiple, up to 127, of its output channel's scale. That saves
                file, not time: weights are float32 again once loaded. Weights below half a scale are dropped.

        Returns:
            The folder.

        Raises:
            UserError: If operators were left to PyTorch, something else is there, or the folder cannot be written.
            ValueError: If ``quantize`` is something else, or weights to be quantised are not finite.
        """
        if isinstance(self._network, Segments):
            raise UserError(f"the network cannot be saved: {_left(self._network)}")
        return artifact.write(path, pack(self.graph, quantize=quantize) if quantize is not None else self._network)

    def profile(self, *inputs: Numbers, repeats: int = 20) -> Profile:
        """Times every step.

        Args:
            inputs: As for a call; normal random numbers by default.
            repeats: How often each step and the whole call are timed, at least 1.

        Raises:
            ValueError: If ``repeats`` is below 1.
        """
        if repeats < 1:
            raise ValueError(f"repeats must be >= 1, got {repeats}")
        source = np.random.default_rng(0)
        given = inputs or tuple(source.standard_normal(shape, np.float32) for shape in self.inputs)
        out = self(*given)
        whole = shortest(lambda: self(*given, out=out), repeats)
        tensors = [tensor(_contiguous(x)) for x in given]
        steps = self._engine.steps(self.graphs, tensors, repeats)
        return Profile.of(steps, whole, self.backend, self.threads, repeats)

    def __copy__(self) -> SparseModel:
        return self.clone()

    def __deepcopy__(self, memo: object) -> SparseModel:
        return self.clone()

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._network, self.inputs, self._settings)

    def __repr__(self) -> str:
        shapes = f"{', '.join(map(str, self.inputs))} -> {', '.join(map(str, self.outputs))}"
        work = f"{self.macs.kept / 1e6:.1f} of {self.macs.dense / 1e6:.1f} M MACs"
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"SparseModel({shapes}; {100 * self.sparsity:.1f} % zeros, {work}; {self.backend}, {threads})"


def _again(network: Stored | Segments, inputs: Sequence[Shape], settings: dict[str, Any]) -> SparseModel:
    return SparseModel(network, inputs, **settings)


def _told(made: SparseModel) -> SparseModel:
    """The same, with a warning if it is not worth it."""
    if made.weights.all and made.sparsity < WORTH_FROM:
        share = f"{100 * made.sparsity:.0f} % of its weights are zero"
        warn(f"{share}: a mostly dense network is faster in ONNX Runtime (netwright.deploy.export)")
    return made


def _optimised(network: Segments) -> Segments:
    parts = [
        dataclasses.replace(part, body=optimise(part.body)) if isinstance(part.body, Graph) else part
        for part in network.parts
    ]
    return dataclasses.replace(network, parts=tuple(parts))


def _left(network: Segments) -> str:
    return f"PyTorch runs {', '.join(dict.fromkeys(each.operator for each in network.unsupported))}"


def _check_settings(backend: str, threads: int) -> None:
    if backend not in {"native", "torch"}:
        raise ValueError(f"backend must be 'native' or 'torch', got {backend!r}")
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads must be an integer in [1, {MOST_THREADS}], got {threads!r}")


def _examples(given: Numbers | Sequence[Numbers]) -> tuple[Tensor, ...]:
    parts = (given,) if isinstance(given, (Tensor, np.ndarray)) else tuple(given)
    return tuple(torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else x for x in parts)


def _checked(name: str, x: Numbers, shape: Shape, kind: torch.dtype = torch.float32) -> Numbers:
    found: torch.dtype | None
    if isinstance(x, Tensor):
        found, there = x.dtype, x.is_cpu and x.layout is torch.strided
    elif isinstance(x, np.ndarray):
        found, there = _torch_type(x.dtype), True
    else:
        raise TypeError(f"{name} must be a torch tensor or a NumPy array, got {type(x).__name__}")
    if found is not kind:
        raise TypeError(f"{name} must be {kind}, got {x.dtype}")
    if not there:
        raise ValueError(f"{name} must be a dense tensor on the cpu, got another layout or device")
    got = tuple(x.shape)
    if got == shape:
        return x
    if len(got) != len(shape):
        raise ValueError(f"{name} must have {len(shape)} axes, {shape}, got {len(got)}, {got}")
    cure = ""
    if got[1:] == shape[1:]:
        cure = f": the batch is fixed, compile with an example of {got[0]}"
    raise ValueError(f"{name} must have shape {shape}, got {got}{cure}")


def _contiguous(x: Numbers) -> Numbers:
    """The same numbers one behind the other, copied if they are not."""
    if isinstance(x, Tensor):
        return x.resolve_neg().contiguous()
    return x if x.flags.c_contiguous and x.flags.aligned else np.require(x, requirements=["C", "A"])


@functools.cache
def _torch_type(kind: np.dtype[Any]) -> torch.dtype | None:
    try:
        return torch.from_numpy(np.empty(0, kind)).dtype
    except (TypeError, ValueError):  # no type of torch, or bytes in the other order
        return None
