"""One function that makes vector environments from an id."""

from __future__ import annotations

import difflib
import importlib
import numbers
import re
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from envs.atari import EnvPoolAtariVecEnv, Game, ale_games, envpool_games, gymnasium_atari
from envs.checks import check_arrays, is_episode
from envs.envpool_vec_env import (
    DIFFERENCES,
    SAME_AS_GYMNASIUM,
    EnvPoolVecEnv,
    EnvPoolVelocityVecEnv,
    import_envpool,
    options,
)
from envs.episodes import EpisodeWriter
from envs.seeding import independently_seeded
from envs.state import is_known
from envs.vec_env import Float32Observations, GymnasiumVecEnv, VectorEnvAdapter, float32_space
from envs.velocity import ROBOTS

__all__ = ["UnknownEnvironment", "as_vec_envs_take", "make_vec_env"]

BACKENDS = ("auto", "envpool", "gymnasium")


class UnknownEnvironment(gym.error.NameNotFound, ValueError):
    """No backend has an environment of this id."""


EnvMaker = Callable[..., gym.Env[Any, Any]]


def make_vec_env(
    env_id: str | EnvMaker,
    n_envs: int = 1,
    seed: int | None = None,
    backend: Literal["auto", "envpool", "gymnasium"] = "auto",
    *,
    n_threads: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    wrapper_class: EnvMaker | None = None,
    wrapper_kwargs: dict[str, Any] | None = None,
    vec_env_cls: type[VecEnv] | None = None,
    vec_env_kwargs: dict[str, Any] | None = None,
    monitor_dir: str | Path | None = None,
    monitor_path: str | Path | None = None,
    evaluation: bool = False,
) -> VecEnv:
    """Make `n_envs` environments of one kind as a Stable-Baselines3 VecEnv with float32 (or uint8 image) observations.

    The infos of a step that finishes an episode have ``terminal_observation``, ``TimeLimit.truncated`` (truncated and
    not terminated) and ``episode`` (return ``r``, length ``l`` in steps, seconds ``t``), whatever the backend.

    Args:
        env_id: as registered with Gymnasium or EnvPool; ``module:id`` imports a module that registers it first. Or a
            class of environments, or a function that makes one from `env_kwargs`.
        n_envs: how many environments.
        seed: of all environments; no two environments or seeds share a stream (`envs.seeding`). None for fresh entropy.
        backend: ``"envpool"`` or ``"gymnasium"``. ``"auto"`` takes the fastest that means the same: an environment's
            own vector form (``vector_entry_point`` in its Gymnasium spec) if it restarts in the step that finishes an
            episode, else EnvPool where its task equals Gymnasium's or Gymnasium has none, else Gymnasium. Where
            Gymnasium's task lacks a package, EnvPool's is taken, with a warning that says what may differ.
        n_threads: EnvPool's threads; by default one for each environment, at most one for each processor.
        env_kwargs: arguments of the environment. With ``render_mode``, or with one that EnvPool does not have,
            ``"auto"`` takes Gymnasium. Atari games take the fields of `envs.atari.Game`.
        wrapper_class: what each environment is wrapped in, after its Monitor: a class or a function of one environment.
            Episodes that it ends are counted too; their return is that of the environment's own rewards.
            This argument and the next three are for Gymnasium's environments, and make ``"auto"`` take these.
        wrapper_kwargs: its arguments.
        vec_env_cls: a class such as Stable-Baselines3's ``SubprocVecEnv`` in the place of ``DummyVecEnv``.
        vec_env_kwargs: its arguments.
        monitor_dir: a folder, which is made if need be, for a ``monitor.csv`` to which all episodes are appended.
        monitor_path: a folder that exists, or a file ending in ``monitor.csv``, in the place of `monitor_dir`.
        evaluation: Atari only: whole games and the games' own scores, instead of single lives and signs of rewards.

    Raises:
        UnknownEnvironment: (a ValueError) if no backend has the id; the nearest known ids are named.
        ValueError: for any other argument that cannot be used, or that the backend cannot use.
        TypeError: if what should make an environment does not.
        ImportError: if a package is missing that the environment or the backend needs.
    """
    n_envs = _positive("n_envs", n_envs)
    if n_threads is not None:
        n_threads = _positive("n_threads", n_threads)
    if seed is not None and (not _is_int(seed) or seed < 0):
        raise ValueError(f"seed={seed!r} must be None or an integer that is not negative.")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(map(repr, BACKENDS))}.")
    if not (isinstance(env_id, str) or callable(env_id)):
        raise ValueError(
            f"env_id={env_id!r} must be a string, such as 'CartPole-v1', a class of environments, or a function that "
            "makes one."
        )
    if monitor_dir is not None and monitor_path is not None:
        raise ValueError("monitor_dir and monitor_path are two names for one place: give one of them.")
    python = _Python(wrapper_class, dict(wrapper_kwargs or {}), vec_env_cls, dict(vec_env_kwargs or {}))
    python.check(env_id, backend)
    env_kwargs = dict(env_kwargs or {})
    if env_kwargs.get("max_episode_steps", 1) is None:  # Gymnasium's way to say: as registered
        del env_kwargs["max_episode_steps"]
    _positive("env_kwargs['max_episode_steps']", env_kwargs.get("max_episode_steps", 1))

    if isinstance(env_id, str):
        python.module, colon, name = env_id.rpartition(":")
        if colon:
            try:
                importlib.import_module(python.module)
            except (ImportError, ValueError) as error:
                raise ValueError(f"env_id={env_id!r} begins with a module that cannot be imported: {error}.") from error
            env_id = name

    shown = env_id if isinstance(env_id, str) else getattr(env_id, "__name__", type(env_id).__name__)
    try:
        if isinstance(env_id, str):
            venv = _make(env_id, n_envs, backend, n_threads, env_kwargs, evaluation, python)
        else:
            venv = python.vector(env_id, n_envs, env_kwargs)
    except NoEnvironment:
        raise
    except TypeError as error:  # how Python and EnvPool say that an argument does not fit
        if not env_kwargs:
            raise
        raise ValueError(f"env_kwargs={env_kwargs!r} do not fit {shown}: {error}.") from error
    if seed is not None:
        venv.seed(int(seed))
        venv.action_space.seed(int(seed))
    if monitor_dir is not None:
        Path(monitor_dir).mkdir(parents=True, exist_ok=True)
        monitor_path = monitor_dir
    return venv if monitor_path is None else EpisodeWriter(venv, monitor_path, shown)


class NoEnvironment(TypeError):
    """What should make an environment does not."""


@dataclass
class _Python:
    """What can be done only with environments that are Python objects, Gymnasium's: wrap them, spread them out."""

    wrapper_class: EnvMaker | None
    wrapper_kwargs: dict[str, Any]
    vec_env_cls: type[VecEnv] | None
    vec_env_kwargs: dict[str, Any]
    module: str = field(default="")

    def check(self, env_id: str | EnvMaker, backend: str) -> None:
        if self.wrapper_class is not None and not callable(self.wrapper_class):
            raise ValueError(f"wrapper_class={self.wrapper_class!r} must be a class or a function of an environment.")
        if self.vec_env_cls is not None and not (
            isinstance(self.vec_env_cls, type) and issubclass(self.vec_env_cls, VecEnv)
        ):
            raise ValueError(f"vec_env_cls={self.vec_env_cls!r} must be a class of VecEnvs, such as SubprocVecEnv.")
        for kwargs, owner in (("wrapper_kwargs", "wrapper_class"), ("vec_env_kwargs", "vec_env_cls")):
            if getattr(self, kwargs) and getattr(self, owner) is None:
                raise ValueError(f"{kwargs}={getattr(self, kwargs)!r} needs {owner}, whose arguments they are.")
        if backend == "envpool" and (needs := self.needs(env_id)):
            raise ValueError(
                f"backend='envpool' has no environment that is a Python object, which {needs} needs: leave it out, or "
                "use backend='gymnasium'."
            )

    def needs(self, env_id: str | EnvMaker) -> str:
        """Which argument needs environments that are Python objects; none is empty."""
        if not isinstance(env_id, str):
            return f"env_id={getattr(env_id, '__name__', env_id)}"
        return next((name for name in ("wrapper_class", "vec_env_cls") if getattr(self, name) is not None), "")

    def vector(self, env_id: str | EnvMaker, n_envs: int, env_kwargs: dict[str, Any]) -> VecEnv:
        return self.spread([_Single(env_id, env_kwargs, self)] * n_envs)

    def spread(self, makers: list[Callable[[], gym.Env[Any, Any]]]) -> VecEnv:
        if self.vec_env_cls is None:
            return GymnasiumVecEnv(makers)
        cls: Any = independently_seeded(self.vec_env_cls)  # VecEnv's own constructor takes no makers
        return cls(makers, **self.vec_env_kwargs)


@dataclass
class _Single:
    """Makes one environment; another process can make it too."""

    env_id: str | EnvMaker
    env_kwargs: dict[str, Any]
    python: _Python

    def __call__(self) -> gym.Env[Any, Any]:
        if isinstance(self.env_id, str):
            if self.python.module:
                importlib.import_module(self.python.module)
            env = gym.make(self.env_id, **self.env_kwargs)
        else:
            env = _is_env("env_id", self.env_id(**self.env_kwargs))
        check_arrays(env.observation_space, f"environments of {type(env.unwrapped).__name__}")
        if type(env.unwrapped).__module__.partition(".")[0] not in ("envs", "gymnasium"):
            env = _FirstAnswers(env)
        env = monitor = Monitor(as_vec_envs_take(env))
        if (wrap := self.python.wrapper_class) is not None:
            env = _EndsSeen(_is_env("wrapper_class", wrap(env, **self.python.wrapper_kwargs)), monitor)
            env = as_vec_envs_take(env)
        if float32_space(env.observation_space) is not env.observation_space:
            env = Float32Observations(env)
        return env


class _FirstAnswers(gym.Wrapper[Any, Any, Any, Any]):
    """Looks at the first reset and the first step, whether they answer as Gymnasium's do; later ones cost nothing."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        name = type(self.unwrapped).__name__
        try:
            answer = self.env.reset(seed=seed, options=options)
        except TypeError as error:
            if not re.search(r"reset\(\) got an unexpected keyword argument '(seed|options)'", str(error)):
                raise  # of what reset() calls
            raise TypeError(
                f"{name}.reset() must take seed and options: {error}. Write reset(self, *, seed=None, options=None), "
                "and call super().reset(seed=seed) in it."
            ) from error
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)):
            got = _kinds(answer)
            raise TypeError(f"{name}.reset() must return (observation, info) with a dict as info, got {got}.")
        self.reset = self.env.reset  # type: ignore[method-assign]
        return answer

    def step(self, action: Any) -> Any:
        answer, name = self.env.step(action), type(self.unwrapped).__name__
        if not (isinstance(answer, tuple) and len(answer) == 5 and isinstance(answer[4], dict)):
            old = isinstance(answer, tuple) and len(answer) == 4
            remedy = " Gym before 0.26 had one `done`: say which of the two it is, since values differ." if old else ""
            raise TypeError(
                f"{name}.step() must return (observation, reward, terminated, truncated, info) with a dict as info, "
                f"got {_kinds(answer)}.{remedy}"
            )
        reward: Any = answer[1]
        if np.ndim(reward) or not isinstance(reward, numbers.Real | np.generic | np.ndarray):
            raise TypeError(f"{name}.step() must return a number as reward, got {reward!r}.")
        self.step = self.env.step  # type: ignore[method-assign]
        return answer


def as_vec_envs_take(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """An environment whose steps are as Stable-Baselines3's VecEnvs take for granted; one that is known is so itself.

    They keep the last observation of an episode while they reset, which may write the first one of the next into the
    same array. And ``info["episode"]`` is Monitor's: anything else of that name goes.
    """
    return env if is_known(env) else _AsVecEnvs(env)


class _AsVecEnvs(gym.Wrapper[Any, Any, Any, Any]):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            observation = deepcopy(observation)
        if "episode" in info and not is_episode(info["episode"]):
            info = {key: value for key, value in info.items() if key != "episode"}
        return observation, reward, terminated, truncated, info


def _kinds(answer: Any) -> str:
    """What was returned, by the names of the types."""
    if not isinstance(answer, tuple):
        return type(answer).__name__
    return f"({', '.join(type(part).__name__ for part in answer)})"


class _EndsSeen(gym.Wrapper[Any, Any, Any, Any]):
    """Also where a wrapper ends an episode, which the Monitor inside it does not see, the info has the ``episode``.

    It is of the Monitor's rewards. Whether its episode is over, or only a life is lost, shows in the reset that
    follows: so it is added then, to the info of the step before, which a VecEnv has not given away yet.
    """

    def __init__(self, env: gym.Env[Any, Any], monitor: Monitor[Any, Any]) -> None:
        super().__init__(env)
        self._monitor = monitor
        self._ended: dict[str, Any] | None = None

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        _, _, terminated, truncated, info = result
        self._ended = info if (terminated or truncated) and "episode" not in info else None
        return result

    def reset(self, **kwargs: Any) -> Any:
        rewards = self._monitor.rewards
        result = self.env.reset(**kwargs)
        if self._ended is not None and self._monitor.rewards is not rewards:
            seconds = round(time.time() - self._monitor.t_start, 6)
            self._ended["episode"] = {"r": round(sum(rewards), 6), "l": len(rewards), "t": seconds}
        self._ended = None
        return result


def _is_env(name: str, env: Any) -> Any:
    if not isinstance(env, gym.Env):
        raise NoEnvironment(f"{name} must make a Gymnasium environment, but made {env!r}.")
    return env


def _make(
    env_id: str,
    n_envs: int,
    backend: str,
    n_threads: int | None,
    env_kwargs: dict[str, Any],
    evaluation: bool,
    python: _Python,
) -> VecEnv:
    env_kwargs = dict(env_kwargs)
    render_mode = env_kwargs.pop("render_mode", None)
    game = Game.parse(env_id, evaluation, env_kwargs)
    if needs := python.needs(env_id):
        if game is not None and python.wrapper_class is not None:
            raise ValueError(
                f"wrapper_class={python.wrapper_class!r} cannot be put around {env_id}, whose frames are stacked over "
                "all environments: wrap what make_vec_env returns, or give a function that makes one game as env_id."
            )
        if not _in_gymnasium(env_id, game) and _in_envpool(env_id, game):
            raise ValueError(f"{needs} needs a Gymnasium environment, and {env_id!r} is only in EnvPool: leave it out.")
        backend = "gymnasium"
    if backend == "auto":
        backend = "gymnasium" if render_mode else _fastest(env_id, game, env_kwargs)
        if backend == "gymnasium" and game is None and render_mode is None and _fits_envpool(env_id, env_kwargs):
            try:
                return _gymnasium(env_id, n_envs, env_kwargs, python)
            except ImportError as error:
                warnings.warn(_instead(env_id, error), stacklevel=3)
                backend = "envpool"

    if backend == "own":
        vector_env = gym.make_vec(env_id, n_envs, "vector_entry_point", **env_kwargs)
        if "max_episode_steps" in env_kwargs and vector_env.spec is not None:
            vector_env.spec.max_episode_steps = env_kwargs["max_episode_steps"]  # its own copy, which names the default
        return VectorEnvAdapter(vector_env)
    if backend == "envpool":
        if render_mode is not None:
            raise ValueError(f"env_kwargs has render_mode={render_mode!r}; only backend='gymnasium' renders.")
        if not _in_envpool(env_id, game):
            raise _absent(env_id, game, "envpool")
        if game is not None:
            return EnvPoolAtariVecEnv(game, n_envs, n_threads)
        cls = EnvPoolVelocityVecEnv if env_id in ROBOTS else EnvPoolVecEnv
        return cls(_task(env_id), n_envs, n_threads, env_kwargs, env_id)
    if not _in_gymnasium(env_id, game):
        raise _absent(env_id, game, "gymnasium", rendering=render_mode is not None)
    if game is not None:
        return gymnasium_atari(game, n_envs, render_mode, python.spread)
    return _gymnasium(env_id, n_envs, env_kwargs | ({"render_mode": render_mode} if render_mode else {}), python)


def _fastest(env_id: str, game: Game | None, env_kwargs: dict[str, Any]) -> str:
    """The fastest backend that means the same as Gymnasium, where Gymnasium has the environment."""
    spec = gym.registry.get(env_id)
    if game is not None or spec is None:
        only_gymnasium = game is not None and game.noop_max == 0 and _in_gymnasium(env_id, game)
        return "envpool" if _in_envpool(env_id, game) and not only_gymnasium else "gymnasium"
    if (vector_form := spec.vector_entry_point) is not None and not spec.additional_wrappers:
        try:
            creator = load_env_creator(vector_form) if isinstance(vector_form, str) else vector_form
        except (
            gym.error.DependencyNotInstalled,
            ImportError,
        ):  # as making the single environment will say, with the remedy
            creator = None
        if getattr(creator, "metadata", {}).get("autoreset_mode") is AutoresetMode.SAME_STEP:
            return "own"
    return "envpool" if _task(env_id) in SAME_AS_GYMNASIUM and _fits_envpool(env_id, env_kwargs) else "gymnasium"


def _task(env_id: str) -> str:
    """EnvPool's id of it."""
    return ROBOTS.get(env_id, env_id)


def _fits_envpool(env_id: str, env_kwargs: dict[str, Any]) -> bool:
    own = {"limit"} if env_id in ROBOTS else set()
    return _in_envpool(env_id, None) and set(env_kwargs) - own <= options(_task(env_id))


def _instead(env_id: str, error: ImportError) -> str:
    """That EnvPool's task is taken for Gymnasium's, which lacks a package, and how it differs as far as is known."""
    known = next((difference for name, difference in DIFFERENCES.items() if env_id.startswith(name)), None)
    difference = f"EnvPool's differs: {known}." if known else "Whether the two are the same task was not checked."
    reason = str(error.__cause__).rstrip(".")
    return (
        f"EnvPool's {env_id} is used, because Gymnasium's needs a package that is missing: {reason}. "
        f"{difference}{_install(env_id)}"
    )


def _install(env_id: str) -> str:
    """What to do for Gymnasium's `env_id`, where it is known: an extra to install, or the id of today."""
    spec = gym.registry[_task(env_id)]
    if spec.version in (2, 3) and f"{spec.name}-v5" in gym.registry:  # MuJoCo's, which have left Gymnasium
        return f" Remedy: {spec.name}-v5."
    extra = next((extra for extra in ("mujoco", "box2d") if f".envs.{extra}." in str(spec.entry_point)), None)
    return f' Remedy: pip install "gymnasium[{extra}]".' if extra else ""


def _in_envpool(env_id: str, game: Game | None) -> bool:
    if game is not None:
        return game.name in envpool_games()
    envpool = import_envpool()
    return envpool is not None and _task(env_id) in envpool.list_all_envs()


def _in_gymnasium(env_id: str, game: Game | None) -> bool:
    return env_id in gym.registry if game is None else game.name in ale_games()


def _absent(env_id: str, game: Game | None, backend: str, rendering: bool = False) -> Exception:
    """The error for an environment that `backend` does not have, and, if it is ``rendering``, EnvPool cannot show."""
    envpool = import_envpool()
    get_envpool = "EnvPool (pip install envpool)"
    get_ale = "the Arcade Learning Environment (pip install ale-py opencv-python-headless)"
    if backend == "envpool" and envpool is None:
        return ImportError(f"backend='envpool' needs {get_envpool}; backend='gymnasium' does not.")
    if backend == "envpool" and _in_gymnasium(env_id, game):
        return ValueError(f"backend='envpool' has no environment {env_id!r}. Use backend='gymnasium'.")
    if backend == "gymnasium" and game is not None:
        other = "" if rendering else "; backend='envpool' does not"
        return ImportError(f"{env_id!r} with backend='gymnasium' needs {get_ale}{other}.")
    if backend == "gymnasium" and _in_envpool(env_id, game):
        remedy = "EnvPool's does not render: leave render_mode out." if rendering else "Use backend='envpool'."
        return ValueError(f"backend='gymnasium' has no environment {env_id!r}. {remedy}")

    known = {*gym.registry, *(f"ALE/{task}" for task in envpool_games().values())}
    if envpool is not None:
        known.update(envpool.list_all_envs())
    lower = {name.lower(): name for name in sorted(known)}
    nearest = [lower[name] for name in difflib.get_close_matches(env_id.lower(), lower, n=5)]
    message = f"env_id={env_id!r} is not known."
    if nearest:
        message += f" Did you mean {', '.join(nearest)}?"
    if ":" not in env_id:
        message += f" One of your own is registered when its module is imported: 'my_module:{env_id}'."
    if envpool is None:
        message += f" It may be in a package that is not installed: {get_envpool}"
        message += "." if ale_games() else f", {get_ale}."
    return UnknownEnvironment(message)


def _gymnasium(env_id: str, n_envs: int, env_kwargs: dict[str, Any], python: _Python) -> VecEnv:
    """Gymnasium's environments, by default one after the other."""
    try:
        return python.vector(env_id, n_envs, env_kwargs)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        remedy = _install(env_id)
        if _fits_envpool(env_id, env_kwargs):
            remedy += " Remedy: backend='envpool'."
        elif import_envpool() is None and (_task(env_id) in SAME_AS_GYMNASIUM or env_id.startswith(tuple(DIFFERENCES))):
            remedy += " Remedy: pip install envpool."
        reason = str(error).rstrip(".")
        raise ImportError(
            f"{env_id} with backend='gymnasium' needs a package that is missing: {reason}.{remedy}"
        ) from error


def _positive(name: str, value: Any) -> int:
    if not _is_int(value) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
    return int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
