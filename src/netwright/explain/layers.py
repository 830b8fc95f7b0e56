"""Which layer of a network is looked at, and how what it gives becomes a map: convolutions, channels last, tokens.

A map needs a row and a column for each place. Convolutional networks have them; networks that keep their channels last
(Swin) have them in another order; transformers have tokens, some of which stand for no place (class, registers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.nn.activations import last_convolution, logits_of
from netwright.nn.modes import in_mode

Transform = Callable[[Tensor], Tensor]
# Tokens before those of places: a class token, one for distillation, up to a dozen registers.
MOST_PREFIXES = 16


class _Ran(NamedTuple):
    """A part of a network that ran, what it was given first and what it gave."""

    part: nn.Module
    given: Any
    output: Tensor


def last_conv(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """The last 2d convolution in the order in which they run, or without an example in the order of definition.

    Args:
        model: A network.
        example: A batch of inputs to run it on.

    Raises:
        ValueError: If there is none.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten())
        >>> last_conv(net, torch.zeros(1, 1, 8, 8)) is net[2]
        True
    """
    if example is None:
        return last_convolution(model)
    with torch.no_grad():
        ran = [each.part for each in _run(model, example)[0] if isinstance(each.part, nn.Conv2d)]
    return ran[-1] if ran else last_convolution(model)


def last_places(
    model: nn.Module, example: Float[Tensor, "batch channels height width"]
) -> tuple[nn.Module, Float[Tensor, "batch channels rows columns"]]:
    """The last part of a network whose output still has places on which the answer depends.

    That is what pooling is given, in most convolutional networks behind the last activation function. Behind the last
    attention of a transformer that reads its class token alone the other tokens do not matter any more; there it is
    what this attention is given, which a gradient tells. Convolutions that give class scores (SqueezeNet) are passed
    over, since a map of features is wanted.

    Args:
        model: A network; in evaluation mode meanwhile, left as it was.
        example: Inputs as it takes them; one is enough.

    Returns:
        The part, and its output with rows and columns.

    Raises:
        ValueError: If no part has places.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> last_places(net, torch.zeros(1, 1, 8, 8))[0] is net[1]
        True
    """
    size = (example.shape[-2], example.shape[-1])
    with torch.no_grad():  # not inference mode: a network may keep what it computes, and be trained later
        events, answer = _run(model, example)
    if not isinstance(answer, Tensor) and isinstance(logits_of(answer), Tensor):
        events, answer = _before_logits(model, example)
    found = _with_places(_features(events, answer), len(example), size)
    if not found:
        raise ValueError(f"no layer of {type(model).__name__} gives a map with places: name one, with its transform")
    last = found[-1]
    if _prefixes(last.output, size):
        last = _that_matters(model, example, last, size) or last
    return last.part, with_places(last.output, size)  # type: ignore[return-value]  # found are those that have them


def _run(model: nn.Module, example: Tensor) -> tuple[list[_Ran], Any]:
    """All parts but the network itself in the order in which they ended, and the network's answer."""
    ran: list[_Ran] = []

    def keep(part: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            ran.append(_Ran(part, given[0] if given else None, output))

    with ExitStack() as stack:
        for part in model.modules():
            if part is not model:
                stack.callback(part.register_forward_hook(keep).remove)
        stack.enter_context(in_mode(model, training=False))
        return ran, model(example)


def _before_logits(model: nn.Module, example: Tensor) -> tuple[list[_Ran], Tensor]:
    """What the logits depend on, where a network gives more than these, such as a reconstruction; and the logits."""
    with torch.enable_grad():
        events, answer = _run(model, example.detach().clone().requires_grad_())
        logits = logits_of(answer)
        known = [ran for ran in events if ran.output.requires_grad]
        gradients = torch.autograd.grad(logits.sum(), [ran.output for ran in known], allow_unused=True)
    met = [ran for ran, gradient in zip(known, gradients, strict=True) if gradient is not None]
    return [ran._replace(output=ran.output.detach()) for ran in met], logits.detach()


def _features(events: list[_Ran], answer: Any) -> list[_Ran]:
    """What ran, without class scores of places and what is made of those of a final convolution."""
    head = _head(events)
    if head is None or not isinstance(answer, Tensor) or answer.ndim != 2:
        return events
    part, classes = events[head].part, answer.shape[1]
    scores = isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.out_channels == classes
    kept = events[:head] if scores else events
    return [ran for ran in kept if not (isinstance(ran.part, nn.Linear) and ran.part.out_features == classes)]


def _head(events: list[_Ran]) -> int | None:
    """Number of the last part that ran with parameters of its own."""
    return next((i for i in reversed(range(len(events))) if [*events[i].part.parameters(recurse=False)]), None)


def _with_places(events: list[_Ran], batch: int, size: tuple[int, int]) -> list[_Ran]:
    """Those with places that are not what a pooling layer gave, by itself or through a container; no placeholders."""
    pooled = {id(ran.output) for ran in events if "Pool" in type(ran.part).__name__ and ran.output is not ran.given}
    return [
        ran
        for ran in events
        if not isinstance(ran.part, (nn.Identity, nn.Dropout, nn.Dropout2d))
        and len(ran.output) == batch
        and id(ran.output) not in pooled
        and _places(with_places(ran.output, size)) > 1
    ]


def _places(features: Tensor | None) -> int:
    return 0 if features is None else features.shape[2] * features.shape[3]


def _that_matters(model: nn.Module, example: Tensor, last: _Ran, size: tuple[int, int]) -> _Ran | None:
    """The last tokens of the same width on whose places what classifies depends."""
    with torch.enable_grad():
        events, answer = _run(model, example.detach().clone().requires_grad_())
        head = _head(events)
        # What classifies is given features; its own weights may be zeros before any training.
        features = answer if head is None or not isinstance(events[head].given, Tensor) else events[head].given
        shape = last.output.shape
        # Keys and values have the same shape but are only what attention makes of its input.
        streams = [ran for ran in events if ran.output.shape == shape and not isinstance(ran.part, nn.Linear)]
        known = [ran for ran in streams if ran.output.requires_grad]
        if not known or not isinstance(features, Tensor) or not features.requires_grad:
            return None
        # The sum of what a layer norm gives is constant, a sum with unequal weights is not.
        weights = torch.linspace(0.5, 1.5, features.shape[-1]).to(features)
        gradients = torch.autograd.grad((features * weights).sum(), [ran.output for ran in known], allow_unused=True)
    first = _prefixes(last.output, size)
    for ran, gradient in zip(reversed(known), reversed(gradients), strict=True):
        if gradient is not None and bool(gradient[:, first:].any()):
            return ran._replace(output=ran.output.detach())
    return None


def with_places(output: Any, size: tuple[int, int]) -> Float[Tensor, "batch channels rows columns"] | None:
    """What a layer gave, with channels first and a row and a column for each place; None if it has none.

    (batch, C, h, w) stays; (batch, h, w, C) is turned where only that reading has the proportions of the input; of
    (batch, tokens, C) the last tokens become a grid of the input's proportions, up to 16 before them being dropped.

    Args:
        output: Of a layer.
        size: Height and width of the network's input.

    Example:
        >>> with_places(torch.zeros(2, 197, 768), (224, 224)).shape
        torch.Size([2, 768, 14, 14])
        >>> with_places(torch.zeros(2, 7, 7, 96), (224, 224)).shape
        torch.Size([2, 96, 7, 7])
    """
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4:
        _, first, second, third = output.shape
        for slack in (0, max(size)):  # sides that the strides do not divide are rounded
            if _proportional(second, third, size, slack):
                return output
            if _proportional(first, second, size, slack):
                return output.permute(0, 3, 1, 2)
        return None
    prefixes = _prefixes(output, size)
    if prefixes is None:
        return None
    rows, columns = _grid(output.shape[1] - prefixes, size) or (0, 0)
    return output[:, prefixes:].mT.unflatten(2, (rows, columns))


def _proportional(rows: int, columns: int, size: tuple[int, int], slack: int) -> bool:
    return abs(rows * size[1] - columns * size[0]) <= slack


def _prefixes(output: Tensor, size: tuple[int, int]) -> int | None:
    """How many tokens stand before those of places; None for what are no tokens of places."""
    if output.ndim != 3:
        return None
    count = output.shape[1]
    return next((n for n in range(min(MOST_PREFIXES, count - 3)) if _grid(count - n, size)), None)


def _grid(count: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of so many places in the input's proportions."""
    rows = round((count * size[0] / size[1]) ** 0.5)
    if rows < 1 or count % rows or not _proportional(rows, count // rows, size, 0):
        return None
    return rows, count // rows


def grid_of_tokens(tokens: Float[Tensor, "batch count channels"]) -> Float[Tensor, "batch channels rows columns"]:
    """Tokens of a square picture as a grid; tokens before those of the picture (class, registers) are dropped.

    Raises:
        ValueError: If there are fewer than 4 tokens or the output is not (batch, tokens, channels).

    Example:
        >>> grid_of_tokens(torch.zeros(2, 197, 768)).shape
        torch.Size([2, 768, 14, 14])
    """
    if tokens.ndim != 3 or tokens.shape[1] < 4:
        raise ValueError(f"tokens must be (batch, tokens >= 4, channels), got shape {tuple(tokens.shape)}")
    side = int(tokens.shape[1] ** 0.5)
    return tokens[:, -side * side :].mT.unflatten(2, (side, side))


def chosen(model: nn.Module, layers: Sequence[nn.Module | str] | nn.Module | str | None) -> list[nn.Module] | None:
    """The layers that are named, one or several, or None for those that are to be found.

    Raises:
        ValueError: If there is none among them.
        TypeError: If there is no layer of a name.
    """
    if layers is None:
        return None
    if isinstance(layers, str) or (isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList)):
        layers = [layers]
    if not layers:
        raise ValueError("target_layers must be at least 1, got 0")
    known = dict(model.named_modules())
    for layer in layers:
        if isinstance(layer, str) and layer not in known:
            raise TypeError(f"target_layers must name parts of the model, got {layer!r}")
    return [known[layer] if isinstance(layer, str) else layer for layer in layers]


def name_of(model: nn.Module, layer: nn.Module) -> str:
    """A layer's name in ``named_modules``, or its class where it is no part of the network.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3))
        >>> name_of(net, net[0]), name_of(net, nn.ReLU())
        ('0', 'ReLU')
    """
    return next((name for name, part in model.named_modules() if part is layer and name), type(layer).__name__)


def places_of(layer: nn.Module, output: Any, size: tuple[int, int], transform: Transform | None) -> Tensor:
    """A layer's output as (batch, C, h, w), by the transform or as :func:`with_places` reads it.

    Raises:
        ValueError: If it has no places.
    """
    if transform is not None:
        features: Any = transform(output)
    else:
        features = with_places(output, size)
        features = output if features is None else features
    if not isinstance(features, Tensor) or features.ndim != 4:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        name = type(layer).__name__
        raise ValueError(f"a layer must give (batch, C, h, w), got {shape} from {name}: give a reshape_transform")
    return features
