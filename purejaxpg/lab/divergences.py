"""Estimators of KL(π ‖ π_ref) and their places: their gradients, and where these lead."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from purejaxpg.kernels import preference
from purejaxpg.lab import estimators, laboratory, tabular

ASCENT_STEPS, ASCENT_RATE = 4000, 0.05  # of Adam; the rate falls to 0 along a cosine
COUNT = len(estimators.PENALTIES)


def gradient_rows(lab: laboratory.Lab) -> list[laboratory.Row]:
    """Compare the gradients of one completion with that of KL(π ‖ π_ref), at every distance.

    The values are exact, for each estimator's own rewards: a perfect critic.
    """
    tree, reference, ones = lab.tree, lab.reference, jnp.ones((COUNT, 1))

    def of_log_prob(log_prob: jax.Array, completions: Any, logits: jax.Array) -> jax.Array:
        everywhere = jnp.broadcast_to(logits, (COUNT, *logits.shape))
        value = values(lab, everywhere, completions, 0.0, 1.0)
        of_reference = tabular.token_log_probs(reference, completions)
        known = of_reference, completions, value, ones, 0.0, 1.0
        gradient = jax.grad(lambda x: estimators.penalised_losses(x, *known).sum())
        return gradient(jnp.broadcast_to(log_prob, (COUNT, *log_prob.shape)))

    gradients = laboratory.Gradients(lab, of_log_prob)
    true_gradient = jax.jit(jax.grad(lambda logits: tabular.divergence(tree, logits, reference)))
    rows = []
    for distance in lab.setting.distances:
        lab.say(f"Estimators of the divergence at distance {distance:g} from the reference ...")
        logits = lab.policy(distance)
        truth = np.asarray(true_gradient(logits)).ravel()
        compared = lab.compare(gradients, truth, logits)
        for e, p in enumerate(estimators.PENALTIES):
            labels = {"estimator": p.name, "over": p.over, "distance": distance}
            rows.append(laboratory.row("kl", labels, lab, truth, compared.one(e)))
    return rows


def values(
    lab: laboratory.Lab,
    logits: jax.Array,
    completions: tabular.Completions,
    score_scale: float,
    beta: float,
) -> jax.Array:
    """Return the exact values of the states before tokens, for the rewards of each penalty.

    Args:
        lab: the task and the reference.
        logits: [E, X, S, V] of the policy, for each penalty.
        completions: B of them.
        score_scale: 1, or 0 for the penalty alone.
        beta: β.

    Returns:
        [E, B, L].
    """
    of_reference = tabular.token_log_probs(lab.reference, lab.listed)
    log_prob = jax.vmap(lambda x: tabular.token_log_probs(x, lab.listed))(logits)
    known = of_reference, lab.listed, score_scale, beta
    reward = estimators.penalised_rewards(log_prob, *known)
    tables = jax.vmap(lambda x, r: tabular.values(lab.tree, x, r))(logits, reward)
    return tables[:, completions.prompt[:, None], completions.prefix]


def ascent_rows(lab: laboratory.Lab) -> list[laboratory.Row]:
    """Follow the exact expected gradient of each estimator from the reference to where it ends."""
    lab.say(f"Exact ascent, {ASCENT_STEPS} steps with each estimator ...")
    tree, beta, listed = lab.tree, lab.setting.beta, lab.listed
    of_reference = tabular.token_log_probs(lab.reference, listed)
    optimizer = optax.adam(optax.cosine_decay_schedule(ASCENT_RATE, ASCENT_STEPS))

    def loss(logits: jax.Array) -> jax.Array:
        old = lax.stop_gradient(logits)
        log_prob = jax.vmap(lambda x: tabular.token_log_probs(x, listed))(logits)
        weight = jax.vmap(lambda x: tabular.probability(tree, x))(old)
        known = of_reference, listed, values(lab, old, listed, 1.0, beta), weight, 1.0, beta
        return estimators.penalised_losses(log_prob, *known).sum()  # each has its own logits

    def step(carry: Any, _: None) -> Any:
        logits, state = carry
        change, state = optimizer.update(jax.grad(loss)(logits), state)
        return (optax.apply_updates(logits, change), state), None

    start = jnp.repeat(lab.reference[None], COUNT, 0)
    run = jax.jit(lambda carry: lax.scan(step, carry, length=ASCENT_STEPS)[0])
    logits, _ = run((start, optimizer.init(start)))
    ends = jax.jit(jax.vmap(lambda x: _end(lab, x)))(logits)
    columns = {name: np.asarray(column).tolist() for name, column in ends.items()}
    return [
        {"study": "ascent", "estimator": p.name, "over": p.over, "beta": beta}
        | {name: column[e] for name, column in columns.items()}
        for e, p in enumerate(estimators.PENALTIES)
    ]


def _end(lab: laboratory.Lab, logits: jax.Array) -> dict[str, jax.Array]:
    arguments = lab.tree, logits, lab.reference
    beta, probability = lab.setting.beta, tabular.probability(lab.tree, logits)
    return {
        "objective": tabular.objective(*arguments, beta),
        "to_optimum": tabular.divergence_from_optimum(*arguments, beta),
        "divergence": tabular.divergence(*arguments),
        "reward": (probability * lab.listed.score).sum(),
        "entropy": -(probability * tabular.log_probs(logits, lab.listed)).sum(),
    }


def best_objective(lab: laboratory.Lab) -> float:
    """Return E[r] − β KL of the best policy, β log Z averaged over prompts."""
    shape, beta = (lab.tree.shape[0], -1), lab.setting.beta
    of_reference = tabular.log_probs(lab.reference, lab.listed).reshape(shape)
    log_z = preference.log_partition(of_reference, lab.listed.score.reshape(shape), beta)
    return float(beta * np.asarray(log_z) @ lab.weight)
