"""The action distributions of the agents, as pytrees.

Leading axes are a batch of independent distributions, and one action belongs to each of them. All
logarithms are natural, so entropies and divergences are in nats. `p.kl(q)` is KL(p ‖ q), the mean
of log p − log q under p: the one called upon is the one that is sampled from.
"""

import math

import chex
import flax.struct
import jax
import jax.numpy as jnp

_LOG_TWO = math.log(2.0)
_LOG_TWO_PI = math.log(2.0 * math.pi)


@flax.struct.dataclass
class Categorical:
    """A choice among A actions, given by unnormalised log probabilities.

        π(a) = exp(logits_a) / Σ_b exp(logits_b)

    Logits are defined up to a constant, so they are no log probabilities: use `log_prob`, never
    `logits[action]`. An impossible action may have a logit of −1e9 or −inf; it adds nothing to
    entropy and divergence, nor to their gradients.

    Args:
        logits: [..., A] unnormalised log probabilities, at least one of them finite.

    >>> policy = Categorical(jnp.log(jnp.array([[0.5, 0.25, 0.25]])))
    >>> policy.entropy().shape, policy.mode().tolist()
    ((1,), [0])
    """

    logits: jax.Array  # [..., A]

    def sample(self, key: jax.Array) -> jax.Array:
        """Draw one action from each distribution of the batch.

        One key serves the whole batch. No gradient passes through a sample.

        Args:
            key: PRNG key, used up by this call.

        Returns:
            [...] int32 action in [0, A).

        >>> Categorical(jnp.array([[-1e9, 0.0], [0.0, -1e9]])).sample(jax.random.key(0)).tolist()
        [1, 0]
        """
        return jax.random.categorical(key, self.logits, axis=-1).astype(jnp.int32)

    def mode(self) -> jax.Array:
        """Give the most probable action; the first one where several are.

        Returns:
            [...] int32 action in [0, A). It has no gradient.

        >>> Categorical(jnp.array([0.0, 2.0, 1.0])).mode().item()
        1
        """
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log probability of an action.

            log π(a) = logits_a − log Σ_b exp(logits_b)

        `action` has no axis of its own: [...] against logits [..., A]. An index outside [0, A)
        finds nothing and gives 0, as if it were certain.

        Args:
            action: [...] integer in [0, A).

        Returns:
            [...] log probability in nats, at most 0.

        Differentiated with respect to `logits`: the score, onehot(a) − π. Nothing is stopped.

        >>> print(Categorical(jnp.zeros((2, 4))).log_prob(jnp.array([0, 3])).round(4))
        [-1.3863 -1.3863]
        """
        chex.assert_shape(action, self.logits.shape[:-1])
        # A masked sum and not a gather, whose gradient is a scatter and slow on accelerators.
        chosen = jax.nn.one_hot(action, self.logits.shape[-1], dtype=bool)
        return jnp.sum(jnp.where(chosen, jax.nn.log_softmax(self.logits), 0.0), axis=-1)

    @property
    def log_probs(self) -> jax.Array:
        """Log probabilities of all actions.

            log π(a) = logits_a − log Σ_b exp(logits_b)

        The logarithm of a softmax taken in two steps is −inf, with no usable gradient, as soon as
        a probability underflows; this is finite for all finite logits.

        Returns:
            [..., A] log probabilities in nats, at most 0; −inf for a logit of −inf.

        Differentiated with respect to `logits`; nothing is stopped.

        >>> Categorical(jnp.array([0.0, -200.0])).log_probs.tolist()
        [0.0, -200.0]
        """
        return jax.nn.log_softmax(self.logits)

    def expectation(self, x: jax.Array) -> jax.Array:
        """Mean of a quantity that is known for every action.

            E[x] = Σ_a π(a) x(a),      0 · x = 0 whatever x is

        An action of probability zero counts for nothing even where x is infinite or not a number,
        in the value and in the gradients: `expectation(log_probs)` is minus the entropy.

        Args:
            x: [..., A] one number per action, shaped like the logits.

        Returns:
            [...] mean, in the unit of x.

        Differentiated with respect to `logits` and `x`: unlike a mean over samples, it knows how
        the probabilities depend on the parameters. Nothing is stopped.

        >>> policy = Categorical(jnp.log(jnp.array([0.5, 0.5, 0.0])))
        >>> policy.expectation(jnp.array([1.0, 3.0, jnp.inf])).item()
        2.0
        """
        chex.assert_equal_shape([x, self.logits])
        p = jnp.exp(self.log_probs)
        return jnp.sum(p * jnp.where(p > 0.0, x, 0.0), axis=-1)

    def entropy(self) -> jax.Array:
        """Entropy in nats.

            H(π) = −Σ_a π(a) log π(a),      0 log 0 = 0

        Between 0 and log A. An entropy bonus is *subtracted* from a loss.

        Returns:
            [...] entropy.

        Differentiated with respect to `logits`; finite for actions of probability zero too.

        >>> print(Categorical(jnp.array([0.0, 0.0, -1e9])).entropy().round(4))
        0.6931
        """
        log_p = jax.nn.log_softmax(self.logits)
        p = jnp.exp(log_p)
        return -jnp.sum(p * jnp.where(p > 0.0, log_p, 0.0), axis=-1)

    def kl(self, other: "Categorical") -> jax.Array:
        """Divergence KL(self ‖ other), in nats.

            KL(p ‖ q) = Σ_a p(a) (log p(a) − log q(a))

        Not symmetric: the trust region of TRPO and the penalty of PPO are `old.kl(new)`. Infinite
        where q rules out an action that p takes.

        Args:
            other: q, a `Categorical` with logits of the same shape.

        Returns:
            [...] divergence, at least 0 up to rounding.

        Differentiated with respect to both logits; nothing is stopped.

        >>> p, q = Categorical(jnp.array([0.0, -1e9])), Categorical(jnp.zeros(2))
        >>> print(p.kl(q).round(4))
        0.6931
        """
        chex.assert_equal_shape([self.logits, other.logits])
        log_p = jax.nn.log_softmax(self.logits)
        log_q = jax.nn.log_softmax(other.logits)
        p = jnp.exp(log_p)
        return jnp.sum(p * jnp.where(p > 0.0, log_p - log_q, 0.0), axis=-1)


@flax.struct.dataclass
class DiagGaussian:
    """A normal distribution over action vectors with independent components.

        a_i ~ N(μ_i, σ_i²),      σ = exp(log_std)

    The components are independent, but the action is *one*: log probability, entropy and divergence
    are summed over the last axis. A loss that still has an axis of size A there has forgotten it.

    Args:
        mean: [..., A] μ, in units of the action.
        log_std: log σ, of any shape that broadcasts to that of the mean; often [A], a parameter
            that does not depend on the state.

    >>> policy = DiagGaussian(mean=jnp.zeros((5, 2)), log_std=jnp.zeros(2))
    >>> policy.entropy().shape, policy.mode().shape
    ((5,), (5, 2))
    """

    mean: jax.Array  # [..., A]
    log_std: jax.Array  # broadcastable to [..., A]

    def sample(self, key: jax.Array) -> jax.Array:
        """Draw one action from each distribution of the batch.

            a = μ + σ ε,      ε ~ N(0, 1)

        The action is not clipped to any bounds: clip it for the environment, and keep the unclipped
        one for `log_prob`.

        Args:
            key: PRNG key, used up by this call.

        Returns:
            [..., A] action.

        The gradient passes into `mean` and `log_std` (a reparametrised sample): stop it where the
        action is to be data, as in a policy gradient.

        >>> DiagGaussian(jnp.array([3.0]), jnp.array([-40.0])).sample(jax.random.key(0)).tolist()
        [3.0]
        """
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self._log_std()) * noise

    def mode(self) -> jax.Array:
        """Give the most probable action, which is the mean.

        Returns:
            [..., A] action, differentiable in `mean`.

        >>> DiagGaussian(jnp.array([3.0]), jnp.array([1.0])).mode().tolist()
        [3.0]
        """
        return self.mean

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log density of an action.

            log π(a) = −Σ_i [½ ((a_i − μ_i) / σ_i)² + log σ_i + ½ log 2π]

        A density, not a probability: it may be positive, and it grows without bound as σ shrinks.

        Args:
            action: [..., A] action, as sampled and before any clipping.

        Returns:
            [...] log density in nats.

        Differentiated with respect to `mean`, `log_std` and `action`; nothing is stopped.

        >>> standard = DiagGaussian(jnp.zeros(2), jnp.zeros(2))
        >>> print(f"{standard.log_prob(jnp.zeros(2)):.4f}")
        -1.8379
        """
        chex.assert_equal_shape([action, self.mean])
        log_std = self._log_std()
        scaled = (action - self.mean) * jnp.exp(-log_std)
        return -jnp.sum(0.5 * jnp.square(scaled) + log_std + 0.5 * _LOG_TWO_PI, axis=-1)

    def entropy(self) -> jax.Array:
        """Differential entropy in nats.

            H(π) = Σ_i [log σ_i + ½ (1 + log 2π)]

        It may be negative, it depends on the unit of the action, and the mean has no part in it: an
        entropy bonus acts on `log_std` alone.

        Returns:
            [...] entropy, of shape `mean.shape[:-1]` even if `log_std` is [A].

        Differentiated with respect to `log_std`.

        >>> print(DiagGaussian(jnp.zeros((3, 1)), jnp.zeros(1)).entropy().round(4))
        [1.4189 1.4189 1.4189]
        """
        return jnp.sum(self._log_std() + 0.5 * (1.0 + _LOG_TWO_PI), axis=-1)

    def kl(self, other: "DiagGaussian") -> jax.Array:
        """Divergence KL(self ‖ other), in nats.

            KL(p ‖ q) = Σ_i [log σ_qi − log σ_pi + (σ_pi² + (μ_pi − μ_qi)²) / (2 σ_qi²) − ½]

        Not symmetric: the trust region of TRPO and the penalty of PPO are `old.kl(new)`.

        Args:
            other: q, a `DiagGaussian` with a mean of the same shape.

        Returns:
            [...] divergence, at least 0 up to rounding.

        Differentiated with respect to both; nothing is stopped.

        >>> p, q = DiagGaussian(jnp.ones(1), jnp.zeros(1)), DiagGaussian(jnp.zeros(1), jnp.zeros(1))
        >>> p.kl(q).item()
        0.5
        """
        chex.assert_equal_shape([self.mean, other.mean])
        log_ratio = self._log_std() - other._log_std()
        distance = (self.mean - other.mean) * jnp.exp(-other._log_std())
        # expm1, so that equal widths give exactly zero and small differences keep their digits.
        per_dim = 0.5 * (jnp.expm1(2.0 * log_ratio) + jnp.square(distance)) - log_ratio
        return jnp.sum(per_dim, axis=-1)

    def _log_std(self) -> jax.Array:
        """Give log σ in the full shape, so that sums over the last axis count every component."""
        return jnp.broadcast_to(self.log_std, self.mean.shape)


@flax.struct.dataclass
class TanhGaussian:
    """A normal distribution with independent components, squashed into the box (−1, 1)^A.

        a_i = tanh(x_i),      x_i ~ N(μ_i, σ_i²),      σ = exp(log_std)

    There is no `log_prob` of an action: a component of |x| above about 9 is rounded to an action of
    exactly 1 in float32, from which x cannot be had back. `sample_and_log_prob` knows x, and
    `log_prob_of_tanh` is told it. There is no `entropy` either, since it has no closed form:
    −log_prob of a sample is an unbiased estimate.

    The density is that of the action in (−1, 1). Scaling the action to other bounds for the
    environment changes nothing here, as long as entropies and their targets stay in this unit.

    Args:
        mean: [..., A] μ, of x and not of the action.
        log_std: log σ, of any shape that broadcasts to that of the mean; [..., A], or [A] for a
            parameter that does not depend on the state.

    >>> policy = TanhGaussian(mean=jnp.zeros((5, 2)), log_std=jnp.zeros(2))
    >>> action, log_prob = policy.sample_and_log_prob(jax.random.key(0))
    >>> action.shape, log_prob.shape, policy.median().shape
    ((5, 2), (5,), (5, 2))
    """

    mean: jax.Array  # [..., A]
    log_std: jax.Array  # broadcastable to [..., A]

    def sample(self, key: jax.Array) -> jax.Array:
        """Draw one action from each distribution of the batch.

            a = tanh(μ + σ ε),      ε ~ N(0, 1)

        Args:
            key: PRNG key, used up by this call.

        Returns:
            [..., A] action, that of `sample_and_log_prob` for the same key.

        The gradient passes into `mean` and `log_std` (a reparametrised sample).

        >>> TanhGaussian(jnp.zeros(1), jnp.array([-40.0])).sample(jax.random.key(0)).round(6).item()
        0.0
        """
        return self.sample_and_log_prob(key)[0]

    def sample_and_log_prob(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draw one action from each distribution of the batch, with its log density.

            a        = tanh(x),      x = μ + σ ε,      ε ~ N(0, 1)
            log π(a) = −Σ_i [½ ε_i² + log σ_i + ½ log 2π + log(1 − tanh² x_i)]

        The last term is computed as 2 (log 2 − x − softplus(−2x)). As it stands it is −inf in
        float32 from |x| of about 9; with a small number added inside the logarithm it is finite and
        wrong, which teaches the actor that saturation is harmless.

        Args:
            key: PRNG key, used up by this call.

        Returns:
            [..., A] action in [−1, 1], a bound being reached only by rounding, and [...] its log
            density in nats.

        The gradient passes into `mean` and `log_std` through both (a reparametrised sample). For
        `log_prob` it is the total one: along with the density, the point moves at which it is
        taken.

        References:
            Haarnoja et al. 2018, arXiv:1812.05905, eq. 26.

        >>> still = TanhGaussian(jnp.array([20.0]), jnp.array([-5.0]))
        >>> action, log_prob = still.sample_and_log_prob(jax.random.key(0))
        >>> action.item(), bool(log_prob > 40.0)
        (1.0, True)
        """
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        x = self.mean + jnp.exp(self._log_std()) * noise
        return jnp.tanh(x), self._log_prob(noise, x)

    def median(self) -> jax.Array:
        """Give the image of the mean, the greedy action.

            a = tanh(μ)

        It is the median of every component, tanh being increasing. It is neither the mean nor the
        mode: a wide distribution is densest near its bounds.

        Returns:
            [..., A] action in [−1, 1], differentiable in `mean`.

        >>> TanhGaussian(jnp.array([0.0, 50.0]), jnp.zeros(2)).median().tolist()
        [0.0, 1.0]
        """
        return jnp.tanh(self.mean)

    def log_prob_of_tanh(self, x: jax.Array) -> jax.Array:
        """Log density of the action tanh(x).

            log π(tanh(x)) = log N(x; μ, σ²) − Σ_i log(1 − tanh² x_i)

        The argument is x, from before the squashing. To score stored actions later, store x.

        Args:
            x: [..., A] point that the action is the tanh of.

        Returns:
            [...] log density in nats, per unit of the *action*, not of x.

        Differentiated with respect to `mean`, `log_std` and `x`; nothing is stopped. For a
        reparametrised sample `sample_and_log_prob` has the better gradient: here the parts through
        x and through the mean are of size 1/σ and cancel, and rounding remains.

        >>> policy = TanhGaussian(jnp.zeros(1), jnp.zeros(1))
        >>> print(f"{policy.log_prob_of_tanh(jnp.zeros(1)):.4f}")
        -0.9189
        """
        chex.assert_equal_shape([x, self.mean])
        return self._log_prob((x - self.mean) * jnp.exp(-self._log_std()), x)

    def _log_prob(self, noise: jax.Array, x: jax.Array) -> jax.Array:
        """Give the log density of tanh(x), where x = mean + std * noise."""
        log_slope = 2.0 * (_LOG_TWO - x - jax.nn.softplus(-2.0 * x))
        log_density = -(0.5 * jnp.square(noise) + self._log_std() + 0.5 * _LOG_TWO_PI)
        return jnp.sum(log_density - log_slope, axis=-1)

    def _log_std(self) -> jax.Array:
        """Give log σ in the full shape, so that sums over the last axis count every component."""
        return jnp.broadcast_to(self.log_std, self.mean.shape)
