"""An actor-critic policy of Stable-Baselines3 seen as two networks with predictive distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import mse_loss

from npg import families
from npg.linearize import by_slot
from npg.program import staged

__all__ = ["ActorHead", "CriticHead"]

_OVERRIDABLE = ("extract_features", "get_distribution", "predict_values", "_get_action_dist_from_latent")


def _is_standard(policy: ActorCriticPolicy) -> bool:
    """Whether the forward passes are Stable-Baselines3's own, so that they may be composed from the parts."""
    return all(getattr(type(policy), name) is getattr(ActorCriticPolicy, name) for name in _OVERRIDABLE)


class _Head(nn.Module):
    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.policy = policy
        self.standard = _is_standard(policy)
        self._programs: dict[Any, Any] = {}

    def prepare(self, observations: Any) -> Any:
        """What ``forward`` takes, from raw observations; done once per batch and not once per forward pass."""
        if not self.standard:
            return observations
        return preprocess_obs(
            observations, self.policy.observation_space, normalize_images=self.policy.normalize_images
        )

    def _tensors(self) -> dict[str, Tensor]:
        return dict(chain(self.named_parameters(), self.named_buffers()))

    def _program(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        agrees: Callable[[Callable[..., Sequence[Tensor]]], bool],
        *,
        at_rest: bool,
    ) -> Callable[..., Sequence[Tensor]] | None:
        """`npg.program.staged` of a function of this head's tensors, for `functional_call`, and of ``inputs``.

        The tensors stay ``at_rest``, or change between calls. A program is kept for shapes like these, and traced anew
        where it no longer ``agrees``; None where there can be none.
        """
        named = self._tensors()
        tensors = [t.detach() for t in named.values()]
        key = (at_rest, *((t.shape, t.dtype, t.device) for t in (*tensors, *inputs)))

        def functional(*values: Tensor) -> Sequence[Tensor]:
            return function(by_slot(self, dict(zip(named, values))), *values[len(named) :])

        for fresh in (False, True):
            if key not in self._programs:
                fresh = True
                try:
                    self._programs[key] = staged(
                        functional, *((tensors, inputs) if at_rest else ([], [*tensors, *inputs]))
                    )
                except Exception:  # what looks at values cannot be traced
                    self._programs[key] = None
            if self._programs[key] is None:
                break
            run = self._programs[key](tensors) if at_rest else partial(self._programs[key]([]), *tensors)
            if agrees(run):
                return torch.no_grad()(run)
            self._programs.pop(key)
            if fresh:
                self._programs[key] = None
        return None

    def own_parameters(self, observations: Any) -> dict[str, nn.Parameter]:
        """The trainable parameters that the outputs depend on, by asking the graph of one forward pass."""
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            outputs = self(self.prepare(observations))
        if not outputs.requires_grad:
            return {}
        gradients = torch.autograd.grad(outputs.sum(), list(named.values()), allow_unused=True)
        return {name: p for (name, p), g in zip(named.items(), gradients) if g is not None}


class ActorHead(_Head):
    """The actor: observations ↦ the parameters of its action distribution, and the family they belong to.

    Raises:
        NotImplementedError: for an action distribution that is not one of Stable-Baselines3's.
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__(policy)
        self.family = self._family(policy.action_dist)
        self.squashed = bool(getattr(policy.action_dist, "squash_output", False))

    @staticmethod
    def _family(distribution: Distribution) -> families.Family:
        if isinstance(distribution, (DiagGaussianDistribution, StateDependentNoiseDistribution)):
            return families.DiagonalGaussian()
        if isinstance(distribution, CategoricalDistribution):
            return families.Categorical()
        if isinstance(distribution, MultiCategoricalDistribution):
            return families.MultiCategorical([int(n) for n in distribution.action_dims])
        if isinstance(distribution, BernoulliDistribution):
            return families.Bernoulli()
        raise NotImplementedError(
            f"policy has the action distribution {type(distribution).__name__}; known are the diagonal Gaussian, gSDE, "
            "Categorical, MultiCategorical and Bernoulli ones of Stable-Baselines3"
        )

    def forward(self, prepared: Any) -> Tensor:
        """Prepared observations ↦ outputs (N, D)."""
        policy = self.policy
        if self.standard and not isinstance(policy.action_dist, StateDependentNoiseDistribution):
            latent = policy.mlp_extractor.forward_actor(policy.pi_features_extractor(prepared))
            outputs = policy.action_net(latent)
            if isinstance(policy.action_dist, DiagGaussianDistribution):
                return torch.cat([outputs, policy.log_std.expand_as(outputs)], -1)
            return outputs
        # Argument checks look at values, which a traced program cannot; `natural_step` refuses what is not finite.
        validate = torch.distributions.Distribution._validate_args
        torch.distributions.Distribution.set_default_validate_args(False)
        try:
            if self.standard:
                latent = policy.mlp_extractor.forward_actor(policy.pi_features_extractor(prepared))
                distribution = policy._get_action_dist_from_latent(latent)
            else:
                distribution = policy.get_distribution(prepared)
        finally:
            torch.distributions.Distribution.set_default_validate_args(validate)
        p = distribution.distribution
        if isinstance(p, torch.distributions.Normal):
            return torch.cat([p.mean, p.stddev.log()], -1)
        return torch.cat([c.logits for c in p], -1) if isinstance(p, list) else p.logits

    def acting(self, observations: Any) -> Callable[[Any], Sequence[Tensor]]:
        """``observations ↦ sampled actions, outputs``, for batches like this one and the parameters as they are now.

        Modules take longer over a few rows than the arithmetic in them. So this is a traced program where there can be
        one, and after it was seen to give the network's outputs on this batch. It draws the same random numbers.
        """

        def by_modules(observations: Any) -> Sequence[Tensor]:
            outputs = self(self.prepare(observations))
            return self.family.sample(outputs), outputs

        if not isinstance(observations, Tensor):
            return by_modules

        def functional(slots: dict[str, Tensor], observations: Tensor) -> list[Tensor]:
            outputs = functional_call(self, slots, self.prepare(observations), tie_weights=False)
            return [self.family.sample(outputs), outputs]

        with torch.no_grad(), torch.random.fork_rng([observations.device] if observations.is_cuda else []):
            expected = self(self.prepare(observations))
            run = self._program(
                functional, [observations], lambda run: _close(run(observations)[1:], [expected]), at_rest=True
            )
        return run or by_modules

    def targets(self, actions: Tensor) -> Tensor:
        """Stored actions (N, …) in the form that the family takes."""
        if isinstance(self.family, families.Categorical):
            return actions.long().flatten()
        if isinstance(self.family, families.MultiCategorical):
            return actions.long()
        if self.squashed:
            # The distribution of tanh(x) has the ratios, KL and metric of that of x.
            return torch.atanh(actions.clamp(-1 + 1e-6, 1 - 1e-6))
        return actions


class CriticHead(_Head):
    """The critic: observations ↦ values, the mean of a Gaussian over returns."""

    def forward(self, prepared: Any) -> Tensor:
        """Prepared observations ↦ values (N, 1)."""
        policy = self.policy
        if not self.standard:
            return policy.predict_values(prepared)
        return policy.value_net(policy.mlp_extractor.forward_critic(policy.vf_features_extractor(prepared)))

    def loss_and_gradients(
        self, parameters: Sequence[Tensor], prepared: Any, targets: Tensor
    ) -> Callable[[Any, Tensor], Sequence[Tensor]]:
        """``prepared observations, targets ↦ mean squared error and its gradients``, for mini-batches like this one.

        As a traced program where there can be one, after it was seen to agree with autograd on this mini-batch.
        """

        def by_autograd(prepared: Any, targets: Tensor) -> Sequence[Tensor]:
            loss = mse_loss(self(prepared).flatten(), targets)
            return loss.detach(), *torch.autograd.grad(loss, parameters)

        # A forward pass may move buffers, and the one that is compared with would move them again.
        if not isinstance(prepared, Tensor) or any(True for _ in self.buffers()):
            return by_autograd
        wanted = {id(p) for p in parameters}
        names = [name for name, p in self.named_parameters() if id(p) in wanted]

        def functional(slots: dict[str, Tensor], prepared: Tensor, targets: Tensor) -> list[Tensor]:
            def loss(trained: dict[str, Tensor]) -> Tensor:
                values = functional_call(self, {**slots, **trained}, prepared, tie_weights=False)
                return mse_loss(values.flatten(), targets)

            gradients, value = grad_and_value(loss)({name: slots[name] for name in names})
            return [value, *gradients.values()]

        expected = by_autograd(prepared, targets)
        run = self._program(
            functional, [prepared, targets], lambda run: _close(run(prepared, targets), expected), at_rest=False
        )
        return run or by_autograd


def _close(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are the same up to rounding, each relative to its largest element."""
    return all(
        x.shape == y.shape and bool((x - y).abs().amax() <= 1e-4 * y.abs().amax()) for x, y in zip(a, b, strict=True)
    )
