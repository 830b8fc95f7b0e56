"""Weights of a few bits: trained with a teacher, placed by gradient descent, or rounded afterwards; packed into bytes.

Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv:1802.05668.
"""

from netwright.compress.quantize.placing import baked, post_training_quantize
from netwright.compress.quantize.quantizers import DifferentiableQuantizer, NonuniformQuantizer, UniformQuantizer
from netwright.compress.quantize.scaling import BucketScaler, nonuniform_quantize, uniform_quantize
from netwright.compress.quantize.storage import (
    SizeReport,
    TensorSize,
    compressed_size,
    huffman_code_lengths,
    pack,
    unpack,
)
from netwright.compress.quantize.training import (
    allocate_points,
    alternating_quantization,
    differentiable_quantization,
    quantized_distillation,
)

__all__ = [
    "BucketScaler",
    "DifferentiableQuantizer",
    "NonuniformQuantizer",
    "SizeReport",
    "TensorSize",
    "UniformQuantizer",
    "allocate_points",
    "alternating_quantization",
    "baked",
    "compressed_size",
    "differentiable_quantization",
    "huffman_code_lengths",
    "nonuniform_quantize",
    "pack",
    "post_training_quantize",
    "quantized_distillation",
    "uniform_quantize",
    "unpack",
]
