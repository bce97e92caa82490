"""The Wasserstein metrics against dense twins, and against the distances whose second order they are."""

from __future__ import annotations

from functools import partial
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Poisson

from npg import Fisher, TrustRegion, conjugate_gradient, families, natural_step
from npg.geometry import Euclidean, FisherRao
from npg.optim import NGD
from npg.transport import geometry, wasserstein

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def complete(classes: int) -> Tensor:
    return torch.ones(classes, classes, dtype=F64) - torch.eye(classes, dtype=F64)


def chain(classes: int) -> Tensor:
    off = torch.ones(classes - 1, dtype=F64)
    return torch.diag(off, 1) + torch.diag(off, -1)


def random_graph(classes: int, seed: int) -> Tensor:
    w = torch.rand(classes, classes, generator=generator(seed), dtype=F64)
    w = torch.triu(w * (w > 0.4), 1) + torch.triu(0.1 * chain(classes), 1)
    return w + w.T


def edges_of(graph: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The incidence matrix B (C, E) with B m the divergence of a flow m, the conductances (E,), and the ends (E, 2)."""
    ends = [(i, j) for i, j in combinations(range(len(graph)), 2) if graph[i, j] > 0]
    B = torch.zeros(len(graph), len(ends), dtype=F64)
    for e, (i, j) in enumerate(ends):
        B[i, e], B[j, e] = -1.0, 1.0
    return B, torch.stack([graph[i, j] for i, j in ends]), torch.tensor(ends)


def flow_cost(graph: Tensor, p: Tensor, change: Tensor) -> Tensor:
    """The definition, min Σ mₑ²/(wₑ θₑ(p)) over flows m with B m = ṗ, as a least-norm problem without a Laplacian."""
    B, w, ends = edges_of(graph)
    root = (w * p[ends].mean(-1)).sqrt()  # m = root · z, cost ‖z‖²
    z = torch.linalg.pinv(B * root) @ change
    return z.square().sum()


def dense(metric, outputs: Tensor) -> Tensor:
    """M(η) of one event as a matrix."""
    units = torch.eye(outputs.shape[-1], dtype=outputs.dtype)
    return metric(outputs)(units).mT


def dense_twin(graph: Tensor, logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    S = torch.diag(p) - torch.outer(p, p)
    L = torch.zeros(len(p), len(p), dtype=F64)
    for i, j in combinations(range(len(p)), 2):
        e = torch.zeros(len(p), dtype=F64)
        e[i], e[j] = 1.0, -1.0
        L += graph[i, j] * (p[i] + p[j]) / 2 * torch.outer(e, e)
    return S @ torch.linalg.pinv(L, hermitian=True) @ S


# ------------------------------------------------------------------------------------------------------------- normals


def test_gaussian_metric_is_the_squared_distance_of_the_means():
    # with one variance W₂² = ‖m − m'‖² exactly
    outputs, d = randn(5, 3, seed=0), randn(5, 3, seed=1)
    for variance in (0.1, 7.0):
        u = wasserstein(families.Gaussian(variance))(outputs)(d)
        torch.testing.assert_close((d * u).sum(-1), d.square().sum(-1), rtol=1e-14, atol=0)


def bures_squared(old: Tensor, new: Tensor) -> Tensor:
    """W₂² of normals by the general formula, ‖m − m'‖² + tr(Σ + Σ' − 2(Σ^½ Σ' Σ^½)^½)."""
    (m, log_s), (n, log_t) = old.chunk(2, -1), new.chunk(2, -1)
    A, B = torch.diag(torch.exp(2 * log_s)), torch.diag(torch.exp(2 * log_t))

    def root(M: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(M)
        return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T

    return (m - n).square().sum() + torch.trace(A + B - 2 * root(root(A) @ B @ root(A)))


def test_diagonal_gaussian_metric_is_the_second_order_of_the_distance():
    outputs, d = randn(6, seed=2), randn(6, seed=3)
    quadratic = d @ wasserstein(families.DiagonalGaussian())(outputs)(d)
    errors = [
        abs(float(bures_squared(outputs, outputs + t * d) - t**2 * quadratic)) for t in (0.1, 0.05, 0.025, 0.0125)
    ]
    ratios = [a / b for a, b in pairwise(errors)]
    assert errors[0] < 0.5 * float(0.01 * quadratic)
    assert all(7.0 < ratio < 9.0 for ratio in ratios), ratios  # third order: 2³


def test_diagonal_gaussian_metric_against_the_hessian_of_the_distance():
    outputs = randn(4, seed=4)

    def half_distance(new: Tensor) -> Tensor:
        (m, s), (n, t) = outputs.chunk(2), new.chunk(2)
        return 0.5 * ((m - n).square() + (s.exp() - t.exp()).square()).sum()

    H = torch.autograd.functional.hessian(half_distance, outputs)
    torch.testing.assert_close(dense(wasserstein(families.DiagonalGaussian()), outputs), H, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_complete_graph_closed_form_equals_the_dense_twin(classes):
    for seed in range(5):
        logits = 2 * randn(classes, seed=seed)
        M = dense(wasserstein(families.Categorical()), logits)
        torch.testing.assert_close(M, dense_twin(complete(classes), logits), rtol=1e-10, atol=1e-12)
        explicit = dense(wasserstein(families.Categorical(), complete(classes)), logits)
        torch.testing.assert_close(M, explicit, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_graph_equals_the_dense_twin(seed):
    graph, logits = random_graph(6, seed), 2 * randn(6, seed=seed + 10)
    M = dense(wasserstein(families.Categorical(), graph), logits)
    torch.testing.assert_close(M, dense_twin(graph, logits), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("unit", [1e-200, 1e-16, 1e-12, 1e-4, 1e4, 1e14, 1e20, 1e200])
@pytest.mark.parametrize("graph", [complete(5), chain(5), random_graph(5, 7)], ids=["complete", "chain", "random"])
def test_squared_distances_go_with_one_over_the_conductances(graph, unit):
    metric, scaled = (wasserstein(families.Categorical(), w) for w in (graph, graph * unit))
    old, new = randn(3, 5, seed=11), randn(3, 5, seed=12)
    torch.testing.assert_close(scaled(old)(new) * unit, metric(old)(new), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(scaled.divergence(old, new) * unit, metric.divergence(old, new), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("graph", [complete(5), chain(5), random_graph(5, 7)], ids=["complete", "chain", "random"])
def test_metric_is_the_cost_of_the_cheapest_flow(graph):
    logits, u = randn(5, seed=20), randn(5, seed=21)
    p = logits.softmax(-1)
    change = torch.func.jvp(lambda x: x.softmax(-1), (logits,), (u,))[1]
    cost = u @ wasserstein(families.Categorical(), graph)(logits)(u)
    torch.testing.assert_close(cost, flow_cost(graph, p, change), rtol=1e-10, atol=1e-12)


def benamou_brenier_squared(graph: Tensor, start: Tensor, end: Tensor, pieces: int = 16) -> Tensor:
    """W₂² by its definition: the least action ∫ Σ mₑ²/(wₑ θₑ(p)) dt of flows from ``start`` to ``end`` in time 1."""
    B, w, ends = edges_of(graph)
    cycles = torch.linalg.svd(B).Vh[torch.linalg.matrix_rank(B) :]
    even = torch.linalg.pinv(B) @ (end - start)
    # the mean flow is fixed up to circulation, the deviations from it in time are free
    x = torch.zeros(pieces, len(w), dtype=F64, requires_grad=True)
    c = torch.zeros(len(cycles), dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [x, c], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, history_size=50, line_search_fn="strong_wolfe"
    )
    scale = float((end - start).norm())

    def action() -> Tensor:
        m = even + scale * (x - x.mean(0) + c @ cycles)
        moved = m @ B.T / pieces
        middle = start + moved.cumsum(0) - 0.5 * moved
        return (m.square() / (w * middle[:, ends].mean(-1))).sum() / pieces

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = action() / scale**2
        value.backward()
        return value

    optimizer.step(closure)
    return action().detach()


@pytest.mark.parametrize("graph", [complete(3), chain(4)], ids=["complete", "chain"])
def test_metric_is_the_second_order_of_the_distance_on_the_graph(graph):
    n = len(graph)
    logits, d = 0.5 * randn(n, seed=30), randn(n, seed=31)
    quadratic = d @ wasserstein(families.Categorical(), graph)(logits)(d)
    steps = (0.4, 0.2, 0.1)
    errors = [
        abs(float(benamou_brenier_squared(graph, logits.softmax(-1), (logits + t * d).softmax(-1)) - t**2 * quadratic))
        for t in steps
    ]
    assert errors[-1] < 0.1 * float(steps[-1] ** 2 * quadratic)
    for a, b in pairwise(errors):
        assert 6.0 < a / b < 10.5, errors  # third order: 2³


def test_distance_on_two_nodes_in_closed_form():
    # θ = (p₁ + p₂)/2 = ½ throughout: W₂² = 2 (Δp)²/w
    start, end, w = torch.tensor([0.9, 0.1], dtype=F64), torch.tensor([0.2, 0.8], dtype=F64), 0.7
    assert float(benamou_brenier_squared(w * complete(2), start, end)) == pytest.approx(2 * 0.7**2 / w, rel=1e-10)


def test_bernoulli_is_the_graph_of_two_nodes():
    logit, u = randn(4, seed=40), randn(4, seed=41)
    pair = torch.stack([torch.zeros_like(logit), logit], -1)
    two = wasserstein(families.Categorical())(pair)(torch.stack([torch.zeros_like(u), u], -1))[..., 1]
    torch.testing.assert_close(wasserstein(families.Bernoulli())(logit)(u), two, rtol=1e-12, atol=1e-14)


def test_multicategorical_is_block_diagonal():
    logits = randn(5, seed=42)
    M = dense(wasserstein(families.MultiCategorical([2, 3])), logits)
    blocks = [dense(wasserstein(families.Categorical()), part) for part in logits.split([2, 3])]
    torch.testing.assert_close(M, torch.block_diag(*blocks), rtol=1e-14, atol=0)


def test_far_classes_cost_more_on_a_chain_and_not_for_fisher():
    logits = torch.zeros(5, dtype=F64)
    near, far = torch.zeros(2, 5, dtype=F64)
    near[0], near[1], far[0], far[4] = -1.0, 1.0, -1.0, 1.0
    metric = wasserstein(families.Categorical(), chain(5))(logits)
    assert float(far @ metric(far)) == pytest.approx(4 * float(near @ metric(near)), rel=1e-12)  # four edges in series
    fisher = families.Categorical().metric(logits)
    torch.testing.assert_close(far @ fisher(far), near @ fisher(near))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 8), spread=st.floats(0.1, 4.0), explicit=st.booleans())
def test_metric_is_symmetric_semi_definite_and_blind_to_a_common_constant(seed, classes, spread, explicit):
    logits = spread * randn(classes, seed=seed)
    graph = random_graph(classes, seed) if explicit else None
    metric = wasserstein(families.Categorical(), graph)
    M = dense(metric, logits)
    scale = float(M.abs().max())
    assert float((M - M.T).abs().max()) <= 1e-12 * scale
    assert float(torch.linalg.eigvalsh(M).min()) >= -1e-12 * scale
    assert float((M @ torch.ones(classes, dtype=F64)).abs().max()) <= 1e-10 * scale
    torch.testing.assert_close(dense(metric, logits + 3.0), M, rtol=1e-9, atol=1e-12 * scale)


def test_forbidden_class_carries_nothing_on_the_complete_graph():
    logits = torch.tensor([0.3, float("-inf"), -0.4], dtype=F64)
    M = dense(wasserstein(families.Categorical()), logits)
    assert bool(torch.isfinite(M).all())
    assert float(M[1].abs().max()) == 0.0


def test_empty_classes_leave_the_chain_finite_and_dear_to_cross():
    # the tail of a confident classifier costs nothing; moving mass over empty classes costs almost everything
    tail = torch.tensor([0.0, 0.0, -1e3, -1e3], dtype=F64)
    M = dense(wasserstein(families.Categorical(), chain(4)), tail)
    torch.testing.assert_close(M[:2, :2], dense(wasserstein(families.Categorical()), tail[:2]), rtol=1e-10, atol=1e-12)
    assert float(M[2:].abs().max()) < 1e-12
    gap = torch.tensor([0.0, -1e3, -1e3, 0.0], dtype=F64)
    M = dense(wasserstein(families.Categorical(), chain(4)), gap)
    assert 1e10 < float(M[0, 0]) < 1e13


@pytest.mark.parametrize("gap", [4.0, 12.0, 16.0])
@pytest.mark.parametrize("explicit", [False, True])
def test_saturated_classes_keep_the_digits_of_the_metric(gap, explicit):
    """In float32 against the closed form in float64, where S has lost nothing at such gaps."""
    logits = torch.tensor([gap, 0.0, -1.0, 0.5])
    metric = wasserstein(families.Categorical(), complete(4) if explicit else None)
    twin = dense(wasserstein(families.Categorical()), logits.double())
    # among the rare classes the metric is of the third order in their share, and is what rounding leaves of the second
    torch.testing.assert_close(dense(metric, logits).double(), twin, rtol=1e-5, atol=1e-6 * float(twin.max()))


def test_saturated_classes_keep_their_digits_in_float64_too():
    """With all but a share ε of the probability in one class, S = ε[[1, −1], [−1, 1]] and L = ½[[1, −1], [−1, 1]]."""
    for gap in (30.0, 40.0, 60.0):
        logits, share = torch.tensor([gap, 0.0], dtype=F64), float(torch.tensor(-gap, dtype=F64).sigmoid())
        expected = 2 * share**2 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=F64)
        for graph in (None, complete(2)):
            M = dense(wasserstein(families.Categorical(), graph), logits)
            torch.testing.assert_close(M, expected, rtol=1e-10, atol=0)
        bit = wasserstein(families.Bernoulli())(logits[:1])(torch.ones(1, dtype=F64))
        torch.testing.assert_close(bit, expected[0, :1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("logit", [-20.0, -3.0, 3.0, 20.0])
def test_certain_bits_keep_the_digits_of_their_distance(logit):
    old = torch.tensor([[logit]])
    new = old + 0.01
    distance, exact = (
        wasserstein(families.Bernoulli()).divergence(*pair) for pair in ((old, new), (old.double(), new.double()))
    )
    torch.testing.assert_close(distance.double(), exact, rtol=1e-3, atol=0)
    p, q = 1 / (1 + torch.exp(logit * torch.tensor([-1.0, 1.0], dtype=F64)))
    change = p * torch.expm1(new.double() - old.double()) * q  # to first order
    torch.testing.assert_close(exact, change.square()[:, 0], rtol=0.05, atol=0)


# ---------------------------------------------------------------------------------------- the same pull-back operator


def network(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


CASES = {
    "gaussian": (families.Gaussian(0.2), None, 2),
    "diagonal gaussian": (families.DiagonalGaussian(), None, 4),
    "bernoulli": (families.Bernoulli(), None, 3),
    "complete graph": (families.Categorical(), None, 4),
    "chain": (families.Categorical(), chain(4), 4),
    "multicategorical": (families.MultiCategorical([2, 3]), None, 5),
    "product": (
        families.Product(
            [families.Categorical(), families.Product([families.Gaussian(0.2), families.Bernoulli()], [2, 1])],
            [3, 3],
        ),
        None,
        6,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pull_back_through_a_network_equals_the_dense_twin(case):
    family, graph, width = CASES[case]
    model, inputs, metric = network(width), randn(6, 3, seed=50), wasserstein(family, graph)
    F = Fisher(model, inputs, family, metric=metric)
    parameters = dict(model.named_parameters())
    J = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (inputs,)))(parameters)
    J = torch.cat([J[name].flatten(2) for name in parameters], -1).detach()
    M = torch.stack([dense(metric, row) for row in F.outputs])
    twin = torch.einsum("ndp,nde,neq->pq", J, M, J) / len(inputs)
    v = randn(F.shape[0], 3, seed=51)
    torch.testing.assert_close(F @ v, twin @ v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(F.dense(), twin, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(F.diagonal(), twin.diagonal(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(F.quadratic(v[:, 0]), v[:, 0] @ twin @ v[:, 0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_natural_step_takes_the_metric_and_respects_the_radius(case):
    family, graph, width = CASES[case]
    model, inputs = network(width), randn(32, 3, seed=52)
    targets = family.sample(model(inputs) + 1.0, generator(53))
    radius, damping = 1e-4, 1e-3
    report = natural_step(
        model,
        inputs,
        family,
        lambda outputs: family.log_likelihood(outputs, targets).mean(),
        trust_region=TrustRegion(radius, backtrack=False),
        damping=damping,
        solver=partial(conjugate_gradient, max_iterations=200, rtol=1e-10),
        metric=wasserstein(family, graph),
    )
    assert report.accepted
    assert report.actual_gain == pytest.approx(report.predicted_gain, rel=0.1)
    # the radius bounds ½W₂² here, together with what damping takes
    assert report.predicted_kl + 0.5 * damping * report.step_norm**2 == pytest.approx(radius, rel=1e-9)
    assert report.predicted_kl > 0.1 * radius


@pytest.mark.parametrize("case", CASES)
def test_natural_step_equals_the_dense_twin_and_reports_its_own_divergence(case):
    family, graph, width = CASES[case]
    model, inputs = network(width), randn(32, 3, seed=54)
    targets = family.sample(model(inputs) + 1.0, generator(55))
    metric, damping = wasserstein(family, graph), 1e-2
    parameters = list(model.parameters())
    before, old = torch.nn.utils.parameters_to_vector(parameters).detach().clone(), model(inputs).detach()
    J = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (inputs,)))(dict(model.named_parameters()))
    J = torch.cat([j.flatten(2) for j in J.values()], -1).detach()
    M = torch.stack([dense(metric, row) for row in old])
    G = torch.einsum("ndp,nde,neq->pq", J, M, J) / len(inputs) + damping * torch.eye(len(before), dtype=F64)
    loss = family.log_likelihood(model(inputs), targets).mean()
    g = torch.cat([x.flatten() for x in torch.autograd.grad(loss, parameters)])
    s = torch.linalg.solve(G, g)

    radius = 0.5  # so far that the model is wrong and the search has work to do
    report = natural_step(
        model,
        inputs,
        family,
        lambda outputs: family.log_likelihood(outputs, targets).mean(),
        trust_region=TrustRegion(radius),
        damping=damping,
        solver=partial(conjugate_gradient, max_iterations=500, rtol=1e-14),
        metric=metric,
    )
    assert report.accepted
    length = (2 * radius / float(s @ G @ s)) ** 0.5 * 0.8**report.backtracks
    moved = torch.nn.utils.parameters_to_vector(parameters).detach() - before
    torch.testing.assert_close(moved, length * s, rtol=1e-8, atol=1e-10)
    distance = float(metric.divergence(old, model(inputs).detach()).mean())
    assert report.kl == pytest.approx(distance, rel=1e-10)
    assert distance <= radius
    assert report.kl != pytest.approx(float(family.kl(old, model(inputs).detach()).mean()), rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_divergence_has_the_metric_as_its_second_order(case):
    family, graph, width = CASES[case]
    metric, outputs, d = wasserstein(family, graph), randn(5, width, seed=56), randn(5, width, seed=57)
    quadratic = 0.5 * (d * metric(outputs)(d)).sum(-1)
    assert float(metric.divergence(outputs, outputs).abs().max()) == 0.0
    errors = [float((metric.divergence(outputs, outputs + t * d) - t**2 * quadratic).abs().max()) for t in (0.1, 0.05)]
    if isinstance(family, families.Gaussian):
        assert max(errors) < 1e-14  # exact at any length
    else:
        assert 6.0 < errors[0] / errors[1] < 10.0, errors  # third order: 2³


def test_divergence_of_normals_is_half_the_squared_distance():
    old, new = randn(7, 6, seed=58), randn(7, 6, seed=59)
    want = 0.5 * torch.stack([bures_squared(a, b) for a, b in zip(old, new)])
    torch.testing.assert_close(wasserstein(families.DiagonalGaussian()).divergence(old, new), want, rtol=1e-10, atol=0)
    want = 0.5 * (new - old).square().sum(-1)
    torch.testing.assert_close(wasserstein(families.Gaussian(0.3)).divergence(old, new), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("graph", [complete(5), chain(5), random_graph(5, 8)], ids=["complete", "chain", "random"])
def test_divergence_of_classes_is_the_mean_cost_of_the_change_at_both_ends(graph):
    old, new = 2 * randn(5, seed=60), 2 * randn(5, seed=61)
    p, q = old.softmax(-1), new.softmax(-1)
    want = 0.25 * (flow_cost(graph, p, q - p) + flow_cost(graph, q, q - p))
    metric = wasserstein(families.Categorical(), graph)
    torch.testing.assert_close(metric.divergence(old, new), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(metric.divergence(new, old), want, rtol=1e-10, atol=1e-12)  # symmetric


@pytest.mark.parametrize("graph", [complete(3), chain(4)], ids=["complete", "chain"])
@pytest.mark.parametrize("seed", range(3))
def test_divergence_of_classes_bounds_half_the_squared_distance(graph, seed):
    old, new = randn(len(graph), seed=62 + seed), randn(len(graph), seed=72 + seed)
    bound = float(wasserstein(families.Categorical(), graph).divergence(old, new))
    # the discretised action is that of one path, up to the error of its 16 pieces
    half = 0.5 * float(benamou_brenier_squared(graph, old.softmax(-1), new.softmax(-1)))
    assert half <= bound * (1 + 1e-3)
    assert bound < 1.5 * half


def test_divergence_of_bits_and_of_several_classes_is_that_of_their_graphs():
    old, new = randn(4, 3, seed=63), randn(4, 3, seed=64)
    pairs = [torch.stack([torch.zeros_like(x), x], -1) for x in (old, new)]
    two = wasserstein(families.Categorical()).divergence(*pairs).sum(-1)
    torch.testing.assert_close(wasserstein(families.Bernoulli()).divergence(old, new), two, rtol=1e-10, atol=0)
    old, new = randn(4, 5, seed=65), randn(4, 5, seed=66)
    parts = zip(old.split([2, 3], -1), new.split([2, 3], -1))
    want = sum(wasserstein(families.Categorical()).divergence(a, b) for a, b in parts)
    several = wasserstein(families.MultiCategorical([2, 3])).divergence(old, new)
    torch.testing.assert_close(several, want, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_ngd_takes_the_step_of_the_metric(case, solver):
    family, graph, width = CASES[case]
    model, inputs = network(width), randn(32, 3, seed=67)
    targets = family.sample(model(inputs) + 1.0, generator(68))
    metric: object = "wasserstein" if graph is None else wasserstein(family, graph)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    F = Fisher(model, inputs, family, metric=wasserstein(family, graph)).dense()
    loss = -family.log_likelihood(model(inputs), targets).mean()
    g = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(model.parameters()))])
    NGD(model, family, lr=0.05, damping=1e-2, metric=metric, solver=solver, max_iterations=500, rtol=1e-13).step(
        inputs, targets
    )
    moved = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before
    want = -0.05 * torch.linalg.solve(F + 1e-2 * torch.eye(len(g), dtype=F64), g)
    torch.testing.assert_close(moved, want, rtol=1e-8, atol=1e-10)


def test_ngd_keeps_the_distance_within_max_kl_and_learns():
    # least squares with an unknown spread: the radius is in half squared units of y
    family, inputs = families.DiagonalGaussian(), randn(64, 3, seed=69)
    targets = inputs[:, :1] - 2 + randn(64, 1, seed=70)
    model, metric, radius = network(2), wasserstein(family), 0.05
    optimizer = NGD(model, family, lr=1e3, damping=1e-4, metric="wasserstein", max_kl=radius, max_iterations=50)
    losses, distances = [], []
    for _ in range(12):
        old = model(inputs).detach()
        report = optimizer.step(inputs, targets)
        assert report.accepted
        losses.append(-report.objective)
        distances.append(float(metric.divergence(old, model(inputs).detach()).mean()))
    assert max(distances) <= radius
    assert max(distances) > 0.5 * radius
    assert losses[-1] < losses[0] - 1


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (torch.ones(2, 3), "square"),
        (-chain(3), "≥ 0"),
        (torch.triu(chain(3)), "symmetric"),
        (torch.ones(3, 3), "zero diagonal"),
        (torch.block_diag(chain(2), chain(2)), r"connected.*\[2, 3\]"),
    ],
)
def test_bad_graphs_are_named(graph, message):
    with pytest.raises(ValueError, match=message):
        wasserstein(families.Categorical(), graph)


def test_bad_metrics_are_named():
    family, model = families.Categorical(), network(4)
    assert geometry("fisher", family) == FisherRao(family)
    assert geometry("fisher", families.Gaussian()) != FisherRao(families.Gaussian(2.0)), "another family's"
    assert geometry("euclidean", family) == Euclidean()
    own = wasserstein(family, chain(4))
    assert geometry(own, family) is own
    for bad in ("wassertein", "graph", None, 3, lambda outputs: lambda u: u):
        with pytest.raises(ValueError, match=r"metric must be 'fisher', 'euclidean', 'wasserstein', or a geom"):
            NGD(model, family, metric=bad)
    with pytest.raises(ValueError, match="fisher must be 'exact' with another metric; got 'sampled'"):
        NGD(model, family, metric="wasserstein", fisher="sampled")
    with pytest.raises(TypeError, match="no Wasserstein metric is known"):
        NGD(model, families.from_torch(lambda o: Poisson(o.exp()[..., 0])), metric="wasserstein")


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="graph connects the classes"):
        wasserstein(families.Gaussian(), chain(3))
    with pytest.raises(TypeError, match="no Wasserstein metric is known"):
        wasserstein(families.from_torch(lambda o: Poisson(o.exp()[..., 0])))
    with pytest.raises(ValueError, match="graph has 3 nodes, but the outputs have 4 classes"):
        wasserstein(families.Categorical(), chain(3))(torch.zeros(2, 4))


def test_the_geometry_of_a_product_is_that_of_its_parts():
    """Of a sum of squares the least is the sum of the least: W₂² of independent parts adds up."""
    parts, sizes = [families.DiagonalGaussian(), families.Categorical(), families.Bernoulli()], [4, 3, 2]
    product = wasserstein(families.Product(parts, sizes))
    old, new = randn(6, 9, seed=70), randn(6, 9, seed=71)
    each = [(wasserstein(part), *pair) for part, *pair in zip(parts, old.split(sizes, -1), new.split(sizes, -1))]
    expected = torch.stack([part.divergence(a, b) for part, a, b in each]).sum(0)
    torch.testing.assert_close(product.divergence(old, new), expected, rtol=1e-12, atol=0)
    blocks = torch.block_diag(*(dense(part, a[0]) for part, a, _ in each))
    torch.testing.assert_close(dense(product, old[0]), blocks, rtol=1e-12, atol=1e-15)
    factor = product.factor(old[0])(torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(factor.T @ factor, blocks, rtol=1e-10, atol=1e-12)


def test_a_product_with_a_part_of_no_known_geometry_is_refused():
    other = families.from_torch(lambda o: torch.distributions.Independent(torch.distributions.Poisson(o.exp()), 1))
    with pytest.raises(TypeError, match="no Wasserstein metric is known for from_torch"):
        wasserstein(families.Product([families.Categorical(), other], [3, 1]))
    with pytest.raises(ValueError, match="graph connects the classes of a Categorical, and Product"):
        wasserstein(families.Product([families.Categorical()], [4]), chain(4))


class Cooler(families.Categorical):
    """Its probabilities are those of twice the logits, and its metric is another one."""

    def log_likelihood(self, outputs, targets):
        return super().log_likelihood(2 * outputs, targets)


@pytest.mark.parametrize("family", [Cooler(), families.Product([Cooler(), families.Gaussian()], [3, 2])])
def test_a_subclass_does_not_get_the_metric_of_its_parent(family):
    with pytest.raises(TypeError, match=r"known for Cooler\(\), a Cooler\. For a subclass that has its parent's, pass"):
        wasserstein(family)


def test_a_graph_is_not_put_under_a_subclass():
    with pytest.raises(ValueError, match=r"graph connects the classes of a Categorical, and Cooler\(\) is none"):
        wasserstein(Cooler(), complete(3))
