"""Trust region policy optimization."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule

from agents.natural_step import NaturalStepAlgorithm
from agents.options import option
from agents.update import Batch
from envs.hybrid import is_hybrid
from npg.checks import number, one_of, positive_or_none, whole
from npg.step import StepReport
from npg.trust_region import KLDirection, TrustRegion

__all__ = ["TRPO", "TrustRegionAlgorithm"]


class TrustRegionAlgorithm(NaturalStepAlgorithm):
    """An algorithm whose steps are searched for within a KL radius: what TRPO and CPO share.

    Args:
        {options}
    """

    line_search_shrinking_factor: float = option(
        default=0.8,
        check=partial(number, low=0, high=1, above=True, below=True),
        doc="the factor of each backtrack, smaller than 1.",
        after="cg_damping",
    )
    line_search_max_iter: int = option(
        default=10,
        check=partial(whole, low=1),
        doc="how many lengths are tried.",
        after="line_search_shrinking_factor",
    )
    target_kl: float | Schedule = option(
        default=0.01,
        check=partial(number, low=0, above=True),
        doc='δ, in nats; a number, a function of the remaining progress (from 1 to 0.01), or ``"linear_0.02"``.',
        after="normalize_advantage",
        scheduled=True,
    )
    kl_direction: KLDirection = option(
        default="old_new",
        check=partial(one_of, known=("old_new", "new_old")),
        doc='``"old_new"``: KL(old ‖ new), the paper\'s; ``"new_old"``: the other, which ``sb3_contrib`` uses.',
        keyword=True,
    )
    kl_reduction: Literal["sum", "mean"] = option(
        default="sum",
        check=partial(one_of, known=("sum", "mean")),
        doc='``"sum"``: the KL of the whole action, the paper\'s; ``"mean"``: that divided by the number of action '
        "components of a Box or MultiBinary space, which is what ``sb3_contrib`` bounds and damps there (for n "
        "components its ``target_kl`` and ``cg_damping`` are n times as large in terms of the true KL).",
        keyword=True,
    )

    @property
    def components(self) -> int:
        """What δ and λ are multiplied by: n for the mean KL of n components (``kl_reduction="mean"``), else 1."""
        space = self.action_space
        if self.kl_reduction == "mean" and isinstance(space, spaces.Box | spaces.MultiBinary) and not is_hybrid(space):
            return int(np.prod(space.shape))
        return 1

    def step_in_region(self, batch: Batch, **options: Any) -> StepReport:
        """`natural_step` within the radius of this moment, with further ``options`` of it."""
        region = TrustRegion(
            radius=self.radius(self.target_kl),
            shrink=self.line_search_shrinking_factor,
            max_trials=self.line_search_max_iter,
            kl_direction=self.kl_direction,
        )
        # ½sᵀ(F/n + λI)s ≤ δ, and a direction of (F/n + λI)⁻¹g, is the same step as with nδ, nλ and F.
        n = self.components
        return self.natural_step(
            batch,
            trust_region=replace(region, radius=n * region.radius),
            damping=n * self.cg_damping,
            **options,
        )


class TRPO(TrustRegionAlgorithm):
    """Trust region policy optimization (Schulman et al. 2015): the natural step within a KL radius.

    ``max_θ E[(π_θ/π_old) A]  subject to  E[KL(π_old ‖ π_θ)] ≤ δ``, solved by one step s ∝ (F + λI)⁻¹g, scaled to the
    radius and shortened until the true KL and the true surrogate agree. A step that never does is refused, and the
    policy stays bit for bit what it was.

    The arguments up to ``device`` are those of ``sb3_contrib.TRPO`` with the same defaults; those after it are our own.
    It bounds another KL by default: KL(old ‖ new), the paper's, where ``sb3_contrib`` bounds KL(new ‖ old). For a Box
    or MultiBinary space of n components ``target_kl`` bounds the KL of the whole action, and ``cg_damping`` is added to
    the Fisher of it, where ``sb3_contrib`` divides both KL and Fisher by n. Its trust region is that of
    ``kl_direction="new_old", kl_reduction="mean"``, and models that it saved keep it (`load`).

    Args:
        {options}

    Raises:
        TypeError: if an argument is not of its kind; a float is no whole number.
        ValueError: if an argument is out of its range.
    """

    step_size: float | None = option(
        default=None,
        check=positive_or_none,
        doc="the largest multiple of the natural gradient, α > 0; None for no limit but the radius. A step within the "
        "radius is then no longer than the one of mirror descent, max gᵀd − dᵀFd/2α: where there is little to gain, "
        'it is short. Give ``advantage_deviation="running"`` with it.',
        keyword=True,
    )
    sb3_contrib_options: ClassVar[dict[str, Any]] = {"kl_direction": "new_old", "kl_reduction": "mean"}

    def actor_step(self, batch: Batch) -> StepReport:
        """One natural step within the radius."""
        return self.step_in_region(batch, learning_rate=self.step_size)
