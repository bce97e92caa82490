"""NGD: the natural step as an optimizer."""

import copy
import io
from collections import OrderedDict, UserDict
from functools import partial
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from npg import Fisher, LevenbergMarquardt, Status, TrustRegion, families
from npg.curvature import DenseFisher, DiagonalFisher
from npg.curvature.kronecker import Block, KroneckerFisher
from npg.curvature.online import OnlinePreconditioner
from npg.optim import NGD, DiagonalNGD


def classifier(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def batches(steps: int, n: int = 40, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=g).to(dtype), torch.randint(4, (n,), generator=g)) for _ in range(steps)]


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = functional.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_dense_is_algorithm_1():
    model = classifier()
    optimizer = NGD(model, families.Categorical(), lr=0.3, damping=1e-2, solver="dense")
    for x, y in batches(5):
        before, g = vector(model), gradient(model, x, y)
        logits = model(x)
        p = logits.softmax(-1).detach()
        f = torch.zeros(len(g), len(g), dtype=g.dtype)
        for n in range(len(x)):  # the definition: the expectation over labels of the scores' outer product
            for label in range(4):
                score = torch.autograd.grad(
                    logits.log_softmax(-1)[n, label], list(model.parameters()), retain_graph=True
                )
                score = torch.cat([s.flatten() for s in score])
                f += p[n, label] * torch.outer(score, score) / len(x)
        optimizer.step(x, y)
        want = before - 0.3 * torch.linalg.solve(f + 1e-2 * torch.eye(len(g)).double(), g)
        torch.testing.assert_close(vector(model), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("damping", [1e-1, 1e-3])
def test_cg_to_convergence_equals_dense(damping):
    a, b = classifier(), classifier()
    options = {"lr": 0.1, "damping": damping}
    cg = NGD(a, families.Categorical(), max_iterations=1000, rtol=1e-12, **options)
    dense = NGD(b, families.Categorical(), solver="dense", **options)
    for x, y in batches(5):
        assert cg.step(x, y).status is Status.CONVERGED
        dense.step(x, y)
        torch.testing.assert_close(vector(a), vector(b), rtol=0, atol=1e-6)


def test_online_damping_is_the_dense_solve_in_the_metric_of_the_gradients_so_far():
    model = classifier()
    options = {"damping": 0.1, "max_iterations": 1000, "rtol": 1e-13}
    optimizer = NGD(model, families.Categorical(), lr=0.3, damping_metric="online", alpha=1.0, **options)
    factors = OnlinePreconditioner(list(model.parameters()), [{} for _ in model.parameters()], alpha=1.0)
    for t, (x, y) in enumerate(batches(16)):
        before, g = vector(model), gradient(model, x, y)
        f = Fisher(model, x, families.Categorical()).dense()
        root = factors.inverse_root()
        inverse_root = torch.stack([root(column) for column in torch.eye(len(g)).double()], 1)
        metric = torch.linalg.inv(inverse_root @ inverse_root)
        report = optimizer.step(x, y)
        want = torch.linalg.solve(f + 0.1 * metric, g)
        torch.testing.assert_close(vector(model), before - 0.3 * want, rtol=0, atol=1e-10)
        torch.testing.assert_close(report.predicted_kl, float(0.5 * 0.09 * want @ f @ want))
        torch.testing.assert_close(report.gradient, -g)
        if t < 10 or t % 4 == 0:  # afterwards, so that the metric does not depend on the gradient it is used on
            parts = g.split([p.numel() for p in model.parameters()])
            rows = [part.view_as(p) for part, p in zip(parts, model.parameters(), strict=True)]
            factors(rows, update=True, first=t == 0)
    assert (metric - torch.eye(len(g))).norm() > 0.1 * len(g) ** 0.5, "a test of nothing"


def test_online_damping_goes_on_with_fewer_parameters():
    model = classifier()
    optimizer = NGD(model, families.Categorical(), lr=0.3, damping=0.1, damping_metric="online")
    (x, y), (u, v) = batches(2)
    optimizer.step(x, y)
    model[0].requires_grad_(False)
    before, frozen = vector(model), model[0].weight.clone()
    assert optimizer.step(u, v).accepted
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(vector(model), before)


@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_one_step_on_a_linear_gaussian_model_is_least_squares(solver):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    x, y = torch.randn(50, 5).double(), torch.randn(50, 3).double()
    NGD(model, families.Gaussian(0.7), damping=0.0, solver=solver, max_iterations=100, rtol=1e-14).step(x, y)
    design = torch.cat([x, torch.ones(50, 1).double()], 1)
    want = torch.linalg.lstsq(design, y).solution.T
    torch.testing.assert_close(torch.cat([model.weight, model.bias[:, None]], 1), want, rtol=0, atol=1e-9)


def test_max_kl_keeps_the_true_kl_within_the_radius():
    model = classifier()
    optimizer = NGD(model, families.Categorical(), lr=1e6, damping=1e-3, max_kl=0.01, max_iterations=50)
    for x, y in batches(10):
        old = model(x).detach()
        before = functional.cross_entropy(old, y)
        report = optimizer.step(x, y)
        kl = families.Categorical().kl(old, model(x)).mean()
        assert report.accepted
        assert 0.002 < kl <= 0.01
        torch.testing.assert_close(kl.item(), report.kl)
        assert functional.cross_entropy(model(x), y) < before


def test_the_radius_may_be_set_between_steps():
    (x, y), *_ = batches(1)
    optimizer = NGD(classifier(), families.Categorical(), lr=1e6, damping=1e-3)
    for radius in (1e-2, 1e-4, 1e-6):
        optimizer.max_kl = radius
        assert optimizer.max_kl == radius
        assert 0.3 * radius < optimizer.step(x, y).kl <= radius
    optimizer.trust_region = TrustRegion(1e-2, kl_direction="new_old")
    optimizer.max_kl = 1e-3
    assert optimizer.trust_region == TrustRegion(1e-3, kl_direction="new_old")
    with pytest.raises(ValueError, match=r"max_kl must lie in \(0, inf\), got -1"):
        optimizer.max_kl = -1
    optimizer.max_kl = None
    assert optimizer.trust_region is None


@pytest.mark.parametrize(
    ("cls", "name", "remedy"),
    [
        (NGD, "max_kl", r"set optimizer\.max_kl"),
        (NGD, "warm_start", "give it to a new NGD"),
        (DiagonalNGD, "probes", "give it to a new DiagonalNGD"),
    ],
)
def test_an_option_in_the_parameter_group_is_refused_where_it_would_do_nothing(cls, name, remedy):
    (x, y), *_ = batches(1)
    model = classifier()
    optimizer = cls(model, families.Categorical(), lr=0.1, damping=0.1)
    optimizer.param_groups[0]["of_the_user"] = 1
    optimizer.step(x, y)
    optimizer.param_groups[0][name] = 0.5
    before = vector(model)
    with pytest.raises(ValueError, match=rf"{name} is no part of the parameter group, .*: {remedy}"):
        optimizer.step(x, y)
    assert torch.equal(vector(model), before)


def test_momentum_is_heavy_ball_on_the_steps():
    a, b = classifier(), classifier()
    heavy = NGD(a, families.Categorical(), lr=0.1, damping=0.1, momentum=0.8, solver="dense")
    plain = NGD(b, families.Categorical(), lr=0.1, damping=0.1, solver="dense")
    velocity = torch.zeros_like(vector(a))
    for x, y in batches(6):
        nn.utils.vector_to_parameters(vector(a), b.parameters())
        start = vector(a)
        velocity = 0.8 * velocity + plain.step(x, y).step
        heavy.step(x, y)
        torch.testing.assert_close(vector(a), start + velocity, rtol=0, atol=1e-13)


def test_damping_control_follows_the_model():
    model = classifier()
    optimizer = NGD(
        model, families.Categorical(), damping=1.0, damping_control=LevenbergMarquardt(factor=2.0), max_iterations=50
    )
    x, y = batches(1)[0]
    for _ in range(5):
        before = optimizer.param_groups[0]["damping"]
        report = optimizer.step(x, y)
        ratio = report.actual_gain / report.predicted_gain
        want = before / 2 if ratio > 0.75 else before * 2 if ratio < 0.25 else before
        assert optimizer.param_groups[0]["damping"] == want
    assert want < 1.0


def test_damping_control_knows_the_curvature_of_squared_errors():
    """The steps of Gauss and Newton, of the transport metric and of Fisher's are the same then."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 32, 3).double()
    start, ratios, dampings = nn.Linear(3, 3).double(), [], []
    for metric, damping in (("fisher", 0.1), ("euclidean", 0.05), ("wasserstein", 0.05)):  # F is twice the other two
        options = {"max_iterations": 50, "rtol": 1e-12, "damping_control": LevenbergMarquardt(minimum=1e-9)}
        optimizer = NGD(copy.deepcopy(start), families.Gaussian(0.5), damping=damping, metric=metric, **options)
        report = optimizer.step(x, y)
        ratios.append(report.actual_gain / report.predicted_gain)
        dampings.append(optimizer.param_groups[0]["damping"] / damping)
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-9)
    assert 0.9 < ratios[0] < 1.1
    assert dampings == [1 / 1.5] * 3


@pytest.mark.parametrize(
    "build", [partial(NGD, momentum=0.9, damping=1.0, solver="dense"), partial(DiagonalNGD, lr=0.1)]
)
def test_state_follows_a_model_that_is_converted(build):
    x, y = batches(1, dtype=torch.float32)[0]
    model = classifier(torch.float32)
    optimizer = build(model, families.Categorical(), generator=torch.Generator().manual_seed(0))
    optimizer.step(x, y)
    model.double()
    twin = copy.deepcopy(model)
    loaded = build(twin, families.Categorical(), generator=torch.Generator().manual_seed(0))
    loaded.load_state_dict(optimizer.state_dict())
    for instance in (optimizer, loaded):
        if instance.generator is not None:
            instance.generator.manual_seed(1)
        instance.step(x.double(), y)
    torch.testing.assert_close(vector(model), vector(twin), rtol=0, atol=1e-12)  # float32 would be 1e-8 off
    assert all(v.dtype is torch.float64 for s in optimizer.state.values() for k, v in s.items() if k != "step")


@pytest.mark.parametrize("options", [{"damping_control": LevenbergMarquardt()}, {"max_kl": 1.0}])
def test_gains_that_are_small_against_the_log_likelihood_keep_their_digits(options):
    """Of hundreds of outputs it is hundreds of nats, which float32 rounds by more than the last gains."""
    torch.manual_seed(0)
    x, model, twin, family = torch.randn(64, 4), nn.Linear(4, 784), nn.Linear(4, 784), families.Gaussian()
    y = model(x).detach() + 0.01 * torch.randn(64, 784)
    with torch.no_grad():
        model.weight += 1e-4 * torch.randn_like(model.weight)
    twin.load_state_dict(model.state_dict())
    optimizer = NGD(model, family, lr=0.3, damping=1e-2, **options)
    double = NGD(twin.double(), family, lr=0.3, damping=1e-2, **options)
    for _ in range(3):
        report, want = optimizer.step(x, y), double.step(x.double(), y.double())
        assert report.accepted
        assert want.accepted
        assert report.actual_gain == pytest.approx(want.actual_gain, rel=0.05)
    assert optimizer.param_groups[0]["damping"] == double.param_groups[0]["damping"]


def test_a_warm_up_that_begins_at_zero_leaves_the_damping():
    optimizer = NGD(classifier(), families.Categorical(), lr=0.0, damping=0.1, damping_control=LevenbergMarquardt())
    for x, y in batches(3):
        assert optimizer.step(x, y).accepted
    assert optimizer.param_groups[0]["damping"] == 0.1


def test_warm_start_saves_iterations():
    x, y = batches(1)[0]
    iterations = []
    for warm_start in (0.0, 1.0):
        optimizer = NGD(classifier(), families.Categorical(), lr=1e-3, damping=1e-3, warm_start=warm_start,
                        max_iterations=200, rtol=1e-3)  # fmt: skip
        iterations.append(sum(optimizer.step(x, y).iterations for _ in range(5)))
    assert iterations[1] < 0.8 * iterations[0]


def test_curvature_fraction_takes_the_leading_part():
    model, twin = classifier(), classifier()
    (x, y), g = batches(1)[0], gradient(twin, *batches(1)[0])
    NGD(model, families.Categorical(), damping=0.1, solver="dense", curvature_fraction=0.25).step(x, y)
    f = Fisher(twin, x[:10], families.Categorical()).dense() + 0.1 * torch.eye(len(g)).double()
    torch.testing.assert_close(vector(model), vector(twin) - torch.linalg.solve(f, g), rtol=0, atol=1e-10)


def test_curvature_fraction_of_inputs_in_a_mapping():
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = classifier()

        def forward(self, inputs):
            return self.net(inputs["x"] * inputs["scale"])

    model, twin = Keyed(), classifier()
    x, y = batches(1)[0]
    NGD(model, families.Categorical(), damping=0.1, curvature_fraction=0.25).step({"x": x, "scale": 1.0}, y)
    NGD(twin, families.Categorical(), damping=0.1, curvature_fraction=0.25).step(x, y)
    torch.testing.assert_close(vector(model), vector(twin), rtol=0, atol=1e-12)


class Batch(UserDict):
    """As those of Hugging Face's tokenizers: a mapping that is no dict."""


class Named(dict):
    """A dict, but of another type."""


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = classifier()

    def forward(self, inputs):
        x = inputs["x"] * inputs["scale"]
        return self.net(x + (inputs["mask"] @ inputs["mask"].T).sum() + inputs["more"][0])


@pytest.mark.parametrize("make", [dict, Batch, Named, OrderedDict])
def test_curvature_fraction_reaches_the_tensors_of_any_mapping(make):
    """Those with the batch's rows; a mask, a number and a tensor without axes are the same for all rows."""
    x, y = batches(1)[0]
    model, twin = Several(), Several()
    others = {"scale": torch.tensor(0.5), "mask": torch.eye(6, 7), "name": "b", "none": None}
    inputs = make({"x": x, "more": (x, 1.0), **others})
    whole, part = (make({"x": x[:n], "more": (x[:n], 1.0), **others}) for n in (40, 10))
    NGD(model, families.Categorical(), damping=0.1, solver="dense", curvature_fraction=0.25).step(inputs, y)
    g = torch.autograd.grad(functional.cross_entropy(twin(whole), y), list(twin.parameters()))
    g = torch.cat([part.flatten() for part in g])
    f = Fisher(twin, part, families.Categorical()).dense() + 0.1 * torch.eye(len(g)).double()
    torch.testing.assert_close(vector(model), vector(twin) - torch.linalg.solve(f, g), rtol=0, atol=1e-10)
    assert inputs["x"] is x, "the batch itself is as it was"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lambda x: (x, torch.ones(40, 40)), r"inputs\[1\] of shape \(40, 40\) may have them on its second axis"),
        (lambda x: {"x": x, "h": torch.ones(3, 40, 2)}, r"inputs\['h'\] of shape \(3, 40, 2\) may have"),
        (lambda x: x.T[:, :39], r"none has 40 on its leading axis: \{'inputs': \(6, 39\)\}"),
        (lambda x: (x.T,), r"none has 40 on its leading axis"),
    ],
)
def test_curvature_fraction_of_what_has_no_clear_rows_is_refused(inputs, message):
    x, y = batches(1)[0]
    model = classifier()
    before = vector(model)
    with pytest.raises(ValueError, match=message):
        NGD(model, families.Categorical(), damping=0.1, curvature_fraction=0.25).step(inputs(x), y)
    assert torch.equal(vector(model), before)


def test_curvature_fraction_of_what_may_hold_rows_unseen_is_refused():
    x, y = batches(1)[0]
    packed = nn.utils.rnn.pack_sequence(list(x))
    for odd in (SimpleNamespace(x=x), x.numpy(), MappingProxyType({"x": x}), packed):
        with pytest.raises(
            TypeError, match=rf"inputs\[1\]\['a'\] is a {type(odd).__name__}, in which none can be found"
        ):
            NGD(classifier(), families.Categorical(), damping=0.1, curvature_fraction=0.25).step((x, {"a": odd}), y)


def test_a_square_batch_alone_is_one():
    model = nn.Sequential(nn.Linear(40, 4)).double()
    x, y = torch.randn(40, 40, dtype=torch.float64), batches(1)[0][1]
    assert NGD(model, families.Categorical(), damping=0.1, curvature_fraction=0.25).step(x, y).accepted


# ------------------------------------------------------------------------------------------------ Kronecker factors


@pytest.mark.parametrize("solver", ["kfac", "ekfac"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("metric", ["identity", "factors"])
def test_kfac_takes_its_own_matrix_for_the_fisher(solver, kind, metric):
    model, twin = classifier(), classifier()
    optimizer = NGD(model, families.Categorical(), lr=0.3, damping=0.1, solver=solver, fisher=kind, probes=None,
                    factor_decay=0.5, curvature_fraction=0.5, damping_metric=metric)  # fmt: skip
    f = KroneckerFisher(corrected=solver == "ekfac", probes=None, decay=0.5)
    for x, y in batches(4):
        g = gradient(twin, x, y)
        fisher = Fisher(
            twin, x[:20], families.Categorical(), kind=kind, targets=y[:20] if kind == "empirical" else None
        )
        f.update(fisher)
        step = torch.linalg.solve(f.dense() + 0.1 * torch.eye(len(g)).double(), -g)
        if metric == "factors":
            step = -f.inverse(0.1, shared=True)(g)
        report = optimizer.step(x, y)
        nn.utils.vector_to_parameters(vector(twin) + 0.3 * step, twin.parameters())
        torch.testing.assert_close(vector(model), vector(twin), rtol=0, atol=1e-10)
        assert (report.status, report.iterations) == (Status.CONVERGED, 0)
        assert report.predicted_kl == pytest.approx(float(0.5 * 0.09 * step @ f.dense() @ step))


def test_factors_are_updated_in_the_first_ten_steps_and_then_periodically():
    model = classifier()
    optimizer = NGD(model, families.Categorical(), lr=0.01, damping=0.1, solver="kfac", update_period=4)
    weight, updates = model[0].weight, []
    for x, y in batches(17):
        optimizer.step(x, y)
        updates.append(int(optimizer.state[weight]["kfac_updates"]))
    assert updates == [*range(1, 11), 10, 10, 11, 11, 11, 11, 12]


def test_kfac_goes_on_when_parameters_are_frozen_and_thawed():
    model = classifier()
    optimizer = NGD(model, families.Categorical(), lr=0.01, damping=0.1, solver="kfac", update_period=100)
    data = batches(20)
    for x, y in data[:12]:
        optimizer.step(x, y)
    factor = optimizer.state[model[2].weight]["kfac_inputs"].clone()

    def step_is_that_of(blocks: dict, x: Tensor, y: Tensor) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        before = nn.utils.parameters_to_vector(trained).detach().clone()
        loss = functional.cross_entropy(model(x), y)
        g = torch.cat([part.flatten() for part in torch.autograd.grad(loss, trained)])
        fisher = Fisher(model, x, families.Categorical())
        curvature = KroneckerFisher()
        curvature.parameters = fisher.parameters
        curvature.load_state_dict({key: block._asdict() for key, block in blocks.items()})
        step = curvature.inverse(0.1)(g)
        optimizer.step(x, y)
        after = nn.utils.parameters_to_vector(trained).detach()
        torch.testing.assert_close(after, before - 0.01 * step, rtol=0, atol=1e-12)

    def block(layer: nn.Linear) -> Block:
        state = optimizer.state[layer.weight]
        return Block(**{name: state[f"kfac_{name}"] for name in Block._fields})

    first, second = block(model[0]), block(model[2])
    model[0].requires_grad_(False)  # what is left is no longer at the places where it was
    step_is_that_of({(0, 1): second}, *data[12])
    assert torch.equal(optimizer.state[model[2].weight]["kfac_inputs"], factor), "not due, and not begun anew"
    model[0].requires_grad_(True)
    step_is_that_of({(0, 1): first, (2, 3): second}, *data[13])
    model[2].bias.requires_grad_(False)  # its block is of weight and bias together: it has to be begun anew
    optimizer.step(*data[14])
    assert int(optimizer.state[model[2].weight]["kfac_updates"]) == 1
    assert len(optimizer.state[model[2].weight]["kfac_inputs"]) == len(factor) - 1
    model[2].bias.requires_grad_(True)
    assert all(optimizer.step(x, y).accepted for x, y in data[15:])


@pytest.mark.parametrize("options", [{"solver": "kfac"}, {"solver": "ekfac"}, {"preconditioner": "kfac"}])
@pytest.mark.parametrize("name", ["0.bias", "0.weight", "2.bias"])
def test_a_step_after_a_parameter_was_thawed_is_that_of_a_new_optimizer(name, options):
    """With no memory of earlier batches; and each parameter has one block."""
    model = classifier()
    make = partial(NGD, family=families.Categorical(), damping=0.1, probes=None, factor_decay=0.0, **options)
    optimizer = make(model)
    first, second = batches(2)
    model.get_parameter(name).requires_grad_(False)
    optimizer.step(*first)
    model.get_parameter(name).requires_grad_(True)
    twin = copy.deepcopy(model)
    optimizer.step(*second)
    make(twin).step(*second)
    torch.testing.assert_close(vector(model), vector(twin), rtol=0, atol=1e-12)


def test_one_iteration_from_kfac_is_its_direction_at_the_best_length_for_the_fisher():
    """Martens and Grosse (2015), section 6.4; and with many iterations it is the natural gradient."""
    (x, y), results = batches(1)[0], {}
    g = gradient(classifier(), x, y)
    for name, options in {
        "kfac": {"solver": "kfac"},
        "one": {"preconditioner": "kfac", "max_iterations": 1},
        "many": {"preconditioner": "kfac", "max_iterations": 400, "rtol": 1e-12},
    }.items():
        model = classifier()
        NGD(model, families.Categorical(), damping=0.01, probes=None, **options).step(x, y)
        results[name] = vector(model) - vector(classifier())
    f = Fisher(classifier(), x, families.Categorical()).dense() + 0.01 * torch.eye(len(g)).double()
    d = results["kfac"]
    torch.testing.assert_close(results["one"], d * -(g @ d) / (d @ f @ d), rtol=0, atol=1e-10)
    torch.testing.assert_close(results["many"], torch.linalg.solve(f, -g), rtol=0, atol=1e-8)


def test_kfac_keeps_to_a_radius():
    model = classifier()
    optimizer = NGD(model, families.Categorical(), lr=1e3, damping=1e-3, max_kl=0.01, solver="kfac")
    for x, y in batches(5):
        report = optimizer.step(x, y)
        assert report.accepted
        assert 1e-3 < report.kl <= 0.01


@pytest.mark.parametrize("kind", ["empirical", "sampled"])
def test_other_fishers(kind):
    model, twin = classifier(), classifier()
    (x, y), g = batches(1)[0], gradient(twin, *batches(1)[0])
    torch.manual_seed(3)
    NGD(model, families.Categorical(), damping=0.1, solver="dense", fisher=kind).step(x, y)
    torch.manual_seed(3)
    f = Fisher(twin, x, families.Categorical(), kind=kind, targets=y if kind == "empirical" else None).dense()
    want = vector(twin) - torch.linalg.solve(f + 0.1 * torch.eye(len(g)).double(), g)
    torch.testing.assert_close(vector(model), want, rtol=0, atol=1e-10)


STATEFUL = [
    {"warm_start": 0.9},
    {"damping_metric": "online"},
    {"solver": "ekfac", "update_period": 3},
    {"preconditioner": "kfac"},
]


@pytest.mark.parametrize("options", STATEFUL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_resumes_bit_for_bit_from_tensors(dtype, options):
    data = batches(20, dtype=dtype)

    def start() -> tuple[nn.Module, NGD, torch.optim.lr_scheduler.LRScheduler]:
        model = classifier(dtype)
        optimizer = NGD(model, families.Categorical(), lr=0.3, damping=0.1, momentum=0.5, weight_decay=1e-2,
                        damping_control=LevenbergMarquardt(), **options)  # fmt: skip
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4)

    def go(model, optimizer, scheduler, part):
        for x, y in part:
            optimizer.step(x, y)
            scheduler.step()

    straight, first, resumed = start(), start(), start()
    torch.manual_seed(2)
    go(*straight, data)
    torch.manual_seed(2)
    go(*first, data[:14])
    random_state = torch.get_rng_state()
    for state in first[1].state_dict()["state"].values():
        assert all(isinstance(value, Tensor) for value in state.values())
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, saved in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    torch.set_rng_state(random_state)
    go(*resumed, data[14:])
    assert torch.equal(vector(resumed[0]), vector(straight[0]))


@pytest.mark.parametrize("options", STATEFUL)
def test_a_refused_step_leaves_all_but_the_damping(options):
    model = classifier()
    optimizer = NGD(model, families.Categorical(), damping=0.1, momentum=0.5, weight_decay=0.1,
                    damping_control=LevenbergMarquardt(factor=2.0), **options)  # fmt: skip
    for x, y in batches(2):
        optimizer.step(x, y)
    before, damping = vector(model), optimizer.param_groups[0]["damping"]
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    x, y = batches(1)[0]
    report = optimizer.step(x * float("nan"), y)
    assert not report.accepted
    assert report.status is Status.NON_FINITE
    assert torch.equal(vector(model), before)
    assert optimizer.state.keys() == state.keys()
    assert all(torch.equal(v, state[p][k]) for p, s in optimizer.state.items() for k, v in s.items())
    assert optimizer.param_groups[0]["damping"] == 2 * damping
    assert optimizer.step(x, y).accepted


def test_weight_decay_is_decoupled_and_spares_biases():
    model, plain = classifier(), classifier()
    x, y = batches(1)[0]
    for m, decay in ((model, 0.5), (plain, 0.0)):
        NGD(m, families.Categorical(), lr=0.1, damping=0.1, weight_decay=decay).step(x, y)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, 0.95 * q if p.ndim > 1 else q, rtol=1e-14, atol=0)


def test_frozen_parameters_stay_and_gradients_are_not_touched():
    model = classifier()
    model[0].requires_grad_(False)
    frozen, head = model[0].weight.clone(), model[2].weight.detach().clone()
    NGD(model, families.Categorical()).step(*batches(1)[0])
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[2].weight, head)
    assert all(p.grad is None for p in model.parameters())


def test_bf16_autocast_and_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    optimizer = NGD(model, families.Categorical(), lr=0.3, damping=1e-1)
    x, y = torch.randn(32, 3, 8, 8), torch.randint(4, (32,))
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(-optimizer.step(x, y).objective)
    assert losses[-1] < 0.5 * losses[0]
    assert model[1].num_batches_tracked == 8, "running statistics move once per step"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("damping", -1e-3),
        ("damping", float("nan")),
        ("max_kl", 0.0),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("solver", "gmres"),
        ("max_iterations", 0),
        ("rtol", -1.0),
        ("warm_start", 1.5),
        ("curvature_fraction", 0.0),
        ("damping_metric", "diagonal"),
        ("alpha", -1.0),
        ("fisher", "type-1"),
        ("preconditioner", "diagonal"),
        ("factor_decay", 1.0),
        ("update_period", 0),
        ("probes", 0),
    ],
)
def test_bad_options_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        NGD(classifier(), families.Categorical(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("solver", "dense"), ("solver", "kfac"), ("warm_start", 0.9), ("preconditioner", "kfac")]
)
def test_what_does_not_go_with_online_damping(name, value):
    with pytest.raises(ValueError, match=f"{name}.*damping_metric"):
        NGD(classifier(), families.Categorical(), damping_metric="online", **{name: value})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("preconditioner", {"preconditioner": "kfac", "solver": "dense"}),
        ("preconditioner", {"preconditioner": "kfac", "solver": "ekfac"}),
        ("warm_start", {"warm_start": 0.5, "solver": "kfac"}),
        ("solver", {"damping_metric": "factors"}),
        ("solver", {"damping_metric": "factors", "preconditioner": "kfac"}),
    ],
)
def test_what_does_not_go_together(name, options):
    with pytest.raises(ValueError, match=name):
        NGD(classifier(), families.Categorical(), **options)


@pytest.mark.parametrize("name", ["momentum", "weight_decay"])
def test_what_moves_the_model_beside_the_step_does_not_go_with_a_radius(name):
    with pytest.raises(ValueError, match=rf"{name} must be 0 with max_kl, .*; got 0\.9"):
        NGD(classifier(), families.Categorical(), **{name: 0.9}, max_kl=0.01)
    optimizer = NGD(classifier(), families.Categorical(), damping=0.1, max_kl=0.01)
    optimizer.param_groups[0][name] = 0.9
    with pytest.raises(ValueError, match=rf"{name} must be 0 with max_kl, .*; got 0\.9"):
        optimizer.step(*batches(1)[0])


def test_momentum_that_a_scheduler_sets_does_not_go_with_a_radius():
    model = classifier()
    optimizer = NGD(model, families.Categorical(), damping=0.1, max_kl=0.01)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=10)
    before = vector(model)
    with pytest.raises(ValueError, match=r"momentum must be 0 with max_kl, .*; got 0\.95"):
        optimizer.step(*batches(1)[0])
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize(
    ("options", "lr"),
    [({}, 100.0), ({"solver": "kfac"}, 100.0), ({"momentum": 0.9}, 1.0), ({"weight_decay": 1e6}, 1.0)],
)
def test_a_step_to_parameters_that_are_not_finite_is_refused(options, lr):
    """In half precision, whose largest number is 65,504; by the step itself, the momentum or the decay."""
    model = nn.Linear(2, 3).half()
    x, y = torch.ones(8, 2).half(), torch.full((8, 3), 6000.0).half()
    optimizer = NGD(model, families.Gaussian(), lr=0.0, damping=1e-3, **options)
    optimizer.step(x, y)
    if "momentum" in options:
        for p in model.parameters():
            optimizer.state[p]["momentum_buffer"].fill_(1e5)
    optimizer.param_groups[0]["lr"] = lr
    before = [p.detach().clone() for p in model.parameters()]
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    report = optimizer.step(x, y)
    assert not report.accepted
    assert not report.step.any()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(optimizer.state[p][k], v) for p, s in state.items() for k, v in s.items())


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_targets_of_a_product_are_a_tuple(kind):
    """A class, and a real number with its spread: the step is that of the dense Fisher of the first rows."""
    family = families.Product([families.Categorical(), families.DiagonalGaussian()], [2, 2])
    model, twin = classifier(), classifier()
    (x, classes), *_ = batches(1)
    y = (classes % 2, torch.randn(40, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    NGD(model, family, damping=0.1, solver="dense", fisher=kind, curvature_fraction=0.25).step(x, y)
    first = tuple(part[:10] for part in y) if kind == "empirical" else None
    f = Fisher(twin, x[:10], family, kind=kind, targets=first).dense()
    loss = (
        functional.cross_entropy(twin(x)[:, :2], y[0])
        - torch.distributions.Normal(twin(x)[:, 2:3], twin(x)[:, 3:].exp()).log_prob(y[1]).mean()
    )
    g = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(twin.parameters()))])
    lr = NGD(twin, family, damping=0.1).param_groups[0]["lr"]
    want = vector(twin) - lr * torch.linalg.solve(f + 0.1 * torch.eye(len(g)).double(), g)
    torch.testing.assert_close(vector(model), want, rtol=0, atol=1e-10)


def test_targets_of_a_product_that_are_no_tensors_are_refused():
    family = families.Product([families.Categorical(), families.Gaussian()], [3, 1])
    model, (x, y) = classifier(), batches(1)[0]
    before = vector(model)
    for targets, match in (
        ((), "got tuple"),
        ((y, 1.0), "got float"),
        ((y, torch.zeros(())), "got a tensor without axes"),
        (y, "targets must be a tuple of 2"),
        ((y % 3,), "targets must be a tuple of 2.*got 1"),
        ((y % 3, torch.zeros(39, 1)), r"must have the shape \(40, 1\)"),
    ):
        with pytest.raises(ValueError, match=match):
            NGD(model, family, damping=0.1).step(x, targets)
    with pytest.raises(ValueError, match="got tuple"):
        NGD(model, families.Categorical(), damping=0.1).step(x, (y,))
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DiagonalFisher(decay=0.9, probes=None),
        lambda: KroneckerFisher(decay=0.9, probes=None),
        lambda: KroneckerFisher(decay=0.9, probes=None, corrected=True),
        lambda: DenseFisher(decay=0.9),
    ],
)
def test_a_curvature_begins_with_what_it_was_taught(make, frozen):
    model, family = classifier(), families.Categorical()
    curvature, twin = make(), make()
    for x, _ in batches(12):
        for one in (curvature, twin):
            one.update(Fisher(model, x, family))
    if frozen:
        model[0].requires_grad_(False)
    x, y = batches(13)[-1]
    optimizer = NGD(model, family, damping=0.1, solver=curvature)
    # a step that is refused teaches it nothing, and a state that is loaded knows as much
    assert not optimizer.step(x * torch.nan, y).accepted
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer = NGD(model, family, damping=0.1, solver=make())
    optimizer.load_state_dict(saved)
    theta = [p for p in model.parameters() if p.requires_grad]
    g = torch.cat([s.flatten() for s in torch.autograd.grad(-functional.cross_entropy(model(x), y), theta)])
    twin.update(Fisher(model, x, family))
    torch.testing.assert_close(optimizer.step(x, y).step, twin.inverse(0.1)(g), rtol=1e-9, atol=1e-12)
    expected = 1 if frozen and isinstance(twin, DenseFisher) else 13  # a block of all parameters is of these alone
    counts = {int(v) for s in optimizer.state.values() for k, v in s.items() if k.endswith("updates")}
    assert counts == {expected}


def test_a_curvature_of_another_model_is_refused():
    curvature, (x, _) = KroneckerFisher(), batches(1)[0]
    curvature.update(Fisher(nn.Linear(6, 4).double(), x, families.Categorical()))
    for argument in ("solver", "preconditioner"):
        with pytest.raises(ValueError, match=r"was updated for \['weight', 'bias'\], which the model does not have"):
            NGD(classifier(), families.Categorical(), **{argument: curvature})
    wider = nn.Linear(7, 4).double()
    with pytest.raises(ValueError, match=r"was updated for \['weight'\], .* in these shapes"):
        NGD(wider, families.Categorical(), solver=curvature)


def test_momentum_that_was_zero_for_a_while_goes_on_from_the_last_step():
    """m ← s + μ m, with every μ: with 0 it is the last natural step, and not that of before."""
    model = classifier()
    optimizer = NGD(model, families.Categorical(), lr=0.1, damping=0.1, momentum=0.9, solver="dense")
    m = 0.0
    for t, (x, y) in enumerate(batches(12)):
        momentum = optimizer.param_groups[0]["momentum"] = 0.0 if 4 <= t < 9 else 0.9
        before = vector(model)
        m = optimizer.step(x, y).step + momentum * m
        torch.testing.assert_close(vector(model) - before, m, rtol=0, atol=1e-12)


class Queue(nn.Module):
    """A buffer that is longer after every pass in training, or that is a tensor only after the first."""

    def __init__(self, first: Tensor | None) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("rows", first)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            row = x.detach().mean(0, keepdim=True)
            self.rows = row if self.rows is None else torch.cat([self.rows, row])
        return self.layer(x)


@pytest.mark.parametrize("first", [None, torch.zeros(0, 6, dtype=torch.float64)], ids=["none", "empty"])
@pytest.mark.parametrize(
    "make",
    [
        partial(NGD, damping=0.1),
        partial(NGD, damping=0.1, max_kl=0.01),
        partial(NGD, damping=0.1, lr=0.1, solver="kfac"),
        partial(DiagonalNGD, lr=0.01),
    ],
    ids=["lr", "max_kl", "kfac", "diagonal"],
)
def test_a_buffer_that_grows_has_one_row_for_each_step(make, first):
    model = Queue(first).double()
    optimizer = make(model, families.Categorical())
    data = batches(3)
    for x, y in data:
        optimizer.step(x, y)
    torch.testing.assert_close(model.rows, torch.stack([x.mean(0) for x, _ in data]))
