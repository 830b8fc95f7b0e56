"""What calls of torch's exporters need around them: silence, one line of an error, and when a result serves again."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def silence() -> Iterator[None]:
    """Keeps logs below errors, warnings and what is printed on either stream away; torch prints whole graphs."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        chatter = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(chatter), redirect_stderr(chatter):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, or its kind.

    Example:
        >>> first_line(ValueError("\\n  a fault\\nand more")), first_line(KeyError())
        ('a fault', 'KeyError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def root_cause(error: BaseException) -> BaseException:
    """The first of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def structure(module: nn.Module) -> Hashable | None:
    """What decides the computation of a module but the values of its parameters and buffers, which share one if equal.

    Modules of equal structure are traced to the same graph, so that one of them may be exported with the other's
    values. It holds the classes with their ``forward`` as they are now, every attribute, and of parameters and buffers
    type, shape, layout and which of them are the same; None if an attribute cannot be told from another, such as a
    lambda.

    Example:
        >>> from torch import nn
        >>> structure(nn.Linear(2, 3)) == structure(nn.Linear(2, 3))
        True
        >>> structure(nn.Conv2d(1, 1, 3)) == structure(nn.Conv2d(1, 1, 3, dilation=2))
        False
    """
    text = io.BytesIO()
    try:
        _Structure(text, module).dump(module)
    except Exception:  # whatever a class raises that was not made to be pickled
        return None
    classes = tuple((type(part), type(part).forward) for part in module.modules())
    return classes, hashlib.sha256(text.getvalue()).digest()


class _Structure(pickle.Pickler):
    """Writes a module with a description in the place of each parameter and buffer. Nothing ever reads it."""

    def __init__(self, file: io.BytesIO, module: nn.Module):
        super().__init__(file)
        self._told: dict[int, tuple[Any, ...]] = {}
        for name, tensor in named_tensors(module).items():
            how = str(tensor.dtype), tuple(tensor.shape), tensor.stride(), str(tensor.device), type(tensor).__name__
            self._told.setdefault(id(tensor), (name, *how))

    def persistent_id(self, obj: Any) -> Any:
        import torch

        if id(obj) in self._told or not isinstance(obj, torch.Tensor):
            return self._told.get(id(obj))
        return str(obj.dtype), tuple(obj.shape), obj.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved too, under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
