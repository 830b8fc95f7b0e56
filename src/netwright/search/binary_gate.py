"""Binary gates: one path of a supernet runs, and the architecture learns through the gates.

Cai, Zhu and Han, "ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware", ICLR 2019,
arXiv:1812.00332, equations 2 to 4.

    p = softmax(alpha),   g one-hot with P(g = e_i) = p_i,   y = sum_i g_i o_i(x) = o_k(x)
    dL/dalpha_i ~ sum_j (dL/dg_j) p_j (delta_ij - p_i),      dL/dg_j = sum(o_j(x) * dL/dy)

or, with d_j = dL/dg_j, ``grad = p * (d - p . d)``, whose sum is zero. A pass for the weights draws one candidate. One
for the architecture also needs the outputs of others: of all, or of one more, when candidates are drawn in pairs and p
is the softmax over the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from netwright.checks import one_of
from netwright.nn.batchnorm import frozen_statistics
from netwright.search.spaces.operations import Zero
from netwright.search.supernet import Choice, Gate

Mode = Literal["two", "full", "full_recompute"]


class BinaryGate(Gate):
    """Runs one candidate, drawn by softmax(alpha); its coefficient is 1, and its gradient is that of the softmax.

    What is drawn for a pass are the numbers of the candidates that take part in it, the one that runs first. In
    evaluation mode, and before anything is drawn, the candidate of the largest alpha runs: the network that would be
    derived. Candidates that do not run receive no gradient at all, and their batch norms keep their statistics.

    Args:
        mode: What an architecture pass looks at beside the candidate that runs. ``"two"``: one other, the two drawn
            together without replacement, the one that runs by the softmax q of their two alphas, which then stands for
            p. ``"full"``: all others, whose outputs are kept. ``"full_recompute"``: all others, run one by one in the
            backward pass: the memory of one path, whatever their number.
        skip_zero_grad: Leaves out the gradient when the candidate that runs is a zero or an identity, as the published
            code does; otherwise it is what the formula says.

    Raises:
        ValueError: If ``mode`` is unknown; when a pass for the architecture is drawn in mode ``"two"``, if there are
            fewer than two candidates.

    Example:
        >>> gate, alpha = BinaryGate("full"), torch.tensor([3.0, 1.0]).log().requires_grad_()
        >>> choice = Choice({"one": nn.Identity(), "three": nn.Upsample(scale_factor=1)}, key="a", gate=gate)
        >>> choice.drawn = torch.tensor([1, 0])
        >>> m = gate.weights(alpha, True, choice.drawn)
        >>> m.tolist()
        [0.0, 1.0]
        >>> (m @ torch.tensor([1.0, 3.0])).backward()    # d = (1, 3), p = (3/4, 1/4)
        >>> alpha.grad
        tensor([-0.3750,  0.3750])
    """

    second_order = False

    def __init__(self, mode: Mode = "two", skip_zero_grad: bool = False) -> None:
        one_of("mode", mode, get_args(Mode))
        self.mode, self.skip_zero_grad = mode, skip_zero_grad

    def draw(self, alpha: Float[Tensor, " candidates"], part: str, batch: int) -> Int[Tensor, " drawn"]:
        """The numbers of the candidates of a pass, the one that runs first; one alone for a pass of the weights."""
        return self.draw_all([alpha], part, batch)[0]

    def draw_all(self, alphas: Sequence[Tensor], part: str, batch: int) -> list[Any]:
        """The numbers for several choices, drawn in one piece."""
        sizes = [len(alpha) for alpha in alphas]
        pairs = part != "weights" and self.mode == "two"
        if pairs and min(sizes) < 2:
            raise ValueError(f"mode 'two' must have at least 2 candidates, got {min(sizes)}")
        rows = nn.utils.rnn.pad_sequence(list(alphas), batch_first=True, padding_value=-torch.inf)
        # Exponential clocks of rates p ring in the order of draws without replacement, however small a p is; those of
        # the padding never do.
        order = (rows - torch.empty_like(rows).exponential_().log()).argsort(dim=-1, descending=True)
        if part == "weights":
            return list(order[:, :1])
        if not pairs:
            return [row[:size] for row, size in zip(order, sizes, strict=True)]
        pair = order[:, :2]
        first = torch.rand(len(rows), 1, device=rows.device) < rows.gather(1, pair).softmax(-1)[:, :1]
        return list(torch.where(first, pair, pair.flip(1)))

    def weights(self, alpha: Tensor, training: bool, drawn: Tensor | None = None) -> Float[Tensor, " candidates"]:
        """One at the candidate that runs, zero elsewhere; the gradient is that of the softmax over those drawn."""
        if not training or drawn is None:
            return torch.zeros_like(alpha).scatter(0, alpha.argmax(keepdim=True), 1.0)
        hard = torch.zeros_like(alpha).scatter(0, drawn[:1], 1.0)
        soft = self.expectation(alpha, drawn)
        return hard + soft - soft.detach()

    def expectation(self, alpha: Tensor, drawn: Tensor | None = None) -> Float[Tensor, " candidates"]:
        """softmax(alpha); for a pass, the softmax over those that take part in it, zero elsewhere."""
        if drawn is None:
            return alpha.softmax(-1)
        return torch.zeros_like(alpha).scatter(0, drawn, alpha[drawn].softmax(-1))

    def forward(self, choice: Choice, x: Tensor, alpha: Float[Tensor, " candidates"]) -> Tensor:
        """The output of the candidate that runs."""
        drawn = choice.drawn if choice.training else None
        operations = list(choice.candidates.values())
        if drawn is None:
            return operations[int(alpha.argmax())](x)
        numbers = drawn.tolist()
        active: Tensor = operations[numbers[0]](x)
        wanted = len(numbers) > 1 and torch.is_grad_enabled() and alpha.requires_grad
        if not wanted or self.leaves_out(choice):
            return active
        probabilities = alpha[drawn].softmax(-1)
        others = [(choice.names[number], operations[number]) for number in numbers[1:]]
        if self.mode == "full_recompute":
            return _Recomputed.apply(probabilities, active, x, choice.key, others)
        with torch.no_grad():
            outputs = [_beside(active, x, choice.key, name, operation) for name, operation in others]
        return _Gated.apply(probabilities, active, *outputs)

    def leaves_out(self, choice: Choice) -> bool:
        """Whether the choice has no gradient in the present pass, because of ``skip_zero_grad``."""
        if not self.skip_zero_grad or choice.drawn is None:
            return False
        return isinstance(list(choice.candidates.values())[int(choice.drawn[0])], (Zero, nn.Identity))

    @torch.no_grad()
    def rescale(self, alpha: Tensor, before: Tensor, drawn: Tensor | None) -> None:
        """Gives a pair back, in place, the probability that it had together before its alphas were updated.

        From both alphas the logarithm of sum exp(new) / sum exp(old) is subtracted, so every other probability is what
        it was. In the other modes there is no pair and nothing changes.

        Args:
            alpha: The parameters after the update.
            before: Their values before it.
            drawn: The pass that the update came from.

        Example:
            >>> alpha, before = torch.tensor([1.0, 0.0, 5.0]), torch.zeros(3)
            >>> BinaryGate().rescale(alpha, before, torch.tensor([0, 1]))
            >>> bool(torch.isclose(alpha[:2].exp().sum(), torch.tensor(2.0))), alpha[2].item()
            (True, 5.0)
        """
        if self.mode == "two" and drawn is not None and len(drawn) == 2:
            alpha[drawn] -= alpha[drawn].logsumexp(0) - before[drawn].logsumexp(0)


def _beside(active: Tensor, x: Tensor, key: str, name: str, operation: nn.Module) -> Tensor:
    """The output of a candidate that does not run, without a trace in its statistics."""
    with frozen_statistics(operation):
        output: Tensor = operation(x)
    if output.shape != active.shape:
        raise ValueError(
            f"choice {key!r}: candidate {name!r} gives shape {tuple(output.shape)}, the one that runs "
            f"{tuple(active.shape)}; all candidates must agree"
        )
    return output


class _Gated(torch.autograd.Function):
    """The first output; the gradient of each probability is the inner product of its output and that of the result."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, *outputs: Tensor) -> Tensor:
        ctx.save_for_backward(*outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        outputs: Sequence[Tensor] = ctx.saved_tensors
        d = torch.stack([(output * grads[0]).sum() for output in outputs])
        return d, grads[0], *(None for _ in outputs[1:])


class _Recomputed(torch.autograd.Function):
    """The same without the outputs of the others, which run again when they are needed, one at a time."""

    @staticmethod
    def forward(
        ctx: Any, probabilities: Tensor, active: Tensor, x: Tensor, key: str, others: list[tuple[str, nn.Module]]
    ) -> Tensor:
        ctx.save_for_backward(active, x)
        ctx.key, ctx.others = key, others
        return active

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        active, x = ctx.saved_tensors
        d = [(active * grads[0]).sum()]
        with torch.no_grad():
            d += [(_beside(active, x, ctx.key, *other) * grads[0]).sum() for other in ctx.others]
        return torch.stack(d), grads[0], None, None, None
