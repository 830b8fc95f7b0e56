"""Programs whose operators change nothing: in-place operators are replaced where that is plainly the same.

torch traces a program a second time for it, which takes longer than the first time. Networks that change tensors do so
nearly always in one way, an activation or a sum into the tensor that a layer has just made; there another operator in
the same place does it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from netwright.deploy.graph.table import aten

# Parts of torch made of others, which therefore do not tell in their signatures that what they give is new.
_COMPOSED = {
    op
    for packet in (aten.conv1d, aten.conv2d, aten.conv3d, aten.linear, aten.batch_norm, aten.layer_norm, aten.matmul)
    for op in (getattr(packet, overload) for overload in packet.overloads())
}


def make_functional(program: torch.export.ExportedProgram) -> bool:
    """Replaces operators that change what they read by others that do not.

    Args:
        program: As ``torch.export.export`` gives it. It is changed, and computes the same as before in any case.

    Returns:
        Whether none is left, nor any region with a program of its own, such as one under autocast. Where one is left,
        as there may be views of the tensor, ``run_decompositions({})`` helps.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(inplace=True)).eval()
        >>> program = torch.export.export(net, (torch.zeros(2, 4),))
        >>> make_functional(program)
        True
        >>> [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        ['aten.linear.default', 'aten.relu.default']
    """
    done = all([_rewrite(node) for node in program.graph.nodes if _changes(node)])
    program.graph_module.recompile()
    return done and not any(node.op == "get_attr" for node in program.graph.nodes)


def _rewrite(node: fx.Node) -> bool:
    """Replaces one that changes a tensor of which nothing else is a view; False where that is not sure."""
    if node.target is aten.dropout_.default and node.args[2] is False:
        node.target = aten.dropout.default  # like the other it gives its input as it is
        return True
    changed, twin = node.args[0], _twin(node)
    if twin is None or not isinstance(changed, fx.Node) or not _new(changed):
        return False
    value, result = changed.meta.get("val"), node.meta.get("val")
    if not (isinstance(value, torch.Tensor) and isinstance(result, torch.Tensor)):
        return False
    if (value.shape, value.dtype) != (result.shape, result.dtype):
        return False
    # torch gives later readers the operator that changed the tensor; those of the tensor itself read it before.
    if not all(reader < node and _new(reader) for reader in changed.users if reader is not node):
        return False
    node.target = twin
    return True


def _changes(node: fx.Node) -> bool:
    return node.op == "call_function" and _schema(node) is not None and _schema(node).is_mutable


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _twin(node: fx.Node) -> Any:
    """The operator that gives what an operator such as ``relu_`` would write, None where there is none."""
    packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
    found = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None) if packet.endswith("_") else None
    same = found is not None and [a.name for a in found._schema.arguments] == [a.name for a in _schema(node).arguments]
    return found if same else None


def _new(node: fx.Node) -> bool:
    """Whether what a node gives is surely no view of what it reads."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in _COMPOSED:
        return True
    composed = node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    told = any(given.alias_info for given in _schema(node).returns)
    return not composed and not told and node.target is not aten._unsafe_view.default
