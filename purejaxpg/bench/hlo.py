"""Kernels that a compiled program starts, counted from the text of its optimised HLO.

An instruction of a computation that runs by itself is one kernel (on a CPU: one thunk); what a
fusion, a reduction or a sort has inside is not. Loops count their body as often as XLA says that
they run, and their condition once more than that. On a CPU XLA makes small loops one kernel.
"""

import collections
import dataclasses
import functools
import re

# They start nothing: names of memory, or the second half of something asynchronous.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
}
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SMALL = 'xla_cpu_small_call="true"'


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    opcode: str
    text: str

    def called(self, *roles: str) -> list[str]:
        """Return the computations that it names in any of the roles, such as `body`."""
        found = []
        for role in roles:
            match = re.search(rf"\b{role}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.text)
            found += re.findall(r"[\w.\-]+", match[1]) if match else []
        return found

    @property
    def trips(self) -> int | None:
        """Return how often a loop runs, if XLA knows."""
        match = _TRIPS.search(self.text)
        return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What was counted."""

    by_opcode: dict[str, int]
    unknown_loops: int  # counted as running once

    @property
    def total(self) -> int:
        """Return the number of kernels."""
        return sum(self.by_opcode.values())


class Module:
    """A parsed program."""

    def __init__(self, text: str) -> None:
        """Parse what `Compiled.as_text()` returns."""
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        here: list[Instruction] = []
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                here = self.computations.setdefault(header["name"], [])
                self.entry = header["name"] if header["entry"] else self.entry
            elif " = " in line and line.startswith(" "):
                opcode = _OPCODE.search(line.partition(" = ")[2])
                if opcode:
                    here.append(Instruction(opcode[1], line))
        self.count = functools.cache(self._count)

    def _count(self, name: str) -> tuple[collections.Counter[str], int]:
        """Return what a computation starts, by opcode, and its loops of unknown length."""
        total: collections.Counter[str] = collections.Counter()
        unknown = 0
        for instruction in self.computations[name]:
            kernels, loops = self._started(instruction)
            total.update(kernels)
            unknown += loops
        return total, unknown

    def _started(self, instruction: Instruction) -> tuple[collections.Counter[str], int]:
        """Return what one instruction starts."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return collections.Counter(), 0
        if opcode == "while":
            return self._loop(instruction, instruction.trips)
        if opcode == "call" and _SMALL not in instruction.text:
            return self.count(*instruction.called("to_apply"))
        if opcode == "conditional":
            roles = ("branch_computations", "true_computation", "false_computation")
            branches = [self.count(name) for name in instruction.called(*roles)]
            return max(branches, key=lambda found: found[0].total())
        return collections.Counter({opcode: 1}), 0

    def _loop(
        self, instruction: Instruction, trips: int | None
    ) -> tuple[collections.Counter[str], int]:
        """Return what a loop starts; one of unknown length counts as running once."""
        (body,), (condition,) = instruction.called("body"), instruction.called("condition")
        (inside, nested), (test, _) = self.count(body), self.count(condition)
        runs = 1 if trips is None else trips
        total = {name: number * runs for name, number in inside.items()}
        for name, number in test.items():
            total[name] = total.get(name, 0) + number * (runs + (trips is not None))
        return collections.Counter(total), nested + (trips is None)

    def whole(self) -> Kernels:
        """Count the whole program."""
        found, unknown = self.count(self.entry)
        return Kernels(dict(found.most_common()), unknown)

    def one_update(self) -> Kernels:
        """Count one update of a segment: a trip of the longest loop whose length is an argument.

        What the program does before and after that loop is left out. A program without such a loop
        counts as a whole.
        """
        loops = [
            self._loop(instruction, None)
            for instruction in self._reached(self.entry)
            if instruction.opcode == "while" and instruction.trips is None
        ]
        if not loops:
            return self.whole()
        found, unknown = max(loops, key=lambda each: each[0].total())
        return Kernels(dict(found.most_common()), unknown - 1)

    def _reached(self, name: str) -> list[Instruction]:
        """Return the instructions of a computation and of what it calls."""
        found = []
        for instruction in self.computations[name]:
            found.append(instruction)
            if instruction.opcode == "call":
                for inner in instruction.called("to_apply"):
                    found += self._reached(inner)
        return found
