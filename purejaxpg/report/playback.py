"""Play a trained policy out of its checkpoint: new episodes, and a picture of one.

Acting needs the code of the agent. A built-in agent is found by its name. A file is executed only
if the caller names it, never because a result directory does, and only if the runs were trained
with it. The copy in the result directory is executed if the caller asks for it: `stored`.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import os
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from purejaxpg import (
    InputError,
    checkpoint,
    contract,
    disk,
    envs,
    evaluate,
    extras,
    host,
    layout,
    modules,
    trainers,
)
from purejaxpg import config as configs
from purejaxpg.envs import pictures
from purejaxpg.report import ranking
from purejaxpg.sweep import compute, frozen, kept
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep.store import Store
from purejaxpg.text import count, paragraphs, short

BEST = "best"
DRAWN_STEPS, DRAWN_BYTES = 10_000, 2**31  # of an episode, at most
Say = Callable[[str], object]


@dataclasses.dataclass(frozen=True, eq=False)  # so that jax can hash its methods
class Trained:
    """A run, loaded from its checkpoint.

    Attributes:
        run: as ``Store.runs`` gives it.
        agent: the module that was trained.
        state: its state after the last committed update, without a leading axis.
        config: its configuration, the floats as float32.
        given: the arrays that it was given, in a tuple; () without any.
    """

    run: dict[str, Any]
    agent: types.ModuleType
    state: Any
    config: Any
    given: tuple[Any, ...] = ()

    def policy(
        self, key: jax.Array, obs: jax.Array, memory: Any = None, greedy: bool = False
    ) -> Any:
        """Act in N environments; jax may compile this method and map it.

        Args:
            key: for actions that are sampled.
            obs: [N, ...], observations as the environment returns them, and as one-hot vectors
                where it observes an index.
            memory: of a policy that has one: that of `initial_memory` as episodes start, and then
                as the step before returned it.
            greedy: take the most probable actions.

        Returns:
            Actions, [N] int32 or [N, A] float32, and with a memory the pair of them and the memory
            after `obs`. Continuous actions may be out of bounds, at which `envs.step` clips them.

        Raises:
            InputError: the policy has a memory and none is given, or the other way round.
        """
        remembers = contract.has_memory(self.agent)
        configs.require(
            remembers == (memory is not None),
            "This policy has a memory: start with memory = trained.initial_memory(n)."
            if remembers
            else "This policy has no memory, but is given one.",
        )
        flat = jnp.asarray(obs, jnp.float32).reshape(len(obs), -1)
        action, after = contract.act(self.agent, key, self.state, flat, memory, self.config, greedy)
        return (action, after) if remembers else action

    def initial_memory(self, num_envs: int) -> Any:
        """Return the memory with which `num_envs` episodes start, arrays [num_envs, ...]."""
        return contract.initial_memory(self.agent, self.state, self.config, num_envs)


def trained(
    directory: str | os.PathLike[str], run: str = BEST, agent: str | os.PathLike[str] | None = None
) -> Trained:
    """Load a run of a sweep, to act with its policy; the arguments are those of `run`.

    Raises:
        InputError: there is no such run, it plays no environment, or the agent is not the one that
            was trained.
        FaultError: the checkpoint is damaged.
    """
    with Store.read(directory) as store:
        chosen = find(store, run)
        configs.require(
            bool(ranking.environment_of(chosen)),
            f"The runs of {store.path} play no environment; playback.load reads their states.",
        )
        return load(store, chosen, None if agent is None else Path(agent), warnings.warn)


def run(
    directory: str | os.PathLike[str],
    run: str,
    episodes: int,
    greedy: bool,
    seed: int,
    gif: Path | None,
    agent: Path | None,
    say: Say,
    samples: int = 0,
) -> None:
    """Evaluate a trained policy on new episodes, and draw one.

    Args:
        directory: a result directory.
        run: the id of a run, or ``"best"``: of the best configuration among those trained to the
            end, in the first condition, the run with the best score.
        episodes: how many.
        greedy: take the most probable actions instead of sampling.
        seed: decides the episodes.
        gif: write one more episode to this file.
        agent: the agent's file, needed if the agent is not one of the package; or `kept.STORED`.
        say: prints a line.
        samples: print this many texts of a language model instead, beside those of its reference.

    Raises:
        InputError: there is no such run, the agent is not the one that was trained, the
            environment cannot be drawn, or the number of episodes is not positive.
        FaultError: the checkpoint is damaged, or the picture cannot be written.
    """
    configs.require(episodes > 0, f"episodes must be 1 or more, but is {episodes}.")
    configs.require(samples >= 0, f"samples must be 0 or more, but is {samples}.")
    configs.require(0 <= seed < 2**32, f"seed must be in [0, 2**32), but is {seed}.")
    with Store.read(directory) as store:
        chosen = find(store, run)
        played = bool(ranking.environment_of(chosen))
        configs.require(
            played or not (greedy or gif),
            f"--greedy and --gif need an environment, and the runs of {store.path} play none.",
        )
        if gif is not None:
            _check_gif(gif, ranking.environment_of(chosen))
        trained = load(store, chosen, agent, say)
    if gif is not None:
        pictures.require_picture(envs.from_config(trained.config))
    key_episodes, key_picture = random.split(random.key(seed, impl="threefry2x32"))
    code = contextlib.nullcontext() if agent == Path(kept.STORED) else host.without_stored_code()
    with code, host.errors():
        columns = contract.samples(trained.agent, key_episodes, trained, samples) if samples else {}
        scores = "" if samples or played else _scores(key_episodes, trained, episodes)
    say(_description(trained))
    for line in paragraphs(columns) if samples else [scores] * (not played):
        say(line)
    if samples or not played:
        return
    say(_summary(play(key_episodes, trained, episodes, greedy), greedy))
    if gif is not None:
        say(picture(key_picture, trained, greedy, gif))


def save(
    directory: str | os.PathLike[str], run: str, agent: Path | None, folder: Path, say: Say
) -> None:
    """Write the language model of a run to a folder, with its tokenizer.

    Args:
        directory: a result directory.
        run: as for `run`.
        agent: as for `run`.
        folder: to be written, in the layout of published models.
        say: prints a line.

    Raises:
        InputError: there is no such run, or it did not start from a published model.
        FaultError: the checkpoint is damaged, or the folder cannot be written.
    """
    with Store.read(directory) as store:
        trained = load(store, find(store, run), agent, say)
    contract.save(trained.agent, folder, trained)
    say(f"{_description(trained)}; written: {folder}")


# ---------------------------------------------------------------------------------- choosing a run


def find(store: Store, name: str) -> dict[str, Any]:
    """Return the run of this id, or the best run.

    Raises:
        InputError: there is none of this id, or it has no checkpoint yet.
    """
    runs = {run["run_id"]: run for run in store.ledger.runs()}
    if name == BEST:
        name = max(best_configuration(store), key=lambda run: run["score"])["run_id"]
    if name not in runs:
        near = [known for known in runs if name and known.startswith(name)][:3]
        near = near or difflib.get_close_matches(name, runs, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`purejaxpg export` lists the ids."
        raise InputError(f"There is no run {name!r} in {store.path}; {hint}")
    if runs[name]["score"] is None:
        raise InputError(f"The run {name} is still pending: it has no checkpoint yet.")
    return runs[name]


def best_configuration(store: Store) -> list[dict[str, Any]]:
    """Return the healthy runs of the best configuration that was trained to its end.

    They are those of the first condition; [robust] decides which configuration is the best.

    Raises:
        InputError: there is none in the first condition.
    """
    runs, ranked = {run["run_id"]: run for run in store.ledger.runs()}, ranking.rank(store)
    for over in ranking.robust(ranked, store.ledger.identity)[:1]:
        ranked = [over.parts[c.key][0] for c in over.ranked]
    for configuration in ranked:
        own = [runs[run_id] for run_id in configuration.run_ids]
        whole = [run for run in own if run["status"] == "done" and math.isfinite(run["score"])]
        if configuration.environment == ranked[0].environment and whole:
            return whole
    diverged = [run for run in runs.values() if run["status"] == "diverged"]
    if runs and len(diverged) == len(runs):
        raise InputError(f"All runs of {store.path} diverged; there is no best one.")
    raise InputError(f"No run of {store.path} has been trained to its end yet; name one by its id.")


# ----------------------------------------------------------------------------------------- loading


def load(store: Store, run: dict[str, Any], agent: Path | None, say: Say) -> Trained:
    """Read the last committed state of a run; the arguments are those of ``load_all``."""
    return load_all(store, [run], agent, say)[0]


def load_all(
    store: Store, runs: Sequence[dict[str, Any]], agent: Path | None, say: Say
) -> list[Trained]:
    """Read the last committed states of runs.

    Args:
        store: an open result directory.
        runs: of ``Store.runs``, each with a score.
        agent: the agent's file, as for ``run``.
        say: prints a line.

    Raises:
        InputError: the agent is not the one that was trained, or there is no checkpoint.
        FaultError: the checkpoint or the given arrays are damaged.
    """
    module = load_agent(store.path, store.ledger.identity, agent, say)
    if agent != Path(kept.STORED):
        check_environments(store, runs, module, say)
    given = frozen.load(store.path, store.ledger.identity, module)
    units = {name: _unit(store, name, module, given) for name in {run["unit"] for run in runs}}
    spread = _over_mesh(store.ledger.identity)
    given_of = functools.cache(lambda seed: spread(given.of_run(seed)))
    loaded = []
    for run in runs:
        state, config = jax.tree.map(lambda x, row=run["row"]: x[row], units[run["unit"]])
        own = given_of(run["seed"] if given.by_seed else 0)
        loaded.append(Trained(run, module, spread(state), config, own))
    return loaded


def _over_mesh(identity: dict[str, Any]) -> Callable[[Any], Any]:
    """Return what spreads arrays over devices as they were in a sweep that had a mesh.

    Without a mesh, or with fewer devices than it has, they stay on the host.
    """
    wanted, devices = specs.mesh(identity), jax.local_devices()
    if wanted.size == 1 or len(devices) < wanted.size:
        return lambda arrays: arrays
    mesh = compute.mesh_of(wanted, devices[: wanted.size])
    return lambda arrays: jax.device_put(arrays, layout.shardings(arrays, mesh))


def _unit(store: Store, name: str, module: types.ModuleType, given: contract.Given) -> Any:
    """Return the states and the configurations of the legs of a unit, on the host."""
    rows = [leg for leg in store.ledger.legs() if leg["unit"] == name]
    legs = [plans.Leg(_run(module, row), row["start"], row["stop"]) for row in rows]
    inputs = compute.inputs_of(given, [plans.Unit(name, tuple(legs))], len(legs))
    shapes = jax.eval_shape(functools.partial(compute.start_rows, module), inputs)
    return store.state(name, jax.tree.map(_on_host, shapes)), inputs.configs


def _run(module: types.ModuleType, leg: dict[str, Any]) -> plans.Run:
    config = configs.build(module.Config, leg["config"])
    return plans.Run(leg["run_id"], config, leg["seed"], leg["swept"])


def _on_host(shape: jax.ShapeDtypeStruct) -> Any:
    """Return a template of a NumPy array, of which rows are taken without compiling anything."""
    if checkpoint.is_key(shape):
        return shape
    return np.broadcast_to(np.zeros((), shape.dtype), shape.shape)


def load_agent(
    root: Path, identity: dict[str, Any], given: Path | None, say: Say
) -> types.ModuleType:
    """Import the agent of a sweep: a built-in one by its name, any other only from `given`.

    Args:
        root: the result directory.
        identity: of the sweep.
        given: a file that the caller trusts; `kept.STORED` for the copy in `root`; or None.
        say: prints a line if the agent has changed since.

    Raises:
        InputError: the agent is a file and none is given, or it is not the one that was trained.
        FaultError: the copy is damaged.
    """
    name, source = str(identity.get("agent", "")), str(identity.get("agent_source", ""))
    if not name or not source:
        raise InputError("The result directory does not say which agent was trained.")
    if given == Path(kept.STORED):
        path = kept.trainer_file(root)
        kept.import_modules(root)
        return trainers.load(str(path))
    copies = (root / kept.FOLDER / kept.FILES).exists()
    stored = f"--agent {kept.STORED} for the copy in {root / kept.FOLDER}"
    hint, instead = (f", or {stored}", f"; use {stored}") if copies else ("", "")
    if given is not None:
        path = given.resolve()
        configs.require(
            os.path.isfile(path), f"agent {str(given)!r} is not a file; name one{hint}."
        )
        _refuse_changed(root, path, source, f"; use the file as it was{hint}", say)
        return trainers.load(str(path))
    if name not in trainers.names():
        raise InputError(
            f"The runs are of the agent file {name!r}, which is executed only if you name it: "
            f"--agent FILE{hint}."
        )
    if not _digest(trainers.files(name)).startswith(source):
        say(f"Note: {name} has changed since it was trained; what is played may differ{instead}.")
    return trainers.load(name)


def _refuse_changed(root: Path, path: Path, source: str, how: str, say: Say) -> None:
    """Refuse a file that is not the agent that was trained.

    Args:
        root: the result directory.
        path: the file.
        source: the hash in the sweep's identity.
        how: ends the message.
        say: prints a line if only comments, docstrings or formatting changed.
    """
    changed = kept.changes_of_trainer(root, path)
    if changed is None and not _digest(trainers.files(str(path))).startswith(source):
        raise InputError(
            f"{path} is not the agent that was trained, or a module beside it has changed: "
            f"their SHA-256 does not begin with {source}."
        )
    programs = [what for what, program in (changed or {}).items() if program]
    if programs:
        raise InputError(
            f"{path} is not the agent that was trained: {', '.join(programs)} changed{how}."
        )
    if changed:
        say(f"Note: comments, docstrings or formatting of {', '.join(changed)} changed.")


def check_environments(
    store: Store, runs: Sequence[dict[str, Any]], module: types.ModuleType, say: Say
) -> None:
    """Check that the user has named the modules of the runs' environments.

    Args:
        store: an open result directory.
        runs: of ``Store.runs``.
        module: the agent.
        say: prints a line if a module has changed since.

    Raises:
        InputError: an environment is of a module that the user has not named.
    """
    own = [run for run in runs if envs.is_own(ranking.environment_of(run))]
    for run in own:
        modules.require_named(ranking.environment_of(run))
    played, every = (set(map(ranking.environment_of, each)) for each in (runs, store.ledger.runs()))
    if own and played == every:
        made = [contract.environment(configs.build(module.Config, run["config"])) for run in runs]
        source = str(store.ledger.identity.get("env_source"))
        if not _digest(trainers.of_environments(made)).startswith(source):
            say("Note: the environment has changed since; what is played may differ.")


def _digest(files: Sequence[Path]) -> str:
    with disk.faults("read", files[0]):
        return trainers.digest(files)


# ----------------------------------------------------------------------------------------- playing


def play(
    key: jax.Array, trained: Trained, episodes: int, greedy: bool = False
) -> dict[str, np.ndarray]:
    """Play new episodes -> ``return``, ``length`` and ``finished``, each ``[episodes]``."""
    program = functools.partial(
        evaluate.evaluate,
        agent=trained.agent,
        num_episodes=episodes,
        greedy=greedy,
    )
    played = jax.jit(lambda key, state, config: program(key, state=state, config=config))(
        key, trained.state, trained.config
    )
    return {name: np.asarray(value) for name, value in played.items()}


def record(
    key: jax.Array, trained: Trained, greedy: bool = False
) -> tuple[Any, np.ndarray, np.ndarray]:
    """Play one episode and record it.

    Returns:
        The environment's own state before each step, leaves ``[T, ...]``; observations
        ``[T + 1, D]``, the last one after the last step; rewards ``[T]``.
    """
    env, params = envs.setup(trained.config)
    state = jax.eval_shape(lambda key: envs.reset(key, env, params, 1)[1], key)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    limit = min(DRAWN_STEPS, DRAWN_BYTES // size)
    steps = min(contract.horizon(trained.config) or limit, limit)
    episode = jax.jit(functools.partial(_episode, trained.agent, steps, greedy))
    steps_taken = episode(key, trained.state, trained.config)
    inner, obs, next_obs, reward, done = jax.tree.map(lambda x: np.asarray(x)[:, 0], steps_taken)
    length = int(np.argmax(done)) + 1 if done.any() else steps
    states = jax.tree.map(lambda x: x[:length], inner)
    return states, np.concatenate([obs[:length], next_obs[length - 1 : length]]), reward[:length]


def _episode(
    agent: types.ModuleType, steps: int, greedy: bool, key: jax.Array, state: Any, config: Any
) -> Any:
    """Play `steps` steps -> inner state, obs, next_obs, reward and done of each, ``[steps, 1]``."""
    env, params = envs.setup(config)
    key_reset, key_steps = random.split(key)

    def step(carry: tuple[Any, ...], key: jax.Array) -> tuple[tuple[Any, ...], Any]:
        obs, memory, env_state = carry
        key_action, key_env = random.split(key)
        action, memory = contract.act(agent, key_action, state, obs, memory, config, greedy)
        later, env_later, now = envs.step(key_env, env, env_state, action, params)
        memory = envs.restarted(memory, initial, now.done)
        played = env_state.inner, obs, now.next_obs, now.reward, now.done
        return (later, memory, env_later), played

    obs, env_state = envs.reset(key_reset, env, params, 1)
    initial = contract.initial_memory(agent, state, config, 1)
    return jax.lax.scan(step, (obs, initial, env_state), random.split(key_steps, steps))[1]


def picture(key: jax.Array, trained: Trained, greedy: bool, path: Path) -> str:
    """Draw one episode into the file `path`, a GIF or an MP4 -> a message."""
    states, _, rewards = record(key, trained, greedy)
    env, params = envs.setup(trained.config)
    with disk.faults("write", path):
        pictures.save(path, env, params, states, rewards)
    length, total = count(len(rewards), "step"), _short(float(rewards.sum()))
    return f"Drew an episode of {length} with return {total}: {path}"


def _check_gif(path: Path, env_name: str) -> None:
    """Raise early if the picture cannot be drawn or written."""
    if not envs.is_foreign(env_name):
        pictures.require_drawable(env_name)
    configs.require(
        path.suffix.lower() in (".gif", ".mp4"),
        f"The picture must end in .gif or .mp4, but is {str(path)!r}.",
    )
    if path.suffix.lower() == ".mp4":
        extras.load("imageio_ffmpeg", "video", "A picture that ends in .mp4")
    with disk.faults("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)


# ---------------------------------------------------------------------------------------- messages


def _description(trained: Trained) -> str:
    run = trained.run
    swept = [f"{name} {short(v)}" for name, v in run["swept"].items() if name != contract.ENV]
    environment = ranking.environment_of(run)
    head = f"{run['run_id']}: {environment}{', ' if environment else ''}seed {run['seed']}"
    done = f"{run['stop']} of {run['total']} updates" if run["stop"] < run["total"] else ""
    broken = "diverged" if run["status"] == "diverged" else ""
    score = f"score {_short(run['score'])}"
    return ", ".join(part for part in (head, *swept, done, broken, score) if part)


def _summary(played: dict[str, np.ndarray], greedy: bool) -> str:
    """Return the mean return with its standard error, the extremes and the mean length."""
    finished = played["finished"]
    if not finished.any():
        return f"None of {len(finished)} episodes ended within {evaluate.LONGEST} steps."
    returns = played["return"][finished].astype(np.float64)
    running, kind = int((~finished).sum()), "greedy" if greedy else "sampled"
    text = (
        f"{count(len(returns), f'{kind} episode')}: return {_mean(returns)}, "
        f"min {_short(float(np.min(returns)))}, max {_short(float(np.max(returns)))}, "
        f"mean length {_short(float(played['length'][finished].mean()))}"
    )
    return f"{text}; {running} more did not end and have no return" if running else text


def _scores(key: jax.Array, trained: Trained, episodes: int) -> str:
    """Let a trainer score a run on fresh episodes -> the mean of each score."""

    @jax.jit
    def program(key: jax.Array, state: Any, config: Any, *given: Any) -> dict[str, jax.Array]:
        return evaluate.score_run(key, trained.agent, state, config, episodes, *given)

    scores = program(key, trained.state, trained.config, *trained.given)
    parts = [
        f"{name.removeprefix(contract.EVALUATION).replace('_', ' ')} {_mean(values)}"
        for name, values in scores.items()
    ]
    return f"{count(episodes, 'episode')}: {', '.join(parts)}"


def _mean(values: Any) -> str:
    """Return the mean of numbers ``[n]`` with its standard error, if there are several."""
    values = np.asarray(values, np.float64)
    mean, size = _short(float(values.mean())), len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(size) if size > 1 else math.nan
    return f"{mean} ± {_short(error)}" if size > 1 else mean


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.1f}"
