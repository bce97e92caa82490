import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

import envs  # noqa: F401
from envs import lqr

SCALES = [(1.0, 1.0), (10.0, 1.0), (1.0, 10.0), (0.3, 7.0)]
POLICIES = [(-0.8, -0.8), (-2.0, 0.5), (-0.3, -0.4), (-5.0, -7.0)]  # (θ₁s₁, θ₂s₂)


def thetas():
    return [(np.array(p) / np.array(s), s) for p in POLICIES for s in SCALES]


def moments_by_recursion(theta, scales):
    """E x(t)² for t = 0, …, 20 one step after the other, in torch: the slow twin of the closed form."""
    a, b = theta[0] * scales[0], theta[1] * scales[1]
    k, v = -b / (2 * a), -1 / (2 * a)
    moments = [torch.zeros((), dtype=torch.float64)]
    for _ in range(20):
        moments.append((0.7 + k) ** 2 * moments[-1] + 1 + v)
    return moments, k, v


@pytest.mark.parametrize(("theta", "scales"), thetas())
def test_cost_and_gradient_match_autograd_through_the_recursion(theta, scales):
    t = torch.tensor(theta, requires_grad=True)
    moments, _, _ = moments_by_recursion(t, scales)
    total = sum(moments[1:])
    (expected,) = torch.autograd.grad(total, t)
    assert lqr.cost(theta, scales) == pytest.approx(total.item(), rel=1e-12)
    np.testing.assert_allclose(lqr.gradient(theta, scales), expected, rtol=1e-10)


@pytest.mark.parametrize(("theta", "scales"), thetas())
def test_fisher_is_the_mean_hessian_of_the_log_partition(theta, scales):
    """For an exponential family the Fisher is the Hessian of log Z(θ | x), averaged over the states by quadrature."""
    moments, _, _ = moments_by_recursion(torch.tensor(theta), scales)
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)  # exact for the quadratic in x that occurs
    weights = weights / weights.sum()

    def log_partition(t, x):
        a, b = t[0] * scales[0], t[1] * scales[1] * x
        return -b * b / (4 * a) - 0.5 * torch.log(-a)

    expected = torch.zeros(2, 2, dtype=torch.float64)
    for second_moment in moments[:20]:
        for node, weight in zip(nodes, weights):
            x = node * second_moment.sqrt()
            H = torch.autograd.functional.hessian(lambda t, x=x: log_partition(t, x), torch.tensor(theta))
            expected += weight * H / 20
    np.testing.assert_allclose(lqr.fisher(theta, scales), expected, rtol=1e-11)


def test_start_and_optimum_are_the_papers():
    assert lqr.gain_and_variance(lqr.start((10.0, 1.0)), (10.0, 1.0)) == pytest.approx((-0.5, 0.625))
    assert lqr.cost(lqr.start()) == pytest.approx(33.78, abs=0.005)
    sharp = np.array([-1e9, -1.4e9])
    assert lqr.cost(sharp) == pytest.approx(20, abs=1e-6)


@pytest.mark.parametrize("scales", SCALES)
def test_natural_direction_is_the_same_policy_change_in_all_scales(scales):
    """Without damping, S·F⁻¹∇J does not depend on the scales; the plain gradient S·∇J does."""

    def change(direction, s):
        return np.array(s) * direction(lqr.start(s), s)

    def natural(t, s):
        return np.linalg.solve(lqr.fisher(t, s), lqr.gradient(t, s))

    np.testing.assert_allclose(change(natural, scales), change(natural, (1.0, 1.0)), rtol=1e-10)
    if scales != (1.0, 1.0):
        assert not np.allclose(change(lqr.gradient, scales), change(lqr.gradient, (1.0, 1.0)), rtol=0.5)


def test_a_policy_without_density_is_refused():
    with pytest.raises(ValueError, match=r"theta\[0\] \* scales\[0\] must be negative"):
        lqr.cost([0.1, 0.0])


def test_monte_carlo_agrees_with_cost_gradient_and_fisher():
    n = 40_000
    theta, scales = np.array([-0.8, -0.8]), (1.0, 1.0)
    k, v = lqr.gain_and_variance(theta, scales)
    env = gym.make_vec("npg/LQR-v0", n)
    x, _ = env.reset(seed=3)
    rng = np.random.default_rng(4)
    costs, scores, outer = np.zeros(n), np.zeros((n, 2)), np.zeros((n, 2, 2))
    for t in range(20):
        x = x[:, 0].astype(np.float64)
        mean = k * x
        u = mean + np.sqrt(v) * rng.standard_normal(n)
        score = np.stack([u * u - mean**2 - v, x * (u - mean)], axis=1)
        scores += score
        outer += score[:, :, None] * score[:, None, :] / 20
        x, reward, terminated, truncated, _ = env.step(u[:, None].astype(np.float32))
        costs -= reward
        assert (terminated == (t == 19)).all()
        assert not truncated.any()
    for sample, exact in (
        (costs, lqr.cost(theta, scales)),
        ((costs - costs.mean())[:, None] * scores, lqr.gradient(theta, scales)),
        (outer, lqr.fisher(theta, scales)),
    ):
        error = sample.std(axis=0) / np.sqrt(n)  # the episodes are independent
        assert (np.abs(sample.mean(axis=0) - exact) < 4.5 * error).all()


def test_checkers_accept_it():
    gymnasium_check(gym.make("npg/LQR-v0").unwrapped, skip_render_check=True)
    with pytest.warns(UserWarning, match="normalized Box action space"):
        sb3_check(gym.make("npg/LQR-v0"))


@pytest.mark.parametrize("mode", ["human", "ansi", "rgb_array"])
def test_rendering_follows_the_state(mode, capsys):
    env = gym.make("npg/LQR-v0", render_mode=mode)
    env.reset(seed=0)
    first = env.render()
    x = env.step(np.array([3.0], dtype=np.float32))[0][0]
    second = env.render()
    if mode == "rgb_array":
        assert second.shape == (64, 256, 3)
        assert (first != second).any()
    else:
        shown = capsys.readouterr().out if mode == "human" else second
        assert f"x={x:+7.3f}" in shown


@pytest.mark.parametrize("action", [np.nan, np.inf, 101.0])
def test_bad_action_is_named_and_moves_nothing(action):
    env = gym.make_vec("npg/LQR-v0", 2)
    before, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action must be a finite number in .* in copy 1"):
        env.step(np.array([[0.0], [action]], dtype=np.float32))
    np.testing.assert_array_equal(env.unwrapped.batch.observe(), before)


def test_step_after_the_end_is_an_error():
    env = gym.make("npg/LQR-v0").unwrapped
    env.reset(seed=0)
    for _ in range(20):
        env.step(np.zeros(1, dtype=np.float32))
    with pytest.raises(ValueError, match="the episode is over"):
        env.step(np.zeros(1, dtype=np.float32))
