"""The prototype classifier of Li et al., AAAI 2018, arXiv:1710.04806."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from netwright.explain.prototypes.explanation import Explanation, NearestCases
from netwright.explain.prototypes.layer import LazyPrototypeLayer, PrototypeLayer
from netwright.nn.activations import caught
from netwright.nn.modes import in_mode


class PrototypeOutput(NamedTuple):
    """What the classifier gives for a batch.

    Attributes:
        logits: (batch, classes).
        distances: Squared distance to each prototype, (batch, prototypes).
        z: Latent vectors, (batch, dim).
        reconstruction: In the shape of the inputs; None without a decoder.
    """

    logits: Tensor
    distances: Tensor
    z: Tensor
    reconstruction: Tensor | None


class PrototypeClassifier(nn.Module):
    """Classifies by the distances of an encoding to learned cases, which a decoder shows as inputs.

    Li, Liu, Chen and Rudin, "Deep Learning for Case-Based Reasoning through Prototypes", AAAI 2018, arXiv:1710.04806.
    The squared distances are all that the linear layer sees, so what they say is what decides. They are distances and
    no similarities: a negative weight means that nearness speaks *for* a class. Weights start uniform on [0, 1), where
    nearness speaks against every class, and learn their sign.

    Parts are ``encoder``, ``decoder``, ``prototype_layer`` and ``linear``, the last without a bias. Latent vectors are
    flattened, and the decoder gets them in the shape the encoder gave. That shape is read from the first batch, or at
    once where ``input_shape`` is given; until then the prototypes have no size, as with torch's lazy modules. Shapes
    are part of the state dict.

    Args:
        encoder: Maps (batch, ...) to (batch, ...), any module.
        decoder: Maps what the encoder gives to the inputs' shape; None for a network whose prototypes cannot be shown.
        n_prototypes: How many, >= 1; with fewer than classes there is a warning.
        n_classes: How many, >= 1.
        input_shape: Shape of one input. One pass of zeros then settles every size.

    Raises:
        ValueError: If a number is below 1; in a call if the batch is empty, an encoding has another shape than before,
            or a reconstruction another shape than its input.

    Example:
        >>> from netwright.explain.prototypes import mnist_conv_decoder, mnist_conv_encoder
        >>> network = PrototypeClassifier(mnist_conv_encoder(), mnist_conv_decoder(), 15, 10, input_shape=(1, 28, 28))
        >>> output = network(torch.rand(4, 1, 28, 28))
        >>> output.logits.shape, output.distances.shape, output.z.shape, output.reconstruction.shape
        (torch.Size([4, 10]), torch.Size([4, 15]), torch.Size([4, 40]), torch.Size([4, 1, 28, 28]))
        >>> network.decode_prototypes().shape
        torch.Size([15, 1, 28, 28])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module | None,
        n_prototypes: int,
        n_classes: int,
        *,
        input_shape: Sequence[int] | None = None,
    ):
        super().__init__()
        for name, value in (("n_prototypes", n_prototypes), ("n_classes", n_classes)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if n_prototypes < n_classes:
            warnings.warn(
                f"{n_prototypes} prototypes cannot stand for {n_classes} classes: give at least one for each",
                stacklevel=2,
            )
        self.encoder, self.decoder = encoder, decoder
        self.prototype_layer: PrototypeLayer = LazyPrototypeLayer(n_prototypes)
        self.linear = nn.Linear(n_prototypes, n_classes, bias=False)
        nn.init.uniform_(self.linear.weight)
        self.input_shape: tuple[int, ...] | None = None
        self.latent_shape: tuple[int, ...] | None = None
        if input_shape is not None:
            like = next(self.encoder.parameters(), self.linear.weight)
            with in_mode(self, training=False), torch.no_grad():
                self(torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype))

    @property
    def prototypes(self) -> Float[Tensor, "prototypes dim"]:
        """The learned points."""
        return self.prototype_layer.prototypes

    def get_extra_state(self) -> Tensor:
        """Shapes of inputs and encodings as numbers: how many the first has, then both."""
        if self.input_shape is None or self.latent_shape is None:
            return torch.empty(0, dtype=torch.int64)
        return torch.tensor([len(self.input_shape), *self.input_shape, *self.latent_shape])

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the shapes of a state dict."""
        if len(state):
            count, *sizes = state.tolist()
            self.input_shape, self.latent_shape = tuple(sizes[:count]), tuple(sizes[count:])

    def encode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch dim"]:
        """Latent vectors."""
        if not len(x):
            raise ValueError("x must hold at least 1 example, got 0")
        encoded = self.encoder(x)
        if self.latent_shape is None:
            self.input_shape, self.latent_shape = tuple(x.shape[1:]), tuple(encoded.shape[1:])
        elif encoded.shape[1:] != self.latent_shape:
            raise ValueError(f"encodings must have shape {self.latent_shape}, got {tuple(encoded.shape[1:])}")
        return encoded.flatten(1)

    def decode(self, z: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch ..."]:
        """Inputs that latent vectors stand for.

        Raises:
            ValueError: If there is no decoder, or no batch was seen yet.
        """
        if self.decoder is None:
            raise ValueError("decoder must be given to decode, got None")
        if self.latent_shape is None:
            raise ValueError("the shape of an encoding is not known yet: give input_shape, or run one batch")
        return self.decoder(z.unflatten(1, self.latent_shape))

    def logits(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """The logits alone, without running the decoder."""
        return self.linear(self.prototype_layer(self.encode(x)))

    def forward(self, x: Float[Tensor, "batch ..."]) -> PrototypeOutput:
        """Logits, squared distances, latent vectors and reconstructions."""
        z = self.encode(x)
        distances = self.prototype_layer(z)
        reconstruction = None if self.decoder is None else self.decode(z)
        if reconstruction is not None and reconstruction.shape != x.shape:
            raise ValueError(f"decoder must give the input's shape {tuple(x.shape)}, got {tuple(reconstruction.shape)}")
        return PrototypeOutput(self.linear(distances), distances, z, reconstruction)

    @torch.no_grad()
    def explain(self, x: Float[Tensor, "batch ..."], *, nearest: int = 3, classes: Sequence[str] = ()) -> Explanation:
        """Why each example is classified as it is: its distances to the prototypes and what each adds to each logit.

        Args:
            x: A batch; the network is in evaluation mode meanwhile.
            nearest: Prototypes to name for each example, 1 to all.
            classes: Names of the classes; their numbers by default.

        Raises:
            ValueError: If ``nearest`` is out of range, or there is not one name a class.
        """
        weight = self.linear.weight
        if not 1 <= nearest <= self.prototype_layer.n_prototypes:
            raise ValueError(f"nearest must lie in 1..{self.prototype_layer.n_prototypes}, got {nearest}")
        if classes and len(classes) != len(weight):
            raise ValueError(f"classes must be {len(weight)} names, got {len(classes)}")
        with in_mode(self, training=False):
            distances = self.prototype_layer(self.encode(x))
        return Explanation(
            distances=distances,
            contributions=weight * distances[:, None],
            logits=self.linear(distances),
            nearest=distances.topk(nearest, largest=False).indices,
            prototype_classes=self.prototype_classes(),
            classes=tuple(classes) or tuple(map(str, range(len(weight)))),
            inputs=x,
            decoded=None if self.decoder is None else self.decode_prototypes(),
        )

    @torch.no_grad()
    def decode_prototypes(self) -> Float[Tensor, "prototypes ..."]:
        """The prototypes as inputs.

        Raises:
            ValueError: If there is no decoder, or no batch was seen yet.
        """
        with in_mode(self, training=False):
            return self.decode(self.prototypes)

    @torch.no_grad()
    def prototype_classes(self) -> Int[Tensor, " prototypes"]:
        """The class that nearness to each prototype speaks for most: where its weight is the least."""
        return self.linear.weight.argmin(0)

    @torch.no_grad()
    def nearest_training(self, loader: Iterable[Any], k: int = 1) -> NearestCases:
        """The k examples whose encodings are nearest to each prototype.

        Args:
            loader: Batches (x, labels, ...), read once; only the k best are kept in memory.
            k: How many, >= 1.

        Returns:
            Examples by their place in the loader's order, the nearest first.

        Raises:
            ValueError: If ``k`` is below 1 or the loader holds fewer than k examples.
        """
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        rows = torch.arange(self.prototype_layer.n_prototypes)[:, None].to(self.linear.weight.device)
        best: list[Tensor] = []
        seen = 0
        with in_mode(self, training=False):
            for batch in loader:
                x, labels = (part.to(rows.device) for part in batch[:2])
                z = self.encode(x)
                near, at = self.prototype_layer(z).T.topk(min(k, len(x)), largest=False)
                found = [near, seen + at, labels[at], x[at], z[at]]
                seen += len(x)
                if best:
                    found = [torch.cat(pair, 1) for pair in zip(best, found, strict=True)]
                order = found[0].topk(min(k, found[0].shape[1]), largest=False).indices
                best = [values[rows, order] for values in found]
        if seen < k:
            raise ValueError(f"loader must hold at least k = {k} examples, got {seen}")
        decoded = None if self.decoder is None else self.decode_prototypes()
        distances, places, classes, inputs, encodings = best
        return NearestCases(distances, places, classes, inputs, encodings, self.prototype_classes(), decoded)

    @torch.no_grad()
    def project(self, loader: Iterable[Any]) -> None:
        """Moves every prototype onto the nearest encoding of the data, so that it is a real case.

        Not in the paper. Weights stay, so look at the accuracy afterwards.

        Raises:
            ValueError: If the loader is empty.
        """
        self.prototypes.copy_(self.nearest_training(loader).encodings[:, 0])


def find_prototypes(model: nn.Module) -> PrototypeClassifier | None:
    """The prototype classifier that a network is or holds; None if there is none.

    Example:
        >>> find_prototypes(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))) is None
        True
    """
    return next((part for part in model.modules() if isinstance(part, PrototypeClassifier)), None)


@torch.no_grad()
def explain_by_prototypes(
    model: nn.Module, x: Float[Tensor, "batch ..."], *, nearest: int = 3, classes: Sequence[str] = ()
) -> Explanation:
    """The nearest prototypes of each input of a network that holds a prototype classifier.

    Inputs are given as the whole network takes them; what lies before the classifier, such as a normalisation, is run.

    Args:
        model: A :class:`PrototypeClassifier` or a network that holds one; in evaluation mode meanwhile.
        x: A batch.
        nearest: Prototypes to name for each example, 1 to all.
        classes: Names of the classes; their numbers by default.

    Raises:
        ValueError: If there is no prototype classifier, or as :meth:`PrototypeClassifier.explain`.

    Example:
        >>> whole = nn.Sequential(nn.Flatten(), PrototypeClassifier(nn.Identity(), None, 3, 2, input_shape=(4,)))
        >>> explain_by_prototypes(whole, torch.rand(5, 1, 2, 2)).nearest.shape
        torch.Size([5, 3])
    """
    found = find_prototypes(model)
    if found is None:
        raise ValueError(f"model must hold a PrototypeClassifier, got {type(model).__name__} without one")
    # The encoder always runs, whether the logits alone are asked for or everything.
    with in_mode(model, training=False), caught(found.encoder, inputs=True) as seen:
        model(x)
    return found.explain(seen[-1], nearest=nearest, classes=classes)
