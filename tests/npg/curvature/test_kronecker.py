"""KroneckerFisher against blocks of the dense Fisher, factors written out position by position, and theorems."""

import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from npg import Fisher, Status, conjugate_gradient, families
from npg.curvature.kronecker import Block, KroneckerFisher, Multiple
from npg.geometry import Euclidean
from npg.optim import NGD
from npg.transport import wasserstein

pytestmark = pytest.mark.usefixtures("double")
FAMILY = families.Categorical()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(build, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def spans(model: nn.Module) -> list[slice]:
    """Where each parameter stands in the vector of all."""
    ends = torch.tensor([0, *(p.numel() for p in model.parameters())]).cumsum(0).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


def inside(model: nn.Module, block: Block, key: tuple[int, ...]) -> Tensor:
    """The positions in the vector of all parameters of [W, b], row by row."""
    ranges = [torch.arange(s.start, s.stop) for s in spans(model)]
    return torch.cat([ranges[i].reshape(len(block.outputs), -1) for i in key], 1).flatten()


# ------------------------------------------------------------------------------------------------------------ theorems


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(
    "family", [families.Gaussian(0.5), families.Product([families.Gaussian(0.5), families.Gaussian(3.0)], [1, 1])]
)
def test_exact_for_a_deep_linear_network(corrected, family, assert_close):
    """Gradients of a linear network do not depend on its inputs (Bernacchia, Lengyel and Hennequin 2018)."""
    model = made(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2)))
    fisher = Fisher(model, torch.randn(20, 3, generator=generator()), family)
    approximation = KroneckerFisher(fisher, probes=None, corrected=corrected)
    exact = fisher.dense()
    expected = torch.zeros_like(exact)
    for block in (slice(0, 16), slice(16, 36), slice(36, 48)):
        expected[block, block] = exact[block, block]
    assert_close(approximation.dense(), expected)


@pytest.mark.parametrize("geometry", [wasserstein(FAMILY), wasserstein(families.DiagonalGaussian()), Euclidean()])
def test_factors_are_of_the_geometry_of_the_outputs(geometry, assert_close):
    """Of one layer, whose gradients are the outputs' own, G is the mean of M and A that of āāᵀ."""
    model, x = made(lambda: nn.Linear(3, 4)), torch.randn(7, 3, generator=generator())
    fisher = Fisher(model, x, geometry)
    (block,) = KroneckerFisher(fisher, probes=None).blocks.values()
    assert_close(block.outputs, geometry(fisher.outputs)(torch.eye(4).unsqueeze(1).expand(4, 7, 4)).mean(1))
    bar = torch.cat([x, torch.ones(7, 1)], 1)
    assert_close(block.inputs, bar.T @ bar / 7)


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), (5,)),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), nn.Tanh(),
            nn.Conv2d(3, 4, 2, bias=False), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(3),
        ),
        (2, 5, 4),
    ),
    "circular": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), nn.Flatten(), nn.Linear(48, 3)
        ),
        (2, 4, 4),
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        (2, 7),
    ),
    "sequence": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), (3, 5)),
}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def network(request):
    build, shape = NETWORKS[request.param]
    model = made(build)
    x = torch.randn(6, *shape, generator=generator())
    with torch.no_grad():
        model(x)  # what is lazy knows its size then
    return model, x


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_corrected_values_are_the_diagonal_of_the_block_in_its_basis(network, kind, assert_close):
    """George et al. (2018), which makes them the nearest; it also says that patches are in the order of the weights."""
    model, x = network
    targets = torch.arange(6) % 3
    fisher = Fisher(model, x, FAMILY, kind=kind, targets=targets if kind == "empirical" else None)
    exact = fisher.dense()
    plain, corrected = (KroneckerFisher(fisher, probes=None, corrected=c) for c in (False, True))
    for key, block in corrected.blocks.items():
        assert isinstance(block, Block)
        here = inside(model, block, key)
        dense = exact[here][:, here]
        basis = torch.kron(block.output_basis, block.input_basis)
        assert_close(block.values.flatten(), torch.diagonal(basis.T @ dense @ basis))
        far, near = (torch.linalg.norm(f.dense()[here][:, here] - dense) for f in (plain, corrected))
        assert near <= far * (1 + 1e-12)


def test_steps_do_not_depend_on_how_layers_are_parameterised(assert_close):
    """Martens and Grosse (2015), theorem 1: invertible affine maps of a layer's inputs and outputs change nothing."""
    model, twin = (made(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))) for _ in range(2))
    x, y = torch.randn(30, 3, generator=generator()), torch.arange(30) % 2
    mix, shift = torch.randn(3, 3, generator=generator(1)), torch.randn(3, generator=generator(2))
    seen = x @ mix.T + shift
    with torch.no_grad():  # W' x' + b' = W x + b
        twin[0].weight.copy_(model[0].weight @ mix.inverse())
        twin[0].bias.copy_(model[0].bias - twin[0].weight @ shift)
    for network, inputs in ((model, x), (twin, seen)):
        loss = functional.cross_entropy(network(inputs), y)
        g = nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(network.parameters())))
        step = KroneckerFisher(Fisher(network, inputs, families.Gaussian()), probes=None).inverse(0.0)(g)
        theta = nn.utils.parameters_to_vector(network.parameters())
        nn.utils.vector_to_parameters(theta - 0.3 * step, network.parameters())
    assert_close(model(x), twin(seen), scale=1e4)
    assert (model(x) - made(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))(x)).abs().max() > 0.01


# --------------------------------------------------------------------------------------------------------- the factors


def dense_factors(model: nn.Module, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A and G of a layer, event by event and position by position, with the metric diag(p) − ppᵀ."""
    kept = []

    def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        kept.append((args[0], output))
        return output.clone()  # which may then be changed in place

    handle = layer.register_forward_hook(hook)
    total_a, total_g, positions = 0.0, 0.0, 0
    for event in x:
        logits = model(event.unsqueeze(0)).squeeze(0)
        ((seen, output),) = kept
        kept.clear()
        jacobian = torch.stack([torch.autograd.grad(o, output, retain_graph=True)[0][0] for o in logits])
        p = logits.softmax(-1).detach()
        metric = torch.diag(p) - torch.outer(p, p)
        if isinstance(layer, nn.Conv2d):
            (height, width), (top, left) = layer.kernel_size, layer.padding
            padded = functional.pad(seen[0], (left, left, top, top))
            places = product(*(range(n) for n in output.shape[2:]))
            at = [
                (
                    padded[
                        :,
                        r * layer.stride[0] : r * layer.stride[0] + height * layer.dilation[0] : layer.dilation[0],
                        c * layer.stride[1] : c * layer.stride[1] + width * layer.dilation[1] : layer.dilation[1],
                    ].flatten(),
                    jacobian[:, :, r, c],
                )
                for r, c in places
            ]
        else:
            at = list(
                zip(
                    seen[0].reshape(-1, seen.shape[-1]),
                    jacobian.flatten(1, -2).unbind(1) if jacobian.ndim > 2 else [jacobian],
                )
            )
        for a, j in at:
            a = a.detach() if layer.bias is None else torch.cat([a.detach(), torch.ones(1)])
            total_a, total_g, positions = total_a + torch.outer(a, a), total_g + j.T @ metric @ j, positions + 1
    handle.remove()
    return total_a / positions, total_g / len(x)


@pytest.mark.parametrize("name", ["mlp", "conv2d", "sequence"])
def test_factors_are_second_moments_over_all_positions(name, assert_close):
    build, shape = NETWORKS[name]
    model, x = made(build), torch.randn(6, *shape, generator=generator())
    model(x)
    approximation = KroneckerFisher(Fisher(model, x, FAMILY), probes=None)
    layers = [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d))]
    for layer, block in zip(layers, approximation.blocks.values(), strict=True):
        a, g = dense_factors(model, layer, x)
        assert_close(block.inputs, a)
        assert_close(block.outputs, g)
        here = inside(model, block, next(k for k, b in approximation.blocks.items() if b is block))
        assert_close(approximation.dense()[here][:, here], torch.kron(g, a))


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
def test_probes_are_unbiased(kind):
    model = made(NETWORKS["mlp"][0])
    x = torch.randn(12, 5, generator=generator())
    targets = torch.arange(12) % 3 if kind == "empirical" else None
    fisher = Fisher(
        model, x, FAMILY, kind=kind, targets=targets, generator=generator(), samples=1 if targets is not None else 3
    )
    whole = KroneckerFisher(fisher, probes=None, generator=generator())
    draws = [KroneckerFisher(fisher, probes=1, generator=generator(seed)) for seed in range(600)]
    for key, block in whole.blocks.items():
        mean = torch.stack([draw.blocks[key].outputs for draw in draws]).mean(0)
        spread = torch.stack([draw.blocks[key].outputs for draw in draws]).std(0) / math.sqrt(len(draws))
        assert ((mean - block.outputs).abs() <= 5 * spread + 1e-12).all()
        assert torch.equal(draws[0].blocks[key].inputs, block.inputs)


def test_more_probes_have_less_noise():
    model, x = made(NETWORKS["mlp"][0]), torch.randn(12, 5, generator=generator())
    fisher = Fisher(model, x, FAMILY)
    exact = KroneckerFisher(fisher, probes=None).blocks[0, 1].outputs

    def error(probes: int, seed: int) -> float:
        draw = KroneckerFisher(fisher, probes=probes, generator=generator(seed)).blocks[0, 1].outputs
        return float((draw - exact).square().sum())

    errors = [sum(error(probes, seed) for seed in range(60)) for probes in (1, 8)]
    assert 4 < errors[0] / errors[1] < 16


def test_an_average_weighs_earlier_batches_less(assert_close):
    model = made(NETWORKS["mlp"][0])
    fishers = [Fisher(model, torch.randn(9, 5, generator=generator(s)), FAMILY) for s in range(3)]
    alone = [KroneckerFisher(fisher, probes=None) for fisher in fishers]
    average = KroneckerFisher(probes=None, decay=0.8)
    for fisher in fishers:
        average.update(fisher)
    weights = torch.tensor([0.8**2, 0.8, 1.0]) / (0.8**2 + 0.8 + 1)
    for key, block in average.blocks.items():
        for name in ("inputs", "outputs"):
            expected = sum(w * getattr(a.blocks[key], name) for w, a in zip(weights, alone))
            assert_close(getattr(block, name), expected)
        assert int(block.updates) == 3
    newest = KroneckerFisher(fishers[0], probes=None, decay=0.0)
    newest.update(fishers[2])
    assert_close(newest.dense(), alone[2].dense())


def test_what_no_layer_holds_has_the_mean_of_its_diagonal():
    model = made(lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))
    fisher = Fisher(model, torch.randn(40, 4, generator=generator()), FAMILY)
    exact = torch.diagonal(fisher.dense())[spans(model)[1]].mean()
    draws = [KroneckerFisher(fisher, generator=generator(s)).blocks[(1,)] for s in range(400)]
    values = torch.stack([draw.values for draw in draws])
    assert isinstance(draws[0], Multiple)
    assert abs(values.mean() - exact) < 5 * values.std() / 20
    assert values.std() / 20 < 0.05 * exact


# --------------------------------------------------------------------------------------------------------- the inverse


@pytest.mark.parametrize("corrected", [False, True])
def test_the_inverse_is_that_of_the_damped_matrix(network, corrected, assert_close):
    model, x = network
    approximation = KroneckerFisher(Fisher(model, x, FAMILY), corrected=corrected, generator=generator())
    dense = approximation.dense()
    assert_close(dense, dense.T)
    assert torch.linalg.eigvalsh(dense).min() > -1e-12
    v = torch.randn(len(dense), 3, generator=generator())
    assert_close(approximation @ v, dense @ v)
    expected = torch.linalg.solve(dense + 0.01 * torch.eye(len(dense)), v)
    assert_close(approximation.inverse(0.01)(v), expected)
    assert_close(approximation.inverse(0.01)(v[:, 1]), expected[:, 1])


@pytest.mark.parametrize("corrected", [False, True])
def test_damping_shared_out_to_the_factors(network, corrected, assert_close):
    """(G + √λ/π I) ⊗ (A + π√λ I), and with corrected values as much more than those."""
    model, x = network
    approximation = KroneckerFisher(Fisher(model, x, FAMILY), probes=None, corrected=corrected)
    dense = approximation.dense()
    expected = torch.eye(len(dense)) * 0.04
    for key, block in approximation.blocks.items():
        (n, a), (m, g) = ((len(f), f) for f in (block.inputs, block.outputs))
        pi = ((a.trace() / n) / (g.trace() / m)).sqrt()
        here = inside(model, block, key)
        both = torch.kron(g + 0.2 / pi * torch.eye(m), a + 0.2 * pi * torch.eye(n))
        expected[here.unsqueeze(1), here] = dense[here][:, here] + both - torch.kron(g, a)
    v = torch.randn(len(dense), generator=generator())
    assert_close(approximation.inverse(0.04, shared=True)(v), torch.linalg.solve(expected, v))


@pytest.mark.parametrize("zero", [(), ("inputs",), ("outputs",), ("inputs", "outputs")])
def test_damping_shared_out_to_a_factor_of_zeros(zero, assert_close):
    """Dead inputs of a layer without bias, or outputs that nothing depends on: π = 1."""
    model = made(lambda: nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2)))
    x = torch.randn(5, 3, generator=generator()) * ("inputs" not in zero)
    with torch.no_grad():
        model[1].weight *= "outputs" not in zero
    approximation = KroneckerFisher(Fisher(model, x, FAMILY), probes=None)
    block = approximation.blocks[(0,)]
    a, g = block.inputs, block.outputs
    assert [bool((f == 0).all()) for f in (a, g)] == ["inputs" in zero, "outputs" in zero]
    pi = 1.0 if zero else ((a.trace() / 3) / (g.trace() / 2)).sqrt()
    both = torch.kron(g + 0.2 / pi * torch.eye(2), a + 0.2 * pi * torch.eye(3))
    v = torch.randn(12, generator=generator())
    assert_close(approximation.inverse(0.04, shared=True)(v)[:6], torch.linalg.solve(both, v[:6]))


@pytest.mark.parametrize("shared", [False, True])
def test_a_solution_knows_its_model(network, shared, assert_close):
    model, x = network
    approximation = KroneckerFisher(Fisher(model, x, FAMILY), generator=generator())
    b = torch.randn(approximation.shape[0], generator=generator())
    solution = approximation.solve(b, damping=0.1, shared=shared)
    damped = approximation.dense() + 0.1 * torch.eye(len(b))
    assert_close(solution.x, approximation.inverse(0.1, shared=shared)(b))
    assert_close(solution.curvature, solution.x @ damped @ solution.x)
    assert_close(solution.model_value, 0.5 * solution.x @ damped @ solution.x - b @ solution.x)
    assert (solution.status, solution.iterations) == (Status.CONVERGED, 0)
    assert math.isnan(solution.residual_norm)
    assert approximation.solve(b * math.inf, damping=0.1).status is Status.NON_FINITE


def test_without_damping_it_is_the_pseudo_inverse(assert_close):
    model = made(lambda: nn.Linear(2, 2))
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # the second input is never there
    approximation = KroneckerFisher(Fisher(model, x, families.Gaussian()), probes=None)
    assert_close(approximation.inverse(0.0)(torch.ones(6)), torch.linalg.pinv(approximation.dense()) @ torch.ones(6))


def test_it_preconditions_conjugate_gradients():
    """On inputs of very different sizes, whose scale is all in A."""
    model = made(lambda: nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3)))
    x = torch.randn(300, 20, generator=generator()) * torch.logspace(-2, 1, 20)
    fisher = Fisher(model, x, FAMILY)
    b = fisher @ torch.randn(fisher.shape[0], generator=generator())
    plain = conjugate_gradient(fisher, b, damping=1e-6, rtol=1e-4, max_iterations=2000)
    inverse = KroneckerFisher(fisher, probes=None).inverse(1e-6)
    helped = conjugate_gradient(fisher, b, damping=1e-6, rtol=1e-4, max_iterations=2000, preconditioner=inverse)
    assert helped.residual_norm <= 1e-4
    assert helped.iterations < 0.5 * plain.iterations


# ------------------------------------------------------------------------------------------ which layers have factors


class Shared(nn.Module):
    """One layer used twice, one weight in two modules with one bias, one weight with two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4)
        self.d.weight = self.c.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).tanh()).tanh()
        x = self.b(self.a(x).tanh()).tanh()
        return self.head(self.d(input=self.c(x).tanh()).tanh())


def test_shared_weights(assert_close):
    model, x = made(Shared), torch.randn(9, 4, generator=generator())
    names = [name for name, _ in model.named_parameters()]
    approximation = KroneckerFisher(Fisher(model, x, FAMILY), probes=None)
    factored = {names[i] for key, block in approximation.blocks.items() if isinstance(block, Block) for i in key}
    assert factored == {"twice.weight", "twice.bias", "a.weight", "a.bias", "head.weight", "head.bias"}
    assert {i for key in approximation.blocks for i in key} == set(range(len(names)))
    first = torch.cat([x, torch.ones(9, 1)], 1)
    second = torch.cat([model.twice(x).tanh(), torch.ones(9, 1)], 1).detach()
    assert_close(approximation.blocks[0, 1].inputs, (first.T @ first + second.T @ second) / 18)


class Odd(nn.Module):
    """Attention that uses a layer's weight without calling it, groups, a norm, a subclass, and a layer left unused."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.groups = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(4)
        self.doubled = self.Doubled(4, 4)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 4)
        self.use = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.doubled(self.groups(x.transpose(1, 2)).transpose(1, 2))
        x = self.unused(x) if self.use else x
        return self.head(x)


def test_other_modules_have_no_factors_and_layers_may_come_into_use():
    model, x = made(Odd), torch.randn(5, 6, 4, generator=generator())
    names = [name for name, _ in model.named_parameters()]

    def factored(blocks):
        return {names[i] for key, block in blocks.items() if isinstance(block, Block) for i in key}

    curvature = KroneckerFisher(Fisher(model, x, FAMILY), decay=0.5)
    assert factored(curvature.blocks) == {"head.weight", "head.bias"}
    v = torch.randn(curvature.shape[0], generator=generator())
    assert torch.isfinite(curvature.inverse(0.1)(v)).all()
    model.use = True
    curvature.update(Fisher(model, x, FAMILY))
    second = curvature.blocks
    assert factored(second) == {"head.weight", "head.bias", "unused.weight", "unused.bias"}
    assert sorted(i for key in second for i in key) == list(range(len(names))), "each parameter once"
    model.use = False
    curvature.update(Fisher(model, x, FAMILY))
    key = next(k for k in second if names[k[0]] == "unused.weight")
    assert curvature.blocks[key] is second[key], "a layer that is not in use keeps its factors"


@pytest.mark.parametrize("corrected", [False, True])
def test_a_call_without_rows_is_none(corrected):
    layers = made(lambda: nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]))

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return self.layers[0](x).index_add(0, (x[:, 0] > 9).nonzero()[:, 0], self.layers[1](x[x[:, 0] > 9]))

    fisher = Fisher(Routed(), torch.randn(5, 3, generator=generator()), FAMILY)
    approximation = KroneckerFisher(fisher, corrected=corrected)
    assert {key: type(block) for key, block in approximation.blocks.items()} == {
        (0, 1): Block, (2,): Multiple, (3,): Multiple
    }  # fmt: skip
    assert approximation.inverse(0.1)(torch.ones(16)).isfinite().all()


def test_frozen_parameters_are_left_out(assert_close):
    model = made(NETWORKS["mlp"][0])
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    x = torch.randn(9, 5, generator=generator())
    approximation = KroneckerFisher(Fisher(model, x, FAMILY), probes=None)
    assert {key: type(block) for key, block in approximation.blocks.items()} == {(0,): Block, (1,): Multiple}
    assert_close(approximation.blocks[(0,)].inputs, x.T @ x / 9)


def test_layers_that_are_too_large_have_no_factors(monkeypatch):
    model, x = made(NETWORKS["mlp"][0]), torch.randn(9, 5, generator=generator())
    monkeypatch.setattr("npg.curvature.layers.MAX_SIZE", 4)
    blocks = KroneckerFisher(Fisher(model, x, FAMILY)).blocks
    assert {key: type(block) for key, block in blocks.items()} == {(0,): Multiple, (1,): Multiple, (2, 3): Block}


def test_one_event_has_an_axis_too(assert_close):
    model, x = made(NETWORKS["mlp"][0]), torch.randn(5, generator=generator())
    with pytest.raises(ValueError, match=r"one event of 3 components.*\(1, 3\) for one"):
        Fisher(model, x, FAMILY)
    one, twice = (KroneckerFisher(Fisher(model, x.repeat(n, 1), FAMILY), probes=None) for n in (1, 2))
    assert_close(one.dense(), twice.dense())


@pytest.mark.parametrize("corrected", [False, True])
def test_the_order_of_memory_is_no_matter(corrected, monkeypatch, assert_close):
    """A few events at a time, and channels last."""
    build, shape = NETWORKS["conv2d"]
    model, x = made(build), torch.randn(6, *shape, generator=generator())
    model(x)
    whole = KroneckerFisher(Fisher(model, x, FAMILY), probes=None, corrected=corrected).dense()
    monkeypatch.setattr("npg.curvature.layers._ELEMENTS", 400)
    assert_close(KroneckerFisher(Fisher(model, x, FAMILY), probes=None, corrected=corrected).dense(), whole)
    model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert_close(KroneckerFisher(Fisher(model, x, FAMILY), probes=None, corrected=corrected).dense(), whole)


def test_it_leaves_no_trace():
    """Hooks, running statistics, dropout's random numbers and gradients are as before."""
    model = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)))
    fisher = Fisher(model, torch.randn(8, 4, generator=generator()), FAMILY)
    state, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    first = KroneckerFisher(fisher, generator=generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers))
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    torch.rand(3)
    assert torch.equal(KroneckerFisher(fisher, generator=generator()).dense(), first.dense()), "the same dropout"


def test_gradients_that_are_not_finite_give_nan_and_no_error():
    model = made(NETWORKS["mlp"][0])
    fisher = Fisher(model, torch.full((4, 5), math.nan), families.Gaussian())
    for corrected in (False, True):
        inverse = KroneckerFisher(fisher, corrected=corrected).inverse(0.1)
        assert torch.isnan(inverse(torch.ones(fisher.shape[0]))).any()


def test_single_precision_and_autocast_keep_factors_in_float32():
    model = made(NETWORKS["mlp"][0]).float()
    x = torch.randn(64, 5, generator=generator(), dtype=torch.float32)
    plain = KroneckerFisher(Fisher(model, x, FAMILY), probes=None)
    with torch.autocast("cpu", torch.bfloat16):
        low = KroneckerFisher(Fisher(model, x, FAMILY), probes=None)
        v = torch.ones(low.shape[0], dtype=torch.float32)
        inverted = low.inverse(0.1)(v)
    assert torch.equal(inverted, low.inverse(0.1)(v))
    for key, block in plain.blocks.items():
        assert block.values.dtype == low.blocks[key].values.dtype == torch.float32
        torch.testing.assert_close(
            low.blocks[key].outputs, block.outputs, rtol=0, atol=0.03 * float(block.outputs.abs().max())
        )


def test_bad_arguments_are_refused():
    model, x = made(NETWORKS["mlp"][0]), torch.randn(6, 5, generator=generator())
    fisher = Fisher(model, x, FAMILY)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
        KroneckerFisher(fisher, decay=1.0)
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        KroneckerFisher(fisher, probes=0)
    with pytest.raises(ValueError, match=r"damping must lie in \[0, inf\), got -1"):
        KroneckerFisher(fisher).inverse(-1.0)
    with pytest.raises(ValueError, match="fisher must be of a module"):
        KroneckerFisher(Fisher(lambda p, x: x @ p["w"], x, FAMILY, parameters={"w": torch.ones(5, 3)}))
    with pytest.raises(ValueError, match="one row per trainable parameter"):
        KroneckerFisher(fisher) @ torch.ones(3)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="make a new Fisher"):
        KroneckerFisher(fisher)


# ------------------------------------------------------------- uses of a weight that are none, or several, of its layer


class Tied(nn.Module):
    """A decoder whose weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 5, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.hidden(self.embedding(x)).tanh())


class Transposed(nn.Module):
    """An autoencoder that uses one weight in both directions, and one bias twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(5, 4), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = (self.encoder(x) + self.encoder.bias).tanh()
        return self.head(functional.linear(h, self.encoder.weight.T))


class Bilinear(nn.Module):
    """A layer whose weight is added to the outputs as well, by nothing that has a name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh() + self.layer.weight.sum(1)


USED_ELSEWHERE = {"tied": Tied, "transposed": Transposed, "bilinear": Bilinear}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", USED_ELSEWHERE)
def test_a_weight_that_is_used_outside_of_its_layer_has_a_multiple(name, corrected):
    """The mean of its diagonal of F holds all of its uses: the trace is that of F."""
    model = made(USED_ELSEWHERE[name])
    x = torch.arange(40) % 5 if name == "tied" else torch.randn(40, 5, generator=generator())
    fisher = Fisher(model, x, FAMILY)
    exact = fisher.dense()
    draws = [KroneckerFisher(fisher, corrected=corrected, generator=generator(s)) for s in range(300)]
    assert isinstance(draws[0].blocks[(0,)], Multiple)
    traces = (
        torch.stack([draw.blocks[(0,)].values for draw in draws])
        * model.get_parameter(fisher.parameters.names[0]).numel()
    )
    expected = torch.diagonal(exact)[spans(model)[0]].sum()
    assert abs(traces.mean() - expected) < 5 * traces.std() / math.sqrt(len(draws))
    assert traces.std() / math.sqrt(len(draws)) < 0.1 * expected
    others = [key for key, block in draws[0].blocks.items() if isinstance(block, Block)]
    assert len(others) == (name != "bilinear"), "the other layers have their factors"


class Field(nn.Module):
    """A force field, −∂E/∂x: the weights enter by the backward pass of their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return -slope


class Generated(nn.Module):
    """A layer whose weights are the outputs of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.maker = nn.Linear(2, 2), nn.Linear(1, 6)

    def forward(self, x: Tensor) -> Tensor:
        w = self.maker(x.new_ones(1, 1)).squeeze(0)
        return functional_call(self.layer, {"weight": w[:4].view(2, 2), "bias": w[4:]}, (x,))


class Adapted(nn.Module):
    """One step of gradient descent inside of the forward pass, as in MAML."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
        self.x, self.y = torch.randn(2, 10, 2, generator=generator(1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            weights = dict(self.net.named_parameters())
            loss = (self.net(self.x) - self.y).square().mean()
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            moved = {name: p - 0.5 * g for (name, p), g in zip(weights.items(), slopes)}
            return functional_call(self.net, moved, (x,))


class Applied(nn.Module):
    """A layer whose input is the weight of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) @ self.second(self.first.weight)


@pytest.mark.filterwarnings("ignore:no forward mode", "ignore:EKFAC takes K-FAC's values")
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("build", [Field, Generated, Adapted, Applied])
def test_a_weight_that_enters_otherwise_than_by_calls_of_its_layer_has_the_trace_of_f(build, corrected):
    model, x = made(build), torch.randn(30, 2, generator=generator())
    fisher = Fisher(model, x, families.Gaussian())
    exact = torch.diagonal(fisher.dense())
    draws = [
        torch.diagonal(KroneckerFisher(fisher, corrected=corrected, generator=generator(s)).dense()) for s in range(300)
    ]
    for span in spans(model)[: 2 if build is Applied else None]:  # its second layer has rows that are no events
        traces, expected = torch.stack([draw[span].sum() for draw in draws]), exact[span].sum()
        assert abs(traces.mean() - expected) <= 5 * traces.std() / math.sqrt(len(draws)) + 1e-12
        assert traces.std() / math.sqrt(len(draws)) <= 0.1 * expected


def test_calls_that_no_output_depends_on_are_none():
    """Such as that of a target, of the same layer, which is detached."""

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + 1e-3 * self.layer(100 * x).detach()

    fisher = Fisher(made(Twin), torch.randn(40, 3, generator=generator()), families.Gaussian())
    curvature = KroneckerFisher(fisher, probes=None)
    assert isinstance(curvature.blocks[0, 1], Block)
    assert torch.trace(curvature.dense()) == pytest.approx(float(torch.trace(fisher.dense())), rel=1e-12)


class Several(nn.Module):
    """One layer, called twice on the batch, once on something that is smaller, or with other rows than the events'."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # (N, 6, 4)
        n = len(x)
        if self.way == "called twice":
            h = self.layer(self.layer(x).tanh()).mean(1)
        elif self.way == "called on parts":
            h = self.layer(x[:, :2]).sum(1) + self.layer(x[:, 2])
        elif self.way == "sequence first":
            h = self.layer(x.transpose(0, 1)).tanh().mean(0)
        elif self.way == "stacked":
            first, second = self.layer(torch.cat([x[:, 0], x[:, 1]])).split(n)
            h = first * second
        elif self.way == "flattened":
            h = self.layer(x.flatten(0, 1)).view(n, 6, 4).tanh().mean(1)
        elif self.way == "shuffled":
            h = self.layer(x[:, 0].flip(0)).flip(0)
        elif self.way == "mean over the batch":
            h = self.layer(x[:, 0])
            h = h - h.mean(0)
        return self.head(h)


@pytest.mark.parametrize("way", ["called twice", "called on parts"])
def test_corrected_values_sum_over_the_calls_of_an_event_before_they_square(way, assert_close):
    model, x = made(lambda: Several(way)), torch.randn(6, 6, 4, generator=generator())
    fisher = Fisher(model, x, FAMILY)
    block = KroneckerFisher(fisher, probes=None, corrected=True).blocks[0, 1]
    here = inside(model, block, (0, 1))
    basis = torch.kron(block.output_basis, block.input_basis)
    assert_close(block.values.flatten(), torch.diagonal(basis.T @ fisher.dense()[here][:, here] @ basis))


@pytest.mark.parametrize("events", [6, 5])  # 6: as many as positions
@pytest.mark.parametrize("way", ["sequence first", "stacked", "flattened", "shuffled", "mean over the batch"])
def test_layers_whose_rows_are_not_the_events_keep_the_values_of_kfac(way, events):
    model, x = made(lambda: Several(way)), torch.randn(events, 6, 4, generator=generator())
    fisher = Fisher(model, x, FAMILY)
    with pytest.warns(UserWarning, match=r"K-FAC's values for 'layer\.weight'.*the batch on its leading axis"):
        corrected = KroneckerFisher(fisher, corrected=True, generator=generator())
    plain = KroneckerFisher(fisher, generator=generator())
    assert torch.equal(corrected.blocks[0, 1].values, plain.blocks[0, 1].values)
    assert not torch.equal(corrected.blocks[2, 3].values, plain.blocks[2, 3].values)


def test_batch_normalisation_lets_events_be_told_apart(assert_close, recwarn):
    """In training mode the values are those of gradients event by event, as they come out of the graph."""
    model = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))
    x = torch.randn(8, 4, generator=generator())
    fisher = Fisher(model, x, FAMILY)
    statistics = [buffer.clone() for buffer in model.buffers()]
    block = KroneckerFisher(fisher, corrected=True, generator=generator()).blocks[0, 1]
    assert not recwarn.list
    assert all(module.training for module in model)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), statistics))
    (u,) = fisher.factor_vectors(1, generator())
    h = model[0](x)
    (g,) = torch.autograd.grad(model[1:](h), h, u)
    a = torch.cat([x, torch.ones(8, 1)], 1)
    assert_close(block.values, ((g @ block.output_basis).square().T @ (a @ block.input_basis).square()) / 8)


def doubled(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output


def patched(layer: nn.Linear) -> None:
    layer.forward = lambda x: 2 * functional.linear(x, layer.weight, layer.bias)


class Own(nn.Conv2d):
    """A convolution whose forward pass is not replaced, but what it calls is."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(x, weight, bias)


@pytest.mark.parametrize("corrected", [False, True])
def test_hooks_that_change_what_a_layer_returns(corrected, assert_close):
    """The factors are those of the layer itself, whatever hooks make of its inputs and outputs."""
    model = made(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    model[0].register_forward_hook(doubled)
    model[1].register_forward_pre_hook(lambda module, args: (3 * args[0],))
    fisher = Fisher(model, torch.randn(20, 3, generator=generator()), families.Gaussian())
    exact = fisher.dense()
    expected = torch.block_diag(exact[:16, :16], exact[16:, 16:])
    assert_close(KroneckerFisher(fisher, probes=None, corrected=corrected).dense(), expected)


def test_layers_with_a_forward_pass_of_their_own_have_none():
    model = made(lambda: nn.Sequential(Own(1, 2, 2), nn.Flatten(), nn.Linear(8, 3), nn.Linear(3, 3)))
    patched(model[2])
    fisher = Fisher(model, torch.randn(4, 1, 3, 3, generator=generator()), FAMILY)
    kinds = {key: type(block) for key, block in KroneckerFisher(fisher).blocks.items()}
    assert kinds == {(4, 5): Block, (0,): Multiple, (1,): Multiple, (2,): Multiple, (3,): Multiple}


def test_calls_under_vmap_count_as_uses_outside_of_the_layer():
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.vmap(self.layer)(x))

    blocks = KroneckerFisher(Fisher(made(Mapped), torch.randn(5, 4, generator=generator()), FAMILY)).blocks
    assert {key: type(block) for key, block in blocks.items()} == {(2, 3): Block, (0,): Multiple, (1,): Multiple}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("thawed", ["0.bias", "0.weight", "0.", "2.bias"])
def test_blocks_never_overlap_when_parameters_are_frozen_and_thawed(thawed, corrected, assert_close):
    """Freeze, learn, thaw, and average with that: each has the blocks of the layer in its present form, once."""
    model, x = made(NETWORKS["mlp"][0]), torch.randn(9, 5, generator=generator())
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(thawed))
    after = KroneckerFisher(Fisher(model, x, FAMILY), probes=None, corrected=corrected, decay=0.9)
    model.requires_grad_(True)
    fisher = Fisher(model, x, FAMILY)
    after.update(fisher)
    assert sorted(i for key in after.blocks for i in key) == [0, 1, 2, 3]
    assert_close(after.dense(), KroneckerFisher(fisher, probes=None, corrected=corrected).dense())
    assert_close(after.inverse(0.1)(after.dense() @ torch.ones(39) + 0.1), torch.ones(39))
    model[0].bias.requires_grad_(False)
    former, fewer = after.state_dict(), Fisher(model, x, FAMILY)
    after.parameters = fewer.parameters
    after.load_state_dict({(0, 1): former[0, 1], (1, 2): former[2, 3]})  # the first of a layer that is no longer so
    after.update(fewer)
    assert {key: int(block.updates) for key, block in after.blocks.items()} == {
        (0,): 1,
        (1, 2): int(former[2, 3]["updates"]) + 1,
    }


def test_blocks_of_another_model_are_refused():
    model, x = made(NETWORKS["mlp"][0]), torch.randn(9, 5, generator=generator())
    fisher = Fisher(model, x, FAMILY)
    curvature = KroneckerFisher(fisher)
    state = curvature.state_dict()
    curvature.load_state_dict({(0, 1): state[2, 3], (2, 3): state[0, 1]})
    with pytest.raises(ValueError, match=r"factors of '0\.weight' are .*\(3, 5\), but it has \(4, 6\): give"):
        curvature.update(fisher)


@pytest.mark.parametrize("solver", ["kfac", "ekfac"])
def test_what_a_hook_masks_does_not_move(solver):
    """The layer's factors know nothing of a hook on its weight, so that it has none."""
    model = made(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    mask = (torch.rand(8, 6, generator=generator()) > 0.5).double()
    handle = model[0].weight.register_hook(lambda g: g * mask)
    x, y = torch.randn(64, 6, generator=generator()), torch.randint(3, (64,), generator=generator())
    optimizer = NGD(model, FAMILY, solver=solver, damping=0.01, lr=0.1)
    before = model[0].weight.detach().clone()
    optimizer.step(x, y)
    moved = model[0].weight.detach() - before
    assert not (moved * (1 - mask)).any()
    assert (moved * mask).any()
    fisher = Fisher(model, x, FAMILY)
    assert all(isinstance(block, Multiple) for key, block in KroneckerFisher(fisher).blocks.items() if 0 in key)
    handle.remove()
    assert isinstance(KroneckerFisher(Fisher(model, x, FAMILY)).blocks[0, 1], Block)


@pytest.mark.parametrize("sizes", [(5, 0), (0, 5)], ids=["no outputs", "no inputs"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_a_weight_entry_have_no_factors(sizes):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.empty = nn.Linear(4, 5), nn.Linear(*sizes)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return h + self.empty(h[:, : self.empty.in_features]).sum(1, keepdim=True)

    model = made(Model)
    report = NGD(model, FAMILY, solver="kfac", damping=0.1, lr=0.1).step(torch.randn(8, 4), torch.randint(5, (8,)))
    assert report.accepted
