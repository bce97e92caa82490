"""An environment of noise, and small agents in many of it, which several files take."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import CPO, MDPO, NPG, TRPO

ALGORITHMS = [NPG, TRPO, MDPO, CPO]
BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)
#: Of the plain policy.
OPTIONS: list[dict[str, Any]] = [
    {"metric": "wasserstein"},
    {"metric": "euclidean"},
    {"preconditioner": "kfac"},
    {"preconditioner": "diagonal"},
    {"critic": "natural"},
    {"policy_kwargs": {"share_features_extractor": False}},
]


class Noise(gym.Env):
    """Observations say nothing; an episode ends by chance, or after 25 steps by its time. To be paid costs 1."""

    def __init__(self, action_space: spaces.Space, space: spaces.Space = BOX) -> None:
        self.action_space, self.observation_space = action_space, space

    def _observe(self) -> Any:
        return self.observation_space.sample()

    def _reward(self, action: Any) -> float:
        raise NotImplementedError

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        reward = self._reward(action)
        self.steps += 1
        over = bool(self.np_random.random() < 0.05)
        return self._observe(), reward, over, not over and self.steps == 25, {"cost": float(reward > 0)}


def vec(cls: Any, *args: Any, n: int = 2, **options: Any) -> DummyVecEnv:
    env = DummyVecEnv([lambda: cls(*args, **options)] * n)
    env.seed(0)
    return env


def agent(env: Any, cls: Any = TRPO, policy: Any = "MlpPolicy", **options: Any) -> Any:
    options = {"n_steps": 32, "batch_size": 32, "n_critic_updates": 2, "seed": 0, "device": "cpu", **options}
    return cls(policy, env, **options)


def parameters(model: Any) -> list[torch.Tensor]:
    return [p.detach() for p in model.policy.parameters()]
