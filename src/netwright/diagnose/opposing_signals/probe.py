"""The examples that are watched, as tensors, and their losses without any trace in the training.

The losses are those in evaluation mode; gradients, running statistics and random generators stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from netwright.diagnose.gradients import Batched, batches
from netwright.diagnose.losses import LossFunction, example_losses
from netwright.nn.modes import in_mode

CHUNK = 1024


def as_tensors(data: Batched | Dataset[Any]) -> tuple[Tensor, Tensor]:
    """All inputs and all targets: of a pair of tensors, of a data set of pairs, or of batches of pairs.

    Raises:
        ValueError: If there is none, or they are not equally many.

    Example:
        >>> x, y = as_tensors(torch.utils.data.TensorDataset(torch.zeros(3, 2), torch.arange(3)))
        >>> x.shape, y
        (torch.Size([3, 2]), tensor([0, 1, 2]))
    """
    if isinstance(data, Dataset):
        length = len(data)  # type: ignore[arg-type]  # one without a length is no probe
        parts = [tuple(default_collate([data[place] for place in range(length)])[:2])] if length else []
    else:
        parts = list(batches(data))
    if not parts:
        raise ValueError("data must hold at least 1 example, got 0")
    x, y = (torch.cat(side) if len(parts) > 1 else side[0] for side in zip(*parts, strict=True))
    if len(x) != len(y):
        raise ValueError(f"data must hold as many inputs as targets, got {len(x)} and {len(y)}")
    # Convolutions of images take channels innermost faster on a processor.
    return x.clone(memory_format=torch.channels_last) if x.ndim == 4 else x, y


def probe_losses(model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor) -> Float[Tensor, " examples"]:
    """The loss of each example in evaluation mode.

    Raises:
        ValueError: If the loss does not give one number an example.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
        >>> probe_losses(net, nn.CrossEntropyLoss(reduction="none"), torch.zeros(4, 2), torch.zeros(4).long()).shape
        torch.Size([4])
    """
    device = next((param.device for param in model.parameters()), x.device)
    accelerators = range(torch.cuda.device_count())
    with in_mode(model, training=False), torch.no_grad(), torch.random.fork_rng(devices=accelerators):
        found = [
            example_losses(loss_fn, model(a.to(device)), b.to(device))
            for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True)
        ]
    return torch.cat(found)
