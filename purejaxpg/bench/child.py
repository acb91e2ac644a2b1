"""One case, measured in a process of its own: compilation is cold, memory is the case's alone.

It times a sweep without its disk: the same programs, units and padding.
"""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from purejaxpg import config as configs
from purejaxpg import contract
from purejaxpg.bench import cases, counts, hlo, roof
from purejaxpg.sweep import compute, memory, xla
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs

ENOUGH_S, QUICK_ENOUGH_S = 2.0, 0.05  # of a measurement
SLICE_S = 0.25  # of one segment of it
LEAST, MOST = 3, 200  # segments


def run(task: dict[str, Any], devices: Sequence[jax.Device], began: float) -> dict[str, Any]:
    """Do what the parent process asks for.

    Args:
        task: {"roof": quick}, or {"case": a case, "only_compile": whether}.
        devices: to use.
        began: by `time.perf_counter`, when this process began to import.

    Returns:
        A result that JSON can hold.
    """
    import_s = time.perf_counter() - began
    if "roof" in task:
        return roof.measure(devices, task["roof"])
    case = cases.Case(**task["case"])
    try:
        return {"import_s": import_s, **measure(case, devices, task["only_compile"])}
    except memory.OutOfMemory as error:
        return {"error": f"{error}."}


def measure(
    case: cases.Case, devices: Sequence[jax.Device], only_compile: bool = False
) -> dict[str, Any]:
    """Compile a case and train it.

    Args:
        case: to be measured.
        devices: to use.
        only_compile: do not train, and return the seconds of compiling alone.

    Raises:
        OutOfMemory: it does not fit.
    """
    spec = case.sweep()
    (round_, *_) = searches.rehearse(searches.rounds(spec))
    backend = compute.Backend(spec, devices)
    (group,) = backend.groups(0, round_, {})
    programs = backend.compile(group)
    times = {
        "trace_s": programs.trace_s,
        "lower_s": programs.lower_s,
        "compile_s": programs.compile_s - programs.trace_s - programs.lower_s,
    }
    if only_compile:
        return times
    enough = QUICK_ENOUGH_S if case.quick else ENOUGH_S
    trained = train(backend, programs, group.units[: programs.units], enough)
    count = counts.count(case.agent, group.config, *spec.given.of_run(0))
    speed = rates(group, programs.units, trained["update_s"]["median"])
    return {
        **times,
        **trained,
        **speed,
        "tokens": tokens(case.agent, count, speed["env_steps_per_s"]),
        "memory": use_of_memory(spec, programs, group.config),
        "kernels": kernels(programs, group.config),
        "paths": [str(path) for path in programs.paths],
        "algorithm": count and vars(count),  # per step, if it is known
        "unit": contract.unit(spec.agent),
        "device_kind": devices[0].device_kind,
        "xla_options": xla.options(devices[0]),
        "config": plain(group.config),
    }


def train(
    backend: compute.Backend, programs: compute.Programs, batch: Sequence[plans.Unit], enough: float
) -> dict[str, Any]:
    """Train one batch of units, some updates a segment, and time it.

    Args:
        backend: that compiled the programs.
        programs: of the group.
        batch: its first units, one on each device.
        enough: seconds of segments after which to stop.

    Returns:
        Seconds: of the start, of the first update, and of an update in the segments after it.
    """
    inputs = backend.inputs(programs, batch)
    updates = batch[0].legs[0].stop
    zeros = np.zeros(programs.rows * len(batch), np.int32)

    def segment(states: Any, first: int, count: int) -> tuple[Any, float]:
        return roof.timed(lambda: backend.segment(programs, inputs, states, zeros, first, count)[0])

    states, start_s = roof.timed(lambda: backend.start(programs, inputs))
    states, first_s = segment(states, 1, 1)
    states, second_s = segment(states, 2, 1)
    count = max(1, min(programs.segment_length, int(SLICE_S / second_s)))
    times: list[float] = []
    done = 2
    while len(times) < LEAST or (sum(times) * count < enough and len(times) < MOST):
        if done + count > updates:  # never beyond the end of a run, where schedules end too
            states, done = backend.start(programs, inputs), 0
        states, seconds = segment(states, done + 1, count)
        times.append(seconds / count)
        done += count
    middle = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    timings = {"segments": len(times), "updates_per_segment": count}
    return {"start_s": start_s, "first_update_s": first_s, "update_s": middle, **timings}


def rates(group: plans.Group, devices: int, update_s: float) -> dict[str, Any]:
    """Return the speed of training the whole group, padding counted as lost.

    Args:
        group: all legs; only its first batch was trained.
        devices: units side by side.
        update_s: seconds of an update of one batch.
    """
    batches = math.ceil(len(group.units) / devices)
    steps = group.num_legs * group.config.steps_per_update
    seconds = batches * update_s
    return {
        "rows": group.rows,
        "devices": devices,
        "batches": batches,
        "updates": group.config.num_updates,
        "env_steps_per_s": steps / seconds,
        "agents_per_s": group.num_legs / (group.config.num_updates * seconds),
    }


def tokens(agent: str, count: counts.Count | None, per_s: float) -> dict[str, float] | None:
    """Return the tokens per second of a language model whose algorithm is known, or None.

    Args:
        agent: its name.
        count: what the algorithm takes per token of the trainer's unit.
        per_s: such tokens per second.

    Returns:
        `generated_per_s`: tokens of completions that were sampled, with their padding;
        `trained_per_s`: tokens that went through a gradient step, once for each time.
    """
    if count is None or agent not in counts.LANGUAGE:
        return None
    return {"generated_per_s": count.generated * per_s, "trained_per_s": count.samples * per_s}


def use_of_memory(spec: specs.Spec, programs: compute.Programs, config: Any) -> dict[str, Any]:
    """Return the bytes of the training program, as XLA plans them, and of the process.

    Args:
        spec: of the case.
        programs: compiled for it.
        config: of its only group.

    Returns:
        The parts of XLA's plan; `per_device`; `per_agent`, all that a row needs; `data`, its
        rollout or replay buffer; `beyond_data`, the rest of a row; `peak` of the process.
    """
    plan, needed = programs.segment.memory_analysis(), memory.needed(programs.segment)
    names = ("temp", "argument", "output", "alias")
    data = bytes_of_data(spec.agent, config, *spec.given.of_run(0))
    per_agent = needed / programs.rows
    stats = programs.sharding.mesh.devices.flat[0].memory_stats() or {}
    return {
        **{name: int(getattr(plan, f"{name}_size_in_bytes")) for name in names},
        "per_device": needed,
        "per_agent": per_agent,
        "data": data,
        "beyond_data": per_agent - data,
        "peak": stats.get("peak_bytes_in_use", memory.resident()[1]),
    }


def bytes_of_data(agent: Any, config: Any, *given: Any) -> int:
    """Return the bytes of an agent's rollout or replay buffer; 0 if it has neither."""
    key = jax.random.key(0)
    state = jax.eval_shape(agent.init, key, config, *given)
    data = getattr(state, "buffer", None)
    if data is None and hasattr(agent, "rollout") and hasattr(agent, "Transition"):
        result = jax.eval_shape(lambda k, s: agent.rollout(k, s, config), key, state)
        is_data = lambda x: isinstance(x, agent.Transition)  # noqa: E731
        data = [x for x in jax.tree.leaves(result, is_leaf=is_data) if is_data(x)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(data))


def plain(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON can hold it; JSON has no infinity."""
    infinite = (math.inf, -math.inf)
    fields = configs.to_dict(config).items()
    return {name: str(value) if value in infinite else value for name, value in fields}


def kernels(programs: compute.Programs, config: Any) -> dict[str, Any]:
    """Return how many kernels a device starts for an update of all its rows."""
    update = hlo.Module(programs.segment.as_text() or "").one_update()
    per_env_step = update.total / config.steps_per_update
    return {"per_update": update.total, "per_env_step": per_env_step, **vars(update)}
