"""Every solver against torch.linalg.solve, every status, and invariance to the scale of the problem."""

from functools import partial
from itertools import pairwise
from math import inf, nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npg import solvers
from npg.solvers import Solution, Status, cg, conjugate_gradient, dense_solve, solve_in_metric

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture(scope="module", autouse=True, params=["numpy", "torch"])
def library(request):
    """Everything with the numbers of an iteration in NumPy, as on a CPU, and in PyTorch, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(cg, "library", lambda device: torch)
        yield


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counting:
    """A matrix that counts its products."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix, self.products = matrix, 0

    def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
        self.products += 1
        return self.matrix @ v


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------------ the right solution


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_equals_linalg_solve(spd, condition, damping, preconditioned):
    n = 50
    # badly scaled rows and columns are what a diagonal preconditioner is for
    scales = torch.logspace(-1, 1, n) if preconditioned else torch.ones(n)
    A = scales[:, None] * spd(n, condition) * scales
    b = A @ randn(n) if condition == 1e6 else randn(n)
    damped = A + damping * torch.eye(n)
    solution = conjugate_gradient(
        A,
        b,
        damping=damping,
        preconditioner=(lambda r: r / damped.diagonal()) if preconditioned else None,
        max_iterations=3000,
        rtol=1e-13,
        residual_refresh=10_000,
    )
    assert relative(solution.x, torch.linalg.solve(damped, b)) < 1e-8


def test_a_good_preconditioner_saves_iterations(spd):
    scales = torch.logspace(-2, 2, 40)
    A = scales[:, None] * spd(40, 5.0) * scales
    b = randn(40)
    plain = conjugate_gradient(A, b, max_iterations=5000)
    jacobi = conjugate_gradient(A, b, max_iterations=5000, preconditioner=lambda r: r / A.diagonal())
    exact = conjugate_gradient(A, b, preconditioner=lambda r: torch.linalg.solve(A, r))
    assert jacobi.status is exact.status is Status.CONVERGED
    assert jacobi.iterations < plain.iterations / 4
    assert exact.iterations <= 2


def test_cg_ends_after_as_many_iterations_as_there_are_eigenvalues():
    A = Counting(torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0, 9.0])))
    solution = conjugate_gradient(A, randn(6), rtol=1e-12)
    assert solution.status is Status.CONVERGED
    assert solution.iterations == A.products == 3


def test_products_are_what_is_promised(spd):
    """One per iteration, none for x₀ = 0, one for a warm start, and one per refresh."""
    A, b = Counting(spd(30, 100.0)), randn(30)
    solution = conjugate_gradient(A, b, max_iterations=20, rtol=0.0, residual_refresh=1000)
    assert (solution.iterations, A.products) == (20, 20)
    A.products = 0
    conjugate_gradient(A, b, x0=randn(30, seed=1), max_iterations=20, rtol=0.0, residual_refresh=8)
    assert A.products == 20 + 1 + 2


def test_what_a_solution_knows_equals_its_definition(spd):
    A, b, damping = spd(30, 100.0), randn(30, 3), 0.1
    b[:, 2] = torch.eye(30)[4]  # of norm 1
    damped = A + damping * torch.eye(30)
    for x0 in (None, randn(30, 3, seed=1)):
        for iterations in (1, 5, 200):
            s = conjugate_gradient(A, b, x0=x0, damping=damping, max_iterations=iterations)
            torch.testing.assert_close(s.residual_norm, (b - damped @ s.x).norm(dim=0) / b.norm(dim=0))
            torch.testing.assert_close(s.curvature, (s.x * (damped @ s.x)).sum(0))
            torch.testing.assert_close(s.model_value, (s.x * (0.5 * damped @ s.x - b)).sum(0))
    for method in ("cholesky", "eigh"):
        s = dense_solve(A, b, damping=damping, method=method)
        torch.testing.assert_close(s.curvature, (s.x * (damped @ s.x)).sum(0))
        torch.testing.assert_close(s.model_value, -0.5 * (s.x * b).sum(0))
        assert (s.residual_norm < 1e-12).all()


def test_cg_draws_no_random_numbers(spd):
    state = torch.get_rng_state()
    conjugate_gradient(spd(10, 10.0), randn(10))
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------ several at once


@pytest.mark.parametrize("sync_every", [1, 3, 8])
def test_several_right_hand_sides_are_each_alone(spd, sync_every):
    A = spd(12, 20.0)
    eigenvectors = torch.linalg.eigh(A).eigenvectors
    # from one iteration (an eigenvector) to many, and none (zero)
    B = torch.stack([eigenvectors[:, 0], eigenvectors[:, :3].sum(1), randn(12), torch.zeros(12)], 1)
    together = conjugate_gradient(A, B, max_iterations=200, sync_every=sync_every)
    alone = [conjugate_gradient(A, b, max_iterations=200) for b in B.T]
    assert len({s.iterations for s in alone}) == 4
    assert together.iterations == max(s.iterations for s in alone)
    assert together.statuses == tuple(s.status for s in alone)
    for k, s in enumerate(alone):
        torch.testing.assert_close(together.x[:, k], s.x, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together.residual_norm[k], s.residual_norm, rtol=1e-3, atol=1e-10)
        torch.testing.assert_close(together.curvature[k], s.curvature)


def test_the_worst_status_is_reported():
    A = torch.diag(torch.tensor([1.0, 2.0, -1.0]))
    B = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    solution = conjugate_gradient(A, B)
    assert solution.statuses == (Status.CONVERGED, Status.NEGATIVE_CURVATURE)
    assert solution.status is Status.NEGATIVE_CURVATURE
    torch.testing.assert_close(solution.x[:, 0], torch.tensor([1.0, 0.5, 0.0]))
    B[0, 1] = nan
    solution = conjugate_gradient(A, B)
    assert solution.status is Status.NON_FINITE
    torch.testing.assert_close(solution.x[:, 0], torch.tensor([1.0, 0.5, 0.0]))


@pytest.mark.parametrize("sync_every", [2, 5, 64])
def test_looking_seldom_changes_nothing(spd, sync_every):
    for A, b in ((spd(20, 50.0), randn(20)), (spd(20, 50.0) - 2 * torch.eye(20), randn(20))):
        often, seldom = (conjugate_gradient(A, b, sync_every=n, progress_tolerance=5e-4) for n in (1, sync_every))
        assert torch.equal(often.x, seldom.x)
        assert (often.status, often.iterations) == (seldom.status, seldom.iterations)
        assert torch.equal(often.residual_norm, seldom.residual_norm)


# ------------------------------------------------------------------------------------------------------ warm start


def test_a_warm_start_saves_iterations_and_the_solution_takes_none(spd):
    A, b = spd(40, 1e3), randn(40)
    cold = conjugate_gradient(A, b, max_iterations=500)
    near = conjugate_gradient(A, b, x0=torch.linalg.solve(A, b) + 1e-4 * randn(40, seed=1), max_iterations=500)
    there = conjugate_gradient(A, b, x0=torch.linalg.solve(A, b), max_iterations=500)
    assert near.status is Status.CONVERGED
    assert 0 < near.iterations < cold.iterations
    assert there.iterations == 0
    assert there.status is Status.CONVERGED
    torch.testing.assert_close(there.x, torch.linalg.solve(A, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e3, 1e8, 1e17, 1e30])
def test_a_start_far_larger_than_the_solution_is_not_believed(spd, size, dtype):
    """The recurrence went down to 1e-16 of b from there, with a true residual of 7."""
    A, b = spd(20, 30.0).to(dtype), randn(20, 2).to(dtype)
    x0 = (size * randn(20, 2, seed=1)).to(dtype)
    for start in (x0, -x0):
        s = conjugate_gradient(A, b, x0=start, rtol=1e-5, max_iterations=500)
        assert s.status is Status.CONVERGED
        assert ((b.double() - A.double() @ s.x.double()).norm(dim=0) <= 1.2e-5 * b.double().norm(dim=0)).all()
        few = conjugate_gradient(A, b, x0=start, rtol=1e-5, max_iterations=2)
        assert (few.model_value < 0).all()  # never worse than no start at all
        assert ((b * few.x).sum(0) > 0).all()


@pytest.mark.parametrize("several", [False, True])
def test_a_large_start_in_the_null_space_is_not_believed(several):
    """It passes the test by the model, by chance or for want of curvature; the true residual tells."""
    A = torch.diag(torch.tensor([2.0, 1.0, 1e-18]))
    rotation, _ = torch.linalg.qr(randn(3, 3, seed=5))
    A = rotation @ A @ rotation.T
    b = A @ randn(3)
    for sign in (1, -1):
        x0 = sign * 1e16 * rotation[:, 2]
        B, start = (torch.stack([b, 2 * b], 1), torch.stack([x0, x0], 1)) if several else (b, x0)
        s = conjugate_gradient(A, B, x0=start, rtol=1e-8, max_iterations=50)
        columns = zip(s.statuses, s.x.reshape(3, -1).T, B.reshape(3, -1).T, s.residual_norm.reshape(-1))
        for status, x, right, said in columns:
            residual = (right - A @ x).norm() / right.norm()
            assert status is not Status.CONVERGED or residual <= 1.1e-8
            assert float(said) == pytest.approx(float(residual), rel=0.1, abs=1e-8)


def test_what_starts_again_keeps_the_limit_and_the_scale():
    """A start of 10⁹ in the null space leaves a residual of about 10⁻⁷ that the recurrence does not see."""
    for seed in range(20):
        rotation, _ = torch.linalg.qr(randn(6, 6, seed=seed))
        A = (rotation * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.0])) @ rotation.T
        b, x0 = A @ randn(6, seed=seed + 1), 1e9 * rotation[:, 5]
        solve = partial(conjugate_gradient, A, rtol=1e-8, residual_refresh=1000)
        s = solve(b, x0=x0)
        small = solve(2.0**-20 * b, x0=2.0**-20 * x0)
        assert torch.equal(small.x, 2.0**-20 * s.x)
        assert (small.status, small.iterations) == (s.status, s.iterations)
        for limit in range(1, s.iterations):
            assert solve(b, x0=x0, max_iterations=limit).iterations <= limit


def test_what_a_warm_start_has_found_costs_one_product_to_look_at(spd):
    A, b = Counting(spd(30, 100.0)), randn(30)
    x0 = 0.9 * torch.linalg.solve(A.matrix, b) + 1e-3 * randn(30, seed=2)
    solution = conjugate_gradient(A, b, x0=x0, max_iterations=500, residual_refresh=1000)
    assert solution.status is Status.CONVERGED
    assert A.products == 1 + solution.iterations + 1
    A.products = 0
    assert conjugate_gradient(A, b, x0=solution.x).iterations == 0
    assert A.products == 1  # the residual of the start is a true one
    A.products = 0
    solution = conjugate_gradient(A, b, max_iterations=500, residual_refresh=1000)
    assert A.products == solution.iterations


def test_x0_is_left_as_it_was(spd):
    A, b, x0 = spd(10, 10.0), randn(10), randn(10, seed=1)
    before = (b.clone(), x0.clone())
    conjugate_gradient(A, b, x0=x0)
    assert torch.equal(b, before[0])
    assert torch.equal(x0, before[1])


@pytest.mark.parametrize("x0", [None, randn(10)])
def test_zero_in_zero_out(spd, x0):
    A = Counting(spd(10, 10.0))
    solution = conjugate_gradient(A, torch.zeros(10), x0=x0)
    assert solution.status is Status.CONVERGED
    assert solution.iterations == 0
    assert torch.equal(solution.x, torch.zeros(10))
    assert solution.residual_norm == solution.curvature == solution.model_value == 0


# --------------------------------------------------------------------------------------------------------- statuses


def test_converged_and_iteration_limit(spd):
    A, b = spd(30, 1e3), randn(30)
    assert conjugate_gradient(A, b, max_iterations=300).status is Status.CONVERGED
    limited = conjugate_gradient(A, b, max_iterations=3)
    assert (limited.status, limited.iterations) == (Status.ITERATION_LIMIT, 3)
    # converging in the very last iteration allowed is converging
    enough = conjugate_gradient(A, b, max_iterations=conjugate_gradient(A, b, max_iterations=300).iterations)
    assert enough.status is Status.CONVERGED


def test_negative_curvature_returns_the_iterate_before_it():
    A = torch.diag(torch.tensor([3.0, 2.0, -1.0]))
    at_once = conjugate_gradient(A, torch.tensor([0.0, 0.0, 1.0]))
    assert at_once.status is Status.NEGATIVE_CURVATURE
    assert torch.equal(at_once.x, torch.zeros(3))
    later = conjugate_gradient(A, torch.tensor([1.0, 1.0, 0.3]))
    assert later.status is Status.NEGATIVE_CURVATURE
    assert later.iterations > 1
    assert later.model_value < 0
    # damping that lifts the negative eigenvalue cures it
    assert conjugate_gradient(A, torch.tensor([1.0, 1.0, 0.3]), damping=1.5).status is Status.CONVERGED


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_breakdown_where_the_right_hand_side_leaves_the_range(scale):
    A = scale * torch.diag(torch.tensor([1.0, 2.0, 0.0]))
    outside = conjugate_gradient(A, torch.tensor([1.0, 1.0, 1.0]))
    assert outside.status is Status.BREAKDOWN
    assert torch.isfinite(outside.x).all()
    assert conjugate_gradient(A, torch.tensor([0.0, 0.0, 1.0])).status is Status.BREAKDOWN
    inside = conjugate_gradient(A, torch.tensor([1.0, 1.0, 0.0]))
    assert inside.status is Status.CONVERGED  # singular and consistent
    torch.testing.assert_close(inside.x * scale, torch.tensor([1.0, 0.5, 0.0]))


def test_breakdown_where_the_preconditioner_is_not_positive(spd):
    solution = conjugate_gradient(spd(5, 2.0), randn(5), preconditioner=lambda r: -r)
    assert solution.status is Status.BREAKDOWN
    assert torch.equal(solution.x, torch.zeros(5))
    # on the first residual it looks positive: rᵀCr = ½, and then −4/9
    A, indefinite = torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([1.0, -0.5])
    solution = conjugate_gradient(A, torch.ones(2), preconditioner=lambda r: indefinite * r)
    assert solution.status is Status.BREAKDOWN
    assert solution.iterations == 1


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_non_finite_right_hand_side(spd, bad):
    b, warm = randn(5), partial(conjugate_gradient, x0=randn(5, seed=1))
    b[2] = bad
    for solver in (conjugate_gradient, warm, dense_solve, partial(dense_solve, method="eigh")):
        for sign in (1, -1):
            solution = solver(sign * spd(5, 2.0), b)
            assert solution.status is Status.NON_FINITE
            assert solution.iterations == 0
            assert not torch.isfinite(solution.x).all()


@pytest.mark.parametrize("bad", [nan, inf])
def test_non_finite_matrix_start_or_preconditioner(spd, bad):
    A, b = spd(5, 2.0), randn(5)
    broken = A.clone()
    broken[1, 1] = bad
    assert dense_solve(broken, b).status is Status.NON_FINITE
    assert dense_solve(broken, b, method="eigh").status is Status.NON_FINITE
    assert conjugate_gradient(broken, b).status is Status.NON_FINITE
    for start in (torch.full((5,), bad), torch.tensor([0.0, bad, 0.0, 0.0, 0.0])):
        assert conjugate_gradient(A, b, x0=start).status is Status.NON_FINITE
    assert conjugate_gradient(A, b, preconditioner=lambda r: r * bad).status is Status.NON_FINITE


@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("residual_refresh", [2, 1000])  # the third product is that of a residual, or of a direction
@pytest.mark.parametrize("columns", [1, 2])
def test_a_product_that_is_no_number_leaves_a_finite_iterate(spd, bad, residual_refresh, columns):
    """In its column; the others go on."""
    A, b = spd(20, 100.0), randn(20, columns)

    class Failing(Counting):
        def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
            w = super().__matmul__(v)
            w[:, 0] *= bad if self.products >= 3 else 1.0
            return w

    solution = conjugate_gradient(Failing(A), b, residual_refresh=residual_refresh)
    assert solution.statuses[0] is Status.NON_FINITE
    assert torch.isfinite(solution.x).all()
    assert torch.isfinite(solution.residual_norm[0]) == (residual_refresh == 1000)
    if columns == 2:
        assert solution.statuses[1] is Status.CONVERGED
        assert relative(solution.x[:, 1], torch.linalg.solve(A, b[:, 1])) < 1e-4


# ------------------------------------------------------------------------------------------------------------ scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-20, 2.0**20, 2.0**100])  # they round nothing
@pytest.mark.parametrize("warm", [False, True])
def test_scaling_the_problem_changes_neither_iterations_nor_answer(spd, factor, dtype, warm):
    A, b, x0 = spd(8, 30.0).to(dtype), randn(8).to(dtype), (randn(8, seed=1).to(dtype) if warm else None)
    plain = conjugate_gradient(A, b, x0=x0, rtol=1e-5)
    assert plain.status is Status.CONVERGED
    tolerance = 1e-4 if dtype is torch.float32 else 1e-9
    start = None if x0 is None else x0 * factor
    scaled = conjugate_gradient(A, b * factor, x0=start, rtol=1e-5)
    assert (scaled.status, scaled.iterations) == (plain.status, plain.iterations)
    assert relative(scaled.x / factor, plain.x) < tolerance
    start = None if x0 is None else x0 / factor
    scaled = conjugate_gradient(A * factor, b, x0=start, rtol=1e-5)
    assert (scaled.status, scaled.iterations) == (plain.status, plain.iterations)
    assert relative(scaled.x * factor, plain.x) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_scaling_finds_the_same_trouble(factor, dtype):
    A, b = torch.diag(torch.tensor([3.0, 2.0, -1.0], dtype=dtype)), torch.tensor([1.0, 1.0, 0.3], dtype=dtype)
    singular = torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=dtype))
    for matrix, status in ((A, Status.NEGATIVE_CURVATURE), (singular, Status.BREAKDOWN)):
        for left, right in ((factor, 1.0), (1.0, factor)):
            assert conjugate_gradient(left * matrix, right * b).status is status


def test_many_small_numbers_do_not_underflow():
    """The squares of the 10⁵ entries of a residual, times a curvature of 1e-30, are below float32's smallest number."""
    n = 100_000

    class Diagonal:
        entries = torch.linspace(1.0, 9.0, n, dtype=torch.float32) * 1e-30

        def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
            return self.entries * v

    b = randn(n).float()
    solution = conjugate_gradient(Diagonal(), b)
    assert solution.status is Status.CONVERGED
    assert relative(solution.x.double(), b.double() / Diagonal.entries.double()) < 1e-5


def test_denormal_and_huge_right_hand_sides(spd):
    A, b = spd(10, 10.0).float(), randn(10).float()
    huge = b / b.abs().max() * 3e38
    largest = conjugate_gradient(4 * A, huge)
    assert largest.status is Status.CONVERGED
    assert torch.isfinite(largest.x).all()
    tiny = conjugate_gradient(A, b * 1e-40)
    assert tiny.status is Status.CONVERGED
    assert torch.isfinite(tiny.x).all()


@pytest.mark.parametrize("solver", [conjugate_gradient, dense_solve, partial(dense_solve, method="eigh")])
def test_a_solution_larger_than_its_dtype_is_not_converged(solver):
    b = torch.tensor([1e37, 1.0], dtype=torch.float32)
    solution = solver(torch.diag(torch.tensor([1e-2, 1.0], dtype=torch.float32)), b)
    assert solution.status is Status.NON_FINITE
    both = solver(1e-2 * torch.eye(2, dtype=torch.float32), torch.stack([b, torch.ones_like(b)], 1))
    assert both.statuses == (Status.NON_FINITE, Status.CONVERGED)
    torch.testing.assert_close(both.x[:, 1], torch.full((2,), 100.0, dtype=torch.float32))


@pytest.mark.parametrize("solver", [conjugate_gradient, dense_solve, partial(dense_solve, method="eigh")])
def test_a_solution_smaller_than_its_dtype_is_not_converged(solver):
    """x = 10⁻⁵⁰ is zero in float32, and zero is no solution; 10⁻⁴³ has two digits left."""
    for size in (1e-30, 1e-23):
        A, b = 1e20 * torch.eye(3, dtype=torch.float32), size * torch.ones(3, dtype=torch.float32)
        solution = solver(A, b)
        residual = (b.double() - A.double() @ solution.x.double()).norm() / b.double().norm()
        assert solution.status is Status.BREAKDOWN
        assert float(solution.residual_norm) == pytest.approx(float(residual), rel=1e-3)
    assert solver(A, 1e-5 * torch.ones(3, dtype=torch.float32)).status is Status.CONVERGED


def test_a_small_solution_that_is_cut_short_is_no_breakdown(spd):
    """What is said of the digits of the dtype is said of a solve that came to its end, column by column."""
    A, b = 1e20 * spd(20, 100.0).float(), 1e-20 * randn(20, 2).float()
    b[:, 1] *= 1e15
    solution = conjugate_gradient(A, b, max_iterations=2)
    assert (solution.x[:, 0] != 0).any()
    assert solution.statuses == (Status.ITERATION_LIMIT, Status.ITERATION_LIMIT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_numbers_are_scaled_without_a_logarithm(dtype):
    """log₂ of the largest number rounds up to the exponent after the last."""
    b = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
    solution = conjugate_gradient(4 * torch.eye(3, dtype=dtype), b)
    assert solution.status is Status.CONVERGED
    assert torch.equal(solution.x, b / 4)
    assert solvers.norm(b / 4).isfinite() == (dtype is torch.float32 or bool((b / 4 * 3**0.5).isfinite().all()))


def test_quadratic_values_are_numbers_where_the_square_of_the_scale_is_none():
    solution = conjugate_gradient(1e100 * torch.eye(2), torch.full((2,), 1e200))
    torch.testing.assert_close(solution.curvature, torch.tensor(2e300))
    torch.testing.assert_close(solution.model_value, torch.tensor(-1e300))


def test_a_product_whose_square_is_no_number_is_said():
    assert conjugate_gradient(1e200 * torch.eye(2), torch.ones(2)).status is Status.NON_FINITE


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e20), (torch.float32, 1e30), (torch.float64, 1e150), (torch.float64, 1e200)]
)
def test_the_norm_is_a_number_where_squares_are_none(dtype, size):
    for factor in (size, 1 / size):
        v = torch.tensor([3.0, 4.0], dtype=dtype) * factor
        torch.testing.assert_close(solvers.norm(v), torch.tensor(5.0) * factor, rtol=1e-6, atol=0)
    assert solvers.norm(torch.tensor([1.0, inf])) == inf
    assert solvers.norm(torch.tensor([1.0, nan])).isnan()
    assert solvers.norm(torch.zeros(3)) == 0


# ------------------------------------------------------------------------------------------------------- long solves


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e7, 1e10])
@pytest.mark.parametrize("residual_refresh", [10, 50, 10_000])
def test_float32_never_gives_nan_and_never_diverges(spd, condition, residual_refresh):
    """On systems that float32 cannot resolve, the iterate stays no worse than zero in the quadratic model."""
    A, b = spd(60, condition).float(), randn(60).float()
    for rtol in (1e-5, 0.0):
        s = conjugate_gradient(A, b, max_iterations=1000, rtol=rtol, residual_refresh=residual_refresh)
        assert s.status in (Status.CONVERGED, Status.ITERATION_LIMIT, Status.BREAKDOWN, Status.NEGATIVE_CURVATURE)
        assert torch.isfinite(s.x).all()
        assert torch.isfinite(s.residual_norm)
        exact = 0.5 * torch.dot(s.x.double(), A.double() @ s.x.double()) - torch.dot(b.double(), s.x.double())
        assert exact < 0


def test_refreshed_residual_is_the_true_one(spd):
    """Without a refresh the recurrence claims more than is so; right after one, it cannot."""
    A, b = spd(60, 1e4).float(), randn(60).float()
    claimed = conjugate_gradient(A, b, max_iterations=400, rtol=0.0, residual_refresh=10_000)
    honest = conjugate_gradient(A, b, max_iterations=400, rtol=0.0, residual_refresh=50)

    def true_residual(s: Solution) -> float:
        return float((b.double() - A.double() @ s.x.double()).norm() / b.double().norm())

    assert true_residual(claimed) > 100 * float(claimed.residual_norm)
    assert true_residual(honest) < 2 * float(honest.residual_norm)


def test_refresh_costs_no_accuracy_in_float64(spd):
    A, b = spd(60, 1e4), randn(60)
    for residual_refresh in (1, 7, 50, 10_000):
        s = conjugate_gradient(A, b, max_iterations=2000, rtol=1e-12, residual_refresh=residual_refresh)
        assert s.status is Status.CONVERGED
        assert relative(s.x, torch.linalg.solve(A, b)) < 1e-8


def test_martens_stop_comes_before_the_residual_stop(spd):
    A, b = spd(100, 1e4), randn(100)
    by_residual = conjugate_gradient(A, b, max_iterations=5000, rtol=1e-8)
    by_progress = conjugate_gradient(A, b, max_iterations=5000, rtol=1e-8, progress_tolerance=5e-4)
    assert by_progress.status is Status.CONVERGED
    assert 10 < by_progress.iterations < by_residual.iterations
    # replay the rule on the models of every prefix: it triggers at this iteration and not before
    models = [0.0] + [
        float(conjugate_gradient(A, b, max_iterations=i, rtol=0.0).model_value)
        for i in range(1, by_progress.iterations + 1)
    ]

    def small(i: int) -> bool:
        k = max(10, i // 10)
        return i > k and models[i] < 0 and (models[i] - models[i - k]) / models[i] < k * 5e-4

    assert [i for i in range(1, len(models)) if small(i)] == [by_progress.iterations]


# ------------------------------------------------------------------------------------------------------- dense solvers


@pytest.mark.parametrize("method", ["cholesky", "eigh"])
def test_a_matrix_of_whole_numbers(method):
    solution = dense_solve(torch.tensor([[4, 2], [2, 3]]), torch.tensor([2.0, 5.0]), method=method)
    torch.testing.assert_close(solution.x, torch.tensor([-0.5, 2.0]))


@pytest.mark.parametrize("method", ["cholesky", "eigh"])
@pytest.mark.parametrize("shape", [(20,), (20, 3)])
def test_dense_equals_linalg_solve(spd, method, shape):
    A, b = spd(20, 1e6), randn(*shape)
    for damping in (0.0, 0.3):
        s = dense_solve(A, b, damping=damping, method=method)
        assert s.status is Status.CONVERGED
        assert relative(s.x, torch.linalg.solve(A + damping * torch.eye(20), b)) < 1e-8
        assert s.x.shape == shape
        assert s.iterations == 0


def test_dense_works_in_float64_and_answers_in_the_dtype_of_b(spd):
    A, b = spd(20, 1e6).float(), randn(20).float()
    s = dense_solve(A, b)
    assert s.x.dtype is torch.float32
    exact = torch.linalg.solve(A.double(), b.double())
    assert relative(s.x.double(), exact) < 1e-6  # in float32 arithmetic it would be about 1e-2


def test_singular_matrices():
    A, b = torch.diag(torch.tensor([4.0, 2.0, 0.0])), torch.tensor([1.0, 1.0, 1.0])
    broken = dense_solve(A, b)
    assert broken.status is Status.BREAKDOWN
    assert torch.equal(broken.x, torch.zeros(3))
    inverse = dense_solve(A, b, method="eigh")
    assert inverse.status is Status.CONVERGED
    torch.testing.assert_close(inverse.x, torch.linalg.pinv(A) @ b)
    torch.testing.assert_close(inverse.residual_norm, torch.tensor(3.0).rsqrt())
    for method in ("cholesky", "eigh"):
        damped = dense_solve(A, b, damping=0.5, method=method)
        assert damped.status is Status.CONVERGED
        torch.testing.assert_close(damped.x, torch.tensor([1 / 4.5, 1 / 2.5, 2.0]))


def test_a_factorisation_that_passes_by_rounding_is_a_breakdown():
    """Cholesky finds pivots of 1e-17 on a singular matrix, and a solution of 1e16 whose residual is not small."""
    rows = torch.tensor([[1.0, 0.1, 0.3], [0.7, 0.3, 0.9], [0.2, 0.6, 0.1]])
    found = 0
    for seed in range(200):
        J = rows[:2] + 0.1 * randn(2, 3, seed=seed)
        A, b = J.T @ J, randn(3, seed=seed)
        s = dense_solve(A, b)
        residual = (b - A @ s.x).norm() / b.norm()
        assert (s.status is Status.CONVERGED) == bool(residual <= 1e-6)
        if s.status is Status.BREAKDOWN:
            assert torch.equal(s.x, torch.zeros(3))
            found += 1
    assert found > 100


def test_indefinite_matrices():
    A, b = torch.diag(torch.tensor([4.0, -2.0])), torch.ones(2)
    assert dense_solve(A, b).status is Status.BREAKDOWN
    assert dense_solve(A, b, method="eigh").status is Status.NEGATIVE_CURVATURE
    within = dense_solve(A, torch.tensor([1.0, 0.0]))  # where A is positive
    assert within.status is Status.BREAKDOWN
    assert not within.x.any()
    rounding = torch.diag(torch.tensor([4.0, -1e-17]))
    assert dense_solve(rounding, b, method="eigh").status is Status.CONVERGED


def test_rcond_decides_which_directions_count():
    A, b = torch.diag(torch.tensor([1.0, 1e-3])), torch.ones(2)
    torch.testing.assert_close(dense_solve(A, b, method="eigh", rcond=1e-2).x, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(dense_solve(A, b, method="eigh", rcond=1e-4).x, torch.tensor([1.0, 1e3]))


@pytest.mark.parametrize("solver", [conjugate_gradient, dense_solve])
@pytest.mark.parametrize("shape", [(0,), (0, 2)])
def test_a_system_without_unknowns_is_solved(solver, shape):
    solution = solver(torch.zeros(0, 0), torch.zeros(shape))
    assert solution.x.shape == shape
    assert solution.status is Status.CONVERGED


def test_dense_takes_what_has_a_dense_form(spd):
    class Operator:
        def dense(self) -> torch.Tensor:
            return spd(5, 2.0)

    b = randn(5)
    torch.testing.assert_close(dense_solve(Operator(), b).x, torch.linalg.solve(spd(5, 2.0), b))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_in_a_metric_it_is_the_preconditioned_solve_of_the_system_damped_in_it(spd, damping):
    """With C = L⁻²: the iterates of conjugate gradients on A + λC with C⁻¹ as the preconditioner, to their limit."""
    n = 30
    A, L, b = spd(n, 1e3), spd(n, 10.0), randn(n)
    C = torch.linalg.inv(L @ L)
    for iterations in (1, 2, 5, 400):
        options = {"max_iterations": iterations, "rtol": 1e-14, "residual_refresh": 10_000}
        inner = partial(conjugate_gradient, **options)
        solution = solve_in_metric(A, b, root=lambda v: L @ v, solver=inner, damping=damping)
        peer = conjugate_gradient(A + damping * C, b, preconditioner=lambda r: L @ L @ r, **options)
        assert relative(solution.x, peer.x) < 1e-8
        if iterations < 400:
            assert solution.iterations == peer.iterations
        x = solution.x
        torch.testing.assert_close(solution.curvature, x @ (A + damping * torch.eye(n)) @ x)
        torch.testing.assert_close(solution.model_value, 0.5 * x @ (A + damping * C) @ x - b @ x)
        residual = (L @ (b - (A + damping * C) @ x)).norm() / (L @ b).norm()
        torch.testing.assert_close(solution.residual_norm, residual, rtol=1e-6, atol=1e-12)
    assert relative(x, torch.linalg.solve(A + damping * C, b)) < 1e-10


def test_in_a_metric_there_is_no_start_and_what_is_not_finite_is_said(spd):
    A, b = spd(5, 10.0), randn(5)
    with pytest.raises(ValueError, match="x0"):
        solve_in_metric(A, b, root=lambda v: v, x0=b)
    solution = solve_in_metric(A, b * nan, root=lambda v: v, damping=0.1)
    assert solution.status is Status.NON_FINITE
    assert solution.x.isnan().all()


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"damping": -1.0}, r"damping must lie in \[0, inf\), got -1.0"),
        ({"damping": nan}, "damping must .* got nan"),
        ({"damping": inf}, "damping must .* got inf"),
        ({"max_iterations": 0}, "max_iterations must be at least 1, got 0"),
        ({"rtol": -1e-3}, r"rtol must lie in \[0, inf\), got -0.001"),
        ({"rtol": nan}, r"rtol must lie in \[0, inf\), got nan"),
        ({"progress_tolerance": -5}, r"progress_tolerance must lie in \[0, inf\), got -5"),
        ({"progress_tolerance": nan}, r"progress_tolerance must lie in \[0, inf\), got nan"),
        ({"progress_tolerance": "x"}, "progress_tolerance must be a number, got 'x'"),
        ({"residual_refresh": 0}, "residual_refresh must be at least 1, got 0"),
        ({"sync_every": 0}, "sync_every must be at least 1, got 0"),
        ({"x0": torch.zeros(4)}, r"x0 must have the shape \(3,\) of b, got \(4,\)"),
    ],
)
def test_cg_refuses_bad_arguments_before_any_work(options, match):
    A = Counting(torch.eye(3))
    with pytest.raises((TypeError, ValueError), match=match):
        conjugate_gradient(A, torch.ones(3), **options)
    assert A.products == 0


def test_bad_systems_are_refused():
    for solver in (conjugate_gradient, dense_solve):
        with pytest.raises(ValueError, match=r"b must be a floating-point tensor .* got torch.int64"):
            solver(torch.eye(3), torch.ones(3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"b must be .* got torch.float64 \(3, 1, 1\)"):
            solver(torch.eye(3), torch.ones(3, 1, 1))
        with pytest.raises(ValueError, match=r"b must have at least one column, got \(3, 0\)"):
            solver(torch.eye(3), torch.ones(3, 0))
    with pytest.raises(ValueError, match=r"A must be 3 × 3 for b of shape \(3,\), got \(4, 4\)"):
        dense_solve(torch.eye(4), torch.ones(3))
    with pytest.raises(ValueError, match="method must be 'cholesky' or 'eigh', got 'qr'"):
        dense_solve(torch.eye(3), torch.ones(3), method="qr")
    for rcond in (-1, nan):
        with pytest.raises(ValueError, match=rf"rcond must lie in \[0, inf\), got {rcond}"):
            dense_solve(torch.eye(3), torch.ones(3), method="eigh", rcond=rcond)


# -------------------------------------------------------------------------------------------------------- properties

PROBLEM = {"n": st.integers(1, 12), "seed": st.integers(0, 2**16), "log_condition": st.floats(0, 3)}
QUICK = settings(max_examples=25, deadline=None, derandomize=True)


@QUICK
@given(**PROBLEM, damping=st.sampled_from([0.0, 1e-3, 1.0]))
def test_cg_and_dense_agree_on_random_systems(spd, n, seed, log_condition, damping):
    A, b = spd(n, 10**log_condition, seed), randn(n, seed=seed)
    x = torch.linalg.solve(A + damping * torch.eye(n, dtype=torch.float64), b)
    cg = conjugate_gradient(A, b, damping=damping, rtol=1e-12, max_iterations=500)
    assert cg.status is Status.CONVERGED
    assert relative(cg.x, x) < 1e-8
    assert relative(dense_solve(A, b, damping=damping).x, x) < 1e-9


@QUICK
@given(**PROBLEM, log2_a=st.integers(-60, 60), log2_b=st.integers(-60, 60))
def test_powers_of_two_change_not_one_bit(spd, n, seed, log_condition, log2_a, log2_b):
    A, b = spd(n, 10**log_condition, seed), randn(n, seed=seed)
    plain, scaled = conjugate_gradient(A, b), conjugate_gradient(A * 2.0**log2_a, b * 2.0**log2_b)
    assert torch.equal(scaled.x, plain.x * 2.0 ** (log2_b - log2_a))
    assert (scaled.status, scaled.iterations) == (plain.status, plain.iterations)


@QUICK
@given(**PROBLEM)
def test_the_model_falls_in_every_iteration(spd, n, seed, log_condition):
    """φ(xᵢ) decreases, ‖xᵢ‖ and sᵀAs grow (Steihaug 1983), so a truncated solve is a shorter step of the same kind."""
    A, b = spd(n, 10**log_condition, seed), randn(n, seed=seed)
    # Towards the end directions are conjugate to a few digits only, for the textbook's recurrences as for ours.
    solutions = [conjugate_gradient(A, b, max_iterations=i, rtol=1e-9) for i in range(1, max(2, n // 2) + 1)]
    for before, after in pairwise(solutions):
        assert after.model_value <= before.model_value * (1 - 1e-12)
        assert after.x.norm() >= before.x.norm() * (1 - 1e-9)
        assert after.curvature >= before.curvature * (1 - 1e-9)


def residual_of(A: torch.Tensor, damping: float, x: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """‖b − (A + λI)x‖/‖b‖ in extended precision, and what rounding may make of it in the dtype of x."""
    kind = torch.finfo(b.dtype)
    M, x, b = (t.numpy().astype(np.longdouble) for t in (A, x, b))
    M = M + np.longdouble(damping) * np.eye(len(M), dtype=np.longdouble)
    norm_b, size = np.sqrt((b * b).sum()), len(M) * np.abs(M).max()
    residual = np.sqrt(((b - M @ x) ** 2).sum()) / norm_b
    smallest = kind.tiny * kind.eps * len(M) * (size + len(M) * np.abs(x).max() + 1)
    return float(residual), float((200 * kind.eps * size * np.sqrt((x * x).sum()) + 4 * smallest) / norm_b)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["definite", "ill", "singular", "indefinite", "zero"]),
    double=st.booleans(),
    log_a=st.floats(-1, 1),
    log_b=st.floats(-1, 1),
    columns=st.integers(0, 3),
    start=st.sampled_from([None, -10.0, 0.0, 4.0, 17.0]),
    preconditioned=st.booleans(),
    damped=st.booleans(),
    solver=st.sampled_from(["cg", "cg", "cholesky", "eigh"]),
)
def test_a_status_means_what_it_says_at_every_scale(
    seed, kind, double, log_a, log_b, columns, start, preconditioned, damped, solver
):
    """Scales from 1e-300 to 1e300 (1e-38 to 1e38 in float32): CONVERGED is a residual, and x is finite unless said."""
    generator = np.random.default_rng(seed)
    dtype, decades = (torch.float64, 300) if double else (torch.float32, 38)
    n = int(generator.integers(1, 10))
    basis, _ = np.linalg.qr(generator.standard_normal((n, n)))
    values = {"definite": 1e2, "ill": 1e12}.get(kind, 1e1) ** -np.linspace(0, 1, n)
    if kind in ("singular", "indefinite"):
        values[-1] *= 0 if kind == "singular" else -1
    matrix = (basis * values) @ basis.T * (kind != "zero") * 10.0 ** (decades * log_a)
    b = torch.tensor(generator.standard_normal((n, columns) if columns else n) * 10.0 ** (decades * log_b)).to(dtype)
    A = torch.tensor((matrix + matrix.T) / 2).to(dtype)
    options = {"damping": float(10.0 ** (decades * log_a) / 100)} if damped else {}
    if start is not None:
        size = 10.0 ** max(min(start + decades * (log_b - log_a), 307), -307)
        options["x0"] = torch.tensor(generator.standard_normal(b.shape) * size).to(dtype)
    rtol = 1e-4
    if solver == "cg":
        diagonal = torch.where(A.diagonal() > 0, A.diagonal(), 1.0)
        jacobi = (lambda r: (r.reshape(n, -1) / diagonal[:, None]).reshape(r.shape)) if preconditioned else None
        s = conjugate_gradient(A, b, rtol=rtol, preconditioner=jacobi, max_iterations=50, **options)
    else:
        s = dense_solve(A, b, method=solver, **options)
    for status, x, right, said in zip(
        s.statuses, s.x.reshape(n, -1).T, b.reshape(n, -1).T, s.residual_norm.reshape(-1), strict=True
    ):
        if status is Status.NON_FINITE:
            continue
        assert torch.isfinite(x).all()
        if not right.any():
            assert not x.any()
            continue
        residual, rounding = residual_of(A, options.get("damping", 0.0), x, right)
        assert float(said) == pytest.approx(residual, rel=0.05, abs=rounding + 1e-7)
        if status is Status.CONVERGED and solver != "eigh":
            assert residual <= rtol + rounding + 1e-5


@pytest.mark.parametrize(
    ("preconditioner", "message"),
    [
        (lambda r: r.div_(2.0), "preconditioner changed the vector that it was given"),
        (lambda r: r / torch.ones(3, 1), r"preconditioner must map vectors of shape \(3,\).* got \(3, 3\)"),
        (lambda r: torch.tensor(1.0), r"preconditioner must map vectors of shape \(3,\).* got \(\)"),
        (lambda r: None, "preconditioner must map tensors to tensors"),
    ],
)
def test_what_a_preconditioner_returns_is_looked_at(preconditioner, message):
    with pytest.raises((TypeError, ValueError), match=message):
        conjugate_gradient(torch.eye(3), torch.ones(3), preconditioner=preconditioner)


def test_a_product_that_changes_its_vector_is_refused():
    with pytest.raises(ValueError, match="A changed the vector that it was given"):
        conjugate_gradient(lambda v: v.mul_(2.0), torch.ones(3))


@pytest.mark.parametrize("method", ["cholesky", "eigh"])
def test_dense_refuses_what_is_not_real_and_symmetric(method):
    b = torch.ones(2)
    with pytest.raises(ValueError, match=r"A must be real, got torch\.complex"):
        dense_solve(torch.tensor([[2.0, 1j], [-1j, 2.0]]), b, method=method)
    with pytest.raises(ValueError, match=r"A must be symmetric, its halves differ by 1\.0e\+00"):
        dense_solve(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), b, method=method)
    empty = dense_solve(torch.zeros(0, 0), torch.zeros(0), method=method)
    assert empty.x.shape == (0,)
