"""Natural gradient descent: `npg.natural_step` as an optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from npg.checks import number, one_of, positive_or_none, require, whole
from npg.curvature.base import Curvature, State
from npg.curvature.kronecker import KroneckerFisher
from npg.curvature.plain import DiagonalFisher
from npg.families import Family, Gaussian, Geometry, in_double
from npg.fisher import Fisher, Kind
from npg.geometry import Euclidean, FisherRao
from npg.model import Buffers
from npg.optim.base import MISSING, ModelOptimizer, decay_matrices, is_due, split
from npg.optim.batches import first_rows
from npg.parameters import Parameters
from npg.solvers import Solution, Solver, conjugate_gradient, dense_solve, solve_in_metric
from npg.step import StepReport, natural_step
from npg.transport import geometry
from npg.trust_region import LevenbergMarquardt, TrustRegion

__all__ = ["NGD"]

AnyCurvature = Curvature | type[Curvature]

_DENSE: Solver = partial(dense_solve, method="eigh")
#: The curvatures that have a name, to be made with decay, probes and generator.
_CURVATURES: dict[str, Callable[..., Curvature]] = {
    "diagonal": DiagonalFisher,
    "kfac": KroneckerFisher,
    "ekfac": partial(KroneckerFisher, corrected=True),
}


def _chosen(
    given: Any, functions: Mapping[str, Solver], names: Collection[str], options: Mapping[str, Any]
) -> tuple[Solver | None, Curvature | None]:
    """The function or the curvature that is meant, by its name, as it is, or by its class; neither, if it is none."""
    if isinstance(given, str):
        return functions.get(given), _CURVATURES[given](**options) if given in names else None
    if isinstance(given, type):
        if not issubclass(given, Curvature):
            return None, None
        takes = inspect.signature(given).parameters
        return None, given(**{name: value for name, value in options.items() if name in takes})
    if isinstance(given, Curvature):
        return None, given
    return given if _solves(given) else None, None


def _solves(given: Any) -> bool:
    """Whether it may be called as a `Solver`."""
    try:
        inspect.signature(given).bind(None, None, x0=None, damping=0.0)
    except TypeError:  # no function, or one of something else
        return False
    except ValueError:  # a function that does not tell
        return True
    return True


class NGD(ModelOptimizer):
    r"""Natural gradient descent with the exact Fisher information, F s = g solved by conjugate gradients.

    Every step is one `natural_step` that maximises the mean log-likelihood:

        d = β (F + λI)⁻¹ ∇ mean log p(targets | inputs),    θ ← (1 − lr · weight_decay) (θ + d + μ m),    m ← d + μ m.

    β is ``lr``, or with ``max_kl`` the smaller of that and the length at which the model moves by KL ≤ ``max_kl``.

    Args:
        model: all its trainable parameters are optimised.
        family: what the outputs of ``model`` mean.
        lr: step size; 1 is the full natural (Gauss–Newton) step.
        damping: λ ≥ 0. It has to be positive where F is singular to working precision and the gradient is noisy: with
            batch normalisation, for one.
        max_kl: a KL radius δ in nats per event; steps are then shortened until the true KL and the loss agree. It may
            be set later, as ``optimizer.max_kl``; a state does not hold it.
        momentum: μ, in [0, 1); 0 with ``max_kl``, since momentum would carry the model out of the radius.
        weight_decay: decoupled; parameters of one axis (biases, most normalisation) are left alone. 0 with ``max_kl``,
            as momentum.
        solver: a function of `npg.solvers` with its options bound, which solves with F itself; or a curvature of
            `npg.curvature`, an object or its class, which takes an F̂ + λI for F + λI and its inverse for the solution;
            an object begins with what it was taught before.
            The names are short for these: ``"cg"``, conjugate gradients; ``"dense"``, the report's Algorithm 1 as
            printed: F as a matrix, and its inverse (its pseudo-inverse where λ = 0 and F is singular), for up to some
            thousands of parameters; ``"kfac"`` and ``"ekfac"``, Kronecker factors; ``"diagonal"``, the diagonal of F.
        preconditioner: None; ``"kfac"``, ``"ekfac"``, or a curvature as above, for conjugate gradients. One iteration
            is K-FAC's direction at the length that is best for F; more of them lead from there to the solution.
        max_iterations: of ``"cg"``, each about the cost of one gradient.
        rtol: ``"cg"`` stops where the residual is below ``rtol`` · ‖g‖.
        factor_decay: of a curvature by its name, or by a class with a ``decay``: γ, in [0, 1): F̂ is an average over
            mini-batches, that of k updates ago with the weight γᵏ.
        update_period: F̂ is updated on each of the first 10 steps and on every ``update_period``-th step after them.
        probes: of a curvature by its name, or by a class with ``probes``: backward passes per update of F̂; None takes
            one for each output.
        generator: the source of their signs, and of sampled labels, by default torch's global one, which a checkpoint
            has to hold anyway.
        warm_start: start the solver from this multiple of the last solution; 0 starts from zero.
        damping_metric: ``"identity"``; for ``"cg"`` without a preconditioner or a warm start ``"online"``: solve
            (F + λC) s = g with the metric C that the gradients so far define (`npg.curvature.online`), which also
            preconditions the solver then; for Kronecker factors as the solver ``"factors"``: share λ out to those of
            each layer, in proportion to their size (`npg.curvature.kronecker`).
        alpha: smoothing of the online factors, as in `OnlineNGD`.
        curvature_fraction: the leading part of each mini-batch that F is taken on, in (0, 1].
        fisher: ``"exact"``, ``"sampled"`` or ``"empirical"``.
        metric: ``"fisher"``, or another geometry in its place: ``"euclidean"`` is that of Gauss and Newton
            (`npg.geometry`), ``"wasserstein"`` that of `npg.transport`, and ``wasserstein(family, graph)`` that with
            classes on a graph of your own. ``max_kl`` then bounds its divergence (½‖Δ‖² of the outputs, ½W₂²), and the
            gain that ``damping_control`` compares with is that of the linear model.
        damping_control: adapts λ after each step, which then costs one more forward pass.
        process_group: average over these processes, each of which holds the same parameters, which is looked at
            before the first step, and an equal share of the mini-batch. A model in DistributedDataParallel brings its
            own.

    Raises:
        ValueError: if an option is out of its range.
        TypeError: if the family has no Wasserstein metric.

    Source: Amari (1998), Natural gradient works efficiently in learning; Martens (2010), Deep learning via
    Hessian-free optimization.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        lr: float = 1.0,
        damping: float = 1e-3,
        *,
        max_kl: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        solver: Literal["cg", "dense", "diagonal", "kfac", "ekfac"] | Solver | AnyCurvature = "cg",
        preconditioner: Literal["kfac", "ekfac"] | AnyCurvature | None = None,
        max_iterations: int = 10,
        rtol: float = 1e-3,
        factor_decay: float = 0.95,
        update_period: int = 10,
        probes: int | None = 1,
        generator: Generator | None = None,
        warm_start: float = 0.0,
        damping_metric: Literal["identity", "online", "factors"] = "identity",
        alpha: float = 4.0,
        curvature_fraction: float = 1.0,
        fisher: Kind = "exact",
        metric: Literal["fisher", "euclidean", "wasserstein"] | Geometry = "fisher",
        damping_control: LevenbergMarquardt | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        number("lr", lr, 0)
        number("damping", damping, 0)
        number("momentum", momentum, 0, 1, below=True)
        number("weight_decay", weight_decay, 0)
        positive_or_none("max_kl", max_kl)
        self._check_radius(max_kl, momentum, weight_decay)
        whole("max_iterations", max_iterations, 1)
        number("rtol", rtol, 0)
        number("warm_start", warm_start, 0, 1)
        number("factor_decay", factor_decay, 0, 1, below=True)
        whole("update_period", update_period, 1)
        if probes is not None:
            whole("probes", probes, 1)
        controls = damping_control is None or callable(getattr(damping_control, "update", None))
        require(controls, "damping_control", damping_control, "None or a LevenbergMarquardt(…) of npg")
        one_of("damping_metric", damping_metric, ("identity", "online", "factors"))
        cg = partial(conjugate_gradient, max_iterations=max_iterations, rtol=rtol)
        factors = {"decay": factor_decay, "probes": probes, "generator": generator}
        self._solver, curvature = _chosen(solver, {"cg": cg, "dense": _DENSE}, _CURVATURES, factors)
        wanted = "'cg', 'dense', 'diagonal', 'kfac', 'ekfac', a function of npg.solvers, or a curvature"
        require(self._solver is not None or curvature is not None, "solver", solver, wanted)
        iterative = self._solver not in (None, _DENSE)
        if preconditioner is not None:
            require(iterative, "preconditioner", preconditioner, "None without solver='cg'")
            _, curvature = _chosen(preconditioner, {}, {"kfac", "ekfac"}, factors)
            wanted = "None, 'kfac', 'ekfac', or a curvature"
            require(curvature is not None, "preconditioner", preconditioner, wanted)
        self._curvature = curvature  # the solver or, of a solver, the preconditioner
        require(iterative or not warm_start, "warm_start", warm_start, f"0 with solver={solver!r}")
        if damping_metric == "factors":
            kronecker = self._solver is None and isinstance(curvature, KroneckerFisher)
            require(kronecker, "solver", solver, "'kfac' or 'ekfac' with damping_metric='factors'")
        if damping_metric == "online":
            require(solver == "cg", "solver", solver, "'cg' with damping_metric='online'")
            require(preconditioner is None, "preconditioner", preconditioner, "None with damping_metric='online'")
            require(not warm_start, "warm_start", warm_start, "0 with damping_metric='online'")
        number("curvature_fraction", curvature_fraction, 0, 1, above=True)
        self.geometry = geometry(metric, family)
        own = self.geometry == FisherRao(family)
        require(fisher == "exact" or own, "fisher", fisher, "'exact' with another metric")
        # The Hessian of the loss is about the Fisher information: half the squared error is its own Euclidean model.
        squares = type(family) is Gaussian and self.geometry == Euclidean()
        self._objective_curvature = 1.0 if own else 1.0 / cast(Gaussian, family).variance if squares else 0.0
        defaults = {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(model, family, defaults, fisher, process_group, damping_metric, alpha)
        self.trust_region: TrustRegion | None = None
        self.max_kl = max_kl
        self.damping_control = damping_control
        self.warm_start, self.curvature_fraction = warm_start, curvature_fraction
        self.solver, self.preconditioner = solver, preconditioner
        self.generator, self.update_period = generator, update_period
        if curvature is not None and curvature.blocks:
            self._begin_with(curvature)

    @property
    def max_kl(self) -> float | None:
        """The radius δ of `trust_region` in nats per event, None without one; it may be set between steps."""
        return None if self.trust_region is None else self.trust_region.radius

    @max_kl.setter
    def max_kl(self, radius: float | None) -> None:
        positive_or_none("max_kl", radius)
        if radius is None or self.trust_region is None:
            self.trust_region = None if radius is None else TrustRegion(radius)
        else:
            self.trust_region = replace(self.trust_region, radius=radius)

    @staticmethod
    def _check_radius(region: object, momentum: float, weight_decay: float) -> None:
        """Raise ValueError for what moves the model beside a step that was checked to be in its region."""
        for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
            require(not (region and value), name, value, "0 with max_kl, whose radius it would break")

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, inputs: Any = MISSING, targets: Any = MISSING, *, closure: None = MISSING
    ) -> StepReport:
        """Take one step on a mini-batch; a step that is refused leaves everything as it was but the damping.

        Args:
            inputs: a tensor, or a tuple of the model's positional arguments (a named tuple is one).
            targets: in the form that ``family.log_likelihood`` takes.
            closure: there is none; ``step(closure=None)`` makes the state, as `torch.distributed.checkpoint` asks for,
                and returns None.

        Raises:
            TypeError: without inputs and targets, or with a closure; with ``curvature_fraction`` also for inputs in
                which no rows can be found.
            ValueError: with ``curvature_fraction``, where it is not clear which tensors have the batch's rows; where an
                option was put into the parameter group that does not belong there.
        """
        if not self._has_batch(inputs, targets, closure):
            return cast(StepReport, None)
        group = self.param_groups[0]
        params = self._trainable()
        # A scheduler may have set it since: OneCycleLR does, unless cycle_momentum=False.
        momentum = group["momentum"]
        self._check_radius(self.trust_region, momentum, group["weight_decay"])
        theta, buffers = Parameters(self.model), Buffers(self.model)
        solver, x0, fraction = cast(Solver, self._solver), None, self.curvature_fraction
        count = self._steps(params)
        kept = None if self._curvature is None else KeptCurvature(self, self._curvature, params, count)
        if kept is not None and self.preconditioner is None:
            solver = kept.solve
            fraction = fraction if kept.due else 1.0  # no F is looked at, so that none is linearised for itself
        events = len(pytree.tree_leaves(targets)[0])
        rows = ceil(fraction * events)
        curvature_inputs = first_rows(inputs, rows, events) if rows < events else None
        if (factors := self._online_factors()) is not None:
            solver = partial(solve_in_metric, root=factors.preconditioner.inverse_root(), solver=solver)
        if self.warm_start:
            x0 = self.warm_start * theta.flatten(self._states("solution", params))
        decay = group["lr"] * group["weight_decay"]
        origin = theta.copy() if momentum or decay else []
        log_likelihood = partial(self._log_likelihood, targets=targets)
        if self.trust_region is not None or self.damping_control is not None:
            # A gain that is looked at is a small difference of large means: float64 keeps its digits, as the KL's.
            log_likelihood = partial(in_double, log_likelihood)
        report = natural_step(
            self.model,
            inputs,
            self.geometry,
            lambda outputs: log_likelihood(outputs).mean(),
            trust_region=self.trust_region,
            learning_rate=group["lr"],
            damping=group["damping"],
            solver=solver,
            fisher=partial(
                Fisher,
                kind=self.fisher,
                targets=pytree.tree_map(lambda y: y[:rows], targets) if self.fisher == "empirical" else None,
                generator=self.generator,
            ),
            curvature_inputs=curvature_inputs,
            preconditioner=None if self.preconditioner is None else kept,
            x0=x0,
            objective_curvature=self._objective_curvature,
            evaluate=self.damping_control is not None,
            process_group=self.process_group,
        )
        if report.accepted and origin:
            if momentum:
                torch._foreach_add_(params, self._states("momentum_buffer", params), alpha=momentum)
            decay_matrices(params, decay)
            torch.clear_autocast_cache()
            if not theta.is_finite():
                theta.restore(origin)
                buffers.restore()
                report = replace(report, accepted=False, step=torch.zeros_like(report.step), step_norm=0.0, scale=0.0)
        if report.accepted:
            if momentum or any("momentum_buffer" in self.state[p] for p in params):  # with μ = 0 it is the last step
                momenta = self._states("momentum_buffer", params)
                torch._foreach_mul_(momenta, momentum)
                torch._foreach_add_(momenta, split(report.step, momenta))
            if self.warm_start:
                torch._foreach_copy_(self._states("solution", params), split(report.solution, params))
            if factors is not None:
                factors.update(report.gradient, count)
            if kept is not None:
                kept.keep()
            self._count_to(count + 1, params)
        if self.damping_control is not None:
            group["damping"] = self.damping_control.update(
                group["damping"], report.predicted_gain, report.actual_gain, report.accepted
            )
        return report

    def _begin_with(self, curvature: Curvature) -> None:
        """Put what a curvature was taught before into the state, which is what steps go by."""
        now, learnt = Parameters(self.model), curvature.parameters
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        if unknown := [name for name, p in zip(learnt.names, learnt.tensors) if shapes.get(name) != p.shape]:
            raise ValueError(
                f"the curvature {curvature!r} was updated for {unknown}, which the model does not have in these "
                "shapes: give a new one, or its class"
            )
        curvature.blocks, curvature.parameters = curvature._former(now), now
        KeptCurvature(self, curvature, now.tensors, 0).keep()

    def _make_state(self, params: list[Tensor]) -> None:
        self._count_to(self._steps(params), params)
        self._online_factors()
        if self.param_groups[0]["momentum"]:
            self._states("momentum_buffer", params)
        if self.warm_start:
            self._states("solution", params)
        if self._curvature is not None:  # which parameters will hold a block is not known before the first step
            for name in ("key", *self._curvature.fields):
                for p in params:
                    self.state[p].setdefault(f"{self._curvature.name}_{name}", torch.empty(0, device="cpu"))


class KeptCurvature:
    """The curvature of `NGD` in one step, from the optimizer's state: updated where due, kept if the step is taken."""

    def __init__(self, optimizer: NGD, curvature: Curvature, params: list[Tensor], step: int) -> None:
        self.optimizer, self.curvature, self.params, self.step = optimizer, curvature, params, step
        # The state names parameters by their places in the group, which do not change when some are frozen.
        places = {id(p): place for place, p in enumerate(optimizer.param_groups[0]["params"])}
        self.places = [places[id(p)] for p in params]
        index = {place: i for i, place in enumerate(self.places)}
        self.prefix = f"{curvature.name}_"
        self.blocks: State = {}
        for state in (optimizer.state[p] for p in params if f"{self.prefix}key" in optimizer.state[p]):
            key = state[f"{self.prefix}key"].tolist()
            if key and all(place in index for place in key):
                fields = {name: state[self.prefix + name] for name in curvature.fields if self.prefix + name in state}
                self.blocks[tuple(index[place] for place in key)] = fields

    def __call__(self, fisher: Fisher, damping: float) -> Callable[[Tensor], Tensor]:
        """R ↦ (F̂ + λI)⁻¹ r."""
        return self._updated(fisher).inverse(damping)

    def solve(self, A: Fisher, b: Tensor, /, *, x0: Tensor | None = None, damping: float = 0.0) -> Solution:
        """(F̂ + λI)⁻¹ b."""
        options = {"shared": True} if self.optimizer.damping_metric == "factors" else {}
        return self._updated(A).solve(b, damping=damping, **options)

    @property
    def due(self) -> bool:
        """Whether this step updates F̂; it does where F̂ does not have each parameter once."""
        covered = sorted(i for key in self.blocks for i in key)
        return covered != list(range(len(self.params))) or is_due(self.step, self.optimizer.update_period)

    def _updated(self, fisher: Fisher) -> Curvature:
        self.curvature.parameters = fisher.parameters
        self.curvature.load_state_dict(self.blocks)
        if self.due:
            self.curvature.update(fisher)
        return self.curvature

    def keep(self) -> None:
        """Put F̂ into the optimizer's state."""
        states = [self.optimizer.state[p] for p in self.params]
        for state in states:
            for name in [name for name in state if name.startswith(self.prefix)]:
                del state[name]
        for key, block in self.curvature.state_dict().items():
            fields = {self.prefix + name: value for name, value in block.items()}
            states[key[0]].update(
                {f"{self.prefix}key": torch.tensor([self.places[i] for i in key], device="cpu"), **fields}
            )
