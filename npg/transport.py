"""The geometry of optimal transport on outputs: how far probability has to be carried, and not only how much changes.

The Fisher metric is the second order of the KL divergence, ``KL ≈ ½ dᵀFd``. The Wasserstein metric M is, in the same
way, the second order of the squared Wasserstein-2 distance, ``½W₂²(p_η, p_{η+d}) ≈ ½ dᵀM(η)d``, and takes its place in
the same pull-back Jᵀ M J (Li & Montúfar 2018):

    metric = wasserstein(family)
    Fisher(model, inputs, family, metric=metric)
    natural_step(…, metric=metric)                      NGD(…, metric="wasserstein")    TRPO(…, metric="wasserstein")

A radius then bounds ½W₂² in place of the KL, in the model and in the check of the step: in half squared units of the
targets for normals, of the edges for classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from npg.families import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Family,
    Gaussian,
    Geometry,
    LinearMap,
    MultiCategorical,
    Product,
    covariance,
)
from npg.families.base import blockwise
from npg.geometry import Euclidean, FisherRao, geometry_of

__all__ = ["check_metric", "geometry", "wasserstein"]


def check_metric(name: str, metric: Any) -> None:
    """Raise ValueError for what is neither the name of a geometry nor a geometry."""
    is_geometry = callable(metric) and hasattr(metric, "divergence")
    if not (metric in ("fisher", "euclidean", "wasserstein") if isinstance(metric, str) else is_geometry):
        raise ValueError(
            f"{name} must be 'fisher', 'euclidean', 'wasserstein', or a geometry such as wasserstein(family, graph): a "
            f"function of the outputs with a method divergence(old, new), got {metric!r}"
        )


def geometry(metric: Literal["fisher", "euclidean", "wasserstein"] | Geometry, family: Family) -> Geometry:
    """A geometry from its name, or one's own.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if the family has no Wasserstein metric.
    """
    check_metric("metric", metric)
    if metric == "fisher":
        return FisherRao(family)
    if metric == "euclidean":
        return Euclidean()
    if metric == "wasserstein":
        return wasserstein(family)
    return geometry_of(metric)


def wasserstein(family: Family, graph: Tensor | None = None) -> Geometry:
    """The Wasserstein-2 metric of a family, and the distance of which it is the second order.

    Normals. W₂² between N(m, σ²) and N(m', σ'²) is (m − m')² + (σ − σ')², componentwise; with dσ = σ d(log σ):

        Gaussian           M = I
        DiagonalGaussian   M = diag(1, σ²)           in (m, log σ)

    Classes. They are the nodes of a graph with conductances w: probability flows along edges, and a flow m over the
    edges of p costs Σ mₑ²/(wₑ θₑ(p)) with θ_{ij}(p) = (pᵢ + pⱼ)/2. The cheapest flow for the change ṗ is the gradient
    of a potential, mₑ = wₑ θₑ (φᵢ − φⱼ), with L(p)φ = ṗ for the weighted Laplacian
    L(p) = Σₑ wₑ θₑ(p) (eᵢ − eⱼ)(eᵢ − eⱼ)ᵀ, and costs ṗᵀL(p)⁺ṗ. With the logits' dp = S dη, S = diag(p) − ppᵀ:

        Categorical        M = S L(p)⁺ S

    On the complete graph of C classes with w = 1, L = ½diag(1 + Cp) − ½(p1ᵀ + 1pᵀ), and for a change that sums to zero
    L⁺ = 2(diag(a) − aaᵀ/Σa) with a = 1/(1 + Cp): O(C) per product, as for Fisher. Any other graph costs O(C³) per
    event and linearisation, and O(C²) per product. W₂² is the least ∫ ṗᵀL(p)⁺ṗ dt of all paths from p to q, and has no
    closed form. The straight path, Δ = q − p, costs no less, and since L is linear in p its cost is convex along it:

        ½W₂²(p, q) ≤ ½ ∫ ΔᵀL(p + tΔ)⁺Δ dt ≤ ¼ Δᵀ(L(p)⁺ + L(q)⁺)Δ

    The last is the divergence, symmetric and with the second order of ½W₂²: a step within its radius is within that of
    ½W₂². A Bernoulli bit is a graph of two nodes, where L⁺ṗ costs 2dp² and W₂² = 2(Δp)² exactly.

        Bernoulli          M = 2p²(1 − p)²

    Independent parts, of a Product or a MultiCategorical: the metrics are blocks, and the squared distances add up.

    Li & Montúfar normalise pᵢ by the node's share of all conductances; on a regular graph that is a constant factor.

    Args:
        family: Gaussian, DiagonalGaussian, Categorical, Bernoulli, or a MultiCategorical or Product of such.
        graph: for Categorical, the conductances (C, C) ≥ 0, symmetric with zero diagonal: the larger w, the nearer are
            the two classes (length w^−½). The complete graph with w = 1 by default.

    Returns:
        The metric, a function η ↦ (u ↦ M(η)u) of the outputs (…, D), with its ``divergence(old, new)``. On a given
        graph, θ is kept above 1e-12.

    Raises:
        ValueError: if the graph is not a connected graph as above, or is given for another family.
        TypeError: if the family has no transport metric here, as a subclass of these has not.

    Source: Li & Montúfar (2018), Natural gradient via optimal transport; for normals, Takatsu (2011).
    """
    if graph is not None:
        if type(family) is not Categorical:
            raise ValueError(f"graph connects the classes of a Categorical, and {family!r} is none: leave it out")
        _check_graph(graph)
        return _WeightedGraph(graph)
    kind = type(family)  # itself: what a subclass changes, its parent's metric does not know
    if kind is Gaussian:
        return Euclidean()
    if kind is DiagonalGaussian:
        return _DiagonalGaussian()
    if kind is Categorical:
        return _CompleteGraph()
    if isinstance(family, Product) and kind in (Product, MultiCategorical):
        return _Product([wasserstein(part) for part in family.parts], family.sizes)
    if kind is Bernoulli:
        return _Bernoulli()
    raise TypeError(
        f"no Wasserstein metric is known for {family!r}, a {kind.__name__}. For a subclass that has its parent's, pass "
        "metric=wasserstein(parent); otherwise a metric of your own, a function of the outputs η that returns the map "
        "u ↦ M(η)u, with a method divergence(old, new)"
    )


class _DiagonalGaussian(Geometry):
    def __call__(self, outputs: Tensor) -> LinearMap:
        mean, log_std = DiagonalGaussian.split(outputs.detach())
        weights = torch.cat([torch.ones_like(mean), torch.exp(2 * log_std)], -1)
        return lambda u: weights * u

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        (m, log_s), (n, log_t) = DiagonalGaussian.split(old), DiagonalGaussian.split(new)
        return 0.5 * ((n - m).square() + (log_t.exp() - log_s.exp()).square()).sum(-1)


class _Bernoulli(Geometry):
    def __call__(self, outputs: Tensor) -> LinearMap:
        outputs = outputs.detach()
        weights = 2 * (outputs.sigmoid() * (-outputs).sigmoid()).square()
        return lambda u: weights * u

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        # Δp = −Δ(1 − p), from the smaller of the two, which has the more digits
        change = torch.where(old > 0, (-old).sigmoid() - (-new).sigmoid(), new.sigmoid() - old.sigmoid())
        return change.square().sum(-1)


class _Graph(Geometry):
    @abstractmethod
    def _inverse_laplacian(self, p: Tensor) -> LinearMap:
        """L(p)⁺, up to a constant, as a map of changes that sum to zero."""

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        p, q = old.double().softmax(-1), new.double().softmax(-1)
        change = q - p
        return 0.25 * (change * (self._inverse_laplacian(p)(change) + self._inverse_laplacian(q)(change))).sum(-1)


class _CompleteGraph(_Graph):
    def _inverse_laplacian(self, p: Tensor) -> LinearMap:
        a = 1 / (1 + p.shape[-1] * p)
        share = a / a.sum(-1, keepdim=True)
        return lambda change: 2 * a * (change - (share * change).sum(-1, keepdim=True))

    def __call__(self, outputs: Tensor) -> LinearMap:
        p = outputs.detach().softmax(-1)
        potential, change = self._inverse_laplacian(p), covariance(p)  # L⁺ and S
        return lambda u: change(potential(change(u)))


class _Product(Geometry):
    """Of independent parts, side by side: their squared distances add up."""

    def __init__(self, parts: Sequence[Geometry], sizes: Sequence[int]) -> None:
        self.parts, self.sizes = list(parts), list(sizes)

    def __call__(self, outputs: Tensor) -> LinearMap:
        pairs = zip(self.parts, outputs.split(self.sizes, -1), strict=True)
        return blockwise([part(o) for part, o in pairs], self.sizes)

    def factor(self, outputs: Tensor) -> LinearMap:
        pairs = zip(self.parts, outputs.split(self.sizes, -1), strict=True)
        return blockwise([part.factor(o) for part, o in pairs], self.sizes)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        pairs = zip(self.parts, old.split(self.sizes, -1), new.split(self.sizes, -1), strict=True)
        return torch.stack([part.divergence(a, b) for part, a, b in pairs]).sum(0)


class _WeightedGraph(_Graph):
    def __init__(self, graph: Tensor) -> None:
        self.conductances = graph.detach().double()

    def _factor(self, p: Tensor) -> Tensor:
        """Cholesky's factor of L(p) + ℓ 11ᵀ/C: 1 spans the null space of L, and no change has a part in it.

        ℓ = tr L / C, the mean eigenvalue: conductances may be in any unit.
        """
        # a floor under θ keeps the distance across empty classes finite: 10¹² times that of full ones
        theta = (0.5 * (p.unsqueeze(-1) + p.unsqueeze(-2))).clamp(min=1e-12)
        edges = self.conductances.to(p.device) * theta
        laplacian = torch.diag_embed(edges.sum(-1)) - edges
        mean = edges.sum((-2, -1), keepdim=True) / p.shape[-1]
        factor, failed = torch.linalg.cholesky_ex(laplacian + mean / p.shape[-1])
        return factor.masked_fill((failed > 0)[..., None, None], torch.nan)  # which a solver and a search report

    def _inverse_laplacian(self, p: Tensor) -> LinearMap:
        factor = self._factor(p)
        return lambda change: torch.cholesky_solve(change.unsqueeze(-1), factor).squeeze(-1)

    def __call__(self, outputs: Tensor) -> LinearMap:
        """The blocks S L(p)⁺ S, dense."""
        nodes = len(self.conductances)
        if outputs.shape[-1] != nodes:
            raise ValueError(f"graph has {nodes} nodes, but the outputs have {outputs.shape[-1]} classes")
        p = outputs.detach().double().softmax(-1)
        change = covariance(p.unsqueeze(-2))(torch.eye(nodes, dtype=p.dtype, device=p.device).expand(*p.shape, nodes))
        blocks = change @ torch.cholesky_solve(change, self._factor(p))
        blocks = (0.5 * (blocks + blocks.mT)).to(outputs.dtype)
        return lambda u: (blocks @ u.unsqueeze(-1)).squeeze(-1)


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
