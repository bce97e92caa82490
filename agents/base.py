"""What NPG, TRPO and their kin share: the options of the constructor, and the life cycle of Stable-Baselines3.

Collecting is in `agents.collect`, an update in `agents.update`. An algorithm is this class and one method,
``actor_step``: how the policy moves, given a batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import inf, isfinite
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.distributed as dist
from gymnasium import spaces
from stable_baselines3.common import buffers
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.save_util import load_from_zip_file, recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, get_device, obs_as_tensor
from torch import Tensor

from agents.afterstate import AfterstatePolicy
from agents.average import PolicyAverage
from agents.buffer import DictRolloutBuffer, RolloutBuffer
from agents.checks import device_of, not_finite_in
from agents.collect import Collector
from agents.masks import TakesStructures, as_taken, made_env
from agents.networks import Networks
from agents.options import HasOptions, option
from agents.recurrent import POLICIES as RECURRENT
from agents.saved import as_lists, saved_attributes, saved_values
from agents.sequences import SequenceBuffer, is_recurrent
from agents.update import ActorReport, Batch, restored_on_error, surrogate, update
from npg.checks import flag, kind, number, one_of, whole
from npg.families import Geometry
from npg.parallel import size

__all__ = ["Metric", "NaturalPolicyAlgorithm", "Preconditioner"]

Preconditioner = Literal["diagonal", "kfac"]
Metric = Literal["fisher", "euclidean", "wasserstein"] | Geometry


def _policy(name: str, value: Any) -> None:
    if not isinstance(value, str | type):
        raise TypeError(f"{name} must be the name of a policy, or its class, got {value!r}")


def _policy_kwargs(name: str, value: Any) -> None:
    kind(name, value, dict, "a dict of arguments of the policy")
    optimizer = (value or {}).get("optimizer_class")
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.LBFGS):
        raise ValueError(f"{name} has optimizer_class={optimizer.__name__}, whose steps need a closure: take Adam")
    if "lr" in ((value or {}).get("optimizer_kwargs") or {}):
        raise ValueError(f"{name} has an lr in its optimizer_kwargs, which is set by learning_rate: give it there")


def _steps(name: str, value: Any) -> int:
    """A number of steps as people write it, such as 1e5, as an integer."""
    if isinstance(value, float | np.floating):
        if not (isfinite(value) and value == int(value)):
            remedy = (
                "a large one, such as 10**12, that a callback ends" if value == inf else "one, such as 100_000 or 1e5"
            )
            raise ValueError(f"{name} must be a whole number, got {value}: give {remedy}")
        value = int(value)
    elif not isinstance(value, bool):
        with suppress(TypeError):
            value = index(value)  # of an array or a tensor of one integer too
    whole(name, value, 0)
    return int(value)


def _no_folder(path: Any) -> None:
    """Raise IsADirectoryError if a saved model is to be loaded from a folder; it names the models in it."""
    if not (isinstance(path, str | PathLike) and Path(path).is_dir()):
        return
    folder = Path(path)
    there = [folder / name for name in ("last_model.zip", "best_model.zip") if (folder / name).is_file()]
    if (file := folder.with_name(f"{folder.name}.zip")).is_file():
        there.append(file)
    remedy = " or ".join(map(str, there)) or "the file of a saved model, such as last_model.zip in the folder of a run"
    raise IsADirectoryError(f"path={str(path)!r} is a folder: give {remedy}")


def _seed(name: str, value: Any) -> None:
    if value is not None:
        whole(name, value, 0, 2**32 - 1)


class NaturalPolicyAlgorithm(HasOptions, TakesStructures, Collector):
    """On-policy actor-critic learning where the actor moves by natural steps.

    The options are those of ``sb3_contrib.TRPO`` by the same names, as far as they concern all algorithms here, and
    some of our own. Several processes can learn as one: see `join`.

    Args:
        {options}

    Raises:
        TypeError: if an argument is not of its kind; a float is no whole number.
        ValueError: if an argument is out of its range.
    """

    policy: Any = option(
        annotation="str | type[ActorCriticPolicy]",
        check=_policy,
        doc='``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, one that remembers like ``"MlpLstmPolicy"``, '
        "or an actor-critic policy class.",
        attribute=False,
    )
    env: Any = option(annotation="GymEnv | str", doc="the environment, or its Gymnasium id.", attribute=False)
    learning_rate: float | Schedule = option(
        default=1e-3,
        check=partial(number, low=0),
        doc="of the critic's Adam; a number, a function of the remaining progress (from 1 to 0), or "
        '``"linear_1e-3"``, which falls from 0.001 to 0.',
        scheduled=True,
    )
    n_steps: int = option(default=2048, check=partial(whole, low=1), doc="steps per environment and update.")
    batch_size: int = option(default=128, check=partial(whole, low=1), doc="mini-batch of the critic's Adam.")
    gamma: float = option(default=0.99, check=partial(number, low=0, high=1), doc="discount factor.")
    n_critic_updates: int = option(
        default=10,
        check=partial(whole, low=0),
        doc='epochs of the critic (``critic="adam"``), or its natural steps (``"natural"``).',
    )
    gae_lambda: float = option(
        default=0.95, check=partial(number, low=0, high=1), doc="λ of generalised advantage estimation."
    )
    use_sde: bool = option(default=False, check=flag, doc="generalised state-dependent exploration.")
    sde_sample_freq: int = option(
        default=-1,
        check=partial(whole, low=-1),
        doc="draw a new exploration matrix every so many steps; −1 for once per rollout.",
    )
    rollout_buffer_class: type[buffers.RolloutBuffer] | None = option(
        default=None,
        check=partial(kind, kinds=type, what="a class of rollout buffers"),
        doc="another rollout buffer than the default one.",
    )
    rollout_buffer_kwargs: Any = option(
        default=None,
        annotation="dict[str, Any] | None",
        check=partial(kind, kinds=dict, what="a dict of arguments of the buffer"),
        doc="its arguments.",
    )
    normalize_advantage: bool = option(
        default=True, check=flag, doc="take their mean from the advantages, and divide them by their deviation."
    )
    sub_sampling_factor: int = option(
        default=1,
        check=partial(whole, low=1),
        doc="use every k-th row of a shuffle of the rollout for all of the actor's step.",
    )
    stats_window_size: int = option(
        default=100,
        check=partial(whole, low=1),
        doc="episodes over which returns and lengths are averaged in the log.",
    )
    tensorboard_log: str | None = option(
        default=None,
        check=partial(kind, kinds=str | PathLike, what="the path of a folder"),
        doc="where to log to.",
    )
    policy_kwargs: Any = option(
        default=None,
        annotation="dict[str, Any] | None",
        check=_policy_kwargs,
        doc="arguments of the policy.",
    )
    verbose: int = option(default=0, check=partial(whole, low=0), doc="0 for silence, 1 for information.")
    seed: int | None = option(default=None, check=_seed, doc="of all random numbers.")
    device: Any = option(
        default="auto", annotation="torch.device | str", check=device_of, doc="where the networks live."
    )
    _init_setup_model: bool = option(default=True, attribute=False)
    critic: Literal["adam", "natural"] = option(
        default="adam",
        check=partial(one_of, known=("adam", "natural")),
        doc='``"adam"``: epochs of mini-batch Adam; ``"natural"``: Gauss–Newton steps on the whole batch, the natural '
        "gradient of a Gaussian likelihood, damped for returns with a deviation of about 1: normalise rewards for it.",
        keyword=True,
    )
    advantage_deviation: Literal["batch", "running"] = option(
        default="batch",
        check=partial(one_of, known=("batch", "running")),
        doc='the deviation by which normalised advantages are divided: ``"batch"`` for that of the rollout, '
        '``"running"`` for its root mean square over all updates so far. With it the size of the advantages says how '
        "much there is to gain; a step that fills its radius does not depend on it.",
        keyword=True,
    )
    ema: float = option(
        default=0.0,
        check=partial(number, low=0, high=1, below=True),
        doc="the decay per update of an average of the policy's weights: `predict` acts by it, so that evaluations and "
        "exports are of it; rollouts and learning are of the weights themselves. 0.9 is about the last ten policies; 0 "
        "for none.",
        keyword=True,
    )
    train_shared_features: bool = option(
        default=False,
        check=flag,
        doc="let the critic also train a feature extractor that it shares with the actor. That moves the policy "
        "outside the trust region; by default only the actor's step does, and running statistics that the policy "
        "depends on, such as those of BatchNorm, never move.",
        keyword=True,
    )

    # What an algorithm without natural steps of its actor takes for a natural critic.
    cg_max_steps = 15
    fisher_fraction = 1.0
    preconditioner: Preconditioner | None = None
    metric: Metric = "fisher"

    advantage_variance: Sequence[float] = (0, 0.0)
    """How many batches of advantages there were, and the mean of their variances."""

    average: PolicyAverage | None = None
    """Of the weights, with ``ema``."""

    refused_steps: int = 0
    """How many steps of the actor were refused since the last one that was taken."""

    sb3_contrib_options: ClassVar[dict[str, Any]] = {}
    """Options with which this algorithm is that of ``sb3_contrib``."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
        "AfterstatePolicy": AfterstatePolicy,
        **RECURRENT,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = self.bind(*args, **kwargs)
        theirs = {name: given.pop(name) for name in _STABLE_BASELINES3}
        policy, env, setup = (given.pop(name) for name in ("policy", "env", "_init_setup_model"))
        if theirs["seed"] is not None:
            theirs["seed"] = int(theirs["seed"])  # Python's own generator takes no other integers
        vars(self).update(given, stats_window_size=theirs["stats_window_size"])
        self.algorithm = self.name()
        self.critic_damping = 0.1
        if setup and env is None:
            raise TypeError(
                "env must be an environment, got None: give one, such as envs.make_vec_env('CartPole-v1', n_envs)"
            )
        policy, env = self._matched(policy, env, theirs["verbose"])
        Collector.__init__(
            self,
            policy,
            env,
            **theirs,
            ent_coef=0.0,
            vf_coef=0.0,
            max_grad_norm=0.0,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        if setup:
            self._setup_model()

    @classmethod
    def checked(cls, name: str, value: Any) -> Any:
        """As of every option; the name of a device becomes a `torch.device`, as Stable-Baselines3 does it."""
        value = super().checked(name, value)
        return get_device(value) if name == "device" and not isinstance(value, torch.device) else value

    def option_written(self, name: str, value: Any) -> None:
        """Pass a new value on to what was made with the old one.

        Raises:
            ValueError: for an option that is built in, and so stays; it says what to do.
        """
        if "networks" not in vars(self):  # nothing was made yet
            return
        if (remedy := _BUILT_IN.get(name)) and value != (present := getattr(self, name)):
            raise ValueError(
                f"{name} is built into the agent, which has {present!r}, got {value!r}: "
                + remedy.format(algorithm=type(self).__name__, name=name)
            )
        if name in ("gamma", "gae_lambda"):
            setattr(self.rollout_buffer, name, value)
        elif name == "learning_rate":
            self.lr_schedule = FloatSchedule(value)
        elif name == "stats_window_size":
            self._stats_window_size = value
        elif name == "train_shared_features":
            self.networks = Networks(self)
        elif name == "ema" and value and self.average is not None:
            self.average.decay = value
        elif name == "ema":
            self.average = PolicyAverage(self.policy, value) if value else None

    @classmethod
    def name(cls) -> str:
        """Of the algorithm: that of the nearest class that is not a user's."""
        return next(base.__name__ for base in cls.__mro__ if base.__module__.startswith("agents."))

    # ---------------------------------------------------------------------------------------------------- life cycle

    def _check_rows(self) -> None:
        if self.env is not None and self.normalize_advantage:
            rows = self.n_envs * self.n_steps
            if rows <= self.sub_sampling_factor:
                raise ValueError(
                    f"n_steps * n_envs must be larger than sub_sampling_factor to normalise advantages, got "
                    f"{self.n_steps} * {self.n_envs} and {self.sub_sampling_factor}"
                )

    def _setup_model(self) -> None:
        self._check_rows()
        if is_recurrent(self):
            self.rollout_buffer_class = SequenceBuffer
        if self.rollout_buffer_class is None:
            several = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = DictRolloutBuffer if several else RolloutBuffer
        super()._setup_model()
        space = self.action_space
        if self.policy.squash_output and isinstance(space, spaces.Box):
            with np.errstate(over="ignore"):
                if not np.isfinite(space.high - space.low).all():
                    raise ValueError(
                        f"squash_output scales actions to their bounds, and the width of {space} is not finite: give "
                        "the actions narrower bounds, or leave squash_output out"
                    )
        self.networks = Networks(self)
        self.average = PolicyAverage(self.policy, self.ema) if self.ema else None

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return [*modules, *(["average"] if self.average is not None else [])], tensors

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """As Stable-Baselines3's, and so what is saved; an average that is no longer this policy's is left out."""
        found = super().get_parameters()
        if self.average is not None and not self.average.follows(self.policy):
            del found["average"]
        return found

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto"
    ) -> None:
        """As Stable-Baselines3's; an average begins anew where none was saved, and is left out where none is kept."""
        given = load_path_or_dict
        if not isinstance(given, dict):
            _, given, _ = load_from_zip_file(given, device=device, load_data=False)
        given = dict(given)
        average = given.pop("average", None)
        if self.average is not None:
            given["average"] = average or {**self.average.state_dict(), "count": torch.zeros_like(self.average.count)}
        super().set_parameters(given, exact_match, device)
        if self.average is not None:
            self.average.mark()

    @property
    def deployed_policy(self) -> ActorCriticPolicy:
        """The policy that `predict` acts by: that of the averaged weights with ``ema``, else ``policy``."""
        if self.average is None or not self.average.count or not self.average.follows(self.policy):
            return self.policy
        return self.average.policy

    def join(self, process_group: dist.ProcessGroup | None) -> None:
        """Learn as one with the other processes of the group, each of which steps as many environments of its own.

        Process 0 gives the others its parameters. From then on every mean over a batch, every gradient and every
        product with a Fisher is taken over the rollouts of all, so the parameters stay the same everywhere.
        ``batch_size`` is of all processes together, each of which takes its part of a mini-batch from its own rollout;
        ``num_timesteps`` counts the steps of all.

        Raises:
            ValueError: if a mini-batch cannot be shared out evenly.
        """
        processes = size(process_group)
        of_a_row = self.n_steps if isinstance(self.rollout_buffer, SequenceBuffer) else 1
        if self.critic == "adam" and max(1, self.batch_size // of_a_row) % processes:
            of = "" if of_a_row == 1 else f" of {of_a_row * processes}, whole sequences of {of_a_row} steps for each"
            raise ValueError(
                f"batch_size must be a multiple{of} of the {processes} processes that share it, got {self.batch_size}"
            )
        self.process_group = process_group
        if process_group is not None:
            for tensor in (*self.policy.parameters(), *self.policy.buffers()):
                dist.broadcast(tensor.detach(), group=process_group, group_src=0)
            if self.average is not None:
                self.average.mark()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "process_group", "networks", "_told"]

    @classmethod
    def _policy_named(cls, name: str) -> type[BasePolicy]:
        from npg.runs.presets import check_names  # which brings YAML along

        check_names("policy", [name], cls.policy_aliases)
        return cls.policy_aliases[name]

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        return self._policy_named(policy_name)

    @classmethod
    def load(
        cls,
        path: Any,
        env: GymEnv | str | None = None,
        *args: Any,
        custom_objects: dict[str, Any] | None = None,
        unpickle: Collection[str] = (),
        **kwargs: Any,
    ) -> Any:
        """Load a saved model, as Stable-Baselines3 does, but without running code from the file.

        Models saved by ``sb3_contrib.TRPO`` load into `TRPO` and keep their trust region: ``kl_direction="new_old"``
        and ``kl_reduction="mean"``, unless given here.

        Args:
            path: of the file, or a file that is open.
            env: the environments, if there are any, or their Gymnasium id.
            args: device, … as Stable-Baselines3 takes them.
            custom_objects: values for attributes that the file has as pickles, such as a policy class of your own;
                and for options, as in ``kwargs``.
            unpickle: the names of attributes that are unpickled whatever they hold, with a warning: that can run any
                code. The others are read as data (`agents.saved`).
            kwargs: other arguments of Stable-Baselines3, and attributes to change: options are checked as the
                constructor does, and ``policy_kwargs`` compared.

        Raises:
            TypeError: if an argument or a name in custom_objects is unknown, or not of its kind.
            IsADirectoryError: if the path is of a folder.
            ValueError: if an option is out of its range; if the file was saved by another algorithm or with other
                ``policy_kwargs``, is damaged, or has an attribute that is no data.
        """
        _no_folder(path)
        data = saved_values(path)
        contrib_trpo = {"cg_max_steps", "line_search_max_iter", "target_kl"} <= set(data)
        saved = data.get("algorithm", "TRPO" if contrib_trpo else "another algorithm")
        if saved != cls.name():
            raise ValueError(
                f"path={str(path)!r} was saved by {saved}, not by {cls.name()}: load it with its own class"
            )
        cls.refuse_unknown(kwargs, {*data, "print_system_info", "force_reset"})
        kind("custom_objects", custom_objects, Mapping, "a dict of values by the names of attributes")
        custom = dict(custom_objects or {})
        cls.refuse_unknown(custom, {*data, *_OF_OTHERS}, "custom_objects")
        late = {name for name, o in cls.options.items() if o.attribute and name not in data and name != "device"}
        kwargs = {name: value for name, value in custom.items() if name in late} | kwargs
        if "algorithm" not in data:
            kwargs = {name: value for name, value in cls.sb3_contrib_options.items() if name not in data} | kwargs
        kwargs |= {name: cls.checked(name, value) for name, value in kwargs.items() if name in cls.options}
        given = {name: value for name, value in custom.items() if name in data}
        given |= {name: cls.checked(name, value) for name, value in given.items() if name in cls.options}
        if isinstance(given.get("policy_class"), str):
            given["policy_class"] = cls._policy_named(given["policy_class"])
        wanted = kwargs.pop("policy_kwargs", None)
        plain = saved_attributes(path, data, given={*given, *kwargs}, unpickle=unpickle)
        plain |= {name: kwargs[name] for name in kwargs.keys() & data.keys()}
        kwargs["custom_objects"] = plain | given
        has = (data | plain | given)["policy_kwargs"]
        if wanted is not None and as_lists(wanted) != as_lists(has):  # its network would be another one
            raise ValueError(
                f"policy_kwargs={wanted!r} are not those that path={str(path)!r} was saved with, {has!r}: leave them "
                "out, or make a new agent"
            )
        if env is not None:
            env = as_taken(cls._wrap_env(made_env(env)), kwargs["custom_objects"]["policy_class"])
        model = super().load(path, env, *args, **kwargs)
        if "stats_window_size" in {*data, *kwargs}:  # Stable-Baselines3 goes by a name of its own
            model._stats_window_size = model.stats_window_size
        return model

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log; ``time/iterations`` counts the updates of all calls of `learn`."""
        super().dump_logs(self._n_updates + 1 if iteration else 0)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Learn, as Stable-Baselines3's algorithms do; TensorBoard's runs have the name of the class by default.

        Schedules end with each call, be it of a part of the training (``reset_num_timesteps=False``) only: see
        `agents.schedules`.

        Args:
            total_timesteps: environment steps of this call, a whole number, such as 100_000 or 1e5; after 0 all is set
                up, and nothing learned.
            callback: as the next ones, as Stable-Baselines3 takes it.
            log_interval: updates between rows of the log.
            tb_log_name: of TensorBoard's run.
            reset_num_timesteps: whether counting begins anew.
            progress_bar: whether to show one.

        Raises:
            TypeError: if ``total_timesteps`` is no number.
            ValueError: if it is negative, or not whole; if the agent has no environment.
            FloatingPointError: if observations, rewards or the critic's loss are not finite.
        """
        steps = _steps("total_timesteps", total_timesteps)
        self._own_env()
        name = type(self).__name__ if tb_log_name is None else tb_log_name
        try:
            return super().learn(steps, callback, log_interval, name, reset_num_timesteps, progress_bar)
        except (RuntimeError, ValueError) as error:  # of a distribution whose parameters are not finite
            if found := self.find_not_finite():
                raise FloatingPointError(found) from error
            raise

    def find_not_finite(self) -> str | None:
        """Which rewards or observations of the present rollout are not finite, and where; None if all are."""
        return not_finite_in(self.rollout_buffer, self._last_obs)

    def recent_observations(self) -> Any:
        """Observations of the environments, one of each; None before there are any."""
        if self._last_obs is not None:
            return obs_as_tensor(self._last_obs, self.device)
        if self.rollout_buffer.pos == 0:
            return None
        stored = self.rollout_buffer.observations
        first = {k: v[0] for k, v in stored.items()} if isinstance(stored, dict) else stored[0]
        return obs_as_tensor(first, self.device)

    # ------------------------------------------------------------------------------------------------------ training

    @property
    def n_updates(self) -> int:
        """How many updates there were."""
        return self._n_updates

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may go beyond the end, where Stable-Baselines3 would ask schedules for values below zero.
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    @property
    def progress_remaining(self) -> float:
        """From 1 at the beginning of the training to 0 at its end."""
        return self._current_progress_remaining

    @abstractmethod
    def actor_step(self, batch: Batch) -> ActorReport:
        """Move the actor's parameters."""

    def learn_more(self, observations: Any) -> dict[str, float]:
        """What the algorithm learns of a rollout beside actor and critic; what the log shall have of it, by name."""
        return {}

    def surrogate(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """The objective of the actor's step: outputs ↦ the mean over events of what to maximise."""
        return surrogate(self.networks.actor.family, batch)

    def train(self) -> None:
        """One update (`agents.update`): all of it, or after an error nothing at all.

        Raises:
            FloatingPointError: if the critic's loss is not finite; in all processes alike.
            RuntimeError: if processes that learn together have different parameters.
        """
        self._check_rows()  # also what was set on a living agent
        is_recurrent(self)
        self.networks.follow()
        number("learning_rate", self.lr_schedule(self._current_progress_remaining), 0)
        self._update_learning_rate(self.policy.optimizer)
        saved = [recursive_getattr(self, name) for name in self._get_torch_save_params()[0] if name != "policy"]
        if self.average is not None and not self.average.follows(self.policy):
            self.average = PolicyAverage(self.policy, self.ema)
        with restored_on_error(self, saved):
            update(self)
            if self.average is not None:
                self.average.update()
        self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")


_STABLE_BASELINES3 = (
    *("learning_rate", "n_steps", "gamma", "gae_lambda", "use_sde", "sde_sample_freq", "stats_window_size"),
    *("rollout_buffer_class", "rollout_buffer_kwargs", "tensorboard_log", "policy_kwargs"),
    *("verbose", "seed", "device"),
)

_LOAD = "save the agent, and {algorithm}.load(path, env, {name}=…) makes another"

#: What custom objects for models of Stable-Baselines3's other algorithms name too; a file without it needs none.
_OF_OTHERS = frozenset({"clip_range", "clip_range_vf", "exploration_schedule"})

#: Options that cannot change once the networks and the rollout buffer are made, and what to do instead.
_BUILT_IN = {
    "n_steps": _LOAD,
    "rollout_buffer_class": _LOAD,
    "rollout_buffer_kwargs": _LOAD,
    "use_sde": "make a new agent",
    "policy_kwargs": "make a new agent",
    "device": _LOAD,
    "seed": "call set_random_seed, which seeds the generators anew",
}
