"""Settings made before jax is imported, the order of the files, and how programs are compiled.

Settings are environment variables and not `jax.config` calls, so that nothing here imports jax and
tests that start a fresh interpreter inherit them.
"""

import fnmatch
import gc
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A plugin that imports jax first would make every line below a silent no-op.
assert "jax" not in sys.modules, "jax was imported before tests/conftest.py could set it up"

# A shell lets its background jobs ignore Ctrl-C; so would the tests, and each process they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Results on CPU are compared bitwise; on an accelerator the same tests measure something else.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of the suite's time is compilation, and many tests compile the same programs. Entries are
# keyed by program, jax version and processor, so workers, runs and Pythons can share one directory.
# Loaded programs were measured to give the same bits as compiled ones. An entry that cannot be read
# costs a warning and a compilation, never a wrong result.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.environ.get("PUREJAXPG_TEST_CACHE", str(ROOT / ".jax_cache")),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Tracing makes many objects that live long, few of them in cycles: searching for cycles as often as
# Python does by itself took a tenth of the time of tests that mostly trace.
gc.set_threshold(100_000, 20, 100)

# The longest first, so that workers end together; the others follow in the order of their names.
FIRST = (
    "test_learning.py", "test_contract.py", "test_probes.py", "sweep/test_resume.py",
    "sweep/test_engine.py", "sweep/test_faults.py", "cluster/test_ray_executor.py",
    "cluster/test_distributed.py", "test_cli.py", "test_trainers.py", "test_bench.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    rank = {ROOT / "tests" / name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path, len(FIRST)))


def pytest_collection_finish() -> None:
    """Leave what is imported out of searches for cycles, and share MLIR contexts."""
    gc.collect()
    gc.freeze()
    if "jax" in sys.modules:
        share_contexts()


def share_contexts() -> None:
    """Lower the programs of a thread in one MLIR context: making one takes 4 ms.

    jax 0.11 does so itself, for ten programs at a time. A program that is compiled while another
    one is lowered gets a context of its own, because jax 0.10 would put it inside the other.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir import ir

    make, of_thread = mlir.make_ir_context, threading.local()

    def shared() -> Any:
        if ir.Context.current is not None:
            return make()
        if not hasattr(of_thread, "context"):
            of_thread.context = make()
        return of_thread.context

    mlir.make_ir_context = shared


# Every compiled program takes memory maps, and beyond 65,530 of them (Linux: vm.max_map_count) XLA
# crashes the process. A worker that runs half of the suite would get there; one module has 40,000.
MAPS = 20_000


@pytest.fixture(autouse=True)
def release_programs() -> Iterator[None]:
    """Clear compiled programs between two tests if there are too many."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        clear_programs()


def clear_programs() -> None:
    import jax

    if "tiny_sweep" in sys.modules:
        sys.modules["tiny_sweep"].BUILT.clear()
    jax.clear_caches()
    gc.collect()


# Modules whose statements hold however a program is optimised: see quick.py.
COMPILED_QUICKLY = (
    "agents/*", "benchmarks/*", "cluster/*", "docs/*", "fused/*", "kernels/*", "lab/*", "report/*",
    "rlhf/*", "theory/*",
    "sweep/test_engine.py", "sweep/test_files.py", "sweep/test_forecast.py",
    "sweep/test_growth.py", "sweep/test_session.py", "sweep/test_single.py",
    "sweep/test_stages.py", "sweep/test_store.py",
    "test_bench.py", "test_cli.py", "test_envs.py", "test_evaluate.py", "test_gymnasium.py",
    "test_hidden.py", "test_how_to.py", "test_libraries.py", "test_modules.py",
    "test_networks.py", "test_normalize.py", "test_own_envs.py", "test_probes.py",
    "test_promotion.py", "test_readme.py", "test_schedules.py", "test_streams.py",
    "test_trainers.py",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile the programs of some modules, and of processes they start, with few optimisations."""
    name = request.path.relative_to(ROOT / "tests").as_posix()
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPILED_QUICKLY):
        yield
        return
    import jax
    import quick
    from jax._src import compiler

    original = compiler.get_compile_options

    def options(*arguments: Any, **more: Any) -> Any:
        asked = more.pop("env_options_overrides", None) or {}
        return original(*arguments, env_options_overrides={**quick.OPTIONS, **asked}, **more)

    clear_programs()
    jax.numpy.zeros(()).block_until_ready()  # XLA has read the flags of this process after it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", options)
        patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {quick.FLAGS}".strip())
        yield
    clear_programs()


@pytest.fixture(params=[False, True], ids=["form of a CPU", "form of a GPU"])
def on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Trace functions in the form of each kind of device; both forms run here.

    jax remembers what it has traced, so a test has to wrap a function anew before it jits it.
    """
    from purejaxpg import backend

    monkeypatch.setattr(backend, "on_gpu", lambda: request.param)
    return bool(request.param)


def is_shipped(factory: Any) -> bool:
    return str(factory.__module__).startswith("purejaxpg.")


@pytest.fixture
def own_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[None]:
    """Forget the modules that a test names: a later one may give another file the same name."""
    from purejaxpg import envs, modules

    monkeypatch.setattr(sys, "path", list(sys.path))
    shipped = {name: made for name, made in envs._registered.items() if is_shipped(made[0])}
    monkeypatch.setattr(envs, "_registered", shipped)
    for name in ("_folders", "_imported"):
        monkeypatch.setattr(modules, name, [])
    monkeypatch.setattr(modules, "_named", {})
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]
    envs.make.cache_clear()


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return the directory of a finished successive halving."""
    import tiny_sweep

    from purejaxpg.sweep import spec as specs

    out = tmp_path_factory.mktemp("halved") / "sweep"
    tiny_sweep.run(specs.from_dict(tiny_sweep.HALVED, "tiny"), out)
    return out


@pytest.fixture(scope="module")
def halved_in_part(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return a halving that was interrupted: one unit of the last rung is still pending."""
    import tiny_sweep

    from purejaxpg.sweep import spec as specs

    out = tmp_path_factory.mktemp("halved") / "sweep"
    with pytest.raises(KeyboardInterrupt):
        tiny_sweep.run(specs.from_dict(tiny_sweep.HALVED, "tiny"), out, stop_after=5)
    return out
