"""What people write at first: each works, or is refused with what to write instead, and changes nothing."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn import functional as F

from npg import Fisher, TrustRegion, conjugate_gradient, families, natural_step
from npg.optim import NGD, DiagonalNGD, KLShampoo, OnlineNGD
from npg.solvers import dense_solve, solve_in_metric

CATEGORICAL = families.Categorical()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


@pytest.fixture
def batch():
    return torch.randn(8, 4), torch.randint(3, (8,))


# What the outputs mean ------------------------------------------------------------------------------------------------

MEANT = [
    (nn.CrossEntropyLoss(), "families.Categorical()"),
    (nn.CrossEntropyLoss, "families.Categorical()"),
    (nn.NLLLoss(), "families.Categorical()"),
    (F.cross_entropy, "families.Categorical(), which has no weights"),
    (nn.MSELoss(), "families.Gaussian()"),
    (F.mse_loss, "families.Gaussian(), whose log-likelihood"),
    (nn.BCEWithLogitsLoss(), "families.Bernoulli()"),
    (nn.BCELoss(), "families.Bernoulli(), for a model that returns logits"),
    (nn.GaussianNLLLoss(), "families.DiagonalGaussian()"),
    (nn.PoissonNLLLoss(), "families.from_torch(lambda o: Independent(Poisson(o.exp()), 1))"),
    (nn.L1Loss(), "families.Categorical() for class indices"),
    (families.Categorical, "families.Categorical()"),
    (families.DiagonalGaussian, "families.DiagonalGaussian()"),
    (families.MultiCategorical, "families.MultiCategorical(sizes)"),
    (families.Product, "families.Product(parts, sizes)"),
    ("categorical", "families.Categorical()"),
    ("cross_entropy", "families.Categorical(), which has no weights"),
    ("mse", "families.Gaussian(), whose log-likelihood"),
    ("unheard of", "families.Categorical() for class indices"),
    (torch.distributions.Categorical, "families.Categorical()"),
    (torch.distributions.Beta, "families.from_torch(lambda outputs: Beta(…))"),
    (torch.distributions.Normal(0.0, 1.0), "families.Gaussian() for a known spread"),
    (torch.zeros(8), "families.Categorical() for class indices"),
    (None, "families.Categorical() for class indices"),
]


@pytest.mark.parametrize(("given", "remedy"), MEANT, ids=lambda v: getattr(v, "__name__", None) or str(v)[:30])
def test_what_is_no_family_is_refused_with_the_family_that_is_meant(model, batch, given, remedy):
    inputs, before = batch[0], copy.deepcopy(model.state_dict())
    calls = [
        lambda: NGD(model, given),
        lambda: NGD(model, given, metric="euclidean"),
        lambda: DiagonalNGD(model, given, lr=1e-3),
        lambda: Fisher(model, inputs, given),
        lambda: natural_step(model, inputs, given, lambda outputs: outputs.mean(), learning_rate=1.0),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=rf"family must be a family of npg\.families.*{re.escape(remedy)}"):
            call()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_function_that_is_a_metric_is_still_one(model, batch):
    twice = Fisher(model, batch[0], lambda outputs: lambda u: 2 * u)
    v = torch.ones(twice.shape[0])
    once = Fisher(model, batch[0], lambda outputs: lambda u: u.clone())
    torch.testing.assert_close(twice @ v, 2 * (once @ v))


# The arguments of other optimizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        (lambda model: NGD(model.parameters()), "write NGD(model, families.Categorical(), …)"),
        (lambda model: NGD(list(model.parameters()), lr=0.1), "write NGD(model, families.Categorical(), …)"),
        (lambda model: NGD(CATEGORICAL, model), "write NGD(model, families.Categorical(), …)"),
        (lambda model: NGD(model), "needs a family after the model"),
        (lambda model: DiagonalNGD(model.parameters(), lr=0.1), "write DiagonalNGD(model, families.Categorical(), …)"),
        (lambda model: DiagonalNGD(model, lr=0.1), "needs a family after the model"),
        (lambda model: OnlineNGD(model, lr=0.1), "write OnlineNGD(model.parameters(), …)"),
        (lambda model: OnlineNGD(model[0], lr=0.1), "write OnlineNGD(model.parameters(), …)"),
        (lambda model: KLShampoo(model), "write KLShampoo(model.parameters(), …)"),
        (
            lambda model: Fisher(model.parameters(), torch.zeros(8, 4), CATEGORICAL),
            "model, without .parameters()",
        ),
    ],
    ids=range(10),
)
def test_parameters_and_models_in_each_other_s_place(model, call, remedy):
    with pytest.raises(TypeError, match=re.escape(remedy)):
        call(model)


def test_an_optimizer_of_a_model_has_its_signature_and_can_be_copied(model, batch):
    assert next(iter(inspect.signature(NGD).parameters)) == "model"
    optimizer = NGD(model, CATEGORICAL, damping=0.1)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.step(*batch).accepted


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"objective": nn.CrossEntropyLoss()}, "write lambda outputs: -loss(outputs, targets)"),
        ({"objective": F.cross_entropy}, "write lambda outputs: -loss(outputs, targets)"),
        ({"objective": torch.tensor(0.5)}, "write lambda outputs: -loss(outputs, targets)"),
        ({"trust_region": 0.01}, "write TrustRegion(radius)"),
    ],
    ids=["loss", "function", "value", "radius"],
)
def test_the_arguments_of_a_step(model, batch, changed, remedy):
    before = copy.deepcopy(model.state_dict())
    options = {"objective": lambda outputs: outputs.mean(), "trust_region": TrustRegion(0.01)} | changed
    with pytest.raises(TypeError, match=re.escape(remedy)):
        natural_step(model, batch[0], CATEGORICAL, **options)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# Outputs and targets --------------------------------------------------------------------------------------------------


class Squeezed(nn.Module):
    """Logits (N,), and a running mean."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1))

    def forward(self, x):
        return self.layers(x).squeeze(-1)


@pytest.mark.parametrize("family", [families.Bernoulli(), families.Gaussian(), CATEGORICAL], ids=repr)
def test_outputs_without_an_axis_of_events_are_refused(family):
    model, inputs, targets = Squeezed(), torch.randn(8, 4), torch.zeros(8)
    before = copy.deepcopy(model.state_dict())
    calls = [
        lambda: Fisher(model, inputs, family),
        lambda: Fisher(model, (inputs,), family),
        lambda: Fisher(model, inputs, lambda outputs: lambda u: u),
        lambda: natural_step(model, inputs, family, lambda outputs: outputs.mean(), learning_rate=1.0),
        lambda: NGD(model, family).step(inputs, targets),
        lambda: DiagonalNGD(model, family, lr=1e-3).step(inputs, targets),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"\(8,\): that is one event of 8 components.*\(8, 1\) for 8 events"):
            call()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_outputs_of_a_function_without_inputs_are_one_event():
    weights = {"w": torch.tensor([1.0, 2.0, 3.0])}
    F = Fisher(lambda p: 2 * p["w"], (), families.Gaussian(), parameters=weights)
    assert F.events == 1
    torch.testing.assert_close(F.dense(), 4 * torch.eye(3))


@pytest.mark.parametrize(
    ("family", "width", "targets", "remedy"),
    [
        (CATEGORICAL, 3, torch.zeros(8), "targets.long()"),
        (CATEGORICAL, 3, torch.zeros(8, 1, dtype=torch.long), "targets.squeeze(-1)"),
        (CATEGORICAL, 3, torch.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1]], "targets.argmax(-1)"),
        (families.MultiCategorical([2, 1]), 3, torch.zeros(8, 2), "targets.long()"),
        (families.Bernoulli(), 1, torch.zeros(8), "targets.unsqueeze(-1)"),
        (families.Gaussian(), 1, torch.zeros(8), "targets.unsqueeze(-1)"),
        (families.DiagonalGaussian(), 2, torch.zeros(8), "targets.unsqueeze(-1)"),
    ],
    ids=["float classes", "column of classes", "one-hot", "float indices", "bits", "regression", "mean and spread"],
)
def test_targets_of_another_kind_are_refused_with_the_remedy(family, width, targets, remedy):
    model, inputs = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width)), torch.randn(8, 4)
    before = copy.deepcopy(model.state_dict())
    calls = [
        lambda: NGD(model, family, damping=0.1).step(inputs, targets),
        lambda: DiagonalNGD(model, family, lr=1e-3).step(inputs, targets),
        lambda: Fisher(model, inputs, family, kind="empirical", targets=targets),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(remedy)):
            call()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "outputs", "targets", "end"),
    [
        (CATEGORICAL, (8, 5, 3), (8, 5, 1), "one per event, by targets.squeeze(-1)"),
        (CATEGORICAL, (8, 5, 3), (8, 5, 3), "one per event, by targets.argmax(-1) of rows with a single 1"),
        (CATEGORICAL, (8, 5, 3), (8, 1), "one per event"),
        (CATEGORICAL, (8, 3), (7,), "one per event"),
        (families.Gaussian(), (8, 1), (7,), "got (7,)"),
        (families.Gaussian(), (8, 2), (8,), "got (8,)"),
    ],
)
def test_a_remedy_is_named_where_it_is_one(family, outputs, targets, end):
    with pytest.raises(ValueError, match=rf"{re.escape(end)}$"):
        family.log_likelihood(torch.zeros(outputs), torch.zeros(targets))


@pytest.mark.parametrize("axes", [(), (5,), (5, 7)])
@pytest.mark.parametrize("on_axis_1", [False, True])
def test_classes_on_axis_1_are_told_where_they_belong(axes, on_axis_1):
    """As `cross_entropy` takes them; with them on the last axis both say the same."""
    outputs, targets = torch.randn(8, 3, *axes), torch.randint(3, (8, *axes))
    loss = nn.functional.cross_entropy(outputs, targets)
    if on_axis_1 and axes:
        with pytest.raises(ValueError, match=r"one per event, and let the model return outputs\.movedim\(1, -1\)"):
            CATEGORICAL.log_likelihood(outputs, targets)
    else:
        torch.testing.assert_close(-CATEGORICAL.log_likelihood(outputs.movedim(1, -1), targets).mean(), loss)


# Solvers --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def system():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    b = torch.randn(6, 2, dtype=torch.float64, generator=generator)
    return root @ root.T + torch.eye(6, dtype=torch.float64), b


class Operator:
    """With ``@`` alone."""

    def __init__(self, matrix):
        self.matrix = matrix

    def __matmul__(self, v):
        return self.matrix @ v


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize(
    "form",
    [lambda A: lambda v: A @ v, Operator, lambda A: A, lambda A: A.matmul, lambda A: A.to_sparse()],
    ids=["function", "operator", "matrix", "method", "sparse matrix"],
)
def test_conjugate_gradients_take_whatever_has_products(system, form, columns):
    A, b = system[0], system[1] if columns == 2 else system[1][:, 0]
    exact = torch.linalg.solve(A, b)
    for solve in (conjugate_gradient, lambda A, b, **options: conjugate_gradient(A, b, x0=exact + 0.1, **options)):
        torch.testing.assert_close(solve(form(A), b, rtol=1e-12).x, exact, rtol=1e-9, atol=1e-9)
    if columns == 1:
        found = solve_in_metric(form(A), b, root=lambda v: v)
        torch.testing.assert_close(found.x, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "remedy"),
    [
        (lambda A, b: conjugate_gradient(3.0, b), TypeError, "lambda v: …"),
        (lambda A, b: conjugate_gradient(A.numpy(), b), TypeError, "torch.as_tensor(A)"),
        (lambda A, b: conjugate_gradient(lambda v: A.numpy() @ v.numpy(), b), TypeError, "lambda v: torch.as_tensor("),
        (lambda A, b: conjugate_gradient(lambda v: (A @ v)[:, :1], b), ValueError, "shape (6, 2), that of b"),
        (lambda A, b: conjugate_gradient(A, list(b)), TypeError, "torch.nn.utils.parameters_to_vector(…)"),
        (lambda A, b: conjugate_gradient(A, b.numpy()), TypeError, "torch.as_tensor(…)"),
        (lambda A, b: conjugate_gradient(A, b, x0=[0.0]), TypeError, "x0 must be one tensor"),
        (lambda A, b: conjugate_gradient(A, b, preconditioner=A), TypeError, "lambda r: torch.linalg.solve(C, r)"),
        (lambda A, b: dense_solve(lambda v: A @ v, b), TypeError, "conjugate_gradient(A, b) needs its products alone"),
        (lambda A, b: dense_solve(np.eye(6), b), TypeError, "A must be a matrix"),
    ],
    ids=range(10),
)
def test_what_solvers_do_not_take(system, call, error, remedy):
    with pytest.raises(error, match=re.escape(remedy)):
        call(*system)


# What vectors and parameters are --------------------------------------------------------------------------------------

VECTORS = [
    (np.ones(18), TypeError, r"vector must be one tensor of shape \(18,\) .* got ndarray: use torch\.as_tensor"),
    ([torch.ones(12), torch.ones(6)], TypeError, r"got list: use torch\.nn\.utils\.parameters_to_vector"),
    (torch.ones(18, dtype=torch.complex64), ValueError, r"must be real, got torch\.complex64: .* \.real and \.imag"),
]


@pytest.mark.parametrize(("vector", "error", "says"), VECTORS, ids=["array", "list", "complex"])
@pytest.mark.parametrize("map_", ["__matmul__", "quadratic", "push_forward"])
def test_what_is_no_vector_is_refused_by_name(map_, vector, error, says, batch):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1, bias=False))
    fisher = Fisher(model, batch[0], families.Gaussian())
    with pytest.raises(error, match=says):
        getattr(fisher.linearization if map_ == "push_forward" else fisher, map_)(vector)


PARAMETERS = [
    ({"a": {"w": torch.ones(4, 3)}}, r"parameter 'a' must be a tensor, got dict: write one level of names"),
    ({"w": [1.0, 2.0]}, r"parameter 'w' must be a tensor, got list: convert it"),
    ([torch.ones(4, 3)], r"parameters must be a mapping of names to tensors, got list: write dict\(model"),
    (nn.Linear(4, 3).parameters(), r"parameters must be a mapping of names to tensors, got generator"),
]


@pytest.mark.parametrize(("given", "says"), PARAMETERS, ids=["nested", "numbers", "list", "generator"])
@pytest.mark.parametrize("of", ["function", "module"])
def test_what_is_no_mapping_of_tensors_is_refused_by_name(of, given, says, batch):
    model = nn.Linear(4, 3) if of == "module" else lambda parameters, x: x @ parameters["w"]
    with pytest.raises(TypeError, match=says):
        Fisher(model, batch[0], CATEGORICAL, parameters=given)


class OwnSpread(nn.Linear):
    """A mean, and a spread that is no output."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.log_std = nn.Parameter(torch.zeros(2))


@pytest.fixture
def own_spread():
    model = OwnSpread()
    return model, families.from_torch(lambda o: Independent(Normal(o, model.log_std.exp().expand_as(o)), 1))


@pytest.mark.parametrize(
    "work",
    [
        lambda m, f, x, y: natural_step(m, x, f, lambda o: f.log_likelihood(o, y).mean(), learning_rate=0.1),
        lambda m, f, x, y: NGD(m, f).step(x, y),
        lambda m, f, x, y: DiagonalNGD(m, f, lr=0.1).step(x, y),
        lambda m, f, x, y: DiagonalNGD(m, f, lr=0.1, fisher="empirical").step(x, y),
        lambda m, f, x, y: Fisher(m, x, f),
        lambda m, f, x, y: Fisher(m, x, f, kind="sampled"),
        lambda m, f, x, y: Fisher(m, x, f, kind="empirical", targets=y),
    ],
)
def test_a_family_that_reads_parameters_beside_the_outputs_is_refused(own_spread, work):
    model, family = own_spread
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"depends on log_std beside the outputs, .*second half of a DiagonalGaussian"):
        work(model, family, x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.log_std.requires_grad_(False)  # a number then
    work(model, family, x, y)


def test_a_penalty_of_weights_in_the_objective_is_refused():
    model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randn(8, 2)

    def objective(outputs, weight):
        return families.Gaussian().log_likelihood(outputs, y).mean() - weight.square().sum()

    with pytest.raises(ValueError, match=r"objective depends on weight beside the outputs.*into weight_decay"):
        natural_step(model, x, families.Gaussian(), lambda o: objective(o, model.weight), learning_rate=0.1)
    temperature = nn.Parameter(torch.ones(()))  # of another optimizer: a constant here
    natural_step(model, x, families.Gaussian(), lambda o: objective(o, temperature), learning_rate=0.1)
    natural_step(model, x, families.Gaussian(), lambda o: objective(o, model.weight.detach()), learning_rate=0.1)


@pytest.mark.parametrize("work", [copy.deepcopy, pickle.dumps])
def test_a_fisher_is_neither_copied_nor_pickled(work):
    fisher = Fisher(nn.Linear(3, 2), torch.randn(4, 3), families.Categorical())
    with pytest.raises(TypeError, match=r"holds a recorded forward pass.*copy the model"):
        work(fisher)
