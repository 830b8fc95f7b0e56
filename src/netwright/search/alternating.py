"""Steps of a search in which the architecture moves less often than the weights.

The schedule of Cai et al., "ProxylessNAS", ICLR 2019, arXiv:1812.00332: several steps of the weights, then one of the
architecture,

    t = 0, 1, ...:   alpha moves where t >= wait and (t - wait + 1) mod every = 0,   w moves always.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from netwright.checks import whole
from netwright.search.bilevel import FirstOrder, Step


class Alternating:
    """Any step, given the architecture's optimiser and the validation batch only every so often.

    Args:
        inner: The step; first order by default.
        every: Steps of the weights to one of the architecture, at least 1; with 1 it is the inner step.
        times: Of so many steps of the weights, how many are followed by one of the architecture, evenly spread; 1 to
            ``every``.
        wait: Steps that pass before these are counted, at least 0. Steps without an optimiser of the architecture, as
            in a stage that trains the weights alone, do not count.

    Raises:
        ValueError: If ``every`` is below 1, ``wait`` below 0 or ``times`` outside [1, every].

    Example:
        >>> a, w = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-2.0))
        >>> def objective(supernet, batch, part):
        ...     return a * w - 2 * a + 1 if part == "alpha" else (w - a) ** 2
        >>> w_opt, a_opt = torch.optim.SGD([w], lr=0.1), torch.optim.SGD([a], lr=0.1)
        >>> step, moves = Alternating(every=3), []
        >>> for _ in range(6):
        ...     figures = step.step(nn.Module(), objective, w_opt, a_opt, None, None, clip=None)
        ...     moves.append("val_loss" in figures)
        >>> moves
        [False, False, True, False, False, True]
    """

    def __init__(self, inner: Step | None = None, every: int = 5, wait: int = 0, times: int = 1) -> None:
        whole("every", every, ">= 1")
        whole("wait", wait, ">= 0")
        whole("times", times, ">= 1")
        if times > every:
            raise ValueError(f"times must lie in [1, {every}], the steps of the weights, got {times}")
        self.inner: Step = inner or FirstOrder()
        self.every, self.wait, self.times = every, wait, times
        self._seen = 0

    @property
    def needs_val(self) -> bool:
        """Whether the inner step needs a validation batch."""
        return bool(getattr(self.inner, "needs_val", False))

    def step(
        self,
        supernet: nn.Module,
        objective: Any,
        w_opt: torch.optim.Optimizer | None,
        a_opt: torch.optim.Optimizer | None,
        train_batch: Any,
        val_batch: Any,
        *,
        clip: float | None = 5.0,
    ) -> dict[str, float]:
        """The inner step and its figures, without the architecture's part unless that is due."""
        number = self._seen - self.wait
        owed = (number + 1) * self.times // self.every - number * self.times // self.every
        due = a_opt is not None and number >= 0 and owed > 0
        self._seen += a_opt is not None
        return self.inner.step(
            supernet, objective, w_opt, a_opt if due else None, train_batch, val_batch if due else None, clip=clip
        )

    def state_dict(self) -> dict[str, Any]:
        """The count, and what the inner step remembers."""
        state: dict[str, Any] = {"seen": self._seen, "wait": self.wait, "every": self.every, "times": self.times}
        if callable(kept := getattr(self.inner, "state_dict", None)):
            state["inner"] = kept()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        self._seen, self.wait = state["seen"], state["wait"]
        self.every, self.times = state.get("every", self.every), state.get("times", self.times)
        if callable(load := getattr(self.inner, "load_state_dict", None)):
            load(state["inner"])
