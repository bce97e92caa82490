"""KLShampoo as a citizen of torch.optim, step by step against a twin, and what it is invariant to."""

import copy
import io
import pickle
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from npg.curvature.two_sided import TwoSidedCurvature
from npg.optim import KLShampoo

MATRIX = (6, 4, 3, 3)


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    return model.to(dtype)


def batches(steps: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 3, 8, 8, generator=g).to(dtype), torch.randint(4, (16,), generator=g)) for _ in range(steps)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def everything(model: nn.Module, optimizer: KLShampoo) -> list[Tensor]:
    state = optimizer.state_dict()["state"]
    return weights(model) + [value.clone() for i in sorted(state) for _, value in sorted(state[i].items())]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_equals_a_loop_over_parameters(power, nesterov):
    """Factors, powers on the steps 0, 1, 3, 9 and then every fourth, momentum, decay, the rate of vectors."""
    model, twin = make_model(), make_model()
    options = {"nesterov": nesterov, "power": power, "vector_scale": 0.3, "update_period": 4}
    optimizer = KLShampoo(model.parameters(), 0.01, 0.8, 0.1, **options)
    params = list(twin.parameters())
    alone = [TwoSidedCurvature([p], [{}], power=power) for p in params]
    means = [torch.zeros_like(p) for p in params]
    for t, (x, y) in enumerate(batches(22)):
        train(model, optimizer, [(x, y)])
        gradients = torch.autograd.grad(functional.cross_entropy(twin(x), y), params)
        with torch.no_grad():
            for p, g, mean, curvature in zip(params, gradients, means, alone, strict=True):
                curvature.update([g[None]])
                if t in (0, 1, 3, 9, 12, 16, 20):
                    curvature.inverse(exact=t < 10)
                mean.mul_(0.8).add_(0.2 * g)
                (v,) = curvature.apply([(0.2 * g + 0.8 * mean if nesterov else mean)[None]])
                if p.ndim > 1:
                    p.mul_(1 - 0.01 * 0.1)
                p.sub_(0.01 * (1.0 if p.ndim > 1 else 0.3) * v[0])
    for a, b in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def walk(gradients: list[list[Tensor]], **options: object) -> list[Tensor]:
    """Where parameters that begin at 0 are after steps along these gradients."""
    params = [nn.Parameter(torch.zeros_like(g)) for g in gradients[0]]
    optimizer = KLShampoo(params, 1.0, **options)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


def noise(steps: int, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [[torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes] for _ in range(steps)]


@pytest.mark.parametrize("power", [0.5, 0.75, 1.0])
def test_rotations_on_either_side_turn_the_steps(power):
    g = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0] for d in (5, 7))
    steps = [[a * (1 + torch.arange(7))] for (a,) in noise(30, [(5, 7)])]
    plain = walk(steps, power=power)[0]
    turned = walk([[u @ a @ v.mT] for (a,) in steps], power=power)[0]
    torch.testing.assert_close(turned, u @ plain @ v.mT, rtol=1e-8, atol=1e-8)
    assert (turned - plain).norm() > 0.1


@pytest.mark.parametrize("exponent", [-100, -50, -3, 25, 100])
@pytest.mark.parametrize(
    ("dtype", "power"), [(torch.float32, 0.5), (torch.float32, 1.0), (torch.float64, 1.0), (torch.bfloat16, 0.5)]
)
def test_a_power_of_two_that_scales_all_gradients_changes_no_digit(dtype, power, exponent):
    """Steps go with c^(1 − 2p)."""
    steps = noise(25, [(12,), (7, 5), MATRIX, (1, 8), (), (9, 40)], dtype)
    scaled = [[torch.ldexp(g, torch.tensor(exponent)).to(dtype) for g in step] for step in steps]
    back = round(exponent * (2 * power - 1))
    got = [torch.ldexp(p, torch.tensor(back)) for p in walk(scaled, power=power)]
    want = walk(steps, power=power)
    assert_equal(got, [p.to(g.dtype) for p, g in zip(want, got, strict=True)])
    assert all(p.isfinite().all() and p.any() for p in want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 8, 13])
def test_resumes_bit_for_bit_from_tensors(dtype, stop):
    data = batches(19, dtype)

    def start() -> tuple[nn.Module, KLShampoo, torch.optim.lr_scheduler.LRScheduler]:
        model = make_model(dtype)
        optimizer = KLShampoo(model.parameters(), 0.02, weight_decay=1e-2, max_axis=20)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 5)

    def go(model, optimizer, scheduler, part):
        for batch in part:
            train(model, optimizer, [batch])
            scheduler.step()

    straight = start()
    go(*straight, data)
    first = start()
    go(*first, data[:stop])
    for state in first[1].state_dict()["state"].values():
        assert all(isinstance(value, Tensor) for value in state.values())
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    resumed = start()
    for part, saved in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    go(*resumed, data[stop:])
    assert_equal(weights(resumed[0]), weights(straight[0]))
    go(*first, data[stop:])  # taking a checkpoint disturbs nothing
    assert_equal(weights(first[0]), weights(straight[0]))


SIZES = [0, 1, 2, 3, 7]


def test_the_state_of_random_shapes_survives_save_and_load():
    """Vectors, scalars, empty ones, 1 × n, up to five axes."""
    rng = random.Random(0)
    shapes: list[tuple[int, ...]] = [(), (0,), (1,), (5,), (1, 9), (9, 1), (2, 1, 3, 1, 2), (1, 1, 1, 1, 4)]
    shapes += [tuple(rng.choice(SIZES[1:]) for _ in range(rng.randrange(6))) for _ in range(22)]
    steps = noise(16, shapes, torch.float32)

    def start() -> tuple[list[nn.Parameter], KLShampoo]:
        params = [nn.Parameter(torch.zeros(s)) for s in shapes]
        return params, KLShampoo(params, 0.1, max_axis=5)

    def go(params, optimizer, part):
        for step in part:
            for p, g in zip(params, step, strict=True):
                p.grad = g
            optimizer.step()

    params, optimizer = start()
    go(params, optimizer, steps[:12])
    file = io.BytesIO()
    torch.save(([p.detach() for p in params], optimizer.state_dict()), file)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    others, resumed = start()
    with torch.no_grad():
        for p, value in zip(others, values, strict=True):
            p.copy_(value)
    resumed.load_state_dict(state)
    go(params, optimizer, steps[12:])
    go(others, resumed, steps[12:])
    assert_equal(params, others)
    assert all(p.numel() == 0 or (p.isfinite().all() and (p != 0).any()) for p in params)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alone(how):
    model = make_model()
    optimizer = KLShampoo(model.parameters(), 0.02)
    train(model, optimizer, batches(3))
    model2, optimizer2 = how((model, optimizer))
    train(model, optimizer, batches(8)[3:])
    train(model2, optimizer2, batches(8)[3:])
    assert_equal(weights(model), weights(model2))
    before = weights(model)
    train(model2, optimizer2, batches(1))
    assert_equal(weights(model), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", [0, 3, 10])
def test_a_gradient_that_is_not_finite_is_refused(bad, steps):
    """One entry of one group refuses the step of all; the steps after it are those that are taken without it."""
    data = batches(steps + 8)
    models = [make_model() for _ in range(2)]
    optimizers = [
        KLShampoo([{"params": m[:4].parameters()}, {"params": m[6].parameters()}], 0.02, weight_decay=0.1)
        for m in models
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, data[:steps])
    before = everything(models[0], optimizers[0])
    for p in models[0].parameters():
        p.grad = torch.ones_like(p)
    models[0][6].weight.grad[1, 2] = bad
    with pytest.warns(RuntimeWarning, match="KLShampoo refused a step"):
        optimizers[0].step()
    after = everything(models[0], optimizers[0])
    if steps == 0:  # there is a state now, of which all that has been seen is nothing
        before, after = before[: len(weights(models[0]))], weights(models[0])
        assert all(state["step"] == 0 and not state["momentum_buffer"].any() for state in optimizers[0].state.values())
    assert_equal(after, before)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, data[steps:])
    assert_equal(*(weights(m) for m in models))


def test_a_weight_that_waits_for_its_first_gradient_is_as_it_was_if_the_step_is_refused():
    """Its scale is set by that gradient, on a step on which no power is worked out."""
    params = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(4))]
    optimizer = KLShampoo(params, 0.1)
    for t in range(13):
        params[0].grad, params[1].grad = torch.ones(3, 4) * (t == 12), torch.ones(4)
        if t == 12:
            before = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
            params[1].grad = params[1].grad * float("nan")
            with pytest.warns(RuntimeWarning, match="refused"):
                optimizer.step()
        else:
            optimizer.step()
    assert all(torch.equal(optimizer.state[params[0]][k], v) for k, v in before.items())
    assert not params[0].any()
    params[1].grad = torch.ones(4)
    optimizer.step()
    assert params[0].isfinite().all()
    assert params[0].all()


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.filterwarnings("ignore:KLShampoo refused")
def test_no_gradient_of_any_size_makes_anything_that_is_not_finite(seed):
    rng = random.Random(seed)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    generator = torch.Generator().manual_seed(seed)
    shapes = [tuple(rng.choice([1, 2, 5, 9]) for _ in range(rng.randrange(4))) for _ in range(3)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = KLShampoo(
        params,
        10 ** rng.uniform(-8, 4),
        rng.choice([0.0, 0.9, 0.99]),
        rng.choice([0.0, 1e-2, 10.0]),
        power=rng.choice([0.1, 0.5, 1.0]),
        average=rng.choice([0.0, 0.5, 0.99]),
        damping=rng.choice([1e-8, 1e-3, 1e4]),
        update_period=rng.choice([1, 2, 5]),
        max_axis=rng.choice([2, 1024]),
        max_change=rng.choice([None, 1e-3, 1.0]),
    )
    for _ in range(14):
        exponent = rng.uniform(-45, 38)
        finite = rng.random() < 0.8
        for p in params:
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 10**exponent
            p.grad = (g * 0 if rng.random() < 0.2 else g).to(dtype)
        if not finite:
            params[1].grad = params[1].grad.clone().fill_(rng.choice([float("nan"), float("inf")]))
        finite = all(bool(p.grad.isfinite().all()) for p in params)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in params)
        assert finite or all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -0.1),
        ("lr", float("nan")),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("power", 0.0),
        ("power", 1.5),
        ("power", float("nan")),
        ("average", 1.0),
        ("average", -0.1),
        ("damping", 0.0),
        ("damping", float("inf")),
        ("update_period", 0),
        ("update_period", 2.5),
        ("max_axis", 0),
        ("vector_scale", -1.0),
        ("max_change", 0.0),
    ],
)
def test_bad_options_are_refused_by_name(name, value):
    model = make_model()
    with pytest.raises(ValueError, match=f"^{name}="):
        KLShampoo(model.parameters(), **{"lr": 0.1, name: value})
    optimizer = KLShampoo(model[0].parameters(), 0.1)
    with pytest.raises(ValueError, match=f"^{name}="):
        optimizer.add_param_group({"params": model[3].parameters(), name: value})
    assert len(optimizer.param_groups) == 1


def test_tensors_that_cannot_be_trained_are_refused_by_name():
    with pytest.raises(ValueError, match=r"parameter 'w' has the shape \(3, 0\).*leave it out"):
        KLShampoo([("w", nn.Parameter(torch.zeros(3, 0)))])
    with pytest.raises(ValueError, match="complex64"):
        KLShampoo([torch.zeros(3, 3, dtype=torch.complex64, requires_grad=True)])
    dense, sparse = nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True)
    optimizer = KLShampoo([*dense.parameters(), *sparse.parameters()], 0.1)
    dense(sparse(torch.tensor([1, 2]))).sum().backward()
    before = weights(dense)
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()
    assert_equal(weights(dense), before)
    assert not optimizer.state


def test_options_that_change_on_the_way_count_at_once_and_after_a_resumption():
    def run(resume: bool) -> list[Tensor]:
        model = make_model()
        optimizer = KLShampoo(model.parameters(), 0.02)
        for t, batch in enumerate(batches(14)):
            if t == 7:
                optimizer.param_groups[0].update(damping=0.1, average=0.5)
                if resume:
                    state = optimizer.state_dict()
                    optimizer = KLShampoo(model.parameters(), 0.02)
                    optimizer.load_state_dict(state)
            train(model, optimizer, [batch])
        optimizer.param_groups[0]["max_axis"] = 3
        with pytest.raises(ValueError, match="max_axis must stay 1024"):
            optimizer.step()
        optimizer.param_groups[0].update(max_axis=1024, power=1.0)
        with pytest.raises(ValueError, match=r"power must stay 0\.5"):
            optimizer.step()
        return weights(model)

    assert_equal(run(False), run(True))


def test_a_parameter_without_gradient_stands_still_and_can_come_back():
    model = make_model()
    optimizer = KLShampoo(model.parameters(), 0.02)
    frozen = model[0].weight
    train(model, optimizer, batches(3))
    value, state = frozen.detach().clone(), {k: v.clone() for k, v in optimizer.state[frozen].items()}
    for x, y in batches(4):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        frozen.grad = None
        optimizer.step()
    assert torch.equal(frozen, value)
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state[frozen].items())
    train(model, optimizer, batches(2))
    assert not torch.equal(frozen, value)
    assert optimizer.state[frozen]["step"] == 5
    assert optimizer.state[model[3].weight]["step"] == 9


def test_layout_and_autocast_change_no_step():
    model, other, cast = make_model(), make_model().to(memory_format=torch.channels_last), make_model()
    train(model, KLShampoo(model.parameters(), 0.02), batches(12))
    train(other, KLShampoo(other.parameters(), 0.02), batches(12))
    optimizer = KLShampoo(cast.parameters(), 0.02)
    for x, y in batches(12):
        optimizer.zero_grad()
        functional.cross_entropy(cast(x), y).backward()
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
    for a, b, c in zip(weights(model), weights(other), weights(cast), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        assert torch.equal(a, c)


def test_it_learns():
    """A badly scaled least-squares problem, which SGD at its best rate has hardly begun to solve by then."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=g) * torch.logspace(-2, 1, 8)
    y = x @ torch.randn(8, 3, generator=g)
    layer = nn.Linear(8, 3, bias=False)
    optimizer = KLShampoo(layer.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1e-2 * losses[0]
