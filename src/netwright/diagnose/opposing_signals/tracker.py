"""Losses of single examples along a training, and the groups that oppose each other in them.

Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization", ICLR
2024, arXiv:2311.04163.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from netwright.diagnose.gradients import Batched, ExampleGradients
from netwright.diagnose.losses import LossFunction
from netwright.diagnose.opposing_signals import scores
from netwright.diagnose.opposing_signals.edge import sharpness, trained_parameters
from netwright.diagnose.opposing_signals.opposition import mean_gradient
from netwright.diagnose.opposing_signals.probe import as_tensors, probe_losses
from netwright.diagnose.opposing_signals.results import Groups, OpposingReport, PairScores
from netwright.seeding import stream

# Random pairs of groups whose gradients are compared; each takes two backward passes.
GRADIENT_DRAWS = 20
NONE = PairScores(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, 0)


class OpposingSignalTracker:
    """Keeps the loss of every example of a probe along a training, and finds the groups that oppose each other.

    ``record(t)`` is called before step t, and once more after the last one. Loss changes are those between neighbouring
    records that lie closest together: where not every step is recorded, record both sides of the same step.

    Args:
        model: Maps a batch of inputs to outputs.
        loss_fn: Maps (outputs, targets) of a batch to one loss an example, like ``CrossEntropyLoss(reduction="none")``.
        data: The probe, fixed: a pair of tensors (inputs, targets), a data set of such pairs, or batches of them.
        every: Only steps that it divides, and the ones after them, are recorded.
        capacity: Most records to keep, the last ones; each is a float32 number an example. All when None.
        snapshots: Of how many steps the parameters before them are kept, for gradients and sharpness: those with the
            largest rise of the mean loss, or, while it falls, with the largest changes.
        labels: Class of each example; by default the targets where they are whole numbers, or the place of their
            maximum where they are vectors.

    Raises:
        ValueError: If a number is out of its range, or the probe holds fewer than 10 examples.

    Example:
        >>> x, y = torch.randn(40, 4), torch.arange(40) % 2
        >>> net = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> tracker = OpposingSignalTracker(net, nn.CrossEntropyLoss(reduction="none"), (x, y))
        >>> for step in range(5):
        ...     _ = tracker.record(step)
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(net(x), y).backward()
        ...     optimizer.step()
        >>> tracker.record(5), tracker.deltas().shape, len(tracker.groups(step=2).up)
        (True, torch.Size([5, 40]), 5)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Batched | Dataset[Any],
        every: int = 1,
        *,
        capacity: int | None = None,
        snapshots: int = 1,
        labels: Int[Tensor, " examples"] | None = None,
    ):
        for name, value, least in (("every", every, 1), ("capacity", capacity, 2), ("snapshots", snapshots, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        self.model, self.loss_fn, self.every, self.capacity, self.kept = model, loss_fn, every, capacity, snapshots
        self.x, self.y = as_tensors(data)
        scores.group_size(len(self.x))
        if labels is not None and labels.shape != (len(self.x),):
            raise ValueError(f"labels must hold {len(self.x)} numbers, got shape {tuple(labels.shape)}")
        self.labels = _classes(self.y) if labels is None else labels.cpu()
        self.steps: list[int] = []
        self._losses: list[Tensor] = []
        self._span = 0
        self._before: dict[str, Tensor] | None = None
        self._snapshots: dict[int, tuple[tuple[bool, float], dict[str, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.x)

    def record(self, step: int, losses: Float[Tensor, " examples"] | None = None) -> bool:
        """Keeps the losses at the parameters before a step; whether it did.

        Args:
            step: Its number, larger than those before.
            losses: The probe's losses where training has just computed them, at these parameters and in evaluation
                mode (or where the modes do not differ); no further forward pass is made then.

        Raises:
            ValueError: If the step is not after the last one, the loss does not give one number an example, or a loss
                is not finite.
        """
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"step must be > {self.steps[-1]}, the last one recorded, got {step}")
        if step % self.every > 1:
            return False
        found = probe_losses(self.model, self.loss_fn, self.x, self.y) if losses is None else losses.detach()
        if found.shape != (len(self),):
            raise ValueError(f"losses must hold {len(self)} numbers, got shape {tuple(found.shape)}")
        row = self._finite(found.float().cpu(), f"at step {step}")
        if losses is not None and row.data_ptr() == losses.data_ptr():
            row = row.clone()
        if self.steps and (not self._span or step - self.steps[-1] < self._span):
            self._span, self._snapshots = step - self.steps[-1], {}
        self.steps.append(step)
        self._losses.append(row)
        if self.capacity is not None and len(self.steps) > self.capacity:
            del self.steps[0], self._losses[0]
            self._snapshots = {at: kept for at, kept in self._snapshots.items() if at >= self.steps[0]}
        if self.kept:
            self._keep()
        return True

    def check_losses(self) -> None:
        """Refuses a loss or a model that a record could not be made with, before anything is recorded.

        Raises:
            ValueError: As for :meth:`record`.
        """
        self._finite(probe_losses(self.model, self.loss_fn, self.x, self.y), "before the first step")

    def _finite(self, losses: Tensor, when: str) -> Tensor:
        bad = int((~losses.isfinite()).sum())
        if bad:
            raise ValueError(f"losses must be finite, got NaN or infinity for {bad} of {len(self)} {when}")
        return losses

    def _keep(self) -> None:
        """Keeps the parameters before the last step where it is one of the most interesting."""
        if self._before is not None and len(self.steps) > 1 and self.steps[-1] - self.steps[-2] == self._span:
            delta = self._losses[-1] - self._losses[-2]
            self._snapshots[self.steps[-2]] = (scores.interest(delta), self._before)
            if len(self._snapshots) > self.kept:
                del self._snapshots[min(self._snapshots, key=lambda at: self._snapshots[at][0])]
        self._before = {name: value.detach().clone() for name, value in self._state()}

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    @contextmanager
    def parameters_of(self, step: int) -> Iterator[bool]:
        """The model has the parameters it had before a step inside the block; whether they were kept.

        Example:
            >>> net = nn.Linear(1, 1, bias=False)
            >>> x = torch.ones(10, 1)
            >>> tracker = OpposingSignalTracker(net, lambda output, _: output[:, 0] ** 2, (x, x[:, 0]))
            >>> for step in range(2):
            ...     with torch.no_grad():
            ...         _ = net.weight.fill_(step + 1.0)
            ...     _ = tracker.record(step)
            >>> with tracker.parameters_of(0) as known:
            ...     known, net.weight.item()
            (True, 1.0)
            >>> net.weight.item()
            2.0
        """
        if step not in self._snapshots:
            yield False
            return
        now = {name: value.detach().clone() for name, value in self._state()}
        try:
            self._assign(self._snapshots[step][1])
            yield True
        finally:
            self._assign(now)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, value in self._state():
            value.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """The record, without the parameters that were kept."""
        return {"steps": list(self.steps), "losses": self.losses(), "span": self._span}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a record of the same probe.

        Raises:
            ValueError: If it is of another number of examples.
        """
        losses = state_dict["losses"]
        if losses.shape[1] != len(self):
            raise ValueError(f"the record must be of {len(self)} examples, got {losses.shape[1]}")
        self.steps, self._losses, self._span = list(state_dict["steps"]), list(losses), state_dict["span"]
        self._before, self._snapshots = None, {}

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Steps before which the parameters are kept, in order."""
        return tuple(sorted(self._snapshots))

    def losses(self) -> Float[Tensor, "records examples"]:
        """All losses that are kept, a row a record."""
        return torch.stack(self._losses) if self._losses else torch.empty(0, len(self))

    def deltas(self) -> Float[Tensor, "changes examples"]:
        """Loss changes, a row for each of :attr:`delta_steps`; one fewer than records where every step was recorded."""
        return self._changes()[1]

    @property
    def delta_steps(self) -> list[int]:
        """The step whose change each row of :meth:`deltas` is."""
        return self._changes()[0]

    def _changes(self) -> tuple[list[int], Tensor]:
        if len(self.steps) < 2:
            return [], torch.empty(0, len(self))
        steps = torch.tensor(self.steps)
        rows = (steps.diff() == self._span).nonzero().flatten()
        losses = self.losses()
        return steps[rows].tolist(), losses[rows + 1] - losses[rows]

    def interesting_steps(self, kind: scores.Kind = "spike") -> list[int]:
        """Steps that are worth a look: the last rise before each local maximum of the mean loss (``"spike"``), every
        rise of it (``"rise"``), or the one with the largest sum of absolute changes (``"largest"``).

        Where not every step is recorded, a spike is a rise after which the next recorded step falls.
        """
        steps, deltas = self._changes()
        mean = torch.cat([torch.zeros(1), deltas.mean(1).cumsum(0)]) if len(steps) else torch.zeros(1)
        return [steps[row] for row in scores.interesting_steps(mean, deltas, kind)]

    def _row(self, step: int | None) -> tuple[int, list[int], Tensor]:
        """Row of a step, all steps with changes, and the changes."""
        steps, deltas = self._changes()
        if not steps:
            raise ValueError(f"the record must hold both sides of a step, got {len(self.steps)} records")
        if step is None:
            return max(range(len(steps)), key=lambda row: scores.interest(deltas[row])), steps, deltas
        if step not in steps:
            raise ValueError(f"step must be one of the {len(steps)} recorded in {steps[0]}..{steps[-1]}, got {step}")
        return steps.index(step), steps, deltas

    def groups(self, step: int | None = None, k: float = 0.01) -> Groups:
        """The examples whose losses rose and fell most in a step.

        Args:
            step: By default the one with the largest rise of the mean loss, or, where it never rises, with the largest
                sum of absolute changes.
            k: Share of the examples in each group, which is at least 5 of them; in (0, 0.5].

        Raises:
            ValueError: If the step is outside the record, ``k`` out of its range, or the probe holds fewer examples
                than two groups.
        """
        row, steps, deltas = self._row(step)
        size = scores.group_size(len(self), k)
        up, down = scores.largest_changes(deltas[row], size)
        return Groups(steps[row], tuple(up.tolist()), tuple(down.tolist()), (self._counts(up), self._counts(down)))

    def _counts(self, members: Tensor) -> dict[int, int]:
        if self.labels is None:
            return {}
        values, counts = self.labels[members].unique(return_counts=True)
        table = sorted(zip(values.tolist(), counts.tolist(), strict=True), key=lambda entry: (-entry[1], entry[0]))
        return dict(table)

    def examples(self, members: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some examples."""
        chosen = torch.as_tensor(members, dtype=torch.int64)
        return self.x[chosen], self.y[chosen]

    def rest(self, *groups: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of all examples but those of some groups, to train without them."""
        mask = torch.ones(len(self), dtype=torch.bool)
        for group in groups:
            mask[torch.as_tensor(group)] = False
        return self.x[mask], self.y[mask]

    def report(
        self,
        step: int | None = None,
        window: int = 10,
        n_random: int = 200,
        *,
        k: float = 0.01,
        curvature: bool = True,
        seed: int = 0,
    ) -> OpposingReport:
        """Scores of the groups of a step, beside those of random groups and of groups with the same losses.

        Gradients and sharpness are those before the step, and NaN unless its parameters were kept.

        Args:
            step: As for :meth:`groups`.
            window: Steps each way over which loss changes are correlated, at least 1.
            n_random: Pairs of random groups, at least 1.
            k: As for :meth:`groups`.
            curvature: Whether to look for the sharpest direction, which takes some gradients of the whole probe.
            seed: Of the random groups.

        Raises:
            ValueError: As for :meth:`groups`, and if ``window`` or ``n_random`` is out of its range.
        """
        for name, value in (("window", window), ("n_random", n_random)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        groups = self.groups(step, k)
        row, steps, deltas = self._row(groups.step)
        near = [at for at, other in enumerate(steps) if abs(other - groups.step) <= window * self._span]
        place = self.steps.index(groups.step)
        losses = self._losses[place]
        size = len(groups.up)
        pair = torch.tensor([groups.up, groups.down])
        draws = stream(seed, "opposing signals")
        others = {
            "random": scores.random_pairs(len(self), size, n_random, draws),
            "matched": scores.matched_pairs(losses, (pair[0], pair[1]), n_random, draws),
        }
        spikes = deltas[[steps.index(other) for other in self.interesting_steps("spike")]]
        with self.parameters_of(groups.step) as known:
            top, slopes = math.nan, None
            if known and curvature:
                top, direction = sharpness(self.model, self.loss_fn, (self.x, self.y))
                slopes = self._slopes(direction)

            def scored(pairs: Tensor) -> PairScores:
                return self._scored(pairs, deltas[near], deltas[row], losses, slopes, known) if len(pairs) else NONE

            own, random, matched = scored(pair[None]), scored(others["random"]), scored(others["matched"])
        rows = [self.steps.index(steps[at]) for at in near]
        rows.append(rows[-1] + 1)
        chosen = torch.stack([self._losses[at] for at in rows])
        return OpposingReport(
            step=groups.step,
            groups=groups,
            steps=tuple(steps[at] for at in near),
            pair=own,
            random=random,
            matched=matched,
            even_share=2 * size / len(self),
            alternation=scores.alternation(deltas[near], [steps[at] for at in near], self._span, size),
            persistence=scores.persistence(spikes, size),
            sharpness=top,
            curves={
                "up": tuple(chosen[:, pair[0]].mean(1).tolist()),
                "down": tuple(chosen[:, pair[1]].mean(1).tolist()),
                "all": tuple(chosen.mean(1).tolist()),
            },
        )

    def _slopes(self, direction: Tensor) -> Float[Tensor, " examples"]:
        """Slope of each example's loss along a direction of all trained parameters."""
        params = trained_parameters(self.model)
        parts = direction.split([param.numel() for param in params.values()])
        along = {name: part.view_as(param) for (name, param), part in zip(params.items(), parts, strict=True)}
        return ExampleGradients(self.model, self.loss_fn, bn="eval").along(self.x, self.y, along).double().cpu()

    def _scored(
        self, pairs: Tensor, window: Tensor, delta: Tensor, losses: Tensor, slopes: Tensor | None, known: bool
    ) -> PairScores:
        size = delta.double().abs()
        products = None if slopes is None else slopes[pairs].mean(-1).prod(-1)
        cosines = [self._cosine(pair) for pair in pairs[:GRADIENT_DRAWS]] if known else [math.nan]
        found = scores.oscillations(window, pairs)
        defined = found[~found.isnan()]
        return PairScores(
            oscillation=float(defined.mean()) if len(defined) and len(window) > 1 else math.nan,
            gradient_cosine=sum(cosines) / len(cosines),
            slope_product=math.nan if products is None else float(products.mean()),
            opposed=math.nan if products is None else float((products < 0).double().mean()),
            share=float(size[pairs].sum((1, 2)).mean() / size.sum()) if float(size.sum()) else math.nan,
            loss=float(losses.double()[pairs].mean()),
            pairs=len(pairs),
        )

    def _cosine(self, pair: Tensor) -> float:
        a, b = (mean_gradient(self.model, self.loss_fn, *self.examples(group)) for group in pair)
        below = float(a.norm() * b.norm())
        return float(a @ b) / below if below else math.nan


def _classes(targets: Tensor) -> Tensor | None:
    if targets.ndim == 1 and not targets.is_floating_point():
        return targets.cpu()
    return targets.argmax(1).cpu() if targets.ndim == 2 and targets.shape[1] > 1 else None
