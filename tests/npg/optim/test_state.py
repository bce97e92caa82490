"""What an optimizer of a model must leave alone, keep and refuse: buffers, copies, parameter groups, autocast."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional
from torch.nn.utils import parameters_to_vector

from npg import Fisher, KroneckerFisher, StepReport, TrustRegion, families, natural_step
from npg.curvature import DenseFisher
from npg.optim import NGD, DiagonalNGD, KLShampoo, OnlineNGD
from npg.trust_region import LevenbergMarquardt

FAMILY = families.Categorical()
MAKE = {
    "ngd": lambda model, **options: NGD(model, FAMILY, lr=0.3, damping=0.1, **options),
    "kfac": lambda model, **options: NGD(model, FAMILY, lr=0.3, damping=0.1, solver="kfac", probes=None, **options),
    "diagonal-ngd": lambda model, **options: DiagonalNGD(model, FAMILY, lr=0.1, probes=None, **options),
}


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 3, generator=generator), torch.randint(3, (16,), generator=generator)


def network(*middle):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 3))


class Normalised(nn.Module):
    """A running normaliser that is none of PyTorch's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.count = self.count + 1
            self.mean = self.mean + (x.mean(0) - self.mean) / self.count
        return self.linear(x - self.mean)


def likelihood(targets):
    return lambda outputs: FAMILY.log_likelihood(outputs, targets).mean()


@pytest.mark.filterwarnings("ignore:no forward mode")
def test_any_buffer_moves_once_in_a_step_and_a_step_of_zero_changes_nothing(data):
    x, y = data
    model = Normalised()
    natural_step(model, x, FAMILY, likelihood(y), learning_rate=0.1, damping=0.1)
    report = natural_step(model, x + 3, FAMILY, likelihood(y), learning_rate=0.0)
    assert (report.kl, report.actual_gain) == (0.0, 0.0)
    assert model.count == 2
    NGD(model, FAMILY, 1.0, damping=0.1, max_kl=1e-3, curvature_fraction=0.5).step(x, y)
    assert model.count == 3
    torch.testing.assert_close(model.mean, (2 * x.mean(0) + (x + 3).mean(0)) / 3)


@pytest.mark.parametrize("name", MAKE)
def test_a_refused_or_failed_step_leaves_statistics_as_they_were(name, data):
    x, y = data
    model = network(nn.BatchNorm1d(4))
    optimizer = MAKE[name](model)
    optimizer.step(x, y)
    before = copy.deepcopy(model.state_dict())
    optimizer.step(x * float("nan"), y)
    with pytest.raises(ValueError, match="targets"):
        optimizer.step(x, y[:5])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    optimizer.step(x, y)
    assert model[1].num_batches_tracked == 2
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_trials_under_autocast_are_of_the_weights_tried(data):
    x, y = data
    optimizer = NGD(network(), FAMILY, 1.0, damping=1e-2, max_kl=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        report = optimizer.step(x, y)
    assert report.accepted
    assert 0.001 < report.kl <= 0.01


@pytest.mark.parametrize("name", MAKE)
def test_steps_within_one_autocast_block_go_on(name, data):
    x, y = data
    optimizer = MAKE[name](network(), momentum=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        results = [optimizer.step(x, y) for _ in range(4)]
    losses = [-r.objective if isinstance(r, StepReport) else float(r) for r in results]
    assert losses == sorted(set(losses), reverse=True)


def test_damping_control_sees_the_gain_under_autocast(data):
    x, y = data
    optimizer = NGD(network(), FAMILY, 0.5, damping=0.1, damping_control=LevenbergMarquardt())
    with torch.autocast("cpu", torch.bfloat16):
        assert optimizer.step(x, y).actual_gain > 0


@pytest.mark.parametrize(
    ("name", "metric"), [*((name, "identity") for name in MAKE), ("ngd", "online"), ("diagonal-ngd", "online")]
)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_as_the_original(how, name, metric, data):
    model = network()
    optimizer = MAKE[name](model, momentum=0.9, damping_metric=metric)
    optimizer.step(*data)
    other_model, other = how((model, optimizer))
    for each in (optimizer, other):
        each.step(*data)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other_model.parameters(), strict=True))
    before = model[0].weight.clone()
    other.step(*data)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", MAKE)
def test_parameters_beside_those_of_the_model_are_refused(name, data):
    model = network()
    model[0].bias.requires_grad = False
    optimizer = MAKE[name](model)
    with pytest.raises(ValueError, match="one parameter group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    optimizer.step(*data)
    before = copy.deepcopy(model.state_dict())
    model[0].bias.requires_grad = True
    with pytest.raises(ValueError, match=rf"'0\.bias'.* became trainable.*make a new {type(optimizer).__name__}"):
        optimizer.step(*data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MAKE)
def test_a_compiled_model_is_optimised(name, data, monkeypatch):
    # torch.compile turns the checks of torch.distributions off, for good
    validate = torch.distributions.Distribution._validate_args
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", validate)
    model, twin = network(), network()
    MAKE[name](torch.compile(model, backend="aot_eager")).step(*data)
    MAKE[name](twin).step(*data)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert not torch.equal(model[0].weight, network()[0].weight)


def test_the_kl_is_that_of_the_direction_asked_for(data):
    x, y = data
    kls = []
    for direction in ("old_new", "new_old"):
        model = network()
        with torch.no_grad():
            old = model(x)
        region = TrustRegion(0.05, kl_direction=direction)
        report = natural_step(model, x, FAMILY, likelihood(y), trust_region=region, damping=0.1)
        with torch.no_grad():
            pair = (old, model(x)) if direction == "old_new" else (model(x), old)
        kls.append(report.kl)
        assert report.kl == pytest.approx(float(FAMILY.kl(*pair).mean()), rel=1e-4)
    assert kls[0] != kls[1]


def test_what_a_fisher_refuses(data):
    x, _ = data
    model = network()
    fisher = Fisher(model, x, FAMILY)
    v = torch.randn(fisher.shape[0])
    fisher @ v
    assert (fisher @ torch.zeros(len(v), 0)).shape == (len(v), 0)
    nn.utils.vector_to_parameters(torch.zeros_like(v), model.parameters())
    with pytest.raises(RuntimeError, match="have changed"):
        fisher @ v
    with pytest.raises(ValueError, match=r"\['0\.wieght'\], which the model does not have"):
        Fisher(model, x, FAMILY, parameters={"0.wieght": model[0].weight})
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        Fisher(model, x, FAMILY)


# ------------------------------------------------------------------------------------ what PyTorch asks of an optimizer

EVERY = {
    "online-ngd": lambda model: OnlineNGD(model.parameters(), 0.05, max_change=1.0),
    "kl-shampoo": lambda model: KLShampoo(model.parameters(), 0.05, max_axis=3),
    "ngd": lambda model: NGD(model, FAMILY, lr=0.3, damping=0.1),
    "ngd-momentum": lambda model: NGD(model, FAMILY, lr=0.3, damping=0.1, momentum=0.5, warm_start=0.9),
    "ngd-online": lambda model: NGD(model, FAMILY, lr=0.3, damping=0.1, damping_metric="online"),
    "kfac": lambda model: NGD(model, FAMILY, lr=0.3, damping=0.1, momentum=0.5, solver="kfac", update_period=20),
    "ekfac": lambda model: NGD(model, FAMILY, lr=0.3, damping=0.1, solver="ekfac", update_period=20),
    "cg-kfac": lambda model: NGD(model, FAMILY, lr=0.3, damping=0.1, preconditioner="kfac", update_period=20),
    "diagonal-ngd": lambda model: DiagonalNGD(model, FAMILY, lr=0.1),
    "diagonal-ngd-online": lambda model: DiagonalNGD(model, FAMILY, lr=0.1, damping_metric="online"),
}


def go(model, optimizer, steps, x, y):
    for _ in range(steps):
        if isinstance(optimizer, (OnlineNGD, KLShampoo)):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        else:
            optimizer.step(x, y)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_distributed_checkpoints_resume_bit_for_bit(name, flat, data):
    """Into a new optimizer, whose state PyTorch makes by ``step(closure=None)``; and a norm has no factors."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = network(nn.LayerNorm(4))
    optimizer = EVERY[name](model)
    go(model, optimizer, 13, *data)
    weights = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    random_state = torch.get_rng_state()
    go(model, optimizer, 3, *data)
    other = network(nn.LayerNorm(4))
    other.load_state_dict(weights)
    resumed = EVERY[name](other)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert all(torch.equal(value, weights[key]) for key, value in other.state_dict().items()), "nothing has moved"
    torch.set_rng_state(random_state)
    go(other, resumed, 3, *data)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("online-ngd", "kl-shampoo")])
def test_a_state_that_is_made_ahead_changes_no_step(name, data):
    model, twin = network(nn.LayerNorm(4)), network(nn.LayerNorm(4))
    optimizer, ahead = EVERY[name](model), EVERY[name](twin)
    ahead.step(closure=None)
    for each, one in ((model, optimizer), (twin, ahead)):
        torch.manual_seed(0)
        go(each, one, 12, *data)
        one.step(closure=None)  # nor when there is one
        go(each, one, 1, *data)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_a_checkpoint_before_the_first_step_changes_no_step(name, data):
    model, twin = network(nn.LayerNorm(4)), network(nn.LayerNorm(4))
    optimizer, asked = EVERY[name](model), EVERY[name](twin)
    assert get_optimizer_state_dict(twin, asked)["state"]
    for each, one in ((model, optimizer), (twin, asked)):
        torch.manual_seed(0)
        go(each, one, 3, *data)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", MAKE)
def test_steps_without_a_mini_batch_are_refused(name, data):
    x, y = data
    model = network()
    optimizer = MAKE[name](model)
    before = copy.deepcopy(model.state_dict())
    for arguments in ((), (x,), (lambda: 1.0,)):
        with pytest.raises(TypeError, match=r"call step\(inputs, targets\)"):
            optimizer.step(*arguments)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(x, y, closure=lambda: 1.0)
    with pytest.raises(ValueError, match=r"targets must be a tensor whose leading axis .* got a tensor without axes"):
        optimizer.step(x, y[0])
    with pytest.raises(ValueError, match=r"targets must be a tensor .* got list"):
        optimizer.step(x, y.tolist())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize("name", MAKE)
def test_hooks_schedulers_and_zero_grad(name, data):
    model = network()
    optimizer, calls = MAKE[name](model), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    lr = optimizer.param_groups[0]["lr"]
    optimizer.step(*data)
    scheduler.step()
    optimizer.zero_grad()
    assert calls == ["before", "after"]
    assert optimizer.param_groups[0]["lr"] == lr / 2


@pytest.mark.parametrize("name", MAKE)
def test_outputs_without_an_axis_of_events_are_refused(name, data):
    x, y = data

    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x):
            return self.linear(x).squeeze(-1)

    model = Squeezed()
    optimizer = MAKE[name](model)
    optimizer.family = families.Gaussian()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"one event of 16 components.*\(16, 1\) for 16 events, without squeeze"):
        optimizer.step(x, y.float())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all("momentum_buffer" not in state for state in optimizer.state.values())


class Odd(nn.Module):
    """A parameter that no vector of real numbers holds, or that moves by itself, before the network."""

    def __init__(self, kind):
        super().__init__()
        if kind == "complex":
            self.odd = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        elif kind == "float8":
            self.odd = nn.Parameter(torch.ones(3).to(torch.float8_e5m2))
        else:
            self.odd = nn.Embedding(3, 3, **{kind: 1.0 if kind == "max_norm" else True})
        self.net = network()

    def forward(self, x):
        h = self.odd(torch.arange(3)).sum(0) if isinstance(self.odd, nn.Embedding) else self.odd.real.float()
        return self.net(x + h)


@pytest.mark.parametrize("kind", ["complex", "float8", "max_norm", "sparse", "scale_grad_by_freq"])
def test_every_method_refuses_the_same_parameters_by_name(kind, data):
    x, _ = data
    model = Odd(kind)
    before = copy.deepcopy(model.state_dict())
    ways = [lambda: make(model) for make in MAKE.values()]  # noqa: B023 - called at once
    ways += [lambda: Fisher(model, x, FAMILY), lambda: KroneckerFisher(Fisher(model, x, FAMILY))]
    if kind in ("complex", "float8"):
        ways += [lambda: OnlineNGD(model.named_parameters(), 0.1), lambda: KLShampoo(model.named_parameters())]
    for way in ways:
        with pytest.raises(ValueError, match=r"'odd'.*([Ss]et|convert)"):
            way()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MAKE)
def test_a_copy_steps_its_own_model_where_a_scheduler_had_wrapped_the_step(name, data):
    x, y = data
    model = network()
    optimizer = MAKE[name](model)
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    optimizer.step(x, y)
    before = copy.deepcopy(model.state_dict())
    for twin, copied in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        copied.step(x, y)
        assert not torch.equal(twin[0].weight, before["0.weight"])
        assert torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("kind", [NGD, DiagonalNGD])
def test_a_state_that_was_cleared_begins_anew(kind, data):
    """The factors of the metric too: the next step is the first of a new optimizer."""
    x, y = data
    model = network()

    def make(of):
        return kind(of, FAMILY, lr=0.1, damping=0.1, damping_metric="online")

    optimizer = make(model)
    for _ in range(3):
        optimizer.step(x, y)
    optimizer.state.clear()
    twin = copy.deepcopy(model)
    new = make(twin)
    for one in (optimizer, new):
        torch.manual_seed(0)
        one.step(x, y)
    states = [one.state_dict()["state"] for one in (optimizer, new)]
    for i, state in states[1].items():
        assert states[0][i].keys() == state.keys()
        assert all(torch.equal(states[0][i][key], value) for key, value in state.items())
    assert torch.equal(model[0].weight, twin[0].weight)


def test_a_state_of_another_shape_is_refused_before_it_is_loaded(data):
    x, y = data
    optimizer = NGD(network(), FAMILY, damping=0.1, momentum=0.5)
    optimizer.step(x, y)
    other = NGD(nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 3)), FAMILY, damping=0.1, momentum=0.5)
    with pytest.raises(
        ValueError, match=r"momentum_buffer that was saved has the shape \(4, 3\), and its parameter \(1, 3\)"
    ):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@pytest.mark.parametrize(
    ("options", "name"), [({"solver": "diagonal"}, "diagonal_values"), ({"damping_metric": "online"}, "online factors")]
)
def test_a_curvature_of_another_shape_is_refused_before_it_is_loaded(options, name):
    optimizer, other = (NGD(nn.Linear(6, n), families.Gaussian(), lr=0.1, damping=0.1, **options) for n in (1, 8))
    for _ in range(3):
        optimizer.step(torch.randn(4, 6), torch.randn(4, 1))
    with pytest.raises(ValueError, match=rf"^the {name} that was saved has the shape .*, and its parameter .*8"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@pytest.mark.parametrize("cls", [OnlineNGD, KLShampoo])
def test_factors_of_another_rank_are_not_broadcast(cls):
    p = nn.Parameter(torch.randn(6, 4))
    optimizer = cls([p], lr=0.1)
    p.grad = torch.randn(6, 4)
    optimizer.step()
    saved = optimizer.state_dict()
    name = next(key for key, value in saved["state"][0].items() if value.ndim == 2 and key != "momentum_buffer")
    saved["state"][0][name] = saved["state"][0][name][:1]
    other = cls([p], lr=0.1)
    other.load_state_dict(saved)
    with pytest.raises(ValueError, match=f"{name} in the state has the shape .* and must have"):
        other.step()


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "adam": lambda model: torch.optim.Adam(model.parameters()),
    "online-ngd": lambda model: OnlineNGD(model.parameters(), lr=0.1),
    "kl-shampoo": lambda model: KLShampoo(model.parameters(), lr=0.1),
    **MAKE,
}


@pytest.mark.parametrize(
    ("name", "saved", "lacking"),
    [
        ("online-ngd", "sgd", "'alpha'"),
        ("online-ngd", "kl-shampoo", "'alpha'"),
        ("kl-shampoo", "adam", "'momentum'"),
        ("ngd", "adam", "'damping', 'momentum'"),
        ("diagonal-ngd", "ngd", "'decay'"),
    ],
)
def test_the_state_of_another_optimizer_is_refused_before_it_is_loaded(name, saved, lacking):
    model = network()
    optimizer, other = OPTIMIZERS[name](model), OPTIMIZERS[saved](model)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"not of {type(optimizer).__name__}, its parameter groups lack .*{lacking}"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict() == before


@pytest.mark.parametrize(("saved", "foreign"), [("diagonal-ngd", "'decay'"), ("kl-shampoo", "'average'.*'power'")])
def test_the_state_of_an_optimizer_with_more_options_is_refused_too(saved, foreign):
    """Their momentum is of other units, and NGD would move by it."""
    model = network()
    optimizer, other = OPTIMIZERS["ngd"](model), OPTIMIZERS[saved](model)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"not of NGD, its parameter groups have .*{foreign}.* of another"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("name", ["online-ngd", "kl-shampoo", *MAKE])
def test_a_state_with_what_a_scheduler_added_is_loaded(name):
    optimizer, other = OPTIMIZERS[name](network()), OPTIMIZERS[name](network())
    torch.optim.lr_scheduler.LinearLR(other)
    optimizer.load_state_dict(other.state_dict())
    assert "initial_lr" in optimizer.param_groups[0]


@pytest.mark.parametrize("name", ["online-ngd", "kl-shampoo", *MAKE])
@pytest.mark.parametrize("again", [lambda optimizer: optimizer, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_state_is_loaded_as_often_as_one_likes(name, again):
    model = network()
    optimizer = OPTIMIZERS[name](model)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.0625
    for _ in range(2):
        optimizer = again(optimizer)
        optimizer.param_groups[0]["lr"] = 1.0
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.0625


class Ours(NGD):
    def __init__(self, options, model):
        super().__init__(model, FAMILY, **options)


class OursDiagonal(DiagonalNGD):
    def __init__(self, options, model):
        super().__init__(model, FAMILY, **options)


@pytest.mark.parametrize(("cls", "base"), [(Ours, NGD), (OursDiagonal, DiagonalNGD)])
def test_a_subclass_may_have_a_constructor_of_its_own(cls, base, data):
    paths = []
    for make in (cls, lambda options, model: base(model, FAMILY, **options)):
        model = network()
        make({"lr": 0.25}, model).step(*data)
        paths.append(parameters_to_vector(model.parameters()))
    assert torch.equal(*paths)


@pytest.mark.parametrize("cls", [partial(NGD, damping=0.1), partial(DiagonalNGD, probes=None)])
def test_online_factors_follow_a_model_that_is_converted(cls, data):
    x, y = data
    model = network()
    optimizer = cls(model, FAMILY, lr=0.1, damping_metric="online")
    optimizer.step(x, y)
    model.double()
    before = copy.deepcopy(model)
    other = cls(before, FAMILY, lr=0.1, damping_metric="online")
    other.load_state_dict(optimizer.state_dict())
    for its in (optimizer, other):
        for _ in range(3):
            its.step(x.double(), y)
        assert {t.dtype for s in its.state.values() for t in s.values() if t.is_floating_point()} == {torch.float64}
    torch.testing.assert_close(*(parameters_to_vector(m.parameters()) for m in (model, before)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_warm_start_goes_on_in_another_dtype(dtypes, data):
    x, y = data
    model = network().to(dtypes[0])
    optimizer = NGD(model, FAMILY, damping=0.1, warm_start=0.9)
    optimizer.step(x.to(dtypes[0]), y)
    model = model.to(dtypes[1])
    other = NGD(model, FAMILY, damping=0.1, warm_start=0.9)
    other.load_state_dict(optimizer.state_dict())
    assert other.step(x.to(dtypes[1]), y).accepted


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_padding_mask_hides_the_same_from_a_trial_as_from_the_gradient():
    """In evaluation mode PyTorch has another way through an encoder without gradients: it returns 0 where masked."""
    reports = []
    for training in (True, False):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model = Masked(nn.TransformerEncoder(layer, 1)).train(training)
        x, y = torch.randn(6, 5, 8), torch.randint(8, (6, 5))
        mask = torch.arange(5) >= torch.tensor([[5], [4], [3], [2], [1], [5]])
        report = natural_step(
            model,
            (x, mask),
            FAMILY,
            lambda o, y=y, keep=~mask: (FAMILY.log_likelihood(o, y) * keep).sum() / keep.sum(),
            trust_region=TrustRegion(0.01),
            damping=0.1,
        )
        assert report.accepted
        reports.append(report)
    assert reports[1].kl == pytest.approx(reports[0].kl, rel=1e-4)


class Masked(nn.Module):
    """An encoder over a sequence of which a part is hidden."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, mask):
        return self.encoder(x, src_key_padding_mask=mask)


@pytest.mark.parametrize("precisions", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "kfac"},
        {"solver": "ekfac"},
        {"solver": "diagonal"},
        {"solver": "dense fisher"},
        {"preconditioner": "kfac"},
        {"warm_start": 0.9, "momentum": 0.5},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_a_state_goes_on_in_a_model_of_another_precision(options, precisions):
    """Two steps of which one uses the state as it is, and one learns: those of the float64 model, to float32."""

    def made(dtype):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
        own = {"solver": DenseFisher(decay=0.9)} if options.get("solver") == "dense fisher" else options
        period = {} if "warm_start" in own else {"update_period": 2}
        return model, NGD(model, FAMILY, lr=0.5, damping=0.1, probes=None, **own, **period)

    torch.manual_seed(1)
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randint(0, 3, (40,))
    first, second = precisions
    model, optimizer = made(first)
    for _ in range(3):
        optimizer.step(x.to(first), y)
    other, resumed = made(second)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for step in range(2):
        for each, dtype in ((optimizer, first), (resumed, second)):
            torch.manual_seed(step)
            each.step(x.to(dtype), y)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.double(), q.double(), rtol=1e-4, atol=1e-5)
    held = [v for state in resumed.state.values() for v in state.values() if torch.is_tensor(v)]
    assert {v.dtype for v in held if v.is_floating_point()} == {second}
