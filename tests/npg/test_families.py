"""Every family against torch.distributions, against its textbook metric, and against the theorems."""

import math
from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions as D
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from npg import Fisher, families
from npg.families.base import OutOfDomainError
from npg.optim import NGD, DiagonalNGD

pytestmark = pytest.mark.usefixtures("double")

REFERENCE = {
    "categorical": lambda o: D.Categorical(logits=o),
    "bernoulli": lambda o: D.Independent(D.Bernoulli(logits=o), 1),
    "diagonal_gaussian": lambda o: D.Independent(D.Normal(o.chunk(2, -1)[0], o.chunk(2, -1)[1].exp()), 1),
    "gaussian": lambda o: D.Independent(D.Normal(o, math.sqrt(0.7)), 1),
}


def outputs_of(case: SimpleNamespace, *leading: int, seed: int = 0) -> torch.Tensor:
    return 0.7 * torch.randn(*leading, case.size, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ against references


@pytest.mark.parametrize("name", REFERENCE)
def test_equals_torch_distributions(name, every_family, assert_close):
    case, reference = every_family[name], REFERENCE[name]
    a, b = outputs_of(case, 2, 5), outputs_of(case, 2, 5, seed=1)
    y = case.family.sample(a, torch.Generator().manual_seed(0))
    assert_close(case.family.log_likelihood(a, y), reference(a).log_prob(y))
    assert_close(case.family.entropy(a), reference(a).entropy())
    assert_close(case.family.kl(a, b), D.kl_divergence(reference(a), reference(b)))


def test_multi_categorical_is_its_parts(assert_close):
    whole, part = families.MultiCategorical([2, 3]), families.Categorical()
    a, b = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    y = whole.sample(a)
    assert y.shape == (7, 2)
    parts = part.log_likelihood(a[:, :2], y[:, 0]) + part.log_likelihood(a[:, 2:], y[:, 1])
    assert_close(whole.log_likelihood(a, y), parts)
    assert_close(whole.kl(a, b), part.kl(a[:, :2], b[:, :2]) + part.kl(a[:, 2:], b[:, 2:]))
    assert_close(whole.entropy(a), part.entropy(a[:, :2]) + part.entropy(a[:, 2:]))


def test_gaussian_variance_has_units(assert_close):
    mean, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]])
    family = families.Gaussian(variance=4.0)
    by_hand = -0.5 * 4 / 4 - 2 * 0.5 * math.log(2 * math.pi * 4.0)
    assert_close(family.log_likelihood(mean, target), torch.tensor([by_hand]))
    assert_close(family.kl(mean, target), torch.tensor([0.5]))


# ------------------------------------------------------------------------------------------------------ the geometry


def test_metric_is_the_textbook_matrix(case, dense_metric, assert_close):
    outputs = outputs_of(case, 2, 3)
    units = torch.eye(outputs.numel()).reshape(-1, *outputs.shape)
    matrix = case.family.metric(outputs)(units).reshape(outputs.numel(), -1)
    assert_close(matrix, dense_metric(case, outputs))


def test_metric_takes_tangents_with_and_without_further_axes(case, assert_close):
    outputs, tangents = outputs_of(case, 2, 3), torch.randn(4, 2, 3, case.size)
    metric = case.family.metric(outputs)
    assert_close(metric(tangents), torch.stack([metric(u) for u in tangents]))


def test_factor_times_its_transpose_is_the_metric(case, assert_close):
    outputs = outputs_of(case, 3)
    units = torch.eye(outputs.numel()).reshape(-1, *outputs.shape)
    rows = case.family.metric_factor(outputs)(units).reshape(outputs.numel(), -1)  # row i is L eᵢ
    matrix = case.family.metric(outputs)(units).reshape(outputs.numel(), -1)
    assert_close(rows.T @ rows, matrix)


def test_metric_is_the_hessian_of_the_kl_in_either_argument(case, assert_close):
    outputs = outputs_of(case, 1)[0]
    metric = case.metric(outputs)
    hessian = torch.autograd.functional.hessian
    assert_close(hessian(lambda new: case.family.kl(outputs, new), outputs), metric)
    assert_close(hessian(lambda old: case.family.kl(old, outputs), outputs), metric)


def test_metric_is_the_covariance_of_the_score(case):
    """E[∇log p ∇log pᵀ] = M and E[∇log p] = 0, within five standard errors of a mean over 40 000 draws."""
    torch.manual_seed(0)
    outputs = outputs_of(case, 1)[0].expand(40_000, -1)
    score = case.family.score(outputs, case.family.sample(outputs))
    outer = score.unsqueeze(-1) * score.unsqueeze(-2)
    for draws, expected in ((score, torch.zeros(case.size)), (outer, case.metric(outputs[0]))):
        error = (draws.mean(0) - expected).abs()
        assert (error <= 5 * draws.std(0) / math.sqrt(len(draws)) + 1e-12).all()


def test_score_is_the_gradient_of_the_log_likelihood(case, assert_close):
    torch.manual_seed(0)
    outputs = outputs_of(case, 2, 3)
    y = case.family.sample(outputs)
    score = case.family.score(outputs, y)
    assert not score.requires_grad
    assert not outputs.requires_grad  # it is the caller's
    assert not case.family.score(outputs.clone().requires_grad_(), y).requires_grad
    direction, h = torch.randn_like(outputs), 1e-5
    up, down = (case.family.log_likelihood(outputs + s * h * direction, y) for s in (1, -1))
    slope = (up - down) / (2 * h)
    torch.testing.assert_close((score * direction).sum(-1), slope, rtol=1e-7, atol=1e-8)


def test_kl_is_positive_and_zero_only_at_equality(case):
    a, b = outputs_of(case, 200), outputs_of(case, 200, seed=1)
    assert (case.family.kl(a, b) > 0).all()
    torch.testing.assert_close(case.family.kl(a, a), torch.zeros(200), rtol=0, atol=1e-13)
    assert case.family.kl(a, b).shape == (200,)


def test_kl_is_the_mean_log_ratio(case):
    torch.manual_seed(0)
    a, b = (outputs_of(case, 1, seed=s)[0].expand(40_000, -1) for s in (0, 1))
    y = case.family.sample(a)
    ratio = case.family.log_likelihood(a, y) - case.family.log_likelihood(b, y)
    error = ratio.mean() - case.family.kl(a[0], b[0])
    assert error.abs() <= 5 * ratio.std() / 200


def test_entropy_is_the_mean_surprise(case):
    torch.manual_seed(0)
    outputs = outputs_of(case, 1)[0].expand(40_000, -1)
    surprise = -case.family.log_likelihood(outputs, case.family.sample(outputs))
    try:
        entropy = case.family.entropy(outputs[0])
    except NotImplementedError:
        pytest.skip("torch.distributions has no entropy of this family")
    assert (surprise.mean() - entropy).abs() <= 5 * surprise.std() / 200


def test_tiny_steps_keep_the_digits_of_the_gaussian_kl():
    """KL ≈ ½dᵀMd = d² for a change d of log σ, although it is a difference of numbers of size d."""
    old = torch.tensor([[0.3, -0.5]])
    for d in (1e-3, 1e-5, 1e-7):
        kl = families.DiagonalGaussian().kl(old, old + torch.tensor([0.0, d]))
        assert abs(float(kl) / d**2 - 1) < 10 * d


# ---------------------------------------------------------------------------------------------------------- sampling


def test_sampling_frequencies():
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    p = torch.tensor([0.1, 0.2, 0.7])
    draws = families.Categorical().sample(p.log().expand(n, -1), generator)
    frequency = torch.bincount(draws, minlength=3) / n
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()

    logits = torch.tensor([-1.0, 0.5]).expand(n, -1)
    bits = families.Bernoulli().sample(logits, generator)
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    p = logits[0].sigmoid()
    assert ((bits.mean(0) - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()

    for family, outputs, std in (
        (families.DiagonalGaussian(), torch.tensor([2.0, math.log(3.0)]), 3.0),
        (families.Gaussian(variance=9.0), torch.tensor([2.0]), 3.0),
    ):
        y = family.sample(outputs.expand(n, -1), generator)
        assert y.shape == (n, 1)
        assert abs(float(y.mean()) - 2) <= 5 * std / math.sqrt(n)
        assert abs(float(y.std()) - std) <= 5 * std / math.sqrt(2 * n)


def test_a_generator_decides_the_sample_and_the_global_stream_stays(case):
    outputs = outputs_of(case, 50)
    state = torch.get_rng_state()
    a, b = (tree_leaves(case.family.sample(outputs, torch.Generator().manual_seed(3))) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(3)
    a, b = (tree_leaves(case.family.sample(outputs, generator)) for _ in range(2))
    assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_draws_of_a_distribution_of_pytorch_do_not_repeat():
    family, generator = families.from_torch(lambda o: D.Normal(o[..., 0], 1.0)), torch.Generator().manual_seed(0)
    draws = torch.cat([family.sample(torch.zeros(1, 1), generator) for _ in range(500)])
    assert len(draws.unique()) == 500


# ------------------------------------------------------------------------------------------------- independent parts


def test_a_multi_categorical_is_the_product_of_its_variables():
    """To the last bit: of one kind of part, the sums are the same."""
    multi, parts = families.MultiCategorical([2, 1, 4]), families.Product([families.Categorical()] * 3, [2, 1, 4])
    a, b, u = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(0))
    y = multi.sample(a, torch.Generator().manual_seed(1))
    assert all(map(torch.equal, parts.sample(a, torch.Generator().manual_seed(1)), y.unbind(-1)))
    assert torch.equal(multi.log_likelihood(a, y), parts.log_likelihood(a, y.unbind(-1)))
    assert torch.equal(multi.score(a, y), parts.score(a, y.unbind(-1)))
    assert torch.equal(multi.kl(a, b), parts.kl(a, b))
    assert torch.equal(multi.entropy(a), parts.entropy(a))
    assert torch.equal(multi.metric(a)(u), parts.metric(a)(u))
    assert torch.equal(multi.metric_factor(a)(u), parts.metric_factor(a)(u))


def test_a_diagonal_gaussian_is_the_product_of_its_components(assert_close):
    """[m₁, m₂, m₃, s₁, s₂, s₃] are the outputs of the whole, and [m₁, s₁, m₂, s₂, m₃, s₃] those of the parts."""
    whole, parts = families.DiagonalGaussian(), families.Product([families.DiagonalGaussian()] * 3, [2, 2, 2])
    order = [0, 3, 1, 4, 2, 5]
    a, b, u = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))
    y = torch.randn(6, 3)
    assert_close(parts.log_likelihood(a[:, order], y.split(1, -1)), whole.log_likelihood(a, y))
    assert_close(parts.score(a[:, order], y.split(1, -1)), whole.score(a, y)[:, order])
    assert_close(parts.kl(a[:, order], b[:, order]), whole.kl(a, b))
    assert_close(parts.entropy(a[:, order]), whole.entropy(a))
    for name in ("metric", "metric_factor"):
        assert_close(getattr(parts, name)(a[:, order])(u[:, order]), getattr(whole, name)(a)(u)[:, order])


def test_a_product_of_every_family_in_two_levels(every_family, dense_metric, assert_close):
    """Sums and blocks of the parts', each taken by itself; the parts are nested by twos."""
    cases = [case for name, case in every_family.items() if name != "product"]
    pairs = [cases[i : i + 2] for i in range(0, len(cases), 2)]
    whole = families.Product(
        [families.Product([case.family for case in pair], [4] * len(pair)) for pair in pairs],
        [4 * len(pair) for pair in pairs],
    )
    a, b = torch.randn(2, 3, 4 * len(cases), generator=torch.Generator().manual_seed(0)) * 0.7
    y = whole.sample(a, torch.Generator().manual_seed(1))
    assert [len(part) for part in y] == [len(pair) for pair in pairs]
    split = list(zip(cases, a.split(4, -1), b.split(4, -1), tree_leaves(y), strict=True))
    assert_close(whole.log_likelihood(a, y), sum(c.family.log_likelihood(o, t) for c, o, _, t in split))
    assert_close(whole.kl(a, b), sum(c.family.kl(o, p) for c, o, p, _ in split))
    assert_close(whole.score(a, y), torch.cat([c.family.score(o, t) for c, o, _, t in split], -1))
    for event in range(3):
        dense = torch.block_diag(*(dense_metric(c, o[event]) for c, o, *_ in split))
        units = torch.eye(len(dense))
        assert_close(whole.metric(a[event])(units), dense)
        factor = whole.metric_factor(a[event])(units)
        assert_close(factor.T @ factor, dense)


def test_what_a_product_cannot_be_made_of_is_refused():
    one, gauss = families.Categorical(), families.DiagonalGaussian()
    for parts, sizes, error, match in (
        ([], [], ValueError, "at least one part"),
        ([one, gauss], [3], ValueError, "got 2 parts and 1 sizes"),
        ([one], [0], ValueError, r"at least 1, got 0 for Categorical\(\)"),
        ([one], [2.0], ValueError, "whole numbers of outputs, at least 1, got 2.0"),
        ([one], [True], ValueError, "got True"),
        ([one, families.Product([one], [3])], [3, 4], ValueError, r"has 4 for Product.*takes 3 outputs: write that"),
        (
            [families.DiagonalGaussian()],
            [3],
            ValueError,
            r"has 3 for DiagonalGaussian\(\), which .* even .*: write 2",
        ),
        ([families.MultiCategorical([2, 2])], [3], ValueError, r"has 3 for MultiCategorical.*takes 4 outputs"),
        ([torch.nn.MSELoss()], [3], TypeError, r"families.Gaussian\(\)"),
        (one, [3], TypeError, r"must be lists.*write Product\(\["),
    ):
        with pytest.raises(error, match=match):
            families.Product(parts, sizes)
    product = families.Product([one, gauss], [3, 4])
    outputs = torch.zeros(5, 7)
    indices, reals = torch.zeros(5, dtype=torch.long), torch.zeros(5, 2)
    for bad, targets, match in (
        (outputs, torch.zeros(5, 3), "targets must be a tuple of 2, those of each part of .*, got a Tensor"),
        (outputs, (indices,), "targets must be a tuple of 2.*, got 1"),
        (outputs, (reals, indices), r"targets must have shape \(5,\)"),
        (outputs, (indices, reals[:1]), r"targets must have the shape \(5, 2\) of the mean, got \(1, 2\)"),
        (torch.zeros(5, 8), (indices, reals), r"outputs must have 7 = sum\(\[3, 4\]\) components"),
    ):
        for method in (product.log_likelihood, product.score):
            with pytest.raises(ValueError, match=match):
                method(bad, targets)


def test_outputs_out_of_the_domain_of_one_part_are_so_for_the_product():
    poisson = families.from_torch(lambda o: D.Independent(D.Poisson(o.exp()), 1))
    product = families.Product([families.Categorical(), poisson], [2, 1])
    with pytest.raises(families.OutOfDomainError, match="is not defined at these outputs"):
        product.metric(torch.tensor([[0.0, 0.0, 800.0]]))


# ------------------------------------------------------------------------------------------------------ hard outputs


def test_forbidden_classes_have_no_probability_no_metric_and_no_gradient(assert_close):
    family, small = families.Categorical(), families.Categorical()
    free = torch.tensor([[0.3, -0.2, 0.9], [1.0, 0.0, -1.0]])
    old = torch.cat([free, torch.full((2, 1), -torch.inf)], -1).requires_grad_()
    new = torch.cat([free.flip(0), torch.full((2, 1), -torch.inf)], -1).requires_grad_()
    y = torch.tensor([0, 2])
    for value, twin in (
        (family.kl(old, new), small.kl(free, free.flip(0))),
        (family.entropy(old), small.entropy(free)),
        (family.log_likelihood(old, y), small.log_likelihood(free, y)),
    ):
        assert_close(value.detach(), twin)
        gradients = torch.autograd.grad(value.sum(), [old, new], allow_unused=True)
        for gradient in gradients:
            if gradient is not None:
                assert torch.isfinite(gradient).all()
                assert (gradient[:, 3] == 0).all()
                assert gradient[:, :3].abs().amax() > 1e-3
    u = torch.randn(2, 4)
    for name in ("metric", "metric_factor"):
        moved = getattr(family, name)(old)(u)
        assert (moved[:, 3] == 0).all()
        assert_close(moved[:, :3], getattr(small, name)(free)(u[:, :3]))
    assert (family.sample(old.expand(50, 2, 4)) < 3).all()
    assert (family.score(old.detach(), y)[:, 3] == 0).all()


def test_a_class_that_becomes_forbidden_is_infinitely_far():
    old, new = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -torch.inf]])
    assert families.Categorical().kl(old, new) == torch.inf
    assert torch.isfinite(families.Categorical().kl(new, old))


def test_nan_is_not_hidden():
    good, bad = torch.zeros(1, 4), torch.tensor([[0.0, torch.nan, 0.0, 0.0]])
    for family in (families.Categorical(), families.Bernoulli(), families.DiagonalGaussian(), families.Gaussian()):
        assert family.kl(good, bad).isnan().all()
        assert family.kl(bad, good).isnan().all()
        assert family.entropy(bad).isnan().all() or isinstance(family, (families.Gaussian, families.DiagonalGaussian))


@pytest.mark.parametrize("size", [60.0, 800.0])
def test_extreme_but_finite_outputs_stay_finite(size):
    extreme = torch.tensor([[size, -size, 0.0, -size]])
    other = torch.tensor([[-size, size, 0.0, size]])
    for family in (families.Categorical(), families.Bernoulli()):
        for value in (family.kl(extreme, other), family.entropy(extreme), family.metric(extreme)(torch.ones(1, 4))):
            assert torch.isfinite(value).all()
    # by hand: each of the three bits pays about `size`
    torch.testing.assert_close(
        families.Bernoulli().kl(extreme, other), torch.tensor([3 * size]), rtol=1e-12, atol=1e-12
    )


def test_half_precision_kl_and_metric_stay_in_the_dtype():
    for family in (families.Categorical(), families.Bernoulli(), families.DiagonalGaussian(), families.Gaussian()):
        outputs = torch.randn(3, 4, dtype=torch.float32)
        assert family.kl(outputs, outputs).dtype is torch.float32
        assert family.metric(outputs)(outputs).dtype is torch.float32
        assert family.sample(outputs).shape == family.sample(outputs.double()).shape


# ---------------------------------------------------------------------------------------------------------- equality


class Scaled(families.Categorical):
    """With an attribute of its own."""

    def __init__(self, scale):
        self.scale = scale


def beta(outputs):
    return D.Beta(*outputs.exp().unbind(-1))


FAMILIES = [
    families.Categorical,
    families.Bernoulli,
    families.DiagonalGaussian,
    families.Gaussian,
    lambda: families.Gaussian(2),
    lambda: families.MultiCategorical([2, 3]),
    lambda: families.Product([families.Categorical(), families.Categorical()], [2, 3]),
    lambda: families.Product([families.Categorical(), families.Gaussian(2.0)], [2, 3]),
    lambda: families.Product([families.Categorical(), families.Gaussian(3.0)], [2, 3]),
    lambda: families.from_torch(beta),
    lambda: families.from_torch(lambda o: beta(o)),  # another function each time would be another family
    lambda: Scaled(2.0),
    lambda: Scaled(torch.tensor([1.0, 2.0])),
    lambda: Scaled(torch.tensor([1.0, 3.0])),
    lambda: Scaled(torch.tensor([1.0, 2.0], dtype=torch.float32)),
    lambda: Scaled(np.ones(2)),
]


def test_families_are_equal_by_class_and_attributes():
    made = [make() for make in FAMILIES]
    for i, family in enumerate(made):
        assert [j for j, other in enumerate(made) if family == other] == [i]
    for make in FAMILIES:
        one, other = make(), make()
        if not isinstance(getattr(one, "scale", None), np.ndarray) and "lambda" not in repr(one):
            assert one == other
            assert {one: "found"}[other] == "found"
    assert Scaled(2.0) != Scaled(torch.ones(2))
    assert families.Categorical() != "categorical"


def test_too_little_memory_for_float64_is_said():
    """And not taken for a function of float32 alone, whose result would have other digits."""

    def function(outputs):
        if outputs.dtype is torch.float64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return outputs

    with pytest.raises(torch.OutOfMemoryError):
        families.in_double(function, torch.ones(2, dtype=torch.float32))


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("family", "outputs", "targets", "match"),
    [
        (families.Categorical(), (5, 3), (5, 3), r"targets must have shape \(5,\).*got \(5, 3\)"),
        (families.Categorical(), (5, 3), (4,), r"targets must have shape \(5,\).*got \(4,\)"),
        (families.Bernoulli(), (5, 3), (5,), r"targets must have the shape \(5, 3\).*got \(5,\)"),
        (families.MultiCategorical([1, 2]), (5, 3), (5, 3), r"targets must have shape \(5, 2\).*got \(5, 3\)"),
        (families.MultiCategorical([1, 2]), (5, 4), (5, 2), r"outputs must have 3 = sum.*got 4"),
        (families.DiagonalGaussian(), (5, 4), (5, 4), r"targets must have the shape \(5, 2\).*got \(5, 4\)"),
        (families.DiagonalGaussian(), (5, 3), (5, 1), r"last axis must be even, got 3"),
        (families.Gaussian(), (5, 1), (5,), r"targets must have the shape \(5, 1\).*got \(5,\)"),
    ],
)
def test_wrong_shapes_are_refused_instead_of_broadcast(family, outputs, targets, match):
    with pytest.raises(ValueError, match=match):
        family.log_likelihood(torch.zeros(outputs), torch.zeros(targets))


def test_bad_constructor_arguments_are_named():
    for variance in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"variance must lie in \(0, inf\), got {variance}"):
            families.Gaussian(variance)
    with pytest.raises(ValueError, match="sizes must name at least one variable"):
        families.MultiCategorical([])
    for sizes, error, match in (
        ([2, 0], ValueError, r"sizes\[1\] must be at least 1, got 0"),
        ([2.7, 3], TypeError, r"sizes\[0\] must be a whole number, got 2.7"),
        ([True, 3], TypeError, r"sizes\[0\] must be a whole number, got True"),
    ):
        with pytest.raises(error, match=match):
            families.MultiCategorical(sizes)
    assert families.MultiCategorical(np.array([2, 3])).sizes == [2, 3]


def test_a_draw_from_a_generator_seeds_no_other(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    family, outputs = families.from_torch(lambda o: D.Beta(*o.exp().unbind(-1))), torch.randn(5, 2)
    before = torch.get_rng_state()
    draws = [family.sample(outputs, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


def test_from_torch_refuses_what_gives_no_geometry():
    outputs = torch.randn(5, 3)
    factors = families.from_torch(lambda o: D.Normal(o, 1.0))
    with pytest.raises(ValueError, match=r"batch_shape \(5,\), got \(5, 3\): wrap .*Independent"):
        factors.log_likelihood(outputs, outputs)
    without_kl = families.from_torch(lambda o: D.Independent(D.StudentT(5.0, o), 1))
    with pytest.raises(NotImplementedError, match="no KL divergence is registered for StudentT"):
        without_kl.metric(outputs)
    # |d| + e^{−|d|} − 1 is ½d² to second order, but automatic differentiation sees sign(0) = 0
    laplace = families.from_torch(lambda o: D.Independent(D.Laplace(o, 1.0), 1))
    with pytest.raises(ValueError, match="does not find the curvature"):
        laplace.metric(outputs)
    wide = families.from_torch(lambda o: D.Laplace(o[..., 0], o[..., 1].exp()))  # so wide that one event has no kink
    with pytest.raises(ValueError, match="does not find the curvature"):
        wide.metric(torch.tensor([[0.0, 0.0], [0.0, 20.0]]))
    shifted = families.from_torch(lambda o: D.Independent(D.Normal(o + torch.rand_like(o), 1.0), 1))
    with pytest.raises(ValueError, match="has no minimum there"):
        shifted.metric(outputs)
    endless = families.from_torch(lambda o: D.Independent(D.Normal(o, (1e4 * o).exp() * 0 + 1e-200, False), 1))
    with pytest.raises(ValueError, match="not finite"):
        endless.metric(outputs)
    fixed = families.from_torch(lambda o: D.Normal(torch.zeros(o.shape[:-1]), 1.0))
    with pytest.raises(ValueError, match="does not depend on the outputs"):
        fixed.metric(outputs)


ONE = torch.ones(1, dtype=torch.float32)  # a constant that keeps a map from float64
KINKS = {
    "multiplicative noise": (lambda o: D.Laplace(o[..., 0], 0.2 * o[..., 0].abs() + 0.01), 1),
    "a part in the spread": (lambda o: D.Laplace(o[..., 0], functional.softplus(o[..., 0] + o[..., 1])), 2),
    "among many": (lambda o: D.Laplace(o[..., 0], functional.softplus(o.sum(-1))), 8),
    "large units": (lambda o: D.Laplace(o[..., 0], 1e5 * o[..., 1].exp()), 2),
    "small units": (lambda o: D.Laplace(o[..., 0], 1e-5 * o[..., 1].exp()), 2),
    "float32": (lambda o: D.Laplace(o[..., :1] @ ONE, o[..., 1].exp()), 2),
    "float32, wide": (lambda o: D.Laplace(o[..., :1] @ ONE, 3 * o[..., 1].exp()), 2),
}


@pytest.mark.parametrize("kind", KINKS)
def test_a_curvature_that_differentiation_does_not_find_is_refused(kind):
    """A Laplace distribution has 1/b² in its location, of which |d| in its KL hides all."""
    distribution, size = KINKS[kind]
    outputs = torch.randn(5, size, dtype=torch.float32 if "float32" in kind else torch.float64)
    with pytest.raises(ValueError, match=r"does not find the curvature .* a Family whose metric\(outputs\)"):
        families.from_torch(distribution).metric(outputs)


def slope_of_clamp(value: float) -> float:
    """PyTorch's: on the edge itself 1, since 2.14 0."""
    x = torch.tensor(value, requires_grad=True)
    return float(torch.autograd.grad(x.clamp(0, 1), x)[0])


@pytest.mark.parametrize("event", [0.0, 1e-5, 1e-3, 0.3, 30.0])
@pytest.mark.parametrize(
    ("distribution", "metric"),
    [
        (lambda o: D.Normal(o[..., 0].clamp(0, 1), 1.0), lambda o: slope_of_clamp(o) ** 2),
        (lambda o: D.Normal(o[..., 0].relu(), 0.1), lambda o: 100.0 * (o > 0)),
        (lambda o: D.Normal(o[..., 0] ** 3, 1.0), lambda o: 9 * o**4),
        (lambda o: D.Normal(functional.hardshrink(o[..., 0]), 1.0), lambda o: float(o > 0.5)),
        (lambda o: D.Poisson((10 * o[..., 0]).exp().clamp(max=1e12)), lambda o: 100 * math.exp(10 * o) * (o < 2.7)),
    ],
    ids=["clamp", "relu", "cube", "dead zone", "large counts"],
)
def test_the_metric_beside_an_edge_and_where_it_is_zero(distribution, metric, event):
    moved = families.from_torch(distribution).metric(torch.tensor([[event]]))(torch.ones(1, 1))
    torch.testing.assert_close(moved, torch.tensor([[metric(event)]]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "distribution",
    [
        lambda o: D.Weibull(o[..., 0].exp(), o[..., 1].exp()),
        lambda o: D.TransformedDistribution(D.Normal(o[..., 0], 1.0), [D.AffineTransform(o[..., 0], 1.0)]),
    ],
    ids=["weibull", "shifted twice"],
)
def test_a_kl_that_takes_a_transform_for_a_constant_is_refused(distribution):
    """PyTorch's KL of these is that of their bases: the second is N(2η, 1), and its metric 4 and not 1."""
    family = families.from_torch(distribution)
    for method in (family.metric, lambda o: family.kl(o, o + 0.1)):
        with pytest.raises(NotImplementedError, match="no KL divergence is registered for"):
            method(torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("scale", "edge", "metric"),
    [(lambda s: s.clamp(-5, 2).exp(), -5.0, 2.0), (lambda s: 0.1 + torch.relu(s), 0.0, 200.0)],
    ids=["clamp", "relu"],
)
def test_beside_the_edge_of_a_clamp_the_metric_is_that_of_its_side(scale, edge, metric):
    """A spread s that is held at its edge does not depend on its output there; beyond, the metric is 2 (s'/s)²."""
    family = families.from_torch(lambda o: D.Normal(o[..., 0], scale(o[..., 1])))
    outputs = torch.tensor([[0.3, edge - 0.004], [0.3, edge + 1e-9]], dtype=torch.float64)
    moved = family.metric(outputs)(torch.ones_like(outputs))
    precision = scale(outputs[:, 1]) ** -2
    torch.testing.assert_close(moved, torch.stack([precision, torch.tensor([0.0, metric]).double()], 1))


def test_targets_that_would_be_broadcast_are_refused():
    poisson = families.from_torch(lambda o: D.Poisson(o[..., 0].exp()))
    outputs, targets = torch.zeros(5, 1), torch.arange(5.0)
    torch.testing.assert_close(poisson.log_likelihood(outputs, targets), -1 - torch.lgamma(targets + 1))
    wanted = r"targets of shape \(5, 1\) have log-likelihoods of shape \(5, 5\).*give targets of shape \(5,\)"
    for method in (poisson.log_likelihood, poisson.score):
        with pytest.raises(ValueError, match=wanted):
            method(outputs, targets[:, None])


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        (families.Categorical(), [0, -100, 2], "class indices from 0 to 2, got -100 to 2"),
        (families.Categorical(), [1, 2, 3], "class indices from 0 to 2, got 1 to 3"),
        (families.Bernoulli(), [[1, -1, 1]] * 3, "bits, 0 or 1, .* got -1 to 1"),
        (families.Bernoulli(), [[0, 255, 0]] * 3, "bits, 0 or 1, .* got 0 to 255"),
        (families.MultiCategorical([2, 1]), [[0, 0], [1, 0], [2, 0]], "class indices from 0 to 1, got 0 to 2"),
    ],
)
def test_targets_that_no_event_has_are_refused(family, targets, message):
    model, x, targets = nn.Linear(2, 3), torch.randn(3, 2), torch.tensor(targets)
    takers = (
        NGD(model, family, damping=0.1).step,
        DiagonalNGD(model, family, lr=0.1).step,
        lambda x, y: Fisher(model, x, family, kind="empirical", targets=y),
    )
    for take in takers:
        with pytest.raises(ValueError, match=message):
            take(x, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decade", [-6, -3, 0, 4, 8])
def test_from_torch_keeps_its_metric_over_fourteen_decades(every_family, decade, dtype):
    """No false alarm of the check: a Poisson's metric in log rate is its rate, a normal's is 1/σ² in the mean."""
    outputs = torch.full((2, 3), decade * math.log(10.0), dtype=dtype)
    moved = every_family["poisson"].family.metric(outputs)(torch.ones_like(outputs))
    torch.testing.assert_close(moved, outputs.exp(), rtol=1e-4, atol=0)
    outputs = torch.tensor([[3.0, -2.0, 0.0, 0.0]], dtype=dtype)
    outputs[:, 2:] = -0.5 * decade * math.log(10.0)
    moved = every_family["normal"].family.metric(outputs)(torch.ones_like(outputs))
    expected = torch.tensor([[10.0**decade] * 2 + [2.0] * 2], dtype=dtype)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("decade", [-8, -4, 0, 4])
def test_from_torch_keeps_the_metric_of_a_gamma_in_its_rate(decade, assert_close):
    """α/β²: the KL's slope at equal arguments is α/β − α/β, whose rounding grows as the root of the metric."""
    rates = (1 + torch.rand(50, 1, generator=torch.Generator().manual_seed(0))) * 10.0**decade
    family = families.from_torch(lambda o: D.Gamma(3.0 + 0 * o[..., 0], o[..., 0]))
    assert_close(family.metric(rates)(torch.ones_like(rates)), 3 / rates.square())


def test_from_torch_takes_outputs_that_the_distribution_does_not_use(assert_close):
    family = families.from_torch(lambda o: D.Independent(D.Normal(o[..., :2], 1.0), 1))
    moved = family.metric(torch.randn(5, 3))(torch.ones(5, 3))
    assert_close(moved, torch.tensor([1.0, 1.0, 0.0]).expand(5, 3))


def test_names():
    assert repr(families.Categorical()) == "Categorical()"
    assert repr(families.MultiCategorical([2, 3])) == "MultiCategorical([2, 3])"
    assert repr(families.Gaussian(2.0)) == "Gaussian(variance=2.0)"
    product = families.Product([families.Categorical(), families.Gaussian(2.0)], [3, 1])
    assert repr(product) == "Product([Categorical(), Gaussian(variance=2.0)], [3, 1])"


def test_large_logits_keep_their_digits_on_both_sides():
    bits = families.Bernoulli()
    large = torch.tensor([20.0], dtype=torch.float32)
    exact = large.double()
    one = torch.ones(1, dtype=torch.float32)
    for sign in (1.0, -1.0):
        torch.testing.assert_close(
            bits.metric(sign * large)(one), bits.metric(exact)(one.double()).float(), rtol=1e-5, atol=0
        )
        kl = bits.kl(sign * large, sign * (large + 4))
        assert float(kl) == pytest.approx(float(bits.kl(sign * exact, sign * (exact + 4))), rel=1e-4)
        assert float(kl) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.complex64])
def test_class_indices_are_whole_numbers(dtype):
    logits = torch.randn(4, 3)
    targets = torch.tensor([0, 1, 2, 1])
    for family, indices in ((families.Categorical(), targets), (families.MultiCategorical([3]), targets.unsqueeze(-1))):
        with pytest.raises(ValueError, match=rf"targets must be class indices of an integer dtype, got {dtype}"):
            family.log_likelihood(logits, indices.to(dtype))
        expected = family.log_likelihood(logits, indices)
        for fine in (torch.int32, torch.uint8):
            assert torch.equal(family.log_likelihood(logits, indices.to(fine)), expected)


# ------------------------------------------------------------------------------------------------ digits and domains

F32, F64 = torch.float32, torch.float64


def exact_covariance(p: torch.Tensor) -> torch.Tensor:
    """diag(p) − ppᵀ entry by entry in rational arithmetic, of probabilities that need not sum to 1 exactly."""
    weights = [Fraction(x) for x in p.tolist()]
    total = sum(weights)
    q = [w / total for w in weights]
    rows = [[float(a * ((i == j) - b)) for j, b in enumerate(q)] for i, a in enumerate(q)]
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize(
    ("gap", "dtype"), [(4, F32), (14, F32), (16, F32), (30, F32), (14, F64), (36, F64), (60, F64), (300, F64)]
)
@pytest.mark.parametrize("certain", [0, 2])
def test_a_saturated_softmax_keeps_its_metric(gap, dtype, certain):
    """Entry by entry, so that it stays symmetric and positive; p(u − pᵀu) is 60 % off at a gap of 16 in float32."""
    outputs = torch.tensor([0.0, -1.0, 0.5, 0.2], dtype=dtype)
    outputs[certain] += gap
    p = (outputs.double() - outputs.double()[certain]).exp()
    expected, units = exact_covariance(p), torch.eye(4, dtype=dtype)
    tolerance = 64 * torch.finfo(dtype).eps
    family = families.Categorical()
    metric = family.metric(outputs)(units).double()
    factor = family.metric_factor(outputs)(units).double()
    for matrix in (metric, factor.T @ factor):
        torch.testing.assert_close(matrix, expected, rtol=tolerance, atol=0)
    root = expected.diagonal().rsqrt()  # of its correlations, whose eigenvalues are of the size of 1
    values = torch.linalg.eigvalsh(root[:, None] * 0.5 * (metric + metric.T) * root)
    assert values.min() >= -100 * tolerance
    # the constant of a tangent is in the null space, to the last bit
    assert torch.equal(family.metric(outputs)(torch.full_like(outputs, 1e6)), torch.zeros_like(outputs))
    # blocks of several variables, and the geometries that are built on it
    both = families.MultiCategorical([4, 4])
    halves = both.metric(torch.cat([outputs, outputs]))(torch.cat([units, units], -1)).double()
    torch.testing.assert_close(halves, torch.cat([expected, expected], -1), rtol=tolerance, atol=0)


@pytest.mark.parametrize("gap", [16, 30])
def test_a_saturated_softmax_keeps_its_score_and_entropy(gap):
    outputs = torch.tensor([[gap, 0.0, -1.0]] * 2, dtype=F32)
    exact = outputs.double()
    y = torch.tensor([0, 1])
    p = exact.softmax(-1)
    expected = torch.nn.functional.one_hot(y, 3) - p
    expected[0, 0] = p[0, 1:].sum()
    torch.testing.assert_close(families.Categorical().score(outputs, y).double(), expected, rtol=1e-5, atol=0)
    two = families.MultiCategorical([3, 3])
    pair = two.score(torch.cat([outputs, outputs], -1), torch.stack([y, y], -1))
    torch.testing.assert_close(pair.double(), torch.cat([expected, expected], -1), rtol=1e-5, atol=0)
    entropy = families.Categorical().entropy(exact)
    torch.testing.assert_close(families.Categorical().entropy(outputs).double(), entropy, rtol=1e-5, atol=0)
    assert float(entropy[0]) == pytest.approx(float(torch.special.entr(p[0, 1:]).sum() + p[0, 1:].sum()), rel=1e-4)


@pytest.mark.parametrize("logit", [-80.0, -30.0, -5.0, 0.0, 5.0, 30.0, 80.0])
def test_certain_bits_keep_their_score_and_entropy(logit):
    """η σ(η) and log(1 + e^η) differ by less than their rounding at 20; y − σ(η) is zero where σ(η) is nearly y."""
    bits = families.Bernoulli()
    outputs = torch.tensor([[logit]], dtype=F32)
    p, q = (torch.tensor([[math.exp(-math.log1p(math.exp(s * logit)))]], dtype=F64) for s in (-1, 1))
    surprise = p * math.log1p(math.exp(-logit)) + q * math.log1p(math.exp(logit))
    torch.testing.assert_close(bits.entropy(outputs).double(), surprise.sum(-1), rtol=1e-5, atol=0)
    for y, expected in ((1.0, q), (0.0, -p)):
        score = bits.score(outputs, torch.full_like(outputs, y))
        torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["categorical", "bernoulli", "multi_categorical", "diagonal_gaussian", "gaussian"]),
    size=st.sampled_from([0.1, 3.0, 30.0, 200.0]),
    step=st.sampled_from([1e-3, 1e-2, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_the_kl_is_positive_and_keeps_its_digits(every_family, name, size, step, seed):
    """In float32 against float64: Σ p log(p/q) alone has an error of ε, which is all of it for near distributions."""
    family, generator = every_family[name].family, torch.Generator().manual_seed(seed)
    old = (size * torch.randn(6, 4, generator=generator, dtype=F64)).float()
    if name == "diagonal_gaussian":
        old[:, 2:] *= 3 / max(size, 3)  # spreads that float32 holds
    new = old + (step * torch.randn(6, 4, generator=generator, dtype=F64)).float()
    kl, exact = family.kl(old, new).double(), family.kl(old.double(), new.double())
    # the step itself is rounded, by ε|η|; the smallest numbers underflow
    close = 1e-4 + 60 * torch.finfo(F32).eps * max(size, 1.0) / step
    assert ((kl - exact).abs() <= close * exact + 1e-12 * step).all()
    assert (exact >= 0).all()


def test_the_kl_of_equal_outputs_has_its_gradient_and_hessian_at_extremes():
    family = families.Categorical()
    outputs = torch.tensor([40.0, 0.0, -torch.inf, -800.0], requires_grad=True)
    kl = family.kl(outputs.detach(), outputs)
    (gradient,) = torch.autograd.grad(kl, outputs, create_graph=True)
    assert kl == 0
    assert (gradient == 0).all()
    (row,) = torch.autograd.grad(gradient[0], outputs)
    expected = family.metric(outputs)(torch.eye(4))[0]
    torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-17)


def test_spreads_beyond_the_square_root_of_the_range_have_a_factor():
    outputs = torch.tensor([0.0, -60.0], dtype=F32)
    units = torch.eye(2, dtype=F32)
    factor = families.DiagonalGaussian().metric_factor(outputs)(units)
    torch.testing.assert_close(
        factor.double().diagonal(), torch.tensor([math.exp(60), math.sqrt(2)]), rtol=1e-5, atol=0
    )


def test_registered_kls_are_taken_in_float64_where_they_can():
    """A Poisson's, λ log(λ/λ') − λ + λ', is off by more than 0.01 in float32 at a rate of 10⁶, and of either sign."""
    poisson = families.from_torch(lambda o: D.Independent(D.Poisson(o.exp()), 1))
    old = torch.full((50, 1), math.log(1e6), dtype=F32)
    new = old + torch.linspace(-1e-5, 1e-5, 50, dtype=F32)[:, None]
    d = (new.double() - old.double())[:, 0]
    kl = poisson.kl(old, new)
    assert kl.dtype is F32
    expected = old.double()[:, 0].exp() * (torch.expm1(d) - d)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-3, atol=1e-9)
    constant = torch.eye(3, dtype=F32)
    single = families.from_torch(lambda o: D.Independent(D.Normal(o @ constant, 1.0), 1))  # which takes float32 alone
    old, new = torch.zeros(2, 3, dtype=F32), torch.ones(2, 3, dtype=F32)
    torch.testing.assert_close(single.kl(old, new), torch.full((2,), 1.5, dtype=F32))
    torch.testing.assert_close(single.metric(old)(new), new)


BEYOND = {
    "poisson": (lambda o: D.Independent(D.Poisson(o.exp()), 1), 800.0),
    "normal": (lambda o: D.Independent(D.Normal(o[..., :2], o[..., 2:].exp()), 1), -800.0),
    "beta": (lambda o: D.Independent(D.Beta(1 + o[..., :2], 2 - o[..., 2:]), 1), 3.0),
    "nan": (lambda o: D.Independent(D.Poisson(o.exp()), 1), math.nan),
}


@pytest.mark.parametrize("name", BEYOND)
def test_outputs_out_of_the_domain_have_an_error_of_their_own(name):
    distribution, value = BEYOND[name]
    with pytest.raises(families.OutOfDomainError, match="is not defined at these outputs"):
        families.from_torch(distribution).metric(torch.full((3, 4), value))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Distributions that do not look at their arguments, as after the first use of `torch.compile`."""
    before = D.Distribution._validate_args
    D.Distribution.set_default_validate_args(False)
    yield
    assert D.Distribution._validate_args is False  # as it was found
    D.Distribution.set_default_validate_args(before)


def test_the_domain_is_looked_at_where_distributions_look_at_nothing(unchecked):
    family = families.from_torch(lambda o: D.Independent(D.Beta(1 + o[..., :2], 2 - o[..., 2:]), 1))
    inside, outside = torch.zeros(3, 4), torch.full((3, 4), 50.0)
    for use in (
        lambda o: family.log_likelihood(o, torch.full((3, 2), 0.5)),
        lambda o: family.kl(inside, o),
        lambda o: family.kl(o, inside),
        family.entropy,
        family.sample,
        family.metric,
        family.metric_factor,
        lambda o: family.score(o, torch.full((3, 2), 0.5)),
    ):
        use(inside)
        with pytest.raises(OutOfDomainError, match="not defined at these outputs"):
            use(outside)
    with pytest.raises(ValueError, match="within the support"):
        family.log_likelihood(inside, torch.full((3, 2), 1.5))


def test_a_mistake_in_the_map_is_not_taken_for_outputs_out_of_the_domain():
    no_spread = families.from_torch(lambda o: D.Independent(D.Normal(o[..., :2], o[..., 2:]), 1))  # exp forgotten
    with pytest.raises(ValueError, match="scale") as caught:
        no_spread.metric(-torch.ones(3, 4))
    assert not isinstance(caught.value, families.OutOfDomainError)


def test_draws_outside_of_the_support_are_refused():
    """PyTorch's counts at a rate of 10²⁰ are −2⁶³."""
    poisson = families.from_torch(lambda o: D.Independent(D.Poisson(o.exp()), 1))
    assert (poisson.sample(torch.full((5, 2), 3.0)) >= 0).all()
    with pytest.raises(families.OutOfDomainError, match="outside of its support"):
        poisson.sample(torch.full((5, 2), 46.0))


@pytest.mark.parametrize("events", [(6,), (3, 4)])
def test_a_distribution_that_mixes_events_is_refused(events):
    family = families.from_torch(lambda o: D.Independent(D.Normal(o - o.mean(0), 1.0), 1))
    with pytest.raises(ValueError, match=r"makes an event's distribution of other events' outputs .*let the model"):
        family.metric(torch.randn(*events, 3, dtype=torch.float64))
