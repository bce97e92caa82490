"""Natural policy gradient."""

from __future__ import annotations

from functools import partial

from stable_baselines3.common.type_aliases import Schedule

from agents.natural_step import NaturalStepAlgorithm
from agents.options import option
from agents.update import Batch
from npg.checks import number, positive_or_none
from npg.step import StepReport
from npg.trust_region import TrustRegion

__all__ = ["NPG"]


class NPG(NaturalStepAlgorithm):
    """Natural policy gradient (Kakade 2002): θ ← θ + α(F + λI)⁻¹∇J.

    With ``target_kl`` = δ, α is such that ½dᵀ(F + λI)d = δ for the step d (Rajeswaran et al. 2017, equation 4), so that
    the quadratic model of the KL, ½dᵀFd, is at most δ: the less, the larger λ is against F. With ``step_size``, α is
    that. Neither checks the true KL or return; `TRPO` does.

    Args:
        {options}

    Raises:
        TypeError: if an argument is not of its kind; a float is no whole number.
        ValueError: if an argument is out of its range.
    """

    target_kl: float | Schedule = option(
        default=0.01,
        check=partial(number, low=0, above=True),
        doc="δ of the normalised step, in nats; a number, a function of the remaining progress (from 1 to 0.01), or "
        '``"linear_0.02"``. Unused where ``step_size`` is given.',
        after="normalize_advantage",
        scheduled=True,
    )
    step_size: float | None = option(
        default=None,
        check=positive_or_none,
        doc="α of the fixed step, or None for the normalised one.",
        after="target_kl",
    )

    def actor_step(self, batch: Batch) -> StepReport:
        """One step of length α, or of the length at which ½dᵀ(F + λI)d is δ."""
        if self.step_size is not None:
            return self.natural_step(batch, learning_rate=self.step_size)
        region = TrustRegion(radius=self.radius(self.target_kl), backtrack=False)
        return self.natural_step(batch, trust_region=region)
