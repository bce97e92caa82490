"""An agent's `predict` as one module: raw observations in, actions for the environment out.

What an agent does around its network is in the module: the statistics of VecNormalize, the order of an image's axes,
one-hot codes, the mode of the distribution or a draw from it, clipping to the action space or its scale after tanh.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecCheckNan, VecEnv, VecEnvWrapper, VecMonitor, VecTransposeImage
from stable_baselines3.common.vec_env import VecNormalize as AnyVecNormalize
from torch import Tensor, nn

from agents.average import acting_policy
from agents.distributions import SquashedGaussian
from agents.heads import ActorHead
from agents.masks import MaskableActorCriticPolicy
from agents.recurrent import RecurrentPolicy
from agents.saved import saved_values
from envs import ActionMasks, VecNormalize, Watchdog
from envs.episodes import EpisodeWriter
from envs.hybrid import is_hybrid
from envs.masks import ACTION_MASK, mask_sizes, with_one_allowed
from npg import families

__all__ = ["DeployedPolicy", "ExportError", "generators_kept", "steps_between"]

_CHANGING = (VecTransposeImage, AnyVecNormalize, VecNormalize, ActionMasks)  # what these do to observations is known
_PASSING = (
    VecMonitor,
    VecCheckNan,
    EpisodeWriter,
    Watchdog,
)  # these leave observations and actions as they are
_SAMPLED = (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
)


class ExportError(ValueError):
    """An agent that cannot be exported as it is asked for; the message says what of it, and what to do."""


# What an observation goes through ------------------------------------------------------------------------------------


class _Normalize(nn.Module):
    """VecNormalize's (x − m)/√(v + ε), clipped.

    With m in two parts, m = h + l in float32, (x − h) − l keeps the digits that float32 would lose in x − m where m is
    large against the deviation; the file then needs no float64, which few runtimes beside the CPU's have.
    """

    high: Tensor
    low: Tensor
    scale: Tensor

    def __init__(self, mean: NDArray[Any], variance: NDArray[Any], epsilon: float, clip: float, dtype: Any) -> None:
        super().__init__()
        # Integers of more than 16 bits, and float64, are computed with as VecNormalize does.
        self.dtype = torch.float32 if np.can_cast(dtype, np.float32) else torch.float64
        exact, high = torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(mean, dtype=self.dtype)
        self.register_buffer("high", high)
        self.register_buffer("low", (exact - high.double()).to(self.dtype))
        self.register_buffer("scale", torch.as_tensor(1 / np.sqrt(variance + epsilon), dtype=self.dtype))
        self.clip = float(clip)

    def forward(self, x: Tensor) -> Tensor:
        return (((x.to(self.dtype) - self.high) - self.low) * self.scale).clamp(-self.clip, self.clip).float()


class _ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


def steps_between(env: VecEnv | None, bare: VecEnv | None) -> tuple[VecEnv | None, list[VecEnvWrapper]]:
    """The environments whose observations are raw, and what changes these on their way to the policy, in order."""
    steps: list[VecEnvWrapper] = []
    while isinstance(env, VecEnvWrapper) and env is not bare:
        if type(env) in _CHANGING:
            steps.insert(0, env)
        elif type(env) not in _PASSING:
            inner = _wrappers(env)  # itself too, where it is a VecNormalize of one's own
            if not any(e is bare if bare is not None else isinstance(e, AnyVecNormalize) for e in inner):
                break  # what is inside of all statistics is the environment
            raise ExportError(
                f"{type(env).__name__} cannot be exported: it is not VecNormalize itself, and not inside of it. Put it "
                "inside, next to the environment"
            )
        env = env.venv
    if bare is not None and env is not bare:
        raise ExportError(f"env={bare!r} is not one that the agent's environments are made of: give one of these")
    return env, steps


def _with_mask(raw: spaces.Space[Any], steps: list[VecEnvWrapper]) -> spaces.Space[Any]:
    """The space of raw observations, with the mask that an `ActionMasks` adds to them."""
    for step in steps:
        if isinstance(step, ActionMasks):
            parts = raw.spaces if isinstance(raw, spaces.Dict) else {"observation": raw}
            raw = spaces.Dict({**parts, ACTION_MASK: cast(spaces.Dict, step.observation_space).spaces[ACTION_MASK]})
    return raw


def _pipeline(raw: spaces.Space[Any], steps: list[VecEnvWrapper]) -> list[list[nn.Module]]:
    """The modules that each part of a raw observation goes through."""
    names: Sequence[str | None] = _names(raw) or [None]
    modules: dict[str | None, list[nn.Module]] = {name: [] for name in names}
    alone = "observation" if isinstance(raw, spaces.Dict) else None  # what is all that steps inside of ActionMasks see
    for step in steps:
        if isinstance(step, VecTransposeImage):
            several = isinstance(step.observation_space, spaces.Dict)
            for key in [] if step.skip else (step.image_space_keys if several else [alone]):
                modules[key].append(_ChannelsFirst())
        elif isinstance(step, AnyVecNormalize) and step.norm_obs:
            rms = step.obs_rms if isinstance(step.obs_rms, dict) else {alone: step.obs_rms}
            for key, moments in rms.items():
                part = raw if key is None else cast(spaces.Dict, raw).spaces[key]
                modules[key].append(_Normalize(moments.mean, moments.var, step.epsilon, step.clip_obs, part.dtype))
    return list(modules.values())


def _names(space: spaces.Space[Any]) -> list[str] | None:
    return list(space.spaces) if isinstance(space, spaces.Dict) else None


@contextmanager
def generators_kept() -> Iterator[None]:
    """The global random numbers go on as if nothing had been drawn or seeded in the block."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _wrappers(env: VecEnv) -> Iterator[VecEnv]:
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv
    yield env


# The policy ----------------------------------------------------------------------------------------------------------


class DeployedPolicy(nn.Module):
    """An agent's `predict` as a module: raw observations, one tensor (N, …) for each part, ↦ actions (N, …).

    The parts of a Dict come in the order of ``inputs``. With gSDE a sampled action is drawn anew from its own
    distribution in each call, while in training the noise of some steps is one.

    Args:
        agent: with an actor-critic policy, in the environments whose VecNormalize is meant. It is not changed.
        env: the environments whose observations are raw; by default what is inside VecNormalize and the transposition
            of images.
        deterministic: whether to act by the mode of the policy, or by a sample.

    Attributes:
        inputs: the names of the parts of an observation; of one that is no Dict, ``observation``.
        observation_space: of the raw observations.
        keys: of a Dict observation; None of another one.

    Raises:
        ExportError: for what cannot be exported.
    """

    low: Tensor
    high: Tensor

    def __init__(self, agent: BaseAlgorithm, env: VecEnv | None = None, deterministic: bool = True) -> None:
        super().__init__()
        if not isinstance(agent.policy, ActorCriticPolicy):
            raise ExportError(f"only actor-critic policies can be exported, got {type(agent.policy).__name__}")
        if isinstance(agent.policy, RecurrentPolicy):
            raise ExportError(
                f"{type(agent.policy).__name__} cannot be exported: its actions depend on what it remembers. Load the "
                "saved model, and give `predict` its state"
            )
        if is_hybrid(agent.policy.action_space):
            raise ExportError(
                f"{type(agent.policy).__name__} cannot be exported: its actions have several parts, and a file gives "
                "one array. Load the saved model, and take the actions of `predict`"
            )
        inner, steps = steps_between(agent.get_env(), env)
        raw = agent.observation_space if inner is None else inner.observation_space
        self.observation_space = deepcopy(_with_mask(raw, steps))
        modules = _pipeline(self.observation_space, steps)
        self.parts = nn.ModuleList(nn.Sequential(*part) for part in modules)
        self.keys = _names(self.observation_space)
        self.inputs = self.keys or ["observation"]
        with generators_kept(), io.BytesIO() as buffer:  # a copy on the CPU, by what it would be saved as
            agent.save(buffer)
            buffer.seek(0)
            own = {name: vars(agent)[name] for name in saved_values(buffer)}
            copy = type(agent).load(buffer, device="cpu", custom_objects=own)
        self.policy = cast(ActorCriticPolicy, acting_policy(copy))
        self.policy.set_training_mode(False)
        self.policy.requires_grad_(False)
        self.deterministic = deterministic
        if not deterministic:
            self._look()
        if isinstance(space := self.policy.action_space, spaces.Box):
            self.register_buffer("low", _rounded(space.low, up=True))
            self.register_buffer("high", _rounded(space.high, up=False))

    def _look(self) -> None:
        policy = self.policy
        with torch.no_grad():
            example = self._observation([torch.as_tensor(x) for x in self.example(2)])
            distribution = policy.get_distribution(example)
        own = type(policy)._predict is not ActorCriticPolicy._predict or "_predict" in vars(policy)
        if own or type(distribution) not in _SAMPLED:
            raise ExportError(
                f"samples of {type(distribution).__name__} in {type(policy).__name__} cannot be exported, only those "
                "of Stable-Baselines3's own distributions: export deterministic actions"
            )
        self.head = ActorHead(policy)
        self.head.look(example)

    def example(self, n: int, seed: int = 0) -> list[NDArray[Any]]:
        """``n`` observations drawn from the space, as arrays in the order of ``inputs``; masks allow an action."""
        self.observation_space.seed(seed)
        drawn: list[Any] = [self.observation_space.sample() for _ in range(n)]
        if self.keys is None:
            return [np.stack([np.asarray(x) for x in drawn])]
        parts = {key: np.stack([np.asarray(x[key]) for x in drawn]) for key in self.keys}
        if isinstance(self.policy, MaskableActorCriticPolicy):
            masks = parts[ACTION_MASK]
            allowed = with_one_allowed(np.round(masks).reshape(n, -1), mask_sizes(self.policy.action_space))
            parts[ACTION_MASK] = allowed.reshape(masks.shape).astype(masks.dtype)
        return list(parts.values())

    def _observation(self, parts: Sequence[Tensor]) -> Any:
        seen = [pipeline(x) for pipeline, x in zip(self.parts, parts)]
        return seen[0] if self.keys is None else dict(zip(self.keys, seen))

    def forward(self, *observations: Tensor) -> Tensor:
        """Raw observations ↦ actions: float32 for a Box of any dtype, and otherwise of the dtype of `predict`'s."""
        policy, seen = self.policy, self._observation(observations)
        if self.deterministic:
            actions = policy._predict(seen, deterministic=True)
        else:
            actions = _draw(self.head.family, self.head(self.head.prepare(seen)))
        actions = actions.reshape(-1, *cast(tuple[int, ...], policy.action_space.shape))
        if not isinstance(policy.action_space, spaces.Box):
            return actions
        if policy.squash_output:
            actions = self.low + 0.5 * (actions + 1.0) * (self.high - self.low)
        return torch.minimum(torch.maximum(actions, self.low), self.high)


def _rounded(bounds: NDArray[Any], *, up: bool) -> Tensor:
    """Bounds as float32, on the inner side of theirs: the nearest to 0.1 is above it, and no action of the space."""
    with np.errstate(over="ignore"):
        nearest = bounds.astype(np.float32)
    outside, inwards = (nearest < bounds, np.inf) if up else (nearest > bounds, -np.inf)
    return torch.as_tensor(np.where(outside, np.nextafter(nearest, np.float32(inwards)), nearest))


def _draw(family: families.Family, outputs: Tensor) -> Tensor:
    """A sample by `rand_like` and `randn_like` alone, which every format has."""
    if isinstance(family, families.MultiCategorical):
        return torch.stack([_draw(families.Categorical(), part) for part in outputs.split(family.sizes, -1)], -1)
    if isinstance(family, families.Categorical):  # the largest of logits with Gumbel's noise
        u = torch.rand_like(outputs).clamp(2.0**-126, 1 - 2.0**-24)  # some runtimes return 1 now and then
        return (outputs - torch.log(-torch.log(u))).argmax(-1)
    if isinstance(family, families.Bernoulli):
        return (torch.rand_like(outputs) < outputs.sigmoid()).to(outputs.dtype)
    mean, log_std = outputs.chunk(2, -1)
    actions = mean + log_std.exp() * torch.randn_like(mean)
    return actions.tanh() if isinstance(family, SquashedGaussian) else actions
