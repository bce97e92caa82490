"""Online low-rank factors against an explicit float64 matrix twin, and their invariants."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npg.curvature.online import (
    DELTA,
    INITIAL_PASSES,
    TINY,
    Factors,
    OnlinePreconditioner,
    initial_factors,
    update_factors,
)

ALPHA, ETA = 4.0, 0.1
SHAPES = [(12,), (7, 5), (6, 4, 3, 3), (6, 4, 3, 3), (1, 8), (2, 3, 1), (), (9, 40)]
STREAMS = ["generic", "dominated", "rank-deficient", "zeros", "bursts"]


class DenseTwin:
    """One axis: F, T, Z and G as matrices, G⁻¹ by inversion. Nothing here is clever."""

    def __init__(self, dim: int, rank: int) -> None:
        self.dim, self.rank = dim, rank
        basis = np.zeros((rank, dim))
        for j in range(dim):
            basis[j % rank, j] = 1.1 if j < rank else 1.0
        self.r = basis / np.linalg.norm(basis, axis=1, keepdims=True)
        self.d, self.rho = np.full(rank, TINY), TINY

    def fisher(self) -> np.ndarray:
        return self.r.T @ np.diag(self.d) @ self.r + self.rho * np.eye(self.dim)

    def precondition(self, x: np.ndarray) -> np.ndarray:
        fisher = self.fisher()
        g = fisher + ALPHA / self.dim * np.trace(fisher) * np.eye(self.dim)
        # G is inverted at the scale of 1: F of a tensor that has seen zeros alone is 1e-30.
        out = x @ np.linalg.inv(g / np.trace(g))
        return out * np.linalg.norm(x) / np.linalg.norm(out) if x.any() else x

    def update(self, x: np.ndarray) -> None:
        s = x.T @ x / len(x)
        self.d = np.maximum(self.d, DELTA * ETA * np.trace(s))
        self.rho = max(self.rho, DELTA * ETA * np.trace(s))
        t = ETA * s + (1 - ETA) * self.fisher()
        y = self.r @ t
        scale = np.linalg.norm(y)
        c, u = np.linalg.eigh(y @ y.T / scale**2)
        root = scale * np.maximum(np.sqrt(np.maximum(c, 0)), (1 - ETA) * self.rho / scale)
        self.r = np.diag(1 / root) @ u.T @ y
        rho = (np.trace(t) - root.sum()) / (self.dim - self.rank)
        floor = max(TINY, DELTA * root.max())
        self.d, self.rho = np.maximum(root - rho, floor), max(rho, floor)


class TensorTwin:
    """All axes of one tensor in turn, each read as a matrix by an explicit permutation."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.axes = {i: DenseTwin(dim, (dim + 1) // 2) for i, dim in enumerate(shape) if dim > 1}

    def __call__(self, gradient: np.ndarray, update: bool, first: bool) -> np.ndarray:
        for axis, twin in self.axes.items():
            moved = np.moveaxis(gradient, axis, -1)
            x = moved.reshape(-1, twin.dim)
            for _ in range(INITIAL_PASSES if first else 0):
                twin.update(x)
            out = twin.precondition(x)
            if update:
                twin.update(x)
            gradient = np.moveaxis(out.reshape(moved.shape), -1, axis)
        return gradient


def gradients(stream: str, steps: int, shapes=SHAPES, dtype=torch.float64) -> list[list[torch.Tensor]]:
    """`steps` lists of gradients, with persistent structure along every axis."""
    generator = torch.Generator().manual_seed(STREAMS.index(stream))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    profiles = [[normal(dim).exp() for dim in shape] for shape in shapes]
    spikes = [normal(*shape) for shape in shapes]
    out = []
    for t in range(steps):
        row = []
        for shape, profile, spike in zip(shapes, profiles, spikes, strict=True):
            g = normal(*shape)
            for axis, p in enumerate(profile):
                g = g * p.view(-1, *[1] * (len(shape) - 1 - axis))
            if stream == "dominated":
                g = 0.01 * g + 10 * spike * normal(1).item()
            elif stream == "rank-deficient":
                for axis in range(len(shape)):
                    g = g.sum(axis, keepdim=True) * profile[axis].view(-1, *[1] * (len(shape) - 1 - axis))
            elif stream == "zeros" and (t == 0 or torch.rand((), generator=generator) < 1 / 3):
                g = torch.zeros(shape, dtype=torch.float64)
            elif stream == "bursts":
                g = g * 10 ** torch.empty(()).uniform_(-3, 3, generator=generator).item()
            row.append((1e-3 * g).to(dtype))
        out.append(row)
    return out


def run(preconditioner: OnlinePreconditioner, row: list[torch.Tensor], t: int) -> list[torch.Tensor]:
    """Outputs in the order of the tensors."""
    stacked = preconditioner(row, update=t < 10 or t % 4 == 0, first=t == 0)
    out: list[torch.Tensor] = [torch.empty(0)] * len(row)
    for block, tensors in zip(preconditioner.blocks, stacked, strict=True):
        for i, tensor in zip(block.stack.indices, tensors, strict=True):
            out[i] = tensor
    return out


def dense(factors: Factors, alpha: float = ALPHA) -> torch.Tensor:
    r = factors.weight / factors.e(alpha).sqrt().unsqueeze(-1)
    eye = torch.eye(r.shape[-1], dtype=r.dtype)
    return r.mT @ torch.diag_embed(factors.d) @ r + factors.rho.view(-1, 1, 1) * eye


@pytest.mark.parametrize("stream", STREAMS)
def test_equals_the_dense_twin_for_100_steps(stream):
    states: list[dict[str, torch.Tensor]] = [{} for _ in SHAPES]
    preconditioner = OnlinePreconditioner([torch.zeros(s).double() for s in SHAPES], states)
    twins = [TensorTwin(shape) for shape in SHAPES]
    for t, row in enumerate(gradients(stream, 100)):
        update = t < 10 or t % 4 == 0
        for out, gradient, twin in zip(run(preconditioner, row, t), row, twins, strict=True):
            want = twin(gradient.numpy(), update, t == 0)
            assert np.linalg.norm(out.numpy() - want) <= 1e-10 * np.linalg.norm(want)
    for state, twin in zip(states, twins, strict=True):
        for axis, dense_twin in twin.axes.items():
            factors = Factors(*(state[f"{name}_{axis}"][None] for name in Factors._fields))
            want = dense_twin.fisher()
            assert np.linalg.norm(dense(factors)[0].numpy() - want) <= 1e-10 * np.linalg.norm(want)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_invariants_at_every_step(stream, dtype, tolerance):
    preconditioner = OnlinePreconditioner([torch.zeros(s, dtype=dtype) for s in SHAPES], [{} for _ in SHAPES])
    for t, row in enumerate(gradients(stream, 100, dtype=dtype)):
        for out, gradient in zip(run(preconditioner, row, t), row, strict=True):
            assert abs(out.norm() - gradient.norm()) <= 10 * tolerance * gradient.norm()
            assert (out * gradient).sum() >= 0
        for factors in preconditioner.factors.values():
            e = torch.diag_embed(factors.e(ALPHA))
            assert (factors.weight @ factors.weight.mT - e).abs().max() <= tolerance
            assert factors.d.min() > 0
            assert factors.rho.min() > 0


def test_update_keeps_the_trace_where_nothing_is_floored():
    generator = torch.Generator().manual_seed(0)
    dim, rank, rows = 20, 5, 200
    factors = initial_factors(1, dim, rank, ALPHA, torch.float64, torch.device("cpu"))
    scales = torch.linspace(1, 3, dim, dtype=torch.float64)
    for t in range(30):
        x = torch.randn(rows, dim, generator=generator, dtype=torch.float64) * scales
        s = x.T @ x / rows
        trace_t = ETA * s.trace() + (1 - ETA) * dense(factors)[0].trace()
        factors = update_factors(factors, factors.weight @ s, s.trace()[None], ALPHA, ETA)
        if t >= 3:  # at the start ρ and d are raised to the scale of the gradient
            assert factors.d.min() > 10 * DELTA * (factors.d + factors.rho).max(), "a floor is active: no identity"
            torch.testing.assert_close(dense(factors)[0].trace(), trace_t, rtol=1e-12, atol=0)


def test_row_space_turns_to_the_leading_eigenvectors():
    dim, rank = 12, 4
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    eigenvalues = torch.tensor([9.0, 8, 7, 6] + [0.5] * 8, dtype=torch.float64)
    s = q @ torch.diag(eigenvalues) @ q.T
    factors = initial_factors(1, dim, rank, ALPHA, torch.float64, torch.device("cpu"))
    for _ in range(200):
        factors = update_factors(factors, factors.weight @ s, s.trace()[None], ALPHA, ETA)
    torch.testing.assert_close(dense(factors)[0], s, rtol=0, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(exponent=st.floats(-6, 6), stream=st.sampled_from(STREAMS))
def test_scaling_all_gradients_scales_the_output_alone(exponent, stream):
    shapes, scale = SHAPES[:4], 10.0**exponent
    pair = [OnlinePreconditioner([torch.zeros(s).double() for s in shapes], [{} for _ in shapes]) for _ in "ab"]
    for t, row in enumerate(gradients(stream, 15, shapes)):
        for a, b in zip(run(pair[0], row, t), run(pair[1], [scale * g for g in row], t), strict=True):
            torch.testing.assert_close(scale * a, b, rtol=0, atol=1e-9 * float(b.norm()))


def test_zero_gradients_give_zeros_and_leave_usable_factors():
    shapes = [(6, 5), (8,)]
    preconditioner = OnlinePreconditioner([torch.zeros(s) for s in shapes], [{} for _ in shapes])
    for t in range(1000):
        for out in run(preconditioner, [torch.zeros(s) for s in shapes], t):
            assert not out.any()
    for t, row in enumerate(gradients("generic", 5, shapes, torch.float32)):
        for out, gradient in zip(run(preconditioner, row, t), row, strict=True):
            torch.testing.assert_close(out.norm(), gradient.norm())
            assert not torch.equal(out, gradient) or t == 0


@pytest.mark.parametrize("stream", STREAMS)
def test_a_batch_equals_one_at_a_time(stream):
    together = OnlinePreconditioner([torch.zeros(s).double() for s in SHAPES], [{} for _ in SHAPES])
    alone = [OnlinePreconditioner([torch.zeros(s).double()], [{}]) for s in SHAPES]
    for t, row in enumerate(gradients(stream, 40)):
        for a, gradient, one in zip(run(together, row, t), row, alone, strict=True):
            (b,) = run(one, [gradient], t)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * float(b.norm()))


def test_float32_follows_float64():
    pair = {
        dtype: OnlinePreconditioner([torch.zeros(s, dtype=dtype) for s in SHAPES], [{} for _ in SHAPES])
        for dtype in (torch.float32, torch.float64)
    }
    for t, row in enumerate(gradients("generic", 60, dtype=torch.float32)):
        singles = run(pair[torch.float32], row, t)
        doubles = run(pair[torch.float64], [g.double() for g in row], t)
        for a, b in zip(singles, doubles, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4 * float(b.norm()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_no_factors(bad):
    shapes = [(6, 5), (6, 5), (6,)]
    preconditioner = OnlinePreconditioner([torch.zeros(s) for s in shapes], [{} for _ in shapes])
    for t, row in enumerate(gradients("generic", 4, shapes, torch.float32)):
        run(preconditioner, row, t)
    before = {key: Factors(*(x.clone() for x in f)) for key, f in preconditioner.factors.items()}
    poisoned = [torch.full((6, 5), bad), torch.ones(6, 5), torch.full((6,), bad)]
    run(preconditioner, poisoned, 4)
    # Dimension 6 holds the axis 0 of the three tensors in order: only the middle one may have moved.
    after = next(f for key, f in preconditioner.factors.items() if key[0] == 6)
    old = next(f for key, f in before.items() if key[0] == 6)
    for a, b in zip(after, old, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[2], b[2])
    assert not torch.equal(after.weight[1], old.weight[1])


def test_factors_come_back_from_the_states():
    rows = gradients("generic", 30)
    tensors = [torch.zeros(s).double() for s in SHAPES]
    states: list[dict[str, torch.Tensor]] = [{} for _ in SHAPES]
    straight = OnlinePreconditioner(tensors, states)
    for t, row in enumerate(rows[:15]):
        run(straight, row, t)
    resumed = OnlinePreconditioner(tensors, [{k: v.clone() for k, v in s.items()} for s in states])
    for t, row in enumerate(rows[15:], start=15):
        for a, b in zip(run(straight, row, t), run(resumed, row, t), strict=True):
            assert torch.equal(a, b)


def test_rank_zero_is_the_identity():
    preconditioner = OnlinePreconditioner([torch.zeros(4, 3)], [{}], rank=0)
    gradient = torch.randn(4, 3)
    torch.testing.assert_close(run(preconditioner, [gradient], 0)[0], gradient)
    assert not preconditioner.factors


# ------------------------------------------------------------------------------------------------ the metric's root


def tracked(stream: str, alpha: float = ALPHA, steps: int = 25) -> OnlinePreconditioner:
    preconditioner = OnlinePreconditioner([torch.zeros(s).double() for s in SHAPES], [{} for _ in SHAPES], alpha=alpha)
    for t, row in enumerate(gradients(stream, steps)):
        run(preconditioner, row, t)
    return preconditioner


def axis_metric(preconditioner: OnlinePreconditioner, factors: Factors) -> torch.Tensor:
    """c β G⁻¹ of one axis from explicit matrices, (B, D, D)."""
    f = dense(factors, preconditioner.alpha)
    dim = f.shape[-1]
    eye = torch.eye(dim, dtype=f.dtype)
    trace = f.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1)
    g = f + preconditioner.alpha / dim * trace * eye
    inverse = factors.beta(preconditioner.alpha).view(-1, 1, 1) * torch.linalg.inv(g / trace) / trace
    after = (inverse @ f @ inverse).diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1)
    return (trace / after).sqrt() * inverse


@pytest.mark.parametrize("alpha", [4.0, 0.25])
@pytest.mark.parametrize("stream", STREAMS)
def test_the_root_of_the_metric_equals_its_dense_twin(stream, alpha):
    """L is symmetric and positive definite; L L is the Kronecker product of √(τ̄/τ) and c β G⁻¹ on each axis."""
    preconditioner = tracked(stream, alpha)
    root, size = preconditioner.inverse_root(), sum(preconditioner.sizes)
    matrix = torch.stack([root(column) for column in torch.eye(size).double()], 1)
    want: list[torch.Tensor] = [torch.eye(size).double() for size in preconditioner.sizes]
    square = torch.full((len(SHAPES),), torch.nan).double()
    for block in preconditioner.blocks:
        for row, i in enumerate(block.stack.indices):
            want[i] = torch.ones(1, 1).double()
            if block.axes:
                want[i] = torch.ones(1, 1).double()
                (dim, *_), factors = block.axes[0]
                square[i] = dense(factors, alpha)[row].trace() / dim
            for _, factors in block.axes:
                want[i] = torch.kron(want[i], axis_metric(preconditioner, factors)[row])
    sizes = torch.tensor(preconditioner.sizes)
    mean = (square * sizes).nansum() / sizes[~square.isnan()].sum()
    between = (mean / square.clamp_min(DELTA * mean)).sqrt().nan_to_num(1.0)
    want = [scale * metric for scale, metric in zip(between, want, strict=True)]
    twin = torch.block_diag(*want)
    scale = float(twin.abs().max())
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(matrix @ matrix, twin, rtol=0, atol=1e-10 * scale)
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_the_root_is_linear_and_stays_as_it_was_made():
    preconditioner = tracked("generic")
    root = preconditioner.inverse_root()
    a, b = torch.randn(2, sum(preconditioner.sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = root(a)
    torch.testing.assert_close(root(2 * a - 3 * b), 2 * before - 3 * root(b), rtol=1e-12, atol=1e-12)
    run(preconditioner, gradients("dominated", 1)[0], 0)
    assert torch.equal(root(a), before)
    assert not torch.equal(preconditioner.inverse_root()(a), before)


@pytest.mark.parametrize("steps", [0, 12])
def test_the_root_is_finite_before_the_first_gradient_and_after_zeros(steps):
    shapes = [(6, 5), (8,)]
    preconditioner = OnlinePreconditioner([torch.zeros(s) for s in shapes], [{} for _ in shapes])
    for t in range(steps):
        run(preconditioner, [torch.zeros(s) for s in shapes], t)
    v = torch.ones(sum(preconditioner.sizes))
    moved = preconditioner.inverse_root()(v)
    assert moved.isfinite().all()
    assert torch.dot(moved, v) > 0


@pytest.mark.parametrize("alpha", [0.0, 0.1, 40.0, 1e4])
def test_factors_of_another_alpha_precondition_by_their_f_and_the_new_alpha(alpha):
    """W = E^{1/2} R is of an alpha; F is not. The update after it, too, is that of the same R, D and ρ."""
    g = torch.Generator().manual_seed(0)
    tensors, states = [torch.zeros(40, 8, dtype=torch.float64)], [{}]
    former = OnlinePreconditioner(tensors, states, alpha=4.0)
    scales = torch.logspace(0, -2, 8).double().sqrt()
    draw = lambda: [torch.randn(40, 8, generator=g, dtype=torch.float64) * scales]  # noqa: E731
    for t in range(30):
        former(draw(), update=True, first=t == 0)
    now = OnlinePreconditioner(tensors, [{name: x.clone() for name, x in states[0].items()}], alpha=alpha)
    twins = {}
    for key, factors in former.factors.items():
        twins[key] = Factors(*(x.clone() for x in factors))
        r = factors.weight / factors.e(4.0).sqrt().unsqueeze(-1)
        twins[key].weight.copy_(twins[key].e(alpha).sqrt().unsqueeze(-1) * r)
        torch.testing.assert_close(now.factors[key].weight, twins[key].weight, rtol=1e-8, atol=1e-8)
    x = gradient = draw()[0]
    for axis, key in enumerate(now.factors):
        dim = key[0]
        assert dim == gradient.shape[axis]
        _, d, rho = twins[key]
        r = twins[key].weight[0] / twins[key].e(alpha)[0].sqrt().unsqueeze(-1)
        f = r.T @ torch.diag(d[0]) @ r + rho[0] * torch.eye(dim).double()
        inverse = torch.linalg.inv(f + alpha / dim * f.trace() * torch.eye(dim).double())
        x = inverse @ x if axis == 0 else x @ inverse
    want = x * gradient.norm() / x.norm()
    torch.testing.assert_close(now([gradient], update=True)[0][0], want, rtol=1e-6, atol=1e-8)
    for _ in range(3):
        now(draw(), update=True)
    for factors in now.factors.values():
        e = factors.weight @ factors.weight.mT  # the invariant of the module's head
        torch.testing.assert_close(e, torch.diag_embed(factors.e(alpha)), rtol=1e-6, atol=1e-8)


def test_factors_of_the_same_alpha_come_back_bit_for_bit():
    g = torch.Generator().manual_seed(0)
    tensors, states = [torch.zeros(9, 5)], [{}]
    former = OnlinePreconditioner(tensors, states)
    for t in range(25):
        former([torch.randn(9, 5, generator=g) * 10.0 ** (t - 12)], update=True, first=t == 0)
    again = OnlinePreconditioner(tensors, [{name: x.clone() for name, x in states[0].items()}])
    for a, b in zip(former.factors.values(), again.factors.values(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
