"""Settings that have to stand before jax is imported, in this process and in those it starts.

They are environment variables and not `jax.config` calls, so that nothing here imports jax and
tests that start a fresh interpreter inherit them.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A plugin that imports jax first would make every line below a silent no-op.
assert "jax" not in sys.modules, "jax was imported before tests/conftest.py could set it up"

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
