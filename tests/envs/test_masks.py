"""The adapter that makes masks a part of the observation."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env import VecNormalize as TheirVecNormalize

from envs import ActionMasks, VecNormalize, make_vec_env
from envs.masks import check_masks, mask_sizes, with_one_allowed


class Masked(gym.Env):
    """The observation counts steps; the mask shifts with them, and an episode has three."""

    observation_space: spaces.Space = spaces.Box(0.0, 9.0, (2,), np.float32)

    def __init__(self, action_space: Any = None, mask: Any = None) -> None:
        self.action_space, self.mask = action_space or spaces.Discrete(3), mask

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self._observe(), 1.0, False, self.steps == 3, {}

    def _observe(self) -> Any:
        return np.full(2, self.steps, np.float32)

    def action_masks(self) -> Any:
        return np.arange(3) <= self.steps if self.mask is None else self.mask(self.steps)


class Inside(Masked):
    """The same, with the mask in the observation."""

    observation_space = spaces.Dict({"x": Masked.observation_space, "action_mask": spaces.Box(0, 1, (3,), np.float32)})
    action_masks: Any = property()  # none

    def _observe(self) -> Any:
        return {"x": super()._observe(), "action_mask": np.float32(Masked.action_masks(self))}


def vec(cls: Any = Masked, n: int = 2, **options: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda: Monitor(cls(**options))] * n)


def test_masks_come_with_the_observations_of_their_step():
    env = ActionMasks(vec())
    assert env.observation_space["action_mask"] == spaces.MultiBinary(3)
    assert env.observation_space["observation"] == Masked.observation_space
    observations: Any = env.reset()
    for step in (0, 1, 2, 0, 1):
        assert env.observation_space.contains({k: v[1] for k, v in observations.items()})
        np.testing.assert_array_equal(observations["observation"], np.full((2, 2), step))
        np.testing.assert_array_equal(observations["action_mask"], [[1, step > 0, step > 1]] * 2)
        observations, _, dones, infos = env.step(np.zeros(2, int))
        assert dones.tolist() == [step == 2] * 2
        if dones.any():
            last = infos[0]["terminal_observation"]
            np.testing.assert_array_equal(last["observation"], [3, 3])
            np.testing.assert_array_equal(last["action_mask"], [1, 1, 1])


def test_a_mask_in_the_observation_stays_as_it_is():
    env, bare = ActionMasks(vec(Inside)), vec(Inside)
    assert env.observation_space == bare.observation_space
    a, b = env.reset(), bare.reset()
    for _ in range(5):
        for key in b:
            np.testing.assert_array_equal(a[key], b[key])
        a, b = env.step(np.zeros(2, int))[0], bare.step(np.zeros(2, int))[0]


def test_the_method_of_a_vector_environment_is_asked():
    env = ActionMasks(make_vec_env("npg/ConnectFour-v0", 3, seed=0))
    observations: Any = env.reset()
    assert observations["action_mask"].shape == (3, 7)
    assert observations["observation"].shape == (3, 2, 6, 7)
    column = np.zeros(3, int)
    while observations["action_mask"][:, 0].all():
        observations, *_ = env.step(column)
    full = observations["action_mask"][:, 0] == 0
    assert observations["observation"][full, :, -1, 0].sum(1).tolist() == [1] * full.sum()


def test_our_vec_normalize_leaves_the_mask_out():
    env = VecNormalize(vec(Inside))
    assert env.norm_obs_keys == ["x"]
    observations: Any = env.reset()
    assert set(np.unique(observations["action_mask"])) <= {0.0, 1.0}
    with pytest.raises(ValueError, match=r"norm_obs_keys.*leave it out"):
        VecNormalize(vec(Inside), norm_obs_keys=["x", "action_mask"])


def test_a_normalised_mask_is_refused():
    with pytest.raises(ValueError, match=r"environment 0 has the value .*norm_obs_keys"):
        ActionMasks(TheirVecNormalize(vec(Inside))).reset()


@pytest.mark.parametrize(
    ("space", "sizes"),
    [
        (spaces.Discrete(4), (4,)),
        (spaces.MultiDiscrete([2, 3]), (2, 3)),
        (spaces.MultiBinary(3), (2, 2, 2)),
    ],
)
def test_entries_of_a_mask(space, sizes):
    assert mask_sizes(space) == sizes
    mask = np.zeros((2, sum(sizes)), bool)
    mask[0] = True
    np.testing.assert_array_equal(with_one_allowed(mask, sizes), np.ones_like(mask))
    check_masks(mask[:1], sizes, "")
    with pytest.raises(ValueError, match="environment 1 allows nothing"):
        check_masks(mask, sizes, "")


def test_only_what_had_nothing_left_is_allowed():
    masks = np.array([[0, 0, 0, 1, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(with_one_allowed(masks, (2, 3)), [[1, 1, 0, 1, 0], [1, 0, 1, 1, 1]])


def test_a_state_without_a_legal_action_is_named_with_its_environment_and_step():
    env = ActionMasks(
        DummyVecEnv([Masked, lambda: Masked(mask=lambda step: [step < 2, 0, 0]), Masked]),
    )
    env.reset()
    env.step(np.zeros(3, int))
    with pytest.raises(ValueError, match=r"environment 1 allows nothing in step 2: allow an action, or end"):
        env.step(np.zeros(3, int))


def test_a_component_without_a_legal_value_is_named():
    env = ActionMasks(vec(action_space=spaces.MultiDiscrete([2, 3]), mask=lambda step: [1, 1, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"environment 0 allows nothing for component 1 of the action after the reset"):
        env.reset()


@pytest.mark.parametrize("mask", [[1, 1], np.ones((3, 2)), 1])
def test_a_mask_of_another_shape_is_refused_before_the_first_step(mask):
    with pytest.raises(ValueError, match=r"environment 0 returns an array of shape .* needs one of 3 entries"):
        ActionMasks(vec(mask=lambda step: mask)).reset()


def test_a_mask_with_other_values_is_refused():
    with pytest.raises(ValueError, match=r"environment 0 has the value 0.5 after the reset: it must be 1"):
        ActionMasks(vec(mask=lambda step: [1.0, 0.5, 0.0])).reset()


def test_environments_without_masks_or_discrete_actions_are_refused():
    with pytest.raises(ValueError, match=r"no method action_masks.*ActionMasker"):
        ActionMasks(make_vec_env("CartPole-v1", 1, backend="gymnasium"))
    with pytest.raises(ValueError, match="not for Box"):
        ActionMasks(vec(action_space=spaces.Box(-1, 1, (2,))))
    with pytest.raises(ValueError, match=r"action_mask is a Box.*needs a MultiBinary\(4\)"):
        ActionMasks(vec(Inside, action_space=spaces.Discrete(4)))
