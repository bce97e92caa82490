"""Action masks: which actions a state allows, as one more part of its observation."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from envs.hybrid import is_hybrid, leaves

__all__ = ["ACTION_MASK", "ActionMasks", "check_masks", "gives_masks", "mask_sizes", "with_one_allowed"]

ACTION_MASK = "action_mask"
"""The name of the mask in a Dict of observations: 1 where an action is allowed, and 0 where it is forbidden."""


def mask_sizes(space: spaces.Space[Any]) -> tuple[int, ...]:
    """How many entries of a mask each choice has: n of Discrete(n), those of each in MultiDiscrete, 2 of every bit.

    Those of a Tuple or Dict are those of its discrete parts, in its order.

    Raises:
        ValueError: for a space whose actions cannot be masked.
    """
    if is_hybrid(space):
        parts = [part for _, part in leaves(getattr(space, "nested", space)) if not isinstance(part, spaces.Box)]
        if parts:
            return tuple(size for part in parts for size in mask_sizes(part))
    if isinstance(space, spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec.flat)
    if isinstance(space, spaces.MultiBinary):
        return (2,) * int(np.prod(space.shape))
    raise ValueError(f"action masks are for Discrete, MultiDiscrete and MultiBinary actions, not for {space}")


def gives_masks(venv: VecEnv) -> bool:
    """Whether the environments say which actions are allowed, by `action_masks` or in their observations."""
    space = venv.observation_space
    if isinstance(space, spaces.Dict) and ACTION_MASK in space.spaces:
        return True
    try:
        return venv.has_attr("action_masks")
    except (AttributeError, NotImplementedError):
        return False


def _allowed(masks: NDArray[Any], sizes: tuple[int, ...]) -> NDArray[np.bool_]:
    """Of which choices an action is allowed; (n, sum(sizes)) → (n, choices)."""
    return np.logical_or.reduceat(masks != 0, np.cumsum((0, *sizes[:-1])), axis=1)


def check_masks(masks: NDArray[Any], sizes: tuple[int, ...], where: str, names: str = "environment") -> None:
    """Refuse masks with another value than 0 and 1, or that leave no action.

    Args:
        masks: (n, sum(sizes)).
        sizes: as of `mask_sizes`.
        where: in which step they are, for the message.
        names: what the rows are.

    Raises:
        ValueError: it names the first row that is wrong.
    """
    if masks.dtype.kind != "b" and not (good := (masks == 0) | (masks == 1)).all():
        row = int(np.flatnonzero(~good.all(1))[0])
        value = masks[row][~good[row]][0]
        raise ValueError(
            f"the action mask of {names} {row} has the value {value}{where}: it must be 1 where an action is allowed, "
            "and 0 elsewhere. If VecNormalize normalises it, give norm_obs_keys without it"
        )
    if not (allowed := _allowed(masks, sizes)).all():
        row, choice = np.argwhere(~allowed)[0].tolist()
        of = "" if len(sizes) == 1 else f" for component {choice} of the action"
        raise ValueError(
            f"the action mask of {names} {row} allows nothing{of}{where}: allow an action, or end the episode in the "
            "step before"
        )


def with_one_allowed(masks: NDArray[Any], sizes: tuple[int, ...]) -> NDArray[Any]:
    """The masks, with all that they forbade allowed in every choice that had nothing left."""
    empty = np.repeat(~_allowed(masks, sizes), sizes, axis=1)
    return np.where(empty, np.ones_like(masks), masks)


class ActionMasks(VecEnvWrapper):
    """Environments whose observations are a Dict with ``action_mask``: 1 where an action is allowed, 0 elsewhere.

    Environments with a method ``action_masks()``, sb3-contrib's convention, are asked for it after every step;
    the method is found through wrappers, sb3-contrib's `ActionMasker` among them. An observation that is no Dict comes
    under the name ``observation``. Where the observations have the mask already, they stay what they are. Every mask
    is checked before anybody acts on it.

    A mask has an entry for each action of a Discrete space; those of a MultiDiscrete space have the entries of all
    components side by side; those of a MultiBinary space two for every bit: whether it may be 0, and whether 1. Those
    of a Tuple or Dict have the entries of its discrete parts side by side, in its order.

    Args:
        venv: the environments.

    Raises:
        ValueError: if the environments have no masks, or the actions are not discrete; from `reset` and `step`, if a
            mask has another shape or another value than 0 and 1, or allows nothing: it names the environment and the
            step since the last reset. The last observation of an episode, on which nobody acts, is not checked.
    """

    def __init__(self, venv: VecEnv) -> None:
        self.sizes = mask_sizes(venv.action_space)
        space = venv.observation_space
        self._given = False
        if isinstance(space, spaces.Dict) and ACTION_MASK in space.spaces:
            self._given = True
            check_mask_space(space, venv.action_space)
        elif not gives_masks(venv):
            raise ValueError(
                "the environments have no method action_masks(), and no action_mask in a Dict of observations: add "
                "one, or wrap each in sb3_contrib's ActionMasker"
            )
        else:
            parts = space.spaces if isinstance(space, spaces.Dict) else {"observation": space}
            space = spaces.Dict({**parts, ACTION_MASK: spaces.MultiBinary(sum(self.sizes))})
        super().__init__(venv, observation_space=space)
        self.steps = 0

    def reset(self) -> Any:
        """Begin episodes: the first observations, with their masks."""
        self.steps = 0
        return self._masked(self.venv.reset())

    def step_wait(self) -> Any:
        """Finish the step: observations with their masks, rewards, dones and infos."""
        self.steps += 1
        observations, rewards, dones, infos = self.venv.step_wait()
        if not self._given and dones.any():
            everything = np.ones(sum(self.sizes), dtype=np.int8)
            for i in np.flatnonzero(dones).tolist():
                if "terminal_observation" in infos[i]:
                    infos[i]["terminal_observation"] = self._with(infos[i]["terminal_observation"], everything)
        return self._masked(observations), rewards, dones, infos

    def _masked(self, observations: Any) -> Any:
        where = f" in step {self.steps}" if self.steps else " after the reset"
        masks = observations[ACTION_MASK] if self._given else self._ask(where)
        check_masks(masks.reshape(self.num_envs, -1), self.sizes, where)
        return observations if self._given else self._with(observations, masks.astype(np.int8))

    def _ask(self, where: str) -> NDArray[Any]:
        """The masks of all environments, (n, entries)."""
        masks, entries = self.venv.env_method("action_masks"), sum(self.sizes)
        for i, mask in enumerate(masks):
            if np.size(mask) != entries:
                raise ValueError(
                    f"action_masks() of environment {i} returns an array of shape {np.shape(mask)}{where}, and "
                    f"{self.action_space} needs one of {entries} entries"
                )
        return np.reshape(masks, (self.num_envs, entries))

    def _with(self, observation: Any, mask: NDArray[np.int8]) -> dict[str, Any]:
        rest = observation if isinstance(observation, dict) else {"observation": observation}
        return {**rest, ACTION_MASK: mask}


def check_mask_space(space: spaces.Dict, actions: spaces.Space[Any]) -> None:
    """Refuse observations whose ``action_mask`` does not fit the actions.

    Raises:
        ValueError: if it has another number of entries, or is no array of 0 and 1.
    """
    mask, entries = space.spaces[ACTION_MASK], sum(mask_sizes(actions))
    if not isinstance(mask, spaces.Box | spaces.MultiBinary) or int(np.prod(mask.shape)) != entries:
        raise ValueError(
            f"the observation's {ACTION_MASK} is a {mask}, and {actions} needs a MultiBinary({entries}), or a Box of "
            f"{entries} entries that are 0 or 1"
        )
