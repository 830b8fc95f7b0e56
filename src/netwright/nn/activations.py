"""What goes on inside a network: activations caught by hooks that clean up, and the maps that are made from them.

Grad-CAM++ weighs each channel k of a layer's activations A by how much more of it would raise the score y of a class,

    w_k = sum_ij alpha_ij^k relu(g_ij^k),   alpha_ij^k = g^2 / (2 g^2 + g^3 sum_ab A_ab^k),   map = relu(sum_k w_k A^k)

with g = dy/dA (Chattopadhay et al., "Grad-CAM++", WACV 2018, arXiv:1710.11063). Grad-CAM takes the mean of g for w_k
(Selvaraju et al., ICCV 2017, arXiv:1610.02391).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from netwright.checks import one_of
from netwright.nn.batchnorm import frozen_statistics
from netwright.nn.modes import in_mode

CamMethod = Literal["gradcam", "gradcam++"]


@contextmanager
def caught(layer: nn.Module, *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """Keeps what a layer gives (or gets) in every forward pass inside the block, with its gradient history.

    Args:
        layer: Any part of a network.
        inputs: Keep its first input in place of its output.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> with caught(net[1], inputs=True) as seen:
        ...     _ = net(torch.ones(3, 2, 2))
        >>> seen[0].shape, len(net[1]._forward_hooks)
        (torch.Size([3, 4]), 0)
    """
    seen: list[Tensor] = []

    def keep(part: nn.Module, given: Any, output: Any) -> None:
        seen.append(given[0] if inputs else output)

    handle = layer.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def last_linear(model: nn.Module) -> nn.Linear:
    """The last linear layer in module order: what classifies, in most networks.

    Raises:
        ValueError: If there is none.

    Example:
        >>> last_linear(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))).out_features
        2
    """
    found = [part for part in model.modules() if isinstance(part, nn.Linear)]
    if not found:
        raise ValueError(f"model must hold a linear layer, got {type(model).__name__} without one: name the layer")
    return found[-1]


def without_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Takes the last linear layer away in place, so that the model gives that layer's inputs: its features.

    Returns:
        The name of the layer, under which ``model.set_submodule(name, layer)`` puts another one, and the layer.

    Raises:
        ValueError: If there is no linear layer, or the model is one itself.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> name, head = without_head(net)
        >>> name, head.out_features, net(torch.ones(1, 2, 2)).shape
        ('3', 2, torch.Size([1, 3]))
    """
    head = last_linear(model)
    if head is model:
        raise ValueError("model must hold a linear layer, got one that is nothing else")
    name = next(name for name, part in model.named_modules() if part is head)
    model.set_submodule(name, nn.Identity())
    return name, head


def last_convolution(model: nn.Module) -> nn.Conv2d:
    """The last 2d convolution in module order, whose map is the most abstract that still has places.

    Raises:
        ValueError: If there is none.

    Example:
        >>> last_convolution(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.ReLU())).out_channels
        8
    """
    found = [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    if not found:
        raise ValueError(f"model must hold a 2d convolution, got {type(model).__name__} without one: name the layer")
    return found[-1]


def class_map(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    target: Int[Tensor, "batch"] | int | None = None,
    *,
    layer: nn.Module | None = None,
    method: CamMethod = "gradcam++",
) -> Float[Tensor, "batch rows columns"]:
    """How much each place of the picture speaks for a class, at the resolution of a layer.

    Args:
        model: Gives logits (batch, classes); in evaluation mode meanwhile, left as it was.
        images: As the model takes them.
        target: The class of each image; the predicted one by default.
        layer: Whose output is looked at, (batch, channels, rows, columns); the last convolution by default.
        method: ``"gradcam"`` or ``"gradcam++"``.

    Returns:
        Numbers >= 0, not normalised, on the device of the images.

    Raises:
        ValueError: If ``method`` is unknown, there is no convolution, or the layer's output has no places.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> class_map(net, torch.rand(3, 1, 6, 6)).shape
        torch.Size([3, 4, 4])
    """
    layer = last_convolution(model) if layer is None else layer
    (found,), _ = class_maps(model, images, target, layers=[layer], method=method)
    return found


def logits_of(output: Any) -> Any:
    """What a network answered: its output, or the attribute ``logits`` of an output that holds several things."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


class LogitsOnly(nn.Module):
    """A network of whose answer only the logits are given on: see :func:`logits_only`.

    Args:
        model: Gives an output with an attribute ``logits``.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = logits_of(self.model(x))
        return logits


def logits_only(model: nn.Module, example: Tensor) -> nn.Module:
    """The network itself where it gives a tensor; around one that gives more, a module that gives its logits alone.

    Args:
        model: A network; in evaluation mode meanwhile, left as it was.
        example: Inputs as it takes them; one is enough.

    Raises:
        TypeError: If its answer is neither a tensor nor has a tensor ``logits``.

    Example:
        >>> from netwright.explain.prototypes import PrototypeClassifier
        >>> cases = PrototypeClassifier(nn.Identity(), None, 3, 2, input_shape=(4,))
        >>> logits_only(cases, torch.zeros(1, 4))(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
        >>> plain = nn.Linear(4, 2)
        >>> logits_only(plain, torch.zeros(1, 4)) is plain
        True
    """
    with in_mode(model, training=False), torch.no_grad():
        answer = model(example)
    if isinstance(answer, Tensor):
        return model
    if not isinstance(logits_of(answer), Tensor):
        kind = type(answer).__name__
        raise TypeError(f"model must give logits, or an output that has them as its attribute logits, got a {kind}")
    return LogitsOnly(model)


def _classes(target: Tensor | int, logits: Tensor) -> Tensor:
    """A class for each row; one for all where there is a single one."""
    found = torch.as_tensor(target, device=logits.device)
    if found.ndim == 0:
        found = found.expand(len(logits))
    if found.shape != (len(logits),) or found.is_floating_point() or found.dtype == torch.bool:
        shape = tuple(found.shape)
        raise ValueError(f"target must be {len(logits)} classes, one an image, got shape {shape} of {found.dtype}")
    wrong = found[(found < 0) | (found >= logits.shape[1])]
    if len(wrong):
        raise ValueError(f"target must lie in 0..{logits.shape[1] - 1}, got {int(wrong[0])}")
    return found.long()


def class_maps(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    target: Int[Tensor, "batch"] | int | None = None,
    *,
    layers: Sequence[nn.Module],
    method: CamMethod = "gradcam++",
    transform: Callable[[nn.Module, Any], Tensor] | None = None,
) -> tuple[list[Float[Tensor, "batch rows columns"]], Float[Tensor, "batch classes"]]:
    """:func:`class_map` of several layers from one forward and one backward pass, and the logits.

    Args:
        model: As for :func:`class_map`.
        images: Likewise.
        target: Likewise.
        layers: Whose outputs are looked at.
        method: Likewise.
        transform: Turns a layer's output into (batch, channels, rows, columns), being given the layer and the output.

    Raises:
        ValueError: If ``method`` is unknown, images are no floating-point numbers, the network gives no (batch,
            classes), a layer does not run or its output has no places, or no gradient reaches it.
    """
    one_of("method", method, get_args(CamMethod))
    if not images.is_floating_point():
        raise ValueError(f"images must be floating-point numbers, for their gradient, got {images.dtype}")
    # Images ask for their gradient, so that the layer has one even where every parameter is frozen.
    with in_mode(model, training=False), frozen_statistics(model), torch.enable_grad(), ExitStack() as stack:
        seen = [stack.enter_context(caught(layer)) for layer in layers]
        logits = logits_of(model(images.detach().requires_grad_()))
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must give logits (batch, classes), got {shape}")
        chosen = logits.argmax(1) if target is None else _classes(target, logits)
        features = []
        for layer, outputs in zip(layers, seen, strict=True):
            name = type(layer).__name__
            if not outputs:
                raise ValueError(f"layers must run, got {name}, which was never called")
            output: Any = outputs[-1]
            places = output if transform is None else transform(layer, output)
            if not isinstance(output, Tensor) or places.ndim != 4:
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(f"layer must give (batch, channels, rows, columns), got {shape} from {name}")
            features.append((output, places))
        score = logits.gather(1, chosen[:, None]).sum()
        wanted = [output for output, _ in features]
        if not all(output.requires_grad for output in wanted):
            raise ValueError("layer must lie between the images and the logits, got one that no gradient reaches")
        gradients = torch.autograd.grad(score, wanted, allow_unused=True)
    maps = []
    for layer, (output, places), gradient in zip(layers, features, gradients, strict=True):
        slope = torch.zeros_like(output) if gradient is None else gradient
        maps.append(_weighed(places.detach(), slope if transform is None else transform(layer, slope), method))
    return maps, logits.detach()


def _weighed(
    features: Float[Tensor, "batch channels rows columns"],
    gradient: Float[Tensor, "batch channels rows columns"],
    method: CamMethod,
) -> Float[Tensor, "batch rows columns"]:
    if method == "gradcam":
        weight = gradient.mean((2, 3), keepdim=True)
    else:
        square = gradient.square()
        below = 2 * square + square * gradient * features.sum((2, 3), keepdim=True)
        alpha = torch.where(below != 0, square / torch.where(below != 0, below, 1), 0)
        weight = (alpha * gradient.relu()).sum((2, 3), keepdim=True)
    return (weight * features).sum(1).relu()
