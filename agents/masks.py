"""Policies that never take a forbidden action: the mask of the observation becomes a part of their logits.

The mask goes through the network beside the features. Stable-Baselines3's own forward passes then give masked logits,
in which a forbidden action has a constant that no parameter moves: acting, log-likelihood, KL, entropy, Fisher and
evaluation all follow from the same outputs, and none of them knows of masks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.vec_env import VecEnv, is_vecenv_wrapped
from torch import Tensor, nn

from agents.afterstate import AfterstatePolicy
from agents.hybrid import HybridActorCriticCnnPolicy, HybridActorCriticPolicy, HybridMultiInputActorCriticPolicy
from agents.recurrent import RecurrentPolicy
from envs.checks import LARGEST, check_arrays
from envs.hybrid import HybridActions, is_hybrid, leaves
from envs.make import as_vec_envs_take
from envs.masks import ACTION_MASK, ActionMasks, check_mask_space, check_masks, gives_masks, mask_sizes

__all__ = [
    "MaskableActorCriticCnnPolicy",
    "MaskableActorCriticPolicy",
    "MaskableMultiInputActorCriticPolicy",
    "MaskedFeatures",
    "MaskedLatent",
    "MaskedLogits",
    "TakesStructures",
    "as_taken",
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
        net: latent features ↦ logits of classes, then of bits, then outputs that know no masks.
        classes: how many logits of classes there are, with one entry of a mask each.
        bits: how many of bits, with two entries each: may it be 0, may it be 1.
        order: of the entries, where those of the bits do not come last: parts that they are to be put together of.
    """

    def __init__(self, net: nn.Module, classes: int, bits: int, order: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__()
        self.net, self.classes, self.bits, self.order = net, classes, bits, tuple(order)
        self.entries = classes + 2 * bits

    def forward(self, latent: Tensor) -> Tensor:
        """Latent features and mask ↦ logits."""
        logits, forbidden = self.net(latent[..., : -self.entries]), latent[..., -self.entries :] < 0.5
        if self.order:
            forbidden = torch.cat([forbidden[..., begin:end] for begin, end in self.order], -1)
        last = self.classes + self.bits
        masked = []
        if self.classes:
            masked.append(logits[..., : self.classes].masked_fill(forbidden[..., : self.classes], -LARGEST))
        if self.bits:
            zero, one = forbidden[..., self.classes :].unflatten(-1, (-1, 2)).unbind(-1)
            bits = logits[..., self.classes : last]
            masked.append(bits.masked_fill(zero, LARGEST).masked_fill(one, -LARGEST))
        return torch.cat([*masked, logits[..., last:]], -1) if len(masked) > 1 or logits.shape[-1] > last else masked[0]


def _masked_logits(net: nn.Module, space: spaces.Space[Any]) -> MaskedLogits:
    """`MaskedLogits` of these actions."""
    parts = [part for _, part in leaves(getattr(space, "nested", space)) if not isinstance(part, spaces.Box)]
    ends = np.cumsum([sum(mask_sizes(part)) for part in parts]).tolist()
    where = list(zip([0, *ends], ends))
    bits = [isinstance(part, spaces.MultiBinary) for part in parts]
    order = [where[i] for i in sorted(range(len(parts)), key=bits.__getitem__)]
    n = sum(end - begin for (begin, end), bit in zip(where, bits) if bit)
    return MaskedLogits(net, sum(mask_sizes(space)) - n, n // 2, () if order == where else order)


# The policies --------------------------------------------------------------------------------------------------------


class MaskableActorCriticPolicy(HybridActorCriticPolicy):
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
        self.action_net = _masked_logits(self.action_net, self.action_space)
        self.mlp_extractor = MaskedLatent(self.mlp_extractor, self.action_net.entries)  # type: ignore[assignment]

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
        name = next(name for name in self.observation_space.spaces if name != ACTION_MASK)
        one, seen = prod(self.observation_space.spaces[name].shape or ()), np.shape(observation[name])
        if (given := masks.size // entries) * one != prod(seen):
            raise ValueError(
                f"the action mask has the shape {masks.shape}, which is {given} of {self.action_space}, and {name!r} "
                f"the shape {seen}: each observation needs one mask"
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


_HYBRID: dict[Any, type[HybridActorCriticPolicy]] = {
    ActorCriticPolicy: HybridActorCriticPolicy,
    ActorCriticCnnPolicy: HybridActorCriticCnnPolicy,
    MultiInputActorCriticPolicy: HybridMultiInputActorCriticPolicy,
}


def as_taken(env: VecEnv, policy: type[Any]) -> VecEnv:
    """The environments as policies of this class take them: in `ActionMasks` and `HybridActions`, if they need it."""
    if issubclass(policy, MaskableActorCriticPolicy) and not is_vecenv_wrapped(env, ActionMasks):
        env = ActionMasks(env)
    if issubclass(policy, HybridActorCriticPolicy) and isinstance(env.action_space, spaces.Tuple | spaces.Dict):
        env = HybridActions(env)
    return env


def made_env(env: Any, verbose: int = 0) -> Any:
    """The environment that ``env`` is, or whose id it is.

    Raises:
        TypeError: for anything else, and for a vector environment of Gymnasium.
    """
    made: Any = maybe_make_env(env, verbose)
    if isinstance(made, VectorEnv):
        raise TypeError(
            f"env is a vector environment of Gymnasium ({type(made.unwrapped).__name__}), where Stable-Baselines3 "
            "has its VecEnv: take envs.make_vec_env(env_id, n_envs), which uses the vector form of a task that has "
            "one"
        )
    old = any(base.__module__.partition(".")[0] == "gym" for base in type(made).__mro__)  # Stable-Baselines3 takes them
    if not (isinstance(made, gym.Env | VecEnv) or old):
        kinds = "an environment of Gymnasium, a VecEnv, or an id such as 'CartPole-v1'"
        if isinstance(made, type):
            remedy = f"give an object of the class, {made.__name__}(…), or envs.make_vec_env({made.__name__}, n_envs)"
        elif callable(made):
            remedy = "give what it makes, or envs.make_vec_env with it and n_envs"
        elif isinstance(made, list | tuple):
            remedy = "for several take envs.make_vec_env(env_id, n_envs), for one leave the brackets out"
        else:
            remedy = "take envs.make_vec_env(env_id, n_envs)"
        raise TypeError(f"env must be {kinds}, got {made!r} ({type(made).__name__}): {remedy}")
    return made


def _counts_otherwise(space: spaces.Space[Any]) -> bool:
    """Whether its numbers do not count from 0 along one axis."""
    start: Any = getattr(space, "start", 0)
    return bool(np.any(start != 0) or np.ndim(start) > 1)


class TakesStructures(OnPolicyAlgorithm):
    """An algorithm whose policies take the masks that its environments give, and actions of several parts."""

    policy_class: type[Any]
    deployed_policy: Any

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """As Stable-Baselines3 does; an environment that may reuse its memory in a wrapper that copies what is kept."""
        env = as_vec_envs_take(env) if isinstance(env, gym.Env) else env
        return BaseAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def _matched(self, policy: Any, env: GymEnv | str | None, verbose: int) -> tuple[Any, Any]:
        """The policy, for the masks and the actions that the environments have, and the environments as it takes them.

        Raises:
            TypeError: for what is no environment, and for a vector environment of Gymnasium.
            ValueError: if the actions are of several parts, and the policy takes one; or of one that does not count
                from 0 along one axis, or a Box of whole numbers or without bounds. If observations are a Tuple; or if
                they, or a part of a Dict of them, do not count so, have no axis or no numbers, or are no arrays.
        """
        if env is None:
            return policy, None
        made = made_env(env, verbose)
        check_arrays(made.observation_space, "the environments")
        if isinstance(made.observation_space, spaces.Tuple):
            raise ValueError(
                f"the environments have the observations {made.observation_space}, and policies take no Tuple: make it "
                'a Dict, for "MultiInputPolicy", or wrap the environment in gymnasium.wrappers.FlattenObservation'
            )
        venv = self._wrap_env(made, verbose)
        if _counts_otherwise(venv.action_space):
            raise ValueError(
                f"the environments have the actions {venv.action_space}, which Stable-Baselines3's policies would take "
                "to count from 0 along one axis: make it a Tuple of this one part, which is given right"
            )
        actions: Any = venv.action_space
        if isinstance(actions, spaces.Box) and actions.dtype.kind != "f":
            raise ValueError(
                f"the environments have the actions {actions}, whole numbers, of which policies would give fractions: "
                "take MultiDiscrete, or a Box of floating point that the environment rounds"
            )
        if isinstance(actions, spaces.Box) and not np.isfinite([actions.low, actions.high]).all():
            raise ValueError(
                f"the environments have the actions {actions}, which are not bounded: give them finite bounds; or make "
                "it a Tuple of this one part, whose bounds are then those of float32"
            )
        seen: Any = venv.observation_space
        for name, part in (seen.spaces if isinstance(seen, spaces.Dict) else {"": seen}).items():
            if _counts_otherwise(part):
                of = f" for {name!r}" if name else ""
                raise ValueError(
                    f"the environments have the observations {part}{of}, which Stable-Baselines3's policies would take "
                    "to count from 0 along one axis: let the environment subtract the start, and flatten them"
                )
            if isinstance(part, spaces.Box) and part.shape == ():
                of = f" for {name!r}" if name else ""
                raise ValueError(
                    f"the environments have the observations {part}{of}, single numbers without an axis, which "
                    "policies do not take: give the space and what the environment returns the shape (1,)"
                )
            if isinstance(part, spaces.Box) and 0 in part.shape:
                of = f" for {name!r}" if name else ""
                remedy = "leave this part out" if name else "give one number at least, such as a constant"
                raise ValueError(f"the environments have the observations {part}{of}, which hold no numbers: {remedy}")
        known = self.policy_aliases.get(policy) if isinstance(policy, str) else policy
        if isinstance(policy, str) and known in _MASKED and gives_masks(venv):  # a class is taken at its word
            policy = known = _MASKED[known]
        if is_hybrid(venv.action_space) and isinstance(known, type):
            if isinstance(policy, str) and known in _HYBRID:
                policy = known = _HYBRID[known]
            if not issubclass(known, HybridActorCriticPolicy):
                raise ValueError(
                    f"the environments have the actions {venv.action_space}, which {policy!r} does not take: take "
                    '"MlpPolicy" by its name, or a subclass of agents.hybrid.HybridActorCriticPolicy'
                )
        if isinstance(known, type):
            venv = as_taken(venv, known)
            if issubclass(known, MaskableActorCriticPolicy):
                return policy, venv
        recurrent = isinstance(known, type) and issubclass(known, RecurrentPolicy)
        inside = ACTION_MASK in getattr(venv.observation_space, "spaces", {})  # which a policy may read by itself
        if known is not AfterstatePolicy and (recurrent or not inside) and gives_masks(venv):
            warnings.warn(
                f"the environments give action masks, which {policy!r} does not take: it may choose what is "
                'forbidden. Take "MlpPolicy" by its name, or a subclass of agents.masks.MaskableActorCriticPolicy',
                stacklevel=4,
            )
        return policy, venv

    def set_env(self, env: GymEnv | str, force_reset: bool = True) -> None:
        """As Stable-Baselines3's, or by an id; with their masks, if the policy takes them.

        Raises:
            TypeError: for what is no environment.
        """
        made = self._wrap_env(made_env(env, self.verbose), self.verbose)
        super().set_env(as_taken(made, self.policy_class), force_reset)

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
