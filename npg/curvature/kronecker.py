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
Frobenius norm. For that it has to be known which rows of a layer's inputs are of which event: see `events_apart` in
`npg.curvature.layers`.

Damping may be shared out to the factors, each at its own scale: with π² = (tr A / I) / (tr G / O),

    (G + √λ/π I) ⊗ (A + π√λ I) = G ⊗ A + √λ (π G ⊗ I + I ⊗ A / π) + λI

which is more than λI wherever one of the factors is large: products of a large and a small eigenvalue are trusted less.
Where a factor is zero, π = 1.

Sources: Martens and Grosse (2015), arXiv 1503.05671; for convolutions Grosse and Martens (2016), arXiv 1602.01407; for
EKFAC George et al. (2018), arXiv 1806.03884; for layers at several positions Eschenhagen et al. (2023), arXiv
2311.00636, who call this "expand".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from npg.curvature.base import RESIZED, Curvature, Key, State, check_average, count, eigenvectors, inverted
from npg.curvature.layers import (
    Pulled,
    events_apart,
    events_at_once,
    input_moment,
    patches_of,
    positions_of,
    record_layers,
)
from npg.fisher import Fisher
from npg.parallel import average_
from npg.parameters import Parameters
from npg.solvers.solution import check_damping

__all__ = ["Block", "KroneckerFisher", "Multiple"]


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
        both = (s.sum() > 0) & (t.sum() > 0)  # of a factor of zeros there is no scale
        ratio = torch.where(both, s.mean() / t.mean(), 1.0).sqrt()  # π
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


class KroneckerFisher(Curvature):
    """F̂ ≈ F, block by block, as a linear operator with an inverse.

    Linear layers and one- and two-dimensional convolutions without groups have a block G ⊗ A each, for weight and bias
    together, unless they have more than `MAX_SIZE` inputs or outputs, or a weight or bias that is used outside of the
    layer too, such as an embedding's. Every other parameter (of such a layer, of a normalisation or embedding, a free
    log standard deviation) has a multiple of the identity, the mean of its diagonal of F as the probes estimate it. It
    costs a forward pass, the backward passes of the probes, and the eigenvectors of two matrices for each layer.

    Args:
        fisher: F, of a module, at the present parameters. Its kind and its process group are those of F̂ too. None to
            begin with `update`.
        corrected: EKFAC in place of K-FAC, for two more backward passes (and a forward pass, with batch normalisation
            in training mode) that show which rows of a layer's inputs are of which event. Where they are not in the
            order of the outputs' leading axis, in one of the processes even, the layer keeps K-FAC's values, and a
            warning names it.
        probes: backward passes, each with random signs over outputs (or labels); with None one for each output (or
            label), after which A and G have no randomness but the data's, if no event has a part in the outputs of
            another, and no row of a layer a part in the outputs of two. Where events interact (BatchNorm in training
            mode, tokens that attend to each other), what is between two events keeps its random signs: its expectation
            is zero, and more batches average it out.
        generator: the source of signs, by default torch's global one.
        decay: γ, in [0, 1): in the average an estimate of k updates ago has the weight γᵏ. Corrected values are of this
            batch alone, since the basis is new. Blocks of layers that the model no longer has in this form, a bias
            being frozen or thawed, are dropped.

    Attributes:
        blocks: by the indices of the parameters that they are of: (weight,), (weight, bias), or any single one. Where
            the gradients were not finite, neither are their values.

    Raises:
        ValueError: if an argument is out of its range, ``fisher`` is of a function.
        RuntimeError: if the parameters have changed since ``fisher`` was made.
    """

    name, fields = "kfac", Block._fields  # which has those of Multiple

    def __init__(
        self,
        fisher: Fisher | None = None,
        *,
        corrected: bool = False,
        probes: int | None = 1,
        generator: Generator | None = None,
        decay: float = 0.0,
    ) -> None:
        check_average(decay, probes)
        self.corrected, self.probes, self.generator, self.decay = corrected, probes, generator, decay
        self.blocks: dict[Key, Block | Multiple] = {}
        if fisher is not None:
            self.update(fisher)

    def update(self, fisher: Fisher) -> None:
        """Take the factors of a batch into their mean; its eigenvectors and corrected values are then the new ones.

        Raises:
            ValueError: if ``fisher`` is of a function, or a parameter had another shape before.
            RuntimeError: if the parameters have changed since ``fisher`` was made.
        """
        parameters = fisher.parameters
        past, decay = self._former(parameters), self.decay
        known = [key for key, block in past.items() if isinstance(block, Block)]
        with torch.autocast(fisher.device.type, enabled=False):
            layers, factors, means, pulled = _moments(fisher, known, self.probes, self.generator, keep=self.corrected)
            keys = set(layers.values())  # no two of them share a parameter, so that no two blocks do
            # Also of a layer that is not in use today.
            kept: dict[Key, Block] = {key: past[key] for key in known if key in keys}
            for key, block in kept.items():
                _check_size(block, key, parameters)
            inside = {index for key in (*factors, *kept) for index in key}
            blocks: dict[Key, Block | Multiple] = dict(kept)
            for key, pair in factors.items():
                before = kept.get(key)
                updates, newest = count(None if before is None else before.updates, decay)
                if before is not None:
                    pair = before.inputs.lerp(pair[0], newest), before.outputs.lerp(pair[1], newest)
                (s, u), (t, v) = (eigenvectors(matrix) for matrix in pair)
                blocks[key] = Block(*pair, s, u, t, v, torch.outer(t, s), updates)
            for index in sorted(set(range(len(means))) - inside):
                mean = means[index].clone()
                former = past.get((index,))
                former = former if isinstance(former, Multiple) else None
                updates, newest = count(None if former is None else former.updates, decay)
                blocks[index,] = Multiple(mean if former is None else former.values.lerp(mean, newest), updates)
            if self.corrected and factors:
                apart = events_apart(fisher.linearization, layers)
                for key in _correct(blocks, list(factors), apart, pulled, fisher):
                    warnings.warn(
                        f"EKFAC takes K-FAC's values for {parameters.names[key[0]]!r}: the rows of its inputs are "
                        "not in the order of the events, the leading axis of the outputs. Let the layer see the batch "
                        "on its leading axis to have them corrected",
                        stacklevel=3,
                    )
        self.parameters, self.blocks = parameters, blocks

    def state_dict(self) -> State:
        """The factors and their eigenvectors of each layer, and the multiple of every other parameter."""
        return {key: block._asdict() for key, block in self.blocks.items()}

    def load_state_dict(self, state: Mapping[Key, Mapping[str, Tensor]]) -> None:
        """Go on from a `state_dict`."""
        self.blocks = {}
        for key, entry in self._in_precision(state).items():
            kind = Block if "inputs" in entry and entry["inputs"].numel() else Multiple
            self.blocks[key] = kind(**{name: entry[name] for name in kind._fields})

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.parameters.numel, self.parameters.numel

    def __repr__(self) -> str:
        if not self.blocks:
            return f"KroneckerFisher(corrected={self.corrected}, decay={self.decay})"
        layers = sum(isinstance(block, Block) for block in self.blocks.values())
        return f"KroneckerFisher({self.parameters.numel} parameters, {layers} layers with factors)"

    def __matmul__(self, v: Tensor) -> Tensor:
        """F̂ v; (P,) → (P,), or (P, K) → (P, K)."""
        return self._apply(self.blocks, v)

    def inverse(self, damping: float, *, shared: bool = False) -> Callable[[Tensor], Tensor]:
        """The map v ↦ (F̂ + λI)⁻¹ v, of (P,) or (P, K); where F̂ + λI has an eigenvalue of zero, the pseudo-inverse.

        With ``shared``, λ is shared out to the factors of each layer (Martens and Grosse 2015, section 6.3).

        Raises:
            ValueError: if λ is negative or not finite.
        """
        check_damping(damping)
        blocks: dict[Key, Block | Multiple] = {}
        for key, block in self.blocks.items():
            damped = block.damped(damping, shared=shared)
            blocks[key] = block._replace(values=inverted(damped))
        return lambda v: self._apply(blocks, v)

    def _apply(self, blocks: Mapping[Key, Block | Multiple], v: Tensor) -> Tensor:
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


def _size(key: Key, parameters: Parameters) -> tuple[int, int]:
    """(O, I) of a layer."""
    weight = parameters.tensors[key[0]]
    return len(weight), weight.numel() // max(len(weight), 1) + len(key) - 1


def _check_size(block: Block, key: Key, parameters: Parameters) -> None:
    size, former = _size(key, parameters), tuple(block.values.shape)
    if former != size:
        raise ValueError(
            f"the factors of {parameters.names[key[0]]!r} are of outputs and inputs {former}, but it has {size}: "
            f"{RESIZED}"
        )


def _correct(
    blocks: dict[Key, Block | Multiple], called: list[Key], apart: set[Key], pulled: list[Pulled], fisher: Fisher
) -> list[Key]:
    """Second moments of the gradients, event by event, in the place of the products of eigenvalues.

    Returns:
        The layers that keep the products, since their events are not ``apart`` in all processes.
    """
    moments = {key: torch.zeros_like(blocks[key].values) for key in called}
    for key, uses in ((key, uses) for probe in pulled for key, uses in probe.items() if key in apart):
        block, moment = blocks[key], moments[key]
        assert isinstance(block, Block)
        events = events_at_once(max(block.values.numel(), *(call.patch_elements for call, _ in uses)))
        for parts in zip(*(zip(call.inputs.split(events), g.split(events)) for call, g in uses), strict=True):
            pairs = [
                (g @ block.output_basis, patches_of(call.module, x, len(key) > 1).to(g.dtype) @ block.input_basis)
                for (call, _), (x, g) in zip(uses, parts)
            ]
            if len(pairs) == 1 and pairs[0][0].shape[1] == 1:
                g, a = (x[:, 0].square() for x in pairs[0])
                moment += g.T @ a / fisher.events
            else:
                gradients = torch.stack([g.transpose(1, 2) @ a for g, a in pairs]).sum(0)
                moment += gradients.square().sum(0) / fisher.events
    share = torch.tensor([key in apart for key in called], dtype=fisher.dtype, device=fisher.device)  # of the processes
    average_([*moments.values(), share], fisher.process_group)
    wholly = {key for key, part in zip(called, share.tolist()) if part == 1}
    for key in wholly:
        blocks[key] = blocks[key]._replace(values=moments[key])
    return [key for key in called if key not in wholly]


class _Moments(NamedTuple):
    """What a batch says of F̂."""

    layers: dict[nn.Module, Key]  #: that have factors, in all processes
    factors: dict[Key, tuple[Tensor, Tensor]]  #: A and G of each that is called in any
    means: Tensor  #: of the diagonal of each parameter that no call holds, (parameters,)
    pulled: list[Pulled]  #: of each probe, in this process


def _moments(
    fisher: Fisher,
    known: list[Key],
    probes: int | None,
    generator: Generator | None,
    *,
    keep: bool,
    without: frozenset[int] = frozenset(),
) -> _Moments:
    """The moments of a batch; and to ``keep``, each probe's gradients.

    Processes may call different layers, and have to reduce the same tensors. They have the ``known`` ones in common, of
    earlier batches: one reduction has these, and says which others there are, if any. A layer whose weight is used
    outside of it in one process is then ``without`` factors in all.
    """
    fisher.compare_shares()
    parameters, group, leaves = fisher.parameters, fisher.process_group, fisher.linearization.leaves
    outputs, layers, calls = record_layers(fisher.linearization, without)
    means = torch.zeros(len(leaves), dtype=fisher.dtype, device=outputs.device)

    def square(n: int) -> Tensor:
        return means.new_zeros(n, n)

    # Σ āāᵀ and the number of positions, which is not the same in all processes, are reduced apart.
    inputs = {key: input_moment(made, len(key) > 1, fisher.dtype) for key, made in calls.items()}
    factors = {key: square(_size(key, parameters)[0]) for key in calls}
    uses = [(key, call) for key, made in calls.items() for call in made]
    held = {index for key in calls for index in key}
    rest = [index for index in range(len(leaves)) if index not in held]
    targets: list[Any] = [*(call.output for _, call in uses), *(leaves[index] for index in rest)]
    pulled: list[Pulled] = []
    for u in fisher.factor_vectors(probes, generator):
        with fisher.linearization.recomputed():
            gradients = torch.autograd.grad(outputs, targets, u, retain_graph=True, allow_unused=True)
        pulled.append({})
        for (key, call), gradient in zip(uses, gradients):
            if gradient is not None:
                g = positions_of(call.module, gradient).to(fisher.dtype)
                factors[key] += g.flatten(0, 1).T @ g.flatten(0, 1) / fisher.events
                if keep:
                    pulled[-1].setdefault(key, []).append((call, g))
        for index, gradient in zip(rest, gradients[len(uses) :]):
            if gradient is not None and gradient.numel():
                means[index] += gradient.to(fisher.dtype).square().mean() / fisher.events

    def reduce(keys: list[Key], *others: Tensor) -> None:
        for key in keys:
            if key not in inputs:
                n_outputs, n_inputs = _size(key, parameters)
                inputs[key], factors[key] = (square(n_inputs), means.new_zeros(())), square(n_outputs)
        average_([*others, *(x for key in keys for x in (*inputs[key], factors[key]))], group)

    called = list(calls)
    if group is not None:
        keys = list(dict.fromkeys(layers.values()))
        shares = means.new_zeros(2, len(means))  # of the processes, by the layer's weight: it has factors, it is called
        for share, some in zip(shares, (keys, called)):
            share[[key[0] for key in some]] = 1.0
        reduce(known, means, shares)
        having, calling = shares.tolist()
        if split := {index for index, share in enumerate(having) if 0 < share < 1}:
            return _moments(fisher, known, probes, generator, keep=keep, without=without | split)
        called = [key for key in keys if calling[key[0]]]
        if new := [key for key in called if key not in known]:
            reduce(new)
    pairs = {key: (inputs[key][0] / inputs[key][1], factors[key]) for key in called}
    return _Moments(layers, pairs, means, pulled)
