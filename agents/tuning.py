"""A search for better settings of an algorithm on one environment, by Optuna, in a folder that it can be continued in.

::

    config.yaml     what is searched     command.txt    every command that worked here
    preset.yaml     where it begins      best.yaml      the best setting, as a preset
    study.log       Optuna's journal     trials.csv     a row for each trial
    trials/         the run folder of each trial

Each trial is a training run. The first one is the preset itself, the others are proposed by the tree-structured Parzen
estimator (Bergstra et al. 2011). A trial whose evaluation is below the median of the earlier trials' at the same step
ends early. Seeds are 100 and above: those of reports, 0, 1, 2, …, tune nothing.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from statistics import median
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from stable_baselines3.common.logger import Logger

from agents.callbacks import Evaluator, evaluation_seed
from agents.config import ALGORITHMS, RunConfig, given_settings, preset_of, resolve, write_preset
from agents.evaluation import make_env
from agents.runs import normalized, save_agent
from agents.schedules import first_value, is_named
from agents.search_space import coded, settings_of, suggested, value_of, value_or, widened
from agents.training import check, check_named, start
from npg.checks import require
from npg.parallel import World
from npg.runs import folder
from npg.runs.command_line import steady_console
from npg.runs.files import write_rows
from npg.runs.presets import check_kinds, check_names, read_yaml
from npg.runs.signals import StopRequest

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

__all__ = ["FIRST_SEED", "Tuning", "TuningConfig", "result_of"]

FIRST_SEED = 100
"""Of the seeds that tune; smaller ones are for reports."""

_OPTIONS = ("timesteps", "n_envs", "backend", "device", "threads", "eval_episodes")


@dataclass(frozen=True)
class TuningConfig:
    """What is searched.

    Attributes:
        algo: a name out of `agents.config.ALGORITHMS`.
        env: an environment that `envs.make_vec_env` knows.
        trials: how many, those that ended early or were refused included.
        seeds: training runs of a trial, with the seeds 100, 101, …; its value is the mean of their last evaluations.
        evaluations: of each run; after each of them a trial may end early.
        options: fields of `RunConfig` that go over the preset.
        space: setting ↦ ``{low, high, log, step}`` or ``{choices}``.

    Raises:
        ValueError: a value is out of its range.
    """

    algo: str
    env: str
    trials: int = 20
    seeds: int = 1
    evaluations: int = 10
    options: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("trials", "seeds", "evaluations"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check_names("option", self.options, _OPTIONS)

    @classmethod
    def read(cls, path: Path) -> TuningConfig:
        """Those that were written to a YAML file.

        Raises:
            ValueError: if the file is damaged, or is of something else.
        """
        content = read_yaml(path)
        if "space" not in content:
            raise ValueError(f"{path} has no search space: it is not the config.yaml of a search")
        check_names("key", content, [f.name for f in fields(cls)], f"in {path}")
        return cls(**content)


# The search -----------------------------------------------------------------------------------------------------------


class Tuning:
    """A search in its folder; `create` begins one, `open` continues one.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = TuningConfig.read(path / "config.yaml")

    @classmethod
    def create(
        cls,
        path: Path | None,
        config: TuningConfig,
        command: str = "",
        *,
        preset: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Tuning:
        """Make the folder; without a path it is ``runs/tune-<algo>-<env>-<n>`` with the first free n.

        Args:
            path: of the folder.
            config: what is searched.
            command: for command.txt.
            preset: where the search begins, as of `agents.config.resolve`.
            settings: what goes over the preset and stays as it is.

        Raises:
            FileExistsError: if `path` exists, and is not an empty folder.
            ImportError: if Optuna is not installed.
            ValueError: for what `resolve` or the algorithm refuses, at either end of a range too, or a setting that is
                both fixed and searched.
        """
        _optuna()
        settings = dict(settings or {})
        if both := sorted((settings.keys() | config.options.keys()) & config.space.keys()):
            raise ValueError(f"{', '.join(both)} cannot be both set and searched: leave one out")
        n_envs = config.options.get("n_envs")  # which is a part of what was found, as timesteps are not
        base = resolve(config.algo, config.env, preset=preset, settings=settings, n_envs=n_envs)
        for name, given in config.space.items():
            for example in given.get("choices") or (given["low"], given["high"]):
                changed = {**settings, name: example}
                tried = resolve(config.algo, config.env, preset=preset, settings=changed, **config.options)
                if name in tried.hyperparameters and (check_option := ALGORITHMS[config.algo].options[name].check):
                    value = tried.hyperparameters[name]
                    check_option(name, first_value(name, value) if is_named(value) else value)
        space = {name: widened(name, given, value_or(base, name, given)) for name, given in config.space.items()}
        config = replace(config, space=space)
        if path is None:
            stem = f"runs/tune-{config.algo}-{config.env.replace('/', '_').replace(':', '_')}"
            path = next(p for n in count(1) if not (p := Path(f"{stem}-{n}")).exists())
        folder.refuse_existing(path)
        check(resolve(config.algo, config.env, preset=preset, settings=settings, **config.options))
        path.mkdir(parents=True, exist_ok=True)
        entry, given = preset_of(base), given_settings(config.algo, config.env, preset, settings).get("normalize")
        if base.normalize is not None and isinstance(given, Mapping) and "gamma" in given:
            entry["normalize"] = base.normalize  # with its own discount, which no trial changes
        write_preset(path / "preset.yaml", config.env, entry)
        folder.RunFolder(path).begin(asdict(config), command)  # with its config.yaml it is the folder of a search
        return cls(path)

    @classmethod
    def open(
        cls,
        path: Path,
        command: str = "",
        trials: int | None = None,
        *,
        algo: str | None = None,
        env: str | None = None,
    ) -> Tuning:
        """A search that was begun before.

        Args:
            path: of its folder.
            command: for command.txt.
            trials: another number of trials, in all.
            algo: if given, the algorithm that the search must be of.
            env: if given, the environment that the search must be of. It is needed if that is ``module:Id``: no code
                is imported because a file says so.

        Raises:
            FileNotFoundError: if there is none.
            FolderInUse: if another process searches there.
            ImportError: if Optuna is not installed.
            ValueError: if a file is damaged or of another algorithm or environment.
        """
        _optuna()
        if not (path / "config.yaml").is_file():
            raise FileNotFoundError(f"{path} is not the folder of a search: it has no config.yaml")
        config = TuningConfig.read(path / "config.yaml")
        check_named(path, (config.algo, config.env), algo, env)
        if trials is not None:
            config = replace(config, trials=trials)
        with _alone_in(path) as own:
            own.begin(asdict(config), command)
        return cls(path)

    def study(self) -> Study:
        """Optuna's study, which its dashboard and its plots take too."""
        optuna = _optuna()
        backend = optuna.storages.journal.JournalFileBackend(str(self.path / "study.log"))
        return optuna.create_study(
            study_name="npg-toolkit",
            storage=optuna.storages.JournalStorage(backend),
            direction="maximize",
            load_if_exists=True,
            pruner=cast(Any, _Median(after_trials=4, after_steps=self.config.evaluations // 5)),
        )

    def _of_preset(self) -> dict[str, Any]:
        """Optuna's parameters of the preset, which has no value for some names, such as in its policy_kwargs."""
        config, known = self.config, {}
        base = resolve(config.algo, config.env, preset=str(self.path / "preset.yaml"))
        for name, given in config.space.items():
            with suppress(KeyError):
                value = value_of(base, name)
                known[name] = coded([value])[0] if "choices" in given else first_value(name, value)
        return known

    @property
    def finished(self) -> list[FrozenTrial]:
        """The trials that came to an end, which early ones and refused ones are too."""
        trials = self.study().get_trials(deepcopy=False)
        return [t for t in trials if t.state.name in ("COMPLETE", "PRUNED") or "error" in t.user_attrs]

    @property
    def best(self) -> FrozenTrial | None:
        """The trial with the largest value, of those that keep CPO's limit if any does; of equals the first one."""
        complete = [t for t in self.finished if t.value is not None and t.state.name == "COMPLETE"]
        return max(complete, key=lambda t: (-excess_of(t), cast(float, t.value), -t.number)) if complete else None

    def _enqueue_due(self) -> None:
        """The preset, which is the first trial, and those that were interrupted."""
        states = _optuna().trial.TrialState
        study = self.study()
        if not any("preset" in trial.user_attrs for trial in study.get_trials(deepcopy=False)):
            study.enqueue_trial(self._of_preset(), user_attrs={"preset": True})
        for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            params = trial.system_attrs.get("fixed_params", {}) | trial.params  # of one that had hardly begun
            study.enqueue_trial(params, user_attrs={k: v for k, v in trial.user_attrs.items() if k == "preset"})
            study.tell(trial.number, state=states.FAIL)

    def run(self, jobs: int = 1) -> None:
        """Train the trials that are left, in several processes at a time.

        Args:
            jobs: how many processes; with more than one, each has one thread unless the options say otherwise.

        Raises:
            FolderInUse: if another process searches in the folder.
            KeyboardInterrupt: on Ctrl-C or SIGTERM. Trials under way begin anew when the search goes on.
            RuntimeError: if a process ended early.
            ValueError: if the preset itself, which is the first trial, is refused.
        """
        require(isinstance(jobs, int) and jobs >= 1, "jobs", jobs, "at least 1")
        with _alone_in(self.path):
            self._enqueue_due()
            try:
                self._run(jobs)
            finally:  # also of a trial that ended just before a stop, and of processes that wrote at a time
                if self.finished:
                    self._write()

    def _run(self, jobs: int) -> None:
        remaining = self.config.trials - len(self.finished)
        with _signals() as check:
            if remaining > 0 and not any("preset" in t.user_attrs for t in self.finished):
                self.trial()  # alone, so that a mistake is one error; the others are compared with it
                remaining -= 1
            check()
            if jobs == 1 or remaining <= 1:
                for _ in range(remaining):
                    self.trial()
                    check()
                return
            context = multiprocessing.get_context("spawn")
            tickets = context.Value("i", remaining)
            workers = [context.Process(target=_work, args=(self.path, tickets)) for _ in range(min(jobs, remaining))]
            try:
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
            finally:
                for worker in workers:
                    if worker.is_alive():
                        worker.terminate()
                        worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError(f"a process of the search ended early: the trials so far are kept in {self.path}")

    def trial(self) -> None:
        """Train the next trial, and write the tables."""
        optuna = _optuna()
        states, study = optuna.trial.TrialState, self.study()
        trial, started = study.ask(), time.perf_counter()
        # Anew for each trial, from what is known by then: a search that was continued proposes what one in a go does.
        # Counted are the trials before it that have ended or are under way, which no two at a time have alike.
        ended = {t.number for t in self.finished}
        before = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        study.sampler = optuna.samplers.TPESampler(
            seed=FIRST_SEED + sum(t.number in ended or t.state is states.RUNNING for t in before),
            n_startup_trials=max(4, self.config.trials // 4),
            constant_liar=True,
        )
        value, state = None, states.FAIL
        try:
            value, state = self._train(trial), states.COMPLETE
            if "excess" in trial.user_attrs and hasattr(trial, "set_constraint"):  # since Optuna 5
                trial.set_constraint("cost", excess_of(trial))
        except optuna.TrialPruned:
            state = states.PRUNED
        except (ValueError, FloatingPointError) as error:
            trial.set_user_attr("error", str(error))
            if trial.user_attrs.get("preset"):
                study.tell(trial, state=state)
                raise ValueError(f"the preset itself cannot be trained: {error}") from error
        trial.set_user_attr("seconds", round(time.perf_counter() - started, 1))
        study.tell(trial, value, state=state)
        self._write()
        self._tell(trial.number)

    def _train(self, trial: Trial) -> float:
        config, total = self.config, 0.0
        searched = self._of_preset() if trial.user_attrs.get("preset") else config.space
        settings = suggested(trial, {name: config.space[name] for name in searched})
        for k in range(config.seeds):
            preset, seed = str(self.path / "preset.yaml"), FIRST_SEED + k
            run = resolve(config.algo, config.env, preset=preset, settings=settings, seed=seed, **config.options)
            every = math.ceil(run.timesteps / config.evaluations)
            run = replace(run, eval_freq=every, save_freq=run.timesteps)
            total += _train(run, self.path / "trials" / f"{trial.number:04d}-s{run.seed}", trial, k, total, config)
        return total / config.seeds

    # Records ----------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        rows = []
        for t in self.finished:
            row = {"trial": t.number, "state": t.state.name.lower(), "value": t.value}
            rows.append(
                row | {k: t.user_attrs.get(k) for k in ("preset", "excess", "steps", "seconds", "error")} | t.params
            )
        write_rows(self.path / "trials.csv", rows)
        if (best := self.best) is not None:
            settings = settings_of(best.params, self.config.space)
            preset = str(self.path / "preset.yaml")
            found = resolve(self.config.algo, self.config.env, preset=preset, settings=settings)
            last = FIRST_SEED + self.config.seeds - 1
            seeds = f"seeds {FIRST_SEED} to {last}" if self.config.seeds > 1 else f"seed {FIRST_SEED}"
            write_preset(
                self.path / "best.yaml",
                self.config.env,
                preset_of(found),
                f"{self.config.algo} on {self.config.env}: trial {best.number} of {len(rows)}, mean return "
                f"{best.value:.6g}{_broken(best)} on the tuning {seeds}.",
            )

    def _tell(self, number: int) -> None:
        trial = next(t for t in self.finished if t.number == number)
        best = self.best
        so_far = "" if best is None else f"; best: trial {best.number}, {result_of(best)}"
        if trial.state.name == "COMPLETE":
            said = result_of(trial)
        else:
            said = "ended early" if trial.state.name == "PRUNED" else f"refused: {trial.user_attrs['error']}"
        preset = " (the preset)" if "preset" in trial.user_attrs else ""
        print(f"trial {number}{preset}: {said}, {trial.user_attrs['seconds']:.0f} s{so_far}", flush=True)


def excess_of(trial: Trial | FrozenTrial) -> float:
    """How far the costs of a trial's episodes are above CPO's limit, in the mean; 0 where they keep it."""
    return float(trial.user_attrs.get("excess", 0.0))


def result_of(trial: FrozenTrial) -> str:
    """What a trial came to, in words."""
    return f"return {trial.value:.1f}{_broken(trial)}"


def _broken(trial: FrozenTrial) -> str:
    return f" (cost {excess:.3g} above the limit)" if (excess := excess_of(trial)) else ""


@dataclass(frozen=True)
class _Median:
    """A pruner for Optuna: a trial ends early where it is below the median of the complete trials, at the same step.

    Optuna's own compares the best evaluation so far. It ends no trial that was good once, and so none after its first
    seed: the mean over seeds falls when another one begins.

    Attributes:
        after_trials: how many trials have to be complete before.
        after_steps: the first step at which a trial may end.
    """

    after_trials: int
    after_steps: int

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial, as it was reported last, is to end."""
        step = trial.last_step
        complete = study.get_trials(deepcopy=False, states=(_optuna().trial.TrialState.COMPLETE,))
        if step is None or step < self.after_steps or len(complete) < self.after_trials:
            return False
        others = [t.intermediate_values[step] for t in complete if step in t.intermediate_values]
        return bool(others) and not trial.intermediate_values[step] >= median(others)


class _Pruner(Evaluator):
    """Tells the trial of each evaluation, which ends it where it is behind the others."""

    def __init__(self, config: RunConfig, run: Any, env: Any, report: Any) -> None:
        super().__init__(config, run, env, StopRequest(World(torch.device("cpu"))))  # an interrupt ends the trial
        self._report = report

    def evaluate(self) -> Any:
        evaluation = super().evaluate()
        self._report(evaluation.mean_return, self.model.num_timesteps)
        return evaluation


def _train(config: RunConfig, path: Path, trial: Trial, k: int, before: float, tuning: TuningConfig) -> float:
    """Train one run of a trial; the return of its last agent."""
    run = start(config, path, f"trial {trial.number} of {path.parent.parent}")
    run_folder, model = run.folder, run.model
    assert run_folder is not None

    def report(value: float, timesteps: int) -> None:
        # Counted in steps: of rollouts as long as several periods there is one evaluation, not several.
        over = timesteps >= config.timesteps
        step = k * tuning.evaluations + (tuning.evaluations if over else timesteps // config.eval_freq)
        trial.report((before + value) / (k + 1), step)
        # With a limit the return alone does not tell which trial is behind.
        if evaluator.limit == math.inf and step < tuning.seeds * tuning.evaluations and trial.should_prune():
            from optuna import TrialPruned

            raise TrialPruned

    with ExitStack() as at_end:
        at_end.callback(model.get_env().close)  # type: ignore[union-attr]
        at_end.callback(run_folder.unlock)
        at_end.callback(lambda: trial.set_user_attr("steps", model.num_timesteps))
        episodes = min(config.eval_episodes, config.n_eval_envs)
        bare = at_end.enter_context(closing(make_env(config, episodes, evaluation_seed(config), evaluation=True)))
        model.set_logger(Logger(None, []))
        evaluator = _Pruner(config, run_folder, normalized(bare, config, training=False), report)
        model.learn(config.timesteps, callback=[evaluator])
        save_agent(model, run_folder.last)
        if not evaluator.is_done:
            evaluator.evaluate()
        assert evaluator.last is not None
        if evaluator.limit < math.inf:
            excess = evaluator.excess(evaluator.last.mean_cost)
            trial.set_user_attr("excess", trial.user_attrs.get("excess", 0.0) + excess / tuning.seeds)
        return evaluator.last.mean_return


def _work(path: Path, tickets: Any) -> None:
    """A process of the search: trials as long as there are tickets. The one that began the search ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    steady_console()
    tuning = Tuning(path)
    tuning.config = replace(tuning.config, options={"threads": 1, **tuning.config.options})
    while True:
        with tickets.get_lock():
            if tickets.value <= 0:
                return
            tickets.value -= 1
        tuning.trial()


@contextmanager
def _alone_in(path: Path) -> Iterator[folder.RunFolder]:
    """Keep other processes out of the folder."""
    own = folder.RunFolder(path)
    own.lock()
    try:
        yield own
    finally:
        own.unlock()


@contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """SIGTERM is as Ctrl-C, and both stay what they are wherever they come.

    Python ignores an exception in a destructor or in a weak reference's callback, where a signal may be handled too.
    So what this gives raises it again.
    """
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    former: dict[int, Any] = {}
    with suppress(ValueError):  # outside of the main thread
        for number in (signal.SIGTERM, signal.SIGINT):
            if number == signal.SIGTERM or signal.getsignal(number) is signal.default_int_handler:
                former[number] = signal.signal(number, stop)
    try:
        yield check
    except OSError as error:  # Optuna's lock, interrupted while it is let go, misses its own file
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        for which, handler in former.items():
            signal.signal(which, handler)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("the search needs Optuna: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
