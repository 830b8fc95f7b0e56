"""What tests of searches share: small images, and equality of saved states."""

from __future__ import annotations

from typing import Any

import torch

from netwright.data.tensors import TensorImages
from netwright.seeding import stream


def images(n: int, seed: int) -> TensorImages:
    """Classes told apart by which part of the picture is bright."""
    generator = stream(seed, "images")
    y = torch.randint(3, (n,), generator=generator)
    x = 0.3 * torch.rand(n, 1, 8, 8, generator=generator)
    for label, part in enumerate([slice(0, 3), slice(3, 6), slice(6, 8)]):
        x[y == label, :, part] += 0.6
    return TensorImages(x, y)


def equal(a: Any, b: Any) -> bool:
    """Whether two nested states are the same to the bit, apart from the seconds they took."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
