"""From one policy to another: what the surrogate says about the return, and what it does not.

J is known for every policy by backward induction, so each statement is an equation or a bound
between two exact numbers. The new policies are the old logits plus a multiple of random ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_mdp

from purejaxpg.kernels import losses

pytestmark = pytest.mark.fast

EXACT = 1e-12

EXAMPLE = tiny_mdp.example()
MDP = EXAMPLE.mdp
OLD = EXAMPLE.logits
BATCH = tiny_mdp.trajectories(MDP)
TIME = np.arange(MDP.horizon)
SIZES = [0.01, 0.1, 1.0, 5.0]


def new_logits(size: float, seed: int = 1) -> np.ndarray:
    return OLD + size * np.random.default_rng(seed).normal(size=OLD.shape)


def advantage() -> jax.Array:
    """A_t(s, a) of the old policy: [T, S, A]."""
    value, action_value = tiny_mdp.values(MDP, OLD)
    return action_value - value[:-1, :, None]


def gain(logits: jax.Array, states_of: jax.Array) -> jax.Array:
    """Σ_t Σ_s γ^t P(s_t = s) Σ_a π(a|s) A_t(s, a), with states of another policy."""
    reached = tiny_mdp.occupancy(MDP, states_of)
    return jnp.einsum("ts,sa,tsa->", reached, jax.nn.softmax(logits), advantage())


def surrogate(logits: jax.Array) -> jax.Array:
    """L(π): the states stay those of the old policy."""
    return tiny_mdp.objective(MDP, OLD) + gain(logits, OLD)


def variation(logits: np.ndarray) -> jax.Array:
    """Total variation between the old and the new actions in each state: [S]."""
    return jnp.abs(jax.nn.softmax(logits) - jax.nn.softmax(OLD)).sum(-1) / 2.0


def divergence(logits: np.ndarray) -> jax.Array:
    """KL(π_old ‖ π) in each state: [S]."""
    old, new = (jax.nn.log_softmax(jnp.asarray(x)) for x in (OLD, logits))
    return jnp.sum(jnp.exp(old) * (old - new), -1)


# --- the performance difference lemma ------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_performance_difference_lemma(size: float) -> None:
    new = new_logits(size)
    difference = tiny_mdp.objective(MDP, new) - tiny_mdp.objective(MDP, OLD)
    assert float(gain(new, states_of=new)) == pytest.approx(float(difference), abs=EXACT)


def test_with_the_states_of_the_old_policy_it_does_not_hold() -> None:
    new = new_logits(1.0)
    difference = tiny_mdp.objective(MDP, new) - tiny_mdp.objective(MDP, OLD)
    assert abs(float(gain(new, states_of=OLD) - difference)) > 0.01


def test_the_greedy_policy_is_no_worse() -> None:
    # Nonnegative gains in every state and at every step: policy iteration.
    best = jnp.argmax(advantage(), -1)
    greedy = 1e3 * jax.nn.one_hot(best, OLD.shape[1])
    improved = tiny_mdp.objective(MDP, greedy) - tiny_mdp.objective(MDP, OLD)
    assert float(improved) > 0.5
    assert float(improved) >= float(jnp.sum(MDP.start * jnp.max(advantage()[0], -1)))


# --- the surrogate -------------------------------------------------------------------------------


def test_the_surrogate_is_right_to_first_order() -> None:
    def objective(logits: jax.Array) -> jax.Array:
        return tiny_mdp.objective(MDP, logits)

    old = jnp.asarray(OLD)
    assert float(surrogate(old)) == pytest.approx(float(objective(old)), abs=EXACT)
    np.testing.assert_allclose(jax.grad(surrogate)(old), jax.grad(objective)(old), atol=EXACT)
    # To second order they differ: L does not know that other actions lead to other states.
    apart = jax.hessian(surrogate)(old) - jax.hessian(objective)(old)
    assert float(jnp.abs(apart).max()) > 0.01


def remainder() -> float:
    """Σ_t t γ^t over the horizon; γ / (1 − γ)² without one."""
    return float(np.sum(TIME * MDP.gamma**TIME))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(5))
def test_the_bound_of_the_surrogate(size: float, seed: int) -> None:
    new = new_logits(size, seed)
    error = abs(float(tiny_mdp.objective(MDP, new) - surrogate(jnp.asarray(new))))
    largest, farthest = float(jnp.abs(advantage()).max()), float(variation(new).max())
    assert 0.0 < error <= 4.0 * largest * remainder() * farthest**2
    assert error <= 2.0 * largest * remainder() * float(divergence(new).max())
    assert remainder() < MDP.gamma / (1.0 - MDP.gamma) ** 2


def test_the_surrogate_alone_promises_too_much() -> None:
    promised, kept = [], []
    for seed in range(20):
        new = jnp.asarray(new_logits(1.0, seed))
        promised.append(float(surrogate(new) - tiny_mdp.objective(MDP, OLD)))
        kept.append(float(tiny_mdp.objective(MDP, new) - tiny_mdp.objective(MDP, OLD)))
    too_much = np.array(promised) - np.array(kept)
    assert too_much.max() > 0.05


@pytest.mark.parametrize("seed", range(5))
def test_the_error_falls_with_the_square_of_the_step(seed: int) -> None:
    far, near = (
        abs(float(tiny_mdp.objective(MDP, new) - surrogate(jnp.asarray(new))))
        for new in (new_logits(1e-2, seed), new_logits(1e-3, seed))
    )
    assert far / near == pytest.approx(100.0, rel=0.1)


def test_the_divergence_is_at_least_twice_the_squared_variation() -> None:
    shares = [
        divergence(new) / variation(new) ** 2
        for new in (new_logits(size, seed) for size in SIZES for seed in range(20))
    ]
    assert float(jnp.min(jnp.stack(shares))) >= 2.0
    # No larger factor would do: around a fair coin, the ratio tends to 2.
    p, q = 0.5, 0.5 + 1e-3
    coin = p * np.log(p / q) + (1.0 - p) * np.log((1.0 - p) / (1.0 - q))
    assert coin / (p - q) ** 2 == pytest.approx(2.0, abs=1e-4)


# --- importance sampling -------------------------------------------------------------------------


def ratio(logits: np.ndarray) -> jax.Array:
    """π(a_t|s_t) / π_old(a_t|s_t) along every trajectory: [T, N]."""
    new, old = (tiny_mdp.log_prob(MDP, jnp.asarray(x), BATCH) for x in (logits, OLD))
    return jnp.exp(new - old)


def under_the_old_policy(x: jax.Array) -> float:
    return float(jnp.sum(tiny_mdp.probability(MDP, OLD, BATCH) * x))


def test_ratios_of_whole_trajectories_are_unbiased() -> None:
    new = new_logits(1.0)
    rewards = jnp.sum(MDP.gamma ** TIME[:, None] * BATCH.reward, 0)
    weighted = under_the_old_policy(jnp.prod(ratio(new), 0) * rewards)
    assert weighted == pytest.approx(float(tiny_mdp.objective(MDP, new)), abs=EXACT)


def test_ratios_of_single_steps_give_the_surrogate() -> None:
    new = new_logits(1.0)
    along = advantage()[TIME[:, None], BATCH.state, BATCH.action]
    weighted = under_the_old_policy(jnp.sum(MDP.gamma ** TIME[:, None] * ratio(new) * along, 0))
    assert weighted == pytest.approx(float(gain(jnp.asarray(new), OLD)), abs=EXACT)
    right = tiny_mdp.objective(MDP, new) - tiny_mdp.objective(MDP, OLD)
    assert abs(weighted - float(right)) > 0.01


def test_the_variance_of_a_product_of_ratios_grows_with_every_factor() -> None:
    products = jnp.cumprod(ratio(new_logits(1.0)), 0)
    means = [under_the_old_policy(row) for row in products]
    np.testing.assert_allclose(means, np.ones(MDP.horizon), atol=EXACT)
    squares = [under_the_old_policy(row**2) for row in products]
    assert squares == sorted(squares)
    assert squares[-1] > 1.5 * squares[0]


# --- what clipping does not do -------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_clipped_objective_is_never_above_the_surrogate(size: float) -> None:
    new, old = (tiny_mdp.log_prob(MDP, jnp.asarray(x), BATCH) for x in (new_logits(size), OLD))
    along = advantage()[TIME[:, None], BATCH.state, BATCH.action]
    clipped = -losses.ppo_clip(new, old, along, 0.2)
    difference = ratio(new_logits(size)) * along - clipped
    assert float(difference.min()) >= 0.0
    assert (float(difference.max()) > 0.1) is (size >= 1.0)


FEATURES = np.random.default_rng(3).normal(size=(3, 2, 2))  # [S, A, K]: fewer parameters than rows


def shared_logits(params: jax.Array) -> jax.Array:
    return jnp.asarray(OLD) + jnp.asarray(FEATURES) @ params


def test_clipping_does_not_keep_a_ratio_in_its_range() -> None:
    # A sample beyond the range no longer pushes, but the others still do, through the parameters
    # that they share.
    weight = tiny_mdp.probability(MDP, OLD, BATCH)
    old_log_prob = tiny_mdp.log_prob(MDP, OLD, BATCH)
    along = advantage()[TIME[:, None], BATCH.state, BATCH.action]

    def loss(params: jax.Array) -> jax.Array:
        log_prob = tiny_mdp.log_prob(MDP, shared_logits(params), BATCH)
        return jnp.sum(weight * losses.ppo_clip(log_prob, old_log_prob, along, 0.2).sum(0))

    def step(params: jax.Array, _: None) -> tuple[jax.Array, None]:
        return params - 0.05 * jax.grad(loss)(params), None

    params, _ = jax.jit(lambda x: jax.lax.scan(step, x, length=400))(jnp.zeros(2))
    old, new = jax.nn.softmax(jnp.asarray(OLD)), jax.nn.softmax(shared_logits(params))
    assert float(loss(params)) < float(loss(jnp.zeros(2))) - 0.01
    assert float((new / old).max()) > 1.3
