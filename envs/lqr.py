"""The one-dimensional linear-quadratic task of Kakade (2001), with cost, gradient and Fisher matrix in closed form.

x' = 0.7 x + u + ε with ε ~ N(0, 1), from x(0) = 0; the cost of an episode is Σ_{t=1}^{20} x(t)².

The paper's policy, with two scales s₁ and s₂ that change the parameters' units and nothing else, is

    π(u; x, θ) ∝ exp(θ₁ s₁ u² + θ₂ s₂ u x),    a Gaussian N(k x, v) with k = −θ₂s₂ / 2θ₁s₁ and v = −1 / 2θ₁s₁.

(The paper prints x² and x in the exponent, which would not depend on u.) Under it the state is a Gaussian process with
E x(t)² = w Σ_{j<t} qʲ, where c = 0.7 + k, q = c² and w = 1 + v. Everything below follows from that sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.polynomial import Polynomial
from numpy.typing import ArrayLike, NDArray

from envs.batch import Batch, NativeVectorEnv, SingleEnv

__all__ = ["HORIZON", "LQREnv", "LQRVectorEnv", "cost", "fisher", "gain_and_variance", "gradient", "start"]

DRIFT = 0.7
HORIZON = 20
ACTION_BOUND = 100.0


def start(scales: ArrayLike = (1.0, 1.0)) -> NDArray[np.float64]:
    """Kakade's initial θ: θ₁s₁ = θ₂s₂ = −0.8, the same policy N(−x/2, 0.625) for all scales."""
    return -0.8 / np.asarray(scales, dtype=np.float64)


def gain_and_variance(theta: ArrayLike, scales: ArrayLike = (1.0, 1.0)) -> tuple[float, float]:
    """(k, v) of the policy N(k x, v).

    Raises:
        ValueError: if θ₁s₁ ≥ 0, where the policy has no density.
    """
    a, b = np.asarray(theta, dtype=np.float64) * np.asarray(scales, dtype=np.float64)
    if not a < 0:
        raise ValueError(f"theta[0] * scales[0] must be negative for the policy to have a density, got {a}")
    return -b / (2 * a), -1 / (2 * a)


# P(q) = Σ_{j<H} (H−j) qʲ: w P(q) = Σ E x(t)² over t = 1, …, H; with H − 1 in the place of H, over the t < H.
_P = Polynomial(HORIZON - np.arange(HORIZON))
_P_SLOPE = _P.deriv()
_P_BEFORE = Polynomial(HORIZON - 1 - np.arange(HORIZON - 1))


def cost(theta: ArrayLike, scales: ArrayLike = (1.0, 1.0)) -> float:
    """J(θ) = E Σ_{t=1}^{H} x(t)² = w P(q), in units of x² per episode; it falls to 20 as v → 0 and k → −0.7."""
    k, v = gain_and_variance(theta, scales)
    return (1 + v) * _P((DRIFT + k) ** 2)


def gradient(theta: ArrayLike, scales: ArrayLike = (1.0, 1.0)) -> NDArray[np.float64]:
    """∇J(θ), shape (2,): ∂J/∂v = P(q), ∂J/∂k = 2 c w P'(q), and the chain rule through (k, v)."""
    s1, s2 = np.asarray(scales, dtype=np.float64)
    k, v = gain_and_variance(theta, scales)
    c = DRIFT + k
    by_v = _P(c * c)
    by_k = 2 * c * (1 + v) * _P_SLOPE(c * c)
    # With a = θ₁s₁, b = θ₂s₂:  ∂v/∂a = 2v²,  ∂k/∂a = 2vk,  ∂v/∂b = 0,  ∂k/∂b = v.
    return np.array([s1 * (2 * v * v * by_v + 2 * v * k * by_k), s2 * v * by_k])


def fisher(theta: ArrayLike, scales: ArrayLike = (1.0, 1.0)) -> NDArray[np.float64]:
    """F(θ) = (1/H) Σ_{t<H} E[∇log π ∇log πᵀ], shape (2, 2), over the states x(0), …, x(H−1) in which the policy acts.

    The policy is an exponential family with statistics (s₁u², s₂ux), so that, given x, F is their covariance; with
    u | x ~ N(kx, v) and M = (1/H) Σ_{t<H} E x(t)² it is

        F = diag(s) [[2v² + 4vk²M, 2vkM], [2vkM, vM]] diag(s).
    """
    s = np.asarray(scales, dtype=np.float64)
    k, v = gain_and_variance(theta, scales)
    moment = (1 + v) * _P_BEFORE((DRIFT + k) ** 2) / HORIZON
    cross = 2 * v * k * moment
    return np.outer(s, s) * np.array([[2 * v * v + 4 * v * k * k * moment, cross], [cross, v * moment]])


class LQR(Batch):
    """n copies of the task; reward −x(t+1)² for the action in x(t), and the episode ends after 20 steps.

    The bound on actions exists because Gymnasium and Stable-Baselines3 expect one; the policies of the paper would have
    to draw a hundred standard deviations to meet it, and an action beyond it is an error, never clipped in silence.
    """

    def __init__(self, n: int) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Box(-ACTION_BOUND, ACTION_BOUND, (1,), np.float32)
        self.states = np.zeros(n)
        self._noise = np.zeros((n, HORIZON))
        self._time = np.zeros(n, dtype=np.int64)
        self._generators = [None] * n

    def restart(self, which: NDArray[np.intp]) -> None:
        self.states[which] = 0.0
        self._time[which] = 0
        for i in which:  # one draw per episode, so that the steps themselves are pure array arithmetic
            self._generators[i].standard_normal(out=self._noise[i])

    def step(self, actions: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        u = actions[:, 0].astype(np.float64)
        bad = np.flatnonzero(~(np.abs(u) <= ACTION_BOUND))
        if len(bad):
            raise ValueError(
                f"action must be a finite number in [−{ACTION_BOUND:g}, {ACTION_BOUND:g}], "
                f"got {u[bad[0]]} in copy {bad[0]}"
            )
        if (self._time >= HORIZON).any():
            raise ValueError(f"the episode is over after {HORIZON} steps: call reset()")
        self.states = DRIFT * self.states + u + self._noise[np.arange(len(u)), self._time]
        self._time += 1
        return -np.square(self.states), self._time >= HORIZON

    def observe(self) -> NDArray[np.float32]:
        return self.states[:, None].astype(np.float32)

    def text(self, index: int) -> str:
        x = self.states[index]
        cells = ["·"] * 41
        cells[20] = "|"
        cells[int(np.clip(round(20 + 4 * x), 0, 40))] = "●"
        return f"t={self._time[index]:2d}  x={x:+7.3f}  {''.join(cells)}"

    def picture(self, index: int) -> NDArray[np.uint8]:
        image = np.full((64, 256, 3), 255, dtype=np.uint8)
        rows, columns = np.mgrid[:64, :256]
        image[:, 127:129] = 180
        image[np.hypot(rows - 32, columns - np.clip(128 + 24 * self.states[index], 0, 255)) < 10] = (0, 114, 178)
        return image


class LQREnv(SingleEnv):
    """One copy of the linear-quadratic task. See the module's page."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(LQR(1), render_mode)


class LQRVectorEnv(NativeVectorEnv):
    """n copies of the linear-quadratic task, stepped as arrays."""

    def __init__(self, num_envs: int = 1, max_episode_steps: int | None = None, render_mode: str | None = None) -> None:
        super().__init__(LQR(num_envs), num_envs, max_episode_steps, render_mode)
