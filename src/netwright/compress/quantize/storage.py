"""Quantised networks as bytes: the number of each weight's level in as many bits as it takes.

Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv:1802.05668. N
weights of b bits in buckets of k, with spans and minima of f = 32 bits:

    N b + 2 f N / k bits,    a k f / (k b + 2 f)-th of N f;    learned points are f bits each

With a Huffman code (Huffman, "A method for the construction of minimum-redundancy codes", Proceedings of the IRE,
1952, doi:10.1109/JRPROC.1952.273898) b becomes the mean length of a code word. A packed file is safetensors. Of a
quantised tensor it holds ``NAME#codes`` (bits, most significant first), ``NAME#scale`` (spans, minima) and, with
learned points, ``NAME#points``; of a pruned one the shortest of ``NAME#kept`` (a bit for each weight), ``NAME#gaps``
(zeros before each weight) and ``NAME#zeros`` (their places), with ``NAME#values`` where it is not quantised. Other
tensors are as they were, bfloat16 as 16-bit integers of the same bits. Shapes, bits and types that NumPy does not know
stand in its header, and which names share a tensor: it is there once.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from netwright.compress.quantize.placing import baked, kept_weights, quantizers, received
from netwright.compress.quantize.quantizers import Quantizer, UniformQuantizer
from netwright.compress.quantize.scaling import MOST_BITS, BucketScaler
from netwright.console import UserError, table
from netwright.deploy.stored import filled, gaps_of
from netwright.results import Result

FORMAT, VERSION = "netwright packed weights", 1
FLOAT_BITS = 32
_M = TypeVar("_M", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class TensorSize(Result):
    """What one tensor takes.

    Attributes:
        weights: Its numbers, zeros of pruning included.
        levels: Levels that its weights can have; 0 for one that is not quantised.
        bits: All that is stored of it.
        code_bits: Bits of a code: fixed, or the mean length of a Huffman code; 32 for one that is not quantised.
    """

    weights: int
    levels: int
    bits: float
    code_bits: float


@dataclasses.dataclass(frozen=True)
class SizeReport(Result):
    """What a network takes, in theory; ``len(pack(model))`` measures it.

    Attributes:
        bits: All of it.
        full_bits: With 32 bits a number.
        ratio: The second over the first.
        tensors: Each by name, as in the plain network's ``state_dict``; one that layers share by its first name.
    """

    bits: float
    full_bits: int
    ratio: float
    tensors: Mapping[str, TensorSize]

    def __str__(self) -> str:
        rows = [
            [n, t.weights, t.levels or "", f"{t.code_bits:.2f}", round(t.bits / 8)] for n, t in self.tensors.items()
        ]
        rows.append(["all", sum(t.weights for t in self.tensors.values()), "", "", round(self.bits / 8)])
        return table(rows, ["tensor", "numbers", "levels", "bits a code", "bytes"]) + f"\nratio {self.ratio:.2f}"


def huffman_code_lengths(counts: Mapping[Any, int]) -> dict[Any, int]:
    """The length of each symbol's word in a Huffman code; symbols that never occur have none.

    Args:
        counts: How often each symbol occurs.

    Raises:
        ValueError: If a count is negative, or none is positive.

    Example:
        >>> huffman_code_lengths({"a": 5, "b": 2, "c": 1, "d": 1})
        {'a': 1, 'b': 2, 'c': 3, 'd': 3}
    """
    if any(count < 0 for count in counts.values()) or not any(counts.values()):
        raise ValueError(f"counts must be >= 0 and not all zero, got {dict(counts)}")
    lengths = {symbol: 0 for symbol, count in counts.items() if count > 0}
    heap = [(counts[symbol], i, [symbol]) for i, symbol in enumerate(lengths)]
    if len(heap) == 1:
        return dict.fromkeys(lengths, 1)
    heapq.heapify(heap)
    serial = len(heap)
    while len(heap) > 1:
        (a, _, first), (b, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in (merged := first + second):
            lengths[symbol] += 1
        heapq.heappush(heap, (a + b, serial, merged))
        serial += 1
    return lengths


def compressed_size(model: nn.Module, huffman: bool = True) -> SizeReport:
    """What a quantised network takes, computed.

    Args:
        model: A network with quantisers; what is not quantised counts 32 bits a number.
        huffman: Whether codes are of variable length, which :func:`pack` does not do.

    Example:
        >>> from netwright.compress.quantize import post_training_quantize
        >>> net = post_training_quantize(nn.Linear(1024, 64, bias=False), 4)
        >>> round(compressed_size(net, huffman=False).ratio, 4)
        7.5294
    """
    state, coded, _ = _state(model)
    tensors: dict[str, TensorSize] = {}
    for name, tensor in state.items():
        if name not in coded:
            kept = _sparse(tensor)
            whole = tensor.nbytes * 8 if kept is None else int(kept.sum()) * FLOAT_BITS + _place_bits(kept)
            tensors[name] = TensorSize(tensor.numel(), 0, whole, FLOAT_BITS)
            continue
        quantizer, weight = coded[name]
        codes, alpha, _ = quantizer.codes(weight)
        flat = codes.flatten()[: quantizer.taking_part(weight).numel()]
        levels = len(quantizer.levels())
        width = float(_width(levels))
        if huffman and len(flat):
            counts = torch.bincount(flat.cpu(), minlength=levels).tolist()
            lengths = huffman_code_lengths(dict(enumerate(counts)))
            width = sum(counts[symbol] * length for symbol, length in lengths.items()) / len(flat)
        scale_bits = 8 * alpha.element_size()
        learned = 0 if isinstance(quantizer, UniformQuantizer) else levels * scale_bits
        places = 0 if quantizer.kept is None else _place_bits(quantizer.kept)
        bits = len(flat) * width + 2 * scale_bits * alpha.numel() + learned + places
        tensors[name] = TensorSize(weight.numel(), levels, bits, width)
    bits = sum(tensor.bits for tensor in tensors.values())
    full = sum(tensor.numel() * FLOAT_BITS for tensor in state.values())
    return SizeReport(bits, full, full / bits, tensors)


def _width(levels: int) -> int:
    return max(1, math.ceil(math.log2(levels)))


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, tuple[Quantizer, Tensor]], dict[str, str]]:
    """The plain network's state without what is in it twice; of each quantised tensor its quantiser and what that gets,
    unless the layer computes with something else than it gives; and of each further name the first of the same tensor.
    """
    coded = {}
    for name, layer, own, quantizer in quantizers(model):
        weight = received(layer, own, quantizer)
        if weight is not None:
            coded[name] = (quantizer, weight)
    whole = baked(model).state_dict(keep_vars=True)
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(tensor), name) for name, tensor in whole.items()}
    state = {name: tensor.detach() for name, tensor in whole.items() if same[name] == name}
    return state, coded, {name: other for name, other in same.items() if name != other}


def _array(tensor: Tensor) -> tuple[np.ndarray, str | None]:
    """A tensor as an array; of a type that NumPy lacks its bits, with torch's name of the type."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy(), "bfloat16"
    return tensor.numpy(), None


def _tensor(array: np.ndarray, kind: str | None) -> Tensor:
    return torch.from_numpy(array) if kind is None else torch.from_numpy(array).view(getattr(torch, kind))


def _places(kept: Tensor) -> dict[str, np.ndarray]:
    """Where the weights are, in the shortest of three forms."""
    flat = kept.flatten().cpu().numpy()
    forms = {"kept": np.packbits(flat), "gaps": gaps_of(flat), "zeros": np.flatnonzero(~flat).astype(np.uint32)}
    best = min(forms, key=lambda name: forms[name].nbytes)
    return {best: forms[best]}


def _place_bits(kept: Tensor) -> int:
    return sum(places.nbytes for places in _places(kept).values()) * 8


def _sparse(tensor: Tensor) -> Tensor | None:
    """Where a pruned weight of float32 is not zero, if that is the shorter way to store it."""
    kept = kept_weights(tensor) if tensor.ndim >= 2 and tensor.dtype == torch.float32 else None
    if kept is None or int(kept.sum()) * FLOAT_BITS + _place_bits(kept) >= tensor.nbytes * 8:
        return None
    return kept


def _packed_bits(codes: np.ndarray, width: int) -> np.ndarray:
    """Numbers as bits, the most significant first."""
    bits = (codes[:, None] >> np.arange(width - 1, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8))


def _unpacked_bits(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    bits = np.unpackbits(packed, count=count * width).reshape(count, width)
    return bits.astype(np.int64) @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64))


def pack(model: nn.Module, metadata: Mapping[str, str] | None = None) -> bytes:
    """A network as bytes, each quantised tensor in as many bits as its levels need, a pruned one without its zeros.

    Args:
        model: A network with quantisers (of :func:`post_training_quantize`, :func:`quantized_distillation` and so on).
            Tensors that are not quantised are stored in full precision.
        metadata: More texts to keep in the header.

    Returns:
        A safetensors file; :func:`unpack` reads it. Equal networks give equal bytes.

    Example:
        >>> from netwright.compress.quantize import post_training_quantize
        >>> net = nn.Linear(1024, 64)
        >>> len(pack(net)) / len(pack(post_training_quantize(net, 4))) > 7
        True
    """
    from safetensors.numpy import save

    state, coded, same = _state(model)
    tensors: dict[str, np.ndarray] = {}
    described: dict[str, Any] = {}
    kinds: dict[str, str] = {}

    def store(name: str, tensor: Tensor) -> None:
        tensors[name], kind = _array(tensor)
        if kind is not None:
            kinds[name] = kind

    for name, tensor in state.items():
        if name not in coded:
            kept = _sparse(tensor)
            if kept is None:
                store(name, tensor)
                continue
            store(f"{name}#values", tensor[kept])
            tensors |= {f"{name}#{form}": places for form, places in _places(kept).items()}
            described[name] = {"shape": list(tensor.shape), "count": int(kept.sum())}
            continue
        quantizer, weight = coded[name]
        codes, alpha, beta = quantizer.codes(weight)
        count = quantizer.taking_part(weight).numel()
        levels = quantizer.levels()
        width = _width(len(levels))
        tensors[f"{name}#codes"] = _packed_bits(codes.flatten()[:count].cpu().numpy(), width)
        store(f"{name}#scale", torch.cat([alpha, beta], 1))
        if not isinstance(quantizer, UniformQuantizer):
            store(f"{name}#points", levels)
        if quantizer.kept is not None:
            tensors |= {f"{name}#{form}": places for form, places in _places(quantizer.kept).items()}
        described[name] = {
            "shape": list(tensor.shape),
            "bits": width,
            "bucket_size": quantizer.scaler.bucket_size,
            "count": count,
        }
    header = {"format": FORMAT, "version": VERSION, "tensors": described, "metadata": dict(metadata or {})}
    header |= {name: told for name, told in (("kinds", kinds), ("same", same)) if told}
    # Under one name: safetensors writes several in an order that differs from call to call.
    return save(tensors, {"netwright": json.dumps(header)})


def unpack(blob: bytes, model: _M) -> _M:
    """A plain copy of a network with the weights of a packed one, bit for bit what that computed with.

    Args:
        blob: From :func:`pack`.
        model: A network of the same architecture, plain or quantised; it is not changed.

    Raises:
        UserError: If the bytes are damaged, or do not fit the network.

    Example:
        >>> from netwright.compress.quantize import post_training_quantize
        >>> net = post_training_quantize(nn.Linear(64, 8), 3)
        >>> torch.equal(unpack(pack(net), nn.Linear(64, 8)).weight, net.weight)
        True
    """
    from safetensors.numpy import load

    cure = "pack it again"
    try:
        header = _header(blob)
        if header["format"] != FORMAT or header["version"] != VERSION:
            raise UserError(f"not {FORMAT} of version {VERSION}", cure=cure)
        tensors = load(blob)
        kinds = header.get("kinds", {})
        state = {name: _tensor(array, kinds.get(name)) for name, array in tensors.items() if "#" not in name}
        state |= {name: _decoded(name, told, tensors, kinds) for name, told in header["tensors"].items()}
        state |= {name: state[other] for name, other in header.get("same", {}).items()}
    except UserError:
        raise
    except Exception as error:  # damaged bytes make the parser and NumPy raise anything
        raise UserError(f"damaged packed weights: {error}", cure=cure) from error
    plain = baked(model)
    try:
        plain.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the weights do not fit the network: {str(error).splitlines()[-1].strip()}") from error
    return plain


def packed_metadata(blob: bytes) -> dict[str, str]:
    """The texts that :func:`pack` was given to keep; damaged bytes raise anything."""
    return _header(blob)["metadata"]


def _header(blob: bytes) -> dict[str, Any]:
    length = int.from_bytes(blob[:8], "little")
    return json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["netwright"])


def _decoded(name: str, told: dict[str, Any], tensors: dict[str, np.ndarray], kinds: dict[str, str]) -> Tensor:
    shape, count = tuple(told["shape"]), told["count"]
    numel = math.prod(shape)
    if f"{name}#values" in tensors:
        kind = kinds.get(f"{name}#values")
        return _tensor(_spread(name, tensors[f"{name}#values"], tensors, numel), kind).view(shape)
    width = told["bits"]
    if not 1 <= width <= MOST_BITS or not 0 <= count <= numel:
        raise ValueError(f"{name}: {count} codes of {width} bits for {numel} weights")
    packed = tensors[f"{name}#codes"]
    if packed.dtype != np.uint8 or packed.shape != (-(-count * width // 8),):
        raise ValueError(f"{name}: {packed.dtype} of {packed.shape} for {count} codes of {width} bits")
    codes = torch.from_numpy(_unpacked_bits(packed, width, count))
    scale = _tensor(tensors[f"{name}#scale"], kinds.get(f"{name}#scale"))
    scaler = BucketScaler(told["bucket_size"])
    if tuple(scale.shape) != (scaler.shape(count)[0], 2):
        raise ValueError(f"{name}: {tuple(scale.shape)} scales for {count} weights")
    rows = scaler.buckets(codes)
    if f"{name}#points" in tensors:
        points = _tensor(tensors[f"{name}#points"], kinds.get(f"{name}#points"))
        u = points.to(scale.dtype)[rows]
    else:
        u = rows.to(scale.dtype) / (2**width - 1)  # in the type of the weights, as the quantiser does
    values, kind = _array(scaler.unscale(u, scale[:, :1], scale[:, 1:], (count,)))
    return _tensor(_spread(name, values, tensors, numel), kind).view(shape)


def _spread(name: str, values: np.ndarray, tensors: dict[str, np.ndarray], numel: int) -> np.ndarray:
    """Values at their places, with zeros between them."""
    if f"{name}#kept" in tensors or f"{name}#zeros" in tensors:
        if f"{name}#kept" in tensors:
            kept = np.unpackbits(tensors[f"{name}#kept"], count=numel).astype(bool)
        else:
            kept = np.ones(numel, bool)
            kept[tensors[f"{name}#zeros"]] = False
        flat = np.zeros(numel, values.dtype)
        flat[kept] = values
        return flat
    if f"{name}#gaps" in tensors:
        return filled(name, values, tensors[f"{name}#gaps"], numel)
    return values
