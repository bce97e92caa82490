"""The layers of a network that have Kronecker factors: their calls, their inputs and gradients, event by event."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Generator, Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from npg.curvature.base import Key
from npg.graph import graph_nodes, leaves_of, source_of
from npg.linearize import Linearization
from npg.model import Model
from npg.parameters import Parameters

__all__ = [
    "MAX_SIZE",
    "Call",
    "Pulled",
    "events_apart",
    "events_at_once",
    "input_moment",
    "patches_of",
    "positions_of",
    "record_layers",
]

#: A layer of more inputs or outputs has no factors: memory would grow with the square, time with the cube.
MAX_SIZE = 8192
_ELEMENTS = 2**24  # of patches, or of gradients event by event, that are in memory at once


class Call(NamedTuple):
    """One use of a layer in the recorded forward pass."""

    module: nn.Module
    inputs: Tensor  #: (events, …)
    output: GradientEdge  #: its place in the graph, which no later operation in place can move
    source: Any  #: the node of the graph that its inputs come of, or None
    patch_elements: int  #: of the patches of one event


Pulled = dict[Key, list[tuple[Call, Tensor]]]  # the gradients of one probe at the outputs of every call

#: Exactly these, whose forward pass is known; a subclass may have another.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def _layers(model: Model, parameters: Parameters) -> dict[nn.Module, Key]:
    """The modules that may have factors, with the indices of their weight and bias; no two keys overlap.

    A weight in several modules is one layer, unless these have several biases.
    """
    if not isinstance(model, nn.Module):
        raise ValueError("fisher must be of a module: a function has no layers to factor")
    names = {id(p): name for name, p in model.named_parameters()}
    index = {name: i for i, name in enumerate(parameters.names)}
    found: dict[nn.Module, Key] = {}
    for module in model.modules():
        plain = type(module) in _LAYERS and not {"forward", "_conv_forward"} & vars(module).keys()
        if plain and getattr(module, "groups", 1) == 1:
            own = [module._parameters.get(name) for name in ("weight", "bias")]
            key = tuple(index[names[id(p)]] for p in own if p is not None and names[id(p)] in index)
            # A hook changes the gradient of the parameter itself, which is not that of the layer's outputs any more.
            hooked = any(p is not None and p._backward_hooks for p in own)
            if own[0] is not None and own[0].numel() and names[id(own[0])] in index and not hooked:
                outputs = own[0].shape[0]
                if max(outputs, own[0].numel() // outputs) <= MAX_SIZE:
                    found[module] = key
    keys = set(found.values())
    alone = {key for key in keys if not any(other != key and set(other) & set(key) for other in keys)}
    return {module: key for module, key in found.items() if key in alone}


def record_layers(
    linearization: Linearization, without: Collection[int] = ()
) -> tuple[Tensor, dict[nn.Module, Key], dict[Key, list[Call]]]:
    """The forward pass as a graph, the layers that have factors, and every use of them in it.

    Those whose weights have the indices ``without`` have none.

    Where the graph reaches a parameter other than through a call of its layer (a tied embedding, `functional.linear`
    with the weight, the backward pass of the layer where the model returns derivatives of itself), the layer has no
    factors: the gradient of its weight is not Σ g āᵀ over its calls.
    """
    layers = _layers(linearization.model, linearization.parameters)
    layers = {module: key for module, key in layers.items() if key[0] not in without}
    while True:
        outputs, calls = _call_layers(linearization, layers)
        nodes = _nodes(outputs, [call for made in calls.values() for call in made])
        reached = leaves_of(nodes)
        used = {key for key in layers.values() if any(id(linearization.leaves[index]) in reached for index in key)}
        if not used:  # a call that no output depends on, such as that of a target which is detached, is none
            seen = {key: [call for call in made if call.output.node in nodes] for key, made in calls.items()}
            return outputs, layers, {key: made for key, made in seen.items() if made}
        layers = {module: key for module, key in layers.items() if key not in used}


def _call_layers(
    linearization: Linearization, layers: Mapping[nn.Module, Key], *, same: bool = True
) -> tuple[Tensor, dict[Key, list[Call]]]:
    """The forward pass, and the calls of the layers in it."""
    calls: dict[Key, list[Call]] = {}
    try:
        for module, key in layers.items():
            weight, *bias = (linearization.leaves[index] for index in key)
            module.forward = _recorded(module, calls, key, weight, bias[0] if bias else module._parameters["bias"])
        return linearization.record(same=same), calls
    finally:
        for module in layers:
            vars(module).pop("forward", None)


def _recorded(
    module: nn.Module, calls: dict[Key, list[Call]], key: Key, weight: Tensor, bias: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """The layer's own forward pass, which writes down the call."""

    def forward(input: Tensor) -> Tensor:
        layer = cast(nn.Conv2d, module)  # or another of `_LAYERS`
        output = type(layer).forward(layer, input)
        own = layer.weight is weight and layer.bias is bias
        # What no graph holds, what stands for many tensors at once, and a call with other weights (`functional_call`
        # inside of the model) cannot be written down.
        if not own or not torch.is_grad_enabled() or input.is_nested or is_functorch_wrapped_tensor(input):
            return output
        y = _batched(module, output)
        width = len(weight)
        patch_elements = y[0].numel() // width * (weight.numel() // width + 1) if y.numel() else 0
        if y.numel() or not width:  # a call without rows is none
            edge = get_gradient_edge(output)
            call = Call(module, _batched(module, input.detach()), edge, source_of(input), patch_elements)
            calls.setdefault(key, []).append(call)
        return output

    return forward


def _nodes(outputs: Tensor, calls: Collection[Call]) -> set[Any]:
    """The nodes of the graph, without those between a call's parameters and its output."""
    sources: dict[Any, list[Any]] = {}
    for call in calls:
        sources.setdefault(call.output.node, []).append(call.source)
    return graph_nodes(outputs, sources)


def events_apart(linearization: Linearization, layers: Mapping[nn.Module, Key]) -> set[Key]:
    """The layers whose inputs have one row for each event, in the order of the outputs' leading axis.

    Gradients show it: if u is scaled event by event, those at the row of an event are scaled as its u is, and powers of
    two change no digit. Where sequences come first, inputs are stacked or events see each other, they are not.

    Batch normalisation, by which the events of every layer see each other, uses its running statistics here: what
    events share by the batch's is left out of EKFAC's values, as it is out of K-FAC's.
    """
    model = cast(nn.Module, linearization.model)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    try:
        for norm in norms:
            norm.training = False
        outputs, calls = _call_layers(linearization, layers, same=not norms)
        outputs = outputs.unsqueeze(0) if outputs.ndim == 1 else outputs
        exponents = torch.randint(8, outputs.shape[:1], generator=Generator().manual_seed(0), device="cpu")
        scale = torch.ones(len(outputs), device="cpu").ldexp(exponents).to(outputs)
        uses = [(key, call) for key, made in calls.items() for call in made]
        if not uses:
            return set()
        u = torch.arange(outputs.numel(), device=outputs.device).to(outputs.dtype).cos_().view_as(outputs)
        edges, pair = [call.output for _, call in uses], []
        for x in (u, _along_first(scale, u) * u):
            with linearization.recomputed():
                pair.append(torch.autograd.grad(outputs, edges, x, retain_graph=True, allow_unused=True))
    finally:
        for norm in norms:
            norm.training = True
    mixed = {key for key, call in uses if len(call.inputs) != len(outputs)}
    keys, wrong = [], []
    for (key, call), plain, scaled in zip(uses, *pair):
        if plain is not None and plain.numel() and key not in mixed:
            plain, scaled = _batched(call.module, plain), _batched(call.module, scaled)
            error = scaled / _along_first(scale, scaled).to(scaled.dtype) - plain
            keys.append(key)
            wrong.append(error.abs().amax() > torch.finfo(plain.dtype).eps ** 0.5 * plain.abs().amax())
    if wrong:
        mixed |= {key for key, is_wrong in zip(keys, torch.stack(wrong).tolist()) if is_wrong}
    return calls.keys() - mixed


def _along_first(x: Tensor, like: Tensor) -> Tensor:
    """(N,) → (N, 1, …), of as many axes as ``like``."""
    return x.view(-1, *[1] * (like.ndim - 1))


def _batched(module: nn.Module, x: Tensor) -> Tensor:
    """With an axis of events, also where the module was given a single one."""
    axes = 2 if isinstance(module, nn.Linear) else len(cast(nn.Conv2d, module).kernel_size) + 2
    return x.unsqueeze(0) if x.ndim < axes else x


def positions_of(module: nn.Module, y: Tensor) -> Tensor:
    """What has the shape of a layer's outputs → (events, positions, O)."""
    y = _batched(module, y)
    return y.reshape(len(y), -1, y.shape[-1]) if isinstance(module, nn.Linear) else y.flatten(2).transpose(1, 2)


def patches_of(module: nn.Module, x: Tensor, biased: bool) -> Tensor:
    """A layer's inputs (events, …) → what [W, b], or W alone, is multiplied by, (events, positions, I)."""
    if isinstance(module, nn.Linear):
        x = x.reshape(len(x), -1, x.shape[-1])
    else:
        module = cast(nn.Conv2d, module)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode)
        lines = (1,) * (2 - len(module.kernel_size))  # one dimension is two, of height 1
        x = functional.unfold(
            x.unsqueeze(-2) if lines else x,
            kernel_size=(*lines, *module.kernel_size),
            dilation=(*lines, *module.dilation),
            stride=(*lines, *module.stride),
        ).transpose(1, 2)
    return functional.pad(x, (0, 1), value=1.0) if biased else x


def events_at_once(elements: int) -> int:
    """How many events, each of so many elements, are treated at once."""
    return max(1, _ELEMENTS // max(elements, 1))


def input_moment(calls: list[Call], biased: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum of āāᵀ over all positions, and their number: A is the one by the other."""
    total, rows = torch.zeros((), device="cpu"), 0
    for call in calls:
        for x in call.inputs.split(events_at_once(call.patch_elements)):
            a = patches_of(call.module, x, biased).flatten(0, 1).to(dtype)
            total, rows = total.to(a) + a.T @ a, rows + len(a)
    return total, total.new_full((), rows)
