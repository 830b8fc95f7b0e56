"""Nearest keys of many codebooks at once, for the discrete key-value bottleneck (arXiv:2207.11240).

    argmin_j |z - k_j|^2 = argmax_j (z - m) . (k_j - m) - |k_j - m|^2 / 2

for any point m. The mean key of the codebook is taken, so that keys far from the origin lose no digits.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCORES_LIMIT = 2**26  # scores that are held at once, on an accelerator
CACHED = 2**18  # on a CPU: a block that its cache keeps between the product and the search for the largest


@torch.no_grad()
def prepared(
    keys: Float[Tensor, "codebooks pairs dim"],
) -> tuple[Float[Tensor, "codebooks dim pairs"], Float[Tensor, "codebooks 1 pairs"], Float[Tensor, "codebooks 1 dim"]]:
    """Centred keys, transposed, minus half their squared norms, and the centres: what a lookup needs of the keys."""
    centre = keys.mean(1, keepdim=True)
    centred = keys - centre
    return centred.mT.contiguous(), centred.square().sum(2)[:, None] / -2, centre


@torch.no_grad()
def nearest_keys(
    heads: Float[Tensor, "codebooks heads dim"],
    keys: Float[Tensor, "codebooks pairs dim"] | tuple[Tensor, Tensor, Tensor],
) -> Int[Tensor, "codebooks heads"]:
    """The index of the nearest key of its codebook for every head; of equally near ones the smallest.

    Scores are made and searched block by block, so that memory does not grow with the number of codebooks or heads, and
    always in the precision of the heads.

    Args:
        heads: Projected embeddings.
        keys: The keys, or what :func:`prepared` made of them.

    Example:
        >>> nearest_keys(torch.tensor([[[4.0], [6.0], [5.0]]]), torch.tensor([[[0.0], [10.0]]]))
        tensor([[0, 1, 0]])
    """
    columns, half_norms, centre = prepared(keys) if isinstance(keys, Tensor) else keys
    codebooks, count, _ = heads.shape
    pairs = columns.shape[2]
    compiling = torch.compiler.is_compiling()
    small = heads.device.type == "cpu" and not compiling
    limit = CACHED if small else SCORES_LIMIT
    rows = max(1, min(count, limit // pairs))
    books = codebooks if compiling else max(1, min(codebooks, limit // (rows * pairs)))
    # NumPy finds the place of a maximum several times as fast as torch does on a CPU, and the first of equal ones too.
    by_numpy = small and heads.dtype in {torch.float32, torch.float64}
    found = []
    for first in range(0, codebooks, books):
        part = slice(first, first + books)
        blocks = []
        for z in heads[part].split(count if compiling else rows, dim=1):
            with torch.autocast(heads.device.type, enabled=False):
                scores = torch.baddbmm(half_norms[part], z - centre[part], columns[part])
            blocks.append(torch.from_numpy(scores.numpy().argmax(-1)) if by_numpy else scores.argmax(-1))
        found.append(torch.cat(blocks, 1))
    return torch.cat(found)
