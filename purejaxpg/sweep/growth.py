"""Sweeps that grow: more seeds, more values of an axis, more samples, longer runs.

The same result directory goes on with a changed sweep file, and only what is missing is computed.
What the sweep was before stays in its identity, so `search.grown_rounds` finds the runs of each
growth again, and no finished unit changes.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from purejaxpg import InputError, contract, disk, text
from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores


def continued(spec: specs.Spec, out: Path) -> specs.Spec:
    """Return a sweep that knows what it was before it grew, if the results in `out` are its own.

    Raises:
        InputError: they are of a different sweep, or of one that cannot grow into this one.
        FaultError: they cannot be read.
    """
    if not os.path.isfile(out / ledgers.LEDGER):
        return spec
    with disk.faults("read", out):
        stored = ledgers.identity_at_rest(out)
    history = stored.pop(stores.GROWN, [])
    changed = stores.differences(stored, spec.identity)
    stores.refuse_other_sweep(out, (each for each in changed if not _may_grow(spec, each[0])))
    if stored != spec.identity:
        before = stores.growing(stored)
        reason = next(_reasons(spec, before, out), None)
        if reason is not None:
            raise InputError(
                f"The results in {out} cannot grow into this sweep: {reason}; choose another "
                "directory with --out."
            )
        history = [*history, before]
    if not history:
        return spec
    identity = {**spec.identity, stores.GROWN: history}
    earlier = tuple(specs.earlier(spec, state) for state in history)
    return dataclasses.replace(spec, identity=identity, before=earlier)


def _may_grow(spec: specs.Spec, key: str) -> bool:
    """Return whether a value of the identity may change when a sweep grows."""
    length = contract.length(spec.agent.Config())[0]
    return key.partition(".")[0] in ("seeds", "sweep") or key in (
        "search.samples",
        f"config.{length}",
    )


def _reasons(spec: specs.Spec, before: Mapping[str, Any], out: Path) -> Iterator[str]:
    """Yield why a sweep that was `before` cannot become `spec`; nothing if it can."""
    kind = _kind(spec.search)
    if kind:
        yield f"with {kind}, what is trained depends on the results of all runs before"
    for name in sorted(before["sweep"].keys() ^ spec.identity["sweep"].keys()):
        how = "is no longer" if name in before["sweep"] else "was not"
        yield f"{name} {how} an axis, and all runs of a sweep have the same axes"
    with stores.Store.read(out) as store:
        if any(leg["stage"] == "confirm" for leg in store.ledger.legs()):
            yield "its winner was confirmed on fresh seeds, and the winner could change"
    yield from _runs_lost(spec, specs.earlier(spec, before))


def _kind(search: specs.Search) -> str:
    """Return the kind of a search whose runs depend on results; "" if they do not."""
    if search.pbt is not None:
        return "[pbt]"
    if search.halving is not None:
        return "[halving]"
    return "[search] method 'optuna'" if search.method == "optuna" else ""


def _runs_lost(spec: specs.Spec, before: specs.Spec) -> Iterator[str]:
    """Yield why a run of a sweep that was `before` is no run, or no part of a run, of `spec`."""
    now = {searches.growth_key(run): run for run in spec.runs}
    longer: dict[str, tuple[plans.Run, plans.Run]] = {}
    for old in before.runs:
        new = now.get(searches.growth_key(old))
        if new is None:
            yield _lost(spec, old)
            return
        field, length = contract.length(new.config)
        if new.run_id == old.run_id:
            continue
        if new.config.num_updates <= old.config.num_updates:
            yield (
                f"{field} was {contract.length(old.config)[1]} and is {length}, which must give "
                f"more than the {text.count(old.config.num_updates, 'update')} of before"
            )
            return
        longer.setdefault(_signature(old), (old, new))
    yield from _other_programs(spec, longer.values())


def _lost(spec: specs.Spec, run: plans.Run) -> str:
    """Say why a run is not in a sweep."""
    if spec.search.method != "grid":
        method = spec.search.method
        return f"its configurations are drawn by {method!r}, which now draws others than before"
    swept = ", ".join([text.label(run.swept), f"seed {run.seed}"]).removeprefix(", ")
    return (
        f"it has results for {swept}, which are not in the sweep file, and results are not removed"
    )


def _signature(run: plans.Run) -> str:
    from purejaxpg.sweep import compute

    return compute.signature(run.config)


def _other_programs(
    spec: specs.Spec, pairs: Iterable[tuple[plans.Run, plans.Run]]
) -> Iterator[str]:
    """Yield why a longer run is not the continuation of a shorter one.

    It is one if `init` and `update` are the same programs, which they are not if, for example, the
    learning rate is annealed over the whole run.
    """
    from purejaxpg.sweep import compute

    for old, new in pairs:
        if compute.text_of(spec, old) != compute.text_of(spec, new):
            field = contract.length(new.config)[0]
            yield (
                f"the updates of agent {spec.agent_name!r} depend on {field}, as with a learning "
                "rate that is annealed over the whole run, so a longer run is another run"
            )
            return
