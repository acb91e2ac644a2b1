"""Runs of GRPO and of distillation: their first updates, stale samples, resuming, bad input."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import InputError
from purejaxpg.rlhf import distill, grpo, measure, sft, tasks, transformer
from purejaxpg.sweep import compute, session
from purejaxpg.sweep import progress as progresses
from purejaxpg.sweep import store as stores

TASK = tasks.make("enumerable-3-3")
SMALL = {"width": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_width": 8}
BASE = {"task": "enumerable-3-3", "batch_size": 16}


def model(seed=0, **change):
    config = sft.Config(**{**BASE, **SMALL, **change})
    return transformer.init(random.key(seed), sft.architecture(config))


@pytest.fixture(scope="module")
def given():
    return grpo.Given(model())


def updates(config, given, count):
    """The states after 0 to `count` updates, and the metrics of each."""
    states, metrics = [grpo.init(random.key(0), config, given)], []
    for u in range(count):
        state, values = jax.jit(grpo.update)(random.key(u), states[-1], config, given)
        states.append(state)
        metrics.append(values)
    return states, metrics


def equal(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(bool((x == y).all()) for x, y in leaves)


def test_fresh_samples_have_ratio_one_and_no_weight(given):
    config = grpo.Config(**BASE, num_epochs=1)
    (start, after), (metrics,) = updates(config, given, 1)
    assert start.past == () and not equal(start.params, after.params)
    assert abs(float(metrics["policy/kl"])) < 1e-6 and metrics["policy/clip_fraction"] == 0
    assert metrics["policy/importance"] == 1.0
    assert abs(float(metrics["policy/reference_kl"])) < 1e-5
    drawn, _ = grpo.rollout(random.split(random.key(0))[0], start, config, given)
    surprise = -np.where(drawn.mask, drawn.log_prob, 0.0).sum(1).mean()
    assert float(metrics["policy/entropy"]) == pytest.approx(surprise, rel=1e-5)
    capped = dataclasses.replace(config, is_cap=0.1)
    assert equal(updates(capped, given, 1)[0][1], after)


def test_stale_samples_come_from_the_policy_of_k_updates_ago(given):
    options = {"num_epochs": 1, "group_size": 2, "staleness": 2}
    config = grpo.Config(**BASE, **options, learning_rate=0.1, is_cap=1.5)
    states, metrics = updates(config, given, 3)
    for state, oldest in zip(states, (0, 0, 0, 1), strict=True):
        assert equal(jax.tree.map(lambda x: x[0], state.past), states[oldest].params)
    assert equal(jax.tree.map(lambda x: x[1], states[3].past), states[2].params)
    weights = [float(m["policy/importance"]) for m in metrics]
    assert weights[0] == pytest.approx(1.0, abs=1e-5)
    assert 0.0 < weights[2] < 1.5 and abs(weights[2] - 1.0) > 0.01

    def drawn(past):
        stack = jax.tree.map(lambda *x: jnp.stack(x), *(states[i].params for i in past))
        state = dataclasses.replace(states[2], past=stack)
        return jax.jit(grpo.rollout)(random.key(4), state, config, given)[0]

    batch = drawn((0, 1))
    ids = batch.completion_ids
    assert equal(ids, drawn((0, 0)).completion_ids)
    assert not equal(ids, drawn((1, 1)).completion_ids)
    now, then = (grpo.policy_of(states[i].params, config, given) for i in (2, 0))
    log_ratio = jnp.where(
        batch.mask,
        measure.token_log_probs(now, batch.prompt_ids, ids, TASK, 1.0)
        - measure.token_log_probs(then, batch.prompt_ids, ids, TASK, 1.0),
        0.0,
    ).sum(1)
    np.testing.assert_allclose(batch.weight, np.minimum(np.exp(log_ratio), 1.5), rtol=1e-4)
    assert batch.weight.min() < 0.9 and batch.weight.max() == 1.5


def test_rollouts_differ_in_what_their_options_say(given):
    masks = {"mask_truncated": True, "mask_equal": True}
    options = {"group_size": 2, "num_epochs": 1}
    configs = [grpo.Config(**BASE, **options, **x) for x in ({"staleness": 2}, masks)]
    key = random.key(3)
    stale, masked = (
        jax.jit(grpo.rollout)(key, grpo.init(key, c, given), c, given)[0] for c in configs
    )
    assert equal(stale.completion_ids, masked.completion_ids)
    whole, ids = stale.mask, masked.completion_ids
    log_probs = [jnp.where(whole, b.log_prob, 0.0) for b in (stale, masked)]
    np.testing.assert_allclose(*log_probs, atol=1e-5)  # of the trainer's pass, and the sampler's
    score = TASK.reward(masked.prompt_ids, ids, whole).reshape(-1, 2)
    kept = (ids == TASK.eos_id).any(1) & jnp.repeat(score[:, 0] != score[:, 1], 2)
    assert equal(masked.mask, whole & kept[:, None])
    assert 0 < kept.sum() < ((ids == TASK.eos_id).any(1)).sum() < len(kept)


def test_the_teacher_samples_the_last_completions(given):
    architecture = given.reference.architecture
    silent = dataclasses.replace(architecture, suppressed=(*architecture.suppressed, 3, 4))
    teacher = transformer.Model(given.reference.params, silent)
    config, both = distill.Config(**BASE, teacher_batch_size=6), distill.Given(model(), teacher)
    state = distill.init(random.key(0), config, both)
    other = dataclasses.replace(state, params=jax.tree.map(lambda x: 3.0 * x, state.params))
    batch, of_other = (
        jax.jit(distill.rollout)(random.key(1), s, config, both) for s in (state, other)
    )
    ids, other_ids = batch.completion_ids, of_other.completion_ids
    assert equal(ids[10:], other_ids[10:]) and not equal(ids[:10], other_ids[:10])
    lengths = batch.mask.sum(1).tolist()
    assert lengths[10:] == [1] * 6 and max(lengths[:10]) > 1
    np.testing.assert_allclose(jnp.exp(batch.teacher_log_prob).sum(-1), 1.0, rtol=1e-5)


PIPELINE = """
seeds = 1
eval_episodes = 16
[[stage]]
name = "sft"
agent = "rlhf.sft"
config = {BASE, num_updates = 1, SMALL}
[[stage]]
name = "grpo"
GRPO
[[stage]]
name = "distill"
agent = "rlhf.distill"
given = {reference = "sft", teacher = "grpo"}
config = {BASE, num_updates = 2, teacher_batch_size = 4}
"""
GRPO = """
agent = "rlhf.grpo"
given = {reference = "sft"}
config = {BASE, num_updates = 3, OPTIONS}
"""
OPTIONS = {
    "num_epochs": 2,
    "num_minibatches": 2,
    "scale": "group",
    "group_size": 4,
    "normaliser": "token",
    "ratio": "sequence",
    "kl_placement": "loss",
    "kl_estimator": "k3",
    "kl_times_ratio": True,
    "mask_truncated": True,
    "mask_equal": True,
    "oversample": 2,
    "staleness": 1,
}


def toml(fields):
    values = (f"{k} = {str(v).lower() if v is True else repr(v)}" for k, v in fields.items())
    return ", ".join(values).replace("'", '"')


@pytest.fixture
def shared_programs(monkeypatch):
    """Sweeps of this test share programs, as groups of one sweep do."""
    built: dict[Any, Any] = {}
    build = compute.build

    def once(spec, group, devices):
        key = spec.agent.__name__, compute.signature(group.config)
        if key not in built:
            built[key] = build(spec, group, devices)
        return built[key]

    monkeypatch.setattr(compute, "build", once)


def arrays(out):
    with stores.Store.read(out) as store:
        (unit,) = store.ledger.units()
        return dict(store.arrays(unit["name"]))


def written(path, text):
    for name, fields in (("BASE", BASE), ("SMALL", SMALL), ("OPTIONS", OPTIONS)):
        text = text.replace(name, toml(fields))
    path.write_text(text)
    return path


def test_a_pipeline_runs_and_resumes_to_the_same_bits(tmp_path, shared_programs, monkeypatch):
    whole = session.Options(out=tmp_path / "whole", devices=1, quiet=True)
    path = written(tmp_path / "whole.toml", PIPELINE.replace("GRPO", GRPO))
    assert session.sweep(path, whole) == 0
    alone = GRPO.replace('"sft"', f'"{tmp_path}/whole/sft"')
    path = written(tmp_path / "alone.toml", f"seeds = 1\neval_episodes = 16\n{alone}")
    halves = dataclasses.replace(whole, out=tmp_path / "halves", snapshot_every_s=0.0)
    advance, seen = progresses.Progress.advance, []

    def interrupted(self, *arguments):
        advance(self, *arguments)
        seen.append(self.done_steps)
        if len(seen) == 2:  # of three updates
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progresses.Progress, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.sweep(path, halves)
    assert list((tmp_path / "halves" / "progress").iterdir())
    assert session.sweep(path, halves) == 0
    expected, actual = arrays(tmp_path / "whole" / "grpo"), arrays(tmp_path / "halves")
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(value, actual[name], err_msg=name)
    kl = arrays(tmp_path / "whole" / "distill")
    assert (kl["evaluation/teacher_kl"] >= -1e-6).all() and "evaluation/kl" not in kl


@pytest.mark.parametrize(
    ("trainer", "change", "message"),
    [
        (grpo, {"group_size": 1}, "group_size must be 2 or more, but is 1"),
        (grpo, {"group_size": 5}, "group_size must divide batch_size"),
        (grpo, {"scale": "std"}, "scale must be one of 'group', 'batch', 'none', but is 'std'"),
        (grpo, {"normaliser": "mean"}, "normaliser must be one of"),
        (grpo, {"ratio": "word"}, "ratio must be one of 'token', 'sequence', but is 'word'"),
        (grpo, {"surrogate": "gspo"}, "surrogate must be one of"),
        (grpo, {"kl_placement": "none"}, "kl_placement must be one of"),
        (grpo, {"kl_estimator": "k4"}, "kl_estimator must be one of"),
        (grpo, {"kl_placement": "loss"}, "kl_estimator must be 'k2' or 'k3' for kl_placement"),
        (grpo, {"staleness": -1}, "staleness must be 0 or more, but is -1"),
        (grpo, {"oversample": 0}, "oversample must be 1 or more, but is 0"),
        (grpo, {"is_cap": 0.0}, "is_cap must be more than 0"),
        (grpo, {"clip_eps_high": -0.1}, "clip_eps_high must be 0 or more"),
        (distill, {"divergence": "kl"}, "divergence must be one of 'forward_kl'"),
        (distill, {"jensen_shannon_weight": 1.0}, "jensen_shannon_weight must be more than 0 and"),
        (distill, {"teacher_batch_size": 65}, "teacher_batch_size must be between 0 and 64"),
    ],
)
def test_an_impossible_configuration_is_refused(trainer, change, message):
    trainer.check(trainer.Config())
    with pytest.raises(InputError, match=message):
        trainer.check(dataclasses.replace(trainer.Config(), **change))


def test_a_teacher_with_another_vocabulary_is_refused(given):
    config, teacher = distill.Config(**BASE), model(1, task="enumerable-4-3")
    distill.check_given(config, distill.Given(given.reference, model(1, width=16)))
    with pytest.raises(InputError, match=r"given teacher must have the 8 tokens of task .* has 9"):
        distill.check_given(config, distill.Given(given.reference, teacher))
