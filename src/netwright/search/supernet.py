"""The supernet: every candidate operation at once, mixed by architecture parameters.

The continuous relaxation of DARTS: Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search", 2019,
arXiv:1806.09055.

    y = sum_i m_i o_i(x),    m = softmax(alpha)    (SoftmaxGate; other gates, other m)

Three small parts: a :class:`Gate` turns ``alpha`` into mixing weights and says which operations run, a :class:`Choice`
holds the candidate operations, and a :class:`Supernet` owns every ``alpha`` in one ``ParameterDict`` called ``arch``
and hands them down in ``forward``. Nothing is bound for longer than a pass, so ``copy.deepcopy``, ``state_dict``,
``torch.func.functional_call`` and ``vmap`` work as on any module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from netwright.nn.modes import in_mode
from netwright.search.fused import mixture
from netwright.search.fused.branches import Branch, bare, read
from netwright.search.fused.library import Kernels
from netwright.search.spaces.operations import Rectified, Zero
from netwright.seeding import stream

if TYPE_CHECKING:
    from netwright.search.genotype import Genotype
    from netwright.search.selection import Selector
    from netwright.search.spaces import Space

OperationKey = tuple[str, int, int, int, int, int, str]
"""(operation, channels in, channels out, height, width, stride, extra): the key of a cost or latency table."""


_handed_down: ContextVar[nn.ParameterDict] = ContextVar("alpha by key")


class Gate(ABC):
    """A mixing rule: which candidates of a choice run, and with which weights.

    A gate has no parameters and no memory; the choices of one key share one ``alpha`` and may share one gate. What a
    rule leaves to chance it draws in :meth:`draw`, once for every pass and key; :meth:`Supernet.redraw` keeps it in the
    choices, so that every use of the same pass sees the same numbers.

    Attributes:
        mask: One truth value a candidate, whether it runs; None runs all.
        second_order: Whether gradients in alpha are those of the loss of the pass, so that their differences, as
            :class:`~netwright.search.bilevel.SecondOrder` takes them, are second derivatives: not where one candidate
            runs, and the gradient tells of others.
    """

    mask: tuple[bool, ...] | None = None
    second_order = True

    def draw(self, alpha: Float[Tensor, " candidates"], part: str, batch: int) -> Tensor | None:
        """What chance decides in one pass, from torch's global generator; nothing, by default.

        Args:
            alpha: The architecture parameters, detached.
            part: What the pass is for: ``"weights"``, ``"alpha"`` or ``"both"``.
            batch: Inputs of the pass.
        """
        return None

    def draw_all(self, alphas: Sequence[Float[Tensor, " candidates"]], part: str, batch: int) -> list[Tensor | None]:
        """:meth:`draw` for every key that the gate serves, in their order; a rule may draw them all at once."""
        return [self.draw(alpha, part, batch) for alpha in alphas]

    @abstractmethod
    def weights(
        self, alpha: Float[Tensor, " candidates"], training: bool, drawn: Tensor | None = None
    ) -> Float[Tensor, "*batch candidates"]:
        """The mixing weights m, differentiable in ``alpha``: one set for the batch, or one an input.

        Args:
            alpha: The architecture parameters.
            training: Whether the choice is in training mode.
            drawn: What :meth:`draw` gave for this pass, None before the first or for a rule without chance.
        """

    def expectation(
        self, alpha: Float[Tensor, " candidates"], drawn: Tensor | None = None
    ) -> Float[Tensor, " candidates"]:
        """The weights that costs are averaged and selections made with, differentiable in ``alpha``."""
        return self.weights(alpha, drawn is not None, drawn)

    def forward(
        self,
        choice: Choice,
        x: Float[Tensor, "batch c_in height width"],
        alpha: Float[Tensor, " candidates"],
    ) -> Float[Tensor, "batch c_out height_out width_out"]:
        """The output of ``choice``: by default the candidates that run, weighted."""
        return choice.mix(x, self.weights(alpha, choice.training, choice.drawn), running=self.mask)


class SoftmaxGate(Gate):
    """m = softmax(alpha); every candidate runs (DARTS).

    Example:
        >>> SoftmaxGate().weights(torch.zeros(4), training=True)
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def weights(self, alpha: Tensor, training: bool, drawn: Tensor | None = None) -> Tensor:
        """softmax(alpha)."""
        return alpha.softmax(-1)


class MaskedGate(Gate):
    """Another gate's weights times a fixed 0/1 mask, not renormalised; masked candidates do not run (DARTS-PT).

    Args:
        inner: The gate whose weights are masked.
        mask: One truth value a candidate; all false makes the choice a zero tensor.

    Example:
        >>> MaskedGate(SoftmaxGate(), [True, False]).weights(torch.zeros(2), training=True)
        tensor([0.5000, 0.0000])
    """

    mask: tuple[bool, ...]

    def __init__(self, inner: Gate, mask: Sequence[bool]) -> None:
        self.inner = inner
        self.mask = tuple(bool(kept) for kept in mask)
        self.second_order = inner.second_order

    def draw(self, alpha: Tensor, part: str, batch: int) -> Tensor | None:
        """The inner gate's draw."""
        return self.inner.draw(alpha, part, batch)

    def weights(self, alpha: Tensor, training: bool, drawn: Tensor | None = None) -> Tensor:
        """The inner gate's weights, zero where masked."""
        if len(self.mask) != alpha.numel():
            raise ValueError(f"mask must have one entry for each of {alpha.numel()} candidates, got {len(self.mask)}")
        return self.inner.weights(alpha, training, drawn) * alpha.new_tensor(self.mask)

    def expectation(self, alpha: Tensor, drawn: Tensor | None = None) -> Tensor:
        """The inner gate's expectation, zero where masked."""
        return self.inner.expectation(alpha, drawn) * alpha.new_tensor(self.mask)


class FixedGate(Gate):
    """A decision: one candidate with coefficient 1, or none at all, which gives a zero tensor; alpha has no part in it.

    Args:
        index: The candidate; None for none.
        candidates: How many there are.

    Raises:
        ValueError: If there is no such candidate.

    Example:
        >>> FixedGate(1, 3).weights(torch.zeros(3), training=True)
        tensor([0., 1., 0.])
    """

    def __init__(self, index: int | None, candidates: int) -> None:
        if index is not None and not 0 <= index < candidates:
            raise ValueError(f"index must lie in [0, {candidates}), got {index}")
        self.index = index
        self.mask = tuple(number == index for number in range(candidates))

    def weights(self, alpha: Tensor, training: bool, drawn: Tensor | None = None) -> Tensor:
        """One at the candidate, zero elsewhere."""
        return alpha.new_tensor(self.mask)


class Choice(nn.Module):
    """A mixed operation: candidates of equal input and output shape, one of which a derivation keeps.

    ``forward(x, alpha)`` takes the architecture parameters of its key. A supernet whose network is written without
    them hands them down for the time of a pass (:meth:`Supernet.handing_down`).

    Args:
        candidates: The operations by name, in the order of ``alpha``.
        key: Name of the architecture parameters; choices with the same key share them.
        gate: The mixing rule.
        stride: Spatial stride of every candidate.
        kind: Part of the candidates' keys in cost tables: candidates of one kind, name and shape cost the same.

    Attributes:
        drawn: What the gate drew for the present pass.

    Raises:
        ValueError: If there is no candidate, or (in ``forward``) if two candidates' outputs differ in shape.

    Example:
        >>> choice = Choice({"none": Zero(), "skip_connect": nn.Identity()}, key="edge", gate=SoftmaxGate())
        >>> choice(torch.ones(1, 1, 1, 2), torch.zeros(2))
        tensor([[[[0.5000, 0.5000]]]])
    """

    def __init__(
        self, candidates: Mapping[str, nn.Module], *, key: str, gate: Gate, stride: int = 1, kind: str = ""
    ) -> None:
        super().__init__()
        if not candidates:
            raise ValueError(f"choice {key!r} must have at least 1 candidate, got 0")
        if not key or "." in key:
            raise ValueError(f"key must be a non-empty string without a dot, got {key!r}")
        self.candidates = nn.ModuleDict(candidates)
        self.key = key
        self.gate = gate
        self.stride = stride
        self.kind = kind
        self.drawn: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates' names, in the order of ``alpha``."""
        return tuple(self.candidates)

    def __len__(self) -> int:
        return len(self.candidates)

    def forward(
        self, x: Float[Tensor, "batch c_in height width"], alpha: Float[Tensor, " candidates"] | None = None
    ) -> Float[Tensor, "batch c_out height_out width_out"]:
        """The mixed output; see the class."""
        return self.gate.forward(self, x, _handed_down.get()[self.key] if alpha is None else alpha)

    def mix(
        self,
        x: Float[Tensor, "batch c_in height width"],
        weights: Float[Tensor, "*batch candidates"],
        running: Sequence[bool] | None = None,
    ) -> Float[Tensor, "batch c_out height_out width_out"]:
        """sum_i weights_i o_i(x) over the ``running`` candidates (all of them by default).

        The zero operation costs nothing, operations that the kernels of :mod:`netwright.search.fused` know run in one
        piece, and for the others the ReLU that several begin with is applied once.
        """
        if weights.shape[-1] != len(self):
            raise ValueError(f"choice {self.key!r} has {len(self)} candidates, got {weights.shape[-1]} weights")
        chosen = [
            (i, operation)
            for i, operation in enumerate(self.candidates.values())
            if not isinstance(operation, Zero) and (running is None or running[i])
        ]
        kernels = mixture.serves(x, weights) if weights.ndim == 1 else None
        total, left = (None, chosen) if kernels is None else self._fused(kernels, x, weights, chosen)
        each = weights.unbind(-1) if weights.ndim == 1 else [w.view(-1, 1, 1, 1) for w in weights.unbind(-1)]
        # a reduction by itself is faster in one piece with its ReLU, which it is in training
        share = kernels is None or not self.training
        rectified: Tensor | None = None
        for i, operation in left:
            if share and isinstance(operation, Rectified) and bare(operation):
                rectified = functional.relu(x) if rectified is None else rectified
                y = operation.body(rectified)
            else:
                y = operation(x)
            if total is None:
                total = each[i] * y
            elif y.shape != total.shape:
                raise ValueError(
                    f"choice {self.key!r}: candidate {self.names[i]!r} gives shape {tuple(y.shape)}, "
                    f"those before it {tuple(total.shape)}; all candidates must agree"
                )
            else:
                total.add_(each[i] * y)
        return Zero(self.stride)(x) if total is None else total

    def _fused(
        self, kernels: Kernels, x: Tensor, weights: Tensor, chosen: list[tuple[int, nn.Module]]
    ) -> tuple[Tensor | None, list[tuple[int, nn.Module]]]:
        """The weighted sum of the operations that the kernels know, and the operations that they do not."""
        branches: list[Branch] = []
        known: list[int] = []
        left: list[tuple[int, nn.Module]] = []
        for i, operation in chosen:
            if isinstance(operation, Rectified) and bare(operation):
                branch = read(operation.body, x.shape[1], self.stride, rectified=True)
            else:
                branch = read(operation, x.shape[1], self.stride)
            if branch is None or len(branches) == mixture.MOST_BRANCHES:
                left.append((i, operation))
            else:
                branches.append(branch)
                known.append(i)
        return (mixture.mix(kernels, x, branches, self.stride, weights, known) if branches else None), left

    def extra_repr(self) -> str:
        """The key, the gate and the stride."""
        return f"key={self.key!r}, gate={type(self.gate).__name__}, stride={self.stride}"


class Supernet(nn.Module):
    """Base of every supernet: owns the architecture parameters and knows the choices inside it.

    A subclass builds its modules, calls :meth:`initialise_arch` and defines ``forward(x) -> logits``, in which it calls
    each choice as ``choice(x, self.arch[choice.key])``, or the network with all its choices inside
    ``with self.handing_down():``.

    Attributes:
        arch: One parameter (alpha) a key, drawn from 1e-3 N(0, 1).
        space: The search space; ``space.genotype(decisions)`` makes a genotype.
        num_classes: Number of classes the network tells apart.
        input_shape: (C, H, W) of the last input; a subclass's ``forward`` sets it.
    """

    def __init__(self, space: Space | Any, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        self.space = space
        self.num_classes = num_classes
        self.arch = nn.ParameterDict()
        self.input_shape: tuple[int, ...] | None = None
        self._choices: tuple[Choice, ...] = ()
        self._known_choices: tuple[Any, ...] = ()
        self._known_shapes: dict[tuple[int, ...], dict[str, tuple[tuple[int, int, int], int]]] = {}

    def initialise_arch(self, seed: int, shape: tuple[int, int, int]) -> None:
        """Makes one alpha a key, then checks the candidates' shapes with one input of ``shape`` (C, H, W).

        Raises:
            ValueError: If choices of one key have different candidates, or candidates of one choice different shapes.
        """
        names: dict[str, tuple[str, ...]] = {}
        self._choices = tuple(choice for _, choice in self.named_choices())
        for choice in self._choices:
            if names.setdefault(choice.key, choice.names) != choice.names:
                raise ValueError(
                    f"choices of key {choice.key!r} must have the same candidates, got {choice.names} "
                    f"and {names[choice.key]}"
                )
        for key, candidates in names.items():
            draw = torch.randn(len(candidates), generator=stream(seed, "alpha", key))
            self.arch[key] = nn.Parameter(1e-3 * draw)
        self._shapes(shape)

    def named_choices(self) -> Iterator[tuple[str, Choice]]:
        """Every choice with its module name."""
        for name, module in self.named_modules():
            if isinstance(module, Choice):
                yield name, module

    def keyed_choices(self) -> dict[str, Choice]:
        """The first choice of every key, in the order of the module tree."""
        choices: dict[str, Choice] = {}
        for choice in self._choices or (choice for _, choice in self.named_choices()):
            choices.setdefault(choice.key, choice)
        return choices

    def set_gate(self, gate: Gate, key: str | None = None) -> None:
        """Gives every choice (of ``key``, if one is given) another mixing rule.

        Raises:
            ValueError: If no choice has that key.
        """
        chosen = [choice for _, choice in self.named_choices() if key is None or choice.key == key]
        if not chosen:
            raise ValueError(f"key must be one of {list(self.arch)}, got {key!r}")
        for choice in chosen:
            choice.gate = gate

    def adopt(self, genotype: Genotype) -> None:
        """Fixes every choice to a genotype's: one operation with weight 1, or none where it names none.

        Raises:
            ValueError: If the genotype is not of the supernet's space.
        """
        decisions = self.space.decisions(genotype)
        for key, choice in self.keyed_choices().items():
            index = choice.names.index(decisions[key]) if key in decisions else None
            self.set_gate(FixedGate(index, len(choice)), key)

    @contextmanager
    def handing_down(self) -> Iterator[None]:
        """Lets choices find their ``alpha`` themselves inside the block."""
        token = _handed_down.set(self.arch)
        try:
            yield
        finally:
            _handed_down.reset(token)

    def redraw(self, part: str, batch: int = 1) -> None:
        """Lets every gate draw anew; an objective calls it before each of its passes.

        Args:
            part: What the pass is for: ``"weights"``, ``"alpha"`` or ``"both"``.
            batch: Inputs of the pass.
        """
        served: dict[Gate, list[str]] = {}
        for key, choice in self.keyed_choices().items():
            served.setdefault(choice.gate, []).append(key)
        drawn: dict[str, Tensor | None] = {}
        for gate, keys in served.items():
            drawn |= zip(keys, gate.draw_all([self.arch[key].detach() for key in keys], part, batch), strict=True)
        for choice in self._choices:
            choice.drawn = drawn[choice.key]

    def mixing_weights(self, *, drawn: bool = False) -> dict[str, Tensor]:
        """The mixing weights of every key, differentiable in alpha.

        Args:
            drawn: Whether they are those of the last :meth:`redraw`; otherwise what the rule expects.
        """
        return {
            key: c.gate.expectation(self.arch[key], c.drawn if drawn else None)
            for key, c in self.keyed_choices().items()
        }

    def arch_parameters(self) -> list[nn.Parameter]:
        """The architecture parameters alpha.

        Raises:
            ValueError: If there are none.
        """
        alphas = list(self.arch.parameters())
        if not alphas:
            raise ValueError("the supernet has no architecture parameters: call initialise_arch after building it")
        return alphas

    def weight_parameters(self) -> list[nn.Parameter]:
        """All other parameters; with :meth:`arch_parameters` they make up ``parameters()``, none twice.

        Raises:
            ValueError: If an architecture parameter is also registered outside ``arch``.
        """
        alphas = {id(alpha) for alpha in self.arch_parameters()}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if id(parameter) in alphas and not name.startswith("arch."):
                raise ValueError(f"architecture parameter {name!r} must be registered in arch alone")
        weights = [parameter for parameter in self.parameters() if id(parameter) not in alphas]
        assert len(weights) + len(alphas) == len(list(self.parameters()))
        return weights

    def operations(self, shape: tuple[int, int, int]) -> dict[OperationKey, tuple[nn.Module, tuple[int, int, int]]]:
        """Every distinct costly candidate for inputs of ``shape``: one module of its kind and its (C, H, W) input.

        What a cost table has to price: ``{k: count(op, s).macs for k, (op, s) in supernet.operations(shape).items()}``.
        Zero and identity are left out: they cost nothing.
        """
        shapes = self._shapes(shape)
        return {
            key: (operation, shapes[name][0])
            for name, choice in self.named_choices()
            for key, operation in zip(_keys(choice, *shapes[name]), choice.candidates.values(), strict=True)
            if key is not None
        }

    def expected_cost(
        self,
        table: Mapping[OperationKey, float],
        shape: tuple[int, int, int] | None = None,
        *,
        drawn: bool | None = None,
    ) -> Float[Tensor, ""]:
        """E[cost] = sum over choices l and candidates i of m_li t_li; the gradient flows through m alone.

        Costs outside the choices (stem, preprocessing, classifier) are a constant that the caller adds.

        Args:
            table: Cost (in any unit) of an operation by its key, as :meth:`operations` lists them.
            shape: (C, H, W) of the network's input; by default that of the last ``forward``.
            drawn: Whether m is what the gates drew for the last pass; by default it is in training.

        Raises:
            KeyError: If the table misses an operation.
            ValueError: If no shape is given before the first ``forward``.
        """
        return self.priced(self.candidate_costs(table, shape), drawn=drawn)

    def priced(self, costs: Mapping[str, Sequence[float]], *, drawn: bool | None = None) -> Float[Tensor, ""]:
        """sum over keys l and candidates i of m_li t_li, with t given by key; see :meth:`expected_cost`.

        Raises:
            ValueError: If ``costs`` has not one number for every candidate of every key.
        """
        check_costs(costs, {key: choice.names for key, choice in self.keyed_choices().items()})
        weights = self.mixing_weights(drawn=self.training if drawn is None else drawn)
        flat = torch.cat([weights[key] for key in costs])
        return flat @ flat.new_tensor([cost for row in costs.values() for cost in row])

    def candidate_costs(
        self, table: Mapping[OperationKey, float], shape: tuple[int, int, int] | None = None
    ) -> dict[str, list[float]]:
        """The cost of every candidate by key, summed over the choices that share it: the t of :meth:`expected_cost`.

        Args:
            table: Cost (in any unit) of an operation by its key, as :meth:`operations` lists them.
            shape: (C, H, W) of the network's input; by default that of the last ``forward``.

        Raises:
            KeyError: If the table misses an operation.
            ValueError: If no shape is given before the first ``forward``.
        """
        size = shape or self.input_shape
        if size is None:
            raise ValueError("shape must be given before the first forward pass, got None")
        costs = {key: [0.0] * len(choice) for key, choice in self.keyed_choices().items()}
        shapes = self._shapes(tuple(size))
        for name, choice in self.named_choices():
            keys = _keys(choice, *shapes[name])
            if missing := [key for key in keys if key is not None and key not in table]:
                raise KeyError(f"the table has no cost for {missing}")
            for i, key in enumerate(keys):
                costs[choice.key][i] += 0.0 if key is None else float(table[key])
        return costs

    def derive(self, selector: Selector | None = None) -> Genotype:
        """The genotype that ``selector`` (the space's own by default) reads off."""
        return (selector or self.space.selector()).select(self)

    def _shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, int, int], int]]:
        """Input (C, H, W) and output channels of every choice for a network input of ``shape``.

        Every candidate runs, whatever the gates would run, so that their shapes are compared. Remembered by shape, as
        long as the choices and their candidates stay the same objects.
        """
        choices = tuple((name, choice, *choice.candidates.values()) for name, choice in self.named_choices())
        if choices != self._known_choices:
            self._known_choices, self._known_shapes = choices, {}
        if shape in self._known_shapes:
            return self._known_shapes[shape]
        gates = {choice: choice.gate for _, choice in self.named_choices()}
        try:
            self.set_gate(SoftmaxGate())
            self._known_shapes[shape] = self._places(shape)
        finally:
            for choice, gate in gates.items():
                choice.gate = gate
        return self._known_shapes[shape]

    def _places(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, int, int], int]]:
        """Input (C, H, W) and output channels of every choice in one pass of an input of ``shape``."""
        found: dict[str, tuple[tuple[int, int, int], int]] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                c, h, w = inputs[0].shape[1:]
                found[name] = ((c, h, w), output.shape[1])

            return hook

        handles = [choice.register_forward_hook(watch(name)) for name, choice in self.named_choices()]
        latest = self.input_shape
        try:
            with in_mode(self, training=False), torch.no_grad():
                self(next(self.parameters()).new_zeros(1, *shape))
        finally:
            self.input_shape = latest
            for handle in handles:
                handle.remove()
        return found


def check_costs(costs: Mapping[str, Sequence[float]], names: Mapping[str, Sequence[str]]) -> None:
    """Refuses costs that are not one number for every candidate of every choice.

    Args:
        costs: Costs by key.
        names: Names of the candidates by key.

    Raises:
        ValueError: If a choice is missing, unknown or has another number of candidates, naming it.

    Example:
        >>> check_costs({"edge": [1.0]}, {"edge": ("none", "skip_connect")})
        Traceback (most recent call last):
        ...
        ValueError: costs of choice 'edge' must be one for each of none, skip_connect, got 1
    """
    for key, candidates in names.items():
        if key not in costs:
            raise ValueError(f"costs must hold every choice, got none for {key!r}")
        if len(costs[key]) != len(candidates):
            raise ValueError(
                f"costs of choice {key!r} must be one for each of {', '.join(candidates)}, got {len(costs[key])}"
            )
    if unknown := [key for key in costs if key not in names]:
        raise ValueError(f"costs must hold choices of the supernet alone, got {unknown[0]!r}")


def _keys(choice: Choice, shape: tuple[int, int, int], c_out: int) -> list[OperationKey | None]:
    """The table key of every candidate, None for those that cost nothing."""
    c_in, height, width = shape
    return [
        None
        if isinstance(operation, (Zero, nn.Identity))
        else (name, c_in, c_out, height, width, choice.stride, choice.kind)
        for name, operation in choice.candidates.items()
    ]
