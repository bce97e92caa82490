"""The geometry of optimal transport on outputs: how far probability has to be carried, and not only how much changes.

The Fisher metric is the second order of the KL divergence, ``KL ≈ ½ dᵀFd``. The Wasserstein metric M is, in the same
way, the second order of the squared Wasserstein-2 distance, ``½W₂²(p_η, p_{η+d}) ≈ ½ dᵀM(η)d``, and takes its place in
the same pull-back Jᵀ M J (Li & Montúfar 2018):

    metric = wasserstein(family)
    Fisher(model, inputs, family, metric=metric)
    natural_step(…, fisher=partial(Fisher, metric=metric))

A KL radius then bounds ½W₂², in half squared units of the targets for normals, of the edges for classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from npg.families import Bernoulli, Categorical, DiagonalGaussian, Family, Gaussian, LinearMap, MultiCategorical

__all__ = ["wasserstein"]

Metric = Callable[[Tensor], LinearMap]


def wasserstein(family: Family, graph: Tensor | None = None) -> Metric:
    """The Wasserstein-2 metric of a family, as the function η ↦ (u ↦ M(η)u) that `npg.Fisher` takes as ``metric``.

    Normals. W₂² between N(m, σ²) and N(m', σ'²) is (m − m')² + (σ − σ')², componentwise; with dσ = σ d(log σ):

        Gaussian           M = I
        DiagonalGaussian   M = diag(1, σ²)           in (m, log σ)

    Classes. They are the nodes of a graph with conductances w: probability flows along edges, and a flow m over the
    edges of p costs Σ mₑ²/(wₑ θₑ(p)) with θ_{ij}(p) = (pᵢ + pⱼ)/2. The cheapest flow for the change ṗ is the gradient
    of a potential, mₑ = wₑ θₑ (φᵢ − φⱼ), with L(p)φ = ṗ for the weighted Laplacian
    L(p) = Σₑ wₑ θₑ(p) (eᵢ − eⱼ)(eᵢ − eⱼ)ᵀ, and costs ṗᵀL(p)⁺ṗ. With the logits' dp = S dη, S = diag(p) − ppᵀ:

        Categorical        M = S L(p)⁺ S             and blockwise for MultiCategorical

    On the complete graph of C classes with w = 1, L = ½diag(1 + Cp) − ½(p1ᵀ + 1pᵀ), and for a change that sums to zero
    L⁺ = 2(diag(a) − aaᵀ/Σa) with a = 1/(1 + Cp): O(C) per product, as for Fisher. Any other graph costs O(C³) per
    event and linearisation, and O(C²) per product. A Bernoulli bit is a graph of two nodes, where L⁺ ṗ costs 2dp².

        Bernoulli          M = 2p²(1 − p)²

    Li & Montúfar normalise pᵢ by the node's share of all conductances; on a regular graph that is a constant factor.

    Args:
        family: Gaussian, DiagonalGaussian, Categorical, MultiCategorical or Bernoulli.
        graph: for Categorical, the conductances (C, C) ≥ 0, symmetric with zero diagonal: the larger w, the nearer are
            the two classes (length w^−½). The complete graph with w = 1 by default.

    Returns:
        The metric, a function of the outputs (…, D). On a given graph, θ is kept above 1e-12.

    Raises:
        ValueError: if the graph is not a connected graph as above, or is given for another family.
        TypeError: if the family has no transport metric here.

    Source: Li & Montúfar (2018), Natural gradient via optimal transport; for normals, Takatsu (2011).
    """
    if graph is not None:
        if not isinstance(family, Categorical):
            raise ValueError(f"graph connects the classes of a Categorical, and {family!r} has none: leave it out")
        _check_graph(graph)
        return _weighted_graph(graph)
    if isinstance(family, Gaussian):
        return lambda outputs: lambda u: u.clone()
    if isinstance(family, DiagonalGaussian):
        return _diagonal_gaussian
    if isinstance(family, Categorical):
        return _complete_graph
    if isinstance(family, MultiCategorical):
        sizes = family.sizes

        def blockwise(outputs: Tensor) -> LinearMap:
            maps = [_complete_graph(part) for part in outputs.split(sizes, -1)]
            return lambda u: torch.cat([m(part) for m, part in zip(maps, u.split(sizes, -1), strict=True)], -1)

        return blockwise
    if isinstance(family, Bernoulli):
        return _bernoulli
    raise TypeError(
        f"no Wasserstein metric is known for {family!r}: pass Fisher a metric of your own, a function of the outputs η "
        "that returns the map u ↦ M(η)u"
    )


def _diagonal_gaussian(outputs: Tensor) -> LinearMap:
    mean, log_std = DiagonalGaussian.split(outputs.detach())
    weights = torch.cat([torch.ones_like(mean), torch.exp(2 * log_std)], -1)
    return lambda u: weights * u


def _bernoulli(outputs: Tensor) -> LinearMap:
    p = outputs.detach().sigmoid()
    weights = 2 * (p * (1 - p)).square()
    return lambda u: weights * u


def _complete_graph(outputs: Tensor) -> LinearMap:
    p = outputs.detach().softmax(-1)
    a = 1 / (1 + p.shape[-1] * p)
    share = a / a.sum(-1, keepdim=True)

    def change(u: Tensor) -> Tensor:  # S u
        pu = p * u
        return pu - p * pu.sum(-1, keepdim=True)

    def apply(u: Tensor) -> Tensor:
        moved = change(u)
        return change(2 * a * (moved - (share * moved).sum(-1, keepdim=True)))

    return apply


def _weighted_graph(graph: Tensor) -> Metric:
    """M = S L(p)⁺ S for the classes of a weighted graph, as dense blocks."""
    nodes = len(graph)
    conductances = graph.detach().double()

    def metric(outputs: Tensor) -> LinearMap:
        if outputs.shape[-1] != nodes:
            raise ValueError(f"graph has {nodes} nodes, but the outputs have {outputs.shape[-1]} classes")
        p = outputs.detach().double().softmax(-1)
        # a floor under θ keeps the distance across empty classes finite: 10¹² times that of full ones
        theta = (0.5 * (p.unsqueeze(-1) + p.unsqueeze(-2))).clamp(min=1e-12)
        edges = conductances.to(p.device) * theta
        laplacian = torch.diag_embed(edges.sum(-1)) - edges
        # 1 spans the null space, and S maps into its complement: adding 11ᵀ/C changes nothing there
        factor, failed = torch.linalg.cholesky_ex(laplacian + 1 / nodes)
        factor = factor.masked_fill((failed > 0)[..., None, None], torch.nan)  # which a solver reports
        change = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        blocks = change @ torch.cholesky_solve(change, factor)
        blocks = (0.5 * (blocks + blocks.mT)).to(outputs.dtype)
        return lambda u: (blocks @ u.unsqueeze(-1)).squeeze(-1)

    return metric


def _check_graph(graph: Tensor) -> None:
    if graph.ndim != 2 or graph.shape[0] != graph.shape[1] or len(graph) < 2:
        raise ValueError(f"graph must be a square matrix of conductances, got shape {tuple(graph.shape)}")
    w = graph.double()
    if not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
        raise ValueError("graph must hold finite conductances ≥ 0")
    if bool((w != w.T).any()) or bool(w.diagonal().any()):
        raise ValueError(
            "graph must be symmetric with a zero diagonal: an edge has one conductance, and no node a loop"
        )
    reached = torch.zeros(len(w), dtype=torch.bool, device=w.device)
    reached[0] = True
    for _ in range(len(w)):
        reached |= (w[reached] > 0).any(0)
    if not bool(reached.all()):
        raise ValueError(
            f"graph must be connected: no path leads from node 0 to nodes {(~reached).nonzero()[:, 0].tolist()}"
        )
