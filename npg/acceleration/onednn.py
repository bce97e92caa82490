"""Large float32 products by oneDNN, on the CPUs where its are the faster ones.

``torch.backends.mkldnn.flags(enabled=False)`` keeps it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from npg.acceleration.simplify import FRESH, POINTWISE, args_of, calls, dtype_of, mutates, shape_of, tidy, value_of

__all__ = ["ONE_DNN", "is_faster", "to_one_dnn", "transpose_cotangents"]

aten = torch.ops.aten

ONE_DNN: set[Any] = set()
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    ONE_DNN |= {torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary}
_WORTH_IT = 2**19  # multiply-adds from which on oneDNN's product can take less time than the default one
_WORTH_IT_WITH_TANH = 2**13  # elements from which on oneDNN's tanh, in the same pass, outweighs a slower product


def is_faster(like: Tensor) -> bool:
    """Whether oneDNN's products are the faster ones: with AVX-512, of which the default library uses half on AMD.

    Without AVX-512 they take up to twice as long.
    """
    return (
        like.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and bool(ONE_DNN)
    )


def _is_product(node: Node) -> bool:
    return node.target in (aten.mm.default, aten.addmm.default) and not node.kwargs and dtype_of(node) is torch.float32


def _is_large_product(node: Node) -> bool:
    if not _is_product(node):
        return False
    left, right = args_of(node)[-2:]
    (m, k), n = shape_of(left) or (0, 0), (shape_of(right) or (0, 0))[1]
    return m * k * n >= _WORTH_IT


def transpose_cotangents(graph: Graph, moving: set[Node]) -> None:
    """Compute zᵀ in place of the cotangents z that enter as zᵀh, the gradient of a weight.

    oneDNN would copy a transposed left factor first, which takes as long as the product, and the default product is
    slower than its. zᵀ comes from transposes, of which those at rest are made once per linearisation.
    """
    if any(mutates(node) for node in calls(graph)):
        return  # a transpose made early might miss a change
    transposes: dict[Node, Node] = {}

    def call(target: Any, args: Sequence[Any], value: Any, **kwargs: Any) -> Node:
        node = graph.call_function(target, tuple(args), kwargs)
        node.meta = {"val": value}
        return node

    def is_computed(node: Node) -> bool:
        """Whether it is a product, or elementwise of matrices that are all shaped like it."""
        return node in moving and (
            node.target is aten.mm.default
            or (
                node.target in POINTWISE
                and len(shape_of(node) or ()) == 2
                and all(shape_of(source) == shape_of(node) for source in node.all_input_nodes)
            )
        )

    def transpose(node: Node) -> Node:
        if node.target is aten.t.default:
            return args_of(node)[0]
        if node in transposes:
            return transposes[node]
        value = value_of(node).t()
        if is_computed(node):
            sources = [transpose(source) if isinstance(source, Node) else source for source in node.args]
            target: Any = node.target
            with graph.inserting_before(node):
                new = call(target, sources[::-1] if target is aten.mm.default else sources, value, **node.kwargs)
                back = call(aten.t.default, [new], value_of(node))
            node.replace_all_uses_with(back)
            moving.update((new, back))
        else:
            with graph.inserting_after(node):
                new = call(aten.t.default, [node], value)
            if node not in moving:
                with graph.inserting_after(new):
                    new = call(aten.clone.default, [new], value, memory_format=torch.contiguous_format)
        transposes[node] = new
        return new

    for node in calls(graph):
        left = args_of(node)[-2] if _is_large_product(node) else None
        if left is not None and left.target is aten.t.default and is_computed(args_of(left)[0]):
            left.replace_all_uses_with(transpose(args_of(left)[0]))
    tidy(graph)


def to_one_dnn(graph: Graph, node: Node) -> None:
    """Give a large float32 product of matrices to oneDNN, where that is the faster (see `is_faster`)."""
    if not _is_product(node):
        return
    users = list(node.users)
    tanh = users[0] if len(users) == 1 and users[0].target is aten.tanh.default else None
    if not (
        _is_large_product(node)
        or (tanh is not None and (shape_of(node) or torch.Size([0])).numel() >= _WORTH_IT_WITH_TANH)
    ):
        return
    addend, left, right = (None, *args_of(node)) if node.target is aten.mm.default else args_of(node)
    wide = addend is not None and shape_of(addend) == shape_of(node)
    if addend is not None and not wide and shape_of(addend) != (shape_of(node) or ())[1:]:
        return
    source = args_of(right)[0] if right.target is aten.t.default else right
    if left.target is aten.t.default or not (source.op == "placeholder" or source.target in FRESH | ONE_DNN):
        return  # oneDNN would copy the one first, and take a thousand times as long for another that is not dense

    def transposed(matrix: Node) -> Node:
        return args_of(matrix)[0] if matrix.target is aten.t.default else graph.call_function(aten.t.default, (matrix,))

    linear = torch.ops.mkldnn._linear_pointwise
    replaced = node if tanh is None or wide else tanh
    with graph.inserting_before(node):
        if wide:
            new = graph.call_function(linear.binary, (left, addend, transposed(right), None, "add"))
        else:
            then = "none" if replaced is node else "tanh"
            new = graph.call_function(linear.default, (left, transposed(right), addend, then, [], ""))
    new.meta = replaced.meta
    replaced.replace_all_uses_with(new)
