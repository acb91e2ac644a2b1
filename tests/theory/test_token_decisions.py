"""A completion as an episode of tokens: divergences, best policies and whitened rewards, listed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg.kernels import preference
from purejaxpg.lab import tabular
from purejaxpg.rlhf import tasks

BETA = 0.5
TREE = tabular.tree(tasks.make("enumerable-3-3"))


@pytest.fixture
def tables():
    """Logits [X, S, V] of a reference and of another policy."""
    draw = np.random.default_rng(0)
    reference = draw.normal(size=TREE.shape)
    return jnp.asarray(reference), jnp.asarray(reference + draw.normal(size=TREE.shape))


def visits(logits):
    """How often each state is visited -> [X, S]."""
    listed = tabular.every(TREE)
    weight = tabular.probability(TREE, logits)[:, None] * listed.mask
    return jnp.zeros(TREE.shape[:2]).at[listed.prompt[:, None], listed.prefix].add(weight)


def test_the_divergence_of_completions_is_that_of_tokens_at_visited_states(tables):
    reference, logits = tables
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    of_tokens = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    whole = float(tabular.divergence(TREE, logits, reference))
    assert float((visits(logits) * of_tokens).sum()) == pytest.approx(whole, rel=1e-12)
    # With the states of the reference, it is another number.
    assert abs(float((visits(reference) * of_tokens).sum()) - whole) > 0.01


def soft_values(reference, score):
    """V(s) = β log Σ_a π_ref(a|s) exp((r(s, a) + V(s')) / β), from the last state to the first."""
    log_q = np.asarray(jax.nn.log_softmax(reference))
    (num_prompts, num_states, num_actions), length = TREE.shape, TREE.prefix.shape[1]
    action_value = np.zeros((num_prompts, num_states, num_actions))
    value = np.zeros((num_prompts, num_states))
    last = TREE.mask.sum(1) - 1
    for n, t in enumerate(last):
        action_value[:, TREE.prefix[n, t], TREE.action[n, t]] = score[:, n]
    for t in reversed(range(length)):
        for s in np.unique(TREE.prefix[TREE.mask[:, t], t]):
            goes_on = TREE.child[s] >= 0
            action_value[:, s, goes_on] = value[:, TREE.child[s][goes_on]]
            tilted = log_q[:, s] + action_value[:, s] / BETA
            value[:, s] = BETA * np.log(np.exp(tilted).sum(-1))
    return action_value, value


def test_the_best_completions_are_those_of_the_softly_best_tokens(tables):
    reference, _ = tables
    score = np.asarray(tabular.every(TREE).score).reshape(TREE.shape[0], -1)
    action_value, value = soft_values(reference, score)
    log_q = np.asarray(jax.nn.log_softmax(reference))
    best_tokens = log_q + (action_value - value[..., None]) / BETA
    log_p = np.asarray(tabular.log_probs(best_tokens, tabular.every(TREE))).reshape(score.shape)
    log_ref = tabular.log_probs(reference, tabular.every(TREE)).reshape(score.shape)
    best = preference.optimal_log_prob(log_ref, score, BETA)
    np.testing.assert_allclose(log_p, best, atol=1e-12)
    log_z = preference.log_partition(log_ref, score, BETA)
    first = value[:, TREE.prefix[0, 0]]
    np.testing.assert_allclose(first, BETA * np.asarray(log_z), rtol=1e-12)


def test_the_objective_is_its_bound_less_the_divergence_from_the_best_policy(tables):
    reference, logits = tables
    shape = TREE.shape[0], -1
    score = tabular.every(TREE).score.reshape(shape)
    log_ref = tabular.log_probs(reference, tabular.every(TREE)).reshape(shape)
    share = jnp.asarray(TREE.task.prompt_probability)
    bound = float((share * BETA * preference.log_partition(log_ref, score, BETA)).sum())
    gap = float(tabular.divergence_from_optimum(TREE, logits, reference, BETA))
    value = float(tabular.objective(TREE, logits, reference, BETA))
    assert value == pytest.approx(bound - BETA * gap, abs=1e-12)
    assert gap > 0.1


def test_whitened_rewards_pay_for_length():
    listed = tabular.every(TREE)
    draw = np.random.default_rng(1)
    mask = listed.mask
    reward = jnp.where(mask, jnp.asarray(1.0 + draw.normal(size=mask.shape)), 0.0)
    mean = float(preference.masked_mean(reward, mask))
    std = float(jnp.sqrt(preference.masked_mean(jnp.square(reward - mean), mask) + 1e-8))
    whitened = preference.masked_whiten(reward, mask, shift_mean=False)
    plain, length = reward.sum(1), mask.sum(1)
    expected = plain / std + length * mean * (1.0 - 1.0 / std)
    np.testing.assert_allclose(whitened.sum(1), expected, atol=1e-12)
    per_token = mean * (1.0 - 1.0 / std)
    assert abs(per_token) > 0.01 and len(set(np.asarray(length))) > 1
