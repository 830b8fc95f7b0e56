"""Pruning by learned scores: gradient descent finds which weights to keep.

Sehwag et al., "HYDRA: Pruning Adversarially Robust Neural Networks", NeurIPS 2020, arXiv:2002.10509; with the
straight-through scores of Ramanujan et al. 2020, arXiv:1911.13299.

    pretrain: min_w L(w)
    prune:    min_S L(M(S) * w),  S = sqrt(6 / fan_in) w / max|w| at first
    finetune: min_w L(M(S) * w)

Every convolution and linear layer keeps its own share k of its weights. At the scaled start the mask is that
of magnitude pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from torch import nn

from netwright.compress.exact import check_sparsity
from netwright.compress.prune import prunable
from netwright.nn import shared
from netwright.nn.sparse import (
    FixedMask,
    TopKMask,
    check_density,
    init_scores,
    layers,
    mask_of,
    masked_tensors,
    set_density,
    train_mode,
)
from netwright.nn.sparse.masks import Scored

Stage = Literal["pretrain", "prune", "finetune"]
_M = TypeVar("_M", bound=nn.Module)


def stage(module: nn.Module) -> Stage:
    """Which stage a network is prepared for, read from its masks alone.

    Raises:
        ValueError: If there is no convolution or linear layer.

    Example:
        >>> stage(nn.Linear(4, 2)), stage(begin_scores(nn.Linear(4, 2), 0.5))
        ('pretrain', 'prune')
    """
    masks = [mask_of(layer) for layer in prunable(module).values()]
    if any(isinstance(mask, Scored) and mask.scores.requires_grad for mask in masks):
        return "prune"
    return "finetune" if any(mask is not None for mask in masks) else "pretrain"


def begin_scores(module: _M, density: float, skip: Sequence[str] = ()) -> _M:
    """Prepares a trained network, in place, for learning which weights to keep.

    Layers get scores in the scaled start and train nothing else; weights and biases of all convolution and
    linear layers, skipped ones too, are frozen. Batch norm is left free.

    Args:
        module: The network. Parameters stay the same objects; the scores are new ones that an optimiser must
            be given.
        density: Share of the weights of each layer that is kept, in (0, 1].
        skip: Names of layers to leave dense, as ``named_modules`` gives them; ``*`` stands for anything.

    Raises:
        ValueError: If ``density`` is outside (0, 1], a pattern fits no layer, or a layer's weight is all
            zero.
        RuntimeError: If a layer has a fixed mask: its scores are learned already.

    Example:
        >>> net = begin_scores(nn.Linear(8, 4), 0.25)
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['parametrizations.weight.0.scores']
    """
    check_density(density)
    chosen = prunable(module, skip)
    for name, layer in chosen.items():
        if isinstance(mask_of(layer), FixedMask):
            raise RuntimeError(f"begin_scores comes before begin_finetune, but layer {name!r} has a fixed mask")
        if not bool((layer.weight != 0).any()):  # type: ignore[union-attr]
            raise ValueError(f"layer {name!r} must have a weight that is not all zero to start scores from it")
    bare = [layer for layer in chosen.values() if mask_of(layer) is None]
    shared.register(module, [(layer, "weight", TopKMask(density)) for layer in bare])
    set_density(module, density)
    init_scores(module, "scaled")
    _set_trainable(module, False)
    train_mode(module, "scores")
    return module


def begin_finetune(module: _M) -> _M:
    """Fixes the learned masks, in place, and lets the weights that are left train.

    Scores held by a parametrization are dropped for a :class:`~netwright.nn.sparse.FixedMask` of the same
    mask; sparse layers keep theirs, frozen. The result has the structure that
    :func:`netwright.compress.prune.magnitude` gives.

    Raises:
        RuntimeError: If no layer has scores: :func:`begin_scores` comes first.

    Example:
        >>> net = begin_finetune(begin_scores(nn.Linear(8, 4), 0.25))
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['bias', 'parametrizations.weight.original']
        >>> int((net.weight != 0).sum())
        8
    """
    if not any(isinstance(mask_of(layer), Scored) for _, layer in layers(module)):
        raise RuntimeError("begin_scores comes before begin_finetune, but no layer has scores")
    train_mode(module, "weights")
    _set_trainable(module, True)
    fixed: dict[nn.Module, FixedMask] = {}  # one for all layers that share a weight
    for layer, name in masked_tensors(module):
        steps = shared.steps_of(layer, name)
        for i, step in enumerate(steps):
            if isinstance(step, TopKMask):
                if step not in fixed:
                    fixed[step] = FixedMask(step.mask()).train(layer.training)
                steps[i] = fixed[step]
    return module


def _set_trainable(module: nn.Module, wanted: bool) -> None:
    for _, layer in layers(module):
        for name, parameter in layer.named_parameters():
            if not name.endswith("scores"):
                parameter.requires_grad_(wanted)


class HydraPruner:
    """The three stages, each with the user's own training loop; the network itself tells how far it has come.

    A stage prepares the network unless it is prepared for that stage already, then trains it. So a run that
    was interrupted within a stage restores its network (:func:`begin_scores` or :func:`begin_finetune` on a
    new one, then ``load_state_dict``) and calls the same stage again; nothing learned is started anew.

    Args:
        sparsity: Share of zeros in every layer, in [0, 1).
        skip: Names of layers to leave dense; ``*`` stands for anything.

    Raises:
        ValueError: If ``sparsity`` is outside [0, 1).

    Example:
        >>> pruner, net = HydraPruner(0.75), nn.Linear(8, 4)
        >>> pruned = pruner.run(net, lambda net, stage: print(stage, int((net.weight != 0).sum())))
        pretrain 32
        prune 8
        finetune 8
    """

    def __init__(self, sparsity: float, *, skip: Sequence[str] = ()):
        self.sparsity, self.skip = check_sparsity(sparsity), tuple(skip)

    def pretrain(self, module: _M, train: Callable[[_M], Any]) -> _M:
        """Trains the dense network.

        Raises:
            RuntimeError: If the network has masks already.
        """
        self._require(module, "pretrain", "pretrain")
        train(module)
        return module

    def prune(self, module: _M, train: Callable[[_M], Any]) -> _M:
        """Learns the masks: :func:`begin_scores`, then training of the scores.

        Raises:
            RuntimeError: If the masks of the network are fixed already.
        """
        if self._require(module, "prune", "pretrain", "prune") != "prune":
            begin_scores(module, 1 - self.sparsity, self.skip)
        train(module)
        return module

    def finetune(self, module: _M, train: Callable[[_M], Any]) -> _M:
        """Trains the weights that are left: :func:`begin_finetune`, then training.

        Raises:
            RuntimeError: If the network has no masks yet.
        """
        if self._require(module, "finetune", "prune", "finetune") != "finetune":
            begin_finetune(module)
        train(module)
        return module

    def run(self, module: _M, train: Callable[[_M, Stage], Any]) -> _M:
        """All stages from the one the network is prepared for on; ``train`` is told which."""
        order: tuple[Stage, ...] = ("pretrain", "prune", "finetune")
        for name in order[order.index(stage(module)) :]:
            getattr(self, name)(module, lambda net, name=name: train(net, name))
        return module

    def _require(self, module: nn.Module, wanted: Stage, *allowed: Stage) -> Stage:
        present = stage(module)
        if present not in allowed:
            raise RuntimeError(f"{wanted} needs a network in stage {' or '.join(allowed)}, got one in stage {present}")
        return present
