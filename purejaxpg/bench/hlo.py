"""Kernels that a compiled program starts, counted from the text of its optimised HLO.

An instruction of a computation is one kernel (on a CPU: one thunk) unless the computation is the
inside of a fusion, a reduction or a sort. Loops count their body as often as XLA says that they
run, and their condition once more than that. On a CPU XLA makes small loops one kernel.
"""

import dataclasses
import functools
import itertools
import re
from collections import Counter

# They start nothing: names of memory, or the second half of something asynchronous.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "add-dependency",
}  # fmt: skip
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
        matches = (re.search(rf"\b{role}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.text) for role in roles)
        return [name for match in matches if match for name in re.findall(r"[\w.\-]+", match[1])]

    @property
    def trips(self) -> int | None:
        """How often a loop runs, if XLA knows."""
        match = _TRIPS.search(self.text)
        return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Kernels that are started, and loops of unknown length, which count as running once."""

    by_opcode: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: int = 0

    @property
    def total(self) -> int:
        """Number of kernels."""
        return self.by_opcode.total()

    def plus(self, other: "Kernels", times: int = 1) -> "Kernels":
        """Return both together, the kernels of `other` started `times` times."""
        more = Counter({opcode: times * number for opcode, number in other.by_opcode.items()})
        return Kernels(self.by_opcode + more, self.unknown_loops + other.unknown_loops)


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

    def whole(self) -> Kernels:
        """Count the whole program."""
        return self.count(self.entry)

    def one_update(self) -> Kernels:
        """Count one update of a segment: a trip of the longest loop whose length is an argument.

        What the program does before and after that loop is left out. A program without such a loop
        counts as a whole.
        """
        every = itertools.chain(*self.computations.values())
        loops = [each for each in every if each.opcode == "while" and each.trips is None]
        if not loops:
            return self.whole()
        longest = max(map(self._loop, loops), key=lambda each: each.total)
        return Kernels(longest.by_opcode, longest.unknown_loops - 1)

    def _count(self, name: str) -> Kernels:
        """Count what a computation starts."""
        total = Kernels()
        for instruction in self.computations[name]:
            total = total.plus(self._started(instruction))
        return total

    def _started(self, instruction: Instruction) -> Kernels:
        """Count what one instruction starts."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return Kernels()
        if opcode == "while":
            return self._loop(instruction)
        if opcode == "call" and _SMALL not in instruction.text:
            return self.count(*instruction.called("to_apply"))
        if opcode == "conditional":
            roles = ("branch_computations", "true_computation", "false_computation")
            branches = [self.count(name) for name in instruction.called(*roles)]
            return max(branches, key=lambda each: each.total)
        return Kernels(Counter({opcode: 1}))

    def _loop(self, instruction: Instruction) -> Kernels:
        """Count what a loop starts; one of unknown length runs body and condition once."""
        (body,), (condition,) = instruction.called("body"), instruction.called("condition")
        trips = instruction.trips
        runs, tests = (1, 1) if trips is None else (trips, trips + 1)
        total = Kernels(unknown_loops=int(trips is None)).plus(self.count(body), runs)
        return total.plus(dataclasses.replace(self.count(condition), unknown_loops=0), tests)
