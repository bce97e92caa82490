"""An actor-critic policy of Stable-Baselines3 seen as two networks with predictive distributions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import mse_loss

from agents.distributions import FAMILIES, described, with_deviations
from agents.standard import GLOBAL_HOOKS, MODED, aside, is_known, is_own, is_standard
from npg import families
from npg.acceleration import accelerate_function, close
from npg.model import by_slot
from npg.parallel import mean_
from npg.randomness import separate_randomness

__all__ = ["ActorHead", "CriticHead"]


_Act = Callable[[Any], Sequence[Tensor]]


class _Head(nn.Module):
    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.policy = policy
        self.standard = is_standard(policy)
        self._watched: list[tuple[dict[str, Any], itemgetter[Any]]] = []
        self._seen: tuple[Any, ...] | None = None
        self._changes = 0  # how often it was seen to be another one

    def prepare(self, observations: Any) -> Any:
        """What ``forward`` takes, from raw observations; done once per batch and not once per forward pass."""
        if not self.standard:
            return observations
        return preprocess_obs(
            observations, self.policy.observation_space, normalize_images=self.policy.normalize_images
        )

    def _program(
        self,
        function: Callable[..., Sequence[Tensor]],
        named: dict[str, Tensor],
        inputs: Sequence[Tensor],
        agrees: Callable[[Callable[..., Sequence[Tensor]]], bool],
    ) -> Callable[..., Sequence[Tensor]] | None:
        """`npg.acceleration.accelerate_function` of a function of tensors by name, for `functional_call`, and inputs.

        The program takes the inputs; the tensors are taken as they are in each call. None where there can be none.
        """
        tensors = list(named.values())

        def functional(*values: Tensor) -> Sequence[Tensor]:
            return function(by_slot(self, dict(zip(named, values))), *values[len(named) :])

        program = accelerate_function(
            self,
            functional,
            [*(t.detach() for t in tensors), *inputs],
            lambda program: agrees(partial(program, *tensors)),
            self._changes,
        )
        return None if program is None else partial(program, *tensors)

    def _layers(self, latent: nn.Module) -> tuple[nn.Module, ...]:
        """Those of a standard policy that the outputs come out of, one behind the other."""
        raise NotImplementedError

    def _parts(self) -> list[nn.Module]:
        """All modules of a standard policy that the outputs come out of, itself first."""
        policy = self.policy
        latent = policy.mlp_extractor
        inner = chain.from_iterable(layer.modules() for layer in self._layers(latent))
        return list(dict.fromkeys([policy, latent, *inner]))

    def _watch(self, parts: list[nn.Module]) -> None:
        # What a forward pass reads beside values of tensors: attributes, children, parameters and hooks of its modules.
        policy = self.policy
        self._watched = [(vars(policy), itemgetter("action_dist", "observation_space", "normalize_images"))]
        for m in parts[1:]:
            unread = {"in_features", "out_features", *(() if isinstance(m, MODED) else ("training",))}
            if names := [name for name in vars(m) if not (name.startswith("_") or name in unread)]:
                self._watched.append((vars(m), itemgetter(*names)))
        self._sizes = [*map(vars, parts), vars(policy.action_dist)]
        slots = (d for m in parts for d in (m._modules, m._parameters, m._buffers) if d)
        self._slots: list[dict[str, Any]] = list(slots)
        self._hooks = [d for m in parts for d in (m._forward_hooks, m._forward_pre_hooks)] + GLOBAL_HOOKS
        self._of_head = parts
        held = [*chain.from_iterable(map(dict.values, self._slots))]
        seen = self._state()
        if self._seen not in (None, seen):  # the rows at hand may not show it: a program of before is none of this
            self._changes += 1
        self._held, self._seen = held, seen  # held alive, so that no other has its id

    def _state(self) -> tuple[Any, ...]:
        return (
            [*map(type, self._of_head)],
            [read(values) for values, read in self._watched],
            [*map(len, self._sizes)],  # an attribute more may hide a method
            [*map(id, chain.from_iterable(map(dict.values, self._slots)))],
            any(self._hooks),
        )

    def unchanged(self) -> bool:
        """Whether the network is the one that was seen last; the values of its parameters and buffers may differ."""
        return self._state() == self._seen

    def single(self, observations: Any) -> Any:
        """Raw observations, one of each environment, as a rollout has them."""
        return observations

    def own_parameters(
        self, observations: Any, known: Collection[str] = (), process_group: dist.ProcessGroup | None = None
    ) -> dict[str, nn.Parameter]:
        """The trainable parameters that the outputs depend on, by asking the graph of one forward pass.

        Args:
            observations: raw ones, as a rollout has them.
            known: names of parameters that belong to them anyhow.
            process_group: what the outputs depend on in one of its processes, belongs to them in all.
        """
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        others = {name: p for name, p in trained.items() if name not in known}
        with torch.enable_grad(), aside(self.policy):
            outputs = self(self.prepare(observations))
            if others and outputs.requires_grad:  # no backward is run where none of them is found
                gradients = torch.autograd.grad(outputs.sum(), list(others.values()), allow_unused=True)
                known = {*known, *(name for name, g in zip(others, gradients) if g is not None)}
        share = [float(name in known) for name in trained]  # of the processes
        if process_group is not None:
            share = mean_(torch.tensor(share, device=self.policy.device), process_group).tolist()
        return {name: p for (name, p), found in zip(trained.items(), share) if found}


def _by_dtype(dtype: torch.dtype, program: _Act, by_modules: _Act, observations: Tensor) -> Sequence[Tensor]:
    """By the program if it was made for these: a wrapper may give other numbers in a step than at the beginning."""
    return program(observations) if observations.dtype is dtype else by_modules(observations)


class ActorHead(_Head):
    """The actor: observations ↦ the parameters of its action distribution, and the family they belong to.

    Of a policy whose distribution or methods are its own, ``family`` is None until `look` has asked it.
    """

    family: families.Family

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__(policy)
        self.distribution = policy.action_dist
        known = FAMILIES.get(type(self.distribution)) if self.standard else None
        self.family = None if known is None else known(self.distribution)  # type: ignore[assignment]

    def look(self, observations: Any) -> None:
        """Find the family of a policy of one's own, from what it returns for real observations.

        Raises:
            NotImplementedError: for an action distribution of which the KL is not known.
        """
        if self.standard:
            return
        with torch.no_grad(), aside(self.policy):
            self.family, outputs = described(self.policy.get_distribution(observations))
        if outputs.ndim != 2:
            raise NotImplementedError(
                f"policy has the action distribution {type(self.policy.action_dist).__name__} with parameters of shape "
                f"{tuple(outputs.shape)}: they must be (observations, components)"
            )

    def forward(self, prepared: Any) -> Tensor:
        """Prepared observations ↦ outputs (N, D)."""
        policy = self.policy
        if self.standard:
            outputs = policy.action_net(policy.mlp_extractor.forward_actor(policy.pi_features_extractor(prepared)))
            return with_deviations(policy, self.distribution, outputs)
        # Argument checks look at values, which a traced program cannot; `natural_step` refuses what is not finite.
        validate = torch.distributions.Distribution._validate_args
        torch.distributions.Distribution.set_default_validate_args(False)
        try:
            return described(policy.get_distribution(prepared))[1]
        finally:
            torch.distributions.Distribution.set_default_validate_args(validate)

    def _layers(self, latent: nn.Module) -> tuple[nn.Module, ...]:
        return self.policy.pi_features_extractor, getattr(latent, "policy_net", latent), self.policy.action_net

    def acting(self, observations: Any) -> Callable[[Any], Sequence[Tensor]] | None:
        """``observations ↦ sampled actions, outputs``, for batches like this one and while the actor is `unchanged`.

        Modules take longer over a few rows than the arithmetic in them. So this is a traced program where there can be
        one, and after it was seen to give the network's outputs on this batch. It draws the same random numbers, and
        takes the parameters as they are in each call. None where only the policy itself knows all that it does in a
        forward pass: where a method, its distribution or a module is not Stable-Baselines3's or PyTorch's own. To be
        called without gradients.
        """
        policy = self.policy
        if not (self.standard and is_standard(policy) and policy.action_dist is self.distribution and is_known(policy)):
            return None
        parts = self._parts()
        if any(module.training for module in parts if isinstance(module, MODED)):
            return None
        if self._seen is None:  # a distribution gets attributes in its first use, which are no change
            with torch.no_grad():
                policy.get_distribution(observations)
        self._watch(parts)

        def by_modules(observations: Any) -> Sequence[Tensor]:
            outputs = self(self.prepare(observations))
            return self.family.sample(outputs), outputs

        if not isinstance(observations, Tensor):
            return by_modules
        owned = {id(t) for m in parts for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}
        named = {n: t for n, t in chain(self.named_parameters(), self.named_buffers()) if id(t) in owned}

        def functional(slots: dict[str, Tensor], observations: Tensor) -> list[Tensor]:
            outputs = functional_call(self, slots, self.prepare(observations), tie_weights=False)
            return [self.family.sample(outputs), outputs]

        with torch.no_grad(), separate_randomness(observations.device):
            expected = self(self.prepare(observations))
            run = self._program(functional, named, [observations], lambda run: close(run(observations)[1:], [expected]))
        if run is None:
            return by_modules
        return partial(_by_dtype, observations.dtype, run, by_modules)

    def check(self, observations: Any, actions: Tensor) -> None:
        """Refuse a policy whose own log-likelihood is not its family's, up to a function of the action.

        Only ratios count (`in_units_of_family`), so the derivatives in the parameters are compared.

        Args:
            observations: raw ones, a few.
            actions: as stored, (N, …).

        Raises:
            NotImplementedError: if they differ.
        """
        policy, targets = self.policy, self.targets(actions)
        parameters = [p for p in self.parameters() if p.requires_grad]
        weights = torch.linspace(1, 2, len(targets), device=targets.device)

        def gradient(log_likelihood: Tensor) -> Tensor:
            if not log_likelihood.requires_grad:
                return torch.zeros(1, device=targets.device)
            pulled = torch.autograd.grad((weights * log_likelihood).sum(), parameters, allow_unused=True)
            return torch.cat(
                [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, pulled)]
            )

        method, likelihood = self._own_likelihood()
        with torch.enable_grad(), aside(policy):
            own = gradient(likelihood(observations, targets))
        try:
            with torch.enable_grad(), aside(policy):  # from the same buffers
                ours = gradient(self.family.log_likelihood(self(self.prepare(observations)), targets))
            same = bool((own - ours).norm() <= 1e-3 * ours.norm() + 1e-12)
        except ValueError:  # the actions are not in the distribution's support
            same = False
        if not same:
            raise NotImplementedError(
                f"policy {type(policy).__name__} gives log-likelihoods in `{method}` that are not those of the "
                f"distribution that `get_distribution` returns, a {type(policy.action_dist).__name__}: let both be of "
                "one distribution, because the steps are measured in its KL"
            )

    def _own_likelihood(self) -> tuple[str, Callable[[Any, Tensor], Tensor]]:
        """The method of the policy that its own log-likelihoods come from, and ``observations, targets ↦`` them."""
        policy = self.policy
        plain = is_own(policy, "get_distribution") or is_own(policy, "forward")  # which acts by the plain network
        if plain or not is_own(policy, "evaluate_actions"):
            return "evaluate_actions", lambda observations, targets: policy.evaluate_actions(observations, targets)[1]
        return "get_distribution", lambda observations, targets: policy.get_distribution(observations).log_prob(targets)

    @torch.no_grad()
    def in_units_of_family(self, log_likelihood: Tensor, observations: Any, inputs: Any, targets: Tensor) -> Tensor:
        """The policy's own log-likelihoods, (N,), without the function of the action that `check` lets them have.

        A ratio is of two numbers in the same units, and the new one is the family's. What is taken away is as the
        policy is now: so that one which changed since it acted has the ratio to the one that acted.

        Args:
            log_likelihood: of the policy that acted, (N,).
            observations: raw ones.
            inputs: the same, prepared.
            targets: the actions, in the form that the family takes.
        """
        if self.standard:
            return log_likelihood
        _, likelihood = self._own_likelihood()
        with aside(self.policy):
            own = likelihood(observations, targets)
        with aside(self.policy):  # from the same buffers
            return log_likelihood + (self.family.log_likelihood(self(inputs), targets) - own)

    def targets(self, actions: Tensor) -> Tensor:
        """Stored actions (N, …) in the form that the family takes."""
        if isinstance(self.family, families.Categorical):
            return actions.long().flatten()
        if isinstance(self.family, families.MultiCategorical):
            return actions.long()
        return actions


class CriticHead(_Head):
    """The critic: observations ↦ values, the mean of a Gaussian over returns."""

    def forward(self, prepared: Any) -> Tensor:
        """Prepared observations ↦ values (N, 1)."""
        policy = self.policy
        if not self.standard:
            return policy.predict_values(prepared)
        return policy.value_net(policy.mlp_extractor.forward_critic(policy.vf_features_extractor(prepared)))

    def _layers(self, latent: nn.Module) -> tuple[nn.Module, ...]:
        return self.policy.vf_features_extractor, getattr(latent, "value_net", latent), self.policy.value_net

    def loss_and_gradients(
        self, parameters: Sequence[Tensor], prepared: Any, targets: Tensor
    ) -> Callable[[Any, Tensor], Sequence[Tensor]]:
        """``prepared observations, targets ↦ mean squared error and its gradients``, for mini-batches like this one.

        As a traced program where there can be one, after it was seen to agree with autograd on this mini-batch.
        """

        def by_autograd(prepared: Any, targets: Tensor) -> Sequence[Tensor]:
            loss = mse_loss(self(prepared).flatten(), targets.flatten())
            # a mini-batch may be without the observations that some of them are there for
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            return loss.detach(), *gradients

        # A forward pass may move buffers, and the one that is compared with would move them again.
        if not (self.standard and isinstance(prepared, Tensor) and is_known(self.policy)) or any(
            True for _ in self.buffers()
        ):
            return by_autograd
        wanted = {id(p) for p in parameters}
        names = [name for name, p in self.named_parameters() if id(p) in wanted]

        def functional(slots: dict[str, Tensor], prepared: Tensor, targets: Tensor) -> list[Tensor]:
            def loss(trained: dict[str, Tensor]) -> Tensor:
                values = functional_call(self, {**slots, **trained}, prepared, tie_weights=False)
                return mse_loss(values.flatten(), targets)

            gradients, value = grad_and_value(loss)({name: slots[name] for name in names})
            return [value, *gradients.values()]

        self._watch(self._parts())
        expected = by_autograd(prepared, targets)
        run = self._program(
            functional,
            dict(self.named_parameters()),
            [prepared, targets],
            lambda run: close(run(prepared, targets), expected),
        )
        return by_autograd if run is None else torch.no_grad()(run)
