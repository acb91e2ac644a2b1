"""XLA options under which a program compiles in a quarter of the time and runs slower.

OPTIONS are for statements that hold however a program is optimised. Never for tests of learning, of
memory, or of bits that a user's programs promise: those compile as for users, or nearly (SOMEWHAT).
"""

import importlib.metadata
from typing import Any

OPTIONS: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    # Splitting a program into parts takes more time than it saves, and so do these passes.
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_disable_hlo_passes": "simplify-while-loops,while-loop-invariant-code-motion",
}
# A user's options, for a statement that depends on them in a module that is compiled quickly.
AS_FOR_USERS: dict[str, Any] = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
    "xla_disable_hlo_passes": "",
}
if importlib.metadata.version("jax") >= "0.11":  # whose XLA has no such option any more
    for options in (OPTIONS, AS_FOR_USERS):
        del options["xla_cpu_use_fusion_emitters"]
# For a program that runs long enough to make up for a part of its compilation.
SOMEWHAT = {
    **AS_FOR_USERS, "xla_backend_optimization_level": 1, "xla_cpu_parallel_codegen_split_count": 1
}  # fmt: skip
# For the memory of a program, which is planned before LLVM writes its code.
PLANNED = {
    **AS_FOR_USERS, "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True
}  # fmt: skip
# OPTIONS for a process of its own, as XLA_FLAGS.
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
