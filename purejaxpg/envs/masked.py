"""CartPole without its velocities, for policies with a memory."""

from typing import Any

import jax
import jax.numpy as jnp
from gymnax.environments import spaces
from gymnax.environments.classic_control import cartpole

NAME = "MaskedCartPole-v1"


class MaskedCartPole(cartpole.CartPole):
    """CartPole-v1 of which only the positions are seen: x of the cart, θ of the pole.

    A single observation does not show where the pole is moving, so a policy has to remember. The
    class keeps the name of CartPole-v1, by which gymnax knows how to draw it.
    """

    def get_obs(self, state: Any, params: Any = None, key: Any = None) -> jax.Array:
        """Return x and θ [2]."""
        return jnp.array([state.x, state.theta])

    def observation_space(self, params: Any) -> spaces.Box:
        """Return the bounds of x and θ, twice those at which an episode ends."""
        high = 2 * jnp.array([params.x_threshold, params.theta_threshold_radians])
        return spaces.Box(-high, high, (2,), dtype=jnp.float32)
