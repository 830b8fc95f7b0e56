"""Discrete key-value bottleneck: a frozen encoder, discrete keys, and values that are trained where the data lie.

Träuble, Goyal, Rahaman, Mozer, Kawaguchi, Bengio and Schölkopf, "Discrete Key-Value Bottleneck", ICML 2023,
arXiv:2207.11240. :class:`KeyValueBottleneck` is the layer, :class:`DKVBClassifier` puts it behind any frozen encoder,
:func:`fit_keys` fits the keys to unlabelled data. The callback for Lightning's ``Trainer`` is
``netwright.train.KeyInitCallback``; streams of classes and their metrics are in ``netwright.data.streams``.
"""

from netwright.nn.kv_bottleneck.bottleneck import KeyValueBottleneck
from netwright.nn.kv_bottleneck.classifier import DKVBClassifier, embeddings, fit_keys
from netwright.nn.kv_bottleneck.lookup import nearest_keys

__all__ = ["DKVBClassifier", "KeyValueBottleneck", "embeddings", "fit_keys", "nearest_keys"]
