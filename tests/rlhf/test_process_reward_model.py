"""Models of steps: exact on chains whose completions are listed, and as rewards of other runs."""

import dataclasses
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

from purejaxpg import InputError
from purejaxpg.rlhf import (
    data,
    generate,
    measure,
    process_reward_model,
    rloo,
    sft,
    tasks,
    tokens,
    transformer,
)
from purejaxpg.rlhf.tasks import chain, verifiable

TASK = tasks.make("chain-2-3")
BASE = {"task": "chain-2-3", "batch_size": 16}
SMALL = {"width": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_width": 8}
CONFIG = process_reward_model.Config(**BASE)


@pytest.fixture(scope="module")
def given():
    reference = transformer.init(random.key(0), sft.architecture(sft.Config(**BASE, **SMALL)))
    return process_reward_model.Given(reference)


def listed(weight_of):
    """All chains of two lines for each prompt, as a Batch whose weights are probabilities."""
    prompts, lines = TASK.prompt_ids, np.array(list(itertools.product(range(3), repeat=2)))
    line_end = np.full(len(lines), TASK.words.index(";"))
    numbers = (lines + verifiable.ZERO).T
    ids = np.stack([numbers[0], line_end, numbers[1], line_end, np.full(9, tasks.EOS)], 1)
    prompt_ids, ids = np.repeat(prompts, 9, 0), np.tile(ids, (len(prompts), 1))
    batch = process_reward_model.label(jnp.asarray(prompt_ids), jnp.asarray(ids), CONFIG)
    return dataclasses.replace(batch, weight=jnp.asarray(weight_of(prompt_ids, ids)))


def fitted(batch):
    """Log-odds, one for each line and prompt, with the least expected loss, by Newton's method."""
    prompt = np.repeat(np.arange(len(TASK.prompt_ids)), 9)

    def loss(table):
        end = jnp.full((len(prompt), 1), 40.0)  # the end is right whenever it counts
        lines = table[prompt]
        log_odds = jnp.stack([lines[:, 0]] * 2 + [lines[:, 1]] * 2, 1)
        return process_reward_model.objective(jnp.hstack([log_odds, end]), batch)[0]

    def step(table, _):
        # The Hessian is diagonal.
        gradient, curvature = jax.jvp(jax.grad(loss), (table,), (jnp.ones_like(table),))
        return table - gradient / curvature, None

    table = jnp.zeros((len(TASK.prompt_ids), 2))
    return jax.jit(lambda table: lax.scan(step, table, length=30)[0])(table)


def test_optimum_is_the_probability_that_a_step_is_right_after_right_ones():
    with jax.enable_x64(True):
        draw = np.random.default_rng(0).dirichlet(np.ones(9), len(TASK.prompt_ids))
        batch = listed(lambda prompt_ids, ids: draw.ravel())
        probability = np.asarray(jax.nn.sigmoid(fitted(batch)))
    numbers = np.asarray(batch.prompt_ids)[:, 1:-1] - verifiable.ZERO
    said = np.asarray(batch.completion_ids)[:, :3:2] - verifiable.ZERO
    first = said[:, 0] == (numbers[:, 0] + numbers[:, 1]) % 3
    both = first & (said[:, 1] == (said[:, 0] + numbers[:, 2]) % 3)
    share = lambda event: (draw * event.reshape(draw.shape)).sum(1)  # noqa: E731
    np.testing.assert_allclose(probability[:, 0], share(first), atol=1e-8)
    np.testing.assert_allclose(probability[:, 1], share(both) / share(first), atol=1e-8)
    np.testing.assert_allclose(probability.prod(1), share(both), atol=1e-8)


@pytest.mark.parametrize("labels", ["process", "outcome"])
def test_a_zero_head_has_the_loss_of_a_coin(given, labels):
    config = dataclasses.replace(CONFIG, labels=labels)
    zero = transformer.scalar_model(random.key(0), given.reference, 0.0)
    batch = process_reward_model.label(PROMPTS, COMPLETIONS, config)
    value, metrics = LOSS(zero.params, batch, config, given)
    assert value == pytest.approx(math.log(2), rel=1e-6)
    assert 0.2 < metrics["reward/right"] < 0.9


LOSS = jax.jit(process_reward_model.loss)
PROMPTS = jnp.asarray(TASK.prompt_ids)
COMPLETIONS = TASK.demonstrate(random.key(1), PROMPTS)


def test_outcome_labels_are_those_of_the_answer_at_the_last_token():
    config = dataclasses.replace(CONFIG, labels="outcome")
    late = COMPLETIONS.at[:, -1].set(tasks.BOS)  # without an end, the last token is labelled
    early = COMPLETIONS.at[:, 2].set(tasks.EOS)
    for ids, last in ((COMPLETIONS, 4), (late, 4), (early, 2)):
        batch = process_reward_model.label(PROMPTS, ids, config)
        mask = tokens.completion_mask(ids, tasks.EOS)
        assert np.nonzero(batch.labelled)[1].tolist() == [last] * len(ids)
        reward = np.asarray(TASK.reward(PROMPTS, ids, mask))
        np.testing.assert_array_equal(np.asarray(batch.right).any(1), reward == 1)
        assert reward.any() == (ids is COMPLETIONS)


def test_first_update_moves_the_model_and_starts_with_a_new_head(given):
    state = process_reward_model.init(random.key(0), CONFIG, given)
    assert state.params["head"]["kernel"].shape == (8, 1)
    moved, metrics = jax.jit(process_reward_model.update)(random.key(1), state, CONFIG, given)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), moved.params, state.params)
    assert any(jax.tree.leaves(changed)) and moved.num_updates == 1
    assert math.isfinite(metrics["loss/steps"]) and 0 <= metrics["reward/right"] < 1
    assert process_reward_model.model(moved, CONFIG, given).architecture.output == "product"


def test_a_model_of_steps_rewards_whole_completions(given):
    scalar = transformer.scalar_model(random.key(2), given.reference, 3.0)
    mask = tokens.completion_mask(COMPLETIONS, tasks.EOS)
    completion = generate.Completion(COMPLETIONS, mask, jnp.zeros(mask.shape))

    @jax.jit
    def all_rewards(params):
        models = [
            transformer.Model(params, dataclasses.replace(scalar.architecture, output=output))
            for output in ("scalar", *transformer.AGGREGATIONS)
        ]
        rewards = [
            measure.rewards(rloo.Given(given.reference, model), TASK, PROMPTS, completion)[0]
            for model in models
        ]
        whole = jnp.hstack([PROMPTS, COMPLETIONS])
        return scalar(whole, jnp.ones_like(whole))[:, PROMPTS.shape[1] :], rewards

    values, (last_value, *rewards) = all_rewards(scalar.params)
    probability = 1 / (1 + np.exp(-np.asarray(values)[:, [1, 3, 4]]))  # `;`, `;` and the end
    assert probability.std() > 0.01
    np.testing.assert_array_equal(last_value, values[:, -1])
    expected = probability.prod(1), probability.min(1), probability[:, -1]
    np.testing.assert_allclose(np.stack(rewards), np.stack(expected), rtol=1e-5)


def test_score_is_of_the_completion_that_the_model_prefers(given, monkeypatch):
    """The reference demonstrates, and the model knows which steps are right."""

    def sample(key, policy, prompt_ids, task, temperature):
        ids = task.demonstrate(key, prompt_ids)
        mask = tokens.completion_mask(ids, task.eos_id)
        return generate.Completion(ids, mask, jnp.zeros(mask.shape))

    def oracle(model, task, *arrays):
        ends, right = task.steps(*arrays)
        return (right | ~ends).mean(1)

    monkeypatch.setattr(measure, "sample", sample)
    monkeypatch.setattr(measure, "model_rewards", oracle)
    state = process_reward_model.init(random.key(0), CONFIG, given)
    score = process_reward_model.score(random.key(1), state, CONFIG, 500, given)
    means = {name.removeprefix("evaluation/"): float(x.mean()) for name, x in score.items()}
    sound, lucky = (1 - chain.STEP_ERROR) ** 2, 0.5 * chain.STEP_ERROR**2  # slips that cancel
    assert means["pass@1"] == pytest.approx(sound + lucky, abs=0.02)
    assert means["pass@16"] == means["return"] == means["sound"] == 1.0
    assert means["best_of_4"] == pytest.approx(1.0, abs=0.02)
    monkeypatch.setattr(measure, "model_rewards", lambda *arguments: -oracle(*arguments))
    score = process_reward_model.score(random.key(1), state, CONFIG, 500, given)
    assert score["evaluation/sound"].mean() < 0.02
    assert score["evaluation/return"].mean() < score["evaluation/best_of_4"].mean() < 0.5


def test_labels_and_loss_are_those_of_trl():
    golden = pathlib.Path(__file__).parents[1] / "golden" / "trl_prm.json"
    (case,) = json.loads(golden.read_text())["cases"]
    task, config = tasks.make("chain-3-10"), process_reward_model.Config(task="chain-3-10")
    assert case["words"] == list(task.words)
    start, length = task.prompt_length, task.completion_length
    # TRL has no label for the end, and all labels that it is given count.
    ids = [[*row[start:], tasks.EOS] for row in case["ids"]]
    ids = jnp.array([row + [tasks.PAD] * (length - len(row)) for row in ids])
    prompt_ids = jnp.array([row[:start] for row in case["ids"]])
    batch = process_reward_model.label(prompt_ids, ids, config)
    lines = batch.labelled & (ids == task.words.index(";"))
    to_length = [(0, 0), (0, start + length - len(case["labels"][0]))]
    labels = np.pad(case["labels"], to_length, constant_values=-100)[:, start:]
    np.testing.assert_array_equal(lines, labels != -100)
    np.testing.assert_array_equal(batch.right & lines, labels == 1)
    wrong, right = np.moveaxis(np.pad(case["logits"], [*to_length, (0, 0)])[:, start:], 2, 0)
    batch = dataclasses.replace(batch, labelled=lines)
    log_odds = jnp.asarray(right - wrong, jnp.float32)
    loss, slope = jax.value_and_grad(lambda x: process_reward_model.objective(x, batch)[0])(
        log_odds
    )
    assert loss == pytest.approx(case["loss"], rel=1e-5)
    expected = np.pad(case["slope"], [*to_length, (0, 0)])[:, start:, 1]
    np.testing.assert_allclose(slope, expected, atol=1e-6)


def test_given_steps_are_drawn_with_labels_up_to_the_first_mistake(given):
    mask = tokens.completion_mask(COMPLETIONS, tasks.EOS)
    ends, right = TASK.steps(PROMPTS, COMPLETIONS, mask)
    own = dataclasses.replace(given, steps=data.Steps(PROMPTS, COMPLETIONS, ends, right))
    process_reward_model.check_given(CONFIG, own)
    batch = process_reward_model.draw(random.key(0), CONFIG, own)
    expected = process_reward_model.label(batch.prompt_ids, batch.completion_ids, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, batch, expected)
    assert len({tuple(ids) for ids in batch.prompt_ids.tolist()}) > 5
    with pytest.raises(InputError, match='labels must be "process" if steps are given, but is'):
        process_reward_model.check_given(dataclasses.replace(CONFIG, labels="outcome"), own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "steps"}, "labels must be one of 'process', 'outcome', but is 'steps'"),
        ({"aggregation": "mean"}, "aggregation must be one of 'product', 'minimum', 'last'"),
        ({"task": "addition-2"}, "labels must be \"outcome\", because task 'addition-2' has no"),
        ({"task": "sentiment", "labels": "outcome"}, "must have right answers .* 'sentiment' has"),
        ({"num_updates": 0}, "num_updates must be 1 or more"),
    ],
)
def test_an_impossible_configuration_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        process_reward_model.check(dataclasses.replace(CONFIG, **change))


def shapes_of(architecture):
    return jax.eval_shape(lambda: transformer.init(random.key(0), architecture))


def test_a_model_of_steps_is_refused_where_there_are_none(given):
    config = rloo.Config(task="addition-2")
    sizes = {"vocab_size": len(tasks.make("addition-2").words), "context": 20}
    architecture = dataclasses.replace(given.reference.architecture, **sizes)
    reference = shapes_of(architecture)
    for output, message in (("product", "takes the product over steps"), ("last", None)):
        reward = shapes_of(dataclasses.replace(architecture, output=output))
        if message is None:
            rloo.check_given(config, rloo.Given(reference, reward))
            continue
        with pytest.raises(InputError, match=message):
            rloo.check_given(config, rloo.Given(reference, reward))
