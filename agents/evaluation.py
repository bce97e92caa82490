"""How good an agent is: returns of whole episodes, with frozen statistics; and how it looks."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from agents.average import acting_policy
from agents.config import RunConfig
from agents.masks import as_taken
from agents.runs import SavedAgent, load_agent
from envs import make_vec_env
from envs.checks import check_values
from envs.velocity import ROBOTS
from envs.watchdog import Watchdog, raising_exits

__all__ = [
    "Evaluation",
    "Stopped",
    "check_video",
    "evaluate",
    "evaluate_saved",
    "film",
    "make_env",
    "record_video",
    "table",
]


@dataclass(frozen=True)
class Evaluation:
    """The episodes of one agent.

    Attributes:
        timesteps: environment steps of the agent's training.
        returns: the sum of rewards of each episode, not normalised.
        lengths: in steps.
        seconds: for all episodes.
        deterministic: whether the mode of the policy acted, or a sample.
        seed: of the environments.
        costs: the sum of ``info["cost"]`` of each episode; none where a step had no cost.
    """

    timesteps: int
    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    seconds: float
    deterministic: bool
    seed: int
    costs: tuple[float, ...] = ()

    @property
    def mean_return(self) -> float:
        """Mean over the episodes."""
        return float(np.mean(self.returns))

    @property
    def std_return(self) -> float:
        """Standard deviation over the episodes (population)."""
        return float(np.std(self.returns))

    @property
    def mean_length(self) -> float:
        """Mean over the episodes, in steps."""
        return float(np.mean(self.lengths))

    @property
    def mean_cost(self) -> float | None:
        """Mean over the episodes; None where costs are not known."""
        return float(np.mean(self.costs)) if self.costs else None

    @property
    def summary(self) -> dict[str, float]:
        """One row of evaluations.csv."""
        costs = {} if self.mean_cost is None else {"mean_cost": self.mean_cost}
        return {
            "timesteps": self.timesteps,
            "episodes": len(self.returns),
            "mean_return": self.mean_return,
            "std_return": self.std_return,
            "min_return": min(self.returns),
            "max_return": max(self.returns),
            "mean_length": self.mean_length,
            **costs,
            "seconds": round(self.seconds, 3),
        }

    def to_dict(self) -> dict[str, Any]:
        """The summary and every episode."""
        return self.summary | {k: v for k, v in asdict(self).items() if k not in ("timesteps", "seconds")}


def make_env(config: RunConfig, n_envs: int, seed: int, *, evaluation: bool) -> Watchdog:
    """The run's environments, bare but for the limit of their time."""
    with raising_exits(config.env):
        env = make_vec_env(
            config.env,
            n_envs,
            seed,
            backend=cast(Any, config.backend),  # one of three words, as `make_vec_env` checks
            n_threads=config.threads,
            env_kwargs=config.env_kwargs,
            evaluation=evaluation,
        )
    return Watchdog(env, config.env_timeout, config.env)


class _Finite(VecEnvWrapper):
    """Environments that raise an error if an observation or a reward is not finite.

    Raises:
        FloatingPointError: with the environment, and the step since the first reset.
    """

    steps = 0

    def reset(self) -> VecEnvObs:
        self.steps = 0
        observations = self.venv.reset()
        self._check(observations)
        return observations

    def step_wait(self) -> VecEnvStepReturn:
        self.steps += 1
        observations, rewards, dones, infos = self.venv.step_wait()
        self._check(observations, rewards)
        return observations, rewards, dones, infos

    def _check(self, observations: Any, rewards: Any = None) -> None:
        try:
            check_values(observations, rewards, "of an evaluation", self.steps)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; if it is normalised, take an earlier agent") from None


def _check_parameters(model: BaseAlgorithm) -> None:
    for name, parameter in acting_policy(model).named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"the policy's {name} is not finite: take an earlier agent")


class Stopped(Exception):
    """An evaluation was told to stop."""


LONG = 30_000
"""Steps of an episode after which `evaluate` says that it has no end; those of Atari have up to 27,000."""


def evaluate(
    model: BaseAlgorithm,
    env: VecEnv,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """Let `model` play `episodes` whole episodes, shared evenly among the environments of `env`.

    Args:
        model: the agent.
        env: the environments.
        episodes: how many.
        seed: of the environments.
        deterministic: act with the mode of the policy, not with a sample.
        stop: asked after each step whether to stop.

    An episode that has no end after 30,000 steps is told in a warning; the evaluation goes on with it.

    Raises:
        Stopped: `stop` said so.
        FloatingPointError: if parameters, observations or rewards are not finite; it names which, and where.
    """
    _check_parameters(model)
    env = as_taken(_Finite(env), model.policy_class)
    env.seed(seed)
    started = time.perf_counter()
    running, costs = np.zeros(env.num_envs), []

    def after_a_step(now: dict[str, Any], _: Any) -> None:
        if stop is not None and stop():
            raise Stopped
        i, info = now["i"], now["info"]
        if now["current_lengths"][i] == LONG:
            warnings.warn(
                f"an episode of the evaluation has {LONG:,} steps and no end, and the evaluation waits for it. If the "
                "mode of the policy can go on for ever, limit the episodes by max_episode_steps in gymnasium.register, "
                "or gymnasium.wrappers.TimeLimit",
                stacklevel=2,
            )
        running[i] += _cost(info)
        if now["done"] and ("episode" in info or not now["is_monitor_wrapped"]):
            costs.append(float(running[i]))
            running[i] = 0.0

    returns, lengths = cast(
        tuple[list[float], list[int]],
        evaluate_policy(
            model,
            env,
            episodes,
            deterministic=deterministic,
            callback=after_a_step,
            return_episode_rewards=True,
            warn=False,
        ),
    )
    return Evaluation(
        timesteps=model.num_timesteps,
        returns=tuple(map(float, returns)),
        lengths=tuple(map(int, lengths)),
        seconds=time.perf_counter() - started,
        deterministic=deterministic,
        seed=seed,
        costs=tuple(costs) if np.isfinite(costs).all() else (),
    )


def _cost(info: dict[str, Any]) -> float:
    """``info["cost"]``; NaN if there is none, or it is no number."""
    try:
        return float(info.get("cost", math.nan))
    except (TypeError, ValueError):  # of an algorithm that reads no costs, or reads others than CPO's
        return math.nan


def _seed_actions(model: Any, n_envs: int, seed: int, deterministic: bool) -> None:
    """Sample a loaded agent's actions by this seed: loading has set the run's own, and drawn noise by it."""
    set_random_seed(seed)
    if model.use_sde and not deterministic:
        acting_policy(model).reset_noise(n_envs)


def evaluate_saved(
    files: SavedAgent, config: RunConfig, episodes: int, seed: int, deterministic: bool = True
) -> Evaluation:
    """Load an agent and `evaluate` it.

    Raises:
        ValueError: if a file is damaged or belongs to another algorithm or environment.
        FileNotFoundError: if a file is missing.
        FloatingPointError: as `evaluate`.
    """
    n_envs = min(episodes, config.n_eval_envs)
    model, env, _ = load_agent(files, config, lambda: make_env(config, n_envs, seed, evaluation=True), training=False)
    _seed_actions(model, env.num_envs, seed, deterministic)
    try:
        return evaluate(model, env, episodes, seed, deterministic)
    finally:
        env.close()


def table(rows: Sequence[tuple[str, Evaluation]]) -> str:
    """Evaluations as a table of at most 80 columns; ``trained`` are the environment steps of the agent's training."""
    costs = any(e.costs for _, e in rows)
    cells = [("", "return", "min … max", *["cost"] * costs, "length", "episodes", "trained")]
    for name, e in rows:
        spread = f"{min(e.returns):.1f} … {max(e.returns):.1f}"
        mean = f"{e.mean_return:.1f} ± {e.std_return:.1f}"
        cost = ["" if e.mean_cost is None else f"{e.mean_cost:.1f}"] * costs
        cells.append((name, mean, spread, *cost, f"{e.mean_length:.0f}", str(len(e.returns)), f"{e.timesteps:,}"))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in cells
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


# Video ----------------------------------------------------------------------------------------------------------------


def check_video(config: RunConfig) -> None:
    """Raise an error, with the remedy, if `record_video` could not work for the run."""
    if importlib.util.find_spec("moviepy") is None:
        raise ImportError("a video needs moviepy: pip install moviepy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium's and Stable-Baselines3's, of what is said better here
        try:
            env = _rendering_env(config, seed=0)
        except Exception as error:
            make_env(config, 1, 0, evaluation=True).close()  # what it cannot be made for in any case comes first
            cause = error.__cause__ if isinstance(error.__cause__, TypeError) else error
            reason = str(cause).partition(" was raised from the environment creator")[0].rstrip(".")
            raise ValueError(
                f"{config.env} does not render, it cannot be made with render_mode='rgb_array' ({reason}): leave out "
                "--video"
            ) from error
        try:
            env.reset()
            frame = env.render()
        except Exception as error:  # graphics libraries raise anything
            raise ValueError(
                f"{config.env} does not render ({error}): leave out --video, "
                'or pip install "gymnasium[classic-control]"'
            ) from error
        finally:
            env.close()
    if frame is None:
        raise ValueError(f"{config.env} does not render as rgb_array: leave out --video")


def record_video(files: SavedAgent, config: RunConfig, path: Path, seed: int, deterministic: bool = True) -> Evaluation:
    """Write one episode of a saved agent to an MP4 file.

    Raises:
        ValueError: if the agent cannot be loaded, as `evaluate_saved`.
        FloatingPointError: as `evaluate`.
    """
    from moviepy.video.io.ImageSequenceClip import ImageSequenceClip

    frames, fps, episode = film(files, config, seed, deterministic)
    # The encoder needs even sides.
    frames = [np.ascontiguousarray(f[: f.shape[0] // 2 * 2, : f.shape[1] // 2 * 2]) for f in frames]
    path.parent.mkdir(exist_ok=True)
    ImageSequenceClip(frames, fps=fps).write_videofile(str(path), logger=None, audio=False)
    return episode


def film(
    files: SavedAgent,
    config: RunConfig,
    seed: int,
    deterministic: bool = True,
    *,
    begin: float = 0.0,
    end: float = math.inf,
    fps: float = math.inf,
) -> tuple[list[npt.NDArray[np.uint8]], float, Evaluation]:
    """Let a saved agent play one episode, and look on.

    Args:
        files: the agent's.
        config: the run's.
        seed: of the environment.
        deterministic: whether the mode of the policy acts, or a sample.
        begin: where the frames begin, in seconds of the simulation.
        end: where they end.
        fps: frames per second: every so many-th step is shown, so that there are about so many; by default every one.

    Returns:
        The frames, (height, width, 3) each, how many make a second, and the whole episode.

    Raises:
        ValueError: if the agent cannot be loaded, as `evaluate_saved`.
        FloatingPointError: as `evaluate`.
    """
    model, env, _ = load_agent(files, config, lambda: _rendering_env(config, seed), training=False)
    _seed_actions(model, env.num_envs, seed, deterministic)
    started = time.perf_counter()
    try:
        _check_parameters(model)
        env = as_taken(_Finite(env), model.policy_class)
        rate = (env.get_attr("metadata")[0] or {}).get("render_fps", 30)
        every = max(1, round(rate / fps))
        frames: list[Any] = []
        env.seed(seed)
        observation: Any = env.reset()
        episode, step, memory = None, 0, None
        while episode is None:
            if begin * rate <= step < end * rate and step % every == 0:
                frames.append(env.render())
            action, memory = model.predict(observation, memory, deterministic=deterministic)
            observation, _, _, infos = env.step(action)
            episode, step = infos[0].get("episode"), step + 1
    finally:
        env.close()
    seconds = time.perf_counter() - started
    returns, lengths = (float(episode["r"]),), (int(episode["l"]),)
    return frames, rate / every, Evaluation(model.num_timesteps, returns, lengths, seconds, deterministic, seed)


def _rendering_env(config: RunConfig, seed: int) -> VecEnv:
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo looks for a display by itself
    env_kwargs = config.env_kwargs | {"render_mode": "rgb_array"}
    spec = gym.registry.get(ROBOTS.get(config.env, config.env))
    if spec is not None and ".envs.mujoco." in str(spec.entry_point) and "camera_id" not in env_kwargs:
        # Gymnasium 1.4 lets runners leave the picture. A task without such a camera keeps its own.
        env_kwargs.setdefault("camera_name", "track")
    with raising_exits(config.env):
        env = make_vec_env(config.env, 1, seed, backend="gymnasium", env_kwargs=env_kwargs, evaluation=True)
    return Watchdog(env, config.env_timeout, config.env)
