"""DAGNN whose hops can be messages of torch_geometric: for its explainers, and for edge weights that are learned.

Needs torch_geometric, which the extra ``graph`` installs. Without a mask on edges and without a gradient of their
weights it propagates as :class:`netwright.nn.dagnn.DAGNN` does; messages take many times as long, and each is stored.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.nn.dagnn.adjacency import checked_edges
from netwright.nn.dagnn.networks import DAGNN, full_precision


def hop_messages(K: int) -> nn.Module:
    """A ``MessagePassing`` layer without parameters that gives H_0..H_K = Z, A Z, ..., A^K Z of each node.

    It is called with values (nodes, classes), edges (2, edges), each undirected one both ways, and optional weights,
    and gives (nodes, K + 1, classes); it is differentiable in values and weights.

    Args:
        K: Hops, at least 0.

    Raises:
        ImportError: Without torch_geometric.

    Example:
        >>> hops = hop_messages(2)
        >>> hops(torch.eye(2), torch.tensor([[0, 1], [1, 0]]))[:, 1]  # after one hop
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    return _kind()(K)


@functools.cache
def _kind() -> type[Any]:
    """The class, which can be made only where torch_geometric is there; to import that takes seconds."""
    try:
        from torch_geometric.nn import MessagePassing
        from torch_geometric.nn.conv.gcn_conv import gcn_norm
    except ImportError as error:
        raise ImportError('messages of DAGNN need torch_geometric: pip install "netwright[graph]"') from error

    class HopMessages(MessagePassing):  # type: ignore[misc, unused-ignore]  # where it is not there to be checked
        def __init__(self, K: int):
            super().__init__(aggr="add")
            self.K = K

        def forward(self, z: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
            # Loops come last here, where explainers look for them.
            index, weight = gcn_norm(edge_index, edge_weight, len(z), add_self_loops=True, dtype=z.dtype)
            hops = [z]
            for _ in range(self.K):
                hops.append(self.propagate(index, x=hops[-1], weight=weight, size=(len(z), len(z))))
            return torch.stack(hops, 1)

        def message(self, x_j: Tensor, weight: Tensor) -> Tensor:
            return weight[:, None] * x_j

        def __reduce__(self) -> tuple[Any, ...]:
            return hop_messages, (self.K,)

    return HopMessages


class MessagePassingDAGNN(DAGNN):
    """:class:`netwright.nn.dagnn.DAGNN` for torch_geometric's explainers, which mask edges, and for learned weights.

    Parameters and their names are those of DAGNN, so that a trained network is explained by loading its state.

    Args:
        arguments: As for :class:`netwright.nn.dagnn.DAGNN`.
        named: Likewise.

    Attributes:
        hops: The layer that explainers mask.

    Raises:
        ImportError: Without torch_geometric.

    Example:
        >>> x, edge_index = torch.rand(3, 5), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> trained = DAGNN(in_dim=5, num_classes=2, K=4).eval()
        >>> network = MessagePassingDAGNN(in_dim=5, num_classes=2, K=4).eval()
        >>> _ = network.load_state_dict(trained.state_dict())
        >>> weight = torch.ones(4, requires_grad=True)
        >>> torch.allclose(network(x, edge_index, weight), trained(x, edge_index), atol=1e-6)
        True
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.hops = hop_messages(self.K)

    def forward(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Tensor,
        edge_weight: Float[Tensor, " edges"] | None = None,
        return_gates: bool = False,
    ) -> Any:
        """As :meth:`netwright.nn.dagnn.DAGNN.forward`; weights may require a gradient.

        Raises:
            ValueError: Likewise, or if a sparse graph, or a node with several loops, is to be taken edge by edge.
        """
        learned = edge_weight is not None and edge_weight.requires_grad
        if not (self.hops.explain or learned):
            return super().forward(x, edge_index, edge_weight, return_gates)
        if edge_index.layout is not torch.strided:
            raise ValueError("edge_index must be (2, edges) where edges have masks or gradients, got a sparse matrix")
        z = full_precision(self.mlp(x))
        source, target, _ = checked_edges(edge_index, len(z), None if edge_weight is None else edge_weight.detach())
        loops = source[source == target]
        if len(several := loops[loops.bincount()[loops] > 1]):
            # Of several loops torch_geometric keeps one, where the quick way adds them up.
            wanted = "edge_index must hold a loop once where edges have masks or gradients"
            raise ValueError(f"{wanted}, got node {int(several[0])} twice")
        logits, gates = self.gate(self.hops(z, edge_index, edge_weight))
        return (logits, gates) if return_gates else logits
