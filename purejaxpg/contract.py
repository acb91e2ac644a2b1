"""The contract between the package and a trainer. No other module looks inside a trainer.

A trainer is a module, built in or a file of the user's. It always defines::

    Config                                     frozen dataclass with num_updates, steps_per_update
    check(config)
    init(key, config, *given)            -> state            with the attribute params
    update(key, state, config, *given)   -> state, metrics   a dict of scalars
    train(key, config, *given)           -> state, metrics

A trainer that plays an environment has the fields `env`, `env_kwargs` and `env_params`, and a
policy; whole episodes of that environment score it::

    policy(key, state, obs, config, greedy)           -> action

A policy that remembers what it has seen of an episode has a memory, a pytree of arrays [n, ...]::

    initial_memory(state, config, n)                          -> memory   as an episode starts
    policy(key, state, obs, memory, config, greedy)           -> action, memory

Any other trainer scores itself::

    score(key, state, config, num_episodes, *given)   -> dict of arrays [E]

with at least `evaluation/return`. Everything else is optional. `Given` is a pytree dataclass of
frozen arrays, such as a pretrained model: a trainer that has it gets one as its last argument. A
field with the default None may be absent. These functions run on the host::

    check_given(config, given)           raises an InputError; leaves may be jax.ShapeDtypeStruct
    samples(key, state, config, num_samples, *given)   -> columns of text, by name
    frontier(key, config, *given)        -> {"kl": [K], "return": [K], "exact": a bool}, the best
                                            that is possible
    model(state, config, *given)         -> a pytree of arrays, which a later trainer is given
    read(name, path, config)             -> a pytree of arrays out of a file, for a field of Given
    published(sources, base, config)     -> a Given with a published language model: sources has
                                            `model`, a folder, a file or a name, `data`, and perhaps
                                            `held_out`, files or names, and `reward`, a Python file;
                                            paths are relative to base; the fields of Given in
                                            PUBLISHED have no other source, and those that it leaves
                                            None may have one
    save(folder, state, config, *given)  writes the trained model in the layout of published ones

Metrics named `episode/...` give learning curves, `UNIT` is the unit of `steps_per_update`, and a
property `activations` of Config is the size of a gradient step. Where that depends on what is
given, a function `activations(config, given)` says it, of arrays that may have one axis more.

The functions import jax themselves, so that a report can read the names without it.
"""

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import math
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from purejaxpg import InputError, text, tracebacks, trees
from purejaxpg import config as configs

NAMES = ("Config", "check", "init", "update", "train")
FIELDS = ("num_updates", "steps_per_update")

ENV = "env"
# Tables of named values inside a configuration: `env_params.gravity` names one of them.
ENV_PARAMS, ENV_KWARGS = "env_params", "env_kwargs"
TABLES = (ENV_PARAMS, ENV_KWARGS)

# Sums over the episodes that ended in an update; without any, the mean is undefined and not 0.
EPISODE = "episode/"
EPISODE_RETURN, EPISODE_COUNT = "episode/return_sum", "episode/count"
CURVE = (EPISODE_RETURN, EPISODE_COUNT)
WATCHED = "loss/"  # prefix of the metrics that mark a run as diverged when they are not finite

EVALUATION = "evaluation/"  # prefix of arrays with one value per evaluation episode
RETURN, GREEDY_RETURN = "evaluation/return", "evaluation/greedy_return"
FINISHED = "evaluation/finished"
# Prefix of metrics with the means of evaluations within training; NaN after the other updates.
EVALUATED = "evaluated/"
EVALUATED_RETURN = "evaluated/return"
# The sources of `published`; a reward that is no Python file is a field of Given like any other.
MODEL, DATA, HELD_OUT, REWARD = "model", "data", "held_out", "reward"
NAMED = (MODEL, DATA, HELD_OUT)  # which may have names that are no paths
PYTHON = ".py"
KL = "evaluation/kl"  # to a reference; returns are comparable only at equal divergence

NUM_ENVS = "num_envs"
ENV_STEPS = "environment steps"


# ------------------------------------------------------------------------------------- the trainer


def check_trainer(trainer: types.ModuleType, name: str) -> None:
    """Raise an InputError unless a module has all parts of a trainer.

    Args:
        trainer: a module.
        name: the name the user gave, for messages.
    """
    names = NAMES if scores_itself(trainer) else (*NAMES, "policy")
    if not all(hasattr(trainer, part) for part in names):
        raise InputError(f"agent {name!r} must define {', '.join(names)}.")
    known = {*dir(trainer.Config), *getattr(trainer.Config, "__dataclass_fields__", ())}
    played = ENV in known or not scores_itself(trainer)
    for field in (*FIELDS, *((ENV, *TABLES) if played else ())):
        if field not in known:
            raise InputError(f"Config of agent {name!r} must be a dataclass with {field}.")
    if hasattr(trainer, "policy"):
        _check_policy(trainer, name)


def _check_policy(trainer: types.ModuleType, name: str) -> None:
    """Raise an InputError unless a policy takes a memory exactly if the trainer defines one."""
    wanted = ["key", "state", "obs", *["memory"] * has_memory(trainer), "config", "greedy"]
    taken = inspect.signature(trainer.policy)
    try:
        taken.bind(*wanted)
        fits = has_memory(trainer) or "memory" not in taken.parameters
    except TypeError:
        fits = False
    if not fits:
        defines = "defines" if has_memory(trainer) else "does not define"
        raise InputError(
            f"policy of agent {name!r} must take {', '.join(wanted)}, because the agent {defines} "
            "initial_memory."
        )


def name_of(trainer: types.ModuleType) -> str:
    """Return the name of a trainer: as the package lists it, or that of its file."""
    package, _, name = trainer.__name__.partition(".")
    if package == "purejaxpg":
        return name.removeprefix("agents.")
    return Path(str(trainer.__file__)).stem


def unit(trainer: types.ModuleType) -> str:
    """Return the unit of a trainer's `steps_per_update`, in the plural."""
    default = ENV_STEPS if has_environment(trainer.Config) else "steps"
    return str(getattr(trainer, "UNIT", default))


def started(trainer: types.ModuleType, key: Any, config: Any, *given: Any) -> Any:
    """Return the first state of a run, which is what the trainer's `init` returns.

    Raises:
        InputError: that is no state. A state has `params`, which are watched for divergence.
    """
    state = trainer.init(key, config, *given)
    if not hasattr(state, "params"):
        raise _broken(trainer, "init", "one value, the state, with the attribute params", state)
    return state


def updated(
    trainer: types.ModuleType, key: Any, state: Any, config: Any, *given: Any
) -> tuple[Any, dict[str, Any]]:
    """Return the next state of a run and its metrics, which the trainer's `update` returns.

    Raises:
        InputError: it returns something else, a metric is no scalar, or the arrays of the state
            have other shapes or types than before.
    """
    returned = trainer.update(key, state, config, *given)
    pair = isinstance(returned, tuple) and len(returned) == 2
    if not pair or not isinstance(returned[1], Mapping):
        raise _broken(trainer, "update", "two values, the state and a dict of metrics", returned)
    after, metrics = returned
    check_metrics(trainer, metrics)
    _check_kept(trainer, state, after)
    return after, dict(metrics)


def _check_kept(trainer: types.ModuleType, before: Any, after: Any) -> None:
    """Raise an InputError unless a state has the arrays of the one before it."""
    import jax
    import jax.numpy as jnp

    def kinds(state: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(state)
        named = ((f"state{jax.tree_util.keystr(path)}", leaf) for path, leaf in leaves)
        numbers = bool | int | float
        return {n: _kind(jnp.asarray(x) if isinstance(x, numbers) else x) for n, x in named}

    wanted = "two values, a state with the arrays of the one before it and a dict of metrics"
    had, has = kinds(before), kinds(after)
    for name in {**had, **has}:
        if had.get(name) != has.get(name):
            old, new = had.get(name, "missing"), has.get(name, "missing")
            raise InputError(
                f"update in {_file(trainer)} must return {wanted}, but {name} is {new} and was "
                f"{old} before."
            )
    structures: list[Any] = [jax.tree.structure(state) for state in (before, after)]
    if structures[0] != structures[1]:
        raise _broken(trainer, "update", wanted, (after, {}))


def _broken(trainer: types.ModuleType, function: str, wanted: str, returned: Any) -> InputError:
    """Return the error that a function of a trainer returns something else than `wanted`."""
    several = returned if type(returned) in (tuple, list) else (returned,)
    had = f"{text.count(len(several), 'value')} ({', '.join(map(_kind, several))})"
    had = "nothing" if returned is None else had
    return InputError(f"{function} in {_file(trainer)} must return {wanted}, but returns {had}.")


def _file(trainer: types.ModuleType) -> str:
    """Return the file of a trainer as the user knows it."""
    return tracebacks.shown(str(trainer.__file__))


def _kind(value: Any) -> str:
    """Return the type and shape of an array, such as "float32[3]", or the type of another value."""
    if isinstance(value, bool | int | float) or not hasattr(value, "dtype"):
        return type(value).__name__
    return f"{value.dtype}{list(value.shape)}"


def check_metrics(trainer: types.ModuleType, metrics: Mapping[str, Any]) -> None:
    """Raise an InputError unless the metrics of an update are scalars.

    Args:
        trainer: a module.
        metrics: as `update` returns them.
    """
    name = name_of(trainer)
    for metric in CURVE:
        if metric not in metrics and any(other in metrics for other in CURVE):
            raise InputError(f"The metrics of agent {name!r} must hold {metric!r}.")
    for metric, value in metrics.items():
        if not isinstance(value, bool | int | float) and getattr(value, "shape", None) != ():
            raise InputError(
                f"The metric {metric!r} of agent {name!r} must be a scalar, but is {_kind(value)}."
            )


# ------------------------------------------------------------------------------------------- given


@dataclasses.dataclass(frozen=True)
class Given:
    """The arrays that a sweep gives to its runs; no run trains them.

    Attributes:
        arrays: an instance of the trainer's `Given`; each array has a leading axis of length 1, to
            be shared by all runs, or one item for the runs of each seed. A jax.ShapeDtypeStruct
            stands for an array that is not known yet. None: no arrays.
        items: by the seed of a run, its place on that axis.
        digest: SHA-256 of all arrays; "" if there are none, or some are not known yet.
    """

    arrays: Any = dataclasses.field(default=None, compare=False)  # the digest tells them apart
    items: Mapping[int, int] = dataclasses.field(default_factory=dict, compare=False)
    digest: str = ""

    def shared(self) -> Any:
        """Return the shared arrays without their leading axis, and None for the others."""
        import jax

        return jax.tree.map(lambda x: _known(x)[0] if x.shape[0] == 1 else None, self.arrays)

    def of_rows(self, seeds: Any) -> Any:
        """Return the other arrays, one item for each of `seeds`, and None for the shared ones.

        Raises:
            InputError: there is no item for one of `seeds`.
        """
        import jax

        def chosen(array: Any) -> Any:
            if array.shape[0] == 1:
                return None
            for seed in seeds:
                if seed not in self.items:
                    raise InputError(
                        f"given has no item for seed {seed}, only for {tuple(self.items)}."
                    )
            return _known(array)[[self.items[seed] for seed in seeds]]

        return jax.tree.map(chosen, self.arrays)

    def of_run(self, seed: int) -> tuple[Any, ...]:
        """Return the arrays of one run without their leading axis, in a tuple; () without any."""
        import jax

        if self.arrays is None:
            return ()
        own = jax.tree.map(lambda x: x[0], self.of_rows([seed]))
        return arguments(own, self.shared())[0]

    @property
    def by_seed(self) -> bool:
        """Whether a run needs an item for its seed."""
        if self.arrays is None:
            return False
        import jax

        return any(leaf.shape[0] > 1 for leaf in jax.tree.leaves(self.arrays))

    @property
    def nbytes(self) -> int:
        """The size of all arrays."""
        import jax

        leaves = jax.tree.leaves(self.arrays)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


NOTHING = Given()


def _known(array: Any) -> Any:
    """Return an array on the host; zeros, which take no memory, for a jax.ShapeDtypeStruct."""
    import jax
    import numpy as np

    if isinstance(array, jax.ShapeDtypeStruct):
        return np.broadcast_to(np.zeros((), array.dtype), array.shape)
    return np.asarray(array)


def given_fields(trainer: types.ModuleType) -> dict[str, bool]:
    """Return the fields of a trainer's `Given` with sources, and whether each is required."""
    wanted, set_together = getattr(trainer, "Given", None), getattr(trainer, "PUBLISHED", ())
    fields = [f for f in dataclasses.fields(wanted) if f.name not in set_together] if wanted else []
    return {f.name: f.default is f.default_factory is dataclasses.MISSING for f in fields}


def names_published(trainer: types.ModuleType, table: Collection[str]) -> bool:
    """Return whether sources name a published model or its data, and not fields of `Given`."""
    own = given_fields(trainer)
    return any(name in table and name not in own for name in (MODEL, DATA))


def published(
    trainer: types.ModuleType, table: Mapping[str, Any], base: Path, config: Any
) -> tuple[Any, dict[str, Any]]:
    """Read a published model and its data for a trainer.

    Args:
        trainer: a module.
        table: the sources.
        base: the directory that paths are relative to.
        config: the first configuration.

    Returns:
        The trainer's `Given`, and the sources of those of its fields that are still None.

    Raises:
        InputError: the trainer takes none, or a source is missing, unknown or wrong.
    """
    name, fields = name_of(trainer), given_fields(trainer)
    if not hasattr(trainer, "published"):
        raise InputError(
            f"agent {name!r} takes no published model, so model and data must be absent; rlhf.sft, "
            "rlhf.dpo and rlhf.grpo, for example, take one."
        )
    for field in table:
        configs.require_known(field, (*NAMED, *fields), "source beside a published model named")
    for field in (MODEL, DATA):
        what = "a folder, a .gguf file or a name" if field == MODEL else "a .jsonl file"
        configs.require(field in table, f"agent {name!r} must also be given {field}, {what}.")
    for field, source in table.items():
        configs.require(
            isinstance(source, str) and bool(source),
            f"given {field} must be a text, but is {source!r}.",
        )
    read = {n: x for n, x in table.items() if n in NAMED or (n == REWARD and x.endswith(PYTHON))}
    given = trainer.published(read, base, config)
    others = {field: source for field, source in table.items() if field not in read}
    for field in others:
        configs.require(
            getattr(given, field) is None,
            f"given {field} must be absent, because the published model takes its place.",
        )
    return given, others


def save(trainer: types.ModuleType, folder: Path, trained: Any) -> None:
    """Write a trained model in the layout of published ones.

    Args:
        trainer: a module.
        folder: to be written.
        trained: with the attributes state, config and given.

    Raises:
        InputError: the trainer writes none.
    """
    if not hasattr(trainer, "save"):
        raise InputError(f"agent {name_of(trainer)!r} has no save, so it writes no model.")
    trainer.save(folder, trained.state, trained.config, *trained.given)


def give(
    trainer: types.ModuleType, name: str, arrays: Any, items: Mapping[int, int], count: int
) -> Given:
    """Check the arrays that a sweep gives to its runs.

    Args:
        trainer: a module.
        name: the name the user gave, for messages.
        arrays: an instance of the trainer's `Given`, or None.
        items: as in `Given`.
        count: number of items.

    Raises:
        InputError: the trainer needs something else, or an array has another number of items.
    """
    wanted, fields = getattr(trainer, "Given", None), given_fields(trainer)
    if wanted is not None and arrays is None and not any(fields.values()):
        arrays = wanted()
    if wanted is None and arrays is None:
        return NOTHING
    if wanted is None or not isinstance(arrays, wanted):
        needed = [field for field, required in fields.items() if required] or ["nothing"]
        had = "nothing" if arrays is None else f"a {type(arrays).__name__}"
        how = f", with [given] or --given {needed[0]}=DIR" if fields else ""
        what = ", ".join(needed)
        raise InputError(f"agent {name!r} must be given {what}{how}, but is given {had}.")
    import jax

    for field in fields:
        for leaf in jax.tree.leaves(getattr(arrays, field)):
            length = leaf.shape[0] if getattr(leaf, "shape", ()) else 0
            if length not in (1, count):
                raise InputError(
                    f"given {field} must have a first axis of 1 or of the {count} seeds, "
                    f"but has {length} items."
                )
    return Given(arrays, items, _digest(arrays))


def _digest(arrays: Any) -> str:
    import jax
    import numpy as np

    structure, leaves = trees.encode(arrays)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return ""
    digest = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
    for leaf in map(np.ascontiguousarray, leaves):
        digest.update(f"{leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes())
    return digest.hexdigest()


def check_given(trainer: types.ModuleType, config: Any, given: Given) -> None:
    """Raise an InputError if a configuration cannot be trained with these arrays."""
    if given.arrays is None or not hasattr(trainer, "check_given"):
        return
    import jax

    def first(array: Any) -> Any:
        unknown = isinstance(array, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(array.shape[1:], array.dtype) if unknown else array[0]

    trainer.check_given(config, jax.tree.map(first, given.arrays))


def model(trainer: types.ModuleType, name: str, state: Any, config: Any, *given: Any) -> Any:
    """Return the arrays of a trained run that a later trainer is given.

    Raises:
        InputError: the trainer of this name has no `model`.
    """
    if not hasattr(trainer, "model"):
        raise InputError(
            f"agent {name!r} has no model(state, config, *given), so no run can be given it."
        )
    return trainer.model(state, config, *given)


def read(trainer: types.ModuleType, field: str, path: Path, config: Any) -> Any:
    """Read a data file for a field of a trainer's `Given`.

    Raises:
        InputError: the trainer reads no files, there is no such file, or its content is invalid.
    """
    if not hasattr(trainer, "read"):
        raise InputError(
            f"given {field} must not be a file, because agent {name_of(trainer)!r} reads none, "
            f"but is {str(path)!r}."
        )
    if not path.is_file():
        raise InputError(f"given {field} is the file {str(path)!r}, which does not exist.")
    return trainer.read(field, path, config)


def arguments(own: Any, shared: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the given arrays as the last argument of a vmapped function, and its in_axes.

    Args:
        own: as `Given.of_rows` returns it, arrays [rows, ...].
        shared: as `Given.shared` returns it.

    Returns:
        Two tuples of length 1, or of length 0 without given arrays.
    """
    import jax

    if own is None and shared is None:
        return (), ()
    absent = {"is_leaf": lambda x: x is None}
    merged = jax.tree.map(lambda o, s: s if o is None else o, own, shared, **absent)
    axes = jax.tree.map(lambda o: None if o is None else 0, own, **absent)
    return (merged,), (axes,)


# --------------------------------------------------------------------------------- the environment


def has_environment(config: Any) -> bool:
    """Return whether a configuration, or its class, has an environment."""
    return hasattr(config, ENV) or ENV in getattr(config, "__dataclass_fields__", ())


def is_condition(name: str) -> bool:
    """Return whether a field is a condition of a run, as opposed to a hyperparameter.

    The environment and its parameters decide which task is solved, so runs that differ in them are
    not ranked against each other.
    """
    return name.partition(".")[0] in (ENV, *TABLES)


def apart(swept: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the hyperparameters and the conditions among the swept fields of a run."""
    conditions = {name: value for name, value in swept.items() if is_condition(name)}
    return {name: v for name, v in swept.items() if name not in conditions}, conditions


def environment_name(config: Any) -> str:
    """Return the `env` of a configuration, or of its plain values; "" if there is none."""
    return str(_field(config, ENV, ""))


def section(config: Any, without: Collection[str] = ()) -> str:
    """Return the section of the report that a run belongs to: its environment with its parameters.

    Args:
        config: a configuration, or its plain values.
        without: names of fields to leave out, such as `env_params.gravity`.

    Returns:
        A text such as "CartPole-v1, gravity 20"; "" without an environment.
    """
    parts = [environment_name(config)] if ENV not in without else []
    for table in TABLES:
        values = dict(_field(config, table, {}))
        kept = {name: x for name, x in values.items() if f"{table}.{name}" not in without}
        parts += [f"{name} {text.short(value)}" for name, value in kept.items()]
    return ", ".join(filter(None, parts))


def _field(config: Any, name: str, default: Any) -> Any:
    """Return a field of a configuration, or of its plain values."""
    if isinstance(config, Mapping):
        return config.get(name, default)
    return getattr(config, name, default)


def environment(config: Any) -> Any:
    """Return the environment of a configuration, or None."""
    if not has_environment(config):
        return None
    from purejaxpg import envs

    return envs.from_config(config)


def packages(environments: Any) -> dict[str, str]:
    """Return the versions of the packages, other than gymnax, that environments come from."""
    names = {name for env in environments for name in getattr(env.inner, "packages", ())}
    return {name: importlib.metadata.version(name) for name in sorted(names)}


def on_host(config: Any) -> bool:
    """Return whether a configuration's environment is on the host, so a state cannot be stored."""
    env = environment(config)
    return env is not None and env.on_host


# ------------------------------------------------------------------------------------------- sizes


def traced_types(config: Any) -> Any:
    """Return the dtype of each traced leaf of a configuration inside the programs."""
    import jax
    import numpy as np

    from purejaxpg import envs

    if has_environment(config):
        return envs.traced_types(config)
    return jax.tree.map(lambda _: np.dtype(np.float32), config)


def param_dtype(config: Any, name: str) -> Any:
    """Return the dtype of one of the environment's parameters."""
    from purejaxpg import envs

    return envs.param_dtype(environment(config), name)


def steps_before(config: Any) -> int:
    """Return the environment steps that `init` takes to fill a replay buffer."""
    return int(getattr(config, "learning_starts", 0))


def timed(config: Any, updates: int, whole: bool) -> dict[str, int]:
    """Return the fields with which a run is long enough to be timed, replay warm-up included.

    Args:
        config: a configuration.
        updates: least number of updates.
        whole: a run takes at least its own number of steps.

    Returns:
        Values by field: a multiple of the environments for the warm-up, and the length. Empty for
        a trainer whose length is not in steps.
    """
    fields = {}
    if hasattr(config, "learning_starts"):
        envs = config.num_envs
        fields["learning_starts"] = envs * -(-config.learning_starts // envs)
    if hasattr(config, "total_timesteps"):
        steps = fields.get("learning_starts", 0) + updates * config.steps_per_update
        fields["total_timesteps"] = max(steps, config.total_timesteps if whole else 0)
    return fields


def length(config: Any) -> tuple[str, int]:
    """Return the name of the field that decides how long a run is, and its value."""
    field = "total_timesteps" if hasattr(config, "total_timesteps") else "num_updates"
    return field, int(getattr(config, field))


def activations(
    config: Any, trainer: types.ModuleType | None = None, given: Given = NOTHING
) -> int:
    """Return the number of activations in one gradient step, which decides the rows of a unit.

    An agent may lack any of these fields; the defaults make the number small.

    Args:
        config: a configuration.
        trainer: whose `activations`, if it has any, knows what is given.
        given: to the runs of a sweep.
    """
    if hasattr(trainer, "activations") and given.arrays is not None:
        return int(trainer.activations(config, given.arrays))  # type: ignore[union-attr]
    if hasattr(config, "activations"):
        return int(config.activations)
    minibatch = config.steps_per_update // getattr(config, "num_minibatches", 1)
    samples = getattr(config, "batch_size", minibatch)
    width = sum(getattr(config, "hidden", ())) + 4 * getattr(config, "memory_size", 0)  # of a GRU
    if has_environment(config):
        width += math.prod(environment(config).obs_shape)
    return int(samples * max(width, 1))


def smaller(config: Any) -> str:
    """Return advice on which fields to lower when memory runs out."""
    sizes = {
        "num_envs": "fewer num_envs",
        "num_steps": "a shorter num_steps",
        "replay_capacity": "a smaller replay_capacity",
        "batch_size": "a smaller batch_size",
    }
    known = [text for name, text in sizes.items() if hasattr(config, name)] or ["a smaller network"]
    return " or ".join(filter(None, [", ".join(known[:-1]), known[-1]]))


# ------------------------------------------------------------------------------------------ policy


def has_memory(trainer: types.ModuleType) -> bool:
    """Return whether a trainer's policy has a memory."""
    return hasattr(trainer, "initial_memory")


def initial_memory(trainer: types.ModuleType, state: Any, config: Any, num_envs: int) -> Any:
    """Return the memory with which a policy starts `num_envs` episodes.

    Args:
        trainer: a module.
        state: a run's state.
        config: its configuration.
        num_envs: n.

    Returns:
        A pytree of arrays [n, ...]; without leaves for a policy that has no memory.

    Raises:
        InputError: an array has another first axis.
    """
    if not has_memory(trainer):
        return ()
    import jax
    import jax.numpy as jnp

    memory = jax.tree.map(jnp.asarray, trainer.initial_memory(state, config, num_envs))
    for leaf in jax.tree.leaves(memory):
        if leaf.shape[:1] != (num_envs,):
            raise InputError(
                f"initial_memory of agent {name_of(trainer)!r} must return arrays with a first "
                f"axis of {num_envs}, one item for each environment, but has {list(leaf.shape)}."
            )
    return memory


def act(
    trainer: types.ModuleType,
    key: Any,
    state: Any,
    obs: Any,
    memory: Any,
    config: Any,
    greedy: bool = False,
) -> tuple[Any, Any]:
    """Let a policy act, with or without a memory.

    Args:
        trainer: a module.
        key: for a sampled action.
        state: a run's state.
        obs: [n, D] raw.
        memory: as `initial_memory` returns it, or as the step before returned it.
        config: the run's configuration.
        greedy: take the most probable action.

    Returns:
        Actions, [n] or [n, A], and the memory after `obs`.

    Raises:
        InputError: the policy returns no action for each observation, or a memory of another kind
            than it was given.
    """
    if not has_memory(trainer):
        action = trainer.policy(key, state, obs, config, greedy)
        _check_actions(trainer, action, len(obs), config)
        return action, memory
    acted = trainer.policy(key, state, obs, memory, config, greedy)
    if not isinstance(acted, tuple) or len(acted) != 2:
        raise _broken(trainer, "policy", "two values, the actions and the memory", acted)
    _check_actions(trainer, acted[0], len(obs), config)
    before, after = _described(memory), _described(acted[1])
    if before != after:
        raise InputError(
            f"policy of agent {name_of(trainer)!r} must return a memory like that of "
            f"initial_memory, {before}, but returns {after}."
        )
    return acted


def _check_actions(trainer: types.ModuleType, action: Any, count: int, config: Any) -> None:
    """Raise an InputError unless a policy returned an action for each of `count` observations."""
    env = environment(config)
    shape = [count] if env.discrete else [count, env.action_size]
    if list(getattr(action, "shape", ())) != shape:
        memory = " beside the memory" * has_memory(trainer)
        raise _broken(trainer, "policy", f"one array of actions {shape}{memory}", action)


def _described(memory: Any) -> str:
    """Return the shapes and types of a memory's arrays in its structure."""
    import jax

    return str(jax.tree.map(_kind, memory)).replace("'", "")


# ------------------------------------------------------------------------------------------- score


def scores_itself(trainer: types.ModuleType) -> bool:
    """Return whether a trainer defines `score`."""
    return hasattr(trainer, "score")


def evaluated(score: str) -> str:
    """Return the name of the metric with the means of a score: "evaluation/x" -> "evaluated/x"."""
    return EVALUATED + score.removeprefix(EVALUATION)


def own_score(
    key: Any, trainer: types.ModuleType, state: Any, config: Any, num_episodes: int, *given: Any
) -> dict[str, Any]:
    """Score one run with the trainer's `score`; the arguments are those of `evaluate.score_run`.

    Raises:
        InputError: the scores are no dict, or lack `evaluation/return`.
    """
    scores = trainer.score(key, state, config, num_episodes, *given)
    if not isinstance(scores, Mapping):
        raise _broken(trainer, "score", f"one value, a dict of arrays with {RETURN!r}", scores)
    if RETURN not in scores:
        raise InputError(f"score of agent {name_of(trainer)!r} must return {RETURN!r}.")
    return dict(scores)


def writes_text(trainer: types.ModuleType) -> bool:
    """Return whether a trainer defines `samples` or `frontier`, as language models do."""
    return hasattr(trainer, "samples") or hasattr(trainer, "frontier")


def samples(trainer: types.ModuleType, key: Any, trained: Any, count: int) -> dict[str, list[Any]]:
    """Let a trained run write texts beside its reference.

    Args:
        trainer: a module.
        key: for the texts.
        trained: with the attributes state, config and given.
        count: how many.

    Returns:
        Columns of equal length.

    Raises:
        InputError: the trainer writes none.
    """
    if not hasattr(trainer, "samples"):
        raise InputError(f"agent {name_of(trainer)!r} has no samples, because it writes no text.")
    columns = trainer.samples(key, trained.state, trained.config, count, *trained.given)
    return dict(columns)


def frontier(trainer: types.ModuleType, key: Any, trained: Any) -> dict[str, Any] | None:
    """Return the best return at each divergence as plain values; None if it is unknown.

    Args:
        trainer: a module.
        key: for samples, if it is estimated.
        trained: with the attributes config and given.

    Returns:
        Lists `kl` and `return`, and `exact`, whether they are more than an estimate.
    """
    if not hasattr(trainer, "frontier"):
        return None
    arrays = trainer.frontier(key, trained.config, *trained.given)
    if arrays is None:
        return None
    lists = {name: [float(x) for x in arrays[name]] for name in ("kl", "return")}
    return {**lists, "exact": bool(arrays.get("exact", False))}


def horizon(config: Any) -> int | None:
    """Return the time limit of an episode in steps; None if it is not known."""
    from purejaxpg import envs

    return envs.horizon(environment(config), config.env_params)
