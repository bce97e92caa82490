"""Atari games with the usual handling of frames, over EnvPool or Gymnasium.

An observation is (4, 84, 84), uint8: the last four grey frames, each the maximum of the last two of the four frames for
which one action is held. A game begins with 1 to 30 frames of doing nothing, then FIRE where the game waits for it.
To the learner a lost life ends the episode and a reward is its sign (Mnih et al., Nature 2015, Methods). The
statistics always count whole games, in steps of four frames and in the game's own score.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray
from stable_baselines3.common import atari_wrappers
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecTransposeImage

from envs.envpool_vec_env import EnvPoolVecEnv, import_envpool
from envs.vec_env import GymnasiumVecEnv

__all__ = ["EnvPoolAtariVecEnv", "Game", "ale_games", "envpool_games", "gymnasium_atari"]


def envpool_games() -> dict[str, str]:
    """Each game's name in lower case → EnvPool's id; empty where EnvPool is not installed."""
    envpool = import_envpool()
    if envpool is None:
        return {}
    registered = envpool.registration.registry.specs
    return {i.removesuffix("-v5").lower(): i for i, entry in registered.items() if entry[0] == "envpool.atari"}


def ale_games() -> dict[str, str]:
    """Each game's name in lower case → Gymnasium's id; empty where the Arcade Learning Environment is not installed."""
    try:
        import ale_py
    except ImportError:
        return {}
    if "ALE/Pong-v5" not in gym.registry:
        gym.register_envs(ale_py)
    return {spec.name.lower(): i for i, spec in gym.registry.items() if spec.namespace == "ALE"}


_LEAST = {"noop_max": 0, "frame_skip": 1, "frame_stack": 1, "max_episode_steps": 1}


@dataclass(frozen=True)
class Game:
    """A game and how it is shown to the learner."""

    name: str
    """In lower case."""
    repeat_action_probability: float
    """Probability that the emulator repeats the last action in a frame ("sticky actions", Machado et al. 2018)."""
    episodic_life: bool
    """Whether a lost life ends the episode; the next one then goes on with the same game."""
    reward_clip: bool
    """Whether a reward is replaced by its sign."""
    noop_max: int = 30
    """Steps of doing nothing at the beginning are 1 to so many; 0 is for Gymnasium alone."""
    frame_skip: int = 4
    frame_stack: int = 4
    full_action_space: bool = False
    max_episode_steps: int = 27_000
    """Steps after which a game is truncated: half an hour of play."""

    def __post_init__(self) -> None:
        # EnvPool checks none of them: it ends the process without a word, or plays a game that never moves.
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if name in _LEAST:
                integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
                fits, what = integer and value >= _LEAST[name], f"an integer of at least {_LEAST[name]}"
            elif name == "repeat_action_probability":
                fits, what = isinstance(value, int | float) and 0 <= value <= 1, "a number from 0 to 1"
            else:
                fits, what = name == "name" or isinstance(value, bool), "True or False"
            if not fits:
                raise ValueError(f"env_kwargs[{name!r}]={value!r} must be {what}.")

    @classmethod
    def parse(cls, env_id: str, evaluation: bool, settings: dict[str, Any]) -> Game | None:
        """The game that `env_id` names, or None where it names none.

        ``ALE/Pong-v5`` has sticky actions (0.25); ``PongNoFrameskip-v4`` and EnvPool's ``Pong-v5`` have none.

        Raises:
            ValueError: if `settings` has a key that is not a field, or a value that no game can have.
        """
        match = re.fullmatch(r"(ALE/)?(\w+?)-v5|(\w+)NoFrameskip-v4", env_id)
        if match is None or (env_id in gym.registry and not env_id.startswith("ALE/") and match[2]):
            return None
        name = (match[2] or match[3]).lower()
        if name not in envpool_games() and name not in ale_games():
            return None
        settable = [field.name for field in fields(cls) if field.name != "name"]
        if unknown := set(settings) - set(settable):
            raise ValueError(f"env_kwargs has {sorted(unknown)}, but Atari games take only {settable}.")
        game = cls(name, 0.25 if match[1] else 0.0, episodic_life=not evaluation, reward_clip=not evaluation)
        return replace(game, **settings)


class EnvPoolAtariVecEnv(EnvPoolVecEnv):
    """EnvPool's Atari games as a VecEnv."""

    def __init__(self, game: Game, num_envs: int = 1, n_threads: int | None = None) -> None:
        if game.noop_max == 0:  # which ends EnvPool's process
            raise ValueError("env_kwargs['noop_max']=0 is not for EnvPool: use backend='gymnasium', or at least 1.")
        config = {field.name: getattr(game, field.name) for field in fields(game) if field.name != "name"}
        config["stack_num"] = config.pop("frame_stack")
        task = envpool_games()[game.name]
        super().__init__(task, num_envs, n_threads, config, env_id=f"ALE/{task}")
        self._nothing = np.zeros(num_envs, dtype=self._action_dtype)
        self._episodic_life = game.episodic_life

    def _restart(self, indices: NDArray[np.int32]) -> NDArray[Any]:
        if not self._episodic_life:
            return super()._restart(indices)
        # A reset would begin a new game. A step after the end goes on with the next life, its action disregarded.
        self._pool._send([indices, indices, self._nothing[: len(indices)]])
        return self._observations(self._pool._recv())

    def _score(
        self, state: list[NDArray[Any]], rewards: NDArray[Any], dones: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        over = (state[self._row["info:terminated"]] != 0) | state[self._row["trunc"]]
        return state[self._row["info:reward"]], over


def gymnasium_atari(
    game: Game,
    num_envs: int,
    render_mode: str | None = None,
    spread: Callable[[list[Callable[[], gym.Env[Any, Any]]]], VecEnv] = GymnasiumVecEnv,
) -> VecEnv:
    """Gymnasium's Atari games as a VecEnv, by `spread`, through Stable-Baselines3's wrappers."""

    def make() -> gym.Env[Any, Any]:
        env: Any = gym.make(
            ale_games()[game.name],
            frameskip=1,
            repeat_action_probability=game.repeat_action_probability,
            full_action_space=game.full_action_space,
            render_mode=render_mode,
        )
        if game.noop_max > 0:
            env = atari_wrappers.NoopResetEnv(env, noop_max=game.noop_max)
        env = atari_wrappers.MaxAndSkipEnv(env, skip=game.frame_skip)
        env = Monitor(TimeLimit(env, game.max_episode_steps))
        if game.episodic_life:
            env = atari_wrappers.EpisodicLifeEnv(env)
        if "FIRE" in env.unwrapped.get_action_meanings():
            env = atari_wrappers.FireResetEnv(env)
        env = atari_wrappers.WarpFrame(env)
        return atari_wrappers.ClipRewardEnv(env) if game.reward_clip else env

    frames = VecFrameStack(spread([make] * num_envs), game.frame_stack)
    return VecTransposeImage(frames)
