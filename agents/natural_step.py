"""Algorithms whose actor takes a natural step: its solver, its damping and its geometry."""

from __future__ import annotations

import warnings
from functools import partial

from stable_baselines3.common.type_aliases import Schedule

from agents.base import Metric, NaturalPolicyAlgorithm, Preconditioner
from agents.options import option
from agents.schedules import value_at
from agents.update import Batch
from npg.checks import number, one_of, whole
from npg.constraint import Constraint
from npg.curvature.preconditioners import diagonal_preconditioner, kronecker_preconditioner
from npg.solvers import Solver, conjugate_gradient
from npg.step import StepReport, natural_step
from npg.transport import check_metric
from npg.trust_region import TrustRegion

__all__ = ["NaturalStepAlgorithm"]

#: λ is multiplied by ten at most so often: what is still wrong then is not the curvature.
_MOST_RAISES = 8
_PRECONDITIONERS = {None: None, "diagonal": diagonal_preconditioner, "kfac": kronecker_preconditioner}


class NaturalStepAlgorithm(NaturalPolicyAlgorithm):
    """An algorithm whose actor's step is a natural step, with its own rule for the length.

    Args:
        {options}
    """

    cg_max_steps: int = option(
        default=15,
        check=partial(whole, low=1),
        doc="the most conjugate-gradient iterations, each one Fisher-vector product.",
        after="gamma",
    )
    cg_damping: float = option(
        default=0.1, check=partial(number, low=0), doc="λ ≥ 0 in (F + λI)s = g.", after="cg_max_steps"
    )
    max_refusals: int = option(
        default=3,
        check=partial(whole, low=0),
        doc="after so many refused steps in a row λ is raised tenfold, from no less than 0.001, and tenfold again by "
        "each one more; an accepted step takes that back. A warning says so. 0 never raises it.",
        keyword=True,
    )
    fisher_fraction: float = option(
        default=1.0,
        check=partial(number, low=0, high=1, above=True),
        doc="the part of the batch, in (0, 1], on which the Fisher is taken; gradient, KL and search use all of it. "
        "Its rows are drawn at random for every step, of the actor and of a natural critic.",
        keyword=True,
    )
    preconditioner: Preconditioner | None = option(
        default=None,
        check=partial(one_of, known=(None, "diagonal", "kfac")),
        doc='None, ``"diagonal"`` or ``"kfac"``, for the actor\'s conjugate gradients '
        "(`npg.curvature.preconditioners`).",
        keyword=True,
    )
    metric: Metric = option(
        default="fisher",
        check=check_metric,
        doc='``"fisher"``, or another geometry in its place: ``"wasserstein"`` is that of `npg.transport`, with '
        "discrete actions on the complete graph, and ``wasserstein(Categorical(), graph)`` puts them on another one. "
        "``target_kl`` is then half the squared distance, in units of the actions (before they are squashed) or of "
        "the graph's edges. ``\"euclidean\"`` is ½‖Δ‖² of the network's outputs.",
        keyword=True,
    )

    def radius(self, target_kl: float | Schedule) -> float:
        """``target_kl`` now, of which a hundredth of the progress always remains, for the step of the last update.

        Raises:
            TypeError: if its schedule returns no number.
            ValueError: if that is not positive and finite.
        """
        delta = value_at(target_kl, max(self.progress_remaining, 0.01))
        number("target_kl", delta, 0, above=True)
        return float(delta)

    def natural_step(
        self,
        batch: Batch,
        *,
        trust_region: TrustRegion | None = None,
        learning_rate: float | None = None,
        damping: float | None = None,
        solver: Solver | None = None,
        constraint: Constraint | None = None,
    ) -> StepReport:
        """`npg.natural_step` of the actor on a batch, within a trust region or by a learning rate.

        Its damping is ``cg_damping``, or the one given, raised where the last steps were refused (``max_refusals``).
        """
        actor = self.networks.actor
        return natural_step(
            actor,
            batch.inputs,
            self.networks.geometry,
            self.surrogate(batch),
            trust_region=trust_region,
            learning_rate=learning_rate,
            damping=self._raised(self.cg_damping if damping is None else damping),
            solver=solver or partial(conjugate_gradient, max_iterations=self.cg_max_steps, rtol=1e-5),
            curvature_inputs=batch.curvature_inputs,
            preconditioner=_PRECONDITIONERS[self.preconditioner],
            constraint=constraint,
            parameters=self.networks.actor_parameters,
            process_group=self.process_group,
        )

    def _raised(self, damping: float) -> float:
        """λ of this step, after the steps before it."""
        times = self.refused_steps - self.max_refusals + 1
        if self.max_refusals == 0 or times < 1:
            return damping
        raised = max(damping, 1e-3) * 10.0 ** min(times, _MOST_RAISES)
        if times <= _MOST_RAISES and (self.process_group is None or self.process_group.rank() == 0):
            warnings.warn(
                f"the last {self.refused_steps} steps of the policy were refused: update {self.n_updates + 1} has the "
                f"damping {raised:.3g} in the place of {damping:.3g}, until one is taken. If none is, look at the "
                "rewards, or take a smaller target_kl",
                stacklevel=2,
            )
        return raised
