"""Mirror descent policy optimization."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from agents.base import NaturalPolicyAlgorithm
from agents.checks import all_finite
from agents.options import option
from agents.update import Batch, copy_of_state
from npg.checks import flag, number, whole
from npg.fisher import Fisher
from npg.model import Buffers
from npg.parallel import average_, mean_, size
from npg.parameters import Parameters

__all__ = ["MDPO", "MDPOReport"]


@dataclass(frozen=True)
class MDPOReport:
    """What one update of the actor did; names and units are those of `npg.StepReport`.

    Attributes:
        accepted: whether the steps were taken; if not, policy and optimizer are bit for bit what they were.
        objective: the surrogate before them.
        predicted_gain: gᵀd of the whole change d of the parameters, with the surrogate's gradient g.
        actual_gain: what they added to the surrogate.
        predicted_kl: ½dᵀFd with the Fisher of the old policy, in nats.
        kl: the true mean KL(old ‖ new), in nats.
        gradient_norm: ‖g‖.
        step_norm: ‖d‖.
        solve_seconds: that the steps took.
    """

    accepted: bool
    objective: float
    predicted_gain: float
    actual_gain: float
    predicted_kl: float
    kl: float
    gradient_norm: float
    step_norm: float
    solve_seconds: float


class MDPO(NaturalPolicyAlgorithm):
    """Mirror descent policy optimization (Tomar et al. 2020): the KL as a proximity term instead of a constraint.

    ``max_θ E[(π_θ/π_k) A] − E[KL(π_θ ‖ π_k)]/t_k``, by several gradient steps on the whole batch. It is `TRPO`'s
    problem with the multiplier 1/t_k given in place of the radius (the report, equations 17 and 18), and its first
    step from π_k is the ordinary policy gradient, since the KL is flat there. Steps that end where something is not
    finite are refused together: policy and optimizer stay bit for bit what they were.

    Args:
        {options}

    Raises:
        TypeError: if an argument is not of its kind; a float is no whole number.
        ValueError: if an argument is out of its range.
    """

    actor_learning_rate: float = option(
        default=3e-4,
        check=partial(number, low=0, above=True),
        doc="of the actor's Adam; it falls linearly to 0, as in the paper, unless ``annealed=False``.",
        after="gamma",
    )
    n_actor_updates: int = option(
        default=10,
        check=partial(whole, low=1),
        doc="gradient steps on the actor per update.",
        after="actor_learning_rate",
    )
    step_size: float = option(
        default=1.0,
        check=partial(number, low=0, above=True),
        doc="t_0 > 0; t_k = t_0 (1 − k/K) in the update k = 0, 1, … of K, as in the paper, unless ``annealed=False``.",
        after="n_actor_updates",
    )
    annealed: bool = option(
        default=True,
        check=flag,
        doc="whether ``step_size`` and ``actor_learning_rate`` fall to 0 until the end of the present call of `learn`, "
        "or stay as they are. Say False if `learn` is called again and again.",
        keyword=True,
    )

    remaining: float = 1.0
    """1 − k/K of the last update: what remained of the training when its rollout began, which is never nothing."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self._set_actor_optimizer()

    def _set_actor_optimizer(self) -> None:
        """Adam over the policy as it is now: a new one where parameters were replaced.

        It holds the critic's parameters as well, which have no gradient in an actor's step and so stay.
        """
        parameters = list(self.policy.parameters())
        before = vars(self).get("actor_optimizer")
        if before is None or [*map(id, before.param_groups[0]["params"])] != [*map(id, parameters)]:
            self.actor_optimizer = torch.optim.Adam(parameters, lr=self.actor_learning_rate, eps=1e-5)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return [*modules, "actor_optimizer"], tensors

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto"
    ) -> None:
        """As Stable-Baselines3's; an optimizer's state that was saved of the actor's parameters alone is taken too."""
        if isinstance(load_path_or_dict, dict) and "actor_optimizer" in load_path_or_dict:
            state = self._of_all_parameters(load_path_or_dict["actor_optimizer"])
            load_path_or_dict = {**load_path_or_dict, "actor_optimizer": state}
        super().set_parameters(load_path_or_dict, exact_match, device)

    def _of_all_parameters(self, state: dict[str, Any]) -> dict[str, Any]:
        groups, every = state.get("param_groups", []), list(self.policy.parameters())
        if len(groups) != 1 or "state" not in state or len(groups[0]["params"]) == len(every):
            return state  # whole, or no state of this optimizer, which PyTorch refuses
        group = groups[0]
        places = {id(p): place for place, p in enumerate(every)}
        own = [places[id(p)] for p in self.networks.actor_parameters.values()]
        moved = {own[index]: state["state"][i] for index, i in enumerate(group["params"]) if i in state["state"]}
        return {"state": moved, "param_groups": [{**group, "params": list(range(len(every)))}]}

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        rollout = self.n_steps * self.n_envs * size(self.process_group)
        self.remaining = 1 - (num_timesteps - rollout) / total_timesteps

    def actor_step(self, batch: Batch) -> MDPOReport:
        """Several steps of Adam on the surrogate minus a multiple of the KL; all of them, or none."""
        started = perf_counter()
        self._set_actor_optimizer()
        actor, optimizer, group = self.networks.actor, self.actor_optimizer, self.process_group
        family, surrogate = actor.family, self.surrogate(batch)
        parameters = Parameters(self.networks.actor_parameters)
        remaining = self.remaining if self.annealed else 1.0
        proximity = 1 / (self.step_size * remaining)
        for param_group in optimizer.param_groups:
            param_group["lr"] = self.actor_learning_rate * remaining

        fisher = Fisher(actor, batch.inputs, family, parameters=self.networks.actor_parameters, process_group=group)
        old = fisher.outputs
        outputs = old.clone().requires_grad_()
        surrogate_before = surrogate(outputs)
        (slope,) = torch.autograd.grad(surrogate_before, outputs)
        g = mean_(fisher.linearization.pull_back(slope), group)
        origin, optimizer_before, buffers = parameters.copy(), copy_of_state(optimizer), Buffers(actor)

        def forward() -> Tensor:
            buffers.restore()  # every pass, as the one that acted, begins with these
            return actor(batch.inputs)

        optimizer.zero_grad()
        for _ in range(self.n_actor_updates):
            outputs = forward()
            objective = surrogate(outputs) - proximity * family.kl(outputs, old).mean()
            gradients = torch.autograd.grad(-objective, parameters.tensors, allow_unused=True, materialize_grads=True)
            average_(gradients, group)
            for p, gradient in zip(parameters.tensors, gradients):
                p.grad = gradient
            optimizer.step()
        with torch.no_grad():
            new = forward()
            measured = torch.stack([surrogate_before.detach(), surrogate(new), family.kl(old, new).mean()])
            before, after, kl = mean_(measured, group).tolist()
        buffers.restore()
        accepted = isfinite(after - before) and isfinite(kl) and all_finite(optimizer, parameters.tensors)
        moved = parameters.copy()
        step = parameters.flatten([a - b for a, b in zip(moved, origin)])
        parameters.restore(origin)
        predicted_kl = 0.0
        if accepted:
            # The quadratic model belongs to the old policy: it is looked at from there.
            predicted_kl = 0.5 * float(
                Fisher(
                    actor, batch.inputs, family, parameters=self.networks.actor_parameters, process_group=group
                ).quadratic(step)
            )
            parameters.restore(moved)
        else:
            optimizer.load_state_dict(optimizer_before)
        return MDPOReport(
            accepted=accepted,
            objective=before,
            predicted_gain=float(torch.dot(g, step)) if accepted else 0.0,
            actual_gain=after - before,
            predicted_kl=predicted_kl,
            kl=kl,
            gradient_norm=float(g.norm()),
            step_norm=float(step.norm()) if accepted else 0.0,
            solve_seconds=perf_counter() - started,
        )
