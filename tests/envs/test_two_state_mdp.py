import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check
from scipy.special import expit
from stable_baselines3.common.env_checker import check_env as sb3_check

import envs  # noqa: F401
from envs import two_state_mdp as mdp

THETAS = np.random.default_rng(0).normal(scale=2.0, size=(20, 2))


def transition_matrix(theta):
    stay = expit(theta)
    return np.array([[stay[0], 1 - stay[0]], [1 - stay[1], stay[1]]])


@pytest.mark.parametrize("theta", THETAS[:5])
def test_stationary_distribution_is_the_left_eigenvector(theta):
    rho = mdp.stationary_distribution(theta)
    np.testing.assert_allclose(rho @ transition_matrix(theta), rho, atol=1e-14)
    assert rho.sum() == pytest.approx(1, abs=1e-14)


def test_start_is_the_papers():
    np.testing.assert_allclose(mdp.stationary_distribution(mdp.START), [9 / 11, 2 / 11], atol=1e-14)
    assert mdp.average_reward(mdp.START) == pytest.approx(9 / 11 * 0.8 + 2 / 11 * 0.2, abs=1e-14)


def test_gradient_matches_autograd_of_the_average_reward():
    theta = torch.tensor(THETAS, requires_grad=True)
    stay, leave = torch.sigmoid(theta), torch.sigmoid(-theta)
    reward = (leave.flip(-1) * stay * torch.tensor([1.0, 2.0])).sum(-1) / leave.sum(-1)
    (expected,) = torch.autograd.grad(reward.sum(), theta)
    np.testing.assert_allclose(mdp.average_reward(THETAS), reward.detach(), rtol=1e-13)
    np.testing.assert_allclose(mdp.gradient(THETAS), expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("theta", THETAS[:5])
def test_advantages_solve_the_average_reward_bellman_equation(theta):
    stay, P, eta = expit(theta), transition_matrix(theta), mdp.average_reward(theta)
    rewards = stay * mdp.REWARDS
    # (I − P) h = r − η has a one-dimensional null space; pin it by h_j = 0.
    h = np.array([(rewards[0] - eta) / (1 - P[0, 0]), 0.0])
    np.testing.assert_allclose(h + eta, rewards + P @ h, atol=1e-12)
    q_stay = mdp.REWARDS - eta + h
    q_cross = -eta + h[::-1]
    np.testing.assert_allclose(mdp.advantage(theta), q_stay - q_cross, atol=1e-11)


@pytest.mark.parametrize("theta", THETAS[:5])
def test_fisher_is_the_expected_outer_product_of_scores(theta):
    stay, rho = expit(theta), mdp.stationary_distribution(theta)
    total = np.zeros((2, 2))
    for s in range(2):
        for action, probability in ((1, stay[s]), (0, 1 - stay[s])):
            score = np.zeros(2)
            score[s] = action - stay[s]
            total += rho[s] * probability * np.outer(score, score)
    np.testing.assert_allclose(np.diag(mdp.fisher(theta)), total, atol=1e-15)


def test_natural_gradient_weighs_the_states_alike_and_the_gradient_by_their_visits():
    """The plain gradient carries ρ(s); the natural one is the advantage alone (Kakade 2001, section 4)."""
    stay = expit(THETAS)
    np.testing.assert_allclose(
        mdp.gradient(THETAS),
        mdp.stationary_distribution(THETAS) * stay * (1 - stay) * mdp.advantage(THETAS),
        rtol=1e-12,
    )
    np.testing.assert_allclose(mdp.gradient(THETAS) / mdp.fisher(THETAS), mdp.advantage(THETAS), rtol=1e-12)


def test_monte_carlo_agrees_with_the_exact_reward_and_occupancy():
    n, burn_in, steps = 4000, 40, 100
    env = gym.make_vec("npg/TwoStateMDP-v0", n, max_episode_steps=None)
    state, _ = env.reset(seed=1)
    rng = np.random.default_rng(2)
    rewards, occupancy = np.zeros(n), np.zeros(n)
    for t in range(burn_in + steps):
        now = state
        state, reward, *_ = env.step((rng.random(n) < expit(mdp.START)[now]).astype(np.int64))
        if t >= burn_in:
            rewards += reward / steps
            occupancy += (now == 0) / steps
    # The copies are independent, so the error of the mean over copies is their spread / √n; four of them.
    for sample, exact in (
        (rewards, mdp.average_reward(mdp.START)),
        (occupancy, mdp.stationary_distribution(mdp.START)[0]),
    ):
        assert abs(sample.mean() - exact) < 4 * sample.std() / np.sqrt(n)


def test_checkers_accept_it():
    gymnasium_check(gym.make("npg/TwoStateMDP-v0").unwrapped, skip_render_check=True)
    sb3_check(gym.make("npg/TwoStateMDP-v0"))


@pytest.mark.parametrize("mode", ["ansi", "rgb_array"])
def test_rendering_shows_the_state(mode):
    env = gym.make("npg/TwoStateMDP-v0", render_mode=mode)
    state, _ = env.reset(seed=0)
    before = env.render()
    env.step(0)
    after = env.render()
    if mode == "ansi":
        assert ("[i]" in before) == (state == 0)
        assert ("[i]" in after) == (state == 1)
    else:
        assert before.dtype == np.uint8
        assert before.shape == (64, 128, 3)
        assert (before != after).any()


def test_bad_action_is_named():
    env = gym.make("npg/TwoStateMDP-v0", disable_env_checker=True)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action must be 0"):
        env.step(2)


def test_time_limit_truncates_and_never_terminates():
    env = gym.make("npg/TwoStateMDP-v0")
    env.reset(seed=0)
    ends = [env.step(1)[2:4] for _ in range(100)]
    assert ends[-1] == (False, True)
    assert not any(truncated for _, truncated in ends[:-1])
