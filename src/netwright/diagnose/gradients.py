"""Gradients of single examples: their norms without the gradients, their products with a direction, or all of them.

    g_i = d loss_i / d w,    for i = 1 .. m, of the same weights w

One forward and one backward pass of a batch give what every layer read and the gradient of what it gave; from these a
linear layer, a convolution or a normalisation has ||g_i||^2 in closed form (:mod:`netwright.diagnose.layer_rules`).
Products g_i . v with one direction v are a forward-mode derivative of the losses along v. Layers without a rule, or
whose parameters are used elsewhere too, are done by ``vmap(grad)`` in chunks; which ones that are is found out on the
first three examples, whose gradients by the rules are compared with those of autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from netwright.console import nearest
from netwright.diagnose import layer_rules
from netwright.diagnose.losses import LossFunction, example_losses
from netwright.nn.modes import in_mode

# Numbers that layers read and give in a chunk of examples: what suits the caches of a processor, unless that is only a
# few examples; and what memory allows.
WANTED, BUDGET = 2**22, 2**25
FEW_EXAMPLES, MOST_EXAMPLES = 16, 1024
PROBES, TOLERANCE = 3, 1e-3
COLLATED = 256  # examples of a data set that are put together

Batched = tuple[Tensor, Tensor] | Dataset[Any] | Iterable[Any]


class Norms(NamedTuple):
    """What a batch gives without a gradient of a single example.

    Attributes:
        total: Sum of the gradients over the batch, by the name of the parameter.
        squared: ||g_i||^2 of each parameter in the order of ``ExampleGradients.names``, (batch, parameters).
        losses: (batch,).
    """

    total: dict[str, Tensor]
    squared: Float[Tensor, "batch parameters"]
    losses: Float[Tensor, " batch"]


class Gradients(NamedTuple):
    """All gradients of a batch.

    Attributes:
        matrix: A row an example: its gradients, flattened and joined in the order of ``ExampleGradients.names``.
        losses: (batch,).
    """

    matrix: Float[Tensor, "batch numbers"]
    losses: Float[Tensor, " batch"]


class ExampleGradients:
    """Gradients of a model's loss for single examples.

    The model runs in evaluation mode (no dropout, running statistics in batch norms) and is left as it was; nothing is
    written to ``.grad``. Batches of any size are cut into chunks that fit into memory.

    Args:
        model: Maps a batch of inputs to outputs, each example by itself.
        loss_fn: Maps (outputs, targets) of a batch to one loss an example, like ``CrossEntropyLoss(reduction="none")``;
            further axes are summed.
        params: Names of parameters, or of modules for all parameters inside; those that are trained, by default.
        bn: ``"eval"`` allows a model in training mode that has batch norms, whose running statistics are then used.

    Attributes:
        names: Names of the parameters, in the model's order.

    Raises:
        ValueError: If a batch norm would normalise by the batch, which leaves an example without a gradient of its own;
            if a name is unknown, or no parameter is trained.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> loss = lambda output, target: 0.5 * (output[:, 0] - target) ** 2
        >>> gradients = ExampleGradients(net, loss)
        >>> x, y = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2)
        >>> torch.allclose(gradients.rows(x, y).matrix, net(x).detach() * x)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        params: Sequence[str] | None = None,
        *,
        bn: Literal["eval"] | None = None,
    ):
        if bn not in (None, "eval"):
            raise ValueError(f"bn must be 'eval' or None, got {bn!r}")
        _refuse_batch_statistics(model, bn == "eval")
        self.model, self.loss_fn = model, loss_fn
        self.params = _chosen(model, params)
        self.names = tuple(self.params)
        # Layers that are done by their rule, with their names; None until the first examples were seen.
        self._ruled: dict[str, nn.Module] | None = None
        self._chunk = self._slow_chunk = 1

    @property
    def without_rule(self) -> tuple[str, ...]:
        """Parameters that ``vmap(grad)`` does; known when the first batch was seen."""
        ruled = {name for layer in self._ruled or {} for name in self._own(layer)}
        return tuple(name for name in self.names if name not in ruled)

    def norms(self, x: Tensor, y: Any) -> Norms:
        """Squared norms of all gradients, and their sum, at about the cost of one training step.

        Args:
            x: Inputs (batch, ...).
            y: Targets (batch, ...).

        Raises:
            ValueError: If the batch is empty, ``x`` and ``y`` differ in length, the loss does not give one number an
                example, or a gradient is not finite.
        """
        total: dict[str, Tensor] = {}
        rows: list[tuple[Tensor, Tensor]] = []
        for part in self._chunks(x, y, self._norms):
            for name, value in part.total.items():
                total[name] = total[name].add_(value) if name in total else value
            rows.append((part.squared, part.losses))
        squared, losses = (torch.cat(values) for values in zip(*rows, strict=True))
        bad = (~squared.isfinite().all(1) | ~losses.isfinite()).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"gradients and losses must be finite, got NaN or infinity for {len(bad)} of {len(squared)} examples, "
                f"first for number {int(bad[0])} of the batch"
            )
        return Norms(total, squared, losses)

    def rows(self, x: Tensor, y: Any) -> Gradients:
        """All gradients, which takes batch times parameters of memory.

        Args:
            x: Inputs (batch, ...).
            y: Targets (batch, ...).

        Raises:
            ValueError: If the batch is empty, ``x`` and ``y`` differ in length, or the loss does not give one number an
                example.
        """
        matrices, losses = zip(*self._chunks(x, y, self._rows), strict=True)
        return Gradients(torch.cat(matrices), torch.cat(losses))

    def along(self, x: Tensor, y: Any, direction: Mapping[str, Tensor]) -> Float[Tensor, " batch"]:
        """g_i . v for a direction v of all parameters, without any g_i.

        Args:
            x: Inputs (batch, ...).
            y: Targets (batch, ...).
            direction: v, by the name of the parameter.

        Raises:
            ValueError: If the direction has other names or shapes than the parameters.
        """
        if {n: v.shape for n, v in direction.items()} != {n: p.shape for n, p in self.params.items()}:
            raise ValueError(f"direction must have the names and shapes of {len(self.names)} parameters")
        along = {name: direction[name].to(param) for name, param in self.params.items()}
        return torch.cat(list(self._chunks(x, y, lambda a, b: self._along(a, b, along))))

    def _chunks(self, x: Tensor, y: Any, call: Callable[[Tensor, Any], Any]) -> Iterator[Any]:
        if not len(x) or len(x) != len(y):
            raise ValueError(f"a batch must hold as many inputs as targets, at least 1, got {len(x)} and {len(y)}")
        device = next(iter(self.params.values())).device
        x, y = x.to(device), y.to(device)
        with in_mode(self.model, training=False), torch.enable_grad():
            if self._ruled is None:
                self._prepare(x[:PROBES], y[:PROBES])
            for a, b in zip(x.split(self._chunk), y.split(self._chunk), strict=True):
                # Convolutions and pooling take images with channels innermost faster on a processor.
                yield call(a.clone(memory_format=torch.channels_last) if a.ndim == 4 else a, b)

    def _losses(self, x: Tensor, y: Any, params: Mapping[str, Tensor] | None = None) -> Tensor:
        output = self.model(x) if params is None else functional_call(self.model, dict(params), (x,))
        return example_losses(self.loss_fn, output, y)

    def _own(self, layer: str) -> list[str]:
        """The layer's parameters that are looked at."""
        return [name for name in _named(layer, {"weight": None, "bias": None}) if name in self.params]

    def _watched(
        self, x: Tensor, y: Any, layers: Mapping[str, nn.Module], use: Callable[[str, list[layer_rules.Call]], None]
    ) -> tuple[Tensor, dict[str, Tensor], int]:
        """A forward and a backward pass; ``use`` is called with each layer's calls as soon as they are whole.

        Returns the losses, the sum of the gradients, and the numbers that the layers read and gave.
        """
        calls: dict[str, list[list[Any]]] = {name: [] for name in layers}
        numbers = 0

        def watch(name: str) -> Callable[..., None]:
            def forward(layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
                nonlocal numbers
                entry = [given[0].detach(), None]
                calls[name].append(entry)
                numbers += given[0].numel() + output.numel()

                def backward(delta: Tensor) -> None:
                    entry[1] = delta.detach()
                    if all(other is not None for _, other in calls[name]):
                        finish(name)

                # A hook of the tensor: what later changes the tensor in place does not move it.
                if output.requires_grad:
                    output.register_hook(backward)

            return forward

        def finish(name: str) -> None:
            whole = [(given, delta) for given, delta in calls.pop(name, []) if delta is not None]
            aligned = all(len(value) == len(x) for call in whole for value in call)
            if whole and aligned:
                use(name, whole)
            elif not aligned and self._ruled is not None:
                raise ValueError(f"layer {name!r} must be given {len(x)} examples, got {len(whole[0][0])}")

        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.register_forward_hook(watch(name)).remove)
            losses = self._losses(x, y)
            found = torch.autograd.grad(losses.sum(), list(self.params.values()), allow_unused=True)
        for name in list(calls):
            finish(name)  # a call whose output does not reach the loss
        total = {
            name: torch.zeros_like(param) if part is None else part.detach()
            for (name, param), part in zip(self.params.items(), found, strict=True)
        }
        return losses.detach(), total, numbers

    def _prepare(self, x: Tensor, y: Any) -> None:
        """Which layers' rules give what autograd gives, and how many examples fit into a chunk."""
        layers = {
            name: part for name, part in self.model.named_modules() if layer_rules.has_rule(part) and self._own(name)
        }
        by_rule: dict[str, Tensor] = {}

        def keep(name: str, calls: list[layer_rules.Call]) -> None:
            by_rule.update(_named(name, layer_rules.gradients(layers[name], calls)))

        _, _, numbers = self._watched(x, y, layers, keep)
        # Autograd example by example, for these three alone: vmap may not take the model, and shall not have to.
        alone = [self._watched(x[i : i + 1], y[i : i + 1], {}, keep)[1] for i in range(len(x))]
        size = torch.stack([torch.cat([g.flatten() for g in each.values()]).norm() for each in alone])

        def right(name: str) -> bool:
            exact = torch.stack([each[name].flatten() for each in alone])
            if name not in by_rule:
                return not exact.any()  # of a layer that was not called
            gap = (by_rule[name].reshape(exact.shape) - exact).norm(dim=1)
            return bool((gap <= TOLERANCE * torch.maximum(exact.norm(dim=1), TOLERANCE * size)).all())

        self._ruled = {name: part for name, part in layers.items() if all(map(right, self._own(name)))}
        each = max(1, numbers // len(x))
        slow = sum(self.params[name].numel() for name in self.without_rule)
        few = min(FEW_EXAMPLES, BUDGET // each)
        self._chunk = max(1, min(MOST_EXAMPLES, max(few, WANTED // each)))
        self._slow_chunk = max(1, min(self._chunk, BUDGET // (slow + each)))

    def _norms(self, x: Tensor, y: Any) -> Norms:
        squared: dict[str, Tensor] = {}

        def use(name: str, calls: list[layer_rules.Call]) -> None:
            squared.update(_named(name, layer_rules.squared_norms(ruled[name], calls)))

        ruled = self._ruled or {}
        losses, total, _ = self._watched(x, y, ruled, use)
        squared |= {name: g.reshape(len(x), -1).square().sum(1) for name, g in self._vmapped(x, y).items()}
        zeros = losses.new_zeros(len(x))
        return Norms(total, torch.stack([squared.get(name, zeros) for name in self.names], 1), losses)

    def _rows(self, x: Tensor, y: Any) -> Gradients:
        found: dict[str, Tensor] = {}

        def use(name: str, calls: list[layer_rules.Call]) -> None:
            found.update(_named(name, layer_rules.gradients(ruled[name], calls)))

        ruled = self._ruled or {}
        losses, *_ = self._watched(x, y, ruled, use)
        found |= self._vmapped(x, y)
        each = [found[n] if n in found else p.new_zeros(len(x), *p.shape) for n, p in self.params.items()]
        return Gradients(torch.cat([grad.reshape(len(x), -1) for grad in each], 1), losses)

    def _vmapped(self, x: Tensor, y: Any) -> dict[str, Tensor]:
        """Gradients of the parameters that no rule covers."""
        names = self.without_rule
        if not names:
            return {}

        def loss(params: dict[str, Tensor], one: Tensor, target: Any) -> Tensor:
            return self._losses(one[None], target[None], params)[0]

        params = {name: self.params[name].detach() for name in names}
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the one that vmap knows
                found = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=self._slow_chunk)(params, x, y)
        except RuntimeError as error:
            raise ValueError(
                f"params must have a rule or be such that vmap takes the model, got {', '.join(names[:3])} without a "
                f"rule, and from vmap: {str(error).splitlines()[0]}"
            ) from error
        # The other parameters give them a graph, which would be kept as long as what is made of them.
        return {name: value.detach() for name, value in found.items()}

    def _along(self, x: Tensor, y: Any, direction: dict[str, Tensor]) -> Tensor:
        params = {name: param.detach() for name, param in self.params.items()}
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # the one that has derivatives of both kinds
            # torch's own tables of forward-mode rules, made in the first call, use what torch has deprecated.
            warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)
            try:
                return jvp(lambda values: self._losses(x, y, values), (params,), (direction,))[1].detach()
            except (NotImplementedError, RuntimeError):
                return self._along_backward(x, y, direction)

    def _along_backward(self, x: Tensor, y: Any, direction: dict[str, Tensor]) -> Tensor:
        """Twice backward, where some operation has no forward mode: the gradient is linear in the losses' weights."""
        losses = self._losses(x, y)
        weights = torch.ones_like(losses, requires_grad=True)
        found = torch.autograd.grad(losses, list(self.params.values()), weights, create_graph=True, allow_unused=True)
        parts = [(g * direction[name]).sum() for name, g in zip(self.names, found, strict=True) if g is not None]
        (along,) = torch.autograd.grad(torch.stack(parts).sum(), weights)
        return along


def batches(data: Batched) -> Iterator[tuple[Tensor, Any]]:
    """The batches of (inputs, targets): a pair of tensors is one, a data set is put together, others are iterated over.

    Raises:
        ValueError: If there is none, or one is no pair.

    Example:
        >>> [len(x) for x, y in batches((torch.zeros(5, 2), torch.zeros(5)))]
        [5]
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        yield data
        return
    if isinstance(data, Dataset) and hasattr(data, "__len__"):
        data = DataLoader(data, COLLATED, generator=torch.Generator())  # of its own, since a loader draws from it
    empty = True
    for batch in data:  # type: ignore[union-attr]  # a data set without a length is iterable
        empty = False
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise ValueError(f"data must give batches (inputs, targets), got a {type(batch).__name__}")
        yield batch[0], batch[1]
    if empty:
        raise ValueError("data must hold at least 1 batch, got 0")


def _named(layer: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's parameters by their names in the model."""
    return {f"{layer}.{name}" if layer else name: value for name, value in own.items()}


def _chosen(model: nn.Module, params: Sequence[str] | None) -> dict[str, Tensor]:
    trained: dict[str, Tensor] = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if params is None:
        if not trained:
            raise ValueError("model must have at least 1 parameter that is trained, got 0")
        return trained
    if isinstance(params, str) or not params:
        raise ValueError(f"params must be a list of at least 1 name, got {params!r}")
    known = {*trained, *(name for name, part in model.named_modules() if any(True for _ in part.parameters()))}
    for name in params:
        if name not in known:
            raise ValueError(
                f"params must name trained parameters or modules with some, got {name!r}: {nearest(name, known)}"
            )
    found = {
        name: param for name, param in trained.items() if any(name == p or name.startswith(f"{p}.") for p in params)
    }
    if not found:
        raise ValueError(f"params must name parameters that are trained, got {', '.join(params)}")
    return found


def _refuse_batch_statistics(model: nn.Module, allowed: bool) -> None:
    for name, part in model.named_modules():
        if isinstance(part, _BatchNorm) and part.running_mean is None:
            raise ValueError(f"model must not normalise by the batch, got {name or 'a batch norm'} without statistics")
        if isinstance(part, _BatchNorm) and part.training and not allowed:
            raise ValueError(
                f"model must be in evaluation mode, got batch norm {name or type(part).__name__!r} in training: an "
                "example has no gradient of its own there; call eval(), or allow running statistics with bn='eval'"
            )
