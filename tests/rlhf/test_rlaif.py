"""Feedback of a judge: what it equals if the judge is perfect, by enumeration of completions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerable import (
    ALL,
    ALL_PROMPTS,
    BETA,
    FIRST,
    LOGITS,
    MASK,
    REFERENCE,
    REWARD,
    SECOND,
    TASK,
    L,
    N,
    X,
    relative,
    sequences,
    token_log_probs,
    true_gradient,
)
from flax import struct
from jax import lax, nn, random

from purejaxpg.kernels import preference
from purejaxpg.rlhf import comparison, judge, reward_model, rlaif, sft, tokens, transformer

PROMPT, OPPONENTS = TASK.prompt_length, np.array([3, 11, 20])  # one completion of each prompt
EVERY = jnp.asarray(ALL[:N])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@struct.dataclass
class Exact:
    """A judge whose log-odds are a difference of rewards and a constant, read off the question."""

    reward: jax.Array  # [X, N]
    bias: float = 0.0  # in favour of the completion that is shown first

    def __call__(self, ids, segments):
        first, second = ids[:, PROMPT : PROMPT + L], ids[:, PROMPT + L + 1 : -1]
        x = (ids[:, None, :PROMPT] == TASK.prompt_ids).all(-1).argmax(1)
        of_first, of_second = (
            self.reward[x, (part[:, None] == EVERY).all(-1).argmax(1)] for part in (first, second)
        )
        log_odds = of_first - of_second + self.bias
        answer = jnp.zeros((*ids.shape, len(TASK.words) + comparison.NUM_WORDS))
        return answer.at[:, -1, len(TASK.words) + comparison.FIRST].set(log_odds)


def ask(way, bias):
    """Log-odds of all ordered pairs of completions, [B]."""
    first, second = FIRST.ravel(), SECOND.ravel()
    prompt_ids = jnp.asarray(ALL_PROMPTS[first])
    return way(Exact(jnp.asarray(REWARD), bias), prompt_ids, ALL[first], ALL[second], TASK)


GOLD = (REWARD.ravel()[FIRST] - REWARD.ravel()[SECOND]).ravel()


def test_a_constant_bias_cancels_over_both_orders_and_not_in_one():
    np.testing.assert_allclose(ask(comparison.log_odds, 0.7), GOLD, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ask(comparison.ask, 0.7), GOLD + 0.7, rtol=0, atol=1e-12)
    shown_first, shown_second = ask(comparison.ask_twice, 0.7)
    # The mean of probabilities has the same winners, but the bias does not cancel.
    mean = 0.5 * (nn.sigmoid(shown_first) + nn.sigmoid(shown_second))
    assert ((mean > 0.5) == (GOLD > 0)).all()
    assert np.abs(mean - nn.sigmoid(GOLD)).max() > 0.01
    bias = comparison.position_bias(shown_first, shown_second)
    assert bias.min() > 0 and float(bias.max()) == pytest.approx(1 / (1 + np.exp(-0.7)) - 0.5, 1e-3)
    unbiased = comparison.position_bias(*ask(comparison.ask_twice, 0.0))
    np.testing.assert_allclose(unbiased, 0.0, atol=1e-12)


def reward_model_loss(log_odds):
    """Expected loss of rewards [X, N] over all pairs, labelled with these odds, and its slope."""
    wins = nn.sigmoid(log_odds)

    def loss(reward):
        first, second = reward.ravel()[FIRST.ravel()], reward.ravel()[SECOND.ravel()]
        right = preference.bradley_terry(first, second)
        return (wins * right + (1.0 - wins) * preference.bradley_terry(second, first)).mean()

    return jax.value_and_grad(loss)(jnp.asarray(REWARD[::-1]))


def test_a_reward_model_of_judged_labels_has_the_gradient_of_gold_labels():
    gold, slope = reward_model_loss(GOLD)
    for bias in (0.0, 0.7):
        judged, judged_slope = reward_model_loss(ask(comparison.log_odds, bias))
        assert abs(judged - gold) < 1e-12 and relative(judged_slope, slope) < 1e-12
    # In one order, each completion comes first as often as the other, and the labels are noisier.
    assert relative(reward_model_loss(ask(comparison.ask, 0.7))[1], slope) > 0.02


def test_a_perfect_judge_draws_the_labels_of_the_task():
    sizes = {"width": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_width": 8}
    architecture = sft.architecture(sft.Config(task="enumerable-3-4", **sizes))
    reference = transformer.init(random.key(0), architecture)
    rewarded = functools.partial(TASK.reward, jnp.asarray(ALL_PROMPTS))
    reward = rewarded(jnp.asarray(ALL), jnp.tile(MASK, (X, 1))).reshape(X, N)

    @jax.jit
    def draw(judge, label_noise=0.0):
        config = reward_model.Config(task="enumerable-3-4", label_noise=label_noise)
        given = reward_model.Given(reference, judge=judge)
        greedy = dataclasses.replace(config, labels="greedy")
        drawn = [reward_model.draw(random.key(1), c, given, 256) for c in (config, greedy)]
        return *drawn, reward_model.draw(random.key(1), config, given, 256, held_out=True)

    def equal(a, b):
        return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))

    (gold, best), *_ = draw(None)
    (noisy, less), _, (clean, _) = draw(None, 0.4)
    np.testing.assert_allclose(less - 0.5, 0.2 * (best - 0.5), rtol=0, atol=1e-12)
    assert not equal(noisy, gold) and equal(clean, gold)
    (judged, judged_best), (greedy, certain), _ = draw(Exact(reward, 0.7))
    assert equal(judged, gold)
    np.testing.assert_allclose(judged_best, best, rtol=0, atol=1e-12)
    chosen, rejected = (
        TASK.reward(gold.prompt_ids, ids, tokens.completion_mask(ids, TASK.eos_id))
        for ids in (greedy.chosen_ids, greedy.rejected_ids)
    )
    is_tie = (greedy.chosen_ids == greedy.rejected_ids).all(1)
    assert ((chosen > rejected) | is_tie).all() and not equal(greedy, gold)
    np.testing.assert_array_equal(certain, np.where(is_tie, 0.5, 1.0))
    (opposite, _), _, (held_out, _) = draw(Exact(-reward))
    assert not equal(opposite, gold)
    assert equal(held_out, gold)  # what is scored is labelled by the task, whoever teaches


def rlaif_gradient(bias, **changed):
    """The expected gradient over all pairs of completions as groups of two, at LOGITS."""
    config = rlaif.Config(task="enumerable-3-4", group_size=2, batch_size=2, **changed)
    given = rlaif.Given(None, Exact(jnp.asarray(REWARD), bias))
    opponent = EVERY[np.repeat(OPPONENTS, N)]
    prompt_ids, ids = jnp.asarray(ALL_PROMPTS), jnp.asarray(ALL)
    score = rlaif.judge(prompt_ids, ids, opponent, config, given)[0].reshape(X, N)
    reference = sequences(token_log_probs(REFERENCE))
    first, second = np.repeat(np.arange(N), N), np.tile(np.arange(N), N)

    def pair(x):
        return jnp.stack([x[first], x[second]], 1)

    def of_pair(log_prob, mask, total):
        batch = rlaif.Batch(None, None, mask, rlaif.advantages(total, config))
        return rlaif.objective(log_prob, batch)

    def loss(logits):
        log_probs = token_log_probs(logits)
        old = lax.stop_gradient(sequences(log_probs))
        weight, total = jnp.exp(old), score - BETA * (old - reference)

        def of_prompt(log_prob, total, weight):
            each = jax.vmap(of_pair)(pair(log_prob), pair(jnp.asarray(MASK)), pair(total))
            return (weight[first] * weight[second] * each).sum()

        return jax.vmap(of_prompt)(log_probs.reshape(X, N, L), total, weight).mean()

    return -np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(LOGITS)))


def test_direct_feedback_has_the_gradient_of_rloo_on_the_gold_reward():
    true = true_gradient(LOGITS)
    assert relative(rlaif_gradient(0.0), true) < 1e-12
    assert relative(rlaif_gradient(0.7), true) < 1e-12
    # The bias is the same for all completions of a prompt, so the baseline takes it off as well.
    assert relative(rlaif_gradient(0.7, orders=1), true) < 1e-12


def test_probabilities_of_winning_are_another_reward_and_feel_a_bias_in_one_order():
    wins = nn.sigmoid(REWARD - np.take_along_axis(REWARD, OPPONENTS[:, None], 1))
    reference = sequences(token_log_probs(REFERENCE))

    def objective(logits):
        log_p = sequences(token_log_probs(logits))
        return (jnp.exp(log_p) * (wins - BETA * (log_p - reference))).sum(1).mean()

    expected = np.asarray(jax.grad(objective)(jnp.asarray(LOGITS)))
    assert relative(expected, true_gradient(LOGITS)) > 0.1
    assert relative(rlaif_gradient(0.7, reward="probability"), expected) < 1e-12
    assert relative(rlaif_gradient(0.0, reward="probability", orders=1), expected) < 1e-12
    assert relative(rlaif_gradient(0.7, reward="probability", orders=1), expected) > 0.02


@pytest.mark.parametrize("swap_share", [0.5, 0.2])
def test_the_best_judge_has_a_constant_bias_that_shares_of_swaps_teach(swap_share):
    wins, bias = nn.sigmoid(GOLD), np.log((1 - swap_share) / swap_share)

    def slope(log_odds, is_swapped):
        swapped = jnp.full(len(log_odds), is_swapped)
        return len(log_odds) * jax.grad(lambda x: judge.objective(x, swapped)[0])(log_odds)

    def expected(log_odds):  # the first is chosen and not swapped, or the second is and swapped
        right = wins * (1 - swap_share) * slope(log_odds, False)
        return right + (1 - wins) * swap_share * slope(log_odds, True)

    np.testing.assert_allclose(expected(jnp.asarray(GOLD + bias)), 0.0, atol=1e-12)
    assert (expected(jnp.asarray(GOLD + bias + 0.1)) > 1e-4).all()
