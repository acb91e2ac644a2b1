"""The sources of given arrays: what the table [given] of a sweep file names.

    [given]
    reference = "results/sft"        # seed s gets the model of seed s, of the best configuration
    reward = "results/reward:best"   # all seeds get the model of the best run
    pairs = "pairs.jsonl"            # the trainer's `read` makes arrays of a file

or, for all runs, a published language model with the data to train it on::

    [given]
    model = "smollm2"  # or a folder, or a .gguf file
    data = "pairs.jsonl"
    held_out = "others.jsonl"  # may be absent
    reward = "results/reward"  # as above, for a field that the published model leaves open

In a file of stages a name without "/" is an earlier stage.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from purejaxpg import InputError, contract, text
from purejaxpg import config as configs
from purejaxpg.report import playback, ranking
from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import store as stores

BEST = ":best"
DATA = ".jsonl"


@dataclasses.dataclass(frozen=True)
class Models:
    """What one source gives.

    Attributes:
        what: the source, for messages.
        best: for all seeds; None if each seed has its own.
        of_seed: a pytree of arrays for each seed.
    """

    what: str
    best: Any = None
    of_seed: Mapping[int, Any] = dataclasses.field(default_factory=dict)

    def stacked(self, seeds: Sequence[int]) -> Any:
        """Return a pytree whose arrays have a leading axis: one item, or one for each of `seeds`.

        Leaves may be jax.ShapeDtypeStruct.
        """
        own = [self.of_seed[seed] for seed in seeds] if self.best is None else [self.best]
        return jax.tree.map(lambda *x: _stack(x), *own)


def _stack(arrays: Sequence[Any]) -> Any:
    first = arrays[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(arrays), *first.shape), first.dtype)
    return np.stack([np.asarray(array) for array in arrays])


# (stage, whether the best run's model is wanted) -> what it gives
Stage = Callable[[str, bool], Models]


def no_stage(name: str, best: bool) -> Models:
    """Refuse the name of a stage where there are none."""
    raise InputError(
        f"given must name a result directory, with a '/' (./{name}), or a file that ends in "
        f"{DATA}, but is {name + BEST * best!r}."
    )


def resolve(
    base: Path,
    stage: Stage,
    trainer: types.ModuleType,
    config: Any,
    seeds: tuple[int, ...],
    table: Mapping[str, Any],
) -> tuple[Any, tuple[int, ...]]:
    """Make an instance of a trainer's `Given`; the last four arguments are those of spec.Resolve.

    Args:
        base: the directory that paths are relative to.
        stage: returns the models of a stage.
        trainer: a module.
        config: a configuration of the sweep, for reading data files.
        seeds: of the sweep.
        table: sources by field.

    Returns:
        The instance, and the seeds in the order of its axes: those of the sweep, and then the
        others that have a model in all sources.

    Raises:
        InputError: a field is unknown or missing, or a source does not have what is needed.
    """
    given = None
    if contract.names_published(trainer, table):
        _refuse_results(base, table.get(contract.MODEL))
        given, table = contract.published(trainer, table, base, config)
        given = jax.tree.map(lambda x: np.asarray(x)[None], given)
    else:
        _check_fields(trainer, table)
    found = {
        field: models(field, source, base, stage, trainer, config)
        for field, source in table.items()
    }
    for field, source in found.items():
        lacking = [seed for seed in seeds if source.best is None and seed not in source.of_seed]
        if lacking:
            raise InputError(
                f"given {field} has no model for seed {lacking[0]}: {source.what} has models of "
                f"seeds {', '.join(map(str, source.of_seed))} only, and a diverged run gives none; "
                f"use these seeds, or {table[field] + BEST!r} for all."
            )
    every = [set(source.of_seed) for source in found.values() if source.best is None]
    spare = sorted(set.intersection(*every) - set(seeds)) if every else []
    items = (*seeds, *spare)
    arrays = {field: source.stacked(items) for field, source in found.items()}
    return (dataclasses.replace(given, **arrays) if given else trainer.Given(**arrays)), items


def _refuse_results(base: Path, model: Any) -> None:
    """Refuse a result directory in place of a published model, and say how to make one of it."""
    is_result = isinstance(model, str) and (base / model / ledgers.LEDGER).is_file()
    configs.require(
        not is_result,
        f"given model must be a published model, but {model!r} is a result directory; write its "
        f"model to a folder with `purejaxpg eval {model} --save FOLDER`.",
    )


def _check_fields(trainer: types.ModuleType, table: Mapping[str, Any]) -> None:
    """Raise an InputError unless sources are those of the fields that a trainer needs."""
    name, fields = contract.name_of(trainer), contract.given_fields(trainer)
    configs.require(bool(fields), f"agent {name!r} is given nothing, so [given] must be absent.")
    for field in table:
        configs.require_known(field, fields, "field of given named")
    missing = [field for field, required in fields.items() if required and field not in table]
    configs.require(not missing, f"given must have {', '.join(missing)} for agent {name!r}.")


def models(
    field: str, source: Any, base: Path, stage: Stage, trainer: types.ModuleType, config: Any
) -> Models:
    """Return what one source gives; the arguments are those of `resolve`."""
    configs.require(
        isinstance(source, str) and bool(source.removesuffix(BEST)),
        f"given {field} must be a text, a stage, a directory or a file, but is {source!r}.",
    )
    if source.endswith(DATA):
        return Models(source, best=contract.read(trainer, field, base / source, config))
    name, best = source.removesuffix(BEST), source.endswith(BEST)
    if "/" not in name:
        return stage(name, best)
    return trained(base / name, best)


def trained(directory: Path, best: bool, agent: Path | None = None) -> Models:
    """Return the models of a finished sweep.

    Args:
        directory: its result directory.
        best: of the best run only; else of each seed of the best configuration.
        agent: the trainer's file, if it is not one of the package.

    Raises:
        InputError: there is no such directory, its sweep is unfinished, or there is no such model.
        FaultError: a file is damaged.
    """
    with stores.Store.read(directory) as store:
        name, identity = str(store.ledger.identity.get("agent")), store.ledger.identity
        if not store.ledger.finished:
            done = sum(unit["done"] for unit in store.ledger.units())
            raise InputError(
                f"{directory} cannot be given, because its sweep is unfinished: "
                f"{text.count(done, 'unit')} of it are done; finish it first."
            )
        if best:
            runs = [playback.find(store, playback.BEST)]
        else:
            configs.require(
                not ranking.is_population(identity),
                f"{directory} holds populations, which have no best configuration with a run for "
                f"each seed; use its best run, {str(directory) + BEST!r}.",
            )
            runs = playback.best_configuration(store)
        loaded = playback.load_all(store, runs, agent, lambda _: None)
    given = [contract.model(t.agent, name, t.state, t.config, *t.given) for t in loaded]
    if best:
        return Models(str(directory), best=given[0])
    return Models(str(directory), of_seed={r["seed"]: m for r, m in zip(runs, given, strict=True)})
