"""F @ v against the matrix written out, for every kind of network × every family; and the theorems about F."""

import copy
import gc
import math
import weakref
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from npg import Fisher, conjugate_gradient, families
from npg.randomness import replayed_randomness
from tests.npg.models import Cube

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:no forward mode for"),  # test_linearize.py asks who falls back
]
QUICK = settings(max_examples=15, deadline=None, derandomize=True)


# ---------------------------------------------------------------------------------------------------------- networks


class Attention(nn.Module):
    """A sequence in, a sequence out, with PyTorch's attention module."""

    def __init__(self, size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dropout=dropout)
        self.head = nn.Linear(4, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class FusedAttention(nn.Module):
    """The fused kernel, which has no forward-mode rule."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (2, 6)).transpose(-2, -3).chunk(3, -1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.transpose(-2, -3).flatten(-2))


class Tied(nn.Module):
    """A language model whose embedding is its output layer; size is the vocabulary."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(size, 3), nn.Linear(3, 3)
        self.decoder = nn.Linear(3, size, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.hidden(self.embedding(tokens)).tanh())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU], size: int) -> None:
        super().__init__()
        self.body, self.head = kind(3, 3, batch_first=True), nn.Linear(3, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0])


class Custom(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Cube.apply(self.a(x)))


class TwoInputs(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, size), nn.Linear(2, size)

    def forward(self, x: Tensor, options: dict, power: int = 1) -> Tensor:
        return (self.a(x) * self.b(options["y"])) ** power + options["shift"]


class Odd(nn.Module):
    """A scalar parameter, one that is not used, one that is used twice, and a frozen one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, size)
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.b.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x).tanh())) * self.temperature.exp()


def convolution(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 2, 2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2, size),
    )


def norms(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 2),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.GroupNorm(2, 4),
        nn.Softplus(),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Linear(12, size),
    )


def encoder(size: int) -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, dropout=0.2), nn.Linear(4, size))


VECTORS, SEQUENCES = (6, 3), (3, 2, 4)
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], object], bool]] = {
    # name: (network of so many outputs, its inputs, training mode)
    "mlp": (
        lambda size: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, size)),
        lambda _: torch.randn(VECTORS),
        True,
    ),
    "conv_batchnorm": (convolution, lambda _: torch.randn(5, 2, 3, 3), True),
    "conv_batchnorm_eval": (convolution, lambda _: torch.randn(5, 2, 3, 3), False),
    "other_norms": (norms, lambda _: torch.randn(4, 2, 4), True),
    "attention": (Attention, lambda _: torch.randn(SEQUENCES), True),
    "attention_eval": (Attention, lambda _: torch.randn(SEQUENCES), False),
    "attention_dropout": (lambda size: Attention(size, 0.3), lambda _: torch.randn(SEQUENCES), True),
    "fused_attention": (FusedAttention, lambda _: torch.randn(SEQUENCES), True),
    "fused_attention_eval": (FusedAttention, lambda _: torch.randn(SEQUENCES), False),
    "encoder": (encoder, lambda _: torch.randn(SEQUENCES), True),
    "encoder_eval": (encoder, lambda _: torch.randn(SEQUENCES), False),
    "tied": (Tied, lambda size: torch.randint(size, (3, 2)), True),
    "lstm": (lambda size: Recurrent(nn.LSTM, size), lambda _: torch.randn(3, 2, 3), True),
    "gru": (lambda size: Recurrent(nn.GRU, size), lambda _: torch.randn(3, 2, 3), True),
    "custom_function": (Custom, lambda _: torch.randn(VECTORS), True),
    "dropout": (
        lambda size: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, size)),
        lambda _: torch.randn(VECTORS),
        True,
    ),
    "several_inputs": (
        TwoInputs,
        lambda _: (torch.randn(VECTORS), {"y": torch.randn(6, 2), "shift": 0.1}, 2),
        True,
    ),
    "odd_parameters": (Odd, lambda _: torch.randn(VECTORS), True),
}


def network(name: str, size: int) -> tuple[nn.Module, object]:
    build, inputs, training = NETWORKS[name]
    torch.manual_seed(len(name))
    model = build(size)
    with torch.no_grad():
        for buffer in model.buffers():  # running statistics that differ from those of the batch
            if buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand_like(buffer))
        for p in model.parameters():  # norms start as the identity, which hides mistakes
            p.add_(0.2 * torch.randn_like(p))
    return model.train(training), inputs(size)


@cache
def shared(name: str, size: int) -> tuple[nn.Module, object]:
    """The same for several tests, which leave it as it is: its traced program is then shared as well."""
    return network(name, size)


def call(model: nn.Module, inputs: object) -> Tensor:
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@pytest.fixture
def twin(jacobian, dense_metric):
    """J and F of a network on its own: the same random numbers, and running statistics put back."""

    def build(fisher: Fisher, model: nn.Module, inputs: object, case: SimpleNamespace) -> tuple[Tensor, Tensor]:
        statistics = [b.clone() for b in model.buffers()]
        with replayed_randomness(fisher.linearization.random_state, torch.device("cpu")):
            outputs = call(model, inputs)
        J = jacobian(outputs, [p for p in model.parameters() if p.requires_grad])
        for buffer, value in zip(model.buffers(), statistics):
            if model.training:
                buffer.copy_(value)
        M = dense_metric(case, outputs)
        return J, J.T @ M @ J / (outputs.numel() // case.size)

    return build


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_its_dense_twin(name, case, twin, assert_close):
    """Vector, block, quadratic, dense and diagonal against JᵀMJ/N, with M from the textbook."""
    model, inputs = shared(name, case.size)
    fisher = Fisher(model, inputs, case.family)
    _, F = twin(fisher, model, inputs, case)
    assert fisher.shape == F.shape
    V = torch.randn(len(F), 3)
    assert_close(fisher @ V[:, 0], F @ V[:, 0])
    assert_close(fisher @ V, F @ V)
    assert_close(fisher @ V[:, :1], F @ V[:, :1])
    assert_close(fisher.quadratic(V[:, 0]), V[:, 0] @ F @ V[:, 0])
    assert_close(fisher.quadratic(V), (V * (F @ V)).sum(0))
    assert_close(fisher.dense(), F)
    assert_close(fisher.diagonal(), F.diagonal())


@pytest.mark.parametrize("events", [2, 40])
def test_dense_by_rows_and_by_columns_are_one(mlp, every_family, events, twin, assert_close):
    """Fewer outputs than parameters, and more, take two ways; more than one chunk of each."""
    case = every_family["categorical"]
    model, x = mlp(4), torch.randn(events, 3)
    fisher = Fisher(model, x, case.family)
    _, F = twin(fisher, model, x, case)
    assert (events * 4 < len(F)) == (events == 2)
    assert_close(fisher.dense(), F)
    assert_close(fisher.diagonal(), F.diagonal())


@pytest.mark.parametrize("events", [2, 40])
def test_dense_takes_the_cheaper_of_the_two_ways(mlp, every_family, events, monkeypatch):
    """min(P, events·D) columns of either map."""
    fisher = Fisher(mlp(4), torch.randn(events, 3), every_family["categorical"].family)
    columns, pull_back = [], fisher.linearization.pull_back
    outputs = fisher.outputs

    def counting(u: torch.Tensor) -> torch.Tensor:
        columns.append(u.numel() // outputs.numel())
        return pull_back(u)

    monkeypatch.setattr(fisher.linearization, "pull_back", counting)
    fisher.dense()
    assert sum(columns) == min(fisher.shape[0], outputs.numel())


def test_chunks(every_family, twin, assert_close):
    case = every_family["gaussian"]
    torch.manual_seed(0)
    wide, x = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 4)), torch.randn(50, 3)
    for inputs in (x.repeat(2, 1), x):
        fisher = Fisher(wide, inputs, case.family)
        _, F = twin(fisher, wide, inputs, case)
        assert_close(fisher.dense(), F)
        assert_close(fisher.diagonal(), F.diagonal())


# ------------------------------------------------------------------------------------------- other kinds of parameters


def test_function_of_parameters(mlp, every_family, twin, assert_close):
    case = every_family["categorical"]
    model, x = mlp(4), torch.randn(5, 3)
    parameters = dict(model.named_parameters())

    def forward(p, inputs):
        return functional_call(model, dict(p), (inputs,))

    fisher = Fisher(forward, x, case.family, parameters=parameters)
    _, F = twin(fisher, model, x, case)
    V = torch.randn(len(F), 2)
    assert_close(fisher @ V, F @ V)
    assert_close(fisher.dense(), F)
    plain = {"w": torch.randn(3, 4)}  # tensors that do not require a gradient will do
    fisher = Fisher(lambda p, inputs: inputs @ p["w"], x, families.Gaussian(), parameters=plain)
    assert_close(fisher.dense(), torch.kron(x.T @ x / 5, torch.eye(4)))
    assert not plain["w"].requires_grad


def test_some_parameters_of_a_module(mlp, every_family, twin, assert_close):
    case = every_family["categorical"]
    model, x = mlp(4), torch.randn(5, 3)
    _, F = twin(Fisher(model, x, case.family), model, x, case)
    chosen = {name: p for name, p in model.named_parameters() if name.startswith("2.")}
    for parameters in (chosen, {name: p.detach() for name, p in chosen.items()}):
        fisher = Fisher(model, x, case.family, parameters=parameters)
        assert_close(fisher.dense(), F[-20:, -20:])
        v = torch.randn(20)
        assert_close(fisher @ v, F[-20:, -20:] @ v)


def test_frozen_parameters_can_still_be_asked_for(mlp, every_family, twin, assert_close):
    case = every_family["categorical"]
    model, x = mlp(4), torch.randn(5, 3)
    _, F = twin(Fisher(model, x, case.family), model, x, case)
    model.requires_grad_(False)
    fisher = Fisher(model, x, case.family, parameters=dict(model.named_parameters()))
    v = torch.randn(len(F))
    assert_close(fisher @ v, F @ v)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm", "fused_attention", "tied", "lstm"])
def test_float32_and_bfloat16(name, every_family, twin, assert_close):
    case = every_family["categorical"]
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = network(name, 4)
        low = inputs.to(dtype) if inputs.is_floating_point() else inputs
        model.to(dtype)
        try:
            fisher = Fisher(model, low, case.family)
            v = torch.randn(fisher.shape[0]).to(torch.float32)
            moved = fisher @ v
        except RuntimeError:
            assert (name, dtype) == ("lstm", torch.bfloat16)  # PyTorch itself cannot differentiate it twice
            continue
        assert moved.dtype is fisher.dtype is torch.float32
        assert fisher.outputs.dtype is torch.float32
        # the twin at the rounded parameters and inputs
        exact = low.double() if low.is_floating_point() else low
        _, F = twin(fisher, model.double(), exact, case)
        assert_close(moved, (F @ v.double()).float(), dtype=dtype)


def test_autocast(mlp, every_family, twin, assert_close):
    case = every_family["categorical"]
    model, x = mlp(4).float(), torch.randn(5, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fisher = Fisher(model, x, case.family)
        v = torch.randn(fisher.shape[0], dtype=torch.float32)
        moved = fisher @ v
    _, F = twin(Fisher(model.double(), x.double(), case.family), model, x.double(), case)
    assert moved.dtype is torch.float32
    assert_close(moved, (F @ v.double()).float(), dtype=torch.bfloat16)


# ---------------------------------------------------------------------------------------------- sampled and empirical


@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm", "tied", "lstm", "odd_parameters"])
def test_empirical_and_sampled_equal_their_twins(name, case, twin, assert_close):
    """(1/NS) Σ JᵀggᵀJ with the scores g of the labels, and the same labels for every product."""
    model, inputs = shared(name, case.size)
    exact = Fisher(model, inputs, case.family)
    J, _ = twin(exact, model, inputs, case)
    labels = [case.family.sample(exact.outputs) for _ in range(3)]
    empirical = Fisher(model, inputs, case.family, kind="empirical", targets=labels[0])
    generator = torch.Generator().manual_seed(5)
    sampled = Fisher(model, inputs, case.family, kind="sampled", samples=3, generator=generator)
    generator.manual_seed(5)
    drawn = [case.family.sample(sampled.outputs, generator) for _ in range(3)]
    for fisher, ys in ((empirical, labels[:1]), (sampled, drawn)):
        J_events = J.reshape(-1, case.size, J.shape[1])
        rows = [
            torch.einsum("nd,ndp->np", case.family.score(fisher.outputs, y).reshape(-1, case.size), J_events)
            for y in ys
        ]
        G = torch.cat(rows)
        F = G.T @ G / len(G)
        V = torch.randn(len(F), 3)
        assert_close(fisher @ V[:, 0], F @ V[:, 0])
        assert_close(fisher @ V, F @ V)
        assert_close(fisher.quadratic(V), (V * (F @ V)).sum(0))
        assert_close(fisher.dense(), F)
        assert_close(fisher.diagonal(), F.diagonal())
        scores, u = (
            torch.stack(list(several)).reshape(len(ys), -1, case.size)
            for several in ((case.family.score(fisher.outputs, y) for y in ys), fisher.factor_vectors(None))
        )
        blocks = torch.einsum("sni,snj->nij", scores, scores) / len(ys)
        assert_close(torch.einsum("kni,knj->nij", u, u), blocks)  # within every event
        assert len(list(fisher.factor_vectors())) == 1


def within_five_errors(draws: Tensor, expected: Tensor) -> None:
    """The mean of independent draws is within five of its standard errors."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() <= 5 * error + 1e-12).all()
    # and the error is small enough for this to mean something
    assert error.norm() < 0.2 * expected.norm()


def test_one_label_per_event_is_drawn_unless_more_are_asked_for(mlp):
    """As many rank-one terms as labels."""
    model, x, family = mlp(4), torch.randn(3, 3), families.Categorical()
    one, more = (
        Fisher(model, x, family, kind="sampled", generator=torch.Generator().manual_seed(0), **options).dense()
        for options in ({}, {"samples": 8})
    )
    assert torch.linalg.matrix_rank(one) == 3
    assert torch.linalg.matrix_rank(more) > 3


@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm"])
def test_sampled_is_exact_in_expectation(name, case):
    model, inputs = shared(name, case.size)
    exact = Fisher(model, inputs, case.family)
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(exact.shape[0], 2)
    draws = torch.stack(
        [
            Fisher(
                model,
                inputs,
                case.family,
                kind="sampled",
                samples=10,
                generator=generator,
                linearization=exact.linearization,
            )
            @ V
            for _ in range(50)
        ]
    )
    within_five_errors(draws, exact @ V)


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm"])
def test_probed_diagonal_is_unbiased(name, kind, every_family):
    """Also through BatchNorm, where one event's output depends on all the others' inputs."""
    case = every_family["categorical"]
    model, inputs = network(name, case.size)
    options = {
        "exact": {},
        "sampled": {"samples": 2, "generator": torch.Generator().manual_seed(1)},
        "empirical": {"targets": torch.randint(4, (len(inputs),))},
    }[kind]
    fisher = Fisher(model, inputs, case.family, kind=kind, **options)
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    draws = torch.stack([fisher.diagonal(probes=1, generator=generator) for _ in range(800)])
    assert torch.equal(torch.get_rng_state(), state)
    within_five_errors(draws, fisher.diagonal())
    generator.manual_seed(0)
    torch.testing.assert_close(fisher.diagonal(probes=800, generator=generator), draws.mean(0))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_diagonal_in_other_coordinates(kind, every_family):
    """diag(LFLᵀ), exact and by probes, for an L that mixes all coordinates."""
    case = every_family["categorical"]
    model, inputs = network("conv_batchnorm", case.size)
    targets = torch.randint(4, (len(inputs),)) if kind == "empirical" else None
    fisher = Fisher(model, inputs, case.family, kind=kind, targets=targets)
    mix = torch.randn(fisher.shape, dtype=fisher.dtype) / fisher.shape[0] ** 0.5
    want = (mix @ fisher.dense() @ mix.T).diagonal()

    def root(v: torch.Tensor) -> torch.Tensor:
        return mix @ v

    torch.testing.assert_close(fisher.diagonal(root=root), want, rtol=1e-10, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([fisher.diagonal(probes=1, generator=generator, root=root) for _ in range(800)])
    within_five_errors(draws, want)


# ----------------------------------------------------------------------------------------------------------- theorems


@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm", "attention"])
def test_fisher_is_the_expected_outer_product_and_minus_the_expected_hessian(name, assert_close):
    """F = E[∇log p ∇log pᵀ] = −E[∇² log p] over the model's labels, enumerated; the first where events are independent.

    The second holds per event as well as through BatchNorm, since E[∇_η log p] = 0 kills the curvature of the network.
    """
    model, x = network(name, 3)
    fisher = Fisher(model, x, families.Categorical())
    F = fisher.dense()
    theta = dict(model.named_parameters())
    vector = fisher.parameters.get()
    events = fisher.events
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def log_p(v: Tensor) -> Tensor:
        parts = v.split(fisher.parameters.sizes)
        state = {name: part.view(p.shape) for part, (name, p) in zip(parts, theta.items())}
        state |= {name: b.clone() for name, b in buffers.items()}
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(model, state, (x,)).log_softmax(-1)

    p = log_p(vector).exp().detach().reshape(events, 3)
    expected = -hessian(lambda v: (p * log_p(v).reshape(events, 3)).sum() / events)(vector)
    assert_close(expected, F)
    if name != "conv_batchnorm":
        gradients = torch.func.jacrev(log_p)(vector).reshape(events, 3, -1)
        assert_close(torch.einsum("nc,nci,ncj->ij", p, gradients, gradients) / events, F)


@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm", "attention", "tied"])
def test_kl_is_half_the_quadratic_form_to_third_order(name, case):
    """KL(θ‖θ+d) = ½dᵀFd + O(|d|³): the logarithm of the error falls with slope three."""
    model, inputs = network(name, case.size)
    model.double()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.forward = functional.softplus  # a kink is not differentiable thrice
    fisher = Fisher(model, inputs, case.family)
    theta, origin = fisher.parameters, fisher.parameters.copy()
    d = torch.randn(theta.numel)
    d /= d.norm()
    half = 0.5 * fisher.quadratic(d)
    old = fisher.outputs
    lengths = [0.04 * 2**-i for i in range(5)]
    errors = []
    for t in lengths:
        theta.move(origin, d, t)
        with torch.no_grad():
            kl = case.family.kl(old, call(model, inputs)).mean()
        errors.append((kl - half * t**2).abs())
    x, y = torch.tensor(lengths).log(), torch.stack(errors).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert 2.7 < slope < 4.3  # four where the third order happens to vanish


@QUICK
@given(
    seed=st.integers(0, 2**16),
    name=st.sampled_from(["mlp", "conv_batchnorm", "attention", "tied"]),
    family=st.sampled_from(["categorical", "bernoulli", "diagonal_gaussian", "beta"]),
)
def test_symmetric_positive_and_linear(every_family, seed, name, family):
    case = every_family[family]
    model, inputs = shared(name, case.size)
    fisher = Fisher(model, inputs, case.family)
    v, w = torch.randn(2, fisher.shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Fv, Fw = fisher @ v, fisher @ w
    scale = Fv.norm() * w.norm() + Fw.norm() * v.norm()
    assert (torch.dot(w, Fv) - torch.dot(v, Fw)).abs() <= 1e-12 * scale
    assert torch.dot(v, Fv) >= 0
    assert (fisher @ (2.5 * v - w) - 2.5 * Fv + Fw).norm() <= 1e-12 * (Fv.norm() + Fw.norm())


@QUICK
@given(seed=st.integers(0, 2**16), cut=st.sampled_from([1, 6]))
def test_permuting_and_splitting_the_batch(seed, cut):
    model, _ = shared("mlp", 4)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    whole = Fisher(model, x, families.Categorical())
    v = torch.randn(whole.shape[0], generator=generator, dtype=torch.float64)
    shuffled = Fisher(model, x[torch.randperm(12, generator=generator)], families.Categorical())
    torch.testing.assert_close(shuffled @ v, whole @ v, rtol=1e-10, atol=1e-14)
    parts = [Fisher(model, part, families.Categorical()) for part in (x[:cut], x[cut:])]
    mixed = (cut * (parts[0] @ v) + (12 - cut) * (parts[1] @ v)) / 12
    torch.testing.assert_close(mixed, whole @ v, rtol=1e-10, atol=1e-14)


def test_a_mean_over_every_axis_but_the_last(mlp, assert_close):
    model, x = mlp(4), torch.randn(2, 3, 5, 3)
    fisher, flat = (Fisher(model, inputs, families.Categorical()) for inputs in (x, x.reshape(-1, 3)))
    assert fisher.events == flat.events == 30
    v = torch.randn(fisher.shape[0])
    assert_close(fisher @ v, flat @ v)
    assert_close(fisher @ v.expand(2, -1).T, (flat @ v).expand(2, -1).T)


# ------------------------------------------------------------------------------------------------------ other metrics


def test_another_metric_on_the_outputs(mlp, jacobian, assert_close):
    model, x = mlp(3), torch.randn(5, 3)
    J = jacobian(model(x), list(model.parameters()))
    identity = Fisher(model, x, families.Categorical(), metric=lambda outputs: lambda u: u)
    assert_close(identity.dense(), J.T @ J / 5)
    assert_close(identity.diagonal(), (J.T @ J / 5).diagonal())
    weighted = Fisher(model, x, families.Categorical(), metric=lambda outputs: lambda u: outputs.exp() * u)
    W = torch.diag(model(x).detach().exp().reshape(-1))
    V = torch.randn(J.shape[1], 2)
    assert_close(weighted @ V, J.T @ W @ J @ V / 5)
    root = torch.rand(J.shape[1]) + 0.5
    assert_close(weighted.diagonal(root=lambda v: root * v), root**2 * (J.T @ W @ J / 5).diagonal())
    draws = weighted.diagonal(probes=4000, generator=torch.Generator().manual_seed(0))
    assert_close(draws, weighted.diagonal(), scale=0.1 / 1e-10)  # the standard error is about 2 %


# -------------------------------------------------------------------------------------------------------------- SciPy


def test_scipy_solves_with_it(mlp, assert_close):
    sparse = pytest.importorskip("scipy.sparse.linalg")
    model, x = mlp(4), torch.randn(40, 3)
    fisher = Fisher(model, x, families.Categorical())
    F, b = fisher.dense(), torch.randn(fisher.shape[0])
    operator = fisher.to_scipy()
    assert operator.shape == fisher.shape
    assert operator.dtype == "float64"
    block = torch.randn(fisher.shape[0], 2)
    assert_close(torch.from_numpy(operator @ block.numpy()), F @ block)
    assert_close(torch.from_numpy(operator.T @ b.numpy()), F @ b)
    damped = operator + sparse.aslinearoperator(0.1 * torch.eye(len(b)).numpy())
    x_scipy, info = sparse.cg(damped, b.numpy(), rtol=1e-12)
    assert info == 0
    x = torch.linalg.solve(F + 0.1 * torch.eye(len(b)), b)
    assert_close(torch.from_numpy(x_scipy), x, scale=10)
    assert_close(conjugate_gradient(fisher, b, damping=0.1, rtol=1e-12).x, x, scale=10)


def test_scipy_from_float32(mlp):
    model = mlp(4).float()
    fisher = Fisher(model, torch.randn(5, 3, dtype=torch.float32), families.Categorical())
    v = torch.randn(fisher.shape[0]).numpy()
    assert (fisher.to_scipy() @ v).dtype == "float64"


# ------------------------------------------------------------------------------------------------- nothing is disturbed


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_of_the_model_is_disturbed(name, every_family):
    """Parameters, gradients, running statistics, modes and hooks; and random numbers by one forward pass at most."""
    case = every_family["categorical"]
    model, inputs = shared(name, case.size)
    values = [t.clone() for t in (*model.parameters(), *model.buffers())]
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    torch.manual_seed(3)
    with torch.no_grad():
        statistics = [b.clone() for b in model.buffers()]
        call(model, inputs)
        if model.training:
            for b, value in zip(model.buffers(), statistics):
                b.copy_(value)
    after_one_forward = torch.get_rng_state()
    torch.manual_seed(3)
    fisher = Fisher(model, inputs, case.family)
    V = torch.randn(fisher.shape[0], 2, generator=torch.Generator().manual_seed(0))
    first = fisher @ V
    fisher @ V[:, 0]
    fisher.dense()
    fisher.diagonal()
    conjugate_gradient(fisher, V[:, 1], damping=0.1, max_iterations=5)
    assert torch.equal(torch.get_rng_state(), after_one_forward)
    assert all(torch.equal(t, value) for t, value in zip((*model.parameters(), *model.buffers()), values))
    assert all(p.grad is None for p in model.parameters())
    assert modes == [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    torch.rand(7)  # a dropout mask is drawn once for all products, whatever else is drawn in between
    assert torch.equal(fisher @ V, first)


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
def test_its_memory_is_given_back_with_the_last_reference(mlp, kind):
    x, family = torch.randn(5, 3), families.Categorical()
    model = mlp(3)
    y = {"targets": torch.zeros(5, dtype=torch.long)} if kind == "empirical" else {}
    Fisher(model, x, family, kind=kind, **y) @ torch.ones(sum(p.numel() for p in model.parameters()))  # traces
    gc.disable()  # what is left to the garbage collector waits for it, on a GPU too
    try:
        fisher = Fisher(model, x, family, kind=kind, **y)
        fisher @ torch.ones(fisher.shape[0])
        alive = weakref.ref(fisher.linearization)
        del fisher
        assert alive() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_vectors_are_refused(mlp):
    fisher = Fisher(mlp(4), torch.randn(5, 3), families.Categorical())
    P = fisher.shape[0]
    for bad in (torch.zeros(P - 1), torch.zeros(P + 1), torch.zeros(1, P), torch.zeros(())):
        with pytest.raises(ValueError, match=rf"vector must have shape \({P},\) or \({P}, K\).*got"):
            fisher @ bad
        with pytest.raises(ValueError, match="vector must have shape"):
            fisher.quadratic(bad)
    assert (fisher @ torch.zeros(P, 0)).shape == (P, 0)  # no column is a number of columns
    elsewhere = torch.zeros(P, device="meta")
    for product in (fisher.__matmul__, fisher.quadratic):
        with pytest.raises(ValueError, match="must be on cpu, where the parameters are, got it on meta"):
            product(elsewhere)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "type-2"}, "kind must be 'exact', 'sampled' or 'empirical', got 'type-2'"),
        ({"kind": "empirical"}, "targets must be given for kind='empirical'"),
        ({"targets": torch.zeros(5)}, "targets must be given for kind='empirical', and only for it"),
        ({"kind": "sampled", "samples": 0}, "samples must be at least 1, got 0"),
        ({"kind": "sampled", "metric": lambda outputs: lambda u: u}, "metric .* goes with kind='exact' only"),
        ({"kind": "empirical", "targets": torch.zeros(4)}, r"targets must have shape \(5,\)"),
    ],
)
def test_bad_arguments_are_named(mlp, options, match):
    with pytest.raises(ValueError, match=match):
        Fisher(mlp(4), torch.randn(5, 3), families.Categorical(), **options)


def test_bad_models_are_refused(mlp):
    x, family = torch.randn(5, 3), families.Categorical()
    with pytest.raises(ValueError, match="no trainable parameter"):
        Fisher(mlp(4).requires_grad_(False), x, family)
    with pytest.raises(ValueError, match="at least one event"):
        Fisher(mlp(4), torch.randn(0, 3), family)
    with pytest.raises(ValueError, match="parameters must be given for a model that is a function"):
        Fisher(lambda p, inputs: inputs, x, family)
    with pytest.raises(ValueError, match="do not depend on any trainable parameter"):
        Fisher(lambda p, inputs: inputs * 1.0, x, family, parameters={"w": torch.zeros(2)})
    with pytest.raises(TypeError, match=r"model must return one floating-point tensor.*got tuple: wrap it in a module"):
        Fisher(nn.LSTM(3, 3), x, family)
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        Fisher(mlp(4), x, family).diagonal(probes=0)


def test_repr_says_what_it_is(mlp):
    fisher = Fisher(mlp(4), torch.randn(5, 3), families.Categorical())
    assert repr(fisher) == "Fisher(36 parameters, 5 events, FisherRao(family=Categorical()))"
    assert fisher.device == torch.device("cpu")


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
@pytest.mark.parametrize("name", ["categorical", "diagonal_gaussian", "beta"])
def test_outputs_that_are_not_finite_have_products_that_are_not(kind, name, mlp, every_family):
    """A refused step, not an exception from drawing labels."""
    family, model, x = every_family[name].family, mlp(4), torch.randn(5, 3)
    targets = family.sample(model(x).detach()) if kind == "empirical" else None
    x[2, 1] = torch.nan
    fisher = Fisher(model, x, family, kind=kind, targets=targets)
    assert torch.isnan(fisher @ torch.randn(fisher.shape[0])).all()


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("axes", [(5,), (5, 2)])
def test_one_output_that_is_not_finite_takes_its_event_out_of_the_numbers(kind, bad, axes, mlp):
    """All of the event, whichever output it is: the matrix shows it as the products do."""
    model, x, family = mlp(4), torch.randn(*axes, 3), families.Categorical()
    shift = torch.zeros(*axes, 4)
    shift[2, ..., 1] = bad

    def broken(parameters, x):
        return torch.func.functional_call(model, parameters, x) + shift

    fisher = Fisher(
        broken,
        x,
        family,
        kind=kind,
        targets=torch.zeros(axes, dtype=torch.long) if kind == "empirical" else None,
        parameters=dict(model.named_parameters()),
    )
    assert torch.isnan(fisher @ torch.randn(fisher.shape[0])).all()
    assert torch.isnan(fisher.dense()).all()


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_a_forbidden_class_leaves_the_products_finite(kind, mlp):
    model, x, family = mlp(4), torch.randn(5, 3), families.Categorical()

    def masked(parameters, x):
        logits = torch.func.functional_call(model, parameters, x)
        return logits.masked_fill(torch.tensor([False, False, True, False]), -torch.inf)

    fisher = Fisher(
        masked,
        x,
        family,
        kind=kind,
        targets=torch.zeros(5, dtype=torch.long) if kind == "empirical" else None,
        parameters=dict(model.named_parameters()),
    )
    product = fisher @ torch.randn(fisher.shape[0])
    assert torch.isfinite(product).all()
    assert product.abs().max() > 0


def test_a_metric_that_is_not_symmetric_has_no_dense_matrix():
    skew = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    model, x = nn.Linear(3, 2), torch.randn(40, 3)
    with pytest.raises(ValueError, match=r"F is not symmetric: its halves differ by .*Check that the metric"):
        Fisher(model, x, families.Gaussian(), metric=lambda outputs: lambda u: u @ skew.T).dense()


def test_products_are_differentiable_in_the_vector(assert_close):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    fisher = Fisher(model, torch.randn(5, 3, dtype=torch.float64), families.Categorical())
    F = fisher.dense()
    v, w = (torch.randn(len(F), dtype=torch.float64, requires_grad=True) for _ in range(2))
    V, c = torch.randn(len(F), 3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    assert_close(torch.autograd.grad(0.5 * fisher.quadratic(v), v)[0], F @ v.detach())
    assert_close(torch.autograd.grad(w @ (fisher @ v), v)[0], F @ w.detach())
    assert_close(torch.autograd.grad(fisher.quadratic(V) @ c, V)[0], 2 * F @ V.detach() * c)
    assert_close(torch.func.hessian(lambda x: 0.5 * fisher.quadratic(x))(v.detach()), F)
    assert torch.autograd.gradgradcheck(lambda x: (fisher @ x) ** 3, (v,))


def test_the_penalty_of_elastic_weight_consolidation_pulls_back(assert_close):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    old = copy.deepcopy(model)
    fisher = Fisher(old, torch.randn(5, 3, dtype=torch.float64), families.Categorical())
    origin = torch.nn.utils.parameters_to_vector(old.parameters()).detach()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    moved = torch.nn.utils.parameters_to_vector(model.parameters()) - origin
    (0.5 * fisher.quadratic(moved)).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert_close(gradient, fisher.dense() @ moved.detach())
