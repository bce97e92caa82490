"""The rollout buffer against Stable-Baselines3's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common import buffers

from agents.buffer import RolloutBuffer

STEPS, ENVS = 20, 3
SPACES = {
    "vector, Box": (spaces.Box(-1.0, 1.0, (4,), np.float32), spaces.Box(-1.0, 1.0, (2,), np.float32)),
    "image, Discrete": (spaces.Box(0, 255, (2, 5, 5), np.uint8), spaces.Discrete(3)),
    "discrete, MultiBinary": (spaces.Discrete(6), spaces.MultiBinary(4)),
}


def both(case: str) -> list[buffers.RolloutBuffer]:
    """Stable-Baselines3's buffer and ours with the same steps, values and advantages."""
    observation_space, action_space = SPACES[case]
    filled = []
    for cls in (buffers.RolloutBuffer, RolloutBuffer):
        rng = np.random.default_rng(0)
        observation_space.seed(0)
        action_space.seed(0)
        buffer = cls(STEPS, observation_space, action_space, "cpu", gae_lambda=0.9, gamma=0.97, n_envs=ENVS)
        nothing = torch.zeros(ENVS)
        for _ in range(STEPS):
            observations = np.stack([observation_space.sample() for _ in range(ENVS)])
            actions = np.stack([action_space.sample() for _ in range(ENVS)])
            step = (observations, actions, rng.normal(size=ENVS).astype(np.float32), rng.random(ENVS) < 0.2)
            if isinstance(buffer, RolloutBuffer):
                buffer.observe(observations, step[3])
                buffer.record(*step[1:3])
            else:
                buffer.add(*step, nothing, nothing)
        buffer.values[:] = rng.normal(size=(STEPS, ENVS))
        buffer.log_probs[:] = rng.normal(size=(STEPS, ENVS))
        buffer.compute_returns_and_advantage(torch.tensor([0.5, -1.0, 2.0]), np.array([True, False, False]))
        filled.append(buffer)
    return filled


@pytest.mark.parametrize("case", SPACES)
def test_arrays_equal_those_of_stable_baselines3(case):
    theirs, ours = both(case)
    assert ours.full
    for name in ("observations", "actions", "rewards", "episode_starts", "values", "log_probs"):
        a, b = getattr(theirs, name), getattr(ours, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    for name in ("advantages", "returns"):
        assert getattr(ours, name).dtype == np.float32
        np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", SPACES)
def test_the_whole_batch_has_the_rows_of_stable_baselines3s(case):
    theirs, ours = both(case)
    batches = [next(buffer.get(None)) for buffer in (theirs, ours)]

    def rows(batch: buffers.RolloutBufferSamples) -> np.ndarray:
        columns = np.concatenate([np.asarray(t, np.float64).reshape(STEPS * ENVS, -1) for t in batch], 1)
        return columns[np.lexsort(columns.T)]

    assert [t.dtype for t in batches[0]] == [t.dtype for t in batches[1]]
    np.testing.assert_allclose(rows(batches[0]), rows(batches[1]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(batches[1].old_values), ours.values.flatten())  # in the order of steps


def test_mini_batches_are_shuffled_and_cover_the_rollout():
    _, ours = both("vector, Box")
    parts = list(ours.get(16))
    assert [len(part.returns) for part in parts] == [16, 16, 16, 12]
    together = torch.cat([part.old_log_prob for part in parts]).numpy()
    assert not np.array_equal(together, ours.log_probs.flatten())
    np.testing.assert_array_equal(np.sort(together), np.sort(ours.log_probs.flatten()))


@pytest.mark.parametrize("case", SPACES)
def test_mini_batches_that_a_callback_looks_at_change_nothing(case):
    """Stable-Baselines3's reshapes its arrays to (n · steps, …); what stands beside ours is in the order of steps."""
    _, ours = both(case)

    def columns(batch: buffers.RolloutBufferSamples) -> np.ndarray:
        observations, *others = batch
        parts = [*observations.values()] if isinstance(observations, dict) else [observations]
        return np.concatenate([np.asarray(t, np.float64).reshape(len(batch.returns), -1) for t in (*parts, *others)], 1)

    before = columns(next(ours.get(None)))
    seen = np.concatenate([columns(batch) for batch in ours.get(16)])
    np.testing.assert_array_equal(columns(next(ours.get(None))), before)
    np.testing.assert_array_equal(seen[np.lexsort(seen.T)], before[np.lexsort(before.T)])
    assert ours.advantages.shape == (STEPS, ENVS)


def test_an_incomplete_rollout_is_refused():
    buffer = RolloutBuffer(STEPS, *SPACES["vector, Box"], n_envs=ENVS)
    with pytest.raises(AssertionError, match="not complete"):
        next(buffer.get(None))
