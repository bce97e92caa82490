"""The two-sided curvature against a float64 twin of explicit matrices, and the theorems behind it."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from npg.curvature.two_sided import BURST, TwoSidedCurvature

SHAPES = [(12,), (7, 5), (6, 4, 3, 3), (6, 4, 3, 3), (1, 8), (2, 3, 1), (), (9, 30), (2, 2, 1, 3, 2), (1, 1, 5, 4)]
STREAMS = ["generic", "dominated", "zeros", "bursts"]
AVERAGE, DAMPING = 0.9, 1e-3


class Twin:
    """One tensor: L, R and their powers as matrices, by inversion and eigenvectors. Nothing here is clever."""

    def __init__(self, shape: tuple[int, ...], power: float) -> None:
        longer = [size for size in shape if size > 1]
        self.shape, self.power, self.is_matrix = shape, power, len(longer) > 1
        self.matrix = (longer[0], math.prod(longer[1:])) if self.is_matrix else shape
        self.factors: list[np.ndarray] = []

    def inverse(self, side: int) -> np.ndarray:
        return self.bases[side] @ np.diag(1 / self.values[side]) @ self.bases[side].T

    def update(self, gradient: np.ndarray) -> None:
        if not gradient.any():
            return
        g = gradient.reshape(self.matrix)
        scale = np.mean(g**2)
        if not self.is_matrix:
            self.square = AVERAGE * (self.square if self.factors else scale) + (1 - AVERAGE) * g**2
            self.factors = [self.square]
            return
        m, n = self.matrix
        if not self.factors:
            self.factors = [scale * np.eye(m), np.eye(n)]
            self.bases = [np.eye(m), np.eye(n)]
            self.values = [np.full(m, scale * (1 + DAMPING)), np.full(n, 1 + DAMPING)]
        new = [g @ self.inverse(1) @ g.T / n, g.T @ self.inverse(0) @ g / m]
        self.factors = [AVERAGE * a + (1 - AVERAGE) * b for a, b in zip(self.factors, new)]

    def invert(self, exact: bool) -> None:
        if not self.is_matrix or not self.factors:
            return
        for side, factor in enumerate(self.factors):
            shift = DAMPING * np.trace(factor) / len(factor)
            damped = factor + shift * np.eye(len(factor))
            if exact:
                values, basis = np.linalg.eigh(damped)
                self.values[side], self.bases[side] = values[::-1], basis[:, ::-1]
            else:
                order = np.argsort(-np.diag(self.bases[side].T @ damped @ self.bases[side]))
                basis, triangle = np.linalg.qr(damped @ self.bases[side][:, order])
                self.values[side], self.bases[side] = np.abs(np.diag(triangle)), basis

    def apply(self, m: np.ndarray) -> np.ndarray:
        if not self.factors:
            return m
        if not self.is_matrix:
            return m / (self.square + DAMPING * np.mean(self.square)) ** self.power
        left, right = (b @ np.diag(v**-self.power) @ b.T for b, v in zip(self.bases, self.values))
        return (left @ m.reshape(self.matrix) @ right).reshape(self.shape)


def gradients(stream: str, steps: int, shapes=SHAPES) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mixing = [torch.randn(math.prod(s), math.prod(s), generator=generator, dtype=torch.float64) for s in shapes]
    out = []
    for t in range(steps):
        step = []
        for shape, a in zip(shapes, mixing, strict=True):
            g = a @ torch.randn(math.prod(shape), generator=generator, dtype=torch.float64)
            if stream == "dominated":
                g += 30 * a[:, 0] * torch.randn((), generator=generator, dtype=torch.float64)
            elif stream == "zeros" and t % 3 == 0:
                g *= 0
            elif stream == "bursts":
                g *= 10.0 ** (3 * math.sin(t))
            step.append(g.view(shape))
        out.append(step)
    return out


def stacked(curvature: TwoSidedCurvature, tensors: list[Tensor], shapes=SHAPES) -> list[Tensor]:
    groups: dict = {}
    for tensor, shape in zip(tensors, shapes, strict=True):
        groups.setdefault(shape, []).append(tensor)
    return [torch.stack(group) for group in groups.values()]


@pytest.mark.parametrize("power", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("stream", STREAMS)
def test_equals_the_dense_twin(stream, power, assert_close):
    states: list[dict] = [{} for _ in SHAPES]
    like = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    curvature = TwoSidedCurvature(like, states, power=power, average=AVERAGE, damping=DAMPING)
    twins = [Twin(s, power) for s in SHAPES]
    for t, step in enumerate(gradients(stream, 40)):
        assert curvature.update(stacked(curvature, step))
        due, exact = t < 14 or t % 4 == 0, t < 14
        if due:
            curvature.inverse(exact)
        got = curvature.apply(stacked(curvature, step))
        for twin, g in zip(twins, step, strict=True):
            twin.update(g.numpy())
            if due:
                twin.invert(exact or power == 1)
        want = stacked(curvature, [torch.from_numpy(np.asarray(w.apply(g.numpy()))) for w, g in zip(twins, step)])
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, scale=10)
    for twin, state in zip(twins, states, strict=True):
        if twin.is_matrix:
            unit, (left, right) = state["unit_0"], twin.factors
            product = unit**2 * torch.kron(state["factor_left_0"], state["factor_right_0"])
            assert_close(product, torch.from_numpy(np.kron(left, right)), scale=10)
        else:
            assert_close(state["unit"] ** 2 * state["square"], torch.from_numpy(np.asarray(twin.square)))


@pytest.mark.parametrize("power", [0.25, 0.5, 0.75, 1.0])
def test_what_is_longer_than_the_gradients_spread_is_shortened_to_it(power, assert_close):
    """V of M and of t M are one where both are too long, and a shorter M is left alone; tile by tile."""
    shapes = [(7, 5), (7, 5), (9,), (40, 3)]
    states: list[dict] = [{} for _ in shapes]
    curvature = TwoSidedCurvature(
        [torch.zeros(s, dtype=torch.float64) for s in shapes], states, power=power, max_axis=20
    )
    for step in gradients("generic", 30, shapes):
        curvature.update(stacked(curvature, step, shapes))
        curvature.inverse()
    means = stacked(curvature, gradients("generic", 31, shapes)[-1], shapes)
    plain = curvature.apply(means)
    for got, want in zip(curvature.apply([1e-3 * m for m in means], longest=1.0), plain, strict=True):
        assert_close(got, 1e-3 * want)
    ends = [curvature.apply([scale * m for m in means], longest=0.5) for scale in (1e3, 1e9, 1e200)]
    for got, *others in zip(*ends, strict=True):
        for other in others:
            assert_close(got, other)
    for got, want in zip(ends[0], plain, strict=True):
        parts = list(zip(*(x.split(20, 1) if x.shape[1:] == (40, 3) else (x,) for x in (got, want))))
        for a, b in (pair for part in parts for pair in zip(*part)):
            ratio = float((a * b).sum() / (b * b).sum())
            assert_close(a, ratio * b)
            if power == 0.5:  # V is the whitened M
                assert float(a.square().mean()) == pytest.approx(0.25)


def test_a_long_mean_in_single_precision_leaves_its_range_nowhere():
    curvature = TwoSidedCurvature([torch.zeros(6, 6)], [{}])
    generator = torch.Generator().manual_seed(0)
    curvature.update([1e-12 * torch.randn(1, 6, 6, generator=generator)])
    (v,) = curvature.apply([1e14 * torch.randn(1, 6, 6, generator=generator)], longest=1.0)
    assert float(v.square().mean()) == pytest.approx(1.0)


def test_finds_the_covariance_and_whitens():
    """Of gradients that are matrix normal the factors tend to their covariance; p = ½ then makes it the identity."""
    generator = torch.Generator().manual_seed(0)
    m, n = 3, 4
    a, b = (torch.randn(d, d, generator=generator, dtype=torch.float64) for d in (m, n))
    state: dict = {}
    curvature = TwoSidedCurvature([torch.zeros(m, n, dtype=torch.float64)], [state], average=0.995, damping=1e-6)
    whitened = []
    for t in range(1600):
        g = a @ torch.randn(m, n, generator=generator, dtype=torch.float64) @ b.mT
        curvature.update([g[None]])
        curvature.inverse(exact=t < 10)
        whitened.append(curvature.apply([g[None]])[0].flatten())
    kron = state["unit_0"] ** 2 * torch.kron(state["factor_left_0"], state["factor_right_0"])
    true = torch.kron(a @ a.mT, b @ b.mT)
    assert torch.linalg.matrix_norm(kron - true) < 0.15 * torch.linalg.matrix_norm(true)
    v = torch.stack(whitened[600:])
    covariance = v.mT @ v / len(v)
    assert (covariance - torch.eye(m * n)).abs().max() < 5 * (2 / len(v)) ** 0.5 + 0.05


def test_orthogonal_iteration_tends_to_the_exact_powers():
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(6, 9, dtype=torch.float64)
    curvature = TwoSidedCurvature([like], [{}])
    for _ in range(12):
        curvature.update([torch.randn(1, 6, 9, generator=generator, dtype=torch.float64)])
    m = torch.randn(1, 6, 9, generator=generator, dtype=torch.float64)
    curvature.inverse(exact=True)
    exact = curvature.apply([m])[0]
    for side in curvature.sides.values():  # begin as far away as can be
        side.basis.copy_(torch.eye(side.basis.shape[-1]))
    errors = []
    for _ in range(400):
        curvature.inverse(exact=False)
        errors.append(float((curvature.apply([m])[0] - exact).norm() / exact.norm()))
        for side in curvature.sides.values():
            eye = torch.eye(side.basis.shape[-1], dtype=torch.float64)
            assert (side.basis.mT @ side.basis - eye).abs().max() < 1e-13
            damped = side.factor + curvature.damping * side.factor.diagonal(dim1=1, dim2=2).mean() * eye
            torch.testing.assert_close(side.values.prod(-1), torch.linalg.det(damped))
    assert errors[-1] < 1e-6 < 1e-2 < errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_bases_keep_their_digits_in_single_precision(dtype, power):
    """Ten thousandfold bursts, directions that come and go: Q stays orthonormal, the powers stay finite."""
    generator = torch.Generator().manual_seed(0)
    curvature = TwoSidedCurvature([torch.zeros(8, 40, dtype=dtype)], [{}], power=power)
    for t in range(120):
        rank = 1 + t % 3
        g = torch.randn(8, rank, generator=generator) @ torch.randn(rank, 40, generator=generator)
        g = (g * (1e4 if t % 17 == 0 else 1.0)).to(dtype)[None]
        assert curvature.update([g])
        curvature.inverse(exact=t < 2)
        v = curvature.apply([g])[0]
        assert v.isfinite().all()
        for side in curvature.sides.values():
            assert (side.values > 0).all()
            if power == 0.5:
                gram = side.basis.mT @ side.basis
                assert (gram - torch.eye(len(gram[0]))).abs().max() < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("failing", [{6}, {9}, {6, 9}])
def test_powers_that_a_failed_factorisation_leaves_stay_in_the_unit_of_their_factor(failing, assert_close):
    generator = torch.Generator().manual_seed(0)
    state: dict = {}
    curvature = TwoSidedCurvature([torch.zeros(6, 9, dtype=torch.float64)], [state], power=1.0)
    for _ in range(5):
        curvature.update([torch.randn(1, 6, 9, generator=generator, dtype=torch.float64)])
        curvature.inverse()
    powers = {}
    for (dim, *_), side in curvature.sides.items():
        side.factor.mul_(1000)
        if dim in failing:
            side.factor[:, 0, 0] = -1
            powers[dim] = side.basis[0] @ side.values[0].reciprocal().diag() @ side.basis[0].mT
        else:
            shift = curvature.damping * side.factor[0].trace() / dim
            powers[dim] = torch.linalg.inv(side.factor[0] + shift * torch.eye(dim))
    m = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    want = powers[6] @ m @ powers[9] / state["unit_0"] ** 2
    curvature.inverse()
    assert_close(curvature.apply([m[None]])[0][0], want)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_leaves_the_factors_alone(bad):
    states: list[dict] = [{}, {}]
    curvature = TwoSidedCurvature([torch.zeros(3, 4), torch.zeros(5)], states)
    for step in ([torch.ones(1, 3, 4), torch.ones(1, 5)], [torch.randn(1, 3, 4), torch.randn(1, 5)]):
        assert curvature.update(step)
        curvature.inverse()
    before = [{k: v.clone() for k, v in state.items()} for state in states]
    a, b = torch.ones(1, 3, 4), torch.ones(1, 5)
    a[0, 1, 2] = b[0, 3] = bad
    assert not curvature.update([a, torch.zeros(1, 5)])
    assert not curvature.update([torch.zeros(1, 3, 4), b])
    for state, old in zip(states, before, strict=True):
        assert all(torch.equal(state[k], v) for k, v in old.items())


def test_a_burst_counts_as_one_of_a_bounded_size():
    state: dict = {}
    curvature = TwoSidedCurvature([torch.zeros(2, 2)], [state])
    for scale in (1.0, 1e30):
        assert curvature.update([torch.eye(2)[None] * scale])
        curvature.inverse()
    assert 1 < float(state["unit_0"]) < BURST**2
    for _ in range(12):
        assert curvature.update([torch.eye(2)[None] * 1e30])
        curvature.inverse()
    assert float(state["unit_0"]) > 1e28


def test_tiles_are_weights_of_their_own(assert_close):
    generator = torch.Generator().manual_seed(0)
    whole = TwoSidedCurvature([torch.zeros(5, 7, dtype=torch.float64)], [{}], max_axis=4)
    cuts = [(slice(a, b), slice(c, d)) for a, b in ((0, 2), (2, 5)) for c, d in ((0, 3), (3, 7))]
    alone = [
        TwoSidedCurvature([torch.zeros(r.stop - r.start, c.stop - c.start, dtype=torch.float64)], [{}]) for r, c in cuts
    ]
    for t in range(20):
        g = torch.randn(1, 5, 7, generator=generator, dtype=torch.float64)
        whole.update([g])
        whole.inverse(exact=t < 9)
        out = whole.apply([g])[0]
        for (r, c), one in zip(cuts, alone, strict=True):
            one.update([g[:, r, c]])
            one.inverse(exact=t < 9)
            assert_close(out[:, r, c], one.apply([g[:, r, c]])[0])


def test_a_vector_that_had_seen_nothing_when_its_state_was_saved_begins_with_its_first_gradient():
    """Earlier versions gave it the unit 1, and its square was zero."""
    old = {"square": torch.zeros(5), "unit": torch.ones((), dtype=torch.float64)}
    new: dict = {}
    g = 1e-3 * torch.arange(1.0, 6.0)[None]
    for state in (old, new):
        curvature = TwoSidedCurvature([torch.zeros(5)], [state])
        assert curvature.update([g])
    assert torch.equal(old["unit"], new["unit"])
    assert torch.equal(old["square"], new["square"])
    torch.testing.assert_close(float(new["unit"]) ** 2 * new["square"], 0.95 * g.square().mean() + 0.05 * g[0] ** 2)
