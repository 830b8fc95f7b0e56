"""Optimisers that suppress weak directions, those of few examples: winsorised gradients, M3 and RM3.

Chatterjee and Zielinski, "On the Generalization Mystery in Deep Learning", 2022, arXiv:2203.10036; Zielinski et al.,
"Weak and Strong Gradient Directions", 2020, arXiv:2003.07422, for M3 and RM3. For each coordinate of the gradient

    winsorised: the mean over the batch after the lowest and the highest c % of its values are pulled to the next one
    M3: the median of the mean gradients of three groups of the batch
    RM3: the median of the mean gradients of the last three steps

instead of the mean over the batch. What is left is smaller, so that each needs a learning rate of its own. Clipping the
mean gradient by its norm is another thing: it keeps every direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright.diagnose.gradients import ExampleGradients, LossFunction
from netwright.seeding import derive, stream


def check_share(c: float) -> float:
    """c as a float, which must lie in [0, 50)."""
    if not 0 <= c < 50:
        raise ValueError(f"c must lie in [0, 50), in percent, got {c}")
    return float(c)


def _finite(name: str, values: Sequence[Tensor | None]) -> None:
    """Refuses NaN, which no median and no clamp would pull in."""
    bad = sum(int((~value.isfinite()).sum()) for value in values if value is not None)
    if bad:
        raise ValueError(f"{name} must be finite, got NaN or infinity in {bad} places")


def winsorized_mean(G: Tensor, c: float, dim: int = 0) -> Tensor:
    """The mean over an axis after its k lowest and k highest values are pulled to the next one, k = floor(c b / 100).

    Args:
        G: Values; for gradients (batch, numbers).
        c: Percent of the b values pulled on either side, in [0, 50); 0 gives the mean, nearly 50 nearly the median.
        dim: The axis of length b.

    Returns:
        G without the axis.

    Raises:
        ValueError: If ``c`` is out of its range, there is no value, or one is not finite.

    Example:
        >>> winsorized_mean(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]), 20)    # (2 + 2 + 3 + 4 + 4) / 5
        tensor(3.)
    """
    check_share(c)
    if not G.ndim or not G.shape[dim]:
        raise ValueError(f"G must hold at least 1 value along axis {dim}, got shape {tuple(G.shape)}")
    _finite("G", [G])
    count = math.floor(c * G.shape[dim] / 100 + 1e-9)  # 8 % of 50 are 4, though 8 * 50 / 100 may be a little less
    if not count:
        return G.mean(dim)
    # Selecting the k + 1 outermost is a partial sort, along an axis that lies together in memory.
    last = G.movedim(dim, -1).contiguous()
    low = last.topk(count + 1, largest=False, sorted=False).values.amax(-1, keepdim=True)
    high = last.topk(count + 1, sorted=False).values.amin(-1, keepdim=True)
    return last.clamp(low, high).mean(-1)


def median_of_three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The one in the middle, for each number.

    Example:
        >>> median_of_three(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 0.0]), torch.tensor([9.0, 3.0]))
        tensor([2., 3.])
    """
    return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))


class _Wrapper:
    """An optimiser whose step sees other gradients; everything else is the optimiser's own."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimiser: schedules change them as ever."""
        return self.optimizer.param_groups

    @property
    def params(self) -> list[nn.Parameter]:
        """All parameters of the optimiser, in order."""
        return [param for group in self.param_groups for param in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Takes all gradients away."""
        self.optimizer.zero_grad(set_to_none)

    def memory(self) -> dict[str, Any]:
        """What the method itself must remember."""
        return {}

    def remember(self, memory: dict[str, Any]) -> None:
        """Takes up what :meth:`memory` gave."""

    def state_dict(self) -> dict[str, Any]:
        """That of the optimiser, and what the method remembers."""
        return {"optimizer": self.optimizer.state_dict(), "memory": self.memory()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a state."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.remember(state_dict["memory"])


class _OfBatches(_Wrapper):
    """One that needs the batch, whose losses it takes apart."""

    def write(self, batch: Sequence[Any]) -> Tensor:
        """Puts its gradient of a batch into every ``.grad``; the mean loss of the batch."""
        raise NotImplementedError

    def step(self, batch: Sequence[Any]) -> Tensor:
        """One step on a batch (inputs, targets, ...); its mean loss before."""
        loss = self.write(batch)
        self.optimizer.step()
        return loss


class WinsorizedGradients(_OfBatches):
    """Winsorised gradient descent: extreme values of single examples are pulled in before the mean is taken.

    All gradients of a batch are held at once, batch times parameters. The model runs in evaluation mode for them.

    Args:
        optimizer: Makes the step; its parameters must be the model's trained ones. The paper's is plain SGD.
        model: Maps a batch of inputs to outputs, each example by itself.
        loss_fn: Maps (outputs, targets) of a batch to one loss an example.
        c: Percent of the batch that is pulled in on either side of every coordinate, in [0, 50); the paper tries 0, 1,
            2, 4 and 8 at batch 100. 0 is the optimiser itself.

    Raises:
        ValueError: If ``c`` is out of its range, a parameter is not the model's, or the model normalises by the batch.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> optimizer = WinsorizedGradients(
        ...     torch.optim.SGD(net.parameters(), 0.1), net, nn.CrossEntropyLoss(reduction="none"), c=20
        ... )
        >>> optimizer.step((torch.rand(10, 2), torch.arange(10) % 3)).shape     # the loss of the batch
        torch.Size([])
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, loss_fn: LossFunction, c: float = 4.0):
        super().__init__(optimizer)
        self.c = check_share(c)
        self.gradients = ExampleGradients(model, loss_fn)
        if {*map(id, self.params)} != {*map(id, self.gradients.params.values())}:
            raise ValueError("optimizer must hold the trained parameters of the model, no more and no fewer")

    def write(self, batch: Sequence[Any]) -> Tensor:
        """Puts the winsorised mean of a batch's gradients into every ``.grad``; the mean loss of the batch."""
        rows, losses = self.gradients.rows(*batch[:2])
        params = list(self.gradients.params.values())
        parts = winsorized_mean(rows, self.c).split([param.numel() for param in params])
        for param, part in zip(params, parts, strict=True):
            param.grad = part.view_as(param)
        return losses.mean()


class MedianOfMeans(_OfBatches):
    """M3: the batch is dealt into three groups, and each coordinate takes the median of their mean gradients.

    Costs what the plain step costs. Groups differ by one example where three does not divide the batch.

    Args:
        optimizer: Makes the step; the paper's is plain SGD.
        model: Maps a batch of inputs to outputs.
        loss_fn: Maps (outputs, targets) of a batch to one loss an example.
        seed: Of the dealing.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> optimizer = MedianOfMeans(
        ...     torch.optim.SGD(net.parameters(), 0.1), net, nn.CrossEntropyLoss(reduction="none")
        ... )
        >>> optimizer.step((torch.rand(10, 2), torch.arange(10) % 3)).shape
        torch.Size([])
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, loss_fn: LossFunction, seed: int = 0):
        super().__init__(optimizer)
        derive(seed)
        self.model, self.loss_fn, self.seed, self.steps = model, loss_fn, seed, 0

    def write(self, batch: Sequence[Any]) -> Tensor:
        """Puts the median of the three groups' gradients into every ``.grad``; the mean loss of the batch.

        Raises:
            ValueError: If the batch holds fewer than 3 examples, or a gradient is not finite.
        """
        x, y = batch[:2]
        if len(x) < 3:
            raise ValueError(f"a batch must hold at least 3 examples, got {len(x)}")
        order = torch.randperm(len(x), generator=stream(self.seed, "m3", self.steps)).to(x.device)
        self.steps += 1
        groups, losses = [], []
        for chosen in order.tensor_split(3):
            loss = self.loss_fn(self.model(x[chosen]), y[chosen])
            groups.append(torch.autograd.grad(loss.mean(), self.params, allow_unused=True))
            losses.append(loss.detach().flatten())
        _finite("gradients", [part for group in groups for part in group])
        for param, *parts in zip(self.params, *groups, strict=True):
            param.grad = None if any(part is None for part in parts) else median_of_three(*parts)
        return torch.cat(losses).mean()

    def memory(self) -> dict[str, Any]:
        """The number of the step."""
        return {"steps": self.steps}

    def remember(self, memory: dict[str, Any]) -> None:
        """Takes up what :meth:`memory` gave."""
        self.steps = memory["steps"]


class RunningMedian(_Wrapper):
    """RM3: each coordinate takes the median of the gradients of this step and the two before it.

    The two older ones stay as they were at their own weights. The first step takes its own gradient, the second the
    mean of two. No gradient of a single example is needed, and the step costs what it costs.

    Args:
        optimizer: Makes the step; the paper's is plain SGD.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> optimizer = RunningMedian(torch.optim.SGD(net.parameters(), 0.1))
        >>> net(torch.ones(4, 2)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__(optimizer)
        self._older: list[list[Tensor | None]] = []

    def write(self) -> None:
        """Puts the median of the last three into every ``.grad``.

        Raises:
            ValueError: If a gradient is not finite.
        """
        _finite("gradients", [param.grad for param in self.params])
        now = [None if param.grad is None else param.grad.detach().clone() for param in self.params]
        for number, param in enumerate(self.params):
            seen = [grads[number] for grads in (*self._older, now)]
            there = [grad for grad in seen if grad is not None]
            if param.grad is not None and len(there) > 1:
                param.grad = median_of_three(*there) if len(there) == 3 else (there[0] + there[1]) / 2
        self._older = [*self._older, now][-2:]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the gradients that are there, or that ``closure`` makes; what it returns."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.write()
        self.optimizer.step()
        return result

    def memory(self) -> dict[str, Any]:
        """The two gradients before."""
        return {"older": self._older}

    def remember(self, memory: dict[str, Any]) -> None:
        """Takes up what :meth:`memory` gave."""
        self._older = [
            [None if grad is None else grad.to(param.device) for grad, param in zip(grads, self.params, strict=True)]
            for grads in memory["older"]
        ]
