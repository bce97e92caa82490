"""A network's first-order model as straight-line programs, traced once and simplified.

One trace of ``(θ, v, u) ↦ (η, J v, Jᵀu)``, made by PyTorch's own forward and reverse mode, is cut into three:

    primal   θ ↦ (η, residuals)      run once per linearisation
    push     (residuals, v) ↦ J v    run once per product
    pull     (residuals, u) ↦ Jᵀu    run once per product

and what the tracer left in them is taken out: copies, sums with zero, the same thing computed twice. Then matrix
products are fused with the sums around them, temporaries are reused, and on CPUs with AVX-512 large products go to
oneDNN. None of this changes the function; ``torch.backends.mkldnn.flags(enabled=False)`` keeps oneDNN out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

__all__ = ["Maps", "Program", "straight_line"]

aten = torch.ops.aten


class Maps(NamedTuple):
    """v ↦ J v and u ↦ Jᵀu, with v and Jᵀu as lists of tensors, in two forms.

    Attributes:
        push: J v.
        pull: Jᵀu.
        plain_push: the same out of operations that ``torch.vmap`` knows.
        plain_pull: likewise.
    """

    push: Callable[[Sequence[Tensor]], Tensor]
    pull: Callable[[Tensor], Sequence[Tensor]]
    plain_push: Callable[[Sequence[Tensor]], Tensor]
    plain_pull: Callable[[Tensor], Sequence[Tensor]]


class Program:
    """The traced and divided ``function(*arguments, *tangents, u) → (η, J v, [Jᵀu])``.

    Args:
        function: linear in ``tangents`` and in ``u``, each of which enters one of the results.
        arguments: what a later call of `linearize` gives anew: parameters, buffers, inputs.
        tangents: any v.
        cotangent: any u.

    Raises:
        Exception: whatever an operation without a forward rule raises.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, Tensor, Sequence[Tensor]]],
        arguments: Sequence[Tensor],
        tangents: Sequence[Tensor],
        cotangent: Tensor,
    ) -> None:
        traced, placeholders, (outputs, moved, pulled) = _trace(
            function, [*arguments, *tangents, cotangent], before=_open_tanh
        )
        n = len(arguments)
        if cotangent.device.type == "cpu":
            _keep_freed_memory()
        one_dnn = _one_dnn(cotangent)
        if one_dnn:
            _transpose_cotangents(traced.graph, _moving(traced.graph, placeholders[-1:]))
        zeros = {node for node in traced.graph.nodes if _is_zero(node)}
        push, push_residuals = _part(traced.graph, placeholders[n:-1], [moved], zeros)
        pull, pull_residuals = _part(traced.graph, placeholders[-1:], list(pulled), zeros)
        residuals = list(dict.fromkeys((*push_residuals, *pull_residuals)))
        primal = _at_rest(traced.graph, _moving(traced.graph, placeholders[n:]), [outputs, *residuals])
        place = {node: i for i, node in enumerate(residuals)}
        self._push_places = [place[node] for node in push_residuals]
        self._pull_places = [place[node] for node in pull_residuals]
        self._plain_push, self._plain_pull = GraphModule(traced, push), GraphModule(traced, pull)
        self._primal, self._push, self._pull = (
            GraphModule(traced, _specialised(graph, one_dnn=one_dnn)) for graph in (primal, push, pull)
        )

    @torch.no_grad()
    def linearize(self, arguments: Sequence[Tensor]) -> tuple[Tensor, Maps]:
        """η and the two maps at these arguments."""
        outputs, *residuals = self._primal.forward(*(_dense(argument) for argument in arguments))
        first = [residuals[i] for i in self._push_places]
        second = [residuals[i] for i in self._pull_places]

        def push_by(program: GraphModule) -> Callable[[Sequence[Tensor]], Tensor]:
            run = program.forward
            return lambda tangents: run(*first, *tangents)[0]

        def pull_by(program: GraphModule) -> Callable[[Tensor], Sequence[Tensor]]:
            run = program.forward
            return lambda cotangent: run(*second, cotangent)

        return outputs, Maps(
            push_by(self._push), pull_by(self._pull), push_by(self._plain_push), pull_by(self._plain_pull)
        )


def straight_line(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> Callable[..., Sequence[Tensor]]:
    """``function`` of tensors as a straight-line program, equal to it for all inputs of the shapes traced.

    Nothing is computed ahead, and random numbers are drawn anew in every call. To be called without gradients.

    Raises:
        Exception: whatever an operation raises that looks at values.
    """
    traced, _, _ = _trace(function, inputs)
    _fuse(traced.graph)
    return GraphModule(traced, _specialised(traced.graph, one_dnn=_one_dnn(inputs[0]))).forward


def _trace(
    function: Callable[..., Any], arguments: Sequence[Tensor], before: Callable[[Graph], None] = lambda graph: None
) -> tuple[GraphModule, list[Node], Any]:
    """The trace of ``function(*arguments)``, tidied after ``before``, and the nodes of its arguments and results."""
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(function)(*arguments)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    before(traced.graph)
    _tidy(traced.graph)
    (results,) = (node for node in traced.graph.nodes if node.op == "output")
    return traced, placeholders, results.args[0]


def _dense(x: Tensor) -> Tensor:
    """``x``, a copy if its rows or columns lie apart: oneDNN takes a thousand times as long for such a right factor."""
    return x if x.ndim != 2 or x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB for the next product, where it gave them back to the system.

    To have the pages of a temporary anew takes longer than to compute it. glibc sets its threshold by the largest block
    that was freed so far; where memory is managed in another way, this one changes nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def _one_dnn(like: Tensor) -> bool:
    """Whether oneDNN's products are the faster ones: with AVX-512, of which the default library uses half on AMD.

    Without AVX-512 they take up to twice as long.
    """
    return (
        like.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and bool(_ONE_DNN)
    )


# ------------------------------------------------------------------------------------------------------- cutting


def _moving(graph: Graph, sources: Sequence[Node]) -> set[Node]:
    """What depends on ``sources``."""
    moving = set(sources)
    for node in graph.nodes:
        if node.op != "output" and any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    return moving


def _part(graph: Graph, sources: Sequence[Node], results: Sequence[Node], zeros: set[Node]) -> tuple[Graph, list[Node]]:
    """What moves with ``sources``, and the nodes at rest that it needs, which are its first arguments.

    The others are ``sources``.
    """
    moving = _moving(graph, sources)
    if not any(result in moving for result in results):
        raise NotImplementedError("the outputs do not move with the parameters")
    needed = {source for node in moving for source in node.all_input_nodes} | set(results)
    part = Graph()
    inner: dict[Node, Node] = {}
    at_rest = [node for node in graph.nodes if node in needed and node not in moving]
    for node in (*at_rest, *sources):
        inner[node] = part.placeholder(node.name)
        inner[node].meta = node.meta
    for node in graph.nodes:
        if node in moving and node not in inner:
            inner[node] = part.node_copy(node, lambda source: inner[source])
    part.output([inner[result] for result in results])
    _drop_sums_with(part, {inner[node] for node in at_rest if node in zeros})
    part.eliminate_dead_code()
    _fuse(part)
    for node in at_rest:
        if not inner[node].users:
            part.erase_node(inner[node])
    part.lint()
    return part, [node for node in at_rest if inner[node].users]


def _at_rest(graph: Graph, moving: set[Node], results: Sequence[Node]) -> Graph:
    """``results`` out of all that does not move."""
    first = Graph()
    outer: dict[Node, Node] = {}
    for node in graph.nodes:
        if node not in moving and node.op != "output":
            outer[node] = first.node_copy(node, lambda source: outer[source])
    first.output([outer[node] for node in results])
    first.eliminate_dead_code()
    return first


# --------------------------------------------------------------------------------------------------- simplifying

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
_POINTWISE = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.threshold_backward.default,
}
_REDUCTIONS = {aten.sum.dim_IntList, aten.mean.dim}
_REPEATABLE = _VIEWS | _PRODUCTS | _POINTWISE | _REDUCTIONS  # the same arguments, the same result, and no side effect
_FRESH = _PRODUCTS | _POINTWISE | {aten.addmm.default, aten.convolution.default}  # results that share no memory
_ONE_DNN: set[Any] = set()
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _ONE_DNN |= {torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary}
_IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
}


def _calls(graph: Graph) -> Iterable[Node]:
    return (node for node in list(graph.nodes) if node.op == "call_function")


def _args(node: Node) -> tuple[Any, ...]:
    return tuple(node.args)


def _value(node: Node) -> Any:
    return node.meta.get("val", node.meta.get("tensor_meta"))


def _shape(node: Node) -> torch.Size | None:
    return getattr(_value(node), "shape", None)


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(_value(node), "dtype", None)


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _tidy(graph: Graph) -> None:
    """Take out copies, repetitions, and what is joined to be cut apart again."""
    for node in _calls(graph):
        if node.target in _COPIES:
            node.replace_all_uses_with(_args(node)[0])
        elif node.target is aten.t.default and _args(node)[0].target is aten.t.default:
            node.replace_all_uses_with(_args(_args(node)[0])[0])
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # strides may differ from run to run, under vmap or channels last
        elif node.target is getitem and (joined := _joined(_args(node)[0])):
            node.replace_all_uses_with(joined[_args(node)[1]])
    graph.eliminate_dead_code()
    repeatable = _REPEATABLE | {aten.square.default, aten.rsub.Scalar}
    seen: dict[Any, Node] = {}
    for node in _calls(graph):
        if _mutates(node) and not (_args(node)[0].target in _REPEATABLE - _VIEWS and len(_args(node)[0].users) == 1):
            seen.clear()  # whatever was computed before may be another thing now
        if node.target not in repeatable or any(_mutates(user) for user in node.users):
            continue
        key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))  # nodes print as their unique names
        earlier = seen.setdefault(key, node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)


def _open_tanh(graph: Graph) -> None:
    """Write tanh's derivative so that what rests in it is computed once for all products."""
    for node in _calls(graph):
        if node.target is aten.tanh_backward.default:
            slope, y = _args(node)
            with graph.inserting_before(node):
                derivative = graph.call_function(aten.rsub.Scalar, (graph.call_function(aten.square.default, (y,)), 1))
                product = graph.call_function(aten.mul.Tensor, (slope, derivative))
            derivative.meta, product.meta = y.meta, node.meta
            node.replace_all_uses_with(product)


def _joined(split: Node) -> list[Node] | None:
    """The parts that were joined, if ``split`` cuts them apart again just there."""
    if split.target is not aten.split.Tensor or _args(split)[0].target is not aten.cat.default:
        return None
    whole, size, *dim = _args(split)
    parts, *joint = _args(whole)
    axis, joint_axis = ((d[0] if d else 0) % len(_shape(whole) or (0,)) for d in (dim, joint))
    if axis != joint_axis or any((_shape(part) or ())[axis : axis + 1] != (size,) for part in parts):
        return None
    return list(parts)


def _is_zero(node: Node) -> bool:
    """Whether this node of the primal part is identically zero, by construction."""
    if node.op != "call_function":
        return False
    if node.target in _ZEROS:
        return not any(_mutates(user) for user in node.users)
    sources = [a for a in node.args if isinstance(a, Node)]
    if node.target in _VIEWS or node.target is aten.clone.default:
        return _is_zero(sources[0])
    if node.target in _PRODUCTS:
        return any(_is_zero(source) for source in sources)
    return node.target is aten.convolution.default and (
        len(sources) > 1 and (_is_zero(sources[0]) or _is_zero(sources[1])) and node.args[2] is None
    )


def _drop_sums_with(graph: Graph, zeros: set[Node]) -> None:
    if any(_mutates(node) for node in _calls(graph)):
        return  # a sum is new memory; what it would be replaced by may be written to
    for node in _calls(graph):
        if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(a, Node) for a in node.args):
            continue
        shape = _shape(node)
        for zero, other in (_args(node), reversed(_args(node))):
            if zero in zeros and shape is not None and _shape(other) is not None:
                if _shape(other) == shape:
                    node.replace_all_uses_with(other)
                else:
                    with graph.inserting_before(node):
                        wide = graph.call_function(aten.expand.default, (other, list(shape)))
                    wide.meta = node.meta
                    node.replace_all_uses_with(wide)
                break


def _fuse(graph: Graph) -> None:
    """Write a + m₁m₂ as one call."""
    for node in _calls(graph):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        for product, other in ((node.args[1], node.args[0]), (node.args[0], node.args[1])):
            if (
                isinstance(product, Node)
                and isinstance(other, Node)
                and product.target is aten.mm.default
                and len(product.users) == 1
                and _shape(product) == _shape(node)
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


# --------------------------------------------------------------------------------------------------- specialising


def _specialised(graph: Graph, *, one_dnn: bool) -> Graph:
    """A copy that computes the same faster, and no longer under ``torch.vmap``."""
    fast = Graph()
    fast.output(fast.graph_copy(graph, {}))
    if one_dnn:
        for node in _calls(fast):
            _to_one_dnn(fast, node)
        fast.eliminate_dead_code()
    _reuse_temporaries(fast)
    for node in _calls(fast):
        node.target = _DIRECT.get(node.target, node.target)
    fast.lint()
    return fast


# The same operations by way of fewer Python frames, which at small batches take as long as the arithmetic.
_DIRECT: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: torch.Tensor.add_,
    aten.addmm.default: torch.addmm,
    aten.cat.default: torch.cat,
    aten.div.Tensor: torch.div,
    aten.exp.default: torch.exp,
    aten.expand.default: torch.Tensor.expand,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: torch.Tensor.mul_,
    aten.randn.generator: torch.randn,
    aten.relu.default: torch.relu,
    aten.reshape.default: torch.reshape,
    aten.square.default: torch.square,
    aten.sub.Tensor: torch.sub,
    aten.sum.dim_IntList: torch.sum,
    aten.t.default: torch.t,
    aten.tanh.default: torch.tanh,
}


_WORTH_IT = 2**19  # multiply-adds from which on oneDNN's product can take less time than the default one
_WORTH_IT_WITH_TANH = 2**13  # elements from which on oneDNN's tanh, in the same pass, outweighs a slower product


def _is_product(node: Node) -> bool:
    return node.target in (aten.mm.default, aten.addmm.default) and not node.kwargs and _dtype(node) is torch.float32


def _is_large_product(node: Node) -> bool:
    if not _is_product(node):
        return False
    left, right = _args(node)[-2:]
    (m, k), n = _shape(left) or (0, 0), (_shape(right) or (0, 0))[1]
    return m * k * n >= _WORTH_IT


def _transpose_cotangents(graph: Graph, moving: set[Node]) -> None:
    """Compute zᵀ in place of the cotangents z that enter as zᵀh, the gradient of a weight.

    oneDNN would copy a transposed left factor first, which takes as long as the product, and the default product is
    slower than its. zᵀ comes from transposes, of which those at rest are made once per linearisation.
    """
    if any(_mutates(node) for node in _calls(graph)):
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
                node.target in _POINTWISE
                and len(_shape(node) or ()) == 2
                and all(_shape(source) == _shape(node) for source in node.all_input_nodes)
            )
        )

    def transpose(node: Node) -> Node:
        if node.target is aten.t.default:
            return _args(node)[0]
        if node in transposes:
            return transposes[node]
        value = _value(node).t()
        if is_computed(node):
            sources = [transpose(source) if isinstance(source, Node) else source for source in node.args]
            target: Any = node.target
            with graph.inserting_before(node):
                new = call(target, sources[::-1] if target is aten.mm.default else sources, value, **node.kwargs)
                back = call(aten.t.default, [new], _value(node))
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

    for node in _calls(graph):
        left = _args(node)[-2] if _is_large_product(node) else None
        if left is not None and left.target is aten.t.default and is_computed(_args(left)[0]):
            left.replace_all_uses_with(transpose(_args(left)[0]))
    _tidy(graph)


def _to_one_dnn(graph: Graph, node: Node) -> None:
    """Give a large float32 product of matrices to oneDNN, where that is the faster (see `_one_dnn`)."""
    if not _is_product(node):
        return
    users = list(node.users)
    tanh = users[0] if len(users) == 1 and users[0].target is aten.tanh.default else None
    if not (
        _is_large_product(node)
        or (tanh is not None and (_shape(node) or torch.Size([0])).numel() >= _WORTH_IT_WITH_TANH)
    ):
        return
    addend, left, right = (None, *_args(node)) if node.target is aten.mm.default else _args(node)
    wide = addend is not None and _shape(addend) == _shape(node)
    if addend is not None and not wide and _shape(addend) != (_shape(node) or ())[1:]:
        return
    source = _args(right)[0] if right.target is aten.t.default else right
    if left.target is aten.t.default or not (source.op == "placeholder" or source.target in _FRESH | _ONE_DNN):
        return  # oneDNN would copy the one first, and take a thousand times as long for another that is not dense

    def transposed(matrix: Node) -> Node:
        return _args(matrix)[0] if matrix.target is aten.t.default else graph.call_function(aten.t.default, (matrix,))

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


def _reuse_temporaries(graph: Graph) -> None:
    """Compute a + b, ab and a/b in the place of a, where nobody else reads a."""
    fresh = _FRESH | _ONE_DNN
    for node in _calls(graph):
        if node.target not in _IN_PLACE or node.kwargs:
            continue
        first, second = _args(node)
        for target, other in ((first, second), (second, first)):
            if (
                isinstance(target, Node)
                and target is not other
                and target.target in fresh
                and len(target.users) == 1
                and _shape(target) is not None
                and (_shape(target), _dtype(target)) == (_shape(node), _dtype(node))
            ):
                node.target, node.args = _IN_PLACE[node.target], (target, other)
                break
            if node.target is aten.div.Tensor:
                break
