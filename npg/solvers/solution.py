"""What every solver takes and gives: an operator, a status, a solution; and the arithmetic that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import inf, nan
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from npg.checks import number
from npg.parameters import power_of_two

__all__ = [
    "CODE",
    "ORDER",
    "RUNNING",
    "AnyOperator",
    "LinearOperator",
    "Solution",
    "Solver",
    "Status",
    "check_damping",
    "check_system",
    "column_units",
    "dot_in_double",
    "finish",
    "library",
    "norm",
    "norms_in_double",
    "not_finite",
    "product_of",
]


class LinearOperator(Protocol):
    """What the solvers ask of A: its product with (P,) or (P, K)."""

    def __matmul__(self, v: Tensor, /) -> Tensor: ...


#: A as the solvers take it: with ``A @ v``, or the function v ↦ Av.
AnyOperator = LinearOperator | Callable[[Tensor], Tensor]


class Status(Enum):
    """How a solve ended. ``x`` is finite after every status but ``NON_FINITE``, and zero where nothing was found.

    * ``CONVERGED``: the residual of x, as it is returned, is within the tolerance, to the rounding of its dtype; or
      the quadratic model has come to rest (``progress_tolerance``); or x is the pseudo-inverse's (``"eigh"``).
    * ``ITERATION_LIMIT``: x is the last iterate.
    * ``NEGATIVE_CURVATURE``: A + λI has a direction of negative curvature; x is the last iterate before it.
    * ``BREAKDOWN``: no further digit can be had (a singular system, a preconditioner that is not positive, a solution
      smaller than the numbers of its dtype); x is the last good iterate.
    * ``NON_FINITE``: b, x₀, a product or its square is not finite, or the solution is larger than the numbers of its
      dtype.
    """

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration limit"
    NEGATIVE_CURVATURE = "negative curvature"
    BREAKDOWN = "breakdown"
    NON_FINITE = "non-finite"


@dataclass(frozen=True)
class Solution:
    """What a solve found, and what it knows without another product.

    Attributes:
        x: the solution, (P,) or (P, K). After negative curvature or breakdown, the best iterate before it.
        status: how it ended; for several right-hand sides the worst of ``statuses``.
        statuses: one per right-hand side.
        iterations: products with A in the main loop (the largest count over right-hand sides).
        residual_norm: ‖b − (A + λI)x‖ / ‖b‖, () or (K,); 0 for b = 0.
        curvature: xᵀ(A + λI)x = xᵀ(b − r), () or (K,).
        model_value: ½xᵀ(A + λI)x − bᵀx = −½xᵀ(b + r), () or (K,); what the quadratic falls by from x = 0.
    """

    x: Tensor
    status: Status
    statuses: tuple[Status, ...]
    iterations: int
    residual_norm: Tensor
    curvature: Tensor
    model_value: Tensor


class Solver(Protocol):
    """A solver with its options bound."""

    def __call__(self, A: Any, b: Tensor, /, *, x0: Tensor | None = None, damping: float = 0.0) -> Solution:
        """Solve (A + λI) x = b."""
        ...


ORDER = [
    Status.CONVERGED,
    Status.ITERATION_LIMIT,
    Status.BREAKDOWN,
    Status.NEGATIVE_CURVATURE,
    Status.NON_FINITE,
]
CODE = {status: code for code, status in enumerate(ORDER)}
RUNNING = -1


def product_of(A: AnyOperator, name: str = "A") -> Callable[[Tensor], Tensor]:
    """V ↦ A v, from an operator with ``A @ v`` or from that function itself; each product is looked at.

    Raises:
        TypeError: if A, the argument ``name``, is neither, or takes no tensors; and, from the function, if a product is
            no tensor.
        ValueError: from the function, if a product has another shape than v, or v itself was changed.
    """
    if isinstance(A, np.ndarray):
        raise TypeError(f"{name} must take tensors, got a NumPy array: give torch.as_tensor({name})")
    if hasattr(type(A), "__matmul__"):
        apply: Callable[[Tensor], Tensor] = cast(LinearOperator, A).__matmul__
    elif callable(A):
        apply = A
    else:
        raise TypeError(
            f"{name} must have products {name} @ v, or be a function v ↦ {name} v, got {type(A).__name__}: give a "
            "matrix, an operator such as npg.Fisher, or lambda v: …"
        )

    def product(v: Tensor) -> Tensor:
        version = None if v.is_inference() else v._version
        w = apply(v)
        if not isinstance(w, Tensor):
            raise TypeError(
                f"{name} must map tensors to tensors, got {type(w).__name__}: convert its result, as in "
                f"lambda v: torch.as_tensor({name} @ v.numpy())"
            )
        if w.shape != v.shape:
            raise ValueError(
                f"{name} must map vectors of shape {tuple(v.shape)}, that of b, to the same shape, got {tuple(w.shape)}"
            )
        if version is not None and v._version != version:
            raise ValueError(
                f"{name} changed the vector that it was given: return another tensor, without v.mul_(…), v.div_(…) or "
                "out=v"
            )
        return w

    return product


def check_system(b: Tensor, x0: Tensor | None, damping: float) -> None:
    """Raise ValueError for what no solver takes, and TypeError for what is no tensor."""
    for name, value in (("b", b), ("x0", x0)):
        if value is not None and not isinstance(value, Tensor):
            several = isinstance(value, list | tuple)
            remedy = "torch.nn.utils.parameters_to_vector(…)" if several else "torch.as_tensor(…)"
            raise TypeError(
                f"{name} must be one tensor of shape (P,) or (P, K), got {type(value).__name__}: use {remedy}"
            )
    if b.ndim not in (1, 2) or not b.is_floating_point():
        raise ValueError(f"b must be a floating-point tensor of shape (P,) or (P, K), got {b.dtype} {tuple(b.shape)}")
    if b.ndim == 2 and b.shape[1] == 0:
        raise ValueError(f"b must have at least one column, got {tuple(b.shape)}")
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(f"x0 must have the shape {tuple(b.shape)} of b, got {tuple(x0.shape)}")
    if x0 is not None and x0.dtype != b.dtype:
        raise ValueError(f"x0 must have the dtype {b.dtype} of b, got {x0.dtype}")
    check_damping(damping)


def check_damping(damping: float) -> None:
    """Raise ValueError unless λ is a finite number ≥ 0."""
    number("damping", damping, 0)


def library(device: torch.device) -> Any:
    """NumPy for a few numbers on a CPU, PyTorch elsewhere."""
    return np if device.type == "cpu" else torch


def column_units(B: Tensor) -> tuple[Tensor, Tensor]:
    """Per column the power of two below its largest entry, and whether that is finite; (P, K) → two of (K,).

    Dividing by it changes no digit. It is 1 where the column is zero or not finite.
    """
    largest = B.abs().amax(0) if len(B) else B.new_zeros(B.shape[1])
    return power_of_two(largest), torch.isfinite(largest)


def dot_in_double(x: Tensor, y: Tensor) -> Tensor:
    """Columnwise inner products in float64, where float32 would underflow on small A: (P, K), (P, K) → (K,)."""
    return (x.double() * y.double()).sum(0)


def norms_in_double(x: Tensor) -> Tensor:
    """Columnwise norms whose squares cannot overflow: (P, K) → (K,)."""
    return torch.linalg.vector_norm(x, dim=0, dtype=torch.float64)


def not_finite(b: Tensor) -> Solution:
    """What a solver says of a system whose right-hand side b, (P,), is not finite; no product is spent on it."""
    number = b.new_full((), nan, dtype=torch.float64)
    status = Status.NON_FINITE
    return Solution(torch.full_like(b, nan), status, (status,), 0, number, number, number)


def norm(v: Tensor) -> Tensor:
    """‖v‖ of a vector (P,), () in float64, though the squares of its entries be no numbers."""
    if v.dtype is not torch.float64:  # which holds the squares of all others
        return torch.linalg.vector_norm(v, dtype=torch.float64)
    scale = column_units(v.unsqueeze(1))[0][0]
    return torch.linalg.vector_norm(v / scale) * scale


def finish(
    b: Tensor,
    x: Tensor,
    r: Tensor,
    state: Tensor,
    iterations: Any,
    *,
    scale: Tensor,
    dtype: torch.dtype,
    rtol: float,
    product: Callable[[Tensor], Tensor],
    single: bool,
) -> Solution:
    """The solution, in ``dtype``, of a system whose b, x and r are columns divided by ``scale``.

    Where it leaves the numbers of the dtype, the status is that of what is returned, for one more ``product``.
    """
    norm_b = dot_in_double(b, b).sqrt()
    answer = (x * scale).to(dtype)
    kind = torch.finfo(dtype)
    largest = answer.abs().amax(0) if len(b) else answer.new_zeros(b.shape[1])
    faint = torch.minimum(largest, largest / scale) < kind.tiny / kind.eps  # the smallest entries lose digits
    overflow = ~(largest < inf)
    if bool((faint | overflow).any()):
        faint = faint & (state == CODE[Status.CONVERGED]) & x.any(0)
        x = torch.where(faint, answer.to(x.dtype) / scale, x)
        r = torch.where(faint, b - product(torch.where(faint, x, 0.0)), r)
        worse = faint & ~(norms_in_double(r) <= (rtol + 32 * kind.eps) * norm_b)
        state = torch.where(worse, CODE[Status.BREAKDOWN], state)
        state = torch.where(overflow, CODE[Status.NON_FINITE], state)
    residual = torch.where(norm_b > 0, dot_in_double(r, r).sqrt() / torch.where(norm_b > 0, norm_b, 1.0), 0.0)
    factor = scale.double()  # twice, and not its square, which may be no number where the product is one
    curvature = dot_in_double(x, b - r) * factor * factor
    model_value = -0.5 * dot_in_double(x, b + r) * factor * factor
    x = answer
    statuses = tuple(ORDER[code] for code in state.tolist())
    if single:
        x, residual, curvature, model_value = x[:, 0], residual[0], curvature[0], model_value[0]
    worst = max(statuses, key=ORDER.index)
    return Solution(x, worst, statuses, int(iterations.max()), residual, curvature, model_value)
