"""Policies for Tuple and Dict actions: one joint distribution over all parts, whose KL and Fisher are exact.

The network has the outputs of all parts side by side, and `agents.distributions.HybridDistribution` stands where
Stable-Baselines3 has the distribution of a single space. Its own forward passes then serve for every structure, and
the rest of this package sees a family, a product (`npg.families.Product`), as of any other policy.
"""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule

from agents.distributions import HybridDistribution
from envs.hybrid import FlatActions

__all__ = [
    "HybridActorCriticCnnPolicy",
    "HybridActorCriticPolicy",
    "HybridMultiInputActorCriticPolicy",
]


class HybridActorCriticPolicy(ActorCriticPolicy):
    """Stable-Baselines3's `ActorCriticPolicy`, which takes `envs.hybrid.FlatActions` too; of others it changes nothing.

    Raises:
        ValueError: with ``use_sde``, if the actions are of several parts.
    """

    def _build(self, lr_schedule: Schedule) -> None:
        if isinstance(self.action_space, FlatActions):
            if self.use_sde:
                raise ValueError(f"use_sde=True is for actions that are one Box, not for {self.action_space.nested}")
            self.action_dist = HybridDistribution(self.action_space)
        super()._build(lr_schedule)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> Any:
        """As Stable-Baselines3's. An action of several parts has its structure; of n observations it is a list of n."""
        actions, state = super().predict(observation, state, episode_start, deterministic)
        return self.structured(actions), state

    def structured(self, actions: Any) -> Any:
        """Actions (D,) or (n, D) in the structure of the action space."""
        if not isinstance(space := self.action_space, FlatActions):
            return actions
        return space.unflatten(actions) if actions.ndim == 2 else space.unflatten(actions[None])[0]


class HybridActorCriticCnnPolicy(HybridActorCriticPolicy, ActorCriticCnnPolicy):
    """`HybridActorCriticPolicy` for images."""


class HybridMultiInputActorCriticPolicy(HybridActorCriticPolicy, MultiInputActorCriticPolicy):
    """`HybridActorCriticPolicy` for observations with several parts."""
