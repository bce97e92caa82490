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

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from npg.acceleration.onednn import ONE_DNN, is_faster, to_one_dnn, transpose_cotangents
from npg.acceleration.simplify import (
    FRESH,
    args_of,
    calls,
    drop_sums_with,
    dtype_of,
    fuse,
    is_zero,
    open_tanh,
    shape_of,
    tidy,
)

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
            function, [*arguments, *tangents, cotangent], before=open_tanh
        )
        n = len(arguments)
        if cotangent.device.type == "cpu":
            _keep_freed_memory()
        one_dnn = is_faster(cotangent)
        if one_dnn:
            transpose_cotangents(traced.graph, _moving(traced.graph, placeholders[-1:]))
        zeros = {node for node in traced.graph.nodes if is_zero(node)}
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
        self.rounding: float | None = None  # that its outputs were seen to have; see `Recorded.agree`

    def confirms(self, former: Program) -> bool:
        """Whether ``former`` computes the same function; then what its outputs differed by was rounding too."""
        mine, theirs = ((p._primal, p._push, p._pull) for p in (self, former))
        if self._push_places != former._push_places or not all(map(_same_graph, mine, theirs)):
            return False
        self.rounding = max((p.rounding for p in (self, former) if p.rounding is not None), default=None)
        return True

    @torch.no_grad()
    def linearize(self, arguments: Sequence[Tensor]) -> tuple[Tensor, Maps]:
        """η and the two maps at these arguments."""
        outputs, *residuals = self._primal.forward(*(dense(argument) for argument in arguments))
        residuals = [dense(residual) for residual in residuals]  # of a slice, the rows lie apart
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


def _same_graph(a: GraphModule, b: GraphModule) -> bool:
    """Whether two modules are made of the same operations and constants."""
    constants = [node.target for node in a.graph.nodes if node.op == "get_attr"]
    return a.code == b.code and all(
        x is y or (isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in ((attrgetter(name)(a), attrgetter(name)(b)) for name in constants)
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
    fuse(traced.graph)
    return GraphModule(traced, _specialised(traced.graph, one_dnn=is_faster(inputs[0]))).forward


def _trace(
    function: Callable[..., Any], arguments: Sequence[Tensor], before: Callable[[Graph], None] = lambda graph: None
) -> tuple[GraphModule, list[Node], Any]:
    """The trace of ``function(*arguments)``, tidied after ``before``, and the nodes of its arguments and results."""
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(function)(*arguments)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    before(traced.graph)
    tidy(traced.graph)
    (results,) = (node for node in traced.graph.nodes if node.op == "output")
    return traced, placeholders, results.args[0]


def dense(x: Tensor) -> Tensor:
    """``x``, a copy if its rows or columns lie apart: oneDNN takes a thousand times as long for such a right factor."""
    return x if x.ndim != 2 or x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB for the next product, where it gave them back to the system.

    To have the pages of a temporary anew takes longer than to compute it. glibc sets its threshold by the largest block
    that was freed so far; where memory is managed in another way, this one changes nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


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
    drop_sums_with(part, {inner[node] for node in at_rest if node in zeros})
    part.eliminate_dead_code()
    fuse(part)
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


# --------------------------------------------------------------------------------------------------- specialising


_IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
}


def _specialised(graph: Graph, *, one_dnn: bool) -> Graph:
    """A copy that computes the same faster, and no longer under ``torch.vmap``."""
    fast = Graph()
    fast.output(fast.graph_copy(graph, {}))
    if one_dnn:
        for node in calls(fast):
            to_one_dnn(fast, node)
        fast.eliminate_dead_code()
    _reuse_temporaries(fast)
    for node in calls(fast):
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


def _reuse_temporaries(graph: Graph) -> None:
    """Compute a + b, ab and a/b in the place of a, where nobody else reads a."""
    fresh = FRESH | ONE_DNN
    for node in calls(graph):
        if node.target not in _IN_PLACE or node.kwargs:
            continue
        first, second = args_of(node)
        for target, other in ((first, second), (second, first)):
            if (
                isinstance(target, Node)
                and target is not other
                and target.target in fresh
                and len(target.users) == 1
                and shape_of(target) is not None
                and (shape_of(target), dtype_of(target)) == (shape_of(node), dtype_of(node))
            ):
                node.target, node.args = _IN_PLACE[node.target], (target, other)
                break
            if node.target is aten.div.Tensor:
                break
