"""The judge: its questions, what it learns, what it refuses, and pipelines with it."""

import csv
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import InputError, cli
from purejaxpg.rlhf import (
    comparison,
    data,
    judge,
    measure,
    reward_model,
    rlaif,
    sft,
    tasks,
    transformer,
)
from purejaxpg.sweep import session

TASK = tasks.make("enumerable-3-3")
SMALL = {"width": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_width": 8}
V = len(TASK.words)
WORD = 3  # the first action but the end


@functools.cache
def reference(task="enumerable-3-3"):
    return transformer.init(random.key(0), sft.architecture(sft.Config(task=task, **SMALL)))


def pairs_of(*rows):
    return data.Pairs(*(jnp.array(column) for column in zip(*rows, strict=True)))


def test_a_question_shows_both_completions_up_to_their_ends():
    prompt_ids, first = jnp.array([[0, 1, 6], [1, 5, 5]]), jnp.array([[3, 2, 4], [4, 4, 4]])
    second = jnp.array([[2, 3, 3], [3, 4, 2]])
    ids = comparison.encode(prompt_ids, first, second, TASK)
    separator, question = V, V + 1
    assert ids.tolist() == [
        [0, 1, 6, 3, 2, 0, separator, 2, 0, 0, question],
        [1, 5, 5, 4, 4, 4, separator, 3, 4, 2, question],
    ]
    assert ids.shape[1] == comparison.length(TASK)


def test_a_judge_starts_as_the_language_model_and_knows_two_answers():
    start = comparison.start(random.key(1), reference(), TASK)
    old, new = reference().params, start.params
    np.testing.assert_array_equal(new["embed"]["embedding"][:V], old["embed"]["embedding"])
    np.testing.assert_array_equal(new["positions"][: len(old["positions"])], old["positions"])
    assert jax.tree.all(jax.tree.map(np.array_equal, new["layer_0"], old["layer_0"]))
    ids = jnp.full((1, comparison.length(TASK)), 3)
    probability = jax.nn.softmax(start(ids, jnp.ones_like(ids)))[0, -1]
    assert probability[: V + comparison.FIRST].sum() == 0 and probability.min() == 0
    assert 0 < probability[V + comparison.FIRST] < 1
    comparison.check_judge(judge.Config(task="enumerable-3-3"), start)


def test_a_run_sees_only_its_own_labels_and_their_noise(monkeypatch):
    monkeypatch.setattr(measure, "DRAWN_AT_ONCE", 192)
    config = judge.Config(task="enumerable-3-3", num_labels=500)
    given = judge.Given(reference())

    @jax.jit
    def draw(label_noise):
        noisy = dataclasses.replace(config, label_noise=label_noise)
        return judge.draw(random.key(0), noisy, given)

    right, noisy = draw(0.0), draw(0.3)
    assert right.chosen_ids.shape == (500, 3)
    np.testing.assert_array_equal(right.prompt_ids, noisy.prompt_ids)
    differs = (right.chosen_ids != right.rejected_ids).any(1)
    is_wrong = (noisy.chosen_ids == right.rejected_ids).all(1)
    assert float(is_wrong[differs].mean()) == pytest.approx(0.3, abs=0.07)
    assert (right.chosen_ids[:192] != right.chosen_ids[192:384]).any()  # drawn with other keys


def test_given_pairs_are_the_labels():
    rows = [(TASK.prompt_ids[0], [3, 2, 0], [4, action, 2]) for action in (2, 3, 4)]
    config = judge.Config(task="enumerable-3-3", num_labels=2)
    given = judge.Given(reference(), pairs_of(*rows))
    drawn = judge.draw(random.key(0), config, given)
    actions = drawn.rejected_ids[:, 1].tolist()
    assert len(actions) == len(set(actions)) == 2 and set(actions) <= {2, 3, 4}
    every = judge.draw(random.key(0), dataclasses.replace(config, num_labels=9), given)
    assert len(every.chosen_ids) == 3


def counting():
    """As TASK, but the reward counts a word, which a judge learns sooner than random rewards."""

    def reward(prompt_ids, completion_ids, mask):
        return 2.0 * ((completion_ids == WORD) & mask).sum(1)

    return dataclasses.replace(TASK, reward=reward)


def test_a_judge_learns_what_is_better_and_the_position_that_it_is_taught(monkeypatch):
    monkeypatch.setattr(tasks, "make", lambda name: counting())
    config = judge.Config(num_updates=200, num_labels=1024, learning_rate=1e-2)
    given = judge.Given(reference())

    @jax.jit
    @jax.vmap
    def run(swap_share):
        swapped = dataclasses.replace(config, swap_share=swap_share)
        state, metrics = judge.train(random.key(0), swapped, given)
        scores = judge.score(random.key(1), state, swapped, 4096, given)
        return metrics, jax.tree.map(jnp.mean, scores)

    metrics, scores = jax.device_get(run(jnp.array([0.5, 0.1])))
    scores = {name.removeprefix("evaluation/"): value for name, value in scores.items()}
    assert abs(scores["position_bias"][0]) < 0.05 and scores["position_bias"][1] > 0.15
    assert (scores["return"] < scores["best"]).all()
    assert (scores["return"] > 0.7).all()
    assert scores["one_order"][1] < scores["return"][1] - 0.02
    assert scores["consistent"][1] < scores["consistent"][0]
    assert metrics["judge/says_first"][1, -100:].mean() > 0.8


def opponent_only(ids, segments):
    """A judge that looks at nothing but the completion that is shown second."""
    logits = jnp.zeros((*ids.shape, V + comparison.NUM_WORDS))
    code = ids[:, -TASK.completion_length - 1 : -1] @ jnp.array([25.0, 5.0, 1.0])
    return logits.at[:, -1, V + comparison.FIRST].set(code)


def test_completions_of_a_prompt_meet_the_same_opponent():
    config = rlaif.Config(
        task="enumerable-3-3", batch_size=32, group_size=4, beta=0.0, orders=1, temperature=2.0
    )
    given = rlaif.Given(reference(), judge=jax.tree_util.Partial(opponent_only))
    state = rlaif.init(random.key(0), config, given)
    batch, metrics = jax.jit(rlaif.rollout)(random.key(1), state, config, given)
    assert (batch.advantage == 0).all() and metrics["reward/score"] > 0
    assert len(np.unique(batch.completion_ids, axis=0)) > 1


@pytest.mark.parametrize(
    ("trainer", "change", "message"),
    [
        (judge, {"num_labels": 0}, "num_labels must be 1 or more, but is 0"),
        (judge, {"label_noise": 0.5}, "label_noise must be less than 0.5, but is 0.5"),
        (judge, {"label_noise": -0.1}, "label_noise must be 0 or more, but is -0.1"),
        (judge, {"label_noise": math.nan}, "label_noise must be"),
        (judge, {"swap_share": 1.5}, "swap_share must be between 0 and 1, but is 1.5"),
        (reward_model, {"labels": "hard"}, "labels must be one of 'sampled', 'greedy', but is"),
        (rlaif, {"reward": "rank"}, "reward must be one of 'log_odds', 'probability', but is"),
        (rlaif, {"orders": 3}, "orders must be between 1 and 2, but is 3"),
        (rlaif, {"group_size": 1}, "group_size must be 2 or more, but is 1"),
        (rlaif, {"group_size": 5}, "group_size must divide batch_size"),
    ],
)
def test_an_impossible_configuration_is_refused(trainer, change, message):
    trainer.check(trainer.Config())
    with pytest.raises(InputError, match=message):
        trainer.check(dataclasses.replace(trainer.Config(), **change))


def judge_for(task):
    return jax.eval_shape(
        lambda: comparison.start(random.key(0), reference(task), tasks.make(task))
    )


@pytest.mark.parametrize("trainer", [reward_model, rlaif])
def test_a_judge_that_does_not_fit_is_refused(trainer):
    config = trainer.Config(task="enumerable-3-3")
    trainer.check_given(config, trainer.Given(reference(), judge=judge_for("enumerable-3-3")))
    scalar = transformer.scalar_model(random.key(0), reference(), 1.0)
    for given, message in (
        (judge_for("enumerable-4-3"), "must have the 8 tokens of task 'enumerable-3-3' and 4 more"),
        (reference(), "must have the 8 tokens of task 'enumerable-3-3' and 4 more, but has 8"),
        (judge_for("enumerable-3-4"), "made for questions of 11 tokens, .* is made for 13"),
        (scalar, "given judge must be a judge, but is a reward model"),
    ):
        with pytest.raises(InputError, match=message):
            trainer.check_given(config, trainer.Given(reference(), judge=given))


STAGES = """
seeds = 2
eval_episodes = 64
[[stage]]
name = "sft"
agent = "rlhf.sft"
rows_per_device = 2
config = {task = "enumerable-3-3", batch_size = 16, num_updates = 3, width = 8, num_layers = 1, \
num_heads = 1, num_kv_heads = 1, mlp_width = 8}
[[stage]]
name = "judge"
agent = "rlhf.judge"
config = {task = "enumerable-3-3", batch_size = 16, num_updates = 3, num_labels = 32}
given = {reference = "sft"}
[[stage]]
name = "reward"
agent = "rlhf.reward_model"
config = {task = "enumerable-3-3", batch_size = 16, num_updates = 3}
given = {reference = "sft", judge = "judge"}
[[stage]]
name = "rlaif"
agent = "rlhf.rlaif"
config = {task = "enumerable-3-3", batch_size = 16, num_updates = 3}
given = {reference = "sft", judge = "judge"}
sweep = {beta = [0.1, 1.0]}
"""


def test_pipelines_with_a_judge_run_and_resume(tmp_path, capsys):
    path, out = tmp_path / "tiny.toml", tmp_path / "out"
    path.write_text(STAGES)
    options = session.Options(out=out, devices=1, quiet=True)
    assert session.sweep(path, options) == 0
    printed = capsys.readouterr().out
    assert "position bias" in printed and "judged win" in printed
    for stage, count in (("judge", 2), ("reward", 2), ("rlaif", 4)):
        with (out / stage / "report" / "runs.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count
        assert all(math.isfinite(float(row["score"])) for row in rows)
    assert session.sweep(path, options) == 0
    assert capsys.readouterr().out.count("already finished") == 4


def test_a_reward_model_as_a_judge_ends_with_one_sentence(tmp_path, capsys):
    path = tmp_path / "wrong.toml"
    path.write_text(STAGES.replace('judge = "judge"', 'judge = "sft"'))
    assert cli.main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "given judge must have the 8 tokens" in error and error.count("\n") == 1
