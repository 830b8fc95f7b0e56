"""What a region does to a network: ranges of every layer, and margins of the class over its rivals.

Intervals alone, which any network of known operations has in one pass (``interval_bounds``), or beside them affine
forms in inputs and units with open sign (``analyse``), exact but for these units: what a solver needs. Margins alone
come at a fraction of the cost from :mod:`netwright.verify.relaxation`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.verify.basis import Basis
from netwright.verify.deadline import check_deadline
from netwright.verify.forms import LIMIT, Form, TooLargeError, transform
from netwright.verify.network import Network, network_of


def interval_bounds(
    model: nn.Module | Network, lower: Float[Tensor, " *shape"], upper: Float[Tensor, " *shape"]
) -> list[tuple[Tensor, Tensor]]:
    """Least and largest value of each activation of each layer, by interval arithmetic rounded outwards.

    Args:
        model: Gives (batch, classes).
        lower: Least value of each number of the input; without a batch.
        upper: Largest value, nowhere below ``lower``.

    Returns:
        A pair for each layer of :class:`Network`, the input first, in float64.

    Raises:
        ValueError: If the bounds are not finite, of different shapes, or crossed.
        TypeError: If a layer is unknown; it is named.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0, -1.0], [0.0, 2.0]])), net.bias.data.zero_()
        >>> found = interval_bounds(net, torch.full((2,), 0.5), torch.ones(2))
        >>> [bound.round(decimals=6).tolist() for bound in found[-1]]
        [[-0.5, 1.0], [0.5, 2.0]]
    """
    network = network_of(model, lower.shape)
    analysis = analyse(network, lower, upper, forms=False)
    return [(form.low[0], form.high[0]) for form in analysis.layers]


@dataclasses.dataclass
class Analysis:
    """What :func:`analyse` found.

    Attributes:
        layers: What is known of each layer, from the first that was given to the last.
        basis: The variables; None when only ranges were asked for.
        dims: Which numbers of the first layer vary, in the order of the variables.
    """

    layers: list[Form]
    basis: Basis | None
    dims: Tensor

    def margins(self, label: int) -> tuple[Float[Tensor, " rivals"], Float[Tensor, " rivals"], Tensor]:
        """Of the logit of a class over every other one's.

        Returns:
            The least margin that is certain, the rounding error of the network's own arithmetic in it, and the rival
            classes. A class whose margin is above the error cannot win.
        """
        out = self.layers[-1]
        rivals = torch.tensor([j for j in range(out.low.numel()) if j != label])
        low, high, error = (part.flatten() for part in (out.low, out.high, out.error))
        least = low[label] - high[rivals]
        if self.basis is not None:
            forms = self.differences(label, rivals)
            least = torch.maximum(least, self.basis.tight_range(forms)[0])
        return least, error[label] + error[rivals], rivals

    def differences(self, label: int, rivals: Tensor) -> Tensor:
        """Forms of the margins over rivals, (rivals, 1 + variables)."""
        assert self.basis is not None
        rows = self.layers[-1].matrix(self.basis)
        return rows[label] - rows[rivals]


def analyse(
    network: Network,
    lower: Tensor,
    upper: Tensor,
    *,
    first: int = 0,
    last: int = -1,
    forms: bool = True,
    deadline: float = math.inf,
    tick: Callable[[], None] = lambda: None,
) -> Analysis:
    """Ranges, and affine forms, of the layers from one to another over a box.

    Args:
        network: The network.
        lower: Least value of each number of layer ``first``.
        upper: Largest.
        first: Layer of the box.
        last: Where to stop; the logits by default.
        forms: Whether to keep affine forms beside the ranges.
        deadline: Of ``time.monotonic()``.
        tick: Called after every operation.

    Raises:
        ValueError: If the bounds do not fit the layer.
        TypeError: If an operation is unknown, or with forms not piecewise linear; it is named.
        TooLargeError: If the forms do not fit into memory.
        TimeoutError: If the time is over.
    """
    last = last % len(network.layers)
    graph = network.known()
    start = network.layer(first)
    low, high = checked_box(lower, upper, start.size)
    shape = graph.shapes[start.value]
    dims = (low < high).nonzero().flatten()
    basis = Basis(low[dims], high[dims], deadline) if forms else None
    rows = None
    if forms:
        if (1 + len(dims)) * start.size > LIMIT:
            raise TooLargeError(f"{len(dims)} variables for {start.size} inputs")
        rows = torch.zeros(1 + len(dims), start.size, dtype=torch.float64)
        rows[0] = torch.where(low < high, 0, low)
        rows[1 + torch.arange(len(dims)), dims] = 1
        rows = rows.reshape(1 + len(dims), *shape[1:])
    values = {start.value: Form(low.reshape(shape), high.reshape(shape), torch.zeros(shape).double(), rows)}
    wanted = [layer.value for layer in network.layers[first : last + 1]]
    nodes = network.between(first, last)
    uses = {value: i for i, node in enumerate(nodes) for value in node.inputs}
    with torch.no_grad():
        for i, node in enumerate(nodes):
            check_deadline(deadline)
            inputs = [values[value] for value in node.inputs]
            values[node.output] = transform(node.op, node, graph.shapes[node.output], inputs, basis)
            for value in node.inputs:
                if uses[value] == i and value not in wanted:
                    values.pop(value, None)
                elif uses[value] == i and value != wanted[-1]:
                    values[value] = dataclasses.replace(values[value], rows=None)
            tick()
    return Analysis([values[value] for value in wanted], basis, dims)


def checked_box(lower: Tensor, upper: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The bounds as flat float64.

    Raises:
        ValueError: If they are of the wrong size, not finite, or crossed.
    """
    low, high = (torch.as_tensor(bound).detach().double().flatten() for bound in (lower, upper))
    for name, bound in (("lower", low), ("upper", high)):
        if len(bound) != size:
            raise ValueError(f"{name} must hold {size} numbers, as the layer does, got {len(bound)}")
        if not bool(bound.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {float(bound[~bound.isfinite()][0])}")
    if bool((low > high).any()):
        place = int((low > high).int().argmax())
        raise ValueError(f"lower must not be above upper, got {float(low[place]):g} > {float(high[place]):g}")
    return low, high


def flat_margin(logits: Float[Tensor, "batch classes"], label: int) -> Float[Tensor, " batch"]:
    """Logit of a class less the largest of the others.

    Example:
        >>> flat_margin(torch.tensor([[3.0, 1.0, 2.5]]), 0)
        tensor([0.5000])
    """
    others = [j for j in range(logits.shape[1]) if j != label]
    return logits[:, label] - logits[:, others].max(1).values
