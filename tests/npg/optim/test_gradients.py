"""What every optimizer of `p.grad` holds: as a citizen of torch.optim, at any scale, and on what is not finite."""

import copy
import io
import pickle
import random
import re

import pytest
import torch
from torch import Tensor, nn

from npg.optim import KLShampoo, OnlineNGD

KINDS = [OnlineNGD, KLShampoo]
#: Options with which the state has more than one shape.
SMALL = {OnlineNGD: {"rank": 2}, KLShampoo: {"max_axis": 5}}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def start(kind, training):
    """``start(dtype, **options)``: the optimizer, on the small classifier."""

    def begin(dtype: torch.dtype = torch.float64, **options: object):
        return training(lambda model: kind(model.parameters(), **{"lr": 0.05} | options), dtype)

    return begin


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def assert_close(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def noise(steps: int, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [[torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes] for _ in range(steps)]


# -------------------------------------------------------------------------------------------------- saving and copying


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 8, 14])
def test_resumes_bit_for_bit_from_tensors(kind, start, dtype, stop):
    def begin():
        one = start(dtype, weight_decay=1e-2, max_change=1.0, **SMALL[kind])
        return one, torch.optim.lr_scheduler.StepLR(one.optimizer, 5)

    def go(one, scheduler, part):
        for batch in part:
            one.go([batch])
            scheduler.step()

    straight, first, resumed = begin(), begin(), begin()
    data = straight[0].batches(20, dtype)
    go(*straight, data)
    go(*first, data[:stop])
    one, scheduler = first
    for state in one.optimizer.state_dict()["state"].values():
        assert all(isinstance(value, Tensor) for value in state.values())
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (one.model, one.optimizer, scheduler)], file)
    file.seek(0)
    other, schedule = resumed
    for part, saved in zip((other.model, other.optimizer, schedule), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    go(*resumed, data[stop:])
    assert_equal(other.weights(), straight[0].weights())
    go(*first, data[stop:])  # taking a checkpoint disturbs nothing
    assert_equal(one.weights(), straight[0].weights())


SIZES = [0, 1, 2, 3, 7]


def test_the_state_of_random_shapes_survives_save_and_load(kind, walk):
    """Vectors, scalars, empty ones, 1 × n, up to five axes."""
    rng = random.Random(0)
    shapes: list[tuple[int, ...]] = [(), (0,), (1,), (5,), (1, 9), (9, 1), (2, 1, 3, 1, 2), (1, 1, 1, 1, 4)]
    shapes += [tuple(rng.choice(SIZES[1:]) for _ in range(rng.randrange(6))) for _ in range(22)]
    steps = noise(16, shapes, torch.float32)

    def begin():
        params = [nn.Parameter(torch.zeros(s)) for s in shapes]
        return params, kind(params, 0.1, **SMALL[kind])

    params, optimizer = begin()
    optimizer.step()  # no gradients at all yet
    assert not optimizer.state
    list(walk(params, optimizer, steps[:12]))
    file = io.BytesIO()
    torch.save(([p.detach() for p in params], optimizer.state_dict()), file)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    others, resumed = begin()
    with torch.no_grad():
        for p, value in zip(others, values, strict=True):
            p.copy_(value)
    resumed.load_state_dict(state)
    for here, there in zip(walk(params, optimizer, steps[12:]), walk(others, resumed, steps[12:]), strict=True):
        assert_equal(here, there)
    assert all(p.numel() == 0 or (p.isfinite().all() and (p != 0).any()) for p in params)


def test_loading_copies_the_checkpoint(start):
    one, other = start(), start()
    one.go(one.batches(3))
    saved = one.optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other.optimizer.load_state_dict(saved)
    other.go(other.batches(3))
    for i, state in kept["state"].items():
        for key, value in state.items():
            assert torch.equal(value, saved["state"][i][key])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alone(start, how):
    one, other = start(), start()
    data = one.batches(8)
    one.go(data[:3])
    other.model, other.optimizer = how((one.model, one.optimizer))
    one.go(data[3:])
    other.go(data[3:])
    assert_equal(one.weights(), other.weights())
    before = one.weights()
    other.go(data[:1])
    assert_equal(one.weights(), before)


# ------------------------------------------------------------------------------------------------- options and groups


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *(
            (kind, *bad)
            for kind in KINDS
            for bad in [
                ("lr", -0.1),
                ("lr", float("nan")),
                ("lr", None),
                ("lr", "1e-3"),
                ("momentum", 1.0),
                ("weight_decay", -1e-4),
                ("weight_decay", float("inf")),
                ("update_period", 0),
                ("update_period", 2.5),
                ("max_change", 0.0),
                ("max_change", float("inf")),
            ]
        ),
        (OnlineNGD, "alpha", -1.0),
        (OnlineNGD, "alpha", float("inf")),
        (OnlineNGD, "rank", 2.5),
        (OnlineNGD, "rank", -1),
        (OnlineNGD, "eta", 0.0),
        (OnlineNGD, "eta", 1.0),
        (KLShampoo, "power", 0.0),
        (KLShampoo, "power", 1.5),
        (KLShampoo, "power", float("nan")),
        (KLShampoo, "average", 1.0),
        (KLShampoo, "average", -0.1),
        (KLShampoo, "damping", 0.0),
        (KLShampoo, "damping", float("inf")),
        (KLShampoo, "max_axis", 0),
        (KLShampoo, "vector_scale", -1.0),
    ],
)
def test_bad_options_are_refused_by_name(kind, name, value):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    error = TypeError if value in (None, "1e-3", 2.5) else ValueError
    with pytest.raises(error, match=rf"^{name} must .*, got {value!r}"):
        kind(first.parameters(), **{"lr": 0.1, name: value})
    optimizer = kind(first.parameters(), 0.1)
    with pytest.raises(error, match=rf"^{name} must .*, got {value!r}"):
        optimizer.add_param_group({"params": second.parameters(), name: value})
    assert len(optimizer.param_groups) == 1


def test_sparse_and_complex_are_refused_before_anything_moves(kind):
    dense, sparse = nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True)
    optimizer = kind([*dense.parameters(), *sparse.parameters()], 0.1)
    dense(sparse(torch.tensor([1, 2]))).sum().backward()
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in dense.state_dict().items())
    assert not optimizer.state
    for shape in ((3,), (3, 3)):
        with pytest.raises(ValueError, match="complex64"):
            kind([torch.zeros(shape, dtype=torch.complex64, requires_grad=True)], 0.1)


CHANGES = {
    OnlineNGD: ({"alpha": 100.0, "eta": 0.5}, "rank", 80),
    KLShampoo: ({"damping": 0.1, "average": 0.5}, "max_axis", 1024),
}


def test_options_that_change_on_the_way_count_at_once_and_after_a_resumption(kind, start):
    changes, fixed, default = CHANGES[kind]

    def run(change: bool, resume: bool) -> list[Tensor]:
        one = start()
        for t, batch in enumerate(one.batches(14)):
            if t == 7 and change:
                one.optimizer.param_groups[0].update(changes)
                if resume:
                    state = one.optimizer.state_dict()
                    one.optimizer = kind(one.model.parameters(), 0.05)
                    one.optimizer.load_state_dict(state)
            one.go([batch])
        one.optimizer.param_groups[0][fixed] = 3
        with pytest.raises(ValueError, match=f"{fixed} must stay {default}"):
            one.optimizer.step()
        return one.weights()

    changed = run(True, False)
    assert_equal(changed, run(True, True))
    assert not torch.equal(changed[0], run(False, False)[0])


def test_parameter_groups_have_their_own_options(kind, training):
    def groups(model: nn.Module) -> list[dict[str, object]]:
        params = list(model.parameters())
        vectors = {"params": [p for p in params if p.ndim == 1], "lr": 0.0, **SMALL[kind]}
        return [{"params": [p for p in params if p.ndim > 1]}, vectors]

    one = training(lambda model: kind(groups(model), 0.05))
    before = one.weights()
    one.go(one.batches(3))
    assert all(torch.equal(p, old) == (p.ndim == 1) for p, old in zip(one.weights(), before, strict=True))

    # The same groups one after the other: add_param_group comes before the first step.
    late = training(lambda model: kind(groups(model)[0]["params"], 0.05))
    late.optimizer.add_param_group(groups(late.model)[1])
    late.go(late.batches(3))
    assert_equal(late.everything(), one.everything())


def test_decoupled_decay_shrinks_matrices_alone(start):
    one, plain, begun = start(weight_decay=0.5), start(), start()
    for each in (one, plain):
        each.go(each.batches(1))
    for p, q, before in zip(one.weights(), plain.weights(), begun.weights(), strict=True):
        torch.testing.assert_close(p, q - 0.025 * before if p.ndim > 1 else q)


def test_max_change_bounds_the_step_of_a_group(start):
    for limit in (1e-3, 1e3):
        one, free, begun = start(max_change=limit), start(), start()
        changes = []
        for each in (one, free):
            each.go(each.batches(1))
            changes.append(torch.cat([(a - b).flatten() for a, b in zip(each.weights(), begun.weights(), strict=True)]))
        factor = min(1.0, limit / changes[1].norm().item())
        torch.testing.assert_close(changes[0], factor * changes[1], rtol=1e-9, atol=1e-15)


# ----------------------------------------------------------------------------------------- the gradients that it takes


def test_a_parameter_without_gradient_stands_still_and_can_come_back(start):
    one = start()
    frozen = one.model[0].weight
    one.go(one.batches(3))
    value, state = frozen.detach().clone(), {k: v.clone() for k, v in one.optimizer.state[frozen].items()}
    for batch in one.batches(4):
        one.backward(*batch)
        frozen.grad = None
        one.optimizer.step()
    assert torch.equal(frozen, value)
    assert all(torch.equal(v, state[k]) for k, v in one.optimizer.state[frozen].items())
    one.go(one.batches(2))
    assert not torch.equal(frozen, value)
    assert one.optimizer.state[frozen]["step"] == 5
    assert one.optimizer.state[one.model[3].weight]["step"] == 9


def test_gradients_are_left_alone_and_may_be_accumulated(start):
    one, accumulating = start(), start()
    for each in (one, accumulating):
        each.model[1].eval()  # statistics of half a batch are not those of the whole
    for x, y in one.batches(12):
        one.go([(x, y)])
        accumulating.optimizer.zero_grad()
        for part in (slice(0, 8), slice(8, 16)):
            (0.5 * accumulating.loss(x[part], y[part])).backward()
        gradients = [p.grad.clone() for p in accumulating.model.parameters()]
        accumulating.optimizer.step()
        assert_equal([p.grad for p in accumulating.model.parameters()], gradients)
    assert_close(one.weights(), accumulating.weights(), 1e-9)


def test_closure(start):
    one = start()
    (x, y), calls = one.batches(1)[0], []

    def closure() -> Tensor:
        one.optimizer.zero_grad()
        loss = one.loss(x, y)
        loss.backward()
        calls.append(loss.item())
        return loss

    assert one.optimizer.step(closure).item() == calls[0]
    assert one.loss(x, y).item() < calls[0]


def test_grad_scaler_skips_an_overflow_and_changes_nothing_else(start):
    one, plain = start(torch.float32), start(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for t, (x, y) in enumerate(one.batches(6, torch.float32)):
        one.optimizer.zero_grad()
        scaler.scale(one.loss(x, y)).backward()
        if t == 3:
            one.model[0].weight.grad[0, 0, 0, 0] = float("inf")
        scaler.step(one.optimizer)
        scaler.update()
        if t == 3:
            with torch.no_grad():
                plain.loss(x, y)  # the forward pass moves the running statistics
        else:
            plain.go([(x, y)])
    assert scaler.get_scale() == 2.0**7
    assert_equal(one.weights(), plain.weights())


def test_bf16_autocast(start):
    one = start(torch.float32, lr=0.2)
    x, y = one.batches(1, torch.float32)[0]
    losses = []
    for _ in range(60):
        one.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = one.loss(x, y)
        loss.backward()
        one.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(state["momentum_buffer"].dtype == torch.float32 for state in one.optimizer.state.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_preconditions_in_full_precision_under_autocast(start, dtype):
    one, cast = start(dtype), start(dtype)
    one.go(one.batches(12, dtype))
    for batch in cast.batches(12, dtype):
        cast.backward(*batch)
        with torch.autocast("cpu", torch.bfloat16):
            cast.optimizer.step()
    assert_equal(one.weights(), cast.weights())


def test_channels_last_gives_the_same_step(start):
    one, other = start(), start()
    other.model.to(memory_format=torch.channels_last)
    for each in (one, other):
        each.go(each.batches(12))
    assert other.model[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(one.weights(), other.weights(), 1e-9)


# ------------------------------------------------------------------------------------ any scale, and what is not finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "options", "power"), [(OnlineNGD, {}, 1), (KLShampoo, {"power": 0.5}, 0), (KLShampoo, {"power": 1.0}, -1)]
)
def test_a_power_of_two_that_scales_all_gradients_changes_no_digit(kind, options, power, dtype, walk):
    """A constant c scales steps by this power of c: 1 for OnlineNGD, and 1 − 2p for KLShampoo."""
    shapes = [(12,), (7, 5), (6, 4, 3, 3), (1, 8), (), (9, 40)]
    steps = noise(25, shapes, dtype)

    def run(exponent: int) -> Tensor:
        """All parameters after each step, over their scale."""
        params = [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes]
        scaled = [[torch.ldexp(g, torch.tensor(exponent)).to(dtype) for g in step] for step in steps]
        path = walk(params, kind(params, 1.0, **options), scaled)
        back = torch.tensor(-power * exponent)
        return torch.stack([torch.cat([torch.ldexp(p.double(), back).flatten() for p in point]) for point in path])

    want = run(0)
    assert want.isfinite().all()
    assert want[-1].all()
    for exponent in (-100, -70, -50, -25, -3, 25, 60, 100):  # 1e-30 to 1e30
        assert torch.equal(run(exponent), want), f"gradients times 2^{exponent}"


@pytest.mark.parametrize("exponent", [-100, 0, 100])
def test_max_change_holds_at_any_scale(kind, exponent, walk):
    g = torch.ldexp(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor(exponent))
    sizes = []
    for limit in (0.5, None):
        p = nn.Parameter(torch.zeros(6, 5))
        sizes.append(float(next(walk([p], kind([p], 1.0, max_change=limit), [[g]]))[0].double().norm()))
    assert sizes[0] == pytest.approx(min(0.5, sizes[1]), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("steps", [0, 3, 10, 11])
def test_a_gradient_that_is_not_finite_is_refused(kind, training, bad, steps):
    """One entry of one group refuses the step of all; the steps after it are those that are taken without it."""

    def make(model: nn.Sequential) -> torch.optim.Optimizer:
        return kind([{"params": model[:4].parameters()}, {"params": model[6].parameters()}], 0.05, weight_decay=0.1)

    one, plain = training(make), training(make)
    data = one.batches(steps + 14)
    for each in (one, plain):
        each.go(data[:steps])
    before = one.everything()
    for p in one.model.parameters():
        p.grad = torch.ones_like(p)
    one.model[6].weight.grad[1, 2] = bad
    with pytest.warns(RuntimeWarning, match=f"{kind.__name__} refused a step"):
        one.optimizer.step()
    after = one.everything()
    if steps == 0:  # there is a state now, of which all that has been seen is nothing
        after = one.weights()
        states = one.optimizer.state.values()
        assert all(state["step"] == 0 and not state["momentum_buffer"].any() for state in states)
    assert_equal(after, before)
    for each in (one, plain):
        each.go(data[steps:])
    assert_equal(one.weights(), plain.weights())


def test_a_weight_that_waits_for_its_first_gradient_is_as_it_was_if_the_step_is_refused(kind):
    """Its scale is set by that gradient, on a step on which no power is worked out."""
    params = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(4))]
    optimizer = kind(params, 0.1)
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


RANDOM = {
    OnlineNGD: {
        "decoupled_weight_decay": [True, False],
        "alpha": [0.0, 0.1, 4.0, 1e4],
        "rank": [0, 1, 80],
        "eta": [0.01, 0.1, 0.9],
    },
    KLShampoo: {
        "power": [0.1, 0.5, 1.0],
        "average": [0.0, 0.5, 0.99],
        "damping": [1e-8, 1e-3, 1e4],
        "update_period": [1, 2, 5],
        "max_axis": [2, 1024],
    },
}


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.filterwarnings("ignore:.* refused")
def test_no_gradient_of_any_size_makes_anything_that_is_not_finite(kind, seed):
    """Random shapes, options, dtypes and scales: finite parameters for ever, and none moves on what is not finite."""
    rng = random.Random(seed)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    generator = torch.Generator().manual_seed(seed)
    shapes = [tuple(rng.choice([1, 2, 5, 9]) for _ in range(rng.randrange(4))) for _ in range(3)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = kind(
        params,
        10 ** rng.uniform(-8, 4),
        rng.choice([0.0, 0.9, 0.99]),
        rng.choice([0.0, 1e-2, 10.0]),
        max_change=rng.choice([None, 1e-3, 1.0, 1e30]),
        **{name: rng.choice(values) for name, values in RANDOM[kind].items()},
    )
    one_scale, exponent = rng.random() < 0.5, rng.uniform(-45, 38)
    for _ in range(14):
        exponent = exponent if one_scale else rng.uniform(-45, 38)
        finite = rng.random() < 0.8
        for p in params:
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 10**exponent
            p.grad = (g * 0 if rng.random() < 0.15 else g).to(dtype)
        if not finite:
            params[1].grad = params[1].grad.clone().fill_(rng.choice([float("nan"), float("inf")]))
        finite = all(bool(p.grad.isfinite().all()) for p in params)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in params)
        assert finite or all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("reset", ["clear", "replace", "momentum"])
def test_a_state_that_the_user_resets_is_not_gone_on_from(kind, start, reset):
    """With gradients of zero nothing moves then, and what is saved is what is stepped with."""
    one = start()
    one.go(one.batches(3))
    optimizer = one.optimizer
    if reset == "clear":
        optimizer.state.clear()
    elif reset == "replace":
        optimizer.state = type(optimizer.state)(dict)
    else:
        for state in optimizer.state.values():
            state["momentum_buffer"] = torch.zeros_like(state["momentum_buffer"])
    before = one.weights()
    for p in one.model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_equal(one.weights(), before)
    assert all("momentum_buffer" in state for state in optimizer.state_dict()["state"].values())
    one.go(one.batches(1))
    saved = optimizer.state_dict()["state"]
    assert all(state["momentum_buffer"].any() for state in saved.values())


def test_hooks_say_what_is_loaded_and_what_was(kind):
    """As PyTorch's documentation has it: a hook before the loading matches parameters by name, one after it edits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    saved = kind(list(model.named_parameters()), lr=0.1)
    model(torch.randn(8, 4)).square().sum().backward()
    saved.step()

    def by_name(optimizer, state_dict):
        (group,) = state_dict["param_groups"]
        state = dict(zip(group["param_names"], state_dict["state"].values()))
        names = optimizer.param_groups[0]["param_names"]
        ordered = {i: state[name] for i, name in enumerate(names)}
        return {"state": ordered, "param_groups": [{**group, "param_names": names}]}

    def halve(optimizer):
        for state in optimizer.state.values():
            state["momentum_buffer"].mul_(0.5)

    other = kind(list(model.named_parameters())[::-1], lr=0.1)
    other.register_load_state_dict_pre_hook(by_name)
    other.register_load_state_dict_post_hook(halve)
    other.load_state_dict(saved.state_dict())
    for p in model.parameters():
        assert torch.equal(other.state[p]["momentum_buffer"], saved.state[p]["momentum_buffer"] / 2)
    assert len(other._optimizer_load_state_dict_pre_hooks) == len(other._optimizer_load_state_dict_post_hooks) == 1


def test_a_group_with_a_rate_that_is_no_number_is_not_kept(kind):
    optimizer = kind([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": "0.1"})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64])
@pytest.mark.parametrize("named", [False, True])
def test_what_is_frozen_need_not_be_trainable(kind, dtype, named):
    # codes of a quantised base, tables of indices: other optimizers take such models too
    model = nn.Linear(3, 2)
    model.register_parameter("codes", nn.Parameter(torch.ones(4, dtype=dtype), requires_grad=False))
    model.register_parameter("none", nn.Parameter(torch.ones(3, 0), requires_grad=False))
    optimizer = kind(model.named_parameters() if named else model.parameters(), 0.1)
    before = model.weight.detach().clone()
    for _ in range(2):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model.weight, before)
    if dtype.is_complex:  # it can be thawed, and is then refused at its first gradient
        model.codes.requires_grad_()
        model.codes.abs().sum().backward()
        before = model.weight.detach().clone()
        place = next(i for i, (name, _) in enumerate(model.named_parameters()) if name == "codes")
        name = "codes" if named else f"params[{place}]"
        with pytest.raises(ValueError, match=rf"parameter '{re.escape(name)}' is a torch.complex64 tensor.*convert it"):
            optimizer.step()
        assert torch.equal(model.weight, before)


@pytest.mark.parametrize("option", ["lr", "weight_decay", "momentum"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:.* refused")
def test_a_rate_that_a_schedule_makes_infinite_or_nan_is_refused_and_nothing_moves(start, option, value):
    one = start()
    one.go(one.batches(3))
    before = one.everything()
    one.optimizer.param_groups[0][option] = value
    one.go(one.batches(1))
    assert_equal(one.everything(), before)


def test_a_model_that_is_converted_between_steps_is_stepped_as_a_new_optimizer_with_its_state_would(kind, start):
    live = start(torch.float32)
    live.go(live.batches(12, torch.float32))
    live.model.double()
    anew = copy.deepcopy(live.model)
    optimizer = kind(anew.parameters(), lr=0.05)
    optimizer.load_state_dict(copy.deepcopy(live.optimizer.state_dict()))
    for x, y in live.batches(3, torch.float64):
        for model, each in ((live.model, live.optimizer), (anew, optimizer)):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            each.step()
    assert_equal(live.weights(), [p.detach() for p in anew.parameters()])


@pytest.mark.filterwarnings("ignore:.* refused")
def test_a_step_that_half_precision_cannot_hold_is_refused_after_a_conversion_too(kind):
    model = nn.Linear(2, 2)
    optimizer = kind(model.parameters(), lr=1.0)
    for size in (1.0, 6e4, 6e4, 6e4):
        for p in model.parameters():
            p.grad = torch.full_like(p, size)
        if kind is KLShampoo:
            optimizer.param_groups[0]["lr"] = 1e5 * size  # its steps do not grow with the gradients
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        if size == 1.0:
            model.half()


def test_a_step_that_raises_and_is_repeated_is_the_step(kind, training, monkeypatch):
    """As after out of memory, or Ctrl-C: the factors of another group have then taken in the gradient already."""

    def begin():
        return training(lambda model: kind([{"params": [p]} for p in model.parameters()], 0.05))

    once, twice = begin(), begin()
    once.go(once.batches(5))
    data = twice.batches(5)
    twice.go(data[:3])
    eigh, calls = torch.linalg.eigh, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return eigh(*arguments, **options)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.raises(torch.OutOfMemoryError):
        twice.go(data[3:4])
    monkeypatch.undo()
    twice.go(data[3:])
    assert_equal(twice.everything(), once.everything())


@pytest.mark.parametrize(("cls", "option"), [(OnlineNGD, {"rank": 2}), (KLShampoo, {"max_axis": 3})])
def test_a_group_that_is_taken_out_leaves_the_others(cls, option):
    a, b, twin = (nn.Parameter(torch.ones(4, 5)) for _ in range(3))
    optimizer, alone = cls([{"params": [b], **option}, {"params": [a]}], lr=0.1), cls([twin], lr=0.1)
    g = torch.Generator().manual_seed(0)
    for t in range(4):
        a.grad = twin.grad = torch.randn(4, 5, generator=g)
        b.grad = torch.randn(4, 5, generator=g)
        if t == 2:
            del optimizer.param_groups[0]
        optimizer.step()
        alone.step()
    torch.testing.assert_close(a, twin, rtol=0, atol=0)


@pytest.mark.parametrize("cls", [OnlineNGD, KLShampoo])
def test_a_parameter_that_got_another_shape_is_refused_and_nothing_moves(cls):
    c, w = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(4, 6))
    optimizer = cls([c, w], lr=0.1, momentum=0.5)
    g = torch.Generator().manual_seed(0)
    for _ in range(2):
        c.grad, w.grad = torch.randn(3, 3, generator=g), torch.randn(4, 6, generator=g)
        optimizer.step()
    w.data = torch.ones(6, 4)
    c.grad, w.grad = torch.randn(3, 3, generator=g), torch.randn(6, 4, generator=g)
    before = copy.deepcopy((c.detach(), w.detach(), optimizer.state_dict()["state"]))
    with pytest.raises(
        ValueError, match=r"parameter 'params\[1\]' has the shape \(6, 4\) now.*\(4, 6\).*clear its state"
    ):
        optimizer.step()
    assert torch.equal(c, before[0])
    assert torch.equal(w, before[1])
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[2][i][key]) for key, value in state.items())
    optimizer.state[w].clear()
    optimizer.step()
    assert not torch.equal(w, before[1])
