"""Finds out whether this process is one of several of a job, and lets jax put them together.

Three environment variables say so: JAX_NUM_PROCESSES, JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS
(HOST:PORT of process 0). Without them, what SLURM, Open MPI and TPU pods tell their processes does.
JAX_NUM_PROCESSES=1 keeps a process alone, whatever else is set.

Nothing here imports jax before it is known that there are several.
"""

import os
import socket
import threading
import time
from typing import Any

from purejaxpg import FaultError, InputError, text

INITIALISE_S = 300.0  # how long to wait for the last process to come up
HEARTBEAT_S = 60  # without a sign of life before a process counts as dead, and jax ends the others
SHUTDOWN_S = 30  # how long to wait for the last process to end

COUNT, INDEX, ADDRESS = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"


def how_many() -> int:
    """Return the number of processes of this job, as far as its environment tells.

    Raises:
        InputError: the variables contradict each other.
    """
    if COUNT in os.environ:
        return number(COUNT, 1)
    if INDEX in os.environ:
        raise InputError(f"{INDEX} is set, so {COUNT} must be set, too.")
    # The variables by which jax recognises Open MPI; without the first, it would not.
    if {"OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"} <= set(os.environ):
        return number("OMPI_COMM_WORLD_SIZE", 1)
    # Of the step, not of the job: in an sbatch script and in an salloc shell there is one process,
    # however many tasks the job may have.
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        return number("SLURM_STEP_NUM_TASKS", 1)
    return hosts_of_tpu_pod()


def hosts_of_tpu_pod() -> int:
    """Return the number of hosts of the TPU pod that this one belongs to; 1 where it does not."""
    if os.environ.get("JAX_PLATFORMS", "tpu") != "tpu":
        return 1
    from jax._src import clusters  # no public name tells it before jax is initialised

    try:
        for pod in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
            if pod.is_env_present():
                return pod.get_process_count()
    except Exception as error:  # of the metadata server: whatever `requests` raises
        raise FaultError(
            f"The hosts of this TPU pod are not known: {text.first_line(error)}."
        ) from error
    return 1


def number(name: str, least: int) -> int:
    """Return an environment variable as a whole number."""
    text = os.environ[name]
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name} must be a whole number, {least} or more, but is {text!r}.")
    return int(text)


def put_together(count: int) -> None:
    """Let jax make one job of `count` processes; must come before jax looks for devices.

    Raises:
        InputError: the variables contradict each other.
        FaultError: they do not find each other.
    """
    import jax

    # It would take SIGTERM for itself, and no snapshot would be written.
    jax.config.update("jax_enable_preemption_service", False)
    # Else compilers on GPUs wait for each other: for ever, where one fails or had kept the program.
    flag, flags = "--xla_gpu_shard_autotuning", os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=false".strip()
    arguments = described(count)
    found: list[BaseException | None] = []
    # In a thread, because jax aborts the process at a timeout of its own, and hears no signals.
    thread = threading.Thread(target=initialise, args=(arguments, found), daemon=True)
    thread.start()
    give_up = time.monotonic() + INITIALISE_S
    while thread.is_alive() and time.monotonic() < give_up:
        thread.join(0.1)
    if not found:
        raise FaultError(
            f"The {count} processes of this job did not all come up within {INITIALISE_S:.0f} s; "
            f"{COUNT}=1 lets a process work alone."
        )
    if found[0] is not None:
        reason = text.first_line(found[0])
        raise FaultError(f"jax cannot put {count} processes together: {reason}.") from found[0]
    if own_devices():  # else jax gives each of a node's processes the one device of its number
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")


def described(count: int) -> dict[str, Any]:
    """Return the arguments for jax.distributed.initialize."""
    if COUNT not in os.environ:
        return {"num_processes": count}
    for name in (INDEX, ADDRESS):
        if name not in os.environ:
            raise InputError(f"{COUNT} is {count}, so {name} must be set, too.")
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
    """Raise a FaultError where jax would end the process without a word."""
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
    except OSError as error:
        raise FaultError(f"Port {port} of {ADDRESS} cannot be used: {error.strerror}.") from error


def initialise(arguments: dict[str, Any], found: list[BaseException | None]) -> None:
    """Call jax, and put what it raised, or None, into `found`."""
    import jax

    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=int(INITIALISE_S) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
        found.append(None)
    except Exception as error:
        found.append(error)


def own_devices() -> bool:
    """Tell whether all the devices that this process sees are its own."""
    if "JAX_LOCAL_DEVICE_IDS" in os.environ or COUNT in os.environ:
        return False
    alone = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    tasks, nodes = (os.environ.get(f"SLURM_STEP_NUM_{what}") for what in ("TASKS", "NODES"))
    # SLURM may have bound a task to one device, which then is the first and the last one there.
    bound = os.environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    return alone or bound or (tasks is not None and tasks == nodes)
