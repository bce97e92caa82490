"""One mixin for every curvature: what the interface promises, each against a dense twin in float64 written out here."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npg import Fisher, Status, conjugate_gradient, families, natural_step
from npg.curvature import Curvature, DenseFisher, DiagonalFisher, KroneckerFisher
from npg.curvature.online import OnlinePreconditioner
from npg.optim import NGD

pytestmark = pytest.mark.usefixtures("double")
FAMILY, DECAY = families.Categorical(), 0.6


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def batch(t: int) -> Tensor:
    return randn(9, 3, seed=10 + t) * torch.tensor([0.3, 1.0, 3.0])


def weights(n: int) -> Tensor:
    """Of n batches in the mean: γᵏ for that of k updates ago."""
    w = DECAY ** torch.arange(n - 1, -1, -1.0)
    return w / w.sum()


def rows(model: nn.Module, x: Tensor) -> Tensor:
    """Of every event the rows LᵀJ, whose squares sum to its part of F: (N, C, P)."""
    parameters = list(model.parameters())
    out = []
    for event in x:
        eta = model(event)
        p = eta.detach().softmax(-1)
        J = [torch.cat([g.flatten() for g in torch.autograd.grad(e, parameters, retain_graph=True)]) for e in eta]
        values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
        out.append((vectors * values.clamp(min=0).sqrt()).T @ torch.stack(J))
    return torch.stack(out)


class CurvatureTests:
    """What holds for every curvature, in `NGD` too. A subclass says how to make one, and its twin."""

    numel = 31
    dampings = (1e-3, 0.1, 10.0)

    def make(self) -> Curvature:
        raise NotImplementedError

    def evidence(self, t: int) -> Fisher:
        return Fisher(network(), batch(t), FAMILY)

    def twin(self, n: int) -> Tensor:
        """C after n batches, (P, P)."""
        raise NotImplementedError

    def after(self, n: int) -> Curvature:
        curvature = self.make()
        for t in range(n):
            curvature.update(self.evidence(t))
        return curvature

    @pytest.mark.parametrize("n", [1, 3])
    def test_the_inverse_is_that_of_the_twin(self, n, assert_close):
        curvature, C, v = self.after(n), self.twin(n), randn(self.numel, seed=1)
        for damping in self.dampings:
            expected = torch.linalg.solve(C + damping * torch.eye(self.numel), v)
            assert_close(curvature.inverse(damping)(v), expected, scale=100)

    @pytest.mark.parametrize("n", [1, 3])
    def test_products_and_the_matrix_are_the_twin(self, n, assert_close):
        curvature, C, V = self.after(n), self.twin(n), randn(self.numel, 2, seed=2)
        assert_close(curvature.dense(), C)
        assert_close(curvature @ V, C @ V)
        assert_close(curvature @ V[:, 0], C @ V[:, 0])
        damped = C + 0.1 * torch.eye(self.numel)
        assert_close(curvature.inverse(0.1)(V), torch.linalg.solve(damped, V), scale=100)

    def test_a_solution_knows_its_model(self, assert_close):
        curvature, b = self.after(2), randn(self.numel, seed=3)
        damped = self.twin(2) + 0.1 * torch.eye(self.numel)
        solution = curvature.solve(b, damping=0.1)
        x = torch.linalg.solve(damped, b)
        assert_close(solution.x, x, scale=100)
        assert_close(solution.curvature, x @ damped @ x, scale=100)
        assert_close(solution.model_value, -0.5 * b @ x, scale=100)
        assert (solution.status, solution.iterations) == (Status.CONVERGED, 0)

    def test_an_inverse_is_of_the_batches_that_it_was_made_of(self):
        curvature, v = self.after(2), randn(self.numel, seed=4)
        inverse = curvature.inverse(self.dampings[0])
        before = inverse(v)
        curvature.update(self.evidence(2))
        assert torch.equal(inverse(v), before)
        assert not torch.allclose(curvature.inverse(self.dampings[0])(v), before)

    def test_it_goes_on_from_its_state_bit_for_bit(self):
        curvature, v = self.after(2), randn(self.numel, seed=5)
        state = curvature.state_dict()
        indices = sorted(i for key in state for i in key)
        assert indices == list(range(len(list(network().parameters())))), "each parameter once"
        other = self.make()
        assert all(set(block) <= set(curvature.fields) for block in state.values())
        other.parameters = curvature.parameters
        other.load_state_dict(state)
        damping = self.dampings[0]
        assert torch.equal(other.inverse(damping)(v), curvature.inverse(damping)(v))
        for c in (curvature, other):
            c.update(self.evidence(2))
        assert torch.equal(other.inverse(damping)(v), curvature.inverse(damping)(v))

    def test_a_state_brings_back_what_was(self):
        """That is how a step which is refused leaves no trace."""
        curvature, v, damping = self.after(2), randn(self.numel, seed=6), self.dampings[0]
        before, state = curvature.inverse(damping)(v), curvature.state_dict()
        curvature.update(self.evidence(2))
        curvature.load_state_dict(state)
        assert torch.equal(curvature.inverse(damping)(v), before)

    def test_an_update_that_fails_changes_nothing(self):
        """Of a model with a tensor of the same name and another shape."""
        curvature, v, damping = self.after(2), randn(self.numel, seed=6), self.dampings[0]
        before, wide = curvature.inverse(damping)(v), nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        with pytest.raises(ValueError, match=r"learnt of '0\.weight' is of the shape \(4, 3\), but it has \(4, 5\): "):
            curvature.update(Fisher(wide, randn(9, 5, seed=0), FAMILY))
        assert torch.equal(curvature.inverse(damping)(v), before)
        curvature.update(self.evidence(2))
        assert torch.equal(curvature.inverse(damping)(v), self.after(3).inverse(damping)(v))

    @pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
    def test_dampings_that_are_refused(self, damping):
        with pytest.raises(ValueError, match="damping must"):
            self.after(1).inverse(damping)

    @pytest.mark.parametrize("role", ["solver", "preconditioner"])
    def test_in_an_optimizer(self, role, assert_close):
        model, twin = network(), network()
        options = {"solver": self.make()} if role == "solver" else {"preconditioner": self.make()}
        accurate = {"max_iterations": 500, "rtol": 1e-13} if role == "preconditioner" else {}
        optimizer = NGD(model, FAMILY, lr=0.2, damping=0.1, **options, **accurate)
        curvature = self.make()
        for t in range(3):
            x, y = batch(t), torch.arange(9) % 3
            loss = -FAMILY.log_likelihood(twin(x), y).mean()
            g = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(twin.parameters()))])
            F = Fisher(twin, x, FAMILY)
            curvature.update(F)
            C = curvature.dense() if role == "solver" else F.dense()
            with torch.no_grad():
                theta = nn.utils.parameters_to_vector(twin.parameters())
                theta = theta - 0.2 * torch.linalg.solve(C + 0.1 * torch.eye(self.numel), g)
                nn.utils.vector_to_parameters(theta, twin.parameters())
            assert optimizer.step(x, y).accepted
            assert_close(nn.utils.parameters_to_vector(model.parameters()).detach(), theta, scale=100)
        state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
        assert not optimizer.step(x * float("nan"), y).accepted
        assert all(torch.equal(optimizer.state[p][k], v) for p, s in state.items() for k, v in s.items())
        resumed = network()
        resumed.load_state_dict(model.state_dict())
        again = NGD(resumed, FAMILY, lr=0.2, damping=0.1, **{role: self.make()}, **accurate)
        again.load_state_dict(optimizer.state_dict())
        for one in (optimizer, again):
            one.step(batch(4), y)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


class TestDense(CurvatureTests):
    def make(self):
        return DenseFisher(decay=DECAY)

    def twin(self, n):
        parts = [rows(network(), batch(t)).flatten(0, 1) for t in range(n)]
        return sum(w * r.T @ r / 9 for w, r in zip(weights(n), parts))

    def test_without_damping_it_is_the_pseudo_inverse(self, assert_close):
        C, v = self.twin(1), randn(self.numel, seed=7)  # 18 rows, 31 parameters
        assert_close(self.after(1).inverse(0.0)(C @ v), torch.linalg.pinv(C, rtol=1e-12) @ (C @ v), scale=1e4)


class TestDiagonal(CurvatureTests):
    def make(self):
        return DiagonalFisher(decay=DECAY, probes=None)

    def twin(self, n):
        parts = [rows(network(), batch(t)).flatten(0, 1) for t in range(n)]
        return torch.diag(sum(w * r.square().sum(0) / 9 for w, r in zip(weights(n), parts)))


class TestKronecker(CurvatureTests):
    """Of the two layers of the network, whose inputs and gradients are written out here."""

    corrected = False

    def make(self):
        return KroneckerFisher(corrected=self.corrected, decay=DECAY, probes=None)

    def factors(self, n: int) -> list[tuple[Tensor, Tensor]]:
        first, activation, last = model = network()
        pairs = []
        for layer in (first, last):
            A, G = 0.0, 0.0
            for t, w in enumerate(weights(n)):
                x = batch(t)
                inputs = x if layer is first else activation(first(x))
                bar = torch.cat([inputs, torch.ones(9, 1)], 1).detach()
                # the derivative in the bias is that at the layer's output
                start = sum(p.numel() for p in first.parameters()) if layer is last else 0
                start, width = start + layer.weight.numel(), len(layer.bias)
                g = rows(model, x).flatten(0, 1)[:, start : start + width]
                A, G = A + w * bar.T @ bar / 9, G + w * g.T @ g / 9
            pairs.append((A, G))
        return pairs

    def positions(self) -> list[Tensor]:
        """Of each layer, the places of [W, b], row by row, in the vector of all."""
        ends = torch.tensor([0, *(p.numel() for p in network().parameters())]).cumsum(0).tolist()
        spans = [torch.arange(a, b) for a, b in pairwise(ends)]
        pairs = ((spans[0], spans[1]), (spans[2], spans[3]))
        return [torch.cat([w.view(len(b), -1), b.unsqueeze(1)], 1).flatten() for w, b in pairs]

    def block(self, A: Tensor, G: Tensor, exact: Tensor) -> Tensor:
        return torch.kron(G, A)

    def twin(self, n):
        C = torch.zeros(self.numel, self.numel)
        r = rows(network(), batch(n - 1)).flatten(0, 1)
        for (A, G), at in zip(self.factors(n), self.positions()):
            C[at.unsqueeze(1), at] = self.block(A, G, r[:, at].T @ r[:, at] / 9)
        return C


class TestCorrected(TestKronecker):
    corrected = True

    def block(self, A, G, exact):
        """Of all that are diagonal in the basis of the factors, the nearest to the block of F of this batch."""
        basis = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
        return basis @ torch.diag((basis.T @ exact @ basis).diagonal()) @ basis.T


@pytest.mark.parametrize(
    ("kind", "field", "size"), [(DiagonalFisher, "values", "(4, 3)"), (DenseFisher, "matrix", "(31, 31)")]
)
def test_a_loaded_state_of_other_shapes_fails_by_name_and_stays(kind, field, size):
    curvature, fisher = kind(decay=DECAY), Fisher(network(), batch(0), FAMILY)
    curvature.update(fisher)
    key, block = next(iter(curvature.state_dict().items()))
    wrong = {**curvature.state_dict(), key: {**block, field: torch.ones(2, 2)}}
    curvature.load_state_dict(wrong)
    with pytest.raises(ValueError, match=rf"is of the shape \(2, 2\), but it has {re.escape(size)}: give the state of"):
        curvature.update(fisher)
    assert torch.equal(curvature.blocks[key][field], torch.ones(2, 2))


# ------------------------------------------------------------------------------------------------- solvers by name


class Halved(DiagonalFisher):
    """A user's own."""

    name = "halved"

    def inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        whole = super().inverse(damping)
        return lambda v: 0.5 * whole(v)


class Latest(DenseFisher):
    """Without options."""

    def __init__(self) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("dense", DenseFisher()),
        ("diagonal", DiagonalFisher(decay=0.8, probes=None)),
        ("diagonal", DiagonalFisher),
        ("kfac", KroneckerFisher(decay=0.8, probes=None)),
        ("kfac", KroneckerFisher),
        ("ekfac", KroneckerFisher(decay=0.8, probes=None, corrected=True)),
        (DenseFisher(decay=0.8), DenseFisher),
        (DenseFisher(), Latest),
        ("cg", lambda A, b, *, x0, damping: conjugate_gradient(A, b, x0=x0, damping=damping, max_iterations=7, rtol=0)),
    ],
)
def test_names_are_short_for_functions_and_curvatures(short, long, assert_close):
    ends = []
    for solver in (short, long):
        model = network()
        options = {"factor_decay": 0.8, "probes": None, "max_iterations": 7, "rtol": 0.0}
        optimizer = NGD(model, FAMILY, lr=0.3, damping=0.1, solver=solver, **options)
        for t in range(3):
            optimizer.step(batch(t), torch.arange(9) % 3)
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert_close(ends[1], ends[0], scale=100)


def test_a_curvature_of_ones_own(assert_close):
    ends = []
    for solver, lr in ((Halved(probes=None), 0.4), (DiagonalFisher(probes=None), 0.2)):
        model = network()
        NGD(model, FAMILY, lr=lr, damping=0.1, solver=solver).step(batch(0), torch.arange(9) % 3)
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert_close(ends[0], ends[1])
    model, y = network(), torch.arange(9) % 3
    fisher = Fisher(model, batch(0), FAMILY)
    report = natural_step(
        model,
        batch(0),
        FAMILY,
        lambda o: FAMILY.log_likelihood(o, y).mean(),
        learning_rate=0.4,
        damping=0.1,
        solver=lambda A, b, *, x0, damping: Halved(fisher, probes=None).solve(b, damping=damping),
    )
    assert report.accepted


FACTORS = OnlinePreconditioner([torch.zeros(3)], [{}])  # of gradients, for an optimizer of its own


@pytest.mark.parametrize(
    "solver", ["kaldi", 3, None, NGD, nn.Linear(1, 1).weight, OnlinePreconditioner, FACTORS, lambda A, b: b]
)
def test_what_is_no_solver_is_named(solver):
    known = r"solver must be 'cg', 'dense', 'diagonal', 'kfac', 'ekfac', a function of npg\.solvers, or a curvature"
    with pytest.raises(ValueError, match=known):
        NGD(network(), FAMILY, solver=solver)


def test_what_is_no_preconditioner_is_named():
    for wrong in ("diagonal", conjugate_gradient, NGD, OnlinePreconditioner, FACTORS):
        with pytest.raises(ValueError, match=r"preconditioner must be None, 'kfac', 'ekfac', or a curvature"):
            NGD(network(), FAMILY, preconditioner=wrong)
    with pytest.raises(ValueError, match=r"preconditioner must be None without solver='cg'"):
        NGD(network(), FAMILY, preconditioner="kfac", solver=DiagonalFisher())


@pytest.mark.parametrize("kind", [DiagonalFisher, KroneckerFisher], ids=lambda kind: kind.__name__)
def test_what_was_learnt_of_a_parameter_stays_with_it_when_another_is_frozen(kind: type[Any]) -> None:
    """Two layers of one shape: without the first, the second keeps its own average; thawed, the first begins anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    curvature, second = kind(decay=0.95, probes=None), slice(12, None)
    v = randn(12, seed=5)

    def update() -> Curvature:
        curvature.update(Fisher(model, batch(0), FAMILY))
        return curvature

    expected = (update() @ torch.cat([0 * v, v]))[second]
    model[0].requires_grad_(False)
    torch.testing.assert_close(update() @ v, expected)  # the same batch: its average is itself
    model[0].requires_grad_(True)
    torch.testing.assert_close((update() @ torch.cat([0 * v, v]))[second], expected)
