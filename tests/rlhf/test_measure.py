"""What every trainer is measured by: pass@k, and the best of n against the optimal policies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerable import REFERENCE, REWARD, sequences, token_log_probs
from jax import random

from purejaxpg.kernels import preference, verification
from purejaxpg.rlhf import generate, measure, tasks, tokens


def test_pass_rates_are_those_of_sixteen_samples_of_each_prompt(monkeypatch):
    task = tasks.make("chain-2-3")
    seen = []

    def sample(key, policy, prompt_ids, task, temperature):
        ids = task.demonstrate(key, prompt_ids)
        mask = tokens.completion_mask(ids, task.eos_id)
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), task.reward(prompt_ids, ids, mask))
        return generate.Completion(ids, mask, jnp.zeros(mask.shape))

    monkeypatch.setattr(measure, "sample", sample)
    prompt_ids = jnp.asarray(task.prompt_ids)
    completion, rates = measure.pass_rates(random.key(0), None, prompt_ids, task, 1.0)
    jax.effects_barrier()
    right = np.stack(seen).sum(0).astype(int)
    assert len(seen) == 16 and set(rates) == {"pass@1", "pass@4", "pass@16"}
    for k in (1, 4, 16):
        expected = [1 - math.comb(16 - c, k) / math.comb(16, k) for c in right]
        np.testing.assert_allclose(rates[f"pass@{k}"], expected, atol=1e-6)
    reward = task.reward(prompt_ids, completion.ids, completion.mask)
    assert any((np.asarray(reward) == own).all() for own in seen)


def test_lengths_of_right_completions_are_a_part_of_all_lengths():
    task = tasks.make("careless-2-4")
    prompt_ids = task.prompts(random.key(0), 500)
    ids = task.demonstrate(random.key(1), prompt_ids).at[0].set(task.words.index("."))
    mask = tokens.completion_mask(ids, task.eos_id)
    completion = generate.Completion(ids, mask, jnp.zeros(mask.shape))
    gold = np.asarray(task.reward(prompt_ids, ids, mask))
    found = {k: float(v) for k, v in measure.lengths(task, completion, gold).items()}
    length, right = np.asarray(mask).sum(1), gold == 1
    assert found["completion/length"] == pytest.approx(length.mean())
    assert found["completion/finished"] == pytest.approx(499 / 500)
    wrong = found["completion/length"] - found["completion/right_length"]
    assert wrong / (1 - found["completion/right"]) == pytest.approx(length[~right].mean())
    assert found["completion/right_length"] / right.mean() == pytest.approx(length[right].mean())
    graded = tasks.make("sentiment")
    assert set(measure.lengths(graded, completion, gold)) == {
        "completion/length", "completion/finished"
    }  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 4, 16, 256])
def test_best_of_n_stays_below_its_bound_and_below_the_frontier(n):
    with jax.enable_x64(True):
        log_q, reward = sequences(token_log_probs(REFERENCE)), jnp.asarray(REWARD)
        log_p = verification.best_of_n_log_prob(log_q, reward, n)
        probability = jnp.exp(log_p)
        kl = (probability * (log_p - log_q)).sum(1)
        expected = (probability * reward).sum(1)
        bound = math.log(n) - (n - 1) / n
        np.testing.assert_allclose(probability.sum(1), 1.0, atol=1e-12)
        assert (kl <= bound + 1e-12).all() and (n == 1 or (kl > 0.2 * bound).all())
        for beta in (0.1, 0.5, 2.0):  # E[r] - beta KL is at most beta log Z
            best = beta * preference.log_partition(log_q, reward, beta)
            assert (expected - beta * kl <= best + 1e-12).all()


def test_without_ties_and_large_probabilities_the_bound_is_the_divergence():
    count, n = 4000, 8
    with jax.enable_x64(True):
        log_q = jnp.full(count, -math.log(count))
        log_p = verification.best_of_n_log_prob(log_q, jnp.arange(count) * 1.0, n)
        kl = float((jnp.exp(log_p) * (log_p - log_q)).sum())
    assert kl == pytest.approx(math.log(n) - (n - 1) / n, rel=1e-3)
