"""How much memory there is, and that a process takes what XLA plans."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from purejaxpg.sweep import memory


@pytest.mark.fast
def test_the_smallest_limit_counts(tmp_path: pathlib.Path) -> None:
    proc, group = tmp_path / "proc", tmp_path / "cgroup"
    (group / "memory").mkdir(parents=True)
    proc.mkdir()
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1000 kB\n")
    assert memory.free_on_host(proc, group) == 1000 * 1024
    (group / "memory.max").write_text("500000\n")
    (group / "memory.current").write_text("200000\n")
    assert memory.free_on_host(proc, group) == 300000
    (group / "memory.max").write_text("max\n")
    assert memory.free_on_host(proc, group) == 1000 * 1024
    (group / "memory" / "memory.limit_in_bytes").write_text("70000")
    (group / "memory" / "memory.usage_in_bytes").write_text("80000")
    assert memory.free_on_host(proc, group) == 0
    assert memory.free_on_host(tmp_path / "absent", tmp_path / "absent") == 2**62


@pytest.mark.fast
def test_needed_counts_temporaries_and_shared_buffers_once() -> None:
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)

    def double(x: jax.Array) -> jax.Array:
        return 2.0 * x

    plain = jax.jit(double).lower(x).compile()
    donated = jax.jit(double, donate_argnums=0).lower(x).compile()
    assert memory.needed(plain) == 2 * 4096
    assert memory.needed(donated) == 4096

    def square(x: jax.Array) -> jax.Array:  # a matrix of four megabytes on the way
        return jnp.sin(x[:, None] * x[None, :]) @ x

    assert memory.needed(jax.jit(square).lower(x).compile()) >= 1024 * 1024 * 4


MEASURE = """
import ctypes, gc, sys
import numpy as np
from purejaxpg.sweep.session import find_devices
devices = find_devices(2)
from purejaxpg.sweep import compute, memory, search, spec
fields = {"num_envs": 64, "num_steps": 128, "total_timesteps": 64 * 128 * 4}
raw = {"agent": "ppo", "seeds": 32, "rows_per_device": 16, "eval_episodes": 8, "config": fields}
study = spec.from_dict(raw, "study")
backend = compute.Backend(study, devices)
(round_,) = search.rehearse(search.rounds(study))
(group,) = backend.groups(0, round_, {})
programs = backend.compile(group)

def work():
    inputs = backend.inputs(programs, group.units)
    states, at = backend.start(programs, inputs), np.zeros(32, np.int32)
    for u in (1, 2):
        states, at, _ = backend.segment(programs, inputs, states, at, u, 1)
    backend.score(programs, inputs, states, 2)

work()  # a warm process: thread pools and code are there
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
before, _ = memory.resident()
memory.forget_peak()
work()
print((memory.resident()[1] - before) / (programs.bytes_per_device * programs.units))
"""


def test_a_unit_takes_what_xla_plans(tmp_path: pathlib.Path) -> None:
    """The peak of a warm process rises by the predicted bytes, give or take 15%."""
    if memory.resident()[0] == 0 or not memory.forget_peak():
        pytest.skip("the system does not tell a process's peak of memory")
    root = str(pathlib.Path(memory.__file__).resolve().parents[2])
    found = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert 0.85 <= float(found.stdout) <= 1.15
