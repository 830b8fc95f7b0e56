"""A classifier of a frozen encoder and a discrete key-value bottleneck (arXiv:2207.11240), and how its keys are fitted.

Phase 0 fits the keys to unlabelled inputs, phase 1 trains the values, class by class if need be::

    fit_keys(classifier.bottleneck, encoder, unlabelled)
    classifier.bottleneck.freeze_keys()
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from netwright.console import warn
from netwright.nn.activations import caught
from netwright.nn.kv_bottleneck.bottleneck import KeyValueBottleneck
from netwright.nn.modes import in_mode
from netwright.results import History

COLLAPSED = 0.05  # share of the keys that the perplexity should exceed
FIRST_EMBEDDINGS = 4  # embeddings a key from which the keys start


@torch.no_grad()
def embeddings(encoder: nn.Module, x: Tensor, layer: str | None = None) -> Float[Tensor, "batch *positions numbers"]:
    """What an encoder makes of a batch, as the bottleneck takes it, without gradient and in evaluation mode.

    Args:
        encoder: Any network.
        x: Its input.
        layer: The submodule whose output is taken, ``"layer3"`` say; by default the network's own.

    Returns:
        (batch, m) or (batch, positions, m); a map (batch, m, rows, columns) becomes positions.

    Raises:
        ValueError: If the output is none of these, or the layer is not there or does not run.

    Example:
        >>> embeddings(nn.Conv2d(3, 8, 2), torch.rand(4, 3, 5, 5)).shape
        torch.Size([4, 16, 8])
    """
    with in_mode(encoder, training=False):
        if layer is None:
            found = encoder(x)
        else:
            try:
                part = encoder.get_submodule(layer)
            except AttributeError as error:
                raise ValueError(f"layer must name a part of the encoder, got {layer!r}") from error
            with caught(part) as seen:
                encoder(x)
            if not seen:
                raise ValueError(f"layer must run in the encoder, got {layer!r}, which did not")
            found = seen[-1]
    if not isinstance(found, Tensor) or found.ndim not in {2, 3, 4}:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"encoder must give (batch, m), (batch, positions, m) or (batch, m, rows, columns), got {shape}"
        )
    return found.flatten(2).transpose(1, 2) if found.ndim == 4 else found


class DKVBClassifier(nn.Module):
    """A frozen encoder, a bottleneck, and a decoder of what it fetches; without one the mean value is the logits.

    The encoder is in evaluation mode whatever :meth:`train` says, and its parameters ask for no gradient any more. A
    decoder with parameters forgets like any other layer: train it in a first phase, then :meth:`freeze_decoder`.

    Args:
        encoder: Any network; see :func:`embeddings`.
        bottleneck: Whose ``in_dim`` is the length of an embedding.
        decoder: Gets (batch, value_dim), or (batch, C * value_dim) of a bottleneck with ``pool=None``.
        layer: The submodule of the encoder whose output is the embedding.

    Raises:
        ValueError: If there is no decoder and the bottleneck keeps its codebooks apart (``pool=None``).

    Example:
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 8))
        >>> model = DKVBClassifier(encoder, KeyValueBottleneck(8, num_pairs=4, num_codebooks=2, value_dim=3))
        >>> images = torch.rand(20, 1, 4, 4)
        >>> _ = fit_keys(model.bottleneck, encoder, [images], epochs=2)
        >>> model.bottleneck.freeze_keys()
        >>> model(images).shape, [name for name, p in model.named_parameters() if p.requires_grad]
        (torch.Size([20, 3]), ['bottleneck.values'])
    """

    decoder_frozen: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        bottleneck: KeyValueBottleneck,
        decoder: nn.Module | None = None,
        *,
        layer: str | None = None,
    ):
        super().__init__()
        if decoder is None and bottleneck.pool is None:
            raise ValueError("decoder must be given for a bottleneck with pool=None: its values are no logits")
        self.encoder, self.bottleneck, self.layer = encoder.requires_grad_(False), bottleneck, layer
        self.decoder = decoder
        self.register_buffer("decoder_frozen", None if decoder is None else torch.tensor(0, dtype=torch.uint8))
        self.train(self.training)

    def train(self, mode: bool = True) -> DKVBClassifier:
        """Sets the mode; the encoder, and a decoder that was frozen, stay in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        if self.decoder is not None and not any(p.requires_grad for p in self.decoder.parameters()):
            self.decoder.eval()
        return self

    def freeze_decoder(self) -> None:
        """Fixes the decoder, which is then in evaluation mode, for good, also in a state dict.

        Raises:
            RuntimeError: If there is none.
        """
        if self.decoder is None:
            raise RuntimeError("there is no decoder to freeze: the values themselves are the logits")
        self.decoder_frozen = torch.tensor(1, dtype=torch.uint8, device=self.bottleneck.values.device)
        self.decoder.requires_grad_(False).eval()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **named: Any) -> None:
        own = self.decoder_frozen
        frozen = own is not None and not own.is_meta and bool(own)
        if own is not None:  # files of earlier versions say nothing of it
            state_dict.setdefault(f"{prefix}decoder_frozen", torch.zeros_like(own, device="cpu"))
        super()._load_from_state_dict(state_dict, prefix, *arguments, **named)
        if self.decoder_frozen is not None and (frozen or bool(self.decoder_frozen)):
            self.freeze_decoder()

    def encode(self, x: Tensor) -> Int[Tensor, "batch *positions codebooks"]:
        """Codes of inputs, in the smallest type that holds them."""
        codes = self.bottleneck.encode(embeddings(self.encoder, x, self.layer))
        return codes.to(self.bottleneck.code_dtype)

    def decode(self, codes: Int[Tensor, "batch *positions codebooks"]) -> Float[Tensor, "batch classes"]:
        """Logits of codes."""
        fetched = self.bottleneck.fetch(codes)
        return fetched if self.decoder is None else self.decoder(fetched.flatten(1))

    def forward(self, x: Tensor) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.decode(self.bottleneck.encode(embeddings(self.encoder, x, self.layer)))

    def codes(self, loader: Iterable[Any]) -> tuple[Int[Tensor, "examples *positions codebooks"], Tensor]:
        """Codes and labels of a whole data set, in the order of a loader that must not shuffle.

        Keys and encoder are fixed, so training on ``decode(codes[index])`` gives what training on inputs gives.

        Args:
            loader: Batches (inputs, labels, ...).

        Raises:
            ValueError: If the loader is empty.

        Example:
            >>> bottleneck = KeyValueBottleneck(4, num_pairs=4, num_codebooks=2)
            >>> bottleneck.init_keys(torch.rand(9, 4))
            >>> codes, labels = DKVBClassifier(nn.Identity(), bottleneck).codes([(torch.rand(9, 4), torch.arange(9))])
            >>> codes.shape, codes.dtype
            (torch.Size([9, 2]), torch.int16)
        """
        device = self.bottleneck.values.device
        found = [(self.encode(x.to(device)).cpu(), y) for x, y, *_ in loader]
        if not found:
            raise ValueError("loader must hold at least 1 batch, got 0")
        return torch.cat([codes for codes, _ in found]), torch.cat([labels for _, labels in found])


def fit_keys(
    bottleneck: KeyValueBottleneck,
    encoder: nn.Module,
    loader: Iterable[Any],
    epochs: int = 10,
    *,
    layer: str | None = None,
    generator: Generator | None = None,
) -> History:
    """Fits the keys to unlabelled data, in place; they are not frozen by it.

    Keys without places start from the first batches, four embeddings a key if there are as many. Tell what the keys
    will see: those fitted to a few classes alone leave few cells to the others.

    Args:
        bottleneck: Whose keys are moved.
        encoder: As for :func:`embeddings`; ``nn.Identity()`` where the batches are embeddings already.
        loader: Batches of inputs, or tuples that begin with them; read once an epoch. Its ``set_epoch`` is called if
            there is one.
        epochs: Passes, >= 1.
        layer: As for :func:`embeddings`.
        generator: Of all that is random, on the CPU; the global one by default.

    Returns:
        For each epoch ``squared_distance``, the mean over heads to their nearest key, and ``perplexity``, the mean over
        codebooks.

    Raises:
        RuntimeError: If the keys are frozen.
        ValueError: If ``epochs`` is below 1 or a pass has no batch.

    Example:
        >>> layer = KeyValueBottleneck(8, num_pairs=4, num_codebooks=2)
        >>> history = fit_keys(layer, nn.Identity(), [torch.rand(40, 8)], epochs=3)
        >>> sorted(history.last), layer.keys_frozen
        (['perplexity', 'squared_distance'], False)
    """
    if epochs < 1:
        raise ValueError(f"epochs must be >= 1, got {epochs}")
    if bottleneck.keys_frozen:
        raise RuntimeError("the keys are frozen: they cannot be changed any more")
    device = bottleneck.values.device

    def passing(epoch: int) -> Iterable[Tensor]:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        for batch in loader:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            yield embeddings(encoder, x.to(device), layer)

    if not bottleneck.keys_initialised:
        first: list[Tensor] = []
        for z in passing(0):
            first.append(z.flatten(0, -2))
            if sum(map(len, first)) >= FIRST_EMBEDDINGS * bottleneck.num_pairs:
                break
        if first:
            bottleneck.init_keys(torch.cat(first), generator)
    figures: list[dict[str, float]] = []
    for epoch in range(epochs):
        distances = [bottleneck.update_keys(z, generator) for z in passing(epoch)]
        if not distances:
            raise ValueError(f"loader must hold at least 1 batch, got 0 in pass {epoch + 1}")
        distance, perplexity = float(torch.stack(distances).mean()), float(bottleneck.perplexity().mean())
        figures.append({"squared_distance": distance, "perplexity": perplexity})
    if figures[-1]["perplexity"] < COLLAPSED * bottleneck.num_pairs:
        warn(
            f"the keys have collapsed: on average {figures[-1]['perplexity']:.1f} of {bottleneck.num_pairs} are used; "
            "more varied data, a smaller key_dim or a larger dead_threshold helps"
        )
    return History(tuple(figures))
