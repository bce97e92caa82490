"""The rollouts of recurrent policies: collected with a memory, and learned from as sequences.

A row of such a rollout is an environment with all its steps: observations (E, T, …), where its episodes begin, and the
states before its first step, which are constants of the policy that acted. So a part of the rollout, be it by
``fisher_fraction``, ``sub_sampling_factor`` or a mini-batch of the critic, is whole sequences. The outputs are
(E, T, D), and the events of the Fisher are all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common import buffers
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor

from agents.buffer import RolloutBuffer, rows, stacked
from agents.distributions import FAMILIES, described, with_deviations
from agents.heads import ActorHead, CriticHead
from agents.recurrent import RecurrentPolicy
from agents.standard import aside
from npg import families
from npg.parallel import mean_

if TYPE_CHECKING:
    from agents.collect import Collector

__all__ = ["RecurrentActor", "RecurrentCritic", "SequenceBuffer", "acting", "evaluate", "interrupted", "is_recurrent"]


def sequences(observations: Any, starts: NDArray[Any], actor: Tensor, critic: Tensor) -> dict[str, Any]:
    """What the heads take: observations (E, T, …), starts (E, T) on the host, and states (E, parts, layers, H)."""
    return {"actor": actor, "critic": critic, "starts": starts, "observations": observations}


class SequenceBuffer(RolloutBuffer):
    """A rollout as sequences, one of each environment; observations may be a Dict.

    Attributes:
        states: of actor and critic before the first step, (E, parts, layers, H).
        after: of the actor after the last step.
    """

    states: tuple[Tensor, Tensor]
    after: Tensor

    def reset(self) -> None:
        """Begin anew."""
        several = isinstance(self.observation_space, spaces.Dict)
        kind: Any = buffers.DictRolloutBuffer if several else buffers.RolloutBuffer
        kind.reset(self)

    def steps(self, n: int) -> dict[str, Any]:
        """The first n steps, as the heads take them."""
        stored: Any = self.observations
        observations = (
            {key: self.by_environment(value[:n]) for key, value in stored.items()}
            if isinstance(stored, dict)
            else self.by_environment(stored[:n])
        )
        return sequences(observations, self.episode_starts[:n].T.copy(), *self.states)

    def by_environment(self, array: NDArray[Any]) -> Tensor:
        """(T, E, …) as a tensor (E, T, …)."""
        return self.to_torch(np.ascontiguousarray(array.swapaxes(0, 1)), copy=False)

    def get(self, batch_size: int | None = None) -> Generator[RolloutBufferSamples, None, None]:
        """Everything once, (E, T, …).

        Raises:
            ValueError: for a ``batch_size``.
        """
        if batch_size is not None:
            raise ValueError(f"batch_size={batch_size}: a rollout of sequences has no mini-batches: take it whole")
        assert self.full, "the rollout is not complete"
        names = ("values", "log_probs", "advantages", "returns")
        actions = self.by_environment(self.actions.astype(np.float32, copy=False))
        rest = (self.by_environment(getattr(self, name)) for name in names)
        yield RolloutBufferSamples(self.steps(self.buffer_size), actions, *rest)  # type: ignore[arg-type]


def is_recurrent(agent: Any) -> bool:
    """Whether the agent's policy has a memory.

    Raises:
        ValueError: for options that cannot go with one, and for one that is not ours.
    """
    given, name = agent.rollout_buffer_class, agent.policy_class.__name__
    if not issubclass(agent.policy_class, RecurrentPolicy):
        if any(base.__module__.startswith("sb3_contrib.common.recurrent") for base in agent.policy_class.__mro__):
            raise ValueError(
                f"policy={name} is sb3-contrib's, whose update is not exact through time: take one of ours by its "
                "name, such as 'MlpLstmPolicy'"
            )
        return False
    if given not in (None, SequenceBuffer):
        raise ValueError(
            f"rollout_buffer_class={given.__name__} cannot go with {name}, which learns from sequences and not from "
            "single steps: leave it out"
        )
    if agent.sub_sampling_factor > agent.n_envs:
        raise ValueError(
            f"sub_sampling_factor must be at most the {agent.n_envs} environments with {name}, got "
            f"{agent.sub_sampling_factor}: it takes whole sequences, one of each environment. Take more environments"
        )
    if agent.preconditioner == "kfac":
        raise ValueError(f"preconditioner='kfac' has no factors of the memory of {name}: take 'diagonal', or None")
    return True


# ------------------------------------------------------------------------------------------------------ the networks


def _prepared(policy: RecurrentPolicy, observations: dict[str, Any]) -> dict[str, Any]:
    """Sequences with preprocessed observations, (E·T, …) of each environment in their place, (E, T, …)."""
    raw, shape = observations["observations"], observations["starts"].shape
    flat = {k: v.flatten(0, 1) for k, v in raw.items()} if isinstance(raw, dict) else raw.flatten(0, 1)
    done = policy.prepared(flat)
    shaped = {k: v.unflatten(0, shape) for k, v in done.items()} if isinstance(done, dict) else done.unflatten(0, shape)
    return {**observations, "observations": shaped}


def _flat(prepared: dict[str, Any]) -> Any:
    given = prepared["observations"]
    return {k: v.flatten(0, 1) for k, v in given.items()} if isinstance(given, dict) else given.flatten(0, 1)


def _alone(policy: RecurrentPolicy, observations: Any) -> dict[str, Any]:
    """Raw observations, one of each environment, as sequences of one step that begin an episode."""
    several = isinstance(observations, dict)
    n = len(next(iter(observations.values())) if several else observations)
    steps = {k: v.unsqueeze(1) for k, v in observations.items()} if several else observations.unsqueeze(1)
    return sequences(steps, np.ones((n, 1), bool), policy.no_memory(n), policy.no_memory(n))


class RecurrentActor(ActorHead):
    """The actor of a recurrent policy: sequences ↦ the parameters of its action distribution, (E, T, D)."""

    traceable = False  # a loop over time, of another length in each rollout
    policy: RecurrentPolicy

    def __init__(self, policy: RecurrentPolicy) -> None:
        super().__init__(policy)
        known = FAMILIES.get(type(self.distribution))
        if known is not None:
            self.family = known(self.distribution)
        elif type(self.distribution) is not StateDependentNoiseDistribution:
            raise NotImplementedError(
                f"a recurrent policy takes no action distribution of one's own, got {type(self.distribution).__name__}"
                ": leave that of Stable-Baselines3 in action_dist"
            )

    def look(self, observations: Any) -> None:
        """Find the family, from what the policy returns for raw observations, one of each environment."""
        if type(self.distribution) in FAMILIES:
            return
        prepared = self.prepare(_alone(self.policy, observations))
        with torch.no_grad(), aside(self.policy):
            latent, _ = self.policy.actor_latent(_flat(prepared), prepared["starts"], prepared["actor"])
            self.family, _ = described(self.policy._get_action_dist_from_latent(latent))

    def prepare(self, observations: dict[str, Any]) -> dict[str, Any]:
        """Sequences of preprocessed observations."""
        return _prepared(self.policy, observations)

    def single(self, observations: Any) -> dict[str, Any]:
        """Raw observations, one of each environment, as sequences of one step."""
        return _alone(self.policy, observations)

    def outputs(self, latent: Tensor) -> Tensor:
        """What is behind the memory ↦ the parameters of the distribution, (N, D)."""
        policy = self.policy
        if type(self.distribution) not in FAMILIES:
            return described(policy._get_action_dist_from_latent(latent))[1]
        return with_deviations(policy, self.distribution, policy.action_net(latent))

    def forward(self, prepared: dict[str, Any]) -> Tensor:
        """Prepared sequences ↦ outputs (E, T, D)."""
        starts = prepared["starts"]
        latent, _ = self.policy.actor_latent(_flat(prepared), starts, prepared["actor"])
        return self.outputs(latent).unflatten(0, starts.shape)

    def in_units_of_family(self, log_likelihood: Tensor, observations: Any, inputs: Any, targets: Tensor) -> Tensor:
        """As they are: `evaluate` stored the family's."""
        return log_likelihood

    def targets(self, actions: Tensor) -> Tensor:
        """Stored actions (E, T, …) in the form that the family takes."""
        return actions[..., 0].long() if isinstance(self.family, families.Categorical) else super().targets(actions)


class RecurrentCritic(CriticHead):
    """The critic of a recurrent policy: sequences ↦ values, (E, T, 1)."""

    traceable = False
    policy: RecurrentPolicy

    def prepare(self, observations: dict[str, Any]) -> dict[str, Any]:
        """Sequences of preprocessed observations."""
        return _prepared(self.policy, observations)

    def single(self, observations: Any) -> dict[str, Any]:
        """Raw observations, one of each environment, as sequences of one step."""
        return _alone(self.policy, observations)

    def forward(self, prepared: dict[str, Any]) -> Tensor:
        """Prepared sequences ↦ values (E, T, 1)."""
        return self.with_states(prepared, keep=False)[0]

    def with_states(self, prepared: dict[str, Any], *, keep: bool = True) -> tuple[Tensor, Tensor | None]:
        """The values, and the states after each step, (E, T, parts, layers, H)."""
        starts = prepared["starts"]
        values, states = self.policy.values(_flat(prepared), starts, prepared["critic"], keep=keep)
        return values.unflatten(0, starts.shape), states


# -------------------------------------------------------------------------------------------------------- collecting


def _remember(agent: Collector, actor: Tensor, critic: Tensor | None = None) -> None:
    """Keep the states that go with the agent's last observations; the critic's where it has been asked."""
    kept = agent._last_states[1] if critic is None else critic.cpu().numpy()
    agent._last_states = (actor.cpu().numpy(), kept)


def acting(agent: Collector, buffer: SequenceBuffer) -> Callable[[Any], Sequence[Tensor]]:
    """``observations ↦ sampled actions, outputs``, by a policy that remembers those before; without gradients."""
    actor: Any = agent.networks.actor
    policy: RecurrentPolicy = actor.policy
    policy.check_own()
    shape = (agent.n_envs, *policy.state_shape)
    if any(np.shape(state) != shape for state in agent._last_states):
        agent._last_states = tuple(np.zeros(shape, np.float32) for _ in range(2))
    first, critic = (torch.as_tensor(state).to(agent.device) for state in agent._last_states)
    buffer.states, buffer.after = (first, critic), first

    def act(observations: Any) -> Sequence[Tensor]:
        _remember(agent, buffer.after)
        starts = np.asarray(agent._last_episode_starts)[:, None]
        latent, states = policy.actor_latent(policy.prepared(observations), starts, buffer.after, keep=True)
        buffer.after = states[:, 0]  # type: ignore[index]
        if type(actor.distribution) in FAMILIES:
            outputs = actor.outputs(latent)
            return actor.family.sample(outputs), outputs
        distribution = policy._get_action_dist_from_latent(latent)
        return distribution.get_actions(), described(distribution)[1]

    return act


def _values(agent: Collector, buffer: SequenceBuffer) -> tuple[Tensor, Tensor]:
    """The critic over the steps so far: values (E, t), and its state after each step, (E, t, parts, layers, H)."""
    critic: Any = agent.networks.critic
    steps = buffer.steps(buffer.pos)
    at_once = max(1, agent._evaluated_at_once() // buffer.pos)
    parts = [rows(steps, slice(i, i + at_once)) for i in range(0, buffer.n_envs, at_once)]
    values, states = zip(*(critic.with_states(critic.prepare(part)) for part in parts))
    return torch.cat(values).squeeze(-1), torch.cat(states)


def _next_values(agent: Collector, observations: Any, starts: NDArray[Any], state: Tensor) -> Tensor:
    """The critic one step on, from raw observations (n, …) and the states before them, (n,)."""
    policy: Any = agent.policy
    values, _ = policy.values(policy.prepared(observations), starts[:, None], state)
    return values.flatten()


@torch.no_grad()
def interrupted(agent: Collector, buffer: SequenceBuffer, actor: Tensor) -> None:
    """A rollout ends early: the critic remembers what was observed until then, as the actor does."""
    _remember(agent, actor, _values(agent, buffer)[1][:, -1])


def broken_off(agent: Collector, buffer: Any) -> None:
    """An error or Ctrl-C ended a rollout, of whatever policy: actor and critic remember all before the last step."""
    if isinstance(buffer, SequenceBuffer) and buffer.pos:
        interrupted(agent, buffer, torch.as_tensor(agent._last_states[0]))


@torch.no_grad()
def evaluate(agent: Collector, buffer: SequenceBuffer, truncated: Sequence[Any], outputs: Sequence[Tensor]) -> Tensor:
    """Values and log-likelihoods of all steps, and the bootstrap of episodes that their time limit cut off.

    Returns:
        The values of the last observations, (E,).
    """
    actor: Any = agent.networks.actor
    values, states = _values(agent, buffer)
    said = torch.stack(list(outputs), 1)
    actions = actor.targets(buffer.by_environment(buffer.actions))
    log_likelihood = actor.family.log_likelihood(said, actions)
    buffer.values[:] = values.T.cpu().numpy()
    buffer.log_probs[:] = log_likelihood.T.cpu().numpy()
    if truncated:
        steps, envs, finals = (list(part) for part in zip(*truncated))
        last, _ = actor.policy.obs_to_tensor(stacked(finals))
        final = _next_values(agent, last, np.zeros(len(steps), bool), states[envs, steps])
        buffer.rewards[steps, envs] += agent.gamma * final.cpu().numpy()
    exact = type(actor.distribution) in FAMILIES
    entropy = actor.family.entropy(said) if exact else -log_likelihood
    agent.entropy = float(mean_(entropy.mean(), agent.process_group))
    _remember(agent, buffer.after, states[:, -1])
    newest: Any = agent._last_obs
    starts = np.asarray(agent._last_episode_starts)
    return _next_values(agent, obs_as_tensor(newest, agent.device), starts, states[:, -1])
