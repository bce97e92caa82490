"""A training run from its configuration to its last agent, with everything that its folder then holds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from gymnasium.error import Error as GymnasiumError
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_wrapper

from agents.base import NaturalPolicyAlgorithm
from agents.callbacks import CommonStatistics, EpisodeRecorder, Evaluator, ProgressBar, Saver, Stop, evaluation_seed
from agents.config import RunConfig, agent_of, policy_for
from agents.curves import learning_curve
from agents.evaluation import Evaluation, Stopped, evaluate_saved, make_env, record_video
from agents.runs import RunFolder, SavedAgent, load_agent, normalized, read_state, save_agent
from agents.saved import saved_values
from agents.state import begin_episodes, restore, restore_log
from agents.trackers import TRACKERS, check_trackers
from envs.state import has_state
from envs.watchdog import Watchdog
from npg.parallel import World
from npg.runs import command_line
from npg.runs.folder import begun_only, refuse_existing
from npg.runs.signals import StopRequest

__all__ = [
    "FINAL_EPISODES",
    "MISTAKES",
    "Outcome",
    "Run",
    "check",
    "check_named",
    "continuation",
    "find_agent",
    "resume",
    "start",
]

FINAL_EPISODES = 20
MISTAKES = (*command_line.MISTAKES, TypeError, NotImplementedError, AssertionError, ImportError, GymnasiumError)
"""What `start` and `resume`, and the environments and constructors that they call, raise for bad input."""
_ALONE = World(torch.device("cpu"))


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        interrupted: whether it was told to stop before its end.
        timesteps: environment steps of the last agent.
        new_timesteps: those of them that this call trained.
        seconds: for these, evaluations left out.
        evaluation_seconds: for the evaluations on the way.
        evaluations: the last and the best agent's, on fresh episodes; none if it was interrupted.
    """

    interrupted: bool
    timesteps: int
    new_timesteps: int
    seconds: float
    evaluation_seconds: float
    evaluations: tuple[tuple[str, Evaluation], ...]


@dataclass
class Run:
    """A run that is ready to train: `start` or `resume` makes it.

    Attributes:
        config: the run, of all processes together.
        folder: its folder; of several processes the main one has it, and None the others.
        model: the agent, with the environments of this process.
        world: this process among its peers.
        state: of the checkpoint that the run goes on from (`agents.state`); None for a new run.
    """

    config: RunConfig
    folder: RunFolder | None
    model: NaturalPolicyAlgorithm
    world: World = _ALONE
    state: dict[str, Any] | None = None

    def train(
        self, *, progress: bool = True, video: bool = False, trackers: Mapping[str, str] = MappingProxyType({})
    ) -> Outcome:
        """Train to the configured number of steps, or until Ctrl-C; in both cases the agent and its curve are saved.

        Args:
            progress: show a progress bar.
            video: record an episode of the best agent at the end.
            trackers: out of `agents.trackers.TRACKERS`, each with its project or experiment.

        Raises:
            FloatingPointError: if the critic's loss is not finite; what was saved last stays.
            TrackerError: if a tracker cannot begin.
        """
        if self.folder is None:
            return self._help()
        try:
            return self._lead(self.folder, progress, video, trackers)
        finally:
            self.folder.unlock()

    def _lead(self, folder: RunFolder, progress: bool, video: bool, trackers: Mapping[str, str]) -> Outcome:
        """The training of the main process, which writes everything."""
        model, config = self.model, self.config
        in_progress = config.exact_resume == "state"
        check_trackers(trackers)
        with ExitStack() as at_end:
            model.set_logger(folder.logger(TRACKERS[name](folder.path, to, config) for name, to in trackers.items()))
            at_end.callback(model.logger.close)
            if self.state is not None:
                restore_log(model, self.state)
            if not folder.last.model.exists():
                save_agent(model, folder.last, folder, config)
            episodes = min(config.eval_episodes, config.n_eval_envs)
            bare = at_end.enter_context(closing(make_env(config, episodes, evaluation_seed(config), evaluation=True)))
            stop = StopRequest(self.world)
            evaluator = Evaluator(config, folder, normalized(bare, config, training=False), stop)
            bar = [at_end.enter_context(closing(ProgressBar(config)))] if progress else []
            recorder = EpisodeRecorder(folder.episodes(config.env), self.world)
            at_end.callback(recorder.close)
            before, learned = model.num_timesteps, False
            try:
                with stop:
                    seconds = self._learn(stop, recorder, evaluator, *bar) - evaluator.seconds
                    learned = True
                    whole = in_progress and not stop.requested  # else a rollout was cut off
                    save_agent(model, folder.last, folder, config, episodes=whole)
                    if not (stop.requested or evaluator.is_done):
                        with suppress(Stopped):
                            evaluator.evaluate()
                    if any(name.startswith("train/") for name in model.logger.name_to_value):
                        model.logger.record("time/total_timesteps", model.num_timesteps, exclude="tensorboard")
                        model.logger.dump(model.num_timesteps)  # the last update's, which `learn` leaves
                    save_agent(model, folder.last, folder, config, episodes=whole)  # now with these rows
            except BaseException as error:
                with suppress(Exception):  # which would hide the first one
                    if not learned and self._failed(bare):
                        save_agent(model, folder.last, folder, config)
                        error.add_note(
                            f"the agent of step {model.num_timesteps:,} is saved, and goes on with new episodes"
                        )
                    learning_curve(folder)
                raise
        learning_curve(folder)
        finals = () if stop.requested else self._final_evaluations(folder, video)
        return Outcome(
            interrupted=stop.requested,
            timesteps=model.num_timesteps,
            new_timesteps=model.num_timesteps - before,
            seconds=seconds,
            evaluation_seconds=evaluator.seconds,
            evaluations=finals,
        )

    def _failed(self, *others: Watchdog) -> bool:
        """Whether it is the environments that ended a training which is alone; the agent is then whole.

        Several processes keep their last checkpoint: all of them go on from it as if nothing had happened.
        """
        own = unwrap_vec_wrapper(cast(VecEnv, self.model.get_env()), Watchdog)
        return self.world.group is None and any(env is not None and env.failed for env in (own, *others))

    def _help(self) -> Outcome:
        """The training of a process beside the main one: it steps its environments and adds up, and writes nothing."""
        self.model.set_logger(Logger(None, []))
        before = self.model.num_timesteps
        with StopRequest(self.world) as stop:
            seconds = self._learn(stop, EpisodeRecorder(None, self.world))
        trained = self.model.num_timesteps
        return Outcome(stop.requested, trained, trained - before, seconds, 0.0, ())

    def _learn(self, stop: StopRequest, recorder: EpisodeRecorder, *others: BaseCallback) -> float:
        """Learn up to the configured number of steps; returns the seconds. The processes' callbacks begin alike."""
        before, started = self.model.num_timesteps, time.perf_counter()
        statistics = CommonStatistics(self.model.get_vec_normalize_env(), self.world)
        saver = Saver(self.config, self.folder, self.world)
        callbacks = [recorder, statistics, *others, saver, Stop(stop)]
        if before >= self.config.timesteps:  # only the final evaluation is left
            for callback in callbacks:
                callback.init_callback(self.model)
            return 0.0
        self.model.learn(self.config.timesteps - before, callback=callbacks, reset_num_timesteps=before == 0)
        return time.perf_counter() - started

    def _final_evaluations(self, folder: RunFolder, video: bool) -> tuple[tuple[str, Evaluation], ...]:
        seed = evaluation_seed(self.config, final=True)
        agents = {"last": folder.last, "best": folder.best}
        rows = {name: evaluate_saved(files, self.config, FINAL_EPISODES, seed) for name, files in agents.items()}
        folder.write_json("final_evaluation.json", {name: e.to_dict() for name, e in rows.items()})
        if video:
            record_video(folder.best, self.config, folder.path / "video" / "best.mp4", seed)
        return tuple((f"{name} model", e) for name, e in rows.items())


def start(config: RunConfig, run_dir: Path | None = None, command: str = "", world: World = _ALONE) -> Run:
    """Make environments and agent, then the run's folder: nothing is created if one of them fails.

    Of several processes each steps its part of the ``n_envs`` environments, which are together those of one process.

    Raises:
        FileExistsError: if the folder exists.
        ValueError: for what the environment or the algorithm's constructor does not take, or what the processes cannot
            share out evenly.
        ImportError: if a package is missing.
    """

    def make() -> tuple[RunConfig, NaturalPolicyAlgorithm]:
        if run_dir is not None:
            refuse_existing(run_dir)
        return _make(config, world)

    config, model = world.main_first(make)
    return _joined(config, model, world, lambda: RunFolder.create(run_dir, config, command))


def check(config: RunConfig) -> None:
    """Raise what `start` would raise for such a run, and leave nothing.

    Raises:
        ValueError: as `start`.
        ImportError: as `start`.
    """
    config.check_device()
    _, model = _make(replace(config, device="cpu"), _ALONE)
    model.get_env().close()  # type: ignore[union-attr]


def _make(config: RunConfig, world: World) -> tuple[RunConfig, NaturalPolicyAlgorithm]:
    """The agent with the environments of this process, and the run with its policy."""
    part = _part(config, world)
    part.check_device()
    _set_threads(config)
    env = make_env(part, part.n_envs, config.seed, evaluation=False)
    try:
        policy = config.policy or policy_for(env.observation_space)
        exact = _exact_resume(config, env, world)
        model = agent_of(part, policy, normalized(env, config, training=True))
        begin_episodes(model, config, world)
    except BaseException:
        env.close()
        raise
    return replace(config, policy=policy, exact_resume=exact), model


def find_agent(path: Path) -> tuple[RunFolder, SavedAgent]:
    """The folder and the files of a saved agent: the newest whole one of a run's folder, or one of its ``checkpoints``.

    Raises:
        FileNotFoundError: if there is no such run, or it has no agent.
        CheckpointError: if none of its agents is whole.
    """
    folder = RunFolder.of(path)
    if folder.path != path:
        if (steps := folder.agents.number(path)) is None:
            raise FileNotFoundError(f"{path} is not an agent of a run: their names are model_<steps>_steps.zip")
        return folder, folder.checkpoint(steps)
    return folder, folder.newest()


def check_named(
    path: Path, found: tuple[str, str], algo: str | None = None, env: str | None = None, option: str | None = None
) -> None:
    """Compare what a command names with what the folder that it opens is of.

    No module is imported because a folder says so: an environment ``module:Id`` has to be named.

    Args:
        path: of the folder, or of an agent in it.
        found: the algorithm and the environment that it is of.
        algo: the algorithm that is named, if any.
        env: the environment that is named, if any.
        option: with which the command names it; by default the command is that which continues.

    Raises:
        ValueError: if another one is named, or none where the folder's would import a module.
    """
    for what, given, of in (("algorithm", algo, found[0]), ("environment", env, found[1])):
        if given not in (None, of):
            raise ValueError(f"the {what} of {path} is {of}, not {given}")
    module, colon, _ = found[1].rpartition(":")
    if colon and env is None:
        remedy = f"add {option} {found[1]}" if option else f"write {continuation(*found, path)}"
        raise ValueError(
            f"the environment of {path} is {found[1]}, and to make it would import {module}, which its folder alone "
            f"cannot ask for: {remedy}"
        )


def continuation(algo: str, env: str, path: Path) -> str:
    """The command that goes on with the run, the seeds or the search of a folder, as `check_named` lets it."""
    return command_line.again(*([algo, env] if ":" in env else []), "--resume", path)


def resume(
    path: Path,
    command: str = "",
    run_dir: Path | None = None,
    *,
    algo: str | None = None,
    env: str | None = None,
    world: World = _ALONE,
    **changes: Any,
) -> Run:
    """Continue a run with its parameters, optimiser, statistics, counters and random number generators.

    A run that was killed goes on from its last checkpoint as the undisturbed run did, unless its ``exact_resume`` is
    ``off``, and its records are cut back to there. After an interrupt, which cuts off a rollout, the environments begin
    new episodes, from a seed that depends on the number of steps, so as not to repeat those at the beginning. The
    number of processes may change; those beside the main one begin new random numbers, from such a seed as well. A run
    that was ended before it saved anything begins anew.

    Args:
        path: the run's folder, or one of the models in its ``checkpoints``.
        command: for command.txt.
        run_dir: a new folder in which to go on, instead of the run's own; needed for a checkpoint with later ones.
        algo: if given, the algorithm that the run must be of.
        env: if given, the environment that the run must be of. It is needed if that is ``module:Id``: no code is
            imported because a file says so.
        world: this process among its peers.
        changes: fields of `RunConfig` that may change on the way: timesteps, device, threads, the frequencies.

    Raises:
        FileExistsError: if `run_dir` exists.
        FileNotFoundError: if there is no such run or agent.
        ValueError: if a file is damaged or of another algorithm, nothing is left to do, or a checkpoint of a run that
            has trained on should go on in the same folder.
    """
    anew = begun_only(path)
    folder, files = (RunFolder.open(path), None) if anew else find_agent(path)
    config = folder.config
    check_named(path, (config.algo, config.env), algo, env)
    config = replace(config, **{key: value for key, value in changes.items() if value is not None})
    if files is None:
        return start(config, run_dir or path, command, world)

    def make() -> tuple[RunConfig, NaturalPolicyAlgorithm, dict[str, Any]]:
        if run_dir is not None:
            refuse_existing(run_dir)
        elif why := _newer(folder, files):
            raise ValueError(why)
        elif world.is_main:
            folder.lock()
        part = _part(config, world)
        _set_threads(config)
        model, venv, state = load_agent(
            files, part, lambda: make_env(part, part.n_envs, config.seed, evaluation=False), training=True
        )
        try:
            # A run that was stopped in its last update, or in the final evaluation, still lacks the latter.
            evaluated = folder.final_timesteps == model.num_timesteps or files.model != folder.last.model
            if model.num_timesteps >= config.timesteps and (evaluated or run_dir is not None):
                raise ValueError(
                    f"{path} has trained {model.num_timesteps:,} steps, and {config.timesteps:,} are asked for: "
                    "nothing is left to do; give more with --timesteps"
                )
            exact = _exact_resume(config, venv, world, resumed=True)
            if not (restore(model, state) and world.group is None):
                model._last_obs = None
                begin_episodes(model, config, world)
        except BaseException:
            venv.close()
            raise
        return replace(config, exact_resume=exact), model, state

    def begin() -> RunFolder:
        if run_dir is not None:
            return RunFolder.create(run_dir, config, command)
        if state["records"] is not None:
            folder.cut(state["records"])
        folder.cut_best(model.num_timesteps)
        folder.begin(config.to_dict(), command)
        return folder

    try:
        config, model, state = world.main_first(make)
        return _joined(config, model, world, begin, state)
    except BaseException:
        folder.unlock()
        raise


def _newer(folder: RunFolder, files: SavedAgent) -> str:
    """Why `files` cannot go on in this folder, whose records are those of one line of agents: a later one is there."""
    if files.model == folder.last.model:
        return ""
    try:
        read_state(folder.last)
        steps, latest = (saved_values(agent.model)["num_timesteps"] for agent in (files, folder.last))
    except (ValueError, OSError):  # the last one is lost, or this one is, as loading it will say
        return ""
    if steps >= latest:
        return ""
    return (
        f"{folder.path} has trained on to step {latest}. To continue there from {files.model} would lose those steps: "
        "give --run-dir NEW, and it continues in a folder of its own"
    )


def _part(config: RunConfig, world: World) -> RunConfig:
    """What one process does of the run: the environments that it steps, on its own device."""
    if config.n_envs % world.size:
        raise ValueError(
            f"n_envs={config.n_envs} must be a multiple of the {world.size} processes, which share them: give "
            f"--n-envs {math.ceil(config.n_envs / world.size) * world.size}, or start another number of processes"
        )
    if world.group is None:
        return config
    return replace(config, n_envs=config.n_envs // world.size, device=str(world.device))


def _exact_resume(config: RunConfig, env: VecEnv, world: World, *, resumed: bool = False) -> str:
    """How the run's checkpoints are exact, where ``auto`` was asked for, or the processes have become several."""
    can = world.group is None and has_state(env)
    if config.exact_resume == "state" and not (can or resumed):
        raise ValueError(
            f"exact_resume='state' cannot be with {config.env} here: the state of these environments, or of those of "
            "several processes, cannot be saved. Take 'restart'"
        )
    if config.exact_resume in ("auto", "state"):
        return "state" if can else "restart"
    return config.exact_resume


def _joined(
    config: RunConfig,
    model: NaturalPolicyAlgorithm,
    world: World,
    open_folder: Callable[[], RunFolder],
    state: dict[str, Any] | None = None,
) -> Run:
    """The run, once all processes have its parameters, and the main one its folder."""
    try:
        model.join(world.group)
        folder = world.main_first(lambda: open_folder() if world.is_main else None)
    except BaseException:
        model.get_env().close()  # type: ignore[union-attr]
        raise
    return Run(config, folder, model, world, state)


def _set_threads(config: RunConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
