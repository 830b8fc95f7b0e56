"""Nearest keys of many codebooks at once, for the discrete key-value bottleneck (arXiv:2207.11240).

    argmin_j |z - k_j|^2 = argmax_j (z - m) . (k_j - m) - |k_j - m|^2 / 2

for any point m. It is the key of the codebook nearest to their mean: keys far from the origin lose no digits, and where
all numbers are integers the scores are too, so that equal distances are equal scores. Equal keys have unequal rounding
errors in a product of matrices: all but the first of them get a score of minus infinity.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SCORES_LIMIT = 2**26  # scores that are held at once, on an accelerator
CACHED = 2**18  # on a CPU: a block that its cache keeps between the product and the search for the largest
HASH_BASE = 6364136223846793005  # Knuth's multiplier modulo 2^64


@torch.no_grad()
def prepared(
    keys: Float[Tensor, "codebooks pairs dim"],
) -> tuple[Float[Tensor, "codebooks dim pairs"], Float[Tensor, "codebooks 1 pairs"], Float[Tensor, "codebooks 1 dim"]]:
    """Centred keys, transposed, minus half their squared norms, and the centres: what a lookup needs of the keys.

    Of equal keys all but the first have minus infinity in place of minus half their squared norm.
    """
    limit = CACHED if keys.device.type == "cpu" else SCORES_LIMIT
    # A quarter of what a lookup holds: the integers of `repeated` are twice as wide as scores, and there are several.
    books = len(keys) if torch.compiler.is_compiling() else max(1, limit // (4 * keys[0].numel()))
    columns, half_norms, centres = zip(*map(_prepared, keys.split(books)), strict=True)
    return torch.cat(columns), torch.cat(half_norms), torch.cat(centres)


def _prepared(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    middle = (keys - keys.mean(1, keepdim=True)).square().sum(2).argmin(1)
    centre = keys.take_along_dim(middle[:, None, None], 1)
    centred = keys - centre
    half_norms = centred.square().sum(2).div(-2).masked_fill(repeated(centred), -torch.inf)
    return centred.mT.contiguous(), half_norms[:, None], centre


@torch.no_grad()
def repeated(keys: Float[Tensor, "codebooks pairs dim"]) -> Bool[Tensor, "codebooks pairs"]:
    """Which keys equal an earlier one of their codebook.

    Example:
        >>> repeated(torch.tensor([[[2.0], [3.0], [2.0], [2.0]]]))
        tensor([[False, False,  True,  True]])
    """
    found = torch.zeros_like(keys[..., 0], dtype=torch.bool)
    if torch.compiler.is_exporting():
        # ONNX has no bits of a number; frozen keys know the answer already.
        return found
    words = (keys + 0.0).view(torch.int16 if keys.element_size() == 2 else torch.int32).long()  # -0 + 0 = 0
    # Integers wrap, so that no order of summation matters: equal keys have equal hashes, which sorting puts together.
    words *= torch.full_like(words[0, 0], HASH_BASE).cumprod(0)
    hashes = words.sum(2)
    if not torch.compiler.is_compiling():
        ordered = np.sort(hashes.numpy(force=True), 1)  # several times as fast as torch on a CPU
        if not (ordered[:, 1:] == ordered[:, :-1]).any():
            return found
    order = hashes.argsort(dim=1, stable=True)
    placed = keys.take_along_dim(order[..., None], 1)
    return found.scatter_(1, order[:, 1:], (placed[:, 1:] == placed[:, :-1]).all(2))


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
