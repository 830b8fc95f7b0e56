"""The bare network of an ONNX file, as torch exports it.

torch takes seconds for a network of 50 convolutions, nearly all of them for its structure. So what it made is kept for
the last few structures, without the weights; a network of the same structure, such as the same one after pruning, is
exported by putting its weights there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

from netwright.console import UserError
from netwright.deploy.exporters import first_line, named_tensors, root_cause, silence, structure

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

OPSET = 18  # the first whose Resize can smooth; every ONNX Runtime since 1.14 reads it
PREFIX = "network."
KEPT = 8

_templates: OrderedDict[Hashable, bytes] = OrderedDict()


def first(output: Any) -> Any:
    """The logits among what a network gives."""
    return output[0] if isinstance(output, (tuple, list)) else output


def graph_of(network: nn.Module, example: Tensor) -> onnx.ModelProto:
    """The bare network, ``standardised`` -> ``logits``, without any trace of where it was made.

    Args:
        network: In evaluation mode, on the processor, without parametrizations.
        example: At least two inputs, (batch, channels, height, width).

    Raises:
        UserError: If torch cannot export it.
    """
    import onnx

    described = structure(network)
    key = None if described is None else (described, tuple(example.shape), example.dtype)
    template = onnx.ModelProto.FromString(_templates[key]) if key in _templates else _exported(network, example)
    weights = {f"{PREFIX}{name}": tensor for name, tensor in named_tensors(network).items()}
    own = [tensor for tensor in template.graph.initializer if tensor.name in weights]
    if key is not None and key not in _templates:
        for tensor in own:
            tensor.ClearField("raw_data")
        _templates[key] = template.SerializeToString()
        if len(_templates) > KEPT:
            _templates.popitem(last=False)
    elif key is not None:
        _templates.move_to_end(key)
    for tensor in own:
        value = weights[tensor.name].detach().contiguous().numpy()
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    model = _optimised(template)
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{i}"
    for holder in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output, model.graph):
        holder.ClearField("doc_string")
        holder.ClearField("metadata_props")
    del model.graph.value_info[:]
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            # a folded batch norm turns 0 into -0, which is equal but compresses badly
            positive = onnx.numpy_helper.to_array(tensor) + np.float32(0)
            tensor.CopyFrom(onnx.numpy_helper.from_array(positive, tensor.name))
    return model


def _exported(network: nn.Module, example: Tensor) -> onnx.ModelProto:
    """What torch makes of it, nothing folded yet."""
    import torch

    class Logits(torch.nn.Module):
        """Keeps parameters away from the file's own names, and drops outputs beside the logits."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, standardised: Tensor) -> Tensor:
            return first(self.network(standardised))

    try:
        with silence():
            program = torch.onnx.export(
                Logits().eval(),
                (example,),
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=OPSET,
                external_data=False,
                input_names=["standardised"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            )
    except Exception as error:
        raise UserError(f"torch cannot export this network to ONNX: {first_line(root_cause(error))}") from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    if not model.graph.output[0].type.tensor_type.shape.dim[0].dim_param:
        raise UserError("torch cannot export this network to ONNX: its logits are not one row for each image")
    return model


def _optimised(model: onnx.ModelProto) -> onnx.ModelProto:
    """Constants and batch norms folded, as torch's exporter does it."""
    import torch
    from onnxscript import ir

    program = torch.onnx.ONNXProgram(ir.serde.deserialize_model(model), None)
    with silence():
        program.optimize()
    return program.model_proto
