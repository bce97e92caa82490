"""A linear softmax policy over afterstates, for environments that show what actions lead to (``npg/Tetris-v0``)."""

from __future__ import annotations

from typing import Any, cast

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

__all__ = ["AfterstatePolicy", "afterstate_logits"]


def afterstate_logits(observations: Tensor, theta: Tensor) -> Tensor:
    """Logits θᵀφ_sa, −∞ at actions that are not legal; (…, actions, 1 + d), (d,) → (…, actions).

    Row a of an observation is [legal, φ₁, …, φ_d] with φ the features of the state after action a.
    """
    return (observations[..., 1:] @ theta).masked_fill(observations[..., 0] == 0, -float("inf"))


class Afterstates(nn.Module):
    """The latent layer of `AfterstatePolicy`: flat observations ↦ logits for the actor, ψ for the critic."""

    def __init__(self, actions: int, features: int) -> None:
        super().__init__()
        self.shape = (actions, 1 + features)
        self.theta = nn.Parameter(torch.zeros(features))
        # With momentum 1 the statistics are those of the batch that the critic was last fitted to.
        self.standardize = nn.BatchNorm1d(features, momentum=1.0, affine=False)
        self.latent_dim_pi, self.latent_dim_vf = actions, 2 * features

    def forward_actor(self, observations: Tensor) -> Tensor:
        return afterstate_logits(observations.unflatten(-1, self.shape), self.theta)

    def forward_critic(self, observations: Tensor) -> Tensor:
        # The policy only picks the afterstates that the critic looks at; the critic does not train it.
        phi = observations.unflatten(-1, self.shape)[..., 1:]
        p = self.forward_actor(observations).detach().softmax(-1)
        z = self.standardize((p.unsqueeze(-1) * phi).sum(-2))
        return torch.cat([z, z.square()], -1)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(observations), self.forward_critic(observations)


class AfterstatePolicy(ActorCriticPolicy):
    """π(a; s) ∝ exp(θᵀφ_sa) with as many parameters as features, starting at θ = 0 (Kakade 2001, section 5).

    The critic is linear in ψ = (z, z²), with z the expected features E_π φ of the next state, standardised over the
    batch: features of any unit are alike to it.

    Raises:
        ValueError: if the observations are not one row [legal, φ] per discrete action.
    """

    @property
    def theta(self) -> nn.Parameter:
        """The weights of the features, (d,)."""
        return cast(Afterstates, self.mlp_extractor).theta

    def _build_mlp_extractor(self) -> None:
        shape, actions = self.observation_space.shape, getattr(self.action_space, "n", None)
        if shape is None or len(shape) != 2 or shape[0] != actions or shape[1] < 2:
            raise ValueError(
                f"AfterstatePolicy needs observations of shape (actions, 1 + features) and Discrete(actions), got "
                f"{self.observation_space} and {self.action_space}"
            )
        self.mlp_extractor = Afterstates(shape[0], shape[1] - 1).to(self.device)  # type: ignore[assignment]

    def _build(self, lr_schedule: Schedule) -> None:
        self._build_mlp_extractor()
        self.action_net = nn.Identity()
        self.value_net = nn.Linear(self.mlp_extractor.latent_dim_vf, 1)
        nn.init.zeros_(self.value_net.weight)
        nn.init.zeros_(self.value_net.bias)
        optimizer_class: Any = self.optimizer_class
        self.optimizer = optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)
