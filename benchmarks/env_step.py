"""How much does the reset in every environment step cost, and can it be avoided?

Compares, in alternating pairs on one core, random actions under four ways to start new episodes:

    every    gymnax's own step: reset every environment at every step, then select
    cond     reset all N, but only in a step in which one of the N has ended
    shared   the same with one condition over all vmapped rows (custom_vmap flattens the batch)
    never    no reset at all: the lower bound, and wrong

Run: taskset -c 0 python benchmarks/env_step.py
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random

from purejaxpg import envs

STEPS = 64
CASES = [(1, 8), (16, 8), (1, 2048)]  # rows, environments per row
ENVS = ["CartPole-v1", "Breakout-MinAtar", "Asterix-MinAtar", "Seaquest-MinAtar"]


def stepped(env: envs.Env, key: jax.Array, state: Any, action: jax.Array) -> Any:
    """One step of N environments without any reset."""
    params = env.default_params
    keys = random.split(key, action.shape[0])
    obs, state, reward, terminated, _ = jax.vmap(env.inner.step_env, in_axes=(0, 0, 0, None))(
        keys, state, action, params
    )
    done = terminated | jax.vmap(env.inner.is_truncated, in_axes=(0, None))(state, params)
    return obs, state, reward, done


def fresh(env: envs.Env, key: jax.Array, n: int) -> Any:
    return jax.vmap(env.inner.reset_env, in_axes=(0, None))(
        random.split(key, n), env.default_params
    )


def select(done: jax.Array, new: Any, old: Any) -> Any:
    pick = lambda a, b: jnp.where(done.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
    return jax.tree.map(pick, new, old)


def never(env: envs.Env, key: jax.Array, state: Any, action: jax.Array) -> Any:
    obs, state, reward, _ = stepped(env, key, state, action)
    return obs, state, reward


def every(env: envs.Env, key: jax.Array, state: Any, action: jax.Array) -> Any:
    keys = random.split(key, action.shape[0])
    obs, state, reward, *_ = jax.vmap(env.inner.step, in_axes=(0, 0, 0, None))(
        keys, state, action, env.default_params
    )
    return obs, state, reward


def cond(env: envs.Env, key: jax.Array, state: Any, action: jax.Array) -> Any:
    key_step, key_reset = random.split(key)
    obs, state, reward, done = stepped(env, key_step, state, action)
    renew = lambda: select(done, fresh(env, key_reset, done.shape[0]), (obs, state))  # noqa: E731
    obs, state = lax.cond(done.any(), renew, lambda: (obs, state))
    return obs, state, reward


def shared(env: envs.Env, key: jax.Array, state: Any, action: jax.Array) -> Any:
    key_step, key_reset = random.split(key)
    obs, state, reward, done = stepped(env, key_step, state, action)
    keys = random.split(key_reset, done.shape[0])

    @jax.custom_batching.custom_vmap
    def renew(done: jax.Array, keys: jax.Array, old: Any) -> Any:
        reset = jax.vmap(env.inner.reset_env, in_axes=(0, None))
        return lax.cond(
            done.any(), lambda: select(done, reset(keys, env.default_params), old), lambda: old
        )

    @renew.def_vmap
    def rule(size: int, batched: list[Any], done: Any, keys: Any, old: Any) -> Any:
        args = jax.tree.map(
            lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape)),
            (done, keys, old),
            tuple(batched),
        )
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), args)
        out = renew(*flat)
        unflat = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return unflat, jax.tree.map(lambda _: True, out)

    obs, state = renew(done, keys, (obs, state))
    return obs, state, reward


def play(env: envs.Env, how: Callable[..., Any], rows: int, n: int) -> Callable[[], Any]:
    """Return a call that plays STEPS random steps in rows x n environments."""

    def row(key: jax.Array) -> Any:
        key_reset, key_steps = random.split(key)
        _, state = fresh(env, key_reset, n)

        def body(state: Any, key: jax.Array) -> Any:
            key_action, key_env = random.split(key)
            action = random.randint(key_action, (n,), 0, env.num_actions)
            obs, state, reward = how(env, key_env, state, action)
            return state, (reward.sum(), obs.sum())

        return lax.scan(body, state, random.split(key_steps, STEPS))[1]

    call = jax.jit(jax.vmap(row))
    keys = random.split(random.key(0), rows)
    jax.block_until_ready(call(keys))
    return lambda: jax.block_until_ready(call(keys))


def main() -> None:
    ways = [every, cond, never]
    print(f"{'environment':18s} {'rows x N':>10s}" + "".join(f"{w.__name__:>9s}" for w in ways))
    for name in sys.argv[1:] or ENVS:
        env = envs.make(name)
        for rows, n in CASES:
            calls = [play(env, way, rows, n) for way in ways]
            times: list[list[float]] = [[] for _ in ways]
            for _ in range(7):
                for call, kept in zip(calls, times, strict=True):
                    began = time.perf_counter()
                    call()
                    kept.append(time.perf_counter() - began)
            per_step = [statistics.median(t) / (rows * n * STEPS) * 1e9 for t in times]
            print(f"{name:18s} {f'{rows} x {n}':>10s}" + "".join(f"{t:7.0f}ns" for t in per_step))


if __name__ == "__main__":
    main()
