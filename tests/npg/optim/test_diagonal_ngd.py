"""DiagonalNGD against diagonals that are written out sample by sample."""

import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from npg import Fisher, families
from npg.curvature.online import OnlinePreconditioner
from npg.optim import DiagonalNGD

KINDS = ["exact", "sampled", "empirical"]


def make_model(norm: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).to(dtype)


def batches(steps: int, n: int = 12, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 5, generator=g).to(dtype), torch.randint(3, (n,), generator=g)) for _ in range(steps)]


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def flat_gradient(value: Tensor, model: nn.Module) -> Tensor:
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in gradients])


def diagonal(model: nn.Module, x: Tensor, y: Tensor, kind: str) -> Tensor:
    """The mean of squared per-sample scores: of the labels, or expected under the model."""
    logp = model(x).log_softmax(-1)
    total = torch.zeros_like(vector(model))
    for n in range(len(x)):
        for label in range(3):
            weight = float(y[n] == label) if kind == "empirical" else logp[n, label].exp().item()
            if weight:
                total += weight * flat_gradient(logp[n, label], model).square() / len(x)
    return total


def options(**changes: object) -> dict[str, object]:
    return {"lr": 0.1, "damping": 0.01, "decay": 0.0, "momentum": 0.0, **changes}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_step_with_the_whole_diagonal(kind, norm):
    model = make_model(norm)
    optimizer = DiagonalNGD(model, families.Categorical(), fisher=kind, probes=None, **options())
    for x, y in batches(4):
        before = vector(model)
        loss = functional.cross_entropy(model(x), y)
        g, f = flat_gradient(loss, model), diagonal(model, x, y, kind)
        torch.testing.assert_close(optimizer.step(x, y), loss)
        torch.testing.assert_close(vector(model), before - 0.1 * g / (f + 0.01), rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_probes_are_unbiased(kind, norm):
    """With lr = 0 and decay close to 1 the state averages the estimates of one fixed diagonal."""
    model = make_model(norm)
    ((x, y),) = batches(1)
    optimizer = DiagonalNGD(
        model, families.Categorical(), fisher=kind, probes=10, **options(lr=0.0, decay=0.9999),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    steps = 400
    for _ in range(steps):
        optimizer.step(x, y)
    state = [optimizer.state[p]["fisher"].flatten() for p in model.parameters()]
    estimate = torch.cat(state) / (1 - 0.9999**steps)
    want = diagonal(model, x, y, kind)
    # 4000 draws with a relative spread of about √2 each, more for sampled labels: the standard error is about 2 %.
    assert ((estimate - want).abs() <= 0.15 * want + 1e-12).all()
    assert abs(float(estimate.sum() / want.sum()) - 1) < 0.03


def test_empirical_diagonal_is_not_the_squared_mean_gradient():
    model = make_model()
    ((x, y),) = batches(1, n=60)
    optimizer = DiagonalNGD(model, families.Categorical(), fisher="empirical", probes=None, **options(lr=0.0))
    optimizer.step(x, y)
    f = torch.cat([optimizer.state[p]["fisher"].flatten() for p in model.parameters()])
    adam = flat_gradient(functional.cross_entropy(model(x), y), model).square()
    assert (f >= adam).all(), "Jensen"
    assert f.sum() > 5 * adam.sum()


def test_average_momentum_and_decay():
    model, twin = make_model(), make_model()
    optimizer = DiagonalNGD(
        model, families.Categorical(), probes=None, **options(decay=0.9, momentum=0.8, weight_decay=0.5)
    )
    v = m = torch.zeros_like(vector(twin))
    for t, (x, y) in enumerate(batches(6), start=1):
        optimizer.step(x, y)
        v = 0.9 * v + 0.1 * diagonal(twin, x, y, "exact")
        g = flat_gradient(functional.cross_entropy(twin(x), y), twin)
        m = 0.8 * m + g / (v / (1 - 0.9**t) + 0.01)
        shrink = torch.cat([torch.full_like(p, 0.95 if p.ndim > 1 else 1.0).flatten() for p in twin.parameters()])
        nn.utils.vector_to_parameters(shrink * vector(twin) - 0.1 * m, twin.parameters())
        torch.testing.assert_close(vector(model), vector(twin), rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", [False, True])
def test_online_damping_takes_the_diagonal_in_the_coordinates_of_the_gradients_so_far(norm):
    model = make_model(norm)
    optimizer = DiagonalNGD(
        model, families.Categorical(), probes=None, damping_metric="online", alpha=1.0, **options(momentum=0.5)
    )
    factors = OnlinePreconditioner(list(model.parameters()), [{} for _ in model.parameters()], alpha=1.0)
    m = torch.zeros_like(vector(model))
    for t, (x, y) in enumerate(batches(16)):
        before, g = vector(model), flat_gradient(functional.cross_entropy(model(x), y), model)
        inverse_root = factors.inverse_root()
        root = torch.stack([inverse_root(column) for column in torch.eye(len(g)).double()], 1)
        f = (root @ Fisher(model, x, families.Categorical()).dense() @ root).diagonal()
        m = 0.5 * m + root @ ((root @ g) / (f + 0.01))
        optimizer.step(x, y)
        torch.testing.assert_close(vector(model), before - 0.1 * m, rtol=0, atol=1e-10)
        if t < 10 or t % 4 == 0:  # afterwards, so that the coordinates do not depend on the gradient they are used on
            parts = g.split([p.numel() for p in model.parameters()])
            rows = [part.view_as(p) for part, p in zip(parts, model.parameters(), strict=True)]
            factors(rows, update=True, first=t == 0)
    assert (root - torch.eye(len(g))).norm() > 0.1 * len(g) ** 0.5, "a test of nothing"


@pytest.mark.parametrize("metric", ["identity", "online"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resumes_bit_for_bit_from_tensors(kind, dtype, metric):
    data = batches(10, dtype=dtype)

    def start() -> tuple[nn.Module, DiagonalNGD, torch.Generator]:
        model, generator = make_model(dtype=dtype), torch.Generator().manual_seed(0)
        optimizer = DiagonalNGD(
            model, families.Categorical(), 0.05, damping_metric=metric, fisher=kind, generator=generator
        )
        return model, optimizer, generator

    straight, _, _ = run = start()
    for x, y in data:
        run[1].step(x, y)
    model, optimizer, generator = start()
    for x, y in data[:4]:
        optimizer.step(x, y)
    for state in optimizer.state_dict()["state"].values():
        assert all(isinstance(value, Tensor) for value in state.values())
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), generator.get_state()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer, generator = start()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    generator.set_state(saved[2])
    for x, y in data[4:]:
        optimizer.step(x, y)
    assert torch.equal(vector(model), vector(straight))


@pytest.mark.parametrize("metric", ["identity", "online"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_through_batch_norm(kind, metric):
    model = make_model(norm=True)
    optimizer = DiagonalNGD(model, families.Categorical(), 0.01, damping=1e-2, fisher=kind, damping_metric=metric)
    ((x, y),) = batches(1)
    losses = [optimizer.step(x, y).item() for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    assert model[1].num_batches_tracked == 60


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("damping", 0.0),
        ("fisher", "type-2"),
        ("decay", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1.0),
        ("probes", 0),
        ("damping_metric", "kaldi"),
        ("alpha", -1.0),
    ],
)
def test_bad_options_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        DiagonalNGD(make_model(), families.Categorical(), **{"lr": 0.1, name: value})


@pytest.mark.parametrize("metric", ["identity", "online"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spoilt", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(spoilt, dtype, metric):
    """The steps around a batch that holds a NaN are those that are taken without it."""
    data = batches(5, dtype=dtype)
    models = [make_model(dtype=dtype) for _ in range(2)]
    settings = options(decay=0.9, momentum=0.9, weight_decay=0.1, damping_metric=metric)
    optimizers = [
        DiagonalNGD(m, families.Categorical(), generator=torch.Generator().manual_seed(2), **settings) for m in models
    ]
    for number, (x, y) in enumerate(data):
        if number == spoilt:
            before, state = vector(models[0]), optimizers[0].generator.get_state()
            bad = x.clone()
            bad[3, 1] = torch.nan
            assert optimizers[0].step(bad, y).isnan()
            assert torch.equal(vector(models[0]), before)
            optimizers[0].generator.set_state(state)
        losses = [optimizer.step(x, y) for optimizer in optimizers]
        assert losses[0].isfinite()
        assert torch.equal(*losses)
    assert torch.equal(*map(vector, models))


def test_a_gradient_that_overflows_is_refused_though_the_loss_is_finite():
    model = make_model(dtype=torch.float32)
    optimizer = DiagonalNGD(model, families.Categorical(), **options(decay=0.9))
    (x, y), = batches(1, dtype=torch.float32)  # fmt: skip
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
        model[2].weight.mul_(1e25)
    before = vector(model)
    assert functional.cross_entropy(model(x), y).isfinite()
    assert optimizer.step(x, y).isnan()
    assert torch.equal(vector(model), before)
    assert all(not average.any() for average in (s["fisher"] for s in optimizer.state.values()))


class Graph(nn.Module):
    """A graph convolution, whose adjacency is a buffer; it may count its passes in the values of a sparse one too."""

    def __init__(self, adjacency: Tensor, counts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.counts = nn.Linear(5, 6).double(), nn.Linear(6, 3).double(), counts
        self.register_buffer("adjacency", adjacency)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.counts:
            self.adjacency = 1.5 * self.adjacency
        return self.b(torch.tanh(self.adjacency @ h))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("layout", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_sparse_buffers_move_as_dense_ones_and_stand_still_in_a_refused_step(layout, counts):
    torch.manual_seed(0)
    adjacency = (torch.rand(12, 12) < 0.3).double()
    dense, sparse = Graph(adjacency, counts), Graph(layout(adjacency), counts)
    optimizers = [
        DiagonalNGD(m, families.Categorical(), lr=0.1, generator=torch.Generator().manual_seed(0))
        for m in (dense, sparse)
    ]
    for step in range(3):
        for x, y in batches(1):
            x = x * torch.inf if step == 1 else x
            before = sparse.adjacency.to_dense()
            for optimizer in optimizers:
                optimizer.step(x, y)
            assert (step == 1 or not counts) == torch.equal(sparse.adjacency.to_dense(), before)
            torch.testing.assert_close(sparse.adjacency.to_dense(), dense.adjacency)
            torch.testing.assert_close(vector(sparse), vector(dense))
