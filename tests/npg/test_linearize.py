"""The two maps of the linearisation: who falls back and says so, what the traced program must notice, whose mode."""

import gc
import warnings
import weakref
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from npg import linearize
from npg.linearize import Linearization, frozen_statistics, replayed_randomness

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(linearize, "_told", set())


@pytest.fixture
def check(jacobian, assert_close):
    """Both maps of a fresh linearisation equal J of the model as it is now, without a warning unless one is due."""

    def run(model: nn.Module, x: Tensor, *, warns: bool = False) -> Linearization:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            linearization = Linearization(model, x)
            J = jacobian(model(x), [p for p in model.parameters() if p.requires_grad])
            V, u = torch.randn(J.shape[1], 2), torch.randn(linearization.outputs.shape)
            assert_close(linearization.push_forward(V[:, 0]).reshape(-1), J @ V[:, 0])
            assert_close(linearization.push_forward(V).reshape(2, -1), (J @ V).T)
            assert_close(linearization.pull_back(u), J.T @ u.reshape(-1))
            block = torch.stack([u, -2 * u.sin()])
            assert_close(linearization.pull_back(block), J.T @ block.reshape(2, -1).T)
        mine = [str(w.message) for w in said if "no forward mode" in str(w.message)]
        assert len(mine) == warns, mine
        return linearization

    return run


@pytest.fixture
def traces(monkeypatch):
    """How many programs were traced so far."""
    count = []

    class Counting(linearize.Program):
        def __init__(self, *arguments) -> None:
            count.append(1)
            super().__init__(*arguments)

    monkeypatch.setattr(linearize, "Program", Counting)
    return count


# ------------------------------------------------------------------------------------------------------- the fall-back


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, u):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * u


class WithoutForwardRule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(self.a(x))


class WrongForwardRule(torch.autograd.Function):
    """A jvp that contradicts the backward: the backward, which gives the gradient, must win."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, u):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * u

    @staticmethod
    def jvp(ctx, v):
        (x,) = ctx.saved_tensors
        return 2 * x**2 * v


def test_a_network_without_forward_mode_falls_back_and_says_so_once(check):
    model, x = WithoutForwardRule(), torch.randn(5, 3)
    check(model, x, warns=True)
    check(model, x)
    check(WithoutForwardRule(), x)
    check(model, torch.randn(2, 3))


def test_the_warning_names_model_reason_and_consequence():
    linearization = Linearization(WithoutForwardRule(), torch.randn(5, 3))
    with pytest.warns(UserWarning, match=r"no forward mode for WithoutForwardRule \(.*\); .* exact and slower"):
        linearization.push_forward(torch.randn(16))


def test_a_wrong_forward_rule_is_found_out(check):
    class Wrong(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return WrongForwardRule.apply(super().forward(x))

    check(Wrong(3, 4), torch.randn(5, 3), warns=True)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks(kind, check):
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = kind(3, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)[0]

    check(Last(), torch.randn(2, 3, 3))


# ------------------------------------------------------------------------------------- what the program must notice


class Changing(nn.Module):
    """Every way in which a network can change without its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 4)
        self.scale, self.deep, self.detached, self.tensor = 1.0, False, False, torch.tensor([1.0, 1.0, 1.0])
        self.activation = torch.tanh
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.a(x) * self.scale + self.shift) * self.tensor
        if self.deep:
            h = torch.tanh(self.a(h))
        if self.detached:
            h = h.detach() + 0.5 * (h - h.detach())  # the same outputs, half the gradient
        return self.b(h)


CHANGES = {
    "constant": lambda m: setattr(m, "scale", 1.5),
    "slightly": lambda m: setattr(m, "scale", 1.0 + 1e-6),
    "branch": lambda m: setattr(m, "deep", True),
    "gradient only": lambda m: setattr(m, "detached", True),
    "function": lambda m: setattr(m, "activation", torch.sigmoid),
    "tensor": lambda m: setattr(m, "tensor", torch.tensor([1.0, 2.0, 3.0])),
    "tensor in place": lambda m: m.tensor.mul_(2),
    "buffer": lambda m: m.shift.add_(1),
    "layer": lambda m: setattr(m, "a", nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))),
    "frozen": lambda m: m.a.weight.requires_grad_(False),
    "tied": lambda m: setattr(m.a, "bias", nn.Parameter(m.b.bias[:3].detach().clone())),
    "parameters": lambda m: [p.data.mul_(1.5) for p in m.parameters()],
    "mode": lambda m: m.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_gives_right_products(change, check):
    torch.manual_seed(0)
    model, x = Changing(), torch.randn(5, 3)
    check(model, x)
    CHANGES[change](model)
    check(model, x)


def test_changing_there_and_back(check):
    model, x = Changing(), torch.randn(5, 3)
    for _ in range(2):
        for deep in (False, True):
            model.deep = deep
            check(model, x)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_and_batchnorm_between_modes(training, check):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(6, 3)
    for mode in (training, not training, training):
        model.train(mode)
        with frozen_statistics(model):
            check(model, x)


def test_program_is_traced_once_per_shape(check, traces):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for batch in (5, 5, 7, 5, 7):
        check(model, torch.randn(batch, 3))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    assert len(traces) == 2


def test_many_shapes_keep_few_programs(check, traces):
    model = nn.Linear(3, 2)
    for batch in range(1, 13):
        check(model, torch.randn(batch, 3))
    assert len(linearize._programs[model]) <= linearize._PROGRAMS_PER_MODEL
    check(model, torch.randn(1, 3))  # thrown out, and traced again
    assert len(traces) == 13


def test_other_memory_layouts(check):
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(5, 2, 3, 3)
    check(model, x)
    check(model, x.to(memory_format=torch.channels_last))
    check(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    check(model, torch.randn(3, 3, 5, 2).permute(2, 3, 0, 1))


def test_a_model_is_not_kept_alive():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    linearization = Linearization(model, torch.randn(5, 3))
    linearization.push_forward(torch.randn(26))
    there = weakref.ref(model)
    del model, linearization
    gc.collect()
    assert there() is None


def test_callables_that_cannot_be_hashed_or_referenced(assert_close):
    @dataclass
    class Unhashable:
        power: int = 2

        def __call__(self, parameters, x):
            return (x @ parameters["w"]) ** self.power

    class Slotted:
        __slots__ = ()

        def __call__(self, parameters, x):
            return (x @ parameters["w"]) ** 2

    x, w, v = torch.randn(5, 3), torch.randn(3, 2), torch.randn(6)
    for model in (Unhashable(), Slotted(), Slotted().__call__):
        for _ in range(2):
            moved = Linearization(model, x, {"w": w}).push_forward(v)
            assert_close(moved, 2 * (x @ w) * (x @ v.view(3, 2)))


# -------------------------------------------------------------------------------------------------- stale parameters


@pytest.mark.parametrize("map_", ["push_forward", "pull_back"])
@pytest.mark.parametrize("used", [False, True])
def test_parameters_changed_in_place_are_refused(map_, used):
    model = nn.Linear(3, 2)
    linearization = Linearization(model, torch.randn(5, 3))
    argument = torch.randn(8) if map_ == "push_forward" else torch.randn(5, 2)
    if used:
        getattr(linearization, map_)(argument)
    with torch.no_grad():
        model.bias.add_(1.0)
    with pytest.raises(RuntimeError, match=r"parameters have changed since .*make a new Fisher"):
        getattr(linearization, map_)(argument)


def test_an_optimizer_step_is_seen():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    linearization = Linearization(model, torch.randn(5, 3))
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="parameters have changed"):
        linearization.push_forward(torch.randn(8))


def test_mode_changed_before_the_first_product(jacobian, assert_close):
    """The products belong to the network as it was when it was linearised."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=True), nn.Linear(4, 2))
    x = torch.randn(6, 3)
    linearization = Linearization(model, x)
    with frozen_statistics(model):
        J = jacobian(model(x), list(model.parameters()))
    model.eval()
    v = torch.randn(J.shape[1])
    with pytest.warns(UserWarning, match="a second forward pass gives other outputs than the first"):
        moved = linearization.push_forward(v)
    assert_close(moved.reshape(-1), J @ v)


# --------------------------------------------------------------------------------------------- randomness, statistics


def test_dropout_keeps_one_mask(jacobian, assert_close):
    model = nn.Sequential(nn.Linear(3, 30), nn.Dropout(0.5), nn.Linear(30, 2), nn.AlphaDropout(0.3))
    x = torch.randn(6, 3)
    linearization = Linearization(model, x)
    v, u = torch.randn(linearization.parameters.numel), torch.randn(6, 2)
    state = torch.get_rng_state()
    first = linearization.push_forward(v)
    assert torch.equal(torch.get_rng_state(), state)  # tracing draws the mask again, and gives the state back
    torch.rand(10)
    assert torch.equal(linearization.push_forward(v), first)
    torch.testing.assert_close((first * u).sum(), torch.dot(linearization.pull_back(u), v))
    state = torch.get_rng_state()
    with replayed_randomness(linearization.random_state, torch.device("cpu")):
        outputs = model(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outputs, linearization.outputs)
    assert_close(first.reshape(-1), jacobian(outputs, list(model.parameters())) @ v)
    assert not torch.equal(Linearization(model, x).outputs, linearization.outputs)  # the next step has another mask


@pytest.mark.parametrize(
    "norm",
    [
        partial(nn.BatchNorm1d, 4),
        partial(nn.BatchNorm1d, 4, momentum=None),
        partial(nn.BatchNorm1d, 4, track_running_stats=False),
        partial(nn.InstanceNorm1d, 4, track_running_stats=True),
    ],
    ids=["batch", "cumulative", "untracked", "instance"],
)
def test_running_statistics(norm):
    """They stand still, or move as one training step moves them; and the outputs are those of training."""
    norm = norm()
    model, x = nn.Sequential(nn.Conv1d(2, 4, 2), norm, nn.Flatten()), torch.randn(6, 2, 5)
    before = {name: b.clone() for name, b in model.named_buffers()}
    still = Linearization(model, x)
    still.push_forward(torch.randn(still.parameters.numel))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    moved = Linearization(model, x, move_statistics=True)
    moved.push_forward(torch.randn(moved.parameters.numel))
    by_step = {name: b.clone() for name, b in model.named_buffers()}
    model.load_state_dict({**model.state_dict(), **before})
    outputs = model(x)
    assert all(torch.equal(b, by_step[name]) for name, b in model.named_buffers())
    assert torch.equal(still.outputs, outputs)
    assert torch.equal(moved.outputs, outputs)
    assert norm.track_running_stats == (norm.running_mean is not None)


def test_statistics_are_given_back_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))
    with pytest.raises(RuntimeError, match="mine"), frozen_statistics(model):
        raise RuntimeError("mine")
    assert model[0].track_running_stats
    assert model[1].running_mean is not None


def test_random_numbers_are_given_back_after_an_error():
    torch.manual_seed(0)
    past = (torch.get_rng_state(), None)
    torch.rand(3)
    now = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="mine"), replayed_randomness(past, torch.device("cpu")):
        raise RuntimeError("mine")
    assert torch.equal(torch.get_rng_state(), now)


class Detaching(nn.Module):
    """Two outputs, the second of which may or may not pass derivatives on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.stop = nn.Linear(3, 8).double(), True

    def forward(self, x):
        h = self.layer(x).tanh()
        return torch.stack([h.mean(-1), (h.detach() if self.stop else h).std(-1)], -1)


@pytest.mark.parametrize("slope", ["of the first output alone", "zero"])
def test_a_program_is_checked_where_the_first_cotangent_is_zero(slope):
    model, x = Detaching(), torch.randn(16, 3, dtype=torch.float64)
    u = torch.zeros(16, 2, dtype=torch.float64)
    if slope != "zero":
        u[:, 0] = 1.0
    v = torch.randn(32, dtype=torch.float64)
    for stop in (True, False):
        model.stop = stop
        linearization = Linearization(model, x)
        linearization.pull_back(u)
        _, expected = torch.func.jvp(
            lambda p: torch.func.functional_call(model, p, (x,)),
            ({k: p.detach() for k, p in model.named_parameters()},),
            (linearization.parameters.named(linearization.parameters.unflatten(v)),),
        )
        torch.testing.assert_close(linearization.push_forward(v), expected)


def test_a_sum_with_zeros_that_is_written_to_is_kept():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

        def forward(self, x):
            h = self.a(x)
            out = x.new_zeros(len(x), 4)
            out += h
            out[:, 0] *= 2
            return self.b(out) + h.sum(1, keepdim=True)

    model, x = Writing(), torch.randn(5, 3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fall back to double backward
        linearization = Linearization(model, x)
        v = torch.randn(linearization.parameters.numel, dtype=torch.float64)
        moved = linearization.push_forward(v)
    _, expected = torch.func.jvp(
        lambda p: torch.func.functional_call(model, p, (x,)),
        ({k: p.detach() for k, p in model.named_parameters()},),
        (linearization.parameters.named(linearization.parameters.unflatten(v)),),
    )
    torch.testing.assert_close(moved, expected)
