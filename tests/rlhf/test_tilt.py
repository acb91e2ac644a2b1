"""Samples of a tilted reference give the frontier that enumeration gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg.kernels import preference
from purejaxpg.rlhf import measure, rloo, sft, tasks, tilt, tokens, transformer

UNFINISHED = -3.0


def additive_task():
    """An enumerable task whose reward is a sum over neighbouring tokens."""
    task = tasks.make("enumerable-3-3")
    table = np.random.default_rng(0).normal(size=(len(task.words),) * 2).astype(np.float32)

    def reward(prompt_ids, completion_ids, mask):
        before = jnp.concatenate([prompt_ids[:, -1:], completion_ids[:, :-1]], axis=1)
        total = jnp.where(mask, jnp.asarray(table)[before, completion_ids], 0.0).sum(1)
        return jnp.where(tokens.finished(completion_ids, task.eos_id), total, UNFINISHED)

    return dataclasses.replace(task, reward=reward, additive=(table, UNFINISHED))


def test_the_frontier_is_that_of_all_completions():
    task = additive_task()
    architecture = transformer.Architecture(
        len(task.words), context=6, width=8, num_layers=1, mlp_width=8, suppressed=task.suppressed
    )
    reference = transformer.init(random.key(0), architecture)
    # Far from uniform, so that the model of pairs of tokens is not exact.
    reference = jax.tree.map(lambda x: 3.0 * x, reference)
    betas = jnp.array([3.0, 1.0, 0.5, 0.2, 0.1])
    prompt_ids = jnp.asarray(task.prompt_ids)
    expected, kl, effective = tilt.frontier(random.key(1), reference, prompt_ids, task, 1.5, betas)

    every = jnp.asarray(task.completion_ids)

    @jax.jit
    def exact(prompt):
        ids = jnp.broadcast_to(prompt, (len(every), len(prompt)))
        mask = tokens.completion_mask(every, task.eos_id)
        log_prob = measure.token_log_probs(reference, ids, every, task, 1.5)
        reward = task.reward(ids, every, mask)
        log_prob = preference.masked_sum(log_prob, mask, 1)
        best = jax.vmap(lambda beta: preference.optimal_log_prob(log_prob, reward, beta))(betas)
        mean = (jnp.exp(best) * reward).sum(1)
        spread = jnp.sqrt((jnp.exp(best) * (reward - mean[:, None]) ** 2).sum(1))
        return *preference.frontier(log_prob[None], reward[None], betas), spread

    exact_return, exact_kl, spread = map(np.stack, zip(*map(exact, prompt_ids), strict=True))
    assert effective.min() > 30
    error = 4 * spread / np.sqrt(effective)
    assert (np.abs(expected - exact_return) < error + 1e-4).all()
    assert (np.abs(kl - exact_kl) < error / betas + 0.05).all()
    assert exact_kl.max() > 1.5 and exact_return.max() > exact_return.min() + 1


@pytest.mark.slow
def test_the_frontier_of_sentiment_goes_far_and_agrees_with_plain_samples(monkeypatch):
    """The reference is trained, so its completions are sentences that mostly end."""
    task, config = tasks.make("sentiment"), sft.Config(num_updates=400)
    state, _ = jax.jit(sft.train)(random.key(0), config, sft.Given())
    given = rloo.Given(sft.model(state, config, sft.Given()))
    far = measure.frontier(random.key(1), rloo.Config(), given)
    assert far["kl"].max() > 10 and far["kl"].min() < 0.1
    assert (np.diff(far["kl"]) > 0).all() and (np.diff(far["return"]) > 0).all()
    # The slope of the frontier is beta, which only falls. Near 0, it is the ratio of two errors.
    slope = (np.diff(far["return"]) / np.diff(far["kl"]))[far["kl"][1:] > 0.05]
    assert (np.diff(slope) < 0.02).all()

    tasks.register("plain", lambda: dataclasses.replace(task, additive=None))
    monkeypatch.setattr(measure, "FRONTIER_SAMPLES", 4096)
    near = measure.frontier(random.key(2), rloo.Config(task="plain"), given)
    assert 2 < near["kl"].max() < 8
    there = np.interp(near["kl"], far["kl"], far["return"])
    inside = near["kl"] > far["kl"].min()
    np.testing.assert_allclose(near["return"][inside], there[inside], rtol=0, atol=0.1)
