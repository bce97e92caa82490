"""OnlineNGD beside SGD and a loop over parameters; when its factors move; what it refuses."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from npg.curvature.online import OnlinePreconditioner
from npg.optim import OnlineNGD


def assert_close(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rank_zero_is_sgd(momentum, training):
    ours = training(
        lambda model: OnlineNGD(model.parameters(), 0.1, momentum, 1e-2, decoupled_weight_decay=False, rank=0)
    )
    theirs = training(lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum, weight_decay=1e-2))
    for each in (ours, theirs):
        each.go(each.batches(20))
    assert_close(ours.weights(), theirs.weights(), 1e-12)
    assert all(set(state) == {"momentum_buffer", "step"} for state in ours.optimizer.state.values())


def test_report_settings_equal_a_loop_over_parameters(training):
    """L2 before preconditioning, then every axis of every parameter, then momentum."""

    def make(model: nn.Module) -> OnlineNGD:
        return OnlineNGD(model.parameters(), 0.1, 0.9, 1e-2, decoupled_weight_decay=False)

    one, twin = training(make), training(make).model
    params = list(twin.parameters())
    alone = [OnlinePreconditioner([p], [{}]) for p in params]
    velocity = [torch.zeros_like(p) for p in params]
    for t, (x, y) in enumerate(one.batches(25)):
        one.go([(x, y)])
        gradients = torch.autograd.grad(functional.cross_entropy(twin(x), y), params)
        with torch.no_grad():
            for p, g, v, precondition in zip(params, gradients, velocity, alone, strict=True):
                (out,) = precondition([g + 1e-2 * p], update=t < 10 or t % 4 == 0, first=t == 0)
                v.mul_(0.9).add_(out[0])
                p.sub_(0.1 * v)
    assert_close(one.weights(), [p.detach() for p in params], 1e-10)


def test_factors_are_updated_on_the_first_ten_steps_and_then_once_per_period(training):
    one = training(lambda model: OnlineNGD(model.parameters(), 0.01, update_period=5))
    head = next(iter(one.model.parameters()))
    updated = []
    for t, batch in enumerate(one.batches(23)):
        before = one.optimizer.state[head]["weight_0"].clone() if t else torch.zeros(())
        one.go([batch])
        if not torch.equal(before, one.optimizer.state[head]["weight_0"]):
            updated.append(t)
    assert updated == [*range(10), 10, 15, 20]


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


def test_gradients_so_small_that_momenta_are_subnormal_lose_the_digits_that_these_lack(walk):
    def momenta(exponent: int) -> Tensor:
        """Of 25 steps, divided by the scale of the gradients."""
        g = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.zeros(s)) for s in [(12,), (7, 5), (6, 4, 3, 3), (1, 8), (), (9, 40)]]
        steps = [
            [torch.ldexp(torch.randn(p.shape, generator=g), torch.tensor(exponent)) for p in params] for _ in range(25)
        ]
        optimizer, out = OnlineNGD(params, 0.0), []
        for _ in walk(params, optimizer, steps):
            buffers = [optimizer.state[p]["momentum_buffer"].double() for p in params]
            out += [torch.ldexp(m, torch.tensor(-exponent)).flatten() for m in buffers]
        return torch.cat(out)

    tiny, normal = momenta(-140), momenta(0)
    step = 2.0 ** (-149 + 140)  # between neighbouring subnormal numbers
    assert (tiny - normal).abs().max() < 30 * step
    assert (tiny - normal).abs().max() > 0
