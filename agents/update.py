"""One update of an agent, from top to bottom: advantages, surrogate, the actor's step, the critic's, the log.

What an algorithm adds is one method, ``actor_step(batch)``: how the policy moves (`agents.trpo`, `agents.npg`,
`agents.mdpo`, `agents.cpo`). The step itself is `npg.natural_step`, the same that trains classifiers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from math import isfinite, nan
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from agents.buffer import random_part, rows
from agents.critic import AdamCritic, NaturalCritic, fixed_statistics_of_the_actor, training_mode
from agents.heads import CriticHead
from npg.families import Family
from npg.geometry import FisherRao
from npg.model import Buffers, undone_on_error
from npg.parallel import average_, equal, moments, size

if TYPE_CHECKING:
    from agents.base import NaturalPolicyAlgorithm

__all__ = ["ActorReport", "Batch", "critic_for", "critic_of", "restored_on_error", "surrogate", "update"]


class Batch(NamedTuple):
    """One rollout, flattened over steps and environments, as the actor's step sees it.

    Attributes:
        inputs: prepared observations.
        curvature_inputs: the part of them on which the Fisher is taken; None for all.
        actions: in the form that the actor's family takes.
        old_log_likelihood: log p(action) of the family under the policy that acted, (N,).
        advantages: (N,), normalised if so configured.
        rows: which of the rollout's they are.
    """

    inputs: Any
    curvature_inputs: Any
    actions: Tensor
    old_log_likelihood: Tensor
    advantages: Tensor
    rows: slice | Tensor = slice(None)


class ActorReport(Protocol):
    """What an actor's step tells at least; see `npg.StepReport`."""

    @property
    def accepted(self) -> bool:
        """Whether the step was taken."""

    @property
    def objective(self) -> float:
        """The surrogate before the step."""

    @property
    def actual_gain(self) -> float:
        """What the step added to it."""


def update(agent: NaturalPolicyAlgorithm) -> None:
    """Move the actor by one step of its algorithm, then fit the critic to the returns, and log both.

    Raises:
        FloatingPointError: if the critic's loss is not finite; in all processes alike.
        RuntimeError: if processes that learn together have different parameters.
    """
    networks, policy, group = agent.networks, agent.policy, agent.process_group
    rollout = next(agent.rollout_buffer.get(batch_size=None))
    # The policy that acted is the one whose KL is bounded: no dropout, frozen statistics.
    policy.set_training_mode(False)
    networks.see(rollout.observations)
    batch = batch_of(agent, rollout)

    statistics = fixed_statistics_of_the_actor(networks, rollout.observations, moving=agent.train_shared_features)
    with statistics as fixed:
        # 1. The actor. Where all of it is frozen there is no step, and the critic alone is trained.
        report = agent.actor_step(batch) if networks.actor_parameters else None
        if report is not None:
            agent.refused_steps = 0 if report.accepted else agent.refused_steps + 1

        # 2. The critic.
        started, loss, critic = perf_counter(), nan, critic_of(agent)
        if networks.critic_parameters:
            with training_mode(policy, but=fixed):
                loss = critic.fit(rollout.observations, rollout.returns)
        if networks.critic_parameters and agent.n_critic_updates and not isfinite(loss):
            found = agent.find_not_finite() or "rewards or observations are not finite, or learning_rate is too large"
            raise FloatingPointError(f"the critic's loss is not finite in update {agent.n_updates + 1}: {found}")
        others = agent.learn_more(rollout.observations)
    if isinstance(critic, NaturalCritic):
        agent.critic_damping = critic.damping
    critic_seconds = perf_counter() - started

    # 3. Several processes stay one.
    average_(policy.buffers(), group)
    if not equal(policy.parameters(), group):
        raise RuntimeError(f"the processes have different parameters after update {agent.n_updates + 1}")

    # 4. The log.
    record = agent.logger.record
    for name, value in log_of(report, "kl" if type(networks.geometry) is FisherRao else "distance").items():
        record(name, value)
    record("train/value_loss", loss)
    record("train/explained_variance", explained_variance(agent))
    record("train/entropy_loss", -agent.entropy)
    if (log_std := getattr(policy, "log_std", None)) is not None:
        record("train/std", torch.exp(log_std).mean().item())
    for name, value in others.items():
        record(name, value)
    record("time/collect_seconds", agent.collect_seconds)
    record("time/critic_seconds", critic_seconds)


def batch_of(agent: NaturalPolicyAlgorithm, rollout: Any) -> Batch:
    """The rollout as the actor's step takes it; every k-th row of a shuffle with ``sub_sampling_factor`` k."""
    actor = agent.networks.actor
    n, k = len(rollout.advantages), agent.sub_sampling_factor
    part = slice(None) if k == 1 else torch.randperm(n, device=agent.device)[::k]
    observations, targets = rows(rollout.observations, part), actor.targets(rollout.actions[part])
    inputs, advantages = actor.prepare(observations), rollout.advantages[part]
    if agent.normalize_advantage:
        advantages = normalized(agent, advantages)
    return Batch(
        inputs=inputs,
        curvature_inputs=random_part(inputs, agent.fisher_fraction),
        actions=targets,
        old_log_likelihood=actor.in_units_of_family(rollout.old_log_prob[part], observations, inputs, targets),
        advantages=advantages,
        rows=part,
    )


def normalized(agent: NaturalPolicyAlgorithm, advantages: Tensor) -> Tensor:
    """Advantages without their mean, over the deviation of this batch or of all batches so far.

    The deviation of all lets their size say how much there is to gain: where it is small, so is the gradient.
    """
    mean, variance = moments(advantages, agent.process_group)
    n = advantages.numel() * size(agent.process_group)
    variance = variance * n / max(n - 1, 1)
    if agent.advantage_deviation == "running":
        batches, before = agent.advantage_variance
        agent.advantage_variance = batches + 1, before + (float(variance) - before) / (batches + 1)
        variance = torch.full_like(variance, agent.advantage_variance[1])
    return (advantages - mean) / (variance.sqrt() + 1e-8)


def surrogate(family: Family, batch: Batch) -> Callable[[Tensor], Tensor]:
    """Outputs ↦ E[(π/π_old) A], the surrogate return of the importance-weighted batch (TRPO, equation 14)."""

    def of_outputs(outputs: Tensor) -> Tensor:
        ratio = torch.exp(family.log_likelihood(outputs, batch.actions) - batch.old_log_likelihood)
        return (ratio * batch.advantages).mean()

    return of_outputs


def critic_of(agent: NaturalPolicyAlgorithm) -> AdamCritic | NaturalCritic:
    """How the agent fits its critic."""
    networks = agent.networks
    return critic_for(agent, networks.critic, networks.critic_parameters, agent.policy.optimizer, agent.critic_damping)


def critic_for(
    agent: NaturalPolicyAlgorithm,
    head: CriticHead,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    damping: float,
) -> AdamCritic | NaturalCritic:
    """How the agent fits a critic, be it of the returns or of something else, by its options."""
    if agent.critic == "adam":
        return AdamCritic(
            head,
            parameters,
            optimizer,
            epochs=agent.n_critic_updates,
            batch_size=agent.batch_size,
            process_group=agent.process_group,
        )
    return NaturalCritic(
        head,
        parameters,
        steps=agent.n_critic_updates,
        products=agent.cg_max_steps,
        fisher_fraction=agent.fisher_fraction,
        damping=damping,
        process_group=agent.process_group,
    )


#: What the log has of an actor's report, as far as that has it.
_LOGGED = {
    "train/predicted_{divergence}": "predicted_kl",
    "train/predicted_gain": "predicted_gain",
    "train/backtracks": "backtracks",
    "train/cg_iterations": "iterations",
    "train/cg_residual": "residual",
    "train/step_norm": "step_norm",
    "train/gradient_norm": "gradient_norm",
    "time/solve_seconds": "solve_seconds",
    "time/search_seconds": "search_seconds",
}


def log_of(report: Any, divergence: str) -> dict[str, float]:
    """An actor's report under the names of the log; where all of the actor is frozen, that it took no step."""
    if report is None:
        return {f"train/{divergence}": 0.0, "train/accepted": 0.0, "train/step_norm": 0.0}
    gain, kl = (report.actual_gain, report.kl) if report.accepted else (0.0, 0.0)
    own = {name: getattr(report, field) for name, field in _LOGGED.items() if hasattr(report, field)}
    return {
        f"train/{divergence}": kl,
        "train/accepted": float(report.accepted),
        "train/actual_gain": gain,
        "train/policy_objective": report.objective + gain,
        **{name.format(divergence=divergence): value for name, value in own.items()},
    }


def explained_variance(agent: NaturalPolicyAlgorithm) -> float:
    """1 − Var[R − V] / Var[R] of the returns R and the values V before the update; NaN for a constant return."""
    buffer: RolloutBuffer = agent.rollout_buffer
    values, returns = (torch.as_tensor(x, device=agent.device).flatten() for x in (buffer.values, buffer.returns))
    _, unexplained = moments(returns - values, agent.process_group)
    _, variance = moments(returns, agent.process_group)
    return float(1 - unexplained / variance) if variance > 0 else nan


def copy_of_state(owner: nn.Module | torch.optim.Optimizer) -> dict[str, Any]:
    """What `load_state_dict` brings back, as it is now."""
    return pytree.tree_map_only(Tensor, torch.clone, owner.state_dict())


def restored_on_error(
    agent: NaturalPolicyAlgorithm, optimizers: Sequence[nn.Module | torch.optim.Optimizer]
) -> AbstractContextManager[None]:
    """Put back all that an update moves, the policy and these, if an error or an interrupt leaves the block."""
    states = [copy_of_state(owner) for owner in optimizers]
    parameters = [(p, p.detach().clone()) for p in agent.policy.parameters()]
    buffers, names = Buffers(agent.policy), ("critic_damping", "advantage_variance", "refused_steps")
    attributes = {name: getattr(agent, name) for name in names}

    def restore() -> None:
        for owner, state in zip(optimizers, states):
            owner.load_state_dict(state)
        for p, before in parameters:
            p.data.copy_(before)
        if agent.average is not None:
            agent.average.mark()
        buffers.restore()
        vars(agent).update(attributes)

    return undone_on_error(restore)
