"""What training methods learn of the data before training, and how long that took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright import storage
from netwright.design import distributed

if TYPE_CHECKING:
    from netwright.data import Data

FILE = "prepared.json"


def prepare(methods: Sequence[Any], data: Data, folder: Path, *, augment: bool) -> None:
    """Lets each method that learns something of the data before training do so, or read what it left in ``folder``.

    Raises:
        UserError: If it cannot.
    """
    from netwright.train import methods as known

    if not any(hasattr(method, "prepare") for method in methods):
        return
    began, earlier = time.monotonic(), seconds(folder) or 0.0
    try:
        distributed.in_turn(lambda: known.prepare(methods, data, folder, augment=augment))
    finally:
        if distributed.is_main():
            storage.write_json(folder / FILE, {"seconds": round(earlier + time.monotonic() - began, 1)})


def seconds(folder: Path) -> float | None:
    """Wall time of that, over all sittings; None where no method has learned anything before training."""
    if not (folder / FILE).exists():
        return None
    return float(storage.read_json(folder / FILE)["seconds"])
