"""The discounted linear quadratic regulator, whose matrices give every answer in closed form.

    x' = A x + B u,    u = −K x + σ ε,    ε ~ N(0, 1),    cost x'Qx + u'Ru,    C = E[Σ_t γ^t cost_t]

For γ = 1 and no noise, with x'Px the cost from x onwards and Σ_K = E[Σ_t x_t x_t'], the gradient is
that of Fazel et al. 2018, arXiv:1801.05039:

    ∇C(K) = 2 ((R + B'PB) K − B'PA) Σ_K

A discount turns A and B into √γ A and √γ B, and noise enters the gradient through Σ_K alone.
A `std` below is σ, one number or one for each action; `quadratic` and `action_value` may be traced.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

Array = jax.Array | np.ndarray


def quadratic(matrix: Array, x: Array) -> jax.Array:
    return jnp.einsum("...i,ij,...j->...", x, matrix, x)


@dataclasses.dataclass(frozen=True)
class Regulator:
    """The matrices of a task; a gain K is [U, X]."""

    A: np.ndarray  # [X, X]
    B: np.ndarray  # [X, U]
    Q: np.ndarray  # [X, X] cost of states
    R: np.ndarray  # [U, U] cost of actions
    start: np.ndarray  # [X, X] E[x x'] at the first step
    gamma: float = 0.9

    def cost_to_go(self, gain: Array) -> np.ndarray:
        """P, with x'Px the discounted cost of following the gain from x without noise."""
        closed = np.sqrt(self.gamma) * (self.A - self.B @ gain)
        assert np.abs(np.linalg.eigvals(closed)).max() < 1.0
        return scipy.linalg.solve_discrete_lyapunov(closed.T, self.Q + gain.T @ self.R @ gain)

    def curvature(self, gain: Array) -> np.ndarray:
        """R + γ B'PB: half the second derivative of the cost in the action."""
        return self.R + self.gamma * self.B.T @ self.cost_to_go(gain) @ self.B

    def second_moment(self, gain: Array, std: float | np.ndarray = 0.0) -> np.ndarray:
        """Σ_K = E[Σ_t γ^t x_t x_t'], including the noise of the policy."""
        noise = self.B * np.square(std) @ self.B.T
        closed = np.sqrt(self.gamma) * (self.A - self.B @ gain)
        moment = self.start + self.gamma / (1.0 - self.gamma) * noise
        return scipy.linalg.solve_discrete_lyapunov(closed, moment)

    def total_cost(self, gain: Array, std: float | np.ndarray = 0.0) -> float:
        per_step = np.sum(np.square(std) * np.diag(self.curvature(gain)))
        return np.trace(self.cost_to_go(gain) @ self.start) + per_step / (1.0 - self.gamma)

    def greedy_gain(self, p: np.ndarray) -> np.ndarray:
        """The best gain for one step, if the later steps cost x'Px."""
        b = self.gamma * self.B.T @ p
        return np.linalg.solve(self.R + b @ self.B, b @ self.A)

    def best_gain(self) -> np.ndarray:
        scaled = np.sqrt(self.gamma) * self.A, np.sqrt(self.gamma) * self.B
        return self.greedy_gain(scipy.linalg.solve_discrete_are(*scaled, self.Q, self.R))

    def natural_gradient(self, gain: Array) -> np.ndarray:
        """∇C Σ_K⁻¹ = 2 ((R + γB'PB) K − γB'PA), for any visited states."""
        pull = self.gamma * self.B.T @ self.cost_to_go(gain) @ self.A
        return 2.0 * (self.curvature(gain) @ gain - pull)

    def gradient(self, gain: Array, std: float | np.ndarray = 0.0) -> np.ndarray:
        """∇C(K)."""
        return self.natural_gradient(gain) @ self.second_moment(gain, std)

    def action_value(self, p: Array, state: Array, action: Array) -> jax.Array:
        """Q(x, u), as a reward and up to a constant, of the policy with cost-to-go p: [...]."""
        after = state @ self.A.T + action @ self.B.T
        cost = quadratic(self.Q, state) + quadratic(self.R, action)
        return -(cost + self.gamma * quadratic(p, after))
