"""Hybrid actions as vectors: nothing of an action is lost on the way to the environment and back."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from copy import deepcopy
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from agents.saved import plain_pickle
from envs.hybrid import FlatActions, HybridActions, is_hybrid
from envs.masks import mask_sizes
from envs.vec_env import VectorEnvAdapter

NESTED: Any = spaces.Dict(
    {
        "turn": spaces.Box(-1.0, 1.0, (2, 3), np.float64),
        "gear": spaces.Discrete(4, start=5),
        "more": spaces.Tuple(
            (
                spaces.MultiBinary([2, 2]),
                spaces.Box(-np.inf, np.inf, (), np.float32),
                spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 1], [-7, 2]]),
                spaces.Dict({"small": spaces.Discrete(3, dtype=np.uint8), "nothing": spaces.Dict({})}),
            )
        ),
    }
)


class Checked(gym.Env):
    """Refuses what is not of its space, and pays for the sum of all that it is given."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, space: Any = NESTED) -> None:
        self.action_space = space

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.taken: list[Any] = []
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.taken.append(action)
        return np.zeros(2, np.float32), 0.0, False, len(self.taken) == 3, {"action": action}


def same(a: Any, b: Any) -> bool:
    """Equal in structure, types and values."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a.dtype == b.dtype and np.shape(a) == np.shape(b) and bool(np.all(a == b))


def float32_like(action: Any) -> Any:
    """The action with reals that float32 holds."""
    if isinstance(action, dict):
        return {key: float32_like(part) for key, part in action.items()}
    if isinstance(action, tuple):
        return tuple(float32_like(part) for part in action)
    return action.astype(np.float32).astype(action.dtype) if action.dtype.kind == "f" else action


def test_actions_come_back_as_they_were():
    flat = FlatActions(NESTED)
    assert (flat.sizes, flat.bits, flat.reals, flat.shape) == ((4, 2, 3, 4, 5, 3), 4, 7, (17,))
    NESTED.seed(0)
    drawn = [float32_like(NESTED.sample()) for _ in range(200)]
    rows = np.stack([flat.flatten(action) for action in drawn])
    assert rows.dtype == np.float32
    assert all(row in flat for row in rows)
    for action, again in zip(drawn, flat.unflatten(rows), strict=True):
        assert NESTED.contains(again)
        assert same({**action}, again)
    assert (rows[:, : len(flat.sizes)].min(0) == 0).all()  # a choice counts from 0
    assert (rows[:, : len(flat.sizes)].max(0) == np.array(flat.sizes) - 1).all()


@pytest.mark.filterwarnings("error")
def test_reals_are_within_the_bounds_of_their_own_type():
    """0.1 in float32 is above 0.1 in float64."""
    space = spaces.Tuple((spaces.Box(-0.1, 0.1, (1,), np.float64), spaces.Box(-2.0, 3.0, (2,), np.float16)))
    flat = FlatActions(space)
    for value in (-1e30, -0.1, 0.1, 5.0):
        (action,) = flat.unflatten(np.full((1, 3), value, np.float32))
        assert space.contains(action)
    assert float(np.float32(0.1)) > 0.1


def test_unbounded_reals_have_no_bounds():
    flat = FlatActions(spaces.Tuple((spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(0.0, np.inf, (1,), np.float64))))
    assert np.isfinite(flat.low).all()
    assert np.isfinite(flat.high).all()
    (action,) = flat.unflatten(np.array([[-3e38, 1e30, 2e38]], np.float32))
    assert action[0].tolist() == [np.float32(-3e38), np.float32(1e30)]
    assert action[1][0] == np.float64(np.float32(2e38))
    assert flat.sample() in flat


def test_the_order_of_the_parts_is_that_of_the_space():
    """Gymnasium sorts the keys of a dict, and keeps those of an OrderedDict."""
    parts = [("b", spaces.Discrete(2)), ("a", spaces.Discrete(3))]
    assert FlatActions(spaces.Dict(dict(parts))).sizes == (3, 2)
    kept = FlatActions(spaces.Dict(OrderedDict(parts)))
    assert kept.sizes == (2, 3)
    assert kept.unflatten(np.array([[1.0, 2.0]])) == [{"b": 1, "a": 2}]
    ordered = FlatActions(spaces.Dict(dict(parts)))
    assert ordered.nested == kept.nested  # as Gymnasium has it
    assert ordered != kept
    assert ordered == FlatActions(spaces.Dict(OrderedDict(reversed(parts))))
    assert kept != FlatActions(spaces.Tuple([space for _, space in parts]))
    assert kept != spaces.Box(kept.low, kept.high)


def test_choices_then_bits_then_reals():
    space = spaces.Tuple((spaces.Box(-1, 1, (1,)), spaces.MultiBinary(1), spaces.Discrete(3), spaces.Box(-1, 1, (1,))))
    (action,) = FlatActions(space).unflatten(np.array([[2.0, 1.0, 0.25, -0.5]], np.float32))
    assert same(
        action,
        (np.array([0.25], np.float32), np.array([1], np.int8), np.int64(2), np.array([-0.5], np.float32)),
    )


def test_samples_depend_on_the_seed_alone():
    flat = FlatActions(deepcopy(NESTED))
    flat.seed(3)
    first = [flat.sample() for _ in range(5)]
    flat.nested.seed(77)
    flat.seed(3)
    np.testing.assert_array_equal(first, [flat.sample() for _ in range(5)])
    assert len(np.unique(first, axis=0)) == 5
    state = flat.np_random.bit_generator.state
    ahead = flat.sample()
    flat.np_random.bit_generator.state = state
    np.testing.assert_array_equal(ahead, flat.sample())


def test_it_is_copied_and_read_as_data():
    flat = FlatActions(NESTED)
    flat.seed(1)
    for again in (deepcopy(flat), pickle.loads(pickle.dumps(flat)), plain_pickle(pickle.dumps(flat))):
        assert again == flat
        assert again.leaves == flat.leaves
        np.testing.assert_array_equal(again.sample(), deepcopy(flat).sample())
    assert str(flat) == f"FlatActions({NESTED})"


# ------------------------------------------------------------------------------------------------------ environments


def vector(space: Any) -> VectorEnvAdapter:
    return VectorEnvAdapter(SyncVectorEnv([lambda: Checked(space)] * 2, autoreset_mode=AutoresetMode.SAME_STEP))


@pytest.mark.parametrize(
    "kind",
    [DummyVecEnv, partial(SubprocVecEnv, start_method="fork"), "gymnasium"],
    ids=["DummyVecEnv", "SubprocVecEnv", "gymnasium"],
)
def test_every_kind_of_environments_is_given_what_was_meant(kind):
    space: Any = NESTED
    if kind == "gymnasium":  # which has no vectors of an empty Dict
        space = spaces.Dict({"turn": NESTED["turn"], "more": spaces.Tuple(NESTED["more"].spaces[:3])})
    inner = vector(space) if kind == "gymnasium" else kind([Checked, Checked])
    env = HybridActions(inner)
    try:
        env.reset()
        space.seed(5)
        drawn = [float32_like(space.sample()) for _ in range(4)]
        rows = np.stack([env.action_space.flatten(action) for action in drawn])
        _, _, _, infos = env.step(rows[:2])
        if kind != "gymnasium":  # whose infos the adapter leaves out
            assert all(same({**drawn[i]}, infos[i]["action"]) for i in range(2))
        else:
            taken = [single.taken[0] for single in inner.vector_env.envs]
            np.testing.assert_array_equal([env.action_space.flatten(action) for action in taken], rows[:2])
        env.step(drawn[2:])  # as `predict` gives them
        _, _, dones, infos = env.step(rows[:2])
        assert dones.all()
        assert infos[0]["TimeLimit.truncated"]
        assert infos[0]["terminal_observation"].shape == (2,)
    finally:
        env.close()


def test_vectors_of_another_shape_or_with_other_values_are_refused():
    env = HybridActions(DummyVecEnv([lambda: Checked(spaces.Tuple((spaces.Discrete(3), spaces.MultiBinary(2))))] * 2))
    env.reset()
    with pytest.raises(ValueError, match=r"actions must have the shape \(2, 3\) for 2 environments .* got \(2, 4\)"):
        env.step(np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"must be 2, one for each environment, got 1"):
        env.step([(1, np.zeros(2, np.int8))])
    for bad in ([3.0, 0, 0], [-1.0, 0, 0], [0.5, 0, 0], [0, 2.0, 0], [0, 0, np.nan]):
        with pytest.raises(
            ValueError, match=r"first 3 columns of flat actions must be whole numbers from \[0. 0. 0.\]"
        ):
            env.step(np.array([[0.0, 0, 0], bad]))
    flat = env.action_space
    with pytest.raises(ValueError, match="action must be a tuple of 2 parts"):
        flat.flatten((1,))
    with pytest.raises(ValueError, match=r"action\['a'\] must be a dict with the keys \['b'\]"):
        FlatActions(spaces.Dict(a=spaces.Dict(b=spaces.Discrete(2)))).flatten({"a": {"c": 1}})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Tuple((spaces.Discrete(2), spaces.Text(3))), r"action_space\[1\] is Text.*Take one of these"),
        (spaces.Dict(a=spaces.Tuple((spaces.Sequence(spaces.Discrete(2)),))), r"action_space\['a'\]\[0\] is Sequence"),
        (spaces.Dict(a=spaces.Graph(spaces.Box(0, 1, (1,)), None)), r"action_space\['a'\] is Graph"),
        (spaces.Tuple((spaces.OneOf((spaces.Discrete(2),)),)), r"action_space\[0\] is OneOf"),
        (spaces.Tuple((spaces.Box(0, 9, (1,), np.int64),)), r"action_space\[0\] is Box.*Take MultiDiscrete"),
        (spaces.Tuple((spaces.Box(0, 255, (1,), np.uint8),)), "Take MultiDiscrete"),
        (spaces.Tuple((spaces.Discrete(2**24 + 1),)), "has at most 16777216 values"),
        (spaces.Tuple(()), "has no part: give it one"),
        (spaces.Dict({}), "has no part"),
        (spaces.Tuple((spaces.Dict({}), spaces.Box(0, 1, (0, 3)))), "has no part"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_spaces_are_refused_by_name(space, message):
    with pytest.raises(ValueError, match=message):
        FlatActions(space)


def test_flat_actions_need_nothing():
    assert not is_hybrid(spaces.Discrete(2))
    assert is_hybrid(NESTED)
    assert is_hybrid(FlatActions(NESTED))
    with pytest.raises(ValueError, match="are flat: HybridActions is for others"):
        HybridActions(DummyVecEnv([lambda: Checked(spaces.Discrete(2))]))
    with pytest.raises(ValueError, match="are flat"):
        HybridActions(HybridActions(DummyVecEnv([Checked])))


def test_masks_have_the_entries_of_the_discrete_parts_in_their_order():
    assert mask_sizes(NESTED) == (4, 2, 2, 2, 2, 2, 3, 4, 5, 3)
    assert mask_sizes(FlatActions(NESTED)) == mask_sizes(NESTED)
    with pytest.raises(ValueError, match="not for Tuple"):
        mask_sizes(spaces.Tuple((spaces.Box(0, 1, (2,)),)))
