"""Tasks for language models: a vocabulary, prompts, demonstrations and an exact reward.

`sentiment` is controlled sentiment over a small grammar. `enumerable-V-L` has few enough
completions to list. `constitution` forbids some sentences, and `constitution-lessons` also teaches
to criticise and to revise them. The other tasks have right and wrong answers, told apart exactly:
`addition-D` of two numbers of D digits, `sorting-N` of N digits, `countdown-N`, which makes a
target out of N numbers, and `chain-K-M`, which is K sums modulo M one after the other.
`careless-D-F` is addition with slips in the demonstrations and up to F dots after an answer. Each
is a pure function of keys, so data are drawn inside the compiled program. `register` adds a task of
your own.
"""

import functools
from collections.abc import Callable, Mapping

from purejaxpg import InputError
from purejaxpg.rlhf.tasks import (
    careless,
    chain,
    constitution,
    countdown,
    enumerable,
    interface,
    sentiment,
    verifiable,
)
from purejaxpg.rlhf.tasks.interface import BOS, EOS, PAD, Task

__all__ = ["BOS", "EOS", "PAD", "Task", "make", "register"]

# Of tasks with sizes in their names: how they are made, and the least and the largest of each size.
FAMILIES: Mapping[str, tuple[Callable[..., Task], Mapping[str, tuple[int, int]]]] = {
    "enumerable": (enumerable.make, {"V": (2, 9), "L": (1, 6)}),
    "addition": (verifiable.addition, {"D": (1, 6)}),
    "careless": (careless.make, {"D": (1, 6), "F": (0, 8)}),
    "sorting": (verifiable.sorting, {"N": (2, 9)}),
    "countdown": (countdown.make, {"N": (2, 4)}),
    "chain": (chain.make, {"K": (2, 8), "M": (2, 10)}),
}

NAMED: Mapping[str, Callable[[], Task]] = {
    "sentiment": sentiment.make,
    "constitution": constitution.make,
    "constitution-lessons": constitution.lessons,
}

_registered: dict[str, Callable[[], Task]] = {}


def register(name: str, make_task: Callable[[], Task]) -> None:
    """Add a task under a name, for the field `task` of configurations."""
    _registered[name] = make_task
    make.cache_clear()


@functools.cache
def make(name: str) -> Task:
    """Return the task of this name.

    Raises:
        InputError: there is none, or a registered one does not make sense.
    """
    if name in _registered:
        task = _registered[name]()
        interface.check(task, name)
        return task
    if name in NAMED:
        return NAMED[name]()
    family, *sizes = name.split("-")
    if family in FAMILIES:
        return _sized(name, family, sizes)
    known = ", ".join(map(repr, (*NAMED, *map(_pattern, FAMILIES), *_registered)))
    raise InputError(f"task must be one of {known}, but is {name!r}.")


def _sized(name: str, family: str, sizes: list[str]) -> Task:
    """Return a task whose name has sizes."""
    build, ranges = FAMILIES[family]
    allowed = [{str(size) for size in range(low, high + 1)} for low, high in ranges.values()]
    fits = (size in possible for size, possible in zip(sizes, allowed, strict=False))
    if len(sizes) != len(allowed) or not all(fits):
        bounds = [f"{letter} from {low} to {high}" for letter, (low, high) in ranges.items()]
        wanted = f"{_pattern(family)!r} with {' and '.join(bounds)}"
        raise InputError(f"task must be {wanted}, but is {name!r}.")
    return build(*map(int, sizes))


def _pattern(family: str) -> str:
    return "-".join([family, *FAMILIES[family][1]])
