"""What a run does beside learning: record, evaluate, save, show, and stop when it is told to."""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from tqdm import tqdm

from agents.base import NaturalPolicyAlgorithm
from agents.config import RunConfig
from agents.evaluation import Evaluation, Stopped, evaluate
from agents.runs import RunFolder, copy_agent, save_agent
from agents.state import begin_episodes
from envs.episodes import EpisodeFile
from envs.seeding import Purpose, purpose_seed
from npg.parallel import World, size
from npg.runs.signals import StopRequest

__all__ = [
    "CommonStatistics",
    "EpisodeRecorder",
    "Evaluator",
    "ProgressBar",
    "Saver",
    "Stop",
    "evaluation_seed",
]

#: Vector steps between the looks that several processes take at whether one of them was told to stop, at most; and the
#: seconds that they shall take. torchrun waits 30 seconds after a signal, and then kills.
LOOK_EVERY, LOOK_AFTER = 32, 5.0

#: The columns of evaluations.csv with the seconds of training: on the wall, and of the processor.
CLOCKS = ("train_seconds", "train_cpu_seconds")


def evaluation_seed(config: RunConfig, *, final: bool = False) -> int:
    """The seed of the evaluation environments: apart from training's, and the final one's apart from both."""
    return purpose_seed(config.seed, Purpose.FINAL_EVALUATION if final else Purpose.EVALUATION)


class EpisodeRecorder(BaseCallback):
    """Writes the training episodes of all processes to monitor.csv; those of the others at the end of a rollout.

    Args:
        file: where to write them, with a column ``timesteps``, in the main process; None elsewhere.
        world: this process among its peers.
    """

    def __init__(self, file: EpisodeFile | None, world: World) -> None:
        super().__init__()
        self._file, self._world = file, world
        self._unwritten: list[tuple[dict[str, Any], int]] = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:  # a continuing task tells of an episode in a step that is not done
            if episode := info.get("episode"):
                if self._file is None:
                    self._unwritten.append((episode, self.num_timesteps))
                else:
                    self._file.add(episode, timesteps=self.num_timesteps)
        return True

    def _on_rollout_end(self) -> None:
        for episodes in self._world.gather(self._unwritten):
            for episode, timesteps in episodes:  # in the main process, which has the file
                self._file.add(episode, timesteps=timesteps)  # type: ignore[union-attr]
                self.model.ep_info_buffer.append(episode)  # type: ignore[union-attr]  # the log takes its means
        self._unwritten = []

    def _on_training_end(self) -> None:
        self._on_rollout_end()  # of a rollout that was cut short

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class CommonStatistics(BaseCallback):
    """Makes the running statistics of VecNormalize those of the steps of all processes, at the end of each rollout.

    With n steps of mean m and variance v before a rollout, and nᵣ, mᵣ, vᵣ in process r out of R after it, the union of
    the steps has N = Σᵣ nᵣ − (R − 1) n of them, and with its moments about m,

        μ = Σᵣ nᵣ (mᵣ − m) / N,    ν = (Σᵣ nᵣ (vᵣ + (mᵣ − m)²) − (R − 1) n v) / N,

    the mean m + μ and the variance ν − μ².

    Args:
        normalize: the wrapper, not used yet; None where nothing is normalised.
        world: this process among its peers.
    """

    def __init__(self, normalize: VecNormalize | None, world: World) -> None:
        super().__init__()
        self._world = world
        self._statistics: list[RunningMeanStd] = []
        if normalize is not None and world.group is not None:
            observations = normalize.obs_rms if normalize.norm_obs else {}
            several = observations.values() if isinstance(observations, dict) else [observations]
            self._statistics = [*several, normalize.ret_rms]
        self._before = [statistics.copy() for statistics in self._statistics]

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        for now, before in zip(self._statistics, self._before):
            d = now.mean - before.mean
            sums = np.stack([np.full_like(d, now.count), now.count * d, now.count * (now.var + d**2)])
            sums = self._world.sum_(torch.from_numpy(sums).to(self._world.device)).cpu().numpy()
            repeated = (self._world.size - 1) * before.count
            count = float(sums[0].flat[0]) - repeated
            shift = sums[1] / count
            now.mean, now.count = before.mean + shift, count
            now.var = (sums[2] - repeated * before.var) / count - shift**2
        self._before = [statistics.copy() for statistics in self._statistics]

    def _on_training_end(self) -> None:
        self._on_rollout_end()  # of a rollout that was cut short


class _Periodic(BaseCallback):
    """Acts between two updates, each time that another `frequency` environment steps are over."""

    def __init__(self, frequency: int) -> None:
        super().__init__()
        self._frequency = frequency

    def _on_training_start(self) -> None:
        self._period = self.model.num_timesteps // self._frequency

    def _on_rollout_start(self) -> None:
        # Between updates parameters, statistics and counters belong together; a rollout under way cannot be saved.
        period = self.model.num_timesteps // self._frequency
        if period > self._period:
            self._period = period
            self._act()

    def _on_step(self) -> bool:
        return True

    def _act(self) -> None:
        raise NotImplementedError


class Evaluator(_Periodic):
    """Evaluates with deterministic actions and frozen statistics, and saves the best agent so far.

    The environments are seeded alike each time, so that evaluations differ by the agent alone. Beside each stand the
    seconds of training up to it, by the clock on the wall and of the processor; NaN once a run was stopped between two
    evaluations, which no clock went on from.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, env: VecEnv, stop: StopRequest) -> None:
        super().__init__(config.eval_freq)
        self._config, self._folder, self._env, self._stop = config, folder, env, stop
        earlier = folder.evaluations()
        known = earlier if folder.best.model.exists() else {}
        returns = known.get("mean_return", np.empty(0))
        costs = known.get("mean_cost", np.full_like(returns, math.nan))
        self.limit = config.hyperparameters.get("cost_limit", math.inf)
        self._best = max(map(self._rank, returns, costs), default=(-math.inf, -math.inf))
        self.last: Evaluation | None = None
        self.seconds = 0.0
        # Unknown until a training starts here; a run with nothing left to train is evaluated without one.
        self._trained, self._going = np.full(2, math.nan), _clocks()

    def _on_training_start(self) -> None:
        super()._on_training_start()
        earlier, done = self._folder.evaluations(), self.model.num_timesteps
        self._trained = np.zeros(2)
        if done:
            at = np.flatnonzero(earlier.get("timesteps", np.empty(0)) == done)
            self._trained += [earlier[name][at[-1]] if len(at) and name in earlier else math.nan for name in CLOCKS]
        self._going = _clocks()

    def excess(self, mean_cost: float | None) -> float:
        """How far a mean cost is above CPO's limit; 0 within it, and where it is not known (None or NaN)."""
        return 0.0 if mean_cost is None else float(np.fmax(mean_cost - self.limit, 0.0))

    def _rank(self, mean_return: float, mean_cost: float | None) -> tuple[float, float]:
        """What the best agent has most of: to keep CPO's limit goes before the return."""
        return -self.excess(mean_cost), mean_return

    def _act(self) -> None:
        with suppress(Stopped):  # the training then stops too
            self.evaluate()

    @property
    def is_done(self) -> bool:
        """Whether the present agent was evaluated by an earlier call of the script."""
        earlier = self._folder.evaluations()
        return bool(earlier) and self.model.num_timesteps in earlier["timesteps"]

    def evaluate(self) -> Evaluation:
        """Evaluate now; raises `Stopped` where the run is told to stop."""
        statistics = self.model.get_vec_normalize_env()
        if statistics is not None and statistics.norm_obs and isinstance(self._env, VecNormalize):
            self._env.obs_rms = statistics.obs_rms
        self._trained += _clocks() - self._going
        seed, stop = evaluation_seed(self._config), self._stop
        started = time.perf_counter()
        try:
            e = evaluate(self.model, self._env, self._config.eval_episodes, seed, stop=lambda: stop.number != 0)
        finally:  # also of one that was stopped
            self.seconds += time.perf_counter() - started
        # Of equals the later: it had more data. Its file comes before its row, which says that it is there.
        if (rank := self._rank(e.mean_return, e.mean_cost)) >= self._best:
            self._best = rank
            save_agent(self.model, self._folder.best)
        self._folder.add_evaluation(e.summary | dict(zip(CLOCKS, self._trained.round(3).tolist())))
        self.logger.record("eval/mean_return", e.mean_return)
        self.logger.record("eval/mean_length", e.mean_length)
        if e.mean_cost is not None:
            self.logger.record("eval/mean_cost", e.mean_cost)
        self.last = e
        self._going = _clocks()
        return e


def _clocks() -> npt.NDArray[np.float64]:
    return np.array([time.perf_counter(), time.process_time()])


class Saver(_Periodic):
    """Saves the agent under its number of steps and as the last one.

    Where the state of the environments is hidden, all of them then begin new episodes, from seeds that depend on the
    step: as they do in a run that goes on from this checkpoint. The episodes that this cuts off are bootstrapped with
    the value of their last observation, as at the end of every rollout. The processes' savers act at the same steps.

    Args:
        config: the run's.
        folder: where to save, in the main process; None elsewhere.
        world: this process among its peers.
    """

    model: NaturalPolicyAlgorithm

    def __init__(self, config: RunConfig, folder: RunFolder | None, world: World) -> None:
        super().__init__(config.save_freq)
        self._config, self._folder, self._world = config, folder, world

    def _act(self) -> None:
        if self._folder is not None:
            files = self._folder.checkpoint(self.model.num_timesteps)
            exact = self._config.exact_resume == "state"
            save_agent(self.model, files, self._folder, self._config, episodes=exact)
            copy_agent(files, self._folder.last)
            if self._folder.best.model.exists():
                copy_agent(self._folder.best, self._folder.best_before)
        if self._config.exact_resume == "restart":
            begin_episodes(self.model, self._config, self._world)
            env = cast(VecEnv, self.model.get_env())
            self.model._last_obs = cast(Any, env.reset())
            self.model._last_episode_starts = np.ones(env.num_envs, dtype=bool)


class ProgressBar(BaseCallback):
    """Steps, speed, remaining time, and the mean return of the latest training episodes."""

    model: NaturalPolicyAlgorithm

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self._timesteps = config.timesteps

    def _on_training_start(self) -> None:
        done = self.model.num_timesteps
        rollout = self.model.n_steps * self.model.n_envs * size(self.model.process_group)
        self._bar = tqdm(
            total=done + math.ceil((self._timesteps - done) / rollout) * rollout,
            initial=done,
            unit=" steps",
            unit_scale=True,
            dynamic_ncols=True,
            smoothing=0,  # steps come in bursts between updates: only the mean speed means something
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}",
        )

    def _on_step(self) -> bool:
        self._bar.update(self.num_timesteps - self._bar.n)
        return True

    def _on_rollout_end(self) -> None:
        if self.model.ep_info_buffer:
            mean = safe_mean([episode["r"] for episode in self.model.ep_info_buffer])
            self._bar.set_postfix_str(f"return {mean:.1f}", refresh=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        if hasattr(self, "_bar"):
            self._bar.close()


class Stop(BaseCallback):
    """Ends the training at the first step after a stop was asked for.

    Where one of several processes is told to stop, all do so at the same step, where they look next: after `LOOK_EVERY`
    steps, or as many as the slowest of them takes `LOOK_AFTER` seconds for.
    """

    def __init__(self, request: StopRequest) -> None:
        super().__init__()
        self._request, self._agreed = request, False
        self._looked, self._next, self._since = 0, 1, time.monotonic()

    def _on_step(self) -> bool:
        request = self._request
        if request.world.group is None:
            return not request.requested
        if self.n_calls == self._next:
            told, seconds = request.agree(time.monotonic() - self._since)
            if told:
                self._agreed = request.requested = True
            of_a_step = seconds / (self.n_calls - self._looked)
            self._looked, self._since = self.n_calls, time.monotonic()
            self._next += max(1, min(LOOK_EVERY, int(LOOK_AFTER / max(of_a_step, 1e-9))))
        return not self._agreed
