"""What the trainers of a benchmark are given: models of result directories, or random ones.

All agents of a case share it. How fast a transformer runs does not depend on its parameters, so a
reference that is not named is a random model of the default size.
"""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from purejaxpg import InputError, contract, trainers
from purejaxpg import config as configs
from purejaxpg.sweep import sources

RANDOM = "reference"  # the only field that can be made up


def arrays(
    trainer: types.ModuleType, config: Any, table: Mapping[str, str], shapes: bool = False
) -> Any:
    """Return an instance of a trainer's `Given`, each array with a leading axis of 1; or None.

    Args:
        trainer: a module.
        config: a configuration of it.
        table: sources by field: directories, whose best model is given, or data files.
        shapes: return shapes instead of a random model.

    Raises:
        InputError: a field is unknown, or needs a source.
    """
    name, fields = contract.name_of(trainer), contract.given_fields(trainer)
    configs.require(
        bool(fields) or not table, f"agent {name!r} is given nothing, so --given must be absent."
    )
    for field in table:
        configs.require_known(field, fields, "field of given named")
    found = {}
    for field, required in fields.items():
        if field in table:
            source = table[field]
            best = (
                source if source.endswith((sources.BEST, sources.DATA)) else source + sources.BEST
            )
            models = sources.models(field, best, Path(), sources.no_stage, trainer, config)
            found[field] = models.stacked(())
        elif required and field != RANDOM:
            raise InputError(f"given {field} needs a source; use --given {field}=DIR.")
        elif required:
            found[field] = random_model(config, shapes)
    return trainer.Given(**found) if fields else None


def random_model(config: Any, shapes: bool) -> Any:
    """Return a language model of the default size for the task of a configuration."""
    sft = trainers.load("rlhf.sft")
    own = sft.Config(task=config.task)

    def make(key: jax.Array) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(x)[None], sft.model(sft.init(key, own), own))

    key = jax.random.key(0)
    return jax.eval_shape(make, key) if shapes else jax.jit(make)(key)
