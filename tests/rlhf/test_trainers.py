"""The trainers: what holds in their first update, and what they refuse."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import InputError, cli, contract
from purejaxpg.agents import sac
from purejaxpg.rlhf import measure, ppo, reward_model, rloo, sft, tasks, transformer

TASK = tasks.make("enumerable-3-3")
SMALL = {"width": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_width": 8}
BASE = {"task": "enumerable-3-3", "batch_size": 16}


@pytest.fixture(scope="module")
def reference():
    config = sft.Config(**BASE, **SMALL)
    return transformer.init(random.key(0), sft.architecture(config))


def first_update(trainer, config, given):
    state = jax.eval_shape(trainer.init, random.key(0), config, given)
    assert state.num_updates.dtype == jnp.int32
    state = trainer.init(random.key(0), config, given)
    return jax.jit(trainer.update)(random.key(1), state, config, given)


def test_first_update_of_ppo_starts_at_the_reference(reference):
    config = ppo.Config(**BASE, num_epochs=1, beta=0.3)
    state, metrics = first_update(ppo, config, ppo.Given(reference))
    assert abs(float(metrics["policy/reference_kl"])) < 1e-5
    assert abs(float(metrics["policy/kl"])) < 1e-6
    assert metrics["policy/clip_fraction"] == 0 and metrics["policy/beta"] == np.float32(0.3)
    assert state.beta_factor == 1
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), state.params["policy"], reference.params
    )
    assert any(jax.tree.leaves(moved))


def test_a_copy_in_a_population_has_the_beta_of_its_own_configuration(reference):
    config, given = ppo.Config(**BASE, num_epochs=1, beta=0.3), ppo.Given(reference)
    state, _ = first_update(ppo, config, given)
    changed = dataclasses.replace(config, beta=0.6)
    _, metrics = jax.jit(ppo.update)(random.key(2), state, changed, given)
    assert metrics["policy/beta"] == np.float32(0.6)


def test_adaptive_beta_falls_while_the_divergence_is_below_its_target(reference):
    config = ppo.Config(**BASE, num_epochs=1, reference_kl=6.0, kl_horizon=160.0)
    state, _ = first_update(ppo, config, ppo.Given(reference))
    assert state.beta_factor == pytest.approx(1 - 0.2 * 16 / 160, rel=1e-5)


def test_missing_end_costs_the_penalty(reference):
    scores = [
        first_update(rloo, rloo.Config(**BASE, missing_eos_penalty=p), rloo.Given(reference))[1]
        for p in (0.0, 2.0)
    ]
    assert scores[0]["reward/score"] == scores[1]["reward/score"]
    assert 0 < scores[0]["completion/finished"] < 1
    assert scores[0]["loss/policy"] != scores[1]["loss/policy"]


def test_reward_model_with_a_zero_head_has_the_loss_of_a_coin(reference):
    config, given = reward_model.Config(**BASE), reward_model.Given(reference)
    zero = transformer.scalar_model(random.key(0), reference, 0.0)
    pairs, best = reward_model.draw(random.key(1), config, given, 16)
    value, metrics = reward_model.loss(zero.params, pairs, config, given)
    assert value == pytest.approx(math.log(2), rel=1e-6) and metrics["reward/accuracy"] == 0
    assert (best >= 0.5).all()


def test_frontier_of_a_listed_task_rises_and_bounds_its_reference(reference):
    config = ppo.Config(**BASE)
    frontier = measure.frontier(random.key(0), config, ppo.Given(reference))
    assert (np.diff(frontier["kl"]) > 0).all() and (np.diff(frontier["return"]) > 0).all()
    score = measure.score(random.key(1), reference, config, 4096, ppo.Given(reference))
    assert frontier["return"][0] == pytest.approx(float(score["evaluation/return"].mean()), abs=0.1)
    np.testing.assert_allclose(score["evaluation/kl"], 0.0, atol=1e-6)
    assert float(score["evaluation/win"].mean()) == pytest.approx(0.5, abs=0.05)


def test_a_frontier_is_computed_once_for_each_reference_and_temperature(reference, monkeypatch):
    made = []
    monkeypatch.setattr(measure, "FRONTIERS", {})
    monkeypatch.setattr(measure, "_frontier", lambda *arguments: made.append(arguments) or {})
    other = dataclasses.replace(reference, params=jax.tree.map(lambda x: x + 1.0, reference.params))
    warm = {**BASE, "temperature": 2.0}
    for fields, model, count in (
        ({**BASE, "beta": 0.1}, reference, 1),
        ({**BASE, "beta": 0.2}, jax.device_get(reference), 1),
        (warm, reference, 2),
        (warm, other, 3),
    ):
        measure.frontier(random.key(0), ppo.Config(**fields), ppo.Given(model))
        assert len(made) == count


@pytest.mark.parametrize(
    ("trainer", "change", "message"),
    [
        (ppo, {"beta": -1.0}, "beta must be 0 or more, but is -1.0"),
        (ppo, {"num_minibatches": 3}, "num_minibatches must divide batch_size"),
        (ppo, {"temperature": 0.0}, "temperature must be more than 0"),
        (rloo, {"group_size": 1}, "group_size must be 2 or more, but is 1"),
        (rloo, {"baseline": "mean"}, "baseline must be one of"),
        (reward_model, {"center_coef": -0.1}, "center_coef must be 0 or more"),
        (reward_model, {"num_labels": -1}, "num_labels must be 0 or more, but is -1"),
        (sft, {"num_heads": 5}, "num_heads must divide width"),
        (sft, {"task": "humour"}, "task must be one of"),
    ],
)
def test_an_impossible_configuration_is_refused(trainer, change, message):
    with pytest.raises(InputError, match=message):
        trainer.check(dataclasses.replace(trainer.Config(), **change))


def test_advice_and_messages_have_the_names_of_these_trainers():
    assert contract.smaller(rloo.Config()) == "a smaller batch_size"
    assert contract.smaller(sac.Config()).endswith(
        ", a smaller replay_capacity or a smaller batch_size"
    )
    assert contract.name_of(rloo) == "rlhf.rloo" and contract.name_of(sac) == "sac"
    assert contract.length(rloo.Config(num_updates=7)) == ("num_updates", 7)
    assert contract.length(sac.Config(total_timesteps=70)) == ("total_timesteps", 70)


def test_a_model_that_does_not_fit_is_refused(reference):
    short = dataclasses.replace(reference.architecture, context=4)
    wide = dataclasses.replace(reference.architecture, mlp_width=9)
    scalar = transformer.scalar_model(random.key(0), reference, 1.0)
    config = ppo.Config(**BASE)
    for given, message in (
        (ppo.Given(dataclasses.replace(reference, architecture=short)), "context of at least 6"),
        (ppo.Given(scalar), "given reference must be a language model, but is a reward model"),
        (ppo.Given(reference, reference), "given reward must be a reward model"),
        (
            ppo.Given(dataclasses.replace(reference, architecture=wide)),
            r"given reference .* layer_0/down/kernel has the shape \(8, 8\) instead of \(9, 8\)",
        ),
    ):
        with pytest.raises(InputError, match=message):
            ppo.check_given(config, given)
    with pytest.raises(InputError, match="must have the 33 tokens of task 'sentiment', but has 8"):
        ppo.check_given(ppo.Config(), ppo.Given(reference))


OWN_TASK = """
import dataclasses
from purejaxpg.rlhf import tasks
tasks.register("own-ends", lambda: dataclasses.replace(tasks.make("sentiment"), pad_id=2))
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./mine.py", "--task", "own-ends"], "pad_id of task 'own-ends' must not be its eos_id"),
        (["rlhf.sft", "--given", "demonstrations=./empty.jsonl"], "empty.jsonl must have at least"),
        (
            ["rlhf.sft", "--given", "demonstrations=./short.jsonl"],
            "short.jsonl, line 1 must have the field 'completion' with a text, but has None",
        ),
        (["rlhf.sft", "--positions", "absolute"], "positions must be one of 'learned', 'rotary'"),
        (["rlhf.ppo"], "agent 'rlhf.ppo' must be given reference, with [given] or --given"),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    source = pathlib.Path(sft.__file__).read_text()
    guard = source.index("if __name__")
    pathlib.Path("mine.py").write_text(source[:guard] + OWN_TASK + source[guard:])
    pathlib.Path("empty.jsonl").write_text("\n")
    pathlib.Path("short.jsonl").write_text('{"prompt": "the film was"}\n')
    assert cli.main(["train", *words, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not pathlib.Path("results").exists()
