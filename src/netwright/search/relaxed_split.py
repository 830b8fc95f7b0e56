"""One step of relaxed single-level optimisation: two sets of weights, one on each half of the data, tied by a penalty.

Xue, Qi and Xin, "RARTS: An Efficient First-Order Relaxed Architecture Search Method", IEEE Access 2022,
arXiv:2008.03901, doi:10.1109/ACCESS.2022.3185095.

    L(y, w, a) = L_val(y, a) + lambda L_train(w, a) + beta/2 ||y - w||^2

    w <- w - eta_w [lambda grad_w L_train(w, a) + beta (w - y)]
    y <- y - eta_y [grad_y L_val(y, a) + beta (y - w)]                      w, y, a: the newest (Gauss-Seidel)
    a <- a - eta_a [lambda grad_a L_train(w, a) + grad_a L_val(y, a)]

Only first derivatives appear. In this order every line is a gradient step in one block, so with plain steps L cannot
rise while each is shorter than 2 over that block's curvature (2 lambda + beta, beta and 2 lambda in the example below).
The order needs four backward passes, since the architecture has to see the new weights. *Fused*, all three gradients
are taken at the old (w, y, a) in two passes: gradient descent on L, with the same limit points and the smaller bound of
2 over the curvature of L as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from netwright.checks import number
from netwright.console import warn
from netwright.nn.batchnorm import frozen_statistics
from netwright.search.bilevel import (
    FirstOrder,
    Gradients,
    apply_gradients,
    average,
    check_dependent,
    check_disjoint,
    finite,
    gradients,
    move_architecture,
    trained,
)


class RelaxedSplit:
    """Trains the architecture on both halves of the data, each seen through weights of its own.

    The second set y starts as a copy of the weights w that the module holds and has an optimiser of its own, of the
    kind and with the settings of ``w_opt``. Running statistics of normalisation layers are its own too; everything else
    is shared. Losses are evaluated on the one module, with y put in the place of w by
    :func:`torch.func.functional_call`, so any module, gate and objective will do, and a change of the module (a gate,
    say) holds for both.

    Args:
        lam: Weight of the training loss, >= 0. With 0 the training half is not used.
        beta: Strength of the tie, >= 0: with 0 there is none, and very strong it makes one set of weights of two. Plain
            steps need beta < 1 / lr where fused, else beta < 2 / lr.
        fused: Two backward passes, all gradients at the old point; else four, each at the newest.
        y_scale: Learning rate of y over that of w, > 0.
        monotone_check: Warn when L rises from one step to the next; of use where batches are the whole data, for
            batches that change make it rise and fall.

    Raises:
        ValueError: If a value is out of range.

    Example:
        The solvable model, whose true solution is (1, 1); first-order DARTS ends at (2, 2).

        >>> class Scalars(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        ...         self.w = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        >>> def objective(net, batch, part):
        ...     return net.a * net.w - 2 * net.a + 1 if part == "alpha" else (net.w - net.a) ** 2
        >>> net, step = Scalars(), RelaxedSplit(lam=10.0, beta=10.0, fused=False)
        >>> w_opt, a_opt = torch.optim.SGD([net.w], lr=0.04), torch.optim.SGD([net.a], lr=0.04)
        >>> for _ in range(400):
        ...     figures = step.step(net, objective, w_opt, a_opt, None, None, clip=None)
        >>> round(net.a.item(), 6), round(net.w.item(), 6), round(step.second["w"].item(), 6)
        (1.081081, 1.027027, 0.918919)

    Attributes:
        needs_val: Tells that a step of the architecture needs a validation batch.
    """

    needs_val = True

    def __init__(
        self,
        lam: float = 1.0,
        beta: float = 1e-2,
        *,
        fused: bool = True,
        y_scale: float = 1.0,
        monotone_check: bool = False,
    ):
        number("lam", lam, ">= 0")
        number("beta", beta, ">= 0")
        number("y_scale", y_scale, "> 0")
        self.lam, self.beta, self.fused, self.y_scale = lam, beta, fused, y_scale
        self.monotone_check = monotone_check
        self._weights: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._saved: dict[str, Any] | None = None  # of the optimiser, until the first step makes one
        self._last: float | None = None

    @property
    def second(self) -> dict[str, Tensor]:
        """The second set of weights y, by the names that the module gives w; empty before the first step."""
        return dict(self._weights)

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
        """One step of w, y and the architecture.

        Where the architecture rests (``a_opt`` is ``None``) the weights alone take a step, the second set is forgotten,
        and a later step begins with a new copy.

        Args:
            supernet: Any module that holds the parameters of both optimisers.
            objective: ``objective(supernet, batch, part=...)`` -> scalar, with ``part`` ``"weights"`` for the training
                loss and ``"alpha"`` for the validation loss; a term of both enters ``lam`` + 1 times.
            w_opt: Optimiser of the weights.
            a_opt: Optimiser of the architecture parameters.
            train_batch, val_batch: What the objective takes.
            clip: Largest global norm of the gradient, penalty included, of each set of weights.

        Returns:
            ``train_loss``, ``val_loss``, ``gap`` = ||y - w||^2 and ``objective`` = L at the point where the step began,
            and of each gradient (``weight``, ``second``, ``alpha``) norm and whether it was ``skipped``.

        Raises:
            ValueError: If ``w_opt`` is missing, holds an architecture parameter or one that is not the module's, if the
                second set does not fit it, or if no loss depends on the architecture.
            FloatingPointError: If a loss or L is not finite.
        """
        check_disjoint(w_opt, a_opt, supernet)
        if w_opt is None:
            raise ValueError("w_opt must be an optimiser of the weights that are split, got None")
        if a_opt is None:
            self._forget()
            return FirstOrder().step(supernet, objective, w_opt, None, train_batch, None, clip=clip)
        weights, second, y_opt = self._pair(supernet, w_opt)
        alphas = trained(a_opt)
        both_w, both_y = [*weights, *alphas], [*second, *alphas]
        away = _Difference(weights, second)
        gap = sum(norm**2 for norm in away.norms)

        loss_t = objective(supernet, train_batch, part="weights")
        grads_w = gradients(self.lam * loss_t, both_w)
        if self.fused:
            loss_v = self._at_second(supernet, objective, val_batch)
            grads = [*grads_w, *gradients(loss_v, both_y)]
            grads, losses = average(grads, [loss_t, loss_v], like=[*both_w, *both_y])
            grads_w, grads_y = grads[: len(both_w)], grads[len(both_w) :]
            figures = self._figures(losses[0], losses[1], gap)
            figures |= apply_gradients(w_opt, weights, away.pulled(grads_w, self.beta), clip, "weight")
            figures |= apply_gradients(y_opt, second, away.pulled(grads_y, -self.beta), clip, "second")
        else:
            grads_w, (train,) = average(grads_w, [loss_t], like=both_w)
            finite(train, "training loss")
            moved = apply_gradients(w_opt, weights, away.pulled(grads_w, self.beta), clip, "weight")
            loss_v = self._at_second(supernet, objective, val_batch)
            grads_y, (val,) = average(gradients(loss_v, both_y), [loss_v], like=both_y)
            figures = self._figures(train, val, gap) | moved
            away = _Difference(weights, second)
            figures |= apply_gradients(y_opt, second, away.pulled(grads_y, -self.beta), clip, "second")
            with frozen_statistics(supernet):
                at_w = gradients(self.lam * objective(supernet, train_batch, part="weights"), alphas)
                at_y = gradients(self._at_second(supernet, objective, val_batch), alphas)
            grads, _ = average([*at_w, *at_y], like=[*alphas, *alphas])
            grads_w = [*grads_w[: len(weights)], *grads[: len(alphas)]]
            grads_y = [*grads_y[: len(weights)], *grads[len(alphas) :]]

        total = _sums(grads_w[len(weights) :], grads_y[len(weights) :])
        check_dependent(total, "a loss")
        return figures | move_architecture(a_opt, alphas, total)

    def _figures(self, train: float, val: float, gap: float) -> dict[str, float]:
        figures = {"train_loss": finite(train, "training loss"), "val_loss": finite(val, "validation loss"), "gap": gap}
        total = finite(val + self.lam * train + self.beta / 2 * gap, "the relaxed objective")
        if self.monotone_check and self._last is not None and total > self._last + 1e-6 * max(1.0, abs(self._last)):
            warn(f"the relaxed objective rose from {self._last:.6g} to {total:.6g}; smaller steps may help")
        self._last = total
        return figures | {"objective": total}

    def _at_second(self, supernet: nn.Module, objective: Any, batch: Any) -> Tensor:
        """The validation loss at y."""
        # The call writes running statistics that a layer has replaced, rather than filled, into this dictionary.
        values = {f"supernet.{name}": value for name, value in (self._weights | self._buffers).items()}
        loss: Tensor = torch.func.functional_call(_Loss(supernet, objective), values, (batch,))
        for name in self._buffers:
            self._buffers[name] = values[f"supernet.{name}"]
        return loss

    def _pair(
        self, supernet: nn.Module, w_opt: torch.optim.Optimizer
    ) -> tuple[list[nn.Parameter], list[Tensor], torch.optim.Optimizer]:
        """The weights that are trained now, their second set and its optimiser, which are made where there are none."""
        owner: torch.optim.Optimizer = getattr(w_opt, "optimizer", w_opt)  # Lightning wraps it
        names = {id(p): name for name, p in supernet.named_parameters()}
        groups = [list(group["params"]) for group in w_opt.param_groups]
        if any(id(p) not in names for params in groups for p in params):
            raise ValueError("w_opt must hold parameters of the supernet, got one that is not")
        first = {names[id(p)]: p for params in groups for p in params}
        if not self._weights:
            self._weights = {name: p.detach().clone() for name, p in first.items()}
            statistics = {
                f"{path}.{name}" if path else name
                for path, part in supernet.named_modules()
                if isinstance(part, _NormBase)
                for name in part._buffers
            }
            self._buffers = {name: b.detach().clone() for name, b in supernet.named_buffers() if name in statistics}
        if self._optimizer is None:
            self._fit_to(first)
            kind: Any = type(owner)
            self._optimizer = kind([{"params": [self._weights[names[id(p)]] for p in params]} for params in groups])
            if self._saved is not None:
                self._optimizer.load_state_dict(self._saved)
                self._saved = None
        if self._weights.keys() != first.keys():
            raise ValueError(f"w_opt must hold the weights that were split, got other ones: {_different(self, first)}")
        if not owner.state:  # a new stage has begun
            self._optimizer.state.clear()
        for group, own in zip(w_opt.param_groups, self._optimizer.param_groups, strict=True):
            own.update({name: value for name, value in group.items() if name != "params"})
            own["lr"] = group["lr"] * self.y_scale
        for name, p in first.items():
            self._weights[name].requires_grad_(p.requires_grad)
        weights = trained(w_opt)
        return weights, [self._weights[names[id(p)]] for p in weights], self._optimizer

    def _fit_to(self, first: Mapping[str, nn.Parameter]) -> None:
        """Checks a loaded second set against the weights and brings it to their device."""
        shapes = {name: tuple(value.shape) for name, value in self._weights.items()}
        if shapes != {name: tuple(p.shape) for name, p in first.items()}:
            raise ValueError(
                f"the second set must have the shapes of the weights, got other ones: {_different(self, first)}"
            )
        device = next(iter(first.values())).device
        self._weights = {name: value.to(device) for name, value in self._weights.items()}
        self._buffers = {name: value.to(device) for name, value in self._buffers.items()}

    def _forget(self) -> None:
        self._weights, self._buffers = {}, {}
        self._optimizer = self._saved = self._last = None

    def state_dict(self) -> dict[str, Any]:
        """A copy of the second set, its running statistics and its optimiser's memory; empty before the first step."""
        if not self._weights:
            return {}
        optimizer = self._saved if self._optimizer is None else self._optimizer.state_dict()
        return copy.deepcopy(
            {
                "weights": {name: value.detach() for name, value in self._weights.items()},
                "buffers": self._buffers,
                "optimizer": optimizer,
                "objective": self._last,
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a saved state; whether it fits the module is checked by the next step."""
        self._forget()
        if state:
            copied = copy.deepcopy(dict(state))
            self._weights, self._buffers = copied["weights"], copied["buffers"]
            self._saved, self._last = copied["optimizer"], copied["objective"]


class _Difference:
    """w - y, and the norm of each of its tensors."""

    def __init__(self, w: Sequence[Tensor], y: Sequence[Tensor]):
        with torch.no_grad():
            self.tensors = list(torch._foreach_sub(list(w), list(y))) if w else []
        norms = torch._foreach_norm(self.tensors) if w else ()
        self.norms: list[float] = torch.stack(list(norms)).tolist() if norms else []

    def pulled(self, grads: Gradients, strength: float) -> Gradients:
        """The first gradients, with ``strength`` times the difference added.

        One that is missing counts as zero where the two sets differ; else it stays missing, so that a weight that no
        loss ever uses is left alone.
        """
        own = [
            torch.zeros_like(d) if g is None and norm and strength else g
            for g, d, norm in zip(grads, self.tensors, self.norms, strict=False)
        ]
        there = [i for i, g in enumerate(own) if g is not None]
        if there and strength:
            # Not in place: gradients may be views of each other, or of one number.
            sums = torch._foreach_add(
                [g for g in own if g is not None], [self.tensors[i] for i in there], alpha=strength
            )
            for i, total in zip(there, sums, strict=True):
                own[i] = total
        return own


class _Loss(nn.Module):
    """The validation loss as a module, so that a functional call may exchange what the supernet inside it holds."""

    def __init__(self, supernet: nn.Module, objective: Any):
        super().__init__()
        self.supernet = supernet
        self._objective = objective

    def forward(self, batch: Any) -> Tensor:
        loss: Tensor = self._objective(self.supernet, batch, part="alpha")
        return loss


def _sums(a: Gradients, b: Gradients) -> Gradients:
    return [
        right if left is None else left if right is None else left + right for left, right in zip(a, b, strict=True)
    ]


def _different(step: RelaxedSplit, first: Mapping[str, Tensor]) -> str:
    second = step.second
    differing = [n for n in first if n not in second or second[n].shape != first[n].shape]
    return ", ".join([*differing, *(n for n in second if n not in first)])
