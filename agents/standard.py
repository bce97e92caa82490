"""What of a policy is Stable-Baselines3's or PyTorch's own, so that it may be composed from parts, or traced.

Only exact types count: a subclass, a method patched on the object, a hook or a tensor of another type is a user's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from torch import Tensor, nn

from agents.afterstate import AfterstatePolicy, Afterstates
from agents.buffer import rows
from agents.distributions import FAMILIES
from agents.hybrid import HybridActorCriticCnnPolicy, HybridActorCriticPolicy, HybridMultiInputActorCriticPolicy
from agents.masks import (
    MaskableActorCriticCnnPolicy,
    MaskableActorCriticPolicy,
    MaskableMultiInputActorCriticPolicy,
    MaskedFeatures,
    MaskedLatent,
    MaskedLogits,
)
from npg.model import Buffers
from npg.randomness import separate_randomness

__all__ = ["GLOBAL_HOOKS", "MODED", "aside", "chooses", "is_known", "is_own", "is_standard", "telling"]

# What Stable-Baselines3's own policies do; where a user's does another thing, that is asked and nothing composed.
_OWN = {
    name: getattr(ActorCriticPolicy, name)
    for name in (
        "__call__",
        "forward",
        "extract_features",
        "get_distribution",
        "predict_values",
        "evaluate_actions",
        "_get_action_dist_from_latent",
    )
}

# The modules that programs are made of: what they compute is known whole, and it is all that they do.
_KNOWN = {
    ActorCriticPolicy,
    ActorCriticCnnPolicy,
    MultiInputActorCriticPolicy,
    HybridActorCriticPolicy,
    HybridActorCriticCnnPolicy,
    HybridMultiInputActorCriticPolicy,
    MaskableActorCriticPolicy,
    MaskableActorCriticCnnPolicy,
    MaskableMultiInputActorCriticPolicy,
    MaskedFeatures,
    MaskedLatent,
    MaskedLogits,
    AfterstatePolicy,
    Afterstates,
    MlpExtractor,
    FlattenExtractor,
    NatureCNN,
    CombinedExtractor,
    nn.Sequential,
    nn.ModuleDict,
    nn.Identity,
    nn.Flatten,
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.LayerNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardswish),
}

MODED = (nn.BatchNorm1d, nn.BatchNorm2d)  # those of them that do another thing in training

_PACKAGES = {"agents", "stable_baselines3", "torch"}  # none of their modules goes another way for other observations

GLOBAL_HOOKS = [nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks]


def _shadowed(thing: Any) -> bool:
    """Whether an attribute of the object itself hides a method of its class: patched by hand, or by a mock."""
    return any(callable(getattr(type(thing), name, None)) for name in vars(thing))


def is_own(policy: ActorCriticPolicy, name: str) -> bool:
    """Whether this method is Stable-Baselines3's."""
    return getattr(type(policy), name) is _OWN[name] and name not in vars(policy)


def is_standard(policy: ActorCriticPolicy) -> bool:
    """Whether the forward passes are Stable-Baselines3's own, so that they may be composed from the parts.

    Raises:
        TypeError: for what `torch.compile` made of a policy.
    """
    if hasattr(policy, "_orig_mod"):
        raise TypeError(
            "policy is what torch.compile made of a policy, which hides its methods: write policy.compile() in the "
            "place of policy = torch.compile(policy)"
        )
    return (
        all(is_own(policy, name) for name in _OWN)
        and type(policy.action_dist) in FAMILIES
        and not any(_shadowed(part) for part in (policy, policy.action_dist, policy.mlp_extractor))
    )


def _untouched(module: nn.Module) -> bool:
    return not (_shadowed(module) or module._forward_hooks or module._forward_pre_hooks)


def is_known(policy: ActorCriticPolicy) -> bool:
    """Whether a forward pass does nothing but to compute what a program of it computes, at any later time as well."""
    tensors = (*policy.parameters(), *policy.buffers())
    return (
        all(type(module) in _KNOWN and _untouched(module) for module in policy.modules())
        and not any(GLOBAL_HOOKS)
        and all(type(tensor) in (nn.Parameter, Tensor) for tensor in tensors)
    )


def telling(policy: ActorCriticPolicy, observations: Any) -> Any:
    """As many rows of a rollout as tell what a forward pass depends on.

    The first one; or all, where a module of one's own may choose another way for other observations.
    """
    return rows(observations, slice(None if chooses(policy) else 1))


def chooses(policy: ActorCriticPolicy) -> bool:
    """Whether a forward pass may depend on other parameters for other observations: it has modules of one's own."""
    return any(GLOBAL_HOOKS) or not all(
        type(module).__module__.split(".")[0] in _PACKAGES and _untouched(module) for module in policy.modules()
    )


@contextmanager
def aside(policy: ActorCriticPolicy) -> Iterator[None]:
    """Forward passes that are asked for beside the acting leave buffers, distribution and generators as they were."""
    buffers, distribution = Buffers(policy), vars(policy.action_dist)
    before = dict(distribution)
    try:
        with separate_randomness(policy.device):
            yield
    finally:
        buffers.restore()
        distribution.clear()
        distribution.update(before)
