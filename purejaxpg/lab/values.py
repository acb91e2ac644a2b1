"""Generalised advantage estimates: λ, and values from exact to none."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxpg.kernels import preference
from purejaxpg.lab import estimators, laboratory, tabular

LAMBDAS = (0.0, 0.5, 0.9, 0.95, 1.0)
VALUES = ("exact", "approximate", "wrong", "zero")
VALUE_ERROR = 0.5  # of the approximate values, as a share of the spread of the exact ones


def rows(lab: laboratory.Lab) -> list[laboratory.Row]:
    """Compare PPO's gradient for each λ, with values from exact to none."""
    lab.say("Generalised advantage estimates ...")
    reference, beta, one = lab.reference, lab.setting.beta, jnp.ones(1)
    logits = lab.policy(lab.far)
    tables = value_tables(lab, logits)
    settings = [(name, gae_lambda) for name in VALUES for gae_lambda in LAMBDAS]
    stacked = jnp.stack([tables[name] for name, _ in settings])
    lambdas = jnp.array([gae_lambda for _, gae_lambda in settings])

    def of_log_prob(log_prob: jax.Array, completions: Any, _: jax.Array) -> jax.Array:
        reward = token_rewards(log_prob, reference, completions, beta)

        value = stacked[:, completions.prompt[:, None], completions.prefix]
        gradient = jax.vmap(
            jax.grad(estimators.policy_loss), in_axes=(None, None, None, 0, None, 0)
        )
        return -gradient(log_prob, completions, reward, value, one, lambdas)

    truth = laboratory.true_gradient(lab, logits)
    compared = lab.compare(laboratory.Gradients(lab, of_log_prob), truth, logits)
    found = []
    for e, (name, gae_lambda) in enumerate(settings):
        labels = {"values": name, "gae_lambda": gae_lambda, "distance": lab.far}
        found.append(laboratory.row("gae", labels, lab, truth, compared.one(e)))
    return found


def token_rewards(
    log_prob: jax.Array, reference: jax.Array, completions: tabular.Completions, beta: float
) -> jax.Array:
    """Return the rewards of tokens [B, L], with the penalty where it belongs."""
    known = tabular.token_log_probs(reference, completions), completions.mask, beta
    return preference.token_rewards(completions.score, log_prob, *known)


def value_tables(lab: laboratory.Lab, logits: jax.Array) -> dict[str, jax.Array]:
    """Return the values of all prefixes [X, S]: exact, and worse ones."""
    log_prob = tabular.token_log_probs(logits, lab.listed)
    reward = token_rewards(log_prob, lab.reference, lab.listed, lab.setting.beta)
    exact = tabular.values(lab.tree, logits, reward)
    met = np.unique(lab.tree.prefix[lab.tree.mask])  # the others are after an end
    mean, spread = exact[:, met].mean(), exact[:, met].std()
    near, wrong = lab.value_noise
    return {
        "exact": exact,
        "approximate": exact + VALUE_ERROR * spread * near,
        "wrong": mean + spread * wrong,
        "zero": jnp.zeros_like(exact),
    }
