"""OnlineNGD as a citizen of torch.optim."""

import copy
import io
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from npg.curvature.online import OnlinePreconditioner
from npg.optim import OnlineNGD


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
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


def assert_close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rank_zero_is_sgd(momentum):
    ours, theirs = make_model(), make_model()
    train(ours, OnlineNGD(ours.parameters(), 0.1, momentum, 1e-2, decoupled_weight_decay=False, rank=0), batches(20))
    train(theirs, torch.optim.SGD(theirs.parameters(), 0.1, momentum, weight_decay=1e-2), batches(20))
    assert_close(weights(ours), weights(theirs))


def test_report_settings_equal_a_loop_over_parameters():
    """L2 before preconditioning, then every axis of every parameter, then momentum."""
    model, twin = make_model(), make_model()
    optimizer = OnlineNGD(model.parameters(), 0.1, 0.9, 1e-2, decoupled_weight_decay=False)
    alone = [OnlinePreconditioner([p], [{}]) for p in twin.parameters()]
    velocity = [torch.zeros_like(p) for p in twin.parameters()]
    for t, (x, y) in enumerate(batches(25)):
        train(model, optimizer, [(x, y)])
        gradients = torch.autograd.grad(functional.cross_entropy(twin(x), y), list(twin.parameters()))
        with torch.no_grad():
            for p, g, v, precondition in zip(twin.parameters(), gradients, velocity, alone, strict=True):
                (out,) = precondition([g + 1e-2 * p], update=t < 10 or t % 4 == 0, first=t == 0)
                v.mul_(0.9).add_(out[0])
                p.sub_(0.1 * v)
    assert_close(weights(model), weights(twin), 1e-10)


def test_decoupled_decay_shrinks_matrices_alone():
    model, plain = make_model(), make_model()
    data = batches(1)
    train(model, OnlineNGD(model.parameters(), 0.1, weight_decay=0.5), data)
    train(plain, OnlineNGD(plain.parameters(), 0.1), data)
    for p, q, start in zip(weights(model), weights(plain), weights(make_model()), strict=True):
        torch.testing.assert_close(p, q - 0.05 * start if p.ndim > 1 else q)


def test_factors_are_updated_on_the_first_ten_steps_and_then_once_per_period():
    model = make_model()
    optimizer = OnlineNGD(model.parameters(), 0.01, update_period=5)
    head = next(iter(model.parameters()))
    updated = []
    for t, batch in enumerate(batches(23)):
        before = optimizer.state[head]["weight_0"].clone() if t else torch.zeros(())
        train(model, optimizer, [batch])
        if not torch.equal(before, optimizer.state[head]["weight_0"]):
            updated.append(t)
    assert updated == [*range(10), 10, 15, 20]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 7, 14])
def test_resumes_bit_for_bit_from_tensors(dtype, stop):
    data = batches(20, dtype)

    def start() -> tuple[nn.Module, OnlineNGD, torch.optim.lr_scheduler.LRScheduler]:
        model = make_model(dtype)
        optimizer = OnlineNGD(model.parameters(), 0.05, weight_decay=1e-3, max_change=1.0)
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


def test_loading_copies_the_checkpoint():
    model, other = make_model(), make_model()
    optimizer, second = (OnlineNGD(m.parameters(), 0.05) for m in (model, other))
    train(model, optimizer, batches(3))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    second.load_state_dict(saved)
    train(other, second, batches(3))
    for i, state in kept["state"].items():
        for key, value in state.items():
            assert torch.equal(value, saved["state"][i][key])


def test_deepcopy_goes_on_alone():
    model = make_model()
    optimizer = OnlineNGD(model.parameters(), 0.05)
    train(model, optimizer, batches(3))
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    train(model, optimizer, batches(8)[3:])
    train(model2, optimizer2, batches(8)[3:])
    assert_equal(weights(model), weights(model2))


def test_parameter_groups_have_their_own_options():
    def split(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        params = list(model.parameters())
        return [p for p in params if p.ndim > 1], [p for p in params if p.ndim == 1]

    model = make_model()
    matrices, vectors = split(model)
    optimizer = OnlineNGD([{"params": matrices}, {"params": vectors, "lr": 0.0, "rank": 0}], 0.05)
    before = [v.detach().clone() for v in vectors]
    train(model, optimizer, batches(3))
    assert_equal([v.detach() for v in vectors], before)
    assert "weight_0" in optimizer.state[matrices[0]]
    assert "weight_0" not in optimizer.state[vectors[0]]

    # The same groups one after the other: add_param_group comes before the first step.
    late = make_model()
    matrices, vectors = split(late)
    optimizer = OnlineNGD(matrices, 0.05)
    optimizer.add_param_group({"params": vectors, "lr": 0.0, "rank": 0})
    train(late, optimizer, batches(3))
    assert_equal(weights(late), weights(model))


def test_a_parameter_without_gradient_stands_still_and_can_come_back():
    model = make_model()
    optimizer = OnlineNGD(model.parameters(), 0.05)
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


def test_odd_shapes_and_unused_parameters():
    params = [torch.randn(()), torch.randn(0, 3), torch.randn(1), torch.randn(1, 1, 5), torch.randn(2, 2)]
    params = [p.requires_grad_() for p in params]
    optimizer = OnlineNGD(params, 0.1)
    optimizer.step()  # no gradients at all yet
    for p in params[:-1]:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        moved = (p - old).norm()
        want = 0.0 if p is params[-1] else 0.1 * p.numel() ** 0.5
        torch.testing.assert_close(moved.item(), want, rtol=1e-5, atol=1e-7)


def test_max_change_bounds_the_step_of_a_group():
    for limit in (1e-3, 1e3):
        model, free = make_model(), make_model()
        train(model, OnlineNGD(model.parameters(), 0.1, max_change=limit), batches(1))
        train(free, OnlineNGD(free.parameters(), 0.1), batches(1))

        def change(m: nn.Module) -> Tensor:
            return torch.cat([(a - b).flatten() for a, b in zip(weights(m), weights(make_model()), strict=True)])

        factor = min(1.0, limit / change(free).norm().item())
        torch.testing.assert_close(change(model), factor * change(free), rtol=1e-9, atol=1e-15)


def test_gradients_are_left_alone_and_may_be_accumulated():
    model, halves = make_model(), make_model()
    for m in (model, halves):
        m[1].eval()  # statistics of half a batch are not those of the whole
    optimizer, accumulating = OnlineNGD(model.parameters(), 0.05), OnlineNGD(halves.parameters(), 0.05)
    for x, y in batches(12):
        train(model, optimizer, [(x, y)])
        accumulating.zero_grad()
        for part in (slice(0, 8), slice(8, 16)):
            (0.5 * functional.cross_entropy(halves(x[part]), y[part])).backward()
        gradients = [p.grad.clone() for p in halves.parameters()]
        accumulating.step()
        assert_equal([p.grad for p in halves.parameters()], gradients)
    assert_close(weights(model), weights(halves), 1e-9)


def test_closure():
    model = make_model()
    optimizer = OnlineNGD(model.parameters(), 0.05)
    (x, y), calls = batches(1)[0], []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0]
    assert functional.cross_entropy(model(x), y).item() < calls[0]


def test_grad_scaler_skips_an_overflow_and_changes_nothing_else():
    model, plain = make_model(torch.float32), make_model(torch.float32)
    optimizer, reference = OnlineNGD(model.parameters(), 0.05), OnlineNGD(plain.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for t, (x, y) in enumerate(batches(6, torch.float32)):
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(model(x), y)).backward()
        if t == 3:
            model[0].weight.grad[0, 0, 0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if t == 3:
            with torch.no_grad():
                plain(x)  # the forward pass moves the running statistics
        else:
            train(plain, reference, [(x, y)])
    assert scaler.get_scale() == 2.0**7
    assert_equal(weights(model), weights(plain))


def test_bf16_autocast():
    model = make_model(torch.float32)
    optimizer = OnlineNGD(model.parameters(), 0.05)
    x, y = batches(1, torch.float32)[0]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(state["momentum_buffer"].dtype == torch.float32 for state in optimizer.state.values())


def test_channels_last_gives_the_same_step():
    model, other = make_model(), make_model().to(memory_format=torch.channels_last)
    train(model, OnlineNGD(model.parameters(), 0.05), batches(12))
    train(other, OnlineNGD(other.parameters(), 0.05), batches(12))
    assert other[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(weights(model), weights(other), 1e-9)


def everything(model: nn.Module, optimizer: OnlineNGD) -> list[Tensor]:
    state = optimizer.state_dict()["state"]
    return weights(model) + [value.clone() for i in sorted(state) for _, value in sorted(state[i].items())]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("steps", [0, 3, 11])
def test_a_gradient_that_is_not_finite_is_refused(bad, steps):
    """One entry of one group refuses the step of all; the steps after it are those that are taken without it."""
    data = batches(steps + 14)
    models = [make_model() for _ in range(2)]
    optimizers = [
        OnlineNGD([{"params": m[:4].parameters()}, {"params": m[6].parameters()}], 0.05, weight_decay=0.1)
        for m in models
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, data[:steps])
    before = everything(models[0], optimizers[0])
    for p in models[0].parameters():
        p.grad = torch.ones_like(p)
    models[0][6].weight.grad[1, 2] = bad
    with pytest.warns(RuntimeWarning, match="OnlineNGD refused a step"):
        optimizers[0].step()
    after = everything(models[0], optimizers[0])
    if steps == 0:  # there is a state now, of which all that has been seen is nothing
        before, after = before[: len(weights(models[0]))], weights(models[0])
        assert all(state["step"] == 0 and not state["momentum_buffer"].any() for state in optimizers[0].state.values())
    assert_equal(after, before)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, data[steps:])
    assert_equal(*(weights(m) for m in models))


MAX = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("options", "gradient", "momentum"),
    [
        ({}, 0.9 * MAX, 0.9 * MAX),  # μ m + ĝ
        ({"rank": 80}, torch.tensor([[MAX, MAX], [0, MAX]]), 0.0),  # ĝ has the norm of the gradient, ‖g‖ > max
        ({"lr": MAX}, 2.0, 0.0),  # lr · m
        ({"lr": 1.0, "weight_decay": 1e10}, 0.0, 0.0),  # (1 − lr · weight_decay) θ
        ({"lr": 1.0, "weight_decay": MAX, "decoupled_weight_decay": False}, 0.0, 0.0),  # weight_decay · θ
        ({"lr": 1.0}, 0.3 * MAX, 0.0),  # θ − lr · m
    ],
)
def test_a_step_to_what_is_not_finite_is_refused(options, gradient, momentum):
    p = nn.Parameter(torch.full((2, 2), -0.8 * MAX))
    optimizer = OnlineNGD([p], 0.0, rank=options.get("rank", 0))
    p.grad = torch.eye(2)
    optimizer.step()
    optimizer.param_groups[0].update(options)
    with torch.no_grad():
        p.fill_(-0.8 * MAX)
        optimizer.state[p]["momentum_buffer"].fill_(momentum)
    state = {k: v.clone() for k, v in optimizer.state[p].items()}
    p.grad = torch.zeros(2, 2) + gradient
    with pytest.warns(RuntimeWarning, match="lower lr"):
        optimizer.step()
    assert torch.equal(p, torch.full((2, 2), -0.8 * MAX))
    assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())
    optimizer.param_groups[0].update(lr=0.0, momentum=0.0, weight_decay=0.0)
    p.grad = torch.eye(2)
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


EXPONENTS = [-100, -70, -50, -25, 25, 60, 100]  # 1e-30 to 1e30


def directions(exponent: int, dtype: torch.dtype, **options: object) -> Tensor:
    """The momenta of 25 steps, divided by the scale of the gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in [(12,), (7, 5), (6, 4, 3, 3), (1, 8), (), (9, 40)]]
    optimizer = OnlineNGD(params, 0.0, **options)
    out = []
    for _ in range(25):
        for p in params:
            p.grad = torch.ldexp(torch.randn(p.shape, generator=generator), torch.tensor(exponent)).to(dtype)
        optimizer.step()
        momenta = [optimizer.state[p]["momentum_buffer"].double() for p in params]
        out.append(torch.cat([torch.ldexp(m, torch.tensor(-exponent)).flatten() for m in momenta]))
    return torch.stack(out)


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_power_of_two_that_scales_all_gradients_changes_no_digit(dtype, exponent):
    assert torch.equal(directions(exponent, dtype), directions(0, dtype))


def test_gradients_so_small_that_momenta_are_subnormal_lose_the_digits_that_these_lack():
    tiny, normal = directions(-140, torch.float32), directions(0, torch.float32)
    step = 2.0 ** (-149 + 140)  # between neighbouring subnormal numbers
    assert (tiny - normal).abs().max() < 30 * step
    assert (tiny - normal).abs().max() > 0


@pytest.mark.parametrize("exponent", [-100, 0, 100])
def test_max_change_holds_at_any_scale(exponent):
    p = nn.Parameter(torch.zeros(6, 5))
    optimizer = OnlineNGD([p], 1.0, max_change=0.5)
    p.grad = torch.ldexp(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor(exponent))
    optimizer.step()
    want = min(0.5, float(p.grad.double().norm()))
    assert float(p.detach().double().norm()) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.filterwarnings("ignore:OnlineNGD refused")
def test_no_gradient_of_any_size_makes_anything_that_is_not_finite(seed):
    """Random shapes, options, dtypes and scales: finite parameters for ever, and none moves on what is not finite."""
    rng = random.Random(seed)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    generator = torch.Generator().manual_seed(seed)
    shapes = [tuple(rng.choice([1, 2, 5, 9]) for _ in range(rng.randrange(4))) for _ in range(3)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = OnlineNGD(
        params,
        10 ** rng.uniform(-8, 4),
        rng.choice([0.0, 0.9, 0.99]),
        rng.choice([0.0, 1e-2, 10.0]),
        decoupled_weight_decay=rng.random() < 0.5,
        alpha=rng.choice([0.0, 0.1, 4.0, 1e4]),
        rank=rng.choice([0, 1, 80]),
        eta=rng.choice([0.01, 0.1, 0.9]),
        max_change=rng.choice([None, 1e-3, 1.0, 1e30]),
    )
    exponent = rng.uniform(-45, 38)
    for _ in range(12):
        finite = rng.random() < 0.8
        for p in params:
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 10**exponent
            p.grad = (g * 0 if rng.random() < 0.1 else g).to(dtype)
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
        ("alpha", -1.0),
        ("rank", 2.5),
        ("rank", -1),
        ("update_period", 0),
        ("eta", 0.0),
        ("eta", 1.0),
        ("max_change", 0.0),
        ("weight_decay", float("inf")),
        ("alpha", float("inf")),
        ("max_change", float("inf")),
    ],
)
def test_bad_options_are_refused_by_name(name, value):
    model = make_model()
    with pytest.raises(ValueError, match=name):
        OnlineNGD(model.parameters(), **{"lr": 0.1, name: value})
    optimizer = OnlineNGD(model[0].parameters(), 0.1)
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": model[3].parameters(), name: value})
    assert len(optimizer.param_groups) == 1


def test_sparse_and_complex_are_refused_before_anything_moves():
    dense, sparse = nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True)
    optimizer = OnlineNGD([*dense.parameters(), *sparse.parameters()], 0.1)
    dense(sparse(torch.tensor([1, 2]))).sum().backward()
    before = weights(dense)
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()
    assert_equal(weights(dense), before)
    with pytest.raises(ValueError, match="complex64"):
        OnlineNGD([torch.zeros(3, dtype=torch.complex64, requires_grad=True)], 0.1)


def test_options_that_change_on_the_way_count_at_once_and_after_a_resumption():
    def run(resume: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
        x, y = torch.randn(8, 5), torch.randn(8, 2)
        optimizer = OnlineNGD(model.parameters(), lr=0.1, rank=2)
        for step in range(6):
            if step == 3:
                optimizer.param_groups[0].update(alpha=100.0, eta=0.5)
                if resume:
                    state = optimizer.state_dict()
                    optimizer = OnlineNGD(model.parameters(), lr=0.1, rank=2)
                    optimizer.load_state_dict(state)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        optimizer.param_groups[0]["rank"] = 3
        with pytest.raises(ValueError, match="rank must stay 2"):
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(p, q) for p, q in zip(run(False), run(True), strict=True))


def test_it_preconditions_in_full_precision_under_autocast():
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(12, 8))
        optimizer = OnlineNGD([p], 0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(3):
                p.grad = torch.randn(12, 8)
                optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)
