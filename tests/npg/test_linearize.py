"""The two maps of the linearisation: who falls back and says so, what the traced program must notice, whose mode."""

import copy
import gc
import random
import warnings
import weakref
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from npg import Fisher, acceleration, families, linearize, natural_step, optim
from npg.linearize import Linearization
from npg.model import frozen_statistics
from npg.randomness import replayed_randomness
from npg.solvers import dense_solve
from tests.npg.models import Cube

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(linearize, "_told", weakref.WeakKeyDictionary())


@pytest.fixture
def check(jacobian, assert_close):
    """Both maps of a fresh linearisation equal J of the model as it is now, without a warning unless one is due."""

    def run(model: nn.Module, x: Tensor, *, warns: bool = False) -> Linearization:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            linearization = Linearization(model, x)
            J = jacobian(model(x), [p for p in model.parameters() if p.requires_grad])
            V, u = torch.randn(J.shape[1], 2), torch.randn(linearization.outputs.shape)
            block = torch.stack([u, -2 * u.sin()])
            assert_close(linearization.pull_back(block), J.T @ block.reshape(2, -1).T)
            assert_close(linearization.push_forward(V[:, 0]).reshape(-1), J @ V[:, 0])
            assert_close(linearization.push_forward(V).reshape(2, -1), (J @ V).T)
            assert_close(linearization.pull_back(u), J.T @ u.reshape(-1))
            assert_close(linearization.pull_back(block), J.T @ block.reshape(2, -1).T)
        mine = [str(w.message) for w in said if "its Fisher-vector products use" in str(w.message)]
        assert len(mine) == warns, mine
        return linearization

    return run


@pytest.fixture
def traces(monkeypatch, accelerated):
    """How many programs were traced so far."""
    count = []

    class Counting(acceleration.Program):
        def __init__(self, *arguments) -> None:
            count.append(1)
            super().__init__(*arguments)

    monkeypatch.setattr(acceleration, "Program", Counting)
    return count


# ------------------------------------------------------------------------------------------------------- the fall-back


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
    check(WithoutForwardRule(), x, warns=True)  # another network, of the same name
    check(model, torch.randn(2, 3))


class Prototypes(nn.Module):
    """Distances to learned points, as in networks of radial basis functions."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return torch.cdist(x, self.centres)


class Beside(nn.Module):
    """Prototypes whose distances are the last outputs, and small ones."""

    def __init__(self, width, scale):
        super().__init__()
        self.first, self.head, self.scale = nn.Linear(5, 3), nn.Linear(5, width), scale
        self.prototypes = Prototypes()

    def forward(self, x):
        return torch.cat([self.head(x), self.scale * self.prototypes(self.first(x))], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("width", "scale"), [(70, 1.0), (2, 1e-5)])
def test_a_small_part_and_a_late_block_are_looked_at_too(width, scale, dtype, jacobian):
    model, x = Beside(width, scale).to(dtype), torch.randn(6, 5, dtype=dtype)
    parameters = list(model.parameters())
    found = Fisher(model, x, families.Gaussian()).diagonal().split([p.numel() for p in parameters])
    expected = jacobian(model(x), parameters).square().sum(0) / len(x)
    for a, b in zip(found, expected.split([p.numel() for p in parameters]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.max()))


class WrongSlope(torch.autograd.Function):
    """3x²u, whose rule for `torch.vmap` forgets a factor."""

    @staticmethod
    def forward(u, x):
        return 3 * x**2 * u

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, u, x):
        return x**2 * u, 0


class WrongInBatches(WrongForwardRule):
    """x³ with a right jvp."""

    @staticmethod
    def backward(ctx, u):
        return WrongSlope.apply(u, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, v):
        return 1.5 * WrongForwardRule.jvp(ctx, v)


class Cubes(nn.Linear):
    def forward(self, x):
        return WrongInBatches.apply(super().forward(x))


@pytest.mark.parametrize(("make", "warns"), [(Prototypes, True), (partial(Cubes, 3, 4), False)])
def test_an_operation_that_is_batched_wrongly_is_taken_row_by_row(make, warns, check):
    check(nn.Sequential(nn.Linear(5, 3), make(), nn.Linear(4, 2)), torch.randn(6, 5), warns=warns)


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


# ------------------------------------------------------------------------------------------------- plain forward mode


def test_forward_mode_without_a_program_is_right_and_says_nothing(check):
    with acceleration.mode("off"):
        check(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).eval(), torch.randn(5, 3))
        check(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), torch.randn(2, 3, 4))
        check(Attending("branch"), torch.randn(2, 5, 3))


def test_what_cannot_be_traced_uses_plain_forward_mode_and_says_so_once(check, accelerated):
    model = Attending("branch")
    linearization = Linearization(model, torch.randn(2, 5, 3))
    with pytest.warns(
        UserWarning, match=r"no traced program for Attending \(.*\); .* plain forward mode, .* exact and"
    ):
        linearization.push_forward(torch.randn(linearization.parameters.numel))
    check(model, torch.randn(2, 5, 3))


@pytest.mark.parametrize("change", [lambda m: m.eval(), lambda m: setattr(m[1], "normalized_shape", (3,))])
def test_a_model_that_changed_between_plain_products_is_refused(change):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with acceleration.mode("off"):
        linearization = Linearization(model, torch.randn(5, 3))
        v = torch.randn(linearization.parameters.numel)
        linearization.push_forward(v)
        change(model)
        with pytest.raises(RuntimeError):
            linearization.push_forward(v)


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
    model, counts = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), []
    for batch in (5, 5, 7, 5, 7, 7, 7, 5, 7):
        check(model, torch.randn(batch, 3))
        counts.append(len(traces))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    assert counts == [1, 1, 1, 1, 1, 1, 2, 2, 2]  # another shape than the first when it has come three times in a row


def test_many_shapes_keep_few_programs(check, traces):
    model = nn.Linear(3, 2)
    for batch in range(1, 13):
        for _ in range(3):
            check(model, torch.randn(batch, 3))
    assert len(traces) == 12
    assert len(acceleration._programs.kept(model)) == 8
    check(model, torch.randn(1, 3))  # thrown out, and traced again
    assert len(traces) == 13


def test_shapes_that_change_are_served_without_a_trace_for_each(check, traces):
    """Sentences of all lengths: right products, and no more traces than pay."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 1)
    for length in (5, 2, 3, 4, 2, 3, 5, 4, 2, 5, 3, 2):
        check(model, torch.randn(2, length, 4))
    assert len(traces) == 1


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


class Graph(nn.Module):
    """A layer over a graph whose weights are a sparse buffer, with a factor that is an expanded one."""

    def __init__(self, layout):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        adjacency = (torch.rand(6, 6) > 0.6).to(torch.get_default_dtype())
        self.register_buffer("adjacency", adjacency.to_sparse(layout=layout))
        self.register_buffer("factor", torch.full((1,), 3.0).expand(2))

    def forward(self, x):
        return torch.sparse.mm(self.adjacency, self.linear(x).tanh()) * self.factor


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_and_expanded_buffers(layout, check):
    model = Graph(layout)
    before = model.adjacency.to_dense().clone()
    check(model, torch.randn(6, 3), warns=True)
    assert torch.equal(model.adjacency.to_dense(), before)
    assert model.factor.tolist() == [3.0, 3.0]


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


# --------------------------------------------------------------------------------- what cannot be differentiated twice


def cube_with(backward):
    """A network with a cube in the middle whose derivative is computed by ``backward(x, u)``."""

    class Act(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

    Act.backward = staticmethod(backward)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(Act.apply(self.a(x)))

    return Net()


def slope(ctx, u):
    (x,) = ctx.saved_tensors
    return 3 * x**2 * u


def in_numpy(ctx, u):
    (x,) = ctx.saved_tensors
    return torch.from_numpy(3 * x.detach().numpy() ** 2 * u.detach().numpy())


def partly_detached(ctx, u):
    return 0.7 * slope(ctx, u) + 0.3 * slope(ctx, u.detach())


OPAQUE = {
    "once_differentiable": once_differentiable(slope),
    "no_grad": torch.no_grad()(slope),
    "numpy": in_numpy,
    "partly detached": partly_detached,
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_a_backward_that_cannot_be_differentiated_gives_right_products(kind, check, assert_close):
    x = torch.randn(7, 3)
    model = cube_with(OPAQUE[kind])
    linearization = check(model, x, warns=True)
    v = torch.randn(linearization.parameters.numel)
    fisher = Fisher(model, x, families.Gaussian())
    assert_close(fisher @ v, fisher.dense() @ v)
    assert_close(fisher @ v, Fisher(cube_with(slope), x, families.Gaussian()) @ v)


def test_what_cannot_be_pushed_forward_is_refused_by_name(monkeypatch, assert_close):
    monkeypatch.setattr(linearize, "_ELEMENTS", 100)
    x = torch.randn(7, 3)
    model = cube_with(OPAQUE["no_grad"])
    fisher = Fisher(model, x, families.Gaussian())
    with pytest.raises(RuntimeError, match=r"Net has no products J v: .*14 outputs times 26 parameters .* a jvp"):
        fisher @ torch.randn(26)
    expected = Fisher(cube_with(slope), x, families.Gaussian())
    assert_close(fisher.dense(), expected.dense())
    assert_close(fisher.diagonal(), expected.diagonal())


def test_a_backward_that_is_not_linear_is_refused():
    class Clipped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            if h.requires_grad:
                h.register_hook(lambda g: g.clamp(-0.1, 0.1))
            return 2 * h

    with pytest.raises(RuntimeError, match="Clipped has no products J v"):
        Linearization(Clipped(3, 2), torch.randn(5, 3)).push_forward(torch.randn(8))


# ------------------------------------------------------------------------------- a backward pass that leaves things out


class Tokens(nn.Module):
    """An embedding with a row of padding, which may be the output layer too: as a module, or by its weight."""

    def __init__(self, tied: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tied, self.embedding, self.head = tied, nn.Embedding(6, 4, padding_idx=2), nn.Linear(4, 6)
        nn.init.normal_(self.embedding.weight)
        if tied == "module":
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x).sum(1).tanh()
        return functional.linear(h, self.embedding.weight) if self.tied == "weight" else self.head(h)


class Masked(nn.Module):
    """Gradients that a hook masks: of a weight, or of activations."""

    def __init__(self, which: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.which, self.a, self.b = which, nn.Linear(3, 6), nn.Linear(6, 2)
        self.mask = (torch.arange(6) % 2).double()
        if which == "weight":
            self.a.weight.register_hook(lambda g: g * self.mask.unsqueeze(-1))
        elif which == "all of a weight":
            self.a.weight.register_hook(torch.zeros_like)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if self.which == "activations" and h.requires_grad:
            h.register_hook(lambda g: g * self.mask)
        return self.b(h)


LEFT_OUT = {
    "padding": (Tokens, False),
    "padding, tied": (partial(Tokens, "module"), False),
    "padding, tied by weight": (partial(Tokens, "weight"), True),
    "weight": (partial(Masked, "weight"), True),
    "all of a weight": (partial(Masked, "all of a weight"), True),
    "activations": (partial(Masked, "activations"), True),
}


@pytest.mark.parametrize("acceleration_", ["auto", "off"])
@pytest.mark.parametrize("events", [3, 40])
@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_the_backward_pass_leaves_out_does_not_move(kind, events, acceleration_, check, jacobian, assert_close):
    make, warns = LEFT_OUT[kind]
    model, family = make(), families.Categorical()
    x = torch.randint(0, 6, (events, 5)) if kind.startswith("padding") else torch.randn(events, 3)
    with acceleration.mode(acceleration_):
        check(model, x, warns=warns)
        fisher = Fisher(model, x, family)
        J = jacobian(model(x), list(model.parameters()))
        expected = J.T @ family.metric(fisher.outputs)(J.T.reshape(-1, *fisher.outputs.shape)).flatten(1).T / events
        assert_close(fisher.dense(), expected)
        assert_close(fisher.diagonal(), expected.diagonal())
        before, labels = fisher.parameters.get(), torch.randint(0, fisher.outputs.shape[-1], (events,))
        report = optim.NGD(model, family, lr=1.0, damping=1e-2, solver="dense").step(x, labels)
    still = expected.diagonal() == 0
    assert still.any() or kind.startswith("padding, tied")
    assert report.accepted
    assert ((fisher.parameters.get() - before)[still].abs() < 1e-12).all()


# ------------------------------------------------------------------------------------------- how strict the checks are


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tensor", range(6))
@pytest.mark.parametrize("which", ["push", "pull"])
def test_an_error_of_four_per_cent_in_one_parameter_is_seen(which, tensor, dtype, monkeypatch):
    linearized = acceleration.Program.linearize

    def wrong(self, arguments):
        outputs, maps = linearized(self, arguments)

        def scaled(tensors):
            return [1.04 * t if i == tensor else t for i, t in enumerate(tensors)]

        if which == "push":
            return outputs, maps._replace(push=lambda v: maps.push(scaled(v)))
        return outputs, maps._replace(pull=lambda u: scaled(maps.pull(u)))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(17, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 6)).to(dtype)
    x = torch.randn(2048, 17, dtype=dtype)
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=dtype)
    expected = Linearization(model, x).push_forward(v)
    monkeypatch.setattr(acceleration.Program, "linearize", wrong)
    linearization = Linearization(model, x)
    with pytest.warns(UserWarning, match=r"along 0|along [0-9]\.|not the adjoint"):
        moved = linearization.push_forward(v)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("accelerated")
def test_noise_that_a_wrong_derivative_has_is_no_excuse(monkeypatch):
    linearized, draws = acceleration.Program.linearize, torch.Generator().manual_seed(0)

    def noisy(self, arguments):
        outputs, maps = linearized(self, arguments)
        return outputs, maps._replace(pull=lambda u: [t * (1 + torch.rand((), generator=draws)) for t in maps.pull(u)])

    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)
    v = torch.randn(26)
    expected = Linearization(model, x).push_forward(v)
    monkeypatch.setattr(acceleration.Program, "linearize", noisy)
    linearization = Linearization(model, x)
    with pytest.warns(UserWarning, match="its derivative along 0.weight is not that of autograd"):
        moved = linearization.push_forward(v)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


def test_a_parameter_without_any_slope_is_no_error(check):
    """A bias before BatchNorm, and one of the keys: what is recorded is rounding errors alone."""

    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(3, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)

    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    with frozen_statistics(model):
        check(model, torch.randn(6, 3))
    check(Keys(), torch.randn(2, 5, 3))


# ---------------------------------------------------------------------------------------------------------- attention


class Attending(nn.Module):
    """Attention beside what has no forward rule, or looks at values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a = kind, nn.Linear(3, 12)
        self.b = parametrizations.weight_norm(nn.Linear(4, 4)) if kind == "weight_norm" else nn.Linear(4, 4)
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.a(x).chunk(3, -1)
        h = functional.scaled_dot_product_attention(q, k, v)
        if self.kind == "branch" and float(x.sum()) != 0:
            h = h.tanh()
        h = self.b(h)
        return self.layer(h, h, h, need_weights=False)[0]


@pytest.mark.parametrize("kind", ["weight_norm", "branch"])
def test_attention_beside_what_cannot_be_traced(kind, check, accelerated):
    check(Attending(kind), torch.randn(2, 5, 3), warns=True)
    step = optim.NGD(Attending(kind), families.Gaussian(), lr=0.1).step(torch.randn(2, 5, 3), torch.randn(2, 5, 4))
    assert step.accepted


def test_attention_whose_program_is_wrong(check, monkeypatch, accelerated):
    linearized = acceleration.Program.linearize

    def wrong(self, arguments):
        outputs, maps = linearized(self, arguments)
        return outputs, maps._replace(push=lambda v: 1.01 * maps.push(v))

    monkeypatch.setattr(acceleration.Program, "linearize", wrong)
    check(Attending("plain"), torch.randn(2, 5, 3), warns=True)


# ---------------------------------------------------------------------------------------------- what changes unnoticed


class Counting(nn.Module):
    """A forward pass that moves its own buffers, by assignment and in place, and depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("passes", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.passes += 1
        return self.a(x).tanh() * self.count + self.passes


@pytest.mark.parametrize("move_statistics", [True, False])
def test_a_forward_pass_that_counts(move_statistics, jacobian, assert_close):
    model, x, v = Counting(), torch.randn(5, 3), torch.randn(8)
    for step in (1, 2, 3):
        n = step if move_statistics else 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no fall back
            linearization = Linearization(model, x, move_statistics=move_statistics)
            moved = linearization.push_forward(v)
        outputs = model.a(x).tanh() * n + n
        assert_close(linearization.outputs, outputs)
        assert_close(moved.reshape(-1), jacobian(outputs, list(model.parameters())) @ v)
        assert float(model.count) == float(model.passes[0]) == (n if move_statistics else 0)


@pytest.mark.parametrize("map_", ["push_forward", "pull_back"])
def test_parameters_changed_through_data_are_refused(map_):
    model = nn.Linear(3, 2)
    linearization = Linearization(model, torch.randn(5, 3))
    model.weight.data.mul_(2.0)
    with pytest.raises(RuntimeError, match="the parameters have changed"):
        getattr(linearization, map_)(torch.randn(8) if map_ == "push_forward" else torch.randn(5, 2))


def test_later_changes_through_data_leave_the_products_as_they_are(accelerated):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    linearization, v, u = Linearization(model, torch.randn(5, 3)), torch.randn(26), torch.randn(5, 2)
    first = linearization.push_forward(v), linearization.pull_back(u)
    for p in model.parameters():
        p.data.zero_()
    assert torch.equal(linearization.push_forward(v), first[0])
    assert torch.equal(linearization.pull_back(u), first[1])


def test_nan_parameters_have_not_changed():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    moved = Linearization(model, torch.randn(5, 3)).push_forward(torch.randn(8))
    assert torch.isnan(moved[:, 0]).all()
    assert torch.isfinite(moved[:, 1]).all()


@pytest.mark.parametrize("which", ["inputs", "frozen"])
def test_inputs_and_frozen_parameters_changed_in_place_are_refused(which):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    model[2].weight.requires_grad_(False)
    linearization = Linearization(model, x)
    linearization.push_forward(torch.randn(18))
    with torch.no_grad():
        (x if which == "inputs" else model[2].weight).mul_(2)
    with pytest.raises(RuntimeError, match="inputs or frozen parameters have changed"):
        linearization.push_forward(torch.randn(18))


@pytest.mark.parametrize("acceleration_", ["auto", "off"])
@pytest.mark.parametrize("after", ["the construction", "the first products"])
def test_what_pytorch_does_not_see_change_is_copied(after, acceleration_, assert_close):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    array, v, u = np.random.default_rng(0).normal(size=(50, 3)), torch.randn(26), torch.randn(50, 2)
    in_numpy = torch.from_numpy(array)
    with torch.inference_mode():
        in_inference = torch.tensor(array)
    expected = Linearization(model, torch.tensor(array))
    push, pull = expected.push_forward(v), expected.pull_back(u)
    with acceleration.mode(acceleration_):
        two = [Linearization(model, x) for x in (in_numpy, in_inference)]
        if after == "the first products":
            for linearization in two:
                linearization.push_forward(v)
        array *= 2
        with torch.inference_mode():
            in_inference.mul_(2)
        for linearization in two:
            assert_close(linearization.push_forward(v), push)
            assert_close(linearization.pull_back(u), pull)
            assert_close(linearization.forward(), expected.outputs)


@pytest.mark.filterwarnings("ignore:no forward mode for")
@pytest.mark.parametrize("acceleration_", ["auto", "off"])
def test_a_forward_pass_may_write_what_it_finds_to_its_inputs(acceleration_, assert_close):
    model, x, v = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), torch.randn(5, 3), torch.randn(8)
    with acceleration.mode(acceleration_):
        linearization = Linearization(model, x)
        for scale in (1.0, 2.0):
            moved = linearization.push_forward(scale * v)
            assert_close(moved, scale * (x.relu() @ v[:6].view(2, 3).T + v[6:]))


class Normalising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.shift = nn.Linear(3, 2), nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.sub_(self.shift).div_(4.0))


class Drifting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.bias.add_(1.0)
        return super().forward(x)


def test_a_forward_pass_that_writes_another_thing_to_its_inputs_is_refused():
    with pytest.raises(ValueError, match=r"forward pass of Normalising writes to its inputs .*write x = x - "):
        Linearization(Normalising(), torch.randn(5, 3))
    model = Drifting(3, 2)
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"forward pass of Drifting writes to its inputs .* or frozen parameters"):
        Linearization(model, torch.randn(5, 3))


def test_a_bound_method_is_traced_once(traces, assert_close):
    class Holder:
        def outputs(self, parameters, x):
            return (x @ parameters["w"]) ** 2

        def others(self, parameters, x):
            return (x @ parameters["w"]) ** 3

    holder, x, w, v = Holder(), torch.randn(5, 3), torch.randn(3, 2), torch.randn(6)
    for _ in range(3):
        assert_close(Linearization(holder.outputs, x, {"w": w}).push_forward(v), 2 * (x @ w) * (x @ v.view(3, 2)))
        assert_close(Linearization(holder.others, x, {"w": w}).push_forward(v), 3 * (x @ w) ** 2 * (x @ v.view(3, 2)))
    assert len(traces) == 2


# ------------------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("norm", [partial(nn.LayerNorm, 16), partial(nn.BatchNorm1d, 16), nn.Identity])
def test_products_under_autocast(norm):
    """Symmetric and positive to rounding in bfloat16; in blocks, by rows, and where autocast was left before them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), norm(), nn.GELU(), nn.Linear(16, 3)).float()
    x, family = torch.randn(20, 5, dtype=torch.float32), families.Categorical()
    exact = Fisher(model, x, family).dense()
    eye = torch.eye(len(exact), dtype=torch.float32)

    def error(matrix: Tensor, expected: Tensor = exact) -> float:
        return float((matrix - expected).norm() / exact.norm())

    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        fisher = Fisher(model, x, family)
        later = Fisher(model, x, family)
        columns, block = torch.stack([fisher @ e for e in eye], 1), fisher @ eye
        dense = Fisher(model, x, family).dense()
    assert max(error(columns), error(block), error(dense)) < 3e-2
    assert error(columns, columns.T) < 1e-2
    values = torch.linalg.eigvalsh((columns + columns.T).double())
    assert values[0] > -1e-2 * values[-1]
    assert torch.equal(later @ eye, block)


# ---------------------------------------------------------------------------------------------------------------- fuzz


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Self(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if float(x.sum()) > 0 else 1.5 * x


class Last(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[0]


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OpaqueTanh.apply(x)


class OpaqueTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, u):
        (x,) = ctx.saved_tensors
        return (1 - x.tanh() ** 2) * u


def random_network(seed: int) -> tuple[nn.Sequential, Tensor]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    width, sequence = rng.choice([4, 6]), rng.random() < 0.4
    activation = rng.choice([nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, partial(nn.Softmax, -1)])

    def linear() -> nn.Module:
        return nn.Linear(width, width)

    shared = nn.Sequential(linear(), nn.Tanh())
    parts = [
        lambda: nn.Sequential(linear(), activation()),
        lambda: nn.LayerNorm(width),
        lambda: Residual(nn.Sequential(linear(), activation())),
        lambda: parametrizations.weight_norm(linear()),
        lambda: parametrizations.spectral_norm(linear()),
        lambda: nn.Dropout(0.3),
        lambda: shared,
        Branch,
        Opaque,
        lambda: Residual(Self(width)) if sequence else nn.BatchNorm1d(width),
        lambda: Last(width) if sequence else nn.Sequential(linear(), nn.ReLU(inplace=True)),
    ]
    model = nn.Sequential(nn.Linear(3, width), *(rng.choice(parts)() for _ in range(4)), nn.Linear(width, 2))
    return model.train(rng.random() < 0.7), torch.randn(rng.choice([4, 5, 9]), *([3] if sequence else []), 3)


@pytest.mark.filterwarnings("ignore:no forward mode for")
@pytest.mark.parametrize(
    "precision", [torch.float64, *(pytest.param(x, marks=pytest.mark.slow) for x in (torch.float32, torch.bfloat16))]
)
def test_random_networks_equal_their_dense_twins(precision, jacobian):
    """Against J row by row by plain reverse mode over a forward pass of its own."""
    for seed in range(60 if precision is torch.float64 else 30):
        model, x = random_network(seed)
        if precision is not torch.float64:
            model, x = model.float(), x.float()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16)
        with autocast:
            linearization = Linearization(model, x)
            with (
                frozen_statistics(model),
                replayed_randomness(linearization.random_state, x.device),
            ):
                outputs = model(x).to(x.dtype)
        J = jacobian(outputs, list(model.parameters()))
        with autocast:
            v = torch.randn(J.shape[1], dtype=x.dtype)
            v = J.T @ (J @ v) + 0.1 * v  # where J moves something
            u = torch.randn(outputs.shape, dtype=x.dtype)
            moved, pulled = linearization.push_forward(v), linearization.pull_back(u)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}[precision]
        for mine, theirs in ((moved.reshape(-1), J @ v), (pulled, J.T @ u.reshape(-1))):
            assert (mine - theirs).norm() <= tolerance * theirs.norm().clamp(min=1e-30), (seed, model)


def test_a_model_that_is_not_to_be_traced_has_the_same_maps_without_a_word(recwarn):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    untraced = nn.Sequential(*plain)
    untraced.traceable = False
    x = torch.randn(5, 3, dtype=torch.float64)
    one, other = Linearization(plain, x), Linearization(untraced, x)
    v, u = torch.randn(one.parameters.numel, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(other.push_forward(v), one.push_forward(v), rtol=0, atol=1e-14)
    torch.testing.assert_close(other.pull_back(u), one.pull_back(u), rtol=0, atol=1e-14)
    block = torch.randn(len(v), 3, dtype=torch.float64)
    torch.testing.assert_close(other.push_forward(block), one.push_forward(block), rtol=0, atol=1e-14)
    bias = {"2.bias": untraced[2].bias}
    moved = Linearization(untraced, x, bias).push_forward(torch.ones(2, dtype=torch.float64))
    assert torch.equal(moved, torch.ones(5, 2, dtype=torch.float64))
    assert not [w for w in recwarn if "forward mode" in str(w.message)]


@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1.0, 1e6])
def test_products_in_half_precision_keep_their_digits_at_every_scale(scale):
    """Both maps are linear, and float16 has no numbers below 6e-8 and above 65,504."""
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).half()
    model, x = copy.deepcopy(twin), torch.randn(64, 5).half()
    half, whole = Linearization(model, x), Linearization(twin.double(), x.double())
    v, u = torch.randn(75), torch.randn(64, 3)
    for mine, truth, given in ((half.push_forward, whole.push_forward, v), (half.pull_back, whole.pull_back, u)):
        expected = truth(given.double())
        got = mine(scale * given).double() / scale
        assert (got - expected).norm() < 2e-3 * expected.norm()
        columns = torch.stack([given, 3 * given], 1 if given.ndim == 1 else 0)
        several = mine(scale * columns).double() / scale
        several = several.unbind(0 if given.ndim == 1 else 1)
        assert (several[1] - 3 * expected).norm() < 6e-3 * expected.norm()


def test_a_parameter_that_was_frozen_since_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    linearization = Linearization(model, torch.randn(4, 2))
    model[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"\['0\.weight', '0\.bias'\] were frozen after they were linearised here"):
        linearization.push_forward(torch.ones(12))


class Frozen(nn.Module):
    """Blocks of a fine-tuned model: nothing before the first checkpoint is trained."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 6).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x).mean(1).requires_grad_()
        for block in self.blocks:
            h = checkpoint(lambda h, block=block: block(h).tanh(), h, use_reentrant=self.reentrant)
        return self.head(h)


def test_a_reentrant_checkpoint_hides_parameters_and_is_refused(check):
    x = torch.randint(9, (8, 5))
    check(Frozen(False), x, warns=True)
    refused = pytest.raises(ValueError, match="pass use_reentrant=False")
    with refused:
        Linearization(Frozen(True), x)
    for optimizer in (optim.NGD, optim.DiagonalNGD):
        model = Frozen(True)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="pass use_reentrant=False"):
            optimizer(model, families.Categorical(), lr=0.1).step(x, torch.randint(3, (8,)))
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_cached_weights_are_refused_around_a_step_and_taken_inside_of_the_model(check):
    class Cached(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with parametrize.cached():
                return super().forward(x) + super().forward(2 * x)

    def layers():
        torch.manual_seed(0)
        return [parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), parametrizations.orthogonal(nn.Linear(5, 3))]

    x = torch.randn(6, 4)
    check(Cached(*layers()), x, warns=True)
    with parametrize.cached():
        check(nn.Sequential(nn.Linear(4, 3)), x)  # nothing in it is cached
        with pytest.raises(RuntimeError, match=r"parametrize\.cached"):
            Linearization(nn.Sequential(*layers()), x)


@pytest.mark.parametrize("mode", ["auto", "off"])
@pytest.mark.parametrize("solver", ["cg", "dense", "kfac", "diagonal"])
def test_where_the_jacobian_is_zero_products_are_zero_and_the_step_has_length_zero(mode, solver):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    nn.init.constant_(model[0].bias, -100.0)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    with acceleration.mode(mode):
        fisher = Fisher(model, x, families.Categorical())
        assert not (fisher @ torch.randn(fisher.shape[0])).any()
        report = optim.NGD(model, families.Categorical(), damping=0.1, solver=solver).step(x, y)
    assert report.accepted
    assert report.step_norm == 0


class Committee(nn.Module):
    """A sum of erf units (Saad and Solla 1995): where two are alike the gradient vanishes, and residuals do not."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x @ self.weights.T / 2**0.5).sum(-1, keepdim=True)


@pytest.mark.parametrize(("lr", "damping", "steps"), [(0.3, 0.03, 45), (1.0, 0.3, 25), (1.0, 1.0, 45), (2.0, 1.0, 25)])
def test_a_gradient_that_is_rounding_alone_makes_no_right_product_wrong(lr, damping, steps):
    """On a plateau the gradient of the step, Jᵀu, is what is left of 512 large terms that cancel."""

    def normal(*shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)

    x = normal(512, 6, seed=5)
    y = Committee(1.5 * torch.linalg.qr(normal(6, 6, seed=6)).Q[:2])(x).detach()
    model = Committee(0.1 * normal(1, 6, seed=7) + 1e-5 * normal(2, 6, seed=8))
    optimizer = optim.DiagonalNGD(model, families.Gaussian(), lr=lr, damping=damping, probes=None, momentum=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [float(optimizer.step(x, y)) for _ in range(steps)]
    assert losses[-1] < losses[0]
    loss = -families.Gaussian().log_likelihood(model(x), y).mean()
    (gradient,) = torch.autograd.grad(loss, model.parameters())
    assert gradient.norm() < 1e-3
    assert (losses[-1] - 0.5 * torch.log(torch.tensor(2 * torch.pi))) > 0.01  # the residuals do not vanish


class Repeated(nn.Module):
    """Batch normalisation inside of a checkpoint, or without one."""

    def __init__(self, repeated: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.head, self.repeated = nn.Linear(6, 3), repeated

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False) if self.repeated else self.block(x))


@pytest.mark.filterwarnings("ignore:no traced program")
@pytest.mark.parametrize(
    "options",
    [{}, {"solver": "dense"}, {"solver": "kfac"}, {"solver": "ekfac"}, {"max_kl": 0.01}, {"momentum": 0.5}, None],
)
def test_what_a_checkpoint_repeats_moves_no_statistics(options):
    x, y = torch.randn(32, 4, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 3
    states = []
    for repeated in (False, True):
        model = Repeated(repeated)
        if options is None:
            g = torch.Generator().manual_seed(2)
            optimizer = optim.DiagonalNGD(model, families.Categorical(), lr=0.01, generator=g)
        else:
            g = torch.Generator().manual_seed(2)
            optimizer = optim.NGD(model, families.Categorical(), lr=0.1, damping=0.1, generator=g, **options)
        for _ in range(3):
            optimizer.step(x, y)
        states.append(model.state_dict())
    plain, repeated = states
    assert int(plain["block.1.num_batches_tracked"]) == 3
    for name, value in plain.items():
        torch.testing.assert_close(repeated[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("acceleration_", ["auto", "off"])
def test_products_of_a_checkpointed_normalisation(check, acceleration_):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    with acceleration.mode(acceleration_):
        check(Repeated(True), x, warns=acceleration_ == "auto")


def test_a_named_tuple_is_one_input():
    torch.manual_seed(0)
    gru, rows = nn.GRU(3, 2), [torch.randn(n, 3) for n in (5, 3, 2)]

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = gru

        def forward(self, packed: nn.utils.rnn.PackedSequence) -> Tensor:
            return self.gru(packed)[1][0]

    packed = nn.utils.rnn.pack_sequence(rows)
    linearization = Linearization(Last(), packed)
    for i, sequence in enumerate(rows):
        torch.testing.assert_close(linearization.outputs[i], gru(sequence)[1][0].detach())


# ------------------------------------------------------------------------- buffers that move, and what is put elsewhere


class RunningScale(nn.Module):
    """Divides by a running mean that the same forward pass has moved in place: autograd saves the buffer."""

    def __init__(self, width: int, *, tied: bool = False) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((width,), 3.0))
        if tied:
            self.register_buffer("same", self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.scale.mul_(0.5).add_(0.5 * x.abs().mean(0))
        return x / self._buffers.get("same", self.scale)


class Steps(nn.Module):
    """Multiplies by how many passes there were, counted in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return x * self.n


MOVING = {
    "scale": lambda: RunningScale(5),
    "scale under two names": lambda: RunningScale(5, tied=True),
    "steps": Steps,
    "scale in TorchScript": lambda: torch.jit.script(_Scripted(5)),
}


class _Scripted(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((width,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(0.5).add_(0.5 * x.abs().mean(0))
        return x / self.scale


def _moving(kind: str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), MOVING[kind](), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("acceleration_", ["auto", "off"])
@pytest.mark.parametrize("kind", MOVING)
@pytest.mark.filterwarnings("ignore:no (forward mode|traced program)")
def test_a_buffer_that_moves_and_is_read_in_one_pass(kind, acceleration_, jacobian, assert_close):
    model, x = _moving(kind), torch.randn(6, 4)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    J = jacobian(model(x), list(model.parameters()))
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    with acceleration.mode(acceleration_):
        fisher = Fisher(model, x, families.Categorical())
        p = fisher.outputs.softmax(-1)
        M = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p))
        F, v = J.T @ M @ J / 6, torch.randn(J.shape[1])
        assert_close(fisher.dense(), F)
        assert_close(fisher @ v, F @ v)
        assert_close(fisher.diagonal(), F.diagonal())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class Aliased(nn.Module):
    """Moves a buffer in place, and reads it by another tensor in the same memory."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((5,), 3.0))
        if kind == "a view":
            self.register_buffer("part", self.scale[:])
        else:
            self.part = self.scale

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.5)
        return x / self.part


@pytest.mark.parametrize("kind", ["a view", "an attribute"])
def test_a_buffer_that_moves_in_memory_that_others_have_is_refused(kind):
    model = nn.Sequential(nn.Linear(4, 5), Aliased(kind))
    with pytest.raises(ValueError, match=r"writes to the buffers \['1\.scale'.*share memory.*clone\(\)"):
        Linearization(model, torch.randn(6, 4))
    assert torch.equal(model[1].scale, torch.full((5,), 3.0))


@pytest.mark.parametrize("acceleration_", ["auto", "off"])
@pytest.mark.filterwarnings("ignore:no (forward mode|traced program)")
def test_a_step_with_curvature_of_other_inputs_where_a_buffer_moves(acceleration_, jacobian, assert_close):
    x, y = torch.randn(6, 4), torch.tensor([0, 2, 0, 2, 0, 1])
    model = _moving("scale")
    twin = copy.deepcopy(model)
    parameters = list(twin.parameters())
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(-functional.cross_entropy(twin(x), y), parameters)])
    outputs = twin(x)  # the curvature's own pass goes on from the buffer that the first one left
    J, p = jacobian(outputs, parameters), outputs.detach().softmax(-1)
    F = J.T @ torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p)) @ J / 6
    s = torch.linalg.solve(F + 0.1 * torch.eye(len(F)), g)
    with acceleration.mode(acceleration_):
        report = natural_step(
            model,
            x,
            families.Categorical(),
            lambda outputs: -functional.cross_entropy(outputs, y),
            learning_rate=0.1,
            damping=0.1,
            solver=dense_solve,
            curvature_inputs=x,
        )
        assert_close(report.gradient, g)
        assert_close(report.step, 0.1 * s)
        ngd = optim.NGD(_moving("scale"), families.Categorical(), damping=0.01, curvature_fraction=0.5)
        assert ngd.step(x, y).accepted


@pytest.mark.parametrize("acceleration_", ["auto", "off"])
@pytest.mark.parametrize("used", [True, False])
def test_statistics_that_move_later_leave_the_products_as_they_are(used, acceleration_, assert_close):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x, v = torch.randn(6, 4), torch.randn(53)
    with acceleration.mode(acceleration_):
        want = Fisher(model, x, families.Categorical()) @ v
        fisher = Fisher(model, x, families.Categorical())
        if used:
            _ = fisher @ v
        model.train()(3 * x)
        model.eval()
        assert_close(fisher @ v, want)


@pytest.mark.parametrize("acceleration_", ["auto", "off"])
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("change", ["a parameter", "all by load_state_dict", "a layer"])
def test_parameters_that_are_replaced_are_noticed(change, used, acceleration_):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with acceleration.mode(acceleration_):
        fisher = Fisher(model, torch.randn(6, 4), families.Categorical())
        if used:
            _ = fisher @ torch.randn(43)
        if change == "a parameter":
            model[0].weight = nn.Parameter(torch.randn(5, 4))
        elif change == "a layer":
            model[2] = nn.Linear(5, 3)
        else:
            model.load_state_dict({k: 2 * t for k, t in model.state_dict().items()}, assign=True)
        with pytest.raises(RuntimeError, match=r"the parameters have changed .*: make a new Fisher"):
            fisher @ torch.randn(43)


def test_a_function_that_reads_past_its_mapping_is_refused():
    layer, x = nn.Linear(4, 3), torch.randn(6, 4)
    named = dict(layer.named_parameters())
    with pytest.raises(ValueError, match=r"do not depend on any .*: <lambda> reads weight, bias by itself"):
        Linearization(lambda p, z: layer(z), x, named)
    with pytest.raises(ValueError, match=r"<lambda> reads bias by itself.*functional_call\(module, p, x\)"):
        Linearization(lambda p, z: z @ p["weight"].T + layer.bias, x, named)
    head = nn.Linear(3, 2)
    layer.head = head  # which its forward pass does not use
    with pytest.raises(ValueError, match="do not depend on any trainable parameter"):
        Linearization(layer, x, {"head.weight": head.weight})


class Rewriting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.div_(self.weight.norm() / 2)
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:no (forward mode|traced program)")
def test_a_forward_pass_that_moves_its_trained_weight_is_refused_and_one_that_leaves_it_is_taken(assert_close):
    model, x = Rewriting(4, 3), torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"forward pass of Rewriting writes to its trainable parameters.*parametrize"):
        Linearization(model, x)

    class Clamped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
            return super().forward(x)

    clamped, V = Clamped(4, 3), torch.randn(15)
    clamped(x)
    assert_close(Linearization(clamped, x).push_forward(V), x @ V[:12].view(3, 4).T + V[12:])
