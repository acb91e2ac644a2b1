"""A critic whose features are the scores of the policy: exact gradients from an inexact critic.

The policy has two parameters, far too few to represent its own Q by its scores. Expectations are
sums over steps, states and actions, each with its discounted probability.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_mdp

pytestmark = pytest.mark.fast

MDP = tiny_mdp.example().mdp
EXACT = 1e-12
SIZE = 2
SOURCE = np.random.default_rng(3)
FEATURES = SOURCE.normal(size=(3, 2, SIZE))  # [S, A, K]
PARAMS = SOURCE.normal(size=SIZE)
OTHERS = SOURCE.normal(size=(3, 2, SIZE))


def logits(params: jax.Array) -> jax.Array:
    return jnp.asarray(FEATURES) @ params


def score() -> jax.Array:
    """∇log π(a|s): [S, A, K]."""
    return jax.jacobian(lambda x: jax.nn.log_softmax(logits(x)))(jnp.asarray(PARAMS))


def weights(discounted: bool = True) -> jax.Array:
    """γ^t P(s_t = s) π(a|s): [T, S, A]."""
    reached = tiny_mdp.occupancy(MDP, logits(PARAMS))
    if not discounted:
        reached = reached / MDP.gamma ** np.arange(MDP.horizon)[:, None]
    return reached[..., None] * jax.nn.softmax(logits(PARAMS))[None]


def action_value() -> jax.Array:
    return tiny_mdp.values(MDP, logits(PARAMS))[1]


def fitted(features: jax.Array, discounted: bool = True) -> jax.Array:
    """Weights of least squared error against Q: [K]."""
    moment = jnp.einsum("tsa,sai,saj->ij", weights(discounted), features, features)
    pull = jnp.einsum("tsa,sai,tsa->i", weights(discounted), features, action_value())
    return jnp.linalg.solve(moment, pull)


def gradient(value: jax.Array) -> jax.Array:
    """Σ γ^t P(s_t = s) π(a|s) ∇log π(a|s) f(s, a): [K]."""
    everywhere = jnp.broadcast_to(value, weights().shape)
    return jnp.einsum("tsa,sak,tsa->k", weights(), score(), everywhere)


def exact_gradient() -> jax.Array:
    return jax.grad(lambda x: tiny_mdp.objective(MDP, logits(x)))(jnp.asarray(PARAMS))


def test_a_compatible_critic_gives_the_exact_gradient() -> None:
    critic = score() @ fitted(score())
    np.testing.assert_allclose(gradient(critic), exact_gradient(), atol=EXACT)
    # It is not the advantage itself.
    value = jnp.sum(jax.nn.softmax(logits(PARAMS))[None] * action_value(), -1, keepdims=True)
    assert float(jnp.abs(critic[None] - (action_value() - value)).max()) > 0.1


def test_other_features_give_another_gradient() -> None:
    others = jnp.asarray(OTHERS)
    error = gradient(others @ fitted(others)) - exact_gradient()
    assert float(jnp.abs(error).max()) > 0.05


def test_a_fit_to_other_weights_gives_another_gradient() -> None:
    # The fit and the gradient must weight the steps alike.
    critic = score() @ fitted(score(), discounted=False)
    assert float(jnp.abs(gradient(critic) - exact_gradient()).max()) > 1e-3


def test_its_weights_are_the_natural_gradient() -> None:
    fisher = jnp.einsum("tsa,sai,saj->ij", weights(), score(), score())
    natural = jnp.linalg.solve(fisher, exact_gradient())
    np.testing.assert_allclose(fitted(score()), natural, rtol=1e-9)
    along = jnp.sum(natural * exact_gradient()) / jnp.linalg.norm(natural)
    assert float(along / jnp.linalg.norm(exact_gradient())) < 0.999
