"""Mirror descent policy optimization."""

from __future__ import annotations

from math import isfinite, nan
from time import perf_counter
from typing import Any

import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor

from agents.base import Batch, Critic, NaturalPolicyAlgorithm, all_finite, copy_of_state
from agents.checks import number, whole
from npg.fisher import Fisher
from npg.linearize import Buffers
from npg.parallel import average_, mean_
from npg.parameters import Parameters
from npg.solvers import Status
from npg.step import StepReport

__all__ = ["MDPO"]


class MDPO(NaturalPolicyAlgorithm):
    """Mirror descent policy optimization (Tomar et al. 2020): the KL as a proximity term instead of a constraint.

    ``max_θ E[(π_θ/π_k) A] − E[KL(π_θ ‖ π_k)]/t_k``, by several gradient steps on the whole batch. It is `TRPO`'s
    problem with the multiplier 1/t_k given in place of the radius (the report, equations 17 and 18), and its first
    step from π_k is the ordinary policy gradient, since the KL is flat there. Steps that end where something is not
    finite are refused together: policy and optimizer stay bit for bit what they were.

    Args:
        policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, or an actor-critic policy class.
        env: the environment, or its Gymnasium id.
        learning_rate: of the critic's Adam, or a function of the remaining progress (from 1 to 0).
        n_steps: steps per environment and update.
        batch_size: mini-batch of the critic's Adam.
        gamma: discount factor.
        actor_learning_rate: of the actor's Adam; it falls linearly to 0, as in the paper.
        n_actor_updates: gradient steps on the actor per update.
        step_size: t_0 > 0; t_k falls linearly from it to 0 over the training, as in the paper.
        n_critic_updates: epochs of the critic (``critic="adam"``), or its natural steps (``"natural"``).
        gae_lambda: λ of generalised advantage estimation.
        use_sde: generalised state-dependent exploration.
        sde_sample_freq: draw a new exploration matrix every so many steps; −1 for once per rollout.
        rollout_buffer_class: another rollout buffer than the default one.
        rollout_buffer_kwargs: its arguments.
        normalize_advantage: normalise advantages over the batch.
        sub_sampling_factor: use every k-th row of the rollout for all of the actor's step.
        stats_window_size: episodes over which returns and lengths are averaged in the log.
        tensorboard_log: where to log to.
        policy_kwargs: arguments of the policy.
        verbose: 0 for silence, 1 for information.
        seed: of all random numbers.
        device: where the networks live.
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
        actor_learning_rate: float = 3e-4,
        n_actor_updates: int = 10,
        step_size: float = 1.0,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        critic: Critic = "adam",
        train_shared_features: bool = False,
    ) -> None:
        number("actor_learning_rate", actor_learning_rate, 0, above=True)
        number("step_size", step_size, 0, above=True)
        whole("n_actor_updates", n_actor_updates, 1)
        self.actor_learning_rate = actor_learning_rate
        self.n_actor_updates = n_actor_updates
        self.step_size = step_size
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            gamma=gamma,
            cg_max_steps=15,
            cg_damping=0.0,
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
            fisher_fraction=1.0,
            preconditioner=None,
            critic=critic,
            train_shared_features=train_shared_features,
            _init_setup_model=_init_setup_model,
        )

    def _setup_heads(self) -> None:
        super()._setup_heads()
        # It holds the critic's parameters as well, which have no gradient in an actor step and so stay.
        parameters = list(self.policy.parameters())
        optimizer = getattr(self, "actor_optimizer", None)
        if optimizer is None or [*map(id, optimizer.param_groups[0]["params"])] != [*map(id, parameters)]:
            self.actor_optimizer = torch.optim.Adam(parameters, lr=self.actor_learning_rate, eps=1e-5)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return [*modules, "actor_optimizer"], tensors

    def _actor_step(self, batch: Batch) -> StepReport:
        started = perf_counter()
        family = self._actor.family
        surrogate = self._surrogate(batch)
        parameters = Parameters(self._actor_parameters)
        # Annealed to 0 with the remaining progress; the last update still needs a finite multiplier.
        remaining = max(self._current_progress_remaining, 1e-2)
        proximity = 1 / (self.step_size * remaining)
        for group in self.actor_optimizer.param_groups:
            group["lr"] = self.actor_learning_rate * remaining

        fisher = Fisher(self._actor, batch.inputs, family, parameters=self._actor_parameters)
        old = fisher.outputs
        outputs = old.clone().requires_grad_()
        surrogate_before = surrogate(outputs)
        (slope,) = torch.autograd.grad(surrogate_before, outputs)
        g = mean_(fisher.linearization.pull_back(slope), self.process_group)
        origin = parameters.copy()
        optimizer_before, buffers = copy_of_state(self.actor_optimizer), Buffers(self._actor)

        def forward() -> Tensor:
            buffers.restore()  # every pass, as the one that acted, begins with these
            return self._actor(batch.inputs)

        self.actor_optimizer.zero_grad()
        for _ in range(self.n_actor_updates):
            outputs = forward()
            objective = surrogate(outputs) - proximity * family.kl(outputs, old).mean()
            gradients = torch.autograd.grad(-objective, parameters.tensors)
            average_(gradients, self.process_group)
            for p, gradient in zip(parameters.tensors, gradients):
                p.grad = gradient
            self.actor_optimizer.step()
        with torch.no_grad():
            new = forward()
            measured = torch.stack([surrogate_before.detach(), surrogate(new), family.kl(old, new).mean()])
            before, after, kl = mean_(measured, self.process_group).tolist()
        buffers.restore()
        accepted = isfinite(after - before) and isfinite(kl) and all_finite(self.actor_optimizer, parameters.tensors)
        # The quadratic model belongs to the old policy: look at the step from there.
        moved = parameters.copy()
        step = parameters.flatten([a - b for a, b in zip(moved, origin)])
        parameters.restore(origin)
        predicted_kl = 0.0
        if not accepted:
            self.actor_optimizer.load_state_dict(optimizer_before)
        else:
            at_old = Fisher(
                self._actor,
                batch.inputs,
                family,
                parameters=self._actor_parameters,
                process_group=self.process_group,
            )
            predicted_kl = 0.5 * float(at_old.quadratic(step))
            parameters.restore(moved)
        return StepReport(
            accepted=accepted,
            objective=before,
            predicted_gain=float(torch.dot(g, step)) if accepted else 0.0,
            actual_gain=after - before,
            predicted_kl=predicted_kl,
            kl=kl,
            status=Status.CONVERGED if accepted else Status.NON_FINITE,
            iterations=0,
            residual=nan,
            backtracks=0,
            scale=1.0 if accepted else 0.0,
            gradient_norm=float(g.norm()),
            step_norm=float(step.norm()) if accepted else 0.0,
            damping=0.0,
            gradient=g,
            solution=step,
            step=step if accepted else torch.zeros_like(step),
            solve_seconds=perf_counter() - started,
            search_seconds=0.0,
        )
