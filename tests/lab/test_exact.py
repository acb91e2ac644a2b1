"""Expected gradients against formulas, and exact moments against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg.lab import estimators, groups, laboratory, moments, tabular
from purejaxpg.rlhf import tasks

PENALTIES = estimators.PENALTIES


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def cosine(a, b):
    return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def expected():
    """(tree, logits, reference) -> the expected gradient of each penalty, by its name and mean."""

    def gradients(tree, logits, reference):
        listed = tabular.every(tree)
        of_reference = tabular.token_log_probs(reference, listed)
        count = len(PENALTIES)
        weight = jnp.broadcast_to(tabular.probability(tree, logits), (count, len(of_reference)))
        value = jnp.zeros((count, *of_reference.shape))

        def loss(tables):
            log_prob = jax.vmap(lambda x: tabular.token_log_probs(x, listed))(tables)
            known = of_reference, listed, value, weight, 0.0, 1.0
            return estimators.penalised_losses(log_prob, *known).sum()

        return jax.grad(loss)(jnp.broadcast_to(logits, (count, *logits.shape)))

    compiled = jax.jit(gradients, static_argnums=0)

    def by_name(*arguments):
        found = np.asarray(compiled(*arguments))
        return {(p.name, p.over): found[e] for e, p in enumerate(PENALTIES)}

    return by_name


# A table of expected gradients that was made with NumPy alone, by other code: one prompt, three
# actions, four tokens. The prefixes are numbered depth first, and drawn in this order.
def depth_first(length, actions):
    def walk(prefix):
        if len(prefix) < length:
            yield prefix
            for action in range(1, actions):
                yield from walk((*prefix, action))

    return list(walk(()))


@pytest.fixture(scope="module")
def one_prompt():
    """A tree with one prompt, and where its prefixes are in a walk depth first."""
    task = tasks.make("enumerable-3-4")
    alone = dataclasses.replace(
        task,
        prompt_ids=task.prompt_ids[:1],
        prompt_probability=np.ones(1),
        reward=lambda prompt_ids, ids, mask: jnp.zeros(len(ids)),
    )
    tree = tabular.tree(alone)
    order = {prefix: i for i, prefix in enumerate(depth_first(4, 3))}
    place = np.zeros(tree.shape[1], int)
    for n in range(len(tree.prefix)):
        for t in np.flatnonzero(tree.mask[n]):
            place[tree.prefix[n, t]] = order[tuple(tree.action[n, :t])]
    return tree, place


@pytest.fixture(scope="module")
def noise():
    draws = np.random.default_rng(0)
    return {name: draws.normal(size=(15, 3)) for name in ("reference", 1e-3, 1e-2, 1.0)}


@pytest.mark.parametrize(
    ("distance", "k3_in_reward", "k1_mean", "k2", "k3"),
    [
        # norm in the reward; norm, cosine of a mean; error and cosine; error
        (1e-3, (3.7e-4, None), (230, -0.88), (4e-4, 1.0), 4e-4),
        (1.0, (None, 0.23), (None, -0.75), (0.67, 0.75), 0.86),
    ],
)
def test_a_table_of_other_code(
    expected, one_prompt, noise, distance, k3_in_reward, k1_mean, k2, k3
):
    tree, place = one_prompt
    reference = noise["reference"][place][None]
    logits = reference + distance * noise[distance][place][None]
    found = expected(tree, logits, reference)
    truth = np.asarray(
        jax.grad(tabular.divergence, argnums=1)(tree, jnp.asarray(logits), reference)
    )
    assert relative(found["k1 in reward", "sum"], truth) < 1e-11
    assert np.linalg.norm(found["k1 in loss", "sum"]) < 1e-12
    assert relative(found["k3 × ratio in loss", "sum"], found["k2 in loss", "sum"]) < 1e-12
    length = lambda name: np.linalg.norm(found[name]) / np.linalg.norm(truth)  # noqa: E731
    for name, (norm, direction) in (
        (("k3 in reward", "sum"), k3_in_reward), (("k1 in loss", "mean"), k1_mean)
    ):  # fmt: skip
        assert norm is None or length(name) == pytest.approx(norm, rel=0.02)
        assert direction is None or cosine(found[name], truth) == pytest.approx(
            direction, abs=0.006
        )
    assert relative(found["k2 in loss", "sum"], truth) == pytest.approx(k2[0], rel=0.13)
    assert cosine(found["k2 in loss", "sum"], truth) == pytest.approx(k2[1], abs=0.006)
    assert relative(found["k3 in loss", "sum"], truth) == pytest.approx(k3, rel=0.13)


def test_in_the_loss_k2_and_k3_are_divergences_at_each_state_by_itself(expected, one_prompt, noise):
    tree, place = one_prompt
    reference = jnp.asarray(noise["reference"][place][None])
    logits = reference + noise[1.0][place][None]
    listed = tabular.every(tree)
    # How often each state is visited, which is not differentiated.
    weight = tabular.probability(tree, logits)[:, None] * listed.mask
    visits = jnp.zeros(tree.shape[:2]).at[listed.prompt[:, None], listed.prefix].add(weight)

    def local(logits, forward):
        log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
        first, second = (log_q, log_p) if forward else (log_p, log_q)
        return (visits * (jnp.exp(first) * (first - second)).sum(-1)).sum()

    found = expected(tree, logits, reference)
    for name, forward in (("k2 in loss", False), ("k3 in loss", True)):
        own = np.asarray(jax.grad(local)(logits, forward))
        assert relative(found[name, "sum"], own) < 1e-12


# ------------------------------------------------------------------------------------------ groups


@pytest.fixture(scope="module")
def small():
    with jax.enable_x64(True):
        lab = laboratory.Lab(laboratory.Setting("enumerable-2-2", keys=0), lambda _: None)
        return lab, lab.policy(1.0)


@pytest.mark.parametrize("group_size", [2, 3])
def test_pairs_say_all_about_groups_of_any_size(small, group_size):
    names = list(estimators.LINEAR)
    listed = groups.listed(*small, group_size, names)
    of_pairs = groups.pairs(*small)(group_size)
    for name in names:
        (mean, square), (other, other_square) = listed[name], of_pairs[name]
        assert relative(mean, other) < 1e-12
        assert square == pytest.approx(other_square, rel=1e-12)


def test_multisets_have_as_many_orders_as_there_are_tuples():
    found, orders = groups.multisets(5, 4)
    assert len({tuple(each) for each in found}) == len(found) == 70
    assert orders.sum() == 5**4
    assert orders[[tuple(each) for each in found].index((0, 0, 1, 3))] == 12


def test_too_many_groups_are_not_listed(small, monkeypatch):
    monkeypatch.setattr(groups, "MOST_GROUPS", 5)
    assert groups.listed(*small, 2, ["group std"]) == {}


# ----------------------------------------------------------------------------------------- moments


def test_z_scores_see_a_wrong_mean_and_a_wrong_variance():
    draws = np.random.default_rng(0)
    table = draws.normal(size=(50, 1, 3))
    weight = draws.dirichlet(np.ones(50))
    directions = moments.unit_vectors(table[0, 0], 0)
    exact = moments.weighted(table, weight, directions)
    drawn = table[draws.choice(50, 4000, p=weight)]
    even = np.full(4000, 1 / 4000)
    z = [
        moments.z_scores(exact, moments.weighted(x, even, directions), 4000)[0]
        for x in (drawn, drawn + 0.2, drawn * 1.1, table[draws.choice(50, 4000)])
    ]
    assert np.abs(z[0]).max() < 3.5
    assert np.abs(z[1][:-1]).max() > 5.0
    assert z[2][-1] > 5.0
    assert np.abs(z[3]).max() > 5.0


def test_what_never_varies_must_agree():
    table, directions = np.ones((1, 1, 3)), np.eye(3)[:2]
    exact = moments.weighted(table, np.ones(1), directions)
    assert np.abs(moments.z_scores(exact, exact, 9)).max() == 0.0
    other = moments.weighted(table * (1 + 1e-6), np.ones(1), directions)
    assert np.abs(moments.z_scores(exact, other, 9)).max() > 100.0


def test_a_sum_over_keys_counts_each_once():
    """More keys than a chunk, and not a multiple of it."""
    count = moments.CHUNK + 7
    draw = lambda key: jax.random.normal(key, (1, 2))  # noqa: E731
    found = moments.sampled(draw, jax.random.key(0), count, jnp.eye(2))
    keys = jax.random.split(jax.random.key(0), (2, moments.CHUNK)).reshape(-1)[:count]
    each = jax.vmap(draw)(keys)
    np.testing.assert_allclose(found.mean, each.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.square, jnp.square(each).sum(-1).mean(0), rtol=1e-12)
