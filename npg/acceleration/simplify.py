"""What a tracer leaves in a graph, taken out: copies, sums with zero, the same thing computed twice.

None of it changes the function that the graph computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

__all__ = [
    "FRESH",
    "POINTWISE",
    "args_of",
    "calls",
    "drop_sums_with",
    "dtype_of",
    "fuse",
    "is_zero",
    "mutates",
    "open_tanh",
    "shape_of",
    "tidy",
    "value_of",
]

aten = torch.ops.aten

_COPIES = {aten.alias.default, aten.detach.default}
_ZEROS = {
    aten.zeros.default,
    aten.zeros_like.default,
    aten._efficientzerotensor.default,
    aten.new_zeros.default,
}
_VIEWS = {
    aten.expand.default,
    aten.reshape.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
}
_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.mul.Tensor}
POINTWISE = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.threshold_backward.default,
}
_REDUCTIONS = {aten.sum.dim_IntList, aten.mean.dim}
_REPEATABLE = _VIEWS | _PRODUCTS | POINTWISE | _REDUCTIONS  # the same arguments, the same result, and no side effect
FRESH = _PRODUCTS | POINTWISE | {aten.addmm.default, aten.convolution.default}  # results that share no memory


def calls(graph: Graph) -> Iterable[Node]:
    """The nodes that call a function, as they are now."""
    return (node for node in list(graph.nodes) if node.op == "call_function")


def args_of(node: Node) -> tuple[Any, ...]:
    """Its positional arguments."""
    return tuple(node.args)


def value_of(node: Node) -> Any:
    """What it gave in the trace, or what is known of that."""
    return node.meta.get("val", node.meta.get("tensor_meta"))


def shape_of(node: Node) -> torch.Size | None:
    """Its shape, where it is a tensor."""
    return getattr(value_of(node), "shape", None)


def dtype_of(node: Node) -> torch.dtype | None:
    """Its dtype, where it is a tensor."""
    return getattr(value_of(node), "dtype", None)


def mutates(node: Node) -> bool:
    """Whether it writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def tidy(graph: Graph) -> None:
    """Take out copies, repetitions, and what is joined to be cut apart again."""
    for node in calls(graph):
        if node.target in _COPIES:
            node.replace_all_uses_with(args_of(node)[0])
        elif node.target is aten.t.default and args_of(node)[0].target is aten.t.default:
            node.replace_all_uses_with(args_of(args_of(node)[0])[0])
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # strides may differ from run to run, under vmap or channels last
        elif node.target is getitem and (joined := _joined(args_of(node)[0])):
            node.replace_all_uses_with(joined[args_of(node)[1]])
    graph.eliminate_dead_code()
    repeatable = _REPEATABLE | {aten.square.default, aten.rsub.Scalar}
    seen: dict[Any, Node] = {}
    for node in calls(graph):
        if mutates(node) and not (args_of(node)[0].target in _REPEATABLE - _VIEWS and len(args_of(node)[0].users) == 1):
            seen.clear()  # whatever was computed before may be another thing now
        if node.target not in repeatable or any(mutates(user) for user in node.users):
            continue
        key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))  # nodes print as their unique names
        earlier = seen.setdefault(key, node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)


def open_tanh(graph: Graph) -> None:
    """Write tanh's derivative so that what rests in it is computed once for all products."""
    for node in calls(graph):
        if node.target is aten.tanh_backward.default:
            slope, y = args_of(node)
            with graph.inserting_before(node):
                derivative = graph.call_function(aten.rsub.Scalar, (graph.call_function(aten.square.default, (y,)), 1))
                product = graph.call_function(aten.mul.Tensor, (slope, derivative))
            derivative.meta, product.meta = y.meta, node.meta
            node.replace_all_uses_with(product)


def _joined(split: Node) -> list[Node] | None:
    """The parts that were joined, if ``split`` cuts them apart again just there."""
    if split.target is not aten.split.Tensor or args_of(split)[0].target is not aten.cat.default:
        return None
    whole, size, *dim = args_of(split)
    parts, *joint = args_of(whole)
    axis, joint_axis = ((d[0] if d else 0) % len(shape_of(whole) or (0,)) for d in (dim, joint))
    if axis != joint_axis or any((shape_of(part) or ())[axis : axis + 1] != (size,) for part in parts):
        return None
    return list(parts)


def is_zero(node: Node) -> bool:
    """Whether this node of the primal part is identically zero, by construction."""
    if node.op != "call_function":
        return False
    if node.target in _ZEROS:
        return not any(mutates(user) for user in node.users)
    sources = [a for a in node.args if isinstance(a, Node)]
    if node.target in _VIEWS or node.target is aten.clone.default:
        return is_zero(sources[0])
    if node.target in _PRODUCTS:
        return any(is_zero(source) for source in sources)
    return node.target is aten.convolution.default and (
        len(sources) > 1 and (is_zero(sources[0]) or is_zero(sources[1])) and node.args[2] is None
    )


def drop_sums_with(graph: Graph, zeros: set[Node]) -> None:
    """Put x in the place of x + 0 for all of ``zeros``."""
    if any(mutates(node) for node in calls(graph)):
        return  # a sum is new memory; what it would be replaced by may be written to
    for node in calls(graph):
        if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(a, Node) for a in node.args):
            continue
        shape = shape_of(node)
        for zero, other in (args_of(node), reversed(args_of(node))):
            if zero in zeros and shape is not None and shape_of(other) is not None:
                if shape_of(other) == shape:
                    node.replace_all_uses_with(other)
                else:
                    with graph.inserting_before(node):
                        wide = graph.call_function(aten.expand.default, (other, list(shape)))
                    wide.meta = node.meta
                    node.replace_all_uses_with(wide)
                break


def fuse(graph: Graph) -> None:
    """Write a + m₁m₂ as one call."""
    for node in calls(graph):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        for product, other in ((node.args[1], node.args[0]), (node.args[0], node.args[1])):
            if (
                isinstance(product, Node)
                and isinstance(other, Node)
                and product.target is aten.mm.default
                and len(product.users) == 1
                and shape_of(product) == shape_of(node)
            ):
                addend = other.args[0] if other.target is aten.expand.default else other
                with graph.inserting_before(node):
                    fused = graph.call_function(aten.addmm.default, (addend, *product.args))
                fused.meta = node.meta
                node.replace_all_uses_with(fused)
                graph.erase_node(node)
                graph.erase_node(product)
                break
    graph.eliminate_dead_code()
