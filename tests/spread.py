"""Train language models on meshes of 4 virtual CPU devices, and write down what came out.

`python spread.py OUT.npz` is a process of its own, because the tests' have one device each. Every
trainer runs on each of MESHES. Arrays are named "TRAINER MESH NAME", facts likewise.
"""

import json
import re
import sys
from typing import Any

import jax
import numpy as np
from jax import random

from purejaxpg import host, layout, optimizers
from purejaxpg.rlhf import data, dpo, grpo, tasks, transformer
from purejaxpg.sweep import compute
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import spec as specs

MESHES = {"1x1": (1, 1), "1x2": (1, 2), "2x2": (2, 2), "1x4": (1, 4)}
UPDATES = 3
TASK = tasks.make("sentiment")
SIZES: dict[str, Any] = {
    "width": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 128
}  # fmt: skip


def reference() -> transformer.Model:
    """A random model with as many words as a mesh divides, some of which are never written."""
    architecture = transformer.Architecture(
        vocab_size=len(TASK.words),
        context=TASK.prompt_length + TASK.completion_length,
        head_dim=8,
        positions="rotary",
        mlp="silu_gated",
        tied=False,
        suppressed=TASK.suppressed,
        **SIZES,
    )
    return transformer.init(random.key(1), architecture)


def pairs() -> data.Pairs:
    words = random.randint(random.key(2), (8, 2 * TASK.completion_length), 3, len(TASK.words))
    chosen, rejected = np.split(np.asarray(words, np.int32), 2, axis=1)
    return data.Pairs(np.asarray(TASK.prompts(random.key(3), 8, False)), chosen, rejected)


def alone(arrays: Any) -> Any:
    """Give arrays an axis of length 1, so that all rows share them."""
    return jax.tree.map(lambda x: np.asarray(x)[None], arrays)


def grpo_given() -> grpo.Given:
    return grpo.Given(alone(reference()))


# The base of dpo is frozen, with adapters beside it; the others train all parameters.
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "sft": ({**SIZES, "batch_size": 8}, None),
    "dpo": (
        {"batch_size": 4, "lora_rank": 2},
        lambda: dpo.Given(alone(reference()), alone(pairs())),
    ),
    "grpo": (
        {"batch_size": 8, "group_size": 4, "num_epochs": 2},
        grpo_given,
    ),
}


def spec(trainer: str, data: int, model: int) -> specs.Spec:
    config, given = CASES[trainer]
    raw = {
        "agent": f"rlhf.{trainer}", "seeds": 2, "eval_episodes": 2, "rows_per_device": 2,
        "config": {**config, "num_updates": UPDATES}, "mesh": {"data": data, "model": model},
    }  # fmt: skip
    return specs.from_dict(raw, "spread", given=given and given())


def trained(spec: specs.Spec) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Train both rows -> parameters and metrics, and facts."""
    backend = compute.Backend(spec, jax.devices()[: spec.mesh.size])
    round_ = plans.Round(tuple(plans.Leg(run, 0, UPDATES) for run in spec.runs))
    (group,) = backend.groups(0, round_, {})
    programs = backend.compile(group)
    inputs = backend.inputs(programs, group.units)
    states, at = backend.start(programs, inputs), np.zeros(2, np.int32)
    metrics: dict[str, np.ndarray] = {}
    for u in range(1, UPDATES + 1):  # a segment is one update
        states, at, now = backend.segment(programs, inputs, states, at, u, 1)
        metrics |= {f"{name} {u}": value for name, value in now.items()}
    metrics |= backend.score(programs, inputs, states, UPDATES)
    leaves = jax.tree_util.tree_leaves_with_path(states.params)
    params = {f"params{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
    facts = {
        "given": shares(inputs.shared),
        "state": shares(states, rows=2),
        "gathered": gathered(programs.segment.as_text()),
        "large": large(inputs.shared) + large(states, rows=2),
        "arguments": programs.segment.memory_analysis().argument_size_in_bytes,
        "temporary": programs.segment.memory_analysis().temp_size_in_bytes,
        **backend.facts(programs, group),
    }
    return {**params, **metrics}, facts


def large(tree: Any, rows: int = 1) -> int:
    """Return the bytes of all large matrices."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype == np.float32]
    return sum(leaf.nbytes for leaf in leaves if leaf.size >= 1024 * rows)


def shares(tree: Any, rows: int = 1) -> dict[str, float]:
    """Return the share of each large matrix that a device holds, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): leaf.addressable_shards[0].data.size / leaf.size
        for path, leaf in leaves
        if leaf.size >= 1024 * rows and leaf.dtype == np.float32
    }


def gathered(program: str) -> list[list[int]]:
    """Return the shapes of what a compiled program gathers, without axes of length 1."""
    found = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", program)
    return [[int(n) for n in shape.split(",") if n != "1"] for shape in found]


def called() -> dict[str, Any]:
    """Call the host from rows that are spread over 4 devices -> sums of a batch, and calls."""
    seen: list[tuple[int, ...]] = []

    def sums(x: Any) -> np.ndarray:
        seen.append(x.shape)
        return np.asarray(x).sum(-1)

    def row(x: jax.Array) -> Any:
        split = layout.over_batch(x)
        return host.call(sums, jax.ShapeDtypeStruct((4,), np.float32), split)

    mesh = compute.mesh_of(specs.Mesh(2, 2), jax.devices())
    rows = jax.sharding.PartitionSpec(compute.ROWS)
    over = jax.shard_map(
        jax.vmap(row), mesh=mesh, in_specs=rows, out_specs=rows, axis_names={compute.ROWS},
        check_vma=False,
    )  # fmt: skip
    found = jax.jit(over)(np.arange(24, dtype=np.float32).reshape(2, 4, 3))
    return {"sums": np.asarray(found).tolist(), "calls": seen}


def main(out: str) -> None:
    arrays: dict[str, np.ndarray] = {}
    facts: dict[str, Any] = {"called": called()}
    optimizers.VECTOR = 1000  # as with so many parameters that they are no vector
    for trainer in CASES:
        for name, mesh in MESHES.items():
            own, facts[f"{trainer} {name}"] = trained(spec(trainer, *mesh))
            arrays |= {f"{trainer} {name} {key}": value for key, value in own.items()}
    np.savez(out, facts=json.dumps(facts), **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
