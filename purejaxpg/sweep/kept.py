"""Compiled programs on disk, found again without tracing the Python that they were made from.

jax's own cache is asked with the lowered program, and tracing and lowering take longer than all
the rest of a second start. Here the question is asked beforehand: from the sources, versions,
settings and shapes that decide the program. Only where these can be told is it asked at all, which
is for the agents of this package in the environments of gymnax, on a CPU, in one process: a file of
one's own may depend on anything.

A file holds a hash and a pickle, and beside it in the user's cache stands jax's machine code. It is
nothing that anybody sends, and a file of another user is not read.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import pickle
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from purejaxpg import envs
from purejaxpg.sweep import memory
from purejaxpg.sweep import spec as specs

DIRECTORY = "PUREJAXPG_PROGRAMS"  # environment variable; unset: nothing is kept
PACKAGES = ("purejaxpg", "gymnax", "flax", "optax", "distrax", "chex", "jax", "jaxlib", "numpy")
HASH_BYTES = hashlib.sha256().digest_size


def path(
    spec: specs.Spec, config: Any, devices: Sequence[jax.Device], facts: Mapping[str, Any]
) -> Path | None:
    """Return the file of a group's programs, or None where none may be kept.

    Args:
        spec: its agent and number of episodes count.
        config: of any run of the group.
        devices: that compute it.
        facts: JSON-able; whatever else decides the programs.
    """
    directory = os.environ.get(DIRECTORY)
    own = spec.agent.__name__.startswith("purejaxpg.agents.") and envs.is_gymnax(config.env)
    alone = devices[0].platform == "cpu" and jax.process_count() == 1
    if not (directory and jax.config.values["jax_enable_compilation_cache"] and own and alone):
        return None
    key = {
        "agent": spec.agent.__name__,
        "eval_episodes": spec.eval_episodes,
        "devices": [device.id for device in devices],
        "all_devices": len(jax.devices()),
        "settings": {name: str(value) for name, value in jax.config.values.items()},
        "flags": os.environ.get("XLA_FLAGS", ""),
        "threads": os.environ.get("NPROC", ""),
        "machine": machine(),
        "sources": sources(),
        **facts,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(directory) / f"{digest[:32]}-programs"


@functools.cache
def machine() -> str:
    """Return what tells processors apart that do not run the same code."""
    lines = memory.read(Path("/proc/cpuinfo")).splitlines()
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    known = sorted({line for line in lines if line.split("\t")[0].strip() in wanted})
    return "\n".join([platform.platform(), *(known or [platform.node()])])


@functools.cache
def sources() -> str:
    """Return a hash of the size and time of every file that a program may be traced from."""
    found = hashlib.sha256(platform.python_version().encode())
    for file in files():
        stat = file.stat()
        found.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return found.hexdigest()


def files() -> Iterator[Path]:
    """Yield the files of PACKAGES in order, less those of this package that only call programs."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations if spec else None) or ():
            for root, folders, names in os.walk(place):
                folders.sort()
                if package == "purejaxpg" and Path(root).name in ("sweep", "bench"):
                    names = [name for name in names if name == "compute.py"]
                yield from (Path(root, n) for n in sorted(names) if n.endswith((".py", ".so")))


def load(file: Path, devices: Sequence[jax.Device]) -> list[jax.stages.Compiled] | None:
    """Read programs for `devices`; None where there are none, or damaged ones."""
    try:
        if hasattr(os, "getuid") and file.stat().st_uid != os.getuid():
            return None
        content = file.read_bytes()
        if hashlib.sha256(content[HASH_BYTES:]).digest() != content[:HASH_BYTES]:
            return None
        os.utime(file)  # those that nobody reads are deleted first
    except OSError:
        return None
    # Lowering is what makes jax find LAPACK; an orthogonal initialisation that was not lowered
    # here would call a null pointer.
    jax.jit(jnp.linalg.qr).lower(jax.ShapeDtypeStruct((1, 1), jnp.float32))
    read = functools.partial(
        serialize_executable.deserialize_and_load, execution_devices=list(devices)
    )
    try:
        return [read(*parts) for parts in pickle.loads(content[HASH_BYTES:])]
    except Exception:  # whatever XLA has against them, compiling them again is the answer
        return None


def save(file: Path, programs: Sequence[jax.stages.Compiled]) -> None:
    """Write programs that were compiled inside of `anew`; a disk that is full loses only them."""
    content = pickle.dumps([serialize_executable.serialize(program) for program in programs])
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(hashlib.sha256(content).digest() + content)
        os.replace(temporary, file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """Compile inside the block without jax's own cache.

    A program that came from there can be serialised, but not loaded a second time: half of its
    functions are missing then (jax 0.10 and 0.11, on the CPU).
    """
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it asks whether it is enabled only once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
