"""Distillation ends at its teacher, whichever divergence it follows and whoever samples."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from enumerable import ALL_MASK, LOGITS, PREFIX, REFERENCE, L, N, X, sequences, table
from enumerable import token_log_probs as token_log_probs_of
from jax import lax

from purejaxpg.kernels import preference
from purejaxpg.rlhf import distill

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "trl_distill.json"
TEACHER = REFERENCE + table(7)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def distributions(logits):
    """Logits of a tabular policy [X, COUNT, 3] -> log-probabilities of all tokens [X*N, L, 3]."""
    return jax.nn.log_softmax(logits)[:, PREFIX].reshape(X * N, L, 3)


def loss(logits, divergence, sampler):
    """The expected loss of completions by the student itself, or by the teacher."""
    sampler = lax.stop_gradient(logits) if sampler == "student" else TEACHER
    weight = jnp.exp(sequences(token_log_probs_of(sampler))).ravel()
    batch = distill.Batch(None, None, ALL_MASK, distributions(TEACHER), weight)
    config = distill.Config(divergence=divergence, jensen_shannon_weight=0.3)
    return distill.objective(distributions(logits), batch, config)[0]


def by_loop(logits, divergence):
    """The same on the student's own completions, token by token."""
    log_q, log_p = (np.asarray(distributions(x)) for x in (logits, TEACHER))
    weight = np.exp(np.asarray(sequences(token_log_probs_of(logits)))).ravel()
    total = count = 0.0
    for i in range(X * N):
        for t in range(int(ALL_MASK[i].sum())):
            q, p = np.exp(log_q[i, t]), np.exp(log_p[i, t])
            kl = lambda a, b: (a * np.log(a / b)).sum()  # noqa: E731
            m = 0.3 * p + 0.7 * q
            values = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p)}
            values["jensen_shannon"] = 0.3 * kl(p, m) + 0.7 * kl(q, m)
            total += weight[i] * values[divergence]
            count += weight[i]
    return total / count


@pytest.mark.parametrize("divergence", preference.DIVERGENCES)
def test_the_loss_is_the_loop_and_flat_at_the_teacher(divergence):
    start = jnp.asarray(LOGITS)
    assert float(loss(start, divergence, "student")) == pytest.approx(by_loop(start, divergence))
    gradient = jax.grad(loss)(jnp.asarray(TEACHER), divergence, "student")
    np.testing.assert_allclose(gradient, 0.0, atol=1e-12)


def test_every_divergence_ends_at_the_teacher():
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 1500))
    kinds = [(d, s) for d in preference.DIVERGENCES for s in ("student", "teacher")]

    def total(logits):
        return sum(loss(x, *kind) for x, kind in zip(logits, kinds, strict=True))

    def step(carry, _):
        logits, state = carry
        change, state = optimizer.update(jax.grad(total)(logits), state)
        return (optax.apply_updates(logits, change), state), None

    start = [jnp.asarray(REFERENCE)] * len(kinds)
    run = jax.jit(lambda carry: lax.scan(step, carry, length=1500)[0])
    logits, _ = run((start, optimizer.init(start)))
    log_p = sequences(token_log_probs_of(TEACHER))
    before = sequences(token_log_probs_of(REFERENCE))
    assert (jnp.exp(before) * (before - log_p)).sum(1).min() > 0.1
    for kind, x in zip(kinds, logits, strict=True):
        log_q = sequences(token_log_probs_of(x))
        assert (jnp.exp(log_q) * (log_q - log_p)).sum(1).max() < 1e-8, kind


@pytest.mark.parametrize(
    "case", json.loads(GOLDEN.read_text())["cases"], ids=lambda c: f"beta {c['beta']}"
)
def test_the_loss_is_that_of_trl(case):
    names = {0.0: "forward_kl", 1.0: "reverse_kl"}
    config = distill.Config(
        divergence=names.get(case["beta"], "jensen_shannon"), jensen_shannon_weight=case["beta"]
    )
    mask, logits, teacher, slope = (
        jnp.array(case[name]) for name in ("mask", "logits", "teacher_logits", "slope")
    )
    log_prob = jax.nn.log_softmax(teacher / case["temperature"])
    batch = distill.Batch(None, None, mask, log_prob, jnp.ones(len(mask)))

    def loss_of(logits):
        student = jax.nn.log_softmax(logits / case["temperature"])
        return distill.objective(student, batch, config)[0]

    value, own = jax.value_and_grad(loss_of)(logits)
    assert float(value) == pytest.approx(case["loss"], rel=1e-6)
    np.testing.assert_allclose(own, slope, rtol=1e-5, atol=1e-7)  # TRL's are in single precision
