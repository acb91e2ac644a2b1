"""Returns and advantages along the leading, time axis.

Row t is one step and everything it returned. `terminated` means that nothing follows, so there is
no value to bootstrap from. `done` means that row t + 1 belongs to another episode, so no sum may
run into it. A truncated step is done but not terminated: it bootstraps from its own `next_value`,
the value of the observation before any reset. `terminated` implies `done` throughout.

`value` and `next_value` are usually the outputs of a critic. No function here stops a gradient: a
loss that treats its target as data applies `jax.lax.stop_gradient` itself.
"""

import chex
import jax
import jax.numpy as jnp

from purejaxpg.kernels import recurrence


def discounted_return(reward: jax.Array, done: jax.Array, gamma: jax.Array | float) -> jax.Array:
    """Sum of discounted rewards from each step to the end of its episode or of the array.

        G_t = r_t + γ (1 − done_t) G_{t+1},      G_T = 0

    Nothing is bootstrapped. An episode that was truncated, or that the array cuts short, counts as
    if its later rewards were zero. Only rows of episodes that terminate inside the array are
    unbiased samples of the value.

    Args:
        reward: [T, ...] reward of step t, in the environment's own unit.
        done: [T, ...] bool, the episode ended with step t, for any reason.
        gamma: scalar, discount per environment step, in [0, 1].

    Returns:
        [T, ...] return, in the unit of the reward.

    Linear in `reward`; no gradient is stopped.

    References:
        Sutton and Barto, Reinforcement Learning: An Introduction, 2nd edition, section 3.3.

    >>> discounted_return(jnp.ones(3), jnp.array([False, True, False]), 0.5).tolist()
    [1.5, 1.0, 1.0]
    """
    chex.assert_equal_shape([reward, done])
    decay = jnp.where(done, 0.0, gamma)
    return recurrence.linear(reward, decay, jnp.zeros_like(reward[0]), reverse=True)


def n_step_return(
    reward: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    done: jax.Array,
    gamma: jax.Array | float,
    n: int,
) -> jax.Array:
    """Sum of up to n discounted rewards, then a bootstrap.

        G_t = Σ_{k<m} γ^k r_{t+k} + γ^m (1 − terminated_{t+m−1}) V(s'_{t+m−1}),
        m   = min(n, steps from t to the next done inclusive, T − t)

    The bootstrap belongs to the *last step summed*, not to row t + n. If the episode ends early, it
    is the last step's `next_value` with the power of γ reached there, and zero if it terminated.

    Args:
        reward: [T, ...] reward of step t.
        next_value: [T, ...] V(s'_t) of the observation before any reset.
        terminated: [T, ...] bool, the task itself ended with step t.
        done: [T, ...] bool, the episode ended with step t, for any reason.
        gamma: scalar, discount per environment step, in [0, 1].
        n: number of rewards, static, at least 1. The work grows as min(n, T) times T.

    Returns:
        [T, ...] return, in the unit of the reward.

    Linear in `reward` and `next_value`; no gradient is stopped.

    References:
        Sutton and Barto, Reinforcement Learning: An Introduction, 2nd edition, eq. 7.1, except that
        the sum also ends at a truncation.

    >>> no = jnp.zeros(3, bool)
    >>> n_step_return(jnp.ones(3), jnp.full(3, 8.0), no, no, 0.5, 2).tolist()
    [3.5, 3.5, 5.0]
    """
    chex.assert_equal_shape([reward, next_value, terminated, done])
    if n < 1:
        raise ValueError(f"n is {n}; an n-step return needs n of at least 1")
    bootstrap = jnp.where(terminated, 0.0, next_value)

    def one_step_longer(_: jax.Array, target: jax.Array) -> jax.Array:
        after = jnp.concatenate([target[1:], bootstrap[-1:]])
        return reward + gamma * jnp.where(done, bootstrap, after)

    # Beyond T steps every row has already reached the end of the array.
    longest = min(n, reward.shape[0])
    return jax.lax.fori_loop(1, longest, one_step_longer, reward + gamma * bootstrap)


def lambda_return(
    reward: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    done: jax.Array,
    gamma: jax.Array | float,
    gae_lambda: jax.Array | float,
) -> jax.Array:
    """Geometric mixture of all n-step returns, with weights (1 − λ) λ^{n−1}.

        G_t = r_t + γ (1 − terminated_t) [(1 − λ_t) V(s'_t) + λ_t G_{t+1}]
        λ_t = λ (1 − done_t),      G_T = V(s'_{T−1})

    If an episode or the array ends, the last bootstrap gets all the remaining weight: a truncated
    step has r_t + γ V(s'_t), not (1 − λ) times that value.

    Equals `gae(...) + value` if next_value[t] == value[t + 1] inside episodes, which holds for one
    critic with one set of parameters.

    Args:
        reward: [T, ...] reward of step t.
        next_value: [T, ...] V(s'_t) of the observation before any reset.
        terminated: [T, ...] bool, the task itself ended with step t.
        done: [T, ...] bool, the episode ended with step t, for any reason.
        gamma: scalar, discount per environment step, in [0, 1].
        gae_lambda: scalar in [0, 1]; 0 is the one-step target, 1 the longest return there is.

    Returns:
        [T, ...] return, in the unit of the reward.

    Differentiable in `reward` and `next_value`; no gradient is stopped.

    References:
        Sutton and Barto, Reinforcement Learning: An Introduction, 2nd edition, eq. 12.2 in
        recursive form, except that the sum also ends at a truncation.

    >>> no = jnp.zeros(2, bool)
    >>> lambda_return(jnp.ones(2), jnp.full(2, 8.0), no, no, 0.5, 0.5).tolist()
    [4.25, 5.0]
    """
    chex.assert_equal_shape([reward, next_value, terminated, done])
    mixture = jnp.where(done, 0.0, gae_lambda)
    bootstrap = jnp.where(terminated, 0.0, next_value)
    one_step = reward + gamma * (1.0 - mixture) * bootstrap
    return recurrence.linear(one_step, gamma * mixture, bootstrap[-1], reverse=True)


def gae(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    done: jax.Array,
    gamma: jax.Array | float,
    gae_lambda: jax.Array | float,
) -> jax.Array:
    """Generalized advantage estimate: discounted sum of one-step errors of the critic.

        δ_t = r_t + γ (1 − terminated_t) V(s'_t) − V(s_t)
        A_t = δ_t + γ λ (1 − done_t) A_{t+1},      A_T = 0

    Each flag has its own job. With `done` instead of `terminated`, a time limit looks like the end
    of the world and the critic learns values that are too low. With `terminated` instead of `done`,
    the next episode leaks into this one. The flags of row t belong to the step taken at t: shifting
    them by a row is the classic error.

    Args:
        reward: [T, ...] reward of step t.
        value: [T, ...] V(s_t) under the critic that collected the data.
        next_value: [T, ...] V(s'_t) of the observation before any reset.
        terminated: [T, ...] bool, the task itself ended with step t.
        done: [T, ...] bool, the episode ended with step t, for any reason.
        gamma: scalar, discount per environment step, in [0, 1].
        gae_lambda: scalar in [0, 1]; 0 is the one-step error, 1 the return less the value.

    Returns:
        [T, ...] advantage, not normalised. The critic's target is `advantage + value`.

    Differentiable in `reward`, `value` and `next_value`; no gradient is stopped, so treat the
    result as data.

    References:
        Schulman et al. 2016, arXiv:1506.02438, eq. 16, cut off at the end of the episode.

    >>> one, no = jnp.ones(2), jnp.zeros(2, bool)
    >>> gae(one, 0 * one, 0 * one, no, no, 1.0, 1.0).tolist()
    [2.0, 1.0]
    """
    chex.assert_equal_shape([reward, value, next_value, terminated, done])
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value
    decay = gamma * jnp.where(done, 0.0, gae_lambda)
    return recurrence.linear(delta, decay, jnp.zeros_like(delta[0]), reverse=True)
