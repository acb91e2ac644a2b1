"""One sweep on the devices of several processes that `processes.py` has put together.

Process 0 leads: it plans, keeps the ledger, commits and prints. The others follow: they make the
calls that it makes, on the same programs over the devices of all, each for the rows on its own.

Rows need nothing of each other, so neither do processes while a program runs. What travels are
calls, as plain values, and rows of arrays, as bytes, both through the key-value store of jax's
coordination service. Each call is answered, with an error too: no process waits for one that gave
up. Where one dies without an answer, jax ends the others.
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

POLL_MS = 1000  # a signal is heard between two polls
PART_BYTES = 4 * 2**20  # of a message; a value of hundreds of MB was seen to slow the service down
LEADER = 0

Message = tuple[dict[str, Any], list[np.ndarray]]  # plain values, and arrays beside them


class Mail:
    """Messages between two processes, each received once and in order."""

    def __init__(self) -> None:
        """Use the service that jax.distributed has started."""
        from jax._src import distributed  # no public name leads to the store

        self.client: Any = distributed.global_state.client
        self.me = jax.process_index()
        self.count: collections.Counter[str] = collections.Counter()

    def send(self, to: int, said: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Send a message."""
        key = self.key(self.me, to)
        arrays = [np.ascontiguousarray(x) for x in arrays]
        content = b"".join(x.tobytes() for x in arrays)
        parts = [content[i : i + PART_BYTES] for i in range(0, len(content), PART_BYTES)]
        shapes = [[x.dtype.name, list(x.shape)] for x in arrays]
        head = {"said": said, "arrays": shapes, "parts": len(parts)}
        self.client.key_value_set_bytes(key, json.dumps(head).encode())
        for i, part in enumerate(parts):
            self.client.key_value_set_bytes(f"{key}.{i}", part)

    def receive(self, sender: int) -> Message:
        """Wait for the next message of another process.

        Raises:
            FaultError: the service has gone.
        """
        key = self.key(sender, self.me)
        head = json.loads(self.take(key))
        content, at, arrays = b"".join(self.take(f"{key}.{i}") for i in range(head["parts"])), 0, []
        for name, shape in head["arrays"]:
            dtype = jnp.dtype(name)
            array = np.frombuffer(content, dtype, int(np.prod(shape)), at).reshape(shape)
            at += array.nbytes
            arrays.append(array)
        return head["said"], arrays

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
                        "A process of this job has gone; what is done is kept."
                    ) from error
                continue
            self.client.key_value_delete(key)  # and all names below it, of which there are none
            return value


def spans(devices: Sequence[jax.Device]) -> dict[int, slice]:
    """Return which of `devices`, in which each process's stand together, belong to whom."""
    owners = [device.process_index for device in devices]
    return {p: slice(owners.index(p), owners.index(p) + owners.count(p)) for p in owners}


# -------------------------------------------------------------------------------------- process 0


@contextlib.contextmanager
def leading(status_of: Callable[[BaseException], int]) -> Iterator[Mail]:
    """Let the followers end when the block does, with the exit status that it ends in."""
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
    """Computes units here and, by the followers, on the devices of all processes."""

    def __init__(self, spec: specs.Spec, devices: Sequence[jax.Device], mail: Mail) -> None:
        """Compute on `devices`, those of this process first.

        Raises:
            InputError: a follower has another sweep, other versions or other devices.
        """
        super().__init__(spec, devices)
        self.mail = mail
        said = {"identity": plain(spec.identity), "versions": self.versions(), "kind": self.kind}
        self.together(self.devices, 0, {"call": "hello", **said})

    @property
    def kind(self) -> str:
        """The kind of all devices."""
        return self.devices[0].device_kind

    def together(
        self,
        devices: Sequence[jax.Device],
        rows: int,
        said: dict[str, Any],
        arrays: Sequence[np.ndarray] = (),
        own: Callable[[], Any] = lambda: None,
    ) -> tuple[Any, list[Message]]:
        """Make a call in all processes that have one of `devices`.

        Args:
            devices: of the program.
            rows: on each of them.
            said: the call.
            arrays: each follower gets its rows of them.
            own: this process's part.

        Returns:
            What `own` returned, and what the followers answered.

        Raises:
            Exception: what went wrong in any of them; OutOfMemory if that was all.
        """
        others = {p: span for p, span in spans(devices).items() if p != LEADER}
        for p, span in others.items():
            part = slice(span.start * rows, span.stop * rows)
            self.mail.send(p, said, [x[part] for x in arrays])
        mine, failures = None, list[Exception]()
        try:
            mine = own()
        except remote.EXPECTED as error:
            failures.append(error)
        answers = [self.mail.receive(p) for p in others]
        told = [answer["failure"] for answer, _ in answers if "failure" in answer]
        failures += [remote.as_exception(remote.Failure(*each)) for each in told]
        if failures:
            raise min(failures, key=lambda error: getattr(error, "fits", -1))
        for number in {answer["signal"] for answer, _ in answers} - {0}:
            signals.deliver(number)
        return mine, answers

    def on(self, programs: compute.Programs) -> tuple[list[jax.Device], int, int]:
        """Return the devices of a program, the rows on each and those of this process."""
        devices = list(programs.sharding.mesh.devices.flat)
        return devices, programs.rows, programs.rows * spans(devices)[LEADER].stop

    def compile(self, group: plans.Group) -> compute.Programs:
        """Compile the programs of a group in all processes."""
        used = self.devices[: len(group.units)]
        said = {
            "call": "compile",
            "config": self.to_dict(group.config),
            "signature": group.signature,
            "rows": group.rows,
            "units": len(used),
        }
        own = functools.partial(super().compile, group)
        return self.together(used, group.rows, said, own=own)[0]

    def inputs(self, programs: compute.Programs, batch: Sequence[plans.Unit]) -> compute.Inputs:
        """Return the seeds and configurations of this process's rows; the others keep theirs."""
        devices, rows, own = self.on(programs)
        every = super().inputs(programs, batch)
        self.together(devices, rows, {"call": "inputs"}, jax.tree.leaves(every))
        return jax.tree.map(lambda x: x[:own], every)

    def start(self, programs: compute.Programs, inputs: compute.Inputs) -> Any:
        """Initialise every row -> states."""
        devices, rows, _ = self.on(programs)
        own = functools.partial(super().start, programs, inputs)
        return self.together(devices, rows, {"call": "start"}, own=own)[0]

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
        said = {"call": "segment", "first": first, "count": count}
        own = functools.partial(
            super().segment, programs, inputs, states, diverged_at[:n], first, count
        )
        (states, at, metrics), answers = self.together(devices, rows, said, [diverged_at], own)
        at, *values = gathered([at, *metrics.values()], answers)
        return states, at, dict(zip(metrics, values, strict=True))

    def score(
        self, programs: compute.Programs, inputs: compute.Inputs, states: Any, updates: int
    ) -> dict[str, np.ndarray]:
        """Evaluate every row after so many updates."""
        devices, rows, _ = self.on(programs)
        said = {"call": "score", "updates": updates}
        own = functools.partial(super().score, programs, inputs, states, updates)
        scores, answers = self.together(devices, rows, said, own=own)
        return dict(zip(scores, gathered(list(scores.values()), answers), strict=True))

    def cut(self, states: Any, rows: slice) -> Any:
        """Return the states of some rows of one device, whichever process it belongs to."""
        first = jax.tree.leaves(states)[0]
        devices = list(first.sharding.mesh.devices.flat)
        index, start = divmod(rows.start, len(first) // len(devices))
        part = slice(start, start + rows.stop - rows.start)
        process = devices[index].process_index
        index -= spans(devices)[process].start
        if process == LEADER:
            return jax.tree.map(lambda x: of_device(x, index)[part], states)
        said = {"call": "cut", "index": index, "start": part.start, "stop": part.stop}
        _, ((_, leaves),) = self.together(devices[spans(devices)[process]], 0, said)
        return checkpoint.like(states, leaves)

    def join(self, programs: compute.Programs, trees: Sequence[Any]) -> Any:
        """Put the states of a batch of units together, padded, on their devices."""
        devices, rows, own = self.on(programs)
        each = [list(map(checkpoint.to_numpy, jax.tree.leaves(tree))) for tree in trees]
        leaves = [engine.stacked(parts, rows) for parts in zip(*each, strict=True)]
        self.together(devices, rows, {"call": "join"}, leaves)
        return owned(programs, [x[:own] for x in leaves], trees[0])

    def facts(self, programs: compute.Programs, group: plans.Group) -> dict[str, Any]:
        """Return what is to be known about the computation of a unit."""
        return {**super().facts(programs, group), "processes": jax.process_count()}


def gathered(own: Sequence[np.ndarray], answers: Sequence[Message]) -> list[np.ndarray]:
    """Put the rows of all processes together, array by array."""
    return [np.concatenate(x) for x in zip(own, *(arrays for _, arrays in answers), strict=True)]


def of_device(array: jax.Array, index: int) -> jax.Array:
    """Return the rows on one of this process's devices."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return shards[index].data


def owned(programs: compute.Programs, leaves: Sequence[np.ndarray], template: Any) -> Any:
    """Put the states of this process's rows on its devices, in memory that a program may reuse.

    Args:
        programs: of the group.
        leaves: of the states, as they are sent.
        template: states of this structure and these types.

    Returns:
        The states.
    """
    mesh = programs.sharding.mesh
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]

    def put(x: np.ndarray) -> jax.Array:
        shape = (programs.rows * mesh.size, *x.shape[1:])
        split = zip(np.split(x, len(own)), own, strict=True)
        # Never aliased: the program is free to write over it.
        parts = [jax.device_put(part, device, may_alias=False) for part, device in split]
        return jax.make_array_from_single_device_arrays(shape, programs.sharding, parts)

    return checkpoint.like(template, [put(leaf) for leaf in leaves])


def plain(value: Any) -> Any:
    """Return what is left of a value after it was sent."""
    return json.loads(json.dumps(value))


# --------------------------------------------------------------------------------- other processes


def follow(load: Callable[[], specs.Spec], devices: Sequence[jax.Device]) -> int:
    """Make the calls that process 0 makes, until it ends.

    Args:
        load: reads the sweep, from this process's own command line.
        devices: those of all processes.

    Returns:
        The exit status of process 0.
    """
    mail, follower = Mail(), Follower(load, devices)
    with signals.recorded() as arrived:  # process 0 is told: the signal may have come here alone
        while True:
            said, arrays = mail.receive(LEADER)
            call = said.pop("call")
            if call == "end":
                return said["status"]
            answer, found = attempted(getattr(follower, call), said, arrays)
            mail.send(LEADER, {**answer, "signal": arrived()}, found)


def attempted(
    call: Callable[..., Any], said: dict[str, Any], arrays: Sequence[np.ndarray]
) -> tuple[dict[str, Any], Sequence[np.ndarray]]:
    """Make a call -> what to answer."""
    try:
        return {}, call(*arrays, **said) or ()
    except remote.EXPECTED as error:
        failure = remote.as_failure(error)
    except Exception as error:  # process 0 has to hear of a fault of the program, too
        traceback.print_exc(file=sys.stderr)
        failure = remote.Failure("fault", f"A process failed with {type(error).__name__}.")
    return {"failure": [failure.kind, failure.text, failure.fits]}, ()


class Follower:
    """What process 0 calls in the others: each method takes arrays and plain values."""

    def __init__(self, load: Callable[[], specs.Spec], devices: Sequence[jax.Device]) -> None:
        """Compute on those of `devices` that are this process's."""
        self.load = load
        self.devices = list(devices)

    def hello(self, identity: dict[str, Any], versions: dict[str, str], kind: str) -> None:
        """Check that this process has the same sweep and would compute the same numbers."""
        spec = self.load()
        backend = compute.Backend(spec, self.devices)
        here = jax.local_devices()[0].device_kind
        remote.refuse_other_versions(
            {**versions, "device_kind": kind}, {**backend.versions(), "device_kind": here}
        )
        if plain(spec.identity) != identity:
            raise InputError(
                f"All processes of a job must run the same sweep, but {socket.gethostname()} has "
                f"another {spec.name}; {processes.COUNT}=1 lets a process work alone."
            )
        self.backend = backend

    def compile(self, config: dict[str, Any], signature: str, rows: int, units: int) -> None:
        """Compile the programs of a group of so many units at a time."""
        self.config = configs.build(self.backend.spec.agent.Config, config)
        # Which units they are plays no part: programs take seeds and traced values as arguments.
        run = plans.Run("", self.config, self.backend.spec.seeds[0], {})
        self.unit = plans.Unit("", (plans.Leg(run, 0, 1),) * rows)
        group = plans.Group(0, signature, rows, (self.unit,) * units)
        self.programs = self.backend.compile(group)

    def inputs(self, *values: np.ndarray) -> None:
        """Keep the seeds, the traced values and the given arrays of the rows."""
        like = compute.inputs_of(self.backend.spec, self.unit, 1)
        self.rows = jax.tree.unflatten(jax.tree.structure(like), values)

    def start(self) -> None:
        """Initialise the rows."""
        self.states = self.backend.start(self.programs, self.rows)

    def join(self, *leaves: np.ndarray) -> None:
        """Take the states of the rows."""
        self.states = owned(self.programs, leaves, self.backend.template(self.unit))

    def segment(self, diverged_at: np.ndarray, first: int, count: int) -> list[np.ndarray]:
        """Train the rows on -> diverged_at, metrics."""
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
