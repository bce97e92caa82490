"""The rollout buffer of Stable-Baselines3, for rollouts that are evaluated once they are complete."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common import buffers
from stable_baselines3.common.type_aliases import RolloutBufferSamples

__all__ = ["DictRolloutBuffer", "RolloutBuffer", "advantages_of", "random_part", "rows", "stacked"]


def rows(observations: Any, index: Any) -> Any:
    """These rows of observations, which are a tensor, an array on the host, or a dict of such."""
    if isinstance(observations, dict):
        return {key: rows(value, index) for key, value in observations.items()}
    if isinstance(observations, np.ndarray) and isinstance(index, torch.Tensor):
        index = index.cpu().numpy()
    return observations[index]


def stacked(observations: Sequence[Any]) -> Any:
    """Observations of single environments as those of several."""
    first = observations[0]
    if isinstance(first, dict):
        return {key: np.stack([observation[key] for observation in observations]) for key in first}
    return np.stack(observations)


def random_part(observations: Any, fraction: float) -> Any:
    """That fraction of the rows, drawn at random because a rollout is in the order of time; None for all rows."""
    if fraction == 1:
        return None
    first = next(iter(observations.values())) if isinstance(observations, dict) else observations
    order = torch.randperm(len(first), device=first.device)
    return rows(observations, order[: max(1, round(fraction * len(first)))])


def advantages_of(
    rewards: NDArray[np.float32],
    values: NDArray[np.float32],
    final: NDArray[np.float32],
    alive: NDArray[np.float32],
    gamma: float,
    gae_lambda: float,
) -> NDArray[np.float32]:
    """Generalised advantage estimation, Â_t = δ_t + γλ Â_{t+1} within an episode.

    Args:
        rewards: (steps, n).
        values: of the observations that were acted on, (steps, n).
        final: of those after the last step, (1, n).
        alive: 1 where the episode goes on after the step, and 0 where it ends with it, (steps, n).
        gamma: γ.
        gae_lambda: λ.
    """
    delta = rewards + gamma * np.concatenate([values[1:], final]) * alive - values
    decay = gamma * gae_lambda * alive
    advantages, advantage = np.zeros_like(rewards), np.zeros(rewards.shape[1], np.float32)
    for step in reversed(range(len(rewards))):
        advantages[step] = advantage = delta[step] + decay[step] * advantage
    return advantages


class RolloutBuffer(buffers.RolloutBuffer):
    """Steps of n environments, to which values and log-likelihoods are given afterwards, and which are used whole.

    It holds the same arrays as Stable-Baselines3's, with the same meaning.
    """

    def observe(self, observations: Any, episode_starts: NDArray[Any]) -> None:
        """Store what every environment shows before the next step."""
        step, stored = self.pos, self.observations
        parts = ((stored[k], observations[k]) for k in stored) if isinstance(stored, dict) else [(stored, observations)]
        for array, values in parts:
            array[step] = np.reshape(values, array.shape[1:])
        self.episode_starts[step] = episode_starts

    def record(self, actions: NDArray[Any], rewards: NDArray[Any]) -> None:
        """Store that step of every environment."""
        step = self.pos
        self.actions[step] = actions.reshape(self.n_envs, self.action_dim)
        self.rewards[step] = rewards
        self.pos = step + 1
        self.full = self.pos == self.buffer_size

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: NDArray[Any]) -> None:
        """`advantages_of` the steps, and the returns Â + V."""
        final = last_values.detach().cpu().numpy().reshape(1, -1)
        self.advantages = advantages_of(
            self.rewards, self.values, final, self.alive(dones), self.gamma, self.gae_lambda
        )
        self.returns = self.advantages + self.values

    def alive(self, dones: NDArray[Any]) -> NDArray[np.float32]:
        """1 where the episode goes on after a step, (steps, n); ``dones`` are those of the last step, (n,)."""
        ends = np.concatenate([self.episode_starts[1:], dones.astype(np.float32).reshape(1, -1)])
        return np.float32(1) - ends

    def get(self, batch_size: int | None = None) -> Generator[RolloutBufferSamples, None, None]:
        """Shuffled mini-batches; or, without a size, everything once and in the order of its steps.

        Its arrays stay (steps, n, …), where Stable-Baselines3 reshapes its own: who looks at mini-batches in a callback
        must not change the order of what is learned from afterwards.
        """
        assert self.full, "the rollout is not complete"

        def flat(array: Any) -> Any:
            if isinstance(array, dict):
                return {key: flat(part) for key, part in array.items()}
            return self.to_torch(array.reshape(-1, *array.shape[2:]), copy=False)

        actions = self.actions.astype(np.float32, copy=False)
        every = [*map(flat, (self.observations, actions, self.values, self.log_probs, self.advantages, self.returns))]
        if batch_size is None:
            yield RolloutBufferSamples(*every)
            return
        order = np.random.permutation(self.buffer_size * self.n_envs)  # noqa: NPY002  # as there, by the agent's seed
        for some in torch.from_numpy(order).split(batch_size):
            yield RolloutBufferSamples(*(rows(part, some) for part in every))


class DictRolloutBuffer(RolloutBuffer, buffers.DictRolloutBuffer):  # type: ignore[misc]  # its samples are dicts
    """`RolloutBuffer` for observations that are a Dict."""
