"""Models as people bring them: outputs in shared memory, tied and sharded parameters, caches, adapters in bfloat16."""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from npg import Fisher, KroneckerFisher, TrustRegion, families, natural_step
from npg.linearize import Linearization
from npg.optim import NGD, DiagonalNGD
from npg.parameters import Parameters

pytestmark = pytest.mark.usefixtures("double")
CATEGORICAL = families.Categorical()


# ------------------------------------------------------------------------------ outputs in the memory of something else


class Bandit(nn.Module):
    """One distribution for all events: a view of the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.1, 0.2, -0.3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), 3)


class Table(nn.Module):
    """A distribution for each event: a slice of the parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[: len(x)]


class Preallocated(nn.Module):
    """Each forward pass writes its outputs into the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.out = nn.Linear(4, 3), torch.zeros(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.out = self.out.detach()
        self.out.copy_(self.linear(x))
        return self.out


@pytest.mark.filterwarnings("ignore:no forward mode for Preallocated")
@pytest.mark.parametrize("make", [Bandit, Table, Preallocated])
@pytest.mark.parametrize("max_kl", [0.02, 0.5])
def test_the_kl_is_the_true_one_though_outputs_share_memory(make: Callable[[], nn.Module], max_kl: float) -> None:
    model = make()
    torch.manual_seed(1)
    x, y = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 2, 0])
    before = model(x).detach().clone()
    report = NGD(model, CATEGORICAL, damping=1e-3, lr=100.0, max_kl=max_kl).step(x, y)
    true = float(CATEGORICAL.kl(before, model(x).detach()).mean())
    assert report.accepted
    assert 0 < report.kl <= max_kl
    assert report.kl == pytest.approx(true, rel=1e-12)


def test_the_same_of_a_function_that_returns_its_parameter() -> None:
    w = torch.tensor([0.1, 0.2, -0.3])
    before = w.clone()
    report = natural_step(
        lambda p: p["w"],
        (),
        CATEGORICAL,
        lambda o: o.log_softmax(-1)[0],
        trust_region=TrustRegion(0.1),
        damping=1e-3,
        parameters={"w": w},
    )
    assert 0 < report.kl <= 0.1
    assert report.kl == pytest.approx(float(CATEGORICAL.kl(before, w)), rel=1e-12)


def test_the_outputs_of_a_fisher_stay() -> None:
    model = Bandit()
    fisher, logits = Fisher(model, torch.zeros(6, 1), CATEGORICAL), model.logits.detach().clone()
    model.logits.data += 1
    assert torch.equal(fisher.outputs, logits.expand(6, 3))


# ----------------------------------------------------------------------------------------- parameters that share memory


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(3, 4)
        self.decoder.weight = nn.Parameter(self.encoder.weight.data.t())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).tanh())


@pytest.mark.parametrize("optimizer", [NGD, DiagonalNGD])
def test_a_transpose_of_the_same_memory_is_refused(optimizer: type) -> None:
    with pytest.raises(ValueError, match=r"\['encoder.weight', 'decoder.weight'\] share memory.*F\.linear"):
        optimizer(Autoencoder(), families.Gaussian(), lr=0.1).step(torch.randn(5, 4), torch.randn(5, 4))


@pytest.mark.parametrize("lone", [True, False])
def test_memory_that_is_shared_is_refused_and_memory_that_is_divided_is_not(lone: bool) -> None:
    w = torch.randn(4, 6)
    shared = [
        {"a": w, "b": w},
        {"a": w, "b": w[1:3]},
        {"a": w[:, :4], "b": w[:, 3:]},
        {"a": w.view(torch.int64).view(torch.float32), "b": w},
    ]
    alone = [{"a": torch.zeros(1).expand(3)}, {"a": torch.zeros(5).as_strided((3, 3), (1, 1))}]
    for named in alone if lone else shared:
        with pytest.raises(ValueError, match="share memory"):
            Parameters(named)
    divided = [
        {"a": w[:2], "b": w[2:]},
        {"a": w[:, :4], "b": w[:, 4:]},  # between each other
        {"a": w[::2], "b": w[1::2], "c": torch.zeros(0, 3), "d": torch.zeros(())},
        {"a": w.t()},
        {"a": w.as_strided((2, 2), (3, 2))},
        {"a": torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)},
    ]
    for named in divided:
        assert Parameters(named).numel == sum(p.numel() for p in named.values())


def test_memory_of_one_array_is_seen_through_two_tensors() -> None:
    array = np.zeros((3, 4))
    with pytest.raises(ValueError, match=r"\['a', 'b'\] share memory"):
        Parameters({"a": torch.from_numpy(array), "b": torch.from_numpy(array.T)})


def test_stand_ins_of_torch_func_and_lazy_parameters_have_no_memory_yet() -> None:
    w = torch.randn(3)
    doubled = torch.func.grad(lambda w: Parameters({"w": w}).flatten([w * 2]).sum())(w)
    assert torch.equal(doubled, torch.full((3,), 2.0))
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"parameter '1\.weight' has no shape yet"):
        NGD(model, CATEGORICAL, lr=0.1).step(torch.randn(6, 4), torch.zeros(6, dtype=torch.long))


def test_statistics_beside_parameters_in_one_memory_are_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    tensors = [*model.parameters(), model[1].running_mean, model[1].running_var]
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.data = part.view(tensor.shape)
    before = flat.clone()
    calls = iter(range(9))

    def objective(outputs: Tensor) -> Tensor:
        if next(calls) == 1:
            raise KeyError
        return outputs.log_softmax(-1)[:, 0].mean()

    with pytest.raises(KeyError):
        natural_step(model, torch.randn(8, 4), CATEGORICAL, objective, trust_region=TrustRegion(0.01), damping=0.1)
    assert next(calls) == 2
    assert torch.equal(flat, before)


class Gate(nn.Module):
    """Its own parameter may be its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.head = nn.Parameter(torch.randn(16, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x * self.w).tanh())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_input_in_a_parameters_memory_stays_where_it_was(requires_grad: bool) -> None:
    reports = []
    for copied in (False, True):
        model = Gate()
        x = model.w.detach().clone() if copied else model.w.detach()
        x.requires_grad_(requires_grad)
        reports.append(
            natural_step(
                model,
                x,
                CATEGORICAL,
                lambda o: o.log_softmax(-1)[:, 0].mean(),
                trust_region=TrustRegion(0.01),
                damping=1e-2,
            )
        )
    assert reports[0].accepted
    assert reports[0].kl == pytest.approx(reports[1].kl, rel=1e-12)
    assert reports[0].actual_gain == pytest.approx(reports[1].actual_gain, rel=1e-12)


def test_a_step_of_divided_memory_is_that_of_separate_tensors() -> None:
    flat = torch.randn(16)
    views = {"w": flat[:12].view(3, 4), "b": flat[12:15]}
    copies = {name: p.clone() for name, p in views.items()}
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    for named in (views, copies):
        natural_step(
            lambda p, x: functional.linear(x, p["w"], p["b"]),
            x,
            CATEGORICAL,
            lambda o: CATEGORICAL.log_likelihood(o, y).mean(),
            learning_rate=0.3,
            damping=0.1,
            parameters=named,
        )
    assert all(torch.equal(views[name], copies[name]) for name in views)


def test_a_buffer_that_views_a_parameter_moves_with_it(classifier_: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = classifier_
    twin = deepcopy(model)
    model.register_buffer("reference", model[0].weight.data)
    reports = [NGD(m, CATEGORICAL, damping=0.1, lr=1.0, max_kl=0.05).step(x, y) for m in (model, twin)]
    assert reports[0].accepted
    assert reports[0].kl == reports[1].kl > 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert torch.equal(model.get_buffer("reference"), model[0].weight)


@pytest.fixture
def classifier_() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.randn(8, 4), torch.randint(0, 3, (8,))


# -------------------------------------------------------------------------------------------------- what is no function


def test_inputs_that_the_parameters_compute_are_refused(assert_close: Callable[..., None]) -> None:
    encoder, head = nn.Linear(4, 5), nn.Linear(5, 3)
    model, x = nn.ModuleDict({"encoder": encoder, "head": head}), torch.randn(6, 4)
    model.forward = lambda z: head(z)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"inputs are computed by encoder.bias, encoder.weight.*inputs.detach\(\)"):
        Fisher(model, encoder(x).tanh(), CATEGORICAL)
    of_others = Fisher(head, encoder(x).tanh(), CATEGORICAL)  # an encoder that is not trained here is a constant
    assert_close(of_others.dense(), Fisher(head, encoder(x).tanh().detach(), CATEGORICAL).dense())


class Teacher(nn.Module):
    """A frozen average of the student, which the forward pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(4, 3)
        self.teacher = deepcopy(self.student).requires_grad_(False)

    @torch.no_grad()
    def follow(self) -> None:
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.follow()
        return self.student(x)


def test_frozen_parameters_that_the_forward_pass_moves_are_named_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"writes to its inputs .* or frozen parameters.*register_buffer"):
        Fisher(Teacher(), torch.randn(6, 4), CATEGORICAL)


class Rotary(nn.Module):
    """A cache of positions, made anew for a longer sequence; its length is written down beside it."""

    def __init__(self, begin: str, persistent: bool) -> None:
        super().__init__()
        self.head, self.persistent, self.length = nn.Linear(4, 3), persistent, 0
        self.register_buffer("cache", None, persistent=persistent)
        if begin == "short":
            self.grow(2)

    def grow(self, length: int) -> None:
        self.length = length
        self.register_buffer("cache", torch.arange(length).sin(), persistent=self.persistent)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.length:
            self.grow(x.shape[1])
        return self.head(x + self.cache[: x.shape[1], None])


class Remembers(nn.Module):
    """A state that grows from pass to pass."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(0, 4), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.detach().mean(0, keepdim=True)])
        return self.head(x + self.seen.sum(0))


@pytest.mark.filterwarnings("ignore:no forward mode for")
@pytest.mark.parametrize("begin", ["short", "none"])
@pytest.mark.parametrize("persistent", [True, False])
def test_a_cache_is_as_long_as_the_model_believes(
    begin: str, persistent: bool, assert_close: Callable[..., None]
) -> None:
    torch.manual_seed(0)
    x, y, model = torch.randn(3, 5, 4), torch.randint(0, 3, (3, 5)), Rotary(begin, persistent)
    twin = deepcopy(model)
    twin(x)  # whose cache is long enough
    assert_close(Fisher(model, x, CATEGORICAL).dense(), Fisher(twin, x, CATEGORICAL).dense())
    assert model.length == (2 if begin == "short" else 0)  # as before
    reports = [NGD(m, CATEGORICAL, damping=0.1, max_kl=0.05).step(x, y) for m in (model, twin)]
    assert reports[0].accepted
    assert reports[0].kl == pytest.approx(reports[1].kl, rel=1e-9)
    assert model.length == len(model.cache) == 5
    assert_close(model(x), twin(x))


@pytest.mark.filterwarnings("ignore:no forward mode for")
@pytest.mark.parametrize("persistent", [True, False])
def test_a_state_that_grows_moves_by_one_pass_in_a_step(persistent: bool) -> None:
    torch.manual_seed(0)
    model, seen = Remembers(persistent), []
    optimizer = NGD(model, CATEGORICAL, damping=0.1, max_kl=0.05)
    for _ in range(3):
        x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
        before = deepcopy(model)
        old = before(x).detach()
        report = optimizer.step(x, y)
        seen.append(x.mean(0))
        torch.testing.assert_close(model.seen, torch.stack(seen))
        after = deepcopy(model)
        after.seen = model.seen[:-1]
        assert report.kl == pytest.approx(float(CATEGORICAL.kl(old, after(x).detach()).mean()), rel=1e-9)


# ------------------------------------------------------------------------------------------------- modules of all kinds


def scripted() -> nn.Module:
    return torch.jit.script(nn.BatchNorm1d(4))


@pytest.mark.filterwarnings(
    "ignore:no forward mode for", "ignore:`torch.jit.*is deprecated", "ignore::DeprecationWarning"
)
def test_a_scripted_normalisation_leaves_the_others_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), scripted(), nn.Linear(4, 3))
    plain = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    plain.load_state_dict(model.state_dict())
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    for _ in range(2):
        reports = [NGD(m, CATEGORICAL, damping=0.1, max_kl=0.05).step(x, y) for m in (model, plain)]
        assert reports[0].kl == pytest.approx(reports[1].kl, rel=1e-9)
    assert model[0].track_running_stats is True
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings(
    "ignore:no forward mode for", "ignore:`torch.jit.*is deprecated", "ignore::DeprecationWarning"
)
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.jit.script])
def test_wrapped_models_take_the_step_of_what_they_wrap(
    wrap: Callable[[nn.Module], nn.Module], classifier_: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, x, y = classifier_
    twin = deepcopy(model)
    reports = [NGD(m, CATEGORICAL, damping=0.1, lr=1.0, max_kl=0.05).step(x, y) for m in (wrap(model), twin)]
    assert reports[0].accepted
    assert reports[0].kl == pytest.approx(reports[1].kl, rel=1e-9)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------- dropout of strided tensors


class Encoder(nn.Module):
    """Dropout of tensors that are not contiguous, whose mask functorch would draw in another order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.dropout(self.first(x).relu(), 0.3, self.training).flatten(1))


@pytest.mark.parametrize("kind", ["transformer", "channels last"])
def test_dropout_of_a_strided_tensor_is_one_mask_for_the_whole_step(kind: str) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(5, 6, 8), torch.randint(0, 3, (5, 6))
    model: nn.Module = Encoder()
    if kind == "channels last":
        x, y = torch.randn(8, 3, 8, 8).contiguous(memory_format=torch.channels_last), torch.randint(0, 3, (8,))
        model = Images()
    before, state = deepcopy(model), torch.get_rng_state()
    with pytest.warns(UserWarning, match="torch.func draws other random numbers there") as said:
        reports = [NGD(model, CATEGORICAL, damping=0.1, max_kl=0.01).step(x, y)]
    assert not any("register_buffer" in str(warning.message) for warning in said)
    assert reports[0].accepted
    after = torch.get_rng_state()
    outputs = []
    for m in (before, model):
        torch.set_rng_state(state)
        outputs.append(m(x).detach())
    assert torch.equal(torch.get_rng_state(), after)
    assert reports[0].kl == pytest.approx(float(CATEGORICAL.kl(*outputs).mean()), rel=1e-10)


# ------------------------------------------------------------------------------------ low precision inside of the model


class Adapter(nn.Module):
    """Trained in float32, before and beside a frozen backbone in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.prompt = nn.Linear(16, 16, dtype=torch.float32)
        backbone = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3))
        self.backbone = backbone.requires_grad_(False).bfloat16()
        self.low_rank = nn.Linear(16, 3, bias=False, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(self.prompt(x).bfloat16()).float() + self.low_rank(x)


class Autocast(nn.Module):
    """Autocast inside of the forward pass, where no caller sees it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 3)).float()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layers(x)


@pytest.mark.parametrize("make", [Adapter, Autocast])
def test_bfloat16_inside_a_float32_model_has_the_products_of_its_own_derivatives(
    make: Callable[[], nn.Module], jacobian: Callable[[Tensor, list[Tensor]], Tensor]
) -> None:
    model = make()
    torch.manual_seed(1)
    x, y = torch.randn(64, 16, dtype=torch.float32), torch.randint(0, 3, (64,))
    linearization = Linearization(model, x)
    assert linearization.precision == torch.finfo(torch.bfloat16).eps
    J = jacobian(model(x), [p for p in model.parameters() if p.requires_grad]).double()
    v = torch.randn(J.shape[1], dtype=torch.float32)
    expected = J @ v.double()
    error = (linearization.push_forward(v).double().flatten() - expected).norm() / expected.norm()
    assert float(error) < 0.02
    report = NGD(model, CATEGORICAL, damping=0.1, max_kl=0.01).step(x, y)
    assert report.accepted
    assert 0 < report.kl <= 0.01


def test_a_float32_model_is_compared_as_float32() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).float()
    assert Linearization(model, torch.randn(6, 4, dtype=torch.float32)).precision == torch.finfo(torch.float32).eps


# -------------------------------------------------------------------------------------------- refused by name, or small


def test_parameters_of_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"parameter 'weight' was made in torch\.inference_mode"):
        Fisher(model, torch.randn(6, 4), CATEGORICAL)


def test_a_curvature_in_inference_mode_is_refused(classifier_: tuple[nn.Module, Tensor, Tensor]) -> None:
    fisher = Fisher(*classifier_[:2], CATEGORICAL)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.* records no derivatives"):
        KroneckerFisher(fisher)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_events_without_components_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(6, 0\).*is empty"):
        Fisher(nn.Linear(4, 0), torch.randn(6, 4), CATEGORICAL)


def test_no_columns_have_no_quadratic_forms(classifier_: tuple[nn.Module, Tensor, Tensor]) -> None:
    fisher = Fisher(*classifier_[:2], CATEGORICAL)
    assert fisher.quadratic(torch.zeros(fisher.shape[0], 0)).shape == (0,)


def test_a_rate_that_is_a_tensor_gives_a_report_of_numbers(classifier_: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = classifier_
    report = natural_step(
        model,
        x,
        CATEGORICAL,
        lambda o: CATEGORICAL.log_likelihood(o, y).mean(),
        learning_rate=torch.tensor(0.5),  # type: ignore[arg-type]
        damping=0.1,
    )
    assert {type(v) for v in (report.scale, report.predicted_kl, report.predicted_gain, report.step_norm)} == {float}
    assert report.scale == 0.5
