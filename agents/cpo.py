"""Constrained policy optimization."""

from __future__ import annotations

from functools import partial
from math import inf, isfinite, nan
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from stable_baselines3.common import buffers
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from agents.buffer import RolloutBuffer, advantages_of, rows, stacked
from agents.collect import cut_off
from agents.critic import NaturalCritic, training_mode
from agents.heads import CriticHead
from agents.networks import cover, fuse
from agents.options import option
from agents.recurrent import RecurrentPolicy
from agents.standard import is_standard, telling
from agents.trpo import TrustRegionAlgorithm
from agents.update import Batch, critic_for, surrogate
from envs.seeding import stream_seed
from npg.checks import number
from npg.constraint import Constraint
from npg.model import undone_on_error
from npg.parallel import average_, equal, mean_, moments
from npg.randomness import separate_randomness
from npg.step import StepReport

__all__ = ["CPO", "CostError"]


class CostError(ValueError):
    """An environment tells no costs, or what is no number."""


def _limit(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}): give one ≥ 0, or inf")
    if not float(value) >= 0:
        raise ValueError(f"{name} must lie in [0, inf], got {value}: inf sets no limit")


class _Costs(NamedTuple):
    """Of a rollout, flattened over steps and environments in the order of `RolloutBuffer.get`."""

    advantages: Tensor
    returns: Tensor


class CPO(TrustRegionAlgorithm):
    """Constrained policy optimization (Achiam et al. 2017): TRPO with a limit on what an episode costs.

    ``max_θ E[(π_θ/π_old) A]  subject to  E[KL(π_old ‖ π_θ)] ≤ δ  and  J_C + T E[(π_θ/π_old) A_C] ≤ cost_limit``, with
    the mean cost J_C and the mean length T of an episode. With objective and cost to first order and the KL to second
    that is solved in closed form; where no step within the radius reaches the limit, the one that lowers the cost most
    is taken. A step is shortened until the true KL, cost and return agree, or refused.

    The cost of each step is ``info["cost"]`` of the environment. A second critic, of the same architecture, learns its
    values; its last layer begins at zero, so that where nothing costs anything, all is bit for bit as in `TRPO`. It is
    not normalised: let the cost of a step be of the order of 1.

    Attributes:
        episode_cost: J_C, of the episodes that ended in the last rollout in which one did; before any did, of the
            episodes so far, which is less. One that was for a part without a limit is not counted.
        episode_length: T, of the same episodes, in steps.
        cost_error: the mean over updates, newer ones more, of J_C less what the steps before were to make it.

    Args:
        {options}

    Raises:
        TypeError: if an argument is not of its kind; a float is no whole number.
        ValueError: if an argument is out of its range; from `learn`, if an environment gives no ``info["cost"]``.
        FloatingPointError: from `learn`, also if a cost is not finite.
    """

    cost_limit: float = option(
        default=25.0,
        check=_limit,
        doc="the most that an episode may cost in the mean, the undiscounted sum of its ``info['cost']``; ≥ 0, and inf "
        "for no limit, with which no cost is asked for.",
        after="target_kl",
    )

    cost_correction: float = option(
        default=0.1,
        check=partial(number, low=0, high=1),
        doc="the rate, in [0, 1], at which ``cost_error`` is averaged. A step is chosen on the rollout that tells what "
        "it does to the cost, so it lowers it by less than told; what is missing in the mean is taken off the limit. "
        "0 is the paper's step, whose costs may lie far above the limit.",
        after="cost_limit",
    )

    episode_cost: float = nan
    episode_length: float = nan
    cost_error: float = 0.0
    _expected_cost: float = nan
    _any_ended: bool = False
    _costs: _Costs | None = None
    _report: StepReport | None = None
    _head: CriticHead | None = None

    # ---------------------------------------------------------------------------------------------------- life cycle

    def _setup_model(self) -> None:
        if issubclass(self.policy_class, RecurrentPolicy):
            raise ValueError(f"CPO takes no recurrent policy, got {self.policy_class.__name__}: TRPO, NPG and MDPO do")
        given: Any = self.rollout_buffer_class
        if not (given is None or issubclass(given, RolloutBuffer)):
            raise ValueError(
                f"rollout_buffer_class must be a subclass of agents.buffer.RolloutBuffer for CPO, got {given!r}: other "
                "buffers give their rows in another order"
            )
        super()._setup_model()
        policy_class: Any = self.policy_class
        with separate_randomness(self.device):  # the policy's stay TRPO's
            self.cost_policy = policy_class(
                self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **self.policy_kwargs
            ).to(self.device)
        for p in getattr(self.cost_policy, "value_net", nn.Identity()).parameters():
            nn.init.zeros_(p)
        fuse(self.cost_policy.optimizer)
        if "_running" not in vars(self):
            self.cost_critic_damping = self.critic_damping
            self._running = _unseen(self.n_envs)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return [*modules, "cost_policy", "cost_policy.optimizer"], tensors

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_costs", "_report", "_head"]

    def _cost_head(self) -> CriticHead:
        """The cost critic; the same one as long as it is right, since its programs are kept by it."""
        policy, head = self.cost_policy, self._head
        if head is None or head.policy is not policy or head.standard != is_standard(policy):
            self._head = head = CriticHead(policy)
        return head

    def _own_parameters(self, head: CriticHead, observations: Any) -> dict[str, nn.Parameter]:
        """What the cost critic learns; what it may read besides, as θ of `AfterstatePolicy`, becomes the actor's."""
        own = head.own_parameters(telling(head.policy, observations), process_group=self.process_group)
        learned, acting = {id(p) for p in own.values()}, dict(self.policy.named_parameters())
        with torch.no_grad():
            for name, p in head.policy.named_parameters():
                if p.requires_grad and id(p) not in learned and name in acting and acting[name].shape == p.shape:
                    p.copy_(acting[name])
        return own

    def join(self, process_group: dist.ProcessGroup | None) -> None:
        """As of every algorithm; the cost critic is common too."""
        super().join(process_group)
        if process_group is not None:
            for tensor in (*self.cost_policy.parameters(), *self.cost_policy.buffers()):
                dist.broadcast(tensor.detach(), group=process_group, group_src=0)

    # ------------------------------------------------------------------------------------------------------- rollout

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: buffers.RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """As of every algorithm; with the costs of the steps, their advantages and those of whole episodes.

        Raises:
            CostError: (a ValueError) if an environment gives no ``info["cost"]``, or one that is no number.
            FloatingPointError: if a cost is not finite.
        """
        self._costs = None
        if self.cost_limit == inf:
            self._running, self._expected_cost = _unseen(env.num_envs), nan
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        meter: Any = _Meter(env)
        with undone_on_error(lambda: setattr(self, "_running", _unseen(env.num_envs))):
            whole = super().collect_rollouts(meter, callback, rollout_buffer, n_rollout_steps)
        assert isinstance(rollout_buffer, RolloutBuffer)
        costs, dones = np.stack(meter.costs), np.asarray(self._last_episode_starts)
        begun = rollout_buffer.episode_starts[: len(costs)] > 0
        self._count(costs, begun[0], np.concatenate([begun[1:], dones[None] > 0]))
        if whole:
            alive = rollout_buffer.alive(dones)
            self._costs = self._advantages(costs.astype(np.float32), alive, rollout_buffer, meter.truncated)
        return whole

    @torch.no_grad()
    def _advantages(
        self, costs: NDArray[np.float32], alive: NDArray[np.float32], buffer: RolloutBuffer, truncated: list[Any]
    ) -> _Costs:
        policy, head, at_once = self.cost_policy, self._cost_head(), self._evaluated_at_once()
        policy.set_training_mode(False)
        observations = self._steps(buffer.observations, slice(len(costs)))
        own = self._own_parameters(head, observations)
        cover(policy, own.values(), self.lr_schedule(1))

        def values_of(observations: Any, n: int) -> NDArray[np.float32]:
            parts = (rows(observations, slice(start, start + at_once)) for start in range(0, n, at_once))
            return torch.cat([head(head.prepare(part)).flatten() for part in parts]).cpu().numpy()

        if truncated:  # by a time limit: the cost that would have come after it
            steps, envs, finals = zip(*truncated)
            last, _ = policy.obs_to_tensor(stacked(finals))
            costs[list(steps), list(envs)] += self.gamma * values_of(last, len(finals))
        values = values_of(observations, costs.size).reshape(costs.shape)
        newest = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
        final = values_of(newest, costs.shape[1]).reshape(1, -1)
        advantages = advantages_of(costs, values, final, alive, self.gamma, self.gae_lambda)
        flat = (torch.as_tensor(array.reshape(-1)).to(self.device) for array in (advantages, advantages + values))
        return _Costs(*flat)

    def _count(self, costs: NDArray[np.float64], begun: NDArray[np.bool_], ends: NDArray[np.bool_]) -> None:
        """Mean cost and length of the episodes that ended, or else of those under way, unless others ended before."""
        if self._running.shape != (3, costs.shape[1]):
            self._running = _unseen(costs.shape[1])
        new = np.array([[0.0], [0.0], [1.0]])
        self._running[:, begun] = new
        ended = np.zeros(3)  # cost, length and number
        for cost, end in zip(costs, ends):
            self._running[:2] += np.stack([cost, np.ones_like(cost)])
            if end.any():
                ended += self._running[:, end & (self._running[2] > 0)].sum(1)
                self._running[:, end] = new
        under_way = (*self._running[:2].sum(1), self._running.shape[1])
        sums = torch.as_tensor(np.stack([ended, under_way])).to(self.device)
        ended, under_way = mean_(sums, self.process_group).cpu().numpy()
        self._any_ended = self._any_ended or bool(ended[2])
        if ended[2] or not self._any_ended:
            cost, length, number = ended if ended[2] else under_way
            self.episode_cost, self.episode_length = float(cost / number), float(length / number)
            if ended[2]:
                if isfinite(error := self.episode_cost - self._expected_cost):
                    self.cost_error += self.cost_correction * (error - self.cost_error)
                self._expected_cost = self.episode_cost

    # -------------------------------------------------------------------------------------------------------- update

    def train(self) -> None:
        """One update, of the cost critic too: all of it, or after an error nothing at all.

        Raises:
            FloatingPointError: if a critic's loss is not finite; in all processes alike.
            RuntimeError: if processes that learn together have different parameters.
        """
        self._report = None  # a frozen actor takes no step
        before = {name: getattr(self, name) for name in ("cost_critic_damping", "_expected_cost")}
        with undone_on_error(lambda: vars(self).update(before)):
            super().train()

    def actor_step(self, batch: Batch) -> StepReport:
        """The best step within the radius and the limit, or the one that leads back to the limit."""
        constraint, missing = None, max(self.cost_error, 0.0) if self.cost_correction else 0.0
        aim = self.cost_limit - missing
        if self.cost_limit < inf:
            if self._costs is None:
                raise RuntimeError("the rollout was collected without costs, with cost_limit=inf: collect another one")
            advantages = self._costs.advantages[batch.rows]
            # E[A_C] = 0 under the policy that acted; what the sample has of it is noise that a ratio would scale
            centred = advantages - moments(advantages, self.process_group)[0]
            # the change of an episode's cost is the sum of its steps' advantages (Kakade & Langford 2002, lemma 6.1)
            costs = batch._replace(advantages=self.episode_length * centred)
            # where no episode ended since the last step, J_C is what that step was to make it
            cost = self._expected_cost if isfinite(self._expected_cost) else self.episode_cost
            constraint = Constraint(surrogate(self.networks.actor.family, costs), cost - aim)
        self._report = self.step_in_region(batch, constraint=constraint)
        if self._report.accepted:  # what it tells beyond the aim was not asked for: a critic's errors
            expected = self._expected_cost + self._report.actual_cost
            self._expected_cost = max(expected, min(self._expected_cost, aim))
        return self._report

    def learn_more(self, observations: Any) -> dict[str, float]:
        """Fit the cost critic; its loss, what an episode costs, and what the step did to that."""
        if self.cost_limit == inf or self._costs is None:
            return {}
        policy = self.cost_policy
        update_learning_rate(policy.optimizer, self.lr_schedule(self._current_progress_remaining))
        head = self._cost_head()
        policy.set_training_mode(False)
        parameters = self._own_parameters(head, observations)
        critic = critic_for(self, head, parameters, policy.optimizer, self.cost_critic_damping)
        # a stream of its own, so that the policy draws what TRPO's does
        seed = stream_seed(torch.initial_seed(), self.n_updates)
        with separate_randomness(self.device, seed), training_mode(policy, but=[]):
            loss = critic.fit(observations, self._costs.returns)
        if isinstance(critic, NaturalCritic):
            self.cost_critic_damping = critic.damping
        if self.n_critic_updates and not isfinite(loss):
            found = self.find_not_finite() or "the costs are too large, or learning_rate is"
            raise FloatingPointError(f"the cost critic's loss is not finite in update {self.n_updates + 1}: {found}")
        average_(policy.buffers(), self.process_group)
        if not equal(policy.parameters(), self.process_group):
            raise RuntimeError(f"the processes have different cost critics after update {self.n_updates + 1}")
        log = {
            "train/episode_cost": self.episode_cost,
            "train/cost_error": self.cost_error,
            "train/cost_value_loss": loss,
        }
        if (report := self._report) is not None:
            log |= {
                "train/predicted_cost": report.predicted_cost,
                "train/actual_cost": report.actual_cost if report.accepted else 0.0,
                "train/limit_bound": float(report.limit in ("bound", "infeasible")),
                "train/limit_infeasible": float(report.limit == "infeasible"),
            }
        return log


def _unseen(n_envs: int) -> NDArray[np.float64]:
    """Of the episodes under way, (3, n): cost and length as far as seen, and 1 where their beginning was seen too."""
    return np.zeros((3, n_envs))


class _Meter:
    """Environments, and the costs of the steps that they take."""

    def __init__(self, env: VecEnv) -> None:
        self._env = env
        self.costs: list[NDArray[np.float64]] = []
        self.truncated: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def step(self, actions: NDArray[Any]) -> Any:
        result = self._env.step(actions)
        *_, dones, infos = result
        step = len(self.costs)
        if dones.any():
            self.truncated += cut_off(infos, dones, step)
        self.costs.append(_costs_of(infos, step))
        return result


def _costs_of(infos: list[dict[str, Any]], step: int) -> NDArray[np.float64]:
    """``info["cost"]`` of each environment."""
    return np.array([_cost_of(info, i, step) for i, info in enumerate(infos)], dtype=np.float64)


def _cost_of(info: dict[str, Any], i: int, step: int) -> float:
    where = f"environment {i} in step {step} of the rollout"
    if "cost" not in info:
        raise CostError(
            f"info['cost'] is missing from {where}: CPO needs the cost of every step. Take a task of "
            "envs.velocity_limited, wrap yours in one that puts it there, or set cost_limit=inf. If it is there, "
            "and the environment has a vector form of its own, make it with backend='gymnasium', which hands it on"
        )
    cost = info["cost"]
    try:  # a tensor that requires a gradient, None and an integer beyond all floats have errors of their own
        if isinstance(cost, str | bytes) or np.ndim(cost) or not np.isrealobj(cost):
            raise TypeError(cost)
        value = float(cost)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CostError(f"info['cost'] must be a number, got {cost!r:.100} from {where}") from error
    if not isfinite(value):
        raise FloatingPointError(f"info['cost'] is {cost} from {where}: correct the environment")
    return value
