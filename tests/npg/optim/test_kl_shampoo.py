"""KLShampoo step by step against a twin, and what it is invariant to."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from npg.curvature.two_sided import TwoSidedCurvature
from npg.optim import KLShampoo


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_equals_a_loop_over_parameters(power, nesterov, training):
    """Factors, powers on the steps 0, 1, 3, 9 and then every fourth, momentum, decay, the rate of vectors."""

    def make(model: nn.Module) -> KLShampoo:
        options = {"nesterov": nesterov, "power": power, "vector_scale": 0.3, "update_period": 4}
        return KLShampoo(model.parameters(), 0.01, 0.8, 0.1, **options)

    one, twin = training(make), training(make).model
    params = list(twin.parameters())
    alone = [TwoSidedCurvature([p], [{}], power=power) for p in params]
    means = [torch.zeros_like(p) for p in params]
    for t, (x, y) in enumerate(one.batches(22)):
        one.go([(x, y)])
        gradients = torch.autograd.grad(functional.cross_entropy(twin(x), y), params)
        with torch.no_grad():
            for p, g, mean, curvature in zip(params, gradients, means, alone, strict=True):
                curvature.update([g[None]])
                if t in (0, 1, 3, 9, 12, 16, 20):
                    curvature.inverse(exact=t < 10)
                mean.mul_(0.8).add_(0.2 * g)
                (v,) = curvature.apply([(0.2 * g + 0.8 * mean if nesterov else mean)[None]], longest=1.0)
                if p.ndim > 1:
                    p.mul_(1 - 0.01 * 0.1)
                p.sub_(0.01 * (1.0 if p.ndim > 1 else 0.3) * v[0])
    for a, b in zip(one.weights(), params, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("power", [0.5, 0.75, 1.0])
def test_rotations_on_either_side_turn_the_steps(power, walk):
    g = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0] for d in (5, 7))
    steps = [torch.randn(5, 7, generator=g, dtype=torch.float64) * (1 + torch.arange(7)) for _ in range(30)]
    ends = []
    for gradients in (steps, [u @ a @ v.mT for a in steps]):
        p = nn.Parameter(torch.zeros(5, 7, dtype=torch.float64))
        *_, (end,) = walk([p], KLShampoo([p], 1.0, power=power), [[a] for a in gradients])
        ends.append(end)
    plain, turned = ends
    torch.testing.assert_close(turned, u @ plain @ v.mT, rtol=1e-8, atol=1e-8)
    assert (turned - plain).norm() > 0.1


def test_a_weight_without_entries_is_refused_by_name():
    with pytest.raises(ValueError, match=r"parameter 'w' has the shape \(3, 0\).*leave it out"):
        KLShampoo([("w", nn.Parameter(torch.zeros(3, 0)))])


def test_the_power_must_stay(training):
    one = training(lambda model: KLShampoo(model.parameters()))
    one.go(one.batches(1))
    before = one.everything()
    one.optimizer.param_groups[0]["power"] = 1.0
    with pytest.raises(ValueError, match=r"power must stay 0\.5"):
        one.optimizer.step()
    one.optimizer.param_groups[0]["power"] = 0.5
    assert all(torch.equal(a, b) for a, b in zip(one.everything(), before, strict=True))


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


@pytest.mark.parametrize("odd", [1.5, 10.0])
@pytest.mark.parametrize("at", [200, 201, 203, 207])
def test_an_odd_batch_between_two_updates_of_the_powers_is_recovered_from(at, odd):
    """The powers are of gradients before it; without a bound the network was at 1e6 and stayed there."""
    torch.manual_seed(0)
    model, teacher = (nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4)) for _ in range(2))
    optimizer = KLShampoo(model.parameters(), 0.01)
    losses = []
    for t in range(300):
        x = torch.randn(128, 8)
        y = teacher(x).detach() * (odd if t == at else 1.0)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert max(losses[at - 20 : at]) < 1e-3
    assert max(losses[-20:]) < 2e-3


@pytest.mark.parametrize("sizes", [[1e-12, *[1.0] * 19], [*[1.0] * 15, 1e12, *[1.0] * 10]], ids=["first", "late"])
def test_no_step_is_longer_than_that_of_gradients_that_agree(sizes, walk):
    """p = ½: a rotation of a step of lr per entry; of lr · vector_scale for what is no matrix."""
    g = torch.Generator().manual_seed(0)
    weight, bias = nn.Parameter(torch.zeros(6, 5)), nn.Parameter(torch.zeros(6))
    steps = [[size * torch.randn(6, 5, generator=g), size * torch.randn(6, generator=g)] for size in sizes]
    before, longest = [torch.zeros(6, 5), torch.zeros(6)], [0.0, 0.0]
    for after in walk([weight, bias], KLShampoo([weight, bias], 0.01, vector_scale=0.3), steps):
        for i, (a, b) in enumerate(zip(after, before, strict=True)):
            longest[i] = max(longest[i], float((a - b).square().mean().sqrt()))
        before = after
    assert longest == pytest.approx([0.01, 0.003], rel=1e-3)
