"""Natural-gradient optimizers: `torch.optim.Optimizer` faces over the core and over `npg.curvature`.

`OnlineNGD` takes gradients from ``p.grad`` like any optimizer. `NGD` and `DiagonalNGD` need the model and what its
outputs mean, because the Fisher information is a property of the predictive distribution: ``step(inputs, targets)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from math import ceil, inf, nan
from typing import Any, Literal, TypeAlias, cast, overload

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils._pytree import tree_map

from npg.curvature.kronecker import Block, KroneckerFisher, Multiple
from npg.curvature.online import OnlinePreconditioner
from npg.families import Family, Geometry
from npg.fisher import Fisher, Kind
from npg.linearize import Buffers, Linearization, uncompiled
from npg.parallel import mean_
from npg.solvers import Solution, Solver, conjugate_gradient, dense_solve, solve_in_metric
from npg.step import StepReport, natural_step
from npg.transport import geometry
from npg.trust_region import LevenbergMarquardt, TrustRegion

__all__ = ["NGD", "DiagonalNGD", "OnlineNGD"]

_Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]

#: Steps at the start on which online factors are always updated.
BURN_IN = 10
#: And after them on every so many.
UPDATE_PERIOD = 4


def _is_due(step: int, period: int) -> bool:
    """Whether factors are updated on this step, counted from 0."""
    return step < BURN_IN or step % period == 0


def _check(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is not usable: it must be {wanted}")


def _dense_gradients(params: Iterable[Tensor]) -> None:
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is sparse; "
                "this optimizer needs dense gradients (for an embedding: sparse=False)"
            )


def _decay(params: Iterable[Tensor], amount: float | Tensor) -> None:
    """Decoupled weight decay of all parameters but biases and those of normalisation."""
    matrices = [p for p in params if p.ndim > 1]
    if matrices and (isinstance(amount, Tensor) or amount):
        torch._foreach_mul_(matrices, 1 - amount)


class _ExactResume(Optimizer):
    """An optimizer whose state comes back from a checkpoint with the dtype it was saved with.

    `Optimizer.load_state_dict` casts state to the dtype of its parameter, which rounds the float32 state of
    half-precision parameters, and may share memory with the checkpoint.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of the same optimizer over parameters of the same shapes."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, p in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    # counts are for the host
                    self.state[p][key] = value.to(p.device if value.is_floating_point() else "cpu", copy=True)


class OnlineNGD(_ExactResume):
    r"""Kaldi's online low-rank natural gradient, applied to every axis of every parameter in turn.

    For each axis of dimension D > 1 the gradient is read as N rows of length D and multiplied by the inverse of
    G = F + (α/D) tr(F) I, where F = Rᵀ D R + ρ I tracks the rows' second moment; the result is rescaled to the norm
    of the gradient (`npg.curvature.online` has the formulas). With the preconditioned gradient ĝ,

        m ← μ m + ĝ,    θ ← (1 − lr · weight_decay) θ − lr · m.

    The state depends on the gradients alone: under DistributedDataParallel, which averages them, it is the same on
    all ranks without any communication of its own. A constant that scales all gradients scales ĝ and nothing else.

    Args:
        params: parameters, or dicts that define parameter groups; every option below can be set for each group.
        lr: step size.
        momentum: μ, in [0, 1).
        weight_decay: decoupled by default: θ shrinks by the factor 1 − lr · weight_decay per step, if it has two axes
            or more (biases and normalisation parameters are left alone).
        decoupled_weight_decay: with False, weight_decay · θ is added to the gradient of every parameter before it is
            preconditioned: L2 regularisation, as in ``torch.optim.SGD`` and in the report.
        alpha: smoothing of F towards a multiple of the identity; larger is closer to SGD.
        rank: largest rank of F; an axis of dimension D gets min((D + 1) // 2, rank). 0 turns preconditioning off.
        update_period: F is updated on each of the first 10 steps and on every ``update_period``-th step after them.
        eta: weight of the new gradient in F, in (0, 0.9]. A history of h updates is eta = 1 / h.
        max_change: largest ‖lr · m‖ over a parameter group; a longer step is shortened to it. None: no limit.

    Raises:
        ValueError: if an option is out of its range or a gradient is sparse; no parameter has changed then.

    Source: Povey, Zhang and Khudanpur (2015), arXiv 1410.7455.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = True,
        alpha: float = 4.0,
        rank: int = 80,
        update_period: int = UPDATE_PERIOD,
        eta: float = 0.1,
        max_change: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "alpha": alpha,
            "rank": rank,
            "update_period": update_period,
            "eta": eta,
            "max_change": max_change,
        }
        self._plans: dict[int, list[_OnlinePlan]] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; options that it does not set have the values given to the constructor."""
        super().add_param_group(param_group)
        try:
            self._validate(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    @staticmethod
    def _validate(group: dict[str, Any]) -> None:
        _check(0 <= group["lr"] < inf, "lr", group["lr"], "a finite number, 0 or above")
        _check(0 <= group["momentum"] < 1, "momentum", group["momentum"], "in [0, 1)")
        _check(group["weight_decay"] >= 0, "weight_decay", group["weight_decay"], "0 or above")
        _check(group["alpha"] >= 0, "alpha", group["alpha"], "0 or above (4 is usual)")
        rank, period, limit = group["rank"], group["update_period"], group["max_change"]
        _check(isinstance(rank, int) and rank >= 0, "rank", rank, "an integer, 0 or above")
        _check(isinstance(period, int) and period >= 1, "update_period", period, "an integer, 1 or above")
        _check(0 < group["eta"] <= 0.9, "eta", group["eta"], "above 0 and at most 0.9")
        _check(limit is None or limit > 0, "max_change", limit, "None or above 0")
        for p in group["params"]:
            _check(p.is_floating_point(), "params", p.dtype, "of real floating-point tensors")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients in `p.grad`; a parameter without a gradient stays as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _dense_gradients(p for group in self.param_groups for p in group["params"])
        for index, group in enumerate(self.param_groups):
            self._step_group(index, group)
        return loss

    def _step_group(self, index: int, group: dict[str, Any]) -> None:
        active = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
        if not active:
            return
        plans = self._plans.get(index, [])
        options = {name: group[name] for name in ("alpha", "rank", "eta")}
        if any(plan.options["rank"] != options["rank"] for plan in plans):
            raise ValueError(f"rank must stay {plans[0].options['rank']}, that of the factors; got {options['rank']}")
        if {p for plan in plans for p in plan.params} != set(active) or plans[0].options != options:
            plans = self._plans[index] = self._plan(active, options)

        lr, decay, limit = group["lr"], group["weight_decay"], group["max_change"]
        decoupled = group["decoupled_weight_decay"]
        for plan in plans:
            gradients: _Tensors = [p.grad for p in plan.params if p.grad is not None]
            if decay and not decoupled:
                gradients = torch._foreach_add(gradients, plan.params, alpha=decay)
            plan.accumulate(gradients, group["momentum"], group["update_period"])

        if decoupled:
            _decay(active, lr * decay)
        params = [p for plan in plans for p in plan.params]
        changes: _Tensors = [buffer for plan in plans for buffer in plan.buffers]
        if limit is not None:
            norms = torch._foreach_norm(changes)
            norm = lr * torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))
            changes = torch._foreach_mul(changes, limit / norm.clamp_min(limit))
        torch._foreach_add_(params, changes, alpha=-lr)

    def _plan(self, params: list[Tensor], options: dict[str, Any]) -> list[_OnlinePlan]:
        """One plan for each number of steps that parameters have behind them: one, unless some were skipped."""
        runs: dict[int, list[Tensor]] = {}
        for p in params:
            runs.setdefault(int(self.state[p].get("step", 0)), []).append(p)
        return [_OnlinePlan(run, [self.state[p] for p in run], step, options) for step, run in runs.items()]


class _OnlinePlan:
    """The stacked state of the parameters that step together; their optimizer state is views of it."""

    def __init__(
        self, params: list[Tensor], states: list[dict[str, Tensor]], step: int, options: dict[str, Any]
    ) -> None:
        self.params, self.options = params, options
        self.count, self.step = step, torch.tensor(step, device="cpu")
        self.preconditioner = OnlinePreconditioner(params, states, **options)
        self.momenta = []
        self.buffers = [torch.empty(0)] * len(params)
        for block in self.preconditioner.blocks:
            first = params[block.indices[0]]
            stacked = torch.zeros(len(block.indices), *first.shape, dtype=block.dtype, device=first.device)
            self.momenta.append(stacked)
            for i, view in zip(block.indices, stacked.unbind(), strict=True):
                if "momentum_buffer" in states[i]:
                    view.copy_(states[i]["momentum_buffer"])
                self.buffers[i] = states[i]["momentum_buffer"] = view
        for state in states:
            state["step"] = self.step

    def accumulate(self, gradients: Sequence[Tensor], momentum: float, update_period: int) -> None:
        """Precondition the gradients and add them to the momentum buffers; count the step."""
        update = _is_due(self.count, update_period)
        directions = self.preconditioner(gradients, update=update, first=self.count == 0)
        for buffer, direction in zip(self.momenta, directions, strict=True):
            if momentum:
                buffer.mul_(momentum).add_(direction)
            else:
                buffer.copy_(direction)
        self.count += 1
        self.step.fill_(self.count)


class _ModelOptimizer(_ExactResume):
    """An optimizer that linearises the model itself; one parameter group, all that is trainable."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        defaults: dict[str, Any],
        fisher: Kind,
        process_group: dist.ProcessGroup | None,
        damping_metric: str,
        alpha: float,
    ) -> None:
        if isinstance(model, DistributedDataParallel):
            # Forward mode cannot pass through the wrapper; the reduction is done here, once per product.
            process_group = process_group or model.process_group
            model = model.module
        model = cast(nn.Module, uncompiled(model))
        _check(fisher in ("exact", "sampled", "empirical"), "fisher", fisher, "'exact', 'sampled' or 'empirical'")
        _check(0 <= alpha < inf, "alpha", alpha, "a finite number, 0 or above (4 is usual)")
        self.model, self.family, self.fisher, self.process_group = model, family, fisher, process_group
        self.damping_metric, self.alpha = damping_metric, alpha
        self._factors: _TrackedFactors | None = None
        super().__init__([p for p in model.parameters() if p.requires_grad], defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_factors": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._factors = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ValueError for a second group: the parameters are those of the model."""
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__} has one parameter group, that of its model: put all into the model"
            )
        super().add_param_group(param_group)

    def _trainable(self) -> list[Tensor]:
        """What the model trains; all of it is in the parameter group."""
        held = {id(p) for p in self.param_groups[0]["params"]}
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if new := [name for name, p in named.items() if id(p) not in held]:
            raise ValueError(
                f"{new} became trainable, or part of the model, after this {type(self).__name__} was made: make it anew"
            )
        return list(named.values())

    def _online_factors(self) -> _TrackedFactors | None:
        """The factors of the metric C; None if the damping does not use it."""
        if self.damping_metric != "online":
            return None
        params = self._trainable()
        if self._factors is None or not self._factors.cover(params):
            self._factors = _TrackedFactors(params, self.state, self.alpha)
        return self._factors

    def _states(self, key: str, params: Iterable[Tensor]) -> list[Tensor]:
        """One state tensor of each parameter, zero at first, at least float32."""
        for p in params:
            if key not in self.state[p]:
                self.state[p][key] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return [self.state[p][key] for p in params]


class DiagonalNGD(_ModelOptimizer):
    r"""Natural gradient with the diagonal of the Fisher information.

    With g the gradient of the mean negative log-likelihood and f an estimate of diag F on the same mini-batch,

        v ← γ v + (1−γ) f,    m ← μ m + g / (v / (1−γᵗ) + λ),    θ ← (1 − lr · weight_decay) θ − lr · m.

    With ``damping_metric="online"`` that happens in the coordinates C^{1/2} θ: f estimates diag LFL for L = C^{−1/2},
    and m ← μ m + L (v / (1−γᵗ) + λ)⁻¹ L g.

    diag F is estimated by backward passes with random signs ε, one per event and output: with F = JᵀMJ/N and M = LLᵀ,
    E[(JᵀLε)²]/N = diag F for any model, batch normalisation in training mode included. It is the mean of squares over
    events; the square of the mean gradient, which Adam tracks, is another quantity that shrinks with the batch.

    Args:
        model: all its trainable parameters are optimised.
        family: what the outputs of ``model`` mean.
        lr: step size.
        damping: λ > 0, added to the diagonal.
        damping_metric: ``"identity"``, or ``"online"`` for the diagonal in the coordinates in which the metric C of
            the gradients so far (`npg.curvature.online`) is the identity.
        alpha: smoothing of the online factors, as in `OnlineNGD`.
        fisher: ``"exact"`` (expectation over labels), ``"sampled"`` (one label drawn from the model per event) or
            ``"empirical"`` (the labels of the data: the mean of squared per-event gradients).
        decay: γ, in [0, 1).
        momentum: μ, in [0, 1).
        weight_decay: decoupled; parameters of one axis (biases, most normalisation) are left alone.
        probes: backward passes per estimate; None computes the diagonal itself, at one backward pass per event (or
            per event and output if ``fisher="exact"``).
        generator: the source of signs and sampled labels, by default torch's global one, which a checkpoint has to
            hold anyway.
        process_group: average gradient, diagonal and loss over these processes. A model in DistributedDataParallel
            brings its own.

    Raises:
        ValueError: if an option is out of its range.

    Source: Amari (1998), Natural gradient works efficiently in learning; Martens (2020), arXiv 1412.1193.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        lr: float,
        damping: float = 1e-3,
        *,
        damping_metric: Literal["identity", "online"] = "identity",
        alpha: float = 4.0,
        fisher: Kind = "exact",
        decay: float = 0.95,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        probes: int | None = 1,
        generator: Generator | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _check(0 <= lr < inf, "lr", lr, "a finite number, 0 or above")
        _check(0 < damping < inf, "damping", damping, "a finite number above 0")
        _check(0 <= decay < 1, "decay", decay, "in [0, 1)")
        _check(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        _check(weight_decay >= 0, "weight_decay", weight_decay, "0 or above")
        _check(probes is None or probes >= 1, "probes", probes, "None or at least 1")
        _check(damping_metric in ("identity", "online"), "damping_metric", damping_metric, "'identity' or 'online'")
        defaults = {
            "lr": lr,
            "damping": damping,
            "decay": decay,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        super().__init__(model, family, defaults, fisher, process_group, damping_metric, alpha)
        self.probes, self.generator = probes, generator

    @torch.no_grad()
    def step(self, inputs: Any, targets: Tensor) -> Tensor:  # type: ignore[override]
        """Take one step on a mini-batch; returns its mean negative log-likelihood before the step, ().

        Where that, the gradient or the diagonal is not finite, the step is refused: parameters, running average and
        momentum stay as they were, and NaN is returned. The host waits to know with ``damping_metric="online"`` alone.

        Args:
            inputs: a tensor, or a tuple of the model's positional arguments.
            targets: in the shape that ``family.log_likelihood`` takes.
        """
        group = self.param_groups[0]
        self._trainable()
        buffers = Buffers(self.model)
        with buffers.restored_on_error():
            return self._step(inputs, targets, group, buffers)

    def _step(self, inputs: Any, targets: Tensor, group: dict[str, Any], buffers: Buffers) -> Tensor:
        linearization = Linearization(self.model, inputs, move_statistics=True)
        fisher = Fisher(
            self.model,
            inputs,
            self.family,
            kind=self.fisher,
            targets=targets if self.fisher == "empirical" else None,
            generator=self.generator if self.fisher == "sampled" else None,
            process_group=self.process_group,
            linearization=linearization,
        )
        outputs, parameters = linearization.outputs, linearization.parameters
        loss = mean_(-self.family.log_likelihood(outputs, targets).mean(), self.process_group)
        slope = linearization.pull_back(self.family.score(outputs, targets) / fisher.events)
        slope = mean_(slope, self.process_group)
        factors = self._online_factors()
        root = None if factors is None else factors.preconditioner.inverse_root()
        diagonal = fisher.diagonal(self.probes, self.generator, root=root)
        finite = torch.isfinite(loss) & torch.isfinite(slope).all() & torch.isfinite(diagonal).all()
        slope, diagonal = (torch.where(finite, x, 0.0) for x in (slope, diagonal))
        taken = finite.double()  # 1, or 0 where the step is refused; all ranks agree, since all three are averaged

        params, gain = parameters.tensors, (1 - group["decay"]) * taken
        averages, momenta = self._states("fisher", params), self._states("momentum_buffer", params)
        weights = self._weights(params)  # Σ (1−γ)γᵏ over the steps taken: 1−γᵗ
        torch._foreach_mul_(averages + weights, 1 - gain)
        torch._foreach_add_(averages, torch._foreach_mul(_split(diagonal, averages), gain))
        torch._foreach_add_(weights, gain)
        # A weight is 0 until the first step is taken; average and slope are 0 then too.
        denominators = torch._foreach_div(averages, torch._foreach_clamp_min(weights, torch.finfo(torch.float32).tiny))
        torch._foreach_add_(denominators, group["damping"])
        torch._foreach_mul_(momenta, 1 - (1 - group["momentum"]) * taken)
        if root is None:
            torch._foreach_addcdiv_(momenta, _split(slope, momenta), denominators)
        else:
            step = root(root(slope) / torch.cat([x.flatten() for x in denominators]))
            torch._foreach_add_(momenta, _split(step, momenta))
        if factors is not None and finite:
            factors.update(slope)
        _decay(params, group["lr"] * group["weight_decay"] * taken)
        torch._foreach_add_(params, torch._foreach_mul(momenta, group["lr"] * taken))
        torch.clear_autocast_cache()
        buffers.restore(keep=finite)
        return torch.where(finite, loss, nan)

    def _weights(self, params: Iterable[Tensor]) -> list[Tensor]:
        """What each parameter's running average has to be divided by, (), float64."""
        for p in params:
            if "weight" not in self.state[p]:
                self.state[p]["weight"] = torch.zeros((), dtype=torch.float64, device=p.device)
        return [self.state[p]["weight"] for p in params]


class NGD(_ModelOptimizer):
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
        max_kl: a KL radius δ in nats per event; steps are then shortened until the true KL and the loss agree.
        momentum: μ, in [0, 1); 0 with ``max_kl``, since momentum would carry the model out of the radius.
        weight_decay: decoupled; parameters of one axis (biases, most normalisation) are left alone.
        solver: ``"cg"``; ``"kfac"`` or ``"ekfac"``, which take the Kronecker-factored F̂ + λI for F + λI and its inverse
            for the solution (`npg.curvature.kronecker`); or ``"dense"`` for the report's Algorithm 1 as printed: F as a
            matrix, and its inverse (its pseudo-inverse where λ = 0 and F is singular), for up to some thousands of
            parameters.
        preconditioner: None, ``"kfac"`` or ``"ekfac"``, for conjugate gradients. One iteration is K-FAC's direction at
            the length that is best for F; more of them lead from there to the solution.
        max_iterations: of conjugate gradients, each about the cost of one gradient.
        rtol: conjugate gradients stop where the residual is below ``rtol`` · ‖g‖.
        factor_decay: γ, in [0, 1): F̂ is an average over mini-batches, that of k updates ago with the weight γᵏ.
        update_period: F̂ is updated on each of the first 10 steps and on every ``update_period``-th step after them.
        probes: backward passes per update of F̂; None takes one for each output.
        generator: the source of their signs, and of sampled labels, by default torch's global one, which a checkpoint
            has to hold anyway.
        warm_start: start the solver from this multiple of the last solution; 0 starts from zero.
        damping_metric: ``"identity"``; for ``"cg"`` without a preconditioner or a warm start ``"online"``: solve
            (F + λC) s = g with the metric C that the gradients so far define (`npg.curvature.online`), which also
            preconditions the solver then; for ``"kfac"`` and ``"ekfac"`` ``"factors"``: share λ out to the factors of
            each layer, in proportion to their size (`npg.curvature.kronecker`).
        alpha: smoothing of the online factors, as in `OnlineNGD`.
        curvature_fraction: the leading part of each mini-batch that F is taken on, in (0, 1].
        fisher: ``"exact"``, ``"sampled"`` or ``"empirical"``.
        metric: ``"fisher"``, or another geometry in its place: ``"wasserstein"`` is that of `npg.transport`, and
            ``wasserstein(family, graph)`` that with classes on a graph of your own. ``max_kl`` then bounds ½W₂², and
            the gain that ``damping_control`` compares with is that of the linear model.
        damping_control: adapts λ after each step, which then costs one more forward pass.
        process_group: average over these processes, each of which holds an equal share of the mini-batch. A model in
            DistributedDataParallel brings its own.

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
        solver: Literal["cg", "kfac", "ekfac", "dense"] = "cg",
        preconditioner: Literal["kfac", "ekfac"] | None = None,
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
        metric: Literal["fisher", "wasserstein"] | Geometry = "fisher",
        damping_control: LevenbergMarquardt | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _check(0 <= lr < inf, "lr", lr, "a finite number, 0 or above")
        _check(0 <= damping < inf, "damping", damping, "a finite number, 0 or above")
        _check(max_kl is None or 0 < max_kl < inf, "max_kl", max_kl, "None or a positive KL in nats")
        _check(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        _check(not (momentum and max_kl), "momentum", momentum, "0 with max_kl, whose radius it would break")
        _check(weight_decay >= 0, "weight_decay", weight_decay, "0 or above")
        _check(solver in ("cg", "kfac", "ekfac", "dense"), "solver", solver, "'cg', 'kfac', 'ekfac' or 'dense'")
        _check(preconditioner in (None, "kfac", "ekfac"), "preconditioner", preconditioner, "None, 'kfac' or 'ekfac'")
        _check(preconditioner is None or solver == "cg", "preconditioner", preconditioner, "None without solver='cg'")
        _check(max_iterations >= 1, "max_iterations", max_iterations, "at least 1")
        _check(rtol >= 0, "rtol", rtol, "0 or above")
        _check(0 <= warm_start <= 1, "warm_start", warm_start, "in [0, 1]")
        _check(not warm_start or solver == "cg", "warm_start", warm_start, f"0 with solver={solver!r}")
        _check(0 <= factor_decay < 1, "factor_decay", factor_decay, "in [0, 1)")
        _check(update_period >= 1, "update_period", update_period, "at least 1")
        _check(probes is None or probes >= 1, "probes", probes, "None or at least 1")
        approximation = solver if solver in ("kfac", "ekfac") else preconditioner
        metrics = ("identity", "online", "factors")
        _check(damping_metric in metrics, "damping_metric", damping_metric, "'identity', 'online' or 'factors'")
        if damping_metric == "factors":
            _check(solver in ("kfac", "ekfac"), "solver", solver, "'kfac' or 'ekfac' with damping_metric='factors'")
        if damping_metric == "online":
            _check(solver == "cg", "solver", solver, "'cg' with damping_metric='online'")
            _check(preconditioner is None, "preconditioner", preconditioner, "None with damping_metric='online'")
            _check(not warm_start, "warm_start", warm_start, "0 with damping_metric='online'")
        _check(0 < curvature_fraction <= 1, "curvature_fraction", curvature_fraction, "in (0, 1]")
        self.metric = geometry(metric, family)
        _check(fisher == "exact" or self.metric is None, "fisher", fisher, "'exact' with another metric")
        _check(approximation is None or self.metric is None, "metric", metric, f"'fisher' with {approximation}")
        defaults = {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(model, family, defaults, fisher, process_group, damping_metric, alpha)
        self.trust_region = None if max_kl is None else TrustRegion(max_kl)
        self.damping_control = damping_control
        self.warm_start, self.curvature_fraction = warm_start, curvature_fraction
        self.solver, self.preconditioner, self.probes, self.generator = solver, preconditioner, probes, generator
        self.factor_decay, self.update_period = factor_decay, update_period
        self._solver: Solver = partial(dense_solve, method="eigh")
        if solver == "cg":
            self._solver = partial(conjugate_gradient, max_iterations=max_iterations, rtol=rtol)

    @torch.no_grad()
    def step(self, inputs: Any, targets: Tensor) -> StepReport:  # type: ignore[override]
        """Take one step on a mini-batch; a step that is refused leaves everything as it was but the damping.

        Args:
            inputs: a tensor, or a tuple of the model's positional arguments.
            targets: in the shape that ``family.log_likelihood`` takes.
        """
        group = self.param_groups[0]
        params = self._trainable()
        # A scheduler may have set it since: OneCycleLR does, unless cycle_momentum=False.
        momentum = group["momentum"]
        _check(not (momentum and self.trust_region), "momentum", momentum, "0 with max_kl, whose radius it would break")
        solver, x0, fraction = self._solver, None, self.curvature_fraction
        kronecker = _Kronecker(self, params) if {self.solver, self.preconditioner} & {"kfac", "ekfac"} else None
        if kronecker is not None and self.preconditioner is None:
            solver = kronecker.solve
            fraction = fraction if kronecker.due else 1.0  # no F is looked at, so that none is linearised for itself
        part = slice(ceil(fraction * len(targets)))
        curvature_inputs = None
        if fraction < 1:
            curvature_inputs = tree_map(lambda x: x[part] if isinstance(x, Tensor) else x, inputs)
        if (factors := self._online_factors()) is not None:
            solver = partial(solve_in_metric, root=factors.preconditioner.inverse_root(), solver=self._solver)
        if self.warm_start:
            x0 = self.warm_start * torch.cat([s.flatten() for s in self._states("solution", params)])
        report = natural_step(
            self.model,
            inputs,
            self.family,
            lambda outputs: self.family.log_likelihood(outputs, targets).mean(),
            trust_region=self.trust_region,
            learning_rate=group["lr"],
            damping=group["damping"],
            solver=solver,
            fisher=partial(
                Fisher,
                kind=self.fisher,
                targets=targets[part] if self.fisher == "empirical" else None,
                generator=self.generator,
            ),
            metric=self.metric,
            curvature_inputs=curvature_inputs,
            preconditioner=None if self.preconditioner is None else kronecker,
            x0=x0,
            # the Hessian of the loss is about the Fisher information, and about no other metric
            objective_curvature=1.0 if self.metric is None else 0.0,
            evaluate=self.damping_control is not None,
            process_group=self.process_group,
        )
        if report.accepted:
            if momentum:
                momenta = self._states("momentum_buffer", params)
                torch._foreach_mul_(momenta, momentum)
                torch._foreach_add_(params, momenta)
                torch._foreach_add_(momenta, _split(report.step, momenta))
            if self.warm_start:
                torch._foreach_copy_(self._states("solution", params), _split(report.solution, params))
            if factors is not None:
                factors.update(report.gradient)
            if kronecker is not None:
                kronecker.keep()
            _decay(params, group["lr"] * group["weight_decay"])
            torch.clear_autocast_cache()
        if self.damping_control is not None:
            group["damping"] = self.damping_control.update(
                group["damping"], report.predicted_gain, report.actual_gain, report.accepted
            )
        return report


class _TrackedFactors:
    """`OnlineNGD`'s factors of the gradients of a model, with its defaults; the optimizer's state is views of them.

    Gradients are the same on all processes, and so are the factors.
    """

    def __init__(self, params: list[Tensor], states: Mapping[Tensor, dict[str, Any]], alpha: float) -> None:
        self.params = [p for p in params if p.numel() > 0]
        own = [states[p] for p in self.params]
        self.count = int(own[0].get("step", 0))
        self.step = torch.tensor(self.count, device="cpu")
        self.preconditioner = OnlinePreconditioner(self.params, own, alpha=alpha)
        for state in own:
            state["step"] = self.step

    def cover(self, params: list[Tensor]) -> bool:
        """Whether these are the parameters, empty ones aside."""
        return {*self.params} == {p for p in params if p.numel() > 0}

    def update(self, gradient: Tensor) -> None:
        """Count a step, and take its gradient in where it is due, (P,)."""
        if _is_due(self.count, UPDATE_PERIOD):
            self.preconditioner(_split(gradient, self.params), update=True, first=self.count == 0)
        self.count += 1
        self.step.fill_(self.count)


class _Kronecker:
    """F̂ of a step of `NGD`, its solver or preconditioner: updated where that is due, kept if the step is taken."""

    def __init__(self, optimizer: NGD, params: list[Tensor]) -> None:
        self.optimizer, self.params = optimizer, params
        self.step = int(optimizer.state[params[0]].get("step", 0))
        # The state names parameters by their places in the group, which do not change when some are frozen.
        places = {id(p): place for place, p in enumerate(optimizer.param_groups[0]["params"])}
        self.places = [places[id(p)] for p in params]
        index = {place: i for i, place in enumerate(self.places)}
        self.blocks: dict[tuple[int, ...], Block | Multiple] = {}
        for state in (optimizer.state[p] for p in params if "kfac_key" in optimizer.state[p]):
            key = state["kfac_key"].tolist()
            if all(place in index for place in key):
                kind = Block if "kfac_inputs" in state else Multiple
                fields = {name: state[f"kfac_{name}"] for name in kind._fields}
                self.blocks[tuple(index[place] for place in key)] = kind(**fields)

    def __call__(self, fisher: Fisher, damping: float) -> Callable[[Tensor], Tensor]:
        """R ↦ (F̂ + λI)⁻¹ r."""
        return self._approximation(fisher).inverse(damping)

    def solve(self, A: Fisher, b: Tensor, /, *, x0: Tensor | None = None, damping: float = 0.0) -> Solution:
        """(F̂ + λI)⁻¹ b."""
        shared = self.optimizer.damping_metric == "factors"
        return self._approximation(A).solve(b, damping=damping, shared=shared)

    @property
    def due(self) -> bool:
        """Whether this step updates F̂; it does where F̂ does not have each parameter once."""
        covered = sorted(i for key in self.blocks for i in key)
        return covered != list(range(len(self.params))) or _is_due(self.step, self.optimizer.update_period)

    def _approximation(self, fisher: Fisher) -> KroneckerFisher:
        optimizer = self.optimizer
        if not self.due:
            return KroneckerFisher.of(fisher.parameters, self.blocks)
        approximation = KroneckerFisher(
            fisher,
            corrected="ekfac" in (optimizer.solver, optimizer.preconditioner),
            probes=optimizer.probes,
            generator=optimizer.generator,
            previous=self.blocks,
            decay=optimizer.factor_decay,
        )
        self.blocks = approximation.blocks
        return approximation

    def keep(self) -> None:
        """Count the step, and put F̂ into the optimizer's state."""
        states = [self.optimizer.state[p] for p in self.params]
        for state in states:
            for name in [name for name in state if name.startswith("kfac_")]:
                del state[name]
            state["step"] = torch.tensor(self.step + 1)
        for key, block in self.blocks.items():
            fields = {f"kfac_{name}": value for name, value in block._asdict().items()}
            states[key[0]].update({"kfac_key": torch.tensor([self.places[i] for i in key]), **fields})


def _split(vector: Tensor, like: _Tensors) -> list[Tensor]:
    """(P,) → views shaped like the tensors."""
    parts = vector.split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]
