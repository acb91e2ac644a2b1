"""The deterministic policy gradient against differences, the chain rule and linear control.

The task with a known answer is the linear quadratic regulator of `regulator`. Values are quadratic,
so a mean over states is a sum over the columns of a root of their second moment: nothing here is
sampled.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import regulator
import rlax

from purejaxpg.kernels import distributions, losses

pytestmark = pytest.mark.fast

TASK = regulator.Regulator(
    A=np.array([[1.0, 0.3, 0.0], [-0.2, 0.9, 0.4], [0.1, 0.0, 0.8]]),
    B=np.array([[0.2, 0.0], [1.0, 0.3], [0.0, 0.7]]),
    Q=np.diag([1.0, 0.5, 0.2]),
    R=np.array([[0.3, 0.05], [0.05, 0.2]]),
    start=np.array([[1.0, 0.2, 0.0], [0.2, 0.7, 0.1], [0.0, 0.1, 0.5]]),
)
GAIN = np.array([[0.3, 0.2, 0.1], [-0.2, 0.1, 0.4]])


@jax.jit
def loss_gradient(gain, p, state):
    def loss(k):
        return losses.deterministic_policy(TASK.action_value(p, state, -state @ k.T)).sum()

    return jax.grad(loss)(gain)


def policy_gradient(gain, state):
    """Gradient of the loss summed over states, with an exact critic as data: [U, X]."""
    return np.asarray(loss_gradient(gain, TASK.cost_to_go(gain), state))


def differences(function, at, step=1e-5):
    gradient = np.zeros_like(at)
    for i in np.ndindex(*at.shape):
        move = np.zeros_like(at)
        move[i] = step
        gradient[i] = (function(at + move) - function(at - move)) / (2.0 * step)
    return gradient


def actor(parameters, state):
    return jnp.tanh(jnp.tanh(state @ parameters["inner"]) @ parameters["outer"])


def critic(state, action):
    """A smooth function that is not quadratic."""
    return jnp.sin(state.sum(-1)) * action[:, 0] + jnp.cos(action[:, 1] * state[:, 0] - 0.3)


def actor_batch():
    draw = np.random.default_rng(0)
    parameters = {"inner": draw.normal(size=(3, 4)), "outer": draw.normal(size=(4, 2))}
    return jax.tree.map(jnp.asarray, parameters), jnp.asarray(draw.normal(size=(16, 3)))


def actor_gradient():
    parameters, state = actor_batch()
    return jax.grad(lambda x: losses.deterministic_policy(critic(state, actor(x, state))).mean())(
        parameters
    )


@pytest.mark.parametrize("name", ["inner", "outer"])
def test_the_gradient_is_that_of_differences(name):
    parameters, state = actor_batch()

    def mean_value(x):
        return float(critic(state, actor({**parameters, name: x}, state)).mean())

    expected = -differences(mean_value, np.array(parameters[name]))
    np.testing.assert_allclose(actor_gradient()[name], expected, atol=1e-8)
    assert np.abs(expected).max() > 0.01


def test_the_gradient_is_the_chain_rule():
    parameters, state = actor_batch()
    slope = jax.vmap(jax.grad(lambda a, s: critic(s[None], a[None])[0]), (0, 0))(
        actor(parameters, state), state
    )
    jacobian = jax.jacobian(actor)(parameters, state)
    for name, actual in actor_gradient().items():
        expected = -jnp.einsum("ba,ba...->...", slope, jacobian[name]) / len(state)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_the_gradient_is_that_of_rlax():
    parameters, state = actor_batch()
    slope = jax.vmap(jax.grad(lambda a, s: critic(s[None], a[None])[0]), (0, 0))(
        actor(parameters, state), state
    )

    def peer(x):
        loss = jax.vmap(lambda a, dqda: rlax.dpg_loss(a, dqda, dqda_clipping=None))
        return loss(actor(x, state), slope).sum(-1).mean()

    expected = jax.grad(peer)(parameters)
    for name, actual in actor_gradient().items():
        np.testing.assert_allclose(actual, expected[name], rtol=1e-12)


def test_a_stored_action_carries_no_gradient_to_the_actor():
    parameters, state = actor_batch()
    action = actor(parameters, state)
    gradient = jax.grad(
        lambda x: losses.deterministic_policy(critic(state, action)).mean() + 0.0 * x["inner"].sum()
    )(parameters)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_the_loss_has_a_slope_in_the_critic_that_must_not_be_followed():
    _, state = actor_batch()
    scale = jax.grad(lambda w: losses.deterministic_policy(w * jnp.ones(len(state))).mean())(1.0)
    assert float(scale) == -1.0


@pytest.mark.parametrize("gain", [GAIN, 0.5 * GAIN, np.zeros((2, 3))], ids=["some", "half", "none"])
def test_on_a_linear_regulator_it_is_the_gradient_of_the_cost(gain):
    moment = TASK.second_moment(gain)
    actual = policy_gradient(gain, np.linalg.cholesky(moment).T)
    np.testing.assert_allclose(actual, TASK.gradient(gain), rtol=1e-10)
    np.testing.assert_allclose(actual, differences(TASK.total_cost, gain), rtol=1e-6, atol=1e-6)


def test_with_the_states_of_the_start_alone_it_is_another_gradient():
    actual = policy_gradient(GAIN, np.linalg.cholesky(TASK.start).T)
    assert np.abs(actual - differences(TASK.total_cost, GAIN)).max() > 0.1


def states_of_the_policy(gain):
    return np.linalg.cholesky(TASK.second_moment(gain)).T


def states_of_a_memory(_):
    """Any states that span the space will do: the critic knows the future."""
    return np.array([[1.0, 0.5, 0.0], [0.0, 1.0, -0.5], [0.3, 0.0, 1.0]])


@pytest.mark.parametrize("states", [states_of_the_policy, states_of_a_memory])
def test_gradient_steps_reach_the_gain_of_the_riccati_equation(states):
    gain = GAIN
    for _ in range(1500):
        gain = gain - 0.05 * policy_gradient(gain, states(gain))
    best = TASK.best_gain()
    np.testing.assert_allclose(gain, best, atol=1e-6)
    assert np.abs(GAIN - best).max() > 0.1
    assert TASK.total_cost(gain) < TASK.total_cost(GAIN) - 0.1
    np.testing.assert_allclose(differences(TASK.total_cost, best), np.zeros((2, 3)), atol=1e-6)


def noise_grid(num_points=4):
    """Nodes [N, 2] and weights [N] that integrate polynomials of degree 7 against N(0, 1)."""
    node, weight = np.polynomial.hermite_e.hermegauss(num_points)
    pairs = np.stack(np.meshgrid(node, node), -1).reshape(-1, 2)
    weights = np.outer(weight, weight).ravel()
    return pairs, weights / weights.sum()


@pytest.mark.parametrize("std", [0.1, 0.7])
@pytest.mark.parametrize("baseline", [0.0, 5.0])
def test_the_score_function_has_the_same_mean_on_the_regulator(std, baseline):
    moment = TASK.second_moment(GAIN, std)
    state = np.linalg.cholesky(moment).T[:, None]  # [3, 1, X]
    noise, weight = noise_grid()
    p = TASK.cost_to_go(GAIN)
    action = -state @ GAIN.T + std * noise  # [3, N, U]
    advantage = TASK.action_value(p, jnp.asarray(state), jnp.asarray(action)) - baseline

    def loss(gain):
        mean = jnp.broadcast_to(-state @ gain.T, action.shape)
        policy = distributions.diag_gaussian(mean, jnp.full(2, np.log(std)))
        return jnp.sum(weight[None] * losses.score_function(policy.log_prob(action), advantage))

    actual = jax.grad(loss)(jnp.asarray(GAIN))
    np.testing.assert_allclose(actual, TASK.gradient(GAIN, std), rtol=1e-9)
    np.testing.assert_allclose(actual, policy_gradient(GAIN, state[:, 0]), rtol=1e-9)
    expected = differences(lambda k: TASK.total_cost(k, std), GAIN)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tau", [0.005, 0.3, 1.0])
def test_a_target_network_forgets_its_start_geometrically(tau):
    online, start = jnp.array([1.0, -2.0, 0.5]), jnp.array([4.0, 0.0, -3.0])
    target = start
    for k in range(1, 21):
        target = optax.incremental_update(online, target, tau)
        rest = (1.0 - tau) ** k
        np.testing.assert_allclose(target, (1.0 - rest) * online + rest * start, rtol=1e-12)
