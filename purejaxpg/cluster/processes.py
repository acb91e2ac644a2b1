"""Detect whether this process is one of several of a job, and connect them.

Three environment variables describe a job: JAX_NUM_PROCESSES, JAX_PROCESS_ID and
JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0). Without them, the variables of SLURM, Open MPI and
TPU pods are used. JAX_NUM_PROCESSES=1 makes a process run alone in any case.

**Experimental**: this module uses private names of jax and was never run on a pod. It does not
import jax unless there are several processes.
"""

import os
import socket
import threading
import time
from typing import Any

from purejaxpg import FaultError, InputError, text

INITIALISE_S = 300.0  # time for all processes to start
HEARTBEAT_S = 60  # a process without a heartbeat for this long is dead, and jax ends the others
SHUTDOWN_S = 30  # time for all processes to end

COUNT, INDEX, ADDRESS = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"


def how_many() -> int:
    """Return the number of processes of this job according to its environment.

    Raises:
        InputError: the variables contradict each other.
    """
    if COUNT in os.environ:
        return number(COUNT, 1)
    if INDEX in os.environ:
        raise InputError(f"{INDEX} is set, so {COUNT} must be set too.")
    # jax recognises Open MPI only by the first of these variables.
    if {"OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"} <= set(os.environ):
        return number("OMPI_COMM_WORLD_SIZE", 1)
    # The step's tasks, not the job's: an sbatch script or an salloc shell is a single process.
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        return number("SLURM_STEP_NUM_TASKS", 1)
    return hosts_of_tpu_pod()


def hosts_of_tpu_pod() -> int:
    """Return the number of hosts of this TPU pod; 1 outside a pod."""
    if os.environ.get("JAX_PLATFORMS", "tpu") != "tpu":
        return 1
    from jax._src import clusters  # no public name before jax is initialised

    try:
        for pod in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
            if pod.is_env_present():
                return pod.get_process_count()
    except Exception as error:  # any exception that `requests` raises for the metadata server
        raise FaultError(
            f"The number of hosts of this TPU pod is unknown: {text.first_line(error)}."
        ) from error
    return 1


def number(name: str, least: int) -> int:
    """Return an environment variable as a whole number."""
    text = os.environ[name]
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name} must be a whole number, {least} or more, but is {text!r}.")
    return int(text)


def connect(count: int) -> None:
    """Make one job of `count` processes; call this before jax looks for devices.

    Raises:
        InputError: the variables contradict each other.
        FaultError: the processes do not find each other.
    """
    import jax

    # This service would handle SIGTERM itself, and no snapshot would be written.
    jax.config.update("jax_enable_preemption_service", False)
    # Otherwise compilers on GPUs wait for each other, forever if one fails or has a cached program.
    flag, flags = "--xla_gpu_shard_autotuning", os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=false".strip()
    arguments = initialise_arguments(count)
    outcome: list[BaseException | None] = []
    # In a thread, because jax aborts the process at its own timeout and ignores signals.
    thread = threading.Thread(target=initialise, args=(arguments, outcome), daemon=True)
    thread.start()
    give_up = time.monotonic() + INITIALISE_S
    while thread.is_alive() and time.monotonic() < give_up:
        thread.join(0.1)
    if not outcome:
        raise FaultError(
            f"The {count} processes of this job did not all start within {INITIALISE_S:.0f} s; "
            f"{COUNT}=1 lets a process run alone."
        )
    if outcome[0] is not None:
        reason = text.first_line(outcome[0])
        raise FaultError(f"jax cannot connect {count} processes: {reason}.") from outcome[0]
    if own_devices():  # otherwise jax gives each process of a node only the device of its number
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")


def initialise_arguments(count: int) -> dict[str, Any]:
    """Return the arguments for jax.distributed.initialize."""
    if COUNT not in os.environ:
        return {"num_processes": count}
    for name in (INDEX, ADDRESS):
        if name not in os.environ:
            raise InputError(f"{COUNT} is {count}, so {name} must be set too.")
    index, (host, _, port) = number(INDEX, 0), os.environ[ADDRESS].rpartition(":")
    if index >= count:
        raise InputError(f"{INDEX} must be less than {COUNT}, {count}, but is {index}.")
    if not host or not port.isdecimal():
        raise InputError(f"{ADDRESS} must be HOST:PORT, but is {os.environ[ADDRESS]!r}.")
    if index == 0:
        refuse_used_port(int(port))
    return {
        "num_processes": count,
        "process_id": index,
        "coordinator_address": f"{host}:{port}",
        "cluster_detection_method": "deactivate",
    }


def refuse_used_port(port: int) -> None:
    """Raise a FaultError if the port is used; jax would end the process without a message."""
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
    except OSError as error:
        raise FaultError(f"Port {port} of {ADDRESS} cannot be used: {error.strerror}.") from error


def initialise(arguments: dict[str, Any], outcome: list[BaseException | None]) -> None:
    """Initialise jax, and append the exception it raised, or None, to `outcome`."""
    import jax

    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=int(INITIALISE_S) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
        outcome.append(None)
    except Exception as error:
        outcome.append(error)


def own_devices() -> bool:
    """Return whether this process owns all the devices it sees."""
    if "JAX_LOCAL_DEVICE_IDS" in os.environ or COUNT in os.environ:
        return False
    alone = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    tasks, nodes = (os.environ.get(f"SLURM_STEP_NUM_{unit}") for unit in ("TASKS", "NODES"))
    # SLURM may have bound a task to one device, which is then the only visible one.
    bound = os.environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    return alone or bound or (tasks is not None and tasks == nodes)
