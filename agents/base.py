"""What NPG, TRPO and their kin share: collecting, the surrogate, the critic, and the life cycle of Stable-Baselines3.

An algorithm is this class and one method, ``_actor_step``: how the policy moves, given a batch.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf, isfinite, nan
from os import PathLike
from time import perf_counter
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist
from gymnasium import spaces
from stable_baselines3.common import buffers
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.save_util import open_path, recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from agents.afterstate import AfterstatePolicy
from agents.buffer import RolloutBuffer
from agents.checks import flag, kind, not_finite, number, whole
from agents.heads import ActorHead, CriticHead, is_standard
from npg.curvature.preconditioners import diagonal_preconditioner, kronecker_preconditioner
from npg.families import Gaussian, Geometry
from npg.linearize import Buffers, frozen_statistics
from npg.parallel import average_, equal, mean_, moments, size
from npg.solvers import Status, conjugate_gradient
from npg.step import StepReport, natural_step
from npg.transport import geometry
from npg.trust_region import LevenbergMarquardt, TrustRegion

__all__ = ["Batch", "NaturalPolicyAlgorithm", "all_finite", "copy_of_state", "saved_values"]

Critic = Literal["adam", "natural"]
Preconditioner = Literal["diagonal", "kfac"]
Metric = Literal["fisher", "wasserstein"] | Geometry

_PRECONDITIONERS = {None: None, "diagonal": diagonal_preconditioner, "kfac": kronecker_preconditioner}

# The critic's natural step is Gauss–Newton's, cut where the values would move by more than the returns' own spread.
# Its damping does not fall below where it would begin to fit the noise of one rollout.
_CRITIC_REGION = TrustRegion(radius=0.5, shrink=0.5, max_trials=4)
_CRITIC_DAMPING = LevenbergMarquardt(factor=2.0, minimum=0.05, maximum=1e3)


class Batch(NamedTuple):
    """One rollout, flattened over steps and environments, as the actor step sees it.

    Attributes:
        inputs: prepared observations.
        curvature_inputs: the part of them on which the Fisher is taken; None for all.
        actions: in the form that the actor's family takes.
        old_log_likelihood: log p(action) under the policy that acted, (N,).
        advantages: (N,), normalised if so configured.
    """

    inputs: Any
    curvature_inputs: Any
    actions: Tensor
    old_log_likelihood: Tensor
    advantages: Tensor


def _rows(observations: Any, index: Any) -> Any:
    if isinstance(observations, dict):
        return {key: value[index] for key, value in observations.items()}
    return observations[index]


# Buffers that only store what they are given, to which values and log-likelihoods can be given afterwards.
_STORES = (RolloutBuffer, buffers.RolloutBuffer, buffers.DictRolloutBuffer)


def _recorder(buffer: buffers.RolloutBuffer) -> Callable[[Any, np.ndarray, np.ndarray, np.ndarray], None]:
    """How to store a step of which values and log-likelihoods are not known yet."""
    if type(buffer) is RolloutBuffer:
        return buffer.record
    nothing = torch.zeros(buffer.n_envs)

    def record(observations: Any, actions: np.ndarray, rewards: np.ndarray, episode_starts: np.ndarray) -> None:
        buffer.add(observations, actions.reshape(buffer.n_envs, -1), rewards, episode_starts, nothing, nothing)

    return record


def saved_values(path: Any) -> dict[str, Any]:
    """The attributes of a saved model as its archive has them, in plain JSON: nothing is unpickled.

    Raises:
        ValueError: if the file is damaged.
    """
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is not what was written")
            return json.loads(archive.read("data"))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"path={str(path)!r} is not a complete saved model ({str(error) or type(error).__name__}): it may be "
            "truncated; take an earlier checkpoint of the run"
        ) from error
    finally:
        file.seek(0) if file is path else file.close()


def copy_of_state(owner: torch.nn.Module | torch.optim.Optimizer) -> dict[str, Any]:
    """What `load_state_dict` brings back as it is now."""
    return pytree.tree_map_only(Tensor, torch.clone, owner.state_dict())


def all_finite(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Whether the parameters, and what the optimizer remembers of them, are finite.

    A gradient whose square overflows leaves finite parameters, which Adam never moves again.
    """
    kept = [t for p in parameters for t in (p, *optimizer.state[p].values()) if isinstance(t, Tensor)]
    here = parameters[0].device  # on a GPU, Adam's step counts are not
    norms = torch._foreach_norm([t.detach() for t in kept if t.is_floating_point() and t.device == here], inf)
    return bool(torch.stack(norms).isfinite().all())


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    """One kernel per step of Adam in place of a dozen per tensor, with the same numbers, unless told otherwise.

    Raises:
        ValueError: for an optimizer that is to be differentiated through.
    """
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            raise ValueError(
                "optimizer_kwargs has differentiable=True, which PyTorch's optimizers refuse for parameters of a "
                "module: leave it out"
            )
        if type(optimizer) is torch.optim.Adam and group["fused"] is None and group["foreach"] is None:
            group["fused"] = True


class _Reads(TorchDispatchMode):
    """Notes the memory of every tensor that an operation takes."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        self.memory |= {t.untyped_storage().data_ptr() for t in tensors}
        return func(*args, **(kwargs or {}))


class NaturalPolicyAlgorithm(OnPolicyAlgorithm):
    """On-policy actor-critic learning where the actor moves by natural steps.

    The constructor takes the arguments of ``sb3_contrib.TRPO`` by the same names, as far as they concern all natural
    policy algorithms, and adds the following. One has another meaning: ``cg_damping`` is added to the Fisher of the
    whole action, which for n components of a Box or MultiBinary space is n times that of ``sb3_contrib``.

    Args:
        fisher_fraction: the part of the batch, in (0, 1], on which the Fisher is taken; gradient, KL and search use
            all of it. Its rows are drawn at random for every step, of the actor and of a natural critic.
        preconditioner: None, ``"diagonal"`` or ``"kfac"``, for the actor's conjugate gradients
            (`npg.curvature.preconditioners`).
        critic: ``"adam"``: ``n_critic_updates`` epochs of mini-batch Adam; ``"natural"``: as many Gauss–Newton steps
            on the whole batch, the natural gradient of a Gaussian likelihood.
        train_shared_features: let the critic also train a feature extractor that it shares with the actor. That
            moves the policy outside the trust region; by default only the actor's step does, and running statistics
            that the policy depends on, such as those of BatchNorm, never move.

    Several processes can learn as one: see `join`.

    Raises:
        TypeError: if an argument is not of its kind; a float is no whole number.
        ValueError: if an argument is out of its range.
    """

    process_group: dist.ProcessGroup | None = None
    """The processes that learn together; None for one that is alone."""

    metric: Metric = "fisher"
    """The geometry of the actor's natural step."""

    _of_sb3_contrib: ClassVar[dict[str, Any]] = {}
    """Arguments with which this algorithm is that of ``sb3_contrib``."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
        "AfterstatePolicy": AfterstatePolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        learning_rate: float | Schedule,
        n_steps: int,
        batch_size: int,
        gamma: float,
        cg_max_steps: int,
        cg_damping: float,
        n_critic_updates: int,
        gae_lambda: float,
        use_sde: bool,
        sde_sample_freq: int,
        rollout_buffer_class: type[buffers.RolloutBuffer] | None,
        rollout_buffer_kwargs: dict[str, Any] | None,
        normalize_advantage: bool,
        sub_sampling_factor: int,
        stats_window_size: int,
        tensorboard_log: str | None,
        policy_kwargs: dict[str, Any] | None,
        verbose: int,
        seed: int | None,
        device: torch.device | str,
        fisher_fraction: float,
        preconditioner: Preconditioner | None,
        critic: Critic,
        train_shared_features: bool,
        _init_setup_model: bool,
    ) -> None:
        if not isinstance(policy, str | type):
            raise TypeError(f"policy must be the name of a policy, or its class, got {policy!r}")
        rate = learning_rate(1.0) if callable(learning_rate) else learning_rate
        number("learning_rate", rate.item() if isinstance(rate, Tensor) else rate, 0)
        number("gamma", gamma, 0, 1)
        number("gae_lambda", gae_lambda, 0, 1)
        number("cg_damping", cg_damping, 0)
        number("fisher_fraction", fisher_fraction, 0, 1, above=True)
        whole("cg_max_steps", cg_max_steps, 1)
        whole("n_steps", n_steps, 1)
        whole("batch_size", batch_size, 1)
        whole("n_critic_updates", n_critic_updates, 0)
        whole("sub_sampling_factor", sub_sampling_factor, 1)
        whole("stats_window_size", stats_window_size, 1)
        whole("sde_sample_freq", sde_sample_freq, -1)
        whole("verbose", verbose, 0)
        if seed is not None:
            whole("seed", seed, 0, 2**32 - 1)
            seed = int(seed)  # Python's own generator takes no other integers
        flag("use_sde", use_sde)
        flag("normalize_advantage", normalize_advantage)
        flag("train_shared_features", train_shared_features)
        kind("policy_kwargs", policy_kwargs, dict, "a dict of arguments of the policy")
        kind("rollout_buffer_kwargs", rollout_buffer_kwargs, dict, "a dict of arguments of the buffer")
        kind("rollout_buffer_class", rollout_buffer_class, type, "a class of rollout buffers")
        kind("tensorboard_log", tensorboard_log, str | PathLike, "the path of a folder")
        if preconditioner not in list(_PRECONDITIONERS):  # also what has no hash is refused by name
            raise ValueError(f"preconditioner must be None, 'diagonal' or 'kfac', got {preconditioner!r}")
        if critic not in ("adam", "natural"):
            raise ValueError(f"critic must be 'adam' or 'natural', got {critic!r}")
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=0.0,
            vf_coef=0.0,
            max_grad_norm=0.0,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=device,
            seed=seed,
            _init_setup_model=False,
            supported_action_spaces=(
                spaces.Box,
                spaces.Discrete,
                spaces.MultiDiscrete,
                spaces.MultiBinary,
            ),
        )
        self.algorithm = self._name()
        self.batch_size = batch_size
        self.cg_max_steps = cg_max_steps
        self.cg_damping = cg_damping
        self.n_critic_updates = n_critic_updates
        self.normalize_advantage = normalize_advantage
        self.sub_sampling_factor = sub_sampling_factor
        self.fisher_fraction = fisher_fraction
        self.preconditioner = preconditioner
        self.critic = critic
        self.train_shared_features = train_shared_features
        self.critic_damping = 0.1
        if self.env is not None and self.normalize_advantage and self.env.num_envs * n_steps <= sub_sampling_factor:
            raise ValueError(
                f"n_steps * n_envs must be larger than sub_sampling_factor to normalise advantages, got {n_steps} * "
                f"{self.env.num_envs} and {sub_sampling_factor}"
            )
        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------------------------------------------ networks

    def _setup_model(self) -> None:
        if self.rollout_buffer_class is None and not isinstance(self.observation_space, spaces.Dict):
            self.rollout_buffer_class = RolloutBuffer
        super()._setup_model()
        self._setup_heads()

    def _setup_heads(self) -> None:
        """Look at the policy anew; nothing of it is run."""
        self._actor = ActorHead(self.policy)
        self._critic = CriticHead(self.policy)
        self._known = self._signature()
        self._owned: tuple[dict[str, torch.nn.Parameter], dict[str, torch.nn.Parameter]] | None = None
        self._set_geometry()
        _fuse(self.policy.optimizer)

    def _set_geometry(self) -> None:
        if self._actor.family is not None or self.metric != "wasserstein":
            self._geometry = geometry(self.metric, self._actor.family)
        if self.metric != "fisher" and self.preconditioner is not None:
            raise ValueError(f"preconditioner={self.preconditioner!r} needs metric='fisher', which it approximates")

    @property
    def _actor_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trainable parameters that the policy's distribution depends on."""
        return self._find_owners()[0]

    @property
    def _critic_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Those that the critic trains: none of the actor's, unless it may."""
        return self._find_owners()[1]

    def _find_owners(self) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.nn.Parameter]]:
        """The parameters of actor and critic, as one forward pass of each shows. It is kept if it was of real ones."""
        if self._owned is not None:
            return self._owned
        observations = self._real_observations()
        real = observations is not None
        self.policy.set_training_mode(False)
        if not real:
            observations = self.policy.obs_to_tensor(self.observation_space.sample())[0]
        self._actor.look(observations)
        self._set_geometry()
        actor = self._actor.own_parameters(observations)
        shared = set() if self.train_shared_features else {id(p) for p in actor.values()}
        critic = {n: p for n, p in self._critic.own_parameters(observations).items() if id(p) not in shared}
        if real:
            self._owned = actor, critic
        return actor, critic

    def _real_observations(self) -> Any:
        """Observations of the environments, one of each; None before there are any."""
        if self._last_obs is not None:
            return obs_as_tensor(self._last_obs, self.device)
        if self.rollout_buffer.pos == 0:
            return None
        stored = self.rollout_buffer.observations
        first = {k: v[0] for k, v in stored.items()} if isinstance(stored, dict) else stored[0]
        return obs_as_tensor(first, self.device)

    def _signature(self) -> Any:
        """What tells one policy, whose parameters are frozen or not, from another."""
        parameters = [(name, p.requires_grad) for name, p in self.policy.named_parameters()]
        # objects that are kept, and not their ids alone, which others may have later
        held = [self.policy, self.policy.action_dist, *self.policy.parameters()]
        return parameters, is_standard(self.policy), held

    def _follow_changes(self) -> None:
        """Set up the heads anew where modules of the policy were replaced, or parameters frozen, since they were."""
        (*now, held), (*known, held_before) = self._signature(), self._known
        if now != known or len(held) != len(held_before) or any(a is not b for a, b in zip(held, held_before)):
            self._setup_heads()
        _, critic = self._find_owners()
        optimized = {id(p) for group in self.policy.optimizer.param_groups for p in group["params"]}
        if not optimized >= {id(p) for p in critic.values()}:  # a module of the critic was replaced
            self.policy.optimizer = self.policy.optimizer_class(
                self.policy.parameters(), lr=self.lr_schedule(1), **self.policy.optimizer_kwargs
            )
            _fuse(self.policy.optimizer)

    def join(self, process_group: dist.ProcessGroup | None) -> None:
        """Learn as one with the other processes of the group, each of which steps as many environments of its own.

        Process 0 gives the others its parameters. From then on every mean over a batch, every gradient and every
        product with a Fisher is taken over the rollouts of all, so the parameters stay the same everywhere.
        ``batch_size`` is of all processes together, each of which takes its part of a mini-batch from its own rollout;
        ``num_timesteps`` counts the steps of all.

        Raises:
            ValueError: if a mini-batch cannot be shared out evenly.
        """
        if self.critic == "adam" and self.batch_size % size(process_group):
            raise ValueError(
                f"batch_size must be a multiple of the {size(process_group)} processes that share it, "
                f"got {self.batch_size}"
            )
        self.process_group = process_group
        if process_group is not None:
            for tensor in (*self.policy.parameters(), *self.policy.buffers()):
                dist.broadcast(tensor.detach(), group=process_group, group_src=0)

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "process_group",
            "_actor",
            "_critic",
            "_geometry",
            "_owned",
            "_known",
        ]

    @classmethod
    def _name(cls) -> str:
        """Of the algorithm: that of the nearest class that is not a user's."""
        return next(base.__name__ for base in cls.__mro__ if base.__module__.startswith("agents."))

    @classmethod
    def load(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model, as Stable-Baselines3 does.

        Models saved by ``sb3_contrib.TRPO`` load into `TRPO` and keep their trust region: ``kl_direction="new_old"``
        and ``kl_reduction="mean"``, unless given here.

        Raises:
            ValueError: if the file was saved by another algorithm, or is damaged.
        """
        data = saved_values(path)
        contrib_trpo = {"cg_max_steps", "line_search_max_iter", "target_kl"} <= set(data)
        saved = data.get("algorithm", "TRPO" if contrib_trpo else "another algorithm")
        if saved != cls._name():
            raise ValueError(
                f"path={str(path)!r} was saved by {saved}, not by {cls._name()}: load it with its own class"
            )
        if "algorithm" not in data:
            kwargs = {name: value for name, value in cls._of_sb3_contrib.items() if name not in data} | kwargs
        return super().load(path, *args, **kwargs)

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

        Raises:
            FloatingPointError: if observations, rewards or the critic's loss are not finite.
        """
        name = type(self).__name__ if tb_log_name is None else tb_log_name
        try:
            return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)
        except (RuntimeError, ValueError) as error:  # of a distribution whose parameters are not finite
            if found := self._not_finite():
                raise FloatingPointError(found) from error
            raise

    def _not_finite(self) -> str | None:
        """Which rewards or observations of the present rollout are not finite, and where."""
        buffer = self.rollout_buffer

        def named(observations: Any) -> list[tuple[str, Any]]:
            return [*observations.items()] if isinstance(observations, dict) else [("observation", observations)]

        # Stable-Baselines3's buffers are flattened once they were read: their steps are not known any more.
        grids = [
            (name, array)
            for name, array in [*named(buffer.observations), ("reward", buffer.rewards)]
            if array.shape[:2] == (buffer.buffer_size, buffer.n_envs)
        ]
        places = [(name, step, array[step]) for step in range(buffer.pos) for name, array in grids]
        if self._last_obs is not None:
            places += [(name, buffer.pos, rows) for name, rows in named(self._last_obs)]
        for name, step, rows in places:
            if envs := not_finite(rows):
                return (
                    f"{name} of environment {', '.join(map(str, envs))} is not finite in step {step} of the rollout: "
                    "mend the environment, or wrap it"
                )
        return None

    # ---------------------------------------------------------------------------------------------------- collecting

    def _acting(self, observations: Any, *, evaluate_later: bool) -> Callable[[Any], Sequence[Tensor]]:
        """How to act, for batches of observations like these: ``observations ↦ actions, outputs of the actor``.

        Where only the policy itself knows what it does, or becomes such a one meanwhile, it gives
        ``actions, values, log-likelihoods``, as Stable-Baselines3 does, and goes on so to the end of the rollout.
        """
        threads = self._acting_threads()
        actor = self._actor
        run = actor.acting(observations) if evaluate_later else None

        def act(observations: Any) -> Sequence[Tensor]:
            nonlocal run
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.no_grad():
                    if run is not None and not (actor.policy is self.policy and actor.unchanged()):
                        run = actor.acting(observations) if actor.policy is self.policy else None
                    return self.policy(observations) if run is None else run(observations)
            finally:
                torch.set_num_threads(before)

        return act

    def _acting_threads(self) -> int:
        """Threads for the policy while it acts: one for vectors on a CPU, whose other cores step the environments.

        A few rows gain nothing from a second thread, and each operation would wait until that gets a core.
        """
        images = any(len(space.shape or ()) > 1 for space in self._observation_spaces())
        return 1 if self.device.type == "cpu" and not images else torch.get_num_threads()

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: buffers.RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the buffer with ``n_rollout_steps`` steps of every environment, as Stable-Baselines3 does.

        Of a policy that is made of Stable-Baselines3's and PyTorch's own parts, what nobody needs while stepping is
        computed afterwards, for all steps in one batch: values, those of the critic at the end of the rollout, and
        bootstrap values of truncated episodes. Callbacks then see the same local variables as in Stable-Baselines3,
        except ``values`` and ``log_probs``. Of any other policy, actions, values and log-likelihoods are those of its
        ``forward``, step by step.

        Raises:
            NotImplementedError: if the policy's log-likelihoods are not those of its distribution.
        """
        started = perf_counter()
        assert self._last_obs is not None, "no previous observation"
        self.policy.set_training_mode(False)
        rollout_buffer.reset()

        def reset_noise() -> None:
            with torch.no_grad():
                self.policy.reset_noise(env.num_envs)

        if self.use_sde:
            reset_noise()
        callback.on_rollout_start()
        self._follow_changes()
        box = isinstance(self.action_space, spaces.Box)
        squashed = self.policy.squash_output
        low, high = (self.action_space.low, self.action_space.high) if box else (None, None)
        shape = (env.num_envs, *self.action_space.shape)
        stepped = env.num_envs * size(self.process_group)
        record = _recorder(rollout_buffer)
        evaluate_later = type(rollout_buffer) in _STORES
        act = self._acting(obs_as_tensor(self._last_obs, self.device), evaluate_later=evaluate_later)
        truncated: list[tuple[int, int, Any]] = []
        outputs: list[Tensor] = []  # of the steps that are to be evaluated, the first ones
        n_steps = 0
        dones = self._last_episode_starts
        new_obs = self._last_obs
        while n_steps < n_rollout_steps:
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                reset_noise()
            obs_tensor = obs_as_tensor(self._last_obs, self.device)
            sampled, *said = act(obs_tensor)
            if len(said) == 2:
                values, log_probs = said
            actions = sampled.cpu().numpy().reshape(shape)
            clipped_actions = actions
            if box:
                clipped_actions = (
                    self.policy.unscale_action(actions) if squashed else np.minimum(np.maximum(actions, low), high)
                )
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            self.num_timesteps += stepped
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            cut: list[tuple[int, int, Any]] = []
            if dones.any():
                self._update_info_buffer(infos, dones)
                cut = [
                    (n_steps, index, infos[index]["terminal_observation"])
                    for index in np.flatnonzero(dones).tolist()
                    if infos[index].get("TimeLimit.truncated", False)
                    and infos[index].get("terminal_observation") is not None
                ]
            if len(said) == 1:
                outputs += said
                truncated += cut
                record(self._last_obs, actions, rewards, self._last_episode_starts)
            else:
                for _, index, final in cut:
                    with torch.no_grad():
                        final_value = self.policy.predict_values(self.policy.obs_to_tensor(final)[0])
                    rewards[index] += self.gamma * float(final_value)
                starts = self._last_episode_starts
                rollout_buffer.add(
                    self._last_obs, actions.reshape(env.num_envs, -1), rewards, starts, values, log_probs
                )
            self._last_obs, self._last_episode_starts = new_obs, dones
            n_steps += 1
        self._evaluate_rollout(rollout_buffer, truncated, outputs)
        with torch.no_grad():
            last_values = self.policy.predict_values(obs_as_tensor(new_obs, self.device))
        rollout_buffer.compute_returns_and_advantage(last_values=last_values, dones=dones)
        callback.update_locals(locals())
        callback.on_rollout_end()
        self._collect_seconds = perf_counter() - started
        return True

    @torch.no_grad()
    def _evaluate_rollout(
        self, buffer: buffers.RolloutBuffer, truncated: list[tuple[int, int, Any]], outputs: list[Tensor]
    ) -> None:
        """Values and log-likelihoods of the first steps; bootstrap where an episode was cut off by its time limit.

        ``outputs`` are the actor's in these steps. The other steps have both, from the policy itself, whose
        log-likelihood is checked.
        """
        entropies = []
        first = len(outputs)
        if first:
            batch = self._steps(buffer.observations, slice(first))
            actions = self._actor.targets(self._steps(buffer.actions, slice(first)))
            rows = self._evaluation_rows()
            parts = [slice(start, start + rows) for start in range(0, len(actions), rows)]
            values = [self._critic(self._critic.prepare(_rows(batch, part))).flatten() for part in parts]
            said = torch.cat(outputs)
            grid = (first, buffer.n_envs)
            buffer.values[:first] = torch.cat(values).cpu().numpy().reshape(grid)
            buffer.log_probs[:first] = self._actor.family.log_likelihood(said, actions).cpu().numpy().reshape(grid)
            entropies.append(self._actor.family.entropy(said))
        if truncated:
            steps, envs, finals = zip(*truncated)
            stacked = (
                {key: np.stack([f[key] for f in finals]) for key in finals[0]}
                if isinstance(finals[0], dict)
                else np.stack(finals)
            )
            last = self._critic.prepare(self._critic.policy.obs_to_tensor(stacked)[0])
            final_values = self._critic(last).flatten()
            buffer.rewards[list(steps), list(envs)] += self.gamma * final_values.cpu().numpy()
        if first < buffer.pos:
            entropies.append(-self._steps(buffer.log_probs, slice(first, buffer.pos)))
            few = slice(max(0, buffer.pos - max(1, 64 // buffer.n_envs)), buffer.pos)
            self._follow_changes()
            self._actor.check(self._steps(buffer.observations, few), self._steps(buffer.actions, few))
        self._entropy = float(mean_(torch.cat(entropies).mean(), self.process_group))

    def _steps(self, array: Any, steps: slice) -> Any:
        """These steps of an array of the buffer, (steps, environments, …), flattened over both."""
        if isinstance(array, dict):
            return {key: self._steps(value, steps) for key, value in array.items()}
        part = array[steps]
        return torch.as_tensor(part.reshape(-1, *part.shape[2:])).to(self.device)

    def _evaluation_rows(self) -> int:
        # Images are large when they are floating point: bound what is prepared at once.
        size = sum(int(np.prod(s.shape)) for s in self._observation_spaces())
        return max(256, 32 * 1024 * 1024 // max(size, 1))

    def _observation_spaces(self) -> list[spaces.Space]:
        space = self.observation_space
        return list(space.spaces.values()) if isinstance(space, spaces.Dict) else [space]

    # ------------------------------------------------------------------------------------------------------ training

    @abstractmethod
    def _actor_step(self, batch: Batch) -> StepReport:
        """Move the actor's parameters."""

    def _no_step(self, batch: Batch) -> StepReport:
        """The report where all of the actor is frozen: no step was attempted."""
        with torch.no_grad():
            objective = float(mean_(self._surrogate(batch)(self._actor(batch.inputs)), self.process_group))
        nothing = torch.zeros(0, device=self.device)
        return StepReport(
            accepted=False,
            objective=objective,
            predicted_gain=0.0,
            actual_gain=0.0,
            predicted_kl=0.0,
            kl=0.0,
            status=Status.CONVERGED,
            iterations=0,
            residual=0.0,
            backtracks=0,
            scale=0.0,
            gradient_norm=0.0,
            step_norm=0.0,
            damping=0.0,
            gradient=nothing,
            solution=nothing,
            step=nothing,
            solve_seconds=0.0,
            search_seconds=0.0,
        )

    def _surrogate(self, batch: Batch) -> Any:
        """Outputs ↦ E[(π/π_old) A], the surrogate return of the importance-weighted batch (TRPO, equation 14)."""
        family = self._actor.family

        def surrogate(outputs: Tensor) -> Tensor:
            ratio = torch.exp(family.log_likelihood(outputs, batch.actions) - batch.old_log_likelihood)
            return (ratio * batch.advantages).mean()

        return surrogate

    def _natural_step(
        self,
        batch: Batch,
        *,
        trust_region: TrustRegion | None = None,
        learning_rate: float | None = None,
        damping: float | None = None,
    ) -> StepReport:
        """The step that NPG and TRPO take, each with its own rule for the length."""
        return natural_step(
            self._actor,
            batch.inputs,
            self._actor.family,
            self._surrogate(batch),
            trust_region=trust_region,
            learning_rate=learning_rate,
            damping=self.cg_damping if damping is None else damping,
            solver=partial(conjugate_gradient, max_iterations=self.cg_max_steps, rtol=1e-5),
            metric=self._geometry,
            curvature_inputs=batch.curvature_inputs,
            preconditioner=_PRECONDITIONERS[self.preconditioner],
            parameters=self._actor_parameters,
            process_group=self.process_group,
        )

    def train(self) -> None:
        """Move the actor by one natural step, then fit the critic: both, or after an error nothing at all.

        Raises:
            FloatingPointError: if the critic's loss is not finite; in all processes alike.
            RuntimeError: if processes that learn together have come apart.
        """
        self._follow_changes()
        self._update_learning_rate(self.policy.optimizer)
        with self._undone_on_error():
            self._update()

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Put back all that an update moves, if an error or an interrupt leaves the block."""
        owners = [recursive_getattr(self, name) for name in self._get_torch_save_params()[0] if name != "policy"]
        states = [copy_of_state(owner) for owner in owners]
        parameters = [(p, p.detach().clone()) for p in self.policy.parameters()]
        buffers, damping = Buffers(self.policy), self.critic_damping
        try:
            yield
        except BaseException:
            for owner, state in zip(owners, states):
                owner.load_state_dict(state)
            for p, before in parameters:
                p.data.copy_(before)
            buffers.restore()
            self.critic_damping = damping
            raise

    def _update(self) -> None:
        # The policy that acted is the one whose KL is bounded: no dropout, frozen statistics.
        self.policy.set_training_mode(False)
        rollout = next(self.rollout_buffer.get(batch_size=None))
        batch = self._batch(rollout)
        statistics = self._actor_statistics(rollout.observations)
        report = self._actor_step(batch) if self._actor_parameters else self._no_step(batch)
        started = perf_counter()
        self.policy.set_training_mode(True)
        for module, *_ in statistics:
            module.training = False
        value_loss = nan
        if not self._critic_parameters:
            pass  # all of it is frozen
        elif self.critic == "adam":
            value_loss = self._fit_critic_by_adam(rollout.observations, rollout.returns)
        else:
            value_loss = self._fit_critic_by_natural_steps(rollout.observations, rollout.returns)
        self.policy.set_training_mode(False)
        for module, name, buffer, before in statistics:
            module._buffers[name] = buffer.copy_(before)
        average_(self.policy.buffers(), self.process_group)
        update = self._n_updates + 1
        if self.n_critic_updates and self._critic_parameters and not isfinite(value_loss):
            found = self._not_finite() or "rewards or observations are not, or learning_rate is too large"
            raise FloatingPointError(f"the critic's loss is not finite in update {update}: {found}")
        if not equal(self.policy.parameters(), self.process_group):
            raise RuntimeError(f"the processes have different parameters after update {update}")
        self._n_updates = update
        self._log(report, value_loss, perf_counter() - started)

    def _actor_statistics(self, observations: Any) -> list[tuple[torch.nn.Module, str, Tensor, Tensor]]:
        """The buffers that the actor's outputs depend on: module, name, buffer, value; none where these may move.

        A policy that is evaluated with other statistics of BatchNorm, or with other vectors of a spectral norm, is
        another policy than the one whose KL was bounded. So they stay, and their modules in evaluation mode.
        """
        if self.train_shared_features or next(self.policy.buffers(), None) is None:
            return []
        with torch.no_grad(), frozen_statistics(self._actor), _Reads() as reads:
            self._actor(self._actor.prepare(_rows(observations, slice(1))))
        return [
            (module, name, buffer, buffer.clone())
            for module in self.policy.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.numel() and buffer.untyped_storage().data_ptr() in reads.memory
        ]

    def _batch(self, rollout: Any) -> Batch:
        n, k = len(rollout.advantages), self.sub_sampling_factor
        part = slice(None) if k == 1 else torch.randperm(n, device=self.device)[::k]
        inputs = self._actor.prepare(_rows(rollout.observations, part))
        advantages = rollout.advantages[part]
        if self.normalize_advantage:
            mean, variance = moments(advantages, self.process_group)
            n = len(advantages) * size(self.process_group)
            advantages = (advantages - mean) / ((variance * n / max(n - 1, 1)).sqrt() + 1e-8)
        return Batch(
            inputs=inputs,
            curvature_inputs=self._fisher_part(inputs, len(advantages)),
            actions=self._actor.targets(rollout.actions[part]),
            old_log_likelihood=rollout.old_log_prob[part],
            advantages=advantages,
        )

    def _fisher_part(self, inputs: Any, rows: int) -> Any:
        """The rows on which the Fisher is taken, drawn at random, for they are in the order of time; None for all."""
        if self.fisher_fraction == 1:
            return None
        order = torch.randperm(rows, device=self.device)
        return _rows(inputs, order[: max(1, round(self.fisher_fraction * rows))])

    def _fit_critic_by_adam(self, observations: Any, returns: Tensor) -> float:
        """``n_critic_updates`` epochs of mini-batches; the loss is the mean squared error over the last epoch."""
        inputs = self._critic.prepare(observations)
        optimizer = self.policy.optimizer
        # Without gradients the optimizer passes over all other parameters.
        optimizer.zero_grad()
        parameters = list(self._critic_parameters.values())
        batch_size = self.batch_size // size(self.process_group)
        gradients_of: dict[int, Callable[[Any, Tensor], Sequence[Tensor]]] = {}  # by the rows of a mini-batch
        losses: list[Tensor] = []
        for _ in range(self.n_critic_updates):
            losses = []
            order = torch.randperm(len(returns), device=self.device)
            shuffled, targets = _rows(inputs, order), returns[order]
            for start in range(0, len(returns), batch_size):
                part = slice(start, start + batch_size)
                x, y = _rows(shuffled, part), targets[part]
                if len(y) not in gradients_of:
                    gradients_of[len(y)] = self._critic.loss_and_gradients(parameters, x, y)
                loss, *gradients = gradients_of[len(y)](x, y)
                average_(gradients, self.process_group)
                for p, gradient in zip(parameters, gradients):
                    p.grad = gradient
                optimizer.step()
                losses.append(loss)
        if not losses:
            return nan
        loss = torch.stack(losses).mean() if all_finite(optimizer, parameters) else losses[0] * nan
        return float(mean_(loss, self.process_group))

    def _fit_critic_by_natural_steps(self, observations: Any, returns: Tensor) -> float:
        """Levenberg–Marquardt on the whole batch: natural steps of a Gaussian likelihood over the returns."""
        inputs = self._critic.prepare(observations)
        targets = returns.unsqueeze(1)
        # In units of the returns' own variance the Fisher, its damping and the radius are the same for every task.
        variance = float(moments(returns, self.process_group)[1].clamp(min=1e-8))
        loss = nan
        if not isfinite(variance):
            return loss
        for _ in range(self.n_critic_updates):
            report = natural_step(
                self._critic,
                inputs,
                Gaussian(variance),
                lambda outputs: -0.5 * (outputs - targets).square().mean() / variance,
                learning_rate=1.0,
                trust_region=_CRITIC_REGION,
                damping=self.critic_damping,
                solver=partial(conjugate_gradient, max_iterations=self.cg_max_steps, rtol=1e-2),
                curvature_inputs=self._fisher_part(inputs, len(returns)),
                objective_curvature=1.0,
                parameters=self._critic_parameters,
                process_group=self.process_group,
            )
            self.critic_damping = _CRITIC_DAMPING.update(
                report.damping, report.predicted_gain, report.actual_gain, report.accepted
            )
            loss = -2 * variance * (report.objective + (report.actual_gain if report.accepted else 0.0))
        return loss

    def _explained_variance(self) -> float:
        """1 − Var[R − V] / Var[R] of the returns R and the values V before the update; NaN for a constant return."""
        values, returns = (
            torch.as_tensor(x, device=self.device).flatten()
            for x in (self.rollout_buffer.values, self.rollout_buffer.returns)
        )
        _, unexplained = moments(returns - values, self.process_group)
        _, variance = moments(returns, self.process_group)
        return float(1 - unexplained / variance) if variance > 0 else nan

    def _log(self, report: StepReport, value_loss: float, critic_seconds: float) -> None:
        record = self.logger.record
        divergence = "kl" if self._geometry is None else "distance"  # half the squared distance
        record(f"train/{divergence}", report.kl if report.accepted else 0.0)
        record(f"train/predicted_{divergence}", report.predicted_kl)
        record("train/predicted_gain", report.predicted_gain)
        record("train/actual_gain", report.actual_gain if report.accepted else 0.0)
        record("train/accepted", float(report.accepted))
        record("train/backtracks", report.backtracks)
        record("train/cg_iterations", report.iterations)
        record("train/cg_residual", report.residual)
        record("train/step_norm", report.step_norm)
        record("train/gradient_norm", report.gradient_norm)
        record("train/policy_objective", report.objective + (report.actual_gain if report.accepted else 0.0))
        record("train/value_loss", value_loss)
        record("train/explained_variance", self._explained_variance())
        record("train/entropy_loss", -self._entropy)
        if hasattr(self.policy, "log_std"):
            record("train/std", torch.exp(self.policy.log_std).mean().item())
        record("time/collect_seconds", self._collect_seconds)
        record("time/solve_seconds", report.solve_seconds)
        record("time/search_seconds", report.search_seconds)
        record("time/critic_seconds", critic_seconds)
        record("train/n_updates", self._n_updates, exclude="tensorboard")
