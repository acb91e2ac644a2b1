import doctest
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg.kernels import distributions, losses, preference, returns

pytestmark = pytest.mark.fast

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def strict_shapes():
    with jax.numpy_rank_promotion("raise"):
        yield


def golden(name, group="cases"):
    return json.loads((GOLDEN / f"trl_{name}.json").read_text())[group]


def arrays(case, *names):
    values = [np.array(case[name]) for name in names]
    return [jnp.asarray(v, bool if v.dtype == bool else jnp.float32) for v in values]


def single(*values):
    return [jnp.asarray(v, jnp.float32) for v in values]


def close(actual, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def tokens(seed=0, batch=6, longest=5):
    """Log-probabilities of two models, and a mask with a row of each length from 0 to 5."""
    draw = np.random.default_rng(seed)
    log_prob, ref_log_prob = np.log(draw.uniform(0.05, 0.9, (2, batch, longest)))
    mask = np.arange(longest) < np.arange(batch)[:, None]
    return log_prob, ref_log_prob, mask


# --- masked tokens -------------------------------------------------------------------------------


def test_masked_sum_and_mean_are_the_loop():
    x, _, mask = tokens()
    actual_sum = preference.masked_sum(*single(x), mask, axis=1)
    actual_mean = preference.masked_mean(*single(x), mask, axis=1)
    total = count = 0.0
    for i in range(len(x)):
        row = [v for v, keep in zip(x[i], mask[i], strict=True) if keep]
        assert float(actual_sum[i]) == pytest.approx(sum(row), rel=1e-6)
        assert float(actual_mean[i]) == pytest.approx(sum(row) / max(len(row), 1), rel=1e-6)
        total, count = total + sum(row), count + len(row)
    assert float(preference.masked_sum(*single(x), mask)) == pytest.approx(total, rel=1e-6)
    assert float(preference.masked_mean(*single(x), mask)) == pytest.approx(total / count, rel=1e-6)


def test_masked_mean_by_hand_and_its_reductions():
    x = jnp.array([[1.0, 2.0], [6.0, 9.0]])
    mask = jnp.array([[True, True], [True, False]])
    # over tokens (1 + 2 + 6) / 3; over completions (1.5 + 6) / 2
    assert float(preference.masked_mean(x, mask)) == 3.0
    assert float(preference.masked_mean(x, mask, axis=1).mean()) == 3.75
    assert float(preference.masked_mean(x, jnp.ones_like(mask))) == float(x.mean())
    assert preference.masked_mean(x, mask, axis=(0, 1)).tolist() == 3.0
    counts = jnp.array([[3, 4], [5, 7]])
    assert float(preference.masked_mean(counts, mask)) == 4.0
    assert preference.masked_sum(counts, mask).dtype == jnp.int32


@pytest.mark.parametrize("outside", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize(
    "function",
    [preference.masked_sum, preference.masked_mean, preference.masked_whiten],
    ids=lambda f: f.__name__,
)
def test_what_is_outside_the_mask_has_no_effect(function, outside):
    x, mask = jnp.array([1.0, 2.0, 5.0, 0.5]), jnp.array([True, True, True, False])
    weight = jnp.array([0.3, -0.7, 2.0, 1.0])

    def value_and_slope(x):
        return jax.value_and_grad(lambda x: jnp.sum(function(x, mask) * weight))(x)

    expected, expected_slope = value_and_slope(x)
    actual, actual_slope = value_and_slope(x.at[3].set(outside))
    assert float(actual) == float(expected)
    assert actual_slope.tolist() == expected_slope.tolist()
    assert float(actual_slope[3]) == 0.0


@pytest.mark.parametrize(
    "function",
    [preference.masked_sum, preference.masked_mean, preference.masked_whiten],
    ids=lambda f: f.__name__,
)
def test_an_empty_mask_gives_zero_without_a_gradient(function):
    x, mask = jnp.array([jnp.nan, 2.0]), jnp.zeros(2, bool)
    value, slope = jax.value_and_grad(lambda x: jnp.sum(function(x, mask)))(x)
    assert float(value) == 0.0
    assert slope.tolist() == [0.0, 0.0]


def test_masked_whiten_is_the_loop():
    x, _, mask = tokens(1)
    kept = [x[i, j] for i in range(6) for j in range(5) if mask[i, j]]
    mean = sum(kept) / len(kept)
    variance = sum((v - mean) ** 2 for v in kept) / len(kept)
    for shift, offset in ((True, 0.0), (False, mean)):
        actual = preference.masked_whiten(*single(x), mask, shift)
        expected = np.where(mask, (x - mean) / np.sqrt(variance + 1e-8) + offset, 0.0)
        close(actual, expected)


def test_masked_whiten_has_the_moments_it_promises_and_survives_a_constant():
    x, mask = jnp.array([3.0, 7.0, 7.0, 100.0]), jnp.array([True, True, True, False])
    white = preference.masked_whiten(x, mask)
    assert float(preference.masked_mean(white, mask)) == pytest.approx(0.0, abs=1e-6)
    assert float(preference.masked_mean(white**2, mask)) == pytest.approx(1.0, rel=1e-5)
    kept = preference.masked_whiten(x, mask, shift_mean=False)
    assert float(preference.masked_mean(kept, mask)) == pytest.approx(17 / 3, rel=1e-5)
    constant = preference.masked_whiten(jnp.full(4, 7.0), mask, shift_mean=False)
    assert constant.tolist() == [7.0, 7.0, 7.0, 0.0]
    # A large eps takes over: 4 / sqrt(0 + 4) of a spread of 1e-3 or so.
    small = preference.masked_whiten(jnp.array([-1e-3, 1e-3]), jnp.ones(2, bool), eps=4.0)
    close(small, [-5e-4, 5e-4])


@pytest.mark.parametrize("case", golden("ppo"), ids=lambda c: c["kl_estimator"] + str(c["lam"]))
def test_masked_whiten_is_that_of_trl(case):
    mask, advantage, expected = arrays(case, "mask", "advantage", "whitened_advantage")
    n = int(mask.sum())
    # TRL divides by n - 1.
    close(preference.masked_whiten(advantage, mask) * np.sqrt((n - 1) / n), expected)


def test_masked_whiten_that_keeps_the_mean_is_that_of_trl():
    (case,) = (case for case in golden("ppo") if case["whiten_rewards"])
    mask, reward, expected = arrays(case, "value_mask", "reward", "whitened_reward")
    mean, n = preference.masked_mean(reward, mask), int(mask.sum())
    actual = preference.masked_whiten(reward, mask, shift_mean=False)
    # TRL divides by n - 1.
    close(jnp.where(mask, (actual - mean) * np.sqrt((n - 1) / n) + mean, 0.0), expected)


# --- divergence ----------------------------------------------------------------------------------


def test_token_kl_is_the_loop():
    log_prob, ref_log_prob, _ = tokens(2)
    for p, q in zip(log_prob.flat, ref_log_prob.flat, strict=True):
        expected = {"k1": p - q, "k2": (p - q) ** 2 / 2, "k3": np.exp(q - p) - 1 - (q - p)}
        for name, value in expected.items():
            actual = preference.token_kl(*single(p, q), name)
            assert float(actual) == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_token_kl_by_hand_and_at_equal_policies():
    # probabilities 1/2 and 1/4: log 2, (log 2)^2 / 2, 1/2 - 1 + log 2
    half, quarter = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
    two = np.log(2.0)
    expected = {"k1": two, "k2": two**2 / 2, "k3": two - 0.5}
    for name, value in expected.items():
        close(preference.token_kl(half, quarter, name), [value])
        assert preference.token_kl(half, half, name).tolist() == [0.0]
    assert float(preference.token_kl(quarter, half, "k1")[0]) < 0.0
    assert float(preference.token_kl(quarter, half, "k3")[0]) > 0.0


@pytest.mark.parametrize("case", golden("ppo"), ids=lambda c: c["kl_estimator"] + str(c["lam"]))
def test_token_kl_is_that_of_trl(case):
    log_prob, ref_log_prob, expected = arrays(case, "old_log_prob", "ref_log_prob", "kl")
    close(preference.token_kl(log_prob, ref_log_prob, case["kl_estimator"]), expected)


@pytest.mark.parametrize("name", ["K1", "kl", ""])
def test_an_unknown_estimator_is_refused(name):
    with pytest.raises(ValueError, match=f'estimator is "{name}"; it must be "k1", "k2" or "k3"'):
        preference.token_kl(jnp.zeros(1), jnp.zeros(1), name)


def one_state():
    """Logits of a policy and a reference over four tokens, in 64 bits."""
    draw = np.random.default_rng(3)
    return jnp.asarray(draw.normal(size=4)), jnp.asarray(draw.normal(size=4))


def divergence(x, y):
    return distributions.categorical(x).kl_divergence(distributions.categorical(y))


def slope_in_reward(logits, ref_logits, name):
    """Expected score-function gradient, over all tokens, of an estimate that is data."""
    estimate = preference.token_kl(jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits), name)
    weight = jax.nn.softmax(logits) * estimate
    return jax.grad(lambda x: jnp.sum(weight * jax.nn.log_softmax(x)))(logits)


def slope_in_loss(logits, ref_logits, name):
    """Expected gradient of an estimate that is differentiated, over all tokens as data."""
    weight = jax.nn.softmax(logits)

    def loss(x):
        estimate = preference.token_kl(jax.nn.log_softmax(x), jax.nn.log_softmax(ref_logits), name)
        return jnp.sum(weight * estimate)

    return jax.grad(loss)(logits)


def test_each_estimator_has_the_gradient_that_its_docstring_states():
    with jax.enable_x64(True):
        logits, ref_logits = one_state()
        reverse = jax.grad(divergence)(logits, ref_logits)
        forward = jax.grad(lambda x: divergence(ref_logits, x))(logits)
        close(slope_in_reward(logits, ref_logits, "k1"), reverse, atol=1e-12)
        close(slope_in_reward(logits, ref_logits, "k3"), reverse - forward, atol=1e-12)
        close(slope_in_loss(logits, ref_logits, "k1"), jnp.zeros(4), atol=1e-12)
        close(slope_in_loss(logits, ref_logits, "k2"), reverse, atol=1e-12)
        close(slope_in_loss(logits, ref_logits, "k3"), forward, atol=1e-12)
        assert float(jnp.abs(reverse - forward).max()) > 0.1


def test_k1_and_k3_have_the_right_mean_and_k2_has_not():
    with jax.enable_x64(True):
        logits, ref_logits = one_state()
        log_prob, ref_log_prob = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
        mean = {
            name: float(jnp.exp(log_prob) @ preference.token_kl(log_prob, ref_log_prob, name))
            for name in ("k1", "k2", "k3")
        }
        expected = float(divergence(logits, ref_logits))
        assert mean["k1"] == pytest.approx(expected, rel=1e-12)
        assert mean["k3"] == pytest.approx(expected, rel=1e-12)
        assert mean["k2"] != pytest.approx(expected, rel=0.01)


def two_tokens(table):
    """Log-probabilities of the nine completions of two tokens: a first, then a second after it."""
    first, second = jax.nn.log_softmax(table[0]), jax.nn.log_softmax(table[1:4])
    return jnp.stack([jnp.repeat(first, 3), second.reshape(-1)], 1)


def test_over_two_tokens_only_k1_in_the_reward_has_the_gradient_of_the_divergence():
    with jax.enable_x64(True):
        draw = np.random.default_rng(4)
        table, ref_table = jnp.asarray(draw.normal(size=(2, 4, 3)))
        log_prob, ref_log_prob = two_tokens(table), two_tokens(ref_table)
        weight = jnp.exp(log_prob.sum(1))[:, None]
        estimate = preference.token_kl(log_prob, ref_log_prob, "k1")
        to_the_end = jnp.cumsum(estimate[:, ::-1], 1)[:, ::-1]

        def exact(x):
            each = two_tokens(x).sum(1)
            return jnp.sum(jnp.exp(each) * (each - ref_log_prob.sum(1)))

        def in_loss(x):
            return jnp.sum(weight * preference.token_kl(two_tokens(x), ref_log_prob, "k2"))

        expected = jax.grad(exact)(table)
        in_reward = jax.grad(lambda x: jnp.sum(weight * to_the_end * two_tokens(x)))(table)
        close(in_reward, expected, atol=1e-12)
        # By itself at each state: right for the last token. For the first, it lacks what that token
        # does to the divergence of the second.
        partial = jax.grad(in_loss)(table)
        later = jax.vmap(divergence)(table[1:], ref_table[1:])
        missing = jax.grad(lambda x: jax.nn.softmax(x) @ later)(table[0])
        close(partial[1:], expected[1:], atol=1e-12)
        close(partial[0] + missing, expected[0], atol=1e-12)
        assert float(jnp.abs(missing).max()) > 0.01


# --- preferences ---------------------------------------------------------------------------------


def test_bradley_terry_is_the_loop():
    chosen, rejected = np.random.default_rng(5).normal(scale=2.0, size=(2, 40))
    for smoothing in (0.0, 0.1):
        expected = []
        for a, b in zip(chosen, rejected, strict=True):
            p = 1.0 / (1.0 + np.exp(b - a))
            expected.append(-(1.0 - smoothing) * np.log(p) - smoothing * np.log(1.0 - p))
        close(preference.bradley_terry(*single(chosen, rejected), smoothing), expected)


def test_bradley_terry_and_its_probability_by_hand():
    # odds of 3 to 1: -log 3/4 = log 4/3, and the other way round log 4; a tie is log 2
    a, b = jnp.log(jnp.array([3.0, 1.0, 1.0])), jnp.log(jnp.array([1.0, 3.0, 1.0]))
    close(preference.preference_probability(a, b), [0.75, 0.25, 0.5])
    close(preference.bradley_terry(a, b), np.log([4 / 3, 4.0, 2.0]))
    # smoothing of 1/4: 3/4 log 4/3 + 1/4 log 4
    smoothed = 0.75 * np.log(4 / 3) + 0.25 * np.log(4.0)
    close(preference.bradley_terry(a, b, 0.25)[0], smoothed)


def test_bradley_terry_stays_finite_and_ignores_what_both_rewards_share():
    a, b = jnp.array([1e4, -1e4]), jnp.zeros(2)
    loss, slope = jax.value_and_grad(lambda a: preference.bradley_terry(a, b).sum())(a)
    assert float(loss) == 1e4
    assert slope.tolist() == [0.0, -1.0]
    assert preference.preference_probability(a, b).tolist() == [1.0, 0.0]
    few = jnp.array([1.0, -2.0])
    shifted = preference.bradley_terry(few + 8.0, few[::-1] + 8.0)
    close(shifted, preference.bradley_terry(few, few[::-1]))
    close(
        -jnp.log(preference.preference_probability(few, few[::-1])),
        preference.bradley_terry(few, few[::-1]),
    )


def test_smoothing_puts_the_minimum_at_its_own_odds():
    best = jnp.log(jnp.array([0.8 / 0.2]))
    slope = jax.grad(lambda d: preference.bradley_terry(d, jnp.zeros(1), 0.2).sum())
    close(slope(best), [0.0])
    assert float(slope(best - 0.1)[0]) < 0.0 < float(slope(best + 0.1)[0])


@pytest.mark.parametrize("case", golden("reward_model"), ids=lambda c: str(c["center"]))
def test_the_loss_of_a_reward_model_is_that_of_trl(case):
    chosen, rejected, margin = arrays(case, "chosen_reward", "rejected_reward", "margin")

    def loss(chosen, rejected):
        centring = (case["center"] or 0.0) * jnp.mean(jnp.square(chosen + rejected))
        return jnp.mean(preference.bradley_terry(chosen - margin, rejected)) + centring

    value, slopes = jax.value_and_grad(loss, (0, 1))(chosen, rejected)
    assert float(value) == pytest.approx(case["loss"], rel=1e-5)
    close(slopes[0], case["chosen_slope"])
    close(slopes[1], case["rejected_slope"])
    assert float(jnp.mean(chosen > rejected)) == pytest.approx(case["accuracy"])


# --- losses of pairs and of judged completions ---------------------------------------------------

DPO = {case["loss_type"]: case for case in golden("dpo")}


def of_pairs(loss, case, reduce=preference.masked_sum):
    """Losses of pairs from summed (or averaged) log-ratios, and their slope in token log-probs."""
    log_prob, ref_log_prob, mask = arrays(case, "log_prob", "ref_log_prob", "mask")

    def losses(log_prob):
        return loss(*jnp.split(reduce(log_prob - ref_log_prob, mask, axis=1), 2))

    return losses(log_prob), jax.grad(lambda x: losses(x).sum())(log_prob)


def robust(chosen, rejected, beta, smoothing):
    right, wrong = preference.dpo(chosen, rejected, beta), preference.dpo(rejected, chosen, beta)
    return ((1.0 - smoothing) * right - smoothing * wrong) / (1.0 - 2.0 * smoothing)


@pytest.mark.parametrize("name", ["sigmoid", "aot", "sigmoid_norm", "robust", "ipo"])
def test_the_losses_of_pairs_are_those_of_trl(name):
    case = DPO[name]
    beta, smoothing = case["beta"], case["label_smoothing"]
    reduce, loss = {
        "sigmoid": (preference.masked_sum, preference.dpo),
        # Of a single pair, TRL's "aot" is the loss of conservative DPO.
        "aot": (preference.masked_sum, preference.dpo),
        "robust": (preference.masked_sum, robust),
        # TRL divides these two by the length of the completion.
        "sigmoid_norm": (preference.masked_mean, preference.dpo),
        "ipo": (preference.masked_mean, lambda c, r, tau, _: preference.ipo(c, r, tau)),
    }[name]
    losses, slope = of_pairs(lambda c, r: loss(c, r, beta, smoothing), case, reduce)
    close(losses, case["loss"])
    close(slope, case["slope"])
    if reduce is preference.masked_mean:
        summed, _ = of_pairs(lambda c, r: loss(c, r, beta, smoothing), case)
        assert float(jnp.abs(summed - jnp.array(case["loss"])).max()) > 0.1


def test_the_losses_of_pairs_are_the_loops():
    chosen, rejected = -np.random.default_rng(6).gamma(1.0, 1.0, size=(2, 40))
    expected = {"dpo": [], "ipo": [], "simpo": [], "orpo": []}
    for a, b in zip(chosen, rejected, strict=True):
        sigma = lambda x: 1.0 / (1.0 + np.exp(-x))  # noqa: E731
        odds = [np.exp(m) / (1.0 - np.exp(m)) for m in (a, b)]
        p = sigma(0.3 * (a - b))
        expected["dpo"].append(-0.8 * np.log(p) - 0.2 * np.log(1.0 - p))
        expected["ipo"].append((a - b - 1.0 / (2.0 * 0.3)) ** 2)
        expected["simpo"].append(-np.log(sigma(2.0 * a - 2.0 * b - 0.7)))
        expected["orpo"].append(-a - 0.3 * np.log(sigma(np.log(odds[0] / odds[1]))))
    pair = single(chosen, rejected)
    close(preference.simpo(*pair, 2.0), preference.dpo(*pair, 2.0))
    close(preference.dpo(*pair, 0.3, 0.2), expected["dpo"])
    close(preference.ipo(*pair, 0.3), expected["ipo"])
    close(preference.simpo(*pair, 2.0, 0.7), expected["simpo"])
    close(preference.orpo(*pair, 0.3), expected["orpo"], rtol=1e-4)


def test_the_gradients_of_simpo_and_orpo_are_the_formulas():
    chosen, rejected = -np.random.default_rng(7).gamma(1.0, 1.0, size=(2, 40))
    sigma = lambda x: 1.0 / (1.0 + np.exp(-x))  # noqa: E731
    log_odds = lambda m: m - np.log1p(-np.exp(m))  # noqa: E731
    behind = -2.0 * sigma(-(2.0 * (chosen - rejected) - 0.7))
    share = -0.3 * sigma(log_odds(rejected) - log_odds(chosen))
    slopes = {
        "simpo": (behind, -behind),
        # d log odds / dm = 1 / (1 - p), as in eq. 10 of the paper on ORPO
        "orpo": (share / (1.0 - np.exp(chosen)) - 1.0, -share / (1.0 - np.exp(rejected))),
    }
    losses = {
        "simpo": lambda c, r: preference.simpo(c, r, 2.0, 0.7).sum(),
        "orpo": lambda c, r: preference.orpo(c, r, 0.3).sum(),
    }
    for name, loss in losses.items():
        actual = jax.grad(loss, (0, 1))(*single(chosen, rejected))
        close(jnp.stack(actual), np.stack(slopes[name]), rtol=1e-4)


@pytest.mark.parametrize("case", golden("simpo"), ids=lambda c: str(c["beta"]))
def test_the_loss_of_means_is_that_of_trl(case):
    log_prob, mask = arrays(case, "log_prob", "mask")

    def loss(log_prob):
        means = jnp.split(preference.masked_mean(log_prob, mask, 1), 2)
        return preference.simpo(*means, case["beta"], case["simpo_gamma"]).mean()

    value, slope = jax.value_and_grad(loss)(log_prob)
    close(value, case["loss"])
    close(slope, case["slope"])


@pytest.mark.parametrize("case", golden("orpo"), ids=lambda c: str(c["beta"]))
def test_the_loss_of_odds_is_that_of_trl_but_for_the_likelihood(case):
    log_prob, mask = arrays(case, "log_prob", "mask")
    likely = jnp.split(mask, 2)[0]

    def loss(log_prob):
        chosen, rejected = jnp.split(preference.masked_mean(log_prob, mask, 1), 2)
        own = preference.orpo(chosen, rejected, case["beta"]).mean()
        # TRL takes the mean over all tokens of a batch, not that of each completion's mean.
        over_tokens = preference.masked_mean(jnp.split(log_prob, 2)[0], likely)
        return own + chosen.mean() - over_tokens, own

    (value, own), slope = jax.value_and_grad(loss, has_aux=True)(log_prob)
    close(value, case["loss"])
    close(slope, case["slope"])
    assert abs(float(own) - case["loss"]) > 0.01


def test_odds_stay_finite_and_exact_at_both_ends():
    certain, tiny = jnp.array([0.0, -1e-4]), jnp.array([-40.0, -90.0])
    for chosen, rejected in ((certain, tiny), (tiny, certain), (certain, certain)):
        loss = lambda c, r: preference.orpo(c, r, 1.0).sum()  # noqa: E731
        value, slopes = jax.value_and_grad(loss, (0, 1))(chosen, rejected)
        assert np.isfinite([value, *slopes[0], *slopes[1]]).all()
    # p = exp(-1e-4): odds of about 1e4 - 1/2, which 1 - p in single precision would miss
    loss = preference.orpo(jnp.array([-1e-4]), jnp.array([-1e-4 - 1e-6]), 1.0) - 1e-4
    odds = [np.exp(-m) / -np.expm1(-m) for m in (1e-4, 1e-4 + 1e-6)]
    close(loss, [-np.log(odds[0] / (odds[0] + odds[1]))], rtol=1e-6)


@pytest.mark.parametrize("case", golden("kto"), ids=lambda c: str(c["beta"]))
def test_the_loss_of_judged_completions_is_that_of_trl(case):
    log_prob, ref_log_prob, mask, label = arrays(case, "log_prob", "ref_log_prob", "mask", "label")
    others = arrays(case, "mismatched_log_prob", "mismatched_ref_log_prob")
    kl = jnp.mean(others[0] - others[1])
    weights = (case["desirable_weight"], case["undesirable_weight"])

    def loss(log_prob):
        log_ratio = preference.masked_sum(log_prob - ref_log_prob, mask, 1)
        return preference.kto(log_ratio, label, kl, case["beta"], *weights).mean()

    value, slope = jax.value_and_grad(loss)(log_prob)
    assert max(float(kl), 0.0) == pytest.approx(case["kl"], abs=1e-6)
    close(value, case["loss"])
    close(slope, case["slope"])


def test_judged_completions_by_hand():
    # f - z0 = log 3 at beta 1: a loss of 1/4 if desirable, of 3/4 if not
    f, label = jnp.full(2, 1.0 + jnp.log(3.0)), jnp.array([True, False])
    close(preference.kto(f, label, 1.0, 1.0, 2.0, 4.0), [0.5, 3.0])
    # a negative estimate counts as 0, and z0 has no gradient
    close(preference.kto(jnp.zeros(2), label, -5.0, 1.0), [0.5, 0.5])
    slope = jax.grad(lambda kl: preference.kto(f, label, kl, 1.0).sum())
    assert float(slope(1.0)) == 0.0


# --- rewards of tokens, advantages of completions ------------------------------------------------


def test_token_rewards_are_the_loop():
    log_prob, ref_log_prob, mask = tokens(6)
    mask[5, 2] = False  # a gap: the last action is still the last that is True
    score = np.random.default_rng(6).normal(size=6)
    expected = np.zeros((6, 5))
    for i in range(6):
        for j in np.flatnonzero(mask[i]):
            expected[i, j] = -0.3 * (log_prob[i, j] - ref_log_prob[i, j])
            if not mask[i, j + 1 :].any():
                expected[i, j] += score[i]
    actual = preference.token_rewards(*single(score, log_prob, ref_log_prob), mask, 0.3)
    close(actual, expected)


def test_token_rewards_sum_to_the_score_less_the_penalty():
    log_prob, ref_log_prob, mask = tokens(7)
    mask[0, 0] = True
    score, log_prob, ref_log_prob = single(np.arange(6.0), log_prob, ref_log_prob)
    reward = preference.token_rewards(score, log_prob, ref_log_prob, mask, 0.5)
    k1 = preference.token_kl(log_prob, ref_log_prob, "k1")
    close(reward.sum(1), score - 0.5 * preference.masked_sum(k1, mask, axis=1))
    alone = preference.token_rewards(score, log_prob, ref_log_prob, mask, 0.0)
    assert np.flatnonzero(alone[3]).tolist() == [2]
    assert alone.sum(1).tolist() == score.tolist()


def test_token_rewards_of_an_integer_score_keep_their_fractions():
    log_prob, ref_log_prob = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.5]])
    mask = jnp.ones((1, 2), bool)
    actual = preference.token_rewards(jnp.array([3]), log_prob, ref_log_prob, mask, 0.5)
    assert actual.tolist() == [[-0.25, 3.25]]
    integers = preference.token_rewards(
        jnp.array([3]), jnp.array([[-1, -2]]), jnp.array([[-2, -2]]), mask, 1
    )
    assert integers.tolist() == [[-1.0, 3.0]]
    assert integers.dtype == jnp.float32


def test_what_is_outside_the_mask_has_no_effect_on_the_rewards_of_tokens():
    mask = jnp.array([[True, False], [False, False]])
    bad = jnp.array([[-1.0, jnp.nan], [-jnp.inf, jnp.nan]])
    actual = preference.token_rewards(jnp.array([2.0, 4.0]), bad, bad, mask, 0.5)
    assert actual.tolist() == [[2.0, 0.0], [0.0, 0.0]]


PPO = golden("ppo")
PPO_NAMES = [f"{case['kl_estimator']}, lambda {case['lam']}" for case in PPO]


@pytest.mark.parametrize("case", PPO, ids=PPO_NAMES)
def test_rewards_of_tokens_are_those_of_trl_but_for_the_place_of_the_score(case):
    score, log_prob, ref_log_prob, mask, reward = arrays(
        case, "score", "old_log_prob", "ref_log_prob", "mask", "reward"
    )
    expected = np.array(reward)
    for row, length in zip(expected, np.sum(mask, 1), strict=True):
        # TRL rewards the first padding token instead of the last action, where there is room.
        if length < len(row):
            row[length - 1] += row[length]
            row[length] = 0.0
    if case["kl_estimator"] == "k1":
        actual = preference.token_rewards(score, log_prob, ref_log_prob, mask, case["kl_coef"])
    else:
        penalty = preference.token_kl(log_prob, ref_log_prob, "k3")
        zero = jnp.zeros_like(log_prob)
        actual = preference.token_rewards(score, zero, zero, mask, 0.0)
        actual -= case["kl_coef"] * jnp.where(mask, penalty, 0.0)
    close(actual, expected)


def gae(case, reward, value, mask):
    """Advantages [B, L] of completions that end with the last True of each row of the mask."""
    ends = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    next_value = jnp.pad(value[:, 1:], ((0, 0), (0, 1)))
    rows = [x.T for x in (reward, value, next_value, ends, ends)]
    return returns.gae(*rows, case["gamma"], case["lam"]).T


@pytest.mark.parametrize("case", PPO, ids=PPO_NAMES)
def test_advantages_of_tokens_are_those_of_trl(case):
    name = "whitened_reward" if case["whiten_rewards"] else "reward"
    reward, value, expected, target = arrays(case, name, "old_value", "advantage", "target")
    # TRL runs to the end of the array, over padding.
    actual = gae(case, reward, value, jnp.ones_like(value, bool))
    close(actual, expected, atol=3e-6)
    close(actual + value, target, atol=3e-6)


def test_the_place_of_the_score_makes_no_difference_where_lambda_is_one():
    case = PPO[1]
    assert case["lam"] == case["gamma"] == 1.0
    score, log_prob, ref_log_prob, mask, value, expected = arrays(
        case, "score", "old_log_prob", "ref_log_prob", "mask", "old_value", "advantage"
    )
    reward = preference.token_rewards(score, log_prob, ref_log_prob, mask, case["kl_coef"])
    actual = gae(case, reward, value, mask)
    close(jnp.where(mask, actual, 0.0), jnp.where(mask, expected, 0.0), atol=3e-6)


@pytest.mark.parametrize("case", PPO, ids=PPO_NAMES)
def test_the_losses_over_tokens_are_those_of_trl(case):
    log_prob, old_log_prob, advantage, mask = arrays(
        case, "log_prob", "old_log_prob", "whitened_advantage", "mask"
    )
    value, old_value, target, value_mask = arrays(
        case, "value", "old_value", "target", "value_mask"
    )

    def policy(x):
        loss = losses.ppo_clip(x, old_log_prob, advantage, case["cliprange"])
        return preference.masked_mean(loss, mask)

    def critic(x):
        loss = losses.value_loss_clipped(x, old_value, target, case["cliprange_value"])
        return preference.masked_mean(loss, value_mask)

    for name, loss, x in (("policy", policy, log_prob), ("value", critic, value)):
        actual, slope = jax.value_and_grad(loss)(x)
        assert float(actual) == pytest.approx(case[f"{name}_loss"], rel=1e-5, abs=1e-6)
        close(slope, case[f"{name}_slope"])


def test_leave_one_out_is_the_loop():
    reward = np.random.default_rng(8).normal(size=(4, 5))
    expected = np.empty((4, 5))
    for i in range(4):
        for j in range(5):
            expected[i, j] = reward[i, j] - np.mean([reward[i, k] for k in range(5) if k != j])
    close(preference.leave_one_out(*single(reward)), expected)


def test_leave_one_out_by_hand_and_its_reductions():
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    reward = jnp.array([[1.0, 2.0, 6.0]])
    assert preference.leave_one_out(reward).tolist() == [[-3.0, -1.5, 4.5]]
    assert preference.leave_one_out(reward + 64.0).tolist() == [[-3.0, -1.5, 4.5]]
    assert preference.leave_one_out(reward[:, :2]).tolist() == [[-1.0, 1.0]]
    # Equal rewards are equal, whatever their mean rounds to.
    assert preference.leave_one_out(jnp.full((1, 7), 0.1)).tolist() == [[0.0] * 7]
    correct = preference.leave_one_out(jnp.array([[True, False, False]]))
    assert correct.tolist() == [[1.0, -0.5, -0.5]]
    small = preference.leave_one_out(jnp.array([[0, 200]], jnp.uint8))
    assert small.tolist() == [[-200.0, 200.0]]


def test_leave_one_out_of_a_single_completion_is_refused():
    with pytest.raises(ValueError, match="the group size is 1; leave-one-out needs at least 2"):
        preference.leave_one_out(jnp.ones((3, 1)))


def test_leave_one_out_is_unbiased_where_the_mean_of_the_group_is_not():
    with jax.enable_x64(True):
        log_prob = jax.nn.log_softmax(jnp.array([0.3, -1.0, 0.6]))
        value = jnp.array([1.0, 3.0, -2.0])
        pairs = jnp.stack(jnp.meshgrid(jnp.arange(3), jnp.arange(3)), -1).reshape(9, 2)
        weight = jnp.exp(log_prob[pairs].sum(1))[:, None]
        score = jnp.eye(3) - jnp.exp(log_prob)[None]

        def gradient(advantage):
            return jnp.einsum("bg,bga->a", weight * advantage, score[pairs]) / 2

        exact = jnp.exp(log_prob) @ (value[:, None] * score)
        reward = value[pairs]
        close(gradient(preference.leave_one_out(reward)), exact, atol=1e-12)
        close(gradient(reward - reward.mean(1, keepdims=True)), exact / 2, atol=1e-12)


@pytest.mark.parametrize(
    "case", golden("rloo", "advantages"), ids=lambda c: f"groups of {c['group_size']}"
)
def test_leave_one_out_of_penalised_scores_is_that_of_trl(case):
    score, log_prob, ref_log_prob, mask = arrays(case, "score", "log_prob", "ref_log_prob", "mask")
    reward = preference.token_rewards(score, log_prob, ref_log_prob, mask, case["beta"]).sum(1)
    actual = preference.leave_one_out(reward.reshape(-1, case["group_size"]))
    close(actual.reshape(-1), case["advantage"])


@pytest.mark.parametrize("case", golden("rloo", "losses"), ids=lambda c: str(c["clip_eps"]))
def test_the_clipped_loss_of_whole_completions_is_that_of_trl(case):
    log_prob, old_log_prob, advantage, mask = arrays(
        case, "log_prob", "old_log_prob", "advantage", "mask"
    )

    def loss(x):
        both = [preference.masked_sum(y, mask, axis=1) for y in (x, old_log_prob)]
        return losses.ppo_clip(*both, advantage, case["clip_eps"]).mean()

    value, slope = jax.value_and_grad(loss)(log_prob)
    assert float(value) == pytest.approx(case["loss"], rel=1e-5)
    close(slope, case["slope"])


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", preference.SCALES)
def test_group_advantages_are_the_loop(scale):
    reward = np.random.default_rng(15).normal(size=(4, 5))
    expected = np.empty((4, 5))
    for i in range(4):
        of_scale = {"group": reward[i], "batch": reward.ravel(), "none": None}[scale]
        std = 1.0
        if of_scale is not None:
            mean = sum(of_scale) / len(of_scale)
            variance = sum((r - mean) ** 2 for r in of_scale) / (len(of_scale) - 1)
            std = np.sqrt(variance) + 0.3
        for j in range(5):
            expected[i, j] = (reward[i, j] - sum(reward[i]) / 5) / std
    close(preference.group_advantages(*single(reward), scale, 0.3), expected)


def test_group_advantages_by_hand_and_their_reductions():
    # mean 2, std sqrt((1 + 0 + 1) / 2) = 1
    reward = jnp.array([[1.0, 2.0, 3.0]])
    assert preference.group_advantages(reward, "group", 1.0).tolist() == [[-0.5, 0.0, 0.5]]
    assert preference.group_advantages(reward, "none").tolist() == [[-1.0, 0.0, 1.0]]
    whole = preference.leave_one_out(reward + 7.0)
    close(preference.group_advantages(reward, "none"), whole * 2 / 3)
    correct = preference.group_advantages(jnp.array([[True, False]]), "none")
    assert correct.tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("scale", preference.SCALES)
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_equal_rewards_of_a_group_have_no_advantage_at_all(scale, eps):
    # 0.1 times seven does not round to seven times 0.1
    alone = preference.group_advantages(jnp.full((1, 7), 0.1), scale, eps)
    assert alone.tolist() == [[0.0] * 7]
    beside = jnp.array([[0.1] * 7, [0.0, 1.0] + [0.5] * 5])
    both = preference.group_advantages(beside, scale, eps)
    assert both[0].tolist() == [0.0] * 7 and (both[1, :2] != 0.0).all()


def test_a_group_of_two_has_the_sign_of_the_difference():
    with jax.enable_x64(True):
        reward = jnp.asarray(np.random.default_rng(16).normal(size=(50, 2)))
        sign = jnp.sign(reward - reward[:, ::-1]) / np.sqrt(2.0)
        close(preference.group_advantages(reward, "group", 0.0), sign, rtol=0, atol=1e-10)


def test_a_group_of_one_and_an_unknown_scale_are_refused():
    with pytest.raises(ValueError, match="the group size is 1; a group needs at least 2"):
        preference.group_advantages(jnp.ones((3, 1)))
    with pytest.raises(ValueError, match='scale is "std"; it must be "group", "batch" or "none"'):
        preference.group_advantages(jnp.ones((3, 2)), "std")


@pytest.mark.parametrize("case", golden("grpo", "advantages"), ids=lambda c: c["scale"])
def test_group_advantages_are_those_of_trl(case):
    (score,) = arrays(case, "score")
    groups = score.reshape(-1, case["group_size"])
    actual = preference.group_advantages(groups, case["scale"]).reshape(-1)
    close(actual, case["advantage"])


def test_sequence_log_ratio_is_the_loop_and_has_a_slope_for_each_token():
    log_prob, old_log_prob, mask = tokens(17)
    expected = np.zeros_like(log_prob)
    for i in range(len(mask)):
        length = int(mask[i].sum())
        expected[i, :length] = (log_prob - old_log_prob)[i, :length].sum() / max(length, 1)
    args = single(log_prob, old_log_prob)
    actual = preference.sequence_log_ratio(*args, mask)
    close(actual, expected)
    weight = jnp.arange(30.0).reshape(6, 5)

    def total(x):
        return (weight * preference.sequence_log_ratio(x, args[1], mask)).sum()

    assert jax.grad(total)(args[0]).tolist() == jnp.where(mask, weight, 0.0).tolist()


def test_one_ratio_for_a_completion_has_the_gradient_of_its_own_formula():
    log_prob, old_log_prob, mask = tokens(18)
    args, lengths = single(log_prob, old_log_prob), jnp.maximum(jnp.sum(jnp.asarray(mask), 1), 1)
    worth = jnp.arange(1.0, 7.0)

    def of_formula(x):
        sums = preference.masked_sum(x - args[1], mask, 1)
        return (worth * jnp.exp(sums / lengths)).sum()

    def of_tokens(x):
        ratio = jnp.exp(preference.sequence_log_ratio(x, args[1], mask))
        return (worth * preference.masked_mean(ratio, mask, 1)).sum()

    (_, expected), (_, actual) = (jax.value_and_grad(f)(args[0]) for f in (of_formula, of_tokens))
    close(actual, expected)


# --- divergences over the vocabulary --------------------------------------------------------------


def two_distributions(seed=19, number=20, words=6):
    draw = np.random.default_rng(seed)
    return np.log(draw.dirichlet(np.ones(words), (2, number)))


def test_divergences_are_the_loop():
    log_q, log_p = two_distributions()
    kl = lambda a, b: sum(np.exp(x) * (x - y) for x, y in zip(a, b, strict=True))  # noqa: E731
    expected = {name: [] for name in preference.DIVERGENCES}
    for q, p in zip(log_q, log_p, strict=True):
        mixture = np.log(0.3 * np.exp(p) + 0.7 * np.exp(q))
        expected["forward_kl"].append(kl(p, q))
        expected["reverse_kl"].append(kl(q, p))
        expected["jensen_shannon"].append(0.3 * kl(p, mixture) + 0.7 * kl(q, mixture))
    for name, values in expected.items():
        close(preference.vocabulary_divergence(*single(log_q, log_p), name, 0.3), values)


def test_jensen_shannon_tends_to_both_divergences_and_is_bounded():
    with jax.enable_x64(True):
        log_q, log_p = two_distributions(20)
        divergence = functools.partial(preference.vocabulary_divergence, log_q, log_p)
        for weight, name in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
            scaled = divergence("jensen_shannon", weight) / min(weight, 1 - weight)
            close(scaled, divergence(name), rtol=1e-3)
        disjoint = jnp.array([[0.0, -1e9], [-1e9, 0.0]])
        most = preference.vocabulary_divergence(disjoint[0], disjoint[1], "jensen_shannon")
        assert float(most) == pytest.approx(np.log(2.0))


@pytest.mark.parametrize("name", preference.DIVERGENCES)
def test_divergences_vanish_with_their_gradient_where_both_agree(name):
    # A word that neither can say, and whose log-probability has no digits left.
    logits = jnp.concatenate([jnp.arange(5.0), jnp.full(1, -1e9)])
    log_p = jax.nn.log_softmax(logits)

    def of_logits(x):
        return preference.vocabulary_divergence(jax.nn.log_softmax(x), log_p, name)

    value, gradient = jax.value_and_grad(of_logits)(logits)
    assert abs(float(value)) < 1e-6
    close(gradient, 0.0)
    _, apart = jax.value_and_grad(of_logits)(logits.at[0].add(1.0))
    assert 1e-4 < float(jnp.abs(apart).max()) < 1.0 and apart[5] == 0.0


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match='divergence is "kl"; it must be "forward_kl"'):
        preference.vocabulary_divergence(jnp.zeros(2), jnp.zeros(2), "kl")


# --- the best policies ---------------------------------------------------------------------------


def prompts(seed=9, number=3, completions=6):
    draw = np.random.default_rng(seed)
    ref_log_prob = np.log(draw.dirichlet(np.ones(completions), number))
    return ref_log_prob, draw.normal(size=(number, completions))


def test_the_optimal_policy_and_its_partition_are_the_loop():
    ref_log_prob, reward = prompts()
    for beta in (0.2, 1.0, 5.0):
        log_z = preference.log_partition(*single(ref_log_prob, reward), beta)
        best = preference.optimal_log_prob(*single(ref_log_prob, reward), beta)
        for i in range(3):
            terms = [np.exp(p + r / beta) for p, r in zip(ref_log_prob[i], reward[i], strict=True)]
            assert float(log_z[i]) == pytest.approx(np.log(sum(terms)), rel=1e-5, abs=1e-6)
            close(jnp.exp(best[i]), np.array(terms) / sum(terms))


def test_the_optimal_policy_by_hand():
    # 1/4 e^{log 9 / 2} = 3/4 against 3/4: Z = 3/2, and both are chosen equally often
    ref_log_prob, reward = jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.array([9.0, 1.0]))
    close(preference.log_partition(ref_log_prob, reward, 2.0), np.log(1.5))
    close(jnp.exp(preference.optimal_log_prob(ref_log_prob, reward, 2.0)), [0.5, 0.5])
    expected, kl = preference.frontier(ref_log_prob[None], reward[None], jnp.array([2.0]))
    close(expected, [np.log(3.0)])
    close(kl, [0.5 * np.log(2.0) + 0.5 * np.log(2 / 3)])


def test_the_frontier_is_the_loop():
    ref_log_prob, reward = prompts()
    betas = [0.1, 0.5, 2.0]
    expected, kl = preference.frontier(*single(ref_log_prob, reward, betas))
    for k, beta in enumerate(betas):
        rewards, divergences = [], []
        for p, r in zip(ref_log_prob, reward, strict=True):
            weight = np.exp(p + r / beta)
            weight /= weight.sum()
            rewards.append(weight @ r)
            divergences.append(weight @ (np.log(weight) - p))
        assert float(expected[k]) == pytest.approx(np.mean(rewards), rel=1e-5, abs=1e-6)
        assert float(kl[k]) == pytest.approx(np.mean(divergences), rel=1e-4, abs=1e-6)


def test_the_frontier_meets_its_bound_and_its_limits():
    with jax.enable_x64(True):
        ref_log_prob, reward = (jnp.asarray(x) for x in prompts())
        betas = jnp.array([1e-3, 0.3, 1.0, 3.0, 1e4])
        expected, kl = preference.frontier(ref_log_prob, reward, betas)
        best = [b * preference.log_partition(ref_log_prob, reward, b).mean() for b in betas]
        close(expected - betas * kl, jnp.stack(best), atol=1e-12, rtol=1e-10)
        assert bool(jnp.all(jnp.diff(expected) < 0.0))
        assert bool(jnp.all(jnp.diff(kl) < 0.0))
        top = jnp.argmax(reward, 1, keepdims=True)
        close(expected[0], jnp.take_along_axis(reward, top, 1).mean(), atol=1e-9)
        close(kl[0], -jnp.take_along_axis(ref_log_prob, top, 1).mean(), atol=1e-9)
        close(expected[-1], jnp.sum(jnp.exp(ref_log_prob) * reward, 1).mean(), atol=1e-3)
        assert float(kl[-1]) == pytest.approx(0.0, abs=1e-7)


def test_no_other_policy_is_better():
    with jax.enable_x64(True):
        ref_log_prob, reward = (jnp.asarray(x) for x in prompts())
        draw = np.random.default_rng(10)
        best = preference.log_partition(ref_log_prob, reward, 0.5) * 0.5
        optimum = preference.optimal_log_prob(ref_log_prob, reward, 0.5)
        for scale in (0.0, 0.01, 1.0):
            noise = jnp.asarray(scale * draw.normal(size=reward.shape))
            log_prob = jax.nn.log_softmax(optimum + noise, -1)
            kl = jnp.sum(jnp.exp(log_prob) * (log_prob - ref_log_prob), -1)
            value = jnp.sum(jnp.exp(log_prob) * reward, -1) - 0.5 * kl
            other = jnp.sum(jnp.exp(log_prob) * (log_prob - optimum), -1)
            # What is missing is the divergence from the best policy.
            close(best - value, 0.5 * other, atol=1e-12)


@pytest.mark.parametrize("worth", [5.0, jnp.inf, jnp.nan])
def test_an_impossible_completion_has_no_effect(worth):
    ref_log_prob = jnp.log(jnp.array([[0.25, 0.75, 0.0]]))
    reward, beta = jnp.array([[1.0, 2.0, worth]]), jnp.array([0.5, 2.0])
    best = preference.optimal_log_prob(ref_log_prob, reward, 0.5)
    assert float(best[0, 2]) == -np.inf
    close(best[:, :2], preference.optimal_log_prob(ref_log_prob[:, :2], reward[:, :2], 0.5))
    for actual, expected in zip(
        preference.frontier(ref_log_prob, reward, beta),
        preference.frontier(ref_log_prob[:, :2], reward[:, :2], beta),
        strict=True,
    ):
        close(actual, expected)

    def total(reward, beta):
        return sum(x.sum() for x in preference.frontier(ref_log_prob, reward, beta))

    to_reward, to_beta = jax.grad(total, (0, 1))(reward, beta)
    assert float(to_reward[0, 2]) == 0.0
    assert bool(jnp.isfinite(to_reward).all() and jnp.isfinite(to_beta).all())


def test_large_rewards_do_not_overflow():
    ref_log_prob, reward = jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[1000.0, 998.0]])
    close(preference.log_partition(ref_log_prob, reward, 1.0), [1000.0 + np.log(0.567668)])
    expected, kl = preference.frontier(ref_log_prob, reward, jnp.array([1e-3]))
    assert expected.tolist() == [1000.0]
    # 1e6 - (1e6 - log 2) has the rounding of numbers of that size.
    assert float(kl[0]) == pytest.approx(np.log(2.0), abs=0.07)


def test_the_gradient_of_the_partition_is_the_optimal_policy():
    ref_log_prob, reward = single(*prompts())
    slope = jax.grad(lambda r: preference.log_partition(ref_log_prob, r, 0.5).sum())(reward)
    close(slope, jnp.exp(preference.optimal_log_prob(ref_log_prob, reward, 0.5)) / 0.5)


def test_a_frontier_of_samples_is_that_of_the_reference_and_ends_at_the_log_of_their_number():
    ref_log_prob, reward = prompts(number=1)
    drawn = np.random.default_rng(11).choice(6, 4000, p=np.exp(ref_log_prob[0]))
    sample = single(np.full((1, 4000), -np.log(4000)), reward[:, drawn])
    betas = jnp.array([0.5, 1.0, 2.0])
    actual = preference.frontier(*sample, betas)
    expected = preference.frontier(*single(ref_log_prob, reward), betas)
    close(actual[0], expected[0], atol=0.1)
    close(actual[1], expected[1], atol=0.1)
    one_of_eight = jnp.arange(8.0)[None]
    _, kl = preference.frontier(jnp.full((1, 8), -jnp.log(8.0)), one_of_eight, jnp.array([1e-2]))
    close(kl, [np.log(8.0)])


# --- the coefficient of the penalty --------------------------------------------------------------


def test_the_coefficient_is_the_loop():
    betas = [0.2]
    for kl in (12.0, 7.0, 6.0, 3.0, -1.0, 6.3):
        error = min(max(kl / 6.0 - 1.0, -0.2), 0.2)
        actual = preference.kl_coefficient(betas[-1], kl, 6.0, 0.1)
        betas.append(betas[-1] * (1.0 + error * 0.1))
        assert float(actual) == pytest.approx(betas[-1], rel=1e-6)


def test_the_coefficient_by_hand_and_where_it_stays():
    # Twice the target is cut to 1.2 of it, over half a horizon: 1.1 times.
    assert float(preference.kl_coefficient(1.0, 12.0, 6.0, 0.5)) == pytest.approx(1.1)
    assert float(preference.kl_coefficient(1.0, 0.0, 6.0, 1.0)) == pytest.approx(0.8)
    for kl, target, share in ((6.0, 6.0, 1.0), (3.0, jnp.inf, 1.0), (12.0, 6.0, 0.0)):
        assert float(preference.kl_coefficient(0.3, kl, target, share)) == np.float32(0.3)
    assert float(preference.kl_coefficient(0.3, jnp.inf, jnp.inf, 1.0)) == np.float32(0.3)
    assert float(preference.kl_coefficient(0.0, 12.0, 6.0, 1.0)) == 0.0


def test_the_coefficient_takes_a_batch_of_settings():
    betas, targets = jnp.array([0.1, 0.2]), jnp.array([3.0, jnp.inf])
    step = jax.vmap(preference.kl_coefficient, (0, None, 0, None))
    close(step(betas, 6.0, targets, 1.0), [0.12, 0.2])


def test_jit_and_vmap_agree():
    log_prob, ref_log_prob, mask = tokens(12)
    args = single(np.arange(6.0), log_prob, ref_log_prob)
    betas = jnp.array([0.1, 0.4])
    over_betas = jax.jit(jax.vmap(preference.token_rewards, (None, None, None, None, 0)))
    over_rows = jax.vmap(preference.token_rewards, (0, 0, 0, 0, None))
    plain = preference.token_rewards(*args, mask, 0.4)
    close(over_betas(*args, jnp.asarray(mask), betas)[1], plain)
    close(over_rows(*args, jnp.asarray(mask), 0.4), plain)
    ref_log_prob, reward = single(*prompts())
    expected = jnp.stack(preference.frontier(ref_log_prob, reward, betas))
    close(jnp.stack(jax.jit(preference.frontier)(ref_log_prob, reward, betas)), expected)


# --- shapes --------------------------------------------------------------------------------------

ROW, COLUMN, MASK = jnp.ones(3), jnp.ones((3, 1)), jnp.ones(3, bool)
TABLE, TABLE_MASK = jnp.ones((3, 2)), jnp.ones((3, 2), bool)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (preference.masked_sum, (COLUMN, MASK)),
        (preference.masked_mean, (COLUMN, MASK)),
        (preference.masked_whiten, (COLUMN, MASK)),
        (preference.masked_mean, (ROW, ROW)),  # a mask of numbers
        (preference.token_kl, (COLUMN, ROW, "k1")),
        (preference.preference_probability, (COLUMN, ROW)),
        (preference.bradley_terry, (COLUMN, ROW)),
        (preference.dpo, (COLUMN, ROW, 0.1)),
        (preference.ipo, (COLUMN, ROW, 0.1)),
        (preference.simpo, (COLUMN, ROW, 0.1)),
        (preference.orpo, (COLUMN, ROW, 0.1)),
        (preference.kto, (COLUMN, MASK, 0.0, 0.1)),
        (preference.kto, (ROW, ROW, 0.0, 0.1)),  # labels of numbers
        (preference.token_rewards, (COLUMN, TABLE, TABLE, TABLE_MASK, 0.1)),
        (preference.token_rewards, (ROW, TABLE, TABLE[:1], TABLE_MASK, 0.1)),
        (preference.token_rewards, (ROW, TABLE, TABLE, TABLE, 0.1)),
        (preference.leave_one_out, (ROW,)),
        (preference.group_advantages, (ROW,)),
        (preference.sequence_log_ratio, (TABLE, TABLE[:1], TABLE_MASK)),
        (preference.sequence_log_ratio, (TABLE, TABLE, TABLE)),
        (preference.vocabulary_divergence, (COLUMN, ROW, "reverse_kl")),
        (preference.log_partition, (COLUMN, ROW, 1.0)),
        (preference.optimal_log_prob, (COLUMN, ROW, 1.0)),
        (preference.frontier, (TABLE, TABLE[:, :1], ROW)),
        (preference.frontier, (TABLE, TABLE, 1.0)),
        (preference.frontier, (ROW, ROW, ROW)),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_wrong_shapes_are_refused(function, args):
    with pytest.raises(AssertionError):
        function(*args)


def test_examples():
    results = doctest.testmod(preference)
    assert results.attempted >= 28
    assert results.failed == 0
