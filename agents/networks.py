"""An agent's policy as two networks, the actor and the critic, and whose parameters are whose."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from agents.distributions import FlatProduct, SquashedGaussian
from agents.heads import ActorHead, CriticHead
from agents.recurrent import RecurrentPolicy
from agents.sequences import RecurrentActor, RecurrentCritic
from agents.standard import chooses, is_standard
from npg.families import DiagonalGaussian, Geometry, Product
from npg.transport import geometry

if TYPE_CHECKING:
    from agents.base import NaturalPolicyAlgorithm

__all__ = ["Networks"]

_Owned = tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]


class Networks:
    """Actor and critic of an agent. They are looked at anew where modules were replaced or parameters frozen.

    Args:
        agent: whose policy it is, as it is at each call of `follow`.

    Attributes:
        actor: observations ↦ the parameters of the action distribution.
        critic: observations ↦ values.
    """

    def __init__(self, agent: NaturalPolicyAlgorithm) -> None:
        self._agent = agent
        self.actor: ActorHead
        self.critic: CriticHead
        self._look()

    def _look(self) -> None:
        """Look at the policy anew; nothing of it is run."""
        policy = self._agent.policy
        if isinstance(policy, RecurrentPolicy):
            self.actor, self.critic = RecurrentActor(policy), RecurrentCritic(policy)
        else:
            self.actor, self.critic = ActorHead(policy), CriticHead(policy)
        self._known = self._signature()
        self._owned: _Owned | None = None
        if self.actor.family is not None or self._agent.metric not in ("fisher", "wasserstein"):
            _ = self.geometry  # so that a metric that cannot be is refused before there is an update
        fuse(policy.optimizer)

    @property
    def geometry(self) -> Geometry:
        """That of the actor's steps.

        Raises:
            ValueError: if the agent's ``metric`` is no name of one.
            TypeError: if it is ``"wasserstein"``, and the actor's family has none.
        """
        metric, family = self._agent.metric, self.actor.family
        if type(family) is SquashedGaussian and metric == "wasserstein":
            family = DiagonalGaussian()  # in units of the actions before they are squashed
        if type(family) is FlatProduct and metric == "wasserstein":
            family = Product(family.parts, family.sizes)
        return geometry(metric, family)

    @property
    def actor_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters that the policy's distribution depends on, by name."""
        return self._owners()[0]

    @property
    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """Those that the critic trains: none of the actor's, unless it may train features that they share."""
        return self._owners()[1]

    def see(self, observations: Any) -> None:
        """Find what actor and critic depend on in a whole rollout too, where other observations may go other ways.

        Args:
            observations: those of the rollout, which the processes that learn together all look at.
        """
        agent = self._agent
        if chooses(agent.policy):
            self._owned = self._look_for(observations, *self._owners(), agent.process_group)

    def _look_for(
        self,
        observations: Any,
        actor: Collection[str] = (),
        critic: Collection[str] = (),
        process_group: dist.ProcessGroup | None = None,
    ) -> _Owned:
        """The parameters of actor and critic, as one forward pass of each shows, and those that are known by name."""
        own = self.actor.own_parameters(observations, actor, process_group)
        shared = () if self._agent.train_shared_features else own
        others = self.critic.own_parameters(observations, {*critic, *shared}, process_group)
        return own, {name: p for name, p in others.items() if name not in shared}

    def _owners(self) -> _Owned:
        """The parameters of actor and critic, as present observations show. It is kept if they are real ones."""
        if self._owned is not None:
            return self._owned
        agent = self._agent
        agent.policy.set_training_mode(False)
        observations, real = agent.recent_observations(), True
        if observations is None:
            observations, real = agent.policy.obs_to_tensor(agent.observation_space.sample())[0], False
        self.actor.look(observations)
        owned = self._look_for(self.actor.single(observations))
        if real:
            self._owned = owned
        return owned

    def _signature(self) -> Any:
        """What tells one policy, whose parameters are frozen or not, from another."""
        policy = self._agent.policy
        parameters = [(name, p.requires_grad) for name, p in policy.named_parameters()]
        # objects that are kept, and not their ids alone, which others may have later
        return parameters, is_standard(policy), [policy, policy.action_dist, *policy.parameters()]

    def follow(self) -> None:
        """Look anew where modules of the policy were replaced, or parameters frozen, since the last look."""
        (*now, held), (*known, held_before) = self._signature(), self._known
        if now != known or len(held) != len(held_before) or any(a is not b for a, b in zip(held, held_before)):
            self._look()
        cover(self._agent.policy, self.critic_parameters.values(), self._agent.lr_schedule(1))


def cover(policy: ActorCriticPolicy, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
    """Where the policy's optimizer lacks one of these, since a module of the critic was replaced, make a new one."""
    optimized = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    if not optimized >= {id(p) for p in parameters}:
        optimizer_class: Any = policy.optimizer_class
        policy.optimizer = optimizer_class(policy.parameters(), lr=learning_rate, **policy.optimizer_kwargs)
        fuse(policy.optimizer)


def fuse(optimizer: torch.optim.Optimizer) -> None:
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
