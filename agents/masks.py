"""Policies that never take a forbidden action: the mask of the observation becomes a part of their logits.

The mask goes through the network beside the features. Stable-Baselines3's own forward passes then give masked logits,
in which a forbidden action has a constant that no parameter moves: acting, log-likelihood, KL, entropy, Fisher and
evaluation all follow from the same outputs, and none of them knows of masks.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.vec_env import VecEnv, is_vecenv_wrapped
from torch import Tensor, nn

from agents.afterstate import AfterstatePolicy
from agents.recurrent import RecurrentPolicy
from envs.checks import LARGEST
from envs.masks import ACTION_MASK, ActionMasks, check_mask_space, check_masks, gives_masks, mask_sizes

__all__ = [
    "MaskableActorCriticCnnPolicy",
    "MaskableActorCriticPolicy",
    "MaskableMultiInputActorCriticPolicy",
    "MaskedFeatures",
    "MaskedLatent",
    "MaskedLogits",
    "TakesMasks",
    "with_masks",
]


# The parts of the network --------------------------------------------------------------------------------------------


class MaskedFeatures(BaseFeaturesExtractor):
    """The features of an observation without its mask, and beside them the mask, (N, features + entries).

    Args:
        space: of the observations.
        extractor: of the features.
        key: the part of the observation that the extractor takes; None for the Dict of all but the mask.
    """

    def __init__(self, space: spaces.Dict, extractor: BaseFeaturesExtractor, key: str | None) -> None:
        super().__init__(space, extractor.features_dim)
        self.extractor, self.key = extractor, key

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Prepared observations ↦ features and mask."""
        rest: Any = {name: part for name, part in observations.items() if name != ACTION_MASK}
        features = self.extractor(rest if self.key is None else rest[self.key])
        return torch.cat([features, observations[ACTION_MASK].flatten(1).to(features.dtype)], -1)


class MaskedLatent(nn.Module):
    """Stable-Baselines3's `MlpExtractor`, past which the mask is carried to the actor.

    Args:
        extractor: of the latent features.
        entries: of a mask.
    """

    def __init__(self, extractor: MlpExtractor, entries: int) -> None:
        super().__init__()
        self.extractor, self.entries = extractor, entries
        self.latent_dim_pi, self.latent_dim_vf = extractor.latent_dim_pi, extractor.latent_dim_vf

    def forward_actor(self, features: Tensor) -> Tensor:
        """Features and mask ↦ latent features of the actor, and the mask."""
        features, mask = features[..., : -self.entries], features[..., -self.entries :]
        return torch.cat([self.extractor.forward_actor(features), mask], -1)

    def forward_critic(self, features: Tensor) -> Tensor:
        """Features and mask ↦ latent features of the critic."""
        return self.extractor.forward_critic(features[..., : -self.entries])

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.forward_actor(features), self.forward_critic(features)


class MaskedLogits(nn.Module):
    """Logits whose forbidden ones are a constant, so low that their probability is exactly zero.

    Its size is that which no number of an environment reaches, and whose square float32 still holds.

    Args:
        net: latent features ↦ logits.
        entries: of a mask.
        bits: whether a logit is that of a bit, with two entries of the mask: may it be 0, may it be 1.
    """

    def __init__(self, net: nn.Module, entries: int, bits: bool) -> None:
        super().__init__()
        self.net, self.entries, self.bits = net, entries, bits

    def forward(self, latent: Tensor) -> Tensor:
        """Latent features and mask ↦ logits."""
        logits, forbidden = self.net(latent[..., : -self.entries]), latent[..., -self.entries :] < 0.5
        if not self.bits:
            return logits.masked_fill(forbidden, -LARGEST)
        zero, one = forbidden.unflatten(-1, (-1, 2)).unbind(-1)
        return logits.masked_fill(zero, LARGEST).masked_fill(one, -LARGEST)


# The policies --------------------------------------------------------------------------------------------------------


class MaskableActorCriticPolicy(ActorCriticPolicy):
    """Stable-Baselines3's `ActorCriticPolicy` for observations with a mask of the actions, which `ActionMasks` adds.

    The features are those of the observation without the mask. Where all is allowed, the outputs are bit for bit those
    of the policy without masks.

    Raises:
        ValueError: if the observations have no mask, one that does not fit the actions, or several parts beside it,
            which are for `MaskableMultiInputActorCriticPolicy`.
    """

    takes_dict: ClassVar[bool] = False
    """Whether the features are those of a Dict, or of its only part beside the mask."""

    observation_space: spaces.Dict

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], *args: Any, **kwargs: Any
    ) -> None:
        if not (isinstance(observation_space, spaces.Dict) and ACTION_MASK in observation_space.spaces):
            raise ValueError(
                f"{type(self).__name__} needs observations with an {ACTION_MASK}, got {observation_space}: wrap the "
                "environments in envs.ActionMasks"
            )
        check_mask_space(observation_space, action_space)
        rest = [name for name in observation_space.spaces if name != ACTION_MASK]
        if len(rest) != 1 and not (self.takes_dict and rest):
            raise ValueError(
                f"the observation has {rest} beside its {ACTION_MASK}: for one part take MlpPolicy or CnnPolicy, for "
                "several MultiInputPolicy"
            )
        super().__init__(observation_space, action_space, *args, **kwargs)

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """The extractor of all but the mask, beside which the mask is kept."""
        rest = {name: part for name, part in self.observation_space.spaces.items() if name != ACTION_MASK}
        key = None if self.takes_dict else next(iter(rest))
        space = spaces.Dict(rest) if key is None else rest[key]
        extractor = self.features_extractor_class(space, **self.features_extractor_kwargs)
        return MaskedFeatures(self.observation_space, extractor, key)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        entries = sum(mask_sizes(self.action_space))
        bits = isinstance(self.action_space, spaces.MultiBinary)
        self.mlp_extractor = MaskedLatent(self.mlp_extractor, entries)  # type: ignore[assignment]
        self.action_net = MaskedLogits(self.action_net, entries, bits)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> Any:
        """As Stable-Baselines3's, of observations that have their masks, or with ``action_masks`` (n, entries).

        Raises:
            ValueError: if there are no masks, or they do not fit, or allow nothing.
        """
        if action_masks is None and isinstance(observation, dict):
            action_masks = observation.get(ACTION_MASK)
        if action_masks is None:
            raise ValueError(
                f"the observation has no {ACTION_MASK}: take it from environments in envs.ActionMasks, such as the "
                "agent's get_env(), or give predict(…, action_masks=…)"
            )
        observation, sizes = self._with(observation, action_masks), mask_sizes(self.action_space)
        check_masks(observation[ACTION_MASK].reshape(-1, sum(sizes)), sizes, "", "observation")
        return super().predict(observation, state, episode_start, deterministic)

    def _with(self, observation: Any, action_masks: Any) -> dict[str, Any]:
        """The observation with these masks, for one environment or for several."""
        if not isinstance(observation, dict):
            rest = [name for name in self.observation_space.spaces if name != ACTION_MASK]
            if len(rest) != 1:
                raise ValueError(f"observation must be a dict with {rest}, got a {type(observation).__name__}")
            observation = {rest[0]: observation}
        shape: Any = self.observation_space.spaces[ACTION_MASK].shape
        entries, masks = sum(mask_sizes(self.action_space)), np.asarray(action_masks)
        if masks.size % entries:
            raise ValueError(
                f"the action mask has the shape {masks.shape}, and {self.action_space} needs {entries} entries "
                "for each observation"
            )
        masks = masks.reshape(shape) if masks.size == entries else masks.reshape(-1, *shape)
        return {**observation, ACTION_MASK: masks}


class MaskableActorCriticCnnPolicy(MaskableActorCriticPolicy, ActorCriticCnnPolicy):
    """`MaskableActorCriticPolicy` for images."""


class MaskableMultiInputActorCriticPolicy(MaskableActorCriticPolicy, MultiInputActorCriticPolicy):
    """`MaskableActorCriticPolicy` for observations with several parts."""

    takes_dict = True


# Which policy, and which environments --------------------------------------------------------------------------------

_MASKED: dict[Any, type[MaskableActorCriticPolicy]] = {
    ActorCriticPolicy: MaskableActorCriticPolicy,
    ActorCriticCnnPolicy: MaskableActorCriticCnnPolicy,
    MultiInputActorCriticPolicy: MaskableMultiInputActorCriticPolicy,
}


def with_masks(env: VecEnv, policy: type[Any]) -> VecEnv:
    """The environments as policies of this class take them: in `ActionMasks`, if it is one that takes masks."""
    if not issubclass(policy, MaskableActorCriticPolicy) or is_vecenv_wrapped(env, ActionMasks):
        return env
    return ActionMasks(env)


class TakesMasks(OnPolicyAlgorithm):
    """An algorithm whose policies take the masks that its environments give."""

    policy_class: type[Any]
    deployed_policy: Any

    def _matched(self, policy: Any, env: GymEnv | str | None, verbose: int) -> tuple[Any, Any]:
        """The policy, with masks where the environments give them, and the environments as it takes them."""
        if env is None:
            return policy, None
        venv = self._wrap_env(maybe_make_env(env, verbose), verbose)
        known = self.policy_aliases.get(policy) if isinstance(policy, str) else policy
        if isinstance(policy, str) and known in _MASKED and gives_masks(venv):  # a class is taken at its word
            policy = known = _MASKED[known]
        if isinstance(known, type) and issubclass(known, MaskableActorCriticPolicy):
            return policy, with_masks(venv, known)
        recurrent = isinstance(known, type) and issubclass(known, RecurrentPolicy)
        inside = ACTION_MASK in getattr(venv.observation_space, "spaces", {})  # which a policy may read by itself
        if known is not AfterstatePolicy and (recurrent or not inside) and gives_masks(venv):
            warnings.warn(
                f"the environments give action masks, which {policy!r} does not take: it may choose what is "
                'forbidden. Take "MlpPolicy" by its name, or a subclass of agents.masks.MaskableActorCriticPolicy',
                stacklevel=4,
            )
        return policy, venv

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """As Stable-Baselines3's; with their masks, if the policy takes them."""
        super().set_env(with_masks(self._wrap_env(env, self.verbose), self.policy_class), force_reset)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> Any:
        """As Stable-Baselines3's; a policy with masks takes them from the observation, or from ``action_masks``.

        Raises:
            ValueError: if masks are given to a policy that takes none; else as `MaskableActorCriticPolicy.predict`.
        """
        if action_masks is None:
            return self.deployed_policy.predict(observation, state, episode_start, deterministic)
        if not isinstance(self.deployed_policy, MaskableActorCriticPolicy):
            raise ValueError(
                f"action_masks were given, and the policy {type(self.policy).__name__} takes none: it was made for "
                "environments without them"
            )
        return self.deployed_policy.predict(observation, state, episode_start, deterministic, action_masks)
