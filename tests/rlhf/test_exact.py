"""The gradients of PPO and RLOO are those of E[r] - beta KL, by enumeration of all completions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from enumerable import (
    ALL,
    ALL_MASK,
    ALL_PROMPTS,
    BETA,
    COUNT,
    LOGITS,
    MASK,
    PREFIX,
    REFERENCE,
    REWARD,
    TASK,
    L,
    N,
    X,
    cosine,
    relative,
    sequences,
    token_log_probs,
    true_gradient,
    value_of_objective,
)
from jax import lax, random

from purejaxpg.kernels import preference
from purejaxpg.rlhf import measure, ppo, rloo, tasks, tokens, transformer


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def exact_values(reward, weight):
    """The expected rest of the reward in the state before each token, [X*N, L]."""
    rest = np.flip(np.cumsum(np.flip(np.asarray(reward), 1), 1), 1).reshape(X, N, L)
    weight = np.asarray(weight).reshape(X, N, 1) * MASK
    total, mass = np.zeros((X, COUNT)), np.zeros((X, COUNT))
    for x in range(X):
        np.add.at(total[x], PREFIX, weight[x] * rest[x])
        np.add.at(mass[x], PREFIX, weight[x])
    values = total / np.where(mass > 0, mass, 1.0)
    return values[:, PREFIX].reshape(X * N, L)


def batch_of(log_probs, reference, gae_lambda, values="exact", reward=None):
    """The batch of all completions, weighted by their probability, that PPO's loss takes."""
    config = ppo.Config(gae_lambda=gae_lambda, whiten_advantage=False)
    weight = jnp.exp(sequences(log_probs)).ravel()
    score = jnp.asarray(REWARD.ravel())
    if reward is None:
        reward = preference.token_rewards(score, log_probs, reference, ALL_MASK, BETA)
    value = exact_values(reward, weight)
    if values != "exact":
        value = np.sin(1.7 * np.arange(COUNT))[PREFIX]
        value = np.tile(value, (X, 1)) if values == "wrong" else np.zeros((X * N, L))
    zeros = jnp.zeros((X * N, L))
    batch = ppo.Batch(
        ALL_PROMPTS, ALL, ALL_MASK, log_probs, jnp.asarray(value), zeros, zeros, weight
    )
    return ppo.advantages(batch, reward, config), config


def ppo_gradient(logits, gae_lambda, values="exact", reward=None, objective=ppo.objective):
    old, reference = token_log_probs(jnp.asarray(logits)), token_log_probs(REFERENCE)
    batch, config = batch_of(old, reference, gae_lambda, values, reward)

    def loss(logits):
        return objective(token_log_probs(logits), batch.value, batch, config)[0]

    return -np.asarray(jax.grad(loss)(jnp.asarray(logits)))


@pytest.mark.parametrize(
    ("gae_lambda", "values"), [(0.95, "exact"), (0.0, "exact"), (1.0, "zero"), (1.0, "wrong")]
)
def test_gradient_of_ppo_is_that_of_the_objective(gae_lambda, values):
    assert relative(ppo_gradient(LOGITS, gae_lambda, values), true_gradient(LOGITS)) < 1e-12


@pytest.mark.parametrize("method", ["ppo", "rloo"])
def test_single_precision_loses_little(method):
    true = true_gradient(LOGITS)
    with jax.enable_x64(False):
        gradient = ppo_gradient(LOGITS, 0.95) if method == "ppo" else rloo_gradient(LOGITS)
    assert gradient.dtype == np.float32
    assert relative(gradient, true) < 1e-5


def test_wrong_values_bias_the_gradient_below_lambda_one():
    assert relative(ppo_gradient(LOGITS, 0.95, "wrong"), true_gradient(LOGITS)) > 0.02


def changed_rewards(kind):
    old, reference = token_log_probs(jnp.asarray(LOGITS)), token_log_probs(REFERENCE)
    score = jnp.asarray(REWARD.ravel())
    right = preference.token_rewards(score, old, reference, ALL_MASK, BETA)
    if kind == "k3":
        kl = preference.token_kl(old, reference, "k3")
        return right + BETA * jnp.where(ALL_MASK, old - reference - kl, 0.0)
    # The score is the reward of the token after the end, if there is room for one.
    last = ALL_MASK.sum(1) - 1
    at = lambda index: np.arange(L) == index[:, None]  # noqa: E731
    return right + score[:, None] * (at(np.minimum(last + 1, L - 1)) * 1.0 - at(last))


@pytest.mark.parametrize(("kind", "most"), [("k3", 0.99), ("late", 0.9)])
def test_known_wrong_rewards_have_another_gradient(kind, most):
    gradient = ppo_gradient(LOGITS, 0.95, reward=changed_rewards(kind))
    assert cosine(gradient, true_gradient(LOGITS)) < most


def with_kl_in_the_loss(estimator):
    """The gradient with an estimate of the divergence in the loss, and that of the estimate."""
    old, reference = token_log_probs(jnp.asarray(LOGITS)), token_log_probs(REFERENCE)
    score = jnp.asarray(REWARD.ravel())
    reward = preference.token_rewards(score, old, reference, ALL_MASK, 0.0)
    weight = jnp.exp(sequences(old)).ravel()

    def penalty(logits):
        kl = preference.token_kl(token_log_probs(logits), reference, estimator)
        return (weight * preference.masked_sum(kl, ALL_MASK, 1)).sum() / X

    of_penalty = np.asarray(jax.grad(penalty)(jnp.asarray(LOGITS)))
    return ppo_gradient(LOGITS, 0.95, reward=reward) - BETA * of_penalty, of_penalty


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_divergence_in_the_loss_has_another_gradient(estimator):
    gradient, of_penalty = with_kl_in_the_loss(estimator)
    assert cosine(gradient, true_gradient(LOGITS)) < 0.99
    assert (np.linalg.norm(of_penalty) < 1e-12) == (estimator == "k1")


def test_a_mean_over_all_tokens_rescales_and_one_over_own_tokens_does_not():
    def over_all(log_prob, value, batch, config):
        count = (batch.weight * batch.mask.sum(1)).sum() / batch.weight.sum()
        loss, metrics = ppo.objective(log_prob, value, batch, config)
        return loss / count, metrics

    def over_own(log_prob, value, batch, config):
        surrogate = -jnp.exp(log_prob - batch.log_prob) * batch.advantage
        own = preference.masked_mean(surrogate, batch.mask, 1)
        return (batch.weight * own).sum() / batch.weight.sum(), {}

    true = true_gradient(LOGITS)
    scaled = ppo_gradient(LOGITS, 0.95, objective=over_all)
    assert cosine(scaled, true) > 1 - 1e-9 and relative(scaled, true) > 0.1
    assert cosine(ppo_gradient(LOGITS, 0.95, objective=over_own), true) < 0.99


def rloo_gradient(logits, advantages=None):
    """The expected gradient over all pairs of completions as groups of two."""
    config = rloo.Config(group_size=2, batch_size=2)
    reference = sequences(token_log_probs(REFERENCE))
    first, second = np.repeat(np.arange(N), N), np.tile(np.arange(N), N)
    mask = jnp.stack([MASK[first], MASK[second]], 1)

    def loss(logits):
        log_probs = token_log_probs(logits)
        old = lax.stop_gradient(sequences(log_probs))
        total, weight = REWARD - BETA * (old - reference), jnp.exp(old)
        tokens_of = log_probs.reshape(X, N, L)

        def of_pair(log_prob, mask, total):
            advantage = (advantages or rloo.advantages)(total, config)
            return rloo.objective(log_prob, rloo.Batch(None, None, mask, advantage))

        def of_prompt(tokens_of, total, weight):
            pair = lambda x: jnp.stack([x[first], x[second]], 1)  # noqa: E731
            each = jax.vmap(of_pair)(pair(tokens_of), mask, pair(total))
            return (weight[first] * weight[second] * each).sum()

        return jax.vmap(of_prompt)(tokens_of, total, weight).mean()

    return -np.asarray(jax.grad(loss)(jnp.asarray(logits)))


def test_gradient_of_rloo_is_that_of_the_objective():
    assert relative(rloo_gradient(LOGITS), true_gradient(LOGITS)) < 1e-12


def test_a_baseline_that_includes_the_own_return_halves_the_gradient_of_pairs():
    gradient = rloo_gradient(LOGITS, lambda total, config: total - total.mean())
    assert relative(2.0 * gradient, true_gradient(LOGITS)) < 1e-12


@pytest.mark.parametrize(("bits", "tolerance"), [(64, 1e-12), (32, 1e-5)])
@pytest.mark.parametrize("method", ["ppo", "rloo"])
def test_exact_ascent_ends_at_the_optimal_policy_below_the_frontier(method, bits, tolerance):
    with jax.enable_x64(bits == 64):
        excess, divergence = ascend(method)
    assert excess.dtype == f"float{bits}"
    assert excess <= tolerance
    assert divergence < 1e-4


def ascend(method):
    """How far a run gets above the frontier, and how far from the best policy it ends, in nats."""
    reference = token_log_probs(REFERENCE)
    optimal = preference.optimal_log_prob(sequences(reference), REWARD, BETA)
    best = BETA * preference.log_partition(sequences(reference), REWARD, BETA).mean()
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 2000))
    config = ppo.Config(gae_lambda=1.0, whiten_advantage=False)

    def loss(logits):
        log_probs = token_log_probs(logits)
        old = lax.stop_gradient(log_probs)
        weight = jnp.exp(sequences(old)).ravel()
        if method == "rloo":  # of an infinite group: the baseline is the expected return
            total = REWARD - BETA * (sequences(old) - sequences(reference))
            advantage = total - (jnp.exp(sequences(old)) * total).sum(1, keepdims=True)
            batch = rloo.Batch(None, None, ALL_MASK, advantage.ravel() * weight * N)
            return rloo.objective(log_probs, batch)
        score = jnp.asarray(REWARD.ravel())
        reward = preference.token_rewards(score, old, reference, ALL_MASK, BETA)
        zeros = jnp.zeros((X * N, L))
        batch = ppo.Batch(ALL_PROMPTS, ALL, ALL_MASK, old, zeros, zeros, zeros, weight)
        batch = ppo.advantages(batch, reward, config)
        return ppo.objective(log_probs, zeros, batch, config)[0]

    def step(carry, _):
        logits, state = carry
        change, state = optimizer.update(jax.grad(loss)(logits), state)
        logits = optax.apply_updates(logits, change)
        return (logits, state), value_of_objective(token_log_probs(logits), reference)

    start = jnp.asarray(REFERENCE)
    run = jax.jit(lambda carry: lax.scan(step, carry, length=2000))
    (logits, _), values = run((start, optimizer.init(start)))
    log_p = sequences(token_log_probs(logits))
    return values.max() - best, (jnp.exp(log_p) * (log_p - optimal)).sum(1).mean()


def test_gradient_of_a_transformer_by_the_loss_that_trains_it():
    sizes = {"vocab_size": len(TASK.words), "context": 7, "width": 8, "num_layers": 1}
    architecture = transformer.Architecture(
        **sizes, num_heads=1, num_kv_heads=1, head_dim=8, mlp_width=8, suppressed=TASK.suppressed
    )
    models = [transformer.init(random.key(seed), architecture) for seed in (0, 1)]
    policy, reference = (jax.tree.map(lambda x: x.astype(float), m) for m in models)
    given = ppo.Given(reference)
    critic = transformer.scalar_model(random.key(2), reference, 1.0)
    arguments = (jnp.asarray(ALL_PROMPTS), jnp.asarray(ALL), TASK, 1.0)

    def objective(policy, reference):
        log_probs = [measure.token_log_probs(m, *arguments) for m in (policy, reference)]
        return value_of_objective(*log_probs)

    def gradient(policy, critic, given, batch, config):
        params = {"policy": policy.params, "critic": critic.params}
        return jax.grad(lambda p: ppo.loss(p, batch, config, given)[0])(params)["policy"]

    old, of_reference = (measure.token_log_probs(m, *arguments) for m in (policy, reference))
    np.testing.assert_allclose(jnp.exp(sequences(old)).sum(1), 1.0, atol=1e-12)
    batch, config = batch_of(old, of_reference, 0.95)
    trained = jax.jit(gradient, static_argnames="config")(policy, critic, given, batch, config)
    true = jax.jit(jax.grad(objective))(policy, reference).params
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    assert relative(-flat(trained), flat(true)) < 1e-12


def from_the_best(trainer, seed, width=32, **settings):
    """Divergence of the reference, and of a policy trained on samples, from the best policy."""
    config = trainer.Config(beta=0.5, **settings)
    task = tasks.make(config.task)
    with jax.enable_x64(False):
        sizes = {"width": width, "head_dim": width // 2, "mlp_width": 4 * width, "num_layers": 1}
        longest = task.prompt_length + task.completion_length
        architecture = transformer.Architecture(
            len(task.words), longest, suppressed=task.suppressed, **sizes
        )
        given = trainer.Given(transformer.init(random.key(seed), architecture))
        state, _ = jax.jit(trainer.train)(random.key(seed), config, given)
        every = jnp.asarray(task.completion_ids)
        count = len(task.prompt_ids)
        prompt_ids = jnp.repeat(jnp.asarray(task.prompt_ids), len(every), 0)
        ids = jnp.tile(every, (count, 1))
        mask = tokens.completion_mask(ids, task.eos_id)

        @jax.jit
        def log_probs(model):
            each = measure.token_log_probs(model, prompt_ids, ids, task, 1.0)
            return preference.masked_sum(each, mask, 1).reshape(count, -1)

        reward = task.reward(prompt_ids, ids, mask).reshape(count, -1)
        models = given.reference, trainer.model(state, config, given)
        reference, policy = map(log_probs, models)
        optimal = preference.optimal_log_prob(reference, reward, config.beta)
        return [
            float((jnp.exp(log_p) * (log_p - optimal)).sum(1).mean())
            for log_p in (reference, policy)
        ]


@pytest.mark.parametrize(
    ("trainer", "more"), [(rloo, {}), (ppo, {"num_epochs": 2})], ids=["rloo", "ppo"]
)
def test_a_short_training_on_samples_comes_close_to_the_best_policy(trainer, more):
    sizes = {"task": "enumerable-3-2", "num_updates": 200, "batch_size": 64, "width": 16}
    before, after = from_the_best(trainer, 0, **sizes, learning_rate=1e-2, **more)
    assert before > 0.3
    assert after < 0.01  # without the divergence it is 1, with a score one token late 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "seed"), [(rloo, 0), (rloo, 1), (ppo, 0)], ids=["rloo-0", "rloo-1", "ppo-0"]
)
def test_training_on_samples_ends_at_the_best_policy(trainer, seed):
    sizes = {"task": "enumerable-3-3", "num_updates": 1500, "batch_size": 192}
    before, after = from_the_best(trainer, seed, **sizes, learning_rate=3e-3)
    assert before > 0.3 and after < 0.03
