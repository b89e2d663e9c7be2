"""Small graph classifiers on the convolutions of PyTorch Geometric."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.errors import UserError, unknown
from limbeck.zoo.network import positive

CONVOLUTIONS = ("gin", "gcn", "sage")


class GraphNetwork(nn.Module):
    """Embedded node types, message-passing layers with ReLU between them, the sum over nodes, a linear head.

    Args:
        input_shape: `(T,)`, how many types of nodes there are.
        classes: logits.
        convolution: "gin" (isomorphism network, epsilon 0), "gcn" or "sage" (mean of the neighbours).
        hidden: features of a node.
        layers: rounds of message passing.

    Raises:
        UserError: PyTorch Geometric is not installed, or an unknown convolution.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, convolution: str = "gin", hidden: int = 32, layers: int = 2) -> None:
        super().__init__()
        if convolution not in CONVOLUTIONS:
            raise unknown("graph convolution", convolution, CONVOLUTIONS)
        if len(input_shape) != 1:
            raise UserError(
                f"network {convolution!r} reads graphs, but the samples have shape {tuple(input_shape)}", "use cnn, mlp or another"
            )
        positive(convolution, hidden=hidden, layers=layers)
        self.embedding = nn.Embedding(input_shape[0], hidden)
        self.layers = nn.ModuleList(_convolution(convolution, hidden) for _ in range(layers))
        self.head = nn.Linear(hidden, classes)

    def nodes(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """`(V, hidden)` after the last layer."""
        h = self.embedding(x)
        for layer in self.layers:
            h = layer(h, edge_index).relu()
        return h

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, roots: Tensor | None = None, count: int | None = None) -> Tensor:
        """Logits `(B, classes)`.

        Args:
            x: `(V,)` node types. edge_index: `(2, E)`. batch: `(V,)` which graph a node belongs to.
            roots: `(R,)` only these nodes are summed; None for all.
            count: B; None counts `batch`.
        """
        h = self.nodes(x, edge_index)
        size = count if count is not None else int(batch.max()) + 1
        if roots is not None:
            h, batch = h[roots], batch[roots]
        return self.head(torch.zeros(size, h.shape[1], dtype=h.dtype, device=h.device).index_add_(0, batch, h))


def _convolution(name: str, hidden: int) -> nn.Module:
    try:
        from torch_geometric.nn import GCNConv, GINConv, SAGEConv
    except ImportError:
        raise UserError("graph networks need PyTorch Geometric", "`pip install 'limbeck[graphs]'`") from None
    if name == "gin":
        return GINConv(nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden)))
    return GCNConv(hidden, hidden) if name == "gcn" else SAGEConv(hidden, hidden)


class GIN(GraphNetwork):
    """Graph isomorphism network (arXiv:1810.00826); `input_shape` is `(number of node types,)`."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, hidden: int = 32, layers: int = 2) -> None:
        super().__init__(input_shape, classes, "gin", hidden, layers)


class GCN(GraphNetwork):
    """Graph convolutional network (arXiv:1609.02907); `input_shape` is `(number of node types,)`."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, hidden: int = 32, layers: int = 2) -> None:
        super().__init__(input_shape, classes, "gcn", hidden, layers)


class SAGE(GraphNetwork):
    """GraphSAGE with the mean of the neighbours (arXiv:1706.02216); `input_shape` is `(number of node types,)`."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, hidden: int = 32, layers: int = 2) -> None:
        super().__init__(input_shape, classes, "sage", hidden, layers)
