"""One sweep on the devices of several processes, connected by `processes.py`.

**Experimental**: this module uses private names of jax and was never run on a pod.

Process 0 leads: it plans, keeps the ledger, commits and prints. The others follow: they repeat its
calls on the same programs, each for the rows on its own devices.

Rows are independent, so processes do not communicate while a program runs. Between programs they
send calls, as plain values, and rows of arrays, as bytes, through the key-value store of jax's
coordination service. Every call is answered, also if it fails, so no process waits for one that has
stopped. If a process dies without an answer, jax ends the others.
"""

import collections
import contextlib
import functools
import json
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxpg import FaultError, InputError, checkpoint, signals
from purejaxpg import config as configs
from purejaxpg.cluster import processes, remote
from purejaxpg.sweep import compute, engine
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import spec as specs

POLL_MS = 1000  # signals are handled between two polls
PART_BYTES = 4 * 2**20  # of a message; values of hundreds of MB slowed the service down
LEADER = 0

Message = tuple[dict[str, Any], list[np.ndarray]]  # plain values, and arrays beside them


class Mail:
    """Messages between processes, each received once and in order."""

    def __init__(self) -> None:
        """Use the service started by jax.distributed."""
        from jax._src import distributed  # the store has no public name

        self.client: Any = distributed.global_state.client
        self.me = jax.process_index()
        self.count: collections.Counter[str] = collections.Counter()

    def send(self, to: int, values: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Send a message.

        Args:
            to: index of the receiving process.
            values: plain values by name.
            arrays: sent beside them, as bytes.
        """
        key = self.key(self.me, to)
        arrays = [np.ascontiguousarray(x) for x in arrays]
        content = b"".join(x.tobytes() for x in arrays)
        parts = [content[i : i + PART_BYTES] for i in range(0, len(content), PART_BYTES)]
        shapes = [[x.dtype.name, list(x.shape)] for x in arrays]
        head = {"values": values, "arrays": shapes, "parts": len(parts)}
        self.client.key_value_set_bytes(key, json.dumps(head).encode())
        for i, part in enumerate(parts):
            self.client.key_value_set_bytes(f"{key}.{i}", part)

    def receive(self, sender: int) -> Message:
        """Wait for the next message of another process.

        Raises:
            FaultError: the service has ended.
        """
        key = self.key(sender, self.me)
        head = json.loads(self.take(key))
        content, at, arrays = b"".join(self.take(f"{key}.{i}") for i in range(head["parts"])), 0, []
        for name, shape in head["arrays"]:
            dtype = jnp.dtype(name)
            array = np.frombuffer(content, dtype, int(np.prod(shape)), at).reshape(shape)
            at += array.nbytes
            arrays.append(array)
        return head["values"], arrays

    def key(self, sender: int, to: int) -> str:
        """Return the name of the next message."""
        pair = f"purejaxpg/{sender}-{to}"
        self.count[pair] += 1
        return f"{pair}/{self.count[pair]}"

    def take(self, key: str) -> bytes:
        """Wait for a value and remove it."""
        while True:
            try:
                value = self.client.blocking_key_value_get_bytes(key, POLL_MS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise FaultError(
                        "A process of this job has ended; finished units are kept."
                    ) from error
                continue
            self.client.key_value_delete(key)  # deletes names below it too, of which there are none
            return value


def spans(devices: Sequence[jax.Device]) -> dict[int, slice]:
    """Return the span of each process in `devices`, which are sorted by process."""
    owners = [device.process_index for device in devices]
    return {p: slice(owners.index(p), owners.index(p) + owners.count(p)) for p in owners}


# -------------------------------------------------------------------------------------- process 0


@contextlib.contextmanager
def leading(status_of: Callable[[BaseException], int]) -> Iterator[Mail]:
    """Stop the followers after the block, with the exit status of its exception."""
    mail, status = Mail(), 0
    try:
        yield mail
    except BaseException as error:
        status = status_of(error)
        raise
    finally:
        for process in range(1, jax.process_count()):
            mail.send(process, {"call": "end", "status": status})


class Leader(compute.Backend):
    """A backend on the devices of all processes: calls itself and the followers."""

    def __init__(self, spec: specs.Spec, devices: Sequence[jax.Device], mail: Mail) -> None:
        """Compute the runs of `spec` on `devices`, those of this process first.

        Raises:
            InputError: a follower has another sweep, other versions or other devices.
        """
        super().__init__(spec, devices)
        self.mail = mail
        kind = self.devices[0].device_kind
        hello = {"identity": plain(spec.identity), "versions": self.versions(), "kind": kind}
        self.call_all(self.devices, 0, {"call": "hello", **hello})

    def call_all(
        self,
        devices: Sequence[jax.Device],
        rows: int,
        values: dict[str, Any],
        arrays: Sequence[np.ndarray] = (),
        own: Callable[[], Any] = lambda: None,
    ) -> tuple[Any, list[Message]]:
        """Make a call in all processes that have one of `devices`.

        Args:
            devices: of the program.
            rows: on each device.
            values: the call's name and arguments.
            arrays: leaves [all rows, ...]; each follower gets its rows.
            own: this process's part of the call.

        Returns:
            The result of `own`, and the followers' answers.

        Raises:
            Exception: the failure of one process; OutOfMemory only if there is no other.
        """
        others = {p: span for p, span in spans(devices).items() if p != LEADER}
        for p, span in others.items():
            part = slice(span.start * rows, span.stop * rows)
            self.mail.send(p, values, [x[part] for x in arrays])
        result, failures = None, list[Exception]()
        try:
            result = own()
        except remote.EXPECTED as error:
            failures.append(error)
        answers = [self.mail.receive(p) for p in others]
        failed = [answer["failure"] for answer, _ in answers if "failure" in answer]
        failures += [remote.as_exception(*failure) for failure in failed]
        if failures:
            raise min(failures, key=lambda error: getattr(error, "fits", -1))
        for number in {answer["signal"] for answer, _ in answers} - {0}:
            signals.deliver(number)
        return result, answers

    def on(self, programs: compute.Programs) -> tuple[list[jax.Device], int, int]:
        """Return the devices of a program, the rows on each and those of this process."""
        devices = list(programs.sharding.mesh.devices.flat)
        return devices, programs.rows, programs.rows * spans(devices)[LEADER].stop

    def compile(self, group: plans.Group) -> compute.Programs:
        """Compile the programs of a group in all processes."""
        used = self.used(group)
        config, units = self.to_dict(group.config), len(used)
        values = {"signature": group.signature, "rows": group.rows, "units": units}
        call = {"call": "compile", "config": config, **values}
        own = functools.partial(super().compile, group)
        return self.call_all(used, group.rows, call, own=own)[0]

    def inputs(self, programs: compute.Programs, batch: Sequence[plans.Unit]) -> compute.Inputs:
        """Return the inputs of this process's rows, and send the other processes theirs."""
        devices, rows, own = self.on(programs)
        inputs = compute.inputs_of(self.spec.given, batch, rows)
        self.call_all(devices, rows, {"call": "inputs"}, jax.tree.leaves(inputs))
        return self.placed(programs, jax.tree.map(lambda x: x[:own], inputs))

    def start(self, programs: compute.Programs, inputs: compute.Inputs) -> Any:
        """Initialise every row -> states."""
        devices, rows, _ = self.on(programs)
        own = functools.partial(super().start, programs, inputs)
        return self.call_all(devices, rows, {"call": "start"}, own=own)[0]

    def segment(
        self,
        programs: compute.Programs,
        inputs: compute.Inputs,
        states: Any,
        diverged_at: np.ndarray,
        first: int,
        count: int,
    ) -> tuple[Any, np.ndarray, dict[str, np.ndarray]]:
        """Do updates first, ..., first + count - 1 -> states, diverged_at, metrics."""
        devices, rows, n = self.on(programs)
        call = {"call": "segment", "first": first, "count": count}
        own = functools.partial(
            super().segment, programs, inputs, states, diverged_at[:n], first, count
        )
        (states, at, metrics), answers = self.call_all(devices, rows, call, [diverged_at], own)
        at, *values = gathered([at, *metrics.values()], answers)
        return states, at, dict(zip(metrics, values, strict=True))

    def score(
        self, programs: compute.Programs, inputs: compute.Inputs, states: Any, updates: int
    ) -> dict[str, np.ndarray]:
        """Evaluate every row after `updates` updates -> arrays [rows, episodes] by name."""
        devices, rows, _ = self.on(programs)
        call = {"call": "score", "updates": updates}
        own = functools.partial(super().score, programs, inputs, states, updates)
        scores, answers = self.call_all(devices, rows, call, own=own)
        return dict(zip(scores, gathered(list(scores.values()), answers), strict=True))

    def cut(self, states: Any, rows: slice) -> Any:
        """Return the states of some rows of one device of any process."""
        first = jax.tree.leaves(states)[0]
        devices = list(first.sharding.mesh.devices.flat)
        index, start = divmod(rows.start, len(first) // len(devices))
        part = slice(start, start + rows.stop - rows.start)
        process = devices[index].process_index
        index -= spans(devices)[process].start
        if process == LEADER:
            return jax.tree.map(lambda x: of_device(x, index)[part], states)
        call = {"call": "cut", "index": index, "start": part.start, "stop": part.stop}
        _, ((_, leaves),) = self.call_all(devices[spans(devices)[process]], 0, call)
        return checkpoint.like(states, leaves)

    def join(self, programs: compute.Programs, trees: Sequence[Any]) -> Any:
        """Concatenate the states of a batch of units, padded, on their devices."""
        devices, rows, own = self.on(programs)
        units = [list(map(checkpoint.to_numpy, jax.tree.leaves(tree))) for tree in trees]
        leaves = [engine.stacked(parts, rows) for parts in zip(*units, strict=True)]
        self.call_all(devices, rows, {"call": "join"}, leaves)
        return owned(programs, [x[:own] for x in leaves], trees[0])

    def facts(self, programs: compute.Programs, group: plans.Group) -> dict[str, Any]:
        """Return the facts to record about the computation of a unit."""
        return {**super().facts(programs, group), "processes": jax.process_count()}


def gathered(own: Sequence[np.ndarray], answers: Sequence[Message]) -> list[np.ndarray]:
    """Concatenate the rows of all processes, array by array."""
    return [np.concatenate(x) for x in zip(own, *(arrays for _, arrays in answers), strict=True)]


def of_device(array: jax.Array, index: int) -> jax.Array:
    """Return the rows on one of this process's devices."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return shards[index].data


def owned(programs: compute.Programs, leaves: Sequence[np.ndarray], template: Any) -> Any:
    """Put the states of this process's rows on its devices, in memory that a program may overwrite.

    Args:
        programs: of the group.
        leaves: of the states, as received.
        template: states with the same structure and types.

    Returns:
        The states.
    """
    mesh = programs.sharding.mesh
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]

    def put(x: np.ndarray) -> jax.Array:
        shape = (programs.rows * mesh.size, *x.shape[1:])
        split = zip(np.split(x, len(own)), own, strict=True)
        # Never aliased, because the program may overwrite it.
        parts = [jax.device_put(part, device, may_alias=False) for part, device in split]
        return jax.make_array_from_single_device_arrays(shape, programs.sharding, parts)

    return checkpoint.like(template, [put(leaf) for leaf in leaves])


def plain(value: Any) -> Any:
    """Return a value as it arrives after being sent as JSON."""
    return json.loads(json.dumps(value))


# --------------------------------------------------------------------------------- other processes


def follow(load: Callable[[], specs.Spec], devices: Sequence[jax.Device]) -> int:
    """Repeat the calls of process 0 until it ends.

    Args:
        load: reads the sweep named on this process's command line.
        devices: the devices of all processes.

    Returns:
        The exit status of process 0.
    """
    mail, follower = Mail(), Follower(load, devices)
    with signals.recorded() as arrived:  # reported to process 0, which may not have received it
        while True:
            values, arrays = mail.receive(LEADER)
            call = values.pop("call")
            if call == "end":
                return values["status"]
            answer, results = attempted(getattr(follower, call), values, arrays)
            mail.send(LEADER, {**answer, "signal": arrived()}, results)


def attempted(
    call: Callable[..., Any], values: dict[str, Any], arrays: Sequence[np.ndarray]
) -> tuple[dict[str, Any], Sequence[np.ndarray]]:
    """Make a call -> the values and arrays of the answer."""
    try:
        return {}, call(*arrays, **values) or ()
    except remote.EXPECTED as error:
        failure = remote.as_values(error)
    except Exception as error:  # process 0 must also learn of bugs
        traceback.print_exc(file=sys.stderr)
        failure = remote.as_values(FaultError(f"A process failed with {type(error).__name__}."))
    return {"failure": failure}, ()


class Follower:
    """The methods that process 0 calls in the others, with arrays and plain values."""

    def __init__(self, load: Callable[[], specs.Spec], devices: Sequence[jax.Device]) -> None:
        """Compute on this process's part of `devices`."""
        self.load = load
        self.devices = list(devices)

    def hello(self, identity: dict[str, Any], versions: dict[str, str], kind: str) -> None:
        """Check that this process has the same sweep, versions and kind of device."""
        spec = self.load()
        backend = compute.Backend(spec, self.devices)
        here = jax.local_devices()[0].device_kind
        remote.refuse_other_versions(
            {**versions, "device_kind": kind}, {**backend.versions(), "device_kind": here}
        )
        if plain(spec.identity) != identity:
            raise InputError(
                f"All processes of a job must run the same sweep, but {socket.gethostname()} has "
                f"another {spec.name}; {processes.COUNT}=1 lets a process run alone."
            )
        self.backend = backend

    def compile(self, config: dict[str, Any], signature: str, rows: int, units: int) -> None:
        """Compile the programs of a group for `units` units at a time."""
        self.config = configs.build(self.backend.spec.agent.Config, config)
        # Any units do, because programs take seeds and traced values as arguments.
        run = plans.Run("", self.config, self.backend.spec.seeds[0], {})
        self.unit = plans.Unit("", (plans.Leg(run, 0, 1),) * rows)
        group = plans.Group(0, signature, rows, (self.unit,) * units)
        self.programs = self.backend.compile(group)

    def inputs(self, *values: np.ndarray) -> None:
        """Keep the seeds, the traced values and the given arrays of the rows."""
        like = compute.inputs_of(self.backend.spec.given, [self.unit], 1)
        inputs = jax.tree.unflatten(jax.tree.structure(like), values)
        self.rows = self.backend.placed(self.programs, inputs)

    def start(self) -> None:
        """Initialise the rows."""
        self.states = self.backend.start(self.programs, self.rows)

    def join(self, *leaves: np.ndarray) -> None:
        """Set the states of the rows."""
        self.states = owned(self.programs, leaves, self.backend.template(self.unit))

    def segment(self, diverged_at: np.ndarray, first: int, count: int) -> list[np.ndarray]:
        """Train the rows -> diverged_at, metrics."""
        self.states, at, metrics = self.backend.segment(
            self.programs, self.rows, self.states, diverged_at, first, count
        )
        return [at, *metrics.values()]

    def score(self, updates: int) -> list[np.ndarray]:
        """Evaluate the rows."""
        return list(self.backend.score(self.programs, self.rows, self.states, updates).values())

    def cut(self, index: int, start: int, stop: int) -> list[np.ndarray]:
        """Return the states of some rows of one of this process's devices."""
        leaves = jax.tree.leaves(self.states)
        return [checkpoint.to_numpy(of_device(x, index)[start:stop]) for x in leaves]
