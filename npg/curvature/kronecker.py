r"""Kronecker-factored Fisher information: K-FAC, and EKFAC with corrected eigenvalues.

A layer computes y = W a + b, once for every event (a linear layer) or at many positions of it (a convolution, a layer
over a sequence). With ā = [a, 1] and the gradients g = Jᵀu at y of vectors u with E[uuᵀ] = M, the metric of the
outputs, the layer's block of F is E[(Σ g āᵀ)(Σ g āᵀ)ᵀ], with the sum over the positions of one event. It is taken for

    F̂ = G ⊗ A,     A = (1/R) Σᵣ āᵣ āᵣᵀ,     G = (1/N) Σᵣ gᵣ gᵣᵀ

over all R positions of all N events: as if gradients had nothing to do with inputs, nor with those of other positions.
In the basis of its eigenvectors F̂ is diagonal, so that the inverse of F̂ + λI is exact for every λ:

    A = U S Uᵀ,  G = V T Vᵀ:     (F̂ + λI)⁻¹ X = V [(Vᵀ X U) / (t sᵀ + λ)] Uᵀ      for X shaped like [W, b]

EKFAC keeps the basis and puts the second moments E[(Vᵀ (Σ g āᵀ) U)²] in the place of t sᵀ, with the sum over all uses
of the layer in one event: of all matrices that are diagonal in this basis, the nearest to the block of F in the
Frobenius norm. For that it has to be known which rows of a layer's inputs are of which event, see `_by_event`.

Damping may be shared out to the factors, each at its own scale: with π² = (tr A / I) / (tr G / O),

    (G + √λ/π I) ⊗ (A + π√λ I) = G ⊗ A + √λ (π G ⊗ I + I ⊗ A / π) + λI

which is more than λI wherever one of the factors is large: products of a large and a small eigenvalue are trusted less.

Sources: Martens and Grosse (2015), arXiv 1503.05671; for convolutions Grosse and Martens (2016), arXiv 1602.01407; for
EKFAC George et al. (2018), arXiv 1806.03884; for layers at several positions Eschenhagen et al. (2023), arXiv
2311.00636, who call this "expand".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from math import inf, nan
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Generator, Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from npg.fisher import Fisher
from npg.linearize import Linearization, Model
from npg.parallel import average_
from npg.parameters import Parameters
from npg.solvers import Solution, Status

__all__ = ["Block", "KroneckerFisher", "Multiple"]

#: A layer of more inputs or outputs has no factors: memory would grow with the square, time with the cube.
MAX_SIZE = 8192
_ELEMENTS = 2**24  # of patches, or of gradients event by event, that are in memory at once
_Key = tuple[int, ...]


class Block(NamedTuple):
    """F̂ = G ⊗ A of one layer, in its eigenvectors."""

    inputs: Tensor  #: A, (I, I)
    outputs: Tensor  #: G, (O, O)
    input_values: Tensor  #: s, (I,)
    input_basis: Tensor  #: U, (I, I)
    output_values: Tensor  #: t, (O,)
    output_basis: Tensor  #: V, (O, O)
    values: Tensor  #: t sᵀ, or what corrects it, (O, I)
    updates: Tensor  #: of how many batches A and G are the average, () on the CPU

    def damped(self, damping: float, *, shared: bool) -> Tensor:
        """The eigenvalues with λ, or with λ shared out to the factors, (O, I)."""
        if not shared:
            return self.values + damping
        s, t = self.input_values, self.output_values
        ratio = torch.where(t.sum() > 0, s.mean() / t.mean(), 1.0).sqrt()  # π
        root = damping**0.5
        return self.values + root * (ratio * t.unsqueeze(1) + s / ratio) + damping

    def apply(self, x: Tensor) -> Tensor:
        """F̂ x, (…, O, I)."""
        return self.output_basis @ (self.values * (self.output_basis.T @ x @ self.input_basis)) @ self.input_basis.T


class Multiple(NamedTuple):
    """F̂ of a parameter outside of such layers: a multiple of the identity."""

    values: Tensor  #: the mean of its diagonal of F, ()
    updates: Tensor  #: as above

    def damped(self, damping: float, *, shared: bool) -> Tensor:
        """The value with λ, ()."""
        return self.values + damping

    def apply(self, x: Tensor) -> Tensor:
        """F̂ x."""
        return self.values * x


class KroneckerFisher:
    """F̂ ≈ F, block by block, as a linear operator with an inverse.

    Linear layers and one- and two-dimensional convolutions without groups have a block G ⊗ A each, for weight and bias
    together, unless they have more than `MAX_SIZE` inputs or outputs, or a weight or bias that is used outside of the
    layer too, such as an embedding's. Every other parameter (of such a layer, of a normalisation or embedding, a free
    log standard deviation) has a multiple of the identity, the mean of its diagonal of F as the probes estimate it. It
    costs a forward pass, the backward passes of the probes, and the eigenvectors of two matrices for each layer.

    Args:
        fisher: F, of a module, at the present parameters. Its kind and its process group are those of F̂ too.
        corrected: EKFAC in place of K-FAC, for two more backward passes (and a forward pass, with batch normalisation
            in training mode) that show which rows of a layer's inputs are of which event. Where they are not in the
            order of the outputs' leading axis, the layer keeps K-FAC's values, and a warning names it.
        probes: backward passes, each with random signs over outputs (or labels); with None one for each output (or
            label), after which A and G have no randomness but the data's, if no event has a part in the outputs of
            another. Where events interact (BatchNorm in training mode, tokens that attend to each other), what is
            between two events keeps its random signs: its expectation is zero, and more batches average it out.
        generator: the source of signs, by default torch's global one.
        previous: the ``blocks`` of earlier batches, to average with.
        decay: γ, in [0, 1): in the average an estimate of k updates ago has the weight γᵏ. Corrected values are of this
            batch alone, since the basis is new. Blocks of layers that the model no longer has in this form, a bias
            being frozen or thawed, are dropped.

    Attributes:
        blocks: by the indices of the parameters that they are of: (weight,), (weight, bias), or any single one. Where
            the gradients were not finite, neither are their values.

    Raises:
        ValueError: if an argument is out of its range, ``fisher`` is of a function or of another metric, or
            ``previous`` is of layers of other sizes.
        RuntimeError: if the parameters have changed since ``fisher`` was made.
    """

    def __init__(
        self,
        fisher: Fisher,
        *,
        corrected: bool = False,
        probes: int | None = 1,
        generator: Generator | None = None,
        previous: Mapping[_Key, Block | Multiple] | None = None,
        decay: float = 0.0,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.parameters = fisher.parameters
        outputs, layers, calls = _record(fisher.linearization)
        past = dict(previous or {})
        keys = set(layers.values())  # no two of them share a parameter, so that no two blocks do
        # Also of a layer that is not in use today.
        kept = {key: block for key, block in past.items() if isinstance(block, Block) and key in keys}
        for key, block in kept.items():
            _check_size(block, key, self.parameters)
        inside = {index for key in (*calls, *kept) for index in key}
        rest = [index for index in range(len(self.parameters.tensors)) if index not in inside]
        self.blocks: dict[_Key, Block | Multiple] = dict(kept)
        with torch.autocast(outputs.device.type, enabled=False):
            factors, means, pulled = _moments(fisher, outputs, calls, rest, probes, generator, keep=corrected)
            for key, pair in factors.items():
                updates, newest = _count(kept.get(key), decay)
                if key in kept:
                    pair = kept[key].inputs.lerp(pair[0], newest), kept[key].outputs.lerp(pair[1], newest)
                (s, u), (t, v) = (_eigenvectors(matrix) for matrix in pair)
                self.blocks[key] = Block(*pair, s, u, t, v, torch.outer(t, s), updates)
            for index, mean in means.items():
                before = past.get((index,))
                before = before if isinstance(before, Multiple) else None
                updates, newest = _count(before, decay)
                self.blocks[index,] = Multiple(mean if before is None else before.values.lerp(mean, newest), updates)
            if corrected:
                apart = _by_event(fisher.linearization, layers)
                for key in calls.keys() - apart:
                    warnings.warn(
                        f"EKFAC takes K-FAC's values for {self.parameters.names[key[0]]!r}: the rows of its inputs are "
                        "not in the order of the events, the leading axis of the outputs. Let the layer see the batch "
                        "on its leading axis to have them corrected",
                        stacklevel=3,
                    )
                self._correct([{k: v for k, v in uses.items() if k in apart} for uses in pulled], fisher)

    def _correct(self, pulled: list[_Pulled], fisher: Fisher) -> None:
        """Second moments of the gradients, event by event, in the place of the products of eigenvalues."""
        moments: dict[_Key, Tensor] = {}
        for key, uses in ((key, uses) for probe in pulled for key, uses in probe.items()):
            block = self.blocks[key]
            assert isinstance(block, Block)
            moment = moments.setdefault(key, torch.zeros_like(block.values))
            events = _events(max(block.values.numel(), *(call.patch_elements for call, _ in uses)))
            for parts in zip(*(zip(call.inputs.split(events), g.split(events)) for call, g in uses), strict=True):
                pairs = [
                    (g @ block.output_basis, _patches(call.module, x, len(key) > 1).to(g.dtype) @ block.input_basis)
                    for (call, _), (x, g) in zip(uses, parts)
                ]
                if len(pairs) == 1 and pairs[0][0].shape[1] == 1:
                    g, a = (x[:, 0].square() for x in pairs[0])
                    moment += g.T @ a / fisher.events
                else:
                    gradients = torch.stack([g.transpose(1, 2) @ a for g, a in pairs]).sum(0)
                    moment += gradients.square().sum(0) / fisher.events
        average_(moments.values(), fisher.process_group)
        for key, moment in moments.items():
            self.blocks[key] = self.blocks[key]._replace(values=moment)

    @classmethod
    def of(cls, parameters: Parameters, blocks: Mapping[_Key, Block | Multiple]) -> Self:
        """F̂ with the given ``blocks``.

        Raises:
            ValueError: unless they hold each parameter once.
        """
        held = sorted(index for key in blocks for index in key)
        if held != list(range(len(parameters.tensors))):
            raise ValueError(
                f"blocks must hold each of {len(parameters.tensors)} parameters once, got those of indices {held}"
            )
        self = cls.__new__(cls)
        self.parameters, self.blocks = parameters, dict(blocks)
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.parameters.numel, self.parameters.numel

    def __repr__(self) -> str:
        layers = sum(isinstance(block, Block) for block in self.blocks.values())
        return f"KroneckerFisher({self.parameters.numel} parameters, {layers} layers with factors)"

    def __matmul__(self, v: Tensor) -> Tensor:
        """F̂ v; (P,) → (P,), or (P, K) → (P, K)."""
        return self._apply(self.blocks, v)

    def dense(self) -> Tensor:
        """F̂ as a matrix (P, P)."""
        return self @ torch.eye(self.parameters.numel, dtype=self.parameters.dtype, device=self.parameters.device)

    def inverse(self, damping: float, *, shared: bool = False) -> Callable[[Tensor], Tensor]:
        """The map v ↦ (F̂ + λI)⁻¹ v, of (P,) or (P, K); where F̂ + λI has an eigenvalue of zero, the pseudo-inverse.

        With ``shared``, λ is shared out to the factors of each layer (Martens and Grosse 2015, section 6.3).

        Raises:
            ValueError: if λ is negative or not finite.
        """
        if not 0 <= damping < inf:
            raise ValueError(f"damping must be a finite number ≥ 0, got {damping}")
        blocks: dict[_Key, Block | Multiple] = {}
        for key, block in self.blocks.items():
            damped = block.damped(damping, shared=shared)
            blocks[key] = block._replace(values=torch.where(damped == 0, 0.0, 1 / damped))
        return lambda v: self._apply(blocks, v)

    def solve(self, b: Tensor, *, damping: float = 0.0, shared: bool = False) -> Solution:
        """Take (F̂ + λI)⁻¹ b, or that with λ ``shared`` out to the factors, for the solution; (P,).

        Returns:
            A `Solution` whose curvature and model value are those of F̂ + λI, and whose residual is NaN: it would be of
            F, which is not looked at.
        """
        x = self.inverse(damping, shared=shared)(b)
        curvature = torch.dot(x.double(), (self @ x).double()) + damping * torch.dot(x.double(), x.double())
        value = 0.5 * curvature - torch.dot(b.double(), x.double())
        status = Status.CONVERGED if bool(torch.isfinite(value)) else Status.NON_FINITE
        return Solution(x, status, (status,), 0, torch.full_like(curvature, nan), curvature, value)

    def _apply(self, blocks: Mapping[_Key, Block | Multiple], v: Tensor) -> Tensor:
        self.parameters.check(v)
        columns = v.T if v.ndim == 2 else v.unsqueeze(0)
        parts = list(columns.to(self.parameters.dtype).split(self.parameters.sizes, 1))
        with torch.autocast(v.device.type, enabled=False):
            for key, block in blocks.items():
                if isinstance(block, Block):
                    x = torch.cat([parts[index].reshape(len(columns), len(block.outputs), -1) for index in key], -1)
                    widths = [parts[index].shape[1] // len(block.outputs) for index in key]
                    y = [part.flatten(1) for part in block.apply(x).split(widths, -1)]
                else:
                    y = [block.apply(parts[index]) for index in key]
                for index, part in zip(key, y):
                    parts[index] = part
        w = torch.cat(parts, 1)
        return w.T if v.ndim == 2 else w.squeeze(0)


def _check_size(block: Block, key: _Key, parameters: Parameters) -> None:
    weight = parameters.tensors[key[0]]
    size = (len(weight), weight.numel() // max(len(weight), 1) + len(key) - 1)
    if block.values.shape != size:
        raise ValueError(
            f"previous has factors of outputs and inputs {tuple(block.values.shape)} for {parameters.names[key[0]]!r}, "
            f"which has {size}: take the blocks of this model"
        )


def _count(before: Block | Multiple | None, decay: float) -> tuple[Tensor, float]:
    """The number t of batches, with this one, and the weight of this one among 1, γ, γ², …: (1 − γ) / (1 − γᵗ)."""
    updates = torch.ones((), dtype=torch.int64) if before is None else before.updates + 1
    return updates, (1 - decay) / (1 - decay ** int(updates))


def _moments(
    fisher: Fisher,
    outputs: Tensor,
    calls: Mapping[_Key, list[_Call]],
    rest: list[int],
    probes: int | None,
    generator: Generator | None,
    *,
    keep: bool,
) -> tuple[dict[_Key, tuple[Tensor, Tensor]], dict[int, Tensor], list[_Pulled]]:
    """A and G of each layer, the mean diagonal of every other parameter; and to ``keep``, each probe's gradients."""
    dtype, leaves = fisher.dtype, fisher.linearization.leaves
    inputs = {key: _input_factor(made, len(key) > 1, dtype) for key, made in calls.items()}
    factors = {key: inputs[key].new_zeros(made[0].width, made[0].width) for key, made in calls.items()}
    means = {index: torch.zeros((), dtype=dtype, device=outputs.device) for index in rest}
    uses = [(key, call) for key, made in calls.items() for call in made]
    targets: list[Any] = [*(call.output for _, call in uses), *(leaves[index] for index in rest)]
    pulled: list[_Pulled] = []
    for u in fisher.factor_vectors(probes, generator):
        gradients = torch.autograd.grad(outputs, targets, u, retain_graph=True, allow_unused=True)
        pulled.append({})
        for (key, call), gradient in zip(uses, gradients):
            if gradient is not None:
                g = _positions(call.module, gradient).to(dtype)
                factors[key] += g.flatten(0, 1).T @ g.flatten(0, 1) / fisher.events
                if keep:
                    pulled[-1].setdefault(key, []).append((call, g))
        for index, gradient in zip(rest, gradients[len(uses) :]):
            if gradient is not None and gradient.numel():
                means[index] += gradient.to(dtype).square().mean() / fisher.events
    average_([*inputs.values(), *factors.values(), *means.values()], fisher.process_group)
    return {key: (inputs[key], factors[key]) for key in calls}, means, pulled


def _eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none below zero, and eigenvectors; NaN where the matrix is not finite."""
    if not bool(torch.isfinite(matrix).all()):
        return torch.full_like(matrix[0], nan), torch.full_like(matrix, nan)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:  # single precision may not converge where eigenvalues are many and near zero
        values, vectors = (x.to(matrix.dtype) for x in torch.linalg.eigh(matrix.double()))
    return values.clamp(min=0), vectors


# --------------------------------------------------------------------------------------------------------- the layers


class _Call(NamedTuple):
    """One use of a layer in the recorded forward pass."""

    module: nn.Module
    inputs: Tensor  #: (events, …)
    output: GradientEdge  #: its place in the graph, which no later operation in place can move
    width: int  #: O
    patch_elements: int  #: of the patches of one event


_Pulled = dict[_Key, list[tuple[_Call, Tensor]]]  # the gradients of one probe at the outputs of every call

#: Exactly these, since a layer's forward pass is written out here (`_recorded`); a subclass may have another.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def _layers(model: Model, parameters: Parameters) -> dict[nn.Module, _Key]:
    """The modules that may have factors, with the indices of their weight and bias; no two keys overlap.

    A weight in several modules is one layer, unless these have several biases.
    """
    if not isinstance(model, nn.Module):
        raise ValueError("fisher must be of a module: a function has no layers to factor")
    names = {id(p): name for name, p in model.named_parameters()}
    index = {name: i for i, name in enumerate(parameters.names)}
    found: dict[nn.Module, _Key] = {}
    for module in model.modules():
        plain = type(module) in _LAYERS and not {"forward", "_conv_forward"} & vars(module).keys()
        if plain and getattr(module, "groups", 1) == 1:
            own = [module._parameters.get(name) for name in ("weight", "bias")]
            key = tuple(index[names[id(p)]] for p in own if p is not None and names[id(p)] in index)
            if own[0] is not None and names[id(own[0])] in index:
                outputs = own[0].shape[0]
                if max(outputs, own[0].numel() // max(outputs, 1)) <= MAX_SIZE:
                    found[module] = key
    keys = set(found.values())
    alone = {key for key in keys if not any(other != key and set(other) & set(key) for other in keys)}
    return {module: key for module, key in found.items() if key in alone}


def _record(linearization: Linearization) -> tuple[Tensor, dict[nn.Module, _Key], dict[_Key, list[_Call]]]:
    """The forward pass as a graph, the layers that have factors, and every use of them in it.

    The layers compute with copies of their parameters. What still reaches the parameters themselves are uses that are
    no call of the layer (a tied embedding, `functional.linear` with the weight), and such a layer has no factors: the
    gradient of its weight is not Σ g āᵀ over its calls.
    """
    layers = _layers(linearization.model, linearization.parameters)
    while True:
        outputs, calls = _call_layers(linearization, layers)
        reached = _reached(outputs)
        used = {key for key in layers.values() if any(id(linearization.leaves[index]) in reached for index in key)}
        if not used:
            return outputs, layers, calls
        layers = {module: key for module, key in layers.items() if key not in used}


def _call_layers(
    linearization: Linearization, layers: Mapping[nn.Module, _Key]
) -> tuple[Tensor, dict[_Key, list[_Call]]]:
    """The forward pass, and the calls of the layers in it, on copies of their parameters."""
    calls: dict[_Key, list[_Call]] = {}
    try:
        for module, key in layers.items():
            module.forward = _recorded(module, calls, key)
        return linearization.record(), calls
    finally:
        for module in layers:
            vars(module).pop("forward", None)


def _recorded(module: nn.Module, calls: dict[_Key, list[_Call]], key: _Key) -> Callable[[Tensor], Tensor]:
    """The layer's own forward pass, on copies of its parameters, and writing down the call."""

    def forward(input: Tensor) -> Tensor:
        layer = cast(nn.Conv2d, module)  # or another of `_LAYERS`
        # What no graph holds, and what stands for many tensors at once, cannot be written down.
        if not torch.is_grad_enabled() or input.is_nested or is_functorch_wrapped_tensor(input):
            return type(layer).forward(layer, input)
        weight = layer.weight.detach().requires_grad_()
        bias = None if layer.bias is None else layer.bias.detach().requires_grad_()
        if isinstance(module, nn.Linear):
            output = functional.linear(input, weight, bias)
        else:
            output = layer._conv_forward(input, weight, bias)
        y = _batched(module, output)
        width = len(weight)
        patch_elements = y[0].numel() // width * (weight.numel() // width + 1) if y.numel() else 0
        call = _Call(module, _batched(module, input.detach()), get_gradient_edge(output), width, patch_elements)
        calls.setdefault(key, []).append(call)
        return output

    return forward


def _reached(outputs: Tensor) -> set[int]:
    """The tensors that the graph ends in, by their ids."""
    seen, todo = set(), [outputs.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [node for node, _ in node.next_functions]
    return {id(node.variable) for node in seen if hasattr(node, "variable")} | {id(outputs)}


def _by_event(linearization: Linearization, layers: Mapping[nn.Module, _Key]) -> set[_Key]:
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
        outputs, calls = _call_layers(linearization, layers)
    finally:
        for norm in norms:
            norm.training = True
    outputs = outputs.unsqueeze(0) if outputs.ndim == 1 else outputs
    exponents = torch.randint(8, outputs.shape[:1], generator=Generator().manual_seed(0))
    scale = torch.ones(len(outputs)).ldexp(exponents).to(outputs)
    uses = [(key, call) for key, made in calls.items() for call in made]
    if not uses:
        return set()
    u = torch.arange(outputs.numel(), device=outputs.device).to(outputs.dtype).cos_().view_as(outputs)
    pair = [
        torch.autograd.grad(outputs, [call.output for _, call in uses], x, retain_graph=True, allow_unused=True)
        for x in (u, _along_first(scale, u) * u)
    ]
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


def _positions(module: nn.Module, y: Tensor) -> Tensor:
    """What has the shape of a layer's outputs → (events, positions, O)."""
    y = _batched(module, y)
    return y.reshape(len(y), -1, y.shape[-1]) if isinstance(module, nn.Linear) else y.flatten(2).transpose(1, 2)


def _patches(module: nn.Module, x: Tensor, biased: bool) -> Tensor:
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


def _events(elements: int) -> int:
    """How many events, each of so many elements, are treated at once."""
    return max(1, _ELEMENTS // max(elements, 1))


def _input_factor(calls: list[_Call], biased: bool, dtype: torch.dtype) -> Tensor:
    """A, the mean of āāᵀ over all positions."""
    total, rows = torch.zeros(()), 0
    for call in calls:
        for x in call.inputs.split(_events(call.patch_elements)):
            a = _patches(call.module, x, biased).flatten(0, 1).to(dtype)
            total, rows = total.to(a) + a.T @ a, rows + len(a)
    return total / rows
