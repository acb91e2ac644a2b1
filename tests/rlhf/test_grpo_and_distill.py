"""Runs of GRPO and of distillation: their first updates, stale samples, resuming, bad input."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import InputError
from purejaxpg.rlhf import distill, grpo, sft, transformer
from purejaxpg.sweep import compute, session
from purejaxpg.sweep import progress as progresses
from purejaxpg.sweep import store as stores

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
    config = grpo.Config(**BASE)
    (start, after), (metrics,) = updates(config, given, 1)
    assert start.past == () and not equal(start.params, after.params)
    assert abs(float(metrics["policy/kl"])) < 1e-6 and metrics["policy/clip_fraction"] == 0
    assert metrics["policy/importance"] == 1.0
    assert abs(float(metrics["policy/reference_kl"])) < 1e-5
    capped = dataclasses.replace(config, is_cap=0.1)
    assert equal(updates(capped, given, 1)[0][1], after)


def test_stale_samples_come_from_the_policy_of_k_updates_ago(given):
    config = grpo.Config(**BASE, staleness=2, learning_rate=0.1, is_cap=1.5)
    states, metrics = updates(config, given, 3)
    for state, oldest in zip(states, (0, 0, 0, 1), strict=True):
        assert equal(jax.tree.map(lambda x: x[0], state.past), states[oldest].params)
    assert equal(jax.tree.map(lambda x: x[1], states[3].past), states[2].params)
    weights = [float(m["policy/importance"]) for m in metrics]
    assert weights[0] == pytest.approx(1.0, abs=1e-5)
    assert 0.0 < weights[2] < 1.5 and abs(weights[2] - 1.0) > 0.01
    fresh = grpo.Config(**BASE, learning_rate=0.1)
    keys = random.split(random.key(0))
    batches = [
        jax.jit(grpo.rollout)(keys[0], grpo.init(keys[0], c, given), c, given)[0]
        for c in (config, fresh)
    ]
    assert equal(batches[0].completion_ids, batches[1].completion_ids)
    log_probs = [jnp.where(b.mask, b.log_prob, 0.0) for b in batches]
    np.testing.assert_allclose(*log_probs, atol=1e-5)


PIPELINE = """
seeds = 1
eval_episodes = 16
[[stage]]
name = "sft"
agent = "rlhf.sft"
config = {BASE, num_updates = 2, SMALL}
[[stage]]
name = "grpo"
agent = "rlhf.grpo"
given = {reference = "sft"}
config = {BASE, num_updates = 3, num_epochs = 2, num_minibatches = 2, scale = "group",
          group_size = 4, normaliser = "token", ratio = "sequence", kl_placement = "loss",
          kl_estimator = "k3", kl_times_ratio = true, mask_truncated = true, mask_equal = true,
          oversample = 2, staleness = 1}
[[stage]]
name = "distill"
agent = "rlhf.distill"
given = {reference = "sft", teacher = "grpo"}
config = {BASE, num_updates = 2, teacher_batch_size = 4}
"""


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


def test_a_pipeline_runs_and_resumes_to_the_same_bits(tmp_path, shared_programs, monkeypatch):
    path = tmp_path / "tiny.toml"
    text = PIPELINE.replace("BASE", toml(BASE)).replace("SMALL", toml(SMALL))
    path.write_text(text.replace(",\n         ", ","))
    whole = session.Options(out=tmp_path / "whole", devices=1, quiet=True)
    assert session.sweep(path, whole) == 0
    halves = dataclasses.replace(whole, out=tmp_path / "halves", snapshot_every_s=0.0)
    advance, seen = progresses.Progress.advance, []

    def interrupted(self, *arguments):
        advance(self, *arguments)
        seen.append(self.done_steps)
        if len(seen) == 4:  # two updates of the first stage, and two of three of the second
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progresses.Progress, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.sweep(path, halves)
    assert list((tmp_path / "halves" / "grpo" / "progress").iterdir())
    assert session.sweep(path, halves) == 0
    for stage in ("grpo", "distill"):
        expected, actual = (arrays(tmp_path / name / stage) for name in ("whole", "halves"))
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(value, actual[name], err_msg=name)
    kl = expected["evaluation/teacher_kl"]
    assert (kl >= -1e-6).all() and "evaluation/kl" not in expected


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
