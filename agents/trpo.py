"""Trust region policy optimization."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from agents.base import Batch, Critic, Metric, NaturalPolicyAlgorithm, Preconditioner
from agents.checks import number, whole
from npg.step import StepReport
from npg.trust_region import KLDirection, TrustRegion

__all__ = ["TRPO"]


class TRPO(NaturalPolicyAlgorithm):
    """Trust region policy optimization (Schulman et al. 2015): the natural step within a KL radius.

    ``max_θ E[(π_θ/π_old) A]  subject to  E[KL(π_old ‖ π_θ)] ≤ δ``, solved by one step s ∝ (F + λI)⁻¹g, scaled to the
    radius and shortened until the true KL and the true surrogate agree. A step that never does is refused, and the
    policy stays bit for bit what it was.

    The arguments up to ``device`` are those of ``sb3_contrib.TRPO`` with the same defaults; those after it are our own.
    Two mean something else for a Box or MultiBinary space of n components: ``target_kl`` bounds the KL of the whole
    action, and ``cg_damping`` is added to the Fisher of it, where ``sb3_contrib`` divides both KL and Fisher by n. Its
    trust region is that of ``kl_direction="new_old", kl_reduction="mean"``, and models that it saved keep it (`load`).

    Args:
        policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, or an actor-critic policy class.
        env: the environment, or its Gymnasium id.
        learning_rate: of the critic's Adam, or a function of the remaining progress (from 1 to 0).
        n_steps: steps per environment and update.
        batch_size: mini-batch of the critic's Adam.
        gamma: discount factor.
        cg_max_steps: the most conjugate-gradient iterations, each one Fisher-vector product.
        cg_damping: λ ≥ 0 in (F + λI)s = g.
        line_search_shrinking_factor: the factor of each backtrack.
        line_search_max_iter: how many lengths are tried.
        n_critic_updates: epochs of the critic (``critic="adam"``), or its natural steps (``"natural"``).
        gae_lambda: λ of generalised advantage estimation.
        use_sde: generalised state-dependent exploration.
        sde_sample_freq: draw a new exploration matrix every so many steps; −1 for once per rollout.
        rollout_buffer_class: another rollout buffer than the default one.
        rollout_buffer_kwargs: its arguments.
        normalize_advantage: normalise advantages over the batch.
        target_kl: δ, in nats.
        sub_sampling_factor: use every k-th row of the rollout for all of the actor's step.
        stats_window_size: episodes over which returns and lengths are averaged in the log.
        tensorboard_log: where to log to.
        policy_kwargs: arguments of the policy.
        verbose: 0 for silence, 1 for information.
        seed: of all random numbers.
        device: where the networks live.
        kl_direction: ``"old_new"``: KL(old ‖ new), the paper's; ``"new_old"``: the other, which ``sb3_contrib`` uses.
        kl_reduction: ``"sum"``: the KL of the whole action, the paper's; ``"mean"``: that divided by the number of
            action components of a Box or MultiBinary space, which is what ``sb3_contrib`` bounds and damps there
            (for n components its ``target_kl`` and ``cg_damping`` are n times as large in terms of the true KL).
        fisher_fraction: the part of the batch on which the Fisher is taken, drawn at random for every step.
        preconditioner: None, ``"diagonal"`` or ``"kfac"``.
        metric: ``"fisher"``, or another geometry in its place: ``"wasserstein"`` is that of `npg.transport`, with
            discrete actions on the complete graph, and ``wasserstein(Categorical(), graph)`` puts them on another one.
            ``target_kl`` is then half the squared distance, in units of the actions (before they are squashed) or of
            the graph's edges.
        critic: ``"adam"`` or ``"natural"``.
        train_shared_features: let the critic train features that it shares with the actor.

    Raises:
        TypeError: if an argument is not of its kind; a float is no whole number.
        ValueError: if an argument is out of its range.
    """

    _of_sb3_contrib: ClassVar[dict[str, Any]] = {"kl_direction": "new_old", "kl_reduction": "mean"}

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 128,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: float = 0.01,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        kl_direction: KLDirection = "old_new",
        kl_reduction: Literal["sum", "mean"] = "sum",
        fisher_fraction: float = 1.0,
        preconditioner: Preconditioner | None = None,
        metric: Metric = "fisher",
        critic: Critic = "adam",
        train_shared_features: bool = False,
    ) -> None:
        self.target_kl = target_kl
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.kl_direction: KLDirection = kl_direction
        self.kl_reduction: Literal["sum", "mean"] = kl_reduction
        if kl_reduction not in ("sum", "mean"):
            raise ValueError(f"kl_reduction must be 'sum' or 'mean', got {kl_reduction!r}")
        self._trust_region()  # refuses what is out of range before anything is built
        self.metric = metric
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            gamma=gamma,
            cg_max_steps=cg_max_steps,
            cg_damping=cg_damping,
            n_critic_updates=n_critic_updates,
            gae_lambda=gae_lambda,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            normalize_advantage=normalize_advantage,
            sub_sampling_factor=sub_sampling_factor,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            fisher_fraction=fisher_fraction,
            preconditioner=preconditioner,
            critic=critic,
            train_shared_features=train_shared_features,
            _init_setup_model=_init_setup_model,
        )

    def _trust_region(self) -> TrustRegion:
        number("target_kl", self.target_kl, 0, above=True)
        number("line_search_shrinking_factor", self.line_search_shrinking_factor, 0, 1, above=True)
        whole("line_search_max_iter", self.line_search_max_iter, 1)
        if self.line_search_shrinking_factor == 1:
            raise ValueError("line_search_shrinking_factor must be smaller than 1, got 1: the step would stay as it is")
        return TrustRegion(
            radius=self.target_kl,
            shrink=self.line_search_shrinking_factor,
            max_trials=self.line_search_max_iter,
            kl_direction=self.kl_direction,
        )

    def _actor_step(self, batch: Batch) -> StepReport:
        region = self._trust_region()
        # ½sᵀ(F/n + λI)s ≤ δ, and a direction of (F/n + λI)⁻¹g, is the same step as with nδ, nλ and F.
        n = 1
        if self.kl_reduction == "mean" and isinstance(self.action_space, (spaces.Box, spaces.MultiBinary)):
            n = int(np.prod(self.action_space.shape))
        return self._natural_step(
            batch, trust_region=replace(region, radius=n * region.radius), damping=n * self.cg_damping
        )
