"""DPO, online DPO and KTO: first updates, what they refuse, and sweeps of them."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sweep
from jax import random

from purejaxpg import InputError, contract
from purejaxpg.rlhf import data, dpo, kto, measure, online_dpo, sft, tasks, tokens, transformer
from purejaxpg.sweep import engine
from purejaxpg.sweep import spec as specs

TASK = tasks.make("enumerable-3-3")
SMALL = {"width": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_width": 8}
GOOD, BAD, UNENDED = [3, 2, 0], [4, 4, 2], [3, 4, 3]
DATA_SETS = [(dpo, "pairs"), (online_dpo, ""), (kto, "labelled")]


@pytest.fixture(scope="module")
def reference():
    config = sft.Config(task="enumerable-3-3", **SMALL)
    return transformer.init(random.key(0), sft.architecture(config))


def updates(trainer, config, given, count):
    """Metrics of the first updates, and the last state."""
    state, update = trainer.init(random.key(0), config, given), jax.jit(trainer.update)
    metrics = []
    for u in range(count):
        state, now = update(random.key(u + 1), state, config, given)
        metrics.append(jax.device_get(now))
    return metrics, state


def test_dpo_raises_the_chosen_completion_over_the_rejected_one(reference):
    pairs = data.Pairs(*(jnp.array([ids]) for ids in (TASK.prompt_ids[1], GOOD, UNENDED)))
    config = dpo.Config(task="enumerable-3-3", batch_size=2, learning_rate=1e-3)
    given = dpo.Given(reference, pairs)
    batch = dpo.draw(random.key(0), config, given)
    assert batch.completion_ids.tolist() == [GOOD, GOOD, UNENDED, UNENDED]
    assert batch.mask.tolist() == [[True, True, False]] * 2 + [[True] * 3] * 2
    (first, second), _ = updates(dpo, config, given, 2)
    assert first["loss/preference"] == pytest.approx(math.log(2), rel=1e-5)
    assert abs(first["reward/margin"]) < 1e-6
    assert second["loss/preference"] < math.log(2) and second["reward/accuracy"] == 1
    assert second["policy/chosen_log_ratio"] > 0 > second["policy/rejected_log_ratio"]
    change = config.beta * (second["policy/chosen_log_ratio"] - second["policy/rejected_log_ratio"])
    assert second["reward/margin"] == pytest.approx(change, rel=1e-5)


def test_kto_compares_with_completions_of_other_prompts(reference):
    rows = (TASK.prompt_ids[[0, 1]], [GOOD, BAD], [True, False])
    config = kto.Config(task="enumerable-3-3", batch_size=3, learning_rate=1e-2)
    given = kto.Given(reference, data.Labelled(*map(jnp.array, rows)))
    (first, second, _), state = updates(kto, config, given, 3)
    assert first["loss/preference"] == pytest.approx(0.5, rel=1e-5)
    assert second["loss/preference"] < 0.5 - 1e-4 and second["reward/margin"] > 0
    # Three draws of two rows in a circle: somewhere, a row follows itself.
    batch = jax.jit(kto.rollout)(random.key(9), state, config, given)
    before = jnp.roll(batch.completion_ids, 1, axis=0)
    assert before[1].tolist() == batch.completion_ids[0].tolist()
    log_probs = jax.jit(measure.token_log_probs, static_argnums=3)
    policy, fixed = (
        log_probs(model, batch.prompt_ids, before, TASK, 1.0)
        for model in (kto.policy_of(state.params, config, given), reference)
    )
    log_ratio = np.where(tokens.completion_mask(before, TASK.eos_id), policy - fixed, 0.0).sum(1)
    is_other = np.asarray(before != batch.completion_ids).any(1)
    assert 0 < is_other.sum() < 3
    assert float(batch.kl) == pytest.approx(log_ratio[is_other].mean(), abs=1e-5)
    assert abs(batch.kl - log_ratio.mean()) > 1e-4


def test_own_labels_follow_the_reward(reference):
    config = kto.Config(task="enumerable-3-3", batch_size=4096, threshold=0.5)
    draw, given = jax.jit(kto.draw), kto.Given(reference)
    drawn, is_kept = draw(random.key(0), config, given)
    mask = tokens.completion_mask(drawn.completion_ids, TASK.eos_id)
    reward = np.asarray(TASK.reward(drawn.prompt_ids, drawn.completion_ids, mask))
    expected, label = 1.0 / (1.0 + np.exp(0.5 - reward)), np.asarray(drawn.is_desirable)
    for part in (reward > 0.5, reward < 0.5):
        assert label[part].mean() == pytest.approx(expected[part].mean(), abs=0.04)
    assert is_kept.all()
    change = {"label_noise": 0.4, "desirable_kept": 0.1}
    noisy, is_kept = draw(random.key(0), dataclasses.replace(config, **change), given)
    assert (noisy.completion_ids == drawn.completion_ids).all()
    label = np.asarray(noisy.is_desirable)
    assert label.mean() == pytest.approx((0.4 + 0.2 * expected).mean(), abs=0.04)
    assert is_kept[label].mean() == pytest.approx(0.1, abs=0.03) and is_kept[~label].all()


def test_online_dpo_learns_from_its_own_pairs(reference):
    config = online_dpo.Config(
        task="enumerable-3-3", batch_size=32, learning_rate=1e-2, num_updates=100
    )
    metrics, _ = updates(online_dpo, config, online_dpo.Given(reference), 100)
    assert metrics[0]["loss/preference"] == pytest.approx(math.log(2), rel=1e-5)
    assert abs(metrics[0]["policy/reference_kl"]) < 1e-5 and 0 < metrics[0]["pairs/ties"] < 0.5
    gold = [m["reward/gold"] for m in metrics]
    assert np.mean(gold[-10:]) > np.mean(gold[:10]) + 0.3


def test_the_judge_labels_pairs_and_leaves_out_ties(reference):
    def drawn(labels, reward=None):
        config = online_dpo.Config(task="enumerable-3-3", batch_size=64, labels=labels)
        given = online_dpo.Given(reference, reward)
        state = online_dpo.init(random.key(0), config, given)
        return jax.jit(online_dpo.rollout)(random.key(1), state, config, given)

    batch, metrics = drawn("expected")
    gold = np.asarray(TASK.reward(batch.prompt_ids, batch.completion_ids, batch.mask))
    chosen, rejected = np.split(np.asarray(batch.completion_ids), 2)
    difference = gold[:64] - gold[64:]
    np.testing.assert_allclose(batch.probability, 1.0 / (1.0 + np.exp(-difference)), rtol=1e-5)
    is_tie = (chosen == rejected).all(1)
    assert 0 < is_tie.sum() < 64 and batch.weight.tolist() == (1.0 - is_tie).tolist()
    assert metrics["pairs/ties"] == pytest.approx(is_tie.mean())
    # To a judge that finds all completions equally good, all pairs are ties.
    indifferent = transformer.scalar_model(random.key(2), reference, 0.0)
    batch, metrics = drawn("sampled", indifferent)
    assert metrics["pairs/ties"] == 1 and not batch.weight.any()
    assert (batch.probability == 1).all()


@pytest.mark.parametrize(
    ("trainer", "change", "message"),
    [
        (dpo, {"loss": "hinge"}, "loss must be one of 'sigmoid', 'ipo', 'simpo', 'orpo', but is"),
        (dpo, {"beta": 0.0}, "beta must be more than 0, but is 0.0"),
        (dpo, {"label_smoothing": 0.5}, "label_smoothing must be less than 0.5, but is 0.5"),
        (dpo, {"label_smoothing": -0.1}, "label_smoothing must be 0 or more"),
        (dpo, {"simpo_margin": math.inf}, "simpo_margin must be finite"),
        (dpo, {"orpo_lambda": -1.0}, "orpo_lambda must be 0 or more"),
        (online_dpo, {"loss": "simpo"}, "loss must be one of 'sigmoid', 'ipo', but is 'simpo'"),
        (online_dpo, {"labels": "hard"}, "labels must be one of 'sampled', 'expected'"),
        (online_dpo, {"beta": 0.0}, "beta must be more than 0"),
        (kto, {"batch_size": 1}, "batch_size must be 2 or more, but is 1"),
        (kto, {"beta": 0.0}, "beta must be more than 0"),
        (kto, {"undesirable_weight": -1.0}, "undesirable_weight must be 0 or more"),
        (kto, {"threshold": math.nan}, "threshold must be finite"),
        (kto, {"desirable_kept": 1.1}, "desirable_kept must be between 0 and 1, but is 1.1"),
        (dpo, {"label_noise": 0.6}, "label_noise must be between 0 and 0.5, but is 0.6"),
    ],
)
def test_an_impossible_configuration_is_refused(trainer, change, message):
    trainer.check(trainer.Config())
    with pytest.raises(InputError, match=message):
        trainer.check(dataclasses.replace(trainer.Config(), **change))


def write(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.fixture
def files(tmp_path):
    pair = {"prompt": "<0>", "chosen": "a b", "rejected": "b"}
    good = {"prompt": "<0>", "completion": "a b", "label": True}
    bad = {"prompt": "<1>", "completion": "", "label": False}
    return {
        "pairs": write(tmp_path / "pairs.jsonl", pair),
        "labelled": write(tmp_path / "labelled.jsonl", good, bad),
    }


@pytest.mark.parametrize(("trainer", "data_set"), DATA_SETS)
def test_a_sweep_resumes_to_the_same_bits(
    tmp_path, monkeypatch, reference, files, trainer, data_set
):
    config = {"task": "enumerable-3-3", "batch_size": 4, "num_updates": 3}
    own = {}
    if data_set:
        own = {
            data_set: contract.read(trainer, data_set, files[data_set], trainer.Config(**config))
        }
    given = jax.tree.map(lambda x: np.asarray(x)[None], trainer.Given(reference, **own))
    table = {"agent": contract.name_of(trainer), "seeds": 1, "eval_episodes": 4}
    table |= {"config": config, "sweep": {"beta": [0.1, 1.0]}, "rows_per_device": 2}
    spec, segments = specs.from_dict(table, "tiny", given=given), engine.segments

    def stop(*arguments):
        for number, step in enumerate(segments(*arguments)):
            if number == 1:
                raise KeyboardInterrupt
            yield step

    tiny_sweep.run(spec, tmp_path / "whole", snapshot_every_s=0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "segments", stop)
        tiny_sweep.run(spec, tmp_path / "halves", snapshot_every_s=0.0)
    assert list((tmp_path / "halves" / "progress").iterdir())
    tiny_sweep.run(spec, tmp_path / "halves", snapshot_every_s=0.0)
    (whole,), (halves,) = (tiny_sweep.contents(tmp_path / x).values() for x in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert all(np.array_equal(whole[name], halves[name]) for name in whole)
    changed = jax.tree.leaves(whole)
    assert all(np.isfinite(x).all() for x in changed if x.dtype.kind == "f")
