"""The benchmark: its counts, that it continues where it was stopped, and that it runs at all.

Nothing here asserts a time.
"""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from purejaxpg import InputError, cli, trainers
from purejaxpg.agents import a2c, ddpg, npg, ppo, ppo_rnn, reinforce, sac, trpo
from purejaxpg.bench import cases, child, counts, hlo, roof, run, show
from purejaxpg.rlhf import data, rloo, sft, transformer
from purejaxpg.rlhf import ppo as language_ppo

# --- FLOPs and bytes -----------------------------------------------------------------------------


@pytest.mark.fast
def test_ppo_on_cartpole_takes_227_kflop_and_42_kb_a_step() -> None:
    # Multiply-adds: the actor's 4*64 + 64*64 + 64*2, the critic's 4*64 + 64*64 + 64*1.
    macs = 4480 + 4416
    forward = 2 * macs
    backward = 2 * forward - 2 * 2 * 4 * 64  # no gradient of the observation, in either
    assert (forward, backward) == (17_792, 34_560)
    found = counts.count("ppo", ppo.Config(env="CartPole-v1"))
    assert found is not None
    assert found.flops == forward + 4 * (forward + backward) == 227_200
    assert found.samples == 4
    # Numbers of the layers: in + out for each product, and the first layers have one product less.
    actor, critic = (4 + 64) + (64 + 64) + (64 + 2), (4 + 64) + (64 + 64) + (64 + 1)
    learn = 3 * (actor + critic) - 2 * (4 + 64)
    weights_actor, weights_critic = 4610, 4545
    assert weights_actor + weights_critic == 9155
    rollout = actor + critic + weights_actor / 4 + weights_critic / 512 + 2 * (4 + 4 + 1 + 4)
    gathered = 2 * (4 + 1 + 4)
    optimizer = 16 / 512 * 10 * 9155
    assert found.bytes == pytest.approx(4 * (rollout + 4 * (learn + gathered) + optimizer))
    assert round(found.bytes / 1000) == 42


@pytest.mark.fast
def test_ppo_on_breakout_takes_1_14_mflop_a_step() -> None:
    found = counts.count("ppo", ppo.Config(env="Breakout-MinAtar"))
    macs = (400 * 64 + 64 * 64 + 64 * 3) + (400 * 64 + 64 * 64 + 64)
    backward = 4 * macs - 2 * 2 * 400 * 64
    assert found is not None and found.flops == 2 * macs + 4 * (2 * macs + backward) == 1_141_248


@pytest.mark.fast
def test_the_other_kinds_by_hand() -> None:
    small = {"env": "CartPole-v1", "hidden": (8,), "num_envs": 2}
    # Multiply-adds of actor (4-8-2) and critic (4-8-1); F = 2 macs, B = 4 macs - 2 * 4 * 8.
    forward_a, forward_c = 2 * 48, 2 * 40
    backward_a, backward_c = 4 * 48 - 64, 4 * 40 - 64
    learn_a, learn_c = forward_a + backward_a, forward_c + backward_c
    rollout = forward_a + forward_c

    def flops(agent: Any, **fields: Any) -> float:
        name = agent.__name__.rpartition(".")[2]
        found = counts.count(name, agent.Config(**{**small, **fields}))
        assert found is not None
        return found.flops

    assert flops(a2c) == rollout + learn_a + learn_c
    # With a GRU of 5: 8-15 and 5-15 before the heads 5-2 and 5-1.
    both = [2 * (32 + 120 + 75 + 5 * outputs) for outputs in (2, 1)]
    remembers = sum(forward + 3 * (3 * forward - 64) for forward in both)
    assert flops(ppo_rnn, memory_size=5, num_epochs=3, num_minibatches=2) == remembers
    assert flops(reinforce, num_critic_steps=3) == rollout + learn_a + 3 * learn_c
    assert flops(reinforce, baseline=False) == forward_a + learn_a
    natural = rollout + learn_a + 2 * 6 * backward_a + 7 * learn_c
    assert flops(npg, cg_iters=5, num_epochs=7) == natural
    assert flops(trpo, cg_iters=5, num_epochs=7) == natural + forward_a
    # Two samples a step: 2 gradient steps of 8 for 2 * 4 environment steps.
    replay = {"num_steps": 4, "num_gradient_steps": 2, "batch_size": 8}
    discrete = 2 * forward_a + backward_a + 8 * forward_a + 2 * backward_a - 2 * forward_a
    assert flops(sac, **replay) == forward_a + 2 * discrete
    # Pendulum: actor 3-8-1 (SAC: 3-8-2), critic 4-8-1; the action is one of its 4 inputs.
    through = 2 * 8 * 1 + 2 * 8
    actor, critic = 2 * 32, 2 * 40
    learnt = (2 * actor - 2 * 24) + (2 * critic - 2 * 32)
    each = 2 * actor + 3 * critic + learnt + through
    assert flops(ddpg, env="Pendulum-v1", **replay) == actor + 2 * each
    actor = 2 * 40
    each = 2 * actor + (2 * actor - 2 * 24) + 6 * critic + 2 * (2 * critic - 2 * 32) + 2 * through
    assert flops(sac, env="Pendulum-v1", **replay) == actor + 2 * each


@pytest.mark.fast
def test_a_convolution_is_counted_and_a_fork_is_not() -> None:
    config = ppo.Config(env="Breakout-MinAtar", torso="cnn", hidden=(32,))
    first, *_ = counts.net(config, 400, 3).layers
    assert (first.macs, first.outputs, first.weights) == (64 * 36 * 16, 1024, 36 * 16 + 16)
    assert counts.count("mine", config) is None


@pytest.mark.fast
def test_every_agent_of_the_package_is_counted() -> None:

    assert set(counts.KINDS) == {name for name in trainers.names() if "." not in name}
    assert set(counts.LANGUAGE) <= set(trainers.names())


@pytest.mark.fast
@pytest.mark.parametrize("changed", [{}, {"positions": "rotary", "mlp": "silu_gated"}])
def test_the_weights_and_products_of_a_transformer_are_counted(changed: dict[str, str]) -> None:
    fields = {"task": "enumerable-3-3", "width": 8, "num_heads": 2, "num_kv_heads": 1}
    config = sft.Config(**fields, num_layers=1, mlp_width=16, **changed)
    model = sft.model(sft.init(jax.random.key(0), config), config)
    policy = counts.transformer(model.architecture, config.row_length, 8)
    flat = jax.tree_util.tree_leaves_with_path(model.params)
    weights = sum(x.size for path, x in flat if "scale" not in str(path))  # not those of norms
    assert policy.weights == weights
    gated = 8 * 16 if changed else 0
    # Queries, a key and a value of 4 numbers each; scores and their mixture; the MLP; the head.
    macs = 8 * (8 + 2 * 4) + 2 * 8 * 6 + 8 * 8 + 8 * 16 + gated + 16 * 8 + 8 * 8
    assert policy.forward[0] == 2 * macs and policy.learn[0] == 3 * 2 * macs
    found = counts.count("rlhf.sft", config, sft.Given())
    assert found is not None and found.flops == 6 * macs
    given = rloo.Given(model)
    found = counts.count("rlhf.rloo", rloo.Config(task="enumerable-3-3"), given)
    # A sequence is a prompt of 3 tokens and 3 of a completion: compared and learnt whole, and
    # sampled but for a forward pass of its last token.
    assert found is not None
    assert found.flops == pytest.approx(2 * macs * (5 / 6 + 1 + 3) * 6 / 3, rel=1e-12)
    critic = macs - 8 * 8 + 8
    found = counts.count("rlhf.ppo", language_ppo.Config(task="enumerable-3-3"), given)
    assert found is not None
    expected = (2 * macs * (5 / 6 + 1 + 4 * 3) + 2 * critic * (1 + 4 * 3)) * 6 / 3
    assert found.flops == pytest.approx(expected, rel=1e-12)
    assert counts.count("rlhf.reward_model", config, given) is None


def products(jaxpr: Any) -> int:
    """Operations of the matrix products of numbers with a fraction, as often as loops run them."""
    total = 0
    for eqn in jaxpr.eqns:
        result = eqn.outvars[0].aval
        if eqn.primitive.name == "dot_general" and jnp.issubdtype(result.dtype, jnp.floating):
            (axes, _), _ = eqn.params["dimension_numbers"]
            total += 2 * result.size * math.prod(eqn.invars[0].aval.shape[i] for i in axes)
        parts = jax.tree.leaves(list(eqn.params.values()))
        inner = [each for each in (getattr(x, "jaxpr", x) for x in parts) if hasattr(each, "eqns")]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(map(products, inner))
    return total


LANGUAGE_CASES: list[tuple[str, dict[str, Any], int, int]] = [
    # Four completions or pairs of 3 tokens each; generated and trained tokens by hand.
    ("sft", {}, 0, 4 * (3 + 3)),
    ("rloo", {"group_size": 2}, 12, 12),
    ("grpo", {"group_size": 2, "num_epochs": 3}, 12, 3 * 12),
    ("grpo", {"group_size": 2, "oversample": 3, "staleness": 2, "num_epochs": 2}, 3 * 12, 2 * 12),
    ("ppo", {"num_epochs": 2, "num_minibatches": 2}, 12, 2 * 12),
    ("dpo", {}, 2 * 12, 2 * 12),
    ("dpo of given pairs", {}, 0, 2 * 12),
    ("online_dpo", {}, 2 * 12, 2 * 12),
    ("kto", {}, 12, 12),
]


@pytest.mark.fast
@pytest.mark.parametrize(("name", "fields", "generated", "trained"), LANGUAGE_CASES)
def test_operations_of_language_models_are_those_of_their_programs(
    name: str, fields: dict[str, Any], generated: int, trained: int
) -> None:
    agent = f"rlhf.{name.split()[0]}"
    trainer, key = trainers.load(agent), jax.random.key(0)
    own = {"task": "enumerable-3-3", "batch_size": 4}
    sizes = {"width": 8, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2, "mlp_width": 16}
    config: Any = sft.Config(**own, **sizes)
    model, given = sft.model(sft.init(key, config), config), sft.Given()
    if name != "sft":
        config, given = trainer.Config(**own, **fields), trainer.Given(model)
    if name.endswith("pairs"):
        given = given.replace(pairs=data.Pairs(*[jnp.zeros((3, 3), jnp.int32)] * 3))
    state = jax.eval_shape(lambda: trainer.init(key, config, given))
    program = jax.make_jaxpr(lambda k, s: trainer.update(k, s, config, given))(key, state)
    found = counts.count(agent, config, given)
    assert found is not None
    per_update = config.steps_per_update
    assert found.flops * per_update == pytest.approx(products(program.jaxpr), rel=1e-12)
    assert found.generated * per_update == pytest.approx(generated)
    assert found.samples * per_update == pytest.approx(trained)


@pytest.mark.fast
def test_a_token_takes_the_model_flops_of_palm() -> None:
    """6 N + 12 n H S with the gradient, a third of it without; n layers, H all heads together."""
    shape = {"width": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8}
    a = transformer.Architecture(vocab_size=30, context=20, **shape)
    weights = 3 * (4 * 32 * 32 + 2 * 32 * 128) + 32 * 30
    found = counts.transformer(a, 20, 30)
    assert found.forward[0] == 2 * weights + 4 * 3 * 32 * 20
    assert found.learn[0] == 6 * weights + 12 * 3 * 32 * 20


@pytest.mark.fast
def test_rates_of_tokens_are_those_of_the_unit_times_their_share() -> None:
    count = counts.Count(flops=1.0, bytes=1.0, samples=4.0, generated=0.5)
    found = child.tokens("rlhf.grpo", count, 100.0)
    assert found == {"generated_per_s": 50.0, "trained_per_s": 400.0}
    assert child.tokens("ppo", count, 100.0) is child.tokens("rlhf.grpo", None, 100.0) is None


@pytest.mark.fast
@pytest.mark.parametrize("agent", [ppo, ppo_rnn, ddpg, sac])
def test_weights_are_those_that_the_agent_has(agent: Any) -> None:
    on_policy = agent in (ppo, ppo_rnn)
    config = agent.Config(
        num_envs=2, hidden=(8, 6), **({} if on_policy else {"env": "Pendulum-v1"})
    )
    from purejaxpg import envs

    params = jax.eval_shape(agent.init, jax.random.key(0), config).params
    env = envs.from_config(config)
    together = 0 if on_policy else env.action_size
    critics = counts.net(config, env.obs_size + together, 1).weights * (2 if agent is sac else 1)
    outputs = (2 if agent is sac else 1) * env.action_size
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert sizes["critic"] == critics
    assert sizes["actor"] == counts.net(config, env.obs_size, outputs).weights


@pytest.mark.fast
def test_the_roof_is_the_slower_of_arithmetic_and_memory() -> None:
    count = counts.Count(flops=2e3, bytes=1e3, samples=1)
    assert counts.seconds_at_roof(count, gflops=2, gb_per_s=100) == pytest.approx(1e-6)
    assert counts.seconds_at_roof(count, gflops=200, gb_per_s=0.1) == pytest.approx(1e-5)
    measured = {"gflops": {"a": 5.0, "b": 7.0}, "gb_per_s": {"1000": 9.0, "2000": 3.0}}
    assert roof.gflops(measured) == 7.0
    assert [roof.gb_per_s(measured, size) for size in (10, 1000, 1001, 9999)] == [
        9.0,
        9.0,
        3.0,
        3.0,
    ]


# --- kernels -------------------------------------------------------------------------------------

PROGRAM = """
HloModule made_by_hand

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %a = f32[4]{0} add(%p, %p)
  ROOT %m = f32[4]{0} multiply(%a, %a)
}

%small_body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  ROOT %n = (s32[], f32[4]{0}) fusion(%s), kind=kLoop, calls=%fused
}

%small (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %w = (s32[], f32[4]{0}) while(%s.1), condition=%test, body=%small_body
}

%called (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %c = f32[4]{0} copy(%q)
  ROOT %d = f32[4]{0} dot(%c, %c), lhs_contracting_dims={0}
}

%test (s: (s32[], f32[4])) -> pred[] {
  %s.2 = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s.2), index=0
  %k = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %k), direction=LT
}

%inner (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s.3 = (s32[], f32[4]{0}) parameter(0)
  %f = f32[4]{0} fusion(%s.3), kind=kLoop, calls=%fused
  %g = f32[4]{0} call(%f), to_apply=%called
  %j = s32[] constant(1)
  ROOT %t = (s32[], /*index=1*/f32[4]{0}) tuple(%j, %g)
}

%update (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s.4 = (s32[], f32[4]{0}) parameter(0)
  %v = (s32[], f32[4]{0}) call(%s.4), to_apply=%small, frontend_attributes={xla_cpu_small_call="true"}
  %x = (s32[], f32[4]{0}) while(%v), condition=%test, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %y = (s32[], f32[4]{0}) conditional(%x, %x), branch_computations={%inner, %small_body}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a.1 = f32[4]{0} parameter(0)
  %b = f32[4]{0} sort(%a.1), to_apply=%called
  %z = (s32[], f32[4]{0}) while(%b), condition=%test, body=%update
  ROOT %r = f32[4]{0} get-tuple-element(%z), index=1
}
"""  # noqa: E501


@pytest.mark.fast
def test_kernels_of_a_program_written_by_hand() -> None:
    module = hlo.Module(PROGRAM)
    found = module.one_update()
    # The small call; three trips of fusion, copy and dot with four tests; the dearer branch, which
    # is fusion, copy and dot again; and one test of the outer loop.
    assert found.by_opcode == {"call": 1, "fusion": 4, "copy": 4, "dot": 4, "compare": 5}
    assert found.total == 18
    assert found.unknown_loops == 0
    whole = module.whole()
    assert whole.total == 18 + 1  # the sort before the loop
    assert whole.unknown_loops == 1


@pytest.mark.fast
def test_kernels_of_a_program_that_xla_compiled() -> None:
    """A segment as the sweep makes it: a loop of unknown length around one of known length."""

    def update(_: Any, x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 7, lambda _, y: jnp.sort(y)[::-1] @ y + 1.0, x)

    program = jax.jit(lambda count, x: lax.fori_loop(0, count, update, x))
    text = program.lower(jnp.int32(1), jnp.ones((64, 64))).compile().as_text()
    found = hlo.Module(text or "").one_update()
    assert found.by_opcode["sort"] == 7
    assert found.unknown_loops == 0
    assert found.total == sum(found.by_opcode.values()) >= 21


# --- cases ---------------------------------------------------------------------------------------


def asked(*words: str) -> list[cases.Case]:
    return cases.choose(cli.make_parser().parse_args(["bench", *words]), on_cpu=True)


@pytest.mark.fast
def test_lists_are_multiplied_and_flags_follow_their_case() -> None:
    words = ("--agents", "ppo", "a2c", "--num-agents", "1", "8", "--num-envs", "2", "4")
    found = asked(*words, "--flags", "xla_cpu_x=1")
    assert len(found) == 2 * 2 * 2 * 2
    assert [case.flag for case in found[:2]] == ["", "xla_cpu_x=1"]
    assert found[0].label == "ppo x 1 num_envs=2"
    assert len({case.name for case in found}) == len(found)


@pytest.mark.fast
def test_the_sets_hold_what_they_promise() -> None:
    full = asked("--full")
    assert {case.agent for case in full} == set(counts.KINDS)
    assert {case.num_agents for case in full} >= {1, 4096}
    assert {case.fields.get("num_envs") for case in full} >= {1, 8192}
    ppo_on_cartpole = {case.num_agents for case in asked("--accelerator") if not case.fields}
    assert ppo_on_cartpole >= {1, 64, 2048, 8192}
    for number in (1, 2048):
        flags = {case.flag for case in asked("--accelerator") if case.num_agents == number}
        assert flags == {"", *cases.CPU_FLAGS}
    names = [case.name for case in asked("--accelerator")]
    assert len(set(names)) == len(names)
    assert len(asked()) == 10
    for words in (["--accelerator", "--quick"], ["--full", "--quick"]):
        small = asked(*words)
        assert all(case.num_agents <= 2 and case.fields.get("num_envs", 1) <= 2 for case in small)
    assert len(small) == 7 * (2 + 2) + 2
    numbers = asked("--quick", "--num-agents", "1", "4", "--num-envs", "8")
    assert [(case.num_agents, case.fields["num_envs"]) for case in numbers] == [(1, 8), (4, 8)]
    assert all(case.num_agents <= 2 for case in asked("--quick", "--num-envs", "8"))


@pytest.mark.fast
def test_a_case_is_its_own_dictionary() -> None:
    case = cases.Case("ppo", 3, {"num_envs": 2}, rows=2, flag="xla_a=b", quick=True)
    again = cases.Case(**json.loads(json.dumps(case.as_dict())))
    assert again == case and again.name == case.name
    assert dataclasses.replace(case, rows=3).name != case.name


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num-agents", "0"], ["--num-agents", "1 or more", "0"]),
        (["--num-envs", "-2"], ["--num-envs", "-2"]),
        (["--rows", "0"], ["--rows", "0"]),
        (["--num-agents", "x"], ["--num-agents", "'x'"]),
        (["--agents", "poo"], ["'poo'", "'ppo'"]),
        (["--agents", "ddpg", "--env", "CartPole-v1"], ["ddpg CartPole-v1", "actions"]),
        (["--env", "CartPole-v2"], ["CartPole-v2", "CartPole-v1"]),
        (["--full", "--accelerator"], ["--full", "--accelerator"]),
        (["--full", "--agents", "ppo"], ["--full", "--agents"]),
        (["--flags", "fast=1"], ["--flags", "xla_", "'fast=1'"]),
        (["--num-agents", "1", "--devices", "0"], ["--devices", "0"]),
        (["--minutes", "0"], ["--minutes", "0"]),
        (["--agents", "rlhf.rloo", "--given", "reference"], ["--given", "NAME=SOURCE"]),
        (["--agents", "rlhf.rloo", "--given", "ref=./x"], ["'ref'", "reference"]),
        (["--agents", "rlhf.rloo", "--given", "reference=./x"], ["x is not a result directory"]),
        (["--given", "reference=./x"], ["'ppo' is given nothing", "--given"]),
        (["--full", "--given", "reference=./x"], ["--full", "--given"]),
        (["--agents", "rlhf.grp"], ["'rlhf.grp'", "'rlhf.grpo'"]),
        (["--agents", "rlhf.grpo", "--num-envs", "4"], ["rlhf.grpo", "num_envs"]),
        (["--agents", "rlhf.dpo", "--env", "CartPole-v1"], ["rlhf.dpo", "env"]),
        (["--agents", "rlhf.dpo", "--given", "pairs=no.jsonl"], ["pairs", "no.jsonl"]),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str],
    expected: list[str],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["bench", *words, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert all(word in printed.err for word in expected), printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.fast
def test_results_of_something_else_are_not_added_to(tmp_path: pathlib.Path) -> None:
    run.Bench(tmp_path, {"processor": "A"}).write()
    run.Bench(tmp_path, {"processor": "A"})
    with pytest.raises(InputError, match="another processor"):
        run.Bench(tmp_path, {"processor": "B"})
    (tmp_path / "bench.json").write_text("[1]")
    with pytest.raises(InputError, match="not a file of this benchmark"):
        run.Bench(tmp_path, {"processor": "A"})


# --- measuring -----------------------------------------------------------------------------------


def test_a_case_in_this_process() -> None:
    """Everything that a case measures but time, on one device, with a unit that is half padding."""
    case = cases.Case("a2c", 3, rows=2, quick=True)
    measured_here = child.measure(case, jax.devices()[:1])
    found = json.loads(json.dumps(measured_here, allow_nan=False))
    config = a2c.Config(**{**found["config"], "hidden": (8,), "env_kwargs": ()})
    assert (found["rows"], found["devices"], found["batches"]) == (2, 1, 2)
    seconds = found["update_s"]["median"] * 2
    assert found["env_steps_per_s"] == pytest.approx(3 * config.steps_per_update / seconds)
    assert found["agents_per_s"] == pytest.approx(3 / (seconds * config.num_updates))
    assert found["segments"] >= child.LEAST
    assert min(found[f"{part}_s"] for part in ("trace", "lower", "compile", "start")) > 0
    used = found["memory"]
    needed = used["temp"] + used["argument"] + used["output"] - used["alias"]
    assert used["per_agent"] == needed / 2 == used["per_device"] / 2
    # A transition: two observations of 4, action and reward, and two flags of a byte.
    assert used["data"] == config.steps_per_update * (8 * 4 + 2 * 4 + 2)
    assert used["beyond_data"] == used["per_agent"] - used["data"]
    # The loop over the steps of an environment is in the loop over updates.
    per_step = found["kernels"]["per_update"] / config.num_steps
    assert per_step > 3 and found["kernels"]["per_env_step"] == per_step / config.num_envs
    assert found["algorithm"]["samples"] == 1


def test_a_language_model_without_a_given_reference_gets_a_random_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.console import Console

    case = cases.Case("rlhf.rloo", 2, {"num_updates": 60}, rows=2, quick=True)
    measured_here = {"import_s": 1.0, **child.measure(case, jax.devices()[:1])}
    found = json.loads(json.dumps(measured_here, allow_nan=False))
    assert found["unit"] == "tokens" and found["config"]["task"] == "enumerable-3-3"
    assert found["env_steps_per_s"] == pytest.approx(2 * 8 * 3 / found["update_s"]["median"])
    assert found["algorithm"]["samples"] == found["algorithm"]["generated"] == 1
    assert found["tokens"]["generated_per_s"] == found["env_steps_per_s"]
    other = {**found, "algorithm": None, "tokens": None}
    results = {"a": {"case": case.as_dict(), **found}}
    results["b"] = {"case": {**case.as_dict(), "agent": "./mine.py"}, **other}
    show.tables({**data_of(), "results": results}, Console(width=200))
    printed = capsys.readouterr().out
    assert "tokens/s" in printed and "env-steps" not in printed
    assert "No share of the roof is known for ./mine.py: its operations are not" in printed
    assert " tokens/s, " in show.one_line(found)
    _, tokens = printed.split("generated/s")
    assert "rlhf.rloo x 2" in tokens and "mine.py x" not in tokens


@pytest.mark.fast
def test_the_table_of_tokens_has_the_memory_and_the_share_of_the_roof() -> None:
    import io

    from rich.console import Console

    own = {"agent": "rlhf.grpo", "num_agents": 1}
    result = {
        **measured(1, 1e5),
        "case": {**cases.Case("ppo", 1).as_dict(), **own},
        "unit": "tokens",
        "tokens": {"generated_per_s": 1e5, "trained_per_s": 4e5},
    }
    result["memory"] |= {"argument": 2e6, "temp": 5e6, "peak": 9e8}
    console = Console(file=io.StringIO(), width=120)
    show.tables(data_of(result, measured(4, 1e5)), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    (row,) = [line.split() for line in text.splitlines() if "9e+08" in line or "900M" in line]
    # 1e5 FLOP a token at 1e5 tokens/s are 10 of the roof's 100 GFLOP/s.
    assert row == ["rlhf.grpo", "x", "1", "100k", "400k", "10", "10.0", "7M", "900M"]


@pytest.mark.slow
def test_memory_hardly_grows_with_the_length_of_training() -> None:
    """Of a hundred times as many updates, a segment holds a sixtieth of the metrics."""
    used, updates = [], (cases.UPDATES, 100 * cases.UPDATES)
    for number in updates:
        fields = {"total_timesteps": number * 2 * 8}  # environments and steps of a quick case
        found = child.measure(cases.Case("a2c", 2, fields, rows=2, quick=True), jax.devices()[:1])
        assert found["updates"] == number
        used.append(found["memory"]["per_agent"])
    metrics = 6
    assert 0 < used[1] - used[0] < 2 * 4 * metrics * 99


def test_the_data_of_an_off_policy_agent_is_its_buffer() -> None:
    config = sac.Config(num_envs=2, replay_capacity=100, batch_size=8, learning_starts=16)
    rows = 100 * (3 * 4 + 4 + 4 + 1 + 3 * 4)
    assert child.bytes_of_data(sac, config) == rows + 8  # position and size


def test_a_result_is_cut_where_a_run_ends() -> None:
    """Schedules end with a run, so no update beyond it may be timed: it starts again."""

    class Unit:
        legs = (dataclasses.make_dataclass("Leg", ["stop"])(5),)

    class Stand:
        rows, segment_length = 1, 2
        done: list[tuple[int, int]] = []  # noqa: RUF012
        started = 0

        def inputs(self, *_: Any) -> None: ...

        def start(self, *_: Any) -> None:
            self.started += 1

        def segment(self, *arguments: Any) -> tuple[None, None, None]:
            self.done.append(arguments[-2:])
            return None, None, None

    stand: Any = Stand()
    found = child.train(stand, stand, [Unit()], enough=0.0)  # type: ignore[list-item]
    assert stand.done[:2] == [(1, 1), (2, 1)]
    assert all(first + count - 1 <= 5 for first, count in stand.done)
    assert found["segments"] == len(stand.done) - 2 == child.LEAST
    assert stand.started == 2


def test_the_roof_is_measured() -> None:
    found = roof.measure(jax.devices()[:1], quick=True)
    assert all(np.isfinite(value) and value > 0 for value in found["gflops"].values())
    assert set(found["gb_per_s"]) == {"262144", "1048576"}


# --- the whole command ---------------------------------------------------------------------------


def measured(number: int, rate: float, **changed: Any) -> dict[str, Any]:
    """A result as `child.measure` makes it."""
    case = cases.Case("ppo", number, changed.pop("fields", {}), flag=changed.pop("flag", ""))
    return {
        "case": case.as_dict(),
        **dict.fromkeys(("import_s", "trace_s", "lower_s", "compile_s", "start_s"), 1.0),
        "first_update_s": 0.5,
        "update_s": {"median": 0.2, "min": 0.1, "max": 0.4},
        "env_steps_per_s": rate,
        "agents_per_s": 2.0,
        "rows": 1,
        "devices": 1,
        "memory": {"per_agent": 5000.0, "beyond_data": 4000.0, "per_device": 5000},
        "kernels": {"per_update": 4175, "per_env_step": 12.0},
        "algorithm": {"flops": 1e5, "bytes": 1e3, "samples": 4},
        "config": {"num_envs": 4, **changed},
        "device_kind": "cpu",
        "paths": ["The values run in one kernel."],
    }


def data_of(*results: dict[str, Any]) -> dict[str, Any]:
    found = {"platform": "cpu", "device_kind": "cpu", "devices": 1}
    rates = {"gflops": {"a": 100.0}, "gb_per_s": {"1000000": 50.0}}
    machine = {"processor": "a processor"}
    named = {str(number): result for number, result in enumerate(results)}
    return {"roof": {**found, **rates}, "machine": machine, "results": named}


@pytest.mark.fast
def test_tables_say_the_share_of_the_roof_and_where_the_knee_is() -> None:
    import io

    from rich.console import Console

    results = [measured(n, rate) for n, rate in ((1, 1e5), (4, 3.8e5), (64, 4e5))]
    failed = {"case": cases.Case("sac", 4096).as_dict(), "error": "4096 rows do not fit."}
    console = Console(file=io.StringIO(), width=120)
    show.tables(data_of(*results, failed), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    # 1e5 FLOP at 100 GFLOP/s are 1 us, so the roof is a million steps; 1 kB at 50 GB/s are 20 ns.
    assert "40.0" in text and " 0.8 " in text and "4,175" in text and "200k-800k" in text
    assert "ppo: 4 agents reach 95% of the best (400k env-steps/s)." in text
    assert "sac x 4096: 4096 rows do not fit." in text
    assert "…" not in text


@pytest.mark.fast
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_on_a_gpu_it_is_said_how_loops_run(platform: str) -> None:
    import io

    from rich.console import Console

    data = data_of(measured(4, 1e5))
    data["roof"]["platform"] = platform
    console = Console(file=io.StringIO(), width=120)
    show.tables(data, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("ppo x 4: The values run in one kernel." in text) == (platform == "gpu")


@pytest.mark.fast
def test_the_figure_has_a_panel_for_each_axis(tmp_path: pathlib.Path) -> None:
    agents = [measured(n, 1e5 * n) for n in (1, 2)]
    assert show.figures(data_of(agents[0]), tmp_path) == []
    paths = show.figures(data_of(*agents), tmp_path)
    assert [path.name for path in paths] == ["bench.png", "bench.svg"]
    one = paths[1].read_text()
    assert "Throughput over agents" in one and "Throughput over environments" not in one
    envs = [measured(1, 1e5 * n, fields={"num_envs": n}, num_envs=n) for n in (8, 16)]
    flagged = [measured(n, 1.0, flag="xla_a=b") for n in (1, 2)]
    show.figures(data_of(*agents, *envs, *flagged), tmp_path)
    both = paths[1].read_text()
    assert "Throughput over environments" in both and "roof" in both and "xla_a" not in both


@pytest.mark.fast
def test_a_case_is_measured_once(tmp_path: pathlib.Path) -> None:
    bench = run.Bench(tmp_path, {})
    bench.data["roof"] = {"device_kind": "cpu"}
    wanted = [cases.Case("ppo", number) for number in (1, 2, 3)]
    asked: list[int] = []

    class Stand:
        def ask(self, task: Any, *_: Any) -> dict[str, Any]:
            asked.append(task["case"]["num_agents"])
            if asked == [1, 1, 2]:
                raise KeyboardInterrupt
            if task["only_compile"]:
                return {"trace_s": 0.5, "lower_s": 0.0, "compile_s": 0.25}
            failed = task["case"]["num_agents"] == 3
            return {"error": "no"} if failed else measured(asked[-1], 1.0)

    stand: Any = Stand()
    with pytest.raises(KeyboardInterrupt):
        run.measure(bench, stand, wanted, None, lambda _: None)
    kept = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert [result["again_s"] for result in kept.values()] == [0.75]
    again = run.Bench(tmp_path, {})
    run.measure(again, stand, wanted, None, lambda _: None)
    assert asked == [1, 1, 2, 2, 2, 3]
    said: list[str] = []
    run.measure(again, stand, wanted, 0.0, said.append)  # what failed is tried again, but not late
    assert said == ["Time is up: 1 case(s) are left to the same command."]


@pytest.mark.fast
def test_a_case_that_the_deadline_ends_has_not_failed(tmp_path: pathlib.Path) -> None:
    bench = run.Bench(tmp_path, {})
    bench.data["roof"] = {"device_kind": "cpu"}
    said: list[str] = []

    class Stand:
        def ask(self, task: Any, cache: str, flag: str, limit_s: float) -> dict[str, Any]:
            if task["case"]["num_agents"] == 1:
                return {"error": "no"}
            time.sleep(limit_s)
            return {"error": "took longer"}

    stand: Any = Stand()
    deadline = time.monotonic() + 0.2
    run.measure(bench, stand, [cases.Case("ppo", n) for n in (1, 2, 3)], deadline, said.append)
    assert [result["error"] for result in bench.data["results"].values()] == ["no"]
    assert said[-1] == "Time is up: 2 case(s) are left to the same command."


@pytest.mark.fast
def test_another_device_is_not_mixed_in(tmp_path: pathlib.Path) -> None:
    bench = run.Bench(tmp_path, {})
    bench.data["roof"] = {"device_kind": "TPU v9"}
    with pytest.raises(InputError, match="TPU v9"):
        bench.keep(cases.Case("ppo", 1), measured(1, 1.0))


@pytest.mark.fast
def test_a_process_that_fails_is_a_line() -> None:
    assert run.why(-9, "") == ("killed by signal 9 (9: mostly for want of memory): it said nothing")
    assert run.why(1, "Traceback\n  x\nValueError: y\n") == "ValueError: y"
    assert run.why(2, "mine.py, line 1, in x\n    y\nValueError: y\n").startswith("mine.py, line 1")


def test_an_agent_that_fails_is_bad_input_and_the_others_are_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(pathlib.Path(str(ppo.__file__)).read_text("utf-8"), "utf-8")
    complaint = "bad.py, line 3, in update\n    y\nValueError: y"

    def answered(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        task = json.loads(command[command.index("--task") + 1])
        if "bad.py" in str(task):
            return subprocess.CompletedProcess(command, 2, "", complaint)
        result = {**measured(1, 1.0), **task} if "case" in task else data_of()["roof"]
        return subprocess.CompletedProcess(command, 0, json.dumps(result), "")

    stand_in = types.SimpleNamespace(run=answered, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(run, "subprocess", stand_in)
    agents = ["--agents", str(bad), "ppo", "--num-agents", "1", "--quick"]
    assert cli.main(["bench", *agents, "--out", str(tmp_path / "out")]) == 2
    printed, last = capsys.readouterr()
    assert complaint in printed and printed.index("Speed") < printed.rindex(complaint)
    assert last.startswith("1 of 2 cases could not be measured") and last.endswith("bad.py x 1.\n")
    kept = json.loads((tmp_path / "out" / "bench.json").read_text())["results"].values()
    assert [result.get("refused") for result in kept] == [True, None]
    bad.write_text("x = 1\nimport nowhere_at_all\n", "utf-8")
    assert cli.main(["bench", *agents, "--out", str(tmp_path / "new")]) == 2
    assert "line 2, in <module>\n    import nowhere_at_all\n" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def words(out: pathlib.Path, *more: str) -> list[str]:
    given = ["--agents", "a2c", "--num-agents", "1", "--devices", "1", "--quick"]
    return ["bench", *given, "--out", str(out), *more]


def start(*given: str) -> subprocess.Popen[str]:
    command, pipe = [sys.executable, "-m", "purejaxpg.cli", *given], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def test_the_command_measures_and_resumes(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "a2c x 1" in printed and "roof" in printed
    kept = json.loads((tmp_path / "bench.json").read_text())
    (found,) = kept["results"].values()
    assert found["import_s"] > 0 and found["env_steps_per_s"] > 0
    assert found["kernels"]["per_update"] > 9
    assert {"processor", "cores", "date", "load_average_before"} <= set(kept["machine"])
    assert cli.main(words(tmp_path)) == 0
    assert "All of 1 cases have been measured." in capsys.readouterr().out
    assert json.loads((tmp_path / "bench.json").read_text()) == kept
    assert cli.main(words(tmp_path, "--quiet")) == 0
    quiet = capsys.readouterr().out
    assert "a2c x 1" in quiet and "All of" not in quiet


@pytest.mark.slow
def test_a_case_that_fails_is_a_row(tmp_path: pathlib.Path) -> None:
    process = start(*words(tmp_path, "--flags", "xla_there_is_no_such_flag=1"))
    printed, complaint = process.communicate()
    assert process.returncode == 0, complaint
    assert "a2c x 1 xla_there_is_no_such_flag=1: " in printed
    kept = json.loads((tmp_path / "bench.json").read_text())["results"].values()
    assert sorted("error" in result for result in kept) == [False, True]


@pytest.mark.slow
def test_ctrl_c_keeps_finished_cases(tmp_path: pathlib.Path) -> None:
    process = start(*words(tmp_path, "--num-agents", "1", "2"))
    path = tmp_path / "bench.json"
    while not (path.exists() and json.loads(path.read_text())["results"]):
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    printed, complaint = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted" in complaint
    assert "a2c x 1" in printed
    assert len(json.loads(path.read_text())["results"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("what", [[], ["--accelerator"]], ids=["default", "accelerator"])
def test_every_case_of_a_set_runs_small(tmp_path: pathlib.Path, what: list[str]) -> None:
    small = ("--quick", "--devices", "1", "--minutes", "60", "--out", str(tmp_path))
    process = start("bench", *what, *small)
    _, complaint = process.communicate()
    assert process.returncode == 0, complaint
    kept = json.loads((tmp_path / "bench.json").read_text())["results"].values()
    assert [result["error"] for result in kept if "error" in result] == []
    assert len(kept) >= 3
