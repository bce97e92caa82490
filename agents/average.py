"""An average of a policy's weights over the updates, to act by when the learning is done."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

__all__ = ["PolicyAverage", "acting_policy"]


class PolicyAverage(nn.Module):
    """w̄ ← decay · w̄ + (1 − decay) · w after each update, of all parameters and buffers; at first w̄ = w.

    A step that fills its trust region moves a policy as far at the end of the training as at its beginning, and each
    by itself may lose what the batch at hand has little of, such as the first steps of an episode. The average of the
    last 1 / (1 − decay) policies does not follow the single step (Polyak and Juditsky 1992).

    Args:
        policy: whose weights are averaged; it is not changed.
        decay: in [0, 1).

    Attributes:
        policy: a copy of the policy with the averaged weights; a new one after each update.
        count: how many updates are in it.

    Raises:
        TypeError: if the policy cannot be copied.
    """

    count: Tensor

    def __init__(self, policy: ActorCriticPolicy, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._of = (policy,)  # in a tuple, or PyTorch would make it a part of the average
        self.policy = self._copy()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.mark()

    def _copy(self) -> ActorCriticPolicy:
        (policy,) = self._of
        # The distribution, with the noise of state-dependent exploration, is the policy's own; nobody trains a copy.
        shared: dict[int, Any] = {id(x): x for x in (policy.action_dist, policy.optimizer)}
        try:
            return deepcopy(policy, shared)
        except (RuntimeError, TypeError) as error:
            raise TypeError(
                f"ema={self.decay} needs a copy of the policy, and {type(policy).__name__} cannot be copied ({error}): "
                "set ema=0, or let copy.deepcopy copy it"
            ) from error

    def mark(self) -> None:
        """Say that the parameters as they are now are the last that it knows of."""
        self._known = [p.detach().clone() for p in self._of[0].parameters()]

    def follows(self, policy: ActorCriticPolicy) -> bool:
        """Whether it is this policy's average, and nobody else has changed its parameters since.

        Their values are compared: a copy has the same ones at other places, and a write to ``.data`` leaves no mark. To
        another device or type the average goes along.
        """
        now = [*policy.parameters()]
        if self._of[0] is not policy or len(now) != len(self._known):
            return False
        if now and (now[0].device, now[0].dtype) != (self._known[0].device, self._known[0].dtype):
            self.policy.to(now[0])
            self._known = [known.to(now[0]) for known in self._known]
        return all(map(torch.equal, now, self._known))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now, and with them all else that the policy is made of.

        What is no tensor (an attribute that a callback changes, an activation or a hook that was put in) has no
        average: it is that of the policy at its last update.
        """
        former, self.policy = self.policy, self._copy()
        self.policy.set_training_mode(former.training)
        keep = self.decay if self.count else 0.0
        tensors = (chain(policy.parameters(), policy.buffers()) for policy in (self.policy, former))
        for w, mean in zip(*tensors, strict=True):
            if keep and mean.is_floating_point():
                w.copy_(mean.lerp(w, 1 - keep))
        self.count += 1
        self.mark()


def acting_policy(model: BaseAlgorithm) -> Any:
    """The policy by which the model's `predict` acts, for models of any package."""
    return getattr(model, "deployed_policy", model.policy)
