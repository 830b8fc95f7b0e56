"""The ONNX file that dense runtimes get: the bare network for one input shape, zeros left as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from netwright.console import UserError
from netwright.deploy.bench.subject import first
from netwright.deploy.exporters import first_line, root_cause, silence
from netwright.deploy.onnx_graph import OPSET
from netwright.storage import atomic_path

if TYPE_CHECKING:
    from torch import Tensor, nn


def write(module: nn.Module, example: np.ndarray, path: Path) -> None:
    """Exports a network as it is, without preprocessing, for inputs of the example's shape only.

    A fixed shape is what a runtime can optimise best; :func:`netwright.deploy.onnx.export` makes the file for users,
    which takes batches of any size.

    Args:
        module: In evaluation mode, without masks.
        example: Float32 (batch, ...).
        path: The file.

    Raises:
        UserError: If torch cannot export the network.
    """
    import torch

    class FirstOutput(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = module

        def forward(self, images: Tensor) -> Tensor:
            return first(self.network(images))

    try:
        with silence():
            program = torch.onnx.export(
                FirstOutput().eval(),
                (torch.from_numpy(example),),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                external_data=False,
                input_names=["images"],
                output_names=["logits"],
            )
    except Exception as error:
        raise UserError(f"torch cannot export it to ONNX: {first_line(root_cause(error))[:200]}") from error
    assert program is not None
    with atomic_path(path) as temporary:
        temporary.write_bytes(program.model_proto.SerializeToString())
