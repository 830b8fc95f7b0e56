"""Layers, masks and networks: pure torch, usable in anybody's training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netwright.lazy import exports

_NAMES = {
    "APPNP": "dagnn",
    "DAGNN": "dagnn",
    "DKVBClassifier": "kv_bottleneck",
    "GCN": "dagnn",
    "KeyValueBottleneck": "kv_bottleneck",
    "LSSL": "lssl",
    "LSSLBlock": "lssl",
    "LSSLModel": "lssl",
    "LeNet": "convnet",
    "LogitMean": "ensemble",
    "MBConv": "mbconv",
    "MaskedAutoencoder": "masked_autoencoder",
    "SGC": "dagnn",
    "SmallConvNet": "convnet",
    "SparseConv2d": "sparse",
    "SparseLinear": "sparse",
    "discretize_gbt": "lssl",
    "gated_propagation": "dagnn",
    "gcn_norm": "dagnn",
    "hippo": "lssl",
    "krylov": "lssl",
    "mobilenet_v2_32": "mbconv",
    "nearest_keys": "kv_bottleneck",
    "resnet18_cifar": "resnet",
    "smoothness": "dagnn",
    "ssm_kernel": "lssl",
}
_MODULES = (
    "activations",
    "batchnorm",
    "convnet",
    "copies",
    "curvature",
    "dagnn",
    "ensemble",
    "kv_bottleneck",
    "lssl",
    "masked_autoencoder",
    "mbconv",
    "modes",
    "patches",
    "pretrained",
    "resnet",
    "sparse",
)

if TYPE_CHECKING:
    from netwright.nn.convnet import LeNet, SmallConvNet
    from netwright.nn.dagnn import APPNP, DAGNN, GCN, SGC, gated_propagation, gcn_norm, smoothness
    from netwright.nn.ensemble import LogitMean
    from netwright.nn.kv_bottleneck import DKVBClassifier, KeyValueBottleneck, nearest_keys
    from netwright.nn.lssl import LSSL, LSSLBlock, LSSLModel, discretize_gbt, hippo, krylov, ssm_kernel
    from netwright.nn.masked_autoencoder import MaskedAutoencoder
    from netwright.nn.mbconv import MBConv, mobilenet_v2_32
    from netwright.nn.resnet import resnet18_cifar
    from netwright.nn.sparse import SparseConv2d, SparseLinear

__all__ = [
    "APPNP",
    "DAGNN",
    "GCN",
    "LSSL",
    "SGC",
    "DKVBClassifier",
    "KeyValueBottleneck",
    "LSSLBlock",
    "LSSLModel",
    "LeNet",
    "LogitMean",
    "MBConv",
    "MaskedAutoencoder",
    "SmallConvNet",
    "SparseConv2d",
    "SparseLinear",
    "discretize_gbt",
    "gated_propagation",
    "gcn_norm",
    "hippo",
    "krylov",
    "mobilenet_v2_32",
    "nearest_keys",
    "resnet18_cifar",
    "smoothness",
    "ssm_kernel",
]

__getattr__, __dir__ = exports(__name__, _NAMES, __all__, _MODULES)
