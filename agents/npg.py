"""Natural policy gradient."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from agents.base import Batch, Critic, Metric, NaturalPolicyAlgorithm, Preconditioner
from agents.checks import number
from npg.step import StepReport
from npg.trust_region import TrustRegion

__all__ = ["NPG"]


class NPG(NaturalPolicyAlgorithm):
    """Natural policy gradient (Kakade 2002): θ ← θ + α(F + λI)⁻¹∇J.

    With ``target_kl``, α is such that the quadratic model of the KL equals it (Rajeswaran et al. 2017, equation 4);
    with ``step_size``, α is that. Neither checks the true KL or return; `TRPO` does.

    Args:
        policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, or an actor-critic policy class.
        env: the environment, or its Gymnasium id.
        learning_rate: of the critic's Adam, or a function of the remaining progress (from 1 to 0).
        n_steps: steps per environment and update.
        batch_size: mini-batch of the critic's Adam.
        gamma: discount factor.
        cg_max_steps: the most conjugate-gradient iterations, each one Fisher-vector product.
        cg_damping: λ ≥ 0 in (F + λI)s = g.
        n_critic_updates: epochs of the critic (``critic="adam"``), or its natural steps (``"natural"``).
        gae_lambda: λ of generalised advantage estimation.
        use_sde: generalised state-dependent exploration.
        sde_sample_freq: draw a new exploration matrix every so many steps; −1 for once per rollout.
        rollout_buffer_class: another rollout buffer than the default one.
        rollout_buffer_kwargs: its arguments.
        normalize_advantage: normalise advantages over the batch.
        target_kl: δ of the normalised step, in nats; unused where ``step_size`` is given.
        step_size: α of the fixed step, or None for the normalised one.
        sub_sampling_factor: use every k-th row of the rollout for all of the actor's step.
        stats_window_size: episodes over which returns and lengths are averaged in the log.
        tensorboard_log: where to log to.
        policy_kwargs: arguments of the policy.
        verbose: 0 for silence, 1 for information.
        seed: of all random numbers.
        device: where the networks live.
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
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: float = 0.01,
        step_size: float | None = None,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        fisher_fraction: float = 1.0,
        preconditioner: Preconditioner | None = None,
        metric: Metric = "fisher",
        critic: Critic = "adam",
        train_shared_features: bool = False,
    ) -> None:
        number("target_kl", target_kl, 0, above=True)
        if step_size is not None:
            number("step_size", step_size, 0, above=True)
        self.target_kl = target_kl
        self.step_size = step_size
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

    def _actor_step(self, batch: Batch) -> StepReport:
        if self.step_size is not None:
            return self._natural_step(batch, learning_rate=self.step_size)
        return self._natural_step(batch, trust_region=TrustRegion(radius=self.target_kl, backtrack=False))
