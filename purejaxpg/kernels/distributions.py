"""Action distributions: distrax's, built from the outputs of a network, and what distrax lacks.

A policy returns a distrax distribution. Agents call `sample(seed=key)`, `log_prob(action)`,
`sample_and_log_prob(seed=key)`, `entropy()`, `kl_divergence(other)` and `mode()` on it, so a fork
may return any other distribution of distrax. NPG and TRPO also need Fisher products, which not all
of them have: see `trust_region.fisher_vector_product`.

Leading axes are a batch of independent distributions, each with one action: [...] for a choice,
[..., A] for a vector. Logarithms are natural, so entropies and divergences are in nats.
`p.kl_divergence(q)` is KL(p ‖ q), the mean of log p − log q under p.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

# Every command that names an agent imports this module, but only a traced program needs distrax.
# It takes about half a second to import, so the functions import it themselves.


def categorical(logits: jax.Array) -> Any:
    """Choice among A actions, given by unnormalised log probabilities.

        π(a) = exp(logits_a) / Σ_b exp(logits_b)

    distrax normalises: `categorical(x).logits` are the log probabilities of all actions, whatever
    constant was in x. An impossible action may have a logit of −1e9 or −inf. It adds nothing to
    entropy and divergence, nor to their gradients.

    Args:
        logits: [..., A] unnormalised log probabilities, at least one of them finite.

    Returns:
        `distrax.Categorical` of actions [...] int32 in [0, A).

    >>> policy = categorical(jnp.log(jnp.array([[2.0, 1.0, 1.0]])))
    >>> policy.mode().tolist(), policy.entropy().shape
    ([0], (1,))
    """
    import distrax

    return distrax.Categorical(logits=logits, dtype=jnp.int32)


def expectation(policy: Any, x: jax.Array) -> jax.Array:
    """Mean of a quantity that is known for every action.

        E[x] = Σ_a π(a) x(a),      0 · x = 0 for every x

    An action of probability zero does not count even if its x is infinite or NaN, in the value and
    in the gradients: `expectation(policy, policy.logits)` is minus the entropy.

    Args:
        policy: `distrax.Categorical` over A actions.
        x: [..., A] one number per action, shaped like the logits.

    Returns:
        [...] mean, in the unit of x.

    Differentiated with respect to the policy and `x`: unlike a mean over samples, it knows how the
    probabilities depend on the parameters. Nothing is stopped.

    >>> policy = categorical(jnp.log(jnp.array([0.5, 0.5, 0.0])))
    >>> expectation(policy, jnp.array([1.0, 3.0, jnp.inf])).item()
    2.0
    """
    chex.assert_equal_shape([x, policy.logits])
    p = jnp.exp(policy.logits)
    return jnp.sum(p * jnp.where(p > 0.0, x, 0.0), axis=-1)


def diag_gaussian(mean: jax.Array, log_std: jax.Array) -> Any:
    """Normal distribution over action vectors with independent components.

        a_i ~ N(μ_i, σ_i²),      σ = exp(log_std)

    The action is *one* vector: log probability, entropy and divergence are sums over its
    components. A loss that still has an axis of size A has forgotten to sum. Samples are not
    clipped to any bounds: clip them for the environment, and keep the unclipped ones for
    `log_prob`. The gradient passes through a sample into `mean` and `log_std`.

    Args:
        mean: [..., A] μ, in units of the action.
        log_std: log σ, of any shape that broadcasts to that of the mean; often [A], a parameter
            that does not depend on the state.

    Returns:
        `distrax.Independent` of a `distrax.Normal`, over actions [..., A].

    >>> policy = diag_gaussian(mean=jnp.zeros((5, 2)), log_std=jnp.zeros(2))
    >>> policy.entropy().shape, policy.mode().shape
    ((5,), (5, 2))
    """
    import distrax

    # Broadcast here, so that sums over the last axis count every component of a shared log_std.
    std = jnp.broadcast_to(jnp.exp(log_std), mean.shape)
    return distrax.Independent(distrax.Normal(mean, std), reinterpreted_batch_ndims=1)


def tanh_gaussian(mean: jax.Array, log_std: jax.Array) -> Any:
    """Normal distribution with independent components, squashed into the box (−1, 1)^A.

        a_i = tanh(x_i),      x_i ~ N(μ_i, σ_i²),      σ = exp(log_std)

    The density is that of the action in (−1, 1). Scaling the action to other bounds for the
    environment changes nothing here, as long as entropies and their targets stay in this unit.

    Args:
        mean: [..., A] μ, of x and not of the action.
        log_std: log σ, of any shape that broadcasts to that of the mean.

    Returns:
        `squashed.TanhGaussian`, a `distrax.Transformed`, over actions [..., A].

    >>> policy = tanh_gaussian(mean=jnp.zeros((5, 2)), log_std=jnp.zeros(2))
    >>> action, log_prob = policy.sample_and_log_prob(seed=jax.random.key(0))
    >>> action.shape, log_prob.shape, policy.median().shape
    ((5, 2), (5,), (5, 2))
    """
    from purejaxpg.kernels import squashed

    return squashed.TanhGaussian(mean, log_std)


_RENAMED = {
    "Categorical": "categorical(logits)",
    "DiagGaussian": "diag_gaussian(mean, log_std)",
    "TanhGaussian": "tanh_gaussian(mean, log_std)",
}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise AttributeError(
            f"distributions.{name} was replaced by distrax: write distributions.{_RENAMED[name]}, "
            "policy.sample(seed=key), policy.kl_divergence(other), policy.logits for log_probs, "
            "and distributions.expectation(policy, x)"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
