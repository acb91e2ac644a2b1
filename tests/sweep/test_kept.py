"""Programs kept on disk: found, never in place of others, and the same to the bit."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import chex
import distrax
import flax
import gymnax
import jax
import numpy as np
import optax
import pytest
from tiny_sweep import TINY, swept

from purejaxpg import envs
from purejaxpg.agents import ppo
from purejaxpg.sweep import compute, kept
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs


@pytest.fixture(autouse=True)
def directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv(kept.DIRECTORY, str(tmp_path))
    return tmp_path


def compiled(spec: specs.Spec, devices: int = 1) -> tuple[compute.Backend, Any, Any]:
    backend = compute.Backend(spec, jax.devices()[:devices])
    (group,) = backend.groups(0, next(searches.rounds(spec)), {})
    return backend, group, backend.compile(group)


def outcome(backend: compute.Backend, group: Any, programs: Any) -> list[np.ndarray]:
    """Return everything that a start, two updates and an evaluation give."""
    inputs = backend.inputs(programs, group.units[: programs.units])
    states = backend.start(programs, inputs)
    at = np.zeros(programs.rows * programs.units, np.int32)
    states, at, metrics = backend.segment(programs, inputs, states, at, 1, 1)
    scores = backend.score(programs, inputs, states, 1)
    return [np.asarray(x) for x in jax.tree.leaves((states, at, metrics, scores))]


def never(*arguments: Any) -> Any:
    raise AssertionError("traced")


def path(spec: specs.Spec, **facts: Any) -> pathlib.Path | None:
    return kept.path(spec, spec.runs[0].config, jax.devices()[:1], facts)


# --- found --------------------------------------------------------------------------------------


@pytest.mark.fast
def test_programs_are_found_untraced_and_give_the_same_bits(
    directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where jax's own cache is full of them already, too, as it is here from the second run on."""
    first = outcome(*compiled(swept()))
    (file,) = directory.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(compute, "trace", never)
        backend, group, programs = compiled(swept())
    assert (programs.trace_s, programs.lower_s) == (0.0, 0.0)
    assert programs.bytes_per_device > 0
    for one, other in zip(first, outcome(backend, group, programs), strict=True):
        np.testing.assert_array_equal(one, other)
    assert list(directory.iterdir()) == [file]

    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    strange = hashlib.sha256(b"no pickle").digest() + b"no pickle"
    for damaged in (flipped, whole[: len(whole) // 2], b"", b"x" * 10, strange):
        file.write_bytes(damaged)
        assert kept.load(file, jax.devices()[:1]) is None
    _, _, programs = compiled(swept())
    assert programs.trace_s > 0
    assert kept.load(file, jax.devices()[:1]) is not None  # written again

    (directory / "file").write_text("")
    kept.save(directory / "file" / "below", [programs.start])  # loses only that


SECOND_PROCESS = """
import json, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
sys.path.insert(0, sys.argv[1])
import test_kept
from purejaxpg.sweep import compute
from tiny_sweep import swept
if sys.argv[2] == "second":
    compute.trace = test_kept.never
leaves = test_kept.outcome(*test_kept.compiled(swept(), devices=2))
print(json.dumps([leaf.astype(float).ravel().tolist() for leaf in leaves]))
"""


def test_another_process_finds_them_for_two_devices() -> None:
    """A process that lowers nothing has no LAPACK, unless loading sees to it."""
    here = str(pathlib.Path(__file__).parent)
    found = []
    for which in ("first", "second"):
        command = [sys.executable, "-c", SECOND_PROCESS, here, which]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]


# --- not found ----------------------------------------------------------------------------------


@pytest.mark.fast
def test_what_decides_a_program_decides_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = path(swept(), rows=2)
    assert plain == path(swept(gamma=[0.5]), rows=2)  # traced: the same program
    found = {
        "plain": plain,
        "rows": path(swept(), rows=3),
        "devices": kept.path(swept(), swept().runs[0].config, 2 * jax.devices()[:1], {"rows": 2}),
        "episodes": path(specs.from_dict({**TINY, "eval_episodes": 5}, "tiny"), rows=2),
        "agent": path(specs.from_dict({**TINY, "agent": "a2c", "config": {}, "sweep": {}}, "tiny")),
    }
    for name, value in (("XLA_FLAGS", "--xla_some=true"), ("NPROC", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            found[name] = path(swept(), rows=2)
    before = jax.config.values["jax_default_matmul_precision"]
    jax.config.update("jax_default_matmul_precision", "highest")
    found["a setting"] = path(swept(), rows=2)
    jax.config.update("jax_default_matmul_precision", before)
    for name in ("machine", "sources"):
        with monkeypatch.context() as patch:
            patch.setattr(kept, name, lambda: "other")
            found[name] = path(swept(), rows=2)
    assert None not in found.values()
    assert len(set(found.values())) == len(found)


@pytest.mark.fast
def test_a_change_in_any_file_of_a_package_counts(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "somewhere" / "edited_by_hand"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    module = package / "inner" / "module.py"
    module.write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(kept, "PACKAGES", ("edited_by_hand",))

    def now() -> str:
        return kept.sources.__wrapped__()

    before = now()
    assert before == now()
    os.utime(module, (1e9, 1e9))
    touched = now()
    module.write_text("x = 12\n")
    os.utime(module, (1e9, 1e9))
    assert len({before, touched, now()}) == 3


@pytest.mark.fast
def test_the_files_that_count_are_those_that_programs_are_traced_from() -> None:
    found = {str(file) for file in kept.files()}
    package = pathlib.Path(kept.__file__).parent.parent
    counted = ("agents/ppo.py", "kernels/losses.py", "envs.py", "evaluate.py", "sweep/compute.py")
    assert {str(package / name) for name in counted} <= found
    assert not {str(package / name) for name in ("sweep/page.py", "bench/run.py")} & found
    for module in (gymnax, flax, optax, distrax, chex, jax, np):
        assert module.__file__ in found
    assert any("jaxlib" in file and file.endswith(".so") for file in found)
    assert kept.machine()


@pytest.mark.fast
@pytest.mark.parametrize("why", ["agent", "environment", "directory", "switched off"])
def test_nothing_is_kept_of_what_may_depend_on_anything(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec: Any = swept()
    assert path(spec) is not None
    if why == "agent":
        own = types.ModuleType("my_agent")
        own.__dict__.update({k: v for k, v in vars(ppo).items() if not k.startswith("__")})
        spec = types.SimpleNamespace(agent=own, runs=spec.runs, eval_episodes=4)
    elif why == "environment":  # even under the name of one of gymnax
        monkeypatch.setitem(envs._factories, "CartPole-v1", never)
    elif why == "directory":
        monkeypatch.delenv(kept.DIRECTORY)
    else:
        with kept.anew():
            assert path(spec) is None
        return
    assert path(spec) is None


@pytest.mark.fast
def test_jaxs_own_cache_is_on_again_afterwards() -> None:
    assert jax.config.values["jax_enable_compilation_cache"]
    with pytest.raises(KeyError), kept.anew():
        assert not jax.config.values["jax_enable_compilation_cache"]
        raise KeyError
    assert jax.config.values["jax_enable_compilation_cache"]
