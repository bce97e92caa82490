import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from agents import NPG, TRPO
from agents.afterstate import AfterstatePolicy, afterstate_logits
from envs import make_vec_env
from npg.families import Categorical
from npg.fisher import Fisher


def observations(games=5, features="bertsekas", steps=12):
    """Boards a few random placements into their games."""
    env = gym.make_vec("npg/Tetris-v0", games, features=features)
    rng = np.random.default_rng(0)
    boards, _ = env.reset(seed=0)
    for _ in range(steps):
        boards, *_ = env.step(np.array([rng.choice(np.flatnonzero(o[:, 0])) for o in boards]))
    return torch.as_tensor(boards)


def test_probability_goes_to_legal_actions_alone_in_proportion_to_exp_theta_phi():
    boards = observations().double()
    theta = torch.randn(22, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = afterstate_logits(boards, theta).softmax(-1)
    weights = torch.exp(boards[..., 1:] @ theta) * boards[..., 0]
    torch.testing.assert_close(p, weights / weights.sum(-1, keepdim=True))
    assert (p[boards[..., 0] == 0] == 0).all()
    assert 0 < int((boards[..., 0] == 0).sum()) < boards[..., 0].numel()


def test_fisher_is_the_covariance_of_the_features_of_the_chosen_afterstate():
    """F = E[∇log π ∇log πᵀ] with ∇log π(a; s) = φ_sa − E_π φ, summed over every action by hand."""
    boards = observations().double()
    theta = 0.1 * torch.randn(22, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fisher = Fisher(
        lambda parameters, x: afterstate_logits(x, parameters["theta"]),
        boards,
        Categorical(),
        parameters={"theta": theta},
    ).dense()
    expected = torch.zeros(22, 22, dtype=torch.float64)
    for board in boards:
        p = afterstate_logits(board, theta).softmax(-1)
        phi = board[:, 1:]
        score = phi - p @ phi
        expected += sum(p[a] * torch.outer(score[a], score[a]) for a in range(len(p))) / len(boards)
    torch.testing.assert_close(fisher, expected, rtol=1e-10, atol=1e-10)
    assert fisher[-1].abs().max() < 1e-12  # the constant feature is the null space, and damping covers it


@pytest.mark.parametrize("algorithm", [NPG, TRPO])
def test_agents_move_theta_within_the_trust_region_and_play_legally(algorithm, tmp_path):
    env = make_vec_env("npg/Tetris-v0", 16, seed=0, env_kwargs={"height": 8})
    agent = algorithm(AfterstatePolicy, env, n_steps=16, target_kl=0.01, cg_damping=1e-3, seed=0, device="cpu")
    before = agent.policy.theta.detach().clone()
    assert (before == 0).all()
    agent.learn(3 * 16 * 16)
    after = agent.policy.theta.detach()
    assert torch.isfinite(after).all()
    assert (after != before).any()
    assert 0 < agent.logger.name_to_value["train/predicted_kl"] <= 0.0101
    env.seed(5)
    seen = env.reset()
    action, _ = agent.predict(seen, deterministic=True)
    logits = np.where(seen[..., 0] != 0, seen[..., 1:] @ after.numpy(), -np.inf)
    np.testing.assert_allclose(logits[np.arange(16), action], logits.max(axis=1), rtol=1e-5)
    agent.save(tmp_path / "agent")
    torch.testing.assert_close(algorithm.load(tmp_path / "agent", device="cpu").policy.theta, agent.policy.theta)


def test_ten_natural_steps_multiply_the_score():
    """From θ = 0, where games end with hardly a row, the policy gradient must learn to clear rows."""
    from envs.tetris import play

    env = make_vec_env("npg/Tetris-v0", 64, seed=0, env_kwargs={"height": 8})
    agent = NPG(
        AfterstatePolicy, env, n_steps=32, target_kl=0.05, cg_damping=1e-3, critic="natural", seed=0, device="cpu"
    )
    agent.learn(10 * 64 * 32)
    theta = agent.policy.theta.detach().numpy()
    lines, _ = play(theta, 50, seed=1, height=8, greedy=False)
    random, _ = play(np.zeros(9), 50, seed=1, height=8, greedy=False)
    assert random.mean() < 0.5
    assert lines.mean() > 2


def test_other_environments_are_refused():
    with pytest.raises(ValueError, match=r"AfterstatePolicy needs observations of shape \(actions, 1 \+ features\)"):
        NPG(AfterstatePolicy, "CartPole-v1", device="cpu")
