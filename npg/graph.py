"""The graph of operations behind a tensor, as automatic differentiation has recorded it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

__all__ = ["graph_nodes", "leaves_of", "source_of"]


def source_of(x: Tensor) -> Any:
    """The node that a tensor comes of, which for a leaf is where its gradient ends; None where there is no graph."""
    return get_gradient_edge(x).node if x.requires_grad else None


def graph_nodes(x: Tensor, instead: Mapping[Any, Sequence[Any]] = MappingProxyType({})) -> set[Any]:
    """The nodes that a tensor is computed by; behind one of ``instead``, those that are given there alone."""
    seen: set[Any] = set()
    todo = [source_of(x)]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += instead[node] if node in instead else [node for node, _ in node.next_functions]
    return seen


def leaves_of(nodes: set[Any]) -> set[int]:
    """The leaves that a graph ends in, by their ids."""
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}
